//! Fault injection: aborts, resets, delays, cut and slow bodies, and their effect on the other rules.

use std::time::Duration;

use hyper::{Request, Response};
use jiff::Timestamp;
use tokio::time::{Instant, timeout};

use crate::support::http::{
    Answer, Body, Caller, Speaks, ask, empty, full, get, grpc, grpc_request, request, with_trailers,
};
use crate::support::upstream::{Upstream, policy};
use crate::support::{Mesh, SOON, eventually};

const NEVER: &str = "2999-01-01T00:00:00Z";

/// A policy whose one destination has a fault with these values, named `test`; `more` is added to the destination.
fn faulty(upstream: &Upstream, fault: &str, more: &str) -> String {
    with_end(upstream, fault, more, NEVER)
}

fn with_end(upstream: &Upstream, fault: &str, more: &str, until: &str) -> String {
    let faults = format!("    faults:\n      - {{ name: test, until: \"{until}\", {fault} }}\n");
    // Before an app, only what nobody has seen is sent again.
    policy(upstream.addr, &(faults + more)).replace("to: app }", "to: app, direction: outbound }")
}

const NO_RETRY: &str = "    retry: off\n";
const NO_BREAKER: &str = "    circuitBreaker: off\n    ejection: off\n";

/// How often the fault has been injected.
fn injected(mesh: &Mesh) -> f64 {
    mesh.metric("hopguard_faults_total", &["destination=\"app\"", "fault=\"test\""])
}

fn tries(line: &serde_json::Value) -> u64 {
    line["attempt"].as_u64().unwrap_or_else(|| panic!("{line}"))
}

async fn send(speaks: Speaks, mesh: &Mesh, request: Request<Body>) -> Response<hyper::body::Incoming> {
    timeout(SOON, Caller::open(speaks, mesh.addr("in")).await.send(request)).await.expect("no answer").unwrap()
}

fn get_request() -> Request<Body> {
    Request::get("/").body(empty()).unwrap()
}

/// An upstream for gRPC that answers with a message of `size` bytes.
async fn grpc_upstream(size: usize) -> Upstream {
    Upstream::http2(move |_| async move {
        let mut message = vec![0, 0, 0, 0, 0];
        message[1..].copy_from_slice(&u32::try_from(size).unwrap().to_be_bytes());
        message.resize(5 + size, 7);
        let answer = Response::builder().header("content-type", "application/grpc");
        answer.body(with_trailers(message, &[("grpc-status", "0")])).unwrap()
    })
    .await
}

#[tokio::test]
async fn an_abort_answers_in_the_upstreams_place() {
    let upstream = Upstream::fixed("fine").await;
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let policy = faulty(&upstream, "abort: { status: 418 }", "    protocol: http1\n");
        let mesh = Mesh::start(&policy).await;
        let answer = Caller::open(speaks, mesh.addr("in")).await.ask(get_request()).await;
        assert_eq!(answer.status, 418);
        assert_eq!(answer.body, "the fault test of the policy answered in the upstream's place\n");
        let line = mesh.only("client_error").await;
        assert_eq!((&line["fault"], &line["status"]), (&"test".into(), &418.into()), "{line}");
        assert_eq!(line["endpoint"], upstream.addr.to_string(), "{line}");
        assert_eq!(injected(&mesh), 1.0);
        mesh.stop().await;
    }
    assert_eq!((upstream.requests(), upstream.connections()), (0, 0));
}

#[tokio::test]
async fn an_abort_has_no_body_where_there_can_be_none() {
    let upstream = Upstream::fixed("fine").await;
    for (method, status) in [("HEAD", 404), ("GET", 204), ("GET", 304)] {
        for speaks in [Speaks::Http1, Speaks::Http2] {
            let mesh = Mesh::start(&faulty(&upstream, &format!("abort: {{ status: {status} }}"), "")).await;
            let mut caller = Caller::open(speaks, mesh.addr("in")).await;
            // Twice, so that what follows on the connection is read right.
            for _ in 0..2 {
                let request = Request::builder().method(method).uri("/").body(empty()).unwrap();
                let answer = caller.ask(request).await;
                assert_eq!((answer.status.as_u16(), answer.body.len()), (status, 0), "{answer:?}");
            }
            mesh.stop().await;
        }
    }
}

#[tokio::test]
async fn a_grpc_caller_gets_the_aborts_code_in_an_answer_of_trailers() {
    let upstream = grpc_upstream(0).await;
    for (abort, code) in
        [("grpc: not_found", "5"), ("grpc: unavailable", "14"), ("status: 503", "14"), ("status: 404", "12")]
    {
        let mesh = Mesh::start(&faulty(&upstream, &format!("abort: {{ {abort} }}"), NO_RETRY)).await;
        let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
        assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, code), "{abort}: {answer:?}");
        assert!(answer.trailers.is_none(), "{abort}: {answer:?}");
        let said = "the fault test of the policy answered in the upstream's place";
        assert_eq!(answer.header("grpc-message"), said, "{abort}");
        eventually(|| (injected(&mesh) == 1.0 && !mesh.log().is_empty()).then_some(())).await;
        let line: serde_json::Value = serde_json::from_str(&mesh.log()[0]).unwrap();
        assert_eq!((&line["fault"], &line["protocol"]), (&"test".into(), &"grpc".into()), "{line}");
        mesh.stop().await;
    }
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn a_caller_that_does_not_speak_grpc_gets_the_status_that_says_the_same() {
    let upstream = Upstream::fixed("fine").await;
    let mesh = Mesh::start(&faulty(&upstream, "abort: { grpc: permission_denied }", "")).await;
    assert_eq!(get(mesh.addr("in"), "/").await.status, 403);
    mesh.stop().await;
}

#[tokio::test]
async fn a_reset_looks_like_a_connection_that_broke_off() {
    let upstream = Upstream::fixed("fine").await;
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let mesh = Mesh::start(&faulty(&upstream, "reset: true", NO_RETRY)).await;
        let answer = Caller::open(speaks, mesh.addr("in")).await.ask(get_request()).await;
        assert_eq!(answer.status, 502);
        let line = mesh.refused(&answer, "upstream_reset", "faults", "test").await;
        assert_eq!((&line["fault"], &line["refusal"]["origin"]), (&"test".into(), &"policy.yaml:11".into()), "{line}");
        assert_eq!(injected(&mesh), 1.0);
        mesh.stop().await;
    }
    assert_eq!(upstream.requests(), 0);
    let mesh = Mesh::start(&faulty(&upstream, "reset: true", NO_RETRY)).await;
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
    assert_eq!(answer.grpc_status(), "14", "{answer:?}");
    mesh.refused(&answer, "upstream_reset", "faults", "test").await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_reset_may_have_been_seen_so_that_only_what_is_safe_is_sent_again() {
    let upstream = Upstream::fixed("fine").await;
    for (method, expected) in [("GET", 3), ("POST", 1)] {
        let mesh = Mesh::start(&faulty(&upstream, "reset: true", NO_BREAKER)).await;
        let answer = ask(mesh.addr("in"), request(method, "/").body(full("x")).unwrap()).await;
        assert_eq!(answer.status, 502);
        let line = mesh.only("upstream_reset").await;
        assert_eq!((tries(&line), injected(&mesh)), (expected, expected as f64), "{method}: {line}");
        mesh.stop().await;
    }
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn a_delay_is_time_that_the_upstream_takes() {
    let upstream = Upstream::fixed("fine").await;
    let mesh = Mesh::start(&faulty(&upstream, "delay: 150ms", "")).await;
    let begun = Instant::now();
    let answer = get(mesh.addr("in"), "/").await;
    assert!(begun.elapsed() >= Duration::from_millis(150));
    assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"fine"[..]));
    let line = mesh.only("ok").await;
    assert_eq!((&line["fault"], tries(&line)), (&"test".into(), 1), "{line}");
    assert!(line["upstream_ms"].as_f64() >= Some(150.0), "{line}");
    assert_eq!(upstream.requests(), 1);
    mesh.stop().await;
}

#[tokio::test]
async fn a_delay_can_come_before_an_abort() {
    let upstream = Upstream::fixed("fine").await;
    let mesh = Mesh::start(&faulty(&upstream, "delay: 100ms, abort: { status: 418 }", "")).await;
    let begun = Instant::now();
    assert_eq!(get(mesh.addr("in"), "/").await.status, 418);
    assert!(begun.elapsed() >= Duration::from_millis(100));
    assert_eq!(upstream.requests(), 0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_delay_longer_than_a_try_is_a_timeout_and_sent_again() {
    let upstream = Upstream::fixed("fine").await;
    let more = "    timeouts: { perTry: 100ms, request: 5s }\n";
    let mesh = Mesh::start(&faulty(&upstream, "delay: 2s", &(more.to_owned() + NO_BREAKER))).await;
    let answer = get(mesh.addr("in"), "/").await;
    assert_eq!(answer.status, 504);
    let line = mesh.refused(&answer, "per_try_timeout", "timeouts.perTry", "100ms").await;
    assert_eq!((tries(&line), injected(&mesh)), (3, 3.0), "{line}");
    assert_eq!((&line["fault"], upstream.requests()), (&"test".into(), 0), "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn what_a_delay_leaves_of_a_try_is_all_that_the_upstream_gets() {
    let upstream = Upstream::http1(|_| async {
        tokio::time::sleep(Duration::from_millis(400)).await;
        Response::new(full("late"))
    })
    .await;
    let more = "    timeouts: { perTry: 500ms, request: 5s }\n    retry: off\n";
    let mesh = Mesh::start(&faulty(&upstream, "delay: 300ms", more)).await;
    // With the whole of `perTry` after the delay, the upstream's answer would have come.
    let answer = get(mesh.addr("in"), "/").await;
    mesh.refused(&answer, "per_try_timeout", "timeouts.perTry", "500ms").await;
    assert_eq!(upstream.requests(), 1);
    mesh.stop().await;
}

#[tokio::test]
async fn a_delay_ends_with_the_request_and_with_its_deadline() {
    let upstream = Upstream::fixed("fine").await;
    let mesh = Mesh::start(&faulty(&upstream, "delay: 10s", "    timeouts: { request: 150ms }\n")).await;
    let answer = get(mesh.addr("in"), "/").await;
    mesh.refused(&answer, "request_timeout", "timeouts.request", "150ms").await;
    mesh.stop().await;
    let upstream = grpc_upstream(0).await;
    let mesh = Mesh::start(&faulty(&upstream, "delay: 10s", "")).await;
    let mut request = grpc_request("/shop.v1.Payment/Charge", full(&b"\0\0\0\0\0"[..]));
    request.headers_mut().insert("grpc-timeout", "150m".parse().unwrap());
    let answer = Caller::open(Speaks::Http2, mesh.addr("in")).await.ask(request).await;
    assert_eq!(answer.grpc_status(), "4", "{answer:?}");
    mesh.only("deadline_exceeded").await;
    assert_eq!(upstream.requests(), 0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_caller_that_leaves_during_a_delay_counts_against_nobody() {
    let upstream = Upstream::fixed("fine").await;
    let mesh = Mesh::start(&faulty(&upstream, "delay: 10s", "    timeouts: { request: 20s }\n")).await;
    let mut caller = crate::support::http::Http1::open(mesh.addr("in")).await;
    let asked = tokio::spawn(async move { caller.send(request("GET", "/").body(empty()).unwrap()).await.map(drop) });
    eventually(|| (injected(&mesh) == 1.0).then_some(())).await;
    asked.abort();
    mesh.only("caller_gone").await;
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &[]), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_body_is_cut_after_its_bytes() {
    let http1 = Upstream::fixed("0123456789").await;
    let http2 = Upstream::http2(|_| async { Response::new(full("0123456789")) }).await;
    for (upstream, protocol) in [(&http1, "http1"), (&http2, "http2")] {
        for speaks in [Speaks::Http1, Speaks::Http2] {
            for bytes in [0, 4] {
                let more = format!("    protocol: {protocol}\n");
                let mesh = Mesh::start(&faulty(upstream, &format!("cutAfter: {bytes}"), &more)).await;
                let response = send(speaks, &mesh, get_request()).await;
                assert_eq!(response.status(), 200);
                let read = read_until_cut(response).await;
                assert_eq!(read, b"0123456789"[..bytes], "{protocol} {speaks:?} {bytes}");
                let line = mesh.only("upstream_cut").await;
                assert_eq!((&line["fault"], &line["bytes_out"]), (&"test".into(), &bytes.into()), "{line}");
                assert_eq!(injected(&mesh), 1.0);
                mesh.stop().await;
            }
        }
    }
}

/// The bytes of a body that does not end well.
async fn read_until_cut(response: Response<hyper::body::Incoming>) -> Vec<u8> {
    use http_body_util::BodyExt;
    let mut body = response.into_body();
    let mut all = Vec::new();
    while let Some(frame) = timeout(SOON, body.frame()).await.expect("the answer does not end") {
        match frame {
            Ok(frame) => all.extend_from_slice(frame.data_ref().expect("trailers")),
            Err(_) => return all,
        }
    }
    panic!("the answer ended well, after {all:?}");
}

#[tokio::test]
async fn a_body_that_is_over_before_the_cut_is_whole() {
    let upstream = Upstream::fixed("0123456789").await;
    for bytes in ["10", "1KiB"] {
        let mesh = Mesh::start(&faulty(&upstream, &format!("cutAfter: {bytes}"), "")).await;
        assert_eq!(get(mesh.addr("in"), "/").await.body, "0123456789");
        mesh.only("ok").await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_grpc_caller_whose_answer_is_cut_gets_a_status() {
    let upstream = grpc_upstream(100).await;
    let mesh = Mesh::start(&faulty(&upstream, "cutAfter: 50", "")).await;
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
    assert_eq!((answer.grpc_status(), answer.body.len()), ("14", 50), "{answer:?}");
    let message = answer.trailers.as_ref().unwrap()["grpc-message"].to_str().unwrap();
    assert!(message.contains("upstream_cut") && message.contains("test"), "{message}");
    let line = mesh.only("upstream_cut").await;
    assert_eq!((&line["fault"], &line["grpc_status"]), (&"test".into(), &"UNAVAILABLE".into()), "{line}");
    assert_eq!(line["grpc_message"], message, "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_body_comes_as_slowly_as_the_policy_says() {
    let http1 = Upstream::http1(|_| async { Response::new(full(vec![b'x'; 3000])) }).await;
    let http2 = Upstream::http2(|_| async { Response::new(full(vec![b'x'; 3000])) }).await;
    for (upstream, protocol) in [(&http1, "http1"), (&http2, "http2")] {
        for speaks in [Speaks::Http1, Speaks::Http2] {
            let more = format!("    protocol: {protocol}\n");
            let mesh = Mesh::start(&faulty(upstream, "slowBody: { bytesPerSecond: 10000 }", &more)).await;
            let begun = Instant::now();
            let answer = Answer::read(send(speaks, &mesh, get_request()).await).await.unwrap();
            let took = begun.elapsed();
            assert_eq!(answer.body.len(), 3000);
            assert!(took >= Duration::from_millis(240), "{protocol} {speaks:?} {took:?}");
            let line = mesh.only("ok").await;
            assert_eq!((&line["fault"], &line["bytes_out"]), (&"test".into(), &3000.into()), "{line}");
            mesh.stop().await;
        }
    }
}

#[tokio::test]
async fn a_body_under_way_is_slow_no_longer_when_the_fault_is_over() {
    let upstream = Upstream::http1(|_| async { Response::new(full(vec![b'x'; 3000])) }).await;
    let end = Timestamp::now() + Duration::from_millis(500);
    // At this rate it would take a minute, and the request has two seconds.
    let fault = "slowBody: { bytesPerSecond: 50 }";
    let mesh = Mesh::start(&with_end(&upstream, fault, "", &end.to_string())).await;
    let answer = get(mesh.addr("in"), "/").await;
    assert_eq!(answer.body.len(), 3000);
    assert!(Timestamp::now() >= end, "it was not slow");
    let line = mesh.only("ok").await;
    assert_eq!((&line["fault"], &line["bytes_out"]), (&"test".into(), &3000.into()), "{line}");
    assert_eq!(injected(&mesh), 1.0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_slow_answer_over_grpc_keeps_its_trailers() {
    let upstream = grpc_upstream(1000).await;
    let mesh = Mesh::start(&faulty(&upstream, "slowBody: { bytesPerSecond: 5000 }", "")).await;
    let begun = Instant::now();
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
    assert!(begun.elapsed() >= Duration::from_millis(140), "{:?}", begun.elapsed());
    assert_eq!((answer.grpc_status(), answer.body.len()), ("0", 1005), "{answer:?}");
    mesh.only("ok").await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_body_that_is_too_slow_meets_the_request_timeout() {
    let upstream = Upstream::http1(|_| async { Response::new(full(vec![b'x'; 3000])) }).await;
    let fault = "slowBody: { bytesPerSecond: 1000 }";
    let mesh = Mesh::start(&faulty(&upstream, fault, "    timeouts: { request: 300ms }\n")).await;
    // At its rate the body would take three seconds.
    let read = read_until_cut(send(Speaks::Http1, &mesh, get_request()).await).await;
    assert!((1..1000).contains(&read.len()), "{}", read.len());
    let line = mesh.only("request_timeout").await;
    assert_eq!(line["fault"], "test", "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_share_of_the_calls_meets_it() {
    let upstream = Upstream::fixed("fine").await;
    let mesh = Mesh::start(&faulty(&upstream, "abort: { status: 418 }, share: 0.3", "")).await;
    let mut caller = Caller::open(Speaks::Http1, mesh.addr("in")).await;
    let mut met = 0;
    for _ in 0..500 {
        met += u32::from(caller.ask(get_request()).await.status == 418);
    }
    // Seven standard deviations to each side.
    assert!((80..=220).contains(&met), "{met}");
    assert_eq!((injected(&mesh), upstream.requests()), (f64::from(met), 500 - met as usize));
    mesh.stop().await;
}

#[tokio::test]
async fn only_calls_with_its_headers_meet_it() {
    let upstream = Upstream::fixed("fine").await;
    let mesh = Mesh::start(&faulty(&upstream, "abort: { status: 418 }, headers: { x-test: \"on\" }", "")).await;
    for (value, status) in [(Some("on"), 418), (Some("off"), 200), (Some("ON"), 200), (None, 200)] {
        let mut builder = request("GET", "/");
        if let Some(value) = value {
            builder = builder.header("X-Test", value);
        }
        assert_eq!(ask(mesh.addr("in"), builder.body(empty()).unwrap()).await.status, status, "{value:?}");
    }
    assert_eq!(injected(&mesh), 1.0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_route_has_its_own_faults_or_none() {
    let upstream = Upstream::fixed("fine").await;
    let more = format!(
        "    routes:
      - {{ name: spared, match: {{ path: /spared }}, faults: [] }}
      - name: other
        match: {{ path: /other }}
        faults: [{{ name: own, until: \"{NEVER}\", abort: {{ status: 410 }} }}]
"
    );
    let mesh = Mesh::start(&faulty(&upstream, "abort: { status: 418 }", &more)).await;
    for (path, status) in [("/", 418), ("/spared", 200), ("/other", 410)] {
        assert_eq!(get(mesh.addr("in"), path).await.status, status, "{path}");
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_fault_that_is_over_does_nothing() {
    let upstream = Upstream::fixed("fine").await;
    let policy = with_end(&upstream, "abort: { status: 418 }", "", "2001-01-01T00:00:00Z");
    let mesh = Mesh::start(&policy).await;
    assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
    let line = mesh.only("ok").await;
    assert_eq!((&line["fault"], injected(&mesh)), (&serde_json::Value::Null, 0.0), "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_fault_ends_by_itself_while_calls_go_on() {
    let upstream = Upstream::fixed("fine").await;
    let end = Timestamp::now() + Duration::from_secs(1);
    let mesh = Mesh::start(&with_end(&upstream, "abort: { status: 418 }", "", &end.to_string())).await;
    let mut caller = Caller::open(Speaks::Http1, mesh.addr("in")).await;
    let mut met = 0;
    loop {
        let (before, status) = (Timestamp::now(), caller.ask(get_request()).await.status);
        if status == 200 {
            assert!(Timestamp::now() >= end, "it ended early");
            break;
        }
        assert!(status == 418 && before < end, "{status} at {before}, after {end}");
        met += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(met > 0);
    assert_eq!(injected(&mesh), f64::from(met));
    mesh.stop().await;
}

#[tokio::test]
async fn an_abort_is_tried_again_and_each_try_is_counted() {
    let upstream = Upstream::fixed("fine").await;
    let mesh = Mesh::start(&faulty(&upstream, "abort: { status: 503 }", NO_BREAKER)).await;
    let answer = get(mesh.addr("in"), "/").await;
    assert_eq!(answer.status, 503);
    assert!(answer.header("proxy-status").contains("hopguard-final"), "{answer:?}");
    eventually(|| (!mesh.log().is_empty()).then_some(())).await;
    let line: serde_json::Value = serde_json::from_str(&mesh.log()[0]).unwrap();
    assert_eq!(
        (tries(&line), &line["fault"], &line["retry_withheld"]),
        (3, &"test".into(), &"tries_used_up".into()),
        "{line}"
    );
    assert_eq!((injected(&mesh), mesh.metric("hopguard_retries_total", &["app"])), (3.0, 2.0));
    assert_eq!(upstream.requests(), 0);
    mesh.stop().await;
}

#[tokio::test]
async fn each_try_draws_anew_so_that_retries_get_past_a_fault_of_some() {
    let upstream = Upstream::fixed("fine").await;
    let more = "    retry: { budget: { minPerSecond: 1000 } }\n    circuitBreaker: off\n    ejection: off\n";
    let mesh = Mesh::start(&faulty(&upstream, "abort: { status: 503 }, share: 0.5", more)).await;
    let mut caller = Caller::open(Speaks::Http1, mesh.addr("in")).await;
    let mut failed = 0;
    for _ in 0..40 {
        failed += u32::from(caller.ask(get_request()).await.status == 503);
    }
    // One in eight without the budget's end; half of them if a call kept its fault.
    assert!(failed < 16, "{failed}");
    mesh.stop().await;
}

#[tokio::test]
async fn aborts_open_the_breaker() {
    let upstream = Upstream::fixed("fine").await;
    let more = "    retry: off\n    circuitBreaker: { consecutiveFailures: 3, openFor: 10s, openForMax: 10s }\n";
    for fault in ["abort: { status: 503 }", "reset: true", "cutAfter: 1", "delay: 5s"] {
        let more = format!("{more}    timeouts: {{ perTry: 50ms }}\n");
        let mesh = Mesh::start(&faulty(&upstream, fault, &more)).await;
        for _ in 0..3 {
            let response = send(Speaks::Http1, &mesh, get_request()).await;
            let _cut = Answer::read(response).await;
        }
        eventually(|| {
            (mesh.metric("hopguard_circuit_breaker_changes_total", &["state=\"open\""]) == 1.0).then_some(())
        })
        .await;
        let answer = get(mesh.addr("in"), "/").await;
        assert_eq!(answer.status, 503, "{fault}");
        mesh.refused(&answer, "circuit_open", "circuitBreaker.consecutiveFailures", "3").await;
        assert_eq!(injected(&mesh), 3.0, "{fault}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_rule_that_is_off_injects_nothing_and_one_in_warn_only_says_so() {
    let upstream = Upstream::fixed("fine").await;
    for (mode, fault, would) in [("off", None, None), ("dryRun", Some("test"), Some("faults"))] {
        let policy =
            faulty(&upstream, "delay: 5s, abort: { status: 418 }", "") + &format!("rules: {{ faults: {mode} }}\n");
        let mesh = Mesh::start(&policy).await;
        let answer = get(mesh.addr("in"), "/").await;
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"fine"[..]), "{mode}");
        let line = mesh.only("ok").await;
        assert_eq!((line["fault"].as_str(), line["dry_run"].as_str()), (fault, would), "{line}");
        assert_eq!(injected(&mesh), 0.0);
        assert_eq!(mesh.metric("hopguard_dry_run_total", &["rule=\"faults\""]), f64::from(u8::from(would.is_some())));
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_body_that_a_fault_answers_unread_does_not_confuse_the_connection() {
    let upstream = Upstream::fixed("fine").await;
    let mesh = Mesh::start(&faulty(&upstream, "abort: { status: 418 }", "")).await;
    let answer = ask(mesh.addr("in"), request("POST", "/").body(full(vec![b'x'; 100_000])).unwrap()).await;
    assert_eq!(answer.status, 418);
    mesh.stop().await;
}

#[tokio::test]
async fn the_next_hop_hears_how_much_time_a_delay_has_left() {
    let upstream = Upstream::http1(|request| async move {
        let left = request.headers()["x-envoy-expected-rq-timeout-ms"].to_str().unwrap().to_owned();
        Response::new(full(left))
    })
    .await;
    let mesh = Mesh::start(&faulty(&upstream, "delay: 400ms", "    timeouts: { request: 2s }\n")).await;
    let answer = get(mesh.addr("in"), "/").await;
    let left: u64 = std::str::from_utf8(&answer.body).unwrap().parse().unwrap();
    assert!((500..=1600).contains(&left), "{left}");
    mesh.stop().await;
}
