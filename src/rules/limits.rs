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
use super::number::not_a_number;
use crate::problems::{At, Fault, Set};

/// The largest count that a policy may name.
const MOST: u32 = 1_000_000;

/// A count in a document: a whole number from `LEAST` to `LARGEST`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count<const LEAST: u32, const LARGEST: u32 = MOST>(pub u32);

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

impl<'de, const LEAST: u32, const LARGEST: u32> Deserialize<'de> for Count<LEAST, LARGEST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read<const LEAST: u32, const LARGEST: u32>;
        impl<const LEAST: u32, const LARGEST: u32> Read<LEAST, LARGEST> {
            fn refuse<E: de::Error>(&self, number: impl fmt::Display) -> E {
                let hint = format!("write a whole number from {LEAST} to {LARGEST}");
                E::custom(Fault::new(format!("{number} is out of range"), hint))
            }
        }
        impl<const LEAST: u32, const LARGEST: u32> Visitor<'_> for Read<LEAST, LARGEST> {
            type Value = Count<LEAST, LARGEST>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a whole number from {LEAST} to {LARGEST}")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Self::Value, E> {
                let count = u32::try_from(number).ok().filter(|count| (LEAST..=LARGEST).contains(count));
                count.map(Count).ok_or_else(|| self.refuse(number))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
                match u64::try_from(number) {
                    Ok(number) => self.visit_u64(number),
                    Err(_) => Err(self.refuse(number)),
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                let is_good = |text: &str| text.parse().is_ok_and(|count: u32| (LEAST..=LARGEST).contains(&count));
                Err(E::custom(not_a_number(text, &self, is_good)))
            }
        }
        deserializer.deserialize_any(Read::<LEAST, LARGEST>)
    }
}

impl<const LEAST: u32, const LARGEST: u32> JsonSchema for Count<LEAST, LARGEST> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Count{LEAST}To{LARGEST}").into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer", "minimum": LEAST, "maximum": LARGEST })
    }
}
