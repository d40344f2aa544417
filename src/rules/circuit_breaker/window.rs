//! Calls and failures of a sliding window, in ten buckets.
//!
//! No lock: a bucket is one word, its start time in the upper half and the count in the lower. A worker that is
//! preempted between its load of a bucket and its count adds that one call to the bucket's next use; calls that end
//! during `clear` may count before or after it. So a count is off by at most one per worker. Because a bucket stores
//! its start time, a window whose length a reload has changed keeps the counts that lie within it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const BUCKETS: u64 = 10;

/// Lower half of a word: the count.
const COUNT: u64 = u32::MAX as u64;

/// Upper bound of the window in ms (24 days): half of the range of a start time.
const LONGEST: u64 = 1 << 31;

/// Every success writes here. Own cache lines, so that these writes do not slow down readers of the breaker's state.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Window {
    requests: Track,
    failures: Track,
}

#[derive(Debug, Default)]
struct Track([AtomicU64; BUCKETS as usize]);

impl Window {
    /// Counts a call; `elapsed` is the time since any fixed instant.
    pub(super) fn add(&self, is_failure: bool, elapsed: Duration, length: Duration) {
        let (now, length) = (millis(elapsed), millis(length).min(LONGEST));
        self.requests.add(now, length);
        if is_failure {
            self.failures.add(now, length);
        }
    }

    /// Calls and failures within the last `length`, minus up to a tenth.
    pub(super) fn sum(&self, elapsed: Duration, length: Duration) -> (u32, u32) {
        let (now, length) = (millis(elapsed), millis(length).min(LONGEST));
        (self.requests.sum(now, length), self.failures.sum(now, length))
    }

    /// Sets all counts to 0.
    pub(super) fn clear(&self) {
        for bucket in self.requests.0.iter().chain(&self.failures.0) {
            bucket.store(0, Relaxed);
        }
    }
}

impl Track {
    fn add(&self, now: u64, length: u64) {
        let size = (length / BUCKETS).max(1);
        let slot = now / size;
        let began = start(slot * size);
        let bucket = &self.0[usize::try_from(slot % BUCKETS).unwrap_or_default()];
        let mut seen = bucket.load(Relaxed);
        // How much later the bucket began than ours; modulo 2^32, so an older bucket has a very large number.
        let ahead = (seen & !COUNT).wrapping_sub(began) >> 32;
        // A bucket of another length may begin a little later than ours would: it counts the call.
        if seen & COUNT == 0 || ahead >= length {
            match bucket.compare_exchange(seen, began | 1, Relaxed, Relaxed) {
                Ok(_) => return,
                // Another worker has just begun this bucket, or counted in it.
                Err(other) => seen = other,
            }
        }
        // A full bucket stays full: an overflow would change its start time.
        if seen & COUNT < COUNT / 2 {
            bucket.fetch_add(1, Relaxed);
        }
    }

    fn sum(&self, now: u64, length: u64) -> u32 {
        let within = |seen: &u64| {
            let age = start(now).wrapping_sub(seen & !COUNT) >> 32;
            age < length
        };
        let counts = self.0.iter().map(|bucket| bucket.load(Relaxed)).filter(within).map(|seen| seen & COUNT);
        u32::try_from(counts.sum::<u64>()).unwrap_or(u32::MAX)
    }
}

/// A start time in the upper half of a word. It wraps after 49 days: only a count untouched for exactly that long is
/// taken for a current one.
fn start(millis: u64) -> u64 {
    millis << 32
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_secs(10);

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn what_is_older_than_the_window_no_longer_counts() {
        let window = Window::default();
        for second in 0..30 {
            window.add(second % 2 == 0, at(second * 1000), LENGTH);
        }
        assert_eq!(window.sum(at(29_000), LENGTH), (10, 5));
        assert_eq!(window.sum(at(29_999), LENGTH), (10, 5));
        assert_eq!(window.sum(at(34_000), LENGTH), (5, 2));
        assert_eq!(window.sum(at(39_000), LENGTH), (0, 0));
    }

    #[test]
    fn a_window_of_changed_length_goes_on_with_what_lies_within_it() {
        let window = Window::default();
        for second in 20..30 {
            window.add(true, at(second * 1000), LENGTH);
        }
        assert_eq!(window.sum(at(29_000), at(1000)), (1, 1));
        assert_eq!(window.sum(at(29_000), at(60_000)), (10, 10));
        window.add(true, at(29_500), at(60_000));
        assert!(window.sum(at(29_500), at(60_000)).0 >= 10);
    }

    #[test]
    fn very_short_and_very_long_windows_count_too() {
        let window = Window::default();
        for length in [at(1), at(7), Duration::from_secs(400_000 * 3600)] {
            window.clear();
            window.add(true, at(123_456_789_012), length);
            assert_eq!(window.sum(at(123_456_789_012), length), (1, 1), "{length:?}");
        }
    }

    #[test]
    fn what_lay_idle_for_weeks_is_forgotten() {
        const DAY: u64 = 24 * 3_600_000;
        let window = Window::default();
        for day in [0, 1, 20, 26, 60, 100] {
            window.add(true, at(day * DAY), LENGTH);
            assert_eq!(window.sum(at(day * DAY), LENGTH), (1, 1), "{day}");
        }
    }

    #[test]
    fn no_call_is_lost_when_workers_begin_a_bucket_together() {
        const WORKERS: u32 = 4;
        const CALLS: u32 = 10_000;
        let window = Window::default();
        (0..10).for_each(|second| window.add(false, at(second * 1_000), LENGTH));
        let work = || (0..CALLS).for_each(|call| window.add(false, at(100_000 + u64::from(call)), LENGTH));
        std::thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(work);
            }
        });
        assert_eq!(window.sum(at(109_999), LENGTH), (WORKERS * CALLS, 0));
    }
}
