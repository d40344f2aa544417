//! Real servers that end persistent connections after some idle time or after some requests, at the moments at which a proxy may lose a
//! request: when a connection has been idle for almost that time, and at the last request.

use std::net::SocketAddr;
use std::time::Duration;

use hyper::Method;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::peers::callers::{Callers, Fate, agree, ask};
use crate::peers::real_server::{RealServer, Software};
use crate::support::Mesh;

const POSTS: [Method; 8] = [Method::POST; 8];

/// One outbound listener with a destination, and so with connections, for each name.
fn outbound(server: SocketAddr, names: &[String]) -> String {
    let listener = |name| format!("  - {{ name: {name}, bind: \"127.0.0.1:0\", to: {name}, direction: outbound }}\n");
    let destination =
        |name| format!("  - {{ name: {name}, endpoints: [\"{server}\"], connections: {{ idle: 30s }} }}\n");
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
{}destinations:
{}",
        names.iter().map(listener).collect::<String>(),
        names.iter().map(destination).collect::<String>()
    )
}

fn failed(fates: &[Fate]) -> Vec<&Fate> {
    fates.iter().filter(|fate| fate.status != 200).collect()
}

/// POSTs of one caller, with the same idle time before each.
async fn posts_after(idle: Duration, to: SocketAddr, name: String, count: usize) -> Vec<Fate> {
    let (mut caller, mut fates) = (None, Vec::new());
    for number in 0..count {
        fates.push(ask(&mut caller, to, "/post", &Method::POST, format!("{name}.{number}")).await);
        sleep(idle).await;
    }
    fates
}

/// Pauses around a keep-alive time of one second, each with its own destination: all POSTs, and the number of connections opened.
async fn around_one_second(server: &RealServer, count: usize) -> (Vec<Fate>, Mesh) {
    let pauses: Vec<u64> = (930..=1050).step_by(10).collect();
    let names: Vec<String> = pauses.iter().map(|pause| format!("after-{pause}")).collect();
    let mesh = Mesh::start(&outbound(server.addr, &names)).await;
    let mut callers = JoinSet::new();
    for (pause, name) in pauses.into_iter().zip(names) {
        callers.spawn(posts_after(Duration::from_millis(pause), mesh.addr(&name), name, count));
    }
    (callers.join_all().await.concat(), mesh)
}

/// Node announces the time (`Keep-Alive: timeout=1`).
#[tokio::test]
async fn an_announced_keep_alive_time_of_node_loses_no_post() {
    let Some(server) = RealServer::with(Software::Node, &[], &[("KEEP_ALIVE", "1000")]).await else { return };
    let (fates, mesh) = around_one_second(&server, 3).await;
    assert!(failed(&fates).is_empty(), "{:#?}", failed(&fates));
    assert_eq!(mesh.metric("hopguard_pool_connects_total", &[]), fates.len() as f64, "an idle connection was used");
    mesh.stop().await;
}

/// gunicorn announces nothing: the first closes teach the time.
#[tokio::test]
async fn an_unannounced_keep_alive_time_of_gunicorn_loses_one_post_per_destination_at_most() {
    let Some(server) = RealServer::with(Software::Gunicorn, &["--keep-alive", "1"], &[]).await else { return };
    let (fates, mesh) = around_one_second(&server, 5).await;
    agree(&fates, &server);
    println!("{} of {} failed", failed(&fates).len(), fates.len());
    for name in (930..=1050).step_by(10).map(|pause| format!("after-{pause}.")) {
        let lost = failed(&fates).into_iter().filter(|fate| fate.identity.starts_with(&name)).count();
        assert!(lost <= 1, "{name} {:#?}", failed(&fates));
    }
    mesh.stop().await;
}

/// Callers that reach the last request of their connections in the same round.
async fn in_rounds(server: &RealServer, rounds: usize) -> (Vec<Fate>, Mesh) {
    let mesh = Mesh::start(&outbound(server.addr, &["app".to_owned()])).await;
    let callers = Callers::start(mesh.addr("app"), "/post?ms=15", &POSTS, Duration::from_millis(2));
    callers.rounds(rounds).await;
    (callers.end().await, mesh)
}

const NGINX: &str = "worker_processes 1;
pid FOLDER/pid;
error_log FOLDER/log;
daemon off;
events { }
http {
  access_log off;
  client_body_temp_path FOLDER/body;
  proxy_temp_path FOLDER/proxy;
  fastcgi_temp_path FOLDER/fastcgi;
  uwsgi_temp_path FOLDER/uwsgi;
  scgi_temp_path FOLDER/scgi;
  server { listen 127.0.0.1:PORT; keepalive_requests 10; location / { return 200 ok; } }
}";

#[tokio::test]
async fn an_announced_close_of_nginx_loses_no_post() {
    let Some(server) = RealServer::with(Software::Nginx, &["-c", "CONFIG"], &[("CONFIG", NGINX)]).await else { return };
    let (fates, mesh) = in_rounds(&server, 100).await;
    assert!(failed(&fates).is_empty(), "{:#?}", failed(&fates));
    let connects = mesh.metric("hopguard_pool_connects_total", &[]);
    assert!(connects >= fates.len() as f64 / 10.0, "{connects} connections for {} requests", fates.len());
    mesh.stop().await;
}

#[tokio::test]
async fn an_announced_close_of_hypercorn_loses_no_post() {
    let limits = [("CONFIG", "keep_alive_max_requests = 10\n")];
    let words = ["--config", "CONFIG"];
    let Some(server) = RealServer::with(Software::Hypercorn, &words, &limits).await else { return };
    let (fates, mesh) = in_rounds(&server, 100).await;
    agree(&fates, &server);
    assert!(failed(&fates).is_empty(), "{:#?}", failed(&fates));
    mesh.stop().await;
}
