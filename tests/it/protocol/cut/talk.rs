//! One side of an exchange of the table, over HTTP/1.1 or HTTP/2.

use super::Break;
use crate::support::frames::{DATA, END_HEADERS, END_STREAM, Frames, GOAWAY, HEADERS, RST_STREAM};
use crate::support::http::Speaks;
use crate::support::peer::{Ending, Peer};

/// The first part of a body, and all that comes after it.
pub(super) const PART: &str = "first part, ";
pub(super) const REST: &str = "second part";

/// How the end of a body is marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    Length,
    Chunked,
    /// By the end of the connection: responses over HTTP/1.1 only.
    Close,
}

/// How far a message comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    Head,
    Body,
    Trailers,
}

/// How a message ended for the side that reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sight {
    /// It is complete.
    Whole,
    /// The connection ended before the message did.
    Cut,
    /// RST_STREAM with this code.
    Reset(u32),
    /// A response with this status, from hopguard.
    Status(u16),
    /// No message began.
    Nothing,
}

/// One side.
pub(super) struct Talk {
    line: Line,
    framing: Framing,
}

enum Line {
    Http1(Peer),
    Http2(Frames, u32),
}

impl Talk {
    /// A caller.
    pub(super) async fn caller(speaks: Speaks, peer: Peer, framing: Framing) -> Self {
        let line = match speaks {
            Speaks::Http1 => Line::Http1(peer),
            Speaks::Http2 => Line::Http2(Frames::client(peer).await, 1),
        };
        Self { line, framing }
    }

    /// An app that has read the head of its request.
    pub(super) async fn app(speaks: Speaks, mut peer: Peer, framing: Framing) -> Self {
        let line = match speaks {
            Speaks::Http1 => {
                peer.until("\r\n\r\n").await.unwrap();
                Line::Http1(peer)
            }
            Speaks::Http2 => {
                let mut frames = Frames::server(peer).await;
                let head = frames.next_of(HEADERS).await.unwrap();
                Line::Http2(frames, head.stream)
            }
        };
        Self { line, framing }
    }

    fn framing_field(&self) -> String {
        match self.framing {
            Framing::Length => format!("content-length: {}\r\n", PART.len() + REST.len()),
            Framing::Chunked => "transfer-encoding: chunked\r\ntrailer: x-sum\r\n".to_owned(),
            Framing::Close => String::new(),
        }
    }

    /// Sends the head of a request; `whole` if no body follows, else with the framing of its body.
    pub(super) async fn request(&mut self, path: &str, whole: bool) {
        let method = if whole { "GET" } else { "POST" };
        let framing = if whole { String::new() } else { self.framing_field() };
        match &mut self.line {
            Line::Http1(peer) => {
                let fields = format!("host: shop.test\r\nte: trailers\r\nconnection: te\r\n{framing}");
                peer.send(format!("{method} {path} HTTP/1.1\r\n{fields}\r\n")).await;
            }
            Line::Http2(frames, stream) => {
                let length = (PART.len() + REST.len()).to_string();
                let mut fields =
                    vec![(":method", method), (":scheme", "http"), (":path", path), (":authority", "shop.test")];
                fields.push(("te", "trailers"));
                if !whole && self.framing == Framing::Length {
                    fields.push(("content-length", &length));
                }
                let end = if whole { END_STREAM } else { 0 };
                frames.headers(*stream, END_HEADERS | end, &fields).await;
            }
        }
    }

    /// Sends the head of a response.
    pub(super) async fn response(&mut self) {
        let framing = self.framing_field();
        match &mut self.line {
            Line::Http1(peer) => peer.send(format!("HTTP/1.1 200 OK\r\n{framing}\r\n")).await,
            Line::Http2(frames, stream) => {
                let length = (PART.len() + REST.len()).to_string();
                let mut fields = vec![(":status", "200")];
                if self.framing == Framing::Length {
                    fields.push(("content-length", &length));
                }
                frames.headers(*stream, END_HEADERS, &fields).await;
            }
        }
    }

    /// Sends a part of a head of a request or a response, which breaks off in the middle.
    pub(super) async fn half_head(&mut self, http1: &str, field: (&str, &str)) {
        match &mut self.line {
            Line::Http1(peer) => peer.send(http1).await,
            Line::Http2(frames, stream) => frames.headers(*stream, 0, &[field]).await,
        }
    }

    /// Sends bytes of the body.
    pub(super) async fn body(&mut self, bytes: &str) {
        match &mut self.line {
            Line::Http1(peer) if self.framing == Framing::Chunked => {
                peer.send(format!("{:x}\r\n{bytes}\r\n", bytes.len())).await;
            }
            Line::Http1(peer) => peer.send(bytes).await,
            Line::Http2(frames, stream) => frames.send(DATA, 0, *stream, bytes.as_bytes()).await,
        }
    }

    /// Sends the beginning of the trailers, which break off in the middle; over HTTP/2 none, if the break is a frame, which
    /// cannot come inside of them.
    pub(super) async fn half_trailers(&mut self, how: Break) {
        match &mut self.line {
            Line::Http1(peer) => peer.send("0\r\nx-sum: ").await,
            Line::Http2(frames, stream) if matches!(how, Break::Connection(_)) => {
                frames.headers(*stream, END_STREAM, &[("x-sum", "1")]).await;
            }
            Line::Http2(..) => {}
        }
    }

    /// Ends the message as it should.
    pub(super) async fn finish(&mut self) {
        self.body(REST).await;
        match &mut self.line {
            Line::Http1(peer) if self.framing == Framing::Chunked => peer.send("0\r\n\r\n").await,
            Line::Http1(_) => {}
            Line::Http2(frames, stream) => frames.send(DATA, END_STREAM, *stream, b"").await,
        }
    }

    /// Breaks off.
    pub(super) async fn break_off(&mut self, how: Break) {
        match (&mut self.line, how) {
            (Line::Http1(peer), Break::Connection(ending)) => peer.end(ending).await,
            (Line::Http2(frames, _), Break::Connection(ending)) => frames.peer.end(ending).await,
            (Line::Http2(frames, stream), Break::Reset(code)) => frames.reset(*stream, code).await,
            (Line::Http2(frames, stream), Break::GoAwayAbove) => frames.go_away(*stream, 0).await,
            (Line::Http2(frames, _), Break::GoAwayBelow) => frames.go_away(0, 0).await,
            (Line::Http1(_), _) => panic!("HTTP/1.1 has no frames"),
        }
    }

    /// Reads the first part of the body, and before it the head of a response.
    pub(super) async fn until_part(&mut self) {
        match &mut self.line {
            Line::Http1(peer) => drop(peer.until(PART).await.unwrap()),
            Line::Http2(frames, _) => {
                let data = frames.next_of(DATA).await.unwrap();
                assert_eq!(data.payload, PART.as_bytes());
            }
        }
    }

    /// Reads on to the end of the message, of which the first part has been read.
    pub(super) async fn rest(&mut self) -> Sight {
        let is_chunked = self.framing != Framing::Length;
        match &mut self.line {
            Line::Http1(peer) => {
                let is_whole = |seen: &[u8]| match is_chunked {
                    // What is left begins within a chunk, or with the first one.
                    true => String::from_utf8_lossy(seen).contains("\n0\r\n") && seen.ends_with(b"\r\n\r\n"),
                    false => seen.ends_with(REST.as_bytes()),
                };
                peer.read_while(is_whole).await.map_or(Sight::Cut, |()| Sight::Whole)
            }
            Line::Http2(frames, stream) => loop {
                match frames.next().await {
                    Ok(frame) if frame.kind == GOAWAY => {}
                    Ok(frame) if frame.stream != *stream => panic!("another stream: {frame:?}"),
                    Ok(frame) if frame.kind == RST_STREAM => return Sight::Reset(frame.code()),
                    Ok(frame) if frame.ends_stream() => return Sight::Whole,
                    Ok(_) => {}
                    Err(_) => return Sight::Cut,
                }
            },
        }
    }

    /// Reads a response that comes in place of the app's.
    pub(super) async fn status(&mut self) -> Sight {
        match &mut self.line {
            Line::Http1(peer) => {
                let Ok(head) = peer.until("\r\n\r\n").await else { return Sight::Nothing };
                Sight::Status(head[9..12].parse().unwrap())
            }
            Line::Http2(frames, _) => match frames.next().await {
                // `502` in the code of RFC 7541, appendix B: 6, 5 and 5 bits.
                Ok(frame) if frame.kind == HEADERS => {
                    let is_502 = frame.payload.windows(3).any(|window| window == b"\x82\x6c\x02");
                    if is_502 { Sight::Status(502) } else { Sight::Nothing }
                }
                Ok(frame) if frame.kind == RST_STREAM => Sight::Reset(frame.code()),
                _ => Sight::Nothing,
            },
        }
    }

    /// Waits until the other side closes the connection.
    pub(super) async fn closed(&mut self) -> Ending {
        match &mut self.line {
            Line::Http1(peer) => peer.rest().await.1,
            Line::Http2(frames, _) => frames.peer.rest().await.1,
        }
    }
}
