//! The request in the form that the upstream connection needs: HTTP/1.1 or HTTP/2, with the attempt's number and the time
//! that is left.

use std::rc::Rc;

use http::header::{HeaderMap, HeaderName};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Method, Request, Uri, Version, header};
use http_body::Body;

use crate::net::body::RequestBody;
use crate::proxy::attempt::Attempt;
use crate::proxy::deadline;
use crate::proxy::headers::{self, ATTEMPT_COUNT};
use crate::proxy::replay::RetryState;
use crate::proxy::request_context::RequestContext;
use crate::upstream::endpoint::Endpoint;

const PREVIOUS_ATTEMPTS: HeaderName = HeaderName::from_static("grpc-previous-rpc-attempts");

/// The paths of a target without one (RFC 9112, 3.2.1 and 3.2.4).
const SLASH: PathAndQuery = PathAndQuery::from_static("/");
const STAR: PathAndQuery = PathAndQuery::from_static("*");

/// In origin-form, as every request to a server that is not a proxy (RFC 9112, 3.2.1).
pub(super) fn http1(context: &RequestContext, attempt: &mut Attempt, retry: &RetryState) -> Request<RequestBody> {
    let mut request = outgoing(context, attempt, retry);
    *request.version_mut() = Version::HTTP_11;
    if request.uri().authority().is_some() {
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.scheme = None;
        // Exactly one Host field, the target's own (RFC 9112, 3.2.2).
        if let Some(authority) = parts.authority.take()
            && let Ok(host) = HeaderValue::from_str(authority.as_str())
        {
            request.headers_mut().insert(header::HOST, host);
        }
        parts.path_and_query = Some(match parts.path_and_query {
            // Written as `http://host`, without even a slash, which only this comparison tells from `http://host/`.
            Some(path) if path.as_str() == "/" && path != SLASH && request.method() == Method::OPTIONS => STAR,
            Some(path) => path,
            None => SLASH,
        });
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    }
    if request.body().is_end_stream() {
        declare_empty_body(&mut request);
    } else if request.body().size_hint().exact().is_none() {
        // Set here, because hyper leaves the body of a GET out if no field says how it is framed.
        request.headers_mut().insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    let options = connection_options(context, request.headers());
    request.headers_mut().insert(header::CONNECTION, options);
    request
}

/// What the request says of its connection. `keep-alive` means nothing to HTTP/1.1, but Tomcat and Apache announce how long
/// they keep a connection only to a request that says it. A request for another protocol asks for no further request.
fn connection_options(context: &RequestContext, headers: &HeaderMap) -> HeaderValue {
    HeaderValue::from_static(match (headers.contains_key(header::UPGRADE), context.takes_trailers()) {
        (false, false) => "keep-alive",
        (false, true) => "keep-alive, te",
        (true, false) => "upgrade",
        (true, true) => "upgrade, te",
    })
}

/// With control data in pseudo-header fields, and no Host field (RFC 9113, 8.3.1).
pub(super) fn http2(
    context: &RequestContext,
    attempt: &mut Attempt,
    retry: &RetryState,
    endpoint: &Endpoint,
) -> Request<RequestBody> {
    let mut request = outgoing(context, attempt, retry);
    *request.version_mut() = Version::HTTP_2;
    let host = request.headers_mut().remove(header::HOST);
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    let is_encrypted = endpoint.cluster.identity.tls.is_some();
    parts.scheme = Some(if is_encrypted { Scheme::HTTPS } else { Scheme::HTTP });
    if parts.authority.is_none() {
        parts.authority = host
            .and_then(|host| Authority::try_from(host.as_bytes()).ok())
            .or_else(|| endpoint.address.socket.to_string().parse().ok());
    }
    if parts.path_and_query.is_none() {
        parts.path_and_query = Some(SLASH);
    }
    *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    if request.body().is_end_stream() {
        declare_empty_body(&mut request);
    }
    request
}

/// Declares the empty body of a method that usually has one (RFC 9110, 8.6): an HTTP/2 caller need not, and some servers
/// refuse a POST without a length with 411.
fn declare_empty_body(request: &mut Request<RequestBody>) {
    if matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH) {
        request.headers_mut().entry(header::CONTENT_LENGTH).or_insert(HeaderValue::from_static("0"));
    }
}

/// The request, which is there unless a connection has it.
fn outgoing(context: &RequestContext, attempt: &mut Attempt, retry: &RetryState) -> Request<RequestBody> {
    let empty = || Request::new(RequestBody::empty(Rc::clone(context.flow())));
    let mut request = attempt.take_request().unwrap_or_else(empty);
    if attempt.number() > 1 {
        count_attempts(context, attempt.number(), retry, request.headers_mut());
    }
    deadline::write_remaining(context, request.headers_mut(), attempt.sent_at());
    request
}

/// Writes the number of the attempt: counted from 1 as Envoy does, and without the first as gRPC does (gRFC A6). The
/// attempts of this hop come on top of those of the hop before an inbound listener, and of those that the app's own gRPC
/// library has made.
fn count_attempts(context: &RequestContext, number: u16, retry: &RetryState, fields: &mut HeaderMap) {
    let retries = u32::from(number) - 1;
    // The counts that the request came with: one that a connection has handed back was counted already.
    let came_with = |name: &HeaderName| headers::count(retry.original_headers()?.get(name)?);
    let count = came_with(&ATTEMPT_COUNT).unwrap_or(1).saturating_add(retries);
    fields.insert(ATTEMPT_COUNT, HeaderValue::from(count));
    if context.is_grpc() {
        let before = came_with(&PREVIOUS_ATTEMPTS).unwrap_or(0);
        fields.insert(PREVIOUS_ATTEMPTS, HeaderValue::from(before.saturating_add(retries)));
    }
}
