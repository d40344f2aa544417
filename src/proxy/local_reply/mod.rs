//! Local replies: the responses that hopguard makes in the upstream's place. `kind` has the closed list.
//!
//! Each names its rule, the value of the rule and the line of the policy that set it. The same facts go into the response's
//! `Proxy-Status` (RFC 9209), its body (RFC 9457, or `grpc-message`), and the log.

mod kind;

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode, header};

pub use self::kind::LocalReplyKind;
use crate::problems::{Origin, Sourced};
use crate::proxy::grpc::{self, GrpcStatus, PUSHBACK};
use crate::rules::proxy_status::{DETAILS, ERROR, ProxyStatus, printable, write_member};
use crate::telemetry::RefusalRecord;
use crate::upstream::response::UpstreamError;

/// `Proxy-Status` (RFC 9209).
pub const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// One local reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalReply {
    /// Its kind.
    pub kind: LocalReplyKind,
    /// The rule that it follows from; `None` where no value of the policy is involved.
    pub rule: Option<Box<RuleRef>>,
    /// What happened, in one sentence.
    pub detail: Cow<'static, str>,
    /// When a repeat makes sense.
    pub retry_after: Option<Duration>,
}

/// A rule's value and its origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleRef {
    /// The path of the value in the policy: `timeouts.request`.
    pub name: &'static str,
    /// The value as the policy writes it: `800ms`.
    pub value: String,
    /// The line that set it, or built in.
    pub origin: Origin,
}

/// Why a body breaks off.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The upstream broke off. No source: hyper would pass on the error code of the upstream's stream, and NO_ERROR or
    /// REFUSED_STREAM would tell the caller that the response is complete, or that the request was not processed
    /// (RFC 9113, 7 and 8.7). Without an h2 error among the sources hyper resets with INTERNAL_ERROR.
    #[error("the upstream broke off: {0}")]
    Upstream(UpstreamError),
    /// A fault of the policy, in the upstream's place.
    #[error("the fault {0} of the policy broke the response off")]
    Fault(Box<str>),
    /// A time limit.
    #[error("{0}")]
    Ended(String),
}

/// What the response says beside the local reply itself.
#[derive(Default)]
pub struct LocalReplyContext<'a> {
    /// The number of the last attempt, and how many there may be; zeroes before the first.
    pub attempt: (u16, u16),
    /// Why there was no retry.
    pub retry: Option<&'static str>,
    /// What it tells the hops above.
    pub status: Option<&'a ProxyStatus>,
    /// A gRPC caller is told not to retry.
    pub pushes_back: bool,
}

impl LocalReply {
    /// A local reply that follows from no value of the policy.
    pub fn plain(kind: LocalReplyKind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, rule: None, detail: detail.into(), retry_after: None }
    }

    /// A local reply that follows from a rule.
    pub fn ruled(kind: LocalReplyKind, rule: RuleRef, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, rule: Some(Box::new(rule)), detail: detail.into(), retry_after: None }
    }

    /// A local reply that follows from a time limit of the policy.
    pub fn timed(
        kind: LocalReplyKind,
        name: &'static str,
        limit: &Sourced<Duration>,
        detail: impl Into<Cow<'static, str>>,
    ) -> Self {
        let rule = RuleRef { name, value: crate::rules::duration::format(limit.value), origin: limit.origin.clone() };
        Self::ruled(kind, rule, detail)
    }

    /// A local reply that follows from a count of the policy.
    pub fn counted(
        kind: LocalReplyKind,
        name: &'static str,
        limit: &Sourced<u32>,
        detail: impl Into<Cow<'static, str>>,
    ) -> Self {
        let rule = RuleRef { name, value: limit.value.to_string(), origin: limit.origin.clone() };
        Self::ruled(kind, rule, detail)
    }

    /// A local reply to a response with more fields than `connections.maxHeaderCount`.
    pub fn too_many_headers(limit: &Sourced<u32>, detail: String) -> Self {
        Self::counted(LocalReplyKind::UpstreamProtocol, "connections.maxHeaderCount", limit, detail)
    }

    /// The HTTP status of the response to a caller that does not speak gRPC.
    pub fn status(&self) -> StatusCode {
        self.kind.face().status
    }

    /// True if what follows on the downstream connection cannot be trusted to be the next request (RFC 9112, 11.2).
    pub fn ends_connection(&self) -> bool {
        self.kind.face().ends_connection
    }

    /// What the record of the exchange keeps.
    pub fn record(&self) -> RefusalRecord {
        let rule = self.rule.as_ref();
        RefusalRecord {
            outcome: self.kind.face().outcome,
            rule: rule.map_or("", |rule| rule.name),
            value: rule.map_or_else(String::new, |rule| rule.value.clone()),
            origin: rule.map_or_else(String::new, |rule| rule.origin.to_string()),
            detail: self.detail.clone().into_owned(),
            closed_by: self.kind.face().closed_by,
        }
    }

    /// One sentence: what happened, and by which rule.
    pub fn sentence(&self) -> String {
        match &self.rule {
            Some(rule) => format!("{}: {} is {} ({})", self.detail, rule.name, rule.value, rule.origin),
            None => self.detail.clone().into_owned(),
        }
    }

    /// The gRPC status and message.
    pub fn grpc(&self) -> (GrpcStatus, String) {
        (self.kind.face().grpc, format!("hopguard {}: {}", self.kind.face().outcome.as_str(), self.sentence()))
    }

    /// The whole response: trailers for a gRPC caller, a problem document for any other.
    pub fn response<B>(
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
            *answer.status_mut() = self.kind.face().status;
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
        let busy = self.kind.face().status == StatusCode::SERVICE_UNAVAILABLE;
        if let Some(wait) = self.retry_after.or_else(|| busy.then_some(Duration::from_secs(1))) {
            write_retry_after(is_grpc, wait, answer.headers_mut());
        }
        answer
    }

    fn proxy_status(&self, context: &LocalReplyContext<'_>) -> Option<HeaderValue> {
        let (attempt, of) = context.attempt;
        let tries = if attempt > 0 { format!("; attempt {attempt}/{of}") } else { String::new() };
        let tries = context.retry.map_or_else(|| tries.clone(), |why| format!("{tries}; not retried: {why}"));
        let details = format!("{}: {}{tries}", self.kind.face().outcome.as_str(), self.sentence());
        let member = write_member(|member| {
            let member = member.parameter(ERROR, self.kind.face().error).parameter(DETAILS, &*printable(&details));
            match context.status {
                Some(status) => status.write(member),
                None => member,
            }
        });
        HeaderValue::try_from(member).ok()
    }

    fn document(&self, context: &LocalReplyContext<'_>) -> String {
        let (attempt, of) = context.attempt;
        let name = self.kind.face().outcome.as_str();
        let mut document = serde_json::json!({
            "type": format!("https://hopguard.dev/refusals/{name}"),
            "title": self.kind.face().title,
            "status": self.kind.face().status.as_u16(),
            "detail": self.sentence(),
            "refusal": name,
            "closedBy": self.kind.face().closed_by.as_str(),
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
            document["notRetried"] = why.into();
        }
        format!("{document}\n")
    }
}

/// Writes when to call again (RFC 9110, 10.2.3; gRFC A6), rounded up: an earlier call would be refused again.
fn write_retry_after(is_grpc: bool, wait: Duration, fields: &mut HeaderMap) {
    if is_grpc {
        // Clients read a signed number of 32 bits, and take a larger one for "never".
        let millis = i32::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
        fields.insert(PUSHBACK, HeaderValue::from(millis));
    } else {
        let seconds = wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0));
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
        LocalReply::timed(LocalReplyKind::RequestTimeout, "timeouts.request", &limit, "no response in time")
    }

    fn first() -> LocalReplyContext<'static> {
        LocalReplyContext { attempt: (1, 1), ..LocalReplyContext::default() }
    }

    #[test]
    fn a_local_reply_names_rule_value_line_and_attempt() {
        let answer = timeout().response(false, &first(), |bytes| bytes);
        assert_eq!(answer.status(), 504);
        assert_eq!(
            answer.headers()[PROXY_STATUS],
            "hopguard;error=http_response_timeout;details=\"request_timeout: no response in time: \
             timeouts.request is 800ms (policy.yaml:12); attempt 1/1\""
        );
        let document: serde_json::Value = serde_json::from_slice(answer.body()).unwrap();
        assert_eq!(document["rule"], "timeouts.request");
        assert_eq!(document["value"], "800ms");
        assert_eq!(document["policy"], "policy.yaml:12");
        assert_eq!(document["attempt"], "1/1");
        assert_eq!(document["refusal"], "request_timeout");
    }

    #[test]
    fn grpc_gets_its_status_in_a_response_without_body() {
        let answer = timeout().response(true, &first(), |bytes| bytes);
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()[grpc::STATUS], "4");
        assert!(answer.body().is_empty());
        assert!(answer.headers()[grpc::MESSAGE].to_str().unwrap().contains("policy.yaml:12"));
    }

    #[test]
    fn a_final_status_pushes_a_grpc_caller_back_whatever_the_local_reply() {
        let kinds = [
            LocalReplyKind::UpstreamReset,
            LocalReplyKind::DnsFailed,
            LocalReplyKind::RequestTimeout,
            LocalReplyKind::CircuitOpen,
        ];
        for (kind, waits) in kinds.into_iter().zip([None, None, None, Some("1000")]) {
            for (pushes_back, wanted) in [(true, Some("-1")), (false, waits)] {
                let context = LocalReplyContext { pushes_back, ..LocalReplyContext::default() };
                let answer = LocalReply::plain(kind, "").response(true, &context, |bytes| bytes);
                let said = answer.headers().get(PUSHBACK).map(|value| value.to_str().unwrap());
                assert_eq!(said, wanted, "{kind:?}");
                let answer = LocalReply::plain(kind, "").response(false, &context, |bytes| bytes);
                assert_eq!(answer.headers().get(PUSHBACK), None, "{kind:?}");
            }
        }
    }

    #[test]
    fn retry_after_is_rounded_up() {
        let table = [(1, "1", "1"), (999_999, "1", "1"), (1_000_000, "1", "1"), (3_333_334, "4", "1")];
        let longer = [(1_500_000_000, "1500", "2"), (1_500_000_001, "1501", "2"), (2_000_000_000, "2000", "2")];
        for (nanos, millis, seconds) in table.into_iter().chain(longer) {
            let wait = Some(Duration::from_nanos(nanos));
            let reply = LocalReply { retry_after: wait, ..LocalReply::plain(LocalReplyKind::RateLimited, "") };
            for (is_grpc, name, wanted) in [(true, PUSHBACK, millis), (false, header::RETRY_AFTER, seconds)] {
                let answer = reply.response(is_grpc, &LocalReplyContext::default(), |bytes| bytes);
                assert_eq!(answer.headers()[name], wanted, "{wait:?}");
            }
        }
    }

    #[test]
    fn the_longest_wait_of_a_grpc_caller_is_a_number_that_it_can_read() {
        let reply = LocalReply {
            retry_after: Some(Duration::from_secs(30 * 86400)),
            ..LocalReply::plain(LocalReplyKind::RateLimited, "")
        };
        let answer = reply.response(true, &LocalReplyContext::default(), |bytes| bytes);
        assert_eq!(answer.headers()[PUSHBACK], i32::MAX.to_string());
    }

    #[test]
    fn details_are_a_string_of_structured_fields_whatever_is_in_them() {
        let odd = LocalReply::plain(LocalReplyKind::ConnectFailed, "say \"hé\\llo\"\r\nx");
        let answer = odd.response(false, &LocalReplyContext::default(), |bytes| bytes);
        assert_eq!(
            answer.headers()[PROXY_STATUS],
            r#"hopguard;error=connection_refused;details="connect_failed: say \"h?\\llo\"??x""#
        );
    }
}
