//! One end of a connection, plain or over TLS, that ends in the way that the test says and sees how the other side ends.

use std::io::ErrorKind;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsStream;

use super::SOON;

/// How one side of a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// FIN; over TLS after `close_notify`.
    Fin,
    /// FIN without `close_notify`, over TLS only.
    Truncated,
    /// RST.
    Reset,
}

enum Line {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// One end of a connection.
pub(crate) struct Peer {
    line: Option<Line>,
    seen: Vec<u8>,
}

impl Peer {
    pub(crate) fn tcp(stream: TcpStream) -> Self {
        Self { line: Some(Line::Tcp(stream)), seen: Vec::new() }
    }

    pub(crate) fn tls(stream: impl Into<TlsStream<TcpStream>>) -> Self {
        Self { line: Some(Line::Tls(Box::new(stream.into()))), seen: Vec::new() }
    }

    /// Sends; whether the other side still takes it is seen by reading.
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        let _gone = match self.line.as_mut() {
            Some(Line::Tcp(stream)) => stream.write_all(bytes).await,
            Some(Line::Tls(stream)) => match stream.write_all(bytes).await {
                Ok(()) => stream.flush().await,
                Err(error) => Err(error),
            },
            None => Ok(()),
        };
    }

    /// Ends the sending side, or with RST the connection.
    pub(crate) async fn end(&mut self, how: Ending) {
        let _gone = match (how, self.line.as_mut()) {
            (_, None) => Ok(()),
            (Ending::Reset, Some(line)) => {
                let stream = match line {
                    Line::Tcp(stream) => stream,
                    Line::Tls(stream) => stream.get_mut().0,
                };
                let set = SockRef::from(&*stream).set_linger(Some(Duration::ZERO));
                self.line = None;
                set
            }
            (Ending::Fin | Ending::Truncated, Some(Line::Tcp(stream))) => stream.shutdown().await,
            (Ending::Fin, Some(Line::Tls(stream))) => stream.shutdown().await,
            (Ending::Truncated, Some(Line::Tls(stream))) => stream.get_mut().0.shutdown().await,
        };
    }

    /// Reads at least one byte more.
    async fn fill(&mut self) -> Result<(), Ending> {
        let read = match self.line.as_mut() {
            Some(Line::Tcp(stream)) => timeout(SOON, stream.read_buf(&mut self.seen)).await,
            Some(Line::Tls(stream)) => timeout(SOON, stream.read_buf(&mut self.seen)).await,
            None => return Err(Ending::Reset),
        };
        match read.unwrap_or_else(|_| panic!("nothing comes after {:?}", String::from_utf8_lossy(&self.seen))) {
            Ok(0) => Err(Ending::Fin),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(Ending::Truncated),
            Err(_) => Err(Ending::Reset),
        }
    }

    /// Reads so many bytes.
    pub(crate) async fn exact(&mut self, count: usize) -> Result<Vec<u8>, Ending> {
        while self.seen.len() < count {
            self.fill().await?;
        }
        let rest = self.seen.split_off(count);
        Ok(std::mem::replace(&mut self.seen, rest))
    }

    /// Reads until `mark` has come; returns everything up to its end and leaves the rest.
    pub(crate) async fn until(&mut self, mark: &str) -> Result<String, Ending> {
        loop {
            let found = self.seen.windows(mark.len()).position(|window| window == mark.as_bytes());
            if let Some(at) = found {
                let found = self.exact(at + mark.len()).await?;
                return Ok(String::from_utf8_lossy(&found).into_owned());
            }
            self.fill().await?;
        }
    }

    /// Reads until the other side ends; returns what has come, and how it ended.
    pub(crate) async fn rest(&mut self) -> (String, Ending) {
        loop {
            if let Err(how) = self.fill().await {
                return (String::from_utf8_lossy(&std::mem::take(&mut self.seen)).into_owned(), how);
            }
        }
    }

    /// Reads until what has come is enough, or the other side ends.
    pub(crate) async fn read_while(&mut self, is_enough: impl Fn(&[u8]) -> bool) -> Result<(), Ending> {
        while !is_enough(&self.seen) {
            self.fill().await?;
        }
        Ok(())
    }
}
