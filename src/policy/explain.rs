//! Explains one call: its listener, destination and route, and every effective value with its line.

use std::fmt;

use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use http::uri::Scheme;
use http::{Method, Uri};
use jiff::Timestamp;

use super::model::{Destination, Direction, Listener, ListenerTarget, Model, Route};
use super::router::{HostTable, RouteTable};
use crate::rules::layers;
use crate::rules::mode::{Modes, RuleName};
use crate::rules::rule::{Row, RowContext};
use crate::upstream::spec::Connections;

/// Explanation of one call. Displays as a table.
#[derive(Debug)]
pub struct Explanation<'a> {
    /// Listeners through which the call can come; empty if no listener leads to the destination.
    pub listeners: Vec<&'a Listener>,
    /// Destination of the call.
    pub destination: &'a Destination,
    /// Route of the call.
    pub route: &'a Route,
    /// Modes of the rules.
    pub modes: &'a Modes,
    /// Time of the explanation, by which faults are over or not.
    pub now: Timestamp,
    /// The call is a CONNECT; the destination sees only bytes.
    pub is_tunnel: bool,
    /// The call is for `https`, but the destination has no `tls`.
    pub is_exposed: bool,
}

/// Why a call cannot be explained.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ExplainError {
    /// The method is missing or malformed.
    #[error("`{0}` is not a method; write one like GET, or GRPC for a gRPC call")]
    BadMethod(String),
    /// The URL is neither `http://HOST/PATH` nor `/PATH`.
    #[error("`{0}` is not a URL; write one like http://payment/orders/1, or only the path")]
    BadUrl(String),
    /// The target is not `HOST:PORT`.
    #[error("`{0}` is not a target of CONNECT; write a host and a port, like bank.example:443")]
    BadTunnel(String),
    /// The policy has no destination for the call.
    #[error("no destination: {0}")]
    NoDestination(String),
}

/// A call to explain. The method `GRPC` stands for a POST with the content type of gRPC.
#[derive(Debug)]
pub struct Call {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

impl Call {
    /// Parses method and URL. A URL without scheme and host is a path, one without scheme an authority, the only form
    /// that CONNECT takes.
    ///
    /// # Errors
    /// A malformed method or URL.
    pub fn parse(method: &str, url: &str, mut headers: HeaderMap) -> Result<Self, ExplainError> {
        let method = if method.eq_ignore_ascii_case("GRPC") {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            Method::POST
        } else {
            let upper = method.to_ascii_uppercase();
            Method::from_bytes(upper.as_bytes()).map_err(|_| ExplainError::BadMethod(method.to_owned()))?
        };
        let uri = match method {
            Method::CONNECT => read_tunnel(url).ok_or_else(|| ExplainError::BadTunnel(url.to_owned()))?,
            _ => read_url(&method, url).ok_or_else(|| ExplainError::BadUrl(url.to_owned()))?,
        };
        Ok(Self { method, uri, headers })
    }
}

/// A target of CONNECT, with the checks of a request.
fn read_tunnel(target: &str) -> Option<Uri> {
    let uri: Uri = target.parse().ok()?;
    let is_bare = uri.scheme().is_none() && uri.port_u16().is_some_and(|port| port > 0);
    (is_bare && !has_user(&uri)).then_some(uri)
}

/// A target of any other method, with the checks of a request.
fn read_url(method: &Method, url: &str) -> Option<Uri> {
    if url == "*" {
        return (method == Method::OPTIONS).then(|| Uri::from_static("*"));
    }
    let full = if url.starts_with('/') || url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    let uri: Uri = full.parse().ok()?;
    let is_http = uri.scheme_str().is_none_or(|scheme| scheme == "http" || scheme == "https");
    (is_http && !has_user(&uri) && has_good_port(&uri)).then_some(uri)
}

/// Whether the port, if there is one, is a number in range.
fn has_good_port(uri: &Uri) -> bool {
    let Some(authority) = uri.authority() else { return true };
    let after = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
    match after.strip_prefix(':') {
        Some("") | None => after.len() < 2,
        Some(port) => port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok(),
    }
}

fn has_user(uri: &Uri) -> bool {
    uri.authority().is_some_and(|authority| authority.as_str().contains('@'))
}

/// Explains a call at time `now`. A path without a host is explained for each listener with `to`.
///
/// # Errors
/// The policy has no destination for the call.
pub fn explain<'a>(model: &'a Model, call: &Call, now: Timestamp) -> Result<Vec<Explanation<'a>>, ExplainError> {
    let targets = targets(model, call)?;
    let explanations = targets.into_iter().map(|Reached { destination, listeners }| {
        let destination = &model.destinations[destination];
        let routes = RouteTable::new(&destination.routes);
        let route = &destination.routes[routes.find(&call.method, call.uri.path(), &call.headers)];
        let is_forwarded = listeners.iter().any(|l| l.target == ListenerTarget::Forward);
        Explanation {
            is_tunnel: call.method == Method::CONNECT,
            is_exposed: call.uri.scheme() == Some(&Scheme::HTTPS) && is_forwarded && destination.tls.is_none(),
            listeners,
            destination,
            route,
            modes: &model.modes,
            now,
        }
    });
    Ok(explanations.collect())
}

/// A destination, and the listeners that lead to it.
struct Reached<'a> {
    destination: usize,
    listeners: Vec<&'a Listener>,
}

fn targets<'a>(model: &'a Model, call: &Call) -> Result<Vec<Reached<'a>>, ExplainError> {
    let fixed = |listener: &'a Listener| match listener.target {
        ListenerTarget::To(destination) => Some(Reached { destination, listeners: vec![listener] }),
        ListenerTarget::Forward => None,
    };
    let Some(host) = call.uri.host() else {
        let all: Vec<_> = model.listeners.iter().filter_map(fixed).collect();
        return match all.is_empty() {
            true => {
                Err(ExplainError::NoDestination("a path alone needs a listener with `to`; write the host too".into()))
            }
            false => Ok(all),
        };
    };
    let is_tunnel = call.method == Method::CONNECT;
    if is_tunnel && model.listeners.iter().all(|l| l.target != ListenerTarget::Forward) {
        return Err(ExplainError::NoDestination("CONNECT needs a listener with `forward: true`".into()));
    }
    // A URL with the address of a listener means the destination of that listener.
    let port = call.uri.port_u16();
    let is_here = |l: &&Listener| {
        let same_address = host == l.bind.ip().to_string() || host == "localhost" || host.starts_with("127.");
        same_address && port == Some(l.bind.port())
    };
    if !is_tunnel && let Some(found) = model.listeners.iter().filter(is_here).find_map(fixed) {
        return Ok(vec![found]);
    }
    let at = HostTable::new(&model.destinations)
        .find(host)
        .ok_or_else(|| ExplainError::NoDestination(format!("no destination has the host `{host}`")))?;
    let leads_there =
        |l: &&Listener| l.target == ListenerTarget::Forward || (!is_tunnel && l.target == ListenerTarget::To(at));
    Ok(vec![Reached { destination: at, listeners: model.listeners.iter().filter(leads_there).collect() }])
}

impl Explanation<'_> {
    /// The way of the call: listeners, destination, route, endpoints.
    pub fn way(&self) -> Vec<Row> {
        let Self { listeners, destination, route, .. } = self;
        let mut rows: Vec<Row> = listeners.iter().map(|l| listener_row(l)).collect();
        if rows.is_empty() {
            rows.push(Row::bare("listener", "none for this destination"));
        }
        rows.push(Row::new("destination", &destination.name, &destination.origin));
        rows.push(Row::new("route", format!("{} ({})", route.name, route.matches), &route.origin));
        if self.is_exposed {
            rows.push(Row::bare("https", "refused over HTTP/1, as the destination has no `tls`: use CONNECT"));
        }
        let kind = match (self.is_tunnel, route.stream) {
            (true, _) => "tunnel: idle and maxDuration apply",
            (false, true) => "stream: idle and maxDuration apply",
            (false, false) => "unary: timeouts.request applies",
        };
        rows.push(Row::bare("kind", kind));
        let endpoints: Vec<String> = destination.endpoints.iter().map(ToString::to_string).collect();
        let there = if endpoints.is_empty() { "the host and port of the request".into() } else { endpoints.join(", ") };
        rows.push(Row::bare("endpoints", there));
        rows.push(Row::bare("protocol", destination.protocol.to_string()));
        if let Some(tls) = &destination.tls {
            let name = tls.server_name.as_deref().unwrap_or("the endpoint's or the destination's name");
            let roots = tls.ca.as_ref().map_or_else(|| "the system's roots".into(), |ca| ca.display().to_string());
            rows.push(Row::bare("tls", format!("for {name}, trusting {roots}")));
        }
        rows
    }

    /// Every effective value; first the modes that are not `enforce`.
    pub fn values(&self) -> Vec<Row> {
        let Self { listeners, destination, route, modes, now, .. } = self;
        let is_inbound = !listeners.is_empty() && listeners.iter().all(|l| l.direction == Direction::Inbound);
        let seen = RowContext { now: *now, is_inbound };
        let mut rows = not_enforced(modes);
        rows.extend(layers::rows(destination, route, &seen));
        rows.extend(connection_rows(&destination.connections));
        for l in listeners {
            rows.push(Row::time(format!("{}: timeouts.headers", l.name), &l.headers_timeout));
            rows.push(Row::time(format!("{}: timeouts.idle", l.name), &l.idle));
            rows.push(Row::shown(format!("{}: maxHeaderSize", l.name), &l.max_header_size));
            rows.push(Row::shown(format!("{}: maxHeaderCount", l.name), &l.max_header_count));
            rows.push(Row::shown(format!("{}: maxStreams", l.name), &l.max_streams));
        }
        rows
    }
}

fn connection_rows(connections: &Connections) -> [Row; 5] {
    [
        Row::time("connections.idle", &connections.idle),
        Row::shown("connections.maxIdle", &connections.max_idle),
        Row::shown("connections.maxHeaderCount", &connections.max_header_count),
        Row::time("connections.maxAge", &connections.max_age),
        match &connections.max_requests {
            Some(most) => Row::shown("connections.maxRequests", most),
            None => Row::none("connections.maxRequests", "none: the upstream's own is learned"),
        },
    ]
}

/// The modes that are not `enforce`.
fn not_enforced(modes: &Modes) -> Vec<Row> {
    let not_enforced = RuleName::ALL.into_iter().filter(|rule| !modes.of(*rule).value.is_enforced());
    not_enforced.map(|rule| Row::shown(format!("rules.{}", rule.key()), modes.of(rule))).collect()
}

fn listener_row(l: &Listener) -> Row {
    let target = if l.target == ListenerTarget::Forward { "forward" } else { "to" };
    let tls = if l.tls.is_some() { ", TLS" } else { "" };
    Row::new("listener", format!("{} ({target}, {}, {}{tls})", l.name, l.direction, l.bind), &l.origin)
}

impl fmt::Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (way, values) = (self.way(), self.values());
        let widest = |of: fn(&Row) -> usize, most: usize| {
            way.iter().chain(&values).map(of).filter(|width| *width <= most).max().unwrap_or_default()
        };
        let name_width = widest(|row| row.name.chars().count(), 40);
        let value_width = widest(|row| if row.origin.is_empty() { 0 } else { row.value.chars().count() }, 60);
        for (index, Row { name, value, origin, .. }) in way.iter().chain(&values).enumerate() {
            if index == way.len() {
                writeln!(f)?;
            }
            let line = format!("{name:<name_width$}  {value:<value_width$}  {origin}");
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}
