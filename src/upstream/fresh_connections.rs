//! Bounds the connections to an endpoint that are opened although another one is idle.
//!
//! A request that must not be sent twice goes over a new connection to the app on the same machine: see `proxy/select.rs`.
//! Each such connection replaces an idle one, which occupies a port until the kernel uses it again (TIME_WAIT), so their rate
//! is bounded by a token bucket. An app that accepts slowly is left alone for a while.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// Time in which one more connection is admitted.
const INTERVAL: Duration = Duration::from_millis(2);

/// Connections that are admitted at once after a quiet time.
const BURST: u32 = 128;

/// How long no connection is admitted after one was not open in time.
const AFTER_SLOW: Duration = Duration::from_secs(1);

/// The bound for one endpoint and worker: 500 connections per second, and 128 at once.
pub struct FreshConnections {
    /// When the bucket is full again.
    full_at: Cell<Instant>,
}

impl FreshConnections {
    /// A full bucket.
    pub fn new(now: Instant) -> Self {
        Self { full_at: Cell::new(now) }
    }

    /// Whether a connection may be opened now although another one is idle; takes a token if it may.
    pub fn admits(&self, now: Instant) -> bool {
        let full_at = self.full_at.get().max(now);
        let is_admitted = full_at.duration_since(now) < INTERVAL * BURST;
        if is_admitted {
            self.full_at.set(full_at + INTERVAL);
        }
        is_admitted
    }

    /// Records that a connection was not open in time: for the next second none is admitted.
    pub fn was_slow(&self, now: Instant) {
        self.full_at.set(now + AFTER_SLOW + INTERVAL * BURST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_admitted_and_then_one_each_two_milliseconds_but_none_after_a_slow_one() {
        let now = Instant::now();
        let fresh = FreshConnections::new(now);
        let admitted = |begin: u64, end: u64| {
            (begin..end).filter(|half| fresh.admits(now + Duration::from_micros(half * 500))).count()
        };
        assert_eq!((0..1000).filter(|_| fresh.admits(now)).count(), 128);
        assert_eq!(admitted(1, 401), 100, "in 200 ms");
        fresh.was_slow(now + Duration::from_millis(200));
        assert_eq!(admitted(400, 2400), 0, "in the next second");
        assert!(admitted(2401, 2600) > 0);
    }
}
