//! gRPC servers that end a connection by GOAWAY once a second (`max_connection_age`), and then by force once the grace time has passed.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::peers::real_server::{RealServer, Software};
use crate::support::Mesh;
use crate::support::http::{Answer, Caller, Speaks, full, grpc_request};

const AGE: (&str, &str) = ("MAX_AGE", "1000");
/// Three ages and a little more.
const LOAD: Duration = Duration::from_millis(3500);

fn policy(server: &RealServer, direction: &str) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", to: app, direction: {direction} }}
destinations:
  - name: app
    endpoints: [\"{}\"]
    routes:
      - {{ name: events, match: {{ grpc: peer.Peer/Events }}, stream: true }}
",
        server.addr
    )
}

fn message(text: &str) -> Vec<u8> {
    let mut framed = vec![0];
    framed.extend_from_slice(&u32::try_from(text.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(text.as_bytes());
    framed
}

/// Unary calls of eight callers for three ages of the upstream connection.
async fn unary_calls(mesh: &Mesh) -> Vec<Answer> {
    let to = mesh.addr("in");
    let mut callers = JoinSet::new();
    for _ in 0..8 {
        callers.spawn(async move {
            let (mut caller, begun, mut answers) = (Caller::open(Speaks::Http2, to).await, Instant::now(), Vec::new());
            while begun.elapsed() < LOAD {
                answers.push(caller.ask(grpc_request("/peer.Peer/Unary", full(message("5")))).await);
                sleep(Duration::from_millis(3)).await;
            }
            answers
        });
    }
    callers.join_all().await.into_iter().flatten().collect()
}

async fn no_call_is_lost(software: Software) {
    for direction in ["inbound", "outbound"] {
        let Some(server) = RealServer::with(software, &[], &[AGE]).await else { return };
        let mesh = Mesh::start(&policy(&server, direction)).await;
        let answers = unary_calls(&mesh).await;
        let failed: Vec<_> = answers.iter().filter(|answer| answer.grpc_status() != "0").collect();
        assert!(failed.is_empty(), "{software:?} {direction}: {} of {}: {failed:#?}", failed.len(), answers.len());
        let connects = mesh.metric("hopguard_pool_connects_total", &[]);
        assert!(connects >= 3.0, "{software:?}: the server has ended no connection: {connects} opened");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn the_connection_age_of_grpcio_loses_no_call() {
    no_call_is_lost(Software::Grpcio).await;
}

#[tokio::test]
async fn the_connection_age_of_grpc_go_loses_no_call() {
    no_call_is_lost(Software::GrpcGo).await;
}

/// The trailers of a stream that lives longer than age and grace together, which the server cuts.
async fn cut_stream(software: Software) -> Option<(String, Mesh)> {
    let server = RealServer::with(software, &[], &[AGE, ("MAX_GRACE", "300")]).await?;
    let mesh = Mesh::start(&policy(&server, "inbound")).await;
    let request = grpc_request("/peer.Peer/Events", full(message("100 100")));
    let answer = Caller::open(Speaks::Http2, mesh.addr("in")).await.ask(request).await;
    assert_eq!(answer.grpc_status(), "14", "{software:?}: {answer:?}");
    let trailers = answer.trailers.unwrap_or_default();
    let said = trailers.get("grpc-message").map_or("", |value| value.to_str().unwrap()).to_owned();
    Some((said, mesh))
}

/// grpcio cuts with a gRPC status of its own, which passes.
#[tokio::test]
async fn the_status_with_which_grpcio_cuts_a_stream_passes() {
    let Some((said, mesh)) = cut_stream(Software::Grpcio).await else { return };
    assert_eq!(said, "max connection age");
    mesh.only("grpc_error").await;
    mesh.stop().await;
}

/// grpc-go closes the connection: the status of hopguard says that the upstream has cut the stream.
#[tokio::test]
async fn a_stream_that_grpc_go_cuts_ends_with_a_status_that_names_the_upstream() {
    let Some((said, mesh)) = cut_stream(Software::GrpcGo).await else { return };
    assert!(said.contains("upstream_cut: the upstream"), "{said}");
    let line = mesh.only("upstream_cut").await;
    assert_eq!(line["destination"], "app", "{line}");
    mesh.stop().await;
}
