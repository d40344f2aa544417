//! Metrics of rule events: retries, withheld retries, state changes of circuit breakers, ejections, faults, dry runs.
//!
//! These events are rare, so each one looks up its counter by labels, under a lock. Correlation is not rare: its caller
//! keeps the counters.

use super::Telemetry;
use super::families::{
    BREAKER_CHANGES, BREAKER_STATE, CORRELATIONS, DRY_RUN, EJECTED, EJECTIONS, FAULTS, RETRIES, RETRIES_WITHHELD,
};
use super::instruments::{Counter, Family, Labels};

/// Why a request is retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryReason {
    /// The attempt failed, and the policy retries such failures.
    Failed,
    /// The upstream could not have seen the request: the connection or the callee's sidecar says so.
    Unsent,
}

impl RetryReason {
    const fn as_str(self) -> &'static str {
        match self {
            RetryReason::Failed => "failed",
            RetryReason::Unsent => "unsent",
        }
    }
}

impl Telemetry {
    /// The counter of the process with these labels.
    fn counter(&self, family: Family, labels: Labels) -> Counter {
        self.instruments.counter(family, labels, None)
    }

    /// Counts a retry of a request to `destination`.
    pub fn retried(&self, destination: &str, reason: RetryReason) {
        let labels = vec![("destination", destination.to_owned()), ("reason", reason.as_str().to_owned())];
        self.counter(RETRIES, labels).increment();
    }

    /// Counts a failed request to `destination` that is not retried; `reason` is one of a closed set.
    pub fn retry_withheld(&self, destination: &str, reason: &'static str) {
        let labels = vec![("destination", destination.to_owned()), ("reason", reason.to_owned())];
        self.counter(RETRIES_WITHHELD, labels).increment();
    }

    /// Counts a state change of the circuit breaker of `destination` and sets its gauge. `state` is the name of the new
    /// state, `number` the value of the gauge: 0 closed, 1 half-open, 2 open.
    pub fn breaker_changed(&self, destination: &str, state: &'static str, number: i64) {
        let labels = vec![("destination", destination.to_owned()), ("state", state.to_owned())];
        self.counter(BREAKER_CHANGES, labels).increment();
        self.instruments.gauge(BREAKER_STATE, vec![("destination", destination.to_owned())], None).set(number);
    }

    /// Counts an endpoint of `destination` that was `ejected`, `probed`, `returned` to load balancing, or `kept`
    /// although it fails, and sets the gauge to `ejected`, the number of endpoints that are ejected now.
    pub fn ejection_changed(&self, destination: &str, result: &'static str, ejected: usize) {
        let labels = vec![("destination", destination.to_owned()), ("result", result.to_owned())];
        self.counter(EJECTIONS, labels).increment();
        self.set_ejected_endpoints(destination, ejected);
    }

    /// Sets the number of ejected endpoints of `destination`, for a change without an event: ejected endpoints that are
    /// no longer in the list.
    pub fn set_ejected_endpoints(&self, destination: &str, ejected: usize) {
        let count = i64::try_from(ejected).unwrap_or(i64::MAX);
        self.instruments.gauge(EJECTED, vec![("destination", destination.to_owned())], None).set(count);
    }

    /// Sets the gauges of circuit breaker and ejected endpoints of `destination` after a reload, without a change to
    /// count. A gauge that does not exist yet is created only for a value other than 0.
    pub fn set_health_gauges(&self, destination: &str, breaker: i64, ejected: usize) {
        let labels = vec![("destination", destination.to_owned())];
        if breaker != 0 || self.instruments.has(BREAKER_STATE, &labels) {
            self.instruments.gauge(BREAKER_STATE, labels.clone(), None).set(breaker);
        }
        if ejected != 0 || self.instruments.has(EJECTED, &labels) {
            self.set_ejected_endpoints(destination, ejected);
        }
    }

    /// Counts a call to `destination` on which a rule in dry run would have acted.
    pub fn dry_run(&self, destination: &str, rule: &'static str) {
        let labels = vec![("destination", destination.to_owned()), ("rule", rule.to_owned())];
        self.counter(DRY_RUN, labels).increment();
    }

    /// Counts a fault injected into a call to `destination`.
    pub fn fault_injected(&self, destination: &str, fault: &str) {
        let labels = vec![("destination", destination.to_owned()), ("fault", fault.to_owned())];
        self.counter(FAULTS, labels).increment();
    }

    /// The counter of outbound calls with this result of correlation, one of a closed set. Takes a lock: resolve once
    /// and keep the result, because it is used for every outbound call.
    pub fn correlation_counter(&self, result: &'static str) -> Counter {
        self.counter(CORRELATIONS, vec![("result", result.to_owned())])
    }
}
