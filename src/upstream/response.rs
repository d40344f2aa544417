//! What comes back from an upstream, or in its place, whatever protocol it speaks: the answer's body, or why there is no
//! answer.

use std::cell::Cell;
use std::error::Error;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use http::Request;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;

use crate::net::body::RequestBody;

/// The body of an upstream's answer. Dropped before its end, it ends the call: over HTTP/1.1 with the connection, over
/// HTTP/2 with RST_STREAM.
pub enum UpstreamBody {
    /// From a connection that hyper serves.
    Http1(Incoming),
    /// From a stream of a shared connection.
    Http2(Http2Body),
    /// From nobody: whole, and there already.
    Own(Bytes),
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        match &mut *self {
            Self::Http1(incoming) => Pin::new(incoming).poll_frame(cx).map_err(UpstreamError::Http1),
            Self::Http2(body) => body.poll_frame(cx),
            Self::Own(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Own(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(incoming) => incoming.is_end_stream(),
            Self::Http2(body) => body.stream.is_end_stream(),
            Self::Own(bytes) => bytes.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(incoming) => incoming.size_hint(),
            // What is known of the length stands in the head, which passes as it is.
            Self::Http2(_) => SizeHint::default(),
            Self::Own(bytes) => SizeHint::with_exact(bytes.len() as u64),
        }
    }
}

/// The body of an answer over HTTP/2.
pub struct Http2Body {
    stream: RecvStream,
    data_over: bool,
    silent: Rc<Cell<bool>>,
}

impl Http2Body {
    /// The body that comes over `stream`; `silent` is true once its connection is given up because it says nothing.
    pub fn new(stream: RecvStream, silent: Rc<Cell<bool>>) -> Self {
        Self { stream, data_over: false, silent }
    }

    /// The next chunk, or the trailers. What has been taken may be sent again by the peer (RFC 9113, 5.2).
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        if !self.data_over {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(chunk)) => {
                    // Fails only if the stream is over, and then nobody minds.
                    let _over = self.stream.flow_control().release_capacity(chunk.len());
                    return Poll::Ready(Some(Ok(Frame::data(chunk))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(UpstreamError::http2(error, &self.silent)))),
                None => self.data_over = true,
            }
        }
        let trailers = ready!(self.stream.poll_trailers(cx)).map_err(|error| UpstreamError::http2(error, &self.silent));
        Poll::Ready(trailers.transpose().map(|trailers| trailers.map(Frame::trailers)))
    }
}

/// How an upstream broke off.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// What hyper says.
    #[error(transparent)]
    Http1(#[from] hyper::Error),
    /// What h2 says.
    #[error("HTTP/2 error")]
    Http2(#[source] h2::Error),
    /// The peer gave no sign of life.
    #[error("the HTTP/2 connection was silent, and no answer to a ping came in time")]
    Silent,
}

impl UpstreamError {
    /// What h2 says, or why the connection was given up.
    pub fn http2(error: h2::Error, silent: &Cell<bool>) -> Self {
        if silent.get() { Self::Silent } else { Self::Http2(error) }
    }

    /// True if the peer sent something that cannot be read.
    pub fn is_malformed(&self) -> bool {
        match self {
            Self::Http1(error) => error.is_parse() || error.is_parse_status(),
            Self::Http2(error) => error.is_library(),
            Self::Silent => false,
        }
    }

    /// True if the peer has said that it did nothing with the request (RFC 9113, 8.7), so that it may be sent again,
    /// whatever its method.
    pub fn is_unprocessed(&self) -> bool {
        match self {
            // h2 ends only those streams with the peer's GOAWAY that are beyond its last stream.
            Self::Http2(error) => {
                error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
            }
            Self::Http1(_) | Self::Silent => false,
        }
    }

    /// True if the connection ended before the answer began: no byte of it had come, and no stream was reset alone.
    pub fn is_close(&self) -> bool {
        match self {
            Self::Http1(_) => !self.is_malformed(),
            Self::Http2(error) => !error.is_reset() && !error.is_library(),
            Self::Silent => false,
        }
    }

    /// True if the peer has ended the connection with GOAWAY, not this request alone.
    pub fn is_go_away(&self) -> bool {
        matches!(self, Self::Http2(error) if error.is_go_away())
    }

    /// The error and everything that led to it, in one line.
    pub fn sentence(&self) -> String {
        let mut sentence = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            sentence = format!("{sentence}: {cause}");
            source = cause.source();
        }
        sentence
    }
}

/// Why there is no answer to a request.
pub struct SendError {
    /// What went wrong.
    pub error: UpstreamError,
    /// The request, if nothing of it has been sent.
    pub unsent: Option<Box<Request<RequestBody>>>,
}

impl From<TrySendError<Request<RequestBody>>> for SendError {
    fn from(mut error: TrySendError<Request<RequestBody>>) -> Self {
        let unsent = error.take_message().map(Box::new);
        Self { error: UpstreamError::Http1(error.into_error()), unsent }
    }
}

impl From<UpstreamError> for SendError {
    fn from(error: UpstreamError) -> Self {
        Self { error, unsent: None }
    }
}
