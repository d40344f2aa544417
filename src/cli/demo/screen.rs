//! What the demo shows: a story that scrolls by, and below it the table of hops, redrawn in place on a terminal.
//!
//! Every figure is a difference of two readings of the telemetry. No line of the table is longer than 79 columns,
//! because a line that wraps cannot be drawn over.

use std::io::{self, Write};
use std::time::Duration;

use crate::telemetry::HopSummary;

/// One line of the table.
pub(super) struct Row {
    /// Who calls whom.
    pub(super) hop: String,
    /// The route's name.
    pub(super) route: &'static str,
    /// What happened between the two readings; nothing if there was no call.
    pub(super) seen: Option<HopSummary>,
}

/// Where the demo is shown.
pub(super) struct Screen<W> {
    out: W,
    /// Whether lines can be drawn over.
    terminal: bool,
    /// The table that stands at the bottom of a terminal.
    table: String,
}

impl<W: Write> Screen<W> {
    /// Empty.
    pub(super) fn new(out: W, terminal: bool) -> Self {
        Self { out, terminal, table: String::new() }
    }

    /// Adds to the story. Fails if nobody reads it any more.
    pub(super) fn say(&mut self, text: &str) -> io::Result<()> {
        let table = self.erase();
        write!(self.out, "{table}{text}\n{}", self.table)?;
        self.out.flush()
    }

    /// Shows the table: in place of the last one on a terminal, else as another one.
    pub(super) fn show(&mut self, rows: &[Row], over: Duration) -> io::Result<()> {
        let drawn = draw(rows, over);
        if !self.terminal {
            writeln!(self.out, "{drawn}")?;
            return self.out.flush();
        }
        let table = self.erase();
        self.table = format!("\n{drawn}");
        write!(self.out, "{table}{}", self.table)?;
        self.out.flush()
    }

    /// Leaves the last table where it is and goes on below it.
    pub(super) fn leave(&mut self) -> io::Result<()> {
        self.table.clear();
        writeln!(self.out)
    }

    /// What takes the table away: the cursor goes up to its first line, and everything from there on is cleared.
    fn erase(&self) -> String {
        match self.table.lines().count() {
            0 => String::new(),
            lines => format!("\x1b[{lines}A\r\x1b[J"),
        }
    }
}

fn draw(rows: &[Row], over: Duration) -> String {
    let seconds = over.as_secs_f64();
    let mut text = line(["hop", "route", "calls/s", "ok", "mean", "p50", "p95", "p99", "own p50"]);
    for row in rows {
        let none = || "-".to_owned();
        let quantile = |q| row.seen.as_ref().and_then(|seen| seen.quantile(q)).map_or_else(none, short);
        let rate = row.seen.as_ref().map_or(0.0, |seen| seen.count as f64 / seconds);
        let ok =
            row.seen.as_ref().and_then(HopSummary::success).map_or_else(none, |share| format!("{:.0}%", share * 100.0));
        let mean = row.seen.as_ref().and_then(mean).map_or_else(none, short);
        let own = row.seen.as_ref().and_then(|seen| seen.overhead.quantile(0.5)).map_or_else(none, short);
        let rate = format!("{rate:.1}");
        let (p50, p95, p99) = (quantile(0.5), quantile(0.95), quantile(0.99));
        text.push_str(&line([&row.hop, row.route, &rate, &ok, &mean, &p50, &p95, &p99, &own]));
    }
    text
}

fn line(cells: [&str; 9]) -> String {
    let [hop, route, rate, ok, mean, p50, p95, p99, own] = cells;
    format!("{hop:<16} {route:<6} {rate:>7} {ok:>5} {mean:>7} {p50:>7} {p95:>7} {p99:>7} {own:>7}\n")
}

/// The exact mean of all durations; the percentiles beside it are estimates from buckets.
pub(super) fn mean(seen: &HopSummary) -> Option<Duration> {
    seen.total.sum_nanos.checked_div(seen.total.count()).map(Duration::from_nanos)
}

/// A duration in at most six characters.
pub(super) fn short(duration: Duration) -> String {
    let millis = duration.as_secs_f64() * 1e3;
    match millis {
        ..1.0 => format!("{:.0}us", millis * 1e3),
        1.0..99.95 => format!("{millis:.1}ms"),
        99.95..999.5 => format!("{millis:.0}ms"),
        _ => format!("{:.2}s", millis / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> [Row; 1] {
        [Row { hop: "order -> payment".to_owned(), route: "charge", seen: None }]
    }

    #[test]
    fn no_line_of_the_table_wraps() {
        let table = draw(&row(), Duration::from_secs(1));
        assert_eq!(table.lines().count(), 2);
        assert!(table.lines().all(|line| line.len() <= 79), "{table}");
    }

    #[test]
    fn a_terminal_gets_one_table_below_the_story_and_a_file_gets_them_all() {
        for (terminal, tables) in [(true, 1), (false, 2)] {
            let mut written = Vec::new();
            let mut screen = Screen::new(&mut written, terminal);
            screen.show(&row(), Duration::from_secs(1)).unwrap();
            screen.show(&row(), Duration::from_secs(1)).unwrap();
            let text = String::from_utf8(written).unwrap();
            // What an erase takes away is as long as what was drawn: the empty line, the head and the row.
            let left = text.split("\x1b[3A\r\x1b[J").last().unwrap();
            assert_eq!(left.matches("order -> payment").count(), tables, "{text:?}");
        }
    }

    #[test]
    fn durations_are_short_whatever_their_size() {
        let table = [
            (85, "85us"),
            (999, "999us"),
            (18_340, "18.3ms"),
            (99_970, "100ms"),
            (300_900, "301ms"),
            (1_204_000, "1.20s"),
        ];
        for (micros, text) in table {
            assert_eq!(short(Duration::from_micros(micros)), text);
        }
    }
}
