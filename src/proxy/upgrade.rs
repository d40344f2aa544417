//! Connections that stop being HTTP: WebSocket upgrades and CONNECT.
//!
//! Both ends agree on a new protocol, the response is sent, and then `serve` gets the two bare streams and copies bytes.
//! `websocket` is the only protocol upgraded to; any other offer is left out, as a server may (RFC 9110, 7.8).

use std::future::poll_fn;

use http::header::HeaderMap;
use http::request::Parts;
use http::{HeaderValue, Method, Response, Version, header};
use hyper::upgrade::OnUpgrade;
use tokio::time::Instant;

use crate::policy::model::{Listener, ListenerTarget};
use crate::proxy::exchange::ActiveExchange;
use crate::proxy::headers::{self, HeaderScan};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::response::PipelineReply;
use crate::proxy::response_body::ResponseBody;
use crate::proxy::{breaker_and_ejection, connecting, select, timeouts};
use crate::rules::circuit_breaker::CallResult;
use crate::telemetry::Protocol;
use crate::upstream::pool::Lease;
use crate::upstream::response::UpstreamBody;

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");

/// The protocol that the request wants to switch to, if hopguard passes that protocol on.
pub(super) fn wanted(head: &Parts, scan: &HeaderScan) -> Option<HeaderValue> {
    let is_offered = scan.upgrade
        && head.version == Version::HTTP_11
        && head.method == Method::GET
        && headers::lists(&head.headers, &header::CONNECTION, "upgrade")
        && headers::lists(&head.headers, &header::UPGRADE, "websocket");
    is_offered.then_some(WEBSOCKET)
}

/// Repeats the offer for the next hop, whose connection may be switched too.
pub(super) fn ask(headers: &mut HeaderMap, protocol: &HeaderValue) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, protocol.clone());
}

/// The upstream has switched: takes its stream, and prepares the caller's to follow.
///
/// # Errors
/// If the caller asked for no switch, or for another protocol.
pub(super) async fn switch(
    exchange: &mut ActiveExchange,
    mut response: Response<UpstreamBody>,
    asked: Option<HeaderValue>,
) -> Result<PipelineReply, LocalReply> {
    let ActiveExchange { context, attempt, .. } = exchange;
    let unasked = || {
        let detail = "the upstream switched to a protocol that the caller did not ask for";
        LocalReply::plain(LocalReplyKind::UpstreamProtocol, detail)
    };
    let protocol = asked.ok_or_else(unasked)?;
    if !headers::lists(response.headers(), &header::UPGRADE, "websocket") {
        return Err(unasked());
    }
    let scan = HeaderScan::scan(response.headers());
    let version = response.version();
    if version != Version::HTTP_11 {
        let detail = "only HTTP/1.1 can switch protocols (RFC 9110, 7.8)";
        return Err(LocalReply::plain(LocalReplyKind::UpstreamProtocol, detail));
    }
    headers::strip(response.headers_mut(), &scan);
    response.headers_mut().remove(header::CONTENT_LENGTH);
    context.downstream().listener.via.add(response.headers_mut(), version);
    ask(response.headers_mut(), &protocol);
    headers::forget(response.extensions_mut());
    let mut connection = attempt.take_lease().and_then(Lease::into_http1).ok_or_else(unasked)?;
    // hyper hands the stream out when it has seen the end of the HTTP part.
    let until = context.request_at();
    if timeouts::within(context, until, poll_fn(|cx| connection.drive(cx))).await.is_none() {
        let detail = "the upstream did not finish switching protocols";
        return Err(context.timeout_state().expired_unsent(context.timeouts(), LocalReplyKind::RequestTimeout, detail));
    }
    let (upstream, early) = connection.into_stream();
    context.record_mut().set_protocol(Protocol::WebSocket);
    let now = context.ended_at();
    breaker_and_ejection::became_stream(context, attempt, now);
    // How the tunnel ends says nothing about the upstream, which has switched.
    breaker_and_ejection::report(context, attempt, CallResult::Success, now);
    let (head, _no_body) = response.into_parts();
    Ok(PipelineReply::Tunnel(Response::from_parts(head, ResponseBody::empty()), upstream.with_prefix(early)))
}

/// Whether a listener opens tunnels at all.
///
/// # Errors
/// If it is no forward proxy.
pub(super) fn may_connect(listener: &Listener) -> Result<(), LocalReply> {
    if listener.target == ListenerTarget::Forward {
        return Ok(());
    }
    let detail = "CONNECT needs a listener with `forward: true`";
    Err(LocalReply::plain(LocalReplyKind::ConnectDenied, detail))
}

/// CONNECT: a stream to the destination, without HTTP on it.
///
/// # Errors
/// If the destination cannot be reached.
pub(super) async fn connect(exchange: &mut ActiveExchange, mut head: Box<Parts>) -> Result<PipelineReply, LocalReply> {
    let ActiveExchange { context, attempt, retry, .. } = exchange;
    context.record_mut().set_protocol(Protocol::Tunnel);
    context.record_mut().begin_attempt(1, 1);
    attempt.begin(1, select::upstream(context, attempt)?);
    let upstream = connecting::bare_stream(context, attempt, retry).await;
    // The result is reported at once: a tunnel may last, and how it ends says nothing about the endpoint.
    let now = Instant::now();
    match &upstream {
        Ok(_) => breaker_and_ejection::report(context, attempt, CallResult::Success, now),
        Err(reply) => breaker_and_ejection::report_local_reply(context, attempt, reply.kind, now),
    }
    let upstream = upstream?;
    let mut response = Response::new(ResponseBody::empty());
    if head.version == Version::HTTP_2
        && let Some(later) = head.extensions.remove::<OnUpgrade>()
    {
        response.extensions_mut().insert(later);
    }
    Ok(PipelineReply::Tunnel(response, upstream))
}
