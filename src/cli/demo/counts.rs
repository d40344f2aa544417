//! The counters of the demo's hopguards and services. Every figure of the demo is a difference of two [`ChainCounts`].

use crate::cli::demo::chain::{Chain, ChainNode, HOP_COUNT, HOPS};
use crate::telemetry::{HopSummary, Outcome, PageFormat};

/// Counters of the chain at one moment, or their growth between two moments.
#[derive(Clone)]
pub(super) struct ChainCounts {
    /// One per hop, from the caller to the bank; `None` for a hop without calls.
    pub(super) hops: [Option<HopSummary>; HOP_COUNT],
    /// Attempts that reached the service payment.
    pub(super) reached: u64,
    /// Times that order's circuit breaker for payment opened.
    pub(super) opened: u64,
}

impl ChainCounts {
    /// The counters since the start of the chain. Trims the access logs, so that they stay bounded.
    pub(super) fn read(chain: &Chain) -> Self {
        chain.trim_access_logs();
        let hop = |index: usize| {
            let (counted_by, hop) = (chain.nodes()[index.saturating_sub(1)], &HOPS[index]);
            let is_it = |one: &HopSummary| &*one.labels.destination == hop.service && &*one.labels.route == hop.route;
            counted_by.app.telemetry().summaries().into_iter().find(is_it)
        };
        Self {
            hops: std::array::from_fn(hop),
            reached: chain.payment.state.calls.get(),
            opened: openings(&chain.order),
        }
    }

    /// The growth since the earlier counters `before`.
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

    /// Orders placed by the load.
    pub(super) fn orders(&self) -> Option<&HopSummary> {
        self.hops[0].as_ref()
    }

    /// Calls from order to payment.
    pub(super) fn payments(&self) -> Option<&HopSummary> {
        self.hops[1].as_ref()
    }

    /// Calls to payment that the open circuit breaker refused.
    pub(super) fn refused(&self) -> u64 {
        self.payments().and_then(|seen| seen.outcomes.get(&Outcome::CircuitOpen)).copied().unwrap_or(0)
    }
}

/// Times that the circuit breaker for payment opened, from the metrics page of the node's hopguard.
fn openings(node: &ChainNode) -> u64 {
    let series = "hopguard_circuit_breaker_changes_total{destination=\"payment\",state=\"open\"} ";
    let page = node.app.telemetry().page(PageFormat::Text);
    page.lines().find_map(|line| line.strip_prefix(series)?.parse().ok()).unwrap_or(0)
}

/// Whether order's circuit breaker for payment is closed.
pub(super) fn is_breaker_closed(chain: &Chain) -> bool {
    let destinations = chain.order.app.telemetry().destinations();
    destinations.iter().find(|one| one.name == "payment").is_none_or(|one| one.breaker == 0)
}
