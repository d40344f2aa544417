//! Names and help texts of all metrics, and the sets of handles that other modules hold.
//!
//! `docs/metrics.md` lists the same names; a test compares both lists.

use super::instruments::{Counter, Family, Gauge, Instruments};

const fn family(name: &'static str, help: &'static str) -> Family {
    Family { name, help }
}

pub(super) const REQUESTS: Family = family("hopguard_requests_total", "Exchanges that ended, by outcome");
pub(super) const DURATION: Family = family(
    "hopguard_request_duration_seconds",
    "Time from the end of the request head to the last byte of the response",
);
pub(super) const FIRST_BYTE: Family = family(
    "hopguard_time_to_first_byte_seconds",
    "Time from the end of the request head to the end of the response head",
);
pub(super) const CONNECT: Family = family(
    "hopguard_connect_duration_seconds",
    "Time to open an upstream connection, for exchanges that opened one or failed to",
);
pub(super) const QUEUE: Family = family(
    "hopguard_queue_duration_seconds",
    "Time in the queue of the concurrency limit, for exchanges that were queued",
);
pub(super) const OVERHEAD: Family = family(
    "hopguard_overhead_seconds",
    "Time to first byte without queue, connect, upstream and retry backoff: the time that hopguard itself took",
);

pub(super) const IN_FLIGHT: Family =
    family("hopguard_in_flight_requests", "Exchanges that hold a permit of the destination's concurrency limit");
pub(super) const QUEUED: Family =
    family("hopguard_queued_requests", "Exchanges in the queue of the destination's concurrency limit");
pub(super) const POOL_OPEN: Family =
    family("hopguard_pool_open_connections", "Open upstream connections, in use and idle");
pub(super) const POOL_IDLE: Family = family("hopguard_pool_idle_connections", "Idle upstream connections in the pool");
const POOL_PENDING: Family = family("hopguard_pool_pending_connections", "Upstream connections that are being opened");
const POOL_WAITING: Family = family("hopguard_pool_waiting_requests", "Exchanges that wait for an upstream connection");
const CONNECTS: Family = family("hopguard_pool_connects_total", "Upstream connections opened");
const CONNECT_FAILURES: Family =
    family("hopguard_pool_connect_failures_total", "Upstream connections that could not be opened");
const CLOSES: Family = family("hopguard_pool_closes_total", "Upstream connections closed, by either side");
const EARLY_CLOSES: Family = family(
    "hopguard_pool_early_closes_total",
    "Upstream connections that hopguard closed although they could have taken another request, by the reason",
);

pub(super) const RETRIES: Family = family("hopguard_retries_total", "Retries, by the reason for the retry");
pub(super) const RETRIES_WITHHELD: Family =
    family("hopguard_retries_withheld_total", "Failed requests that were not retried, by the reason");
pub(super) const BREAKER_STATE: Family = family(
    "hopguard_circuit_breaker_state",
    "State of the circuit breaker: 0 closed, 1 half-open, 2 open; absent until its first change",
);
pub(super) const BREAKER_CHANGES: Family =
    family("hopguard_circuit_breaker_changes_total", "State changes of the circuit breaker, by the new state");
pub(super) const EJECTED: Family =
    family("hopguard_ejected_endpoints", "Endpoints that are ejected from load balancing now");
pub(super) const EJECTIONS: Family = family(
    "hopguard_ejections_total",
    "Endpoints ejected, probed, returned to load balancing, or kept although they fail because they are the last",
);
pub(super) const DRY_RUN: Family =
    family("hopguard_dry_run_total", "Calls on which a rule in dry run would have acted, by rule");
pub(super) const FAULTS: Family = family("hopguard_faults_total", "Faults injected, by the name of the fault");
pub(super) const CORRELATIONS: Family =
    family("hopguard_correlations_total", "Outbound calls, by the result of their correlation with a parent request");

const LISTENER_CONNECTIONS: Family = family("hopguard_listener_connections_total", "Downstream connections accepted");
const LISTENER_OPEN: Family = family("hopguard_listener_open_connections", "Open downstream connections");
const LISTENER_MAX_STREAMS: Family = family(
    "hopguard_listener_max_streams_reached_total",
    "Times that a downstream HTTP/2 connection reached maxStreams, so that further calls wait in the caller",
);
pub(super) const LISTENER_AT_MAX_STREAMS: Family = family(
    "hopguard_listener_connections_at_max_streams",
    "Downstream HTTP/2 connections that have maxStreams streams now",
);

const RELOADS: Family =
    family("hopguard_policy_reloads_total", "Policy loads, the one at the start included, by result");
const CERTIFICATES: Family =
    family("hopguard_certificate_reloads_total", "Reloads of changed certificate, key and CA files, by result");
const WORKERS: Family = family("hopguard_workers", "Worker threads");
const WAKE_BATCHES: Family = family(
    "hopguard_worker_wake_batches_total",
    "Short sleeps of busy workers before they poll, to handle more events per wake-up",
);
const DRAINING: Family = family("hopguard_draining", "1 from the start of the drain, else 0");
const ACCESS_LOG_DROPPED: Family = family(
    "hopguard_access_log_dropped_total",
    "Access log lines dropped because the reader of standard output was too slow",
);
const ACCESS_LOG_WRITE_ERRORS: Family =
    family("hopguard_access_log_write_errors_total", "Access log writes that failed with a system error");

pub(super) const LOG_DROPPED: Family = family(
    "hopguard_log_dropped_total",
    "Lines of the program's own log dropped because the reader of standard error was too slow",
);
pub(super) const HOPS_OVERFLOWED: Family = family(
    "hopguard_hops_overflowed_total",
    "Registrations of hops beyond the table's bound, which count under the label value other",
);
pub(super) const BUILD: Family = family("hopguard_build_info", "Version of hopguard; always 1");
pub(super) const POLICY: Family = family("hopguard_policy_info", "Hash of the policy in force; always 1");
pub(super) const POLICY_LOADED: Family =
    family("hopguard_policy_loaded_timestamp_seconds", "Unix time at which the policy in force was loaded");
pub(super) const POLICY_LOAD_DURATION: Family =
    family("hopguard_policy_load_duration_seconds", "Time to read and compile the policy in force");
pub(super) const MEMORY: Family = family("process_resident_memory_bytes", "Resident memory size in bytes");
pub(super) const CPU: Family = family("process_cpu_seconds_total", "User and system CPU time spent in seconds");
pub(super) const OPEN_FDS: Family = family("process_open_fds", "Number of open file descriptors");
pub(super) const STARTED: Family =
    family("process_start_time_seconds", "Unix time at which the process started, in seconds");

/// All families that a metrics page can show.
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
    POOL_PENDING,
    POOL_WAITING,
    CONNECTS,
    CONNECT_FAILURES,
    CLOSES,
    EARLY_CLOSES,
    RETRIES,
    RETRIES_WITHHELD,
    BREAKER_STATE,
    BREAKER_CHANGES,
    EJECTED,
    EJECTIONS,
    DRY_RUN,
    FAULTS,
    CORRELATIONS,
    LISTENER_CONNECTIONS,
    LISTENER_OPEN,
    LISTENER_MAX_STREAMS,
    LISTENER_AT_MAX_STREAMS,
    RELOADS,
    CERTIFICATES,
    WORKERS,
    WAKE_BATCHES,
    DRAINING,
    ACCESS_LOG_DROPPED,
    ACCESS_LOG_WRITE_ERRORS,
    LOG_DROPPED,
    HOPS_OVERFLOWED,
    BUILD,
    POLICY,
    POLICY_LOADED,
    POLICY_LOAD_DURATION,
    MEMORY,
    CPU,
    OPEN_FDS,
    STARTED,
];

/// The gauges and counters of one destination on one worker. Resolve once and keep; clones are cheap.
#[derive(Clone, Debug)]
pub struct DestinationMetrics {
    /// Exchanges that hold a permit.
    pub in_flight: Gauge,
    /// Exchanges in the queue for a permit.
    pub queued: Gauge,
    /// Open upstream connections, in use and idle.
    pub open: Gauge,
    /// Idle upstream connections.
    pub idle: Gauge,
    /// Upstream connections that are being opened.
    pub pending: Gauge,
    /// Exchanges that wait for a connection.
    pub waiting: Gauge,
    /// Upstream connections opened.
    pub connects: Counter,
    /// Upstream connections that failed to open.
    pub connect_failures: Counter,
    /// Upstream connections closed, by either side.
    pub closes: Counter,
    /// Those that hopguard closed early.
    pub early_closes: EarlyCloses,
}

/// Upstream connections that hopguard closed although they could have taken another request.
#[derive(Clone, Debug)]
pub struct EarlyCloses {
    /// Another connection of the same age has ended.
    pub stale: Counter,
    /// `connections.maxAge`.
    pub max_age: Counter,
    /// `connections.maxRequests`.
    pub max_requests: Counter,
    /// The upstream closes connections after about so many requests.
    pub learned: Counter,
    /// Before the app, once the drain has begun.
    pub draining: Counter,
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
            pending: gauge(POOL_PENDING),
            waiting: gauge(POOL_WAITING),
            connects: counter(CONNECTS),
            connect_failures: counter(CONNECT_FAILURES),
            closes: counter(CLOSES),
            early_closes: EarlyCloses::of_worker(instruments, destination, worker),
        }
    }
}

impl EarlyCloses {
    fn of_worker(instruments: &Instruments, destination: &str, worker: u32) -> Self {
        let counter = |reason: &str| {
            let labels = vec![("destination", destination.to_owned()), ("reason", reason.to_owned())];
            instruments.counter(EARLY_CLOSES, labels, Some(worker))
        };
        Self {
            stale: counter("stale"),
            max_age: counter("max_age"),
            max_requests: counter("max_requests"),
            learned: counter("learned_requests"),
            draining: counter("draining"),
        }
    }
}

/// The counters and gauges of one listener on one worker.
#[derive(Clone, Debug)]
pub struct ListenerMetrics {
    /// Connections accepted.
    pub accepted: Counter,
    /// Connections open now.
    pub open: Gauge,
    /// Times that an HTTP/2 connection reached its limit of streams.
    pub max_streams_reached: Counter,
    /// HTTP/2 connections that are at their limit of streams now.
    pub at_max_streams: Gauge,
}

impl ListenerMetrics {
    pub(super) fn of_worker(instruments: &Instruments, listener: &str, worker: u32) -> Self {
        let labels = || vec![("listener", listener.to_owned())];
        Self {
            accepted: instruments.counter(LISTENER_CONNECTIONS, labels(), Some(worker)),
            open: instruments.gauge(LISTENER_OPEN, labels(), Some(worker)),
            max_streams_reached: instruments.counter(LISTENER_MAX_STREAMS, labels(), Some(worker)),
            at_max_streams: instruments.gauge(LISTENER_AT_MAX_STREAMS, labels(), Some(worker)),
        }
    }
}

/// Counters and gauges of the process.
#[derive(Clone, Debug)]
pub struct ProcessMetrics {
    /// Policy loads that succeeded.
    pub reloads_ok: Counter,
    /// Policy loads that failed; the previous policy stayed in force.
    pub reloads_failed: Counter,
    /// Reloads of changed certificate files that succeeded.
    pub certificates_ok: Counter,
    /// Reloads in which a changed file could not be used; the previous certificate stayed in use.
    pub certificates_failed: Counter,
    /// Worker threads.
    pub workers: Gauge,
    /// Sleeps for wake batching, of all workers.
    pub wake_batches: Counter,
    /// 1 from the start of the drain, else 0.
    pub draining: Gauge,
    /// Access log lines dropped.
    pub(super) access_log_dropped: Counter,
    /// Access log writes that failed.
    pub(super) access_log_write_errors: Counter,
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
            access_log_dropped: instruments.counter(ACCESS_LOG_DROPPED, Vec::new(), None),
            access_log_write_errors: instruments.counter(ACCESS_LOG_WRITE_ERRORS, Vec::new(), None),
        }
    }
}
