//! Level 3: endpoints of destinations, their addresses, and the connections to them.
//!
//! A [`cluster::Cluster`] is the state of a destination that all workers share; `discovery` resolves its names. Each worker
//! has its own [`pool::Pool`] per cluster: `balance` picks the endpoint of a request, `endpoint` holds its connections
//! (`http1` exclusive, `http2` shared), `waiters` are the calls that wait for one, `dial` opens new ones over `connect`, as many
//! at once as `dial_limit` admits. `reachability` tells whether an endpoint accepts them. `response` is the body or the error that comes
//! back. `upstreams` holds all pools of a worker and sweeps idle connections. `spec` is the policy's YAML for all of it.

pub mod balance;
pub mod cluster;
pub mod connect;
pub mod dial;
pub mod dial_limit;
pub mod discovery;
pub mod endpoint;
pub mod http1;
pub mod http2;
pub mod pool;
pub mod reachability;
pub mod response;
pub mod spec;
pub mod upstreams;
pub mod waiters;
