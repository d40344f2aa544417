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
    let mut open: HashMap<u64, oneshot::Sender<()>> = HashMap::new();
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
                    if let Some((number, stop)) = accept_from(&worker, *opening) {
                        open.insert(number, stop);
                    }
                }
                Some(Command::Close(number)) => drop(open.remove(&number)),
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

/// Begins to accept; accepting ends when the result is dropped.
fn accept_from(worker: &Rc<Worker>, opening: Opening) -> Option<(u64, oneshot::Sender<()>)> {
    let name = opening.values.name.clone();
    let via = Via::new(&mark(&opening));
    let listener = match TcpListener::from_std(opening.listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(listener = name, %error, "a worker cannot accept connections");
            return None;
        }
    };
    let acceptor = Acceptor {
        worker: Rc::clone(worker),
        metrics: worker.shard.listener(&name),
        door: Rc::new(Door { via, values: opening.values }),
        certificates: opening.certificates,
    };
    let (stop, stopped) = oneshot::channel();
    tasks::spawn(acceptor.run(listener, stopped));
    Some((opening.number, stop))
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
