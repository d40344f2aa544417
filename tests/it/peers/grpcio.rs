//! grpcio, the gRPC library of Python, as client and server: calls, metadata, deadlines and cancellation pass unchanged, and
//! local replies arrive as a gRPC status.

use serde_json::{Value, json};

use crate::peers::process::{Server, client};
use crate::support::upstream::nobody;
use crate::support::{Mesh, python};

/// A unary call may take half a second, `Slow` a little less; streams live longer.
fn policy(port: u64, down: u16) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: till
accessLog: {{ mode: all }}
listeners:
  - {{ name: peer, bind: \"127.0.0.1:0\", to: peer }}
  - {{ name: auto, bind: \"127.0.0.1:0\", to: auto }}
  - {{ name: down, bind: \"127.0.0.1:0\", to: down }}
defaults:
  timeouts: {{ connect: 250ms, request: 500ms, idle: 5s }}
destinations:
  - name: peer
    hosts: [peer.test]
    endpoints: [\"127.0.0.1:{port}\"]
    protocol: http2
    routes:
      - {{ name: slow, match: {{ grpc: shop.v1.Peer/Slow }}, timeouts: {{ request: 400ms }} }}
      - {{ name: large, match: {{ grpc: shop.v1.Peer/Echo }}, timeouts: {{ request: 10s }} }}
      - {{ name: streams, match: {{ grpc: shop.v1.Streams }}, stream: true }}
  - name: auto
    hosts: [auto.test]
    endpoints: [\"127.0.0.1:{port}\"]
    routes:
      - {{ name: streams, match: {{ grpc: shop.v1.Streams }}, stream: true }}
  - name: down
    hosts: [down.test]
    endpoints: [\"127.0.0.1:{down}\"]
    protocol: http2
"
    )
}

struct Till {
    python: std::path::PathBuf,
    server: Server,
    mesh: Mesh,
}

impl Till {
    /// `None` where Python is not there and need not be.
    async fn open() -> Option<Till> {
        let python = python()?;
        let server = Server::start(&python, "grpc_server.py").await;
        let mesh = Mesh::start(&policy(server.port("port"), nobody().port())).await;
        Some(Till { python, server, mesh })
    }

    async fn run(&self, listener: &str, cases: &[&str]) -> Value {
        let target = self.mesh.addr(listener).to_string();
        client(&self.python, "grpc_client.py", &target, cases).await
    }
}

#[tokio::test]
async fn calls_of_all_four_kinds_pass_with_their_metadata() {
    let Some(mut till) = Till::open().await else {
        return;
    };
    for listener in ["peer", "auto"] {
        let cases = ["unary", "empty", "client_stream", "server_stream", "both_stream"];
        let report = till.run(listener, &cases).await;
        let unary = &report["unary"];
        assert_eq!((&unary["answer"], &unary["code"]), (&json!("hello"), &json!("OK")), "{report}");
        assert_eq!(unary["initial"]["x-out"], "value 1", "{report}");
        assert_eq!(unary["initial"]["x-out-bin"], "00ff80", "{report}");
        assert_eq!(unary["trailers"]["x-trailer"], "value 1", "{report}");
        assert_eq!(unary["trailers"]["x-trailer-bin"], "00ff80", "{report}");
        assert_eq!(report["empty"]["size"], 0, "{report}");
        assert_eq!(report["client_stream"], json!({ "count": 50, "size": 50_000 }));
        assert_eq!(report["server_stream"]["count"], 100, "{report}");
        assert_eq!(report["server_stream"]["trailers"]["x-sent"], "100", "{report}");
        let wanted: Vec<String> = (0..20).map(|n| format!("re:{n}")).collect();
        assert_eq!(report["both_stream"]["answers"], json!(wanted));
    }
    let seen = till.server.report().await;
    assert_eq!(seen["calls"]["Chat"], 2, "{seen}");
    let log = till.mesh.log().join("\n");
    assert!(log.contains("shop.v1.Streams/Chat"), "{log}");
    till.mesh.stop().await;
}

#[tokio::test]
async fn streams_outlive_the_timeout_of_a_unary_call() {
    let Some(till) = Till::open().await else {
        return;
    };
    let cases = ["client_stream_long", "server_stream_long", "both_stream_long"];
    for listener in ["peer", "auto"] {
        let report = till.run(listener, &cases).await;
        assert_eq!(report["client_stream_long"], json!({ "count": 6, "size": 6 }), "{report}");
        assert_eq!(report["server_stream_long"]["messages"], json!(["0", "1", "2", "3", "4", "5"]), "{report}");
        assert!(report["server_stream_long"]["ms"].as_u64() > Some(1000), "{report}");
        assert_eq!(report["both_stream_long"]["count"], 6, "{report}");
    }
    till.mesh.stop().await;
}

#[tokio::test]
async fn the_first_message_of_a_stream_may_come_late_where_the_route_says_so() {
    let Some(till) = Till::open().await else {
        return;
    };
    for listener in ["peer", "auto"] {
        let report = till.run(listener, &["server_stream_late"]).await;
        assert_eq!(report["server_stream_late"], json!({ "messages": ["0", "1"] }), "{report}");
    }
    till.mesh.stop().await;
}

#[tokio::test]
async fn every_status_passes_with_its_message() {
    let Some(till) = Till::open().await else {
        return;
    };
    let cases = ["error_status", "error_statuses", "unknown_method", "server_stream_failing"];
    let report = till.run("peer", &cases).await;
    let status = &report["error_status"];
    assert_eq!(status["code"], "NOT_FOUND", "{report}");
    assert_eq!(status["details"], "kein Café übrig ☕ – 50%\nzweite Zeile", "{report}");
    assert_eq!(status["trailers"]["x-reason"], "as asked", "{report}");
    let codes = report["error_statuses"]["codes"].as_array().map_or(0, Vec::len);
    assert_eq!(codes, 16, "{report}");
    assert_eq!(report["error_statuses"]["codes"][13], "UNAVAILABLE", "{report}");
    assert_eq!(report["error_statuses"]["codes"][15], "UNAUTHENTICATED", "{report}");
    assert_eq!(report["unknown_method"]["code"], "UNIMPLEMENTED", "{report}");
    assert_eq!(report["unknown_method"]["details"], "Method not found!", "{report}");
    let late = &report["server_stream_failing"];
    assert_eq!(late["messages"], json!(["0", "1", "2"]), "{report}");
    assert_eq!((&late["code"], &late["details"]), (&json!("DATA_LOSS"), &json!("verloren: ß")), "{report}");
    till.mesh.stop().await;
}

#[tokio::test]
async fn the_shorter_deadline_wins_and_the_server_hears_of_it() {
    let Some(mut till) = Till::open().await else {
        return;
    };
    let report = till.run("peer", &["deadline_of_client", "deadline_of_proxy"]).await;
    let of_client = &report["deadline_of_client"];
    assert_eq!(of_client["code"], "DEADLINE_EXCEEDED", "{report}");
    assert!(of_client["ms"].as_u64() < Some(400), "{report}");
    let of_proxy = &report["deadline_of_proxy"];
    assert_eq!(of_proxy["code"], "DEADLINE_EXCEEDED", "{report}");
    let details = of_proxy["details"].as_str().unwrap_or_default();
    assert!(details.contains("400ms"), "it names the value that was reached: {report}");
    assert!(of_proxy["ms"].as_u64() < Some(2000), "{report}");
    let seen = till.server.report_when(&json!(["cancelled", "Slow", 2])).await;
    assert_eq!(seen["cancelled"]["Slow"], 2, "{seen}");
    let log = till.mesh.log().join("\n");
    assert!(log.contains("shop.v1.Peer/Slow") && log.contains("DEADLINE_EXCEEDED"), "{log}");
    let metrics = till.mesh.metrics().await;
    assert!(metrics.contains("request_timeout"), "{metrics}");
    till.mesh.stop().await;
}

#[tokio::test]
async fn cancellation_reaches_the_server() {
    let Some(mut till) = Till::open().await else {
        return;
    };
    let report = till.run("peer", &["cancel_unary", "cancel_stream"]).await;
    assert_eq!(report["cancel_unary"]["code"], "CANCELLED", "{report}");
    assert_eq!(report["cancel_stream"], json!({ "first": "first", "code": "CANCELLED" }));
    for method in ["Slow", "Hang"] {
        let seen = till.server.report_when(&json!(["cancelled", method, 1])).await;
        assert_eq!(seen["cancelled"][method], 1, "{seen}");
    }
    till.mesh.stop().await;
}

#[tokio::test]
async fn large_messages_and_many_calls_pass() {
    let Some(mut till) = Till::open().await else {
        return;
    };
    let report = till.run("peer", &["large", "large_streams", "many"]).await;
    assert_eq!(report["large"], json!({ "size": 4 << 20, "same": true }));
    assert_eq!(report["large_streams"]["sizes"], json!(vec![(1 << 20) + 3; 10]));
    assert_eq!(report["many"]["right"], 200, "{report}");
    let seen = till.server.report().await;
    assert_eq!(seen["calls"]["Echo"], 201, "{seen}");
    till.mesh.stop().await;
}

#[tokio::test]
async fn a_server_that_is_down_is_unavailable_and_never_a_deadline() {
    let Some(till) = Till::open().await else {
        return;
    };
    let report = till.run("down", &["down"]).await;
    assert_eq!(report["down"]["code"], "UNAVAILABLE", "{report}");
    let details = report["down"]["details"].as_str().unwrap_or_default();
    assert!(!details.is_empty() && !details.contains("failed to connect to all addresses"), "{report}");
    let log = till.mesh.log().join("\n");
    assert!(log.contains("UNAVAILABLE"), "{log}");
    till.mesh.stop().await;
}
