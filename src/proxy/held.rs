//! What an exchange holds for the rules that act on it: plain parts, each filled and used by the file of its rule.
//!
//! They stand apart from those files so that `request_context`, which holds them all, need not know what is done with them.

use std::time::Duration;

use http::request;
use tokio::time::Instant;

use crate::net::body::Replay;
use crate::rules::circuit_breaker::{BreakerPermit, Probe};
use crate::rules::inflight::{InflightGuard, ParentRequests};
use crate::rules::retry_history::RetryHistory;
use crate::rules::trace::TraceKeys;

/// What ties an exchange to others; only where the policy has callers on both sides of the app.
#[derive(Default)]
pub struct Correlated {
    /// Its ids.
    pub keys: TraceKeys,
    /// Its place among the inbound requests under way.
    pub entered: Option<InflightGuard>,
    /// The inbound requests that caused it.
    pub causes: Option<ParentRequests>,
    /// Nobody waits any more for the inbound request that caused it, which is, or was, to be over then.
    pub late_at: Option<Instant>,
}

/// Inbound requests that nobody waits for any more stand here under a place that there is not.
pub const LATE: u64 = 0;

/// The most that a hop keeps of the time for the way back.
pub const MOST_RESERVED: Duration = Duration::from_millis(10);

impl Correlated {
    /// Nobody waits for the app any more, which may go on: its caller has left, or was answered in its place. What it
    /// calls under these ids has as much time as the request had, which ends at `at`, where that is known.
    ///
    /// Callers wait for the same deadline, so that theirs can be over a moment before ours.
    pub fn abandon(&self, late: &RetryHistory, at: Option<Instant>, now: Instant) {
        if let Some(entered) = &self.entered {
            entered.inbound().abandon();
        }
        if let Some(at) = at {
            let is_as_good_as_over = at <= now + MOST_RESERVED;
            late.record(self.keys, LATE, if is_as_good_as_over { now } else { at }, now);
        }
    }

    /// The app has answered. What it calls under these ids from now on may be what is left of this request, and no more of
    /// an earlier one that was too late.
    pub fn answered(&self, late: &RetryHistory) {
        late.remove(self.keys, LATE);
    }
}

/// A turn at a breaker, from the moment it let the try through until the try is judged.
#[derive(Default)]
pub enum BreakerTurn {
    /// None was taken, or it has been judged.
    #[default]
    None,
    /// As one of many.
    Permit(BreakerPermit),
    /// As one of the few that find out; boxed, because they are few.
    Probe(Box<Probe>),
}

/// The turns of one try. Dropping them judges nothing and gives the places of probes back.
#[derive(Default)]
pub struct Permits {
    /// At the circuit breaker of the destination.
    pub destination: BreakerTurn,
    /// At its endpoint.
    pub endpoint: BreakerTurn,
}

/// What a request can be sent again from.
pub struct ReplayableRequest {
    /// The head as it goes out, but for what depends on the connection.
    pub head: request::Parts,
    /// Its body, as far as it was kept.
    pub body: Replay,
}

/// What a fault leaves to the try that goes on after it.
pub struct PendingFault {
    /// What it has used up of the try, as if the upstream had taken it.
    pub lost: Duration,
    /// What it will do to the body of the answer.
    pub body: Option<BodyFault>,
}

/// What a fault does to the body of an answer.
pub struct BodyFault {
    /// The fault.
    pub name: Box<str>,
    /// It breaks off after so many bytes.
    pub cut_after: Option<u64>,
    /// It comes at so many bytes a second.
    pub rate: Option<u64>,
    /// From then on it does nothing any more.
    pub until: Instant,
}
