//! One worker's main: takes listeners, serves them, and goes down when told.

use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::app::Shared;
use crate::app::doors::{Command, Socket};
use crate::listener::accept::Acceptor;
use crate::listener::tls::Certificates;
use crate::policy::model::Listener;
use crate::proxy::caller::Door;
use crate::proxy::fields::Via;
use crate::proxy::worker::Worker;
use crate::runtime::drain::Phase;
use crate::runtime::{tasks, worker};
use crate::upstream::connect::Network;
use crate::upstream::worker::Upstreams;

/// Commands that may wait for one worker.
const COMMANDS: usize = 1024;

/// Starts worker `number`; `alive` is dropped when it has ended.
pub(super) fn start(
    shared: &Arc<Shared>,
    number: usize,
    alive: mpsc::Sender<()>,
) -> io::Result<std::thread::JoinHandle<io::Result<()>>> {
    let (sender, commands) = mpsc::channel(COMMANDS);
    shared.doors().add_worker(sender);
    let shared = Arc::clone(shared);
    let naps = shared.telemetry.process.naps.clone();
    worker::spawn(
        &format!("worker-{number}"),
        move || naps.increment(),
        move || async move {
            run(&shared, number, commands).await;
            drop(alive);
        },
    )
}

async fn run(shared: &Arc<Shared>, number: usize, mut commands: mpsc::Receiver<Command>) {
    let shard = shared.telemetry.shard(u32::try_from(number).unwrap_or(u32::MAX));
    let upstreams = Upstreams::new(Rc::new(Network), shared.discovery.clone(), Rc::clone(&shard));
    tasks::spawn(Upstreams::sweep(Rc::downgrade(&upstreams)));
    let worker = Worker::new(Arc::clone(&shared.policy), upstreams, shard, &shared.chain);
    let mut open: HashMap<u64, Accepting> = HashMap::new();
    let drain = shared.drain.signal();
    let mut leaving = Box::pin(drain.reached(Phase::Leaving));
    let mut left = false;
    let closing = drain.reached(Phase::Closing);
    tokio::pin!(closing);
    loop {
        tokio::select! {
            biased;
            () = &mut closing => break,
            () = &mut leaving, if !left => {
                left = true;
                worker.crowd.advance(Phase::Leaving);
            }
            command = commands.recv() => match command {
                Some(Command::Open(opening)) => {
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
                Some(Command::Close(number)) => {
                    if let Some(accepting) = open.remove(&number) {
                        drop(accepting.end());
                    }
                }
                Some(Command::Renew) => drop(worker.view()),
                None => break,
            },
        }
    }
    drop(open);
    worker.crowd.advance(Phase::Closing);
    tokio::select! {
        () = worker.crowd.gone() => {}
        // What is left is dropped with the runtime, and says so in its record.
        () = drain.reached(Phase::Over) => worker.crowd.advance(Phase::Over),
    }
}

/// A listener that is being accepted from; that ends when this is dropped.
struct Accepting {
    door: Rc<Door>,
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
async fn listener(open: &mut HashMap<u64, Accepting>, socket: Socket) -> io::Result<TcpListener> {
    match socket {
        Socket::New(listener) => TcpListener::from_std(listener),
        Socket::Of(number) => {
            let old = open.remove(&number).ok_or(io::ErrorKind::NotConnected)?;
            old.end().await.map_err(io::Error::other)
        }
    }
}

/// Begins to accept.
fn accept_from(
    worker: &Rc<Worker>,
    socket: TcpListener,
    number: u64,
    values: Listener,
    certificates: Option<Arc<Certificates>>,
) -> Accepting {
    let via = Via::new(&mark(number, &values));
    let metrics = worker.shard.listener(&values.name);
    let door = Rc::new(Door::new(values, via));
    let acceptor = Acceptor { worker: Rc::clone(worker), metrics, door: Rc::clone(&door), certificates };
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
