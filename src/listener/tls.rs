//! A listener's certificates: shared by all workers, replaced when the files change.
//!
//! Second step of a connection on a listener with `tls`. A connection keeps the certificate of its handshake.

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
    /// Reads the certificate chain and the key.
    ///
    /// # Errors
    /// If a file cannot be read, or key and certificate cannot be used together.
    pub fn load(files: &ListenerTls) -> Result<Arc<Self>, CertificateError> {
        let config = certificates::server(&files.certificate, &files.key)?;
        Ok(Arc::new(Self { files: files.clone(), config: ArcSwap::new(config) }))
    }

    /// Reads the files again; open connections keep their certificate.
    ///
    /// # Errors
    /// If the new files cannot be used; the previous certificates stay in use.
    pub fn reload(&self) -> Result<(), CertificateError> {
        self.config.store(certificates::server(&self.files.certificate, &self.files.key)?);
        Ok(())
    }

    /// Paths of the files.
    pub fn files(&self) -> &ListenerTls {
        &self.files
    }

    /// Does the TLS handshake; returns the protocol agreed by ALPN, `None` if the caller offered neither `h2` nor
    /// `http/1.1`. Has no time limit.
    ///
    /// # Errors
    /// If the handshake fails.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<(Io, Option<DetectedProtocol>)> {
        let stream = TlsAcceptor::from(self.config.load_full()).accept(stream).await?;
        let protocol = match stream.get_ref().1.alpn_protocol() {
            Some(b"h2") => Some(DetectedProtocol::Http2),
            Some(b"http/1.1") => Some(DetectedProtocol::Http1),
            _ => None,
        };
        Ok((Io::tls(stream), protocol))
    }
}
