//! A caller or an upstream that speaks in bytes, so that a test can be slow, early, or out of turn.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::SOON;

/// One end of a connection.
pub(crate) struct Wire {
    pub(crate) stream: TcpStream,
    seen: Vec<u8>,
}

impl Wire {
    pub(crate) async fn open(to: SocketAddr) -> Self {
        Self::over(TcpStream::connect(to).await.unwrap())
    }

    pub(crate) fn over(stream: TcpStream) -> Self {
        Self { stream, seen: Vec::new() }
    }

    /// Sends; whether the other side still takes it is seen by reading.
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _gone = self.stream.write_all(bytes.as_ref()).await;
    }

    /// Reads until `mark` has come; returns everything up to its end and leaves the rest.
    pub(crate) async fn until(&mut self, mark: &str) -> String {
        loop {
            if let Some(at) = find(&self.seen, mark.as_bytes()) {
                let rest = self.seen.split_off(at + mark.len());
                let found = std::mem::replace(&mut self.seen, rest);
                return String::from_utf8_lossy(&found).into_owned();
            }
            let read = timeout(SOON, self.stream.read_buf(&mut self.seen)).await;
            let seen = String::from_utf8_lossy(&self.seen);
            let read = read.unwrap_or_else(|_| panic!("no {mark:?} came, but {seen:?}"));
            assert!(matches!(read, Ok(1..)), "closed before {mark:?}; {read:?} after {seen:?}");
        }
    }

    /// Reads the head of a message.
    pub(crate) async fn head(&mut self) -> String {
        self.until("\r\n\r\n").await
    }

    /// Waits for the first byte of a further message; false if the other side closes instead.
    pub(crate) async fn has_more(&mut self) -> bool {
        !self.seen.is_empty() || self.stream.read_buf(&mut self.seen).await.is_ok_and(|count| count > 0)
    }

    /// Reads until the other side closes; returns what has come.
    pub(crate) async fn rest(&mut self) -> String {
        loop {
            match timeout(SOON, self.stream.read_buf(&mut self.seen)).await {
                Ok(Ok(1..)) => {}
                Ok(_) => return String::from_utf8_lossy(&std::mem::take(&mut self.seen)).into_owned(),
                Err(_) => panic!("not closed, after {:?}", String::from_utf8_lossy(&self.seen)),
            }
        }
    }
}

fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).position(|window| window == mark)
}
