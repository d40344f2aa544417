//! Level 5: the path of one request, in the order in which a request meets these modules.
//!
//! | step | module |
//! |---|---|
//! | a downstream connection is served | `serve`, `downstream`, `connection_timeouts`, `caller_watch` |
//! | a request is planned and carried out | `pipeline`, on an `exchange` with its `request_context` |
//! | it may pass, and has a target | `request_checks`, `target`, `headers` |
//! | it has a route | `routing` |
//! | it has a deadline, and a parent request | `deadline`, `correlation`, `correlation_state` |
//! | it is admitted: rate limit, concurrency limit | `admission`, `permits` |
//! | it is attempted, and retried | `retry`, `attempt`, `failed_attempt`, `replay` |
//! | an attempt reports to circuit breaker and ejection | `breaker_and_ejection` |
//! | an attempt has an endpoint and a connection | `select`, `connecting` |
//! | an attempt meets an injected fault, or is sent | `fault_injection`, `send`, `upstream_request` |
//! | a timeout is armed, and ends it | `timeouts`, `timeout_state` |
//! | the response goes back, and a request body may go on | `response`, `response_body`, `grpc`, `late_upload` |
//! | hopguard replies itself (503, 504, ...), and tells the hops above | `send_local_reply`, `local_reply`, `proxy_status` |
//! | the connection becomes a tunnel | `upgrade`, `tunnel` |
//! | the connection is closed | `lingering_close` |
//!
//! `worker_context` is what all requests of one worker share.

mod admission;
mod attempt;
pub mod breaker_and_ejection;
mod caller_watch;
mod connecting;
mod connection_timeouts;
mod correlation;
mod correlation_state;
mod deadline;
pub mod downstream;
mod exchange;
mod failed_attempt;
mod fault_injection;
pub mod grpc;
pub mod headers;
mod late_upload;
mod lingering_close;
pub mod local_reply;
mod permits;
mod pipeline;
mod proxy_status;
mod replay;
mod request_checks;
mod request_context;
mod response;
mod response_body;
mod retry;
mod routing;
mod select;
mod send;
mod send_local_reply;
pub mod serve;
mod stale_wait;
mod target;
mod timeout_state;
mod timeouts;
mod tunnel;
mod upgrade;
mod upstream_request;
pub mod worker_context;
