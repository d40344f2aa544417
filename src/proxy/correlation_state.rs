//! What an exchange keeps of its correlation with others: ids, registration, parent requests.

use tokio::time::Instant;

use crate::rules::deadline::MOST_RESERVED;
use crate::rules::inflight::{InflightGuard, ParentRequests};
use crate::rules::retry_history::RetryHistory;
use crate::rules::trace::TraceKeys;

/// What correlates an exchange with others; only where the policy has listeners on both sides of the app.
#[derive(Default)]
pub(super) struct Correlated {
    /// The ids of the exchange.
    pub(super) keys: TraceKeys,
    /// The entry of an inbound request in the registry.
    pub(super) registration: Option<InflightGuard>,
    /// The inbound requests that may have caused an outbound call.
    pub(super) parents: Option<ParentRequests>,
    /// The parent request is over for its caller; its deadline is, or was, then.
    pub(super) late_at: Option<Instant>,
}

/// The call id under which abandoned inbound requests are remembered: no call has it.
pub(super) const ABANDONED: u64 = 0;

impl Correlated {
    /// The caller waits no longer for the app, which may work on. Calls under these ids have as much time as the request
    /// had, which ends at `at`, where that is known.
    pub(super) fn abandon(&self, abandoned: &RetryHistory, at: Option<Instant>, now: Instant) {
        if let Some(registration) = &self.registration {
            registration.inbound().abandon();
        }
        if let Some(at) = at {
            // Callers wait for the same deadline, and theirs can end a moment before ours.
            let is_as_good_as_over = at <= now + MOST_RESERVED;
            abandoned.record(self.keys, ABANDONED, if is_as_good_as_over { now } else { at }, now);
        }
    }

    /// The app has answered. Later calls under these ids may be what is left of this request, and no more of an earlier,
    /// abandoned one.
    pub(super) fn answered(&self, abandoned: &RetryHistory) {
        abandoned.remove(self.keys, ABANDONED);
    }
}
