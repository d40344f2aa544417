//! The checked policy: every value decided, every contradiction gone. Compiling it into a snapshot cannot fail.

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

/// The name of the route that takes what no other route of its destination does.
pub const DEFAULT_ROUTE: &str = "default";

/// All files of a policy as one.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Who we are, when the policy says so.
    pub service: Option<String>,
    /// Which exchanges get a log line.
    pub access_log: AccessLogConfig,
    /// How strictly each rule is kept.
    pub modes: Modes,
    /// In the order of the files.
    pub listeners: Vec<Listener>,
    /// In the order of the files.
    pub destinations: Vec<Destination>,
    /// Of everything above but the lines it comes from: two policies that mean the same have the same.
    pub hash: u64,
    /// The files, as the user named them.
    pub files: Vec<Arc<str>>,
    /// What the files say in words that have been replaced since.
    pub warnings: Warnings,
}

/// Which exchanges get a log line, and in which form.
#[derive(Debug, Clone, PartialEq)]
pub struct AccessLogConfig {
    /// Which.
    pub mode: LogMode,
    /// Which form.
    pub format: LogFormat,
    /// The share of exchanges with a line, above 0 and up to 1; only `sampled` looks at it.
    pub ratio: f64,
}

impl Default for AccessLogConfig {
    fn default() -> Self {
        Self { mode: LogMode::Errors, format: LogFormat::Json, ratio: 0.01 }
    }
}

/// Which exchanges get a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = allow_false)]
pub enum LogMode {
    /// None.
    Off,
    /// Those that failed.
    #[default]
    Errors,
    /// All.
    All,
    /// Those that failed, and a share of the others.
    Sampled,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum LogFormat {
    /// One JSON object a line.
    #[default]
    Json,
    /// One readable line.
    Text,
}

/// Whose calls come through a listener. Shows as in a policy and as the metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Direction {
    /// Of others, to our service.
    Inbound,
    /// Of our service, to others.
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

/// A door for calls.
#[derive(Debug, Clone, PartialEq)]
pub struct Listener {
    /// Unique.
    pub name: String,
    /// Unique.
    pub bind: SocketAddr,
    /// Who gets the calls.
    pub target: ListenerTarget,
    /// Whose calls these are.
    pub direction: Direction,
    /// For a caller to send a whole request head.
    pub headers_timeout: Sourced<Duration>,
    /// For a caller's connection without a request.
    pub idle: Sourced<Duration>,
    /// The whole header section of a request, in bytes.
    pub max_header_size: Sourced<u32>,
    /// None for plain text.
    pub tls: Option<ListenerTls>,
    /// The line of its entry.
    pub origin: Origin,
}

/// Who gets a listener's calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ListenerTarget {
    /// One destination: an index into the model's.
    To(usize),
    /// The destination that the request's host names.
    Forward,
}

/// Files of a listener's certificate; whether they can be read is seen when they are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ListenerTls {
    /// PEM, the chain.
    pub certificate: PathBuf,
    /// PEM.
    pub key: PathBuf,
}

/// Where calls go. The values of its rules are read like its own: `destination.limits`.
#[derive(Debug, Clone, PartialEq)]
pub struct Destination {
    /// Unique; the metric label.
    pub name: String,
    /// No host stands in two destinations.
    pub hosts: Vec<HostPattern>,
    /// Empty: where the caller was going, which only forward listeners know.
    pub endpoints: Vec<EndpointSpec>,
    /// How it is spoken to.
    pub protocol: UpstreamProtocol,
    /// None for plain text.
    pub tls: Option<UpstreamTls>,
    /// The rules that hold for it as a whole.
    pub rules: DestinationRules,
    /// Pooled connections to it.
    pub connections: Connections,
    /// In the order of the file; the last is the implicit one that matches all.
    pub routes: Vec<Route>,
    /// The line of its entry.
    pub origin: Origin,
}

impl Deref for Destination {
    type Target = DestinationRules;

    fn deref(&self) -> &DestinationRules {
        &self.rules
    }
}

/// A host that a destination answers for; lower case, no port, IPv6 without brackets. Shows as in a policy.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HostPattern {
    /// This name.
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

/// How some calls to a destination are treated. The values of its rules are read like its own: `route.timeouts`.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Unique in its destination; the metric label.
    pub name: String,
    /// Which calls.
    pub matches: RouteMatch,
    /// The rules that hold for it.
    pub rules: RouteRules,
    /// Lives by `idle` and `max_duration`, not by `request`, once the head of the answer is there.
    pub stream: bool,
    /// The line of its entry; built in for the implicit one.
    pub origin: Origin,
}

impl Deref for Route {
    type Target = RouteRules;

    fn deref(&self) -> &RouteRules {
        &self.rules
    }
}

/// Which calls a route takes: all of it must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct RouteMatch {
    /// One of these, or any when empty. Sorted.
    pub methods: Vec<http::Method>,
    /// On which path.
    pub path: PathMatch,
    /// Each of these with exactly this value. Sorted by name.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// On which path a route is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum PathMatch {
    /// On every path.
    #[default]
    Any,
    /// On those that fit the template.
    Template(String),
    /// A call of one gRPC method.
    GrpcMethod {
        /// With its package.
        service: String,
        /// Its bare name.
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
    /// Of the content, not of the lines: FNV-1a over the values, the same in every process of one build.
    pub fn content_hash(&self) -> u64 {
        let mut state = Fnv(0xcbf2_9ce4_8422_2325);
        self.service.hash(&mut state);
        self.modes.hash(&mut state);
        (self.access_log.mode, self.access_log.format, self.access_log.ratio.to_bits()).hash(&mut state);
        for l in &self.listeners {
            (&l.name, l.bind, l.target, l.direction, &l.tls).hash(&mut state);
            (&l.headers_timeout, &l.idle, &l.max_header_size).hash(&mut state);
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

/// FNV-1a: the standard library's hasher is another one in each process, and a policy's hash is compared across pods.
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
