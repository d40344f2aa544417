//! Level 2: the rules, one file each: the shape in YAML, its check, the checked value, the decision, the tests.
//!
//! A rule knows plain values and the `now` it is given: no socket, no HTTP server, no clock, no metric.

pub mod breaker;
pub mod budget;
pub mod circuit_breaker;
pub mod deadline;
pub mod duration;
pub mod ejection;
pub mod faults;
pub mod gate;
pub mod joined;
pub mod limits;
pub mod mark;
pub mod mode;
mod number;
pub mod rate_limit;
pub mod ratio;
pub mod retry;
pub mod size;
pub mod spent;
pub mod switch;
pub mod timeouts;
pub mod trace;

#[cfg(test)]
mod tests;
