//! A stream that hyper reads and writes, and that the task of its connection looks at beside hyper.
//!
//! While an exchange is in progress hyper does not read from a caller that may half-close its connection: the task itself
//! notices what the caller does ([`SharedIo::poll_peer`]). And when hyper has dropped an HTTP/2 connection, the stream is
//! still there to be closed without a reset ([`SharedIo::into_inner`]).

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::net::io::{Io, PeerEvent};

/// One of the two references to a stream: hyper's, or that of the connection's task.
pub struct SharedIo(Rc<RefCell<Io>>);

impl SharedIo {
    /// The reference of the task, and the one for hyper.
    pub fn pair(io: Io) -> (Self, Self) {
        let shared = Rc::new(RefCell::new(io));
        (Self(Rc::clone(&shared)), Self(shared))
    }

    /// What the peer did since the last call; see [`Io::poll_peer`].
    pub fn poll_peer(&self, cx: &mut Context<'_>) -> Poll<PeerEvent> {
        self.0.borrow_mut().poll_peer(cx)
    }

    /// True if the peer's process on this host has closed the connection; see [`Io::is_closed_by_peer`].
    pub fn is_closed_by_peer(&self) -> bool {
        self.0.borrow().is_closed_by_peer()
    }

    /// The stream; `None` while the other reference exists.
    pub fn into_inner(self) -> Option<Io> {
        Rc::into_inner(self.0).map(RefCell::into_inner)
    }

    fn poll_with<T>(&self, poll: impl FnOnce(Pin<&mut Io>) -> T) -> T {
        poll(Pin::new(&mut self.0.borrow_mut()))
    }
}

impl AsyncRead for SharedIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_with(|io| io.poll_read(cx, buf))
    }
}

impl AsyncWrite for SharedIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_with(|io| io.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_with(|io| io.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.0.borrow().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_with(|io| io.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_with(|io| io.poll_shutdown(cx))
    }
}
