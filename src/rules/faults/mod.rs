//! Fault injection: which fault a call meets. The request path makes the fault happen.
//!
//! A fault takes effect where the upstream would, so timeouts, retries and the circuit breaker treat it like a real
//! failure.
//!
//! Invariants: every fault has an end, after which no call meets it. A call meets at most one fault, the first of the
//! list that applies. The fields of a checked fault do not contradict each other.

mod spec;

use std::hash::{Hash, Hasher};
use std::time::Duration;

use http::StatusCode;
use http::header::{HOST, HeaderName, HeaderValue};
use jiff::Timestamp;

pub use self::spec::{AbortSpec, AbortStatus, ByteLimit, FaultSpec, FaultUntil, SlowBodySpec};
use crate::problems::{self, Cursor, Origin, Sourced, near_miss};
use crate::rules::duration;
use crate::rules::rule::{Row, RowContext, Rule};

/// The faults of a route, in the order of evaluation. None by default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Faults(Vec<Fault>);

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fault {
    /// Unique in its list; the label in metrics and logs. Its origin is the line of `name`.
    pub name: Sourced<String>,
    /// Delay before the action.
    pub delay: Option<Sourced<Duration>>,
    /// What happens after the delay.
    pub ending: FaultAction,
    /// Share of the calls that meet the fault.
    pub share: Sourced<Share>,
    /// The call must have each of these headers with exactly this value. Sorted by name.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// No call meets the fault from this time on.
    pub until: Sourced<Timestamp>,
}

/// What happens to a call that meets a fault.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum FaultAction {
    /// The upstream gets the call; its response is passed on with these changes.
    Answer {
        /// The connection seems to close after this many bytes of the body.
        cut_after: Option<Sourced<u64>>,
        /// Bytes of the body per second; at least 1.
        bytes_per_second: Option<Sourced<u64>>,
    },
    /// The caller gets this response; the upstream gets no call.
    Abort(Sourced<Abort>),
    /// The connection seems to close without a response; the upstream gets no call.
    Reset(Sourced<()>),
}

/// A response instead of the upstream's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Abort {
    /// An HTTP status, 200 to 599.
    Status(StatusCode),
    /// A gRPC status.
    Grpc(GrpcCode),
}

/// A share of calls: above 0, at most 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share(f64);

/// The range excludes NaN, so a share equals itself.
impl Eq for Share {}

impl Hash for Share {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}

/// A gRPC status code, 0 to 16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GrpcCode(u8);

impl Rule for Faults {
    type Spec = Vec<FaultSpec>;
    type Value = Self;

    const BUILT_IN: Self = Self(Vec::new());

    /// A list replaces that of the layer below as a whole; an empty one means no faults.
    ///
    /// Reports missing fields, contradictions and duplicate names. An `until` in the past is no error, because an old
    /// policy has to stay loadable; see [`Fault::is_over`].
    fn check(specs: &Vec<FaultSpec>, _: &Self, at: &Cursor<'_>) -> Self {
        let mut names: Vec<Sourced<&str>> = Vec::with_capacity(specs.len());
        let mut faults = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            let at = at.index(index);
            if let Some(name) = &spec.name {
                let name = at.key("name").set(name.as_str());
                if let Some(first) = names.iter().find(|other| **other == name) {
                    let message = format!("another fault is named `{}` already, at {}", name.value, first.origin);
                    at.key("name").report(message, "choose another name");
                }
                names.push(name);
            }
            faults.extend(spec.check(&at));
        }
        Self(faults)
    }

    fn rows(faults: &Self, seen: &RowContext) -> Vec<Row> {
        if faults.is_empty() {
            return vec![Row::whole("none", &Origin::BuiltIn)];
        }
        let row = |fault: &Fault| Row::new(&fault.name.value, fault.describe(seen.now), &fault.name.origin);
        faults.iter().map(row).collect()
    }
}

impl Faults {
    /// The fault that this call meets: the first that is not over, whose headers match, and whose share is drawn.
    ///
    /// `header` returns the call's value of a header, `random` a number from 0 up to, but not including, 1. Each share
    /// is drawn independently: of two faults with a share of 0.1, the second one meets 0.09 of the calls. A share of 1
    /// draws no number.
    pub fn draw<'a>(
        &self,
        header: impl Fn(&HeaderName) -> Option<&'a [u8]>,
        now: Timestamp,
        mut random: impl FnMut() -> f64,
    ) -> Option<&Fault> {
        self.0.iter().find(|fault| {
            let has = |(name, value): &(HeaderName, HeaderValue)| header(name) == Some(value.as_bytes());
            !fault.is_over(now) && fault.headers.iter().all(has) && fault.share.value.takes(&mut random)
        })
    }

    /// Whether the list is empty; then the clock need not be read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All faults in their order, including those that are over.
    pub fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.0.iter()
    }
}

impl Fault {
    /// Whether `until` has passed.
    pub fn is_over(&self, now: Timestamp) -> bool {
        now >= self.until.value
    }

    /// Action, share, conditions and end, in one line.
    fn describe(&self, now: Timestamp) -> String {
        let mut parts: Vec<String> = Vec::new();
        parts.extend(self.delay.as_ref().map(|delay| format!("delay {}", duration::format(delay.value))));
        match &self.ending {
            FaultAction::Answer { cut_after, bytes_per_second } => {
                parts.extend(cut_after.as_ref().map(|size| format!("cut after {} bytes", size.value)));
                parts.extend(bytes_per_second.as_ref().map(|rate| format!("{} bytes a second", rate.value)));
            }
            FaultAction::Abort(abort) => parts.push(match abort.value {
                Abort::Status(status) => format!("abort with {}", status.as_u16()),
                Abort::Grpc(code) => format!("abort with grpc {}", code.as_str()),
            }),
            FaultAction::Reset(_) => parts.push("reset".into()),
        }
        parts.push(format!("share {}", self.share.value.get()));
        for (name, value) in &self.headers {
            parts.push(format!("if {name}: {}", String::from_utf8_lossy(value.as_bytes())));
        }
        let end = if self.is_over(now) { "ended at" } else { "until" };
        parts.push(format!("{end} {}", self.until.value));
        parts.join(", ")
    }
}

impl Share {
    /// Above 0, at most 1.
    pub fn get(self) -> f64 {
        self.0
    }

    fn takes(self, random: &mut impl FnMut() -> f64) -> bool {
        self.0 >= 1.0 || random() < self.0
    }
}

impl GrpcCode {
    /// The names, indexed by code. Source: grpc/grpc doc/statuscodes.md.
    pub const NAMES: [&str; 17] = [
        "ok",
        "cancelled",
        "unknown",
        "invalid_argument",
        "deadline_exceeded",
        "not_found",
        "already_exists",
        "permission_denied",
        "resource_exhausted",
        "failed_precondition",
        "aborted",
        "out_of_range",
        "unimplemented",
        "internal",
        "unavailable",
        "data_loss",
        "unauthenticated",
    ];

    /// Parses a name.
    ///
    /// # Errors
    /// Unknown names, with the most similar name as a hint.
    pub fn parse(text: &str) -> Result<Self, problems::InvalidValue> {
        let at = (0..).zip(Self::NAMES).find(|(_, name)| *name == text);
        at.map(|(code, _)| Self(code)).ok_or_else(|| {
            // `canceled` is the usual misspelling.
            let hint = near_miss(text, Self::NAMES).map_or_else(
                || format!("write one of: {}", Self::NAMES.join(", ")),
                |near| format!("did you mean `{near}`?"),
            );
            problems::InvalidValue::new(format!("`{text}` is no gRPC status"), hint)
        })
    }

    /// 0 to 16.
    pub fn number(self) -> u32 {
        u32::from(self.0)
    }

    /// The name, as in a policy.
    pub fn as_str(self) -> &'static str {
        Self::NAMES.get(usize::from(self.0)).copied().unwrap_or("unknown")
    }
}

impl FaultSpec {
    fn check(&self, at: &Cursor<'_>) -> Option<Fault> {
        at.missing("name", "give it a unique name");
        if let Some(name) = &self.name {
            check_name(name, &at.key("name"));
        }
        let why = "a fault needs an end: write `until:` with a date, like `2030-01-01T00:00:00Z`";
        at.missing("until", why);
        self.check_does_something(at);
        self.check_contradictions(at);
        let (ending, headers) = (self.ending(at), self.check_headers(&at.key("headers")));
        Some(Fault {
            name: at.key("name").set(self.name.clone()?),
            delay: self.delay.map(|span| at.key("delay").set(span.0)),
            ending: ending?,
            share: self.share.map_or(Sourced::built_in(Share(1.0)), |share| at.key("share").set(Share(share.0))),
            headers,
            until: at.key("until").set(self.until?.0),
        })
    }

    fn check_does_something(&self, at: &Cursor<'_>) {
        // A refused field counts as an action too.
        let is_given = |key: &&str| at.key(key).is_given();
        let is_set = self.delay.is_some() || self.abort.is_some() || self.reset.is_some() || self.does_to_body();
        if !is_set && !["delay", "abort", "reset", "cutAfter", "slowBody"].iter().any(is_given) {
            at.report("the fault has no action", "write one or more of delay, abort, reset, cutAfter and slowBody");
        }
        if self.reset == Some(false) {
            at.key("reset").report("`reset: false` has no effect", "write `reset: true`, or remove the line");
        }
    }

    fn does_to_body(&self) -> bool {
        self.cut_after.is_some() || self.slow_body.is_some()
    }

    /// Without a response of the upstream, no change of its body is possible.
    fn check_contradictions(&self, at: &Cursor<'_>) {
        let instead = match (&self.abort, self.reset) {
            (Some(_), Some(true)) => {
                let message = "`reset` and `abort` exclude each other";
                at.key("reset").report(message, "a call that is reset gets no response: remove one of the two");
                return;
            }
            (Some(_), _) => "abort",
            (None, Some(true)) => "reset",
            (None, _) => return,
        };
        let body = [("cutAfter", self.cut_after.is_some()), ("slowBody", self.slow_body.is_some())];
        for (key, _) in body.into_iter().filter(|(_, is_set)| *is_set) {
            let hint = format!("with `{instead}` the upstream sends no response: remove one of the two");
            at.key(key).report(format!("`{key}` and `{instead}` exclude each other"), hint);
        }
    }

    fn ending(&self, at: &Cursor<'_>) -> Option<FaultAction> {
        if let Some(abort) = &self.abort {
            return abort.check(&at.key("abort")).map(FaultAction::Abort);
        }
        if self.reset == Some(true) {
            return Some(FaultAction::Reset(at.key("reset").set(())));
        }
        let bytes_per_second = match &self.slow_body {
            Some(slow) => Some(slow.check(&at.key("slowBody"))?),
            None => None,
        };
        Some(FaultAction::Answer {
            cut_after: self.cut_after.map(|size| at.key("cutAfter").set(size.0)),
            bytes_per_second,
        })
    }

    fn check_headers(&self, at: &Cursor<'_>) -> Vec<(HeaderName, HeaderValue)> {
        let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
        for (name, value) in self.headers.iter().flatten() {
            let at = at.key(name);
            let Ok(field) = HeaderName::from_bytes(name.as_bytes()) else {
                let hint = "write a name like `x-test`";
                at.report_key(problems::InvalidValue::new(format!("`{name}` is not a header name"), hint));
                continue;
            };
            if field == HOST {
                // HTTP/2 requests have no such field, so only HTTP/1 requests would match.
                let hint = "write the fault at the destination that has this host in `hosts`";
                at.report_key(problems::InvalidValue::new(format!("a fault cannot match by `{name}`"), hint));
                continue;
            }
            if headers.iter().any(|(other, _)| *other == field) {
                let hint = "header names are case-insensitive: remove one of the two";
                at.report_key(problems::InvalidValue::new(format!("header `{field}` appears twice"), hint));
            }
            match HeaderValue::from_str(value) {
                Ok(_) if value.trim() != value => {
                    at.report(format!("`{value}` never matches"), "remove the spaces around the value");
                }
                Ok(value) => headers.push((field, value)),
                Err(_) => at.report("not a header value", "write printable ASCII characters"),
            }
        }
        headers.sort_by(|a, b| a.0.as_str().cmp(b.0.as_str()));
        headers
    }
}

impl AbortSpec {
    fn check(&self, at: &Cursor<'_>) -> Option<Sourced<Abort>> {
        match (self.status, self.grpc) {
            (Some(_), Some(_)) => {
                at.key("grpc").report(
                    "`status` and `grpc` exclude each other",
                    "a call gets one response: remove one of the two",
                );
                None
            }
            (Some(status), None) => Some(at.key("status").set(Abort::Status(status.0))),
            (None, Some(code)) => Some(at.key("grpc").set(Abort::Grpc(code))),
            (None, None) => {
                if !at.key("status").is_given() && !at.key("grpc").is_given() {
                    at.report(
                        "`abort` has neither `status` nor `grpc`",
                        "write `{ status: 503 }` or `{ grpc: unavailable }`",
                    );
                }
                None
            }
        }
    }
}

impl SlowBodySpec {
    fn check(&self, at: &Cursor<'_>) -> Option<Sourced<u64>> {
        at.missing("bytesPerSecond", "write the speed of the body, like `bytesPerSecond: 10KiB`");
        let rate = self.bytes_per_second?;
        if rate.0 == 0 {
            let hint = "write at least 1; to hold the response back, write a `delay`";
            at.key("bytesPerSecond").report("0 bytes a second would never end", hint);
        }
        Some(at.key("bytesPerSecond").set(rate.0))
    }
}

/// A name becomes a metric label and part of header values: 1 to 63 letters, digits, `-`, `_` or `.`.
fn check_name(name: &str, at: &Cursor<'_>) {
    let is_good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if !(1..=63).contains(&name.len()) || !name.bytes().all(is_good) {
        at.report(format!("`{name}` is not a valid name"), "write 1 to 63 letters, digits, `-`, `_` or `.`");
    }
}

#[cfg(test)]
mod tests;
