//! The caller's side of a CONNECT over HTTP/2: a stream that hyper hands out after the response.
//!
//! hyper writes to the stream with a task of its own. That task ends the stream with END_STREAM as soon as the tunnel is
//! dropped, and hyper reads a reset with CANCEL or NO_ERROR as an orderly end; a tunnel must not confuse the two (RFC 9113,
//! 8.5). So hopguard runs that task inside of the task of the tunnel, as a [`TunnelSender`]: dropping the sender resets the
//! stream with CANCEL, and at the end of the caller's bytes the sender knows of a reset.
//!
//! Limit: a sender that has sent END_STREAM is over, and a later CANCEL or NO_ERROR of the caller is read as an end.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The task of hyper that sends what is written to the stream.
type Sending = Pin<Box<dyn Future<Output = ()>>>;

/// Sends what is written to the stream; `None` before hyper has handed it over, and when it is done.
#[derive(Clone, Default)]
pub struct TunnelSender(Rc<RefCell<Option<Sending>>>);

impl TunnelSender {
    /// Takes the future over from hyper.
    pub fn set(&self, sending: impl Future<Output = ()> + 'static) {
        *self.0.borrow_mut() = Some(Box::pin(sending));
    }

    /// Sends what is possible now. Once the stream is reset, or its end is sent, nothing is left to drive.
    fn drive(&self, cx: &mut Context<'_>) {
        let mut sending = self.0.borrow_mut();
        if sending.as_mut().is_some_and(|sending| sending.as_mut().poll(cx).is_ready()) {
            *sending = None;
        }
    }

    /// Runs what uses the stream, and the sender beside it.
    pub async fn run_with<T>(&self, user: impl Future<Output = T>) -> T {
        let mut user = pin!(user);
        poll_fn(|cx| {
            self.drive(cx);
            user.as_mut().poll(cx)
        })
        .await
    }
}

/// The stream. Dropping it with its sender resets it, unless both directions have ended.
pub struct Http2Tunnel {
    stream: TokioIo<Upgraded>,
    sender: TunnelSender,
}

impl Http2Tunnel {
    /// The stream that hyper handed out, and the future that sends for it.
    pub fn new(stream: Upgraded, sender: TunnelSender) -> Self {
        Self { stream: TokioIo::new(stream), sender }
    }
}

impl AsyncRead for Http2Tunnel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if !matches!(polled, Poll::Ready(Ok(()))) || buf.filled().len() > before {
            return polled;
        }
        // The end, or a reset. The sender sees a reset when it is driven, and a flush returns the error of the sender.
        self.sender.drive(cx);
        match Pin::new(&mut self.stream).poll_flush(cx) {
            Poll::Ready(flushed) => Poll::Ready(flushed),
            Poll::Pending => polled,
        }
    }
}

impl AsyncWrite for Http2Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.sender.drive(cx);
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Closes the channel to the sender, which then has the end to send.
        let polled = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.sender.drive(cx);
        if polled.is_pending() { Pin::new(&mut self.stream).poll_shutdown(cx) } else { polled }
    }
}
