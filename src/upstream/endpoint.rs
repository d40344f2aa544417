//! One endpoint of one worker's pool: its load, its idle HTTP/1.1 connections, its shared HTTP/2 connections.
//!
//! `pool` checks connections out and in here, `dial` adds new ones, `waiters` are the calls that wait for either. Idle connections are reused last in, first out, so that a
//! few stay in use and the rest expire. An idle connection is kept for the smallest of three times: the policy's
//! `connections.idle`, nine tenths of `Keep-Alive: timeout=`, and the idle limit learned from the upstream's closes: an
//! upstream that closes idle connections after 5 s gets none that has been idle for more than 4 s.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use tokio::time::Instant;

use crate::rules::ejection::EjectionMember;
use crate::telemetry::DestinationMetrics;
use crate::upstream::balance::EndpointLoad;
use crate::upstream::cluster::{Address, Cluster};
use crate::upstream::http1::Http1;
use crate::upstream::http2::{Http2, MAX_STREAMS};
use crate::upstream::reachability::Reachability;
use crate::upstream::waiters::Waiters;

/// An HTTP/2 connection without a stream for this time is closed.
const HTTP2_IDLE: Duration = Duration::from_secs(60);

/// Least time between two connections that are opened although another one is idle: the idle one is closed for it and
/// occupies a port for a minute (TIME_WAIT).
const FRESH_INTERVAL: Duration = Duration::from_millis(10);

/// A close after a shorter idle time sets no limit: it is a restart, or an upstream that keeps no connection alive.
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
    /// From when on a connection may be opened although another one is idle.
    next_fresh_at: Cell<Instant>,
    /// True once the cluster does not have this address any more.
    is_retired: Cell<bool>,
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
        Rc::new(Self {
            reachability: Reachability::new(cluster.dial_limit(address.socket, now), now),
            address,
            cluster: Arc::clone(cluster),
            member,
            load: EndpointLoad::new(now),
            idle: RefCell::default(),
            shared: RefCell::default(),
            idle_limit: Cell::new(None),
            waiters: Waiters::default(),
            streams_per_connection: Cell::new(MAX_STREAMS),
            chose_http1: Cell::new(false),
            next_fresh_at: Cell::new(now),
            is_retired: Cell::new(false),
            metrics,
        })
    }

    /// Checks out the connection used last that can still take a request.
    pub fn checkout_idle(&self, cx: &mut Context<'_>, now: Instant) -> Option<Box<Http1>> {
        loop {
            let mut candidate = self.idle.borrow_mut().pop()?;
            self.metrics.idle.decrement();
            if !candidate.connection.is_fresh(cx) {
                self.close_stale(candidate, now);
            } else if now < candidate.expires_at && self.is_within_limit(&candidate, now) {
                return Some(candidate.connection);
            } else {
                // Closed by this side, so the close teaches nothing about the upstream's limit.
                self.count_close();
            }
        }
    }

    /// False if a limit learned after the check-in says that the upstream closes connections idle for so long.
    fn is_within_limit(&self, candidate: &IdleConnection, now: Instant) -> bool {
        let limit = self.idle_limit.get().filter(|limit| now < limit.expires_at);
        limit.is_none_or(|limit| now.saturating_duration_since(candidate.connection.idle_since) <= limit.longest)
    }

    /// Checks a connection in after its response ended: gives it to a call that waits, or keeps it for `idle_timeout` at most, or closes it if `max_idle`
    /// connections are idle already or the endpoint is retired. `announced` is the timeout of the response's `Keep-Alive`
    /// field; nine tenths of it are used.
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
            keep = keep.min(announced.mul_f32(0.9));
        }
        if let Some(limit) = self.idle_limit.get().filter(|limit| now < limit.expires_at) {
            keep = keep.min(limit.longest);
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
        idle.push(IdleConnection { connection, expires_at: now + keep });
        self.metrics.idle.increment();
    }

    /// Whether a connection may be opened now although another one is idle. True at most once in 10 ms.
    pub fn admits_fresh_connection(&self, now: Instant) -> bool {
        let is_admitted = now >= self.next_fresh_at.get();
        if is_admitted {
            self.next_fresh_at.set(now + FRESH_INTERVAL);
        }
        is_admitted
    }

    /// An HTTP/2 connection with capacity for one more stream.
    pub fn shared(&self) -> Option<Rc<Http2>> {
        self.shared.borrow().iter().find(|connection| connection.has_capacity()).cloned()
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
        self.reachability.publish();
        let stale: Vec<IdleConnection> = self
            .idle
            .borrow_mut()
            .extract_if(.., |idle| now >= idle.expires_at || !idle.connection.is_fresh(cx))
            .collect();
        self.metrics.idle.add(-count(stale.len()));
        for connection in stale {
            self.close_stale(connection, now);
        }
        self.retain_shared(|shared| shared.is_open() && shared.idle_for(now).is_none_or(|idle| idle < HTTP2_IDLE));
        !self.shared.borrow().is_empty() || !self.idle.borrow().is_empty()
    }

    /// Counts a stream of a shared connection that has ended; a retired endpoint closes connections without streams.
    pub fn end_stream(self: &Rc<Self>, connection: &Http2, now: Instant) {
        connection.end_stream(now);
        if !self.waiters.is_empty() {
            self.hand_out_streams(false);
        }
        if self.is_retired.get() {
            self.retain_shared(|shared| shared.idle_for(now).is_none());
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

    /// Closes a stale connection; one that the upstream closed before it expired sets the idle limit.
    fn close_stale(&self, stale: IdleConnection, now: Instant) {
        self.count_close();
        if now >= stale.expires_at {
            return;
        }
        self.learn_idle_limit(now.saturating_duration_since(stale.connection.idle_since), now);
    }

    /// Sets the idle limit after the upstream closed a connection that had been idle for `idle`: for the next 60 s no
    /// connection is kept for more than 80 % of that.
    pub fn learn_idle_limit(&self, idle: Duration, now: Instant) {
        if idle >= MIN_LEARNED_IDLE {
            let limit = IdleLimit { longest: idle.mul_f32(0.8), expires_at: now + LEARNED_LIMIT_LIFE };
            self.idle_limit.set(Some(limit));
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{Sink, Telemetry};
    use crate::upstream::cluster::{ClusterIdentity, Health};
    use crate::upstream::spec::UpstreamProtocol;

    #[tokio::test(start_paused = true)]
    async fn a_fresh_connection_is_admitted_once_in_ten_milliseconds() {
        let now = Instant::now();
        let socket = "127.0.0.1:80".parse().unwrap();
        let address = Address { socket, server_name: "app".into() };
        let metrics = Telemetry::new(Sink::memory().0).shard(0).destination("app");
        let identity = ClusterIdentity {
            name: "app".into(),
            endpoints: Vec::new(),
            protocol: UpstreamProtocol::Auto,
            tls: None,
            host: "app".into(),
        };
        let cluster = Cluster::new(identity, Health::new(now), &Default::default()).unwrap();
        let endpoint = Endpoint::new(address, &cluster, metrics, now);
        let admitted =
            (0..100).filter(|millis| endpoint.admits_fresh_connection(now + Duration::from_millis(*millis))).count();
        assert_eq!(admitted, 10);
    }
}
