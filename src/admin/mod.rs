//! The admin server: status, metrics, probes and policy of the process, and one command (`POST /drain`).
//!
//! | path | what |
//! |---|---|
//! | `/` | the status page |
//! | `/status` | the figures of the status page as JSON |
//! | `/live`, `/ready` | probes |
//! | `/metrics` | Prometheus text or OpenMetrics |
//! | `/policy` | the policy in force |
//! | `/drain` | starts the drain |
//!
//! The server runs on its own thread, so that a busy data path does not block the probes and a large scrape does not
//! delay a request. Its data comes from [`ProcessView`], which the composition root implements, and from the telemetry.

mod pages;
mod server;
mod status;

pub use server::{AdminServer, spawn};
pub use status::{ListenerView, PolicyError, State, StatusView};

/// The process as the admin server sees it.
pub trait ProcessView: Send + Sync + 'static {
    /// `Ok` if the process is ready for traffic, else the reasons why not, one sentence each.
    fn ready(&self) -> Result<(), Vec<String>>;
    /// The policy in force as a JSON document, with its hash, load time and the last load error.
    fn policy_json(&self) -> String;
    /// Starts the drain and returns at once; later calls have no effect.
    fn begin_drain(&self);
    /// The data of the status page that is not in the metrics.
    fn status(&self) -> StatusView;
}

#[cfg(test)]
mod tests;
