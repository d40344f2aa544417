//! Check of one listener.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use super::{Known, required_name};
use crate::net::http2::MAX_STREAMS;
use crate::policy::model::{Direction, Listener, ListenerTarget, ListenerTls};
use crate::policy::spec::{ListenerSpec, ListenerTlsSpec};
use crate::problems::{Cursor, Sourced, near_miss};
use crate::rules::duration::DurationSpec;

const HEADERS_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE: Duration = Duration::from_secs(60);
const MAX_HEADER_SIZE: u32 = 64 << 10;
const MAX_HEADER_COUNT: u32 = 256;

pub(super) fn check(
    spec: &ListenerSpec,
    destinations: &[Known<'_>],
    is_complete: bool,
    folder: &Path,
    at: &Cursor<'_>,
) -> Listener {
    at.missing("bind", "write the address to listen at, like `bind: 0.0.0.0:8080`");
    let target = target(spec, destinations, is_complete, at);
    let usual = match target {
        ListenerTarget::To(_) => Direction::Inbound,
        ListenerTarget::Forward => Direction::Outbound,
    };
    let timeouts_at = at.key("timeouts");
    let timeout = |key: &str, span: Option<DurationSpec>, built_in: Duration| {
        span.map_or(Sourced::built_in(built_in), |span| timeouts_at.key(key).set(span.0))
    };
    let timeouts = spec.timeouts.as_ref();
    Listener {
        name: required_name(spec.name.as_ref(), at),
        bind: spec.bind.map_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), |bind| bind.0),
        target,
        direction: spec.direction.unwrap_or(usual),
        headers_timeout: timeout("headers", timeouts.and_then(|t| t.headers), HEADERS_TIMEOUT),
        idle: timeout("idle", timeouts.and_then(|t| t.idle), IDLE),
        max_header_size: spec
            .max_header_size
            .map_or(Sourced::built_in(MAX_HEADER_SIZE), |size| at.key("maxHeaderSize").set(size.0)),
        max_header_count: spec
            .max_header_count
            .map_or(Sourced::built_in(MAX_HEADER_COUNT), |count| at.key("maxHeaderCount").set(count.0)),
        max_streams: spec.max_streams.map_or(Sourced::built_in(MAX_STREAMS), |count| at.key("maxStreams").set(count.0)),
        tls: spec.tls.as_ref().map(|spec| tls(spec, folder, &at.key("tls"))),
        origin: at.origin(),
    }
}

fn target(spec: &ListenerSpec, destinations: &[Known<'_>], is_complete: bool, at: &Cursor<'_>) -> ListenerTarget {
    let (to_at, forward_at) = (at.key("to"), at.key("forward"));
    match (&spec.to, spec.forward) {
        (Some(_), Some(true)) => {
            forward_at.report("a listener has `to` or `forward: true`, not both", "remove one of the two");
            ListenerTarget::Forward
        }
        (Some(name), _) => find(name, destinations, is_complete, &to_at),
        (None, Some(true)) => ListenerTarget::Forward,
        (None, _) => {
            if !to_at.is_given() && (spec.forward.is_some() || !forward_at.is_given()) {
                at.report(
                    "a listener needs `to` or `forward: true`",
                    "write `to:` with a destination's name, or `forward: true` for an explicit proxy",
                );
            }
            ListenerTarget::Forward
        }
    }
}

fn find(name: &str, destinations: &[Known<'_>], is_complete: bool, at: &Cursor<'_>) -> ListenerTarget {
    if let Some(index) = destinations.iter().position(|known| known.name == name) {
        let destination = &destinations[index];
        if !destination.has_endpoints {
            at.report(
                format!("destination `{name}` ({}) has no endpoints to send to", destination.origin),
                "give it `endpoints`: only a forward listener can use the host of the request",
            );
        }
        return ListenerTarget::To(index);
    }
    if is_complete {
        let names = destinations.iter().map(|known| known.name);
        let hint = near_miss(name, names).map_or_else(
            || "write the name of one of `destinations`".to_owned(),
            |near| format!("did you mean `{near}`?"),
        );
        at.report(format!("there is no destination `{name}`"), hint);
    }
    ListenerTarget::To(usize::MAX)
}

fn tls(spec: &ListenerTlsSpec, folder: &Path, at: &Cursor<'_>) -> ListenerTls {
    at.missing("certificate", "write the file of the certificate chain (PEM)");
    at.missing("key", "write the file of the private key (PEM)");
    let path = |name: &Option<String>| folder.join(name.as_deref().unwrap_or_default());
    ListenerTls { certificate: path(&spec.certificate), key: path(&spec.key) }
}
