//! One OS thread with a single-threaded runtime: a worker, or the control thread.

use std::io;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, LocalOptions};

use crate::runtime::wake_batching;

/// Starts a thread called `name` that runs `main` to its end; tasks still running then are dropped.
///
/// `on_batch` is called each time the thread delays its next poll: see [`wake_batching`].
///
/// # Errors
/// If the system cannot start a thread. A runtime that cannot be built ends the thread with that error.
pub fn spawn<M, F>(
    name: &str,
    on_batch: impl Fn() + Send + Sync + 'static,
    main: M,
) -> io::Result<JoinHandle<io::Result<()>>>
where
    M: FnOnce() -> F + Send + 'static,
    F: Future<Output = ()>,
{
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let mut runtime = Builder::new_current_thread();
        wake_batching::install(&mut runtime, on_batch);
        let runtime = runtime.enable_all().build_local(LocalOptions::default())?;
        runtime.block_on(main());
        Ok(())
    })
}
