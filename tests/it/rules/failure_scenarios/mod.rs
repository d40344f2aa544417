//! Failure scenarios over a chain of services, each in a short form and with its rule off for comparison: retry storm, work
//! after the deadline, keep-alive race, hanging upstream, rolling restart, policy changes under load.

mod restartable_app;
mod service_chain;

use std::collections::VecDeque;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use hopguard::config::WatchedPath;
use hopguard::policy::load::fingerprint;
use hyper::{Method, Response};
use tokio::time::{Instant, sleep};

use self::restartable_app::{Instance, racing};
use self::service_chain::{Call, Callers, Chain, Does, Setting, status, steady, traced};
use crate::support::bank::behind_a_caller;
use crate::support::http::{Answer, Caller, Speaks, full};
use crate::support::upstream::{Upstream, own_address, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, SOON, eventually};

const BOTH: [Method; 2] = [Method::GET, Method::POST];

const fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Hopguards that remember no tries, so that nothing but their budgets stands between a failure and 27 of them.
async fn outbound_only(budget: &str) -> Chain {
    let more = format!("    circuitBreaker: off\n    ejection: off\n    timeouts: {{ request: 8s }}\n{budget}");
    Chain::start(&Setting { destinations: [&more; 3], rules: "retryInOnePlace: off", ..Setting::default() }).await
}

#[tokio::test]
async fn a_storm_of_retries_stays_within_the_budgets_and_leaves_nothing_behind() {
    let chain = outbound_only("").await;
    let gap = millis(10);
    let before = steady(chain.door, 50, gap).await;
    assert!(!before.iter().any(Call::failed));
    chain.bank.turn(Does::Fail);
    let tries = chain.bank.upstream.requests();
    let during = steady(chain.door, 150, gap).await;
    let tries = (chain.bank.upstream.requests() - tries) as f64 / during.len() as f64;
    assert!(during.iter().all(Call::failed));
    assert!(tries > 1.0 && tries <= 1.3, "{tries} tries at D for each call");
    chain.bank.turn(Does::Answer);
    let tries = chain.bank.upstream.requests();
    let after = steady(chain.door, 100, gap).await;
    assert_eq!(after.iter().filter(|call| call.failed()).count(), 0, "calls failed after the recovery");
    assert_eq!(chain.bank.upstream.requests() - tries, after.len(), "tries after the recovery");
    chain.stop().await;
}

#[tokio::test]
async fn without_a_budget_the_same_storm_is_twenty_seven_times_as_strong() {
    let chain =
        outbound_only("    retry: { budget: { minPerSecond: 100000 }, backoff: { base: 1ms, max: 1ms } }").await;
    chain.bank.turn(Does::Fail);
    let calls = steady(chain.door, 10, millis(20)).await;
    assert_eq!(chain.bank.upstream.requests(), 27 * calls.len());
    chain.stop().await;
}

/// A caller gives A 200 ms; B calls on after 300.
async fn called_after_the_deadline(rules: &str) -> (Answer, [usize; 2], Chain) {
    let setting = Setting { both_sides: true, rules, b_takes: millis(300), ..Setting::default() };
    let chain = Chain::start(&setting).await;
    let mut asked = traced(&Method::GET);
    asked.headers_mut().insert("x-envoy-expected-rq-timeout-ms", "200".parse().unwrap());
    let answer = Caller::open(Speaks::Http1, chain.door).await.ask(asked).await;
    let [_, b, c] = &chain.services;
    eventually(|| (b.app.requests() == 1 && b.busy.now() == 0).then_some(())).await;
    let reached = [c.app.requests(), chain.bank.upstream.requests()];
    (answer, reached, chain)
}

#[tokio::test]
async fn a_call_after_the_deadline_reaches_nobody() {
    let begun = Instant::now();
    let (answer, reached, chain) = called_after_the_deadline("").await;
    assert_eq!((answer.status.as_u16(), reached), (504, [0, 0]), "{answer:?} after {:?}", begun.elapsed());
    assert_eq!(chain.services[1].mesh.count("deadline_spent"), 1.0);
    chain.stop().await;
    let (answer, reached, chain) = called_after_the_deadline("deadline: off").await;
    assert_eq!((answer.status.as_u16(), reached), (200, [1, 1]), "{answer:?}");
    chain.stop().await;
}

#[tokio::test]
async fn a_caller_that_hangs_up_early_leaves_its_deadline_behind() {
    let setting = Setting { both_sides: true, b_takes: millis(300), ..Setting::default() };
    let chain = Chain::start(&setting).await;
    let [_, b, c] = &chain.services;
    let mut wire = Wire::open(b.mesh.addr("in")).await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    wire.send(format!(
        "GET /pay HTTP/1.1\r\nhost: b\r\ntraceparent: {trace}\r\nx-envoy-expected-rq-timeout-ms: 200\r\n\r\n"
    ))
    .await;
    eventually(|| (b.app.requests() == 1).then_some(())).await;
    drop(wire);
    eventually(|| (b.busy.now() == 0).then_some(())).await;
    assert_eq!((c.app.requests(), b.mesh.count("deadline_spent")), (0, 1.0));
    chain.stop().await;
}

/// D closes what was idle for this long.
const CLOSES_AFTER: Duration = millis(200);

/// Calls of one method over a connection that is idle a little longer than D likes. Returns them with the races.
async fn races(method: Method, inbound: bool, retry: &str, calls: usize) -> (Vec<Call>, usize) {
    let (bank, races) = racing(CLOSES_AFTER).await;
    let before = if inbound { Some(Mesh::start(&policy(bank.addr, retry)).await) } else { None };
    let next = before.as_ref().map_or(bank.addr, |mesh| mesh.addr("in"));
    let mesh = Mesh::start(&behind_a_caller(&[next], "", retry)).await;
    let mut made = Vec::new();
    for _ in 0..calls {
        made.push(Call::make(mesh.addr("in"), method.clone()).await);
        sleep(CLOSES_AFTER + millis(30)).await;
    }
    mesh.stop().await;
    if let Some(before) = before {
        before.stop().await;
    }
    (made, races.load(SeqCst))
}

#[tokio::test]
async fn the_keep_alive_race_costs_a_get_nothing_and_a_post_nothing_once_it_is_known() {
    let (alone, behind_a_sidecar) = (false, true);
    let [gets, posts] = [Method::GET, Method::POST].map(|method| {
        let other = method.clone();
        async { tokio::join!(races(method, alone, "", 8), races(other, behind_a_sidecar, "", 8)) }
    });
    let (gets, posts, (unretried, lost)) = tokio::join!(gets, posts, races(Method::GET, alone, "    retry: off", 3));
    for (calls, races) in [gets.0, gets.1] {
        assert!(races >= 1, "there was no race");
        assert!(!calls.iter().any(Call::failed), "{calls:#?}");
    }
    let (calls, races) = posts.1;
    assert!(races == 0 && !calls.iter().any(Call::failed), "{races} races behind the sidecar: {calls:#?}");
    let (calls, races) = posts.0;
    let failed: Vec<_> = calls.iter().filter(|call| call.failed()).collect();
    assert!(races >= 1 && races == failed.len(), "{races} races, but {failed:#?}");
    for call in &failed {
        let problem: serde_json::Value = serde_json::from_str(&call.said).unwrap();
        assert_eq!((call.status, &problem["notRetried"]), (502, &"not_safe".into()), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains("over a reused connection"), "{problem}");
    }
    assert!(!calls[4..].iter().any(Call::failed), "it does not learn: {calls:#?}");
    assert!(lost >= 1 && unretried.iter().any(Call::failed), "without retries a GET is lost too");
}

/// D hangs at the end of a chain with both sides, where each hop allows its calls `limits`.
async fn hanging(limits: &str) -> (Chain, Callers, Instant) {
    // Long enough that a call which D answers is in time on a busy machine too.
    let more = [3000, 2250, 1500].map(|time| format!("    timeouts: {{ request: {time}ms }}\n{limits}"));
    let destinations = [&more[0][..], &more[1][..], &more[2][..]];
    let chain = Chain::start(&Setting { both_sides: true, destinations, ..Setting::default() }).await;
    let callers = Callers::begin(chain.door, BOTH, 40, millis(600));
    eventually(|| (callers.good() >= 40).then_some(())).await;
    chain.bank.turn(Does::Hang);
    for service in &chain.services {
        service.busy.most();
    }
    (chain, callers, Instant::now())
}

/// An answer in less time is no wait for D.
const FAST: Duration = millis(150);

#[tokio::test]
async fn a_callee_that_hangs_ties_up_few_and_is_over_once_it_is_back() {
    let (chain, callers, hung) = hanging("    limits: { inFlight: 8, queue: 4 }").await;
    // Without a wait for D: by a queue that is full, or by the breaker.
    let refused = || ["queue_full", "circuit_open"].map(|why| chain.services[2].mesh.count(why)).iter().sum::<f64>();
    eventually(|| (refused() >= 10.0).then_some(())).await;
    eventually(|| (callers.count(|call| call.failed() && call.begun > hung) > 40).then_some(())).await;
    let tied_up = chain.services.each_ref().map(|service| service.busy.most());
    chain.bank.turn(Does::Answer);
    let is_open = || chain.services[2].mesh.metric("hopguard_circuit_breaker_state", &["destination=\"d\""]) != 0.0;
    eventually(|| (!is_open()).then_some(())).await;
    let over = Instant::now();
    eventually(|| (callers.count(|call| !call.failed() && call.begun > over) >= 80).then_some(())).await;
    let calls = callers.end().await;
    let failed = calls.iter().filter(|call| call.failed() && call.begun > over).count();
    let late: Vec<_> = calls.iter().filter(|call| call.begun > over).collect();
    assert!(failed * 4 < late.len(), "{failed} of {} calls failed after the breaker was closed", late.len());
    assert!(tied_up[1] <= 8 && tied_up[2] <= 8, "tied up: {tied_up:?}");
    let opened = |service: usize, labels: &[&str]| {
        let mesh = &chain.services[service].mesh;
        mesh.metric("hopguard_circuit_breaker_changes_total", &[labels, &["state=\"open\""]].concat())
    };
    assert!(opened(2, &["destination=\"d\""]) >= 1.0);
    let elsewhere = [opened(0, &[]), opened(1, &[]), opened(2, &["destination=\"c\""])];
    assert_eq!(elsewhere, [0.0; 3], "a breaker opened where nothing had failed");
    chain.stop().await;
}

#[tokio::test]
async fn without_limits_and_breaker_a_callee_that_hangs_ties_up_everybody() {
    let (chain, callers, hung) = hanging("    circuitBreaker: off\n    ejection: off").await;
    let [_, b, c] = &chain.services;
    eventually(|| (b.busy.now() > 16 && c.busy.now() > 16).then_some(())).await;
    eventually(|| (callers.count(|call| call.failed() && call.begun > hung) > 16).then_some(())).await;
    chain.bank.turn(Does::Answer);
    let calls = callers.end().await;
    let slow: Vec<_> = calls.iter().filter(|call| call.failed() && call.begun > hung).collect();
    assert!(slow.len() > 16 && slow.iter().all(|call| call.took() >= FAST), "{slow:#?}");
    chain.stop().await;
}

/// Waits until the hopguard before an instance lets calls through again, as a readiness probe does.
async fn ready(sidecar: &Mesh) {
    let begun = Instant::now();
    while Call::make(sidecar.addr("in"), Method::GET).await.failed() {
        assert!(begun.elapsed() < SOON, "it does not come back");
        sleep(millis(20)).await;
    }
}

/// Restarts D's two instances in turn under load. Returns the calls, and how many POSTs met a close.
async fn rolling(rules: &str, methods: [Method; 2], restarts: usize) -> (Vec<Call>, usize) {
    let mut instances = VecDeque::new();
    for _ in 0..2 {
        let instance = Instance::start(own_address()).await;
        let sidecar = Mesh::start(&policy(instance.addr, "")).await;
        instances.push_back((instance, sidecar));
    }
    let endpoints: Vec<_> = instances.iter().map(|(_, sidecar)| sidecar.addr("in")).collect();
    let mesh = Mesh::start(&behind_a_caller(&endpoints, rules, "")).await;
    let callers = Callers::begin(mesh.addr("in"), methods, 4, millis(20));
    let some_more = async || {
        let good = callers.good();
        eventually(|| (callers.good() >= good + 20).then_some(())).await;
    };
    let mut lost = 0;
    for _ in 0..restarts {
        some_more().await;
        let (instance, sidecar) = instances.pop_front().unwrap();
        let addr = instance.addr;
        lost += instance.end().await;
        some_more().await;
        let instance = Instance::start(addr).await;
        ready(&sidecar).await;
        instances.push_back((instance, sidecar));
    }
    some_more().await;
    let calls = callers.end().await;
    mesh.stop().await;
    for (_, sidecar) in instances {
        sidecar.stop().await;
    }
    (calls, lost)
}

#[tokio::test]
async fn a_rolling_restart_behind_sidecars_that_stay_is_seen_by_nobody() {
    let (calls, lost) = rolling("", BOTH, 4).await;
    let failed: Vec<_> = calls.iter().filter(|call| call.failed()).collect();
    // A POST that was on its way when the app closed may have been seen; on loopback hardly any is.
    let posts = failed.iter().filter(|call| call.method == Method::POST).count();
    assert!(posts <= lost && posts == failed.len(), "{lost} POSTs met a close, but of {}: {failed:#?}", calls.len());
    assert!(calls.len() > 100, "hardly any load: {}", calls.len());
}

#[tokio::test]
async fn without_the_mark_a_restart_costs_posts() {
    let (calls, lost) = rolling("unsent: off", [Method::POST, Method::POST], 1).await;
    let failed: Vec<_> = calls.iter().filter(|call| call.failed()).collect();
    assert!(failed.len() > lost, "{lost} of {} POSTs met a close", calls.len());
}

#[tokio::test]
async fn twenty_changes_of_the_rules_under_load_lose_no_call_and_bring_nobody_back() {
    let bad = Upstream::http1(|_| async { status(500) }).await;
    let good = Upstream::http1(|_| async {
        sleep(millis(10)).await;
        Response::new(full("hello"))
    })
    .await;
    let written = |change: u32, ejection: &str| {
        let (request, in_flight) = (5000 + change, 200 + change);
        let more = format!(
            "    retry: off
    circuitBreaker: off
    timeouts: {{ request: {request}ms }}
    limits: {{ inFlight: {in_flight}, queue: 100 }}
    ejection: {ejection}"
        );
        behind_a_caller(&[good.addr, bad.addr], "", &more)
    };
    let without = Mesh::start(&written(0, "off")).await;
    assert!(steady(without.addr("in"), 20, millis(2)).await.iter().any(Call::failed), "without the rule calls fail");
    without.stop().await;

    let long = "{ ejectFor: 50s, ejectForMax: 60s }";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("policy.yaml");
    let put = |text: &str| {
        std::fs::write(folder.path().join("new"), text).unwrap();
        std::fs::rename(folder.path().join("new"), &path).unwrap();
    };
    let first = written(0, long);
    put(&first);
    let followed = WatchedPath { path: path.clone(), fingerprint: fingerprint(&path) };
    let mesh = Mesh::with(&first, |settings| settings.policy = Some(followed)).await;
    let out = || mesh.metric("hopguard_ejections_total", &["result=\"ejected\""]);
    while out() == 0.0 {
        // Many at once, so that the bad one gets its share.
        steady(mesh.addr("in"), 60, Duration::from_micros(1)).await;
    }

    let reloads = |result: &str| mesh.metric("hopguard_policy_reloads_total", &[&format!("result=\"{result}\"")]);
    let (ok, failed, calls) = (reloads("ok"), reloads("failed"), bad.requests());
    let callers = Callers::begin(mesh.addr("in"), BOTH, 4, millis(20));
    let (mut taken, mut refused) = (0.0, 0.0);
    for change in 1..=20 {
        let text = written(change, long);
        if change % 3 == 0 {
            put(&text.replace("inFlight", "inflight"));
            refused += 1.0;
        } else {
            put(&text);
            taken += 1.0;
        }
        let good = callers.good();
        eventually(|| (reloads("ok") - ok == taken && reloads("failed") - failed == refused).then_some(())).await;
        eventually(|| (callers.good() >= good + 5).then_some(())).await;
    }
    let made = callers.end().await;
    let failed: Vec<_> = made.iter().filter(|call| call.failed()).collect();
    assert!(failed.is_empty() && made.len() >= 100, "{} of {}: {failed:#?}", failed.len(), made.len());
    assert_eq!(bad.requests(), calls, "calls to the endpoint that is out");
    assert_eq!(out(), 1.0);
    mesh.stop().await;
}
