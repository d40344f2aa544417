//! A downstream connection, as the exchanges on it see it, and the listener that accepted it.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;

use tokio::time::Instant;

use crate::net::flow::Flow;
use crate::net::http2_tunnel::TunnelSender;
use crate::net::io::Io;
use crate::policy::model::Listener;
use crate::policy::snapshot::Snapshot;
use crate::proxy::headers::Via;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::runtime::drain::{ConnectionTracker, DrainPhase};
use crate::runtime::waker::InlineWaker;
use crate::telemetry::ListenerMetrics;

/// A listener as one worker has it open.
pub struct ActiveListener {
    /// Its values when it was opened. Values that a reload may change are read from the policy of each connection and request.
    pub values: Listener,
    /// Its member of `Via`.
    pub via: Via,
    /// Its connections, which are told to go elsewhere when it closes.
    pub connections: ConnectionTracker,
    /// Its counters and gauges on this worker.
    pub metrics: ListenerMetrics,
    /// True once the log has said that a connection reached `maxStreams`.
    has_warned: Cell<bool>,
}

impl ActiveListener {
    /// A listener that has just been opened.
    pub fn new(values: Listener, via: Via, metrics: ListenerMetrics) -> Self {
        Self { values, via, connections: ConnectionTracker::default(), metrics, has_warned: Cell::new(false) }
    }

    /// The listener's values in `policy`. Where that policy has another listener on the same address, a request on an old
    /// connection is treated as one on a new connection: its caller cannot know that the name has changed.
    ///
    /// # Errors
    /// If that policy has no listener there any more: the last connections end.
    pub fn listener<'a>(&self, policy: &'a Snapshot) -> Result<&'a Listener, LocalReply> {
        let here = |one: &&Listener| one.bind == self.values.bind;
        let same = |one: &&Listener| here(one) && one.name == self.values.name;
        // Port 0 is another address each time; and a TLS connection must not go on as plain text.
        let successor =
            |one: &&Listener| here(one) && one.bind.port() != 0 && one.tls.is_some() == self.values.tls.is_some();
        let all = &policy.listeners;
        all.iter().find(same).or_else(|| all.iter().find(successor)).ok_or_else(|| {
            LocalReply::plain(LocalReplyKind::Draining, "the policy does not have this listener any more")
        })
    }

    /// The values that hold for a connection in `policy`; those of the opening where that policy has no such listener.
    pub fn values_in<'a>(&'a self, policy: &'a Snapshot) -> &'a Listener {
        self.listener(policy).unwrap_or(&self.values)
    }

    /// Tells its connections to go elsewhere: HTTP/2 at once, HTTP/1 with the next answer. None is cut.
    pub fn close(&self) {
        self.connections.advance(DrainPhase::Leaving);
    }

    /// True once its connections are told to go elsewhere.
    pub fn is_closed(&self) -> bool {
        self.connections.phase() >= DrainPhase::Leaving
    }
}

/// Takes over the downstream stream when its HTTP part is over.
pub type StreamHandler = Box<dyn FnOnce(Io) -> Pin<Box<dyn Future<Output = ()>>>>;

/// One downstream connection.
pub struct DownstreamConnection {
    /// The listener that accepted it.
    pub listener: Rc<ActiveListener>,
    /// The address of the caller.
    pub peer: SocketAddr,
    begun: Cell<u64>,
    over: Cell<u64>,
    over_at: Cell<Option<Instant>>,
    /// Most exchanges side by side; 0 for HTTP/1.
    max_streams: Cell<u64>,
    waker: Option<Rc<InlineWaker>>,
    newest: RefCell<Option<Rc<Flow>>>,
    is_unframed: Cell<bool>,
    handoff: RefCell<Option<StreamHandler>>,
    awaited_sender: RefCell<Option<TunnelSender>>,
}

impl DownstreamConnection {
    /// A connection without an exchange. With `one_task`, all its exchanges run in the task of the connection.
    pub fn new(listener: Rc<ActiveListener>, peer: SocketAddr, one_task: bool) -> Rc<Self> {
        Rc::new(Self {
            listener,
            peer,
            begun: Cell::new(0),
            over: Cell::new(0),
            over_at: Cell::new(None),
            max_streams: Cell::new(0),
            waker: one_task.then(Rc::default),
            newest: RefCell::new(None),
            is_unframed: Cell::new(false),
            handoff: RefCell::new(None),
            awaited_sender: RefCell::new(None),
        })
    }

    /// True if its exchanges are streams side by side, each with a task of its own.
    pub fn has_streams(&self) -> bool {
        self.waker.is_none()
    }

    /// The waker for upstream connections that the exchange's task drives.
    pub fn waker(&self) -> Rc<InlineWaker> {
        self.waker.as_ref().map_or_else(Rc::default, Rc::clone)
    }

    /// Notes an exchange that begins.
    pub fn begin(&self) {
        self.begun.set(self.begun.get() + 1);
        if self.begun.get() - self.over.get() == self.max_streams.get() {
            self.reach_max_streams();
        }
    }

    /// Sets the number of streams that the caller may have side by side.
    pub fn set_max_streams(&self, count: u32) {
        self.max_streams.set(count.into());
    }

    /// The caller may not begin another stream now: its HTTP/2 library holds further calls back and does not report it.
    #[cold]
    fn reach_max_streams(&self) {
        let ActiveListener { values, metrics, has_warned, .. } = &*self.listener;
        metrics.max_streams_reached.increment();
        metrics.at_max_streams.increment();
        if !has_warned.replace(true) {
            tracing::warn!(
                listener = values.name,
                peer = %self.peer,
                streams = self.max_streams.get(),
                "a caller's connection has as many streams as `maxStreams` allows; its further calls wait in the caller: \
                 raise `maxStreams` of the listener, or let the caller open more connections (logged once per worker)"
            );
        }
    }

    /// Notes an exchange that is over.
    pub fn finish(&self, at: Instant) {
        if self.begun.get() - self.over.get() == self.max_streams.get() {
            self.listener.metrics.at_max_streams.decrement();
        }
        self.over.set(self.over.get() + 1);
        self.over_at.set(Some(at));
    }

    /// How many exchanges are over.
    pub fn finished(&self) -> u64 {
        self.over.get()
    }

    /// When the last exchange was over.
    pub fn over_at(&self) -> Option<Instant> {
        self.over_at.get()
    }

    /// True while an exchange is under way.
    pub fn is_busy(&self) -> bool {
        self.begun.get() > self.over.get()
    }

    /// Sets the flow of the exchange that begins now; over HTTP/1 it is the only one.
    pub fn keep(&self, flow: Rc<Flow>) {
        *self.newest.borrow_mut() = Some(flow);
    }

    /// The flow of the exchange that began last.
    pub fn newest(&self) -> Option<Rc<Flow>> {
        self.newest.borrow().clone()
    }

    /// True if hyper may have read the whole request of the exchange that began last: its body has ended, or no byte of it
    /// has been taken from hyper. In between hyper reads from the connection itself.
    pub fn may_be_read(&self) -> bool {
        let newest = self.newest.borrow();
        newest.as_ref().is_none_or(|flow| flow.request.ended() || flow.request.bytes() == 0)
    }

    /// Takes that flow.
    pub fn take_newest(&self) -> Option<Rc<Flow>> {
        self.newest.borrow_mut().take()
    }

    /// Notes that only the end of the connection ends the current response (HTTP/1.0, RFC 9112, 6.3).
    pub fn end_with_connection(&self) {
        self.is_unframed.set(true);
    }

    /// True if the caller would take a cut body for a complete one.
    pub fn is_unframed(&self) -> bool {
        self.is_unframed.get()
    }

    /// Sets what takes over the stream of this connection once its HTTP part is over.
    pub fn hand_off(&self, joining: StreamHandler) {
        *self.handoff.borrow_mut() = Some(joining);
    }

    /// Sets what gets the sender of the tunnel that hyper is about to open on a stream.
    pub(super) fn await_sender(&self, sender: TunnelSender) {
        *self.awaited_sender.borrow_mut() = Some(sender);
    }

    /// Takes that, once.
    pub(super) fn take_awaited_sender(&self) -> Option<TunnelSender> {
        self.awaited_sender.borrow_mut().take()
    }

    /// Takes what was set.
    pub fn take_handoff(&self) -> Option<StreamHandler> {
        self.handoff.borrow_mut().take()
    }
}
