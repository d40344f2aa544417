//! Which connections to one address are not used again, because another connection of the same age has ended.
//!
//! A server that stops or that replaces a worker process ends all its connections, but not at once, and often without a
//! word: it leaves idle connections open and drops the next request on each of them. So the first reused connection that
//! ends in place of a response marks all connections that were opened before: idle ones are closed, busy ones are not
//! checked in, and the next request goes over a new connection, whose refusal is known to be unsent. Whatever ends a marked
//! connection afterwards is the same event, and counts once. All workers share the mark of an address.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::time::Instant;

/// The mark of one address.
#[derive(Debug)]
pub struct StaleMark {
    born: Instant,
    /// Connections opened before this time are stale, in nanoseconds since `born`; 0 if there is no mark.
    before: AtomicU64,
}

impl StaleMark {
    /// No mark. `now` must not be later than the opening of any connection that is asked about.
    pub fn new(now: Instant) -> Self {
        Self { born: now, before: AtomicU64::new(0) }
    }

    /// Marks all connections opened before `now`. A mark never moves back.
    pub fn set(&self, now: Instant) {
        self.before.fetch_max(self.nanos(now), Relaxed);
    }

    /// Whether a connection opened at `opened_at` is not to be used again; one atomic load.
    pub fn is_stale(&self, opened_at: Instant) -> bool {
        let before = self.before.load(Relaxed);
        before != 0 && self.nanos(opened_at) < before
    }

    /// When the mark was set last; `None` before the first time.
    pub fn set_at(&self) -> Option<Instant> {
        let before = self.before.load(Relaxed);
        (before != 0).then(|| self.born + std::time::Duration::from_nanos(before))
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.born).as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_connections_opened_before_the_mark_are_stale_and_the_mark_never_moves_back() {
        let born = Instant::now();
        let at = |millis| born + Duration::from_millis(millis);
        let mark = StaleMark::new(born);
        assert!(!mark.is_stale(at(0)) && mark.set_at().is_none());
        mark.set(at(20));
        mark.set(at(10));
        assert_eq!([0, 19, 20, 21].map(|millis| mark.is_stale(at(millis))), [true, true, false, false]);
        assert_eq!(mark.set_at(), Some(at(20)));
    }
}
