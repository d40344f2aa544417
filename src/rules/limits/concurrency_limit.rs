//! Live state of `limits`: the calls of one destination in flight, and the queue for a permit.
//!
//! One concurrency limit per destination, shared by all workers; it survives reloads. A changed limit applies at once,
//! also to the queue, and calls in flight stay counted. It reads no clock: the caller bounds its wait.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the queue is full")]
pub struct QueueFull;

/// The concurrency limit of one destination.
#[derive(Debug)]
pub struct ConcurrencyLimit {
    limit: AtomicU32,
    in_flight: AtomicU32,
    /// Length of the queue, read without its lock.
    waiting: AtomicU32,
    queue: Mutex<VecDeque<oneshot::Sender<ConcurrencyPermit>>>,
}

/// Permit for one call; dropping it admits the next one.
#[derive(Debug)]
pub struct ConcurrencyPermit(Arc<ConcurrencyLimit>);

impl ConcurrencyLimit {
    /// A concurrency limit of this many calls in flight.
    pub fn new(limit: u32) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicU32::new(limit),
            in_flight: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            queue: Mutex::default(),
        })
    }

    /// Changes the limit.
    pub fn set_limit(self: &Arc<Self>, limit: u32) {
        self.limit.store(limit, SeqCst);
        self.admit_next();
    }

    /// Calls in flight.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Calls that wait for a permit.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Relaxed)
    }

    /// A permit, if the calls in flight are below the limit and the queue is empty.
    pub fn try_enter(self: &Arc<Self>) -> Option<ConcurrencyPermit> {
        if self.waiting.load(SeqCst) > 0 {
            return None;
        }
        self.acquire()
    }

    /// Waits for a permit; at most `queue` calls wait at a time.
    ///
    /// First in, first out: a freed permit is handed to the call at the head of the queue, so a later call cannot take
    /// it. Dropping the future leaves the queue.
    pub async fn enter(self: &Arc<Self>, queue: u32) -> Result<ConcurrencyPermit, QueueFull> {
        let mut slot = self.join_queue(queue)?;
        // A permit freed before we joined the queue was handed to no call.
        self.admit_next();
        // The sender stays in the queue until it has sent.
        let permit = (&mut slot.receiver).await.map_err(|_gone| QueueFull);
        slot.is_over = true;
        permit
    }

    fn join_queue(self: &Arc<Self>, limit: u32) -> Result<QueueSlot, QueueFull> {
        let mut queue = self.queue();
        // A permit may be on its way to the head of the queue, or a call may be leaving the queue.
        let spare = (queue.len() >= limit as usize).then(|| self.hand_over(&mut queue)).flatten();
        let is_full = queue.len() >= limit as usize;
        let (sender, receiver) = oneshot::channel();
        if !is_full {
            queue.push_back(sender);
        }
        self.store_length(&queue);
        drop(queue);
        drop(spare);
        if is_full { Err(QueueFull) } else { Ok(QueueSlot { limit: Arc::clone(self), receiver, is_over: false }) }
    }

    fn acquire(self: &Arc<Self>) -> Option<ConcurrencyPermit> {
        let limit = self.limit.load(SeqCst);
        self.in_flight
            .fetch_update(SeqCst, SeqCst, |now| (now < limit).then_some(now + 1))
            .ok()
            .map(|_| ConcurrencyPermit(Arc::clone(self)))
    }

    /// Hands permits to the queue as far as the limit allows.
    fn admit_next(self: &Arc<Self>) {
        if self.waiting.load(SeqCst) == 0 {
            return;
        }
        let mut queue = self.queue();
        let spare = self.hand_over(&mut queue);
        self.store_length(&queue);
        drop(queue);
        drop(spare);
    }

    /// The same under the queue's lock. Returns a permit that no call took; drop it after the unlock, because its
    /// `Drop` locks the queue.
    fn hand_over(
        self: &Arc<Self>,
        queue: &mut VecDeque<oneshot::Sender<ConcurrencyPermit>>,
    ) -> Option<ConcurrencyPermit> {
        let mut spare = None;
        while let Some(next) = queue.pop_front() {
            let Some(permit) = spare.take().or_else(|| self.acquire()) else {
                queue.push_front(next);
                break;
            };
            spare = next.send(permit).err();
        }
        spare
    }

    fn store_length(&self, queue: &VecDeque<oneshot::Sender<ConcurrencyPermit>>) {
        self.waiting.store(u32::try_from(queue.len()).unwrap_or(u32::MAX), SeqCst);
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<oneshot::Sender<ConcurrencyPermit>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ConcurrencyPermit {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, SeqCst);
        self.0.admit_next();
    }
}

/// A slot in the queue.
struct QueueSlot {
    limit: Arc<ConcurrencyLimit>,
    receiver: oneshot::Receiver<ConcurrencyPermit>,
    /// The permit has arrived.
    is_over: bool,
}

impl Drop for QueueSlot {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        self.receiver.close();
        // A permit that was handed over and not taken goes to the next call.
        drop(self.receiver.try_recv());
        let mut queue = self.limit.queue();
        queue.retain(|one| !one.is_closed());
        self.limit.store_length(&queue);
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
        let limit = ConcurrencyLimit::new(1);
        let first = limit.try_enter().unwrap();
        assert!(limit.try_enter().is_none());
        let waiting = limit.enter(1);
        tokio::pin!(waiting);
        assert!(timeout(MOMENT, &mut waiting).await.is_err());
        assert_eq!((limit.in_flight(), limit.waiting()), (1, 1));
        assert_eq!(limit.enter(1).await.unwrap_err(), QueueFull);
        drop(first);
        let second = waiting.await.unwrap();
        assert_eq!((limit.in_flight(), limit.waiting()), (1, 0));
        drop(second);
        assert_eq!(limit.in_flight(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_stops_waiting_leaves_the_queue() {
        let limit = ConcurrencyLimit::new(1);
        let first = limit.try_enter().unwrap();
        assert!(timeout(MOMENT, limit.enter(4)).await.is_err());
        assert_eq!(limit.waiting(), 0);
        drop(first);
        assert!(limit.try_enter().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_raised_limit_admits_waiting_calls_up_to_it() {
        let limit = ConcurrencyLimit::new(1);
        let _first = limit.try_enter().unwrap();
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(limit.enter(8))).collect();
        for one in &mut waiting {
            assert!(timeout(MOMENT, one).await.is_err());
        }
        limit.set_limit(3);
        let mut inside = Vec::new();
        for one in &mut waiting[..2] {
            inside.push(timeout(MOMENT, one).await.unwrap().unwrap());
        }
        assert!(timeout(MOMENT, &mut waiting[2]).await.is_err());
        assert_eq!((limit.in_flight(), limit.waiting()), (3, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn permits_are_handed_over_in_the_order_of_arrival() {
        let limit = ConcurrencyLimit::new(1);
        let mut inside = limit.try_enter();
        let mut waiting: Vec<_> = (0..5).map(|_| Box::pin(limit.enter(8))).collect();
        for one in &mut waiting {
            assert!(timeout(MOMENT, one).await.is_err());
        }
        for one in &mut waiting {
            drop(inside.take());
            inside = Some(timeout(MOMENT, one).await.unwrap().unwrap());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_call_overtakes_the_queue_while_a_permit_is_handed_over() {
        let limit = ConcurrencyLimit::new(1);
        let first = limit.try_enter().unwrap();
        let (mut oldest, mut next) = (Box::pin(limit.enter(8)), Box::pin(limit.enter(8)));
        assert!(timeout(MOMENT, &mut oldest).await.is_err());
        assert!(timeout(MOMENT, &mut next).await.is_err());
        drop(first);
        assert!(limit.try_enter().is_none(), "the permit belongs to the head of the queue");
        let mut late = Box::pin(limit.enter(8));
        assert!(timeout(MOMENT, &mut late).await.is_err());
        let permit = timeout(MOMENT, oldest).await.unwrap().unwrap();
        assert!(timeout(MOMENT, &mut next).await.is_err());
        drop(permit);
        // A permit that was handed over and not taken goes to the next call.
        drop(next);
        let _pass = timeout(MOMENT, late).await.unwrap().unwrap();
        assert_eq!((limit.in_flight(), limit.waiting()), (1, 0));
    }

    #[test]
    fn a_lowered_limit_holds_for_the_next_call() {
        let limit = ConcurrencyLimit::new(5);
        let permits: Vec<_> = (0..5).map(|_| limit.try_enter().unwrap()).collect();
        limit.set_limit(2);
        assert!(limit.try_enter().is_none());
        drop(permits);
        assert!(limit.try_enter().is_some());
    }
}
