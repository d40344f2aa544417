//! The byte stream of one connection: a TCP socket, or another stream that reads and writes (TLS, memory in a test).
//!
//! Everything above reads and writes through [`Io`]. Bytes that were read early (protocol detection, an upgrade) are
//! returned first. Reads and writes are counted, so that the connection's server or client can tell an idle peer from a busy
//! one.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::net::socket;

/// A stream that is not a TCP socket.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Vectored writes up to this many bytes are copied together and written as one.
const MAX_JOINED: usize = 4096;

thread_local! {
    /// Buffer in which small pieces are joined; one per worker, so that idle connections need none.
    static JOIN_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

enum Kind {
    /// The common case, without dynamic dispatch.
    Tcp(TcpStream),
    Boxed(Box<dyn Stream>),
}

/// Counters of the successful reads and writes of a stream, shared with the connection's timeouts.
#[derive(Default)]
pub struct Activity {
    reads: AtomicU64,
    writes: AtomicU64,
}

impl Activity {
    /// Reads that returned at least one byte, since the stream was made.
    pub fn reads(&self) -> u64 {
        self.reads.load(Relaxed)
    }

    /// Reads and writes that moved at least one byte, since the stream was made.
    pub fn total(&self) -> u64 {
        self.reads.load(Relaxed) + self.writes.load(Relaxed)
    }
}

/// One byte stream.
pub struct Io {
    prefix: Bytes,
    kind: Kind,
    activity: Arc<Activity>,
}

impl Io {
    /// Wraps a TCP socket.
    pub fn tcp(stream: TcpStream) -> Self {
        Self::new(Kind::Tcp(stream))
    }

    /// Wraps any other stream: TLS, or memory in a test.
    pub fn boxed(stream: impl Stream + 'static) -> Self {
        Self::new(Kind::Boxed(Box::new(stream)))
    }

    fn new(kind: Kind) -> Self {
        Self { prefix: Bytes::new(), kind, activity: Arc::default() }
    }

    /// The same stream, which first yields `prefix` again.
    #[must_use]
    pub fn with_prefix(mut self, prefix: Bytes) -> Self {
        self.prefix = prefix;
        self
    }

    /// Drops the stream so that the peer cannot mistake a truncated message for a complete one: a TCP socket is reset, TLS
    /// ends without `close_notify`.
    pub fn abort(self) {
        if let Kind::Tcp(stream) = &self.kind {
            socket::reset_on_drop(stream);
        }
    }

    /// The TCP socket; the stream itself if it is another one, or if bytes that were read early are left.
    ///
    /// # Errors
    /// The stream.
    pub fn into_tcp(self) -> Result<TcpStream, Self> {
        match self {
            Self { kind: Kind::Tcp(stream), prefix, .. } if prefix.is_empty() => Ok(stream),
            other => Err(other),
        }
    }

    /// The counters of this stream; valid after the stream is dropped.
    pub fn activity(&self) -> Arc<Activity> {
        Arc::clone(&self.activity)
    }
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.prefix.has_remaining() {
            let count = this.prefix.len().min(buf.remaining());
            buf.put_slice(&this.prefix.split_to(count));
            increment(&this.activity.reads);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let polled = match &mut this.kind {
            Kind::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Kind::Boxed(stream) => Pin::new(stream).poll_read(cx, buf),
        };
        if buf.filled().len() > before {
            increment(&this.activity.reads);
        }
        polled
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let polled = match &mut this.kind {
            Kind::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Kind::Boxed(stream) => Pin::new(stream).poll_write(cx, buf),
        };
        this.count_write(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let polled = match &mut this.kind {
            Kind::Tcp(stream) => write_joined(Pin::new(stream), cx, bufs),
            Kind::Boxed(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        };
        this.count_write(polled)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.kind {
            Kind::Tcp(stream) => stream.is_write_vectored(),
            Kind::Boxed(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.kind {
            Kind::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Kind::Boxed(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.kind {
            Kind::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Kind::Boxed(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Writes small pieces as one: in the kernel a plain send costs less than a vectored write, by more than the copy costs.
fn write_joined(
    stream: Pin<&mut TcpStream>,
    cx: &mut Context<'_>,
    bufs: &[io::IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    if let [only] = bufs {
        return stream.poll_write(cx, only);
    }
    if bufs.iter().map(|buf| buf.len()).sum::<usize>() > MAX_JOINED {
        return stream.poll_write_vectored(cx, bufs);
    }
    JOIN_BUFFER.with_borrow_mut(|joined| {
        joined.clear();
        bufs.iter().for_each(|buf| joined.extend_from_slice(buf));
        stream.poll_write(cx, joined)
    })
}

impl Io {
    fn count_write(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(polled, Poll::Ready(Ok(n)) if n > 0) {
            increment(&self.activity.writes);
        }
        polled
    }
}

/// Only one thread writes a counter, so that a load and a store are enough.
fn increment(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_prefix_is_read_before_the_stream() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut io = Io::boxed(ours).with_prefix(Bytes::from_static(b"GET "));
        theirs.write_all(b"/ HTTP/1.1").await.unwrap();
        drop(theirs);
        let mut all = String::new();
        io.read_to_string(&mut all).await.unwrap();
        assert_eq!(all, "GET / HTTP/1.1");
    }

    #[tokio::test]
    async fn only_moved_bytes_count_as_activity() {
        let (ours, theirs) = tokio::io::duplex(64);
        let mut io = Io::boxed(ours);
        let activity = io.activity();
        io.write_all(b"x").await.unwrap();
        drop(theirs);
        assert_eq!(io.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!((activity.reads(), activity.total()), (0, 1));
    }
}
