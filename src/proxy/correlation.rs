//! How an exchange hangs together with others: its deadline, the inbound request behind an outbound call, and what sidecars
//! tell each other about a failure.
//!
//! An outbound call gets no more time than the inbound request that caused it has left, also where the app passed on
//! nothing but a trace id. The other way round, a call that failed for good tells the inbound request, so that the
//! answer to *its* caller says that nobody above need try again (`rules/proxy_status.rs` has the words). Each hop keeps a
//! hundredth of the time, 1 to 10 ms, for the way back, so that of two hops that wait for the same thing the lower one
//! speaks first.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use http::header::{HeaderMap, HeaderValue};
use http::request::Parts;
use tokio::time::Instant;

use crate::policy::model::Direction;
use crate::problems::Origin;
use crate::proxy::grpc::PUSHBACK;
use crate::proxy::headers::HeaderScan;
use crate::proxy::held::{Correlated, LATE, MOST_RESERVED};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind, PROXY_STATUS, RuleRef};
use crate::proxy::request_context::RequestContext;
use crate::proxy::timeouts::ExternalDeadline;
use crate::rules::deadline::{self, Deadline, DeadlineSource, EXPECTED_RQ_TIMEOUT_MS, GRPC_TIMEOUT};
use crate::rules::inflight::{Correlation, ParentRequests};
use crate::rules::mode::RuleName;
use crate::rules::proxy_status::ProxyStatus;
use crate::rules::retry::AttemptFailure;
use crate::rules::trace::{self, TraceKeys, X_REQUEST_ID};

/// A call that has less than this left cannot be answered in time.
const LEAST: Duration = Duration::from_millis(1);

/// What one more try needs: that, and as much for the way back. With less, the next hop would be told of time that there is
/// not, and its app might go on unnoticed after the caller has gone.
pub const TRY: Duration = Duration::from_millis(2);

/// Finds out how much time the call has, and ties it to others.
///
/// # Errors
/// If the deadline is over, or cannot be read.
pub fn begin(live: &mut RequestContext, head: &mut Parts, present: &HeaderScan) -> Result<(), LocalReply> {
    let mode = live.view.policy.model.modes.deadline.value;
    let ties = tie(live, head);
    let now = live.patience.began;
    if mode.is_off() {
        live.ties = ties;
        // The table carries the marks of failed calls up through the app as well.
        let deadline = Deadline::earliest(now, live.route().timeouts.request.value, None, None);
        enter(live, deadline.at);
        return Ok(());
    }
    let caller = if present.deadline { caller_deadline(live, &head.headers)? } else { None };
    let route = live.route();
    let causes = ties.as_ref().and_then(|ties| ties.causes.as_ref());
    let late_at = ties.as_ref().and_then(|ties| ties.late_at).filter(|at| !route.stream || *at <= now);
    let inbound = causes.filter(|_| !route.stream).and_then(ParentRequests::deadline).or(late_at);
    let deadline = Deadline::earliest(now, route.timeouts.request.value, caller, inbound);
    live.ties = ties;
    if deadline.from != DeadlineSource::Policy {
        limit(live, deadline, now)?;
    } else if let Some(at) = caller.filter(|_| live.patience.grpc).and_then(|asked| now.checked_add(asked)) {
        // The policy's time ends a unary call; should it be a stream, this is what ends it.
        limit(live, Deadline { at, from: DeadlineSource::Caller }, now)?;
    }
    enter(live, deadline.at);
    Ok(())
}

/// The time that the caller allows. In `warn`, one that cannot be read is none.
fn caller_deadline(live: &mut RequestContext, fields: &HeaderMap) -> Result<Option<Duration>, LocalReply> {
    let asked = asked(live.patience.grpc, fields);
    if asked.is_err() && !live.view.policy.model.modes.deadline.value.is_enforced() {
        live.would(RuleName::Deadline);
        return Ok(None);
    }
    asked
}

/// The time that the request's own fields allow: the least, where there are several.
fn asked(grpc: bool, fields: &HeaderMap) -> Result<Option<Duration>, LocalReply> {
    let values = fields.get_all(EXPECTED_RQ_TIMEOUT_MS).iter();
    // Not a standard's field: one that cannot be read is somebody else's.
    let expected = values.filter_map(|value| deadline::parse_expected_rq_timeout_ms(value.as_bytes()).ok().flatten());
    let mut least = expected.min();
    if grpc {
        for value in fields.get_all(GRPC_TIMEOUT) {
            let malformed = |_| LocalReply::plain(LocalReplyKind::BadRequest, "grpc-timeout is malformed");
            let time = deadline::parse_grpc_timeout(value.as_bytes()).map_err(malformed)?;
            least = Some(least.map_or(time, |least| least.min(time)));
        }
    }
    Ok(least)
}

/// Takes up a deadline that is not the policy's.
fn limit(live: &mut RequestContext, deadline: Deadline, now: Instant) -> Result<(), LocalReply> {
    let left = deadline.left(now).unwrap_or_default();
    let from = if deadline.from == DeadlineSource::Caller { "caller" } else { "inbound" };
    let notes = live.record.note();
    (notes.deadline, notes.deadline_from) = (Some(left), Some(from));
    let until = ExternalDeadline { at: deadline.at, from: deadline.from, whole: left };
    if !live.view.policy.model.modes.deadline.value.is_enforced() {
        live.late_at = Some(deadline.at);
        return Ok(());
    }
    live.patience.until = Some(until);
    if left >= LEAST {
        return Ok(());
    }
    Err(LocalReply::ruled(LocalReplyKind::DeadlineSpent, until.rule(), "the call came too late to be answered"))
}

/// Joins an outbound call with the inbound request behind it, by trace id or because there is only one.
fn tie(live: &RequestContext, head: &mut Parts) -> Option<Box<Correlated>> {
    if !live.view.policy.ties {
        return None;
    }
    let worker = &live.worker;
    let mut keys = TraceKeys::of(&head.headers);
    if live.direction == Direction::Inbound {
        if keys.is_empty() {
            let id = trace::fresh_request_id(u128::from(fastrand::u64(..)) << 64 | u128::from(fastrand::u64(..)));
            head.headers.insert(X_REQUEST_ID, HeaderValue::from_str(&id).ok()?);
            keys = TraceKeys::of(&head.headers);
        }
        return Some(Box::new(Correlated { keys, ..Correlated::default() }));
    }
    let (join, now) = (worker.inbounds.correlate(keys), live.patience.began);
    let is_by_trace = matches!(join, Correlation::ByTrace(_));
    let late_at = if is_by_trace { None } else { worker.late.at(keys, LATE, now) };
    let joins = &worker.joins;
    let (counter, causes) = match (join, late_at) {
        (_, Some(at)) if at <= now => (&joins.late, None),
        (_, Some(_)) => (&joins.by_trace, None),
        (Correlation::ByTrace(causes), None) => (&joins.by_trace, Some(causes)),
        (Correlation::OnlyOne(causes), None) => (&joins.only_one, Some(causes)),
        (Correlation::NotJoined, None) => (&joins.not_joined, None),
        (Correlation::NoInbound, None) => (&joins.no_inbound, None),
    };
    counter.increment();
    Some(Box::new(Correlated { keys, causes, late_at, ..Correlated::default() }))
}

/// Makes an inbound request known to the calls that it will cause.
fn enter(live: &mut RequestContext, at: Instant) {
    if live.direction != Direction::Inbound {
        return;
    }
    let own = streams_until(live);
    let Some(ties) = &mut live.ties else { return };
    let at = at.checked_sub(reserve(at.saturating_duration_since(live.patience.began))).unwrap_or(at);
    let entered = live.worker.inbounds.register(ties.keys, at);
    if live.patience.grpc {
        let inbound = Arc::clone(entered.inbound());
        live.flow.when_it_streams(Box::new(move || inbound.set_deadline(own)));
    }
    ties.entered = Some(entered);
}

/// The exchange has shown itself as a stream. The calls that it causes have their own policy's time from now on, or
/// what the stream itself has.
pub fn lift(live: &RequestContext) {
    if let Some(entered) = live.ties.as_ref().and_then(|ties| ties.entered.as_ref()) {
        entered.inbound().set_deadline(streams_until(live));
    }
}

/// Until when it lives, should it be a stream: only those of gRPC have a deadline.
fn streams_until(live: &RequestContext) -> Option<Instant> {
    live.patience.until.filter(|_| live.patience.grpc).map(|until| until.at)
}

/// What a hop keeps of the time for the way back.
fn reserve(left: Duration) -> Duration {
    (left / 100).clamp(Duration::from_millis(1), MOST_RESERVED)
}

/// Writes what is left into the request, for the next hop.
pub fn tell(live: &RequestContext, fields: &mut HeaderMap, now: Instant) {
    if !live.view.policy.model.modes.deadline.value.is_enforced() {
        return;
    }
    let at = match live.patience.until {
        Some(until) => until.at,
        // Whether a gRPC call is a stream shows later; a stream must not be ended by a timeout that is meant for calls.
        None if live.patience.grpc || live.patience.stream => return,
        None => live.patience.began + live.route().timeouts.request.value,
    };
    let left = at.saturating_duration_since(now);
    let left = left.saturating_sub(reserve(left));
    // A gRPC call has this one where a proxy has added it.
    if !live.patience.grpc || fields.contains_key(EXPECTED_RQ_TIMEOUT_MS) {
        fields.insert(EXPECTED_RQ_TIMEOUT_MS, deadline::expected_rq_timeout_ms(left).into());
    }
    if live.patience.grpc
        && let Ok(value) = HeaderValue::try_from(deadline::format_grpc_timeout(left))
    {
        fields.insert(GRPC_TIMEOUT, value);
    }
}

impl ExternalDeadline {
    /// The rule for a refusal's text.
    pub fn rule(&self) -> RuleRef {
        RuleRef {
            name: "deadline",
            value: format!("{}ms", self.whole.as_millis()),
            origin: Origin::Request(self.from.as_str()),
        }
    }
}

/// True if the tries of this request were used up here a moment ago: whoever sends it again has tried for us.
pub fn is_spent(live: &RequestContext, now: Instant) -> bool {
    live.worker.spent.contains(keys(live), place(live), now)
}

/// The ids of a call. Where nothing ties it to others they are read only when it has failed.
fn keys(live: &RequestContext) -> TraceKeys {
    match (&live.ties, &live.spare) {
        (Some(ties), _) => ties.keys,
        (None, Some(spare)) => TraceKeys::of(&spare.head.headers),
        (None, None) => TraceKeys::default(),
    }
}

/// A call is tried again: its ids are kept beyond its answer, whose trailers may yet say that it failed.
pub fn keep(live: &mut RequestContext) {
    if live.ties.is_none() && live.direction == Direction::Outbound {
        live.ties = Some(Box::new(Correlated { keys: keys(live), ..Correlated::default() }));
    }
}

/// True if nobody waits any more for the inbound request behind the call.
pub fn is_abandoned(live: &RequestContext) -> bool {
    let is_abandoned =
        |ties: &Correlated| ties.late_at.is_some() || ties.causes.as_ref().is_some_and(ParentRequests::are_abandoned);
    live.ties.as_deref().is_some_and(is_abandoned)
}

fn place(live: &RequestContext) -> u64 {
    let (destination, record) = (live.view.destination(live.destination()).id, &live.record);
    live.worker.spent.call_hash(destination, record.method().as_str(), record.authority(), record.path())
}

/// Whether a call that failed for good has used up any tries: not if it was turned away before its first one, nor if it
/// had no second one only because that is not safe.
fn has_tried_out(live: &RequestContext) -> bool {
    let (tries, _) = live.record.tries();
    tries > 1 || (tries == 1 && (live.is_safe || live.route().retry.idempotent.value))
}

/// A call failed for good. Says so to the inbound request behind it, and in the answer.
///
/// `below` is what the answer said itself: a failure further down than the callee stays where it was. `is_final`: its tries
/// are used up, and nobody above need try again.
pub fn failed(live: &mut RequestContext, below: Option<&ProxyStatus>, is_final: bool, now: Instant) {
    if live.direction == Direction::Inbound {
        return;
    }
    let in_one_place = live.view.policy.model.modes.retry_in_one_place.value;
    let is_final = !in_one_place.is_off() && (is_final || below.is_some_and(|mark| mark.is_final));
    let here = || live.destination_values().name.as_str().into();
    let at = Some(below.and_then(|mark| mark.at.clone()).unwrap_or_else(here));
    if below.is_some_and(|mark| mark.at.is_some()) {
        live.record.note().failed_at.clone_from(&at);
    }
    let mark = ProxyStatus { is_final, at, ..ProxyStatus::default() };
    if let Some(causes) = live.ties.as_ref().and_then(|ties| ties.causes.as_ref()) {
        causes.record_status(&mark);
    }
    if mark.is_final && has_tried_out(live) {
        live.worker.spent.record(keys(live), place(live), now, now);
    }
    live.mark = Some(Box::new(written(live, mark)));
}

/// What of a mark is written: in `warn` nothing, because whoever reads it acts on it. What is known in this process is
/// kept in `warn` all the same, to be counted.
fn written(live: &RequestContext, mark: ProxyStatus) -> ProxyStatus {
    let modes = &live.view.policy.model.modes;
    ProxyStatus {
        is_final: mark.is_final && modes.retry_in_one_place.value.is_enforced(),
        is_unsent: mark.is_unsent && modes.unsent.value.is_enforced(),
        is_limited: false,
        at: mark.at.filter(|_| modes.blame_in_one_place.value.is_enforced()),
    }
}

/// The mark of an answer of our own: in the place of a callee that failed or is protected, or of an app that never got the
/// request.
pub fn refused(live: &mut RequestContext, kind: LocalReplyKind, now: Instant) {
    if live.is_unrouted() {
        return;
    }
    if live.direction == Direction::Outbound {
        // A try that failed has been told already, with the reason why there was no other; the rest (no turn, no time,
        // an open breaker) nobody above is to ask for again.
        if kind.is_of_the_callee() && live.mark.is_none() {
            failed(live, None, true, now);
        }
        return;
    }
    ended(live, kind, now);
    // What the app has left aside, or handed back, it has not looked at either.
    let is_left = kind == LocalReplyKind::UpstreamReset && live.unsent;
    let is_unsent = (kind.is_before_the_app() || is_left) && !live.was_seen;
    let mark = ProxyStatus { is_unsent, ..from_below(live).unwrap_or_default() };
    live.mark = Some(Box::new(written(live, mark)));
}

/// An exchange was ended by us, before its answer or in the midst of it. Where time was up, the app may go on, and call
/// others for a caller who has gone.
pub fn ended(live: &RequestContext, kind: LocalReplyKind, now: Instant) {
    let (Direction::Inbound, Some(ties)) = (live.direction, &live.ties) else { return };
    let is_late = matches!(kind, LocalReplyKind::RequestTimeout | LocalReplyKind::DeadlineExceeded);
    ties.abandon(&live.worker.late, is_late.then_some(now), now);
}

/// What a failed call of the app has left for the answer to the inbound request that caused it.
fn blamed(live: &RequestContext) -> Option<ProxyStatus> {
    live.ties.as_ref()?.entered.as_ref()?.inbound().recorded_status()
}

/// The same, for an answer that says that the app failed: the log names where that came from.
fn from_below(live: &mut RequestContext) -> Option<ProxyStatus> {
    let mark = blamed(live)?;
    live.record.note().failed_at.clone_from(&mark.at);
    Some(mark)
}

/// Whether an app fails because somebody failed whom it called: its answer bears no mark of that, but the call has told.
pub fn is_blamed_below(live: &RequestContext) -> bool {
    live.direction == Direction::Inbound && blamed(live).is_some()
}

/// Marks the answer of an upstream that says that something failed.
///
/// An app may have copied the marks of its own callee; a member of ours at the end says what holds.
pub fn mark_answer(live: &mut RequestContext, status: StatusCode, fields: &mut HeaderMap, was_marked: bool) {
    if live.direction == Direction::Inbound {
        live.mark = from_below(live).map(|mark| Box::new(written(live, mark)));
    }
    let said = live.mark.as_ref().map_or_else(String::new, |mark| mark.write_parameters());
    if said.is_empty() && !was_marked {
        return;
    }
    if let Ok(value) = HeaderValue::from_str(&format!("hopguard; received-status={}{said}", status.as_u16())) {
        fields.append(PROXY_STATUS, value);
    }
    push_back(live, fields);
}

/// The same for the trailers of a gRPC answer whose head has gone already.
///
/// No hop tries such a call again: each has passed the head on, as we have. But the app in between may make a failure of
/// its own out of it, and that would be tried again above.
pub fn mark_trailers(live: &mut RequestContext, fields: &mut HeaderMap, code: u32, now: Instant) {
    if !live.route().retry.is_failure(AttemptFailure::Grpc(code)) {
        return;
    }
    let was_marked = fields.contains_key(PROXY_STATUS);
    let below =
        was_marked.then(|| ProxyStatus::read(fields.get_all(PROXY_STATUS).iter().map(HeaderValue::as_bytes))).flatten();
    let is_final = live.route().retry.is_final(live.attempt.into(), live.is_safe, None);
    failed(live, below.as_ref(), is_final, now);
    mark_answer(live, StatusCode::OK, fields, was_marked);
}

/// The word that gRPC has for "do not try again" (gRFC A6).
pub fn push_back(live: &RequestContext, fields: &mut HeaderMap) {
    if live.patience.grpc && pushes_back(live) {
        fields.insert(PUSHBACK, HeaderValue::from_static("-1"));
    }
}

/// Whether the caller is told not to try again in words that every gRPC client obeys, be there a sidecar or not.
pub fn pushes_back(live: &RequestContext) -> bool {
    live.mark.as_ref().is_some_and(|mark| mark.is_final)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_fields_that_tell_a_time_the_least_counts() {
        let table: [(bool, &[&str], Option<u64>); 9] = [
            (false, &[], None),
            (false, &["300", "700"], Some(300)),
            (false, &["700", "300"], Some(300)),
            (false, &["0", "700"], Some(700)),
            (false, &["soon", "700"], Some(700)),
            (false, &["soon"], None),
            (true, &["700m", "1S"], Some(700)),
            (true, &["1S", "700m"], Some(700)),
            (true, &["0n", "1S"], Some(0)),
        ];
        for (grpc, values, wanted) in table {
            let name = if grpc { GRPC_TIMEOUT } else { EXPECTED_RQ_TIMEOUT_MS };
            let mut fields = HeaderMap::new();
            for value in values {
                fields.append(&name, HeaderValue::from_str(value).unwrap());
            }
            assert_eq!(asked(grpc, &fields).unwrap(), wanted.map(Duration::from_millis), "{values:?}");
        }
        let both = |millis: &'static str| {
            let fields = [(EXPECTED_RQ_TIMEOUT_MS, millis), (GRPC_TIMEOUT, "1S")];
            HeaderMap::from_iter(fields.map(|(name, value)| (name, HeaderValue::from_static(value))))
        };
        for (grpc, millis, wanted) in
            [(true, "300", 300), (true, "3000", 1000), (true, "0", 1000), (false, "3000", 3000)]
        {
            assert_eq!(asked(grpc, &both(millis)).unwrap(), Some(Duration::from_millis(wanted)), "{grpc} {millis}");
        }
        let odd = HeaderMap::from_iter([GRPC_TIMEOUT, GRPC_TIMEOUT].map(|name| (name, HeaderValue::from_static("7x"))));
        assert_eq!(asked(true, &odd).unwrap_err().kind, LocalReplyKind::BadRequest);
    }
}
