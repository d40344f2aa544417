//! Virtual time: tasks, and a queue of moments at which one of them goes on. Nothing sleeps: when no task can go on, the clock
//! jumps to the next moment. Two moments that are equal come in the order in which they were asked for, so that a run depends
//! on its seed alone.

use std::cell::{Cell, RefCell};
use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use tokio::time::Instant;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// The clock, and whoever waits for it.
pub(crate) struct Clock {
    begin: Instant,
    now: Cell<Instant>,
    alarms: RefCell<BinaryHeap<Reverse<Alarm>>>,
    asked: Cell<u64>,
    tasks: RefCell<Vec<(Option<Task>, Waker)>>,
    free: RefCell<Vec<usize>>,
    ready: Ready,
}

type Ready = Arc<Mutex<VecDeque<usize>>>;

struct Alarm {
    at: Instant,
    order: u64,
    waker: Waker,
}

struct Bell {
    task: usize,
    ready: Ready,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ready.lock().unwrap().push_back(self.task);
    }
}

impl Clock {
    pub(crate) fn new() -> Self {
        let begin = Instant::now();
        Self {
            begin,
            now: Cell::new(begin),
            alarms: RefCell::default(),
            asked: Cell::new(0),
            tasks: RefCell::default(),
            free: RefCell::default(),
            ready: Ready::default(),
        }
    }

    pub(crate) fn now(&self) -> Instant {
        self.now.get()
    }

    /// Since the run began.
    pub(crate) fn passed(&self) -> Duration {
        self.now() - self.begin
    }

    pub(crate) fn begin(&self) -> Instant {
        self.begin
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let mut tasks = self.tasks.borrow_mut();
        let place = self.free.borrow_mut().pop().unwrap_or_else(|| {
            let bell = Arc::new(Bell { task: tasks.len(), ready: Arc::clone(&self.ready) });
            tasks.push((None, Waker::from(bell)));
            tasks.len() - 1
        });
        tasks[place].0 = Some(Box::pin(task));
        self.ready.lock().unwrap().push_back(place);
    }

    /// Runs until no task is left, or none can ever go on. Returns how many these are.
    pub(crate) fn run(&self) -> usize {
        loop {
            while let Some(place) = self.next_ready() {
                self.poll(place);
            }
            let Some(Reverse(alarm)) = self.alarms.borrow_mut().pop() else { break };
            self.now.set(alarm.at);
            alarm.waker.wake();
        }
        self.tasks.borrow().iter().filter(|(task, _)| task.is_some()).count()
    }

    fn next_ready(&self) -> Option<usize> {
        self.ready.lock().unwrap().pop_front()
    }

    fn poll(&self, place: usize) {
        let (task, waker) = {
            let slot = &mut self.tasks.borrow_mut()[place];
            (slot.0.take(), slot.1.clone())
        };
        // An alarm may ring for somebody who has gone.
        let Some(mut task) = task else { return };
        match task.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(()) => {
                drop(task);
                self.free.borrow_mut().push(place);
            }
            Poll::Pending => self.tasks.borrow_mut()[place].0 = Some(task),
        }
    }

    pub(crate) fn sleep(&self, time: Duration) -> Sleep<'_> {
        self.sleep_until(self.now() + time)
    }

    pub(crate) fn sleep_until(&self, at: Instant) -> Sleep<'_> {
        Sleep { clock: self, at, is_set: false }
    }

    /// What comes of a future before `at`; a future that is late is dropped.
    pub(crate) async fn within<F: Future>(&self, at: Instant, future: F) -> Option<F::Output> {
        let mut future = Box::pin(future);
        let mut sleep = self.sleep_until(at);
        std::future::poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Some(output));
            }
            Pin::new(&mut sleep).poll(cx).map(|()| None)
        })
        .await
    }
}

pub(crate) struct Sleep<'a> {
    clock: &'a Clock,
    at: Instant,
    is_set: bool,
}

impl Future for Sleep<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.clock.now() >= self.at {
            return Poll::Ready(());
        }
        if !self.is_set {
            self.is_set = true;
            let order = self.clock.asked.get();
            self.clock.asked.set(order + 1);
            let alarm = Alarm { at: self.at, order, waker: cx.waker().clone() };
            self.clock.alarms.borrow_mut().push(Reverse(alarm));
        }
        Poll::Pending
    }
}

impl Ord for Alarm {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

impl PartialOrd for Alarm {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Alarm {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Alarm {}
