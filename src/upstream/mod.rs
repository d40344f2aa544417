//! Level 3: endpoints of destinations, their addresses, and the connections to them.
//!
//! A [`cluster::Cluster`] is the state of a destination that all workers share; `discovery` keeps its names resolved, by
//! `resolver`. Each worker has its own [`pool::Pool`] per cluster: `balance` picks the endpoint of a request, `endpoint` holds
//! its connections (`http1` exclusive, `http2` shared and watched by `http2_liveness`), `waiters` are the calls that wait for
//! one, `dial` opens new ones over `connect`, as many at once as `dial_limit` admits. `reachability` tells whether an endpoint
//! accepts them, `recovery` when one does so again. `response` is the body or the error that comes back. `lifetime`, `request_limit`, `worker_limit` and
//! `stale_mark` say when a connection is not used again; what all workers share of an address is its `address_state`.
//! `upstreams` holds all pools of a worker and sweeps idle connections. `spec` is the policy's YAML for all of it.

pub mod address_state;
pub mod balance;
pub mod cluster;
pub mod connect;
pub mod dial;
pub mod dial_limit;
pub mod discovery;
pub mod endpoint;
pub mod fresh_connections;
pub mod http1;
pub mod http2;
mod http2_liveness;
pub mod lifetime;
pub mod pool;
pub mod reachability;
mod recovery;
pub mod request_limit;
pub mod resolver;
pub mod response;
pub mod spec;
pub mod stale_mark;
pub mod upstreams;
pub mod waiters;
pub mod worker_limit;
