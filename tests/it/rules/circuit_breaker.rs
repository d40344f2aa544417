//! The circuit breaker of a destination: which outcomes open it, the local reply while it is open, and its probes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::SeqCst};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Request, Response};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use crate::support::http::{Answer, Body, Http1, empty, feed, full, get, grpc, raw, request};
use crate::support::program::Program;
use crate::support::upstream::{Gate, Upstream, nobody, policy};
use crate::support::{Mesh, SOON, eventually};

/// Long enough that no test sees the end of it, unless it wants to.
const LONG: &str = "    circuitBreaker: { openFor: 20s, openForMax: 20s }";

/// An upstream whose status the test sets; what is asked for `/held` waits at the gate.
struct Shop {
    upstream: Upstream,
    status: Arc<AtomicU16>,
    gate: Gate,
}

impl Shop {
    async fn open(status: u16) -> Self {
        let (status, gate) = (Arc::new(AtomicU16::new(status)), Gate::closed());
        let (now, held) = (Arc::clone(&status), gate.clone());
        let upstream = Upstream::http1(move |request: Request<Incoming>| {
            let (now, held) = (Arc::clone(&now), held.clone());
            async move {
                if request.uri().path() == "/held" {
                    held.pass().await;
                }
                Response::builder().status(now.load(SeqCst)).body(full("shop")).unwrap()
            }
        })
        .await;
        Self { upstream, status, gate }
    }

    fn turn(&self, status: u16) {
        self.status.store(status, SeqCst);
    }

    async fn mesh(&self, more: &str) -> Mesh {
        Mesh::start(&policy(self.upstream.addr, more)).await
    }
}

pub(crate) fn changes(mesh: &Mesh, to: &str) -> f64 {
    mesh.metric("hopguard_circuit_breaker_changes_total", &["app", &format!("state=\"{to}\"")])
}

pub(crate) fn state(mesh: &Mesh) -> f64 {
    mesh.metric("hopguard_circuit_breaker_state", &["app"])
}

/// So many calls, one after the other, that the upstream answers with this status.
pub(crate) async fn fail(mesh: &Mesh, times: usize, status: u16) {
    for _ in 0..times {
        assert_eq!(get(mesh.addr("in"), "/").await.status, status);
    }
}

/// The next call finds the breaker open.
async fn finds_it_open(mesh: &Mesh, what: &str) -> Answer {
    let answer = get(mesh.addr("in"), "/").await;
    assert_eq!(answer.status, 503, "{what}: {answer:?}");
    assert_eq!(answer.problem()["refusal"], "circuit_open", "{what}");
    assert_eq!((state(mesh), changes(mesh, "open")), (2.0, 1.0), "{what}");
    answer
}

/// The breaker has never opened.
fn is_closed(mesh: &Mesh, what: &str) {
    assert_eq!((state(mesh), changes(mesh, "open"), mesh.count("circuit_open")), (0.0, 0.0, 0.0), "{what}");
}

#[tokio::test]
async fn after_five_failures_in_a_row_callers_are_answered_at_once_and_told_why() {
    let shop = Shop::open(500).await;
    let mesh = shop.mesh("    circuitBreaker: { openFor: 20s, openForMax: 20s, consecutiveFailures: 5 }").await;
    fail(&mesh, 4, 500).await;
    assert_eq!(changes(&mesh, "open"), 0.0, "four are not enough");
    fail(&mesh, 1, 500).await;
    let answer = finds_it_open(&mesh, "five in a row").await;
    let seconds: u64 = answer.header("retry-after").parse().unwrap();
    assert!((9..=20).contains(&seconds), "half of openFor to the whole of it: {seconds}");
    assert!(answer.header("proxy-status").contains("error=destination_unavailable"), "{answer:?}");
    let line = mesh.refused(&answer, "circuit_open", "circuitBreaker.consecutiveFailures", "5").await;
    assert_eq!(line["refusal"]["origin"], "policy.yaml:10", "{line}");
    assert_eq!(line["refusal"]["closed_by"], "hopguard", "{line}");
    assert_eq!(line["upstream_ms"], Value::Null, "{line}");
    assert_eq!(shop.upstream.requests(), 5);
    mesh.stop().await;
}

#[tokio::test]
async fn without_the_rule_every_call_goes_to_the_upstream_that_fails() {
    let shop = Shop::open(500).await;
    for more in [format!("{LONG}\nrules: {{ circuitBreaker: off }}"), "    circuitBreaker: off".to_owned()] {
        let (mesh, before) = (shop.mesh(&more).await, shop.upstream.requests());
        fail(&mesh, 20, 500).await;
        assert_eq!(shop.upstream.requests(), before + 20);
        is_closed(&mesh, &more);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn in_warn_every_call_goes_through_and_those_that_would_not_are_counted() {
    let shop = Shop::open(500).await;
    let mesh = shop.mesh(&format!("{LONG}\nrules: {{ circuitBreaker: dryRun }}")).await;
    fail(&mesh, 8, 500).await;
    assert_eq!(shop.upstream.requests(), 8);
    assert_eq!(mesh.count("circuit_open"), 0.0);
    assert_eq!(mesh.metric("hopguard_dry_run_total", &["rule=\"circuit_breaker\"", "app"]), 3.0);
    mesh.ended("server_error", 8).await;
    eventually(|| (mesh.log().len() == 8).then_some(())).await;
    let would = mesh.log().iter().filter(|line| line.contains("\"dry_run\":\"circuit_breaker\"")).count();
    assert_eq!(would, 3, "{:#?}", mesh.log());
    assert_eq!((state(&mesh), changes(&mesh, "open")), (2.0, 1.0), "in a dry run its state is shown as well");
    mesh.stop().await;
}

#[tokio::test]
async fn a_success_in_between_begins_the_count_again() {
    let shop = Shop::open(500).await;
    let mesh = shop.mesh(LONG).await;
    for _ in 0..3 {
        shop.turn(500);
        fail(&mesh, 4, 500).await;
        shop.turn(200);
        fail(&mesh, 1, 200).await;
    }
    is_closed(&mesh, "four in a row, three times");
    mesh.stop().await;
}

#[tokio::test]
async fn what_is_a_failure_of_the_callee_opens_it_and_what_is_not_does_not() {
    let shop = Shop::open(500).await;
    for status in [500, 502, 503, 504, 507, 599] {
        shop.turn(status);
        let mesh = shop.mesh(&format!("    retry: off\n{LONG}")).await;
        fail(&mesh, 5, status).await;
        finds_it_open(&mesh, &format!("{status}")).await;
        mesh.stop().await;
    }
    for status in [200, 304, 400, 404, 408, 409, 429, 499, 501, 505] {
        shop.turn(status);
        let mesh = shop.mesh(&format!("    retry: off\n{LONG}")).await;
        fail(&mesh, 8, status).await;
        is_closed(&mesh, &format!("{status}"));
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_code_that_says_nothing_about_the_callee_opens_nothing_for_grpc_either() {
    let code = Arc::new(AtomicU16::new(0));
    let now = Arc::clone(&code);
    let upstream = Upstream::http2(move |_| {
        let now = now.load(SeqCst);
        let answer = Response::builder().header("content-type", "application/grpc").header("grpc-status", now);
        async move { answer.body(empty()).unwrap() }
    })
    .await;
    for (status, is_failure) in [
        (0, false),
        (1, false),
        (2, true),
        (3, false),
        (4, true),
        (5, false),
        (6, false),
        (7, false),
        (8, false),
        (9, false),
        (10, false),
        (11, false),
        (12, false),
        (13, true),
        (14, true),
        (15, true),
        (16, false),
    ] {
        code.store(status, SeqCst);
        let mesh = Mesh::start(&policy(upstream.addr, &format!("    protocol: http2\n    retry: off\n{LONG}"))).await;
        let before = upstream.requests();
        for _ in 0..5 {
            assert_eq!(grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await.grpc_status(), status.to_string());
        }
        let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
        if is_failure {
            assert_eq!(upstream.requests(), before + 5, "{status}");
            tells_grpc(&mesh, &answer).await;
        } else {
            assert_eq!(upstream.requests(), before + 6, "{status}");
            is_closed(&mesh, &format!("{status}"));
        }
        mesh.stop().await;
    }
}

#[tokio::test]
async fn the_policy_says_which_grpc_codes_are_failures() {
    let code = Arc::new(AtomicU16::new(0));
    let now = Arc::clone(&code);
    let upstream = Upstream::http2(move |_| {
        let now = now.load(SeqCst);
        let answer = Response::builder().header("content-type", "application/grpc").header("grpc-status", now);
        async move { answer.body(empty()).unwrap() }
    })
    .await;
    let codes = "grpcFailures: [resource_exhausted, aborted]";
    let breaker = format!("    circuitBreaker: {{ openFor: 20s, openForMax: 20s, {codes} }}");
    // The list holds for ejection too, also where the breaker is off.
    let ejection = "    circuitBreaker: off\n    ejection: { consecutiveFailures: 5, ejectFor: 20s }".to_owned();
    for (status, is_failure) in [(8, true), (10, true), (14, false), (2, false), (77, true)] {
        code.store(status, SeqCst);
        for rule in [&breaker, &ejection] {
            let text = policy(upstream.addr, &format!("    protocol: http2\n    retry: off\n{rule}"));
            let defaults = format!("defaults: {{ circuitBreaker: {{ {codes} }} }}\ndestinations:");
            let mesh = Mesh::start(&text.replace("destinations:", &defaults)).await;
            for _ in 0..5 {
                assert_eq!(grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await.grpc_status(), status.to_string());
            }
            if rule == &ejection {
                // The last endpoint is never ejected.
                let kept = mesh.metric("hopguard_ejections_total", &["app", "result=\"kept\""]);
                assert_eq!(kept, f64::from(u8::from(is_failure)), "{status}\n{}", mesh.metrics().await);
            } else if is_failure {
                tells_grpc(&mesh, &grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await).await;
            } else {
                is_closed(&mesh, &format!("{status}"));
            }
            mesh.stop().await;
        }
    }
}

/// UNAVAILABLE, and when to come again.
async fn tells_grpc(mesh: &Mesh, answer: &Answer) {
    assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, "14"), "{answer:?}");
    let millis: u64 = answer.header("grpc-retry-pushback-ms").parse().unwrap();
    assert!((9_000..=20_000).contains(&millis), "{millis}");
    let line = mesh.refused(answer, "circuit_open", "circuitBreaker.consecutiveFailures", "5").await;
    assert_eq!(line["grpc_status"], "UNAVAILABLE", "{line}");
    assert_eq!((state(mesh), changes(mesh, "open")), (2.0, 1.0));
}

#[tokio::test]
async fn a_code_in_the_trailers_counts_like_one_in_the_head() {
    let upstream = Upstream::http2(|_| async {
        let body = crate::support::http::with_trailers(&b"\0\0\0\0\0"[..], &[("grpc-status", "13")]);
        Response::builder().header("content-type", "application/grpc").body(body).unwrap()
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, &format!("    protocol: http2\n{LONG}"))).await;
    for _ in 0..5 {
        assert_eq!(grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await.grpc_status(), "13");
    }
    tells_grpc(&mesh, &grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await).await;
    assert_eq!(upstream.requests(), 5);
    mesh.stop().await;
}

/// Five calls that end so, then one that finds the breaker open; `reached` tells how often the upstream was called.
async fn opened_by(outcome: &str, mesh: Mesh, reached: impl Fn() -> usize) {
    for _ in 0..5 {
        let _answer = raw(mesh.addr("in"), b"GET / HTTP/1.1\r\nHost: shop.test\r\nConnection: close\r\n\r\n").await;
    }
    mesh.ended(outcome, 5).await;
    let before = reached();
    let answer = finds_it_open(&mesh, outcome).await;
    mesh.refused(&answer, "circuit_open", "circuitBreaker.consecutiveFailures", "5").await;
    assert_eq!(reached(), before, "{outcome}");
    mesh.stop().await;
}

/// An upstream that reads a request and does the rest with bytes.
async fn bytes(answer: &'static str) -> Upstream {
    Upstream::bytes(move |mut stream: TcpStream| async move {
        let mut head = [0; 4096];
        let _read = stream.read(&mut head).await;
        let _written = stream.write_all(answer.as_bytes()).await;
    })
    .await
}

#[tokio::test]
async fn timeouts_count() {
    let silent = Upstream::http1(|_| std::future::pending()).await;
    for (timeouts, outcome) in [("request: 60ms", "request_timeout"), ("request: 5s, perTry: 60ms", "per_try_timeout")]
    {
        let more = format!("    retry: off\n    timeouts: {{ {timeouts} }}\n{LONG}");
        opened_by(outcome, Mesh::start(&policy(silent.addr, &more)).await, || silent.requests()).await;
    }
}

#[tokio::test]
async fn a_body_that_stops_counts() {
    let stalled = Upstream::bytes(|mut stream: TcpStream| async move {
        let mut head = [0; 4096];
        let _read = stream.read(&mut head).await;
        let _written = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf").await;
        std::future::pending::<()>().await;
    })
    .await;
    let more = format!("    timeouts: {{ request: 80ms }}\n{LONG}");
    opened_by("request_timeout", Mesh::start(&policy(stalled.addr, &more)).await, || stalled.connections()).await;
    let cut = bytes("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf").await;
    opened_by("upstream_cut", Mesh::start(&policy(cut.addr, LONG)).await, || cut.connections()).await;
}

#[tokio::test]
async fn resets_and_nonsense_count() {
    let reset = bytes("").await;
    opened_by("upstream_reset", Mesh::start(&policy(reset.addr, LONG)).await, || reset.connections()).await;
    let nonsense = bytes("what is this\r\n\r\n").await;
    opened_by("upstream_protocol", Mesh::start(&policy(nonsense.addr, LONG)).await, || nonsense.connections()).await;
}

#[tokio::test]
async fn refused_connections_count() {
    opened_by("connect_failed", Mesh::start(&policy(nobody(), LONG)).await, || 0).await;
}

#[tokio::test]
async fn a_caller_that_goes_away_is_not_a_failure_of_the_callee() {
    let shop = Shop::open(200).await;
    let mesh = shop.mesh(LONG).await;
    for gone in 1..=8 {
        let to = mesh.addr("in");
        let call = tokio::spawn(async move { get(to, "/held").await });
        eventually(|| (shop.upstream.requests() == gone).then_some(())).await;
        call.abort();
        mesh.ended("caller_gone", gone).await;
    }
    fail(&mesh, 1, 200).await;
    is_closed(&mesh, "eight callers left");
    mesh.stop().await;
}

#[tokio::test]
async fn a_caller_that_is_slow_is_not_a_failure_of_the_callee() {
    let shop = Shop::open(200).await;
    let mesh = shop.mesh(&format!("    timeouts: {{ request: 60ms }}\n{LONG}")).await;
    for _ in 0..6 {
        let (_feed, body) = feed();
        let mut caller = Http1::open(mesh.addr("in")).await;
        let begun = caller.send(slow(body)).await;
        assert!(begun.is_ok_and(|answer| answer.status() == 408));
    }
    mesh.ended("caller_timeout", 6).await;
    fail(&mesh, 1, 200).await;
    is_closed(&mesh, "six callers were slow");
    mesh.stop().await;
}

/// For `/held`, so that the upstream does not answer before it has the body.
fn slow(body: Body) -> Request<Body> {
    request("POST", "/held").header("content-length", "5").body(body).unwrap()
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_close_it_either() {
    let shop = Shop::open(500).await;
    let mesh = shop.mesh("    circuitBreaker: { openFor: 200ms, openForMax: 200ms, probes: 1 }").await;
    fail(&mesh, 5, 500).await;
    sleep(Duration::from_millis(250)).await;
    let to = mesh.addr("in");
    let probe = tokio::spawn(async move { get(to, "/held").await });
    eventually(|| (shop.upstream.requests() == 6).then_some(())).await;
    probe.abort();
    mesh.ended("caller_gone", 1).await;
    assert_eq!((changes(&mesh, "closed"), state(&mesh)), (0.0, 1.0), "half-open still");
    shop.turn(200);
    assert_eq!(get(mesh.addr("in"), "/").await.status, 200, "its place is free at once");
    assert_eq!((changes(&mesh, "closed"), state(&mesh)), (1.0, 0.0));
    mesh.stop().await;
}

#[tokio::test]
async fn a_few_calls_find_out_whether_the_destination_is_back() {
    let shop = Shop::open(500).await;
    let mesh = shop.mesh("    circuitBreaker: { openFor: 200ms, openForMax: 2s, probes: 2 }").await;
    fail(&mesh, 5, 500).await;
    shop.turn(200);
    sleep(Duration::from_millis(250)).await;
    let to = mesh.addr("in");
    let mut calls = Vec::new();
    for _ in 0..30 {
        calls.push(tokio::spawn(async move { get(to, "/held").await }));
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(shop.upstream.requests(), 7, "two of thirty got through");
    assert_eq!((changes(&mesh, "half_open"), state(&mesh)), (1.0, 1.0));
    mesh.ended("circuit_open", 28).await;
    shop.gate.release(2);
    let mut good = 0;
    for call in calls {
        good += usize::from(call.await.unwrap().status == 200);
    }
    assert_eq!(good, 2);
    assert_eq!((changes(&mesh, "closed"), state(&mesh)), (1.0, 0.0));
    fail(&mesh, 20, 200).await;
    assert_eq!(mesh.count("circuit_open"), 28.0);
    mesh.stop().await;
}

#[tokio::test]
async fn probes_that_say_nothing_do_not_keep_a_destination_closed_that_is_back() {
    let shop = Shop::open(500).await;
    let more = "    circuitBreaker: { openFor: 20ms, openForMax: 40ms, probes: 2 }\n    timeouts: { request: 50s }";
    let mesh = shop.mesh(more).await;
    fail(&mesh, 5, 500).await;
    shop.turn(200);
    let to = mesh.addr("in");
    let mut held = Vec::new();
    // Whoever is refused asks again, until two are probes and wait.
    while shop.upstream.requests() < 7 {
        held.push(tokio::spawn(get(to, "/held")));
        sleep(Duration::from_millis(5)).await;
    }
    let begun = Instant::now();
    while get(to, "/").await.status != 200 {
        assert!(begun.elapsed() < SOON, "still refused");
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!((changes(&mesh, "closed"), state(&mesh)), (1.0, 0.0));
    shop.gate.release(held.len());
    for call in held {
        drop(call.await.unwrap());
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_share_of_failures_opens_it_where_there_were_enough_calls() {
    let shop = Shop::open(200).await;
    let text =
        "    circuitBreaker:\n      openFor: 20s\n      openForMax: 20s\n      failureRate: 0.5\n      minRequests: 10";
    let mesh = shop.mesh(text).await;
    for status in [500, 200, 500, 200, 500, 200, 500, 200, 200] {
        shop.turn(status);
        fail(&mesh, 1, status).await;
    }
    is_closed(&mesh, "nine calls, four of them failures");
    shop.turn(500);
    fail(&mesh, 1, 500).await;
    let answer = finds_it_open(&mesh, "ten calls, five of them failures").await;
    let line = mesh.refused(&answer, "circuit_open", "circuitBreaker.failureRate", "0.5").await;
    assert_eq!(line["refusal"]["origin"], "policy.yaml:13", "{line}");
    assert_eq!(shop.upstream.requests(), 10);
    mesh.stop().await;
    // The same calls with fewer than a half.
    let mesh = shop.mesh(&text.replace("0.5", "0.6")).await;
    for status in [500, 200, 500, 200, 500, 200, 500, 200, 200, 500, 500, 200, 500] {
        shop.turn(status);
        fail(&mesh, 1, status).await;
    }
    is_closed(&mesh, "seven of thirteen are less than 0.6");
    mesh.stop().await;
}

#[tokio::test]
async fn all_workers_share_it() {
    let shop = Shop::open(500).await;
    let mesh = Mesh::with(&policy(shop.upstream.addr, LONG), |settings| settings.workers = 2).await;
    fail(&mesh, 5, 500).await;
    // Each over a connection of its own, which the kernel hands to either worker.
    for _ in 0..30 {
        assert_eq!(get(mesh.addr("in"), "/").await.problem()["refusal"], "circuit_open");
    }
    assert_eq!(shop.upstream.requests(), 5);
    assert_eq!((changes(&mesh, "open"), mesh.count("circuit_open")), (1.0, 30.0));
    mesh.stop().await;
}

#[tokio::test]
async fn a_reload_neither_forgets_failures_nor_closes_it() {
    let shop = Shop::open(500).await;
    let text = |more: &str| policy(shop.upstream.addr, &format!("{LONG}\n{more}"));
    let mesh = Mesh::start(&text("")).await;
    fail(&mesh, 4, 500).await;
    mesh.reload(&text("    timeouts: { request: 1900ms }")).await;
    fail(&mesh, 1, 500).await;
    finds_it_open(&mesh, "four before the reload and one after").await;
    for more in
        ["    limits: { inFlight: 7 }", "    timeouts: { request: 1800ms }", "    ejection: off", "    retry: off"]
    {
        mesh.reload(&text(more)).await;
        finds_it_open(&mesh, more).await;
    }
    assert_eq!(shop.upstream.requests(), 5);
    // A shorter time that is written now holds now.
    mesh.reload(&policy(shop.upstream.addr, "    circuitBreaker: { openFor: 20ms, openForMax: 20ms }")).await;
    sleep(Duration::from_millis(30)).await;
    shop.turn(200);
    fail(&mesh, 1, 200).await;
    assert_eq!((changes(&mesh, "closed"), state(&mesh)), (1.0, 0.0));
    mesh.stop().await;
}

#[tokio::test]
async fn one_destination_that_fails_leaves_the_others_alone() {
    let (bad, good) = (Shop::open(500).await, Shop::open(200).await);
    let text = policy(bad.upstream.addr, LONG)
        .replace("to: app }\n", "to: app }\n  - { name: other, bind: \"127.0.0.1:0\", to: bank }\n");
    let text = format!("{text}  - name: bank\n    endpoints: [\"{}\"]\n", good.upstream.addr);
    let mesh = Mesh::start(&text).await;
    fail(&mesh, 5, 500).await;
    finds_it_open(&mesh, "five failures").await;
    for _ in 0..10 {
        assert_eq!(get(mesh.addr("other"), "/").await.status, 200);
    }
    mesh.stop().await;
}

#[tokio::test]
async fn on_the_callers_side_the_answer_tells_those_above_to_leave_it() {
    let shop = Shop::open(500).await;
    let text = policy(shop.upstream.addr, LONG).replace("to: app }", "to: app, direction: outbound }");
    let mesh = Mesh::start(&text).await;
    fail(&mesh, 5, 500).await;
    let answer = finds_it_open(&mesh, "five failures").await;
    let said = answer.header("proxy-status");
    assert!(said.contains(";hopguard-final") && said.contains(";hopguard-at=\"app\""), "{said}");
    assert!(!said.contains("hopguard-unsent"), "{said}");
    let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
    assert_eq!((answer.grpc_status(), answer.header("grpc-retry-pushback-ms")), ("14", "-1"), "{answer:?}");
    mesh.stop().await;
}

/// The changes of state that the process has logged.
fn told(program: &Program) -> Vec<Value> {
    let lines = program.log();
    let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["message"] == "the circuit breaker changed its state").collect()
}

#[tokio::test]
async fn each_change_of_state_is_told_once_with_its_cause_and_counts() {
    let shop = Shop::open(500).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.yaml");
    let more = "    circuitBreaker: { openFor: 100ms, openForMax: 10s, probes: 1 }";
    std::fs::write(&file, policy(shop.upstream.addr, more)).unwrap();
    let program = Program::run(&file, &[]).await;
    let to = program.addr("in").await.unwrap();
    while shop.upstream.requests() < 6 {
        assert!(get(to, "/").await.status.is_server_error());
        sleep(Duration::from_millis(5)).await;
    }
    shop.turn(200);
    while get(to, "/").await.status != 200 {
        sleep(Duration::from_millis(5)).await;
    }
    eventually(|| (told(&program).len() >= 5).then_some(())).await;
    let told = told(&program);
    let texts: Vec<_> = told
        .iter()
        .map(|line| ["from", "to", "cause"].map(|key| line[key].as_str().unwrap().to_owned()).join(" "))
        .collect();
    assert_eq!(
        texts,
        [
            "closed open consecutive_failures",
            "open half_open open_time_over",
            "half_open open probe_failed",
            "open half_open open_time_over",
            "half_open closed probe_succeeded",
        ]
    );
    let number = |at: usize, key: &str| told[at][key].as_u64().unwrap_or_else(|| panic!("{key} in {}", told[at]));
    assert!(told.iter().all(|line| line["destination"] == "app"), "{told:?}");
    assert_eq!((number(0, "consecutive"), number(0, "failures"), number(0, "requests")), (5, 5, 5));
    assert_eq!(number(2, "consecutive"), 6);
    assert!((50..=100).contains(&number(0, "open_for_ms")), "{}", told[0]);
    // Twice as long, less the time that the probe was waited for.
    assert!((25..=200).contains(&number(2, "open_for_ms")), "{}", told[2]);
    for (to, times) in [("open", 2.0), ("half_open", 2.0), ("closed", 1.0)] {
        let label = format!("state=\"{to}\"");
        assert_eq!(program.metric("hopguard_circuit_breaker_changes_total", &[&label]).await, times, "{to}");
    }
    assert_eq!(program.metric("hopguard_circuit_breaker_state", &["app"]).await, 0.0);
}
