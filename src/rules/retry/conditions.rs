//! Retry conditions: the failures that a policy retries, which are HTTP statuses, gRPC codes, a reset and the `perTry`
//! timeout.
//!
//! A bit set: small to copy and cheap to test.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, Visitor};

use crate::problems::{InvalidValue, near_miss};

/// gRPC codes that can mean a failure of the network or the server, rather than a response about the request.
const CODES: [(&str, u32); 8] = [
    ("unavailable", 14),
    ("cancelled", 1),
    ("unknown", 2),
    ("deadline_exceeded", 4),
    ("resource_exhausted", 8),
    ("aborted", 10),
    ("internal", 13),
    ("data_loss", 15),
];

const RESET: &str = "reset";
const TIMEOUT: &str = "timeout";

/// One of `on:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryCondition {
    /// An HTTP status, 400 to 599.
    Status(u16),
    /// A gRPC status code.
    Grpc(u32),
    /// The connection or stream was closed before the response.
    Reset,
    /// No response within `timeouts.perTry`.
    Timeout,
}

/// A set of conditions. Displays as a policy lists them: `502, 503, reset`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct RetryConditions([u64; 4]);

impl RetryCondition {
    /// Position of the bit; `None` for conditions that a policy cannot contain.
    const fn position(self) -> Option<usize> {
        match self {
            Self::Status(status @ 400..=599) => Some(status as usize - 400),
            Self::Grpc(code @ 0..=16) => Some(200 + code as usize),
            Self::Reset => Some(220),
            Self::Timeout => Some(221),
            Self::Status(_) | Self::Grpc(_) => None,
        }
    }

    /// All conditions with a word, in the order of display.
    fn words() -> impl Iterator<Item = (&'static str, Self)> {
        let codes = CODES.into_iter().map(|(word, code)| (word, Self::Grpc(code)));
        [(RESET, Self::Reset), (TIMEOUT, Self::Timeout)].into_iter().chain(codes)
    }

    fn parse(text: &str) -> Result<Self, InvalidValue> {
        if let Some((_, condition)) = Self::words().find(|(word, _)| *word == text) {
            return Ok(condition);
        }
        let hint = if text.parse::<u16>().is_ok() {
            format!("write `{text}` without quotes")
        } else if let Some(near) = near_miss(text, Self::words().map(|(word, _)| word)) {
            format!("did you mean `{near}`?")
        } else {
            let words: Vec<_> = Self::words().map(|(word, _)| word).collect();
            format!("allowed here: statuses from 400 to 599, {}", words.join(", "))
        };
        Err(InvalidValue::new(format!("unknown condition `{text}`"), hint))
    }
}

impl fmt::Display for RetryCondition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Self::Status(status) = self {
            return write!(f, "{status}");
        }
        let word = Self::words().find(|(_, condition)| condition == self);
        f.write_str(word.map_or("another gRPC code", |(word, _)| word))
    }
}

impl RetryConditions {
    /// The built-in conditions: 502, 503, 504, reset, timeout, unavailable.
    pub const fn built_in() -> Self {
        Self([0; 4])
            .with(RetryCondition::Status(502))
            .with(RetryCondition::Status(503))
            .with(RetryCondition::Status(504))
            .with(RetryCondition::Reset)
            .with(RetryCondition::Timeout)
            .with(RetryCondition::Grpc(14))
    }

    /// The set with one more condition; unchanged for a condition that a policy cannot contain.
    pub const fn with(mut self, condition: RetryCondition) -> Self {
        if let Some(position) = condition.position() {
            self.0[position / 64] |= 1 << (position % 64);
        }
        self
    }

    /// Whether the set contains a condition.
    pub const fn contains(&self, condition: RetryCondition) -> bool {
        match condition.position() {
            Some(position) => self.0[position / 64] & (1 << (position % 64)) != 0,
            None => false,
        }
    }
}

impl fmt::Display for RetryConditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = (400..600).map(RetryCondition::Status).chain(RetryCondition::words().map(|(_, condition)| condition));
        for (index, condition) in all.filter(|condition| self.contains(*condition)).enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{condition}")?;
        }
        Ok(())
    }
}

/// Maps a code that gRPC does not define to UNKNOWN, as gRPC clients do.
pub(super) const fn known(code: u32) -> u32 {
    if code > 16 { 2 } else { code }
}

impl<'de> Deserialize<'de> for RetryCondition {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RetryConditionsVisitor;
        impl Visitor<'_> for RetryConditionsVisitor {
            type Value = RetryCondition;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a condition like 503 or `reset`")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<RetryCondition, E> {
                match u16::try_from(number) {
                    Ok(status @ 400..=599) => Ok(RetryCondition::Status(status)),
                    _ => {
                        let message = format!("{number} is not a status that can be retried");
                        Err(E::custom(InvalidValue::new(message, "write a status from 400 to 599")))
                    }
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<RetryCondition, E> {
                RetryCondition::parse(text).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(RetryConditionsVisitor)
    }
}

impl JsonSchema for RetryCondition {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "RetryCondition".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let words: Vec<_> = Self::words().map(|(word, _)| word).collect();
        json_schema!({
            "anyOf": [{ "type": "integer", "minimum": 400, "maximum": 599 }, { "enum": words }],
        })
    }
}
