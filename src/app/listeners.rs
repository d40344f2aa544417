//! The open listeners. A reload opens and closes only the listeners that it changes.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::app::StartError;
use crate::listener::tls::Certificates;
use crate::net::socket;
use crate::policy::model::Listener;

/// A command to one worker.
pub(super) enum ListenerCommand {
    /// Accept connections from another listener.
    Open(Box<ListenerOpening>),
    /// Stop accepting from the listener with this number.
    Close(u64),
    /// Replace the cached policy view by the policy in force.
    RefreshPolicy,
}

/// What one worker needs to open a listener.
pub(super) struct ListenerOpening {
    /// Unique among all listeners of this process, closed ones included.
    pub number: u64,
    /// The socket to accept from.
    pub socket: ListenerSocket,
    /// The listener in the policy.
    pub values: Listener,
    /// Certificates of the listener; `None` without TLS.
    pub certificates: Option<Arc<Certificates>>,
}

/// One worker's socket for a listener.
pub(super) enum ListenerSocket {
    /// A new socket.
    New(TcpListener),
    /// The socket of the listener with this number, which stops accepting. Closing the socket instead would reset the connections
    /// in its accept queue.
    TakenFrom(u64),
}

/// One open listener.
struct BoundListener {
    number: u64,
    values: Listener,
    address: SocketAddr,
    certificates: Option<Arc<Certificates>>,
}

/// All open listeners, and the command channels of the workers.
pub(super) struct Listeners {
    workers: usize,
    senders: Vec<mpsc::Sender<ListenerCommand>>,
    open: Vec<BoundListener>,
    next: u64,
}

/// The listeners that a policy change opens and closes. New sockets are bound already; dropping the plan closes them.
pub(super) struct ListenerPlan {
    open: Vec<(BoundListener, Vec<ListenerSocket>)>,
    close: Vec<u64>,
    /// Listeners whose sockets a new listener takes over.
    taken_over: Vec<u64>,
}

impl Listeners {
    /// No open listener, for the given number of workers.
    pub(super) fn new(workers: usize) -> Self {
        Self { workers, senders: Vec::new(), open: Vec::new(), next: 0 }
    }

    /// Adds the command channel of a worker.
    pub(super) fn add_worker(&mut self, sender: mpsc::Sender<ListenerCommand>) {
        self.senders.push(sender);
    }

    /// Compares the open listeners with the `wanted` ones, and binds the new sockets.
    ///
    /// # Errors
    /// If an address cannot be bound or a certificate cannot be used; no open listener has changed then.
    pub(super) fn plan(&mut self, wanted: &[Listener]) -> Result<ListenerPlan, StartError> {
        let (mut open, mut taken_over) = (Vec::new(), Vec::new());
        let mut close: Vec<&BoundListener> =
            self.open.iter().filter(|listener| !wanted.iter().any(|values| listener.serves(values))).collect();
        for values in wanted {
            if self.open.iter().any(|listener| listener.serves(values)) {
                continue;
            }
            let certificates = values.tls.as_ref().map(Certificates::load).transpose()?;
            // The address may be bound already by a listener with another name or other certificates: take over its socket.
            let old =
                close.iter().position(|listener| listener.values.bind == values.bind).map(|at| close.swap_remove(at));
            let (sockets, address) = match old {
                Some(old) => {
                    taken_over.push(old.number);
                    ((0..self.workers).map(|_| ListenerSocket::TakenFrom(old.number)).collect(), old.address)
                }
                None => self.listen(values)?,
            };
            self.next += 1;
            let listener = BoundListener { number: self.next, values: values.clone(), address, certificates };
            open.push((listener, sockets));
        }
        let close = close.into_iter().map(|listener| listener.number).collect();
        Ok(ListenerPlan { open, close, taken_over })
    }

    /// Binds a new socket for each worker; returns the sockets with their address.
    fn listen(&self, values: &Listener) -> Result<(Vec<ListenerSocket>, SocketAddr), StartError> {
        let sockets = socket::listen(values.bind, self.workers)
            .and_then(|sockets| sockets[0].local_addr().map(|address| (sockets, address)));
        match sockets {
            Ok((sockets, address)) => Ok((sockets.into_iter().map(ListenerSocket::New).collect(), address)),
            Err(source) => Err(StartError::Listen { name: values.name.clone(), bind: values.bind, source }),
        }
    }

    /// Sends the changes to the workers.
    pub(super) fn apply(&mut self, plan: ListenerPlan) {
        for (listener, sockets) in plan.open {
            tracing::info!(listener = listener.values.name, address = %listener.address, "listening");
            for (sender, socket) in self.senders.iter().zip(sockets) {
                let opening = ListenerOpening {
                    number: listener.number,
                    socket,
                    values: listener.values.clone(),
                    certificates: listener.certificates.clone(),
                };
                send(sender, ListenerCommand::Open(Box::new(opening)));
            }
            self.open.push(listener);
        }
        for number in plan.taken_over {
            self.remove(number);
        }
        for number in plan.close {
            self.remove(number);
            for sender in &self.senders {
                send(sender, ListenerCommand::Close(number));
            }
        }
    }

    /// Makes every worker replace its policy view. A request does so too, but a worker without requests would keep the old
    /// policy with all its connections.
    pub(super) fn refresh_policy(&self) {
        for sender in &self.senders {
            send(sender, ListenerCommand::RefreshPolicy);
        }
    }

    fn remove(&mut self, number: u64) {
        if let Some(position) = self.open.iter().position(|listener| listener.number == number) {
            let listener = self.open.swap_remove(position);
            tracing::info!(listener = listener.values.name, address = %listener.address, "closed");
        }
    }

    /// Names and bound addresses; a configured port 0 is replaced by the port that the system chose.
    pub(super) fn addresses(&self) -> Vec<(String, SocketAddr)> {
        self.open.iter().map(|listener| (listener.values.name.clone(), listener.address)).collect()
    }

    /// The certificates of all listeners.
    pub(super) fn certificates(&self) -> Vec<Arc<Certificates>> {
        self.open.iter().filter_map(|listener| listener.certificates.clone()).collect()
    }
}

impl BoundListener {
    /// True if the listener need not be opened again for these values. Timeouts and targets are read per connection or request.
    fn serves(&self, values: &Listener) -> bool {
        self.values.name == values.name && self.values.bind == values.bind && self.values.tls == values.tls
    }
}

fn send(worker: &mpsc::Sender<ListenerCommand>, command: ListenerCommand) {
    // The channel holds far more commands than reloads make before a worker receives them. A closed channel means that the
    // process is shutting down.
    if worker.try_send(command).is_err() {
        tracing::error!("a worker does not receive commands; its listeners keep the previous policy");
    }
}
