//! What the admin server shows of the process.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use jiff::Timestamp;
use serde_json::{Map, Number, Value, json};
use tokio::time::Instant;

use crate::admin::{ListenerView, PolicyError, ProcessView, State, StatusView};
use crate::app::Shared;
use crate::policy::model::{AccessLogConfig, Destination, Listener, ListenerTarget, LogFormat, LogMode, Route};
use crate::policy::snapshot::Snapshot;
use crate::problems::{Problem, Sourced};
use crate::rules::duration;
use crate::rules::layers::RuleRows;
use crate::rules::mode::RuleName;
use crate::rules::rule::{Row, RowContext};
use crate::runtime::drain::DrainPhase;

/// The process as the admin server sees it; a weak reference, so that the server does not delay the shutdown.
pub(super) struct AdminView(Weak<Shared>);

impl AdminView {
    /// A view into a running process.
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self(Arc::downgrade(shared))
    }
}

const GONE: &str = "shutting down";

impl ProcessView for AdminView {
    fn ready(&self) -> Result<(), Vec<String>> {
        let shared = self.0.upgrade().ok_or_else(|| vec![GONE.to_owned()])?;
        match shared.drain.phase() {
            DrainPhase::Serving => Ok(()),
            DrainPhase::Leaving | DrainPhase::Closing | DrainPhase::Over => Err(vec!["draining".to_owned()]),
        }
    }

    fn policy_json(&self) -> String {
        let Some(shared) = self.0.upgrade() else { return json!({ "error": GONE }).to_string() };
        let policy = shared.policy.load();
        let shown = |error: &Mutex<Option<PolicyError>>| -> Option<Value> {
            let error = error.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
            Some(json!({ "message": error.message, "at": shared.telemetry.wall_time(error.at).to_string() }))
        };
        let mut document = document(&policy, shared.telemetry.wall_time(Instant::now()));
        document["lastError"] = shown(&shared.last_error).into();
        document["certificateError"] = shown(&shared.certificate_error).into();
        format!("{document:#}\n")
    }

    fn begin_drain(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.begin_drain();
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
        let addresses = shared.listeners().addresses();
        let path = shared.settings.policy.as_ref().map(|followed| &followed.path);
        StatusView {
            service: policy.service.to_string(),
            state: match shared.drain.phase() {
                DrainPhase::Serving => State::Ready,
                DrainPhase::Leaving | DrainPhase::Closing | DrainPhase::Over => State::Draining,
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
                    max_streams: listener.max_streams.value,
                    connections_at_max_streams: shared.telemetry.connections_at_max_streams(&listener.name),
                })
                .collect(),
        }
    }
}

fn towards(policy: &Snapshot, listener: &Listener) -> Option<String> {
    match listener.target {
        ListenerTarget::To(position) => policy.destinations.get(position).map(|one| one.values.name.clone()),
        ListenerTarget::Forward => None,
    }
}

/// The policy in force: every effective value with the line that it comes from.
fn document(policy: &Snapshot, now: Timestamp) -> Value {
    let modes = RuleName::ALL.into_iter().map(|rule| {
        let mode = policy.model.modes.of(rule);
        (rule.key().to_owned(), set(mode, |mode| mode.as_str().into()))
    });
    json!({
        "hash": policy.hash,
        "loaded": policy.loaded.to_string(),
        "warnings": policy.model.warnings.problems.iter().map(Problem::to_json).collect::<Vec<_>>(),
        "files": policy.model.files.iter().map(|file| &**file).collect::<Vec<_>>(),
        "service": &*policy.service,
        "accessLog": access_log(&policy.model.access_log),
        "rules": modes.collect::<Map<_, _>>(),
        "listeners": policy.listeners.iter().map(|one| listener(policy, one)).collect::<Vec<_>>(),
        "destinations": policy.destinations.iter().map(|one| {
            let addresses = one.cluster.addresses();
            let mut shown = destination(&one.values, now);
            shown["addresses"] = addresses.list.iter().map(|address| address.socket.to_string()).collect();
            shown["problem"] = addresses.problem.clone().into();
            shown["inFlight"] = one.concurrency.in_flight().into();
            shown
        }).collect::<Vec<_>>(),
    })
}

fn listener(policy: &Snapshot, one: &Listener) -> Value {
    json!({
        "name": one.name,
        "bind": one.bind.to_string(),
        "to": towards(policy, one),
        "forward": one.target == ListenerTarget::Forward,
        "direction": one.direction.to_string(),
        "tls": one.tls.is_some(),
        "timeouts": { "headers": time(&one.headers_timeout), "idle": time(&one.idle) },
        "maxHeaderSize": set(&one.max_header_size, |bytes| (*bytes).into()),
        "maxHeaderCount": set(&one.max_header_count, |count| (*count).into()),
        "maxStreams": set(&one.max_streams, |count| (*count).into()),
    })
}

fn access_log(log: &AccessLogConfig) -> Value {
    let mode = match log.mode {
        LogMode::Off => "off",
        LogMode::Errors => "errors",
        LogMode::All => "all",
        LogMode::Sampled => "sampled",
    };
    let format = match log.format {
        LogFormat::Json => "json",
        LogFormat::Text => "text",
    };
    json!({ "mode": mode, "format": format, "ratio": (log.mode == LogMode::Sampled).then_some(log.ratio) })
}

fn destination(one: &Destination, now: Timestamp) -> Value {
    let seen = RowContext { now, is_inbound: false };
    // The implicit one, which has what the destination says.
    let below = one.routes.last();
    let routes = one.routes.iter().map(|route| self::route(route, below, &seen));
    let mut shown = json!({
        "name": one.name,
        "hosts": one.hosts.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "endpoints": one.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "protocol": one.protocol.to_string(),
        "tls": one.tls.is_some(),
        "connections": {
            "idle": time(&one.connections.idle),
            "maxIdle": set(&one.connections.max_idle, |count| (*count).into()),
            "maxHeaderCount": set(&one.connections.max_header_count, |count| (*count).into()),
            "maxAge": time(&one.connections.max_age),
            "maxRequests": one.connections.max_requests.as_ref().map(|most| set(most, |count| (*count).into())),
        },
        "routes": routes.collect::<Vec<_>>(),
    });
    for RuleRows { key, rows } in one.rules.rows(None, &seen) {
        shown[key] = values(&rows);
    }
    shown
}

/// What a route says, and of most rules only those in which it is not like the route `below`: there may be thousands.
fn route(one: &Route, below: Option<&Route>, seen: &RowContext) -> Value {
    let mut shown = json!({
        "name": one.name,
        "match": one.matches.to_string(),
        "stream": one.stream,
        "from": one.origin.to_string(),
    });
    let below = below.filter(|below| !std::ptr::eq(*below, one));
    for RuleRows { key, rows } in one.rules.rows(below.map(|below| &below.rules), seen) {
        shown[key] = values(&rows);
    }
    shown
}

/// A rule's values; a row for the rule as a whole stands alone.
fn values(rows: &[Row]) -> Value {
    let shown = |row: &Row| {
        if row.is_none {
            return Value::Null;
        }
        let number = serde_json::from_str::<Number>(&row.value);
        json!({ "value": number.map_or_else(|_| row.value.as_str().into(), Value::Number), "from": row.origin })
    };
    match rows {
        [whole] if whole.name.is_empty() => shown(whole),
        _ => rows.iter().map(|row| (row.name.clone(), shown(row))).collect::<Map<_, _>>().into(),
    }
}

fn time(value: &Sourced<std::time::Duration>) -> Value {
    set(value, |time| duration::format(*time).into())
}

fn set<T>(value: &Sourced<T>, show: impl Fn(&T) -> Value) -> Value {
    json!({ "value": show(&value.value), "from": value.origin.to_string() })
}
