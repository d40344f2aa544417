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

/// Runs hyper's HTTP/2 tasks on this worker.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalExecutor;

impl<F> hyper::rt::Executor<F> for LocalExecutor
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, task: F) {
        spawn(task);
    }
}
