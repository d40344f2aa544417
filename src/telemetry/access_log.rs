//! The access log: which exchanges get a line, and how the line leaves the process.
//!
//! A worker never waits for it: a thread of its own writes the lines, and when too many wait, because the reader of our
//! standard output is slow, they are thrown away and counted.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::instruments::Counter;
use super::outcome::Outcome;
use super::writer::Writer;

/// How many lines wait for the writer at most.
const LINES: usize = 8192;
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

enum Output {
    Thread(Writer),
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
        let start = |to| Output::Thread(Writer::start("access-log", to, LINES, dropped.clone(), failed));
        let output = match sink {
            Sink::Memory(lines) => Output::Memory(lines),
            Sink::Stdout => start(Box::new(std::io::stdout())),
            Sink::Writer(writer) => start(writer),
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
            Output::Thread(writer) => writer.put(line.as_bytes()),
        }
    }

    /// Waits until everything handed over so far is written, at most `limit`; `false` when that was not enough. It
    /// blocks the thread: for the end of the process.
    pub fn flush(&self, limit: Duration) -> bool {
        match &self.output {
            Output::Thread(writer) => writer.flush(limit),
            Output::Memory(_) => true,
        }
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
