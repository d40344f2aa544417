//! Opening a connection: TCP, then TLS where the cluster wants it.
//!
//! [`Connect`] is the seam at which tests put memory in the network's place. The time limit is that of [`super::dial`].

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

/// Why a connection could not be opened. Nothing of any request has been sent then.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The network said no.
    #[error("{0}")]
    Network(#[source] io::Error),
    /// TLS could not be agreed.
    #[error("TLS: {0}")]
    Tls(#[source] io::Error),
    /// HTTP could not begin.
    #[error("{}", .0.sentence())]
    Handshake(#[source] UpstreamError),
    /// The peer did not answer the HTTP/2 preface, or did not agree on HTTP/2 in TLS.
    #[error("the peer does not speak HTTP/2")]
    NotHttp2,
    /// No address is known.
    #[error("{0}")]
    NoAddress(String),
    /// It was not open within `timeouts.connect`.
    #[error("not in time")]
    Late,
}

/// A connection, ready for the first byte of HTTP.
pub struct Connected {
    /// The stream.
    pub io: Io,
    /// True if TLS agreed on HTTP/2.
    pub http2: bool,
}

/// A connection that is being opened.
pub type Connecting = Pin<Box<dyn Future<Output = Result<Connected, ConnectError>>>>;

/// Opens connections.
pub trait Connect {
    /// Begins to connect; with `tls`, the peer has to show a certificate for the address' server name.
    fn connect(&self, to: &Address, tls: Option<Arc<ClientConfig>>) -> Connecting;
}

/// Opens connections over the network.
#[derive(Debug, Clone, Copy, Default)]
pub struct Network;

impl Connect for Network {
    fn connect(&self, to: &Address, tls: Option<Arc<ClientConfig>>) -> Connecting {
        let to = to.clone();
        Box::pin(async move {
            let stream = socket::connect(to.socket).await.map_err(ConnectError::Network)?;
            match tls {
                None => Ok(Connected { io: Io::tcp(stream), http2: false }),
                Some(config) => encrypt(stream, &to.server_name, config).await,
            }
        })
    }
}

async fn encrypt(
    stream: tokio::net::TcpStream,
    name: &str,
    config: Arc<ClientConfig>,
) -> Result<Connected, ConnectError> {
    let name = ServerName::try_from(name.to_owned())
        .map_err(|error| ConnectError::Tls(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(ConnectError::Tls)?;
    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    Ok(Connected { io: Io::boxed(stream), http2 })
}

/// What the pools of a worker share to open connections.
pub type Connector = Rc<dyn Connect>;
