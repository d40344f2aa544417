//! What the admin door shows of the process.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use serde_json::{Value, json};

use crate::admin::{Inside, ListenerView, PolicyError, State, StatusView};
use crate::app::Shared;
use crate::policy::model::{Destination, Listener, Route, Target};
use crate::policy::snapshot::Snapshot;
use crate::problems::Set;
use crate::rules::duration;
use crate::runtime::drain::Phase;

/// The view from the admin door; holds nothing alive.
pub(super) struct Window(Weak<Shared>);

impl Window {
    /// A view into a running process.
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self(Arc::downgrade(shared))
    }
}

const GONE: &str = "shutting down";

impl Inside for Window {
    fn ready(&self) -> Result<(), Vec<String>> {
        let shared = self.0.upgrade().ok_or_else(|| vec![GONE.to_owned()])?;
        match shared.drain.phase() {
            Phase::Serving => Ok(()),
            Phase::Leaving | Phase::Closing | Phase::Over => Err(vec!["draining".to_owned()]),
        }
    }

    fn policy_json(&self) -> String {
        let Some(shared) = self.0.upgrade() else { return json!({ "error": GONE }).to_string() };
        let policy = shared.policy.load();
        let shown = |error: &Mutex<Option<PolicyError>>| -> Option<Value> {
            let error = error.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
            Some(json!({ "message": error.message, "at": shared.telemetry.wall(error.at).to_string() }))
        };
        let mut document = document(&policy);
        document["lastError"] = shown(&shared.last_error).into();
        document["certificateError"] = shown(&shared.certificate_error).into();
        format!("{document:#}\n")
    }

    fn begin_drain(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.leave();
        }
    }

    fn status(&self) -> StatusView {
        let Some(shared) = self.0.upgrade() else {
            return StatusView {
                service: String::new(),
                state: State::Draining,
                policy_path: String::new(),
                last_error: None,
                listeners: Vec::new(),
            };
        };
        let policy = shared.policy.load();
        let addresses = shared.doors().addresses();
        let path = shared.settings.policy.as_ref().map(|followed| &followed.path);
        StatusView {
            service: policy.service.to_string(),
            state: match shared.drain.phase() {
                Phase::Serving => State::Ready,
                Phase::Leaving | Phase::Closing | Phase::Over => State::Draining,
            },
            policy_path: path.map_or_else(String::new, |path| path.display().to_string()),
            last_error: shared.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            listeners: policy
                .listeners
                .iter()
                .map(|listener| ListenerView {
                    name: listener.name.clone(),
                    address: addresses
                        .iter()
                        .find(|(name, _)| *name == listener.name)
                        .map_or(listener.bind, |(_, address)| *address),
                    direction: match listener.direction {
                        crate::policy::model::Direction::Inbound => "inbound",
                        crate::policy::model::Direction::Outbound => "outbound",
                    },
                    to: towards(&policy, listener),
                    tls: listener.tls.is_some(),
                })
                .collect(),
        }
    }
}

fn towards(policy: &Snapshot, listener: &Listener) -> Option<String> {
    match listener.target {
        Target::To(position) => policy.destinations.get(position).map(|one| one.values.name.clone()),
        Target::Forward => None,
    }
}

/// The policy in force: every effective value with the line that it comes from.
fn document(policy: &Snapshot) -> Value {
    json!({
        "hash": policy.hash,
        "loaded": policy.loaded.to_string(),
        "files": policy.model.files.iter().map(|file| &**file).collect::<Vec<_>>(),
        "service": &*policy.service,
        "listeners": policy.listeners.iter().map(|one| listener(policy, one)).collect::<Vec<_>>(),
        "destinations": policy.destinations.iter().map(|one| {
            let addresses = one.cluster.addresses();
            let mut shown = destination(&one.values);
            shown["addresses"] = addresses.list.iter().map(|address| address.socket.to_string()).collect();
            shown["problem"] = addresses.problem.clone().into();
            shown["inFlight"] = one.gate.in_flight().into();
            shown
        }).collect::<Vec<_>>(),
    })
}

fn listener(policy: &Snapshot, one: &Listener) -> Value {
    json!({
        "name": one.name,
        "bind": one.bind.to_string(),
        "to": towards(policy, one),
        "forward": one.target == Target::Forward,
        "direction": one.direction.to_string(),
        "tls": one.tls.is_some(),
        "timeouts": { "headers": time(&one.headers_timeout), "idle": time(&one.idle) },
        "maxHeaderSize": set(&one.max_header_size, |bytes| (*bytes).into()),
    })
}

fn destination(one: &Destination) -> Value {
    json!({
        "name": one.name,
        "hosts": one.hosts.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "endpoints": one.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "protocol": one.protocol.to_string(),
        "tls": one.tls.is_some(),
        "limits": {
            "inFlight": set(&one.limits.in_flight, |count| (*count).into()),
            "queue": set(&one.limits.queue, |count| (*count).into()),
            "queueTimeout": time(&one.limits.queue_timeout),
        },
        "connections": {
            "idle": time(&one.connections.idle),
            "maxIdle": set(&one.connections.max_idle, |count| (*count).into()),
        },
        "routes": one.routes.iter().map(route).collect::<Vec<_>>(),
    })
}

fn route(one: &Route) -> Value {
    let limits = &one.timeouts;
    json!({
        "name": one.name,
        "match": one.matches.to_string(),
        "stream": one.stream,
        "from": one.origin.to_string(),
        "timeouts": {
            "connect": time(&limits.connect),
            "request": time(&limits.request),
            "perTry": limits.per_try.as_ref().map(time),
            "idle": time(&limits.idle),
            "maxDuration": time(&limits.max_duration),
        },
    })
}

fn time(value: &Set<std::time::Duration>) -> Value {
    set(value, |time| duration::format(*time).into())
}

fn set<T>(value: &Set<T>, show: impl Fn(&T) -> Value) -> Value {
    json!({ "value": show(&value.value), "from": value.origin.to_string() })
}
