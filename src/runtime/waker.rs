//! A waker that does not wake the task that is being polled.
//!
//! A caller's task drives its upstream connection itself. The two ends of hyper's channels then wake each other inside
//! one poll, and each such wake-up would poll the whole task once more for work that is being done already. Such a wake-up
//! repeats the step on the spot; wake-ups from outside a poll (sockets, timers) reach the task.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, Wake, Waker};

/// How often a step is polled in a row before the task is woken after all, so that other tasks get their turn.
const MAX_POLLS: usize = 3;

/// The waker that one task passes to the connection it drives.
#[derive(Default)]
pub struct InlineWaker(RefCell<Option<Rc<TaskWaker>>>);

/// The waker made for one task, and the state behind it.
struct TaskWaker {
    state: Arc<WakeState>,
    waker: Waker,
}

struct WakeState {
    task: Waker,
    /// True while the step is polled: a wake-up sets `woken` instead of waking the task.
    polling: AtomicBool,
    woken: AtomicBool,
}

impl Wake for WakeState {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.polling.load(Relaxed) {
            self.woken.store(true, Relaxed);
        } else {
            self.task.wake_by_ref();
        }
    }
}

impl InlineWaker {
    /// Polls `step`; a step that wakes itself and is not ready is polled again at once, up to three times in all.
    pub fn poll<T>(&self, cx: &Context<'_>, mut step: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        let TaskWaker { state, waker } = &*self.for_task(cx);
        let mut inline = Context::from_waker(waker);
        state.polling.store(true, Relaxed);
        for _ in 0..MAX_POLLS {
            state.woken.store(false, Relaxed);
            let polled = step(&mut inline);
            if polled.is_ready() || !state.woken.load(Relaxed) {
                state.polling.store(false, Relaxed);
                return polled;
            }
        }
        state.polling.store(false, Relaxed);
        state.task.wake_by_ref();
        Poll::Pending
    }

    /// Wakes the task of the last poll, from outside of a poll.
    pub fn wake(&self) {
        if let Some(task) = &*self.0.borrow() {
            task.state.task.wake_by_ref();
        }
    }

    /// Runs `work` and discards its wake-ups. Only for work whose connection is polled right after it.
    pub fn without_wakes<T>(&self, cx: &Context<'_>, work: impl FnOnce(&mut Context<'_>) -> T) -> T {
        let TaskWaker { state, waker } = &*self.for_task(cx);
        state.polling.store(true, Relaxed);
        let done = work(&mut Context::from_waker(waker));
        state.polling.store(false, Relaxed);
        done
    }

    /// The waker for the task of `cx`: the one made before, unless the task has changed.
    fn for_task(&self, cx: &Context<'_>) -> Rc<TaskWaker> {
        let mut cached = self.0.borrow_mut();
        if let Some(known) = &*cached
            && known.state.task.will_wake(cx.waker())
        {
            return Rc::clone(known);
        }
        let state = Arc::new(WakeState {
            task: cx.waker().clone(),
            polling: AtomicBool::new(false),
            woken: AtomicBool::new(false),
        });
        let waker = Waker::from(Arc::clone(&state));
        let made = Rc::new(TaskWaker { state, waker });
        *cached = Some(Rc::clone(&made));
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct CountingWaker(AtomicUsize);

    impl Wake for CountingWaker {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn a_step_that_wakes_itself_is_polled_again_without_waking_the_task() {
        let task = Arc::new(CountingWaker::default());
        let waker = Waker::from(Arc::clone(&task));
        let cx = Context::from_waker(&waker);
        let inline = InlineWaker::default();
        let mut steps = 0;
        let polled = inline.poll(&cx, |cx| {
            steps += 1;
            cx.waker().wake_by_ref();
            if steps == 2 { Poll::Ready(()) } else { Poll::Pending }
        });
        assert_eq!((polled, steps, task.0.load(Relaxed)), (Poll::Ready(()), 2, 0));
    }

    #[test]
    fn wake_ups_from_outside_a_poll_and_endless_ones_reach_the_task() {
        let task = Arc::new(CountingWaker::default());
        let waker = Waker::from(Arc::clone(&task));
        let cx = Context::from_waker(&waker);
        let inline = InlineWaker::default();
        let mut kept = None;
        let _pending = inline.poll(&cx, |cx| {
            kept = Some(cx.waker().clone());
            Poll::<()>::Pending
        });
        assert_eq!(task.0.load(Relaxed), 0);
        kept.unwrap().wake();
        assert_eq!(task.0.load(Relaxed), 1);
        let endless = inline.poll(&cx, |cx| {
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        });
        assert_eq!((endless, task.0.load(Relaxed)), (Poll::Pending, 2));
    }
}
