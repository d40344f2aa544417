//! How strictly each rule is kept: `enforce`, `warn` (counts and logs what it would have done) or `off`.
//!
//! The pipeline asks for the mode of a rule before it acts on the rule's decision; the rules themselves know no mode.
//! [`RuleName`] is the closed list of rules that have one, with the names they bear in metrics, logs and the policy.

use std::fmt;

use schemars::JsonSchema;
use serde::Deserialize;

use super::toggle::allow_false;
use crate::problems::{Cursor, Sourced};

/// How strictly a rule is kept. Shows as in a policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(transform = allow_false)]
pub enum Mode {
    /// Its decisions hold.
    #[default]
    Enforce,
    /// Its decisions are counted and logged, and change nothing.
    DryRun,
    /// It is not asked.
    Off,
}

impl Mode {
    /// Whether decisions of the rule hold.
    pub const fn is_enforced(self) -> bool {
        matches!(self, Self::Enforce)
    }

    /// Whether the rule is not even asked.
    pub const fn is_off(self) -> bool {
        matches!(self, Self::Off)
    }

    /// The stable name: `enforce`, `warn` or `off`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::DryRun => "warn",
            Self::Off => "off",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The rules that have a mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RuleName {
    /// One time budget for the whole chain of calls.
    Deadline,
    /// Failed calls are made again.
    Retry,
    /// Only the hop at which a call failed makes it again.
    RetryInOnePlace,
    /// A call that never reached its app is told from one that failed there.
    Unsent,
    /// A failure counts only at the hop where it happened.
    BlameInOnePlace,
    /// A destination that fails gets no calls for a while.
    CircuitBreaker,
    /// An endpoint that fails gets no calls for a while.
    Ejection,
    /// So many calls a time.
    RateLimit,
    /// So many calls at once.
    Limits,
    /// Failures on purpose.
    Faults,
}

impl RuleName {
    /// All of them, in the order of the policy.
    pub const ALL: [Self; 10] = [
        Self::Deadline,
        Self::Retry,
        Self::RetryInOnePlace,
        Self::Unsent,
        Self::BlameInOnePlace,
        Self::CircuitBreaker,
        Self::Ejection,
        Self::RateLimit,
        Self::Limits,
        Self::Faults,
    ];

    /// The stable name in metrics and logs; snake_case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deadline => "deadline",
            Self::Retry => "retry",
            Self::RetryInOnePlace => "retry_in_one_place",
            Self::Unsent => "unsent",
            Self::BlameInOnePlace => "blame_in_one_place",
            Self::CircuitBreaker => "circuit_breaker",
            Self::Ejection => "ejection",
            Self::RateLimit => "rate_limit",
            Self::Limits => "limits",
            Self::Faults => "faults",
        }
    }

    /// The key in `rules:` of a policy; camelCase.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Deadline => "deadline",
            Self::Retry => "retry",
            Self::RetryInOnePlace => "retryInOnePlace",
            Self::Unsent => "unsent",
            Self::BlameInOnePlace => "blameInOnePlace",
            Self::CircuitBreaker => "circuitBreaker",
            Self::Ejection => "ejection",
            Self::RateLimit => "rateLimit",
            Self::Limits => "limits",
            Self::Faults => "faults",
        }
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `rules:` of a policy.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping of rules and their modes")]
pub struct ModesSpec {
    /// One time budget for the whole chain of calls. Default enforce.
    pub deadline: Option<Mode>,
    /// Failed calls are made again. Default enforce.
    pub retry: Option<Mode>,
    /// Only the hop at which a call failed makes it again. Default enforce.
    pub retry_in_one_place: Option<Mode>,
    /// A call that never reached its app is told from one that failed there. Default enforce.
    pub unsent: Option<Mode>,
    /// A failure counts only at the hop where it happened. Default enforce.
    pub blame_in_one_place: Option<Mode>,
    /// A destination that fails gets no calls for a while. Default enforce.
    pub circuit_breaker: Option<Mode>,
    /// An endpoint that fails gets no calls for a while. Default enforce.
    pub ejection: Option<Mode>,
    /// So many calls a time. Default enforce.
    pub rate_limit: Option<Mode>,
    /// So many calls at once. Default enforce.
    pub limits: Option<Mode>,
    /// Failures on purpose; `warn` logs the fault and does nothing. Default enforce.
    pub faults: Option<Mode>,
}

/// The mode of each rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Modes {
    /// One time budget for the whole chain of calls.
    pub deadline: Sourced<Mode>,
    /// Failed calls are made again.
    pub retry: Sourced<Mode>,
    /// Only the hop at which a call failed makes it again.
    pub retry_in_one_place: Sourced<Mode>,
    /// A call that never reached its app is told from one that failed there.
    pub unsent: Sourced<Mode>,
    /// A failure counts only at the hop where it happened.
    pub blame_in_one_place: Sourced<Mode>,
    /// A destination that fails gets no calls for a while.
    pub circuit_breaker: Sourced<Mode>,
    /// An endpoint that fails gets no calls for a while.
    pub ejection: Sourced<Mode>,
    /// So many calls a time.
    pub rate_limit: Sourced<Mode>,
    /// So many calls at once.
    pub limits: Sourced<Mode>,
    /// Failures on purpose; with `warn` they are logged and do not happen.
    pub faults: Sourced<Mode>,
}

impl Modes {
    /// What holds where no policy says otherwise: every rule is enforced.
    pub const fn built_in() -> Self {
        Self {
            deadline: Sourced::built_in(Mode::Enforce),
            retry: Sourced::built_in(Mode::Enforce),
            retry_in_one_place: Sourced::built_in(Mode::Enforce),
            unsent: Sourced::built_in(Mode::Enforce),
            blame_in_one_place: Sourced::built_in(Mode::Enforce),
            circuit_breaker: Sourced::built_in(Mode::Enforce),
            ejection: Sourced::built_in(Mode::Enforce),
            rate_limit: Sourced::built_in(Mode::Enforce),
            limits: Sourced::built_in(Mode::Enforce),
            faults: Sourced::built_in(Mode::Enforce),
        }
    }

    /// The mode of one rule, and the line that says so.
    pub const fn of(&self, rule: RuleName) -> &Sourced<Mode> {
        match rule {
            RuleName::Deadline => &self.deadline,
            RuleName::Retry => &self.retry,
            RuleName::RetryInOnePlace => &self.retry_in_one_place,
            RuleName::Unsent => &self.unsent,
            RuleName::BlameInOnePlace => &self.blame_in_one_place,
            RuleName::CircuitBreaker => &self.circuit_breaker,
            RuleName::Ejection => &self.ejection,
            RuleName::RateLimit => &self.rate_limit,
            RuleName::Limits => &self.limits,
            RuleName::Faults => &self.faults,
        }
    }
}

impl ModesSpec {
    /// Lays this layer over another. Nothing in it can be wrong once it was read.
    pub fn check(&self, base: &Modes, at: &Cursor<'_>) -> Modes {
        let over = |rule: RuleName, mode: Option<Mode>| {
            mode.map_or_else(|| base.of(rule).clone(), |mode| at.key(rule.key()).set(mode))
        };
        Modes {
            deadline: over(RuleName::Deadline, self.deadline),
            retry: over(RuleName::Retry, self.retry),
            retry_in_one_place: over(RuleName::RetryInOnePlace, self.retry_in_one_place),
            unsent: over(RuleName::Unsent, self.unsent),
            blame_in_one_place: over(RuleName::BlameInOnePlace, self.blame_in_one_place),
            circuit_breaker: over(RuleName::CircuitBreaker, self.circuit_breaker),
            ejection: over(RuleName::Ejection, self.ejection),
            rate_limit: over(RuleName::RateLimit, self.rate_limit),
            limits: over(RuleName::Limits, self.limits),
            faults: over(RuleName::Faults, self.faults),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problems::Origin;
    use crate::rules::tests::checked;

    fn check(yaml: &str) -> Modes {
        let (modes, problems) = checked(yaml, |spec: &ModesSpec, at| spec.check(&Modes::built_in(), at));
        assert!(problems.is_empty(), "{problems:?}");
        modes
    }

    #[test]
    fn every_rule_is_enforced_unless_the_policy_says_otherwise() {
        let modes = check("{}");
        for rule in RuleName::ALL {
            assert!(modes.of(rule).value.is_enforced(), "{rule}");
            assert_eq!(modes.of(rule).origin, Origin::BuiltIn);
        }
    }

    #[test]
    fn each_key_sets_the_mode_of_its_own_rule_and_no_other() {
        for rule in RuleName::ALL {
            let modes = check(&format!("{}: warn", rule.key()));
            for other in RuleName::ALL {
                let mode = modes.of(other);
                assert_eq!(mode.value, if other == rule { Mode::DryRun } else { Mode::Enforce }, "{rule}: {other}");
                assert_eq!(mode.origin == Origin::BuiltIn, other != rule);
            }
        }
    }

    #[test]
    fn the_names_of_a_rule_differ_in_their_case_only() {
        for rule in RuleName::ALL {
            assert_eq!(rule.as_str().replace('_', ""), rule.key().to_lowercase());
            assert_eq!(rule.as_str(), rule.as_str().to_lowercase());
        }
    }

    #[test]
    fn a_mode_is_read_as_it_is_shown() {
        for mode in [Mode::Enforce, Mode::DryRun, Mode::Off] {
            assert_eq!(serde_json::from_value::<Mode>(mode.as_str().into()).unwrap(), mode);
        }
        assert!(Mode::Off.is_off() && !Mode::DryRun.is_off() && !Mode::DryRun.is_enforced());
    }
}
