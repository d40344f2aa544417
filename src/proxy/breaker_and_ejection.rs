//! What an attempt reports to the circuit breaker of its destination and to the ejection of its endpoint.
//!
//! Each attempt asks the breaker for a permit, and the endpoint for another; however it ends, its result is reported once,
//! or not at all: a caller that went away says nothing about the upstream, and a failure further down counts there. Each
//! change of state is told once: a log line with its cause and counts, and a metric.

use std::rc::Rc;
use std::time::Duration;

use http::{HeaderMap, Response};
use tokio::time::Instant;

use crate::policy::model::Direction;
use crate::policy::snapshot::{CompiledDestination, Snapshot};
use crate::proxy::attempt::{Attempt, Upstream};
use crate::proxy::correlation;
use crate::proxy::grpc::{self, GrpcStatus};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind, RuleRef};
use crate::proxy::permits::{HeldPermit, Permits};
use crate::proxy::proxy_status;
use crate::proxy::request_context::RequestContext;
use crate::proxy::timeout_state::ExternalDeadline;
use crate::rules::circuit_breaker::{Admission, Breaker, BreakerState, CallResult, StateChange, is_failed_status};
use crate::rules::ejection::EjectionEvent;
use crate::rules::mode::RuleName;
use crate::runtime::tasks;
use crate::telemetry::Telemetry;
use crate::upstream::cluster::Cluster;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::pool::Lease;
use crate::upstream::response::UpstreamBody;

/// Asks the circuit breaker of the destination for a permit.
///
/// # Errors
/// If the breaker is open.
pub(super) fn admit(context: &mut RequestContext, upstream: &Upstream, now: Instant) -> Result<HeldPermit, LocalReply> {
    let destination = context.destination(upstream.destination);
    let Some(thresholds) = &destination.breaker else { return Ok(HeldPermit::None) };
    let cluster = &upstream.pool.cluster;
    match cluster.health.breaker.admit(thresholds, now) {
        Admission::Admit(permit) => Ok(HeldPermit::Permit(permit)),
        Admission::Probe { probe, change } => {
            if let Some(change) = change {
                breaker_changed(context.telemetry(), cluster, &change, now);
            }
            Ok(HeldPermit::Probe(Box::new(probe)))
        }
        Admission::Refuse { retry_after } if context.modes().circuit_breaker.value.is_enforced() => {
            let reply = circuit_open(destination, &cluster.health.breaker);
            Err(LocalReply { retry_after: Some(retry_after), ..reply })
        }
        Admission::Refuse { .. } => {
            context.record_dry_run(RuleName::CircuitBreaker);
            Ok(HeldPermit::None)
        }
    }
}

/// The local reply of an open breaker: names the value that opened it.
fn circuit_open(destination: &CompiledDestination, breaker: &Breaker) -> LocalReply {
    let (values, name) = (&destination.values.circuit_breaker, &destination.values.name);
    if breaker.is_open_by_rate() {
        let rate = &values.failure_rate;
        let rule =
            RuleRef { name: "circuitBreaker.failureRate", value: rate.value.to_string(), origin: rate.origin.clone() };
        let detail = format!("the circuit breaker of {name} is open after too large a share of failures");
        return LocalReply::ruled(LocalReplyKind::CircuitOpen, rule, detail);
    }
    let failures = breaker.consecutive();
    let detail = format!("the circuit breaker of {name} is open after {failures} failures in a row");
    let limit = &values.consecutive_failures;
    LocalReply::counted(LocalReplyKind::CircuitOpen, "circuitBreaker.consecutiveFailures", limit, detail)
}

/// Asks a picked endpoint for a permit; `None` if it is ejected, or if another call is probing it.
pub(super) fn admit_at_endpoint(
    context: &mut RequestContext,
    destination: usize,
    endpoint: &Endpoint,
    now: Instant,
) -> Option<HeldPermit> {
    let Some(thresholds) = &context.destination(destination).ejection else { return Some(HeldPermit::None) };
    match endpoint.member.admit(thresholds, now) {
        Admission::Admit(permit) => Some(HeldPermit::Permit(permit)),
        Admission::Probe { probe, change } => {
            if let Some(change) = change {
                endpoint.cluster.ejection_changed(context.telemetry(), &endpoint.member, &change, now);
            }
            Some(HeldPermit::Probe(Box::new(probe)))
        }
        Admission::Refuse { .. } if context.modes().ejection.value.is_enforced() => None,
        Admission::Refuse { .. } => {
            context.record_dry_run(RuleName::Ejection);
            Some(HeldPermit::None)
        }
    }
}

/// Reports the result of the attempt to the circuit breaker, and to the endpoint if one was picked.
pub(super) fn report(context: &RequestContext, attempt: &mut Attempt, result: CallResult, now: Instant) {
    let permits = attempt.take_permits();
    report_with(context, attempt, permits, result, now);
}

fn report_with(context: &RequestContext, attempt: &Attempt, permits: Permits, result: CallResult, now: Instant) {
    let Some(upstream) = attempt.upstream() else { return };
    let (destination, telemetry) = (context.destination(upstream.destination), context.telemetry());
    let was_in = matches!(permits.endpoint, HeldPermit::Permit(_));
    // A call that waited too long, while others that began later were answered, is no failure in a row with others like it:
    // the calls of a listen backlog that is served slowly run out of time all at once.
    let was_overtaken = result == CallResult::Failure && attempt.was_overtaken();
    // The endpoint first: whether another one is well decides what the failure says about the destination.
    if let Some(endpoint) = attempt.endpoint()
        && !was_overtaken
    {
        report_to_endpoint(destination, telemetry, endpoint, permits.endpoint, result, now);
    }
    let Some(thresholds) = &destination.breaker else { return };
    let cluster = &upstream.pool.cluster;
    let has_well_endpoint =
        result == CallResult::Failure && destination.ejection.is_some() && cluster.health.group.has_well_member();
    let is_one_well = was_overtaken || has_well_endpoint;
    let thresholds = if is_one_well { thresholds.by_share_alone() } else { *thresholds };
    let change = match permits.destination {
        HeldPermit::None => None,
        HeldPermit::Permit(permit) => cluster.health.breaker.record(permit, &thresholds, result, now, random(result)),
        HeldPermit::Probe(probe) => probe.record(&thresholds, result, now, random(result)),
    };
    let Some(change) = change else { return };
    breaker_changed(telemetry, cluster, &change, now);
    if change.to == BreakerState::Open && was_in && !is_one_well {
        // The endpoints that are in fail: only a probe of an ejected one can find out that it is well again.
        drop(cluster.health.group.end_first_ejection(now));
    }
    if change.to == BreakerState::Open && attempt.found_no_connection() {
        close_when_reachable(context, upstream, &change);
    }
}

/// Closes a breaker that has opened because no connection was accepted, as soon as one is: most outages are restarts and
/// shorter than the open time, and a refused connection is no load. After the open time the next call finds out.
#[cold]
fn close_when_reachable(context: &RequestContext, upstream: &Upstream, change: &StateChange) {
    let (pool, worker) = (Rc::clone(&upstream.pool), Rc::clone(context.worker()));
    let options = context.connect_options(upstream.destination);
    let (Some(opened), Some(open_for)) = (pool.cluster.health.breaker.open_period(), change.open_for) else { return };
    drop(tasks::spawn(async move {
        let breaker = &pool.cluster.health.breaker;
        let is_open = || breaker.open_period() == Some(opened);
        if pool.accepts_within(options, open_for, is_open).await
            && let Some(change) = breaker.end_open_period(opened, Instant::now())
        {
            breaker_changed(worker.shard.telemetry(), &pool.cluster, &change, Instant::now());
        }
    }));
}

/// Reports an exchange whose response is complete. A bad status was reported when it came; a good one may still be followed
/// by gRPC trailers that report a failure.
pub(super) fn report_complete(context: &mut RequestContext, attempt: &mut Attempt) {
    let now = context.ended_at();
    if context.record().status().is_some_and(|status| is_failed_status(status.as_u16())) {
        return;
    }
    let code = context.record().grpc_status();
    // To gRPC a response without a status is a failure, whatever came before.
    let has_no_status =
        context.is_grpc() && code.is_none() && context.record().status().is_some_and(|status| status.is_success());
    if has_no_status {
        weigh_failure_after_head(attempt, now);
    }
    if !has_no_status && !code.is_some_and(|code| is_failed_code(context, code)) {
        // An upstream that sheds load earns no retries.
        let is_shed = code == Some(GrpcStatus::ResourceExhausted.into());
        if let Some(upstream) = attempt.upstream().filter(|_| !is_shed) {
            upstream.pool.cluster.health.budget.earn();
        }
        report(context, attempt, CallResult::Success, now);
    } else if !had_no_time(context, code.ok_or(0)) && !is_spared(context) {
        report(context, attempt, CallResult::Failure, now);
    }
}

/// Takes note of the code in a response's trailers: it may say that the call failed, while its head counted as a response.
pub(super) fn trailers_received(context: &RequestContext, attempt: &Attempt, code: u32) {
    if is_failure(context, Ok(code)) {
        weigh_failure_after_head(attempt, context.ended_at());
    }
}

/// Load balancing counts a failure behind the head of a response as well. How long it took says nothing: the caller takes
/// the response as slowly as it likes.
fn weigh_failure_after_head(attempt: &Attempt, now: Instant) {
    if let Some(endpoint) = attempt.endpoint() {
        endpoint.load.record_failure(Duration::ZERO, now);
    }
}

/// Reports success for the probes alone: the upstream has answered for itself, though with a failure from further down, or
/// with a stream that has no end yet. Whether it answers is all that a probe asks. Without this report each later call would
/// be another probe, and a few streams would hold the slots of all probes for as long as they last.
pub(super) fn report_probes(context: &RequestContext, attempt: &mut Attempt, now: Instant) {
    let probes = attempt.permits_mut().take_probes();
    if !probes.is_empty() {
        report_with(context, attempt, probes, CallResult::Success, now);
    }
}

/// The exchange has shown that it is a stream, which may last.
pub(super) fn became_stream(context: &mut RequestContext, attempt: &mut Attempt, now: Instant) {
    if !context.is_grpc() {
        // A deadline ends gRPC streams only.
        context.set_dry_run_deadline(None);
    }
    correlation::lift_unary_deadline(context);
    report_probes(context, attempt, now);
}

/// Whether the failure happened further down: the trailers of the response said so, or a call of the app has.
fn is_spared(context: &mut RequestContext) -> bool {
    let is_marked = context.record().annotations().is_some_and(|notes| notes.failed_at.is_some());
    let is_below = is_marked || correlation::has_failed_child(context);
    context.spares_upstream(is_below)
}

/// Reports a failure for a local reply that is the upstream's fault.
pub(super) fn report_local_reply(context: &RequestContext, attempt: &mut Attempt, kind: LocalReplyKind, now: Instant) {
    if is_upstreams_fault(context, kind) && !attempt.spares_upstream() {
        report(context, attempt, CallResult::Failure, now);
    }
}

/// Reports a response that broke off behind its head, which had counted as a response. A bad status was reported when it
/// came.
pub(super) fn report_broken_response(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    kind: LocalReplyKind,
    now: Instant,
) {
    if attempt.lease().is_some_and(Lease::is_stale) {
        // Other connections of this age have ended: one event, which counts once.
        return;
    }
    let is_reported = context.record().status().is_some_and(|status| is_failed_status(status.as_u16()));
    if is_reported
        || !is_upstreams_fault(context, kind)
        || (kind == LocalReplyKind::UpstreamReset && was_cut_for_time(context, now))
    {
        return;
    }
    weigh_failure_after_head(attempt, now);
    if !is_spared(context) {
        report(context, attempt, CallResult::Failure, now);
    }
}

/// Whether the result of an attempt speaks against the upstream, or against a hop further down: breaker, ejection and load
/// balancing all ask here.
pub(super) fn counts_against_upstream(
    context: &RequestContext,
    result: &Result<Response<UpstreamBody>, LocalReply>,
) -> bool {
    match result {
        Ok(response) => {
            let status = status_of(context, response);
            let headers = response.headers();
            (is_failure(context, status) && !is_rate_limited(status, headers)) || is_queue_full(status, headers)
        }
        Err(reply) => is_upstreams_fault(context, reply.kind),
    }
}

/// What the head of a response says: its gRPC code, or else its HTTP status.
pub(super) fn status_of(context: &RequestContext, response: &Response<UpstreamBody>) -> Result<u32, u16> {
    let code = context.is_grpc().then(|| grpc::read_status(response.headers())).flatten();
    code.map(|(code, _)| code).ok_or(response.status().as_u16())
}

/// Whether the upstream's sidecar has refused one call too many, as a 429 does where it is not gRPC.
pub(super) fn is_rate_limited(status: Result<u32, u16>, headers: &HeaderMap) -> bool {
    status == Ok(GrpcStatus::ResourceExhausted.into())
        && proxy_status::read(headers).is_some_and(|status| status.is_limited)
}

/// Whether the upstream's sidecar refused the call because of `limits`: a 503 where it is not gRPC, so a failure whatever
/// the policy says about RESOURCE_EXHAUSTED.
fn is_queue_full(status: Result<u32, u16>, headers: &HeaderMap) -> bool {
    status == Ok(GrpcStatus::ResourceExhausted.into())
        && proxy_status::read(headers).is_some_and(|status| status.is_unsent && !status.is_limited)
}

/// Whether what a response says is a failure of the hop that gave it.
fn is_failure(context: &RequestContext, status: Result<u32, u16>) -> bool {
    status.map_or_else(is_failed_status, |code| is_failed_code(context, code)) && !had_no_time(context, status)
}

/// Whether a gRPC code counts as a failure of the upstream, by `circuitBreaker.grpcFailures` of the destination.
fn is_failed_code(context: &RequestContext, code: u32) -> bool {
    context.route().retry.grpc_failures.contains(code)
}

/// Whether a local reply is the upstream's fault.
pub(super) fn is_upstreams_fault(context: &RequestContext, kind: LocalReplyKind) -> bool {
    match kind {
        LocalReplyKind::ConnectFailed
        | LocalReplyKind::ConnectTimeout
        | LocalReplyKind::DnsFailed
        | LocalReplyKind::TlsFailed
        | LocalReplyKind::UpstreamReset
        | LocalReplyKind::UpstreamProtocol
        | LocalReplyKind::PerTryTimeout
        | LocalReplyKind::RequestTimeout
        | LocalReplyKind::IdleTimeout => true,
        // A stream that goes on until its deadline is what the caller asked for.
        LocalReplyKind::DeadlineExceeded if context.timeout_state().has_shown_a_stream(context.flow()) => false,
        LocalReplyKind::DeadlineExceeded => !has_short_deadline(context),
        _ => false,
    }
}

/// Whether a response, by its gRPC code or HTTP status, says no more than that a short deadline gave the upstream no time: the
/// upstream's sidecar says so a moment before this one would.
fn had_no_time(context: &RequestContext, status: Result<u32, u16>) -> bool {
    matches!(status, Ok(4) | Err(504)) && has_short_deadline(context)
}

/// Whether a response broke off because of a short deadline: the upstream's sidecar cuts it a moment before this one would.
/// Each hop on the way has kept a hundredth of the time, and a millisecond at least.
fn was_cut_for_time(context: &RequestContext, now: Instant) -> bool {
    let is_near = |deadline: &ExternalDeadline| {
        deadline.at.saturating_duration_since(now) <= (deadline.whole / 20).max(Duration::from_millis(5))
    };
    context.timeout_state().deadline.as_ref().is_some_and(is_near) && has_short_deadline(context)
}

/// A short deadline says nothing about the upstream, unless the upstream had a good part of what the policy gives it: a
/// tenth, because with more no breaker below a short deadline would ever open for an upstream that hangs. The own app has
/// to have had half, because it may only wait for a hop further down.
fn has_short_deadline(context: &RequestContext) -> bool {
    let part = if context.direction() == Direction::Inbound { 2 } else { 10 };
    context.timeout_state().deadline.is_some_and(|deadline| deadline.whole < context.timeouts().request.value / part)
}

/// Reports a failure of the endpoint alone, with its permit: it could not be reached, and another one may take the call.
pub(super) fn report_unreachable(
    context: &RequestContext,
    attempt: &Attempt,
    endpoint: &Endpoint,
    permit: HeldPermit,
    now: Instant,
) {
    let Some(upstream) = attempt.upstream() else { return };
    let destination = context.destination(upstream.destination);
    report_to_endpoint(destination, context.telemetry(), endpoint, permit, CallResult::Failure, now);
}

fn report_to_endpoint(
    destination: &CompiledDestination,
    telemetry: &Telemetry,
    endpoint: &Endpoint,
    permit: HeldPermit,
    result: CallResult,
    now: Instant,
) {
    let Some(thresholds) = &destination.ejection else { return };
    let member = &endpoint.member;
    let event = match permit {
        HeldPermit::None => None,
        HeldPermit::Permit(permit) => member.record(permit, thresholds, result, now, random(result)),
        HeldPermit::Probe(probe) => probe.record(thresholds, result, now, random(result)).map(EjectionEvent::Ejected),
    };
    match event {
        Some(EjectionEvent::Ejected(change)) => endpoint.cluster.ejection_changed(telemetry, member, &change, now),
        Some(EjectionEvent::Kept { consecutive }) => {
            let (name, cluster) = (&destination.values.name, &endpoint.cluster);
            telemetry.ejection_changed(name, "kept", cluster.health.ejected_count(now));
            tracing::warn!(
                destination = name,
                dynamic_host = cluster.dynamic_host,
                endpoint = %member.address(),
                consecutive,
                "the endpoint fails but is the last one in: it is not ejected"
            );
        }
        None => {}
    }
}

/// The random part of an open time, from 0 to 1; only a failure needs it.
fn random(result: CallResult) -> f64 {
    if result == CallResult::Success { 0.0 } else { fastrand::f64() }
}

/// Milliseconds as a number of 64 bits: the log writes one of 128 bits as a string.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Brings the gauges in line with another policy: a destination without breaker or ejection shows none, and one that has
/// them again shows their state.
pub fn policy_changed(telemetry: &Telemetry, old: &Snapshot, next: &Snapshot, now: Instant) {
    let is_gone = |one: &&CompiledDestination| next.destinations.iter().all(|other| other.id != one.id);
    let gone = old.destinations.iter().filter(is_gone).map(|one| (one, false, false));
    let there = next.destinations.iter().map(|one| (one, one.breaker.is_some(), one.ejection.is_some()));
    for (destination, breaker, ejection) in gone.chain(there) {
        let health = &destination.cluster.health;
        if health.set_reported(breaker, ejection) {
            let state = health.breaker_state(now).number();
            telemetry.set_health_gauges(&destination.values.name, state, health.ejected_count(now));
        }
    }
}

fn breaker_changed(telemetry: &Telemetry, cluster: &Cluster, change: &StateChange, now: Instant) {
    let name = &*cluster.identity.name;
    telemetry.breaker_changed(name, change.to.as_str(), cluster.health.breaker_state(now).number());
    tracing::warn!(
        destination = name,
        dynamic_host = cluster.dynamic_host,
        from = change.from.as_str(),
        to = change.to.as_str(),
        cause = change.cause.as_str(),
        consecutive = change.consecutive,
        failures = change.failures,
        requests = change.requests,
        open_for_ms = change.open_for.map(millis),
        "the circuit breaker changed its state"
    );
}
