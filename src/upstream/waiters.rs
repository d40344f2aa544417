//! Calls that wait for a connection: each takes whichever comes first.
//!
//! A call enters the queue of its endpoint when no open connection is left, and possibly that of a second endpoint. The
//! oldest call of a queue gets the next connection: a new one, one that another call gives back, or a stream of a shared one.
//! New connections are opened for the number of waiting calls (`dial`), and belong to none of them; only the failure of a
//! connection goes to the call that it was opened for. Invariant: a connection that was handed to a call which has left goes
//! to the next one, or back to the pool.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

use tokio::time::Instant;

use crate::upstream::connect::ConnectError;
use crate::upstream::dial::ConnectOptions;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::http1::Http1;
use crate::upstream::pool::{Lease, Pool, ProtocolPreference, Transport};

/// What a waiting call gets.
pub enum WaitEvent {
    /// A connection.
    Connection(Lease),
    /// The connection that was opened for this call at an endpoint has failed; the call waits there no longer.
    Failed(Rc<Endpoint>, ConnectError),
}

/// One call that waits.
pub(super) struct Want {
    preference: ProtocolPreference,
    pub(super) options: ConnectOptions,
    /// False while the call wants a connection that no call has used before.
    takes_reused: Cell<bool>,
    /// True while the call can go to another endpoint.
    has_alternative: Cell<bool>,
    lease: RefCell<Option<Lease>>,
    failures: RefCell<VecDeque<(Rc<Endpoint>, ConnectError)>>,
    waker: RefCell<Option<Waker>>,
}

impl Want {
    fn is_served(&self) -> bool {
        self.lease.borrow().is_some()
    }

    fn serve(&self, lease: Lease) {
        *self.lease.borrow_mut() = Some(lease);
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<WaitEvent> {
        if let Some(lease) = self.lease.take() {
            return Poll::Ready(WaitEvent::Connection(lease));
        }
        if let Some((endpoint, error)) = self.failures.borrow_mut().pop_front() {
            return Poll::Ready(WaitEvent::Failed(endpoint, error));
        }
        *self.waker.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// The wait of one call. Dropping it leaves all queues and passes a connection on that has come meanwhile.
pub struct ConnectionWait {
    pool: Rc<Pool>,
    want: Rc<Want>,
    endpoints: Vec<Rc<Endpoint>>,
}

impl ConnectionWait {
    /// A wait at no endpoint yet. With `takes_reused` false, the call gets a connection that no call has used before.
    pub fn new(pool: &Rc<Pool>, preference: ProtocolPreference, options: ConnectOptions, takes_reused: bool) -> Self {
        pool.metrics.waiting.increment();
        let want = Rc::new(Want {
            preference,
            options,
            takes_reused: Cell::new(takes_reused),
            has_alternative: Cell::new(false),
            lease: RefCell::default(),
            failures: RefCell::default(),
            waker: RefCell::default(),
        });
        Self { pool: Rc::clone(pool), want, endpoints: Vec::new() }
    }

    /// Enters the queue of an endpoint too, and opens a connection there if fewer are being opened than calls wait.
    /// `has_alternative`: the call goes to another endpoint if this one takes long.
    pub fn wait_at(&mut self, endpoint: &Rc<Endpoint>, has_alternative: bool) {
        self.want.has_alternative.set(has_alternative);
        endpoint.waiters.push(&self.want);
        self.endpoints.push(Rc::clone(endpoint));
        self.pool.open_for_waiters(endpoint);
    }

    /// From now on the call takes connections that other calls have used, too.
    pub fn take_reused(&self) {
        self.want.takes_reused.set(true);
    }

    /// The next connection or failure. Has no time limit.
    pub async fn next(&mut self) -> WaitEvent {
        poll_fn(|cx| self.want.poll(cx)).await
    }
}

impl Drop for ConnectionWait {
    fn drop(&mut self) {
        self.pool.metrics.waiting.decrement();
        for endpoint in &self.endpoints {
            endpoint.waiters.remove(&self.want);
        }
        if let Some(lease) = self.want.lease.take()
            && self.want.preference != ProtocolPreference::Tunnel
        {
            self.pool.keep(lease, self.want.options);
        }
    }
}

/// The calls that wait at one endpoint, oldest first, and the connections that are being opened for them.
#[derive(Default)]
pub struct Waiters {
    /// The length of the queue: all that the path of a request looks at.
    count: Cell<usize>,
    queue: RefCell<Queue>,
}

#[derive(Default)]
struct Queue {
    calls: VecDeque<WaitingCall>,
    /// Waiting calls, and connections being opened, by preference.
    waiting: [usize; PREFERENCES],
    pending: [usize; PREFERENCES],
}

/// Number of variants of [`ProtocolPreference`].
const PREFERENCES: usize = 4;

struct WaitingCall {
    want: Rc<Want>,
    /// A connection has been begun for this call.
    has_dial: bool,
}

impl Queue {
    fn take(&mut self, position: usize) -> Option<Rc<Want>> {
        let call = self.calls.remove(position)?;
        self.waiting[call.want.preference as usize] -= 1;
        Some(call.want)
    }
}

impl Waiters {
    /// True if no call waits; one load.
    pub fn is_empty(&self) -> bool {
        self.count.get() == 0
    }

    fn push(&self, want: &Rc<Want>) {
        let mut queue = self.queue.borrow_mut();
        queue.waiting[want.preference as usize] += 1;
        queue.calls.push_back(WaitingCall { want: Rc::clone(want), has_dial: false });
        self.count.set(queue.calls.len());
    }

    /// Returns false if the call is not in the queue.
    fn remove(&self, want: &Rc<Want>) -> bool {
        let mut queue = self.queue.borrow_mut();
        let position = queue.calls.iter().position(|call| Rc::ptr_eq(&call.want, want));
        let is_removed = position.and_then(|position| queue.take(position)).is_some();
        self.count.set(queue.calls.len());
        is_removed
    }

    /// Removes the oldest call that takes such a connection. Calls that another endpoint has served leave the queue.
    fn pop(&self, takes: impl Fn(&Want) -> bool) -> Option<Rc<Want>> {
        let mut queue = self.queue.borrow_mut();
        let mut position = 0;
        let mut found = None;
        while found.is_none()
            && let Some(call) = queue.calls.get(position)
        {
            match (call.want.is_served(), takes(&call.want)) {
                (true, _) => drop(queue.take(position)),
                (false, true) => found = queue.take(position),
                (false, false) => position += 1,
            }
        }
        self.count.set(queue.calls.len());
        found
    }

    /// The call for which the next connection is to be opened, with its preference; `None` if enough are being opened.
    /// `calls_per` says how many calls one connection serves.
    pub(super) fn next_dial(
        &self,
        calls_per: impl Fn(ProtocolPreference) -> usize,
    ) -> Option<(ProtocolPreference, Rc<Want>)> {
        let mut queue = self.queue.borrow_mut();
        let (waiting, pending) = (queue.waiting, queue.pending);
        let needs = |call: &WaitingCall| {
            let preference = call.want.preference;
            !call.want.is_served()
                && waiting[preference as usize] > pending[preference as usize].saturating_mul(calls_per(preference))
        };
        let without = queue.calls.iter().position(|call| !call.has_dial && needs(call));
        let position = without.or_else(|| queue.calls.iter().position(needs))?;
        let call = queue.calls.get_mut(position)?;
        call.has_dial = true;
        Some((call.want.preference, Rc::clone(&call.want)))
    }

    /// Whether a call waits that has no other endpoint to go to.
    pub(super) fn has_bound_call(&self) -> bool {
        let queue = self.queue.borrow();
        queue.calls.iter().any(|call| !call.want.is_served() && !call.want.has_alternative.get())
    }

    /// Removes the call for which a connection was opened that took too long: the time of the call is over as well, and it
    /// judges by itself what that means.
    pub(super) fn give_up(&self, starter: &Weak<Want>) {
        if let Some(want) = starter.upgrade() {
            self.remove(&want);
        }
    }

    /// Tells the call for which a connection was opened that it failed, if the call still waits here.
    pub(super) fn fail(&self, starter: &Weak<Want>, endpoint: &Rc<Endpoint>, error: ConnectError) {
        if let Some(want) = starter.upgrade()
            && self.remove(&want)
        {
            want.failures.borrow_mut().push_back((Rc::clone(endpoint), error));
            want.wake();
        }
    }
}

impl Endpoint {
    /// Gives an HTTP/1.1 connection to the oldest call that takes it; returns the connection if there is none.
    pub(super) fn hand_on(self: &Rc<Self>, connection: Box<Http1>, reused: bool) -> Option<Box<Http1>> {
        use ProtocolPreference::{Either, Http1};
        let takes = |want: &Want| matches!(want.preference, Http1 | Either) && (!reused || want.takes_reused.get());
        let Some(want) = self.waiters.pop(takes) else { return Some(connection) };
        want.serve(Lease::new(Rc::clone(self), Transport::Http1(connection), reused));
        None
    }

    /// Gives a TCP stream, in the form of an HTTP/1.1 connection, to the oldest tunnel; returns it if there is none.
    pub(super) fn hand_to_tunnel(self: &Rc<Self>, connection: Box<Http1>) -> Option<Box<Http1>> {
        let Some(want) = self.waiters.pop(|want| want.preference == ProtocolPreference::Tunnel) else {
            return Some(connection);
        };
        want.serve(Lease::new(Rc::clone(self), Transport::Http1(connection), false));
        None
    }

    /// Gives the free streams of the shared connections to the oldest calls. `is_new`: the first of them is the first call
    /// of its connection.
    pub(super) fn hand_out_streams(self: &Rc<Self>, mut is_new: bool) {
        use ProtocolPreference::{Either, Http2};
        while !self.waiters.is_empty()
            && let Some(connection) = self.shared(Instant::now())
            && let Some(want) = self.waiters.pop(|want| matches!(want.preference, Http2 | Either))
        {
            want.serve(Lease::new(Rc::clone(self), Transport::Http2(connection), !is_new));
            is_new = false;
        }
    }
}

/// A connection that is being opened, from its begin until it is open or has failed.
pub(super) struct PendingConnection {
    endpoint: Rc<Endpoint>,
    preference: ProtocolPreference,
}

impl PendingConnection {
    pub(super) fn new(endpoint: &Rc<Endpoint>, preference: ProtocolPreference) -> Self {
        endpoint.waiters.queue.borrow_mut().pending[preference as usize] += 1;
        endpoint.metrics.pending.increment();
        Self { endpoint: Rc::clone(endpoint), preference }
    }
}

impl Drop for PendingConnection {
    fn drop(&mut self) {
        self.endpoint.waiters.queue.borrow_mut().pending[self.preference as usize] -= 1;
        self.endpoint.metrics.pending.decrement();
    }
}
