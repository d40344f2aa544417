//! What a hop tells the hops above about a failure: `Proxy-Status` in its response, and the pushback that gRPC clients obey.
//!
//! `rules/proxy_status.rs` has the words: the retries are used up, the app never got the request, which hop failed. An
//! outbound call that fails for good leaves its status with the parent request, so that the response of the app bears it
//! too. No hop above then retries what this one has retried.

use http::StatusCode;
use http::header::{HeaderMap, HeaderValue};
use tokio::time::Instant;

use crate::policy::model::Direction;
use crate::proxy::correlation;
use crate::proxy::grpc::PUSHBACK;
use crate::proxy::local_reply::{LocalReplyKind, PROXY_STATUS};
use crate::proxy::request_context::RequestContext;
use crate::rules::proxy_status::{ProxyStatus, RECEIVED_STATUS, write_member};
use crate::rules::retry::AttemptFailure;

/// What the hops below say with a response.
pub(super) fn read(headers: &HeaderMap) -> Option<ProxyStatus> {
    ProxyStatus::read(headers.get_all(PROXY_STATUS).iter().map(HeaderValue::as_bytes))
}

/// Records that a call failed for good: for the parent request behind it, and for the response.
///
/// `below` is what the response itself says: a failure further down than the upstream stays where it was. `is_final`: the
/// retries are used up, and no hop above need retry.
pub(super) fn record_failure(context: &mut RequestContext, below: Option<&ProxyStatus>, is_final: bool, now: Instant) {
    if context.direction() == Direction::Inbound {
        return;
    }
    let in_one_place = context.modes().retry_in_one_place.value;
    let is_final = !in_one_place.is_off() && (is_final || below.is_some_and(|below| below.is_final));
    let here = || context.destination_name().into();
    let at = Some(below.and_then(|below| below.at.clone()).unwrap_or_else(here));
    if below.is_some_and(|below| below.at.is_some()) {
        context.record_mut().annotations_mut().failed_at.clone_from(&at);
    }
    let status = ProxyStatus { is_final, at, ..ProxyStatus::default() };
    correlation::tell_parents(context, &status);
    if status.is_final && has_used_up_retries(context) {
        let destination = context.destination(context.route_id().owner()).id;
        correlation::remember_used_up_retries(context, destination, now);
    }
    let status = enforced(context, status);
    context.set_proxy_status(Some(status));
}

/// Whether a call that failed for good has used up any retries: not if it was refused before its first attempt, nor if
/// only its being unsafe to repeat kept it from a second one.
fn has_used_up_retries(context: &RequestContext) -> bool {
    let (attempts, _) = context.record().attempts();
    attempts > 1 || (attempts == 1 && (context.is_idempotent() || context.route().retry.idempotent.value))
}

/// The part of a status that the modes let out: in a dry run nothing, because the hop that reads it acts on it. Inside this
/// process the status is kept whole, to be counted.
fn enforced(context: &RequestContext, status: ProxyStatus) -> ProxyStatus {
    let modes = context.modes();
    ProxyStatus {
        is_final: status.is_final && modes.retry_in_one_place.value.is_enforced(),
        is_unsent: status.is_unsent && modes.unsent.value.is_enforced(),
        is_limited: false,
        at: status.at.filter(|_| modes.blame_in_one_place.value.is_enforced()),
    }
}

/// Decides the status of a local reply: in place of an upstream that failed or is protected, or of an app that never got
/// the request. `is_unsent`: the app handed the last attempt back unprocessed; `was_seen`: it may have seen an earlier one.
pub(super) fn of_local_reply(
    context: &mut RequestContext,
    kind: LocalReplyKind,
    is_unsent: bool,
    was_seen: bool,
    now: Instant,
) {
    if !context.is_routed() {
        return;
    }
    if context.direction() == Direction::Outbound {
        // A failed attempt has been recorded already, with the reason for no retry. No hop above is to ask again for the
        // rest either (queue, time, open breaker).
        if kind.is_of_the_callee() && context.proxy_status().is_none() {
            record_failure(context, None, true, now);
        }
        return;
    }
    correlation::ended_locally(context, kind, now);
    let is_handed_back = kind == LocalReplyKind::UpstreamReset && is_unsent;
    let is_unsent = (kind.is_before_the_app() || is_handed_back) && !was_seen;
    let status = ProxyStatus { is_unsent, ..of_failed_child(context).unwrap_or_default() };
    let status = enforced(context, status);
    context.set_proxy_status(Some(status));
}

/// The status that a failed call of the app has left; the log line names where that call failed.
fn of_failed_child(context: &mut RequestContext) -> Option<ProxyStatus> {
    let status = correlation::failed_child(context)?;
    context.record_mut().annotations_mut().failed_at.clone_from(&status.at);
    Some(status)
}

/// Writes the status into the head of an upstream's response that reports a failure.
///
/// An app may have copied the members of its own upstream; the member that this hop appends says what holds.
pub(super) fn write(context: &mut RequestContext, status: StatusCode, headers: &mut HeaderMap, has_members: bool) {
    if context.direction() == Direction::Inbound {
        let child = of_failed_child(context).map(|child| enforced(context, child));
        context.set_proxy_status(child);
    }
    let said = context.proxy_status().filter(|said| said.says_something());
    if said.is_none() && !has_members {
        return;
    }
    let member = write_member(|member| {
        let member = member.parameter(RECEIVED_STATUS, sfv::Integer::from(status.as_u16()));
        match said {
            Some(said) => said.write(member),
            None => member,
        }
    });
    if let Ok(value) = HeaderValue::try_from(member) {
        headers.append(PROXY_STATUS, value);
    }
    push_back(context, headers);
}

/// Writes the status into the trailers of a gRPC response whose head has gone already.
///
/// No hop retries such a call: each has passed the head on. But the app in between may make a failure of its own out of
/// it, and that would be retried above. `attempt` is the number of the attempt.
pub(super) fn write_trailers(
    context: &mut RequestContext,
    attempt: u16,
    trailers: &mut HeaderMap,
    code: u32,
    now: Instant,
) {
    if !context.route().retry.is_failure(AttemptFailure::Grpc(code)) {
        return;
    }
    let has_members = trailers.contains_key(PROXY_STATUS);
    let below = if has_members { read(trailers) } else { None };
    let is_final = context.route().retry.is_final(attempt.into(), context.is_idempotent(), None);
    record_failure(context, below.as_ref(), is_final, now);
    write(context, StatusCode::OK, trailers, has_members);
}

/// Adds gRPC's word for "do not retry" (gRFC A6), where it holds.
pub(super) fn push_back(context: &RequestContext, headers: &mut HeaderMap) {
    if context.is_grpc() && forbids_retry(context) {
        headers.insert(PUSHBACK, HeaderValue::from_static("-1"));
    }
}

/// Whether the caller is told not to retry in words that every gRPC client obeys, with or without a sidecar.
pub(super) fn forbids_retry(context: &RequestContext) -> bool {
    context.proxy_status().is_some_and(|status| status.is_final)
}
