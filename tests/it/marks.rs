//! What one hopguard tells the next about a failure: that its tries are used up, that nobody need try again.

use std::net::{SocketAddr, TcpListener};

use crate::support::Mesh;
use crate::support::bank::{Bank, Say, behind_a_caller};
use crate::support::http::{ask, empty, get, grpc, request};
use crate::support::upstream::policy;
use crate::support::wire::Wire;

const CHARGE: &str = "/shop.v1.Payment/Charge";

/// Retries that wait for next to nothing, and nothing else that comes between.
const QUICK: &str =
    "    circuitBreaker: off\n    ejection: off\n    retry: { idempotent: true, backoff: { max: 1ms } }";

/// An address where nobody listens.
fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A hopguard in front of `to`, and another in front of that one, whose caller is the test.
async fn two_hops(to: SocketAddr, lower: &str) -> (Mesh, Mesh) {
    let lower = format!("    circuitBreaker: off\n    ejection: off\n{lower}");
    let lower = Mesh::start(&behind_a_caller(&[to], "", &lower)).await;
    let upper = Mesh::start(&behind_a_caller(&[lower.addr("in")], "", QUICK)).await;
    (upper, lower)
}

#[tokio::test]
async fn a_failure_that_the_policy_does_not_try_again_may_be_tried_again_above() {
    let table: [(&'static [Say], &str); 5] = [
        (&[Say::Reset, Say::Status(200)], "    retry: off"),
        (&[Say::Reset, Say::Status(200)], "    retry: { on: [429] }"),
        (&[Say::Hang, Say::Status(200)], "    retry: off\n    timeouts: { perTry: 100ms }"),
        (&[Say::Hang, Say::Status(200)], "    retry: { on: [reset] }\n    timeouts: { perTry: 100ms }"),
        (&[Say::Status(503), Say::Status(200)], "    retry: off"),
    ];
    for (script, lower) in table {
        let bank = Bank::http1(script).await;
        let (upper, lower_mesh) = two_hops(bank.addr(), lower).await;
        let answer = get(upper.addr("in"), "/").await;
        assert_eq!((answer.status.as_u16(), bank.tries()), (200, 2), "{lower} {answer:?}");
        assert_eq!(upper.only("ok").await["attempt"], 2, "{lower}");
        upper.stop().await;
        lower_mesh.stop().await;
    }
}

#[tokio::test]
async fn what_was_tried_again_is_tried_by_nobody_above() {
    let bank = Bank::http1(&[Say::Reset]).await;
    for (to, tries) in [(bank.addr(), 3), (nobody(), 0)] {
        let (upper, lower) = two_hops(to, "    retry: { backoff: { max: 1ms } }").await;
        let answer = get(upper.addr("in"), "/").await;
        assert_eq!((answer.status.as_u16(), bank.tries().min(tries)), (502, tries), "{answer:?}");
        let line = upper.only("server_error").await;
        assert_eq!((&line["attempt"], &line["retry"]), (&1.into(), &"retried_below".into()), "{line}");
        upper.stop().await;
        lower.stop().await;
    }
}

#[tokio::test]
async fn a_grpc_caller_is_told_not_to_try_again_wherever_that_is_said() {
    let slow = "    timeouts: { request: 200ms }";
    let bank = Bank::http2(&[Say::Reset]).await;
    let silent = Bank::http2(&[Say::Hang]).await;
    let table = [
        (nobody(), QUICK, "connect_failed", true),
        (nobody(), "    retry: off", "connect_failed", false),
        (bank.addr(), QUICK, "upstream_reset", true),
        (bank.addr(), "    retry: { idempotent: true, on: [429] }", "upstream_reset", false),
        // What may have been done is not to be done again by anybody.
        (bank.addr(), "    retry: off", "upstream_reset", true),
        (silent.addr(), slow, "request_timeout", true),
    ];
    for (to, more, outcome, is_final) in table {
        let mesh = Mesh::start(&behind_a_caller(&[to], "", more)).await;
        let answer = grpc(mesh.addr("in"), CHARGE).await;
        let said = answer.header("proxy-status");
        assert!(said.contains(outcome), "{more} {answer:?}");
        assert_eq!(said.contains("hopguard-final"), is_final, "{more} {answer:?}");
        let pushback = if is_final { "-1" } else { "" };
        assert_eq!(answer.header("grpc-retry-pushback-ms"), pushback, "{more} {answer:?}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn in_warn_and_when_off_nothing_is_written_and_nothing_obeyed() {
    const MARKED: &[Say] = &[Say::With(503, &[("proxy-status", "hopguard; hopguard-final; hopguard-at=\"deep\"")])];
    let all = |mode: &str| format!("retryInOnePlace: {mode}, unsent: {mode}, blameInOnePlace: {mode}");
    for (mode, marks, tries) in [("enforce", true, 1), ("warn", false, 3), ("off", false, 3)] {
        let bank = Bank::http1(&[Say::Status(503)]).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], &all(mode), QUICK)).await;
        let said = get(mesh.addr("in"), "/").await.header("proxy-status").to_owned();
        assert_eq!((said.contains("hopguard-final"), said.contains("hopguard-at")), (marks, marks), "{mode} {said}");
        let refused = Mesh::start(&behind_a_caller(&[nobody()], &all(mode), QUICK)).await;
        let answer = grpc(refused.addr("in"), CHARGE).await;
        let said = answer.header("proxy-status");
        assert_eq!((said.contains("hopguard-final"), said.contains("hopguard-at")), (marks, marks), "{mode} {said}");
        assert_eq!(answer.header("grpc-retry-pushback-ms") == "-1", marks, "{mode} {answer:?}");
        let before = format!("{}rules: {{ {} }}\n", policy(nobody(), ""), all(mode));
        let before = Mesh::start(&before).await;
        let said = get(before.addr("in"), "/").await.header("proxy-status").to_owned();
        assert_eq!((said.contains("connect_failed"), said.contains("hopguard-unsent")), (true, marks), "{mode} {said}");

        let marked = Bank::http1(MARKED).await;
        let reader = Mesh::start(&behind_a_caller(&[marked.addr()], &all(mode), QUICK)).await;
        get(reader.addr("in"), "/").await;
        assert_eq!(marked.tries(), tries, "{mode}");
        let would = |rule: &str| reader.metric("hopguard_would_act_total", &[&format!("rule=\"{rule}\"")]);
        let counted = if mode == "warn" { 1.0 } else { 0.0 };
        assert_eq!((would("retry_in_one_place"), would("blame_in_one_place")), (counted, counted), "{mode}");
        for mesh in [mesh, refused, before, reader] {
            mesh.stop().await;
        }
    }
}

/// An app that answers once, breaks off when it has read the second request, and then is gone.
async fn dying_app() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        drop(listener);
        let mut wire = Wire::over(stream);
        wire.head().await;
        wire.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        wire.head().await;
    });
    addr
}

#[tokio::test]
async fn a_call_that_an_earlier_try_may_have_brought_to_the_app_is_not_called_unsent() {
    let mesh = Mesh::start(&policy(dying_app().await, "    circuitBreaker: off\n    ejection: off")).await;
    assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
    for (tries, is_unsent) in [("try 2/3", false), ("try 1/3", true)] {
        let answer = get(mesh.addr("in"), "/").await;
        let said = answer.header("proxy-status");
        assert!(said.contains("connect_failed") && said.contains(tries), "{answer:?}");
        assert_eq!(said.contains("hopguard-unsent"), is_unsent, "{answer:?}");
    }
    mesh.stop().await;
}

#[tokio::test]
async fn what_was_tried_out_is_remembered_for_its_path_and_not_for_the_whole_trace() {
    let bank = Bank::http1(&[Say::Status(503)]).await;
    let both = behind_a_caller(&[bank.addr()], "", QUICK)
        .replace("listeners:\n", "listeners:\n  - { name: back, bind: \"127.0.0.1:0\", to: app }\n");
    let mesh = Mesh::start(&both).await;
    let mut before = 0;
    for (path, tries) in [("/a", 3), ("/b", 3), ("/a?again", 1), ("/b", 1)] {
        let asked = request("GET", path).header("x-request-id", "one trace").body(empty()).unwrap();
        assert_eq!(ask(mesh.addr("in"), asked).await.status, 503);
        assert_eq!(bank.tries() - before, tries, "{path}");
        before = bank.tries();
    }
    mesh.stop().await;
}
