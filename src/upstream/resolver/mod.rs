//! Resolves names as the system does: by `/etc/hosts`, then by the name servers of `/etc/resolv.conf`.
//!
//! A name passes the hosts file, `search` (search domains, address families), `servers` (order, attempts, timeouts) and
//! `transport` (hickory). The files are compared once a second with the state in which they were read, not watched: in a
//! container they are often single files mounted from the host, whose changes cause no event in `/etc`.

mod files;
mod search;
mod servers;
mod settings;
mod transport;

use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use hickory_resolver::Hosts;
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RecordType};

use crate::upstream::resolver::files::{FileStates, ResolverFiles};
use crate::upstream::resolver::servers::Servers;
use crate::upstream::resolver::settings::ResolverSettings;
use crate::upstream::resolver::transport::RemoteServer;

pub use search::{PendingFamily, Resolved};
pub use servers::{AddressFamily, FamilyAnswer};
pub use settings::ResolverEnvironment;

/// Result of a look at the files of the settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettingsLook {
    /// They are as they were read.
    Same,
    /// They are being written: another look is due soon.
    Settling,
    /// They were read again, and names may have other addresses now.
    Changed,
}

/// Resolves names; tests use implementations of their own.
pub trait Resolve {
    /// The IPv4 and IPv6 addresses of `name`.
    ///
    /// # Errors
    /// Why there is no address, as text for log lines and local replies.
    fn resolve(&self, name: &str) -> impl Future<Output = Result<Resolved, String>>;

    /// Reads the settings again if they have changed.
    fn look_at_settings(&self) -> SettingsLook {
        SettingsLook::Same
    }
}

/// Resolves names by the system's settings.
pub struct SystemResolver {
    files: ResolverFiles,
    environment: ResolverEnvironment,
    /// The files as they were read.
    read: RefCell<FileStates>,
    /// The files at the last look, if they have changed since they were read.
    unsettled: Cell<Option<FileStates>>,
    current: RefCell<ResolverState>,
}

/// What the files say. Resolutions that have begun go on with the settings that they began with.
#[derive(Clone)]
struct ResolverState {
    hosts: Rc<Hosts>,
    servers: Rc<Servers<RemoteServer>>,
}

impl SystemResolver {
    /// Reads the system's settings; logs what of them cannot be used.
    ///
    /// # Errors
    /// If no resolver can be built.
    pub fn new(environment: ResolverEnvironment) -> Result<Self, String> {
        Self::with_files(ResolverFiles::system(), environment)
    }

    fn with_files(files: ResolverFiles, environment: ResolverEnvironment) -> Result<Self, String> {
        // Before the files are read, so that no later change is missed.
        let read = files.states();
        let current = read_settings(&files, &environment)?;
        Ok(Self {
            files,
            environment,
            read: RefCell::new(read),
            unsettled: Cell::default(),
            current: RefCell::new(current),
        })
    }
}

impl Resolve for SystemResolver {
    async fn resolve(&self, name: &str) -> Result<Resolved, String> {
        let ResolverState { hosts, servers } = self.current.borrow().clone();
        if let Ok(address) = name.parse::<IpAddr>() {
            return Ok(Resolved::new(vec![address], Duration::MAX));
        }
        match in_hosts(&hosts, name) {
            Some(resolved) => Ok(resolved),
            None => search::search(&servers, name).await,
        }
    }

    fn look_at_settings(&self) -> SettingsLook {
        let mut now = self.files.states();
        if self.current.borrow().servers.settings().no_reload {
            now.resolv_conf = self.read.borrow().resolv_conf;
        }
        if now == *self.read.borrow() {
            self.unsettled.set(None);
            return SettingsLook::Same;
        }
        // A file that is written in place is incomplete for a moment.
        if self.unsettled.replace(Some(now)) != Some(now) {
            return SettingsLook::Settling;
        }
        self.unsettled.set(None);
        *self.read.borrow_mut() = now;
        match read_settings(&self.files, &self.environment) {
            Ok(settings) => {
                let settings_now = settings.servers.settings();
                let (servers, search) = (&settings_now.servers, &settings_now.search);
                tracing::info!(
                    ?servers,
                    ?search,
                    "the system's resolver settings or hosts file have changed and were read again"
                );
                *self.current.borrow_mut() = settings;
            }
            Err(error) => tracing::error!(error, "the changed resolver settings cannot be used; the old ones stay"),
        }
        SettingsLook::Changed
    }
}

/// Reads the files; logs what of them cannot be used.
fn read_settings(files: &ResolverFiles, environment: &ResolverEnvironment) -> Result<ResolverState, String> {
    let (settings, problems) = match files.resolv_conf() {
        Ok(text) => ResolverSettings::parse(&text, environment),
        Err(error) => {
            let (settings, _) = ResolverSettings::parse("", environment);
            (settings, vec![format!("{error}; the name server 127.0.0.1 is used")])
        }
    };
    if !problems.is_empty() {
        let problem = problems.join("; ");
        tracing::warn!(
            problem,
            "the system's resolver settings cannot be used, or not all of them: check /etc/resolv.conf"
        );
    }
    let mut hosts = Hosts::default();
    // Without the file, or after an error in it, the names read so far count.
    if let Ok(text) = files.hosts() {
        hosts.read_hosts_conf(text.as_bytes()).ok();
    }
    let settings = Rc::new(settings);
    let servers: Result<Vec<_>, _> =
        settings.servers.iter().map(|address| RemoteServer::new(*address, &settings)).collect();
    Ok(ResolverState { hosts: Rc::new(hosts), servers: Rc::new(Servers::new(Rc::clone(&settings), servers?)) })
}

/// The addresses of a name in the hosts file. If it has any, no name server is asked, also for the other family; search
/// domains are not tried.
fn in_hosts(hosts: &Hosts, name: &str) -> Option<Resolved> {
    let name = Name::from_str_relaxed(name.to_lowercase()).ok()?;
    let find = |record_type| {
        let lookup = hosts.lookup_static_host(&Query::query(name.clone(), record_type))?;
        transport::addresses(&lookup).ok()
    };
    let found: Vec<FamilyAnswer> = [RecordType::AAAA, RecordType::A].into_iter().filter_map(find).collect();
    let ttl = found.iter().map(|answer| answer.ttl).min()?;
    Some(Resolved::new(found.into_iter().flat_map(|answer| answer.addresses).collect(), ttl))
}

#[cfg(test)]
mod tests;
