//! The head of a response on its way back: the upstream's, made fit for the caller, or a local one.

use std::rc::Rc;

use bytes::Bytes;
use http::header::HeaderName;
use http::request::Parts;
use http::{HeaderValue, Method, Response, StatusCode, Version, header};
use hyper::upgrade::OnUpgrade;
use tokio::time::Instant;

use crate::net::http2_tunnel::{Http2Tunnel, TunnelSender};
use crate::net::io::Io;
use crate::problems::Sourced;
use crate::proxy::attempt::Attempt;
use crate::proxy::exchange::{ActiveExchange, ResponseFacts};
use crate::proxy::grpc::{self, GrpcStatus};
use crate::proxy::headers::{self, ContentKind, HeaderScan};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind, PROXY_STATUS};
use crate::proxy::request_context::RequestContext;
use crate::proxy::response_body::ResponseBody;
use crate::proxy::send_local_reply::send_local_reply;
use crate::proxy::tunnel::Handoff;
use crate::proxy::{breaker_and_ejection, proxy_status, select};
use crate::rules::retry::AttemptFailure;
use crate::runtime::tasks;
use crate::upstream::response::UpstreamBody;

/// What the pipeline comes to, where that is no local reply.
pub(super) enum PipelineReply {
    /// The upstream's response; its body is still to come.
    Upstream(Response<UpstreamBody>),
    /// A response that hopguard makes itself.
    Own(Response<ResponseBody>),
    /// Once the response is sent, the caller's connection is joined with this stream.
    Tunnel(Response<ResponseBody>, Io),
}

/// Hands the response to hyper; what the exchange still holds goes with its body.
pub(super) fn hand_over(
    mut exchange: Box<ActiveExchange>,
    reply: Result<PipelineReply, LocalReply>,
    version: Version,
    is_connect: bool,
) -> Response<ResponseBody> {
    let mut close = closes_connection(&exchange.context, version, is_connect)
        || (version <= Version::HTTP_11 && exchange.response.refuses_rest);
    let mut response = match reply {
        Ok(PipelineReply::Upstream(response)) => from_exchange(exchange, response, version),
        Ok(PipelineReply::Own(response)) => {
            let (context, now) = (&mut exchange.context, Instant::now());
            context.set_ended_at(now);
            context.record_mut().set_response_head(now, response.status());
            context.record_mut().complete();
            response
        }
        Ok(PipelineReply::Tunnel(response, upstream)) => return begin_tunnel(exchange, response, upstream),
        Err(reply) => {
            close |= version <= Version::HTTP_11 && reply.ends_connection();
            send_local_reply(&mut exchange, &reply)
        }
    };
    if version <= Version::HTTP_11 {
        headers::name_status(&mut response);
    }
    if version == Version::HTTP_10 {
        // To a response of a later version hyper would add what an HTTP/1.0 caller wishes: `keep-alive`.
        *response.version_mut() = version;
    }
    if close {
        // A proxy keeps no connection with an HTTP/1.0 caller (RFC 9112, 9.3), and none while it drains.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn closes_connection(context: &RequestContext, version: Version, is_connect: bool) -> bool {
    // A caller that waits for `100 Continue` has not received it, or has sent its body all the same; what follows a CONNECT
    // that failed is no request either.
    let is_doubtful = is_connect || context.flow().is_held();
    let is_draining = context.worker().is_leaving() || context.downstream().listener.is_closed();
    version <= Version::HTTP_11 && (version < Version::HTTP_11 || is_doubtful || is_draining)
}

fn from_exchange(
    mut exchange: Box<ActiveExchange>,
    response: Response<UpstreamBody>,
    version: Version,
) -> Response<ResponseBody> {
    let context = &mut exchange.context;
    let ended_at = context.ended_at();
    context.record_mut().set_response_head(ended_at, response.status());
    let (head, incoming) = response.into_parts();
    // A gRPC response ends with its trailers, whatever it says of its length.
    let length = if context.is_grpc() { None } else { length_of(&head, context.record().method()) };
    if version == Version::HTTP_10 && length.is_none() {
        context.downstream().end_with_connection();
    }
    Response::from_parts(head, ResponseBody::upstream(incoming, length, exchange))
}

fn begin_tunnel(
    mut exchange: Box<ActiveExchange>,
    mut response: Response<ResponseBody>,
    upstream: Io,
) -> Response<ResponseBody> {
    let context = &mut exchange.context;
    // A deadline ends no tunnel.
    context.set_dry_run_deadline(None);
    context.record_mut().set_response_head(Instant::now(), response.status());
    let later = response.extensions_mut().remove::<OnUpgrade>();
    let downstream = Rc::clone(context.downstream());
    let handoff = Handoff { upstream, exchange };
    match later {
        Some(later) => {
            let sender = TunnelSender::default();
            downstream.await_sender(sender.clone());
            join_later(later, sender, handoff);
        }
        None => downstream.hand_off(Box::new(move |stream| Box::pin(handoff.join(stream)))),
    }
    response
}

/// Over HTTP/2 the caller's side of a tunnel is one stream, which hyper hands out after the response.
fn join_later(later: OnUpgrade, sender: TunnelSender, handoff: Handoff) {
    tasks::spawn(async move {
        if let Ok(stream) = later.await {
            let stream = Io::boxed(Http2Tunnel::new(stream, sender.clone()));
            sender.run_with(handoff.join(stream)).await;
        }
    });
}

/// How many bytes of a body the caller waits for; 0 where there can be none (RFC 9112, 6.3).
fn length_of(head: &http::response::Parts, method: &Method) -> Option<u64> {
    if method == Method::HEAD || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        return Some(0);
    }
    head.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Makes the head of an upstream's response fit for the caller.
///
/// # Errors
/// A response that cannot be passed on without being read in two ways.
pub(super) fn from_upstream(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    facts: &mut ResponseFacts,
    mut response: Response<UpstreamBody>,
) -> Result<PipelineReply, LocalReply> {
    let scan = HeaderScan::scan(response.headers());
    check_framing(&response, &scan)?;
    check_count(&response, &select::connections(context, attempt).max_header_count)?;
    let (version, status) = (response.version(), response.status());
    if !context.flow().request.ended() {
        facts.refuses_rest =
            version < Version::HTTP_11 || headers::lists(response.headers(), &header::CONNECTION, "close");
    }
    // Each hop says its own version, never the one it received (RFC 9112, 2.3).
    *response.version_mut() = Version::HTTP_11;
    let headers = response.headers_mut();
    let hop_by_hop = headers::strip(headers, &scan);
    facts.keep_alive = hop_by_hop.kept_for(version);
    facts.named_by_connection = hop_by_hop.named;
    if status == StatusCode::NO_CONTENT {
        headers.remove(header::CONTENT_LENGTH);
    } else {
        headers::one_length(headers, &scan);
    }
    context.downstream().listener.via.add(headers, version);
    headers::forget_all_but_reason(response.extensions_mut());
    if context.route().retry.is_failure(AttemptFailure::Status(status.as_u16())) {
        proxy_status::write(context, status, response.headers_mut(), scan.proxy_status);
    }
    if context.is_grpc() {
        return Ok(from_grpc_upstream(context, attempt, &scan, response));
    }
    if scan.kind == ContentKind::Events {
        context.set_stream();
    }
    if context.timeout_state().is_stream {
        let now = context.ended_at();
        breaker_and_ejection::became_stream(context, attempt, now);
    }
    Ok(PipelineReply::Upstream(response))
}

/// hyper has refused what it cannot frame; this refuses what it could, but the caller might read otherwise.
fn check_framing(response: &Response<UpstreamBody>, scan: &HeaderScan) -> Result<(), LocalReply> {
    let malformed = |what: &'static str| Err(LocalReply::plain(LocalReplyKind::UpstreamProtocol, what));
    if scan.codings > 0 && scan.lengths > 0 {
        return malformed("the response has both Content-Length and Transfer-Encoding (RFC 9112, 6.3)");
    }
    if !headers::only_chunked(response.headers(), scan) {
        return malformed("the response's transfer coding is not chunked (RFC 9112, 6.1)");
    }
    Ok(())
}

fn check_count(response: &Response<UpstreamBody>, limit: &Sourced<u32>) -> Result<(), LocalReply> {
    let count = response.headers().len();
    if count <= limit.value as usize {
        return Ok(());
    }
    Err(LocalReply::too_many_headers(limit, format!("the response has {count} header fields")))
}

/// A gRPC caller cannot read a response that is not gRPC; it gets the status that the HTTP status stands for.
fn from_grpc_upstream(
    context: &mut RequestContext,
    attempt: &mut Attempt,
    scan: &HeaderScan,
    mut response: Response<UpstreamBody>,
) -> PipelineReply {
    let headers = response.headers_mut();
    if let Some((code, message)) = grpc::read_status(headers) {
        context.record_mut().set_grpc_status(code, message);
        if context.route().retry.is_failure(AttemptFailure::Grpc(code)) {
            proxy_status::write(context, StatusCode::OK, headers, scan.proxy_status);
        }
        return PipelineReply::Upstream(response);
    }
    if scan.kind == ContentKind::Grpc {
        return PipelineReply::Upstream(response);
    }
    let status = response.status();
    let code = GrpcStatus::of_http(status);
    let message = match response.body() {
        // The text of an injected fault; a discarded response has none.
        UpstreamBody::Local(text) if !text.is_empty() => String::from_utf8_lossy(text).trim_end().to_owned(),
        UpstreamBody::Local(_) | UpstreamBody::Http1(_) | UpstreamBody::Http2(_) => {
            format!("the upstream answered with HTTP status {} and no gRPC status", status.as_u16())
        }
    };
    let mut translated = grpc::trailers_only(code, &message, ResponseBody::empty());
    for member in response.headers().get_all(PROXY_STATUS) {
        translated.headers_mut().append(PROXY_STATUS, member.clone());
    }
    proxy_status::push_back(context, translated.headers_mut());
    context.record_mut().set_grpc_status(code as u32, translated.headers().get(grpc::MESSAGE).cloned());
    if status.is_success() {
        // A good response to something else: the upstream has no such gRPC service.
        breaker_and_ejection::report_complete(context, attempt);
    } else {
        // A bad status was reported when it came; any other is a response of the upstream's own.
        let now = context.ended_at();
        breaker_and_ejection::report_probes(context, attempt, now);
    }
    PipelineReply::Own(translated)
}

/// Answers OPTIONS and TRACE that may go no further, else counts the hop (RFC 9110, 7.6.2).
pub(super) fn as_final_recipient(head: &mut Parts) -> Option<PipelineReply> {
    const MAX_FORWARDS: HeaderName = header::MAX_FORWARDS;
    if head.method != Method::OPTIONS && head.method != Method::TRACE {
        return None;
    }
    // A number that does not fit is replaced by the largest that does.
    let left = headers::count(head.headers.get(MAX_FORWARDS)?)?;
    if left > 0 {
        head.headers.insert(MAX_FORWARDS, HeaderValue::from(left - 1));
        return None;
    }
    let status = if head.method == Method::OPTIONS { StatusCode::OK } else { StatusCode::METHOD_NOT_ALLOWED };
    let mut response = Response::new(ResponseBody::whole(Bytes::new()));
    *response.status_mut() = status;
    let methods = HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
    response.headers_mut().insert(header::ALLOW, methods);
    Some(PipelineReply::Own(response))
}
