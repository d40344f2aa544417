//! All pools of one worker, and the task that looks after their idle connections.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::telemetry::Shard;
use crate::upstream::cluster::Cluster;
use crate::upstream::connect::Connector;
use crate::upstream::discovery::{Discovery, Place};
use crate::upstream::pool::Pool;

/// How often idle connections are looked at: a close is noticed, and learned from, this exactly.
const SWEEP_EVERY: Duration = Duration::from_millis(100);

/// Places of endpoint-less destinations that one worker keeps connections to.
const PLACES: usize = 256;

/// The pools of one worker.
pub struct Upstreams {
    connector: Connector,
    shard: Rc<Shard>,
    discovery: Discovery,
    pools: RefCell<HashMap<u64, Rc<Pool>, RandomState>>,
    places: RefCell<HashMap<Place, Rc<Pool>, RandomState>>,
    sweeping: Cell<bool>,
    something_idle: Notify,
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
            sweeping: Cell::new(false),
            something_idle: Notify::new(),
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
        let key = Place { parent: parent.id, host: host.to_owned(), port };
        if let Some(pool) = self.places.borrow().get(&key) {
            return Rc::clone(pool);
        }
        let cluster = self.discovery.place(parent, key.clone());
        let pool = self.new_pool(cluster);
        let mut places = self.places.borrow_mut();
        if places.len() >= PLACES {
            // Those in use stay; of the others none is dear enough to choose among them.
            places.retain(|_, pool| Rc::strong_count(pool) > 1);
        }
        places.insert(key, Rc::clone(&pool));
        pool
    }

    fn new_pool(&self, cluster: Arc<Cluster>) -> Rc<Pool> {
        cluster.health.report_to(self.shard.telemetry());
        let metrics = self.shard.destination(&cluster.identity.name);
        Rc::new(Pool::new(cluster, Rc::clone(&self.connector), metrics))
    }

    /// Forgets the pools of clusters that the policy does not have any more; calls under way keep theirs.
    pub fn keep_only(&self, keep: impl Fn(u64) -> bool) {
        let now = Instant::now();
        let gone: Vec<_> = self.pools.borrow_mut().extract_if(|id, _| !keep(*id)).map(|(_, pool)| pool).collect();
        let places: Vec<_> = self.places.borrow_mut().extract_if(|place, _| !keep(place.parent)).collect();
        // A call that still holds its pool must not hold the idle connections, which nobody looks after from here on.
        gone.iter().chain(places.iter().map(|(_, pool)| pool)).for_each(|pool| pool.retire(now));
    }

    /// Says that a connection has become idle.
    pub fn note_idle(&self) {
        if !self.sweeping.replace(true) {
            self.something_idle.notify_one();
        }
    }

    /// Looks after idle connections until the worker ends. Does nothing at all while there is none.
    pub async fn sweep(this: Weak<Self>) {
        loop {
            let Some(alive) = this.upgrade() else { return };
            if !alive.sweeping.get() {
                alive.something_idle.notified().await;
            }
            alive.sweeping.set(alive.sweep_once());
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
        for pool in self.places.borrow().values() {
            left |= pool.sweep(&mut cx, now);
        }
        left
    }
}
