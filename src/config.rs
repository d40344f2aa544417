//! The settings of the process, from flags and environment. Read once, by the command line; only `app` sees them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Where the admin door is unless told otherwise.
pub const ADMIN: &str = "127.0.0.1:15000";

/// What a process is started with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The policy's file, or directory of files, to be followed; none where nothing is to be followed.
    pub policy: Option<Followed>,
    /// Who we are if the policy does not say so.
    pub service: String,
    /// Where the admin door is.
    pub admin: SocketAddr,
    /// Worker threads, at least one.
    pub workers: usize,
    /// How long calls in flight may take to finish once nothing new is accepted.
    pub grace: Duration,
    /// How long callers are still accepted after SIGTERM.
    pub drain_delay: Duration,
}

/// A policy on the disk whose changes are taken up.
#[derive(Debug, Clone)]
pub struct Followed {
    /// The file, or the directory of files.
    pub path: PathBuf,
    /// What it looked like just before it was read, so that no change after that is missed.
    pub fingerprint: u64,
}

/// As many workers as the process may use processors: the cgroup's limit, else the machine's, at least one.
pub fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// True if the user wants no colours (no-color.org).
pub fn no_colour() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}
