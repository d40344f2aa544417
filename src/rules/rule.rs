//! What a rule with values tells about itself: its shape in YAML, what is built in, its check, and its rows.
//!
//! Layers stand over each other: built in, `defaults`, destination, route. A layer that says nothing has the values of
//! the layer below; which layers there are for a rule is written in the catalogue.

use std::fmt::Display;
use std::time::Duration;

use jiff::Timestamp;

use super::duration;
use crate::problems::{Cursor, Origin, Sourced};

/// A rule that has values, beside its mode.
pub trait Rule {
    /// What YAML says in one layer.
    type Spec;

    /// The checked values, each with its line. Equal when they mean the same, whatever the lines.
    type Value: Clone + PartialEq;

    /// What holds where no policy says otherwise.
    const BUILT_IN: Self::Value;

    /// Whether `/policy` shows the values at every route, also where they are those of the destination.
    const IS_SHOWN_EVERYWHERE: bool = false;

    /// Lays what a layer says over the layer below, and reports what is wrong with it.
    fn check(spec: &Self::Spec, below: &Self::Value, at: &Cursor<'_>) -> Self::Value;

    /// The same for a route, where that is not the same.
    fn check_route(spec: &Self::Spec, below: &Self::Value, at: &Cursor<'_>) -> Self::Value {
        Self::check(spec, below, at)
    }

    /// The effective values as `hopguard explain` and `/policy` show them, by their keys in YAML.
    fn rows(value: &Self::Value, seen: &RowContext) -> Vec<Row>;
}

/// For whom, and when, values are shown.
#[derive(Debug, Clone, Copy)]
pub struct RowContext {
    /// Faults have an end.
    pub now: Timestamp,
    /// Every listener that leads to the values stands before the app.
    pub is_inbound: bool,
}

/// One effective value. In an explanation it is one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// What it is: the key below the rule's own, like `connect`, or nothing for the rule as a whole.
    pub name: String,
    /// What holds.
    pub value: String,
    /// Who said so: `built in`, a line of a file, or nothing for what follows from other rows.
    pub origin: String,
    /// Nothing holds here, which `value` says in words; `null` in JSON.
    pub is_none: bool,
}

impl Row {
    /// A value in words.
    pub fn new(name: impl Into<String>, value: impl Into<String>, origin: &Origin) -> Self {
        Self { name: name.into(), value: value.into(), origin: origin.to_string(), is_none: false }
    }

    /// The rule as a whole: `off`, `none`.
    pub fn whole(value: impl Into<String>, origin: &Origin) -> Self {
        Self::new("", value, origin)
    }

    /// What follows from other rows.
    pub fn bare(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into(), origin: String::new(), is_none: false }
    }

    /// Nothing is built in here, and `value` says what holds instead.
    pub fn none(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { is_none: true, ..Self::new(name, value, &Origin::BuiltIn) }
    }

    /// A span of time.
    pub fn time(name: impl Into<String>, value: &Sourced<Duration>) -> Self {
        Self::new(name, duration::format(value.value), &value.origin)
    }

    /// A value that shows as in a policy.
    pub fn shown(name: impl Into<String>, value: &Sourced<impl Display>) -> Self {
        Self::new(name, value.value.to_string(), &value.origin)
    }

    /// The row with the key of its rule before its own name: `timeouts.connect`.
    #[must_use]
    pub fn below(self, key: &str) -> Self {
        let name = if self.name.is_empty() { key.to_owned() } else { format!("{key}.{}", self.name) };
        Self { name, ..self }
    }
}
