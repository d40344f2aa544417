//! The maximum body size: an announced length, a body counted while it passes, gRPC, dry run, layers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Request, Response};

use crate::support::Mesh;
use crate::support::http::{Caller, Speaks, ask, empty, feed, full, get, grpc_request, request};
use crate::support::upstream::{Upstream, policy};
use crate::support::wire::Wire;

const TEN: &str = "    maxBodySize: 10";

/// An upstream that reads each body to its end, and counts those that it got whole.
async fn reader(speaks: Speaks) -> (Upstream, Arc<AtomicUsize>) {
    let whole = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&whole);
    let handler = move |request: Request<Incoming>| {
        let counted = Arc::clone(&counted);
        async move {
            let Ok(body) = request.into_body().collect().await else { return Response::new(full("cut")) };
            counted.fetch_add(1, SeqCst);
            Response::new(full(body.to_bytes().len().to_string()))
        }
    };
    let upstream = match speaks {
        Speaks::Http1 => Upstream::http1(handler).await,
        Speaks::Http2 => Upstream::http2(handler).await,
    };
    (upstream, whole)
}

#[tokio::test]
async fn an_announced_body_over_the_limit_gets_413_before_the_upstream_hears_of_it() {
    let (upstream, _) = reader(Speaks::Http1).await;
    let mesh = Mesh::start(&policy(upstream.addr, TEN)).await;
    let post = |size: usize| request("POST", "/").body(full(vec![b'x'; size])).unwrap();
    for size in [0, 10] {
        let answer = ask(mesh.addr("in"), post(size)).await;
        assert_eq!(
            (answer.status.as_u16(), String::from_utf8_lossy(&answer.body).into_owned()),
            (200, size.to_string()),
            "{size} bytes"
        );
    }
    let answer = ask(mesh.addr("in"), post(11)).await;
    assert_eq!(answer.status, 413);
    assert_eq!(answer.header("connection"), "close", "{answer:?}");
    assert!(answer.header("proxy-status").contains("error=http_request_error"), "{answer:?}");
    let line = mesh.refused(&answer, "body_too_large", "maxBodySize", "10").await;
    assert_eq!(
        (&line["attempt"], &line["refusal"]["closed_by"]),
        (&serde_json::Value::Null, &"hopguard".into()),
        "{line}"
    );
    assert_eq!((upstream.requests(), mesh.count("body_too_large")), (2, 1.0));
    mesh.stop().await;
}

#[tokio::test]
async fn a_body_without_a_length_is_cut_when_it_passes_the_limit_and_no_upstream_is_at_fault() {
    for speaks in [Speaks::Http1, Speaks::Http2] {
        let (upstream, whole) = reader(Speaks::Http1).await;
        let breaker = format!("{TEN}\n    circuitBreaker: {{ consecutiveFailures: 1, openFor: 50s, openForMax: 60s }}");
        let mesh = Mesh::start(&policy(upstream.addr, &breaker)).await;
        let mut caller = Caller::open(speaks, mesh.addr("in")).await;
        let (send, body) = feed();
        send.send("01234567").await;
        let asking = tokio::spawn(async move { caller.ask(request("PUT", "/").body(body).unwrap()).await });
        send.send("89x").await;
        let answer = asking.await.unwrap();
        assert_eq!(answer.status, 413, "{speaks:?}: {answer:?}");
        mesh.refused(&answer, "body_too_large", "maxBodySize", "10").await;
        // Nothing was sent again, the upstream did not get a whole body, and the breaker is closed.
        assert_eq!((whole.load(SeqCst), mesh.metric("hopguard_retries_total", &[])), (0, 0.0), "{speaks:?}");
        assert_eq!(get(mesh.addr("in"), "/").await.status, 200, "{speaks:?}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_grpc_caller_gets_resource_exhausted() {
    let (upstream, _) = reader(Speaks::Http2).await;
    let mesh = Mesh::start(&policy(upstream.addr, TEN)).await;
    let (send, body) = feed();
    send.send([&[0, 0, 0, 0, 20][..], &[7; 20]].concat()).await;
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    let answer = caller.ask(grpc_request("/shop.Orders/Add", body)).await;
    assert_eq!((answer.status.as_u16(), answer.grpc_status()), (200, "8"), "{answer:?}");
    mesh.refused(&answer, "body_too_large", "maxBodySize", "10").await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_dry_run_passes_every_body_and_counts_those_over_the_limit() {
    let (upstream, whole) = reader(Speaks::Http1).await;
    let mesh = Mesh::start(&policy(upstream.addr, &format!("{TEN}\nrules: {{ maxBodySize: dryRun }}"))).await;
    for size in [10, 11, 12] {
        let answer = ask(mesh.addr("in"), request("POST", "/").body(full(vec![b'x'; size])).unwrap()).await;
        assert_eq!(answer.status, 200, "{size} bytes");
    }
    mesh.ended("ok", 3).await;
    assert_eq!((whole.load(SeqCst), mesh.count("body_too_large")), (3, 0.0));
    assert_eq!(mesh.metric("hopguard_dry_run_total", &["rule=\"max_body_size\"", "app"]), 2.0);
    let lines = mesh.log().iter().filter(|line| line.contains("\"dry_run\":\"max_body_size\"")).count();
    assert_eq!(lines, 2, "{:#?}", mesh.log());
    mesh.stop().await;
}

#[tokio::test]
async fn a_route_sets_its_own_limit_and_off_removes_it() {
    let (upstream, _) = reader(Speaks::Http1).await;
    let routes = format!(
        "{TEN}\n    routes:\n      - {{ name: small, match: {{ path: /small }}, maxBodySize: 2 }}\n      \
         - {{ name: all, match: {{ path: /all }}, maxBodySize: off }}"
    );
    let mesh = Mesh::start(&policy(upstream.addr, &routes)).await;
    for (path, size, status) in
        [("/small", 2, 200), ("/small", 3, 413), ("/all", 1000, 200), ("/", 10, 200), ("/", 11, 413)]
    {
        let answer = ask(mesh.addr("in"), request("POST", path).body(full(vec![b'x'; size])).unwrap()).await;
        assert_eq!(answer.status, status, "{path} {size}");
    }
    let off = Mesh::start(&policy(upstream.addr, &format!("{TEN}\nrules: {{ maxBodySize: off }}"))).await;
    let answer = ask(off.addr("in"), request("POST", "/").body(full(vec![b'x'; 1000])).unwrap()).await;
    assert_eq!(answer.status, 200);
    off.stop().await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_caller_that_waits_for_100_continue_is_refused_before_it_sends() {
    let (upstream, _) = reader(Speaks::Http1).await;
    let mesh = Mesh::start(&policy(upstream.addr, TEN)).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send("POST / HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 11\r\nExpect: 100-continue\r\n\r\n").await;
    assert!(wire.head().await.starts_with("HTTP/1.1 413 "));
    assert_eq!(ask(mesh.addr("in"), request("GET", "/").body(empty()).unwrap()).await.status, 200);
    assert_eq!(upstream.requests(), 1);
    mesh.stop().await;
}
