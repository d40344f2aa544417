//! Going down without cutting anybody off: the phases, and who is still busy.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::task::{Context, Waker};

use tokio::sync::{Notify, watch};

/// How far the process is on its way down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrainPhase {
    /// Business as usual.
    Serving,
    /// Not ready any more; still accepts, and tells HTTP/1.1 callers to close after the next answer.
    Leaving,
    /// Accepts nothing new; what is in flight may finish.
    Closing,
    /// The grace time is over: what is still in flight is cut off.
    Over,
}

/// The switch of the process. Dropping it counts as [`DrainPhase::Closing`].
pub struct Drain {
    phase: watch::Sender<DrainPhase>,
}

impl Default for Drain {
    fn default() -> Self {
        Self { phase: watch::Sender::new(DrainPhase::Serving) }
    }
}

impl Drain {
    /// Moves on to `phase`; never goes back. Returns true if that was a step.
    pub fn advance(&self, phase: DrainPhase) -> bool {
        self.phase.send_if_modified(|now| {
            let later = phase > *now;
            *now = phase.max(*now);
            later
        })
    }

    /// The present phase.
    pub fn phase(&self) -> DrainPhase {
        *self.phase.borrow()
    }

    /// A view for another thread.
    pub fn signal(&self) -> DrainSignal {
        DrainSignal(self.phase.subscribe())
    }
}

/// What other threads see of the [`Drain`].
#[derive(Clone)]
pub struct DrainSignal(watch::Receiver<DrainPhase>);

impl DrainSignal {
    /// Returns when `phase` has begun.
    pub async fn reached(&self, phase: DrainPhase) {
        // An error means that the switch is gone, which is the end too.
        let mut phases = self.0.clone();
        let _ended = phases.wait_for(|now| *now >= phase).await;
    }
}

/// The open connections of one worker, and the phase as they see it.
///
/// Asking for the phase costs a look at a cell, because every connection asks each time it is woken.
#[derive(Clone)]
pub struct ConnectionTracker(Rc<Inner>);

struct Inner {
    phase: Cell<DrainPhase>,
    next: Cell<u64>,
    members: RefCell<HashMap<u64, Option<Waker>>>,
    none: Notify,
}

impl Default for ConnectionTracker {
    fn default() -> Self {
        Self(Rc::new(Inner {
            phase: Cell::new(DrainPhase::Serving),
            next: Cell::new(0),
            members: RefCell::default(),
            none: Notify::new(),
        }))
    }
}

impl ConnectionTracker {
    /// The present phase.
    pub fn phase(&self) -> DrainPhase {
        self.0.phase.get()
    }

    /// Moves on to `phase` and wakes every member.
    pub fn advance(&self, phase: DrainPhase) {
        self.0.phase.set(phase.max(self.0.phase.get()));
        for waker in self.0.members.borrow().values().flatten() {
            waker.wake_by_ref();
        }
    }

    /// One member more, until the result is dropped.
    pub fn track(&self) -> TrackedConnection {
        let number = self.0.next.get();
        self.0.next.set(number + 1);
        self.0.members.borrow_mut().insert(number, None);
        TrackedConnection { connections: self.clone(), number, listening: Cell::new(false) }
    }

    /// Returns when there is no member left.
    pub async fn all_closed(&self) {
        while !self.0.members.borrow().is_empty() {
            self.0.none.notified().await;
        }
    }
}

/// One open connection.
pub struct TrackedConnection {
    connections: ConnectionTracker,
    number: u64,
    listening: Cell<bool>,
}

impl TrackedConnection {
    /// The present phase; the task that asks is woken when it changes. A member stays in one task for its life.
    pub fn phase(&self, cx: &Context<'_>) -> DrainPhase {
        if !self.listening.replace(true) {
            self.connections.0.members.borrow_mut().insert(self.number, Some(cx.waker().clone()));
        }
        self.connections.phase()
    }
}

impl Drop for TrackedConnection {
    fn drop(&mut self) {
        let mut members = self.connections.0.members.borrow_mut();
        members.remove(&self.number);
        if members.is_empty() {
            self.connections.0.none.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::task::Poll;

    #[tokio::test]
    async fn members_are_woken_and_the_last_one_ends_the_wait() {
        let connections = ConnectionTracker::default();
        let member = connections.track();
        let closing = poll_fn(|cx| match member.phase(cx) {
            DrainPhase::Closing | DrainPhase::Over => Poll::Ready(()),
            DrainPhase::Serving | DrainPhase::Leaving => Poll::Pending,
        });
        let advance = async { connections.advance(DrainPhase::Closing) };
        tokio::join!(closing, advance);
        drop(member);
        connections.all_closed().await;
    }

    #[tokio::test]
    async fn the_switch_never_goes_back() {
        let drain = Drain::default();
        let signal = drain.signal();
        assert!(drain.advance(DrainPhase::Closing));
        assert!(!drain.advance(DrainPhase::Leaving));
        signal.reached(DrainPhase::Leaving).await;
        assert_eq!(drain.phase(), DrainPhase::Closing);
    }
}
