//! What all requests of one worker share: the policy as it is now, the pools, the timers, the metric shard.

use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;

use crate::policy::snapshot::{Destination, Snapshot};
use crate::runtime::drain::{Crowd, Phase};
use crate::runtime::timer::Timers;
use crate::telemetry::Shard;
use crate::upstream::pool::Pool;
use crate::upstream::worker::Upstreams;

/// One worker's own things. Nothing here is shared with another thread but through the snapshot.
pub struct Worker {
    policy: RefCell<Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
    view: RefCell<Rc<View>>,
    /// The pools.
    pub upstreams: Rc<Upstreams>,
    /// Timers to borrow.
    pub timers: Timers,
    /// Where exchanges record themselves.
    pub shard: Rc<Shard>,
    /// The open connections, and how far they are on their way down.
    pub crowd: Crowd,
}

/// One snapshot as one worker sees it: with this worker's pools. Requests keep the view with which they began.
pub struct View {
    /// The policy.
    pub policy: Arc<Snapshot>,
    pools: Vec<OnceCell<Rc<Pool>>>,
}

impl View {
    fn new(policy: Arc<Snapshot>) -> Rc<Self> {
        let pools = policy.destinations.iter().map(|_| OnceCell::new()).collect();
        Rc::new(Self { policy, pools })
    }

    /// One destination.
    pub fn destination(&self, position: usize) -> &Destination {
        &self.policy.destinations[position]
    }

    /// This worker's pool for a destination that has endpoints.
    pub fn pool(&self, position: usize, upstreams: &Upstreams) -> &Rc<Pool> {
        self.pools[position].get_or_init(|| upstreams.pool(&self.destination(position).cluster))
    }
}

impl Worker {
    /// A worker that reads its policy from `policy`.
    pub fn new(policy: Arc<ArcSwap<Snapshot>>, upstreams: Rc<Upstreams>, shard: Rc<Shard>) -> Rc<Self> {
        let view = View::new(policy.load_full());
        Rc::new(Self {
            policy: RefCell::new(Cache::new(policy)),
            view: RefCell::new(view),
            upstreams,
            timers: Timers::default(),
            shard,
            crowd: Crowd::default(),
        })
    }

    /// True once callers are to be sent elsewhere.
    pub fn is_leaving(&self) -> bool {
        self.crowd.phase() >= Phase::Leaving
    }

    /// The policy for a request that begins now.
    pub fn view(&self) -> Rc<View> {
        let mut cache = self.policy.borrow_mut();
        let newest = cache.load();
        let view = self.view.borrow();
        if Arc::ptr_eq(&view.policy, newest) {
            return Rc::clone(&view);
        }
        drop(view);
        let next = View::new(Arc::clone(newest));
        self.upstreams.keep_only(|id| next.policy.destinations.iter().any(|one| one.cluster.id == id));
        *self.view.borrow_mut() = Rc::clone(&next);
        next
    }
}
