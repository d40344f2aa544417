//! How long one exchange is waited for: which time limit ends it, and when to look again.
//!
//! A unary call lives by `request`. A stream lives by `idle` and `maxDuration`. A route may say that it streams;
//! Server-Sent Events say so by their content type; a gRPC call shows it when `request` is over: a unary one has
//! sent one message and ended by then, so a call whose caller is still sending, or that has already
//! got an answer message and no trailers, is a stream.

use std::borrow::Cow;
use std::time::Duration;

use tokio::time::Instant;

use crate::net::flow::{Cutoff, Flow};
use crate::problems::Sourced;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::rules::deadline::DeadlineSource;
use crate::rules::timeouts::Timeouts;

/// What has been seen of an exchange when it is judged.
#[derive(Debug, Clone, Copy)]
pub struct TimeoutState {
    /// When the request's head was complete.
    pub began: Instant,
    /// When the present try began; if a fault has delayed it, before that.
    pub try_began: Instant,
    /// The head of the answer is there.
    pub answered: bool,
    /// The route or the answer says that this is a stream.
    pub stream: bool,
    /// It is a gRPC call.
    pub grpc: bool,
    /// The deadline of somebody other than the policy; later than `timeouts.request` only for gRPC, where it ends streams.
    pub until: Option<ExternalDeadline>,
}

/// A deadline that came with the request.
#[derive(Debug, Clone, Copy)]
pub struct ExternalDeadline {
    /// From then on it is late.
    pub at: Instant,
    /// Who said so.
    pub from: DeadlineSource,
    /// How long the call had when it came.
    pub whole: Duration,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum TimeoutVerdict {
    /// Look again then; until then nothing can be over.
    Wait(Instant),
    /// End it.
    Over(LocalReply),
}

impl TimeoutState {
    /// Judges the exchange at `now`.
    pub fn judge(&self, now: Instant, limits: &Timeouts, flow: &Flow) -> TimeoutVerdict {
        let request_at = self.request_at(limits);
        if let Some(until) = self.until.filter(|until| self.grpc && now >= until.at) {
            // A gRPC deadline is that of the whole call, streams included.
            return TimeoutVerdict::Over(LocalReply::ruled(
                LocalReplyKind::DeadlineExceeded,
                until.rule(),
                "the deadline is over",
            ));
        }
        let streams = (self.stream && self.answered) || (now >= request_at && self.shows_a_stream(flow));
        let mut next = self.began + limits.max_duration.value;
        if let Some(until) = self.until.filter(|_| self.grpc) {
            next = next.min(until.at);
        }
        if streams {
            if now >= self.began + limits.max_duration.value {
                return over(
                    LocalReplyKind::MaxDuration,
                    "timeouts.maxDuration",
                    &limits.max_duration,
                    "the stream lived too long",
                );
            }
        } else {
            if now >= request_at {
                return TimeoutVerdict::Over(self.too_late(limits, flow));
            }
            next = request_at;
        }
        if self.answered || streams {
            let idle_at = flow.last() + limits.idle.value;
            if now >= idle_at {
                return over(LocalReplyKind::IdleTimeout, "timeouts.idle", &limits.idle, "no byte in either direction");
            }
            next = next.min(idle_at);
        } else if let Some(per_try) = &limits.per_try {
            let try_at = self.try_began + per_try.value;
            if now >= try_at && !flow.is_starved() {
                return over(LocalReplyKind::PerTryTimeout, "timeouts.perTry", per_try, "no answer within one try");
            }
            next = if now >= try_at { next } else { next.min(try_at) };
        }
        TimeoutVerdict::Wait(next)
    }

    /// How long the present try has taken at `now`.
    pub fn took(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.try_began)
    }

    /// True if nothing says yet that it could be a stream.
    pub fn is_unary(&self) -> bool {
        !self.stream && !self.grpc
    }

    /// Whether a gRPC call has shown by now that it is no unary one. A message that the upstream does not take shows
    /// nothing: only a caller that is waited for has not finished sending.
    pub fn shows_a_stream(&self, flow: &Flow) -> bool {
        self.grpc && (flow.is_starved() || flow.request.messages() > 1 || flow.response.messages() > 0)
    }

    /// When the answer is cut although nobody asks for its next byte.
    pub fn cut(&self, limits: &Timeouts) -> Cutoff {
        let at = if self.is_unary() { self.request_at(limits) } else { self.began + limits.max_duration.value };
        let until = self.until.filter(|_| self.grpc).map_or(at, |until| at.min(until.at));
        Cutoff { at: until, idle: limits.idle.value }
    }

    /// Why an answer was cut that nobody asked the next byte of: the caller's fault, unless it was still reading.
    pub fn cut_off(&self, now: Instant, limits: &Timeouts, flow: &Flow) -> Option<LocalReply> {
        let TimeoutVerdict::Over(refusal) = self.judge(now, limits, flow) else { return None };
        Some(self.unread(refusal, now.saturating_duration_since(flow.last()), limits))
    }

    /// The end of an answer whose caller has taken nothing for `still`: its own fault, unless it was still reading.
    pub fn unread(&self, refusal: LocalReply, still: Duration, limits: &Timeouts) -> LocalReply {
        // What the kernel still takes of a caller that does not read comes in bursts, further and further apart.
        let whole = self.request_at(limits).saturating_duration_since(self.began);
        let has_stopped = still >= whole / 10;
        let by_caller = match refusal.kind {
            LocalReplyKind::IdleTimeout => true,
            LocalReplyKind::RequestTimeout | LocalReplyKind::DeadlineExceeded => has_stopped,
            _ => false,
        };
        if !by_caller {
            return refusal;
        }
        let detail = Cow::Borrowed("the caller stopped reading the answer");
        LocalReply { kind: LocalReplyKind::CallerTimeout, detail, ..refusal }
    }

    fn too_late(&self, limits: &Timeouts, flow: &Flow) -> LocalReply {
        let (kind, detail) = if flow.is_starved() {
            (LocalReplyKind::CallerTimeout, "the caller's body did not come in time")
        } else if self.answered {
            (LocalReplyKind::RequestTimeout, "the answer did not end in time")
        } else {
            (LocalReplyKind::RequestTimeout, "no answer in time")
        };
        match self.until {
            Some(until) if until.at <= self.began + limits.request.value => {
                let kind = if kind == LocalReplyKind::RequestTimeout { LocalReplyKind::DeadlineExceeded } else { kind };
                LocalReply::ruled(kind, until.rule(), detail)
            }
            _ => LocalReply::timed(kind, "timeouts.request", &limits.request, detail),
        }
    }

    /// Why a call that has not been sent yet goes no further: its time is over.
    pub fn over_unsent(
        &self,
        limits: &Timeouts,
        kind: LocalReplyKind,
        detail: impl Into<Cow<'static, str>>,
    ) -> LocalReply {
        match self.until {
            Some(until) if until.at <= self.began + limits.request.value => {
                LocalReply::ruled(LocalReplyKind::DeadlineExceeded, until.rule(), detail)
            }
            _ => LocalReply::timed(kind, "timeouts.request", &limits.request, detail),
        }
    }

    /// When a unary call is over: at the policy's `request`, or earlier where its deadline is.
    pub fn request_at(&self, limits: &Timeouts) -> Instant {
        let request_at = self.began + limits.request.value;
        self.until.map_or(request_at, |until| request_at.min(until.at))
    }
}

fn over(kind: LocalReplyKind, name: &'static str, limit: &Sourced<Duration>, detail: &'static str) -> TimeoutVerdict {
    TimeoutVerdict::Over(LocalReply::timed(kind, name, limit, detail))
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

    fn patience(now: Instant) -> TimeoutState {
        TimeoutState { began: now, try_began: now, answered: false, stream: false, grpc: false, until: None }
    }

    fn kind(verdict: TimeoutVerdict) -> Option<LocalReplyKind> {
        match verdict {
            TimeoutVerdict::Wait(_) => None,
            TimeoutVerdict::Over(refusal) => Some(refusal.kind),
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
        for answered in [false, true] {
            let patience = TimeoutState { answered, ..patience(now) };
            assert_eq!(patience.judge(now + secs(1), &limits(), &flow), TimeoutVerdict::Wait(now + secs(2)));
            assert_eq!(kind(patience.judge(now + secs(2), &limits(), &flow)), Some(LocalReplyKind::RequestTimeout));
        }
    }

    #[test]
    fn a_slow_caller_is_blamed_for_its_own_body() {
        let now = Instant::now();
        let flow = Flow::new(now);
        flow.starve(true);
        assert_eq!(kind(patience(now).judge(now + secs(2), &limits(), &flow)), Some(LocalReplyKind::CallerTimeout));
        flow.starve(false);
        assert_eq!(kind(patience(now).judge(now + secs(2), &limits(), &flow)), Some(LocalReplyKind::RequestTimeout));
    }

    #[test]
    fn an_answer_that_nobody_took_is_its_callers_fault_and_one_that_was_being_read_is_not() {
        let table = [
            (LocalReplyKind::RequestTimeout, 200, LocalReplyKind::CallerTimeout),
            (LocalReplyKind::RequestTimeout, 199, LocalReplyKind::RequestTimeout),
            (LocalReplyKind::DeadlineExceeded, 200, LocalReplyKind::CallerTimeout),
            (LocalReplyKind::DeadlineExceeded, 0, LocalReplyKind::DeadlineExceeded),
            (LocalReplyKind::IdleTimeout, 0, LocalReplyKind::CallerTimeout),
            (LocalReplyKind::MaxDuration, 2000, LocalReplyKind::MaxDuration),
        ];
        for (kind, still, wanted) in table {
            let refusal = LocalReply::timed(kind, "timeouts.request", &limits().request, "over");
            let said = patience(Instant::now()).unread(refusal, Duration::from_millis(still), &limits());
            assert_eq!((said.kind, said.detail == "over"), (wanted, kind == wanted), "{kind:?} after {still} ms");
        }
    }

    #[test]
    fn one_try_has_its_own_limit_until_the_answer_begins() {
        let now = Instant::now();
        let flow = Flow::new(now);
        flow.request.end();
        let mut limits = limits();
        limits.per_try = Some(Sourced::built_in(secs(1)));
        let mut patience = patience(now);
        assert_eq!(patience.judge(now, &limits, &flow), TimeoutVerdict::Wait(now + secs(1)));
        assert_eq!(kind(patience.judge(now + secs(1), &limits, &flow)), Some(LocalReplyKind::PerTryTimeout));
        patience.answered = true;
        assert_eq!(patience.judge(now + secs(1), &limits, &flow), TimeoutVerdict::Wait(now + secs(2)));
    }

    #[test]
    fn a_declared_stream_lives_by_idle_and_max_duration_once_it_is_answered() {
        let now = Instant::now();
        let flow = Flow::new(now);
        flow.request.end();
        let silent = TimeoutState { stream: true, ..patience(now) };
        assert_eq!(kind(silent.judge(now + secs(2), &limits(), &flow)), Some(LocalReplyKind::RequestTimeout));
        let open = TimeoutState { answered: true, ..silent };
        assert_eq!(open.judge(now + secs(59), &limits(), &flow), TimeoutVerdict::Wait(now + secs(60)));
        assert_eq!(kind(open.judge(now + secs(60), &limits(), &flow)), Some(LocalReplyKind::IdleTimeout));
        flow.passed(&flow.response, b"data", now + secs(3590));
        assert_eq!(open.judge(now + secs(3599), &limits(), &flow), TimeoutVerdict::Wait(now + secs(3600)));
        assert_eq!(kind(open.judge(now + secs(3600), &limits(), &flow)), Some(LocalReplyKind::MaxDuration));
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
                flow.passed(&flow.request, &one, now);
            }
            for _ in 0..received {
                flow.passed(&flow.response, &one, now);
            }
            if ended {
                flow.request.end();
            } else {
                flow.starve(true);
            }
            let patience = TimeoutState { grpc: true, answered: received > 0, ..patience(now) };
            assert_eq!(kind(patience.judge(now + secs(2), &limits(), &flow)), expected, "{sent} {received} {ended}");
        }
    }
}
