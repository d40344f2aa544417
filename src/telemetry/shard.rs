//! The metrics of one worker: written by its thread alone, read by whoever scrapes.
//!
//! A series (hop x protocol x outcome) is made when it is first met, so ten thousand routes without traffic cost three
//! words each. Finding one is an index and a search among the two or three kinds of end that the hop has had.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Telemetry;
use super::families::{DestinationMetrics, ListenerMetrics};
use super::histogram::{Buckets, LatencyHistogram, OverheadHistogram, add};
use super::hop::{HopId, HopLabels};
use super::outcome::{Outcome, Protocol};

/// What is kept of all exchanges of one hop, protocol and outcome on one worker.
#[derive(Debug)]
pub struct Series {
    count: AtomicU64,
    /// From the request's head to the last byte of the answer.
    pub total: LatencyHistogram,
    /// From the request's head to the answer's head.
    pub first_byte: LatencyHistogram,
    /// Opening the connection, where one was opened.
    pub connect: LatencyHistogram,
    /// Waiting for a free place, where there was a wait.
    pub queue: LatencyHistogram,
    /// What we ourselves took.
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

    /// Counts one exchange. Only the worker that owns the series may call it.
    #[inline]
    pub fn count(&self) {
        add(&self.count, 1);
    }

    /// Adds what was recorded so far to `sums`.
    pub fn add_to(&self, sums: &mut SeriesSums) {
        sums.count += self.count.load(Ordering::Relaxed);
        self.total.add_to(&mut sums.total);
        self.first_byte.add_to(&mut sums.first_byte);
        self.connect.add_to(&mut sums.connect);
        self.queue.add_to(&mut sums.queue);
        self.overhead.add_to(&mut sums.overhead);
    }
}

/// The sum of one series over all workers.
#[derive(Clone, Debug, Default)]
pub struct SeriesSums {
    /// How many exchanges ended.
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

/// Which series it is.
pub type SeriesKey = (HopId, Protocol, Outcome);

type KeyedSeries = (SeriesKey, Arc<Series>);
/// With protocol and outcome as one small number, which is quick to compare.
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

/// One worker's own end of the telemetry; it stays on the thread that made it.
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

    /// What this shard is a part of.
    pub fn telemetry(&self) -> &Arc<Telemetry> {
        &self.telemetry
    }

    /// The gauges and counters of one destination on this worker. Cold: resolve once per destination and keep it. The
    /// same name gives the same cells again, so a reload loses nothing.
    pub fn destination(&self, name: &str) -> DestinationMetrics {
        DestinationMetrics::of_worker(&self.telemetry.instruments, name, self.worker)
    }

    /// The gauges and counters of one listener on this worker; see [`Shard::destination`].
    pub fn listener(&self, name: &str) -> ListenerMetrics {
        ListenerMetrics::of_worker(&self.telemetry.instruments, name, self.worker)
    }

    /// The series of a hop, made at its first use.
    pub fn series(&self, hop: HopId, protocol: Protocol, outcome: Outcome) -> Arc<Series> {
        self.with_series((hop, protocol, outcome), Arc::clone)
    }

    #[inline]
    pub(super) fn with_series<T>(&self, key: SeriesKey, visit: impl FnOnce(&Arc<Series>) -> T) -> T {
        let (hop, protocol, outcome) = key;
        let slot = protocol as u8 * Outcome::ALL.len() as u8 + outcome as u8;
        let mut hops = self.hops.borrow_mut();
        if hops.len() <= hop.index() {
            hops.resize_with(hop.index() + 1, HopCells::default);
        }
        let cells = &mut hops[hop.index()];
        if let Some((_, series)) = cells.series.iter().find(|(known, _)| *known == slot) {
            return visit(series);
        }
        let series = Arc::new(Series::new());
        self.shared.push(key, Arc::clone(&series));
        cells.series.push((slot, Arc::clone(&series)));
        visit(&series)
    }

    /// The labels of a hop, fetched from the registry at their first use.
    pub(super) fn labels(&self, hop: HopId) -> Arc<HopLabels> {
        let mut hops = self.hops.borrow_mut();
        if hops.len() <= hop.index() {
            hops.resize_with(hop.index() + 1, HopCells::default);
        }
        let labels = hops[hop.index()].labels.get_or_insert_with(|| self.telemetry.hops.labels(hop));
        Arc::clone(labels)
    }

    /// The buffer that lines are written into, empty.
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
    use crate::telemetry::{Direction, Sink};

    #[test]
    fn a_series_exists_from_its_first_use_and_is_the_same_one_afterwards() {
        let telemetry = Telemetry::new(Sink::memory().0);
        let hop = telemetry.hops.register(HopLabels::new("a", "b", "c", Direction::Inbound));
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
