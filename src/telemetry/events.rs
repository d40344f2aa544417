//! What the rules did: counted when it happens, by name, because it is rare.
//!
//! A retry, a refusal to retry, a change of a breaker, an ejection, a fault, a rule in `warn` that would have acted.
//! Each is looked up by its labels at that moment; nothing here is called for an exchange that simply goes well.

use super::Telemetry;
use super::families::{
    BREAKER_CHANGES, BREAKER_STATE, CORRELATIONS, DRY_RUN, EJECTED, EJECTIONS, FAULTS, RETRIES, RETRIES_WITHHELD,
};
use super::instruments::{Counter, Family, Labels};

/// Why a request goes out once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryReason {
    /// A try failed, and the policy has it tried again.
    Failed,
    /// Nobody has seen the request: the connection or the callee's sidecar says so.
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
    fn tally(&self, family: Family, labels: Labels) -> Counter {
        self.instruments.counter(family, labels, None)
    }

    /// A request to `destination` goes out once more.
    pub fn retried(&self, destination: &str, again: RetryReason) {
        let labels = vec![("destination", destination.to_owned()), ("reason", again.as_str().to_owned())];
        self.tally(RETRIES, labels).increment();
    }

    /// A failed request to `destination` does not go out once more; `why` is one of a closed set.
    pub fn retry_withheld(&self, destination: &str, why: &'static str) {
        let labels = vec![("destination", destination.to_owned()), ("reason", why.to_owned())];
        self.tally(RETRIES_WITHHELD, labels).increment();
    }

    /// The circuit breaker of `destination` is in another state: its name, and its number for the gauge
    /// (0 closed, 1 half-open, 2 open).
    pub fn breaker_changed(&self, destination: &str, state: &'static str, number: i64) {
        let labels = vec![("destination", destination.to_owned()), ("state", state.to_owned())];
        self.tally(BREAKER_CHANGES, labels).increment();
        self.instruments.gauge(BREAKER_STATE, vec![("destination", destination.to_owned())], None).set(number);
    }

    /// An endpoint of `destination` was `ejected`, `probed`, `returned` to load balancing, or `kept` although it fails;
    /// `out_now` of them are ejected.
    pub fn ejection_changed(&self, destination: &str, change: &'static str, out_now: usize) {
        let labels = vec![("destination", destination.to_owned()), ("result", change.to_owned())];
        self.tally(EJECTIONS, labels).increment();
        self.endpoints_out(destination, out_now);
    }

    /// So many endpoints of `destination` are out now, though none of them has changed: some are gone.
    pub fn endpoints_out(&self, destination: &str, out_now: usize) {
        let count = i64::try_from(out_now).unwrap_or(i64::MAX);
        self.instruments.gauge(EJECTED, vec![("destination", destination.to_owned())], None).set(count);
    }

    /// How it stands with `destination` after a reload, without any change of its own; what was never told stays untold.
    pub fn breaker_and_endpoints(&self, destination: &str, breaker: i64, out_now: usize) {
        let labels = vec![("destination", destination.to_owned())];
        if breaker != 0 || self.instruments.has(BREAKER_STATE, &labels) {
            self.instruments.gauge(BREAKER_STATE, labels.clone(), None).set(breaker);
        }
        if out_now != 0 || self.instruments.has(EJECTED, &labels) {
            self.endpoints_out(destination, out_now);
        }
    }

    /// A rule in `warn` would have acted on a call to `destination`.
    pub fn dry_run(&self, destination: &str, rule: &'static str) {
        let labels = vec![("destination", destination.to_owned()), ("rule", rule.to_owned())];
        self.tally(DRY_RUN, labels).increment();
    }

    /// A fault of the policy was injected into a call to `destination`.
    pub fn fault_injected(&self, destination: &str, fault: &str) {
        let labels = vec![("destination", destination.to_owned()), ("fault", fault.to_owned())];
        self.tally(FAULTS, labels).increment();
    }

    /// The counter of outbound calls that were, or were not, joined with the inbound request that caused them. Resolve
    /// once and keep: calls are many.
    pub fn joins(&self, how: &'static str) -> Counter {
        self.tally(CORRELATIONS, vec![("result", how.to_owned())])
    }
}
