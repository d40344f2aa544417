//! The table of tunnels: a FIN stays a half-close, and all that breaks one side off breaks the other off (RFC 9113, 8.5).

use super::{Break, CANCEL, CODES, Lab};
use crate::support::frames::{DATA, END_HEADERS, END_STREAM, Frames, HEADERS, RST_STREAM};
use crate::support::http::Speaks;
use crate::support::peer::{Ending, Peer};

/// What opens the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Connect(Speaks),
    WebSocket,
}

/// How the end of one side arrives at the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// FIN or END_STREAM, in order.
    End,
    /// RST, or TLS without its end.
    Reset,
    /// RST_STREAM with this code.
    StreamReset(u32),
}

/// The caller's side of an open tunnel.
enum CallerSide {
    Bytes(Peer),
    Stream(Frames),
}

impl CallerSide {
    async fn open(kind: Kind, host: &str, peer: Peer) -> Self {
        match kind {
            Kind::Connect(Speaks::Http2) => {
                let mut frames = Frames::client(peer).await;
                let fields = [(":method", "CONNECT"), (":authority", host)];
                frames.headers(1, END_HEADERS, &fields).await;
                Self::Stream(frames)
            }
            Kind::Connect(Speaks::Http1) => {
                Self::ask(peer, &format!("CONNECT {host} HTTP/1.1\r\nhost: {host}\r\n")).await
            }
            Kind::WebSocket => {
                let fields = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                              sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
                Self::ask(peer, &format!("GET / HTTP/1.1\r\nhost: {host}\r\n{fields}")).await
            }
        }
    }

    async fn ask(mut peer: Peer, head: &str) -> Self {
        peer.send(format!("{head}\r\n")).await;
        Self::Bytes(peer)
    }

    /// Reads the response that opens the tunnel.
    async fn opened(&mut self) {
        match self {
            Self::Bytes(peer) => {
                let head = peer.until("\r\n\r\n").await.unwrap();
                assert!(head.starts_with("HTTP/1.1 200 ") || head.starts_with("HTTP/1.1 101 "), "{head}");
            }
            Self::Stream(frames) => {
                let head = frames.next_of(HEADERS).await.unwrap();
                assert!(!head.ends_stream(), "{head:?}");
            }
        }
    }

    async fn send(&mut self, bytes: &str) {
        match self {
            Self::Bytes(peer) => peer.send(bytes).await,
            Self::Stream(frames) => frames.send(DATA, 0, 1, bytes.as_bytes()).await,
        }
    }

    async fn until(&mut self, bytes: &str) {
        match self {
            Self::Bytes(peer) => drop(peer.until(bytes).await.unwrap()),
            Self::Stream(frames) => assert_eq!(frames.next_of(DATA).await.unwrap().payload, bytes.as_bytes()),
        }
    }

    /// Ends what this side sends.
    async fn finish(&mut self) {
        match self {
            Self::Bytes(peer) => peer.end(Ending::Fin).await,
            Self::Stream(frames) => frames.send(DATA, END_STREAM, 1, b"").await,
        }
    }

    async fn break_off(&mut self, how: Break) {
        match (self, how) {
            (Self::Bytes(peer), Break::Connection(ending)) => peer.end(ending).await,
            (Self::Stream(frames), Break::Connection(ending)) => frames.peer.end(ending).await,
            (Self::Stream(frames), Break::Reset(code)) => frames.reset(1, code).await,
            (Self::Stream(frames), Break::GoAwayAbove | Break::GoAwayBelow) => frames.go_away(0, 0).await,
            (Self::Bytes(_), _) => panic!("a connection has no frames"),
        }
    }

    async fn end(&mut self) -> Seen {
        match self {
            Self::Bytes(peer) => seen(peer.rest().await.1),
            Self::Stream(frames) => loop {
                match frames.next().await {
                    Ok(frame) if frame.kind == RST_STREAM => return Seen::StreamReset(frame.code()),
                    Ok(frame) if frame.ends_stream() => return Seen::End,
                    Ok(_) => {}
                    Err(ending) => panic!("the connection ended: {ending:?}"),
                }
            },
        }
    }
}

fn seen(ending: Ending) -> Seen {
    match ending {
        Ending::Fin => Seen::End,
        Ending::Reset | Ending::Truncated => Seen::Reset,
    }
}

/// Accepts the tunnel as the app. Through a CONNECT the bytes are the caller's own, without hopguard's TLS.
async fn answer(kind: Kind, lab: &Lab) -> Peer {
    if kind != Kind::WebSocket {
        return Peer::tcp(lab.accept_tcp().await);
    }
    let mut app = lab.accept().await;
    app.until("\r\n\r\n").await.unwrap();
    let fields = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";
    app.send(format!("HTTP/1.1 101 Switching Protocols\r\n{fields}\r\n")).await;
    app
}

struct Tunnels {
    kind: Kind,
    tls: bool,
    lab: Lab,
    outcomes: Vec<&'static str>,
}

impl Tunnels {
    async fn start(kind: Kind, tls: bool, timeouts: &str) -> Self {
        let listener = if kind == Kind::WebSocket { "to: app" } else { "forward: true" };
        let lab = Lab::start(Speaks::Http1, tls, listener, timeouts).await;
        Self { kind, tls, lab, outcomes: Vec::new() }
    }

    fn host(&self) -> &'static str {
        if self.kind == Kind::WebSocket { "shop.test" } else { "shop.test:443" }
    }

    fn speaks(&self) -> Speaks {
        if self.kind == Kind::Connect(Speaks::Http2) { Speaks::Http2 } else { Speaks::Http1 }
    }

    /// A tunnel through which bytes have passed both ways.
    async fn open(&self) -> (CallerSide, Peer) {
        let peer = self.lab.call(self.speaks()).await;
        let mut caller = CallerSide::open(self.kind, self.host(), peer).await;
        let mut app = answer(self.kind, &self.lab).await;
        caller.opened().await;
        caller.send("ping").await;
        app.until("ping").await.unwrap();
        app.send("pong").await;
        caller.until("pong").await;
        (caller, app)
    }

    async fn ended(&mut self, outcome: &'static str, what: &str) {
        assert_eq!(self.lab.outcome(self.host()).await, outcome, "{:?} {} {what}", self.kind, self.tls);
        self.outcomes.push(outcome);
    }

    /// One side ends in order, the other goes on and ends after it.
    async fn half_closes(&mut self) {
        let (mut caller, mut app) = self.open().await;
        caller.finish().await;
        assert_eq!(app.rest().await, (String::new(), Ending::Fin), "{:?}", self.kind);
        app.send("late").await;
        caller.until("late").await;
        app.end(Ending::Fin).await;
        assert_eq!(caller.end().await, Seen::End, "{:?}", self.kind);
        drop(caller);
        self.ended("ok", "the caller ends first").await;

        let (mut caller, mut app) = self.open().await;
        app.end(Ending::Fin).await;
        assert_eq!(caller.end().await, Seen::End, "{:?}", self.kind);
        caller.send("late").await;
        app.until("late").await.unwrap();
        caller.finish().await;
        assert_eq!(app.rest().await, (String::new(), Ending::Fin), "{:?}", self.kind);
        drop((caller, app));
        self.ended("ok", "the app ends first").await;
    }

    /// GOAWAY ends no stream that is open.
    async fn goes_on_after_go_away(&mut self) {
        let (mut caller, mut app) = self.open().await;
        caller.break_off(Break::GoAwayBelow).await;
        caller.send("late").await;
        app.until("late").await.unwrap();
        caller.finish().await;
        assert_eq!(app.rest().await.1, Ending::Fin);
        app.end(Ending::Fin).await;
        assert_eq!(caller.end().await, Seen::End);
        drop((caller, app));
        self.ended("ok", "GOAWAY").await;
    }

    async fn caller_breaks_off(&mut self, how: Break) {
        let (mut caller, mut app) = self.open().await;
        caller.break_off(how).await;
        assert_eq!(app.rest().await.1, Ending::Reset, "{:?} {} {how:?}", self.kind, self.tls);
        drop((caller, app));
        self.ended("caller_gone", "the caller breaks off").await;
    }

    /// How the end of a tunnel that broke off arrives at the caller.
    fn reset(&self) -> Seen {
        if self.speaks() == Speaks::Http2 { Seen::StreamReset(CANCEL) } else { Seen::Reset }
    }

    async fn app_breaks_off(&mut self, how: Ending) {
        let (mut caller, mut app) = self.open().await;
        app.end(how).await;
        assert_eq!(caller.end().await, self.reset(), "{:?} {} {how:?}", self.kind, self.tls);
        drop((caller, app));
        self.ended("upstream_cut", "the app breaks off").await;
    }
}

async fn check(kind: Kind) {
    for tls in [false, true] {
        let mut tunnels = Tunnels::start(kind, tls, "").await;
        tunnels.half_closes().await;
        let mut breaks = vec![Break::Connection(Ending::Reset)];
        let mut endings = vec![Ending::Reset];
        if tls {
            breaks.push(Break::Connection(Ending::Truncated));
            // The stream to the app of a CONNECT is the caller's own.
            endings.extend((kind == Kind::WebSocket).then_some(Ending::Truncated));
        }
        if kind == Kind::Connect(Speaks::Http2) {
            tunnels.goes_on_after_go_away().await;
            breaks.push(Break::Connection(Ending::Fin));
            breaks.extend(CODES.map(Break::Reset));
        }
        for how in breaks {
            tunnels.caller_breaks_off(how).await;
        }
        for how in endings {
            tunnels.app_breaks_off(how).await;
        }
        let Tunnels { lab, outcomes, .. } = tunnels;
        lab.stop(&outcomes).await;
    }
}

#[tokio::test]
async fn a_connect_over_http1_that_breaks_off_is_reset_on_the_other_side() {
    check(Kind::Connect(Speaks::Http1)).await;
}

#[tokio::test]
async fn a_connect_over_http2_that_breaks_off_is_reset_on_the_other_side() {
    check(Kind::Connect(Speaks::Http2)).await;
}

#[tokio::test]
async fn a_websocket_that_breaks_off_is_reset_on_the_other_side() {
    check(Kind::WebSocket).await;
}

const KINDS: [Kind; 3] = [Kind::Connect(Speaks::Http1), Kind::Connect(Speaks::Http2), Kind::WebSocket];

#[tokio::test]
async fn a_tunnel_that_a_time_limit_ends_is_reset_on_both_sides() {
    for (limit, outcome) in [("idle: 200ms", "idle_timeout"), ("maxDuration: 200ms", "max_duration")] {
        for (kind, tls) in KINDS.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
            let mut tunnels = Tunnels::start(kind, tls, &format!("    timeouts: {{ {limit} }}\n")).await;
            let (mut caller, mut app) = tunnels.open().await;
            assert_eq!(app.rest().await.1, Ending::Reset, "{kind:?} {tls} {limit}");
            assert_eq!(caller.end().await, tunnels.reset(), "{kind:?} {tls} {limit}");
            drop((caller, app));
            tunnels.ended(outcome, limit).await;
            tunnels.lab.stop(&[outcome]).await;
        }
    }
}

#[tokio::test]
async fn a_tunnel_that_the_end_of_the_grace_time_ends_is_reset_on_both_sides() {
    for kind in [Kind::Connect(Speaks::Http1), Kind::WebSocket] {
        let tunnels = Tunnels::start(kind, false, "").await;
        let (mut caller, mut app) = tunnels.open().await;
        tunnels.lab.mesh.cut_off().await;
        assert_eq!(app.rest().await.1, Ending::Reset, "{kind:?}");
        assert_eq!(caller.end().await, Seen::Reset, "{kind:?}");
    }
}
