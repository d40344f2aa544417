//! Wake batching: a worker with many HTTP/2 streams in flight sleeps briefly before it polls, and handles more events per wake-up.

use hyper::Request;

use crate::support::http::{Answer, Body, empty, get, http2, request};
use crate::support::upstream::{Gate, Upstream, policy};
use crate::support::{Mesh, eventually};

/// Calls in flight at once; wake batching begins at 32 streams per worker.
const CALLS: usize = 48;

fn slow() -> Request<Body> {
    request("GET", "/slow").body(empty()).unwrap()
}

async fn open() -> (Gate, Upstream, Mesh) {
    let gate = Gate::closed();
    let upstream = Upstream::gated("done", &gate).await;
    let mesh = Mesh::start(&policy(upstream.addr, "    timeouts: { request: 20s }")).await;
    (gate, upstream, mesh)
}

#[tokio::test]
async fn a_worker_with_many_http2_streams_batches_wakes_and_every_call_is_answered() {
    let (gate, upstream, mesh) = open().await;
    let connection = http2(mesh.addr("in")).await;
    let calls: Vec<_> = (0..CALLS)
        .map(|_| {
            let mut connection = connection.clone();
            tokio::spawn(async move { Answer::read(connection.send_request(slow()).await.unwrap()).await.unwrap() })
        })
        .collect();
    eventually(|| (upstream.requests() == CALLS).then_some(())).await;
    eventually(|| (mesh.metric("hopguard_worker_wake_batches_total", &[]) > 0.0).then_some(())).await;
    gate.release(CALLS);
    for call in calls {
        assert_eq!(call.await.unwrap().status, 200);
    }
    mesh.ended("ok", CALLS).await;
}

#[tokio::test]
async fn over_http1_no_worker_batches_wakes() {
    let (gate, upstream, mesh) = open().await;
    let to = mesh.addr("in");
    let calls: Vec<_> = (0..CALLS).map(|_| tokio::spawn(get(to, "/slow"))).collect();
    eventually(|| (upstream.requests() == CALLS).then_some(())).await;
    gate.release(CALLS);
    for call in calls {
        assert_eq!(call.await.unwrap().status, 200);
    }
    mesh.ended("ok", CALLS).await;
    assert_eq!(mesh.metric("hopguard_worker_wake_batches_total", &[]), 0.0);
}
