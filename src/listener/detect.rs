//! HTTP/1 or HTTP/2, by the first bytes (RFC 9113, 3.4): HTTP/2 begins with a preface that is no HTTP/1 request.

use std::io;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;

use crate::net::io::Io;

/// What an HTTP/2 connection begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Read at once; most first requests fit, so that they are not read in two pieces.
const FIRST_READ: usize = 1024;

/// What a caller speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DetectedProtocol {
    /// HTTP/1.0 or HTTP/1.1, or nothing that can be understood.
    Http1,
    /// HTTP/2.
    Http2,
}

/// Reads until it is clear what the caller speaks, and hands the stream back with all its bytes.
///
/// `None` if the caller left before it said anything. Sets no time limit.
pub async fn detect(mut io: Io) -> io::Result<Option<(DetectedProtocol, Io)>> {
    let mut seen = BytesMut::with_capacity(FIRST_READ);
    loop {
        let count = io.read_buf(&mut seen).await?;
        if count == 0 && seen.is_empty() {
            return Ok(None);
        }
        let spoken = judge(&seen).or((count == 0).then_some(DetectedProtocol::Http1));
        if let Some(spoken) = spoken {
            return Ok(Some((spoken, io.with_prefix(seen.freeze()))));
        }
    }
}

/// What the first bytes say, once they say it.
pub fn judge(seen: &[u8]) -> Option<DetectedProtocol> {
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
        assert_eq!(judge(PREFACE), Some(DetectedProtocol::Http2));
        assert_eq!(judge(b"PRI * HTTP/1.1\r\n"), Some(DetectedProtocol::Http1));
        assert_eq!(judge(b"GET / HTTP/1.1\r\n"), Some(DetectedProtocol::Http1));
        assert_eq!(judge(b"POST"), Some(DetectedProtocol::Http1));
        for length in 0..PREFACE.len() {
            assert_eq!(judge(&PREFACE[..length]), None, "{length}");
        }
    }

    #[tokio::test]
    async fn no_byte_is_lost_however_slowly_they_come() {
        let (ours, mut theirs) = tokio::io::duplex(4);
        let sent = [PREFACE, b"more"].concat();
        let writing = async {
            theirs.write_all(&sent).await.unwrap();
            drop(theirs);
        };
        let reading = async {
            let (spoken, mut io) = detect(Io::boxed(ours)).await.unwrap().unwrap();
            let mut all = Vec::new();
            io.read_to_end(&mut all).await.unwrap();
            (spoken, all)
        };
        let ((), (spoken, all)) = tokio::join!(writing, reading);
        assert_eq!((spoken, all), (DetectedProtocol::Http2, sent));
    }
}
