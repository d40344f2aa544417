//! The three small services of the demo: each does some work, then calls the next one. None has a timeout, a retry or a
//! circuit breaker.
//!
//! A service forwards two header fields of a call: `x-request-id`, by which hopguard correlates the calls, and `idempotency-key`,
//! which makes the call safe to repeat.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::cli::demo::client::Client;
use crate::rules::deadline::{EXPECTED_RQ_TIMEOUT_MS, parse_expected_rq_timeout_ms};
use crate::rules::trace::X_REQUEST_ID;
use crate::runtime::tasks;

/// Makes a POST safe to repeat.
pub(super) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// The `x-request-id` of the one call whose deadline the services record.
pub(super) const WATCHED: HeaderValue = HeaderValue::from_static("in-a-hurry");

/// Maximum number of open connections of one service; the next connection waits to be accepted.
const MAX_CONNECTIONS: usize = 1024;

/// Switches and counters of a running service.
#[derive(Default)]
pub(super) struct ServiceState {
    /// Delay added to the service's own work.
    pub(super) added_delay: Cell<Duration>,
    /// Whether the service answers every call with 503.
    pub(super) fails: Cell<bool>,
    /// Number of calls that reached the service.
    pub(super) calls: Cell<u64>,
    /// Remaining time that the watched call carried in `x-envoy-expected-rq-timeout-ms`.
    pub(super) watched_time_left: Cell<Option<Duration>>,
}

/// What a service does when its own call to the next service fails.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum OnFailure {
    /// Answers 503.
    Fail,
    /// Answers 202: the call is accepted and will be finished later.
    AcceptForLater,
}

/// One service.
pub(super) struct Service {
    /// Name of the service.
    pub(super) name: &'static str,
    /// Range of the own work time, in microseconds; drawn for each call.
    pub(super) work: Range<u64>,
    /// Switches and counters.
    pub(super) state: Rc<ServiceState>,
    /// Client and path of the call to the next service; `None` for the last one.
    pub(super) next: Option<(Client, &'static str)>,
    /// Reaction to a failure of the next service.
    pub(super) on_failure: OnFailure,
}

/// Binds a free loopback port. Separate from [`Service::start`], because the policy of the hopguard contains the address.
pub(super) async fn bind() -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

impl Service {
    /// Serves until the runtime ends.
    pub(super) fn start(self, listener: TcpListener) {
        tasks::spawn(Rc::new(self).accept(listener));
    }

    async fn accept(self: Rc<Self>, listener: TcpListener) {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        while let Ok(permit) = Arc::clone(&permits).acquire_owned().await {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let this = Rc::clone(&self);
            tasks::spawn(async move {
                this.serve(stream).await;
                drop(permit);
            });
        }
    }

    /// Serves one connection; hyper drops the handler of a caller that disconnects.
    async fn serve(self: Rc<Self>, stream: TcpStream) {
        let service = service_fn(|request: Request<Incoming>| {
            let this = Rc::clone(&self);
            async move { Ok::<_, Infallible>(this.respond(request.headers()).await) }
        });
        // A broken connection needs no handling here: the caller sees it.
        let _closed = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    }

    async fn respond(&self, headers: &HeaderMap) -> Response<Full<Bytes>> {
        self.count(headers);
        let work = Duration::from_micros(fastrand::u64(self.work.clone()));
        sleep(work + self.state.added_delay.get()).await;
        if self.state.fails.get() {
            return response(StatusCode::SERVICE_UNAVAILABLE, self.name, "failed");
        }
        let Some((client, path)) = &self.next else { return response(StatusCode::OK, self.name, "done") };
        match client.post(path, forwarded(headers)).await {
            Ok((head, _)) if head.status.is_success() => response(StatusCode::OK, self.name, "done"),
            Ok(_) | Err(_) if self.on_failure == OnFailure::AcceptForLater => {
                response(StatusCode::ACCEPTED, self.name, "payment pending")
            }
            Ok(_) | Err(_) => response(StatusCode::SERVICE_UNAVAILABLE, self.name, "failed"),
        }
    }

    fn count(&self, headers: &HeaderMap) {
        self.state.calls.update(|calls| calls + 1);
        if headers.get(X_REQUEST_ID) == Some(&WATCHED) {
            let left = headers.get(EXPECTED_RQ_TIMEOUT_MS);
            let left = left.and_then(|value| parse_expected_rq_timeout_ms(value.as_bytes()).ok().flatten());
            self.state.watched_time_left.set(left);
        }
    }
}

fn forwarded(headers: &HeaderMap) -> HeaderMap {
    let names = [X_REQUEST_ID, IDEMPOTENCY_KEY].into_iter();
    names.filter_map(|name| headers.get(&name).map(|value| (name, value.clone()))).collect()
}

fn response(status: StatusCode, name: &str, result: &str) -> Response<Full<Bytes>> {
    let document = serde_json::json!({ "service": name, "result": result });
    let mut response = Response::new(Full::from(format!("{document}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
