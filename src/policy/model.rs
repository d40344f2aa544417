//! The checked policy: every value is present and no two contradict each other. Only certificates can fail when it is
//! compiled into a snapshot.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::header::{HeaderName, HeaderValue};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::problems::{Origin, Sourced, Warnings};
use crate::rules::layers::{DestinationRules, RouteRules};
use crate::rules::mode::Modes;
use crate::rules::toggle::allow_false;
use crate::upstream::spec::{Connections, EndpointSpec, UpstreamProtocol, UpstreamTls};

/// Name of the implicit route for calls that match no other route of the destination.
pub const DEFAULT_ROUTE: &str = "default";

/// All files of a policy as one.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Name of this service, if the policy has one.
    pub service: Option<String>,
    /// Access log.
    pub access_log: AccessLogConfig,
    /// Mode of each rule.
    pub modes: Modes,
    /// In the order of the files.
    pub listeners: Vec<Listener>,
    /// In the order of the files.
    pub destinations: Vec<Destination>,
    /// Hash of the fields above without their lines: equal for policies with the same meaning.
    pub hash: u64,
    /// The files, as the user named them.
    pub files: Vec<Arc<str>>,
    /// Warnings about deprecated words in the files.
    pub warnings: Warnings,
}

/// Access log: the exchanges that are logged, and the format.
#[derive(Debug, Clone, PartialEq)]
pub struct AccessLogConfig {
    /// Which exchanges are logged.
    pub mode: LogMode,
    /// Format of a line.
    pub format: LogFormat,
    /// Share of the exchanges that are logged with mode `sampled`; above 0, at most 1.
    pub ratio: f64,
}

impl Default for AccessLogConfig {
    fn default() -> Self {
        Self { mode: LogMode::Errors, format: LogFormat::Json, ratio: 0.01 }
    }
}

/// Which exchanges are logged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = allow_false)]
pub enum LogMode {
    /// None.
    Off,
    /// Failed exchanges.
    #[default]
    Errors,
    /// All exchanges.
    All,
    /// Failed exchanges, and a share of the others.
    Sampled,
}

/// Format of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum LogFormat {
    /// One JSON object per line.
    #[default]
    Json,
    /// Readable text.
    Text,
}

/// Traffic direction of a listener. Displays as in a policy and as the metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Direction {
    /// Calls to the service beside hopguard.
    Inbound,
    /// Calls that this service makes.
    Outbound,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        })
    }
}

/// A listener: an address and port for downstream connections.
#[derive(Debug, Clone, PartialEq)]
pub struct Listener {
    /// Unique.
    pub name: String,
    /// Unique.
    pub bind: SocketAddr,
    /// Destination of its calls.
    pub target: ListenerTarget,
    /// Traffic direction.
    pub direction: Direction,
    /// Timeout for a whole request head.
    pub headers_timeout: Sourced<Duration>,
    /// Timeout of a downstream connection without a request.
    pub idle: Sourced<Duration>,
    /// Upper bound of a request's header section, in bytes.
    pub max_header_size: Sourced<u32>,
    /// Most header fields of a request.
    pub max_header_count: Sourced<u32>,
    /// Concurrent HTTP/2 streams per downstream connection.
    pub max_streams: Sourced<u32>,
    /// `None` for plain text.
    pub tls: Option<ListenerTls>,
    /// Line of its entry.
    pub origin: Origin,
}

/// Destination of a listener's calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ListenerTarget {
    /// One destination: an index into the model's list.
    To(usize),
    /// The destination with the request's host.
    Forward,
}

/// Certificate files of a listener; they are read when the policy is compiled.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ListenerTls {
    /// Certificate chain, PEM.
    pub certificate: PathBuf,
    /// Private key, PEM.
    pub key: PathBuf,
}

/// A destination of calls. Derefs to the values of its rules: `destination.limits`.
#[derive(Debug, Clone, PartialEq)]
pub struct Destination {
    /// Unique; the metric label.
    pub name: String,
    /// Each host belongs to one destination.
    pub hosts: Vec<HostPattern>,
    /// Empty: the host and port of the request (dynamic hosts), which only forward listeners have.
    pub endpoints: Vec<EndpointSpec>,
    /// Protocol of the upstream.
    pub protocol: UpstreamProtocol,
    /// `None` for plain text.
    pub tls: Option<UpstreamTls>,
    /// Values of the rules that belong to the destination.
    pub rules: DestinationRules,
    /// Pooled connections to the upstream.
    pub connections: Connections,
    /// In the order of the file; the last one is the implicit route that matches all calls.
    pub routes: Vec<Route>,
    /// Line of its entry.
    pub origin: Origin,
}

impl Deref for Destination {
    type Target = DestinationRules;

    fn deref(&self) -> &DestinationRules {
        &self.rules
    }
}

/// A host pattern of a destination; lower case, no port, IPv6 without brackets. Displays as in a policy.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HostPattern {
    /// Exactly this name.
    Exact(String),
    /// Every name that ends in a dot and this.
    Suffix(String),
    /// Every name.
    Any,
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Suffix(suffix) => write!(f, "*.{suffix}"),
            Self::Any => f.write_str("*"),
        }
    }
}

/// A route: calls of a destination that share values. Derefs to the values of its rules: `route.timeouts`.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Unique in its destination; the metric label.
    pub name: String,
    /// Calls of the route.
    pub matches: RouteMatch,
    /// Values of the rules that belong to the route.
    pub rules: RouteRules,
    /// Once the response head is received, `idle` and `max_duration` apply instead of `request`.
    pub stream: bool,
    /// Line of its entry; built in for the implicit route.
    pub origin: Origin,
}

impl Deref for Route {
    type Target = RouteRules;

    fn deref(&self) -> &RouteRules {
        &self.rules
    }
}

/// Match of a route: all conditions must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct RouteMatch {
    /// One of these methods, or any if empty. Sorted.
    pub methods: Vec<http::Method>,
    /// Condition on the path.
    pub path: PathMatch,
    /// Each of these headers with exactly this value. Sorted by name.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// Condition on the path of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum PathMatch {
    /// Any path.
    #[default]
    Any,
    /// A path that matches the template.
    Template(String),
    /// A call of one gRPC method.
    GrpcMethod {
        /// Name of the service with its package.
        service: String,
        /// Name of the method alone.
        method: String,
    },
    /// A call of any method of a gRPC service.
    GrpcService(String),
}

impl fmt::Display for PathMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any path"),
            Self::Template(template) => write!(f, "path {template}"),
            Self::GrpcMethod { service, method } => write!(f, "grpc {service}/{method}"),
            Self::GrpcService(service) => write!(f, "grpc {service}"),
        }
    }
}

impl fmt::Display for RouteMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.methods.is_empty() {
            let methods: Vec<_> = self.methods.iter().map(http::Method::as_str).collect();
            write!(f, "{} on ", methods.join("|"))?;
        }
        write!(f, "{}", self.path)?;
        for (name, value) in &self.headers {
            write!(f, ", {name}: {}", String::from_utf8_lossy(value.as_bytes()))?;
        }
        Ok(())
    }
}

impl Model {
    /// Hash of the content without lines: FNV-1a over the values, the same in every process of one build.
    pub fn content_hash(&self) -> u64 {
        let mut state = Fnv(0xcbf2_9ce4_8422_2325);
        self.service.hash(&mut state);
        self.modes.hash(&mut state);
        (self.access_log.mode, self.access_log.format, self.access_log.ratio.to_bits()).hash(&mut state);
        for l in &self.listeners {
            (&l.name, l.bind, l.target, l.direction, &l.tls).hash(&mut state);
            (&l.headers_timeout, &l.idle, &l.max_header_size, &l.max_header_count, &l.max_streams).hash(&mut state);
        }
        for d in &self.destinations {
            (&d.name, &d.hosts, &d.endpoints, d.protocol, &d.tls, &d.connections, &d.rules).hash(&mut state);
            for r in &d.routes {
                (&r.name, &r.matches, r.stream, &r.rules).hash(&mut state);
            }
        }
        state.0
    }
}

/// FNV-1a: the standard library's hasher differs per process, while the hash of a policy is compared across pods.
pub(super) struct Fnv(pub(super) u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
