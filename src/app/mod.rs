//! Level 7: builds the parts, starts them, and takes them down again; the only module that knows all of them.
//!
//! Threads: one for each worker (the data path), one for control (discovery, files, reloads), one for the admin
//! door, one that writes the access log, and one for the program's own log, which is there before. They share the policy
//! snapshot, the drain switch and the telemetry.

mod admin_view;
mod control;
mod listeners;
mod worker_thread;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};

use crate::admin::{self, AdminServer, PolicyError};
use crate::config::Settings;
use crate::net::certificates::CertificateError;
use crate::net::socket;
use crate::policy::model::Model;
use crate::policy::snapshot::Snapshot;
use crate::proxy::worker_context::SharedState;
use crate::runtime::drain::{Drain, DrainPhase, DrainSignal};
use crate::telemetry::{Sink, Telemetry};
use crate::upstream::discovery::Discovery;

use control::Replaced;
use listeners::Listeners;

/// Why a policy did not come into force, or the process did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener's address is not to be had.
    #[error("listener {name}: cannot listen on {bind}: {source}")]
    Listen {
        /// The listener.
        name: String,
        /// Its address.
        bind: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// Certificates cannot be used.
    #[error("certificates: {0}")]
    Certificates(#[from] CertificateError),
    /// The admin door's address is not to be had.
    #[error("the admin door cannot listen on {address}: {source}; choose another with --admin")]
    Admin {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("no thread: {0}")]
    Thread(#[source] io::Error),
}

/// What the threads share.
struct Shared {
    settings: Settings,
    telemetry: Arc<Telemetry>,
    policy: Arc<ArcSwap<Snapshot>>,
    drain: Drain,
    discovery: Discovery,
    listeners: Mutex<Listeners>,
    last_error: Mutex<Option<PolicyError>>,
    /// Why changed certificates are not in use.
    certificate_error: Mutex<Option<PolicyError>>,
    /// The policy before the present one.
    replaced: Replaced,
    /// Rung to have the files looked at.
    look: Arc<Notify>,
    /// What the workers know together about the calls under way.
    chain: SharedState,
}

/// How long threads may take to end once they are told, and how often they are looked at meanwhile.
const AT_ONCE: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// A running hopguard.
pub struct App {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<io::Result<()>>>,
    /// Closed when the last worker has ended.
    workers: mpsc::Receiver<()>,
    admin: AdminServer,
}

impl App {
    /// Starts with a checked policy. With `settings.policy` set, changes of those files are followed.
    ///
    /// # Errors
    /// If an address is taken, certificates cannot be used, or the system gives no thread. Nothing runs then.
    pub fn start(settings: Settings, model: Model, sink: Sink) -> Result<Self, StartError> {
        let telemetry = Telemetry::new(sink);
        let (discovery, requests) = Discovery::new();
        let begun = tokio::time::Instant::now();
        control::log_warnings(&model);
        control::configure_log(&telemetry, &model);
        let follow = |cluster: &_| discovery.follow(cluster);
        let snapshot = Snapshot::compile(model, &settings.service, None, &telemetry.hops, follow)?;
        let admin_listener = socket::listen_alone(settings.admin)
            .map_err(|source| StartError::Admin { address: settings.admin, source })?;
        let mut listeners = Listeners::new(settings.workers);
        let plan = listeners.plan(&snapshot.listeners)?;
        let hash = snapshot.hash.clone();
        let shared = Arc::new(Shared {
            telemetry,
            policy: Arc::new(ArcSwap::from_pointee(snapshot)),
            drain: Drain::default(),
            discovery,
            listeners: Mutex::new(listeners),
            last_error: Mutex::default(),
            certificate_error: Mutex::default(),
            replaced: Replaced::default(),
            look: Arc::default(),
            chain: SharedState::default(),
            settings,
        });
        let (alive, workers) = mpsc::channel(1);
        let mut threads = Vec::new();
        for number in 0..shared.settings.workers {
            threads.push(worker_thread::start(&shared, number, alive.clone()).map_err(StartError::Thread)?);
        }
        threads.push(control::start(&shared, requests).map_err(StartError::Thread)?);
        shared.telemetry.process.workers.set(i64::try_from(shared.settings.workers).unwrap_or(i64::MAX));
        shared.telemetry.policy_loaded(&hash, begun.elapsed());
        shared.listeners().carry_out(plan);
        let inside = Arc::new(admin_view::AdminView::new(&shared));
        let admin = admin::spawn(admin_listener, inside, Arc::clone(&shared.telemetry)).map_err(StartError::Thread)?;
        Ok(Self { shared, threads, workers, admin })
    }

    /// The listeners' names and addresses, with the ports that were really taken.
    pub fn listeners(&self) -> Vec<(String, SocketAddr)> {
        self.shared.listeners().addresses()
    }

    /// Where the admin door is.
    pub fn admin(&self) -> SocketAddr {
        self.admin.address()
    }

    /// What is counted and logged.
    pub fn telemetry(&self) -> &Arc<Telemetry> {
        &self.shared.telemetry
    }

    /// Puts another checked policy into force, as a changed file would.
    ///
    /// # Errors
    /// As for [`App::start`]; the old policy stays in force then.
    pub fn replace(&self, model: Model) -> Result<(), StartError> {
        control::replace(&self.shared, model, tokio::time::Instant::now())
    }

    /// Rung, it has the files looked at now; they are seen to change without it too.
    pub fn look(&self) -> Arc<Notify> {
        Arc::clone(&self.shared.look)
    }

    /// Follows the way down, which the admin door can begin too.
    pub fn drain(&self) -> DrainSignal {
        self.shared.drain.signal()
    }

    /// Begins the way down: not ready any more, callers are told to go elsewhere, but still served.
    pub fn leave(&self) {
        self.shared.leave();
    }

    /// Ends the way down: accepts nothing new, lets what is in flight finish for at most `grace`, then stops all threads.
    ///
    /// Returns false if something was cut off.
    pub async fn stop(self, grace: Duration) -> bool {
        self.stop_at(sleep(grace)).await
    }

    /// The same, but what is in flight may finish until `enough` returns. However soon that is, each call that is cut
    /// leaves its record.
    pub async fn stop_at(mut self, enough: impl Future<Output = ()>) -> bool {
        self.shared.leave();
        self.shared.drain.advance(DrainPhase::Closing);
        let all_done = tokio::select! {
            biased;
            _ = self.workers.recv() => true,
            () = enough => false,
        };
        self.shared.drain.advance(DrainPhase::Over);
        let ended = async {
            while !self.threads.iter().all(JoinHandle::is_finished) {
                sleep(LOOK_EVERY).await;
            }
        };
        // They end at once, and the last records are written with them.
        let _stuck = timeout(AT_ONCE, ended).await;
        self.admin.stop();
        self.shared.telemetry.access_log.flush(Duration::from_secs(1));
        all_done
    }
}

impl Shared {
    fn listeners(&self) -> std::sync::MutexGuard<'_, Listeners> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self) {
        if self.drain.advance(DrainPhase::Leaving) {
            self.telemetry.process.draining.set(1);
            tracing::info!("draining: not ready any more; callers are told to go elsewhere");
        }
    }
}
