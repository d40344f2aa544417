//! What was measured in the demo, in words: single calls, shown as their callers saw them, and the sums at the end.

use std::time::Duration;

use http::HeaderValue;
use tokio::time::{Instant, sleep, timeout};

use crate::cli::demo::chain::{Chain, Member, PLACES, path_to};
use crate::cli::demo::client::Client;
use crate::cli::demo::load::key;
use crate::cli::demo::reading::Reading;
use crate::cli::demo::screen::{mean, short};
use crate::cli::demo::service::WATCHED;
use crate::cli::demo::story::{Phase, indent};
use crate::rules::deadline::EXPECTED_RQ_TIMEOUT_MS;
use crate::rules::trace::X_REQUEST_ID;
use crate::telemetry::HopSummary;

/// How much time the caller in a hurry has.
const HURRY: u16 = 200;
/// Longer than any call takes.
const LONGEST: Duration = Duration::from_secs(2);
/// How often at most something that is not there yet is asked for again.
const ASKED: usize = 20;
/// How long before it is asked again.
const PAUSE: Duration = Duration::from_millis(20);
/// The payment that is shown: not one of the load's, so that no line of theirs is taken for its own.
const SHOWN: &str = "/payments/4712";

/// Places one order with little time, and tells how the time shrank on its way. Nothing if there was no answer.
pub(super) async fn hurry(chain: &Chain) -> Option<String> {
    let mut fields = key();
    fields.insert(X_REQUEST_ID, WATCHED);
    fields.insert(EXPECTED_RQ_TIMEOUT_MS, HeaderValue::from(HURRY));
    let begun = Instant::now();
    let client = Client::new(chain.order.door, chain.order.name);
    let (head, body) = timeout(LONGEST, client.post(path_to("order"), fields)).await.ok()?.ok()?;
    let took = begun.elapsed();
    let told = |member: &Member| {
        let left = member.state.told.get().map_or_else(|| "nothing".to_owned(), short);
        format!("{} {left}", member.name)
    };
    let mut text = format!(
        "One budget for the whole chain. The caller of this order waits no longer than {HURRY}ms, and
says so ({EXPECTED_RQ_TIMEOUT_MS}: {HURRY}). What each service was told is left:
{}. When that is over the call to the bank ends,
not after the 1s of its own timeout, and order has time to answer, here after {}:\n\n    {}\n{}",
        chain.members().map(told).join(", "),
        short(took),
        head.status,
        indent(&String::from_utf8_lossy(&body)),
    );
    if let Some((member, line)) = written(|| last_deadline(chain)).await {
        text.push_str(&format!("\nand why, in the access log of {}'s hopguard:\n\n{}", member.name, indent(&line)));
    }
    Some(text)
}

/// The answer that order gets in payment's place while the breaker is open. Nothing if it does not get one.
pub(super) async fn refusal(chain: &Chain) -> Option<String> {
    let client = Client::new(chain.order.out, chain.payment.name);
    for _ in 0..ASKED {
        let (head, body) = timeout(LONGEST, client.post(SHOWN, key())).await.ok()?.ok()?;
        let body = String::from_utf8_lossy(&body);
        if !body.contains("circuit_open") || !body.contains("circuitBreaker.") {
            sleep(PAUSE).await;
            continue;
        }
        let mut text = format!(
            "Every refusal explains itself. This is what order gets now when it calls payment:\n
    $ curl -i -X POST http://{}{SHOWN} -H 'host: payment'\n    HTTP/1.1 {}\n",
            chain.order.out, head.status
        );
        for (name, value) in &head.headers {
            text.push_str(&format!("    {name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
        }
        text.push_str(&format!("\n{}", indent(&body)));
        let refused = format!("{SHOWN} 503 circuit_open ");
        if let Some(line) = written(|| line_with(&chain.order, &refused)).await {
            text.push_str(&format!("\nand as one line of the access log:\n\n{}", indent(&line)));
        }
        return Some(text);
    }
    None
}

/// The hopguard nearest to the end of the chain that ended a call because of its deadline, and the line that says so.
fn last_deadline(chain: &Chain) -> Option<(&Member, String)> {
    chain.members().into_iter().rev().find_map(|member| Some((member, line_with(member, "deadline_exceeded")?)))
}

/// What an access log says of a call, as soon as it says it: a line is written right after the answer.
async fn written<T>(line: impl Fn() -> Option<T>) -> Option<T> {
    for _ in 0..ASKED {
        let found = line();
        if found.is_some() {
            return found;
        }
        sleep(PAUSE).await;
    }
    None
}

fn line_with(member: &Member, what: &str) -> Option<String> {
    member.lines.lock().ok()?.iter().rev().find(|line| line.contains(what)).cloned()
}

/// What became of the calls while payment failed.
pub(super) fn failing(seen: &Reading) -> Option<String> {
    let (orders, payments) = (seen.orders()?, seen.payments()?);
    let good = orders.count.saturating_sub(orders.failures);
    Some(format!(
        "In this time order called payment {} times. {} of these calls, tries included, reached
payment itself; the breaker answered {} in its place. It opened {} times: at first, and
again after each probe that failed. order gave {good} good answers to {} orders.\n",
        payments.count,
        seen.reached,
        seen.refused(),
        seen.opened,
        orders.count,
    ))
}

/// How the phases compare, and how the orders ended.
pub(super) fn closing(phases: &[(Phase, Reading)], all: &Reading) -> String {
    let mut text = "What the hops counted, phase by phase (mean, share of failures):\n\n".to_owned();
    text.push_str(&format!("{:<16}", "hop"));
    for (phase, _) in phases {
        text.push_str(&format!(" {:>14}", phase.title()));
    }
    text.push('\n');
    for (index, place) in PLACES.iter().enumerate() {
        text.push_str(&format!("{:<16}", place.hop()));
        for (_, seen) in phases {
            let cell = seen.hops[index].as_ref().and_then(cell).unwrap_or_else(|| "no calls".to_owned());
            text.push_str(&format!(" {cell:>14}"));
        }
        text.push('\n');
    }
    if let Some(orders) = all.orders() {
        text.push_str(&format!(
            "\n{} orders were placed in all, and {} of them got no good answer.\n",
            orders.count, orders.failures
        ));
    }
    text
}

fn cell(seen: &HopSummary) -> Option<String> {
    let failed = 1.0 - seen.success()?;
    Some(format!("{} {:>4.0}%", short(mean(seen)?), failed * 100.0))
}
