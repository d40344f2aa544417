//! The access log: which exchanges get a line, and the way of the line out of the process.
//!
//! Workers never wait for the access log: a separate thread writes the lines. While the reader of standard output is
//! too slow and the writer's buffer is full, lines are dropped and counted.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::instruments::Counter;
use super::outcome::Outcome;
use super::writer::Writer;

/// Most lines that wait for the writer.
const MAX_PENDING_LINES: usize = 8192;
/// Most lines that a memory sink keeps.
const MAX_MEMORY_LINES: usize = 65_536;

/// Which exchanges get a line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AccessLogMode {
    /// None.
    Off,
    /// Refusals, 5xx, cut bodies, and gRPC statuses that report a failure of the callee. The default.
    Errors,
    /// All.
    All,
    /// All that `Errors` writes, and this share (0 to 1) of the other exchanges.
    Sampled(f64),
}

/// Format of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineFormat {
    /// One JSON object. The default.
    Json,
    /// Text for people.
    Text,
}

/// The access log settings of the policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AccessLogSettings {
    /// Which exchanges get a line.
    pub mode: AccessLogMode,
    /// Format of the lines.
    pub format: LineFormat,
}

impl Default for AccessLogSettings {
    fn default() -> Self {
        Self { mode: AccessLogMode::Errors, format: LineFormat::Json }
    }
}

impl AccessLogSettings {
    /// The settings in one word, so that workers read them without a lock: format, mode, and the sampled share in units
    /// of 2^-32.
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

/// Destination of the lines.
pub enum Sink {
    /// Standard output.
    Stdout,
    /// Any writer; only the writer thread uses it.
    Writer(Box<dyn Write + Send>),
    /// A list in memory; an exchange's line is in it as soon as the exchange is dropped.
    Memory(MemoryLines),
}

impl Sink {
    /// A memory sink and its list.
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
        let start = |to| Output::Thread(Writer::start("access-log", to, MAX_PENDING_LINES, dropped.clone(), failed));
        let output = match sink {
            Sink::Memory(lines) => Output::Memory(lines),
            Sink::Stdout => start(Box::new(std::io::stdout())),
            Sink::Writer(writer) => start(writer),
        };
        Self { settings: AtomicU64::new(AccessLogSettings::default().pack()), output, dropped }
    }

    /// Changes mode and format, for exchanges that end from now on.
    pub fn configure(&self, settings: AccessLogSettings) {
        self.settings.store(settings.pack(), Ordering::Relaxed);
    }

    /// The format of the line for an exchange with this outcome; `None` if the exchange gets no line.
    #[inline]
    pub(super) fn line_format(&self, outcome: Outcome, grpc_status: Option<u32>) -> Option<LineFormat> {
        let settings = self.settings.load(Ordering::Relaxed);
        let is_logged = match settings >> 1 & 3 {
            0 => false,
            1 => is_error(outcome, grpc_status),
            2 => true,
            _ => is_error(outcome, grpc_status) || fastrand::u32(..) < (settings >> 32) as u32,
        };
        is_logged.then_some(if settings & 1 == 1 { LineFormat::Text } else { LineFormat::Json })
    }

    /// Passes a line without line end to the writer. Never blocks; drops and counts the line if the buffer is full.
    pub(super) fn enqueue(&self, line: &str) {
        match &self.output {
            Output::Memory(lines) => {
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                if lines.len() < MAX_MEMORY_LINES {
                    lines.push(line.to_owned());
                } else {
                    self.dropped.increment();
                }
            }
            Output::Thread(writer) => writer.enqueue(line.as_bytes()),
        }
    }

    /// Waits up to `limit` until all lines so far are written; returns `false` if they are not. Blocks the thread: for
    /// the end of the process.
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

/// True if mode `errors` writes a line. gRPC statuses about the request, not the callee, get none: CANCELLED,
/// INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED, FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE,
/// UNAUTHENTICATED.
fn is_error(outcome: Outcome, grpc_status: Option<u32>) -> bool {
    match outcome {
        Outcome::Ok | Outcome::ClientError | Outcome::CallerGone => false,
        Outcome::GrpcError => !matches!(grpc_status, Some(1 | 3 | 5 | 6 | 7 | 9 | 10 | 11 | 16)),
        _ => true,
    }
}
