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
use crate::upstream::http1::Http1;
use crate::upstream::http2::Http2;

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
    /// When the connection was opened.
    pub opened_at: Instant,
}

impl Lease {
    pub(super) fn new(endpoint: Rc<Endpoint>, transport: Transport, reused: bool) -> Self {
        endpoint.load.begin();
        let opened_at = match &transport {
            Transport::Http1(connection) => connection.opened_at,
            Transport::Http2(connection) => {
                connection.begin_stream();
                connection.opened_at
            }
        };
        Self { endpoint, transport: Some(transport), reused, opened_at }
    }

    /// True for an HTTP/1.1 connection, which the holder of the lease has to drive.
    pub fn is_http1(&self) -> bool {
        matches!(self.transport, Some(Transport::Http1(_)))
    }

    /// The connection; `None` once it has been taken out.
    pub fn transport(&mut self) -> Option<&mut Transport> {
        self.transport.as_mut()
    }

    /// Records that a reused HTTP/1.1 connection closed before its response: most likely the upstream was closing the idle
    /// connection when the request was `sent`. Its idle time becomes the endpoint's idle limit.
    pub fn record_idle_close(&self, sent: Instant, now: Instant) {
        if self.reused
            && let Some(Transport::Http1(connection)) = &self.transport
        {
            self.endpoint.learn_idle_limit(sent.saturating_duration_since(connection.idle_since), now);
        }
    }

    /// Checks an HTTP/1.1 connection in for the next request if it can take one, and closes it otherwise.
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
    ) {
        // Any other connection ends as if the lease were dropped.
        let is_reusable = match &mut self.transport {
            Some(Transport::Http1(connection)) => connection.is_reusable(cx),
            _ => false,
        };
        if is_reusable && let Some(Transport::Http1(connection)) = self.transport.take() {
            self.endpoint.check_in_idle(connection, idle_timeout, max_idle, announced, now);
        }
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
            && let Some(connection) = endpoint.shared()
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
