//! The concurrency limit of a destination, its queue, and the local replies when the queue is full or too slow.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::support::http::{Answer, empty, full, get, grpc};
use crate::support::upstream::{Gate, Upstream, policy};
use crate::support::{Mesh, eventually};

/// An upstream that answers when the test says so, and keeps the order in which it was asked.
struct Shop {
    upstream: Upstream,
    gate: Gate,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Shop {
    async fn open() -> Self {
        let (gate, asked) = (Gate::closed(), Arc::new(Mutex::new(Vec::new())));
        let (held, seen) = (gate.clone(), Arc::clone(&asked));
        let upstream = Upstream::http1(move |request: Request<Incoming>| {
            seen.lock().unwrap().push(request.uri().path().to_owned());
            let held = held.clone();
            async move {
                held.pass().await;
                Response::new(full("done"))
            }
        })
        .await;
        Self { upstream, gate, asked }
    }

    async fn mesh(&self, limits: &str) -> Mesh {
        let more = format!("    protocol: http1\n    limits: {{ {limits} }}\n    timeouts: {{ request: 20s }}");
        Mesh::start(&policy(self.upstream.addr, &more)).await
    }

    async fn asked(&self, count: usize) {
        eventually(|| (self.asked.lock().unwrap().len() == count).then_some(())).await;
    }
}

fn call(mesh: &Mesh, path: &'static str) -> JoinHandle<Answer> {
    let to = mesh.addr("in");
    tokio::spawn(async move { get(to, path).await })
}

async fn queued(mesh: &Mesh, count: usize) {
    eventually(|| (mesh.metric("hopguard_queued_requests", &["app"]) == count as f64).then_some(())).await;
}

#[tokio::test]
async fn who_finds_the_queue_full_is_sent_away_at_once() {
    let shop = Shop::open().await;
    let mesh = shop.mesh("inFlight: 1, queue: 0").await;
    let first = call(&mesh, "/1");
    shop.asked(1).await;
    assert_eq!(mesh.metric("hopguard_in_flight_requests", &["app"]), 1.0);
    let answer = get(mesh.addr("in"), "/2").await;
    assert_eq!(answer.status, 503);
    assert!(answer.header("retry-after").parse::<u32>().is_ok_and(|seconds| seconds >= 1), "{answer:?}");
    let line = mesh.only("queue_full").await;
    let rule = line["refusal"]["rule"].as_str().unwrap();
    assert!(["limits.inFlight", "limits.queue"].contains(&rule), "{line}");
    mesh.refused(&answer, "queue_full", rule, if rule == "limits.queue" { "0" } else { "1" }).await;
    assert_eq!(line["refusal"]["origin"], "policy.yaml:11", "{line}");
    assert!(line["queue_ms"].is_null(), "{line}");
    assert_eq!(mesh.metric("hopguard_queue_duration_seconds_count", &["app"]), 0.0, "nobody has waited");
    shop.gate.release(1);
    assert_eq!(first.await.unwrap().body, "done");
    assert_eq!(shop.asked.lock().unwrap().len(), 1);
    mesh.stop().await;
}

#[tokio::test]
async fn who_waits_too_long_is_sent_away() {
    let shop = Shop::open().await;
    let mesh = shop.mesh("inFlight: 1, queue: 5, queueTimeout: 250ms").await;
    let first = call(&mesh, "/1");
    shop.asked(1).await;
    let begun = Instant::now();
    let answer = get(mesh.addr("in"), "/2").await;
    assert!(begun.elapsed() >= Duration::from_millis(250), "{:?}", begun.elapsed());
    assert_eq!(answer.status, 503);
    assert!(!answer.header("retry-after").is_empty(), "{answer:?}");
    let line = mesh.refused(&answer, "queue_timeout", "limits.queueTimeout", "250ms").await;
    assert!(line["queue_ms"].as_f64() >= Some(250.0), "{line}");
    shop.gate.release(1);
    assert_eq!(first.await.unwrap().body, "done");
    mesh.stop().await;
}

#[tokio::test]
async fn grpc_is_told_that_the_resource_is_exhausted() {
    let shop = Shop::open().await;
    let mesh = shop.mesh("inFlight: 1, queue: 1, queueTimeout: 150ms").await;
    let first = call(&mesh, "/1");
    shop.asked(1).await;
    let late = grpc(mesh.addr("in"), "/shop.v1.Payment/Charge").await;
    assert_eq!((late.status.as_u16(), late.grpc_status()), (200, "8"), "{late:?}");
    let line = mesh.refused(&late, "queue_timeout", "limits.queueTimeout", "150ms").await;
    assert_eq!(line["grpc_status"], "RESOURCE_EXHAUSTED", "{line}");
    shop.gate.release(1);
    first.await.unwrap();
    mesh.stop().await;
}

#[tokio::test]
async fn places_are_handed_over_in_the_order_of_arrival() {
    let shop = Shop::open().await;
    let mesh = shop.mesh("inFlight: 1, queue: 5, queueTimeout: 20s").await;
    let mut calls = vec![call(&mesh, "/1")];
    shop.asked(1).await;
    for (before, path) in ["/2", "/3", "/4", "/5"].into_iter().enumerate() {
        calls.push(call(&mesh, path));
        queued(&mesh, before + 1).await;
    }
    for count in 1..=5 {
        shop.asked(count).await;
        shop.gate.release(1);
    }
    for call in calls {
        assert_eq!(call.await.unwrap().status, 200);
    }
    assert_eq!(*shop.asked.lock().unwrap(), ["/1", "/2", "/3", "/4", "/5"]);
    mesh.ended("ok", 5).await;
    assert_eq!(mesh.metric("hopguard_queue_duration_seconds_count", &["app"]), 4.0);
    eventually(|| (mesh.log().len() == 5).then_some(())).await;
    assert_eq!(mesh.log().iter().filter(|line| line.contains("queue_ms")).count(), 4, "{:#?}", mesh.log());
    mesh.stop().await;
}

#[tokio::test]
async fn who_leaves_the_queue_gives_up_the_place() {
    let shop = Shop::open().await;
    let mesh = shop.mesh("inFlight: 1, queue: 1, queueTimeout: 20s").await;
    let first = call(&mesh, "/1");
    shop.asked(1).await;
    let second = call(&mesh, "/2");
    queued(&mesh, 1).await;
    second.abort();
    queued(&mesh, 0).await;
    let third = call(&mesh, "/3");
    queued(&mesh, 1).await;
    shop.gate.release(2);
    assert_eq!((first.await.unwrap().status.as_u16(), third.await.unwrap().status.as_u16()), (200, 200));
    assert_eq!(*shop.asked.lock().unwrap(), ["/1", "/3"]);
    mesh.ended("ok", 2).await;
    let gone = mesh.only("caller_gone").await;
    assert_eq!(gone["path"], "/2");
    assert!(gone["queue_ms"].is_number(), "it has waited as well: {gone}");
    let waited = |outcome| mesh.metric("hopguard_queue_duration_seconds_count", &[outcome]);
    assert_eq!((waited("outcome=\"caller_gone\""), waited("outcome=\"ok\"")), (1.0, 1.0));
    mesh.stop().await;
}

#[tokio::test]
async fn the_limit_holds_over_all_workers() {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (inside, peak) = (Arc::clone(&now), Arc::clone(&most));
    let upstream = Upstream::http1(move |_| {
        let (inside, peak) = (Arc::clone(&inside), Arc::clone(&peak));
        async move {
            peak.fetch_max(inside.fetch_add(1, SeqCst) + 1, SeqCst);
            tokio::time::sleep(Duration::from_millis(5)).await;
            inside.fetch_sub(1, SeqCst);
            Response::new(empty())
        }
    })
    .await;
    let more = "    limits: { inFlight: 3, queue: 100, queueTimeout: 20s }\n    timeouts: { request: 20s }";
    let mesh = Mesh::with(&policy(upstream.addr, more), |settings| settings.workers = 4).await;
    let calls: Vec<_> = (0..60).map(|_| call(&mesh, "/")).collect();
    for call in calls {
        assert_eq!(call.await.unwrap().status, 200);
    }
    assert_eq!(most.load(SeqCst), 3);
    mesh.ended("ok", 60).await;
    assert_eq!(mesh.metric("hopguard_in_flight_requests", &["app"]), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_reload_neither_forgets_who_is_inside_nor_who_waits() {
    let shop = Shop::open().await;
    let text = |in_flight: u32, request: u32| {
        let limits = format!("limits: {{ inFlight: {in_flight}, queue: 5, queueTimeout: 20s }}");
        policy(shop.upstream.addr, &format!("    {limits}\n    timeouts: {{ request: {request}s }}"))
    };
    let mesh = Mesh::start(&text(1, 20)).await;
    let first = call(&mesh, "/1");
    shop.asked(1).await;
    let second = call(&mesh, "/2");
    queued(&mesh, 1).await;
    mesh.reload(&text(1, 21)).await;
    let third = call(&mesh, "/3");
    queued(&mesh, 2).await;
    mesh.reload(&text(2, 21)).await;
    shop.gate.release(1);
    // With the next place given back, the new limit holds: both who wait get in, in either order.
    shop.asked(3).await;
    shop.gate.release(2);
    for call in [first, second, third] {
        assert_eq!(call.await.unwrap().status, 200);
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_call_that_is_cut_gives_its_place_back() {
    let shop = Shop::open().await;
    let more = "    limits: { inFlight: 1, queue: 0 }\n    timeouts: { request: 200ms }";
    let mesh = Mesh::start(&policy(shop.upstream.addr, more)).await;
    for _ in 0..3 {
        assert_eq!(get(mesh.addr("in"), "/").await.status, 504);
    }
    mesh.ended("request_timeout", 3).await;
    assert_eq!(mesh.count("queue_full"), 0.0);
    mesh.stop().await;
}
