//! The caller's side of a case: a raw connection to the proxy that does the steps and keeps what comes back.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::time::timeout;

use super::case::{Case, Step};
use super::strict::{self, Asked, Message, Tail};
use super::upstream::{END, SYNC};

/// The longest that any case may take; more is a hang.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that mean nothing in HTTP, sent through a tunnel and wanted back.
const THROUGH: &[u8] = b"\0\x81through\r\n\r\nGET";

/// What came back.
#[derive(Debug, Clone)]
pub(crate) struct Talk {
    /// All bytes received.
    pub(crate) bytes: Vec<u8>,
    /// The final answers, without the one to the probe.
    pub(crate) answers: Vec<Message>,
    /// What stands after the last answer.
    pub(crate) rest: Tail,
    /// The probe on the same connection was answered, so the connection had stayed open.
    pub(crate) stayed_open: bool,
    /// The connection was still open when patience ended.
    pub(crate) hung: bool,
    /// Bytes came back through the tunnel.
    pub(crate) echoed: bool,
}

/// What the reading half knows so far.
#[derive(Debug, Clone, Default)]
struct Progress {
    finals: usize,
    interim: Vec<u16>,
    switched: bool,
    echoed: bool,
    ended: bool,
}

/// Does the steps of a case, then asks the probe on the same connection, and reads to the end.
pub(crate) async fn talk(proxy: SocketAddr, case: &Case, host: &str) -> Talk {
    let asked = asked(case);
    let wanted = case.verdicts.iter().map(|v| v.receives.len().max(v.forwards.len())).max().unwrap_or(0);
    let stream = TcpStream::connect(proxy).await.expect("the proxy listens");
    let _unneeded = stream.set_nodelay(true);
    let (reader, writer) = stream.into_split();
    let (tell, told) = watch::channel(Progress::default());
    let mut bytes = Vec::new();
    let conversation =
        async { tokio::join!(read(reader, &mut bytes, &asked, tell), write(writer, case, wanted.max(1), host, told)) };
    let hung = timeout(PATIENCE, conversation).await.is_err();
    conclude(bytes, &asked, hung)
}

/// Asks for the second probe on a connection of its own; what came back instead where it was not answered.
pub(crate) async fn sync(proxy: SocketAddr, host: &str) -> Result<(), String> {
    let mut bytes = Vec::new();
    let exchange = async {
        let mut stream = TcpStream::connect(proxy).await?;
        stream.write_all(&probe(SYNC, host)).await?;
        stream.read_to_end(&mut bytes).await
    };
    let ended = timeout(PATIENCE, exchange).await;
    let text = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
    let right = text.starts_with("http/1.1 200")
        && text.contains(&format!("x-probe: {SYNC}\r\n"))
        && text.ends_with("\r\n\r\nok");
    if right { Ok(()) } else { Err(format!("the next call got {text:?} ({ended:?})")) }
}

fn probe(target: &str, host: &str) -> Vec<u8> {
    format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").into_bytes()
}

/// The methods of the answers that can come, from the case's own words.
fn asked(case: &Case) -> Asked {
    let sent = case.sent();
    let start = sent.trim_ascii_start();
    let line = start.split(|b| matches!(b, b'\r' | b'\n')).next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut methods = vec![line.split(' ').next().unwrap_or_default().to_owned()];
    if let Some(verdict) = case.verdicts.iter().max_by_key(|v| v.forwards.len()) {
        methods.extend(verdict.forwards.iter().skip(1).map(|f| f.method.clone()));
    }
    Asked { methods, http10: line.ends_with("HTTP/1.0") }
}

async fn read(mut reader: OwnedReadHalf, bytes: &mut Vec<u8>, asked: &Asked, tell: watch::Sender<Progress>) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = reader.read(&mut buffer).await.unwrap_or(0);
        bytes.extend(&buffer[..count]);
        let interim = strict::interim_statuses(bytes);
        let (found, tail) = strict::responses(bytes, asked, count == 0);
        let echoed = matches!(&tail, Tail::Opaque(after) if after.ends_with(THROUGH));
        let switched = matches!(tail, Tail::Opaque(_));
        // What follows broken bytes cannot be told apart, and waiting for it would only look like a hang.
        let ended = count == 0 || matches!(tail, Tail::Broken(_));
        let _writer_done = tell.send(Progress { finals: found.len(), interim, switched, echoed, ended });
        if ended {
            return;
        }
    }
}

async fn write(
    mut writer: OwnedWriteHalf,
    case: &Case,
    wanted: usize,
    host: &str,
    mut told: watch::Receiver<Progress>,
) {
    for step in &case.steps {
        // A refused caller may find the connection closed while it still writes; what counts is what it reads.
        let _ended = match step {
            Step::Send(bytes) => writer.write_all(bytes).await.is_ok(),
            Step::AwaitInterim(status) => {
                told.wait_for(|p| p.interim.contains(status) || p.ended || p.finals > 0).await.is_ok()
            }
            Step::AwaitAnswers(count) => told.wait_for(|p| p.finals >= *count || p.ended).await.is_ok(),
        };
    }
    if case.caller_closes {
        let _gone = writer.shutdown().await;
        let _ended = told.wait_for(|p| p.ended).await.is_ok();
        return;
    }
    let switched = told.wait_for(|p| p.finals >= wanted || p.ended).await.is_ok_and(|p| p.switched);
    if switched {
        let _gone = writer.write_all(THROUGH).await;
        let _ended = told.wait_for(|p| p.echoed || p.ended).await.is_ok();
        let _gone = writer.shutdown().await;
    } else {
        let _gone = writer.write_all(&probe(END, host)).await;
    }
    let _ended = told.wait_for(|p| p.ended).await.is_ok();
}

fn conclude(bytes: Vec<u8>, asked: &Asked, hung: bool) -> Talk {
    let (answers, rest) = strict::responses(&bytes, asked, !hung);
    let echoed = matches!(&rest, Tail::Opaque(after) if after.ends_with(THROUGH));
    let mut talk = Talk { bytes, answers, rest, stayed_open: false, hung, echoed };
    let to_probe = |m: &Message| m.values("x-probe").contains(&END.as_bytes());
    if talk.answers.last().is_some_and(to_probe) {
        talk.answers.pop();
        talk.stayed_open = true;
    }
    talk
}
