//! A value that can be switched off: the word `off`, or a mapping of its fields, with the same words for all rules.
//!
//! A mapping always means "on", even if it is empty and the layer below says `off`. The deserializer is asked for a
//! struct, so that it knows the keys, and has to visit with whatever the document contains.

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
    /// The word `off`, or `false`, which YAML 1.1 tools write for it.
    Off,
    /// A mapping of fields.
    On(T),
}

/// Keys and hints for the deserializer, so that it can report all unknown keys at once.
pub trait ToggleKeys {
    /// All keys in YAML; a bare number is taken for the value of the first.
    const KEYS: &'static [&'static str];

    /// What to write to switch it on, after "write `off`, or".
    const ON: &'static str = "a mapping of changed fields; `{}` switches it on without changes";
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

/// Whether a mapping of this field alone would be accepted.
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

/// Adds `false` to the schema of an enum with the word `off`: both are read as off.
pub fn allow_false(schema: &mut Schema) {
    if let Some(Value::Array(words)) = schema.get_mut("oneOf") {
        words.push(json!({ "const": false, "description": "The same as off; YAML 1.1 tools write it." }));
    }
}
