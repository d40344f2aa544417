//! Which time limit ends an exchange, and when that is checked again. [`super::timeouts`] arms the timer.
//!
//! A unary call ends at `request`. A stream ends by `idle` and `maxDuration`. A route may say that it streams; Server-Sent
//! Events say so by their content type; a gRPC call shows it when `request` is over: by then a unary call has sent its one
//! message and ended, so a call whose caller is still sending, or that has received a message and no trailers, is a stream.

use std::borrow::Cow;
use std::time::Duration;

use tokio::time::Instant;

use crate::net::flow::{Cutoff, Flow};
use crate::problems::Sourced;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::rules::deadline::DeadlineSource;
use crate::rules::timeouts::Timeouts;

/// What the time limits of an exchange depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct TimeoutState {
    /// When the head of the request was complete.
    pub(super) began: Instant,
    /// The route or the response says that this is a stream.
    pub(super) is_stream: bool,
    /// It is a gRPC call.
    pub(super) is_grpc: bool,
    /// A deadline that the policy did not set; later than `timeouts.request` only for gRPC, where it ends streams.
    pub(super) deadline: Option<ExternalDeadline>,
}

/// A deadline that came with the request, or from its parent request.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExternalDeadline {
    /// The call is late from then on.
    pub(super) at: Instant,
    /// Who set it.
    pub(super) from: DeadlineSource,
    /// How long the call had when it came.
    pub(super) whole: Duration,
}

/// What the exchange waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WaitingFor {
    /// The head of the response.
    Head {
        /// When the current attempt began; earlier by as much as an injected delay took.
        attempt_began: Instant,
    },
    /// The rest of the response.
    Body,
}

/// What to do now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TimeoutVerdict {
    /// Check again then; no limit is reached earlier.
    Wait(Instant),
    /// A limit is reached.
    Expired(LocalReply),
}

impl TimeoutState {
    /// Checks the time limits at `now`.
    pub(super) fn check(&self, waiting: WaitingFor, now: Instant, limits: &Timeouts, flow: &Flow) -> TimeoutVerdict {
        let request_at = self.request_at(limits);
        let grpc_deadline = self.deadline.filter(|_| self.is_grpc);
        if let Some(deadline) = grpc_deadline.filter(|deadline| now >= deadline.at) {
            // A gRPC deadline is that of the whole call, streams included.
            let reply = LocalReply::ruled(LocalReplyKind::DeadlineExceeded, deadline.rule(), "the deadline is over");
            return TimeoutVerdict::Expired(reply);
        }
        // A gRPC server may send the head of a stream together with its first message.
        let is_declared = self.is_stream && (waiting == WaitingFor::Body || self.is_grpc);
        let has_shown = now >= request_at && self.has_shown_a_stream(flow);
        let is_stream = is_declared || has_shown;
        let mut next = self.began + limits.max_duration.value;
        if let Some(deadline) = grpc_deadline {
            next = next.min(deadline.at);
        }
        if !is_stream {
            if now >= request_at {
                return TimeoutVerdict::Expired(self.request_expired(waiting, limits, flow));
            }
            next = request_at;
        } else if now >= self.began + limits.max_duration.value {
            let detail = "the stream lasted too long";
            return expired(LocalReplyKind::MaxDuration, "timeouts.maxDuration", &limits.max_duration, detail);
        }
        if is_stream || waiting == WaitingFor::Body {
            let idle_at = flow.last_activity() + limits.idle.value;
            if now >= idle_at {
                let detail = "no byte in either direction";
                return expired(LocalReplyKind::IdleTimeout, "timeouts.idle", &limits.idle, detail);
            }
            next = next.min(idle_at);
        }
        match (waiting, &limits.per_try) {
            (WaitingFor::Head { attempt_began }, Some(per_try)) if !has_shown => {
                let try_at = attempt_began + per_try.value;
                if now >= try_at && !flow.awaits_body() {
                    let detail = "no response within one attempt";
                    return expired(LocalReplyKind::PerTryTimeout, "timeouts.perTry", per_try, detail);
                }
                TimeoutVerdict::Wait(if now >= try_at { next } else { next.min(try_at) })
            }
            _ => TimeoutVerdict::Wait(next),
        }
    }

    /// True while nothing says that the call could be a stream.
    pub(super) fn is_unary(&self) -> bool {
        !self.is_stream && !self.is_grpc
    }

    /// Whether a gRPC call has shown by now that it is not unary. A message that the upstream does not take shows nothing:
    /// only a caller that the upstream waits for has not finished sending.
    pub(super) fn has_shown_a_stream(&self, flow: &Flow) -> bool {
        self.is_grpc && (flow.awaits_body() || flow.request.messages() > 1 || flow.response.messages() > 0)
    }

    /// The deadline of the exchange if it is a stream: only gRPC streams have one.
    pub(super) fn stream_deadline(&self) -> Option<Instant> {
        self.deadline.filter(|_| self.is_grpc).map(|deadline| deadline.at)
    }

    /// When the response is cut although the caller does not read on.
    pub(super) fn cutoff(&self, limits: &Timeouts) -> Cutoff {
        let at = if self.is_unary() { self.request_at(limits) } else { self.began + limits.max_duration.value };
        let at = self.deadline.filter(|_| self.is_grpc).map_or(at, |deadline| at.min(deadline.at));
        Cutoff { at, idle: limits.idle.value }
    }

    /// Why a response was cut while the caller did not read on: the caller's fault, unless it was still reading.
    pub(super) fn unread_cutoff(&self, now: Instant, limits: &Timeouts, flow: &Flow) -> Option<LocalReply> {
        let TimeoutVerdict::Expired(reply) = self.check(WaitingFor::Body, now, limits, flow) else { return None };
        Some(self.blame_slow_reader(reply, now.saturating_duration_since(flow.last_activity()), limits))
    }

    /// The end of a response of which the caller has taken nothing for `still`: the caller's own fault, unless it was still
    /// reading.
    pub(super) fn blame_slow_reader(&self, reply: LocalReply, still: Duration, limits: &Timeouts) -> LocalReply {
        // The kernel takes bytes for a caller that does not read in bursts, further and further apart.
        let whole = self.request_at(limits).saturating_duration_since(self.began);
        let has_stopped = still >= whole / 10;
        let by_caller = match reply.kind {
            LocalReplyKind::IdleTimeout => true,
            LocalReplyKind::RequestTimeout | LocalReplyKind::DeadlineExceeded => has_stopped,
            _ => false,
        };
        if !by_caller {
            return reply;
        }
        let detail = Cow::Borrowed("the caller stopped reading the response");
        LocalReply { kind: LocalReplyKind::CallerTimeout, detail, ..reply }
    }

    fn request_expired(&self, waiting: WaitingFor, limits: &Timeouts, flow: &Flow) -> LocalReply {
        let deadline = self.deadline.filter(|deadline| deadline.at <= self.began + limits.request.value);
        let (kind, detail) = if flow.awaits_body() {
            (LocalReplyKind::CallerTimeout, "the caller's body did not come in time")
        } else if self.is_grpc && !self.is_stream && deadline.is_none() && flow.response.messages() == 0 {
            let detail = "no response message in time; if this is a stream whose first message may come later, its \
                          route needs `stream: true`";
            (LocalReplyKind::RequestTimeout, detail)
        } else if waiting == WaitingFor::Body {
            (LocalReplyKind::RequestTimeout, "the response did not end in time")
        } else {
            (LocalReplyKind::RequestTimeout, "no response in time")
        };
        match deadline {
            Some(deadline) => {
                let is_request = kind == LocalReplyKind::RequestTimeout;
                let kind = if is_request { LocalReplyKind::DeadlineExceeded } else { kind };
                LocalReply::ruled(kind, deadline.rule(), detail)
            }
            None => LocalReply::timed(kind, "timeouts.request", &limits.request, detail),
        }
    }

    /// The local reply to a call whose time ended before it was sent. `kind` is what it waited for, where the policy's
    /// `request` ended it.
    pub(super) fn expired_unsent(
        &self,
        limits: &Timeouts,
        kind: LocalReplyKind,
        detail: impl Into<Cow<'static, str>>,
    ) -> LocalReply {
        match self.deadline {
            Some(deadline) if deadline.at <= self.began + limits.request.value => {
                LocalReply::ruled(LocalReplyKind::DeadlineExceeded, deadline.rule(), detail)
            }
            _ => LocalReply::timed(kind, "timeouts.request", &limits.request, detail),
        }
    }

    /// When a unary call ends: at the policy's `request`, or earlier where its deadline is.
    pub(super) fn request_at(&self, limits: &Timeouts) -> Instant {
        let request_at = self.began + limits.request.value;
        self.deadline.map_or(request_at, |deadline| request_at.min(deadline.at))
    }
}

fn expired(
    kind: LocalReplyKind,
    name: &'static str,
    limit: &Sourced<Duration>,
    detail: &'static str,
) -> TimeoutVerdict {
    TimeoutVerdict::Expired(LocalReply::timed(kind, name, limit, detail))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Timeouts {
        let mut limits = Timeouts::built_in();
        limits.request.value = Duration::from_secs(2);
        limits.idle.value = Duration::from_secs(60);
        limits.max_duration.value = Duration::from_secs(3600);
        limits
    }

    fn state(now: Instant) -> TimeoutState {
        TimeoutState { began: now, is_stream: false, is_grpc: false, deadline: None }
    }

    fn head(attempt_began: Instant) -> WaitingFor {
        WaitingFor::Head { attempt_began }
    }

    fn kind(verdict: TimeoutVerdict) -> Option<LocalReplyKind> {
        match verdict {
            TimeoutVerdict::Wait(_) => None,
            TimeoutVerdict::Expired(reply) => Some(reply.kind),
        }
    }

    const fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_unary_call_ends_at_request_answered_or_not() {
        let now = Instant::now();
        let flow = Flow::new(now);
        flow.request.end();
        let unary = state(now);
        for waiting in [head(now), WaitingFor::Body] {
            assert_eq!(unary.check(waiting, now + secs(1), &limits(), &flow), TimeoutVerdict::Wait(now + secs(2)));
            let late = unary.check(waiting, now + secs(2), &limits(), &flow);
            assert_eq!(kind(late), Some(LocalReplyKind::RequestTimeout));
        }
    }

    #[test]
    fn a_slow_caller_is_blamed_for_its_own_body() {
        let now = Instant::now();
        let flow = Flow::new(now);
        flow.set_awaits_body(true);
        assert_eq!(
            kind(state(now).check(head(now), now + secs(2), &limits(), &flow)),
            Some(LocalReplyKind::CallerTimeout)
        );
        flow.set_awaits_body(false);
        assert_eq!(
            kind(state(now).check(head(now), now + secs(2), &limits(), &flow)),
            Some(LocalReplyKind::RequestTimeout)
        );
    }

    #[test]
    fn a_response_that_the_caller_did_not_read_is_the_callers_fault_and_one_being_read_is_not() {
        let table = [
            (LocalReplyKind::RequestTimeout, 200, LocalReplyKind::CallerTimeout),
            (LocalReplyKind::RequestTimeout, 199, LocalReplyKind::RequestTimeout),
            (LocalReplyKind::DeadlineExceeded, 200, LocalReplyKind::CallerTimeout),
            (LocalReplyKind::DeadlineExceeded, 0, LocalReplyKind::DeadlineExceeded),
            (LocalReplyKind::IdleTimeout, 0, LocalReplyKind::CallerTimeout),
            (LocalReplyKind::MaxDuration, 2000, LocalReplyKind::MaxDuration),
        ];
        for (kind, still, wanted) in table {
            let reply = LocalReply::timed(kind, "timeouts.request", &limits().request, "over");
            let said = state(Instant::now()).blame_slow_reader(reply, Duration::from_millis(still), &limits());
            assert_eq!((said.kind, said.detail == "over"), (wanted, kind == wanted), "{kind:?} after {still} ms");
        }
    }

    #[test]
    fn one_attempt_has_its_own_limit_until_the_response_begins() {
        let now = Instant::now();
        let flow = Flow::new(now);
        flow.request.end();
        let mut limits = limits();
        limits.per_try = Some(Sourced::built_in(secs(1)));
        let unary = state(now);
        assert_eq!(unary.check(head(now), now, &limits, &flow), TimeoutVerdict::Wait(now + secs(1)));
        let late = unary.check(head(now), now + secs(1), &limits, &flow);
        assert_eq!(kind(late), Some(LocalReplyKind::PerTryTimeout));
        let answered = unary.check(WaitingFor::Body, now + secs(1), &limits, &flow);
        assert_eq!(answered, TimeoutVerdict::Wait(now + secs(2)));
    }

    #[test]
    fn a_declared_grpc_stream_may_begin_after_request() {
        let now = Instant::now();
        let flow = Flow::new(now);
        flow.request.end();
        let mut limits = limits();
        let call = TimeoutState { is_grpc: true, ..state(now) };
        let stream = TimeoutState { is_stream: true, ..call };
        let TimeoutVerdict::Expired(reply) = call.check(head(now), now + secs(2), &limits, &flow) else {
            panic!("it goes on");
        };
        assert_eq!(reply.kind, LocalReplyKind::RequestTimeout);
        assert!(reply.detail.contains("`stream: true`"), "{}", reply.detail);
        assert_eq!(stream.check(head(now), now + secs(2), &limits, &flow), TimeoutVerdict::Wait(now + secs(60)));
        assert_eq!(kind(stream.check(head(now), now + secs(60), &limits, &flow)), Some(LocalReplyKind::IdleTimeout));
        limits.per_try = Some(Sourced::built_in(secs(5)));
        assert_eq!(stream.check(head(now), now + secs(2), &limits, &flow), TimeoutVerdict::Wait(now + secs(5)));
        assert_eq!(kind(stream.check(head(now), now + secs(5), &limits, &flow)), Some(LocalReplyKind::PerTryTimeout));
    }

    #[test]
    fn a_declared_stream_lives_by_idle_and_max_duration_once_it_is_answered() {
        let now = Instant::now();
        let flow = Flow::new(now);
        flow.request.end();
        let stream = TimeoutState { is_stream: true, ..state(now) };
        let check = |waiting, after| stream.check(waiting, now + secs(after), &limits(), &flow);
        assert_eq!(kind(check(head(now), 2)), Some(LocalReplyKind::RequestTimeout));
        let open = |after| check(WaitingFor::Body, after);
        assert_eq!(open(59), TimeoutVerdict::Wait(now + secs(60)));
        assert_eq!(kind(open(60)), Some(LocalReplyKind::IdleTimeout));
        flow.record_bytes(&flow.response, b"data", now + secs(3590));
        assert_eq!(open(3599), TimeoutVerdict::Wait(now + secs(3600)));
        assert_eq!(kind(open(3600)), Some(LocalReplyKind::MaxDuration));
    }

    #[test]
    fn a_grpc_call_is_taken_for_a_stream_only_when_it_shows_itself_as_one() {
        let one = [0, 0, 0, 0, 1, 7];
        type Passed = (u32, u32, bool);
        let table: [(Passed, Option<LocalReplyKind>); 5] = [
            ((1, 0, true), Some(LocalReplyKind::RequestTimeout)),
            ((1, 0, false), None),
            ((1, 1, true), None),
            ((2, 0, true), None),
            ((0, 0, true), Some(LocalReplyKind::RequestTimeout)),
        ];
        for ((sent, received, ended), expected) in table {
            let now = Instant::now();
            let flow = Flow::new(now);
            flow.count_messages();
            for _ in 0..sent {
                flow.record_bytes(&flow.request, &one, now);
            }
            for _ in 0..received {
                flow.record_bytes(&flow.response, &one, now);
            }
            if ended {
                flow.request.end();
            } else {
                flow.set_awaits_body(true);
            }
            let call = TimeoutState { is_grpc: true, ..state(now) };
            let waiting = if received > 0 { WaitingFor::Body } else { head(now) };
            let verdict = call.check(waiting, now + secs(2), &limits(), &flow);
            assert_eq!(kind(verdict), expected, "{sent} {received} {ended}");
        }
    }
}
