//! What has passed through one exchange so far, in both directions.
//!
//! One `Flow` per exchange, shared on one thread by the caller's body, the answer's body and the timer
//! that judges them: it says when a byte last moved, whether the caller has finished sending, how many
//! gRPC messages went each way, and by when the exchange has to be over.

use std::cell::{Cell, RefCell};
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::time::Instant;

/// Where a gRPC message stream stands: bytes of the five-byte prefix seen, and payload bytes still to come.
#[derive(Clone, Copy, Default)]
struct Framing {
    prefix: u8,
    length: u32,
    rest: u32,
    messages: u32,
}

impl Framing {
    /// Counts the messages that end in `chunk`.
    fn take(&mut self, mut chunk: &[u8]) {
        while !chunk.is_empty() {
            if self.rest > 0 {
                let take = chunk.len().min(self.rest as usize);
                self.rest -= u32::try_from(take).unwrap_or(self.rest);
                chunk = &chunk[take..];
                self.messages += u32::from(self.rest == 0);
                continue;
            }
            // One byte that says whether the message is compressed, then four of its length.
            if self.prefix > 0 {
                self.length = (self.length << 8) | u32::from(chunk[0]);
            }
            self.prefix += 1;
            chunk = &chunk[1..];
            if self.prefix == 5 {
                let messages = self.messages + u32::from(self.length == 0);
                *self = Self { rest: self.length, messages, ..Self::default() };
            }
        }
    }
}

/// One direction of an exchange.
#[derive(Default)]
pub struct FlowDirection {
    bytes: Cell<u64>,
    framing: Cell<Framing>,
    ended: Cell<bool>,
    failed: Cell<bool>,
    left: Cell<bool>,
}

impl FlowDirection {
    /// Body bytes that have passed.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Adds bytes that passed outside of a body, in a tunnel.
    pub fn add(&self, bytes: u64) {
        self.bytes.set(self.bytes.get() + bytes);
    }

    /// gRPC messages that have passed whole; zero for anything that is not gRPC.
    pub fn messages(&self) -> u32 {
        self.framing.get().messages
    }

    /// True once the last byte and the trailers have passed.
    pub fn ended(&self) -> bool {
        self.ended.get()
    }

    /// True if the sender broke off.
    pub fn failed(&self) -> bool {
        self.failed.get()
    }

    /// Notes the end of the body.
    pub fn end(&self) {
        self.ended.set(true);
    }

    /// True if it broke off because the sender went away, and not because of what it sent.
    pub fn left(&self) -> bool {
        self.left.get()
    }

    /// Notes that the sender broke off; `left` if it went away.
    pub fn fail(&self, left: bool) {
        self.failed.set(true);
        self.left.set(left);
    }
}

/// When an answer is cut whoever waits for whom.
#[derive(Debug, Clone, Copy)]
pub struct Cutoff {
    /// At the latest.
    pub at: Instant,
    /// Earlier, if no byte has moved in either direction for so long.
    pub idle: Duration,
}

/// One exchange, both directions.
pub struct Flow {
    /// From the caller to the upstream.
    pub request: FlowDirection,
    /// From the upstream to the caller.
    pub response: FlowDirection,
    grpc: Cell<bool>,
    last: Cell<Instant>,
    cut: Cell<Option<Cutoff>>,
    was_cut: Cell<bool>,
    starved: Cell<bool>,
    over: Cell<bool>,
    held: Cell<bool>,
    holder: RefCell<Option<Waker>>,
    streams: RefCell<Option<Box<dyn FnOnce()>>>,
}

impl Flow {
    /// An exchange that begins now.
    pub fn new(now: Instant) -> Self {
        Self {
            request: FlowDirection::default(),
            response: FlowDirection::default(),
            grpc: Cell::new(false),
            last: Cell::new(now),
            cut: Cell::new(None),
            was_cut: Cell::new(false),
            starved: Cell::new(false),
            over: Cell::new(false),
            held: Cell::new(false),
            holder: RefCell::new(None),
            streams: RefCell::new(None),
        }
    }

    /// From here on the bodies are read as gRPC messages.
    pub fn count_messages(&self) {
        self.grpc.set(true);
    }

    /// Notes body bytes that passed in one direction at `now`.
    pub fn passed(&self, direction: &FlowDirection, chunk: &[u8], now: Instant) {
        direction.bytes.set(direction.bytes.get() + chunk.len() as u64);
        self.last.set(now);
        if self.grpc.get() {
            let mut framing = direction.framing.get();
            framing.take(chunk);
            direction.framing.set(framing);
            if self.request.messages() > 1
                && let Some(then) = self.streams.take()
            {
                then();
            }
        }
    }

    /// Does something once the caller has sent a second message.
    pub fn when_it_streams(&self, then: Box<dyn FnOnce()>) {
        *self.streams.borrow_mut() = Some(then);
    }

    /// When a body byte last moved in either direction; at first, when the exchange began.
    pub fn last(&self) -> Instant {
        self.last.get()
    }

    /// Notes whether the upstream could take more of the caller's body than the caller has sent.
    pub fn starve(&self, starved: bool) {
        self.starved.set(starved);
    }

    /// True if the upstream waits for the rest of the caller's body.
    pub fn is_starved(&self) -> bool {
        self.starved.get() && !self.request.ended()
    }

    /// Holds the caller's body back (it waits for `100 Continue`) until [`Flow::release`].
    pub fn hold(&self) {
        self.held.set(true);
    }

    /// True while the caller's body is held back.
    pub fn is_held(&self) -> bool {
        self.held.get()
    }

    /// Lets a held body go.
    pub fn release(&self) {
        if self.held.replace(false) {
            self.wake();
        }
    }

    /// Notes that the exchange is over; what is left of the caller's body has nowhere to go.
    pub fn finish(&self) {
        self.over.set(true);
        self.wake();
    }

    /// True once the exchange is over.
    pub fn is_over(&self) -> bool {
        self.over.get()
    }

    /// Wakes whoever reads the caller's body, to look again.
    pub fn wake(&self) {
        if let Some(waker) = self.holder.borrow_mut().take() {
            waker.wake();
        }
    }

    /// The caller's body waits; it is woken by [`Flow::release`] and [`Flow::finish`].
    pub fn wait(&self, cx: &Context<'_>) {
        *self.holder.borrow_mut() = Some(cx.waker().clone());
    }

    /// Sets or clears when the answer has to be cut although nobody asks for its next byte.
    ///
    /// Set while an answer's body is on its way: a caller that stops reading also stops
    /// polling the body and with it the body's own timer.
    pub fn cut_by(&self, cut: Option<Cutoff>) {
        self.cut.set(cut);
    }

    /// When the answer has to be cut; `None` while no answer is under way.
    pub fn cut_time(&self) -> Option<Instant> {
        let Cutoff { at, idle } = self.cut.get()?;
        Some(at.min(self.last() + idle))
    }

    /// Notes that the answer was cut while nobody asked for its next byte.
    pub fn cut(&self) {
        self.was_cut.set(true);
    }

    /// True if the answer was cut while nobody asked for its next byte.
    pub fn was_cut(&self) -> bool {
        self.was_cut.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(chunks: &[&[u8]]) -> u32 {
        let mut framing = Framing::default();
        for chunk in chunks {
            framing.take(chunk);
        }
        framing.messages
    }

    #[test]
    fn grpc_messages_are_counted_however_they_are_cut() {
        let one: &[u8] = &[0, 0, 0, 0, 3, b'a', b'b', b'c'];
        let two = [one, one].concat();
        assert_eq!(messages(&[one]), 1);
        assert_eq!(messages(&[&two]), 2);
        assert_eq!(messages(&[&two[..3], &two[3..9], &two[9..12], &two[12..]]), 2);
        for cut in 0..two.len() {
            assert_eq!(messages(&[&two[..cut], &two[cut..]]), 2, "cut at {cut}");
        }
        assert_eq!(messages(&[&[0, 0, 0, 0, 0], &[1, 0, 0, 0, 0]]), 2);
        assert_eq!(messages(&[&[0, 0, 0, 0]]), 0);
        assert_eq!(messages(&[&one[..7]]), 0, "half a message");
    }
}
