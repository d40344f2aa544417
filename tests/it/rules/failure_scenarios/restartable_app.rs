//! An app that writes raw bytes: a test can restart it like a deployment does, and can make it close a connection at the moment
//! a request arrives.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use super::service_chain::PAY;
use crate::support::SOON;
use crate::support::upstream::Upstream;

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";

/// What an instance needs for an answer.
const WORK: Duration = Duration::from_millis(5);

/// How long one that leaves looks for requests that met its close.
const RACE: Duration = Duration::from_millis(100);

/// The next request over a connection, to the end of its body; `None` if the connection ends.
async fn next(stream: &mut TcpStream, seen: &mut Vec<u8>) -> Option<String> {
    loop {
        let text = String::from_utf8_lossy(seen).into_owned();
        if text.contains("\r\n\r\n") && (text.starts_with("GET") || text.ends_with(PAY)) {
            seen.clear();
            return Some(text);
        }
        if stream.read_buf(seen).await.ok()? == 0 {
            return None;
        }
    }
}

/// Closes a connection that has been idle for so long without an answer to the request that has just come over it.
/// Counts these races.
pub(super) async fn racing(idle: Duration) -> (Upstream, Arc<AtomicUsize>) {
    let races = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&races);
    let upstream = Upstream::bytes(move |mut stream| {
        let races = Arc::clone(&counted);
        async move {
            let mut answered: Option<Instant> = None;
            while next(&mut stream, &mut Vec::new()).await.is_some() {
                if answered.is_some_and(|at| at.elapsed() >= idle) {
                    races.fetch_add(1, SeqCst);
                    return;
                }
                if stream.write_all(ANSWER).await.is_err() {
                    return;
                }
                answered = Some(Instant::now());
            }
        }
    });
    (upstream.await, races)
}

/// A running instance.
pub(super) struct Instance {
    pub(super) addr: SocketAddr,
    lost_posts: Arc<AtomicUsize>,
    leave: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Instance {
    pub(super) async fn start(addr: SocketAddr) -> Self {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (lost_posts, leave) = (Arc::<AtomicUsize>::default(), watch::Sender::new(false));
        let task = tokio::spawn(run(listener, leave.subscribe(), Arc::clone(&lost_posts)));
        Self { addr, lost_posts, leave, task }
    }

    /// Accepts no more, closes idle connections, finishes what it has, and ends. Returns how many POSTs met the close.
    pub(super) async fn end(self) -> usize {
        self.leave.send_replace(true);
        timeout(SOON, self.task).await.expect("it does not end").unwrap();
        self.lost_posts.load(SeqCst)
    }
}

async fn run(listener: TcpListener, mut leave: watch::Receiver<bool>, lost_posts: Arc<AtomicUsize>) {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            accepted = listener.accept() => {
                open.spawn(serve(accepted.unwrap().0, leave.clone(), Arc::clone(&lost_posts)));
            }
            () = told(&mut leave) => break,
        }
    }
    drop(listener);
    open.join_all().await;
}

/// Waits until it is to leave.
async fn told(leave: &mut watch::Receiver<bool>) {
    let _gone = leave.wait_for(|leave| *leave).await;
}

async fn serve(mut stream: TcpStream, mut leave: watch::Receiver<bool>, lost_posts: Arc<AtomicUsize>) {
    let mut seen = Vec::new();
    loop {
        tokio::select! {
            biased;
            request = next(&mut stream, &mut seen) => {
                sleep(WORK).await;
                if request.is_none() || stream.write_all(ANSWER).await.is_err() {
                    return;
                }
            }
            () = told(&mut leave) => break,
        }
    }
    let _gone = stream.shutdown().await;
    if let Ok(Some(lost)) = timeout(RACE, next(&mut stream, &mut seen)).await
        && lost.starts_with("POST")
    {
        lost_posts.fetch_add(1, SeqCst);
    }
}
