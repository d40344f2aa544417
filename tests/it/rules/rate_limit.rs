//! The rate limit: for all calls, for each client address, for each value of a header.

use std::net::SocketAddr;
use std::time::Duration;

use hyper::{Request, Response};
use tokio::net::TcpSocket;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::support::bank::behind_a_caller;
use crate::support::http::{Answer, Caller, Speaks, ask, empty, full, get, grpc, request};
use crate::support::upstream::{Gate, Upstream, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, SOON, eventually};

/// One call in a minute: what it refuses, it refuses for the whole test.
const ONE: &str = "    rateLimit: { requests: 1, per: 1m }";

async fn shop() -> Upstream {
    Upstream::fixed("shop").await
}

async fn statuses(to: SocketAddr, paths: &[&str]) -> Vec<u16> {
    let mut all = Vec::new();
    for path in paths {
        all.push(get(to, path).await.status.as_u16());
    }
    all
}

async fn with_key(to: SocketAddr, key: Option<&str>) -> u16 {
    let mut asked = request("GET", "/");
    if let Some(key) = key {
        asked = asked.header("x-api-key", key);
    }
    ask(to, asked.body(empty()).unwrap()).await.status.as_u16()
}

/// A call from another address of this machine.
async fn from(address: &str, to: SocketAddr) -> u16 {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(format!("{address}:0").parse().unwrap()).unwrap();
    let mut wire = Wire::over(socket.connect(to).await.unwrap());
    wire.send("GET / HTTP/1.1\r\nHost: shop.test\r\nX-Forwarded-For: 10.1.2.3\r\n\r\n").await;
    wire.head().await.split(' ').nth(1).unwrap().parse().unwrap()
}

/// What the caller has to wait, to the second.
fn seconds(answer: &Answer) -> u64 {
    answer.header("retry-after").parse().unwrap()
}

#[tokio::test]
async fn a_burst_passes_and_what_is_beyond_it_is_told_when_to_come_again() {
    let upstream = shop().await;
    let more = "    rateLimit:\n      requests: 3\n      per: 30s\n      burst: 2";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    assert_eq!(statuses(mesh.addr("in"), &["/", "/"]).await, [200, 200]);
    let answer = get(mesh.addr("in"), "/").await;
    assert_eq!(answer.status, 429);
    // One place comes back in ten seconds, of which a moment is gone.
    assert!((9..=10).contains(&seconds(&answer)), "{answer:?}");
    assert!(answer.header("proxy-status").contains("error=http_request_denied"), "{answer:?}");
    let line = mesh.refused(&answer, "rate_limited", "rateLimit.requests", "3 per 30s").await;
    assert_eq!(line["refusal"]["origin"], "policy.yaml:11", "{line}");
    assert_eq!(line["refusal"]["closed_by"], "hopguard", "{line}");
    assert_eq!(upstream.requests(), 2);
    mesh.stop().await;
}

#[tokio::test]
async fn without_the_rule_every_call_passes() {
    let upstream = shop().await;
    let off = policy(upstream.addr, &format!("{ONE}\nrules: {{ rateLimit: off }}"));
    let none = policy(upstream.addr, "");
    let route = policy(
        upstream.addr,
        &format!("{ONE}\n    routes:\n      - {{ name: all, match: {{ path: \"/{{rest...}}\" }}, rateLimit: off }}")
            .replace("/{rest...}", "/"),
    );
    for text in [off, none, route] {
        let (mesh, before) = (Mesh::start(&text).await, upstream.requests());
        assert_eq!(statuses(mesh.addr("in"), &["/"; 20]).await, [200; 20]);
        assert_eq!((upstream.requests(), mesh.count("rate_limited")), (before + 20, 0.0));
        mesh.stop().await;
    }
}

#[tokio::test]
async fn in_warn_every_call_passes_and_those_beyond_the_limit_are_counted() {
    let upstream = shop().await;
    let mesh = Mesh::start(&policy(upstream.addr, &format!("{ONE}\nrules: {{ rateLimit: dryRun }}"))).await;
    assert_eq!(statuses(mesh.addr("in"), &["/"; 5]).await, [200; 5]);
    assert_eq!((upstream.requests(), mesh.count("rate_limited")), (5, 0.0));
    assert_eq!(mesh.metric("hopguard_dry_run_total", &["rule=\"rate_limit\"", "app"]), 4.0);
    mesh.ended("ok", 5).await;
    eventually(|| (mesh.log().len() == 5).then_some(())).await;
    let would = mesh.log().iter().filter(|line| line.contains("\"dry_run\":\"rate_limit\"")).count();
    assert_eq!(would, 4, "{:#?}", mesh.log());
    mesh.stop().await;
}

#[tokio::test]
async fn once_the_burst_is_used_up_calls_pass_at_the_pace_of_the_limit() {
    let upstream = shop().await;
    let mesh = Mesh::start(&policy(upstream.addr, "    rateLimit: { requests: 20, per: 1s, burst: 4 }")).await;
    let begun = Instant::now();
    let mut passed = 0;
    while passed < 24 {
        assert!(begun.elapsed() < SOON, "{passed} in {:?}", begun.elapsed());
        passed += usize::from(get(mesh.addr("in"), "/").await.status == 200);
        sleep(Duration::from_millis(2)).await;
    }
    // The burst, and twenty turns of 50 ms each.
    assert!(begun.elapsed() >= Duration::from_millis(980), "{passed} in {:?}", begun.elapsed());
    assert_eq!(upstream.requests(), passed);
    mesh.stop().await;
}

#[tokio::test]
async fn who_comes_again_when_told_to_is_let_in() {
    let upstream = shop().await;
    let mesh = Mesh::start(&policy(upstream.addr, "    rateLimit: { requests: 1, per: 1s }")).await;
    assert_eq!(statuses(mesh.addr("in"), &["/", "/"]).await, [200, 429]);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(statuses(mesh.addr("in"), &["/", "/"]).await, [200, 429]);
    assert_eq!(mesh.count("rate_limited"), 2.0);
    mesh.stop().await;
}

#[tokio::test]
async fn each_route_has_a_limit_of_its_own_that_replaces_the_destinations() {
    let upstream = shop().await;
    let routes = "    routes:
      - { name: pay, match: { path: /pay }, rateLimit: { requests: 2, per: 1m } }
      - { name: feed, match: { path: /feed }, rateLimit: off }
      - { name: list, match: { path: /list } }";
    let mesh = Mesh::start(&policy(upstream.addr, &format!("{ONE}\n{routes}"))).await;
    let to = mesh.addr("in");
    assert_eq!(statuses(to, &["/pay", "/pay", "/pay"]).await, [200, 200, 429]);
    assert_eq!(statuses(to, &["/feed", "/feed", "/feed"]).await, [200, 200, 200]);
    assert_eq!(statuses(to, &["/list", "/list"]).await, [200, 429]);
    assert_eq!(statuses(to, &["/else", "/else"]).await, [200, 429], "counted by route");
    mesh.ended("rate_limited", 3).await;
    for route in ["pay", "list"] {
        let labels = ["outcome=\"rate_limited\"", &format!("route=\"{route}\"")];
        assert_eq!(mesh.metric("hopguard_requests_total", &labels), 1.0, "{route}");
    }
    mesh.stop().await;
}

#[tokio::test]
async fn by_caller_each_address_has_its_own_count_and_cannot_claim_another() {
    let upstream = shop().await;
    let mesh = Mesh::start(&policy(upstream.addr, "    rateLimit: { requests: 2, per: 1m, by: caller }")).await;
    let to = mesh.addr("in");
    for address in ["127.0.0.1", "127.0.0.2", "127.0.0.3"] {
        let all = [from(address, to).await, from(address, to).await, from(address, to).await];
        assert_eq!(all, [200, 200, 429], "{address}");
    }
    mesh.ended("rate_limited", 3).await;
    assert!(mesh.log().iter().any(|line| line.contains("counted by caller")), "{:#?}", mesh.log());
    mesh.stop().await;
}

#[tokio::test]
async fn by_header_each_value_has_its_own_count_and_those_without_it_share_one() {
    let upstream = shop().await;
    let mesh =
        Mesh::start(&policy(upstream.addr, "    rateLimit: { requests: 1, per: 1m, by: \"header:X-Api-Key\" }")).await;
    let to = mesh.addr("in");
    for key in [Some("one"), Some("two"), None, Some("three")] {
        assert_eq!([with_key(to, key).await, with_key(to, key).await], [200, 429], "{key:?}");
    }
    assert_eq!(mesh.count("rate_limited"), 4.0);
    assert_eq!(upstream.requests(), 4);
    mesh.stop().await;
}

#[tokio::test]
async fn a_cookie_in_pieces_counts_as_the_whole_that_it_is() {
    let upstream = shop().await;
    let more = "    protocol: http1\n    rateLimit: { requests: 1, per: 1m, by: \"header:cookie\" }";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let whole = request("GET", "/").header("cookie", "u=1; s=2").body(empty()).unwrap();
    assert_eq!(ask(mesh.addr("in"), whole).await.status, 200);
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    for (last, status) in [("s=2", 429), ("s=3", 200), ("s=3", 429)] {
        let pieces = Request::get("/").header("cookie", "u=1").header("cookie", last).body(empty()).unwrap();
        assert_eq!(caller.ask(pieces).await.status, status, "{last}");
    }
    mesh.ended("rate_limited", 2).await;
    assert_eq!(upstream.requests(), 2);
    mesh.stop().await;
}

#[tokio::test]
async fn grpc_is_told_that_the_resource_is_exhausted_and_when_to_come_again() {
    let upstream = Upstream::http2(|_| async {
        let answer = Response::builder().header("content-type", "application/grpc").header("grpc-status", "0");
        answer.body(empty()).unwrap()
    })
    .await;
    let more = "    protocol: http2\n    rateLimit: { requests: 1, per: 10s }";
    let before_the_app = policy(upstream.addr, more);
    for (text, marked) in [(before_the_app, false), (behind_a_caller(&[upstream.addr], "", more), true)] {
        let mesh = Mesh::start(&text).await;
        assert_eq!(grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await.grpc_status(), "0");
        let answer = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
        assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, "8"), "{answer:?}");
        let millis: u64 = answer.header("grpc-retry-pushback-ms").parse().unwrap();
        assert!((8_000..=10_000).contains(&millis), "{millis}");
        assert_eq!(answer.header("proxy-status").contains(";hopguard-final;hopguard-at=\"app\""), marked, "{answer:?}");
        let line = mesh.refused(&answer, "rate_limited", "rateLimit.requests", "1 per 10s").await;
        assert_eq!(line["grpc_status"], "RESOURCE_EXHAUSTED", "{line}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn grpc_is_never_told_to_come_again_before_there_is_a_place() {
    let upstream = Upstream::http2(|_| async {
        let answer = Response::builder().header("content-type", "application/grpc").header("grpc-status", "0");
        answer.body(empty()).unwrap()
    })
    .await;
    // A place comes back in each millisecond, so that what is left of one is always a part of it.
    let mesh =
        Mesh::start(&policy(upstream.addr, "    protocol: http2\n    rateLimit: { requests: 1000, burst: 1 }")).await;
    while mesh.count("rate_limited") == 0.0 {
        let to = mesh.addr("in");
        let calls: JoinSet<_> = (0..20).map(|_| grpc(to, "/shop.v1.Payment/Charge")).collect();
        for answer in calls.join_all().await {
            let told = answer.header("grpc-retry-pushback-ms").parse::<u64>();
            assert_eq!(told.is_ok_and(|millis| millis > 0), answer.grpc_status() == "8", "{answer:?}");
        }
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_limit_of_the_callees_sidecar_is_no_failure_of_the_callee_for_grpc_either() {
    let table = [
        ("    rateLimit: { requests: 1, per: 1m }", 0.0),
        // A full queue is one.
        ("    limits: { inFlight: 1, queue: 0 }", 1.0),
    ];
    for (limit, opened) in table {
        let gate = Gate::closed();
        let held = gate.clone();
        let upstream = Upstream::http2(move |_| {
            let held = held.clone();
            async move {
                held.pass().await;
                let answer = Response::builder().header("content-type", "application/grpc").header("grpc-status", "0");
                answer.body(empty()).unwrap()
            }
        })
        .await;
        let lower = Mesh::start(&policy(upstream.addr, &format!("    protocol: http2\n{limit}"))).await;
        let touchy = "    retry: off\n    circuitBreaker: { consecutiveFailures: 1 }";
        let upper = Mesh::start(&behind_a_caller(&[lower.addr("in")], "", touchy)).await;
        let to = upper.addr("in");
        let first = tokio::spawn(async move { grpc(to, "/shop.v1.Payment/Charge").await });
        eventually(|| (upstream.requests() == 1).then_some(())).await;
        let answer = grpc(to, "/shop.v1.Payment/Charge").await;
        assert_eq!(answer.grpc_status(), "8", "{answer:?}");
        let line = upper.only("grpc_error").await;
        assert_eq!(line["grpc_status"], "RESOURCE_EXHAUSTED", "{line}");
        let changes = upper.metric("hopguard_circuit_breaker_changes_total", &["state=\"open\""]);
        assert_eq!(changes, opened, "{limit}");
        gate.release(1);
        assert_eq!(first.await.unwrap().grpc_status(), "0");
        upper.stop().await;
        lower.stop().await;
    }
}

#[tokio::test]
async fn all_workers_share_the_count() {
    let upstream = shop().await;
    let text = policy(upstream.addr, "    rateLimit: { requests: 10, per: 1m }");
    let mesh = Mesh::with(&text, |settings| settings.workers = 2).await;
    let calls: Vec<_> = (0..40)
        .map(|_| {
            let to = mesh.addr("in");
            tokio::spawn(async move { get(to, "/").await.status.as_u16() })
        })
        .collect();
    let mut good = 0;
    for call in calls {
        good += usize::from(call.await.unwrap() == 200);
    }
    assert_eq!((good, upstream.requests()), (10, 10));
    mesh.ended("rate_limited", 30).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_reload_fills_nothing_up_unless_the_limit_itself_has_changed() {
    let upstream = shop().await;
    let mesh = Mesh::start(&policy(upstream.addr, ONE)).await;
    let to = mesh.addr("in");
    assert_eq!(statuses(to, &["/", "/"]).await, [200, 429]);
    for more in [
        format!("    timeouts: {{ request: 1900ms }}\n{ONE}"),
        format!("    limits: {{ inFlight: 9 }}\n\n\n{ONE}"),
        format!("    circuitBreaker: off\n{ONE}"),
        ONE.replace("1m", "60s"),
    ] {
        mesh.reload(&policy(upstream.addr, &more)).await;
        assert_eq!(statuses(to, &["/"]).await, [429], "{more}");
    }
    assert_eq!(upstream.requests(), 1);
    mesh.reload(&policy(upstream.addr, "    rateLimit: { requests: 3, per: 1m }")).await;
    assert_eq!(statuses(to, &["/", "/", "/", "/"]).await, [200, 200, 200, 429]);
    mesh.reload(&policy(upstream.addr, "")).await;
    assert_eq!(statuses(to, &["/"; 5]).await, [200; 5]);
    mesh.stop().await;
}

#[tokio::test]
async fn calls_that_are_refused_count_against_nobody() {
    let upstream = shop().await;
    let mesh = Mesh::start(&policy(upstream.addr, "    rateLimit: { requests: 1, per: 2s }")).await;
    assert_eq!(statuses(mesh.addr("in"), &["/"]).await, [200]);
    assert_eq!(statuses(mesh.addr("in"), &["/"; 40]).await, [429; 40]);
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &[]), 0.0);
    assert_eq!(mesh.metric("hopguard_in_flight_requests", &["app"]), 0.0);
    // The forty have not moved the next turn away.
    eventually_passes(&mesh).await;
    mesh.stop().await;
}

async fn eventually_passes(mesh: &Mesh) {
    let begun = Instant::now();
    while get(mesh.addr("in"), "/").await.status != 200 {
        // They would have moved it by 80 seconds.
        assert!(begun.elapsed() < SOON, "refused calls were charged");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_body_is_not_waited_for_before_the_caller_is_told() {
    let upstream = shop().await;
    let mesh = Mesh::start(&policy(upstream.addr, ONE)).await;
    assert_eq!(statuses(mesh.addr("in"), &["/"]).await, [200]);
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("POST / HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 1000000\r\n\r\n").await;
    assert!(wire.head().await.starts_with("HTTP/1.1 429 "));
    let whole = request("POST", "/").body(full("more")).unwrap();
    assert_eq!(ask(mesh.addr("in"), whole).await.status, 429);
    mesh.stop().await;
}
