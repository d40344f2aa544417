//! The thread that serves the admin door: accepting, HTTP/1 or HTTP/2 by the first bytes, bounded everywhere.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::LocalSet;
use tokio::time::{sleep, timeout};

use super::{ProcessView, pages};
use crate::telemetry::Telemetry;

/// Connections that are open at the same time; more are closed at once.
const MAX_CONNECTIONS: usize = 256;
/// How long a request's head may take.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// How long a connection lives at most: probes and scrapers connect again, forgotten ones go away.
const CONNECTION_LIMIT: Duration = Duration::from_secs(600);
/// Pause after an accept that failed for want of something, so that the thread does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What every HTTP/2 connection begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The running door. Dropping it stops the door without waiting.
#[derive(Debug)]
pub struct AdminServer {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl AdminServer {
    /// Where it listens, with the port that was really taken.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops it, with what is in flight, and waits for its thread.
    pub fn stop(mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there, and there is nothing left to save.
            let _ = thread.join();
        }
    }
}

/// Serves the door on a thread of its own until the result is dropped or stopped. Fails when the listener cannot be
/// used or no thread or runtime can be had.
pub fn spawn(
    listener: std::net::TcpListener,
    inside: Arc<dyn ProcessView>,
    telemetry: Arc<Telemetry>,
) -> io::Result<AdminServer> {
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let (stop, stopped) = oneshot::channel::<()>();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let thread = std::thread::Builder::new().name("admin".to_owned()).spawn(move || {
        let served = LocalSet::new().block_on(&runtime, serve(listener, stopped, Door { inside, telemetry }));
        if let Err(error) = served {
            tracing::error!(%error, "the admin door does not open");
        }
    })?;
    Ok(AdminServer { address, stop: Some(stop), thread: Some(thread) })
}

/// One of the connections that may be open; given back on drop, also when its task panics.
struct Place(Rc<Cell<usize>>);

impl Place {
    fn take(open: &Rc<Cell<usize>>) -> Self {
        open.set(open.get() + 1);
        Self(Rc::clone(open))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[derive(Clone)]
struct Door {
    inside: Arc<dyn ProcessView>,
    telemetry: Arc<Telemetry>,
}

async fn serve(listener: std::net::TcpListener, mut stopped: oneshot::Receiver<()>, door: Door) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let open = Rc::new(Cell::new(0usize));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut stopped => return Ok(()),
        };
        match accepted {
            Ok((stream, _)) if open.get() < MAX_CONNECTIONS => {
                let (place, door) = (Place::take(&open), door.clone());
                tokio::task::spawn_local(async move {
                    // Over the limit or broken: the connection is gone either way, and the peer knows.
                    let _ = timeout(CONNECTION_LIMIT, connection(stream, door)).await;
                    drop(place);
                });
            }
            Ok(_) => tracing::warn!(limit = MAX_CONNECTIONS, "too many connections at the admin door"),
            Err(error) => {
                tracing::warn!(%error, "cannot accept at the admin door");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, door: Door) -> Result<(), hyper::Error> {
    let Ok(Ok(http2)) = timeout(HEAD_LIMIT, speaks_http2(&stream)).await else {
        return Ok(());
    };
    let service = service_fn(move |request: Request<Incoming>| {
        let (head, _body) = request.into_parts();
        let response = pages::answer(&head, &*door.inside, &door.telemetry);
        async move { Ok::<_, Infallible>(response) }
    });
    let stream = TokioIo::new(stream);
    if http2 {
        let mut builder = http2::Builder::new(LocalExecutor);
        builder.timer(TokioTimer::new()).max_concurrent_streams(32);
        return builder.serve_connection(stream, service).await;
    }
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_LIMIT).max_buf_size(32 * 1024);
    builder.serve_connection(stream, service).await
}

/// Looks at the first bytes without taking them. Three tell: no HTTP/1 method begins with `PRI`.
async fn speaks_http2(stream: &TcpStream) -> io::Result<bool> {
    let mut first = [0; 3];
    loop {
        let seen = stream.peek(&mut first).await?;
        if seen == 0 || !PREFACE.starts_with(&first[..seen]) {
            return Ok(false);
        }
        if seen == first.len() {
            return Ok(true);
        }
        // What was seen stays readable, so waiting for the socket would not wait.
        sleep(Duration::from_millis(5)).await;
    }
}

/// Keeps HTTP/2's tasks on this thread.
#[derive(Clone, Copy)]
struct LocalExecutor;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}
