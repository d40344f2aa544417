//! Level 2: the rules, one file each: the shape in YAML, its check, the checked value, the decision, the tests.
//!
//! A rule knows plain values and the `now` it is given: no socket, no HTTP server, no clock, no metric.

pub mod breaker;
pub mod circuit_breaker;
pub mod duration;
pub mod ejection;
pub mod gate;
pub mod limits;
pub mod switch;
pub mod timeouts;
