//! Level 3: the services that calls go to.
//!
//! A [`cluster::Cluster`] is a destination's endpoints as all workers see them; `discovery` keeps its addresses
//! fresh. Each worker has a [`pool::Pool`] of its own for it: `balance` picks an endpoint for every request,
//! `dial` opens connections over `connect`, `endpoint` keeps them (`http1` alone, `http2` shared), `response` is what comes
//! back over either, `upstreams` holds all pools and sweeps stale connections.

pub mod balance;
pub mod cluster;
pub mod connect;
pub mod dial;
pub mod discovery;
pub mod endpoint;
pub mod http1;
pub mod http2;
pub mod pool;
pub mod response;
pub mod spec;
pub mod upstreams;
