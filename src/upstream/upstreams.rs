//! All pools of one worker, and the task that looks after their idle connections.

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

/// How often idle connections are looked at: a close is noticed, and learned from, this exactly.
const SWEEP_EVERY: Duration = Duration::from_millis(100);

/// Places of endpoint-less destinations that one worker keeps, with their connections and with what has failed there.
const MAX_DYNAMIC_HOSTS: usize = 256;

type DynamicHosts = HashMap<DynamicHost, Known, RandomState>;

/// A place that callers have named.
struct Known {
    pool: Rc<Pool>,
    /// When it was asked for last, as places are counted.
    asked: Cell<u64>,
}

/// The pools of one worker.
pub struct Upstreams {
    connector: Connector,
    shard: Rc<Shard>,
    discovery: Discovery,
    pools: RefCell<HashMap<u64, Rc<Pool>, RandomState>>,
    places: RefCell<DynamicHosts>,
    /// Counts how often a place was asked for.
    asked: Cell<u64>,
    attention: Rc<SweepSignal>,
}

impl Upstreams {
    /// No pool yet.
    pub fn new(connector: Connector, discovery: Discovery, shard: Rc<Shard>) -> Rc<Self> {
        Rc::new(Self {
            connector,
            shard,
            discovery,
            pools: RefCell::default(),
            places: RefCell::default(),
            asked: Cell::new(0),
            attention: Rc::default(),
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

    /// This worker's pool for one place that callers of an endpoint-less destination want to reach.
    pub fn place(&self, parent: &Cluster, host: &str, port: u16) -> Rc<Pool> {
        // However it is written, it is the same host (RFC 3986, 6.2.2.1).
        let key = DynamicHost { parent: parent.id, host: host.to_ascii_lowercase(), port };
        let asked = self.asked.get() + 1;
        self.asked.set(asked);
        if let Some(known) = self.places.borrow().get(&key) {
            known.asked.set(asked);
            return Rc::clone(&known.pool);
        }
        let cluster = self.discovery.place(parent, key.clone());
        let pool = self.new_pool(cluster);
        let mut places = self.places.borrow_mut();
        while places.len() >= MAX_DYNAMIC_HOSTS
            && let Some(least) = least_dear(&places)
        {
            places.remove(&least);
        }
        places.insert(key, Known { pool: Rc::clone(&pool), asked: Cell::new(asked) });
        pool
    }

    fn new_pool(&self, cluster: Arc<Cluster>) -> Rc<Pool> {
        cluster.health.report_to(self.shard.telemetry());
        let metrics = self.shard.destination(&cluster.identity.name);
        Rc::new(Pool::new(cluster, Rc::clone(&self.connector), Rc::clone(&self.attention), metrics))
    }

    /// Forgets the pools of clusters that the policy does not have any more; calls under way keep theirs.
    pub fn keep_only(&self, keep: impl Fn(u64) -> bool) {
        let now = Instant::now();
        let gone: Vec<_> = self.pools.borrow_mut().extract_if(|id, _| !keep(*id)).map(|(_, pool)| pool).collect();
        let places: Vec<_> =
            self.places.borrow_mut().extract_if(|place, _| !keep(place.parent)).map(|(_, known)| known.pool).collect();
        // A call that still holds its pool must not hold the idle connections, which nobody looks after from here on.
        gone.iter().chain(&places).for_each(|pool| pool.retire(now));
    }

    /// Says that there is a connection to look after: one that is idle, or one that is shared.
    pub fn note_idle(&self) {
        self.attention.call();
    }

    /// Looks after idle connections until the worker ends. Does nothing at all while there is none.
    pub async fn sweep(this: Weak<Self>) {
        loop {
            let Some(alive) = this.upgrade() else { return };
            alive.attention.called().await;
            alive.attention.given(alive.sweep_once());
            drop(alive);
            sleep(SWEEP_EVERY).await;
        }
    }

    fn sweep_once(&self) -> bool {
        // Nobody need be woken: what a peer did in the meantime is seen at the next look.
        let mut cx = Context::from_waker(Waker::noop());
        let now = Instant::now();
        let mut left = false;
        for pool in self.pools.borrow().values() {
            left |= pool.sweep(&mut cx, now);
        }
        for known in self.places.borrow().values() {
            left |= known.pool.sweep(&mut cx, now);
        }
        left
    }
}

/// The place to be forgotten first: of those that nobody uses now the one that was asked for least lately. One that is
/// open goes only where all are: forgotten, it would be closed.
fn least_dear(places: &DynamicHosts) -> Option<DynamicHost> {
    let now = Instant::now();
    let unused = places.iter().filter(|(_, known)| Rc::strong_count(&known.pool) == 1);
    let least = unused.min_by_key(|(_, known)| (known.pool.cluster.health.is_open(now), known.asked.get()));
    least.map(|(place, _)| place.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{Sink, Telemetry};
    use crate::upstream::cluster::{ClusterIdentity, Health};
    use crate::upstream::connect::Network;
    use crate::upstream::spec::UpstreamProtocol;

    #[test]
    fn a_place_is_the_same_however_its_host_is_written() {
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
        let place = |host: &str, port: u16| upstreams.place(&parent, host, port);
        assert!(Rc::ptr_eq(&place("shop.test", 80), &place("Shop.TEST", 80)));
        assert!(Rc::ptr_eq(&place("[FD00::A]", 80), &place("[fd00::a]", 80)));
        assert!(!Rc::ptr_eq(&place("shop.test", 80), &place("shop.test", 81)));
    }
}
