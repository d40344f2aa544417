//! Outcomes in load balancing: an endpoint that fails gets fewer calls, however fast it fails; a client's abort or short
//! deadline does not reduce its share.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::support::bank::behind_a_caller;
use crate::support::http::{Body, Http1, ask, empty, feed, full, get, grpc, request, with_trailers};
use crate::support::upstream::Upstream;
use crate::support::{Mesh, eventually};

/// Nothing but the choice of an endpoint keeps calls from one.
const CHOICE_ONLY: &str = "    retry: off\n    circuitBreaker: off\n    ejection: off";

/// So long that what a busy machine adds makes no difference.
const TAKES: Duration = Duration::from_millis(50);

/// Reads the request and takes its time.
async fn patient() -> Upstream {
    Upstream::http1(|request: Request<Incoming>| async move {
        let _whole = request.into_body().collect().await;
        sleep(TAKES).await;
        Response::new(full("hello"))
    })
    .await
}

/// Eight callers with six calls each.
async fn load<F>(call: impl Fn() -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut callers = JoinSet::new();
    for _ in 0..8 {
        let calls: Vec<F> = (0..6).map(|_| call()).collect();
        callers.spawn(async move {
            for call in calls {
                call.await;
            }
        });
    }
    callers.join_all().await;
}

/// How many calls each of the two gets under load.
async fn shares(to: SocketAddr, endpoints: &[Upstream; 2]) -> [usize; 2] {
    let before = endpoints.each_ref().map(Upstream::requests);
    load(move || async move { assert_eq!(get(to, "/").await.status, 200) }).await;
    std::array::from_fn(|at| endpoints[at].requests() - before[at])
}

async fn two() -> ([Upstream; 2], Mesh) {
    let endpoints = [patient().await, patient().await];
    let addresses = endpoints.each_ref().map(|one| one.addr);
    (endpoints, Mesh::start(&behind_a_caller(&addresses, "", CHOICE_ONLY)).await)
}

#[tokio::test]
async fn a_caller_that_leaves_during_its_upload_takes_no_calls_from_the_endpoint() {
    let (endpoints, mesh) = two().await;
    let all = || endpoints.iter().map(Upstream::requests).sum::<usize>();
    shares(mesh.addr("in"), &endpoints).await;
    let (seen, (pieces, body)) = (all(), feed());
    let mut caller = Http1::open(mesh.addr("in")).await;
    let call = tokio::spawn(async move { caller.send(request("POST", "/").body(body).unwrap()).await.map(drop) });
    assert!(pieces.send("first").await);
    eventually(|| (all() > seen).then_some(())).await;
    call.abort();
    mesh.only("caller_gone").await;
    let shares = shares(mesh.addr("in"), &endpoints).await;
    assert!(shares.iter().all(|calls| *calls > 8), "{shares:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_caller_in_a_hurry_takes_no_calls_from_the_endpoint() {
    let (endpoints, mesh) = two().await;
    shares(mesh.addr("in"), &endpoints).await;
    let hurried = request("GET", "/").header("x-envoy-expected-rq-timeout-ms", "20").body(empty()).unwrap();
    assert_eq!(ask(mesh.addr("in"), hurried).await.status, 504);
    mesh.only("deadline_exceeded").await;
    let shares = shares(mesh.addr("in"), &endpoints).await;
    assert!(shares.iter().all(|calls| *calls > 8), "{shares:?}");
    mesh.stop().await;
}

/// A good answer to gRPC, which takes its time.
async fn good() -> Upstream {
    Upstream::http2(|_| async move {
        sleep(TAKES).await;
        let answer = Response::builder().header("content-type", "application/grpc");
        answer.body(with_trailers(&b"\0\0\0\0\0"[..], &[("grpc-status", "0")])).unwrap()
    })
    .await
}

/// How an endpoint fails.
type Answers = fn() -> Response<Body>;

#[tokio::test]
async fn a_grpc_endpoint_that_fails_at_once_gets_few_calls_wherever_it_says_so() {
    let in_head = || Response::builder().header("grpc-status", "14").body(empty()).unwrap();
    let in_trailers = || Response::new(with_trailers(&b"\0\0\0\0\0"[..], &[("grpc-status", "14")]));
    let nowhere = || Response::new(empty());
    let table: [(&str, Answers); 3] =
        [("in the head", in_head), ("in the trailers", in_trailers), ("nowhere", nowhere)];
    for (says_so, answer) in table {
        let bad = Upstream::http2(move |_| async move {
            let mut answer = answer();
            answer.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            answer
        })
        .await;
        let good = [good().await, good().await];
        let addresses = [bad.addr, good[0].addr, good[1].addr];
        let mesh = Mesh::start(&behind_a_caller(&addresses, "", CHOICE_ONLY)).await;
        let to = mesh.addr("in");
        load(move || async move { drop(grpc(to, "/shop.v1.Payment/Charge").await) }).await;
        assert!((1..=16).contains(&bad.requests()), "{says_so}: {} of 48", bad.requests());
        mesh.ended("grpc_error", bad.requests()).await;
        mesh.ended("ok", 48 - bad.requests()).await;
        mesh.stop().await;
    }
}
