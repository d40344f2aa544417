//! Real servers that are stopped in their documented graceful way, behind an inbound listener, while callers use them.

use std::collections::HashSet;
use std::time::Duration;

use hyper::Method;

use crate::peers::callers::{Callers, Fate, agree};
use crate::peers::real_server::{RealServer, Software};
use crate::support::Mesh;

/// Between the rounds of the callers.
pub(crate) const PAUSE: Duration = Duration::from_millis(20);
/// The app works for a while, so that all callers of a round have a connection of their own.
pub(crate) const PATH: &str = "/work?ms=15";

/// One listener and one destination, the app, with built-in values.
pub(crate) fn policy(server: &RealServer, direction: &str) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", to: app, direction: {direction} }}
destinations:
  - {{ name: app, endpoints: [\"{}\"] }}
",
        server.addr
    )
}

/// Four GET and four POST in each round.
pub(crate) fn mixed() -> Vec<Method> {
    [Method::GET, Method::POST].into_iter().cycle().take(8).collect()
}

/// Requests that are lost because a connection was used again.
fn lost(fates: &[Fate], method: &Method) -> Vec<Fate> {
    // A request on a fresh connection that the server resets is lost directly, too.
    let by_reuse = |fate: &&Fate| fate.lost() && !fate.details.contains("over a new connection");
    fates.iter().filter(|fate| fate.method == *method).filter(by_reuse).cloned().collect()
}

/// What the callers of a server saw that got SIGTERM, until the app refused requests of both methods. Returns in how many
/// rounds a GET was lost: the callers of a round send at the same moment, when none can know yet what becomes of the others.
async fn stopped(software: Software) -> Option<usize> {
    let mut server = RealServer::start(software).await?;
    let mesh = Mesh::start(&policy(&server, "inbound")).await;
    let callers = Callers::start(mesh.addr("in"), PATH, &mixed(), PAUSE);
    callers.rounds(10).await;
    server.signal("TERM").await;
    for method in [Method::GET, Method::POST] {
        callers.refused(&method, 4).await;
    }
    let fates = callers.end().await;
    server.ended().await;
    agree(&fates, &server);
    assert_eq!(lost(&fates, &Method::POST).len(), 0, "{software:?}: {:#?}", lost(&fates, &Method::POST));
    let gets = lost(&fates, &Method::GET);
    println!("{software:?}: {} of {} calls lost: {gets:#?}", gets.len(), fates.len());
    mesh.stop().await;
    let rounds: HashSet<_> = gets.iter().filter_map(|fate| fate.identity.rsplit('.').next()).collect();
    Some(rounds.len())
}

#[tokio::test]
async fn a_stop_of_gunicorn_loses_gets_of_one_moment_at_most_and_no_post() {
    assert!(stopped(Software::Gunicorn).await.is_none_or(|rounds| rounds <= 1));
}

#[tokio::test]
async fn a_stop_of_uvicorn_loses_gets_of_one_moment_at_most_and_no_post() {
    assert!(stopped(Software::Uvicorn).await.is_none_or(|rounds| rounds <= 1));
}

/// hypercorn listens on during its stop, and resets the connections that it has not accepted.
#[tokio::test]
async fn a_stop_of_hypercorn_loses_gets_of_one_moment_at_most_and_no_post() {
    assert!(stopped(Software::Hypercorn).await.is_none_or(|rounds| rounds <= 1));
}

#[tokio::test]
async fn a_stop_of_go_loses_gets_of_one_moment_at_most_and_no_post() {
    assert!(stopped(Software::Go).await.is_none_or(|rounds| rounds <= 1));
}

/// `server.close()` serves busy persistent connections on, so that the process ends only after its clients have left.
#[tokio::test]
async fn a_stop_of_node_loses_gets_of_one_moment_at_most_and_no_post_and_the_process_ends() {
    assert!(stopped(Software::Node).await.is_none_or(|rounds| rounds <= 1));
}
