//! The compiled policy: what the data path reads for every request. Immutable; a reload makes another one.
//!
//! Live state (addresses, connections, calls in flight) moves over from the snapshot before wherever the
//! values that it depends on are unchanged, so a reload forgets nothing that it need not forget.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use jiff::Timestamp;

use crate::net::certificates::CertificateError;
use crate::policy::index::{HostIndex, RouteIndex};
use crate::policy::model::{self, Direction, Host, Listener, Model};
use crate::rules::gate::Gate;
use crate::telemetry::{self, HopId, HopLabels, Hops};
use crate::upstream::cluster::{Cluster, Identity};
use crate::upstream::spec::Endpoint;

/// One policy, ready for use.
pub struct Snapshot {
    /// Who we are.
    pub service: Arc<str>,
    /// The content's hash, as `/policy` and the metrics show it.
    pub hash: String,
    /// When it came into force.
    pub loaded: Timestamp,
    /// The listeners; each worker finds its own by name.
    pub listeners: Vec<Listener>,
    /// The destinations, in the order of the model.
    pub destinations: Vec<Destination>,
    /// Which destination a host belongs to.
    pub hosts: HostIndex,
    /// The checked policy itself, to be shown.
    pub model: Arc<Model>,
    unrouted: [HopId; 2],
}

/// One destination, with its live state.
pub struct Destination {
    /// Its checked values.
    pub values: model::Destination,
    /// Its endpoints.
    pub cluster: Arc<Cluster>,
    /// Its calls in flight.
    pub gate: Arc<Gate>,
    /// Which of its routes a request meets.
    pub index: RouteIndex,
    hops: Vec<[OnceLock<HopId>; 2]>,
}

impl Snapshot {
    /// Compiles a checked policy. State moves over from `previous`; new clusters are handed to `follow`.
    ///
    /// Fails only if certificates that the policy names cannot be used.
    pub fn compile(
        model: Model,
        service: &str,
        previous: Option<&Self>,
        hops: &Hops,
        mut follow: impl FnMut(&Arc<Cluster>),
    ) -> Result<Self, CertificateError> {
        let service: Arc<str> = model.service.as_deref().unwrap_or(service).into();
        let before: HashMap<&str, &Destination> = previous
            .into_iter()
            .flat_map(|snapshot| &snapshot.destinations)
            .map(|destination| (destination.values.name.as_str(), destination))
            .collect();
        let destinations = model
            .destinations
            .iter()
            .map(|values| Destination::compile(values, before.get(values.name.as_str()).copied(), &mut follow))
            .collect::<Result<_, _>>()?;
        let unrouted = [Direction::Inbound, Direction::Outbound]
            .map(|direction| hops.register(HopLabels::unrouted(Arc::clone(&service), label(direction))));
        Ok(Self {
            service,
            hash: format!("{:016x}", model.hash),
            loaded: Timestamp::now(),
            listeners: model.listeners.clone(),
            destinations,
            hosts: HostIndex::new(&model.destinations),
            model: Arc::new(model),
            unrouted,
        })
    }

    /// Tells the live parts that this policy is in force now.
    pub fn take_effect(&self) {
        for destination in &self.destinations {
            destination.gate.set_limit(destination.values.limits.in_flight.value);
        }
    }

    /// The hop of calls that no destination takes.
    pub fn unrouted(&self, direction: Direction) -> HopId {
        self.unrouted[direction as usize]
    }

    /// The hop of one route's calls in one direction; registered when it is first met.
    pub fn hop(&self, hops: &Hops, destination: usize, route: usize, direction: Direction) -> HopId {
        let at = &self.destinations[destination];
        *at.hops[route][direction as usize].get_or_init(|| {
            let route: &str = &at.values.routes[route].name;
            hops.register(HopLabels::new(Arc::clone(&self.service), at.values.name.as_str(), route, label(direction)))
        })
    }
}

fn label(direction: Direction) -> telemetry::Direction {
    match direction {
        Direction::Inbound => telemetry::Direction::Inbound,
        Direction::Outbound => telemetry::Direction::Outbound,
    }
}

impl Destination {
    fn compile(
        values: &model::Destination,
        before: Option<&Self>,
        follow: &mut impl FnMut(&Arc<Cluster>),
    ) -> Result<Self, CertificateError> {
        let identity = identity(values);
        let cluster = match before {
            Some(before) if before.cluster.identity == identity => Arc::clone(&before.cluster),
            _ => {
                let cluster = Cluster::new(identity)?;
                follow(&cluster);
                cluster
            }
        };
        Ok(Self {
            cluster,
            gate: before.map_or_else(|| Gate::new(values.limits.in_flight.value), |before| Arc::clone(&before.gate)),
            index: RouteIndex::new(&values.routes),
            hops: values.routes.iter().map(|_| [OnceLock::new(), OnceLock::new()]).collect(),
            values: values.clone(),
        })
    }
}

fn identity(values: &model::Destination) -> Identity {
    let first_name = values.hosts.iter().find_map(|host| match host {
        Host::Exact(name) => Some(name.clone()),
        Host::Suffix(_) | Host::Any => None,
    });
    let address = values.endpoints.first().map(|endpoint| match endpoint {
        Endpoint::Address(address) => address.ip().to_string(),
        Endpoint::Dns { name, .. } => name.clone(),
    });
    let wanted = values.tls.as_ref().and_then(|tls| tls.server_name.clone());
    let host = wanted.or(first_name).or(address).unwrap_or_else(|| values.name.clone());
    Identity {
        name: values.name.as_str().into(),
        endpoints: values.endpoints.clone(),
        protocol: values.protocol,
        tls: values.tls.clone(),
        host: host.into(),
    }
}
