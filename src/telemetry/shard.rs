//! The metrics of one worker: written by the worker's thread only, read by scrapes.
//!
//! A series (hop x protocol x outcome) is created on first use, so ten thousand routes without traffic cost three words
//! each. A look-up is an index and a search among the two or three series that the hop has.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Telemetry;
use super::families::{DestinationMetrics, ListenerMetrics};
use super::histogram::{Buckets, LatencyHistogram, OverheadHistogram, add};
use super::hop::{HopId, HopLabels};
use super::outcome::{Outcome, Protocol};

/// Count and histograms of the exchanges with one hop, protocol and outcome on one worker.
#[derive(Debug)]
pub struct Series {
    count: AtomicU64,
    /// Time from the request head to the last byte of the response.
    pub total: LatencyHistogram,
    /// Time from the request head to the response head.
    pub first_byte: LatencyHistogram,
    /// Time to open an upstream connection, for exchanges that opened one.
    pub connect: LatencyHistogram,
    /// Time in the queue of the concurrency limit, for exchanges that were queued.
    pub queue: LatencyHistogram,
    /// Time that hopguard itself took.
    pub overhead: OverheadHistogram,
}

impl Series {
    fn new() -> Self {
        Self {
            count: AtomicU64::new(0),
            total: LatencyHistogram::latency(),
            first_byte: LatencyHistogram::latency(),
            connect: LatencyHistogram::latency(),
            queue: LatencyHistogram::latency(),
            overhead: OverheadHistogram::overhead(),
        }
    }

    /// Counts one exchange. To be called by the worker that owns the series only.
    #[inline]
    pub fn count(&self) {
        add(&self.count, 1);
    }

    /// Adds the recorded values to `sums`.
    pub fn add_to(&self, sums: &mut SeriesSums) {
        sums.count += self.count.load(Ordering::Relaxed);
        self.total.add_to(&mut sums.total);
        self.first_byte.add_to(&mut sums.first_byte);
        self.connect.add_to(&mut sums.connect);
        self.queue.add_to(&mut sums.queue);
        self.overhead.add_to(&mut sums.overhead);
    }
}

/// One series, summed over all workers.
#[derive(Clone, Debug, Default)]
pub struct SeriesSums {
    /// Exchanges that ended.
    pub count: u64,
    /// See [`Series::total`].
    pub total: Buckets,
    /// See [`Series::first_byte`].
    pub first_byte: Buckets,
    /// See [`Series::connect`].
    pub connect: Buckets,
    /// See [`Series::queue`].
    pub queue: Buckets,
    /// See [`Series::overhead`].
    pub overhead: Buckets,
}

/// Key of a series.
pub type SeriesKey = (HopId, Protocol, Outcome);

type KeyedSeries = (SeriesKey, Arc<Series>);
/// A series with protocol and outcome as one byte, which is quick to compare.
type NumberedSeries = (u8, Arc<Series>);

/// The series of one worker, as readers see them: a list that only grows.
#[derive(Debug, Default)]
pub(super) struct SharedSeries(Mutex<Vec<KeyedSeries>>);

impl SharedSeries {
    fn push(&self, key: SeriesKey, series: Arc<Series>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((key, series));
    }

    pub(super) fn for_each(&self, mut visit: impl FnMut(SeriesKey, &Series)) {
        for (key, series) in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            visit(*key, series);
        }
    }
}

#[derive(Default)]
struct HopCells {
    series: Vec<NumberedSeries>,
    labels: Option<Arc<HopLabels>>,
}

/// The telemetry of one worker; it stays on the thread that made it.
pub struct Shard {
    telemetry: Arc<Telemetry>,
    worker: u32,
    shared: Arc<SharedSeries>,
    hops: RefCell<Vec<HopCells>>,
    line: RefCell<String>,
}

impl Shard {
    pub(super) fn new(telemetry: Arc<Telemetry>, worker: u32, shared: Arc<SharedSeries>) -> Rc<Self> {
        Rc::new(Self { telemetry, worker, shared, hops: RefCell::default(), line: RefCell::default() })
    }

    /// The telemetry of the process.
    pub fn telemetry(&self) -> &Arc<Telemetry> {
        &self.telemetry
    }

    /// The gauges and counters of one destination on this worker. Takes a lock: resolve once per destination and keep
    /// the result. The same name gives the same cells, so a reload loses nothing.
    pub fn destination(&self, name: &str) -> DestinationMetrics {
        DestinationMetrics::of_worker(&self.telemetry.instruments, name, self.worker)
    }

    /// The gauges and counters of one listener on this worker; see [`Shard::destination`].
    pub fn listener(&self, name: &str) -> ListenerMetrics {
        ListenerMetrics::of_worker(&self.telemetry.instruments, name, self.worker)
    }

    /// The series with this key, created on first use.
    pub fn series(&self, hop: HopId, protocol: Protocol, outcome: Outcome) -> Arc<Series> {
        self.with_series((hop, protocol, outcome), Arc::clone)
    }

    #[inline]
    pub(super) fn with_series<T>(&self, key: SeriesKey, visit: impl FnOnce(&Arc<Series>) -> T) -> T {
        let (hop, protocol, outcome) = key;
        let number = protocol as u8 * Outcome::ALL.len() as u8 + outcome as u8;
        let mut hops = self.hops.borrow_mut();
        if hops.len() <= hop.index() {
            hops.resize_with(hop.index() + 1, HopCells::default);
        }
        let cells = &mut hops[hop.index()];
        if let Some((_, series)) = cells.series.iter().find(|(known, _)| *known == number) {
            return visit(series);
        }
        let series = Arc::new(Series::new());
        self.shared.push(key, Arc::clone(&series));
        cells.series.push((number, Arc::clone(&series)));
        visit(&series)
    }

    /// Labels of a hop, read from the registry on first use.
    pub(super) fn labels(&self, hop: HopId) -> Arc<HopLabels> {
        let mut hops = self.hops.borrow_mut();
        if hops.len() <= hop.index() {
            hops.resize_with(hop.index() + 1, HopCells::default);
        }
        let labels = hops[hop.index()].labels.get_or_insert_with(|| self.telemetry.hops.labels(hop));
        Arc::clone(labels)
    }

    /// Calls `write` with the worker's line buffer, emptied.
    pub(super) fn with_line<T>(&self, write: impl FnOnce(&mut String) -> T) -> T {
        let mut line = self.line.borrow_mut();
        line.clear();
        write(&mut line)
    }
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("worker", &self.worker).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{DirectionLabel, Sink};

    #[test]
    fn a_series_exists_from_its_first_use_and_is_the_same_one_afterwards() {
        let telemetry = Telemetry::new(Sink::memory().0);
        let hop = telemetry.hops.register(HopLabels::new("a", "b", "c", DirectionLabel::Inbound));
        let shard = telemetry.shard(0);
        assert_eq!(telemetry.sums().len(), 0);
        shard.series(hop, Protocol::Grpc, Outcome::Draining).count();
        shard.series(hop, Protocol::Grpc, Outcome::Draining).count();
        shard.series(hop, Protocol::Http1, Outcome::Ok).count();
        let other = telemetry.shard(1);
        other.series(hop, Protocol::Grpc, Outcome::Draining).count();
        let sums = telemetry.sums();
        assert_eq!(sums[&(hop, Protocol::Grpc, Outcome::Draining)].count, 3, "two workers add up");
        assert_eq!(sums[&(hop, Protocol::Http1, Outcome::Ok)].count, 1);
        assert_eq!(sums.len(), 2);
    }
}
