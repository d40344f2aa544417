//! A destination without endpoints forwards to the host that the caller names; each host has its own circuit breaker, and
//! the least recently used healthy host is forgotten first.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::SeqCst};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::time::{Instant, sleep};

use crate::support::http::{Answer, ask, empty, full};
use crate::support::program::Program;
use crate::support::upstream::Upstream;
use crate::support::{Mesh, SOON};

/// Places that a worker remembers.
const PLACES: u16 = 256;

fn policy(open_for: &str) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: out, bind: \"127.0.0.1:0\", forward: true }}
destinations:
  - name: others
    hosts: [\"*\"]
    retry: off
    connections: {{ idle: 60s }}
    circuitBreaker: {{ consecutiveFailures: 2, openFor: {open_for}, openForMax: 60s }}
"
    )
}

/// A server whose status the test sets.
async fn server() -> (Upstream, Arc<AtomicU16>) {
    let status = Arc::new(AtomicU16::new(503));
    let now = Arc::clone(&status);
    let answer = move |_| {
        let status = now.load(SeqCst);
        async move { Response::builder().status(status).body(full("server")).unwrap() }
    };
    (Upstream::http1(answer).await, status)
}

async fn call(to: SocketAddr, place: impl std::fmt::Display) -> Answer {
    ask(to, Request::get("/").header("host", place.to_string()).body(empty()).unwrap()).await
}

fn state(mesh: &Mesh) -> f64 {
    mesh.metric("hopguard_circuit_breaker_state", &["destination=\"others\""])
}

#[tokio::test]
async fn the_worst_place_is_shown() {
    let ((first, _), (second, status)) = (server().await, server().await);
    let mesh = Mesh::start(&policy("50s")).await;
    let to = mesh.addr("out");
    for _ in 0..2 {
        assert_eq!(call(to, first.addr).await.status, 503);
    }
    assert_eq!(call(to, first.addr).await.problem()["refusal"], "circuit_open");
    assert_eq!(state(&mesh), 2.0);
    mesh.reload(&policy("200ms")).await;
    for _ in 0..2 {
        assert_eq!(call(to, second.addr).await.status, 503);
    }
    status.store(200, SeqCst);
    let begun = Instant::now();
    while call(to, second.addr).await.status != 200 {
        assert!(begun.elapsed() < SOON, "it stays open");
        sleep(Duration::from_millis(10)).await;
    }
    let closed = mesh.metric("hopguard_circuit_breaker_changes_total", &["others", "state=\"closed\""]);
    assert_eq!((closed, state(&mesh)), (1.0, 2.0), "the first one is still open");
    assert_eq!(call(to, first.addr).await.problem()["refusal"], "circuit_open");
    assert_eq!(first.requests(), 2);
    mesh.reload(&policy("200ms").replace("circuitBreaker: {", "circuitBreaker: off #")).await;
    assert_eq!(state(&mesh), 0.0, "no breaker, nothing to show");
    mesh.stop().await;
}

#[tokio::test]
async fn a_place_stays_open_and_connections_stay_when_the_names_of_their_destination_change() {
    let ((server, _), (shop, status)) = (server().await, server().await);
    status.store(200, SeqCst);
    let all = |hosts: &str, names: &str| {
        let shop = format!("  - {{ name: shop, hosts: [{names}], endpoints: [\"{}\"] }}\n", shop.addr);
        policy("50s").replace("hosts: [\"*\"]", hosts) + &shop
    };
    let mesh = Mesh::start(&all("hosts: [\"*\"]", "shop.test")).await;
    let to = mesh.addr("out");
    for _ in 0..2 {
        assert_eq!(call(to, server.addr).await.status, 503);
    }
    assert_eq!(call(to, "shop.test").await.status, 200);
    mesh.reload(&all("hosts: [other.test, \"*\"]", "first.test, shop.test")).await;
    assert_eq!(call(to, server.addr).await.problem()["refusal"], "circuit_open");
    assert_eq!(call(to, "shop.test").await.status, 200);
    assert_eq!((server.requests(), shop.connections()), (2, 1));
    mesh.stop().await;
}

#[tokio::test]
async fn the_log_names_the_dynamic_host() {
    let (server, _) = server().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.yaml");
    std::fs::write(&file, policy("50s")).unwrap();
    let program = Program::run(&file, &[]).await;
    let to = program.addr("out").await.unwrap();
    for _ in 0..3 {
        assert_eq!(call(to, server.addr).await.status, 503);
    }
    let said = program.said("the circuit breaker changed its state").await;
    assert_eq!(
        (&said["destination"], &said["dynamic_host"]),
        (&"others".into(), &server.addr.to_string().into()),
        "{said}"
    );
}

/// A server that can be reached at many addresses, and fails at one of them.
async fn fails_on_localhost() -> Upstream {
    let anywhere = "0.0.0.0:0".parse().unwrap();
    let answer = |request: Request<Incoming>| async move {
        let fails = request.headers()["host"].to_str().unwrap().starts_with("127.0.0.1:");
        Response::builder().status(if fails { 503 } else { 200 }).body(full("server")).unwrap()
    };
    Upstream::on(anywhere, answer, false).await
}

/// One of the addresses where it does not.
fn other(number: u16, port: u16) -> String {
    format!("127.1.{}.{}:{port}", number / 250, number % 250 + 1)
}

#[tokio::test]
async fn of_many_places_the_one_that_was_used_least_lately_is_forgotten_and_none_that_fails() {
    let server = fails_on_localhost().await;
    let port = server.addr.port();
    let place = |number| other(number, port);
    let mesh = Mesh::start(&policy("50s")).await;
    let to = mesh.addr("out");
    let failing = format!("127.0.0.1:{port}");
    for _ in 0..2 {
        assert_eq!(call(to, &failing).await.status, 503);
    }
    for number in 0..PLACES {
        assert_eq!(call(to, place(number)).await.status, 200, "{number}");
    }
    assert_eq!(call(to, &failing).await.problem()["refusal"], "circuit_open");
    mesh.ended("circuit_open", 1).await;
    // All but the first of the others still have their connection.
    let connections = server.connections();
    for number in 1..PLACES {
        assert_eq!(call(to, place(number)).await.status, 200, "{number}");
    }
    assert_eq!(server.connections(), connections);
    assert_eq!(call(to, place(0)).await.status, 200);
    assert_eq!(server.connections(), connections + 1);
    mesh.stop().await;
}

#[tokio::test]
async fn a_place_that_is_forgotten_before_it_is_tried_again_is_shown_no_more() {
    let server = fails_on_localhost().await;
    let port = server.addr.port();
    let mesh = Mesh::start(&policy("10ms")).await;
    let to = mesh.addr("out");
    for _ in 0..2 {
        assert_eq!(call(to, format!("127.0.0.1:{port}")).await.status, 503);
    }
    assert_eq!(state(&mesh), 2.0);
    for number in 0..PLACES {
        assert_eq!(call(to, other(number, port)).await.status, 200, "{number}");
    }
    assert_eq!(state(&mesh), 0.0);
    mesh.stop().await;
}
