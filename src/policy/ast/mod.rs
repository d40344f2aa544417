//! Syntax tree of a policy's text, with the position of every key and value.
//!
//! The only file that uses the YAML library. `read` makes specs of the tree; refused parts stay in the tree, marked, so
//! that a cursor still finds them and they are not reported as missing.

mod read;

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_yaml::options::{DuplicateKeyPolicy, MergeKeyPolicy};
use serde_yaml::{Location, Spanned};

use crate::problems::{ChildNode, DocumentNode, InvalidValue, Position};

/// One value of a document.
#[derive(Debug)]
pub(super) struct Node {
    place: Position,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    /// The number and its text: `5.0`, or more digits than a number holds.
    Float(f64, String),
    Text(String),
    List(List),
    Map(Vec<Entry>),
}

#[derive(Debug)]
struct List {
    items: Vec<Item>,
    /// While false, an index in the text is an index in the spec, so that long lists are quick to walk.
    some_refused: Cell<bool>,
}

#[derive(Debug)]
struct Item {
    node: Node,
    refused: Cell<bool>,
}

#[derive(Debug)]
struct Entry {
    key: String,
    key_place: Position,
    /// Line of the first entry with this key, for a duplicate.
    first: Option<u32>,
    node: Node,
    refused: Cell<bool>,
}

impl Item {
    fn found(&self, index: usize) -> ChildNode<'_> {
        ChildNode { key: None, index, spot: &self.node }
    }
}

impl Entry {
    fn found(&self) -> ChildNode<'_> {
        ChildNode { key: Some(&self.key_place), index: 0, spot: &self.node }
    }
}

/// Parses one document.
///
/// # Errors
/// Invalid YAML, a second document, or a document beyond the limits of depth and size, with the position.
pub(super) fn parse(text: &str) -> Result<Node, (InvalidValue, Position)> {
    let options = serde_yaml::options! {
        strict_booleans: true,
        with_snippet: false,
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: MergeKeyPolicy::AsOrdinary,
        // YAML 1.2 has no `1_000`: other readers take it for a text.
        underscored_numbers_as_strings: true,
        alias_limits: serde_yaml::alias_limits! { max_total_replayed_events: 100_000 },
        budget: serde_yaml::budget! { max_nodes: 500_000, max_aliases: 1_000, max_anchors: 1_000, max_depth: 32 },
    };
    let mut root: Node = serde_yaml::from_str_with_options(text, options).map_err(|error| {
        let place = error.location().map_or_else(Position::default, |at| pinned(text, place(&at)));
        (unreadable(&error), place)
    })?;
    root.keep_float_text(text);
    Ok(root)
}

fn unreadable(error: &serde_yaml::Error) -> InvalidValue {
    let error = error.without_snippet();
    if matches!(error, serde_yaml::Error::MultipleDocuments { .. }) {
        return InvalidValue::new("a second document begins here", "a file contains one policy: use a file for each");
    }
    let message = error.to_string();
    let first = message.lines().next().unwrap_or_default();
    let bare = first.split(" at line ").next().unwrap_or(first);
    if bare.starts_with("tabs disallowed") || bare.starts_with("tab cannot be used as indentation") {
        return InvalidValue::new("a tab is used for indentation", "replace the tab with spaces");
    }
    let hint = if bare.contains("tab") {
        "replace the tab with spaces"
    } else if bare.contains("anchor") {
        "an anchor (`&name`) must come before its aliases (`*name`); a text that begins with `*` or `&` needs quotes"
    } else {
        "look for a quote or bracket that is not closed, or a wrong indentation, near this position, \
         or a missing `:` after a key, here or in the line above"
    };
    InvalidValue::new(format!("not readable as YAML: {bare}"), hint)
}

/// A syntax error has only line and column.
fn pinned(text: &str, place: Position) -> Position {
    let above: usize = text.split_inclusive('\n').take(place.line.saturating_sub(1) as usize).map(str::len).sum();
    let before = text[above..].chars().take(place.column.saturating_sub(1) as usize).map(char::len_utf8).sum::<usize>();
    let start = above + before;
    Position { span: start..start + 1, ..place }
}

fn place(at: &Location) -> Position {
    let number = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    let start = number(at.span().byte_offset().unwrap_or_default());
    let end = start.saturating_add(number(at.span().byte_len().unwrap_or_default()));
    let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    Position { span: start..end, line: small(at.line()), column: small(at.column()) }
}

impl Node {
    /// Whether the document is empty.
    pub(super) fn is_empty(&self) -> bool {
        matches!(self.value, Value::Null)
    }

    /// Only the text has the spelling of a float.
    fn keep_float_text(&mut self, text: &str) {
        match &mut self.value {
            Value::Float(value, written) => {
                let there = text.get(self.place.span.clone()).filter(|there| there.parse() == Ok(*value));
                *written = there.map_or_else(|| value.to_string(), str::to_owned);
            }
            Value::List(list) => list.items.iter_mut().for_each(|item| item.node.keep_float_text(text)),
            Value::Map(entries) => entries.iter_mut().for_each(|entry| entry.node.keep_float_text(text)),
            Value::Null | Value::Bool(_) | Value::Unsigned(_) | Value::Signed(_) | Value::Text(_) => {}
        }
    }
}

impl DocumentNode for Node {
    fn entry(&self, key: &str) -> Option<ChildNode<'_>> {
        let Value::Map(entries) = &self.value else { return None };
        entries.iter().find(|entry| entry.key == key).map(Entry::found)
    }

    fn item(&self, index: usize) -> Option<ChildNode<'_>> {
        let Value::List(List { items, some_refused }) = &self.value else { return None };
        if !some_refused.get() {
            return items.get(index).map(|item| item.found(index));
        }
        let mut accepted = items.iter().enumerate().filter(|(_, item)| !item.refused.get());
        accepted.nth(index).map(|(index, item)| item.found(index))
    }

    fn size(&self) -> usize {
        match &self.value {
            Value::List(list) => list.items.len(),
            Value::Map(entries) => entries.len(),
            _ => 0,
        }
    }

    fn place(&self) -> &Position {
        &self.place
    }

    fn is_scalar(&self) -> bool {
        !matches!(self.value, Value::Null | Value::List(_) | Value::Map(_))
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        let (mut place, value) = (place(&spanned.defined), spanned.value);
        // The parser gives a list or a mapping the position of its start; it ends at the end of its last child.
        let last = match &value {
            Value::List(list) => list.items.last().map(|item| item.node.place.span.end),
            Value::Map(entries) => entries.last().map(|entry| entry.node.place.span.end.max(entry.key_place.span.end)),
            _ => None,
        };
        place.span.end = place.span.end.max(last.unwrap_or_default());
        Ok(Self { place, value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Grow)
    }
}

/// Builds a [`Value`] of any YAML value.
struct Grow;

impl<'de> Visitor<'de> for Grow {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value, a list or a mapping")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(u64::try_from(value).map_or(Value::Signed(value), Value::Unsigned))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value, String::new()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(node) = list.next_element()? {
            items.push(Item { node, refused: Cell::new(false) });
        }
        Ok(Value::List(List { items, some_refused: Cell::new(false) }))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        let mut lines: HashMap<String, u32> = HashMap::new();
        while let Some((key, node)) = map.next_entry::<Spanned<String>, Node>()? {
            let (key, key_place) = (key.value, place(&key.defined));
            let first = lines.get(&key).copied();
            if first.is_none() {
                lines.insert(key.clone(), key_place.line);
            }
            entries.push(Entry { key, key_place, first, node, refused: Cell::new(false) });
        }
        Ok(Value::Map(entries))
    }
}
