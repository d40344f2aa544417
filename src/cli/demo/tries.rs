//! The last chapter of the demo: how many tries one order costs a bank that is down, with `retryInOnePlace` and without.

use std::io;
use std::time::Duration;

use tokio::time::timeout;

use crate::cli::demo::chain::{Chain, path_to};
use crate::cli::demo::client::Client;
use crate::cli::demo::load::key;

/// Longer than any of the calls takes.
const LONGEST: Duration = Duration::from_secs(5);

/// Tells it, with a chain of its own for each of the two.
pub(super) async fn tell() -> io::Result<String> {
    let enforced = Box::pin(at_the_bank("enforce")).await.map_err(io::Error::other)?;
    let off = Box::pin(at_the_bank("off")).await.map_err(io::Error::other)?;
    Ok(format!(
        "Retry in one place. Now the bank is down, and one order is placed. Both order's and
payment's hopguard try a failed call up to three times. Tries that the bank itself counted:

    rules: {{ retryInOnePlace: enforce }}   {enforced:>2}   payment's hopguard has tried, and says so
    rules: {{ retryInOnePlace: off }}       {off:>2}   each of order's tries becomes three of payment's

Breakers are off for these two orders, else they would have ended the second sooner.\n"
    ))
}

/// Places one order while the bank fails, and lets the bank count.
async fn at_the_bank(mode: &str) -> anyhow::Result<u64> {
    let chain = Chain::start(&format!("rules: {{ circuitBreaker: off, retryInOnePlace: {mode} }}\n")).await?;
    chain.bank.state.fails.set(true);
    let client = Client::new(chain.order.door, chain.order.name);
    // Order takes it whatever the bank says; only the tries are of interest.
    let _answer = timeout(LONGEST, client.post(path_to(chain.order.name), key())).await;
    let tries = chain.bank.state.calls.get();
    chain.stop().await;
    Ok(tries)
}
