//! Steady load over connections that are kept, and a note of every call that failed.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::Request;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::SOON;
use super::http::{Answer, Caller, Speaks, empty};

/// Callers that ask again and again.
pub(crate) struct Load {
    seen: Arc<Seen>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    good: AtomicUsize,
    failures: Mutex<Vec<Failure>>,
    cut: AtomicUsize,
}

/// A call that was not answered with 200.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) begun: Instant,
    pub(crate) at: Instant,
    pub(crate) what: String,
}

/// What became of the calls.
pub(crate) struct Report {
    pub(crate) good: usize,
    pub(crate) failures: Vec<Failure>,
    /// Connections that broke under their caller.
    pub(crate) cut: usize,
}

impl Load {
    pub(crate) fn none() -> Self {
        Self { seen: Arc::default(), tasks: Vec::new() }
    }

    /// Adds callers, each with a connection of its own, that pause between two calls.
    pub(crate) fn add(mut self, to: SocketAddr, speaks: Speaks, callers: usize, pause: Duration) -> Self {
        for _ in 0..callers {
            self.tasks.push(tokio::spawn(ask_again(to, speaks, pause, Arc::clone(&self.seen))));
        }
        self
    }

    /// Calls that were answered with 200 so far.
    pub(crate) fn good(&self) -> usize {
        self.seen.good.load(SeqCst)
    }

    /// Ends it; every call that has begun is waited for.
    pub(crate) async fn end(self) -> Report {
        self.seen.stop.store(true, SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
        let failures = std::mem::take(&mut *self.seen.failures.lock().unwrap());
        Report { good: self.seen.good.load(SeqCst), failures, cut: self.seen.cut.load(SeqCst) }
    }
}

async fn ask_again(to: SocketAddr, speaks: Speaks, pause: Duration, seen: Arc<Seen>) {
    let mut caller = Caller::open(speaks, to).await;
    while !seen.stop.load(SeqCst) {
        let begun = Instant::now();
        let asked = Request::get("/load").body(empty()).unwrap();
        let call = async { Answer::read(caller.send(asked).await?).await };
        let what = match timeout(SOON, call).await {
            Ok(Ok(answer)) if answer.status == 200 => {
                seen.good.fetch_add(1, SeqCst);
                sleep(pause).await;
                continue;
            }
            Ok(Ok(answer)) => format!("{} {}", answer.status, String::from_utf8_lossy(&answer.body)),
            Ok(Err(error)) => {
                seen.cut.fetch_add(1, SeqCst);
                caller = Caller::open(speaks, to).await;
                format!("{error:?}")
            }
            Err(_) => "no answer".to_owned(),
        };
        seen.failures.lock().unwrap().push(Failure { begun, at: Instant::now(), what });
        sleep(pause).await;
    }
}
