//! The pool of upstream connections: reuse, liveness before reuse, HTTP/2 stream limits, GOAWAY, and idle expiry.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::Barrier;

use crate::support::http::{Caller, Http1, Speaks, ask, empty, feed, full, get, request};
use crate::support::upstream::{Gate, Upstream, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, SOON, eventually};

fn idle(mesh: &Mesh) -> f64 {
    mesh.metric("hopguard_pool_idle_connections", &["app"])
}

#[tokio::test]
async fn a_connection_is_used_again() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    for _ in 0..20 {
        assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
    }
    assert_eq!((upstream.requests(), upstream.connections()), (20, 1));
    mesh.ended("ok", 20).await;
    eventually(|| (mesh.log().len() == 20).then_some(())).await;
    let (first, rest) = (mesh.log()[0].clone(), mesh.log()[1..].join("\n"));
    assert!(first.contains("\"connection\":\"new\"") && first.contains("connect_ms"), "{first}");
    assert_eq!(rest.matches("\"connection\":\"reused\"").count(), 19, "{rest}");
    assert_eq!(mesh.metric("hopguard_pool_connects_total", &["app"]), 1.0);
    assert_eq!(mesh.metric("hopguard_connect_duration_seconds_count", &["app"]), 1.0);
    mesh.stop().await;
}

#[tokio::test]
async fn an_unused_connection_is_closed_in_time() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "    connections: { idle: 300ms }")).await;
    get(mesh.addr("in"), "/").await;
    assert_eq!(idle(&mesh), 1.0);
    eventually(|| (mesh.metric("hopguard_pool_closes_total", &["app"]) == 1.0).then_some(())).await;
    assert_eq!(mesh.metric("hopguard_pool_open_connections", &["app"]), 0.0);
    get(mesh.addr("in"), "/").await;
    assert_eq!(upstream.connections(), 2);
    mesh.stop().await;
}

#[tokio::test]
async fn connections_to_a_destination_that_is_gone_are_closed_although_nobody_calls() {
    let upstream = Upstream::fixed("hello").await;
    let text = policy(upstream.addr, "    connections: { idle: 60s }");
    let mesh = Mesh::start(&text).await;
    get(mesh.addr("in"), "/").await;
    assert_eq!((idle(&mesh), upstream.open()), (1.0, 1));
    mesh.reload(&text.replace("app", "other")).await;
    eventually(|| (upstream.open() == 0).then_some(())).await;
    mesh.stop().await;
}

#[tokio::test]
async fn no_more_than_max_idle_are_kept() {
    let gate = Gate::closed();
    let held = gate.clone();
    let upstream = Upstream::http1(move |_| {
        let held = held.clone();
        async move {
            held.pass().await;
            Response::new(full("hello"))
        }
    })
    .await;
    let mesh = Mesh::start(&policy(
        upstream.addr,
        "    connections: { idle: 20s, maxIdle: 2 }\n    timeouts: { request: 20s }",
    ))
    .await;
    let to = mesh.addr("in");
    let calls: Vec<_> = (0..6).map(|_| tokio::spawn(async move { get(to, "/").await.status.as_u16() })).collect();
    eventually(|| (upstream.requests() == 6).then_some(())).await;
    gate.release(6);
    for call in calls {
        assert_eq!(call.await.unwrap(), 200);
    }
    eventually(|| (mesh.metric("hopguard_pool_open_connections", &["app"]) == 2.0).then_some(())).await;
    mesh.stop().await;
}

/// Answers a request with these fields, then closes when the test lets it.
async fn closing(fields: &'static str, gate: &Gate) -> Upstream {
    Upstream::closing(format!("HTTP/1.1 200 OK\r\n{fields}content-length: 5\r\n\r\nhello"), gate).await
}

#[tokio::test]
async fn a_connection_that_the_upstream_has_closed_is_not_used() {
    let gate = Gate::closed();
    let upstream = closing("", &gate).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    connections: { idle: 20s }")).await;
    for round in 1..=10 {
        let asked = request("POST", "/").body(full("x")).unwrap();
        let answer = crate::support::http::ask(mesh.addr("in"), asked).await;
        assert_eq!(answer.status, 200, "round {round}: {answer:?}");
        assert_eq!(upstream.connections(), round);
        gate.release(1);
        eventually(|| (mesh.metric("hopguard_pool_closes_total", &["app"]) == round as f64).then_some(())).await;
    }
    mesh.ended("ok", 10).await;
    mesh.stop().await;
}

#[tokio::test]
async fn connection_close_of_the_upstream_is_obeyed() {
    let gate = Gate::closed();
    let upstream = closing("connection: close\r\n", &gate).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    connections: { idle: 20s }")).await;
    for round in 1..=3 {
        assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
        assert_eq!((upstream.connections(), idle(&mesh) as u32), (round, 0));
    }
    gate.release(3);
    mesh.stop().await;
}

#[tokio::test]
async fn what_the_upstream_says_of_its_keep_alive_is_obeyed() {
    let gate = Gate::closed();
    let upstream = closing("keep-alive: timeout=1\r\n", &gate).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    connections: { idle: 20s }")).await;
    get(mesh.addr("in"), "/").await;
    // Far sooner than `connections.idle`, which is longer than this waits.
    eventually(|| (mesh.metric("hopguard_pool_open_connections", &["app"]) == 0.0).then_some(())).await;
    gate.release(1);
    mesh.stop().await;
}

#[tokio::test]
async fn what_it_says_with_an_answer_that_is_tried_again_is_obeyed_too() {
    for first in
        ["HTTP/1.1 503 Failing\r\nkeep-alive: timeout=0\r\n", "HTTP/1.0 503 Failing\r\nconnection: keep-alive\r\n"]
    {
        let failures = Arc::new(AtomicUsize::new(1));
        let upstream = Upstream::bytes(move |stream| {
            let failures = Arc::clone(&failures);
            async move {
                let mut wire = Wire::over(stream);
                while let Ok(1..) = wire.stream.peek(&mut [0]).await {
                    wire.head().await;
                    let fails = failures.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
                    let begins = if fails { first } else { "HTTP/1.1 200 OK\r\n" };
                    wire.send(format!("{begins}content-length: 5\r\n\r\nhello")).await;
                }
            }
        })
        .await;
        let outbound =
            policy(upstream.addr, "    connections: { idle: 20s }").replace("to: app", "to: app, direction: outbound");
        let mesh = Mesh::start(&outbound).await;
        assert_eq!(get(mesh.addr("in"), "/").await.status, 200, "{first}");
        let line = mesh.only("ok").await;
        assert_eq!((&line["attempt"], &line["connection"]), (&2.into(), &"new".into()), "{first}: {line}");
        assert_eq!(upstream.connections(), 2, "{first}");
        assert_eq!(mesh.metric("hopguard_pool_connects_total", &["app"]), 2.0);
        mesh.stop().await;
    }
}

/// An HTTP/2 upstream that lets this many streams be open on a connection.
async fn narrow(streams: u32, gate: &Gate) -> (Upstream, Arc<AtomicUsize>) {
    let (gate, requests) = (gate.clone(), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&requests);
    let upstream = Upstream::bytes(move |stream| {
        let (gate, seen) = (gate.clone(), Arc::clone(&seen));
        async move {
            let service = service_fn(move |_| {
                seen.fetch_add(1, SeqCst);
                let gate = gate.clone();
                async move {
                    gate.pass().await;
                    Ok::<_, std::convert::Infallible>(Response::new(full("hello")))
                }
            });
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ended = builder.max_concurrent_streams(streams).serve_connection(TokioIo::new(stream), service).await;
        }
    })
    .await;
    (upstream, requests)
}

async fn shared(streams: u32, calls: usize) -> usize {
    let gate = Gate::closed();
    let (upstream, requests) = narrow(streams, &gate).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http2\n    timeouts: { request: 20s }")).await;
    // The first call opens the connection, so that the limit of its peer is known to the others.
    gate.release(1);
    assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
    let to = mesh.addr("in");
    let all: Vec<_> = (0..calls).map(|_| tokio::spawn(async move { get(to, "/").await.status.as_u16() })).collect();
    eventually(|| (requests.load(SeqCst) == calls + 1).then_some(())).await;
    gate.release(calls);
    for call in all {
        assert_eq!(call.await.unwrap(), 200);
    }
    mesh.ended("ok", calls + 1).await;
    mesh.stop().await;
    upstream.connections()
}

#[tokio::test]
async fn one_http2_connection_is_shared() {
    assert_eq!(shared(200, 50).await, 1);
}

#[tokio::test]
async fn beyond_the_stream_limit_of_the_peer_another_connection_is_opened() {
    assert_eq!(shared(4, 12).await, 3);
}

/// An HTTP/2 upstream that lets four streams be open on a connection, and whose nth connection begins to speak when
/// `begins` lets it. It answers when `calls` have come.
async fn reluctant<F>(calls: usize, begins: impl Fn(usize) -> F + Clone + Send + Sync + 'static) -> Upstream
where
    F: Future<Output = ()> + Send + 'static,
{
    let (number, all) = (AtomicUsize::new(0), Arc::new(Barrier::new(calls)));
    Upstream::bytes(move |stream| {
        let (begin, all) = (begins(number.fetch_add(1, SeqCst)), Arc::clone(&all));
        async move {
            begin.await;
            let service = service_fn(move |_| {
                let all = Arc::clone(&all);
                async move {
                    all.wait().await;
                    Ok::<_, std::convert::Infallible>(Response::new(full("hello")))
                }
            });
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ended = builder.max_concurrent_streams(4).serve_connection(TokioIo::new(stream), service).await;
        }
    })
    .await
}

#[tokio::test]
async fn a_burst_opens_the_connections_that_it_needs_side_by_side() {
    let (first, others) = (Gate::closed(), Arc::new(Barrier::new(3)));
    let lets = first.clone();
    let upstream = reluctant(16, move |number| {
        let (first, others) = (lets.clone(), Arc::clone(&others));
        async move {
            if number == 0 {
                first.pass().await;
            } else {
                // One after the other they would never come to speak.
                others.wait().await;
            }
        }
    })
    .await;
    let more = "    protocol: http2\n    timeouts: { connect: 9s, request: 20s }\n    limits: { inFlight: 16 }";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let to = mesh.addr("in");
    let all: Vec<_> = (0..16).map(|_| tokio::spawn(async move { get(to, "/").await.status.as_u16() })).collect();
    eventually(|| (mesh.metric("hopguard_in_flight_requests", &["app"]) == 16.0).then_some(())).await;
    first.release(1);
    for call in all {
        assert_eq!(call.await.unwrap(), 200);
    }
    mesh.ended("ok", 16).await;
    assert_eq!(upstream.connections(), 4);
    assert_eq!(mesh.metric("hopguard_pool_connects_total", &["app"]), 4.0);
    assert_eq!(mesh.metric("hopguard_pool_connect_failures_total", &["app"]), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn callers_that_cannot_wait_for_a_connection_leave_it_to_those_that_come_after_them() {
    let gate = Gate::closed();
    let lets = gate.clone();
    let upstream = reluctant(1, move |_| {
        let gate = lets.clone();
        async move { gate.pass().await }
    })
    .await;
    let more = "    protocol: http2\n    timeouts: { connect: 9s, request: 9s }";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let asked = |wait: &str| request("GET", "/").header("x-envoy-expected-rq-timeout-ms", wait).body(empty()).unwrap();
    for _ in 0..3 {
        assert_eq!(ask(mesh.addr("in"), asked("50")).await.status, 504);
    }
    gate.release(1);
    assert_eq!(ask(mesh.addr("in"), asked("9000")).await.status, 200);
    assert_eq!(upstream.connections(), 1);
    assert_eq!(mesh.metric("hopguard_pool_connect_failures_total", &["app"]), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn an_http2_connection_all_of_whose_calls_were_given_up_is_looked_after_too() {
    let (upstream, requests) = narrow(200, &Gate::closed()).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http2\n    timeouts: { request: 20s }")).await;
    let to = mesh.addr("in");
    let call = tokio::spawn(async move { get(to, "/").await });
    eventually(|| (requests.load(SeqCst) == 1).then_some(())).await;
    call.abort();
    mesh.only("caller_gone").await;
    assert_eq!(mesh.metric("hopguard_pool_open_connections", &["app"]), 1.0);
    drop(upstream);
    eventually(|| (mesh.metric("hopguard_pool_closes_total", &["app"]) == 1.0).then_some(())).await;
    assert_eq!(mesh.metric("hopguard_pool_open_connections", &["app"]), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_post_that_was_not_sent_goes_over_another_connection() {
    let first = AtomicUsize::new(0);
    let upstream = Upstream::bytes(move |stream| {
        let number = first.fetch_add(1, SeqCst);
        async move {
            let mut wire = Wire::over(stream);
            wire.head().await;
            wire.send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await;
            if number > 0 {
                wire.rest().await;
            }
        }
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    connections: { idle: 20s }")).await;
    for _ in 0..2 {
        // The connection is closed right after the answer: the next call finds it closed, or closing.
        let mut caller = Http1::open(mesh.addr("in")).await;
        let answer = caller.ask(request("POST", "/").body(full("x")).unwrap()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    assert_eq!(upstream.connections(), 2);
    mesh.stop().await;
}

#[tokio::test]
async fn a_destination_that_moves_lets_idle_connections_go_while_a_call_lasts() {
    let gate = Gate::closed();
    let old = Upstream::gated("old", &gate).await;
    let new = Upstream::fixed("new").await;
    let more = "    connections: { idle: 60s }\n    timeouts: { request: 20s }";
    let mesh = Mesh::start(&policy(old.addr, more)).await;
    let to = mesh.addr("in");
    let slow = tokio::spawn(async move { get(to, "/slow").await });
    eventually(|| (old.requests() == 1).then_some(())).await;
    assert_eq!(get(to, "/").await.body, "old");
    assert_eq!(old.open(), 2);
    mesh.reload(&policy(new.addr, more)).await;
    assert_eq!(get(to, "/").await.body, "new");
    eventually(|| (old.open() == 1).then_some(())).await;
    gate.release(1);
    assert_eq!(slow.await.unwrap().body, "old");
    eventually(|| (old.open() == 0).then_some(())).await;
    eventually(|| (mesh.metric("hopguard_pool_open_connections", &["app"]) == 1.0).then_some(())).await;
    mesh.stop().await;
}

#[tokio::test]
async fn after_goaway_calls_go_over_a_new_connection() {
    let upstream = Upstream::bytes(|stream| async move {
        let service = service_fn(|_| async { Ok::<_, std::convert::Infallible>(Response::new(full("hello"))) });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            _ = &mut connection => return,
            () = tokio::time::sleep(Duration::from_millis(300)) => connection.as_mut().graceful_shutdown(),
        }
        let _ended = connection.await;
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http2")).await;
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    let begun = tokio::time::Instant::now();
    let mut calls = 0;
    while upstream.connections() < 5 {
        assert!(begun.elapsed() < SOON, "{} connections", upstream.connections());
        let answer = caller.ask(Request::post("/").body(empty()).unwrap()).await;
        assert_eq!(answer.status, 200, "call {calls}: {answer:?}");
        calls += 1;
    }
    mesh.ended("ok", calls).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_caller_that_leaves_during_its_upload_teaches_nothing_about_idle_connections() {
    let upstream = Upstream::http1(|request: Request<Incoming>| async move {
        let _whole = request.into_body().collect().await;
        Response::new(full("got it"))
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    get(mesh.addr("in"), "/").await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (pieces, body) = feed();
    let mut caller = Http1::open(mesh.addr("in")).await;
    let call = tokio::spawn(async move { caller.send(request("PUT", "/").body(body).unwrap()).await.map(drop) });
    assert!(pieces.send("first").await);
    eventually(|| (upstream.requests() == 2).then_some(())).await;
    call.abort();
    let line = mesh.only("caller_gone").await;
    assert_eq!(line["connection"], "reused", "{line}");
    get(mesh.addr("in"), "/").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    get(mesh.addr("in"), "/").await;
    assert_eq!(upstream.connections(), 2, "a connection that was idle for longer is still used");
    mesh.stop().await;
}
