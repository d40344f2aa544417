//! Keeps the addresses of clusters fresh: asks for each name again when its answer's time to live is over.
//!
//! Runs on one thread for the whole process, so that workers share one resolver and one cache. Each name of a cluster is
//! followed for itself: one whose server is silent holds up no other. A time to live is
//! kept between a floor and a ceiling; a name that does not exist is asked for again soon, because at start-up
//! it often comes into being a moment later; when the resolver fails, the old addresses stay.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::runtime::tasks;
use crate::upstream::cluster::{Address, Cluster};
use crate::upstream::spec::EndpointSpec;

/// An answer is believed for at least and at most so long.
pub const TTL_FLOOR: Duration = Duration::from_secs(1);
/// See [`TTL_FLOOR`].
pub const TTL_CEILING: Duration = Duration::from_secs(60);

/// A failure is tried again after the first, then after twice that, and so on up to the second.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MOST: Duration = Duration::from_secs(5);

/// Destinations without endpoints may lead to so many different places before the ones nobody uses are forgotten.
const MAX_DYNAMIC_HOSTS: usize = 4096;

/// What a resolver said.
pub struct Resolved {
    /// The addresses, which may be none.
    pub addresses: Vec<IpAddr>,
    /// How long to believe it.
    pub ttl: Duration,
}

/// Asks for names; the seam for tests.
pub trait Resolve {
    /// The addresses of `name`, or what went wrong, in words.
    fn resolve(&self, name: &str) -> impl Future<Output = Result<Resolved, String>>;
}

/// Asks the servers that the system's settings name, and the hosts file before them.
pub struct SystemResolver(TokioResolver);

impl SystemResolver {
    /// Reads the system's settings; returns what is wrong with them too, if they cannot be used. The hosts file still
    /// counts then, and the server on this machine is asked, as resolv.conf(5) has it for settings that name none.
    /// Fails if there can be no resolver at all.
    pub fn new() -> Result<(Self, Option<String>), String> {
        let (mut builder, problem) = match TokioResolver::builder_tokio() {
            Ok(builder) => (builder, None),
            Err(error) => {
                let here = NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into());
                let config = ResolverConfig::from_parts(None, Vec::new(), vec![here]);
                let provider = TokioRuntimeProvider::default();
                (TokioResolver::builder_with_config(config, provider), Some(error.to_string()))
            }
        };
        let options = builder.options_mut();
        options.timeout = Duration::from_secs(2);
        options.attempts = 2;
        // Discovery itself decides when to ask again; a cache behind it would only answer with what is old.
        options.cache_size = 0;
        builder.build().map(|resolver| (Self(resolver), problem)).map_err(|error| error.to_string())
    }
}

impl Resolve for SystemResolver {
    async fn resolve(&self, name: &str) -> Result<Resolved, String> {
        let answer = self.0.lookup_ip(name).await.map_err(|error| in_words(&error))?;
        let ttl = answer.valid_until().saturating_duration_since(Instant::now().into_std());
        Ok(Resolved { addresses: answer.iter().collect(), ttl })
    }
}

/// Stands in where there can be no resolver: says so to whoever asks.
pub struct NoResolver(pub String);

impl Resolve for NoResolver {
    async fn resolve(&self, _name: &str) -> Result<Resolved, String> {
        Err(self.0.clone())
    }
}

/// What the resolver's answer means; its own words for an answer without an address are made for debugging.
fn in_words(error: &NetError) -> String {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(none)) => match none.response_code {
            ResponseCode::NXDomain => "there is no such name".to_owned(),
            ResponseCode::NoError => "the name has no address".to_owned(),
            code => format!("the name server answered: {code}"),
        },
        error => error.to_string(),
    }
}

/// A place that callers of an endpoint-less destination want to reach.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DynamicHost {
    /// The destination's cluster.
    pub parent: u64,
    /// The host, in small letters; an IPv6 address in brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

type DynamicHosts = HashMap<DynamicHost, Weak<Cluster>>;

/// The way to discovery from everywhere else.
#[derive(Clone)]
pub struct Discovery {
    requests: Requests,
    places: Arc<Mutex<DynamicHosts>>,
}

/// The clusters whose discovery is to begin.
///
/// A list and not a channel: a policy is compiled on the thread that works through them, so nobody takes any from it in
/// the meantime, and it is to hold all the names of any policy. A cluster is in it at most once.
#[derive(Clone, Default)]
pub struct Requests(Arc<Waiting>);

#[derive(Default)]
struct Waiting {
    clusters: Mutex<Vec<Weak<Cluster>>>,
    more: Notify,
}

impl Requests {
    fn add(&self, cluster: Weak<Cluster>) {
        self.0.clusters.lock().unwrap_or_else(PoisonError::into_inner).push(cluster);
        self.0.more.notify_one();
    }

    /// All of them, as soon as there are any.
    async fn take(&self) -> Vec<Weak<Cluster>> {
        loop {
            let clusters = std::mem::take(&mut *self.0.clusters.lock().unwrap_or_else(PoisonError::into_inner));
            if !clusters.is_empty() {
                return clusters;
            }
            self.0.more.notified().await;
        }
    }
}

impl Discovery {
    /// A handle, and the requests that it makes.
    pub fn new() -> (Self, Requests) {
        let requests = Requests::default();
        (Self { requests: requests.clone(), places: Arc::default() }, requests)
    }

    /// Keeps a cluster's addresses fresh for as long as somebody holds it.
    pub fn follow(&self, cluster: &Arc<Cluster>) {
        if cluster.names().next().is_some() {
            self.requests.add(Arc::downgrade(cluster));
        }
    }

    /// The cluster for one place.
    ///
    /// All workers get the same one.
    pub fn place(&self, parent: &Cluster, place: DynamicHost) -> Arc<Cluster> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = places.get(&place).and_then(Weak::upgrade) {
            return known;
        }
        if places.len() >= MAX_DYNAMIC_HOSTS {
            places.retain(|_, place| place.strong_count() > 0);
        }
        let (host, port) = (place.host.as_str(), place.port);
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let endpoint = match bare.parse::<IpAddr>() {
            Ok(ip) => EndpointSpec::Address(SocketAddr::new(ip, port)),
            Err(_) => EndpointSpec::Dns { name: host.to_owned(), port },
        };
        let cluster = parent.place(format!("{host}:{port}"), endpoint, bare);
        places.insert(place, Arc::downgrade(&cluster));
        drop(places);
        self.follow(&cluster);
        cluster
    }
}

/// Begins discovery for each cluster that is asked for.
pub async fn run<R: Resolve + 'static>(resolver: R, requests: Requests) {
    let resolver = std::rc::Rc::new(resolver);
    loop {
        for cluster in requests.take().await {
            let resolver = std::rc::Rc::clone(&resolver);
            tasks::spawn(async move { keep_fresh(&*resolver, cluster).await });
        }
    }
}

/// Resolves all names of a cluster again and again, each at its own time, until nobody holds the cluster any more.
async fn keep_fresh(resolver: &impl Resolve, cluster: Weak<Cluster>) {
    let Some(alive) = cluster.upgrade() else { return };
    let names: Vec<_> = alive.names().map(|(name, port)| Known::new(name, port)).collect();
    drop(alive);
    let all = RefCell::new(names);
    let count = all.borrow().len();
    join_all((0..count).map(|at| keep_name_fresh(resolver, &cluster, &all, at))).await;
}

/// The same for one of them, which stands at `at`.
async fn keep_name_fresh(resolver: &impl Resolve, cluster: &Weak<Cluster>, all: &RefCell<Vec<Known>>, at: usize) {
    let name = all.borrow()[at].name.clone();
    let mut retry = RETRY_FIRST;
    while cluster.strong_count() > 0 {
        let answer = resolver.resolve(&name).await;
        let Some(alive) = cluster.upgrade() else { return };
        let wait = match &answer {
            Ok(answer) => answer.ttl.clamp(TTL_FLOOR, TTL_CEILING),
            Err(_) => retry,
        };
        retry = if answer.is_ok() { RETRY_FIRST } else { (retry * 2).min(RETRY_MOST) };
        take_up(&alive, &mut all.borrow_mut(), at, answer);
        drop(alive);
        sleep(wait).await;
    }
}

/// What is known of one name of a cluster.
struct Known {
    name: String,
    port: u16,
    /// What the resolver said last, where that was no failure.
    addresses: Vec<IpAddr>,
    /// How it failed last, if it did.
    problem: Option<String>,
    /// It has answered or failed at least once.
    asked: bool,
}

impl Known {
    fn new(name: &str, port: u16) -> Self {
        Self { name: name.to_owned(), port, addresses: Vec::new(), problem: None, asked: false }
    }
}

/// Puts what is known of all names by now into force. One log line when a name begins to fail, and one when all of them
/// are well again.
fn take_up(cluster: &Cluster, all: &mut [Known], at: usize, answer: Result<Resolved, String>) {
    let one = &mut all[at];
    let before = one.problem.take();
    one.asked = true;
    match answer {
        Ok(answer) => one.addresses = answer.addresses,
        Err(error) => one.problem = Some(format!("{}: {error}", one.name)),
    }
    let destination = &*cluster.identity.name;
    if let (None, Some(problem)) = (&before, &one.problem) {
        let kept = cluster.addresses().list.len();
        tracing::warn!(destination, problem, kept, "a name cannot be resolved; the addresses known so far stay");
    }
    let problems: Vec<_> = all.iter().filter_map(|one| one.problem.as_deref()).collect();
    if before.is_some() && problems.is_empty() {
        tracing::info!(destination, "all names are resolved again");
    }
    let problem = (!problems.is_empty()).then(|| problems.join("; "));
    cluster.publish(addresses(cluster, all), problem, all.iter().all(|one| one.asked));
}

fn addresses(cluster: &Cluster, all: &[Known]) -> Vec<Address> {
    let wanted = cluster.identity.tls.as_ref().and_then(|tls| tls.server_name.as_deref());
    all.iter()
        .flat_map(|one| {
            let server_name: Arc<str> = wanted.unwrap_or(one.name.trim_end_matches('.')).into();
            let address = move |ip: &IpAddr| {
                let socket = SocketAddr::new(*ip, one.port);
                Address { socket, server_name: Arc::clone(&server_name) }
            };
            one.addresses.iter().map(address)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::cluster::{ClusterIdentity, Health};
    use crate::upstream::connect::Network;
    use crate::upstream::pool::Pool;
    use crate::upstream::spec::UpstreamProtocol;
    use std::cell::Cell;
    use std::rc::Rc;

    type Script = Vec<Result<(&'static str, u64), &'static str>>;

    /// Answers from a script, the last entry for ever; notes when it was asked.
    #[derive(Clone)]
    struct Scripted {
        answers: Rc<RefCell<Script>>,
        asked: Rc<RefCell<Vec<Duration>>>,
        begun: Instant,
    }

    impl Resolve for Scripted {
        async fn resolve(&self, _name: &str) -> Result<Resolved, String> {
            self.asked.borrow_mut().push(self.begun.elapsed());
            let mut answers = self.answers.borrow_mut();
            let answer = if answers.len() > 1 { answers.remove(0) } else { answers[0] };
            answer
                .map_err(str::to_owned)
                .map(|(ip, ttl)| Resolved { addresses: vec![ip.parse().unwrap()], ttl: Duration::from_secs(ttl) })
        }
    }

    fn cluster(names: &[&str]) -> Arc<Cluster> {
        let identity = ClusterIdentity {
            name: "shop".into(),
            endpoints: names.iter().map(|name| EndpointSpec::Dns { name: (*name).to_owned(), port: 80 }).collect(),
            protocol: UpstreamProtocol::Auto,
            tls: None,
            host: "shop".into(),
        };
        Cluster::new(identity, Health::new(Instant::now()), &Default::default()).unwrap()
    }

    /// Runs discovery over a script for some virtual seconds: when it asked, and the addresses at the end.
    async fn play(answers: Script, seconds: u64) -> (Vec<Duration>, Arc<Addresses>) {
        let resolver =
            Scripted { answers: Rc::new(RefCell::new(answers)), asked: Rc::default(), begun: Instant::now() };
        let cluster = cluster(&["shop.test"]);
        let asked = Rc::clone(&resolver.asked);
        let work = keep_fresh(&resolver, Arc::downgrade(&cluster));
        assert!(tokio::time::timeout(Duration::from_secs(seconds), work).await.is_err());
        let asked = asked.borrow().clone();
        (asked, cluster.addresses())
    }

    use crate::upstream::cluster::Addresses;

    #[tokio::test(start_paused = true)]
    async fn the_time_to_live_is_honoured_between_floor_and_ceiling() {
        for (ttl, every) in [(0, TTL_FLOOR), (7, Duration::from_secs(7)), (86_400, TTL_CEILING)] {
            let (asked, _) = play(vec![Ok(("10.0.0.1", ttl))], every.as_secs() * 3).await;
            let gaps: Vec<_> = asked.windows(2).map(|pair| (pair[1] - pair[0]).as_secs()).collect();
            assert!(!gaps.is_empty() && gaps.iter().all(|gap| *gap == every.as_secs()), "{ttl}: {gaps:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn old_addresses_stay_while_the_resolver_fails() {
        let (asked, addresses) = play(vec![Ok(("10.0.0.1", 5)), Err("SERVFAIL"), Err("SERVFAIL")], 20).await;
        assert_eq!(addresses.list[0].socket.to_string(), "10.0.0.1:80");
        assert_eq!(addresses.problem.as_deref(), Some("shop.test: SERVFAIL"));
        assert_eq!(asked[2] - asked[1], RETRY_FIRST);
        assert!(asked.windows(2).all(|pair| pair[1] - pair[0] <= RETRY_MOST));
    }

    /// Takes three seconds for an answer, and has none for a name that begins with `silent`.
    struct Slow;

    impl Resolve for Slow {
        async fn resolve(&self, name: &str) -> Result<Resolved, String> {
            sleep(Duration::from_secs(3)).await;
            match name.starts_with("silent") {
                true => Err("timed out".to_owned()),
                false => Ok(Resolved { addresses: vec![Ipv4Addr::LOCALHOST.into()], ttl: TTL_CEILING }),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn several_names_are_asked_for_at_the_same_time() {
        let cluster = cluster(&["silent.test", "silent-too.test", "shop.test"]);
        let work = keep_fresh(&Slow, Arc::downgrade(&cluster));
        assert!(tokio::time::timeout(Duration::from_millis(3_100), work).await.is_err());
        let addresses = cluster.addresses();
        assert_eq!(addresses.list.len(), 1);
        assert_eq!(addresses.problem.as_deref(), Some("silent.test: timed out; silent-too.test: timed out"));
    }

    /// Answers at once with the next address for each time it is asked, but says nothing of a name that begins with
    /// `silent` before it gives up after ten seconds.
    #[derive(Default)]
    struct Uneven(Cell<u8>);

    impl Resolve for Uneven {
        async fn resolve(&self, name: &str) -> Result<Resolved, String> {
            if name.starts_with("silent") {
                sleep(Duration::from_secs(10)).await;
                return Err("timed out".to_owned());
            }
            self.0.set(self.0.get() + 1);
            Ok(Resolved { addresses: vec![Ipv4Addr::new(10, 0, 0, self.0.get()).into()], ttl: Duration::from_secs(3) })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_whose_server_is_silent_holds_up_no_other() {
        let cluster = cluster(&["silent.test", "shop.test"]);
        let resolver = Uneven::default();
        let mut work = std::pin::pin!(keep_fresh(&resolver, Arc::downgrade(&cluster)));
        let begun = Instant::now() + Duration::from_millis(500);
        for (turn, settled) in [(0, false), (1, false), (2, false), (3, false), (4, true), (5, true)] {
            assert!(tokio::time::timeout_at(begun + Duration::from_secs(3 * turn), &mut work).await.is_err());
            let now = cluster.addresses();
            let list: Vec<_> = now.list.iter().map(|one| one.socket.to_string()).collect();
            assert_eq!(list, [format!("10.0.0.{}:80", turn + 1)]);
            assert_eq!((now.settled, now.problem.is_some()), (settled, settled), "{:?}", now.problem);
        }
    }

    /// Fails at once for `gone`, and answers for any other name two seconds later.
    struct Late;

    impl Resolve for Late {
        async fn resolve(&self, name: &str) -> Result<Resolved, String> {
            if name.starts_with("gone") {
                return Err("there is no such name".to_owned());
            }
            sleep(Duration::from_secs(2)).await;
            Ok(Resolved { addresses: vec![Ipv4Addr::LOCALHOST.into()], ttl: TTL_CEILING })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_waits_while_one_name_has_failed_and_another_may_still_answer() {
        let cluster = cluster(&["gone.test", "shop.test"]);
        let shard = crate::telemetry::Telemetry::new(crate::telemetry::Sink::memory().0).shard(0);
        let pool = Pool::new(Arc::clone(&cluster), Rc::new(Network), Rc::default(), shard.destination("shop"));
        let begun = Instant::now();
        tokio::select! {
            () = keep_fresh(&Late, Arc::downgrade(&cluster)) => panic!("the cluster is held"),
            known = pool.known() => assert!(known.is_ok(), "it did not wait for the second name"),
        }
        assert_eq!(begun.elapsed(), Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_policy_with_very_many_names_loses_none() {
        let resolver = Scripted {
            answers: Rc::new(RefCell::new(vec![Ok(("10.0.0.1", 30))])),
            asked: Rc::default(),
            begun: Instant::now(),
        };
        let (discovery, requests) = Discovery::new();
        let clusters: Vec<_> = (0..5_000).map(|_| cluster(&["shop.test"])).collect();
        clusters.iter().for_each(|cluster| discovery.follow(cluster));
        let all = tokio::task::LocalSet::new();
        let work = all.run_until(run(resolver, requests));
        assert!(tokio::time::timeout(Duration::from_secs(1), work).await.is_err());
        for cluster in &clusters {
            let addresses = cluster.addresses();
            assert_eq!((addresses.list.len(), addresses.problem.as_deref()), (1, None));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_comes_into_being_is_found_soon() {
        let (asked, addresses) = play(vec![Err("NXDOMAIN"), Ok(("10.0.0.9", 30))], 2).await;
        assert_eq!(asked.len(), 2);
        assert!(asked[1] <= Duration::from_secs(1));
        assert_eq!((addresses.list.len(), addresses.problem.as_deref()), (1, None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_cluster_that_nobody_holds_is_not_asked_for_any_more() {
        let cluster = cluster(&["shop.test"]);
        let weak = Arc::downgrade(&cluster);
        drop(cluster);
        let resolver = Scripted {
            answers: Rc::new(RefCell::new(vec![Ok(("10.0.0.1", 1))])),
            asked: Rc::default(),
            begun: Instant::now(),
        };
        keep_fresh(&resolver, weak).await;
        assert!(resolver.asked.borrow().is_empty());
    }
}
