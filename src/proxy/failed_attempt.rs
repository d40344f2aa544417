//! What happened in an attempt that may have failed: status, gRPC code, reset, pushback, the proxy status of hops below.

use std::time::{Duration, SystemTime};

use http::header::HeaderMap;
use http::{Response, StatusCode, header};
use jiff::Timestamp;

use crate::policy::model::Direction;
use crate::proxy::attempt::Attempt;
use crate::proxy::headers::{self, HeaderScan};
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
        let counts = !attempt.is_same_event()
            && !attempt.spares_upstream()
            && breaker_and_ejection::counts_against_upstream(context, result);
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
        if is_late_timeout(attempt, response) {
            failure = AttemptFailure::Reset;
        }
        let is_rate_limited = breaker_and_ejection::is_rate_limited(code, headers);
        Self { failure: Some(failure), counts, is_rate_limited, is_unseen, status, pushback }
    }
}

/// Whether a response is no answer to the request: a server that ends an idle connection may send 408 first, which meets the
/// request on its way (RFC 9110, 15.5.9). For a further attempt that is the close of a reused connection.
pub(super) fn is_late_timeout(attempt: &Attempt, response: &Response<UpstreamBody>) -> bool {
    response.status() == StatusCode::REQUEST_TIMEOUT
        && attempt.is_reused()
        && headers::lists(response.headers(), &header::CONNECTION, "close")
}

/// What the upstream said about a further attempt (RFC 9110, 10.2.3; gRFC A6). A value that cannot be read forbids the
/// attempt, as gRFC A6 requires for gRPC: the upstream asked for a wait, and any wait of ours could be too short.
fn pushback(headers: &HeaderMap, is_grpc: bool) -> Option<Pushback> {
    if is_grpc {
        let value = headers.get(grpc::PUSHBACK)?;
        let wait = value.to_str().ok().and_then(|text| text.trim().parse::<u32>().ok());
        return Some(wait.map_or(Pushback::Stop, |millis| Pushback::Wait(Duration::from_millis(millis.into()))));
    }
    let value = headers.get(header::RETRY_AFTER)?.as_bytes().trim_ascii();
    let wait = std::str::from_utf8(value).ok().and_then(retry_after);
    (!value.is_empty()).then(|| wait.map_or(Pushback::Stop, Pushback::Wait))
}

/// The time that a `Retry-After` names: a number of seconds, or the time until a date.
///
/// Some servers send a fraction, which the standard does not have; it is rounded up. A number that does not fit is the
/// longest time.
fn retry_after(text: &str) -> Option<Duration> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|byte| byte.is_ascii_digit()) {
        return until_date(text);
    }
    let seconds: u64 = whole.parse().unwrap_or(u64::MAX);
    Some(Duration::from_secs(seconds.saturating_add(u64::from(!fraction.is_empty()))))
}

/// The time until a date in any of the three forms of HTTP (RFC 9110, 5.6.7); zero for a past one.
///
/// Compared as [`SystemTime`]: a [`Timestamp`] ends some hours before the year 9999 does, and `Fri, 31 Dec 9999 23:59:59
/// GMT` is how .NET writes "never".
fn until_date(text: &str) -> Option<Duration> {
    let at = httpdate::parse_http_date(text).ok()?;
    Some(at.duration_since(SystemTime::from(Timestamp::now())).unwrap_or_default())
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
        let year = Duration::from_secs(365 * 24 * 3600);
        let far = ["Fri, 31 Dec 2100 23:59:59 GMT", "Fri Dec 31 23:59:59 2100", "Thu, 30 Dec 9999 22:00:01 GMT"];
        for date in far.into_iter().chain(["Fri, 31 Dec 9999 23:59:59 GMT"]) {
            let Some(Pushback::Wait(wait)) = said(date) else { panic!("no wait for {date}") };
            assert!(wait > year);
        }
        assert_eq!(said("99999999999999999999"), Some(Pushback::Wait(Duration::from_secs(u64::MAX))));
        assert_eq!(said("99999999999999999999.5"), Some(Pushback::Wait(Duration::from_secs(u64::MAX))));
        for (fraction, seconds) in [("0.5", 1), ("120.25", 121), ("3.", 3)] {
            assert_eq!(said(fraction), Some(Pushback::Wait(Duration::from_secs(seconds))), "{fraction}");
        }
        let unreadable =
            ["soon", "-1", "+1", "-99999999999999999999", ".5", "Sat, 01 Jan 10000 00:00:00 GMT", "\u{e9}"];
        for text in unreadable {
            assert_eq!(said(text), Some(Pushback::Stop), "{text:?}");
        }
        assert_eq!(said(" "), None);
    }
}
