//! The record of one exchange, and the metrics and log lines made from it.
//!
//! | file | what |
//! |---|---|
//! | `exchange` | the record of one exchange; on drop it becomes a metric and a log line |
//! | `record` | the values of one exchange, as plain data |
//! | `outcome` | the closed sets of outcomes and protocols |
//! | `hop` | label sets, registered once and referred to by number |
//! | `shard`, `histogram` | the metrics of one worker: one writer, no lock |
//! | `events` | counters and gauges of rule events: retries, state changes, faults, dry runs |
//! | `instruments`, `families` | counters and gauges outside exchanges, and the names of all metrics |
//! | `collect`, `openmetrics`, `host_process` | the metrics page |
//! | `summary` | figures per hop and per destination for the status page and the demo |
//! | `access_log`, `log_line` | one line per exchange |
//! | `log` | the program's own log |
//! | `writer` | the thread that writes log lines |
//!
//! Level 1: it takes plain values and knows no policy, no connection and no rule. On the path of a request it takes no
//! lock, looks up no label, formats nothing unless a line is written, and allocates nothing.

pub mod access_log;
mod collect;
mod events;
mod exchange;
pub mod families;
mod histogram;
mod hop;
mod host_process;
mod instruments;
pub mod log;
mod log_line;
mod openmetrics;
mod outcome;
mod record;
mod shard;
mod summary;
mod writer;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

pub use access_log::{AccessLog, AccessLogMode, AccessLogSettings, LineFormat, MemoryLines, Sink};
pub use events::RetryReason;
pub use exchange::Exchange;
pub use families::{DestinationMetrics, EarlyCloses, ListenerMetrics, ProcessMetrics};
pub use histogram::{Buckets, Histogram, LATENCY_BOUNDS, LatencyHistogram, OVERHEAD_BOUNDS, OverheadHistogram};
pub use hop::{DirectionLabel, HopId, HopLabels, Hops, MAX_HOPS};
pub use host_process::ProcessFigures;
pub use instruments::{Counter, Family, Gauge, GaugeGuard};
pub use openmetrics::PageFormat;
pub use outcome::{Outcome, Protocol};
pub use record::{Annotations, ClosedBy, ConnectionUse, RefusalRecord, RequestLine};
pub use shard::{Series, SeriesKey, SeriesSums, Shard};
pub use summary::{DestinationFigures, HopSummary};

use instruments::Instruments;
use shard::SharedSeries;

/// The policy in force, as the metrics show it.
#[derive(Clone, Debug)]
pub struct PolicyInfo {
    /// Hash of the policy's content.
    pub hash: String,
    /// When the policy came into force.
    pub loaded: Timestamp,
    /// Time to read and compile the policy.
    pub load_duration: Duration,
}

/// All metrics and the access log of a process. One per process (or per test), shared by all threads.
#[derive(Debug)]
pub struct Telemetry {
    /// The hops, registered when a policy is compiled.
    pub hops: Hops,
    /// Counters and gauges without labels of a hop, destination or listener.
    pub process: ProcessMetrics,
    /// The access log: one line per exchange.
    pub access_log: AccessLog,
    instruments: Instruments,
    shards: Mutex<Vec<Arc<SharedSeries>>>,
    policy: Mutex<Option<PolicyInfo>>,
    anchor: (Instant, Timestamp),
}

impl Telemetry {
    /// Empty metrics, and an access log that writes to `sink` in the default mode (`errors`, JSON).
    pub fn new(sink: Sink) -> Arc<Self> {
        let instruments = Instruments::default();
        let process = ProcessMetrics::new(&instruments);
        let access_log =
            AccessLog::new(sink, process.access_log_dropped.clone(), process.access_log_write_errors.clone());
        Arc::new(Self {
            hops: Hops::default(),
            process,
            access_log,
            instruments,
            shards: Mutex::default(),
            policy: Mutex::default(),
            anchor: (Instant::now(), Timestamp::now()),
        })
    }

    /// The shard of one worker. Call it once per worker, on the worker's thread; `worker` is the worker's number and
    /// keeps its cells apart from those of other workers.
    pub fn shard(self: &Arc<Self>, worker: u32) -> Rc<Shard> {
        let shared = Arc::new(SharedSeries::default());
        self.shards.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&shared));
        Shard::new(Arc::clone(self), worker, shared)
    }

    /// Counts a policy load that succeeded; the policy is in force from now on. `load_duration` is the time to read and
    /// compile it.
    pub fn policy_loaded(&self, hash: &str, load_duration: Duration) {
        self.process.reloads_ok.increment();
        let info = PolicyInfo { hash: hash.to_owned(), loaded: self.wall_time(Instant::now()), load_duration };
        *self.policy.lock().unwrap_or_else(PoisonError::into_inner) = Some(info);
    }

    /// The policy in force; `None` before the first load.
    pub fn policy(&self) -> Option<PolicyInfo> {
        self.policy.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts a policy load that failed; the previous policy stays in force.
    pub fn policy_refused(&self) {
        self.process.reloads_failed.increment();
    }

    /// Counts a reload of changed certificate files; `usable` is false if any of the files cannot be used.
    pub fn certificates_read(&self, usable: bool) {
        let counter = if usable { &self.process.certificates_ok } else { &self.process.certificates_failed };
        counter.increment();
    }

    /// The wall-clock time of an instant, computed from one pair of readings at the start, so that a step of the system
    /// clock does not reorder exchanges.
    pub fn wall_time(&self, at: Instant) -> Timestamp {
        let (instant, wall) = self.anchor;
        let after = jiff::SignedDuration::try_from(at.saturating_duration_since(instant)).unwrap_or_default();
        let before = jiff::SignedDuration::try_from(instant.saturating_duration_since(at)).unwrap_or_default();
        wall.checked_add(after).and_then(|time| time.checked_sub(before)).unwrap_or(wall)
    }

    /// Time since this telemetry was created.
    pub fn uptime(&self) -> Duration {
        self.anchor.0.elapsed()
    }

    /// All series, summed over the workers.
    pub fn sums(&self) -> BTreeMap<SeriesKey, SeriesSums> {
        let shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut sums = BTreeMap::new();
        for shard in shards {
            shard.for_each(|key, series| series.add_to(sums.entry(key).or_default()));
        }
        sums
    }

    /// One summary per hop with at least one exchange, ordered by labels.
    pub fn summaries(&self) -> Vec<HopSummary> {
        summary::hops(self)
    }

    /// The gauges of each destination, ordered by name.
    pub fn destinations(&self) -> Vec<DestinationFigures> {
        summary::destinations(self)
    }

    /// Downstream connections of a listener that have `maxStreams` HTTP/2 streams now.
    pub fn connections_at_max_streams(&self, listener: &str) -> i64 {
        summary::connections_at_max_streams(self, listener)
    }

    /// The metrics page in the given format.
    pub fn page(&self, format: PageFormat) -> String {
        openmetrics::page(&collect::gather(self), format)
    }
}

#[cfg(test)]
mod tests;
