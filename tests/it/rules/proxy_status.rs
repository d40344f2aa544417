//! `Proxy-Status` between hops: a failure whose tries are used up, and a request that the app has not received.

use std::net::SocketAddr;

use crate::support::bank::{Bank, Say, behind_a_caller};
use crate::support::http::{Caller, Speaks, ask, empty, full, get, grpc, grpc_request, request};
use crate::support::upstream::{nobody, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

const CHARGE: &str = "/shop.v1.Payment/Charge";

/// Retries that wait for next to nothing, and nothing else that comes between.
const QUICK: &str =
    "    circuitBreaker: off\n    ejection: off\n    retry: { idempotent: true, backoff: { max: 1ms } }";

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
        assert_eq!((&line["attempt"], &line["retry_withheld"]), (&1.into(), &"retried_below".into()), "{line}");
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
    for (mode, marks, tries) in [("enforce", true, 1), ("dryRun", false, 3), ("off", false, 3)] {
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
        let would = |rule: &str| reader.metric("hopguard_dry_run_total", &[&format!("rule=\"{rule}\"")]);
        let counted = if mode == "dryRun" { 1.0 } else { 0.0 };
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
    for (tries, is_unsent) in [("attempt 2/3", false), ("attempt 1/3", true)] {
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
    let one_side = behind_a_caller(&[bank.addr()], "", QUICK);
    let both = one_side.replace("listeners:\n", "listeners:\n  - { name: back, bind: \"127.0.0.1:0\", to: app }\n");
    for text in [one_side, both] {
        let mesh = Mesh::start(&text).await;
        let mut before = bank.tries();
        for (path, tries) in [("/a", 3), ("/b", 3), ("/a?again", 1), ("/b", 1)] {
            let asked = request("GET", path).header("x-request-id", "one trace").body(empty()).unwrap();
            assert_eq!(ask(mesh.addr("in"), asked).await.status, 503);
            assert_eq!(bank.tries() - before, tries, "{path}");
            before = bank.tries();
        }
        mesh.ended("server_error", 4).await;
        assert_eq!(withheld(&mesh), [0.0, 2.0, 2.0]);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn what_was_tried_out_is_remembered_when_only_the_trailers_say_that_it_failed() {
    let table: [(&'static [Say], usize); 2] = [
        (&[Say::Grpc(14, &[]), Say::Trailers(&[("grpc-status", "14")]), Say::Grpc(14, &[])], 1),
        (&[Say::Grpc(14, &[]), Say::Trailers(&[("grpc-status", "0")]), Say::Grpc(14, &[])], 3),
    ];
    for (script, tries) in table {
        let bank = Bank::http2(script).await;
        let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", QUICK)).await;
        let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
        for so_far in [2, 2 + tries] {
            let mut asked = grpc_request(CHARGE, full(&b"\0\0\0\0\0"[..]));
            asked.headers_mut().insert("x-request-id", "one trace".parse().unwrap());
            caller.ask(asked).await;
            assert_eq!(bank.tries(), so_far, "{script:?}");
        }
        mesh.stop().await;
    }
}

/// A call of one trace: its status, and how many tries the bank has seen of it.
async fn tries_of(mesh: &Mesh, bank: &Bank, method: &str, path: &str) -> (u16, usize) {
    let before = bank.tries();
    let mut asked = request(method, path).header("x-request-id", "one trace").body(empty()).unwrap();
    asked.headers_mut().insert("host", bank.addr().to_string().parse().unwrap());
    let answer = ask(mesh.addr("in"), asked).await;
    (answer.status.as_u16(), bank.tries() - before)
}

fn withheld(mesh: &Mesh) -> [f64; 3] {
    ["not_safe", "tries_used_up", "retried_below"]
        .map(|why| mesh.metric("hopguard_retries_withheld_total", &[&format!("reason=\"{why}\"")]))
}

#[tokio::test]
async fn what_was_tried_once_because_it_is_not_safe_leaves_their_tries_to_the_others_of_its_trace() {
    let bank = Bank::http1(&[Say::Status(503)]).await;
    let more = "    circuitBreaker: off\n    ejection: off\n    retry: { backoff: { max: 1ms } }";
    let both = behind_a_caller(&[bank.addr()], "", more)
        .replace("listeners:\n", "listeners:\n  - { name: back, bind: \"127.0.0.1:0\", to: app }\n");
    let mesh = Mesh::start(&both).await;
    for (method, tries) in [("POST", 1), ("GET", 3), ("PUT", 3), ("GET", 1)] {
        assert_eq!(tries_of(&mesh, &bank, method, "/").await, (503, tries), "{method}");
    }
    mesh.ended("server_error", 4).await;
    assert_eq!(withheld(&mesh), [1.0, 2.0, 1.0]);
    let why = |line: &String| serde_json::from_str::<serde_json::Value>(line).unwrap()["retry_withheld"].clone();
    let whys: Vec<_> = mesh.log().iter().map(why).collect();
    assert_eq!(whys, ["not_safe", "tries_used_up", "tries_used_up", "retried_below"]);
    mesh.stop().await;
}

#[tokio::test]
async fn one_host_of_a_destination_that_leads_to_many_uses_up_no_tries_of_another() {
    let (bank, shop) = (Bank::http1(&[Say::Status(503)]).await, Bank::http1(&[Say::Status(503)]).await);
    let text = "apiVersion: hopguard.dev/v1alpha1
kind: Policy
listeners:
  - { name: back, bind: \"127.0.0.1:0\", to: app }
  - { name: in, bind: \"127.0.0.1:0\", forward: true }
destinations:
  - { name: app, endpoints: [\"127.0.0.1:1\"] }
  - { name: others, hosts: [\"*\"], circuitBreaker: off, retry: { backoff: { max: 1ms } } }
";
    let mesh = Mesh::start(text).await;
    for (host, tries) in [(&bank, 3), (&shop, 3), (&bank, 1), (&shop, 1)] {
        assert_eq!(tries_of(&mesh, host, "GET", "/api").await, (503, tries));
    }
    assert_eq!(withheld(&mesh), [0.0, 2.0, 2.0]);
    mesh.stop().await;
}

#[tokio::test]
async fn a_call_that_was_turned_away_before_its_first_try_has_all_its_tries_left() {
    let bank = Bank::http1(&[Say::Hang, Say::Status(503)]).await;
    let more = format!("{QUICK}\n    limits: {{ inFlight: 1, queue: 0 }}");
    let both = behind_a_caller(&[bank.addr()], "", &more)
        .replace("listeners:\n", "listeners:\n  - { name: back, bind: \"127.0.0.1:0\", to: app }\n");
    let mesh = Mesh::start(&both).await;
    let to = mesh.addr("in");
    let holds = tokio::spawn(async move { get(to, "/hold").await });
    eventually(|| (bank.tries() == 1).then_some(())).await;
    assert_eq!(tries_of(&mesh, &bank, "GET", "/").await, (503, 0));
    mesh.only("queue_full").await;
    holds.abort();
    eventually(|| (mesh.metric("hopguard_in_flight_requests", &["app"]) == 0.0).then_some(())).await;
    for tries in [3, 1] {
        assert_eq!(tries_of(&mesh, &bank, "GET", "/").await, (503, tries));
    }
    assert_eq!(withheld(&mesh), [0.0, 1.0, 1.0]);
    mesh.stop().await;
}

/// What two endpoints say to a POST, the modes, how often it arrives, and how often the caller's side would have acted.
type Said = (&'static [Say], &'static str, usize, f64);

#[tokio::test]
async fn that_nobody_has_seen_a_call_is_believed_of_the_nearest_proxy_and_in_spite_of_the_other_mark() {
    const BOTH: &[Say] = &[Say::With(503, &[("proxy-status", "hopguard; hopguard-unsent; hopguard-final")])];
    let table: [Said; 4] = [
        (&[Say::With(503, &[("proxy-status", "hopguard; hopguard-unsent")])], "", 3, 0.0),
        (&[Say::With(503, &[("proxy-status", "hopguard; hopguard-unsent, edge; received-status=503")])], "", 1, 0.0),
        (BOTH, "", 2, 0.0),
        (BOTH, "retryInOnePlace: dryRun", 3, 1.0),
    ];
    for (script, rules, tries, would) in table {
        let banks = [Bank::http1(script).await, Bank::http1(script).await];
        let endpoints = [banks[0].addr(), banks[1].addr()];
        let mesh = Mesh::start(&behind_a_caller(&endpoints, rules, "")).await;
        let answer = ask(mesh.addr("in"), request("POST", "/pay").body(empty()).unwrap()).await;
        let arrived = banks[0].tries() + banks[1].tries();
        assert_eq!((answer.status.as_u16(), arrived), (503, tries), "{script:?} {rules}");
        let line = mesh.only("server_error").await;
        assert_eq!((&line["attempt"], line["dry_run"].is_null()), (&tries.into(), would == 0.0), "{line}");
        assert_eq!(mesh.metric("hopguard_retries_total", &[]), tries as f64 - 1.0, "{script:?}");
        assert_eq!(mesh.metric("hopguard_dry_run_total", &[]), would, "{script:?} {rules}");
        mesh.stop().await;
    }
}
