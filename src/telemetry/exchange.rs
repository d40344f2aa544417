//! All that is known of one exchange, from the head of the request to the last byte of the answer.
//!
//! It rides along with the request, then in the body of the answer, and records itself when it is dropped: hyper drops
//! a handler's future when the caller leaves, and an answer ends with its body, not with its head. Whatever happens,
//! each exchange is counted exactly once.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use http::{HeaderValue, Method, StatusCode};
use tokio::time::Instant;

use super::hop::HopId;
use super::log_line;
use super::outcome::{Outcome, Protocol};
use super::record::{ConnectionUse, Notes, Record, RefusalRecord, RequestLine};
use super::shard::Shard;

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
    pub(super) began: Instant,
    ended: Option<Instant>,
    hop: HopId,
    end: End,
    pub(super) record: Record,
}

impl Exchange {
    /// Begins at `now`, the moment when the request's head was complete. `hop` may still be one of
    /// [`super::HopLabels::unrouted`].
    pub fn begin(shard: Rc<Shard>, now: Instant, hop: HopId, protocol: Protocol, request: RequestLine) -> Self {
        let record = Record::new(protocol, request);
        Self { shard, began: now, ended: None, hop, end: End::Open, record }
    }

    /// The hop that it counts for.
    pub fn hop(&self) -> HopId {
        self.hop
    }

    /// The method of the request.
    pub fn method(&self) -> &Method {
        &self.record.request.method
    }

    /// The path that was asked for.
    pub fn path(&self) -> &str {
        self.record.request.uri.path()
    }

    /// Whom the request asks: the authority of its target, else its `Host`; empty where it names nobody.
    pub fn authority(&self) -> &[u8] {
        let request = &self.record.request;
        let target = request.uri.authority().map(|authority| authority.as_str().as_bytes());
        target.or(request.host.as_ref().map(HeaderValue::as_bytes)).unwrap_or_default()
    }

    /// Names the hop once the route is known.
    pub fn set_hop(&mut self, hop: HopId) {
        self.hop = hop;
    }

    /// Corrects the protocol: an upgrade that succeeded is no longer plain HTTP.
    pub fn set_protocol(&mut self, protocol: Protocol) {
        self.record.protocol = protocol;
    }

    /// Adds a wait for a place of the destination. Call it only where there was a wait.
    pub fn queued(&mut self, waited: Duration) {
        *self.record.queued.get_or_insert_default() += waited;
    }

    /// Begins try `number` (from 1) of at most `of`.
    pub fn attempt(&mut self, number: u16, of: u16) {
        self.record.attempt = number;
        self.record.attempts = of;
    }

    /// The number of the present try and how many there may be; zeroes before the first one.
    pub fn tries(&self) -> (u16, u16) {
        (self.record.attempt, self.record.attempts)
    }

    /// Notes where the present try goes and over which connection.
    pub fn via(&mut self, endpoint: SocketAddr, connection: ConnectionUse) {
        self.record.endpoint = Some(endpoint);
        self.record.connection = Some(connection);
    }

    /// Notes where the present try goes while there is no connection yet.
    pub fn towards(&mut self, endpoint: SocketAddr) {
        self.record.endpoint = Some(endpoint);
        self.record.connection = None;
    }

    /// Adds the time that opening a connection took, also when it failed.
    pub fn connected(&mut self, took: Duration) {
        *self.record.connect.get_or_insert_default() += took;
    }

    /// Adds the time from handing a request to a connection to the head of its answer. Without it there is no overhead
    /// to record.
    pub fn upstream_waited(&mut self, waited: Duration) {
        *self.record.upstream.get_or_insert_default() += waited;
    }

    /// Adds the time from handing a request to a connection to the end of a try that had no answer.
    pub fn waited_in_vain(&mut self, waited: Duration) {
        self.note().in_vain += waited;
    }

    /// The head of the answer is ready for the caller: the upstream's or our own. A later one replaces it.
    pub fn head(&mut self, now: Instant, status: StatusCode) {
        self.record.status = Some(status);
        self.record.first_byte = Some(now.saturating_duration_since(self.began));
    }

    /// The gRPC status and the undecoded `grpc-message`, from trailers or from a head. It completes the exchange.
    pub fn grpc(&mut self, status: u32, message: Option<HeaderValue>) {
        self.record.grpc_status = Some(status);
        self.record.grpc_message = message;
    }

    /// So many bytes of the request's and of the answer's body were passed on.
    pub fn passed(&mut self, bytes_in: u64, bytes_out: u64) {
        (self.record.bytes_in, self.record.bytes_out) = (bytes_in, bytes_out);
    }

    /// The HTTP status that the caller gets, once it is known.
    pub fn status(&self) -> Option<StatusCode> {
        self.record.status
    }

    /// The gRPC status so far.
    pub fn grpc_code(&self) -> Option<u32> {
        self.record.grpc_status
    }

    /// We answer, or cut, in the upstream's place. The first refusal stays: what follows is its consequence.
    pub fn refuse(&mut self, record: RefusalRecord) {
        self.record.refusal.get_or_insert_with(|| Box::new(record));
    }

    /// The refusal, where there is one.
    pub fn refusal(&self) -> Option<&RefusalRecord> {
        self.record.refusal.as_deref()
    }

    /// What the rules said, to be added to.
    pub fn note(&mut self) -> &mut Notes {
        self.record.notes.get_or_insert_default()
    }

    /// What the rules said.
    pub fn notes(&self) -> Option<&Notes> {
        self.record.notes.as_deref()
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
        if let Some(refusal) = &self.record.refusal {
            return refusal.outcome;
        }
        let Some(status) = self.record.status else {
            return Outcome::CallerGone;
        };
        match self.end {
            End::UpstreamCut => return Outcome::UpstreamCut,
            End::Open if self.record.grpc_status.is_none() => return Outcome::CallerGone,
            End::Open | End::Complete => {}
        }
        match (self.record.protocol, self.record.grpc_status) {
            (Protocol::Grpc, Some(0)) => Outcome::Ok,
            (Protocol::Grpc, _) => Outcome::GrpcError,
            _ if status.is_server_error() => Outcome::ServerError,
            _ if status.is_client_error() => Outcome::ClientError,
            _ => Outcome::Ok,
        }
    }

    fn observe(&self, outcome: Outcome, total: Duration) {
        self.shard.with_series((self.hop, self.record.protocol, outcome), |series| {
            series.count();
            series.total.observe(total);
            if let Some(first_byte) = self.record.first_byte {
                series.first_byte.observe(first_byte);
            }
            if let Some(connect) = self.record.connect {
                series.connect.observe(connect);
            }
            if let Some(queued) = self.record.queued {
                series.queue.observe(queued);
            }
            if let Some(overhead) = self.record.overhead() {
                series.overhead.observe(overhead);
            }
        });
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
        let Some(format) = telemetry.access_log.wants(outcome, self.record.grpc_status) else {
            return;
        };
        let labels = self.shard.labels(self.hop);
        let entry =
            log_line::Entry { record: &self.record, outcome, total, began: telemetry.wall(self.began), hop: &labels };
        self.shard.with_line(|text| {
            log_line::write(text, &entry, format);
            telemetry.access_log.put(text);
        });
    }
}
