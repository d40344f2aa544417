//! Servers that replace a worker process and keep their socket: all connections of the worker end within a moment, while fresh connections
//! are answered. hopguard opens no circuit breaker. How many requests are lost beside direct calls is a matter of chance in so few
//! calls: `make soak-peers` compares that.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, Request};

use crate::peers::callers::{Callers, Fate, agree};
use crate::peers::graceful_stop::{PATH, PAUSE, mixed, policy};
use crate::peers::real_server::{RealServer, Software};
use crate::support::Mesh;
use crate::support::http::{Answer, Caller, Speaks, empty};

const POSTS: [Method; 8] = [Method::POST; 8];

fn opened(mesh: &Mesh) -> f64 {
    mesh.metric("hopguard_circuit_breaker_changes_total", &["state=\"open\""])
}

async fn rounds(to: SocketAddr) -> Vec<Fate> {
    let callers = Callers::start(to, PATH, &POSTS, Duration::from_millis(2));
    callers.rounds(60).await;
    callers.end().await
}

/// The worker of gunicorn that answers on a fresh connection; a worker that ends may reset fresh connections, too.
async fn worker(server: &RealServer) -> Bytes {
    loop {
        let request = Request::get("/pid").body(empty()).unwrap();
        let response = Caller::open(Speaks::Http1, server.addr).await.send(request).await;
        if let Ok(response) = response
            && let Ok(answer) = Answer::read(response).await
        {
            return answer.body;
        }
    }
}

/// At SIGHUP gunicorn keeps its socket and replaces its workers; the old worker abandons its persistent connections.
#[tokio::test]
async fn a_reload_of_gunicorn_opens_no_breaker() {
    let Some(server) = RealServer::start(Software::Gunicorn).await else { return };
    let mesh = Mesh::start(&policy(&server, "inbound")).await;
    let old = worker(&server).await;
    let callers = Callers::start(mesh.addr("in"), PATH, &mixed(), PAUSE);
    callers.rounds(10).await;
    server.signal("HUP").await;
    while worker(&server).await == old {}
    callers.rounds(60).await;
    let fates = callers.end().await;
    agree(&fates, &server);
    assert_eq!((opened(&mesh), mesh.count("circuit_open")), (0.0, 0.0));
    mesh.stop().await;
}

/// A server that replaces a worker after a number of requests: no breaker opens.
async fn replaced_workers(software: Software, words: &[&str]) {
    let Some(server) = RealServer::with(software, words, &[]).await else { return };
    let mesh = Mesh::start(&policy(&server, "outbound")).await;
    let fates = rounds(mesh.addr("in")).await;
    agree(&fates, &server);
    assert_eq!((opened(&mesh), mesh.count("circuit_open")), (0.0, 0.0));
    mesh.stop().await;
}

/// uvicorn ends a worker without a word: each of its connections gets FIN.
#[tokio::test]
async fn workers_that_uvicorn_replaces_after_some_requests_open_no_breaker() {
    replaced_workers(Software::Uvicorn, &["--workers", "2", "--limit-max-requests", "60"]).await;
}

/// gunicorn resets the connections of the worker, and requests that wait on them.
#[tokio::test]
async fn workers_that_gunicorn_replaces_after_some_requests_open_no_breaker() {
    replaced_workers(Software::Gunicorn, &["--workers", "2", "--max-requests", "60"]).await;
}
