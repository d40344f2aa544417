//! One endpoint of one worker's pool: its load, its idle HTTP/1.1 connections, its shared HTTP/2 connections.
//!
//! `pool` checks connections out and in here, `dial` adds new ones, `waiters` are the calls that wait for either. Idle connections are reused last in, first out, so that a
//! few stay in use and the rest expire. An idle connection is kept for the smallest of three times: the policy's
//! `connections.idle`, a little less than `Keep-Alive: timeout=`, and the idle limit learned from the upstream's closes: an
//! upstream that closes idle connections after 5 s gets none that has been idle for more than 4 s. A connection is not
//! used again once its lifetime is over, once it has carried the requests that the upstream allows on one, or once it is
//! stale: another connection of the same age has ended in place of a response.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use slab::Slab;
use tokio::time::{Instant, sleep};

use crate::rules::ejection::EjectionMember;
use crate::runtime::tasks;
use crate::runtime::waker::InlineWaker;
use crate::telemetry::DestinationMetrics;
use crate::upstream::address_state::AddressState;
use crate::upstream::balance::EndpointLoad;
use crate::upstream::cluster::{Address, Cluster};
use crate::upstream::fresh_connections::FreshConnections;
use crate::upstream::http1::Http1;
use crate::upstream::http2::{Http2, MAX_STREAMS};
use crate::upstream::lifetime::{EndReason, Lifetime};
use crate::upstream::reachability::Reachability;
use crate::upstream::waiters::Waiters;

/// An HTTP/2 connection without a stream for this time is closed.
const HTTP2_IDLE: Duration = Duration::from_secs(60);

/// Responses that are counted for all workers together, because each such count costs an atomic operation.
const COUNTED_TOGETHER: u32 = 8;

/// The least that is left of an announced idle time.
const ANNOUNCED_MARGIN: Duration = Duration::from_millis(500);

/// How long a suspected HTTP/2 connection may take to answer before its siblings are suspected too.
const SIBLINGS_AFTER: Duration = Duration::from_millis(250);

/// A close after a shorter idle time sets no idle limit: it is a restart, or the bound of a connection's requests.
const MIN_LEARNED_IDLE: Duration = Duration::from_millis(100);

/// How long a learned limit holds; not longer, because a restart closes idle connections too.
const LEARNED_LIMIT_LIFE: Duration = Duration::from_secs(60);

/// One endpoint of one worker's pool.
pub struct Endpoint {
    /// Its socket address and TLS server name.
    pub address: Address,
    /// The cluster that it belongs to.
    pub cluster: Arc<Cluster>,
    /// Latency and calls in flight of this worker.
    pub load: EndpointLoad,
    /// Its ejection state, shared by all workers.
    pub member: Arc<EjectionMember>,
    /// What all workers know of its connections.
    state: Arc<AddressState>,
    idle: RefCell<Vec<IdleConnection>>,
    shared: RefCell<Vec<Rc<Http2>>>,
    idle_limit: Cell<Option<IdleLimit>>,
    /// Calls that wait for a connection.
    pub waiters: Waiters,
    /// Whether it accepts connections.
    pub reachability: Reachability,
    /// Most streams of the newest HTTP/2 connection, at least 1.
    streams_per_connection: Cell<usize>,
    /// True if the last TLS handshake agreed on HTTP/1.1: callers then wait for no shared connection.
    pub chose_http1: Cell<bool>,
    /// Responses that [`AddressState::worker`] does not know yet.
    uncounted: Cell<u32>,
    /// Requests that wait on a reused connection and are woken when that connection becomes stale.
    watching: RefCell<Slab<Rc<InlineWaker>>>,
    /// The mark whose setting the watching requests have been told.
    told_stale: Cell<Option<Instant>>,
    /// Bounds the connections that are opened although another one is idle.
    pub fresh: FreshConnections,
    /// True once the cluster does not have this address any more.
    is_retired: Cell<bool>,
    /// When the first request was sent of those after the last response over HTTP/1.1.
    unanswered_since: Cell<Option<Instant>>,
    pub(super) metrics: DestinationMetrics,
}

struct IdleConnection {
    connection: Box<Http1>,
    expires_at: Instant,
}

/// How long connections may be idle, learned from a close by the upstream.
#[derive(Clone, Copy)]
struct IdleLimit {
    longest: Duration,
    expires_at: Instant,
}

impl Endpoint {
    /// An endpoint without connections or calls.
    pub fn new(address: Address, cluster: &Arc<Cluster>, metrics: DestinationMetrics, now: Instant) -> Rc<Self> {
        let member = cluster.member(address.socket);
        let state = cluster.address_state(address.socket, now);
        Rc::new(Self {
            reachability: Reachability::new(Arc::clone(&state.dials), now),
            address,
            state,
            cluster: Arc::clone(cluster),
            member,
            load: EndpointLoad::new(now),
            idle: RefCell::default(),
            shared: RefCell::default(),
            idle_limit: Cell::new(None),
            waiters: Waiters::default(),
            streams_per_connection: Cell::new(MAX_STREAMS),
            chose_http1: Cell::new(false),
            uncounted: Cell::new(0),
            watching: RefCell::default(),
            told_stale: Cell::new(None),
            fresh: FreshConnections::new(now),
            is_retired: Cell::new(false),
            unanswered_since: Cell::new(None),
            metrics,
        })
    }

    /// Checks out the connection used last that can still take a request.
    pub fn checkout_idle(&self, cx: &mut Context<'_>, now: Instant) -> Option<Box<Http1>> {
        loop {
            let mut candidate = self.idle.borrow_mut().pop()?;
            self.metrics.idle.decrement();
            if self.is_stale(candidate.connection.lifetime.opened_at) {
                self.end_early(EndReason::Stale);
            } else if self.is_near_worker_end(now) {
                self.end_early(EndReason::Learned);
            } else if !candidate.connection.is_fresh(cx) {
                self.close_stale(candidate, now);
            } else if now < candidate.expires_at && self.is_within_limit(&candidate, now) {
                return Some(candidate.connection);
            } else {
                // Closed by this side, so the close teaches nothing about the upstream's limit.
                self.close_expired(&candidate, now);
            }
        }
    }

    /// False if a limit learned after the check-in says that the upstream closes connections idle for so long.
    fn is_within_limit(&self, candidate: &IdleConnection, now: Instant) -> bool {
        let limit = self.idle_limit.get().filter(|limit| now < limit.expires_at);
        limit.is_none_or(|limit| now.saturating_duration_since(candidate.connection.idle_since) <= limit.longest)
    }

    /// Checks a connection in after its response ended: gives it to a call that waits, keeps it for `idle_timeout` at most, or
    /// closes it if it must not be used again, if `max_idle` connections are idle already, or if the endpoint is retired.
    /// `announced` is the timeout of the response's `Keep-Alive` field; a tenth of it is left, and at least half a second,
    /// because some servers close at the time that they announce, and one that rounds up closes earlier.
    pub fn check_in_idle(
        self: &Rc<Self>,
        mut connection: Box<Http1>,
        idle_timeout: Duration,
        max_idle: usize,
        announced: Option<Duration>,
        now: Instant,
    ) {
        let mut keep = idle_timeout;
        if let Some(announced) = announced {
            let margin = announced.mul_f32(0.1).max(ANNOUNCED_MARGIN);
            keep = keep.min(announced.saturating_sub(margin));
        }
        if let Some(limit) = self.idle_limit.get().filter(|limit| now < limit.expires_at) {
            keep = keep.min(limit.longest);
        }
        if let Some(reason) = self.must_end(&connection, now) {
            self.end_early(reason);
            return;
        }
        if max_idle == 0 || keep.is_zero() || self.is_retired.get() {
            self.count_close();
            return;
        }
        connection.idle_since = now;
        if !self.waiters.is_empty() {
            let Some(unclaimed) = self.hand_on(connection, true) else { return };
            connection = unclaimed;
        }
        let mut idle = self.idle.borrow_mut();
        if idle.len() >= max_idle {
            self.count_close();
            return;
        }
        let expires_at = (now + keep).min(connection.lifetime.ends_at);
        idle.push(IdleConnection { connection, expires_at });
        self.metrics.idle.increment();
    }

    /// Why a connection whose response has ended takes no further request, if it takes none.
    fn must_end(&self, connection: &Http1, now: Instant) -> Option<EndReason> {
        let lifetime = &connection.lifetime;
        if self.is_stale(lifetime.opened_at) {
            return Some(EndReason::Stale);
        }
        if let Some(reason) = lifetime.is_over(now) {
            return Some(reason);
        }
        let learned = self.state.requests.of_connection(lifetime.spread, now);
        let is_learned = learned.is_some_and(|most| lifetime.requests() >= most) || self.is_near_worker_end(now);
        is_learned.then_some(EndReason::Learned)
    }

    /// Counts the response over an HTTP/1.1 connection.
    pub fn count_response(&self) {
        let uncounted = self.uncounted.get() + 1;
        self.uncounted.set(uncounted);
        if uncounted >= COUNTED_TOGETHER {
            self.flush_count();
        }
    }

    fn flush_count(&self) {
        self.state.worker.count(self.uncounted.take());
    }

    /// Whether the upstream is about to replace its worker process, so that no connection is used twice.
    pub fn is_near_worker_end(&self, now: Instant) -> bool {
        self.state.worker.is_near(self.uncounted.get(), now)
    }

    /// Records that reused connections have ended in place of a response: all of their age are stale.
    pub fn record_end(&self, now: Instant) {
        self.flush_count();
        self.state.worker.record_end(now);
        self.mark_stale(now);
    }

    /// Whether a connection opened at `opened_at` is not used again, because another one of its age has ended.
    pub fn is_stale(&self, opened_at: Instant) -> bool {
        self.state.stale.is_stale(opened_at)
    }

    /// When connections became stale last; `None` if none ever did.
    pub fn stale_since(&self) -> Option<Instant> {
        self.state.stale.set_at()
    }

    /// Makes all connections stale that were opened before `now`, in all workers: this worker's idle ones are closed now,
    /// those of the others at their next checkout or sweep.
    pub fn mark_stale(&self, now: Instant) {
        self.state.stale.set(now);
        self.apply_stale_mark();
        self.end_shared(now);
    }

    /// Closes idle connections that have become stale, and wakes the requests that wait on busy ones.
    fn apply_stale_mark(&self) {
        let since = self.stale_since();
        if self.told_stale.replace(since) == since {
            return;
        }
        self.close_stale_idle();
        self.watching.borrow().iter().for_each(|(_, waker)| waker.wake());
    }

    /// Has `waker` woken when connections become stale, until the result is dropped.
    pub fn watch_stale(self: &Rc<Self>, waker: &Rc<InlineWaker>) -> StaleWatch {
        let key = self.watching.borrow_mut().insert(Rc::clone(waker));
        StaleWatch { endpoint: Rc::clone(self), key }
    }

    fn close_stale_idle(&self) {
        let is_stale = |idle: &mut IdleConnection| self.is_stale(idle.connection.lifetime.opened_at);
        let closed = self.idle.borrow_mut().extract_if(.., is_stale).count();
        self.metrics.idle.add(-count(closed));
        (0..closed).for_each(|_| self.end_early(EndReason::Stale));
    }

    /// Closes HTTP/2 connections that take no new stream and have none left.
    fn end_shared(&self, now: Instant) {
        let mut shared = self.shared.borrow_mut();
        shared.retain(|connection| {
            let reason = self.shared_must_end(connection, now).filter(|_| connection.idle_for(now).is_some());
            reason.inspect(|reason| self.end_early(*reason)).is_none()
        });
    }

    fn shared_must_end(&self, connection: &Http2, now: Instant) -> Option<EndReason> {
        if self.is_stale(connection.lifetime.opened_at) {
            return Some(EndReason::Stale);
        }
        connection.lifetime.is_over(now)
    }

    /// Counts a connection that could have taken another request, and is closed.
    pub fn end_early(&self, reason: EndReason) {
        let early = &self.metrics.early_closes;
        let counter = match reason {
            EndReason::Stale => &early.stale,
            EndReason::MaxAge => &early.max_age,
            EndReason::MaxRequests => &early.max_requests,
            EndReason::Learned => &early.learned,
            EndReason::Draining => &early.draining,
        };
        counter.increment();
        self.count_close();
    }

    /// An HTTP/2 connection with capacity for one more stream.
    pub fn shared(&self, now: Instant) -> Option<Rc<Http2>> {
        let takes_one =
            |connection: &&Rc<Http2>| connection.has_capacity() && self.shared_must_end(connection, now).is_none();
        self.shared.borrow().iter().find(takes_one).cloned()
    }

    /// Adds a new HTTP/2 connection for all callers.
    pub fn add_shared(&self, connection: Rc<Http2>) {
        self.streams_per_connection.set(connection.max_streams().max(1));
        self.shared.borrow_mut().push(connection);
    }

    /// Calls that one shared connection is expected to serve at the same time, at least 1.
    pub fn calls_per_connection(&self) -> usize {
        self.streams_per_connection.get()
    }

    /// Counts an opened connection.
    pub fn count_connect(&self, now: Instant) {
        self.reachability.opened(now);
        self.metrics.open.increment();
        self.metrics.connects.increment();
    }

    /// Counts a connect failure; the endpoint is skipped for 1 s while the pool has others.
    pub fn count_connect_failure(&self, now: Instant) {
        self.metrics.connect_failures.increment();
        self.reachability.failed(now);
    }

    /// Counts a connection, begun at `since`, that was not open within `timeouts.connect`.
    pub fn count_connect_timeout(&self, since: Instant, now: Instant) {
        self.metrics.connect_failures.increment();
        self.reachability.timed_out(since, now);
    }

    /// Counts a closed connection.
    pub fn count_close(&self) {
        self.count_closes(1);
    }

    /// Closes idle connections that have expired or that the upstream has closed.
    ///
    /// Returns true if a connection is left for the next sweep.
    pub fn sweep(&self, cx: &mut Context<'_>, now: Instant) -> bool {
        self.apply_stale_mark();
        self.reachability.publish();
        let stale: Vec<IdleConnection> = self
            .idle
            .borrow_mut()
            .extract_if(.., |idle| now >= idle.expires_at || !idle.connection.is_fresh(cx))
            .collect();
        self.metrics.idle.add(-count(stale.len()));
        if self.idle.borrow().is_empty() && stale.iter().filter(|idle| now < idle.expires_at).count() > 1 {
            // All at once: a worker process has ended.
            self.flush_count();
            self.state.worker.record_end(now);
        }
        for connection in stale {
            self.close_stale(connection, now);
        }
        self.end_shared(now);
        self.retain_shared(|shared| {
            let longest = if shared.liveness().is_retired() { Duration::ZERO } else { HTTP2_IDLE };
            shared.is_open() && shared.idle_for(now).is_none_or(|idle| idle < longest)
        });
        !self.shared.borrow().is_empty() || !self.idle.borrow().is_empty() || !self.watching.borrow().is_empty()
    }

    /// Counts a stream of a shared connection that has ended; a retired endpoint closes connections without streams.
    pub fn end_stream(self: &Rc<Self>, connection: &Http2, now: Instant) {
        connection.end_stream(now);
        if !self.waiters.is_empty() {
            self.hand_out_streams(false);
        }
        if self.is_retired.get() {
            self.retain_shared(|shared| shared.idle_for(now).is_none());
        } else if self.shared_must_end(connection, now).is_some() {
            self.end_shared(now);
        }
    }

    /// Closes all idle connections and keeps no connection from now on: the cluster does not have this address any more. A
    /// connection in use is closed when its calls have ended.
    pub fn retire(&self, now: Instant) {
        self.is_retired.set(true);
        let idle = std::mem::take(&mut *self.idle.borrow_mut());
        self.metrics.idle.add(-count(idle.len()));
        self.count_closes(idle.len());
        self.retain_shared(|shared| shared.idle_for(now).is_none());
    }

    /// Records a request that is sent over HTTP/1.1.
    pub fn record_sent(&self, now: Instant) {
        if self.unanswered_since.get().is_none() {
            self.unanswered_since.set(Some(now));
        }
    }

    /// Records that a response has begun over HTTP/1.1.
    pub fn record_answer(&self) {
        self.unanswered_since.set(None);
    }

    /// When the first request was sent of those after the last response over HTTP/1.1.
    pub fn unanswered_since(&self) -> Option<Instant> {
        self.unanswered_since.get()
    }

    /// A call sent at `sent` got no byte in time: closes the idle HTTP/1.1 connections that have been idle since then, unless
    /// the endpoint has answered another call meanwhile. What made one connection mute (a middlebox that lost its state, a
    /// frozen process) did so to all that were open, and each of them would cost a call its whole timeout.
    #[cold]
    pub fn close_unheard(&self, sent: Instant) {
        if self.unanswered_since.get().is_none_or(|since| since > sent) {
            return;
        }
        let is_unheard = |idle: &mut IdleConnection| idle.connection.idle_since <= sent;
        let closed = self.idle.borrow_mut().extract_if(.., is_unheard).count();
        self.metrics.idle.add(-count(closed));
        self.count_closes(closed);
    }

    /// A call sent at `sent` over `silent` got no byte in time: that connection gets no call until it has shown that it lives.
    /// If it has not soon, neither does any other connection from which nothing has come since then.
    #[cold]
    pub fn suspect(self: &Rc<Self>, silent: &Rc<Http2>, sent: Instant) {
        silent.liveness().suspect();
        if self.shared.borrow().len() == 1 {
            return;
        }
        let (endpoint, silent) = (Rc::downgrade(self), Rc::downgrade(silent));
        tasks::spawn(async move {
            sleep(SIBLINGS_AFTER).await;
            let (Some(endpoint), Some(silent)) = (endpoint.upgrade(), silent.upgrade()) else { return };
            if silent.liveness().is_suspected() {
                let shared = endpoint.shared.borrow();
                let unheard = shared.iter().filter(|other| other.is_unheard_since(sent));
                unheard.for_each(|other| other.liveness().suspect());
            }
        });
    }

    fn retain_shared(&self, keep: impl Fn(&Http2) -> bool) {
        let mut shared = self.shared.borrow_mut();
        let before = shared.len();
        shared.retain(|connection| keep(connection));
        self.count_closes(before - shared.len());
    }

    fn count_closes(&self, connections: usize) {
        self.metrics.open.add(-count(connections));
        self.metrics.closes.add(connections as u64);
    }

    fn close_expired(&self, expired: &IdleConnection, now: Instant) {
        match expired.connection.lifetime.is_over(now) {
            Some(reason) => self.end_early(reason),
            None => self.count_close(),
        }
    }

    /// Closes a connection; one that the upstream closed before it expired sets the idle limit.
    fn close_stale(&self, stale: IdleConnection, now: Instant) {
        if now >= stale.expires_at {
            return self.close_expired(&stale, now);
        }
        self.count_close();
        let idle = now.saturating_duration_since(stale.connection.idle_since);
        self.learn_from_close(idle, &stale.connection.lifetime, now);
    }

    /// Learns from the close, without a word, of a connection that had been idle for `idle`.
    ///
    /// After a long idle time the close sets the idle limit: for the next 60 s no connection is kept for more than 80 % of
    /// that. After a short one it may be the bound of a connection's requests.
    pub fn learn_from_close(&self, idle: Duration, lifetime: &Lifetime, now: Instant) {
        if idle >= MIN_LEARNED_IDLE {
            let limit = IdleLimit { longest: idle.mul_f32(0.8), expires_at: now + LEARNED_LIMIT_LIFE };
            self.idle_limit.set(Some(limit));
        } else {
            self.state.requests.record_close(lifetime.requests(), lifetime.opened_at, now);
        }
    }

    /// Learns from a response that announced the close of its connection.
    pub fn learn_from_announced_close(&self, lifetime: &Lifetime, now: Instant) {
        self.state.requests.record_announced_close(lifetime.requests(), lifetime.opened_at, now);
    }
}

/// A request that waits on a reused connection of an endpoint; see [`Endpoint::watch_stale`].
pub struct StaleWatch {
    endpoint: Rc<Endpoint>,
    key: usize,
}

impl StaleWatch {
    /// Since when connections opened at `opened_at` are stale; `None` while they are not.
    pub fn stale_since(&self, opened_at: Instant) -> Option<Instant> {
        self.endpoint.stale_since().filter(|_| self.endpoint.is_stale(opened_at))
    }

    /// How long the endpoint usually takes for a response.
    pub fn usual_latency(&self) -> Duration {
        self.endpoint.load.latency()
    }
}

impl Drop for StaleWatch {
    fn drop(&mut self) {
        self.endpoint.watching.borrow_mut().remove(self.key);
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let idle = self.idle.borrow().len();
        let open = idle + self.shared.borrow().len();
        self.metrics.idle.add(-count(idle));
        self.count_closes(open);
    }
}

fn count(connections: usize) -> i64 {
    i64::try_from(connections).unwrap_or(i64::MAX)
}
