//! One HTTP/2 connection to an upstream, shared by the requests of one worker.
//!
//! The connection runs in a task, which ends with the last reference to the connection or when the peer closes it; a second
//! task pings a silent peer (`http2_liveness`). A request needs no task: the caller's task waits for the response head and
//! sends the request body meanwhile. Only a request body that continues after the response head gets a task, because a
//! caller that does not read the response may still send. Dropping a call before its end resets its stream with CANCEL (RFC 9113, 5.4.2).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::{Reason, SendStream};
use http::{Request, Response};
use http_body::Body;
use tokio::time::{Instant, sleep};

use crate::net::body::RequestBody;
use crate::net::flow::Flow;
use crate::net::http2 as bounds;
use crate::net::io::Io;
use crate::net::window_updates::JoinedWindowUpdates;
use crate::runtime::tasks;
use crate::upstream::connect::ConnectError;
use crate::upstream::http2_liveness::{self, Liveness, Watched};
use crate::upstream::lifetime::Lifetime;
use crate::upstream::response::{Http2Body, SendError, UpstreamBody, UpstreamError};

/// Most concurrent streams on one connection, even if the peer allows more.
pub const MAX_STREAMS: usize = bounds::MAX_STREAMS as usize;

/// Longest header section of a response, in bytes by the count of RFC 9113, 6.5.2; about hyper's limit for HTTP/1.
const MAX_HEADER_LIST: u32 = 400 * 1024;

/// Bytes of a request body that h2 buffers per stream.
const SEND_BUFFER: usize = 1024 * 1024;

/// Interval of the checks for the peer's SETTINGS on a new connection; h2 has no event for them.
const SETTINGS_CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// One HTTP/2 connection.
pub struct Http2 {
    sender: RefCell<SendRequest<Bytes>>,
    active_streams: Cell<usize>,
    ping_timed_out: Rc<Cell<bool>>,
    liveness: Rc<Liveness>,
    /// How long it takes new streams, and how many it has taken.
    pub lifetime: Lifetime,
    /// When the last stream ended; when the connection was opened, before the first.
    idle_since: Cell<Instant>,
}

impl Http2 {
    /// Begins HTTP/2 on an open stream and spawns the connection's task.
    ///
    /// Waits for the peer's SETTINGS: before them the number of allowed streams is unknown, and a request beyond that number
    /// would wait on a full connection. Has no time limit.
    ///
    /// # Errors
    /// If the peer closes the connection first, or does not speak HTTP/2.
    pub async fn new(io: Io, lifetime: Lifetime) -> Result<Rc<Self>, ConnectError> {
        let liveness = Rc::new(Liveness::new(io.activity()));
        let (sender, mut connection) = Builder::new()
            .initial_window_size(bounds::STREAM_WINDOW)
            .initial_connection_window_size(bounds::CONNECTION_WINDOW)
            .initial_max_send_streams(0)
            .max_concurrent_reset_streams(MAX_STREAMS)
            .max_local_error_reset_streams(Some(bounds::MAX_LATE_FRAMES))
            .max_header_list_size(MAX_HEADER_LIST)
            .max_send_buffer_size(SEND_BUFFER)
            .enable_push(false)
            .handshake(JoinedWindowUpdates::of_server(io.upstream()))
            .await
            .map_err(|error| ConnectError::Handshake(UpstreamError::Http2(error)))?;
        let pings = connection.ping_pong();
        // The error itself reaches the requests on the connection.
        let task = tasks::spawn(async move { drop(connection.await) });
        let this = Rc::new(Self {
            sender: RefCell::new(sender),
            active_streams: Cell::new(0),
            ping_timed_out: Rc::default(),
            liveness,
            idle_since: Cell::new(lifetime.opened_at),
            lifetime,
        });
        while this.peer_limit() == 0 {
            match this.error() {
                Some(error) if error.is_malformed() => return Err(ConnectError::NotHttp2),
                Some(error) => return Err(ConnectError::Handshake(error)),
                None => {}
            }
            sleep(SETTINGS_CHECK_INTERVAL).await;
        }
        if let Some(pings) = pings {
            tasks::spawn(http2_liveness::keep_alive(Rc::downgrade(&this), pings, task.abort_handle()));
        }
        Ok(this)
    }

    /// True if one more request can be sent now. A connection that is suspected of silence gets none.
    pub fn has_capacity(&self) -> bool {
        self.is_open() && self.active_streams.get() < self.max_streams() && self.liveness.is_trusted()
    }

    /// Whether the connection still lives.
    pub(super) fn liveness(&self) -> &Rc<Liveness> {
        &self.liveness
    }

    /// True if no byte has come since `then`: a call sent by then still waits, or the connection has had no stream since.
    pub(super) fn is_unheard_since(&self, then: Instant) -> bool {
        match self.active_streams.get() {
            0 => self.idle_since.get() <= then,
            _ => self.liveness.quiet_since().is_some_and(|since| since <= then),
        }
    }

    /// Most concurrent requests: the peer's limit, at most [`MAX_STREAMS`].
    pub fn max_streams(&self) -> usize {
        self.peer_limit().min(MAX_STREAMS)
    }

    /// The peer's SETTINGS_MAX_CONCURRENT_STREAMS; 0 before its SETTINGS.
    fn peer_limit(&self) -> usize {
        self.sender.borrow().current_max_send_streams()
    }

    /// False once the peer or hopguard has closed the connection.
    pub fn is_open(&self) -> bool {
        self.error().is_none()
    }

    /// Why the connection was closed; `None` while it is open.
    fn error(&self) -> Option<UpstreamError> {
        // Never pending: requests are sent through clones, and only a clone that exceeded the limit has to wait.
        match self.sender.borrow_mut().poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Err(error)) => Some(UpstreamError::http2(error, &self.ping_timed_out)),
            Poll::Ready(Ok(())) | Poll::Pending => None,
        }
    }

    /// Time since the last stream ended; `None` while there is a stream.
    pub fn idle_for(&self, now: Instant) -> Option<Duration> {
        (self.active_streams.get() == 0).then(|| now.saturating_duration_since(self.idle_since.get()))
    }

    /// Counts a stream that begins.
    pub fn begin_stream(&self) {
        self.lifetime.count_request();
        self.active_streams.set(self.active_streams.get() + 1);
    }

    /// Counts a stream that has ended.
    pub fn end_stream(&self, now: Instant) {
        self.active_streams.set(self.active_streams.get().saturating_sub(1));
        self.idle_since.set(now);
    }

    /// Sends a request and waits for the response head, sending the request body meanwhile.
    ///
    /// # Errors
    /// If connection or stream fails; with the request, if the connection was closed before a byte of it was sent.
    pub fn send(
        &self,
        request: Request<RequestBody>,
    ) -> impl Future<Output = Result<Response<UpstreamBody>, SendError>> + use<> {
        let opened = self.open_stream(request);
        let ping_timed_out = Rc::clone(&self.ping_timed_out);
        async move {
            let (mut head, mut upload) = opened?;
            let response = poll_fn(|cx| {
                if upload.as_mut().is_some_and(|upload| upload.poll(cx).is_ready()) {
                    upload = None;
                }
                Pin::new(&mut head).poll(cx)
            })
            .await
            .map_err(|error| UpstreamError::http2(error, &ping_timed_out))?;
            if let Some(mut upload) = upload {
                tasks::spawn(async move { poll_fn(|cx| upload.poll(cx)).await });
            }
            Ok(response.map(|stream| UpstreamBody::Http2(Http2Body::new(stream, ping_timed_out))))
        }
    }

    fn open_stream(&self, request: Request<RequestBody>) -> Result<(ResponseFuture, Option<Box<Upload>>), SendError> {
        if let Some(error) = self.error() {
            return Err(SendError { error, unsent: Some(Box::new(request)) });
        }
        let (head, body) = request.into_parts();
        let is_empty = body.is_end_stream();
        let mut sender = self.sender.borrow().clone();
        let sent = sender.send_request(Request::from_parts(head, ()), is_empty);
        let (response, stream) = sent.map_err(|error| UpstreamError::http2(error, &self.ping_timed_out))?;
        let upload = (!is_empty).then(|| Box::new(Upload { flow: Rc::clone(body.flow()), body, stream, next: None }));
        Ok((response, upload))
    }
}

impl Watched for Http2 {
    fn liveness(&self) -> &Rc<Liveness> {
        &self.liveness
    }

    fn active_streams(&self) -> usize {
        self.active_streams.get()
    }

    fn record_ping_timeout(&self) {
        self.ping_timed_out.set(true);
    }
}

/// Sends a request body into a stream.
struct Upload {
    flow: Rc<Flow>,
    body: RequestBody,
    stream: SendStream<Bytes>,
    /// A chunk that was read and waits for window, and whether it is the last.
    next: Option<(Bytes, bool)>,
}

impl Upload {
    /// Ready when the body has ended or the stream has failed; the failure itself reaches the future of the response.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match ready!(self.poll_send(cx)) {
            Ok(()) => {}
            // Before the response head, the reset also ends the wait for it.
            Err(()) => self.stream.send_reset(Reason::CANCEL),
        }
        Poll::Ready(())
    }

    /// Sends chunks until the body ends; `Err` if the body failed or the exchange is over, and the stream needs a reset.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ()>> {
        loop {
            // Polled first, so that a reset by the peer wakes the task while the caller sends nothing.
            if self.stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            if self.next.as_ref().is_some_and(|(chunk, _)| !chunk.is_empty()) {
                while self.stream.capacity() == 0 {
                    // The body reports the end too, but it is not polled while the peer gives no window.
                    if self.flow.is_over() {
                        return Poll::Ready(Err(()));
                    }
                    self.flow.wait(cx);
                    let Some(Ok(_)) = ready!(self.stream.poll_capacity(cx)) else { return Poll::Ready(Ok(())) };
                }
            }
            if let Some((chunk, last)) = self.next.take() {
                let sent = self.stream.send_data(chunk, last);
                if last || sent.is_err() {
                    return Poll::Ready(Ok(()));
                }
            }
            let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)) else {
                let _over = self.stream.send_data(Bytes::new(), true);
                return Poll::Ready(Ok(()));
            };
            match frame.map_err(|_broken| ())?.into_data() {
                Ok(chunk) => {
                    // One byte, and only once there is a chunk: a caller that sends nothing takes no window from other
                    // streams.
                    self.stream.reserve_capacity(usize::from(!chunk.is_empty()));
                    self.next = Some((chunk, self.body.is_end_stream()));
                }
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    let _over = self.stream.send_trailers(trailers);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::lifetime::LifetimeBounds;
    use h2::server::{self, SendResponse};
    use tokio::io::DuplexStream;
    use tokio::task::LocalSet;
    use tokio::time::timeout;

    type Server = server::Connection<DuplexStream, Bytes>;

    async fn pair() -> (Rc<Http2>, Server) {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let server = tasks::spawn(async move { server::handshake(theirs).await.unwrap() });
        let bounds = LifetimeBounds { max_age: Duration::from_secs(3600), max_requests: None };
        let client = Http2::new(Io::boxed(ours), Lifetime::new(bounds, Instant::now(), 0.0));
        // The SETTINGS are written when the connection is polled.
        let driven = async {
            let mut server = server.await.unwrap();
            let _nothing_yet = timeout(Duration::from_millis(10), server.accept()).await;
            server
        };
        let (client, server) = tokio::join!(Box::pin(client), Box::pin(driven));
        let client = client.unwrap_or_else(|error| panic!("{error}"));
        client.begin_stream();
        (client, server)
    }

    fn request() -> Request<RequestBody> {
        let body = RequestBody::empty(Rc::new(Flow::new(Instant::now())));
        Request::get("http://shop.test/").body(body).unwrap()
    }

    async fn next(server: &mut Server) -> SendResponse<Bytes> {
        server.accept().await.unwrap().unwrap().1
    }

    async fn failed(call: impl Future<Output = Result<Response<UpstreamBody>, SendError>>) -> SendError {
        match call.await {
            Ok(response) => panic!("a response: {}", response.status()),
            Err(error) => error,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_stream_is_unprocessed_and_any_other_reset_is_not() {
        let test = Box::pin(async {
            let (client, mut server) = pair().await;
            for (reason, unprocessed) in [(Reason::REFUSED_STREAM, true), (Reason::INTERNAL_ERROR, false)] {
                let call = tasks::spawn(failed(client.send(request())));
                next(&mut server).await.send_reset(reason);
                let driven = async { timeout(Duration::from_secs(1), server.accept()).await };
                let (error, _nothing) = tokio::join!(call, driven);
                let error = error.unwrap();
                assert_eq!((error.error.is_unprocessed(), error.unsent.is_none()), (unprocessed, true), "{reason}");
                assert!(!error.error.is_malformed(), "{}", error.error.with_causes());
            }
        });
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_dropped_resets_its_stream() {
        let test = Box::pin(async {
            let (client, mut server) = pair().await;
            let call = tasks::spawn(client.send(request()));
            let mut response = next(&mut server).await;
            call.abort();
            let driven = async { timeout(Duration::from_secs(1), server.accept()).await };
            let (reset, _nothing) = tokio::join!(poll_fn(|cx| response.poll_reset(cx)), driven);
            assert_eq!(reset.unwrap(), Reason::CANCEL);
        });
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_after_goaway_returns_the_request_unsent() {
        let test = Box::pin(async {
            let (client, mut server) = pair().await;
            server.graceful_shutdown();
            tasks::spawn(async move { while let Some(Ok(_)) = server.accept().await {} });
            sleep(Duration::from_secs(1)).await;
            assert!(!client.is_open() && !client.has_capacity());
            assert!(failed(client.send(request())).await.unsent.is_some());
        });
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_acknowledges_pings_is_waited_for_and_one_that_does_not_is_closed() {
        let test = Box::pin(async {
            let (client, mut server) = pair().await;
            let began = Instant::now();
            let call = tasks::spawn(failed(client.send(request())));
            let response = next(&mut server).await;
            // While the server is polled, it acknowledges pings and sends nothing else.
            let _acknowledges_pings = timeout(Duration::from_secs(300), server.accept()).await;
            assert!(client.is_open() && !call.is_finished());
            let error = call.await.unwrap();
            assert!(matches!(error.error, UpstreamError::PingTimeout), "{}", error.error.with_causes());
            // The second ping comes no sooner than gRPC allows after the first.
            let silent = began.elapsed();
            assert!(silent >= Duration::from_secs(20 + 300) && silent <= Duration::from_secs(400), "{silent:?}");
            assert!(!client.is_open());
            drop((response, server));
        });
        LocalSet::new().run_until(test).await;
    }
}
