//! How an exchange is correlated with others: the inbound request behind an outbound call, and calls of a request that is
//! over.
//!
//! An inbound request is registered under its trace ids while it is in flight. An outbound call of the app finds its
//! parent request there, by id or because only one is in flight, and gets the parent's deadline. The other way round, a
//! call that fails for good leaves its proxy status with the parent, whose own response then says so.

use std::sync::Arc;

use http::header::{HeaderMap, HeaderValue};
use http::request::Parts;
use tokio::time::Instant;

use crate::policy::model::Direction;
use crate::proxy::correlation_state::{ABANDONED, Correlated};
use crate::proxy::local_reply::LocalReplyKind;
use crate::proxy::request_context::RequestContext;
use crate::rules::deadline::reserve;
use crate::rules::inflight::{Correlation, ParentRequests};
use crate::rules::proxy_status::ProxyStatus;
use crate::rules::trace::{self, TraceKeys, X_REQUEST_ID};

/// Correlates an outbound call with its parent request, by trace id or because only one is in flight; gives an inbound
/// request an id where it has none.
pub(super) fn correlate(context: &RequestContext, head: &mut Parts) -> Option<Box<Correlated>> {
    if !context.view().policy.correlates {
        return None;
    }
    let worker = context.worker();
    let mut keys = TraceKeys::of(&head.headers);
    if context.direction() == Direction::Inbound {
        if keys.is_empty() {
            let id = trace::fresh_request_id(u128::from(fastrand::u64(..)) << 64 | u128::from(fastrand::u64(..)));
            head.headers.insert(X_REQUEST_ID, HeaderValue::from_str(&id).ok()?);
            keys = TraceKeys::of(&head.headers);
        }
        return Some(Box::new(Correlated { keys, ..Correlated::default() }));
    }
    let (found, now) = (worker.inflight.correlate(keys), context.began());
    let is_by_trace = matches!(found, Correlation::ByTrace(_));
    let late_at = if is_by_trace { None } else { worker.abandoned.at(keys, ABANDONED, now) };
    let counters = &worker.correlations;
    let (counter, parents) = match (found, late_at) {
        (_, Some(at)) if at <= now => (&counters.late, None),
        (_, Some(_)) => (&counters.by_trace, None),
        (Correlation::ByTrace(parents), None) => (&counters.by_trace, Some(parents)),
        (Correlation::OnlyOne(parents), None) => (&counters.only_one, Some(parents)),
        (Correlation::NotJoined, None) => (&counters.not_joined, None),
        (Correlation::NoInbound, None) => (&counters.no_inbound, None),
    };
    counter.increment();
    Some(Box::new(Correlated { keys, parents, late_at, ..Correlated::default() }))
}

/// Registers an inbound request, so that the calls which it causes find it; `at` is its deadline.
pub(super) fn register(context: &mut RequestContext, at: Instant) {
    if context.direction() != Direction::Inbound {
        return;
    }
    let stream_deadline = context.timeout_state().stream_deadline();
    let Some(keys) = context.correlation().map(|correlated| correlated.keys) else { return };
    let at = at.checked_sub(reserve(at.saturating_duration_since(context.began()))).unwrap_or(at);
    let registration = context.worker().inflight.register(keys, at);
    if context.is_grpc() {
        let inbound = Arc::clone(registration.inbound());
        context.flow().on_second_message(Box::new(move || inbound.set_deadline(stream_deadline)));
    }
    if let Some(correlated) = context.correlation_mut() {
        correlated.registration = Some(registration);
    }
}

/// The exchange has shown that it is a stream: the calls that it causes are no longer held to the time of a unary call.
pub(super) fn lift_unary_deadline(context: &RequestContext) {
    if let Some(registration) = context.correlation().and_then(|correlated| correlated.registration.as_ref()) {
        registration.inbound().set_deadline(context.timeout_state().stream_deadline());
    }
}

/// Keeps the ids of an outbound call that failed, for the retry history. Where nothing correlates the call with others they
/// are read only now.
pub(super) fn keep_keys(context: &mut RequestContext, headers: &HeaderMap) {
    if context.correlation().is_none() && context.direction() == Direction::Outbound {
        let keys = TraceKeys::of(headers);
        context.set_correlation(Some(Box::new(Correlated { keys, ..Correlated::default() })));
    }
}

/// True if the retries of this call were used up here in the last 10 s: the caller sends it again, and the hop that failed
/// has retried already.
pub(super) fn has_used_up_retries(context: &RequestContext, destination: u64, now: Instant) -> bool {
    context.worker().retry_history.contains(keys(context), call_id(context, destination), now)
}

/// Remembers that the retries of this call are used up.
pub(super) fn remember_used_up_retries(context: &RequestContext, destination: u64, now: Instant) {
    context.worker().retry_history.record(keys(context), call_id(context, destination), now, now);
}

fn keys(context: &RequestContext) -> TraceKeys {
    context.correlation().map(|correlated| correlated.keys).unwrap_or_default()
}

fn call_id(context: &RequestContext, destination: u64) -> u64 {
    let record = context.record();
    let (method, authority, path) = (record.method().as_str(), record.authority(), record.path());
    context.worker().retry_history.call_hash(destination, method, authority, path)
}

/// True if the caller of the parent request waits no longer.
pub(super) fn is_abandoned(context: &RequestContext) -> bool {
    let is_abandoned = |correlated: &Correlated| {
        correlated.late_at.is_some() || correlated.parents.as_ref().is_some_and(ParentRequests::are_abandoned)
    };
    context.correlation().is_some_and(is_abandoned)
}

/// Leaves the proxy status of a failed outbound call with its parent requests.
pub(super) fn tell_parents(context: &RequestContext, status: &ProxyStatus) {
    if let Some(parents) = context.correlation().and_then(|correlated| correlated.parents.as_ref()) {
        parents.record_status(status);
    }
}

/// What a failed call of the app has left for the response to the inbound request that caused it.
pub(super) fn failed_child(context: &RequestContext) -> Option<ProxyStatus> {
    context.correlation()?.registration.as_ref()?.inbound().recorded_status()
}

/// Whether an app fails because a call of its own failed. Its response does not say so; the call has.
pub(super) fn has_failed_child(context: &RequestContext) -> bool {
    context.direction() == Direction::Inbound && failed_child(context).is_some()
}

/// hopguard ended an inbound exchange, before its response or in the midst of it. After a timeout the app may work on, and
/// make calls for a caller that has gone.
pub(super) fn ended_locally(context: &RequestContext, kind: LocalReplyKind, now: Instant) {
    let (Direction::Inbound, Some(correlated)) = (context.direction(), context.correlation()) else { return };
    let is_late = matches!(kind, LocalReplyKind::RequestTimeout | LocalReplyKind::DeadlineExceeded);
    correlated.abandon(&context.worker().abandoned, is_late.then_some(now), now);
}
