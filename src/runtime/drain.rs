//! Graceful shutdown: the phases of the drain, and the open connections that it waits for.
//!
//! `app` moves the [`Drain`] forward on SIGTERM or SIGINT; each worker follows it through a [`DrainSignal`] and passes the
//! phase on to its [`ConnectionTracker`], which wakes the connections. Invariants: a phase is never left for an earlier
//! one, and a worker ends only when its tracker is empty or the phase is [`DrainPhase::Over`].

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::task::{Context, Waker};

use tokio::sync::{Notify, watch};

/// The phase of shutdown, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrainPhase {
    /// Normal operation.
    Serving,
    /// Not ready any more; still accepts, and tells HTTP/1.1 callers to close after the next response.
    Leaving,
    /// Accepts nothing new; exchanges in flight may finish.
    Closing,
    /// The grace time is over: exchanges that are still in flight are cut off.
    Over,
}

/// Sets the drain phase of the process. Dropping it counts as [`DrainPhase::Closing`].
pub struct Drain {
    phase: watch::Sender<DrainPhase>,
}

impl Default for Drain {
    fn default() -> Self {
        Self { phase: watch::Sender::new(DrainPhase::Serving) }
    }
}

impl Drain {
    /// Moves forward to `phase`; an earlier phase is ignored. Returns true if the phase changed.
    pub fn advance(&self, phase: DrainPhase) -> bool {
        self.phase.send_if_modified(|current| {
            let is_later = phase > *current;
            *current = phase.max(*current);
            is_later
        })
    }

    /// The current phase.
    pub fn phase(&self) -> DrainPhase {
        *self.phase.borrow()
    }

    /// A receiver of the phase for another thread.
    pub fn signal(&self) -> DrainSignal {
        DrainSignal(self.phase.subscribe())
    }
}

/// Follows the [`Drain`] from another thread.
#[derive(Clone)]
pub struct DrainSignal(watch::Receiver<DrainPhase>);

impl DrainSignal {
    /// Returns when `phase` or a later one has begun, or the [`Drain`] is dropped.
    pub async fn reached(&self, phase: DrainPhase) {
        let mut phases = self.0.clone();
        // An error means that the `Drain` was dropped, which counts as reached.
        let _ended = phases.wait_for(|current| *current >= phase).await;
    }
}

/// The open connections of one worker, and the drain phase that they see.
///
/// Reading the phase costs one read of a cell, because every connection reads it each time it is woken.
#[derive(Clone)]
pub struct ConnectionTracker(Rc<TrackerState>);

struct TrackerState {
    phase: Cell<DrainPhase>,
    next_id: Cell<u64>,
    /// Open connections by id; the waker is there once the connection has read the phase.
    wakers: RefCell<HashMap<u64, Option<Waker>>>,
    /// Notified when the last connection closes.
    empty: Notify,
}

impl Default for ConnectionTracker {
    fn default() -> Self {
        Self(Rc::new(TrackerState {
            phase: Cell::new(DrainPhase::Serving),
            next_id: Cell::new(0),
            wakers: RefCell::default(),
            empty: Notify::new(),
        }))
    }
}

impl ConnectionTracker {
    /// The current phase.
    pub fn phase(&self) -> DrainPhase {
        self.0.phase.get()
    }

    /// Moves forward to `phase` and wakes every tracked connection.
    pub fn advance(&self, phase: DrainPhase) {
        self.0.phase.set(phase.max(self.0.phase.get()));
        for waker in self.0.wakers.borrow().values().flatten() {
            waker.wake_by_ref();
        }
    }

    /// Counts one open connection until the result is dropped.
    pub fn track(&self) -> TrackedConnection {
        let id = self.0.next_id.get();
        self.0.next_id.set(id + 1);
        self.0.wakers.borrow_mut().insert(id, None);
        TrackedConnection { tracker: self.clone(), id, has_waker: Cell::new(false) }
    }

    /// Returns when no tracked connection is open.
    pub async fn all_closed(&self) {
        while !self.0.wakers.borrow().is_empty() {
            self.0.empty.notified().await;
        }
    }
}

/// One open connection; dropping it reports the connection closed.
pub struct TrackedConnection {
    tracker: ConnectionTracker,
    id: u64,
    has_waker: Cell<bool>,
}

impl TrackedConnection {
    /// The current phase; the calling task is woken when the phase changes.
    ///
    /// Registers the waker of the first call only: a connection stays in one task for its life.
    pub fn phase(&self, cx: &Context<'_>) -> DrainPhase {
        if !self.has_waker.replace(true) {
            self.tracker.0.wakers.borrow_mut().insert(self.id, Some(cx.waker().clone()));
        }
        self.tracker.phase()
    }
}

impl Drop for TrackedConnection {
    fn drop(&mut self) {
        let mut wakers = self.tracker.0.wakers.borrow_mut();
        wakers.remove(&self.id);
        if wakers.is_empty() {
            self.tracker.0.empty.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::task::Poll;

    #[tokio::test]
    async fn a_phase_change_wakes_connections_and_the_last_close_ends_the_wait() {
        let tracker = ConnectionTracker::default();
        let connection = tracker.track();
        let closing = poll_fn(|cx| match connection.phase(cx) {
            DrainPhase::Closing | DrainPhase::Over => Poll::Ready(()),
            DrainPhase::Serving | DrainPhase::Leaving => Poll::Pending,
        });
        let advance = async { tracker.advance(DrainPhase::Closing) };
        tokio::join!(closing, advance);
        drop(connection);
        tracker.all_closed().await;
    }

    #[tokio::test]
    async fn the_phase_never_goes_back() {
        let drain = Drain::default();
        let signal = drain.signal();
        assert!(drain.advance(DrainPhase::Closing));
        assert!(!drain.advance(DrainPhase::Leaving));
        signal.reached(DrainPhase::Leaving).await;
        assert_eq!(drain.phase(), DrainPhase::Closing);
    }
}
