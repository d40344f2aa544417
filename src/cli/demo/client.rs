//! The HTTP client of the demo's services and of its load: one address, persistent connections, no timeout.
//!
//! Without a timeout of the client, hopguard alone ends slow calls.

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

/// Maximum length of a response body, in bytes.
const MAX_BODY: usize = 64 * 1024;

/// Error of a call without a response: the connection failed or was closed.
pub(super) type CallError = Box<dyn std::error::Error + Send + Sync>;

type Sender = SendRequest<Empty<Bytes>>;

/// Calls one service through the hopguard in front of it.
pub(super) struct Client {
    to: SocketAddr,
    host: &'static str,
    idle: RefCell<Vec<Sender>>,
}

impl Client {
    /// A client for the address `to` and the `Host` value `host`. It connects at the first call.
    pub(super) fn new(to: SocketAddr, host: &'static str) -> Self {
        Self { to, host, idle: RefCell::default() }
    }

    /// Sends a POST without a body to `path` and reads the whole response. Concurrent calls use one connection each; their
    /// number is not bounded here.
    ///
    /// # Errors
    /// If the connection fails, or the body is longer than [`MAX_BODY`].
    pub(super) async fn post(&self, path: &str, headers: HeaderMap) -> Result<(Parts, Bytes), CallError> {
        let mut sender = self.connection().await?;
        let mut request = Request::builder().method(Method::POST).uri(path).body(Empty::new())?;
        *request.headers_mut() = headers;
        request.headers_mut().insert(header::HOST, HeaderValue::from_static(self.host));
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await?.to_bytes();
        if sender.ready().await.is_ok() {
            self.idle.borrow_mut().push(sender);
        }
        Ok((head, body))
    }

    /// The most recently used connection if it is still open, else a new one.
    async fn connection(&self) -> Result<Sender, CallError> {
        while let Some(sender) = self.next_idle() {
            if sender.is_ready() {
                return Ok(sender);
            }
        }
        let stream = TcpStream::connect(self.to).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // The sender of the pending request gets the same error.
        tasks::spawn(async move { connection.await.unwrap_or_default() });
        Ok(sender)
    }

    fn next_idle(&self) -> Option<Sender> {
        self.idle.borrow_mut().pop()
    }
}
