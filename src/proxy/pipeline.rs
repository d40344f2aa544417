//! The life of a request, in the order in which it happens: open this file to see what hopguard does.

use std::convert::Infallible;
use std::rc::Rc;

use http::header::HeaderName;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use http_body::Body as _;
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::net::body::RequestBody;
use crate::net::flow::Flow;
use crate::policy::model::Direction;
use crate::proxy::downstream::DownstreamConnection;
use crate::proxy::exchange::ActiveExchange;
use crate::proxy::headers::{self, ATTEMPT_COUNT, HeaderScan};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::request_context::RequestContext;
use crate::proxy::response::{self, PipelineReply};
use crate::proxy::response_body::ResponseBody;
use crate::proxy::target::{self, RequestTarget};
use crate::proxy::worker_context::WorkerContext;
use crate::proxy::{admission, breaker_and_ejection, deadline, request_checks, retry, routing, upgrade};

/// What hyper gets for each request: a response, always.
pub(super) type ServiceResult = Result<Response<ResponseBody>, Infallible>;

/// One request, from its head to the head of its response; the response's body carries the exchange on.
///
/// First everything is decided, at once and without waiting; then it is carried out. What is decided stays in the
/// exchange, so that the future, which is moved about, stays small.
pub(super) fn call(
    worker: &Rc<WorkerContext>,
    downstream: &Rc<DownstreamConnection>,
    flow: Rc<Flow>,
    request: Request<Incoming>,
) -> impl Future<Output = ServiceResult> + use<> {
    let (version, is_connect) = (request.version(), request.method() == Method::CONNECT);
    let scan = HeaderScan::scan(request.headers());
    let context = RequestContext::begin(worker, downstream, flow, &request, &scan);
    let mut exchange = Box::new(ActiveExchange::new(context));
    let plan = plan(&mut exchange, request, &scan);
    async move {
        let reply = match plan {
            Ok(plan) => carry_out(&mut exchange, plan).await,
            Err(reply) => Err(reply),
        };
        Ok(response::hand_over(exchange, reply, version, is_connect))
    }
}

/// What is to be done with a request.
enum RequestPlan {
    /// Send it to the upstream; `Some` if the connection is to be switched to another protocol.
    Send(Option<HeaderValue>),
    /// Open a tunnel.
    Tunnel(Box<Parts>),
    /// Answer it here.
    Reply(Box<PipelineReply>),
}

/// Decides what may pass at all, which route it takes, which rules it meets, and what it looks like on the next hop.
fn plan(
    exchange: &mut ActiveExchange,
    request: Request<Incoming>,
    scan: &HeaderScan,
) -> Result<RequestPlan, LocalReply> {
    let (mut head, body) = request.into_parts();
    let context = &mut exchange.context;
    let (view, downstream) = (Rc::clone(context.view()), Rc::clone(context.downstream()));
    let listener = downstream.listener.listener(&view.policy)?;

    // What may not be passed on at all.
    request_checks::check(&mut head, scan, listener)?;
    context.set_expects_continue(scan.expect && head.version >= Version::HTTP_11);
    let target = RequestTarget::read(&head.method, &head.uri, head.version, &head.headers)
        .map_err(|error| LocalReply::plain(LocalReplyKind::BadRequest, error.to_string()))?;
    request_checks::check_loop(&head, scan, &downstream)?;

    // Which route it takes, and which rules it meets.
    routing::route(context, listener, &head, &target)?;
    deadline::set(context, &mut head, scan)?;
    admission::check(context, &head.headers)?;
    if head.method == Method::CONNECT {
        upgrade::may_connect(listener)?;
        return Ok(RequestPlan::Tunnel(Box::new(head)));
    }
    if let Some(reply) = response::as_final_recipient(&mut head) {
        return Ok(RequestPlan::Reply(Box::new(reply)));
    }

    // What it looks like on the next hop.
    // A body would have to be over before the connection can be anything else.
    let switch = upgrade::wanted(&head, scan).filter(|_| body.is_end_stream());
    let named = rewrite_head(context, &mut head, scan, switch.as_ref());
    keep_outgoing(exchange, head, body, named, switch.is_some());
    Ok(RequestPlan::Send(switch))
}

/// Makes the head fit for the next hop. Returns the fields that `Connection` named.
fn rewrite_head(
    context: &mut RequestContext,
    head: &mut Parts,
    scan: &HeaderScan,
    switch: Option<&HeaderValue>,
) -> Vec<HeaderName> {
    let hop_by_hop = headers::strip(&mut head.headers, scan);
    if hop_by_hop.trailers {
        context.set_takes_trailers();
        head.headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if scan.attempt_count && context.direction() == Direction::Outbound {
        // It counts the attempts of a call to the app, which has copied the field into a call of its own.
        head.headers.remove(ATTEMPT_COUNT);
    }
    if scan.hosts == 0 && head.uri.authority().is_none() {
        name_host(head, &context.destination(context.route_id().owner()).host);
    }
    encode_target(head);
    context.downstream().listener.via.add(&mut head.headers, head.version);
    headers::forget(&mut head.extensions);
    if let Some(protocol) = switch {
        upgrade::ask(&mut head.headers, protocol);
    }
    hop_by_hop.named
}

/// Keeps the request as it goes out; where the policy wants retries, with what a further attempt needs beside it.
fn keep_outgoing(
    exchange: &mut ActiveExchange,
    head: Parts,
    body: Incoming,
    named: Vec<HeaderName>,
    switches_protocol: bool,
) {
    let ActiveExchange { context, attempt, retry, .. } = exchange;
    let rule = &context.route().retry;
    let flow = Rc::clone(context.flow());
    if !rule.enabled.value || switches_protocol || context.modes().retry.value.is_off() {
        let body = RequestBody::streaming(body, head.version, flow, named);
        attempt.set_request(Request::from_parts(head, body));
        return;
    }
    let (body, replay) = RequestBody::replayable(body, head.version, flow, named, rule.replay_limit.value as usize);
    retry.keep(head.clone(), replay);
    attempt.set_request(Request::from_parts(head, body));
}

/// Carries the plan out, within the rules.
async fn carry_out(exchange: &mut ActiveExchange, plan: RequestPlan) -> Result<PipelineReply, LocalReply> {
    let switch = match plan {
        RequestPlan::Send(switch) => switch,
        // Boxed, like everything that few requests meet.
        RequestPlan::Tunnel(head) => return Box::pin(upgrade::connect(exchange, head)).await,
        RequestPlan::Reply(reply) => return Ok(*reply),
    };
    // A permit of the destination, and as many attempts as it takes and as the policy allows. The response's body carries
    // the exchange on.
    let answer = retry::run(exchange, switch.is_some()).await?;
    exchange.retry.forget_request();
    let reply = match answer.status() {
        StatusCode::SWITCHING_PROTOCOLS => Box::pin(upgrade::switch(exchange, answer, switch)).await,
        _ => {
            let ActiveExchange { context, attempt, response, .. } = exchange;
            response::from_upstream(context, attempt, response, answer)
        }
    };
    if let Err(reply) = &reply {
        breaker_and_ejection::report_broken_response(
            &mut exchange.context,
            &mut exchange.attempt,
            reply.kind,
            Instant::now(),
        );
    }
    reply
}

/// Writes the same path in bytes that every hop reads in the same way.
fn encode_target(head: &mut Parts) {
    let Some(path) = head.uri.path_and_query().map(PathAndQuery::as_str) else { return };
    // A target with nothing but a fragment behind the host is read as this path, but written as none.
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
        assert!(size_of::<ActiveExchange>() <= 1200, "{} bytes", size_of::<ActiveExchange>());
    }
}
