//! One endpoint as one worker sees it: its load, its idle HTTP/1.1 connections, its shared HTTP/2 ones.
//!
//! Idle connections are kept last in, first out, so that a few stay warm and the rest can go. How long one is kept
//! is the smallest of the policy's `connections.idle`, what the upstream announced (`Keep-Alive: timeout=`), and
//! what its closes have taught: an upstream that closes idle connections after five seconds gets none
//! that is older than four.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::rules::ejection::EjectionMember;
use crate::telemetry::DestinationMetrics;
use crate::upstream::balance::EndpointLoad;
use crate::upstream::cluster::{Address, Cluster};
use crate::upstream::http1::Http1;
use crate::upstream::http2::{Http2, STREAMS};

/// An HTTP/2 connection that nobody has used for so long is closed.
const HTTP2_IDLE: Duration = Duration::from_secs(60);

/// An endpoint that could not be reached is passed over for so long.
const HOLD_OFF: Duration = Duration::from_secs(1);

/// A connection that is opened although another one is idle comes at most so often: each that is closed for it occupies a
/// port for a minute.
const FRESH_EVERY: Duration = Duration::from_millis(10);

/// A close sooner than this teaches nothing: it is a restart, or an upstream that keeps nothing alive.
const SHORTEST_LESSON: Duration = Duration::from_millis(100);

/// How long a lesson holds; a restart, too, closes connections that are idle.
const LESSON_HOLDS: Duration = Duration::from_secs(60);

/// One endpoint of one worker's pool.
pub struct Endpoint {
    /// Where it is.
    pub address: Address,
    /// Whose it is.
    pub cluster: Arc<Cluster>,
    /// How busy and how slow it is.
    pub load: EndpointLoad,
    /// Whether it is ejected, as all workers see it.
    pub member: Arc<EjectionMember>,
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<Rc<Http2>>>,
    lesson: Cell<Option<Lesson>>,
    /// Connections under way that callers may share.
    pub opening: Cell<usize>,
    /// Callers that wait for one of them, beside those that have asked for them.
    pub waiting: Cell<usize>,
    /// Rung when one has come, or has failed.
    pub opened: Notify,
    /// So many streams has the newest HTTP/2 connection room for.
    streams: Cell<usize>,
    /// Until when it is passed over, because it could not be reached.
    held_off: Cell<Option<Instant>>,
    /// True if TLS agreed on HTTP/1.1 the last time; then nobody waits for a connection to share.
    pub chose_http1: Cell<bool>,
    /// From when on a connection may be opened although another one is idle.
    fresh_at: Cell<Instant>,
    /// True once the destination does not have it any more.
    retired: Cell<bool>,
    metrics: DestinationMetrics,
}

struct Idle {
    connection: Box<Http1>,
    until: Instant,
}

#[derive(Clone, Copy)]
struct Lesson {
    longest: Duration,
    forget: Instant,
}

impl Endpoint {
    /// An endpoint that nobody has called yet.
    pub fn new(address: Address, cluster: &Arc<Cluster>, metrics: DestinationMetrics, now: Instant) -> Rc<Self> {
        let member = cluster.member(address.socket);
        Rc::new(Self {
            address,
            cluster: Arc::clone(cluster),
            member,
            load: EndpointLoad::new(now),
            idle: RefCell::default(),
            shared: RefCell::default(),
            lesson: Cell::new(None),
            opening: Cell::new(0),
            waiting: Cell::new(0),
            opened: Notify::new(),
            streams: Cell::new(STREAMS),
            held_off: Cell::new(None),
            chose_http1: Cell::new(false),
            fresh_at: Cell::new(now),
            retired: Cell::new(false),
            metrics,
        })
    }

    /// The connection used last, if there is one that is still good.
    pub fn take_idle(&self, cx: &mut Context<'_>, now: Instant) -> Option<Box<Http1>> {
        loop {
            let mut next = self.idle.borrow_mut().pop()?;
            self.metrics.idle.decrement();
            if !next.connection.is_fresh(cx) {
                self.discard(next, now);
            } else if now < next.until && self.may_be_kept(&next, now) {
                return Some(next.connection);
            } else {
                // Ours to close, so that there is nothing to learn of when the upstream does.
                self.closed();
            }
        }
    }

    /// False if the upstream has shown meanwhile that it closes connections that are idle for so long.
    fn may_be_kept(&self, idle: &Idle, now: Instant) -> bool {
        let lesson = self.lesson.get().filter(|lesson| now < lesson.forget);
        lesson.is_none_or(|lesson| now.saturating_duration_since(idle.connection.idle_since) <= lesson.longest)
    }

    /// Takes a connection back after its answer ended. `announced` is what its `Keep-Alive` field said.
    pub fn put_idle(
        &self,
        mut connection: Box<Http1>,
        keep: Duration,
        most: usize,
        announced: Option<Duration>,
        now: Instant,
    ) {
        let mut keep = keep;
        if let Some(announced) = announced {
            keep = keep.min(announced.mul_f32(0.9));
        }
        if let Some(lesson) = self.lesson.get().filter(|lesson| now < lesson.forget) {
            keep = keep.min(lesson.longest);
        }
        let mut idle = self.idle.borrow_mut();
        if idle.len() >= most || keep.is_zero() || self.retired.get() {
            self.closed();
            return;
        }
        connection.idle_since = now;
        idle.push(Idle { connection, until: now + keep });
        self.metrics.idle.increment();
    }

    /// Whether a connection may be opened now although another one is idle. Says yes at most once in 10 ms.
    pub fn grants_fresh(&self, now: Instant) -> bool {
        let granted = now >= self.fresh_at.get();
        if granted {
            self.fresh_at.set(now + FRESH_EVERY);
        }
        granted
    }

    /// An HTTP/2 connection with room for one more request.
    pub fn shared(&self) -> Option<Rc<Http2>> {
        self.shared.borrow().iter().find(|connection| connection.has_room()).cloned()
    }

    /// Offers a new HTTP/2 connection to whoever comes next.
    pub fn share(&self, connection: Rc<Http2>) {
        self.streams.set(connection.most().max(1));
        self.shared.borrow_mut().push(connection);
    }

    /// True if those who wait need more connections than are under way. Each is for the one that has asked for it, too.
    pub fn needs_another(&self) -> bool {
        self.waiting.get() > self.opening.get() * (self.streams.get() - 1)
    }

    /// Notes that a connection was opened.
    pub fn connected(&self) {
        self.held_off.set(None);
        self.metrics.open.increment();
        self.metrics.connects.increment();
    }

    /// Notes that a connection could not be opened; for a moment the endpoint is passed over where there are others.
    pub fn refused(&self, now: Instant) {
        self.metrics.connect_failures.increment();
        self.held_off.set(Some(now + HOLD_OFF));
    }

    /// True while it is passed over.
    pub fn is_held_off(&self, now: Instant) -> bool {
        self.held_off.get().is_some_and(|until| now < until)
    }

    /// Notes that a connection is gone.
    pub fn closed(&self) {
        self.gone(1);
    }

    /// Looks at every idle connection and takes away those that are closed or have been kept long enough.
    ///
    /// Returns true if any is left to look at later.
    pub fn sweep(&self, cx: &mut Context<'_>, now: Instant) -> bool {
        let stale: Vec<Idle> =
            self.idle.borrow_mut().extract_if(.., |one| now >= one.until || !one.connection.is_fresh(cx)).collect();
        self.metrics.idle.add(-count(stale.len()));
        for one in stale {
            self.discard(one, now);
        }
        self.keep_shared(|one| one.is_alive() && one.idle_for(now).is_none_or(|idle| idle < HTTP2_IDLE));
        !self.shared.borrow().is_empty() || !self.idle.borrow().is_empty()
    }

    /// Notes that a stream of a shared connection is over.
    pub fn stream_ended(&self, connection: &Http2, now: Instant) {
        connection.finish(now);
        if self.retired.get() {
            self.keep_shared(|one| one.idle_for(now).is_none());
        }
    }

    /// Closes what nobody uses, for good: the destination does not have this endpoint any more. A call under way may hold
    /// it for long; its connection is closed when it ends.
    pub fn retire(&self, now: Instant) {
        self.retired.set(true);
        let idle = std::mem::take(&mut *self.idle.borrow_mut());
        self.metrics.idle.add(-count(idle.len()));
        self.gone(idle.len());
        self.keep_shared(|one| one.idle_for(now).is_none());
    }

    fn keep_shared(&self, keep: impl Fn(&Http2) -> bool) {
        let mut shared = self.shared.borrow_mut();
        let before = shared.len();
        shared.retain(|one| keep(one));
        self.gone(before - shared.len());
    }

    fn gone(&self, connections: usize) {
        self.metrics.open.add(-count(connections));
        self.metrics.closes.add(connections as u64);
    }

    fn discard(&self, one: Idle, now: Instant) {
        self.closed();
        if now >= one.until {
            return;
        }
        self.learn(now.saturating_duration_since(one.connection.idle_since), now);
    }

    /// Notes that the upstream closed a connection that had been idle for so long: none is kept that long any more.
    pub fn learn(&self, idle: Duration, now: Instant) {
        if idle >= SHORTEST_LESSON {
            self.lesson.set(Some(Lesson { longest: idle.mul_f32(0.8), forget: now + LESSON_HOLDS }));
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let idle = self.idle.borrow().len();
        let all = idle + self.shared.borrow().len();
        self.metrics.idle.add(-count(idle));
        self.gone(all);
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
    async fn a_fresh_connection_is_granted_once_in_ten_milliseconds() {
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
        let granted = (0..100).filter(|millis| endpoint.grants_fresh(now + Duration::from_millis(*millis))).count();
        assert_eq!(granted, 10);
    }
}
