//! The control thread: resolves names, watches the policy and certificate files, and applies their changes.
//!
//! An invalid policy changes nothing: the last valid one stays in force, and a log line, a metric and `/policy` report the problems.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::time::Instant;

use crate::admin::PolicyError;
use crate::app::{Shared, StartError};
use crate::config;
use crate::net::certificates::SystemRoots;
use crate::policy::load::{self, LoadError};
use crate::policy::model::{LogFormat, LogMode, Model};
use crate::policy::snapshot::Snapshot;
use crate::policy::watch::PolicyWatch;
use crate::proxy::breaker_and_ejection;
use crate::runtime::drain::DrainPhase;
use crate::runtime::{tasks, thread};
use crate::telemetry::{AccessLogMode, AccessLogSettings, LineFormat, Telemetry};
use crate::upstream::discovery::{self, NoResolver, Requests};
use crate::upstream::resolver::SystemResolver;

/// Starts the thread; it ends in the drain phase [`DrainPhase::Closing`].
pub(super) fn start(shared: &Arc<Shared>, requests: Requests) -> io::Result<JoinHandle<io::Result<()>>> {
    let shared = Arc::clone(shared);
    thread::spawn(
        "control",
        || (),
        move || async move {
            match SystemResolver::new(config::resolver_environment()) {
                Ok(resolver) => drop(tasks::spawn(discovery::run(resolver, requests))),
                Err(error) => {
                    tracing::error!(error, "cannot start a resolver; no name can be resolved");
                    drop(tasks::spawn(discovery::run(NoResolver(error), requests)));
                }
            }
            let closing = shared.drain.signal();
            tokio::select! {
                () = watch_files(&shared) => {}
                () = closing.reached(DrainPhase::Closing) => {}
            }
        },
    )
}

/// Applies changes of the files; never returns.
async fn watch_files(shared: &Arc<Shared>) {
    let Some(followed) = shared.settings.policy.clone() else {
        return std::future::pending().await;
    };
    let mut files = certificate_files(&shared.policy.load().model);
    let mut seen = SeenFiles { policy: followed.fingerprint, pending: None, certificates: hashes(&files) };
    let mut watch = new_watch(&followed.path, &files);
    // The first check runs at once: the files may have changed since they were read.
    loop {
        check_files(shared, &followed.path, &mut seen);
        shared.previous.release_expired(Instant::now());
        let named_now: BTreeSet<PathBuf> = seen.certificates.keys().chain(seen.pending_files()).cloned().collect();
        if named_now != files {
            files = named_now;
            watch = new_watch(&followed.path, &files);
        }
        tokio::select! {
            () = watch.changed() => {}
            () = shared.reload.notified() => {}
        }
    }
}

/// State of the files at the last check.
struct SeenFiles {
    /// Fingerprint of the policy files.
    policy: u64,
    /// The policy of these files, if it is valid but could not be applied.
    pending: Option<PendingPolicy>,
    /// Hashes of the certificate files.
    certificates: ContentHashes,
}

impl SeenFiles {
    /// The certificate files of the pending policy.
    fn pending_files(&self) -> impl Iterator<Item = &PathBuf> {
        self.pending.iter().flat_map(|pending| &pending.files)
    }
}

/// A valid policy that could not be applied because an address is in use or a certificate is missing. Every check tries it again.
struct PendingPolicy {
    /// The error of the last check.
    message: String,
    /// Certificate files that the policy names.
    files: BTreeSet<PathBuf>,
}

/// Applies the changes of the policy and certificate files since the last check.
fn check_files(shared: &Arc<Shared>, path: &Path, seen: &mut SeenFiles) {
    let (policy, before) = (load::fingerprint(path), shared.policy.load_full());
    let pending = seen.pending.take().filter(|_| policy == seen.policy);
    if policy != seen.policy || pending.is_some() {
        seen.policy = policy;
        seen.pending = reload(shared, path, pending, &mut seen.certificates);
    }
    let in_force = shared.policy.load_full();
    let hashes_now = hashes(&certificate_files(&in_force.model));
    // Files that only the new policy names were read together with it.
    let has_changed = |(file, now)| seen.certificates.get(file).is_some_and(|before| before != now);
    let is_settled = || Arc::ptr_eq(&before, &in_force) || lock(&shared.certificate_error).is_none();
    // After a policy change, the file of a certificate error may be one that the policy does not name any more: check again.
    if hashes_now.iter().any(has_changed) || !is_settled() {
        reload_certificates(shared);
    }
    seen.certificates = hashes_now;
}

fn new_watch(policy: &Path, certificates: &BTreeSet<PathBuf>) -> PolicyWatch {
    PolicyWatch::new(std::iter::once(policy.to_path_buf()).chain(certificates.iter().cloned()))
}

/// Loads the policy files and applies the policy, or reports the error. Returns the policy if the next check is to try it again;
/// `before` is the result for the same files at the last check.
fn reload(
    shared: &Arc<Shared>,
    path: &Path,
    before: Option<PendingPolicy>,
    certificates: &mut ContentHashes,
) -> Option<PendingPolicy> {
    let begun = Instant::now();
    let model = match load::load(path) {
        Ok(model) => model,
        Err(error) => {
            reject(shared, &problems(&error));
            return None;
        }
    };
    // A policy that waits is loaded again and again.
    if before.is_none() {
        log_warnings(&model);
    }
    let files = certificate_files(&model);
    // Hashed before the files are read, so that the next check sees every later change.
    for (file, hash) in hashes(&files) {
        certificates.entry(file).or_insert(hash);
    }
    let Err(error) = replace(shared, model, begun) else {
        let took = begun.elapsed();
        tracing::info!(hash = shared.policy.load().hash, ?took, "the policy was reloaded");
        return None;
    };
    let message = error.to_string();
    if before.is_none_or(|before| before.message != message) {
        reject(shared, &message);
    }
    Some(PendingPolicy { message, files })
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn problems(error: &LoadError) -> String {
    error.render(false)
}

/// Reports a policy that was not applied, in metric, log and `/policy`.
fn reject(shared: &Shared, message: &str) {
    shared.telemetry.policy_refused();
    let hash = shared.policy.load().hash.clone();
    tracing::error!(
        kept = hash,
        problems = message,
        "the changed policy was rejected; the last valid policy stays in force"
    );
    let error = PolicyError { message: message.to_owned(), at: Instant::now() };
    *lock(&shared.last_error) = Some(error);
}

/// Logs each warning of a policy that is applied.
pub(super) fn log_warnings(model: &Model) {
    for warning in model.warnings.problems.iter() {
        tracing::warn!(hint = warning.hint, "{warning}");
    }
}

/// Applies a checked policy. The load duration in the metrics is measured from `begun`.
///
/// # Errors
/// If an address is in use or a certificate cannot be used; the current policy stays in force.
pub(super) fn replace(shared: &Arc<Shared>, model: Model, begun: Instant) -> Result<(), StartError> {
    let old = shared.policy.load_full();
    let follow = |cluster: &_| shared.discovery.keep_resolved(cluster);
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
    breaker_and_ejection::policy_changed(&shared.telemetry, &old, &next, now);
    shared.policy.store(Arc::new(next));
    listeners.apply(plan);
    listeners.refresh_policy();
    drop(listeners);
    shared.telemetry.policy_loaded(&hash, begun.elapsed());
    *lock(&shared.last_error) = None;
    shared.previous.keep(old, now);
    Ok(())
}

/// Minimum time for which a replaced policy is kept.
const KEEP_PREVIOUS: Duration = Duration::from_secs(60);

/// The policy that the current one has replaced. It is kept so that the control thread frees it, and not a worker between two
/// calls.
#[derive(Default)]
pub(super) struct PreviousPolicy(Mutex<Option<(Instant, Arc<Snapshot>)>>);

impl PreviousPolicy {
    fn keep(&self, policy: Arc<Snapshot>, now: Instant) {
        *lock(&self.0) = Some((now, policy));
    }

    /// Releases the policy after [`KEEP_PREVIOUS`]. This also ends the resolution of its DNS names.
    fn release_expired(&self, now: Instant) {
        let mut kept = lock(&self.0);
        drop(kept.take_if(|(since, _)| now.saturating_duration_since(*since) >= KEEP_PREVIOUS));
    }
}

/// Configures the access log by the policy.
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

/// Files with a hash of their content.
type ContentHashes = BTreeMap<PathBuf, u64>;

fn hashes(files: &BTreeSet<PathBuf>) -> ContentHashes {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let hash = |file: &PathBuf| {
        let mut hasher = DefaultHasher::new();
        std::fs::read(file).ok().hash(&mut hasher);
        (file.clone(), hasher.finish())
    };
    files.iter().map(hash).collect()
}

fn reload_certificates(shared: &Shared) {
    let listeners = shared.listeners().certificates();
    let listeners = listeners.iter().map(|one| one.reload());
    let policy = shared.policy.load_full();
    let roots = SystemRoots::default();
    let upstreams = policy.destinations.iter().map(|one| one.cluster.load_certificates(&roots));
    // A set, because several destinations may name the same file.
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
        let (previous, now) = (PreviousPolicy::default(), Instant::now());
        previous.keep(Arc::clone(&policy), now);
        for (after, holders) in [(0, 2), (59, 2), (60, 1), (61, 1)] {
            previous.release_expired(now + Duration::from_secs(after));
            assert_eq!(Arc::strong_count(&policy), holders, "after {after} s");
        }
    }
}
