//! What is known of one exchange, as plain values: `exchange` fills it in, `log_line` writes it down.

use std::net::SocketAddr;
use std::time::Duration;

use http::{HeaderValue, Method, StatusCode, Uri};

use super::outcome::{Outcome, Protocol};

/// What a request says about itself; cheap clones of parts of its head.
#[derive(Clone, Debug)]
pub struct RequestLine {
    /// The method.
    pub method: Method,
    /// The target in whatever form it came.
    pub uri: Uri,
    /// The `Host` field, where the target names no host.
    pub host: Option<HeaderValue>,
    /// The caller's address.
    pub caller: Option<SocketAddr>,
    /// The `traceparent` field, unread: the trace id is taken out of it only when a line is written.
    pub traceparent: Option<HeaderValue>,
}

/// The upstream connection that carried the last try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionUse {
    /// Opened for this try.
    New,
    /// Taken from the pool.
    Reused {
        /// How long ago it was opened.
        age: Duration,
    },
}

/// Who ended the exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedBy {
    /// The caller.
    Caller,
    /// This process.
    Hopguard,
    /// The upstream.
    Upstream,
}

impl ClosedBy {
    /// The value in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            ClosedBy::Caller => "caller",
            ClosedBy::Hopguard => "hopguard",
            ClosedBy::Upstream => "upstream",
        }
    }
}

/// Why we answered, or cut, in the upstream's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusalRecord {
    /// Which refusal; its name is the outcome's name.
    pub outcome: Outcome,
    /// The rule, as a path of the policy: `timeouts.request`.
    pub rule: &'static str,
    /// The rule's value as the policy writes it: `800ms`. Empty when there is none.
    pub value: String,
    /// Where the value comes from: `policy.yaml:12` or `built in`. Empty when unknown.
    pub origin: String,
    /// One sentence for the reader of the log.
    pub detail: String,
    /// Who ended it.
    pub closed_by: ClosedBy,
}

/// What the rules had to say about an exchange; most have nothing to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// Why there was no further try after one that failed.
    pub retry: Option<&'static str>,
    /// Where the failure happened, if that was further down than the destination.
    pub failed_at: Option<Box<str>>,
    /// What limited the call's time, where that was not the policy: `caller` or `inbound`.
    pub deadline_from: Option<&'static str>,
    /// How long the call had when it came, if the policy did not say so.
    pub deadline: Option<Duration>,
    /// The fault of the policy that was injected.
    pub fault: Option<Box<str>>,
    /// Rules in `warn` that would have acted.
    pub would: Vec<&'static str>,
    /// How long it waited between tries.
    pub paused: Duration,
    /// How long tries waited for the upstream and had no answer.
    pub in_vain: Duration,
}

/// Everything that a line of the access log says of the exchange itself.
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
    pub(super) queued: Option<Duration>,
    pub(super) connect: Option<Duration>,
    pub(super) upstream: Option<Duration>,
    pub(super) first_byte: Option<Duration>,
    pub(super) attempt: u16,
    pub(super) attempts: u16,
    pub(super) notes: Option<Box<Notes>>,
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
            queued: None,
            connect: None,
            upstream: None,
            first_byte: None,
            attempt: 0,
            attempts: 0,
            notes: None,
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    /// What we took of the time to the first byte: all of it but the waits for a place, a connection, the upstream, be
    /// it in vain, and the next try.
    pub(super) fn overhead(&self) -> Option<Duration> {
        let tries = self.notes.as_ref().map_or(Duration::ZERO, |notes| notes.paused + notes.in_vain);
        let waits = self.upstream? + self.connect.unwrap_or_default() + self.queued.unwrap_or_default() + tries;
        Some(self.first_byte?.saturating_sub(waits))
    }
}
