//! The values of `retry`: `off` or a mapping in each layer, their check and their rows.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::conditions::{RetryCondition, RetryConditions};
use crate::problems::{Cursor, InvalidValue, Origin, Sourced};
use crate::rules::circuit_breaker::GrpcFailures;
use crate::rules::count::Count;
use crate::rules::duration::{self, DurationSpec};
use crate::rules::retry::budget::{RetryBudgetLimits, RetryBudgetSpec};
use crate::rules::rule::{Row, RowContext, Rule};
use crate::rules::size::Size;
use crate::rules::toggle::{Toggle, ToggleKeys};

/// Upper bound of `attempts`.
const MOST_ATTEMPTS: u32 = 10;

/// `retry:` of `defaults`, of a destination or of a route, as a mapping. Even an empty mapping turns retries on.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping of retry values")]
pub struct RetrySpec {
    /// Retries after the first attempt, 1 to 10. Default 2.
    pub attempts: Option<Count<1, MOST_ATTEMPTS>>,
    /// Failures that are retried: statuses from 400 to 599, `reset`, `timeout`, gRPC codes in snake case. Default [502,
    /// 503, 504, reset, timeout, unavailable].
    pub on: Option<Vec<RetryCondition>>,
    /// The calls are idempotent whatever their method. Default false.
    pub idempotent: Option<bool>,
    /// Wait before a retry.
    pub backoff: Option<BackoffSpec>,
    /// Retry budget of the destination. Not on a route: the routes of a destination share one budget.
    pub budget: Option<RetryBudgetSpec>,
    /// Bytes of a request's body that are kept for a retry, as a number or with KiB/MiB: up to 4MiB; 0 keeps no body.
    /// Default 64KiB.
    pub replay_limit: Option<Size<0, 4_194_304>>,
}

impl ToggleKeys for RetrySpec {
    const KEYS: &'static [&'static str] = &["attempts", "on", "idempotent", "backoff", "budget", "replayLimit"];
}

/// `backoff:` of `retry`. The wait is random: up to `base` before the first retry, then up to twice that, up to `max`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping with base and max")]
pub struct BackoffSpec {
    /// Upper bound of the wait before the first retry; doubles with each retry. Default 25ms.
    pub base: Option<DurationSpec>,
    /// Upper bound of every wait. Default 250ms.
    pub max: Option<DurationSpec>,
}

/// Checked retry values of a route.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Retry {
    /// Whether retries are on.
    pub enabled: Sourced<bool>,
    /// Retries after the first attempt; 1 to 10.
    pub attempts: Sourced<u32>,
    /// Failures that are retried.
    pub on: Sourced<RetryConditions>,
    /// The calls are idempotent whatever their method.
    pub idempotent: Sourced<bool>,
    /// Wait before a retry.
    pub backoff: Backoff,
    /// Values of the destination's retry budget.
    pub budget: RetryBudgetLimits,
    /// Bytes of a request's body that are kept.
    pub replay_limit: Sourced<u32>,
    /// gRPC codes that are failures: `circuitBreaker.grpcFailures` of the destination.
    pub grpc_failures: GrpcFailures,
}

/// Wait before a retry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Backoff {
    /// Upper bound of the wait before the first retry; at most `max`.
    pub base: Sourced<Duration>,
    /// Upper bound of every wait.
    pub max: Sourced<Duration>,
}

impl Retry {
    /// The built-in values.
    pub const fn built_in() -> Self {
        Self {
            enabled: Sourced::built_in(true),
            attempts: Sourced::built_in(2),
            on: Sourced::built_in(RetryConditions::built_in()),
            idempotent: Sourced::built_in(false),
            backoff: Backoff {
                base: Sourced::built_in(Duration::from_millis(25)),
                max: Sourced::built_in(Duration::from_millis(250)),
            },
            budget: RetryBudgetLimits::built_in(),
            replay_limit: Sourced::built_in(64 << 10),
            grpc_failures: GrpcFailures::built_in(),
        }
    }
}

impl Rule for Retry {
    type Spec = Toggle<RetrySpec>;
    type Value = Self;

    const BUILT_IN: Self = Self::built_in();

    fn check(spec: &Toggle<RetrySpec>, below: &Self, at: &Cursor<'_>) -> Self {
        match spec {
            Toggle::Off => Self { enabled: at.set(false), ..below.clone() },
            Toggle::On(values) => values.check(below, at),
        }
    }

    /// Reports a budget: all routes of a destination share one.
    fn check_route(spec: &Toggle<RetrySpec>, below: &Self, at: &Cursor<'_>) -> Self {
        if let Toggle::On(RetrySpec { budget: Some(_), .. }) = spec {
            let hint = "move it to `retry` of the destination: all its routes share one budget";
            at.key("budget").report_key(InvalidValue::new("a route has no budget of its own", hint));
        }
        Self::check(spec, below, at)
    }

    fn rows(retry: &Self, seen: &RowContext) -> Vec<Row> {
        if !retry.enabled.value {
            return vec![Row::whole("off", &retry.enabled.origin)];
        }
        let mut rows = vec![
            Row::shown("attempts", &retry.attempts),
            Row::shown("on", &retry.on),
            Row::shown("idempotent", &retry.idempotent),
            Row::time("backoff.base", &retry.backoff.base),
            Row::time("backoff.max", &retry.backoff.max),
            Row::shown("budget.ratio", &retry.budget.ratio),
            Row::shown("budget.minPerSecond", &retry.budget.min_per_second),
            Row::shown("replayLimit", &retry.replay_limit),
        ];
        // The sidecar in front of the app leaves most retries to its callers.
        if seen.is_inbound {
            rows.push(Row::bare("", "inbound: only calls that the app could not have seen"));
        }
        rows
    }
}

impl RetrySpec {
    fn check(&self, base: &Retry, at: &Cursor<'_>) -> Retry {
        let backoff_at = at.key("backoff");
        let budget_at = at.key("budget");
        Retry {
            enabled: if base.enabled.value { base.enabled.clone() } else { at.set(true) },
            attempts: self.attempts.map_or_else(|| base.attempts.clone(), |n| at.key("attempts").set(n.0)),
            on: self.on.as_ref().map_or_else(|| base.on.clone(), |list| conditions(list, &at.key("on"))),
            idempotent: self.idempotent.map_or_else(|| base.idempotent.clone(), |is| at.key("idempotent").set(is)),
            backoff: match &self.backoff {
                Some(spec) => spec.check(&base.backoff, &backoff_at),
                None => base.backoff.clone(),
            },
            budget: match &self.budget {
                Some(spec) => spec.check(&base.budget, &budget_at),
                None => base.budget.clone(),
            },
            replay_limit: self
                .replay_limit
                .map_or_else(|| base.replay_limit.clone(), |size| at.key("replayLimit").set(size.0)),
            grpc_failures: base.grpc_failures,
        }
    }
}

fn conditions(list: &[RetryCondition], at: &Cursor<'_>) -> Sourced<RetryConditions> {
    // A refused condition counts as an entry.
    if list.is_empty() && at.size() == 0 {
        at.report("the list is empty", "write at least one condition, like 503 or `reset`, or `retry: off`");
    }
    let mut all = RetryConditions::default();
    for (index, condition) in list.iter().enumerate() {
        if all.contains(*condition) {
            at.index(index).report(format!("`{condition}` appears twice"), "remove one of the two");
        }
        all = all.with(*condition);
    }
    at.set(all)
}

impl BackoffSpec {
    /// Reports a `base` longer than `max`, in the layer that causes it.
    fn check(&self, below: &Backoff, at: &Cursor<'_>) -> Backoff {
        let mut base = self.base.map_or_else(|| below.base.clone(), |span| at.key("base").set(span.0));
        let mut max = self.max.map_or_else(|| below.max.clone(), |span| at.key("max").set(span.0));
        if base.value > max.value {
            // A built-in value is adjusted: a problem about a value that is not in the file would confuse.
            if base.origin == Origin::BuiltIn {
                base = max.clone();
            } else if max.origin == Origin::BuiltIn {
                max = base.clone();
            } else {
                self.report_longer(&base, &max, at);
            }
        }
        Backoff { base, max }
    }

    fn report_longer(&self, base: &Sourced<Duration>, max: &Sourced<Duration>, at: &Cursor<'_>) {
        let (long, short) = (duration::format(base.value), duration::format(max.value));
        if self.base.is_some() {
            let message = format!("`base` {long} is longer than `max` {short} ({})", max.origin);
            at.key("base").report(message, format!("at most {short}, or a longer `max`"));
        } else {
            let message = format!("`max` {short} is shorter than `base` {long} ({})", base.origin);
            at.key("max").report(message, format!("at least {long}, or a shorter `base` here"));
        }
    }
}
