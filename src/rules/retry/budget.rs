//! Retry budget: bounds the retries to a destination in proportion to its successful calls.
//!
//! A bucket of at most ten tokens, full at first. Each successful call earns `ratio` of a token, each second
//! `minPerSecond` tokens; a retry costs one token, charged when it is scheduled. So a destination that fails completely
//! gets at most 10 + `minPerSecond` × t retries, whatever the number of calls, and one that fails in part gets at most
//! `ratio` more for each successful call.
//!
//! One [`RetryBudget`] per destination, shared by all workers; it survives reloads, and a changed value applies at
//! once. The arithmetic is in whole millionths of a token, so no error grows with the number of calls. As Finagle's
//! `RetryBudget`; gRPC's throttling (gRFC A6) is similar, but stops retries at half a bucket.

use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;
use tokio::time::Instant;

use crate::problems::{Cursor, Sourced};
use crate::rules::count::Count;
use crate::rules::ratio::Ratio;

/// One token.
const TOKEN: u64 = 1_000_000;

/// Capacity of the bucket.
const FULL: u64 = 10 * TOKEN;

/// `budget:` of `retry`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping with ratio and minPerSecond")]
pub struct RetryBudgetSpec {
    /// Tokens that a successful call earns. Default 0.2.
    pub ratio: Option<Ratio>,
    /// Tokens that a second earns, whatever the calls; 0 for none. Default 1.
    pub min_per_second: Option<Count<0>>,
}

/// Checked values of a destination's budget.
#[derive(Debug, Clone, PartialEq)]
pub struct RetryBudgetLimits {
    /// Tokens that a successful call earns; above 0, at most 1, never NaN.
    pub ratio: Sourced<f64>,
    /// Tokens that a second earns.
    pub min_per_second: Sourced<u32>,
}

// The ratio is never NaN, so each value equals itself.
impl Eq for RetryBudgetLimits {}

impl Hash for RetryBudgetLimits {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.ratio.value.to_bits().hash(state);
        self.min_per_second.hash(state);
    }
}

impl RetryBudgetLimits {
    /// The built-in values.
    pub const fn built_in() -> Self {
        Self { ratio: Sourced::built_in(0.2), min_per_second: Sourced::built_in(1) }
    }
}

impl RetryBudgetSpec {
    /// Lays this layer over the layer below.
    pub fn check(&self, base: &RetryBudgetLimits, at: &Cursor<'_>) -> RetryBudgetLimits {
        RetryBudgetLimits {
            ratio: self.ratio.map_or_else(|| base.ratio.clone(), |ratio| at.key("ratio").set(ratio.0)),
            min_per_second: self
                .min_per_second
                .map_or_else(|| base.min_per_second.clone(), |count| at.key("minPerSecond").set(count.0)),
        }
    }
}

/// The live budget of one destination.
#[derive(Debug)]
pub struct RetryBudget {
    /// Successful calls that are not yet converted into tokens.
    earned: AtomicU64,
    purse: Mutex<Purse>,
}

#[derive(Debug)]
struct Purse {
    /// In millionths of a token.
    tokens: u64,
    /// End of the time that is already converted into tokens; `None` while the bucket is full because no retry was made
    /// yet.
    paid_until: Option<Instant>,
}

impl RetryBudget {
    /// A full budget.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { earned: AtomicU64::new(0), purse: Mutex::new(Purse { tokens: FULL, paid_until: None }) })
    }

    /// Counts a successful call. One atomic add: it is converted into tokens at the next `try_spend`.
    pub fn earn(&self) {
        self.earned.fetch_add(1, Relaxed);
    }

    /// Spends one token for a retry. False, without a charge, if the budget is used up.
    ///
    /// Takes a lock for a few instructions; only failed calls come here.
    pub fn try_spend(&self, values: &RetryBudgetLimits, now: Instant) -> bool {
        let mut purse = self.filled(values, now);
        let left = purse.tokens.checked_sub(TOKEN);
        purse.tokens = left.unwrap_or(purse.tokens);
        left.is_some()
    }

    /// The bucket with the tokens earned so far. Cutting an overflow only now gives the same result as at once, since
    /// no token was spent in between.
    fn filled(&self, values: &RetryBudgetLimits, now: Instant) -> MutexGuard<'_, Purse> {
        let mut purse = self.purse.lock().unwrap_or_else(PoisonError::into_inner);
        let for_a_call = (values.ratio.value * TOKEN as f64).round() as u64;
        let by_calls = self.earned.swap(0, Relaxed).saturating_mul(for_a_call);
        let passed = purse.paid_until.map_or(Duration::ZERO, |until| now.saturating_duration_since(until));
        // Tokens per second are millionths of a token per microsecond.
        let micros = u64::try_from(passed.as_micros()).unwrap_or(u64::MAX);
        let by_time = micros.saturating_mul(values.min_per_second.value.into());
        purse.tokens = purse.tokens.saturating_add(by_calls).saturating_add(by_time).min(FULL);
        // Workers read the clock before they take the lock, so their times may be out of order.
        purse.paid_until = Some(purse.paid_until.map_or(now, |until| until.max(now)));
        purse
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(ratio: f64, min_per_second: u32) -> RetryBudgetLimits {
        RetryBudgetLimits { ratio: Sourced::built_in(ratio), min_per_second: Sourced::built_in(min_per_second) }
    }

    fn spend_all(budget: &RetryBudget, values: &RetryBudgetLimits, now: Instant) -> u32 {
        let mut spent = 0;
        while budget.try_spend(values, now) {
            spent += 1;
        }
        spent
    }

    #[test]
    fn a_destination_that_fails_completely_gets_ten_retries_and_one_a_second() {
        let (budget, values, start) = (RetryBudget::new(), RetryBudgetLimits::built_in(), Instant::now());
        let mut spent = 0;
        for call in 0..=500_u64 {
            let now = start + Duration::from_millis(call * 20);
            spent += u32::from(budget.try_spend(&values, now)) + u32::from(budget.try_spend(&values, now));
        }
        assert_eq!(spent, 10 + 10, "500 calls in ten seconds, two retries wanted for each");
    }

    #[test]
    fn a_destination_that_fails_in_part_gets_its_ratio_more() {
        for (ratio, wanted) in [(0.2, 10 + 200), (0.1, 10 + 100), (1.0, 10 + 1000), (1.0 / 3.0, 10 + 333)] {
            let (budget, values, now) = (RetryBudget::new(), values(ratio, 0), Instant::now());
            let mut spent = spend_all(&budget, &values, now);
            for _ in 0..1000 {
                budget.earn();
                spent += spend_all(&budget, &values, now);
            }
            assert_eq!(spent, wanted, "ratio {ratio}");
        }
    }

    #[test]
    fn ten_tokens_are_all_that_it_holds() {
        let (budget, values, start) = (RetryBudget::new(), values(0.5, 100), Instant::now());
        for _ in 0..10_000 {
            budget.earn();
        }
        assert_eq!(spend_all(&budget, &values, start), 10);
        assert_eq!(spend_all(&budget, &values, start + Duration::from_secs(86_400 * 365)), 10);
        assert_eq!(spend_all(&budget, &values, start), 0, "a clock that is behind earns nothing");
    }

    #[test]
    fn a_refused_retry_costs_nothing_and_half_a_token_buys_none() {
        let (budget, values, start) = (RetryBudget::new(), values(0.2, 1), Instant::now());
        spend_all(&budget, &values, start);
        for millis in [0, 300, 600, 999] {
            assert!(!budget.try_spend(&values, start + Duration::from_millis(millis)), "after {millis}ms");
        }
        assert!(budget.try_spend(&values, start + Duration::from_secs(1)));
        assert_eq!(budget.filled(&values, start + Duration::from_millis(1_500)).tokens, TOKEN / 2);
    }

    #[test]
    fn changed_values_hold_at_once_and_refill_nothing() {
        let (budget, now) = (RetryBudget::new(), Instant::now());
        assert_eq!(spend_all(&budget, &values(0.2, 1), now), 10);
        assert_eq!(spend_all(&budget, &values(1.0, 1_000_000), now), 0);
        budget.earn();
        assert_eq!(spend_all(&budget, &values(1.0, 0), now), 1);
    }

    #[test]
    fn workers_together_spend_no_more_than_there_is() {
        let (budget, values, now) = (RetryBudget::new(), values(0.25, 0), Instant::now());
        assert_eq!(spend_all(&budget, &values, now), 10);
        let work = || {
            let mut spent = 0;
            for _ in 0..4_000 {
                budget.earn();
                spent += u32::from(budget.try_spend(&values, now));
            }
            spent
        };
        let spent: u32 = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(work)).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        assert_eq!(spent + spend_all(&budget, &values, now), 4_000);
    }
}
