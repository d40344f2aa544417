//! What all requests of one worker share: the policy in force, the pools, the timers, the metric shard.

use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;

use crate::policy::snapshot::{CompiledDestination, Snapshot};
use crate::rules::inflight::InflightRequests;
use crate::rules::retry_history::RetryHistory;
use crate::runtime::drain::{ConnectionTracker, DrainPhase};
use crate::runtime::timer::Timers;
use crate::telemetry::{Counter, Shard, Telemetry};
use crate::upstream::pool::Pool;
use crate::upstream::upstreams::Upstreams;

/// The state of one worker, and what it shares with the others: the snapshot with its live state, and [`SharedState`].
pub struct WorkerContext {
    policy: RefCell<Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
    view: RefCell<Rc<PolicyView>>,
    /// The pools.
    pub upstreams: Rc<Upstreams>,
    /// Reusable timers.
    pub timers: Timers,
    /// The metric cells that exchanges record into.
    pub shard: Rc<Shard>,
    /// The inbound requests in flight in the whole process.
    pub inflight: Arc<InflightRequests>,
    /// Calls whose retries were used up in the last 10 s.
    pub retry_history: Arc<RetryHistory>,
    /// Inbound requests that ended by their deadline, while the app may work on.
    pub abandoned: Arc<RetryHistory>,
    /// Counts outbound calls by how they were correlated with inbound requests.
    pub correlations: CorrelationCounters,
    /// The open connections, and the phase of their drain.
    pub connections: ConnectionTracker,
}

/// What all workers share about the calls through this process.
#[derive(Clone)]
pub struct SharedState {
    /// The inbound requests in flight.
    pub inflight: Arc<InflightRequests>,
    /// Calls whose retries were used up in the last 10 s.
    pub retry_history: Arc<RetryHistory>,
    /// Inbound requests that ended by their deadline.
    pub abandoned: Arc<RetryHistory>,
}

impl Default for SharedState {
    fn default() -> Self {
        Self { inflight: InflightRequests::new(), retry_history: Arc::default(), abandoned: Arc::default() }
    }
}

/// Counts outbound calls by how they were correlated with inbound requests.
pub struct CorrelationCounters {
    /// By a trace id.
    pub by_trace: Counter,
    /// By a trace id, with a request whose deadline is over.
    pub late: Counter,
    /// By being the only inbound request in flight.
    pub only_one: Counter,
    /// Not at all: several were in flight, and no id told which.
    pub not_joined: Counter,
    /// None was in flight.
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

/// A snapshot as one worker sees it: with the pools of this worker. Requests keep the view with which they began.
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
    pub fn destination(&self, position: usize) -> &CompiledDestination {
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
        let correlations = CorrelationCounters::new(shard.telemetry());
        Rc::new(Self {
            inflight: Arc::clone(&chain.inflight),
            retry_history: Arc::clone(&chain.retry_history),
            abandoned: Arc::clone(&chain.abandoned),
            correlations,
            policy: RefCell::new(Cache::new(policy)),
            view: RefCell::new(view),
            upstreams,
            timers: Timers::default(),
            shard,
            connections: ConnectionTracker::default(),
        })
    }

    /// True once a drain has begun: callers are told to go elsewhere.
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
        self.upstreams.retain_clusters(|id| next.policy.destinations.iter().any(|one| one.cluster.id == id));
        *self.view.borrow_mut() = Rc::clone(&next);
        next
    }
}
