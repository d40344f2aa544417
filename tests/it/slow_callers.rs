//! What a slow caller holds is bounded: a head, a body, an answer that it does not read, a connection that it does not use.

use std::time::Duration;

use hyper::{Request, Response};
use tokio::time::Instant;

use crate::support::http::{Caller, Speaks, empty, feed, full};
use crate::support::upstream::Upstream;
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

fn policy(upstream: std::net::SocketAddr, more: &str) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - name: in
    bind: \"127.0.0.1:0\"
    to: app
    timeouts: {{ headers: 300ms, idle: 600ms }}
destinations:
  - name: app
    protocol: http1
    endpoints: [\"{upstream}\"]
{more}
"
    )
}

fn between(begun: Instant, least: u64) {
    let (elapsed, least) = (begun.elapsed(), Duration::from_millis(least));
    assert!(elapsed >= least && elapsed < least + Duration::from_secs(4), "{elapsed:?} instead of {least:?}");
}

#[tokio::test]
async fn a_head_that_comes_too_slowly_is_a_408() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let begun = Instant::now();
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("GET / HTTP/1.1\r\nhost: shop.te").await;
    let answer = wire.rest().await;
    between(begun, 300);
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("caller_timeout") && answer.contains("timeouts.headers"), "{answer}");
    let line = mesh.only("caller_timeout").await;
    assert_eq!(
        (&line["refusal"]["rule"], &line["refusal"]["value"]),
        (&"timeouts.headers".into(), &"300ms".into()),
        "{line}"
    );
    assert_eq!((&line["status"], &line["refusal"]["origin"]), (&408.into(), &"policy.yaml:9".into()), "{line}");
    assert_eq!(upstream.requests(), 0);
    mesh.stop().await;
}

#[tokio::test]
async fn bytes_that_trickle_do_not_prolong_the_time_for_a_head() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let begun = Instant::now();
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("GET / HTTP/1.1\r\nhost: shop.test\r\n").await;
    while mesh.count("caller_timeout") == 0.0 {
        wire.send("x-more: 1\r\n").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(begun.elapsed() < Duration::from_secs(5), "it may trickle for ever");
    }
    between(begun, 300);
    mesh.stop().await;
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let mut silent = Wire::open(mesh.addr("in")).await;
    let mut used = Wire::open(mesh.addr("in")).await;
    used.send("GET / HTTP/1.1\r\nhost: shop.test\r\n\r\n").await;
    used.until("hello").await;
    let begun = Instant::now();
    assert_eq!(used.rest().await, "", "an idle connection is closed without a word");
    between(begun, 550);
    assert_eq!(silent.rest().await, "");
    eventually(|| (mesh.metric("hopguard_listener_open_connections", &["in"]) == 0.0).then_some(())).await;
    assert_eq!(mesh.log().len(), 1, "nobody asked for anything: {:?}", mesh.log());
    mesh.stop().await;
}

#[tokio::test]
async fn a_request_body_that_does_not_come_is_the_callers_fault() {
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let upstream = Upstream::http1(|request: Request<hyper::body::Incoming>| async move {
            let _whole = http_body_util::BodyExt::collect(request.into_body()).await;
            Response::new(full("got it"))
        })
        .await;
        let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 500ms }")).await;
        let begun = Instant::now();
        let (pieces, body) = feed();
        assert!(pieces.send("first").await);
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let answer = caller.ask(Request::post("/").body(body).unwrap()).await;
        between(begun, 500);
        assert_eq!(answer.status, 408, "{answer:?}");
        let line = mesh.only("caller_timeout").await;
        assert_eq!((&line["status"], &line["refusal"]["closed_by"]), (&408.into(), &"hopguard".into()), "{line}");
        assert_eq!(answer.problem()["refusal"], "caller_timeout");
        assert_eq!(answer.problem()["rule"], line["refusal"]["rule"]);
        assert!(line["refusal"]["value"].is_string(), "{line}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_caller_that_stops_reading_is_cut() {
    for (content_type, rule) in [("text/plain", "timeouts.request"), ("text/event-stream", "timeouts.idle")] {
        let upstream = Upstream::endless(content_type).await;
        let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 500ms, idle: 500ms }")).await;
        let mut wire = Wire::open(mesh.addr("in")).await;
        let begun = Instant::now();
        wire.send("GET / HTTP/1.1\r\nhost: shop.test\r\n\r\n").await;
        let line = mesh.only("caller_timeout").await;
        between(begun, 500);
        assert_eq!(line["refusal"]["rule"], rule, "{line}");
        eventually(|| (mesh.metric("hopguard_in_flight_requests", &["app"]) == 0.0).then_some(())).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_http2_caller_that_gives_no_window_is_cut() {
    let upstream = Upstream::endless("text/plain").await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 500ms }")).await;
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    let response = caller.send(Request::get("/").body(empty()).unwrap()).await.unwrap();
    assert_eq!(mesh.only("caller_timeout").await["status"], 200);
    drop(response);
    mesh.stop().await;
}
