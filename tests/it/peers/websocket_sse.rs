//! WebSocket and server-sent events between well-known Python libraries, for longer than the request timeout.

use serde_json::{Value, json};

use crate::peers::process::{Server, client};
use crate::support::{Mesh, python};

fn policy(ws: u64, sse: u64) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: ws, bind: \"127.0.0.1:0\", to: ws }}
  - {{ name: sse, bind: \"127.0.0.1:0\", to: sse }}
defaults:
  timeouts: {{ connect: 250ms, request: 500ms, idle: 3s }}
destinations:
  - {{ name: ws, hosts: [ws.test], endpoints: [\"127.0.0.1:{ws}\"] }}
  - {{ name: sse, hosts: [sse.test], endpoints: [\"127.0.0.1:{sse}\"] }}
"
    )
}

struct Shop {
    python: std::path::PathBuf,
    server: Server,
    mesh: Mesh,
}

impl Shop {
    /// `None` where Python is not there and need not be.
    async fn open() -> Option<Shop> {
        let python = python()?;
        let server = Server::start(&python, "streams_server.py").await;
        let mesh = Mesh::start(&policy(server.port("ws"), server.port("sse"))).await;
        Some(Shop { python, server, mesh })
    }

    async fn run(&self, listener: &str, cases: &[&str]) -> Value {
        let target = self.mesh.addr(listener).to_string();
        client(&self.python, "streams_client.py", &target, cases).await
    }
}

#[tokio::test]
async fn a_websocket_lives_longer_than_a_request_and_closes_in_order() {
    let Some(mut shop) = Shop::open().await else {
        return;
    };
    let report = shop.run("ws", &["ws_long", "ws_large", "ws_closed_by_server", "ws_many"]).await;
    let long = &report["ws_long"];
    let wanted: Vec<String> = (0..6).map(|n| format!("message {n}")).collect();
    assert_eq!(long["answers"], json!(wanted), "{report}");
    assert_eq!((&long["subprotocol"], &long["close"]), (&json!("chat"), &json!(1000)), "{report}");
    assert!(long["ms"].as_u64() > Some(1000), "{report}");
    assert_eq!(report["ws_large"], json!({ "whole": true, "fragments": true }));
    assert_eq!(report["ws_closed_by_server"], json!({ "code": 4001, "reason": "as asked" }));
    assert_eq!(report["ws_many"]["right"], 50, "{report}");
    let seen = shop.server.report_when(&json!(["closed", 52])).await;
    let codes = seen["closed"].as_array().expect("a list");
    assert!(codes.len() == 52 && codes.iter().all(|code| *code == 1000), "{seen}");
    shop.mesh.stop().await;
}

#[tokio::test]
async fn events_pass_one_by_one_for_longer_than_a_request() {
    let Some(mut shop) = Shop::open().await else {
        return;
    };
    let report = shop.run("sse", &["sse_long", "sse_quick"]).await;
    let long = &report["sse_long"];
    let wanted: Vec<[String; 2]> = (0..6).map(|n| [n.to_string(), format!("event {n}")]).collect();
    assert_eq!(long["events"], json!(wanted), "{report}");
    assert_eq!((&long["status"], &long["type"]), (&json!(200), &json!("text/event-stream")), "{report}");
    assert!(long["ms"].as_u64() > Some(1000), "{report}");
    assert_eq!(report["sse_quick"]["events"].as_array().map(Vec::len), Some(50), "{report}");
    assert_eq!(shop.server.report().await["last_event_id"], "41");
    shop.mesh.stop().await;
}

#[tokio::test]
async fn a_server_of_events_hears_that_its_client_has_left() {
    let Some(mut shop) = Shop::open().await else {
        return;
    };
    let report = shop.run("sse", &["sse_left"]).await;
    assert_eq!(report["sse_left"]["events"].as_array().map(Vec::len), Some(2), "{report}");
    let seen = shop.server.report_when(&json!(["left", 1])).await;
    assert_eq!(seen["left"], 1, "{seen}");
    shop.mesh.stop().await;
}
