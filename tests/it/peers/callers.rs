//! Callers that send requests with identities at the same moments, and the fate of each request.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::{Method, Request};
use tokio::sync::Barrier;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::peers::real_server::RealServer;
use crate::support::http::{Answer, Caller, Speaks, empty, full};
use crate::support::{SOON, eventually};

/// The longest time for all rounds: a server that stops makes callers wait for seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// What became of one request.
#[derive(Debug, Clone)]
pub(crate) struct Fate {
    pub(crate) method: Method,
    pub(crate) identity: String,
    /// The status, or 0 if there was no response.
    pub(crate) status: u16,
    /// `Proxy-Status` of a local reply, or the error of the connection.
    pub(crate) details: String,
}

impl Fate {
    /// Whether hopguard declares that the app has not received the request.
    pub(crate) fn unsent(&self) -> bool {
        self.details.contains("hopguard-unsent")
    }

    /// Whether the caller has to treat the request as lost: no response of the app, and no declaration.
    pub(crate) fn lost(&self) -> bool {
        self.status != 200 && !self.unsent()
    }
}

/// Callers with a connection each, in rounds: all callers of a round send at the same time.
pub(crate) struct Callers {
    seen: Arc<Seen>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    rounds: AtomicUsize,
    fates: Mutex<Vec<Fate>>,
}

impl Callers {
    /// Starts one caller for each method.
    pub(crate) fn start(to: SocketAddr, path: &'static str, methods: &[Method], pause: Duration) -> Self {
        let (seen, barrier) = (Arc::<Seen>::default(), Arc::new(Barrier::new(methods.len())));
        let call = |(number, method): (usize, &Method)| {
            let caller = OneOf { to, path, method: method.clone(), number, pause };
            tokio::spawn(caller.run(Arc::clone(&barrier), Arc::clone(&seen)))
        };
        Self { tasks: methods.iter().enumerate().map(call).collect(), seen }
    }

    /// Waits until so many rounds are complete.
    pub(crate) async fn rounds(&self, count: usize) {
        let complete = async {
            while self.seen.rounds.load(SeqCst) < count {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(PATIENCE, complete).await.expect("the rounds do not end");
    }

    /// Waits until so many requests of this method have found the app gone.
    pub(crate) async fn refused(&self, method: &Method, count: usize) {
        let refused = |fate: &&Fate| fate.method == *method && fate.unsent();
        eventually(|| (self.seen.fates.lock().unwrap().iter().filter(refused).count() >= count).then_some(())).await;
    }

    /// Ends the callers after the present round.
    pub(crate) async fn end(self) -> Vec<Fate> {
        self.seen.stop.store(true, SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
        std::mem::take(&mut *self.seen.fates.lock().unwrap())
    }
}

struct OneOf {
    to: SocketAddr,
    path: &'static str,
    method: Method,
    number: usize,
    pause: Duration,
}

impl OneOf {
    async fn run(self, barrier: Arc<Barrier>, seen: Arc<Seen>) {
        let mut caller = None;
        for round in 0.. {
            // The first of a round decides for all, so that none waits for callers that have left.
            if barrier.wait().await.is_leader() {
                seen.rounds.store(round, SeqCst);
            }
            let stop = seen.stop.load(SeqCst);
            barrier.wait().await;
            if stop {
                return;
            }
            let fate = ask(&mut caller, self.to, self.path, &self.method, format!("{}.{round}", self.number)).await;
            seen.fates.lock().unwrap().push(fate);
            sleep(self.pause).await;
        }
    }
}

fn is_open(caller: &Caller) -> bool {
    match caller {
        Caller::Http1(connection) => !connection.0.is_closed(),
        Caller::Http2(sender) => !sender.is_closed(),
    }
}

/// One request over the caller's connection, or over a new one if there is none or it has ended.
pub(crate) async fn ask(
    caller: &mut Option<Caller>,
    to: SocketAddr,
    path: &str,
    method: &Method,
    identity: String,
) -> Fate {
    let body = if *method == Method::POST { full("hello") } else { empty() };
    let request = Request::builder().method(method).uri(path).header("x-id", &identity).body(body).unwrap();
    let mut open = match caller.take() {
        Some(open) if is_open(&open) => open,
        _ => Caller::open(Speaks::Http1, to).await,
    };
    let call = async { Answer::read(open.send(request).await?).await };
    let (status, details) = match timeout(SOON, call).await.expect("no answer") {
        Ok(answer) => {
            if answer.header("connection") != "close" {
                *caller = Some(open);
            }
            (answer.status.as_u16(), answer.header("proxy-status").to_owned())
        }
        Err(error) => (0, error.to_string()),
    };
    Fate { method: method.clone(), identity, status, details }
}

/// Each request with a response was executed once, and each request that was declared unsent was not executed.
pub(crate) fn agree(fates: &[Fate], server: &RealServer) {
    let executed = server.executed();
    for fate in fates {
        let count = executed.get(&fate.identity).copied().unwrap_or(0);
        assert!(fate.status != 200 || count == 1, "executed {count} times: {fate:?}");
        assert!(!fate.unsent() || count == 0, "executed, but declared unsent: {fate:?}");
        assert!(count < 2, "executed twice: {fate:?}");
    }
}
