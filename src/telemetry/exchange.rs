//! All that is known of one exchange, from the head of the request to the last byte of the answer.
//!
//! It rides along with the request, then in the body of the answer, and records itself when it is dropped: hyper drops
//! a handler's future when the caller leaves, and an answer ends with its body, not with its head. Whatever happens,
//! each exchange is counted exactly once.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use http::{HeaderValue, Method, StatusCode, Uri};
use tokio::time::Instant;

use super::hop::HopId;
use super::line;
use super::outcome::{Outcome, Protocol};
use super::shard::Shard;

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
pub enum Connection {
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
pub enum Side {
    /// The caller.
    Caller,
    /// This process.
    Hopguard,
    /// The upstream.
    Upstream,
}

impl Side {
    /// The value in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Side::Caller => "caller",
            Side::Hopguard => "hopguard",
            Side::Upstream => "upstream",
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
    pub closed_by: Side,
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Open,
    Complete,
    UpstreamCut,
}

/// The record. Times are passed in, except the end, which is the moment of the drop.
#[derive(Debug)]
pub struct Exchange {
    shard: Rc<Shard>,
    began: Instant,
    ended: Option<Instant>,
    hop: HopId,
    protocol: Protocol,
    end: End,
    pub(super) request: RequestLine,
    pub(super) status: Option<StatusCode>,
    pub(super) grpc_status: Option<u32>,
    pub(super) grpc_message: Option<HeaderValue>,
    pub(super) refusal: Option<Box<RefusalRecord>>,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) connection: Option<Connection>,
    pub(super) queued: Option<Duration>,
    pub(super) connect: Option<Duration>,
    pub(super) upstream: Option<Duration>,
    pub(super) first_byte: Option<Duration>,
    pub(super) attempt: u16,
    pub(super) attempts: u16,
    expected: Option<u64>,
    notes: Option<Box<Notes>>,
    /// Body bytes of the request that were passed on.
    pub bytes_in: u64,
    /// Body bytes of the answer that were passed on.
    pub bytes_out: u64,
}

impl Exchange {
    /// Begins at `now`, the moment when the request's head was complete. `hop` may still be one of
    /// [`super::HopLabels::unrouted`].
    pub fn begin(shard: Rc<Shard>, now: Instant, hop: HopId, protocol: Protocol, request: RequestLine) -> Self {
        Self {
            shard,
            began: now,
            ended: None,
            hop,
            protocol,
            end: End::Open,
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
            expected: None,
            notes: None,
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    /// When the request's head was complete.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// The hop that it counts for.
    pub fn hop(&self) -> HopId {
        self.hop
    }

    /// What the caller spoke.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Names the hop once the route is known.
    pub fn set_hop(&mut self, hop: HopId) {
        self.hop = hop;
    }

    /// Corrects the protocol: an upgrade that succeeded is no longer plain HTTP.
    pub fn set_protocol(&mut self, protocol: Protocol) {
        self.protocol = protocol;
    }

    /// Adds a wait for a place of the destination. Call it only where there was a wait.
    pub fn queued(&mut self, waited: Duration) {
        *self.queued.get_or_insert_default() += waited;
    }

    /// Begins try `number` (from 1) of at most `of`.
    pub fn attempt(&mut self, number: u16, of: u16) {
        self.attempt = number;
        self.attempts = of;
    }

    /// The number of the present try and how many there may be; zeroes before the first one.
    pub fn tries(&self) -> (u16, u16) {
        (self.attempt, self.attempts)
    }

    /// Notes where the present try goes and over which connection.
    pub fn via(&mut self, endpoint: SocketAddr, connection: Connection) {
        self.endpoint = Some(endpoint);
        self.connection = Some(connection);
    }

    /// Notes where the present try goes while there is no connection yet.
    pub fn towards(&mut self, endpoint: SocketAddr) {
        self.endpoint = Some(endpoint);
        self.connection = None;
    }

    /// Adds the time that opening a connection took, also when it failed.
    pub fn connected(&mut self, took: Duration) {
        *self.connect.get_or_insert_default() += took;
    }

    /// Adds the time from handing a request to a connection to the head of its answer. Without it there is no overhead
    /// to record.
    pub fn upstream_waited(&mut self, waited: Duration) {
        *self.upstream.get_or_insert_default() += waited;
    }

    /// The head of the answer is ready for the caller: the upstream's or our own. A later one replaces it.
    pub fn head(&mut self, now: Instant, status: StatusCode) {
        self.status = Some(status);
        self.first_byte = Some(now.saturating_duration_since(self.began));
    }

    /// The answer's body has this many bytes. hyper drops a body of known length without reading its end, so reaching
    /// the length completes the exchange, also at 0.
    pub fn expect_body(&mut self, bytes: u64) {
        self.expected = Some(bytes);
    }

    /// The gRPC status and the undecoded `grpc-message`, from trailers or from a head. It completes the exchange.
    pub fn grpc(&mut self, status: u32, message: Option<HeaderValue>) {
        self.grpc_status = Some(status);
        self.grpc_message = message;
    }

    /// The HTTP status that the caller gets, once it is known.
    pub fn status(&self) -> Option<StatusCode> {
        self.status
    }

    /// The gRPC status so far.
    pub fn grpc_code(&self) -> Option<u32> {
        self.grpc_status
    }

    /// We answer, or cut, in the upstream's place. The first refusal stays: what follows is its consequence.
    pub fn refuse(&mut self, record: RefusalRecord) {
        self.refusal.get_or_insert_with(|| Box::new(record));
    }

    /// The refusal, where there is one.
    pub fn refusal(&self) -> Option<&RefusalRecord> {
        self.refusal.as_deref()
    }

    /// What the rules said, to be added to.
    pub fn note(&mut self) -> &mut Notes {
        self.notes.get_or_insert_default()
    }

    /// What the rules said.
    pub fn notes(&self) -> Option<&Notes> {
        self.notes.as_deref()
    }

    /// The end of the answer was reached: call it when the body has ended, or at once when there is none.
    pub fn complete(&mut self) {
        if self.end == End::Open {
            self.end = End::Complete;
        }
    }

    /// The same, with the moment at which it happened, which saves a look at the clock.
    pub fn complete_at(&mut self, now: Instant) {
        self.ended = Some(now);
        self.complete();
    }

    /// The upstream's body broke off; nothing of it is missing only because the caller left.
    pub fn upstream_cut(&mut self) {
        if self.end == End::Open {
            self.end = End::UpstreamCut;
        }
    }

    /// The outcome, were the exchange to end now.
    pub fn outcome(&self) -> Outcome {
        if let Some(refusal) = &self.refusal {
            return refusal.outcome;
        }
        let Some(status) = self.status else {
            return Outcome::CallerGone;
        };
        let at_length = self.expected.is_some_and(|bytes| self.bytes_out >= bytes);
        match self.end {
            End::UpstreamCut => return Outcome::UpstreamCut,
            End::Open if !at_length && self.grpc_status.is_none() => return Outcome::CallerGone,
            End::Open | End::Complete => {}
        }
        match (self.protocol, self.grpc_status) {
            (Protocol::Grpc, Some(0)) => Outcome::Ok,
            (Protocol::Grpc, _) => Outcome::GrpcError,
            _ if status.is_server_error() => Outcome::ServerError,
            _ if status.is_client_error() => Outcome::ClientError,
            _ => Outcome::Ok,
        }
    }

    fn observe(&self, outcome: Outcome, total: Duration) {
        self.shard.with_series((self.hop, self.protocol, outcome), |series| {
            series.count();
            series.total.observe(total);
            if let Some(first_byte) = self.first_byte {
                series.first_byte.observe(first_byte);
            }
            if let Some(connect) = self.connect {
                series.connect.observe(connect);
            }
            if let Some(queued) = self.queued {
                series.queue.observe(queued);
            }
            if let Some(overhead) = self.overhead() {
                series.overhead.observe(overhead);
            }
        });
    }

    /// What we took of the time to the first byte: all of it but the waits for a place, a connection, the upstream and
    /// the next try.
    pub fn overhead(&self) -> Option<Duration> {
        let paused = self.notes.as_ref().map_or(Duration::ZERO, |notes| notes.paused);
        let waits = self.upstream? + self.connect.unwrap_or_default() + self.queued.unwrap_or_default() + paused;
        Some(self.first_byte?.saturating_sub(waits))
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        // Where nobody has said when it ended, the end is that the owner lets go: now.
        let ended = self.ended.unwrap_or_else(Instant::now);
        let total = ended.saturating_duration_since(self.began);
        let outcome = self.outcome();
        self.observe(outcome, total);
        let telemetry = self.shard.telemetry();
        let Some(format) = telemetry.access_log.wants(outcome, self.grpc_status) else {
            return;
        };
        let labels = self.shard.labels(self.hop);
        let entry = line::Entry { exchange: self, outcome, total, began: telemetry.wall(self.began), hop: &labels };
        self.shard.with_line(|text| {
            line::write(text, &entry, format);
            telemetry.access_log.put(text);
        });
    }
}
