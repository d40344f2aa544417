//! A caller: one connection of HTTP/1.1 or HTTP/2, driven in the background.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Any body of a request.
pub(crate) type Body = BoxBody<Bytes, std::convert::Infallible>;

/// No body.
pub(crate) fn empty() -> Body {
    Empty::new().boxed()
}

/// A body of known length.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed()
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) trailers: Option<HeaderMap>,
    pub(crate) body: Bytes,
}

impl Answer {
    /// Reads an answer to its end; fails if it is cut.
    pub(crate) async fn read(response: Response<Incoming>) -> Result<Self, hyper::Error> {
        let (head, body) = response.into_parts();
        let collected = body.collect().await?;
        let trailers = collected.trailers().cloned();
        Ok(Self { status: head.status, headers: head.headers, trailers, body: collected.to_bytes() })
    }

    /// A header as text; empty if it is not there.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The gRPC status, from the trailers or from the head of an answer that has nothing else.
    pub(crate) fn grpc_status(&self) -> &str {
        let trailers = self.trailers.as_ref().and_then(|trailers| trailers.get("grpc-status"));
        trailers.or(self.headers.get("grpc-status")).map_or("", |value| value.to_str().unwrap())
    }

    /// The body as a problem document.
    pub(crate) fn problem(&self) -> serde_json::Value {
        assert_eq!(self.header("content-type"), "application/problem+json", "{self:?}");
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// A request in origin-form with the fields that every request has.
pub(crate) fn request(method: &str, path: &str) -> hyper::http::request::Builder {
    Request::builder().method(method).uri(path).header("host", "shop.test")
}

/// One HTTP/1.1 connection.
pub(crate) struct Http1(pub(crate) http1::SendRequest<Body>);

impl Http1 {
    pub(crate) async fn open(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        Self(sender)
    }

    pub(crate) async fn send(&mut self, request: Request<Body>) -> Result<Response<Incoming>, hyper::Error> {
        self.0.ready().await?;
        self.0.send_request(request).await
    }

    pub(crate) async fn ask(&mut self, request: Request<Body>) -> Answer {
        Answer::read(self.send(request).await.unwrap()).await.unwrap()
    }
}

/// One request over a connection of its own.
pub(crate) async fn ask(to: SocketAddr, request: Request<Body>) -> Answer {
    Http1::open(to).await.ask(request).await
}

/// GET over a connection of its own.
pub(crate) async fn get(to: SocketAddr, path: &str) -> Answer {
    ask(to, request("GET", path).body(empty()).unwrap()).await
}

/// An HTTP/2 connection by prior knowledge.
pub(crate) async fn http2(to: SocketAddr) -> http2::SendRequest<Body> {
    let stream = TcpStream::connect(to).await.unwrap();
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// Sends bytes as they are and reads until the other side closes.
pub(crate) async fn raw(to: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    String::from_utf8_lossy(&all).into_owned()
}

/// Where a test puts the pieces of a body, one after the other; dropping it ends the body.
pub(crate) struct Feed(mpsc::Sender<Frame<Bytes>>);

/// A body whose pieces come when the test sends them.
pub(crate) fn feed() -> (Feed, Body) {
    let (sender, pieces) = mpsc::channel(1);
    (Feed(sender), BodyExt::boxed(Pieces(Mutex::new(pieces))))
}

impl Feed {
    /// Sends a piece; false if nobody wants the body any more.
    pub(crate) async fn send(&self, bytes: impl Into<Bytes>) -> bool {
        self.0.send(Frame::data(bytes.into())).await.is_ok()
    }

    /// Ends the body with trailers.
    pub(crate) async fn trailers(self, pairs: &[(&'static str, &'static str)]) {
        let fields = pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        self.0.send(Frame::trailers(fields)).await.unwrap();
    }

    /// Waits until nobody wants the body any more.
    pub(crate) async fn unwanted(&self) {
        timeout(super::SOON, self.0.closed()).await.expect("somebody still reads the body");
    }
}

struct Pieces(Mutex<mpsc::Receiver<Frame<Bytes>>>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0.lock().unwrap().poll_recv(context).map(|frame| frame.map(Ok))
    }
}

/// A body of pieces and, at its end, trailers.
pub(crate) fn with_trailers(bytes: impl Into<Bytes>, pairs: &'static [(&'static str, &'static str)]) -> Body {
    let (feed, body) = feed();
    let bytes = bytes.into();
    tokio::spawn(async move {
        if bytes.is_empty() || feed.send(bytes).await {
            feed.trailers(pairs).await;
        }
    });
    body
}

/// What a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Speaks {
    Http1,
    Http2,
}

/// One connection of either protocol.
pub(crate) enum Caller {
    Http1(Http1),
    Http2(http2::SendRequest<Body>),
}

impl Caller {
    pub(crate) async fn open(speaks: Speaks, to: SocketAddr) -> Self {
        match speaks {
            Speaks::Http1 => Self::Http1(Http1::open(to).await),
            Speaks::Http2 => Self::Http2(http2(to).await),
        }
    }

    /// Sends a request whose URI is a path, to the host `shop.test`, in the form that the protocol wants.
    pub(crate) async fn send(&mut self, mut request: Request<Body>) -> Result<Response<Incoming>, hyper::Error> {
        match self {
            Self::Http1(caller) => {
                request.headers_mut().entry("host").or_insert_with(|| "shop.test".parse().unwrap());
                caller.send(request).await
            }
            Self::Http2(caller) => {
                request.headers_mut().remove("host");
                if request.uri().authority().is_none() {
                    *request.uri_mut() = format!("http://shop.test{}", request.uri()).parse().unwrap();
                }
                caller.ready().await?;
                caller.send_request(request).await
            }
        }
    }

    pub(crate) async fn ask(&mut self, request: Request<Body>) -> Answer {
        let response = timeout(super::SOON, self.send(request)).await.expect("no answer").unwrap();
        timeout(super::SOON, Answer::read(response)).await.expect("the answer does not end").unwrap()
    }
}

/// A gRPC call over a connection of its own, with an empty message.
pub(crate) async fn grpc(to: SocketAddr, path: &str) -> Answer {
    Caller::open(Speaks::Http2, to).await.ask(grpc_request(path, full(&b"\0\0\0\0\0"[..]))).await
}

/// A gRPC request.
pub(crate) fn grpc_request(path: &str, body: Body) -> Request<Body> {
    let request = Request::post(path).header("content-type", "application/grpc").header("te", "trailers");
    request.body(body).unwrap()
}
