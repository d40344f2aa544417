//! An upstream that does what the test says, over HTTP/1.1 and HTTP/2.

use std::net::{SocketAddr, TcpListener as Taken};
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::http::{Body, feed, full};
use super::wire::Wire;

/// Where nobody listens: connections are refused. The port is kept, so that no other test is given it meanwhile.
pub(crate) fn nobody() -> SocketAddr {
    static KEPT: OnceLock<Socket> = OnceLock::new();
    let kept = KEPT.get_or_init(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        socket
    });
    kept.local_addr().unwrap().as_socket().unwrap()
}

/// An address where connections are asked for and never made.
pub(crate) struct BlackHole {
    socket: Socket,
    _waiting: Vec<std::net::TcpStream>,
}

impl BlackHole {
    pub(crate) fn open() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        socket.listen(0).unwrap();
        let waiting = fill_backlog(socket.local_addr().unwrap().as_socket().unwrap());
        Self { socket, _waiting: waiting }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.socket.local_addr().unwrap().as_socket().unwrap()
    }
}

/// Opens connections to a listener that does not accept them until it takes no more.
pub(crate) fn fill_backlog(addr: SocketAddr) -> Vec<std::net::TcpStream> {
    let mut waiting = Vec::new();
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&addr, Duration::from_millis(100)) {
        waiting.push(stream);
        assert!(waiting.len() < 64, "the backlog does not fill");
    }
    waiting
}

/// An address for a test where now somebody listens and now nobody does. Its port is below those that the system gives to
/// whoever asks for any.
pub(crate) fn own_address() -> SocketAddr {
    static USED: AtomicU16 = AtomicU16::new(0);
    // Two runs at once begin at different ones.
    let begin = 20_000 + u16::try_from(std::process::id() % 100).unwrap() * 100;
    loop {
        let port = begin + USED.fetch_add(1, SeqCst);
        assert!(port < begin + 100, "no port is free");
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        if Taken::bind(addr).is_ok() {
            return addr;
        }
    }
}

/// A running upstream; it ends, with all its connections, when it is dropped.
pub(crate) struct Upstream {
    pub(crate) addr: SocketAddr,
    requests: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
    closed: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Upstream {
    /// Answers every HTTP/1.1 request with what `handler` returns.
    pub(crate) async fn http1<H, F>(handler: H) -> Self
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        Self::on("127.0.0.1:0".parse().unwrap(), handler, false).await
    }

    /// The same over HTTP/2 by prior knowledge.
    pub(crate) async fn http2<H, F>(handler: H) -> Self
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        Self::on("127.0.0.1:0".parse().unwrap(), handler, true).await
    }

    /// The same on an address of the test's choice.
    pub(crate) async fn on<H, F>(addr: SocketAddr, handler: H, http2: bool) -> Self
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let requests = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&requests);
        Self::raw(addr, requests, move |stream| {
            let (handler, seen) = (handler.clone(), Arc::clone(&seen));
            async move {
                let service = service_fn(move |request| {
                    seen.fetch_add(1, SeqCst);
                    let answer = handler(request);
                    async move { Ok::<_, std::convert::Infallible>(answer.await) }
                });
                let io = TokioIo::new(stream);
                let _ended = if http2 {
                    hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await
                } else {
                    hyper::server::conn::http1::Builder::new().serve_connection(io, service).with_upgrades().await
                };
            }
        })
        .await
    }

    /// Hands every connection to `serve`.
    pub(crate) async fn bytes<H, F>(serve: H) -> Self
    where
        H: Fn(TcpStream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        Self::raw("127.0.0.1:0".parse().unwrap(), Arc::default(), serve).await
    }

    async fn raw<H, F>(addr: SocketAddr, requests: Arc<AtomicUsize>, serve: H) -> Self
    where
        H: Fn(TcpStream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        Self::over(TcpListener::bind(addr).await.unwrap(), requests, Duration::ZERO, serve)
    }

    /// Hands every connection of a listener with this backlog to `serve`, and accepts one per `pause`.
    pub(crate) fn slowly<H, F>(backlog: i32, pause: Duration, serve: H) -> Self
    where
        H: Fn(TcpStream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        socket.listen(backlog).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self::over(TcpListener::from_std(socket.into()).unwrap(), Arc::default(), pause, serve)
    }

    fn over<H, F>(listener: TcpListener, requests: Arc<AtomicUsize>, pause: Duration, serve: H) -> Self
    where
        H: Fn(TcpStream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let addr = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let closed = Arc::<AtomicUsize>::default();
        let (opened, ended) = (Arc::clone(&connections), Arc::clone(&closed));
        let task = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                opened.fetch_add(1, SeqCst);
                let (serving, ended) = (serve(stream), Arc::clone(&ended));
                open.spawn(async move {
                    serving.await;
                    ended.fetch_add(1, SeqCst);
                });
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
            }
        });
        Self { addr, requests, connections, closed, task }
    }

    /// Answers everything with `body`.
    pub(crate) async fn fixed(body: &'static str) -> Self {
        Self::http1(move |_| async move { Response::new(full(body)) }).await
    }

    /// The same, but what is asked for as `/slow` waits for `gate`.
    pub(crate) async fn gated(body: &'static str, gate: &Gate) -> Self {
        let gate = gate.clone();
        Self::http1(move |request| {
            let gate = gate.clone();
            async move {
                if request.uri().path() == "/slow" {
                    gate.pass().await;
                }
                Response::new(full(body))
            }
        })
        .await
    }

    /// Answers the one request of a connection with these bytes, then closes it when the test lets it.
    pub(crate) async fn closing(answer: String, gate: &Gate) -> Self {
        let gate = gate.clone();
        Self::bytes(move |stream| {
            let (gate, answer) = (gate.clone(), answer.clone());
            async move {
                let mut wire = Wire::over(stream);
                wire.head().await;
                wire.send(answer).await;
                gate.pass().await;
            }
        })
        .await
    }

    /// Always has something more to send, for as long as somebody takes it.
    pub(crate) async fn endless(content_type: &'static str) -> Self {
        Self::http1(move |_| async move {
            let (pieces, body) = feed();
            tokio::spawn(async move { while pieces.send(vec![b'x'; 64 << 10]).await {} });
            Response::builder().header("content-type", content_type).body(body).unwrap()
        })
        .await
    }

    /// Requests seen so far.
    pub(crate) fn requests(&self) -> usize {
        self.requests.load(SeqCst)
    }

    /// Connections accepted so far.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }

    /// Connections that are open now.
    pub(crate) fn open(&self) -> usize {
        self.connections() - self.closed.load(SeqCst)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A policy with one listener, `in`, to one upstream; `more` is added to the destination.
pub(crate) fn policy(upstream: SocketAddr, more: &str) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", to: app }}
destinations:
  - name: app
    endpoints: [\"{upstream}\"]
{more}
"
    )
}

/// Holds up the answers of an upstream until the test lets them go, one by one.
#[derive(Clone)]
pub(crate) struct Gate(Arc<Semaphore>);

impl Gate {
    pub(crate) fn closed() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    /// Waits for a place and uses it up.
    pub(crate) async fn pass(&self) {
        self.0.acquire().await.unwrap().forget();
    }

    /// Lets so many pass.
    pub(crate) fn release(&self, places: usize) {
        self.0.add_permits(places);
    }
}
