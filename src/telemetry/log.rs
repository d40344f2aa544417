//! The diagnostics of the process itself: what hopguard says about hopguard, on standard error. What callers did is the
//! access log's business.
//!
//! Whoever says something does not wait for the reader of our standard error: a thread of its own writes the lines, and
//! when too many wait, they are thrown away and counted.

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

/// How many lines wait for the writer at most.
const LINES: usize = 1024;
/// How long the end of the process waits for a reader.
const FLUSH: Duration = Duration::from_secs(1);

/// The log of the process, once it is set up.
static LOG: OnceLock<Writer> = OnceLock::new();

/// How a line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProgramLogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not a list like `info,hopguard=debug`.
    #[error("log filter {filter:?}: {reason}")]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The process has a log already.
    #[error("the log is set up already")]
    Twice,
}

/// The log of the process. Dropping it, at the very end, waits until its lines are written, for a second at most.
#[derive(Debug)]
pub struct Log(Writer);

impl Drop for Log {
    fn drop(&mut self) {
        self.0.flush(FLUSH);
    }
}

/// Sets the log of the process up, once. `filter` is a list of levels and `target=level`: `info`, `warn,hopguard=debug`;
/// the longest matching target wins. A release build has no lines of the level `trace`. Fails when the filter cannot be
/// read or there is a log already.
pub fn init(format: ProgramLogFormat, filter: &str) -> Result<Log, LogError> {
    let targets = targets(filter)?;
    let stderr = Box::new(io::stderr());
    let writer = Writer::start("log", stderr, LINES, Counter::default(), Counter::default());
    let to = writer.clone();
    let lines = layer().with_writer(move || Lines(to.clone()));
    let lines = match format {
        ProgramLogFormat::Text => lines.with_ansi(false).boxed(),
        ProgramLogFormat::Json => lines.json().flatten_event(true).with_current_span(false).boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(targets)).try_init().map_err(|_| LogError::Twice)?;
    Ok(Log(LOG.get_or_init(|| writer).clone()))
}

/// How many lines of the log were thrown away.
pub(super) fn dropped() -> u64 {
    LOG.get().map_or(0, Writer::dropped)
}

/// Takes each line in one piece, as it comes.
struct Lines(Writer);

impl io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.put(line.strip_suffix(b"\n").unwrap_or(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn targets(filter: &str) -> Result<Targets, LogError> {
    let error = |reason: String| LogError::Filter { filter: filter.to_owned(), reason };
    // `Targets` reads a word that is no level as a target at its most talkative level: `inof` would switch all on.
    for part in filter.split(',').map(str::trim).filter(|part| !part.contains('=')) {
        if part.is_empty() || part.parse::<LevelFilter>().is_err() {
            return Err(error(format!("{part:?} is no level: off, error, warn, info, debug or trace")));
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
