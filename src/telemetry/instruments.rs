//! Counters and gauges outside exchanges: registered once by name and labels, changed through a handle.
//!
//! A handle belongs to the process or to one worker; a reading sums the cells of all workers. A family holds at most
//! [`MAX_CELLS`] label sets; later ones share one label set whose values are all `other`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Most label sets of one family.
pub(super) const MAX_CELLS: usize = 4096;

/// A number that only grows. Cheap to clone; all clones share one cell.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// Adds one.
    #[inline]
    pub fn increment(&self) {
        self.add(1);
    }

    /// Adds `amount`.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The value of this cell alone.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down. Cheap to clone; all clones share one cell.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<AtomicI64>);

impl Gauge {
    /// Adds one.
    #[inline]
    pub fn increment(&self) {
        self.add(1);
    }

    /// Subtracts one.
    #[inline]
    pub fn decrement(&self) {
        self.add(-1);
    }

    /// Adds `amount`, which may be negative.
    #[inline]
    pub fn add(&self, amount: i64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Replaces the value.
    pub fn set(&self, value: i64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value of this cell alone.
    pub fn value(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds one now and subtracts it when the guard is dropped.
    pub fn hold(&self) -> GaugeGuard {
        self.increment();
        GaugeGuard(self.clone())
    }
}

/// One unit of a gauge, subtracted on drop.
#[derive(Debug)]
pub struct GaugeGuard(Gauge);

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.decrement();
    }
}

/// Name and help text of a metric family; the families are constants in `families.rs`.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Full name; the name of a counter ends in `_total`.
    pub name: &'static str,
    /// One sentence, without a full stop.
    pub help: &'static str,
}

/// Label names with their values, in exposition order.
pub(super) type Labels = Vec<(&'static str, String)>;

#[derive(Debug)]
enum Cell {
    Counter(Counter),
    Gauge(Gauge),
}

/// Cells by worker; `None` is the cell of the process.
type ByWorker = BTreeMap<Option<u32>, Cell>;

#[derive(Debug)]
struct Cells {
    family: Family,
    by_labels: BTreeMap<Labels, ByWorker>,
}

/// A family with its values, summed over workers.
#[derive(Debug)]
pub(super) struct Reading {
    /// The family.
    pub(super) family: Family,
    /// True for a counter, false for a gauge.
    pub(super) counter: bool,
    /// Label sets with their values.
    pub(super) values: Vec<(Labels, f64)>,
}

/// All counters and gauges of the process.
#[derive(Debug, Default)]
pub(super) struct Instruments(Mutex<BTreeMap<&'static str, Cells>>);

impl Instruments {
    /// The counter with these labels; equal arguments give the same cell. Takes a lock: not for the path of a request.
    pub(super) fn counter(&self, family: Family, labels: Labels, worker: Option<u32>) -> Counter {
        self.with_cell(family, labels, worker, |cell| {
            match cell.get_or_insert_with(|| Cell::Counter(Counter::default())) {
                Cell::Counter(counter) => counter.clone(),
                // Unreachable: each family is one constant and is used as one kind.
                Cell::Gauge(_) => Counter::default(),
            }
        })
    }

    /// The gauge with these labels; equal arguments give the same cell. Takes a lock: not for the path of a request.
    pub(super) fn gauge(&self, family: Family, labels: Labels, worker: Option<u32>) -> Gauge {
        self.with_cell(family, labels, worker, |cell| match cell.get_or_insert_with(|| Cell::Gauge(Gauge::default())) {
            Cell::Gauge(gauge) => gauge.clone(),
            Cell::Counter(_) => Gauge::default(),
        })
    }

    /// True if a series with these labels exists.
    pub(super) fn has(&self, family: Family, labels: &Labels) -> bool {
        let families = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        families.get(family.name).is_some_and(|cells| cells.by_labels.contains_key(labels))
    }

    fn with_cell<T>(
        &self,
        family: Family,
        labels: Labels,
        worker: Option<u32>,
        visit: impl FnOnce(&mut Option<Cell>) -> T,
    ) -> T {
        let mut families = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let cells = families.entry(family.name).or_insert_with(|| Cells { family, by_labels: BTreeMap::new() });
        let known = cells.by_labels.contains_key(&labels) || cells.by_labels.len() < MAX_CELLS;
        let labels = if known { labels } else { labels.iter().map(|(name, _)| (*name, "other".to_owned())).collect() };
        let workers = cells.by_labels.entry(labels).or_default();
        let mut cell = workers.remove(&worker);
        let result = visit(&mut cell);
        if let Some(cell) = cell {
            workers.insert(worker, cell);
        }
        result
    }

    /// All families with their current values, ordered by name.
    pub(super) fn read(&self) -> Vec<Reading> {
        let families = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        families.values().map(Cells::read).collect()
    }
}

impl Cells {
    fn read(&self) -> Reading {
        let mut counter = false;
        let mut values = Vec::with_capacity(self.by_labels.len());
        for (labels, workers) in &self.by_labels {
            let mut sum = 0.0;
            for cell in workers.values() {
                sum += match cell {
                    Cell::Counter(cell) => {
                        counter = true;
                        cell.value() as f64
                    }
                    Cell::Gauge(cell) => cell.value() as f64,
                };
            }
            values.push((labels.clone(), sum));
        }
        Reading { family: self.family, counter, values }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAMILY: Family = Family { name: "hopguard_things", help: "Things" };

    #[test]
    fn cells_of_workers_add_up_and_the_same_arguments_are_the_same_cell() {
        let instruments = Instruments::default();
        let labels = || vec![("destination", "payment".to_owned())];
        let first = instruments.gauge(FAMILY, labels(), Some(0));
        instruments.gauge(FAMILY, labels(), Some(1)).add(5);
        let held = first.hold();
        assert_eq!(instruments.gauge(FAMILY, labels(), Some(0)).value(), 1);
        assert_eq!(instruments.read()[0].values, [(labels(), 6.0)]);
        drop(held);
        assert_eq!(instruments.read()[0].values, [(labels(), 5.0)]);
    }

    #[test]
    fn a_family_is_bounded() {
        let instruments = Instruments::default();
        for index in 0..MAX_CELLS + 10 {
            instruments.counter(FAMILY, vec![("destination", index.to_string())], None).increment();
        }
        let reading = instruments.read();
        assert_eq!(reading[0].values.len(), MAX_CELLS + 1);
        assert!(reading[0].counter);
        assert!(reading[0].values.contains(&(vec![("destination", "other".to_owned())], 10.0)));
    }
}
