//! A caller or an upstream that speaks HTTP/2 frame by frame (RFC 9113, 4 and 6), so that a test can send any frame at any
//! time and see each frame that comes.

use super::peer::{Ending, Peer};

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

const PREFACE: &str = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// One frame.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// The error code of RST_STREAM.
    pub(crate) fn code(&self) -> u32 {
        u32::from_be_bytes(self.payload[..4].try_into().unwrap())
    }

    /// True if it ends what its side sends on the stream.
    pub(crate) fn ends_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }
}

/// One end of an HTTP/2 connection.
pub(crate) struct Frames {
    pub(crate) peer: Peer,
}

impl Frames {
    /// Begins as the client.
    pub(crate) async fn client(mut peer: Peer) -> Self {
        peer.send(PREFACE).await;
        Self::begin(peer).await
    }

    /// Begins as the server.
    pub(crate) async fn server(mut peer: Peer) -> Self {
        peer.until(PREFACE).await.unwrap();
        Self::begin(peer).await
    }

    async fn begin(peer: Peer) -> Self {
        let mut this = Self { peer };
        this.send(SETTINGS, 0, 0, b"").await;
        this
    }

    pub(crate) async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], kind, flags];
        bytes.extend_from_slice(&stream.to_be_bytes());
        bytes.extend_from_slice(payload);
        self.peer.send(bytes).await;
    }

    /// Sends a header section as literals without a name of the table (RFC 7541, 6.2.2).
    pub(crate) async fn headers(&mut self, stream: u32, flags: u8, fields: &[(&str, &str)]) {
        let mut block = Vec::new();
        for (name, value) in fields {
            block.push(0);
            for text in [name, value] {
                block.push(u8::try_from(text.len()).ok().filter(|length| *length < 127).unwrap());
                block.extend_from_slice(text.as_bytes());
            }
        }
        self.send(HEADERS, flags, stream, &block).await;
    }

    pub(crate) async fn reset(&mut self, stream: u32, code: u32) {
        self.send(RST_STREAM, 0, stream, &code.to_be_bytes()).await;
    }

    pub(crate) async fn go_away(&mut self, last: u32, code: u32) {
        self.send(GOAWAY, 0, 0, &[last.to_be_bytes(), code.to_be_bytes()].concat()).await;
    }

    /// The next frame of a stream, or GOAWAY; SETTINGS and PING are acknowledged.
    pub(crate) async fn next(&mut self) -> Result<Frame, Ending> {
        loop {
            let head = self.peer.exact(9).await?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let payload = self.peer.exact(length as usize).await?;
            let stream = u32::from_be_bytes(head[5..9].try_into().unwrap());
            let frame = Frame { kind: head[3], flags: head[4], stream, payload };
            match frame.kind {
                SETTINGS | PING if frame.flags & ACK == 0 => {
                    let payload = if frame.kind == PING { frame.payload } else { Vec::new() };
                    self.send(frame.kind, ACK, 0, &payload).await;
                }
                DATA | HEADERS | RST_STREAM | GOAWAY => return Ok(frame),
                _ => {}
            }
        }
    }

    /// The next frame of this kind; frames of other kinds are left out.
    pub(crate) async fn next_of(&mut self, kind: u8) -> Result<Frame, Ending> {
        loop {
            let frame = self.next().await?;
            if frame.kind == kind {
                return Ok(frame);
            }
        }
    }
}
