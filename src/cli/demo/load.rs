//! The load of the demo: a fixed number of orders per second, whether or not earlier orders have been answered (open loop).

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::interval;

use crate::cli::demo::chain::path_to;
use crate::cli::demo::client::Client;
use crate::cli::demo::service::IDEMPOTENCY_KEY;
use crate::runtime::tasks;

/// Maximum number of orders in flight; further orders are skipped.
const MAX_IN_FLIGHT: usize = 1024;

/// A task that places orders until this is dropped.
pub(super) struct Load(JoinHandle<()>);

impl Load {
    /// Starts placing `rate` orders per second through the inbound listener of order's hopguard.
    pub(super) fn start(listener: SocketAddr, rate: u32) -> Self {
        let client = Rc::new(Client::new(listener, "order"));
        let permits = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
        let mut clock = interval(Duration::from_secs(1) / rate.max(1));
        Self(tasks::spawn(async move {
            loop {
                clock.tick().await;
                let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else { continue };
                let client = Rc::clone(&client);
                tasks::spawn(async move {
                    // The hopguards count the result.
                    let _response = client.post(path_to("order"), idempotent_headers()).await;
                    drop(permit);
                });
            }
        }))
    }
}

/// Header fields of an order that is safe to repeat: a new idempotency key.
pub(super) fn idempotent_headers() -> HeaderMap {
    HeaderMap::from_iter([(IDEMPOTENCY_KEY, HeaderValue::from(fastrand::u64(..)))])
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.abort();
    }
}
