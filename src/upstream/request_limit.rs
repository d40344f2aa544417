//! After how many requests an upstream ends a connection, learned from its closes.
//!
//! Servers bound the requests of a connection: some announce the last response with `Connection: close`, others close after
//! it without a word, and then the next request is lost. Two closes in a row after the same number of responses set the
//! limit, for all workers; each connection then serves a number of its own between 80 % and 100 % of it, so that connections
//! opened together do not end together.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// How long a limit holds. The limit keeps the upstream from closing, so no close confirms it meanwhile.
const LIFE: Duration = Duration::from_secs(600);

/// How long a limit of few requests holds: a restart may end two young connections after the same number of requests.
const SHORT_LIFE: Duration = Duration::from_secs(60);

/// From how many requests on a limit counts as one that a restart does not imitate.
const MANY: u32 = 20;

/// The limit of one address.
#[derive(Debug)]
pub struct RequestLimit {
    born: Instant,
    /// Responses before the last close, and when it was: see [`pack`].
    last_close: AtomicU64,
    /// The limit, and until when it holds.
    limit: AtomicU64,
}

/// A number of requests and a time in seconds since `born`; a number of 0 means none.
fn pack(requests: u32, seconds: u64) -> u64 {
    u64::from(requests) << 32 | seconds.min(u32::MAX.into())
}

fn unpack(packed: u64) -> (u32, u64) {
    ((packed >> 32) as u32, packed & u64::from(u32::MAX))
}

impl RequestLimit {
    /// No limit.
    pub fn new(now: Instant) -> Self {
        Self { born: now, last_close: AtomicU64::new(0), limit: AtomicU64::new(0) }
    }

    /// Records that the upstream closed a connection, without a word, right after its response number `requests`.
    pub fn record_close(&self, requests: u32, now: Instant) {
        let at = self.seconds(now);
        let (before, before_at) = unpack(self.last_close.swap(pack(requests, at), Relaxed));
        let life = if requests < MANY { SHORT_LIFE } else { LIFE };
        if requests > 0 && before == requests && at <= before_at + life.as_secs() {
            self.limit.store(pack(requests, at + life.as_secs()), Relaxed);
        }
    }

    /// Records that response number `requests` announced the close. An upstream may have other reasons to announce one, such
    /// as a failure: only a close after many requests counts.
    pub fn record_announced_close(&self, requests: u32, now: Instant) {
        if requests >= MANY {
            self.record_close(requests, now);
        }
    }

    /// How many requests a connection may serve; `spread`, from 0 to 1, is the connection's own. `None` without a limit.
    pub fn of_connection(&self, spread: f32, now: Instant) -> Option<u32> {
        let packed = self.limit.load(Relaxed);
        if packed == 0 {
            return None;
        }
        let (requests, until) = unpack(packed);
        (self.seconds(now) < until).then(|| part(requests, spread))
    }

    fn seconds(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.born).as_secs()
    }
}

/// Between 80 % and 100 % of `requests`, at least 1.
pub fn part(requests: u32, spread: f32) -> u32 {
    let most = requests / 5;
    (requests - (most as f32 * spread) as u32).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(limit: &RequestLimit, seconds: u64) -> Instant {
        limit.born + Duration::from_secs(seconds)
    }

    #[test]
    fn two_closes_after_the_same_number_set_the_limit_and_it_is_forgotten() {
        let limit = RequestLimit::new(Instant::now());
        let learned = |seconds| limit.of_connection(0.0, at(&limit, seconds));
        for requests in [7, 50, 8, 50] {
            limit.record_close(requests, at(&limit, 1));
        }
        assert_eq!(learned(1), None, "no two in a row");
        limit.record_close(50, at(&limit, 2));
        assert_eq!((learned(2), learned(600), learned(603)), (Some(50), Some(50), None));
        limit.record_close(3, at(&limit, 700));
        limit.record_close(3, at(&limit, 701));
        assert_eq!((learned(702), learned(762)), (Some(3), None));
        limit.record_close(0, at(&limit, 800));
        limit.record_close(0, at(&limit, 800));
        assert_eq!(learned(801), None, "a connection that never answered teaches nothing");
    }

    #[test]
    fn few_requests_before_an_announced_close_teach_nothing() {
        let limit = RequestLimit::new(Instant::now());
        for _ in 0..3 {
            limit.record_announced_close(2, at(&limit, 1));
        }
        assert_eq!(limit.of_connection(0.0, at(&limit, 1)), None);
        for _ in 0..2 {
            limit.record_announced_close(100, at(&limit, 1));
        }
        assert_eq!(limit.of_connection(0.0, at(&limit, 1)), Some(100));
    }

    #[test]
    fn each_connection_has_a_part_of_the_limit() {
        assert_eq!([0.0, 0.5, 1.0].map(|spread| part(100, spread)), [100, 90, 80]);
        assert_eq!([1, 2, 4, 5, 10].map(|requests| part(requests, 1.0)), [1, 2, 4, 4, 8]);
    }
}
