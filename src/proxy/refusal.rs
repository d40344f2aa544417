//! The closed list of answers that we give in the upstream's place.
//!
//! Each has a stable name (the metric's outcome), an HTTP status, a gRPC code, and an error type of RFC 9209; each
//! says which rule, which value, from which line of the policy. The same facts go into the answer's
//! `Proxy-Status`, its body (RFC 9457, or `grpc-message`), and the log.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http::{Response, StatusCode, header};

use crate::problems::{Origin, Set};
use crate::proxy::grpc::{self, Code};
use crate::telemetry::{Outcome, RefusalRecord, Side};

/// `Proxy-Status`
const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// One refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Which one.
    pub kind: Kind,
    /// The rule that it follows from, where there is one.
    pub rule: Option<Rule>,
    /// What happened, in one sentence.
    pub detail: Cow<'static, str>,
}

/// A rule's value and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// As a path of the policy: `timeouts.request`.
    pub name: &'static str,
    /// As the policy writes it: `800ms`.
    pub value: String,
    /// The line, or built in.
    pub origin: Origin,
}

/// Which refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
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
}

/// What a kind of refusal looks like from outside.
struct Face {
    outcome: Outcome,
    status: StatusCode,
    code: Code,
    error: &'static str,
    title: &'static str,
    closed_by: Side,
}

impl Kind {
    /// The one table of all refusals. No `_`: a new kind has to be given a face.
    const fn face(self) -> Face {
        use Outcome as O;
        use Side::{Hopguard, Upstream};
        use StatusCode as S;
        type Row = (Outcome, StatusCode, Code, &'static str, &'static str, Side);
        let row: Row = match self {
            Self::RequestTimeout => (O::RequestTimeout, S::GATEWAY_TIMEOUT, Code::DeadlineExceeded, "http_response_timeout", "The call took too long", Hopguard),
            Self::PerTryTimeout => (O::PerTryTimeout, S::GATEWAY_TIMEOUT, Code::DeadlineExceeded, "http_response_timeout", "One try took too long", Hopguard),
            Self::ConnectTimeout => (O::ConnectTimeout, S::GATEWAY_TIMEOUT, Code::DeadlineExceeded, "connection_timeout", "No connection in time", Hopguard),
            Self::IdleTimeout => (O::IdleTimeout, S::GATEWAY_TIMEOUT, Code::DeadlineExceeded, "connection_read_timeout", "Nothing moved for too long", Hopguard),
            Self::MaxDuration => (O::MaxDuration, S::GATEWAY_TIMEOUT, Code::DeadlineExceeded, "connection_read_timeout", "The stream lived too long", Hopguard),
            Self::QueueFull => (O::QueueFull, S::SERVICE_UNAVAILABLE, Code::ResourceExhausted, "connection_limit_reached", "Too many calls at once", Hopguard),
            Self::QueueTimeout => (O::QueueTimeout, S::SERVICE_UNAVAILABLE, Code::ResourceExhausted, "connection_limit_reached", "Too many calls at once", Hopguard),
            Self::NoDestination => (O::NoDestination, S::NOT_FOUND, Code::Unimplemented, "destination_not_found", "No destination has this host", Hopguard),
            Self::NoRoute => (O::NoRoute, S::NOT_FOUND, Code::Unimplemented, "destination_not_found", "There is no way to this destination", Hopguard),
            Self::ConnectFailed => (O::ConnectFailed, S::BAD_GATEWAY, Code::Unavailable, "connection_refused", "The upstream cannot be reached", Upstream),
            Self::DnsFailed => (O::DnsFailed, S::BAD_GATEWAY, Code::Unavailable, "dns_error", "The upstream's name cannot be resolved", Hopguard),
            Self::TlsFailed => (O::TlsFailed, S::BAD_GATEWAY, Code::Unavailable, "tls_protocol_error", "TLS with the upstream failed", Upstream),
            Self::UpstreamReset => (O::UpstreamReset, S::BAD_GATEWAY, Code::Unavailable, "connection_terminated", "The upstream broke off", Upstream),
            Self::UpstreamProtocol => (O::UpstreamProtocol, S::BAD_GATEWAY, Code::Internal, "http_protocol_error", "The upstream's answer is malformed", Hopguard),
            Self::BadRequest => (O::BadRequest, S::BAD_REQUEST, Code::Internal, "http_request_error", "The request is malformed", Hopguard),
            Self::UnknownCoding => (O::BadRequest, S::NOT_IMPLEMENTED, Code::Internal, "http_request_error", "The transfer coding is unknown", Hopguard),
            Self::UnknownMethod => (O::BadRequest, S::NOT_IMPLEMENTED, Code::Internal, "http_request_error", "The method is unknown", Hopguard),
            Self::UnknownExpectation => (O::BadRequest, S::EXPECTATION_FAILED, Code::Internal, "http_request_error", "The expectation is unknown", Hopguard),
            Self::HeaderTooLarge => (O::HeaderTooLarge, S::REQUEST_HEADER_FIELDS_TOO_LARGE, Code::ResourceExhausted, "http_request_error", "The header section is too long", Hopguard),
            Self::CallerTimeout => (O::CallerTimeout, S::REQUEST_TIMEOUT, Code::DeadlineExceeded, "http_request_error", "The caller is too slow", Hopguard),
            Self::LoopDetected => (O::LoopDetected, S::BAD_GATEWAY, Code::Internal, "proxy_loop_detected", "The request goes in circles", Hopguard),
            Self::ConnectDenied => (O::ConnectDenied, S::FORBIDDEN, Code::PermissionDenied, "http_request_denied", "CONNECT is not allowed here", Hopguard),
            Self::Draining => (O::Draining, S::SERVICE_UNAVAILABLE, Code::Unavailable, "destination_unavailable", "This listener is closing", Hopguard),
        };
        let (outcome, status, code, error, title, closed_by) = row;
        Face { outcome, status, code, error, title, closed_by }
    }
}

impl Refusal {
    /// A refusal that follows from no value of the policy.
    pub fn plain(kind: Kind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, rule: None, detail: detail.into() }
    }

    /// A refusal that a time limit of the policy demands.
    pub fn timed(kind: Kind, name: &'static str, limit: &Set<Duration>, detail: impl Into<Cow<'static, str>>) -> Self {
        let rule = Rule {
            name,
            value: crate::rules::duration::format(limit.value),
            origin: limit.origin.clone(),
        };
        Self { kind, rule: Some(rule), detail: detail.into() }
    }

    /// A refusal that a number of the policy demands.
    pub fn counted(kind: Kind, name: &'static str, limit: &Set<u32>, detail: impl Into<Cow<'static, str>>) -> Self {
        let rule = Rule { name, value: limit.value.to_string(), origin: limit.origin.clone() };
        Self { kind, rule: Some(rule), detail: detail.into() }
    }

    /// The status of the answer to a caller that speaks HTTP.
    pub fn status(&self) -> StatusCode {
        self.kind.face().status
    }

    /// True if what follows on the caller's connection cannot be trusted to be the next request (RFC 9112, 11.2).
    pub fn ends_connection(&self) -> bool {
        matches!(
            self.kind,
            Kind::BadRequest | Kind::UnknownCoding | Kind::HeaderTooLarge | Kind::CallerTimeout | Kind::UnknownMethod | Kind::Draining
        )
    }

    /// What telemetry keeps of it.
    pub fn record(&self) -> RefusalRecord {
        let face = self.kind.face();
        let rule = self.rule.as_ref();
        RefusalRecord {
            outcome: face.outcome,
            rule: rule.map_or("", |rule| rule.name),
            value: rule.map_or_else(String::new, |rule| rule.value.clone()),
            origin: rule.map_or_else(String::new, |rule| rule.origin.to_string()),
            detail: self.detail.clone().into_owned(),
            closed_by: face.closed_by,
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
    pub fn grpc(&self) -> (Code, String) {
        let face = self.kind.face();
        (face.code, format!("hopguard {}: {}", face.outcome.as_str(), self.sentence()))
    }

    /// The whole answer: gRPC gets its trailers, everybody else a problem document. `attempt` is the try it ended at.
    pub fn answer<B>(&self, is_grpc: bool, attempt: (u16, u16), body: impl FnOnce(Bytes) -> B) -> Response<B> {
        let face = self.kind.face();
        let mut answer = if is_grpc {
            let (code, message) = self.grpc();
            grpc::trailers_only(code, &message, body(Bytes::new()))
        } else {
            let document = self.document(attempt);
            let mut answer = Response::new(body(Bytes::from(document)));
            *answer.status_mut() = face.status;
            answer.headers_mut().insert(
                header::CONTENT_TYPE,
                HeaderValue::from_static("application/problem+json"),
            );
            answer
        };
        if let Some(value) = self.proxy_status(&face, attempt) {
            answer.headers_mut().insert(PROXY_STATUS, value);
        }
        if face.status == StatusCode::SERVICE_UNAVAILABLE {
            answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        answer
    }

    fn proxy_status(&self, face: &Face, (attempt, of): (u16, u16)) -> Option<HeaderValue> {
        let tries = if attempt > 0 { format!("; try {attempt}/{of}") } else { String::new() };
        let details = format!("{}: {}{tries}", face.outcome.as_str(), self.sentence());
        // A string of RFC 9651 has printable ASCII only, with `"` and `\` escaped.
        let escaped: String = details
            .chars()
            .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' })
            .flat_map(|c| matches!(c, '"' | '\\').then_some('\\').into_iter().chain([c]))
            .collect();
        HeaderValue::from_str(&format!("hopguard; error={}; details=\"{escaped}\"", face.error)).ok()
    }

    fn document(&self, (attempt, of): (u16, u16)) -> String {
        let face = self.kind.face();
        let name = face.outcome.as_str();
        let mut document = serde_json::json!({
            "type": format!("https://hopguard.dev/refusals/{name}"),
            "title": face.title,
            "status": face.status.as_u16(),
            "detail": self.sentence(),
            "refusal": name,
            "closedBy": face.closed_by.as_str(),
        });
        if let Some(rule) = &self.rule {
            document["rule"] = rule.name.into();
            document["value"] = rule.value.as_str().into();
            document["policy"] = rule.origin.to_string().into();
        }
        if attempt > 0 {
            document["attempt"] = format!("{attempt}/{of}").into();
        }
        format!("{document}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeout() -> Refusal {
        let limit = Set {
            value: Duration::from_millis(800),
            origin: Origin::At { file: "policy.yaml".into(), line: 12 },
        };
        Refusal::timed(Kind::RequestTimeout, "timeouts.request", &limit, "no answer in time")
    }

    #[test]
    fn a_refusal_names_rule_value_line_and_try() {
        let answer = timeout().answer(false, (1, 1), |bytes| bytes);
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
        let answer = timeout().answer(true, (1, 1), |bytes| bytes);
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()[grpc::STATUS], "4");
        assert!(answer.body().is_empty());
        assert!(answer.headers()[grpc::MESSAGE].to_str().unwrap().contains("policy.yaml:12"));
    }

    #[test]
    fn details_are_a_string_of_structured_fields_whatever_is_in_them() {
        let odd = Refusal::plain(Kind::ConnectFailed, "say \"hé\\llo\"\r\nx");
        let answer = odd.answer(false, (0, 0), |bytes| bytes);
        assert_eq!(
            answer.headers()[PROXY_STATUS],
            r#"hopguard; error=connection_refused; details="connect_failed: say \"h?\\llo\"??x""#
        );
    }
}
