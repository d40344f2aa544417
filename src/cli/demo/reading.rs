//! What the demo's hopguards and services have counted; every figure that it shows is a difference of two readings.

use crate::cli::demo::chain::{Chain, HOPS, Member, PLACES};
use crate::telemetry::{HopSummary, Outcome, PageFormat};

/// All figures at one moment, or of the time between two.
#[derive(Clone)]
pub(super) struct Reading {
    /// In the order of the hops; nothing for a hop without a call.
    pub(super) hops: [Option<HopSummary>; HOPS],
    /// Calls that reached payment itself.
    pub(super) reached: u64,
    /// How often order's breaker for payment has opened.
    pub(super) opened: u64,
}

impl Reading {
    /// What has been counted since the chain was started. The lines of its access logs are of no more use then.
    pub(super) fn of(chain: &Chain) -> Self {
        chain.forget_old_lines();
        let hop = |index: usize| {
            let (seen_by, place) = (chain.members()[index.saturating_sub(1)], &PLACES[index]);
            let is_it = |one: &HopSummary| &*one.labels.destination == place.name && &*one.labels.route == place.route;
            seen_by.app.telemetry().summaries().into_iter().find(is_it)
        };
        Self {
            hops: std::array::from_fn(hop),
            reached: chain.payment.state.calls.get(),
            opened: openings(&chain.order),
        }
    }

    /// What happened since an earlier reading.
    pub(super) fn since(&self, before: &Self) -> Self {
        let difference = |index: usize| {
            let now = self.hops[index].as_ref()?;
            let seen = before.hops[index].as_ref().map_or_else(|| now.clone(), |before| now.since(before));
            (seen.count > 0).then_some(seen)
        };
        Self {
            hops: std::array::from_fn(difference),
            reached: self.reached - before.reached,
            opened: self.opened - before.opened,
        }
    }

    /// The orders that were placed.
    pub(super) fn orders(&self) -> Option<&HopSummary> {
        self.hops[0].as_ref()
    }

    /// The calls that order made to payment.
    pub(super) fn payments(&self) -> Option<&HopSummary> {
        self.hops[1].as_ref()
    }

    /// Calls to payment that the open breaker answered.
    pub(super) fn refused(&self) -> u64 {
        self.payments().and_then(|seen| seen.outcomes.get(&Outcome::CircuitOpen)).copied().unwrap_or(0)
    }
}

/// How often a hopguard's breaker for payment has opened, as its metrics page says.
fn openings(member: &Member) -> u64 {
    let series = "hopguard_circuit_breaker_changes_total{destination=\"payment\",state=\"open\"} ";
    let page = member.app.telemetry().page(PageFormat::Text);
    page.lines().find_map(|line| line.strip_prefix(series)?.parse().ok()).unwrap_or(0)
}

/// Whether order's breaker for payment lets every call through.
pub(super) fn is_closed(chain: &Chain) -> bool {
    let destinations = chain.order.app.telemetry().destinations();
    destinations.iter().find(|one| one.name == "payment").is_none_or(|one| one.breaker == 0)
}
