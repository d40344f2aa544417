//! The way to an endpoint: picks it, borrows a connection that is open already or opens one.
//!
//! Nothing has been sent here, so an endpoint that cannot be reached costs `timeouts.connect` and not the call: up to
//! three are tried. A name that has never been looked up is waited for as long as the call lasts.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::time::Instant;

use crate::net::io::Io;
use crate::policy::model::Direction;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::outcome;
use crate::proxy::request_context::RequestContext;
use crate::telemetry::ConnectionUse;
use crate::upstream::connect::ConnectError;
use crate::upstream::dial::ConnectOptions;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::pool::{Lease, Pool, ProtocolPreference};

/// Endpoints that are tried for one connection; each of them once.
const TRIED: usize = 3;

/// A connection that is open already, to the endpoint that is the best one now.
pub async fn borrow(
    live: &mut RequestContext,
    pool: &Rc<Pool>,
    want: ProtocolPreference,
    now: Instant,
) -> Option<Lease> {
    let endpoint = live.picked.take().or_else(|| pick(live, pool, now))?;
    let waker = Rc::clone(&live.waker);
    let mut lease = with_context(|cx| waker.without_wakes(cx, |cx| pool.checkout(&endpoint, want, now, cx))).await;
    if !live.is_safe && lease.as_ref().is_some_and(|lease| wants_fresh(live, pool, lease, now)) {
        lease = None;
    }
    live.picked = lease.is_none().then_some(endpoint);
    lease
}

/// Whether a request that must not be sent twice goes over a new connection instead. One that has been idle may be
/// closed by the app, which is going down perhaps, at this very moment, and nobody could tell then whether the request
/// was seen. Only before the app, on the same machine, where a new one costs next to nothing; and only so often.
fn wants_fresh(live: &RequestContext, pool: &Pool, lease: &Lease, now: Instant) -> bool {
    let endpoint = &lease.endpoint;
    live.direction == Direction::Inbound
        && !live.route().retry.idempotent.value
        && lease.is_http1()
        && pool.cluster.identity.tls.is_none()
        && endpoint.address.socket.ip().is_loopback()
        && endpoint.grants_fresh(now)
}

/// The best endpoint that this call has not tried, with a turn taken at it.
pub fn pick(live: &mut RequestContext, pool: &Pool, now: Instant) -> Option<Rc<Endpoint>> {
    live.endpoint = None;
    let obeys = live.view.destination(live.destination()).ejects;
    let mut endpoint = pool.pick_now(now, &live.tried, obeys)?;
    if !outcome::enlist(live, &endpoint, now) {
        // Somebody else is just trying it.
        endpoint = pool.pick_now(now, &live.tried, obeys)?;
        outcome::enlist(live, &endpoint, now);
    }
    live.endpoint = Some(Rc::clone(&endpoint));
    Some(endpoint)
}

/// Does something that needs the context of the task.
async fn with_context<T>(work: impl FnOnce(&mut Context<'_>) -> T) -> T {
    let mut work = Some(work);
    poll_fn(|cx| work.take().map_or(Poll::Pending, |work| Poll::Ready(work(cx)))).await
}

/// A new connection for requests.
///
/// # Errors
/// Why no endpoint could be reached.
pub async fn open(live: &mut RequestContext, pool: &Rc<Pool>, want: ProtocolPreference) -> Result<Lease, LocalReply> {
    let terms = terms(live);
    dial(live, pool, async |endpoint: &Rc<Endpoint>| pool.open(endpoint, want, terms).await).await
}

/// A stream to an endpoint of the pool with nothing sent on it yet.
///
/// # Errors
/// Why no endpoint could be reached.
pub async fn bare_stream(live: &mut RequestContext, pool: &Rc<Pool>) -> Result<Io, LocalReply> {
    let terms = terms(live);
    let stream = dial(live, pool, async |endpoint: &Rc<Endpoint>| pool.bare_stream(endpoint, terms).await).await?;
    if let Some(endpoint) = &live.endpoint {
        live.record.set_connection(endpoint.address.socket, ConnectionUse::New);
    }
    Ok(stream)
}

fn terms(live: &RequestContext) -> ConnectOptions {
    let keep = &live.destination_values().connections;
    let connect = live.route().timeouts.connect.value;
    ConnectOptions { connect, keep: keep.idle.value, most: keep.max_idle.value as usize }
}

/// Opens something at an endpoint; each one that is tried has `timeouts.connect`.
///
/// # Errors
/// Why the last of them could not be reached.
async fn dial<T>(
    live: &mut RequestContext,
    pool: &Rc<Pool>,
    open: impl AsyncFn(&Rc<Endpoint>) -> Result<T, ConnectError>,
) -> Result<T, LocalReply> {
    let mut next = match live.picked.take() {
        Some(endpoint) => Some(endpoint),
        None => pick_known(live, pool).await?,
    };
    let mut refusal = None;
    // Nothing has been sent, so that whoever can be reached may have the call.
    for left in (0..TRIED).rev() {
        let Some(endpoint) = next.take() else { break };
        live.endpoint = Some(Rc::clone(&endpoint));
        live.record.set_endpoint(endpoint.address.socket);
        let began = Instant::now();
        let opened = within_request(live, endpoint.address.socket, Box::pin(open(&endpoint))).await;
        let now = Instant::now();
        live.record.add_connect_time(now.saturating_duration_since(began));
        let (by, went_nowhere) = match opened {
            Ok(Ok(opened)) => return Ok(opened),
            Ok(Err(error)) => (
                refused_by(live, &error, endpoint.address.socket),
                matches!(error, ConnectError::Network(_) | ConnectError::Late),
            ),
            // A caller in a hurry says nothing about the endpoint.
            Err(late) if !outcome::is_callees_fault(live, late.kind) => return Err(late),
            Err(late) => (late, false),
        };
        endpoint.load.failed(now.saturating_duration_since(began), now);
        if !went_nowhere || now >= live.patience.request_at(&live.route().timeouts) {
            // Somebody was reached, or there is no time left: that is what has to be said, and not whether anybody else
            // is there.
            return Err(by);
        }
        refusal = Some(by);
        // A turn is taken only at one that will be tried: what this call comes to is judged where its last turn was.
        if left > 0 && pool.has_other(&live.tried, &endpoint) {
            outcome::unreachable(live, &endpoint, now);
            live.tried.push(endpoint.address.socket);
            next = pick(live, pool, now);
        }
    }
    Err(refusal.unwrap_or_else(nobody))
}

/// The same as [`pick`], once the pool knows its endpoints: a name that has never been looked up is waited for as long as
/// the call lasts.
///
/// # Errors
/// If there is no address for the name, or not in time.
pub async fn pick_known(live: &mut RequestContext, pool: &Rc<Pool>) -> Result<Option<Rc<Endpoint>>, LocalReply> {
    let until = live.patience.request_at(&live.route().timeouts);
    let began = Instant::now();
    let known = live.timer.limit(until, pool.known()).await;
    // For whoever reads where the time went, the name is a part of the way there.
    live.record.add_connect_time(began.elapsed());
    match known {
        Some(known) => known.map_err(|error| refused(&error))?,
        None => {
            let limits = &live.route().timeouts;
            return Err(live.patience.over_unsent(
                limits,
                LocalReplyKind::DnsFailed,
                "the name was not looked up in time",
            ));
        }
    }
    Ok(pick(live, pool, Instant::now()))
}

/// No endpoint is left to try.
pub fn nobody() -> LocalReply {
    LocalReply::plain(LocalReplyKind::ConnectFailed, "no endpoint could be tried")
}

/// The future's output, or the refusal that no connection to `address` within the time of the call demands.
async fn within_request<F: Future>(
    live: &mut RequestContext,
    address: SocketAddr,
    future: F,
) -> Result<F::Output, LocalReply> {
    let request_at = live.patience.request_at(&live.route().timeouts);
    live.timer
        .limit(request_at, future)
        .await
        .ok_or_else(|| live.patience.over_unsent(&live.route().timeouts, LocalReplyKind::ConnectTimeout, late(address)))
}

fn refused_by(live: &RequestContext, error: &ConnectError, address: SocketAddr) -> LocalReply {
    if matches!(error, ConnectError::Late) {
        let limit = &live.route().timeouts.connect;
        return LocalReply::timed(LocalReplyKind::ConnectTimeout, "timeouts.connect", limit, late(address));
    }
    let mut refusal = refused(error);
    refusal.detail = format!("cannot connect to {address}: {}", refusal.detail).into();
    refusal
}

fn late(address: SocketAddr) -> String {
    format!("no connection to {address} in time")
}

fn refused(error: &ConnectError) -> LocalReply {
    let kind = match error {
        ConnectError::Network(_) => LocalReplyKind::ConnectFailed,
        ConnectError::Tls(_) => LocalReplyKind::TlsFailed,
        // A server that is just going down takes connections and closes them; nobody has seen anything of the call.
        ConnectError::Handshake(error) if !error.is_malformed() => LocalReplyKind::ConnectFailed,
        ConnectError::Handshake(_) | ConnectError::NotHttp2 => LocalReplyKind::UpstreamProtocol,
        ConnectError::NoAddress(_) => LocalReplyKind::DnsFailed,
        ConnectError::Late => LocalReplyKind::ConnectTimeout,
    };
    LocalReply::plain(kind, error.to_string())
}
