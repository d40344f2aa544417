//! What all requests of one worker share: the policy as it is now, the pools, the timers, the metric shard.

use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;

use crate::policy::snapshot::{Destination, Snapshot};
use crate::rules::inflight::InflightRequests;
use crate::rules::retry_history::RetryHistory;
use crate::runtime::drain::{ConnectionTracker, DrainPhase};
use crate::runtime::timer::Timers;
use crate::telemetry::{Counter, Shard, Telemetry};
use crate::upstream::pool::Pool;
use crate::upstream::upstreams::Upstreams;

/// One worker's own things, and beside them what it shares with other threads: the snapshot with its live states, and what
/// the workers know together ([`SharedState`]).
pub struct WorkerContext {
    policy: RefCell<Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
    view: RefCell<Rc<PolicyView>>,
    /// The pools.
    pub upstreams: Rc<Upstreams>,
    /// Timers to borrow.
    pub timers: Timers,
    /// Where exchanges record themselves.
    pub shard: Rc<Shard>,
    /// The inbound requests under way in the whole process.
    pub inbounds: Arc<InflightRequests>,
    /// Requests whose tries were used up here a moment ago.
    pub spent: Arc<RetryHistory>,
    /// Inbound requests whose deadline ended them a moment ago, while the app may still be at work.
    pub late: Arc<RetryHistory>,
    /// How outbound calls were joined with inbound requests.
    pub joins: CorrelationCounters,
    /// The open connections, and how far they are on their way down.
    pub connections: ConnectionTracker,
}

/// What the workers know together about the calls through this process.
#[derive(Clone)]
pub struct SharedState {
    /// The inbound requests under way.
    pub inbounds: Arc<InflightRequests>,
    /// Requests whose tries were used up here a moment ago.
    pub spent: Arc<RetryHistory>,
    /// Inbound requests whose deadline ended them a moment ago.
    pub late: Arc<RetryHistory>,
}

impl Default for SharedState {
    fn default() -> Self {
        Self { inbounds: InflightRequests::new(), spent: Arc::default(), late: Arc::default() }
    }
}

/// Counts how outbound calls were joined with inbound requests.
pub struct CorrelationCounters {
    /// By a trace id.
    pub by_trace: Counter,
    /// By a trace id, with a request whose deadline is over.
    pub late: Counter,
    /// Because there was only one.
    pub only_one: Counter,
    /// Not at all: several were under way, and no id told which.
    pub not_joined: Counter,
    /// None was under way.
    pub no_inbound: Counter,
}

impl CorrelationCounters {
    fn new(telemetry: &Telemetry) -> Self {
        Self {
            by_trace: telemetry.correlation_counter("by_trace_id"),
            late: telemetry.correlation_counter("parent_expired"),
            only_one: telemetry.correlation_counter("only_in_flight"),
            not_joined: telemetry.correlation_counter("ambiguous"),
            no_inbound: telemetry.correlation_counter("no_parent"),
        }
    }
}

/// One snapshot as one worker sees it: with this worker's pools. Requests keep the view with which they began.
pub struct PolicyView {
    /// The policy.
    pub policy: Arc<Snapshot>,
    pools: Vec<OnceCell<Rc<Pool>>>,
}

impl PolicyView {
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

impl WorkerContext {
    /// A worker that reads its policy from `policy`.
    pub fn new(
        policy: Arc<ArcSwap<Snapshot>>,
        upstreams: Rc<Upstreams>,
        shard: Rc<Shard>,
        chain: &SharedState,
    ) -> Rc<Self> {
        let view = PolicyView::new(policy.load_full());
        let joins = CorrelationCounters::new(shard.telemetry());
        Rc::new(Self {
            inbounds: Arc::clone(&chain.inbounds),
            spent: Arc::clone(&chain.spent),
            late: Arc::clone(&chain.late),
            joins,
            policy: RefCell::new(Cache::new(policy)),
            view: RefCell::new(view),
            upstreams,
            timers: Timers::default(),
            shard,
            connections: ConnectionTracker::default(),
        })
    }

    /// True once callers are to be sent elsewhere.
    pub fn is_leaving(&self) -> bool {
        self.connections.phase() >= DrainPhase::Leaving
    }

    /// The policy for a request that begins now.
    pub fn view(&self) -> Rc<PolicyView> {
        let mut cache = self.policy.borrow_mut();
        let newest = cache.load();
        let view = self.view.borrow();
        if Arc::ptr_eq(&view.policy, newest) {
            return Rc::clone(&view);
        }
        drop(view);
        let next = PolicyView::new(Arc::clone(newest));
        self.upstreams.keep_only(|id| next.policy.destinations.iter().any(|one| one.cluster.id == id));
        *self.view.borrow_mut() = Rc::clone(&next);
        next
    }
}
