//! Unit tests of name resolution in paused time, without a network.

use super::*;
use crate::upstream::cluster::{Addresses, ClusterIdentity, Health};
use crate::upstream::connect::Network;
use crate::upstream::pool::Pool;
use crate::upstream::spec::UpstreamProtocol;
use std::cell::Cell;
use std::net::Ipv4Addr;
use std::rc::Rc;
use tokio::time::sleep;

type Script = Vec<Result<(&'static str, u64), &'static str>>;

/// Answers from a script and repeats the last entry; records the time of each query.
#[derive(Clone)]
struct Scripted {
    answers: Rc<RefCell<Script>>,
    queries: Rc<RefCell<Vec<Duration>>>,
    begun: Instant,
}

impl Resolve for Scripted {
    async fn resolve(&self, _name: &str) -> Result<Resolved, String> {
        self.queries.borrow_mut().push(self.begun.elapsed());
        let mut answers = self.answers.borrow_mut();
        let answer = if answers.len() > 1 { answers.remove(0) } else { answers[0] };
        answer
            .map_err(str::to_owned)
            .map(|(ip, ttl)| Resolved::new(vec![ip.parse().unwrap()], Duration::from_secs(ttl)))
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

/// Settings that never change.
fn unchanged() -> SettingsChanges {
    SettingsChanges(watch::Sender::new(()).subscribe())
}

/// Runs discovery with a script for some virtual seconds: the times of the queries, and the addresses at the end.
async fn play(answers: Script, seconds: u64) -> (Vec<Duration>, Arc<Addresses>) {
    let resolver = Scripted { answers: Rc::new(RefCell::new(answers)), queries: Rc::default(), begun: Instant::now() };
    let cluster = cluster(&["shop.test"]);
    let queries = Rc::clone(&resolver.queries);
    let work = resolve_cluster(&resolver, Arc::downgrade(&cluster), unchanged());
    assert!(tokio::time::timeout(Duration::from_secs(seconds), work).await.is_err());
    let queries = queries.borrow().clone();
    (queries, cluster.addresses())
}

#[tokio::test(start_paused = true)]
async fn the_ttl_is_kept_between_its_limits() {
    for (ttl, every) in [(0, MIN_TTL), (7, Duration::from_secs(7)), (86_400, MAX_TTL)] {
        let (queries, _) = play(vec![Ok(("10.0.0.1", ttl))], every.as_secs() * 3).await;
        let gaps: Vec<_> = queries.windows(2).map(|pair| (pair[1] - pair[0]).as_secs()).collect();
        assert!(!gaps.is_empty() && gaps.iter().all(|gap| *gap == every.as_secs()), "{ttl}: {gaps:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn old_addresses_stay_while_the_resolver_fails() {
    let (queries, addresses) = play(vec![Ok(("10.0.0.1", 5)), Err("SERVFAIL"), Err("SERVFAIL")], 20).await;
    assert_eq!(addresses.list[0].socket.to_string(), "10.0.0.1:80");
    assert_eq!(addresses.problem.as_deref(), Some("shop.test: SERVFAIL"));
    assert_eq!(queries[2] - queries[1], RETRY_INITIAL);
    assert!(queries.windows(2).all(|pair| pair[1] - pair[0] <= RETRY_MAX));
}

/// Answers after 3 s; fails then for a name that begins with `silent`.
struct SlowResolver;

impl Resolve for SlowResolver {
    async fn resolve(&self, name: &str) -> Result<Resolved, String> {
        sleep(Duration::from_secs(3)).await;
        match name.starts_with("silent") {
            true => Err("timed out".to_owned()),
            false => Ok(Resolved::new(vec![Ipv4Addr::LOCALHOST.into()], MAX_TTL)),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn several_names_are_resolved_at_the_same_time() {
    let cluster = cluster(&["silent.test", "silent-too.test", "shop.test"]);
    let work = resolve_cluster(&SlowResolver, Arc::downgrade(&cluster), unchanged());
    assert!(tokio::time::timeout(Duration::from_millis(3_100), work).await.is_err());
    let addresses = cluster.addresses();
    assert_eq!(addresses.list.len(), 1);
    assert_eq!(addresses.problem.as_deref(), Some("silent.test: timed out; silent-too.test: timed out"));
}

/// Answers each query at once with the next address; fails after 10 s for a name that begins with `silent`.
#[derive(Default)]
struct UnevenResolver(Cell<u8>);

impl Resolve for UnevenResolver {
    async fn resolve(&self, name: &str) -> Result<Resolved, String> {
        if name.starts_with("silent") {
            sleep(Duration::from_secs(10)).await;
            return Err("timed out".to_owned());
        }
        self.0.set(self.0.get() + 1);
        Ok(Resolved::new(vec![Ipv4Addr::new(10, 0, 0, self.0.get()).into()], Duration::from_secs(3)))
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_name_server_delays_no_other_name() {
    let cluster = cluster(&["silent.test", "shop.test"]);
    let resolver = UnevenResolver::default();
    let mut work = std::pin::pin!(resolve_cluster(&resolver, Arc::downgrade(&cluster), unchanged()));
    let begun = Instant::now() + Duration::from_millis(500);
    for (turn, is_complete) in [(0, false), (1, false), (2, false), (3, false), (4, true), (5, true)] {
        assert!(tokio::time::timeout_at(begun + Duration::from_secs(3 * turn), &mut work).await.is_err());
        let now = cluster.addresses();
        let list: Vec<_> = now.list.iter().map(|one| one.socket.to_string()).collect();
        assert_eq!(list, [format!("10.0.0.{}:80", turn + 1)]);
        assert_eq!((now.is_complete, now.problem.is_some()), (is_complete, is_complete), "{:?}", now.problem);
    }
}

/// Fails at once for a name that begins with `gone`; answers for any other name after 2 s.
struct LateResolver;

impl Resolve for LateResolver {
    async fn resolve(&self, name: &str) -> Result<Resolved, String> {
        if name.starts_with("gone") {
            return Err("there is no such name".to_owned());
        }
        sleep(Duration::from_secs(2)).await;
        Ok(Resolved::new(vec![Ipv4Addr::LOCALHOST.into()], MAX_TTL))
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_waits_while_one_name_has_failed_and_another_is_pending() {
    let cluster = cluster(&["gone.test", "shop.test"]);
    let shard = crate::telemetry::Telemetry::new(crate::telemetry::Sink::memory().0).shard(0);
    let pool = Pool::new(Arc::clone(&cluster), Rc::new(Network), Rc::default(), shard.destination("shop"));
    let begun = Instant::now();
    tokio::select! {
        () = resolve_cluster(&LateResolver, Arc::downgrade(&cluster), unchanged()) => panic!("the cluster still exists"),
        known = pool.wait_resolved() => assert!(known.is_ok(), "the call did not wait for the second name"),
    }
    assert_eq!(begun.elapsed(), Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn all_names_of_a_large_policy_are_resolved() {
    let resolver = Scripted {
        answers: Rc::new(RefCell::new(vec![Ok(("10.0.0.1", 30))])),
        queries: Rc::default(),
        begun: Instant::now(),
    };
    let (discovery, requests) = Discovery::new();
    let clusters: Vec<_> = (0..5_000).map(|_| cluster(&["shop.test"])).collect();
    clusters.iter().for_each(|cluster| discovery.keep_resolved(cluster));
    let all = tokio::task::LocalSet::new();
    let work = all.run_until(run(resolver, requests));
    assert!(tokio::time::timeout(Duration::from_secs(1), work).await.is_err());
    for cluster in &clusters {
        let addresses = cluster.addresses();
        assert_eq!((addresses.list.len(), addresses.problem.as_deref()), (1, None));
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_name_is_found_within_a_second() {
    let (queries, addresses) = play(vec![Err("NXDOMAIN"), Ok(("10.0.0.9", 30))], 2).await;
    assert_eq!(queries.len(), 2);
    assert!(queries[1] <= Duration::from_secs(1));
    assert_eq!((addresses.list.len(), addresses.problem.as_deref()), (1, None));
}

#[tokio::test(start_paused = true)]
async fn the_names_of_a_dropped_cluster_are_not_resolved() {
    let cluster = cluster(&["shop.test"]);
    let weak = Arc::downgrade(&cluster);
    drop(cluster);
    let resolver = Scripted {
        answers: Rc::new(RefCell::new(vec![Ok(("10.0.0.1", 1))])),
        queries: Rc::default(),
        begun: Instant::now(),
    };
    resolve_cluster(&resolver, weak, unchanged()).await;
    assert!(resolver.queries.borrow().is_empty());
}

/// What the scripted resolver finds: IPv4 addresses, IPv6 addresses, TTL in seconds; a late IPv6 address with the
/// milliseconds until it comes.
#[derive(Clone, Default)]
struct TwoFamilies {
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    ttl: u64,
    late: Option<(u64, Option<IpAddr>)>,
}

/// Answers with the current families; counts the queries.
#[derive(Default)]
struct Families {
    now: RefCell<TwoFamilies>,
    queries: Cell<usize>,
    /// Results of the next looks at the settings.
    script: RefCell<Vec<SettingsLook>>,
    looks: RefCell<Vec<Duration>>,
    begun: Cell<Option<Instant>>,
}

impl Resolve for Rc<Families> {
    async fn resolve(&self, _name: &str) -> Result<Resolved, String> {
        self.queries.set(self.queries.get() + 1);
        let now = self.now.borrow().clone();
        let ttl = Duration::from_secs(now.ttl);
        let resolved = Resolved::new([now.v6, now.v4].concat(), ttl);
        let Some((after, late)) = now.late else { return Ok(resolved) };
        let answer = late.map(|ip| FamilyAnswer { addresses: vec![ip], ttl });
        let pending: PendingFamily = Box::pin(async move {
            sleep(Duration::from_millis(after)).await;
            answer
        });
        Ok(Resolved { unanswered: Some(AddressFamily::V6), pending: Some(pending), ..resolved })
    }

    fn look_at_settings(&self) -> SettingsLook {
        self.looks.borrow_mut().push(self.begun.get().map_or(Duration::ZERO, |begun| begun.elapsed()));
        self.script.borrow_mut().pop().unwrap_or(SettingsLook::Same)
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn addresses_now(cluster: &Cluster) -> String {
    let list: Vec<_> = cluster.addresses().list.iter().map(|one| one.socket.ip().to_string()).collect();
    list.join(" ")
}

#[tokio::test(start_paused = true)]
async fn a_late_family_is_added_and_stays_known_while_its_queries_have_no_answer() {
    let families = Rc::new(Families::default());
    let late = Some((700, Some(ip("fd00::1"))));
    families.now.replace(TwoFamilies { v4: vec![ip("10.0.0.1")], ttl: 2, late, ..TwoFamilies::default() });
    let cluster = cluster(&["shop.test"]);
    let mut work = std::pin::pin!(resolve_cluster(&families, Arc::downgrade(&cluster), unchanged()));
    let begun = Instant::now();
    for (millis, wanted, queries) in [
        (650, "10.0.0.1", 1),
        (750, "fd00::1 10.0.0.1", 1),
        // The next answers have another IPv4 address, and none for IPv6.
        (2_050, "fd00::1 10.0.0.2", 2),
        (4_050, "fd00::1 10.0.0.2", 3),
        // Then there is an answer that the name has no IPv6 address.
        (6_050, "10.0.0.2", 4),
    ] {
        let until = begun + Duration::from_millis(millis);
        assert!(tokio::time::timeout_at(until, &mut work).await.is_err());
        assert_eq!((addresses_now(&cluster).as_str(), families.queries.get()), (wanted, queries), "{millis}");
        let late = (millis < 4_000).then_some((60_000, None));
        families.now.replace(TwoFamilies { v4: vec![ip("10.0.0.2")], ttl: 2, late, ..TwoFamilies::default() });
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_query_outlives_the_time_to_live_of_the_other_family() {
    let families = Rc::new(Families::default());
    let late = Some((5_500, Some(ip("fd00::1"))));
    families.now.replace(TwoFamilies { v4: vec![ip("10.0.0.1")], ttl: 2, late, ..TwoFamilies::default() });
    let cluster = cluster(&["shop.test"]);
    let mut work = std::pin::pin!(resolve_cluster(&families, Arc::downgrade(&cluster), unchanged()));
    for (seconds, wanted) in [(5, "10.0.0.1"), (1, "fd00::1 10.0.0.1")] {
        assert!(tokio::time::timeout(Duration::from_secs(seconds), &mut work).await.is_err());
        assert_eq!(addresses_now(&cluster), wanted);
    }
}

#[tokio::test(start_paused = true)]
async fn changed_settings_resolve_every_name_at_once_and_are_looked_at_only_while_there_are_names() {
    let families = Rc::new(Families::default());
    families.now.replace(TwoFamilies { v4: vec![ip("10.0.0.1")], ttl: 60, ..TwoFamilies::default() });
    let (discovery, requests) = Discovery::new();
    let all = tokio::task::LocalSet::new();
    let mut work = std::pin::pin!(all.run_until(run(Rc::clone(&families), requests)));
    assert!(tokio::time::timeout(Duration::from_millis(10_500), &mut work).await.is_err());
    assert!(families.looks.borrow().is_empty());
    let clusters = [cluster(&["shop.test"]), cluster(&["bank.test", "mail.test"])];
    families.begun.set(Some(Instant::now()));
    clusters.iter().for_each(|cluster| discovery.keep_resolved(cluster));
    assert!(tokio::time::timeout(Duration::from_millis(3_500), &mut work).await.is_err());
    assert_eq!((families.queries.get(), addresses_now(&clusters[0]).as_str()), (3, "10.0.0.1"));
    let looks = families.looks.borrow().len();
    assert!((3..=5).contains(&looks), "{:?}", families.looks.borrow());
    families.now.replace(TwoFamilies { v4: vec![ip("10.0.0.2")], ttl: 60, ..TwoFamilies::default() });
    *families.script.borrow_mut() = vec![SettingsLook::Changed, SettingsLook::Settling];
    assert!(tokio::time::timeout(Duration::from_millis(1_110), &mut work).await.is_err());
    assert_eq!((families.queries.get(), addresses_now(&clusters[0]).as_str()), (6, "10.0.0.2"));
    let gaps: Vec<_> = families.looks.borrow().windows(2).map(|pair| (pair[1] - pair[0]).as_millis()).collect();
    assert!(gaps.contains(&100) && gaps.iter().all(|gap| [100, 1_000].contains(gap)), "{gaps:?}");
}

#[tokio::test(start_paused = true)]
async fn changed_settings_end_a_resolution_by_the_old_ones() {
    /// The first resolution never ends.
    struct Unreachable(Cell<bool>);
    impl Resolve for Unreachable {
        async fn resolve(&self, _name: &str) -> Result<Resolved, String> {
            if !self.0.replace(true) {
                std::future::pending::<()>().await;
            }
            Ok(Resolved::new(vec![ip("10.0.0.1")], MAX_TTL))
        }
    }
    let cluster = cluster(&["shop.test"]);
    let (sender, resolver) = (watch::Sender::new(()), Unreachable(Cell::default()));
    let changes = SettingsChanges(sender.subscribe());
    let mut work = std::pin::pin!(resolve_cluster(&resolver, Arc::downgrade(&cluster), changes));
    assert!(tokio::time::timeout(Duration::from_secs(100), &mut work).await.is_err());
    assert_eq!(addresses_now(&cluster), "");
    sender.send_replace(());
    assert!(tokio::time::timeout(Duration::from_millis(1), &mut work).await.is_err());
    assert_eq!(addresses_now(&cluster), "10.0.0.1");
}
