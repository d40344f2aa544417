//! Protocol detection: HTTP/1 or HTTP/2, by the first bytes of a connection (RFC 9113, 3.4).
//!
//! Runs between accept and `proxy::serve` where TLS has not agreed on a protocol by ALPN. HTTP/2 begins with a preface that
//! is no HTTP/1 request. Invariant: every byte read here is read again by the server that follows.

use std::io;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;

use crate::net::io::Io;

/// The client's connection preface (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes of the first read; most first requests fit, so that they are not read in two pieces.
const FIRST_READ: usize = 1024;

/// The protocol of a downstream connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DetectedProtocol {
    /// HTTP/1.0 or HTTP/1.1, or bytes of no known protocol, which the HTTP/1 server rejects.
    Http1,
    /// HTTP/2.
    Http2,
}

/// Reads until the protocol is known, and returns the stream with all its bytes.
///
/// `None` if the caller closed the connection before its first byte. Has no time limit.
///
/// # Errors
/// If the stream cannot be read.
pub async fn detect(mut io: Io) -> io::Result<Option<(DetectedProtocol, Io)>> {
    let mut seen = BytesMut::with_capacity(FIRST_READ);
    loop {
        let count = io.read_buf(&mut seen).await?;
        if count == 0 && seen.is_empty() {
            return Ok(None);
        }
        let protocol = classify(&seen).or((count == 0).then_some(DetectedProtocol::Http1));
        if let Some(protocol) = protocol {
            return Ok(Some((protocol, io.with_prefix(seen.freeze()))));
        }
    }
}

/// The protocol that the first bytes belong to; `None` while more bytes are needed.
pub fn classify(seen: &[u8]) -> Option<DetectedProtocol> {
    let compared = seen.len().min(PREFACE.len());
    if seen[..compared] != PREFACE[..compared] {
        return Some(DetectedProtocol::Http1);
    }
    (compared == PREFACE.len()).then_some(DetectedProtocol::Http2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[test]
    fn only_the_whole_preface_is_http2() {
        assert_eq!(classify(PREFACE), Some(DetectedProtocol::Http2));
        assert_eq!(classify(b"PRI * HTTP/1.1\r\n"), Some(DetectedProtocol::Http1));
        assert_eq!(classify(b"GET / HTTP/1.1\r\n"), Some(DetectedProtocol::Http1));
        assert_eq!(classify(b"POST"), Some(DetectedProtocol::Http1));
        for length in 0..PREFACE.len() {
            assert_eq!(classify(&PREFACE[..length]), None, "{length}");
        }
    }

    #[tokio::test]
    async fn no_byte_is_lost_in_small_reads() {
        let (ours, mut theirs) = tokio::io::duplex(4);
        let sent = [PREFACE, b"more"].concat();
        let writing = async {
            theirs.write_all(&sent).await.unwrap();
            drop(theirs);
        };
        let reading = async {
            let (protocol, mut io) = detect(Io::boxed(ours)).await.unwrap().unwrap();
            let mut all = Vec::new();
            io.read_to_end(&mut all).await.unwrap();
            (protocol, all)
        };
        let ((), (protocol, all)) = tokio::join!(writing, reading);
        assert_eq!((protocol, all), (DetectedProtocol::Http2, sent));
    }
}
