//! Concurrency limit: calls in flight to a destination, the queue for a permit, and the longest wait.
//!
//! The values of `limits`, their check and their rows; `concurrency_limit` keeps the count.

mod concurrency_limit;

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

pub use self::concurrency_limit::{ConcurrencyLimit, ConcurrencyPermit, QueueFull};
use crate::problems::{Cursor, Sourced};
use crate::rules::count::Count;
use crate::rules::duration::DurationSpec;
use crate::rules::rule::{Row, RowContext, Rule};

/// `limits:` of `defaults` or of a destination.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping of limits")]
pub struct LimitsSpec {
    /// Calls in flight, over all workers. Default 1024.
    pub in_flight: Option<Count<1>>,
    /// Calls that may wait for a permit; 0 refuses at once. Default 128.
    pub queue: Option<Count<0>>,
    /// Longest wait for a permit. Default 100ms.
    pub queue_timeout: Option<DurationSpec>,
}

/// Checked limits of a destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Calls in flight, over all workers; at least 1.
    pub in_flight: Sourced<u32>,
    /// Calls that may wait for a permit.
    pub queue: Sourced<u32>,
    /// Longest wait for a permit.
    pub queue_timeout: Sourced<Duration>,
}

impl Limits {
    /// The built-in values.
    pub const fn built_in() -> Self {
        Self {
            in_flight: Sourced::built_in(1024),
            queue: Sourced::built_in(128),
            queue_timeout: Sourced::built_in(Duration::from_millis(100)),
        }
    }
}

impl Rule for Limits {
    type Spec = LimitsSpec;
    type Value = Self;

    const BUILT_IN: Self = Self::built_in();

    fn check(spec: &LimitsSpec, below: &Self, at: &Cursor<'_>) -> Self {
        Self {
            in_flight: spec.in_flight.map_or_else(|| below.in_flight.clone(), |n| at.key("inFlight").set(n.0)),
            queue: spec.queue.map_or_else(|| below.queue.clone(), |n| at.key("queue").set(n.0)),
            queue_timeout: spec
                .queue_timeout
                .map_or_else(|| below.queue_timeout.clone(), |span| at.key("queueTimeout").set(span.0)),
        }
    }

    fn rows(limits: &Self, _: &RowContext) -> Vec<Row> {
        vec![
            Row::shown("inFlight", &limits.in_flight),
            Row::shown("queue", &limits.queue),
            Row::time("queueTimeout", &limits.queue_timeout),
        ]
    }
}
