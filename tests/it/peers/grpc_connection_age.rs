//! gRPC servers as their libraries ship them: connections that end by age (`max_connection_age`), and PINGs, which they count.
//!
//! grpcio, grpc-go and grpc-java announce the end by two GOAWAYs, as hyper (and so tonic) does; grpc-js sends one, without a
//! warning. After the grace time they cut what is left, each in another way.

use std::path::Path;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use crate::peers::process::Server;
use crate::support::http::{Caller, Speaks, feed, full, grpc_request, with_trailers};
use crate::support::upstream::Upstream;
use crate::support::{Mesh, missing, python};

/// The age of a connection, and what calls have beyond it, in milliseconds.
const AGE: u64 = 1000;
const GRACE: u64 = 300;

/// How long the load lasts: three ages.
const LOAD: Duration = Duration::from_millis(3 * AGE + 500);

/// A server of `tests/peers/grpc`; `None` where it is not installed.
async fn server(language: &str, age: u64) -> Option<Server> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let peers = root.join("target/peers").join(format!("grpc-{language}"));
    let mut command = match language {
        "python" => {
            let mut command = Command::new(python()?);
            command.arg(root.join("tests/peers/grpc/server.py"));
            command
        }
        _ if !peers.join("stamp").is_file() => {
            return missing(&format!("grpc-{language}"), "scripts/peers installs it");
        }
        "go" => Command::new(peers.join("server")),
        "js" => {
            let mut command = Command::new("node");
            command.arg(peers.join("server.js"));
            command
        }
        _ => {
            let mut command = Command::new("java");
            let classes = format!("{}:{}", peers.join("jars/*").display(), peers.join("classes").display());
            command.args(["-cp", &classes, "GrpcPeer"]);
            command
        }
    };
    command.args([age.to_string(), GRACE.to_string()]);
    Some(Server::run(command).await)
}

fn policy(port: u64) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", to: app }}
destinations:
  - name: app
    endpoints: [\"127.0.0.1:{port}\"]
    protocol: http2
    circuitBreaker: off
    timeouts: {{ connect: 5s, request: 5s }}
    routes:
      - {{ name: watch, match: {{ grpc: age.Age/Watch }}, stream: true }}
      - {{ name: never, match: {{ grpc: age.Age/Never }}, timeouts: {{ connect: 200ms, request: 200ms }}, retry: off }}
"
    )
}

fn call(method: &str, text: &str) -> Request<crate::support::http::Body> {
    let length = u32::try_from(text.len()).unwrap().to_be_bytes();
    grpc_request(&format!("/age.Age/{method}"), full([&[0][..], &length, text.as_bytes()].concat()))
}

/// Unary calls of several callers for three ages; returns how many there were, and the failed ones.
async fn load(mesh: &Mesh) -> (usize, Vec<(String, String)>) {
    let to = mesh.addr("in");
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..8 {
        callers.spawn(async move {
            let (began, mut failed) = (Instant::now(), Vec::new());
            let mut connection = Caller::open(Speaks::Http2, to).await;
            for number in 0.. {
                if began.elapsed() > LOAD {
                    return (number, failed);
                }
                let name = format!("{caller}-{number}");
                let answer = connection.ask(call("Unary", &name)).await;
                if answer.grpc_status() != "0" {
                    failed.push((name, format!("{answer:?}")));
                }
                sleep(Duration::from_millis(2)).await;
            }
            unreachable!("the load ends")
        });
    }
    let results = callers.join_all().await;
    (results.iter().map(|(calls, _)| calls).sum(), results.into_iter().flat_map(|(_, failed)| failed).collect())
}

async fn no_call_is_lost(language: &str) {
    let Some(mut server) = server(language, AGE).await else { return };
    let mesh = Mesh::start(&policy(server.port("port"))).await;
    let (calls, failed) = load(&mesh).await;
    let report = server.report().await;
    let seen: Vec<&str> = report["seen"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let lost: Vec<_> = failed.iter().filter(|(name, _)| !seen.contains(&name.as_str())).collect();
    assert!(lost.is_empty(), "{} of {calls} calls did not reach the server: {lost:#?}", lost.len());
    assert!(failed.is_empty(), "{} of {calls} calls failed: {failed:#?}", failed.len());
    let connects = mesh.metric("hopguard_pool_connects_total", &["app"]);
    assert!(connects >= 3.0, "connections end by age: {connects} in {calls} calls");
    mesh.stop().await;
}

async fn a_cut_stream_names_the_upstream(language: &str) {
    let Some(server) = server(language, AGE).await else { return };
    let mesh = Mesh::start(&policy(server.port("port"))).await;
    assert_cut_by_the_upstream(&mesh).await;
    drop(server);
}

async fn assert_cut_by_the_upstream(mesh: &Mesh) {
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    let answer = caller.ask(call("Watch", "x")).await;
    assert_eq!(answer.grpc_status(), "14", "{answer:?}");
    let trailers = answer.trailers.unwrap();
    let message = trailers["grpc-message"].to_str().unwrap();
    assert!(message.starts_with("hopguard upstream_cut: the upstream broke off its response"), "{message}");
    let line = mesh.only("upstream_cut").await;
    assert_eq!((&line["destination"], &line["grpc_status"]), (&"app".into(), &"UNAVAILABLE".into()), "{line}");
}

/// grpcio ends a stream with a status of its own, which passes.
#[tokio::test]
async fn a_stream_cut_by_grpcio_has_the_status_of_grpcio() {
    let Some(server) = server("python", AGE).await else { return };
    let mesh = Mesh::start(&policy(server.port("port"))).await;
    let answer = Caller::open(Speaks::Http2, mesh.addr("in")).await.ask(call("Watch", "x")).await;
    assert_eq!(answer.grpc_status(), "14", "{answer:?}");
    let line = mesh.only("grpc_error").await;
    assert_eq!(
        (&line["grpc_status"], &line["grpc_message"]),
        (&"UNAVAILABLE".into(), &"max connection age".into()),
        "{line}"
    );
}

/// Calls that time out one after the other, first with answers in between, then without.
async fn slow_calls_cause_no_storm_of_pings(language: &str) {
    let Some(server) = server(language, 0).await else { return };
    let mesh = Mesh::start(&policy(server.port("port"))).await;
    let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
    for _ in 0..6 {
        assert_eq!(caller.ask(call("Unary", "x")).await.grpc_status(), "0");
        assert_eq!(caller.ask(call("Never", "x")).await.grpc_status(), "4");
    }
    for _ in 0..12 {
        assert_eq!(caller.ask(call("Never", "x")).await.grpc_status(), "4");
    }
    assert_eq!(caller.ask(call("Unary", "x")).await.grpc_status(), "0");
    mesh.ended("ok", 7).await;
    mesh.ended("request_timeout", 18).await;
    assert!(!mesh.log().join("\n").contains("ENHANCE_YOUR_CALM"), "{:#?}", mesh.log());
    mesh.stop().await;
}

macro_rules! with_servers {
    ($($name:ident: $language:literal, $test:ident;)+) => {
        $(#[tokio::test]
        async fn $name() {
            $test($language).await;
        })+
    };
}

with_servers! {
    the_age_of_a_connection_of_grpcio_loses_no_call: "python", no_call_is_lost;
    the_age_of_a_connection_of_grpc_go_loses_no_call: "go", no_call_is_lost;
    the_age_of_a_connection_of_grpc_java_loses_no_call: "java", no_call_is_lost;
    the_age_of_a_connection_of_grpc_js_loses_no_call: "js", no_call_is_lost;
    a_stream_cut_by_grpc_go_names_the_upstream: "go", a_cut_stream_names_the_upstream;
    a_stream_cut_by_grpc_java_names_the_upstream: "java", a_cut_stream_names_the_upstream;
    a_stream_cut_by_grpc_js_names_the_upstream: "js", a_cut_stream_names_the_upstream;
    slow_calls_do_not_make_grpcio_count_pings: "python", slow_calls_cause_no_storm_of_pings;
    slow_calls_do_not_make_grpc_go_count_pings: "go", slow_calls_cause_no_storm_of_pings;
    slow_calls_do_not_make_grpc_java_count_pings: "java", slow_calls_cause_no_storm_of_pings;
}

/// A server like tonic's: hyper, which ends each connection gracefully at its age and cuts it after the grace time.
async fn hyper_server() -> Upstream {
    Upstream::bytes(|stream| async move {
        let service = service_fn(|request: Request<Incoming>| async move {
            let body = if request.uri().path().ends_with("Watch") {
                let (ticks, body) = feed();
                tokio::spawn(async move {
                    while ticks.send(&b"\0\0\0\0\0"[..]).await {
                        sleep(Duration::from_millis(50)).await;
                    }
                });
                body
            } else {
                sleep(Duration::from_millis(20)).await;
                with_trailers(&b"\0\0\0\0\0"[..], &[("grpc-status", "0")])
            };
            Ok::<_, std::convert::Infallible>(
                Response::builder().header("content-type", "application/grpc").body(body).unwrap(),
            )
        });
        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
        tokio::select! {
            _ended = &mut connection => return,
            () = sleep(Duration::from_millis(AGE)) => connection.as_mut().graceful_shutdown(),
        }
        let _over = tokio::time::timeout(Duration::from_millis(GRACE), connection).await;
    })
    .await
}

#[tokio::test]
async fn the_age_of_a_connection_of_hyper_loses_no_call_and_a_cut_stream_names_the_upstream() {
    let upstream = hyper_server().await;
    let mesh = Mesh::start(&policy(upstream.addr.port().into())).await;
    let (calls, failed) = load(&mesh).await;
    assert!(failed.is_empty(), "{} of {calls} calls failed: {failed:#?}", failed.len());
    assert!(upstream.connections() >= 3, "{}", upstream.connections());
    assert_cut_by_the_upstream(&mesh).await;
    mesh.stop().await;
}
