//! Admission of a routed request: the rate limit of its route, the concurrency limit of the destination with its queue; and
//! what is told of a request whose body does not end as it should.

use std::rc::Rc;

use http::HeaderValue;
use http::header::{self, HeaderMap};
use tokio::time::Instant;

use crate::proxy::attempt::Upstream;

use crate::problems::Sourced;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind, RuleRef};
use crate::proxy::permits::InFlightPermit;
use crate::proxy::request_context::RequestContext;
use crate::proxy::timeouts;
use crate::rules::duration;
use crate::rules::limits::QueueFull;
use crate::rules::max_body_size::MaxBodySize;
use crate::rules::mode::RuleName;
use crate::rules::size;

/// Checks a request against the limits of its route.
///
/// # Errors
/// The local reply of the limit that the request exceeds.
pub(super) fn check(context: &mut RequestContext, headers: &HeaderMap) -> Result<(), LocalReply> {
    check_body_size(context, headers)?;
    check_rate(context, headers)
}

/// Refuses a body that is announced as too long, and limits one whose length is not announced while it passes.
fn check_body_size(context: &mut RequestContext, headers: &HeaderMap) -> Result<(), LocalReply> {
    let (limit, mode) = (&context.route().max_body_size, context.modes().max_body_size.value);
    let Some(most) = limit.value.filter(|_| !mode.is_off()) else { return Ok(()) };
    if !mode.is_enforced() {
        context.flow().request.limit(most.into(), false);
        return Ok(());
    }
    if MaxBodySize::is_exceeded(most, headers.get(header::CONTENT_LENGTH).map(HeaderValue::as_bytes)) {
        return Err(body_too_large(limit));
    }
    context.flow().request.limit(most.into(), true);
    Ok(())
}

fn body_too_large(limit: &Sourced<Option<u32>>) -> LocalReply {
    let value = limit.value.map_or_else(String::new, size::format);
    let rule = RuleRef { name: "maxBodySize", value, origin: limit.origin.clone() };
    LocalReply::ruled(LocalReplyKind::BodyTooLarge, rule, "the request body is too long")
}

/// The local reply to a call that broke off because the request's body had: the upstream cannot but give it up. `None` if
/// the body is well so far.
pub(super) fn broken_body(context: &RequestContext) -> Option<LocalReply> {
    if context.flow().request.fails_by_limit() {
        return Some(body_too_large(&context.route().max_body_size));
    }
    let detail = "the request's body broke off or is malformed";
    context.flow().request.failed().then(|| LocalReply::plain(LocalReplyKind::BadRequest, detail))
}

/// Counts the request against the rate limit of its route; the local reply says when to call again.
fn check_rate(context: &mut RequestContext, headers: &HeaderMap) -> Result<(), LocalReply> {
    let Some(limit) = &context.route().rate_limit.value else { return Ok(()) };
    let mode = context.modes().rate_limit.value;
    let limiter = context.view().policy.rate_limiter(context.route_id());
    let Some(limiter) = limiter.filter(|_| !mode.is_off()) else { return Ok(()) };
    let caller = context.downstream().peer.ip();
    let key = limit.by.value.key(caller, |name| headers.get(name).map(HeaderValue::as_bytes));
    let Err(exceeded) = limiter.check(limit, key, context.began()) else { return Ok(()) };
    if !mode.is_enforced() {
        context.record_dry_run(RuleName::RateLimit);
        return Ok(());
    }
    let per = duration::format(limit.per.value);
    let rule = RuleRef {
        name: "rateLimit.requests",
        value: format!("{} per {per}", limit.requests.value),
        origin: limit.requests.origin.clone(),
    };
    let detail = format!("too many calls (counted by {})", limit.by.value);
    let reply = LocalReply::ruled(LocalReplyKind::RateLimited, rule, detail);
    Err(LocalReply { retry_after: Some(exceeded.retry_after), ..reply })
}

/// A permit of the destination, if one is free at once. `None`: the call has to queue.
pub(super) fn try_acquire(context: &mut RequestContext, upstream: &Upstream) -> Option<InFlightPermit> {
    let mode = context.modes().limits.value;
    let permit = context.destination(upstream.destination).concurrency.try_enter();
    let is_over = permit.is_none();
    if is_over && mode.is_enforced() {
        return None;
    }
    if is_over && !mode.is_off() {
        context.record_dry_run(RuleName::Limits);
    }
    Some(InFlightPermit::new(permit, Rc::clone(&upstream.pool)))
}

/// Waits in the queue of the destination for a permit.
///
/// # Errors
/// If the queue is full, or no permit becomes free in time.
pub(super) async fn queue(context: &mut RequestContext, upstream: &Upstream) -> Result<InFlightPermit, LocalReply> {
    let view = Rc::clone(context.view());
    let destination = view.destination(upstream.destination);
    let limits = &destination.values.limits;
    let began = Instant::now();
    let entered = destination.concurrency.enter(limits.queue.value);
    let request_at = context.request_at();
    let until = (began + limits.queue_timeout.value).min(request_at);
    let waiting = upstream.pool.metrics.queued.hold();
    let mut wait = QueueWait { context, began, has_waited: true };
    let entered = timeouts::within(wait.context, until, entered).await;
    drop(waiting);
    // A call that the full queue refuses has not waited.
    wait.has_waited = !matches!(entered, Some(Err(QueueFull)));
    drop(wait);
    match entered {
        Some(Ok(permit)) => Ok(InFlightPermit::new(Some(permit), Rc::clone(&upstream.pool))),
        Some(Err(QueueFull)) => {
            let detail = format!("{} calls are in flight and the queue is full", limits.in_flight.value);
            Err(LocalReply::counted(LocalReplyKind::QueueFull, "limits.queue", &limits.queue, detail))
        }
        None if Instant::now() >= request_at => {
            let detail = "no permit of the destination in time";
            Err(context.timeout_state().expired_unsent(context.timeouts(), LocalReplyKind::RequestTimeout, detail))
        }
        None => {
            let detail = "the call was in the queue longer than the limit";
            let limit = &limits.queue_timeout;
            Err(LocalReply::timed(LocalReplyKind::QueueTimeout, "limits.queueTimeout", limit, detail))
        }
    }
}

/// A wait in the queue, which is recorded at its end: also where the caller leaves, and this future is dropped with it.
struct QueueWait<'a> {
    context: &'a mut RequestContext,
    began: Instant,
    has_waited: bool,
}

impl Drop for QueueWait<'_> {
    fn drop(&mut self) {
        if self.has_waited {
            self.context.record_mut().add_queue_time(self.began.elapsed());
        }
    }
}
