//! Arms the timeouts of an exchange: one timer, set to the limit that is reached first.
//!
//! [`super::timeout_state`] decides which limit that is. `timeouts.connect` bounds the wait for a connection in
//! [`super::connecting`] and each new connection in `upstream/dial`. The timeouts of a tunnel are in `net/tunnel.rs`, those of
//! the downstream connection in [`super::connection_timeouts`].

use std::task::{Context, Poll};

use tokio::time::Instant;

use crate::proxy::local_reply::LocalReply;
use crate::proxy::request_context::RequestContext;
use crate::proxy::timeout_state::{TimeoutVerdict, WaitingFor};

/// Checks the time limits at `now`, and arms the timer for the next one, or for `earlier` if that comes first.
///
/// # Errors
/// The local reply of a limit that is reached.
pub(super) fn arm(
    context: &mut RequestContext,
    waiting: WaitingFor,
    now: Instant,
    earlier: Option<Instant>,
) -> Result<(), LocalReply> {
    let (timer, state, limits, flow) = context.timer_and_limits();
    match state.check(waiting, now, limits, flow) {
        TimeoutVerdict::Expired(reply) => Err(reply),
        TimeoutVerdict::Wait(at) => {
            timer.set(earlier.map_or(at, |earlier| at.min(earlier)));
            Ok(())
        }
    }
}

/// Ready when the armed timer fires.
pub(super) fn poll_armed(context: &mut RequestContext, cx: &mut Context<'_>) -> Poll<()> {
    context.timer().poll(cx)
}

/// Ready with the local reply of a limit that is reached; until then the timer is armed for the next one.
pub(super) fn poll_expired(
    context: &mut RequestContext,
    waiting: WaitingFor,
    cx: &mut Context<'_>,
) -> Poll<LocalReply> {
    let (timer, state, limits, flow) = context.timer_and_limits();
    loop {
        match state.check(waiting, Instant::now(), limits, flow) {
            TimeoutVerdict::Expired(reply) => return Poll::Ready(reply),
            TimeoutVerdict::Wait(at) => timer.set(at),
        }
        if timer.poll(cx).is_pending() {
            return Poll::Pending;
        }
    }
}

/// The future's output, or `None` if it is not there at `until`: for the waits before a request is sent (queue, name
/// resolution, connect, back-off, injected delay), and for an upgrade.
pub(super) fn within<F: Future>(
    context: &mut RequestContext,
    until: Instant,
    future: F,
) -> impl Future<Output = Option<F::Output>> {
    context.timer().timeout_at(until, future)
}
