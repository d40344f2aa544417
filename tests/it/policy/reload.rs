//! Policy reload from a file, a folder and a mounted ConfigMap: calls in flight, listeners, and mistakes in the new policy.

use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::{Request, Response};
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::support::bank::{Bank, Say, behind_a_caller};
use crate::support::http::{Caller, Http1, Speaks, empty, feed, full, get, request};
use crate::support::load::Load;
use crate::support::program::{Program, replace};
use crate::support::upstream::{Gate, Upstream, own_address};
use crate::support::{Mesh, SOON, eventually};

/// A policy whose only difference is the value of `request`.
fn policy(upstream: SocketAddr, request: &str) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", to: app }}
destinations:
  - name: app
    endpoints: [\"{upstream}\"]
    timeouts: {{ connect: 90ms, request: {request} }}
    routes:
      - {{ name: feed, match: {{ path: /feed }}, stream: true }}
"
    )
}

/// The `request` that is in force.
fn in_force(policy: &Value) -> String {
    policy["destinations"][0]["routes"].as_array().unwrap().last().unwrap()["timeouts"]["request"]["value"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// Waits until the policy is as wanted; returns how long that took.
async fn until(program: &Program, wanted: impl Fn(&Value) -> bool) -> Duration {
    let begun = Instant::now();
    program.policy_until(SOON, wanted).await;
    begun.elapsed()
}

struct Site {
    folder: TempDir,
    file: PathBuf,
    upstream: Upstream,
    program: Program,
}

impl Site {
    async fn open() -> Self {
        let upstream = Upstream::fixed("hello").await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.yaml");
        std::fs::write(&file, policy(upstream.addr, "500ms")).unwrap();
        let program = Program::run(&file, &[]).await;
        Self { folder, file, upstream, program }
    }

    async fn addr(&self) -> SocketAddr {
        self.program.addr("in").await.unwrap()
    }

    fn text(&self, request: &str) -> String {
        policy(self.upstream.addr, request)
    }
}

/// Changes one after the other, each of which was waited for, were told of by the system: the check of the files each five
/// seconds would have found only one in an interval.
fn without_the_check(took: &[Duration]) {
    let intervals = u32::try_from(took.len()).unwrap() - 1;
    assert!(took.iter().sum::<Duration>() < Duration::from_secs(5) * intervals, "{took:?}");
}

#[tokio::test]
async fn a_changed_file_is_in_force_without_waiting_for_the_check_of_the_files() {
    let site = Site::open().await;
    let mut took = Vec::new();
    for value in ["600ms", "700ms", "800ms"] {
        std::fs::write(&site.file, site.text(value)).unwrap();
        took.push(until(&site.program, |policy| in_force(policy) == value).await);
    }
    without_the_check(&took);
    let mut took = Vec::new();
    for value in ["610ms", "710ms", "810ms"] {
        replace(&site.file, &site.text(value));
        took.push(until(&site.program, |policy| in_force(policy) == value).await);
    }
    without_the_check(&took);
    assert_eq!(site.program.metric("hopguard_policy_reloads_total", &["result=\"ok\""]).await, 7.0);
    let hash = site.program.document("/policy").await["hash"].as_str().unwrap().to_owned();
    assert_eq!(site.program.metric("hopguard_policy_info", &[&hash]).await, 1.0);
    assert_eq!(site.program.metric("hopguard_policy_info", &[]).await, 1.0, "one policy is in force");
    assert_eq!(get(site.addr().await, "/").await.body, "hello");
}

#[tokio::test]
async fn a_folder_is_one_policy() {
    let upstream = Upstream::fixed("hello").await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("10-base.yaml"), policy(upstream.addr, "500ms")).unwrap();
    let program = Program::run(folder.path(), &[]).await;
    let more = "apiVersion: hopguard.dev/v1alpha1\nkind: Policy\ndestinations:\n  - { name: bank, hosts: [bank], endpoints: [\"127.0.0.1:1\"] }\n";
    std::fs::write(folder.path().join("20-bank.yaml"), more).unwrap();
    let mut took = vec![until(&program, |policy| policy["destinations"].as_array().unwrap().len() == 2).await];
    std::fs::write(folder.path().join(".30-hidden.yaml"), "broken: [").unwrap();
    std::fs::remove_file(folder.path().join("20-bank.yaml")).unwrap();
    took.push(until(&program, |policy| policy["destinations"].as_array().unwrap().len() == 1).await);
    replace(&folder.path().join("10-base.yaml"), &policy(upstream.addr, "600ms"));
    took.push(until(&program, |policy| in_force(policy) == "600ms").await);
    without_the_check(&took);
    assert_eq!(program.metric("hopguard_policy_reloads_total", &["result=\"failed\""]).await, 0.0);
}

/// What a kubelet does: a new folder, a link to it under another name, and a rename.
fn swap(mount: &Path, version: usize, text: &str) {
    let data = mount.join(format!("..2026_{version}"));
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("policy.yaml"), text).unwrap();
    symlink(format!("..2026_{version}"), mount.join("..data_tmp")).unwrap();
    std::fs::rename(mount.join("..data_tmp"), mount.join("..data")).unwrap();
    if version > 1 {
        std::fs::remove_dir_all(mount.join(format!("..2026_{}", version - 1))).unwrap();
    } else {
        symlink("..data/policy.yaml", mount.join("policy.yaml")).unwrap();
    }
}

#[tokio::test]
async fn a_mounted_config_map_is_followed() {
    let upstream = Upstream::fixed("hello").await;
    for as_file in [true, false] {
        let mount = tempfile::tempdir().unwrap();
        swap(mount.path(), 1, &policy(upstream.addr, "500ms"));
        let path = if as_file { mount.path().join("policy.yaml") } else { mount.path().to_owned() };
        let program = Program::run(&path, &[]).await;
        let mut took = Vec::new();
        for (version, value) in [(2, "600ms"), (3, "700ms"), (4, "800ms")] {
            swap(mount.path(), version, &policy(upstream.addr, value));
            took.push(until(&program, |policy| in_force(policy) == value).await);
        }
        without_the_check(&took);
        assert_eq!(
            program.metric("hopguard_policy_reloads_total", &["result=\"failed\""]).await,
            0.0,
            "{}",
            program.log()
        );
    }
}

#[tokio::test]
async fn a_mistake_changes_nothing_and_says_so() {
    let site = Site::open().await;
    let to = site.addr().await;
    let before = site.program.document("/policy").await["hash"].clone();
    let broken = site.text("600ms").replace("timeouts:", "timeuots:");
    std::fs::write(&site.file, &broken).unwrap();
    until(&site.program, |policy| !policy["lastError"].is_null()).await;
    let document = site.program.document("/policy").await;
    assert_eq!((&document["hash"], in_force(&document)), (&before, "500ms".to_owned()));
    let message = document["lastError"]["message"].as_str().unwrap();
    for wanted in ["policy.yaml:10", "timeuots", "timeouts"] {
        assert!(message.contains(wanted), "{wanted} is not in {message}");
    }
    let log = site.program.log();
    assert!(log.contains("timeuots") && log.contains("policy.yaml:10"), "{log}");
    assert_eq!(site.program.metric("hopguard_policy_reloads_total", &["result=\"failed\""]).await, 1.0);
    assert_eq!(site.program.get("/ready").await.status, 200);
    assert_eq!(get(to, "/").await.body, "hello");
    std::fs::write(&site.file, site.text("700ms")).unwrap();
    until(&site.program, |policy| in_force(policy) == "700ms" && policy["lastError"].is_null()).await;
}

#[tokio::test]
async fn a_file_that_is_away_for_a_while_changes_nothing() {
    let site = Site::open().await;
    let to = site.addr().await;
    let away = site.folder.path().join("away");
    std::fs::rename(&site.file, &away).unwrap();
    until(&site.program, |policy| !policy["lastError"].is_null()).await;
    assert_eq!(get(to, "/").await.body, "hello");
    std::fs::rename(&away, &site.file).unwrap();
    until(&site.program, |policy| policy["lastError"].is_null()).await;
    std::fs::write(&site.file, site.text("700ms")).unwrap();
    until(&site.program, |policy| in_force(policy) == "700ms").await;
    assert_eq!(get(to, "/").await.body, "hello");
}

#[tokio::test]
async fn listeners_come_and_go_and_the_others_do_not_notice() {
    let site = Site::open().await;
    let to = site.addr().await;
    let mut kept = Http1::open(to).await;
    assert_eq!(kept.ask(request("GET", "/").body(empty()).unwrap()).await.body, "hello");
    let second = "  - { name: second, bind: \"127.0.0.1:0\", to: app }\ndestinations:";
    std::fs::write(&site.file, site.text("500ms").replace("destinations:", second)).unwrap();
    until(&site.program, |policy| policy["listeners"].as_array().unwrap().len() == 2).await;
    let other = site.program.addr("second").await.expect("it listens");
    assert_eq!(get(other, "/").await.body, "hello");
    assert_eq!(site.addr().await, to, "a listener that did not change keeps its port");
    assert_eq!(kept.ask(request("GET", "/").body(empty()).unwrap()).await.body, "hello");
    std::fs::write(&site.file, site.text("500ms")).unwrap();
    until(&site.program, |policy| policy["listeners"].as_array().unwrap().len() == 1).await;
    let begun = Instant::now();
    while TcpStream::connect(other).await.is_ok() {
        assert!(begun.elapsed() < SOON, "a listener that is gone still listens");
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(kept.ask(request("GET", "/").body(empty()).unwrap()).await.body, "hello");
    assert_eq!(site.upstream.connections(), 1, "the pool was kept");
}

/// Waits until a connection of HTTP/2 has been told to take no more requests.
async fn sent_away(caller: &mut Caller) {
    let Caller::Http2(sender) = caller else { panic!("this is for HTTP/2") };
    // Each look needs the client's own task to have run.
    let begun = Instant::now();
    while sender.ready().await.is_ok() {
        assert!(begun.elapsed() < SOON, "no GOAWAY came");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_listener_that_is_renamed_or_gone_sends_its_callers_away_and_cuts_nobody() {
    let gate = Gate::closed();
    let upstream = Upstream::gated("hello", &gate).await;
    let (first, second) = (own_address(), own_address());
    let before = policy(upstream.addr, "20s").replace(
        "destinations:",
        &format!("  - {{ name: old, bind: \"{first}\", to: app }}\n  - {{ name: away, bind: \"{second}\", to: app }}\ndestinations:"),
    );
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.yaml");
    std::fs::write(&file, &before).unwrap();
    let program = Program::run(&file, &[]).await;
    let path = |path| Request::get(path).body(empty()).unwrap();
    let mut callers = Vec::new();
    for (to, speaks) in
        [(first, Speaks::Http1), (first, Speaks::Http2), (second, Speaks::Http1), (second, Speaks::Http2)]
    {
        let mut idle = Caller::open(speaks, to).await;
        assert_eq!(idle.ask(path("/")).await.body, "hello");
        let mut busy = Caller::open(speaks, to).await;
        let answer = tokio::spawn(async move { (busy.ask(path("/slow")).await, busy) });
        callers.push((to, speaks, idle, answer));
    }
    crate::support::eventually(|| (upstream.requests() == 8).then_some(())).await;

    let lines = before.lines().filter(|line| !line.contains("name: away"));
    replace(&file, &lines.collect::<Vec<_>>().join("\n").replace("name: old", "name: new"));
    until(&program, |policy| policy["listeners"].as_array().unwrap().len() == 2).await;
    // The policy is in force a moment before its listeners are; those who are sent away know of both.
    for (_, speaks, idle, _) in &mut callers {
        if *speaks == Speaks::Http2 {
            sent_away(idle).await;
        }
    }
    gate.release(4);
    for (to, speaks, mut idle, answer) in callers {
        let case = format!("{speaks:?}, {}", if to == first { "renamed" } else { "gone" });
        if speaks == Speaks::Http1 {
            let answer = idle.ask(path("/")).await;
            assert_eq!(answer.status, if to == first { 200 } else { 503 }, "{case}: {answer:?}");
            assert_eq!(answer.header("connection"), "close", "{case}");
        }
        let (answer, mut busy) = timeout(SOON, answer).await.expect("it was cut").unwrap();
        assert_eq!((answer.status.as_u16(), &*answer.body), (200, &b"hello"[..]), "{case}");
        match speaks {
            Speaks::Http1 => assert_eq!(answer.header("connection"), "close", "{case}"),
            Speaks::Http2 => sent_away(&mut busy).await,
        }
    }
    assert_eq!(get(first, "/").await.body, "hello");
}

#[tokio::test]
async fn no_connection_is_lost_between_a_listener_and_its_successor() {
    let upstream = Upstream::fixed("hello").await;
    let (address, folder) = (own_address(), tempfile::tempdir().unwrap());
    let file = folder.path().join("policy.yaml");
    let text = policy(upstream.addr, "5s").replace("127.0.0.1:0", &address.to_string());
    std::fs::write(&file, &text).unwrap();
    let program = Program::run(&file, &["--workers", "2"]).await;
    let callers: Vec<_> = (0..8)
        .map(|_| {
            tokio::spawn(async move {
                loop {
                    assert_eq!(get(address, "/").await.status, 200);
                }
            })
        })
        .collect();
    for round in 0..30 {
        let name = format!("in{round}");
        replace(&file, &text.replace("name: in,", &format!("name: {name},")));
        until(&program, |policy| policy["listeners"][0]["name"] == *name).await;
    }
    assert!(callers.iter().all(|caller| !caller.is_finished()), "a call was lost");
    callers.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn a_listener_whose_port_is_taken_changes_nothing() {
    let site = Site::open().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let second = format!("  - {{ name: second, bind: \"127.0.0.1:{port}\", to: app }}\ndestinations:");
    std::fs::write(&site.file, site.text("600ms").replace("destinations:", &second)).unwrap();
    until(&site.program, |policy| !policy["lastError"].is_null()).await;
    let document = site.program.document("/policy").await;
    assert!(document["lastError"]["message"].as_str().unwrap().contains(&port.to_string()), "{document}");
    assert_eq!(in_force(&document), "500ms", "all of a policy, or nothing of it");
    assert_eq!(get(site.addr().await, "/").await.body, "hello");
}

#[tokio::test]
async fn a_call_in_flight_keeps_the_policy_with_which_it_began() {
    let gate = Gate::closed();
    let held = gate.clone();
    let upstream = Upstream::http1(move |_| {
        let held = held.clone();
        async move {
            held.pass().await;
            Response::new(full("late"))
        }
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.yaml");
    std::fs::write(&file, policy(upstream.addr, "20s")).unwrap();
    let program = Program::run(&file, &[]).await;
    let to = program.addr("in").await.unwrap();
    let call = tokio::spawn(async move { get(to, "/").await });
    crate::support::eventually(|| (upstream.requests() == 1).then_some(())).await;
    std::fs::write(&file, policy(upstream.addr, "100ms")).unwrap();
    until(&program, |policy| in_force(policy) == "100ms").await;
    assert_eq!(get(to, "/").await.status, 504, "the new policy holds for new calls");
    gate.release(2);
    assert_eq!(call.await.unwrap().body, "late");
}

/// Longer than all the reloads of the test.
const LOAD: Duration = Duration::from_secs(60);

#[tokio::test]
async fn two_hundred_reloads_under_load_lose_no_call_and_cut_no_connection() {
    let upstream = Upstream::http1(|request: Request<hyper::body::Incoming>| async move {
        if request.uri().path() != "/feed" {
            return Response::new(full("hello"));
        }
        let (pieces, body) = feed();
        tokio::spawn(async move {
            while pieces.send("tick").await {
                sleep(Duration::from_millis(200)).await;
            }
        });
        Response::new(body)
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.yaml");
    std::fs::write(&file, policy(upstream.addr, "5s")).unwrap();
    let program = Program::run(&file, &["--workers", "2"]).await;
    let to = program.addr("in").await.unwrap();
    let mut streams = Vec::new();
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let mut caller = Caller::open(speaks, to).await;
        let response = caller.send(Request::get("/feed").body(empty()).unwrap()).await.unwrap();
        streams.push((caller, response));
    }
    let pause = Duration::from_millis(20);
    let load = Load::none().add(to, Speaks::Http1, 6, pause).add(to, Speaks::Http2, 6, pause);
    let begun = Instant::now();
    for reload in 1..=200_u32 {
        let good = policy(upstream.addr, if reload % 2 == 0 { "5s" } else { "6s" });
        let text = if reload % 3 == 0 { good.replace("destinations:", "destination:") } else { good };
        replace(&file, &text);
        sleep((LOAD * reload / 200).saturating_sub(begun.elapsed())).await;
    }
    for (_, response) in &mut streams {
        // Everything that has come so far, and then a piece that comes only now.
        for _ in 0..20 {
            let piece = timeout(SOON, response.body_mut().frame()).await.expect("it fell silent");
            piece.expect("it ended").expect("it was cut");
        }
    }
    let report = load.end().await;
    assert!(report.failures.is_empty(), "{} of {}: {:#?}", report.failures.len(), report.good, &report.failures[..1]);
    assert_eq!(report.cut, 0);
    assert!(report.good > 2_000, "hardly any load: {}", report.good);
    let loaded = program.metric("hopguard_policy_reloads_total", &["result=\"ok\""]).await;
    let failed = program.metric("hopguard_policy_reloads_total", &["result=\"failed\""]).await;
    assert!(loaded >= 60.0 && failed >= 30.0, "{loaded} were taken up and {failed} refused");
    assert_eq!(
        program.metric("hopguard_listener_connections_total", &["in"]).await,
        14.0,
        "a caller had to come again"
    );
    let refused = program.metric("hopguard_requests_total", &["outcome"]).await
        - program.metric("hopguard_requests_total", &["outcome=\"ok\""]).await;
    assert_eq!(refused, 0.0, "{:?}", program.access().iter().find(|line| line["outcome"] != "ok"));
}

#[tokio::test]
async fn a_breaker_or_an_ejection_that_the_policy_has_no_more_is_shown_no_more() {
    let bad = Bank::http1(&[Say::Status(500)]).await;
    let good = Upstream::fixed("good").await;
    let policy = |name: &str, breaker: &str, ejection: &str| {
        let endpoints = [bad.addr(), good.addr];
        let more = format!("    retry: off\n    circuitBreaker: {breaker}\n    ejection: {ejection}");
        behind_a_caller(&endpoints, "", &more)
            .replace("to: app", &format!("to: {name}"))
            .replace("name: app", &format!("name: {name}"))
    };
    let (breaker, ejection) = (
        "{ failureRate: 0.1, minRequests: 1, openFor: 1m, openForMax: 1m }",
        "{ consecutiveFailures: 1, openFor: 1m }",
    );
    let mesh = Mesh::start(&policy("app", breaker, ejection)).await;
    let shown = || {
        let labels = ["destination=\"app\""];
        (mesh.metric("hopguard_circuit_breaker_state", &labels), mesh.metric("hopguard_ejected_endpoints", &labels))
    };
    while get(mesh.addr("in"), "/").await.status == 200 {}
    assert_eq!(get(mesh.addr("in"), "/").await.problem()["refusal"], "circuit_open");
    assert_eq!(shown(), (2.0, 1.0));
    for (breaker, ejection, wanted) in [
        ("off", ejection, (0.0, 1.0)),
        (breaker, "off", (2.0, 0.0)),
        ("off", "off", (0.0, 0.0)),
        (breaker, ejection, (2.0, 1.0)),
    ] {
        mesh.reload(&policy("app", breaker, ejection)).await;
        assert_eq!(shown(), wanted, "{breaker} {ejection}");
    }
    mesh.reload(&policy("other", breaker, ejection)).await;
    assert_eq!(shown(), (0.0, 0.0), "its destination is gone");
    let other = ["destination=\"other\""];
    assert!(!mesh.metrics().await.contains("breaker_state{destination=\"other\""), "nothing has happened to it");
    assert_eq!(mesh.metric("hopguard_ejected_endpoints", &other), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn what_a_call_of_an_older_policy_still_brings_about_is_not_shown() {
    let gate = Gate::closed();
    let held = gate.clone();
    let upstream = Upstream::http1(move |_| {
        let held = held.clone();
        async move {
            held.pass().await;
            Response::builder().status(500).body(empty()).unwrap()
        }
    })
    .await;
    let more = "    retry: off\n    circuitBreaker: { consecutiveFailures: 1 }";
    let with = behind_a_caller(&[upstream.addr], "", more);
    let mesh = Mesh::start(&with).await;
    let to = mesh.addr("in");
    let asked = tokio::spawn(async move { get(to, "/").await });
    eventually(|| (upstream.requests() == 1).then_some(())).await;
    mesh.reload(&with.replace("circuitBreaker: { consecutiveFailures: 1 }", "circuitBreaker: off")).await;
    gate.release(1);
    assert_eq!(asked.await.unwrap().status, 500);
    mesh.ended("server_error", 1).await;
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &["state=\"open\""]), 1.0);
    assert_eq!(mesh.metric("hopguard_circuit_breaker_state", &[]), 0.0);
    mesh.stop().await;
}
