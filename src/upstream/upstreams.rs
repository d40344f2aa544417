//! All pools of one worker, and the task that sweeps their idle connections.
//!
//! `proxy` gets the pool of a request's cluster or dynamic host here. Invariants: one pool per cluster and worker; at most
//! 256 pools of dynamic hosts; the sweep runs only while a pool has an idle or a shared connection.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::time::{Instant, sleep};

use crate::telemetry::Shard;
use crate::upstream::cluster::Cluster;
use crate::upstream::connect::Connector;
use crate::upstream::discovery::{Discovery, DynamicHost};
use crate::upstream::pool::{Pool, SweepSignal};

/// Interval of the sweep; closes by the upstream are noticed, and idle limits learned, with this precision.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);

/// Dynamic hosts that one worker keeps, with their connections and their health.
const MAX_DYNAMIC_HOSTS: usize = 256;

type DynamicPools = HashMap<DynamicHost, DynamicPool, RandomState>;

/// The pool of a dynamic host.
struct DynamicPool {
    pool: Rc<Pool>,
    /// The value of `Upstreams::lookups` at the last request for this host.
    last_lookup: Cell<u64>,
}

/// The pools of one worker.
pub struct Upstreams {
    connector: Connector,
    shard: Rc<Shard>,
    discovery: Discovery,
    pools: RefCell<HashMap<u64, Rc<Pool>, RandomState>>,
    dynamic_pools: RefCell<DynamicPools>,
    /// Requests for dynamic hosts so far; orders them by last use.
    lookups: Cell<u64>,
    sweep_signal: Rc<SweepSignal>,
}

impl Upstreams {
    /// An empty set; a pool is made at the first request for it.
    pub fn new(connector: Connector, discovery: Discovery, shard: Rc<Shard>) -> Rc<Self> {
        Rc::new(Self {
            connector,
            shard,
            discovery,
            pools: RefCell::default(),
            dynamic_pools: RefCell::default(),
            lookups: Cell::new(0),
            sweep_signal: Rc::default(),
        })
    }

    /// This worker's pool for a cluster.
    pub fn pool(&self, cluster: &Arc<Cluster>) -> Rc<Pool> {
        if let Some(pool) = self.pools.borrow().get(&cluster.id) {
            return Rc::clone(pool);
        }
        let pool = self.new_pool(Arc::clone(cluster));
        self.pools.borrow_mut().insert(cluster.id, Rc::clone(&pool));
        pool
    }

    /// This worker's pool for a dynamic host of `parent`, a destination without `endpoints`.
    pub fn dynamic_pool(&self, parent: &Cluster, host: &str, port: u16) -> Rc<Pool> {
        // Host names are case-insensitive (RFC 3986, 6.2.2.1).
        let key = DynamicHost { parent: parent.id, host: host.to_ascii_lowercase(), port };
        let lookup = self.lookups.get() + 1;
        self.lookups.set(lookup);
        if let Some(known) = self.dynamic_pools.borrow().get(&key) {
            known.last_lookup.set(lookup);
            return Rc::clone(&known.pool);
        }
        let cluster = self.discovery.dynamic_cluster(parent, key.clone());
        let pool = self.new_pool(cluster);
        let mut pools = self.dynamic_pools.borrow_mut();
        while pools.len() >= MAX_DYNAMIC_HOSTS
            && let Some(evicted) = least_recently_used(&pools)
        {
            pools.remove(&evicted);
        }
        pools.insert(key, DynamicPool { pool: Rc::clone(&pool), last_lookup: Cell::new(lookup) });
        pool
    }

    fn new_pool(&self, cluster: Arc<Cluster>) -> Rc<Pool> {
        cluster.health.set_telemetry(self.shard.telemetry());
        let metrics = self.shard.destination(&cluster.identity.name);
        Rc::new(Pool::new(cluster, Rc::clone(&self.connector), Rc::clone(&self.sweep_signal), metrics))
    }

    /// Drops the pools of clusters for whose id `keep` is false; calls in flight keep theirs.
    pub fn retain_clusters(&self, keep: impl Fn(u64) -> bool) {
        let now = Instant::now();
        let pools: Vec<_> = self.pools.borrow_mut().extract_if(|id, _| !keep(*id)).map(|(_, pool)| pool).collect();
        let dynamic: Vec<_> = self
            .dynamic_pools
            .borrow_mut()
            .extract_if(|host, _| !keep(host.parent))
            .map(|(_, dynamic)| dynamic.pool)
            .collect();
        // A call that holds its pool would hold the pool's idle connections too, and the sweep does not reach them any more.
        pools.iter().chain(&dynamic).for_each(|pool| pool.retire(now));
    }

    /// Requests a sweep: a pool has an idle or a shared connection.
    pub fn request_sweep(&self) {
        self.sweep_signal.request();
    }

    /// Sweeps all pools every 100 ms until the worker ends; sleeps while no pool has an idle or a shared connection.
    pub async fn sweep(this: Weak<Self>) {
        loop {
            let Some(alive) = this.upgrade() else { return };
            alive.sweep_signal.requested().await;
            alive.sweep_signal.swept(alive.sweep_once());
            drop(alive);
            sleep(SWEEP_INTERVAL).await;
        }
    }

    fn sweep_once(&self) -> bool {
        // No task is woken: the next sweep sees what the peer has done meanwhile.
        let mut cx = Context::from_waker(Waker::noop());
        let now = Instant::now();
        let mut again = false;
        for pool in self.pools.borrow().values() {
            again |= pool.sweep(&mut cx, now);
        }
        for dynamic in self.dynamic_pools.borrow().values() {
            again |= dynamic.pool.sweep(&mut cx, now);
        }
        again
    }
}

/// The dynamic host to evict: the least recently used one without a call in flight. One whose breaker is open, or that has
/// an ejected endpoint, is evicted only if all are like that: evicted, it would forget that state.
fn least_recently_used(pools: &DynamicPools) -> Option<DynamicHost> {
    let now = Instant::now();
    let unused = pools.iter().filter(|(_, dynamic)| Rc::strong_count(&dynamic.pool) == 1);
    let least = unused.min_by_key(|(_, dynamic)| (dynamic.pool.cluster.health.is_open(now), dynamic.last_lookup.get()));
    least.map(|(host, _)| host.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{Sink, Telemetry};
    use crate::upstream::cluster::{ClusterIdentity, Health};
    use crate::upstream::connect::Network;
    use crate::upstream::spec::UpstreamProtocol;

    #[test]
    fn a_dynamic_host_is_case_insensitive() {
        let identity = ClusterIdentity {
            name: "others".into(),
            endpoints: Vec::new(),
            protocol: UpstreamProtocol::Auto,
            tls: None,
            host: "others".into(),
        };
        let parent = Cluster::new(identity, Health::new(Instant::now()), &Default::default()).unwrap();
        let shard = Telemetry::new(Sink::memory().0).shard(0);
        let upstreams = Upstreams::new(Rc::new(Network), Discovery::new().0, shard);
        let pool = |host: &str, port: u16| upstreams.dynamic_pool(&parent, host, port);
        assert!(Rc::ptr_eq(&pool("shop.test", 80), &pool("Shop.TEST", 80)));
        assert!(Rc::ptr_eq(&pool("[FD00::A]", 80), &pool("[fd00::a]", 80)));
        assert!(!Rc::ptr_eq(&pool("shop.test", 80), &pool("shop.test", 81)));
    }
}
