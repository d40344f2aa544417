//! Interface of a rule with values: its shape in YAML, the built-in values, the check and the rows.
//!
//! Layers, the last one wins: built in, `defaults`, destination, route. A layer without an entry has the values of the
//! layer below. The catalogue says which layers a rule has.

use std::fmt::Display;
use std::time::Duration;

use jiff::Timestamp;

use super::duration;
use crate::problems::{Cursor, Origin, Sourced};

/// A rule with values, beside its mode.
pub trait Rule {
    /// The entry in one layer, as YAML has it.
    type Spec;

    /// The checked values, each with its line. Values with the same meaning are equal, whatever their lines.
    type Value: Clone + PartialEq;

    /// The built-in values.
    const BUILT_IN: Self::Value;

    /// Whether `/policy` shows the values at every route, even if they are those of the destination.
    const IS_SHOWN_EVERYWHERE: bool = false;

    /// Lays the entry of a layer over the values of the layer below, and reports its errors.
    fn check(spec: &Self::Spec, below: &Self::Value, at: &Cursor<'_>) -> Self::Value;

    /// The same for an entry of a route, if that has a check of its own.
    fn check_route(spec: &Self::Spec, below: &Self::Value, at: &Cursor<'_>) -> Self::Value {
        Self::check(spec, below, at)
    }

    /// The effective values as `hopguard explain` and `/policy` show them, by their keys in YAML.
    fn rows(value: &Self::Value, seen: &RowContext) -> Vec<Row>;
}

/// What the rows depend on beside the values.
#[derive(Debug, Clone, Copy)]
pub struct RowContext {
    /// Time by which faults are over or not.
    pub now: Timestamp,
    /// All listeners that lead to these values are in front of the app.
    pub is_inbound: bool,
}

/// One effective value; one line of an explanation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Key below that of the rule, like `connect`; empty for the rule as a whole.
    pub name: String,
    /// The value as text.
    pub value: String,
    /// `built in`, or file and line; empty if the row follows from others.
    pub origin: String,
    /// There is no value, and `value` is an explanation; `null` in JSON.
    pub is_none: bool,
}

impl Row {
    /// A value as text.
    pub fn new(name: impl Into<String>, value: impl Into<String>, origin: &Origin) -> Self {
        Self { name: name.into(), value: value.into(), origin: origin.to_string(), is_none: false }
    }

    /// The rule as a whole: `off`, `none`.
    pub fn whole(value: impl Into<String>, origin: &Origin) -> Self {
        Self::new("", value, origin)
    }

    /// A row that follows from other rows.
    pub fn bare(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into(), origin: String::new(), is_none: false }
    }

    /// No value; `value` explains what applies instead.
    pub fn none(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { is_none: true, ..Self::new(name, value, &Origin::BuiltIn) }
    }

    /// A duration.
    pub fn time(name: impl Into<String>, value: &Sourced<Duration>) -> Self {
        Self::new(name, duration::format(value.value), &value.origin)
    }

    /// A value that displays as in a policy.
    pub fn shown(name: impl Into<String>, value: &Sourced<impl Display>) -> Self {
        Self::new(name, value.value.to_string(), &value.origin)
    }

    /// Prefixes the name with the key of the rule: `timeouts.connect`.
    #[must_use]
    pub fn below(self, key: &str) -> Self {
        let name = if self.name.is_empty() { key.to_owned() } else { format!("{key}.{}", self.name) };
        Self { name, ..self }
    }
}
