//! Level 2: the rules, one file each: the shape in YAML, its check, the checked value, the decision, the tests.
//!
//! A rule knows plain values and the `now` it is given: no socket, no HTTP server, no clock, no metric.

pub mod circuit_breaker;
pub mod count;
pub mod deadline;
pub mod duration;
pub mod ejection;
pub mod faults;
pub mod inflight;
pub mod limits;
pub mod mode;
mod number;
pub mod proxy_status;
pub mod rate_limit;
pub mod ratio;
pub mod retry;
pub mod retry_history;
pub mod size;
pub mod timeouts;
pub mod toggle;
pub mod trace;

#[cfg(test)]
mod tests;
