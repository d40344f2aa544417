//! `connections.maxAge` and `connections.maxRequests`, over HTTP/1.1 and HTTP/2, and what is said to an upstream about its
//! connection.

use std::sync::{Arc, Mutex};

use hyper::Response;

use crate::support::http::{Http1, empty, full, get, request};
use crate::support::upstream::{Gate, Upstream, policy};
use crate::support::{Mesh, eventually};

fn early(mesh: &Mesh, reason: &str) -> f64 {
    mesh.metric("hopguard_pool_early_closes_total", &["app", &format!("reason=\"{reason}\"")])
}

fn open(mesh: &Mesh) -> f64 {
    mesh.metric("hopguard_pool_open_connections", &["app"])
}

async fn answers(protocol: &str, gate: &Gate) -> Upstream {
    let gate = gate.clone();
    let handler = move |request: hyper::Request<hyper::body::Incoming>| {
        let gate = gate.clone();
        async move {
            if request.uri().path() == "/slow" {
                gate.pass().await;
            }
            Response::new(full("hello"))
        }
    };
    if protocol == "http2" { Upstream::http2(handler).await } else { Upstream::http1(handler).await }
}

#[tokio::test]
async fn a_connection_carries_no_more_than_max_requests() {
    for protocol in ["http1", "http2"] {
        let upstream = answers(protocol, &Gate::closed()).await;
        let more = format!("    protocol: {protocol}\n    connections: {{ idle: 60s, maxRequests: 10 }}");
        let mesh = Mesh::start(&policy(upstream.addr, &more)).await;
        let mut caller = Http1::open(mesh.addr("in")).await;
        for _ in 0..100 {
            assert_eq!(caller.ask(request("GET", "/").body(empty()).unwrap()).await.status, 200);
        }
        // Each has a part of its own: between 8 and 10.
        assert!((10..=13).contains(&upstream.connections()), "{protocol}: {}", upstream.connections());
        assert!(early(&mesh, "max_requests") >= 9.0 && open(&mesh) <= 1.0, "{protocol}");
        eventually(|| (upstream.open() <= 1).then_some(())).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_connection_older_than_max_age_takes_no_request() {
    for protocol in ["http1", "http2"] {
        let gate = Gate::closed();
        let upstream = answers(protocol, &gate).await;
        let more = format!(
            "    protocol: {protocol}\n    connections: {{ idle: 60s, maxAge: 500ms }}\n    timeouts: {{ request: 20s }}"
        );
        let mesh = Mesh::start(&policy(upstream.addr, &more)).await;
        let to = mesh.addr("in");
        // An idle one is closed.
        assert_eq!(get(to, "/").await.status, 200);
        eventually(|| (upstream.open() == 0).then_some(())).await;
        assert_eq!((early(&mesh, "max_age"), open(&mesh)), (1.0, 0.0), "{protocol}");
        // A busy one ends with its last response.
        let slow = tokio::spawn(async move { get(to, "/slow").await });
        eventually(|| (upstream.requests() == 2).then_some(())).await;
        let mut caller = Http1::open(to).await;
        while upstream.connections() < 3 || early(&mesh, "max_age") < 1.0 {
            assert_eq!(caller.ask(request("GET", "/").body(empty()).unwrap()).await.status, 200);
        }
        assert!(!slow.is_finished());
        gate.release(1);
        assert_eq!(slow.await.unwrap().status, 200);
        eventually(|| (early(&mesh, "max_age") >= 2.0).then_some(())).await;
        eventually(|| (upstream.open() <= 1).then_some(())).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_upstream_is_told_that_its_connection_is_kept() {
    let seen = Arc::<Mutex<Vec<String>>>::default();
    let heads = Arc::clone(&seen);
    let upstream = Upstream::http1(move |request| {
        let said = request.headers().get_all("connection").iter().map(|value| value.to_str().unwrap().to_owned());
        heads.lock().unwrap().extend(said);
        async { Response::new(full("hello")) }
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
    get(mesh.addr("in"), "/").await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    caller.ask(request("GET", "/").header("connection", "close").body(empty()).unwrap()).await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    caller.ask(request("GET", "/").header("connection", "te").header("te", "trailers").body(empty()).unwrap()).await;
    assert_eq!(*seen.lock().unwrap(), ["keep-alive", "keep-alive", "keep-alive, te"]);
    mesh.stop().await;
}
