//! Level 5: the path of one request.
//!
//! In the order in which a request meets them: `serve` (hyper), [`pipeline`] (which rule comes when), `target` and
//! `headers` (what may pass), `correlation` (its deadline, and what it has to do with other requests), `retry` (whether one
//! more follows), `outcome` (what a try says about the callee), `attempt` (one try at one endpoint), `select` (a
//! connection to it), `fault_injection` (what goes wrong there on purpose), `response_body` (the answer on its way), `local_reply` (what we
//! say instead), `grpc`, `upgrade`. `worker_context` is what all of one worker's requests share and `request_context` what one request
//! holds.

pub mod attempt;
pub mod connection_timeouts;
pub mod correlation;
pub mod downstream;
pub mod fault_injection;
pub mod grpc;
pub mod headers;
pub mod held;
pub mod local_reply;
pub mod outcome;
pub mod pipeline;
pub mod request_context;
pub mod response;
pub mod response_body;
pub mod retry;
pub mod select;
pub mod serve;
pub mod target;
pub mod timeouts;
pub mod tunnel;
pub mod upgrade;
pub mod worker_context;
