//! Bytes both ways between two streams, until both have ended or nothing has moved for too long.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep_until};

use crate::net::io::{Activity, Io};

/// How much one direction carries at once.
const CHUNK: usize = 16 * 1024;

/// How a tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelEnd {
    /// Both sides said that they were done.
    Finished,
    /// A side broke off.
    Broken,
    /// No byte in either direction for the idle time.
    Idle,
    /// The tunnel reached its longest life.
    Expired,
}

/// What a tunnel carried, and how it ended.
#[derive(Debug, Clone, Copy)]
pub struct TunnelReport {
    /// How it ended.
    pub end: TunnelEnd,
    /// Bytes from the caller to the upstream.
    pub sent: u64,
    /// Bytes from the upstream to the caller.
    pub received: u64,
}

/// Carries bytes until both sides have ended; a side's end is passed on after its last byte.
///
/// `idle` without a byte in either direction ends it, and `life` ends it in any case.
pub async fn run(caller: Io, upstream: Io, idle: Duration, life: Duration) -> TunnelReport {
    let activity = [caller.activity(), upstream.activity()];
    let (caller_read, caller_write) = tokio::io::split(caller);
    let (upstream_read, upstream_write) = tokio::io::split(upstream);
    let mut sent = 0;
    let mut received = 0;
    let end = {
        let both = async {
            tokio::try_join!(
                one_way(caller_read, upstream_write, &mut sent),
                one_way(upstream_read, caller_write, &mut received),
            )
        };
        tokio::select! {
            done = both => if done.is_ok() { TunnelEnd::Finished } else { TunnelEnd::Broken },
            () = silence([&activity[0], &activity[1]], idle) => TunnelEnd::Idle,
            () = tokio::time::sleep(life) => TunnelEnd::Expired,
        }
    };
    TunnelReport { end, sent, received }
}

async fn one_way(mut from: ReadHalf<Io>, mut to: WriteHalf<Io>, total: &mut u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
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
async fn silence(streams: [&Activity; 2], idle: Duration) {
    let total = || streams[0].total() + streams[1].total();
    // Looks four times per idle time, so that it ends at most a quarter late.
    let step = idle / 4;
    let mut seen = total();
    let mut since = Instant::now();
    loop {
        sleep_until(Instant::now() + step).await;
        let now = total();
        if now != seen {
            seen = now;
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
    async fn a_silent_tunnel_ends_after_its_idle_time() {
        let (caller, _there) = tokio::io::duplex(64);
        let (upstream, _back) = tokio::io::duplex(64);
        let begun = Instant::now();
        let report = run(Io::boxed(caller), Io::boxed(upstream), IDLE, LIFE).await;
        assert_eq!(report.end, TunnelEnd::Idle);
        assert!(begun.elapsed() <= IDLE + IDLE / 4, "took {:?}", begun.elapsed());
    }
}
