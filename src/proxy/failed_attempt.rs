//! What happened in an attempt that may have failed: status, gRPC code, reset, pushback, the proxy status of hops below.

use std::time::Duration;

use http::header::HeaderMap;
use http::{Response, header};
use jiff::Timestamp;

use crate::policy::model::Direction;
use crate::proxy::attempt::Attempt;
use crate::proxy::headers::HeaderScan;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::replay::RetryState;
use crate::proxy::request_context::RequestContext;
use crate::proxy::{breaker_and_ejection, grpc, proxy_status, select};
use crate::rules::proxy_status::ProxyStatus;
use crate::rules::retry::{AttemptFailure, Pushback};
use crate::upstream::response::UpstreamBody;

/// The head of the upstream's response, or the local reply that the caller gets instead.
pub(super) type AttemptResult = Result<Response<UpstreamBody>, LocalReply>;

/// What is known of an attempt that may have failed.
pub(super) struct FailedAttempt {
    /// `None`: no failure of the upstream at all.
    pub(super) failure: Option<AttemptFailure>,
    /// It speaks against the upstream, or against a hop further down.
    pub(super) counts: bool,
    /// The upstream's sidecar has refused one call too many, as a 429 does where it is not gRPC.
    pub(super) is_rate_limited: bool,
    /// The upstream cannot have seen the request.
    pub(super) is_unseen: bool,
    pub(super) status: Option<ProxyStatus>,
    pub(super) pushback: Option<Pushback>,
}

impl FailedAttempt {
    /// Reads the result of an attempt.
    pub(super) fn of(
        context: &mut RequestContext,
        attempt: &Attempt,
        retry: &RetryState,
        result: &AttemptResult,
    ) -> Self {
        let counts = !attempt.spares_upstream() && breaker_and_ejection::counts_against_upstream(context, result);
        match result {
            Ok(response) => Self::of_response(context, attempt, retry, response, counts),
            Err(reply) => Self {
                failure: failure_of(context, attempt, retry, reply.kind),
                counts,
                is_rate_limited: false,
                is_unseen: reply.kind != LocalReplyKind::UpstreamProtocol && attempt.is_unsent(),
                status: None,
                pushback: None,
            },
        }
    }

    fn of_response(
        context: &mut RequestContext,
        attempt: &Attempt,
        retry: &RetryState,
        response: &Response<UpstreamBody>,
        counts: bool,
    ) -> Self {
        let headers = response.headers();
        let scan = HeaderScan::scan(headers);
        let status = if scan.proxy_status { proxy_status::read(headers) } else { None };
        let code = breaker_and_ejection::status_of(context, response);
        let mut failure = code.map_or_else(AttemptFailure::Status, AttemptFailure::Grpc);
        let is_unseen = context.believes_unsent(status.as_ref().is_some_and(|status| status.is_unsent));
        // Where no other endpoint can have it at once, it waits like any other failure.
        if is_unseen && select::has_other_endpoint(attempt, retry) {
            failure = AttemptFailure::Unsent;
        }
        // A pushback speaks for its own endpoint; where another one can have the call, the call need not wait.
        let obeys = scan.pushback && failure != AttemptFailure::Unsent;
        let pushback = obeys.then(|| pushback(headers, code.is_ok())).flatten();
        let is_rate_limited = breaker_and_ejection::is_rate_limited(code, headers);
        Self { failure: Some(failure), counts, is_rate_limited, is_unseen, status, pushback }
    }
}

/// What the upstream said about a further attempt (RFC 9110, 10.2.3; gRFC A6).
fn pushback(headers: &HeaderMap, is_grpc: bool) -> Option<Pushback> {
    if is_grpc {
        let value = headers.get(grpc::PUSHBACK)?;
        let wait = value.to_str().ok().and_then(|text| text.trim().parse::<u32>().ok());
        return Some(wait.map_or(Pushback::Stop, |millis| Pushback::Wait(Duration::from_millis(millis.into()))));
    }
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    // A number that does not fit is a very long time all the same.
    let wait = if is_number { Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX))) } else { until_date(text) };
    wait.map(Pushback::Wait)
}

/// The time until a date in any of the three forms of HTTP (RFC 9110, 5.6.7); zero for a past one.
fn until_date(text: &str) -> Option<Duration> {
    let at = Timestamp::try_from(httpdate::parse_http_date(text).ok()?).ok()?;
    Some(Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default())
}

/// What a local reply means for a further attempt.
fn failure_of(
    context: &RequestContext,
    attempt: &Attempt,
    retry: &RetryState,
    kind: LocalReplyKind,
) -> Option<AttemptFailure> {
    // A connection that ends leaves its last requests unprocessed, and a new one takes them; but not one after the other.
    // Before the app, which has refused the request, that is the only way: the caller's sidecar has other endpoints.
    let is_inbound = context.direction() == Direction::Inbound;
    let can_go_elsewhere = || {
        (!is_inbound && select::has_other_endpoint(attempt, retry))
            || (attempt.has_connection_ended() && attempt.number() == 1)
    };
    match kind {
        LocalReplyKind::ConnectFailed
        | LocalReplyKind::ConnectTimeout
        | LocalReplyKind::DnsFailed
        | LocalReplyKind::TlsFailed => Some(AttemptFailure::Reset),
        LocalReplyKind::UpstreamReset if attempt.is_unsent() && can_go_elsewhere() => Some(AttemptFailure::Unsent),
        LocalReplyKind::UpstreamReset if attempt.is_unsent() => Some(AttemptFailure::Refused),
        LocalReplyKind::UpstreamReset | LocalReplyKind::UpstreamProtocol => Some(AttemptFailure::Reset),
        LocalReplyKind::PerTryTimeout => Some(AttemptFailure::Timeout),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn retry_after_is_a_number_of_seconds_or_a_date() {
        let said = |text: &str| {
            let fields = HeaderMap::from_iter([(header::RETRY_AFTER, HeaderValue::from_str(text).unwrap())]);
            pushback(&fields, false)
        };
        assert_eq!(said("7"), Some(Pushback::Wait(Duration::from_secs(7))));
        let past = ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"];
        for date in past {
            assert_eq!(said(date), Some(Pushback::Wait(Duration::ZERO)), "{date} is past");
        }
        for date in ["Fri, 31 Dec 2100 23:59:59 GMT", "Fri Dec 31 23:59:59 2100"] {
            let Some(Pushback::Wait(wait)) = said(date) else { panic!("no wait for {date}") };
            assert!(wait > Duration::from_secs(365 * 24 * 3600));
        }
        assert_eq!(said("99999999999999999999"), Some(Pushback::Wait(Duration::from_secs(u64::MAX))));
        for nothing in ["soon", "", "-1", "+1"] {
            assert_eq!(said(nothing), None, "{nothing:?}");
        }
    }
}
