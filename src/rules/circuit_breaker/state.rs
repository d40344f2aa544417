//! The states of a breaker and its changes, as logs, metrics and the status page name them.

use std::time::Duration;

/// What a breaker does with calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BreakerState {
    /// Lets all through.
    Closed,
    /// Refuses all.
    Open,
    /// Lets a few through to find out.
    HalfOpen,
}

impl BreakerState {
    /// As it is shown in the metrics.
    pub const fn number(self) -> i64 {
        match self {
            Self::Closed => 0,
            Self::HalfOpen => 1,
            Self::Open => 2,
        }
    }
}

/// Why a breaker changed its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChangeCause {
    /// So many failures came one after the other.
    ConsecutiveFailures,
    /// So large a share of the calls failed.
    FailureRate,
    /// It was tried, and failed again.
    ProbeFailed,
    /// It was tried, and answered.
    ProbeSucceeded,
    /// It was open for as long as it had to be.
    OpenTimeOver,
    /// An ejected endpoint is tried before that, because those that are in fail.
    NoOtherWell,
    /// An ejected endpoint is taken back because no other one is left.
    NoOtherLeft,
}

/// One change of state, with what led to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateChange {
    /// The state before.
    pub from: BreakerState,
    /// The state from now on.
    pub to: BreakerState,
    /// Why.
    pub cause: ChangeCause,
    /// Failures one after the other, those of probes included.
    pub consecutive: u32,
    /// Failures within the window; 0 where no rate is watched.
    pub failures: u32,
    /// Calls within the window; 0 where no rate is watched.
    pub requests: u32,
    /// How long it stays open; None unless it opened.
    pub open_for: Option<Duration>,
}

impl BreakerState {
    /// `closed`, `open`, `half_open`.
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
            Self::OpenTimeOver => "open_time_over",
            Self::NoOtherWell => "no_other_well",
            Self::NoOtherLeft => "no_other_left",
        }
    }
}
