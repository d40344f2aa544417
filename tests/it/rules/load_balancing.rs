//! Load balancing over several endpoints: slow endpoints and endpoints that are down get fewer calls. Endpoints given by name.

use std::time::Duration;

use hyper::Response;

use crate::support::Mesh;
use crate::support::http::{full, get};
use crate::support::upstream::{Upstream, nobody, policy};

fn two(first: &str, second: &str, more: &str) -> String {
    policy("127.0.0.1:1".parse().unwrap(), more).replace("\"127.0.0.1:1\"", &format!("\"{first}\", \"{second}\""))
}

async fn slow(delay: Duration) -> Upstream {
    Upstream::http1(move |_| async move {
        tokio::time::sleep(delay).await;
        Response::new(full("slow"))
    })
    .await
}

/// Sends so many calls, a few at a time.
async fn load(mesh: &Mesh, calls: usize) {
    let to = mesh.addr("in");
    for _ in 0..calls / 4 {
        let batch: Vec<_> = (0..4).map(|_| tokio::spawn(async move { get(to, "/").await.status.as_u16() })).collect();
        for call in batch {
            assert_eq!(call.await.unwrap(), 200);
        }
    }
}

#[tokio::test]
async fn endpoints_share_the_load() {
    let (left, right) = (slow(Duration::from_millis(2)).await, slow(Duration::from_millis(2)).await);
    let mesh = Mesh::start(&two(&left.addr.to_string(), &right.addr.to_string(), "")).await;
    load(&mesh, 200).await;
    assert_eq!(left.requests() + right.requests(), 200);
    assert!(left.requests().min(right.requests()) >= 40, "{} and {}", left.requests(), right.requests());
    mesh.stop().await;
}

#[tokio::test]
async fn a_slow_endpoint_is_avoided() {
    let (quick, slow) = (slow(Duration::from_millis(1)).await, slow(Duration::from_millis(150)).await);
    let mesh = Mesh::start(&two(&quick.addr.to_string(), &slow.addr.to_string(), "")).await;
    load(&mesh, 200).await;
    assert!(slow.requests() <= 50, "{} of 200 calls went to the slow one", slow.requests());
    mesh.stop().await;
}

#[tokio::test]
async fn an_endpoint_that_is_down_is_avoided() {
    let here = Upstream::fixed("here").await;
    let mesh = Mesh::start(&two(&nobody().to_string(), &here.addr.to_string(), "")).await;
    for _ in 0..100 {
        get(mesh.addr("in"), "/").await;
    }
    assert!(here.requests() >= 90, "{} of 100 calls were lost", 100 - here.requests());
    mesh.ended("ok", here.requests()).await;
    assert_eq!(mesh.count("connect_failed") as usize, 100 - here.requests());
    mesh.stop().await;
}

#[tokio::test]
async fn nobody_there_is_a_502_that_says_so() {
    let mesh = Mesh::start(&policy(nobody(), "")).await;
    let answer = get(mesh.addr("in"), "/").await;
    assert_eq!((answer.status.as_u16(), answer.problem()["refusal"].as_str()), (502, Some("connect_failed")));
    let line = mesh.only("connect_failed").await;
    assert_eq!(line["endpoint"], nobody().to_string(), "{line}");
    assert!(mesh.metric("hopguard_pool_connect_failures_total", &["app"]) >= 1.0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_name_is_looked_up() {
    let upstream = Upstream::fixed("hello").await;
    let named = format!("dns:localhost:{}", upstream.addr.port());
    let text = policy("127.0.0.1:1".parse().unwrap(), "").replace("127.0.0.1:1\"", &format!("{named}\""));
    let mesh = Mesh::start(&text).await;
    for _ in 0..10 {
        assert_eq!(get(mesh.addr("in"), "/").await.body, "hello");
    }
    mesh.ended("ok", 10).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_name_that_does_not_exist_is_explained() {
    let text = policy("127.0.0.1:1".parse().unwrap(), "").replace("127.0.0.1:1\"", "dns:no-such-name.invalid:80\"");
    let mesh = Mesh::start(&text).await;
    let answer = get(mesh.addr("in"), "/").await;
    assert!(answer.status == 502 || answer.status == 503 || answer.status == 504, "{answer:?}");
    let problem = answer.problem();
    assert_eq!(problem["refusal"], "dns_failed", "{problem}");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("no-such-name.invalid") && !detail.contains("Query"), "{problem}");
    assert_eq!(mesh.only("dns_failed").await["status"], answer.status.as_u16());
    mesh.stop().await;
}
