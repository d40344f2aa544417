//! How many TCP connections may be opened to one address at the same time, and when the address last gave a sign of life.
//!
//! One per address of a cluster, shared by all workers. A connection request (SYN) beyond the listen backlog of a service is
//! dropped and sent again after a second, so a burst of them fails slowly. The limit follows what the address accepts: it
//! begins at 16, grows with each accepted connection while calls wait for more, and is halved when a request is not
//! answered, or is refused. So the first connections after an outage are few. Each worker may open one connection whatever
//! the limit is, because no other worker wakes its calls.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// Connections in the TCP phase, before the address has accepted or failed one.
const INITIAL: u32 = 16;

/// Most connections in the TCP phase.
const MOST: u32 = 256;

/// Fewest connections in the TCP phase.
const FEWEST: u32 = 2;

/// Least time between two reductions: the connection requests of one burst fail together.
const REDUCTION_INTERVAL: Duration = Duration::from_millis(250);

/// Value of a time that has not been yet.
const NEVER: u64 = 0;

/// The limit and the last sign of life of one address.
#[derive(Debug)]
pub struct DialLimit {
    /// Times are nanoseconds since then.
    born: Instant,
    limit: AtomicU32,
    /// Connections in the TCP phase, of all workers.
    connecting: AtomicU32,
    reduced_at: AtomicU64,
    /// The last accepted connection that was opened completely.
    opened_at: AtomicU64,
    /// The last response.
    answered_at: AtomicU64,
}

impl DialLimit {
    /// An address that has not been connected to.
    pub fn new(now: Instant) -> Self {
        Self {
            born: now,
            limit: AtomicU32::new(INITIAL),
            connecting: AtomicU32::new(0),
            reduced_at: AtomicU64::new(NEVER),
            opened_at: AtomicU64::new(NEVER),
            answered_at: AtomicU64::new(NEVER),
        }
    }

    /// Counts a connection that enters the TCP phase, if the limit admits it. `is_first`: the worker has no other one.
    pub fn begin(&self, is_first: bool) -> bool {
        let limit = self.limit.load(Relaxed);
        let admit = |connecting: u32| (is_first || connecting < limit).then_some(connecting + 1);
        self.connecting.fetch_update(Relaxed, Relaxed, admit).is_ok()
    }

    /// Counts a connection that has left the TCP phase.
    pub fn end(&self) {
        self.connecting.fetch_sub(1, Relaxed);
    }

    /// Raises the limit after an accepted connection.
    pub fn raise(&self) {
        let raised = |limit: u32| (limit < MOST).then_some(limit + 1);
        // Fails at the most.
        let _at_most = self.limit.fetch_update(Relaxed, Relaxed, raised);
    }

    /// Halves the limit after a connection request that was not answered, or was refused; at most once in 250 ms.
    pub fn reduce(&self, now: Instant) {
        let (before, tick) = (self.reduced_at.load(Relaxed), self.tick(now));
        let is_due = before == NEVER || tick.saturating_sub(before) >= nanos(REDUCTION_INTERVAL);
        // Of several workers one reduces.
        if is_due && self.reduced_at.compare_exchange(before, tick, Relaxed, Relaxed).is_ok() {
            let halved = |limit: u32| Some((limit / 2).max(FEWEST));
            let _before = self.limit.fetch_update(Relaxed, Relaxed, halved);
        }
    }

    /// Records a connection that was opened completely.
    pub fn record_opened(&self, at: Instant) {
        self.opened_at.fetch_max(self.tick(at), Relaxed);
    }

    /// Records a response.
    pub fn record_answered(&self, at: Instant) {
        self.answered_at.fetch_max(self.tick(at), Relaxed);
    }

    /// Whether a connection to the address was opened after `time`.
    pub fn has_opened_since(&self, time: Instant) -> bool {
        self.opened_at.load(Relaxed) > self.tick(time)
    }

    /// Whether the address sent a response after `time`.
    pub fn has_answered_since(&self, time: Instant) -> bool {
        self.answered_at.load(Relaxed) > self.tick(time)
    }

    /// Never 0, which is [`NEVER`].
    fn tick(&self, now: Instant) -> u64 {
        nanos(now.saturating_duration_since(self.born)).saturating_add(1)
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(limit: &DialLimit) -> usize {
        let admitted = (0..1000).take_while(|_| limit.begin(false)).count();
        (0..admitted).for_each(|_| limit.end());
        admitted
    }

    #[test]
    fn the_limit_grows_by_accepted_connections_and_is_halved_once_per_burst() {
        let now = Instant::now();
        let limit = DialLimit::new(now);
        assert_eq!(admitted(&limit), 16);
        (0..8).for_each(|_| limit.raise());
        assert_eq!(admitted(&limit), 24);
        (0..24).for_each(|_| limit.reduce(now));
        assert_eq!(admitted(&limit), 12);
        (0..1000).for_each(|_| limit.raise());
        assert_eq!(admitted(&limit), 256);
        for quarter in 1..20 {
            limit.reduce(now + quarter * REDUCTION_INTERVAL);
        }
        assert_eq!(admitted(&limit), 2);
    }

    #[test]
    fn a_worker_without_a_connection_may_always_open_one() {
        let limit = DialLimit::new(Instant::now());
        (0..16).for_each(|_| assert!(limit.begin(false)));
        assert!(!limit.begin(false));
        assert!(limit.begin(true));
        (0..17).for_each(|_| limit.end());
        assert_eq!(admitted(&limit), 16);
    }

    #[test]
    fn a_sign_of_life_counts_for_what_began_before_it() {
        let now = Instant::now();
        let limit = DialLimit::new(now);
        let at = |millis: u64| now + Duration::from_millis(millis);
        assert!(!limit.has_opened_since(now) && !limit.has_answered_since(now));
        limit.record_opened(at(5));
        assert!(limit.has_opened_since(at(4)) && !limit.has_opened_since(at(5)) && !limit.has_answered_since(now));
        limit.record_answered(at(9));
        limit.record_answered(at(7));
        assert!(limit.has_answered_since(at(8)) && !limit.has_answered_since(at(9)));
    }
}
