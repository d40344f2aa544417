//! How many calls of one destination are under way, and who waits for a turn: the live side of `limits`.
//!
//! One gate per destination, shared by all workers; it lives through reloads, and the limits are passed in
//! with each call, so that a changed limit holds for the next call without forgetting one in flight.
//! It reads no clock: whoever waits at it brings the time limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed, Ordering::SeqCst};

use tokio::sync::Notify;

/// The queue had no place left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the queue is full")]
pub struct QueueFull;

/// The gate of one destination.
#[derive(Debug, Default)]
pub struct Gate {
    in_flight: AtomicU32,
    waiting: AtomicU32,
    turn: Notify,
}

/// The right to one call; dropping it lets the next one in.
#[derive(Debug)]
pub struct Pass(Arc<Gate>);

impl Gate {
    /// Calls under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Calls that wait for a turn.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Relaxed)
    }

    /// A pass at once, if fewer than `limit` calls are under way and nobody waits.
    pub fn try_enter(self: &Arc<Self>, limit: u32) -> Option<Pass> {
        if self.waiting.load(SeqCst) > 0 {
            return None;
        }
        self.take(limit)
    }

    /// A pass as soon as there is one; at most `queue` calls wait at a time.
    ///
    /// Dropping the future gives the place in the queue back.
    pub async fn enter(self: &Arc<Self>, limit: u32, queue: u32) -> Result<Pass, QueueFull> {
        let place = Place::in_queue(self, queue)?;
        loop {
            let turn = self.turn.notified();
            if let Some(pass) = self.take(limit) {
                drop(place);
                // There may be room for one more after the limit was raised. Nobody is called in vain, because whoever
                // finds no room stands at the end of the queue again.
                if self.in_flight.load(SeqCst) < limit {
                    self.call_next();
                }
                return Ok(pass);
            }
            turn.await;
        }
    }

    fn take(self: &Arc<Self>, limit: u32) -> Option<Pass> {
        self.in_flight
            .fetch_update(SeqCst, SeqCst, |now| (now < limit).then_some(now + 1))
            .ok()
            .map(|_| Pass(Arc::clone(self)))
    }

    fn call_next(&self) {
        if self.waiting.load(SeqCst) > 0 {
            self.turn.notify_one();
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, SeqCst);
        self.0.call_next();
    }
}

struct Place<'a>(&'a Gate);

impl<'a> Place<'a> {
    fn in_queue(gate: &'a Gate, limit: u32) -> Result<Self, QueueFull> {
        gate.waiting
            .fetch_update(SeqCst, SeqCst, |now| (now < limit).then_some(now + 1))
            .map(|_| Self(gate))
            .map_err(|_| QueueFull)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test(start_paused = true)]
    async fn calls_enter_up_to_the_limit_then_queue_then_are_refused() {
        let gate = Arc::new(Gate::default());
        let first = gate.try_enter(1).unwrap();
        assert!(gate.try_enter(1).is_none());
        let waiting = gate.enter(1, 1);
        tokio::pin!(waiting);
        assert!(timeout(Duration::from_millis(1), &mut waiting).await.is_err());
        assert_eq!((gate.in_flight(), gate.waiting()), (1, 1));
        assert_eq!(gate.enter(1, 1).await.unwrap_err(), QueueFull);
        drop(first);
        let second = waiting.await.unwrap();
        assert_eq!((gate.in_flight(), gate.waiting()), (1, 0));
        drop(second);
        assert_eq!(gate.in_flight(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_gives_up_waiting_leaves_the_queue() {
        let gate = Arc::new(Gate::default());
        let first = gate.try_enter(1).unwrap();
        assert!(timeout(Duration::from_millis(5), gate.enter(1, 4)).await.is_err());
        assert_eq!(gate.waiting(), 0);
        drop(first);
        assert!(gate.try_enter(1).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_raised_limit_lets_those_in_who_wait() {
        let gate = Arc::new(Gate::default());
        let first = gate.try_enter(1).unwrap();
        let (mut low, mut high) = (Box::pin(gate.enter(1, 8)), Box::pin(gate.enter(3, 8)));
        assert!(timeout(Duration::from_millis(1), &mut low).await.is_err());
        let second = high.as_mut().await.unwrap();
        assert_eq!(gate.in_flight(), 2);
        drop((first, second));
        low.await.unwrap();
    }

    #[test]
    fn a_lowered_limit_holds_for_the_next_call() {
        let gate = Arc::new(Gate::default());
        let passes: Vec<_> = (0..5).map(|_| gate.try_enter(5).unwrap()).collect();
        assert!(gate.try_enter(2).is_none());
        drop(passes);
        assert!(gate.try_enter(2).is_some());
    }
}
