//! Maximum body size: how long the body of a request may be.
//!
//! The form in YAML, its check, the checked value, and the decision over an announced length. A body without
//! `Content-Length` is counted while it passes (`net::flow`).

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::U64Deserializer;
use serde::de::{self, Deserialize, Deserializer, IntoDeserializer, Visitor};

use super::rule::{Row, RowContext, Rule};
use super::size::{self, Size};
use crate::problems::{Cursor, InvalidValue, Sourced};

/// 1 byte to 4095 MiB.
type Bytes = Size<1, 4_293_918_720>;

/// `maxBodySize:` of `defaults`, a destination or a route: a size, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaxBodySizeSpec(Option<u32>);

/// The rule.
#[derive(Debug)]
pub struct MaxBodySize;

impl Rule for MaxBodySize {
    type Spec = MaxBodySizeSpec;

    /// Bytes; `None` without a limit, which is the default.
    type Value = Sourced<Option<u32>>;

    const BUILT_IN: Self::Value = Sourced::built_in(None);

    fn check(spec: &Self::Spec, _: &Self::Value, at: &Cursor<'_>) -> Self::Value {
        at.set(spec.0)
    }

    fn rows(limit: &Self::Value, _: &RowContext) -> Vec<Row> {
        vec![Row::whole(limit.value.map_or_else(|| "none".into(), size::format), &limit.origin)]
    }
}

impl MaxBodySize {
    /// Whether a body of an announced length (`Content-Length`, RFC 9110, 8.6) is longer than `limit`. A length that is
    /// not a number is refused elsewhere.
    pub fn is_exceeded(limit: u32, content_length: Option<&[u8]>) -> bool {
        let announced = content_length.and_then(|value| std::str::from_utf8(value).ok()?.parse::<u64>().ok());
        announced.is_some_and(|announced| announced > u64::from(limit))
    }
}

impl<'de> Deserialize<'de> for MaxBodySizeSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MaxBodySizeVisitor;
        impl Visitor<'_> for MaxBodySizeVisitor {
            type Value = MaxBodySizeSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size like `10MiB`, or `off`")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Self::Value, E> {
                let bytes: U64Deserializer<E> = bytes.into_deserializer();
                Bytes::deserialize(bytes).map(|size| MaxBodySizeSpec(Some(size.0)))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                if text == "off" {
                    return Ok(MaxBodySizeSpec(None));
                }
                Bytes::deserialize(text.into_deserializer()).map(|size| MaxBodySizeSpec(Some(size.0)))
            }

            fn visit_bool<E: de::Error>(self, is_on: bool) -> Result<Self::Value, E> {
                // YAML 1.1 tools write `off` as `false`.
                if !is_on {
                    return Ok(MaxBodySizeSpec(None));
                }
                let hint = "write a size like `10MiB`, or `off`";
                Err(E::custom(InvalidValue::new("`true` is not a size", hint)))
            }
        }
        deserializer.deserialize_any(MaxBodySizeVisitor)
    }
}

impl JsonSchema for MaxBodySizeSpec {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "MaxBodySize".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let size = generator.subschema_for::<Bytes>();
        json_schema!({ "anyOf": [{ "const": "off" }, { "const": false }, size] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problems::Origin;
    use crate::rules::tests::checked;

    fn check(yaml: &str) -> Sourced<Option<u32>> {
        let (value, problems) =
            checked(yaml, |spec: &MaxBodySizeSpec, at| MaxBodySize::check(spec, &MaxBodySize::BUILT_IN, at));
        assert!(problems.is_empty(), "{problems:?}");
        value
    }

    #[test]
    fn a_size_or_off_is_read_with_its_line() {
        for (yaml, bytes) in [("10MiB", Some(10 << 20)), ("1", Some(1)), ("off", None), ("false", None)] {
            let value = check(yaml);
            assert_eq!(value.value, bytes, "{yaml}");
            assert_ne!(value.origin, Origin::BuiltIn, "{yaml}");
        }
    }

    #[test]
    fn anything_else_is_refused_with_what_to_write() {
        for (yaml, hint) in [
            ("0", "write 1 to 4095MiB"),
            ("5000MiB", "write 1 to 4095MiB"),
            ("10MB", "`64KiB`"),
            ("true", "or `off`"),
            ("none", "`64KiB`"),
        ] {
            let error = serde_yaml::from_str::<MaxBodySizeSpec>(yaml).unwrap_err().to_string();
            assert!(error.contains(hint), "{yaml}: {error}");
        }
    }

    #[test]
    fn an_announced_length_is_compared_with_the_limit() {
        let table: [(Option<&[u8]>, bool); 5] = [
            (None, false),
            (Some(b"10"), false),
            (Some(b"11"), true),
            (Some(b"18446744073709551615"), true),
            (Some(b"ten"), false),
        ];
        for (length, is_exceeded) in table {
            assert_eq!(MaxBodySize::is_exceeded(10, length), is_exceeded, "{length:?}");
        }
    }
}
