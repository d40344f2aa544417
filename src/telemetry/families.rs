//! The names of all metrics in one place, and the typed sets of handles that the parts of the proxy hold.
//!
//! `docs/metrics.md` lists the same names; a test compares the two.

use super::instruments::{Counter, Family, Gauge, Instruments};

const fn family(name: &'static str, help: &'static str) -> Family {
    Family { name, help }
}

pub(super) const REQUESTS: Family = family("hopguard_requests_total", "Exchanges that ended, by outcome");
pub(super) const DURATION: Family =
    family("hopguard_request_duration_seconds", "From the head of the request to the last byte of the answer");
pub(super) const FIRST_BYTE: Family =
    family("hopguard_time_to_first_byte_seconds", "From the head of the request to the head of the answer");
pub(super) const CONNECT: Family =
    family("hopguard_connect_duration_seconds", "Opening a connection to the upstream, where one was opened");
pub(super) const QUEUE: Family =
    family("hopguard_queue_duration_seconds", "Waiting for a free place of the destination, where there was a wait");
pub(super) const OVERHEAD: Family =
    family("hopguard_overhead_seconds", "Time to first byte without queue, connect and the wait for the upstream");

pub(super) const IN_FLIGHT: Family =
    family("hopguard_in_flight_requests", "Exchanges that have a place of the destination");
pub(super) const QUEUED: Family =
    family("hopguard_queued_requests", "Exchanges that wait for a place of the destination");
pub(super) const POOL_OPEN: Family =
    family("hopguard_pool_open_connections", "Open connections to the upstream, busy and idle");
pub(super) const POOL_IDLE: Family =
    family("hopguard_pool_idle_connections", "Open connections to the upstream that wait for use");
const CONNECTS: Family = family("hopguard_pool_connects_total", "Connections to the upstream that were opened");
const CONNECT_FAILURES: Family =
    family("hopguard_pool_connect_failures_total", "Connections to the upstream that could not be opened");
const CLOSES: Family =
    family("hopguard_pool_closes_total", "Connections to the upstream that were closed, by either side");

pub(super) const RETRIES: Family =
    family("hopguard_retries_total", "Requests that went out once more, and because of what");
pub(super) const RETRIES_WITHHELD: Family =
    family("hopguard_retries_withheld_total", "Failed requests that did not go out once more, and why");
pub(super) const BREAKER_STATE: Family =
    family("hopguard_circuit_breaker_state", "0 closed, 1 half-open, 2 open; absent until the first change");
pub(super) const BREAKER_CHANGES: Family =
    family("hopguard_circuit_breaker_changes_total", "Changes of the circuit breaker's state, by the new state");
pub(super) const EJECTED: Family = family("hopguard_ejected_endpoints", "Endpoints that are out now");
pub(super) const EJECTIONS: Family =
    family("hopguard_ejections_total", "Endpoints taken out, brought back, or kept only because they were the last");
pub(super) const DRY_RUN: Family = family("hopguard_would_act_total", "Calls on which a rule in warn would have acted");
pub(super) const FAULTS: Family = family("hopguard_faults_total", "Faults that were injected");
pub(super) const DEADLINE_JOINS: Family = family(
    "hopguard_deadline_joins_total",
    "Outbound calls, by how they were joined with the inbound request behind them",
);

const ACCEPTED: Family = family("hopguard_listener_connections_total", "Connections that callers opened");
const OPEN: Family = family("hopguard_listener_open_connections", "Connections of callers that are open");

const RELOADS: Family = family("hopguard_policy_reloads_total", "Attempts to load the policy, the first one included");
const CERTIFICATES: Family =
    family("hopguard_certificate_reloads_total", "Times that changed certificates and authorities were read again");
const WORKERS: Family = family("hopguard_workers", "Worker threads");
const WAKE_BATCHES: Family =
    family("hopguard_worker_naps_total", "Naps that workers took to do more at once when they woke up");
const DRAINING: Family = family("hopguard_draining", "1 from the start of the drain on, else 0");
const LINES_DROPPED: Family =
    family("hopguard_access_log_dropped_total", "Access log lines thrown away because the reader was too slow");
const LINES_FAILED: Family =
    family("hopguard_access_log_write_errors_total", "Access log writes that the system refused");

pub(super) const LOG_DROPPED: Family =
    family("hopguard_log_dropped_total", "Lines of the program's own log thrown away because the reader was too slow");
pub(super) const TURNED_AWAY: Family =
    family("hopguard_hops_turned_away_total", "Hops counted under the label value other because the table is full");
pub(super) const BUILD: Family = family("hopguard_build_info", "Always 1; the labels say what is running");
pub(super) const POLICY: Family = family("hopguard_policy_info", "Always 1; the hash of the policy in force");
pub(super) const POLICY_LOADED: Family =
    family("hopguard_policy_loaded_timestamp_seconds", "When the policy in force was loaded");
pub(super) const POLICY_TOOK: Family =
    family("hopguard_policy_load_duration_seconds", "How long reading and compiling the policy in force took");
pub(super) const MEMORY: Family = family("process_resident_memory_bytes", "Resident memory");
pub(super) const CPU: Family = family("process_cpu_seconds_total", "User and system CPU time");
pub(super) const OPEN_FDS: Family = family("process_open_fds", "Open file descriptors");
pub(super) const STARTED: Family = family("process_start_time_seconds", "When the process started");

/// Every family that a page can show.
pub const ALL: &[Family] = &[
    REQUESTS,
    DURATION,
    FIRST_BYTE,
    CONNECT,
    QUEUE,
    OVERHEAD,
    IN_FLIGHT,
    QUEUED,
    POOL_OPEN,
    POOL_IDLE,
    CONNECTS,
    CONNECT_FAILURES,
    CLOSES,
    RETRIES,
    RETRIES_WITHHELD,
    BREAKER_STATE,
    BREAKER_CHANGES,
    EJECTED,
    EJECTIONS,
    DRY_RUN,
    FAULTS,
    DEADLINE_JOINS,
    ACCEPTED,
    OPEN,
    RELOADS,
    CERTIFICATES,
    WORKERS,
    WAKE_BATCHES,
    DRAINING,
    LINES_DROPPED,
    LINES_FAILED,
    LOG_DROPPED,
    TURNED_AWAY,
    BUILD,
    POLICY,
    POLICY_LOADED,
    POLICY_TOOK,
    MEMORY,
    CPU,
    OPEN_FDS,
    STARTED,
];

/// What is counted for one destination. Resolve once, keep, clone freely.
#[derive(Clone, Debug)]
pub struct DestinationMetrics {
    /// Exchanges that have a place.
    pub in_flight: Gauge,
    /// Exchanges that wait for one.
    pub queued: Gauge,
    /// Open upstream connections, busy and idle.
    pub open: Gauge,
    /// Open upstream connections without an exchange.
    pub idle: Gauge,
    /// Upstream connections opened.
    pub connects: Counter,
    /// Upstream connections that could not be opened.
    pub connect_failures: Counter,
    /// Upstream connections closed, by either side.
    pub closes: Counter,
}

impl DestinationMetrics {
    pub(super) fn of_worker(instruments: &Instruments, destination: &str, worker: u32) -> Self {
        let labels = || vec![("destination", destination.to_owned())];
        let gauge = |family| instruments.gauge(family, labels(), Some(worker));
        let counter = |family| instruments.counter(family, labels(), Some(worker));
        Self {
            in_flight: gauge(IN_FLIGHT),
            queued: gauge(QUEUED),
            open: gauge(POOL_OPEN),
            idle: gauge(POOL_IDLE),
            connects: counter(CONNECTS),
            connect_failures: counter(CONNECT_FAILURES),
            closes: counter(CLOSES),
        }
    }
}

/// What is counted for one listener of one worker.
#[derive(Clone, Debug)]
pub struct ListenerMetrics {
    /// Connections accepted.
    pub accepted: Counter,
    /// Connections open now.
    pub open: Gauge,
}

impl ListenerMetrics {
    pub(super) fn of_worker(instruments: &Instruments, listener: &str, worker: u32) -> Self {
        let labels = || vec![("listener", listener.to_owned())];
        Self {
            accepted: instruments.counter(ACCEPTED, labels(), Some(worker)),
            open: instruments.gauge(OPEN, labels(), Some(worker)),
        }
    }
}

/// What is counted once for the process.
#[derive(Clone, Debug)]
pub struct ProcessMetrics {
    /// Policies loaded.
    pub reloads_ok: Counter,
    /// Policies refused; the last good one stayed in force.
    pub reloads_failed: Counter,
    /// Changed certificates that came into use.
    pub certificates_ok: Counter,
    /// Changed certificates that could not be used; the old ones stayed.
    pub certificates_failed: Counter,
    /// Worker threads.
    pub workers: Gauge,
    /// Naps of all workers.
    pub wake_batches: Counter,
    /// 1 from the start of the drain on.
    pub draining: Gauge,
    pub(super) lines_dropped: Counter,
    pub(super) lines_failed: Counter,
}

impl ProcessMetrics {
    pub(super) fn new(instruments: &Instruments) -> Self {
        let reloads = |result: &str| instruments.counter(RELOADS, vec![("result", result.to_owned())], None);
        let certificates = |result: &str| instruments.counter(CERTIFICATES, vec![("result", result.to_owned())], None);
        Self {
            certificates_ok: certificates("ok"),
            certificates_failed: certificates("failed"),
            reloads_ok: reloads("ok"),
            reloads_failed: reloads("failed"),
            workers: instruments.gauge(WORKERS, Vec::new(), None),
            wake_batches: instruments.counter(WAKE_BATCHES, Vec::new(), None),
            draining: instruments.gauge(DRAINING, Vec::new(), None),
            lines_dropped: instruments.counter(LINES_DROPPED, Vec::new(), None),
            lines_failed: instruments.counter(LINES_FAILED, Vec::new(), None),
        }
    }
}
