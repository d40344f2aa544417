//! Header fields: end-to-end fields pass, hop-by-hop fields are removed, and hopguard adds its own (`Via`, `Date`).

use std::sync::{Arc, Mutex};

use hyper::body::Incoming;
use hyper::{HeaderMap, Request, Response};

use crate::support::http::{Answer, Caller, Speaks, ask, empty, full, request, with_trailers};
use crate::support::upstream::{Upstream, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

/// An upstream that remembers what it was sent.
async fn curious() -> (Upstream, Arc<Mutex<Vec<HeaderMap>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let heads = Arc::clone(&seen);
    let upstream = Upstream::http1(move |request: Request<Incoming>| {
        heads.lock().unwrap().push(request.headers().clone());
        async move {
            let answer = Response::builder()
                .header("connection", "x-private, keep-alive")
                .header("x-private", "1")
                .header("keep-alive", "timeout=5")
                .header("proxy-connection", "keep-alive")
                .header("x-public", "1")
                .header("set-cookie", "a=1")
                .header("set-cookie", "b=2");
            answer.body(full("hello")).unwrap()
        }
    })
    .await;
    (upstream, seen)
}

#[tokio::test]
async fn what_is_meant_for_this_hop_ends_here() {
    let (upstream, seen) = curious().await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let sent = request("GET", "/")
        .header("connection", "X-Private, close-later")
        .header("connection", "keep-alive")
        .header("x-private", "secret")
        .header("close-later", "1")
        .header("keep-alive", "timeout=9")
        .header("proxy-connection", "keep-alive")
        .header("te", "trailers, deflate")
        .header("x-public", "1")
        .header("x-public", "2");
    let answer: Answer = ask(mesh.addr("in"), sent.body(empty()).unwrap()).await;
    assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"hello"[..]));
    let head = seen.lock().unwrap().remove(0);
    for gone in ["x-private", "close-later", "keep-alive", "proxy-connection", "upgrade"] {
        assert!(!head.contains_key(gone), "{gone} reached the upstream: {head:?}");
    }
    assert!(head.get("te").is_none_or(|te| te == "trailers"), "{head:?}");
    assert_eq!(head.get_all("x-public").iter().collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!(head["host"], "shop.test");
    for gone in ["x-private", "keep-alive", "proxy-connection"] {
        assert!(!answer.headers.contains_key(gone), "{gone} reached the caller: {answer:?}");
    }
    assert_eq!(answer.headers.get_all("set-cookie").iter().count(), 2);
    assert_eq!(answer.header("x-public"), "1");
    mesh.stop().await;
}

#[tokio::test]
async fn via_says_what_was_received() {
    let (upstream, seen) = curious().await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
    for (speaks, version) in [(Speaks::Http1, "1.1"), (Speaks::Http2, "2.0")] {
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let asked = Request::get("/").header("via", "1.1 before").body(empty()).unwrap();
        let answer = caller.ask(asked).await;
        let head = seen.lock().unwrap().remove(0);
        let via: Vec<_> = head.get_all("via").iter().map(|value| value.to_str().unwrap()).collect();
        let via = via.join(", ");
        assert!(via.starts_with(&format!("1.1 before, {version} hopguard")), "{via}");
        assert!(answer.header("via").starts_with("1.1 hopguard"), "{answer:?}");
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_request_that_goes_round_in_circles_is_stopped() {
    let (upstream, seen) = curious().await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    mesh.reload(&policy(mesh.addr("in"), "")).await;
    let answer = ask(mesh.addr("in"), request("GET", "/").body(empty()).unwrap()).await;
    assert_eq!(answer.problem()["refusal"], "loop_detected");
    assert_eq!(answer.status, 502);
    assert!(answer.header("proxy-status").contains("proxy_loop_detected"), "{answer:?}");
    let line = mesh.only("loop_detected").await;
    assert_eq!(line["status"], 502, "{line}");
    eventually(|| (mesh.count("server_error") > 0.0).then_some(())).await;
    assert!(mesh.count("server_error") <= 10.0, "it went round {} times", mesh.count("server_error"));
    assert!(seen.lock().unwrap().is_empty());
    mesh.stop().await;
}

#[tokio::test]
async fn two_hopguards_in_a_row_are_no_loop() {
    let (upstream, seen) = curious().await;
    let inner = Mesh::start(&policy(upstream.addr, "")).await;
    let outer = Mesh::start(&policy(inner.addr("in"), "")).await;
    assert_eq!(ask(outer.addr("in"), request("GET", "/").body(empty()).unwrap()).await.status, 200);
    let head = seen.lock().unwrap().remove(0);
    let via: Vec<_> = head.get_all("via").iter().map(|value| value.to_str().unwrap().to_owned()).collect();
    assert_eq!(via.join(", ").matches("hopguard").count(), 2, "{via:?}");
    outer.stop().await;
    inner.stop().await;
}

#[tokio::test]
async fn trailers_that_connection_names_end_here_too() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        for _ in 0..2 {
            wire.head().await;
            wire.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: x-private\r\ntrailer: x-private, x-public\r\n\r\n").await;
            wire.send("5\r\nhello\r\n0\r\nx-private: 1\r\nx-public: 1\r\ncontent-length: 3\r\nhost: evil\r\n\r\n").await;
        }
        wire.rest().await;
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let answer = caller.ask(Request::get("/").header("te", "trailers").body(empty()).unwrap()).await;
        assert_eq!(answer.body, "hello");
        let trailers = answer.trailers.unwrap_or_default();
        assert_eq!(trailers.get("x-public").map(|value| value.to_str().unwrap()), Some("1"), "{speaks:?} {trailers:?}");
        for gone in ["x-private", "content-length", "host"] {
            assert!(!trailers.contains_key(gone), "{speaks:?}: {gone} passed");
        }
    }
    mesh.stop().await;
}

#[tokio::test]
async fn metadata_in_the_trailers_of_a_grpc_response_passes_whatever_its_name() {
    const TRAILERS: [(&str, &str); 7] = [
        ("grpc-status", "0"),
        ("x-sum", "5"),
        ("authorization", "Basic eA=="),
        ("cache-control", "no-store"),
        ("set-cookie", "a=b"),
        ("www-authenticate", "Basic"),
        ("content-encoding", "gzip"),
    ];
    let upstream = Upstream::http2(|request: Request<_>| async move {
        let kind = request.headers()["content-type"].clone();
        Response::builder().header("content-type", kind).body(with_trailers(&b"\0\0\0\0\0"[..], &TRAILERS)).unwrap()
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http2")).await;
    for (kind, left) in [
        ("application/grpc", "authorization cache-control grpc-status set-cookie www-authenticate x-sum"),
        ("text/plain", "grpc-status x-sum"),
    ] {
        let asked = Request::post("/shop.v1.Payment/Charge").header("content-type", kind).header("te", "trailers");
        let answer =
            Caller::open(Speaks::Http2, mesh.addr("in")).await.ask(asked.body(full("\0\0\0\0\0")).unwrap()).await;
        let trailers = answer.trailers.unwrap_or_default();
        let mut names: Vec<_> = trailers.keys().map(|name| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names.join(" "), left, "{kind}");
    }
    mesh.ended("ok", 2).await;
    assert_eq!(mesh.metric("hopguard_requests_total", &["outcome=\"ok\""]), 2.0);
    mesh.stop().await;
}

#[tokio::test]
async fn request_trailers_that_must_not_be_trailers_are_dropped() {
    let seen = Arc::new(Mutex::new(None));
    let heard = Arc::clone(&seen);
    let upstream = Upstream::http1(move |request: Request<Incoming>| {
        let heard = Arc::clone(&heard);
        async move {
            let body = http_body_util::BodyExt::collect(request.into_body()).await.unwrap();
            *heard.lock().unwrap() = body.trailers().cloned();
            Response::new(empty())
        }
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
    let body = with_trailers("hello", &[("x-sum", "5"), ("authorization", "Basic eA=="), ("transfer-encoding", "x")]);
    let asked = request("POST", "/").header("trailer", "x-sum, authorization").body(body).unwrap();
    assert_eq!(ask(mesh.addr("in"), asked).await.status, 200);
    let trailers = seen.lock().unwrap().take().expect("x-sum was declared");
    assert_eq!(trailers["x-sum"], "5");
    assert_eq!(trailers.len(), 1, "{trailers:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_header_section_that_is_too_large_names_the_field() {
    let upstream = Upstream::fixed("hello").await;
    let text = policy(upstream.addr, "    protocol: http1").replace("to: app }", "to: app, maxHeaderSize: 4KiB }");
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let mesh = Mesh::start(&text).await;
        let before = upstream.requests();
        let large = "x".repeat(6000);
        let asked = Request::get("/").header("x-small", "1").header("x-large", large).body(empty()).unwrap();
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let answer = caller.ask(asked).await;
        assert_eq!(answer.status, 431, "{speaks:?}");
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(text.contains("x-large"), "it names the field: {text}");
        mesh.refused(&answer, "header_too_large", "maxHeaderSize", "4096").await;
        assert_eq!(upstream.requests(), before);
        let fits = Request::get("/").header("x-large", "x".repeat(3000)).body(empty()).unwrap();
        assert_eq!(Caller::open(speaks, mesh.addr("in")).await.ask(fits).await.status, 200);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn max_forwards_counts_hops_for_options() {
    let (upstream, seen) = curious().await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let asked = request("OPTIONS", "/").header("max-forwards", "1").body(empty()).unwrap();
    assert_eq!(ask(mesh.addr("in"), asked).await.status, 200);
    assert_eq!(seen.lock().unwrap().remove(0)["max-forwards"], "0");
    let asked = request("OPTIONS", "/").header("max-forwards", "0").body(empty()).unwrap();
    let answer = ask(mesh.addr("in"), asked).await;
    assert!(seen.lock().unwrap().is_empty(), "it was passed on: {answer:?}");
    let asked = request("GET", "/").header("max-forwards", "0").body(empty()).unwrap();
    ask(mesh.addr("in"), asked).await;
    assert_eq!(seen.lock().unwrap().remove(0)["max-forwards"], "0", "it means nothing for GET");
    mesh.stop().await;
}

#[tokio::test]
async fn an_answer_without_a_date_gets_one_and_a_date_is_kept() {
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        loop {
            let head = wire.head().await;
            let date = if head.starts_with("GET /dated") { "date: Sun, 06 Nov 1994 08:49:37 GMT\r\n" } else { "" };
            wire.send(format!("HTTP/1.1 200 OK\r\n{date}content-length: 2\r\n\r\nok")).await;
        }
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let dated = caller.ask(Request::get("/dated").body(empty()).unwrap()).await;
        assert_eq!(dated.header("date"), "Sun, 06 Nov 1994 08:49:37 GMT", "{speaks:?}");
        assert_eq!(dated.headers.get_all("date").iter().count(), 1);
        let undated = caller.ask(Request::get("/").body(empty()).unwrap()).await;
        assert!(!undated.header("date").is_empty(), "{speaks:?}");
    }
    mesh.stop().await;
}

#[tokio::test]
async fn an_http2_body_shorter_than_it_claims_never_looks_whole_to_an_http1_upstream() {
    let whole = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&whole);
    let upstream = Upstream::http1(move |request: Request<Incoming>| {
        let seen = Arc::clone(&seen);
        async move {
            if let Ok(body) = http_body_util::BodyExt::collect(request.into_body()).await {
                seen.lock().unwrap().push(body.to_bytes());
            }
            Response::new(full("hello"))
        }
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
    for length in ["10", "3"] {
        let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
        let wrong = Request::post("/").header("content-length", length).body(full("12345")).unwrap();
        let answer = caller.send(wrong).await;
        assert!(answer.as_ref().map_or(true, |answer| answer.status() != 200), "{length}: {answer:?}");
    }
    let right = Request::post("/").header("content-length", "5").body(full("12345")).unwrap();
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    assert_eq!(caller.ask(right).await.body, "hello");
    assert_eq!(*whole.lock().unwrap(), ["12345"]);
    mesh.stop().await;
}

#[tokio::test]
async fn te_of_an_http2_caller_is_no_field_for_an_http1_upstream() {
    let (upstream, seen) = curious().await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
    let asked = Request::get("/").header("te", "gzip").body(empty()).unwrap();
    let answer = Caller::open(Speaks::Http2, mesh.addr("in")).await.send(asked).await;
    assert!(answer.as_ref().map_or(true, |answer| answer.status() == 400 || answer.status() == 200), "{answer:?}");
    assert!(seen.lock().unwrap().iter().all(|head| !head.contains_key("te")), "{:?}", seen.lock().unwrap());
    mesh.stop().await;
}

#[tokio::test]
async fn of_equal_lengths_one_is_passed_on_over_both_protocols_and_different_ones_are_refused() {
    let (upstream, seen) = curious().await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let mut asked = request("POST", "/").body(full("abc")).unwrap();
        for _ in 0..2 {
            asked.headers_mut().append("content-length", "3".parse().unwrap());
        }
        let answer = Caller::open(speaks, mesh.addr("in")).await.ask(asked).await;
        assert_eq!(answer.status, 200, "{speaks:?} {answer:?}");
        let fields = seen.lock().unwrap().pop().unwrap();
        assert_eq!(fields.get_all("content-length").iter().collect::<Vec<_>>(), ["3"], "{speaks:?}");
    }
    for lengths in [["3", "4"], ["4", "3"]] {
        let mut asked = request("POST", "/").body(full("abc")).unwrap();
        for length in lengths {
            asked.headers_mut().append("content-length", length.parse().unwrap());
        }
        let answered = Caller::open(Speaks::Http2, mesh.addr("in")).await.send(asked).await;
        // The stream is reset before anybody sees it.
        assert!(answered.is_err() && seen.lock().unwrap().is_empty(), "{lengths:?}");
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_target_without_a_path_is_passed_on_with_one() {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&lines);
    let upstream = Upstream::bytes(move |stream| {
        let noted = Arc::clone(&noted);
        async move {
            let mut wire = Wire::over(stream);
            let head = wire.head().await;
            noted.lock().unwrap().push(head.lines().next().unwrap_or_default().to_owned());
            wire.send("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok").await;
        }
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    for (target, wanted) in [("", "/"), ("#f", "/"), ("?x", "/?x"), ("?x#f", "/?x"), ("/a#f", "/a")] {
        let mut wire = Wire::open(mesh.addr("in")).await;
        wire.send(format!("GET http://shop.test{target} HTTP/1.1\r\nhost: shop.test\r\n\r\n")).await;
        wire.until("ok").await;
        assert_eq!(lines.lock().unwrap().pop().unwrap(), format!("GET {wanted} HTTP/1.1"), "{target:?}");
    }
    mesh.stop().await;
}
