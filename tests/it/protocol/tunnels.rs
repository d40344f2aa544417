//! Tunnels: CONNECT over HTTP/1 and HTTP/2, and upgrades to WebSocket.

use std::time::Duration;

use hyper::Request;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};

use crate::support::http::{Caller, Speaks, empty, raw};
use crate::support::upstream::{Gate, Upstream, nobody, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, SOON, eventually};

/// Sends back what comes, until the other side has nothing more to say.
async fn echo() -> Upstream {
    Upstream::bytes(|mut stream| async move {
        let (mut read, mut write) = stream.split();
        let _gone = tokio::io::copy(&mut read, &mut write).await;
        let _gone = write.shutdown().await;
    })
    .await
}

async fn proxy(endpoint: &Upstream, timeouts: &str) -> Mesh {
    Mesh::start(&format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: out, bind: \"127.0.0.1:0\", forward: true }}
  - {{ name: in, bind: \"127.0.0.1:0\", to: app }}
defaults:
  timeouts: {{ {timeouts} }}
destinations:
  - {{ name: app, hosts: [bank.test], endpoints: [\"{}\"] }}
",
        endpoint.addr
    ))
    .await
}

#[tokio::test]
async fn connect_carries_bytes_both_ways_for_longer_than_a_request() {
    let upstream = echo().await;
    let mesh = proxy(&upstream, "request: 300ms, idle: 5s").await;
    let mut wire = Wire::open(mesh.addr("out")).await;
    wire.send("CONNECT bank.test:443 HTTP/1.1\r\nhost: bank.test:443\r\n\r\nearly ").await;
    let head = wire.head().await.to_lowercase();
    assert!(head.starts_with("http/1.1 200 "), "{head}");
    assert!(!head.contains("content-length") && !head.contains("transfer-encoding"), "{head}");
    wire.until("early ").await;
    for piece in ["one", "two", "three"] {
        wire.send(piece).await;
        assert_eq!(wire.until(piece).await, piece);
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    wire.stream.shutdown().await.unwrap();
    assert_eq!(wire.rest().await, "");
    let line = mesh.only("ok").await;
    assert_eq!(
        (&line["method"], &line["protocol"], &line["host"]),
        (&"CONNECT".into(), &"tunnel".into(), &"bank.test:443".into()),
        "{line}"
    );
    assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&17.into(), &17.into()), "{line}");
    assert_eq!(mesh.metric("hopguard_requests_total", &["protocol=\"tunnel\"", "destination=\"app\""]), 1.0);
    mesh.stop().await;
}

#[tokio::test]
async fn connect_works_over_http2() {
    let upstream = echo().await;
    let mesh = proxy(&upstream, "request: 300ms, idle: 5s").await;
    let mut caller = crate::support::http::http2(mesh.addr("out")).await;
    let request = Request::connect("bank.test:443").body(empty()).unwrap();
    let mut response = timeout(SOON, caller.send_request(request)).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    let mut tunnel = TokioIo::new(timeout(SOON, hyper::upgrade::on(&mut response)).await.unwrap().unwrap());
    tunnel.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    timeout(SOON, tunnel.read_exact(&mut back)).await.expect("nothing comes back").unwrap();
    assert_eq!(&back, b"hello");
    tunnel.shutdown().await.unwrap();
    let mut rest = Vec::new();
    timeout(SOON, tunnel.read_to_end(&mut rest)).await.expect("it does not end").unwrap();
    assert_eq!(mesh.only("ok").await["protocol"], "tunnel");
    mesh.stop().await;
}

#[tokio::test]
async fn a_connect_may_say_that_it_has_no_body_but_not_that_it_has_one() {
    let upstream = echo().await;
    let mesh = proxy(&upstream, "request: 1s, idle: 5s").await;
    for (number, length) in ["content-length: 0", "content-length: 0\r\ncontent-length: 0"].iter().enumerate() {
        let mut wire = Wire::open(mesh.addr("out")).await;
        wire.send(format!("CONNECT bank.test:443 HTTP/1.1\r\nhost: bank.test:443\r\n{length}\r\n\r\n")).await;
        assert!(wire.head().await.starts_with("HTTP/1.1 200 "), "{length}");
        wire.send("hello").await;
        wire.until("hello").await;
        wire.stream.shutdown().await.unwrap();
        assert_eq!(wire.rest().await, "");
        mesh.ended("ok", number + 1).await;
    }
    assert_eq!(mesh.metric("hopguard_requests_total", &["protocol=\"tunnel\"", "outcome=\"ok\""]), 2.0);
    for (number, body) in ["content-length: 5", "transfer-encoding: chunked"].iter().enumerate() {
        let asked = format!("CONNECT bank.test:443 HTTP/1.1\r\nhost: bank.test:443\r\n{body}\r\n\r\n");
        let mut wire = Wire::open(mesh.addr("out")).await;
        wire.send(asked).await;
        assert!(wire.head().await.starts_with("HTTP/1.1 400 "), "{body}");
        mesh.ended("bad_request", number + 1).await;
    }
    assert_eq!(upstream.connections(), 2);
    mesh.stop().await;
}

#[tokio::test]
async fn a_listener_for_one_destination_makes_no_tunnels() {
    let upstream = echo().await;
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let mesh = proxy(&upstream, "request: 1s").await;
        let request = Request::connect("bank.test:443").header("host", "bank.test:443").body(empty()).unwrap();
        let answer = Caller::open(speaks, mesh.addr("in")).await.ask(request).await;
        assert!(answer.status == 403 || answer.status == 405, "{answer:?}");
        assert_eq!(answer.problem()["refusal"], "connect_denied");
        assert_eq!(mesh.only("connect_denied").await["status"], answer.status.as_u16());
        mesh.stop().await;
    }
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn a_tunnel_to_nowhere_is_refused() {
    let upstream = echo().await;
    let mesh = proxy(&upstream, "request: 1s").await;
    for (target, status, outcome) in [("nowhere.test:443", 404, "no_destination"), ("bank.test", 400, "bad_request")] {
        let mut wire = Wire::open(mesh.addr("out")).await;
        wire.send(format!("CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n")).await;
        let head = wire.head().await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{target}: {head}");
        mesh.ended(outcome, 1).await;
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_silent_tunnel_is_cut() {
    let upstream = echo().await;
    let mesh = proxy(&upstream, "request: 300ms, idle: 500ms").await;
    let mut wire = Wire::open(mesh.addr("out")).await;
    wire.send("CONNECT bank.test:443 HTTP/1.1\r\nhost: bank.test:443\r\n\r\n").await;
    wire.head().await;
    let begun = Instant::now();
    wire.rest().await;
    assert!(begun.elapsed() >= Duration::from_millis(450), "{:?}", begun.elapsed());
    let line = mesh.only("idle_timeout").await;
    assert_eq!(
        (&line["refusal"]["rule"], &line["refusal"]["value"]),
        (&"timeouts.idle".into(), &"500ms".into()),
        "{line}"
    );
    mesh.stop().await;
}

#[tokio::test]
async fn a_busy_tunnel_ends_with_its_longest_life() {
    let upstream = echo().await;
    let mesh = proxy(&upstream, "request: 200ms, maxDuration: 600ms").await;
    let mut wire = Wire::open(mesh.addr("out")).await;
    wire.send("CONNECT bank.test:443 HTTP/1.1\r\nhost: bank.test:443\r\n\r\n").await;
    wire.head().await;
    let begun = Instant::now();
    while mesh.count("max_duration") == 0.0 {
        wire.send("x").await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(begun.elapsed() < SOON, "it lives for ever");
    }
    assert!(begun.elapsed() >= Duration::from_millis(550), "{:?}", begun.elapsed());
    assert_eq!(mesh.only("max_duration").await["refusal"]["rule"], "timeouts.maxDuration");
    mesh.stop().await;
}

const UPGRADE: &str = "GET /chat HTTP/1.1\r\nhost: shop.test\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\n\
sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

#[tokio::test]
async fn a_websocket_passes_bytes_even_those_that_come_early() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        let head = wire.head().await.to_lowercase();
        assert!(head.contains("upgrade: websocket") && head.contains("connection: upgrade"), "{head}");
        wire.send(format!("{SWITCHED}early from the server")).await;
        wire.until("early from the caller").await;
        wire.send("heard").await;
        wire.until("bye").await;
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 300ms, idle: 5s }")).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(format!("{UPGRADE}early from the caller")).await;
    let head = wire.head().await.to_lowercase();
    assert!(head.starts_with("http/1.1 101 ") && head.contains("upgrade: websocket"), "{head}");
    assert!(head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
    wire.until("early from the server").await;
    wire.until("heard").await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    wire.send("bye").await;
    assert_eq!(wire.rest().await, "");
    drop(wire);
    let line = mesh.only("ok").await;
    assert_eq!((&line["protocol"], &line["status"]), (&"websocket".into(), &101.into()), "{line}");
    assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&24.into(), &26.into()), "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn an_upgrade_that_the_upstream_refuses_is_an_answer() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        wire.head().await;
        wire.send("HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno").await;
        wire.rest().await;
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(UPGRADE).await;
    assert!(wire.until("no").await.starts_with("HTTP/1.1 403 "));
    assert_eq!(mesh.only("client_error").await["status"], 403);
    mesh.stop().await;
}

#[tokio::test]
async fn an_upgrade_whose_caller_has_gone_gives_everything_back() {
    let gate = Gate::closed();
    let held = gate.clone();
    let upstream = Upstream::bytes(move |stream| {
        let held = held.clone();
        async move {
            let mut wire = Wire::over(stream);
            wire.head().await;
            held.pass().await;
            wire.send(SWITCHED).await;
            wire.rest().await;
        }
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    limits: { inFlight: 1, queue: 0 }")).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(format!("{UPGRADE}early")).await;
    eventually(|| (upstream.connections() == 1).then_some(())).await;
    socket2::SockRef::from(&wire.stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(wire);
    // The reset is seen before the app has answered, also behind bytes that nobody has read yet.
    let line = mesh.only("caller_gone").await;
    assert_eq!((&line["protocol"], &line["method"]), (&"http1".into(), &"GET".into()), "{line}");
    gate.release(1);
    eventually(|| (upstream.open() == 0).then_some(())).await;
    assert_eq!(mesh.metric("hopguard_in_flight_requests", &["app"]), 0.0);
    assert_eq!(mesh.metric("hopguard_pool_open_connections", &["app"]), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_silent_websocket_is_cut() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        wire.head().await;
        wire.send(SWITCHED).await;
        wire.rest().await;
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 300ms, idle: 500ms }")).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(UPGRADE).await;
    wire.head().await;
    let begun = Instant::now();
    wire.rest().await;
    assert!(begun.elapsed() >= Duration::from_millis(450), "{:?}", begun.elapsed());
    let line = mesh.only("idle_timeout").await;
    assert_eq!((&line["protocol"], &line["refusal"]["value"]), (&"websocket".into(), &"500ms".into()), "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn an_upgrade_to_http2_is_not_passed_on() {
    let upstream = Upstream::http1(|request: Request<hyper::body::Incoming>| async move {
        let told = request.headers().contains_key("upgrade") || request.headers().contains_key("http2-settings");
        hyper::Response::new(crate::support::http::full(if told { "told" } else { "not told" }))
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\n").await;
    let answer = wire.until("told").await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("not told"), "{answer}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_destination_without_endpoints_tunnels_to_where_the_caller_was_going() {
    let upstream = echo().await;
    let policy = "apiVersion: hopguard.dev/v1alpha1
kind: Policy
accessLog: { mode: all }
listeners:
  - { name: out, bind: \"127.0.0.1:0\", forward: true }
destinations:
  - { name: others, hosts: [\"*\"] }
";
    let mesh = Mesh::start(policy).await;
    let mut wire = Wire::open(mesh.addr("out")).await;
    let target = upstream.addr;
    wire.send(format!("CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n")).await;
    assert!(wire.head().await.starts_with("HTTP/1.1 200 "));
    wire.send("hello").await;
    wire.until("hello").await;
    drop(wire);
    assert_eq!(mesh.only("ok").await["endpoint"], target.to_string());
    mesh.stop().await;
}

#[tokio::test]
async fn https_in_absolute_form_never_goes_out_in_plain_text() {
    let upstream = echo().await;
    let mesh = proxy(&upstream, "request: 1s").await;
    for target in ["https://bank.test/x", "HTTPS://bank.test:8443/x"] {
        let request = format!("GET {target} HTTP/1.1\r\nhost: bank.test\r\nconnection: close\r\n\r\n");
        let answer = raw(mesh.addr("out"), request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(answer.contains("use CONNECT") && answer.contains("app has no `tls`"), "{answer}");
    }
    mesh.ended("bad_request", 2).await;
    assert_eq!(mesh.metric("hopguard_requests_total", &["destination=\"app\""]), 2.0);
    assert_eq!(upstream.connections(), 0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_tunnel_whose_upstream_is_down_is_a_502() {
    let gone = nobody();
    let upstream = echo().await;
    let mesh = proxy(&upstream, "request: 1s").await;
    mesh.reload(&format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
accessLog: {{ mode: all }}
listeners:
  - {{ name: out, bind: \"127.0.0.1:0\", forward: true }}
destinations:
  - {{ name: app, hosts: [bank.test], endpoints: [\"{gone}\"] }}
"
    ))
    .await;
    let mut wire = Wire::open(mesh.addr("out")).await;
    wire.send("CONNECT bank.test:443 HTTP/1.1\r\nhost: bank.test:443\r\n\r\n").await;
    assert!(wire.head().await.starts_with("HTTP/1.1 502 "));
    assert_eq!(mesh.only("connect_failed").await["method"], "CONNECT");
    mesh.stop().await;
}

#[tokio::test]
async fn a_tunnel_goes_to_another_endpoint_where_one_cannot_be_reached() {
    const TUNNELS: usize = 20;
    let gone = nobody();
    let upstream = echo().await;
    let endpoints =
        policy(upstream.addr, "    retry: off").replace("endpoints: [", &format!("endpoints: [\"{gone}\", "));
    let mesh = Mesh::start(
        &endpoints.replace("to: app", "forward: true").replace("name: app", "name: app\n    hosts: [bank.test]"),
    )
    .await;
    for round in 0..TUNNELS {
        let mut wire = Wire::open(mesh.addr("in")).await;
        wire.send("CONNECT bank.test:443 HTTP/1.1\r\nhost: bank.test:443\r\n\r\n").await;
        assert!(wire.head().await.starts_with("HTTP/1.1 200 "), "tunnel {round}");
        wire.send("hello").await;
        wire.until("hello").await;
    }
    mesh.ended("ok", TUNNELS).await;
    eventually(|| (mesh.log().len() == TUNNELS).then_some(())).await;
    let reached = format!("\"endpoint\":\"{}\"", upstream.addr);
    assert!(mesh.log().iter().all(|line| line.contains(&reached)), "{:#?}", mesh.log());
    // Once it is known, it is passed over for a second.
    let failures = mesh.metric("hopguard_pool_connect_failures_total", &["app"]);
    assert!((1.0..=TUNNELS as f64 / 4.0).contains(&failures), "{failures}");
    assert_eq!(mesh.metric("hopguard_pool_connects_total", &["app"]), TUNNELS as f64);
    assert_eq!(mesh.metric("hopguard_pool_open_connections", &["app"]), 0.0, "a tunnel is in no pool");
    mesh.stop().await;
}

#[tokio::test]
async fn an_upgrade_with_a_body_is_not_offered_to_the_upstream() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        let head = wire.head().await;
        assert!(!head.contains("upgrade"), "{head}");
        wire.until("0123456789").await;
        wire.send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nplain").await;
        wire.rest().await;
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(UPGRADE.replace("\r\n\r\n", "\r\ncontent-length: 10\r\n\r\n0123456789")).await;
    assert!(wire.until("plain").await.starts_with("HTTP/1.1 200 "));
    mesh.ended("ok", 1).await;
    mesh.stop().await;
}

#[tokio::test]
async fn an_upgrade_is_offered_beside_trailers() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        let head = wire.head().await;
        let named = head.lines().filter(|line| line.starts_with("connection:")).collect::<Vec<_>>();
        assert_eq!(named, ["connection: upgrade, te"], "{head}");
        wire.send(SWITCHED).await;
        wire.rest().await;
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(UPGRADE.replace("Upgrade\r\n", "Upgrade, TE\r\nte: trailers\r\n")).await;
    assert!(wire.head().await.starts_with("HTTP/1.1 101 "));
    drop(wire);
    mesh.stop().await;
}
