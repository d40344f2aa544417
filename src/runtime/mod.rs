//! Level 0: threads, tasks, timers, drain and signals. Knows nothing of what runs on them.
//!
//! Every worker is one thread with a single-threaded runtime of its own: tasks never move, so nothing on the
//! data path is locked or sent between threads.

pub mod drain;
pub mod signals;
pub mod tasks;
pub mod thread;
pub mod timer;
pub mod wake_batching;
pub mod waker;
