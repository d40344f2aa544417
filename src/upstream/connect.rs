//! Opening a connection: TCP, then TLS if the cluster has `tls`.
//!
//! `dial` calls it, sets the time limit and adds HTTP. Tests replace the network by an implementation of [`Connect`] in
//! memory.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
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
    /// The connection was not open within `timeouts.connect`.
    #[error("the connection was not open within `timeouts.connect`")]
    Timeout,
}

/// An open stream, ready for the first byte of HTTP.
pub struct Connected {
    /// The stream.
    pub io: Io,
    /// True if HTTP/2 was agreed by ALPN.
    pub http2: bool,
}

/// The future of [`Connect::connect`].
pub type ConnectFuture = Pin<Box<dyn Future<Output = Result<Connected, ConnectError>>>>;

/// Opens connections.
pub trait Connect {
    /// Opens a stream; with `tls`, the peer needs a certificate for the address' server name. Has no time limit.
    fn connect(&self, to: &Address, tls: Option<Arc<ClientConfig>>) -> ConnectFuture;
}

/// Opens connections over TCP.
#[derive(Debug, Clone, Copy, Default)]
pub struct Network;

impl Connect for Network {
    fn connect(&self, to: &Address, tls: Option<Arc<ClientConfig>>) -> ConnectFuture {
        let to = to.clone();
        Box::pin(async move {
            let stream = socket::connect(to.socket).await.map_err(ConnectError::Network)?;
            match tls {
                None => Ok(Connected { io: Io::tcp(stream), http2: false }),
                Some(config) => handshake(stream, &to.server_name, config).await,
            }
        })
    }
}

async fn handshake(
    stream: tokio::net::TcpStream,
    name: &str,
    config: Arc<ClientConfig>,
) -> Result<Connected, ConnectError> {
    let name = ServerName::try_from(name.to_owned())
        .map_err(|error| ConnectError::Tls(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(ConnectError::Tls)?;
    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    Ok(Connected { io: Io::tls(stream), http2 })
}

/// The [`Connect`] that all pools of a worker share.
pub type Connector = Rc<dyn Connect>;
