//! The body bytes of one exchange so far, in both directions.
//!
//! One [`Flow`] per exchange, shared on one thread by the request body, the response body and the timeouts: when a byte last
//! passed, whether the caller has finished sending, how many gRPC messages went each way, and when the response has to be
//! cut off. Invariant: each byte and each message is counted once, however many attempts send it.

use std::cell::{Cell, RefCell};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::Instant;

/// Counts gRPC messages (length-prefixed: one byte of flags, four of length, the payload) in chunks of any size.
#[derive(Clone, Copy, Default)]
struct MessageCounter {
    /// Bytes of the current five-byte prefix that have been read.
    prefix: u8,
    /// The length read so far from the prefix.
    length: u32,
    /// Bytes of the current payload still to come.
    remaining: u32,
    /// Complete messages.
    messages: u32,
}

impl MessageCounter {
    /// Counts the messages that end in `chunk`.
    fn count(&mut self, mut chunk: &[u8]) {
        while !chunk.is_empty() {
            if self.remaining > 0 {
                let taken = chunk.len().min(self.remaining as usize);
                self.remaining -= u32::try_from(taken).unwrap_or(self.remaining);
                chunk = &chunk[taken..];
                self.messages += u32::from(self.remaining == 0);
                continue;
            }
            // The compressed flag, one byte, then the length, four bytes.
            if self.prefix > 0 {
                self.length = (self.length << 8) | u32::from(chunk[0]);
            }
            self.prefix += 1;
            chunk = &chunk[1..];
            if self.prefix == 5 {
                let messages = self.messages + u32::from(self.length == 0);
                *self = Self { remaining: self.length, messages, ..Self::default() };
            }
        }
    }
}

/// One direction of an exchange.
#[derive(Default)]
pub struct FlowDirection {
    bytes: Cell<u64>,
    message_counter: Cell<MessageCounter>,
    ended: Cell<bool>,
    failed: Cell<bool>,
    disconnected: Cell<bool>,
    /// Most bytes, and whether the body fails beyond them; `None` without a limit.
    limit: Cell<Option<(u64, bool)>>,
}

impl FlowDirection {
    /// Body bytes that have passed.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Adds bytes that passed through a tunnel, outside of a body.
    pub fn add(&self, bytes: u64) {
        self.bytes.set(self.bytes.get() + bytes);
    }

    /// Complete gRPC messages that have passed; 0 for an exchange that is not gRPC.
    pub fn messages(&self) -> u32 {
        self.message_counter.get().messages
    }

    /// True once the last byte and the trailers have passed.
    pub fn ended(&self) -> bool {
        self.ended.get()
    }

    /// True if the body failed before its end.
    pub fn failed(&self) -> bool {
        self.failed.get()
    }

    /// Records the end of the body.
    pub fn end(&self) {
        self.ended.set(true);
    }

    /// True if the body failed because the sender disconnected, and not because the body was malformed.
    pub fn disconnected(&self) -> bool {
        self.disconnected.get()
    }

    /// Limits the body to `bytes`; beyond them it fails, or is only known to be longer (`fails` is false).
    pub fn limit(&self, bytes: u64, fails: bool) {
        self.limit.set(Some((bytes, fails)));
    }

    /// True if more bytes have passed than the limit allows.
    pub fn is_over_limit(&self) -> bool {
        self.limit.get().is_some_and(|(limit, _)| self.bytes.get() > limit)
    }

    /// True if the body has to fail, because more bytes have passed than the limit allows.
    pub fn fails_by_limit(&self) -> bool {
        self.limit.get().is_some_and(|(limit, fails)| fails && self.bytes.get() > limit)
    }

    /// Records that the body failed; `disconnected` if the sender closed its connection or cancelled its stream.
    pub fn fail(&self, disconnected: bool) {
        self.failed.set(true);
        self.disconnected.set(disconnected);
    }
}

/// When a response is cut off, whether caller or upstream is the slow side.
#[derive(Debug, Clone, Copy)]
pub struct Cutoff {
    /// The latest instant.
    pub at: Instant,
    /// Earlier, after this time without a byte in either direction.
    pub idle: Duration,
}

/// Both directions of one exchange.
pub struct Flow {
    /// From the caller to the upstream.
    pub request: FlowDirection,
    /// From the upstream to the caller.
    pub response: FlowDirection,
    counts_messages: Cell<bool>,
    last_activity: Cell<Instant>,
    cutoff: Cell<Option<Cutoff>>,
    was_cut: Cell<bool>,
    awaits_body: Cell<bool>,
    over: Cell<bool>,
    held: Cell<bool>,
    is_stream: Cell<bool>,
    upload_over: Cell<bool>,
    /// The task that waits for the end of the upload.
    upload_waker: RefCell<Option<Waker>>,
    /// The task that reads the request body.
    body_waker: RefCell<Option<Waker>>,
    on_second_message: RefCell<Option<Box<dyn FnOnce()>>>,
}

impl Flow {
    /// An exchange that begins now.
    pub fn new(now: Instant) -> Self {
        Self {
            request: FlowDirection::default(),
            response: FlowDirection::default(),
            counts_messages: Cell::new(false),
            last_activity: Cell::new(now),
            cutoff: Cell::new(None),
            was_cut: Cell::new(false),
            awaits_body: Cell::new(false),
            over: Cell::new(false),
            held: Cell::new(false),
            is_stream: Cell::new(false),
            upload_over: Cell::new(false),
            upload_waker: RefCell::new(None),
            body_waker: RefCell::new(None),
            on_second_message: RefCell::new(None),
        }
    }

    /// Counts gRPC messages in the bodies from now on.
    pub fn count_messages(&self) {
        self.counts_messages.set(true);
    }

    /// Records body bytes that passed in one direction at `now`.
    pub fn record_bytes(&self, direction: &FlowDirection, chunk: &[u8], now: Instant) {
        direction.bytes.set(direction.bytes.get() + chunk.len() as u64);
        self.last_activity.set(now);
        if self.counts_messages.get() {
            let mut counter = direction.message_counter.get();
            counter.count(chunk);
            direction.message_counter.set(counter);
            if self.request.messages() > 1
                && let Some(callback) = self.on_second_message.take()
            {
                callback();
            }
        }
    }

    /// Sets the callback for the caller's second gRPC message, which shows that the call is a stream. Called once.
    pub fn on_second_message(&self, callback: Box<dyn FnOnce()>) {
        *self.on_second_message.borrow_mut() = Some(callback);
    }

    /// When a body byte last passed in either direction; the begin of the exchange before the first.
    pub fn last_activity(&self) -> Instant {
        self.last_activity.get()
    }

    /// Sets whether the upstream has room for more of the request body than the caller has sent.
    pub fn set_awaits_body(&self, awaits_body: bool) {
        self.awaits_body.set(awaits_body);
    }

    /// True if the upstream waits for the rest of the request body.
    pub fn awaits_body(&self) -> bool {
        self.awaits_body.get() && !self.request.ended()
    }

    /// Holds the request body back until [`Flow::release`], while the upstream has not sent `100 Continue`.
    pub fn hold(&self) {
        self.held.set(true);
    }

    /// True while the request body is held back.
    pub fn is_held(&self) -> bool {
        self.held.get()
    }

    /// Lets a held request body pass.
    pub fn release(&self) {
        if self.held.replace(false) {
            self.wake();
        }
    }

    /// Records that the exchange is over; the rest of the request body is not read.
    pub fn finish(&self) {
        self.over.set(true);
        self.wake();
    }

    /// True once the exchange is over.
    pub fn is_over(&self) -> bool {
        self.over.get()
    }

    /// Records that the exchange is a stream: a caller that closes its sending side has left.
    pub fn set_stream(&self) {
        self.is_stream.set(true);
    }

    /// True if the exchange is a stream.
    pub fn is_stream(&self) -> bool {
        self.is_stream.get()
    }

    /// Records that an attempt reads the request body, from its first byte.
    pub fn begin_upload(&self) {
        self.upload_over.set(false);
    }

    /// Records that no attempt reads the request body any more.
    pub fn end_upload(&self) {
        self.upload_over.set(true);
        if let Some(waker) = self.upload_waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Ready once no attempt reads the request body any more: its end has passed, or the upstream does not want the rest.
    pub fn poll_upload_over(&self, cx: &Context<'_>) -> Poll<()> {
        if self.upload_over.get() {
            return Poll::Ready(());
        }
        *self.upload_waker.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Wakes the task that reads the request body.
    pub fn wake(&self) {
        if let Some(waker) = self.body_waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Registers the task that reads the request body; [`Flow::release`], [`Flow::finish`] and [`Flow::wake`] wake it.
    pub fn wait(&self, cx: &Context<'_>) {
        *self.body_waker.borrow_mut() = Some(cx.waker().clone());
    }

    /// Sets or clears the cutoff that the downstream connection enforces.
    ///
    /// Set while a response body is in progress: a caller that stops reading also stops the polls of the response body, and
    /// with them the body's own timer.
    pub fn set_cutoff(&self, cutoff: Option<Cutoff>) {
        self.cutoff.set(cutoff);
    }

    /// When the response has to be cut off; `None` while no response body is in progress.
    pub fn cutoff_at(&self) -> Option<Instant> {
        let Cutoff { at, idle } = self.cutoff.get()?;
        Some(at.min(self.last_activity() + idle))
    }

    /// Records that the downstream connection has cut the response off.
    pub fn record_cutoff(&self) {
        self.was_cut.set(true);
    }

    /// True if the downstream connection has cut the response off, while the response body was not polled.
    pub fn was_cut_off(&self) -> bool {
        self.was_cut.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(chunks: &[&[u8]]) -> u32 {
        let mut counter = MessageCounter::default();
        for chunk in chunks {
            counter.count(chunk);
        }
        counter.messages
    }

    #[test]
    fn grpc_messages_are_counted_in_chunks_of_any_size() {
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
