//! The last part of the demo: how many attempts one order causes at a failing bank, with and without `retryInOnePlace`.

use std::io;
use std::time::Duration;

use tokio::time::timeout;

use crate::cli::demo::chain::{Chain, path_to};
use crate::cli::demo::client::Client;
use crate::cli::demo::load::idempotent_headers;

/// Time limit of a call; longer than any call takes.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// Compares the two modes, each with its own chain, and returns the text.
///
/// # Errors
/// If a chain cannot be started.
pub(super) async fn compare_modes() -> io::Result<String> {
    let enforced = Box::pin(attempts_at_bank("enforce")).await.map_err(io::Error::other)?;
    let off = Box::pin(attempts_at_bank("off")).await.map_err(io::Error::other)?;
    Ok(format!(
        "Retry in one place. The bank now fails, and one order is placed. order's and payment's
hopguard each make up to three attempts of a failed call. Attempts counted by the bank:

    rules: {{ retryInOnePlace: enforce }}   {enforced:>2}   only payment's hopguard retries
    rules: {{ retryInOnePlace: off }}       {off:>2}   three attempts of payment for each attempt of order

The circuit breakers are off for these two orders; they would end the second one earlier.\n"
    ))
}

/// Places one order while the bank fails, and returns the number of attempts that the bank counted.
async fn attempts_at_bank(mode: &str) -> anyhow::Result<u64> {
    let chain = Chain::start(&format!("rules: {{ circuitBreaker: off, retryInOnePlace: {mode} }}\n")).await?;
    chain.bank.state.fails.set(true);
    let client = Client::new(chain.order.inbound, chain.order.name);
    // order accepts the order in either case; only the number of attempts matters.
    let _response = timeout(CALL_LIMIT, client.post(path_to(chain.order.name), idempotent_headers())).await;
    let attempts = chain.bank.state.calls.get();
    chain.stop().await;
    Ok(attempts)
}
