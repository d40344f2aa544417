//! The closed list of answers that we give in the upstream's place.
//!
//! Each has a stable name (the metric's outcome), an HTTP status, a gRPC code, and an error type of RFC 9209; each
//! says which rule, which value, from which line of the policy. The same facts go into the answer's
//! `Proxy-Status`, its body (RFC 9457, or `grpc-message`), and the log.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode, header};

use crate::problems::{Origin, Sourced};
use crate::proxy::grpc::{self, GrpcStatus, PUSHBACK};
use crate::rules::proxy_status::ProxyStatus;
use crate::telemetry::{ClosedBy, Outcome, RefusalRecord};
use crate::upstream::response::UpstreamError;

/// `Proxy-Status`
pub const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// One refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalReply {
    /// Which one.
    pub kind: LocalReplyKind,
    /// The rule that it follows from, where there is one.
    pub rule: Option<Box<RuleRef>>,
    /// What happened, in one sentence.
    pub detail: Cow<'static, str>,
    /// When it makes sense to call again.
    pub retry_after: Option<Duration>,
}

/// A rule's value and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleRef {
    /// As a path of the policy: `timeouts.request`.
    pub name: &'static str,
    /// As the policy writes it: `800ms`.
    pub value: String,
    /// The line, or built in.
    pub origin: Origin,
}

/// Which refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalReplyKind {
    /// See [`Outcome::RequestTimeout`]; the others likewise.
    RequestTimeout,
    /// One try took too long.
    PerTryTimeout,
    /// No connection in time.
    ConnectTimeout,
    /// No byte for too long.
    IdleTimeout,
    /// A stream that lived too long.
    MaxDuration,
    /// No place in flight, none in the queue.
    QueueFull,
    /// No place in flight in time.
    QueueTimeout,
    /// No destination has the host.
    NoDestination,
    /// A destination without any way to it.
    NoRoute,
    /// The connection was refused.
    ConnectFailed,
    /// The name has no address.
    DnsFailed,
    /// TLS could not be agreed.
    TlsFailed,
    /// The upstream broke off before its answer.
    UpstreamReset,
    /// The upstream's answer is not HTTP.
    UpstreamProtocol,
    /// The request is not HTTP, or ambiguous.
    BadRequest,
    /// A transfer coding that we do not know.
    UnknownCoding,
    /// A method longer than any.
    UnknownMethod,
    /// An expectation that we do not know.
    UnknownExpectation,
    /// The request's header section is too long.
    HeaderTooLarge,
    /// The caller is too slow.
    CallerTimeout,
    /// The request has been here too often.
    LoopDetected,
    /// CONNECT where it is not allowed.
    ConnectDenied,
    /// We are shutting down.
    Draining,
    /// The caller's deadline is over.
    DeadlineExceeded,
    /// The caller's deadline was over already.
    DeadlineSpent,
    /// The circuit breaker is open.
    CircuitOpen,
    /// Too many calls in too short a time.
    RateLimited,
}

/// Why a body ends before its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The upstream broke off.
    #[error("the upstream broke off: {0}")]
    Upstream(#[source] UpstreamError),
    /// A fault of the policy, in the upstream's place.
    #[error("the fault {0} of the policy broke it off")]
    Fault(Box<str>),
    /// A time limit.
    #[error("{0}")]
    RateLimitExceeded(String),
}

/// What each refusal looks like from outside. No `_` anywhere: a new kind has to be given a face.
impl LocalReplyKind {
    const fn outcome(self) -> Outcome {
        match self {
            Self::RequestTimeout => Outcome::RequestTimeout,
            Self::PerTryTimeout => Outcome::PerTryTimeout,
            Self::ConnectTimeout => Outcome::ConnectTimeout,
            Self::IdleTimeout => Outcome::IdleTimeout,
            Self::MaxDuration => Outcome::MaxDuration,
            Self::QueueFull => Outcome::QueueFull,
            Self::QueueTimeout => Outcome::QueueTimeout,
            Self::NoDestination => Outcome::NoDestination,
            Self::NoRoute => Outcome::NoRoute,
            Self::ConnectFailed => Outcome::ConnectFailed,
            Self::DnsFailed => Outcome::DnsFailed,
            Self::TlsFailed => Outcome::TlsFailed,
            Self::UpstreamReset => Outcome::UpstreamReset,
            Self::UpstreamProtocol => Outcome::UpstreamProtocol,
            Self::BadRequest | Self::UnknownCoding | Self::UnknownMethod | Self::UnknownExpectation => {
                Outcome::BadRequest
            }
            Self::HeaderTooLarge => Outcome::HeaderTooLarge,
            Self::CallerTimeout => Outcome::CallerTimeout,
            Self::LoopDetected => Outcome::LoopDetected,
            Self::ConnectDenied => Outcome::ConnectDenied,
            Self::Draining => Outcome::Draining,
            Self::DeadlineExceeded => Outcome::DeadlineExceeded,
            Self::DeadlineSpent => Outcome::DeadlineSpent,
            Self::CircuitOpen => Outcome::CircuitOpen,
            Self::RateLimited => Outcome::RateLimited,
        }
    }

    const fn status(self) -> StatusCode {
        match self {
            Self::RequestTimeout
            | Self::PerTryTimeout
            | Self::ConnectTimeout
            | Self::IdleTimeout
            | Self::MaxDuration
            | Self::DeadlineExceeded
            | Self::DeadlineSpent => StatusCode::GATEWAY_TIMEOUT,
            Self::QueueFull | Self::QueueTimeout | Self::Draining | Self::CircuitOpen => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Self::NoDestination | Self::NoRoute => StatusCode::NOT_FOUND,
            Self::ConnectFailed
            | Self::DnsFailed
            | Self::TlsFailed
            | Self::UpstreamReset
            | Self::UpstreamProtocol
            | Self::LoopDetected => StatusCode::BAD_GATEWAY,
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::UnknownCoding | Self::UnknownMethod => StatusCode::NOT_IMPLEMENTED,
            Self::UnknownExpectation => StatusCode::EXPECTATION_FAILED,
            Self::HeaderTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::CallerTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::ConnectDenied => StatusCode::FORBIDDEN,
        }
    }

    const fn code(self) -> GrpcStatus {
        match self {
            Self::RequestTimeout
            | Self::PerTryTimeout
            | Self::ConnectTimeout
            | Self::IdleTimeout
            | Self::MaxDuration
            | Self::DeadlineExceeded
            | Self::DeadlineSpent
            | Self::CallerTimeout => GrpcStatus::DeadlineExceeded,
            Self::QueueFull | Self::QueueTimeout | Self::HeaderTooLarge | Self::RateLimited => {
                GrpcStatus::ResourceExhausted
            }
            Self::NoDestination | Self::NoRoute => GrpcStatus::Unimplemented,
            Self::ConnectFailed
            | Self::DnsFailed
            | Self::TlsFailed
            | Self::UpstreamReset
            | Self::Draining
            | Self::CircuitOpen => GrpcStatus::Unavailable,
            Self::UpstreamProtocol
            | Self::BadRequest
            | Self::UnknownCoding
            | Self::UnknownMethod
            | Self::UnknownExpectation
            | Self::LoopDetected => GrpcStatus::Internal,
            Self::ConnectDenied => GrpcStatus::PermissionDenied,
        }
    }

    /// The error type of RFC 9209, section 2.3.
    const fn error(self) -> &'static str {
        match self {
            Self::RequestTimeout | Self::PerTryTimeout | Self::DeadlineExceeded | Self::DeadlineSpent => {
                "http_response_timeout"
            }
            Self::ConnectTimeout => "connection_timeout",
            Self::IdleTimeout | Self::MaxDuration => "connection_read_timeout",
            Self::QueueFull | Self::QueueTimeout => "connection_limit_reached",
            Self::NoDestination | Self::NoRoute => "destination_not_found",
            Self::ConnectFailed => "connection_refused",
            Self::DnsFailed => "dns_error",
            Self::TlsFailed => "tls_protocol_error",
            Self::UpstreamReset => "connection_terminated",
            Self::UpstreamProtocol => "http_protocol_error",
            Self::BadRequest
            | Self::UnknownCoding
            | Self::UnknownMethod
            | Self::UnknownExpectation
            | Self::HeaderTooLarge
            | Self::CallerTimeout => "http_request_error",
            Self::LoopDetected => "proxy_loop_detected",
            Self::ConnectDenied | Self::RateLimited => "http_request_denied",
            Self::Draining | Self::CircuitOpen => "destination_unavailable",
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::RequestTimeout => "The call took too long",
            Self::PerTryTimeout => "One try took too long",
            Self::ConnectTimeout => "No connection in time",
            Self::IdleTimeout => "Nothing moved for too long",
            Self::MaxDuration => "The stream lived too long",
            Self::QueueFull | Self::QueueTimeout => "Too many calls at once",
            Self::NoDestination => "No destination has this host",
            Self::NoRoute => "There is no way to this destination",
            Self::ConnectFailed => "The upstream cannot be reached",
            Self::DnsFailed => "The upstream's name cannot be resolved",
            Self::TlsFailed => "TLS with the upstream failed",
            Self::UpstreamReset => "The upstream broke off",
            Self::UpstreamProtocol => "The upstream's answer is malformed",
            Self::BadRequest => "The request is malformed",
            Self::UnknownCoding => "The transfer coding is unknown",
            Self::UnknownMethod => "The method is unknown",
            Self::UnknownExpectation => "The expectation is unknown",
            Self::HeaderTooLarge => "The header section is too long",
            Self::CallerTimeout => "The caller is too slow",
            Self::LoopDetected => "The request goes in circles",
            Self::ConnectDenied => "CONNECT is not allowed here",
            Self::Draining => "This listener is closing",
            Self::DeadlineExceeded => "The deadline is over",
            Self::DeadlineSpent => "The deadline was over already",
            Self::CircuitOpen => "The destination is failing",
            Self::RateLimited => "Too many calls in this time",
        }
    }

    /// Who ended the exchange: we did, except where the upstream left us nothing to end.
    const fn closed_by(self) -> ClosedBy {
        match self {
            Self::ConnectFailed | Self::TlsFailed | Self::UpstreamReset => ClosedBy::Upstream,
            Self::RequestTimeout
            | Self::PerTryTimeout
            | Self::ConnectTimeout
            | Self::IdleTimeout
            | Self::MaxDuration
            | Self::QueueFull
            | Self::QueueTimeout
            | Self::NoDestination
            | Self::NoRoute
            | Self::DnsFailed
            | Self::UpstreamProtocol
            | Self::BadRequest
            | Self::UnknownCoding
            | Self::UnknownMethod
            | Self::UnknownExpectation
            | Self::HeaderTooLarge
            | Self::CallerTimeout
            | Self::LoopDetected
            | Self::ConnectDenied
            | Self::Draining
            | Self::DeadlineExceeded
            | Self::DeadlineSpent
            | Self::CircuitOpen
            | Self::RateLimited => ClosedBy::Hopguard,
        }
    }
}

impl LocalReplyKind {
    /// True if it stands for a callee that failed or that is protected: its hop has dealt with it.
    pub const fn is_of_the_callee(self) -> bool {
        matches!(
            self,
            Self::RequestTimeout
                | Self::PerTryTimeout
                | Self::ConnectTimeout
                | Self::IdleTimeout
                | Self::QueueFull
                | Self::QueueTimeout
                | Self::ConnectFailed
                | Self::DnsFailed
                | Self::TlsFailed
                | Self::UpstreamReset
                | Self::UpstreamProtocol
                | Self::DeadlineExceeded
                | Self::CircuitOpen
                | Self::RateLimited
        )
    }

    /// True if the app cannot have seen anything of the request.
    pub const fn is_before_the_app(self) -> bool {
        matches!(
            self,
            Self::ConnectTimeout
                | Self::ConnectFailed
                | Self::DnsFailed
                | Self::QueueFull
                | Self::QueueTimeout
                | Self::CircuitOpen
                | Self::Draining
        )
    }
}

/// What an answer of our own says beside the refusal itself.
#[derive(Default)]
pub struct LocalReplyContext<'a> {
    /// The try it ended at, and how many there may be; zeroes before the first.
    pub attempt: (u16, u16),
    /// Why there was no further try.
    pub retry: Option<&'static str>,
    /// What it tells the sidecars above.
    pub mark: Option<&'a ProxyStatus>,
    /// A gRPC caller is told not to try again.
    pub pushes_back: bool,
}

impl LocalReply {
    /// A refusal that follows from no value of the policy.
    pub fn plain(kind: LocalReplyKind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, rule: None, detail: detail.into(), retry_after: None }
    }

    /// A refusal that follows from a rule.
    pub fn ruled(kind: LocalReplyKind, rule: RuleRef, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, rule: Some(Box::new(rule)), detail: detail.into(), retry_after: None }
    }

    /// A refusal that a time limit of the policy demands.
    pub fn timed(
        kind: LocalReplyKind,
        name: &'static str,
        limit: &Sourced<Duration>,
        detail: impl Into<Cow<'static, str>>,
    ) -> Self {
        let rule = RuleRef { name, value: crate::rules::duration::format(limit.value), origin: limit.origin.clone() };
        Self::ruled(kind, rule, detail)
    }

    /// A refusal that a number of the policy demands.
    pub fn counted(
        kind: LocalReplyKind,
        name: &'static str,
        limit: &Sourced<u32>,
        detail: impl Into<Cow<'static, str>>,
    ) -> Self {
        let rule = RuleRef { name, value: limit.value.to_string(), origin: limit.origin.clone() };
        Self::ruled(kind, rule, detail)
    }

    /// The status of the answer to a caller that speaks HTTP.
    pub fn status(&self) -> StatusCode {
        self.kind.status()
    }

    /// True if what follows on the caller's connection cannot be trusted to be the next request (RFC 9112, 11.2).
    pub fn ends_connection(&self) -> bool {
        matches!(
            self.kind,
            LocalReplyKind::BadRequest
                | LocalReplyKind::UnknownCoding
                | LocalReplyKind::HeaderTooLarge
                | LocalReplyKind::CallerTimeout
                | LocalReplyKind::UnknownMethod
                | LocalReplyKind::Draining
        )
    }

    /// What telemetry keeps of it.
    pub fn record(&self) -> RefusalRecord {
        let rule = self.rule.as_ref();
        RefusalRecord {
            outcome: self.kind.outcome(),
            rule: rule.map_or("", |rule| rule.name),
            value: rule.map_or_else(String::new, |rule| rule.value.clone()),
            origin: rule.map_or_else(String::new, |rule| rule.origin.to_string()),
            detail: self.detail.clone().into_owned(),
            closed_by: self.kind.closed_by(),
        }
    }

    /// One sentence for people: what happened, by which rule.
    pub fn sentence(&self) -> String {
        match &self.rule {
            Some(rule) => format!("{}: {} is {} ({})", self.detail, rule.name, rule.value, rule.origin),
            None => self.detail.clone().into_owned(),
        }
    }

    /// The gRPC code and message.
    pub fn grpc(&self) -> (GrpcStatus, String) {
        (self.kind.code(), format!("hopguard {}: {}", self.kind.outcome().as_str(), self.sentence()))
    }

    /// The whole answer: gRPC gets its trailers, everybody else a problem document.
    pub fn answer<B>(
        &self,
        is_grpc: bool,
        context: &LocalReplyContext<'_>,
        body: impl FnOnce(Bytes) -> B,
    ) -> Response<B> {
        let mut answer = if is_grpc {
            let (code, message) = self.grpc();
            grpc::trailers_only(code, &message, body(Bytes::new()))
        } else {
            let document = self.document(context);
            let mut answer = Response::new(body(Bytes::from(document)));
            *answer.status_mut() = self.kind.status();
            answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
            answer
        };
        if let Some(value) = self.proxy_status(context) {
            answer.headers_mut().insert(PROXY_STATUS, value);
        }
        if is_grpc && context.pushes_back {
            answer.headers_mut().insert(PUSHBACK, HeaderValue::from_static("-1"));
            return answer;
        }
        let busy = self.kind.status() == StatusCode::SERVICE_UNAVAILABLE;
        if let Some(wait) = self.retry_after.or_else(|| busy.then_some(Duration::from_secs(1))) {
            say_when(is_grpc, wait, answer.headers_mut());
        }
        answer
    }

    fn proxy_status(&self, context: &LocalReplyContext<'_>) -> Option<HeaderValue> {
        let (attempt, of) = context.attempt;
        let tries = if attempt > 0 { format!("; try {attempt}/{of}") } else { String::new() };
        let tries = context.retry.map_or_else(|| tries.clone(), |why| format!("{tries}; not tried again: {why}"));
        let details = format!("{}: {}{tries}", self.kind.outcome().as_str(), self.sentence());
        // A string of RFC 9651 has printable ASCII only, with `"` and `\` escaped.
        let escaped: String = details
            .chars()
            .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' })
            .flat_map(|c| matches!(c, '"' | '\\').then_some('\\').into_iter().chain([c]))
            .collect();
        let marks = context.mark.map_or_else(String::new, ProxyStatus::write_parameters);
        HeaderValue::from_str(&format!("hopguard; error={}; details=\"{escaped}\"{marks}", self.kind.error())).ok()
    }

    fn document(&self, context: &LocalReplyContext<'_>) -> String {
        let (attempt, of) = context.attempt;
        let name = self.kind.outcome().as_str();
        let mut document = serde_json::json!({
            "type": format!("https://hopguard.dev/refusals/{name}"),
            "title": self.kind.title(),
            "status": self.kind.status().as_u16(),
            "detail": self.sentence(),
            "refusal": name,
            "closedBy": self.kind.closed_by().as_str(),
        });
        if let Some(rule) = &self.rule {
            document["rule"] = rule.name.into();
            document["value"] = rule.value.as_str().into();
            document["policy"] = rule.origin.to_string().into();
        }
        if attempt > 0 {
            document["attempt"] = format!("{attempt}/{of}").into();
        }
        if let Some(why) = context.retry {
            document["notTriedAgain"] = why.into();
        }
        format!("{document}\n")
    }
}

/// When to call again (RFC 9110, 10.2.3; gRFC A6), rounded up: a moment earlier it would be refused once more.
fn say_when(is_grpc: bool, wait: Duration, fields: &mut HeaderMap) {
    if is_grpc {
        // Clients read 32 bits with a sign, and take anything longer for "never".
        let millis = i32::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
        fields.insert(PUSHBACK, HeaderValue::from(millis));
    } else {
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        fields.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeout() -> LocalReply {
        let limit = Sourced {
            value: Duration::from_millis(800),
            origin: Origin::Line { file: "policy.yaml".into(), line: 12 },
        };
        LocalReply::timed(LocalReplyKind::RequestTimeout, "timeouts.request", &limit, "no answer in time")
    }

    fn first() -> LocalReplyContext<'static> {
        LocalReplyContext { attempt: (1, 1), ..LocalReplyContext::default() }
    }

    #[test]
    fn a_refusal_names_rule_value_line_and_try() {
        let answer = timeout().answer(false, &first(), |bytes| bytes);
        assert_eq!(answer.status(), 504);
        assert_eq!(
            answer.headers()[PROXY_STATUS],
            "hopguard; error=http_response_timeout; details=\"request_timeout: no answer in time: \
             timeouts.request is 800ms (policy.yaml:12); try 1/1\""
        );
        let document: serde_json::Value = serde_json::from_slice(answer.body()).unwrap();
        assert_eq!(document["rule"], "timeouts.request");
        assert_eq!(document["value"], "800ms");
        assert_eq!(document["policy"], "policy.yaml:12");
        assert_eq!(document["attempt"], "1/1");
        assert_eq!(document["refusal"], "request_timeout");
    }

    #[test]
    fn grpc_gets_its_status_in_an_answer_without_body() {
        let answer = timeout().answer(true, &first(), |bytes| bytes);
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()[grpc::STATUS], "4");
        assert!(answer.body().is_empty());
        assert!(answer.headers()[grpc::MESSAGE].to_str().unwrap().contains("policy.yaml:12"));
    }

    #[test]
    fn whoever_pushes_a_grpc_caller_back_says_so_whatever_the_refusal() {
        let kinds = [
            LocalReplyKind::UpstreamReset,
            LocalReplyKind::DnsFailed,
            LocalReplyKind::RequestTimeout,
            LocalReplyKind::CircuitOpen,
        ];
        for (kind, waits) in kinds.into_iter().zip([None, None, None, Some("1000")]) {
            for (pushes_back, wanted) in [(true, Some("-1")), (false, waits)] {
                let context = LocalReplyContext { pushes_back, ..LocalReplyContext::default() };
                let answer = LocalReply::plain(kind, "").answer(true, &context, |bytes| bytes);
                let said = answer.headers().get(PUSHBACK).map(|value| value.to_str().unwrap());
                assert_eq!(said, wanted, "{kind:?}");
                let answer = LocalReply::plain(kind, "").answer(false, &context, |bytes| bytes);
                assert_eq!(answer.headers().get(PUSHBACK), None, "{kind:?}");
            }
        }
    }

    #[test]
    fn nobody_is_told_to_come_again_too_early() {
        let table = [(1, "1", "1"), (999_999, "1", "1"), (1_000_000, "1", "1"), (3_333_334, "4", "1")];
        let longer = [(1_500_000_000, "1500", "2"), (1_500_000_001, "1501", "2"), (2_000_000_000, "2000", "2")];
        for (nanos, millis, seconds) in table.into_iter().chain(longer) {
            let wait = Some(Duration::from_nanos(nanos));
            let refusal = LocalReply { retry_after: wait, ..LocalReply::plain(LocalReplyKind::RateLimited, "") };
            for (is_grpc, name, wanted) in [(true, PUSHBACK, millis), (false, header::RETRY_AFTER, seconds)] {
                let answer = refusal.answer(is_grpc, &LocalReplyContext::default(), |bytes| bytes);
                assert_eq!(answer.headers()[name], wanted, "{wait:?}");
            }
        }
    }

    #[test]
    fn the_longest_wait_of_a_grpc_caller_is_a_number_that_it_can_read() {
        let refusal = LocalReply {
            retry_after: Some(Duration::from_secs(30 * 86400)),
            ..LocalReply::plain(LocalReplyKind::RateLimited, "")
        };
        let answer = refusal.answer(true, &LocalReplyContext::default(), |bytes| bytes);
        assert_eq!(answer.headers()[PUSHBACK], i32::MAX.to_string());
    }

    #[test]
    fn details_are_a_string_of_structured_fields_whatever_is_in_them() {
        let odd = LocalReply::plain(LocalReplyKind::ConnectFailed, "say \"hé\\llo\"\r\nx");
        let answer = odd.answer(false, &LocalReplyContext::default(), |bytes| bytes);
        assert_eq!(
            answer.headers()[PROXY_STATUS],
            r#"hopguard; error=connection_refused; details="connect_failed: say \"h?\\llo\"??x""#
        );
    }
}
