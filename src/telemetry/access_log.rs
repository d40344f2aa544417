//! The access log: which exchanges get a line, and how the line leaves the process.
//!
//! A worker never waits for it. Lines go into a bounded channel to one writer thread; when that is full, because the
//! reader of our standard output is slow, lines are thrown away and counted.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::instruments::Counter;
use super::outcome::Outcome;

/// How many lines wait for the writer at most.
const CHANNEL: usize = 8192;
/// The writer gathers lines for this long before it writes, so that a busy worker rarely has to wake it.
const GATHER: Duration = Duration::from_millis(5);
/// The writer writes at the latest when it has gathered this many bytes.
const BATCH: usize = 256 * 1024;
/// How many lines a memory sink keeps.
const MEMORY_LINES: usize = 65_536;

/// Which exchanges get a line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AccessLogMode {
    /// None.
    Off,
    /// Refusals, 5xx, cut bodies, and gRPC statuses that blame the callee. The default.
    Errors,
    /// All.
    All,
    /// All that `Errors` writes and this share (0 to 1) of the rest.
    Sampled(f64),
}

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineFormat {
    /// One JSON object; the default.
    Json,
    /// For people.
    Text,
}

/// What the policy says about the access log.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AccessLogSettings {
    /// Which exchanges.
    pub mode: AccessLogMode,
    /// In which form.
    pub format: LineFormat,
}

impl Default for AccessLogSettings {
    fn default() -> Self {
        Self { mode: AccessLogMode::Errors, format: LineFormat::Json }
    }
}

impl AccessLogSettings {
    /// One word, so that workers read it without a lock: format, mode, and the sampled share in 2^-32.
    fn pack(self) -> u64 {
        let (mode, share) = match self.mode {
            AccessLogMode::Off => (0, 0),
            AccessLogMode::Errors => (1, 0),
            AccessLogMode::All => (2, 0),
            AccessLogMode::Sampled(share) => (3, (share.clamp(0.0, 1.0) * f64::from(u32::MAX)) as u32),
        };
        u64::from(share) << 32 | mode << 1 | u64::from(self.format == LineFormat::Text)
    }
}

/// The lines of a memory sink.
pub type MemoryLines = Arc<Mutex<Vec<String>>>;

/// Where lines go.
pub enum Sink {
    /// Standard output.
    Stdout,
    /// Any writer; used by the writer thread alone.
    Writer(Box<dyn Write + Send>),
    /// A list that is complete as soon as the exchange is dropped.
    Memory(MemoryLines),
}

impl Sink {
    /// A memory sink and the list it fills.
    pub fn memory() -> (Self, MemoryLines) {
        let lines = MemoryLines::default();
        (Sink::Memory(Arc::clone(&lines)), lines)
    }
}

enum Message {
    Line(Box<str>),
    Flush(SyncSender<()>),
}

enum Output {
    Thread(SyncSender<Message>),
    Memory(MemoryLines),
}

/// The access log of the process.
pub struct AccessLog {
    settings: AtomicU64,
    output: Output,
    dropped: Counter,
}

impl AccessLog {
    pub(super) fn new(sink: Sink, dropped: Counter, failed: Counter) -> Self {
        let output = match sink {
            Sink::Memory(lines) => Output::Memory(lines),
            Sink::Stdout => Output::Thread(start(Box::new(std::io::stdout()), failed)),
            Sink::Writer(writer) => Output::Thread(start(writer, failed)),
        };
        Self { settings: AtomicU64::new(AccessLogSettings::default().pack()), output, dropped }
    }

    /// Changes mode and format; exchanges that end later obey.
    pub fn configure(&self, settings: AccessLogSettings) {
        self.settings.store(settings.pack(), Ordering::Relaxed);
    }

    /// The format of the line to write, or `None` when this exchange gets none.
    #[inline]
    pub(super) fn wants(&self, outcome: Outcome, grpc_status: Option<u32>) -> Option<LineFormat> {
        let settings = self.settings.load(Ordering::Relaxed);
        let wanted = match settings >> 1 & 3 {
            0 => false,
            1 => is_error(outcome, grpc_status),
            2 => true,
            _ => is_error(outcome, grpc_status) || fastrand::u32(..) < (settings >> 32) as u32,
        };
        wanted.then_some(if settings & 1 == 1 { LineFormat::Text } else { LineFormat::Json })
    }

    /// Hands a line, without its line end, to the writer; never waits.
    pub(super) fn put(&self, line: &str) {
        match &self.output {
            Output::Memory(lines) => {
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                if lines.len() < MEMORY_LINES {
                    lines.push(line.to_owned());
                } else {
                    self.dropped.increment();
                }
            }
            Output::Thread(sender) => match sender.try_send(Message::Line(line.into())) {
                Ok(()) => {}
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => self.dropped.increment(),
            },
        }
    }

    /// Waits until everything handed over so far is written, at most `limit`; `false` when that was not enough. It
    /// blocks the thread: for the end of the process.
    pub fn flush(&self, limit: Duration) -> bool {
        let Output::Thread(sender) = &self.output else {
            return true;
        };
        let (done, written) = sync_channel(1);
        let deadline = Instant::now() + limit;
        let mut message = Message::Flush(done);
        // The channel may be full behind a stuck reader, and a plain send would wait for it without a limit.
        while let Err(TrySendError::Full(back)) = sender.try_send(message) {
            if Instant::now() >= deadline {
                return false;
            }
            message = back;
            std::thread::sleep(GATHER);
        }
        written.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
    }
}

impl std::fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessLog").finish_non_exhaustive()
    }
}

/// Whether `errors` mode writes a line. Of the gRPC statuses those are left out that say something about the request
/// and not about the callee: CANCELLED, INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED,
/// FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE, UNAUTHENTICATED.
fn is_error(outcome: Outcome, grpc_status: Option<u32>) -> bool {
    match outcome {
        Outcome::Ok | Outcome::ClientError | Outcome::CallerGone => false,
        Outcome::GrpcError => !matches!(grpc_status, Some(1 | 3 | 5 | 6 | 7 | 9 | 10 | 11 | 16)),
        _ => true,
    }
}

/// Starts the writer thread. Where no thread can be had, the channel is closed, so all lines count as dropped.
fn start(writer: Box<dyn Write + Send>, failed: Counter) -> SyncSender<Message> {
    let (sender, receiver) = sync_channel(CHANNEL);
    let thread = std::thread::Builder::new().name("access-log".to_owned());
    if let Err(error) = thread.spawn(move || write_lines(writer, &receiver, &failed)) {
        tracing::error!(%error, "no thread for the access log: its lines are dropped");
    }
    sender
}

/// Until the last sender is gone: gather what is there, write it, tell whoever waits for a flush.
fn write_lines(mut writer: Box<dyn Write + Send>, receiver: &Receiver<Message>, failed: &Counter) {
    let mut batch = Vec::with_capacity(16 * 1024);
    while let Ok(first) = receiver.recv() {
        let mut waiting = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Line(line) => {
                    batch.extend_from_slice(line.as_bytes());
                    batch.push(b'\n');
                }
                Message::Flush(done) => waiting.push(done),
            }
            next = if batch.len() < BATCH { receiver.try_recv().ok() } else { None };
        }
        if writer.write_all(&batch).and_then(|()| writer.flush()).is_err() {
            failed.increment();
        }
        batch.clear();
        if waiting.is_empty() {
            std::thread::sleep(GATHER);
        }
        for done in waiting {
            // Whoever waited may have given up.
            let _ = done.try_send(());
        }
    }
}
