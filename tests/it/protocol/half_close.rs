//! Callers that close their sending side, that close the connection, and that reset it, while hopguard works on their
//! request; and the end of TLS.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::certificates::Authority;
use crate::support::http::{Http1, empty, request};
use crate::support::upstream::{Gate, Upstream, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

const GET: &str = "GET /slow HTTP/1.1\r\nHost: app.test\r\n\r\n";

fn resets(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Sends `bytes` as one caller, closes the sending side, and waits until the upstream has so many requests.
async fn half_closed(mesh: &Mesh, upstream: &Upstream, bytes: &str, requests: usize) -> Wire {
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(bytes).await;
    wire.stream.shutdown().await.unwrap();
    eventually(|| (upstream.requests() == requests).then_some(())).await;
    wire
}

#[tokio::test]
async fn a_caller_that_closes_its_sending_side_gets_its_response() {
    let gate = Gate::closed();
    let upstream = Upstream::gated("hello", &gate).await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let post = "POST /slow HTTP/1.1\r\nHost: app.test\r\nContent-Length: 4\r\n\r\nbody";
    let chunked = "POST /slow HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n";
    for (number, bytes) in [GET, post, chunked].into_iter().enumerate() {
        let mut wire = half_closed(&mesh, &upstream, bytes, number + 1).await;
        // Longer than the first check for a caller whose process has closed the connection.
        tokio::time::sleep(Duration::from_millis(50)).await;
        gate.release(1);
        let answer = wire.rest().await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"), "{bytes:?}: {answer:?}");
    }
    mesh.ended("ok", 3).await;
    assert_eq!(mesh.count("caller_gone"), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn every_pipelined_request_before_the_end_is_answered() {
    let gate = Gate::closed();
    let upstream = Upstream::gated("hello", &gate).await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let mut wire = half_closed(&mesh, &upstream, &GET.repeat(3), 1).await;
    gate.release(3);
    let answers = wire.rest().await;
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 3, "{answers:?}");
    mesh.ended("ok", 3).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_caller_over_tls_that_sends_close_notify_gets_its_response() {
    let (authority, folder, gate) = (Authority::new(), tempfile::tempdir().unwrap(), Gate::closed());
    authority.issue("shop.test").write(folder.path());
    let upstream = Upstream::gated("hello", &gate).await;
    let mesh = Mesh::start(&tls_listener(&policy(upstream.addr, ""), folder.path())).await;
    let mut stream = authority.connect(mesh.addr("in"), "shop.test", &["http/1.1"]).await.unwrap();
    stream.write_all(GET.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    eventually(|| (upstream.requests() == 1).then_some(())).await;
    gate.release(1);
    let mut answer = String::new();
    // Without `close_notify` from the other side, rustls reports the end as an error.
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"), "{answer:?}");
    mesh.only("ok").await;
    mesh.stop().await;
}

fn tls_listener(policy: &str, folder: &std::path::Path) -> String {
    let file = |name: &str| folder.join(name).display().to_string();
    let tls = format!("to: app, tls: {{ certificate: \"{}\", key: \"{}\" }} }}", file("tls.crt"), file("tls.key"));
    policy.replace("to: app }", &tls)
}

#[tokio::test]
async fn a_reset_cancels_the_call_of_a_caller_that_had_closed_its_sending_side() {
    let gate = Gate::closed();
    let upstream = Upstream::gated("hello", &gate).await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let wire = half_closed(&mesh, &upstream, GET, 1).await;
    resets(&wire.stream);
    drop(wire);
    mesh.only("caller_gone").await;
    eventually(|| (upstream.open() == 0).then_some(())).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_caller_on_this_host_that_closes_its_connection_is_noticed() {
    let gate = Gate::closed();
    let upstream = Upstream::gated("hello", &gate).await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    // At once, and after the sending side has been closed for a while: the second close sends nothing.
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(GET).await;
    eventually(|| (upstream.requests() == 1).then_some(())).await;
    drop(wire);
    mesh.ended("caller_gone", 1).await;
    let wire = half_closed(&mesh, &upstream, GET, 2).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(mesh.count("caller_gone"), 1.0);
    drop(wire);
    mesh.ended("caller_gone", 2).await;
    eventually(|| (upstream.open() == 0).then_some(())).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_stream_ends_with_the_sending_side_of_its_caller() {
    let upstream = Upstream::endless("text/event-stream").await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("GET /events HTTP/1.1\r\nHost: app.test\r\n\r\n").await;
    assert!(wire.head().await.starts_with("HTTP/1.1 200"));
    // Nothing is read, so that no write can fail.
    wire.stream.shutdown().await.unwrap();
    mesh.only("caller_gone").await;
    mesh.stop().await;
}

#[tokio::test]
async fn an_abandoned_call_resets_its_upstream_connection() {
    let ends = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&ends);
    let upstream = Upstream::bytes(move |stream| {
        let seen = Arc::clone(&seen);
        async move {
            let mut wire = Wire::over(stream);
            wire.head().await;
            // An upstream that sees FIN could take it for a caller that waits.
            let end = wire.stream.read(&mut [0; 16]).await;
            assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
            seen.fetch_add(1, SeqCst);
        }
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    retry: off\n    timeouts: { request: 200ms }")).await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    assert_eq!(caller.ask(request("GET", "/").body(empty()).unwrap()).await.status, 504);
    eventually(|| (ends.load(SeqCst) == 1).then_some(())).await;
    mesh.only("request_timeout").await;
    mesh.stop().await;
}

/// An upstream behind TLS that answers each request, and counts the connections that ended with `close_notify`.
async fn counts_close_notify(authority: &Authority) -> (Upstream, Arc<AtomicUsize>) {
    let acceptor = authority.issue("app.test").acceptor(&["http/1.1"]);
    let notified = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&notified);
    let upstream = Upstream::bytes(move |stream| {
        let (acceptor, count) = (acceptor.clone(), Arc::clone(&count));
        async move {
            let mut stream = acceptor.accept(stream).await.unwrap();
            let mut seen = Vec::new();
            // rustls reports an end without `close_notify` as an error.
            while let Ok(read) = stream.read_buf(&mut seen).await {
                if read == 0 {
                    count.fetch_add(1, SeqCst);
                    return;
                }
                if seen.ends_with(b"\r\n\r\n") && !seen.starts_with(b"GET /hang") {
                    seen.clear();
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").await.unwrap();
                }
            }
        }
    })
    .await;
    (upstream, notified)
}

#[tokio::test]
async fn tls_upstreams_get_close_notify_when_a_connection_is_closed() {
    let (authority, folder) = (Authority::new(), tempfile::tempdir().unwrap());
    std::fs::write(folder.path().join("ca.pem"), authority.pem()).unwrap();
    let (upstream, notified) = counts_close_notify(&authority).await;
    let tls = format!("    tls: {{ ca: \"{}\", serverName: app.test }}", folder.path().join("ca.pem").display());
    let told = |count: usize| {
        eventually({
            let notified = Arc::clone(&notified);
            move || (notified.load(SeqCst) == count).then_some(())
        })
    };
    // The pool closes a connection that has been idle for too long.
    let idle = format!("{tls}\n    connections: {{ idle: 100ms }}");
    let mesh = Mesh::start(&policy(upstream.addr, &idle)).await;
    assert_eq!(crate::support::http::get(mesh.addr("in"), "/").await.status, 200);
    told(1).await;
    mesh.stop().await;
    // The process ends.
    let mesh = Mesh::start(&policy(upstream.addr, &tls)).await;
    assert_eq!(crate::support::http::get(mesh.addr("in"), "/").await.status, 200);
    mesh.only("ok").await;
    mesh.stop().await;
    told(2).await;
    // A call is given up: the reset follows `close_notify`.
    let mesh =
        Mesh::start(&policy(upstream.addr, &format!("{tls}\n    retry: off\n    timeouts: {{ request: 500ms }}")))
            .await;
    assert_eq!(crate::support::http::get(mesh.addr("in"), "/hang").await.status, 504);
    told(3).await;
    mesh.stop().await;
}

#[tokio::test]
async fn callers_over_tls_get_close_notify_at_a_drain() {
    let (authority, folder) = (Authority::new(), tempfile::tempdir().unwrap());
    authority.issue("shop.test").write(folder.path());
    let upstream = Upstream::fixed("hello").await;
    for alpn in ["http/1.1", "h2"] {
        let mesh = Mesh::start(&tls_listener(&policy(upstream.addr, ""), folder.path())).await;
        let mut stream = authority.connect(mesh.addr("in"), "shop.test", &[alpn]).await.unwrap();
        let hello: &[u8] = match alpn {
            "h2" => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
            _ => b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n",
        };
        stream.write_all(hello).await.unwrap();
        let mut first = [0; 9];
        stream.read_exact(&mut first).await.unwrap();
        let reading = tokio::spawn(async move {
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await
        });
        mesh.stop().await;
        reading.await.unwrap().unwrap_or_else(|error| panic!("{alpn}: {error}"));
    }
}
