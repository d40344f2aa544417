//! An exchange that has become a tunnel: bytes both ways, and one record at the end.

use crate::net::io::Io;
use crate::net::tunnel::{self, TunnelEnd};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::request_context::RequestContext;

/// What it takes to go on as a tunnel.
pub struct Handoff {
    /// The stream to the upstream.
    pub upstream: Io,
    /// The exchange that led here.
    pub live: Box<RequestContext>,
}

impl Handoff {
    /// Joins the two streams until both have ended, or a time limit of the route ends them.
    pub async fn join(self, caller: Io) {
        let Self { upstream, mut live } = self;
        let limits = live.route().timeouts.clone();
        let (idle, life) = (limits.idle.value, limits.max_duration.value);
        let report = tunnel::run(caller, upstream, idle, life).await;
        live.flow.request.add(report.sent);
        live.flow.response.add(report.received);
        let refusal = match report.end {
            TunnelEnd::Finished | TunnelEnd::Broken => None,
            TunnelEnd::Idle => Some(LocalReply::timed(
                LocalReplyKind::IdleTimeout,
                "timeouts.idle",
                &limits.idle,
                "no byte in either direction",
            )),
            TunnelEnd::Expired => Some(LocalReply::timed(
                LocalReplyKind::MaxDuration,
                "timeouts.maxDuration",
                &limits.max_duration,
                "the tunnel lived too long",
            )),
        };
        if let Some(refusal) = refusal {
            live.record.refuse(refusal.record());
        }
        live.record.complete();
    }
}
