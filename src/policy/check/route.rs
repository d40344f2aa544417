//! Check of a destination's routes: each by itself, then whether each can match.

use std::collections::{BTreeMap, HashMap};

use http::Method;
use http::header::{HOST, HeaderName, HeaderValue};

use super::{Names, check_not_empty, required_name};
use crate::policy::model::{DEFAULT_ROUTE, PathMatch, Route, RouteMatch};
use crate::policy::router::{Segment, parse_template, precedence};
use crate::policy::spec::{MatchSpec, MethodName, RouteSpec};
use crate::problems::{Cursor, InvalidValue, Origin};
use crate::rules::layers::RouteRules;
use crate::upstream::spec::UpstreamProtocol;

/// Checks all routes of a destination and adds the implicit last one. `base` has the values of the destination.
pub(super) fn check_all(
    specs: &[RouteSpec],
    protocol: UpstreamProtocol,
    base: &RouteRules,
    at: &Cursor<'_>,
) -> Vec<Route> {
    let mut names = Names::default();
    let mut routes = Vec::with_capacity(specs.len() + 1);
    for (index, spec) in specs.iter().enumerate() {
        let at = at.index(index);
        routes.push(check(spec, protocol, base, &at));
        if spec.name.as_deref() == Some(DEFAULT_ROUTE) {
            let hint = "it is the name of the implicit route: choose another name";
            at.key("name").report("the name `default` is taken", hint);
        }
        names.claim("route of this destination", spec.name.as_deref(), &at.key("name"));
    }
    check_matchable(specs, &routes, at);
    routes.push(Route {
        name: DEFAULT_ROUTE.into(),
        matches: RouteMatch::default(),
        rules: base.clone(),
        stream: false,
        origin: Origin::BuiltIn,
    });
    routes
}

fn check(spec: &RouteSpec, protocol: UpstreamProtocol, base: &RouteRules, at: &Cursor<'_>) -> Route {
    let matches_at = at.key("match");
    Route {
        name: required_name(spec.name.as_ref(), at),
        matches: spec.r#match.as_ref().map_or_else(RouteMatch::default, |spec| matches(spec, protocol, &matches_at)),
        rules: spec.check_rules(base, at),
        stream: spec.stream.unwrap_or(false),
        origin: at.origin(),
    }
}

fn matches(spec: &MatchSpec, protocol: UpstreamProtocol, at: &Cursor<'_>) -> RouteMatch {
    let methods = methods(spec, &at.key("methods"));
    let path = match (&spec.path, &spec.grpc) {
        (Some(_), Some(_)) => {
            at.key("grpc")
                .report("`path` and `grpc` exclude each other", "a gRPC method is a path: remove one of the two");
            PathMatch::Any
        }
        (Some(template), None) => template_path(template, &at.key("path")),
        (None, Some(name)) => grpc_path(name, &methods, protocol, &at.key("grpc")),
        (None, None) => PathMatch::Any,
    };
    RouteMatch { methods, path, headers: headers(spec, &at.key("headers")) }
}

fn methods(spec: &MatchSpec, at: &Cursor<'_>) -> Vec<Method> {
    check_not_empty(spec.methods.as_ref(), "without methods, all match", at);
    let mut methods: Vec<Method> = Vec::new();
    for (index, MethodName(text)) in spec.methods.iter().flatten().enumerate() {
        let at = at.index(index);
        match Method::from_bytes(text.as_bytes()) {
            Ok(_) if text.bytes().any(|b| b.is_ascii_lowercase()) => {
                at.report(
                    format!("`{text}` never matches"),
                    format!("methods are upper case: write `{}`", text.to_uppercase()),
                );
            }
            Ok(method) if methods.contains(&method) => {
                at.report(format!("`{text}` appears twice"), "remove one of the two");
            }
            Ok(method) => methods.push(method),
            Err(_) => at.report(format!("`{text}` is not a method"), "write a method like GET or POST"),
        }
    }
    methods.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    methods
}

fn headers(spec: &MatchSpec, at: &Cursor<'_>) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    for (name, value) in spec.headers.iter().flatten() {
        let at = at.key(name);
        let Ok(field) = HeaderName::from_bytes(name.as_bytes()) else {
            at.report_key(InvalidValue::new(format!("`{name}` is not a header name"), "write a name like `x-tenant`"));
            continue;
        };
        if field == HOST {
            // HTTP/2 requests have no such field, so the route would match over HTTP/1 only.
            let hint = "a host chooses the destination: write it in `hosts` of a destination, and use a `forward: true` listener";
            at.report_key(InvalidValue::new(format!("a route cannot match by `{name}`"), hint));
            continue;
        }
        if headers.iter().any(|(other, _)| *other == field) {
            let hint = "header names are case-insensitive: remove one of the two";
            at.report_key(InvalidValue::new(format!("header `{field}` appears twice"), hint));
        }
        match HeaderValue::from_str(value) {
            Ok(_) if value.trim() != value => {
                at.report(format!("`{value}` never matches"), "remove the spaces around the value");
            }
            Ok(value) => headers.push((field, value)),
            Err(_) => at.report("not a header value", "write printable ASCII characters"),
        }
    }
    headers.sort_by(|a, b| a.0.as_str().cmp(b.0.as_str()));
    headers
}

fn template_path(template: &str, at: &Cursor<'_>) -> PathMatch {
    match parse_template(template) {
        Ok(_) => PathMatch::Template(template.to_owned()),
        Err(fault) => {
            at.report_fault(fault);
            PathMatch::Any
        }
    }
}

fn grpc_path(name: &str, methods: &[Method], protocol: UpstreamProtocol, at: &Cursor<'_>) -> PathMatch {
    let is_name = |name: &str| {
        let mut bytes = name.bytes();
        bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
            && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    let is_service = |name: &str| name.split('.').all(is_name);
    if !methods.is_empty() && !methods.contains(&Method::POST) {
        at.report("these methods are not those of gRPC", "a gRPC call is a POST: remove `methods`");
    }
    if protocol == UpstreamProtocol::Http1 {
        at.report("`grpc` never works with `protocol: http1`", "gRPC needs HTTP/2: write `protocol: auto` or `http2`");
    }
    match name.split_once('/') {
        None if is_service(name) => PathMatch::GrpcService(name.to_owned()),
        Some((service, method)) if is_service(service) && is_name(method) => {
            PathMatch::GrpcMethod { service: service.to_owned(), method: method.to_owned() }
        }
        _ => {
            let hint = match name.strip_prefix('/') {
                Some(bare) => format!("write `{bare}`"),
                None => "write `package.Service/Method`, or `package.Service` for all its methods".into(),
            };
            at.report(format!("`{name}` is not a gRPC method or service"), hint);
            PathMatch::Any
        }
    }
}

/// Key of the routes that are evaluated one after the other, because only their methods differ.
#[derive(PartialEq, Eq, Hash)]
struct MatchKey<'a> {
    shape: Option<Vec<Segment>>,
    grpc: Option<&'a PathMatch>,
    headers: &'a [(HeaderName, HeaderValue)],
}

impl<'a> MatchKey<'a> {
    fn of(matches: &'a RouteMatch) -> Self {
        let (shape, grpc) = match &matches.path {
            PathMatch::Any => (None, None),
            PathMatch::Template(template) => (parse_template(template).ok(), None),
            path @ (PathMatch::GrpcMethod { .. } | PathMatch::GrpcService(_)) => (None, Some(path)),
        };
        Self { shape, grpc, headers: &matches.headers }
    }
}

/// Reports each route whose calls all match routes that are evaluated before it.
fn check_matchable(specs: &[RouteSpec], routes: &[Route], at: &Cursor<'_>) {
    let mut order: Vec<usize> = (0..routes.len()).collect();
    order.sort_by_cached_key(|index| precedence(&routes[*index].matches));
    let mut taken: HashMap<MatchKey<'_>, Vec<&Route>> = HashMap::new();
    for index in order {
        let (route, match_at) = (&routes[index], at.index(index));
        let match_at = match_at.key("match");
        // A route with refused conditions has fewer conditions here, and would seem to equal others.
        if !is_whole(&specs[index], route, &match_at) {
            continue;
        }
        let before = taken.entry(MatchKey::of(&route.matches)).or_default();
        let takes = |other: &Route, method: &Method| other.matches.methods.contains(method);
        let all = |other: &&&Route| other.matches.methods.is_empty() == route.matches.methods.is_empty();
        let is_covered = match route.matches.methods.as_slice() {
            [] => before.iter().any(|other| other.matches.methods.is_empty()),
            methods => methods.iter().all(|method| before.iter().any(|other| takes(other, method))),
        };
        if let Some(other) = before.iter().find(all).filter(|_| is_covered) {
            match_at.report(
                format!("route `{}` can never match: `{}` ({}) takes its calls", route.name, other.name, other.origin),
                "remove one of the two, or make their matches differ",
            );
        }
        before.push(route);
    }
}

/// Whether the route has all conditions of the file.
fn is_whole(spec: &RouteSpec, route: &Route, at: &Cursor<'_>) -> bool {
    let Some(spec) = &spec.r#match else { return !at.is_given() };
    let path_is_whole = match route.matches.path {
        PathMatch::Any => !at.key("path").is_given() && !at.key("grpc").is_given(),
        PathMatch::Template(_) | PathMatch::GrpcMethod { .. } | PathMatch::GrpcService(_) => true,
    };
    let is_whole = |key, read: Option<usize>, kept| {
        let at = at.key(key);
        at.is_given() == read.is_some() && at.size() == read.unwrap_or(0) && kept == at.size()
    };
    path_is_whole
        && is_whole("methods", spec.methods.as_ref().map(Vec::len), route.matches.methods.len())
        && is_whole("headers", spec.headers.as_ref().map(BTreeMap::len), route.matches.headers.len())
}
