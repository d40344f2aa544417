//! Takes connections from one listener of one worker, until the listener is closed.

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
use crate::telemetry::ListenerMetrics;

/// Pause after an accept that failed for want of something (files, memory), so that the worker does not spin.
const PAUSE: Duration = Duration::from_millis(20);

/// One worker's share of a listener.
pub struct Acceptor {
    /// The worker.
    pub worker: Rc<WorkerContext>,
    /// What connections know of the listener.
    pub listener: Rc<ActiveListener>,
    /// Its certificates, if callers speak TLS.
    pub certificates: Option<Arc<Certificates>>,
    /// What is counted.
    pub metrics: ListenerMetrics,
}

impl Acceptor {
    /// Accepts until `stop` is dropped or rung; connections go on as tasks of the worker. Gives the socket back, with
    /// whoever waits on it.
    pub async fn run(self, listener: TcpListener, mut stop: oneshot::Receiver<()>) -> TcpListener {
        let this = Rc::new(self);
        loop {
            let accepted = tokio::select! {
                biased;
                accepted = listener.accept() => accepted,
                _ = &mut stop => return listener,
            };
            match accepted {
                Ok((stream, peer)) => this.begin(stream, peer),
                Err(error) if is_one_connections_fault(&error) => {}
                Err(error) => {
                    tracing::warn!(listener = this.listener.values.name, %error, "a connection could not be accepted");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    fn begin(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr) {
        self.metrics.accepted.increment();
        let this = Rc::clone(self);
        tasks::spawn(async move {
            let _open = this.metrics.open.hold();
            if let Err(error) = this.connection(stream, peer).await {
                tracing::debug!(listener = this.listener.values.name, %peer, %error, "a connection ended before its first request");
            }
        });
    }

    /// How long a handshake and how long silence may last on a connection that begins now.
    fn limits(&self) -> (Duration, Duration) {
        let view = self.worker.view();
        let values = self.listener.values_in(&view.policy);
        (values.headers_timeout.value, values.idle.value)
    }

    async fn connection(&self, stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
        socket::tune(&stream)?;
        let (headers, idle) = self.limits();
        let (io, agreed) = match &self.certificates {
            Some(certificates) => timeout(headers, certificates.accept(stream)).await??,
            None => (Io::tcp(stream), None),
        };
        let (spoken, io) = match agreed {
            Some(spoken) => (spoken, io),
            // A connection opened ahead of its first request may be silent for as long as one between two requests.
            None => match timeout(idle, detect(io)).await?? {
                Some(detected) => detected,
                None => return Ok(()),
            },
        };
        let caller = DownstreamConnection::new(Rc::clone(&self.listener), peer, spoken == DetectedProtocol::Http1);
        let worker = Rc::clone(&self.worker);
        match spoken {
            DetectedProtocol::Http1 => serve::http1(worker, caller, io).await,
            DetectedProtocol::Http2 => serve::http2(worker, caller, io).await,
        }
        Ok(())
    }
}

/// True for errors that concern only the connection that was to be accepted (accept(2)).
fn is_one_connections_fault(error: &io::Error) -> bool {
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
