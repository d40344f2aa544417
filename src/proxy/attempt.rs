//! One attempt of a request: where it goes, what it sends, and what it holds until its response is complete.
//!
//! State only: [`super::send`] sends it, [`super::breaker_and_ejection`] reports its result.

use std::rc::Rc;
use std::time::Duration;

use http::Request;
use tokio::time::Instant;

use crate::net::body::RequestBody;
use crate::proxy::permits::{HeldPermit, Permits};
use crate::proxy::timeout_state::WaitingFor;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::pool::{Lease, Pool};

/// Where an attempt goes: a destination of the policy, and this worker's pool for it.
#[derive(Clone)]
pub(super) struct Upstream {
    /// The destination's position in the policy.
    pub(super) destination: usize,
    /// Its pool, or that of the dynamic host that the caller named.
    pub(super) pool: Rc<Pool>,
}

/// One attempt: where it goes, what it sends, and what it holds.
pub(super) struct Attempt {
    number: u16,
    upstream: Option<Upstream>,
    request: Option<Request<RequestBody>>,
    /// An endpoint that a connection is to be opened to.
    picked: Option<Rc<Endpoint>>,
    endpoint: Option<Rc<Endpoint>>,
    permits: Permits,
    lease: Option<Lease>,
    fault: Option<Box<PendingFault>>,
    began: Instant,
    is_reused: bool,
    is_unsent: bool,
    connection_ended: bool,
    is_same_event: bool,
    evidence: Evidence,
}

/// What a failure of the attempt says about its upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Evidence {
    /// What its kind says.
    Ordinary,
    /// No endpoint accepted a connection.
    NoConnection,
    /// Other requests were answered while this one ran into a time limit.
    Overtaken,
    /// Nothing: the upstream accepted or answered others meanwhile.
    Spared,
}

impl Attempt {
    /// No attempt yet.
    pub(super) fn before_routing(now: Instant) -> Self {
        Self {
            number: 0,
            upstream: None,
            request: None,
            picked: None,
            endpoint: None,
            permits: Permits::default(),
            lease: None,
            fault: None,
            began: now,
            is_reused: false,
            is_unsent: false,
            connection_ended: false,
            is_same_event: false,
            evidence: Evidence::Ordinary,
        }
    }

    /// Begins the attempt with this number (from 1) at an upstream. Only the request is kept of the attempt before.
    pub(super) fn begin(&mut self, number: u16, upstream: Upstream) {
        (self.number, self.upstream) = (number, Some(upstream));
        self.permits = Permits::default();
        (self.is_reused, self.is_unsent, self.connection_ended) = (false, false, false);
        (self.fault, self.picked, self.is_same_event) = (None, None, false);
        self.evidence = Evidence::Ordinary;
    }

    /// Sets the permit that the circuit breaker has given.
    pub(super) fn set_breaker_permit(&mut self, permit: HeldPermit) {
        self.permits.destination = permit;
    }

    /// Counted from 1; 0 before the first.
    pub(super) fn number(&self) -> u16 {
        self.number
    }

    /// Where it goes; `None` before routing.
    pub(super) fn upstream(&self) -> Option<&Upstream> {
        self.upstream.as_ref()
    }

    /// The request as it goes out, until a connection has it.
    pub(super) fn request(&self) -> Option<&Request<RequestBody>> {
        self.request.as_ref()
    }

    /// The same, to be changed.
    pub(super) fn request_mut(&mut self) -> Option<&mut Request<RequestBody>> {
        self.request.as_mut()
    }

    /// Takes the request for a connection.
    pub(super) fn take_request(&mut self) -> Option<Request<RequestBody>> {
        self.request.take()
    }

    /// Sets the request of the next attempt.
    pub(super) fn set_request(&mut self, request: Request<RequestBody>) {
        self.request = Some(request);
    }

    /// The endpoint that the attempt goes to.
    pub(super) fn endpoint(&self) -> Option<&Rc<Endpoint>> {
        self.endpoint.as_ref()
    }

    /// Takes the endpoint away; the next attempt goes elsewhere.
    pub(super) fn take_endpoint(&mut self) -> Option<Rc<Endpoint>> {
        self.endpoint.take()
    }

    /// Switches to another endpoint without a permit of it: the permit stays that of the endpoint before.
    pub(super) fn switch_endpoint(&mut self, endpoint: &Rc<Endpoint>) {
        self.endpoint = Some(Rc::clone(endpoint));
    }

    /// Sets the endpoint, with the permit that it has given.
    pub(super) fn set_endpoint(&mut self, endpoint: Option<Rc<Endpoint>>, permit: HeldPermit) {
        (self.endpoint, self.permits.endpoint) = (endpoint, permit);
    }

    /// Keeps a picked endpoint until a connection to it is opened.
    pub(super) fn keep_picked(&mut self, endpoint: Option<Rc<Endpoint>>) {
        self.picked = endpoint;
    }

    /// Takes the picked endpoint.
    pub(super) fn take_picked(&mut self) -> Option<Rc<Endpoint>> {
        self.picked.take()
    }

    /// Records that no endpoint accepted a connection for the attempt.
    pub(super) fn set_found_no_connection(&mut self) {
        if self.evidence == Evidence::Ordinary {
            self.evidence = Evidence::NoConnection;
        }
    }

    /// Whether no endpoint accepted a connection for the attempt.
    pub(super) fn found_no_connection(&self) -> bool {
        self.evidence == Evidence::NoConnection
    }

    /// Records that the attempt's failure says nothing about its upstream, which accepted or answered others meanwhile.
    pub(super) fn spare_upstream(&mut self) {
        self.evidence = Evidence::Spared;
    }

    /// Whether the attempt's failure says nothing about its upstream.
    pub(super) fn spares_upstream(&self) -> bool {
        self.evidence == Evidence::Spared
    }

    /// Records that the endpoint has answered other requests while the attempt ran into a time limit.
    pub(super) fn set_overtaken(&mut self) {
        self.evidence = Evidence::Overtaken;
    }

    /// Whether the attempt ran into a time limit while its endpoint answered other requests.
    pub(super) fn was_overtaken(&self) -> bool {
        self.evidence == Evidence::Overtaken
    }

    /// The permits whose results are still to be reported.
    pub(super) fn permits_mut(&mut self) -> &mut Permits {
        &mut self.permits
    }

    /// Takes the permits, to report their results.
    pub(super) fn take_permits(&mut self) -> Permits {
        std::mem::take(&mut self.permits)
    }

    /// The upstream connection, from the moment there is one.
    pub(super) fn lease(&self) -> Option<&Lease> {
        self.lease.as_ref()
    }

    /// The same, to drive it.
    pub(super) fn lease_mut(&mut self) -> Option<&mut Lease> {
        self.lease.as_mut()
    }

    /// Keeps the connection over which the response comes.
    pub(super) fn set_lease(&mut self, lease: Lease) {
        self.lease = Some(lease);
    }

    /// Takes the connection, to give it back or to close it.
    pub(super) fn take_lease(&mut self) -> Option<Lease> {
        self.lease.take()
    }

    /// Takes what a fault does to the body of the response.
    pub(super) fn take_body_fault(&mut self) -> Option<BodyFault> {
        self.fault.take()?.body
    }

    /// How long it has taken at `now`.
    pub(super) fn took(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    /// When the request went to its connection.
    pub(super) fn sent_at(&self) -> Instant {
        self.began + self.fault.as_ref().map_or(Duration::ZERO, |fault| fault.lost)
    }

    /// What the time limits wait for before the head of the response.
    pub(super) fn waiting(&self) -> WaitingFor {
        WaitingFor::Head { attempt_began: self.began }
    }

    /// The attempt went over a connection that had been used before, and nothing but its close has ended the attempt.
    pub(super) fn is_reused(&self) -> bool {
        self.is_reused
    }

    /// The attempt ended before the upstream could have seen the request.
    pub(super) fn is_unsent(&self) -> bool {
        self.is_unsent
    }

    /// That was so because its connection came to its end.
    pub(super) fn has_connection_ended(&self) -> bool {
        self.connection_ended
    }

    /// The end of the attempt is part of an event that another attempt has reported: the connection was opened before another
    /// one of its age ended.
    pub(super) fn is_same_event(&self) -> bool {
        self.is_same_event
    }

    /// Sets [`Self::is_same_event`].
    pub(super) fn set_same_event(&mut self, is_same_event: bool) {
        self.is_same_event = is_same_event;
    }

    /// Begins to look for a connection: nothing has been sent.
    pub(super) fn begin_unsent(&mut self) {
        self.is_unsent = true;
    }

    /// The request goes to a connection, opened or checked out at `begun`. An injected delay counts as time that the upstream
    /// took.
    pub(super) fn connected(&mut self, begun: Instant, is_reused: bool) {
        self.began = self.fault.as_ref().and_then(|fault| begun.checked_sub(fault.lost)).unwrap_or(begun);
        (self.is_reused, self.is_unsent) = (is_reused, false);
    }

    /// The connection handed the request back unsent.
    pub(super) fn handed_back(&mut self, request: Request<RequestBody>) {
        (self.request, self.is_unsent) = (Some(request), true);
    }

    /// The connection broke off before the response head: whether the upstream cannot have processed the request, whether
    /// nothing but a close has ended the attempt, and whether the connection had announced its end.
    pub(super) fn broke_off(&mut self, is_unprocessed: bool, is_close: bool, is_go_away: bool) {
        self.is_unsent = is_unprocessed;
        self.is_reused &= is_close;
        self.connection_ended = is_go_away;
    }

    /// Each connection came to its end before the request could be sent.
    pub(super) fn ran_out_of_connections(&mut self) {
        self.connection_ended = true;
    }

    /// An injected fault begins: seen from above, the upstream has the request from now on.
    pub(super) fn fault_begins(&mut self, now: Instant) {
        (self.is_unsent, self.is_reused, self.began) = (false, false, now);
    }

    /// The injected fault is over and the request goes on to the upstream; `fault` is what it leaves.
    pub(super) fn fault_ends(&mut self, fault: PendingFault) {
        self.is_unsent = true;
        self.fault = Some(Box::new(fault));
    }
}

/// What a fault leaves to the attempt that goes on after it.
pub(super) struct PendingFault {
    /// How much of the attempt's time the fault has used up, as if the upstream had taken it.
    pub(super) lost: Duration,
    /// What the fault does to the body of the response.
    pub(super) body: Option<BodyFault>,
}

/// What a fault does to the body of a response.
pub(super) struct BodyFault {
    /// The fault's name.
    pub(super) name: Box<str>,
    /// After so many bytes the body breaks off.
    pub(super) cut_after: Option<u64>,
    /// Bytes per second.
    pub(super) rate: Option<u64>,
    /// The fault ends then.
    pub(super) until: Instant,
}
