//! Figures per hop and per destination, summed over workers: for the status page and the demo.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::Telemetry;
use super::families;
use super::histogram::Buckets;
use super::hop::HopLabels;
use super::instruments::Labels;
use super::outcome::Outcome;

/// One hop, summed over workers, protocols and outcomes, since the start of the process or since another summary.
#[derive(Clone, Debug)]
pub struct HopSummary {
    /// Labels of the hop.
    pub labels: Arc<HopLabels>,
    /// Exchanges that ended.
    pub count: u64,
    /// Failures among them; see [`Outcome::is_failure`].
    pub failures: u64,
    /// Exchanges per outcome; outcomes without exchanges are absent.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// Durations from the request head to the last byte of the response.
    pub total: Buckets,
    /// Overhead: the time that hopguard itself took.
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

    /// Share of exchanges without failure, 0 to 1; `None` without exchanges.
    pub fn success(&self) -> Option<f64> {
        (self.count > 0).then(|| 1.0 - self.failures as f64 / self.count as f64)
    }

    /// The `q`-quantile (0 to 1) of the total duration; `None` without exchanges.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        self.total.quantile(q)
    }

    /// The exchanges since `earlier`, a summary of the same hop.
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

/// See [`Telemetry::summaries`].
pub(super) fn hops(telemetry: &Telemetry) -> Vec<HopSummary> {
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

/// The gauges of one destination, summed over workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DestinationFigures {
    /// Name of the destination.
    pub name: String,
    /// Exchanges that hold a permit.
    pub in_flight: i64,
    /// Exchanges in the queue for a permit.
    pub queued: i64,
    /// Open upstream connections, in use and idle.
    pub open: i64,
    /// Idle upstream connections.
    pub idle: i64,
    /// State of the circuit breaker: 0 closed (also before its first change), 1 half-open, 2 open.
    pub breaker: i64,
    /// Ejected endpoints as of the last change.
    pub ejected: i64,
}

/// See [`Telemetry::connections_at_max_streams`].
pub(super) fn connections_at_max_streams(telemetry: &Telemetry, listener: &str) -> i64 {
    let readings = telemetry.instruments.read();
    let gauge = readings.iter().filter(|reading| reading.family.name == families::LISTENER_AT_MAX_STREAMS.name);
    let is_listener = |labels: &Labels| labels.iter().any(|(_, value)| value == listener);
    gauge
        .flat_map(|reading| &reading.values)
        .filter(|(labels, _)| is_listener(labels))
        .map(|(_, value)| *value as i64)
        .sum()
}

/// See [`Telemetry::destinations`].
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
