//! Calls and failures of the last while, in ten buckets that slide.
//!
//! No lock: a bucket is one word, the time of its beginning above the count. A worker that sleeps between its look at a
//! bucket and its count puts that one call into whatever the bucket has become; calls that end while everything is
//! forgotten may count before or after it. So a count is off by at most one per worker, never more.
//! Because a bucket says when it began, a window of changed length goes on with what lies within it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const BUCKETS: u64 = 10;

/// The lower half of a word is the count.
const COUNT: u64 = u32::MAX as u64;

/// A longer window is cut to 24 days, half of what the time of a beginning can tell.
const LONGEST: u64 = 1 << 31;

/// Every success writes here. Lines of its own, so that this does not slow those who only read the breaker's state.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Window {
    requests: Track,
    failures: Track,
}

#[derive(Debug, Default)]
struct Track([AtomicU64; BUCKETS as usize]);

impl Window {
    /// Counts a call; `elapsed` since any fixed moment.
    pub(super) fn add(&self, is_failure: bool, elapsed: Duration, length: Duration) {
        let (now, length) = (millis(elapsed), millis(length).min(LONGEST));
        self.requests.add(now, length);
        if is_failure {
            self.failures.add(now, length);
        }
    }

    /// Calls and failures of the last `length`, or up to a tenth less.
    pub(super) fn sum(&self, elapsed: Duration, length: Duration) -> (u32, u32) {
        let (now, length) = (millis(elapsed), millis(length).min(LONGEST));
        (self.requests.sum(now, length), self.failures.sum(now, length))
    }

    /// Forgets everything.
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
        // How much later than ours the bucket began; modulo 2^32, so an older one is ahead by very much.
        let ahead = (seen & !COUNT).wrapping_sub(began) >> 32;
        // One of another length may begin a little later than ours would: it takes the call.
        if seen & COUNT == 0 || ahead >= length {
            match bucket.compare_exchange(seen, began | 1, Relaxed, Relaxed) {
                Ok(_) => return,
                // Somebody else has just begun it, or counted.
                Err(other) => seen = other,
            }
        }
        // A full bucket stays full: an overflow would change the time of its beginning.
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

/// A time as the upper half of a word. It comes round after 49 days: a count that nobody touched for exactly so long is
/// taken for a new one, which is as good as never.
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
