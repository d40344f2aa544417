//! The rules of the policy: each rule on its own, rules together, and rules over several hops.
//!
//! - `circuit_breaker`: a destination that fails: open, probe, closed
//! - `circuit_breaker_per_host`: one breaker for each host of a destination without endpoints
//! - `circuit_breaker_recovery`: an upstream killed and restarted under load
//! - `concurrency_limit`: calls in flight, the queue, refusals
//! - `correlation`: outbound calls of an app joined to its inbound request
//! - `deadline`: the time budget of a call over all hops
//! - `failure_scenarios`: retry storm, hanging upstream, rolling restart and others, with the rule on and off
//! - `fault_injection`: aborts, resets, delays, cut and slow bodies
//! - `load_balancing`: the share of each endpoint
//! - `load_balancing_outcomes`: the effect of failures and client aborts on that share
//! - `max_body_size`: the length of a request body: announced, counted, gRPC
//! - `multi_hop`: retry, blame and unsent requests in a chain of four services
//! - `outlier_ejection`: an endpoint that fails among others
//! - `proxy_status`: what a hop tells the next about a failure
//! - `rate_limit`: calls per time: all, per client, per header value
//! - `retry`: conditions, backoff, budget, pushback
//! - `retry_body_replay`: the request body in a retry
//! - `retry_unsent`: requests that the upstream could not have processed
//! - `timeouts`: connect, request, try and stream timeouts

mod circuit_breaker;
mod circuit_breaker_per_host;
mod circuit_breaker_recovery;
mod concurrency_limit;
mod correlation;
mod deadline;
mod failure_scenarios;
mod fault_injection;
mod load_balancing;
mod load_balancing_outcomes;
mod max_body_size;
mod multi_hop;
mod outlier_ejection;
mod proxy_status;
mod rate_limit;
mod retry;
mod retry_body_replay;
mod retry_unsent;
mod timeouts;
