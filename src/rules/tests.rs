//! A document for the tests of the rules: finds every entry of its YAML; all positions are in line 1.

use std::cell::RefCell;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::problems::{ChildNode, Cursor, DocumentNode, Position, Problem, Problems};

/// Reads a spec from YAML and checks it. Returns the result, and each problem as `path: message | hint`.
pub(super) fn checked<S: DeserializeOwned, T>(
    yaml: &str,
    check: impl FnOnce(&S, &Cursor<'_>) -> T,
) -> (T, Vec<String>) {
    let spec: S = serde_yaml::from_str(yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"));
    let value: Value = serde_yaml::from_str(yaml).unwrap();
    let (file, node, problems) = ("p.yaml".into(), Node::of(&value), RefCell::new(Problems::default()));
    let result = check(&spec, &Cursor::root(&file, &node, &problems));
    let shown = |p: &Problem| format!("{}: {} | {}", p.path, p.message, p.hint.as_deref().unwrap_or_default());
    let problems = problems.borrow().iter().map(shown).collect();
    (result, problems)
}

#[derive(Debug)]
struct Node {
    place: Position,
    entries: Vec<(String, Node)>,
    items: Vec<Node>,
}

impl Node {
    fn of(value: &Value) -> Self {
        let entries = value.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), Self::of(value)));
        let items = value.as_array().into_iter().flatten().map(Self::of);
        let place = Position { span: 0..1, line: 1, column: 1 };
        Self { place, entries: entries.collect(), items: items.collect() }
    }
}

impl DocumentNode for Node {
    fn entry(&self, key: &str) -> Option<ChildNode<'_>> {
        let (_, spot) = self.entries.iter().find(|(name, _)| name == key)?;
        Some(ChildNode { key: Some(&self.place), index: 0, spot })
    }

    fn item(&self, index: usize) -> Option<ChildNode<'_>> {
        self.items.get(index).map(|spot| ChildNode { key: None, index, spot })
    }

    fn size(&self) -> usize {
        self.entries.len() + self.items.len()
    }

    fn place(&self) -> &Position {
        &self.place
    }

    fn is_scalar(&self) -> bool {
        self.size() == 0
    }
}
