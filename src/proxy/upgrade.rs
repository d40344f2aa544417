//! Connections that stop being HTTP: WebSocket upgrades and CONNECT.
//!
//! Both ends agree on a new protocol, the answer is sent, and then `serve` gets the two bare streams and copies
//! bytes. Only `websocket` is upgraded to; any other offer is left out, as a server may (RFC 9110, 7.8).

use std::future::poll_fn;
use std::rc::Rc;

use http::header::HeaderMap;
use http::request::Parts;
use http::{HeaderValue, Method, Response, Version, header};
use hyper::upgrade::OnUpgrade;
use tokio::time::Instant;

use crate::policy::model::{Listener, ListenerTarget};
use crate::proxy::headers::{self, HeaderScan};
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::outcome;
use crate::proxy::request_context::RequestContext;
use crate::proxy::response::PipelineReply;
use crate::proxy::response_body::ResponseBody;
use crate::proxy::select;
use crate::rules::circuit_breaker::CallResult;
use crate::telemetry::Protocol;
use crate::upstream::pool::Pool;
use crate::upstream::response::UpstreamBody;

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");

/// The protocol that the request wants to switch to, if it is one that we pass on.
pub fn wanted(head: &Parts, present: &HeaderScan) -> Option<HeaderValue> {
    let offered = present.upgrade
        && head.version == Version::HTTP_11
        && head.method == Method::GET
        && headers::lists(&head.headers, &header::CONNECTION, "upgrade")
        && headers::lists(&head.headers, &header::UPGRADE, "websocket");
    offered.then_some(WEBSOCKET)
}

/// Says again, to the next hop, that the connection may be switched.
pub fn ask(fields: &mut HeaderMap, protocol: &HeaderValue) {
    fields.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    fields.insert(header::UPGRADE, protocol.clone());
}

/// The upstream has switched: takes its stream, and prepares the caller's to follow.
///
/// # Errors
/// If nobody asked for it, or for another protocol.
pub async fn switch(
    live: &mut RequestContext,
    mut answer: Response<UpstreamBody>,
    asked: Option<HeaderValue>,
) -> Result<PipelineReply, LocalReply> {
    let unasked = || {
        LocalReply::plain(LocalReplyKind::UpstreamProtocol, "the upstream switched to a protocol that nobody asked for")
    };
    let protocol = asked.ok_or_else(unasked)?;
    if !headers::lists(answer.headers(), &header::UPGRADE, "websocket") {
        return Err(unasked());
    }
    let present = HeaderScan::scan(answer.headers());
    let version = answer.version();
    if version != Version::HTTP_11 {
        return Err(LocalReply::plain(
            LocalReplyKind::UpstreamProtocol,
            "only HTTP/1.1 can switch protocols (RFC 9110, 7.8)",
        ));
    }
    headers::strip(answer.headers_mut(), &present);
    answer.headers_mut().remove(header::CONTENT_LENGTH);
    live.caller.listener.via.add(answer.headers_mut(), version);
    ask(answer.headers_mut(), &protocol);
    headers::forget(answer.extensions_mut());
    let connection = live.lease.take().and_then(crate::upstream::pool::Lease::into_http1);
    let mut connection = connection.ok_or_else(unasked)?;
    // hyper hands the stream out when it has seen the end of the HTTP part.
    let until = live.patience.request_at(&live.route().timeouts);
    if live.timer.limit(until, poll_fn(|cx| connection.drive(cx))).await.is_none() {
        let limits = &live.route().timeouts;
        return Err(live.patience.over_unsent(
            limits,
            LocalReplyKind::RequestTimeout,
            "the upstream did not finish switching protocols",
        ));
    }
    let (upstream, early) = connection.into_stream();
    live.record.set_protocol(Protocol::WebSocket);
    outcome::streams(live, live.over_at);
    // It has switched; how the tunnel ends says nothing about it.
    outcome::judge(live, CallResult::Success, live.over_at);
    let (head, _no_body) = answer.into_parts();
    Ok(PipelineReply::Tunnel(Response::from_parts(head, ResponseBody::empty()), upstream.with_prefix(early)))
}

/// Whether a listener opens tunnels at all.
///
/// # Errors
/// If it is no forward proxy.
pub fn may_connect(listener: &Listener) -> Result<(), LocalReply> {
    if listener.target == ListenerTarget::Forward {
        return Ok(());
    }
    Err(LocalReply::plain(
        LocalReplyKind::ConnectDenied,
        "this listener leads to one destination and forwards to no other",
    ))
}

/// CONNECT: a stream to the destination, without HTTP on it.
///
/// # Errors
/// If the destination cannot be reached.
pub async fn connect(
    live: &mut RequestContext,
    pool: &Rc<Pool>,
    mut head: Box<Parts>,
) -> Result<PipelineReply, LocalReply> {
    live.record.set_protocol(Protocol::Tunnel);
    live.record.begin_attempt(1, 1);
    let upstream = select::bare_stream(live, pool).await;
    // What can be said of the endpoint is said now: a tunnel may last, and how it ends says nothing.
    match &upstream {
        Ok(_) => outcome::judge(live, CallResult::Success, Instant::now()),
        Err(refusal) => outcome::judge_late(live, refusal.kind, Instant::now()),
    }
    let upstream = upstream?;
    let mut answer = Response::new(ResponseBody::empty());
    if head.version == Version::HTTP_2
        && let Some(later) = head.extensions.remove::<OnUpgrade>()
    {
        answer.extensions_mut().insert(later);
    }
    Ok(PipelineReply::Tunnel(answer, upstream))
}
