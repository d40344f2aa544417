//! Services that accept connections slowly, full listen backlogs, and addresses that answer no connection request: a slow
//! accept is no failure, and a dead address costs a call little.

use std::net::SocketAddr;
use std::time::Duration;

use hyper::Response;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::support::certificates::Authority;
use crate::support::http::{Http1, empty, full, get, request};
use crate::support::upstream::{BlackHole, Gate, Upstream, fill_backlog, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

/// How often the kernel asks again for a connection: a call without help takes longer.
const KERNEL_RETRY: f64 = 1000.0;

/// Answers HTTP/1.1 on a stream.
async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(|_| async { Ok::<_, std::convert::Infallible>(Response::new(full("hello"))) });
    let _ended = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

/// Callers that keep their connections send so many calls each. Returns the answers that were not 200.
async fn load(to: SocketAddr, callers: usize, calls: usize) -> Vec<String> {
    let tasks: Vec<_> = (0..callers)
        .map(|_| {
            tokio::spawn(async move {
                let mut caller = Http1::open(to).await;
                let mut failures = Vec::new();
                for _ in 0..calls {
                    let answer = caller.ask(request("GET", "/").body(empty()).unwrap()).await;
                    if answer.status != 200 {
                        failures.push(format!("{answer:?}"));
                    }
                }
                failures
            })
        })
        .collect();
    let mut failures = Vec::new();
    for task in tasks {
        failures.extend(task.await.unwrap());
    }
    failures
}

/// Sends a load of which no call fails: neither the calls nor the breaker notice that the service accepts slowly.
async fn is_served(mesh: &Mesh, callers: usize, calls: usize) {
    let failures = load(mesh.addr("in"), callers, calls).await;
    assert!(failures.is_empty(), "{} of {}: {}", failures.len(), callers * calls, failures[0]);
    mesh.ended("ok", callers * calls).await;
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &["app"]), 0.0);
    eventually(|| (mesh.metric("hopguard_pool_waiting_requests", &["app"]) == 0.0).then_some(())).await;
}

#[tokio::test]
async fn more_callers_than_the_listen_backlog_admits_are_served() {
    for (backlog, callers) in [(1, 16), (1, 256), (5, 64), (50, 256)] {
        let upstream = Upstream::slowly(backlog, Duration::ZERO, answer);
        let mesh = Mesh::with(&policy(upstream.addr, ""), |settings| settings.workers = 2).await;
        is_served(&mesh, callers, 3).await;
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_service_that_accepts_every_300_milliseconds_serves_all_callers_over_what_it_has_accepted() {
    let upstream = Upstream::slowly(1, Duration::from_millis(300), answer);
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    is_served(&mesh, 64, 3).await;
    assert!(upstream.connections() < 10, "{} connections", upstream.connections());
    mesh.stop().await;
}

#[tokio::test]
async fn tls_handshakes_of_400_milliseconds_are_waited_for() {
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, authority.pem()).unwrap();
    let acceptor = authority.issue("app.test").acceptor(&["http/1.1"]);
    let upstream = Upstream::slowly(5, Duration::ZERO, move |stream| {
        let acceptor = acceptor.clone();
        async move {
            sleep(Duration::from_millis(400)).await;
            if let Ok(stream) = acceptor.accept(stream).await {
                answer(stream).await;
            }
        }
    });
    let more = format!("    tls: {{ ca: \"{}\", serverName: app.test }}", ca.display());
    let mesh = Mesh::start(&policy(upstream.addr, &more)).await;
    is_served(&mesh, 64, 3).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_service_that_restarts_and_leaves_new_connections_waiting_meanwhile_fails_no_call() {
    let (running, runs) = watch::channel(true);
    let upstream = Upstream::slowly(5, Duration::ZERO, move |stream| {
        let mut runs = runs.clone();
        async move {
            // Accepted by the service that is starting: it answers when it has started.
            drop(runs.wait_for(|runs| *runs).await);
            let mut wire = Wire::over(stream);
            loop {
                let head = tokio::select! {
                    head = wire.head() => head,
                    _stops = runs.wait_for(|runs| !*runs) => return,
                };
                if head.is_empty() {
                    return;
                }
                wire.send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await;
            }
        }
    });
    let mesh = Mesh::start(&policy(upstream.addr, "")).await;
    is_served(&mesh, 64, 3).await;
    running.send(false).unwrap();
    eventually(|| (mesh.metric("hopguard_pool_open_connections", &["app"]) == 0.0).then_some(())).await;
    let to = mesh.addr("in");
    let calls = tokio::spawn(async move { load(to, 64, 3).await });
    eventually(|| (mesh.metric("hopguard_pool_waiting_requests", &["app"]) > 0.0).then_some(())).await;
    running.send(true).unwrap();
    assert_eq!(calls.await.unwrap(), Vec::<String>::new());
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &["app"]), 0.0);
    mesh.stop().await;
}

/// The policy with several endpoints in the place of the one.
fn endpoints(all: &[SocketAddr], more: &str) -> String {
    let list: Vec<_> = all.iter().map(|addr| format!("\"{addr}\"")).collect();
    policy("127.0.0.1:1".parse().unwrap(), more).replace("\"127.0.0.1:1\"", &list.join(", "))
}

/// How long each call of the log waited for a connection, in milliseconds, longest first.
async fn waits(mesh: &Mesh, calls: usize) -> Vec<f64> {
    eventually(|| (mesh.log().len() == calls).then_some(())).await;
    let line = |line: &String| serde_json::from_str::<serde_json::Value>(line).unwrap();
    let mut waits: Vec<_> = mesh.log().iter().map(|one| line(one)["connect_ms"].as_f64().unwrap_or(0.0)).collect();
    waits.sort_by(|one, other| other.total_cmp(one));
    waits
}

#[tokio::test]
async fn a_dead_address_among_three_costs_one_call_a_quarter_of_a_second() {
    let (hole, one, two) = (BlackHole::open(), Upstream::fixed("here").await, Upstream::fixed("here").await);
    let mesh = Mesh::start(&endpoints(&[hole.addr(), one.addr, two.addr], "")).await;
    let mut calls = 0;
    while mesh.metric("hopguard_pool_pending_connections", &["app"]) == 0.0 {
        assert_eq!(get(mesh.addr("in"), "/").await.body, "here");
        calls += 1;
        assert!(calls < 64, "the hole is never met");
    }
    // As long as that connection is not open, the hole is avoided.
    for _ in 0..20 {
        assert_eq!(get(mesh.addr("in"), "/").await.body, "here");
        calls += 1;
    }
    let waits = waits(&mesh, calls).await;
    // 300 ms are promised; the bound leaves time to a busy machine, but less than the next attempt of the kernel takes.
    assert!(waits[0] >= 250.0 && waits[0] < KERNEL_RETRY && waits[1] < 250.0, "{waits:?}");
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &["app"]), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_burst_that_meets_a_dead_address_among_three_is_served_by_the_others() {
    let (hole, one, two) = (BlackHole::open(), Upstream::fixed("here").await, Upstream::fixed("here").await);
    let mesh = Mesh::start(&endpoints(&[hole.addr(), one.addr, two.addr], "")).await;
    let failures = load(mesh.addr("in"), 48, 4).await;
    assert_eq!(failures, Vec::<String>::new());
    let waits = waits(&mesh, 48 * 4).await;
    assert!(waits[0] < KERNEL_RETRY, "{waits:?}");
    // Enough calls have met it to eject it.
    assert_eq!(mesh.metric("hopguard_ejections_total", &["result=\"ejected\""]), 1.0);
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &["app"]), 0.0);
    mesh.stop().await;
}

#[tokio::test]
async fn a_tunnel_goes_to_another_address_if_the_first_is_dead() {
    let (hole, here) = (BlackHole::open(), Upstream::fixed("here").await);
    let text = endpoints(&[hole.addr(), here.addr], "    hosts: [shop.test]").replace("to: app", "forward: true");
    let mesh = Mesh::start(&text).await;
    for _ in 0..8 {
        let mut wire = Wire::open(mesh.addr("in")).await;
        wire.send("CONNECT shop.test:80 HTTP/1.1\r\nhost: shop.test:80\r\n\r\n").await;
        let head = wire.head().await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        wire.send("GET / HTTP/1.1\r\nhost: shop.test\r\nconnection: close\r\n\r\n").await;
        assert!(wire.rest().await.ends_with("here"));
    }
    let waits = waits(&mesh, 8).await;
    assert!(waits[0] < KERNEL_RETRY, "{waits:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_late_connection_is_not_held_against_a_service_that_answers_others_meanwhile() {
    let gate = Gate::closed();
    let lets = gate.clone();
    // One connection is accepted and served.
    let upstream = Upstream::slowly(0, Duration::from_secs(60), move |stream| {
        let gate = lets.clone();
        async move {
            let mut wire = Wire::over(stream);
            loop {
                if wire.head().await.starts_with("GET /slow") {
                    gate.pass().await;
                    wire.send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n").await;
                    gate.pass().await;
                } else {
                    wire.send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n").await;
                }
                wire.send("hello").await;
            }
        }
    });
    let more = "    timeouts: { connect: 600ms, request: 9s }\n    connections: { idle: 9s }\n    retry: off
    circuitBreaker: { consecutiveFailures: 1 }";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let to = mesh.addr("in");
    assert_eq!(get(to, "/").await.status, 200);
    let _full = fill_backlog(upstream.addr);
    let slow = tokio::spawn(async move { get(to, "/slow").await.status.as_u16() });
    eventually(|| (mesh.metric("hopguard_pool_idle_connections", &["app"]) == 0.0).then_some(())).await;
    let late = tokio::spawn(async move { get(to, "/").await });
    eventually(|| (mesh.metric("hopguard_pool_waiting_requests", &["app"]) == 1.0).then_some(())).await;
    gate.release(1);
    let answer = late.await.unwrap();
    let line = mesh.refused(&answer, "connect_timeout", "timeouts.connect", "600ms").await;
    assert!(line["refusal"]["detail"].as_str().unwrap().contains("answered others meanwhile"), "{line}");
    assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &["app"]), 0.0);
    // The same call while nothing is answered opens the breaker.
    let answer = get(to, "/").await;
    assert!(answer.problem()["detail"].as_str().unwrap().contains("it accepted none"), "{answer:?}");
    eventually(|| (mesh.metric("hopguard_circuit_breaker_changes_total", &["app"]) == 1.0).then_some(())).await;
    gate.release(1);
    assert_eq!(slow.await.unwrap(), 200);
    mesh.stop().await;
}

#[tokio::test]
async fn calls_that_run_out_of_time_together_while_others_are_answered_are_not_failures_in_a_row() {
    let upstream = Upstream::http1(|request| async move {
        if request.uri().path() == "/slow" {
            std::future::pending::<()>().await;
        }
        Response::new(full("hello"))
    })
    .await;
    let more = "    timeouts: { request: 600ms }\n    retry: off\n    circuitBreaker: { consecutiveFailures: 3 }";
    let mesh = Mesh::start(&policy(upstream.addr, more)).await;
    let to = mesh.addr("in");
    let changes = || mesh.metric("hopguard_circuit_breaker_changes_total", &["app"]);
    for is_answered in [true, false] {
        let seen = upstream.requests();
        let calls: Vec<_> =
            (0..6).map(|_| tokio::spawn(async move { get(to, "/slow").await.status.as_u16() })).collect();
        eventually(|| (upstream.requests() == seen + 6).then_some(())).await;
        if is_answered {
            assert_eq!(get(to, "/").await.status, 200);
        }
        for call in calls {
            assert_eq!(call.await.unwrap(), 504);
        }
        if is_answered {
            assert_eq!(changes(), 0.0);
            assert_eq!(get(to, "/").await.status, 200);
        }
    }
    eventually(|| (changes() == 1.0).then_some(())).await;
    mesh.stop().await;
}

#[tokio::test]
async fn streams_of_a_shared_connection_go_to_the_calls_that_wait() {
    let gate = Gate::closed();
    let lets = gate.clone();
    let upstream = Upstream::slowly(1, Duration::from_secs(60), move |stream| {
        let gate = lets.clone();
        async move {
            let service = service_fn(move |_| {
                let gate = gate.clone();
                async move {
                    gate.pass().await;
                    Ok::<_, std::convert::Infallible>(Response::new(full("hello")))
                }
            });
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ended = builder.max_concurrent_streams(2).serve_connection(TokioIo::new(stream), service).await;
        }
    });
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http2")).await;
    let to = mesh.addr("in");
    let calls: Vec<_> = (0..8).map(|_| tokio::spawn(async move { get(to, "/").await.status.as_u16() })).collect();
    // The second connection waits in the backlog: all calls go over the two streams of the first.
    eventually(|| (mesh.metric("hopguard_pool_waiting_requests", &["app"]) == 6.0).then_some(())).await;
    gate.release(8);
    for call in calls {
        assert_eq!(call.await.unwrap(), 200);
    }
    assert_eq!(mesh.metric("hopguard_pool_connects_total", &["app"]), 1.0);
    mesh.stop().await;
}
