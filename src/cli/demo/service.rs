//! The three small services of the demo: each does some work, then calls the next one, and has no timeout.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::cli::demo::client::Client;
use crate::runtime::tasks;

/// Connections that one service serves at the same time; the next one waits to be accepted.
const CONNECTIONS: usize = 1024;

/// One service, and what it does with a call.
pub(super) struct Service {
    /// Its name.
    pub(super) name: &'static str,
    /// How long its own work takes, in microseconds; drawn for each call.
    pub(super) work: Range<u64>,
    /// How much longer the work takes at the moment.
    pub(super) slower: Rc<Cell<Duration>>,
    /// Whom it calls before it answers, and with which path.
    pub(super) next: Option<(Client, &'static str)>,
}

impl Service {
    /// Begins to serve on a free port of loopback, until the runtime ends.
    pub(super) async fn start(self) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        tasks::spawn(Rc::new(self).accept(listener));
        Ok(address)
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
        let service = service_fn(|_: Request<Incoming>| {
            let this = Rc::clone(&self);
            async move { Ok::<_, Infallible>(this.answer().await) }
        });
        // A connection that broke is over; its caller knows.
        let _over = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    }

    async fn answer(&self) -> Response<Full<Bytes>> {
        let work = Duration::from_micros(fastrand::u64(self.work.clone()));
        sleep(work + self.slower.get()).await;
        let Some((client, path)) = &self.next else { return said(StatusCode::OK, self.name, "done") };
        match client.post(path).await {
            Ok((head, _)) if head.status.is_success() => said(StatusCode::OK, self.name, "done"),
            Ok(_) | Err(_) => said(StatusCode::SERVICE_UNAVAILABLE, self.name, "not now, try again later"),
        }
    }
}

fn said(status: StatusCode, name: &str, what: &str) -> Response<Full<Bytes>> {
    let document = serde_json::json!({ "service": name, "said": what });
    let mut answer = Response::new(Full::from(format!("{document}\n")));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
