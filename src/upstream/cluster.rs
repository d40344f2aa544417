//! The state of a destination that all workers share: addresses, TLS settings, health.
//!
//! `policy::snapshot` makes one per destination, `discovery` one per dynamic host; every worker has a pool for it. Invariants:
//! a cluster lives as long as the policy gives the destination the same endpoints, protocol and TLS, so changed timeouts or
//! limits change neither cluster nor connections; [`Health`] lives as long as the policy has the destination.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use rustls::ClientConfig;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::net::certificates::{self, CertificateError, SystemRoots};
use crate::rules::circuit_breaker::{Breaker, BreakerState, StateChange};
use crate::rules::ejection::{EjectionGroup, EjectionMember};
use crate::rules::retry::RetryBudget;
use crate::telemetry::Telemetry;
use crate::upstream::dial_limit::DialLimit;
use crate::upstream::spec::{EndpointSpec, UpstreamProtocol, UpstreamTls};

/// One address of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    /// IP address and port.
    pub socket: SocketAddr,
    /// The name that the endpoint's certificate must bear; used with TLS only.
    pub server_name: Arc<str>,
}

/// The addresses of a cluster, as last resolved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// The addresses of all endpoints, without duplicates.
    pub list: Vec<Address>,
    /// The resolver's errors for names whose last resolution failed: the list may be old or empty.
    pub problem: Option<String>,
    /// True once every name has been resolved, or has failed to resolve, at least once.
    pub is_complete: bool,
}

/// The policy values of a cluster; a change of any of them makes a new cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterIdentity {
    /// The destination's name.
    pub name: Arc<str>,
    /// The endpoints of the policy.
    pub endpoints: Vec<EndpointSpec>,
    /// The HTTP version of the endpoints.
    pub protocol: UpstreamProtocol,
    /// TLS to the endpoints; `None` for plain text.
    pub tls: Option<UpstreamTls>,
    /// The server name of endpoints given as an address; empty if it is not used.
    pub host: Arc<str>,
}

/// Circuit breaker, ejections and retry budget of a destination, shared by all workers.
///
/// Survives reloads that change the destination's endpoints or values. Each dynamic host has its own; the values
/// reported for the destination cover all its dynamic hosts.
#[derive(Clone)]
pub struct Health {
    /// The circuit breaker.
    pub breaker: Arc<Breaker>,
    /// The ejection state of the endpoints.
    pub group: Arc<EjectionGroup>,
    /// The retry budget.
    pub budget: Arc<RetryBudget>,
    /// The id of the cluster of the current policy, whose addresses define the ejection members; 0 before the first reload.
    current_cluster: Arc<AtomicU64>,
    /// True where the current policy has no circuit breaker, or no ejection, for the destination.
    is_disabled: Arc<[AtomicBool; 2]>,
    /// Receives the changes that no call causes.
    telemetry: Arc<OnceLock<Arc<Telemetry>>>,
    /// The states reported for the destination: its own, and those of its dynamic hosts.
    reported: Arc<Mutex<Vec<ReportedState>>>,
}

/// Breaker and ejections of a destination or of one dynamic host; dropped with the dynamic host.
type ReportedState = (Weak<Breaker>, Weak<EjectionGroup>);

impl Health {
    /// Closed breaker, no ejection, full retry budget.
    pub fn new(now: Instant) -> Self {
        let this = Self {
            breaker: Breaker::new(now),
            group: EjectionGroup::new(now),
            budget: RetryBudget::new(),
            current_cluster: Arc::default(),
            is_disabled: Arc::default(),
            telemetry: Arc::default(),
            reported: Arc::default(),
        };
        this.register();
        this
    }

    /// The health of a dynamic host: failures of one dynamic host do not count against the others. All are reported together.
    fn for_dynamic_host(&self, now: Instant) -> Self {
        let (breaker, group, budget) = (Breaker::new(now), EjectionGroup::new(now), RetryBudget::new());
        let this = Self { breaker, group, budget, current_cluster: Arc::default(), ..self.clone() };
        this.register();
        this
    }

    /// Adds this state to those reported for the destination.
    fn register(&self) {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        reported.retain(|(breaker, _)| breaker.strong_count() > 0);
        reported.push((Arc::downgrade(&self.breaker), Arc::downgrade(&self.group)));
    }

    /// Sets which of the two rules the current policy has. The state of a rule that is off is kept and not reported, even if
    /// calls of an older policy still change it. Returns true if a rule was switched on or off.
    pub fn set_reported(&self, breaker: bool, ejection: bool) -> bool {
        let was = [self.is_disabled[0].swap(!breaker, Relaxed), self.is_disabled[1].swap(!ejection, Relaxed)];
        was != [!breaker, !ejection]
    }

    /// The reported state of the circuit breaker; of several dynamic hosts the worst: open, half-open, closed.
    pub fn breaker_state(&self, now: Instant) -> BreakerState {
        if self.is_disabled[0].load(Relaxed) {
            return BreakerState::Closed;
        }
        let states: Vec<_> = self.map_reported(|(breaker, _)| Some(breaker.upgrade()?.state(now)));
        [BreakerState::Open, BreakerState::HalfOpen]
            .into_iter()
            .find(|state| states.contains(state))
            .unwrap_or(BreakerState::Closed)
    }

    /// Sets the receiver of changes that no call causes. Set before the first call: only calls eject an endpoint.
    pub fn set_telemetry(&self, telemetry: &Arc<Telemetry>) {
        self.telemetry.get_or_init(|| Arc::clone(telemetry));
    }

    /// The reported number of ejected endpoints, in dry run those that would be; of several dynamic hosts the sum.
    pub fn ejected_count(&self, now: Instant) -> usize {
        if self.is_disabled[1].load(Relaxed) {
            return 0;
        }
        let ejected = |group: Arc<EjectionGroup>| group.members().iter().filter(|member| member.is_out(now)).count();
        self.map_reported(|(_, group)| group.upgrade().map(ejected)).iter().sum()
    }

    /// Removes this state from those reported. Returns true if the breaker was not closed or an endpoint was ejected.
    fn unregister(&self, now: Instant) -> bool {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        reported.retain(|(breaker, _)| breaker.as_ptr() != Arc::as_ptr(&self.breaker));
        self.breaker.state(now) != BreakerState::Closed || self.group.members().iter().any(|member| member.is_out(now))
    }

    /// Whether the breaker is open or an endpoint is ejected; false while they only wait for a probe.
    pub fn is_open(&self, now: Instant) -> bool {
        self.breaker.state(now) == BreakerState::Open
            || self.group.members().iter().any(|member| member.state(now) == BreakerState::Open)
    }

    fn map_reported<T>(&self, map: impl Fn(&ReportedState) -> Option<T>) -> Vec<T> {
        let reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        reported.iter().filter_map(map).collect()
    }
}

/// The shared state of a destination, or of one dynamic host.
pub struct Cluster {
    /// Unique within the process; the key of the workers' pools.
    pub id: u64,
    /// The policy values that it was made from.
    pub identity: ClusterIdentity,
    /// Circuit breaker, ejections and retry budget.
    pub health: Health,
    /// `host:port` of a dynamic host; `None` for the cluster of a destination itself.
    pub dynamic_host: Option<String>,
    addresses: watch::Sender<Arc<Addresses>>,
    /// The limits of the addresses to which a worker has an endpoint.
    dial_limits: Mutex<Vec<(SocketAddr, Weak<DialLimit>)>>,
    /// Shared by a destination and all its dynamic hosts.
    tls: Arc<ArcSwapOption<TlsConfigs>>,
}

/// TLS settings, by the protocols that ALPN offers.
struct TlsConfigs {
    /// The protocols that the policy allows.
    all: Arc<ClientConfig>,
    /// HTTP/1.1 only.
    http1: Arc<ClientConfig>,
}

impl Cluster {
    /// A cluster with the addresses of its endpoints; `discovery` adds those of its names.
    ///
    /// # Errors
    /// If the cluster has `tls` and its certificates cannot be used.
    pub fn new(identity: ClusterIdentity, health: Health, roots: &SystemRoots) -> Result<Arc<Self>, CertificateError> {
        let cluster = Self::build(identity, health, None, Arc::default());
        cluster.load_certificates(roots)?;
        Ok(Arc::new(cluster))
    }

    /// The cluster of a dynamic host of this destination, called `name` (`host:port`), with this cluster's certificates.
    /// `host` is the server name for TLS.
    pub fn for_dynamic_host(&self, name: String, endpoint: EndpointSpec, host: &str) -> Arc<Self> {
        let identity = ClusterIdentity { endpoints: vec![endpoint], host: host.into(), ..self.identity.clone() };
        let health = self.health.for_dynamic_host(Instant::now());
        Arc::new(Self::build(identity, health, Some(name), Arc::clone(&self.tls)))
    }

    fn build(
        identity: ClusterIdentity,
        health: Health,
        dynamic_host: Option<String>,
        tls: Arc<ArcSwapOption<TlsConfigs>>,
    ) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Relaxed);
        let addresses = watch::Sender::new(Arc::new(fixed(&identity)));
        Self { id, addresses, dial_limits: Mutex::default(), tls, identity, health, dynamic_host }
    }

    /// Reads the certificates again, for the dynamic hosts too; open connections keep theirs.
    ///
    /// # Errors
    /// If a file cannot be used; the previous certificates stay in use.
    pub fn load_certificates(&self, roots: &SystemRoots) -> Result<(), CertificateError> {
        if let Some(tls) = &self.identity.tls {
            let (http1, http2) = match self.identity.protocol {
                UpstreamProtocol::Auto => (true, true),
                UpstreamProtocol::Http1 => (true, false),
                UpstreamProtocol::Http2 => (false, true),
            };
            let all = certificates::client(tls.ca.as_deref(), roots, http1, http2)?;
            let http1 = certificates::http1_only(&all);
            self.tls.store(Some(Arc::new(TlsConfigs { all, http1 })));
        }
        Ok(())
    }

    /// TLS settings for a new connection; `None` for plain text. With `http1_only`, ALPN offers HTTP/1.1 only.
    pub fn tls(&self, http1_only: bool) -> Option<Arc<ClientConfig>> {
        let configs = self.tls.load();
        configs.as_ref().map(|configs| Arc::clone(if http1_only { &configs.http1 } else { &configs.all }))
    }

    /// The names that `discovery` has to resolve, with their ports.
    pub fn names(&self) -> impl Iterator<Item = (&str, u16)> {
        self.identity.endpoints.iter().filter_map(|endpoint| match endpoint {
            EndpointSpec::Dns { name, port } => Some((name.as_str(), *port)),
            EndpointSpec::Address(_) => None,
        })
    }

    /// A receiver of address changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Addresses>> {
        self.addresses.subscribe()
    }

    /// The current addresses.
    pub fn addresses(&self) -> Arc<Addresses> {
        Arc::clone(&self.addresses.borrow())
    }

    /// Publishes the result of discovery: fixed addresses first, then `resolved`. Wakes receivers only if a value changed.
    ///
    /// Removes ejection members whose address is gone once `is_complete`, and reports the endpoint whose ejection ends
    /// because all others are gone.
    pub fn publish(&self, resolved: Vec<Address>, problem: Option<String>, is_complete: bool) {
        let mut next = fixed(&self.identity);
        (next.problem, next.is_complete) = (problem, is_complete);
        for address in resolved {
            if !next.list.contains(&address) {
                next.list.push(address);
            }
        }
        let now = Instant::now();
        let mut returned = None;
        self.addresses.send_if_modified(|current| {
            let is_changed = **current != next;
            if is_changed {
                returned = (is_complete && self.is_current()).then(|| self.retain_members(&next, now)).flatten();
                *current = Arc::new(next);
            }
            is_changed
        });
        if let (Some((member, change)), Some(telemetry)) = (returned, self.health.telemetry.get()) {
            self.ejection_changed(telemetry, &member, &change, now);
        }
    }

    /// Makes this the current cluster of the destination, after a reload: from now on only its addresses define the ejection
    /// members. Members at other addresses are removed, with `dns:` endpoints once all names have been resolved.
    ///
    /// Returns the member whose ejection ends because all others are gone, and the change.
    pub fn make_current(&self, now: Instant) -> Option<(Arc<EjectionMember>, StateChange)> {
        self.health.current_cluster.store(self.id, Relaxed);
        let addresses = self.addresses();
        addresses.is_complete.then(|| self.retain_members(&addresses, now))?
    }

    /// Whether this is the current cluster of the destination. A replaced cluster may still have calls, and its names are
    /// resolved for them.
    fn is_current(&self) -> bool {
        matches!(self.health.current_cluster.load(Relaxed), id if id == 0 || id == self.id)
    }

    /// The ejection member at an address; a replaced cluster adds no new member to the destination.
    pub fn member(&self, address: SocketAddr) -> Arc<EjectionMember> {
        self.health.group.member_if(address, || self.is_current())
    }

    /// The limit of connections being opened to an address, shared by all workers. Takes a lock: once per worker and address.
    pub fn dial_limit(&self, address: SocketAddr, now: Instant) -> Arc<DialLimit> {
        let mut limits = self.dial_limits.lock().unwrap_or_else(PoisonError::into_inner);
        limits.retain(|(_, limit)| limit.strong_count() > 0);
        let known = limits.iter().find(|(other, _)| *other == address).and_then(|(_, limit)| limit.upgrade());
        known.unwrap_or_else(|| {
            let limit = Arc::new(DialLimit::new(now));
            limits.push((address, Arc::downgrade(&limit)));
            limit
        })
    }

    fn retain_members(&self, addresses: &Addresses, now: Instant) -> Option<(Arc<EjectionMember>, StateChange)> {
        let sockets: Vec<_> = addresses.list.iter().map(|address| address.socket).collect();
        let before = self.health.ejected_count(now);
        let returned = self.health.group.retain(&sockets, now);
        let after = self.health.ejected_count(now);
        // A removed member is not ejected any more, and no other event reports that.
        if let Some(telemetry) = self.health.telemetry.get().filter(|_| before != after) {
            telemetry.set_ejected_endpoints(&self.identity.name, after);
        }
        returned
    }

    /// Reports that an endpoint was ejected, is probed, or has returned: a log line and metrics.
    pub fn ejection_changed(&self, telemetry: &Telemetry, member: &EjectionMember, change: &StateChange, now: Instant) {
        let result = match change.to {
            BreakerState::Open => "ejected",
            BreakerState::HalfOpen => "probed",
            BreakerState::Closed => "returned",
        };
        telemetry.ejection_changed(&self.identity.name, result, self.health.ejected_count(now));
        // u64, because tracing writes a u128 as a string.
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        tracing::warn!(
            destination = &*self.identity.name,
            dynamic_host = self.dynamic_host,
            endpoint = %member.address(),
            result,
            cause = change.cause.as_str(),
            consecutive = change.consecutive,
            ejected_for_ms = change.open_for.map(millis),
            "an endpoint changed its state"
        );
    }
}

impl Drop for Cluster {
    /// A dynamic host that is dropped while its breaker is open or an endpoint is ejected is not reported any more.
    fn drop(&mut self) {
        let now = Instant::now();
        if self.dynamic_host.is_some()
            && self.health.unregister(now)
            && let Some(telemetry) = self.health.telemetry.get()
        {
            let (state, ejected) = (self.health.breaker_state(now).number(), self.health.ejected_count(now));
            telemetry.set_health_gauges(&self.identity.name, state, ejected);
        }
    }
}

/// The addresses that need no resolution.
fn fixed(identity: &ClusterIdentity) -> Addresses {
    let mut list = Vec::new();
    for endpoint in &identity.endpoints {
        if let EndpointSpec::Address(socket) = endpoint {
            let address = Address { socket: *socket, server_name: Arc::clone(&identity.host) };
            if !list.contains(&address) {
                list.push(address);
            }
        }
    }
    let has_names = identity.endpoints.iter().any(|endpoint| matches!(endpoint, EndpointSpec::Dns { .. }));
    Addresses { list, problem: None, is_complete: !has_names }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::rc::Rc;
    use std::sync::Mutex;

    use super::*;
    use crate::rules::circuit_breaker::{Admission, CallResult, Thresholds};
    use crate::telemetry::{MemoryLines, PageFormat, Sink};
    use crate::upstream::connect::Network;
    use crate::upstream::discovery::Discovery;
    use crate::upstream::upstreams::Upstreams;

    const ONE: Thresholds = Thresholds {
        consecutive_failures: 1,
        rate: None,
        open_for: Duration::from_secs(60),
        open_for_max: Duration::from_secs(60),
        probes: 1,
    };

    /// Collects the process' own log.
    #[derive(Clone, Default)]
    struct CapturedLog(Arc<Mutex<Vec<u8>>>);

    impl Write for CapturedLog {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl CapturedLog {
        /// The lines logged during `work`.
        fn during(work: impl FnOnce()) -> Vec<String> {
            let captured = Self::default();
            let writer = captured.clone();
            let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
            tracing::subscriber::with_default(subscriber, work);
            String::from_utf8(captured.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
        }
    }

    fn address(last: u8) -> Address {
        Address { socket: SocketAddr::from(([10, 0, 0, last], 80)), server_name: "shop".into() }
    }

    fn named_cluster(name: &str, health: Health) -> Arc<Cluster> {
        let identity = ClusterIdentity {
            name: "shop".into(),
            endpoints: vec![EndpointSpec::Dns { name: name.into(), port: 80 }],
            protocol: UpstreamProtocol::Auto,
            tls: None,
            host: "shop".into(),
        };
        Cluster::new(identity, health, &Default::default()).unwrap()
    }

    /// A destination with one name, resolved to these addresses.
    fn cluster(addresses: &[u8]) -> (Arc<Cluster>, Arc<Telemetry>) {
        let cluster = named_cluster("shop.test", Health::new(Instant::now()));
        cluster.publish(addresses.iter().copied().map(address).collect(), None, true);
        let telemetry = Telemetry::new(Sink::Memory(MemoryLines::default()));
        // The pool of a worker adds the ejection members and sets the telemetry.
        let connector = Rc::new(Network);
        let pool = Upstreams::new(connector, Discovery::new().0, telemetry.shard(0)).pool(&cluster);
        pool.pick(Instant::now(), &[], true);
        (cluster, telemetry)
    }

    fn eject(cluster: &Cluster, telemetry: &Telemetry, last: u8) {
        let now = Instant::now();
        let member = cluster.health.group.member(address(last).socket);
        let Admission::Admit(permit) = member.admit(&ONE, now) else { panic!("not admitted") };
        match member.record(permit, &ONE, CallResult::Failure, now, 1.0) {
            Some(crate::rules::ejection::EjectionEvent::Ejected(change)) => {
                cluster.ejection_changed(telemetry, &member, &change, now);
            }
            other => panic!("not ejected: {other:?}"),
        }
    }

    fn metric(telemetry: &Telemetry, series: &str) -> Option<f64> {
        let page = telemetry.page(PageFormat::OpenMetrics);
        page.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
    }

    #[test]
    fn an_endpoint_that_returns_because_all_others_are_gone_is_reported_once() {
        let (cluster, telemetry) = cluster(&[1, 2]);
        eject(&cluster, &telemetry, 1);
        let out = "hopguard_ejected_endpoints{destination=\"shop\"}";
        assert_eq!(metric(&telemetry, out), Some(1.0));
        let logged = CapturedLog::during(|| {
            cluster.publish(vec![address(1)], None, true);
            cluster.publish(vec![address(1)], None, true);
        });
        assert_eq!(logged.len(), 1, "{logged:?}");
        for part in ["destination=\"shop\"", "endpoint=10.0.0.1:80", "result=\"returned\"", "cause=\"no_other_left\""] {
            assert!(logged[0].contains(part), "{part}: {logged:?}");
        }
        let returned = "hopguard_ejections_total{destination=\"shop\",result=\"returned\"}";
        assert_eq!((metric(&telemetry, returned), metric(&telemetry, out)), (Some(1.0), Some(0.0)));
    }

    #[test]
    fn a_replaced_cluster_removes_no_member_of_the_current_one() {
        let (old, telemetry) = cluster(&[1, 2]);
        let new = named_cluster("shop.new", old.health.clone());
        new.publish(vec![address(3), address(4)], None, true);
        assert!(new.make_current(Instant::now()).is_none());
        let members = || new.health.group.members().iter().map(|one| one.address()).collect::<Vec<_>>();
        [3, 4].iter().for_each(|last| drop(new.health.group.member(address(*last).socket)));
        eject(&new, &telemetry, 3);
        old.publish(vec![address(1)], None, true);
        assert_eq!(members(), [address(3).socket, address(4).socket]);
        new.publish(vec![address(3), address(5)], None, true);
        assert_eq!(members(), [address(3).socket]);
    }

    #[test]
    fn a_replaced_cluster_adds_no_member_to_the_current_one() {
        let (old, telemetry) = cluster(&[1, 2]);
        let upstreams = Upstreams::new(Rc::new(Network), Discovery::new().0, telemetry.shard(0));
        let old_pool = upstreams.pool(&old);
        let new = named_cluster("shop.new", old.health.clone());
        new.publish(vec![address(3)], None, true);
        new.make_current(Instant::now());
        upstreams.pool(&new).pick(Instant::now(), &[], true);
        old.publish(vec![address(3), address(9)], None, true);
        let tried = [address(3).socket];
        let picked = old_pool.pick(Instant::now(), &tried, true).map(|endpoint| endpoint.address.socket);
        assert_eq!(picked, Some(address(9).socket), "a call of the old policy still reaches it");
        let members: Vec<_> = new.health.group.members().iter().map(|one| one.address()).collect();
        assert_eq!(members, [address(3).socket]);
    }

    #[test]
    fn a_member_is_kept_until_all_names_have_been_resolved() {
        let (old, telemetry) = cluster(&[1, 2]);
        eject(&old, &telemetry, 1);
        let new = named_cluster("shop.new", old.health.clone());
        new.make_current(Instant::now());
        let members = || new.health.group.members().len();
        new.publish(vec![address(2)], None, false);
        assert_eq!(members(), 2, "the other may belong to a name that has not been resolved yet");
        new.publish(vec![address(2)], None, true);
        assert_eq!(members(), 1);
    }

    #[test]
    fn ejected_endpoints_are_counted_over_all_dynamic_hosts() {
        let (parent, telemetry) = cluster(&[]);
        let upstreams = Upstreams::new(Rc::new(Network), Discovery::new().0, telemetry.shard(0));
        let out = || metric(&telemetry, "hopguard_ejected_endpoints{destination=\"shop\"}");
        let pools = ["a.test", "b.test"].map(|host| upstreams.dynamic_pool(&parent, host, 80));
        for (number, pool) in pools.iter().enumerate() {
            pool.cluster.publish(vec![address(1), address(2)], None, true);
            pool.pick(Instant::now(), &[], true);
            eject(&pool.cluster, &telemetry, 1);
            assert_eq!(out(), Some(1.0 + number as f64));
        }
        pools[0].cluster.publish(vec![address(2)], None, true);
        assert_eq!(out(), Some(1.0));
    }

    #[test]
    fn an_ejected_endpoint_whose_address_is_gone_is_not_counted() {
        let (cluster, telemetry) = cluster(&[1, 2]);
        eject(&cluster, &telemetry, 1);
        let logged = CapturedLog::during(|| cluster.publish(vec![address(2), address(3)], None, true));
        assert_eq!(logged, Vec::<String>::new());
        assert_eq!(metric(&telemetry, "hopguard_ejected_endpoints{destination=\"shop\"}"), Some(0.0));
    }
}
