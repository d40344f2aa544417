//! The policy: from YAML to a checked model, and the tables that find destination and route of a request.
//!
//! `load` reads files, `ast` parses them, `spec` is their shape, `check` makes a [`model::Model`] of the shapes or
//! reports all problems, `snapshot` compiles the model for the data path, `router` finds routes on the hot path,
//! `explain` shows the effective values of a call, `schema` describes the shape to editors, `watch` notices changes of
//! the files.

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
