//! DNS discovery: resolves the names of clusters, and resolves each again when its TTL is over.
//!
//! Runs on the control thread for the whole process, so that workers share one resolver and one result. Invariants: each name
//! of a cluster is resolved by itself, so a silent name server delays no other name; TTLs are kept between 1 s and 60 s;
//! a name that does not exist is resolved again after 250 ms, because at start-up names often appear a moment later; when a
//! resolution fails, the last known addresses stay. A change of the system's resolver settings resolves every name again.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::runtime::tasks;
use crate::upstream::cluster::{Address, Cluster};
use crate::upstream::resolver::{AddressFamily, FamilyAnswer, PendingFamily, Resolve, Resolved, SettingsLook};
use crate::upstream::spec::EndpointSpec;

/// DNS answers are cached for at least this time, even if their TTL is shorter.
pub const MIN_TTL: Duration = Duration::from_secs(1);
/// DNS answers are cached for at most this time, even if their TTL is longer.
pub const MAX_TTL: Duration = Duration::from_secs(60);

/// Wait before the first retry of a failed resolution; it doubles with each further failure.
const RETRY_INITIAL: Duration = Duration::from_millis(250);
/// Longest wait before a retry of a failed resolution.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Interval of looks whether the system's resolver settings have changed.
const SETTINGS_LOOK: Duration = Duration::from_secs(1);
/// The same while they are being written.
const SETTINGS_SETTLE: Duration = Duration::from_millis(100);

/// Dynamic hosts of all destinations from which on unused ones are removed.
const MAX_DYNAMIC_HOSTS: usize = 4096;

/// Used if no resolver can be built: every resolution fails with this text.
pub struct NoResolver(pub String);

impl Resolve for NoResolver {
    async fn resolve(&self, _name: &str) -> Result<Resolved, String> {
        Err(self.0.clone())
    }
}

/// A host and port that a caller named, of a destination without `endpoints`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DynamicHost {
    /// The id of the destination's cluster.
    pub parent: u64,
    /// The host in lower case; an IPv6 address in brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

type DynamicHosts = HashMap<DynamicHost, Weak<Cluster>>;

/// Handle to discovery for the other threads.
#[derive(Clone)]
pub struct Discovery {
    requests: Requests,
    dynamic_hosts: Arc<Mutex<DynamicHosts>>,
}

/// The clusters whose names are to be resolved, from all threads.
///
/// An unbounded list and not a bounded channel: a reload compiles the policy on the thread that empties the list, and a
/// policy may have any number of names. A cluster is in the list at most once.
#[derive(Clone, Default)]
pub struct Requests(Arc<RequestQueue>);

#[derive(Default)]
struct RequestQueue {
    clusters: Mutex<Vec<Weak<Cluster>>>,
    added: Notify,
}

impl Requests {
    fn add(&self, cluster: Weak<Cluster>) {
        self.0.clusters.lock().unwrap_or_else(PoisonError::into_inner).push(cluster);
        self.0.added.notify_one();
    }

    /// Takes all clusters; waits while there is none.
    async fn take(&self) -> Vec<Weak<Cluster>> {
        loop {
            let clusters = std::mem::take(&mut *self.0.clusters.lock().unwrap_or_else(PoisonError::into_inner));
            if !clusters.is_empty() {
                return clusters;
            }
            self.0.added.notified().await;
        }
    }
}

impl Discovery {
    /// A handle, and the receiver of its requests, for [`run`].
    pub fn new() -> (Self, Requests) {
        let requests = Requests::default();
        (Self { requests: requests.clone(), dynamic_hosts: Arc::default() }, requests)
    }

    /// Resolves a cluster's names again and again until the cluster is dropped. Does nothing for a cluster without names.
    pub fn keep_resolved(&self, cluster: &Arc<Cluster>) {
        if cluster.names().next().is_some() {
            self.requests.add(Arc::downgrade(cluster));
        }
    }

    /// The cluster of a dynamic host of `parent`: the same one for all workers. A new one is resolved from now on.
    pub fn dynamic_cluster(&self, parent: &Cluster, dynamic_host: DynamicHost) -> Arc<Cluster> {
        let mut clusters = self.dynamic_hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = clusters.get(&dynamic_host).and_then(Weak::upgrade) {
            return known;
        }
        if clusters.len() >= MAX_DYNAMIC_HOSTS {
            clusters.retain(|_, cluster| cluster.strong_count() > 0);
        }
        let (host, port) = (dynamic_host.host.as_str(), dynamic_host.port);
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let endpoint = match bare.parse::<IpAddr>() {
            Ok(ip) => EndpointSpec::Address(SocketAddr::new(ip, port)),
            Err(_) => EndpointSpec::Dns { name: host.to_owned(), port },
        };
        let cluster = parent.for_dynamic_host(format!("{host}:{port}"), endpoint, bare);
        clusters.insert(dynamic_host, Arc::downgrade(&cluster));
        drop(clusters);
        self.keep_resolved(&cluster);
        cluster
    }
}

/// Resolves the clusters of all requests. Never returns.
pub async fn run<R: Resolve + 'static>(resolver: R, requests: Requests) {
    let resolver = std::rc::Rc::new(resolver);
    let changes = watch::Sender::new(());
    let mut look = interval(SETTINGS_LOOK);
    // While there are no names, ticks are missed.
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            clusters = requests.take() => for cluster in clusters {
                let (resolver, changes) = (std::rc::Rc::clone(&resolver), SettingsChanges(changes.subscribe()));
                tasks::spawn(async move { resolve_cluster(&*resolver, cluster, changes).await });
            },
            // Without names no file is looked at.
            _ = look.tick(), if changes.receiver_count() > 0 => match resolver.look_at_settings() {
                SettingsLook::Same => {}
                SettingsLook::Settling => look.reset_after(SETTINGS_SETTLE),
                SettingsLook::Changed => changes.send_replace(()),
            },
        }
    }
}

/// Changes of the system's resolver settings after the creation of this handle.
#[derive(Clone)]
struct SettingsChanges(watch::Receiver<()>);

impl SettingsChanges {
    /// Waits for a change since the last one that was seen.
    async fn next(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

/// Resolves all names of a cluster again and again, each by its own TTL, until the cluster is dropped.
async fn resolve_cluster(resolver: &impl Resolve, cluster: Weak<Cluster>, changes: SettingsChanges) {
    let Some(alive) = cluster.upgrade() else { return };
    let names: Vec<_> = alive.names().map(|(name, port)| NameState::new(name, port)).collect();
    drop(alive);
    let names = RefCell::new(names);
    let count = names.borrow().len();
    join_all((0..count).map(|position| resolve_name(resolver, &cluster, &names, position, changes.clone()))).await;
}

/// The same for the name at `position`.
async fn resolve_name(
    resolver: &impl Resolve,
    cluster: &Weak<Cluster>,
    names: &RefCell<Vec<NameState>>,
    position: usize,
    mut changes: SettingsChanges,
) {
    let name = names.borrow()[position].name.clone();
    let mut retry = RETRY_INITIAL;
    let mut late = None;
    while cluster.strong_count() > 0 {
        let mut answer = tokio::select! {
            answer = resolver.resolve(&name) => answer,
            // The name servers of the old settings may be out of reach.
            () = changes.next() => continue,
        };
        let Some(alive) = cluster.upgrade() else { return };
        let wait = match &answer {
            Ok(answer) => keep_between_limits(answer.ttl),
            Err(_) => retry,
        };
        retry = if answer.is_ok() { RETRY_INITIAL } else { (retry * 2).min(RETRY_MAX) };
        late = answer.as_mut().ok().and_then(|answer| LateFamily::of(answer, late));
        publish(&alive, &mut names.borrow_mut(), position, answer);
        drop(alive);
        tokio::select! {
            () = wait_for_ttl(Instant::now() + wait, &mut late, cluster, names, position) => {}
            () = changes.next() => (retry, late) = (RETRY_INITIAL, None),
        }
    }
}

fn keep_between_limits(ttl: Duration) -> Duration {
    ttl.clamp(MIN_TTL, MAX_TTL)
}

/// A family whose query is still waiting for an answer.
struct LateFamily {
    family: AddressFamily,
    answer: PendingFamily,
}

impl LateFamily {
    /// The late family of an answer. An earlier query for the same family goes on instead of the one of this answer: with a
    /// short TTL, no later one would last long enough to reach the second name server.
    fn of(answer: &mut Resolved, earlier: Option<Self>) -> Option<Self> {
        let (family, answer) = (answer.unanswered?, answer.pending.take()?);
        earlier.filter(|earlier| earlier.family == family).or(Some(Self { family, answer }))
    }
}

/// Waits until the TTL is over at `due`; adds the addresses of a late family when they come.
async fn wait_for_ttl(
    due: Instant,
    late: &mut Option<LateFamily>,
    cluster: &Weak<Cluster>,
    names: &RefCell<Vec<NameState>>,
    position: usize,
) {
    let Some(LateFamily { family, answer }) = late else { return sleep_until(due).await };
    let family = *family;
    let found = tokio::select! {
        found = answer => found,
        () = sleep_until(due) => return,
    };
    *late = None;
    let mut due = due;
    if let (Some(found), Some(alive)) = (found, cluster.upgrade()) {
        due = due.min(Instant::now() + keep_between_limits(found.ttl));
        let mut names = names.borrow_mut();
        names[position].replace(family, found);
        publish_all(&alive, &names);
    }
    sleep_until(due).await;
}

/// One name of a cluster, and the result of its last resolution.
struct NameState {
    name: String,
    port: u16,
    /// The addresses of the last successful resolution.
    addresses: Vec<IpAddr>,
    /// The error of the last resolution, if it failed.
    problem: Option<String>,
    /// True after the first resolution, successful or not.
    has_result: bool,
}

impl NameState {
    fn new(name: &str, port: u16) -> Self {
        Self { name: name.to_owned(), port, addresses: Vec::new(), problem: None, has_result: false }
    }

    /// Takes the addresses of a resolution; those of a family without an answer stay.
    fn resolved(&mut self, answer: Resolved) {
        self.addresses.retain(|known| Some(AddressFamily::of(known)) == answer.unanswered);
        self.addresses.extend(answer.addresses);
        self.addresses.sort_by_key(IpAddr::is_ipv4);
    }

    /// Takes the addresses of one family.
    fn replace(&mut self, family: AddressFamily, answer: FamilyAnswer) {
        self.addresses.retain(|known| AddressFamily::of(known) != family);
        self.addresses.extend(answer.addresses);
        self.addresses.sort_by_key(IpAddr::is_ipv4);
    }
}

/// Publishes the addresses of all names after a resolution of the name at `position`. Logs when a name begins to fail, and
/// when no name fails any more.
fn publish(cluster: &Cluster, names: &mut [NameState], position: usize, answer: Result<Resolved, String>) {
    let resolved = &mut names[position];
    let before = resolved.problem.take();
    resolved.has_result = true;
    match answer {
        Ok(answer) => resolved.resolved(answer),
        Err(error) => resolved.problem = Some(format!("{}: {error}", resolved.name)),
    }
    let destination = &*cluster.identity.name;
    if let (None, Some(problem)) = (&before, &resolved.problem) {
        let kept = cluster.addresses().list.len();
        tracing::warn!(
            destination,
            problem,
            kept,
            "a name cannot be resolved; the last known addresses stay in use, and resolution is retried within 5 s: check \
             the name in `endpoints` and /etc/resolv.conf"
        );
    }
    if before.is_some() && names.iter().all(|name| name.problem.is_none()) {
        tracing::info!(destination, "all names are resolved again");
    }
    publish_all(cluster, names);
}

/// Publishes the addresses and problems of all names.
fn publish_all(cluster: &Cluster, names: &[NameState]) {
    let problems: Vec<_> = names.iter().filter_map(|name| name.problem.as_deref()).collect();
    let problem = (!problems.is_empty()).then(|| problems.join("; "));
    cluster.publish(addresses(cluster, names), problem, names.iter().all(|name| name.has_result));
}

fn addresses(cluster: &Cluster, names: &[NameState]) -> Vec<Address> {
    let configured = cluster.identity.tls.as_ref().and_then(|tls| tls.server_name.as_deref());
    names
        .iter()
        .flat_map(|name| {
            let server_name: Arc<str> = configured.unwrap_or(name.name.trim_end_matches('.')).into();
            let address = move |ip: &IpAddr| {
                let socket = SocketAddr::new(*ip, name.port);
                Address { socket, server_name: Arc::clone(&server_name) }
            };
            name.addresses.iter().map(address)
        })
        .collect()
}

#[cfg(test)]
mod tests;
