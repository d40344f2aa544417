//! An exchange that has become a tunnel: bytes both ways, and one record at the end.

use crate::net::io::Io;
use crate::net::tunnel::{self, End};
use crate::proxy::live::Live;
use crate::proxy::refusal::{Kind, Refusal};

/// What it takes to go on as a tunnel.
pub struct Handoff {
    /// The stream to the upstream.
    pub upstream: Io,
    /// The exchange that led here.
    pub live: Box<Live>,
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
            End::Finished | End::Broken => None,
            End::Idle => {
                Some(Refusal::timed(Kind::IdleTimeout, "timeouts.idle", &limits.idle, "no byte in either direction"))
            }
            End::Expired => Some(Refusal::timed(
                Kind::MaxDuration,
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
