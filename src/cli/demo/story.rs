//! What happens in the demo, and the words for it.

use std::time::Duration;

use crate::cli::demo::chain::{Chain, Member};
use crate::rules::duration;

/// How much longer the bank's work takes while it is slow.
const SLOWER: Duration = Duration::from_millis(250);

/// One part of the story.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Business as usual.
    Well,
    /// The bank takes its time.
    Slow,
    /// Payment fails.
    Failing,
    /// Business as usual again.
    Recovered,
}

impl Phase {
    /// In the order in which they happen.
    pub(super) const ALL: [Self; 4] = [Self::Well, Self::Slow, Self::Failing, Self::Recovered];

    /// How long it lasts in a demo of the given duration.
    pub(super) fn lasts(self, whole: Duration) -> Duration {
        match self {
            Self::Well => whole.mul_f64(0.2),
            Self::Slow | Self::Failing => whole.mul_f64(0.25),
            Self::Recovered => whole.mul_f64(0.3),
        }
    }

    /// Makes the services as they are in it.
    pub(super) fn set(self, chain: &Chain) {
        chain.bank.state.slower.set(if self == Self::Slow { SLOWER } else { Duration::ZERO });
        chain.payment.state.fails.set(self == Self::Failing);
    }

    /// As the head of a column.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Well => "well",
            Self::Slow => "bank slow",
            Self::Failing => "payment fails",
            Self::Recovered => "recovered",
        }
    }

    /// What happens, in words.
    pub(super) fn words(self) -> String {
        match self {
            Self::Well => "All is well. Every order goes caller -> order -> payment -> bank, through the hopguards
beside these services. The services have no timeouts, no retries and no breakers."
                .to_owned(),
            Self::Slow => format!(
                "The bank turns slow: its work now takes {} longer. Where the time of an order goes is
seen in the table: it is lost in the last hop, the first two only wait for it.",
                duration::format(SLOWER),
            ),
            Self::Failing => "payment fails: it answers every call with 503. order's hopguard tries such calls again,
within the retry budget, until its circuit breaker opens; from then on it answers in
payment's place, at once. order takes orders all the same: \"payment pending\"."
                .to_owned(),
            Self::Recovered => "payment is well again. Nobody has to reset anything: the breaker lets a call through
from time to time, and closes when one goes well."
                .to_owned(),
        }
    }
}

/// What a newcomer has to know before it begins.
pub(super) fn opening(chain: &Chain, lasts: Duration, rate: u32) -> String {
    let mut text = format!(
        "hopguard demo: order -> payment -> bank, each with its own hopguard, all in this
process, {rate} orders a second for {}. Ctrl-C ends it at once.\n\n",
        duration::format(lasts),
    );
    for Member { name, admin, .. } in chain.members() {
        text.push_str(&format!("{name:<8} status page http://{admin}/  metrics http://{admin}/metrics\n"));
    }
    text.push_str(&format!(
        "\nThe policy of order's hopguard, the whole of it (order.yaml). Retries, circuit breaker
and deadlines are on without a word:\n\n{}
The table has one line per hop, with the tries at all that lies behind it. The mean is
exact. p50, p95 and p99 are estimates from the buckets of /metrics. own p50 is what
hopguard itself adds to a call.\n",
        indent(&chain.order.policy)
    ));
    text
}

/// Set off from the text around it.
pub(super) fn indent(text: &str) -> String {
    text.lines().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("    {line}\n") }).collect()
}
