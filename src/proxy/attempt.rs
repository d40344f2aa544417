//! One try at one endpoint: send over the connection that [`select`] found, wait for the head of the answer.
//!
//! A request that a pooled connection hands back unsent goes out over the next one: nobody has seen it.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{HeaderMap, HeaderName};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderValue, Method, Request, Response, Uri, Version, header};
use http_body::Body;
use tokio::time::Instant;

use crate::net::body::RequestBody;
use crate::proxy::headers::ATTEMPT_COUNT;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::request_context::RequestContext;
use crate::proxy::timeouts::TimeoutVerdict;
use crate::proxy::{correlation, fault_injection, outcome, select};
use crate::telemetry::ConnectionUse;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::pool::{Lease, Pool, ProtocolPreference, Transport};
use crate::upstream::response::{SendError, UpstreamBody, UpstreamError};
use crate::upstream::spec::UpstreamProtocol;

const PREVIOUS_ATTEMPTS: HeaderName = HeaderName::from_static("grpc-previous-rpc-attempts");

/// Connections that may hand a request back unsent before we give up.
const UNSENT: usize = 3;

/// How long a caller's body waits for `100 Continue` before it is sent all the same (RFC 9110, 10.1.1); half of
/// `timeouts.request` if that is shorter.
const CONTINUE_AFTER: Duration = Duration::from_secs(1);

/// Sends a request and returns the head of its answer; the connection stays in `request_context`.
///
/// # Errors
/// The refusal that the caller gets instead.
pub async fn send(
    live: &mut RequestContext,
    pool: &Rc<Pool>,
    switching: bool,
) -> Result<Response<UpstreamBody>, LocalReply> {
    // Only HTTP/1.1 has a way to switch a whole connection to another protocol.
    let want = if switching { ProtocolPreference::Http1 } else { want(pool, live.patience.grpc) };
    live.unsent = true;
    if !live.route().faults.is_empty() {
        // Boxed, like everything that few requests meet.
        if let Some(answer) = Box::pin(faulted(live, pool)).await? {
            return Ok(answer);
        }
    }
    for _ in 0..UNSENT {
        let mut begun = Instant::now();
        let lease = match select::borrow(live, pool, want, begun).await {
            Some(lease) => lease,
            None => {
                let lease = Box::pin(select::open(live, pool, want)).await?;
                begun = Instant::now();
                lease
            }
        };
        // What a fault has used up counts as time that the upstream took.
        live.patience.try_began = live.fault.as_ref().and_then(|fault| begun.checked_sub(fault.lost)).unwrap_or(begun);
        live.reused = lease.reused;
        let address = lease.endpoint.address.socket;
        let connection = match lease.reused {
            true => ConnectionUse::Reused { age: begun.saturating_duration_since(lease.born) },
            false => ConnectionUse::New,
        };
        live.record.set_connection(address, connection);
        match exchange(live, lease).await {
            Ok(Some(answer)) => {
                live.record.add_upstream_time(live.patience.took(live.over_at));
                return Ok(answer);
            }
            Ok(None) => live.record.add_failed_upstream_time(live.over_at.saturating_duration_since(begun)),
            Err(refusal) => {
                live.record.add_failed_upstream_time(live.patience.took(live.over_at));
                return Err(refusal);
            }
        }
    }
    live.leaving = true;
    Err(LocalReply::plain(
        LocalReplyKind::UpstreamReset,
        "every connection was closed before the request could be sent",
    ))
}

/// Lets the try meet a fault of the policy, if it is to meet one, at the endpoint that it would go to. `None`: it goes on.
async fn faulted(live: &mut RequestContext, pool: &Rc<Pool>) -> Result<Option<Response<UpstreamBody>>, LocalReply> {
    live.fault = None;
    let view = Rc::clone(&live.view);
    let faults = &view.destination(live.destination()).values.routes[live.route_position()].faults;
    let Some(fault) = fault_injection::draw(live, faults) else { return Ok(None) };
    let began = Instant::now();
    let endpoint = match select::pick(live, pool, began) {
        Some(endpoint) => endpoint,
        None => select::pick_known(live, pool).await?.ok_or_else(select::nobody)?,
    };
    live.record.set_endpoint(endpoint.address.socket);
    let began = Instant::now();
    live.patience.try_began = began;
    let happened = fault_injection::happen(live, fault).await;
    let now = Instant::now();
    let Some(tried) = happened.transpose() else {
        live.picked = Some(endpoint);
        return Ok(None);
    };
    live.over_at = now;
    let took = live.patience.took(now);
    weigh(live, &endpoint, &tried, took);
    match &tried {
        Ok(_) => live.record.add_upstream_time(took),
        Err(_) => live.record.add_failed_upstream_time(took),
    }
    tried.map(Some)
}

/// Notes for the choice among endpoints how a try went that is over now, unless it says nothing about its endpoint.
fn weigh(
    live: &RequestContext,
    endpoint: &Endpoint,
    tried: &Result<Response<UpstreamBody>, LocalReply>,
    took: Duration,
) {
    if outcome::speaks_against(live, tried) {
        endpoint.load.failed(took, live.over_at);
    } else if tried.is_ok() {
        endpoint.load.answered(took, live.over_at);
    }
}

fn want(pool: &Pool, grpc: bool) -> ProtocolPreference {
    match (pool.cluster.identity.protocol, &pool.cluster.identity.tls) {
        (UpstreamProtocol::Http1, _) => ProtocolPreference::Http1,
        (UpstreamProtocol::Http2, _) => ProtocolPreference::Http2,
        (UpstreamProtocol::Auto, Some(_)) => ProtocolPreference::Either,
        (UpstreamProtocol::Auto, None) if grpc => ProtocolPreference::Http2,
        (UpstreamProtocol::Auto, None) => ProtocolPreference::Http1,
    }
}

/// Sends over one connection and waits for the head, judged by the route's time limits. `None` if the request came back
/// unsent, into `request_context`.
async fn exchange(live: &mut RequestContext, mut lease: Lease) -> Result<Option<Response<UpstreamBody>>, LocalReply> {
    let endpoint = Rc::clone(&lease.endpoint);
    live.unsent = false;
    let goes_on = hold_for_continue(live, &mut lease);
    let began = live.sent_at();
    let limits = &live.route().timeouts;
    let whole = limits.per_try.as_ref().map_or(limits.request.value, |per_try| per_try.value.min(limits.request.value));
    let patience = CONTINUE_AFTER.min(whole / 2);
    let mut wait = Wait { live, goes_on, held_until: began + patience };
    wait.look_at(began)?;
    let answer = match lease.transport() {
        Some(Transport::Http1(connection)) => {
            let waker = Rc::clone(&wait.live.waker);
            let mut answer = pin!(None);
            poll_fn(|cx| {
                if answer.is_none() {
                    // Sent from here, because every way out of a closure would move the request once more.
                    waker.without_wakes(cx, |_| answer.set(Some(connection.send(for_http1(wait.live)))));
                }
                let polled = waker.poll(cx, |cx| {
                    // The connection has no task of its own: this is what moves it.
                    let _over = connection.drive(cx);
                    if wait.released() {
                        let _over = connection.drive(cx);
                    }
                    answer.as_mut().as_pin_mut().map_or(Poll::Pending, |answer| answer.poll(cx))
                });
                let polled = polled.map_ok(|answer| answer.map(UpstreamBody::Http1)).map_err(SendError::from);
                wait.poll(cx, polled)
            })
            .await
        }
        Some(Transport::Http2(connection)) => {
            let mut answer = pin!(connection.send(for_http2(wait.live, &endpoint)));
            poll_fn(|cx| {
                let polled = answer.as_mut().poll(cx);
                wait.poll(cx, polled)
            })
            .await
        }
        None => return Err(LocalReply::plain(LocalReplyKind::UpstreamReset, "the connection is gone")),
    };
    let now = Instant::now();
    let took = live.patience.took(now);
    live.over_at = now;
    let tried = match answer {
        Ok(Ok(answer)) => {
            live.lease = Some(lease);
            Ok(answer)
        }
        Ok(Err(SendError { unsent: Some(back), .. })) => {
            live.request = Some(*back);
            live.unsent = true;
            return Ok(None);
        }
        Ok(Err(SendError { error, unsent: None })) => {
            live.unsent = error.is_unprocessed();
            live.reused &= error.is_close();
            live.leaving = error.is_go_away();
            let refusal = broken(live, lease.reused, &error);
            if error.is_close() && outcome::is_callees_fault(live, refusal.kind) {
                lease.lost_race(began, now);
            }
            Err(refusal)
        }
        Err(refusal) => Err(refusal),
    };
    weigh(live, &endpoint, &tried, took);
    tried.map(Some)
}

/// What the wait for the head looks at each time it is woken.
struct Wait<'a> {
    live: &'a mut RequestContext,
    goes_on: Option<Arc<AtomicBool>>,
    held_until: Instant,
}

type Answer = Result<Response<UpstreamBody>, SendError>;

impl Wait<'_> {
    /// True once, when the upstream has asked for the body.
    fn released(&mut self) -> bool {
        let asked = self.goes_on.as_ref().is_some_and(|flag| flag.load(Relaxed));
        if asked {
            self.goes_on = None;
            self.live.flow.release();
        }
        asked
    }

    fn poll(&mut self, cx: &mut Context<'_>, answer: Poll<Answer>) -> Poll<Result<Answer, LocalReply>> {
        if let Poll::Ready(answer) = answer {
            return Poll::Ready(Ok(answer));
        }
        while self.live.timer.poll(cx).is_ready() {
            if let Err(refusal) = self.look_at(Instant::now()) {
                return Poll::Ready(Err(refusal));
            }
        }
        Poll::Pending
    }

    /// Judges the exchange at `now` and sets the timer to the next look.
    fn look_at(&mut self, now: Instant) -> Result<(), LocalReply> {
        let live = &mut *self.live;
        match live.patience.judge(now, &live.route().timeouts, &live.flow) {
            TimeoutVerdict::Over(refusal) => Err(refusal),
            TimeoutVerdict::Wait(at) => {
                if now >= live.patience.request_at(&live.route().timeouts) {
                    correlation::lift(live);
                }
                let held = live.flow.is_held();
                if held && now >= self.held_until {
                    live.flow.release();
                }
                let at = if held && now < self.held_until { at.min(self.held_until) } else { at };
                live.timer.set(at);
                Ok(())
            }
        }
    }
}

/// Holds the caller's body back while the upstream has not asked for it (RFC 9110, 10.1.1).
fn hold_for_continue(live: &mut RequestContext, lease: &mut Lease) -> Option<Arc<AtomicBool>> {
    if !live.expects {
        return None;
    }
    let request = live.request.as_mut()?;
    let has_begun = live.flow.request.bytes() > 0 || live.flow.request.ended();
    if has_begun || !matches!(lease.transport(), Some(Transport::Http1(_))) {
        // What an earlier try has got of the caller need not be asked for again; and hyper does not report a 1xx that
        // comes over HTTP/2, so that there is nothing to wait for.
        request.headers_mut().remove(header::EXPECT);
        return None;
    }
    live.flow.hold();
    let flag = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&flag);
    hyper::ext::on_informational(request, move |answer| {
        if answer.status() == http::StatusCode::CONTINUE {
            asked.store(true, Relaxed);
        }
    });
    Some(flag)
}

/// The paths of a target without one (RFC 9112, 3.2.1 and 3.2.4).
const SLASH: PathAndQuery = PathAndQuery::from_static("/");
const STAR: PathAndQuery = PathAndQuery::from_static("*");

/// Origin-form, as every request to a server that is not a proxy (RFC 9112, 3.2.1).
fn for_http1(live: &mut RequestContext) -> Request<RequestBody> {
    let mut request = outgoing(live);
    *request.version_mut() = Version::HTTP_11;
    if request.uri().authority().is_some() {
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.scheme = None;
        // Exactly one Host field, the target's own (RFC 9112, 3.2.2).
        if let Some(authority) = parts.authority.take()
            && let Ok(host) = HeaderValue::from_str(authority.as_str())
        {
            request.headers_mut().insert(header::HOST, host);
        }
        parts.path_and_query = Some(match parts.path_and_query {
            // Written as `http://host`, without even a slash, which this comparison alone tells from `http://host/`.
            Some(path) if path.as_str() == "/" && path != SLASH && request.method() == Method::OPTIONS => STAR,
            Some(path) => path,
            None => SLASH,
        });
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    }
    if !request.body().is_end_stream() && request.body().size_hint().exact().is_none() {
        // Said here, because hyper leaves the body of a GET out if nothing says how it is framed.
        request.headers_mut().insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    if live.takes_trailers {
        let switches = request.headers().contains_key(header::UPGRADE);
        let named = if switches { "upgrade, te" } else { "te" };
        request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static(named));
    }
    request
}

/// The request, which is there unless a connection has it.
fn outgoing(live: &mut RequestContext) -> Request<RequestBody> {
    let flow = &live.flow;
    let mut request = live.request.take().unwrap_or_else(|| Request::new(RequestBody::empty(Rc::clone(flow))));
    if live.attempt > 1 {
        count_tries(live, request.headers_mut());
    }
    let now = live.sent_at();
    correlation::tell(live, request.headers_mut(), now);
    request
}

/// Says which try this is: counted from 1 as Envoy does, and without the first as gRPC does (gRFC A6). Our tries come
/// on top of those of the hop before an inbound listener, and of those that the app's own gRPC library has made.
fn count_tries(live: &RequestContext, fields: &mut HeaderMap) {
    let again = u32::from(live.attempt) - 1;
    fields.insert(ATTEMPT_COUNT, HeaderValue::from(counted(live, &ATTEMPT_COUNT).unwrap_or(1).saturating_add(again)));
    if live.patience.grpc {
        let before = counted(live, &PREVIOUS_ATTEMPTS).unwrap_or(0);
        fields.insert(PREVIOUS_ATTEMPTS, HeaderValue::from(before.saturating_add(again)));
    }
}

/// What the request said when it came. Not what it says now: one that a connection has handed back was counted already.
fn counted(live: &RequestContext, name: &HeaderName) -> Option<u32> {
    live.spare.as_ref()?.head.headers.get(name)?.to_str().ok()?.parse().ok()
}

/// Control data in the target, no Host field (RFC 9113, 8.3.1).
fn for_http2(live: &mut RequestContext, endpoint: &Endpoint) -> Request<RequestBody> {
    let mut request = outgoing(live);
    *request.version_mut() = Version::HTTP_2;
    let host = request.headers_mut().remove(header::HOST);
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    let encrypted = live.destination_values().tls.is_some();
    parts.scheme = Some(if encrypted { http::uri::Scheme::HTTPS } else { http::uri::Scheme::HTTP });
    if parts.authority.is_none() {
        parts.authority = host
            .and_then(|host| Authority::try_from(host.as_bytes()).ok())
            .or_else(|| endpoint.address.socket.to_string().parse().ok());
    }
    if parts.path_and_query.is_none() {
        parts.path_and_query = Some(SLASH);
    }
    *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    request
}

/// Says what a broken connection means.
fn broken(live: &RequestContext, reused: bool, error: &UpstreamError) -> LocalReply {
    if let Some(refusal) = outcome::broken_by_caller(live) {
        return refusal;
    }
    let cause = error.sentence();
    if error.is_malformed() {
        return LocalReply::plain(LocalReplyKind::UpstreamProtocol, format!("the answer cannot be read: {cause}"));
    }
    let over = if reused { "a kept-alive connection" } else { "a new connection" };
    LocalReply::plain(
        LocalReplyKind::UpstreamReset,
        format!("the upstream broke off before its answer, over {over}: {cause}"),
    )
}
