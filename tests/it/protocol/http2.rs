//! One HTTP/2 connection under load: a backlog of small unread messages, and late frames for refused and cancelled streams.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::SendRequest;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::http::{Body, empty, full, get};
use crate::support::upstream::{Gate, Upstream, nobody, policy};
use crate::support::{Mesh, SOON, eventually};

/// Messages of one byte that wait to be read: more than h2 lets wait by itself with windows of 64 MiB.
const MANY: usize = 140_000;

/// A body of `MANY` messages, and how many have gone.
struct Messages(Arc<AtomicUsize>);

impl hyper::body::Body for Messages {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let is_over = self.0.load(SeqCst) == MANY;
        self.0.fetch_add(usize::from(!is_over), SeqCst);
        Poll::Ready((!is_over).then(|| Ok(Frame::data(Bytes::from_static(b"x")))))
    }
}

fn messages(sent: &Arc<AtomicUsize>) -> Body {
    BodyExt::boxed(Messages(Arc::clone(sent)))
}

async fn all_sent(sent: &AtomicUsize) {
    eventually(|| (sent.load(SeqCst) == MANY).then_some(())).await;
}

/// Counts what is in a body.
async fn read(mut body: Incoming) -> usize {
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        read += frame.unwrap().into_data().unwrap().len();
    }
    read
}

/// A caller whose windows are small, so that hopguard has to wait for it.
async fn caller(mesh: &Mesh) -> SendRequest<Body> {
    let stream = TcpStream::connect(mesh.addr("in")).await.unwrap();
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let (caller, connection) = builder.initial_stream_window_size(1000).handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    caller
}

fn ask_for(path: &str) -> Request<Body> {
    Request::get(format!("http://shop.test{path}")).body(empty()).unwrap()
}

fn with_streams(upstream: &Upstream) -> String {
    policy(upstream.addr, "    protocol: http2\n    timeouts: { connect: 10s, request: 30s }")
}

#[tokio::test]
async fn an_answer_of_many_messages_that_its_caller_does_not_read_leaves_the_others_alone() {
    let sent = Arc::<AtomicUsize>::default();
    let counter = Arc::clone(&sent);
    let upstream = Upstream::http2(move |request: Request<Incoming>| {
        let body = if request.uri().path() == "/watch" { messages(&counter) } else { full("hello") };
        async { Response::new(body) }
    })
    .await;
    let mesh = Mesh::start(&with_streams(&upstream)).await;
    let mut caller = caller(&mesh).await;
    let watched = caller.send_request(ask_for("/watch")).await.unwrap();
    all_sent(&sent).await;
    let other = caller.send_request(ask_for("/")).await.unwrap();
    assert_eq!(other.into_body().collect().await.unwrap().to_bytes(), "hello");
    assert_eq!(read(watched.into_body()).await, MANY);
    assert_eq!(upstream.connections(), 1);
    mesh.ended("ok", 2).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_request_of_many_messages_that_its_upstream_does_not_read_leaves_the_others_alone() {
    let gate = Gate::closed();
    let opened = gate.clone();
    let upstream = Upstream::bytes(move |stream| {
        let gate = gate.clone();
        async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let gate = gate.clone();
                async move {
                    let answer = if request.uri().path() == "/push" {
                        gate.pass().await;
                        read(request.into_body()).await.to_string()
                    } else {
                        "hello".to_owned()
                    };
                    Ok::<_, std::convert::Infallible>(Response::new(full(Bytes::from(answer))))
                }
            });
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ended = builder.initial_stream_window_size(1000).serve_connection(TokioIo::new(stream), service).await;
        }
    })
    .await;
    let mesh = Mesh::start(&with_streams(&upstream)).await;
    let mut caller = caller(&mesh).await;
    let sent = Arc::default();
    let pushing = Request::post("http://shop.test/push").body(messages(&sent)).unwrap();
    let pushed = tokio::spawn(caller.send_request(pushing));
    all_sent(&sent).await;
    let other = caller.send_request(ask_for("/")).await.unwrap();
    assert_eq!(other.into_body().collect().await.unwrap().to_bytes(), "hello");
    opened.release(1);
    let answer = pushed.await.unwrap().unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), MANY.to_string());
    assert_eq!(upstream.connections(), 1);
    mesh.ended("ok", 2).await;
    mesh.stop().await;
}

/// Calls of one connection that are given up at once: more than h2 remembers.
const CALLS: usize = 200;

/// What comes for each of them afterwards.
const LATE: usize = 40;

const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
const PING: u8 = 6;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const ACK: u8 = 1;
pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame as it is written (RFC 9113, 4.1).
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Reads one: what kind, for which stream.
async fn next(stream: &mut TcpStream) -> Option<(u8, u8, u32)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let [a, b, c, kind, flags, id @ ..] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    stream.read_exact(&mut payload).await.ok()?;
    Some((kind, flags, u32::from_be_bytes(id)))
}

/// Reads until such a frame has come so often.
async fn until(stream: &mut TcpStream, kind: u8, times: usize) {
    let mut come = 0;
    while come < times {
        let (is, flags, _) =
            timeout(SOON, next(stream)).await.expect("nothing comes").expect("the connection is closed");
        come += usize::from(is == kind && (is != PING || flags == ACK));
    }
}

/// Pieces of a body that were on the way when their streams were reset.
fn late(streams: &[u32]) -> Vec<u8> {
    let once: Vec<u8> = streams.iter().flat_map(|id| frame(DATA, 0, *id, &[b'x'; 1000])).collect();
    once.repeat(LATE)
}

#[tokio::test]
async fn what_comes_late_for_refused_calls_leaves_their_connection_alone() {
    let mesh = Mesh::start(&policy(nobody(), "    retry: off\n    circuitBreaker: off\n    ejection: off")).await;
    let mut caller = TcpStream::connect(mesh.addr("in")).await.unwrap();
    let window = frame(WINDOW_UPDATE, 0, 0, &(1u32 << 30).to_be_bytes());
    caller.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, b""), &window].concat()).await.unwrap();
    let streams: Vec<u32> = (0..CALLS as u32).map(|number| 2 * number + 1).collect();
    // POST http://shop/, whose body is still to come.
    let post = |id: &u32| frame(HEADERS, END_HEADERS, *id, b"\x83\x86\x84\x41\x04shop");
    caller.write_all(&streams.iter().flat_map(post).collect::<Vec<u8>>()).await.unwrap();
    until(&mut caller, RST_STREAM, CALLS).await;
    mesh.ended("connect_failed", CALLS).await;
    caller.write_all(&late(&streams)).await.unwrap();
    caller.write_all(&frame(PING, 0, 0, b"alive???")).await.unwrap();
    until(&mut caller, PING, 1).await;
    mesh.stop().await;
}

/// An upstream that answers one call, has `CALLS` given up, sends answers for these all the same, and answers again.
async fn late_answers(mut stream: TcpStream, sent: Gate) {
    const OK: &[u8] = b"\x88";
    stream.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, b"")).await.unwrap();
    let (mut asked, mut given_up) = (Vec::new(), 0);
    while let Some((kind, flags, id)) = next(&mut stream).await {
        let answer = match kind {
            SETTINGS if flags != ACK => frame(SETTINGS, ACK, 0, b""),
            RST_STREAM => {
                given_up += 1;
                let heads = asked[1..].iter().flat_map(|id| frame(HEADERS, END_HEADERS, *id, OK));
                if given_up == CALLS { heads.chain(late(&asked[1..])).collect() } else { Vec::new() }
            }
            HEADERS => {
                asked.push(id);
                let is_answered = asked.len() == 1 || asked.len() > CALLS + 1;
                if is_answered { frame(HEADERS, END_HEADERS | END_STREAM, id, OK) } else { Vec::new() }
            }
            _ => Vec::new(),
        };
        stream.write_all(&answer).await.unwrap();
        sent.release(usize::from(kind == RST_STREAM && given_up == CALLS));
    }
}

#[tokio::test]
async fn what_comes_late_for_calls_that_were_given_up_leaves_the_connection_to_their_upstream_alone() {
    let sent = Gate::closed();
    let all_sent = sent.clone();
    let upstream = Upstream::bytes(move |stream| late_answers(stream, sent.clone())).await;
    let rules =
        "    retry: off\n    circuitBreaker: off\n    ejection: off\n    timeouts: { connect: 2s, request: 2s }";
    let mesh = Mesh::start(&policy(upstream.addr, &format!("    protocol: http2\n{rules}"))).await;
    let to = mesh.addr("in");
    assert_eq!(get(to, "/").await.status, 200);
    let calls: Vec<_> = (0..CALLS).map(|_| tokio::spawn(get(to, "/"))).collect();
    for call in calls {
        assert_eq!(call.await.unwrap().status, 504);
    }
    timeout(SOON, all_sent.pass()).await.unwrap();
    for _ in 0..3 {
        assert_eq!(get(to, "/").await.status, 200);
    }
    assert_eq!(upstream.connections(), 1);
    mesh.ended("ok", 4).await;
    mesh.stop().await;
}

#[tokio::test]
async fn a_connection_at_its_limit_of_streams_shows_in_metrics_and_on_the_status_page() {
    let gate = Gate::closed();
    let upstream = Upstream::gated("hello", &gate).await;
    let rules = "    timeouts: { request: 30s }";
    let mesh = Mesh::start(&policy(upstream.addr, rules).replace("to: app }", "to: app, maxStreams: 3 }")).await;
    let mut caller = crate::support::http::http2(mesh.addr("in")).await;
    // Its library has the SETTINGS of hopguard by then.
    assert_eq!(caller.send_request(ask_for("/")).await.unwrap().status(), 200);
    let calls: Vec<_> = (0..5).map(|_| tokio::spawn(caller.clone().send_request(ask_for("/slow")))).collect();
    eventually(|| (upstream.requests() == 4).then_some(())).await;
    let at_limit = || mesh.metric("hopguard_listener_connections_at_max_streams", &["listener=\"in\""]);
    assert_eq!(at_limit(), 1.0);
    let status: serde_json::Value = serde_json::from_slice(&get(mesh.admin(), "/status").await.body).unwrap();
    let listener = &status["listeners"][0];
    assert_eq!((&listener["maxStreams"], &listener["connectionsAtMaxStreams"]), (&3.into(), &1.into()), "{listener}");
    gate.release(5);
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().into_body().collect().await.unwrap().to_bytes(), "hello");
    }
    mesh.ended("ok", 6).await;
    assert_eq!(at_limit(), 0.0);
    assert!(mesh.metric("hopguard_listener_max_streams_reached_total", &["listener=\"in\""]) >= 1.0);
    mesh.stop().await;
}
