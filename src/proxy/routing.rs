//! Routing: from a request to its route. The route says which destination each attempt goes to ([`super::select`]).

use http::Version;
use http::request::Parts;
use http::uri::Scheme;

use crate::policy::model::{Destination, Listener, ListenerTarget};
use crate::policy::snapshot::RouteId;
use crate::proxy::local_reply::{LocalReply, LocalReplyKind};
use crate::proxy::request_context::RequestContext;
use crate::proxy::target::RequestTarget;

/// Finds the route of a request and sets it.
///
/// # Errors
/// If no destination has the host, if `https` would go out in plain text, or if there is no address to go to.
pub(super) fn route(
    context: &mut RequestContext,
    listener: &Listener,
    head: &Parts,
    target: &RequestTarget<'_>,
) -> Result<(), LocalReply> {
    let route = find(context, listener, head, target)?;
    context.set_route(route, listener.direction);
    let owner = &context.view().destination(route.owner()).values;
    check_scheme(head, listener, owner)?;
    if owner.endpoints.is_empty() && target.host.is_empty() {
        let detail = "the destination has no endpoints and the request names no host";
        return Err(LocalReply::plain(LocalReplyKind::NoRoute, detail));
    }
    Ok(())
}

/// The route: of the listener's own destination, or of the one that the target's host belongs to.
fn find(
    context: &RequestContext,
    listener: &Listener,
    head: &Parts,
    target: &RequestTarget<'_>,
) -> Result<RouteId, LocalReply> {
    let policy = &context.view().policy;
    let owner = match listener.target {
        ListenerTarget::To(position) => Some(position),
        ListenerTarget::Forward => policy.hosts.find(target.bare_host()),
    };
    let owner = owner.ok_or_else(|| {
        let host = target.host;
        LocalReply::plain(LocalReplyKind::NoDestination, format!(
            "the policy has no destination with the host {host:?}; add it to `hosts`, or a destination with the host \"*\""
        ))
    })?;
    Ok(policy.find_route(owner, &head.method, head.uri.path(), &head.headers))
}

/// A target with `https` never goes out in plain text (RFC 9110, 4.2.2). Over HTTP/2 the scheme says nothing: there it is
/// the one of the downstream connection.
fn check_scheme(head: &Parts, listener: &Listener, destination: &Destination) -> Result<(), LocalReply> {
    let is_asked = head.version < Version::HTTP_2 && head.uri.scheme() == Some(&Scheme::HTTPS);
    if !is_asked || listener.target != ListenerTarget::Forward || destination.tls.is_some() {
        return Ok(());
    }
    let detail = format!(
        "the target begins with https, and the destination {} has no `tls`: use CONNECT, or give it `tls`",
        destination.name
    );
    Err(LocalReply::plain(LocalReplyKind::BadRequest, detail))
}
