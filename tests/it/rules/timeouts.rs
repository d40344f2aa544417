//! Timeouts for connect, request, each try, and streams: every call ends in time, and its caller is told which rule ended it.

use std::time::Duration;

use hyper::{Request, Response};
use tokio::time::{Instant, sleep, timeout};

use crate::support::http::{
    Answer, Caller, Http1, Speaks, empty, feed, full, get, grpc, grpc_request, request, with_trailers,
};
use crate::support::upstream::{BlackHole, Upstream, policy};
use crate::support::{Mesh, SOON, eventually};

/// Asserts that so much time has gone by, and not much more.
fn took(begun: Instant, at_least: u64) {
    let elapsed = begun.elapsed();
    let least = Duration::from_millis(at_least);
    assert!(elapsed >= least && elapsed < least + SOON, "{elapsed:?} instead of {least:?}");
}

/// An upstream that takes requests and never answers.
async fn silent() -> Upstream {
    Upstream::http1(|_| std::future::pending()).await
}

#[tokio::test]
async fn an_upstream_that_takes_no_connection_is_given_up_after_connect() {
    let hole = BlackHole::open();
    let mesh = Mesh::start(&policy(hole.addr(), "    timeouts: { connect: 150ms, request: 5s }")).await;
    let begun = Instant::now();
    let answer = get(mesh.addr("in"), "/").await;
    took(begun, 150);
    assert_eq!(answer.status, 504);
    let line = mesh.refused(&answer, "connect_timeout", "timeouts.connect", "150ms").await;
    assert_eq!(line["refusal"]["origin"], "policy.yaml:10", "{line}");
    assert_eq!(line["endpoint"], hole.addr().to_string());
    assert!(answer.problem()["detail"].as_str().unwrap().contains("accepted none"), "{answer:?}");
    eventually(|| (mesh.metric("hopguard_pool_connect_failures_total", &["app"]) == 1.0).then_some(())).await;
    mesh.stop().await;
}

#[tokio::test]
async fn an_endpoint_that_takes_no_connection_costs_connect_and_not_the_call() {
    let (hole, here) = (BlackHole::open(), Upstream::fixed("here").await);
    let both = format!("{}\", \"{}", hole.addr(), here.addr);
    let more = "    ejection: off\n    retry: off\n    timeouts: { connect: 150ms, request: 8s }";
    let text = policy("127.0.0.1:1".parse().unwrap(), more).replace("127.0.0.1:1", &both);
    let mesh = Mesh::start(&text).await;
    let failed = || mesh.metric("hopguard_pool_connect_failures_total", &["app"]);
    let is_tried = || failed() + mesh.metric("hopguard_pool_pending_connections", &["app"]) > 0.0;
    let mut calls = 0;
    // Both are as good as each other until the hole has been met.
    while !is_tried() {
        assert_eq!(get(mesh.addr("in"), "/").await.body, "here");
        calls += 1;
        assert!(calls < 64, "the hole is never met");
    }
    eventually(|| (failed() == 1.0).then_some(())).await;
    mesh.ended("ok", calls).await;
    assert_eq!((mesh.count("ok") as usize, mesh.count("connect_timeout")), (calls, 0.0));
    let lines: Vec<serde_json::Value> = mesh.log().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().filter(|line| line["endpoint"] == here.addr.to_string()).count(), calls, "{lines:#?}");
    mesh.stop().await;
}

#[tokio::test]
async fn when_no_endpoint_takes_a_connection_the_last_one_is_named() {
    let holes = [BlackHole::open(), BlackHole::open()];
    let both = format!("{}\", \"{}", holes[0].addr(), holes[1].addr());
    let more = "    retry: off\n    timeouts: { connect: 150ms, request: 8s }";
    let text = policy("127.0.0.1:1".parse().unwrap(), more).replace("127.0.0.1:1", &both);
    let mesh = Mesh::start(&text).await;
    let begun = Instant::now();
    let answer = get(mesh.addr("in"), "/").await;
    took(begun, 150);
    assert_eq!(answer.status, 504);
    let line = mesh.refused(&answer, "connect_timeout", "timeouts.connect", "150ms").await;
    let last = line["endpoint"].as_str().unwrap();
    assert!(answer.problem()["detail"].as_str().unwrap().contains(last), "{answer:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn connect_includes_the_tls_handshake() {
    let upstream = Upstream::bytes(|stream| async move {
        let _open = stream;
        std::future::pending::<()>().await;
    })
    .await;
    let more = "    tls: { serverName: app.test }\n    timeouts: { connect: 200ms, request: 5s }";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let begun = Instant::now();
    let answer = get(mesh.addr("in"), "/").await;
    took(begun, 200);
    assert_eq!(answer.status, 504);
    mesh.refused(&answer, "connect_timeout", "timeouts.connect", "200ms").await;
    mesh.stop().await;
}

#[tokio::test]
async fn grpc_hears_of_a_connect_timeout_as_a_deadline() {
    let hole = BlackHole::open();
    let mesh = Mesh::start(&policy(hole.addr(), "    timeouts: { connect: 150ms, request: 5s }")).await;
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
    assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, "4"), "{answer:?}");
    let line = mesh.refused(&answer, "connect_timeout", "timeouts.connect", "150ms").await;
    assert_eq!((&line["grpc_status"], &line["protocol"]), (&"DEADLINE_EXCEEDED".into(), &"grpc".into()), "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_head_that_does_not_come_is_a_504_that_names_rule_value_and_line() {
    let upstream = silent().await;
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let more = "    protocol: http1\n    timeouts: { request: 300ms }";
        let mesh = Mesh::start(&policy(upstream.addr, more)).await;
        let begun = Instant::now();
        let answer =
            Caller::open(speaks, mesh.addr("in")).await.ask(Request::get("/slow").body(empty()).unwrap()).await;
        took(begun, 300);
        assert_eq!(answer.status, 504);
        let line = mesh.refused(&answer, "request_timeout", "timeouts.request", "300ms").await;
        assert_eq!(line["refusal"]["origin"], "policy.yaml:11", "{line}");
        assert_eq!(line["refusal"]["closed_by"], "hopguard", "{line}");
        assert!(answer.header("proxy-status").contains("error=http_response_timeout"), "{answer:?}");
        assert!(line["duration_ms"].as_f64() >= Some(300.0), "{line}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn the_upstream_hears_that_its_answer_is_not_waited_for() {
    let (asked, body) = (std::sync::Arc::new(tokio::sync::Notify::new()), feed());
    let body = std::sync::Arc::new(std::sync::Mutex::new(Some(body.1)));
    let left = std::sync::Arc::clone(&asked);
    let upstream = Upstream::http1(move |_| {
        let (left, body) = (std::sync::Arc::clone(&left), body.lock().unwrap().take());
        let guard = Told(left);
        async move {
            let _guard = guard;
            if body.is_some() { std::future::pending().await } else { Response::new(full("second")) }
        }
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 300ms }")).await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    assert_eq!(caller.ask(request("GET", "/").body(empty()).unwrap()).await.status, 504);
    timeout(SOON, asked.notified()).await.expect("the upstream still works on it");
    let second = caller.ask(request("GET", "/").body(empty()).unwrap()).await;
    assert_eq!(second.body, "second", "the caller's connection lives on");
    mesh.stop().await;
}

/// Tells the test when it is dropped.
struct Told(std::sync::Arc<tokio::sync::Notify>);

impl Drop for Told {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

/// An upstream whose answer begins, with this content type, and then goes on as `go_on` says.
async fn begins<F>(content_type: &'static str, http2: bool, go_on: fn(crate::support::http::Feed) -> F) -> Upstream
where
    F: Future<Output = ()> + Send + 'static,
{
    let handler = move |_| async move {
        let (pieces, body) = feed();
        tokio::spawn(async move {
            // For gRPC that is the beginning of a message.
            pieces.send(if content_type == "application/grpc" { "\0\0\0\0\x09half" } else { "begin" }).await;
            go_on(pieces).await;
        });
        Response::builder().header("content-type", content_type).body(body).unwrap()
    };
    if http2 { Upstream::http2(handler).await } else { Upstream::http1(handler).await }
}

#[tokio::test]
async fn a_body_that_goes_on_too_long_is_cut() {
    let upstream = begins("text/plain", false, |pieces| async move { pieces.unwanted().await }).await;
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let more = "    protocol: http1\n    timeouts: { request: 400ms }";
        let mesh = Mesh::start(&policy(upstream.addr, more)).await;
        let begun = Instant::now();
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let response = caller.send(Request::get("/").body(empty()).unwrap()).await.unwrap();
        assert_eq!(response.status(), 200);
        let cut = timeout(SOON, Answer::read(response)).await.expect("the body does not end");
        assert!(cut.is_err(), "a cut body must not look whole: {cut:?}");
        took(begun, 400);
        let line = mesh.only("request_timeout").await;
        assert_eq!((&line["status"], &line["bytes_out"]), (&200.into(), &5.into()), "{line}");
        assert_eq!(line["refusal"]["rule"], "timeouts.request", "{line}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_grpc_message_that_takes_too_long_ends_with_trailers() {
    let upstream = begins("application/grpc", true, |pieces| async move { pieces.unwanted().await }).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 400ms }")).await;
    let begun = Instant::now();
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
    took(begun, 400);
    assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"\0\0\0\0\x09half"[..]));
    let trailers = answer.trailers.expect("the status stands in trailers");
    assert_eq!(trailers["grpc-status"], "4");
    let message = trailers["grpc-message"].to_str().unwrap();
    assert!(message.contains("timeouts.request") && message.contains("400ms"), "{message}");
    let line = mesh.only("request_timeout").await;
    assert_eq!(line["grpc_status"], "DEADLINE_EXCEEDED", "{line}");
    assert_eq!(line["grpc_message"], message, "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_grpc_call_whose_messages_go_on_is_a_stream() {
    let upstream = Upstream::http2(|_| async {
        let (pieces, body) = feed();
        tokio::spawn(async move {
            for _ in 0..4 {
                pieces.send("\0\0\0\0\x01x").await;
                sleep(Duration::from_millis(200)).await;
            }
            pieces.trailers(&[("grpc-status", "0")]).await;
        });
        Response::builder().header("content-type", "application/grpc").body(body).unwrap()
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 300ms }")).await;
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Watch").await;
    assert_eq!((answer.grpc_status(), answer.body.len()), ("0", 24), "{answer:?}");
    let line = mesh.only("ok").await;
    assert_eq!(line["grpc_status"], "OK", "{line}");
    assert!(line["duration_ms"].as_f64() >= Some(800.0), "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn the_first_message_of_a_declared_grpc_stream_may_come_after_request() {
    // Head and first message come together, as from grpcio.
    let upstream = Upstream::http2(|_| async {
        sleep(Duration::from_millis(600)).await;
        let body = with_trailers(&b"\0\0\0\0\x01x"[..], &[("grpc-status", "0")]);
        Response::builder().header("content-type", "application/grpc").body(body).unwrap()
    })
    .await;
    let more = "    timeouts: { request: 300ms }
    routes:
      - { name: watch, match: { grpc: shop.v1.Payment/Watch }, stream: true }";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Watch").await;
    assert_eq!((answer.grpc_status(), answer.body.len()), ("0", 6), "{answer:?}");
    assert_eq!(mesh.only("ok").await["grpc_status"], "OK");
    mesh.stop().await;
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Other").await;
    assert_eq!(answer.grpc_status(), "4", "{answer:?}");
    let message = answer.header("grpc-message");
    assert!(message.contains("`stream: true`") && message.contains("timeouts.request"), "{answer:?}");
    let line = mesh.only("request_timeout").await;
    assert_eq!(line["grpc_status"], "DEADLINE_EXCEEDED", "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_grpc_answer_without_a_message_is_bound_to_the_request_timeout() {
    let upstream = Upstream::http2(|_| async {
        let (pieces, body) = feed();
        tokio::spawn(async move { pieces.unwanted().await });
        Response::builder().header("content-type", "application/grpc").body(body).unwrap()
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 300ms }")).await;
    let begun = Instant::now();
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
    took(begun, 300);
    assert_eq!(answer.grpc_status(), "4", "{answer:?}");
    assert_eq!(mesh.only("request_timeout").await["grpc_status"], "DEADLINE_EXCEEDED");
    mesh.stop().await;
}

#[tokio::test]
async fn a_try_may_be_shorter_than_the_call() {
    let upstream = silent().await;
    let more = "    routes:\n      - { name: pay, match: { path: /pay }, timeouts: { request: 5s, perTry: 250ms } }";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let begun = Instant::now();
    let answer = get(mesh.addr("in"), "/pay").await;
    took(begun, 250);
    assert_eq!(answer.status, 504);
    let line = mesh.refused(&answer, "per_try_timeout", "timeouts.perTry", "250ms").await;
    assert_eq!((&line["route"], &line["refusal"]["origin"]), (&"pay".into(), &"policy.yaml:11".into()), "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn events_live_longer_than_a_request_until_they_fall_silent() {
    let upstream = begins("text/event-stream", false, |pieces| async move {
        for _ in 0..6 {
            sleep(Duration::from_millis(150)).await;
            pieces.send("more.").await;
        }
        pieces.unwanted().await;
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 300ms, idle: 700ms }")).await;
    let begun = Instant::now();
    let mut caller = Http1::open(mesh.addr("in")).await;
    let response = caller.send(request("GET", "/").body(empty()).unwrap()).await.unwrap();
    assert!(timeout(SOON, Answer::read(response)).await.expect("it is not cut").is_err());
    took(begun, 6 * 150 + 700);
    let line = mesh.only("idle_timeout").await;
    assert_eq!(
        (&line["refusal"]["rule"], &line["refusal"]["value"]),
        (&"timeouts.idle".into(), &"700ms".into()),
        "{line}"
    );
    assert_eq!(line["bytes_out"], 35, "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_busy_stream_ends_with_its_longest_life() {
    let upstream = begins("text/plain", false, |pieces| async move {
        while pieces.send("more.").await {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let more = "    timeouts: { request: 200ms, maxDuration: 800ms }
    routes:
      - { name: feed, match: { path: /feed }, stream: true }";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let begun = Instant::now();
    let mut caller = Http1::open(mesh.addr("in")).await;
    let response = caller.send(request("GET", "/feed").body(empty()).unwrap()).await.unwrap();
    assert!(timeout(SOON, Answer::read(response)).await.expect("it is not cut").is_err());
    took(begun, 800);
    let line = mesh.only("max_duration").await;
    let refusal = &line["refusal"];
    assert_eq!((&refusal["rule"], &refusal["value"]), (&"timeouts.maxDuration".into(), &"800ms".into()), "{line}");
    assert_eq!(refusal["origin"], "policy.yaml:10", "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_grpc_stream_that_falls_silent_ends_with_trailers() {
    let upstream = begins("application/grpc", true, |pieces| async move { pieces.unwanted().await }).await;
    let more = "    timeouts: { request: 200ms, idle: 500ms }
    routes:
      - { name: watch, match: { grpc: shop.v1.Payment/Watch }, stream: true }";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let begun = Instant::now();
    let (messages, body) = feed();
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    messages.send(&b"\0\0\0\0\0"[..]).await;
    let answer = caller.ask(grpc_request("/shop.v1.Payment/Watch", body)).await;
    took(begun, 500);
    assert_eq!(answer.grpc_status(), "4", "{answer:?}");
    let line = mesh.only("idle_timeout").await;
    assert_eq!(line["grpc_status"], "DEADLINE_EXCEEDED", "{line}");
    assert!(line["grpc_message"].as_str().is_some_and(|message| message.contains("timeouts.idle")), "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn the_head_of_a_stream_is_still_bound_to_the_request_timeout() {
    let upstream = silent().await;
    let more = "    timeouts: { request: 250ms }\n    routes: [{ name: feed, match: { path: /feed }, stream: true }]";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let answer = get(mesh.addr("in"), "/feed").await;
    assert_eq!(answer.status, 504);
    mesh.refused(&answer, "request_timeout", "timeouts.request", "250ms").await;
    mesh.stop().await;
}

#[tokio::test]
async fn no_policy_can_leave_a_call_without_a_timeout() {
    let upstream = silent().await;
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    let begun = Instant::now();
    let answer = get(mesh.addr("in"), "/").await;
    took(begun, 2000);
    let line = mesh.refused(&answer, "request_timeout", "timeouts.request", "2s").await;
    assert_eq!(line["refusal"]["origin"], "built in", "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_caller_that_leaves_takes_its_call_along() {
    let left = std::sync::Arc::new(tokio::sync::Notify::new());
    let notify = std::sync::Arc::clone(&left);
    let upstream = Upstream::http1(move |_| {
        let told = Told(std::sync::Arc::clone(&notify));
        async move {
            let _told = told;
            std::future::pending::<()>().await;
            Response::new(empty())
        }
    })
    .await;
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let more = "    protocol: http1\n    timeouts: { request: 20s }";
        let mesh = Mesh::start(&policy(upstream.addr, more)).await;
        let before = upstream.requests();
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let call = tokio::spawn(async move { caller.send(Request::get("/").body(empty()).unwrap()).await.map(drop) });
        eventually(|| (upstream.requests() > before).then_some(())).await;
        call.abort();
        timeout(SOON, left.notified()).await.expect("the upstream still works on it");
        let line = mesh.only("caller_gone").await;
        assert_eq!(line["destination"], "app", "{line}");
        mesh.stop().await;
    }
}
