//! Retries: which failed calls are sent again, when, and why the others are not.
//!
//! Only what is safe: what nobody has seen, what HTTP calls idempotent (RFC 9110, 9.2.2), what bears an idempotency key,
//! or what the route declares. Never past the deadline, never where a hop further down has tried already, and within the
//! destination's [`RetryBudget`], which is asked last, so that no retry is paid for that is not made.
//! The wait has full jitter: callers that failed together do not come back together.

mod budget;
mod conditions;
mod spec;

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

pub use self::budget::{RetryBudget, RetryBudgetLimits, RetryBudgetSpec};
pub use self::conditions::{RetryCondition, RetryConditions};
pub use self::spec::{Backoff, BackoffSpec, Retry, RetrySpec};
use super::circuit_breaker::is_failed_code;

/// How a try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptFailure {
    /// An HTTP answer with this status, be it good or bad.
    Status(u16),
    /// A gRPC answer with this code, be it good or bad.
    Grpc(u32),
    /// The connection or stream broke off before the answer; the upstream may have seen the request.
    Reset,
    /// No answer within `timeouts.perTry`.
    Timeout,
    /// Nobody has seen the request, and another endpoint or connection can have it at once: it was handed back, or the peer
    /// says that its app never got it.
    Unsent,
    /// The peer has left the request aside, and there is nobody else to send it to: at once it would only be left aside
    /// again.
    Refused,
}

/// What the upstream said about another try (`Retry-After`, `grpc-retry-pushback-ms`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushback {
    /// After so long.
    Wait(Duration),
    /// Not at all.
    Stop,
}

/// All that counts for whether a call is sent again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttemptSummary {
    /// Which try has just ended; the first is 1.
    pub tries: u32,
    /// How it ended.
    pub failure: AttemptFailure,
    /// It was made by the sidecar before the app.
    pub is_inbound: bool,
    /// It went over a connection that had been used before.
    pub is_reused: bool,
    /// The destination's circuit breaker would refuse another one.
    pub is_circuit_open: bool,
    /// Its method is idempotent or it bears an idempotency key.
    pub is_safe: bool,
    /// Nobody waits any more for the inbound request that caused it.
    pub is_abandoned: bool,
    /// A hop further down has retried already and given up.
    pub is_marked_final: bool,
    /// What the upstream said about another try.
    pub pushback: Option<Pushback>,
    /// The request's body can be sent again from its beginning.
    pub is_replayable: bool,
    /// Time until the deadline.
    pub left: Duration,
    /// From 0 up to, but not including, 1.
    pub random: f64,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryDecision {
    /// Send it again.
    RetryReason {
        /// When this has passed.
        after: Duration,
    },
    /// The caller gets what there is.
    Stop(NoRetryReason),
}

/// Why a call is not sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NoRetryReason {
    /// It did not fail.
    NotAFailure,
    /// The policy says `retry: off`.
    Off,
    /// `retry.on` does not name this failure.
    ConditionOff,
    /// The upstream may have done the work, and to do it twice may do harm.
    NotSafe,
    /// Nobody waits any more for the inbound request that caused the call.
    CallerGone,
    /// A hop further down has retried already.
    RetriedBelow,
    /// The upstream asked for no other try.
    PushedBack,
    /// As many tries were made as the policy allows.
    TriesUsedUp,
    /// More of the body has passed than `retry.replayLimit` keeps.
    BodyTooLong,
    /// The wait would end after the deadline.
    Deadline,
    /// The destination's retry budget is used up.
    RetryBudget,
    /// The sidecar before the app leaves it to the caller's, which has other endpoints.
    AtTheCaller,
    /// The destination's circuit breaker is open: another try would be refused.
    CircuitOpen,
}

/// Whether a method may be repeated without harm (RFC 9110, 9.2.2).
pub fn is_idempotent(method: &str) -> bool {
    matches!(method, "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
}

impl Retry {
    /// Decides, and charges the budget for what it decides. A call that nobody has seen is not charged: its next try is
    /// the first that anybody gets.
    pub fn next(&self, seen: &AttemptSummary, budget: &RetryBudget, now: Instant) -> RetryDecision {
        let decision = self.decide(seen);
        let costs = matches!(decision, RetryDecision::RetryReason { .. }) && seen.failure != AttemptFailure::Unsent;
        if costs && !budget.try_spend(&self.budget, now) {
            return RetryDecision::Stop(NoRetryReason::RetryBudget);
        }
        decision
    }

    /// Decides, but for the budget.
    pub fn decide(&self, seen: &AttemptSummary) -> RetryDecision {
        match self.stands_against(seen) {
            Some(why) => RetryDecision::Stop(why),
            None => match self.wait(seen) {
                after if after < seen.left => RetryDecision::RetryReason { after },
                _ => RetryDecision::Stop(NoRetryReason::Deadline),
            },
        }
    }

    /// The first reason against another try; first those that lie in this hop, then those that lie in the call, then
    /// those that lie in what has happened.
    fn stands_against(&self, seen: &AttemptSummary) -> Option<NoRetryReason> {
        let is_unsent = seen.failure == AttemptFailure::Unsent;
        let is_wanted = is_unsent || self.wants(seen.failure);
        let reasons = [
            (seen.is_inbound && !is_for_inbound(seen), NoRetryReason::AtTheCaller),
            // Another try would only be refused; what the callee said is worth more.
            (seen.is_circuit_open, NoRetryReason::CircuitOpen),
            (!self.is_failure(seen.failure), NoRetryReason::NotAFailure),
            (!self.enabled.value, NoRetryReason::Off),
            (!is_wanted, NoRetryReason::ConditionOff),
            (!is_unsent && !seen.is_safe && !self.idempotent.value, NoRetryReason::NotSafe),
            (seen.is_abandoned, NoRetryReason::CallerGone),
            // The mark speaks of tries that were seen; of this one nobody has seen anything.
            (!is_unsent && seen.is_marked_final, NoRetryReason::RetriedBelow),
            (seen.pushback == Some(Pushback::Stop), NoRetryReason::PushedBack),
            (seen.tries > self.attempts.value, NoRetryReason::TriesUsedUp),
            (!seen.is_replayable, NoRetryReason::BodyTooLong),
        ];
        reasons.into_iter().find_map(|(stands, why)| stands.then_some(why))
    }

    /// Whether nobody above shall try a failed call again: because it was tried again here, whatever ended that;
    /// because it may have done its work and is not to do it twice, and above the app it may have become a call that
    /// looks safe; or because of why there is no other try. `why` is None where none was thought of: the head of the
    /// answer had come.
    ///
    /// `is_safe` as in [`AttemptSummary`].
    pub fn is_final(&self, tries: u32, is_safe: bool, why: Option<NoRetryReason>) -> bool {
        use NoRetryReason::{CircuitOpen, Deadline, PushedBack, RetriedBelow, RetryBudget, TriesUsedUp};
        let is_over =
            matches!(why, Some(TriesUsedUp | RetriedBelow | PushedBack | Deadline | RetryBudget | CircuitOpen));
        tries > 1 || !(is_safe || self.idempotent.value) || is_over
    }

    /// Whether it is one: a 5xx, a code or a cut that speaks against the callee, and what `retry.on` names. Any other
    /// answer, a status below 500 or a code for what is wrong with the call itself, is what the caller asked for.
    pub fn is_failure(&self, seen: AttemptFailure) -> bool {
        let is_bad = match seen {
            AttemptFailure::Status(status) => status >= 500,
            AttemptFailure::Grpc(code) => is_failed_code(code),
            AttemptFailure::Reset | AttemptFailure::Timeout | AttemptFailure::Unsent | AttemptFailure::Refused => true,
        };
        is_bad || self.is_on(seen)
    }

    /// Whether `retry.on` names it.
    pub fn is_on(&self, failure: AttemptFailure) -> bool {
        self.enabled.value && self.wants(failure)
    }

    fn wants(&self, failure: AttemptFailure) -> bool {
        let condition = match failure {
            AttemptFailure::Status(status) => RetryCondition::Status(status),
            AttemptFailure::Grpc(code) => RetryCondition::Grpc(conditions::known(code)),
            AttemptFailure::Reset | AttemptFailure::Refused => RetryCondition::Reset,
            AttemptFailure::Timeout => RetryCondition::Timeout,
            AttemptFailure::Unsent => return false,
        };
        self.on.value.contains(condition)
    }

    /// What the upstream asked for, to the letter; nothing where another endpoint can have the call at once; else a
    /// random part of the back-off.
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

/// The sidecar before the app leaves retries to the caller's, which has other endpoints; but the end of the app's own
/// connections nobody else can see. Once only: what breaks off again was no race.
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
    /// Its stable name, for log lines and labels.
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
