//! How a pool opens connections.
//!
//! Each is opened in a task of its own, for as long as `timeouts.connect` allows: a caller that has less time, or that
//! leaves, does not take it away from those that come after it. Where callers can share connections (HTTP/2), they wait for
//! them together, and as many are under way as they need by the number of streams that the peer has allowed last.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use crate::net::io::Io;
use crate::runtime::tasks;
use crate::upstream::connect::{ConnectError, Connected};
use crate::upstream::endpoint::Endpoint;
use crate::upstream::http1::Http1;
use crate::upstream::http2::Http2;
use crate::upstream::pool::{Lease, Pool, ProtocolPreference, Transport};

/// What the policy says of connections.
#[derive(Debug, Clone, Copy)]
pub struct ConnectOptions {
    /// How long it may take to open one.
    pub connect: Duration,
    /// How long an idle one is kept.
    pub keep: Duration,
    /// How many idle ones are kept at most.
    pub most: usize,
}

impl Pool {
    /// A new connection to `endpoint`, or an HTTP/2 one that somebody else has just opened; within `terms.connect`.
    ///
    /// # Errors
    /// Why it could not be opened. If it was asked for by this call, the endpoint knows by then.
    pub async fn open(
        self: &Rc<Self>,
        endpoint: &Rc<Endpoint>,
        want: ProtocolPreference,
        terms: ConnectOptions,
    ) -> Result<Lease, ConnectError> {
        let until = Instant::now() + terms.connect;
        let waiting = Waiting::at(endpoint);
        let mut has_waited = false;
        while !is_for_one(endpoint, want) && !endpoint.needs_another() {
            has_waited = true;
            timeout_at(until, endpoint.opened.notified()).await.map_err(|_late| ConnectError::Late)?;
            if let Some(lease) = poll_fn(|cx| Poll::Ready(self.checkout(endpoint, want, Instant::now(), cx))).await {
                return Ok(lease);
            }
        }
        let (give, take) = oneshot::channel();
        drop(waiting);
        // Counted at once: the task begins later.
        let under_way = (!is_for_one(endpoint, want)).then(|| UnderWay::to(endpoint));
        let dialling = Dialling { pool: Rc::clone(self), endpoint: Rc::clone(endpoint), want, terms };
        drop(tasks::spawn(dialling.run(under_way, give)));
        // Who has not waited hears from the task when its time is over: a limit here could be first, and what the endpoint
        // learns of it second.
        let taken = if has_waited { timeout_at(until, take).await } else { Ok(take.await) };
        let Ok(Ok(opened)) = taken else { return Err(ConnectError::Late) };
        opened
    }

    async fn handshake(&self, endpoint: &Rc<Endpoint>, want: ProtocolPreference) -> Result<Transport, ConnectError> {
        let tls = self.cluster.tls(want == ProtocolPreference::Http1);
        let encrypted = tls.is_some();
        let Connected { io, http2 } = self.connector.connect(&endpoint.address, tls).await?;
        let http2 = if encrypted { http2 } else { want == ProtocolPreference::Http2 };
        if want == ProtocolPreference::Http2 && !http2 {
            // Over TLS there is no HTTP/2 but by agreement (RFC 9113, 3.2).
            return Err(ConnectError::NotHttp2);
        }
        if want == ProtocolPreference::Either {
            endpoint.chose_http1.set(!http2);
        }
        let now = Instant::now();
        if http2 {
            Http2::new(io, now).await.map(Transport::Http2)
        } else {
            Http1::new(io, now).await.map(Transport::Http1).map_err(|error| ConnectError::Handshake(error.into()))
        }
    }

    /// A new stream to `endpoint` that belongs to no pool and speaks whatever its user speaks. Has the same time limit.
    ///
    /// # Errors
    /// Why it could not be opened.
    pub async fn bare_stream(&self, endpoint: &Endpoint, terms: ConnectOptions) -> Result<Io, ConnectError> {
        let connecting = timeout(terms.connect, self.connector.connect(&endpoint.address, None));
        match connecting.await.unwrap_or(Err(ConnectError::Late)) {
            Ok(connected) => {
                endpoint.connected();
                // It leaves the pool at once, like one that becomes a WebSocket.
                endpoint.closed();
                Ok(connected.io)
            }
            Err(error) => {
                endpoint.refused(Instant::now());
                Err(error)
            }
        }
    }
}

/// True if what is opened for such a request cannot be shared.
fn is_for_one(endpoint: &Endpoint, want: ProtocolPreference) -> bool {
    want == ProtocolPreference::Http1 || (want == ProtocolPreference::Either && endpoint.chose_http1.get())
}

/// One connection that is being opened.
struct Dialling {
    pool: Rc<Pool>,
    endpoint: Rc<Endpoint>,
    want: ProtocolPreference,
    terms: ConnectOptions,
}

impl Dialling {
    /// Opens it for whoever takes it. What nobody waits for any more is there for the next.
    async fn run(self, under_way: Option<UnderWay>, give: Give) {
        let Self { pool, endpoint, want, terms } = self;
        let dialled = timeout(terms.connect, pool.handshake(&endpoint, want)).await;
        let transport = match dialled.unwrap_or(Err(ConnectError::Late)) {
            Ok(transport) => transport,
            Err(error) => {
                endpoint.refused(Instant::now());
                drop(under_way);
                let _nobody_waits = give.send(Err(error));
                return;
            }
        };
        endpoint.connected();
        if let Transport::Http2(connection) = &transport {
            endpoint.share(Rc::clone(connection));
            // From now on somebody has to look after it, even if every call on it is given up.
            pool.attention.call();
        }
        let lease = Lease::new(endpoint, transport, false);
        // After the connection is there for them: those who wait look for one now.
        drop(under_way);
        if let Err(Ok(unwanted)) = give.send(Ok(lease)) {
            let mut nobody = Context::from_waker(Waker::noop());
            unwanted.give_back(&mut nobody, terms.keep, terms.most, None, Instant::now());
            pool.attention.call();
        }
    }
}

/// Where a connection goes, or why there is none.
type Give = oneshot::Sender<Result<Lease, ConnectError>>;

/// One caller that waits for a connection that another one has asked for.
struct Waiting<'a>(&'a Endpoint);

impl<'a> Waiting<'a> {
    fn at(endpoint: &'a Endpoint) -> Self {
        endpoint.waiting.set(endpoint.waiting.get() + 1);
        Self(endpoint)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}

/// A connection that is being opened, and that others may share.
struct UnderWay(Rc<Endpoint>);

impl UnderWay {
    fn to(endpoint: &Rc<Endpoint>) -> Self {
        endpoint.opening.set(endpoint.opening.get() + 1);
        Self(Rc::clone(endpoint))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.opening.set(self.0.opening.get() - 1);
        self.0.opened.notify_waiters();
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
    use crate::upstream::connect::{Connect, Connecting};
    use crate::upstream::spec;

    /// Takes 100 ms to connect, and keeps the other ends.
    #[derive(Default)]
    struct Slow(Rc<RefCell<Vec<DuplexStream>>>);

    impl Connect for Slow {
        fn connect(&self, _to: &Address, _tls: Option<Arc<ClientConfig>>) -> Connecting {
            let ends = Rc::clone(&self.0);
            Box::pin(async move {
                sleep(Duration::from_millis(100)).await;
                let (ours, theirs) = duplex(1024);
                ends.borrow_mut().push(theirs);
                Ok(Connected { io: Io::boxed(ours), http2: false })
            })
        }
    }

    /// A pool with one endpoint to which it takes 100 ms to connect, and the endpoint; the other ends of its connections
    /// come to `ends`.
    fn slow(ends: &Rc<RefCell<Vec<DuplexStream>>>) -> (Rc<Pool>, Rc<Endpoint>) {
        let identity = ClusterIdentity {
            name: "app".into(),
            endpoints: vec![spec::EndpointSpec::Address("127.0.0.1:80".parse().unwrap())],
            protocol: spec::UpstreamProtocol::Auto,
            tls: None,
            host: "app".into(),
        };
        let cluster = Cluster::new(identity, Health::new(Instant::now()), &Default::default()).unwrap();
        let metrics = Telemetry::new(Sink::memory().0).shard(0).destination("app");
        let pool = Rc::new(Pool::new(cluster, Rc::new(Slow(Rc::clone(ends))), Rc::default(), metrics));
        let endpoint = pool.pick_now(Instant::now(), &[], true).unwrap();
        (pool, endpoint)
    }

    fn terms(connect: u64) -> ConnectOptions {
        ConnectOptions { connect: Duration::from_millis(connect), keep: Duration::from_secs(60), most: 8 }
    }

    #[tokio::test(start_paused = true)]
    async fn an_http1_connection_that_its_caller_could_not_wait_for_is_there_for_the_next() {
        let test = async {
            let ends = Rc::default();
            let (pool, endpoint) = slow(&ends);
            let hurried =
                timeout(Duration::from_millis(50), pool.open(&endpoint, ProtocolPreference::Http1, terms(1000)));
            assert!(hurried.await.is_err());
            sleep(Duration::from_millis(100)).await;
            let mut nobody = Context::from_waker(Waker::noop());
            let lent = pool.checkout(&endpoint, ProtocolPreference::Http1, Instant::now(), &mut nobody);
            assert!(lent.is_some_and(|lease| lease.is_http1()));
            assert_eq!(ends.borrow().len(), 1);
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn who_hears_that_it_took_too_long_hears_it_after_the_endpoint() {
        let test = async {
            let (pool, endpoint) = slow(&Rc::default());
            let begun = Instant::now();
            for want in [ProtocolPreference::Http1, ProtocolPreference::Http2] {
                let opened = pool.open(&endpoint, want, terms(50)).await;
                assert!(matches!(opened, Err(ConnectError::Late)), "it is open");
                assert!(endpoint.is_held_off(Instant::now()));
                sleep(Duration::from_secs(1)).await;
            }
            assert_eq!(begun.elapsed().as_millis() / 10, 210);
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_connection_of_another_waits_no_longer_than_for_its_own() {
        let test = async {
            let (pool, endpoint) = slow(&Rc::default());
            let first = pool.open(&endpoint, ProtocolPreference::Http2, terms(1000));
            let second = async {
                let begun = Instant::now();
                let opened = pool.open(&endpoint, ProtocolPreference::Http2, terms(50)).await;
                assert!(matches!(opened, Err(ConnectError::Late)), "it is open");
                assert_eq!(begun.elapsed().as_millis() / 10, 5);
                assert!(!endpoint.is_held_off(Instant::now()));
            };
            tokio::select! { biased; _ = first => panic!("the other end speaks no HTTP/2"), () = second => {} }
        };
        LocalSet::new().run_until(test).await;
    }
}
