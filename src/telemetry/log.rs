//! The program's own log on standard error: starts, reloads, state changes, errors. Exchanges are in the access log.
//!
//! A thread that logs never waits for the reader of standard error: a separate thread writes the lines. While the
//! buffer is full, lines are dropped and counted.

use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, ParseError, Targets};
use tracing_subscriber::fmt::layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::instruments::Counter;
use super::writer::Writer;

/// Most lines that wait for the writer.
const MAX_PENDING_LINES: usize = 1024;
/// Longest wait for the last lines to be written at the end of the process.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// The log of the process, once it is set up.
static LOG: OnceLock<Writer> = OnceLock::new();

/// Format of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProgramLogFormat {
    /// Text for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Errors of [`init`].
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not a valid list like `info,hopguard=debug`.
    #[error("log filter {filter:?}: {reason}")]
    Filter {
        /// The filter as given.
        filter: String,
        /// The error in the filter.
        reason: String,
    },
    /// The log is set up already.
    #[error("the log is set up already")]
    Twice,
}

/// The log of the process. The drop, at the end of the process, waits up to 1 s until the last lines are written.
#[derive(Debug)]
pub struct Log(Writer);

impl Drop for Log {
    fn drop(&mut self) {
        self.0.flush(FLUSH_LIMIT);
    }
}

/// Sets up the log of the process. `filter` is a list of levels and `target=level`: `info`, `warn,hopguard=debug`; the
/// longest matching target wins. Release builds have no lines of level `trace`. Fails if the filter is invalid or the
/// log is set up already.
pub fn init(format: ProgramLogFormat, filter: &str) -> Result<Log, LogError> {
    let targets = targets(filter)?;
    let stderr = Box::new(io::stderr());
    let writer = Writer::start("log", stderr, MAX_PENDING_LINES, Counter::default(), Counter::default());
    let to = writer.clone();
    let lines = layer().with_writer(move || Lines(to.clone()));
    let lines = match format {
        ProgramLogFormat::Text => lines.with_ansi(false).boxed(),
        ProgramLogFormat::Json => lines.json().flatten_event(true).with_current_span(false).boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(targets)).try_init().map_err(|_| LogError::Twice)?;
    Ok(Log(LOG.get_or_init(|| writer).clone()))
}

/// Lines of the log dropped so far.
pub(super) fn dropped() -> u64 {
    LOG.get().map_or(0, Writer::dropped)
}

/// Passes each line to the writer; `tracing_subscriber` writes a line in one call.
struct Lines(Writer);

impl io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.enqueue(line.strip_suffix(b"\n").unwrap_or(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn targets(filter: &str) -> Result<Targets, LogError> {
    let error = |reason: String| LogError::Filter { filter: filter.to_owned(), reason };
    // `Targets` takes a word that is not a level for a target at level `trace`: `inof` would enable all lines.
    for part in filter.split(',').map(str::trim).filter(|part| !part.contains('=')) {
        if part.is_empty() || part.parse::<LevelFilter>().is_err() {
            return Err(error(format!("{part:?} is not a level: use off, error, warn, info, debug or trace")));
        }
    }
    filter.parse().map_err(|parse: ParseError| error(parse.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn the_longest_target_wins_and_a_misspelt_level_is_an_error() {
        let filter = targets("info,hopguard=debug,hopguard::admin=off").unwrap();
        assert!(filter.would_enable("h2", &Level::INFO) && !filter.would_enable("h2", &Level::DEBUG));
        assert!(filter.would_enable("hopguard::proxy", &Level::DEBUG));
        assert!(!filter.would_enable("hopguard::admin", &Level::ERROR));
        for bad in ["inof", "info,hopguard=lots", "", "info,,debug"] {
            assert!(targets(bad).is_err(), "{bad:?}");
        }
    }
}
