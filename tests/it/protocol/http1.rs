//! HTTP/1.0 clients, pipelining, `Expect: 100-continue`, interim responses, and upstreams that close the connection.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout};

use crate::support::bank::behind_a_caller;
use crate::support::http::{ask, full, get, raw, request};
use crate::support::upstream::{Upstream, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, SOON};

async fn mesh(upstream: &Upstream) -> Mesh {
    Mesh::start(&policy(upstream.addr, "    protocol: http1\n    timeouts: { request: 5s }")).await
}

/// An upstream in bytes that answers every request with the path it was asked for.
async fn paths() -> Upstream {
    Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        loop {
            let head = wire.head().await;
            let path = head.split(' ').nth(1).unwrap().to_owned();
            wire.send(format!(
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{path}\r\n0\r\n\r\n",
                path.len()
            ))
            .await;
        }
    })
    .await
}

#[tokio::test]
async fn an_http10_caller_gets_no_chunks_and_a_closed_connection() {
    let upstream = paths().await;
    let mesh = mesh(&upstream).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("GET /old HTTP/1.0\r\nhost: shop.test\r\n\r\n").await;
    let answer = wire.rest().await;
    assert!(answer.starts_with("HTTP/1.0 200") || answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.ends_with("\r\n\r\n/old") && !answer.to_lowercase().contains("chunked"), "{answer}");
    let wish = b"GET /old HTTP/1.0\r\nhost: shop.test\r\nconnection: keep-alive\r\n\r\n";
    let answer = raw(mesh.addr("in"), wish).await.to_lowercase();
    assert!(answer.contains("\r\nconnection: close\r\n") && !answer.contains("keep-alive"), "{answer}");
    let bare = raw(mesh.addr("in"), b"GET /bare HTTP/1.0\r\n\r\n").await;
    assert!(bare.ends_with("/bare"), "an HTTP/1.0 call needs no host on a listener with `to`");
    mesh.ended("ok", 3).await;
    mesh.stop().await;
}

/// Reads until the connection ends: what came, and how it ended.
async fn to_the_end(mut wire: Wire) -> (String, std::io::Result<usize>) {
    let mut all = Vec::new();
    let end = timeout(SOON, wire.stream.read_to_end(&mut all)).await.expect("it never ends");
    (String::from_utf8_lossy(&all).into_owned(), end)
}

#[tokio::test]
async fn an_http10_caller_cannot_take_a_cut_body_for_a_whole_one() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        let is_slow = wire.head().await.contains("/slow");
        wire.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n").await;
        if is_slow {
            wire.rest().await;
        }
    })
    .await;
    let more = "    protocol: http1\n    timeouts: { request: 300ms }";
    for (path, outcome) in [("/slow", "request_timeout"), ("/breaks", "upstream_cut")] {
        let mesh = Mesh::start(&policy(upstream.addr, more)).await;
        let mut wire = Wire::open(mesh.addr("in")).await;
        wire.send(format!("GET {path} HTTP/1.0\r\nhost: shop.test\r\n\r\n")).await;
        let (answer, end) = to_the_end(wire).await;
        assert!(answer.ends_with("\r\n\r\nabc"), "{path}: {answer:?}");
        assert_eq!(end.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset), "{path}");
        assert_eq!(mesh.only(outcome).await["bytes_out"], 3);
        mesh.stop().await;
    }
    let upstream = Upstream::endless("text/plain").await;
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("GET / HTTP/1.0\r\nhost: shop.test\r\n\r\n").await;
    mesh.only("caller_timeout").await;
    assert_eq!(to_the_end(wire).await.1.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
    mesh.stop().await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let upstream = paths().await;
    let mesh = mesh(&upstream).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    let all: String = (0..20).map(|n| format!("GET /n{n} HTTP/1.1\r\nhost: shop.test\r\n\r\n")).collect();
    wire.send(all).await;
    for n in 0..20 {
        let answer = wire.until("0\r\n\r\n").await;
        assert!(answer.contains(&format!("/n{n}\r\n")), "{n}: {answer}");
    }
    mesh.ended("ok", 20).await;
    mesh.stop().await;
}

#[tokio::test]
async fn what_follows_connection_close_is_not_answered() {
    let upstream = paths().await;
    let mesh = mesh(&upstream).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("GET /1 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let answer = wire.rest().await;
    assert!(answer.contains("/1") && !answer.contains("/2"), "{answer}");
    assert!(answer.to_lowercase().contains("connection: close"), "{answer}");
    mesh.stop().await;
}

const EXPECTING: &str = "POST /put HTTP/1.1\r\nhost: shop.test\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n";

#[tokio::test]
async fn continue_comes_from_the_upstream() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        let head = wire.head().await.to_lowercase();
        assert!(head.contains("expect: 100-continue"), "{head}");
        wire.send("HTTP/1.1 100 Continue\r\n\r\n").await;
        wire.until("hello").await;
        wire.send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").await;
        wire.rest().await;
    })
    .await;
    let mesh = mesh(&upstream).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(EXPECTING).await;
    assert!(wire.head().await.starts_with("HTTP/1.1 100 "));
    wire.send("hello").await;
    assert!(wire.until("done").await.starts_with("HTTP/1.1 200 "));
    assert_eq!(mesh.only("ok").await["bytes_in"], 5);
    mesh.stop().await;
}

#[tokio::test]
async fn an_upstream_may_refuse_a_body_before_it_is_sent() {
    for refusal in ["401 Unauthorized", "417 Expectation Failed", "413 Content Too Large"] {
        let upstream = Upstream::bytes(move |stream| async move {
            let mut wire = Wire::over(stream);
            wire.head().await;
            wire.send(format!("HTTP/1.1 {refusal}\r\ncontent-length: 2\r\n\r\nno")).await;
            wire.rest().await;
        })
        .await;
        let mesh = mesh(&upstream).await;
        let mut wire = Wire::open(mesh.addr("in")).await;
        wire.send(EXPECTING).await;
        let head = wire.head().await;
        assert!(head.starts_with(&format!("HTTP/1.1 {}", &refusal[..3])), "{head}");
        wire.until("no").await;
        let line = mesh.only("client_error").await;
        assert_eq!(line["bytes_in"], 0, "{line}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_upstream_that_says_nothing_to_expect_gets_the_body_after_a_while() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        wire.head().await;
        wire.until("hello").await;
        wire.send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").await;
        wire.rest().await;
    })
    .await;
    // In time for the try, too.
    for (limits, held) in [("", 900), ("    timeouts: { request: 5s, perTry: 980ms }\n    retry: off", 450)] {
        let mesh = Mesh::start(&policy(upstream.addr, limits)).await;
        let mut wire = Wire::open(mesh.addr("in")).await;
        let begun = Instant::now();
        wire.send(EXPECTING).await;
        assert!(wire.head().await.starts_with("HTTP/1.1 100 "));
        let waited = begun.elapsed();
        assert!(waited >= Duration::from_millis(held), "it was not asked of the upstream: {waited:?}");
        wire.send("hello").await;
        wire.until("done").await;
        mesh.ended("ok", 1).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_body_that_has_come_is_not_held_back_from_the_next_try() {
    let tries = AtomicUsize::new(0);
    let upstream = Upstream::bytes(move |stream| {
        let is_first = tries.fetch_add(1, SeqCst) == 0;
        async move {
            let mut wire = Wire::over(stream);
            let head = wire.head().await.to_lowercase();
            assert_eq!(head.contains("expect:"), is_first, "{head}");
            if is_first {
                wire.send("HTTP/1.1 100 Continue\r\n\r\n").await;
            }
            wire.until("hello").await;
            let status = if is_first { 503 } else { 200 };
            wire.send(format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: 4\r\n\r\ndone")).await;
            wire.rest().await;
        }
    })
    .await;
    let mesh = Mesh::start(&behind_a_caller(&[upstream.addr], "", "    timeouts: { request: 5s }")).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(EXPECTING.replace("POST", "PUT")).await;
    assert!(wire.head().await.starts_with("HTTP/1.1 100 "));
    wire.send("hello").await;
    // The second try has no `Expect`, and its body comes although the upstream never asks for it.
    assert!(wire.until("done").await.starts_with("HTTP/1.1 200 "));
    let line = mesh.only("ok").await;
    assert_eq!((&line["attempt"], &line["bytes_in"]), (&2.into(), &5.into()), "{line}");
    assert_eq!(mesh.metric("hopguard_retries_total", &["app"]), 1.0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_caller_that_does_not_wait_for_continue_is_served() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        wire.head().await;
        wire.send("HTTP/1.1 100 Continue\r\n\r\n").await;
        wire.until("hello").await;
        wire.send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").await;
        wire.rest().await;
    })
    .await;
    let mesh = mesh(&upstream).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(format!("{EXPECTING}hello")).await;
    let answer = wire.until("done").await;
    assert!(answer.contains("HTTP/1.1 200 "), "{answer}");
    mesh.stop().await;
}

#[tokio::test]
async fn an_answer_that_ends_with_its_connection_is_whole() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        wire.head().await;
        wire.send("HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nall of it").await;
    })
    .await;
    let mesh = mesh(&upstream).await;
    for _ in 0..3 {
        let answer = get(mesh.addr("in"), "/").await;
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"all of it"[..]));
    }
    assert_eq!(upstream.connections(), 3);
    mesh.ended("ok", 3).await;
    mesh.stop().await;
}

#[tokio::test]
async fn an_upstream_that_talks_rubbish_is_a_502() {
    for rubbish in ["SSH-2.0-OpenSSH_9.2\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello"]
    {
        let upstream = Upstream::bytes(move |stream| async move {
            let mut wire = Wire::over(stream);
            wire.head().await;
            wire.send(rubbish).await;
            wire.rest().await;
        })
        .await;
        let mesh = mesh(&upstream).await;
        let answer = get(mesh.addr("in"), "/").await;
        assert_eq!(answer.status, 502, "{answer:?}");
        assert_eq!(answer.problem()["refusal"], "upstream_protocol");
        assert_eq!(mesh.only("upstream_protocol").await["status"], 502);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_upstream_that_hangs_up_is_a_502() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        wire.head().await;
    })
    .await;
    let mesh = mesh(&upstream).await;
    let asked = request("POST", "/").body(full("x")).unwrap();
    let answer = ask(mesh.addr("in"), asked).await;
    assert_eq!((answer.status.as_u16(), answer.problem()["refusal"].as_str()), (502, Some("upstream_reset")));
    let line = mesh.only("upstream_reset").await;
    assert_eq!(line["refusal"]["closed_by"], "upstream", "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn an_early_hint_does_not_disturb_the_answer() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        loop {
            wire.head().await;
            wire.send("HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n").await;
            wire.send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").await;
        }
    })
    .await;
    let mesh = mesh(&upstream).await;
    for _ in 0..3 {
        assert_eq!(get(mesh.addr("in"), "/").await.body, "done");
    }
    let old = raw(mesh.addr("in"), b"GET / HTTP/1.0\r\nhost: a\r\n\r\n").await;
    assert!(!old.contains("103"), "an HTTP/1.0 caller knows no interim answers: {old}");
    mesh.ended("ok", 4).await;
    assert_eq!(upstream.connections(), 1);
    mesh.stop().await;
}

#[tokio::test]
async fn what_an_upstream_says_unasked_is_never_an_answer() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        wire.head().await;
        let right = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nright";
        wire.send(format!("{right}HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong")).await;
        wire.rest().await;
    })
    .await;
    let mesh = mesh(&upstream).await;
    for _ in 0..5 {
        assert_eq!(get(mesh.addr("in"), "/").await.body, "right");
    }
    assert_eq!(upstream.connections(), 5);
    mesh.stop().await;
}

#[tokio::test]
async fn an_answer_with_an_endless_head_is_a_502() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        wire.head().await;
        wire.send("HTTP/1.1 200 OK\r\n").await;
        wire.send(format!("x-large: {}\r\n", "x".repeat(1 << 20))).await;
        wire.rest().await;
    })
    .await;
    let mesh = mesh(&upstream).await;
    let answer = get(mesh.addr("in"), "/").await;
    assert_eq!((answer.status.as_u16(), answer.problem()["refusal"].as_str()), (502, Some("upstream_protocol")));
    mesh.only("upstream_protocol").await;
    mesh.stop().await;
}
