//! A body that can be sent again: what one try has read is kept for the next, up to a limit.
//!
//! All tries of a call share one source, on one thread. The latest reads; an earlier one that is still about (an HTTP/2
//! stream ends in its own time) gets an error instead of bytes that are not its own. A try that is dropped, wherever it
//! stood, leaves the source as it was.
//!
//! Memory is bounded, per call: at most the limit in bytes, besides the trailers, which hyper bounds. Chunks below 1 KiB
//! are copied together, larger ones keep the buffer that they were cut from. Beyond the limit, on a broken body, and when
//! the [`Replay`] is dropped, all of it is let go of at once, and the body streams on unkept.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::vec;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use super::{CallerBody, Polled, RequestBody, Source};
use crate::net::flow::Flow;

/// Chunks below this are copied rather than kept with the buffer that they were cut from.
const SMALL: usize = 1 << 10;

/// What the bodies of further tries are made from. Drop it as soon as no further try can come: what was kept goes with it.
pub struct Replay(Option<Rc<RefCell<Shared>>>);

/// One try's way through a shared body: what was kept before it began, then the source.
pub(super) struct Try {
    pub(super) shared: Rc<RefCell<Shared>>,
    number: u32,
    kept: vec::IntoIter<Bytes>,
    trailers: Option<Box<HeaderMap>>,
}

pub(super) struct Shared {
    caller: CallerBody,
    /// The number of the latest try.
    latest: u32,
    /// None once a part of the body is gone for good, or nobody will ask for it.
    pub(super) kept: Option<Kept>,
}

/// All that has been read so far.
pub(super) struct Kept {
    limit: usize,
    size: usize,
    chunks: Vec<Bytes>,
    /// The end of it, as long as it comes in small chunks.
    small: BytesMut,
    trailers: Option<Box<HeaderMap>>,
}

impl Replay {
    /// For a request without a body. Allocates nothing.
    pub(super) fn of_nothing() -> Self {
        Self(None)
    }

    pub(super) fn of(caller: CallerBody, limit: usize) -> (Try, Self) {
        let kept = Kept { limit, size: 0, chunks: Vec::new(), small: BytesMut::new(), trailers: None };
        let shared = Rc::new(RefCell::new(Shared { caller, latest: 1, kept: Some(kept) }));
        let first = Try { shared: Rc::clone(&shared), number: 1, kept: Vec::new().into_iter(), trailers: None };
        (first, Self(Some(shared)))
    }

    /// Whether all that was read of the body is still there. True for a body of any length that nobody has read from.
    pub fn is_replayable(&self) -> bool {
        self.0.as_ref().is_none_or(|shared| shared.borrow().kept.is_some())
    }

    /// The body for the next try, from its beginning; the tries before get nothing more. None if it is not replayable.
    pub fn again(&self, flow: &Rc<Flow>) -> Option<RequestBody> {
        let Some(shared) = &self.0 else { return Some(RequestBody::empty(Rc::clone(flow))) };
        let mut inner = shared.borrow_mut();
        let Shared { latest, kept, .. } = &mut *inner;
        let kept = kept.as_mut()?;
        kept.seal();
        *latest += 1;
        let next = Try {
            shared: Rc::clone(shared),
            number: *latest,
            kept: kept.chunks.clone().into_iter(),
            trailers: kept.trailers.clone(),
        };
        drop(inner);
        // The new try has not asked for anything yet; an old one that waits has to see that it is over.
        flow.starve(false);
        flow.wake();
        Some(RequestBody { source: Source::Try(next), flow: Rc::clone(flow) })
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.borrow_mut().kept = None;
        }
    }
}

impl Try {
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
            // hyper may show a broken body as ended when it is asked again.
            Poll::Ready(Some(Err(_))) => shared.kept = None,
            Poll::Ready(None) | Poll::Pending => {}
        }
        polled
    }

    /// What is still to come. Not exact if there are trailers: a body of known length has none in HTTP/1.1.
    pub(super) fn size_hint(&self) -> SizeHint {
        let ahead: u64 = self.kept.as_slice().iter().map(|chunk| chunk.len() as u64).sum();
        let caller = &self.shared.borrow().caller;
        let rest = if caller.ended { SizeHint::with_exact(0) } else { caller.incoming.size_hint() };
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper().filter(|_| self.trailers.is_none()) {
            hint.set_upper(upper.saturating_add(ahead));
        }
        hint.set_lower(rest.lower().saturating_add(ahead));
        hint
    }
}

impl Shared {
    fn keep(&mut self, frame: &Frame<Bytes>) {
        let Some(kept) = &mut self.kept else { return };
        if let Some(trailers) = frame.trailers_ref() {
            kept.trailers = Some(Box::new(trailers.clone()));
        }
        let chunk = frame.data_ref().filter(|chunk| !chunk.is_empty());
        if let Some(chunk) = chunk
            && !kept.take(chunk)
        {
            self.kept = None;
        }
    }
}

impl Kept {
    /// False if it would be more than the limit.
    fn take(&mut self, chunk: &Bytes) -> bool {
        self.size = self.size.saturating_add(chunk.len());
        if self.size > self.limit {
            return false;
        }
        if chunk.len() < SMALL {
            self.small.extend_from_slice(chunk);
        } else {
            self.seal();
            self.chunks.push(chunk.clone());
        }
        true
    }

    /// Makes a chunk of what has come in small ones.
    fn seal(&mut self) {
        if !self.small.is_empty() {
            self.chunks.push(self.small.split().freeze());
        }
    }
}
