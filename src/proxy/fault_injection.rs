//! Faults of the policy, made to happen: what a try meets instead of its upstream, or between its answer and the caller.
//!
//! They happen at the place of the upstream. A delay is waited for within the limits of the try and ends as a slow
//! upstream does; an abort is an answer like any other; a reset counts as a request that may have been seen; a body
//! that is cut or slow comes so to whoever reads it. Nothing above knows the difference, so that timeouts, retries,
//! breaker, ejection, metrics and the log act as they would on the real thing, but for the fault's name in the log and
//! in `hopguard_faults_total`.
//!
//! Each try draws anew. Where a route has no faults, nothing here is called. A tunnel (CONNECT) meets none, and one that
//! began as an upgrade no more once it is open. Which fault a try meets is decided by `rules/faults`.

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

use crate::proxy::grpc;
use crate::proxy::held::{BodyFault, PendingFault};
use crate::proxy::local_reply::{BodyError, LocalReply, LocalReplyKind, RuleRef};
use crate::proxy::request_context::RequestContext;
use crate::proxy::timeouts::TimeoutVerdict;
use crate::rules::faults::{Abort, Fault, FaultAction, Faults};
use crate::rules::mode::RuleName;
use crate::runtime::timer::{Timer, Timers};
use crate::upstream::response::UpstreamBody;

/// The fault that this try meets, if any: noted in the log and counted. In `warn` it is only said.
pub fn draw<'a>(live: &mut RequestContext, faults: &'a Faults) -> Option<&'a Fault> {
    let mode = live.view.policy.model.modes.faults.value;
    if mode.is_off() {
        return None;
    }
    let fields = live.request.as_ref().map(http::Request::headers);
    let header = |name: &HeaderName| fields?.get(name).map(HeaderValue::as_bytes);
    let fault = faults.draw(header, Timestamp::now(), fastrand::f64)?;
    let name = &fault.name.value;
    live.record.annotations_mut().fault = Some(name.as_str().into());
    if !mode.is_enforced() {
        live.would(RuleName::Faults);
        return None;
    }
    live.worker.shard.telemetry().fault_injected(&live.destination_values().name, name);
    Some(fault)
}

/// Makes a fault happen. `None` if the request goes on to the upstream, later or with a body that will suffer.
///
/// # Errors
/// If it ends the try without an answer: by a reset, or because the delay was longer than the try may last.
pub async fn happen(live: &mut RequestContext, fault: &Fault) -> Result<Option<Response<UpstreamBody>>, LocalReply> {
    // To whoever looks from above, the upstream has the request from now on.
    (live.unsent, live.reused) = (false, false);
    let began = Instant::now();
    if let Some(delay) = &fault.delay {
        wait(live, began + delay.value).await?;
    }
    match &fault.ending {
        FaultAction::Answer { cut_after, bytes_per_second } => {
            live.unsent = true;
            let (cut_after, rate) = (cut_after.as_ref(), bytes_per_second.as_ref());
            let body = (cut_after.is_some() || rate.is_some()).then(|| BodyFault {
                name: fault.name.value.as_str().into(),
                cut_after: cut_after.map(|set| set.value),
                rate: rate.map(|set| set.value),
                until: end_of(fault),
            });
            live.fault = Some(Box::new(PendingFault { lost: began.elapsed(), body }));
            Ok(None)
        }
        FaultAction::Abort(abort) => Ok(Some(answer(live, fault, abort.value))),
        FaultAction::Reset(reset) => {
            let rule = RuleRef { name: "faults", value: fault.name.value.clone(), origin: reset.origin.clone() };
            Err(LocalReply::ruled(
                LocalReplyKind::UpstreamReset,
                rule,
                "a fault of the policy broke the call off before its answer",
            ))
        }
    }
}

/// When a fault that is not over will be.
fn end_of(fault: &Fault) -> Instant {
    let left = Duration::try_from(fault.until.value.duration_since(Timestamp::now())).unwrap_or_default();
    let now = Instant::now();
    // Years have four digits, so that it is no further than a clock goes.
    now.checked_add(left).unwrap_or(now)
}

/// Waits as for a slow upstream.
async fn wait(live: &mut RequestContext, until: Instant) -> Result<(), LocalReply> {
    loop {
        let now = Instant::now();
        if now >= until {
            return Ok(());
        }
        let at = match live.patience.judge(now, &live.route().timeouts, &live.flow) {
            TimeoutVerdict::Over(refusal) => return Err(refusal),
            TimeoutVerdict::Wait(at) => at.min(until),
        };
        live.timer.limit(at, pending::<()>()).await;
    }
}

/// An answer in the upstream's place, which says so to people.
fn answer(live: &RequestContext, fault: &Fault, abort: Abort) -> Response<UpstreamBody> {
    let said = format!("the fault {} of the policy answered in the upstream's place", fault.name.value);
    let status = match abort {
        Abort::Grpc(code) if live.patience.grpc => {
            return grpc::trailers_only(code.number(), &said, UpstreamBody::Own(Bytes::new()));
        }
        Abort::Grpc(code) => grpc::as_http(code.number()),
        Abort::Status(status) => status,
    };
    let is_head = live.request.as_ref().is_some_and(|request| request.method() == Method::HEAD);
    let is_bare = matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED);
    let mut answer = Response::new(UpstreamBody::Own(Bytes::new()));
    *answer.status_mut() = status;
    // For a gRPC caller the text becomes its message.
    if live.patience.grpc || (!is_head && !is_bare) {
        let body = Bytes::from(said + "\n");
        answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        answer.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        *answer.body_mut() = UpstreamBody::Own(body);
    }
    answer
}

/// A slow body comes in pieces of what its rate gives in so long; what was not used is kept for as long.
const BEAT: Duration = Duration::from_millis(50);

/// The body of an answer that meets a fault on its way.
pub struct FaultyBody {
    answer: UpstreamBody,
    name: Box<str>,
    /// How many bytes may pass before it breaks off.
    left: Option<u64>,
    /// Bytes a second.
    rate: Option<u64>,
    /// What has come and has not passed yet.
    rest: Bytes,
    /// When the next piece may pass.
    due: Instant,
    /// From then on the fault is over, and what is left comes as it was sent.
    until: Instant,
    timer: Timer,
}

impl FaultyBody {
    /// The body of an answer whose head came at `now`. The answer may not be at its end.
    pub fn new(answer: UpstreamBody, fault: BodyFault, timers: &Timers, now: Instant) -> Self {
        let BodyFault { name, cut_after: left, rate, until } = fault;
        Self { answer, name, left, rate, rest: Bytes::new(), due: now, until, timer: timers.at(now) }
    }

    /// The next piece, or the trailers.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.left == Some(0) {
            return Poll::Ready(Some(Err(BodyError::Fault(self.name.clone()))));
        }
        while self.rest.is_empty() {
            let frame = match ready!(Pin::new(&mut self.answer).poll_frame(cx)) {
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

    /// True once nothing comes any more, and nothing is to break off.
    pub fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.left != Some(0) && self.answer.is_end_stream()
    }

    /// What is left of the answer as it was sent: cut or slow, it says the same of itself.
    pub fn size_hint(&self) -> SizeHint {
        let (hint, rest) = (self.answer.size_hint(), self.rest.len() as u64);
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

    /// Sets when the next piece may pass: so long after the one before as it takes to come.
    fn schedule(&mut self, now: Instant) {
        let Some(rate) = self.rate else { return };
        let takes = Duration::from_secs_f64(self.piece() as f64 / rate as f64);
        self.due = self.due.max(now.checked_sub(BEAT).unwrap_or(now)) + takes;
    }

    fn pass(&mut self, now: Instant) -> Bytes {
        let piece = self.rest.split_to(self.piece());
        if let Some(left) = &mut self.left {
            *left -= piece.len() as u64;
            if *left == 0 && self.rest.is_empty() && self.answer.is_end_stream() {
                // It was whole before the connection seems to close.
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
        let answer = UpstreamBody::Own(Bytes::from_static(bytes));
        let mut body = FaultyBody::new(answer, fault, &Timers::default(), begun);
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
