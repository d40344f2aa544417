//! The timeouts of a downstream connection that no exchange sees: slow request heads, silence between requests, and callers
//! that stop reading their response.
//!
//! The usual request arrives in one piece and is answered at once; for it no timer is set at all.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use crate::net::flow::Flow;
use crate::net::io::Activity;
use crate::problems::Sourced;
use crate::proxy::downstream::DownstreamConnection;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::worker_context::WorkerContext;
use crate::runtime::timer::{Timer, Timers};

/// How a downstream connection ended.
pub(super) enum ConnectionEnd {
    /// hyper has ended it.
    Over(hyper::Result<()>),
    /// A request head did not come in time.
    SlowHead {
        /// What the caller is told.
        reply: LocalReply,
        /// When its first byte came.
        since: Instant,
    },
    /// No request for too long.
    Silent,
    /// The caller did not take its response.
    Cut,
    /// The caller reset the connection, or closed its sending side during a stream.
    Left,
}

enum State {
    /// An exchange is in progress, with time limits of its own.
    Busy,
    /// No byte of the next request has come; `reads` had been made when that began.
    Idle { since: Instant, reads: u64 },
    /// Some bytes of a head have come.
    Head { since: Instant },
    /// It is to end; `moved` reads and writes had been made by then.
    Ending { since: Instant, moved: u64 },
}

/// A draining HTTP/2 connection on which no byte moves for this long has a caller that does not respond to GOAWAY.
const STALLED: Duration = Duration::from_secs(2);

/// The timeouts of one downstream connection.
pub(super) struct ConnectionTimeouts {
    activity: Arc<Activity>,
    /// The listener's limit when the connection began, in bytes.
    pub(super) max_header_size: usize,
    /// The same, in header fields.
    pub(super) max_header_count: u32,
    /// The listener's `maxStreams` when the connection began.
    pub(super) max_streams: u32,
    headers: Sourced<Duration>,
    idle: Duration,
    state: State,
    /// Exchanges that were over at the last poll.
    finished: u64,
    timer: Timer,
    rings: Instant,
}

impl ConnectionTimeouts {
    /// Begins when the first bytes are there.
    pub(super) fn new(worker: &WorkerContext, downstream: &DownstreamConnection, activity: Arc<Activity>) -> Self {
        let now = Instant::now();
        let view = worker.view();
        let values = downstream.listener.values_in(&view.policy);
        let headers = values.headers_timeout.clone();
        let rings = now + headers.value;
        Self {
            activity,
            idle: values.idle.value,
            max_header_size: values.max_header_size.value as usize,
            max_header_count: values.max_header_count.value,
            max_streams: values.max_streams.value,
            state: State::Head { since: now },
            finished: 0,
            timer: worker.timers.at(rings),
            rings,
            headers,
        }
    }

    /// Polls the timeouts of an HTTP/1 connection while hyper waits for bytes.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, downstream: &DownstreamConnection) -> Poll<ConnectionEnd> {
        if downstream.is_busy() {
            self.state = State::Busy;
            let Some(flow) = downstream.newest() else { return Poll::Pending };
            let Some(at) = flow.cutoff_at() else { return Poll::Pending };
            return match self.ring(cx, at) {
                Poll::Ready(()) => {
                    flow.record_cutoff();
                    Poll::Ready(ConnectionEnd::Cut)
                }
                Poll::Pending => Poll::Pending,
            };
        }
        self.next_state(downstream);
        match self.state {
            State::Busy | State::Ending { .. } => Poll::Pending,
            State::Idle { since, .. } => self.ring(cx, since + self.idle).map(|()| ConnectionEnd::Silent),
            State::Head { since } => self.ring(cx, since + self.headers.value).map(|()| {
                let detail = "the head of a request did not come in time";
                let reply = LocalReply::timed(LocalReplyKind::CallerTimeout, "timeouts.headers", &self.headers, detail);
                ConnectionEnd::SlowHead { reply, since }
            }),
        }
    }

    /// Ready when an HTTP/2 connection has had no stream for too long.
    pub(super) fn poll_silence(&mut self, cx: &mut Context<'_>, downstream: &DownstreamConnection) -> Poll<()> {
        match (downstream.is_busy(), &self.state) {
            (true, _) => {
                self.state = State::Busy;
                Poll::Pending
            }
            (false, State::Idle { since, .. }) => {
                let at = *since + self.idle;
                self.ring(cx, at)
            }
            (false, State::Busy | State::Head { .. } | State::Ending { .. }) => {
                let since = Instant::now();
                self.state = State::Idle { since, reads: 0 };
                self.ring(cx, since + self.idle)
            }
        }
    }

    /// Ready when a draining HTTP/2 connection has no stream and no byte moves on it any more: the graceful end would wait
    /// for the caller.
    pub(super) fn poll_stalled(&mut self, cx: &mut Context<'_>, downstream: &DownstreamConnection) -> Poll<()> {
        let moved = self.activity.total();
        let since = match self.state {
            State::Ending { since, moved: before } if before == moved && !downstream.is_busy() => since,
            _ => Instant::now(),
        };
        self.state = State::Ending { since, moved };
        if downstream.is_busy() { Poll::Pending } else { self.ring(cx, since + STALLED) }
    }

    fn next_state(&mut self, downstream: &DownstreamConnection) {
        let reads = self.activity.reads();
        // An exchange that began and ended between two polls was never seen as busy.
        let was_busy = std::mem::replace(&mut self.finished, downstream.finished()) != downstream.finished();
        if was_busy {
            self.state = State::Busy;
        }
        self.state = match self.state {
            State::Busy => State::Idle { since: downstream.over_at().unwrap_or_else(Instant::now), reads },
            State::Idle { reads: before, .. } if reads != before => State::Head { since: Instant::now() },
            State::Idle { since, reads } => State::Idle { since, reads },
            State::Head { since } => State::Head { since },
            State::Ending { since, moved } => State::Ending { since, moved },
        };
    }

    /// Ready at `at`. A timer that fires earlier is moved only when it has fired.
    fn ring(&mut self, cx: &mut Context<'_>, at: Instant) -> Poll<()> {
        if at < self.rings {
            self.rings = at;
            self.timer.set(at);
        }
        while self.timer.poll(cx).is_ready() {
            if Instant::now() >= at {
                return Poll::Ready(());
            }
            self.rings = at;
            self.timer.set(at);
        }
        Poll::Pending
    }

    /// Ready when the caller has not taken the response of one HTTP/2 stream in time.
    pub(super) fn poll_cut(
        cx: &mut Context<'_>,
        flow: &Rc<Flow>,
        timers: &Timers,
        timer: &mut Option<Timer>,
    ) -> Poll<()> {
        let Some(at) = flow.cutoff_at() else { return Poll::Pending };
        let timer = timer.get_or_insert_with(|| timers.at(at));
        timer.set(at);
        match timer.poll(cx) {
            Poll::Ready(()) => {
                flow.record_cutoff();
                Poll::Ready(())
            }
            Poll::Pending => Poll::Pending,
        }
    }
}
