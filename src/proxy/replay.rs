//! What further attempts of a request need: the kept head and body, and the endpoints of the attempts before.

use std::net::SocketAddr;
use std::rc::Rc;

use http::Request;
use http::header::HeaderMap;
use http::request::Parts;

use crate::net::body::{Replay, RequestBody};
use crate::net::flow::Flow;

/// What further attempts of a request need.
#[derive(Default)]
pub(super) struct RetryState {
    replay: Option<Box<ReplayableRequest>>,
    attempted: Vec<SocketAddr>,
    was_seen: bool,
}

/// What a request can be sent again from.
struct ReplayableRequest {
    /// The head as it goes out, but for what depends on the connection.
    head: Parts,
    /// The body, as far as it was kept.
    body: Replay,
}

impl RetryState {
    /// Keeps the request for further attempts.
    pub(super) fn keep(&mut self, head: Parts, body: Replay) {
        self.replay = Some(Box::new(ReplayableRequest { head, body }));
    }

    /// True if the request was kept.
    pub(super) fn is_kept(&self) -> bool {
        self.replay.is_some()
    }

    /// True if the body can be sent again from its beginning; `None` where the request was not kept.
    pub(super) fn is_replayable(&self) -> Option<bool> {
        Some(self.replay.as_ref()?.body.is_replayable())
    }

    /// The request once more; `None` if it was not kept, or too much of its body has passed.
    pub(super) fn request(&self, flow: &Rc<Flow>) -> Option<Request<RequestBody>> {
        let replay = self.replay.as_ref()?;
        Some(Request::from_parts(replay.head.clone(), replay.body.next_body(flow)?))
    }

    /// Notes whether the upstream may have seen the request in the current attempt.
    pub(super) fn note_seen(&mut self, may_have_seen: bool) {
        self.was_seen |= may_have_seen;
    }

    /// Drops the kept request: no further attempt follows.
    pub(super) fn forget_request(&mut self) {
        self.replay = None;
    }

    /// The header fields of the request before the first attempt; `None` where the request was not kept.
    pub(super) fn original_headers(&self) -> Option<&HeaderMap> {
        self.replay.as_ref().map(|replay| &replay.head.headers)
    }

    /// The endpoints of the attempts before, without the current one.
    pub(super) fn attempted(&self) -> &[SocketAddr] {
        &self.attempted
    }

    /// Notes an endpoint that the next pick passes over.
    pub(super) fn add_attempted(&mut self, endpoint: SocketAddr) {
        self.attempted.push(endpoint);
    }

    /// The upstream may have seen the request in one of the attempts before the current one.
    pub(super) fn was_seen(&self) -> bool {
        self.was_seen
    }
}
