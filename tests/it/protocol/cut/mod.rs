//! A message that one side breaks off is broken off for the other side, never ended: who breaks off, how, where in the
//! message, over which protocols (RFC 9112, 8 and 9.8; RFC 9113, 5.4, 8.1 and 8.5).
//!
//! - `messages`: the table of requests and responses
//! - `talk`: a caller and an app that begin a message, break it off, and see how the other's ends
//! - `tunnels`: the table of CONNECT and WebSocket
//! - `statuses`: the marks that a gRPC caller and an HTTP/1.0 caller get

mod messages;
mod statuses;
mod talk;
mod tunnels;

use futures_util::FutureExt;
use hopguard::telemetry::Outcome;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::support::certificates::Authority;
use crate::support::http::Speaks;
use crate::support::peer::{Ending, Peer};
use crate::support::{Mesh, SOON, eventually};

/// All error codes of RFC 9113, 7, NO_ERROR to HTTP_1_1_REQUIRED.
const CODES: std::ops::RangeInclusive<u32> = 0..=0xd;
const INTERNAL_ERROR: u32 = 2;
const CANCEL: u32 = 8;

/// How one side breaks off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Break {
    /// Its connection ends.
    Connection(Ending),
    /// RST_STREAM with this code.
    Reset(u32),
    /// GOAWAY whose last stream is this one, or one above it: that breaks nothing off, and the message goes on.
    GoAwayAbove,
    /// GOAWAY whose last stream is below this one.
    GoAwayBelow,
}

impl Break {
    /// All ways of a side with this protocol.
    fn all(speaks: Speaks, tls: bool) -> Vec<Self> {
        let mut all = vec![Self::Connection(Ending::Fin), Self::Connection(Ending::Reset)];
        if tls {
            all.push(Self::Connection(Ending::Truncated));
        }
        if speaks == Speaks::Http2 {
            all.extend(CODES.map(Self::Reset));
            all.push(Self::GoAwayAbove);
        }
        all
    }
}

/// A hopguard between a caller and an app that the test plays.
struct Lab {
    mesh: Mesh,
    authority: Authority,
    app: TcpListener,
    acceptor: Option<TlsAcceptor>,
    /// Access log lines that have been looked at.
    lines: usize,
    _folder: tempfile::TempDir,
}

impl Lab {
    /// Over TLS on both sides, or on none. `listener` and `destination` are further fields of the policy.
    async fn start(app: Speaks, tls: bool, listener: &str, destination: &str) -> Self {
        let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
        let identity = authority.issue("shop.test");
        identity.write(folder.path());
        std::fs::write(folder.path().join("ca.crt"), authority.pem()).unwrap();
        let file = |name: &str| folder.path().join(name).display().to_string();
        let ends_tls = format!(", tls: {{ certificate: {}, key: {} }}", file("tls.crt"), file("tls.key"));
        let begins_tls = format!("    tls: {{ ca: {}, serverName: shop.test }}\n", file("ca.crt"));
        let protocol = if app == Speaks::Http2 { "http2" } else { "http1" };
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mesh = Mesh::start(&format!(
            "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", {listener}{} }}
destinations:
  - name: app
    hosts: [shop.test]
    endpoints: [\"{}\"]
    protocol: {protocol}
    retry: off
    circuitBreaker: off
    ejection: off
{}{destination}",
            if tls { &ends_tls } else { "" },
            socket.local_addr().unwrap(),
            if tls { &begins_tls } else { "" },
        ))
        .await;
        let alpn: &[&str] = if app == Speaks::Http2 { &["h2"] } else { &["http/1.1"] };
        let acceptor = tls.then(|| identity.acceptor(alpn));
        Self { mesh, authority, app: socket, acceptor, lines: 0, _folder: folder }
    }

    /// Opens a caller's connection.
    async fn call(&self, speaks: Speaks) -> Peer {
        let to = self.mesh.addr("in");
        let alpn: &[&str] = if speaks == Speaks::Http2 { &["h2"] } else { &["http/1.1"] };
        if self.acceptor.is_some() {
            let stream = self.authority.connect(to, "shop.test", alpn).await.unwrap();
            stream.get_ref().0.set_nodelay(true).unwrap();
            return Peer::tls(stream);
        }
        let stream = TcpStream::connect(to).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Peer::tcp(stream)
    }

    /// Accepts the app's next connection.
    async fn accept(&self) -> Peer {
        let stream = self.accept_tcp().await;
        match &self.acceptor {
            Some(acceptor) => Peer::tls(acceptor.accept(stream).await.unwrap()),
            None => Peer::tcp(stream),
        }
    }

    /// The same, always without TLS.
    async fn accept_tcp(&self) -> TcpStream {
        let (stream, _) = tokio::time::timeout(SOON, self.app.accept()).await.expect("no connection comes").unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// True if no connection to the app has been opened that is not accepted yet.
    fn is_unasked(&self) -> bool {
        self.app.accept().now_or_never().is_none()
    }

    /// The outcome of the exchange with this path or host, which is the next that ends; its connections are closed then.
    async fn outcome(&mut self, of: &str) -> String {
        let line = eventually(|| self.mesh.log().get(self.lines).cloned()).await;
        self.lines += 1;
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        let is_of = |field: &str| line[field].as_str().is_some_and(|value| value == of);
        assert!(is_of("path") || is_of("host"), "{of}: {line}");
        let open = || self.mesh.metric("hopguard_pool_open_connections", &["app"]);
        eventually(|| (open() == 0.0).then_some(())).await;
        line["outcome"].as_str().unwrap().to_owned()
    }

    /// Asserts that there were as many exchanges as expected of each outcome, in log and metrics alike, and ends.
    async fn stop(self, expected: &[&str]) {
        assert_eq!(self.mesh.log().len(), expected.len());
        for outcome in Outcome::ALL.iter().map(|outcome| outcome.as_str()) {
            let count = expected.iter().filter(|one| **one == outcome).count();
            assert_eq!(self.mesh.count(outcome), count as f64, "{outcome}");
        }
        self.mesh.stop().await;
    }
}
