//! Drain: signals and the admin port start it, calls in flight finish within the grace time, and clients are told to close.

use std::net::SocketAddr;
use std::time::Duration;

use hyper::Request;
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::support::http::{Caller, Http1, Speaks, empty, get, request};
use crate::support::program::Program;
use crate::support::upstream::{Gate, Upstream, policy};
use crate::support::wire::Wire;
use crate::support::{SOON, eventually};

pub(super) struct Site {
    _folder: TempDir,
    pub(super) file: std::path::PathBuf,
    upstream: Upstream,
    gate: Gate,
}

impl Site {
    /// An upstream that holds up what is asked for below `/slow`.
    pub(super) async fn open() -> Self {
        let gate = Gate::closed();
        let upstream = Upstream::gated("done", &gate).await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.yaml");
        let more = "    protocol: http1\n    timeouts: { request: 20s }";
        std::fs::write(&file, policy(upstream.addr, more)).unwrap();
        Self { _folder: folder, file, upstream, gate }
    }
}

/// Reads frames of HTTP/2 until one of this type comes.
async fn frame(wire: &mut Wire, wanted: u8) {
    let read = async {
        loop {
            let mut head = [0; 9];
            wire.stream.read_exact(&mut head).await.expect("closed before the frame came");
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            wire.stream.read_exact(&mut vec![0; length as usize]).await.unwrap();
            if head[3] == wanted {
                return;
            }
        }
    };
    timeout(SOON, read).await.unwrap_or_else(|_| panic!("no frame of type {wanted}"));
}

const GOAWAY: u8 = 7;
const SETTINGS: u8 = 4;

async fn drains_after(signal: Option<&str>) {
    let site = Site::open().await;
    let mut program = Program::run(&site.file, &["--drain-delay", "2s", "--grace", "15s"]).await;
    let to = program.addr("in").await.unwrap();
    let (mut idle, mut busy) = (Http1::open(to).await, Caller::open(Speaks::Http2, to).await);
    assert_eq!(idle.ask(request("GET", "/").body(empty()).unwrap()).await.body, "done");
    let mut frames = Wire::open(to).await;
    frames.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    frame(&mut frames, SETTINGS).await;
    let slow = || Request::get("/slow").body(empty()).unwrap();
    let over_http1 = tokio::spawn(async move { get(to, "/slow").await });
    let over_http2 = tokio::spawn(async move { busy.ask(slow()).await });
    eventually(|| (site.upstream.requests() == 3).then_some(())).await;
    match signal {
        Some(signal) => program.signal(signal).await,
        None => assert_eq!(program.drain().await.status, 202),
    }
    program.said("draining").await;
    let ready = program.get("/ready").await;
    assert_eq!(ready.status, 503);
    assert!(String::from_utf8_lossy(&ready.body).contains("drain"), "{ready:?}");
    assert_eq!(program.get("/live").await.status, 200);
    if signal != Some("INT") {
        let last = idle.ask(request("GET", "/").body(empty()).unwrap()).await;
        assert_eq!((last.status.as_u16(), last.header("connection")), (200, "close"), "{last:?}");
    }
    frame(&mut frames, GOAWAY).await;
    drop(frames);
    site.gate.release(2);
    let (first, second) = (over_http1.await.unwrap(), over_http2.await.unwrap());
    assert_eq!((&first.body[..], first.header("connection")), (&b"done"[..], "close"));
    assert_eq!(second.body, "done");
    let status = program.ended(Duration::from_secs(10)).await;
    assert_eq!(status.code(), Some(0), "{}", program.log());
    assert!(TcpStream::connect(to).await.is_err());
    let lines = program.access();
    assert_eq!(lines.len(), if signal == Some("INT") { 3 } else { 4 }, "{lines:#?}");
    assert!(lines.iter().all(|line| line["outcome"] == "ok"), "{lines:#?}");
}

#[tokio::test]
async fn sigterm_lets_what_is_in_flight_finish() {
    drains_after(Some("TERM")).await;
}

#[tokio::test]
async fn sigint_does_the_same_without_waiting_for_more_callers() {
    drains_after(Some("INT")).await;
}

#[tokio::test]
async fn the_admin_door_does_the_same() {
    drains_after(None).await;
}

#[tokio::test]
async fn an_idle_connection_does_not_hold_up_the_end() {
    let site = Site::open().await;
    let mut program = Program::run(&site.file, &["--drain-delay", "1ms", "--grace", "20s"]).await;
    let to = program.addr("in").await.unwrap();
    let mut idle = Wire::open(to).await;
    idle.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    idle.until("done").await;
    let mut silent = Wire::open(to).await;
    let http2 = Caller::open(Speaks::Http2, to).await;
    program.signal("TERM").await;
    assert_eq!((idle.rest().await, silent.rest().await), (String::new(), String::new()));
    // Long before the end of the grace time.
    assert_eq!(program.ended(Duration::from_secs(10)).await.code(), Some(0));
    drop(http2);
}

#[tokio::test]
async fn what_does_not_finish_in_the_grace_time_is_cut() {
    let site = Site::open().await;
    let mut program = Program::run(&site.file, &["--drain-delay", "1ms", "--grace", "500ms"]).await;
    let to = program.addr("in").await.unwrap();
    let mut caller = Http1::open(to).await;
    let call = tokio::spawn(async move { caller.send(request("GET", "/slow").body(empty()).unwrap()).await.map(drop) });
    eventually(|| (site.upstream.requests() == 1).then_some(())).await;
    let begun = Instant::now();
    program.signal("TERM").await;
    program.ended(Duration::from_secs(10)).await;
    assert!(begun.elapsed() >= Duration::from_millis(500), "{:?}", begun.elapsed());
    let _cut_or_told = timeout(SOON, call).await.expect("the caller hears nothing").unwrap();
    program.said("stopped; calls in flight were cut off").await;
    let line = eventually(|| program.access().pop()).await;
    assert_eq!((line["outcome"].as_str(), line["path"].as_str()), (Some("draining"), Some("/slow")), "{line}");
}

/// For far longer than a signal takes to end it.
async fn lives_on(program: &Program) {
    for _ in 0..30 {
        assert_eq!(program.get("/live").await.status, 200);
        sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until nobody is let in any more.
async fn closed(to: SocketAddr) {
    let begun = Instant::now();
    while TcpStream::connect(to).await.is_ok() {
        assert!(begun.elapsed() < SOON, "it still accepts");
        sleep(Duration::from_millis(10)).await;
    }
}

/// A call that is held up, under way.
async fn slow(site: &Site, to: SocketAddr) -> tokio::task::JoinHandle<Option<u16>> {
    let mut caller = Http1::open(to).await;
    let call = async move { caller.send(request("GET", "/slow").body(empty()).unwrap()).await };
    let call = tokio::spawn(async { call.await.ok().map(|answer| answer.status().as_u16()) });
    eventually(|| (site.upstream.requests() == 1).then_some(())).await;
    call
}

#[tokio::test]
async fn the_first_signal_after_the_admin_door_does_not_end_the_delay() {
    let site = Site::open().await;
    let mut program = Program::run(&site.file, &["--drain-delay", "60s", "--grace", "20s"]).await;
    let to = program.addr("in").await.unwrap();
    assert_eq!(program.drain().await.status, 202);
    program.signal("TERM").await;
    lives_on(&program).await;
    assert_eq!(get(to, "/").await.status, 200);
    program.signal("TERM").await;
    assert_eq!(program.ended(SOON).await.code(), Some(0));
}

#[tokio::test]
async fn the_first_signal_after_the_admin_door_cuts_nothing() {
    let site = Site::open().await;
    let mut program = Program::run(&site.file, &["--drain-delay", "1ms", "--grace", "60s"]).await;
    let to = program.addr("in").await.unwrap();
    let call = slow(&site, to).await;
    assert_eq!(program.drain().await.status, 202);
    closed(to).await;
    program.signal("TERM").await;
    lives_on(&program).await;
    site.gate.release(1);
    assert_eq!(call.await.unwrap(), Some(200));
    assert_eq!(program.ended(SOON).await.code(), Some(0));
    let line = eventually(|| program.access().pop()).await;
    assert_eq!((line["outcome"].as_str(), line["path"].as_str()), (Some("ok"), Some("/slow")), "{line}");
}

#[tokio::test]
async fn a_second_signal_cuts_what_is_in_flight_and_leaves_its_record() {
    for admin in [false, true] {
        let site = Site::open().await;
        let mut program = Program::run(&site.file, &["--drain-delay", "1ms", "--grace", "60s"]).await;
        let to = program.addr("in").await.unwrap();
        let call = slow(&site, to).await;
        if admin {
            assert_eq!(program.drain().await.status, 202);
        }
        program.signal("TERM").await;
        closed(to).await;
        program.signal("INT").await;
        assert_eq!(program.ended(SOON).await.code(), Some(0));
        timeout(SOON, call).await.expect("the caller hears nothing").unwrap();
        let line = eventually(|| program.access().pop()).await;
        assert_eq!((line["outcome"].as_str(), line["path"].as_str()), (Some("draining"), Some("/slow")), "{line}");
        program.said("stopped; calls in flight were cut off").await;
    }
}

#[tokio::test]
async fn sighup_ends_nothing() {
    let site = Site::open().await;
    let program = Program::run(&site.file, &[]).await;
    let call = slow(&site, program.addr("in").await.unwrap()).await;
    program.signal("HUP").await;
    program.said("SIGHUP").await;
    site.gate.release(1);
    assert_eq!(call.await.unwrap(), Some(200));
    assert_eq!(program.metric("hopguard_policy_reloads_total", &[]).await, 1.0, "nothing had changed");
}

#[tokio::test]
async fn no_connection_to_the_app_is_left_behind() {
    let site = Site::open().await;
    let written = std::fs::read_to_string(&site.file).unwrap();
    std::fs::write(&site.file, format!("{written}    connections: {{ idle: 60s }}\n")).unwrap();
    let mut program = Program::run(&site.file, &["--drain-delay", "60s", "--grace", "15s"]).await;
    let to = program.addr("in").await.unwrap();
    assert_eq!(get(to, "/").await.body, "done");
    let slow = tokio::spawn(async move { get(to, "/slow").await });
    eventually(|| (site.upstream.requests() == 2).then_some(())).await;
    program.signal("TERM").await;
    program.said("draining").await;
    // An app that ends its busy connections with the next response ends them all.
    for _ in 0..3 {
        assert_eq!(get(to, "/").await.body, "done");
    }
    eventually(|| (site.upstream.open() == 1).then_some(())).await;
    site.gate.release(1);
    assert_eq!(slow.await.unwrap().body, "done");
    eventually(|| (site.upstream.open() == 0).then_some(())).await;
    program.signal("TERM").await;
    program.ended(Duration::from_secs(10)).await;
}
