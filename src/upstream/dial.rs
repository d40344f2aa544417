//! Opens new connections for a pool: TCP, TLS, HTTP, within `timeouts.connect`.
//!
//! `proxy` calls it when the pool has no open connection. Each connection is opened in a task of its own, for up to
//! `timeouts.connect`: a caller with less time, or one that leaves, does not cancel it, and later calls use the connection.
//! Callers of HTTP/2 wait together for connections that they can share; as many are opened side by side as the waiters need,
//! by the number of streams that the peer allowed last.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use crate::net::http1::parsed_headers;
use crate::net::io::Io;
use crate::runtime::tasks;
use crate::upstream::connect::{ConnectError, Connected};
use crate::upstream::endpoint::Endpoint;
use crate::upstream::http1::Http1;
use crate::upstream::http2::Http2;
use crate::upstream::lifetime::{Lifetime, LifetimeBounds};
use crate::upstream::pool::{Lease, Pool, ProtocolPreference, Transport};

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

impl Pool {
    /// A lease of a new connection to `endpoint`, or of an HTTP/2 connection that another caller has just opened.
    ///
    /// # Errors
    /// Why the connection could not be opened. If this call opened it, the endpoint has recorded the failure by then.
    pub async fn connect(
        self: &Rc<Self>,
        endpoint: &Rc<Endpoint>,
        preference: ProtocolPreference,
        options: ConnectOptions,
    ) -> Result<Lease, ConnectError> {
        let deadline = Instant::now() + options.connect_timeout;
        let waiter = Waiter::new(endpoint);
        let mut has_waited = false;
        while !is_exclusive(endpoint, preference) && !endpoint.needs_connection() {
            has_waited = true;
            timeout_at(deadline, endpoint.connection_ready.notified()).await.map_err(|_late| ConnectError::Timeout)?;
            let checkout = poll_fn(|cx| Poll::Ready(self.checkout(endpoint, preference, Instant::now(), cx)));
            if let Some(lease) = checkout.await {
                return Ok(lease);
            }
        }
        let (sender, receiver) = oneshot::channel();
        drop(waiter);
        // Counted here: the task begins later.
        let pending = (!is_exclusive(endpoint, preference)).then(|| PendingConnection::new(endpoint));
        let dial = Dial { pool: Rc::clone(self), endpoint: Rc::clone(endpoint), preference, options };
        drop(tasks::spawn(dial.run(pending, sender)));
        // A caller that has not waited gets the timeout from the task: a timer here could fire before the endpoint has
        // recorded the failure.
        let received = if has_waited { timeout_at(deadline, receiver).await } else { Ok(receiver.await) };
        let Ok(Ok(opened)) = received else { return Err(ConnectError::Timeout) };
        opened
    }

    /// TCP, TLS and HTTP handshake. Has no time limit.
    async fn handshake(
        &self,
        endpoint: &Rc<Endpoint>,
        preference: ProtocolPreference,
        options: ConnectOptions,
    ) -> Result<Transport, ConnectError> {
        let tls = self.cluster.tls(preference == ProtocolPreference::Http1);
        let is_encrypted = tls.is_some();
        let Connected { io, http2 } = self.connector.connect(&endpoint.address, tls).await?;
        let http2 = if is_encrypted { http2 } else { preference == ProtocolPreference::Http2 };
        if preference == ProtocolPreference::Http2 && !http2 {
            // HTTP/2 over TLS has to be agreed by ALPN (RFC 9113, 3.2).
            return Err(ConnectError::NotHttp2);
        }
        if preference == ProtocolPreference::Either {
            endpoint.chose_http1.set(!http2);
        }
        let lifetime = Lifetime::new(options.lifetime, Instant::now(), fastrand::f32());
        if http2 {
            Http2::new(io, lifetime).await.map(Transport::Http2)
        } else {
            let opened = Http1::new(io, parsed_headers(options.max_header_count), lifetime).await;
            opened.map(Transport::Http1).map_err(|error| ConnectError::Handshake(error.into()))
        }
    }

    /// A new TCP stream to `endpoint`, outside of the pool, for the bytes of a tunnel. Limited to `timeouts.connect`.
    ///
    /// # Errors
    /// Why the stream could not be opened.
    pub async fn connect_stream(&self, endpoint: &Endpoint, options: ConnectOptions) -> Result<Io, ConnectError> {
        let connecting = timeout(options.connect_timeout, self.connector.connect(&endpoint.address, None));
        match connecting.await.unwrap_or(Err(ConnectError::Timeout)) {
            Ok(connected) => {
                endpoint.count_connect();
                // The stream leaves the pool at once, like the connection of an upgrade.
                endpoint.count_close();
                Ok(connected.io)
            }
            Err(error) => {
                endpoint.count_connect_failure(Instant::now());
                Err(error)
            }
        }
    }
}

/// True if the connection for such a request cannot be shared.
fn is_exclusive(endpoint: &Endpoint, preference: ProtocolPreference) -> bool {
    preference == ProtocolPreference::Http1 || (preference == ProtocolPreference::Either && endpoint.chose_http1.get())
}

/// Opens one connection.
struct Dial {
    pool: Rc<Pool>,
    endpoint: Rc<Endpoint>,
    preference: ProtocolPreference,
    options: ConnectOptions,
}

impl Dial {
    /// Opens the connection and sends it to the caller; if the caller has left, checks the connection in.
    async fn run(self, pending: Option<PendingConnection>, sender: LeaseSender) {
        let Self { pool, endpoint, preference, options } = self;
        let dialled = timeout(options.connect_timeout, pool.handshake(&endpoint, preference, options)).await;
        let transport = match dialled.unwrap_or(Err(ConnectError::Timeout)) {
            Ok(transport) => transport,
            Err(error) => {
                endpoint.count_connect_failure(Instant::now());
                drop(pending);
                // Fails only if the caller has left.
                let _left = sender.send(Err(error));
                return;
            }
        };
        endpoint.count_connect();
        if let Transport::Http2(connection) = &transport {
            endpoint.add_shared(Rc::clone(connection));
            // From now on the connection needs the sweep, even if every call on it is cancelled.
            pool.sweep_signal.request();
        }
        let lease = Lease::new(endpoint, transport, false);
        // After `add_shared`: the waiters look for the connection now.
        drop(pending);
        if let Err(Ok(unclaimed)) = sender.send(Ok(lease)) {
            let mut cx = Context::from_waker(Waker::noop());
            unclaimed.check_in_unused(&mut cx, options.idle_timeout, options.max_idle, Instant::now());
            pool.sweep_signal.request();
        }
    }
}

/// Sends the result of a [`Dial`] to its caller.
type LeaseSender = oneshot::Sender<Result<Lease, ConnectError>>;

/// Counts a caller that waits for a pending connection of another caller.
struct Waiter<'a>(&'a Endpoint);

impl<'a> Waiter<'a> {
    fn new(endpoint: &'a Endpoint) -> Self {
        endpoint.waiters.set(endpoint.waiters.get() + 1);
        Self(endpoint)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiters.set(self.0.waiters.get() - 1);
    }
}

/// Counts a connection that is being opened and that several callers may share; its drop wakes the waiters.
struct PendingConnection(Rc<Endpoint>);

impl PendingConnection {
    fn new(endpoint: &Rc<Endpoint>) -> Self {
        endpoint.pending_connections.set(endpoint.pending_connections.get() + 1);
        Self(Rc::clone(endpoint))
    }
}

impl Drop for PendingConnection {
    fn drop(&mut self) {
        self.0.pending_connections.set(self.0.pending_connections.get() - 1);
        self.0.connection_ready.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};
    use tokio::task::LocalSet;
    use tokio::time::sleep;

    use std::cell::RefCell;
    use std::sync::Arc;

    use rustls::ClientConfig;

    use super::*;
    use crate::telemetry::{Sink, Telemetry};
    use crate::upstream::cluster::{Address, Cluster, ClusterIdentity, Health};
    use crate::upstream::connect::{Connect, ConnectFuture};
    use crate::upstream::spec;

    /// Connects in 100 ms, and keeps the other ends of the streams.
    #[derive(Default)]
    struct SlowConnect(Rc<RefCell<Vec<DuplexStream>>>);

    impl Connect for SlowConnect {
        fn connect(&self, _to: &Address, _tls: Option<Arc<ClientConfig>>) -> ConnectFuture {
            let ends = Rc::clone(&self.0);
            Box::pin(async move {
                sleep(Duration::from_millis(100)).await;
                let (ours, theirs) = duplex(1024);
                ends.borrow_mut().push(theirs);
                Ok(Connected { io: Io::boxed(ours), http2: false })
            })
        }
    }

    /// A pool with one endpoint that takes 100 ms to connect, and the endpoint; `ends` gets the other ends of its streams.
    fn slow_pool(ends: &Rc<RefCell<Vec<DuplexStream>>>) -> (Rc<Pool>, Rc<Endpoint>) {
        let identity = ClusterIdentity {
            name: "app".into(),
            endpoints: vec![spec::EndpointSpec::Address("127.0.0.1:80".parse().unwrap())],
            protocol: spec::UpstreamProtocol::Auto,
            tls: None,
            host: "app".into(),
        };
        let cluster = Cluster::new(identity, Health::new(Instant::now()), &Default::default()).unwrap();
        let metrics = Telemetry::new(Sink::memory().0).shard(0).destination("app");
        let pool = Rc::new(Pool::new(cluster, Rc::new(SlowConnect(Rc::clone(ends))), Rc::default(), metrics));
        let endpoint = pool.pick(Instant::now(), &[], true).unwrap();
        (pool, endpoint)
    }

    fn options(connect: u64) -> ConnectOptions {
        ConnectOptions {
            connect_timeout: Duration::from_millis(connect),
            idle_timeout: Duration::from_secs(60),
            max_idle: 8,
            max_header_count: 256,
            lifetime: LifetimeBounds { max_age: Duration::from_secs(300), max_requests: None },
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_http1_connection_whose_caller_left_serves_the_next_call() {
        let test = async {
            let ends = Rc::default();
            let (pool, endpoint) = slow_pool(&ends);
            let impatient =
                timeout(Duration::from_millis(50), pool.connect(&endpoint, ProtocolPreference::Http1, options(1000)));
            assert!(impatient.await.is_err());
            sleep(Duration::from_millis(100)).await;
            let mut cx = Context::from_waker(Waker::noop());
            let lease = pool.checkout(&endpoint, ProtocolPreference::Http1, Instant::now(), &mut cx);
            assert!(lease.is_some_and(|lease| lease.is_http1()));
            assert_eq!(ends.borrow().len(), 1);
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_timeout_reaches_the_caller_after_the_endpoint_has_recorded_it() {
        let test = async {
            let (pool, endpoint) = slow_pool(&Rc::default());
            let begun = Instant::now();
            for preference in [ProtocolPreference::Http1, ProtocolPreference::Http2] {
                let opened = pool.connect(&endpoint, preference, options(50)).await;
                assert!(matches!(opened, Err(ConnectError::Timeout)), "the connection is open");
                assert!(endpoint.is_unreachable(Instant::now()));
                sleep(Duration::from_secs(1)).await;
            }
            assert_eq!(begun.elapsed().as_millis() / 10, 210);
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_waits_for_the_connection_of_another_no_longer_than_its_own_timeout() {
        let test = async {
            let (pool, endpoint) = slow_pool(&Rc::default());
            let first = pool.connect(&endpoint, ProtocolPreference::Http2, options(1000));
            let second = async {
                let begun = Instant::now();
                let opened = pool.connect(&endpoint, ProtocolPreference::Http2, options(50)).await;
                assert!(matches!(opened, Err(ConnectError::Timeout)), "the connection is open");
                assert_eq!(begun.elapsed().as_millis() / 10, 5);
                assert!(!endpoint.is_unreachable(Instant::now()));
            };
            tokio::select! { biased; _ = first => panic!("the other end does not speak HTTP/2"), () = second => {} }
        };
        LocalSet::new().run_until(test).await;
    }
}
