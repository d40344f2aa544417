//! Tasks of one worker: they stay on their thread and need not be `Send`.

use tokio::task::JoinHandle;

/// Starts a task on this worker.
pub fn spawn<F>(task: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    tokio::task::spawn_local(task)
}
