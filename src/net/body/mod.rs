//! The request body on its way from the caller to the upstream.
//!
//! hyper or h2 polls it when the upstream has room. Invariants: each chunk is read from the caller once and recorded once in
//! the exchange's [`Flow`], however many attempts send it; the body waits while the flow is held (`Expect: 100-continue`);
//! bytes are kept only for a retry, by `replay`, up to a limit.

mod replay;

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::Version;
use http::header::HeaderName;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

use self::replay::AttemptBody;
pub use self::replay::Replay;
use crate::net::flow::Flow;
use crate::net::trailers;

/// Why a request body could not be read to its end.
#[derive(Debug, thiserror::Error)]
pub enum CallerBodyError {
    /// The caller disconnected, or the body is malformed.
    #[error("the request body failed before its end: {0}")]
    Broken(#[source] hyper::Error),
    /// The caller ended the body without its end: a reset that hyper reports like a complete body (RFC 9113, 8.1).
    #[error("the caller broke the request body off")]
    Cut,
    /// The exchange was over before the body ended.
    #[error("the exchange is over")]
    Over,
    /// More bytes than the limit allows.
    #[error("the request body is longer than the limit")]
    TooLarge,
    /// A later attempt sends the body.
    #[error("a later attempt sends the request body")]
    Superseded,
}

/// The request body of one attempt.
pub struct RequestBody {
    source: Source,
    flow: Rc<Flow>,
}

enum Source {
    Empty,
    /// Sent by the only attempt.
    CallerBody(CallerBody),
    /// Sent by one attempt after the other.
    Attempt(AttemptBody),
}

type Polled = Poll<Option<Result<Frame<Bytes>, CallerBodyError>>>;

impl RequestBody {
    /// The body of a request that is sent once; nothing of it is kept.
    ///
    /// `version` is that of the caller. `named` are the field names that the request's `Connection` field lists; they do not
    /// pass as trailers either.
    pub fn streaming(incoming: Incoming, version: Version, flow: Rc<Flow>, named: Vec<HeaderName>) -> Self {
        if incoming.is_end_stream() {
            return Self::empty(flow);
        }
        Self { source: Source::CallerBody(CallerBody::new(incoming, version, named)), flow }
    }

    /// The body of a request that may be sent again: the body of the first attempt, and the [`Replay`] that makes those of
    /// later attempts.
    ///
    /// While the [`Replay`] exists, up to `limit` bytes of the body and its trailers are kept.
    pub fn replayable(
        incoming: Incoming,
        version: Version,
        flow: Rc<Flow>,
        named: Vec<HeaderName>,
        limit: usize,
    ) -> (Self, Replay) {
        if incoming.is_end_stream() {
            return (Self::empty(flow), Replay::empty());
        }
        let (first, replay) = Replay::new(CallerBody::new(incoming, version, named), limit);
        (Self { source: Source::Attempt(first), flow }, replay)
    }

    /// The body of a request without one.
    pub fn empty(flow: Rc<Flow>) -> Self {
        flow.request.end();
        Self { source: Source::Empty, flow }
    }

    /// The flow of the exchange.
    pub fn flow(&self) -> &Rc<Flow> {
        &self.flow
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        // A later attempt reads on.
        if !matches!(&self.source, Source::Attempt(body) if body.is_superseded()) {
            self.flow.end_upload();
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = CallerBodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled {
        let Self { source, flow } = &mut *self;
        match source {
            Source::Empty => return Poll::Ready(None),
            // Checked first: a superseded body must not replace the waker of the current attempt in the flow.
            Source::Attempt(body) if body.is_superseded() => {
                return Poll::Ready(Some(Err(CallerBodyError::Superseded)));
            }
            Source::CallerBody(_) | Source::Attempt(_) => {}
        }
        if flow.is_over() {
            return Poll::Ready(Some(Err(CallerBodyError::Over)));
        }
        if flow.is_held() {
            flow.wait(cx);
            return Poll::Pending;
        }
        let (polled, ended) = match source {
            Source::Empty => return Poll::Ready(None),
            Source::CallerBody(body) => (body.poll_frame(flow, cx), body.ended),
            Source::Attempt(body) => (body.poll_frame(flow, cx), body.is_end()),
        };
        if ended {
            *source = Source::Empty;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Empty => true,
            Source::CallerBody(_) => false,
            Source::Attempt(body) => body.is_end(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::CallerBody(body) => body.incoming.size_hint(),
            Source::Attempt(body) => body.size_hint(),
        }
    }
}

/// The body as hyper reads it from the caller; records each byte in the flow.
struct CallerBody {
    incoming: Incoming,
    /// Field names of the request's `Connection` field: hop-by-hop, so they do not pass as trailers.
    named: Vec<HeaderName>,
    has_streams: bool,
    ended: bool,
}

impl CallerBody {
    fn new(incoming: Incoming, version: Version, named: Vec<HeaderName>) -> Self {
        Self { incoming, named, has_streams: version == Version::HTTP_2, ended: false }
    }

    fn poll_frame(&mut self, flow: &Flow, cx: &mut Context<'_>) -> Polled {
        let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(cx) else {
            flow.set_awaits_body(true);
            flow.wait(cx);
            return Poll::Pending;
        };
        flow.set_awaits_body(false);
        Poll::Ready(match frame {
            None if self.is_cut() => {
                flow.request.fail(true);
                Some(Err(CallerBodyError::Cut))
            }
            None => {
                self.end(flow);
                None
            }
            Some(Ok(mut frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    trailers::sanitize(trailers, &self.named);
                }
                let chunk = frame.data_ref().map_or(&[][..], |data| data);
                flow.record_bytes(&flow.request, chunk, Instant::now());
                if flow.request.fails_by_limit() {
                    flow.request.fail(false);
                    return Poll::Ready(Some(Err(CallerBodyError::TooLarge)));
                }
                // Trailers end the body, and over HTTP/1.1 the body is not polled again after its last frame.
                if frame.is_trailers() || self.incoming.is_end_stream() {
                    self.end(flow);
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                flow.request.fail(is_disconnect(&error));
                Some(Err(CallerBodyError::Broken(error)))
            }
        })
    }

    /// True if hyper reports the end of a body that has none. Over HTTP/2 hyper takes a reset with NO_ERROR for the end,
    /// but only END_STREAM ends a request (RFC 9113, 8.1); over HTTP/1.1 a body of known length ends with its last byte.
    fn is_cut(&self) -> bool {
        let has_mark = self.has_streams || self.incoming.size_hint().exact().is_some();
        has_mark && !self.incoming.is_end_stream()
    }

    fn end(&mut self, flow: &Flow) {
        self.ended = true;
        flow.request.end();
    }
}

/// Whether a body failed because the caller's connection ended or its stream was cancelled. Any other error means a
/// malformed body.
fn is_disconnect(error: &hyper::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof};
    if error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
        return true;
    }
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<std::io::Error>() {
            let disconnects = [BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof];
            return disconnects.contains(&error.kind());
        }
        if let Some(error) = cause.downcast_ref::<h2::Error>() {
            return error.is_io() || error.is_remote();
        }
        source = cause.source();
    }
    false
}

#[cfg(test)]
mod tests;
