//! Streams of very small messages over HTTP/2 that nobody reads for a while: the other calls of the connection go on.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::SendRequest;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::support::http::{Body, empty, full};
use crate::support::upstream::{Gate, Upstream, policy};
use crate::support::{Mesh, eventually};

/// Messages of one byte that wait to be read: more than h2 lets wait by itself with windows of 64 MiB.
const MANY: usize = 140_000;

/// A body of `MANY` messages, and how many have gone.
struct Messages(Arc<AtomicUsize>);

impl hyper::body::Body for Messages {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let is_over = self.0.load(SeqCst) == MANY;
        self.0.fetch_add(usize::from(!is_over), SeqCst);
        Poll::Ready((!is_over).then(|| Ok(Frame::data(Bytes::from_static(b"x")))))
    }
}

fn messages(sent: &Arc<AtomicUsize>) -> Body {
    BodyExt::boxed(Messages(Arc::clone(sent)))
}

async fn all_sent(sent: &AtomicUsize) {
    eventually(|| (sent.load(SeqCst) == MANY).then_some(())).await;
}

/// Counts what is in a body.
async fn read(mut body: Incoming) -> usize {
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        read += frame.unwrap().into_data().unwrap().len();
    }
    read
}

/// A caller whose windows are small, so that hopguard has to wait for it.
async fn caller(mesh: &Mesh) -> SendRequest<Body> {
    let stream = TcpStream::connect(mesh.addr("in")).await.unwrap();
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let (caller, connection) = builder.initial_stream_window_size(1000).handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    caller
}

fn get(path: &str) -> Request<Body> {
    Request::get(format!("http://shop.test{path}")).body(empty()).unwrap()
}

fn with_streams(upstream: &Upstream) -> String {
    policy(upstream.addr, "    protocol: http2\n    timeouts: { connect: 10s, request: 30s }")
}

#[tokio::test]
async fn an_answer_of_many_messages_that_its_caller_does_not_read_leaves_the_others_alone() {
    let sent = Arc::<AtomicUsize>::default();
    let counter = Arc::clone(&sent);
    let upstream = Upstream::http2(move |request: Request<Incoming>| {
        let body = if request.uri().path() == "/watch" { messages(&counter) } else { full("hello") };
        async { Response::new(body) }
    })
    .await;
    let mesh = Mesh::start(&with_streams(&upstream)).await;
    let mut caller = caller(&mesh).await;
    let watched = caller.send_request(get("/watch")).await.unwrap();
    all_sent(&sent).await;
    let other = caller.send_request(get("/")).await.unwrap();
    assert_eq!(other.into_body().collect().await.unwrap().to_bytes(), "hello");
    assert_eq!(read(watched.into_body()).await, MANY);
    assert_eq!(upstream.connections(), 1);
    mesh.ended("ok", 2).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_request_of_many_messages_that_its_upstream_does_not_read_leaves_the_others_alone() {
    let gate = Gate::closed();
    let opened = gate.clone();
    let upstream = Upstream::bytes(move |stream| {
        let gate = gate.clone();
        async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let gate = gate.clone();
                async move {
                    let answer = if request.uri().path() == "/push" {
                        gate.pass().await;
                        read(request.into_body()).await.to_string()
                    } else {
                        "hello".to_owned()
                    };
                    Ok::<_, std::convert::Infallible>(Response::new(full(Bytes::from(answer))))
                }
            });
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ended = builder.initial_stream_window_size(1000).serve_connection(TokioIo::new(stream), service).await;
        }
    })
    .await;
    let mesh = Mesh::start(&with_streams(&upstream)).await;
    let mut caller = caller(&mesh).await;
    let sent = Arc::default();
    let pushing = Request::post("http://shop.test/push").body(messages(&sent)).unwrap();
    let pushed = tokio::spawn(caller.send_request(pushing));
    all_sent(&sent).await;
    let other = caller.send_request(get("/")).await.unwrap();
    assert_eq!(other.into_body().collect().await.unwrap().to_bytes(), "hello");
    opened.release(1);
    let answer = pushed.await.unwrap().unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), MANY.to_string());
    assert_eq!(upstream.connections(), 1);
    mesh.ended("ok", 2).await;
    mesh.stop().await;
}
