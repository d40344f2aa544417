//! Check of the shapes of all files: makes one checked model, or reports all problems.
//!
//! A check never stops: it reports a problem, uses a harmless value instead, and continues. The model may be used if no
//! error was reported. Checks that need all files (names, hosts, destinations without a listener) come last, and are
//! skipped if a file could not be read.

mod destination;
mod layers;
mod listener;
mod route;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use super::model::{AccessLogConfig, Listener, ListenerTarget, LogMode, Model};
use super::spec::{AccessLogSpec, DefaultsSpec, PolicySpec};
use crate::problems::{Cursor, InvalidValue, Origin, Warnings};
use crate::rules::layers::RuleValues;
use crate::rules::mode::Modes;
use crate::upstream::spec::Connections;

/// One file that was read.
pub struct Document<'a> {
    /// Its folder, the base of relative paths in it.
    pub folder: &'a Path,
    /// Its content.
    pub spec: PolicySpec,
    /// A cursor at its root.
    pub at: Cursor<'a>,
}

/// Values of `defaults`, over the built-in ones.
#[derive(Clone)]
struct Layer {
    rules: RuleValues,
    connections: Connections,
}

/// Checks all files together. `is_complete`: all files of the policy could be read.
///
/// The result may be used only if no error was reported.
pub fn check(documents: &[Document<'_>], files: Vec<Arc<str>>, is_complete: bool) -> Model {
    let head = head(documents);
    let mut destinations = Vec::new();
    let mut names = Names::default();
    for document in documents {
        let list = document.at.key("destinations");
        for (index, spec) in document.spec.destinations.iter().flatten().enumerate() {
            let at = list.index(index);
            destinations.push(destination::check(spec, &head.layer, document.folder, &at));
            names.claim("destination", spec.name.as_deref(), &at.key("name"));
        }
    }
    destination::check_hosts(documents);
    let mut model = Model {
        service: head.service,
        access_log: head.access_log,
        modes: head.modes,
        listeners: Vec::new(),
        destinations,
        hash: 0,
        files,
        warnings: Warnings::default(),
    };
    check_listeners(documents, &mut model, is_complete);
    // A `to` without its destination was meant for one of the destinations.
    let is_lost =
        |listener: &Listener| matches!(listener.target, ListenerTarget::To(at) if at >= model.destinations.len());
    if is_complete && !model.listeners.iter().any(is_lost) {
        check_reached(documents, &model);
    }
    model.hash = model.content_hash();
    model
}

struct Head {
    service: Option<String>,
    access_log: AccessLogConfig,
    modes: Modes,
    layer: Layer,
}

/// The entries that may be in one file only.
fn head(documents: &[Document<'_>]) -> Head {
    let mut layer = Layer { rules: RuleValues::BUILT_IN, connections: Connections::built_in() };
    let (mut service, mut access_log, mut modes) = (None, AccessLogConfig::default(), Modes::built_in());
    let mut seen: HashMap<&str, Origin> = HashMap::new();
    for Document { spec, at, .. } in documents {
        at.missing("apiVersion", "write `apiVersion: hopguard.dev/v1alpha1`");
        at.missing("kind", "write `kind: Policy`");
        for key in ["service", "accessLog", "rules", "defaults"] {
            let at = at.key(key);
            if !at.is_given() {
                continue;
            }
            match seen.get(key) {
                Some(first) => at.report(format!("`{key}` is set already at {first}"), "write it in one file only"),
                None => drop(seen.insert(key, at.origin())),
            }
        }
        if let Some(name) = &spec.service {
            check_name(name, &at.key("service"));
            service = Some(name.clone());
        }
        if let Some(spec) = &spec.access_log {
            access_log = check_access_log(spec, &at.key("accessLog"));
        }
        if let Some(spec) = &spec.rules {
            modes = spec.check(&modes, &at.key("rules"));
        }
        if let Some(spec) = &spec.defaults {
            layer = check_defaults(spec, &layer, &at.key("defaults"));
        }
    }
    Head { service, access_log, modes, layer }
}

fn check_defaults(spec: &DefaultsSpec, below: &Layer, at: &Cursor<'_>) -> Layer {
    let connections = match &spec.connections {
        Some(spec) => spec.check(&below.connections, &at.key("connections")),
        None => below.connections.clone(),
    };
    Layer { rules: spec.check_rules(&below.rules, at), connections }
}

fn check_access_log(spec: &AccessLogSpec, at: &Cursor<'_>) -> AccessLogConfig {
    let built_in = AccessLogConfig::default();
    let mode = spec.mode.unwrap_or(built_in.mode);
    if spec.ratio.is_some() && mode != LogMode::Sampled && !(spec.mode.is_none() && at.key("mode").is_given()) {
        at.key("ratio").report("`ratio` has no effect without `mode: sampled`", "set the mode, or remove the ratio");
    }
    let ratio = spec.ratio.map_or(built_in.ratio, |ratio| ratio.0);
    AccessLogConfig { mode, format: spec.format.unwrap_or(built_in.format), ratio }
}

/// A destination as the target of a listener's `to`.
struct Known<'a> {
    name: &'a str,
    /// True also if they were refused.
    has_endpoints: bool,
    origin: Origin,
}

fn known<'a>(documents: &'a [Document<'_>]) -> Vec<Known<'a>> {
    let mut known = Vec::new();
    for document in documents {
        let list = document.at.key("destinations");
        for (index, spec) in document.spec.destinations.iter().flatten().enumerate() {
            let at = list.index(index);
            let has_endpoints = at.key("endpoints").is_given();
            known.push(Known { name: spec.name.as_deref().unwrap_or_default(), has_endpoints, origin: at.origin() });
        }
    }
    known
}

fn check_listeners(documents: &[Document<'_>], model: &mut Model, is_complete: bool) {
    let known = known(documents);
    // A destination with an unreadable name may be the intended one.
    let is_complete = is_complete && known.iter().all(|destination| !destination.name.is_empty());
    let (mut names, mut binds) = (Names::default(), Vec::<(SocketAddr, Origin)>::new());
    for document in documents {
        let list = document.at.key("listeners");
        for (index, spec) in document.spec.listeners.iter().flatten().enumerate() {
            let at = list.index(index);
            let listener = listener::check(spec, &known, is_complete, document.folder, &at);
            names.claim("listener", spec.name.as_deref(), &at.key("name"));
            // Port 0 is a new port each time.
            if let Some(bind) = spec.bind.filter(|bind| bind.0.port() != 0) {
                let bind_at = at.key("bind");
                match binds.iter().find(|(other, _)| clash(bind.0, *other)) {
                    Some((other, first)) if *other == bind.0 => bind_at.report(
                        format!("`{}` is taken already by the listener at {first}", bind.0),
                        "choose another address or port",
                    ),
                    Some((other, first)) => bind_at.report(
                        format!("`{}` and `{other}` of the listener at {first} overlap", bind.0),
                        "choose another port for one of them: an address of zeros is every address of the machine",
                    ),
                    None => binds.push((bind.0, bind_at.origin())),
                }
            }
            model.listeners.push(listener);
        }
    }
}

/// Whether the system cannot bind both addresses. `0.0.0.0` covers IPv4, `[::]` both.
fn clash(one: SocketAddr, other: SocketAddr) -> bool {
    let takes = |all: SocketAddr, one: SocketAddr| all.ip().is_unspecified() && (all.is_ipv6() || one.is_ipv4());
    one.port() == other.port() && (one.ip() == other.ip() || takes(one, other) || takes(other, one))
}

/// Reports destinations that no call can reach: without hosts and without a listener's `to`.
fn check_reached(documents: &[Document<'_>], model: &Model) {
    let mut at_destination = 0;
    for document in documents {
        let list = document.at.key("destinations");
        for index in 0..document.spec.destinations.as_ref().map_or(0, Vec::len) {
            let (at, destination) = (list.index(index), &model.destinations[at_destination]);
            let is_target = model.listeners.iter().any(|l| l.target == ListenerTarget::To(at_destination));
            // Of two destinations with the same name, only the name is reported.
            let is_second = || model.destinations[..at_destination].iter().any(|one| one.name == destination.name);
            if !is_target && !at.key("hosts").is_given() && !destination.name.is_empty() && !is_second() {
                at.key("name").report(
                    format!("destination `{}` can never be reached", destination.name),
                    "give it `hosts`, or name it in the `to` of a listener",
                );
            }
            at_destination += 1;
        }
    }
}

/// Names that must be unique.
#[derive(Default)]
struct Names<'a>(HashMap<&'a str, Origin>);

impl<'a> Names<'a> {
    fn claim(&mut self, kind: &str, name: Option<&'a str>, at: &Cursor<'_>) {
        let Some(name) = name else { return };
        match self.0.get(name) {
            Some(first) => {
                at.report(format!("another {kind} is named `{name}` already, at {first}"), "choose another name");
            }
            None => drop(self.0.insert(name, at.origin())),
        }
    }
}

/// A name becomes a metric label and part of header values: 1 to 63 letters, digits, `-`, `_` or `.`.
///
/// # Errors
/// Other names, with a hint.
pub fn good_name(name: &str) -> Result<(), InvalidValue> {
    let is_good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if (1..=63).contains(&name.len()) && name.bytes().all(is_good) {
        return Ok(());
    }
    Err(InvalidValue::new(format!("`{name}` is not a valid name"), "write 1 to 63 letters, digits, `-`, `_` or `.`"))
}

fn check_name(name: &str, at: &Cursor<'_>) {
    if let Err(fault) = good_name(name) {
        at.report_fault(fault);
    }
}

/// The checked name of an entry; empty, and reported, if it is missing.
fn required_name(name: Option<&String>, at: &Cursor<'_>) -> String {
    at.missing("name", "give it a unique name");
    let Some(name) = name else { return String::new() };
    check_name(name, &at.key("name"));
    name.clone()
}

/// Reports an empty list, which has the same effect as none.
fn check_not_empty<T>(list: Option<&Vec<T>>, meaning: &str, at: &Cursor<'_>) {
    // A refused element counts as an element.
    if list.is_some_and(Vec::is_empty) && at.size() == 0 {
        at.report("the list is empty", format!("fill it, or remove the line: {meaning}"));
    }
}
