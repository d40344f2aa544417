//! Notices over HTTP/1 that a caller leaves while its exchange is in progress.
//!
//! A reset says so. A closed sending side does not: a caller may half-close its connection behind its request and wait for
//! the response (RFC 9112, 9.6). It has left if the exchange is a stream, or if its process on this host has closed the
//! connection; any other is noticed when the response cannot be written.

use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use crate::net::io::PeerEvent;
use crate::net::shared::SharedIo;
use crate::proxy::downstream::DownstreamConnection;
use crate::runtime::timer::{Timer, Timers};

/// When the kernel is asked whether a half-closed connection is closed: at the FIN, and a moment after it, because `close`
/// sends the FIN before the socket has lost its process; then less and less often, because a later `close` sends nothing.
const FIRST_INTERVAL: Duration = Duration::from_millis(1);
const LAST_INTERVAL: Duration = Duration::from_secs(1);

/// What a caller did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallerEvent {
    /// Something that hyper reads next.
    Readable,
    /// It has left.
    Left,
}

/// Watches one connection.
pub(super) struct CallerWatch {
    stream: SharedIo,
    downstream: Rc<DownstreamConnection>,
    timers: Timers,
    /// Fires for the next check of a half-closed connection.
    half_closed: Option<NextCheck>,
}

struct NextCheck {
    timer: Timer,
    interval: Duration,
}

impl CallerWatch {
    /// Watches `stream`.
    pub(super) fn new(stream: SharedIo, downstream: &Rc<DownstreamConnection>, timers: &Timers) -> Self {
        Self { stream, downstream: Rc::clone(downstream), timers: timers.clone(), half_closed: None }
    }

    /// Ready when the caller does something during an exchange, which hyper does not notice.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<CallerEvent> {
        if !self.downstream.is_busy() || !self.downstream.may_be_read() {
            return Poll::Pending;
        }
        match self.stream.poll_peer(cx) {
            Poll::Ready(PeerEvent::Reset) => return Poll::Ready(CallerEvent::Left),
            Poll::Ready(PeerEvent::Sent) => return Poll::Ready(CallerEvent::Readable),
            Poll::Ready(PeerEvent::HalfClosed) => {
                self.half_closed = Some(NextCheck { timer: self.timers.at(Instant::now()), interval: FIRST_INTERVAL });
                return Poll::Ready(CallerEvent::Readable);
            }
            Poll::Pending => {}
        }
        match &self.half_closed {
            None => Poll::Pending,
            Some(_) => self.poll_half_closed(cx).map(|()| CallerEvent::Left),
        }
    }

    #[cold]
    fn poll_half_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.downstream.newest().is_some_and(|flow| flow.is_stream()) {
            return Poll::Ready(());
        }
        let Some(NextCheck { timer, interval }) = &mut self.half_closed else { return Poll::Pending };
        while timer.poll(cx).is_ready() {
            if self.stream.is_closed_by_peer() {
                return Poll::Ready(());
            }
            timer.set(Instant::now() + *interval);
            *interval = (*interval * 4).min(LAST_INTERVAL);
        }
        Poll::Pending
    }

    /// The stream, once hyper has dropped it.
    pub(super) fn into_stream(self) -> SharedIo {
        self.stream
    }
}
