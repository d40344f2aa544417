//! The HTTP client of the demo's services and of its load: one address, kept-alive connections, no timeout at all.
//!
//! That there is no timeout is the point: what ends a slow call in the demo is hopguard.

use std::cell::RefCell;
use std::net::SocketAddr;

use bytes::Bytes;
use http::response::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::runtime::tasks;

/// The longest answer that is read, in bytes.
const LONGEST: usize = 64 * 1024;

/// Why a call has no answer: the connection failed or was cut.
pub(super) type CallError = Box<dyn std::error::Error + Send + Sync>;

type Sender = SendRequest<Empty<Bytes>>;

/// Calls one service through the hopguard in front of it.
pub(super) struct Client {
    to: SocketAddr,
    host: &'static str,
    idle: RefCell<Vec<Sender>>,
}

impl Client {
    /// Connects with the first call.
    pub(super) fn new(to: SocketAddr, host: &'static str) -> Self {
        Self { to, host, idle: RefCell::default() }
    }

    /// POSTs nothing but these fields to `path` and reads the whole answer. As many calls may be under way as there are
    /// callers.
    pub(super) async fn post(&self, path: &str, fields: HeaderMap) -> Result<(Parts, Bytes), CallError> {
        let mut sender = self.connection().await?;
        let mut request = Request::builder().method(Method::POST).uri(path).body(Empty::new())?;
        *request.headers_mut() = fields;
        request.headers_mut().insert(header::HOST, HeaderValue::from_static(self.host));
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, LONGEST).collect().await?.to_bytes();
        if sender.ready().await.is_ok() {
            self.idle.borrow_mut().push(sender);
        }
        Ok((head, body))
    }

    /// The connection used last, if it still stands, else a new one.
    async fn connection(&self) -> Result<Sender, CallError> {
        while let Some(sender) = self.next_idle() {
            if sender.is_ready() {
                return Ok(sender);
            }
        }
        let stream = TcpStream::connect(self.to).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // The error itself reaches whoever waits for an answer on this connection.
        tasks::spawn(async move { connection.await.unwrap_or_default() });
        Ok(sender)
    }

    fn next_idle(&self) -> Option<Sender> {
        self.idle.borrow_mut().pop()
    }
}
