//! Opens new connections for the calls that wait for one: TCP, TLS, HTTP, within `timeouts.connect`.
//!
//! Each connection is opened in a task of its own, for up to `timeouts.connect`: a call with less time, or one that leaves,
//! does not cancel it, and later calls use the connection. As many are opened side by side as calls wait, of shared
//! connections as many as their streams need, by the number of streams that the peer allowed last. How many of them may be in
//! the TCP phase is limited (`dial_limit`). A connection request that is not answered for 250 ms is sent again from a second
//! socket while the first one waits on (RFC 8305, 5), unless all calls that wait can go to another endpoint: the kernel would
//! send it again only after a second.

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::net::http1::parsed_headers;
use crate::net::io::Io;
use crate::runtime::tasks;
use crate::upstream::connect::{self, ConnectError, ConnectFuture, Connected};
use crate::upstream::endpoint::Endpoint;
use crate::upstream::http1::Http1;
use crate::upstream::http2::Http2;
use crate::upstream::lifetime::{Lifetime, LifetimeBounds};
use crate::upstream::pool::{Lease, Pool, ProtocolPreference, Transport};
use crate::upstream::reachability::DialSlot;
use crate::upstream::waiters::{PendingConnection, Want};

/// Time after which a connection that is not open gets a second attempt beside it ("Connection Attempt Delay", RFC 8305, 8).
const STAGGER: Duration = Duration::from_millis(250);

/// Time between further attempts, that of the kernel between two connection requests.
const NEXT_ATTEMPT: Duration = Duration::from_secs(1);

/// Policy values for new connections.
#[derive(Debug, Clone, Copy)]
pub struct ConnectOptions {
    /// `timeouts.connect`: TCP, TLS and HTTP handshake together.
    pub connect_timeout: Duration,
    /// `connections.idle`: how long an idle connection is kept.
    pub idle_timeout: Duration,
    /// `connections.maxIdle`: most idle connections per endpoint and worker.
    pub max_idle: usize,
    /// `connections.maxHeaderCount`: most header fields of a response.
    pub max_header_count: u32,
    /// `connections.maxAge` and `connections.maxRequests`.
    pub lifetime: LifetimeBounds,
}

impl ConnectOptions {
    /// How long the first attempt goes on alone: 250 ms, at most a third of `timeouts.connect`, so that three endpoints can
    /// be tried within it.
    pub fn stagger(&self) -> Duration {
        STAGGER.min(self.connect_timeout / 3)
    }
}

impl Pool {
    /// Opens connections to an endpoint until as many are being opened as calls wait for, or as the limit admits.
    pub(super) fn open_for_waiters(self: &Rc<Self>, endpoint: &Rc<Endpoint>) {
        let calls_per =
            |preference| if is_exclusive(endpoint, preference) { 1 } else { endpoint.calls_per_connection() };
        while !endpoint.waiters.is_empty()
            && let Some(slot) = DialSlot::take(endpoint)
            && let Some((preference, want)) = endpoint.waiters.next_dial(calls_per)
        {
            let dial = Dial {
                pool: Rc::clone(self),
                endpoint: Rc::clone(endpoint),
                preference,
                options: want.options,
                starter: Rc::downgrade(&want),
                began: Instant::now(),
            };
            // Counted here: the task begins later.
            let pending = PendingConnection::new(endpoint, preference);
            drop(tasks::spawn(dial.run(slot, pending)));
        }
    }

    /// Keeps an open connection for later calls.
    pub(super) fn keep(&self, lease: Lease, options: ConnectOptions) {
        let mut cx = Context::from_waker(Waker::noop());
        lease.check_in_unused(&mut cx, options.idle_timeout, options.max_idle, Instant::now());
        self.sweep_signal.request();
    }
}

/// True if the connection for such a request cannot be shared.
fn is_exclusive(endpoint: &Endpoint, preference: ProtocolPreference) -> bool {
    match preference {
        ProtocolPreference::Http1 | ProtocolPreference::Tunnel => true,
        ProtocolPreference::Http2 => false,
        ProtocolPreference::Either => endpoint.chose_http1.get(),
    }
}

/// Opens one connection.
struct Dial {
    pool: Rc<Pool>,
    endpoint: Rc<Endpoint>,
    preference: ProtocolPreference,
    options: ConnectOptions,
    /// The call that is told of a failure.
    starter: Weak<Want>,
    began: Instant,
}

impl Dial {
    /// Opens the connection and gives it to the call that waits for longest, or to the pool if none waits.
    async fn run(self, slot: DialSlot, pending: PendingConnection) {
        let opened = timeout(self.options.connect_timeout, self.open(slot)).await;
        let now = Instant::now();
        match opened {
            Ok(Ok(transport)) => {
                self.endpoint.count_connect(now);
                drop(pending);
                self.hand_out(transport);
            }
            Ok(Err(error)) => {
                self.endpoint.count_connect_failure(now);
                drop(pending);
                self.endpoint.waiters.fail(&self.starter, &self.endpoint, error);
            }
            Err(_late) => {
                self.endpoint.count_connect_timeout(self.began, now);
                drop(pending);
                self.endpoint.waiters.give_up(&self.starter);
            }
        }
        self.pool.open_for_waiters(&self.endpoint);
    }

    /// TCP, TLS and HTTP handshake. Has no time limit.
    async fn open(&self, slot: DialSlot) -> Result<Transport, ConnectError> {
        let established = self.establish().await;
        if established.is_ok() {
            slot.accepted(Instant::now());
        } else {
            drop(slot);
        }
        self.pool.open_for_waiters(&self.endpoint);
        self.handshake(established?).await
    }

    /// The TCP phase: one attempt, and others beside it while a call waits for it and is bound to this endpoint. The first
    /// result of any of them counts.
    async fn establish(&self) -> Result<Io, ConnectError> {
        let connect = || self.pool.connector.connect(self.endpoint.address.socket);
        let mut first = connect();
        let mut next = self.began + self.options.stagger();
        if let Ok(done) = timeout_at(next, &mut first).await {
            return done;
        }
        self.endpoint.reachability.stalled(self.began, Instant::now());
        let mut second: Option<ConnectFuture> = None;
        loop {
            if self.endpoint.waiters.has_bound_call() {
                second = Some(connect());
            }
            next += NEXT_ATTEMPT;
            tokio::select! {
                done = &mut first => return done,
                done = poll_fn(|cx| poll_optional(second.as_mut(), cx)) => return done,
                () = sleep_until(next) => {}
            }
        }
    }

    async fn handshake(&self, io: Io) -> Result<Transport, ConnectError> {
        let Self { pool, endpoint, preference, .. } = self;
        let is_tunnel = *preference == ProtocolPreference::Tunnel;
        let tls = pool.cluster.tls(*preference == ProtocolPreference::Http1).filter(|_| !is_tunnel);
        let Connected { io, http2 } = match tls {
            Some(config) => connect::secure(io, &endpoint.address, config).await?,
            None => Connected { io, http2: *preference == ProtocolPreference::Http2 },
        };
        if *preference == ProtocolPreference::Http2 && !http2 {
            // HTTP/2 over TLS has to be agreed by ALPN (RFC 9113, 3.2).
            return Err(ConnectError::NotHttp2);
        }
        if *preference == ProtocolPreference::Either {
            endpoint.chose_http1.set(!http2);
        }
        let lifetime = Lifetime::new(self.options.lifetime, Instant::now(), fastrand::f32());
        if http2 {
            Http2::new(io, lifetime).await.map(Transport::Http2)
        } else {
            let opened = Http1::new(io, parsed_headers(self.options.max_header_count), lifetime).await;
            opened.map(Transport::Http1).map_err(|error| ConnectError::Handshake(error.into()))
        }
    }

    /// Gives an open connection to the call that waits for longest, or to the pool.
    fn hand_out(&self, transport: Transport) {
        let Self { pool, endpoint, preference, options, .. } = self;
        match transport {
            Transport::Http2(connection) => {
                endpoint.add_shared(connection);
                // From now on the connection needs the sweep, even if every call on it is cancelled.
                pool.sweep_signal.request();
                endpoint.hand_out_streams(true);
            }
            // Without HTTP and TLS it is of no use to the pool.
            Transport::Http1(stream) if *preference == ProtocolPreference::Tunnel => {
                if endpoint.hand_to_tunnel(stream).is_some() {
                    endpoint.count_close();
                }
            }
            Transport::Http1(connection) => {
                if let Some(unclaimed) = endpoint.hand_on(connection, false) {
                    pool.keep(Lease::new(Rc::clone(endpoint), Transport::Http1(unclaimed), false), *options);
                }
            }
        }
    }
}

/// Pending while there is no future.
fn poll_optional(future: Option<&mut ConnectFuture>, cx: &mut Context<'_>) -> Poll<Result<Io, ConnectError>> {
    future.map_or(Poll::Pending, |future| Pin::as_mut(future).poll(cx))
}

#[cfg(test)]
mod tests;
