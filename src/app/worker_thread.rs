//! One worker's main: takes listeners, serves them, and goes down when told.

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

/// Commands that may wait for one worker.
const COMMANDS: usize = 1024;

/// Starts worker `number`; `alive` is dropped when it has ended.
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
    let worker = WorkerContext::new(Arc::clone(&shared.policy), upstreams, shard, &shared.chain);
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
                    match listener(&mut open, opening.socket).await {
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
                        drop(accepting.end());
                    }
                }
                Some(ListenerCommand::Renew) => drop(worker.view()),
                None => break,
            },
        }
    }
    drop(open);
    worker.connections.advance(DrainPhase::Closing);
    tokio::select! {
        () = worker.connections.all_closed() => {}
        // What is left is dropped with the runtime, and says so in its record.
        () = drain.reached(DrainPhase::Over) => worker.connections.advance(DrainPhase::Over),
    }
}

/// A listener that is being accepted from; that ends when this is dropped.
struct Accepting {
    door: Rc<ActiveListener>,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<TcpListener>,
}

impl Accepting {
    /// Accepts no more, and sends its callers elsewhere; they are not cut. Gives the socket back.
    fn end(self) -> JoinHandle<TcpListener> {
        drop(self.stop);
        self.door.close();
        self.ended
    }
}

/// The socket to accept from: a new one, or that of a listener which ends so.
async fn listener(open: &mut HashMap<u64, Accepting>, socket: ListenerSocket) -> io::Result<TcpListener> {
    match socket {
        ListenerSocket::New(listener) => TcpListener::from_std(listener),
        ListenerSocket::Of(number) => {
            let old = open.remove(&number).ok_or(io::ErrorKind::NotConnected)?;
            old.end().await.map_err(io::Error::other)
        }
    }
}

/// Begins to accept.
fn accept_from(
    worker: &Rc<WorkerContext>,
    socket: TcpListener,
    number: u64,
    values: Listener,
    certificates: Option<Arc<Certificates>>,
) -> Accepting {
    let via = Via::new(&mark(number, &values));
    let metrics = worker.shard.listener(&values.name);
    let door = Rc::new(ActiveListener::new(values, via));
    let acceptor = Acceptor { worker: Rc::clone(worker), metrics, listener: Rc::clone(&door), certificates };
    let (stop, stopped) = oneshot::channel();
    Accepting { door, stop, ended: tasks::spawn(acceptor.run(socket, stopped)) }
}

/// What tells this listener's `Via` from that of every other listener of every other process.
fn mark(number: u64, values: &Listener) -> String {
    use std::hash::{BuildHasher, RandomState};
    use std::sync::OnceLock;
    // The standard library's hasher is seeded by the system, differently in each process.
    static PROCESS: OnceLock<RandomState> = OnceLock::new();
    let process = PROCESS.get_or_init(RandomState::new);
    let mark = process.hash_one((number, &values.name, values.bind));
    format!("{:08x}", mark >> 32)
}
