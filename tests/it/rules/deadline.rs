//! The deadline of a call: read from the caller, capped by the policy, and reduced at each hop.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{HeaderMap, Request, Response};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::support::http::{Answer, Body, Caller, Feed, Speaks, ask, empty, feed, full, get, grpc_request, request};
use crate::support::upstream::{Upstream, policy};
use crate::support::{Mesh, SOON, eventually};

pub(crate) const EXPECTED: &str = "x-envoy-expected-rq-timeout-ms";
pub(crate) const CHARGE: &str = "/shop.v1.Payment/Charge";

/// Asserts that so much time has gone by; the upper bound only finds a call that hangs.
pub(crate) fn took(begun: Instant, at_least: u64) {
    let (elapsed, least) = (begun.elapsed(), Duration::from_millis(at_least));
    assert!(elapsed >= least && elapsed < least + SOON, "{elapsed:?} instead of {least:?}");
}

/// An upstream that keeps the fields of what it was asked, answers at once, and never where the path is `/slow`.
pub(crate) struct Bank {
    pub(crate) upstream: Upstream,
    /// The fields of each request.
    pub(crate) asked: Arc<Mutex<Vec<HeaderMap>>>,
}

impl Bank {
    pub(crate) async fn open(http2: bool) -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&asked);
        let handler = move |request: Request<Incoming>| {
            noted.lock().unwrap().push(request.headers().clone());
            async move {
                if request.uri().path().ends_with("/slow") {
                    std::future::pending::<()>().await;
                }
                let answer = Response::builder().header("content-type", "application/grpc").header("grpc-status", "0");
                answer.body(empty()).unwrap()
            }
        };
        let any = "127.0.0.1:0".parse().unwrap();
        Self { upstream: Upstream::on(any, handler, http2).await, asked }
    }

    /// What it was told in the last request; empty if nothing.
    pub(crate) fn told(&self, name: &str) -> String {
        let asked = self.asked.lock().unwrap();
        let value = asked.last().and_then(|fields| fields.get(name));
        value.map_or_else(String::new, |value| value.to_str().unwrap().to_owned())
    }
}

async fn expecting(to: SocketAddr, path: &str, millis: &str) -> Answer {
    ask(to, request("GET", path).header(EXPECTED, millis).body(empty()).unwrap()).await
}

async fn grpc_within(to: SocketAddr, path: &str, timeout: &str) -> Answer {
    let mut asked = grpc_request(path, full(&b"\0\0\0\0\0"[..]));
    asked.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
    Caller::open(Speaks::Http2, to).await.ask(asked).await
}

/// A `grpc-timeout` in milliseconds.
fn millis(timeout: &str) -> f64 {
    let (number, unit) = timeout.split_at(timeout.len() - 1);
    let unit = match unit {
        "S" => 1e3,
        "m" => 1.0,
        "u" => 1e-3,
        "n" => 1e-6,
        other => panic!("{other} in {timeout}"),
    };
    number.parse::<f64>().unwrap() * unit
}

#[tokio::test]
async fn a_callers_deadline_ends_the_call_and_is_named() {
    let bank = Bank::open(false).await;
    let mesh = Mesh::start(&policy(bank.upstream.addr, "    protocol: http1\n    timeouts: { request: 6s }")).await;
    let begun = Instant::now();
    let answer = expecting(mesh.addr("in"), "/slow", "200").await;
    took(begun, 200);
    assert_eq!(answer.status, 504);
    let line = mesh.refused(&answer, "deadline_exceeded", "deadline", "200ms").await;
    assert_eq!((&line["deadline_from"], &line["deadline_ms"]), (&"caller".into(), &200.0.into()), "{line}");
    assert_eq!(line["refusal"]["origin"], "asked by the caller", "{line}");
    assert!(answer.header("proxy-status").contains("error=http_response_timeout"), "{answer:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_grpc_deadline_ends_the_call_and_is_named() {
    let bank = Bank::open(true).await;
    let mesh = Mesh::start(&policy(bank.upstream.addr, "    protocol: http2\n    timeouts: { request: 6s }")).await;
    let begun = Instant::now();
    let answer = grpc_within(mesh.addr("in"), "/shop.v1.Payment/slow", "200m").await;
    took(begun, 200);
    assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, "4"), "{answer:?}");
    let line = mesh.refused(&answer, "deadline_exceeded", "deadline", "200ms").await;
    assert_eq!(
        (&line["deadline_from"], &line["grpc_status"]),
        (&"caller".into(), &"DEADLINE_EXCEEDED".into()),
        "{line}"
    );
    mesh.stop().await;
}

#[tokio::test]
async fn without_the_rule_a_call_takes_as_long_as_the_policy_lets_it() {
    let bank = Bank::open(false).await;
    let more = "    timeouts: { request: 700ms }\nrules: { deadline: off }";
    let mesh = Mesh::start(&policy(bank.upstream.addr, more)).await;
    let begun = Instant::now();
    let answer = expecting(mesh.addr("in"), "/slow", "100").await;
    took(begun, 700);
    let line = mesh.refused(&answer, "request_timeout", "timeouts.request", "700ms").await;
    assert_eq!(line["deadline_ms"], Value::Null, "{line}");
    assert_eq!(bank.told(EXPECTED), "100", "passed on as it came");
    mesh.stop().await;
}

#[tokio::test]
async fn in_warn_the_call_goes_on_and_is_counted_as_late() {
    let bank = Bank::open(false).await;
    let more = "    timeouts: { request: 500ms }\nrules: { deadline: dryRun }";
    let mesh = Mesh::start(&policy(bank.upstream.addr, more)).await;
    let answer = expecting(mesh.addr("in"), "/slow", "100").await;
    let line = mesh.refused(&answer, "request_timeout", "timeouts.request", "500ms").await;
    assert_eq!((&line["dry_run"], &line["deadline_ms"]), (&"deadline".into(), &100.0.into()), "{line}");
    assert_eq!(mesh.metric("hopguard_dry_run_total", &["rule=\"deadline\"", "app"]), 1.0);
    assert_eq!(expecting(mesh.addr("in"), "/", "400").await.status, 200);
    mesh.ended("ok", 1).await;
    assert_eq!(mesh.metric("hopguard_dry_run_total", &["rule=\"deadline\"", "app"]), 1.0, "in time");
    mesh.stop().await;
}

#[tokio::test]
async fn the_policy_caps_a_longer_deadline() {
    let bank = Bank::open(false).await;
    let mesh = Mesh::start(&policy(bank.upstream.addr, "    timeouts: { request: 300ms }")).await;
    let begun = Instant::now();
    let answer = expecting(mesh.addr("in"), "/slow", "60000").await;
    took(begun, 300);
    mesh.refused(&answer, "request_timeout", "timeouts.request", "300ms").await;
    let told: u64 = bank.told(EXPECTED).parse().unwrap();
    assert!((200..300).contains(&told), "{told}");
    // A caller that says nothing, or says that it has no limit, has the policy's.
    for said in [None, Some("0"), Some("soon")] {
        let mut asked = request("GET", "/");
        if let Some(said) = said {
            asked = asked.header(EXPECTED, said);
        }
        assert_eq!(ask(mesh.addr("in"), asked.body(empty()).unwrap()).await.status, 200);
        let told: u64 = bank.told(EXPECTED).parse().unwrap();
        assert!((200..300).contains(&told), "{told} for {said:?}");
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_longer_grpc_deadline_shrinks_and_the_policy_ends_a_unary_call_all_the_same() {
    let bank = Bank::open(true).await;
    let mesh = Mesh::start(&policy(bank.upstream.addr, "    protocol: http2\n    timeouts: { request: 300ms }")).await;
    let begun = Instant::now();
    let answer = grpc_within(mesh.addr("in"), "/shop.v1.Payment/slow", "60S").await;
    took(begun, 300);
    assert_eq!(answer.grpc_status(), "4", "{answer:?}");
    mesh.refused(&answer, "request_timeout", "timeouts.request", "300ms").await;
    // Whether it is a stream, which the policy does not cap, shows only later.
    let told = millis(&bank.told("grpc-timeout"));
    assert!(told < 60_000.0, "{told}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_grpc_call_has_no_more_time_than_a_proxy_has_told() {
    for timeout in [None, Some("1S")] {
        let bank = Bank::open(true).await;
        let mesh = Mesh::start(&policy(bank.upstream.addr, "    protocol: http2")).await;
        let mut asked = grpc_request("/shop.v1.Payment/slow", full(&b"\0\0\0\0\0"[..]));
        asked.headers_mut().insert(EXPECTED, "300".parse().unwrap());
        if let Some(timeout) = timeout {
            asked.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
        }
        let begun = Instant::now();
        let answer = Caller::open(Speaks::Http2, mesh.addr("in")).await.ask(asked).await;
        took(begun, 300);
        assert_eq!(answer.grpc_status(), "4", "{answer:?}");
        mesh.refused(&answer, "deadline_exceeded", "deadline", "300ms").await;
        let told: f64 = bank.told(EXPECTED).parse().unwrap();
        assert!(told < 300.0 && millis(&bank.told("grpc-timeout")) < 300.0, "{told}");
        mesh.stop().await;
    }
}

/// Two hops, one behind the other.
async fn two_hops(bank: &Bank, protocol: &str) -> [Mesh; 2] {
    let more = format!("    protocol: {protocol}\n    timeouts: {{ request: 6s }}");
    let inner = Mesh::start(&policy(bank.upstream.addr, &more)).await;
    let outer = Mesh::start(&policy(inner.addr("in"), &more)).await;
    [outer, inner]
}

#[tokio::test]
async fn what_is_left_is_smaller_at_each_hop() {
    for (http2, protocol) in [(false, "http1"), (true, "http2")] {
        let bank = Bank::open(http2).await;
        let [outer, inner] = two_hops(&bank, protocol).await;
        if http2 {
            assert_eq!(grpc_within(outer.addr("in"), CHARGE, "2S").await.grpc_status(), "0");
        } else {
            assert_eq!(expecting(outer.addr("in"), "/", "2000").await.status, 200);
        }
        let first = outer.only("ok").await["deadline_ms"].as_f64().unwrap();
        let second = inner.only("ok").await["deadline_ms"].as_f64().unwrap();
        let third = match protocol {
            "http2" => millis(&bank.told("grpc-timeout")),
            _ => bank.told(EXPECTED).parse().unwrap(),
        };
        // Each hop keeps 10 ms for the way back of the answer, so that the lower one gives up first.
        assert!(first == 2000.0 && second <= 1990.0 && third <= second - 9.0, "{protocol}: {first}, {second}, {third}");
        assert!(third > 1500.0, "{protocol}: {third}");
        for mesh in [outer, inner] {
            mesh.stop().await;
        }
    }
}

#[tokio::test]
async fn of_two_hops_that_wait_both_give_up_and_the_caller_hears_why() {
    for (http2, protocol) in [(false, "http1"), (true, "http2")] {
        let bank = Bank::open(http2).await;
        let [outer, inner] = two_hops(&bank, protocol).await;
        let answer = match http2 {
            true => grpc_within(outer.addr("in"), "/shop.v1.Payment/slow", "400m").await,
            false => expecting(outer.addr("in"), "/slow", "400").await,
        };
        let said = answer.header("proxy-status");
        assert!(said.contains("deadline_exceeded"), "{answer:?}");
        // The lower one is over first by what the way back takes, which a busy machine may use up.
        let line = eventually(|| inner.log().pop()).await;
        assert!(
            line.contains("\"outcome\":\"deadline_exceeded\"") || line.contains("\"outcome\":\"caller_gone\""),
            "{line}"
        );
        for mesh in [outer, inner] {
            mesh.stop().await;
        }
    }
}

#[tokio::test]
async fn a_spent_deadline_is_refused_before_the_app_sees_the_call_and_counts_against_nobody() {
    let bank = Bank::open(true).await;
    let mesh = Mesh::start(&policy(bank.upstream.addr, "    protocol: http2")).await;
    for spent in ["0n", "1n", "900u"] {
        let answer = grpc_within(mesh.addr("in"), CHARGE, spent).await;
        assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, "4"), "{spent}: {answer:?}");
    }
    assert_eq!(bank.upstream.requests(), 0);
    mesh.ended("deadline_spent", 3).await;
    for _ in 0..10 {
        grpc_within(mesh.addr("in"), CHARGE, "0n").await;
    }
    mesh.ended("deadline_spent", 13).await;
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &[]), 0.0);
    assert_eq!(grpc_within(mesh.addr("in"), CHARGE, "5S").await.grpc_status(), "0");
    mesh.stop().await;

    let mesh = Mesh::start(&policy(bank.upstream.addr, "    protocol: http2")).await;
    let answer = grpc_within(mesh.addr("in"), CHARGE, "0n").await;
    let line = mesh.refused(&answer, "deadline_spent", "deadline", "0ms").await;
    assert_eq!(
        (&line["refusal"]["origin"], &line["attempts"]),
        (&"asked by the caller".into(), &Value::Null),
        "{line}"
    );
    mesh.stop().await;

    let before = bank.upstream.requests();
    let mesh = Mesh::start(&policy(bank.upstream.addr, "    protocol: http2\nrules: { deadline: off }")).await;
    assert_eq!(grpc_within(mesh.addr("in"), CHARGE, "0n").await.grpc_status(), "0");
    assert_eq!(bank.upstream.requests(), before + 1, "without the rule the app works for nobody");
    mesh.stop().await;
}

#[tokio::test]
async fn a_malformed_grpc_timeout_is_not_taken_for_no_timeout() {
    let bank = Bank::open(true).await;
    let mesh = Mesh::start(&policy(bank.upstream.addr, "    protocol: http2")).await;
    let answer = grpc_within(mesh.addr("in"), CHARGE, "soon").await;
    assert_eq!(answer.grpc_status(), "13", "{answer:?}");
    assert_eq!((mesh.only("bad_request").await["status"].as_u64(), bank.upstream.requests()), (Some(200), 0));
    mesh.stop().await;
    for (mode, noted) in [("dryRun", 1.0), ("off", 0.0)] {
        let more = format!("    protocol: http2\nrules: {{ deadline: {mode} }}");
        let mesh = Mesh::start(&policy(bank.upstream.addr, &more)).await;
        let answer = grpc_within(mesh.addr("in"), CHARGE, "soon").await;
        assert_eq!(answer.grpc_status(), "0", "{mode} {answer:?}");
        assert_eq!(mesh.metric("hopguard_dry_run_total", &["rule=\"deadline\"", "app"]), noted, "{mode}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn callers_in_a_hurry_do_not_open_the_breaker_and_patient_ones_do() {
    let bank = Bank::open(false).await;
    let table =
        [("inbound", "100", false), ("inbound", "280", true), ("outbound", "20", false), ("outbound", "100", true)];
    for (direction, wait, opens) in table {
        let text = policy(bank.upstream.addr, "    timeouts: { request: 300ms }");
        let mesh = Mesh::start(&text.replace("to: app }", &format!("to: app, direction: {direction} }}"))).await;
        for _ in 0..6 {
            expecting(mesh.addr("in"), "/slow", wait).await;
        }
        let opened = mesh.metric("hopguard_circuit_breaker_changes_total", &["state=\"open\""]);
        assert_eq!(opened > 0.0, opens, "{wait}");
        assert_eq!(get(mesh.addr("in"), "/").await.status.as_u16(), if opens { 503 } else { 200 }, "{wait}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_answer_that_the_next_hop_cuts_for_a_caller_in_a_hurry_opens_no_breaker() {
    let slow = Upstream::http1(|_| async {
        let (pieces, body): (Feed, Body) = feed();
        tokio::spawn(async move {
            while pieces.send("a").await {
                sleep(Duration::from_millis(20)).await
            }
        });
        Response::new(body)
    })
    .await;
    for protocol in ["http1", "http2"] {
        let lower = Mesh::start(&policy(slow.addr, "")).await;
        let upper = policy(lower.addr("in"), &format!("    protocol: {protocol}"));
        let upper = Mesh::start(&upper.replace("to: app }", "to: app, direction: outbound }")).await;
        for _ in 0..6 {
            let mut caller = Caller::open(Speaks::Http1, upper.addr("in")).await;
            let asked = Request::get("/").header(EXPECTED, "150").body(empty()).unwrap();
            let mut body = caller.send(asked).await.unwrap().into_body();
            while let Some(Ok(_)) = body.frame().await {}
        }
        let ended = || upper.count("upstream_cut") + upper.count("deadline_exceeded");
        eventually(|| (ended() == 6.0).then_some(())).await;
        let opened = upper.metric("hopguard_circuit_breaker_changes_total", &["state=\"open\""]);
        assert_eq!(opened, 0.0, "{protocol} {:#?}", upper.log());
        upper.stop().await;
        lower.stop().await;
    }
}

/// An answer of gRPC that never ends by itself: a message each 20 ms.
async fn endless() -> Upstream {
    Upstream::http2(|_| async {
        let (messages, body): (Feed, Body) = feed();
        tokio::spawn(async move {
            while messages.send(&b"\0\0\0\0\0"[..]).await {
                sleep(Duration::from_millis(20)).await;
            }
        });
        Response::builder().header("content-type", "application/grpc").body(body).unwrap()
    })
    .await
}

#[tokio::test]
async fn a_grpc_stream_ends_at_its_own_deadline_before_or_after_the_policys() {
    let upstream = endless().await;
    for (request, route) in [("5s", ""), ("200ms", ""), ("200ms", ", stream: true")] {
        let more = format!(
            "    protocol: http2\n    timeouts: {{ request: {request} }}\n    routes: [{{ name: watch, match: {{ grpc: shop.v1.Payment }}{route} }}]"
        );
        let mesh = Mesh::start(&policy(upstream.addr, &more)).await;
        let begun = Instant::now();
        let answer = grpc_within(mesh.addr("in"), CHARGE, "600m").await;
        took(begun, 600);
        assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, "4"), "{more}: {answer:?}");
        assert!(answer.body.len() >= 50, "it streamed until then: {}", answer.body.len());
        let line = mesh.only("deadline_exceeded").await;
        assert_eq!(
            (&line["refusal"]["rule"], &line["refusal"]["value"]),
            (&"deadline".into(), &"600ms".into()),
            "{line}"
        );
        assert_eq!(line["grpc_status"], "DEADLINE_EXCEEDED", "{line}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_stream_that_ends_at_its_deadline_is_no_failure_of_the_callee() {
    let upstream = endless().await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http2\n    timeouts: { request: 200ms }")).await;
    for timeout in ["150m", "150m", "150m", "300m", "300m", "300m"] {
        assert_eq!(grpc_within(mesh.addr("in"), CHARGE, timeout).await.grpc_status(), "4");
    }
    mesh.ended("deadline_exceeded", 6).await;
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &[]), 0.0);
    assert_eq!(upstream.requests(), 6);
    mesh.stop().await;
}
