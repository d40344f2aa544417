//! Waking up less often when much is under way over few connections.
//!
//! A worker that has nothing to do sleeps until the kernel has something for it. Under HTTP/2, where many calls share a
//! connection, that is after every frame or two, and a third of its CPU goes into falling asleep, waking up, and reading
//! and writing a little at a time. Network cards have the same trouble with interrupts, and the same cure, *interrupt
//! coalescing*: wait a moment, then do at once all that has come.
//!
//! What it promises:
//! - A worker naps before it looks for work only while it has 32 HTTP/2 streams or more. Over HTTP/1.1 every call
//!   is read and written on its own, so there is nothing to save.
//! - It naps on only while there is as much work after a nap as the nap takes. Otherwise it does not try again for
//!   50 ms, so many silent streams beside one busy caller cost that caller a hundredth of its speed.
//! - A nap takes 20 us and the timer slack of the thread, which is 50 us unless the system says otherwise. A call meets
//!   one on its way and one on the way back.

use std::cell::{Cell, RefCell};
use std::thread;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::time::Instant;

/// How long a nap takes, without the timer slack.
const NAP: Duration = Duration::from_micros(20);

/// HTTP/2 streams under way on one thread from which on it may nap.
const MANY: u32 = 32;

/// Naps after which it is judged whether they gather enough.
const SAMPLE: u32 = 8;

/// Work between two naps that makes them worth their time, on average.
const WORTH: Duration = Duration::from_micros(50);

/// How long a thread does not nap after naps gathered too little.
const REST: Duration = Duration::from_millis(50);

thread_local! {
    static STREAMS: Cell<u32> = const { Cell::new(0) };
    static PACE: RefCell<Pace> = const { RefCell::new(Pace::new()) };
}

/// Has threads of this runtime nap; `napped` is called for each nap.
pub fn install(runtime: &mut Builder, napped: impl Fn() + Send + Sync + 'static) {
    runtime.on_thread_park(move || {
        if STREAMS.get() >= MANY && PACE.with_borrow_mut(|pace| pace.is_to_nap(Instant::now())) {
            napped();
            thread::sleep(NAP);
        }
    });
    runtime.on_thread_unpark(|| PACE.with_borrow_mut(|pace| pace.woke = Some(Instant::now())));
}

/// One HTTP/2 stream that is under way on this thread, until it is dropped there.
pub struct ActiveStream(());

impl ActiveStream {
    /// A stream that begins.
    pub fn begin() -> Self {
        STREAMS.set(STREAMS.get().saturating_add(1));
        Self(())
    }
}

impl Drop for ActiveStream {
    fn drop(&mut self) {
        STREAMS.set(STREAMS.get().saturating_sub(1));
    }
}

/// What one thread knows of its naps.
struct Pace {
    /// When it woke up; unknown before the first time.
    woke: Option<Instant>,
    /// No nap before this.
    rests_until: Option<Instant>,
    /// Of the present sample: naps, and the work before each.
    naps: u32,
    worked: Duration,
}

impl Pace {
    const fn new() -> Self {
        Self { woke: None, rests_until: None, naps: 0, worked: Duration::ZERO }
    }

    /// The thread has many streams, and nothing left to do at `now`.
    fn is_to_nap(&mut self, now: Instant) -> bool {
        if self.rests_until.is_some_and(|until| now < until) {
            return false;
        }
        self.naps += 1;
        self.worked += self.woke.map_or(Duration::ZERO, |woke| now.saturating_duration_since(woke));
        if self.naps < SAMPLE {
            return true;
        }
        let is_worth = self.worked >= WORTH * SAMPLE;
        (self.naps, self.worked) = (0, Duration::ZERO);
        if !is_worth {
            self.rests_until = Some(now + REST);
        }
        is_worth
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread with many streams that wakes up `turns` times and works for `work` each time: how often it naps.
    fn naps(pace: &mut Pace, now: &mut Instant, turns: u32, work: Duration) -> u32 {
        let mut naps = 0;
        for _ in 0..turns {
            pace.woke = Some(*now);
            *now += work;
            naps += u32::from(pace.is_to_nap(*now));
        }
        naps
    }

    #[test]
    fn naps_go_on_while_they_gather_work() {
        let (mut now, mut pace) = (Instant::now(), Pace::new());
        assert_eq!(naps(&mut pace, &mut now, 1000, WORTH), 1000);
    }

    #[test]
    fn naps_that_gather_little_are_tried_again_only_after_a_rest() {
        let (mut now, mut pace) = (Instant::now(), Pace::new());
        let little = WORTH / 5;
        // 10 us of work a turn: one sample of naps, the last of which is left out, and then 5,000 turns of rest.
        assert_eq!(naps(&mut pace, &mut now, SAMPLE + 4_999, little), SAMPLE - 1);
        assert_eq!(naps(&mut pace, &mut now, SAMPLE, little), SAMPLE - 1);
    }

    #[test]
    fn a_thread_that_never_woke_up_has_done_no_work() {
        let (now, mut pace) = (Instant::now(), Pace::new());
        let naps = (0..SAMPLE).filter(|_| pace.is_to_nap(now)).count();
        assert_eq!(naps, SAMPLE as usize - 1);
        assert!(!pace.is_to_nap(now), "it rests");
    }

    #[test]
    fn a_stream_counts_until_it_is_dropped() {
        let streams = [ActiveStream::begin(), ActiveStream::begin()];
        assert_eq!(STREAMS.get(), 2);
        drop(streams);
        assert_eq!(STREAMS.get(), 0);
    }
}
