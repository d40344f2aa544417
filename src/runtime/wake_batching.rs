//! Wake batching: a busy thread waits a moment before it polls, and handles more events per wake-up.
//!
//! An idle worker sleeps in epoll until the kernel has an event. Under HTTP/2, where many calls share a connection, it wakes
//! for every frame or two, and a third of its CPU goes into falling asleep, waking up, and reading and writing a little at a
//! time. Network cards solve the same problem with *interrupt coalescing*: wait a moment, then handle all events at once.
//!
//! Invariants:
//! - A thread delays its poll only while it has 32 HTTP/2 streams or more. Over HTTP/1.1 every call is read and written on
//!   its own, so there is nothing to batch.
//! - It goes on only while a batch brings as much work as the delay takes. Otherwise it pauses batching for 50 ms, so many
//!   silent streams beside one busy caller cost that caller 1 % of its speed.
//! - A delay takes 20 us plus the timer slack of the thread, 50 us unless the system sets another value. A call meets one
//!   delay as a request and one as a response.

use std::cell::{Cell, RefCell};
use std::thread;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::time::Instant;

/// How long a thread waits before it polls, without the timer slack.
const DELAY: Duration = Duration::from_micros(20);

/// Active HTTP/2 streams on one thread from which on it batches.
const MIN_STREAMS: u32 = 32;

/// Batches after which their work is compared with [`MIN_WORK`].
const SAMPLE: u32 = 8;

/// Average work per batch that pays for the delay.
const MIN_WORK: Duration = Duration::from_micros(50);

/// How long a thread does not batch after a sample with too little work.
const PAUSE: Duration = Duration::from_millis(50);

thread_local! {
    static STREAMS: Cell<u32> = const { Cell::new(0) };
    static BATCHING: RefCell<Batching> = const { RefCell::new(Batching::new()) };
}

/// Lets the threads of this runtime batch their wake-ups; `on_batch` is called before each delay.
pub fn install(runtime: &mut Builder, on_batch: impl Fn() + Send + Sync + 'static) {
    runtime.on_thread_park(move || {
        if STREAMS.get() >= MIN_STREAMS && BATCHING.with_borrow_mut(|batching| batching.is_worthwhile(Instant::now())) {
            on_batch();
            thread::sleep(DELAY);
        }
    });
    runtime.on_thread_unpark(|| BATCHING.with_borrow_mut(|batching| batching.woke_at = Some(Instant::now())));
}

/// One active HTTP/2 stream of this thread, until it is dropped on the same thread.
pub struct ActiveStream(());

impl ActiveStream {
    /// Counts a stream that begins.
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

/// The batches of one thread, and the work that they brought.
struct Batching {
    /// When the thread woke up; `None` before the first time.
    woke_at: Option<Instant>,
    /// No batch before this instant.
    paused_until: Option<Instant>,
    /// Batches of the current sample.
    batches: u32,
    /// Time worked between the batches of the current sample.
    work: Duration,
}

impl Batching {
    const fn new() -> Self {
        Self { woke_at: None, paused_until: None, batches: 0, work: Duration::ZERO }
    }

    /// Whether to delay the next poll; called when the thread has many streams and nothing left to do at `now`.
    fn is_worthwhile(&mut self, now: Instant) -> bool {
        if self.paused_until.is_some_and(|until| now < until) {
            return false;
        }
        self.batches += 1;
        self.work += self.woke_at.map_or(Duration::ZERO, |woke_at| now.saturating_duration_since(woke_at));
        if self.batches < SAMPLE {
            return true;
        }
        let is_worthwhile = self.work >= MIN_WORK * SAMPLE;
        (self.batches, self.work) = (0, Duration::ZERO);
        if !is_worthwhile {
            self.paused_until = Some(now + PAUSE);
        }
        is_worthwhile
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread with many streams that wakes up `turns` times and works for `work` each time: how many batches it makes.
    fn batches(batching: &mut Batching, now: &mut Instant, turns: u32, work: Duration) -> u32 {
        let mut batches = 0;
        for _ in 0..turns {
            batching.woke_at = Some(*now);
            *now += work;
            batches += u32::from(batching.is_worthwhile(*now));
        }
        batches
    }

    #[test]
    fn batching_goes_on_while_batches_bring_work() {
        let (mut now, mut batching) = (Instant::now(), Batching::new());
        assert_eq!(batches(&mut batching, &mut now, 1000, MIN_WORK), 1000);
    }

    #[test]
    fn batching_pauses_after_batches_with_little_work() {
        let (mut now, mut batching) = (Instant::now(), Batching::new());
        let little = MIN_WORK / 5;
        // 10 us of work a turn: one sample of batches, the last of which is left out, and then 5,000 turns of pause.
        assert_eq!(batches(&mut batching, &mut now, SAMPLE + 4_999, little), SAMPLE - 1);
        assert_eq!(batches(&mut batching, &mut now, SAMPLE, little), SAMPLE - 1);
    }

    #[test]
    fn a_thread_that_never_woke_up_has_done_no_work() {
        let (now, mut batching) = (Instant::now(), Batching::new());
        let batches = (0..SAMPLE).filter(|_| batching.is_worthwhile(now)).count();
        assert_eq!(batches, SAMPLE as usize - 1);
        assert!(!batching.is_worthwhile(now), "batching pauses");
    }

    #[test]
    fn a_stream_counts_until_it_is_dropped() {
        let streams = [ActiveStream::begin(), ActiveStream::begin()];
        assert_eq!(STREAMS.get(), 2);
        drop(streams);
        assert_eq!(STREAMS.get(), 0);
    }
}
