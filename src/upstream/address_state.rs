//! What all workers of a cluster share about one address.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::time::Instant;

use crate::upstream::dial_limit::DialLimit;
use crate::upstream::request_limit::RequestLimit;
use crate::upstream::stale_mark::StaleMark;
use crate::upstream::worker_limit::WorkerLimit;

/// What all workers share about one address of a cluster.
#[derive(Debug)]
pub struct AddressState {
    address: SocketAddr,
    /// How many connections are being opened, and the last sign of life.
    pub dials: Arc<DialLimit>,
    /// Which connections are not used again.
    pub stale: StaleMark,
    /// After how many requests the upstream ends a connection.
    pub requests: RequestLimit,
    /// After how many requests the upstream replaces its worker process.
    pub worker: WorkerLimit,
}

/// The states of a cluster's addresses; each lives as long as a worker has an endpoint for the address.
#[derive(Debug, Default)]
pub struct AddressStates(Mutex<Vec<Weak<AddressState>>>);

impl AddressStates {
    /// The state of `address`. Takes a lock: call it when addresses change, not per request.
    pub fn get(&self, address: SocketAddr, now: Instant) -> Arc<AddressState> {
        // Each critical section leaves a complete list behind, even on a panic.
        let mut states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        states.retain(|state| state.strong_count() > 0);
        let known = states.iter().filter_map(Weak::upgrade).find(|state| state.address == address);
        known.unwrap_or_else(|| {
            let (stale, requests, worker) = (StaleMark::new(now), RequestLimit::new(now), WorkerLimit::new(now));
            let dials = Arc::new(DialLimit::new(now));
            let state = Arc::new(AddressState { address, dials, stale, requests, worker });
            states.push(Arc::downgrade(&state));
            state
        })
    }
}
