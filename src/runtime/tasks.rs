//! Tasks of one thread: they stay on the thread that spawned them and need not be `Send`.

use tokio::task::JoinHandle;

/// Spawns a task on the current thread. Dropping the handle detaches the task.
pub fn spawn<F>(task: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    tokio::task::spawn_local(task)
}
