//! The head of an answer on its way back: the upstream's, made fit for the caller, or one of our own.

use std::rc::Rc;

use bytes::Bytes;
use http::header::HeaderName;
use http::request::Parts;
use http::{HeaderValue, Method, Response, StatusCode, Version, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use crate::net::io::Io;
use crate::proxy::grpc::{self, GrpcStatus};
use crate::proxy::headers::{self, ContentKind, HeaderScan};
use crate::proxy::local_reply::{self, LocalReply, LocalReplyContext, PROXY_STATUS};
use crate::proxy::request_context::RequestContext;
use crate::proxy::response_body::ResponseBody;
use crate::proxy::tunnel::Handoff;
use crate::proxy::{correlation, outcome};
use crate::rules::retry::AttemptFailure;
use crate::runtime::tasks;
use crate::upstream::response::UpstreamBody;

/// What the pipeline comes to.
pub enum PipelineReply {
    /// The upstream's answer; its body is still to come.
    Upstream(Response<UpstreamBody>),
    /// An answer of our own that is no refusal.
    Own(Response<ResponseBody>),
    /// Once the answer is sent, the caller's connection is joined with this stream.
    Tunnel(Response<ResponseBody>, Io),
}

/// Hands the reply to hyper; whatever the exchange still holds goes with its body.
pub fn hand_over(
    mut live: Box<RequestContext>,
    reply: Result<PipelineReply, LocalReply>,
    version: Version,
    connect: bool,
) -> Response<ResponseBody> {
    // A caller that waits for leave to send its body has not got it, or has sent it all the same; what follows a CONNECT
    // that came to nothing is no request either.
    let doubtful = connect || live.flow.is_held();
    let leaving = live.worker.is_leaving() || live.caller.listener.is_closed();
    let mut close = version <= Version::HTTP_11 && (version < Version::HTTP_11 || doubtful || leaving);
    let mut answer = match reply {
        Ok(PipelineReply::Upstream(answer)) => {
            live.record.set_response_head(live.over_at, answer.status());
            let (head, incoming) = answer.into_parts();
            // A gRPC answer ends with its trailers, whatever it says of its length.
            let length = if live.patience.grpc { None } else { length_of(&head, live.record.method()) };
            if version == Version::HTTP_10 && length.is_none() {
                live.caller.end_with_connection();
            }
            Response::from_parts(head, ResponseBody::upstream(incoming, length, live))
        }
        Ok(PipelineReply::Own(answer)) => {
            live.over_at = Instant::now();
            live.record.set_response_head(live.over_at, answer.status());
            live.record.complete();
            answer
        }
        Ok(PipelineReply::Tunnel(mut answer, upstream)) => {
            // A deadline ends no tunnel.
            live.late_at = None;
            live.record.set_response_head(Instant::now(), answer.status());
            let later = answer.extensions_mut().remove::<OnUpgrade>();
            let caller = Rc::clone(&live.caller);
            let handoff = Handoff { upstream, live };
            match later {
                Some(later) => join_later(later, handoff),
                None => caller.hand_off(Box::new(move |stream| Box::pin(handoff.join(stream)))),
            }
            return answer;
        }
        Err(refusal) => {
            close |= version <= Version::HTTP_11 && refusal.ends_connection();
            refuse(&mut live, &refusal)
        }
    };
    if version == Version::HTTP_10 {
        // To an answer of a later version hyper would add what an HTTP/1.0 caller wishes: `keep-alive`.
        *answer.version_mut() = version;
    }
    if close {
        // A proxy keeps no connection with an HTTP/1.0 caller (RFC 9112, 9.3), and none while it is leaving.
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

/// Over HTTP/2 the caller's side of a tunnel is one stream, which hyper hands out after the answer.
fn join_later(later: OnUpgrade, handoff: Handoff) {
    tasks::spawn(async move {
        if let Ok(stream) = later.await {
            handoff.join(Io::boxed(TokioIo::new(stream))).await;
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

fn refuse(live: &mut RequestContext, refusal: &LocalReply) -> Response<ResponseBody> {
    let is_grpc = live.patience.grpc;
    live.over_at = Instant::now();
    // A caller that left during its body has not been refused anything.
    let has_left = refusal.kind == local_reply::LocalReplyKind::BadRequest && live.flow.request.left();
    if !has_left {
        live.record.refuse(refusal.record());
    }
    correlation::refused(live, refusal.kind, live.over_at);
    let context = LocalReplyContext {
        attempt: live.record.attempts(),
        retry: live.record.annotations().and_then(|notes| notes.retry_withheld),
        mark: live.mark.as_deref(),
        // Who is told when to come again may do so.
        pushes_back: correlation::pushes_back(live) && refusal.kind != local_reply::LocalReplyKind::RateLimited,
    };
    let answer = refusal.answer(is_grpc, &context, ResponseBody::whole);
    if has_left {
        return answer;
    }
    if is_grpc {
        let message = answer.headers().get(grpc::MESSAGE).cloned();
        live.record.set_grpc_status(refusal.grpc().0 as u32, message);
    }
    live.record.set_response_head(live.over_at, answer.status());
    live.record.complete();
    answer
}

/// Makes the head of an upstream's answer fit for the caller.
///
/// # Errors
/// An answer that cannot be passed on without being read in two ways.
pub fn from_upstream(
    live: &mut RequestContext,
    mut answer: Response<UpstreamBody>,
) -> Result<PipelineReply, LocalReply> {
    let present = HeaderScan::scan(answer.headers());
    let malformed = |what: &'static str| Err(LocalReply::plain(local_reply::LocalReplyKind::UpstreamProtocol, what));
    if present.codings > 0 && present.lengths > 0 {
        return malformed("the answer has both Content-Length and Transfer-Encoding (RFC 9112, 6.3)");
    }
    if !headers::only_chunked(answer.headers(), &present) {
        return malformed("the answer's transfer coding is not chunked (RFC 9112, 6.1)");
    }
    let version = answer.version();
    let status = answer.status();
    if status.as_u16() > 599 {
        return malformed("the answer's status is none (RFC 9110, 15)");
    }
    // Each hop says its own version, never the one it received (RFC 9112, 2.3).
    *answer.version_mut() = Version::HTTP_11;
    let fields = answer.headers_mut();
    let said = headers::strip(fields, &present);
    live.keep_alive = said.kept_for(version);
    live.named = said.named;
    if status == StatusCode::NO_CONTENT {
        fields.remove(header::CONTENT_LENGTH);
    } else {
        headers::one_length(fields, &present);
    }
    live.caller.listener.via.add(fields, version);
    headers::forget(answer.extensions_mut());
    if live.route().retry.is_failure(AttemptFailure::Status(status.as_u16())) {
        correlation::mark_answer(live, status, answer.headers_mut(), present.proxy_status);
    }
    if live.patience.grpc {
        return Ok(grpc_answer(live, &present, answer));
    }
    if present.kind == ContentKind::Events {
        live.patience.stream = true;
    }
    if live.patience.stream {
        outcome::streams(live, live.over_at);
    }
    Ok(PipelineReply::Upstream(answer))
}

/// A gRPC caller cannot read an answer that is not gRPC; it gets the status that the HTTP status stands for.
fn grpc_answer(live: &mut RequestContext, present: &HeaderScan, mut answer: Response<UpstreamBody>) -> PipelineReply {
    let fields = answer.headers_mut();
    if let Some((code, message)) = grpc::read_status(fields) {
        live.record.set_grpc_status(code, message);
        if live.route().retry.is_failure(AttemptFailure::Grpc(code)) {
            correlation::mark_answer(live, StatusCode::OK, fields, present.proxy_status);
        }
        return PipelineReply::Upstream(answer);
    }
    if present.kind == ContentKind::Grpc {
        return PipelineReply::Upstream(answer);
    }
    let status = answer.status();
    let code = GrpcStatus::of_http(status);
    let message = match answer.body() {
        // A fault's text; what is left of an answer that was given up has none.
        UpstreamBody::Own(said) if !said.is_empty() => String::from_utf8_lossy(said).trim_end().to_owned(),
        UpstreamBody::Own(_) | UpstreamBody::Http1(_) | UpstreamBody::Http2(_) => {
            format!("the upstream answered with HTTP status {} and no gRPC status", status.as_u16())
        }
    };
    let mut translated = grpc::trailers_only(code, &message, ResponseBody::empty());
    for said in answer.headers().get_all(PROXY_STATUS) {
        translated.headers_mut().append(PROXY_STATUS, said.clone());
    }
    correlation::push_back(live, translated.headers_mut());
    live.record.set_grpc_status(code as u32, translated.headers().get(grpc::MESSAGE).cloned());
    if status.is_success() {
        // A good answer to something else: no service of gRPC is there.
        outcome::judge_complete(live);
    } else {
        // A bad status was judged when it came; any other is somebody's answer.
        outcome::judge_probes(live, live.over_at);
    }
    PipelineReply::Own(translated)
}

/// Answers OPTIONS and TRACE that may go no further, else counts the hop (RFC 9110, 7.6.2).
pub fn as_final_recipient(head: &mut Parts) -> Option<PipelineReply> {
    const MAX_FORWARDS: HeaderName = header::MAX_FORWARDS;
    if head.method != Method::OPTIONS && head.method != Method::TRACE {
        return None;
    }
    let left: u32 = head.headers.get(MAX_FORWARDS)?.to_str().ok()?.parse().ok()?;
    if left > 0 {
        head.headers.insert(MAX_FORWARDS, HeaderValue::from(left - 1));
        return None;
    }
    let status = if head.method == Method::OPTIONS { StatusCode::OK } else { StatusCode::METHOD_NOT_ALLOWED };
    let mut answer = Response::new(ResponseBody::whole(Bytes::new()));
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
    Some(PipelineReply::Own(answer))
}
