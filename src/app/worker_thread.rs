//! The main loop of a worker: opens and closes listeners on command, and drains.

use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::app::Shared;
use crate::app::listeners::{ListenerCommand, ListenerSocket};
use crate::listener::accept::Acceptor;
use crate::listener::tls::Certificates;
use crate::policy::model::Listener;
use crate::proxy::downstream::ActiveListener;
use crate::proxy::headers::Via;
use crate::proxy::worker_context::WorkerContext;
use crate::runtime::drain::DrainPhase;
use crate::runtime::{tasks, thread};
use crate::upstream::connect::Network;
use crate::upstream::upstreams::Upstreams;

/// Capacity of the command channel of a worker.
const COMMANDS: usize = 1024;

/// Starts worker `number`; the worker drops `alive` when it ends.
pub(super) fn start(
    shared: &Arc<Shared>,
    number: usize,
    alive: mpsc::Sender<()>,
) -> io::Result<std::thread::JoinHandle<io::Result<()>>> {
    let (sender, commands) = mpsc::channel(COMMANDS);
    shared.listeners().add_worker(sender);
    let shared = Arc::clone(shared);
    let wake_batches = shared.telemetry.process.wake_batches.clone();
    thread::spawn(
        &format!("worker-{number}"),
        move || wake_batches.increment(),
        move || async move {
            run(&shared, number, commands).await;
            drop(alive);
        },
    )
}

async fn run(shared: &Arc<Shared>, number: usize, mut commands: mpsc::Receiver<ListenerCommand>) {
    let shard = shared.telemetry.shard(u32::try_from(number).unwrap_or(u32::MAX));
    let upstreams = Upstreams::new(Rc::new(Network), shared.discovery.clone(), Rc::clone(&shard));
    tasks::spawn(Upstreams::sweep(Rc::downgrade(&upstreams)));
    let worker = WorkerContext::new(Arc::clone(&shared.policy), upstreams, shard, &shared.correlation);
    let mut open: HashMap<u64, Accepting> = HashMap::new();
    let drain = shared.drain.signal();
    let mut leaving = Box::pin(drain.reached(DrainPhase::Leaving));
    let mut left = false;
    let closing = drain.reached(DrainPhase::Closing);
    tokio::pin!(closing);
    loop {
        tokio::select! {
            biased;
            () = &mut closing => break,
            () = &mut leaving, if !left => {
                left = true;
                worker.connections.advance(DrainPhase::Leaving);
            }
            command = commands.recv() => match command {
                Some(ListenerCommand::Open(opening)) => {
                    let (number, opening) = (opening.number, *opening);
                    match bind(&mut open, opening.socket).await {
                        Ok(socket) => {
                            let accepting = accept_from(&worker, socket, number, opening.values, opening.certificates);
                            open.insert(number, accepting);
                        }
                        Err(error) => {
                            let name = opening.values.name;
                            tracing::error!(listener = name, %error, "a worker cannot accept connections");
                        }
                    }
                }
                Some(ListenerCommand::Close(number)) => {
                    if let Some(accepting) = open.remove(&number) {
                        drop(accepting.stop());
                    }
                }
                Some(ListenerCommand::RefreshPolicy) => drop(worker.view()),
                None => break,
            },
        }
    }
    drop(open);
    worker.connections.advance(DrainPhase::Closing);
    tokio::select! {
        () = worker.connections.all_closed() => {}
        // Calls still in flight are dropped with the runtime; their records have the outcome `draining`.
        () = drain.reached(DrainPhase::Over) => worker.connections.advance(DrainPhase::Over),
    }
}

/// A listener that accepts connections; dropping it stops accepting.
struct Accepting {
    listener: Rc<ActiveListener>,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<TcpListener>,
}

impl Accepting {
    /// Stops accepting and asks the callers to close their connections; no call is cut off. Returns the socket.
    fn stop(self) -> JoinHandle<TcpListener> {
        drop(self.stop);
        self.listener.close();
        self.ended
    }
}

/// The socket to accept from: a new one, or the one of another listener, which stops accepting.
async fn bind(open: &mut HashMap<u64, Accepting>, socket: ListenerSocket) -> io::Result<TcpListener> {
    match socket {
        ListenerSocket::New(listener) => TcpListener::from_std(listener),
        ListenerSocket::TakenFrom(number) => {
            let old = open.remove(&number).ok_or(io::ErrorKind::NotConnected)?;
            old.stop().await.map_err(io::Error::other)
        }
    }
}

/// Starts accepting on the socket.
fn accept_from(
    worker: &Rc<WorkerContext>,
    socket: TcpListener,
    number: u64,
    values: Listener,
    certificates: Option<Arc<Certificates>>,
) -> Accepting {
    let via = Via::new(&listener_id(number, &values));
    let metrics = worker.shard.listener(&values.name);
    let listener = Rc::new(ActiveListener::new(values, via, metrics));
    let acceptor = Acceptor { worker: Rc::clone(worker), listener: Rc::clone(&listener), certificates };
    let (stop, stopped) = oneshot::channel();
    Accepting { listener, stop, ended: tasks::spawn(acceptor.run(socket, stopped)) }
}

/// Identifies this listener in `Via` among all listeners of all processes, for loop detection.
fn listener_id(number: u64, values: &Listener) -> String {
    use std::hash::{BuildHasher, RandomState};
    use std::sync::OnceLock;
    // The standard library seeds this hasher with random numbers of the system, different in each process.
    static PROCESS: OnceLock<RandomState> = OnceLock::new();
    let process = PROCESS.get_or_init(RandomState::new);
    let id = process.hash_one((number, &values.name, values.bind));
    format!("{:08x}", id >> 32)
}
