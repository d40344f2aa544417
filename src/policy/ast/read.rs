//! Reads specs from a policy's tree and reports all their mistakes at once.
//!
//! serde stops at the first mistake, so reading is a loop: each refused part is reported and marked in the tree, and
//! the spec is read again without it, until it is complete. Each round marks a part, so the loop ends.

use std::cell::Cell;
use std::fmt;

use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use super::{Entry, List, Node, Value};
use crate::problems::{Cursor, InvalidValue, near_miss};

/// Upper bound of rounds and of mistakes reported per file.
const ROUNDS: usize = 200;

impl Node {
    /// Reads a spec and reports everything that it refuses. `None` if the file has too many mistakes.
    pub(in crate::policy) fn read<T: DeserializeOwned>(&self, at: &Cursor<'_>) -> Option<T> {
        let before = at.reported();
        for _ in 0..ROUNDS {
            if at.reported() >= before + ROUNDS {
                break;
            }
            match T::deserialize(Reader { node: self, at }) {
                Ok(spec) => return Some(spec),
                Err(ReadError::Reported) => {}
                // The root has no parent that could report for it, and nothing is left without it.
                Err(error) => {
                    error.report(self, at);
                    return None;
                }
            }
        }
        at.give_up();
        None
    }

    fn found(&self) -> String {
        match &self.value {
            Value::Null => "nothing".into(),
            Value::Bool(value) => format!("`{value}`"),
            Value::Unsigned(value) => format!("the number {value}"),
            Value::Signed(value) => format!("the number {value}"),
            Value::Float(_, written) => format!("the number {written}"),
            Value::Text(text) => format!("`{text}`"),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "a mapping".into(),
        }
    }
}

/// Why a round of reading ended early.
#[derive(Debug)]
enum ReadError {
    /// Not reported yet: the nearest entry or element reports it.
    InvalidValue(InvalidValue),
    /// The same, with what was expected instead of the node.
    Unexpected(String),
    Reported,
}

impl ReadError {
    /// Reports an error of a node. False if it is reported already.
    fn report(self, node: &Node, at: &Cursor<'_>) -> bool {
        let fault = match self {
            Self::InvalidValue(fault) => fault,
            Self::Unexpected(expected) => {
                InvalidValue { message: format!("expected {expected}, found {}", node.found()), hint: None }
            }
            Self::Reported => return false,
        };
        at.report_fault(fault);
        true
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidValue(fault) => fault.fmt(f),
            Self::Unexpected(expected) => write!(f, "expected {expected}"),
            Self::Reported => f.write_str("reported"),
        }
    }
}

impl std::error::Error for ReadError {}

impl de::Error for ReadError {
    /// Splits the text of [`InvalidValue`]: the message, then the hint on a line of its own.
    fn custom<T: fmt::Display>(text: T) -> Self {
        let text = text.to_string();
        let (message, hint) = text.split_once('\n').map_or((&*text, None), |(m, h)| (m, Some(h.to_owned())));
        Self::InvalidValue(InvalidValue { message: message.to_owned(), hint })
    }

    /// The node itself describes best what was found.
    fn invalid_type(_: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::Unexpected(expected.to_string())
    }

    fn invalid_value(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn unknown_variant(variant: &str, allowed: &'static [&'static str]) -> Self {
        Self::InvalidValue(InvalidValue::new(format!("unknown value `{variant}`"), meant(variant, allowed)))
    }
}

fn meant(word: &str, allowed: &[&str]) -> String {
    near_miss(word, allowed.iter().copied())
        .map_or_else(|| format!("allowed here: {}", allowed.join(", ")), |near| format!("did you mean `{near}`?"))
}

/// A node as a serde deserializer, with a cursor at the node.
#[derive(Clone, Copy)]
struct Reader<'n, 'c> {
    node: &'n Node,
    at: &'c Cursor<'c>,
}

impl Reader<'_, '_> {
    fn refuse(&self, expected: &str, hint: Option<String>) -> ReadError {
        ReadError::InvalidValue(InvalidValue {
            message: format!("expected {expected}, found {}", self.node.found()),
            hint,
        })
    }

    /// Hint for a single value in the place of a list: a list of the value, if it can be an element.
    fn as_list<'de, V: Visitor<'de>>(self, visitor: V) -> Option<String> {
        let (written, is_none) = match &self.node.value {
            Value::Text(text) => (in_brackets(text), matches!(text.as_str(), "off" | "none" | "no")),
            Value::Bool(value) => (value.to_string(), !value),
            Value::Unsigned(number) => (number.to_string(), false),
            // A mapping would report its own mistakes as if it were an element.
            Value::Null | Value::Signed(_) | Value::Float(..) | Value::List(_) | Value::Map(_) => return None,
        };
        match visitor.visit_seq(Alone(Some(self))) {
            Ok(_) => Some(format!("write `[{written}]`")),
            Err(ReadError::Unexpected(_)) if is_none => Some("write `[]`".into()),
            Err(ReadError::Unexpected(element)) => Some(format!("write a list, each entry of it {element}")),
            Err(ReadError::InvalidValue(fault)) => fault.hint,
            Err(ReadError::Reported) => None,
        }
    }
}

/// A text as an element between brackets: in quotes if YAML could read it as another type.
fn in_brackets(text: &str) -> String {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ':');
    let is_plain = text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(is_word);
    let is_other = text.parse::<f64>().is_ok()
        || text.ends_with(':')
        || ["0x", "0o"].iter().any(|radix| text.starts_with(radix))
        || ["true", "false", "null", "yes", "no", "on", "off", "y", "n"].contains(&&*text.to_ascii_lowercase());
    if is_plain && !is_other { text.to_owned() } else { serde_json::Value::from(text).to_string() }
}

/// A value as the only element of a list.
struct Alone<'n, 'c>(Option<Reader<'n, 'c>>);

impl<'de> SeqAccess<'de> for Alone<'_, '_> {
    type Error = ReadError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, ReadError> {
        self.0.take().map(|reader| seed.deserialize(reader)).transpose()
    }
}

impl<'de> Deserializer<'de> for Reader<'_, '_> {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Unsigned(value) => visitor.visit_u64(*value),
            Value::Signed(value) => visitor.visit_i64(*value),
            Value::Float(value, _) => visitor.visit_f64(*value),
            Value::Text(text) => visitor.visit_str(text),
            Value::List(list) => visitor.visit_seq(Items { list, next: 0, at: self.at }),
            Value::Map(entries) => visitor.visit_map(Fields { entries: entries.iter(), value: None, at: self.at }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::Text(text) => visitor.visit_str(text),
            Value::List(_) | Value::Map(_) => Err(self.refuse("text", None)),
            _ => Err(self.refuse("text", Some("put it in quotes".into()))),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::List(_) => self.deserialize_any(visitor),
            _ => Err(self.refuse("a list", self.as_list(visitor))),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::Bool(value) => visitor.visit_bool(*value),
            _ => Err(self.refuse("true or false", Some("write `true` or `false`, without quotes".into()))),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::Map(entries) => {
                refuse_keys(entries, self.at, None)?;
                self.deserialize_any(visitor)
            }
            _ => Err(self.refuse("a mapping", None)),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::Map(entries) => refuse_keys(entries, self.at, Some(fields))?,
            // A derived struct would accept a list as its fields in order.
            Value::List(_) => return Err(de::Error::invalid_type(de::Unexpected::Seq, &visitor)),
            _ => {}
        }
        self.deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::Text(text) => visitor.visit_enum(text.as_str().into_deserializer()),
            // Helm and YAML 1.1 tools turn a bare `off` into `false`.
            Value::Bool(false) if variants.contains(&"off") => visitor.visit_enum("off".into_deserializer()),
            Value::Bool(true) if variants.contains(&"off") => Err(de::Error::unknown_variant("true", variants)),
            _ => Err(self.refuse(&format!("one of {}", variants.join(", ")), None)),
        }
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct
        identifier ignored_any
    }
}

/// Reports all duplicate keys, keys without a value and keys that are not in `fields`, at once: they hide no other
/// mistake.
fn refuse_keys(entries: &[Entry], at: &Cursor<'_>, fields: Option<&[&str]>) -> Result<(), ReadError> {
    let mut reported = 0;
    for entry in entries.iter().filter(|entry| !entry.refused.get()) {
        // A file of another format need not have each of its lines reported.
        if reported == ROUNDS {
            break;
        }
        let key = &entry.key;
        let fault = if let Some(fields) = fields.filter(|fields| !fields.contains(&key.as_str())) {
            let hint = match key.as_str() {
                "<<" => "merge keys are not read: write the fields out, or use an alias for a whole value".into(),
                _ => meant(key, fields),
            };
            InvalidValue::new(format!("unknown field `{key}`"), hint)
        } else if let Some(line) = entry.first {
            InvalidValue::new(format!("`{key}` appears twice, first in line {line}"), "remove one of the two")
        } else if entry.node.is_empty() {
            InvalidValue::new(format!("`{key}` has no value"), "give it a value, or remove the line")
        } else {
            continue;
        };
        at.found(Some(key), entry.found()).report_key(fault);
        entry.refused.set(true);
        reported += 1;
    }
    if reported > 0 { Err(ReadError::Reported) } else { Ok(()) }
}

/// Reports the error of one entry or element as its own, and marks it as refused.
fn settle<T>(result: Result<T, ReadError>, node: &Node, at: &Cursor<'_>, refused: &Cell<bool>) -> Result<T, ReadError> {
    result.map_err(|error| {
        if error.report(node, at) {
            refused.set(true);
        }
        ReadError::Reported
    })
}

struct Items<'n, 'c> {
    list: &'n List,
    next: usize,
    at: &'c Cursor<'c>,
}

impl<'de> SeqAccess<'de> for Items<'_, '_> {
    type Error = ReadError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, ReadError> {
        let mut others = self.list.items.iter().enumerate().skip(self.next);
        let Some((index, item)) = others.find(|(_, item)| !item.refused.get()) else { return Ok(None) };
        self.next = index + 1;
        let at = self.at.found(None, item.found(index));
        let result = if item.node.is_empty() {
            let fault = InvalidValue::new("a list element has no value", "give it a value, or remove it");
            Err(ReadError::InvalidValue(fault))
        } else {
            seed.deserialize(Reader { node: &item.node, at: &at })
        };
        let result = settle(result, &item.node, &at, &item.refused).map(Some);
        self.list.some_refused.set(self.list.some_refused.get() || item.refused.get());
        result
    }
}

struct Fields<'n, 'c> {
    entries: std::slice::Iter<'n, Entry>,
    value: Option<&'n Entry>,
    at: &'c Cursor<'c>,
}

impl<'de> MapAccess<'de> for Fields<'_, '_> {
    type Error = ReadError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, ReadError> {
        let Some(entry) = self.entries.find(|entry| !entry.refused.get()) else { return Ok(None) };
        self.value = Some(entry);
        seed.deserialize(entry.key.as_str().into_deserializer()).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, ReadError> {
        let Some(entry) = self.value.take() else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        let at = self.at.found(Some(&entry.key), entry.found());
        let result = seed.deserialize(Reader { node: &entry.node, at: &at });
        settle(result, &entry.node, &at, &entry.refused)
    }
}
