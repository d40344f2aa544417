//! The values of one exchange, as plain data: `exchange` sets them, `log_line` writes them.

use std::net::SocketAddr;
use std::time::Duration;

use http::{HeaderValue, Method, StatusCode, Uri};

use super::outcome::{Outcome, Protocol};

/// Parts of the request head, cheaply cloned.
#[derive(Clone, Debug)]
pub struct RequestLine {
    /// The method.
    pub method: Method,
    /// The request target, in any of its forms (RFC 9112, 3.2).
    pub uri: Uri,
    /// The `Host` field, if the target names no host.
    pub host: Option<HeaderValue>,
    /// Address of the caller.
    pub caller: Option<SocketAddr>,
    /// The `traceparent` field, not parsed: the trace id is read from it only when a log line is written.
    pub traceparent: Option<HeaderValue>,
}

/// The upstream connection of the last attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionUse {
    /// Opened for this attempt.
    New,
    /// Taken from the pool.
    Reused {
        /// Time since the connection was opened.
        age: Duration,
    },
}

/// The side that ended the exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedBy {
    /// The caller.
    Caller,
    /// Hopguard itself.
    Hopguard,
    /// The upstream.
    Upstream,
}

impl ClosedBy {
    /// The value in log lines.
    pub const fn as_str(self) -> &'static str {
        match self {
            ClosedBy::Caller => "caller",
            ClosedBy::Hopguard => "hopguard",
            ClosedBy::Upstream => "upstream",
        }
    }
}

/// Why hopguard sent a local reply or cut the exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusalRecord {
    /// The outcome.
    pub outcome: Outcome,
    /// The rule, as a path of the policy: `timeouts.request`.
    pub rule: &'static str,
    /// Value of the rule as the policy writes it: `800ms`. Empty for a rule without value.
    pub value: String,
    /// Origin of the value: `policy.yaml:12` or `built in`. Empty if unknown.
    pub origin: String,
    /// One sentence of explanation.
    pub detail: String,
    /// The side that ended the exchange.
    pub closed_by: ClosedBy,
}

/// What rules add to the record of an exchange. Boxed and made on first use, because most exchanges have none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Annotations {
    /// Why a failed attempt was not retried.
    pub retry_withheld: Option<&'static str>,
    /// The destination at which the failure happened, if that is further down than this exchange's own.
    pub failed_at: Option<Box<str>>,
    /// Source of the deadline, if not the policy: `caller` or `inbound`.
    pub deadline_from: Option<&'static str>,
    /// Time to the deadline when the call arrived, if the deadline is not the policy's.
    pub deadline: Option<Duration>,
    /// Name of the injected fault.
    pub fault: Option<Box<str>>,
    /// Rules in dry run that would have acted.
    pub dry_run: Vec<&'static str>,
    /// Time between attempts: backoff and pushback.
    pub retry_wait: Duration,
    /// Time of attempts that ended without a response head, from sending the request on.
    pub failed_upstream: Duration,
}

/// All values of an exchange that its log line shows.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) protocol: Protocol,
    pub(super) request: RequestLine,
    pub(super) status: Option<StatusCode>,
    pub(super) grpc_status: Option<u32>,
    pub(super) grpc_message: Option<HeaderValue>,
    pub(super) refusal: Option<Box<RefusalRecord>>,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) connection: Option<ConnectionUse>,
    pub(super) queue: Option<Duration>,
    pub(super) connect: Option<Duration>,
    pub(super) upstream: Option<Duration>,
    pub(super) first_byte: Option<Duration>,
    pub(super) attempt: u16,
    pub(super) attempts: u16,
    pub(super) annotations: Option<Box<Annotations>>,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
}

impl Record {
    pub(super) fn new(protocol: Protocol, request: RequestLine) -> Self {
        Self {
            protocol,
            request,
            status: None,
            grpc_status: None,
            grpc_message: None,
            refusal: None,
            endpoint: None,
            connection: None,
            queue: None,
            connect: None,
            upstream: None,
            first_byte: None,
            attempt: 0,
            attempts: 0,
            annotations: None,
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    /// The time that hopguard itself took: time to first byte without queue, connect, upstream (also of attempts
    /// without a response) and the waits between attempts. `None` without a response from the upstream.
    pub(super) fn overhead(&self) -> Option<Duration> {
        let failed = self
            .annotations
            .as_ref()
            .map_or(Duration::ZERO, |annotations| annotations.retry_wait + annotations.failed_upstream);
        let waits = self.upstream? + self.connect.unwrap_or_default() + self.queue.unwrap_or_default() + failed;
        Some(self.first_byte?.saturating_sub(waits))
    }
}
