//! The admin port: probes, drain, metrics in both formats, and the policy in force.

use std::process::Stdio;

use hyper::Response;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::support::http::{Answer, Caller, Speaks, ask, empty, full, get, grpc, request};
use crate::support::upstream::{Upstream, policy};
use crate::support::{Mesh, peer};

async fn mesh() -> (Upstream, Mesh) {
    let upstream = Upstream::http1(|request: hyper::Request<hyper::body::Incoming>| async move {
        let status = request.uri().path()[1..].parse::<u16>().unwrap_or(200);
        Response::builder().status(status).body(full("hello")).unwrap()
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 1s }")).await;
    (upstream, mesh)
}

async fn admin(mesh: &Mesh, method: &str, path: &str) -> Answer {
    ask(mesh.admin(), request(method, path).body(empty()).unwrap()).await
}

#[tokio::test]
async fn the_probes_answer_over_both_protocols() {
    let (_upstream, mesh) = mesh().await;
    for speaks in [Speaks::Http1, Speaks::Http2] {
        for path in ["/live", "/ready", "/metrics", "/policy", "/status", "/"] {
            let mut caller = Caller::open(speaks, mesh.admin()).await;
            let answer = caller.ask(hyper::Request::get(path).body(empty()).unwrap()).await;
            assert_eq!(answer.status, 200, "{path}: {answer:?}");
            assert!(answer.header("cache-control").contains("no-store"), "{path}: {answer:?}");
            assert!(!answer.body.is_empty(), "{path}");
        }
    }
    mesh.stop().await;
}

#[tokio::test]
async fn the_door_says_what_it_has_and_what_it_takes() {
    let (_upstream, mesh) = mesh().await;
    let lost = admin(&mesh, "GET", "/metrcs").await;
    assert_eq!(lost.status, 404);
    assert!(String::from_utf8_lossy(&lost.body).contains("/metrics"), "{lost:?}");
    let wrong = admin(&mesh, "GET", "/drain").await;
    assert_eq!((wrong.status.as_u16(), wrong.header("allow")), (405, "POST"));
    let wrong = admin(&mesh, "POST", "/live").await;
    assert_eq!(wrong.status, 405);
    assert!(wrong.header("allow").contains("GET"), "{wrong:?}");
    let head = admin(&mesh, "HEAD", "/metrics").await;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
    mesh.stop().await;
}

#[tokio::test]
async fn a_page_from_elsewhere_cannot_drain() {
    let (_upstream, mesh) = mesh().await;
    let port = mesh.admin().port();
    let own = format!("127.0.0.1:{port}");
    // The last one is a name that somebody has pointed at this address.
    for (host, name, value) in [
        (own.as_str(), "origin", "https://evil.test"),
        (own.as_str(), "sec-fetch-site", "cross-site"),
        ("evil.test", "origin", "http://evil.test"),
    ] {
        let asked = hyper::Request::post("/drain").header("host", host).header(name, value).body(empty()).unwrap();
        assert_eq!(ask(mesh.admin(), asked).await.status, 403, "{host} {name}: {value}");
    }
    assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
    assert_eq!(admin(&mesh, "GET", "/ready").await.status, 200);
    mesh.stop().await;
}

#[tokio::test]
async fn the_service_of_the_policy_is_the_source() {
    let (_upstream, mesh) = mesh().await;
    get(mesh.addr("in"), "/").await;
    assert_eq!(mesh.only("ok").await["source"], "shop");
    assert_eq!(mesh.metric("hopguard_requests_total", &["source=\"shop\""]), 1.0);
    mesh.stop().await;
}

#[tokio::test]
async fn every_exchange_is_counted_by_hop_and_outcome() {
    let (_upstream, mesh) = mesh().await;
    for path in ["/", "/404", "/500", "/503", "/204"] {
        get(mesh.addr("in"), path).await;
    }
    mesh.ended("server_error", 2).await;
    assert_eq!((mesh.count("ok"), mesh.count("client_error")), (2.0, 1.0));
    let hop =
        ["destination=\"app\"", "route=\"default\"", "direction=\"inbound\"", "protocol=\"http1\"", "outcome=\"ok\""];
    assert_eq!(mesh.metric("hopguard_requests_total", &hop), 2.0);
    for histogram in ["request_duration", "time_to_first_byte", "overhead"] {
        let count = format!("hopguard_{histogram}_seconds_count");
        assert_eq!(mesh.metric(&count, &["app"]), 5.0, "{count}");
        assert!(mesh.metric(&format!("hopguard_{histogram}_seconds_sum"), &["app"]) > 0.0);
    }
    assert_eq!(mesh.metric("hopguard_workers", &[]), 1.0);
    assert!(mesh.metric("process_resident_memory_bytes", &[]) > 1e6);
    let status: Value = serde_json::from_slice(&admin(&mesh, "GET", "/status").await.body).unwrap();
    let hop = &status["hops"][0];
    assert_eq!(
        (&hop["destination"], &hop["count"], &hop["failures"]),
        (&"app".into(), &5.into(), &2.into()),
        "{status:#}"
    );
    mesh.stop().await;
}

#[tokio::test]
async fn what_callers_send_never_becomes_a_label() {
    let upstream = Upstream::fixed("hello").await;
    let text = policy(upstream.addr, "    hosts: [\"*\"]").replace("to: app", "forward: true");
    let mesh = Mesh::start(&text).await;
    for index in 0..50 {
        let asked = hyper::Request::builder().method(format!("M{index}").as_str()).uri(format!("/path{index}"));
        let asked = asked.header("host", format!("host{index}.test")).body(empty()).unwrap();
        assert_eq!(ask(mesh.addr("in"), asked).await.status, 200);
    }
    mesh.ended("ok", 50).await;
    let page = mesh.metrics().await;
    let series = page.lines().filter(|line| line.starts_with("hopguard_requests_total{")).count();
    assert_eq!(series, 1, "{page}");
    mesh.stop().await;
}

#[tokio::test]
async fn promtool_finds_nothing_to_complain_about() {
    let Some(promtool) = peer("promtool") else { return };
    let (_upstream, mesh) = mesh().await;
    for path in ["/", "/404", "/500"] {
        get(mesh.addr("in"), path).await;
    }
    grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
    mesh.ended("server_error", 1).await;
    let page = admin(&mesh, "GET", "/metrics").await;
    assert!(page.header("content-type").starts_with("text/plain; version=0.0.4"), "{:?}", page.headers);
    let mut child = tokio::process::Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&page.body).await.unwrap();
    let output = child.wait_with_output().await.unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.trim().is_empty(), "{said}");
    mesh.stop().await;
}

#[tokio::test]
async fn openmetrics_is_there_for_those_who_ask() {
    let (_upstream, mesh) = mesh().await;
    get(mesh.addr("in"), "/").await;
    mesh.ended("ok", 1).await;
    let asked =
        request("GET", "/metrics").header("accept", "application/openmetrics-text; version=1.0.0,text/plain;q=0.5");
    let page = ask(mesh.admin(), asked.body(empty()).unwrap()).await;
    assert!(
        page.header("content-type").starts_with("application/openmetrics-text; version=1.0.0"),
        "{:?}",
        page.headers
    );
    let text = String::from_utf8_lossy(&page.body).into_owned();
    assert!(text.ends_with("# EOF\n"), "{text}");
    assert!(text.contains("# TYPE hopguard_requests counter") && text.contains("hopguard_requests_total{"), "{text}");
    mesh.stop().await;
}

#[tokio::test]
async fn the_policy_in_force_shows_every_value_and_its_line() {
    let (upstream, mesh) = mesh().await;
    let shown: Value = serde_json::from_slice(&admin(&mesh, "GET", "/policy").await.body).unwrap();
    assert_eq!(shown["service"], "shop");
    let destination = &shown["destinations"][0];
    assert_eq!(destination["endpoints"][0], upstream.addr.to_string());
    let timeouts = &destination["routes"][0]["timeouts"];
    assert_eq!(
        (&timeouts["request"]["value"], &timeouts["request"]["from"]),
        (&"1s".into(), &"policy.yaml:10".into()),
        "{shown:#}"
    );
    assert_eq!(timeouts["connect"]["from"], "built in", "{shown:#}");
    assert!(shown["lastError"].is_null() && shown["loaded"].is_string() && shown["hash"].is_string(), "{shown:#}");
    mesh.stop().await;
}

#[tokio::test]
async fn the_policy_in_force_shows_the_rules_too() {
    let upstream = Upstream::fixed("hello").await;
    let text = policy(
        upstream.addr,
        "    retry: { attempts: 2, backoff: { base: 7ms } }
    ejection: off
    rateLimit: { requests: 9, per: 1s }
    routes:
      - name: own
        match: { path: /own }
        retry: off
        faults: [{ name: slow.v1, until: 2099-01-01T00:00:00Z, delay: 5ms }]
      - { name: plain, match: { path: /plain } }
",
    );
    let mesh = Mesh::start(&text.replace("service: shop\n", "service: shop\nrules: { rateLimit: dryRun }\n")).await;
    let shown: Value = serde_json::from_slice(&admin(&mesh, "GET", "/policy").await.body).unwrap();
    let at = |pointer: &str| {
        let Some(set) = shown.pointer(pointer) else { panic!("no {pointer} in {shown:#}") };
        (set["value"].clone(), set["from"].as_str().unwrap().to_owned())
    };
    let destination = "/destinations/0";
    let (own, plain, rest) = ("/destinations/0/routes/0", "/destinations/0/routes/1", "/destinations/0/routes/2");
    for (pointer, value, is_built_in) in [
        ("/rules/rateLimit".to_owned(), json!("dryRun"), false),
        ("/rules/retry".to_owned(), json!("enforce"), true),
        (format!("{destination}/circuitBreaker/minRequests"), json!(20), true),
        (format!("{destination}/ejection"), json!("off"), false),
        (format!("{rest}/retry/attempts"), json!(2), false),
        (format!("{rest}/retry/backoff.base"), json!("7ms"), false),
        (format!("{rest}/rateLimit/requests"), json!(9), false),
        (format!("{rest}/faults"), json!("none"), true),
        (format!("{own}/retry"), json!("off"), false),
        (format!("{own}/faults/slow.v1"), json!("delay 5ms, share 1, until 2099-01-01T00:00:00Z"), false),
    ] {
        let (found, from) = at(&pointer);
        assert_eq!((found, from == "built in"), (value, is_built_in), "{pointer}");
    }
    assert!(shown.pointer(&format!("{own}/rateLimit")).is_none(), "it is that of the destination");
    assert!(shown.pointer(&format!("{plain}/retry")).is_none(), "it is that of the destination");
    assert_eq!(shown["accessLog"], json!({ "mode": "all", "format": "json", "ratio": null }));
    mesh.stop().await;
}

#[tokio::test]
async fn a_drain_is_seen_at_the_door() {
    let (_upstream, mesh) = mesh().await;
    assert_eq!(mesh.metric("hopguard_draining", &[]), 0.0);
    let told = admin(&mesh, "POST", "/drain").await;
    assert_eq!(told.status, 202);
    mesh.app().begin_drain();
    crate::support::eventually(|| (mesh.metric("hopguard_draining", &[]) == 1.0).then_some(())).await;
    let ready = admin(&mesh, "GET", "/ready").await;
    assert_eq!(ready.status, 503);
    mesh.stop().await;
}
