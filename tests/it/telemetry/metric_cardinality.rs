//! Metric cardinality: client input is never a label, and names beyond the bound count as `other`.

use std::collections::BTreeSet;

use hopguard::telemetry::{DirectionLabel, HopLabels, MAX_HOPS, RetryReason};
use hyper::{Request, Response};

use crate::support::Mesh;
use crate::support::bank::{Bank, Say, behind_a_caller};
use crate::support::http::{Http1, empty, full, get};
use crate::support::upstream::{Upstream, policy};

/// Names that one family of counters keeps apart, as `docs/metrics.md` says.
const NAMES: usize = 4096;

/// Every series of the metrics page, without its value.
async fn series(mesh: &Mesh) -> BTreeSet<String> {
    let page = mesh.metrics().await;
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.rsplit_once(' ')).map(|(series, _)| series.to_owned()).collect()
}

#[tokio::test]
async fn hosts_paths_methods_and_fields_of_callers_are_no_labels() {
    let upstream = Upstream::on("0.0.0.0:0".parse().unwrap(), |_| async { Response::new(full("here")) }, false).await;
    let forward = "apiVersion: hopguard.dev/v1alpha1
kind: Policy
listeners: [{ name: out, bind: '127.0.0.1:0', forward: true }]
destinations:
  - name: others
    hosts: ['*']
    rateLimit: { requests: 100000, by: 'header:x-api-key' }
    routes: [{ name: item, match: { path: '/items/{id}' } }]
";
    let mesh = Mesh::start(forward).await;
    let port = upstream.addr.port();
    let mut caller = Http1::open(mesh.addr("out")).await;
    let mut before = BTreeSet::new();
    for round in 0..120_u8 {
        // Each host is a place of its own, with connections of its own.
        let host = format!("127.0.0.{}:{port}", 1 + round % 60);
        let asked = Request::builder()
            .method(if round == 0 { "GET".to_owned() } else { format!("METHOD{round}") }.as_str())
            .uri(format!("http://{host}/items/{round}?q={round}"))
            .header("host", &host)
            .header("x-api-key", format!("key {round}"))
            .header("user-agent", format!("agent {round}"))
            .body(empty())
            .unwrap();
        assert_eq!(caller.ask(asked).await.status, 200);
        mesh.ended("ok", usize::from(round) + 1).await;
        if round == 0 {
            before = series(&mesh).await;
        }
    }
    assert_eq!(upstream.requests(), 120);
    assert_eq!(mesh.metric("hopguard_requests_total", &["destination=\"others\"", "route=\"item\"", "\"ok\""]), 120.0);
    assert_eq!(series(&mesh).await, before, "120 callers' words made new series");
    mesh.stop().await;
}

#[tokio::test]
async fn hops_beyond_the_bound_count_together_as_other() {
    let upstream = Upstream::fixed("here").await;
    let routes = "    routes:\n      - { name: early, match: { path: /early } }\n      - { name: late, match: { path: /late } }\n      - { name: later, match: { path: /later } }\n";
    let mesh = Mesh::start(&policy(upstream.addr, routes)).await;
    assert_eq!(get(mesh.addr("in"), "/early").await.status, 200);
    mesh.ended("ok", 1).await;
    // As many reloads with other names would leave them behind.
    let hops = &mesh.app().telemetry().hops;
    for number in 0..MAX_HOPS {
        hops.register(HopLabels::new("shop", "app", format!("was{number}"), DirectionLabel::Inbound));
    }
    let overflowed = mesh.metric("hopguard_hops_overflowed_total", &[]);
    let ask = async |path: &str, times: usize| {
        for _ in 0..times {
            assert_eq!(get(mesh.addr("in"), path).await.status, 200);
        }
    };
    ask("/late", 3).await;
    mesh.ended("ok", 4).await;
    let before = series(&mesh).await;
    ask("/later", 4).await;
    ask("/early", 2).await;
    mesh.ended("ok", 10).await;
    let other = ["source=\"other\"", "destination=\"other\"", "route=\"other\"", "direction=\"other\"", "\"ok\""];
    assert_eq!(mesh.metric("hopguard_requests_total", &other), 7.0);
    assert_eq!(mesh.metric("hopguard_requests_total", &["route=\"early\"", "\"ok\""]), 3.0);
    assert_eq!(mesh.metric("hopguard_requests_total", &["route=\"late\""]), 0.0);
    assert_eq!(mesh.metric("hopguard_hops_overflowed_total", &[]), overflowed + 2.0, "one for each route");
    assert_eq!(series(&mesh).await, before);
    mesh.stop().await;
}

#[tokio::test]
async fn names_of_a_family_beyond_the_bound_count_together_as_other() {
    let bank = Bank::http1(&[Say::Status(503), Say::Status(200), Say::Status(503), Say::Status(200)]).await;
    let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", "    retry: { backoff: { max: 1ms } }")).await;
    for number in 0..NAMES {
        mesh.app().telemetry().retried(&format!("was{number}"), RetryReason::Failed);
    }
    let size = async || series(&mesh).await.iter().filter(|one| one.starts_with("hopguard_retries_total")).count();
    assert_eq!(size().await, NAMES);
    for calls in 1..=2 {
        assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
        mesh.ended("ok", calls).await;
        let other = ["destination=\"other\"", "reason=\"other\""];
        assert_eq!(mesh.metric("hopguard_retries_total", &other), calls as f64);
        assert_eq!(size().await, NAMES + 1);
    }
    assert_eq!(mesh.metric("hopguard_retries_total", &["destination=\"app\""]), 0.0);
    mesh.stop().await;
}
