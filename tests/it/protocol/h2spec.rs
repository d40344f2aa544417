//! h2spec, the HTTP/2 conformance suite, against a cleartext listener.
//!
//! `tests/peers/h2spec-known.txt` lists the cases that fail, each with its reason. The test also fails when a listed case
//! passes, so that the list stays current.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::support::{Mesh, peer};

/// More than the tests of one run, so that a run which stopped half-way is seen.
const LEAST: usize = 140;

#[tokio::test]
async fn the_http2_listener_conforms() {
    let Some(h2spec) = peer("h2spec") else { return };
    let mut serving = JoinSet::new();
    let upstream = upstream(&mut serving).await;
    let mesh = Mesh::start(&policy(upstream)).await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let results = run(&h2spec, mesh.addr("h2"), &folder.path().join("report.xml")).await;
    mesh.stop().await;
    assert!(results.len() >= LEAST, "only {} tests ran", results.len());
    let failed: BTreeSet<&String> = results.iter().filter(|(_, failed)| **failed).map(|(name, _)| name).collect();
    let known = known();
    let unknown: Vec<_> = failed.iter().filter(|name| !known.contains_key(name.as_str())).collect();
    assert!(unknown.is_empty(), "{} of {} fail: {unknown:#?}", failed.len(), results.len());
    let stale: Vec<_> = known.keys().filter(|name| !failed.contains(name)).collect();
    assert!(stale.is_empty(), "these hold and should leave h2spec-known.txt: {stale:#?}");
}

fn policy(upstream: SocketAddr) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: conformance
accessLog: {{ mode: off }}
listeners:
  - {{ name: h2, bind: \"127.0.0.1:0\", to: upstream }}
destinations:
  - {{ name: upstream, hosts: [upstream.test], endpoints: [\"{upstream}\"], protocol: http1 }}
"
    )
}

/// A small HTTP/1 server that reads what it is sent and answers every request alike.
async fn upstream(serving: &mut JoinSet<()>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("bound");
    serving.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer));
            connections.spawn(async move { connection.await.is_ok() });
        }
    });
    addr
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let _cut = request.into_body().collect().await.is_err();
    Ok(Response::new(Full::from("an answer of some length")))
}

/// Every test by `package: title`, and whether it failed.
async fn run(h2spec: &Path, addr: SocketAddr, report: &Path) -> BTreeMap<String, bool> {
    let mut command = Command::new(h2spec);
    command.arg("--host").arg(addr.ip().to_string()).arg("--port").arg(addr.port().to_string());
    command.arg("--timeout").arg("2").arg("--junit-report").arg(report).kill_on_drop(true);
    let ended = timeout(Duration::from_secs(120), command.output()).await;
    let output = ended.expect("it ends in time").expect("it starts");
    let text = std::fs::read_to_string(report);
    results(&text.unwrap_or_else(|_| panic!("no report: {}", String::from_utf8_lossy(&output.stdout))))
}

/// Reads the few things that matter out of the report.
fn results(report: &str) -> BTreeMap<String, bool> {
    let cases = report.split("<testcase ").skip(1);
    cases
        .map(|case| {
            let name = format!("{}: {}", attribute(case, "package"), attribute(case, "classname"));
            let body = case.split("</testcase>").next().unwrap_or_default();
            (name, body.contains("<failure") || body.contains("<error"))
        })
        .collect()
}

fn attribute(tag: &str, name: &str) -> String {
    let start = format!("{name}=\"");
    let value = tag.split(start.as_str()).nth(1).and_then(|rest| rest.split('"').next());
    value.unwrap_or_default().replace("&#39;", "'").replace("&quot;", "\"").replace("&lt;", "<").replace("&amp;", "&")
}

/// `PACKAGE: TITLE = REASON`, one a line.
fn known() -> BTreeMap<String, String> {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers/h2spec-known.txt");
    let text = std::fs::read_to_string(path).expect("part of the repository");
    let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, reason) = line.split_once(" = ").expect("NAME = REASON");
            assert!(reason.len() > 20, "{name}: a reason says more than that");
            (name.trim().to_owned(), reason.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_read_out_of_the_report() {
        let report = r#"<testsuite><testcase package="http2/3.5" classname="Sends &#39;x&#39;" time="0"></testcase>
            <testcase package="http2/4" classname="b"><failure>oops</failure></testcase></testsuite>"#;
        let found = results(report);
        assert_eq!(found.get("http2/3.5: Sends 'x'"), Some(&false));
        assert_eq!(found.get("http2/4: b"), Some(&true));
    }
}
