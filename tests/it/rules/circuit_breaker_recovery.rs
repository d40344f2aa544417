//! An upstream that is killed under load and restarted: errors occur only while it is down, each is explained, and the breaker
//! closes, after which no call fails. An upstream that restarts with streams only closes it too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::SeqCst};
use std::time::Duration;

use hyper::Response;
use tokio::time::{Instant, sleep};

use crate::rules::circuit_breaker::{changes, fail, state};
use crate::support::http::{Speaks, full, get};
use crate::support::load::Load;
use crate::support::upstream::{Upstream, own_address, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, SOON, eventually};

async fn killed_and_restarted(http2: bool, speaks: Speaks) {
    let start = |addr| Upstream::on(addr, |_| async { Response::new(full("hello")) }, http2);
    let addr = own_address();
    let upstream = start(addr).await;
    let protocol = if http2 { "http2" } else { "http1" };
    let mesh = Mesh::start(&policy(addr, &format!("    protocol: {protocol}"))).await;
    let load = Load::none().add(mesh.addr("in"), speaks, 8, Duration::from_millis(5));
    eventually(|| (load.good() > 100).then_some(())).await;
    let killed = Instant::now();
    drop(upstream);
    sleep(Duration::from_millis(1200)).await;
    let good = load.good();
    let upstream = start(addr).await;
    eventually(|| (load.good() > good && state(&mesh) == 0.0).then_some(())).await;
    // Open again, if at all, only by a failure from now on.
    let (closed, good) = (Instant::now(), load.good());
    eventually(|| (load.good() > good + 200).then_some(())).await;
    let report = load.end().await;
    assert!(!report.failures.is_empty(), "nobody noticed that it was gone");
    for failure in &report.failures {
        assert!(failure.at >= killed, "before it was killed: {failure:?}");
        assert!(failure.begun <= closed, "after the breaker was closed: {failure:?}");
        // What cannot be reached five times in a row is not asked again at once.
        let is_explained = failure.what.starts_with("502 ") || failure.what.contains("circuit_open");
        assert!(is_explained && failure.what.contains("\"refusal\""), "{failure:?}");
    }
    assert_eq!(
        report.cut,
        0,
        "callers are answered, not cut: {:?}",
        report.failures.iter().find(|one| !one.what.starts_with("50"))
    );
    mesh.ended("ok", report.good).await;
    eventually(|| (mesh.log().len() >= report.good + report.failures.len()).then_some(())).await;
    let lines: Vec<serde_json::Value> = mesh.log().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let explained: Vec<_> = lines.iter().filter(|line| line["outcome"] != "ok").collect();
    assert_eq!(explained.len(), report.failures.len());
    for line in explained {
        let outcome = line["outcome"].as_str().unwrap();
        assert!(["connect_failed", "upstream_reset", "circuit_open"].contains(&outcome), "{line}");
        assert!(line["refusal"]["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{line}");
        assert!(outcome == "circuit_open" || line["endpoint"] == addr.to_string(), "{line}");
    }
    let failed = mesh.count("connect_failed") + mesh.count("upstream_reset") + mesh.count("circuit_open");
    assert_eq!(failed as usize, report.failures.len());
    assert!(upstream.requests() > 0);
    mesh.stop().await;
}

#[tokio::test]
async fn an_http1_upstream_may_die_and_come_back() {
    killed_and_restarted(false, Speaks::Http1).await;
}

#[tokio::test]
async fn an_http2_upstream_may_die_and_come_back() {
    killed_and_restarted(true, Speaks::Http2).await;
}

#[tokio::test]
async fn a_breaker_that_refused_connections_have_opened_closes_without_a_call_once_the_upstream_listens() {
    let addr = own_address();
    let breaker = "    circuitBreaker: { openFor: 2s, openForMax: 2s }";
    let mesh = Mesh::start(&policy(addr, breaker)).await;
    while state(&mesh) != 2.0 {
        assert_ne!(get(mesh.addr("in"), "/").await.status, 200);
    }
    let upstream = Upstream::on(addr, |_| async { Response::new(full("hello")) }, false).await;
    eventually(|| (state(&mesh) == 0.0).then_some(())).await;
    assert_eq!(upstream.requests(), 0, "nothing is sent to find that out");
    assert_eq!((changes(&mesh, "closed"), changes(&mesh, "half_open")), (1.0, 0.0));
    assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
    mesh.ended("ok", 1).await;
    mesh.stop().await;
}

/// Fails five calls, then begins whatever stream is asked for, and holds it open.
async fn failing_then_streaming() -> Upstream {
    let failures = Arc::new(AtomicU16::new(5));
    Upstream::bytes(move |stream| {
        let failures = Arc::clone(&failures);
        async move {
            let mut wire = Wire::over(stream);
            let head = wire.head().await.to_lowercase();
            if failures.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
                return wire.send("HTTP/1.1 503 Failing\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
            }
            let begun = match head.contains("upgrade: websocket") {
                true => "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
                false => "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: one\n\n",
            };
            wire.send(begun).await;
            wire.until("never").await;
        }
    })
    .await
}

/// A stream lasts; were its probe decided only by its end, three of them would keep all others out for an hour.
#[tokio::test]
async fn a_stream_that_has_begun_closes_the_breaker() {
    let websocket = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                     sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    for (fields, begins) in [("", "HTTP/1.1 200 "), (websocket, "HTTP/1.1 101 ")] {
        let upstream = failing_then_streaming().await;
        let mesh = Mesh::start(&policy(upstream.addr, "    circuitBreaker: { openFor: 50ms, openForMax: 50ms }")).await;
        fail(&mesh, 5, 503).await;
        eventually(|| (state(&mesh) == 2.0).then_some(())).await;
        let mut held = Vec::new();
        let begun = Instant::now();
        while changes(&mesh, "closed") == 0.0 {
            assert!(begun.elapsed() < SOON, "{begins}: the breaker stays half-open");
            let mut wire = Wire::open(mesh.addr("in")).await;
            wire.send(format!("GET /feed HTTP/1.1\r\nhost: shop.test\r\n{fields}\r\n")).await;
            let head = wire.head().await;
            assert!(head.starts_with(begins) || head.starts_with("HTTP/1.1 503 "), "{head}");
            held.push(wire);
            sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(state(&mesh), 0.0);
        drop(held);
        mesh.stop().await;
    }
}
