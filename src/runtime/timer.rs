//! A pool of timers for one worker.
//!
//! Registering a timer with the runtime costs more than resetting a registered one to a later time, and almost every
//! exchange needs a timer: it takes one that an earlier exchange has returned. A [`Timer`] returns to its pool on drop.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::time::{Instant, Sleep, sleep_until};

/// Unused timers kept per worker; a timer returned beyond that is dropped.
const MAX_FREE: usize = 1024;

/// The timers of one worker.
#[derive(Clone, Default)]
pub struct Timers {
    free: Rc<RefCell<Vec<Pin<Box<Sleep>>>>>,
}

impl Timers {
    /// A timer that fires at `at`.
    pub fn at(&self, at: Instant) -> Timer {
        let free = self.free.borrow_mut().pop();
        let sleep = match free {
            Some(mut sleep) => {
                sleep.as_mut().reset(at);
                sleep
            }
            None => Box::pin(sleep_until(at)),
        };
        Timer { sleep: Some(sleep), pool: self.clone() }
    }
}

/// One timer; returns to its worker's pool on drop.
pub struct Timer {
    /// Present until drop.
    sleep: Option<Pin<Box<Sleep>>>,
    pool: Timers,
}

impl Timer {
    /// Resets the timer: it fires at `at`, even if it has fired before.
    pub fn set(&mut self, at: Instant) {
        if let Some(sleep) = &mut self.sleep
            && sleep.deadline() != at
        {
            sleep.as_mut().reset(at);
        }
    }

    /// The future's output, or `None` if `until` passes first. Resets the timer only if the future is not ready at once.
    pub async fn timeout_at<F: Future>(&mut self, until: Instant, future: F) -> Option<F::Output> {
        let mut future = pin!(future);
        let mut is_set = false;
        poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Some(output));
            }
            if !is_set {
                is_set = true;
                self.set(until);
            }
            self.poll(cx).map(|()| None)
        })
        .await
    }

    /// Ready once the time has passed.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.sleep {
            Some(sleep) => sleep.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let mut free = self.pool.free.borrow_mut();
        if free.len() < MAX_FREE
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
    async fn a_reused_timer_fires_at_its_new_time() {
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
