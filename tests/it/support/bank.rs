//! An upstream with a script: the nth request meets the nth line of it, and all that was sent is kept.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::http::{Body, empty, full, with_trailers};
use super::upstream::Upstream;

/// Fields of an answer.
pub(crate) type Fields = &'static [(&'static str, &'static str)];

/// What becomes of one request, once it has been read to its end.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Say {
    /// An HTTP answer.
    Status(u16),
    /// The same, with fields.
    With(u16, Fields),
    /// A gRPC answer that has nothing but a head.
    Grpc(u32, Fields),
    /// A gRPC answer with a head, a message, and these trailers.
    Trailers(Fields),
    /// The connection, or the stream, breaks off.
    Reset,
    /// Nothing, ever.
    Hang,
}

/// A request as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: Method,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
    pub(crate) at: Instant,
}

impl Seen {
    /// A field as text; empty if it is not there.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// The upstream.
pub(crate) struct Bank {
    upstream: Upstream,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Bank {
    /// Over HTTP/1.1; the last line of the script holds for all that come later.
    pub(crate) async fn http1(script: &'static [Say]) -> Self {
        Self::open(script, false).await
    }

    /// Over HTTP/2.
    pub(crate) async fn http2(script: &'static [Say]) -> Self {
        Self::open(script, true).await
    }

    async fn open(script: &'static [Say], http2: bool) -> Self {
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let kept = Arc::clone(&seen);
        let upstream = Upstream::bytes(move |stream| serve(stream, http2, script, Arc::clone(&kept))).await;
        Self { upstream, seen }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.upstream.addr
    }

    /// Connections accepted so far.
    pub(crate) fn connections(&self) -> usize {
        self.upstream.connections()
    }

    /// Requests that came so far.
    pub(crate) fn tries(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    /// What came so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

async fn serve(stream: TcpStream, http2: bool, script: &'static [Say], kept: Arc<Mutex<Vec<Seen>>>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let kept = Arc::clone(&kept);
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.map_err(io::Error::other)?;
            let trailers = body.trailers().cloned();
            let seen = Seen {
                method: head.method,
                headers: head.headers,
                body: body.to_bytes(),
                trailers,
                at: Instant::now(),
            };
            let turn = {
                let mut all = kept.lock().unwrap();
                all.push(seen);
                all.len() - 1
            };
            answer(script[turn.min(script.len() - 1)]).await
        }
    });
    let io = TokioIo::new(stream);
    let _ended = if http2 {
        hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await
    } else {
        hyper::server::conn::http1::Builder::new().serve_connection(io, service).await
    };
}

async fn answer(say: Say) -> io::Result<Response<Body>> {
    let with = |mut answer: Response<Body>, fields: Fields| {
        for (name, value) in fields {
            answer.headers_mut().append(*name, value.parse().unwrap());
        }
        Ok(answer)
    };
    match say {
        Say::Status(status) => with(Response::builder().status(status).body(full("said")).unwrap(), &[]),
        Say::With(status, fields) => with(Response::builder().status(status).body(full("said")).unwrap(), fields),
        Say::Grpc(code, fields) => {
            let head = Response::builder().header("content-type", "application/grpc").header("grpc-status", code);
            with(head.body(empty()).unwrap(), fields)
        }
        Say::Trailers(fields) => {
            let head = Response::builder().header("content-type", "application/grpc");
            Ok(head.body(with_trailers(&b"\0\0\0\0\0"[..], fields)).unwrap())
        }
        Say::Reset => Err(io::Error::other("the script says so")),
        Say::Hang => std::future::pending().await,
    }
}

/// A policy with one listener, `in`, that stands behind a caller; its destination `app` has these endpoints. `rules` are
/// modes, `more` is added to the destination.
pub(crate) fn behind_a_caller(endpoints: &[SocketAddr], rules: &str, more: &str) -> String {
    let endpoints: Vec<_> = endpoints.iter().map(|endpoint| format!("\"{endpoint}\"")).collect();
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
rules: {{ {rules} }}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", to: app, direction: outbound }}
destinations:
  - name: app
    endpoints: [{}]
{more}
",
        endpoints.join(", ")
    )
}
