//! The access log: which exchanges have a line, its fields, escaping of client input, and a log that cannot be written.

use std::net::SocketAddr;
use std::process::Stdio;

use hyper::{Request, Response};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;

use crate::support::http::{Caller, Http1, Speaks, ask, empty, full, get, grpc_request, request, with_trailers};
use crate::support::program::{Program, hopguard};
use crate::support::upstream::{Upstream, nobody, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, SOON, eventually};

/// An upstream that answers with the status that the path names.
async fn statuses() -> Upstream {
    Upstream::http1(|request: Request<hyper::body::Incoming>| async move {
        let status = request.uri().path()[1..].parse::<u16>().unwrap_or(200);
        Response::builder().status(status).body(full("hello")).unwrap()
    })
    .await
}

async fn outcomes(mode: &str) -> Vec<String> {
    let upstream = statuses().await;
    let mesh = Mesh::start(&policy(upstream.addr, "").replace("mode: all", mode)).await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    for path in ["/200", "/404", "/500", "/302", "/503", "/200"] {
        caller.ask(request("GET", path).body(empty()).unwrap()).await;
    }
    mesh.ended("server_error", 2).await;
    mesh.ended("ok", 3).await;
    let lines = mesh.log();
    mesh.stop().await;
    lines.iter().map(|line| serde_json::from_str::<Value>(line).unwrap()["status"].to_string()).collect()
}

#[tokio::test]
async fn the_mode_says_which_exchanges_are_written() {
    assert_eq!(outcomes("mode: all").await, ["200", "404", "500", "302", "503", "200"]);
    assert_eq!(outcomes("mode: errors").await, ["500", "503"]);
    assert_eq!(outcomes("mode: \"off\"").await, [""; 0]);
    assert_eq!(outcomes("mode: sampled, ratio: 1.0").await.len(), 6);
}

#[tokio::test]
async fn a_sample_is_about_as_large_as_its_share() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "").replace("mode: all", "mode: sampled, ratio: 0.2")).await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    for _ in 0..500 {
        caller.ask(request("GET", "/").body(empty()).unwrap()).await;
    }
    mesh.ended("ok", 500).await;
    let lines = mesh.log().len();
    assert!((40..=180).contains(&lines), "{lines} of 500 with a ratio of 0.2");
    mesh.stop().await;
}

#[tokio::test]
async fn a_changed_mode_holds_after_the_reload() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "").replace("mode: all", "mode: errors")).await;
    let mut caller = Http1::open(mesh.addr("in")).await;
    caller.ask(request("GET", "/1").body(empty()).unwrap()).await;
    mesh.reload(&policy(upstream.addr, "")).await;
    caller.ask(request("GET", "/2").body(empty()).unwrap()).await;
    mesh.ended("ok", 2).await;
    eventually(|| (!mesh.log().is_empty()).then_some(())).await;
    assert_eq!(mesh.line("ok")["path"], "/2");
    mesh.stop().await;
}

#[tokio::test]
async fn a_line_has_what_the_documentation_promises() {
    let upstream = statuses().await;
    let mesh = Mesh::start(&policy(upstream.addr, "    protocol: http1")).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let asked = Request::post("/201?card=4111").header("host", "shop.test:8080");
    let asked = asked.header("traceparent", format!("00-{trace}-00f067aa0ba902b7-01"));
    ask(mesh.addr("in"), asked.body(full("12345")).unwrap()).await;
    let line = mesh.only("ok").await;
    for (field, wanted) in [
        ("method", "POST"),
        ("host", "shop.test:8080"),
        ("path", "/201"),
        ("destination", "app"),
        ("route", "default"),
        ("direction", "inbound"),
        ("protocol", "http1"),
        ("trace_id", trace),
        ("connection", "new"),
    ] {
        assert_eq!(line[field], wanted, "{field} in {line}");
    }
    let numbers = [("status", 201), ("bytes_in", 5), ("bytes_out", 5), ("attempt", 1), ("attempts", 3)];
    assert!(numbers.iter().all(|(field, wanted)| line[field] == *wanted), "{line}");
    let duration = line["duration_ms"].as_f64().unwrap();
    for part in ["first_byte_ms", "upstream_ms", "connect_ms", "overhead_ms"] {
        assert!(line[part].as_f64().is_some_and(|part| part >= 0.0 && part <= duration), "{part} in {line}");
    }
    assert!(line["time"].as_str().is_some_and(|time| time.ends_with('Z') && time.len() == 24), "{line}");
    for absent in ["queue_ms", "grpc_status", "grpc_message", "refusal", "connection_age_ms"] {
        assert!(line.get(absent).is_none(), "{absent} in {line}");
    }
    assert!(!line.to_string().contains("4111"), "queries are not written");
    mesh.stop().await;
}

#[tokio::test]
async fn a_refusal_leaves_out_what_it_does_not_have() {
    let gone = nobody();
    let mesh = Mesh::start(&policy(gone, "")).await;
    get(mesh.addr("in"), "/").await;
    let refusal = mesh.only("connect_failed").await["refusal"].clone();
    let fields = refusal.as_object().unwrap();
    assert!(
        fields.values().all(|value| value != "" && !value.is_null()),
        "a field without a value is left out: {refusal}"
    );
    assert!(fields.contains_key("detail") && fields.contains_key("closed_by"), "{refusal}");
    mesh.stop().await;
}

#[tokio::test]
async fn no_caller_can_write_lines_of_its_own() {
    let upstream = Upstream::fixed("hello").await;
    for format in ["json", "text"] {
        let text = policy(upstream.addr, "").replace("mode: all", &format!("mode: all, format: {format}"));
        let mesh = Mesh::start(&text).await;
        for target in ["/a%0A%22,\"evil\":1", "/\"}{\"", "/%1b[31mred", "/back\\slash"] {
            let mut wire = Wire::open(mesh.addr("in")).await;
            wire.send(format!(
                "GET {target} HTTP/1.1\r\nhost: a\r\nconnection: close\r\nuser-agent: \u{e9}\"\t\r\n\r\n"
            ))
            .await;
            wire.rest().await;
        }
        eventually(|| (mesh.log().len() >= 4).then_some(())).await;
        for line in mesh.log() {
            assert!(!line.chars().any(char::is_control), "{line:?}");
            assert!(!line.contains("\"evil\":1"), "{line}");
            assert!(format == "text" || serde_json::from_str::<Value>(&line).is_ok(), "{line}");
        }
        assert_eq!(mesh.log().len(), 4);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn grpc_can_be_read() {
    let upstream = Upstream::http2(|_| async {
        let body = with_trailers(
            &b"\0\0\0\0\0"[..],
            &[("grpc-status", "14"), ("grpc-message", "bank is down%0Aand out %22now%22")],
        );
        Response::builder().header("content-type", "application/grpc").body(body).unwrap()
    })
    .await;
    for format in ["json", "text"] {
        let text = policy(upstream.addr, "").replace("mode: all", &format!("mode: errors, format: {format}"));
        let mesh = Mesh::start(&text).await;
        let mut caller = Caller::open(Speaks::Http2, mesh.addr("in")).await;
        let answer = caller.ask(grpc_request("/shop.Payment/Charge", full(&b"\0\0\0\0\0"[..]))).await;
        assert_eq!(answer.grpc_status(), "14");
        mesh.ended("grpc_error", 1).await;
        let line = eventually(|| mesh.log().first().cloned()).await;
        if format == "json" {
            let line: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(
                (&line["grpc_status"], &line["path"]),
                (&"UNAVAILABLE".into(), &"/shop.Payment/Charge".into()),
                "{line}"
            );
            assert_eq!(line["grpc_message"], "bank is down\nand out \"now\"", "{line}");
        } else {
            assert!(line.contains(" shop.Payment/Charge UNAVAILABLE \"bank is down"), "{line}");
            assert!(line.contains("attempt 1/3") && line.contains("->app/default"), "{line}");
        }
        mesh.stop().await;
    }
}

/// A log that cannot be written costs lines and nothing else.
#[tokio::test]
async fn a_full_disk_costs_log_lines_and_no_call() {
    let upstream = Upstream::http1(|_| async { Response::new(full("ok")) }).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.yaml");
    std::fs::write(&file, policy(upstream.addr, "")).unwrap();
    let policy = file.to_str().unwrap();
    let command =
        hopguard(&["run", "--policy", policy, "--admin", "127.0.0.1:0", "--log-format", "json", "--workers", "1"]);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut program = Program::writing_to(command, full.into()).await;
    let addr = program.addr("in").await.unwrap();
    let mut calls = 0;
    while program.metric("hopguard_access_log_write_errors_total", &[]).await == 0.0 {
        assert!(calls < 1000, "nobody notices that the disk is full");
        assert_eq!(crate::support::http::get(addr, "/").await.status, 200);
        calls += 1;
    }
    assert_eq!(crate::support::http::get(addr, "/").await.status, 200);
    assert_eq!(program.metric("hopguard_requests_total", &["outcome=\"ok\""]).await, f64::from(calls + 1));
    program.signal("TERM").await;
    assert_eq!(program.ended(std::time::Duration::from_secs(10)).await.code(), Some(0));
}

/// Nobody reads the program's own log any more once the pipe that it goes to is full.
#[tokio::test]
async fn a_log_that_nobody_reads_costs_its_lines_and_no_call() {
    let upstream = Upstream::http2(|_| async { Response::new(full("ok")) }).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.yaml");
    std::fs::write(&file, policy(upstream.addr, "    protocol: http2")).unwrap();
    let mut command = hopguard(&["run", "--policy", file.to_str().unwrap(), "--admin", "127.0.0.1:0", "--drain-delay"]);
    // HTTP/2 has much to say there.
    command.args(["0s", "--workers", "1", "--log-format", "json", "--log", "debug"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let admin = loop {
        let line = timeout(SOON, log.next_line()).await.expect("it does not start").unwrap().expect("it has ended");
        let line: Value = serde_json::from_str(&line).unwrap();
        if line["message"] == "ready" {
            break line["admin"].as_str().unwrap().parse().unwrap();
        }
    };
    let status: Value = serde_json::from_slice(&get(admin, "/status").await.body).unwrap();
    let to = status["listeners"][0]["address"].as_str().unwrap().parse().unwrap();
    let mut caller = timeout(SOON, Caller::open(Speaks::Http2, to)).await.expect("no connection");
    while dropped_after_calls(&mut caller, admin).await == 0 {}
    // What has found room is written as soon as somebody reads, and what is said from then on, up to the last line.
    let reading = tokio::spawn(async move {
        let mut last = String::new();
        while let Some(line) = log.next_line().await.unwrap() {
            last = line;
        }
        last
    });
    while dropped_after_calls(&mut caller, admin).await != dropped_after_calls(&mut caller, admin).await {}
    let id = child.id().expect("it runs").to_string();
    assert!(tokio::process::Command::new("kill").arg(id).status().await.unwrap().success());
    let last = timeout(SOON, reading).await.expect("it does not end").unwrap();
    assert!(last.contains("stopped; all calls had finished"), "{last}");
    assert_eq!(child.wait().await.unwrap().code(), Some(0));
}

/// Makes some calls and returns how many lines of the program's own log are lost by now.
async fn dropped_after_calls(caller: &mut Caller, admin: SocketAddr) -> u64 {
    for _ in 0..20 {
        let asked = request("GET", "/").body(empty()).unwrap();
        assert_eq!(timeout(SOON, caller.ask(asked)).await.expect("a call is held up").status, 200);
    }
    let page = timeout(SOON, get(admin, "/metrics")).await.expect("the admin door is held up").body;
    let page = String::from_utf8_lossy(&page).into_owned();
    let dropped = page.lines().find_map(|line| line.strip_prefix("hopguard_log_dropped_total "));
    dropped.map_or(0, |lines| lines.parse().unwrap())
}
