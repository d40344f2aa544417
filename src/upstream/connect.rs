//! Opening a connection: TCP, then TLS if the cluster has `tls`.
//!
//! `dial` calls both, sets the time limits and adds HTTP. Tests replace the network by an implementation of [`Connect`] in
//! memory.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};
use tokio_rustls::TlsConnector;

use crate::net::io::Io;
use crate::net::socket;
use crate::upstream::cluster::Address;
use crate::upstream::response::UpstreamError;

/// Why a connection could not be opened. No byte of a request has been sent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// TCP failed.
    #[error("{0}")]
    Network(#[source] io::Error),
    /// The TLS handshake failed.
    #[error("TLS: {0}")]
    Tls(#[source] io::Error),
    /// The HTTP connection ended before its first request.
    #[error("{}", .0.with_causes())]
    Handshake(#[source] UpstreamError),
    /// The peer answered the HTTP/2 preface with something else, or did not agree on HTTP/2 by ALPN.
    #[error("the peer does not speak HTTP/2")]
    NotHttp2,
    /// The cluster has no address; the text says why.
    #[error("{0}")]
    NoAddress(String),
}

impl ConnectError {
    /// True if the address refuses connections.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Network(error) if error.kind() == io::ErrorKind::ConnectionRefused)
    }
}

/// An open stream, ready for the first byte of HTTP.
pub struct Connected {
    /// The stream.
    pub io: Io,
    /// True if HTTP/2 was agreed by ALPN.
    pub http2: bool,
}

/// The future of [`Connect::connect`].
pub type ConnectFuture = Pin<Box<dyn Future<Output = Result<Io, ConnectError>>>>;

/// Opens TCP connections.
pub trait Connect {
    /// Opens a stream. Has no time limit.
    fn connect(&self, to: SocketAddr) -> ConnectFuture;
}

/// Opens connections over TCP.
#[derive(Debug, Clone, Copy, Default)]
pub struct Network;

impl Connect for Network {
    fn connect(&self, to: SocketAddr) -> ConnectFuture {
        Box::pin(async move { socket::connect(to).await.map(Io::tcp).map_err(ConnectError::Network) })
    }
}

/// The TLS handshake on a new stream; the peer needs a certificate for the address' server name. Has no time limit.
///
/// # Errors
/// If the handshake fails.
pub async fn secure(io: Io, to: &Address, config: Arc<ClientConfig>) -> Result<Connected, ConnectError> {
    let name = ServerName::try_from(String::from(&*to.server_name))
        .map_err(|error| ConnectError::Tls(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
    let tls = TlsConnector::from(config);
    // TLS over the bare socket: its reads and writes are counted above TLS, and need no second count below.
    match io.into_tcp() {
        Ok(stream) => {
            let stream = tls.connect(name, stream).await.map_err(ConnectError::Tls)?;
            let http2 = agreed_on_http2(stream.get_ref().1);
            Ok(Connected { io: Io::tls(stream), http2 })
        }
        Err(io) => {
            let stream = tls.connect(name, io).await.map_err(ConnectError::Tls)?;
            let http2 = agreed_on_http2(stream.get_ref().1);
            Ok(Connected { io: Io::boxed(stream), http2 })
        }
    }
}

fn agreed_on_http2(connection: &ClientConnection) -> bool {
    connection.alpn_protocol() == Some(b"h2")
}

/// The [`Connect`] that all pools of a worker share.
pub type Connector = Rc<dyn Connect>;
