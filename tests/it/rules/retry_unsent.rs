//! Retries of requests that the upstream could not have processed: the keep-alive race, refused HTTP/2 streams, GOAWAY, and
//! endpoints that are down.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use hyper::Response;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::bank::{Bank, Say, behind_a_caller};
use crate::support::http::{Answer, Http1, ask, empty, full, get, request};
use crate::support::upstream::{Upstream, nobody, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

/// Answers; closes its first connection when the second request over it has arrived. Counts requests.
async fn racing() -> (Upstream, Arc<AtomicUsize>) {
    let (requests, connections) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
    let seen = Arc::clone(&requests);
    let upstream = Upstream::bytes(move |stream| {
        let (seen, closes) = (Arc::clone(&seen), connections.fetch_add(1, SeqCst) == 0);
        async move {
            let mut wire = Wire::over(stream);
            for turn in 0.. {
                let head = wire.head().await;
                if head.starts_with("POST") {
                    wire.until("pay 5").await;
                }
                seen.fetch_add(1, SeqCst);
                if closes && turn == 1 {
                    return;
                }
                wire.send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await;
            }
        }
    })
    .await;
    (upstream, requests)
}

/// Meets the race with one request; the answer, and how often the upstream saw it.
async fn race(mesh: &Mesh, requests: &AtomicUsize, method: &str, key: bool) -> (Answer, usize) {
    let mut caller = Http1::open(mesh.addr("in")).await;
    assert_eq!(caller.ask(request("GET", "/first").body(empty()).unwrap()).await.status, 200);
    let body = if method == "POST" { full("pay 5") } else { empty() };
    let mut sent = request(method, "/second").body(body).unwrap();
    if key {
        sent.headers_mut().insert("idempotency-key", "\"7\"".parse().unwrap());
    }
    let answer = caller.ask(sent).await;
    (answer, requests.load(SeqCst) - 1)
}

#[tokio::test]
async fn a_kept_connection_that_closes_under_a_get_is_no_error_on_either_side_of_the_app() {
    for inbound in [false, true] {
        for (off, tries) in [(false, 2), (true, 1)] {
            let (upstream, requests) = racing().await;
            let more = if off { "    retry: off" } else { "" };
            let written =
                if inbound { policy(upstream.addr, more) } else { behind_a_caller(&[upstream.addr], "", more) };
            let mesh = Mesh::start(&written).await;
            let (answer, seen) = race(&mesh, &requests, "GET", false).await;
            assert_eq!(seen, tries, "{answer:?}");
            if off {
                assert_eq!(answer.status, 502, "{answer:?}");
                mesh.only("upstream_reset").await;
            } else {
                assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"hello"[..]), "{answer:?}");
                mesh.ended("ok", 2).await;
            }
            assert_eq!(mesh.metric("hopguard_retries_total", &["app"]), tries as f64 - 1.0);
            mesh.stop().await;
        }
    }
}

#[tokio::test]
async fn a_post_that_the_upstream_may_have_seen_is_not_sent_again_and_its_error_says_so() {
    let (upstream, requests) = racing().await;
    let mesh = Mesh::start(&behind_a_caller(&[upstream.addr], "", "")).await;
    let (answer, seen) = race(&mesh, &requests, "POST", false).await;
    assert_eq!((answer.status.as_u16(), seen), (502, 1), "{answer:?}");
    let problem = answer.problem();
    assert!(problem["detail"].as_str().unwrap().contains("over a reused connection"), "{problem}");
    assert_eq!(problem["notRetried"], "not_safe", "{problem}");
    let line = mesh.only("upstream_reset").await;
    assert_eq!((&line["retry_withheld"], &line["connection"]), (&"not_safe".into(), &"reused".into()), "{line}");
    assert_eq!(mesh.metric("hopguard_retries_withheld_total", &["reason=\"not_safe\""]), 1.0);
    assert_eq!(mesh.metric("hopguard_retries_total", &["app"]), 0.0);
    mesh.stop().await;
    // With a key, the same POST may be seen twice.
    let (upstream, requests) = racing().await;
    let mesh = Mesh::start(&behind_a_caller(&[upstream.addr], "", "")).await;
    let (answer, seen) = race(&mesh, &requests, "POST", true).await;
    assert_eq!((answer.status.as_u16(), seen), (200, 2), "{answer:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn before_the_app_a_post_goes_over_a_connection_that_cannot_be_closing() {
    // Where the policy says that it may be sent twice, it takes what is there, loses the race, and is sent again.
    for (more, tries) in [("", 1), ("    retry: { idempotent: true }", 2)] {
        let (upstream, requests) = racing().await;
        let mesh = Mesh::start(&policy(upstream.addr, more)).await;
        let (answer, seen) = race(&mesh, &requests, "POST", false).await;
        assert_eq!((answer.status.as_u16(), seen), (200, tries), "{answer:?}");
        mesh.ended("ok", 2).await;
        assert_eq!(mesh.metric("hopguard_retries_total", &["app"]), tries as f64 - 1.0);
        if tries == 1 {
            eventually(|| (mesh.log().len() == 2).then_some(())).await;
            assert!(mesh.log().iter().all(|line| line.contains("\"connection\":\"new\"")), "{:#?}", mesh.log());
            assert_eq!(mesh.metric("hopguard_pool_connects_total", &["app"]), 2.0);
            assert_eq!(mesh.metric("hopguard_pool_open_connections", &["app"]), 1.0, "the idle one makes room");
        }
        mesh.stop().await;
    }
}

/// An HTTP/2 upstream whose first connection refuses the first stream: with RST_STREAM, or with a GOAWAY that leaves it
/// out. Counts the requests that it works on.
async fn refusing(goaway: bool) -> (Upstream, Arc<AtomicUsize>) {
    let (requests, connections) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
    let worked = Arc::clone(&requests);
    let upstream = Upstream::bytes(move |stream| {
        let (worked, first) = (Arc::clone(&worked), connections.fetch_add(1, SeqCst) == 0);
        async move {
            if first {
                return refuse(stream, goaway).await;
            }
            let service = service_fn(move |_| {
                worked.fetch_add(1, SeqCst);
                async { Ok::<_, std::convert::Infallible>(Response::new(full("hello"))) }
            });
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ended = builder.serve_connection(TokioIo::new(stream), service).await;
        }
    })
    .await;
    (upstream, requests)
}

/// Speaks just enough of HTTP/2 (RFC 9113, 4.1) to refuse a stream and to close.
async fn refuse(mut stream: TcpStream, goaway: bool) {
    const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
    const ACKNOWLEDGED: &[u8] = b"\0\0\0\x04\x01\0\0\0\0";
    const GOAWAY: &[u8] = b"\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\0";
    stream.write_all(SETTINGS).await.unwrap();
    let mut preface = [0; 24];
    stream.read_exact(&mut preface).await.unwrap();
    let mut head = [0; 9];
    while stream.read_exact(&mut head).await.is_ok() {
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        let answer = match head[3] {
            4 if head[4] == 0 => ACKNOWLEDGED.to_vec(),
            1 if goaway => GOAWAY.to_vec(),
            1 => [b"\0\0\x04\x03\0", &head[5..], b"\0\0\0\x07", GOAWAY].concat(),
            _ => continue,
        };
        stream.write_all(&answer).await.unwrap();
    }
}

#[tokio::test]
async fn a_stream_that_was_refused_is_sent_again_whatever_its_method() {
    for goaway in [false, true] {
        for (rules, is_on) in [("", true), ("retry: off", false)] {
            let (upstream, worked) = refusing(goaway).await;
            let mesh = Mesh::start(&behind_a_caller(&[upstream.addr], rules, "    protocol: http2")).await;
            let answer = ask(mesh.addr("in"), request("POST", "/").body(full("pay 5")).unwrap()).await;
            assert_eq!(worked.load(SeqCst), usize::from(is_on), "goaway {goaway}: {answer:?}");
            if is_on {
                assert_eq!(answer.status, 200, "{answer:?}");
                assert_eq!(mesh.only("ok").await["attempt"], 2);
                // At once only over a new connection; a stream that was refused waits where there is nobody else.
                let reason = if goaway { "reason=\"unsent\"" } else { "reason=\"failed\"" };
                assert_eq!(mesh.metric("hopguard_retries_total", &[reason]), 1.0);
            } else {
                assert_eq!(answer.status, 502, "{answer:?}");
                mesh.only("upstream_reset").await;
            }
            mesh.stop().await;
        }
    }
}

#[tokio::test]
async fn streams_that_are_always_refused_cost_no_more_than_the_budget() {
    for (goaway, endpoints) in [(false, 1), (false, 2), (true, 1)] {
        let mut upstreams = Vec::new();
        for _ in 0..endpoints {
            upstreams.push(Upstream::bytes(move |stream| refuse(stream, goaway)).await);
        }
        let addresses: Vec<_> = upstreams.iter().map(|upstream| upstream.addr).collect();
        let more = "    protocol: http2\n    circuitBreaker: off\n    ejection: off
    retry: { attempts: 5, backoff: { max: 1ms }, budget: { minPerSecond: 0 } }";
        let mesh = Mesh::start(&behind_a_caller(&addresses, "", more)).await;
        let calls = 30;
        for _ in 0..calls {
            let answer = ask(mesh.addr("in"), request("POST", "/").body(full("pay 5")).unwrap()).await;
            assert_eq!(answer.status, 502, "{answer:?}");
        }
        // Each connection refuses one stream. At once goes one more for each call, to the other endpoint or over the
        // connection that is said to be new; the bucket has ten tokens.
        let at_once = if goaway { calls } else { calls * (endpoints - 1) };
        let streams: usize = upstreams.iter().map(Upstream::connections).sum();
        assert_eq!(streams, calls + at_once + 10, "goaway {goaway}, {endpoints} endpoints");
        assert!(mesh.metric("hopguard_retries_withheld_total", &["reason=\"budget\""]) >= 10.0);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_call_that_the_app_has_left_aside_is_called_unsent_and_one_that_it_broke_off_is_not() {
    let more = "    protocol: http2\n    circuitBreaker: off\n    retry: { backoff: { max: 1ms } }";
    for goaway in [false, true] {
        let app = Upstream::bytes(move |stream| refuse(stream, goaway)).await;
        let mesh = Mesh::start(&policy(app.addr, more)).await;
        let answer = ask(mesh.addr("in"), request("POST", "/").body(full("pay 5")).unwrap()).await;
        assert_eq!(answer.status, 502, "{answer:?}");
        assert!(answer.header("proxy-status").contains(";hopguard-unsent"), "goaway {goaway}: {answer:?}");
        mesh.only("upstream_reset").await;
        mesh.stop().await;
    }
    let app = Bank::http2(&[Say::Reset]).await;
    let mesh = Mesh::start(&policy(app.addr(), more)).await;
    let answer = ask(mesh.addr("in"), request("POST", "/").body(full("pay 5")).unwrap()).await;
    assert_eq!((answer.status.as_u16(), app.tries()), (502, 1), "{answer:?}");
    assert!(!answer.header("proxy-status").contains("hopguard-unsent"), "{answer:?}");
    mesh.only("upstream_reset").await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_post_to_an_endpoint_that_is_down_goes_to_one_that_is_up() {
    let bank = Bank::http1(&[Say::Status(200)]).await;
    let mesh = Mesh::start(&behind_a_caller(&[nobody(), bank.addr()], "", "")).await;
    for number in 1..=6 {
        let answer = ask(mesh.addr("in"), request("POST", "/").body(full("pay 5")).unwrap()).await;
        assert_eq!((answer.status.as_u16(), bank.tries()), (200, number), "{answer:?}");
    }
    mesh.ended("ok", 6).await;
    mesh.stop().await;
    // With nobody else to go to, it says that it reached nobody.
    let mesh = Mesh::start(&behind_a_caller(&[nobody()], "", "")).await;
    let answer = get(mesh.addr("in"), "/").await;
    assert_eq!(answer.status, 502, "{answer:?}");
    assert_eq!(mesh.only("connect_failed").await["retry_withheld"], "tries_used_up");
    mesh.stop().await;
}
