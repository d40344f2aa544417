//! The record of one exchange, and the metrics and log lines made from it.
//!
//! | file | what |
//! |---|---|
//! | `exchange` | one call; records itself when it is dropped |
//! | `record` | all that is known of one call, as plain values |
//! | `outcome` | the closed sets of ends and protocols |
//! | `hop` | labels, registered once and numbers afterwards |
//! | `shard`, `histogram` | the metrics of one worker: one writer, no lock |
//! | `instruments`, `families` | other counters and gauges, and the names of all metrics |
//! | `collect`, `openmetrics`, `host_process` | from cells to a page |
//! | `summary` | hops as people want to see them |
//! | `access_log`, `log_line` | one line per exchange |
//! | `log` | the diagnostics of the process itself |
//! | `writer` | the thread that writes the lines of either |
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
pub use families::{DestinationMetrics, ListenerMetrics, ProcessMetrics};
pub use histogram::{Buckets, Histogram, LATENCY_BOUNDS, LatencyHistogram, OVERHEAD_BOUNDS, OverheadHistogram};
pub use hop::{Direction, HopId, HopLabels, Hops, MAX_HOPS};
pub use host_process::ProcessFigures;
pub use instruments::{Counter, Family, Gauge, GaugeGuard};
pub use openmetrics::PageFormat;
pub use outcome::{Outcome, Protocol};
pub use record::{ClosedBy, ConnectionUse, Notes, RefusalRecord, RequestLine};
pub use shard::{Series, SeriesKey, SeriesSums, Shard};
pub use summary::{DestinationFigures, HopSummary};

use instruments::Instruments;
use shard::SharedSeries;

/// The policy in force, as far as the metrics show it.
#[derive(Clone, Debug)]
pub struct PolicyInfo {
    /// The hash of its content.
    pub hash: String,
    /// When it came into force.
    pub loaded: Timestamp,
    /// How long reading and compiling it took.
    pub took: Duration,
}

/// Everything of a process that is counted or logged. One per process (or per test), shared by all threads.
#[derive(Debug)]
pub struct Telemetry {
    /// The hops; register them when a policy is compiled.
    pub hops: Hops,
    /// What is counted once for the process.
    pub process: ProcessMetrics,
    /// One line per exchange.
    pub access_log: AccessLog,
    instruments: Instruments,
    shards: Mutex<Vec<Arc<SharedSeries>>>,
    policy: Mutex<Option<PolicyInfo>>,
    anchor: (Instant, Timestamp),
}

impl Telemetry {
    /// Empty; access log lines go to `sink`, in the default mode (`errors`, JSON).
    pub fn new(sink: Sink) -> Arc<Self> {
        let instruments = Instruments::default();
        let process = ProcessMetrics::new(&instruments);
        let access_log = AccessLog::new(sink, process.lines_dropped.clone(), process.lines_failed.clone());
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

    /// A worker's own end; call it once per worker, on the worker's thread. `worker` tells the cells of workers apart.
    pub fn shard(self: &Arc<Self>, worker: u32) -> Rc<Shard> {
        let shared = Arc::new(SharedSeries::default());
        self.shards.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&shared));
        Shard::new(Arc::clone(self), worker, shared)
    }

    /// Notes that a policy came into force, and how long reading and compiling it took.
    pub fn policy_loaded(&self, hash: &str, took: Duration) {
        self.process.reloads_ok.increment();
        let info = PolicyInfo { hash: hash.to_owned(), loaded: self.wall(Instant::now()), took };
        *self.policy.lock().unwrap_or_else(PoisonError::into_inner) = Some(info);
    }

    /// The policy in force; `None` before the first.
    pub fn policy(&self) -> Option<PolicyInfo> {
        self.policy.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes that a policy was refused and the last good one stays.
    pub fn policy_refused(&self) {
        self.process.reloads_failed.increment();
    }

    /// Notes that changed certificates were read, and whether all of them can be used.
    pub fn certificates_read(&self, usable: bool) {
        let counter = if usable { &self.process.certificates_ok } else { &self.process.certificates_failed };
        counter.increment();
    }

    /// The wall time of an instant, from one anchor taken at the start: instants order exchanges even where somebody
    /// steps the clock.
    pub fn wall(&self, at: Instant) -> Timestamp {
        let (instant, wall) = self.anchor;
        let after = jiff::SignedDuration::try_from(at.saturating_duration_since(instant)).unwrap_or_default();
        let before = jiff::SignedDuration::try_from(instant.saturating_duration_since(at)).unwrap_or_default();
        wall.checked_add(after).and_then(|time| time.checked_sub(before)).unwrap_or(wall)
    }

    /// How long ago this was made.
    pub fn uptime(&self) -> Duration {
        self.anchor.0.elapsed()
    }

    /// All series, added up over the workers.
    pub fn sums(&self) -> BTreeMap<SeriesKey, SeriesSums> {
        let shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut sums = BTreeMap::new();
        for shard in shards {
            shard.for_each(|key, series| series.add_to(sums.entry(key).or_default()));
        }
        sums
    }

    /// One summary per hop that has had an exchange, ordered by its labels.
    pub fn summaries(&self) -> Vec<HopSummary> {
        summary::of(self)
    }

    /// The gauges of each destination, by name.
    pub fn destinations(&self) -> Vec<DestinationFigures> {
        summary::destinations(self)
    }

    /// The metrics page in the given format.
    pub fn page(&self, format: PageFormat) -> String {
        openmetrics::page(&collect::gather(self), format)
    }
}

#[cfg(test)]
mod tests;
