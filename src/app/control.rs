//! The control thread: resolves names, follows the policy's files and the certificates, and puts changes into force.
//!
//! A bad file changes nothing: the last good policy stays, and a log line, a metric and `/policy` say so.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use tokio::time::Instant;

use crate::admin::PolicyError;
use crate::app::{Shared, StartError};
use crate::policy::load::{self, LoadError};
use crate::policy::model::{LogFormat, LogMode, Model};
use crate::policy::snapshot::Snapshot;
use crate::policy::watch::Watch;
use crate::proxy::trial;
use crate::runtime::drain::Phase;
use crate::runtime::{tasks, worker};
use crate::telemetry::{AccessLogMode, AccessLogSettings, LineFormat, Telemetry};
use crate::upstream::discovery::{self, NoResolver, Requests, SystemResolver};

/// Starts the thread; it ends when the process begins to close.
pub(super) fn start(shared: &Arc<Shared>, requests: Requests) -> io::Result<JoinHandle<io::Result<()>>> {
    let shared = Arc::clone(shared);
    worker::spawn("control", move || async move {
        match SystemResolver::new() {
            Ok((resolver, problem)) => {
                if let Some(problem) = problem {
                    tracing::warn!(
                        problem,
                        "the system's resolver settings cannot be used: names are looked up in the hosts file and at 127.0.0.1"
                    );
                }
                drop(tasks::spawn(discovery::run(resolver, requests)));
            }
            Err(error) => {
                tracing::error!(error, "no name can be resolved");
                drop(tasks::spawn(discovery::run(NoResolver(error), requests)));
            }
        }
        let closing = shared.drain.signal();
        tokio::select! {
            () = follow(&shared) => {}
            () = closing.reached(Phase::Closing) => {}
        }
    })
}

/// Follows the files for as long as the process serves.
async fn follow(shared: &Arc<Shared>) {
    let Some(followed) = shared.settings.policy.clone() else {
        return std::future::pending().await;
    };
    let mut files = certificate_files(shared);
    let mut seen = Seen { policy: followed.fingerprint, certificates: contents(&files) };
    let mut watch = watch(&followed.path, &files);
    // The first look comes at once: the files may have changed since they were read.
    loop {
        let policy = load::fingerprint(&followed.path);
        if policy != seen.policy {
            seen.policy = policy;
            reload(shared, &followed.path);
        }
        let named_now = certificate_files(shared);
        let contents_now = contents(&named_now);
        // Also where the policy names other files now: those that it named before may have changed at the same time.
        if contents_now != seen.certificates {
            reload_certificates(shared);
        }
        seen.certificates = contents_now;
        if named_now != files {
            files = named_now;
            watch = self::watch(&followed.path, &files);
        }
        watch.changed().await;
    }
}

/// What the files looked like when they were last looked at.
struct Seen {
    policy: u64,
    certificates: u64,
}

fn watch(policy: &Path, certificates: &BTreeSet<PathBuf>) -> Watch {
    Watch::new(std::iter::once(policy.to_path_buf()).chain(certificates.iter().cloned()))
}

fn reload(shared: &Arc<Shared>, path: &Path) {
    let begun = Instant::now();
    match load::load(path) {
        Err(error) => refuse(shared, &problems(&error)),
        Ok(model) => match replace(shared, model, begun) {
            Ok(()) => {
                let took = begun.elapsed();
                tracing::info!(hash = shared.policy.load().hash, ?took, "the policy was reloaded");
            }
            Err(error) => refuse(shared, &error.to_string()),
        },
    }
}

fn problems(error: &LoadError) -> String {
    error.render(false)
}

fn refuse(shared: &Shared, message: &str) {
    shared.telemetry.policy_refused();
    let hash = shared.policy.load().hash.clone();
    tracing::error!(
        kept = hash,
        problems = message,
        "the changed policy was refused; the last good one stays in force"
    );
    let error = PolicyError { message: message.to_owned(), at: Instant::now() };
    *shared.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
}

/// Puts a checked policy into force; `begun` is when the work on it began.
pub(super) fn replace(shared: &Arc<Shared>, model: Model, begun: Instant) -> Result<(), StartError> {
    let old = shared.policy.load_full();
    let follow = |cluster: &_| shared.discovery.follow(cluster);
    let service = &shared.settings.service;
    let next = Snapshot::compile(model, service, Some(&old), &shared.telemetry.hops, follow)?;
    let mut doors = shared.doors();
    let plan = doors.plan(&next.listeners)?;
    configure_log(&shared.telemetry, &next.model);
    let hash = next.hash.clone();
    let now = Instant::now();
    next.take_effect(now, |destination, member, change| {
        trial::ejection_changed(&shared.telemetry, destination, member, change, now);
    });
    trial::policy_changed(&shared.telemetry, &old, &next, now);
    shared.policy.store(Arc::new(next));
    doors.carry_out(plan);
    drop(doors);
    shared.telemetry.policy_loaded(&hash, begun.elapsed());
    *shared.last_error.lock().unwrap_or_else(PoisonError::into_inner) = None;
    *shared.replaced.lock().unwrap_or_else(PoisonError::into_inner) = Some(old);
    Ok(())
}

/// Sets the access log to what the policy says.
pub(super) fn configure_log(telemetry: &Telemetry, model: &Model) {
    let mode = match model.access_log.mode {
        LogMode::Off => AccessLogMode::Off,
        LogMode::Errors => AccessLogMode::Errors,
        LogMode::All => AccessLogMode::All,
        LogMode::Sampled => AccessLogMode::Sampled(model.access_log.ratio),
    };
    let format = match model.access_log.format {
        LogFormat::Json => LineFormat::Json,
        LogFormat::Text => LineFormat::Text,
    };
    telemetry.access_log.configure(AccessLogSettings { mode, format });
}

fn certificate_files(shared: &Shared) -> BTreeSet<PathBuf> {
    let policy = shared.policy.load();
    let listeners = policy.listeners.iter().filter_map(|listener| listener.tls.as_ref());
    let upstreams = policy.destinations.iter().filter_map(|one| one.values.tls.as_ref()?.ca.clone());
    listeners.flat_map(|tls| [tls.certificate.clone(), tls.key.clone()]).chain(upstreams).collect()
}

fn contents(files: &BTreeSet<PathBuf>) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    for file in files {
        std::fs::read(file).ok().hash(&mut hasher);
    }
    hasher.finish()
}

fn reload_certificates(shared: &Shared) {
    let doors = shared.doors().certificates();
    let listeners = doors.iter().map(|one| one.reload());
    let policy = shared.policy.load_full();
    let upstreams = policy.destinations.iter().map(|one| one.cluster.load_certificates());
    // Several destinations may have one file.
    let problems: BTreeSet<String> =
        listeners.chain(upstreams).filter_map(Result::err).map(|error| error.to_string()).collect();
    for error in &problems {
        tracing::error!(error, "changed certificates cannot be used; the old ones stay");
    }
    if problems.is_empty() {
        tracing::info!("certificates were reloaded");
    }
    shared.telemetry.certificates_read(problems.is_empty());
    let message = Vec::from_iter(problems).join("\n");
    let error = (!message.is_empty()).then(|| PolicyError { message, at: Instant::now() });
    *shared.certificate_error.lock().unwrap_or_else(PoisonError::into_inner) = error;
}
