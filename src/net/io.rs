//! The byte stream of one connection: a TCP socket, or another stream that reads and writes (TLS, memory in a test).
//!
//! Everything above reads and writes through [`Io`]. Bytes that were read early (protocol detection, an upgrade) are
//! returned first. Reads and writes are counted, so that the connection's server or client can tell an idle peer from a busy
//! one. Two things differ from a plain socket, once a stream carries HTTP: an upstream that resets the connection behind its
//! response has this response read ([`Io::upstream`]), and TLS ends with `close_notify` when the stream is dropped.

use std::cell::RefCell;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::net::closed_peer;
use crate::net::socket::{self, ResetWatch};

/// A stream that is neither a TCP socket nor TLS over one.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// Vectored writes up to this many bytes are copied together and written as one.
const MAX_JOINED: usize = 4096;

thread_local! {
    /// Buffer in which small pieces are joined; one per worker, so that idle connections need none.
    static JOIN_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Bytes that [`Io::poll_peer`] reads ahead at most.
const MAX_AHEAD: usize = 1024;

enum Kind {
    /// The common case, without dynamic dispatch.
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Boxed(Box<dyn Stream>),
}

/// Calls one method of the stream inside a [`Kind`].
macro_rules! dispatch {
    ($kind:expr, $stream:ident => $call:expr) => {
        match $kind {
            Kind::Tcp($stream) => $call,
            Kind::Tls($stream) => $call,
            Kind::Boxed($stream) => $call,
        }
    };
}

/// Counters of the successful reads and writes of a stream, shared with the connection's timeouts, and how the stream ends
/// when it is dropped.
#[derive(Default)]
pub struct Activity {
    reads: AtomicU64,
    writes: AtomicU64,
    write_failed: AtomicBool,
    resets: AtomicBool,
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

    /// True once the peer has reset the connection while bytes were written: what is written later is discarded. Only of an
    /// [`Io::upstream`].
    pub fn write_failed(&self) -> bool {
        self.write_failed.load(Relaxed)
    }

    /// Sets whether dropping the stream resets its TCP connection, so that the peer cannot mistake a truncated message for
    /// a complete one, and stops what it does for it. At first it does not: the connection ends with FIN. The reset discards
    /// sent bytes that the peer has not acknowledged.
    pub fn set_reset_on_drop(&self, resets: bool) {
        self.resets.store(resets, Relaxed);
    }
}

/// What an [`Io`] does beyond passing bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Nothing: not yet HTTP, or not any more (a tunnel).
    Bare,
    /// HTTP from a caller.
    Downstream,
    /// HTTP to an upstream.
    Upstream,
}

/// What a peer did while HTTP did not read from its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerEvent {
    /// Sent bytes; the next read returns them.
    Sent,
    /// Closed its sending side (FIN, or `close_notify` over TLS); the next read returns the end.
    HalfClosed,
    /// Reset the connection, or broke TLS off.
    Reset,
}

/// What few streams have: an early end, or a failure that is held back.
#[derive(Default)]
struct Trouble {
    /// The peer has reset the connection; true if its end (FIN) had come before, so that the end of what it sent is known.
    write_failed: Option<bool>,
    /// Why the last read failed, behind bytes that are returned first.
    read_error: Option<io::Error>,
    /// The peer has closed its sending side, as [`Io::poll_peer`] has found.
    is_half_closed: bool,
    reset: Option<ResetWatch>,
}

/// One byte stream.
pub struct Io {
    prefix: Bytes,
    kind: Kind,
    role: Role,
    trouble: Option<Box<Trouble>>,
    activity: Arc<Activity>,
}

impl Io {
    /// Wraps a TCP socket.
    pub fn tcp(stream: TcpStream) -> Self {
        Self::new(Kind::Tcp(stream))
    }

    /// Wraps TLS over a TCP socket, once the handshake is done.
    pub fn tls(stream: impl Into<TlsStream<TcpStream>>) -> Self {
        Self::new(Kind::Tls(Box::new(stream.into())))
    }

    /// Wraps any other stream: one of HTTP/2, or memory in a test.
    pub fn boxed(stream: impl Stream + 'static) -> Self {
        Self::new(Kind::Boxed(Box::new(stream)))
    }

    fn new(kind: Kind) -> Self {
        Self { prefix: Bytes::new(), kind, role: Role::Bare, trouble: None, activity: Arc::default() }
    }

    /// The same stream, which first yields `prefix` (again).
    #[must_use]
    pub fn with_prefix(mut self, prefix: Bytes) -> Self {
        self.prefix = match (self.prefix.is_empty(), prefix.is_empty()) {
            (true, _) => prefix,
            (false, true) => self.prefix.clone(),
            (false, false) => [&prefix[..], &self.prefix].concat().into(),
        };
        self
    }

    /// The same stream, which carries HTTP from a caller: dropped, TLS ends with `close_notify` (RFC 9112, 9.8).
    #[must_use]
    pub fn downstream(mut self) -> Self {
        self.role = Role::Downstream;
        self
    }

    /// The same stream, which carries HTTP to an upstream. Dropped, TLS ends with `close_notify`.
    ///
    /// An upstream may respond before it has the whole request, and reset the connection behind the response. The write that
    /// then fails is no error: it and later writes are discarded, and what the upstream has sent is read to its end
    /// (RFC 9112, 9.5), which is at hand because nothing comes behind a reset. Linux keeps it; Windows and BSD do not.
    #[must_use]
    pub fn upstream(mut self) -> Self {
        self.role = Role::Upstream;
        self
    }

    /// The same stream, which carries HTTP no more: dropped, TLS ends without `close_notify`, as a tunnel that breaks off.
    #[must_use]
    pub fn bare(mut self) -> Self {
        self.role = Role::Bare;
        self
    }

    /// Drops the stream so that the peer cannot mistake a truncated message for a complete one: the TCP connection is reset,
    /// TLS ends without `close_notify`.
    pub fn abort(mut self) {
        self.role = Role::Bare;
        self.activity.set_reset_on_drop(true);
    }

    /// The TCP socket; the stream itself if it is another one, or if bytes that were read early are left.
    ///
    /// # Errors
    /// The stream.
    pub fn into_tcp(mut self) -> Result<TcpStream, Self> {
        if !self.prefix.is_empty() {
            return Err(self);
        }
        // A stream that is dropped cannot be taken apart; what is dropped then is an empty one.
        match std::mem::replace(&mut self.kind, Kind::Boxed(Box::new(tokio::io::empty()))) {
            Kind::Tcp(stream) => Ok(stream),
            other => {
                self.kind = other;
                Err(self)
            }
        }
    }

    /// The counters of this stream; valid after the stream is dropped.
    pub fn activity(&self) -> Arc<Activity> {
        Arc::clone(&self.activity)
    }
}

impl Io {
    /// Ready when the peer sends, half-closes or resets while HTTP does not read, because an exchange is in progress. Each event is
    /// reported once; while bytes wait to be read, no other event is.
    pub fn poll_peer(&mut self, cx: &mut Context<'_>) -> Poll<PeerEvent> {
        if self.trouble.as_ref().is_some_and(|trouble| trouble.is_half_closed) {
            return self.poll_reset(cx);
        }
        if self.prefix.has_remaining() {
            return Poll::Pending;
        }
        let mut space = [const { MaybeUninit::uninit() }; MAX_AHEAD];
        let mut ahead = ReadBuf::uninit(&mut space);
        if ready!(Pin::new(&mut *self).poll_read(cx, &mut ahead)).is_err() {
            return Poll::Ready(PeerEvent::Reset);
        }
        if ahead.filled().is_empty() {
            self.half_closed();
            return Poll::Ready(PeerEvent::HalfClosed);
        }
        self.prefix = Bytes::copy_from_slice(ahead.filled());
        Poll::Ready(PeerEvent::Sent)
    }

    /// True if the peer of a half-closed connection has closed it and is on this host. The kernel is asked, which takes some
    /// 10 µs.
    pub fn is_closed_by_peer(&self) -> bool {
        let ends = self.socket().map(|socket| (socket.peer_addr(), socket.local_addr()));
        matches!(ends, Some((Ok(peer), Ok(local))) if closed_peer::is_closed(peer, local))
    }

    /// The TCP socket, if there is one.
    fn socket(&self) -> Option<&TcpStream> {
        match &self.kind {
            Kind::Tcp(stream) => Some(stream),
            Kind::Tls(stream) => Some(stream.get_ref().0),
            Kind::Boxed(_) => None,
        }
    }

    #[cold]
    fn half_closed(&mut self) {
        let reset = self.socket().and_then(ResetWatch::new);
        let trouble = self.trouble.get_or_insert_default();
        (trouble.is_half_closed, trouble.reset) = (true, reset);
    }

    #[cold]
    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<PeerEvent> {
        let Some(trouble) = &mut self.trouble else { return Poll::Pending };
        let Some(watch) = &mut trouble.reset else { return Poll::Pending };
        ready!(watch.poll(cx));
        trouble.reset = None;
        Poll::Ready(PeerEvent::Reset)
    }

    /// True if writes are discarded.
    fn discards(&self) -> bool {
        self.trouble.as_ref().is_some_and(|trouble| trouble.write_failed.is_some())
    }

    /// What a write came to that offered `offered` bytes.
    fn wrote(&mut self, polled: Poll<io::Result<usize>>, offered: usize) -> Poll<io::Result<usize>> {
        match polled {
            Poll::Ready(Ok(n)) => {
                if n > 0 {
                    increment(&self.activity.writes);
                }
                Poll::Ready(Ok(n))
            }
            Poll::Ready(Err(error)) => Poll::Ready(self.discard_writes(error).map(|()| offered)),
            Poll::Pending => Poll::Pending,
        }
    }

    #[cold]
    fn discard_writes(&mut self, error: io::Error) -> io::Result<()> {
        // The kernel reports EPIPE for a reset behind a FIN, and ECONNRESET for one without.
        let had_ended = match error.kind() {
            io::ErrorKind::BrokenPipe => true,
            io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => false,
            _ => return Err(error),
        };
        if self.role != Role::Upstream {
            return Err(error);
        }
        self.trouble.get_or_insert_default().write_failed = Some(had_ended);
        self.activity.write_failed.store(true, Relaxed);
        Ok(())
    }

    /// What a read of an early-ended stream comes to: an error or an end that was held back, or the reset that the failed
    /// write has reported already.
    #[cold]
    fn read_troubled(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Some(trouble) = &mut self.trouble else { return self.read_plain(cx, buf) };
        if let Some(error) = trouble.read_error.take() {
            return Poll::Ready(Err(error));
        }
        if trouble.is_half_closed {
            return Poll::Ready(Ok(()));
        }
        let lacks_end = trouble.write_failed == Some(false);
        let before = buf.filled().len();
        ready!(self.read_plain(cx, buf))?;
        if lacks_end && buf.filled().len() == before {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Poll::Ready(Ok(()))
    }

    fn read_plain(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = dispatch!(&mut self.kind, stream => Pin::new(stream).poll_read(cx, buf));
        if buf.filled().len() > before {
            increment(&self.activity.reads);
        }
        match polled {
            Poll::Ready(Err(error)) if matches!(self.kind, Kind::Tls(_)) => self.read_before(error, cx, buf),
            polled => polled,
        }
    }

    /// A TLS alert or a broken record fails the read although bytes before it were received: returns these first.
    #[cold]
    fn read_before(&mut self, error: io::Error, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = dispatch!(&mut self.kind, stream => Pin::new(stream).poll_read(cx, buf));
        if self.role != Role::Upstream || !matches!(polled, Poll::Ready(Ok(()))) || buf.filled().len() == before {
            return Poll::Ready(Err(error));
        }
        increment(&self.activity.reads);
        self.trouble.get_or_insert_default().read_error = Some(error);
        Poll::Ready(Ok(()))
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
        if this.trouble.is_some() {
            return this.read_troubled(cx, buf);
        }
        this.read_plain(cx, buf)
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.discards() {
            return Poll::Ready(Ok(buf.len()));
        }
        let polled = dispatch!(&mut this.kind, stream => Pin::new(stream).poll_write(cx, buf));
        this.wrote(polled, buf.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let offered = || bufs.iter().map(|buf| buf.len()).sum();
        if this.discards() {
            return Poll::Ready(Ok(offered()));
        }
        let polled = match &mut this.kind {
            Kind::Tcp(stream) => write_joined(Pin::new(stream), cx, bufs),
            Kind::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Kind::Boxed(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        };
        match polled {
            Poll::Ready(Err(_)) => this.wrote(polled, offered()),
            polled => this.wrote(polled, 0),
        }
    }

    fn is_write_vectored(&self) -> bool {
        dispatch!(&self.kind, stream => stream.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.discards() {
            return Poll::Ready(Ok(()));
        }
        match dispatch!(&mut this.kind, stream => Pin::new(stream).poll_flush(cx)) {
            Poll::Ready(Err(error)) => Poll::Ready(this.discard_writes(error)),
            polled => polled,
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        dispatch!(&mut self.kind, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        let resets = self.activity.resets.load(Relaxed);
        // To a caller that is cut off, `close_notify` would say that a response without a length is complete.
        let says_end = match self.role {
            Role::Bare => false,
            Role::Downstream => !resets,
            Role::Upstream => true,
        };
        if let Kind::Tls(stream) = &mut self.kind
            && says_end
        {
            // As far as the socket takes it now: a peer that does not read cannot be told.
            let _told = Pin::new(stream).poll_shutdown(&mut Context::from_waker(Waker::noop()));
        }
        if resets && let Some(stream) = self.socket() {
            socket::reset_on_drop(stream);
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
