//! What one try says about the destination and about the endpoint: the live side of `circuitBreaker` and `ejection`.
//!
//! Each try asks the breaker for leave and takes a turn at its endpoint; however it ends, it is judged once, or not at
//! all: a caller that went away says nothing about the callee, and a failure that happened further down counts there.
//! Each change of state is told once: a log line with its cause and counts, and a metric.

use std::rc::Rc;
use std::time::Duration;

use http::{HeaderMap, Response};
use tokio::time::Instant;

use crate::policy::model::Direction;
use crate::policy::snapshot::{Destination, Snapshot};
use crate::proxy::correlation;
use crate::proxy::grpc::{self, GrpcStatus};
use crate::proxy::held::{BreakerTurn, Permits};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind, PROXY_STATUS, RuleRef};
use crate::proxy::request_context::RequestContext;
use crate::proxy::timeouts::ExternalDeadline;
use crate::rules::circuit_breaker::{
    Admission, Breaker, BreakerState, CallResult, StateChange, is_failed_code, is_failed_status,
};
use crate::rules::ejection::EjectionEvent;
use crate::rules::mode::RuleName;
use crate::rules::proxy_status::ProxyStatus;
use crate::telemetry::Telemetry;
use crate::upstream::cluster::Cluster;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::response::UpstreamBody;

/// Asks the circuit breaker of the destination.
///
/// # Errors
/// If it is open.
pub fn admit(live: &mut RequestContext, now: Instant) -> Result<(), LocalReply> {
    live.trial = Permits::default();
    let view = Rc::clone(&live.view);
    let destination = view.destination(live.destination());
    let Some(thresholds) = &destination.breaker else { return Ok(()) };
    let Some(cluster) = live.cluster() else { return Ok(()) };
    match cluster.health.breaker.admit(thresholds, now) {
        Admission::Admit(pass) => live.trial.destination = BreakerTurn::Permit(pass),
        Admission::Probe { probe, change } => {
            if let Some(change) = change {
                breaker_changed(live.worker.shard.telemetry(), cluster, &change, now);
            }
            live.trial.destination = BreakerTurn::Probe(Box::new(probe));
        }
        Admission::Refuse { retry_after } if view.policy.model.modes.circuit_breaker.value.is_enforced() => {
            let mut refusal = circuit_open(destination, &cluster.health.breaker);
            refusal.retry_after = Some(retry_after);
            return Err(refusal);
        }
        Admission::Refuse { .. } => live.would(RuleName::CircuitBreaker),
    }
    Ok(())
}

/// The refusal of an open breaker: names the value that opened it.
fn circuit_open(destination: &Destination, breaker: &Breaker) -> LocalReply {
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

/// Takes a turn at an endpoint that was picked; `false` if it is out, or is being tried by another call.
pub fn enlist(live: &mut RequestContext, endpoint: &Endpoint, now: Instant) -> bool {
    let destination = live.view.destination(live.destination());
    let Some(thresholds) = &destination.ejection else { return true };
    live.trial.endpoint = match endpoint.member.admit(thresholds, now) {
        Admission::Admit(pass) => BreakerTurn::Permit(pass),
        Admission::Probe { probe, change } => {
            if let Some(change) = change {
                endpoint.cluster.ejection_changed(live.worker.shard.telemetry(), &endpoint.member, &change, now);
            }
            BreakerTurn::Probe(Box::new(probe))
        }
        Admission::Refuse { .. } if live.view.policy.model.modes.ejection.value.is_enforced() => return false,
        Admission::Refuse { .. } => {
            live.would(RuleName::Ejection);
            BreakerTurn::None
        }
    };
    true
}

/// Judges the try: what it says about the destination, and about the endpoint if one was reached for.
pub fn judge(live: &mut RequestContext, outcome: CallResult, now: Instant) {
    let trial = std::mem::take(&mut live.trial);
    let destination = live.view.destination(live.destination());
    let telemetry = live.worker.shard.telemetry();
    let was_in = matches!(trial.endpoint, BreakerTurn::Permit(_));
    // The endpoint first: what it has done says whether the destination fails as a whole.
    if let Some(endpoint) = &live.endpoint {
        judge_endpoint(destination, telemetry, endpoint, trial.endpoint, outcome, now);
    }
    let (Some(thresholds), Some(cluster)) = (&destination.breaker, live.cluster()) else { return };
    let is_one_well =
        outcome == CallResult::Failure && destination.ejection.is_some() && cluster.health.group.has_well_member();
    let thresholds = if is_one_well { thresholds.by_share_alone() } else { *thresholds };
    let change = match trial.destination {
        BreakerTurn::None => None,
        BreakerTurn::Permit(pass) => cluster.health.breaker.record(pass, &thresholds, outcome, now, random(outcome)),
        BreakerTurn::Probe(probe) => probe.record(&thresholds, outcome, now, random(outcome)),
    };
    let Some(change) = change else { return };
    breaker_changed(telemetry, cluster, &change, now);
    if change.to == BreakerState::Open && was_in && !is_one_well {
        // Those that are in fail, so a probe to them alone would not find out that others are well again.
        drop(cluster.health.group.end_first_ejection(now));
    }
}

/// Judges an exchange that has come to its end. A bad status was judged when it came; a good one may still be followed by
/// trailers of gRPC that speak against it.
pub fn judge_complete(live: &mut RequestContext) {
    let now = live.over_at;
    if live.record.status().is_some_and(|status| is_failed_status(status.as_u16())) {
        return;
    }
    let code = live.record.grpc_code();
    // To gRPC an answer without a status is a failure, whatever came before.
    let is_unsaid =
        live.patience.grpc && code.is_none() && live.record.status().is_some_and(|status| status.is_success());
    if is_unsaid {
        look_slower(live, now);
    }
    if !is_unsaid && !code.is_some_and(is_failed_code) {
        if let Some(health) = live.health() {
            health.budget.earn();
        }
        judge(live, CallResult::Success, now);
    } else if !had_no_time(live, code.ok_or(0)) && !is_spared(live) {
        judge(live, CallResult::Failure, now);
    }
}

/// The trailers of an answer have come. They may say that it was a failure, while its head was noted as an answer.
pub fn ends_with(live: &RequestContext, code: u32) {
    if is_bad(live, Ok(code)) {
        look_slower(live, live.over_at);
    }
}

/// For the choice among endpoints, too, a try has failed behind the head of its answer. How long that took says
/// nothing: the caller takes the answer as slowly as it likes.
fn look_slower(live: &RequestContext, now: Instant) {
    if let Some(endpoint) = &live.endpoint {
        endpoint.load.failed(Duration::ZERO, now);
    }
}

/// Judges the probes alone: the callee has answered for itself, though with a failure from further down, or with a stream
/// that has no end yet. Whether it answers is all that a probe asks; were it to find out nothing, each call would be
/// another probe, and a few streams would hold the places of all probes for as long as they live.
pub fn judge_probes(live: &mut RequestContext, now: Instant) {
    let take = |turn: &mut BreakerTurn| match turn {
        BreakerTurn::Probe(_) => std::mem::take(turn),
        BreakerTurn::Permit(_) | BreakerTurn::None => BreakerTurn::None,
    };
    let probes = Permits { destination: take(&mut live.trial.destination), endpoint: take(&mut live.trial.endpoint) };
    if matches!((&probes.destination, &probes.endpoint), (BreakerTurn::None, BreakerTurn::None)) {
        return;
    }
    let others = std::mem::replace(&mut live.trial, probes);
    judge(live, CallResult::Success, now);
    live.trial = others;
}

/// The exchange has shown itself as a stream, which may last.
pub fn streams(live: &mut RequestContext, now: Instant) {
    if !live.patience.grpc {
        // Of all streams a deadline ends only those of gRPC.
        live.late_at = None;
    }
    correlation::lift(live);
    judge_probes(live, now);
}

/// Whether what failed, failed further down: the answer's trailers said so, or a call of the app has told.
fn is_spared(live: &mut RequestContext) -> bool {
    let is_marked = live.record.notes().is_some_and(|notes| notes.failed_at.is_some());
    let is_below = is_marked || correlation::is_blamed_below(live);
    live.spares(is_below)
}

/// Judges a try by a refusal of ours, where that is the callee's fault.
pub fn judge_late(live: &mut RequestContext, kind: LocalReplyKind, now: Instant) {
    if is_callees_fault(live, kind) {
        judge(live, CallResult::Failure, now);
    }
}

/// The same behind the head of an answer, which was noted as one. A bad status was judged when it came.
pub fn judge_cut(live: &mut RequestContext, kind: LocalReplyKind, now: Instant) {
    let is_judged = live.record.status().is_some_and(|status| is_failed_status(status.as_u16()));
    if is_judged
        || !is_callees_fault(live, kind)
        || (kind == LocalReplyKind::UpstreamReset && was_cut_for_time(live, now))
    {
        return;
    }
    look_slower(live, now);
    if !is_spared(live) {
        judge(live, CallResult::Failure, now);
    }
}

/// Whether what a try came to speaks against the callee, or against somebody further down: breaker, ejection and the choice
/// among endpoints all ask here.
pub fn speaks_against(live: &RequestContext, tried: &Result<Response<UpstreamBody>, LocalReply>) -> bool {
    match tried {
        Ok(answer) => {
            let said = said(live, answer);
            is_bad(live, said) && !is_limited(said, answer.headers())
        }
        Err(refusal) => is_callees_fault(live, refusal.kind),
    }
}

/// What the head of an answer says: its gRPC code, or else its status.
pub fn said(live: &RequestContext, answer: &Response<UpstreamBody>) -> Result<u32, u16> {
    let code = live.patience.grpc.then(|| grpc::read_status(answer.headers())).flatten();
    code.map(|(code, _)| code).ok_or(answer.status().as_u16())
}

/// Whether the callee's sidecar has answered that it was one call too many, as a 429 does where it is not gRPC.
pub fn is_limited(said: Result<u32, u16>, fields: &HeaderMap) -> bool {
    said == Ok(GrpcStatus::ResourceExhausted.into()) && read_mark(fields).is_some_and(|mark| mark.is_limited)
}

/// What the sidecars below say with an answer.
pub fn read_mark(fields: &HeaderMap) -> Option<ProxyStatus> {
    ProxyStatus::read(fields.get_all(PROXY_STATUS).iter().map(http::HeaderValue::as_bytes))
}

/// Whether what an answer says speaks against whoever gave it.
fn is_bad(live: &RequestContext, said: Result<u32, u16>) -> bool {
    said.map_or_else(is_failed_status, is_failed_code) && !had_no_time(live, said)
}

/// Why a call that broke off did so because its caller's body had: the upstream cannot but give it up.
pub fn broken_by_caller(live: &RequestContext) -> Option<LocalReply> {
    let why = "the request's body broke off or is malformed";
    live.flow.request.failed().then(|| LocalReply::plain(LocalReplyKind::BadRequest, why))
}

/// Whether a refusal of ours is the callee's fault.
pub fn is_callees_fault(live: &RequestContext, kind: LocalReplyKind) -> bool {
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
        LocalReplyKind::DeadlineExceeded if live.patience.shows_a_stream(&live.flow) => false,
        LocalReplyKind::DeadlineExceeded => !is_in_a_hurry(live),
        _ => false,
    }
}

/// Whether an answer, a gRPC code or else a status, says no more than that a caller in a hurry gave the callee no time: the
/// callee's sidecar says so a moment before ours would.
fn had_no_time(live: &RequestContext, said: Result<u32, u16>) -> bool {
    matches!(said, Ok(4) | Err(504)) && is_in_a_hurry(live)
}

/// Whether an answer broke off because its caller is in a hurry: the callee's sidecar cuts it a moment before we would.
/// Each hop on the way has kept a hundredth of the time, and a millisecond at least.
fn was_cut_for_time(live: &RequestContext, now: Instant) -> bool {
    let is_near = |until: &ExternalDeadline| {
        until.at.saturating_duration_since(now) <= (until.whole / 20).max(Duration::from_millis(5))
    };
    live.patience.until.as_ref().is_some_and(is_near) && is_in_a_hurry(live)
}

/// A caller in a hurry says nothing about the callee, unless the callee had a good part of what the policy gives it. A
/// tenth is: were it more, no breaker below a short deadline would ever open for a callee that hangs. Of our own app it
/// takes half, because it may only wait for somebody further down.
fn is_in_a_hurry(live: &RequestContext) -> bool {
    let part = if live.direction == Direction::Inbound { 2 } else { 10 };
    live.patience.until.is_some_and(|until| until.whole < live.route().timeouts.request.value / part)
}

/// Judges the endpoint alone: it could not be reached, and another one may have the call.
pub fn unreachable(live: &mut RequestContext, endpoint: &Rc<Endpoint>, now: Instant) {
    let turn = std::mem::take(&mut live.trial.endpoint);
    let destination = live.view.destination(live.destination());
    judge_endpoint(destination, live.worker.shard.telemetry(), endpoint, turn, CallResult::Failure, now);
}

fn judge_endpoint(
    destination: &Destination,
    telemetry: &Telemetry,
    endpoint: &Endpoint,
    turn: BreakerTurn,
    outcome: CallResult,
    now: Instant,
) {
    let Some(thresholds) = &destination.ejection else { return };
    let member = &endpoint.member;
    let event = match turn {
        BreakerTurn::None => None,
        BreakerTurn::Permit(pass) => member.record(pass, thresholds, outcome, now, random(outcome)),
        BreakerTurn::Probe(probe) => {
            probe.record(thresholds, outcome, now, random(outcome)).map(EjectionEvent::Ejected)
        }
    };
    match event {
        Some(EjectionEvent::Ejected(change)) => endpoint.cluster.ejection_changed(telemetry, member, &change, now),
        Some(EjectionEvent::Kept { consecutive }) => {
            let (name, cluster) = (&destination.values.name, &endpoint.cluster);
            telemetry.ejection_changed(name, "kept", cluster.health.out_now(now));
            tracing::warn!(
                destination = name,
                place = cluster.place,
                endpoint = %member.address(),
                consecutive,
                "the endpoint fails but is the last one: it stays in"
            );
        }
        None => {}
    }
}

/// Only a failure needs chance: it decides how long something stays open.
fn random(outcome: CallResult) -> f64 {
    if outcome == CallResult::Success { 0.0 } else { fastrand::f64() }
}

/// A number in the log; one of 128 bits would be written as a string.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Another policy is in force: a breaker or an ejection that it has not is shown no more, and one that is back as it is.
pub fn policy_changed(telemetry: &Telemetry, old: &Snapshot, next: &Snapshot, now: Instant) {
    let is_gone = |one: &&Destination| next.destinations.iter().all(|other| other.id != one.id);
    let gone = old.destinations.iter().filter(is_gone).map(|one| (one, false, false));
    let there = next.destinations.iter().map(|one| (one, one.breaker.is_some(), one.ejection.is_some()));
    for (destination, breaker, ejection) in gone.chain(there) {
        let health = &destination.cluster.health;
        if health.show(breaker, ejection) {
            let state = health.state_now(now).number();
            telemetry.breaker_and_endpoints(&destination.values.name, state, health.out_now(now));
        }
    }
}

fn breaker_changed(telemetry: &Telemetry, cluster: &Cluster, change: &StateChange, now: Instant) {
    let name = &*cluster.identity.name;
    telemetry.breaker_changed(name, change.to.as_str(), cluster.health.state_now(now).number());
    tracing::warn!(
        destination = name,
        place = cluster.place,
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
