//! A destination's endpoints as all workers see them: addresses, protocol, TLS, and the gate of its limits.
//!
//! A cluster lives as long as the policy names the same endpoints, protocol and TLS for the destination;
//! changed timeouts or limits leave it, its connections and its counters alone.

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
use crate::upstream::spec::{EndpointSpec, UpstreamProtocol, UpstreamTls};

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
pub struct ClusterIdentity {
    /// The destination's name.
    pub name: Arc<str>,
    /// The endpoints as the policy has them.
    pub endpoints: Vec<EndpointSpec>,
    /// The protocol to speak.
    pub protocol: UpstreamProtocol,
    /// TLS to the endpoints.
    pub tls: Option<UpstreamTls>,
    /// The name for certificates of endpoints that have none themselves; empty where none is asked for.
    pub host: Arc<str>,
}

/// What the failures of a destination have led to, shared by all workers. Lives as long as the policy names the
/// destination, whatever becomes of its endpoints and values. Where callers name the places to go to, each place has
/// one of its own.
#[derive(Clone)]
pub struct Health {
    /// The circuit breaker.
    pub breaker: Arc<Breaker>,
    /// Which endpoints are ejected.
    pub group: Arc<EjectionGroup>,
    /// What may be spent on retries.
    pub budget: Arc<RetryBudget>,
    /// The cluster that a reload has put into force, and that alone says which endpoints there are; 0 before the first.
    in_force: Arc<AtomicU64>,
    /// Whether the policy in force has no circuit breaker, and no ejection, for the destination.
    hidden: Arc<[AtomicBool; 2]>,
    /// Where changes are told that no call causes.
    telemetry: Arc<OnceLock<Arc<Telemetry>>>,
    /// What is shown of the destination: this, and whatever else shares the list.
    shown: Arc<Mutex<Vec<Shown>>>,
}

/// What a destination, or a place that it leads to, adds to what is shown of the destination; gone with the place.
type Shown = (Weak<Breaker>, Weak<EjectionGroup>);

impl Health {
    /// Nothing has failed yet.
    pub fn new(now: Instant) -> Self {
        let this = Self {
            breaker: Breaker::new(now),
            group: EjectionGroup::new(now),
            budget: RetryBudget::new(),
            in_force: Arc::default(),
            hidden: Arc::default(),
            telemetry: Arc::default(),
            shown: Arc::default(),
        };
        this.be_shown();
        this
    }

    /// That of a place: one place's failures say nothing about the others. It is shown together with them.
    fn place(&self, now: Instant) -> Self {
        let (breaker, group, budget) = (Breaker::new(now), EjectionGroup::new(now), RetryBudget::new());
        let this = Self { breaker, group, budget, in_force: Arc::default(), ..self.clone() };
        this.be_shown();
        this
    }

    fn be_shown(&self) {
        let mut all = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(breaker, _)| breaker.strong_count() > 0);
        all.push((Arc::downgrade(&self.breaker), Arc::downgrade(&self.group)));
    }

    /// Says which of the two rules the policy in force has. What has failed is remembered without them, but it is not
    /// shown, whatever calls of an older policy still bring about. True if that is a change.
    pub fn show(&self, breaker: bool, ejection: bool) -> bool {
        let was = [self.hidden[0].swap(!breaker, Relaxed), self.hidden[1].swap(!ejection, Relaxed)];
        was != [!breaker, !ejection]
    }

    /// The state of the circuit breaker as it is shown: of several places, the worst.
    pub fn state_now(&self, now: Instant) -> BreakerState {
        if self.hidden[0].load(Relaxed) {
            return BreakerState::Closed;
        }
        let states: Vec<_> = self.all_shown(|(breaker, _)| Some(breaker.upgrade()?.state(now)));
        [BreakerState::Open, BreakerState::HalfOpen]
            .into_iter()
            .find(|state| states.contains(state))
            .unwrap_or(BreakerState::Closed)
    }

    /// Tells `telemetry` of changes that no call causes. Whoever makes calls has to say this first: only calls eject.
    pub fn report_to(&self, telemetry: &Arc<Telemetry>) {
        self.telemetry.get_or_init(|| Arc::clone(telemetry));
    }

    /// How many endpoints are out, and get no calls or would get none; of several places, all together.
    pub fn out_now(&self, now: Instant) -> usize {
        if self.hidden[1].load(Relaxed) {
            return 0;
        }
        let out = |group: Arc<EjectionGroup>| group.members().iter().filter(|member| member.is_out(now)).count();
        self.all_shown(|(_, group)| group.upgrade().map(out)).iter().sum()
    }

    /// Shows no more of this one. True if there was something to be seen.
    fn hide(&self, now: Instant) -> bool {
        let mut all = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(breaker, _)| breaker.as_ptr() != Arc::as_ptr(&self.breaker));
        self.breaker.state(now) != BreakerState::Closed || self.group.members().iter().any(|member| member.is_out(now))
    }

    /// Whether it keeps calls away, from all endpoints or from some. What waits to be tried does not.
    pub fn is_open(&self, now: Instant) -> bool {
        self.breaker.state(now) == BreakerState::Open
            || self.group.members().iter().any(|member| member.state(now) == BreakerState::Open)
    }

    fn all_shown<T>(&self, look: impl Fn(&Shown) -> Option<T>) -> Vec<T> {
        let all = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter_map(look).collect()
    }
}

/// The shared side of a destination's endpoints.
pub struct Cluster {
    /// Unique within the process; pools are found by it.
    pub id: u64,
    /// What it was made from.
    pub identity: ClusterIdentity,
    /// What its failures have led to.
    pub health: Health,
    /// Host and port of a place that callers have named.
    pub place: Option<String>,
    addresses: watch::Sender<Arc<Addresses>>,
    /// One for a destination and all the places that it leads to.
    tls: Arc<ArcSwapOption<Offers>>,
}

/// TLS settings, by the protocols that are offered.
struct Offers {
    /// Those that the policy allows.
    all: Arc<ClientConfig>,
    /// HTTP/1.1 alone.
    http1: Arc<ClientConfig>,
}

impl Cluster {
    /// A cluster whose fixed addresses are known and whose names are still to be resolved.
    ///
    /// Fails if TLS is wanted and the certificates cannot be used.
    pub fn new(identity: ClusterIdentity, health: Health, roots: &SystemRoots) -> Result<Arc<Self>, CertificateError> {
        let cluster = Self::with(identity, health, None, Arc::default());
        cluster.load_certificates(roots)?;
        Ok(Arc::new(cluster))
    }

    /// A cluster for a place that callers of this one want to reach, with the certificates of this one.
    pub fn place(&self, name: String, endpoint: EndpointSpec, host: &str) -> Arc<Self> {
        let identity = ClusterIdentity { endpoints: vec![endpoint], host: host.into(), ..self.identity.clone() };
        let health = self.health.place(Instant::now());
        Arc::new(Self::with(identity, health, Some(name), Arc::clone(&self.tls)))
    }

    fn with(identity: ClusterIdentity, health: Health, place: Option<String>, tls: Arc<ArcSwapOption<Offers>>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Relaxed);
        Self { id, addresses: watch::Sender::new(Arc::new(fixed(&identity))), tls, identity, health, place }
    }

    /// Reads the certificates again, for its places too; connections that exist keep theirs. On an error the old ones stay.
    pub fn load_certificates(&self, roots: &SystemRoots) -> Result<(), CertificateError> {
        if let Some(tls) = &self.identity.tls {
            let (http1, http2) = match self.identity.protocol {
                UpstreamProtocol::Auto => (true, true),
                UpstreamProtocol::Http1 => (true, false),
                UpstreamProtocol::Http2 => (false, true),
            };
            let all = certificates::client(tls.ca.as_deref(), roots, http1, http2)?;
            let http1 = certificates::http1_only(&all);
            self.tls.store(Some(Arc::new(Offers { all, http1 })));
        }
        Ok(())
    }

    /// TLS settings, if this cluster is called over TLS; with `http1_only` nothing else is offered.
    pub fn tls(&self, http1_only: bool) -> Option<Arc<ClientConfig>> {
        let offers = self.tls.load();
        offers.as_ref().map(|offers| Arc::clone(if http1_only { &offers.http1 } else { &offers.all }))
    }

    /// The names that discovery has to resolve, with their ports.
    pub fn names(&self) -> impl Iterator<Item = (&str, u16)> {
        self.identity.endpoints.iter().filter_map(|endpoint| match endpoint {
            EndpointSpec::Dns { name, port } => Some((name.as_str(), *port)),
            EndpointSpec::Address(_) => None,
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

    /// Takes up what discovery found: fixed addresses first, then `resolved`. Wakes nobody if nothing changed. Tells of the
    /// endpoint that is taken back because all others are gone; none is gone before all is `settled`.
    pub fn publish(&self, resolved: Vec<Address>, problem: Option<String>, settled: bool) {
        let mut next = fixed(&self.identity);
        (next.problem, next.settled) = (problem, settled);
        for address in resolved {
            if !next.list.contains(&address) {
                next.list.push(address);
            }
        }
        let now = Instant::now();
        let mut back = None;
        self.addresses.send_if_modified(|present| {
            let changed = **present != next;
            if changed {
                back = (settled && self.has_a_say()).then(|| self.retain(&next, now)).flatten();
                *present = Arc::new(next);
            }
            changed
        });
        if let (Some((member, change)), Some(telemetry)) = (back, self.health.telemetry.get()) {
            self.ejection_changed(telemetry, &member, &change, now);
        }
    }

    /// Forgets what endpoints did that the policy no longer names; those found by name are forgotten when they are found
    /// no more. Returns the endpoint that is taken back because all others are gone. From now on no other cluster of the
    /// destination has a say in that.
    pub fn forget_others(&self, now: Instant) -> Option<(Arc<EjectionMember>, StateChange)> {
        self.health.in_force.store(self.id, Relaxed);
        let addresses = self.addresses();
        addresses.settled.then(|| self.retain(&addresses, now))?
    }

    /// Whether this one says which endpoints the destination has. One that was replaced still has calls, and its names
    /// are followed for them.
    fn has_a_say(&self) -> bool {
        matches!(self.health.in_force.load(Relaxed), id if id == 0 || id == self.id)
    }

    /// The member at one of the addresses, which a replaced cluster does not add to those of the destination.
    pub fn member(&self, address: SocketAddr) -> Arc<EjectionMember> {
        self.health.group.member_if(address, || self.has_a_say())
    }

    fn retain(&self, addresses: &Addresses, now: Instant) -> Option<(Arc<EjectionMember>, StateChange)> {
        let sockets: Vec<_> = addresses.list.iter().map(|address| address.socket).collect();
        let before = self.health.out_now(now);
        let back = self.health.group.retain(&sockets, now);
        let after = self.health.out_now(now);
        // An endpoint that is gone is not out any more, and no event says so.
        if let Some(telemetry) = self.health.telemetry.get().filter(|_| before != after) {
            telemetry.set_ejected_endpoints(&self.identity.name, after);
        }
        back
    }

    /// Tells that an endpoint is out, is being tried, or is in again: a log line and a metric.
    pub fn ejection_changed(&self, telemetry: &Telemetry, member: &EjectionMember, change: &StateChange, now: Instant) {
        let result = match change.to {
            BreakerState::Open => "ejected",
            BreakerState::HalfOpen => "probed",
            BreakerState::Closed => "returned",
        };
        telemetry.ejection_changed(&self.identity.name, result, self.health.out_now(now));
        // A number of 128 bits would be written as a string.
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        tracing::warn!(
            destination = &*self.identity.name,
            place = self.place,
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
    /// A place that is forgotten while it keeps calls away counts no more.
    fn drop(&mut self) {
        let now = Instant::now();
        if self.place.is_some()
            && self.health.hide(now)
            && let Some(telemetry) = self.health.telemetry.get()
        {
            let (state, out) = (self.health.state_now(now).number(), self.health.out_now(now));
            telemetry.set_health_gauges(&self.identity.name, state, out);
        }
    }
}

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
    let named = identity.endpoints.iter().any(|endpoint| matches!(endpoint, EndpointSpec::Dns { .. }));
    Addresses { list, problem: None, settled: !named }
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

    /// What the process says about itself.
    #[derive(Clone, Default)]
    struct Said(Arc<Mutex<Vec<u8>>>);

    impl Write for Said {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Said {
        fn during(work: impl FnOnce()) -> Vec<String> {
            let said = Self::default();
            let writer = said.clone();
            let log = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
            tracing::subscriber::with_default(log, work);
            String::from_utf8(said.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
        }
    }

    fn address(last: u8) -> Address {
        Address { socket: SocketAddr::from(([10, 0, 0, last], 80)), server_name: "shop".into() }
    }

    fn behind(name: &str, health: Health) -> Arc<Cluster> {
        let identity = ClusterIdentity {
            name: "shop".into(),
            endpoints: vec![EndpointSpec::Dns { name: name.into(), port: 80 }],
            protocol: UpstreamProtocol::Auto,
            tls: None,
            host: "shop".into(),
        };
        Cluster::new(identity, health, &Default::default()).unwrap()
    }

    /// A destination behind one name, which is at these addresses.
    fn cluster(addresses: &[u8]) -> (Arc<Cluster>, Arc<Telemetry>) {
        let cluster = behind("shop.test", Health::new(Instant::now()));
        cluster.publish(addresses.iter().copied().map(address).collect(), None, true);
        let telemetry = Telemetry::new(Sink::Memory(MemoryLines::default()));
        // A worker that calls it knows the members and whom to tell of them.
        let connector = Rc::new(Network);
        let pool = Upstreams::new(connector, Discovery::new().0, telemetry.shard(0)).pool(&cluster);
        pool.pick_now(Instant::now(), &[], true);
        (cluster, telemetry)
    }

    fn eject(cluster: &Cluster, telemetry: &Telemetry, last: u8) {
        let now = Instant::now();
        let member = cluster.health.group.member(address(last).socket);
        let Admission::Admit(pass) = member.admit(&ONE, now) else { panic!("no pass") };
        match member.record(pass, &ONE, CallResult::Failure, now, 1.0) {
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
    fn an_endpoint_that_is_taken_back_because_the_name_has_lost_all_others_is_told_once() {
        let (cluster, telemetry) = cluster(&[1, 2]);
        eject(&cluster, &telemetry, 1);
        let out = "hopguard_ejected_endpoints{destination=\"shop\"}";
        assert_eq!(metric(&telemetry, out), Some(1.0));
        let said = Said::during(|| {
            cluster.publish(vec![address(1)], None, true);
            cluster.publish(vec![address(1)], None, true);
        });
        assert_eq!(said.len(), 1, "{said:?}");
        for part in ["destination=\"shop\"", "endpoint=10.0.0.1:80", "result=\"returned\"", "cause=\"no_other_left\""] {
            assert!(said[0].contains(part), "{part}: {said:?}");
        }
        let back = "hopguard_ejections_total{destination=\"shop\",result=\"returned\"}";
        assert_eq!((metric(&telemetry, back), metric(&telemetry, out)), (Some(1.0), Some(0.0)));
    }

    #[test]
    fn a_name_that_a_reload_has_replaced_forgets_no_endpoint_of_the_new_one() {
        let (old, telemetry) = cluster(&[1, 2]);
        let new = behind("shop.new", old.health.clone());
        new.publish(vec![address(3), address(4)], None, true);
        assert!(new.forget_others(Instant::now()).is_none());
        let members = || new.health.group.members().iter().map(|one| one.address()).collect::<Vec<_>>();
        [3, 4].iter().for_each(|last| drop(new.health.group.member(address(*last).socket)));
        eject(&new, &telemetry, 3);
        old.publish(vec![address(1)], None, true);
        assert_eq!(members(), [address(3).socket, address(4).socket]);
        new.publish(vec![address(3), address(5)], None, true);
        assert_eq!(members(), [address(3).socket]);
    }

    #[test]
    fn a_name_that_a_reload_has_replaced_adds_no_endpoint_to_the_new_one() {
        let (old, telemetry) = cluster(&[1, 2]);
        let upstreams = Upstreams::new(Rc::new(Network), Discovery::new().0, telemetry.shard(0));
        let under_way = upstreams.pool(&old);
        let new = behind("shop.new", old.health.clone());
        new.publish(vec![address(3)], None, true);
        new.forget_others(Instant::now());
        upstreams.pool(&new).pick_now(Instant::now(), &[], true);
        old.publish(vec![address(3), address(9)], None, true);
        let tried = [address(3).socket];
        let found = under_way.pick_now(Instant::now(), &tried, true).map(|endpoint| endpoint.address.socket);
        assert_eq!(found, Some(address(9).socket), "a call under way finds it all the same");
        let members: Vec<_> = new.health.group.members().iter().map(|one| one.address()).collect();
        assert_eq!(members, [address(3).socket]);
    }

    #[test]
    fn an_endpoint_is_remembered_until_all_names_have_been_asked_for() {
        let (old, telemetry) = cluster(&[1, 2]);
        eject(&old, &telemetry, 1);
        let new = behind("shop.new", old.health.clone());
        new.forget_others(Instant::now());
        let members = || new.health.group.members().len();
        new.publish(vec![address(2)], None, false);
        assert_eq!(members(), 2, "the other may be behind a name that has not answered yet");
        new.publish(vec![address(2)], None, true);
        assert_eq!(members(), 1);
    }

    #[test]
    fn what_is_out_is_counted_over_all_places() {
        let (parent, telemetry) = cluster(&[]);
        let upstreams = Upstreams::new(Rc::new(Network), Discovery::new().0, telemetry.shard(0));
        let out = || metric(&telemetry, "hopguard_ejected_endpoints{destination=\"shop\"}");
        let places = ["a.test", "b.test"].map(|host| upstreams.place(&parent, host, 80));
        for (number, place) in places.iter().enumerate() {
            place.cluster.publish(vec![address(1), address(2)], None, true);
            place.pick_now(Instant::now(), &[], true);
            eject(&place.cluster, &telemetry, 1);
            assert_eq!(out(), Some(1.0 + number as f64));
        }
        places[0].cluster.publish(vec![address(2)], None, true);
        assert_eq!(out(), Some(1.0));
    }

    #[test]
    fn an_endpoint_that_is_out_and_goes_away_is_not_counted_as_out_any_more() {
        let (cluster, telemetry) = cluster(&[1, 2]);
        eject(&cluster, &telemetry, 1);
        let said = Said::during(|| cluster.publish(vec![address(2), address(3)], None, true));
        assert_eq!(said, Vec::<String>::new());
        assert_eq!(metric(&telemetry, "hopguard_ejected_endpoints{destination=\"shop\"}"), Some(0.0));
    }
}
