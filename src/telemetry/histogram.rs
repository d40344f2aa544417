//! A histogram with fixed buckets: written by one thread, read by any.
//!
//! The writer uses a relaxed load and store instead of an atomic addition, which is correct only with a single writer.
//! The count is the sum of the buckets, so a reader never sees a count that differs from `+Inf`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the latency histograms, in nanoseconds: 0.2 ms to 10 s in steps of 1, 2, 5, and 30 s.
pub const LATENCY_BOUNDS: [u64; 16] = [
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    200_000_000,
    500_000_000,
    1_000_000_000,
    2_000_000_000,
    5_000_000_000,
    10_000_000_000,
    30_000_000_000,
];

/// Upper bounds of the overhead histogram, in nanoseconds: 10 us to 50 ms.
pub const OVERHEAD_BOUNDS: [u64; 12] = [
    10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000,
    50_000_000,
];

/// Adds to a cell that only this thread writes.
#[inline]
pub(super) fn add(cell: &AtomicU64, amount: u64) {
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

/// Buckets with the given upper bounds, and one for values above the last bound.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    bounds: &'static [u64; N],
    buckets: [AtomicU64; N],
    above: AtomicU64,
    sum: AtomicU64,
}

/// Histogram of every duration except the overhead.
pub type LatencyHistogram = Histogram<16>;
/// Histogram of the overhead: the time that hopguard itself takes.
pub type OverheadHistogram = Histogram<12>;

impl LatencyHistogram {
    /// Empty, with [`LATENCY_BOUNDS`].
    pub fn latency() -> Self {
        Self::with_bounds(&LATENCY_BOUNDS)
    }
}

impl OverheadHistogram {
    /// Empty, with [`OVERHEAD_BOUNDS`].
    pub fn overhead() -> Self {
        Self::with_bounds(&OVERHEAD_BOUNDS)
    }
}

impl<const N: usize> Histogram<N> {
    fn with_bounds(bounds: &'static [u64; N]) -> Self {
        Self { bounds, buckets: [const { AtomicU64::new(0) }; N], above: AtomicU64::new(0), sum: AtomicU64::new(0) }
    }

    /// Adds one value; a value on a bound belongs to that bound. To be called by the thread that owns the shard only.
    #[inline]
    pub fn observe(&self, value: Duration) {
        let nanos = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
        let bucket = self.bounds.iter().position(|bound| nanos <= *bound);
        add(bucket.map_or(&self.above, |index| &self.buckets[index]), 1);
        add(&self.sum, nanos);
    }

    /// Adds the observed values to `sums`.
    pub fn add_to(&self, sums: &mut Buckets) {
        sums.bounds = self.bounds;
        sums.counts.resize(N + 1, 0);
        let cells = self.buckets.iter().chain(std::iter::once(&self.above));
        for (count, cell) in sums.counts.iter_mut().zip(cells) {
            *count += cell.load(Ordering::Relaxed);
        }
        sums.sum_nanos = sums.sum_nanos.wrapping_add(self.sum.load(Ordering::Relaxed));
    }
}

/// Sum of histograms with equal bounds, as a plain value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buckets {
    /// Upper bounds in nanoseconds, ascending.
    pub bounds: &'static [u64],
    /// Values per bucket, not cumulative; one entry more than `bounds`.
    pub counts: Vec<u64>,
    /// Sum of all values, in nanoseconds.
    pub sum_nanos: u64,
}

impl Buckets {
    /// Number of values.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Adds the values of another histogram with equal bounds.
    pub fn merge(&mut self, other: &Buckets) {
        if !other.bounds.is_empty() {
            self.bounds = other.bounds;
        }
        self.counts.resize(self.counts.len().max(other.counts.len()), 0);
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.sum_nanos = self.sum_nanos.wrapping_add(other.sum_nanos);
    }

    /// The values added since `earlier`, an earlier reading of the same histograms.
    pub fn since(&self, earlier: &Buckets) -> Buckets {
        let before = earlier.counts.iter().copied().chain(std::iter::repeat(0));
        Buckets {
            bounds: self.bounds,
            counts: self.counts.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect(),
            sum_nanos: self.sum_nanos.saturating_sub(earlier.sum_nanos),
        }
    }

    /// The `q`-quantile (0 to 1), interpolated linearly within its bucket; `None` without values. Values above the last
    /// bound are reported as that bound.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let total = self.count();
        if total == 0 {
            return None;
        }
        let rank = q.clamp(0.0, 1.0) * total as f64;
        let (mut below, mut lower) = (0.0, 0u64);
        for (count, upper) in self.counts.iter().zip(self.bounds) {
            let here = *count as f64;
            if here > 0.0 && below + here >= rank {
                let share = ((rank - below) / here).clamp(0.0, 1.0);
                let nanos = lower as f64 + (upper - lower) as f64 * share;
                return Some(Duration::from_nanos(nanos as u64));
            }
            below += here;
            lower = *upper;
        }
        Some(Duration::from_nanos(lower))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums<const N: usize>(histogram: &Histogram<N>) -> Buckets {
        let mut buckets = Buckets::default();
        histogram.add_to(&mut buckets);
        buckets
    }

    #[test]
    fn a_value_on_a_bound_belongs_to_that_bound_and_one_above_to_the_next() {
        let histogram = LatencyHistogram::latency();
        histogram.observe(Duration::from_millis(1));
        histogram.observe(Duration::from_nanos(1_000_001));
        histogram.observe(Duration::from_secs(31));
        histogram.observe(Duration::ZERO);
        let buckets = sums(&histogram);
        assert_eq!(buckets.counts[0], 1);
        assert_eq!(buckets.counts[2], 1);
        assert_eq!(buckets.counts[3], 1);
        assert_eq!(buckets.counts[16], 1);
        assert_eq!(buckets.count(), 4);
        assert_eq!(buckets.sum_nanos, 31_002_000_001);
    }

    #[test]
    fn the_bounds_ascend() {
        assert!(LATENCY_BOUNDS.is_sorted_by(|a, b| a < b));
        assert!(OVERHEAD_BOUNDS.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn quantiles_lie_within_the_bucket_that_holds_the_rank() {
        let histogram = LatencyHistogram::latency();
        assert_eq!(sums(&histogram).quantile(0.5), None);
        for _ in 0..98 {
            histogram.observe(Duration::from_micros(1_500));
        }
        for _ in 0..2 {
            histogram.observe(Duration::from_secs(100));
        }
        let buckets = sums(&histogram);
        let median = buckets.quantile(0.5).unwrap();
        assert!(median > Duration::from_millis(1) && median <= Duration::from_millis(2), "{median:?}");
        assert_eq!(buckets.quantile(0.99), Some(Duration::from_secs(30)));
        assert!(buckets.quantile(1.0) >= buckets.quantile(0.0));
    }

    #[test]
    fn since_leaves_what_was_added_later() {
        let histogram = OverheadHistogram::overhead();
        histogram.observe(Duration::from_micros(15));
        let earlier = sums(&histogram);
        histogram.observe(Duration::from_micros(15));
        histogram.observe(Duration::from_micros(40));
        let window = sums(&histogram).since(&earlier);
        assert_eq!(window.count(), 2);
        assert_eq!(window.sum_nanos, 55_000);
        let mut both = earlier.clone();
        both.merge(&window);
        assert_eq!(both, sums(&histogram));
    }
}
