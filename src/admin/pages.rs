//! Responses of the admin server: from a request head to a response, without a socket.

use bytes::Bytes;
use http::header::{
    ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderMap, HeaderName,
    HeaderValue, ORIGIN, X_CONTENT_TYPE_OPTIONS,
};
use http::request::Parts;
use http::uri::Authority;
use http::{Method, Response, StatusCode};
use http_body_util::Full;

use super::{ProcessView, status};
use crate::telemetry::{PageFormat, Telemetry};

const PAGE: &str = include_str!("status.html");
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The status page may load its own figures only, and no page may frame it.
const PAGE_CSP: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
    img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const PATHS: &str = "/         status page
/status   figures of the status page as JSON
/live     200 while the process runs
/ready    200 when ready for traffic, else 503 with the reasons
/metrics  Prometheus text, or OpenMetrics if Accept lists it
/policy   the policy in force
/drain    POST: finish exchanges in flight, accept no new ones, exit
";

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=utf-8";

/// The response to a request with this head; the request body is never read.
pub(super) fn respond(request: &Parts, process: &dyn ProcessView, telemetry: &Telemetry) -> Response<Full<Bytes>> {
    let path = request.uri.path();
    let allowed = if path == "/drain" { "POST" } else { "GET, HEAD" };
    let is_known = matches!(path, "/" | "/status" | "/live" | "/ready" | "/metrics" | "/policy" | "/drain");
    let is_allowed = match request.method {
        Method::POST => path == "/drain",
        Method::GET | Method::HEAD => path != "/drain",
        _ => false,
    };
    let mut response = match path {
        _ if !is_known => page(StatusCode::NOT_FOUND, TEXT, format!("No such path. Paths:\n\n{PATHS}")),
        _ if !is_allowed => {
            let mut response = page(StatusCode::METHOD_NOT_ALLOWED, TEXT, format!("Use {allowed}.\n"));
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
            response
        }
        "/drain" => drain(request, process),
        "/live" => page(StatusCode::OK, TEXT, "live\n"),
        "/ready" => ready(process),
        "/metrics" => metrics(&request.headers, telemetry),
        "/policy" => page(StatusCode::OK, JSON, process.policy_json()),
        "/status" => {
            let reasons = process.ready().err().unwrap_or_default();
            page(StatusCode::OK, JSON, status::document(&process.status(), reasons, telemetry))
        }
        _ => {
            let mut response = page(StatusCode::OK, HTML, PAGE);
            response.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_CSP));
            response
        }
    };
    if request.method == Method::HEAD {
        // hyper omits the body by itself on HTTP/1 only; `Content-Length` stays that of the GET.
        *response.body_mut() = Full::default();
    }
    response
}

fn page(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let body = body.into();
    let length = HeaderValue::from(body.len());
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CONTENT_LENGTH, length);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn ready(process: &dyn ProcessView) -> Response<Full<Bytes>> {
    match process.ready() {
        Ok(()) => page(StatusCode::OK, TEXT, "ready\n"),
        Err(reasons) => page(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("not ready\n{}\n", reasons.join("\n"))),
    }
}

fn metrics(headers: &HeaderMap, telemetry: &Telemetry) -> Response<Full<Bytes>> {
    let fields: Vec<_> = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let format = PageFormat::accepted(&fields.join(","));
    page(StatusCode::OK, format.content_type(), telemetry.page(format))
}

fn drain(request: &Parts, process: &dyn ProcessView) -> Response<Full<Bytes>> {
    if let Err(reason) = check_origin(request) {
        return page(StatusCode::FORBIDDEN, TEXT, format!("Refused: {reason}.\n"));
    }
    process.begin_drain();
    page(StatusCode::ACCEPTED, TEXT, "draining\n")
}

/// Rejects drain requests from pages of other origins (CSRF). Command-line clients send none of these fields.
fn check_origin(request: &Parts) -> Result<(), &'static str> {
    let headers = &request.headers;
    if headers.get(SEC_FETCH_SITE).is_some_and(|site| site != "same-origin" && site != "none") {
        return Err("the request comes from a page of another origin");
    }
    let Some(origin) = headers.get(ORIGIN) else {
        return Ok(());
    };
    let host: Option<Authority> = match request.uri.authority() {
        Some(authority) => Some(authority.clone()),
        None => headers.get(HOST).and_then(|host| host.as_bytes().try_into().ok()),
    };
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, authority)| authority);
    let (Some(host), Some(origin)) = (host, origin) else {
        return Err("the request comes from a page of an unknown origin");
    };
    if !origin.eq_ignore_ascii_case(host.as_str()) {
        return Err("the request comes from a page of another origin");
    }
    // Equal names prove nothing if the name belongs to an attacker and resolves to this address (DNS rebinding).
    let name = host.host();
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    if address.is_err() && !name.eq_ignore_ascii_case("localhost") {
        return Err("a browser may drain only under an IP address or localhost");
    }
    Ok(())
}
