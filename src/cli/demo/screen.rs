//! The output of the demo: scrolling text, and below it the table of hops, which a terminal redraws in place.
//!
//! Every figure is a difference of two readings of the telemetry. No table line is longer than 79 columns,
//! because a wrapped line cannot be erased.

use std::io::{self, Write};
use std::time::Duration;

use crate::telemetry::HopSummary;

/// One line of the table.
pub(super) struct HopRow {
    /// `CALLER -> SERVICE`.
    pub(super) hop: String,
    /// Name of the route.
    pub(super) route: &'static str,
    /// Counters between the two readings; `None` without a call.
    pub(super) counts: Option<HopSummary>,
}

/// The output of the demo: a terminal, or a file or pipe.
pub(super) struct Screen<W> {
    out: W,
    /// Whether lines can be erased.
    terminal: bool,
    /// The table at the bottom of the terminal; empty if there is none.
    table: String,
}

impl<W: Write> Screen<W> {
    /// A screen without a table.
    pub(super) fn new(out: W, terminal: bool) -> Self {
        Self { out, terminal, table: String::new() }
    }

    /// Prints text above the table.
    ///
    /// # Errors
    /// If the reader has closed the output.
    pub(super) fn print(&mut self, text: &str) -> io::Result<()> {
        let erase = self.erase_table();
        write!(self.out, "{erase}{text}\n{}", self.table)?;
        self.out.flush()
    }

    /// Prints the table of the counters over the time `over`: a terminal replaces the previous table, other outputs get one more.
    ///
    /// # Errors
    /// If the reader has closed the output.
    pub(super) fn print_table(&mut self, rows: &[HopRow], over: Duration) -> io::Result<()> {
        let drawn = draw(rows, over);
        if !self.terminal {
            writeln!(self.out, "{drawn}")?;
            return self.out.flush();
        }
        let erase = self.erase_table();
        self.table = format!("\n{drawn}");
        write!(self.out, "{erase}{}", self.table)?;
        self.out.flush()
    }

    /// Keeps the current table in the output; further text follows below the table.
    ///
    /// # Errors
    /// If the reader has closed the output.
    pub(super) fn keep_table(&mut self) -> io::Result<()> {
        self.table.clear();
        writeln!(self.out)
    }

    /// The escape sequence that erases the table: cursor up to the first line of the table, clear to the end of the screen.
    fn erase_table(&self) -> String {
        match self.table.lines().count() {
            0 => String::new(),
            lines => format!("\x1b[{lines}A\r\x1b[J"),
        }
    }
}

fn draw(rows: &[HopRow], over: Duration) -> String {
    let seconds = over.as_secs_f64();
    let mut text = line(["hop", "route", "calls/s", "ok", "mean", "p50", "p95", "p99", "own p50"]);
    for row in rows {
        let none = || "-".to_owned();
        let quantile = |q| row.counts.as_ref().and_then(|counts| counts.quantile(q)).map_or_else(none, short);
        let rate = row.counts.as_ref().map_or(0.0, |counts| counts.count as f64 / seconds);
        let ok = row
            .counts
            .as_ref()
            .and_then(HopSummary::success)
            .map_or_else(none, |share| format!("{:.0}%", share * 100.0));
        let mean = row.counts.as_ref().and_then(mean).map_or_else(none, short);
        let own = row.counts.as_ref().and_then(|counts| counts.overhead.quantile(0.5)).map_or_else(none, short);
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

/// The exact mean duration, from sum and count; the percentiles of the table are estimates from buckets.
pub(super) fn mean(counts: &HopSummary) -> Option<Duration> {
    counts.total.sum_nanos.checked_div(counts.total.count()).map(Duration::from_nanos)
}

/// Formats a duration in at most six characters.
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

    fn row() -> [HopRow; 1] {
        [HopRow { hop: "order -> payment".to_owned(), route: "charge", counts: None }]
    }

    #[test]
    fn no_line_of_the_table_wraps() {
        let table = draw(&row(), Duration::from_secs(1));
        assert_eq!(table.lines().count(), 2);
        assert!(table.lines().all(|line| line.len() <= 79), "{table}");
    }

    #[test]
    fn a_terminal_shows_one_table_and_a_file_gets_all_tables() {
        for (terminal, tables) in [(true, 1), (false, 2)] {
            let mut written = Vec::new();
            let mut screen = Screen::new(&mut written, terminal);
            screen.print_table(&row(), Duration::from_secs(1)).unwrap();
            screen.print_table(&row(), Duration::from_secs(1)).unwrap();
            let text = String::from_utf8(written).unwrap();
            // The erase sequence covers the whole table: the empty line, the head and the row.
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
