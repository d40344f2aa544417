//! The tries of one request: when one fails, whether another follows, and what is told when none does.
//!
//! The decision itself is `rules/retry.rs`; this file finds out what happened (status, gRPC code, a reset, the marks of
//! sidecars further down), has the try judged, waits, and sends the request again from what was kept of it. A request that
//! goes well passes through here without a stop.

use std::ops::ControlFlow;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::header::HeaderMap;
use http::{Request, Response, header};
use http_body::Body;
use jiff::Timestamp;
use tokio::time::Instant;

use crate::policy::model::Direction;
use crate::proxy::headers::{self, HeaderScan};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::request_context::RequestContext;
use crate::proxy::{attempt, correlation, grpc, outcome};
use crate::rules::circuit_breaker::CallResult;
use crate::rules::mode::{Mode, RuleName};
use crate::rules::proxy_status::ProxyStatus;
use crate::rules::retry::{AttemptFailure, AttemptSummary, NoRetryReason, Pushback, RetryDecision};
use crate::telemetry::RetryReason;
use crate::upstream::pool::{Pool, Transport};
use crate::upstream::response::UpstreamBody;

type Tried = Result<Response<UpstreamBody>, LocalReply>;

/// Sends the request until there is an answer that stands: a good one, or the last bad one.
///
/// # Errors
/// The refusal that the caller gets instead.
pub async fn run(live: &mut RequestContext, pool: &Rc<Pool>, switching: bool) -> Tried {
    let most = match live.spare {
        Some(_) => 1 + u16::try_from(live.route().retry.attempts.value).unwrap_or(u16::MAX - 1),
        None => 1,
    };
    live.attempt = 1;
    let mut because = None;
    loop {
        let tried = match outcome::admit(live, Instant::now()) {
            Ok(()) => {
                live.record.attempt(live.attempt, most);
                if let Some(because) = because {
                    live.worker.shard.telemetry().retried(&live.destination_values().name, because);
                }
                attempt::send(live, pool, switching).await
            }
            Err(refusal) => Err(refusal),
        };
        let next = match settle(live, tried) {
            ControlFlow::Break(fine) => return fine,
            // Boxed, like everything that few requests meet.
            ControlFlow::Continue(tried) => Box::pin(again(live, pool, tried)).await,
        };
        match next {
            ControlFlow::Continue(again) => because = Some(again),
            ControlFlow::Break(stands) => return stands,
        }
        live.attempt += 1;
    }
}

/// Breaks with an answer that nobody has to think about. Takes and gives the try by value: what is only lent would be
/// kept in the future of every request.
fn settle(live: &RequestContext, tried: Tried) -> ControlFlow<Tried, Tried> {
    match tried {
        Ok(answer) if is_fine(live, &answer) => ControlFlow::Break(Ok(answer)),
        tried => ControlFlow::Continue(tried),
    }
}

fn is_fine(live: &RequestContext, answer: &Response<UpstreamBody>) -> bool {
    let status = answer.status().as_u16();
    let is_wanted = status < 400 || (status < 500 && !live.route().retry.is_on(AttemptFailure::Status(status)));
    is_wanted && !(live.patience.grpc && answer.headers().contains_key(grpc::STATUS))
}

/// After a try that did not go well. Continues when the request is ready for the next one; breaks with what stands.
async fn again(live: &mut RequestContext, pool: &Rc<Pool>, tried: Tried) -> ControlFlow<Tried, RetryReason> {
    let now = Instant::now();
    let report = AttemptReport::of(live, pool, &tried);
    judge(live, &report, &tried, now);
    let (stands, why) = match decide(live, &report, now) {
        RetryDecision::Retry { after } => {
            let stands = prepare(live, tried, &report);
            pause(live, after).await;
            if !correlation::is_abandoned(live) {
                let is_unsent = report.failure == Some(AttemptFailure::Unsent);
                return ControlFlow::Continue(if is_unsent { RetryReason::Unsent } else { RetryReason::Failed });
            }
            (stands, NoRetryReason::CallerGone)
        }
        RetryDecision::Stop(why) => (tried, why),
    };
    tell(live, &report, why, Instant::now());
    ControlFlow::Break(stands)
}

/// What is known of a try that did not go well.
struct AttemptReport {
    /// `None`: no failure of the callee at all.
    failure: Option<AttemptFailure>,
    /// It speaks against the callee, or against somebody further down.
    counts: bool,
    /// The callee's sidecar has answered that it was one call too many, as a 429 does where it is not gRPC.
    is_limited: bool,
    /// Nobody can have seen the request.
    unseen: bool,
    mark: Option<ProxyStatus>,
    pushback: Option<Pushback>,
}

impl AttemptReport {
    fn of(live: &mut RequestContext, pool: &Pool, tried: &Tried) -> Self {
        let counts = outcome::speaks_against(live, tried);
        match tried {
            Ok(answer) => Self::of_answer(live, pool, answer, counts),
            Err(refusal) => {
                let failure = of_refusal(live, pool, refusal.kind);
                let unseen = refusal.kind != LocalReplyKind::UpstreamProtocol && live.unsent;
                Self { failure, counts, is_limited: false, unseen, mark: None, pushback: None }
            }
        }
    }

    fn of_answer(live: &mut RequestContext, pool: &Pool, answer: &Response<UpstreamBody>, counts: bool) -> Self {
        let fields = answer.headers();
        let present = HeaderScan::scan(fields);
        let mark = present.proxy_status.then(|| outcome::read_mark(fields)).flatten();
        let said = outcome::said(live, answer);
        let mut failure = said.map_or_else(AttemptFailure::Status, AttemptFailure::Grpc);
        let is_unsent = live.believes_unsent(mark.as_ref().is_some_and(|mark| mark.is_unsent));
        // Where there is nobody else to send it to at once, it waits like any other failure.
        if is_unsent && has_other(live, pool) {
            failure = AttemptFailure::Unsent;
        }
        // It speaks for its own endpoint; where another one can have the call, nobody need wait.
        let obeys = present.pushback && failure != AttemptFailure::Unsent;
        let pushback = obeys.then(|| pushback(fields, said.is_ok())).flatten();
        let is_limited = outcome::is_limited(said, fields);
        Self { failure: Some(failure), counts, is_limited, unseen: is_unsent, mark, pushback }
    }
}

/// What the upstream said about another try (RFC 9110, 10.2.3; gRFC A6).
fn pushback(fields: &HeaderMap, grpc: bool) -> Option<Pushback> {
    if grpc {
        let value = fields.get(grpc::PUSHBACK)?;
        let wait = value.to_str().ok().and_then(|text| text.trim().parse::<u32>().ok());
        return Some(wait.map_or(Pushback::Stop, |millis| Pushback::Wait(Duration::from_millis(millis.into()))));
    }
    let text = fields.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    // A number that is too large to be held is a very long time all the same.
    let wait = if is_number { Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX))) } else { until_date(text) };
    wait.map(Pushback::Wait)
}

/// The time until a date in any of the three forms of HTTP (RFC 9110, 5.6.7); nothing for one that is past.
fn until_date(text: &str) -> Option<Duration> {
    let at = Timestamp::try_from(httpdate::parse_http_date(text).ok()?).ok()?;
    Some(Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default())
}

/// Whether the destination has an endpoint that the call has not tried.
fn has_other(live: &RequestContext, pool: &Pool) -> bool {
    live.endpoint.as_ref().is_some_and(|this| pool.has_other(&live.tried, this))
}

/// What a refusal of ours means for another try.
fn of_refusal(live: &RequestContext, pool: &Pool, kind: LocalReplyKind) -> Option<AttemptFailure> {
    // A connection that ends leaves its last requests aside, and a new one takes them; but not one after the other.
    // Before the app, which has refused it, that is the only way: the caller's sidecar has other endpoints.
    let is_inbound = live.direction == Direction::Inbound;
    let can_have_it = || (!is_inbound && has_other(live, pool)) || (live.leaving && live.attempt == 1);
    match kind {
        LocalReplyKind::ConnectFailed
        | LocalReplyKind::ConnectTimeout
        | LocalReplyKind::DnsFailed
        | LocalReplyKind::TlsFailed => Some(AttemptFailure::Reset),
        LocalReplyKind::UpstreamReset if live.unsent && can_have_it() => Some(AttemptFailure::Unsent),
        LocalReplyKind::UpstreamReset if live.unsent => Some(AttemptFailure::Refused),
        LocalReplyKind::UpstreamReset | LocalReplyKind::UpstreamProtocol => Some(AttemptFailure::Reset),
        LocalReplyKind::PerTryTimeout => Some(AttemptFailure::Timeout),
        _ => None,
    }
}

/// A failure counts here, unless it happened further down: its mark says so, or the app has told by a call of its own.
fn judge(live: &mut RequestContext, report: &AttemptReport, tried: &Tried, now: Instant) {
    let is_marked = report.mark.as_ref().is_some_and(|mark| mark.at.is_some());
    let is_elsewhere = is_marked || correlation::is_blamed_below(live);
    if report.is_limited {
        outcome::judge(live, CallResult::Success, now);
    }
    if !report.counts {
        return;
    }
    if !live.spares(is_elsewhere) {
        outcome::judge(live, CallResult::Failure, now);
    } else if tried.is_ok() {
        outcome::judge_probes(live, now);
    }
}

fn decide(live: &mut RequestContext, report: &AttemptReport, now: Instant) -> RetryDecision {
    let Some(failure) = report.failure else { return RetryDecision::Stop(NoRetryReason::NotAFailure) };
    let modes = &live.view.policy.model.modes;
    let (retry, in_one_place) = (modes.retry.value, modes.retry_in_one_place.value);
    let marked = report.mark.as_ref().is_some_and(|mark| mark.is_final) || correlation::is_spent(live, now);
    let (Some(seen), Some(health)) = (seen(live, report, failure, now), live.health()) else {
        return RetryDecision::Stop(NoRetryReason::Off);
    };
    let seen = AttemptSummary { is_marked_final: marked && in_one_place.is_enforced(), ..seen };
    let decision = match retry.is_enforced() {
        true => live.route().retry.next(&seen, &health.budget, now),
        false => live.route().retry.decide(&seen),
    };
    if !matches!(decision, RetryDecision::Retry { .. }) {
        return decision;
    }
    // Who has seen nothing of it gets it again in spite of the mark, whatever the mode.
    if marked && in_one_place == Mode::DryRun && failure != AttemptFailure::Unsent {
        live.would(RuleName::RetryInOnePlace);
    }
    if !retry.is_enforced() {
        live.would(RuleName::Retry);
        return RetryDecision::Stop(NoRetryReason::Off);
    }
    decision
}

/// What there is to decide over, but for the mark; nothing where the request was not kept for another try.
fn seen(
    live: &RequestContext,
    report: &AttemptReport,
    failure: AttemptFailure,
    now: Instant,
) -> Option<AttemptSummary> {
    let destination = live.view.destination(live.destination());
    let refuses = live.view.policy.model.modes.circuit_breaker.value.is_enforced() && destination.breaker.is_some();
    Some(AttemptSummary {
        tries: live.attempt.into(),
        failure,
        is_inbound: live.direction == Direction::Inbound,
        is_reused: live.reused,
        is_circuit_open: refuses && live.health()?.breaker.is_shut(now),
        is_safe: live.is_safe || report.unseen,
        is_abandoned: correlation::is_abandoned(live),
        is_marked_final: false,
        pushback: report.pushback,
        is_replayable: live.spare.as_ref()?.body.is_replayable(),
        left: live
            .patience
            .request_at(&live.route().timeouts)
            .saturating_duration_since(now)
            .saturating_sub(correlation::TRY),
        random: fastrand::f64(),
    })
}

/// Makes the request ready for the next try. What it gives back stands if there is none after all.
fn prepare(live: &mut RequestContext, tried: Tried, report: &AttemptReport) -> Tried {
    live.was_seen |= !report.unseen;
    if let Some(endpoint) = live.endpoint.take() {
        live.tried.push(endpoint.address.socket);
    }
    correlation::keep(live);
    if let Some(spare) = &live.spare
        && let Some(body) = spare.body.again(&live.flow)
    {
        live.request = Some(Request::from_parts(spare.head.clone(), body));
    }
    match tried {
        Ok(answer) => Ok(discard(live, answer)),
        Err(refusal) => {
            live.lease = None;
            Err(refusal)
        }
    }
}

/// How much of a failed answer's body is read, so that its connection can be used again.
const DISCARDED: usize = 64 << 10;

/// Lets go of an answer that nobody will get; its head alone is left.
fn discard(live: &mut RequestContext, answer: Response<UpstreamBody>) -> Response<UpstreamBody> {
    let (mut head, body) = answer.into_parts();
    // On a copy: should the answer be passed on after all, its fields are looked at once more.
    let said = headers::strip(&mut head.headers.clone(), &HeaderScan::scan(&head.headers)).kept_for(head.version);
    empty(live, body, said);
    head.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(head, UpstreamBody::Own(Bytes::new()))
}

/// Reads what has come already of a body, so that its connection lives on; nothing is waited for. `said` is how many
/// seconds the upstream keeps it.
fn empty(live: &mut RequestContext, mut body: UpstreamBody, said: Option<u32>) {
    let Some(mut lease) = live.lease.take() else { return };
    let mut cx = Context::from_waker(Waker::noop());
    let mut read = 0;
    while !body.is_end_stream() && read < DISCARDED {
        if let Some(Transport::Http1(connection)) = lease.transport() {
            let _over = connection.drive(&mut cx);
        }
        match Pin::new(&mut body).poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(frame))) => read += frame.data_ref().map_or(1, Bytes::len),
            Poll::Ready(None) => break,
            Poll::Ready(Some(Err(_))) | Poll::Pending => return,
        }
    }
    if live.flow.request.ended() {
        let keep = &live.destination_values().connections;
        let announced = said.map(|seconds| Duration::from_secs(seconds.into()));
        lease.give_back(&mut cx, keep.idle.value, keep.max_idle.value as usize, announced, Instant::now());
        live.worker.upstreams.note_idle();
    }
}

/// Waits before the next try; the deadline is known to be later.
async fn pause(live: &mut RequestContext, after: Duration) {
    if !after.is_zero() {
        let begun = Instant::now();
        live.timer.limit(begun + after, std::future::pending::<()>()).await;
        live.record.note().paused += begun.elapsed();
    }
}

/// Says why there is no further try: to the log, to the metrics, and to the sidecars above.
fn tell(live: &mut RequestContext, report: &AttemptReport, why: NoRetryReason, now: Instant) {
    let is_failure = report.failure.is_some_and(|failure| live.route().retry.is_failure(failure));
    if is_failure && why != NoRetryReason::Off && why != NoRetryReason::NotAFailure {
        live.record.note().retry = Some(why.name());
        live.worker.shard.telemetry().retry_withheld(&live.destination_values().name, why.name());
    }
    if is_failure {
        let is_safe = live.is_safe || report.unseen;
        let is_final = live.route().retry.is_final(live.attempt.into(), is_safe, Some(why));
        correlation::failed(live, report.mark.as_ref(), is_final, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn retry_after_is_a_number_of_seconds_or_a_date() {
        let said = |text: &str| {
            let fields = HeaderMap::from_iter([(header::RETRY_AFTER, HeaderValue::from_str(text).unwrap())]);
            pushback(&fields, false)
        };
        assert_eq!(said("7"), Some(Pushback::Wait(Duration::from_secs(7))));
        let past = ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"];
        for date in past {
            assert_eq!(said(date), Some(Pushback::Wait(Duration::ZERO)), "{date} is past");
        }
        for date in ["Fri, 31 Dec 2100 23:59:59 GMT", "Fri Dec 31 23:59:59 2100"] {
            let Some(Pushback::Wait(wait)) = said(date) else { panic!("no wait for {date}") };
            assert!(wait > Duration::from_secs(365 * 24 * 3600));
        }
        assert_eq!(said("99999999999999999999"), Some(Pushback::Wait(Duration::from_secs(u64::MAX))));
        for nothing in ["soon", "", "-1", "+1"] {
            assert_eq!(said(nothing), None, "{nothing:?}");
        }
    }
}
