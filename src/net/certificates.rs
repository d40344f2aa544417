//! TLS settings (rustls) from certificates, keys and roots in PEM files.
//!
//! `listener::tls` uses the server settings, `upstream::cluster` the client settings. Invariants: every error names the
//! file; settings are never changed, only replaced, so an open connection keeps those of its handshake.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// The protocols offered by ALPN, the preferred one first.
const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Why TLS settings could not be built.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file could not be read, or holds no PEM section of the wanted kind.
    #[error("cannot read {what} from {path}: {source}", path = path.display())]
    Read {
        /// `certificates` or `a private key`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the PEM reader.
        source: rustls::pki_types::pem::Error,
    },
    /// The file holds no certificate.
    #[error("{path} holds no certificate", path = .0.display())]
    Empty(PathBuf),
    /// Key and certificate do not match, or a certificate is malformed.
    #[error("{path} cannot be used: {source}", path = path.display())]
    Unusable {
        /// The file of the certificate.
        path: PathBuf,
        /// The error of rustls.
        source: rustls::Error,
    },
    /// The system has no root certificates.
    #[error("the system has no root certificates; give `tls.ca` in the policy")]
    NoRoots,
}

/// Settings for a listener: the certificate chain with its key; ALPN offers `h2` and `http/1.1`.
///
/// # Errors
/// If a file cannot be read, holds no certificate or key, or if key and certificate do not match.
pub fn server(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, CertificateError> {
    let chain = chain(certificate)?;
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|source| CertificateError::Read {
        what: "a private key",
        path: key.into(),
        source,
    })?;
    let unusable = |source| CertificateError::Unusable { path: certificate.into(), source };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, key_der)
        .map_err(unusable)?;
    config.alpn_protocols = ALPN.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}

/// The system's root certificates, read on first use. Make one per load: the system's files may have changed since the
/// last load.
#[derive(Debug, Default)]
pub struct SystemRoots(OnceCell<Arc<RootCertStore>>);

impl SystemRoots {
    fn get(&self) -> Result<Arc<RootCertStore>, CertificateError> {
        let roots = self.0.get_or_init(|| {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            Arc::new(roots)
        });
        if roots.is_empty() { Err(CertificateError::NoRoots) } else { Ok(Arc::clone(roots)) }
    }
}

/// Settings for connections to an upstream: roots from the PEM file `ca`, else those of the `system`; ALPN offers `h2` if
/// `http2`, and `http/1.1` if `http1`. No client certificate.
///
/// # Errors
/// If `ca` cannot be read or holds no usable certificate, or the system has no roots.
pub fn client(
    ca: Option<&Path>,
    system: &SystemRoots,
    http1: bool,
    http2: bool,
) -> Result<Arc<ClientConfig>, CertificateError> {
    let roots = match ca {
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in chain(path)? {
                roots.add(certificate).map_err(|source| CertificateError::Unusable { path: path.into(), source })?;
            }
            Arc::new(roots)
        }
        None => system.get()?,
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|source| CertificateError::Unusable { path: ca.unwrap_or(Path::new("system roots")).into(), source })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols =
        ALPN.iter().zip([http2, http1]).filter(|(_, is_offered)| *is_offered).map(|(name, _)| name.to_vec()).collect();
    Ok(Arc::new(config))
}

/// The same settings with ALPN limited to `http/1.1`, for a connection that has to be HTTP/1.1.
pub fn http1_only(config: &ClientConfig) -> Arc<ClientConfig> {
    let mut config = config.clone();
    config.alpn_protocols = vec![ALPN[1].to_vec()];
    Arc::new(config)
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let read = |source| CertificateError::Read { what: "certificates", path: path.into(), source };
    let chain: Vec<_> = CertificateDer::pem_file_iter(path).map_err(read)?.collect::<Result<_, _>>().map_err(read)?;
    if chain.is_empty() {
        return Err(CertificateError::Empty(path.into()));
    }
    Ok(chain)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
