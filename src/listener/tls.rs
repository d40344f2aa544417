//! A listener's certificates: shared by all workers, swapped when the files change.

use std::io;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use crate::listener::detect::DetectedProtocol;
use crate::net::certificates::{self, CertificateError};
use crate::net::io::Io;
use crate::policy::model::ListenerTls;

/// The certificates of one listener.
pub struct Certificates {
    files: ListenerTls,
    config: ArcSwap<ServerConfig>,
}

impl Certificates {
    /// Reads the files.
    ///
    /// # Errors
    /// If they cannot be used.
    pub fn load(files: &ListenerTls) -> Result<Arc<Self>, CertificateError> {
        let config = certificates::server(&files.certificate, &files.key)?;
        Ok(Arc::new(Self { files: files.clone(), config: ArcSwap::new(config) }))
    }

    /// Reads the files again; connections that exist keep what they have.
    ///
    /// # Errors
    /// If they cannot be used; the old ones stay then.
    pub fn reload(&self) -> Result<(), CertificateError> {
        self.config.store(certificates::server(&self.files.certificate, &self.files.key)?);
        Ok(())
    }

    /// The files.
    pub fn files(&self) -> &ListenerTls {
        &self.files
    }

    /// Agrees on TLS with a caller. `None` in the second place if the caller offered no protocol.
    ///
    /// # Errors
    /// If the caller cannot.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<(Io, Option<DetectedProtocol>)> {
        let stream = TlsAcceptor::from(self.config.load_full()).accept(stream).await?;
        let spoken = match stream.get_ref().1.alpn_protocol() {
            Some(b"h2") => Some(DetectedProtocol::Http2),
            Some(b"http/1.1") => Some(DetectedProtocol::Http1),
            _ => None,
        };
        Ok((Io::boxed(stream), spoken))
    }
}
