//! One exchange in progress: what the pipeline owns until the response head is there, and the response body until its end.
//!
//! It stays in one box from the request head to the last byte, so that only a pointer moves. Dropping it, at whatever
//! point, releases the permit, returns or closes the connection, and writes the record.

use http::header::HeaderName;

use crate::proxy::attempt::Attempt;
use crate::proxy::permits::InFlightPermit;
use crate::proxy::replay::RetryState;
use crate::proxy::request_context::RequestContext;

/// One exchange in progress. The fields are dropped in this order: the next queued call gets the permit first.
pub(super) struct ActiveExchange {
    /// The permit of the destination; `None` before admission.
    pub(super) permit: Option<InFlightPermit>,
    /// What is fixed once the request is routed, and the record.
    pub(super) context: RequestContext,
    /// The current attempt.
    pub(super) attempt: Attempt,
    /// What a further attempt needs.
    pub(super) retry: RetryState,
    /// What the head of the upstream's response said.
    pub(super) response: ResponseFacts,
}

impl ActiveExchange {
    /// An exchange whose request is not routed yet.
    pub(super) fn new(context: RequestContext) -> Self {
        Self {
            permit: None,
            attempt: Attempt::before_routing(context.began()),
            context,
            retry: RetryState::default(),
            response: ResponseFacts::default(),
        }
    }
}

/// What the head of the upstream's response said about the connection and the trailers.
#[derive(Default)]
pub(super) struct ResponseFacts {
    /// Fields that `Connection` named; they may not pass as trailers.
    pub(super) named_by_connection: Vec<HeaderName>,
    /// How long the upstream keeps the idle connection, in seconds (`Keep-Alive: timeout=`).
    pub(super) keep_alive: Option<u32>,
    /// The upstream closes its connection behind the response, and reads the rest of the request no more.
    pub(super) refuses_rest: bool,
}
