//! Outlier ejection: one of three endpoints fails, is ejected after five failures, and returns after a successful probe.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::{Timestamp, Unit};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::support::http::get;
use crate::support::program::Program;
use crate::support::upstream::{Upstream, nobody};
use crate::support::wire::Wire;
use crate::support::{Mesh, SOON, eventually};

/// How an endpoint answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Does {
    Answer,
    Fail,
    Hang,
    Reset,
}

/// An endpoint whose conduct the test sets. It takes its time, so that under load a quick failure looks cheap.
struct Endpoint {
    upstream: Upstream,
    does: Arc<AtomicU8>,
    calls: Arc<AtomicUsize>,
    cut: Arc<Notify>,
}

impl Endpoint {
    async fn open(takes: Duration) -> Self {
        let (does, calls) = (Arc::new(AtomicU8::new(Does::Answer as u8)), Arc::new(AtomicUsize::new(0)));
        let cut = Arc::new(Notify::new());
        let (now, count, cuts) = (Arc::clone(&does), Arc::clone(&calls), Arc::clone(&cut));
        let upstream = Upstream::bytes(move |stream: TcpStream| {
            let (now, count, cuts) = (Arc::clone(&now), Arc::clone(&count), Arc::clone(&cuts));
            serve(stream, takes, now, count, cuts)
        })
        .await;
        Self { upstream, does, calls, cut }
    }

    fn turn(&self, does: Does) {
        self.does.store(does as u8, SeqCst);
    }

    fn calls(&self) -> usize {
        self.calls.load(SeqCst)
    }
}

async fn serve(stream: TcpStream, takes: Duration, does: Arc<AtomicU8>, calls: Arc<AtomicUsize>, cut: Arc<Notify>) {
    let mut wire = Wire::over(stream);
    while let Ok(Ok(1..)) = timeout(SOON, wire.stream.peek(&mut [0])).await {
        let _head = wire.head().await;
        calls.fetch_add(1, SeqCst);
        let status = match does.load(SeqCst) {
            does if does == Does::Reset as u8 => return,
            does if does == Does::Hang as u8 => return cut.notified().await,
            does if does == Does::Fail as u8 => "500 Internal Server Error",
            _ => {
                sleep(takes).await;
                "200 OK"
            }
        };
        wire.send(format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nok")).await;
    }
}

/// A policy with these endpoints; the rules that would hide what ejection does are off.
fn policy(endpoints: &[SocketAddr], more: &str) -> String {
    let list: Vec<_> = endpoints.iter().map(|endpoint| format!("\"{endpoint}\"")).collect();
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", to: app }}
destinations:
  - name: app
    endpoints: [{}]
    retry: off
    circuitBreaker: off
{more}
",
        list.join(", ")
    )
}

/// The same with the circuit breaker, as it is built in but for what `breaker` says.
fn guarded(endpoints: &[Endpoint], breaker: &str, more: &str) -> String {
    let breaker = format!("circuitBreaker: {{ {breaker} }}");
    policy(&addresses(endpoints), more).replace("circuitBreaker: off", &breaker)
}

/// Out for the whole of a test.
const LONG: &str = "    ejection: { ejectFor: 50s, ejectForMax: 60s }";

/// Calls that may be under way to the bad endpoint when the fifth one fails; on a busy machine they come in bunches.
const AT_ONCE: usize = 10;

/// Three endpoints of one destination, the first of which will be the bad one.
struct Site {
    endpoints: [Endpoint; 3],
    mesh: Mesh,
}

impl Site {
    async fn open(more: &str) -> Self {
        let takes = Duration::from_millis(150);
        let endpoints = [Endpoint::open(takes).await, Endpoint::open(takes).await, Endpoint::open(takes).await];
        let mesh = Mesh::start(&policy(&addresses(&endpoints), more)).await;
        Self { endpoints, mesh }
    }

    fn bad(&self) -> &Endpoint {
        &self.endpoints[0]
    }

    fn policy(&self, more: &str) -> String {
        policy(&addresses(&self.endpoints), more)
    }

    /// Puts the first endpoint out.
    async fn eject(&self) {
        self.bad().turn(Does::Fail);
        let load = Load::begin(self.mesh.addr("in"));
        eventually(|| (ejections(&self.mesh, "ejected") == 1.0).then_some(())).await;
        load.end().await;
        eventually(|| (self.mesh.metric("hopguard_in_flight_requests", &["app"]) == 0.0).then_some(())).await;
    }
}

fn addresses(endpoints: &[Endpoint]) -> Vec<SocketAddr> {
    endpoints.iter().map(|one| one.upstream.addr).collect()
}

fn ejections(mesh: &Mesh, result: &str) -> f64 {
    mesh.metric("hopguard_ejections_total", &["app", &format!("result=\"{result}\"")])
}

fn out_now(mesh: &Mesh) -> f64 {
    mesh.metric("hopguard_ejected_endpoints", &["app"])
}

/// A call each four milliseconds, whatever becomes of those before: forty or so are under way at a time.
struct Load {
    failed: Arc<Mutex<Vec<Instant>>>,
    task: tokio::task::JoinHandle<JoinSet<()>>,
    stop: Arc<AtomicU8>,
}

impl Load {
    fn begin(to: SocketAddr) -> Self {
        let (failed, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicU8::new(0)));
        let (noted, over) = (Arc::clone(&failed), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            let mut calls = JoinSet::new();
            while over.load(SeqCst) == 0 {
                let noted = Arc::clone(&noted);
                calls.spawn(async move {
                    let begun = Instant::now();
                    if get(to, "/").await.status != 200 {
                        noted.lock().unwrap().push(begun);
                    }
                });
                sleep(Duration::from_millis(4)).await;
            }
            calls
        });
        Self { failed, task, stop }
    }

    fn failed(&self) -> usize {
        self.failed.lock().unwrap().len()
    }

    /// Ends it; every call that has begun is waited for. Returns when the calls that failed had begun.
    async fn end(self) -> Vec<Instant> {
        self.stop.store(1, SeqCst);
        let calls = self.task.await.unwrap();
        calls.join_all().await;
        std::mem::take(&mut *self.failed.lock().unwrap())
    }
}

/// The first endpoint turns bad under load, with the rule and without it. Returns how many calls failed before it was out.
async fn turns_bad(does: Does, more: &str) -> usize {
    let site = Site::open(&format!("{more}\n{LONG}")).await;
    let load = Load::begin(site.mesh.addr("in"));
    eventually(|| site.endpoints.iter().all(|one| one.calls() >= 10).then_some(())).await;
    assert_eq!(load.failed(), 0);
    site.bad().turn(does);
    eventually(|| (ejections(&site.mesh, "ejected") == 1.0).then_some(())).await;
    let (out, lost) = (Instant::now(), load.failed());
    assert_eq!(out_now(&site.mesh), 1.0);
    // Those under way there at that moment still end.
    sleep(Duration::from_millis(500)).await;
    let calls = site.bad().calls();
    sleep(Duration::from_millis(500)).await;
    assert_eq!(site.bad().calls(), calls, "it got calls while it was out");
    let failed = load.end().await;
    let late = failed.iter().filter(|begun| **begun > out).count();
    assert_eq!(late, 0, "calls failed that began after it was out");
    assert_eq!((ejections(&site.mesh, "ejected"), ejections(&site.mesh, "kept")), (1.0, 0.0));
    site.mesh.stop().await;

    let site = Site::open(&format!("{more}\n{LONG}\nrules: {{ ejection: off }}")).await;
    let load = Load::begin(site.mesh.addr("in"));
    eventually(|| site.endpoints.iter().all(|one| one.calls() >= 10).then_some(())).await;
    site.bad().turn(does);
    sleep(Duration::from_millis(1500)).await;
    let bad_since = Instant::now();
    sleep(Duration::from_millis(500)).await;
    let failed = load.end().await;
    let late = failed.iter().filter(|begun| **begun > bad_since).count();
    assert!(late > 0, "without the rule calls go on failing");
    assert_eq!((ejections(&site.mesh, "ejected"), out_now(&site.mesh)), (0.0, 0.0));
    site.mesh.stop().await;
    lost
}

#[tokio::test]
async fn an_endpoint_that_fails_is_out_after_five_calls() {
    let lost = turns_bad(Does::Fail, "").await;
    assert!(lost <= 5 + AT_ONCE, "{lost}");
}

#[tokio::test]
async fn an_endpoint_that_resets_is_out_after_five_calls() {
    let lost = turns_bad(Does::Reset, "").await;
    assert!(lost <= 5 + AT_ONCE, "{lost}");
}

#[tokio::test]
async fn an_endpoint_that_hangs_is_out_after_five_timeouts() {
    let lost = turns_bad(Does::Hang, "    timeouts: { request: 400ms }").await;
    assert!(lost <= 5 + AT_ONCE, "{lost}");
}

#[tokio::test]
async fn an_endpoint_that_refuses_is_out_and_no_call_is_lost() {
    let good = [Endpoint::open(Duration::from_millis(150)).await, Endpoint::open(Duration::from_millis(150)).await];
    let mut all = addresses(&good);
    all.push(nobody());
    let mesh = Mesh::start(&policy(&all, LONG)).await;
    let load = Load::begin(mesh.addr("in"));
    eventually(|| (ejections(&mesh, "ejected") == 1.0).then_some(())).await;
    let failures = mesh.metric("hopguard_pool_connect_failures_total", &["app"]);
    assert!(failures >= 5.0, "{failures}");
    sleep(Duration::from_millis(300)).await;
    let later = mesh.metric("hopguard_pool_connect_failures_total", &["app"]);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(mesh.metric("hopguard_pool_connect_failures_total", &["app"]), later, "nobody goes there any more");
    assert!(load.end().await.is_empty());
    mesh.stop().await;
}

#[tokio::test]
async fn in_warn_it_stays_in_and_what_would_have_been_is_counted() {
    let site = Site::open(&format!("{LONG}\nrules: {{ ejection: dryRun }}")).await;
    site.bad().turn(Does::Fail);
    let load = Load::begin(site.mesh.addr("in"));
    eventually(|| (site.bad().calls() > 30).then_some(())).await;
    assert!(load.end().await.len() >= 30);
    assert!(site.mesh.metric("hopguard_dry_run_total", &["rule=\"ejection\"", "app"]) >= 1.0);
    eventually(|| site.mesh.log().iter().any(|line| line.contains("\"dry_run\":\"ejection\"")).then_some(())).await;
    site.mesh.stop().await;
}

#[tokio::test]
async fn it_comes_back_with_one_call_that_tries_it() {
    let site = Site::open("    ejection: { ejectFor: 400ms, ejectForMax: 400ms }").await;
    site.eject().await;
    let before = site.bad().calls();
    let load = Load::begin(site.mesh.addr("in"));
    // It still fails: each time it is due, one call finds out.
    sleep(Duration::from_millis(2000)).await;
    // Only when no call is under way have those that were sent failed, too.
    let failed = load.end().await.len();
    let tried = site.bad().calls() - before;
    assert!((4..=11).contains(&tried), "{tried} calls in two seconds, of which it was out for 200 to 400 ms each time");
    assert_eq!(ejections(&site.mesh, "returned"), 0.0);
    assert_eq!(failed, tried, "nobody else has noticed");
    site.bad().turn(Does::Answer);
    let load = Load::begin(site.mesh.addr("in"));
    eventually(|| (ejections(&site.mesh, "returned") == 1.0).then_some(())).await;
    assert_eq!(out_now(&site.mesh), 0.0);
    let (back, lost) = (site.bad().calls(), load.failed());
    eventually(|| (site.bad().calls() > back + 20).then_some(())).await;
    assert_eq!(load.end().await.len(), lost, "calls failed after it was back");
    site.mesh.stop().await;
}

#[tokio::test]
async fn the_last_one_is_never_ejected() {
    let site = Site::open(LONG).await;
    site.endpoints.iter().for_each(|one| one.turn(Does::Fail));
    for _ in 0..60 {
        assert_eq!(get(site.mesh.addr("in"), "/").await.status, 500);
    }
    assert_eq!((ejections(&site.mesh, "ejected"), ejections(&site.mesh, "kept")), (2.0, 1.0));
    assert_eq!(out_now(&site.mesh), 2.0);
    let calls: Vec<_> = site.endpoints.iter().map(Endpoint::calls).collect();
    assert_eq!(calls.iter().filter(|calls| **calls == 5).count(), 2, "{calls:?}");
    assert_eq!(calls.iter().sum::<usize>(), 60, "every call was passed on");
    site.endpoints.iter().for_each(|one| one.turn(Does::Answer));
    assert_eq!(get(site.mesh.addr("in"), "/").await.status, 200);
    site.mesh.stop().await;
}

#[tokio::test]
async fn an_endpoint_that_a_call_did_not_get_to_is_not_blamed_for_it() {
    let mut gone = Vec::new();
    for _ in 0..4 {
        gone.push(Upstream::fixed("gone").await);
    }
    let addresses: Vec<SocketAddr> = gone.iter().map(|upstream| upstream.addr).collect();
    drop(gone);
    let first_failure = "    ejection: { consecutiveFailures: 1, ejectFor: 60s, ejectForMax: 60s }";
    let mesh = Mesh::start(&policy(&addresses, first_failure)).await;
    assert_eq!(get(mesh.addr("in"), "/").await.status, 502);
    mesh.ended("connect_failed", 1).await;
    // A connection is asked of three endpoints; the fourth has nothing to do with it.
    assert_eq!((ejections(&mesh, "ejected"), ejections(&mesh, "kept")), (3.0, 0.0));
    assert_eq!(mesh.metric("hopguard_pool_connect_failures_total", &[]), 3.0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_destination_with_one_endpoint_goes_on_getting_calls() {
    let only = Endpoint::open(Duration::ZERO).await;
    only.turn(Does::Fail);
    let mesh = Mesh::start(&policy(&[only.upstream.addr], LONG)).await;
    for _ in 0..20 {
        assert_eq!(get(mesh.addr("in"), "/").await.status, 500);
    }
    assert_eq!((only.calls(), ejections(&mesh, "ejected"), ejections(&mesh, "kept")), (20, 0.0, 1.0));
    mesh.stop().await;
}

#[tokio::test]
async fn an_endpoint_that_is_out_gets_no_call_through_reloads_of_any_value() {
    let site = Site::open(LONG).await;
    site.eject().await;
    let before = site.bad().calls();
    let load = Load::begin(site.mesh.addr("in"));
    for round in 1..=20 {
        let more = match round % 4 {
            0 => format!("    limits: {{ inFlight: {}, queue: 100 }}", 200 + round),
            1 => format!("    timeouts: {{ request: {}ms }}", 1900 + round),
            2 => format!("    connections: {{ maxIdle: {} }}", 50 + round),
            _ => format!("    limits: {{ inFlight: {} }}\n    timeouts: {{ connect: {}ms }}", 200 + round, 200 + round),
        };
        site.mesh.reload(&site.policy(&format!("{LONG}\n{more}"))).await;
        sleep(Duration::from_millis(40)).await;
    }
    assert!(load.end().await.is_empty());
    assert_eq!(site.bad().calls(), before, "calls to the endpoint that is out");
    assert_eq!(out_now(&site.mesh), 1.0);
    site.mesh.stop().await;
}

#[tokio::test]
async fn an_endpoint_that_is_out_stays_out_when_others_are_added_or_go() {
    let site = Site::open(LONG).await;
    site.eject().await;
    let before = site.bad().calls();
    let fourth = Endpoint::open(Duration::from_millis(20)).await;
    let mut all = addresses(&site.endpoints);
    all.push(fourth.upstream.addr);
    let load = Load::begin(site.mesh.addr("in"));
    for list in [&all[..], &all[..3], &all[..2]] {
        site.mesh.reload(&policy(list, LONG)).await;
        sleep(Duration::from_millis(150)).await;
    }
    assert!(load.end().await.is_empty());
    assert!(fourth.calls() > 0);
    assert_eq!(site.bad().calls(), before, "calls to the endpoint that is out");
    // When no other is left, it is the last one, and back.
    site.mesh.reload(&policy(&all[..1], LONG)).await;
    eventually(|| (out_now(&site.mesh) == 0.0).then_some(())).await;
    assert_eq!(get(site.mesh.addr("in"), "/").await.status, 500);
    assert_eq!(site.bad().calls(), before + 1);
    site.mesh.stop().await;
}

#[tokio::test]
async fn a_shorter_ejection_holds_for_who_is_out_already() {
    let site = Site::open(LONG).await;
    site.eject().await;
    site.bad().turn(Does::Answer);
    site.mesh.reload(&site.policy("    ejection: { ejectFor: 100ms, ejectForMax: 200ms }")).await;
    let load = Load::begin(site.mesh.addr("in"));
    eventually(|| (ejections(&site.mesh, "returned") == 1.0).then_some(())).await;
    assert_eq!((ejections(&site.mesh, "probed"), out_now(&site.mesh)), (1.0, 0.0));
    assert!(load.end().await.is_empty());
    site.mesh.stop().await;
}

#[tokio::test]
async fn failures_before_a_reload_count_after_it() {
    let site = Site::open(LONG).await;
    site.endpoints.iter().for_each(|one| one.turn(Does::Fail));
    for _ in 0..60 {
        get(site.mesh.addr("in"), "/").await;
        let more = format!("    timeouts: {{ request: {}ms }}", 1000 + site.endpoints[0].calls());
        site.mesh.reload(&site.policy(&format!("{LONG}\n{more}"))).await;
    }
    assert_eq!((ejections(&site.mesh, "ejected"), ejections(&site.mesh, "kept")), (2.0, 1.0));
    site.mesh.stop().await;
}

#[tokio::test]
async fn each_change_is_told_once_with_its_endpoint_and_its_cause() {
    let takes = Duration::from_millis(150);
    let endpoints = [Endpoint::open(takes).await, Endpoint::open(takes).await];
    endpoints[0].turn(Does::Fail);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.yaml");
    let more = "    ejection: { ejectFor: 200ms, ejectForMax: 5s }";
    std::fs::write(&file, policy(&addresses(&endpoints), more)).unwrap();
    let program = Program::run(&file, &[]).await;
    let load = Load::begin(program.addr("in").await.unwrap());
    let told = || -> Vec<Value> {
        let log = program.log();
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line["message"] == "an endpoint changed its state").collect()
    };
    eventually(|| (told().iter().filter(|line| line["result"] == "ejected").count() == 2).then_some(())).await;
    endpoints[0].turn(Does::Answer);
    eventually(|| told().iter().any(|line| line["result"] == "returned").then_some(())).await;
    load.end().await;
    let told = told();
    let texts: Vec<_> = told
        .iter()
        .map(|line| ["result", "cause"].map(|key| line[key].as_str().unwrap().to_owned()).join(" "))
        .collect();
    assert_eq!(
        texts,
        [
            "ejected consecutive_failures",
            "probed open_time_over",
            "ejected probe_failed",
            "probed open_time_over",
            "returned probe_succeeded"
        ]
    );
    for line in &told {
        assert_eq!(
            (&line["destination"], &line["endpoint"]),
            (&"app".into(), &endpoints[0].upstream.addr.to_string().into())
        );
    }
    assert_eq!(told[0]["consecutive"], 5, "{}", told[0]);
    assert!(told[0]["ejected_for_ms"].as_u64().is_some_and(|millis| (100..=200).contains(&millis)), "{}", told[0]);
    // What the call that tried it had to wait is taken off.
    let at = |line: &Value| line["timestamp"].as_str().unwrap().parse::<Timestamp>().unwrap();
    let waited = (at(&told[2]) - at(&told[1])).total(Unit::Millisecond).unwrap().ceil() as u64;
    let ejected_for = told[2]["ejected_for_ms"].as_u64().unwrap();
    assert!(ejected_for <= 400 && ejected_for + waited >= 200, "{waited} ms {}", told[2]);
    for (result, times) in [("ejected", 2.0), ("probed", 2.0), ("returned", 1.0)] {
        let label = format!("result=\"{result}\"");
        assert_eq!(program.metric("hopguard_ejections_total", &[&label]).await, times, "{result}");
    }
    assert_eq!(program.metric("hopguard_ejected_endpoints", &["app"]).await, 0.0);
}

#[tokio::test]
async fn one_endpoint_that_loses_all_its_calls_at_once_does_not_open_the_breaker_of_the_destination() {
    for (ejection, refused) in [("", 0.0), ("    ejection: off", 1.0)] {
        let takes = Duration::ZERO;
        let endpoints = [Endpoint::open(takes).await, Endpoint::open(takes).await, Endpoint::open(takes).await];
        let mesh = Mesh::start(&guarded(&endpoints, "openFor: 50s, openForMax: 60s", ejection)).await;
        endpoints.iter().for_each(|one| one.turn(Does::Hang));
        let to = mesh.addr("in");
        let mut calls = JoinSet::new();
        (0..24).for_each(|_| drop(calls.spawn(get(to, "/"))));
        eventually(|| (endpoints.iter().map(Endpoint::calls).sum::<usize>() == 24).then_some(())).await;
        let dies = endpoints.iter().max_by_key(|one| one.calls()).unwrap();
        let lost = dies.calls();
        assert!(lost >= 8, "{lost} of 24");
        endpoints.iter().for_each(|one| one.turn(Does::Answer));
        dies.turn(Does::Reset);
        dies.cut.notify_waiters();
        mesh.ended("upstream_reset", lost).await;
        assert_eq!(mesh.metric("hopguard_circuit_breaker_state", &["app"]), refused * 2.0, "{ejection}");
        get(to, "/").await;
        assert_eq!(mesh.count("circuit_open"), refused, "{ejection}");
        calls.abort_all();
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_destination_whose_last_endpoint_goes_on_failing_is_back_as_soon_as_others_are() {
    let takes = Duration::ZERO;
    let endpoints = [Endpoint::open(takes).await, Endpoint::open(takes).await, Endpoint::open(takes).await];
    let one_is_enough = "    ejection: { consecutiveFailures: 1, ejectFor: 50s, ejectForMax: 60s }";
    let mesh = Mesh::start(&guarded(&endpoints, "openFor: 20ms, openForMax: 40ms", one_is_enough)).await;
    let to = mesh.addr("in");
    let [first, second, last] = &endpoints;
    for (endpoint, out, kept) in [(first, 1.0, 0.0), (second, 2.0, 0.0), (last, 2.0, 1.0)] {
        endpoint.turn(Does::Fail);
        let begun = Instant::now();
        while (ejections(&mesh, "ejected"), ejections(&mesh, "kept")) != (out, kept) {
            assert!(begun.elapsed() < SOON, "{out} {kept}");
            get(to, "/").await;
        }
    }
    let opened = || mesh.metric("hopguard_circuit_breaker_changes_total", &["app", "state=\"open\""]);
    while opened() == 0.0 {
        assert_eq!(get(to, "/").await.status, 500);
    }
    first.turn(Does::Answer);
    second.turn(Does::Answer);
    let begun = Instant::now();
    while get(to, "/").await.status != 200 {
        assert!(begun.elapsed() < SOON, "the last one alone is tried, and it fails: {} out", out_now(&mesh));
        sleep(Duration::from_millis(5)).await;
    }
    // It is out now, and the endpoint that answered is in.
    eventually(|| (mesh.metric("hopguard_circuit_breaker_state", &["app"]) == 0.0).then_some(())).await;
    assert!(ejections(&mesh, "returned") >= 1.0);
    mesh.stop().await;
}
