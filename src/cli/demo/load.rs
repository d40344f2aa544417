//! The callers of the demo: so many orders a second, whether or not the earlier ones have been answered.

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

/// Orders that may be under way at the same time; more are not placed.
const UNDER_WAY: usize = 1024;

/// Callers that place orders until this is dropped.
pub(super) struct Load(JoinHandle<()>);

impl Load {
    /// Begins to place `rate` orders a second with the service `order` behind `door`.
    pub(super) fn start(door: SocketAddr, rate: u32) -> Self {
        let client = Rc::new(Client::new(door, "order"));
        let places = Arc::new(Semaphore::new(UNDER_WAY));
        let mut clock = interval(Duration::from_secs(1) / rate.max(1));
        Self(tasks::spawn(async move {
            loop {
                clock.tick().await;
                let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
                let client = Rc::clone(&client);
                tasks::spawn(async move {
                    // How it went is for the hopguards to tell.
                    let _answer = client.post(path_to("order"), key()).await;
                    drop(place);
                });
            }
        }))
    }
}

/// The fields of an order that may be placed again without harm.
pub(super) fn key() -> HeaderMap {
    HeaderMap::from_iter([(IDEMPOTENCY_KEY, HeaderValue::from(fastrand::u64(..)))])
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.abort();
    }
}
