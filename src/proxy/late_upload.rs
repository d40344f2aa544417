//! A request body that goes on after its response is complete.
//!
//! An upstream may respond before it has read the whole request, and read on (RFC 9112, 9.5; RFC 9113, 8.1). The exchange,
//! with its connection and its permit, then lasts until the body has passed, the upstream or the caller ends it, or the time
//! limits of the route do. What the exchange reports is fixed by then, but for the bytes of the request.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::Instant;

use crate::proxy::exchange::ActiveExchange;
use crate::proxy::select;
use crate::runtime::tasks;
use crate::upstream::http1::AfterResponse;
use crate::upstream::pool::{Lease, Transport};

/// How long an upstream that has responded in full may leave the rest of the body unread before the body is cut.
const UNREAD: Duration = Duration::from_secs(5);

/// Lets the request body of an exchange go on over `lease`, unless caller or upstream has given it up.
pub(super) fn go_on(mut exchange: Box<ActiveExchange>, lease: Lease) {
    let (context, flow) = (&exchange.context, exchange.context.flow());
    // A caller whose body is held back has sent none of it; gRPC ends a call with its trailers.
    if context.is_grpc() || flow.is_held() || flow.request.failed() {
        return;
    }
    exchange.attempt.set_lease(lease);
    tasks::spawn(async move {
        let limits = exchange.context.timeouts();
        let cutoff = exchange.context.timeout_state().cutoff(limits);
        let mut timer = exchange.context.worker().timers.at(cutoff.at);
        let passed = poll_fn(|cx| {
            if poll_over(&mut exchange, cx).is_ready() {
                return Poll::Ready(true);
            }
            loop {
                let flow = exchange.context.flow();
                // A caller that is waited for has the route's time, an upstream that does not read has given the body up.
                let idle = if flow.awaits_body() { cutoff.idle } else { cutoff.idle.min(UNREAD) };
                let at = cutoff.at.min(flow.last_activity() + idle);
                if Instant::now() >= at {
                    return Poll::Ready(false);
                }
                timer.set(at);
                ready!(timer.poll(cx));
            }
        })
        .await;
        end(exchange, passed);
    });
}

/// Ready when the body has passed, or the upstream or the caller has ended it.
fn poll_over(exchange: &mut ActiveExchange, cx: &mut Context<'_>) -> Poll<()> {
    match exchange.attempt.lease_mut().and_then(Lease::transport) {
        Some(Transport::Http1(connection)) => match connection.after_response(cx) {
            AfterResponse::StillSending => Poll::Pending,
            AfterResponse::Reusable | AfterResponse::Closed => Poll::Ready(()),
        },
        // The stream has a task of its own.
        Some(Transport::Http2(_)) => exchange.context.flow().poll_upload_over(cx),
        None => Poll::Ready(()),
    }
}

fn end(mut exchange: Box<ActiveExchange>, passed: bool) {
    let ActiveExchange { context, attempt, response, .. } = &mut *exchange;
    let now = Instant::now();
    context.set_ended_at(now);
    if let Some(lease) = attempt.take_lease().filter(|_| passed) {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        drop(select::give_back(context, attempt, lease, &mut cx, response.keep_alive, now));
    }
}
