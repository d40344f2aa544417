//! Whether an HTTP/2 connection to an upstream still lives, where TCP cannot tell: a process that is frozen, a middlebox that
//! has lost its state and still acknowledges.
//!
//! Two rules. A connection is suspected as soon as a call on it ends by a timeout and no byte was read since that call was
//! sent: it gets no new call, and a PING decides within 2 s whether it lives. And a connection that is silent for 20 s while
//! calls wait gets a PING as well. A peer that does not answer is closed with all its calls; any byte is an answer.
//!
//! gRPC servers close a connection after more than two PINGs that came too soon (gRFC A8: strikes): sooner than five minutes
//! after the one before, with no HEADERS or DATA of the server in between. So a suspicion costs a PING only if the upstream
//! has answered a call since the last one, and one more; after that the connection is retired without a PING: it is left to
//! the calls that it has. Its successor starts anew.

use std::cell::Cell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::net::io::Activity;

/// Interval of the checks for received bytes.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Checks in a row without a received byte after which a connection with streams is pinged.
const SILENT_CHECKS: u32 = 4;

/// Least time between a ping and one for silence alone, even if bytes were received meanwhile: gRPC servers treat more than
/// one ping in five minutes as an attack and close the connection with all its calls (gRFC A8). TCP detects a host that is
/// gone meanwhile.
const PING_INTERVAL: Duration = Duration::from_secs(330);

/// Least time between a ping and one for a suspicion: some servers limit pings per second.
const SUSPICION_INTERVAL: Duration = Duration::from_millis(200);

/// Pings for suspicions in the life of a connection since the upstream last answered a call: gRPC servers tolerate two more.
const UNANSWERED_PINGS: u32 = 2;

/// How long the peer may take to acknowledge a ping for silence alone; then the connection is closed.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// The same for a suspected connection.
const SUSPICION_TIMEOUT: Duration = Duration::from_secs(2);

/// What is known of a connection, as its calls see it.
pub(super) struct Liveness {
    activity: Arc<Activity>,
    trust: Cell<Trust>,
    /// The first call after the last byte that was read: the reads at that time, and when it was sent.
    quiet: Cell<Option<(u64, Instant)>>,
    /// True if a part of a response has come since the last ping.
    has_answered: Cell<bool>,
    /// Notified when the connection becomes suspected.
    suspected: Notify,
}

/// Whether a connection gets new calls.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trust {
    Trusted,
    /// No longer once more than so many reads were made.
    Suspected {
        reads: u64,
    },
    /// Never again.
    Retired,
}

impl Liveness {
    /// A trusted connection with these counters.
    pub(super) fn new(activity: Arc<Activity>) -> Self {
        Self {
            activity,
            trust: Cell::new(Trust::Trusted),
            quiet: Cell::new(None),
            has_answered: Cell::new(true),
            suspected: Notify::new(),
        }
    }

    /// Reads that returned bytes so far.
    pub(super) fn reads(&self) -> u64 {
        self.activity.reads()
    }

    /// Records a request that is sent at `now`. Returns the reads so far.
    pub(super) fn record_sent(&self, now: Instant) -> u64 {
        let reads = self.reads();
        if self.quiet.get().is_none_or(|(before, _)| before != reads) {
            self.quiet.set(Some((reads, now)));
        }
        reads
    }

    /// Records that a part of a response has come. Returns the reads so far.
    pub(super) fn record_answer(&self) -> u64 {
        self.has_answered.set(true);
        self.reads()
    }

    /// When the first call was sent of those that have waited without a byte; `None` if a byte has come since the last one.
    pub(super) fn quiet_since(&self) -> Option<Instant> {
        self.quiet.get().filter(|(reads, _)| *reads == self.reads()).map(|(_, since)| since)
    }

    /// False while the connection is suspected: until a byte is read.
    pub(super) fn is_trusted(&self) -> bool {
        match self.trust.get() {
            Trust::Trusted => true,
            Trust::Suspected { reads } if reads != self.reads() => {
                self.trust.set(Trust::Trusted);
                true
            }
            Trust::Suspected { .. } | Trust::Retired => false,
        }
    }

    /// True until a byte is read after a call that ended in silence.
    pub(super) fn is_suspected(&self) -> bool {
        !self.is_trusted() && !self.is_retired()
    }

    /// True if the connection gets no call any more and is closed when its last one has ended.
    pub(super) fn is_retired(&self) -> bool {
        self.trust.get() == Trust::Retired
    }

    /// A call has ended without a byte: no new call until one is read.
    pub(super) fn suspect(&self) {
        if self.is_trusted() {
            self.trust.set(Trust::Suspected { reads: self.reads() });
            self.suspected.notify_one();
        }
    }
}

/// Decides when a connection is pinged.
struct PingSchedule {
    /// Reads that returned bytes, at the last check.
    reads: u64,
    /// Checks in a row without a received byte.
    silent_checks: u32,
    /// When the last ping was sent.
    last_ping: Option<Instant>,
    /// Pings for suspicions since the upstream last answered a call.
    unanswered: u32,
}

impl PingSchedule {
    /// No ping so far.
    fn new() -> Self {
        Self { reads: 0, silent_checks: 0, last_ping: None, unanswered: 0 }
    }

    /// One check: `reads` is the total of reads that returned bytes, `streams` the number of calls in progress. True if a
    /// ping is due.
    fn is_due(&mut self, reads: u64, streams: usize, now: Instant) -> bool {
        let is_silent = reads == self.reads && streams > 0;
        self.reads = reads;
        self.silent_checks = if is_silent { self.silent_checks + 1 } else { 0 };
        self.silent_checks >= SILENT_CHECKS && self.last_ping.is_none_or(|last| now >= last + PING_INTERVAL)
    }

    /// When a suspicion may be pinged; `None` if the peer could take it for an attack.
    fn suspicion_at(&mut self, has_answered: bool, now: Instant) -> Option<Instant> {
        if has_answered {
            self.unanswered = 0;
        }
        self.unanswered += 1;
        let earliest = self.last_ping.map_or(now, |last| last + SUSPICION_INTERVAL);
        (self.unanswered <= UNANSWERED_PINGS).then(|| earliest.max(now))
    }

    /// Records a ping.
    fn record_ping(&mut self, now: Instant) {
        (self.silent_checks, self.last_ping) = (0, Some(now));
    }
}

/// What a ping has shown.
enum PingVerdict {
    Alive,
    Silent,
    /// The connection is closed already.
    Closed,
}

/// A connection whose peer is watched.
pub(super) trait Watched {
    /// What is known of the peer.
    fn liveness(&self) -> &Rc<Liveness>;
    /// Calls in progress.
    fn active_streams(&self) -> usize;
    /// Records that the peer has not answered a ping.
    fn record_ping_timeout(&self);
}

/// Pings a peer that is suspected, or silent although calls wait for it, and closes the connection if it does not answer.
pub(super) async fn keep_alive<C: Watched>(connection: Weak<C>, mut pings: PingPong, task: AbortHandle) {
    let Some(liveness) = connection.upgrade().map(|connection| Rc::clone(connection.liveness())) else { return };
    let mut schedule = PingSchedule::new();
    let mut check_at = Instant::now() + CHECK_INTERVAL;
    loop {
        let is_suspected = timeout_at(check_at, liveness.suspected.notified()).await.is_ok();
        // Continues after a GOAWAY: calls may still wait for their responses.
        let Some(streams) = connection.upgrade().filter(|_| !task.is_finished()).map(|open| open.active_streams())
        else {
            return;
        };
        let limit = if is_suspected {
            admit_suspicion(&liveness, &mut schedule).await.then_some(SUSPICION_TIMEOUT)
        } else {
            let now = Instant::now();
            check_at = now + CHECK_INTERVAL;
            schedule.is_due(liveness.reads(), streams, now).then_some(PING_TIMEOUT)
        };
        let Some(limit) = limit else { continue };
        schedule.record_ping(Instant::now());
        liveness.has_answered.set(false);
        match ping(&liveness, &mut pings, limit).await {
            PingVerdict::Alive => {}
            PingVerdict::Closed => return,
            PingVerdict::Silent => {
                if let Some(connection) = connection.upgrade() {
                    connection.record_ping_timeout();
                }
                task.abort();
                return;
            }
        }
    }
}

/// Waits until a suspicion may be pinged. False if that is not necessary any more, or if the peer could take one more ping
/// for an attack: then the connection is retired.
async fn admit_suspicion(liveness: &Liveness, schedule: &mut PingSchedule) -> bool {
    if liveness.is_trusted() {
        return false;
    }
    let Some(at) = schedule.suspicion_at(liveness.has_answered.get(), Instant::now()) else {
        liveness.trust.set(Trust::Retired);
        return false;
    };
    sleep_until(at).await;
    !liveness.is_trusted()
}

/// Sends a ping and waits for its acknowledgement, for `limit` after the last byte that was read. A suspicion meanwhile
/// shortens the wait.
async fn ping(liveness: &Liveness, pings: &mut PingPong, limit: Duration) -> PingVerdict {
    if pings.send_ping(Ping::opaque()).is_err() {
        return PingVerdict::Closed;
    }
    let mut acknowledged = std::pin::pin!(std::future::poll_fn(|cx| pings.poll_pong(cx)));
    let (mut reads, mut at) = (liveness.reads(), Instant::now() + limit);
    loop {
        tokio::select! {
            biased;
            pong = &mut acknowledged => return if pong.is_ok() { PingVerdict::Alive } else { PingVerdict::Closed },
            () = liveness.suspected.notified() => at = at.min(Instant::now() + SUSPICION_TIMEOUT),
            () = sleep_until(at) => {
                if reads == liveness.reads() {
                    return PingVerdict::Silent;
                }
                // The peer is busy with something else.
                (reads, at) = (liveness.reads(), Instant::now() + limit);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_silent_peer_is_pinged_and_then_not_for_minutes_even_if_it_sends() {
        let mut now = Instant::now();
        let mut schedule = PingSchedule::new();
        let checks = |schedule: &mut PingSchedule, reads, now: &mut Instant| {
            let due = |_: &u32| {
                *now += CHECK_INTERVAL;
                schedule.is_due(reads, 1, *now)
            };
            (1..).find(due).unwrap()
        };
        assert!(!schedule.is_due(7, 1, now), "bytes were received");
        assert_eq!(checks(&mut schedule, 7, &mut now), SILENT_CHECKS);
        schedule.record_ping(now);
        let between = u32::try_from(PING_INTERVAL.as_secs() / CHECK_INTERVAL.as_secs()).unwrap();
        assert_eq!(checks(&mut schedule, 8, &mut now), between);
        assert!(PING_INTERVAL > secs(300));
        schedule.record_ping(now);
        assert!(!schedule.is_due(10, 1, now), "bytes were received");
        assert_eq!(checks(&mut schedule, 10, &mut now), between);
        assert!((0..1000).all(|_| !schedule.is_due(10, 0, now)), "no call waits");
        assert_eq!(checks(&mut schedule, 10, &mut now), SILENT_CHECKS);
    }

    #[test]
    fn suspicions_cost_two_pings_until_the_upstream_answers_a_call_and_not_in_a_row() {
        let now = Instant::now();
        let mut schedule = PingSchedule::new();
        assert_eq!(schedule.suspicion_at(true, now), Some(now));
        schedule.record_ping(now);
        assert_eq!(schedule.suspicion_at(false, now), Some(now + SUSPICION_INTERVAL));
        schedule.record_ping(now + SUSPICION_INTERVAL);
        assert_eq!(schedule.suspicion_at(false, now + secs(600)), None);
        assert_eq!(schedule.suspicion_at(true, now + secs(601)), Some(now + secs(601)));
    }

    #[test]
    fn a_suspected_connection_is_trusted_again_once_a_byte_is_read_and_a_retired_one_is_not() {
        let liveness = Liveness::new(Arc::default());
        liveness.suspect();
        assert!(!liveness.is_trusted());
        liveness.trust.set(Trust::Suspected { reads: 7 });
        assert!(liveness.is_trusted() && !liveness.is_retired());
        liveness.trust.set(Trust::Retired);
        liveness.suspect();
        assert!(!liveness.is_trusted() && liveness.is_retired());
    }
}
