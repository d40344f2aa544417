//! Which listeners are open, and what changes when the policy does: a listener that did not change is not touched.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::app::StartError;
use crate::listener::tls::Certificates;
use crate::net::socket;
use crate::policy::model::Listener;

/// What a worker is told.
pub(super) enum ListenerCommand {
    /// Accept from one more listener.
    Open(Box<ListenerOpening>),
    /// Accept no more from the listener with this number.
    Close(u64),
    /// Take up the policy that is in force now.
    Renew,
}

/// One worker's share of a listener that opens.
pub(super) struct ListenerOpening {
    /// Unique among all that this process ever opens.
    pub number: u64,
    /// Where it accepts.
    pub socket: ListenerSocket,
    /// Its values.
    pub values: Listener,
    /// Its certificates.
    pub certificates: Option<Arc<Certificates>>,
}

/// One worker's socket for a listener.
pub(super) enum ListenerSocket {
    /// A new one.
    New(TcpListener),
    /// That of the listener with this number, which closes. A socket that is closed resets the callers that wait on it.
    Of(u64),
}

/// One open listener.
struct BoundListener {
    number: u64,
    values: Listener,
    address: SocketAddr,
    certificates: Option<Arc<Certificates>>,
}

/// All open listeners, and the way to the workers that accept from them.
pub(super) struct Listeners {
    workers: usize,
    senders: Vec<mpsc::Sender<ListenerCommand>>,
    open: Vec<BoundListener>,
    next: u64,
}

/// What has to be opened and closed for another policy. The sockets are open already; dropping it closes them.
pub(super) struct ListenerPlan {
    open: Vec<(BoundListener, Vec<ListenerSocket>)>,
    close: Vec<u64>,
    /// Those that leave their sockets to others.
    leave: Vec<u64>,
}

impl Listeners {
    /// No listener yet, for so many workers.
    pub(super) fn new(workers: usize) -> Self {
        Self { workers, senders: Vec::new(), open: Vec::new(), next: 0 }
    }

    /// Adds the way to one worker.
    pub(super) fn add_worker(&mut self, sender: mpsc::Sender<ListenerCommand>) {
        self.senders.push(sender);
    }

    /// Works out what has to change, and opens the new sockets.
    ///
    /// # Errors
    /// If one cannot be opened; nothing has changed then.
    pub(super) fn plan(&mut self, wanted: &[Listener]) -> Result<ListenerPlan, StartError> {
        let (mut open, mut leave) = (Vec::new(), Vec::new());
        let mut close: Vec<&BoundListener> =
            self.open.iter().filter(|door| !wanted.iter().any(|values| door.serves(values))).collect();
        for values in wanted {
            if self.open.iter().any(|door| door.serves(values)) {
                continue;
            }
            let certificates = values.tls.as_ref().map(Certificates::load).transpose()?;
            // An address that we have open ourselves, under another name or other certificates, goes over as it is.
            let old = close.iter().position(|door| door.values.bind == values.bind).map(|at| close.swap_remove(at));
            let (sockets, address) = match old {
                Some(old) => {
                    leave.push(old.number);
                    ((0..self.workers).map(|_| ListenerSocket::Of(old.number)).collect(), old.address)
                }
                None => self.listen(values)?,
            };
            self.next += 1;
            let door = BoundListener { number: self.next, values: values.clone(), address, certificates };
            open.push((door, sockets));
        }
        let close = close.into_iter().map(|door| door.number).collect();
        Ok(ListenerPlan { open, close, leave })
    }

    /// A new socket for each worker, and their address.
    fn listen(&self, values: &Listener) -> Result<(Vec<ListenerSocket>, SocketAddr), StartError> {
        let sockets = socket::listen(values.bind, self.workers)
            .and_then(|sockets| sockets[0].local_addr().map(|address| (sockets, address)));
        match sockets {
            Ok((sockets, address)) => Ok((sockets.into_iter().map(ListenerSocket::New).collect(), address)),
            Err(source) => Err(StartError::Listen { name: values.name.clone(), bind: values.bind, source }),
        }
    }

    /// Tells the workers.
    pub(super) fn carry_out(&mut self, plan: ListenerPlan) {
        for (door, sockets) in plan.open {
            tracing::info!(listener = door.values.name, address = %door.address, "listening");
            for (sender, socket) in self.senders.iter().zip(sockets) {
                let opening = ListenerOpening {
                    number: door.number,
                    socket,
                    values: door.values.clone(),
                    certificates: door.certificates.clone(),
                };
                tell(sender, ListenerCommand::Open(Box::new(opening)));
            }
            self.open.push(door);
        }
        for number in plan.leave {
            self.forget(number);
        }
        for number in plan.close {
            self.forget(number);
            for sender in &self.senders {
                tell(sender, ListenerCommand::Close(number));
            }
        }
    }

    /// Has the workers take up the policy in force. One that is called finds it by itself; another would hold on to the
    /// old one with all its connections.
    pub(super) fn renew(&self) {
        for sender in &self.senders {
            tell(sender, ListenerCommand::Renew);
        }
    }

    fn forget(&mut self, number: u64) {
        if let Some(position) = self.open.iter().position(|door| door.number == number) {
            let door = self.open.swap_remove(position);
            tracing::info!(listener = door.values.name, address = %door.address, "closed");
        }
    }

    /// Names and addresses, with the ports that were really taken.
    pub(super) fn addresses(&self) -> Vec<(String, SocketAddr)> {
        self.open.iter().map(|door| (door.values.name.clone(), door.address)).collect()
    }

    /// The certificates of all listeners.
    pub(super) fn certificates(&self) -> Vec<Arc<Certificates>> {
        self.open.iter().filter_map(|door| door.certificates.clone()).collect()
    }
}

impl BoundListener {
    /// True if this open listener is what the values ask for. Time limits and targets are read per connection or request.
    fn serves(&self, values: &Listener) -> bool {
        self.values.name == values.name && self.values.bind == values.bind && self.values.tls == values.tls
    }
}

fn tell(worker: &mpsc::Sender<ListenerCommand>, command: ListenerCommand) {
    // The queue holds far more commands than reloads can make before a worker takes them; a worker that is gone
    // is on its way down with the whole process.
    if worker.try_send(command).is_err() {
        tracing::error!("a worker does not take commands");
    }
}
