//! Closes a downstream connection so that the caller gets its last response and not a reset (RFC 9112, 9.6).
//!
//! A socket that is closed with unread bytes sends RST, and RST makes the caller's kernel drop a response that the caller has
//! not read yet. So the sending side is closed first (over TLS with `close_notify`), and what the caller still sends is read
//! and discarded: a caller may write its whole request before it reads. nginx calls this `lingering_close`.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, timeout, timeout_at};

use crate::net::io::Io;

/// How long a closed connection is read at most.
const LINGER_TIME: Duration = Duration::from_secs(30);

/// How many bytes of it are read at most.
const LINGER_BYTES: usize = 256 * 1024 * 1024;

/// The rate that the caller has to keep up: so many bytes in each such time. A caller that sends nothing is left after it.
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);
const LINGER_RATE: usize = 8 * 1024;

/// Bytes that are read at a time.
const BUFFER: usize = 16 * 1024;

/// Closes the sending side, then reads on until the caller closes its side, or a limit is reached.
pub(super) async fn close(mut stream: Io) {
    // Boxed: a connection that is being served has no use for it. An error changes nothing, the connection is over.
    let linger = Box::pin(async move {
        if let Ok(Ok(())) = timeout(LINGER_TIMEOUT, stream.shutdown()).await {
            let _over = discard(&mut stream).await;
        }
    });
    linger.await;
}

async fn discard(stream: &mut Io) -> io::Result<()> {
    let (until, mut buffer, mut total) = (Instant::now() + LINGER_TIME, vec![0; BUFFER], 0);
    while Instant::now() < until && total < LINGER_BYTES {
        let window = (Instant::now() + LINGER_TIMEOUT).min(until);
        let mut read = 0;
        let filled = poll_fn(|cx| {
            while read < LINGER_RATE {
                match poll_discard(stream, cx, &mut buffer) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                    Poll::Ready(Ok(count)) => read += count,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return Poll::Pending,
                }
            }
            Poll::Ready(io::Result::Ok(()))
        });
        timeout_at(window, filled).await??;
        total += read;
    }
    Ok(())
}

fn poll_discard(stream: &mut Io, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
    let mut buffer = ReadBuf::new(buffer);
    Pin::new(stream).poll_read(cx, &mut buffer).map_ok(|()| buffer.filled().len())
}
