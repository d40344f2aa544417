//! Whether a request still waits on a connection whose upstream has ended another one of the same age.
//!
//! A server that stops answers the requests that it works on, but may leave those that came later unread until it ends, up to
//! seconds later (gunicorn gthread: 2.6 s). A request that has waited for clearly longer than usual since then is given up
//! and sent again over a new connection, if the retry rule allows that after a reset: it is idempotent, its body is kept,
//! and no attempt was repeated before. Any other request waits for its own connection, whose end decides.

use std::time::Duration;

use tokio::time::Instant;

use crate::proxy::attempt::Attempt;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::replay::RetryState;
use crate::proxy::request_context::RequestContext;
use crate::rules::retry::AttemptFailure;
use crate::upstream::endpoint::StaleWatch;
use crate::upstream::pool::Lease;

/// The least time that a request waits after its connection has become stale.
const LEAST_PATIENCE: Duration = Duration::from_millis(100);

/// The same, in usual response times of the endpoint.
const PATIENCE: u32 = 4;

/// The wait of one request.
pub(super) struct StaleWait<'a> {
    watch: StaleWatch,
    /// When the connection was opened.
    opened_at: Instant,
    /// When the request was sent.
    sent_at: Instant,
    /// Since when the connection is stale, as far as the wait has seen it.
    seen: Option<Instant>,
    retry: &'a RetryState,
}

impl<'a> StaleWait<'a> {
    /// The wait of a request that is about to be sent; `None` if it would not be sent again, or if its connection is new.
    pub(super) fn begin(
        context: &RequestContext,
        attempt: &Attempt,
        retry: &'a RetryState,
        lease: &Lease,
    ) -> Option<Self> {
        let rule = &context.route().retry;
        let may_move = lease.reused
            && lease.is_http1()
            && attempt.number() == 1
            && context.is_idempotent()
            && retry.is_kept()
            && context.modes().retry.value.is_enforced()
            && rule.attempts.value > 0
            && rule.is_on(AttemptFailure::Reset);
        let opened_at = lease.opened_at()?;
        may_move.then(|| Self {
            watch: lease.endpoint.watch_stale(context.waker()),
            opened_at,
            sent_at: attempt.sent_at(),
            seen: None,
            retry,
        })
    }

    /// True if the connection has become stale since the last look.
    pub(super) fn is_news(&self) -> bool {
        self.seen.is_none() && self.watch.stale_since(self.opened_at).is_some()
    }

    /// When the request is given up; `None` while its connection is not stale, or if the request cannot be sent again.
    pub(super) fn given_up_at(&mut self) -> Option<Instant> {
        self.seen = self.seen.or_else(|| self.watch.stale_since(self.opened_at));
        if self.retry.is_replayable() != Some(true) {
            return None;
        }
        let patience = LEAST_PATIENCE.max(self.watch.usual_latency() * PATIENCE);
        self.seen.map(|since| since.max(self.sent_at) + patience)
    }
}

/// The local reply of a request that was given up.
pub(super) fn given_up() -> LocalReply {
    let detail = "the upstream has ended other connections of the same age, and has not answered on this one";
    LocalReply::plain(LocalReplyKind::UpstreamReset, detail)
}
