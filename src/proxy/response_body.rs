//! The body of a response on its way to the caller; the exchange ends with it.
//!
//! Nothing is buffered: a chunk is read from the upstream when the caller can take it. Over HTTP/1.1 the body also drives
//! the upstream connection, which has no task of its own. When a time limit ends it or the upstream breaks off, a gRPC
//! caller gets trailers with a status, and any other caller sees the body cut, never a shorter whole.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use crate::net::trailers;
use crate::proxy::exchange::ActiveExchange;
use crate::proxy::fault_injection::FaultyBody;
use crate::proxy::grpc::{self, GrpcStatus};
use crate::proxy::local_reply::{BodyError, LocalReply, LocalReplyKind};
use crate::proxy::timeout_state::{TimeoutVerdict, WaitingFor};
use crate::proxy::{admission, breaker_and_ejection, correlation, late_upload, proxy_status, select, timeouts};
use crate::upstream::pool::{Lease, Transport};
use crate::upstream::response::UpstreamBody;

/// The body of a response.
pub(super) struct ResponseBody {
    source: Source,
    /// Present until the exchange is over.
    exchange: Option<Box<ActiveExchange>>,
    /// How many bytes the caller waits for, where the head says so.
    length: Option<u64>,
    /// The last poll waited for the upstream.
    waits: bool,
    /// The rest of a chunk of which the caller gets a piece at a time.
    rest: Option<Bytes>,
    /// Why it is cut, until hyper is told.
    cut: Option<BodyError>,
}

type PolledFrame = Poll<Option<Result<Frame<Bytes>, BodyError>>>;

/// What a caller over HTTP/2 gets at a time, in bytes: h2 takes a whole chunk however little of it the caller has asked
/// for, and what h2 holds of a response would count as taken.
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
    /// No body.
    pub(super) fn empty() -> Self {
        Self::of(Source::Empty)
    }

    /// A body of hopguard's own.
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self::of(if bytes.is_empty() { Source::Empty } else { Source::Whole(bytes) })
    }

    fn of(source: Source) -> Self {
        Self { source, exchange: None, length: None, waits: true, rest: None, cut: None }
    }

    /// The body of an upstream's response, of `length` bytes where that is known. Ends the exchange at once if there is
    /// nothing to come, or nothing that the caller would wait for.
    pub(super) fn upstream(incoming: UpstreamBody, length: Option<u64>, mut exchange: Box<ActiveExchange>) -> Self {
        if incoming.is_end_stream() || length == Some(0) {
            // No task waits for this connection any more; the next one to poll it brings a waker of its own.
            finish(exchange, &mut Context::from_waker(Waker::noop()));
            return Self::empty();
        }
        let source = match exchange.attempt.take_body_fault() {
            Some(fault) => {
                let context = &exchange.context;
                let timers = &context.worker().timers;
                Source::Faulty(Box::new(FaultyBody::new(incoming, fault, timers, context.ended_at())))
            }
            None => Source::Upstream(incoming),
        };
        let mut body = Self::of(source);
        (body.exchange, body.length) = (Some(exchange), length);
        body.set_cutoff();
        body
    }

    /// Passes on the chunk or the trailers that came; `is_last` if nothing comes after them.
    fn pass_on(&mut self, mut frame: Frame<Bytes>, is_last: bool, cx: &mut Context<'_>) -> Frame<Bytes> {
        let Some(exchange) = &mut self.exchange else { return frame };
        let ActiveExchange { context, attempt, response, .. } = &mut **exchange;
        if let Some(lease) = attempt.lease_mut() {
            lease.record_answer();
        }
        if let Some(chunk) = frame.data_ref() {
            // When the last chunk came matters to no limit.
            let now = if is_last { context.ended_at() } else { Instant::now() };
            let flow = context.flow();
            flow.record_bytes(&flow.response, chunk, now);
        }
        if let Some(fields) = frame.trailers_mut() {
            let sanitize = if context.is_grpc() { trailers::sanitize_grpc } else { trailers::sanitize };
            sanitize(fields, &response.named_by_connection);
            if let Some((code, message)) = grpc::read_status(fields) {
                context.record_mut().set_grpc_status(code, message);
                breaker_and_ejection::trailers_received(context, attempt, code);
                let now = context.ended_at();
                proxy_status::write_trailers(context, attempt.number(), fields, code, now);
            }
        }
        if is_last {
            self.end(cx);
        } else {
            if context.is_grpc() && frame.is_data() {
                // A response that goes on after its first message; the response to a unary call is over now anyway.
                let now = context.ended_at();
                breaker_and_ejection::became_stream(context, attempt, now);
            }
            self.set_cutoff();
        }
        frame
    }

    /// Sets when the response is cut if the caller does not take it.
    fn set_cutoff(&mut self) {
        if let Some(exchange) = &self.exchange {
            let context = &exchange.context;
            context.flow().set_cutoff(Some(context.timeout_state().cutoff(context.timeouts())));
        }
    }

    /// Why a frame that has come may not be passed on any more: an upstream that always has more to send would never let
    /// the body's timer be polled.
    fn overdue(&self) -> Option<LocalReply> {
        let context = &self.exchange.as_ref()?.context;
        let flow = context.flow();
        match context.timeout_state().check(WaitingFor::Body, flow.last_activity(), context.timeouts(), flow) {
            TimeoutVerdict::Expired(reply) => Some(reply),
            TimeoutVerdict::Wait(_) => None,
        }
    }

    fn end(&mut self, cx: &mut Context<'_>) {
        self.source = Source::Empty;
        if let Some(exchange) = self.exchange.take() {
            finish(exchange, cx);
        }
    }

    /// Ends the exchange early: with a status for gRPC, by cutting the body otherwise.
    fn break_off(&mut self, code: GrpcStatus, message: &str, cut: BodyError) -> PolledFrame {
        self.source = Source::Empty;
        let Some(mut exchange) = self.exchange.take() else { return Poll::Ready(Some(Err(cut))) };
        let (context, now) = (&mut exchange.context, Instant::now());
        context.flow().set_cutoff(None);
        context.set_ended_at(now);
        context.record_mut().complete();
        if !context.is_grpc() {
            return Poll::Ready(Some(Err(cut)));
        }
        let mut fields = grpc::status_fields(code, message);
        context.record_mut().set_grpc_status(code as u32, fields.get(grpc::MESSAGE).cloned());
        proxy_status::write_trailers(context, exchange.attempt.number(), &mut fields, code as u32, now);
        Poll::Ready(Some(Ok(Frame::trailers(fields))))
    }

    fn upstream_broke_off(&mut self, cut: BodyError) -> PolledFrame {
        if let Some(reply) = self.exchange.as_ref().and_then(|exchange| admission::broken_body(&exchange.context)) {
            return self.caller_broke_off(&reply, cut);
        }
        if let Some(exchange) = &mut self.exchange {
            exchange.context.record_mut().upstream_cut();
            report_early_end(exchange, LocalReplyKind::UpstreamReset, Instant::now());
        }
        let message = match &cut {
            BodyError::Upstream(error) => {
                format!("hopguard upstream_cut: the upstream broke off its response: {}", error.with_causes())
            }
            BodyError::Fault(_) | BodyError::Ended(_) => format!("hopguard upstream_cut: {cut}"),
        };
        self.break_off(GrpcStatus::Unavailable, &message, cut)
    }

    /// The caller's own body has broken off. A caller that has left is told nothing, and no hop is at fault.
    fn caller_broke_off(&mut self, reply: &LocalReply, cut: BodyError) -> PolledFrame {
        if self.exchange.as_ref().is_none_or(|exchange| !exchange.context.flow().request.disconnected()) {
            return self.end_with(reply);
        }
        self.source = Source::Empty;
        if let Some(exchange) = self.exchange.take() {
            exchange.context.flow().set_cutoff(None);
        }
        Poll::Ready(Some(Err(cut)))
    }

    /// A time limit ends the response, and the upstream is what was waited for.
    fn expire(&mut self, reply: &LocalReply) -> PolledFrame {
        if let Some(exchange) = &mut self.exchange {
            let now = Instant::now();
            if let Some(lease) = exchange.attempt.lease().filter(|_| reply.kind.is_upstream_silence()) {
                lease.record_timeout();
            }
            report_early_end(exchange, reply.kind, now);
            correlation::ended_locally(&exchange.context, reply.kind, now);
        }
        self.end_with(reply)
    }

    /// A time limit ends the response, but the upstream had more to give at once: that the response was too long says
    /// nothing against the upstream. `at` is when the caller got the chunk before, if it did not wait for this one.
    fn cut_short(&mut self, mut reply: LocalReply, at: Option<Instant>) -> PolledFrame {
        if let Some(exchange) = &mut self.exchange {
            let ActiveExchange { context, attempt, .. } = &mut **exchange;
            let now = Instant::now();
            breaker_and_ejection::report_probes(context, attempt, now);
            if let Some(at) = at {
                let still = now.saturating_duration_since(at);
                reply = context.timeout_state().blame_slow_reader(reply, still, context.timeouts());
            }
        }
        self.end_with(&reply)
    }

    fn end_with(&mut self, reply: &LocalReply) -> PolledFrame {
        let (code, message) = reply.grpc();
        if let Some(exchange) = &mut self.exchange {
            exchange.context.record_mut().refuse(reply.record());
        }
        self.break_off(code, &message, BodyError::Ended(reply.sentence()))
    }

    /// Ready with the time limit that ends the response.
    fn poll_timeout(&mut self, cx: &mut Context<'_>) -> Poll<LocalReply> {
        let Some(exchange) = &mut self.exchange else { return Poll::Pending };
        timeouts::poll_expired(&mut exchange.context, WaitingFor::Body, cx)
    }
}

/// A response ends before its end. The hops above are told: a gRPC caller by the trailers, any other by the proxy status of
/// the response to the parent request.
fn report_early_end(exchange: &mut ActiveExchange, kind: LocalReplyKind, now: Instant) {
    let ActiveExchange { context, attempt, .. } = exchange;
    breaker_and_ejection::report_broken_response(context, attempt, kind, now);
    if kind.is_of_the_callee() && !context.is_grpc() && context.proxy_status().is_none() {
        let is_final = context.route().retry.is_final(attempt.number().into(), context.is_idempotent(), None);
        proxy_status::record_failure(context, None, is_final, now);
    }
}

/// Ends an exchange whose response is complete; its connection goes back to the pool if it can take another request.
fn finish(mut exchange: Box<ActiveExchange>, cx: &mut Context<'_>) {
    let ActiveExchange { context, attempt, response, .. } = &mut *exchange;
    context.flow().set_cutoff(None);
    context.flow().response.end();
    let now = Instant::now();
    context.set_ended_at(now);
    context.record_mut().complete_at(now);
    breaker_and_ejection::report_complete(context, attempt);
    let Some(lease) = attempt.take_lease() else { return };
    let is_sending = if lease.is_http1() {
        select::give_back(context, attempt, lease, cx, response.keep_alive, now)
    } else {
        Some(lease).filter(|_| !context.flow().request.ended())
    };
    if let Some(lease) = is_sending {
        late_upload::go_on(exchange, lease);
    }
}

impl Drop for ResponseBody {
    /// A body is dropped by hyper in three cases: the caller has all of it without having asked for its end; it was cut; or
    /// the caller has gone.
    fn drop(&mut self) {
        let Some(mut exchange) = self.exchange.take() else { return };
        let flow = exchange.context.flow();
        if self.length.is_some_and(|length| flow.response.bytes() >= length) {
            finish(exchange, &mut Context::from_waker(Waker::noop()));
        } else if flow.was_cut_off() {
            let ActiveExchange { context, attempt, .. } = &mut *exchange;
            let now = Instant::now();
            if let Some(reply) = context.timeout_state().unread_cutoff(now, context.timeouts(), context.flow()) {
                // The caller was waited for, whichever limit ended the wait: the upstream is not at fault.
                breaker_and_ejection::report_probes(context, attempt, now);
                context.record_mut().refuse(reply.record());
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
        // With the error hyper discards what it has not written yet, the head included: first it gets a turn to write.
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
    /// What the upstream has sent, or the end that a time limit puts to it.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> PolledFrame {
        // hyper may have room for a chunk long before the caller takes it.
        let unasked =
            self.exchange.as_ref().filter(|_| !self.waits).map(|exchange| exchange.context.flow().last_activity());
        let polled = match &self.exchange {
            Some(exchange) if exchange.attempt.lease().is_some_and(Lease::is_http1) => {
                let waker = Rc::clone(exchange.context.waker());
                waker.poll(cx, |cx| self.advance(cx))
            }
            _ => self.advance(cx),
        };
        self.waits = polled.is_pending();
        match polled {
            Poll::Ready(_) => match self.overdue() {
                Some(reply) => self.cut_short(reply, unasked),
                None => polled,
            },
            Poll::Pending => match self.poll_timeout(cx) {
                Poll::Ready(reply) => self.expire(&reply),
                Poll::Pending => Poll::Pending,
            },
        }
    }

    /// What the upstream has sent, if it has sent anything.
    fn advance(&mut self, cx: &mut Context<'_>) -> PolledFrame {
        // Once for what is there, once more after the connection has been driven.
        for is_driven in [false, true] {
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
                    let is_last = frame.is_trailers() || (self.rest.is_none() && self.source.is_end());
                    return Poll::Ready(Some(Ok(self.pass_on(frame, is_last, cx))));
                }
                Poll::Ready(Some(Err(_))) if self.is_whole() => {
                    self.end(cx);
                    return Poll::Ready(None);
                }
                Poll::Ready(Some(Err(cut))) => return self.upstream_broke_off(cut),
                Poll::Ready(None) => {
                    self.end(cx);
                    return Poll::Ready(None);
                }
                Poll::Pending if !is_driven => self.drive_connection(cx),
                Poll::Pending => {}
            }
        }
        Poll::Pending
    }

    /// True if the body has its full length, although its end has not been seen: the upstream may end the connection right
    /// behind an early response.
    fn is_whole(&self) -> bool {
        let passed = self.exchange.as_ref().map(|exchange| exchange.context.flow().response.bytes());
        self.length.is_some_and(|length| passed >= Some(length))
    }

    /// As much of a chunk as the caller gets at a time.
    fn piece(&mut self, frame: Frame<Bytes>) -> Frame<Bytes> {
        let in_pieces = self.exchange.as_ref().is_some_and(|exchange| exchange.context.downstream().has_streams());
        if !in_pieces || frame.data_ref().is_none_or(|chunk| chunk.len() <= PIECE) {
            return frame;
        }
        frame.map_data(|mut chunk| {
            let piece = chunk.split_to(PIECE);
            self.rest = Some(chunk);
            piece
        })
    }

    fn drive_connection(&mut self, cx: &mut Context<'_>) {
        let lease = self.exchange.as_mut().and_then(|exchange| exchange.attempt.lease_mut());
        if let Some(Transport::Http1(connection)) = lease.and_then(Lease::transport) {
            let _over = connection.drive(cx);
        }
    }
}
