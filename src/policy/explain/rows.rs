//! The rows of an explanation: each rule's effective values, in the order and by the names of the policy.

use std::fmt::Display;
use std::time::Duration;

use jiff::Timestamp;

use crate::problems::{Origin, Sourced};
use crate::rules::circuit_breaker::CircuitBreaker;
use crate::rules::duration;
use crate::rules::ejection::Ejection;
use crate::rules::faults::{Abort, Fault, FaultAction, Faults};
use crate::rules::limits::Limits;
use crate::rules::mode::{Modes, RuleName};
use crate::rules::rate_limit::RateLimit;
use crate::rules::retry::Retry;
use crate::rules::timeouts::Timeouts;

/// One line of an explanation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// What it is, like `timeouts.connect`.
    pub name: String,
    /// What holds.
    pub value: String,
    /// Who said so: `built in`, a line of a file, or nothing for what follows from other rows.
    pub origin: String,
}

impl Row {
    pub(super) fn new(name: impl Into<String>, value: impl Into<String>, origin: &Origin) -> Self {
        Self { name: name.into(), value: value.into(), origin: origin.to_string() }
    }

    pub(super) fn bare(name: &str, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into(), origin: String::new() }
    }

    pub(super) fn time(name: &str, value: &Sourced<Duration>) -> Self {
        Self::new(name, duration::format(value.value), &value.origin)
    }

    pub(super) fn shown(name: &str, value: &Sourced<impl Display>) -> Self {
        Self::new(name, value.value.to_string(), &value.origin)
    }
}

/// The rules that are not enforced.
pub(super) fn modes(modes: &Modes) -> Vec<Row> {
    let weaker = RuleName::ALL.into_iter().filter(|rule| !modes.of(*rule).value.is_enforced());
    weaker.map(|rule| Row::shown(&format!("rules.{}", rule.key()), modes.of(rule))).collect()
}

pub(super) fn timeouts(values: &Timeouts) -> Vec<Row> {
    vec![
        Row::time("timeouts.connect", &values.connect),
        Row::time("timeouts.request", &values.request),
        match &values.per_try {
            Some(per_try) => Row::time("timeouts.perTry", per_try),
            None => Row::new("timeouts.perTry", "none: request holds", &Origin::BuiltIn),
        },
        Row::time("timeouts.idle", &values.idle),
        Row::time("timeouts.maxDuration", &values.max_duration),
    ]
}

pub(super) fn limits(values: &Limits) -> Vec<Row> {
    vec![
        Row::shown("limits.inFlight", &values.in_flight),
        Row::shown("limits.queue", &values.queue),
        Row::time("limits.queueTimeout", &values.queue_timeout),
    ]
}

/// `is_inbound`: every listener that leads here stands before the app, and leaves most retries to its callers.
pub(super) fn retry(values: &Retry, is_inbound: bool) -> Vec<Row> {
    if !values.enabled.value {
        return vec![Row::new("retry", "off", &values.enabled.origin)];
    }
    let mut rows = vec![
        Row::shown("retry.attempts", &values.attempts),
        Row::shown("retry.on", &values.on),
        Row::shown("retry.idempotent", &values.idempotent),
        Row::time("retry.backoff.base", &values.backoff.base),
        Row::time("retry.backoff.max", &values.backoff.max),
        Row::shown("retry.budget.ratio", &values.budget.ratio),
        Row::shown("retry.budget.minPerSecond", &values.budget.min_per_second),
        Row::shown("retry.replayLimit", &values.replay_limit),
    ];
    if is_inbound {
        rows.push(Row::bare("retry", "inbound: only calls that the app cannot have seen"));
    }
    rows
}

pub(super) fn circuit_breaker(values: &CircuitBreaker) -> Vec<Row> {
    if !values.on.value {
        return vec![Row::new("circuitBreaker", "off", &values.on.origin)];
    }
    vec![
        Row::shown("circuitBreaker.consecutiveFailures", &values.consecutive_failures),
        Row::shown("circuitBreaker.failureRate", &values.failure_rate),
        Row::time("circuitBreaker.window", &values.window),
        Row::shown("circuitBreaker.minRequests", &values.min_requests),
        Row::time("circuitBreaker.openFor", &values.open_for),
        Row::time("circuitBreaker.openForMax", &values.open_for_max),
        Row::shown("circuitBreaker.probes", &values.probes),
    ]
}

pub(super) fn ejection(values: &Ejection) -> Vec<Row> {
    if !values.on.value {
        return vec![Row::new("ejection", "off", &values.on.origin)];
    }
    vec![
        Row::shown("ejection.consecutiveFailures", &values.consecutive_failures),
        Row::time("ejection.openFor", &values.open_for),
        Row::time("ejection.openForMax", &values.open_for_max),
    ]
}

pub(super) fn rate_limit(limit: &Sourced<Option<RateLimit>>) -> Vec<Row> {
    let Some(values) = &limit.value else {
        return vec![Row::new("rateLimit", "none", &limit.origin)];
    };
    vec![
        Row::shown("rateLimit.requests", &values.requests),
        Row::time("rateLimit.per", &values.per),
        Row::shown("rateLimit.burst", &values.burst),
        Row::shown("rateLimit.by", &values.by),
    ]
}

pub(super) fn faults(faults: &Faults, now: Timestamp) -> Vec<Row> {
    if faults.is_empty() {
        return vec![Row::new("faults", "none", &Origin::BuiltIn)];
    }
    let row =
        |fault: &Fault| Row::new(format!("faults.{}", fault.name.value), describe(fault, now), &fault.name.origin);
    faults.iter().map(row).collect()
}

/// What a fault does, to which calls, and until when, in one line.
fn describe(fault: &Fault, now: Timestamp) -> String {
    let mut parts: Vec<String> = Vec::new();
    parts.extend(fault.delay.as_ref().map(|delay| format!("delay {}", duration::format(delay.value))));
    match &fault.ending {
        FaultAction::Answer { cut_after, bytes_per_second } => {
            parts.extend(cut_after.as_ref().map(|size| format!("cut after {} bytes", size.value)));
            parts.extend(bytes_per_second.as_ref().map(|rate| format!("{} bytes a second", rate.value)));
        }
        FaultAction::Abort(abort) => parts.push(match abort.value {
            Abort::Status(status) => format!("abort with {}", status.as_u16()),
            Abort::Grpc(code) => format!("abort with grpc {}", code.as_str()),
        }),
        FaultAction::Reset(_) => parts.push("reset".into()),
    }
    parts.push(format!("share {}", fault.share.value.get()));
    for (name, value) in &fault.headers {
        parts.push(format!("if {name}: {}", String::from_utf8_lossy(value.as_bytes())));
    }
    let end = if fault.is_over(now) { "over since" } else { "until" };
    parts.push(format!("{end} {}", fault.until.value));
    parts.join(", ")
}
