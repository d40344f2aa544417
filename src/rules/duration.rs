//! Durations in a policy: `250ms`, `2s`, `1h30m` (GEP-2257), never zero.
//!
//! The format of the Gateway API, so that a value can be copied from an HTTPRoute. More lenient formats (blanks,
//! `PT5S`, bare numbers) are refused: a bare `2` means seconds to one reader and milliseconds to another.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, Visitor};

use crate::problems::InvalidValue;

const UNITS: [(&str, u64); 4] = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)];

/// A duration in a document; above zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DurationSpec(pub Duration);

/// Parses a duration: one to four times a number of at most five digits and a unit of `h`, `m`, `s` or `ms`.
///
/// # Errors
/// Anything else, and zero, with a hint what to write.
pub fn parse(text: &str) -> Result<Duration, InvalidValue> {
    let mut rest = text;
    let mut millis: u64 = 0;
    let mut terms = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let unit = UNITS.iter().find(|(unit, _)| tail.starts_with(unit));
        let (Some((unit, size)), Ok(number), true) = (unit, number.parse::<u64>(), digits <= 5) else {
            return Err(not_a_duration(text));
        };
        millis += number * size;
        terms += 1;
        rest = &tail[unit.len()..];
    }
    match (terms, millis) {
        (0, _) | (5.., _) => Err(not_a_duration(text)),
        (_, 0) => Err(InvalidValue::new(
            format!("`{text}` is zero"),
            "write a duration longer than zero; there is no value that means \"no timeout\"",
        )),
        _ => Ok(Duration::from_millis(millis)),
    }
}

/// The shortest form that [`parse`] accepts: `1h`, `1s500ms`.
pub fn format(duration: Duration) -> String {
    let mut millis = duration.as_millis();
    let mut out = String::new();
    for (unit, size) in [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
        if millis >= size {
            out.push_str(&format!("{}{unit}", millis / size));
            millis %= size;
        }
    }
    if out.is_empty() { "0ms".into() } else { out }
}

fn not_a_duration(text: &str) -> InvalidValue {
    let hint = if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        format!("write `{text}s` or `{text}ms`")
    } else if let Some(hint) = whole_units(text) {
        hint
    } else {
        "write whole numbers with h, m, s or ms, like `2s`, `250ms` or `1m30s`".to_owned()
    };
    InvalidValue::new(format!("`{text}` is not a duration"), hint)
}

/// Suggests `1s500ms` for `1.5s` and `2s` for `2 s`. `100us` gets no suggestion: it is below the resolution.
fn whole_units(text: &str) -> Option<String> {
    let squeezed: String = text.split_whitespace().collect::<String>().to_ascii_lowercase();
    if squeezed != text && parse(&squeezed).is_ok() {
        return Some(format!("write `{squeezed}`"));
    }
    let (number, unit) = squeezed.split_at(squeezed.find(|c: char| c.is_ascii_alphabetic())?);
    let (_, size) = UNITS.iter().find(|(name, _)| *name == unit)?;
    let (whole, fraction) = number.split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    let (whole, part) = (whole.parse::<u64>().ok()?, fraction.parse::<u64>().ok()?);
    let millis = whole * size + part * size / 10_u64.pow(u32::try_from(fraction.len()).ok()?);
    (millis > 0).then(|| format!("write `{}`", format(Duration::from_millis(millis))))
}

impl<'de> Deserialize<'de> for DurationSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DurationVisitor;
        impl Visitor<'_> for DurationVisitor {
            type Value = DurationSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration like `2s` or `250ms`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<DurationSpec, E> {
                parse(text).map(DurationSpec).map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<DurationSpec, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<DurationSpec, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<DurationSpec, E> {
                self.visit_str(&number.to_string())
            }
        }
        deserializer.deserialize_any(DurationVisitor)
    }
}

impl JsonSchema for DurationSpec {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A duration like 250ms, 2s or 1m30s (GEP-2257), longer than zero.",
            "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$",
            "not": { "pattern": "^(0+(h|m|s|ms))+$" },
            "examples": ["250ms", "2s", "1m30s"],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_gep_2257_allows_is_read() {
        let table = [
            ("2s", 2_000),
            ("250ms", 250),
            ("1h", 3_600_000),
            ("1m30s", 90_000),
            ("1h1m1s1ms", 3_661_001),
            ("00010s", 10_000),
            ("1s1s", 2_000),
            ("0h1ms", 1),
            ("99999h", 359_996_400_000),
        ];
        for (text, millis) in table {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused_with_what_to_write() {
        let table = [
            ("2", "`2s` or `2ms`"),
            ("", "like `2s`"),
            ("1.5s", "`1s500ms`"),
            ("0.25s", "`250ms`"),
            ("2 s", "`2s`"),
            ("2S", "`2s`"),
            ("100us", "like `2s`"),
            ("-1s", "like `2s`"),
            ("100000s", "like `2s`"),
            ("1s1s1s1s1s", "like `2s`"),
            ("PT5S", "like `2s`"),
            ("s", "like `2s`"),
            ("\u{664}s", "like `2s`"),
            ("0s", "longer than zero"),
            ("0h0m", "longer than zero"),
        ];
        for (text, hint) in table {
            let fault = parse(text).expect_err(text);
            assert!(fault.hint.as_deref().is_some_and(|h| h.contains(hint)), "{text}: {fault}");
        }
    }

    #[test]
    fn a_formatted_duration_is_read_back() {
        for millis in [1, 999, 1_000, 1_500, 60_000, 90_061, 3_600_000, 359_999_999_999] {
            let duration = Duration::from_millis(millis);
            assert_eq!(parse(&format(duration)), Ok(duration));
        }
    }
}
