//! The deadline of a call: from the caller's fields, from the parent request, or from `timeouts.request`; and what is left
//! of it, written for the next hop.
//!
//! An outbound call gets no more time than the inbound request that caused it has left, also where the app passed on
//! nothing but a trace id. Each hop keeps a hundredth of the time, 1 to 10 ms, for the way back, so that of two hops that
//! wait for the same response the lower one replies first.

use std::time::Duration;

use http::header::{HeaderMap, HeaderValue};
use http::request::Parts;
use tokio::time::Instant;

use crate::problems::Origin;
use crate::proxy::correlation;
use crate::proxy::headers::HeaderScan;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind, RuleRef};
use crate::proxy::request_context::RequestContext;
use crate::proxy::timeout_state::ExternalDeadline;
use crate::rules::deadline::{self, Deadline, DeadlineSource, EXPECTED_RQ_TIMEOUT_MS, GRPC_TIMEOUT, reserve};
use crate::rules::inflight::ParentRequests;
use crate::rules::mode::RuleName;

/// A call with less time than this cannot be answered in time.
const LEAST: Duration = Duration::from_millis(1);

/// What a further attempt needs: [`LEAST`], and as much for the way back. With less, the next hop would be told of time that
/// is not there, and its app might work on after the caller has gone.
pub(super) const LEAST_FOR_ATTEMPT: Duration = Duration::from_millis(2);

/// Sets the deadline of a routed request, and correlates the request with others.
///
/// # Errors
/// If the deadline is over, or `grpc-timeout` is malformed.
pub(super) fn set(context: &mut RequestContext, head: &mut Parts, scan: &HeaderScan) -> Result<(), LocalReply> {
    let correlated = correlation::correlate(context, head);
    let now = context.began();
    let request = context.timeouts().request.value;
    if context.modes().deadline.value.is_off() {
        context.set_correlation(correlated);
        // The registry carries the proxy status of failed calls up through the app as well.
        correlation::register(context, Deadline::earliest(now, request, None, None).at);
        return Ok(());
    }
    let caller = if scan.deadline { of_caller(context, &head.headers)? } else { None };
    let is_stream = context.route().stream;
    let parents = correlated.as_ref().and_then(|correlated| correlated.parents.as_ref());
    let late_at = correlated.as_ref().and_then(|correlated| correlated.late_at).filter(|at| !is_stream || *at <= now);
    let inbound = parents.filter(|_| !is_stream).and_then(ParentRequests::deadline).or(late_at);
    let deadline = Deadline::earliest(now, request, caller, inbound);
    context.set_correlation(correlated);
    if deadline.from != DeadlineSource::Policy {
        adopt(context, deadline, now)?;
    } else if let Some(at) = caller.filter(|_| context.is_grpc()).and_then(|asked| now.checked_add(asked)) {
        // The policy's `request` ends a unary call; a stream is ended by the caller's own deadline.
        adopt(context, Deadline { at, from: DeadlineSource::Caller }, now)?;
    }
    correlation::register(context, deadline.at);
    Ok(())
}

/// The time that the caller allows. In a dry run, a malformed one counts as none.
fn of_caller(context: &mut RequestContext, headers: &HeaderMap) -> Result<Option<Duration>, LocalReply> {
    let allowed = allowed(context.is_grpc(), headers);
    if allowed.is_err() && !context.modes().deadline.value.is_enforced() {
        context.record_dry_run(RuleName::Deadline);
        return Ok(None);
    }
    allowed
}

/// The time that the request's own fields allow: the least of several.
fn allowed(is_grpc: bool, headers: &HeaderMap) -> Result<Option<Duration>, LocalReply> {
    let values = headers.get_all(EXPECTED_RQ_TIMEOUT_MS).iter();
    // No standard defines this field: a value of another form is another program's.
    let expected = values.filter_map(|value| deadline::parse_expected_rq_timeout_ms(value.as_bytes()).ok().flatten());
    let mut least = expected.min();
    if is_grpc {
        for value in headers.get_all(GRPC_TIMEOUT) {
            let malformed = |_| LocalReply::plain(LocalReplyKind::BadRequest, "grpc-timeout is malformed");
            let time = deadline::parse_grpc_timeout(value.as_bytes()).map_err(malformed)?;
            least = Some(least.map_or(time, |least| least.min(time)));
        }
    }
    Ok(least)
}

/// Adopts a deadline that the policy did not set.
fn adopt(context: &mut RequestContext, deadline: Deadline, now: Instant) -> Result<(), LocalReply> {
    let left = deadline.left(now).unwrap_or_default();
    let from = if deadline.from == DeadlineSource::Caller { "caller" } else { "inbound" };
    let notes = context.record_mut().annotations_mut();
    (notes.deadline, notes.deadline_from) = (Some(left), Some(from));
    if !context.modes().deadline.value.is_enforced() {
        context.set_dry_run_deadline(Some(deadline.at));
        return Ok(());
    }
    let external = ExternalDeadline { at: deadline.at, from: deadline.from, whole: left };
    context.set_deadline(external);
    if left >= LEAST {
        return Ok(());
    }
    let detail = "the deadline had passed when the call came";
    Err(LocalReply::ruled(LocalReplyKind::DeadlineSpent, external.rule(), detail))
}

/// Writes the time that is left into the request, for the next hop.
pub(super) fn write_remaining(context: &RequestContext, headers: &mut HeaderMap, now: Instant) {
    if !context.modes().deadline.value.is_enforced() {
        return;
    }
    let (times, is_grpc) = (context.timeout_state(), context.is_grpc());
    let at = match times.deadline {
        Some(deadline) => deadline.at,
        // Whether a gRPC call is a stream shows later, and a timeout meant for unary calls must not end a stream.
        None if is_grpc || times.is_stream => return,
        None => times.began + context.timeouts().request.value,
    };
    let left = at.saturating_duration_since(now);
    let left = left.saturating_sub(reserve(left));
    // A gRPC call carries this field where a proxy has added it.
    if !is_grpc || headers.contains_key(EXPECTED_RQ_TIMEOUT_MS) {
        headers.insert(EXPECTED_RQ_TIMEOUT_MS, deadline::expected_rq_timeout_ms(left).into());
    }
    if is_grpc && let Ok(value) = HeaderValue::try_from(deadline::format_grpc_timeout(left)) {
        headers.insert(GRPC_TIMEOUT, value);
    }
}

impl ExternalDeadline {
    /// The deadline as the rule that a local reply names.
    pub(super) fn rule(&self) -> RuleRef {
        RuleRef {
            name: "deadline",
            value: format!("{}ms", self.whole.as_millis()),
            origin: Origin::Request(self.from.as_str()),
        }
    }
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
            assert_eq!(allowed(grpc, &fields).unwrap(), wanted.map(Duration::from_millis), "{values:?}");
        }
        let both = |millis: &'static str| {
            let fields = [(EXPECTED_RQ_TIMEOUT_MS, millis), (GRPC_TIMEOUT, "1S")];
            HeaderMap::from_iter(fields.map(|(name, value)| (name, HeaderValue::from_static(value))))
        };
        for (grpc, millis, wanted) in
            [(true, "300", 300), (true, "3000", 1000), (true, "0", 1000), (false, "3000", 3000)]
        {
            assert_eq!(allowed(grpc, &both(millis)).unwrap(), Some(Duration::from_millis(wanted)), "{grpc} {millis}");
        }
        let odd = HeaderMap::from_iter([GRPC_TIMEOUT, GRPC_TIMEOUT].map(|name| (name, HeaderValue::from_static("7x"))));
        assert_eq!(allowed(true, &odd).unwrap_err().kind, LocalReplyKind::BadRequest);
    }
}
