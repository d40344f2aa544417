//! How many calls of one destination are under way, and who waits for a turn: the live side of `limits`.
//!
//! One gate per destination, shared by all workers; it lives through reloads. A changed limit holds at once, also for
//! those who wait, and nobody in flight is forgotten.
//! It reads no clock: whoever waits at it brings the time limit.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The queue had no place left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the queue is full")]
pub struct QueueFull;

/// The gate of one destination.
#[derive(Debug)]
pub struct ConcurrencyLimit {
    limit: AtomicU32,
    in_flight: AtomicU32,
    /// As many as stand in the queue; looked at without its lock.
    waiting: AtomicU32,
    queue: Mutex<VecDeque<oneshot::Sender<ConcurrencyPermit>>>,
}

/// The right to one call; dropping it lets the next one in.
#[derive(Debug)]
pub struct ConcurrencyPermit(Arc<ConcurrencyLimit>);

impl ConcurrencyLimit {
    /// A gate that lets so many calls in at a time.
    pub fn new(limit: u32) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicU32::new(limit),
            in_flight: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            queue: Mutex::default(),
        })
    }

    /// Changes how many calls are let in at a time.
    pub fn set_limit(self: &Arc<Self>, limit: u32) {
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
    pub fn try_enter(self: &Arc<Self>) -> Option<ConcurrencyPermit> {
        if self.waiting.load(SeqCst) > 0 {
            return None;
        }
        self.take()
    }

    /// A pass as soon as there is one; at most `queue` calls wait at a time.
    ///
    /// Whoever waits longest is handed the next pass, so that nobody who comes in between can take it. Dropping the future
    /// gives the place in the queue back.
    pub async fn enter(self: &Arc<Self>, queue: u32) -> Result<ConcurrencyPermit, QueueFull> {
        let mut place = self.line_up(queue)?;
        // A pass that was given back before we stood in the queue was handed to nobody.
        self.call_next();
        // The sender stays in the queue until it has sent.
        let pass = (&mut place.turn).await.map_err(|_gone| QueueFull);
        place.is_over = true;
        pass
    }

    fn line_up(self: &Arc<Self>, limit: u32) -> Result<QueueSlot, QueueFull> {
        let mut queue = self.queue();
        // Somebody may be about to hand a place over, or to leave.
        let spare = (queue.len() >= limit as usize).then(|| self.hand_over(&mut queue)).flatten();
        let is_full = queue.len() >= limit as usize;
        let (sender, turn) = oneshot::channel();
        if !is_full {
            queue.push_back(sender);
        }
        self.count(&queue);
        drop(queue);
        drop(spare);
        if is_full { Err(QueueFull) } else { Ok(QueueSlot { gate: Arc::clone(self), turn, is_over: false }) }
    }

    fn take(self: &Arc<Self>) -> Option<ConcurrencyPermit> {
        let limit = self.limit.load(SeqCst);
        self.in_flight
            .fetch_update(SeqCst, SeqCst, |now| (now < limit).then_some(now + 1))
            .ok()
            .map(|_| ConcurrencyPermit(Arc::clone(self)))
    }

    /// Hands passes to those who wait, as far as there is room.
    fn call_next(self: &Arc<Self>) {
        if self.waiting.load(SeqCst) == 0 {
            return;
        }
        let mut queue = self.queue();
        let spare = self.hand_over(&mut queue);
        self.count(&queue);
        drop(queue);
        drop(spare);
    }

    /// The same with the queue at hand. What nobody wanted is to be dropped when the queue is unlocked, because giving back
    /// looks at the queue.
    fn hand_over(
        self: &Arc<Self>,
        queue: &mut VecDeque<oneshot::Sender<ConcurrencyPermit>>,
    ) -> Option<ConcurrencyPermit> {
        let mut spare = None;
        while let Some(next) = queue.pop_front() {
            let Some(pass) = spare.take().or_else(|| self.take()) else {
                queue.push_front(next);
                break;
            };
            spare = next.send(pass).err();
        }
        spare
    }

    fn count(&self, queue: &VecDeque<oneshot::Sender<ConcurrencyPermit>>) {
        self.waiting.store(u32::try_from(queue.len()).unwrap_or(u32::MAX), SeqCst);
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<oneshot::Sender<ConcurrencyPermit>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ConcurrencyPermit {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, SeqCst);
        self.0.call_next();
    }
}

/// A place in the queue.
struct QueueSlot {
    gate: Arc<ConcurrencyLimit>,
    turn: oneshot::Receiver<ConcurrencyPermit>,
    /// The pass has come.
    is_over: bool,
}

impl Drop for QueueSlot {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        self.turn.close();
        // What was handed over and not taken goes to the next.
        drop(self.turn.try_recv());
        let mut queue = self.gate.queue();
        queue.retain(|one| !one.is_closed());
        self.gate.count(&queue);
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
        let gate = ConcurrencyLimit::new(1);
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
        let gate = ConcurrencyLimit::new(1);
        let first = gate.try_enter().unwrap();
        assert!(timeout(MOMENT, gate.enter(4)).await.is_err());
        assert_eq!(gate.waiting(), 0);
        drop(first);
        assert!(gate.try_enter().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_raised_limit_lets_in_all_who_fit() {
        let gate = ConcurrencyLimit::new(1);
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
        let gate = ConcurrencyLimit::new(1);
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

    #[tokio::test(start_paused = true)]
    async fn nobody_overtakes_the_queue_while_a_place_is_handed_over() {
        let gate = ConcurrencyLimit::new(1);
        let first = gate.try_enter().unwrap();
        let (mut oldest, mut next) = (Box::pin(gate.enter(8)), Box::pin(gate.enter(8)));
        assert!(timeout(MOMENT, &mut oldest).await.is_err());
        assert!(timeout(MOMENT, &mut next).await.is_err());
        drop(first);
        assert!(gate.try_enter().is_none(), "the place is the oldest one's");
        let mut late = Box::pin(gate.enter(8));
        assert!(timeout(MOMENT, &mut late).await.is_err());
        let pass = timeout(MOMENT, oldest).await.unwrap().unwrap();
        assert!(timeout(MOMENT, &mut next).await.is_err());
        drop(pass);
        // Whoever does not take what it was handed leaves it to the next.
        drop(next);
        let _pass = timeout(MOMENT, late).await.unwrap().unwrap();
        assert_eq!((gate.in_flight(), gate.waiting()), (1, 0));
    }

    #[test]
    fn a_lowered_limit_holds_for_the_next_call() {
        let gate = ConcurrencyLimit::new(5);
        let passes: Vec<_> = (0..5).map(|_| gate.try_enter().unwrap()).collect();
        gate.set_limit(2);
        assert!(gate.try_enter().is_none());
        drop(passes);
        assert!(gate.try_enter().is_some());
    }
}
