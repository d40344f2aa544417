//! One caller's connection, served by hyper until it ends.
//!
//! hyper speaks HTTP; this file adds what it does not do: a time limit for slow heads and for silent connections that
//! costs nothing per request, an end for callers that stop reading, the drain, the hand-over to a tunnel,
//! and a close that does not destroy the last answer.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};

use crate::net::flow::Flow;
use crate::net::http2 as bounds;
use crate::net::io::Io;
use crate::proxy::connection_timeouts::{ConnectionEnd, ConnectionTimeouts};
use crate::proxy::downstream::DownstreamConnection;
use crate::proxy::local_reply::{LocalReply, LocalReplyContext, LocalReplyKind};
use crate::proxy::pipeline::{self, Answer};
use crate::proxy::request_context;
use crate::proxy::worker_context::WorkerContext;
use crate::runtime::drain::DrainPhase;
use crate::runtime::tasks;
use crate::runtime::wake_batching::ActiveStream;
use crate::telemetry::{Exchange, Protocol};

/// How much more than a policy's `maxHeaderSize` is read, in bytes, so that most heads that are too long still get an
/// answer that names the field; hyper itself refuses what is longer.
const MORE_THAN_ALLOWED: usize = 16 * 1024;

/// A connection with streams on it is asked for a sign of life this often, and closed without one.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// How long, and for how many bytes, a closed connection is still read, so that the caller gets the last answer and
/// not a reset (RFC 9112, 9.6).
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 256 * 1024;

/// Serves one HTTP/1 connection.
pub async fn http1(worker: Rc<WorkerContext>, caller: Rc<DownstreamConnection>, io: Io) {
    let member = worker.connections.track();
    let mut watch = ConnectionTimeouts::new(&worker, &caller, io.activity());
    // Boxed, because only then hyper lets go of the stream without closing it.
    let service = service_fn(|request| Box::pin(begin(&worker, &caller, request)));
    let mut connection = http1::Builder::new()
        .max_buf_size(watch.max_header_size + MORE_THAN_ALLOWED)
        .serve_connection(TokioIo::new(io), service);
    let mut closing = false;
    let end = poll_fn(|cx| {
        loop {
            if let Poll::Ready(done) = connection.poll_without_shutdown(cx) {
                return Poll::Ready(ConnectionEnd::Over(done));
            }
            if closing || member.phase(cx) < DrainPhase::Closing {
                return watch.poll(cx, &caller);
            }
            closing = true;
            Pin::new(&mut connection).graceful_shutdown();
        }
    })
    .await;
    let parts = connection.into_parts();
    let stream = parts.io.into_inner();
    // However it ended: what is left for a tunnel holds the exchange, and that holds the caller.
    let handoff = caller.take_handoff();
    match end {
        // To close would say that the answer is whole.
        ConnectionEnd::Over(Err(_)) | ConnectionEnd::Cut if caller.is_unframed() => stream.break_off(),
        ConnectionEnd::Over(Ok(())) => match handoff {
            Some(join) => join(stream.with_prefix(parts.read_buf)).await,
            None => close(stream).await,
        },
        ConnectionEnd::Over(Err(error)) => {
            if error.is_parse() {
                // hyper has answered already: 431 to a head that is too long, 400 to anything else.
                let kind = if error.is_parse_too_large() {
                    LocalReplyKind::HeaderTooLarge
                } else {
                    LocalReplyKind::BadRequest
                };
                record_unread(&worker, &caller, &LocalReply::plain(kind, error.to_string()), Instant::now());
            }
            close(stream).await;
        }
        ConnectionEnd::SlowHead { refusal, since } => {
            record_unread(&worker, &caller, &refusal, since);
            too_slow(stream, &refusal).await;
        }
        ConnectionEnd::Silent => close(stream).await,
        ConnectionEnd::Cut => {}
    }
}

/// Serves one HTTP/2 connection.
pub async fn http2(worker: Rc<WorkerContext>, caller: Rc<DownstreamConnection>, io: Io) {
    let (member, guest) = (worker.connections.track(), caller.listener.connections.track());
    let mut watch = ConnectionTimeouts::new(&worker, &caller, io.activity());
    let streams = Streams { worker: Rc::clone(&worker), caller: Rc::clone(&caller) };
    // Boxed, because hyper moves it with the stream from the connection to the stream's own task.
    let service = service_fn(|request| Box::pin(begin(&worker, &caller, request)));
    let mut connection = pin!(
        http2::Builder::new(streams)
            .timer(TokioTimer::new())
            .initial_stream_window_size(bounds::STREAM)
            .initial_connection_window_size(bounds::CONNECTION)
            .max_concurrent_streams(bounds::STREAMS)
            .max_local_error_reset_streams(bounds::LATE_FRAMES)
            .max_header_list_size(u32::try_from(watch.max_header_size + MORE_THAN_ALLOWED).unwrap_or(u32::MAX))
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .serve_connection(TokioIo::new(io), service)
    );
    let mut closing = false;
    poll_fn(|cx| {
        loop {
            if connection.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            if closing {
                return watch.poll_stalled(cx, &caller);
            }
            // An answer over HTTP/2 cannot say that its connection is to close, so a listener that closes says it at once.
            closing = member.phase(cx) >= DrainPhase::Closing
                || guest.phase(cx) >= DrainPhase::Leaving
                || watch.poll_silence(cx, &caller).is_ready();
            if !closing {
                return Poll::Pending;
            }
            connection.as_mut().graceful_shutdown();
        }
    })
    .await;
}

fn begin(
    worker: &Rc<WorkerContext>,
    caller: &Rc<DownstreamConnection>,
    request: Request<Incoming>,
) -> impl Future<Output = Answer> + use<> {
    let flow = Rc::new(Flow::new(Instant::now()));
    caller.keep(Rc::clone(&flow));
    pipeline::call(worker, caller, flow, request)
}

/// Runs the streams of one HTTP/2 connection, each as a task that ends when its caller does not take the answer.
#[derive(Clone)]
struct Streams {
    worker: Rc<WorkerContext>,
    caller: Rc<DownstreamConnection>,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future + 'static,
{
    fn execute(&self, stream: F) {
        // hyper calls the service, which keeps the flow, just before it hands the stream to the executor.
        let flow = self.caller.take_newest();
        let timers = self.worker.timers.clone();
        tasks::spawn(async move {
            let _under_way = ActiveStream::begin();
            let mut stream = pin!(stream);
            let mut timer = None;
            poll_fn(|cx| {
                if stream.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
                let Some(flow) = &flow else { return Poll::Pending };
                ConnectionTimeouts::poll_cut(cx, flow, &timers, &mut timer)
            })
            .await;
        });
    }
}

/// Writes the record of a request that never became one.
fn record_unread(worker: &Rc<WorkerContext>, caller: &DownstreamConnection, refusal: &LocalReply, began: Instant) {
    let hop = worker.view().policy.unrouted(caller.listener.values.direction);
    let line = request_context::unread(caller);
    let mut record = Exchange::begin(Rc::clone(&worker.shard), began, hop, Protocol::Http1, line);
    record.refuse(refusal.record());
    record.set_response_head(Instant::now(), refusal.status());
    record.complete();
}

/// Answers a head that did not come in time.
async fn too_slow(mut stream: Io, refusal: &LocalReply) {
    let answer = refusal.answer(false, &LocalReplyContext::default(), |document| document);
    let mut text = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n".to_vec();
    for (name, value) in answer.headers() {
        text.extend_from_slice(name.as_str().as_bytes());
        text.extend_from_slice(b": ");
        text.extend_from_slice(value.as_bytes());
        text.extend_from_slice(b"\r\n");
    }
    text.extend_from_slice(format!("content-length: {}\r\n\r\n", answer.body().len()).as_bytes());
    text.extend_from_slice(answer.body());
    if timeout(LINGER, stream.write_all(&text)).await.is_ok_and(|wrote| wrote.is_ok()) {
        close(stream).await;
    }
}

/// Says that nothing more is coming, then reads on for a moment before the stream is dropped.
async fn close(mut stream: Io) {
    let linger = async {
        stream.shutdown().await?;
        let mut buffer = [0; 1024];
        let mut read = 0;
        while read < LINGER_BYTES {
            match stream.read(&mut buffer).await? {
                0 => break,
                count => read += count,
            }
        }
        std::io::Result::Ok(())
    };
    // Whatever goes wrong here, the connection is over.
    let _over = timeout(LINGER, linger).await;
}
