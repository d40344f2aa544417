//! Limits: how many calls a destination gets at once, how many wait, and for how long.
//!
//! The shape, the check and the checked value; the gate that keeps the count is a file of its own.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::duration::Span;
use crate::problems::{At, Fault, Set};

/// The largest count that a policy may name.
const MOST: u32 = 1_000_000;

/// A count in a document: a whole number from `LEAST` to a million.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count<const LEAST: u32>(pub u32);

/// `limits:` of `defaults` or of a destination.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping of limits")]
pub struct LimitsSpec {
    /// Calls in flight at once, over all workers. Default 1024.
    pub in_flight: Option<Count<1>>,
    /// Calls that may wait for a place; 0 refuses at once. Default 128.
    pub queue: Option<Count<0>>,
    /// How long a call may wait for a place. Default 100ms.
    pub queue_timeout: Option<Span>,
}

/// The limits of a destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Calls in flight at once, over all workers; at least 1.
    pub in_flight: Set<u32>,
    /// Calls that may wait for a place.
    pub queue: Set<u32>,
    /// How long a call may wait for a place.
    pub queue_timeout: Set<Duration>,
}

impl Limits {
    /// What holds where no policy says otherwise.
    pub const fn built_in() -> Self {
        Self {
            in_flight: Set::built_in(1024),
            queue: Set::built_in(128),
            queue_timeout: Set::built_in(Duration::from_millis(100)),
        }
    }
}

impl LimitsSpec {
    /// Lays this layer over another.
    pub fn check(&self, base: &Limits, at: &At<'_>) -> Limits {
        Limits {
            in_flight: self.in_flight.map_or_else(|| base.in_flight.clone(), |n| at.key("inFlight").set(n.0)),
            queue: self.queue.map_or_else(|| base.queue.clone(), |n| at.key("queue").set(n.0)),
            queue_timeout: self
                .queue_timeout
                .map_or_else(|| base.queue_timeout.clone(), |span| at.key("queueTimeout").set(span.0)),
        }
    }
}

impl<'de, const LEAST: u32> Deserialize<'de> for Count<LEAST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read<const LEAST: u32>;
        impl<const LEAST: u32> Visitor<'_> for Read<LEAST> {
            type Value = Count<LEAST>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a whole number from {LEAST} to {MOST}")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Count<LEAST>, E> {
                match u32::try_from(number) {
                    Ok(number) if (LEAST..=MOST).contains(&number) => Ok(Count(number)),
                    _ => {
                        let message = format!("{number} is out of range");
                        Err(E::custom(Fault::new(message, format!("write a whole number from {LEAST} to {MOST}"))))
                    }
                }
            }
        }
        deserializer.deserialize_any(Read::<LEAST>)
    }
}

impl<const LEAST: u32> JsonSchema for Count<LEAST> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Count{LEAST}").into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer", "minimum": LEAST, "maximum": MOST })
    }
}
