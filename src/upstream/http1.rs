//! One HTTP/1.1 connection to an upstream.
//!
//! Leased to one request at a time. Invariant: the connection has no task of its own, the holder of the lease drives it. So
//! request, response and both bodies run in the caller's task, which saves two wake-ups per request, and dropping a call
//! resets its connection: an upstream that only saw FIN could take it for a caller that waits for the response (RFC 9112,
//! 9.6), and would work on.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use crate::net::body::RequestBody;
use crate::net::io::{Activity, Io};
use crate::upstream::lifetime::Lifetime;

/// Resets the connection if it is dropped while a request or its response is incomplete.
struct ExchangeGuard {
    activity: Arc<Activity>,
    is_in_progress: bool,
}

impl Drop for ExchangeGuard {
    fn drop(&mut self) {
        if self.is_in_progress {
            self.activity.set_reset_on_drop(true);
        }
    }
}

/// One HTTP/1.1 connection.
pub struct Http1 {
    /// Dropped before the connection.
    exchange: ExchangeGuard,
    sender: SendRequest<RequestBody>,
    connection: Connection<TokioIo<Io>, RequestBody>,
    is_closed: bool,
    /// How long it is used, and how often it was.
    pub lifetime: Lifetime,
    /// When the last response ended; when the connection was opened, before the first.
    pub idle_since: Instant,
}

/// What a connection can do when a response on it is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterResponse {
    /// Take the next request.
    Reusable,
    /// The request is still being sent: the upstream has responded early.
    StillSending,
    /// Nothing.
    Closed,
}

impl Http1 {
    /// Begins HTTP/1.1 on an open stream. Sends no byte. A response with more than `max_headers` fields is an error.
    ///
    /// # Errors
    /// If hyper refuses the stream.
    pub async fn new(io: Io, max_headers: usize, lifetime: Lifetime) -> Result<Box<Self>, hyper::Error> {
        let exchange = ExchangeGuard { activity: io.activity(), is_in_progress: false };
        let (sender, connection) = Builder::new()
            // A space before the colon of a field is removed (RFC 9112, 5.1).
            .allow_spaces_after_header_name_in_responses(true)
            .max_headers(max_headers)
            .handshake(TokioIo::new(io.upstream()))
            .await?;
        let idle_since = lifetime.opened_at;
        Ok(Box::new(Self { exchange, sender, connection, is_closed: false, lifetime, idle_since }))
    }

    /// Queues a request on the connection; [`Http1::drive`] sends it. The future resolves with the response head, or with
    /// the request if no byte of it has been sent.
    pub fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<RequestBody>>>> + use<> {
        self.exchange.is_in_progress = true;
        self.sender.try_send_request(request)
    }

    /// Reads and writes what is possible now. Ready when the connection is closed, with or without an error.
    pub fn drive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_closed {
            return Poll::Ready(());
        }
        // The error itself reaches the future of `send`, or the response body.
        let polled = self.connection.poll_without_shutdown(cx);
        self.is_closed = polled.is_ready();
        polled.map(|_| ())
    }

    /// True if an idle connection can take a request: the peer has neither closed it nor sent unexpected bytes.
    pub fn is_fresh(&mut self, cx: &mut Context<'_>) -> bool {
        self.drive(cx).is_pending() && self.sender.is_ready() && !self.exchange.activity.write_failed()
    }

    /// What follows a complete response. Costs less than [`Http1::is_fresh`]: hyper has just read from the stream.
    pub fn after_response(&mut self, cx: &mut Context<'_>) -> AfterResponse {
        let is_ready = self.sender.is_ready() && !self.exchange.activity.write_failed();
        let after = match is_ready || self.is_fresh(cx) {
            true => AfterResponse::Reusable,
            false if self.is_closed || self.exchange.activity.write_failed() => AfterResponse::Closed,
            false => AfterResponse::StillSending,
        };
        self.exchange.is_in_progress &= after == AfterResponse::StillSending;
        after
    }

    /// The stream, and the bytes read beyond the response head, after an upgrade.
    pub fn into_stream(mut self) -> (Io, Bytes) {
        self.exchange.is_in_progress = false;
        let parts = self.connection.into_parts();
        (parts.io.into_inner().bare(), parts.read_buf)
    }
}
