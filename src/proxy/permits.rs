//! The permits that an exchange holds: of the concurrency limit, of the circuit breaker, of its endpoint.

use std::rc::Rc;

use crate::rules::circuit_breaker::{BreakerPermit, Probe};
use crate::rules::limits::ConcurrencyPermit;
use crate::upstream::pool::Pool;

/// A call in flight to one destination: its permit, and its count in the gauge `hopguard_in_flight_requests`.
pub(super) struct InFlightPermit {
    /// `None` where `limits` is not enforced.
    _permit: Option<ConcurrencyPermit>,
    pool: Rc<Pool>,
}

impl InFlightPermit {
    /// Counts the call as in flight until the result is dropped.
    pub(super) fn new(permit: Option<ConcurrencyPermit>, pool: Rc<Pool>) -> Self {
        pool.metrics.in_flight.increment();
        Self { _permit: permit, pool }
    }

    /// Whether the permit is one for this pool. A call that goes on to another destination needs a permit of that one.
    pub(super) fn is_for(&self, pool: &Rc<Pool>) -> bool {
        Rc::ptr_eq(&self.pool, pool)
    }
}

impl Drop for InFlightPermit {
    fn drop(&mut self) {
        self.pool.metrics.in_flight.decrement();
    }
}

/// A permit of one breaker, from its admission until the result of the attempt is reported.
#[derive(Default)]
pub(super) enum HeldPermit {
    /// None was given, or its result has been reported.
    #[default]
    None,
    /// One of many.
    Permit(BreakerPermit),
    /// A probe, one of the few that find out; boxed, because they are rare.
    Probe(Box<Probe>),
}

/// The permits of one attempt. Dropping them reports nothing and frees the slots of probes.
#[derive(Default)]
pub(super) struct Permits {
    /// Of the circuit breaker of the destination.
    pub(super) destination: HeldPermit,
    /// Of the endpoint.
    pub(super) endpoint: HeldPermit,
}

impl Permits {
    /// Takes the probes out; permits stay.
    pub(super) fn take_probes(&mut self) -> Self {
        let take = |held: &mut HeldPermit| match held {
            HeldPermit::Probe(_) => std::mem::take(held),
            HeldPermit::Permit(_) | HeldPermit::None => HeldPermit::None,
        };
        Self { destination: take(&mut self.destination), endpoint: take(&mut self.endpoint) }
    }

    /// True if no permit is held.
    pub(super) fn is_empty(&self) -> bool {
        matches!((&self.destination, &self.endpoint), (HeldPermit::None, HeldPermit::None))
    }
}
