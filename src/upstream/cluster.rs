//! A destination's endpoints as all workers see them: addresses, protocol, TLS, and the gate of its limits.
//!
//! A cluster lives as long as the policy names the same endpoints, protocol and TLS for the destination;
//! changed timeouts or limits leave it, its connections and its counters alone.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use arc_swap::ArcSwapOption;
use rustls::ClientConfig;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::net::certificates::{self, CertificateError};
use crate::rules::breaker::{Breaker, Change};
use crate::rules::budget::Budget;
use crate::rules::ejection::{Group, Member};
use crate::upstream::spec::{Endpoint, Protocol, Tls};

/// One place to connect to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    /// Where.
    pub socket: SocketAddr,
    /// The name that its certificate has to carry; used with TLS only.
    pub server_name: Arc<str>,
}

/// What is known of a cluster's addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Every endpoint's addresses, without repeats.
    pub list: Vec<Address>,
    /// Why the list may be old or empty: what the resolver said last, if it failed.
    pub problem: Option<String>,
    /// False until every name has been asked for once.
    pub settled: bool,
}

/// What makes a cluster another one when it changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The destination's name.
    pub name: Arc<str>,
    /// The endpoints as the policy has them.
    pub endpoints: Vec<Endpoint>,
    /// The protocol to speak.
    pub protocol: Protocol,
    /// TLS to the endpoints.
    pub tls: Option<Tls>,
    /// The name for certificates of endpoints that have none themselves.
    pub host: Arc<str>,
}

/// What the failures of a destination have led to, shared by all workers. Lives as long as the policy names the destination,
/// whatever becomes of its endpoints and values.
#[derive(Clone)]
pub struct Health {
    /// The circuit breaker.
    pub breaker: Arc<Breaker>,
    /// Which endpoints are ejected.
    pub group: Arc<Group>,
    /// What may be spent on retries.
    pub budget: Arc<Budget>,
}

impl Health {
    /// Nothing has failed yet.
    pub fn new(now: Instant) -> Self {
        Self { breaker: Breaker::new(now), group: Group::new(now), budget: Budget::new() }
    }
}

/// The shared side of a destination's endpoints.
pub struct Cluster {
    /// Unique within the process; pools are found by it.
    pub id: u64,
    /// What it was made from.
    pub identity: Identity,
    /// What its failures have led to.
    pub health: Health,
    addresses: watch::Sender<Arc<Addresses>>,
    /// One for a destination and all the places that it leads to.
    tls: Arc<ArcSwapOption<ClientConfig>>,
}

impl Cluster {
    /// A cluster whose fixed addresses are known and whose names are still to be resolved.
    ///
    /// Fails if TLS is wanted and the certificates cannot be used.
    pub fn new(identity: Identity, health: Health) -> Result<Arc<Self>, CertificateError> {
        let cluster = Self::with(identity, health, Arc::default());
        cluster.load_certificates()?;
        Ok(Arc::new(cluster))
    }

    /// A cluster for a place that callers of this one want to reach, with the certificates of this one.
    pub fn place(&self, endpoint: Endpoint, host: &str) -> Arc<Self> {
        let identity = Identity { endpoints: vec![endpoint], host: host.into(), ..self.identity.clone() };
        // One place's failures say nothing about the others.
        Arc::new(Self::with(identity, Health::new(Instant::now()), Arc::clone(&self.tls)))
    }

    fn with(identity: Identity, health: Health, tls: Arc<ArcSwapOption<ClientConfig>>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Relaxed);
        Self { id, addresses: watch::Sender::new(Arc::new(fixed(&identity))), tls, identity, health }
    }

    /// Reads the certificates again, for its places too; connections that exist keep theirs. On an error the old ones stay.
    pub fn load_certificates(&self) -> Result<(), CertificateError> {
        if let Some(tls) = &self.identity.tls {
            let (http1, http2) = match self.identity.protocol {
                Protocol::Auto => (true, true),
                Protocol::Http1 => (true, false),
                Protocol::Http2 => (false, true),
            };
            self.tls.store(Some(certificates::client(tls.ca.as_deref(), http1, http2)?));
        }
        Ok(())
    }

    /// TLS settings, if this cluster is called over TLS.
    pub fn tls(&self) -> Option<Arc<ClientConfig>> {
        self.tls.load_full()
    }

    /// The names that discovery has to resolve, with their ports.
    pub fn names(&self) -> impl Iterator<Item = (&str, u16)> {
        self.identity.endpoints.iter().filter_map(|endpoint| match endpoint {
            Endpoint::Dns { name, port } => Some((name.as_str(), *port)),
            Endpoint::Address(_) => None,
        })
    }

    /// Follows the addresses.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Addresses>> {
        self.addresses.subscribe()
    }

    /// The addresses as they are now.
    pub fn addresses(&self) -> Arc<Addresses> {
        Arc::clone(&self.addresses.borrow())
    }

    /// Takes up what discovery found: fixed addresses first, then `resolved`. Wakes nobody if nothing changed.
    pub fn publish(&self, resolved: Vec<Address>, problem: Option<String>) {
        let mut next = fixed(&self.identity);
        next.problem = problem;
        next.settled = true;
        for address in resolved {
            if !next.list.contains(&address) {
                next.list.push(address);
            }
        }
        self.addresses.send_if_modified(|now| {
            let changed = **now != next;
            if changed {
                let sockets: Vec<_> = next.list.iter().map(|address| address.socket).collect();
                self.health.group.retain(&sockets, Instant::now());
                *now = Arc::new(next);
            }
            changed
        });
    }

    /// Forgets what endpoints did that the policy no longer names; those found by name are forgotten when they are found
    /// no more. Returns the endpoint that is taken back because all others are gone.
    pub fn forget_others(&self, now: Instant) -> Option<(Arc<Member>, Change)> {
        let addresses = self.addresses();
        let sockets: Vec<_> = addresses.list.iter().map(|address| address.socket).collect();
        addresses.settled.then(|| self.health.group.retain(&sockets, now))?
    }
}

fn fixed(identity: &Identity) -> Addresses {
    let mut list = Vec::new();
    for endpoint in &identity.endpoints {
        if let Endpoint::Address(socket) = endpoint {
            let address = Address { socket: *socket, server_name: Arc::clone(&identity.host) };
            if !list.contains(&address) {
                list.push(address);
            }
        }
    }
    let named = identity.endpoints.iter().any(|endpoint| matches!(endpoint, Endpoint::Dns { .. }));
    Addresses { list, problem: None, settled: !named }
}
