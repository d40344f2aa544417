//! The life of a request, in the order in which it happens: open this file to see what hopguard does.

use std::convert::Infallible;
use std::rc::Rc;

use http::header::{HeaderMap, HeaderName};
use http::request::Parts;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use http_body::Body as _;
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::net::body::RequestBody;
use crate::net::flow::Flow;
use crate::policy::model::{Destination, Direction, Listener, ListenerTarget};
use crate::proxy::downstream::DownstreamConnection;
use crate::proxy::headers::{self, ATTEMPT_COUNT, HeaderScan};
use crate::proxy::held::ReplayableRequest;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind, RuleRef};
use crate::proxy::request_context::RequestContext;
use crate::proxy::response::{self, PipelineReply};
use crate::proxy::response_body::ResponseBody;
use crate::proxy::retry;
use crate::proxy::target::{self, RequestTarget};
use crate::proxy::worker_context::WorkerContext;
use crate::proxy::{correlation, outcome, upgrade};
use crate::rules::limits::QueueFull;
use crate::rules::mode::RuleName;
use crate::telemetry::Exchange;
use crate::upstream::pool::Pool;

/// What a caller gets: an answer, always.
pub type Answer = Result<Response<ResponseBody>, Infallible>;

/// One request, from its head to the head of its answer; the answer's body carries the exchange on.
///
/// First everything is decided, at once and without waiting; then it is done. What is decided stays in `request_context`,
/// so that the future, which is moved about, stays small.
pub fn call(
    worker: &Rc<WorkerContext>,
    caller: &Rc<DownstreamConnection>,
    flow: Rc<Flow>,
    request: Request<Incoming>,
) -> impl Future<Output = Answer> + use<> {
    let (version, connect) = (request.version(), request.method() == Method::CONNECT);
    let present = HeaderScan::scan(request.headers());
    let mut live = RequestContext::begin(worker, caller, flow, &request, &present);
    let decision = decide(&mut live, request, &present);
    async move {
        let reply = match decision {
            Ok(decision) => act(&mut live, decision).await,
            Err(refusal) => Err(refusal),
        };
        Ok(response::hand_over(live, reply, version, connect))
    }
}

/// What is to be done with a request.
enum RequestPlan {
    /// Send it on; `Some` if the connection is to be switched to another protocol.
    Send(Rc<Pool>, Option<HeaderValue>),
    /// Open a tunnel.
    Tunnel(Rc<Pool>, Box<Parts>),
    /// We have the answer ourselves.
    PipelineReply(Box<PipelineReply>),
}

/// What may pass at all, where it goes, which rules it meets, and what it looks like on the next hop.
fn decide(
    live: &mut RequestContext,
    request: Request<Incoming>,
    present: &HeaderScan,
) -> Result<RequestPlan, LocalReply> {
    let (mut head, body) = request.into_parts();
    let view = Rc::clone(&live.view);
    let listener = live.caller.listener.listener(&view.policy)?;

    // What may not be passed on at all.
    check_size(&head, present, listener)?;
    check_method(&head.method)?;
    check_framing(&head, present)?;
    check_expectation(&mut head, present)?;
    live.expects = present.expect && head.version >= Version::HTTP_11;
    // Whatever asks for the cookie, be it a route or a limit, gets all of it.
    headers::join_cookies(&mut head.headers, present);
    headers::one_length(&mut head.headers, present);
    let target = RequestTarget::read(&head.method, &head.uri, head.version, &head.headers)
        .map_err(|error| LocalReply::plain(LocalReplyKind::BadRequest, error.to_string()))?;
    if present.via && live.caller.listener.via.is_loop(&head.headers) {
        return Err(LocalReply::plain(LocalReplyKind::LoopDetected, "this listener has seen the request ten times"));
    }

    // Where it goes, and which rules it meets.
    let position = choose(&view.policy, listener, &target)?;
    let route = view.destination(position).index.find(&head.method, head.uri.path(), &head.headers);
    live.met(position, route, listener.direction);
    check_scheme(&head, listener, live.destination_values())?;
    let pool = pool(live, &target)?;
    correlation::begin(live, &mut head, present)?;
    check_rate(live, &head.headers)?;
    if head.method == Method::CONNECT {
        upgrade::may_connect(listener)?;
        return Ok(RequestPlan::Tunnel(pool, Box::new(head)));
    }
    if let Some(reply) = response::as_final_recipient(&mut head) {
        return Ok(RequestPlan::PipelineReply(Box::new(reply)));
    }

    // What it looks like on the next hop.
    // A body would have to be over before the connection can be anything else.
    let switch = upgrade::wanted(&head, present).filter(|_| body.is_end_stream());
    let said = headers::strip(&mut head.headers, present);
    if said.trailers {
        live.takes_trailers = true;
        head.headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if present.attempt_count && live.direction == Direction::Outbound {
        // It counts the tries of a call to the app, which has copied it into one of its own.
        head.headers.remove(ATTEMPT_COUNT);
    }
    if present.hosts == 0 && head.uri.authority().is_none() {
        name_host(&mut head, &live.view.destination(live.destination()).host);
    }
    encode_target(&mut head);
    live.caller.listener.via.add(&mut head.headers, head.version);
    headers::forget(&mut head.extensions);
    if let Some(protocol) = &switch {
        upgrade::ask(&mut head.headers, protocol);
    }
    let request = outgoing(live, head, body, said.named, switch.is_some());
    live.request = Some(request);
    Ok(RequestPlan::Send(pool, switch))
}

/// The request as it goes out; where the policy wants retries, with what another try needs kept aside.
fn outgoing(
    live: &mut RequestContext,
    head: Parts,
    body: Incoming,
    named: Vec<HeaderName>,
    switching: bool,
) -> Request<RequestBody> {
    let retry = &live.route().retry;
    let flow = Rc::clone(&live.flow);
    if !retry.enabled.value || switching || live.view.policy.model.modes.retry.value.is_off() {
        return Request::from_parts(head, RequestBody::caller(body, flow, named));
    }
    let limit = retry.replay_limit.value as usize;
    let (body, replay) = RequestBody::repeatable(body, flow, named, limit);
    live.spare = Some(Box::new(ReplayableRequest { head: head.clone(), body: replay }));
    Request::from_parts(head, body)
}

/// The rate limit of the route.
fn check_rate(live: &mut RequestContext, fields: &HeaderMap) -> Result<(), LocalReply> {
    let Some(limit) = &live.route().rate_limit.value else { return Ok(()) };
    let mode = live.view.policy.model.modes.rate_limit.value;
    let limiter = live.view.destination(live.destination()).limiters[live.route_position()].as_ref();
    let Some(limiter) = limiter.filter(|_| !mode.is_off()) else { return Ok(()) };
    let key = limit.by.value.key(live.caller.peer.ip(), |name| fields.get(name).map(HeaderValue::as_bytes));
    let Err(refused) = limiter.check(limit, key, live.patience.began) else { return Ok(()) };
    if !mode.is_enforced() {
        live.would(RuleName::RateLimit);
        return Ok(());
    }
    let per = crate::rules::duration::format(limit.per.value);
    let rule = RuleRef {
        name: "rateLimit.requests",
        value: format!("{} per {per}", limit.requests.value),
        origin: limit.requests.origin.clone(),
    };
    let mut refusal =
        LocalReply::ruled(LocalReplyKind::RateLimited, rule, format!("too many calls (counted by {})", limit.by.value));
    refusal.retry_after = Some(refused.retry_after);
    Err(refusal)
}

/// Does what was decided, within the rules.
async fn act(live: &mut RequestContext, decision: RequestPlan) -> Result<PipelineReply, LocalReply> {
    let (pool, switch) = match decision {
        RequestPlan::Send(pool, switch) => (pool, switch),
        // Boxed, like everything that few requests meet.
        RequestPlan::Tunnel(pool, head) => return Box::pin(upgrade::connect(live, &pool, head)).await,
        RequestPlan::PipelineReply(reply) => return Ok(*reply),
    };
    // A place in flight, for as long as the exchange lasts.
    if !enter(live, &pool) {
        Box::pin(wait_in_queue(live, &pool)).await?;
    }
    // As many tries as it takes and as the policy allows. The answer's body carries the exchange on.
    let answer = retry::run(live, &pool, switch.is_some()).await?;
    live.spare = None;
    let reply = match answer.status() {
        StatusCode::SWITCHING_PROTOCOLS => Box::pin(upgrade::switch(live, answer, switch)).await,
        _ => response::from_upstream(live, answer),
    };
    if let Err(refusal) = &reply {
        outcome::judge_cut(live, refusal.kind, Instant::now());
    }
    reply
}

fn check_size(head: &Parts, present: &HeaderScan, listener: &Listener) -> Result<(), LocalReply> {
    let limit = &listener.max_header_size;
    if present.size <= limit.value as usize {
        return Ok(());
    }
    let longest = HeaderScan::longest(&head.headers)
        .map_or_else(String::new, |(name, size)| format!("; the longest field is {name} with {size} bytes"));
    let detail = format!("the header section has {} bytes{longest}", present.size);
    Err(LocalReply::counted(LocalReplyKind::HeaderTooLarge, "maxHeaderSize", limit, detail))
}

/// Longer than any registered method; longer ones are no methods.
const LONGEST_METHOD: usize = 64;

fn check_method(method: &Method) -> Result<(), LocalReply> {
    if method.as_str().len() <= LONGEST_METHOD {
        return Ok(());
    }
    Err(LocalReply::plain(LocalReplyKind::UnknownMethod, "the method is longer than 64 characters (RFC 9110, 9.1)"))
}

/// hyper has refused what it cannot frame; this refuses what it could, but the next hop might read otherwise (RFC 9112, 6).
fn check_framing(head: &Parts, present: &HeaderScan) -> Result<(), LocalReply> {
    if present.codings > 0 && present.lengths > 0 {
        return Err(LocalReply::plain(
            LocalReplyKind::BadRequest,
            "both Content-Length and Transfer-Encoding (RFC 9112, 6.1)",
        ));
    }
    if present.codings > 1 {
        return Err(LocalReply::plain(LocalReplyKind::BadRequest, "more than one Transfer-Encoding (RFC 9112, 6.1)"));
    }
    if head.method == Method::CONNECT && present.codings + present.lengths > 0 {
        return Err(LocalReply::plain(LocalReplyKind::BadRequest, "a CONNECT has no body (RFC 9110, 9.3.6)"));
    }
    if !headers::only_chunked(&head.headers, present) {
        return Err(LocalReply::plain(
            LocalReplyKind::UnknownCoding,
            "the transfer coding is not chunked (RFC 9112, 6.1)",
        ));
    }
    Ok(())
}

fn check_expectation(head: &mut Parts, present: &HeaderScan) -> Result<(), LocalReply> {
    if !present.expect {
        return Ok(());
    }
    if head.version < Version::HTTP_11 {
        head.headers.remove(header::EXPECT);
        return Ok(());
    }
    let mut all = head.headers.get_all(header::EXPECT).iter();
    if all.all(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        return Ok(());
    }
    Err(LocalReply::plain(LocalReplyKind::UnknownExpectation, "only 100-continue can be expected (RFC 9110, 10.1.1)"))
}

/// The destination: the listener's own, or the one that the target's host belongs to.
fn choose(
    policy: &crate::policy::snapshot::Snapshot,
    listener: &Listener,
    target: &RequestTarget<'_>,
) -> Result<usize, LocalReply> {
    match listener.target {
        ListenerTarget::To(position) => Ok(position),
        ListenerTarget::Forward => policy.hosts.find(target.bare_host()).ok_or_else(|| {
            let host = target.host;
            LocalReply::plain(LocalReplyKind::NoDestination, format!(
                "the policy has no destination with the host {host:?}; add it to `hosts`, or a destination with the host \"*\""
            ))
        }),
    }
}

/// What a proxy is asked to fetch by `https` never goes out in plain text (RFC 9110, 4.2.2). Over HTTP/2 the scheme says
/// nothing: there it is the one of the connection to us.
fn check_scheme(head: &Parts, listener: &Listener, destination: &Destination) -> Result<(), LocalReply> {
    let is_asked = head.version < Version::HTTP_2 && head.uri.scheme() == Some(&Scheme::HTTPS);
    if !is_asked || listener.target != ListenerTarget::Forward || destination.tls.is_some() {
        return Ok(());
    }
    let detail = format!(
        "the target begins with https, and the destination {} has no `tls`: use CONNECT, or give it `tls`",
        destination.name
    );
    Err(LocalReply::plain(LocalReplyKind::BadRequest, detail))
}

/// The pool of the destination, or of the place where the caller was going.
fn pool(live: &RequestContext, target: &RequestTarget<'_>) -> Result<Rc<Pool>, LocalReply> {
    let position = live.destination();
    let upstreams = &live.worker.upstreams;
    let values = live.destination_values();
    if !values.endpoints.is_empty() {
        return Ok(Rc::clone(live.view.pool(position, upstreams)));
    }
    if target.host.is_empty() {
        return Err(LocalReply::plain(
            LocalReplyKind::NoRoute,
            "the destination has no endpoints and the request names no host",
        ));
    }
    let port = target.port.unwrap_or(if values.tls.is_some() { 443 } else { 80 });
    let parent = &live.view.destination(position).cluster;
    Ok(upstreams.place(parent, target.host, port))
}

/// Takes a place in flight, if there is one at once.
fn enter(live: &mut RequestContext, pool: &Rc<Pool>) -> bool {
    let destination = live.view.destination(live.destination());
    let mode = live.view.policy.model.modes.limits.value;
    let pass = destination.concurrency.try_enter();
    if pass.is_none() && mode.is_enforced() {
        return false;
    }
    let is_over = pass.is_none();
    live.hold(pass, Rc::clone(pool));
    if is_over && !mode.is_off() {
        live.would(RuleName::Limits);
    }
    true
}

/// Takes a place in flight after a turn in the queue.
async fn wait_in_queue(live: &mut RequestContext, pool: &Rc<Pool>) -> Result<(), LocalReply> {
    let view = Rc::clone(&live.view);
    let destination = view.destination(live.destination());
    let limits = &destination.values.limits;
    let began = Instant::now();
    let queue = destination.concurrency.enter(limits.queue.value);
    let waiting = pool.metrics.queued.hold();
    let late_at = live.patience.request_at(&live.route().timeouts);
    let mut turn = QueueWait { record: &mut live.record, began, is_refused: false };
    let entered = live.timer.limit((began + limits.queue_timeout.value).min(late_at), queue).await;
    drop(waiting);
    turn.is_refused = matches!(entered, Some(Err(QueueFull)));
    drop(turn);
    match entered {
        Some(Ok(pass)) => {
            live.hold(Some(pass), Rc::clone(pool));
            Ok(())
        }
        Some(Err(QueueFull)) => Err(LocalReply::counted(
            LocalReplyKind::QueueFull,
            "limits.queue",
            &limits.queue,
            format!("{} calls are in flight and the queue is full", limits.in_flight.value),
        )),
        None if Instant::now() >= late_at => {
            Err(live.patience.over_unsent(&live.route().timeouts, LocalReplyKind::RequestTimeout, "no turn in time"))
        }
        None => Err(LocalReply::timed(
            LocalReplyKind::QueueTimeout,
            "limits.queueTimeout",
            &limits.queue_timeout,
            format!("{} calls were in flight for too long", limits.in_flight.value),
        )),
    }
}

/// A turn in the queue, which is recorded when it is over: also where the caller leaves, and with it this future.
struct QueueWait<'a> {
    record: &'a mut Exchange,
    began: Instant,
    /// Who was sent away at once has not waited.
    is_refused: bool,
}

impl Drop for QueueWait<'_> {
    fn drop(&mut self) {
        if !self.is_refused {
            self.record.add_queue_time(self.began.elapsed());
        }
    }
}

/// The same path, in bytes that every hop reads in the same way.
fn encode_target(head: &mut Parts) {
    let Some(path) = head.uri.path_and_query().map(PathAndQuery::as_str) else { return };
    // Nothing but a fragment behind the host is read as this path, but written as none.
    let is_absent = path == "/" && head.version < Version::HTTP_2 && head.uri.scheme().is_some();
    let encoded = if is_absent { Some("/".to_owned()) } else { target::encode(path) };
    if let Some(encoded) = encoded
        && let Ok(encoded) = PathAndQuery::try_from(encoded)
    {
        let mut parts = std::mem::take(&mut head.uri).into_parts();
        parts.path_and_query = Some(encoded);
        head.uri = Uri::from_parts(parts).unwrap_or_default();
    }
}

/// An HTTP/1.0 caller may name no host; then it means the destination.
fn name_host(head: &mut Parts, host: &str) {
    if let Ok(host) = HeaderValue::from_str(host) {
        head.headers.insert(header::HOST, host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<A, B, C, D, F: Future>(_: impl Fn(&A, &B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_request_under_way_stays_small() {
        // It is moved several times, and held as long as the upstream takes; what few requests need is boxed.
        assert!(size_of_future(call) <= 1536, "{} bytes", size_of_future(call));
        // It is boxed once and stays where it is, so that this bounds memory, not moves.
        assert!(size_of::<RequestContext>() <= 1200, "{} bytes", size_of::<RequestContext>());
    }
}
