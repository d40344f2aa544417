//! The record of one exchange, from the request head to the last byte of the response.
//!
//! The record moves with the request, then with the response body, and reports itself on drop: hyper drops the
//! handler's future when the caller disconnects, and a response ends with its body, not with its head. So each exchange
//! is counted exactly once, however it ends.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use http::{HeaderValue, Method, StatusCode};
use tokio::time::Instant;

use super::hop::HopId;
use super::log_line;
use super::outcome::{Outcome, Protocol};
use super::record::{Annotations, ConnectionUse, Record, RefusalRecord, RequestLine};
use super::shard::Shard;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Open,
    Complete,
    UpstreamCut,
}

/// The record of one exchange. Times are passed in, except the end, which is the moment of the drop unless
/// [`Exchange::complete_at`] gave it.
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
    /// Begins at `now`, the moment at which the request head was complete. `hop` may be an unrouted one
    /// ([`super::HopLabels::unrouted`]) until the route is known.
    pub fn begin(shard: Rc<Shard>, now: Instant, hop: HopId, protocol: Protocol, request: RequestLine) -> Self {
        let record = Record::new(protocol, request);
        Self { shard, began: now, ended: None, hop, end: End::Open, record }
    }

    /// The hop that the exchange is counted for.
    pub fn hop(&self) -> HopId {
        self.hop
    }

    /// The method of the request.
    pub fn method(&self) -> &Method {
        &self.record.request.method
    }

    /// The path of the request target.
    pub fn path(&self) -> &str {
        self.record.request.uri.path()
    }

    /// The authority of the request target, else the `Host` field; empty if the request has neither.
    pub fn authority(&self) -> &[u8] {
        let request = &self.record.request;
        let target = request.uri.authority().map(|authority| authority.as_str().as_bytes());
        target.or(request.host.as_ref().map(HeaderValue::as_bytes)).unwrap_or_default()
    }

    /// Sets the hop once the route is known.
    pub fn set_hop(&mut self, hop: HopId) {
        self.hop = hop;
    }

    /// Sets the protocol anew: after an upgrade the exchange is no longer plain HTTP.
    pub fn set_protocol(&mut self, protocol: Protocol) {
        self.record.protocol = protocol;
    }

    /// Adds time in the queue of the concurrency limit. Call it only for an exchange that was queued.
    pub fn add_queue_time(&mut self, time: Duration) {
        *self.record.queue.get_or_insert_default() += time;
    }

    /// Begins attempt `number` (from 1) of at most `limit`.
    pub fn begin_attempt(&mut self, number: u16, limit: u16) {
        self.record.attempt = number;
        self.record.attempts = limit;
    }

    /// The number of the current attempt and the most attempts allowed; zeros before the first attempt.
    pub fn attempts(&self) -> (u16, u16) {
        (self.record.attempt, self.record.attempts)
    }

    /// Sets endpoint and connection of the current attempt.
    pub fn set_connection(&mut self, endpoint: SocketAddr, connection: ConnectionUse) {
        self.record.endpoint = Some(endpoint);
        self.record.connection = Some(connection);
    }

    /// Sets the endpoint of the current attempt while the attempt has no connection yet.
    pub fn set_endpoint(&mut self, endpoint: SocketAddr) {
        self.record.endpoint = Some(endpoint);
        self.record.connection = None;
    }

    /// Adds the time to open a connection, also of one that failed to open.
    pub fn add_connect_time(&mut self, time: Duration) {
        *self.record.connect.get_or_insert_default() += time;
    }

    /// Adds the time of an attempt from sending the request to the response head. The overhead is recorded only for
    /// exchanges with such a time.
    pub fn add_upstream_time(&mut self, time: Duration) {
        *self.record.upstream.get_or_insert_default() += time;
    }

    /// Adds the time of an attempt from sending the request to the attempt's end without a response head.
    pub fn add_failed_upstream_time(&mut self, time: Duration) {
        self.annotations_mut().failed_upstream += time;
    }

    /// Sets the status of the response head for the caller (the upstream's or a local reply) and the time to first
    /// byte. A later call replaces both.
    pub fn set_response_head(&mut self, now: Instant, status: StatusCode) {
        self.record.status = Some(status);
        self.record.first_byte = Some(now.saturating_duration_since(self.began));
    }

    /// Sets the gRPC status and the undecoded `grpc-message`, from trailers or a head. The exchange counts as complete
    /// from then on.
    pub fn set_grpc_status(&mut self, status: u32, message: Option<HeaderValue>) {
        self.record.grpc_status = Some(status);
        self.record.grpc_message = message;
    }

    /// Sets the bytes of the request body and of the response body that were passed on.
    pub fn set_body_bytes(&mut self, bytes_in: u64, bytes_out: u64) {
        (self.record.bytes_in, self.record.bytes_out) = (bytes_in, bytes_out);
    }

    /// The HTTP status for the caller; `None` before the response head.
    pub fn status(&self) -> Option<StatusCode> {
        self.record.status
    }

    /// The gRPC status; `None` before it is known.
    pub fn grpc_status(&self) -> Option<u32> {
        self.record.grpc_status
    }

    /// Records a local reply, or a cut by hopguard. Later ones are ignored: they follow from the first.
    pub fn refuse(&mut self, record: RefusalRecord) {
        self.record.refusal.get_or_insert_with(|| Box::new(record));
    }

    /// The local reply or cut, if any.
    pub fn refusal(&self) -> Option<&RefusalRecord> {
        self.record.refusal.as_deref()
    }

    /// The annotations, for a rule to add to.
    pub fn annotations_mut(&mut self) -> &mut Annotations {
        self.record.annotations.get_or_insert_default()
    }

    /// The annotations, if any rule added one.
    pub fn annotations(&self) -> Option<&Annotations> {
        self.record.annotations.as_deref()
    }

    /// The response is complete: call it at the end of the body, or at once for a response without a body.
    pub fn complete(&mut self) {
        if self.end == End::Open {
            self.end = End::Complete;
        }
    }

    /// As [`Exchange::complete`], with the moment of the end, which saves a reading of the clock.
    pub fn complete_at(&mut self, now: Instant) {
        self.ended = Some(now);
        self.complete();
    }

    /// The upstream's body broke off, and not because the caller disconnected.
    pub fn upstream_cut(&mut self) {
        if self.end == End::Open {
            self.end = End::UpstreamCut;
        }
    }

    /// The outcome if the exchange ended now.
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
            // A status beyond 599 is read as a server error (RFC 9110, 15).
            _ if status.as_u16() >= 500 => Outcome::ServerError,
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
            if let Some(queue) = self.record.queue {
                series.queue.observe(queue);
            }
            if let Some(overhead) = self.record.overhead() {
                series.overhead.observe(overhead);
            }
        });
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        // Without a time from `complete_at`, the exchange ends at its drop.
        let ended = self.ended.unwrap_or_else(Instant::now);
        let total = ended.saturating_duration_since(self.began);
        let outcome = self.outcome();
        self.observe(outcome, total);
        let telemetry = self.shard.telemetry();
        let Some(format) = telemetry.access_log.line_format(outcome, self.record.grpc_status) else {
            return;
        };
        let labels = self.shard.labels(self.hop);
        let entry = log_line::Entry {
            record: &self.record,
            outcome,
            total,
            began: telemetry.wall_time(self.began),
            hop: &labels,
        };
        self.shard.with_line(|text| {
            log_line::write(text, &entry, format);
            telemetry.access_log.enqueue(text);
        });
    }
}
