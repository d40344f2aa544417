//! One worker's connections to one cluster: picks an endpoint, checks a connection out for a request and back in.
//!
//! `proxy` picks an endpoint, then checks out an open connection or, in `dial`, opens one. Invariants: a [`Lease`] counts as
//! one call in flight at its endpoint until it is dropped; an HTTP/1.1 connection that is not checked in is closed; an
//! endpoint that stays in the cluster's addresses keeps its connections and its load.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::telemetry::DestinationMetrics;
use crate::upstream::balance;
use crate::upstream::cluster::{Addresses, Cluster};
use crate::upstream::connect::{ConnectError, Connector};
use crate::upstream::endpoint::Endpoint;
use crate::upstream::http1::{AfterResponse, Http1};
use crate::upstream::http2::Http2;
use crate::upstream::lifetime::EndReason;

/// The protocol to send a request with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProtocolPreference {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, without TLS by prior knowledge, with TLS by ALPN.
    Http2,
    /// The protocol that ALPN agrees on.
    Either,
    /// A TCP stream without TLS or HTTP on it, for one call.
    Tunnel,
}

/// The connection of a lease.
pub enum Transport {
    /// Exclusive to one request.
    Http1(Box<Http1>),
    /// Shared by several requests.
    Http2(Rc<Http2>),
}

/// A connection checked out for one request. Dropping the lease closes an HTTP/1.1 connection, or ends the HTTP/2 stream.
pub struct Lease {
    /// The endpoint of the connection.
    pub endpoint: Rc<Endpoint>,
    /// Present until check-in.
    transport: Option<Transport>,
    /// True if the connection was open before this request.
    pub reused: bool,
    /// True if the connection is new and was opened in place of an idle one, for a request that must not be sent twice.
    pub replaces_idle: bool,
    /// When the request was sent; `None` before, and once an HTTP/1.1 response has begun or the exchange is complete.
    sent_at: Option<Instant>,
    /// Reads on the HTTP/2 connection, in its low bits, when the request was sent, or when the last part of its response came.
    reads: u32,
}

/// The part of a count of reads that a lease keeps: only whether the count has changed is asked.
fn low_bits(reads: u64) -> u32 {
    (reads & u64::from(u32::MAX)) as u32
}

/// How long a call has to have waited in silence for its cancellation by the caller to say as much as a timeout.
const CANCELLED_AFTER: Duration = Duration::from_secs(1);

impl Lease {
    pub(super) fn new(endpoint: Rc<Endpoint>, transport: Transport, reused: bool) -> Self {
        endpoint.load.begin();
        if let Transport::Http2(connection) = &transport {
            connection.begin_stream();
        }
        Self { endpoint, transport: Some(transport), reused, replaces_idle: false, sent_at: None, reads: 0 }
    }

    /// When the connection was opened; `None` once it has been taken out.
    pub fn opened_at(&self) -> Option<Instant> {
        match &self.transport {
            Some(Transport::Http1(connection)) => Some(connection.lifetime.opened_at),
            Some(Transport::Http2(connection)) => Some(connection.lifetime.opened_at),
            None => None,
        }
    }

    /// How old the connection is at `now`; zero once it has been taken out.
    pub fn age(&self, now: Instant) -> Duration {
        self.opened_at().map_or(Duration::ZERO, |opened| now.saturating_duration_since(opened))
    }

    /// Records that the request is sent now.
    pub fn record_sent(&mut self, now: Instant) {
        self.sent_at = Some(now);
        match &self.transport {
            Some(Transport::Http2(connection)) => self.reads = low_bits(connection.liveness().record_sent(now)),
            Some(Transport::Http1(_)) => self.endpoint.record_sent(now),
            None => {}
        }
    }

    /// Records that the response has begun, or that a part of it has come.
    pub fn record_answer(&mut self) {
        match &self.transport {
            Some(Transport::Http2(connection)) => self.reads = low_bits(connection.liveness().record_answer()),
            Some(Transport::Http1(_)) if self.sent_at.take().is_some() => self.endpoint.record_answer(),
            Some(Transport::Http1(_)) | None => {}
        }
    }

    /// Records that a time limit ended the call while it waited for the upstream: a connection on which no byte was read
    /// meanwhile gets no new call until it has shown that it lives.
    pub fn record_timeout(&self) {
        let Some(sent) = self.sent_at else { return };
        match &self.transport {
            Some(Transport::Http2(connection)) if low_bits(connection.liveness().reads()) == self.reads => {
                self.endpoint.suspect(connection, sent);
            }
            Some(Transport::Http1(_)) => self.endpoint.close_unheard(sent),
            Some(Transport::Http2(_)) | None => {}
        }
    }

    /// The same for a call that its caller has cancelled: it says something only after a long silence, of this call or of
    /// several in a row.
    fn record_cancel(&self, now: Instant) {
        let quiet_since = match &self.transport {
            Some(Transport::Http2(connection)) => connection.liveness().quiet_since(),
            Some(Transport::Http1(_)) => self.endpoint.unanswered_since(),
            None => None,
        };
        if quiet_since.is_some_and(|since| now.saturating_duration_since(since) >= CANCELLED_AFTER) {
            self.record_timeout();
        }
    }

    /// True for an HTTP/1.1 connection, which the holder of the lease has to drive.
    pub fn is_http1(&self) -> bool {
        matches!(self.transport, Some(Transport::Http1(_)))
    }

    /// The connection; `None` once it has been taken out.
    pub fn transport(&mut self) -> Option<&mut Transport> {
        self.transport.as_mut()
    }

    /// Whether a connection of the same age has ended in place of a response.
    pub fn is_stale(&self) -> bool {
        self.opened_at().is_some_and(|opened| self.endpoint.is_stale(opened))
    }

    /// Records that the upstream ended the connection before its response to a request `sent` then, without a word. Returns
    /// false if another connection of the same age has ended before: both ends are one event.
    ///
    /// The first end of a reused connection, or of one opened in place of a connection that could have been reused, makes all connections of its age stale. Most likely the upstream was ending the
    /// idle connection when the request was sent: its idle time, or the number of its requests, becomes a limit.
    pub fn record_end(&self, sent: Instant, now: Instant) -> bool {
        if self.is_stale() {
            return false;
        }
        if self.reused || self.replaces_idle || self.endpoint.is_near_worker_end(now) {
            if self.reused
                && let Some(Transport::Http1(connection)) = &self.transport
            {
                let idle = sent.saturating_duration_since(connection.idle_since);
                self.endpoint.learn_from_close(idle, &connection.lifetime, now);
            }
            self.endpoint.record_end(now);
        }
        true
    }

    /// Checks an HTTP/1.1 connection in for the next request if it can take one, and closes it otherwise. Returns the lease
    /// if its request is still being sent: the upstream has responded early, and may read on.
    ///
    /// `idle_timeout` and `max_idle` are the policy's `connections.idle` and `connections.maxIdle`; `announced` is the
    /// timeout of the response's `Keep-Alive` field.
    pub fn check_in(
        mut self,
        cx: &mut Context<'_>,
        idle_timeout: Duration,
        max_idle: usize,
        announced: Option<Duration>,
        now: Instant,
    ) -> Option<Self> {
        // Complete: not cancelled.
        self.sent_at = None;
        // Any other connection ends as if the lease were dropped.
        let Some(Transport::Http1(connection)) = &mut self.transport else { return None };
        let after = connection.after_response(cx);
        if after == AfterResponse::StillSending {
            return Some(self);
        }
        connection.lifetime.count_request();
        self.endpoint.count_response();
        if after == AfterResponse::Closed {
            self.endpoint.learn_from_announced_close(&connection.lifetime, now);
        } else if let Some(Transport::Http1(connection)) = self.transport.take() {
            self.endpoint.check_in_idle(connection, idle_timeout, max_idle, announced, now);
        }
        None
    }

    /// Checks in a new HTTP/1.1 connection whose caller has left.
    pub(super) fn check_in_unused(
        mut self,
        cx: &mut Context<'_>,
        idle_timeout: Duration,
        max_idle: usize,
        now: Instant,
    ) {
        let Some(Transport::Http1(connection)) = &mut self.transport else { return };
        if connection.after_response(cx) == AfterResponse::Reusable
            && let Some(Transport::Http1(connection)) = self.transport.take()
        {
            self.endpoint.check_in_idle(connection, idle_timeout, max_idle, None, now);
        }
    }

    /// Ends an HTTP/1.1 connection after its response; `reason` is why it is not used again. An HTTP/2 connection stays.
    /// Returns the lease if its request is still being sent.
    pub fn end_early(mut self, cx: &mut Context<'_>, reason: EndReason) -> Option<Self> {
        self.sent_at = None;
        let Some(Transport::Http1(connection)) = &mut self.transport else { return None };
        if connection.after_response(cx) == AfterResponse::StillSending {
            return Some(self);
        }
        self.transport = None;
        self.endpoint.end_early(reason);
        None
    }

    /// Takes the HTTP/1.1 connection out of the pool, to use its stream after an upgrade. `None` for HTTP/2.
    pub fn into_http1(mut self) -> Option<Box<Http1>> {
        match self.transport.take() {
            Some(Transport::Http1(connection)) => {
                self.endpoint.count_close();
                Some(connection)
            }
            other => {
                self.transport = other;
                None
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.endpoint.load.finish();
        if self.sent_at.is_some() {
            self.record_cancel(Instant::now());
        }
        match self.transport.take() {
            Some(Transport::Http1(_)) => self.endpoint.count_close(),
            Some(Transport::Http2(connection)) => self.endpoint.end_stream(&connection, Instant::now()),
            None => {}
        }
    }
}

/// Starts the sweep of a worker's pools while one of them has an idle or a shared connection.
#[derive(Default)]
pub struct SweepSignal {
    is_requested: Cell<bool>,
    requested: Notify,
}

impl SweepSignal {
    /// Requests a sweep: a pool has an idle or a shared connection.
    pub fn request(&self) {
        if !self.is_requested.replace(true) {
            self.requested.notify_one();
        }
    }

    /// Waits until a sweep is requested.
    pub(super) async fn requested(&self) {
        if !self.is_requested.get() {
            self.requested.notified().await;
        }
    }

    /// Records the end of a sweep; `again` if connections are left for the next one.
    pub(super) fn swept(&self, again: bool) {
        self.is_requested.set(again);
    }
}

/// One worker's connections to a cluster.
pub struct Pool {
    /// The state shared by all workers.
    pub cluster: Arc<Cluster>,
    pub(super) connector: Connector,
    pub(super) sweep_signal: Rc<SweepSignal>,
    addresses: RefCell<watch::Receiver<Arc<Addresses>>>,
    endpoints: RefCell<Vec<Rc<Endpoint>>>,
    random: RefCell<fastrand::Rng>,
    /// Gauges and counters of the destination on this worker.
    pub metrics: DestinationMetrics,
}

impl Pool {
    /// A pool without connections.
    pub fn new(
        cluster: Arc<Cluster>,
        connector: Connector,
        sweep_signal: Rc<SweepSignal>,
        metrics: DestinationMetrics,
    ) -> Self {
        let mut addresses = cluster.subscribe();
        addresses.mark_changed();
        Self {
            cluster,
            connector,
            sweep_signal,
            addresses: RefCell::new(addresses),
            endpoints: RefCell::default(),
            random: RefCell::new(fastrand::Rng::new()),
            metrics,
        }
    }

    /// Waits until an endpoint is known, or every name of the cluster has been resolved or has failed once. Has no time
    /// limit.
    ///
    /// # Errors
    /// [`ConnectError::NoAddress`] if no name has an address.
    pub async fn wait_resolved(&self) -> Result<(), ConnectError> {
        let mut addresses = self.cluster.subscribe();
        loop {
            // Read before the endpoints: an update in between is then seen in the endpoints.
            let (is_complete, problem) = {
                let now = addresses.borrow_and_update();
                (now.is_complete, now.problem.clone())
            };
            self.update_endpoints(Instant::now());
            if !self.endpoints.borrow().is_empty() {
                return Ok(());
            }
            if is_complete {
                let none = || "the name has no address".to_owned();
                return Err(ConnectError::NoAddress(problem.unwrap_or_else(none)));
            }
            if addresses.changed().await.is_err() {
                return Err(ConnectError::NoAddress("name resolution has ended".to_owned()));
            }
        }
    }

    /// Picks the endpoint for a request; `None` while no address is known.
    ///
    /// While there are others, skips endpoints that were `tried`, are ejected (if `ejects`), or do not accept connections, in
    /// this order of weight. An endpoint whose ejection is over is picked first: only a call shows whether
    /// it works again.
    pub fn pick(&self, now: Instant, tried: &[SocketAddr], ejects: bool) -> Option<Rc<Endpoint>> {
        self.update_endpoints(now);
        let endpoints = self.endpoints.borrow();
        match &endpoints[..] {
            [] => return None,
            [only] => return Some(Rc::clone(only)),
            _ => {}
        }
        let mut random = self.random.borrow_mut();
        if ejects && let Some(probed) = pick_due(&endpoints, tried, now, &mut random) {
            return Some(Rc::clone(probed));
        }
        let load = |position: usize| &endpoints[position].load;
        let best = &endpoints[balance::pick(endpoints.len(), load, &mut random, now)?];
        let penalty = |endpoint: &Endpoint| {
            let was_tried = tried.contains(&endpoint.address.socket);
            let is_out = ejects && endpoint.member.is_out(now);
            u8::from(was_tried) << 2 | u8::from(is_out) << 1 | u8::from(endpoint.reachability.is_unreachable(now))
        };
        if penalty(best) == 0 {
            return Some(Rc::clone(best));
        }
        let least = endpoints.iter().map(|endpoint| penalty(endpoint)).min()?;
        let candidates: Vec<_> = endpoints.iter().filter(|endpoint| penalty(endpoint) == least).collect();
        let load = |position: usize| &candidates[position].load;
        balance::pick(candidates.len(), load, &mut random, now).map(|position| Rc::clone(candidates[position]))
    }

    /// Whether there is an endpoint that is neither `this` nor in `tried`.
    pub fn has_other(&self, tried: &[SocketAddr], this: &Endpoint) -> bool {
        let is_untried = |other: &SocketAddr| *other != this.address.socket && !tried.contains(other);
        self.endpoints.borrow().iter().any(|other| is_untried(&other.address.socket))
    }

    /// Applies changed addresses: an endpoint that stays keeps its connections and its load, one that is gone is retired.
    fn update_endpoints(&self, now: Instant) {
        let mut addresses = self.addresses.borrow_mut();
        if !addresses.has_changed().unwrap_or(false) {
            return;
        }
        let mut old: HashMap<_, _> =
            self.endpoints.borrow_mut().drain(..).map(|endpoint| (endpoint.address.clone(), endpoint)).collect();
        // Borrowed to the end: the list cannot change meanwhile, so no ejection state is dropped for an address in it.
        let list = addresses.borrow_and_update();
        let kept_or_new = list
            .list
            .iter()
            .map(|address| {
                old.remove(address)
                    .unwrap_or_else(|| Endpoint::new(address.clone(), &self.cluster, self.metrics.clone(), now))
            })
            .collect();
        *self.endpoints.borrow_mut() = kept_or_new;
        old.values().for_each(|endpoint| endpoint.retire(now));
    }

    /// Closes idle connections: the policy does not have this cluster any more. Calls in flight go on.
    pub fn retire(&self, now: Instant) {
        self.endpoints.borrow().iter().for_each(|endpoint| endpoint.retire(now));
    }

    /// Checks out a connection to `endpoint` that is open already; `None` if a new one is needed.
    pub fn checkout(
        &self,
        endpoint: &Rc<Endpoint>,
        preference: ProtocolPreference,
        now: Instant,
        cx: &mut Context<'_>,
    ) -> Option<Lease> {
        if preference != ProtocolPreference::Http1
            && let Some(connection) = endpoint.shared(now)
        {
            return Some(Lease::new(Rc::clone(endpoint), Transport::Http2(connection), true));
        }
        if preference == ProtocolPreference::Http2 {
            return None;
        }
        let idle = endpoint.checkout_idle(cx, now);
        idle.map(|connection| Lease::new(Rc::clone(endpoint), Transport::Http1(connection), true))
    }

    /// Closes expired and closed idle connections. Returns true if a connection is left for the next sweep.
    pub fn sweep(&self, cx: &mut Context<'_>, now: Instant) -> bool {
        // Connections to an address that is gone are closed even without a call.
        self.update_endpoints(now);
        let endpoints = self.endpoints.borrow();
        // `count`, and not `any`, so that every endpoint is swept.
        endpoints.iter().filter(|endpoint| endpoint.sweep(cx, now)).count() > 0
    }
}

/// Endpoints that one request checks for an ejection that is over.
const MAX_CHECKED: usize = 16;

/// An endpoint whose ejection is over and that waits for a call to probe it.
fn pick_due<'a>(
    endpoints: &'a [Rc<Endpoint>],
    tried: &[SocketAddr],
    now: Instant,
    random: &mut fastrand::Rng,
) -> Option<&'a Rc<Endpoint>> {
    // From a random position, so that an endpoint whose probes give no result does not block the others.
    let begin = random.usize(..endpoints.len().max(1));
    let checked = endpoints.iter().cycle().skip(begin).take(endpoints.len().min(MAX_CHECKED));
    checked.into_iter().find(|endpoint| endpoint.member.is_due(now) && !tried.contains(&endpoint.address.socket))
}
