//! The policy: from YAML to a checked model, and the indexes that find a destination and a route in it.
//!
//! `load` reads files, `ast` parses them, `spec` is their shape, `check` turns the shapes into a [`model::Model`] or
//! reports everything that is wrong, `router` finds routes on the hot path, `explain` shows what holds for a call,
//! `schema` describes the shape to editors, `watch` says when to look again.

mod ast;
pub mod check;
pub mod explain;
pub mod load;
pub mod model;
pub mod router;
pub mod schema;
pub mod snapshot;
pub mod spec;
pub mod watch;
