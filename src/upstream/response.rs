//! Response bodies and errors of upstreams, over HTTP/1.1 and HTTP/2.
//!
//! `http1` and `http2` make them, `proxy` passes the body on or turns the error into a local reply. Invariant: an error tells
//! whether the upstream could have processed the request.

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

/// The body of an upstream's response. Dropping it before its end cancels the call: over HTTP/1.1 by closing the
/// connection, over HTTP/2 by RST_STREAM.
pub enum UpstreamBody {
    /// From an HTTP/1.1 connection.
    Http1(Incoming),
    /// From a stream of an HTTP/2 connection.
    Http2(Http2Body),
    /// Made by hopguard in place of an upstream's body, complete.
    Local(Bytes),
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        match &mut *self {
            Self::Http1(incoming) => Pin::new(incoming).poll_frame(cx).map_err(UpstreamError::Http1),
            Self::Http2(body) => body.poll_frame(cx),
            Self::Local(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Local(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(incoming) => incoming.is_end_stream(),
            Self::Http2(body) => body.stream.is_end_stream(),
            Self::Local(bytes) => bytes.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(incoming) => incoming.size_hint(),
            // The length is in the response head, which passes unchanged.
            Self::Http2(_) => SizeHint::default(),
            Self::Local(bytes) => SizeHint::with_exact(bytes.len() as u64),
        }
    }
}

/// The body of a response over HTTP/2.
pub struct Http2Body {
    stream: RecvStream,
    data_ended: bool,
    ping_timed_out: Rc<Cell<bool>>,
}

impl Http2Body {
    /// The body of `stream`; `ping_timed_out` is set when its connection is closed for an unanswered ping.
    pub fn new(stream: RecvStream, ping_timed_out: Rc<Cell<bool>>) -> Self {
        Self { stream, data_ended: false, ping_timed_out }
    }

    /// The next chunk, or the trailers. A chunk frees its bytes in the flow-control window (RFC 9113, 5.2).
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        if !self.data_ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(chunk)) => {
                    // Fails only if the stream has ended, and then the window does not matter.
                    let _ended = self.stream.flow_control().release_capacity(chunk.len());
                    return Poll::Ready(Some(Ok(Frame::data(chunk))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(UpstreamError::http2(error, &self.ping_timed_out)))),
                None => self.data_ended = true,
            }
        }
        let trailers =
            ready!(self.stream.poll_trailers(cx)).map_err(|error| UpstreamError::http2(error, &self.ping_timed_out));
        Poll::Ready(trailers.transpose().map(|trailers| trailers.map(Frame::trailers)))
    }
}

/// How a connection or a stream failed.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The error of hyper, over HTTP/1.1.
    #[error(transparent)]
    Http1(#[from] hyper::Error),
    /// The error of h2, over HTTP/2.
    #[error("HTTP/2 error")]
    Http2(#[source] h2::Error),
    /// The HTTP/2 connection was silent and the peer did not answer a PING: within 2 s if calls had timed out on it, else
    /// within 10 s.
    #[error("the HTTP/2 connection was silent and the upstream did not answer a PING in time")]
    PingTimeout,
}

impl UpstreamError {
    /// The error of h2, or [`Self::PingTimeout`] if that is why the connection was closed.
    pub fn http2(error: h2::Error, ping_timed_out: &Cell<bool>) -> Self {
        if ping_timed_out.get() { Self::PingTimeout } else { Self::Http2(error) }
    }

    /// True if the peer sent bytes that are not valid HTTP.
    pub fn is_malformed(&self) -> bool {
        match self {
            Self::Http1(error) => error.is_parse() || error.is_parse_status(),
            Self::Http2(error) => error.is_library(),
            Self::PingTimeout => false,
        }
    }

    /// True if the head of an HTTP/1.1 response has more bytes or more fields than hyper parses.
    pub fn is_head_too_large(&self) -> bool {
        matches!(self, Self::Http1(error) if error.is_parse_too_large())
    }

    /// True if the peer has declared the request unprocessed (RFC 9113, 8.7), so that it may be sent again, whatever its
    /// method.
    pub fn is_unprocessed(&self) -> bool {
        match self {
            // h2 reports the peer's GOAWAY only on streams above its last stream id.
            Self::Http2(error) => {
                error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
            }
            Self::Http1(_) | Self::PingTimeout => false,
        }
    }

    /// True if the connection ended before the first byte of the response; false for the reset of a single stream.
    pub fn is_connection_closed(&self) -> bool {
        match self {
            Self::Http1(_) => !self.is_malformed(),
            Self::Http2(error) => !error.is_reset() && !error.is_library(),
            Self::PingTimeout => false,
        }
    }

    /// True if the connection ended without a word, and with it every request on it: no GOAWAY, and no reset of a stream.
    pub fn is_silent_end(&self) -> bool {
        match self {
            Self::Http1(_) | Self::Http2(_) => self.is_connection_closed() && !self.is_go_away(),
            Self::PingTimeout => true,
        }
    }

    /// True if the peer ended the connection with GOAWAY, and not this stream alone.
    pub fn is_go_away(&self) -> bool {
        matches!(self, Self::Http2(error) if error.is_go_away())
    }

    /// The error and its causes, in one line.
    pub fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    }
}

/// Why a request got no response.
pub struct SendError {
    /// The failure of connection or stream.
    pub error: UpstreamError,
    /// The request, if no byte of it has been sent.
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
