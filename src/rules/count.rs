//! A count in a policy: a whole number whose range is part of its type.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, Visitor};

use super::number::not_a_number;
use crate::problems::InvalidValue;

/// Upper bound of all counts.
const MOST: u32 = 1_000_000;

/// A count in a document: a whole number from `LEAST` to `LARGEST`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count<const LEAST: u32, const LARGEST: u32 = MOST>(pub u32);

impl<'de, const LEAST: u32, const LARGEST: u32> Deserialize<'de> for Count<LEAST, LARGEST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CountVisitor<const LEAST: u32, const LARGEST: u32>;
        impl<const LEAST: u32, const LARGEST: u32> CountVisitor<LEAST, LARGEST> {
            fn refuse<E: de::Error>(&self, number: impl fmt::Display) -> E {
                let hint = format!("write a whole number from {LEAST} to {LARGEST}");
                E::custom(InvalidValue::new(format!("{number} is out of range"), hint))
            }
        }
        impl<const LEAST: u32, const LARGEST: u32> Visitor<'_> for CountVisitor<LEAST, LARGEST> {
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
        deserializer.deserialize_any(CountVisitor::<LEAST, LARGEST>)
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
