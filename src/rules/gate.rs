//! How many calls of one destination are under way, and who waits for a turn: the live side of `limits`.
//!
//! One gate per destination, shared by all workers; it lives through reloads. A changed limit holds at once, also for
//! those who wait, and nobody in flight is forgotten.
//! It reads no clock: whoever waits at it brings the time limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed, Ordering::SeqCst};

use tokio::sync::Notify;

/// The queue had no place left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the queue is full")]
pub struct QueueFull;

/// The gate of one destination.
#[derive(Debug)]
pub struct Gate {
    limit: AtomicU32,
    in_flight: AtomicU32,
    waiting: AtomicU32,
    turn: Notify,
}

/// The right to one call; dropping it lets the next one in.
#[derive(Debug)]
pub struct Pass(Arc<Gate>);

impl Gate {
    /// A gate that lets so many calls in at a time.
    pub fn new(limit: u32) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicU32::new(limit),
            in_flight: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            turn: Notify::new(),
        })
    }

    /// Changes how many calls are let in at a time.
    pub fn set_limit(&self, limit: u32) {
        self.limit.store(limit, SeqCst);
        self.call_next();
    }

    /// Calls under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Calls that wait for a turn.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Relaxed)
    }

    /// A pass at once, if fewer calls than the limit are under way and nobody waits.
    pub fn try_enter(self: &Arc<Self>) -> Option<Pass> {
        if self.waiting.load(SeqCst) > 0 {
            return None;
        }
        self.take()
    }

    /// A pass as soon as there is one; at most `queue` calls wait at a time.
    ///
    /// Dropping the future gives the place in the queue back.
    pub async fn enter(self: &Arc<Self>, queue: u32) -> Result<Pass, QueueFull> {
        let place = Place::in_queue(self, queue)?;
        loop {
            let turn = self.turn.notified();
            if let Some(pass) = self.take() {
                drop(place);
                // There may be room for one more, after the limit was raised.
                self.call_next();
                return Ok(pass);
            }
            turn.await;
        }
    }

    fn take(self: &Arc<Self>) -> Option<Pass> {
        let limit = self.limit.load(SeqCst);
        self.in_flight
            .fetch_update(SeqCst, SeqCst, |now| (now < limit).then_some(now + 1))
            .ok()
            .map(|_| Pass(Arc::clone(self)))
    }

    /// Calls the next one who waits, if there is room. Nobody is called in vain, because whoever finds no room stands at
    /// the end of the queue again.
    fn call_next(&self) {
        if self.waiting.load(SeqCst) > 0 && self.in_flight.load(SeqCst) < self.limit.load(SeqCst) {
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

    const MOMENT: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn calls_enter_up_to_the_limit_then_queue_then_are_refused() {
        let gate = Gate::new(1);
        let first = gate.try_enter().unwrap();
        assert!(gate.try_enter().is_none());
        let waiting = gate.enter(1);
        tokio::pin!(waiting);
        assert!(timeout(MOMENT, &mut waiting).await.is_err());
        assert_eq!((gate.in_flight(), gate.waiting()), (1, 1));
        assert_eq!(gate.enter(1).await.unwrap_err(), QueueFull);
        drop(first);
        let second = waiting.await.unwrap();
        assert_eq!((gate.in_flight(), gate.waiting()), (1, 0));
        drop(second);
        assert_eq!(gate.in_flight(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_gives_up_waiting_leaves_the_queue() {
        let gate = Gate::new(1);
        let first = gate.try_enter().unwrap();
        assert!(timeout(MOMENT, gate.enter(4)).await.is_err());
        assert_eq!(gate.waiting(), 0);
        drop(first);
        assert!(gate.try_enter().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_raised_limit_lets_in_all_who_fit() {
        let gate = Gate::new(1);
        let _first = gate.try_enter().unwrap();
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(gate.enter(8))).collect();
        for one in &mut waiting {
            assert!(timeout(MOMENT, one).await.is_err());
        }
        gate.set_limit(3);
        let mut inside = Vec::new();
        for one in &mut waiting[..2] {
            inside.push(timeout(MOMENT, one).await.unwrap().unwrap());
        }
        assert!(timeout(MOMENT, &mut waiting[2]).await.is_err());
        assert_eq!((gate.in_flight(), gate.waiting()), (3, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn places_are_handed_over_in_the_order_of_arrival() {
        let gate = Gate::new(1);
        let mut inside = gate.try_enter();
        let mut waiting: Vec<_> = (0..5).map(|_| Box::pin(gate.enter(8))).collect();
        for one in &mut waiting {
            assert!(timeout(MOMENT, one).await.is_err());
        }
        for one in &mut waiting {
            drop(inside.take());
            inside = Some(timeout(MOMENT, one).await.unwrap().unwrap());
        }
    }

    #[test]
    fn a_lowered_limit_holds_for_the_next_call() {
        let gate = Gate::new(5);
        let passes: Vec<_> = (0..5).map(|_| gate.try_enter().unwrap()).collect();
        gate.set_limit(2);
        assert!(gate.try_enter().is_none());
        drop(passes);
        assert!(gate.try_enter().is_some());
    }
}
