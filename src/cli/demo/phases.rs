//! The phases of the demo and their texts.

use std::time::Duration;

use crate::cli::demo::chain::{Chain, ChainNode};
use crate::rules::duration;

/// Delay added to the bank's work in the phase [`Phase::Slow`].
const ADDED_DELAY: Duration = Duration::from_millis(250);

/// One phase of the demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// All services work.
    Healthy,
    /// The bank is slow.
    Slow,
    /// Payment answers every call with 503.
    Failing,
    /// All services work again.
    Recovered,
}

impl Phase {
    /// All phases in their order.
    pub(super) const ALL: [Self; 4] = [Self::Healthy, Self::Slow, Self::Failing, Self::Recovered];

    /// Duration of the phase in a demo of the duration `whole`.
    pub(super) fn duration(self, whole: Duration) -> Duration {
        match self {
            Self::Healthy => whole.mul_f64(0.2),
            Self::Slow | Self::Failing => whole.mul_f64(0.25),
            Self::Recovered => whole.mul_f64(0.3),
        }
    }

    /// Sets the switches of the services for this phase.
    pub(super) fn apply(self, chain: &Chain) {
        chain.bank.state.added_delay.set(if self == Self::Slow { ADDED_DELAY } else { Duration::ZERO });
        chain.payment.state.fails.set(self == Self::Failing);
    }

    /// Column title of the closing table.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Slow => "bank slow",
            Self::Failing => "payment fails",
            Self::Recovered => "recovered",
        }
    }

    /// Description of the phase.
    pub(super) fn description(self) -> String {
        match self {
            Self::Healthy => "All services are healthy. Every order goes caller -> order -> payment -> bank, through
the hopguards beside these services. The services have no timeouts, no retries and no
circuit breakers."
                .to_owned(),
            Self::Slow => format!(
                "The bank becomes slow: its work now takes {} longer. The table shows where an order
spends its time: in the last hop; the first two hops only wait for the last one.",
                duration::format(ADDED_DELAY),
            ),
            Self::Failing => "payment fails: it answers every call with 503. order's hopguard retries such calls
within the retry budget, until its circuit breaker opens; from then on hopguard refuses
calls to payment at once. order still accepts orders: \"payment pending\"."
                .to_owned(),
            Self::Recovered => "payment has recovered. No reset is needed: the circuit breaker lets single calls
through as probes, and closes when a probe succeeds."
                .to_owned(),
        }
    }
}

/// The text before the first phase: addresses, policy, and how to read the table.
pub(super) fn introduction(chain: &Chain, whole: Duration, rate: u32) -> String {
    let mut text = format!(
        "hopguard demo: order -> payment -> bank, each with its own hopguard, all in this
process, {rate} orders per second for {}. Ctrl-C stops the demo.\n\n",
        duration::format(whole),
    );
    for ChainNode { name, admin, .. } in chain.nodes() {
        text.push_str(&format!("{name:<8} status page http://{admin}/  metrics http://{admin}/metrics\n"));
    }
    text.push_str(&format!(
        "\nThe complete policy of order's hopguard (order.yaml). Retries, circuit breaker and
deadlines are on by default:\n\n{}
The table has one line per hop. A hop includes its retries and all hops behind it. The
mean is exact; p50, p95 and p99 are estimates from the buckets of /metrics. own p50 is
the latency that hopguard itself adds to a call.\n",
        indent(&chain.order.policy)
    ));
    text
}

/// Indents every line by four spaces.
pub(super) fn indent(text: &str) -> String {
    text.lines().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("    {line}\n") }).collect()
}
