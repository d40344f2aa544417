//! Endpoint selection and connection checkout: which upstream an attempt goes to, which of its endpoints, over which
//! connection.
//!
//! Where no connection is open, `connecting` waits for one. A name that has never been resolved is waited for as long as the
//! call lasts.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use crate::policy::model::Direction;
use crate::proxy::attempt::{Attempt, Upstream};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::permits::HeldPermit;
use crate::proxy::replay::RetryState;
use crate::proxy::request_context::RequestContext;
use crate::proxy::target::RequestTarget;
use crate::proxy::{breaker_and_ejection, timeouts};
use crate::upstream::connect::ConnectError;
use crate::upstream::dial::ConnectOptions;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::lifetime::EndReason;
use crate::upstream::pool::{Lease, Pool, ProtocolPreference};
use crate::upstream::spec::Connections;
use crate::upstream::waiters::{ConnectionWait, WaitEvent};

/// The upstream of the next attempt: the destination that the route belongs to, and this worker's pool for it. The pool of
/// the attempt before is kept: a reload in between may have replaced it.
///
/// # Errors
/// If the destination has no endpoints, and the request names no host.
pub(super) fn upstream(context: &RequestContext, attempt: &Attempt) -> Result<Upstream, LocalReply> {
    let destination = context.route_id().owner();
    if let Some(before) = attempt.upstream().filter(|before| before.destination == destination) {
        return Ok(before.clone());
    }
    let compiled = context.destination(destination);
    let pools = &context.worker().upstreams;
    if !compiled.values.endpoints.is_empty() {
        return Ok(Upstream { destination, pool: Rc::clone(context.view().pool(destination, pools)) });
    }
    let Some(target) = RequestTarget::parse(context.record().authority()) else {
        let detail = "the destination has no endpoints and the request names no host";
        return Err(LocalReply::plain(LocalReplyKind::NoRoute, detail));
    };
    let port = target.port.unwrap_or(if compiled.values.tls.is_some() { 443 } else { 80 });
    Ok(Upstream { destination, pool: pools.dynamic_pool(&compiled.cluster, target.host, port) })
}

/// A connection that is open already, to the endpoint that is the best one now.
pub(super) async fn checkout(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    retry: &RetryState,
    preference: ProtocolPreference,
    now: Instant,
) -> Option<Lease> {
    let endpoint = attempt.take_picked().or_else(|| pick(context, attempt, retry, now))?;
    let pool = &attempt.upstream()?.pool;
    let waker = context.waker();
    let mut lease =
        with_context(|cx| waker.without_wakes(cx, |cx| pool.checkout(&endpoint, preference, now, cx))).await;
    if !context.is_idempotent()
        && let Some(idle) = lease.take_if(|idle| wants_fresh(context, pool, idle, now))
    {
        let pool = Rc::clone(pool);
        // Boxed, like everything that few requests meet.
        lease = Box::pin(replace_idle(context, attempt, &pool, idle, preference)).await;
    }
    attempt.keep_picked(lease.is_none().then_some(endpoint));
    lease
}

/// A connection that is open already, to this endpoint.
pub(super) async fn checkout_at(
    context: &RequestContext,
    pool: &Pool,
    endpoint: &Rc<Endpoint>,
    preference: ProtocolPreference,
    now: Instant,
) -> Option<Lease> {
    let waker = context.waker();
    with_context(|cx| waker.without_wakes(cx, |cx| pool.checkout(endpoint, preference, now, cx))).await
}

/// Whether a request that must not be sent twice goes over a new connection instead. An app that goes down closes an idle
/// connection at this very moment, or drops what comes over it, and then it is unknown whether the app saw the request; a new
/// connection is refused. Only before the app, on the same machine, where a new connection costs next to nothing; only so often, and
/// only while the app leaves no connection waiting.
fn wants_fresh(context: &RequestContext, pool: &Pool, lease: &Lease, now: Instant) -> bool {
    let endpoint = &lease.endpoint;
    context.direction() == Direction::Inbound
        && !context.route().retry.idempotent.value
        && lease.is_http1()
        && pool.cluster.identity.tls.is_none()
        && endpoint.address.socket.ip().is_loopback()
        && endpoint.reachability.decides_quickly(now)
        && endpoint.fresh.admits(now)
}

/// How long a new connection in place of an idle one may take. On the same machine it is open at once, or refused at once, or
/// the app's queue of new connections is full.
const FRESH_PATIENCE: Duration = Duration::from_millis(20);

/// A new connection in place of an idle one; the idle one if the new one is not open in time, because the app accepts slowly.
/// `None` if the app refuses it.
async fn replace_idle(
    context: &mut RequestContext,
    attempt: &Attempt,
    pool: &Rc<Pool>,
    idle: Lease,
    preference: ProtocolPreference,
) -> Option<Lease> {
    let options = options(context, attempt);
    let endpoint = Rc::clone(&idle.endpoint);
    let began = Instant::now();
    let mut wait = ConnectionWait::new(pool, preference, options, false);
    wait.wait_at(&endpoint, true);
    let opened = timeouts::within(context, began + FRESH_PATIENCE, wait.next()).await;
    let now = Instant::now();
    context.record_mut().add_connect_time(now.saturating_duration_since(began));
    match opened {
        Some(WaitEvent::Connection(mut new)) => {
            new.replaces_idle = true;
            Some(new)
        }
        Some(WaitEvent::Failed(_, error)) if error.is_refused() => None,
        Some(WaitEvent::Failed(..)) | None => {
            endpoint.fresh.was_slow(now);
            Some(idle)
        }
    }
}

/// The best endpoint that this call has not asked yet, with a permit of that endpoint.
pub(super) fn pick(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    retry: &RetryState,
    now: Instant,
) -> Option<Rc<Endpoint>> {
    attempt.set_endpoint(None, HeldPermit::None);
    let upstream = attempt.upstream()?;
    let destination = upstream.destination;
    let obeys = context.destination(destination).ejects;
    let mut endpoint = upstream.pool.pick(now, retry.attempted(), obeys)?;
    let mut permit = breaker_and_ejection::admit_at_endpoint(context, destination, &endpoint, now);
    if permit.is_none() {
        // Another call is just probing it.
        endpoint = upstream.pool.pick(now, retry.attempted(), obeys)?;
        permit = breaker_and_ejection::admit_at_endpoint(context, destination, &endpoint, now);
    }
    attempt.set_endpoint(Some(Rc::clone(&endpoint)), permit.unwrap_or_default());
    Some(endpoint)
}

/// Does something that needs the context of the task.
async fn with_context<T>(work: impl FnOnce(&mut Context<'_>) -> T) -> T {
    let mut work = Some(work);
    poll_fn(|cx| work.take().map_or(Poll::Pending, |work| Poll::Ready(work(cx)))).await
}

/// This worker's pool for the upstream of the attempt.
///
/// # Errors
/// If the attempt has no upstream.
pub(super) fn pool(attempt: &Attempt) -> Result<Rc<Pool>, LocalReply> {
    attempt.upstream().map(|upstream| Rc::clone(&upstream.pool)).ok_or_else(no_endpoint)
}

/// What the policy says about connections to the upstream of the attempt.
pub(super) fn options(context: &RequestContext, attempt: &Attempt) -> ConnectOptions {
    context.connect_options(destination(context, attempt))
}

/// `connections` of the destination of an attempt.
pub(super) fn connections<'a>(context: &'a RequestContext, attempt: &Attempt) -> &'a Connections {
    &context.destination(destination(context, attempt)).values.connections
}

fn destination(context: &RequestContext, attempt: &Attempt) -> usize {
    attempt.upstream().map_or(context.route_id().owner(), |upstream| upstream.destination)
}

/// Whether the upstream has an endpoint that the call has not asked.
pub(super) fn has_other_endpoint(attempt: &Attempt, retry: &RetryState) -> bool {
    let (Some(upstream), Some(endpoint)) = (attempt.upstream(), attempt.endpoint()) else { return false };
    upstream.pool.has_other(retry.attempted(), endpoint)
}

/// The same as [`pick`], once the pool knows its endpoints: a name that has never been resolved is waited for as long as the
/// call lasts.
///
/// # Errors
/// If there is no address for the name, or not in time.
pub(super) async fn pick_resolved(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    retry: &RetryState,
) -> Result<Option<Rc<Endpoint>>, LocalReply> {
    let until = context.request_at();
    let began = Instant::now();
    let pool = pool(attempt)?;
    let resolved = timeouts::within(context, until, pool.wait_resolved()).await;
    // Name resolution counts as a part of connecting.
    context.record_mut().add_connect_time(began.elapsed());
    match resolved {
        Some(resolved) => resolved.map_err(|error| connect_error(&error))?,
        None => {
            let detail = "the name was not resolved in time";
            return Err(context.timeout_state().expired_unsent(context.timeouts(), LocalReplyKind::DnsFailed, detail));
        }
    }
    Ok(pick(context, attempt, retry, Instant::now()))
}

/// The local reply where no endpoint is left to ask.
pub(super) fn no_endpoint() -> LocalReply {
    LocalReply::plain(LocalReplyKind::ConnectFailed, "no endpoint could be tried")
}

/// What a failed connection means.
pub(super) fn connect_error(error: &ConnectError) -> LocalReply {
    let kind = match error {
        ConnectError::Network(_) => LocalReplyKind::ConnectFailed,
        ConnectError::Tls(_) => LocalReplyKind::TlsFailed,
        // A server that is just going down takes connections and closes them; it has seen nothing of the call.
        ConnectError::Handshake(error) if !error.is_malformed() => LocalReplyKind::ConnectFailed,
        ConnectError::Handshake(_) | ConnectError::NotHttp2 => LocalReplyKind::UpstreamProtocol,
        ConnectError::NoAddress(_) => LocalReplyKind::DnsFailed,
    };
    LocalReply::plain(kind, error.to_string())
}

/// Gives a connection back to its pool; before the app, a drain leaves none behind, because the app would wait for it when it
/// stops. `keep_alive` is how many seconds the upstream says that it keeps the connection. Returns the lease if its request is
/// still being sent.
pub(super) fn give_back(
    context: &RequestContext,
    attempt: &Attempt,
    lease: Lease,
    cx: &mut Context<'_>,
    keep_alive: Option<u32>,
    now: Instant,
) -> Option<Lease> {
    if context.direction() == Direction::Inbound && context.worker().is_leaving() {
        return lease.end_early(cx, EndReason::Draining);
    }
    let options = options(context, attempt);
    let announced = keep_alive.map(|seconds| Duration::from_secs(seconds.into()));
    let kept = lease.check_in(cx, options.idle_timeout, options.max_idle, announced, now);
    context.worker().upstreams.request_sweep();
    kept
}
