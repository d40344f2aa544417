//! Level 2: the rules, one file each: the shape in YAML, its check, the checked value, the decision, the tests.
//!
//! A rule knows plain values and the `now` it is given: no socket, no HTTP server, no clock, no metric.

pub mod budget;
pub mod duration;
pub mod gate;
pub mod limits;
pub mod ratio;
pub mod retry;
pub mod size;
pub mod timeouts;
