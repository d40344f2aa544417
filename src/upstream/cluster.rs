//! A destination's endpoints as all workers see them: addresses, protocol, TLS, and the gate of its limits.
//!
//! A cluster lives as long as the policy names the same endpoints, protocol and TLS for the destination;
//! changed timeouts or limits leave it, its connections and its counters alone.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use rustls::ClientConfig;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::net::certificates::{self, CertificateError};
use crate::rules::breaker::{Breaker, Change, State};
use crate::rules::budget::Budget;
use crate::rules::ejection::{Group, Member};
use crate::telemetry::Telemetry;
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
    /// The cluster that a reload has put into force, and that alone says which endpoints there are; 0 before the first.
    in_force: Arc<AtomicU64>,
    /// Whether the policy in force has no circuit breaker, and no ejection, for the destination.
    hidden: Arc<[AtomicBool; 2]>,
    /// Where changes are told that no call causes.
    telemetry: Arc<OnceLock<Arc<Telemetry>>>,
}

impl Health {
    /// Nothing has failed yet.
    pub fn new(now: Instant) -> Self {
        let (breaker, group, budget) = (Breaker::new(now), Group::new(now), Budget::new());
        Self { breaker, group, budget, in_force: Arc::default(), hidden: Arc::default(), telemetry: Arc::default() }
    }

    /// Says which of the two rules the policy in force has. What has failed is remembered without them, but it is not shown,
    /// whatever calls of an older policy still bring about. True if that is a change.
    pub fn show(&self, breaker: bool, ejection: bool) -> bool {
        let was = [self.hidden[0].swap(!breaker, Relaxed), self.hidden[1].swap(!ejection, Relaxed)];
        was != [!breaker, !ejection]
    }

    /// The state of the circuit breaker as it is shown, if it is in `state`.
    pub fn shown(&self, state: State) -> State {
        if self.hidden[0].load(Relaxed) { State::Closed } else { state }
    }

    /// Tells `telemetry` of changes that no call causes. Whoever makes calls has to say this first: only calls eject.
    pub fn report_to(&self, telemetry: &Arc<Telemetry>) {
        self.telemetry.get_or_init(|| Arc::clone(telemetry));
    }

    /// How many endpoints are out, and get no calls or would get none.
    pub fn out_now(&self, now: Instant) -> usize {
        if self.hidden[1].load(Relaxed) {
            return 0;
        }
        self.group.members().iter().filter(|member| member.is_out(now)).count()
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

    /// Takes up what discovery found: fixed addresses first, then `resolved`. Wakes nobody if nothing changed. Tells of the
    /// endpoint that is taken back because all others are gone.
    pub fn publish(&self, resolved: Vec<Address>, problem: Option<String>) {
        let mut next = fixed(&self.identity);
        next.problem = problem;
        next.settled = true;
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
                // One that was replaced still has calls, and its names are followed for them.
                let may_forget = matches!(self.health.in_force.load(Relaxed), id if id == 0 || id == self.id);
                back = may_forget.then(|| self.retain(&next, now)).flatten();
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
    pub fn forget_others(&self, now: Instant) -> Option<(Arc<Member>, Change)> {
        self.health.in_force.store(self.id, Relaxed);
        let addresses = self.addresses();
        addresses.settled.then(|| self.retain(&addresses, now))?
    }

    fn retain(&self, addresses: &Addresses, now: Instant) -> Option<(Arc<Member>, Change)> {
        let sockets: Vec<_> = addresses.list.iter().map(|address| address.socket).collect();
        let before = self.health.out_now(now);
        let back = self.health.group.retain(&sockets, now);
        let after = self.health.out_now(now);
        // An endpoint that is gone is not out any more, and no event says so.
        if let Some(telemetry) = self.health.telemetry.get().filter(|_| before != after) {
            telemetry.endpoints_out(&self.identity.name, after);
        }
        back
    }

    /// Tells that an endpoint is out, is being tried, or is in again: a log line and a metric.
    pub fn ejection_changed(&self, telemetry: &Telemetry, member: &Member, change: &Change, now: Instant) {
        let word = match change.to {
            State::Open => "out",
            State::HalfOpen => "tried",
            State::Closed => "in",
        };
        telemetry.ejection_changed(&self.identity.name, word, self.health.out_now(now));
        // A number of 128 bits would be written as a string.
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        tracing::warn!(
            destination = &*self.identity.name,
            endpoint = %member.address(),
            change = word,
            cause = change.cause.as_str(),
            consecutive = change.consecutive,
            out_for_ms = change.open_for.map(millis),
            "an endpoint changed its state"
        );
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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::rc::Rc;
    use std::sync::Mutex;

    use super::*;
    use crate::rules::breaker::{Admission, Outcome, Thresholds};
    use crate::telemetry::{MemoryLines, PageFormat, Sink};
    use crate::upstream::connect::Network;
    use crate::upstream::discovery::Discovery;
    use crate::upstream::worker::Upstreams;

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
        let identity = Identity {
            name: "shop".into(),
            endpoints: vec![Endpoint::Dns { name: name.into(), port: 80 }],
            protocol: Protocol::Auto,
            tls: None,
            host: "shop".into(),
        };
        Cluster::new(identity, health).unwrap()
    }

    /// A destination behind one name, which is at these addresses.
    fn cluster(addresses: &[u8]) -> (Arc<Cluster>, Arc<Telemetry>) {
        let cluster = behind("shop.test", Health::new(Instant::now()));
        cluster.publish(addresses.iter().copied().map(address).collect(), None);
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
        let Admission::Pass(pass) = member.admit(&ONE, now) else { panic!("no pass") };
        match member.record(pass, &ONE, Outcome::Failure, now, 1.0) {
            Some(crate::rules::ejection::Event::Ejected(change)) => {
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
            cluster.publish(vec![address(1)], None);
            cluster.publish(vec![address(1)], None);
        });
        assert_eq!(said.len(), 1, "{said:?}");
        for part in ["destination=\"shop\"", "endpoint=10.0.0.1:80", "change=\"in\"", "cause=\"no_other_left\""] {
            assert!(said[0].contains(part), "{part}: {said:?}");
        }
        let back = "hopguard_ejections_total{destination=\"shop\",change=\"in\"}";
        assert_eq!((metric(&telemetry, back), metric(&telemetry, out)), (Some(1.0), Some(0.0)));
    }

    #[test]
    fn a_name_that_a_reload_has_replaced_forgets_no_endpoint_of_the_new_one() {
        let (old, telemetry) = cluster(&[1, 2]);
        let new = behind("shop.new", old.health.clone());
        new.publish(vec![address(3), address(4)], None);
        assert!(new.forget_others(Instant::now()).is_none());
        let members = || new.health.group.members().iter().map(|one| one.address()).collect::<Vec<_>>();
        [3, 4].iter().for_each(|last| drop(new.health.group.member(address(*last).socket)));
        eject(&new, &telemetry, 3);
        old.publish(vec![address(1)], None);
        assert_eq!(members(), [address(3).socket, address(4).socket]);
        new.publish(vec![address(3), address(5)], None);
        assert_eq!(members(), [address(3).socket]);
    }

    #[test]
    fn an_endpoint_that_is_out_and_goes_away_is_not_counted_as_out_any_more() {
        let (cluster, telemetry) = cluster(&[1, 2]);
        eject(&cluster, &telemetry, 1);
        let said = Said::during(|| cluster.publish(vec![address(2), address(3)], None));
        assert_eq!(said, Vec::<String>::new());
        assert_eq!(metric(&telemetry, "hopguard_ejected_endpoints{destination=\"shop\"}"), Some(0.0));
    }
}
