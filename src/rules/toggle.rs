//! A rule that can be switched off: the word `off`, or a mapping of its fields. All such rules read the same words.
//!
//! A mapping always means "on", also an empty one and also over a layer that says `off`. A reader of policies is asked
//! for a struct, so that it names unknown keys, and has to offer whatever it finds there.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Value, json};

use crate::problems::InvalidValue;

/// `off`, or a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toggle<T> {
    /// The word `off`; `false` as well, because YAML 1.1 tools turn the word into that.
    Off,
    /// A mapping of fields.
    On(T),
}

/// What a reader is told of a mapping, so that it can name all unknown keys at once and say what to write instead.
pub trait ToggleKeys {
    /// Each key as YAML writes it; the first is the one that a bare number would mean.
    const KEYS: &'static [&'static str];

    /// The mapping to write for it to be on, after "write `off`, or".
    const ON: &'static str = "a mapping of what shall differ; `{}` switches it on as it is";
}

impl<'de, T: Deserialize<'de> + ToggleKeys> Deserialize<'de> for Toggle<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ToggleVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de> + ToggleKeys> Visitor<'de> for ToggleVisitor<T> {
            type Value = Toggle<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`off` or a mapping")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Toggle<T>, E> {
                if word == "off" { Ok(Toggle::Off) } else { Err(E::custom(neither::<T>(word))) }
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Toggle<T>, E> {
                if value { Err(E::custom(neither::<T>("true"))) } else { Ok(Toggle::Off) }
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Toggle<T>, E> {
                Err(E::custom(neither::<T>(&number.to_string())))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Toggle<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Toggle::On)
            }
        }
        deserializer.deserialize_struct("", T::KEYS, ToggleVisitor(PhantomData))
    }
}

fn neither<'de, T: Deserialize<'de> + ToggleKeys>(word: &str) -> InvalidValue {
    let hint = match (word.to_ascii_lowercase().as_str(), T::KEYS) {
        ("off" | "of" | "false" | "no" | "none" | "never" | "disabled", _) => "write `off`".to_owned(),
        (number, [first, ..]) if fits::<T>(first, number) => format!("write `{{ {first}: {number} }}`"),
        _ => format!("write `off`, or {}", T::ON),
    };
    InvalidValue::new(format!("expected `off` or a mapping, found `{word}`"), hint)
}

/// Whether a mapping of this field alone would be taken.
fn fits<'de, T: Deserialize<'de>>(key: &str, number: &str) -> bool {
    number.parse().is_ok_and(|number: u32| T::deserialize(json!({ key: number })).is_ok())
}

impl<T: JsonSchema> JsonSchema for Toggle<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("{}OrOff", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "const": "off" }, { "const": false }, generator.subschema_for::<T>()] })
    }
}

/// Adds `false` to the schema of an enum of words, one of which is `off`: the reader takes the one for the other.
pub fn allow_false(schema: &mut Schema) {
    if let Some(Value::Array(words)) = schema.get_mut("oneOf") {
        words.push(json!({ "const": false, "description": "The same as off, which tools of YAML 1.1 write so." }));
    }
}
