//! The attempts of one request: where a retry is decided, prepared and waited for, and what is told when there is none.
//!
//! The decision itself is a pure function in `rules/retry`; this file finds out what happened (status, gRPC code, a reset, the
//! proxy status of hops further down), has the result reported, waits, and sends the request again from what was kept of it.
//! A request that succeeds passes through here without a stop.

use std::ops::ControlFlow;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{Response, header};
use http_body::Body;
use tokio::time::Instant;

use crate::policy::model::Direction;
use crate::proxy::attempt::Attempt;
use crate::proxy::exchange::ActiveExchange;
use crate::proxy::failed_attempt::{self, AttemptResult, FailedAttempt};
use crate::proxy::headers::{self, HeaderScan};
use crate::proxy::local_reply::LocalReply;
use crate::proxy::replay::RetryState;
use crate::proxy::request_context::RequestContext;
use crate::proxy::{
    admission, breaker_and_ejection, correlation, deadline, grpc, proxy_status, select, send, timeouts,
};
use crate::rules::circuit_breaker::CallResult;
use crate::rules::mode::{Mode, RuleName};
use crate::rules::retry::{AttemptFailure, AttemptSummary, NoRetryReason, RetryDecision};
use crate::telemetry::RetryReason;
use crate::upstream::pool::Transport;
use crate::upstream::response::UpstreamBody;

/// Sends the request until there is a response that stands: a good one, or the last bad one.
///
/// # Errors
/// The local reply that the caller gets instead.
pub(super) async fn run(exchange: &mut ActiveExchange, switches_protocol: bool) -> AttemptResult {
    let ActiveExchange { permit, context, attempt, retry, .. } = exchange;
    let most = match retry.is_kept() {
        true => 1 + u16::try_from(context.route().retry.attempts.value).unwrap_or(u16::MAX - 1),
        false => 1,
    };
    let mut number = 1;
    let mut reason = None;
    loop {
        let upstream = select::upstream(context, attempt)?;
        if permit.as_ref().is_none_or(|permit| !permit.is_for(&upstream.pool)) {
            *permit = match admission::try_acquire(context, &upstream) {
                Some(permit) => Some(permit),
                // Boxed, like everything that few requests meet.
                None => Some(Box::pin(admission::queue(context, &upstream)).await?),
            };
        }
        attempt.begin(number, upstream);
        let result = match admit(context, attempt) {
            Ok(()) => {
                context.record_mut().begin_attempt(number, most);
                if let Some(reason) = reason {
                    context.telemetry().retried(context.destination_name(), reason);
                }
                send::send(context, attempt, retry, switches_protocol).await
            }
            Err(reply) => Err(reply),
        };
        let next = match settle(context, attempt, result) {
            ControlFlow::Break(stands) => return stands,
            ControlFlow::Continue(failed) => Box::pin(after_failure(context, attempt, retry, failed)).await,
        };
        match next {
            ControlFlow::Continue(why) => reason = Some(why),
            ControlFlow::Break(stands) => return stands,
        }
        number += 1;
    }
}

/// Asks the circuit breaker of the attempt's destination.
fn admit(context: &mut RequestContext, attempt: &mut Attempt) -> Result<(), LocalReply> {
    let Some(upstream) = attempt.upstream() else { return Ok(()) };
    let permit = breaker_and_ejection::admit(context, upstream, Instant::now())?;
    attempt.set_breaker_permit(permit);
    Ok(())
}

/// Breaks with a response that needs no decision. Takes and gives the result by value: a borrowed one would be kept in the
/// future of every request.
fn settle(
    context: &RequestContext,
    attempt: &Attempt,
    result: AttemptResult,
) -> ControlFlow<AttemptResult, AttemptResult> {
    match result {
        Ok(response) if stands_at_once(context, &response) && !failed_attempt::is_late_timeout(attempt, &response) => {
            ControlFlow::Break(Ok(response))
        }
        result => ControlFlow::Continue(result),
    }
}

fn stands_at_once(context: &RequestContext, response: &Response<UpstreamBody>) -> bool {
    let status = response.status().as_u16();
    let is_wanted = status < 400 || (status < 500 && !context.route().retry.is_on(AttemptFailure::Status(status)));
    is_wanted && !(context.is_grpc() && response.headers().contains_key(grpc::STATUS))
}

/// After an attempt that may have failed. Continues when the request is ready for the next one; breaks with what stands.
async fn after_failure(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    retry: &mut RetryState,
    result: AttemptResult,
) -> ControlFlow<AttemptResult, RetryReason> {
    let now = Instant::now();
    if let Some(headers) = retry.original_headers() {
        correlation::keep_keys(context, headers);
    }
    let report = FailedAttempt::of(context, attempt, retry, &result);
    report_result(context, attempt, &report, &result, now);
    let (stands, why) = match decide(context, attempt, retry, &report, now) {
        RetryDecision::Retry { after } => {
            let stands = prepare(context, attempt, retry, result, &report);
            back_off(context, after).await;
            if !correlation::is_abandoned(context) {
                let is_unsent = report.failure == Some(AttemptFailure::Unsent);
                return ControlFlow::Continue(if is_unsent { RetryReason::Unsent } else { RetryReason::Failed });
            }
            (stands, NoRetryReason::CallerGone)
        }
        RetryDecision::Stop(why) => (result, why),
    };
    record_no_retry(context, attempt, &report, why, Instant::now());
    ControlFlow::Break(stands)
}

/// Reports the result, unless the failure happened further down: its proxy status says so, or the app has by a call of its
/// own.
fn report_result(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    report: &FailedAttempt,
    result: &AttemptResult,
    now: Instant,
) {
    let is_marked = report.status.as_ref().is_some_and(|status| status.at.is_some());
    let is_elsewhere = is_marked || correlation::has_failed_child(context);
    if report.is_rate_limited {
        breaker_and_ejection::report(context, attempt, CallResult::Success, now);
    }
    if !report.counts {
        return;
    }
    if !context.spares_upstream(is_elsewhere) {
        breaker_and_ejection::report(context, attempt, CallResult::Failure, now);
    } else if result.is_ok() {
        breaker_and_ejection::report_probes(context, attempt, now);
    }
}

/// Decides whether a further attempt follows, and charges the retry budget for it.
fn decide(
    context: &mut RequestContext,
    attempt: &Attempt,
    retry: &RetryState,
    report: &FailedAttempt,
    now: Instant,
) -> RetryDecision {
    let Some(failure) = report.failure else { return RetryDecision::Stop(NoRetryReason::NotAFailure) };
    let (mode, in_one_place) = (context.modes().retry.value, context.modes().retry_in_one_place.value);
    let Some(upstream) = attempt.upstream() else { return RetryDecision::Stop(NoRetryReason::Off) };
    let was_retried_below = report.status.as_ref().is_some_and(|status| status.is_final)
        || correlation::has_used_up_retries(context, context.destination(upstream.destination).id, now);
    let Some(summary) = summary(context, attempt, retry, report, failure, now) else {
        return RetryDecision::Stop(NoRetryReason::Off);
    };
    let summary = AttemptSummary { is_marked_final: was_retried_below && in_one_place.is_enforced(), ..summary };
    let rule = &context.route().retry;
    let decision = match mode.is_enforced() {
        true => rule.next(&summary, &upstream.pool.cluster.health.budget, now),
        false => rule.decide(&summary),
    };
    if !matches!(decision, RetryDecision::Retry { .. }) {
        return decision;
    }
    // A request that the upstream has not seen is sent again in spite of the hop below, whatever the mode.
    if was_retried_below && in_one_place == Mode::DryRun && failure != AttemptFailure::Unsent {
        context.record_dry_run(RuleName::RetryInOnePlace);
    }
    if !mode.is_enforced() {
        context.record_dry_run(RuleName::Retry);
        return RetryDecision::Stop(NoRetryReason::Off);
    }
    decision
}

/// What the decision needs to know, but for the hops below; `None` where the request was not kept.
fn summary(
    context: &RequestContext,
    attempt: &Attempt,
    retry: &RetryState,
    report: &FailedAttempt,
    failure: AttemptFailure,
    now: Instant,
) -> Option<AttemptSummary> {
    let upstream = attempt.upstream()?;
    let has_breaker = context.destination(upstream.destination).breaker.is_some();
    let refuses = has_breaker && context.modes().circuit_breaker.value.is_enforced();
    let left = context.request_at().saturating_duration_since(now);
    Some(AttemptSummary {
        tries: attempt.number().into(),
        failure,
        is_inbound: context.direction() == Direction::Inbound,
        is_reused: attempt.is_reused(),
        is_same_event: attempt.is_same_event(),
        is_circuit_open: refuses && upstream.pool.cluster.health.breaker.is_shut(now),
        is_safe: context.is_idempotent() || report.is_unseen,
        is_abandoned: correlation::is_abandoned(context),
        is_marked_final: false,
        pushback: report.pushback,
        is_replayable: retry.is_replayable()?,
        left: left.saturating_sub(deadline::LEAST_FOR_ATTEMPT),
        random: fastrand::f64(),
    })
}

/// Makes the request ready for the next attempt. What it returns stands if there is none after all.
fn prepare(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    retry: &mut RetryState,
    result: AttemptResult,
    report: &FailedAttempt,
) -> AttemptResult {
    retry.note_seen(!report.is_unseen);
    if let Some(endpoint) = attempt.take_endpoint() {
        retry.add_attempted(endpoint.address.socket);
    }
    if let Some(request) = retry.request(context.flow()) {
        attempt.set_request(request);
    }
    match result {
        Ok(response) => Ok(discard(context, attempt, response)),
        Err(reply) => {
            drop(attempt.take_lease());
            Err(reply)
        }
    }
}

/// How many bytes of a failed response's body are read, so that its connection can be used again.
const DISCARDED: usize = 64 << 10;

/// Discards the body of a response that the caller will not get; its head is left.
fn discard(
    context: &RequestContext,
    attempt: &mut Attempt,
    response: Response<UpstreamBody>,
) -> Response<UpstreamBody> {
    let (mut head, body) = response.into_parts();
    // On a copy: should the response be passed on after all, its fields are read once more.
    let hop_by_hop = headers::strip(&mut head.headers.clone(), &HeaderScan::scan(&head.headers));
    drain_body(context, attempt, body, hop_by_hop.kept_for(head.version));
    head.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(head, UpstreamBody::Local(Bytes::new()))
}

/// Reads what has come already of a body, so that its connection can be used again; nothing is waited for. `keep_alive` is how
/// many seconds the upstream keeps it.
fn drain_body(context: &RequestContext, attempt: &mut Attempt, mut body: UpstreamBody, keep_alive: Option<u32>) {
    let Some(mut lease) = attempt.take_lease() else { return };
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
    if context.flow().request.ended() {
        select::give_back(context, attempt, lease, &mut cx, keep_alive, Instant::now());
    }
}

/// Waits before the next attempt; the deadline is known to be later.
async fn back_off(context: &mut RequestContext, after: Duration) {
    if !after.is_zero() {
        let begun = Instant::now();
        timeouts::within(context, begun + after, std::future::pending::<()>()).await;
        context.record_mut().annotations_mut().retry_wait += begun.elapsed();
    }
}

/// Records why there is no further attempt: for the log, for the metrics, and for the hops above.
fn record_no_retry(
    context: &mut RequestContext,
    attempt: &Attempt,
    report: &FailedAttempt,
    why: NoRetryReason,
    now: Instant,
) {
    let is_failure = report.failure.is_some_and(|failure| context.route().retry.is_failure(failure));
    if is_failure && why != NoRetryReason::Off && why != NoRetryReason::NotAFailure {
        context.record_mut().annotations_mut().retry_withheld = Some(why.name());
        context.telemetry().retry_withheld(context.destination_name(), why.name());
    }
    if is_failure {
        let is_safe = context.is_idempotent() || report.is_unseen;
        let is_final = context.route().retry.is_final(attempt.number().into(), is_safe, Some(why));
        proxy_status::record_failure(context, report.status.as_ref(), is_final, now);
    }
}
