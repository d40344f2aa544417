//! Keeps the addresses of clusters fresh: asks for each name again when its answer's time to live is over.
//!
//! Runs on one thread for the whole process, so that workers share one resolver and one cache. A time to live is
//! kept between a floor and a ceiling; a name that does not exist is asked for again soon, because at start-up
//! it often comes into being a moment later; when the resolver fails, the old addresses stay.

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
use crate::upstream::spec::Endpoint;

/// An answer is believed for at least and at most so long.
pub const TTL_FLOOR: Duration = Duration::from_secs(1);
/// See [`TTL_FLOOR`].
pub const TTL_CEILING: Duration = Duration::from_secs(60);

/// A failure is tried again after the first, then after twice that, and so on up to the second.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MOST: Duration = Duration::from_secs(5);

/// Destinations without endpoints may lead to so many different places before the ones nobody uses are forgotten.
const PLACES: usize = 4096;

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
pub struct Place {
    /// The destination's cluster.
    pub parent: u64,
    /// The host as the caller wrote it, an IPv6 address in brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

type Places = HashMap<Place, Weak<Cluster>>;

/// The way to discovery from everywhere else.
#[derive(Clone)]
pub struct Discovery {
    requests: Requests,
    places: Arc<Mutex<Places>>,
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
    pub fn place(&self, parent: &Cluster, place: Place) -> Arc<Cluster> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = places.get(&place).and_then(Weak::upgrade) {
            return known;
        }
        if places.len() >= PLACES {
            places.retain(|_, place| place.strong_count() > 0);
        }
        let (host, port) = (place.host.as_str(), place.port);
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let endpoint = match bare.parse::<IpAddr>() {
            Ok(ip) => Endpoint::Address(SocketAddr::new(ip, port)),
            Err(_) => Endpoint::Dns { name: host.to_owned(), port },
        };
        let cluster = parent.place(endpoint, bare);
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

/// Resolves all names of a cluster again and again, until nobody holds the cluster any more.
async fn keep_fresh(resolver: &impl Resolve, cluster: Weak<Cluster>) {
    let mut known: HashMap<(String, u16), Vec<IpAddr>> = HashMap::new();
    let mut retry = RETRY_FIRST;
    while let Some(alive) = cluster.upgrade() {
        let names: Vec<_> = alive.names().map(|(name, port)| (name.to_owned(), port)).collect();
        let mut wait = TTL_CEILING;
        let mut problems = Vec::new();
        // All at once, so that a name whose server is silent holds the others up once and not each in turn.
        let answers = join_all(names.iter().map(|(name, _)| resolver.resolve(name))).await;
        for (key, answer) in names.iter().zip(answers) {
            match answer {
                Ok(answer) => {
                    wait = wait.min(answer.ttl.max(TTL_FLOOR));
                    known.insert(key.clone(), answer.addresses);
                }
                Err(error) => problems.push(format!("{}: {error}", key.0)),
            }
        }
        let problem = (!problems.is_empty()).then(|| problems.join("; "));
        if problem.is_some() {
            wait = wait.min(retry);
            retry = (retry * 2).min(RETRY_MOST);
        } else {
            retry = RETRY_FIRST;
        }
        report(&alive, problem.as_deref());
        alive.publish(addresses(&alive, &names, &known), problem);
        drop(alive);
        sleep(wait).await;
    }
}

fn addresses(cluster: &Cluster, names: &[(String, u16)], known: &HashMap<(String, u16), Vec<IpAddr>>) -> Vec<Address> {
    let wanted = cluster.identity.tls.as_ref().and_then(|tls| tls.server_name.as_deref());
    names
        .iter()
        .filter_map(|key| known.get(key).map(|ips| (key, ips)))
        .flat_map(|((name, port), ips)| {
            let server_name: Arc<str> = wanted.unwrap_or(name.trim_end_matches('.')).into();
            ips.iter()
                .map(move |ip| Address { socket: SocketAddr::new(*ip, *port), server_name: Arc::clone(&server_name) })
        })
        .collect()
}

/// One log line when resolving begins to fail, and one when it works again.
fn report(cluster: &Cluster, problem: Option<&str>) {
    let before = cluster.addresses();
    let destination = &*cluster.identity.name;
    match (before.problem.as_deref(), problem) {
        (None, Some(problem)) => tracing::warn!(
            destination,
            problem,
            kept = before.list.len(),
            "a name cannot be resolved; the addresses known so far stay"
        ),
        (Some(_), None) => tracing::info!(destination, "all names are resolved again"),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::cluster::{Health, Identity};
    use crate::upstream::spec::Protocol;
    use std::cell::RefCell;
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
        let identity = Identity {
            name: "shop".into(),
            endpoints: names.iter().map(|name| Endpoint::Dns { name: (*name).to_owned(), port: 80 }).collect(),
            protocol: Protocol::Auto,
            tls: None,
            host: "shop".into(),
        };
        Cluster::new(identity, Health::new(Instant::now())).unwrap()
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
