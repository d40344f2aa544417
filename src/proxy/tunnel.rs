//! An exchange that has become a tunnel: bytes both ways, and one record at the end.

use crate::net::io::Io;
use crate::net::tunnel::{self, TunnelEnd, TunnelSide};
use crate::proxy::exchange::ActiveExchange;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};

/// The two streams of a tunnel that is about to begin, but for the caller's.
pub(super) struct Handoff {
    /// The stream to the upstream.
    pub(super) upstream: Io,
    /// The exchange that led here.
    pub(super) exchange: Box<ActiveExchange>,
}

impl Handoff {
    /// Joins the two streams until both have ended, a side breaks off, or a time limit of the route ends them.
    pub(super) async fn join(self, downstream: Io) {
        let Self { upstream, mut exchange } = self;
        let context = &mut exchange.context;
        let limits = context.timeouts().clone();
        let (idle, life) = (limits.idle.value, limits.max_duration.value);
        let report = tunnel::run(downstream, upstream, idle, life).await;
        context.flow().request.add(report.sent);
        context.flow().response.add(report.received);
        let reply = match report.end {
            TunnelEnd::Finished => None,
            // Without an end of the record, the caller has gone.
            TunnelEnd::Broken(TunnelSide::Caller) => return,
            TunnelEnd::Broken(TunnelSide::Upstream) => {
                context.record_mut().upstream_cut();
                None
            }
            TunnelEnd::Idle => {
                let detail = "no byte in either direction";
                Some(LocalReply::timed(LocalReplyKind::IdleTimeout, "timeouts.idle", &limits.idle, detail))
            }
            TunnelEnd::Expired => {
                let (limit, detail) = (&limits.max_duration, "the tunnel lasted too long");
                Some(LocalReply::timed(LocalReplyKind::MaxDuration, "timeouts.maxDuration", limit, detail))
            }
        };
        if let Some(reply) = reply {
            context.record_mut().refuse(reply.record());
        }
        context.record_mut().complete();
    }
}
