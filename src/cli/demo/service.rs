//! The three small services of the demo: each does some work, then calls the next one. None has a timeout, a retry or a
//! breaker.
//!
//! What a service passes on of a call are two fields: the id by which hopguard knows what belongs together, and the key
//! that makes the call safe to repeat.

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

/// The `x-request-id` of the one call whose time is watched on its way.
pub(super) const WATCHED: HeaderValue = HeaderValue::from_static("in-a-hurry");

/// Connections that one service serves at the same time; the next one waits to be accepted.
const CONNECTIONS: usize = 1024;

/// What can be changed about a service while it runs, and what it has seen.
#[derive(Default)]
pub(super) struct State {
    /// How much longer its own work takes at the moment.
    pub(super) slower: Cell<Duration>,
    /// Whether it answers everything with 503 at the moment.
    pub(super) fails: Cell<bool>,
    /// How many calls have reached it.
    pub(super) calls: Cell<u64>,
    /// How much time it was told that the watched call has left.
    pub(super) told: Cell<Option<Duration>>,
}

/// What a service does where the one that it calls has failed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Otherwise {
    /// Fails too.
    Fail,
    /// Takes the call all the same, to finish it later.
    Later,
}

/// One service, and what it does with a call.
pub(super) struct Service {
    /// Its name.
    pub(super) name: &'static str,
    /// How long its own work takes, in microseconds; drawn for each call.
    pub(super) work: Range<u64>,
    /// What changes.
    pub(super) state: Rc<State>,
    /// Whom it calls before it answers, and with which path.
    pub(super) next: Option<(Client, &'static str)>,
    /// What if that fails.
    pub(super) otherwise: Otherwise,
}

/// A free port of loopback, taken before the service runs: its hopguard has to know the address first.
pub(super) async fn bind() -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

impl Service {
    /// Begins to serve, until the runtime ends.
    pub(super) fn start(self, listener: TcpListener) {
        tasks::spawn(Rc::new(self).accept(listener));
    }

    async fn accept(self: Rc<Self>, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let this = Rc::clone(&self);
            tasks::spawn(async move {
                this.serve(stream).await;
                drop(place);
            });
        }
    }

    /// Serves one connection; hyper drops the work of a caller that goes away.
    async fn serve(self: Rc<Self>, stream: TcpStream) {
        let service = service_fn(|request: Request<Incoming>| {
            let this = Rc::clone(&self);
            async move { Ok::<_, Infallible>(this.answer(request.headers()).await) }
        });
        // A connection that broke is over; its caller knows.
        let _over = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    }

    async fn answer(&self, fields: &HeaderMap) -> Response<Full<Bytes>> {
        self.note(fields);
        let work = Duration::from_micros(fastrand::u64(self.work.clone()));
        sleep(work + self.state.slower.get()).await;
        if self.state.fails.get() {
            return said(StatusCode::SERVICE_UNAVAILABLE, self.name, "failed");
        }
        let Some((client, path)) = &self.next else { return said(StatusCode::OK, self.name, "done") };
        match client.post(path, passed_on(fields)).await {
            Ok((head, _)) if head.status.is_success() => said(StatusCode::OK, self.name, "done"),
            Ok(_) | Err(_) if self.otherwise == Otherwise::Later => {
                said(StatusCode::ACCEPTED, self.name, "payment pending")
            }
            Ok(_) | Err(_) => said(StatusCode::SERVICE_UNAVAILABLE, self.name, "failed"),
        }
    }

    fn note(&self, fields: &HeaderMap) {
        self.state.calls.update(|calls| calls + 1);
        if fields.get(X_REQUEST_ID) == Some(&WATCHED) {
            let left = fields.get(EXPECTED_RQ_TIMEOUT_MS);
            let left = left.and_then(|value| parse_expected_rq_timeout_ms(value.as_bytes()).ok().flatten());
            self.state.told.set(left);
        }
    }
}

fn passed_on(fields: &HeaderMap) -> HeaderMap {
    let kept = [X_REQUEST_ID, IDEMPOTENCY_KEY].into_iter();
    kept.filter_map(|name| fields.get(&name).map(|value| (name, value.clone()))).collect()
}

fn said(status: StatusCode, name: &str, what: &str) -> Response<Full<Bytes>> {
    let document = serde_json::json!({ "service": name, "said": what });
    let mut answer = Response::new(Full::from(format!("{document}\n")));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
