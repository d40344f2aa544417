//! Upstream connections that fall silent while TCP still acknowledges, as behind a load balancer that has lost its backend:
//! no call after the first that times out meets one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::support::http::{Body, Caller, Http1, Speaks, empty, feed, full, get, grpc_request, request, with_trailers};
use crate::support::upstream::{Gate, Upstream, policy};
use crate::support::{Mesh, SOON, eventually};

/// Passes bytes on between hopguard and an upstream, until the test makes its connections mute.
struct Relay {
    addr: std::net::SocketAddr,
    opened: Arc<AtomicUsize>,
    closed: Arc<AtomicUsize>,
    /// Connections up to this number pass nothing on any more; what comes is read, and so acknowledged.
    mute: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Relay {
    async fn to(upstream: &Upstream) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, upstream) = (listener.local_addr().unwrap(), upstream.addr);
        let [opened, closed, mute] = std::array::from_fn(|_| Arc::<AtomicUsize>::default());
        let (counter, ended, until) = (Arc::clone(&opened), Arc::clone(&closed), Arc::clone(&mute));
        let task = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let number = counter.fetch_add(1, SeqCst) + 1;
                let (ended, until) = (Arc::clone(&ended), Arc::clone(&until));
                open.spawn(async move {
                    pass(stream, TcpStream::connect(upstream).await.unwrap(), || until.load(SeqCst) >= number).await;
                    ended.fetch_add(1, SeqCst);
                });
            }
        });
        Self { addr, opened, closed, mute, task }
    }

    /// All connections that are open now are mute from now on.
    fn mute(&self) {
        self.mute.store(self.opened(), SeqCst);
    }

    fn opened(&self) -> usize {
        self.opened.load(SeqCst)
    }

    /// Waits until so many connections have been closed.
    async fn closed(&self, count: usize) {
        eventually(|| (self.closed.load(SeqCst) >= count).then_some(())).await;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Passes bytes on until hopguard closes its side; drops them while the connection is mute.
async fn pass(mut near: TcpStream, mut far: TcpStream, is_mute: impl Fn() -> bool) {
    let (mut sent, mut answered) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    loop {
        let (read, to, bytes) = tokio::select! {
            read = near.read(&mut sent) => (read, &mut far, &sent),
            read = far.read(&mut answered) => (read, &mut near, &answered),
        };
        let Ok(count @ 1..) = read else { return };
        if !is_mute() && to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

/// Answers gRPC calls: `Unary` at once, `Watch` with one message and no end, anything else never.
async fn grpc_app() -> Upstream {
    grpc_app_with(None).await
}

/// The same, with at most so many streams per connection.
async fn grpc_app_with(max_streams: Option<u32>) -> Upstream {
    Upstream::bytes(move |stream| async move {
        let service = service_fn(|request| async { Ok::<_, std::convert::Infallible>(answer(request).await) });
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ended = builder.max_concurrent_streams(max_streams).serve_connection(TokioIo::new(stream), service).await;
    })
    .await
}

async fn answer(request: Request<Incoming>) -> Response<Body> {
    let body = match request.uri().path() {
        "/shop.Shop/Unary" => with_trailers(&b"\0\0\0\0\0"[..], &[("grpc-status", "0")]),
        "/shop.Shop/Watch" => {
            let (feed, body) = feed();
            tokio::spawn(async move {
                feed.send(&b"\0\0\0\0\0"[..]).await;
                feed.unwanted().await;
            });
            body
        }
        _ => std::future::pending().await,
    };
    Response::builder().header("content-type", "application/grpc").body(body).unwrap()
}

fn grpc_call(method: &str) -> Request<Body> {
    grpc_request(&format!("/shop.Shop/{method}"), full(&b"\0\0\0\0\0"[..]))
}

/// A policy for gRPC over the relay: calls have half a second, `Watch` is a stream, `Long` has a minute.
fn grpc_policy(relay: &Relay, more: &str) -> String {
    policy(
        relay.addr,
        &format!(
            "    protocol: http2
    retry: off
    timeouts: {{ request: 500ms, idle: 700ms }}
{more}
    routes:
      - {{ name: watch, match: {{ grpc: shop.Shop/Watch }}, stream: true }}
      - {{ name: long, match: {{ grpc: shop.Shop/Long }}, timeouts: {{ request: 60s, idle: 60s }} }}"
        ),
    )
}

async fn unary(caller: &mut Caller) -> String {
    caller.ask(grpc_call("Unary")).await.grpc_status().to_owned()
}

#[tokio::test]
async fn the_call_after_the_first_that_timed_out_goes_over_another_connection() {
    let app = grpc_app().await;
    let relay = Relay::to(&app).await;
    let mesh = Mesh::start(&grpc_policy(&relay, "")).await;
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    for round in 1..=3 {
        assert_eq!(unary(&mut caller).await, "0");
        relay.mute();
        assert_eq!(unary(&mut caller).await, "4", "the call on the mute connection");
        assert_eq!(unary(&mut caller).await, "0", "the next one");
        assert_eq!(relay.opened(), round + 1);
        // The ping has no answer.
        relay.closed(round).await;
    }
    mesh.ended("ok", 6).await;
    assert_eq!(mesh.count("request_timeout"), 3.0);
    eventually(|| (mesh.metric("hopguard_pool_open_connections", &["app"]) == 1.0).then_some(())).await;
    mesh.stop().await;
}

#[tokio::test]
async fn calls_that_still_wait_on_a_mute_connection_end_as_a_reset_when_its_ping_has_no_answer() {
    let app = grpc_app().await;
    let relay = Relay::to(&app).await;
    let mesh = Mesh::start(&grpc_policy(&relay, "")).await;
    let to = mesh.addr("in");
    let mut caller = Caller::open(Speaks::Http2, to).await;
    assert_eq!(unary(&mut caller).await, "0");
    relay.mute();
    let mut other = Caller::open(Speaks::Http2, to).await;
    let long = tokio::spawn(async move { other.ask(grpc_call("Long")).await });
    eventually(|| (mesh.metric("hopguard_in_flight_requests", &["app"]) == 1.0).then_some(())).await;
    assert_eq!(unary(&mut caller).await, "4");
    let long = long.await.unwrap();
    assert_eq!(long.grpc_status(), "14", "{long:?}");
    let line = mesh.only("upstream_reset").await;
    assert!(line.to_string().contains("did not answer a PING"), "{line}");
    assert_eq!(unary(&mut caller).await, "0");
    mesh.stop().await;
}

#[tokio::test]
async fn many_calls_at_once_lose_only_those_that_were_sent_before_the_first_timeout() {
    let app = grpc_app().await;
    let relay = Relay::to(&app).await;
    let mesh = Mesh::with(&grpc_policy(&relay, "    circuitBreaker: off"), |settings| settings.workers = 4).await;
    let to = mesh.addr("in");
    let mut callers = Vec::new();
    for _ in 0..24 {
        callers.push(Caller::open(Speaks::Http2, to).await);
    }
    let workers = ask_all(&mut callers).await;
    assert!(workers.iter().all(|status| status == "0"));
    let before = relay.opened();
    relay.mute();
    assert!(ask_all(&mut callers).await.iter().all(|status| status == "4"));
    assert!(ask_all(&mut callers).await.iter().all(|status| status == "0"), "{:#?}", mesh.log());
    relay.closed(before).await;
    assert!(ask_all(&mut callers).await.iter().all(|status| status == "0"), "{:#?}", mesh.log());
    mesh.stop().await;
}

/// One unary call of each caller, all at once.
async fn ask_all(callers: &mut [Caller]) -> Vec<String> {
    futures_util::future::join_all(callers.iter_mut().map(unary)).await
}

#[tokio::test]
async fn a_stream_that_times_out_in_silence_and_calls_that_their_caller_gives_up_say_the_same() {
    let app = grpc_app().await;
    let relay = Relay::to(&app).await;
    let mesh = Mesh::start(&grpc_policy(&relay, "")).await;
    let to = mesh.addr("in");
    let mut caller = Caller::open(Speaks::Http2, to).await;
    let watched = caller.send(grpc_call("Watch")).await.unwrap();
    relay.mute();
    let trailers = timeout(SOON, watched.into_body().collect()).await.unwrap().unwrap().trailers().cloned().unwrap();
    assert_eq!(trailers["grpc-status"], "4");
    assert_eq!(unary(&mut caller).await, "0");
    assert_eq!(relay.opened(), 2);

    relay.mute();
    // The policy gives them a minute, their caller 300 ms: after a second of silence in all the fifth succeeds.
    let mut calls = 0;
    while timeout(Duration::from_millis(300), caller.send(grpc_call("Unary"))).await.is_err() {
        calls += 1;
    }
    assert!((1..=5).contains(&calls), "{calls}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_mute_connection_draws_suspicion_on_its_siblings() {
    let app = grpc_app_with(Some(1)).await;
    let relay = Relay::to(&app).await;
    let mesh = Mesh::start(&grpc_policy(&relay, "")).await;
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    // One stream per connection: the call beside the stream opens a second one.
    let watched = caller.send(grpc_call("Watch")).await.unwrap();
    assert_eq!(unary(&mut caller).await, "0");
    drop(watched);
    mesh.ended("caller_gone", 1).await;
    relay.mute();
    assert_eq!(unary(&mut caller).await, "4");
    relay.closed(2).await;
    assert_eq!(unary(&mut caller).await, "0");
    assert_eq!((relay.opened(), mesh.count("request_timeout")), (3, 1.0));
    mesh.stop().await;
}

#[tokio::test]
async fn a_slow_upstream_answers_the_ping_and_keeps_its_connection() {
    let app = grpc_app().await;
    let relay = Relay::to(&app).await;
    let mesh = Mesh::start(&grpc_policy(&relay, "    circuitBreaker: off")).await;
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    for _ in 0..3 {
        assert_eq!(unary(&mut caller).await, "0");
        assert_eq!(caller.ask(grpc_call("Never")).await.grpc_status(), "4");
    }
    assert_eq!(unary(&mut caller).await, "0");
    mesh.ended("ok", 4).await;
    assert_eq!(mesh.count("request_timeout"), 3.0);
    assert!(relay.opened() <= 3, "others while a ping is on the way: {}", relay.opened());
    mesh.stop().await;
}

#[tokio::test]
async fn over_http1_a_call_that_times_out_takes_its_idle_siblings_with_it() {
    let gate = Gate::closed();
    let app = Upstream::gated("hello", &gate).await;
    let relay = Relay::to(&app).await;
    let rules = "    retry: off\n    circuitBreaker: off\n    timeouts: { request: 500ms }";
    let mesh = Mesh::start(&policy(relay.addr, rules)).await;
    let to = mesh.addr("in");
    let slow: Vec<_> = (0..6).map(|_| tokio::spawn(get(to, "/slow"))).collect();
    eventually(|| (app.requests() == 6).then_some(())).await;
    gate.release(6);
    for call in slow {
        assert_eq!(call.await.unwrap().status, 200);
    }
    eventually(|| (mesh.metric("hopguard_pool_idle_connections", &["app"]) == 6.0).then_some(())).await;
    relay.mute();
    assert_eq!(get(to, "/").await.status, 504);
    assert_eq!(get(to, "/").await.status, 200);
    assert_eq!(relay.opened(), 7);
    relay.closed(6).await;
    mesh.ended("ok", 7).await;
    assert_eq!(mesh.count("request_timeout"), 1.0);
    assert_eq!(mesh.metric("hopguard_pool_open_connections", &["app"]), 1.0);
    mesh.stop().await;
}

#[tokio::test]
async fn over_http1_a_slow_call_leaves_the_siblings_that_answer_alone() {
    let gate = Gate::closed();
    let app = Upstream::gated("hello", &gate).await;
    let rules = "    retry: off\n    timeouts: { request: 500ms }";
    let mesh = Mesh::start(&policy(app.addr, rules)).await;
    let to = mesh.addr("in");
    let mut caller = Http1::open(to).await;
    let slow = tokio::spawn(get(to, "/slow"));
    eventually(|| (app.requests() == 1).then_some(())).await;
    while !slow.is_finished() {
        assert_eq!(caller.ask(request("GET", "/").body(empty()).unwrap()).await.status, 200);
    }
    assert_eq!(slow.await.unwrap().status, 504);
    assert_eq!(caller.ask(request("GET", "/").body(empty()).unwrap()).await.status, 200);
    assert_eq!(app.connections(), 2);
    mesh.stop().await;
}
