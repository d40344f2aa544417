//! The diagnostics of the process itself: what hopguard says about hopguard, on standard error. What callers did is the
//! access log's business.

use std::io::stderr;

use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, ParseError, Targets};
use tracing_subscriber::fmt::layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// How a line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
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

/// Sets the log of the process up, once. `filter` is a list of levels and `target=level`: `info`, `warn,hopguard=debug`;
/// the longest matching target wins. A release build has no lines of the level `trace`. Fails when the filter cannot be
/// read or there is a log already.
pub fn init(format: LogFormat, filter: &str) -> Result<(), LogError> {
    let targets = targets(filter)?;
    let lines = match format {
        LogFormat::Text => layer().with_writer(stderr).with_ansi(false).boxed(),
        LogFormat::Json => layer().json().flatten_event(true).with_current_span(false).with_writer(stderr).boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(targets)).try_init().map_err(|_| LogError::Twice)
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
