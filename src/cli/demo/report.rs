//! Texts from measurements: two single calls as their callers see them, the counts of the failing phase, and the closing table.

use std::time::Duration;

use http::HeaderValue;
use tokio::time::{Instant, sleep, timeout};

use crate::cli::demo::chain::{Chain, ChainNode, HOPS, path_to};
use crate::cli::demo::client::Client;
use crate::cli::demo::counts::ChainCounts;
use crate::cli::demo::load::idempotent_headers;
use crate::cli::demo::phases::{Phase, indent};
use crate::cli::demo::screen::{mean, short};
use crate::cli::demo::service::WATCHED;
use crate::rules::deadline::EXPECTED_RQ_TIMEOUT_MS;
use crate::rules::trace::X_REQUEST_ID;
use crate::telemetry::HopSummary;

/// Deadline of the call that [`deadline`] shows, in milliseconds.
const DEADLINE_MS: u16 = 200;
/// Time limit of a shown call; longer than any call takes.
const CALL_LIMIT: Duration = Duration::from_secs(2);
/// Maximum number of polls for a result that is not there yet.
const POLLS: usize = 20;
/// Time between two polls.
const POLL_PAUSE: Duration = Duration::from_millis(20);
/// Path of the call that [`local_reply`] shows; differs from the paths of the load, so that its log line can be found.
const SHOWN_PATH: &str = "/payments/4712";

/// Places one order with a short deadline and describes the time that each service had left. `None` without a response.
pub(super) async fn deadline(chain: &Chain) -> Option<String> {
    let mut headers = idempotent_headers();
    headers.insert(X_REQUEST_ID, WATCHED);
    headers.insert(EXPECTED_RQ_TIMEOUT_MS, HeaderValue::from(DEADLINE_MS));
    let begun = Instant::now();
    let client = Client::new(chain.order.inbound, chain.order.name);
    let (head, body) = timeout(CALL_LIMIT, client.post(path_to("order"), headers)).await.ok()?.ok()?;
    let took = begun.elapsed();
    let time_left = |node: &ChainNode| {
        let left = node.state.watched_time_left.get().map_or_else(|| "nothing".to_owned(), short);
        format!("{} {left}", node.name)
    };
    let mut text = format!(
        "One deadline for the whole chain. The caller of this order waits at most {DEADLINE_MS}ms and sends
this limit ({EXPECTED_RQ_TIMEOUT_MS}: {DEADLINE_MS}). Time left for each service:
{}. At the deadline the call to the bank
ends, before its own timeout of 1s, so order still has time to answer, here after {}:\n\n    {}\n{}",
        chain.nodes().map(time_left).join(", "),
        short(took),
        head.status,
        indent(&String::from_utf8_lossy(&body)),
    );
    if let Some((node, line)) = poll(|| last_deadline_exceeded(chain)).await {
        text.push_str(&format!("\nThe cause, in the access log of {}'s hopguard:\n\n{}", node.name, indent(&line)));
    }
    Some(text)
}

/// Calls payment through order's hopguard and shows the local reply of the open circuit breaker. `None` if no call gets one.
pub(super) async fn local_reply(chain: &Chain) -> Option<String> {
    let client = Client::new(chain.order.outbound, chain.payment.name);
    for _ in 0..POLLS {
        let (head, body) = timeout(CALL_LIMIT, client.post(SHOWN_PATH, idempotent_headers())).await.ok()?.ok()?;
        let body = String::from_utf8_lossy(&body);
        if !body.contains("circuit_open") || !body.contains("circuitBreaker.") {
            sleep(POLL_PAUSE).await;
            continue;
        }
        let mut text = format!(
            "Every local reply names its cause. The response that order gets from payment's open breaker:\n
    $ curl -i -X POST http://{}{SHOWN_PATH} -H 'host: payment'\n    HTTP/1.1 {}\n",
            chain.order.outbound, head.status
        );
        for (name, value) in &head.headers {
            text.push_str(&format!("    {name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
        }
        text.push_str(&format!("\n{}", indent(&body)));
        let refused = format!("{SHOWN_PATH} 503 circuit_open ");
        if let Some(line) = poll(|| line_with(&chain.order, &refused)).await {
            text.push_str(&format!("\nThe same call in the access log:\n\n{}", indent(&line)));
        }
        return Some(text);
    }
    None
}

/// The node nearest to the bank whose hopguard ended a call at its deadline, and the access log line of that call.
fn last_deadline_exceeded(chain: &Chain) -> Option<(&ChainNode, String)> {
    chain.nodes().into_iter().rev().find_map(|node| Some((node, line_with(node, "deadline_exceeded")?)))
}

/// Polls for an access log line: the line is written right after the response.
async fn poll<T>(line: impl Fn() -> Option<T>) -> Option<T> {
    for _ in 0..POLLS {
        let found = line();
        if found.is_some() {
            return found;
        }
        sleep(POLL_PAUSE).await;
    }
    None
}

fn line_with(node: &ChainNode, text: &str) -> Option<String> {
    node.lines.lock().ok()?.iter().rev().find(|line| line.contains(text)).cloned()
}

/// The counts of the phase in which payment failed. `None` without calls.
pub(super) fn failing(counts: &ChainCounts) -> Option<String> {
    let (orders, payments) = (counts.orders()?, counts.payments()?);
    let good = orders.count.saturating_sub(orders.failures);
    Some(format!(
        "In this phase order called payment {} times. {} attempts, retries included, reached
payment; the circuit breaker refused {} calls. It opened {} times: first after failures in
a row, then after each failed probe. order answered {good} of {} orders successfully.\n",
        payments.count,
        counts.reached,
        counts.refused(),
        counts.opened,
        orders.count,
    ))
}

/// The closing table, one column per phase, and the number of failed orders.
pub(super) fn closing(phases: &[(Phase, ChainCounts)], all: &ChainCounts) -> String {
    let mut text = "Each hop in each phase (mean duration, share of failures):\n\n".to_owned();
    text.push_str(&format!("{:<16}", "hop"));
    for (phase, _) in phases {
        text.push_str(&format!(" {:>14}", phase.title()));
    }
    text.push('\n');
    for (index, hop) in HOPS.iter().enumerate() {
        text.push_str(&format!("{:<16}", hop.title()));
        for (_, counts) in phases {
            let cell = counts.hops[index].as_ref().and_then(cell).unwrap_or_else(|| "no calls".to_owned());
            text.push_str(&format!(" {cell:>14}"));
        }
        text.push('\n');
    }
    if let Some(orders) = all.orders() {
        text.push_str(&format!(
            "\n{} orders were placed in total; {} of them failed.\n",
            orders.count, orders.failures
        ));
    }
    text
}

fn cell(counts: &HopSummary) -> Option<String> {
    let failed = 1.0 - counts.success()?;
    Some(format!("{} {:>4.0}%", short(mean(counts)?), failed * 100.0))
}
