//! After how many requests an upstream replaces its worker process, learned from the ends of its connections.
//!
//! Servers may bound the requests of a worker process (uvicorn `--limit-max-requests`, gunicorn `--max-requests`): then all
//! connections to it end at once, without a word, and requests on their way are lost. Two such ends in a row, with about the
//! same number of requests to the address before each, set the period, for all workers of hopguard. Near the end of a period
//! no connection is used twice, so that there is no idle one to be ended. That works for an upstream of one process whose
//! callers share one hopguard, like the app beside it; the ends of several processes overlap and set no period.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// How long a period holds without an end that confirms it.
const LIFE: Duration = Duration::from_secs(600);

/// Ends within this time are one: the connections of a process do not all end in the same instant.
const ONE_END: Duration = Duration::from_secs(1);

/// Fewer requests between two ends say nothing: a process that serves so few fails.
const LEAST: u64 = 50;

/// The period of one address.
#[derive(Debug)]
pub struct WorkerLimit {
    born: Instant,
    /// Requests since the last end, or since the period was over without an end.
    served: AtomicU64,
    /// Requests before the last end.
    last: AtomicU64,
    /// When the last end was, in milliseconds since `born`; 0 before the first.
    last_at: AtomicU64,
    /// Requests of a period; 0 if none is known.
    period: AtomicU64,
}

impl WorkerLimit {
    /// No period.
    pub fn new(now: Instant) -> Self {
        let zero = || AtomicU64::new(0);
        Self { born: now, served: zero(), last: zero(), last_at: zero(), period: zero() }
    }

    /// Counts answered requests.
    pub fn count(&self, requests: u32) {
        self.served.fetch_add(requests.into(), Relaxed);
    }

    /// Records that all connections of a worker process have ended.
    pub fn record_end(&self, now: Instant) {
        let at = self.millis(now).max(1);
        let before_at = self.last_at.swap(at, Relaxed);
        if before_at != 0 && at.saturating_sub(before_at) < u64::try_from(ONE_END.as_millis()).unwrap_or(u64::MAX) {
            return;
        }
        let served = self.served.swap(0, Relaxed);
        let last = self.last.swap(served, Relaxed);
        let is_regular = before_at != 0 && served >= LEAST && served.abs_diff(last) <= served / 20;
        self.period.store(if is_regular { served.min(last) } else { 0 }, Relaxed);
    }

    /// True while the worker process is about to end: from 95 % of the period to 105 %. `uncounted` are requests of the asking
    /// worker that [`Self::count`] does not know yet. One atomic load where no period is known.
    pub fn is_near(&self, uncounted: u32, now: Instant) -> bool {
        let period = self.period.load(Relaxed);
        if period == 0 {
            return false;
        }
        let since_end = Duration::from_millis(self.millis(now).saturating_sub(self.last_at.load(Relaxed)));
        if since_end > LIFE {
            self.period.store(0, Relaxed);
            return false;
        }
        let counted = self.served.load(Relaxed);
        let served = counted + u64::from(uncounted);
        if served > period + period / 20 {
            // Nothing was there to be ended: the next period began where this one was over. Lost to another worker's change, the
            // next question sets it.
            let _raced = self.served.compare_exchange(counted, counted.saturating_sub(period), Relaxed, Relaxed);
            return false;
        }
        served >= period - period / 20
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.born).as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts requests one by one; returns those before which the end was near.
    fn near(limit: &WorkerLimit, requests: u64, now: Instant) -> Vec<u64> {
        let asked = |request: &u64| {
            let is_near = limit.is_near(0, now);
            limit.count(1);
            is_near.then_some(*request)
        };
        (0..requests).collect::<Vec<_>>().iter().filter_map(asked).collect()
    }

    #[test]
    fn two_ends_after_as_many_requests_set_the_period_and_it_goes_on_without_ends() {
        let born = Instant::now();
        let limit = WorkerLimit::new(born);
        let at = |seconds| born + Duration::from_secs(seconds);
        for (requests, seconds) in [(30, 1), (1000, 3), (1020, 5)] {
            assert!(near(&limit, requests, at(seconds)).is_empty());
            limit.record_end(at(seconds));
        }
        let times = near(&limit, 3000, at(6));
        assert_eq!((times[0], times[100]), (950, 1050));
        assert_eq!((times[101], times.last()), (1950, Some(&2999)));
        assert!(near(&limit, 3000, at(606)).is_empty(), "forgotten");
    }

    #[test]
    fn irregular_ends_set_no_period_and_ends_within_a_second_are_one() {
        let born = Instant::now();
        let limit = WorkerLimit::new(born);
        let at = |millis| born + Duration::from_millis(millis);
        for (requests, millis) in [(500, 1000), (700, 3000), (10, 3500), (690, 6000)] {
            assert!(near(&limit, requests, at(millis)).is_empty());
            limit.record_end(at(millis));
        }
        assert!(!near(&limit, 700, at(7000)).is_empty(), "700 and 10 before the one end, 690 before the next");
        let few = WorkerLimit::new(born);
        for seconds in [1, 3, 5, 7] {
            assert!(near(&few, 20, at(seconds * 1000)).is_empty());
            few.record_end(at(seconds * 1000));
        }
    }
}
