//! The wait of an attempt for a connection: at the endpoint that it picked, after 250 ms at another one too.
//!
//! Nothing has been sent here, so any endpoint may have the call, and whichever has a connection first gets it (RFC 8305, 5,
//! over the addresses of a destination). Up to three endpoints are asked, and `timeouts.connect` bounds the whole wait. A wait
//! that ends without a connection speaks against an endpoint only if the endpoint has accepted no connection and sent no
//! response meanwhile: otherwise it is slow or its listen backlog is full, and more failures would not help it.

use std::net::SocketAddr;
use std::rc::Rc;

use tokio::time::Instant;

use crate::net::io::Io;
use crate::policy::model::Direction;
use crate::proxy::attempt::Attempt;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::permits::HeldPermit;
use crate::proxy::replay::RetryState;
use crate::proxy::request_context::RequestContext;
use crate::proxy::{breaker_and_ejection, select, timeouts};
use crate::telemetry::ConnectionUse;
use crate::upstream::connect::ConnectError;
use crate::upstream::dial::ConnectOptions;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::pool::{Lease, Pool, ProtocolPreference};
use crate::upstream::waiters::{ConnectionWait, WaitEvent};

/// Endpoints that are asked for one connection, each of them once.
const MAX_ENDPOINTS: usize = 3;

/// An endpoint whose TCP accepts, but whose TLS or HTTP handshake lasts, is waited for longer by this factor before another
/// endpoint is asked: a second handshake would only add to its load.
const HANDSHAKE_FACTOR: u32 = 4;

/// A connection for an attempt: a new one, or one that another call gives back meanwhile. With `takes_reused` false, for the
/// first 250 ms a new one only.
///
/// # Errors
/// Why there is no connection.
pub(super) async fn open(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    retry: &mut RetryState,
    preference: ProtocolPreference,
    takes_reused: bool,
) -> Result<Lease, LocalReply> {
    let options = select::options(context, attempt);
    let endpoint = match attempt.take_picked() {
        Some(endpoint) => endpoint,
        None => select::pick_resolved(context, attempt, retry).await?.ok_or_else(select::no_endpoint)?,
    };
    let pool = select::pool(attempt)?;
    let began = Instant::now();
    let mut connecting = Connecting {
        wait: ConnectionWait::new(&pool, preference, options, takes_reused),
        pool,
        preference,
        options,
        takes_reused,
        deadline: began + options.connect_timeout,
        asked: 0,
        since: began,
        others: Vec::new(),
    };
    connecting.ask(context, attempt, retry, &endpoint);
    let opened = connecting.run(context, attempt, retry).await;
    context.record_mut().add_connect_time(began.elapsed());
    opened.inspect_err(|reply| {
        if matches!(reply.kind, LocalReplyKind::ConnectFailed | LocalReplyKind::ConnectTimeout) {
            attempt.set_found_no_connection();
        }
    })
}

/// A stream to an endpoint of the pool with nothing sent on it yet.
///
/// # Errors
/// Why no endpoint could be reached.
pub(super) async fn bare_stream(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    retry: &mut RetryState,
) -> Result<Io, LocalReply> {
    let lease = open(context, attempt, retry, ProtocolPreference::Tunnel, true).await?;
    let address = lease.endpoint.address.socket;
    let (stream, early) = lease.into_http1().ok_or_else(select::no_endpoint)?.into_stream();
    context.record_mut().set_connection(address, ConnectionUse::New);
    Ok(stream.with_prefix(early))
}

/// The wait of one attempt. The endpoint that was asked last is that of the attempt, with its permit.
struct Connecting {
    wait: ConnectionWait,
    pool: Rc<Pool>,
    preference: ProtocolPreference,
    options: ConnectOptions,
    takes_reused: bool,
    deadline: Instant,
    /// How many endpoints have been asked.
    asked: usize,
    /// When the last one was asked.
    since: Instant,
    /// The endpoints that were asked before and still may come first.
    others: Vec<AskedEndpoint>,
}

/// An endpoint that was asked for a connection before the last one.
struct AskedEndpoint {
    endpoint: Rc<Endpoint>,
    permit: HeldPermit,
    since: Instant,
}

impl Connecting {
    async fn run(
        &mut self,
        context: &mut RequestContext,
        attempt: &mut Attempt,
        retry: &mut RetryState,
    ) -> Result<Lease, LocalReply> {
        loop {
            let limit = self.deadline.min(context.request_at());
            let until = self.look_again_at(attempt, retry).map_or(limit, |at| at.min(limit));
            let lease = match timeouts::within(context, until, self.wait.next()).await {
                Some(WaitEvent::Connection(lease)) => Some(lease),
                Some(WaitEvent::Failed(endpoint, error)) => {
                    self.failed(context, attempt, retry, &endpoint, &error).await?
                }
                None if Instant::now() >= limit => return Err(self.late(context, attempt)),
                None => self.widen(context, attempt, retry).await,
            };
            if let Some(lease) = lease {
                self.settle(context, attempt, &lease);
                return Ok(lease);
            }
        }
    }

    /// Waits at an endpoint that the attempt has switched to.
    fn ask(
        &mut self,
        context: &mut RequestContext,
        attempt: &mut Attempt,
        retry: &RetryState,
        endpoint: &Rc<Endpoint>,
    ) {
        attempt.switch_endpoint(endpoint);
        context.record_mut().set_endpoint(endpoint.address.socket);
        self.asked += 1;
        self.since = Instant::now();
        let has_alternative = self.has_alternative(attempt, retry);
        self.wait.wait_at(endpoint, has_alternative);
    }

    fn has_alternative(&self, attempt: &Attempt, retry: &RetryState) -> bool {
        self.asked < MAX_ENDPOINTS && select::has_other_endpoint(attempt, retry)
    }

    /// When the wait is to be widened; `None` if there is nothing to widen it to.
    fn look_again_at(&self, attempt: &Attempt, retry: &RetryState) -> Option<Instant> {
        let is_of_use = !self.takes_reused || self.has_alternative(attempt, retry);
        let is_accepted = attempt.endpoint()?.reachability.has_accepted_since(self.since);
        let factor = if is_accepted { HANDSHAKE_FACTOR } else { 1 };
        is_of_use.then(|| self.since + self.options.stagger() * factor)
    }

    /// The connection has not come for a while: takes a used one as well, and asks another endpoint too.
    async fn widen(
        &mut self,
        context: &mut RequestContext,
        attempt: &mut Attempt,
        retry: &mut RetryState,
    ) -> Option<Lease> {
        let now = Instant::now();
        if self.look_again_at(attempt, retry).is_some_and(|at| now < at) {
            // The endpoint has accepted a connection meanwhile.
            return None;
        }
        if !self.takes_reused {
            self.takes_reused = true;
            self.wait.take_reused();
            let endpoint = Rc::clone(attempt.endpoint()?);
            if let Some(lease) = select::checkout_at(context, &self.pool, &endpoint, self.preference, now).await {
                return Some(lease);
            }
        }
        if !self.has_alternative(attempt, retry) {
            return None;
        }
        let endpoint = attempt.take_endpoint()?;
        let permit = std::mem::take(&mut attempt.permits_mut().endpoint);
        retry.add_attempted(endpoint.address.socket);
        self.others.push(AskedEndpoint { endpoint, permit, since: self.since });
        self.ask_next(context, attempt, retry).await
    }

    /// Asks the best endpoint that has not been asked. Returns a connection if it has an open one.
    async fn ask_next(
        &mut self,
        context: &mut RequestContext,
        attempt: &mut Attempt,
        retry: &mut RetryState,
    ) -> Option<Lease> {
        let now = Instant::now();
        let endpoint = select::pick(context, attempt, retry, now)?;
        let lease = match self.preference {
            ProtocolPreference::Tunnel => None,
            preference => select::checkout_at(context, &self.pool, &endpoint, preference, now).await,
        };
        if lease.is_none() {
            self.ask(context, attempt, retry, &endpoint);
        }
        lease
    }

    /// The connection that was opened for this call at an endpoint has failed.
    ///
    /// # Errors
    /// If no endpoint is left that could still have a connection.
    async fn failed(
        &mut self,
        context: &mut RequestContext,
        attempt: &mut Attempt,
        retry: &mut RetryState,
        endpoint: &Rc<Endpoint>,
        error: &ConnectError,
    ) -> Result<Option<Lease>, LocalReply> {
        let now = Instant::now();
        if error.is_refused() && context.direction() == Direction::Inbound {
            // The app is going down: it may drop what comes over its open connections.
            endpoint.mark_stale(now);
        }
        if let Some(position) = self.others.iter().position(|other| Rc::ptr_eq(&other.endpoint, endpoint)) {
            let other = self.others.remove(position);
            endpoint.load.record_failure(now.saturating_duration_since(other.since), now);
            breaker_and_ejection::report_unreachable(context, attempt, endpoint, other.permit, now);
            return Ok(None);
        }
        endpoint.load.record_failure(now.saturating_duration_since(self.since), now);
        // An endpoint that was reached is not at fault for the network: the caller is told that, and not whether another
        // endpoint is there.
        let is_unreachable = matches!(error, ConnectError::Network(_));
        let goes_on = is_unreachable && now < context.request_at() && self.has_alternative(attempt, retry);
        let before = if goes_on { None } else { self.others.pop() };
        if !goes_on && before.is_none() {
            return Err(connect_failed(error, endpoint.address.socket));
        }
        let permit = std::mem::take(&mut attempt.permits_mut().endpoint);
        breaker_and_ejection::report_unreachable(context, attempt, endpoint, permit, now);
        retry.add_attempted(endpoint.address.socket);
        if let Some(before) = before {
            self.since = before.since;
            context.record_mut().set_endpoint(before.endpoint.address.socket);
            attempt.set_endpoint(Some(before.endpoint), before.permit);
            return Ok(None);
        }
        Ok(self.ask_next(context, attempt, retry).await)
    }

    /// The attempt goes to the endpoint of the lease. An endpoint that had its time and did nothing with it is reported.
    fn settle(&mut self, context: &RequestContext, attempt: &mut Attempt, lease: &Lease) {
        if self.others.is_empty() {
            return;
        }
        let now = Instant::now();
        if let Some(position) = self.others.iter().position(|other| Rc::ptr_eq(&other.endpoint, &lease.endpoint)) {
            // The permit of the endpoint that was asked last is dropped: it has had less time than the others.
            let winner = self.others.remove(position);
            attempt.set_endpoint(Some(winner.endpoint), winner.permit);
        }
        for other in self.others.drain(..) {
            if speaks_against(&other.endpoint, other.since, self.options, now) {
                other.endpoint.load.record_failure(now.saturating_duration_since(other.since), now);
                breaker_and_ejection::report_unreachable(context, attempt, &other.endpoint, other.permit, now);
            }
        }
    }

    /// No connection within `timeouts.connect`, or within the time of the call.
    fn late(&mut self, context: &RequestContext, attempt: &mut Attempt) -> LocalReply {
        let now = Instant::now();
        let Some(endpoint) = attempt.endpoint().map(Rc::clone) else { return select::no_endpoint() };
        let address = endpoint.address.socket;
        let is_silent = speaks_against(&endpoint, self.since, self.options, now);
        let detail = match is_silent {
            true => format!("no connection to {address} in time: it accepted none"),
            false => format!("no connection to {address} in time: it accepted or answered others meanwhile"),
        };
        let reply = match now >= context.request_at() {
            true => context.timeout_state().expired_unsent(context.timeouts(), LocalReplyKind::ConnectTimeout, detail),
            false => {
                let limit = &context.timeouts().connect;
                LocalReply::timed(LocalReplyKind::ConnectTimeout, "timeouts.connect", limit, detail)
            }
        };
        if !breaker_and_ejection::is_upstreams_fault(context, reply.kind) {
            // A short deadline says nothing about any endpoint.
            return reply;
        }
        for other in self.others.drain(..) {
            if other.endpoint.reachability.timed_out(other.since, now) {
                other.endpoint.load.record_failure(now.saturating_duration_since(other.since), now);
                breaker_and_ejection::report_unreachable(context, attempt, &other.endpoint, other.permit, now);
            }
        }
        if is_silent {
            endpoint.reachability.timed_out(self.since, now);
            endpoint.load.record_failure(now.saturating_duration_since(self.since), now);
        } else {
            attempt.spare_upstream();
        }
        reply
    }
}

/// Whether a wait since `since` that has brought no connection says something about the endpoint.
fn speaks_against(endpoint: &Endpoint, since: Instant, options: ConnectOptions, now: Instant) -> bool {
    now.saturating_duration_since(since) >= options.stagger() && !endpoint.reachability.is_alive_since(since)
}

fn connect_failed(error: &ConnectError, address: SocketAddr) -> LocalReply {
    let mut reply = select::connect_error(error);
    reply.detail = format!("cannot connect to {address}: {}", reply.detail).into();
    reply
}
