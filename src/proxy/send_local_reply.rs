//! Sends a local reply in place of the upstream's response: each 503, 504 or other local reply to a request is recorded and
//! made here. (A head that never became a request gets its 408 in `serve.rs`.)

use http::Response;
use tokio::time::Instant;

use crate::proxy::exchange::ActiveExchange;
use crate::proxy::grpc;
use crate::proxy::local_reply::{LocalReply, LocalReplyContext, LocalReplyKind};
use crate::proxy::proxy_status;
use crate::proxy::response_body::ResponseBody;

/// Records a local reply and makes the response of it.
pub(super) fn send_local_reply(exchange: &mut ActiveExchange, reply: &LocalReply) -> Response<ResponseBody> {
    let ActiveExchange { context, attempt, retry, .. } = exchange;
    let (is_grpc, now) = (context.is_grpc(), Instant::now());
    context.set_ended_at(now);
    // A caller that left during its body gets no reply.
    let has_left = reply.kind == LocalReplyKind::BadRequest && context.flow().request.disconnected();
    if !has_left {
        context.record_mut().refuse(reply.record());
    }
    proxy_status::of_local_reply(context, reply.kind, attempt.is_unsent(), retry.was_seen(), now);
    let said = LocalReplyContext {
        attempt: context.record().attempts(),
        retry: context.record().annotations().and_then(|notes| notes.retry_withheld),
        status: context.proxy_status(),
        // A caller that is told when to call again may do so.
        pushes_back: proxy_status::forbids_retry(context) && reply.kind != LocalReplyKind::RateLimited,
    };
    let response = reply.response(is_grpc, &said, ResponseBody::whole);
    if has_left {
        return response;
    }
    if is_grpc {
        let message = response.headers().get(grpc::MESSAGE).cloned();
        context.record_mut().set_grpc_status(reply.grpc().0 as u32, message);
    }
    context.record_mut().set_response_head(now, response.status());
    context.record_mut().complete();
    response
}
