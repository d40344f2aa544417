//! The settings of the process, from flags and environment. The command line reads them once; only `app` uses them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::upstream::resolver::ResolverEnvironment;

/// Default admin address.
pub const ADMIN: &str = "127.0.0.1:15000";

/// Settings of one process.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The policy path that is watched for changes; `None`: no path is watched.
    pub policy: Option<WatchedPath>,
    /// Service name for metrics and logs where the policy sets none.
    pub service: String,
    /// Admin address.
    pub admin: SocketAddr,
    /// Number of worker threads, at least 1.
    pub workers: usize,
    /// Maximum time for calls in flight to finish after the listeners have closed.
    pub grace: Duration,
    /// Time after SIGTERM during which the listeners still accept.
    pub drain_delay: Duration,
}

/// A policy path that is watched for changes.
#[derive(Debug, Clone)]
pub struct WatchedPath {
    /// The file, or the directory of files.
    pub path: PathBuf,
    /// Fingerprint of the files, taken just before they were read, so that no later change is missed.
    pub fingerprint: u64,
}

/// Default number of workers: the CPU limit of the cgroup, else the number of CPUs of the machine, at least 1.
pub fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// True if `NO_COLOR` is set and not empty (no-color.org).
pub fn no_colour() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// `LOCALDOMAIN` and `RES_OPTIONS`, which change the resolver's settings (resolv.conf(5)).
pub fn resolver_environment() -> ResolverEnvironment {
    let read = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    ResolverEnvironment { local_domain: read("LOCALDOMAIN"), options: read("RES_OPTIONS") }
}
