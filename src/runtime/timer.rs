//! Timers that are used again.
//!
//! Registering a timer with the runtime costs more than moving one that is registered already to a later
//! time, which is what almost every exchange does: it borrows a timer that the exchange before it has left.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::time::{Instant, Sleep, sleep_until};

/// Timers kept for later on one worker; more than these are dropped.
const KEPT: usize = 1024;

/// The timers of one worker.
#[derive(Clone, Default)]
pub struct Timers {
    free: Rc<RefCell<Vec<Pin<Box<Sleep>>>>>,
}

impl Timers {
    /// A timer set to `at`.
    pub fn at(&self, at: Instant) -> Timer {
        let kept = self.free.borrow_mut().pop();
        let sleep = match kept {
            Some(mut sleep) => {
                sleep.as_mut().reset(at);
                sleep
            }
            None => Box::pin(sleep_until(at)),
        };
        Timer { sleep: Some(sleep), home: self.clone() }
    }
}

/// One timer; goes back to its worker's store when dropped.
pub struct Timer {
    /// Present until drop.
    sleep: Option<Pin<Box<Sleep>>>,
    home: Timers,
}

impl Timer {
    /// Moves the timer; it rings at `at`, also if it rang before.
    pub fn set(&mut self, at: Instant) {
        if let Some(sleep) = &mut self.sleep
            && sleep.deadline() != at
        {
            sleep.as_mut().reset(at);
        }
    }

    /// The future's output, or `None` if it is not there at `until`. Touches the timer only if the future has to wait.
    pub async fn limit<F: Future>(&mut self, until: Instant, future: F) -> Option<F::Output> {
        let mut future = pin!(future);
        let mut set = false;
        poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Some(output));
            }
            if !set {
                set = true;
                self.set(until);
            }
            self.poll(cx).map(|()| None)
        })
        .await
    }

    /// Ready when the time has come.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.sleep {
            Some(sleep) => sleep.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let mut free = self.home.free.borrow_mut();
        if free.len() < KEPT
            && let Some(sleep) = self.sleep.take()
        {
            free.push(sleep);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn a_timer_used_again_rings_at_its_new_time() {
        let timers = Timers::default();
        for seconds in [5, 1, 9] {
            let begun = Instant::now();
            let mut timer = timers.at(begun + Duration::from_secs(seconds));
            poll_fn(|cx| timer.poll(cx)).await;
            assert_eq!(begun.elapsed().as_secs(), seconds);
        }
        assert_eq!(timers.free.borrow().len(), 1);
    }
}
