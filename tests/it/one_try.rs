//! `timeouts.perTry` and the next hop: what a try is told, and what outlives it.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::support::Mesh;
use crate::support::bank::{Bank, Say, behind_a_caller};
use crate::support::http::{Caller, Speaks, ask, empty, feed, full, get, grpc_request, request};
use crate::support::upstream::{Upstream, policy};

const EXPECTED: &str = "x-envoy-expected-rq-timeout-ms";

const ONE_TRY: &str =
    "    timeouts: { request: 6s, perTry: 300ms }\n    retry: { attempts: 1, backoff: { max: 1ms } }\n";

/// Whether a hop was told the time of a try of 300 ms, and what the hops below keep of it on top.
fn is_of_one_try(told: &str) -> bool {
    told.parse::<u64>().is_ok_and(|told| (200..=330).contains(&told))
}

#[tokio::test]
async fn each_try_tells_how_long_it_is_waited_for() {
    let bank = Bank::http1(&[Say::Hang, Say::Hang, Say::Status(200)]).await;
    let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", ONE_TRY)).await;
    let answer = get(mesh.addr("in"), "/").await;
    mesh.refused(&answer, "per_try_timeout", "timeouts.perTry", "300ms").await;
    let hurry = request("GET", "/").header(EXPECTED, "190").body(empty()).unwrap();
    assert_eq!(ask(mesh.addr("in"), hurry).await.status, 200);
    let seen = bank.seen();
    assert_eq!(seen.len(), 3);
    assert!(seen[..2].iter().all(|seen| is_of_one_try(seen.header(EXPECTED))), "{seen:?}");
    let told: u64 = seen[2].header(EXPECTED).parse().unwrap();
    assert!(told < 190, "{told}: less is left of the whole call");
    mesh.stop().await;
}

#[tokio::test]
async fn a_stream_and_a_call_that_is_still_being_sent_are_not_told_of_their_try() {
    let (told, mut was_told) = mpsc::channel(8);
    let upstream = Upstream::http1(move |request: Request<Incoming>| {
        let told = told.clone();
        async move {
            let value = request.headers().get(EXPECTED).map(|value| value.to_str().unwrap().to_owned());
            told.send(value).await.unwrap();
            // The rest of the body comes after that.
            request.into_body().collect().await.unwrap();
            Response::new(full("done"))
        }
    })
    .await;
    let more = format!("{ONE_TRY}    routes:\n      - {{ name: live, match: {{ path: /live }}, stream: true }}");
    let mesh = Mesh::start(&policy(upstream.addr, &more)).await;
    assert_eq!(get(mesh.addr("in"), "/live").await.status, 200);
    assert_eq!(was_told.recv().await.unwrap(), None, "a stream");
    let (pieces, body) = feed();
    let mut caller = Caller::open(Speaks::Http1, mesh.addr("in")).await;
    let sending = tokio::spawn(async move { caller.ask(request("POST", "/").body(body).unwrap()).await });
    assert!(pieces.send("half ").await);
    let told = was_told.recv().await.unwrap().unwrap();
    assert!(told.parse::<u64>().unwrap() > 2_000, "{told}: `perTry` does not run out while the caller sends");
    drop(pieces);
    assert_eq!(sending.await.unwrap().status, 200);
    mesh.stop().await;
}

#[tokio::test]
async fn a_grpc_call_is_not_told_of_its_try_because_it_may_be_a_stream() {
    let bank = Bank::http2(&[Say::Grpc(0, &[])]).await;
    let mesh = Mesh::start(&behind_a_caller(&[bank.addr()], "", &format!("    protocol: http2\n{ONE_TRY}"))).await;
    for timeout in [None, Some("5S")] {
        let mut asked = grpc_request("/shop.v1.Payment/Charge", full(&b"\0\0\0\0\0"[..]));
        if let Some(timeout) = timeout {
            asked.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
        }
        assert_eq!(Caller::open(Speaks::Http2, mesh.addr("in")).await.ask(asked).await.grpc_status(), "0");
    }
    let seen = bank.seen();
    assert_eq!(seen[0].header("grpc-timeout"), "");
    let told = seen[1].header("grpc-timeout");
    let millis: u64 =
        told.trim_end_matches(['m', 'u']).parse::<u64>().unwrap() / if told.ends_with('u') { 1000 } else { 1 };
    assert!((2_000..5_000).contains(&millis), "{told}");
    mesh.stop().await;
}

/// A hop that tells its tries, and one behind it that is told.
async fn two_hops(upstream: SocketAddr) -> [Mesh; 2] {
    let inner = Mesh::start(&policy(upstream, "    timeouts: { request: 6s }")).await;
    let outer = Mesh::start(&behind_a_caller(&[inner.addr("in")], "", ONE_TRY)).await;
    [outer, inner]
}

#[tokio::test]
async fn an_answer_that_began_within_its_try_may_last_longer() {
    let slow = Upstream::http1(|_| async {
        let (pieces, body) = feed();
        tokio::spawn(async move {
            for _ in 0..8 {
                pieces.send("piece ").await;
                sleep(Duration::from_millis(100)).await;
            }
        });
        Response::new(body)
    })
    .await;
    let [outer, inner] = two_hops(slow.addr).await;
    let answer = get(outer.addr("in"), "/").await;
    assert_eq!((answer.status.as_u16(), answer.body.len()), (200, 48));
    outer.only("ok").await;
    let told = inner.only("ok").await["deadline_ms"].as_f64().unwrap();
    assert!(told <= 330.0, "{told}");
    for mesh in [outer, inner] {
        mesh.stop().await;
    }
}

#[tokio::test]
async fn the_hop_that_waits_ends_its_try_itself_and_makes_another() {
    let bank = Bank::http1(&[Say::Hang, Say::Status(200)]).await;
    let [outer, inner] = two_hops(bank.addr()).await;
    assert_eq!(get(outer.addr("in"), "/").await.status, 200);
    let line = outer.only("ok").await;
    assert_eq!((&line["attempt"], bank.tries()), (&2.into(), 2), "{line}");
    inner.only("ok").await;
    for mesh in [outer, inner] {
        mesh.stop().await;
    }
}
