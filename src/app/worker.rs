//! One worker's main: takes listeners, serves them, and goes down when told.

use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

use crate::app::Shared;
use crate::app::doors::{Command, Opening};
use crate::listener::accept::Acceptor;
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
) -> io::Result<JoinHandle<io::Result<()>>> {
    let (sender, commands) = mpsc::channel(COMMANDS);
    shared.doors().add_worker(sender);
    let shared = Arc::clone(shared);
    worker::spawn(&format!("worker-{number}"), move || async move {
        run(&shared, number, commands).await;
        drop(alive);
    })
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
                    let number = opening.number;
                    open.extend(accept_from(&worker, *opening).map(|accepting| (number, accepting)));
                }
                Some(Command::Close(number)) => {
                    if let Some(Accepting { door, stop }) = open.remove(&number) {
                        drop(stop);
                        door.close();
                    }
                }
                None => break,
            },
        }
    }
    drop(open);
    worker.crowd.advance(Phase::Closing);
    worker.crowd.gone().await;
}

/// A listener that is being accepted from; that ends when this is dropped.
struct Accepting {
    door: Rc<Door>,
    stop: oneshot::Sender<()>,
}

/// Begins to accept.
fn accept_from(worker: &Rc<Worker>, opening: Opening) -> Option<Accepting> {
    let name = opening.values.name.clone();
    let via = Via::new(&mark(&opening));
    let listener = match TcpListener::from_std(opening.listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(listener = name, %error, "a worker cannot accept connections");
            return None;
        }
    };
    let door = Rc::new(Door::new(opening.values, via));
    let acceptor = Acceptor {
        worker: Rc::clone(worker),
        metrics: worker.shard.listener(&name),
        door: Rc::clone(&door),
        certificates: opening.certificates,
    };
    let (stop, stopped) = oneshot::channel();
    tasks::spawn(acceptor.run(listener, stopped));
    Some(Accepting { door, stop })
}

/// What tells this listener's `Via` from that of every other listener of every other process.
fn mark(opening: &Opening) -> String {
    use std::hash::{BuildHasher, RandomState};
    use std::sync::OnceLock;
    // The standard library's hasher is seeded by the system, differently in each process.
    static PROCESS: OnceLock<RandomState> = OnceLock::new();
    let process = PROCESS.get_or_init(RandomState::new);
    let mark = process.hash_one((opening.number, &opening.values.name, opening.values.bind));
    format!("{:08x}", mark >> 32)
}
