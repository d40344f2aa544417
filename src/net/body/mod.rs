//! The caller's body on its way to the upstream.
//!
//! A chunk is read from the caller when the upstream can take it, and noted once in the exchange's [`Flow`], however
//! many tries send it. The body waits while the flow is held (`Expect: 100-continue`).
//! Nothing is buffered, unless a retry may need it again: then `replay` keeps the beginning, up to a limit.

mod replay;

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::HeaderName;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

pub use self::replay::Replay;
use self::replay::Try;
use crate::net::flow::Flow;
use crate::net::trailers;

/// Why a caller's body could not be read to its end.
#[derive(Debug, thiserror::Error)]
pub enum CallerBodyError {
    /// The caller broke it off, or framed it badly.
    #[error("the caller broke off its body: {0}")]
    Broken(#[source] hyper::Error),
    /// The exchange was over before the body was.
    #[error("the exchange is over")]
    Over,
    /// This try was given up, and another one sends the body.
    #[error("another try sends the body")]
    Superseded,
}

/// The caller's body, for one try.
pub struct RequestBody {
    source: Source,
    flow: Rc<Flow>,
}

enum Source {
    Empty,
    /// Sent once.
    CallerBody(CallerBody),
    /// Sent by one try after the other.
    Try(Try),
}

type Polled = Poll<Option<Result<Frame<Bytes>, CallerBodyError>>>;

impl RequestBody {
    /// The body of a request as hyper handed it in, to be sent once.
    ///
    /// `named` are the fields that its `Connection` field lists; they do not pass as trailers either.
    pub fn caller(incoming: Incoming, flow: Rc<Flow>, named: Vec<HeaderName>) -> Self {
        if incoming.is_end_stream() {
            return Self::empty(flow);
        }
        Self { source: Source::CallerBody(CallerBody { incoming, named, ended: false }), flow }
    }

    /// The same, to be sent again if need be: the first try's body, and what the next tries get theirs from.
    ///
    /// As long as there is a [`Replay`], up to `limit` bytes of the body are kept, and its trailers.
    pub fn repeatable(incoming: Incoming, flow: Rc<Flow>, named: Vec<HeaderName>, limit: usize) -> (Self, Replay) {
        if incoming.is_end_stream() {
            return (Self::empty(flow), Replay::of_nothing());
        }
        let (first, replay) = Replay::of(CallerBody { incoming, named, ended: false }, limit);
        (Self { source: Source::Try(first), flow }, replay)
    }

    /// No body at all.
    pub fn empty(flow: Rc<Flow>) -> Self {
        flow.request.end();
        Self { source: Source::Empty, flow }
    }

    /// The exchange that the body belongs to.
    pub fn flow(&self) -> &Rc<Flow> {
        &self.flow
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = CallerBodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled {
        let Self { source, flow } = &mut *self;
        match source {
            Source::Empty => return Poll::Ready(None),
            // First of all: it must not take the waker's place in the flow from the try that goes on.
            Source::Try(one) if one.is_superseded() => return Poll::Ready(Some(Err(CallerBodyError::Superseded))),
            Source::CallerBody(_) | Source::Try(_) => {}
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
            Source::CallerBody(caller) => (caller.poll_frame(flow, cx), caller.ended),
            Source::Try(one) => (one.poll_frame(flow, cx), one.is_end()),
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
            Source::Try(one) => one.is_end(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::CallerBody(caller) => caller.incoming.size_hint(),
            Source::Try(one) => one.size_hint(),
        }
    }
}

/// The body as it comes from the caller: each byte is read once and noted in the flow.
struct CallerBody {
    incoming: Incoming,
    /// Trailers that the request's `Connection` field claimed for the caller's connection alone.
    named: Vec<HeaderName>,
    ended: bool,
}

impl CallerBody {
    fn poll_frame(&mut self, flow: &Flow, cx: &mut Context<'_>) -> Polled {
        let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(cx) else {
            flow.starve(true);
            flow.wait(cx);
            return Poll::Pending;
        };
        flow.starve(false);
        Poll::Ready(match frame {
            None => {
                self.end(flow);
                None
            }
            Some(Ok(mut frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    trailers::clean(trailers, &self.named);
                }
                let chunk = frame.data_ref().map_or(&[][..], |data| data);
                flow.passed(&flow.request, chunk, Instant::now());
                // Nothing comes behind trailers, and over HTTP/1.1 nobody asks whether it does.
                if frame.is_trailers() || self.incoming.is_end_stream() {
                    self.end(flow);
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                flow.request.fail(has_left(&error));
                Some(Err(CallerBodyError::Broken(error)))
            }
        })
    }

    fn end(&mut self, flow: &Flow) {
        self.ended = true;
        flow.request.end();
    }
}

/// Whether a body broke off because whoever sent it is gone: its connection ended, or its stream was cancelled. Anything
/// else is a fault of what was sent.
fn has_left(error: &hyper::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof};
    if error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
        return true;
    }
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<std::io::Error>() {
            let gone = [BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof];
            return gone.contains(&error.kind());
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
