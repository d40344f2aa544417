//! A tunnel: copies bytes both ways between two streams after CONNECT or an upgrade.
//!
//! Ends when both directions have ended, when a side breaks off, after an idle time without a byte, or at the end of its
//! longest life. The end of one direction passes to the other side after its last byte. Invariant: a tunnel that ends in any
//! other way resets both TCP connections (RFC 9113, 8.5), so that no side takes what it has got for all there is.

use std::cell::Cell;
use std::io;
use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep_until};

use crate::net::io::{Activity, Io};

/// Buffer of one direction, in bytes.
const BUFFER: usize = 16 * 1024;

/// A side of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelSide {
    /// The downstream side.
    Caller,
    /// The upstream side.
    Upstream,
}

/// How a tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelEnd {
    /// Both directions ended.
    Finished,
    /// Reading from or writing to this side failed.
    Broken(TunnelSide),
    /// No byte passed in either direction for the idle time.
    Idle,
    /// The longest life was over.
    Expired,
}

/// The bytes that a tunnel copied, and how it ended.
#[derive(Debug, Clone, Copy)]
pub struct TunnelReport {
    /// How it ended.
    pub end: TunnelEnd,
    /// Bytes from the caller to the upstream.
    pub sent: u64,
    /// Bytes from the upstream to the caller.
    pub received: u64,
}

/// Copies bytes until both directions have ended.
///
/// `idle` without a byte in either direction ends the tunnel, up to a quarter of `idle` late; `life` ends it in any case.
/// Dropping the future resets both connections, too.
pub async fn run(caller: Io, upstream: Io, idle: Duration, life: Duration) -> TunnelReport {
    let activity = [caller.activity(), upstream.activity()];
    activity.iter().for_each(|stream| stream.set_reset_on_drop(true));
    let (caller_read, caller_write) = tokio::io::split(caller);
    let (upstream_read, upstream_write) = tokio::io::split(upstream);
    let mut up = Direction { source: TunnelSide::Caller, from: caller_read, to: upstream_write, copied: 0 };
    let mut down = Direction { source: TunnelSide::Upstream, from: upstream_read, to: caller_write, copied: 0 };
    let end = tokio::select! {
        end = copy_both(&mut up, &mut down) => end,
        () = wait_idle([&activity[0], &activity[1]], idle) => TunnelEnd::Idle,
        () = tokio::time::sleep(life) => TunnelEnd::Expired,
    };
    if end == TunnelEnd::Finished {
        activity.iter().for_each(|stream| stream.set_reset_on_drop(false));
    }
    TunnelReport { end, sent: up.copied, received: down.copied }
}

/// One direction of a tunnel.
struct Direction {
    source: TunnelSide,
    from: ReadHalf<Io>,
    to: WriteHalf<Io>,
    copied: u64,
}

/// Why one direction failed.
enum CopyError {
    /// Its source could not be read.
    Read,
    /// Its target takes nothing more.
    Write,
}

impl Direction {
    /// Copies to the end. `is_broken` is set when the source no longer takes bytes: then the end of what it has sent is no
    /// end in order, although the kernel reports a reset only once.
    async fn copy(&mut self, is_broken: &Cell<bool>) -> Result<(), CopyError> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let count = self.from.read(&mut buffer).await.map_err(|_| CopyError::Read)?;
            if count == 0 {
                return match is_broken.get() {
                    true => Err(CopyError::Read),
                    false => self.to.shutdown().await.map_err(|_| CopyError::Write),
                };
            }
            write(&mut self.to, &buffer[..count]).await.map_err(|_| CopyError::Write)?;
            self.copied += count as u64;
        }
    }
}

async fn write(to: &mut WriteHalf<Io>, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

/// Copies both directions until both have ended or a side has broken off.
async fn copy_both(up: &mut Direction, down: &mut Direction) -> TunnelEnd {
    let sources = [up.source, down.source];
    let is_broken = Cell::new(false);
    let (mut up, mut down) = (pin!(up.copy(&is_broken)), pin!(down.copy(&is_broken)));
    let (first, [source, target], rest) = tokio::select! {
        first = &mut up => (first, sources, down),
        first = &mut down => (first, [sources[1], sources[0]], up),
    };
    match first {
        Ok(()) => match rest.await {
            Ok(()) => TunnelEnd::Finished,
            Err(CopyError::Read) => TunnelEnd::Broken(target),
            Err(CopyError::Write) => TunnelEnd::Broken(source),
        },
        Err(CopyError::Read) => TunnelEnd::Broken(source),
        Err(CopyError::Write) => {
            // What the target has sent before it broke off can still be read, such as the reason.
            is_broken.set(true);
            let _over = rest.await;
            TunnelEnd::Broken(target)
        }
    }
}

/// Returns when neither stream has moved a byte for `idle`.
async fn wait_idle(streams: [&Activity; 2], idle: Duration) {
    let total = || streams[0].total() + streams[1].total();
    // Four checks per idle time: the end is at most a quarter late.
    let interval = idle / 4;
    let mut last_total = total();
    let mut since = Instant::now();
    loop {
        sleep_until(Instant::now() + interval).await;
        let now_total = total();
        if now_total != last_total {
            last_total = now_total;
            since = Instant::now();
        } else if since.elapsed() >= idle {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_secs(60);
    const LIFE: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn bytes_and_ends_pass_both_ways() {
        let (caller, mut there) = tokio::io::duplex(64);
        let (upstream, mut back) = tokio::io::duplex(64);
        let tunnel = run(Io::boxed(caller), Io::boxed(upstream), IDLE, LIFE);
        let talk = async {
            there.write_all(b"ping").await.unwrap();
            there.shutdown().await.unwrap();
            let mut heard = String::new();
            back.read_to_string(&mut heard).await.unwrap();
            back.write_all(b"pong!").await.unwrap();
            back.shutdown().await.unwrap();
            there.read_to_string(&mut heard).await.unwrap();
            heard
        };
        let (report, heard) = tokio::join!(tunnel, talk);
        assert_eq!(heard, "pingpong!");
        assert_eq!((report.end, report.sent, report.received), (TunnelEnd::Finished, 4, 5));
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_tunnel_ends_after_its_idle_time() {
        let (caller, _there) = tokio::io::duplex(64);
        let (upstream, _back) = tokio::io::duplex(64);
        let begun = Instant::now();
        let report = run(Io::boxed(caller), Io::boxed(upstream), IDLE, LIFE).await;
        assert_eq!(report.end, TunnelEnd::Idle);
        assert!(begun.elapsed() <= IDLE + IDLE / 4, "took {:?}", begun.elapsed());
    }
}
