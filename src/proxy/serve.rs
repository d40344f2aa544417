//! One downstream connection, served by hyper until it ends.
//!
//! hyper speaks HTTP; this file adds what hyper lacks: a time limit for slow heads and for silent connections that costs
//! nothing per request, an end for callers that stop reading or reset the connection, the drain, the hand-over to a tunnel,
//! and a close that does not destroy the last response.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, timeout};

use crate::net::flow::Flow;
use crate::net::http1::parsed_headers;
use crate::net::http2 as bounds;
use crate::net::io::{Activity, Io};
use crate::net::shared::SharedIo;
use crate::net::window_updates::JoinedWindowUpdates;
use crate::proxy::caller_watch::{CallerEvent, CallerWatch};
use crate::proxy::connection_timeouts::{ConnectionEnd, ConnectionTimeouts};
use crate::proxy::downstream::DownstreamConnection;
use crate::proxy::lingering_close::close;
use crate::proxy::local_reply::{LocalReply, LocalReplyContext, LocalReplyKind};
use crate::proxy::pipeline::{self, ServiceResult};
use crate::proxy::request_context::unparsed_request;
use crate::proxy::worker_context::WorkerContext;
use crate::runtime::drain::DrainPhase;
use crate::runtime::tasks;
use crate::runtime::wake_batching::ActiveStream;
use crate::telemetry::{Exchange, Protocol};

/// How many bytes more than a policy's `maxHeaderSize` are read, so that most heads that are too long still get a response
/// that names the field; hyper itself refuses what is longer.
const MORE_THAN_ALLOWED: usize = 16 * 1024;

/// An HTTP/2 connection with streams gets a PING this often, and is closed without an acknowledgement in time.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a caller whose head was too slow may take for the local reply.
const LAST_REPLY: Duration = Duration::from_secs(1);

/// Serves one HTTP/1 connection.
pub async fn http1(worker: Rc<WorkerContext>, downstream: Rc<DownstreamConnection>, io: Io) {
    let member = worker.connections.track();
    let activity = io.activity();
    let mut watch = ConnectionTimeouts::new(&worker, &downstream, Arc::clone(&activity));
    // Boxed, because hyper gives up the stream without closing it only then.
    let service = service_fn(|request| Box::pin(begin(&worker, &downstream, request)));
    let (caller, io) = SharedIo::pair(io.downstream());
    let mut caller = CallerWatch::new(caller, &downstream, &worker.timers);
    let mut connection = http1::Builder::new()
        .max_buf_size(watch.max_header_size + MORE_THAN_ALLOWED)
        .max_headers(parsed_headers(watch.max_header_count))
        // A caller that has sent its request may close its sending side, and wait for the response (RFC 9112, 9.6).
        .half_close(true)
        .serve_connection(TokioIo::new(io), service);
    // Declared after the connection, so dropped before.
    let _cut = CutWhenDropped { downstream: &downstream, activity };
    let mut closing = false;
    let end = poll_fn(|cx| {
        loop {
            if let Poll::Ready(done) = connection.poll_without_shutdown(cx) {
                return Poll::Ready(ConnectionEnd::Over(done));
            }
            match caller.poll(cx) {
                Poll::Ready(CallerEvent::Left) => return Poll::Ready(ConnectionEnd::Left),
                Poll::Ready(CallerEvent::Readable) => continue,
                Poll::Pending => {}
            }
            if closing || member.phase(cx) < DrainPhase::Closing {
                return watch.poll(cx, &downstream);
            }
            closing = true;
            Pin::new(&mut connection).graceful_shutdown();
        }
    })
    .await;
    let hyper::server::conn::http1::Parts { io, read_buf, .. } = connection.into_parts();
    drop(io);
    let Some(stream) = caller.into_stream().into_inner() else { return };
    // However it ended: a tunnel's handler holds the exchange, and the exchange holds the downstream connection.
    let handoff = downstream.take_handoff();
    match end {
        // An orderly close would say that the response is complete.
        ConnectionEnd::Over(Err(_)) | ConnectionEnd::Cut | ConnectionEnd::Left if downstream.is_unframed() => {
            stream.abort()
        }
        ConnectionEnd::Over(Ok(())) => match handoff {
            Some(join) => join(stream.bare().with_prefix(read_buf)).await,
            None => close(stream).await,
        },
        ConnectionEnd::Over(Err(error)) => {
            if error.is_parse() {
                // hyper has responded already: 431 to a head that is too long, 400 to anything else.
                let reply = match error.is_parse_too_large() {
                    true => too_large(&watch),
                    false => LocalReply::plain(LocalReplyKind::BadRequest, error.to_string()),
                };
                record_unparsed(&worker, &downstream, &reply, Instant::now());
            }
            close(stream).await;
        }
        ConnectionEnd::SlowHead { reply, since } => {
            record_unparsed(&worker, &downstream, &reply, since);
            too_slow(stream, &reply).await;
        }
        ConnectionEnd::Silent => close(stream).await,
        ConnectionEnd::Cut | ConnectionEnd::Left => {}
    }
}

/// A connection that is dropped while it is served, at the end of the grace time: its reset tells a caller without another
/// mark of the end that the response is not complete.
struct CutWhenDropped<'a> {
    downstream: &'a DownstreamConnection,
    activity: Arc<Activity>,
}

impl Drop for CutWhenDropped<'_> {
    fn drop(&mut self) {
        if self.downstream.is_unframed() {
            self.activity.set_reset_on_drop(true);
        }
    }
}

/// Serves one HTTP/2 connection.
pub async fn http2(worker: Rc<WorkerContext>, downstream: Rc<DownstreamConnection>, io: Io) {
    let (member, guest) = (worker.connections.track(), downstream.listener.connections.track());
    let mut watch = ConnectionTimeouts::new(&worker, &downstream, io.activity());
    downstream.set_max_streams(watch.max_streams);
    let streams = Streams { worker: Rc::clone(&worker), downstream: Rc::clone(&downstream) };
    // Boxed, because hyper moves it with the stream from the connection to the stream's own task.
    let service = service_fn(|request| Box::pin(begin(&worker, &downstream, request)));
    let (caller, io) = SharedIo::pair(io.downstream());
    let mut connection = Box::pin(
        http2::Builder::new(streams)
            .timer(TokioTimer::new())
            .initial_stream_window_size(bounds::STREAM_WINDOW)
            .initial_connection_window_size(bounds::connection_window(watch.max_streams))
            .max_concurrent_streams(watch.max_streams)
            .max_local_error_reset_streams(bounds::MAX_LATE_FRAMES)
            .max_header_list_size(u32::try_from(watch.max_header_size + MORE_THAN_ALLOWED).unwrap_or(u32::MAX))
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .serve_connection(TokioIo::new(JoinedWindowUpdates::of_client(io)), service),
    );
    let mut closing = false;
    let is_over = poll_fn(|cx| {
        loop {
            if connection.as_mut().poll(cx).is_ready() {
                return Poll::Ready(true);
            }
            if closing {
                return watch.poll_stalled(cx, &downstream).map(|()| false);
            }
            // A response over HTTP/2 cannot announce the end of its connection, so a closing listener sends GOAWAY at once.
            closing = member.phase(cx) >= DrainPhase::Closing
                || guest.phase(cx) >= DrainPhase::Leaving
                || watch.poll_silence(cx, &downstream).is_ready();
            if !closing {
                return Poll::Pending;
            }
            connection.as_mut().graceful_shutdown();
        }
    })
    .await;
    drop(connection);
    // What the caller still sends, such as the rest of a body that is not read any more, must not reset the last response.
    if is_over && let Some(stream) = caller.into_inner() {
        close(stream).await;
    }
}

fn begin(
    worker: &Rc<WorkerContext>,
    downstream: &Rc<DownstreamConnection>,
    request: Request<Incoming>,
) -> impl Future<Output = ServiceResult> + use<> {
    let flow = Rc::new(Flow::new(Instant::now()));
    downstream.keep(Rc::clone(&flow));
    pipeline::call(worker, downstream, flow, request)
}

/// Runs the streams of one HTTP/2 connection, each as a task that ends when its caller does not take the response.
#[derive(Clone)]
struct Streams {
    worker: Rc<WorkerContext>,
    downstream: Rc<DownstreamConnection>,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future + 'static,
{
    fn execute(&self, stream: F) {
        // hyper calls the service, which keeps the flow, just before it hands the stream to the executor.
        let flow = self.downstream.take_newest();
        if flow.is_none()
            && let Some(sender) = self.downstream.take_awaited_sender()
        {
            // No stream of a request, but the sender of a tunnel, which hyper hands over right after the response.
            return sender.set(async { drop(stream.await) });
        }
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

/// What is recorded of a head that hyper has refused for its length; hyper does not tell which of the two bounds it is.
fn too_large(watch: &ConnectionTimeouts) -> LocalReply {
    let (size, count) = (watch.max_header_size, watch.max_header_count);
    let detail = format!(
        "the head of the request has more than {} bytes or more than {} fields: maxHeaderSize is {size}, maxHeaderCount is \
         {count}",
        size + MORE_THAN_ALLOWED,
        parsed_headers(count)
    );
    LocalReply::plain(LocalReplyKind::HeaderTooLarge, detail)
}

/// Writes the record of bytes that could not be parsed as a request.
fn record_unparsed(worker: &Rc<WorkerContext>, downstream: &DownstreamConnection, reply: &LocalReply, began: Instant) {
    let hop = worker.view().policy.unrouted(downstream.listener.values.direction);
    let line = unparsed_request(downstream);
    let mut record = Exchange::begin(Rc::clone(&worker.shard), began, hop, Protocol::Http1, line);
    record.refuse(reply.record());
    record.set_response_head(Instant::now(), reply.status());
    record.complete();
}

/// Answers a request head that did not come in time.
async fn too_slow(mut stream: Io, reply: &LocalReply) {
    let response = reply.response(false, &LocalReplyContext::default(), |document| document);
    let mut text = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n".to_vec();
    for (name, value) in response.headers() {
        text.extend_from_slice(name.as_str().as_bytes());
        text.extend_from_slice(b": ");
        text.extend_from_slice(value.as_bytes());
        text.extend_from_slice(b"\r\n");
    }
    text.extend_from_slice(format!("content-length: {}\r\n\r\n", response.body().len()).as_bytes());
    text.extend_from_slice(response.body());
    if timeout(LAST_REPLY, stream.write_all(&text)).await.is_ok_and(|wrote| wrote.is_ok()) {
        close(stream).await;
    }
}
