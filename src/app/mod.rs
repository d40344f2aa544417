//! Level 8: builds, starts and drains the parts; the only module that imports all of them.
//!
//! Threads: one per worker (the data path), `control` (discovery, file watching, reloads), `admin` (the admin server),
//! `access-log`, and `log` for the program log, which the command line starts first. The threads share the policy snapshot,
//! the drain phase and the telemetry.

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

use control::PreviousPolicy;
use listeners::Listeners;

/// Why a policy could not be applied, or the process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address of a listener cannot be bound.
    #[error("listener {name}: cannot listen on {bind}: {source}")]
    Listen {
        /// Name of the listener.
        name: String,
        /// Address of the listener.
        bind: SocketAddr,
        /// Error of the system.
        source: io::Error,
    },
    /// Certificates cannot be used.
    #[error("certificates: {0}")]
    Certificates(#[from] CertificateError),
    /// The admin address cannot be bound.
    #[error("the admin server cannot listen on {address}: {source}; choose another address with --admin")]
    Admin {
        /// The admin address.
        address: SocketAddr,
        /// Error of the system.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

/// State shared by the threads.
struct Shared {
    settings: Settings,
    telemetry: Arc<Telemetry>,
    policy: Arc<ArcSwap<Snapshot>>,
    drain: Drain,
    discovery: Discovery,
    listeners: Mutex<Listeners>,
    last_error: Mutex<Option<PolicyError>>,
    /// Why changed certificates are not in use; `None`: the last certificate reload succeeded.
    certificate_error: Mutex<Option<PolicyError>>,
    /// The policy that the current one has replaced.
    previous: PreviousPolicy,
    /// Notified to check the files for changes now.
    reload: Arc<Notify>,
    /// In-flight registry, retry history and correlation counters of all workers.
    correlation: SharedState,
}

/// Time limit for the threads to end after the last drain phase, and the interval at which they are polled.
const THREAD_EXIT_LIMIT: Duration = Duration::from_secs(1);
const THREAD_POLL: Duration = Duration::from_millis(2);

/// A running hopguard.
pub struct App {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<io::Result<()>>>,
    /// Closed by the end of the last worker.
    workers: mpsc::Receiver<()>,
    admin: AdminServer,
}

impl App {
    /// Starts hopguard with a checked policy. If `settings.policy` is set, changes of its files are loaded while running.
    ///
    /// # Errors
    /// If an address is in use, a certificate cannot be used, or the system cannot start a thread. No thread keeps running then.
    pub fn start(settings: Settings, model: Model, sink: Sink) -> Result<Self, StartError> {
        let telemetry = Telemetry::new(sink);
        let (discovery, requests) = Discovery::new();
        let begun = tokio::time::Instant::now();
        control::log_warnings(&model);
        control::configure_log(&telemetry, &model);
        let follow = |cluster: &_| discovery.keep_resolved(cluster);
        let snapshot = Snapshot::compile(model, &settings.service, None, &telemetry.hops, follow)?;
        let admin_listener = socket::listen_exclusive(settings.admin)
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
            previous: PreviousPolicy::default(),
            reload: Arc::default(),
            correlation: SharedState::default(),
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
        shared.listeners().apply(plan);
        let inside = Arc::new(admin_view::AdminView::new(&shared));
        let admin = admin::spawn(admin_listener, inside, Arc::clone(&shared.telemetry)).map_err(StartError::Thread)?;
        Ok(Self { shared, threads, workers, admin })
    }

    /// Names and bound addresses of the listeners; a configured port 0 is replaced by the port that the system chose.
    pub fn listeners(&self) -> Vec<(String, SocketAddr)> {
        self.shared.listeners().addresses()
    }

    /// The bound admin address.
    pub fn admin(&self) -> SocketAddr {
        self.admin.address()
    }

    /// Metrics and access log.
    pub fn telemetry(&self) -> &Arc<Telemetry> {
        &self.shared.telemetry
    }

    /// Applies another checked policy, as a changed file would.
    ///
    /// # Errors
    /// As for [`App::start`]; the current policy stays in force.
    pub fn replace(&self, model: Model) -> Result<(), StartError> {
        control::replace(&self.shared, model, tokio::time::Instant::now())
    }

    /// A handle that makes the control thread check the policy and certificate files now, without waiting for a file event.
    pub fn reload_trigger(&self) -> Arc<Notify> {
        Arc::clone(&self.shared.reload)
    }

    /// The drain phase. `POST /drain` on the admin address can begin the drain too.
    pub fn drain(&self) -> DrainSignal {
        self.shared.drain.signal()
    }

    /// Begins the drain: `/ready` answers 503 and responses ask callers to close their connections; calls are still accepted.
    pub fn begin_drain(&self) {
        self.shared.begin_drain();
    }

    /// Finishes the drain: closes the listeners, waits at most `grace` for calls in flight, then stops all threads.
    ///
    /// Returns false if calls in flight were cut off.
    pub async fn stop(self, grace: Duration) -> bool {
        self.stop_when(sleep(grace)).await
    }

    /// Like [`App::stop`], but waits for calls in flight until `grace_over` returns. Every call that is cut off is recorded,
    /// however soon that is.
    pub async fn stop_when(mut self, grace_over: impl Future<Output = ()>) -> bool {
        self.shared.begin_drain();
        self.shared.drain.advance(DrainPhase::Closing);
        let all_done = tokio::select! {
            biased;
            _ = self.workers.recv() => true,
            () = grace_over => false,
        };
        self.shared.drain.advance(DrainPhase::Over);
        let ended = async {
            while !self.threads.iter().all(JoinHandle::is_finished) {
                sleep(THREAD_POLL).await;
            }
        };
        // The threads end at once and write their last records. One that is stuck does not delay the shutdown further.
        let _timed_out = timeout(THREAD_EXIT_LIMIT, ended).await;
        self.admin.stop();
        self.shared.telemetry.access_log.flush(Duration::from_secs(1));
        all_done
    }
}

impl Shared {
    fn listeners(&self) -> std::sync::MutexGuard<'_, Listeners> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_drain(&self) {
        if self.drain.advance(DrainPhase::Leaving) {
            self.telemetry.process.draining.set(1);
            tracing::info!("draining: /ready answers 503; responses ask callers to close their connections");
        }
    }
}
