//! A waker that does not wake the task that is running anyway.
//!
//! A caller's task moves its upstream connection itself. The two ends of hyper's channels then wake each other inside
//! one poll, and each such call would have the whole task polled once more, for nothing: what it was woken for is
//! already being done. Wakes that come from outside, from sockets and timers, pass.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, Wake, Waker};

/// How often work is repeated on the spot before the task is woken after all, so that other tasks get their turn.
const REPEATS: usize = 3;

/// The quiet waker of one task.
#[derive(Default)]
pub struct InlineWaker(RefCell<Option<Rc<Shielded>>>);

struct Shielded {
    shield: Arc<Shield>,
    waker: Waker,
}

struct Shield {
    task: Waker,
    running: AtomicBool,
    woken: AtomicBool,
}

impl Wake for Shield {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.running.load(Relaxed) {
            self.woken.store(true, Relaxed);
        } else {
            self.task.wake_by_ref();
        }
    }
}

impl InlineWaker {
    /// Polls `step`; where it wakes itself and is not ready, it is polled again on the spot.
    pub fn poll<T>(&self, cx: &Context<'_>, mut step: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        let Shielded { shield, waker } = &*self.of(cx);
        let mut quiet = Context::from_waker(waker);
        shield.running.store(true, Relaxed);
        for _ in 0..REPEATS {
            shield.woken.store(false, Relaxed);
            let polled = step(&mut quiet);
            if polled.is_ready() || !shield.woken.load(Relaxed) {
                shield.running.store(false, Relaxed);
                return polled;
            }
        }
        shield.running.store(false, Relaxed);
        shield.task.wake_by_ref();
        Poll::Pending
    }

    /// Does `work` whose wakes mean nothing, because what it wakes is polled right after it.
    pub fn without_wakes<T>(&self, cx: &Context<'_>, work: impl FnOnce(&mut Context<'_>) -> T) -> T {
        let Shielded { shield, waker } = &*self.of(cx);
        shield.running.store(true, Relaxed);
        let done = work(&mut Context::from_waker(waker));
        shield.running.store(false, Relaxed);
        done
    }

    fn of(&self, cx: &Context<'_>) -> Rc<Shielded> {
        let mut kept = self.0.borrow_mut();
        if let Some(known) = &*kept
            && known.shield.task.will_wake(cx.waker())
        {
            return Rc::clone(known);
        }
        let shield = Arc::new(Shield {
            task: cx.waker().clone(),
            running: AtomicBool::new(false),
            woken: AtomicBool::new(false),
        });
        let waker = Waker::from(Arc::clone(&shield));
        let made = Rc::new(Shielded { shield, waker });
        *kept = Some(Rc::clone(&made));
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Counting(AtomicUsize);

    impl Wake for Counting {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn a_task_that_wakes_itself_goes_on_without_being_woken() {
        let task = Arc::new(Counting::default());
        let waker = Waker::from(Arc::clone(&task));
        let cx = Context::from_waker(&waker);
        let quiet = InlineWaker::default();
        let mut steps = 0;
        let polled = quiet.poll(&cx, |cx| {
            steps += 1;
            cx.waker().wake_by_ref();
            if steps == 2 { Poll::Ready(()) } else { Poll::Pending }
        });
        assert_eq!((polled, steps, task.0.load(Relaxed)), (Poll::Ready(()), 2, 0));
    }

    #[test]
    fn wakes_from_outside_pass_and_endless_ones_are_handed_on() {
        let task = Arc::new(Counting::default());
        let waker = Waker::from(Arc::clone(&task));
        let cx = Context::from_waker(&waker);
        let quiet = InlineWaker::default();
        let mut kept = None;
        let _pending = quiet.poll(&cx, |cx| {
            kept = Some(cx.waker().clone());
            Poll::<()>::Pending
        });
        assert_eq!(task.0.load(Relaxed), 0);
        kept.unwrap().wake();
        assert_eq!(task.0.load(Relaxed), 1);
        let endless = quiet.poll(&cx, |cx| {
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        });
        assert_eq!((endless, task.0.load(Relaxed)), (Poll::Pending, 2));
    }
}
