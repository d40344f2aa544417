//! Uploads by the HTTP clients of Python, Node, Go and Java and by curl, to servers that respond 413 before they have read
//! the body, and to limits of hopguard's own: each client gets the response each time.
//!
//! Two uploads of each pair; `make early-answers` (EARLY_ANSWERS=40) does forty, and prints the table with the direct path
//! beside it, where most clients see a reset now and then.

use serde_json::Value;
use tokio::process::Command;

use crate::peers::process::{Server, client};
use crate::support::http::get;
use crate::support::{Mesh, peer, python};

/// Bytes of one upload.
const UPLOAD: &str = "20971520";

fn policy(servers: &[(&str, u64)]) -> String {
    let mut listeners = String::new();
    let mut destinations = String::new();
    for (name, port) in servers {
        listeners += &format!("  - {{ name: {name}, bind: \"127.0.0.1:0\", to: {name} }}\n");
        let more = match *name {
            "rate" => "rateLimit: { requests: 1, per: 1h, burst: 1 }",
            "size" => "maxBodySize: 1MiB",
            // One failure would be seen at the next call.
            _ => "circuitBreaker: { consecutiveFailures: 1 }, retry: off",
        };
        let timeouts = "timeouts: { request: 20s }";
        destinations += &format!("  - {{ name: {name}, endpoints: [\"127.0.0.1:{port}\"], {timeouts}, {more} }}\n");
    }
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
{listeners}destinations:
{destinations}"
    )
}

/// The clients that are installed.
fn clients(go: Option<&str>) -> Vec<String> {
    let mut all: Vec<String> = ["http.client", "requests"].map(String::from).to_vec();
    all.extend(peer("curl").map(|_| "curl".to_owned()));
    all.extend(peer("node").iter().flat_map(|_| ["fetch".to_owned(), "http".to_owned()]));
    all.extend(go.map(|path| format!("go:{path}")));
    // A runtime alone cannot run a source file.
    all.extend(peer("javac").map(|_| "java".to_owned()));
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn real_clients_get_an_early_response_every_time() {
    let Some(python) = python() else { return };
    let go = peer("early-answers-go").map(|path| path.display().to_string());
    let mut command = Command::new(&python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/early_answers_servers.py")).args(&go);
    let server = Server::run(command).await;
    let running = server.ready.as_object().unwrap();
    let mut servers: Vec<_> = running.iter().map(|(name, port)| (name.as_str(), port.as_u64().unwrap())).collect();
    servers.extend([("rate", server.port("raw")), ("size", server.port("raw"))]);
    let mesh = Mesh::start(&policy(&servers)).await;
    // Uses up the rate limit.
    get(mesh.addr("rate"), "/").await;

    let asked = std::env::var("EARLY_ANSWERS").ok();
    let count = asked.as_deref().unwrap_or("2");
    let clients = clients(go.as_deref());
    let mut failures = Vec::new();
    for (name, port) in &servers {
        let wanted = serde_json::json!({ if *name == "rate" { "429" } else { "413" }: count.parse::<u64>().unwrap() });
        for one in &clients {
            let through = run(&python, &format!("http://{}/", mesh.addr(name)), count, one).await;
            if asked.is_some() {
                let is_own = ["rate", "size"].contains(name);
                let direct = if is_own { Value::Null } else { run(&python, &direct(*port), count, one).await };
                println!("{name:9} {:12} direct {direct} through hopguard {through}", one.split(':').next().unwrap());
            }
            if through != wanted {
                failures.push(format!("{one} to {name}: {through}"));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(mesh.count("upstream_reset") + mesh.count("circuit_open") + mesh.count("upstream_cut"), 0.0);
}

fn direct(port: u64) -> String {
    format!("http://127.0.0.1:{port}/")
}

/// What the client got, how often.
async fn run(python: &std::path::Path, url: &str, count: &str, one: &str) -> Value {
    let report = client(python, "early_answers_clients.py", url, &[UPLOAD, count, one]).await;
    report[one.split(':').next().unwrap()].clone()
}
