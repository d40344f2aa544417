//! After how many requests an upstream ends a connection, learned from its closes.
//!
//! Servers bound the requests of a connection: some announce the last response with `Connection: close`, others close after
//! it without a word, and then the next request is lost. Two closes in a row after the same number of responses, the second
//! one of a connection that was opened after the first, set the limit for all workers: connections that end together end
//! for another reason. A close after another number ends the limit. Each connection serves a number of its own between 80 %
//! and 100 % of the limit, so that connections opened together do not end together.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// How long a limit holds. The limit keeps the upstream from closing, so no close confirms it meanwhile.
const LIFE: Duration = Duration::from_secs(600);

/// How long a limit of few requests holds: a restart may end two young connections after the same number of requests.
const SHORT_LIFE: Duration = Duration::from_secs(60);

/// From how many requests on a limit counts as one that a restart does not imitate.
const MANY: u32 = 20;

/// Bits of the time in a packed pair; enough for 34 years.
const TIME_BITS: u32 = 40;

/// The limit of one address.
#[derive(Debug)]
pub struct RequestLimit {
    born: Instant,
    /// Responses before the last close, and when it was: see [`pack`].
    last_close: AtomicU64,
    /// The limit, and until when it holds.
    limit: AtomicU64,
}

/// A number of requests, at most 2^24 - 1, and a time in milliseconds since `born`; a number of 0 means none.
fn pack(requests: u32, millis: u64) -> u64 {
    u64::from(requests.min((1 << (64 - TIME_BITS)) - 1)) << TIME_BITS | millis.min((1 << TIME_BITS) - 1)
}

fn unpack(packed: u64) -> (u32, u64) {
    ((packed >> TIME_BITS) as u32, packed & ((1 << TIME_BITS) - 1))
}

impl RequestLimit {
    /// No limit.
    pub fn new(now: Instant) -> Self {
        Self { born: now, last_close: AtomicU64::new(0), limit: AtomicU64::new(0) }
    }

    /// Records that the upstream closed a connection opened at `opened_at`, without a word, right after its response number
    /// `requests`.
    pub fn record_close(&self, requests: u32, opened_at: Instant, now: Instant) {
        if requests == 0 {
            return;
        }
        if unpack(self.limit.load(Relaxed)).0 != requests {
            self.limit.store(0, Relaxed);
        }
        let at = self.millis(now);
        let (before, before_at) = unpack(self.last_close.load(Relaxed));
        if before == requests && self.millis(opened_at) < before_at {
            return;
        }
        self.last_close.store(pack(requests, at), Relaxed);
        let life = if requests < MANY { SHORT_LIFE } else { LIFE };
        let life = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
        if before == requests && at <= before_at + life {
            self.limit.store(pack(requests, at + life), Relaxed);
        }
    }

    /// Records that response number `requests` announced the close. An upstream may have other reasons to announce one, such
    /// as a failure: only a close after many requests counts.
    pub fn record_announced_close(&self, requests: u32, opened_at: Instant, now: Instant) {
        if requests >= MANY {
            self.record_close(requests, opened_at, now);
        }
    }

    /// How many requests a connection may serve; `spread`, from 0 to 1, is the connection's own. `None` without a limit.
    pub fn of_connection(&self, spread: f32, now: Instant) -> Option<u32> {
        let packed = self.limit.load(Relaxed);
        if packed == 0 {
            return None;
        }
        let (requests, until) = unpack(packed);
        (self.millis(now) < until).then(|| part(requests, spread))
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.born).as_millis()).unwrap_or(u64::MAX)
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
    fn two_closes_one_after_the_other_set_the_limit_and_it_is_forgotten() {
        let limit = RequestLimit::new(Instant::now());
        let learned = |seconds| limit.of_connection(0.0, at(&limit, seconds));
        let close = |requests, opened, closed| limit.record_close(requests, at(&limit, opened), at(&limit, closed));
        for requests in [7, 50, 8, 50] {
            close(requests, 0, 1);
        }
        close(50, 0, 2);
        assert_eq!(learned(2), None, "all were open at the first close");
        close(50, 2, 3);
        assert_eq!((learned(3), learned(602), learned(604)), (Some(50), Some(50), None));
        close(3, 700, 701);
        close(3, 701, 702);
        assert_eq!((learned(703), learned(763)), (Some(3), None));
        close(3, 764, 765);
        close(2, 765, 766);
        assert_eq!(learned(766), None, "another number");
        close(0, 800, 801);
        close(0, 802, 803);
        assert_eq!(learned(803), None, "a connection that never answered teaches nothing");
    }

    #[test]
    fn few_requests_before_an_announced_close_teach_nothing() {
        let limit = RequestLimit::new(Instant::now());
        for second in 0..3 {
            limit.record_announced_close(2, at(&limit, second), at(&limit, second));
        }
        assert_eq!(limit.of_connection(0.0, at(&limit, 3)), None);
        for second in 3..5 {
            limit.record_announced_close(100, at(&limit, second), at(&limit, second));
        }
        assert_eq!(limit.of_connection(0.0, at(&limit, 5)), Some(100));
    }

    #[test]
    fn each_connection_has_a_part_of_the_limit() {
        assert_eq!([0.0, 0.5, 1.0].map(|spread| part(100, spread)), [100, 90, 80]);
        assert_eq!([1, 2, 4, 5, 10].map(|requests| part(requests, 1.0)), [1, 2, 4, 4, 8]);
    }
}
