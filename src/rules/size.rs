//! Sizes in a policy: bytes as a number, or `64KiB`, `1MiB`.
//!
//! The range is part of the type, so a size out of range is refused when it is read. Powers of 1024 only: `64KB` is
//! refused, because it is 64000 to one reader and 65536 to another.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, Visitor};

use crate::problems::InvalidValue;

/// A size in a document, in bytes: from `LEAST` to `MOST`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size<const LEAST: u32, const MOST: u32>(pub u32);

/// The shortest form in a policy: `0`, `100`, `64KiB`, `1MiB`.
pub fn format(bytes: u32) -> String {
    const KIB: u32 = 1 << 10;
    const MIB: u32 = 1 << 20;
    match bytes {
        1.. if bytes.is_multiple_of(MIB) => format!("{}MiB", bytes / MIB),
        1.. if bytes.is_multiple_of(KIB) => format!("{}KiB", bytes / KIB),
        _ => bytes.to_string(),
    }
}

/// The number of bytes, without a check of the range.
pub(super) fn parse(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
    let unit = match unit {
        "" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

impl<'de, const LEAST: u32, const MOST: u32> Deserialize<'de> for Size<LEAST, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor<const LEAST: u32, const MOST: u32>;
        impl<const LEAST: u32, const MOST: u32> Visitor<'_> for SizeVisitor<LEAST, MOST> {
            type Value = Size<LEAST, MOST>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size like `64KiB`")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Self::Value, E> {
                match u32::try_from(bytes) {
                    Ok(bytes) if (LEAST..=MOST).contains(&bytes) => Ok(Size(bytes)),
                    _ => {
                        let hint = format!("write {} to {}", format(LEAST), format(MOST));
                        Err(E::custom(InvalidValue::new(format!("{bytes} bytes is out of range"), hint)))
                    }
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                let Some(bytes) = parse(text) else {
                    let hint = "write a whole number of bytes, or one with KiB or MiB, like `64KiB`";
                    return Err(E::custom(InvalidValue::new(format!("`{text}` is not a size"), hint)));
                };
                self.visit_u64(bytes)
            }
        }
        deserializer.deserialize_any(SizeVisitor::<LEAST, MOST>)
    }
}

impl<const LEAST: u32, const MOST: u32> JsonSchema for Size<LEAST, MOST> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Size{LEAST}To{MOST}").into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "integer", "minimum": LEAST, "maximum": MOST },
                { "type": "string", "pattern": "^[0-9]+(KiB|MiB)?$" },
            ],
            "examples": ["64KiB", 65_536],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Example = Size<0, 2_097_152>;

    #[test]
    fn a_formatted_size_is_read_back() {
        for (bytes, text) in [(0, "0"), (100, "100"), (1024, "1KiB"), (65_536, "64KiB"), (1 << 20, "1MiB")] {
            assert_eq!(format(bytes), text);
            assert_eq!(parse(text), Some(u64::from(bytes)));
        }
    }

    #[test]
    fn a_refused_size_comes_with_a_hint() {
        let table = [
            (r#""64KB""#, "like `64KiB`"),
            (r#""""#, "like `64KiB`"),
            (r#""99999999999999999999""#, "like `64KiB`"),
            (r#""3MiB""#, "write 0 to 2MiB"),
            ("4294967296", "write 0 to 2MiB"),
        ];
        for (text, hint) in table {
            let error = serde_json::from_str::<Example>(text).expect_err(text).to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
        assert_eq!(serde_json::from_str::<Example>("0").unwrap(), Size(0));
    }
}
