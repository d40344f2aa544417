//! Whether an endpoint accepts connections, as one worker sees it: connections in the TCP phase, and the last trouble.
//!
//! `dial` reports what becomes of each connection, `proxy` each response, and `pool` asks before it picks the endpoint.
//! Invariant: a connection that takes long speaks against the endpoint only if the endpoint has neither accepted another one
//! nor sent a response since the connection was begun.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::upstream::dial_limit::DialLimit;
use crate::upstream::endpoint::Endpoint;

/// How long an endpoint is skipped after a connect failure.
const UNREACHABLE_FOR: Duration = Duration::from_secs(1);

/// How long a new connection is no quick matter after one was left waiting.
const SLOW_FOR: Duration = Duration::from_secs(10);

/// What one worker knows of the connections to an endpoint.
pub struct Reachability {
    limit: Arc<DialLimit>,
    /// Connections in the TCP phase.
    connecting: Cell<u32>,
    trouble: Cell<Option<Trouble>>,
    /// When a connection was last left waiting.
    stalled_at: Cell<Option<Instant>>,
    /// The last connection that was accepted, TCP alone.
    accepted_at: Cell<Instant>,
    /// The last connection that was opened completely.
    opened_at: Cell<Instant>,
    /// The last response; `None` before the first, so that other workers hear of none.
    answered_at: Cell<Option<Instant>>,
}

/// A connection that failed or that was not accepted in time.
#[derive(Clone, Copy)]
struct Trouble {
    /// The endpoint is skipped until then, and after that while a connection tries it out.
    until: Instant,
    /// A later sign of life ends the trouble; `None` after a failure, which only a new connection ends.
    since: Option<Instant>,
}

impl Reachability {
    /// An endpoint without connections.
    pub fn new(limit: Arc<DialLimit>, now: Instant) -> Self {
        Self {
            limit,
            connecting: Cell::new(0),
            trouble: Cell::new(None),
            stalled_at: Cell::new(None),
            accepted_at: Cell::new(now),
            opened_at: Cell::new(now),
            answered_at: Cell::new(None),
        }
    }

    /// True for 1 s after a connect failure, while a connection has not been accepted for 250 ms, and after either while a
    /// connection is trying the endpoint out.
    pub fn is_unreachable(&self, now: Instant) -> bool {
        self.trouble.get().is_some_and(|trouble| self.is_in(trouble, now))
    }

    fn is_in(&self, trouble: Trouble, now: Instant) -> bool {
        let is_over = trouble.since.is_some_and(|since| self.alive_at() > since);
        !is_over && (now < trouble.until || self.connecting.get() > 0)
    }

    /// Records a response. On the path of every request: one store.
    pub fn answered(&self, now: Instant) {
        self.answered_at.set(Some(now));
    }

    /// Tells the other workers of the last response; called by the sweep, so that a response costs them nothing.
    pub fn publish(&self) {
        if let Some(answered_at) = self.answered_at.get() {
            self.limit.record_answered(answered_at);
        }
    }

    /// Whether the endpoint has accepted a connection or sent a response after `time`, on any worker; on others with the
    /// precision of their sweep.
    pub fn is_alive_since(&self, time: Instant) -> bool {
        self.alive_at() > time || self.limit.has_opened_since(time) || self.limit.has_answered_since(time)
    }

    fn alive_at(&self) -> Instant {
        let opened_at = self.opened_at.get();
        self.answered_at.get().map_or(opened_at, |answered_at| answered_at.max(opened_at))
    }

    /// Whether the endpoint has sent a response after `time`, to any worker; to others with the precision of their sweep.
    pub fn has_answered_since(&self, time: Instant) -> bool {
        self.answered_at.get().is_some_and(|at| at > time) || self.limit.has_answered_since(time)
    }

    /// Whether this worker's last accepted connection, TCP alone, is later than `time`.
    pub fn has_accepted_since(&self, time: Instant) -> bool {
        self.accepted_at.get() > time
    }

    /// Whether a new connection is likely to be accepted, or refused, at once: none was left waiting lately.
    pub fn decides_quickly(&self, now: Instant) -> bool {
        let stalled_at = self.stalled_at.get();
        stalled_at.is_none_or(|stalled_at| now.saturating_duration_since(stalled_at) >= SLOW_FOR)
    }

    /// Records a connection that was opened completely.
    pub fn opened(&self, now: Instant) {
        self.trouble.set(None);
        self.opened_at.set(now);
        self.limit.record_opened(now);
    }

    /// Records a connection that failed; the endpoint is skipped for 1 s while the pool has others.
    pub fn failed(&self, now: Instant) {
        self.trouble.set(Some(Trouble { until: now + UNREACHABLE_FOR, since: None }));
        self.limit.reduce(now);
    }

    /// Records a connection, begun at `since`, that was not opened in time. Returns true if that speaks against the
    /// endpoint, which then is skipped for 1 s while the pool has others.
    pub fn timed_out(&self, since: Instant, now: Instant) -> bool {
        let speaks_against = !self.is_alive_since(since);
        if speaks_against {
            self.trouble.set(Some(Trouble { until: now + UNREACHABLE_FOR, since: Some(since) }));
        }
        speaks_against
    }

    /// Records a connection, begun at `since`, that waits for longer than a call should. While it waits, the endpoint is
    /// skipped if the pool has others, unless it gives a sign of life.
    pub fn stalled(&self, since: Instant, now: Instant) {
        self.limit.reduce(now);
        self.stalled_at.set(Some(now));
        if self.trouble.get().is_none() && !self.is_alive_since(since) {
            self.trouble.set(Some(Trouble { until: now, since: Some(since) }));
        }
    }
}

/// A connection in the TCP phase, counted until it is dropped.
pub struct DialSlot(Rc<Endpoint>);

impl DialSlot {
    /// A slot for a connection to this endpoint; `None` if as many as the limit admits are in the TCP phase.
    pub fn take(endpoint: &Rc<Endpoint>) -> Option<Self> {
        let reach = &endpoint.reachability;
        let connecting = reach.connecting.get();
        reach.limit.begin(connecting == 0).then(|| {
            reach.connecting.set(connecting + 1);
            Self(Rc::clone(endpoint))
        })
    }

    /// Ends the TCP phase of an accepted connection; the limit grows if calls wait for more.
    pub fn accepted(self, now: Instant) {
        let reach = &self.0.reachability;
        reach.accepted_at.set(now);
        if !self.0.waiters.is_empty() {
            reach.limit.raise();
        }
    }
}

impl Drop for DialSlot {
    fn drop(&mut self) {
        let reach = &self.0.reachability;
        reach.connecting.set(reach.connecting.get().saturating_sub(1));
        reach.limit.end();
    }
}
