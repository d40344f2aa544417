//! Fault injection: what an attempt meets in place of its upstream, or between its response and the caller.
//!
//! A fault acts in the upstream's place. A delay is waited for within the limits of the attempt and ends as a slow upstream
//! does; an abort is a response like any other; a reset counts as a request that may have been seen; a body that is cut or
//! slow reaches the caller so. Nothing above knows the difference: timeouts, retries, breaker, ejection, metrics and the log
//! act as they would on a real failure, but for the fault's name in the log and in `hopguard_faults_total`.
//!
//! Each attempt draws anew. Where a route has no faults, nothing here is called. A tunnel (CONNECT) meets none, and an
//! upgraded connection none once it is open. Which fault an attempt meets is decided by `rules/faults`.

use std::future::pending;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::HeaderName;
use http::{HeaderValue, Method, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use jiff::Timestamp;
use tokio::time::Instant;

use crate::proxy::attempt::{Attempt, BodyFault, PendingFault};
use crate::proxy::local_reply::{BodyError, LocalReply, LocalReplyKind, RuleRef};
use crate::proxy::request_context::RequestContext;
use crate::proxy::timeout_state::TimeoutVerdict;
use crate::proxy::{grpc, timeouts};
use crate::rules::faults::{Abort, Fault, FaultAction, Faults};
use crate::rules::mode::RuleName;
use crate::runtime::timer::{Timer, Timers};
use crate::upstream::response::UpstreamBody;

/// The fault that the attempt meets, if any: logged and counted. In a dry run it is only logged.
pub(super) fn draw<'a>(context: &mut RequestContext, attempt: &Attempt, faults: &'a Faults) -> Option<&'a Fault> {
    let mode = context.modes().faults.value;
    if mode.is_off() {
        return None;
    }
    let headers = attempt.request().map(http::Request::headers);
    let header = |name: &HeaderName| headers?.get(name).map(HeaderValue::as_bytes);
    let fault = faults.draw(header, Timestamp::now(), fastrand::f64)?;
    let name = &fault.name.value;
    context.record_mut().annotations_mut().fault = Some(name.as_str().into());
    if !mode.is_enforced() {
        context.record_dry_run(RuleName::Faults);
        return None;
    }
    context.telemetry().fault_injected(context.destination_name(), name);
    Some(fault)
}

/// Injects a fault. `None` if the request goes on to the upstream, later or with a body fault.
///
/// # Errors
/// If the fault ends the attempt without a response: by a reset, or by a delay longer than the attempt may last.
pub(super) async fn inject(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    fault: &Fault,
) -> Result<Option<Response<UpstreamBody>>, LocalReply> {
    let began = Instant::now();
    if let Some(delay) = &fault.delay {
        wait(context, attempt, began + delay.value).await?;
    }
    match &fault.ending {
        FaultAction::Answer { cut_after, bytes_per_second } => {
            let (cut_after, rate) = (cut_after.as_ref(), bytes_per_second.as_ref());
            let body = (cut_after.is_some() || rate.is_some()).then(|| BodyFault {
                name: fault.name.value.as_str().into(),
                cut_after: cut_after.map(|set| set.value),
                rate: rate.map(|set| set.value),
                until: end_of(fault),
            });
            attempt.fault_ends(PendingFault { lost: began.elapsed(), body });
            Ok(None)
        }
        FaultAction::Abort(abort) => Ok(Some(abort_response(context, attempt, fault, abort.value))),
        FaultAction::Reset(reset) => {
            let rule = RuleRef { name: "faults", value: fault.name.value.clone(), origin: reset.origin.clone() };
            let detail = "a fault of the policy broke the call off before its response";
            Err(LocalReply::ruled(LocalReplyKind::UpstreamReset, rule, detail))
        }
    }
}

/// When a fault that is active ends.
fn end_of(fault: &Fault) -> Instant {
    let left = Duration::try_from(fault.until.value.duration_since(Timestamp::now())).unwrap_or_default();
    let now = Instant::now();
    // Years have four digits, so that the end is no further than a clock goes.
    now.checked_add(left).unwrap_or(now)
}

/// Waits as for a slow upstream.
async fn wait(context: &mut RequestContext, attempt: &Attempt, until: Instant) -> Result<(), LocalReply> {
    loop {
        let now = Instant::now();
        if now >= until {
            return Ok(());
        }
        let verdict = context.timeout_state().check(attempt.waiting(), now, context.timeouts(), context.flow());
        let at = match verdict {
            TimeoutVerdict::Expired(reply) => return Err(reply),
            TimeoutVerdict::Wait(at) => at.min(until),
        };
        timeouts::within(context, at, pending::<()>()).await;
    }
}

/// A response in the upstream's place; its text says so.
fn abort_response(context: &RequestContext, attempt: &Attempt, fault: &Fault, abort: Abort) -> Response<UpstreamBody> {
    let said = format!("the fault {} of the policy answered in the upstream's place", fault.name.value);
    let status = match abort {
        Abort::Grpc(code) if context.is_grpc() => {
            return grpc::trailers_only(code.number(), &said, UpstreamBody::Local(Bytes::new()));
        }
        Abort::Grpc(code) => grpc::as_http(code.number()),
        Abort::Status(status) => status,
    };
    let is_head = attempt.request().is_some_and(|request| request.method() == Method::HEAD);
    let is_bare = matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED);
    let mut response = Response::new(UpstreamBody::Local(Bytes::new()));
    *response.status_mut() = status;
    // For a gRPC caller the text becomes its message.
    if context.is_grpc() || (!is_head && !is_bare) {
        let body = Bytes::from(said + "\n");
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        *response.body_mut() = UpstreamBody::Local(body);
    }
    response
}

/// A slow body comes in pieces of what its rate gives in this time; unused rate is kept for as long.
const BEAT: Duration = Duration::from_millis(50);

/// The body of a response that meets a fault on its way.
pub(super) struct FaultyBody {
    body: UpstreamBody,
    name: Box<str>,
    /// How many bytes may pass before the body breaks off.
    left: Option<u64>,
    /// Bytes per second.
    rate: Option<u64>,
    /// Bytes that have come and have not passed yet.
    rest: Bytes,
    /// When the next piece may pass.
    due: Instant,
    /// The fault ends then, and the rest of the body comes as it was sent.
    until: Instant,
    timer: Timer,
}

impl FaultyBody {
    /// The body of a response whose head came at `now`. The body may not be at its end.
    pub(super) fn new(body: UpstreamBody, fault: BodyFault, timers: &Timers, now: Instant) -> Self {
        let BodyFault { name, cut_after: left, rate, until } = fault;
        Self { body, name, left, rate, rest: Bytes::new(), due: now, until, timer: timers.at(now) }
    }

    /// The next piece, or the trailers.
    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.left == Some(0) {
            return Poll::Ready(Some(Err(BodyError::Fault(self.name.clone()))));
        }
        while self.rest.is_empty() {
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Poll::Ready(Some(Err(BodyError::Upstream(error)))),
                None => return Poll::Ready(None),
            };
            match frame.into_data() {
                Ok(chunk) => {
                    self.rest = chunk;
                    self.schedule(Instant::now());
                }
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
        ready!(self.poll_due(cx));
        let now = Instant::now();
        if now >= self.until {
            (self.left, self.rate) = (None, None);
        }
        Poll::Ready(Some(Ok(Frame::data(self.pass(now)))))
    }

    /// True once nothing more comes, and the body is not to break off.
    pub(super) fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.left != Some(0) && self.body.is_end_stream()
    }

    /// The rest of the body as it was sent: a cut or slow body announces the same size.
    pub(super) fn size_hint(&self) -> SizeHint {
        let (hint, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut all = SizeHint::new();
        all.set_lower(hint.lower() + rest);
        if let Some(upper) = hint.upper() {
            all.set_upper(upper + rest);
        }
        all
    }

    /// How much passes at once of what is there.
    fn piece(&self) -> usize {
        let most = |limit: u64| usize::try_from(limit).unwrap_or(usize::MAX);
        let beat = self.rate.map_or(usize::MAX, |rate| most(rate / (1000 / BEAT.as_millis() as u64)).max(1));
        self.rest.len().min(beat).min(self.left.map_or(usize::MAX, most))
    }

    /// Sets when the next piece may pass: after the one before, by the time that its bytes take at the rate.
    fn schedule(&mut self, now: Instant) {
        let Some(rate) = self.rate else { return };
        let takes = Duration::from_secs_f64(self.piece() as f64 / rate as f64);
        self.due = self.due.max(now.checked_sub(BEAT).unwrap_or(now)) + takes;
    }

    fn pass(&mut self, now: Instant) -> Bytes {
        let piece = self.rest.split_to(self.piece());
        if let Some(left) = &mut self.left {
            *left -= piece.len() as u64;
            if *left == 0 && self.rest.is_empty() && self.body.is_end_stream() {
                // The body is complete before its connection seems to close.
                self.left = None;
            } else if *left == 0 {
                self.rest = Bytes::new();
            }
        }
        if !self.rest.is_empty() {
            self.schedule(now);
        }
        piece
    }

    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let due = self.due.min(self.until);
        if Instant::now() >= due {
            return Poll::Ready(());
        }
        self.timer.set(due);
        self.timer.poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    /// Reads a body to its end: each piece with the milliseconds at which it came, and how it ended.
    async fn read(bytes: &'static [u8], cut_after: Option<u64>, rate: Option<u64>) -> (Vec<(usize, u128)>, bool, u128) {
        read_while(bytes, cut_after, rate, Duration::from_secs(3600)).await
    }

    /// The same of a fault that is over after `until`.
    async fn read_while(
        bytes: &'static [u8],
        cut_after: Option<u64>,
        rate: Option<u64>,
        until: Duration,
    ) -> (Vec<(usize, u128)>, bool, u128) {
        let begun = Instant::now();
        let fault = BodyFault { name: "f".into(), cut_after, rate, until: begun + until };
        let body = UpstreamBody::Local(Bytes::from_static(bytes));
        let mut body = FaultyBody::new(body, fault, &Timers::default(), begun);
        let mut pieces = Vec::new();
        let mut promised = body.size_hint().exact().unwrap();
        let is_whole = loop {
            match poll_fn(|cx| body.poll_frame(cx)).await {
                Some(Ok(frame)) => {
                    let piece = frame.into_data().unwrap().len();
                    promised -= piece as u64;
                    pieces.push((piece, begun.elapsed().as_millis()));
                    if body.is_end_stream() {
                        assert_eq!((promised, body.size_hint().exact()), (0, Some(0)));
                        break true;
                    }
                }
                Some(Err(BodyError::Fault(name))) => {
                    assert_eq!(&*name, "f");
                    break false;
                }
                Some(Err(other)) => panic!("{other}"),
                None => break true,
            }
        };
        (pieces, is_whole, begun.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_breaks_off_after_its_bytes_unless_it_is_whole_by_then() {
        assert_eq!(read(&[7; 10], Some(4), None).await, (vec![(4, 0)], false, 0));
        assert_eq!(read(&[7; 10], Some(0), None).await, (vec![], false, 0));
        assert_eq!(read(&[7; 10], Some(10), None).await, (vec![(10, 0)], true, 0));
        assert_eq!(read(&[7; 10], Some(11), None).await, (vec![(10, 0)], true, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_body_takes_as_long_as_its_rate_says() {
        // Up to 50 ms of it may come at once, at the beginning.
        let (pieces, is_whole, took) = read(&[7; 1000], None, Some(1000)).await;
        assert!(is_whole && (950..=1000).contains(&took), "{took} {pieces:?}");
        assert!(pieces.iter().all(|(piece, at)| *piece <= 50 && *at <= 1000), "{pieces:?}");
        // At one byte a second, each byte is a piece.
        let (pieces, _, took) = read(&[7; 3], None, Some(1)).await;
        assert!(pieces.len() == 3 && (2900..=3000).contains(&took), "{took} {pieces:?}");
        // A rate beyond what comes holds nothing up.
        assert_eq!(read(&[7; 1000], None, Some(u64::MAX)).await, (vec![(1000, 0)], true, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_left_when_the_fault_is_over_comes_as_it_was_sent() {
        let until = Duration::from_millis(300);
        // At one byte a second nothing would have come by then.
        for (cut_after, rate) in [(None, 1000), (Some(900), 1000), (None, 1)] {
            let (pieces, is_whole, took) = read_while(&[7; 1000], cut_after, Some(rate), until).await;
            assert!(is_whole && (290..=310).contains(&took), "{took} {pieces:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_body_can_break_off_too() {
        let (pieces, is_whole, took) = read(&[7; 1000], Some(120), Some(1000)).await;
        assert!(!is_whole && (70..=125).contains(&took), "{took} {pieces:?}");
        assert_eq!(pieces.iter().map(|(piece, _)| piece).sum::<usize>(), 120);
    }
}
