//! Message heads at the edge of what is allowed: spaces before colons, many fields, odd statuses, counts that do not fit.

use std::fmt::Write;
use std::sync::{Arc, Mutex};

use hyper::body::Incoming;
use hyper::{HeaderMap, Request, Response};
use serde_json::Value;

use crate::support::Mesh;
use crate::support::http::{Caller, Speaks, ask, empty, full, raw, request};
use crate::support::upstream::{Upstream, policy};
use crate::support::wire::Wire;

/// An upstream that answers every request with these bytes.
async fn saying(answer: String) -> Upstream {
    Upstream::bytes(move |stream| {
        let answer = answer.clone();
        async move {
            let mut wire = Wire::over(stream);
            while wire.has_more().await {
                wire.head().await;
                wire.send(&answer).await;
            }
        }
    })
    .await
}

/// An upstream that notes the fields of each request.
async fn noting(http2: bool) -> (Upstream, Arc<Mutex<Vec<HeaderMap>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let heads = Arc::clone(&seen);
    let handler = move |request: Request<Incoming>| {
        heads.lock().unwrap().push(request.headers().clone());
        async move { Response::new(full("ok")) }
    };
    (Upstream::on("127.0.0.1:0".parse().unwrap(), handler, http2).await, seen)
}

/// So many fields, in the form of HTTP/1.
fn fields(count: usize) -> String {
    (0..count).fold(String::new(), |mut all, number| {
        write!(all, "x-{number}: 1\r\n").unwrap();
        all
    })
}

/// The head of the answer to a GET over HTTP/1.
async fn head(mesh: &Mesh) -> String {
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("GET / HTTP/1.1\r\nhost: shop.test\r\nconnection: close\r\n\r\n").await;
    wire.head().await
}

#[tokio::test]
async fn a_space_before_the_colon_of_an_answers_field_is_removed() {
    let answer = "HTTP/1.1 200 OK\r\nX-Protection : 1; mode=block\r\nContent-Length  : 2\r\n\r\nok";
    let upstream = saying(answer.to_owned()).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
    for (number, speaks) in [Speaks::Http1, Speaks::Http2].into_iter().enumerate() {
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let answer = caller.ask(Request::get("/").body(empty()).unwrap()).await;
        assert_eq!((answer.status.as_u16(), answer.header("x-protection")), (200, "1; mode=block"), "{answer:?}");
        assert_eq!((answer.header("content-length"), &answer.body[..]), ("2", &b"ok"[..]), "{answer:?}");
        mesh.ended("ok", number + 1).await;
    }
    assert!(head(&mesh).await.contains("\r\nx-protection: 1; mode=block\r\n"));
    mesh.ended("ok", 3).await;
    assert!(mesh.log().iter().all(|line| line.contains("\"status\":200")), "{:#?}", mesh.log());
    mesh.stop().await;
}

#[tokio::test]
async fn a_space_before_the_colon_of_a_requests_field_is_refused() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let answer = raw(mesh.addr("in"), b"GET / HTTP/1.1\r\nhost: shop.test\r\nx-space : 1\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert_eq!(mesh.only("bad_request").await["status"], 400);
    assert_eq!(upstream.requests(), 0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_request_with_too_many_fields_is_refused_with_the_number_and_the_setting() {
    let (upstream, seen) = noting(true).await;
    for (setting, limit) in [("", 256), (", maxHeaderCount: 40", 40), (", maxHeaderCount: 300", 300)] {
        let text = policy(upstream.addr, "    protocol: http2").replace("to: app }", &format!("to: app{setting} }}"));
        for speaks in [Speaks::Http1, Speaks::Http2] {
            let mesh = Mesh::start(&text).await;
            let mut caller = Caller::open(speaks, mesh.addr("in")).await;
            // Over HTTP/1 the host is one of the fields.
            let own = usize::from(speaks == Speaks::Http1);
            let with = |count: usize| {
                let add = |builder: hyper::http::request::Builder, number| builder.header(format!("x-{number}"), "1");
                (0..count - own).fold(Request::get("/"), add).body(empty()).unwrap()
            };
            assert_eq!(caller.ask(with(limit)).await.status, 200, "{limit} {speaks:?}");
            assert!(seen.lock().unwrap().pop().unwrap().contains_key(format!("x-{}", limit - own - 1)));
            let answer = caller.ask(with(limit + 1)).await;
            assert_eq!(answer.status, 431, "{answer:?}");
            let detail = answer.problem()["detail"].as_str().unwrap_or_default().to_owned();
            assert!(detail.contains(&format!("has {} header fields", limit + 1)), "{detail}");
            mesh.refused(&answer, "header_too_large", "maxHeaderCount", &limit.to_string()).await;
            mesh.stop().await;
        }
    }
    assert!(seen.lock().unwrap().is_empty(), "a refused request reached the upstream");
}

#[tokio::test]
async fn far_too_many_fields_of_a_request_are_recorded_with_both_settings() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let asked = format!("GET / HTTP/1.1\r\nhost: shop.test\r\n{}\r\n", fields(320));
    let answer = raw(mesh.addr("in"), asked.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let line = mesh.only("header_too_large").await;
    let detail = line["refusal"]["detail"].as_str().unwrap_or_default();
    for said in ["81920 bytes", "320 fields", "maxHeaderSize is 65536", "maxHeaderCount is 256"] {
        assert!(detail.contains(said), "{line}");
    }
    mesh.stop().await;
}

#[tokio::test]
async fn an_answer_with_too_many_fields_is_refused_with_the_number_and_the_setting() {
    let off = "    circuitBreaker: off\n    retry: off";
    let table =
        [("", 256, 255, None), ("", 256, 256, Some("has 257 header fields")), ("", 256, 400, Some("320 fields"))];
    let set = "    connections: { maxHeaderCount: 500 }\n";
    for (more, limit, count, said) in table.into_iter().chain([(set, 500, 400, None)]) {
        // With its length, one more.
        let upstream = saying(format!("HTTP/1.1 200 OK\r\n{}content-length: 2\r\n\r\nok", fields(count))).await;
        let mesh = Mesh::start(&policy(upstream.addr, &format!("{more}{off}"))).await;
        if let Some(said) = said {
            let answer = ask(mesh.addr("in"), request("GET", "/").body(empty()).unwrap()).await;
            assert_eq!(answer.status, 502, "{answer:?}");
            let detail = answer.problem()["detail"].as_str().unwrap_or_default().to_owned();
            assert!(detail.contains(said), "{detail}");
            mesh.refused(&answer, "upstream_protocol", "connections.maxHeaderCount", &limit.to_string()).await;
        } else {
            let head = head(&mesh).await;
            assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
            assert!(head.contains(&format!("\r\nx-{}: 1\r\n", count - 1)), "{head}");
            assert_eq!(mesh.only("ok").await["status"], 200);
        }
        mesh.stop().await;
    }
}

#[tokio::test]
async fn the_fields_of_an_http2_answer_are_counted_too() {
    let upstream = Upstream::http2(|request: Request<Incoming>| async move {
        let count: usize = request.uri().path()[1..].parse().unwrap();
        let add = |builder: hyper::http::response::Builder, number| builder.header(format!("x-{number}"), "1");
        // hyper adds a date.
        (1..count).fold(Response::builder(), add).body(empty()).unwrap()
    })
    .await;
    let mesh =
        Mesh::start(&policy(upstream.addr, "    protocol: http2\n    circuitBreaker: off\n    retry: off")).await;
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    assert_eq!(caller.ask(Request::get("/256").body(empty()).unwrap()).await.status, 200);
    let answer = caller.ask(Request::get("/257").body(empty()).unwrap()).await;
    assert_eq!(answer.status, 502, "{answer:?}");
    mesh.refused(&answer, "upstream_protocol", "connections.maxHeaderCount", "256").await;
    mesh.stop().await;
}

/// What an HTTP/1 caller reads, and the code that an HTTP/2 caller gets.
const STATUSES: [(&str, &str, &str); 9] = [
    ("200 ", "200 OK", "ok"),
    ("200 Fine", "200 Fine", "ok"),
    ("299 ", "299 Unknown", "ok"),
    ("299 Partly", "299 Partly", "ok"),
    ("399 ", "399 Unknown", "ok"),
    ("404 Nothing here", "404 Nothing here", "client_error"),
    ("503 Down for tea", "503 Down for tea", "server_error"),
    ("600 ", "600 Unknown", "server_error"),
    ("999 Request denied", "999 Request denied", "server_error"),
];

#[tokio::test]
async fn statuses_and_reason_phrases_pass_and_an_unknown_status_has_a_phrase() {
    for (sent, wanted, outcome) in STATUSES {
        let upstream = saying(format!("HTTP/1.1 {sent}\r\ncontent-length: 2\r\n\r\nok")).await;
        let off = "    protocol: http1\n    circuitBreaker: off\n    ejection: off\n    retry: off";
        let mesh = Mesh::start(&policy(upstream.addr, off)).await;
        let answer = head(&mesh).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {wanted}\r\n")), "{sent}: {answer}");
        let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
        let answer = caller.ask(Request::get("/").body(empty()).unwrap()).await;
        assert_eq!((answer.status.as_str(), &answer.body[..]), (&wanted[..3], &b"ok"[..]), "{answer:?}");
        mesh.ended(outcome, 2).await;
        let lines: Vec<Value> = mesh.log().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(lines.iter().all(|line| line["status"] == answer.status.as_u16()), "{lines:#?}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_status_over_http2_gets_a_phrase_for_an_http1_caller() {
    let upstream = Upstream::http2(|_| async { Response::builder().status(999).body(empty()).unwrap() }).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http2")).await;
    assert!(head(&mesh).await.starts_with("HTTP/1.1 999 Unknown\r\n"));
    assert_eq!(mesh.only("server_error").await["status"], 999);
    // It counts as a failure, but no condition of `retry.on` is met.
    assert_eq!(upstream.requests(), 1);
    mesh.stop().await;
}

#[tokio::test]
async fn a_request_without_a_body_says_so_where_its_method_usually_has_one() {
    for http2 in [false, true] {
        let (upstream, seen) = noting(http2).await;
        let protocol = if http2 { "    protocol: http2" } else { "    protocol: http1" };
        let mesh = Mesh::start(&policy(upstream.addr, protocol)).await;
        for speaks in [Speaks::Http1, Speaks::Http2] {
            let mut caller = Caller::open(speaks, mesh.addr("in")).await;
            let methods = [("POST", true), ("PUT", true), ("PATCH", true), ("GET", false), ("DELETE", false)];
            for (method, has_length) in methods {
                let asked = Request::builder().method(method).uri("/").body(empty()).unwrap();
                assert_eq!(caller.ask(asked).await.status, 200);
                let head = seen.lock().unwrap().pop().unwrap();
                let length = head.get("content-length").map(|value| value.to_str().unwrap().to_owned());
                assert_eq!(length, has_length.then(|| "0".to_owned()), "{method} {speaks:?} to {protocol}");
                assert!(!head.contains_key("transfer-encoding"), "{head:?}");
            }
        }
        mesh.ended("ok", 10).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_count_of_hops_that_does_not_fit_becomes_the_largest_that_does() {
    let (upstream, seen) = noting(false).await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let asked = request("OPTIONS", "/").header("max-forwards", "99999999999999999999").body(empty()).unwrap();
    assert_eq!(ask(mesh.addr("in"), asked).await.status, 200);
    assert_eq!(seen.lock().unwrap().remove(0)["max-forwards"], (u32::MAX - 1).to_string().as_str());
    mesh.only("ok").await;
    mesh.stop().await;
}
