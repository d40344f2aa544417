//! Snapshot: the compiled policy that requests read. Immutable; a reload makes another one.
//!
//! Live state (addresses, connections, calls in flight) moves over from the previous snapshot if the values that it
//! depends on are unchanged, so a reload keeps all state that it can.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use http::{HeaderMap, Method};
use jiff::Timestamp;
use tokio::time::Instant;

use crate::net::certificates::{CertificateError, SystemRoots};
use crate::policy::model::{self, Direction, HostPattern, Listener, Model};
use crate::policy::router::{HostTable, RouteTable};
use crate::rules::circuit_breaker::{StateChange, Thresholds};
use crate::rules::ejection::EjectionMember;
use crate::rules::limits::ConcurrencyLimit;
use crate::rules::mode::Modes;
use crate::rules::rate_limit::RateLimiter;
use crate::telemetry::{self, HopId, HopLabels, Hops};
use crate::upstream::cluster::{Cluster, ClusterIdentity, Health};
use crate::upstream::spec::EndpointSpec;

/// One compiled policy.
pub struct Snapshot {
    /// Name of this service.
    pub service: Arc<str>,
    /// Hash of the content, as `/policy` and the metrics show it.
    pub hash: String,
    /// Time at which the snapshot came into force.
    pub loaded: Timestamp,
    /// The listeners; each worker finds its own by name.
    pub listeners: Vec<Listener>,
    /// The destinations, in the order of the model.
    pub destinations: Vec<CompiledDestination>,
    /// Finds the destination of a host.
    pub hosts: HostTable,
    /// The checked policy, for display.
    pub model: Arc<Model>,
    /// There are inbound and outbound listeners, so outbound calls can be correlated with inbound requests.
    pub correlates: bool,
    unrouted: [HopId; 2],
}

/// A route of a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RouteId {
    owner: u32,
    route: u32,
}

impl RouteId {
    /// The position of the destination in whose `routes` it stands.
    pub fn owner(self) -> usize {
        self.owner as usize
    }

    fn position(self) -> usize {
        self.route as usize
    }
}

/// One destination with its live state.
pub struct CompiledDestination {
    /// Its checked values.
    pub values: model::Destination,
    /// Its endpoints and their connections.
    pub cluster: Arc<Cluster>,
    /// Its calls in flight.
    pub concurrency: Arc<ConcurrencyLimit>,
    /// Finds the route of a request.
    pub index: RouteTable,
    /// Thresholds of the circuit breaker; `None` if it is off.
    pub breaker: Option<Thresholds>,
    /// Thresholds of ejection; `None` if it is off.
    pub ejection: Option<Thresholds>,
    /// Whether ejected endpoints get no calls.
    pub ejects: bool,
    /// Rate limiters by the position of the route; `None` for routes without a rate limit.
    pub limiters: Vec<Option<Arc<RateLimiter>>>,
    /// Hash of its name, the same in every policy.
    pub id: u64,
    /// Host for calls without one: server name, first exact host, first endpoint, or name.
    pub host: String,
    hops: Vec<[OnceLock<HopId>; 2]>,
}

impl Snapshot {
    /// Compiles a checked policy. State moves over from `previous`; `follow` is called with each new cluster.
    ///
    /// # Errors
    /// Certificates of the policy cannot be used.
    pub fn compile(
        model: Model,
        service: &str,
        previous: Option<&Self>,
        hops: &Hops,
        mut follow: impl FnMut(&Arc<Cluster>),
    ) -> Result<Self, CertificateError> {
        let service: Arc<str> = model.service.as_deref().unwrap_or(service).into();
        let before: HashMap<&str, &CompiledDestination> = previous
            .into_iter()
            .flat_map(|snapshot| &snapshot.destinations)
            .map(|destination| (destination.values.name.as_str(), destination))
            .collect();
        let roots = SystemRoots::default();
        let mut make = |identity, health| -> Result<_, CertificateError> {
            let cluster = Cluster::new(identity, health, &roots)?;
            follow(&cluster);
            Ok(cluster)
        };
        let destinations = model
            .destinations
            .iter()
            .map(|values| {
                CompiledDestination::compile(values, &model.modes, before.get(values.name.as_str()).copied(), &mut make)
            })
            .collect::<Result<_, _>>()?;
        let unrouted = [Direction::Inbound, Direction::Outbound]
            .map(|direction| hops.register(HopLabels::unrouted(Arc::clone(&service), label(direction))));
        Ok(Self {
            service,
            hash: format!("{:016x}", model.hash),
            loaded: Timestamp::now(),
            listeners: model.listeners.clone(),
            destinations,
            hosts: HostTable::new(&model.destinations),
            correlates: has_both_sides(&model),
            model: Arc::new(model),
            unrouted,
        })
    }

    /// Applies this policy to the live state, and calls `on_change` for each endpoint that is taken back by that.
    pub fn take_effect(
        &self,
        now: Instant,
        mut on_change: impl FnMut(&CompiledDestination, &EjectionMember, &StateChange),
    ) {
        for destination in &self.destinations {
            destination.concurrency.set_limit(destination.values.limits.in_flight.value);
            if let Some((member, change)) = destination.cluster.make_current(now) {
                on_change(destination, &member, &change);
            }
        }
    }

    /// Hop of calls without a destination.
    pub fn unrouted(&self, direction: Direction) -> HopId {
        self.unrouted[direction as usize]
    }

    /// The route of a request among those of the destination `owner`: the most specific one that matches.
    pub fn find_route(&self, owner: usize, method: &Method, path: &str, headers: &HeaderMap) -> RouteId {
        let route = self.destinations[owner].index.find(method, path, headers);
        // No file holds so many that the positions do not fit.
        let position = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        RouteId { owner: position(owner), route: position(route) }
    }

    /// The values of a route.
    pub fn route(&self, id: RouteId) -> &model::Route {
        &self.destinations[id.owner()].values.routes[id.position()]
    }

    /// The rate limiter of a route; `None` where the route has no rate limit.
    pub fn rate_limiter(&self, id: RouteId) -> Option<&Arc<RateLimiter>> {
        self.destinations[id.owner()].limiters[id.position()].as_ref()
    }

    /// The hop of one route's calls in one direction; registered with its first call.
    pub fn hop(&self, hops: &Hops, id: RouteId, direction: Direction) -> HopId {
        let at = &self.destinations[id.owner()];
        *at.hops[id.position()][direction as usize].get_or_init(|| {
            let route: &str = &at.values.routes[id.position()].name;
            hops.register(HopLabels::new(Arc::clone(&self.service), at.values.name.as_str(), route, label(direction)))
        })
    }
}

fn label(direction: Direction) -> telemetry::DirectionLabel {
    match direction {
        Direction::Inbound => telemetry::DirectionLabel::Inbound,
        Direction::Outbound => telemetry::DirectionLabel::Outbound,
    }
}

impl CompiledDestination {
    fn compile(
        values: &model::Destination,
        modes: &Modes,
        before: Option<&Self>,
        make: &mut impl FnMut(ClusterIdentity, Health) -> Result<Arc<Cluster>, CertificateError>,
    ) -> Result<Self, CertificateError> {
        let identity = identity(values);
        let cluster = match before {
            Some(before) if before.cluster.identity == identity => Arc::clone(&before.cluster),
            _ => {
                let now = Instant::now();
                let health = before.map_or_else(|| Health::new(now), |before| before.cluster.health.clone());
                make(identity, health)?
            }
        };
        Ok(Self {
            cluster,
            concurrency: before.map_or_else(
                || ConcurrencyLimit::new(values.limits.in_flight.value),
                |before| Arc::clone(&before.concurrency),
            ),
            index: RouteTable::new(&values.routes),
            breaker: values.circuit_breaker.thresholds().filter(|_| !modes.circuit_breaker.value.is_off()),
            ejection: values.ejection.thresholds().filter(|_| !modes.ejection.value.is_off()),
            ejects: values.ejection.on.value && modes.ejection.value.is_enforced(),
            limiters: limiters(values, before),
            id: name_id(&values.name),
            host: host(values),
            hops: values.routes.iter().map(|_| [OnceLock::new(), OnceLock::new()]).collect(),
            values: values.clone(),
        })
    }
}

/// One limiter per route with a rate limit; it is kept if the limit has not changed.
fn limiters(values: &model::Destination, before: Option<&CompiledDestination>) -> Vec<Option<Arc<RateLimiter>>> {
    let counting: HashMap<&str, _> = before
        .into_iter()
        .flat_map(|before| before.values.routes.iter().zip(&before.limiters))
        .filter_map(|(route, limiter)| Some((route.name.as_str(), (&route.rate_limit, limiter.as_ref()?))))
        .collect();
    let known = |route: &model::Route| {
        let (limit, limiter) = counting.get(route.name.as_str())?;
        (**limit == route.rate_limit).then(|| Arc::clone(limiter))
    };
    let limiter = |route: &model::Route| {
        route.rate_limit.value.as_ref()?;
        Some(known(route).unwrap_or_else(|| Arc::new(RateLimiter::new(Instant::now()))))
    };
    values.routes.iter().map(limiter).collect()
}

fn has_both_sides(model: &Model) -> bool {
    let is_there = |direction| model.listeners.iter().any(|listener| listener.direction == direction);
    is_there(Direction::Inbound) && is_there(Direction::Outbound)
}

fn name_id(name: &str) -> u64 {
    use std::hash::{Hash, Hasher};
    let mut state = model::Fnv(0xcbf2_9ce4_8422_2325);
    name.hash(&mut state);
    state.finish()
}

fn host(values: &model::Destination) -> String {
    let first_name = values.hosts.iter().find_map(|host| match host {
        HostPattern::Exact(name) => Some(name.clone()),
        HostPattern::Suffix(_) | HostPattern::Any => None,
    });
    let address = values.endpoints.first().map(|endpoint| match endpoint {
        EndpointSpec::Address(address) => address.ip().to_string(),
        EndpointSpec::Dns { name, .. } => name.trim_end_matches('.').to_owned(),
    });
    let wanted = values.tls.as_ref().and_then(|tls| tls.server_name.clone());
    wanted.or(first_name).or(address).unwrap_or_else(|| values.name.clone())
}

fn identity(values: &model::Destination) -> ClusterIdentity {
    // Without certificate checks, the host may change without a new cluster.
    let is_checked = values.tls.is_some() && !values.endpoints.is_empty();
    let host = if is_checked { host(values) } else { String::new() };
    ClusterIdentity {
        name: values.name.as_str().into(),
        endpoints: values.endpoints.clone(),
        protocol: values.protocol,
        tls: values.tls.clone(),
        host: host.into(),
    }
}
