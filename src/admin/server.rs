//! The thread of the admin server: accepts connections and serves HTTP/1 or HTTP/2, chosen by the first bytes.
//! Connections, their lifetime and request heads are bounded.

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

/// Most open connections; further ones are closed at once.
const MAX_CONNECTIONS: usize = 256;
/// Timeout for a request head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest life of a connection, so that abandoned connections end; probes and scrapers reconnect.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(600);
/// Pause after a failed accept (no file descriptor, no memory), so that the thread does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The first bytes of every HTTP/2 connection (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The running admin server. A drop stops the server without waiting for its thread.
#[derive(Debug)]
pub struct AdminServer {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl AdminServer {
    /// The listening address, with the actual port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops the server, requests in flight included, and waits for its thread.
    pub fn stop(mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed by the thread; nothing is left to clean up.
            let _ = thread.join();
        }
    }
}

/// Starts the admin server on its own thread; it runs until the result is dropped or stopped. Fails if the listener is
/// not usable, or a thread or a runtime cannot be created.
pub fn spawn(
    listener: std::net::TcpListener,
    process: Arc<dyn ProcessView>,
    telemetry: Arc<Telemetry>,
) -> io::Result<AdminServer> {
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let (stop, stopped) = oneshot::channel::<()>();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let thread = std::thread::Builder::new().name("admin".to_owned()).spawn(move || {
        let served = LocalSet::new().block_on(&runtime, serve(listener, stopped, PageData { process, telemetry }));
        if let Err(error) = served {
            tracing::error!(%error, "the admin server cannot start");
        }
    })?;
    Ok(AdminServer { address, stop: Some(stop), thread: Some(thread) })
}

/// Permit for one open connection; returned on drop, also if the connection's task panics.
struct ConnectionPermit(Rc<Cell<usize>>);

impl ConnectionPermit {
    fn acquire(open: &Rc<Cell<usize>>) -> Self {
        open.set(open.get() + 1);
        Self(Rc::clone(open))
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[derive(Clone)]
struct PageData {
    process: Arc<dyn ProcessView>,
    telemetry: Arc<Telemetry>,
}

async fn serve(listener: std::net::TcpListener, mut stopped: oneshot::Receiver<()>, data: PageData) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let open = Rc::new(Cell::new(0usize));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut stopped => return Ok(()),
        };
        match accepted {
            Ok((stream, _)) if open.get() < MAX_CONNECTIONS => {
                let (permit, data) = (ConnectionPermit::acquire(&open), data.clone());
                tokio::task::spawn_local(async move {
                    // Expired or broken, the connection is closed either way, and the peer sees that.
                    let _ = timeout(MAX_CONNECTION_AGE, connection(stream, data)).await;
                    drop(permit);
                });
            }
            Ok(_) => tracing::warn!(limit = MAX_CONNECTIONS, "too many connections to the admin server"),
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections to the admin server");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, data: PageData) -> Result<(), hyper::Error> {
    let Ok(Ok(http2)) = timeout(HEAD_TIMEOUT, speaks_http2(&stream)).await else {
        return Ok(());
    };
    let service = service_fn(move |request: Request<Incoming>| {
        let (head, _body) = request.into_parts();
        let response = pages::respond(&head, &*data.process, &data.telemetry);
        async move { Ok::<_, Infallible>(response) }
    });
    let stream = TokioIo::new(stream);
    if http2 {
        let mut builder = http2::Builder::new(LocalExecutor);
        builder.timer(TokioTimer::new()).max_concurrent_streams(32);
        return builder.serve_connection(stream, service).await;
    }
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(32 * 1024);
    builder.serve_connection(stream, service).await
}

/// Peeks at the first bytes. Three bytes decide: no HTTP/1 method begins with `PRI`.
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
        // The peeked bytes stay readable, so waiting for readiness would return at once.
        sleep(Duration::from_millis(5)).await;
    }
}

/// Spawns the tasks of HTTP/2 connections on this thread.
#[derive(Clone, Copy)]
struct LocalExecutor;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}
