//! One HTTP/2 connection to an upstream, shared by many requests of one worker.
//!
//! Its task ends with the last reference to it, or when the peer goes away.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http2::{self, Builder, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::time::{Instant, sleep};

use crate::net::body::RequestBody;
use crate::net::io::Io;
use crate::runtime::tasks::{self, LocalExecutor};
use crate::upstream::connect::ConnectError;

/// How much an upstream may send ahead on one stream, and on one connection, in bytes.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 2 * 1024 * 1024;

/// How often a new connection is looked at until the peer's settings are there; hyper has no event for it.
const LOOK_FOR_SETTINGS: Duration = Duration::from_millis(1);

/// A connection with streams on it is asked for a sign of life this often, and given up without one.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

type Connection = http2::Connection<TokioIo<Io>, RequestBody, LocalExecutor>;

/// One connection.
pub struct Http2 {
    sender: RefCell<SendRequest<RequestBody>>,
    streams: Cell<usize>,
    connection: Rc<RefCell<Connection>>,
    alive: Rc<Cell<bool>>,
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
        let (sender, connection) = Builder::new(LocalExecutor)
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_max_send_streams(0)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .handshake(TokioIo::new(io))
            .await
            .map_err(ConnectError::Handshake)?;
        let connection: Rc<RefCell<Connection>> = Rc::new(RefCell::new(connection));
        let alive = Rc::new(Cell::new(true));
        let this = Rc::new(Self {
            sender: RefCell::new(sender),
            streams: Cell::new(0),
            connection: Rc::clone(&connection),
            alive: Rc::clone(&alive),
            born: now,
            idle_since: Cell::new(now),
        });
        tasks::spawn(async move {
            // The error itself reaches the requests that were on the connection.
            poll_fn(|cx| Pin::new(&mut *connection.borrow_mut()).poll(cx).map(|_| ())).await;
            alive.set(false);
        });
        while this.limit() == 0 {
            if !this.is_alive() {
                return Err(ConnectError::NotHttp2);
            }
            sleep(LOOK_FOR_SETTINGS).await;
        }
        Ok(this)
    }

    /// True if one more request may be sent now.
    pub fn has_room(&self) -> bool {
        self.is_alive() && self.streams.get() < self.limit()
    }

    /// How many streams the peer allows now; zero until it has said so.
    fn limit(&self) -> usize {
        self.connection.borrow().current_max_send_streams()
    }

    /// False once the peer or we have ended it.
    pub fn is_alive(&self) -> bool {
        self.alive.get() && !self.sender.borrow().is_closed()
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

    /// Sends a request; the connection's own task moves it.
    pub fn send(
        &self,
        request: Request<RequestBody>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<RequestBody>>>> + use<> {
        self.sender.borrow_mut().try_send_request(request)
    }
}
