//! States and state changes of a breaker, with their names in logs, metrics and on the status page.

use std::time::Duration;

/// State of a breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BreakerState {
    /// Admits all calls.
    Closed,
    /// Refuses all calls.
    Open,
    /// Admits a few calls as probes.
    HalfOpen,
}

impl BreakerState {
    /// Value in the metrics: 0 closed, 1 half-open, 2 open.
    pub const fn number(self) -> i64 {
        match self {
            Self::Closed => 0,
            Self::HalfOpen => 1,
            Self::Open => 2,
        }
    }
}

/// Cause of a change of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChangeCause {
    /// The threshold of consecutive failures was reached.
    ConsecutiveFailures,
    /// The failure rate was reached.
    FailureRate,
    /// A probe failed.
    ProbeFailed,
    /// A probe succeeded.
    ProbeSucceeded,
    /// The upstream, which had accepted no connection, accepts them again.
    Reachable,
    /// The open time ended.
    OpenTimeOver,
    /// The open time of an ejected endpoint was ended early, because the endpoints that are in fail.
    NoOtherWell,
    /// An ejected endpoint was taken back, because the destination has no other endpoint left.
    NoOtherLeft,
}

/// One change of state with the counts that led to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateChange {
    /// State before the change.
    pub from: BreakerState,
    /// State after the change.
    pub to: BreakerState,
    /// Cause of the change.
    pub cause: ChangeCause,
    /// Consecutive failures, including those of probes.
    pub consecutive: u32,
    /// Failures within the window; 0 without a failure rate.
    pub failures: u32,
    /// Calls within the window; 0 without a failure rate.
    pub requests: u32,
    /// Open time with jitter; `None` unless the breaker opened.
    pub open_for: Option<Duration>,
}

impl BreakerState {
    /// The stable name: `closed`, `open` or `half_open`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

impl ChangeCause {
    /// The stable name, like `failure_rate`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ConsecutiveFailures => "consecutive_failures",
            Self::FailureRate => "failure_rate",
            Self::ProbeFailed => "probe_failed",
            Self::ProbeSucceeded => "probe_succeeded",
            Self::Reachable => "reachable",
            Self::OpenTimeOver => "open_time_over",
            Self::NoOtherWell => "no_other_well",
            Self::NoOtherLeft => "no_other_left",
        }
    }
}
