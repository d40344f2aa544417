//! The caller's body on its way to the upstream.
//!
//! Nothing is buffered: a chunk is read from the caller when the upstream can take it. The body notes
//! what passes in the exchange's [`Flow`], and waits while the flow is held (`Expect: 100-continue`).

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::HeaderName;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

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
}

/// The caller's body.
pub struct RequestBody {
    source: Source,
    flow: Rc<Flow>,
    /// Trailers that the request's `Connection` field claimed for the caller's connection alone.
    named: Vec<HeaderName>,
}

enum Source {
    Empty,
    Caller(Incoming),
}

impl RequestBody {
    /// The body of a request as hyper handed it in.
    ///
    /// `named` are the fields that its `Connection` field lists; they do not pass as trailers either.
    pub fn caller(incoming: Incoming, flow: Rc<Flow>, named: Vec<HeaderName>) -> Self {
        if incoming.is_end_stream() {
            return Self::empty(flow);
        }
        Self { source: Source::Caller(incoming), flow, named }
    }

    /// No body at all.
    pub fn empty(flow: Rc<Flow>) -> Self {
        flow.request.end();
        Self { source: Source::Empty, flow, named: Vec::new() }
    }

    /// The exchange that the body belongs to.
    pub fn flow(&self) -> &Rc<Flow> {
        &self.flow
    }

    fn end(&mut self) {
        self.source = Source::Empty;
        self.flow.request.end();
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = CallerBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, CallerBodyError>>> {
        let this = &mut *self;
        let Source::Caller(incoming) = &mut this.source else {
            return Poll::Ready(None);
        };
        if this.flow.is_over() {
            return Poll::Ready(Some(Err(CallerBodyError::Over)));
        }
        if this.flow.is_held() {
            this.flow.wait(cx);
            return Poll::Pending;
        }
        let Poll::Ready(frame) = Pin::new(&mut *incoming).poll_frame(cx) else {
            this.flow.starve(true);
            this.flow.wait(cx);
            return Poll::Pending;
        };
        this.flow.starve(false);
        let last = incoming.is_end_stream();
        match frame {
            None => {
                this.end();
                Poll::Ready(None)
            }
            Some(Ok(mut frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    trailers::clean(trailers, &this.named);
                }
                let chunk = frame.data_ref().map_or(&[][..], |data| data);
                this.flow.passed(&this.flow.request, chunk, Instant::now());
                if last {
                    this.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                this.flow.request.fail();
                Poll::Ready(Some(Err(CallerBodyError::Broken(error))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.source, Source::Empty)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Caller(incoming) => incoming.size_hint(),
        }
    }
}
