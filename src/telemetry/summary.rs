//! Hops as people want to see them: for the status page, the demo and `top`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::Telemetry;
use super::families;
use super::histogram::Buckets;
use super::hop::HopLabels;
use super::outcome::Outcome;

/// One hop over all workers, protocols and outcomes, since the start of the process or since another summary.
#[derive(Clone, Debug)]
pub struct HopSummary {
    /// Which hop.
    pub labels: Arc<HopLabels>,
    /// How many exchanges ended.
    pub count: u64,
    /// How many of them were failures of the hop; see [`Outcome::is_failure`].
    pub failures: u64,
    /// How many ended in which way; only those that happened.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// The total durations.
    pub total: Buckets,
    /// The proxy's own share.
    pub overhead: Buckets,
}

impl HopSummary {
    fn empty(labels: Arc<HopLabels>) -> Self {
        Self {
            labels,
            count: 0,
            failures: 0,
            outcomes: BTreeMap::new(),
            total: Buckets::default(),
            overhead: Buckets::default(),
        }
    }

    /// The share of exchanges that were no failures, 0 to 1; `None` without exchanges.
    pub fn success(&self) -> Option<f64> {
        (self.count > 0).then(|| 1.0 - self.failures as f64 / self.count as f64)
    }

    /// The duration that the share `q` of exchanges stayed below; `None` without exchanges.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        self.total.quantile(q)
    }

    /// What happened since `earlier`, a summary of the same hop.
    pub fn since(&self, earlier: &HopSummary) -> HopSummary {
        let mut outcomes = BTreeMap::new();
        for (outcome, count) in &self.outcomes {
            let more = count.saturating_sub(earlier.outcomes.get(outcome).copied().unwrap_or(0));
            if more > 0 {
                outcomes.insert(*outcome, more);
            }
        }
        HopSummary {
            labels: Arc::clone(&self.labels),
            count: self.count.saturating_sub(earlier.count),
            failures: self.failures.saturating_sub(earlier.failures),
            outcomes,
            total: self.total.since(&earlier.total),
            overhead: self.overhead.since(&earlier.overhead),
        }
    }
}

pub(super) fn of(telemetry: &Telemetry) -> Vec<HopSummary> {
    let mut hops = BTreeMap::new();
    for ((hop, _, outcome), sums) in telemetry.sums() {
        let summary = hops.entry(hop).or_insert_with(|| HopSummary::empty(telemetry.hops.labels(hop)));
        summary.count += sums.count;
        if outcome.is_failure() {
            summary.failures += sums.count;
        }
        *summary.outcomes.entry(outcome).or_default() += sums.count;
        summary.total.merge(&sums.total);
        summary.overhead.merge(&sums.overhead);
    }
    let mut summaries: Vec<_> = hops.into_values().collect();
    summaries.sort_by(|a, b| a.labels.cmp(&b.labels));
    summaries
}

/// The gauges of one destination over all workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DestinationFigures {
    /// The destination's name.
    pub name: String,
    /// Exchanges that have a place.
    pub in_flight: i64,
    /// Exchanges that wait for one.
    pub queued: i64,
    /// Open upstream connections.
    pub open: i64,
    /// Open upstream connections without an exchange.
    pub idle: i64,
    /// The circuit breaker: 0 closed (also before its first change), 1 half-open, 2 open.
    pub breaker: i64,
    /// Endpoints that were out after the last change.
    pub ejected: i64,
}

pub(super) fn destinations(telemetry: &Telemetry) -> Vec<DestinationFigures> {
    let mut figures = BTreeMap::<String, DestinationFigures>::new();
    for reading in telemetry.instruments.read() {
        let field: fn(&mut DestinationFigures) -> &mut i64 = match reading.family.name {
            name if name == families::IN_FLIGHT.name => |figures| &mut figures.in_flight,
            name if name == families::QUEUED.name => |figures| &mut figures.queued,
            name if name == families::POOL_OPEN.name => |figures| &mut figures.open,
            name if name == families::POOL_IDLE.name => |figures| &mut figures.idle,
            name if name == families::BREAKER_STATE.name => |figures| &mut figures.breaker,
            name if name == families::EJECTED.name => |figures| &mut figures.ejected,
            _ => continue,
        };
        for (labels, value) in reading.values {
            let Some((_, name)) = labels.into_iter().next() else {
                continue;
            };
            *field(figures.entry(name).or_default()) = value as i64;
        }
    }
    figures.into_iter().map(|(name, figures)| DestinationFigures { name, ..figures }).collect()
}
