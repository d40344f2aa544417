//! Replay: a request body that later attempts can send again, up to a limit in bytes.
//!
//! All attempts of a call share one body on one thread. The latest attempt reads from the caller; an earlier one that still
//! exists (an HTTP/2 stream ends in its own time) gets the error `Superseded` and no bytes. An attempt that is dropped,
//! wherever it stood, leaves the shared body unchanged.
//!
//! Memory is bounded per call: at most the limit in bytes, besides the trailers, which hyper bounds. Chunks below 1 KiB
//! are copied together, larger ones keep the buffer that they were cut from. All kept bytes are freed at once when the body
//! exceeds the limit, when it fails, and when the [`Replay`] is dropped; the body then streams on without being kept.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::vec;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use super::{CallerBody, Polled, RequestBody, Source};
use crate::net::flow::Flow;

/// Chunks below this size in bytes are copied, so that they do not keep the buffer that they were cut from.
const SMALL_CHUNK: usize = 1 << 10;

/// Makes the bodies of later attempts. Drop it as soon as no retry can follow: that frees the kept bytes.
pub struct Replay(Option<Rc<RefCell<SharedBody>>>);

/// The body of one attempt: first the bytes kept before it began, then those from the caller.
pub(super) struct AttemptBody {
    pub(super) shared: Rc<RefCell<SharedBody>>,
    /// The number of this attempt.
    number: u32,
    kept: vec::IntoIter<Bytes>,
    trailers: Option<Box<HeaderMap>>,
}

pub(super) struct SharedBody {
    caller: CallerBody,
    /// The number of the latest attempt.
    latest: u32,
    /// `None` once the body cannot be sent again, or no retry can follow.
    pub(super) kept: Option<KeptBody>,
}

/// The bytes and trailers read so far.
pub(super) struct KeptBody {
    limit: usize,
    size: usize,
    chunks: Vec<Bytes>,
    /// Small chunks behind `chunks`, copied together.
    small: BytesMut,
    trailers: Option<Box<HeaderMap>>,
}

impl Replay {
    /// For a request without a body. Does not allocate.
    pub(super) fn empty() -> Self {
        Self(None)
    }

    /// The body of the first attempt, and the replay for later ones, which keeps up to `limit` bytes.
    pub(super) fn new(caller: CallerBody, limit: usize) -> (AttemptBody, Self) {
        let kept = KeptBody { limit, size: 0, chunks: Vec::new(), small: BytesMut::new(), trailers: None };
        let shared = Rc::new(RefCell::new(SharedBody { caller, latest: 1, kept: Some(kept) }));
        let first = AttemptBody { shared: Rc::clone(&shared), number: 1, kept: Vec::new().into_iter(), trailers: None };
        (first, Self(Some(shared)))
    }

    /// Whether the body can be sent again: all bytes read so far are kept. True for a body of any length before its first
    /// byte is read.
    pub fn is_replayable(&self) -> bool {
        self.0.as_ref().is_none_or(|shared| shared.borrow().kept.is_some())
    }

    /// The body of the next attempt, from its first byte; earlier attempts get no more bytes. `None` if the body is not
    /// replayable.
    pub fn next_body(&self, flow: &Rc<Flow>) -> Option<RequestBody> {
        let Some(shared) = &self.0 else { return Some(RequestBody::empty(Rc::clone(flow))) };
        let mut inner = shared.borrow_mut();
        let SharedBody { latest, kept, .. } = &mut *inner;
        let kept = kept.as_mut()?;
        kept.seal();
        *latest += 1;
        let next = AttemptBody {
            shared: Rc::clone(shared),
            number: *latest,
            kept: kept.chunks.clone().into_iter(),
            trailers: kept.trailers.clone(),
        };
        drop(inner);
        // The new attempt has not polled yet; an earlier one that waits is woken to see that it is superseded.
        flow.set_awaits_body(false);
        flow.begin_upload();
        flow.wake();
        Some(RequestBody { source: Source::Attempt(next), flow: Rc::clone(flow) })
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.borrow_mut().kept = None;
        }
    }
}

impl AttemptBody {
    pub(super) fn is_superseded(&self) -> bool {
        self.shared.borrow().latest != self.number
    }

    pub(super) fn is_end(&self) -> bool {
        self.has_caught_up() && self.shared.borrow().caller.ended
    }

    fn has_caught_up(&self) -> bool {
        self.kept.as_slice().is_empty() && self.trailers.is_none()
    }

    pub(super) fn poll_frame(&mut self, flow: &Flow, cx: &mut Context<'_>) -> Polled {
        if let Some(chunk) = self.kept.next() {
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        let shared = &mut *self.shared.borrow_mut();
        if shared.caller.ended {
            return Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(*trailers))));
        }
        let polled = shared.caller.poll_frame(flow, cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => shared.keep(frame),
            // hyper may report a failed body as ended when it is polled again.
            Poll::Ready(Some(Err(_))) => shared.kept = None,
            Poll::Ready(None) | Poll::Pending => {}
        }
        polled
    }

    /// The bytes still to come. Not exact with trailers: in HTTP/1.1 a body of known length has none.
    pub(super) fn size_hint(&self) -> SizeHint {
        let kept: u64 = self.kept.as_slice().iter().map(|chunk| chunk.len() as u64).sum();
        let caller = &self.shared.borrow().caller;
        let rest = if caller.ended { SizeHint::with_exact(0) } else { caller.incoming.size_hint() };
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper().filter(|_| self.trailers.is_none()) {
            hint.set_upper(upper.saturating_add(kept));
        }
        hint.set_lower(rest.lower().saturating_add(kept));
        hint
    }
}

impl SharedBody {
    fn keep(&mut self, frame: &Frame<Bytes>) {
        let Some(kept) = &mut self.kept else { return };
        if let Some(trailers) = frame.trailers_ref() {
            kept.trailers = Some(Box::new(trailers.clone()));
        }
        let chunk = frame.data_ref().filter(|chunk| !chunk.is_empty());
        if let Some(chunk) = chunk
            && !kept.push(chunk)
        {
            self.kept = None;
        }
    }
}

impl KeptBody {
    /// Keeps one more chunk; false if the body then exceeds the limit.
    fn push(&mut self, chunk: &Bytes) -> bool {
        self.size = self.size.saturating_add(chunk.len());
        if self.size > self.limit {
            return false;
        }
        if chunk.len() < SMALL_CHUNK {
            self.small.extend_from_slice(chunk);
        } else {
            self.seal();
            self.chunks.push(chunk.clone());
        }
        true
    }

    /// Appends the small chunks to `chunks` as one.
    fn seal(&mut self) {
        if !self.small.is_empty() {
            self.chunks.push(self.small.split().freeze());
        }
    }
}
