//! Slow clients: limits on a slow request head, a slow request body, an unread response, and an idle connection.

use std::time::Duration;

use hyper::{Request, Response};
use tokio::time::Instant;

use crate::support::certificates::Authority;
use crate::support::http::{Caller, Speaks, empty, feed, full};
use crate::support::upstream::Upstream;
use crate::support::wire::Wire;
use crate::support::{Mesh, SOON, eventually};

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

/// So much time has gone by. What comes too late is seen by whoever waits for it.
fn no_sooner(begun: Instant, least: u64) {
    let (elapsed, least) = (begun.elapsed(), Duration::from_millis(least));
    assert!(elapsed >= least, "{elapsed:?} instead of {least:?}");
}

#[tokio::test]
async fn a_head_that_comes_too_slowly_is_a_408() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let begun = Instant::now();
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("GET / HTTP/1.1\r\nhost: shop.te").await;
    let answer = wire.rest().await;
    no_sooner(begun, 300);
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
        assert!(begun.elapsed() < SOON, "it may trickle for ever");
    }
    no_sooner(begun, 300);
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
    no_sooner(begun, 550);
    assert_eq!(silent.rest().await, "");
    eventually(|| (mesh.metric("hopguard_listener_open_connections", &["in"]) == 0.0).then_some(())).await;
    assert_eq!(mesh.log().len(), 1, "nobody asked for anything: {:?}", mesh.log());
    mesh.stop().await;
}

/// What an HTTP/2 caller may say and then be silent: it agrees on nothing any more, not even on the end.
const HTTP2_BEGINS: [&[u8]; 4] = [
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    // HEADERS of which more is to come, and half a frame.
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x01\x01\x01\0\0\0\x01\x82",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x08\x06",
];

#[tokio::test]
async fn an_http2_caller_that_says_nothing_is_let_go_idle_or_in_a_drain() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let open = |mesh: &Mesh| mesh.metric("hopguard_listener_open_connections", &["in"]);
    let mut silent = Vec::new();
    for bytes in HTTP2_BEGINS {
        let mut wire = Wire::open(mesh.addr("in")).await;
        wire.send(bytes).await;
        silent.push(wire);
    }
    eventually(|| (open(&mesh) == 4.0).then_some(())).await;
    eventually(|| (open(&mesh) == 0.0).then_some(())).await;
    mesh.stop().await;
    let patient = policy(upstream.addr, "").replace("idle: 600ms", "idle: 60s");
    let mesh = Mesh::start(&patient).await;
    for bytes in HTTP2_BEGINS {
        let mut wire = Wire::open(mesh.addr("in")).await;
        wire.send(bytes).await;
        silent.push(wire);
    }
    eventually(|| (open(&mesh) == 4.0).then_some(())).await;
    // Less than the grace time, which this asserts.
    mesh.stop().await;
}

#[tokio::test]
async fn changed_time_limits_of_a_listener_hold_for_the_next_connection() {
    let (folder, upstream) = (tempfile::tempdir().unwrap(), Upstream::fixed("hello").await);
    Authority::new().issue("shop.test").write(folder.path());
    for tls in [false, true] {
        let path = folder.path().display();
        let more = format!("tls: {{ certificate: {path}/tls.crt, key: {path}/tls.key }}");
        let short = policy(upstream.addr, "");
        let short = if tls { short.replace("to: app", &format!("to: app\n    {more}")) } else { short };
        let mesh = Mesh::start(&short.replace("headers: 300ms, idle: 600ms", "headers: 60s, idle: 60s")).await;
        mesh.reload(&short).await;
        for sent in ["", if tls { "\u{16}" } else { "P" }] {
            let mut wire = Wire::open(mesh.addr("in")).await;
            wire.send(sent).await;
            assert_eq!(wire.rest().await, "", "tls: {tls}, after {sent:?}");
        }
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_request_body_that_does_not_come_is_the_callers_fault() {
    let limits = [("500ms", None, "timeouts.request"), ("5s", Some("500"), "deadline")];
    let table = limits.into_iter().flat_map(|limit| [Speaks::Http1, Speaks::Http2].map(|speaks| (speaks, limit)));
    for (speaks, (request, deadline, rule)) in table {
        let upstream = Upstream::http1(|request: Request<hyper::body::Incoming>| async move {
            let _whole = http_body_util::BodyExt::collect(request.into_body()).await;
            Response::new(full("got it"))
        })
        .await;
        let mesh = Mesh::start(&policy(upstream.addr, &format!("    timeouts: {{ request: {request} }}"))).await;
        let begun = Instant::now();
        let (pieces, body) = feed();
        assert!(pieces.send("first").await);
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let mut asked = Request::post("/").body(body).unwrap();
        if let Some(millis) = deadline {
            asked.headers_mut().insert("x-envoy-expected-rq-timeout-ms", millis.parse().unwrap());
        }
        let answer = caller.ask(asked).await;
        no_sooner(begun, 500);
        assert_eq!(answer.status, 408, "{answer:?}");
        let line = mesh.refused(&answer, "caller_timeout", rule, "500ms").await;
        assert_eq!((&line["status"], &line["refusal"]["closed_by"]), (&408.into(), &"hopguard".into()), "{line}");
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
        no_sooner(begun, 500);
        assert_eq!(line["refusal"]["rule"], rule, "{line}");
        eventually(|| (mesh.metric("hopguard_in_flight_requests", &["app"]) == 0.0).then_some(())).await;
        mesh.stop().await;
    }
}

/// An answer of 190,000 bytes to a caller over HTTP/2 that asks for the usual 65,535 of it and takes none.
#[tokio::test]
async fn an_answer_that_an_http2_caller_has_not_asked_for_is_not_taken() {
    let upstream = Upstream::http1(|_| async { Response::new(full(vec![b'x'; 190_000])) }).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 1s }")).await;
    let stream = tokio::net::TcpStream::connect(mesh.addr("in")).await.unwrap();
    let (mut caller, connection) = h2::client::Builder::new()
        .initial_connection_window_size(1 << 20)
        .handshake::<_, bytes::Bytes>(stream)
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    let asked = Request::get("http://shop.test/").body(()).unwrap();
    let answer = caller.send_request(asked, true).unwrap().0.await.unwrap();
    assert_eq!(mesh.metric("hopguard_in_flight_requests", &["app"]), 1.0);
    let line = mesh.only("caller_timeout").await;
    let taken = line["bytes_out"].as_u64().unwrap();
    // As much again waits for room, and no more.
    assert!((65_535..=2 * 65_535).contains(&taken), "{line}");
    drop(answer);
    connection.abort();
    mesh.stop().await;
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
