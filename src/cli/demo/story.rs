//! What happens in the demo, and the words for it.

use std::time::Duration;

use bytes::Bytes;
use http::response::Parts;

use crate::cli::demo::chain::{Chain, Hop, Reading};
use crate::cli::demo::screen::{mean, short};
use crate::telemetry::{HopSummary, Outcome};

/// How much longer payment's work takes while it is slow.
pub(super) const SLOWER: Duration = Duration::from_millis(1200);

/// One part of the story.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Business as usual.
    Well,
    /// Payment takes its time.
    Slow,
    /// Business as usual again.
    Recovered,
}

impl Phase {
    /// In the order in which they happen.
    pub(super) const ALL: [Self; 3] = [Self::Well, Self::Slow, Self::Recovered];

    /// How long it lasts in a demo of the given duration.
    pub(super) fn lasts(self, whole: Duration) -> Duration {
        match self {
            Self::Well | Self::Recovered => whole.mul_f64(0.3),
            Self::Slow => whole.mul_f64(0.4),
        }
    }

    /// How much longer payment's work takes in it.
    pub(super) fn slower(self) -> Duration {
        match self {
            Self::Well | Self::Recovered => Duration::ZERO,
            Self::Slow => SLOWER,
        }
    }

    /// As the head of a column.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Well => "well",
            Self::Slow => "slow",
            Self::Recovered => "recovered",
        }
    }

    /// What happens, in words.
    pub(super) fn words(self, payment: &Hop) -> String {
        match self {
            Self::Well => "All is well. Every order goes caller -> order -> payment -> bank, and each of these
calls passes the hopguard in front of the service. The services have no timeouts."
                .to_owned(),
            Self::Slow => format!(
                "payment turns slow: its own work now takes 1.2s. timeouts.request 300ms ({})
makes its hopguard answer with 504 after 300ms, so an order fails fast and does not
hang. The bank hears nothing: payment is cut off before it gets there.",
                payment.timeout_line(),
            ),
            Self::Recovered => "payment has recovered: its work takes a few milliseconds again, and so does an order.
Nobody had to reset anything."
                .to_owned(),
        }
    }
}

/// What a newcomer has to know before it begins.
pub(super) fn opening(chain: &Chain, duration: Duration, rate: u32) -> String {
    let mut text = format!(
        "hopguard demo: order -> payment -> bank, each behind its own hopguard, all in this
process, {rate} orders a second for {}. Ctrl-C ends it at once.\n\n",
        crate::rules::duration::format(duration),
    );
    for hop in &chain.hops {
        let Hop { service, admin, .. } = hop;
        text.push_str(&format!("{service:<8} status page http://{admin}/  metrics http://{admin}/metrics\n"));
    }
    if let Some(payment) = payment(chain) {
        text.push_str(&format!("\npayment's policy, the whole of it (payment.yaml):\n\n{}\n", indent(&payment.policy)));
    }
    text.push_str(
        "The table has one line per hop, as the hopguard in front of the service counts it. The
mean is exact. p50, p95 and p99 are estimates from the buckets of /metrics: a call of
301ms lies between 200ms and 500ms, and the p99 of many such calls reads 497ms. own p50
is what hopguard itself adds to a call.\n",
    );
    text
}

/// The answer that payment's hopguard gave in payment's place, as the caller got it, and the line of its log.
pub(super) fn refusal(payment: &Hop, head: &Parts, body: &Bytes) -> String {
    let mut text = "Every refusal explains itself. One of them, as a caller sees it:\n\n".to_owned();
    text.push_str(&format!(
        "    $ curl -i -X POST http://{}/payments/4711\n    HTTP/1.1 {}\n",
        payment.door, head.status
    ));
    for (name, value) in &head.headers {
        text.push_str(&format!("    {name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
    }
    text.push_str(&format!("\n{}", indent(&String::from_utf8_lossy(body))));
    let line = payment.lines.lock().ok().and_then(|lines| lines.last().cloned());
    if let Some(line) = line {
        text.push_str(&format!("\nand as one line of the access log:\n\n{}", indent(&line)));
    }
    text
}

/// What was counted in each phase, and how the calls to payment ended.
pub(super) fn closing(chain: &Chain, phases: &[(Phase, Reading)]) -> String {
    let mut text = "What the hops counted, phase by phase (mean, p99, share of failures):\n\n".to_owned();
    text.push_str(&format!("{:<16}", "hop"));
    for (phase, _) in phases {
        text.push_str(&format!(" {:>20}", phase.title()));
    }
    text.push('\n');
    for (index, hop) in chain.hops.iter().enumerate() {
        text.push_str(&format!("{:<16}", hop.name));
        for (_, seen) in phases {
            let cell = seen.get(index).and_then(Option::as_ref).and_then(cell).unwrap_or_else(|| "no calls".to_owned());
            text.push_str(&format!(" {cell:>20}"));
        }
        text.push('\n');
    }
    let slow = phases.iter().find(|(phase, _)| *phase == Phase::Slow);
    if let Some(seen) = slow.and_then(|(_, seen)| seen.get(1)).and_then(Option::as_ref) {
        let late = seen.outcomes.get(&Outcome::RequestTimeout).copied().unwrap_or(0);
        text.push_str(&format!(
            "\nWhile payment was slow, {late} of {} calls to it ended as request_timeout, after {} on
average; without hopguard each would have taken more than 1.2s.\n",
            seen.count,
            mean(seen).map_or_else(|| "-".to_owned(), short),
        ));
    }
    text
}

fn cell(seen: &HopSummary) -> Option<String> {
    let failed = 1.0 - seen.success()?;
    Some(format!("{} {} {:>4.0}%", short(mean(seen)?), short(seen.quantile(0.99)?), failed * 100.0))
}

/// The second hop, about which the story is.
pub(super) fn payment(chain: &Chain) -> Option<&Hop> {
    chain.hops.iter().find(|hop| hop.service == "payment")
}

fn indent(text: &str) -> String {
    text.lines().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("    {line}\n") }).collect()
}
