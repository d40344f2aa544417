//! Message completeness: when a response counts as complete, which side an incomplete exchange is attributed to (client,
//! upstream or next hop), and that every timeout applies while bytes move.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::time::{Instant, sleep, timeout};

use crate::support::http::{Caller, Http1, Speaks, empty, feed, full, get, grpc, grpc_request, with_trailers};
use crate::support::upstream::{Upstream, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, SOON, eventually};

const BOTH: [Speaks; 2] = [Speaks::Http1, Speaks::Http2];

/// The policy whose destination speaks HTTP/2 if `http2`.
async fn mesh(upstream: &Upstream, http2: bool, more: &str) -> Mesh {
    let protocol = if http2 { "http2" } else { "http1" };
    Mesh::start(&policy(upstream.addr, &format!("    protocol: {protocol}\n{more}"))).await
}

/// An upstream over HTTP/2 that says how long its answer is, sends it, and only then says that this was all. `/bad` is a 503.
async fn late_end() -> Upstream {
    Upstream::http2(|request: Request<Incoming>| async move {
        let (pieces, body) = feed();
        let (is_head, is_bad) = (request.method() == "HEAD", request.uri().path() == "/bad");
        tokio::spawn(async move {
            let _taken = is_head || pieces.send("hello").await;
            sleep(Duration::from_millis(50)).await;
        });
        let status = if is_bad { 503 } else { 200 };
        Response::builder().status(status).header("content-length", "5").body(body).unwrap()
    })
    .await
}

#[tokio::test]
async fn an_answer_of_known_length_is_whole_when_its_last_byte_was_taken() {
    let upstream = late_end().await;
    for method in ["GET", "HEAD"] {
        let mesh = mesh(&upstream, true, "").await;
        let mut caller = Caller::open(Speaks::Http1, mesh.addr("in")).await;
        for _ in 0..3 {
            let answer = caller.ask(Request::builder().method(method).uri("/").body(empty()).unwrap()).await;
            assert_eq!((answer.status.as_u16(), answer.header("content-length")), (200, "5"));
        }
        mesh.ended("ok", 3).await;
        assert_eq!(mesh.count("caller_gone"), 0.0);
        eventually(|| (mesh.metric("hopguard_in_flight_requests", &["app"]) == 0.0).then_some(())).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn such_an_answer_closes_an_open_breaker() {
    let upstream = late_end().await;
    let mesh = mesh(&upstream, true, "    retry: off\n    circuitBreaker: { openFor: 1s }").await;
    for _ in 0..5 {
        assert_eq!(get(mesh.addr("in"), "/bad").await.status, 503);
    }
    assert_eq!(get(mesh.addr("in"), "/").await.status, 503, "it is open");
    let begun = Instant::now();
    while mesh.metric("hopguard_circuit_breaker_state", &["app"]) != 0.0 {
        get(mesh.addr("in"), "/").await;
        assert!(begun.elapsed() < SOON, "it stays open");
        sleep(Duration::from_millis(20)).await;
    }
    mesh.stop().await;
}

#[tokio::test]
async fn trailers_end_an_answer_and_leave_the_connection_for_the_next() {
    let upstream =
        Upstream::http1(|_| async move { Response::new(with_trailers("hello", &[("x-checksum", "7")])) }).await;
    for speaks in BOTH {
        let before = upstream.connections();
        let mesh = mesh(&upstream, false, "").await;
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        for _ in 0..3 {
            let asked = Request::get("/").header("te", "trailers").body(empty()).unwrap();
            let answer = caller.ask(asked).await;
            assert_eq!(answer.body, "hello");
        }
        mesh.ended("ok", 3).await;
        assert_eq!(upstream.connections() - before, 1, "{speaks:?}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn limits_hold_while_the_caller_reads_on_and_on() {
    let upstream = Upstream::endless("text/plain").await;
    for (more, outcome, rule, limit) in [
        (
            // Long enough that a caller on a busy machine is not taken for one that stopped reading: that is a tenth of it.
            "    timeouts: { request: 3s }\n    circuitBreaker: { consecutiveFailures: 1 }",
            "request_timeout",
            "timeouts.request",
            Duration::from_secs(3),
        ),
        (
            "    timeouts: { maxDuration: 500ms }\n    routes: [ { name: all, match: { path: / }, stream: true } ]",
            "max_duration",
            "timeouts.maxDuration",
            Duration::from_millis(500),
        ),
    ] {
        for speaks in BOTH {
            let mesh = mesh(&upstream, false, more).await;
            let mut caller = Caller::open(speaks, mesh.addr("in")).await;
            let begun = Instant::now();
            let mut body = caller.send(Request::get("/").body(empty()).unwrap()).await.unwrap().into_body();
            let end = timeout(SOON, async {
                loop {
                    match body.frame().await {
                        Some(Ok(_)) => {}
                        end => return end,
                    }
                }
            });
            assert!(end.await.expect("it never ends").is_some_and(|end| end.is_err()), "a cut must be seen");
            assert!(begun.elapsed() >= limit, "{:?}", begun.elapsed());
            let line = mesh.only(outcome).await;
            assert_eq!(line["refusal"]["rule"], rule, "{line}");
            // The upstream had more to give all the time.
            assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &["state=\"open\""]), 0.0);
            mesh.stop().await;
        }
    }
}

#[tokio::test]
async fn what_has_come_of_an_answer_that_breaks_off_reaches_the_caller() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        wire.head().await;
        wire.send("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc").await;
    })
    .await;
    for speaks in BOTH {
        let mesh = mesh(&upstream, false, "    circuitBreaker: off\n    ejection: off").await;
        for _ in 0..100 {
            let mut caller = Caller::open(speaks, mesh.addr("in")).await;
            let answer = caller.send(Request::get("/").body(empty()).unwrap()).await;
            let answer = answer.unwrap_or_else(|error| panic!("{speaks:?}: not even the head came: {error}"));
            let (status, mut body, mut came) = (answer.status(), answer.into_body(), Vec::new());
            while let Some(Ok(frame)) = timeout(SOON, body.frame()).await.expect("it never ends") {
                came.extend_from_slice(frame.data_ref().unwrap());
            }
            assert_eq!((status.as_u16(), came.as_slice()), (200, &b"abc"[..]), "{speaks:?}");
        }
        mesh.ended("upstream_cut", 100).await;
        eventually(|| (mesh.log().len() == 100).then_some(())).await;
        assert!(mesh.log().iter().all(|line| line.contains("\"bytes_out\":3")), "{:#?}", mesh.log());
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_stream_on_which_only_the_caller_speaks_is_not_idle() {
    let upstream = Upstream::http1(|request: Request<Incoming>| async move {
        let (pieces, body) = feed();
        tokio::spawn(async move {
            pieces.send("begun").await;
            let _all = request.into_body().collect().await;
            pieces.send(" over").await;
        });
        Response::new(body)
    })
    .await;
    let more = "    timeouts: { idle: 400ms }\n    routes: [ { name: all, match: { path: / }, stream: true } ]";
    for speaks in BOTH {
        let mesh = mesh(&upstream, false, more).await;
        let (pieces, body) = feed();
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let sending = tokio::spawn(async move {
            for _ in 0..12 {
                assert!(pieces.send("more").await);
                sleep(Duration::from_millis(100)).await;
            }
        });
        let answer = caller.ask(Request::post("/").body(body).unwrap()).await;
        assert_eq!(answer.body, "begun over", "{speaks:?}");
        sending.await.unwrap();
        mesh.ended("ok", 1).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_caller_that_leaves_during_its_body_has_left_and_did_nothing_wrong() {
    let upstream = Upstream::http1(|request: Request<Incoming>| async move {
        let _whole = request.into_body().collect().await;
        Response::new(full("got it"))
    })
    .await;
    for speaks in BOTH {
        let mesh = mesh(&upstream, false, "").await;
        let seen = upstream.requests();
        let (pieces, body) = feed();
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let call = tokio::spawn(async move { caller.send(Request::post("/").body(body).unwrap()).await.map(drop) });
        assert!(pieces.send("first").await);
        eventually(|| (upstream.requests() > seen).then_some(())).await;
        call.abort();
        let line = mesh.only("caller_gone").await;
        assert!(line["refusal"].is_null() && line["status"].is_null(), "{speaks:?}: {line}");
        mesh.stop().await;
    }
    // One that sends what cannot be read is still told so.
    let mesh = mesh(&upstream, false, "").await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("POST / HTTP/1.1\r\nhost: shop.test\r\ntransfer-encoding: chunked\r\n\r\nnone\r\n").await;
    assert!(wire.rest().await.starts_with("HTTP/1.1 400 "));
    mesh.only("bad_request").await;
    mesh.stop().await;
}

/// Begins its answer with `hello` and reads on until the caller's body has an end.
async fn early(http2: bool) -> Upstream {
    let handler = |request: Request<Incoming>| async move {
        let (pieces, body) = feed();
        tokio::spawn(async move {
            pieces.send("hello").await;
            let _all = request.into_body().collect().await;
        });
        Response::new(body)
    };
    Upstream::on("127.0.0.1:0".parse().unwrap(), handler, http2).await
}

#[tokio::test]
async fn a_caller_that_leaves_during_its_body_has_left_also_where_the_answer_has_begun() {
    for http2 in [false, true] {
        let upstream = early(http2).await;
        for speaks in BOTH {
            let mesh = mesh(&upstream, http2, "    circuitBreaker: { consecutiveFailures: 1 }").await;
            let (pieces, body) = feed();
            let mut caller = Caller::open(speaks, mesh.addr("in")).await;
            assert!(pieces.send("first").await);
            let mut answer = caller.send(Request::post("/").body(body).unwrap()).await.unwrap();
            assert_eq!(answer.body_mut().frame().await.unwrap().unwrap().into_data().unwrap(), "hello");
            // Without an end of the body: behind it, a caller that closes its sending side could wait for the response.
            let _unended = (speaks == Speaks::Http1).then_some(pieces);
            drop((answer, caller));
            let line = mesh.only("caller_gone").await;
            assert!(line["refusal"].is_null(), "{http2} {speaks:?}: {line}");
            assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &[]), 0.0, "{http2} {speaks:?}");
            mesh.stop().await;
        }
        // One that sends what cannot be read is the cause as well; it sees its answer cut.
        let mesh = mesh(&upstream, http2, "    circuitBreaker: { consecutiveFailures: 1 }").await;
        let mut wire = Wire::open(mesh.addr("in")).await;
        wire.send("POST / HTTP/1.1\r\nhost: shop.test\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n").await;
        wire.until("hello").await;
        wire.send("none\r\n").await;
        assert!(!wire.rest().await.contains("0\r\n\r\n"));
        mesh.only("bad_request").await;
        assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &[]), 0.0, "{http2}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_grpc_message_that_the_upstream_does_not_read_makes_no_stream() {
    let upstream = Upstream::http2(|request: Request<Incoming>| async move {
        let _unread = request;
        std::future::pending::<()>().await;
        unreachable!()
    })
    .await;
    let mesh = mesh(&upstream, true, "    timeouts: { request: 2s, idle: 30s }").await;
    let mut message = vec![0, 0, 0x40, 0, 0];
    message.resize(5 + 0x40_0000, b'x');
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    let answer = caller.ask(grpc_request("/shop.v1.Payment/Charge", full(message))).await;
    assert_eq!(answer.grpc_status(), "4", "{answer:?}");
    mesh.only("request_timeout").await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_fault_that_delays_a_grpc_call_meets_its_timeout() {
    let upstream = Upstream::http2(|_| async { Response::new(empty()) }).await;
    let more =
        "    timeouts: { request: 300ms }\n    faults: [ { name: slow, delay: 1m, until: 2090-01-01T00:00:00Z } ]";
    let mesh = mesh(&upstream, true, more).await;
    assert_eq!(grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await.grpc_status(), "4");
    mesh.only("request_timeout").await;
    mesh.stop().await;
}

#[tokio::test]
async fn an_answer_that_is_no_grpc_counts_against_its_upstream() {
    let upstream = Upstream::http2(|_| async {
        Response::builder().header("content-type", "text/html").body(full("<p>lost")).unwrap()
    })
    .await;
    let mesh = mesh(&upstream, true, "    retry: off").await;
    for _ in 0..5 {
        assert_eq!(grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await.grpc_status(), "2");
    }
    assert_eq!(grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await.grpc_status(), "14");
    mesh.only("circuit_open").await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_grpc_answer_without_a_status_counts_against_its_upstream() {
    for message in ["", "\0\0\0\0\0"] {
        let upstream = Upstream::http2(move |_| async move {
            Response::builder().header("content-type", "application/grpc").body(full(message)).unwrap()
        })
        .await;
        let mesh = mesh(&upstream, true, "    retry: off").await;
        for _ in 0..5 {
            assert_eq!(grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await.grpc_status(), "");
        }
        mesh.ended("grpc_error", 5).await;
        assert_eq!(grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await.grpc_status(), "14", "{message:?}");
        mesh.only("circuit_open").await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_grpc_answer_ends_with_its_trailers_whatever_length_it_gives() {
    let upstream = Upstream::http2(|_| async {
        let answer = Response::builder().header("content-type", "application/grpc").header("content-length", "0");
        answer.body(with_trailers("", &[("grpc-status", "5")])).unwrap()
    })
    .await;
    let mesh = mesh(&upstream, true, "").await;
    assert_eq!(grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await.grpc_status(), "5");
    mesh.ended("grpc_error", 1).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_refusal_in_http_of_a_grpc_call_is_judged_as_what_it_was() {
    let upstream = Upstream::http2(|_| async { Response::builder().status(431).body(empty()).unwrap() }).await;
    let mesh = mesh(&upstream, true, "    retry: off").await;
    for _ in 0..12 {
        assert_eq!(grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await.grpc_status(), "13");
    }
    assert_eq!(mesh.count("circuit_open"), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn an_answer_that_cannot_be_passed_on_counts_against_its_upstream() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        wire.head().await;
        wire.send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n").await;
    })
    .await;
    let mesh = mesh(&upstream, false, "    retry: off").await;
    for _ in 0..5 {
        assert_eq!(get(mesh.addr("in"), "/").await.status, 502);
    }
    assert_eq!(get(mesh.addr("in"), "/").await.status, 503);
    mesh.only("circuit_open").await;
    mesh.stop().await;
}

#[tokio::test]
async fn slow_readers_hold_up_nobody_else_on_the_same_upstream_connection() {
    let upstream = Upstream::http2(|request: Request<Incoming>| async move {
        let large = request.uri().path() == "/large";
        Response::new(if large { full(vec![b'x'; 8 << 20]) } else { full("small") })
    })
    .await;
    let mesh = mesh(&upstream, true, "    timeouts: { request: 5s }").await;
    let mut slow = Vec::new();
    for _ in 0..24 {
        let mut caller = Http1::open(mesh.addr("in")).await;
        let asked = crate::support::http::request("GET", "/large").body(empty()).unwrap();
        slow.push((caller.send(asked).await.unwrap(), caller));
    }
    for _ in 0..20 {
        let answer = timeout(SOON, get(mesh.addr("in"), "/small")).await.expect("held up");
        assert_eq!(answer.body, "small");
    }
    assert_eq!(upstream.connections(), 1);
    drop(slow);
    mesh.stop().await;
}

#[tokio::test]
async fn a_connection_is_idle_after_an_answer_of_our_own() {
    let upstream = Upstream::fixed("hello").await;
    let text = policy(upstream.addr, "").replace("to: app }", "to: app, timeouts: { headers: 200ms, idle: 700ms } }");
    let mesh = Mesh::start(&text).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("GET / HTTP/1.1\r\nhost: shop.test\r\n\r\n").await;
    wire.until("hello").await;
    wire.send("OPTIONS / HTTP/1.1\r\nhost: shop.test\r\nmax-forwards: 0\r\n\r\n").await;
    assert!(wire.head().await.starts_with("HTTP/1.1 200 "));
    let begun = Instant::now();
    assert_eq!(wire.rest().await, "", "nobody has begun a request that could be late");
    assert!(begun.elapsed() >= Duration::from_millis(600), "{:?}", begun.elapsed());
    assert_eq!(mesh.count("caller_timeout"), 0.0);
    mesh.stop().await;
}

/// Answers calls over HTTP/2 as the path says: `/late` with a reset after the first message, `/reset` and `/refuse`
/// with one at once.
async fn resetting(seen: Arc<AtomicUsize>) -> Upstream {
    Upstream::bytes(move |stream| {
        let seen = Arc::clone(&seen);
        async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut answer))) = connection.accept().await {
                seen.fetch_add(1, SeqCst);
                let head = || Response::builder().header("content-type", "application/grpc").body(()).unwrap();
                match request.uri().path() {
                    "/reset" => answer.send_reset(Reason::INTERNAL_ERROR),
                    "/refuse" => answer.send_reset(Reason::REFUSED_STREAM),
                    "/shop.v1.Payment/Late" => {
                        let mut body = answer.send_response(head(), false).unwrap();
                        body.send_data(Bytes::from_static(b"\0\0\0\0\0"), false).unwrap();
                        tokio::spawn(async move {
                            sleep(Duration::from_millis(100)).await;
                            body.send_reset(Reason::INTERNAL_ERROR);
                        });
                    }
                    _ => drop(answer.send_response(Response::new(()), true).unwrap()),
                }
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_grpc_answer_that_breaks_off_bears_the_mark_of_where_it_did() {
    let upstream = resetting(Arc::default()).await;
    let text = policy(upstream.addr, "    protocol: http2").replace("to: app }", "to: app, direction: outbound }");
    let mesh = Mesh::start(&text).await;
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Late").await;
    assert_eq!(answer.grpc_status(), "14", "{answer:?}");
    let said =
        answer.trailers.as_ref().and_then(|fields| fields.get("proxy-status")).map(|value| value.to_str().unwrap());
    assert!(said.is_some_and(|said| said.contains("hopguard-at=\"app\"")), "{answer:?}");
    mesh.only("upstream_cut").await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_connection_that_is_closed_before_http2_has_begun_carried_nothing() {
    let refused = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&refused);
    let upstream = Upstream::bytes(move |stream| {
        let first = count.fetch_add(1, SeqCst) == 0;
        async move {
            if first {
                // The end comes as RST, as from a process that has gone.
                let _set = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                return drop(stream);
            }
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((_, mut answer))) = connection.accept().await {
                let head = Response::builder().header("content-type", "application/grpc").header("grpc-status", "0");
                drop(answer.send_response(head.body(()).unwrap(), true).unwrap());
            }
        }
    })
    .await;
    let text = policy(upstream.addr, "    protocol: http2").replace("to: app }", "to: app, direction: outbound }");
    let mesh = Mesh::start(&text).await;
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
    assert_eq!(answer.grpc_status(), "0", "{answer:?}");
    let line = mesh.only("ok").await;
    assert_eq!(line["attempt"], 2, "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn before_the_app_only_a_connection_that_closes_is_a_reason_to_send_again() {
    let seen = Arc::<AtomicUsize>::default();
    let upstream = resetting(Arc::clone(&seen)).await;
    let mesh = mesh(&upstream, true, "").await;
    assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
    assert_eq!(get(mesh.addr("in"), "/reset").await.status, 502);
    assert_eq!((seen.load(SeqCst), upstream.connections()), (2, 1), "the app has reset a stream, and no connection");
    mesh.stop().await;

    let other = resetting(Arc::clone(&seen)).await;
    let two = format!("\"{}\", \"{}\"", upstream.addr, other.addr);
    let text = policy(upstream.addr, "    protocol: http2").replace(&format!("\"{}\"", upstream.addr), &two);
    for text in [text, policy(upstream.addr, "    protocol: http2")] {
        let mesh = Mesh::start(&text).await;
        seen.store(0, SeqCst);
        assert_eq!(get(mesh.addr("in"), "/refuse").await.status, 502);
        assert_eq!(seen.load(SeqCst), 1, "the app has refused a stream: the caller's hopguard has other endpoints");
        assert_eq!(mesh.only("upstream_reset").await["retry_withheld"], "at_the_caller");
        assert_eq!(mesh.metric("hopguard_retries_total", &["app"]), 0.0);
        mesh.stop().await;
    }

    let asked = Arc::clone(&seen);
    let upstream = Upstream::bytes(move |stream| {
        let asked = Arc::clone(&asked);
        async move {
            let mut wire = Wire::over(stream);
            for answer in ["HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "HTTP/1.1 what\r\n\r\n"] {
                wire.head().await;
                asked.fetch_add(1, SeqCst);
                wire.send(answer).await;
            }
        }
    })
    .await;
    let mesh = self::mesh(&upstream, false, "").await;
    seen.store(0, SeqCst);
    assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
    assert_eq!(get(mesh.addr("in"), "/").await.status, 502);
    assert_eq!(seen.load(SeqCst), 2, "the app has answered");
    mesh.stop().await;
}
