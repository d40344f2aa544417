//! The answer's body on its way to the caller; the exchange ends with it.
//!
//! Nothing is buffered: a chunk is read from the upstream when the caller can take it. Over HTTP/1.1 the body also
//! moves the upstream connection, which has no task of its own. When time is over or the upstream breaks off, a
//! gRPC caller gets trailers with a status, and any other caller sees the body cut, never a shorter whole.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use crate::net::trailers;
use crate::proxy::fault_injection::FaultyBody;
use crate::proxy::grpc::{self, GrpcStatus};
use crate::proxy::local_reply::{BodyError, LocalReply, LocalReplyKind};
use crate::proxy::request_context::RequestContext;
use crate::proxy::timeouts::TimeoutVerdict;
use crate::proxy::{correlation, outcome};
use crate::upstream::pool::Transport;
use crate::upstream::response::UpstreamBody;

/// The body of an answer.
pub struct ResponseBody {
    source: Source,
    /// Present until the exchange is over.
    live: Option<Box<RequestContext>>,
    /// How many bytes the caller waits for, where the head says so.
    length: Option<u64>,
    /// The upstream is what was waited for when this was last asked for something.
    waits: bool,
    /// What is left of a chunk of which the caller gets a piece at a time.
    rest: Option<Bytes>,
    /// Why it is cut, until hyper is told.
    cut: Option<BodyError>,
}

/// What a caller over HTTP/2 gets at a time, in bytes: h2 takes a whole chunk however little of it the caller has asked
/// for, and what it holds of an answer would count as taken.
const PIECE: usize = 32 * 1024;

enum Source {
    Empty,
    Whole(Bytes),
    Upstream(UpstreamBody),
    Faulty(Box<FaultyBody>),
}

impl Source {
    /// True once nothing more comes.
    fn is_end(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Whole(bytes) => bytes.is_empty(),
            Self::Upstream(incoming) => incoming.is_end_stream(),
            Self::Faulty(body) => body.is_end_stream(),
        }
    }
}

impl ResponseBody {
    /// No body; `request_context`, if given, has ended well.
    pub fn empty() -> Self {
        Self::of(Source::Empty)
    }

    /// A body of our own.
    pub fn whole(bytes: Bytes) -> Self {
        Self::of(if bytes.is_empty() { Source::Empty } else { Source::Whole(bytes) })
    }

    fn of(source: Source) -> Self {
        Self { source, live: None, length: None, waits: true, rest: None, cut: None }
    }

    /// The body of an upstream's answer, of `length` bytes where that is known. Ends the exchange at once if there is
    /// nothing to come, or nothing that the caller would wait for.
    pub fn upstream(incoming: UpstreamBody, length: Option<u64>, mut live: Box<RequestContext>) -> Self {
        live.patience.answered = true;
        if incoming.is_end_stream() || length == Some(0) {
            // Nobody waits for this connection any more; the next one to look at it brings a waker of its own.
            finish(live, &mut Context::from_waker(Waker::noop()));
            return Self::empty();
        }
        let source = match live.fault.take().and_then(|fault| fault.body) {
            Some(fault) => {
                let timers = &live.worker.timers;
                Source::Faulty(Box::new(FaultyBody::new(incoming, fault, timers, live.over_at)))
            }
            None => Source::Upstream(incoming),
        };
        let mut body = Self::of(source);
        (body.live, body.length) = (Some(live), length);
        body.mark_cut();
        body
    }

    /// Takes the chunk or the trailers that came; `last` if nothing comes after them.
    fn take(&mut self, mut frame: Frame<Bytes>, last: bool, cx: &mut Context<'_>) -> Frame<Bytes> {
        let Some(live) = &mut self.live else { return frame };
        if let Some(chunk) = frame.data_ref() {
            // Nobody will ask when the last chunk came.
            let now = if last { live.over_at } else { Instant::now() };
            live.flow.passed(&live.flow.response, chunk, now);
        }
        if let Some(fields) = frame.trailers_mut() {
            trailers::clean(fields, &live.named);
            if let Some((code, message)) = grpc::read_status(fields) {
                live.record.set_grpc_status(code, message);
                outcome::ends_with(live, code);
                correlation::mark_trailers(live, fields, code, live.over_at);
            }
        }
        if last {
            self.end(cx)
        } else {
            if live.patience.grpc && frame.is_data() {
                // An answer that goes on after its first message; if that was a unary one, it is over now anyway.
                outcome::streams(live, live.over_at);
            }
            self.mark_cut()
        }
        frame
    }

    /// Says when the answer is to be cut if the caller does not take it.
    fn mark_cut(&mut self) {
        if let Some(live) = &self.live {
            live.flow.cut_by(Some(live.patience.cut(&live.route().timeouts)));
        }
    }

    /// Why a frame that has come may not be passed on any more: an upstream that always has something to say never lets
    /// the body's timer be asked.
    fn overdue(&self) -> Option<LocalReply> {
        let live = self.live.as_ref()?;
        match live.patience.judge(live.flow.last(), &live.route().timeouts, &live.flow) {
            TimeoutVerdict::Over(refusal) => Some(refusal),
            TimeoutVerdict::Wait(_) => None,
        }
    }

    fn end(&mut self, cx: &mut Context<'_>) {
        self.source = Source::Empty;
        if let Some(live) = self.live.take() {
            finish(live, cx);
        }
    }

    /// Ends the exchange early: with a status for gRPC, by cutting the body otherwise.
    fn break_off(
        &mut self,
        code: GrpcStatus,
        message: &str,
        cut: BodyError,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.source = Source::Empty;
        let live = self.live.take();
        let Some(mut live) = live else { return Poll::Ready(Some(Err(cut))) };
        live.flow.cut_by(None);
        live.over_at = Instant::now();
        live.record.complete();
        if !live.patience.grpc {
            return Poll::Ready(Some(Err(cut)));
        }
        let mut fields = grpc::status_fields(code, message);
        live.record.set_grpc_status(code as u32, fields.get(grpc::MESSAGE).cloned());
        let now = live.over_at;
        correlation::mark_trailers(&mut live, &mut fields, code as u32, now);
        Poll::Ready(Some(Ok(Frame::trailers(fields))))
    }

    fn broken(&mut self, cut: BodyError) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(refusal) = self.live.as_ref().and_then(|live| outcome::broken_by_caller(live)) {
            return self.given_up(&refusal, cut);
        }
        if let Some(live) = &mut self.live {
            live.record.upstream_cut();
            blame(live, LocalReplyKind::UpstreamReset, Instant::now());
        }
        let message = match &cut {
            BodyError::Upstream(error) => {
                format!("hopguard upstream_cut: the upstream broke off its answer: {}", error.sentence())
            }
            BodyError::Fault(_) | BodyError::RateLimitExceeded(_) => format!("hopguard upstream_cut: {cut}"),
        };
        self.break_off(GrpcStatus::Unavailable, &message, cut)
    }

    /// The caller's own body has broken off. Who has left hears nothing, and nobody is blamed.
    fn given_up(&mut self, refusal: &LocalReply, cut: BodyError) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.live.as_ref().is_none_or(|live| !live.flow.request.left()) {
            return self.end_with(refusal);
        }
        self.source = Source::Empty;
        if let Some(live) = self.live.take() {
            live.flow.cut_by(None);
        }
        Poll::Ready(Some(Err(cut)))
    }

    /// Time is over, and the upstream is what was waited for.
    fn refuse(&mut self, refusal: &LocalReply) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(live) = &mut self.live {
            let now = Instant::now();
            blame(live, refusal.kind, now);
            correlation::ended(live, refusal.kind, now);
        }
        self.end_with(refusal)
    }

    /// Time is over, but the upstream had more to give at once: it says nothing against it that the answer was too long.
    /// `at` is when the caller got the chunk before, if it did not wait for this one.
    fn cut_short(
        &mut self,
        mut refusal: LocalReply,
        at: Option<Instant>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(live) = &mut self.live {
            let now = Instant::now();
            outcome::judge_probes(live, now);
            if let Some(at) = at {
                refusal = live.patience.unread(refusal, now.saturating_duration_since(at), &live.route().timeouts);
            }
        }
        self.end_with(&refusal)
    }

    fn end_with(&mut self, refusal: &LocalReply) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let (code, message) = refusal.grpc();
        if let Some(live) = &mut self.live {
            live.record.refuse(refusal.record());
        }
        self.break_off(code, &message, BodyError::RateLimitExceeded(refusal.sentence()))
    }

    /// Judges the exchange whenever its timer rings.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<LocalReply> {
        let Some(live) = &mut self.live else { return Poll::Pending };
        loop {
            let now = Instant::now();
            match live.patience.judge(now, &live.route().timeouts, &live.flow) {
                TimeoutVerdict::Over(refusal) => return Poll::Ready(refusal),
                TimeoutVerdict::Wait(at) => live.timer.set(at),
            }
            if live.timer.poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

/// An answer ends before its end. Whoever called on for it is told, by the trailers where it is gRPC.
fn blame(live: &mut RequestContext, kind: LocalReplyKind, now: Instant) {
    outcome::judge_cut(live, kind, now);
    if kind.is_of_the_callee() && !live.patience.grpc && live.mark.is_none() {
        let is_final = live.route().retry.is_final(live.attempt.into(), live.is_safe, None);
        correlation::failed(live, None, is_final, now);
    }
}

/// Ends an exchange whose answer is complete; its connection goes back to the pool if it can take another request.
fn finish(mut live: Box<RequestContext>, cx: &mut Context<'_>) {
    live.flow.cut_by(None);
    live.flow.response.end();
    live.over_at = Instant::now();
    live.record.complete_at(live.over_at);
    outcome::judge_complete(&mut live);
    let Some(lease) = live.lease.take() else { return };
    if !live.flow.request.ended() {
        // The caller is still sending what nobody will read: the connection has no clean end.
        return;
    }
    let keep = &live.destination_values().connections;
    let announced = live.keep_alive.map(|seconds| Duration::from_secs(seconds.into()));
    lease.give_back(cx, keep.idle.value, keep.max_idle.value as usize, announced, live.over_at);
    live.worker.upstreams.note_idle();
}

impl Drop for ResponseBody {
    /// Whoever is not waited for any more: an answer that the caller has whole, without having asked for its end, and one
    /// that was cut. Any other is one whose caller has gone.
    fn drop(&mut self) {
        let Some(mut live) = self.live.take() else { return };
        if self.length.is_some_and(|length| live.flow.response.bytes() >= length) {
            finish(live, &mut Context::from_waker(Waker::noop()));
        } else if live.flow.was_cut() {
            let now = Instant::now();
            if let Some(refusal) = live.patience.cut_off(now, &live.route().timeouts, &live.flow) {
                // Nobody asked for the next byte: what was waited for is the caller, whatever time was over.
                outcome::judge_probes(&mut live, now);
                live.record.refuse(refusal.record());
            }
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(cut) = self.cut.take() {
            return Poll::Ready(Some(Err(cut)));
        }
        let polled = self.poll_next(cx);
        let Poll::Ready(Some(Err(cut))) = polled else { return polled };
        // With the error hyper throws away what it has not written yet, be it the head: first it gets a turn to write.
        self.cut = Some(cut);
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.source, Source::Empty) && self.cut.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Upstream(incoming) => incoming.size_hint(),
            Source::Faulty(body) => body.size_hint(),
        }
    }
}

impl ResponseBody {
    /// What the upstream has sent, or the end that time puts to it.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        // What hyper has room for may come long after what the caller would take.
        let unasked = self.live.as_ref().filter(|_| !self.waits).map(|live| live.flow.last());
        let polled = match &self.live {
            Some(live) => {
                let waker = Rc::clone(&live.waker);
                match &live.lease {
                    Some(lease) if lease.is_http1() => waker.poll(cx, |cx| self.advance(cx)),
                    _ => self.advance(cx),
                }
            }
            None => self.advance(cx),
        };
        self.waits = polled.is_pending();
        match polled {
            Poll::Ready(_) => match self.overdue() {
                Some(refusal) => self.cut_short(refusal, unasked),
                None => polled,
            },
            Poll::Pending => match self.poll_patience(cx) {
                Poll::Ready(refusal) => self.refuse(&refusal),
                Poll::Pending => Poll::Pending,
            },
        }
    }

    /// What the upstream has sent, if it has sent anything.
    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        // Once for what is there, once more after the connection has been moved.
        for moved in [false, true] {
            let polled = match (self.rest.take(), &mut self.source) {
                (Some(rest), _) => Poll::Ready(Some(Ok(Frame::data(rest)))),
                (None, Source::Empty) => return Poll::Ready(None),
                (None, Source::Whole(bytes)) => {
                    let bytes = std::mem::take(bytes);
                    self.source = Source::Empty;
                    return Poll::Ready(Some(Ok(Frame::data(bytes))));
                }
                (None, Source::Upstream(incoming)) => Pin::new(incoming).poll_frame(cx).map_err(BodyError::Upstream),
                (None, Source::Faulty(body)) => body.poll_frame(cx),
            };
            match polled {
                Poll::Ready(Some(Ok(frame))) => {
                    let frame = self.piece(frame);
                    // Nothing comes behind trailers, and few callers ask whether it does.
                    let last = frame.is_trailers() || (self.rest.is_none() && self.source.is_end());
                    return Poll::Ready(Some(Ok(self.take(frame, last, cx))));
                }
                Poll::Ready(Some(Err(cut))) => return self.broken(cut),
                Poll::Ready(None) => {
                    self.end(cx);
                    return Poll::Ready(None);
                }
                Poll::Pending if !moved => self.move_connection(cx),
                Poll::Pending => {}
            }
        }
        Poll::Pending
    }

    /// As much of a chunk as the caller gets at a time.
    fn piece(&mut self, frame: Frame<Bytes>) -> Frame<Bytes> {
        let in_pieces = self.live.as_ref().is_some_and(|live| live.caller.has_streams());
        if !in_pieces || frame.data_ref().is_none_or(|chunk| chunk.len() <= PIECE) {
            return frame;
        }
        frame.map_data(|mut chunk| {
            let piece = chunk.split_to(PIECE);
            self.rest = Some(chunk);
            piece
        })
    }

    fn move_connection(&mut self, cx: &mut Context<'_>) {
        let lease = self.live.as_mut().and_then(|live| live.lease.as_mut());
        if let Some(Transport::Http1(connection)) = lease.and_then(|lease| lease.transport()) {
            let _over = connection.drive(cx);
        }
    }
}
