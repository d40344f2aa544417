//! Finds out when a destination that accepted no connection accepts them again.
//!
//! `proxy` asks while the circuit breaker of the destination is open for that reason.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::upstream::dial::ConnectOptions;
use crate::upstream::pool::{Pool, ProtocolPreference};
use crate::upstream::waiters::{ConnectionWait, WaitEvent};

/// Bounds of the time between two connections. Within them it is a sixteenth of the time that is waited in all, so that a
/// destination which accepts connections and closes them is connected to less often as its open times grow.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);
const LONGEST_INTERVAL: Duration = Duration::from_millis(50);
const PARTS: u32 = 16;

impl Pool {
    /// Whether an endpoint accepts a TCP connection within `limit`, while `goes_on`. One connection at a time is opened, every
    /// 10 to 50 ms, and closed again with nothing sent.
    pub async fn accepts_within(
        self: &Rc<Self>,
        options: ConnectOptions,
        limit: Duration,
        goes_on: impl Fn() -> bool,
    ) -> bool {
        let until = Instant::now() + limit;
        let interval = (limit / PARTS).clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL);
        loop {
            sleep(interval).await;
            if Instant::now() >= until || !goes_on() {
                return false;
            }
            if self.accepts(options, until).await {
                return true;
            }
        }
    }

    async fn accepts(self: &Rc<Self>, options: ConnectOptions, until: Instant) -> bool {
        let Some(endpoint) = self.pick(Instant::now(), &[], false) else { return false };
        let mut wait = ConnectionWait::new(self, ProtocolPreference::Tunnel, options, false);
        wait.wait_at(&endpoint, true);
        matches!(timeout_at(until, wait.next()).await, Ok(WaitEvent::Connection(_)))
    }
}
