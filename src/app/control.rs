//! The control thread: resolves names, follows the policy's files and the certificates, and puts changes into force.
//!
//! A bad file changes nothing: the last good policy stays, and a log line, a metric and `/policy` say so.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::time::Instant;

use crate::admin::PolicyError;
use crate::app::{Shared, StartError};
use crate::net::certificates::SystemRoots;
use crate::policy::load::{self, LoadError};
use crate::policy::model::{LogFormat, LogMode, Model};
use crate::policy::snapshot::Snapshot;
use crate::policy::watch::PolicyWatch;
use crate::proxy::outcome;
use crate::runtime::drain::DrainPhase;
use crate::runtime::{tasks, thread};
use crate::telemetry::{AccessLogMode, AccessLogSettings, LineFormat, Telemetry};
use crate::upstream::discovery::{self, NoResolver, Requests, SystemResolver};

/// Starts the thread; it ends when the process begins to close.
pub(super) fn start(shared: &Arc<Shared>, requests: Requests) -> io::Result<JoinHandle<io::Result<()>>> {
    let shared = Arc::clone(shared);
    thread::spawn(
        "control",
        || (),
        move || async move {
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
                () = closing.reached(DrainPhase::Closing) => {}
            }
        },
    )
}

/// Follows the files for as long as the process serves.
async fn follow(shared: &Arc<Shared>) {
    let Some(followed) = shared.settings.policy.clone() else {
        return std::future::pending().await;
    };
    let mut files = certificate_files(&shared.policy.load().model);
    let mut seen = Seen { policy: followed.fingerprint, waiting: None, certificates: contents(&files) };
    let mut watch = watch(&followed.path, &files);
    // The first look comes at once: the files may have changed since they were read.
    loop {
        look(shared, &followed.path, &mut seen);
        shared.replaced.forget(Instant::now());
        let named_now: BTreeSet<PathBuf> = seen.certificates.keys().chain(seen.waits_for()).cloned().collect();
        if named_now != files {
            files = named_now;
            watch = self::watch(&followed.path, &files);
        }
        tokio::select! {
            () = watch.changed() => {}
            () = shared.look.notified() => {}
        }
    }
}

/// What the files looked like when they were last looked at.
struct Seen {
    policy: u64,
    /// Such a policy, if it did not come into force although there is nothing wrong with it.
    waiting: Option<Waiting>,
    certificates: Contents,
}

impl Seen {
    /// The certificates without which it perhaps did not.
    fn waits_for(&self) -> impl Iterator<Item = &PathBuf> {
        self.waiting.iter().flat_map(|waiting| &waiting.files)
    }
}

/// A good policy for which something else is missing: an address, a certificate. It may be there at the next look.
struct Waiting {
    message: String,
    files: BTreeSet<PathBuf>,
}

/// Puts into force what has changed in the files.
fn look(shared: &Arc<Shared>, path: &Path, seen: &mut Seen) {
    let (policy, before) = (load::fingerprint(path), shared.policy.load_full());
    let waiting = seen.waiting.take().filter(|_| policy == seen.policy);
    if policy != seen.policy || waiting.is_some() {
        seen.policy = policy;
        seen.waiting = reload(shared, path, waiting, &mut seen.certificates);
    }
    let in_force = shared.policy.load_full();
    let contents_now = contents(&certificate_files(&in_force.model));
    // Files that the policy names from now on have been read with it.
    let has_changed = |(file, now)| seen.certificates.get(file).is_some_and(|before| before != now);
    let is_settled = || Arc::ptr_eq(&before, &in_force) || lock(&shared.certificate_error).is_none();
    // The file that could not be used may be one that the policy does not name any more.
    if contents_now.iter().any(has_changed) || !is_settled() {
        reload_certificates(shared);
    }
    seen.certificates = contents_now;
}

fn watch(policy: &Path, certificates: &BTreeSet<PathBuf>) -> PolicyWatch {
    PolicyWatch::new(std::iter::once(policy.to_path_buf()).chain(certificates.iter().cloned()))
}

/// Puts the policy of the files into force, or says why not. Returns it if it is to be tried again; `before` is what
/// came of the same files at the last look.
fn reload(shared: &Arc<Shared>, path: &Path, before: Option<Waiting>, certificates: &mut Contents) -> Option<Waiting> {
    let begun = Instant::now();
    let model = match load::load(path) {
        Ok(model) => model,
        Err(error) => {
            refuse(shared, &problems(&error));
            return None;
        }
    };
    // A policy that waits is loaded again and again.
    if before.is_none() {
        log_warnings(&model);
    }
    let files = certificate_files(&model);
    // What they hold before they are read: if they change afterwards, the next look is to see it.
    for (file, content) in contents(&files) {
        certificates.entry(file).or_insert(content);
    }
    let Err(error) = replace(shared, model, begun) else {
        let took = begun.elapsed();
        tracing::info!(hash = shared.policy.load().hash, ?took, "the policy was reloaded");
        return None;
    };
    let message = error.to_string();
    if before.is_none_or(|before| before.message != message) {
        refuse(shared, &message);
    }
    Some(Waiting { message, files })
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
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
    *lock(&shared.last_error) = Some(error);
}

/// Logs what the policy is warned of.
pub(super) fn log_warnings(model: &Model) {
    for warning in model.warnings.problems.iter() {
        tracing::warn!(hint = warning.hint, "{warning}");
    }
}

/// Puts a checked policy into force; `begun` is when the work on it began.
pub(super) fn replace(shared: &Arc<Shared>, model: Model, begun: Instant) -> Result<(), StartError> {
    let old = shared.policy.load_full();
    let follow = |cluster: &_| shared.discovery.follow(cluster);
    let service = &shared.settings.service;
    let next = Snapshot::compile(model, service, Some(&old), &shared.telemetry.hops, follow)?;
    let mut listeners = shared.listeners();
    let plan = listeners.plan(&next.listeners)?;
    configure_log(&shared.telemetry, &next.model);
    let hash = next.hash.clone();
    let now = Instant::now();
    next.take_effect(now, |destination, member, change| {
        destination.cluster.ejection_changed(&shared.telemetry, member, change, now);
    });
    outcome::policy_changed(&shared.telemetry, &old, &next, now);
    shared.policy.store(Arc::new(next));
    listeners.carry_out(plan);
    listeners.renew();
    drop(listeners);
    shared.telemetry.policy_loaded(&hash, begun.elapsed());
    *lock(&shared.last_error) = None;
    shared.replaced.keep(old, now);
    Ok(())
}

/// How long a replaced policy is kept at least.
const KEEP: Duration = Duration::from_secs(60);

/// The policy before the present one, so that it is this thread that takes it apart, and not a worker between two calls.
#[derive(Default)]
pub(super) struct Replaced(Mutex<Option<(Instant, Arc<Snapshot>)>>);

impl Replaced {
    fn keep(&self, policy: Arc<Snapshot>, now: Instant) {
        *lock(&self.0) = Some((now, policy));
    }

    /// Lets go of one that has been kept long enough: with it go its names, which are resolved for as long as it is there.
    fn forget(&self, now: Instant) {
        let mut kept = lock(&self.0);
        drop(kept.take_if(|(since, _)| now.saturating_duration_since(*since) >= KEEP));
    }
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

fn certificate_files(model: &Model) -> BTreeSet<PathBuf> {
    let listeners = model.listeners.iter().filter_map(|listener| listener.tls.as_ref());
    let upstreams = model.destinations.iter().filter_map(|one| one.tls.as_ref()?.ca.clone());
    listeners.flat_map(|tls| [tls.certificate.clone(), tls.key.clone()]).chain(upstreams).collect()
}

/// Files, and a number for what each of them holds.
type Contents = BTreeMap<PathBuf, u64>;

fn contents(files: &BTreeSet<PathBuf>) -> Contents {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let content = |file: &PathBuf| {
        let mut hasher = DefaultHasher::new();
        std::fs::read(file).ok().hash(&mut hasher);
        (file.clone(), hasher.finish())
    };
    files.iter().map(content).collect()
}

fn reload_certificates(shared: &Shared) {
    let listeners = shared.listeners().certificates();
    let listeners = listeners.iter().map(|one| one.reload());
    let policy = shared.policy.load_full();
    let roots = SystemRoots::default();
    let upstreams = policy.destinations.iter().map(|one| one.cluster.load_certificates(&roots));
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
    *lock(&shared.certificate_error) = error;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Sink;

    #[test]
    fn a_replaced_policy_is_kept_for_a_minute_and_no_longer() {
        let yaml = "apiVersion: hopguard.dev/v1alpha1\nkind: Policy\n\
                    listeners: [{ name: in, bind: \"127.0.0.1:0\", to: app }]\n\
                    destinations: [{ name: app, endpoints: [\"127.0.0.1:1\"] }]\n";
        let model = load::load_str("policy.yaml", yaml).unwrap();
        let telemetry = Telemetry::new(Sink::memory().0);
        let policy = Arc::new(Snapshot::compile(model, "shop", None, &telemetry.hops, |_| ()).unwrap());
        let (replaced, now) = (Replaced::default(), Instant::now());
        replaced.keep(Arc::clone(&policy), now);
        for (after, holders) in [(0, 2), (59, 2), (60, 1), (61, 1)] {
            replaced.forget(now + Duration::from_secs(after));
            assert_eq!(Arc::strong_count(&policy), holders, "after {after} s");
        }
    }
}
