//! Check of one destination, and of the hosts of all destinations.

use std::collections::HashMap;
use std::path::Path;

use super::{Document, Layer, check_not_empty, required_name, route};
use crate::policy::model::{Destination, HostPattern};
use crate::policy::router::normal;
use crate::policy::spec::DestinationSpec;
use crate::problems::{Cursor, InvalidValue};
use crate::upstream::spec::{EndpointSpec, is_host_name};

pub(super) fn check(spec: &DestinationSpec, base: &Layer, folder: &Path, at: &Cursor<'_>) -> Destination {
    check_not_empty(spec.hosts.as_ref(), "without hosts, calls come only through a listener's `to`", &at.key("hosts"));
    let meaning = "without endpoints, calls go to the host and port of the request";
    check_not_empty(spec.endpoints.as_ref(), meaning, &at.key("endpoints"));
    let connections = match &spec.connections {
        Some(spec) => spec.check(&base.connections, &at.key("connections")),
        None => base.connections.clone(),
    };
    let protocol = spec.protocol.unwrap_or_default();
    let mut rules = spec.check_rules(&base.rules, at);
    rules.route.retry.grpc_failures = rules.destination.circuit_breaker.grpc_failures.value;
    let routes = spec.routes.as_deref().unwrap_or_default();
    Destination {
        name: required_name(spec.name.as_ref(), at),
        hosts: spec.hosts.iter().flatten().filter_map(|host| parse_host(host).ok()).collect(),
        endpoints: endpoints(spec, &at.key("endpoints")),
        protocol,
        tls: spec.tls.as_ref().map(|tls| tls.check(folder, &at.key("tls"))),
        connections,
        routes: route::check_all(routes, protocol, &rules.route, &at.key("routes")),
        rules: rules.destination,
        origin: at.origin(),
    }
}

fn endpoints(spec: &DestinationSpec, at: &Cursor<'_>) -> Vec<EndpointSpec> {
    let mut endpoints: Vec<EndpointSpec> = Vec::new();
    for (index, endpoint) in spec.endpoints.iter().flatten().enumerate() {
        if endpoints.contains(endpoint) {
            at.index(index).report(format!("`{endpoint}` appears twice"), "remove one of the two");
        }
        endpoints.push(endpoint.clone());
    }
    endpoints
}

/// Reports malformed hosts, and hosts that appear twice, in one destination or in two.
pub(super) fn check_hosts(documents: &[Document<'_>]) {
    let mut seen = HashMap::new();
    for document in documents {
        let list = document.at.key("destinations");
        for (index, spec) in document.spec.destinations.iter().flatten().enumerate() {
            let at = list.index(index);
            let hosts_at = at.key("hosts");
            let owner = spec.name.as_deref().unwrap_or("without name");
            for (index, text) in spec.hosts.iter().flatten().enumerate() {
                let at = hosts_at.index(index);
                match parse_host(text) {
                    Err(fault) => at.report_fault(fault),
                    Ok(host) => match seen.get(&host) {
                        Some((owner, origin)) => at.report(
                            format!("host `{text}` is already in destination `{owner}`, at {origin}"),
                            "a host belongs to one destination: remove one of the two",
                        ),
                        None => drop(seen.insert(host, (owner, at.origin()))),
                    },
                }
            }
        }
    }
}

fn parse_host(text: &str) -> Result<HostPattern, InvalidValue> {
    if text == "*" {
        return Ok(HostPattern::Any);
    }
    let name = normal(text);
    let host = match name.strip_prefix("*.") {
        Some(suffix) if is_host_name(suffix) => return Ok(HostPattern::Suffix(suffix.to_owned())),
        _ => &*name,
    };
    if let Ok(address) = host.parse::<std::net::Ipv6Addr>() {
        return Ok(HostPattern::Exact(address.to_string()));
    }
    if is_host_name(host) {
        return Ok(HostPattern::Exact(host.to_owned()));
    }
    let authority = host.split_once("://").map_or(host, |(_, rest)| rest).split('/').next().unwrap_or_default();
    let bare = authority.rsplit_once(':').map_or(authority, |(bare, _)| bare);
    let hint = if bare != host && is_host_name(bare) {
        format!("hosts are matched without scheme, port and path: write `{bare}`")
    } else if host.contains('*') {
        "a star must be alone, or first and before a dot, like `*.shop.example`".into()
    } else {
        "write a name like `payment.shop.svc`, `*.shop.example`, or `*`".into()
    };
    Err(InvalidValue::new(format!("`{text}` is not a host"), hint))
}
