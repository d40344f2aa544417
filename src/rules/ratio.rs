//! Ratios in a policy: a number above 0, at most 1.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, Visitor};

use super::number::not_a_number;
use crate::problems::InvalidValue;

/// A ratio in a document: above 0, at most 1, never NaN.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio(pub f64);

impl<'de> Deserialize<'de> for Ratio {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RatioVisitor;
        impl Visitor<'_> for RatioVisitor {
            type Value = Ratio;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number above 0 and up to 1")
            }

            fn visit_f64<E: de::Error>(self, ratio: f64) -> Result<Ratio, E> {
                if ratio > 0.0 && ratio <= 1.0 {
                    return Ok(Ratio(ratio));
                }
                let hint = "write a number above 0 and up to 1, like 0.01 for one in a hundred";
                Err(E::custom(InvalidValue::new(format!("{ratio} is out of range"), hint)))
            }

            fn visit_u64<E: de::Error>(self, whole: u64) -> Result<Ratio, E> {
                // The exact value does not matter above 1: it is refused.
                self.visit_f64(f64::from(u16::try_from(whole).unwrap_or(u16::MAX)))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Ratio, E> {
                let is_good = |text: &str| text.parse().is_ok_and(|ratio: f64| ratio > 0.0 && ratio <= 1.0);
                Err(E::custom(not_a_number(text, &self, is_good)))
            }
        }
        deserializer.deserialize_any(RatioVisitor)
    }
}

impl JsonSchema for Ratio {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Ratio".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "number", "exclusiveMinimum": 0, "maximum": 1 })
    }
}
