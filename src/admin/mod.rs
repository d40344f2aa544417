//! The admin door: what the process shows about itself, and the one thing that it can be told (`POST /drain`).
//!
//! | path | what |
//! |---|---|
//! | `/` | the status page |
//! | `/status` | its figures, as JSON |
//! | `/live`, `/ready` | probes |
//! | `/metrics` | Prometheus text or OpenMetrics |
//! | `/policy` | the policy in force |
//! | `/drain` | begins the drain |
//!
//! It runs on a thread of its own, so that a busy data path cannot silence the probes and a large scrape cannot delay a
//! request. What it shows comes from [`ProcessView`], which the composition root implements, and from the telemetry.

mod pages;
mod server;
mod status;

pub use server::{AdminServer, spawn};
pub use status::{ListenerView, PolicyError, State, StatusView};

/// What the door shows and what it can set off.
pub trait ProcessView: Send + Sync + 'static {
    /// Whether traffic may be sent here; otherwise the reasons, one sentence each.
    fn ready(&self) -> Result<(), Vec<String>>;
    /// The policy in force as a JSON document, with its hash, when it was loaded and the last error.
    fn policy_json(&self) -> String;
    /// Begins the drain and returns at once; later calls change nothing.
    fn begin_drain(&self);
    /// What the status page shows besides the metrics.
    fn status(&self) -> StatusView;
}

#[cfg(test)]
mod tests;
