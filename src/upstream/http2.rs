//! One HTTP/2 connection to an upstream, shared by many requests of one worker.
//!
//! The connection is a task, which ends with the last reference to it or when the peer goes away; a second one pings
//! a peer that has become silent. A request needs no task: the caller's own waits for the head, and moves the
//! caller's body meanwhile. Only a body that goes on beside the answer gets a task, because a caller that does not
//! read may still send. Whoever drops a call before its end resets its stream with CANCEL (RFC 9113, 5.4.2).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::{Ping, PingPong, Reason, SendStream};
use http::{HeaderValue, Method, Request, Response, header};
use http_body::Body;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::net::body::RequestBody;
use crate::net::flow::Flow;
use crate::net::http2 as bounds;
use crate::net::io::{Activity, Io};
use crate::runtime::tasks;
use crate::upstream::connect::ConnectError;
use crate::upstream::response::{Http2Body, SendError, UpstreamBody, UpstreamError};

/// Streams that share one connection at most, also where the peer allows more.
pub const STREAMS: usize = bounds::STREAMS as usize;

/// The longest header section of an answer, in bytes as RFC 9113, 6.5.2 counts them; about what hyper takes over HTTP/1.
const MAX_HEADER_LIST: u32 = 400 * 1024;

/// How much of the callers' bodies a connection holds for one stream, in bytes.
const SEND_BUFFER: usize = 1024 * 1024;

/// How often a new connection is looked at until the peer's settings are there; h2 has no event for it.
const LOOK_FOR_SETTINGS: Duration = Duration::from_millis(1);

/// A connection with streams on it is asked for a sign of life after so many looks at which nothing had come, and given
/// up without one.
const LOOK_EVERY: Duration = Duration::from_secs(5);
const SILENT_LOOKS: u32 = 4;

/// Looks between two pings, whatever has come in between: servers of gRPC take more than one in five minutes for an attack,
/// and end the connection with all its calls (gRFC A8). A host that is gone is found by TCP meanwhile.
const SILENT_LOOKS_AGAIN: u32 = 66;
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// One connection.
pub struct Http2 {
    sender: RefCell<SendRequest<Bytes>>,
    streams: Cell<usize>,
    /// True once a ping was not answered.
    silent: Rc<Cell<bool>>,
    /// When it was opened.
    pub born: Instant,
    idle_since: Cell<Instant>,
}

impl Http2 {
    /// Makes an open stream an HTTP/2 connection and starts its task.
    ///
    /// Waits for the peer's settings: before them nobody knows how many streams it allows, and a request too many would
    /// wait on a full connection. Fails if the peer leaves instead. Sets no time limit.
    pub async fn new(io: Io, now: Instant) -> Result<Rc<Self>, ConnectError> {
        let activity = io.activity();
        let (sender, mut connection) = Builder::new()
            .initial_window_size(bounds::STREAM)
            .initial_connection_window_size(bounds::CONNECTION)
            .initial_max_send_streams(0)
            .max_concurrent_reset_streams(STREAMS)
            .max_local_error_reset_streams(Some(bounds::LATE_FRAMES))
            .max_header_list_size(MAX_HEADER_LIST)
            .max_send_buffer_size(SEND_BUFFER)
            .enable_push(false)
            .handshake(io)
            .await
            .map_err(|error| ConnectError::Handshake(UpstreamError::Http2(error)))?;
        let pings = connection.ping_pong();
        // The error itself reaches the requests that were on the connection.
        let task = tasks::spawn(async move { drop(connection.await) });
        let this = Rc::new(Self {
            sender: RefCell::new(sender),
            streams: Cell::new(0),
            silent: Rc::default(),
            born: now,
            idle_since: Cell::new(now),
        });
        while this.limit() == 0 {
            match this.ended() {
                Some(error) if error.is_malformed() => return Err(ConnectError::NotHttp2),
                Some(error) => return Err(ConnectError::Handshake(error)),
                None => {}
            }
            sleep(LOOK_FOR_SETTINGS).await;
        }
        if let Some(pings) = pings {
            tasks::spawn(watch(Rc::downgrade(&this), activity, pings, task.abort_handle()));
        }
        Ok(this)
    }

    /// True if one more request may be sent now.
    pub fn has_room(&self) -> bool {
        self.is_alive() && self.streams.get() < self.most()
    }

    /// How many requests may be on it at the same time.
    pub fn most(&self) -> usize {
        self.limit().min(STREAMS)
    }

    /// How many streams the peer allows now; zero until it has said so.
    fn limit(&self) -> usize {
        self.sender.borrow().current_max_send_streams()
    }

    /// False once the peer or we have ended it.
    pub fn is_alive(&self) -> bool {
        self.ended().is_none()
    }

    fn ended(&self) -> Option<UpstreamError> {
        // Never has to wait: requests go out through clones, and it is only the one that sent too many that does.
        match self.sender.borrow_mut().poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Err(error)) => Some(UpstreamError::http2(error, &self.silent)),
            Poll::Ready(Ok(())) | Poll::Pending => None,
        }
    }

    /// How long nobody has used it; `None` while somebody does.
    pub fn idle_for(&self, now: Instant) -> Option<Duration> {
        (self.streams.get() == 0).then(|| now.saturating_duration_since(self.idle_since.get()))
    }

    /// Counts a request that begins.
    pub fn begin(&self) {
        self.streams.set(self.streams.get() + 1);
    }

    /// Counts a request that is over.
    pub fn finish(&self, now: Instant) {
        self.streams.set(self.streams.get().saturating_sub(1));
        self.idle_since.set(now);
    }

    /// Sends a request and waits for the head of its answer, moving the caller's body.
    ///
    /// # Errors
    /// With the request, if the connection had ended before it could be sent.
    pub fn send(
        &self,
        request: Request<RequestBody>,
    ) -> impl Future<Output = Result<Response<UpstreamBody>, SendError>> + use<> {
        let begun = self.open(request);
        let silent = Rc::clone(&self.silent);
        async move {
            let (mut head, mut upload) = begun?;
            let answer = poll_fn(|cx| {
                if upload.as_mut().is_some_and(|upload| upload.poll(cx).is_ready()) {
                    upload = None;
                }
                Pin::new(&mut head).poll(cx)
            })
            .await
            .map_err(|error| UpstreamError::http2(error, &silent))?;
            if let Some(mut upload) = upload {
                tasks::spawn(async move { poll_fn(|cx| upload.poll(cx)).await });
            }
            Ok(answer.map(|stream| UpstreamBody::Http2(Http2Body::new(stream, silent))))
        }
    }

    fn open(&self, request: Request<RequestBody>) -> Result<(ResponseFuture, Option<Box<Upload>>), SendError> {
        if let Some(error) = self.ended() {
            return Err(SendError { error, unsent: Some(Box::new(request)) });
        }
        let (mut head, body) = request.into_parts();
        let whole = body.is_end_stream();
        if whole && matches!(head.method, Method::POST | Method::PUT | Method::PATCH) {
            // What a body is expected of says that it has none (RFC 9110, 8.6).
            head.headers.entry(header::CONTENT_LENGTH).or_insert(HeaderValue::from_static("0"));
        }
        let mut sender = self.sender.borrow().clone();
        let sent = sender.send_request(Request::from_parts(head, ()), whole);
        let (answer, stream) = sent.map_err(|error| UpstreamError::http2(error, &self.silent))?;
        let upload = (!whole).then(|| Box::new(Upload { flow: Rc::clone(body.flow()), body, stream, next: None }));
        Ok((answer, upload))
    }
}

/// When a connection has been silent for so long that its peer is asked for a sign of life.
#[derive(Default)]
struct Silence {
    seen: u64,
    looks: u32,
    /// Looks since the peer was asked last, once it has been.
    asked: Option<u32>,
}

impl Silence {
    /// One look: so many reads have brought something so far, and so many calls wait for an answer. True if it is time.
    fn asks(&mut self, reads: u64, streams: usize) -> bool {
        self.asked = self.asked.map(|looks| looks.saturating_add(1));
        let is_silent = reads == self.seen && streams > 0;
        self.seen = reads;
        self.looks = if is_silent { self.looks + 1 } else { 0 };
        self.looks >= SILENT_LOOKS && self.asked.is_none_or(|looks| looks >= SILENT_LOOKS_AGAIN)
    }

    /// The peer has answered, which was a read, too.
    fn answered(&mut self, reads: u64) {
        *self = Self { seen: reads, looks: 0, asked: Some(0) };
    }
}

/// Pings a peer that says nothing although it has calls to answer, and ends the connection if it stays silent.
async fn watch(connection: Weak<Http2>, activity: Arc<Activity>, mut pings: PingPong, task: AbortHandle) {
    let mut silence = Silence::default();
    loop {
        sleep(LOOK_EVERY).await;
        // After a GOAWAY, too, there may be calls that it has to answer.
        let Some(open) = connection.upgrade().filter(|_| !task.is_finished()) else { return };
        let asks = silence.asks(activity.reads(), open.streams.get());
        drop(open);
        if !asks {
            continue;
        }
        match timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_pong)) => silence.answered(activity.reads()),
            Ok(Err(_over)) => return,
            Err(_late) => {
                if let Some(dead) = connection.upgrade() {
                    dead.silent.set(true);
                }
                task.abort();
                return;
            }
        }
    }
}

/// The caller's body on its way into a stream.
struct Upload {
    flow: Rc<Flow>,
    body: RequestBody,
    stream: SendStream<Bytes>,
    /// What was read but could not be sent yet, and whether it is the last.
    next: Option<(Bytes, bool)>,
}

impl Upload {
    /// Ready when there is nothing more to be sent, for good or ill; what went wrong reaches whoever waits for the answer.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match ready!(self.advance(cx)) {
            Ok(()) => {}
            // Before the answer is there, this is also what ends the wait for it.
            Err(()) => self.stream.send_reset(Reason::CANCEL),
        }
        Poll::Ready(())
    }

    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ()>> {
        loop {
            // Looked at first, so that a reset is heard of while the caller is waited for.
            if self.stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            if self.next.as_ref().is_some_and(|(chunk, _)| !chunk.is_empty()) {
                while self.stream.capacity() == 0 {
                    // The body says so itself, but a peer that takes nothing more never lets it.
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
                    // Asked for only now, and only a little, so that a body that does not come takes nothing from others.
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
    use h2::server::{self, SendResponse};
    use tokio::io::DuplexStream;
    use tokio::task::LocalSet;

    type Server = server::Connection<DuplexStream, Bytes>;

    async fn pair() -> (Rc<Http2>, Server) {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let server = tasks::spawn(async move { server::handshake(theirs).await.unwrap() });
        let client = Http2::new(Io::boxed(ours), Instant::now());
        // The settings are written when the connection is moved.
        let moved = async {
            let mut server = server.await.unwrap();
            let _nothing_yet = timeout(Duration::from_millis(10), server.accept()).await;
            server
        };
        let (client, server) = tokio::join!(client, moved);
        let client = client.unwrap_or_else(|error| panic!("{error}"));
        client.begin();
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
            Ok(answer) => panic!("an answer: {}", answer.status()),
            Err(error) => error,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_stream_is_known_to_be_unprocessed_and_any_other_reset_is_not() {
        let test = Box::pin(async {
            let (client, mut server) = pair().await;
            for (reason, unprocessed) in [(Reason::REFUSED_STREAM, true), (Reason::INTERNAL_ERROR, false)] {
                let call = tasks::spawn(failed(client.send(request())));
                next(&mut server).await.send_reset(reason);
                let moved = async { timeout(Duration::from_secs(1), server.accept()).await };
                let (error, _nothing) = tokio::join!(call, moved);
                let error = error.unwrap();
                assert_eq!((error.error.is_unprocessed(), error.unsent.is_none()), (unprocessed, true), "{reason}");
                assert!(!error.error.is_malformed(), "{}", error.error.sentence());
            }
        });
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_dropped_resets_its_stream() {
        let test = Box::pin(async {
            let (client, mut server) = pair().await;
            let call = tasks::spawn(client.send(request()));
            let mut answer = next(&mut server).await;
            call.abort();
            let moved = async { timeout(Duration::from_secs(1), server.accept()).await };
            let (reset, _nothing) = tokio::join!(poll_fn(|cx| answer.poll_reset(cx)), moved);
            assert_eq!(reset.unwrap(), Reason::CANCEL);
        });
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_comes_back_from_a_connection_that_is_going_away() {
        let test = Box::pin(async {
            let (client, mut server) = pair().await;
            server.graceful_shutdown();
            tasks::spawn(async move { while let Some(Ok(_)) = server.accept().await {} });
            sleep(Duration::from_secs(1)).await;
            assert!(!client.is_alive() && !client.has_room());
            assert!(failed(client.send(request())).await.unsent.is_some());
        });
        LocalSet::new().run_until(test).await;
    }

    #[test]
    fn a_silent_peer_is_asked_and_then_left_alone_for_minutes_whatever_it_says() {
        let mut silence = Silence::default();
        let looks = |silence: &mut Silence, reads| (1..).find(|_| silence.asks(reads, 1)).unwrap();
        assert!(!silence.asks(7, 1), "something has come");
        assert_eq!(looks(&mut silence, 7), SILENT_LOOKS);
        silence.answered(8);
        assert_eq!(looks(&mut silence, 8), SILENT_LOOKS_AGAIN);
        assert!(LOOK_EVERY * SILENT_LOOKS_AGAIN > Duration::from_secs(300));
        silence.answered(9);
        assert!(!silence.asks(10, 1), "it has said something");
        assert_eq!(looks(&mut silence, 10), SILENT_LOOKS_AGAIN - 1);
        assert!((0..1000).all(|_| !silence.asks(10, 0)), "no call waits for anything");
        assert_eq!(looks(&mut silence, 10), SILENT_LOOKS);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_answers_no_ping_is_given_up_and_one_that_does_is_waited_for() {
        let test = Box::pin(async {
            let (client, mut server) = pair().await;
            let began = Instant::now();
            let call = tasks::spawn(failed(client.send(request())));
            let answer = next(&mut server).await;
            // While the server is moved, it answers pings, and nothing else.
            let _answers_pings = timeout(Duration::from_secs(300), server.accept()).await;
            assert!(client.is_alive() && !call.is_finished());
            let error = call.await.unwrap();
            assert!(matches!(error.error, UpstreamError::Silent), "{}", error.error.sentence());
            // Asked again no sooner than gRPC allows after the ping that was answered.
            let silent = began.elapsed();
            assert!(silent >= Duration::from_secs(20 + 300) && silent <= Duration::from_secs(400), "{silent:?}");
            assert!(!client.is_alive());
            drop((answer, server));
        });
        LocalSet::new().run_until(test).await;
    }
}
