//! Sends an attempt over the connection that [`select`] found, and waits for the response head.
//!
//! A request that a pooled connection hands back unsent goes out over the next connection: the upstream has not seen it.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Response, header};
use tokio::time::Instant;

use crate::net::http1::parsed_headers;
use crate::problems::Sourced;
use crate::proxy::attempt::Attempt;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::replay::RetryState;
use crate::proxy::request_context::RequestContext;
use crate::proxy::stale_wait::{self, StaleWait};
use crate::proxy::timeout_state::WaitingFor;
use crate::proxy::{
    admission, breaker_and_ejection, connecting, correlation, fault_injection, select, timeouts, upstream_request,
};
use crate::telemetry::ConnectionUse;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::pool::{Lease, ProtocolPreference, Transport};
use crate::upstream::response::{SendError, UpstreamBody, UpstreamError};
use crate::upstream::spec::UpstreamProtocol;

/// Connections that may hand a request back unsent before the attempt fails.
const MAX_UNSENT: usize = 3;

/// How long a caller's body waits for `100 Continue` before it is sent all the same (RFC 9110, 10.1.1); half of
/// `timeouts.request` or `timeouts.perTry` where that is shorter.
const CONTINUE_AFTER: Duration = Duration::from_secs(1);

/// Sends a request and returns the head of its response; the connection stays in the attempt.
///
/// # Errors
/// The local reply that the caller gets instead.
pub(super) async fn send(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    retry: &mut RetryState,
    switches_protocol: bool,
) -> Result<Response<UpstreamBody>, LocalReply> {
    attempt.begin_unsent();
    if !context.route().faults.is_empty() {
        // Boxed, like everything that few requests meet.
        if let Some(response) = Box::pin(inject_fault(context, attempt, retry)).await? {
            return Ok(response);
        }
    }
    let preference = preference(context, attempt, switches_protocol);
    for left in (0..MAX_UNSENT).rev() {
        let mut begun = Instant::now();
        // The last one is new: a pool whose upstream has just ended may have more connections than attempts are left.
        let pooled = match left {
            0 => None,
            _ => select::checkout(context, attempt, retry, preference, begun).await,
        };
        let lease = match pooled {
            Some(lease) => {
                if !lease.reused {
                    begun = Instant::now();
                }
                lease
            }
            None => {
                let takes_reused = left > 0;
                let lease = Box::pin(connecting::open(context, attempt, retry, preference, takes_reused)).await?;
                begun = Instant::now();
                lease
            }
        };
        attempt.connected(begun, lease.reused);
        let connection = match lease.reused {
            true => ConnectionUse::Reused { age: lease.age(begun) },
            false => ConnectionUse::New,
        };
        context.record_mut().set_connection(lease.endpoint.address.socket, connection);
        match send_over(context, attempt, retry, lease).await {
            Ok(Some(response)) => {
                let took = attempt.took(context.ended_at());
                context.record_mut().add_upstream_time(took);
                return Ok(response);
            }
            Ok(None) => {
                let took = context.ended_at().saturating_duration_since(begun);
                context.record_mut().add_failed_upstream_time(took);
            }
            Err(reply) => {
                let took = attempt.took(context.ended_at());
                context.record_mut().add_failed_upstream_time(took);
                return Err(reply);
            }
        }
    }
    attempt.ran_out_of_connections();
    let detail = "every connection was closed before the request could be sent";
    Err(LocalReply::plain(LocalReplyKind::UpstreamReset, detail))
}

/// Injects the fault that the attempt draws, if any, at the endpoint that it would go to. `None`: the request goes on.
async fn inject_fault(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    retry: &RetryState,
) -> Result<Option<Response<UpstreamBody>>, LocalReply> {
    let view = Rc::clone(context.view());
    let faults = &view.policy.route(context.route_id()).faults;
    let Some(fault) = fault_injection::draw(context, attempt, faults) else { return Ok(None) };
    let endpoint = match select::pick(context, attempt, retry, Instant::now()) {
        Some(endpoint) => endpoint,
        None => select::pick_resolved(context, attempt, retry).await?.ok_or_else(select::no_endpoint)?,
    };
    context.record_mut().set_endpoint(endpoint.address.socket);
    attempt.fault_begins(Instant::now());
    let injected = fault_injection::inject(context, attempt, fault).await;
    let now = Instant::now();
    let Some(result) = injected.transpose() else {
        attempt.keep_picked(Some(endpoint));
        return Ok(None);
    };
    context.set_ended_at(now);
    let took = attempt.took(now);
    weigh(context, &endpoint, &result, took);
    match &result {
        Ok(_) => context.record_mut().add_upstream_time(took),
        Err(_) => context.record_mut().add_failed_upstream_time(took),
    }
    result.map(Some)
}

/// Tells load balancing how an attempt went that is over, unless that says nothing about its endpoint.
fn weigh(
    context: &RequestContext,
    endpoint: &Endpoint,
    result: &Result<Response<UpstreamBody>, LocalReply>,
    took: Duration,
) {
    if breaker_and_ejection::counts_against_upstream(context, result) {
        endpoint.load.record_failure(took, context.ended_at());
    } else if result.is_ok() {
        endpoint.load.record_response(took, context.ended_at());
    }
    if result.is_ok() {
        endpoint.reachability.answered(context.ended_at());
    }
}

fn preference(context: &RequestContext, attempt: &Attempt, switches_protocol: bool) -> ProtocolPreference {
    // Only HTTP/1.1 can switch a whole connection to another protocol (RFC 9110, 7.8).
    let Some(upstream) = attempt.upstream().filter(|_| !switches_protocol) else { return ProtocolPreference::Http1 };
    let identity = &upstream.pool.cluster.identity;
    match (identity.protocol, &identity.tls) {
        (UpstreamProtocol::Http1, _) => ProtocolPreference::Http1,
        (UpstreamProtocol::Http2, _) => ProtocolPreference::Http2,
        (UpstreamProtocol::Auto, Some(_)) => ProtocolPreference::Either,
        (UpstreamProtocol::Auto, None) if context.is_grpc() => ProtocolPreference::Http2,
        (UpstreamProtocol::Auto, None) => ProtocolPreference::Http1,
    }
}

/// Sends over one connection and waits for the head, within the route's time limits. `None` if the request came back
/// unsent, into the attempt.
async fn send_over(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    retry: &RetryState,
    mut lease: Lease,
) -> Result<Option<Response<UpstreamBody>>, LocalReply> {
    let endpoint = Rc::clone(&lease.endpoint);
    let continued = hold_for_continue(context, attempt, &mut lease);
    let began = attempt.sent_at();
    let limits = context.timeouts();
    let whole = limits.per_try.as_ref().map_or(limits.request.value, |per_try| per_try.value.min(limits.request.value));
    let held_until = began + CONTINUE_AFTER.min(whole / 2);
    let stale = StaleWait::begin(context, attempt, retry, &lease);
    let mut wait = HeadWait { context, waiting: attempt.waiting(), continued, held_until, stale };
    wait.arm(began)?;
    lease.record_sent(began);
    let response = match lease.transport() {
        Some(Transport::Http1(connection)) => {
            let waker = Rc::clone(wait.context.waker());
            let mut response = pin!(None);
            poll_fn(|cx| {
                if response.is_none() {
                    // Sent from here, because every way out of a closure would move the request once more.
                    waker.without_wakes(cx, |_| {
                        response.set(Some(connection.send(upstream_request::http1(wait.context, attempt, retry))));
                    });
                }
                let polled = waker.poll(cx, |cx| {
                    // The connection has no task of its own: this is what drives it.
                    let _over = connection.drive(cx);
                    if wait.is_continued() {
                        let _over = connection.drive(cx);
                    }
                    response.as_mut().as_pin_mut().map_or(Poll::Pending, |response| response.poll(cx))
                });
                let polled = polled.map_ok(|response| response.map(UpstreamBody::Http1)).map_err(SendError::from);
                wait.poll(cx, polled)
            })
            .await
        }
        Some(Transport::Http2(connection)) => {
            let request = upstream_request::http2(wait.context, attempt, retry, &endpoint);
            let mut response = pin!(connection.send(request));
            poll_fn(|cx| {
                let polled = response.as_mut().poll(cx);
                wait.poll(cx, polled)
            })
            .await
        }
        None => return Err(LocalReply::plain(LocalReplyKind::UpstreamReset, "the connection is gone")),
    };
    let now = Instant::now();
    let took = attempt.took(now);
    context.set_ended_at(now);
    let result = match response {
        Ok(Ok(response)) => {
            lease.record_answer();
            attempt.set_lease(lease);
            Ok(response)
        }
        Ok(Err(SendError { unsent: Some(back), .. })) => {
            attempt.handed_back(*back);
            return Ok(None);
        }
        Ok(Err(SendError { error, unsent: None })) => Err(broke_off(context, attempt, &lease, &error, began, now)),
        Err(reply) => {
            attempt.set_same_event(lease.is_stale());
            if endpoint.reachability.has_answered_since(began) {
                attempt.set_overtaken();
            }
            if reply.kind.is_upstream_silence() {
                lease.record_timeout();
            }
            Err(reply)
        }
    };
    if !attempt.is_same_event() {
        weigh(context, &endpoint, &result, took);
    }
    result.map(Some)
}

/// Takes note of a connection that broke off before the response head; returns what the caller is told.
fn broke_off(
    context: &RequestContext,
    attempt: &mut Attempt,
    lease: &Lease,
    error: &UpstreamError,
    began: Instant,
    now: Instant,
) -> LocalReply {
    attempt.broke_off(error.is_unprocessed(), error.is_connection_closed(), error.is_go_away());
    let reply = match error.is_head_too_large() {
        true => head_too_large(&select::connections(context, attempt).max_header_count),
        false => broken(context, lease.reused, error),
    };
    if error.is_silent_end() && breaker_and_ejection::is_upstreams_fault(context, reply.kind) {
        attempt.set_same_event(!lease.record_end(began, now));
    }
    reply
}

/// What the caller is told of a response head that hyper has refused for its length; hyper does not tell which of its two
/// bounds it is.
fn head_too_large(limit: &Sourced<u32>) -> LocalReply {
    let most = parsed_headers(limit.value);
    let detail = format!("the head of the response has more than {most} fields, or more than about 400 KiB");
    LocalReply::too_many_headers(limit, detail)
}

/// What a broken connection means.
fn broken(context: &RequestContext, is_reused: bool, error: &UpstreamError) -> LocalReply {
    if let Some(reply) = admission::broken_body(context) {
        return reply;
    }
    let cause = error.with_causes();
    if error.is_malformed() {
        let detail = format!("the response cannot be parsed: {cause}");
        return LocalReply::plain(LocalReplyKind::UpstreamProtocol, detail);
    }
    let over = if is_reused { "a reused connection" } else { "a new connection" };
    let detail = format!("the upstream broke off before its response, over {over}: {cause}");
    LocalReply::plain(LocalReplyKind::UpstreamReset, detail)
}

/// What the wait for the response head looks at each time it is woken.
struct HeadWait<'a> {
    context: &'a mut RequestContext,
    waiting: WaitingFor,
    /// Set while the caller's body is held back: becomes true when the upstream says `100 Continue`.
    continued: Option<Arc<AtomicBool>>,
    held_until: Instant,
    /// `Some` if the request may be sent again should its connection become stale.
    stale: Option<StaleWait<'a>>,
}

type Sent = Result<Response<UpstreamBody>, SendError>;

impl HeadWait<'_> {
    /// True once, when the upstream has said `100 Continue`: the body goes out.
    fn is_continued(&mut self) -> bool {
        let is_continued = self.continued.as_ref().is_some_and(|flag| flag.load(Relaxed));
        if is_continued {
            self.continued = None;
            self.context.flow().release();
        }
        is_continued
    }

    fn poll(&mut self, cx: &mut Context<'_>, sent: Poll<Sent>) -> Poll<Result<Sent, LocalReply>> {
        if let Poll::Ready(sent) = sent {
            return Poll::Ready(Ok(sent));
        }
        if self.stale.as_ref().is_some_and(StaleWait::is_news) {
            // Armed here, because the wake-up came from another connection's end and not from the timer.
            if let Err(reply) = self.arm(Instant::now()) {
                return Poll::Ready(Err(reply));
            }
        }
        while timeouts::poll_armed(self.context, cx).is_ready() {
            if let Err(reply) = self.arm(Instant::now()) {
                return Poll::Ready(Err(reply));
            }
        }
        Poll::Pending
    }

    /// Checks the time limits at `now`, and arms the timer for the next one.
    fn arm(&mut self, now: Instant) -> Result<(), LocalReply> {
        let is_held = self.context.flow().is_held();
        let held_until = (is_held && now < self.held_until).then_some(self.held_until);
        let given_up_at = self.stale.as_mut().and_then(StaleWait::given_up_at);
        if given_up_at.is_some_and(|at| now >= at) && !self.context.flow().awaits_body() {
            return Err(stale_wait::given_up());
        }
        let earlier = held_until.into_iter().chain(given_up_at).min();
        timeouts::arm(self.context, self.waiting, now, earlier)?;
        if now >= self.context.request_at() {
            correlation::lift_unary_deadline(self.context);
        }
        if is_held && now >= self.held_until {
            self.context.flow().release();
        }
        Ok(())
    }
}

/// Holds the caller's body back while the upstream has not asked for it (RFC 9110, 10.1.1).
fn hold_for_continue(context: &RequestContext, attempt: &mut Attempt, lease: &mut Lease) -> Option<Arc<AtomicBool>> {
    if !context.expects_continue() {
        return None;
    }
    let request = attempt.request_mut()?;
    let body = &context.flow().request;
    let has_begun = body.bytes() > 0 || body.ended();
    if has_begun || !matches!(lease.transport(), Some(Transport::Http1(_))) {
        // What an earlier attempt has received of the caller need not be asked for again; and hyper does not report a 1xx
        // that comes over HTTP/2, so that there is nothing to wait for.
        request.headers_mut().remove(header::EXPECT);
        return None;
    }
    context.flow().hold();
    let flag = Arc::new(AtomicBool::new(false));
    let continued = Arc::clone(&flag);
    hyper::ext::on_informational(request, move |response| {
        if response.status() == http::StatusCode::CONTINUE {
            continued.store(true, Relaxed);
        }
    });
    Some(flag)
}
