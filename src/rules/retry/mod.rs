//! Retries: which failed calls are sent again, when, and why the others are not.
//!
//! Only safe calls: those that the upstream could not have seen, methods that HTTP defines as idempotent (RFC 9110,
//! 9.2.2), calls with an idempotency key, and those that the route declares idempotent. No retry ends after the
//! deadline or follows retries at a hop further upstream. The destination's [`RetryBudget`] is checked last, so that it
//! is charged only for retries that are made. The back-off has full jitter, so that calls that failed together are not
//! retried together.

mod budget;
mod conditions;
mod spec;

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

pub use self::budget::{RetryBudget, RetryBudgetLimits, RetryBudgetSpec};
pub use self::conditions::{RetryCondition, RetryConditions};
pub use self::spec::{Backoff, BackoffSpec, Retry, RetrySpec};

/// Result of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptFailure {
    /// An HTTP response with this status, failed or not.
    Status(u16),
    /// A gRPC response with this code, failed or not.
    Grpc(u32),
    /// The connection or stream was closed before the response; the upstream may have seen the request.
    Reset,
    /// No response within `timeouts.perTry`.
    Timeout,
    /// The upstream could not have seen the request, and another endpoint or connection can get it at once: the request
    /// was returned by the connection, or the peer's proxy status says that its app never got it.
    Unsent,
    /// The peer did not process the request, and no other endpoint is left: an attempt at once would be refused again.
    Refused,
}

/// The upstream's word when to retry (`Retry-After`, `grpc-retry-pushback-ms`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushback {
    /// Retry after this time.
    Wait(Duration),
    /// Do not retry.
    Stop,
}

/// The facts about an attempt that decide on a retry.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttemptSummary {
    /// Number of the attempt that ended; the first is 1.
    pub tries: u32,
    /// Result of the attempt.
    pub failure: AttemptFailure,
    /// The attempt was made by the sidecar in front of the app.
    pub is_inbound: bool,
    /// The attempt used a connection that had carried a request before.
    pub is_reused: bool,
    /// Another connection of the same age had ended before, so that the failure says nothing new about the upstream.
    pub is_same_event: bool,
    /// The destination's circuit breaker would refuse a retry.
    pub is_circuit_open: bool,
    /// The method is idempotent or the request has an idempotency key.
    pub is_safe: bool,
    /// The caller of the parent request has gone.
    pub is_abandoned: bool,
    /// The proxy status says that a hop further upstream has used up its retries.
    pub is_marked_final: bool,
    /// The upstream's word when to retry.
    pub pushback: Option<Pushback>,
    /// The whole request body is kept and can be sent again.
    pub is_replayable: bool,
    /// Time until the deadline.
    pub left: Duration,
    /// From 0 up to, but not including, 1.
    pub random: f64,
}

/// Decision about a retry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryDecision {
    /// Send the request again.
    Retry {
        /// Wait before the next attempt.
        after: Duration,
    },
    /// Pass on the result of the attempt.
    Stop(NoRetryReason),
}

/// Why a call is not retried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NoRetryReason {
    /// The attempt did not fail.
    NotAFailure,
    /// The policy says `retry: off`.
    Off,
    /// `retry.on` does not contain this failure.
    ConditionOff,
    /// The upstream may have processed the request, and the request is not idempotent.
    NotSafe,
    /// The caller of the parent request has gone.
    CallerGone,
    /// A hop further upstream has retried already.
    RetriedBelow,
    /// The upstream asked for no retry.
    PushedBack,
    /// The policy's number of attempts is used up.
    TriesUsedUp,
    /// The request body is longer than `retry.replayLimit`.
    BodyTooLong,
    /// The wait would end after the deadline.
    Deadline,
    /// The destination's retry budget is used up.
    RetryBudget,
    /// The sidecar in front of the app leaves the retry to the caller's sidecar, which has other endpoints.
    AtTheCaller,
    /// The destination's circuit breaker is open and would refuse the retry.
    CircuitOpen,
}

/// The gRPC code that tells of a limit.
const RESOURCE_EXHAUSTED: u32 = 8;

/// Whether a method is idempotent (RFC 9110, 9.2.2).
pub fn is_idempotent(method: &str) -> bool {
    matches!(method, "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
}

impl Retry {
    /// Decides and charges the budget for a retry. A retry of a request that the upstream could not have seen is free:
    /// it is the first that an upstream gets. So is the first retry after an event that another call has paid for, because
    /// a server that ends all its connections at once causes no more of them than it had connections.
    pub fn next(&self, seen: &AttemptSummary, budget: &RetryBudget, now: Instant) -> RetryDecision {
        let decision = self.decide(seen);
        let is_free = seen.failure == AttemptFailure::Unsent || (seen.is_same_event && seen.tries == 1);
        let costs = matches!(decision, RetryDecision::Retry { .. }) && !is_free;
        if costs && !budget.try_spend(&self.budget, now) {
            return RetryDecision::Stop(NoRetryReason::RetryBudget);
        }
        decision
    }

    /// Decides without regard to the budget.
    pub fn decide(&self, seen: &AttemptSummary) -> RetryDecision {
        match self.reason_against(seen) {
            Some(why) => RetryDecision::Stop(why),
            None => match self.wait(seen) {
                after if after < seen.left => RetryDecision::Retry { after },
                _ => RetryDecision::Stop(NoRetryReason::Deadline),
            },
        }
    }

    /// The first reason against a retry: first the reasons in this hop, then those in the request, then those in the
    /// attempts so far.
    fn reason_against(&self, seen: &AttemptSummary) -> Option<NoRetryReason> {
        let is_unsent = seen.failure == AttemptFailure::Unsent;
        let is_wanted = is_unsent || self.has_condition(seen.failure);
        let reasons = [
            (seen.is_inbound && !is_for_inbound(seen), NoRetryReason::AtTheCaller),
            // The retry would be refused; the upstream's response tells the caller more.
            (seen.is_circuit_open, NoRetryReason::CircuitOpen),
            (!self.is_failure(seen.failure), NoRetryReason::NotAFailure),
            (!self.enabled.value, NoRetryReason::Off),
            (!is_wanted, NoRetryReason::ConditionOff),
            (!is_unsent && !seen.is_safe && !self.idempotent.value, NoRetryReason::NotSafe),
            (seen.is_abandoned, NoRetryReason::CallerGone),
            // The proxy status is about attempts that reached the upstream; this one did not.
            (!is_unsent && seen.is_marked_final, NoRetryReason::RetriedBelow),
            (seen.pushback == Some(Pushback::Stop), NoRetryReason::PushedBack),
            (seen.tries > self.attempts.value, NoRetryReason::TriesUsedUp),
            (!seen.is_replayable, NoRetryReason::BodyTooLong),
        ];
        reasons.into_iter().find_map(|(stands, why)| stands.then_some(why))
    }

    /// Whether hops further downstream must not retry the failed call: it was retried here; or it may have been
    /// processed and is not safe to repeat, while the app in between may have turned it into a call that looks safe; or
    /// the reason `why` against a retry here applies there too. `why` is `None` if no retry was considered because the
    /// response head had been received.
    ///
    /// `is_safe` as in [`AttemptSummary`].
    pub fn is_final(&self, tries: u32, is_safe: bool, why: Option<NoRetryReason>) -> bool {
        use NoRetryReason::{CircuitOpen, Deadline, PushedBack, RetriedBelow, RetryBudget, TriesUsedUp};
        let is_over =
            matches!(why, Some(TriesUsedUp | RetriedBelow | PushedBack | Deadline | RetryBudget | CircuitOpen));
        tries > 1 || !(is_safe || self.idempotent.value) || is_over
    }

    /// Whether the result is a failure: a 5xx, a gRPC code or a cut connection that counts against the upstream, or a
    /// condition of `retry.on`. Any other response, such as a status below 500 or a code about the request itself, is a
    /// valid result.
    pub fn is_failure(&self, seen: AttemptFailure) -> bool {
        let is_bad = match seen {
            AttemptFailure::Status(status) => status >= 500,
            // RESOURCE_EXHAUSTED is also what a sidecar with a full queue answers.
            AttemptFailure::Grpc(code) => code == RESOURCE_EXHAUSTED || self.grpc_failures.contains(code),
            AttemptFailure::Reset | AttemptFailure::Timeout | AttemptFailure::Unsent | AttemptFailure::Refused => true,
        };
        is_bad || self.is_on(seen)
    }

    /// Whether `retry.on` contains this failure.
    pub fn is_on(&self, failure: AttemptFailure) -> bool {
        self.enabled.value && self.has_condition(failure)
    }

    fn has_condition(&self, failure: AttemptFailure) -> bool {
        let condition = match failure {
            AttemptFailure::Status(status) => RetryCondition::Status(status),
            AttemptFailure::Grpc(code) => RetryCondition::Grpc(conditions::known(code)),
            AttemptFailure::Reset | AttemptFailure::Refused => RetryCondition::Reset,
            AttemptFailure::Timeout => RetryCondition::Timeout,
            AttemptFailure::Unsent => return false,
        };
        self.on.value.contains(condition)
    }

    /// The upstream's pushback exactly; zero if another endpoint can get the request at once; else a random part of the
    /// back-off.
    fn wait(&self, seen: &AttemptSummary) -> Duration {
        match (seen.pushback, seen.failure) {
            (Some(Pushback::Wait(wait)), _) => wait,
            (_, AttemptFailure::Unsent) => Duration::ZERO,
            _ => {
                let doublings = seen.tries.saturating_sub(1).min(16);
                let most = self.backoff.base.value.saturating_mul(1 << doublings).min(self.backoff.max.value);
                Duration::try_from_secs_f64(most.as_secs_f64() * seen.random).map_or(most, |wait| wait.min(most))
            }
        }
    }
}

/// The sidecar in front of the app leaves retries to the caller's sidecar, which has other endpoints. Exceptions:
/// requests that the app could not have seen, and one reset of a reused connection, a race that only this hop can see.
/// A second reset is no race.
fn is_for_inbound(seen: &AttemptSummary) -> bool {
    match seen.failure {
        AttemptFailure::Unsent => true,
        AttemptFailure::Reset => seen.is_reused && seen.tries == 1,
        AttemptFailure::Refused | AttemptFailure::Status(_) | AttemptFailure::Grpc(_) | AttemptFailure::Timeout => {
            false
        }
    }
}

impl NoRetryReason {
    /// The stable name, for log lines and labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotAFailure => "not_a_failure",
            Self::Off => "off",
            Self::ConditionOff => "condition_off",
            Self::NotSafe => "not_safe",
            Self::CallerGone => "caller_gone",
            Self::RetriedBelow => "retried_below",
            Self::PushedBack => "pushed_back",
            Self::TriesUsedUp => "tries_used_up",
            Self::BodyTooLong => "body_too_long",
            Self::Deadline => "deadline",
            Self::RetryBudget => "budget",
            Self::AtTheCaller => "at_the_caller",
            Self::CircuitOpen => "circuit_open",
        }
    }
}

impl fmt::Display for NoRetryReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests;
