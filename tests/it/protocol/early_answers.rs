//! Responses that are complete before their request: the caller gets them, and the destination has not failed.

use std::future::poll_fn;
use std::path::Path;
use std::time::Duration;

use h2::Reason;
use hyper::Response;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use crate::support::certificates::Authority;
use crate::support::http::{Caller, Speaks, feed, full, get, request};
use crate::support::upstream::{Upstream, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

/// More than the sockets between a caller and an upstream hold.
const UPLOAD: usize = 20 << 20;

const TOO_LARGE: &str = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 7\r\nConnection: close\r\n\r\ntoo big";

/// A destination that one failure would eject and break.
const FRAGILE: &str = "    circuitBreaker: { consecutiveFailures: 1 }
    retry: off
    timeouts: { request: 10s }";

/// Writes the whole upload, whatever comes meanwhile, and reads then; `Err` if a write failed.
async fn upload_then_read(mut stream: impl AsyncWrite + AsyncReadExt + Unpin) -> std::io::Result<String> {
    let head = format!("POST /upload HTTP/1.1\r\nHost: app.test\r\nContent-Length: {UPLOAD}\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let chunk = vec![b'x'; 64 << 10];
    for _ in 0..UPLOAD / chunk.len() {
        stream.write_all(&chunk).await?;
    }
    stream.flush().await?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await?;
    Ok(String::from_utf8(all).unwrap())
}

/// The same over a new TCP connection.
async fn uploaded(mesh: &Mesh) -> String {
    let stream = TcpStream::connect(mesh.addr("in")).await.unwrap();
    upload_then_read(stream).await.expect("no write and no read fails")
}

/// Responds to the head, and closes with the body unread: the kernel sends a reset behind the response.
async fn respond_and_reset(stream: TcpStream) {
    let mut wire = Wire::over(stream);
    wire.head().await;
    wire.send(TOO_LARGE).await;
}

async fn respond_and_reset_over_tls(stream: TcpStream, acceptor: TlsAcceptor) {
    // Else the response would wait for the acknowledgement of the session tickets, and the close would discard it.
    stream.set_nodelay(true).unwrap();
    let mut stream = acceptor.accept(stream).await.unwrap();
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        assert!(stream.read_buf(&mut head).await.unwrap() > 0);
    }
    stream.write_all(TOO_LARGE.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
}

fn behind_tls(folder: &Path, upstream: &Upstream, authority: &Authority) -> String {
    std::fs::write(folder.join("ca.pem"), authority.pem()).unwrap();
    let tls = format!("{FRAGILE}\n    tls: {{ ca: \"{}\", serverName: app.test }}", folder.join("ca.pem").display());
    policy(upstream.addr, &tls)
}

/// Every upload got the app's 413: in the response, the log and the metric; the destination has not failed.
async fn app_said_413(mesh: &Mesh, answers: &[String]) {
    for answer in answers {
        assert!(answer.starts_with("HTTP/1.1 413") && answer.ends_with("too big"), "{answer:?}");
        assert!(answer.contains("connection: close"), "{answer:?}");
    }
    mesh.ended("client_error", answers.len()).await;
    let lines = eventually(|| Some(mesh.log()).filter(|lines| lines.len() == answers.len())).await;
    for line in lines {
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&line["status"], &line["outcome"]), (&413.into(), &"client_error".into()), "{line}");
    }
    assert_eq!(mesh.count("upstream_reset") + mesh.count("circuit_open"), 0.0);
}

#[tokio::test]
async fn a_reset_behind_an_early_response_hides_it_from_nobody() {
    let upstream = Upstream::bytes(respond_and_reset).await;
    let mesh = Mesh::start(&policy(upstream.addr, FRAGILE)).await;
    let mut answers = Vec::new();
    for _ in 0..5 {
        answers.push(uploaded(&mesh).await);
    }
    app_said_413(&mesh, &answers).await;
    assert_eq!(upstream.connections(), answers.len(), "such a connection is not used again");
    mesh.stop().await;
}

#[tokio::test]
async fn a_reset_behind_an_early_response_over_tls_hides_it_from_nobody() {
    let (authority, folder) = (Authority::new(), tempfile::tempdir().unwrap());
    let acceptor = authority.issue("app.test").acceptor(&["http/1.1"]);
    let upstream = Upstream::bytes(move |stream| respond_and_reset_over_tls(stream, acceptor.clone())).await;
    let mesh = Mesh::start(&behind_tls(folder.path(), &upstream, &authority)).await;
    let mut answers = Vec::new();
    for _ in 0..5 {
        answers.push(uploaded(&mesh).await);
    }
    app_said_413(&mesh, &answers).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_response_before_a_broken_tls_record_is_read() {
    let (authority, folder) = (Authority::new(), tempfile::tempdir().unwrap());
    let acceptor = authority.issue("app.test").acceptor(&["http/1.1"]);
    let upstream = Upstream::bytes(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let mut stream = acceptor.accept(stream).await.unwrap();
            assert!(stream.read_buf(&mut Vec::new()).await.unwrap() > 0);
            // In one segment, so that both are read at once.
            socket2::SockRef::from(stream.get_ref().0).set_tcp_cork(true).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").await.unwrap();
            stream.flush().await.unwrap();
            stream.get_mut().0.write_all(&[&[0x17, 3, 3, 0, 32][..], &[0; 32]].concat()).await.unwrap();
            socket2::SockRef::from(stream.get_ref().0).set_tcp_cork(false).unwrap();
            let _closed = stream.get_mut().0.read(&mut [0; 64]).await;
        }
    })
    .await;
    let mesh = Mesh::start(&behind_tls(folder.path(), &upstream, &authority)).await;
    for _ in 0..3 {
        let answer = get(mesh.addr("in"), "/").await;
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"hello"[..]));
    }
    mesh.ended("ok", 3).await;
    assert_eq!(upstream.connections(), 3, "such a connection is not used again");
    mesh.stop().await;
}

#[tokio::test]
async fn a_reset_without_a_response_is_the_same_failure_as_ever() {
    let upstream = Upstream::bytes(|stream| async move {
        Wire::over(stream).head().await;
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, "    retry: off")).await;
    let answer = uploaded(&mesh).await;
    assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    let line = mesh.only("upstream_reset").await;
    let detail = line["refusal"]["detail"].as_str().unwrap();
    assert!(detail.contains("the upstream broke off before its response, over a new connection"), "{line}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_response_that_a_reset_cuts_stays_cut() {
    // Nothing but the end of the connection delimits it, and the end is a reset.
    let upstream = Upstream::bytes(|stream| async move {
        let mut wire = Wire::over(stream);
        wire.head().await;
        wire.send("HTTP/1.1 413 Content Too Large\r\n\r\nhalf of i").await;
    })
    .await;
    let mesh = Mesh::start(&policy(upstream.addr, FRAGILE)).await;
    let stream = TcpStream::connect(mesh.addr("in")).await.unwrap();
    let answer = upload_then_read(stream).await.unwrap_or_default();
    assert!(!answer.ends_with("0\r\n\r\n"), "{answer:?}");
    mesh.only("upstream_cut").await;
    mesh.stop().await;
}

/// One HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    [&[0, 0, length, kind, flags, 0, 0, 0, stream][..], payload].concat()
}

/// Answers each stream in full and resets it with `reason`, in one write; `length` says whether there is a Content-Length.
async fn respond_and_reset_stream(mut stream: TcpStream, reason: Reason, length: bool) {
    let mut preface = [0; 24];
    stream.read_exact(&mut preface).await.unwrap();
    stream.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    let mut head = [0; 9];
    while stream.read_exact(&mut head).await.is_ok() {
        let size = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        stream.read_exact(&mut vec![0; size as usize]).await.unwrap();
        if head[3] != 1 {
            continue;
        }
        // `:status: 413`, and `content-length: 7`, as literals with indexed names (RFC 7541, 6.2.2).
        let fields: &[u8] = if length { b"\x08\x03413\x0f\x0d\x017" } else { b"\x08\x03413" };
        let code = u32::from(reason).to_be_bytes();
        let frames = [frame(1, 4, head[8], fields), frame(0, 1, head[8], b"too big"), frame(3, 0, head[8], &code)];
        stream.write_all(&frames.concat()).await.unwrap();
    }
}

#[tokio::test]
async fn a_stream_that_is_reset_behind_its_response_is_answered() {
    for (reason, length) in [(Reason::NO_ERROR, true), (Reason::NO_ERROR, false), (Reason::CANCEL, false)] {
        let upstream = Upstream::bytes(move |stream| respond_and_reset_stream(stream, reason, length)).await;
        let mesh = Mesh::start(&policy(upstream.addr, &format!("    protocol: http2\n{FRAGILE}"))).await;
        for _ in 0..3 {
            let answer = uploaded(&mesh).await;
            assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("too big"), "{reason}: {answer:?}");
        }
        mesh.ended("client_error", 3).await;
        assert_eq!((mesh.count("client_error"), upstream.connections()), (3.0, 1), "{reason}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn replies_of_hopguard_itself_reach_a_caller_that_writes_first() {
    let upstream = Upstream::fixed("hello").await;
    let refuses = [
        ("    rateLimit: { requests: 1, per: 1h, burst: 1 }", "429", "rate_limited", "rateLimit.requests"),
        ("    maxBodySize: 1MiB", "413", "body_too_large", "maxBodySize"),
    ];
    for (rule, status, outcome, name) in refuses {
        let mesh = Mesh::start(&policy(upstream.addr, rule)).await;
        if outcome == "rate_limited" {
            assert_eq!(get(mesh.addr("in"), "/").await.status, 200);
        }
        let answer = uploaded(&mesh).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(outcome), "{answer:?}");
        let line = mesh.only(outcome).await;
        assert_eq!(line["refusal"]["rule"], name, "{line}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn replies_of_hopguard_itself_reach_a_caller_over_tls_that_writes_first() {
    let (authority, folder) = (Authority::new(), tempfile::tempdir().unwrap());
    authority.issue("shop.test").write(folder.path());
    let upstream = Upstream::fixed("hello").await;
    let file = |name: &str| folder.path().join(name).display().to_string();
    let tls = format!("to: app, tls: {{ certificate: \"{}\", key: \"{}\" }} }}", file("tls.crt"), file("tls.key"));
    let text = policy(upstream.addr, "    maxBodySize: 1MiB").replace("to: app }", &tls);
    let mesh = Mesh::start(&text).await;
    let stream = authority.connect(mesh.addr("in"), "shop.test", &["http/1.1"]).await.unwrap();
    // The end is read without an error, so `close_notify` has come too.
    let answer = upload_then_read(stream).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer:?}");
    mesh.only("body_too_large").await;
    mesh.stop().await;
}

#[tokio::test]
async fn an_http2_caller_gets_the_reply_and_its_stream_is_reset_without_error() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "    maxBodySize: 1MiB")).await;
    let stream = TcpStream::connect(mesh.addr("in")).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    for _ in 0..3 {
        let mut client = client.clone().ready().await.unwrap();
        let head = hyper::Request::post("http://shop.test/upload").header("content-length", UPLOAD);
        let head = head.body(()).unwrap();
        let (response, mut body) = client.send_request(head, false).unwrap();
        // The caller sends what it is given window for, and reads only when it can send no more.
        let reason = loop {
            body.reserve_capacity(16 << 10);
            let reset = poll_fn(|cx| match body.poll_capacity(cx) {
                std::task::Poll::Ready(Some(Ok(_))) => std::task::Poll::Ready(None),
                _ => body.poll_reset(cx).map(Some),
            });
            match reset.await {
                None => drop(body.send_data(vec![b'x'; body.capacity()].into(), false)),
                Some(reason) => break reason.unwrap(),
            }
        };
        assert_eq!(reason, Reason::NO_ERROR, "RFC 9113, 8.1");
        assert_eq!(response.await.unwrap().status(), 413);
    }
    mesh.ended("body_too_large", 3).await;
    assert!(!connection.is_finished(), "the connection goes on");
    mesh.stop().await;
}

#[tokio::test]
async fn an_upload_goes_on_where_the_app_reads_on() {
    for http2 in [false, true] {
        let (seen, mut count) = tokio::sync::mpsc::channel(1);
        let handler = move |request: hyper::Request<hyper::body::Incoming>| {
            let seen = seen.clone();
            async move {
                // The response is complete at once; the body is read behind it.
                tokio::spawn(async move {
                    let whole = http_body_util::BodyExt::collect(request.into_body()).await;
                    let _told = seen.send(whole.map(|whole| whole.to_bytes().len()).ok()).await;
                });
                Response::new(full("early"))
            }
        };
        let upstream = match http2 {
            true => Upstream::http2(handler).await,
            false => Upstream::http1(handler).await,
        };
        let protocol = if http2 { "    protocol: http2" } else { "" };
        let mesh = Mesh::start(&policy(upstream.addr, protocol)).await;
        for (number, speaks) in [Speaks::Http1, Speaks::Http2].into_iter().enumerate() {
            let (pieces, body) = feed();
            let mut caller = Caller::open(speaks, mesh.addr("in")).await;
            let asked = request("POST", "/").body(body).unwrap();
            let (response, _sent) = tokio::join!(caller.send(asked), pieces.send("first"));
            let answer = crate::support::http::Answer::read(response.unwrap()).await.unwrap();
            assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"early"[..]));
            // The response is complete; the rest follows.
            for _ in 0..8 {
                assert!(pieces.send(vec![b'x'; 64 << 10]).await);
            }
            drop(pieces);
            assert_eq!(count.recv().await.unwrap(), Some(5 + 8 * (64 << 10)), "http2: {http2}");
            mesh.ended("ok", number + 1).await;
        }
        let line: serde_json::Value = serde_json::from_str(&mesh.log()[0]).unwrap();
        assert_eq!(line["bytes_in"], 5 + 8 * (64 << 10), "{line}");
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_lingering_connection_does_not_outlast_the_grace() {
    let upstream = Upstream::fixed("hello").await;
    let mesh = Mesh::start(&policy(upstream.addr, "    maxBodySize: 1MiB")).await;
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(format!("POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: {UPLOAD}\r\n\r\n")).await;
    assert!(wire.rest().await.starts_with("HTTP/1.1 413"));
    // It goes on sending, fast enough to be read on.
    let sending = tokio::spawn(async move {
        let chunk = vec![b'x'; 16 << 10];
        while wire.stream.write_all(&chunk).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let is_idle = mesh.stop_within(Duration::from_millis(300)).await;
    assert!(!is_idle, "the connection was read to the end of the grace");
    sending.await.unwrap();
}
