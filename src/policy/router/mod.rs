//! Finds the destination of a host and the route of a call: built once per policy, used once per request.
//!
//! The routes are in a tree of path segments, so a look-up costs the depth of the path, not the number of routes. The
//! tree is walked most specific branch first (exact segment, then one with a fixed part, then a parameter, then a
//! catch-all), with backtracking if the routes of a branch do not match method or headers; so the result is the most
//! specific route that matches, whatever the order in the file.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;

use foldhash::fast::FixedState;
use http::Method;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use super::model::{Destination, HostPattern, PathMatch, Route, RouteMatch};
use crate::problems::InvalidValue;

type Table<V> = HashMap<Box<str>, V, FixedState>;

/// One segment of a template, between two slashes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Segment {
    /// Exactly this text; empty after a final slash.
    Exact(String),
    /// A parameter between a fixed start and a fixed end, which may be empty.
    Parameter {
        /// Text before the parameter.
        prefix: String,
        /// Text after the parameter.
        suffix: String,
    },
    /// The rest of the path with its slashes, not empty. Always last.
    Rest,
}

/// Parses a path template like `/orders/{id}`, `/files/{name}.json` or `/static/{*rest}`; `{{` and `}}` are braces.
///
/// Equal results match the same paths: the names of parameters are not part of the result.
///
/// # Errors
/// A malformed template, with a hint.
pub fn parse_template(template: &str) -> Result<Vec<Segment>, InvalidValue> {
    let fault = |message: &str, hint: &str| Err(InvalidValue::new(format!("`{template}` {message}"), hint));
    let Some(path) = template.strip_prefix('/') else {
        return fault("does not begin with a slash", &format!("write `/{template}`"));
    };
    if template.contains(['?', '#']) || template.contains(char::is_whitespace) {
        return fault("is not only a path", "a query is not matched: leave out `?`, `#` and spaces");
    }
    if !template.is_ascii() {
        return fault("is not ASCII", "write other characters as they are sent, like `%C3%A4`");
    }
    let mut segments = Vec::new();
    let mut names = Vec::new();
    for text in path.split('/') {
        if segments.last() == Some(&Segment::Rest) {
            return fault("continues after a catch-all", "`{*name}` is always the last part");
        }
        match parse_segment(text) {
            Ok(Parsed { segment, name }) => {
                segments.push(segment);
                if let Some(name) = name {
                    if names.contains(&name) {
                        return fault(&format!("names `{name}` twice"), "give each parameter its own name");
                    }
                    names.push(name);
                }
            }
            Err((message, hint)) => return fault(message, hint),
        }
    }
    Ok(segments)
}

type SegmentFault = (&'static str, &'static str);

struct Parsed {
    segment: Segment,
    name: Option<String>,
}

fn parse_segment(text: &str) -> Result<Parsed, SegmentFault> {
    let (mut prefix, mut suffix) = (String::new(), String::new());
    let mut name: Option<String> = None;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let out = if name.is_some() { &mut suffix } else { &mut prefix };
        match c {
            '{' | '}' if chars.peek() == Some(&c) => {
                chars.next();
                out.push(c);
            }
            '}' => return Err(("has a `}` without its `{`", "write `}}` for a brace itself")),
            '{' if name.is_some() => return Err(("has two parameters in one part", "put a slash between them")),
            '{' => {
                let mut inner = String::new();
                let closed = chars.by_ref().any(|c| {
                    inner.push(c);
                    c == '}'
                });
                if !closed || inner.contains('{') {
                    return Err(("has a `{` without its `}`", "write `{name}`, and `{{` for a brace itself"));
                }
                inner.pop();
                name = Some(inner);
            }
            c => out.push(c),
        }
    }
    let Some(name) = name else { return Ok(Parsed { segment: Segment::Exact(prefix), name: None }) };
    let (bare, is_rest) = name.strip_prefix('*').map_or((&*name, false), |bare| (bare, true));
    if bare.is_empty() || bare.contains('*') || bare.contains(':') {
        return Err(("has a parameter without a valid name", "write `{name}` or `{*name}`"));
    }
    let segment = match is_rest {
        true if prefix.is_empty() && suffix.is_empty() => Segment::Rest,
        true => return Err(("has a catch-all that is not a whole part", "write `/{*name}` at the end")),
        false => Segment::Parameter { prefix, suffix },
    };
    Ok(Parsed { segment, name: Some(bare.to_owned()) })
}

/// Whether a request is gRPC by its content type: `application/grpc`, alone or with a suffix like `+proto`.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(is_grpc_type)
}

/// The same for the content type itself. gRPC-Web is another protocol.
pub fn is_grpc_type(kind: &HeaderValue) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    let kind = kind.as_bytes();
    kind.get(..GRPC.len()).is_some_and(|start| start.eq_ignore_ascii_case(GRPC))
        && matches!(kind.get(GRPC.len()), None | Some(b'+' | b';' | b' '))
}

/// Order in which the routes of one path are evaluated: those with more conditions first. The order of the file decides
/// only between routes with equally many.
pub(super) fn precedence(matches: &RouteMatch) -> impl Ord + use<> {
    (matches.methods.is_empty(), Reverse(matches.headers.len()), matches.methods.len())
}

/// Conditions of a route beside the path.
#[derive(Debug)]
struct Candidate {
    route: usize,
    methods: Vec<Method>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Candidate {
    fn takes(&self, method: &Method, headers: &HeaderMap) -> bool {
        let same = |(name, value): &(HeaderName, HeaderValue)| headers.get_all(name).iter().any(|v| v == value);
        (self.methods.is_empty() || self.methods.contains(method)) && self.headers.iter().all(same)
    }
}

/// The routes of one path, those with most conditions first.
#[derive(Debug, Default)]
struct Leaf(Vec<Candidate>);

impl Leaf {
    fn find(&self, method: &Method, headers: &HeaderMap) -> Option<usize> {
        self.0.iter().find(|candidate| candidate.takes(method, headers)).map(|candidate| candidate.route)
    }

    fn add(&mut self, route: usize, matches: &RouteMatch) {
        let (methods, headers) = (matches.methods.clone(), matches.headers.clone());
        self.0.push(Candidate { route, methods, headers });
    }
}

#[derive(Debug, Default)]
struct Branch {
    exact: Table<Branch>,
    /// Longest fixed part first.
    affixed: Vec<(String, String, Branch)>,
    parameter: Option<Box<Branch>>,
    rest: Leaf,
    here: Leaf,
}

impl Branch {
    fn leaf(&mut self, segments: &[Segment]) -> &mut Leaf {
        let Some((first, others)) = segments.split_first() else { return &mut self.here };
        match first {
            Segment::Rest => &mut self.rest,
            Segment::Exact(text) => self.exact.entry(text.as_str().into()).or_default().leaf(others),
            Segment::Parameter { prefix, suffix } if prefix.is_empty() && suffix.is_empty() => {
                self.parameter.get_or_insert_default().leaf(others)
            }
            Segment::Parameter { prefix, suffix } => {
                let known = self.affixed.iter().position(|(p, s, _)| p == prefix && s == suffix);
                let at = known.unwrap_or_else(|| {
                    let length = |p: &str, s: &str| (Reverse(p.len()), Reverse(s.len()));
                    let new = length(prefix, suffix);
                    let at = self.affixed.partition_point(|(p, s, _)| length(p, s) <= new);
                    self.affixed.insert(at, (prefix.clone(), suffix.clone(), Self::default()));
                    at
                });
                self.affixed[at].2.leaf(others)
            }
        }
    }

    /// `rest` is the path after the last consumed slash; `None` at its end.
    fn find(&self, rest: Option<&str>, method: &Method, headers: &HeaderMap) -> Option<usize> {
        let Some(rest) = rest else { return self.here.find(method, headers) };
        let (head, tail) = rest.split_once('/').map_or((rest, None), |(head, tail)| (head, Some(tail)));
        let fits = |p: &str, s: &str| head.len() > p.len() + s.len() && head.starts_with(p) && head.ends_with(s);
        let exact = self.exact.get(head).and_then(|branch| branch.find(tail, method, headers));
        exact
            .or_else(|| {
                let mut affixed = self.affixed.iter().filter(|(p, s, _)| fits(p, s));
                affixed.find_map(|(_, _, branch)| branch.find(tail, method, headers))
            })
            .or_else(|| {
                let branch = self.parameter.as_ref().filter(|_| !head.is_empty())?;
                branch.find(tail, method, headers)
            })
            .or_else(|| if rest.is_empty() { None } else { self.rest.find(method, headers) })
    }
}

/// The routes of one destination.
#[derive(Debug)]
pub struct RouteTable {
    implicit: usize,
    is_trivial: bool,
    /// By the whole path, `/package.Service/Method`.
    grpc_methods: Table<Leaf>,
    /// By service, with its slash: `/package.Service`.
    grpc_services: Table<Leaf>,
    paths: Branch,
    anywhere: Leaf,
}

impl RouteTable {
    /// From the routes of a checked destination; the last one is the implicit route.
    pub fn new(routes: &[Route]) -> Self {
        let implicit = routes.len().saturating_sub(1);
        let mut index = Self {
            implicit,
            is_trivial: implicit == 0,
            grpc_methods: Table::default(),
            grpc_services: Table::default(),
            paths: Branch::default(),
            anywhere: Leaf::default(),
        };
        let mut order: Vec<usize> = (0..implicit).collect();
        order.sort_by_cached_key(|at| precedence(&routes[*at].matches));
        for at in order {
            index.add(at, &routes[at].matches);
        }
        index
    }

    fn add(&mut self, route: usize, matches: &RouteMatch) {
        let leaf = match &matches.path {
            PathMatch::Any => &mut self.anywhere,
            PathMatch::GrpcMethod { service, method } => {
                self.grpc_methods.entry(format!("/{service}/{method}").into()).or_default()
            }
            PathMatch::GrpcService(service) => self.grpc_services.entry(format!("/{service}").into()).or_default(),
            // The check has parsed the template, so an invalid one is in no model.
            PathMatch::Template(template) => match parse_template(template) {
                Ok(segments) => self.paths.leaf(&segments),
                Err(_) => return,
            },
        };
        leaf.add(route, matches);
    }

    /// Index of the route that matches the call; the implicit last one if no other does. `path` is without query.
    pub fn find(&self, method: &Method, path: &str, headers: &HeaderMap) -> usize {
        if self.is_trivial {
            return self.implicit;
        }
        self.find_grpc(method, path, headers)
            .or_else(|| self.paths.find(Some(path.strip_prefix('/')?), method, headers))
            .or_else(|| self.anywhere.find(method, headers))
            .unwrap_or(self.implicit)
    }

    fn find_grpc(&self, method: &Method, path: &str, headers: &HeaderMap) -> Option<usize> {
        if (self.grpc_methods.is_empty() && self.grpc_services.is_empty()) || !is_grpc(headers) {
            return None;
        }
        let by_method = self.grpc_methods.get(path).and_then(|leaf| leaf.find(method, headers));
        by_method.or_else(|| {
            let (service, _) = path.rsplit_once('/')?;
            self.grpc_services.get(service)?.find(method, headers)
        })
    }
}

/// The hosts of all destinations.
#[derive(Debug, Default)]
pub struct HostTable {
    exact: Table<usize>,
    suffixes: Table<usize>,
    any: Option<usize>,
}

impl HostTable {
    /// From the destinations of a checked model.
    pub fn new(destinations: &[Destination]) -> Self {
        let mut index = Self::default();
        for (at, destination) in destinations.iter().enumerate() {
            for host in &destination.hosts {
                match host {
                    HostPattern::Exact(name) => drop(index.exact.insert(name.as_str().into(), at)),
                    HostPattern::Suffix(suffix) => drop(index.suffixes.insert(suffix.as_str().into(), at)),
                    HostPattern::Any => index.any = Some(at),
                }
            }
        }
        index
    }

    /// The destination of a host without its port, in any case, with or without a final dot, IPv6 with or without
    /// brackets: the exact name wins, then the longest suffix, then `*`.
    pub fn find(&self, host: &str) -> Option<usize> {
        let host = normal(host);
        if let Some(at) = self.exact.get(&*host) {
            return Some(*at);
        }
        if !self.suffixes.is_empty() {
            let mut rest = &*host;
            while let Some((_, suffix)) = rest.split_once('.') {
                if let Some(at) = self.suffixes.get(suffix) {
                    return Some(*at);
                }
                rest = suffix;
            }
        }
        self.any
    }
}

/// Normal form of a host: lower case, no final dot, no brackets. Copies only if there are upper-case letters.
pub(super) fn normal(host: &str) -> Cow<'_, str> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let bare = bare.strip_suffix('.').unwrap_or(bare);
    if bare.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(bare.to_ascii_lowercase())
    } else {
        Cow::Borrowed(bare)
    }
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Parameter { prefix, suffix } => write!(f, "{prefix}{{}}{suffix}"),
            Self::Rest => f.write_str("{*}"),
        }
    }
}

#[cfg(test)]
mod tests;
