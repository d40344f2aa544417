//! One HTTP/1.1 connection to an upstream.
//!
//! It has no task of its own: whoever holds it drives it. A request, its answer and both bodies thus run in the
//! caller's task, which saves two wake-ups for each request, and a call that is dropped closes its connection.

use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use crate::net::body::RequestBody;
use crate::net::io::Io;

/// One connection.
pub struct Http1 {
    sender: SendRequest<RequestBody>,
    connection: Connection<TokioIo<Io>, RequestBody>,
    over: bool,
    /// When it was opened.
    pub born: Instant,
    /// When its last answer ended.
    pub idle_since: Instant,
}

impl Http1 {
    /// Makes an open stream an HTTP/1.1 connection. Sends nothing yet.
    pub async fn new(io: Io, now: Instant) -> Result<Box<Self>, hyper::Error> {
        let (sender, connection) = Builder::new().handshake(TokioIo::new(io)).await?;
        Ok(Box::new(Self { sender, connection, over: false, born: now, idle_since: now }))
    }

    /// Hands a request to the connection; [`Http1::drive`] moves it.
    pub fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<RequestBody>>>> + use<> {
        self.sender.try_send_request(request)
    }

    /// Moves whatever can be moved. Ready when the connection is over, for good or ill.
    pub fn drive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.over {
            return Poll::Ready(());
        }
        // The error itself reaches whoever waits for the answer or reads its body.
        let polled = self.connection.poll_without_shutdown(cx);
        self.over = polled.is_ready();
        polled.map(|_| ())
    }

    /// Looks whether another request may be sent: the peer has neither closed nor said anything unasked.
    pub fn is_fresh(&mut self, cx: &mut Context<'_>) -> bool {
        self.drive(cx).is_pending() && self.sender.is_ready()
    }

    /// The same right after an answer: asks hyper only, which has just read from the stream.
    pub fn is_reusable(&mut self, cx: &mut Context<'_>) -> bool {
        self.sender.is_ready() || self.is_fresh(cx)
    }

    /// The stream itself and what was read beyond the answer's head, after the protocol has been switched.
    pub fn into_stream(self) -> (Io, Bytes) {
        let parts = self.connection.into_parts();
        (parts.io.into_inner(), parts.read_buf)
    }
}
