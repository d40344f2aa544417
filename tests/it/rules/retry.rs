//! Retries: the conditions, the safety of a second try, backoff, the retry budget, `Retry-After` and gRPC pushback.

use std::time::Duration;

use hyper::Request;
use hyper::http::request::Builder;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};

use crate::support::bank::{Bank, Say, behind_a_caller};
use crate::support::http::{Answer, Body, Caller, Http1, Speaks, ask, empty, full, get, grpc, grpc_request, request};
use crate::support::upstream::policy;
use crate::support::{Mesh, SOON, eventually};

/// Fails once.
const ONCE: &[Say] = &[Say::Status(503), Say::Status(200)];

/// Never works.
const NEVER: &[Say] = &[Say::Status(503)];

const CHARGE: &str = "/shop.v1.Payment/Charge";

/// The route's calls may be repeated.
const DECLARED: &str = "    routes: [{ name: pay, retry: { idempotent: true } }]";

/// One call ended so, after so many tries; the log line and the metrics say so, and why there was no other try.
async fn told(mesh: &Mesh, outcome: &str, tries: usize, withheld: &str) -> Value {
    let line = mesh.only(outcome).await;
    assert_eq!((&line["attempt"], line["retry_withheld"].as_str().unwrap_or("")), (&tries.into(), withheld), "{line}");
    let retries = (mesh.metric("hopguard_retries_total", &["app"]), tries as f64 - 1.0);
    assert_eq!(retries.0, retries.1, "{line}");
    let all = mesh.metric("hopguard_retries_withheld_total", &["app"]);
    let this = mesh.metric("hopguard_retries_withheld_total", &["app", &format!("reason=\"{withheld}\"")]);
    let expected = if withheld.is_empty() { 0.0 } else { 1.0 };
    assert_eq!((all, this), (expected, expected), "{withheld}: {line}");
    line
}

/// A call with a body, and with a field if one is named.
fn call(method: &str, field: Option<(&str, &str)>) -> Request<Body> {
    let with = |builder: Builder| match field {
        Some((name, value)) => builder.header(name, value),
        None => builder,
    };
    let body = if method == "GET" { empty() } else { full("pay 5") };
    with(request(method, "/payments/7")).body(body).unwrap()
}

#[tokio::test]
async fn a_call_that_may_be_repeated_is_sent_again() {
    let key = Some(("idempotency-key", "\"7\""));
    let off = "    retry: off";
    let declared_off = "    routes: [{ name: pay, retry: off }]";
    let table = [
        ("GET", None, "", "", 2),
        ("PUT", None, "", "", 2),
        ("DELETE", None, "", "", 2),
        ("POST", key, "", "", 2),
        ("POST", None, "", DECLARED, 2),
        ("GET", None, "retry: off", "", 1),
        ("POST", key, "retry: off", "", 1),
        ("PUT", None, "", off, 1),
        ("POST", key, "", declared_off, 1),
    ];
    for (method, field, rules, more, tries) in table {
        let bank = Bank::http1(ONCE).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], rules, more)).await;
        let answer = ask(mesh.addr("in"), call(method, field)).await;
        let case = format!("{method} {field:?} {rules} {more}: {answer:?}");
        assert_eq!(bank.tries(), tries, "{case}");
        if tries == 2 {
            assert_eq!(answer.status, 200, "{case}");
            let line = told(&mesh, "ok", 2, "").await;
            assert_eq!(line["attempts"], 3, "{line}");
            let seen = bank.seen();
            assert_eq!((&seen[0].method, &seen[0].body), (&seen[1].method, &seen[1].body));
        } else {
            assert_eq!(answer.status, 503, "{case}");
            told(&mesh, "server_error", 1, "").await;
        }
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_call_that_may_have_done_its_work_is_not_sent_again() {
    for method in ["POST", "PATCH"] {
        let bank = Bank::http1(ONCE).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", "")).await;
        let answer = ask(mesh.addr("in"), call(method, None)).await;
        assert_eq!((answer.status.as_u16(), bank.tries()), (503, 1), "{answer:?}");
        assert_eq!(answer.body, "said", "the upstream's own answer");
        told(&mesh, "server_error", 1, "not_safe").await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_broken_post_says_that_it_was_not_sent_again_and_why() {
    for (more, tries) in [("", 1), (DECLARED, 2)] {
        let bank = Bank::http1(&[Say::Reset, Say::Status(200)]).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", more)).await;
        let answer = ask(mesh.addr("in"), call("POST", None)).await;
        assert_eq!(bank.tries(), tries, "{answer:?}");
        if tries == 2 {
            assert_eq!(answer.status, 200, "{answer:?}");
            told(&mesh, "ok", 2, "").await;
        } else {
            assert_eq!(answer.status, 502, "{answer:?}");
            assert_eq!(answer.problem()["notRetried"], "not_safe", "{answer:?}");
            assert!(answer.header("proxy-status").contains("not retried: not_safe"), "{answer:?}");
            told(&mesh, "upstream_reset", 1, "not_safe").await;
        }
        mesh.stop().await;
    }
}

#[tokio::test]
async fn grpc_calls_are_sent_again_where_the_route_says_that_they_may() {
    const DOWN_ONCE: &[Say] = &[Say::Grpc(14, &[]), Say::Grpc(0, &[])];
    const WRONG: &[Say] = &[Say::Grpc(3, &[])];
    let table = [
        (DOWN_ONCE, "", DECLARED, 2, "0", "ok", ""),
        (DOWN_ONCE, "", "", 1, "14", "grpc_error", "not_safe"),
        (DOWN_ONCE, "retry: off", DECLARED, 1, "14", "grpc_error", ""),
        // INVALID_ARGUMENT is an answer; INTERNAL is a failure that no policy named.
        (WRONG, "", DECLARED, 1, "3", "grpc_error", ""),
        (&[Say::Grpc(13, &[])], "", DECLARED, 1, "13", "grpc_error", "condition_off"),
    ];
    for (script, rules, more, tries, code, outcome, withheld) in table {
        let bank = Bank::http2(script).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], rules, more)).await;
        let answer = grpc(mesh.addr("in"), CHARGE).await;
        assert_eq!((answer.grpc_status(), bank.tries()), (code, tries), "{more} {answer:?}");
        told(&mesh, outcome, tries, withheld).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn only_what_the_policy_names_is_a_reason_to_try_again() {
    let table = [
        (502, "", 2),
        (503, "", 2),
        (504, "", 2),
        (500, "", 1),
        (501, "", 1),
        (404, "", 1),
        (429, "", 1),
        (500, "    retry: { on: [500] }", 2),
        (429, "    retry: { on: [429] }", 2),
        (503, "    retry: { on: [500] }", 1),
    ];
    for (status, more, tries) in table {
        let script: &'static [Say] = Box::leak(Box::new([Say::Status(status), Say::Status(200)]));
        let bank = Bank::http1(script).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", more)).await;
        let answer = get(mesh.addr("in"), "/").await;
        assert_eq!(bank.tries(), tries, "{status} {more}: {answer:?}");
        if tries == 2 {
            told(&mesh, "ok", 2, "").await;
        } else {
            assert_eq!(answer.status, status);
            let (outcome, why) = if status < 500 { ("client_error", "") } else { ("server_error", "condition_off") };
            told(&mesh, outcome, 1, why).await;
        }
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_reset_and_a_try_that_takes_too_long_are_reasons_too() {
    let slow = "    timeouts: { request: 5s, perTry: 200ms }";
    let narrow = "    retry: { on: [503] }";
    let table = [
        (&[Say::Reset, Say::Status(200)], "", 502, "upstream_reset"),
        (&[Say::Hang, Say::Status(200)], slow, 504, "per_try_timeout"),
    ];
    for (script, more, status, outcome) in table {
        for (rules, narrow, tries, why) in
            [("", "", 2, ""), ("retry: off", "", 1, ""), ("", narrow, 1, "condition_off")]
        {
            let bank = Bank::http1(script).await;
            let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], rules, &format!("{more}\n{narrow}"))).await;
            let answer = get(mesh.addr("in"), "/").await;
            assert_eq!(bank.tries(), tries, "{answer:?}");
            assert_eq!(answer.status, if tries == 2 { 200 } else { status }, "{answer:?}");
            told(&mesh, if tries == 2 { "ok" } else { outcome }, tries, why).await;
            mesh.stop().await;
        }
    }
}

#[tokio::test]
async fn what_a_try_has_waited_in_vain_is_not_what_hopguard_took() {
    let bank = Bank::http1(&[Say::Hang, Say::Status(200)]).await;
    let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", "    timeouts: { request: 20s, perTry: 1s }")).await;
    assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
    let line = mesh.only("ok").await;
    let [first_byte, own] = ["first_byte_ms", "overhead_ms"].map(|field| line[field].as_f64().unwrap());
    assert!(line["attempt"] == 2 && own <= first_byte - 1000.0, "{line}");
    let counted = mesh.metric("hopguard_overhead_seconds_sum", &["outcome=\"ok\""]);
    assert!((counted * 1000.0 - own).abs() < 1.0, "{counted} {line}");
    mesh.stop().await;
}

#[tokio::test]
async fn attempts_counts_the_tries_after_the_first() {
    for (more, tries) in [("", 3), ("    retry: { attempts: 1 }", 2), ("    retry: { attempts: 4 }", 5)] {
        let bank = Bank::http1(NEVER).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "circuitBreaker: off", more)).await;
        let answer = get(mesh.addr("in"), "/").await;
        assert_eq!((answer.status.as_u16(), bank.tries()), (503, tries), "{answer:?}");
        let line = told(&mesh, "server_error", tries, "tries_used_up").await;
        assert_eq!(line["attempts"], tries, "{line}");
        let counts: Vec<_> =
            bank.seen().iter().skip(1).map(|seen| seen.header("x-envoy-attempt-count").to_owned()).collect();
        let expected: Vec<_> = (2..=tries).map(|count| count.to_string()).collect();
        assert_eq!(counts, expected);
        mesh.stop().await;
    }
}

/// A field as it came in each try.
fn each(bank: &Bank, name: &str) -> Vec<String> {
    bank.seen().iter().map(|seen| seen.header(name).to_owned()).collect()
}

#[tokio::test]
async fn a_count_of_tries_that_the_app_has_copied_into_its_own_call_is_not_passed_on() {
    let copied = Some(("x-envoy-attempt-count", "7"));
    for (rules, expected) in [("", &["", "2"][..]), ("retry: off", &[""])] {
        let bank = Bank::http1(ONCE).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], rules, "")).await;
        let answer = ask(mesh.addr("in"), call("GET", copied)).await;
        assert_eq!(each(&bank, "x-envoy-attempt-count"), expected, "{answer:?}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn the_sidecar_before_the_app_counts_on_from_the_tries_of_the_callers() {
    let bank = Bank::http1(&[Say::Status(200), Say::Reset, Say::Status(200)]).await;
    let mesh = Mesh::start(&policy(bank.addr(), "")).await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    assert_eq!(caller.ask(call("GET", None)).await.status, 200);
    assert_eq!(caller.ask(call("GET", Some(("x-envoy-attempt-count", "2")))).await.status, 200);
    assert_eq!(each(&bank, "x-envoy-attempt-count"), ["", "2", "3"]);
    assert_eq!(mesh.metric("hopguard_retries_total", &["app"]), 1.0);
    mesh.stop().await;
}

#[tokio::test]
async fn grpc_servers_are_told_how_many_tries_came_before_with_those_of_the_callers_library() {
    for (said, expected) in [("", ["", "1", "2"]), ("3", ["3", "4", "5"])] {
        let bank = Bank::http2(&[Say::Grpc(14, &[])]).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", DECLARED)).await;
        let mut asked = grpc_request(CHARGE, full(&b"\0\0\0\0\0"[..]));
        if !said.is_empty() {
            asked.headers_mut().insert("grpc-previous-rpc-attempts", said.parse().unwrap());
        }
        assert_eq!(Caller::open(Speaks::Http2, mesh.addr("in")).await.ask(asked).await.grpc_status(), "14");
        assert_eq!(each(&bank, "grpc-previous-rpc-attempts"), expected);
        assert_eq!(each(&bank, "x-envoy-attempt-count"), ["", "2", "3"]);
        told(&mesh, "grpc_error", 3, "tries_used_up").await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_destination_that_fails_gets_no_more_retries_than_its_budget() {
    // Ten tokens; calls that fail earn nothing. Without a bound in reach, each call is tried three times.
    let narrow = "    retry: { budget: { minPerSecond: 0 } }";
    let wide = "    retry: { budget: { minPerSecond: 10000 } }";
    for (more, tries) in [(narrow, 40), (wide, 90)] {
        let bank = Bank::http1(NEVER).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "circuitBreaker: off, ejection: off", more)).await;
        let mut caller = Http1::open(mesh.addr("in")).await;
        for _ in 0..30 {
            assert_eq!(caller.ask(call("GET", None)).await.status, 503);
        }
        assert_eq!(bank.tries(), tries, "{more}");
        mesh.ended("server_error", 30).await;
        eventually(|| (mesh.log().len() == 30).then_some(())).await;
        let without = mesh.log().iter().filter(|line| line.contains("\"retry_withheld\":\"budget\"")).count();
        assert_eq!(mesh.metric("hopguard_retries_total", &["app", "reason=\"failed\""]), tries as f64 - 30.0);
        assert_eq!(mesh.metric("hopguard_retries_withheld_total", &["reason=\"budget\""]), without as f64);
        assert_eq!(without, if tries == 40 { 25 } else { 0 });
        mesh.stop().await;
    }
}

#[tokio::test]
async fn calls_that_go_well_pay_for_retries() {
    // Five good calls of a fifth of a token each, then a bad one: the purse was empty, and has one token again.
    const SCRIPT: &[Say] = &[
        Say::Status(503),
        Say::Status(503),
        Say::Status(503),
        Say::Status(503),
        Say::Status(503),
        Say::Status(503),
        Say::Status(503),
        Say::Status(503),
        Say::Status(503),
        Say::Status(503),
        Say::Status(503),
        Say::Status(503),
        Say::Status(200),
        Say::Status(200),
        Say::Status(200),
        Say::Status(200),
        Say::Status(200),
        Say::Status(503),
        Say::Status(503),
        Say::Status(200),
    ];
    let bank = Bank::http1(SCRIPT).await;
    let more = "    retry: { attempts: 10, budget: { minPerSecond: 0 } }";
    let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "circuitBreaker: off", more)).await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    let mut statuses = Vec::new();
    for _ in 0..8 {
        statuses.push(caller.ask(call("GET", None)).await.status.as_u16());
    }
    // Eleven tries, one, five good ones, then two.
    assert_eq!(statuses, [503, 503, 200, 200, 200, 200, 200, 503]);
    assert_eq!(bank.tries(), 19);
    mesh.ended("server_error", 3).await;
    assert_eq!(mesh.metric("hopguard_retries_total", &["app"]), 11.0);
    mesh.stop().await;
}

#[tokio::test]
async fn retry_after_is_obeyed_to_the_letter() {
    const LATER: &[Say] = &[Say::With(503, &[("retry-after", "1")]), Say::Status(200)];
    for (script, waits) in [(LATER, true), (ONCE, false)] {
        let bank = Bank::http1(script).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", "    timeouts: { request: 10s }")).await;
        assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
        let seen = bank.seen();
        let waited = seen[1].at - seen[0].at;
        assert_eq!(waited >= Duration::from_secs(1), waits, "{waited:?}");
        let line = told(&mesh, "ok", 2, "").await;
        assert_eq!(line["duration_ms"].as_f64() >= Some(1000.0), waits, "{line}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn who_is_asked_to_wait_beyond_the_deadline_does_not_wait_at_all() {
    let bank = Bank::http1(&[Say::With(503, &[("retry-after", "60")])]).await;
    let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", "    timeouts: { request: 10s }")).await;
    let answer = get(mesh.addr("in"), "/").await;
    assert_eq!((answer.status.as_u16(), answer.header("retry-after")), (503, "60"), "{answer:?}");
    assert_eq!(bank.tries(), 1);
    told(&mesh, "server_error", 1, "deadline").await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_retry_after_that_is_endless_or_cannot_be_read_is_never_taken_for_none() {
    let table = [
        ("99999999999999999999", "deadline"),
        ("99999999999999999999.5", "deadline"),
        ("120.5", "deadline"),
        ("Wed, 01 Jan 2070 00:00:00 GMT", "deadline"),
        ("Thu, 30 Dec 9999 22:00:00 GMT", "deadline"),
        ("Thu, 30 Dec 9999 22:00:01 GMT", "deadline"),
        ("Fri, 31 Dec 9999 23:59:59 GMT", "deadline"),
        ("Tuesday, 31-Dec-69 23:59:59 GMT", "deadline"),
        ("Sat, 01 Jan 10000 00:00:00 GMT", "pushed_back"),
        ("-1", "pushed_back"),
        ("-99999999999999999999", "pushed_back"),
        ("soon", "pushed_back"),
    ];
    for (value, withheld) in table {
        let answer: Vec<Say> = vec![Say::With(503, Vec::leak(vec![("retry-after", value)])), Say::Status(200)];
        let bank = Bank::http1(Vec::leak(answer)).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", "    timeouts: { request: 10s }")).await;
        let answer = get(mesh.addr("in"), "/").await;
        assert_eq!((answer.status.as_u16(), answer.header("retry-after")), (503, value), "{answer:?}");
        assert_eq!(bank.tries(), 1, "{value}");
        told(&mesh, "server_error", 1, withheld).await;
        mesh.stop().await;
    }
    for past in ["Sun, 06 Nov 1994 08:49:37 GMT", "0", ""] {
        let answer: Vec<Say> = vec![Say::With(503, Vec::leak(vec![("retry-after", past)])), Say::Status(200)];
        let bank = Bank::http1(Vec::leak(answer)).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", "")).await;
        assert_eq!(get(mesh.addr("in"), "/").await.status, 200, "{past:?}");
        told(&mesh, "ok", 2, "").await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn grpc_pushback_is_obeyed_to_the_letter() {
    const LATER: &[Say] = &[Say::Grpc(14, &[("grpc-retry-pushback-ms", "400")]), Say::Grpc(0, &[])];
    const NOT_AT_ALL: &[Say] = &[Say::Grpc(14, &[("grpc-retry-pushback-ms", "-1")]), Say::Grpc(0, &[])];
    const UNREADABLE: &[Say] = &[Say::Grpc(14, &[("grpc-retry-pushback-ms", "soon")]), Say::Grpc(0, &[])];
    const ENDLESS: &[Say] = &[Say::Grpc(14, &[("grpc-retry-pushback-ms", "99999999999999999999")]), Say::Grpc(0, &[])];
    for (script, code) in [(LATER, "0"), (NOT_AT_ALL, "14"), (UNREADABLE, "14"), (ENDLESS, "14")] {
        let bank = Bank::http2(script).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", DECLARED)).await;
        let answer = grpc(mesh.addr("in"), CHARGE).await;
        assert_eq!(answer.grpc_status(), code, "{answer:?}");
        let seen = bank.seen();
        if code == "0" {
            assert!(seen[1].at - seen[0].at >= Duration::from_millis(400), "{:?}", seen[1].at - seen[0].at);
            told(&mesh, "ok", 2, "").await;
        } else {
            assert_eq!(seen.len(), 1, "{answer:?}");
            told(&mesh, "grpc_error", 1, "pushed_back").await;
        }
        mesh.stop().await;
    }
}

#[tokio::test]
async fn no_try_begins_or_lasts_beyond_the_deadline() {
    let hurry = Some(("x-envoy-expected-rq-timeout-ms", "2000"));
    let table = [("2s", None, "request_timeout"), ("10s", hurry, "deadline_exceeded")];
    for (request, field, outcome) in table {
        let bank = Bank::http1(&[Say::Hang]).await;
        let more = format!(
            "    timeouts: {{ request: {request}, perTry: 700ms }}\n    retry: {{ attempts: 9, backoff: {{ base: 1ms, max: 1ms }} }}"
        );
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "circuitBreaker: off", &more)).await;
        let begun = Instant::now();
        let answer = ask(mesh.addr("in"), call("GET", field)).await;
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(1990), "{took:?}");
        // The fourth would begin 100 ms after the deadline.
        assert_eq!((answer.status.as_u16(), bank.tries()), (504, 3), "{answer:?}");
        told(&mesh, outcome, 3, "").await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_wait_that_would_outlast_the_deadline_is_not_begun() {
    // Almost every wait is longer than the deadline; the caller gets what there is, and never a timeout of ours.
    let more = "    timeouts: { request: 300ms }\n    retry: { backoff: { base: 30s, max: 30s } }";
    let bank = Bank::http1(NEVER).await;
    let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "circuitBreaker: off", more)).await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    for _ in 0..10 {
        assert_eq!(caller.ask(call("GET", None)).await.status, 503);
    }
    mesh.ended("server_error", 10).await;
    assert_eq!(mesh.count("request_timeout"), 0.0);
    assert!(
        mesh.metric("hopguard_retries_withheld_total", &["reason=\"deadline\""]) >= 8.0,
        "{}",
        mesh.metrics().await
    );
    mesh.stop().await;
}

#[tokio::test]
async fn each_try_goes_to_an_endpoint_that_the_call_has_not_tried() {
    for (rules, is_on) in
        [("ejection: off, circuitBreaker: off", true), ("retry: off, ejection: off, circuitBreaker: off", false)]
    {
        let banks = [Bank::http1(NEVER).await, Bank::http1(NEVER).await, Bank::http1(&[Say::Status(200)]).await];
        let mesh = Mesh::start(&behind_a_caller(&banks.each_ref().map(Bank::addr), rules, "")).await;
        let mut failed = 0;
        // The budget is enough for this, whatever the order of the tries.
        for number in 0..5 {
            let answer = ask(mesh.addr("in"), call("GET", Some(("x-call", &number.to_string())))).await;
            failed += usize::from(answer.status != 200);
        }
        assert_eq!(failed == 0, is_on, "{failed} failed");
        for bank in &banks {
            let mut calls: Vec<_> = bank.seen().iter().map(|seen| seen.header("x-call").to_owned()).collect();
            calls.dedup();
            assert_eq!(calls.len(), bank.tries(), "a call was tried twice at one endpoint");
        }
        let all: usize = banks.iter().map(Bank::tries).sum();
        assert_eq!(mesh.metric("hopguard_retries_total", &["app"]), all as f64 - 5.0);
        mesh.ended("ok", 5 - failed).await;
        let good = format!("\"endpoint\":\"{}\"", banks[2].addr());
        eventually(|| (mesh.log().iter().filter(|line| line.contains(&good)).count() == 5 - failed).then_some(()))
            .await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn the_sidecar_before_the_app_leaves_retries_to_the_callers() {
    let bank = Bank::http1(ONCE).await;
    let mesh = Mesh::start(&policy(bank.addr(), "")).await;
    assert_eq!((get(mesh.addr("in"), "/").await.status.as_u16(), bank.tries()), (503, 1));
    told(&mesh, "server_error", 1, "at_the_caller").await;
    mesh.stop().await;
}

#[tokio::test]
async fn in_warn_it_says_what_it_would_have_done_and_does_nothing() {
    for (method, would) in [("GET", "retry"), ("POST", "")] {
        let bank = Bank::http1(ONCE).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "retry: dryRun", "")).await;
        let answer = ask(mesh.addr("in"), call(method, None)).await;
        assert_eq!((answer.status.as_u16(), bank.tries()), (503, 1), "{answer:?}");
        let line = mesh.only("server_error").await;
        assert_eq!((line["dry_run"].as_str().unwrap_or(""), &line["attempt"]), (would, &1.into()), "{line}");
        let counted = mesh.metric("hopguard_dry_run_total", &["app", "rule=\"retry\""]);
        assert_eq!(counted, if would.is_empty() { 0.0 } else { 1.0 });
        assert_eq!(mesh.metric("hopguard_retries_total", &[]), 0.0);
        mesh.stop().await;
    }
}

/// Asks, and goes away once the bank has the request.
async fn ask_and_leave(mesh: &Mesh, bank: &Bank, speaks: Speaks) {
    let before = bank.tries();
    let mut caller = Caller::open(speaks, mesh.addr("in")).await;
    let asked = tokio::spawn(async move { caller.send(Request::get("/").body(empty()).unwrap()).await.map(|_| ()) });
    eventually(|| (bank.tries() > before).then_some(())).await;
    asked.abort();
    let _aborted = asked.await;
}

#[tokio::test]
async fn a_caller_that_goes_away_counts_against_nobody() {
    let more =
        "    circuitBreaker: { consecutiveFailures: 1 }\n    ejection: { consecutiveFailures: 1 }\n    protocol: http1";
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let bank = Bank::http1(&[Say::Hang, Say::Status(200)]).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", more)).await;
        ask_and_leave(&mesh, &bank, speaks).await;
        mesh.only("caller_gone").await;
        assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &[]), 0.0);
        assert_eq!(mesh.metric("hopguard_ejections_total", &[]), 0.0);
        assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
        mesh.only("ok").await;
        mesh.stop().await;
    }
    // The same hang, ended by a time limit, is the callee's fault.
    let bank = Bank::http1(&[Say::Hang, Say::Status(200)]).await;
    let more = format!("{more}\n    timeouts: {{ request: 200ms }}\n    retry: off");
    let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", &more)).await;
    assert_eq!(get(mesh.addr("in"), "/").await.status, 504);
    assert_eq!(get(mesh.addr("in"), "/").await.status, 503);
    mesh.only("circuit_open").await;
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &["state=\"open\""]), 1.0);
    mesh.stop().await;
}

#[tokio::test]
async fn nothing_is_sent_again_for_a_caller_that_has_gone() {
    let bank = Bank::http1(&[Say::With(503, &[("retry-after", "1")]), Say::Status(200)]).await;
    let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", "    timeouts: { request: 10s }")).await;
    ask_and_leave(&mesh, &bank, Speaks::Http1).await;
    mesh.only("caller_gone").await;
    sleep(Duration::from_millis(1200)).await;
    assert_eq!((bank.tries(), mesh.metric("hopguard_retries_total", &[])), (1, 0.0));
    mesh.stop().await;
}

#[tokio::test]
async fn a_retry_before_which_the_breaker_opens_is_neither_sent_nor_counted() {
    let bank = Bank::http1(&[Say::With(503, &[("retry-after", "1")]), Say::Status(503)]).await;
    let more = "    ejection: off\n    circuitBreaker: { consecutiveFailures: 2, openFor: 30s, openForMax: 30s }";
    let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", more)).await;
    let to = mesh.addr("in");
    let waits = tokio::spawn(async move { get(to, "/").await });
    eventually(|| (bank.tries() == 1).then_some(())).await;
    assert_eq!(ask(mesh.addr("in"), call("POST", None)).await.status, 503);
    assert_eq!(waits.await.unwrap().problem()["refusal"], "circuit_open");
    mesh.only("circuit_open").await;
    assert_eq!((bank.tries(), mesh.metric("hopguard_retries_total", &[])), (2, 0.0));
    mesh.stop().await;
}

#[tokio::test]
async fn the_last_answer_is_passed_on_whole() {
    const SCRIPT: &[Say] =
        &[Say::With(503, &[("x-try", "1")]), Say::With(502, &[("x-try", "2")]), Say::With(504, &[("x-try", "3")])];
    let bank = Bank::http1(SCRIPT).await;
    let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", "")).await;
    let answer: Answer = timeout(SOON, get(mesh.addr("in"), "/")).await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.header("x-try")), (504, "3"), "{answer:?}");
    assert_eq!(answer.body, "said");
    assert_eq!(bank.connections(), 1, "a connection whose answer was not wanted lives on");
    told(&mesh, "server_error", 3, "tries_used_up").await;
    mesh.stop().await;
}
