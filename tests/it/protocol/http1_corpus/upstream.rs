//! The scripted peer behind the proxy: it keeps every byte of every connection and answers as the case says.
//!
//! It answers a request only when the strict parser has read it wholly (or at its head, where the case says so),
//! so that what it answers is what it was asked, whatever another recipient would have made of the bytes.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::case::{Answer, Then};
use super::strict::{self, Message, Tail};

/// Asked on the caller's own connection after the case, to see what is left on it.
pub(crate) const END: &str = "/corpus-end";
/// Asked on a new connection after the case, to see what is left at the upstream.
pub(crate) const SYNC: &str = "/corpus-sync";

const PLAIN: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// One connection as the upstream saw it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// All bytes received.
    pub(crate) bytes: Vec<u8>,
    /// The proxy, or the case's script, has ended it.
    pub(crate) ended: bool,
}

/// A listening upstream; it stops when it is dropped.
pub(crate) struct Upstream {
    addr: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    changed: Arc<Notify>,
    _accepting: JoinSet<()>,
}

impl Upstream {
    /// Listens on a free port of the loopback.
    pub(crate) async fn start(answer: Answer) -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("bound");
        let (seen, changed) = (Arc::default(), Arc::new(Notify::new()));
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, Arc::new(answer), Arc::clone(&seen), Arc::clone(&changed)));
        Upstream { addr, seen, changed, _accepting: accepting }
    }

    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Every connection so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no holder panics").clone()
    }

    /// Waits until every connection that holds the beginning of a request has ended.
    pub(crate) async fn settled(&self) {
        loop {
            let changed = self.changed.notified();
            let open = |seen: &Seen| {
                let partial = matches!(strict::requests(&seen.bytes).1, Tail::Partial { .. });
                partial && !seen.ended
            };
            if !self.seen().iter().any(open) {
                return;
            }
            changed.await;
        }
    }
}

async fn accept(listener: TcpListener, answer: Arc<Answer>, seen: Arc<Mutex<Vec<Seen>>>, changed: Arc<Notify>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let index = {
            let mut all = seen.lock().expect("no holder panics");
            all.push(Seen::default());
            all.len() - 1
        };
        let (answer, seen, changed) = (Arc::clone(&answer), Arc::clone(&seen), Arc::clone(&changed));
        connections.spawn(async move {
            let note = |bytes: &[u8], ended: bool| {
                let mut all = seen.lock().expect("no holder panics");
                all[index].bytes.extend(bytes);
                all[index].ended |= ended;
                let so_far = all[index].bytes.clone();
                drop(all);
                changed.notify_waiters();
                so_far
            };
            Box::pin(converse(stream, &answer, note)).await;
        });
    }
}

/// Reads until the peer or the script ends the connection, answering each request once.
async fn converse(mut stream: TcpStream, answer: &Answer, note: impl Fn(&[u8], bool) -> Vec<u8>) {
    let mut buffer = vec![0; 64 * 1024];
    let (mut answered, mut prepared) = (0, 0);
    loop {
        let count = stream.read(&mut buffer).await.unwrap_or(0);
        let bytes = note(&buffer[..count], count == 0);
        if count == 0 {
            return;
        }
        let (whole, tail) = strict::requests(&bytes);
        if matches!(tail, Tail::Broken(_)) {
            note(b"", true);
            return;
        }
        let mut heads: Vec<&Message> = whole.iter().collect();
        if let Tail::Partial { head: Some(head) } = &tail {
            heads.push(head);
        }
        for (index, head) in heads.iter().enumerate() {
            let probe = head.start.1 == END || head.start.1 == SYNC;
            if index >= prepared && !probe {
                prepared = index + 1;
                let _gone = stream.write_all(&answer.interim).await;
            }
            let due = index < whole.len() || (answer.early && !probe);
            if index < answered || !due {
                continue;
            }
            answered = index + 1;
            let then = reply(&mut stream, head, answer, probe).await;
            if then != Then::Keep {
                if then == Then::Reset {
                    let _late = socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO));
                }
                note(b"", true);
                return;
            }
            if switched(&answer.bytes) && !probe {
                return Box::pin(echo(stream, note)).await;
            }
        }
    }
}

async fn reply(stream: &mut TcpStream, request: &Message, answer: &Answer, probe: bool) -> Then {
    if probe {
        let name = &request.start.1;
        let text = format!("HTTP/1.1 200 OK\r\nX-Probe: {name}\r\nContent-Length: 2\r\n\r\nok");
        let _gone = stream.write_all(text.as_bytes()).await;
        return if request.lists("connection", "close") { Then::Close } else { Then::Keep };
    }
    let plain = if request.start.0 == "HEAD" { &PLAIN[..PLAIN.len() - 2] } else { PLAIN };
    let bytes = if answer.bytes.is_empty() { plain } else { &answer.bytes };
    if !answer.nothing {
        let _gone = stream.write_all(bytes).await;
    }
    if request.lists("connection", "close") { answer.then.max_close() } else { answer.then }
}

impl Then {
    fn max_close(self) -> Then {
        if self == Then::Keep { Then::Close } else { self }
    }
}

fn switched(answer: &[u8]) -> bool {
    answer.starts_with(b"HTTP/1.1 101 ")
}

async fn echo(mut stream: TcpStream, note: impl Fn(&[u8], bool) -> Vec<u8>) {
    let mut buffer = [0; 4096];
    loop {
        let count = stream.read(&mut buffer).await.unwrap_or(0);
        if count == 0 || stream.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    note(b"", true);
}
