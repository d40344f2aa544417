//! A tunnel: copies bytes both ways between two streams after CONNECT or an upgrade.
//!
//! Ends when both directions have ended, when a side breaks off, after an idle time without a byte, or at the end of its
//! longest life. The end of one direction passes to the other side after its last byte.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep_until};

use crate::net::io::{Activity, Io};

/// Buffer of one direction, in bytes.
const BUFFER: usize = 16 * 1024;

/// How a tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelEnd {
    /// Both directions ended.
    Finished,
    /// Reading from or writing to a side failed.
    Broken,
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
pub async fn run(caller: Io, upstream: Io, idle: Duration, life: Duration) -> TunnelReport {
    let activity = [caller.activity(), upstream.activity()];
    let (caller_read, caller_write) = tokio::io::split(caller);
    let (upstream_read, upstream_write) = tokio::io::split(upstream);
    let mut sent = 0;
    let mut received = 0;
    let end = {
        let both = async {
            tokio::try_join!(
                copy(caller_read, upstream_write, &mut sent),
                copy(upstream_read, caller_write, &mut received),
            )
        };
        tokio::select! {
            done = both => if done.is_ok() { TunnelEnd::Finished } else { TunnelEnd::Broken },
            () = wait_idle([&activity[0], &activity[1]], idle) => TunnelEnd::Idle,
            () = tokio::time::sleep(life) => TunnelEnd::Expired,
        }
    };
    TunnelReport { end, sent, received }
}

async fn copy(mut from: ReadHalf<Io>, mut to: WriteHalf<Io>, total: &mut u64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
        *total += count as u64;
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
