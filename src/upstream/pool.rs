//! One worker's connections to one cluster: lends a connection for each request and takes it back.

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

/// Which protocol a request wants to be sent with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProtocolPreference {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, by prior knowledge or agreed in TLS.
    Http2,
    /// What TLS agrees on.
    Either,
}

/// The connection of a lease.
pub enum Transport {
    /// Lent to one request alone.
    Http1(Box<Http1>),
    /// Shared.
    Http2(Rc<Http2>),
}

/// A connection lent for one request. Dropping it closes an HTTP/1.1 connection, or gives the HTTP/2 stream up.
pub struct Lease {
    /// Where the request goes.
    pub endpoint: Rc<Endpoint>,
    /// Present until the lease is given back.
    transport: Option<Transport>,
    /// True if the connection had been used before.
    pub reused: bool,
    /// When the connection was opened.
    pub born: Instant,
}

impl Lease {
    pub(super) fn new(endpoint: Rc<Endpoint>, transport: Transport, reused: bool) -> Self {
        endpoint.load.begin();
        let born = match &transport {
            Transport::Http1(connection) => connection.born,
            Transport::Http2(connection) => {
                connection.begin();
                connection.born
            }
        };
        Self { endpoint, transport: Some(transport), reused, born }
    }

    /// True if the connection is lent to this request alone, which then has to move it.
    pub fn is_http1(&self) -> bool {
        matches!(self.transport, Some(Transport::Http1(_)))
    }

    /// The connection.
    pub fn transport(&mut self) -> Option<&mut Transport> {
        self.transport.as_mut()
    }

    /// The connection, which had been idle, broke off before it answered: most likely the upstream was closing it when the
    /// request came. What it was kept for is too long.
    pub fn lost_race(&self, sent: Instant, now: Instant) {
        if self.reused
            && let Some(Transport::Http1(connection)) = &self.transport
        {
            self.endpoint.learn(sent.saturating_duration_since(connection.idle_since), now);
        }
    }

    /// Gives an HTTP/1.1 connection back for the next request, if it can take one.
    pub fn give_back(
        mut self,
        cx: &mut Context<'_>,
        keep: Duration,
        most: usize,
        announced: Option<Duration>,
        now: Instant,
    ) {
        // What cannot be used again, or is shared anyway, ends as if it had been dropped.
        let again = match &mut self.transport {
            Some(Transport::Http1(connection)) => connection.is_reusable(cx),
            _ => false,
        };
        if again && let Some(Transport::Http1(connection)) = self.transport.take() {
            self.endpoint.put_idle(connection, keep, most, announced, now);
        }
    }

    /// Takes the HTTP/1.1 connection out for good, to use its stream for something else.
    pub fn into_http1(mut self) -> Option<Box<Http1>> {
        match self.transport.take() {
            Some(Transport::Http1(connection)) => {
                self.endpoint.closed();
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
            Some(Transport::Http1(_)) => self.endpoint.closed(),
            Some(Transport::Http2(connection)) => self.endpoint.stream_ended(&connection, Instant::now()),
            None => {}
        }
    }
}

/// Whether there are connections that somebody has to look after, in any pool of a worker.
#[derive(Default)]
pub struct SweepSignal {
    is_wanted: Cell<bool>,
    rung: Notify,
}

impl SweepSignal {
    /// There is one: it is idle, or it is shared.
    pub fn call(&self) {
        if !self.is_wanted.replace(true) {
            self.rung.notify_one();
        }
    }

    /// Waits until there is one.
    pub(super) async fn called(&self) {
        if !self.is_wanted.get() {
            self.rung.notified().await;
        }
    }

    /// All were looked after; `left` if there are any still.
    pub(super) fn given(&self, left: bool) {
        self.is_wanted.set(left);
    }
}

/// One worker's side of a cluster.
pub struct Pool {
    /// The shared side.
    pub cluster: Arc<Cluster>,
    pub(super) connector: Connector,
    /// Told of what somebody has to look after.
    pub(super) attention: Rc<SweepSignal>,
    addresses: RefCell<watch::Receiver<Arc<Addresses>>>,
    endpoints: RefCell<Vec<Rc<Endpoint>>>,
    random: RefCell<fastrand::Rng>,
    /// The gauges and counters of the destination on this worker.
    pub metrics: DestinationMetrics,
}

impl Pool {
    /// A pool without a connection.
    pub fn new(
        cluster: Arc<Cluster>,
        connector: Connector,
        attention: Rc<SweepSignal>,
        metrics: DestinationMetrics,
    ) -> Self {
        let mut addresses = cluster.subscribe();
        addresses.mark_changed();
        Self {
            cluster,
            connector,
            attention,
            addresses: RefCell::new(addresses),
            endpoints: RefCell::default(),
            random: RefCell::new(fastrand::Rng::new()),
            metrics,
        }
    }

    /// Waits while the names of the cluster have never been resolved. Fails if they have no address.
    pub async fn known(&self) -> Result<(), ConnectError> {
        let mut addresses = self.cluster.subscribe();
        loop {
            // First, because what comes between this and the look at the endpoints is found by that look.
            let (settled, problem) = {
                let now = addresses.borrow_and_update();
                (now.settled, now.problem.clone())
            };
            self.follow(Instant::now());
            if !self.endpoints.borrow().is_empty() {
                return Ok(());
            }
            if settled {
                let none = || "the name has no address".to_owned();
                return Err(ConnectError::NoAddress(problem.unwrap_or_else(none)));
            }
            if addresses.changed().await.is_err() {
                return Err(ConnectError::NoAddress("discovery has ended".to_owned()));
            }
        }
    }

    /// The best endpoint now; `None` while no address is known.
    ///
    /// Passes over those that were `tried`, those that are ejected (if `ejects`) and those that could not be reached a
    /// moment ago, in this order of weight, as long as there are others. One whose ejection is over comes first:
    /// somebody has to find out.
    pub fn pick_now(&self, now: Instant, tried: &[SocketAddr], ejects: bool) -> Option<Rc<Endpoint>> {
        self.follow(now);
        let endpoints = self.endpoints.borrow();
        match &endpoints[..] {
            [] => return None,
            [only] => return Some(Rc::clone(only)),
            _ => {}
        }
        let mut random = self.random.borrow_mut();
        if ejects && let Some(due) = due(&endpoints, tried, now, &mut random) {
            return Some(Rc::clone(due));
        }
        let load = |position: usize| &endpoints[position].load;
        let best = &endpoints[balance::pick(endpoints.len(), load, &mut random, now)?];
        let faults = |endpoint: &Endpoint| {
            let was_tried = tried.contains(&endpoint.address.socket);
            let is_out = ejects && endpoint.member.is_out(now);
            u8::from(was_tried) << 2 | u8::from(is_out) << 1 | u8::from(endpoint.is_held_off(now))
        };
        if faults(best) == 0 {
            return Some(Rc::clone(best));
        }
        let fewest = endpoints.iter().map(|endpoint| faults(endpoint)).min()?;
        let good: Vec<_> = endpoints.iter().filter(|endpoint| faults(endpoint) == fewest).collect();
        let load = |position: usize| &good[position].load;
        balance::pick(good.len(), load, &mut random, now).map(|position| Rc::clone(good[position]))
    }

    /// Whether there is an endpoint that is neither `this` nor among those `tried`.
    pub fn has_other(&self, tried: &[SocketAddr], this: &Endpoint) -> bool {
        let is_new = |other: &SocketAddr| *other != this.address.socket && !tried.contains(other);
        self.endpoints.borrow().iter().any(|other| is_new(&other.address.socket))
    }

    /// Takes up changed addresses; an endpoint that stays keeps its connections and its load.
    fn follow(&self, now: Instant) {
        let mut addresses = self.addresses.borrow_mut();
        if !addresses.has_changed().unwrap_or(false) {
            return;
        }
        let mut old: HashMap<_, _> =
            self.endpoints.borrow_mut().drain(..).map(|endpoint| (endpoint.address.clone(), endpoint)).collect();
        // Held to the end: while it is, the list does not change, and nobody is forgotten who is taken up from it.
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

    /// Closes what nobody uses: the policy does not have this cluster any more. Calls under way end as they would have.
    pub fn retire(&self, now: Instant) {
        self.endpoints.borrow().iter().for_each(|endpoint| endpoint.retire(now));
    }

    /// A connection to `endpoint` that is open already.
    pub fn checkout(
        &self,
        endpoint: &Rc<Endpoint>,
        want: ProtocolPreference,
        now: Instant,
        cx: &mut Context<'_>,
    ) -> Option<Lease> {
        if want != ProtocolPreference::Http1
            && let Some(connection) = endpoint.shared()
        {
            return Some(Lease::new(Rc::clone(endpoint), Transport::Http2(connection), true));
        }
        if want == ProtocolPreference::Http2 {
            return None;
        }
        let idle = endpoint.take_idle(cx, now);
        idle.map(|connection| Lease::new(Rc::clone(endpoint), Transport::Http1(connection), true))
    }

    /// Looks after idle connections; returns true if there is something left to look after.
    pub fn sweep(&self, cx: &mut Context<'_>, now: Instant) -> bool {
        // Without a call, too, the connections to an address that is gone have to go.
        self.follow(now);
        let endpoints = self.endpoints.borrow();
        // Every one is swept, whatever the one before it has left.
        endpoints.iter().filter(|endpoint| endpoint.sweep(cx, now)).count() > 0
    }
}

/// How many endpoints are looked at for one whose ejection is over, for each request.
const LOOKED_AT: usize = 16;

/// An endpoint whose ejection is over and that waits for a call that tries it.
fn due<'a>(
    endpoints: &'a [Rc<Endpoint>],
    tried: &[SocketAddr],
    now: Instant,
    random: &mut fastrand::Rng,
) -> Option<&'a Rc<Endpoint>> {
    // Anywhere, so that one of which nothing can be found out does not stand before the others for ever.
    let begin = random.usize(..endpoints.len().max(1));
    let some = endpoints.iter().cycle().skip(begin).take(endpoints.len().min(LOOKED_AT));
    some.into_iter().find(|one| one.member.is_due(now) && !tried.contains(&one.address.socket))
}
