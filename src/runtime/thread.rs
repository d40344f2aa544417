//! One OS thread with a single-threaded runtime.

use std::io;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, LocalOptions};

use crate::runtime::wake_batching;

/// Starts a thread called `name` that runs `main` to its end; tasks that are left then are dropped.
/// `napped` is called for each nap that the thread takes to [coalesce its wakes](coalescing).
///
/// Fails if the system gives no thread. A runtime that cannot be built ends the thread with that error.
pub fn spawn<M, F>(
    name: &str,
    napped: impl Fn() + Send + Sync + 'static,
    main: M,
) -> io::Result<JoinHandle<io::Result<()>>>
where
    M: FnOnce() -> F + Send + 'static,
    F: Future<Output = ()>,
{
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let mut runtime = Builder::new_current_thread();
        wake_batching::install(&mut runtime, napped);
        let runtime = runtime.enable_all().build_local(LocalOptions::default())?;
        runtime.block_on(main());
        Ok(())
    })
}
