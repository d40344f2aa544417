//! Level 0: threads, tasks, timers, drain and signals. Knows nothing of what runs on them.
//!
//! `thread` starts a thread with a single-threaded runtime, `tasks` spawns on it, `timer` lends timers that are reused,
//! `waker` and `wake_batching` save wake-ups within a poll and between polls, `drain` counts connections down at shutdown,
//! `signals` receives SIGTERM, SIGINT and SIGHUP. Tasks never move to another thread, so nothing on the data path is locked
//! or sent between threads.

pub mod drain;
pub mod signals;
pub mod tasks;
pub mod thread;
pub mod timer;
pub mod wake_batching;
pub mod waker;
