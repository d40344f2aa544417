//! The entries of `faults:` and their values, as serde reads them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::GrpcCode;
use crate::problems::InvalidValue;
use crate::rules::duration::DurationSpec;
use crate::rules::number::not_a_number;
use crate::rules::ratio::Ratio;
use crate::rules::size;

/// One of `faults:` of a destination or of a route: what fails on purpose, for which calls, and until when.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a fault with name, until and what it does"
)]
#[schemars(extend("required" = ["name", "until"], "anyOf" = [
    { "required": ["delay"] }, { "required": ["abort"] }, { "required": ["reset"] },
    { "required": ["cutAfter"] }, { "required": ["slowBody"] },
]))]
pub struct FaultSpec {
    /// Unique in its list; the label in metrics and logs. Required.
    pub name: Option<String>,
    /// Delay before anything else happens, as if the upstream were slow. Default: none.
    pub delay: Option<DurationSpec>,
    /// Response instead of the upstream's; the upstream gets no call. Default: none.
    pub abort: Option<AbortSpec>,
    /// The connection seems to close without a response; the upstream gets no call. Default false.
    pub reset: Option<bool>,
    /// The connection seems to close after this many bytes of the response body. Default: never.
    pub cut_after: Option<ByteLimit>,
    /// Limits the speed of the response body. Default: no limit.
    pub slow_body: Option<SlowBodySpec>,
    /// Share of the matching calls that meet the fault, drawn for each attempt. Default 1.0: all.
    pub share: Option<Ratio>,
    /// Only calls with all of these headers and exactly these values. Default: any call.
    pub headers: Option<BTreeMap<String, String>>,
    /// The fault ends at this time, like 2030-01-01T00:00:00Z. Required.
    pub until: Option<FaultUntil>,
}

/// `abort:` of a fault: either `status` or `grpc`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping with status or grpc")]
#[schemars(extend("oneOf" = [{ "required": ["status"] }, { "required": ["grpc"] }]))]
pub struct AbortSpec {
    /// An HTTP status, 200 to 599.
    pub status: Option<AbortStatus>,
    /// A gRPC status by its name, like unavailable.
    pub grpc: Option<GrpcCode>,
}

/// `slowBody:` of a fault.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping with bytesPerSecond")]
#[schemars(extend("required" = ["bytesPerSecond"]))]
pub struct SlowBodySpec {
    /// Bytes of the body per second, at least 1. Required.
    pub bytes_per_second: Option<ByteLimit>,
}

/// A number of bytes in a document: `500`, `1KiB`, `2MiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteLimit(pub u64);

/// An HTTP status in a document, 200 to 599.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AbortStatus(pub http::StatusCode);

/// A point in time in a document, in the format of RFC 3339.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultUntil(pub Timestamp);

impl FaultUntil {
    /// Parses `2030-01-01T00:00:00Z`, or an offset like `+01:00`. Other forms of ISO 8601 are refused: without an
    /// offset, the time depends on the machine.
    ///
    /// # Errors
    /// Anything else, with a hint what to write.
    pub fn parse(text: &str) -> Result<Self, InvalidValue> {
        if has_shape(text)
            && let Ok(time) = text.parse()
        {
            return Ok(Self(time));
        }
        if let Some(fault) = beyond(text) {
            return Err(fault);
        }
        // Similar forms: a date alone, a space instead of the T, no offset.
        let candidates = [format!("{text}T00:00:00Z"), text.replacen(' ', "T", 1), format!("{text}Z")];
        let both = format!("{}Z", candidates[1]);
        let near =
            candidates.into_iter().chain([both]).find(|near| has_shape(near) && near.parse::<Timestamp>().is_ok());
        let hint = match near {
            Some(near) => format!("write `{near}`"),
            None => "write date, time and offset, like `2030-01-01T00:00:00Z`".to_owned(),
        };
        Err(InvalidValue::new(format!("`{text}` is not a point in time"), hint))
    }
}

/// RFC 3339 times that a [`Timestamp`] cannot hold: fractions finer than nanoseconds, and the end of the year 9999.
fn beyond(text: &str) -> Option<InvalidValue> {
    if let Some(near) = nine_digits(text) {
        let message = format!("`{text}` has a fraction of more than nine digits");
        return FaultUntil::parse(&near).is_ok().then(|| InvalidValue::new(message, format!("write `{near}`")));
    }
    // The same date in another year shows whether the rest is a time.
    let is_time = text.strip_prefix("9999").is_some_and(|rest| FaultUntil::parse(&format!("2001{rest}")).is_ok());
    let message = || format!("`{text}` is beyond the latest possible time");
    is_time.then(|| InvalidValue::new(message(), "write `9999-12-30T22:00:00Z`, or an earlier time"))
}

/// The text with its fraction cut to nine digits, if the fraction is longer.
fn nine_digits(text: &str) -> Option<String> {
    let (head, tail) = text.split_once('.')?;
    let offset = tail.trim_start_matches(|c: char| c.is_ascii_digit());
    let fraction = tail.get(..9).filter(|_| tail.len() - offset.len() > 9)?;
    Some(format!("{head}.{fraction}{offset}"))
}

/// The shape of `date-time` in RFC 3339, section 5.6. The parser decides whether the date exists.
fn has_shape(text: &str) -> bool {
    let fits = |text: &str, shape: &str| {
        let same = |(byte, wanted): (u8, u8)| if wanted == b'0' { byte.is_ascii_digit() } else { byte == wanted };
        text.len() == shape.len() && text.bytes().zip(shape.bytes()).all(same)
    };
    let text = text.to_ascii_uppercase();
    let Some((head, tail)) = text.split_at_checked("0000-00-00T00:00:00".len()) else { return false };
    let offset = match tail.strip_prefix('.') {
        Some(fraction) => {
            let offset = fraction.trim_start_matches(|c: char| c.is_ascii_digit());
            // The resolution is nanoseconds.
            if !(1..=9).contains(&(fraction.len() - offset.len())) {
                return false;
            }
            offset
        }
        None => tail,
    };
    let is_offset = (fits(offset, "+00:00") || fits(offset, "-00:00")) && offset[1..] < *"24";
    fits(head, "0000-00-00T00:00:00") && (offset == "Z" || is_offset)
}

impl<'de> Deserialize<'de> for ByteLimit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FaultValueVisitor;
        impl Visitor<'_> for FaultValueVisitor {
            type Value = ByteLimit;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size like `1KiB`")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteLimit, E> {
                Ok(ByteLimit(bytes))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteLimit, E> {
                size::parse(text).map(ByteLimit).ok_or_else(|| {
                    let hint = "write a whole number of bytes, or one with KiB or MiB, like `1KiB`";
                    E::custom(InvalidValue::new(format!("`{text}` is not a size"), hint))
                })
            }
        }
        deserializer.deserialize_any(FaultValueVisitor)
    }
}

impl JsonSchema for ByteLimit {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "FaultSize".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "integer", "minimum": 0 },
                { "type": "string", "pattern": "^[0-9]+(KiB|MiB)?$" },
            ],
            "examples": ["1KiB", 1024],
        })
    }
}

impl<'de> Deserialize<'de> for AbortStatus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FaultValueVisitor;
        impl Visitor<'_> for FaultValueVisitor {
            type Value = AbortStatus;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an HTTP status from 200 to 599")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<AbortStatus, E> {
                let known = u16::try_from(number).ok().filter(|number| (200..=599).contains(number));
                known.and_then(|number| http::StatusCode::from_u16(number).ok()).map(AbortStatus).ok_or_else(|| {
                    E::custom(InvalidValue::new(
                        format!("{number} is out of range"),
                        "write a final HTTP status, 200 to 599",
                    ))
                })
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<AbortStatus, E> {
                let is_good = |text: &str| text.parse().is_ok_and(|number: u16| (200..=599).contains(&number));
                Err(E::custom(not_a_number(text, &self, is_good)))
            }
        }
        deserializer.deserialize_any(FaultValueVisitor)
    }
}

impl JsonSchema for AbortStatus {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "FaultStatus".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer", "minimum": 200, "maximum": 599 })
    }
}

impl<'de> Deserialize<'de> for GrpcCode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FaultValueVisitor;
        impl Visitor<'_> for FaultValueVisitor {
            type Value = GrpcCode;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a gRPC status, like `unavailable`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<GrpcCode, E> {
                GrpcCode::parse(text).map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<GrpcCode, E> {
                let name = usize::try_from(number).ok().and_then(|number| GrpcCode::NAMES.get(number));
                let hint = name.map_or_else(|| "write its name, like `unavailable`".into(), |n| format!("write `{n}`"));
                Err(E::custom(InvalidValue::new(
                    format!("a gRPC status is written by its name, not as {number}"),
                    hint,
                )))
            }
        }
        deserializer.deserialize_any(FaultValueVisitor)
    }
}

impl JsonSchema for GrpcCode {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "GrpcCode".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "enum": GrpcCode::NAMES })
    }
}

impl<'de> Deserialize<'de> for FaultUntil {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FaultValueVisitor;
        impl Visitor<'_> for FaultValueVisitor {
            type Value = FaultUntil;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a point in time like `2030-01-01T00:00:00Z`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<FaultUntil, E> {
                FaultUntil::parse(text).map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<FaultUntil, E> {
                self.visit_str(&number.to_string())
            }
        }
        deserializer.deserialize_any(FaultValueVisitor)
    }
}

impl JsonSchema for FaultUntil {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Until".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}([.][0-9]{1,9})?([Zz]|[+-]([01][0-9]|2[0-3]):[0-9]{2})$",
            "examples": ["2030-01-01T00:00:00Z", "2030-01-01T00:00:00+01:00"],
        })
    }
}
