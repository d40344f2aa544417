//! Accepts the connections of one listener on one worker, and serves each as a task of that worker.
//!
//! First step of a connection: TLS or protocol detection, then `proxy::serve`. Invariants: an accept never waits for a
//! handshake or for the first bytes of another connection, and no failure of one connection stops the listener.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use crate::listener::detect::{DetectedProtocol, detect};
use crate::listener::tls::Certificates;
use crate::net::io::Io;
use crate::net::socket;
use crate::proxy::downstream::{ActiveListener, DownstreamConnection};
use crate::proxy::serve;
use crate::proxy::worker_context::WorkerContext;
use crate::runtime::tasks;

/// Pause after an accept that failed for lack of a resource (file descriptors, memory), so that the worker does not spin.
const PAUSE: Duration = Duration::from_millis(20);

/// One worker's share of a listener.
pub struct Acceptor {
    /// The worker.
    pub worker: Rc<WorkerContext>,
    /// The listener as its connections see it.
    pub listener: Rc<ActiveListener>,
    /// The listener's certificates; `None` for a listener without TLS.
    pub certificates: Option<Arc<Certificates>>,
}

impl Acceptor {
    /// Accepts until `stop` fires or its sender is dropped; open connections go on as tasks of the worker.
    ///
    /// Returns the socket, with the connections that the kernel has queued on it.
    pub async fn run(self, listener: TcpListener, mut stop: oneshot::Receiver<()>) -> TcpListener {
        let this = Rc::new(self);
        loop {
            let accepted = tokio::select! {
                biased;
                accepted = listener.accept() => accepted,
                _ = &mut stop => return listener,
            };
            match accepted {
                Ok((stream, peer)) => this.spawn_connection(stream, peer),
                Err(error) if is_connection_error(&error) => {}
                Err(error) => {
                    tracing::warn!(
                        listener = this.listener.values.name,
                        %error,
                        "a connection could not be accepted; the next accept follows in 20 ms: check the process' limit of \
                         open files and its memory"
                    );
                    sleep(PAUSE).await;
                }
            }
        }
    }

    fn spawn_connection(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr) {
        self.listener.metrics.accepted.increment();
        let this = Rc::clone(self);
        tasks::spawn(async move {
            let _open = this.listener.metrics.open.hold();
            if let Err(error) = this.serve_connection(stream, peer).await {
                tracing::debug!(listener = this.listener.values.name, %peer, %error, "a connection ended before its first request");
            }
        });
    }

    /// Time limits for a connection that begins now: the TLS handshake (`timeouts.headers`), and silence (`timeouts.idle`).
    fn timeouts(&self) -> (Duration, Duration) {
        let view = self.worker.view();
        let values = self.listener.values_in(&view.policy);
        (values.headers_timeout.value, values.idle.value)
    }

    async fn serve_connection(&self, stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
        socket::tune(&stream)?;
        let (headers, idle) = self.timeouts();
        let (io, alpn) = match &self.certificates {
            Some(certificates) => timeout(headers, certificates.accept(stream)).await??,
            None => (Io::tcp(stream), None),
        };
        let (protocol, io) = match alpn {
            Some(protocol) => (protocol, io),
            // A connection opened ahead of its first request may be silent for as long as one between two requests.
            None => match timeout(idle, detect(io)).await?? {
                Some(detected) => detected,
                None => return Ok(()),
            },
        };
        let caller = DownstreamConnection::new(Rc::clone(&self.listener), peer, protocol == DetectedProtocol::Http1);
        let worker = Rc::clone(&self.worker);
        match protocol {
            DetectedProtocol::Http1 => serve::http1(worker, caller, io).await,
            DetectedProtocol::Http2 => serve::http2(worker, caller, io).await,
        }
        Ok(())
    }
}

/// True for errors of the connection being accepted, and not of the listener (accept(2)).
fn is_connection_error(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, Interrupted, NetworkDown,
        NetworkUnreachable,
    };
    matches!(
        error.kind(),
        ConnectionAborted
            | ConnectionRefused
            | ConnectionReset
            | HostUnreachable
            | Interrupted
            | NetworkDown
            | NetworkUnreachable
    )
}
