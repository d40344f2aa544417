//! The metrics page in the format that the scraper accepts: Prometheus text 0.0.4, written by the prometheus crate, or
//! OpenMetrics 1.0, written here because that crate has no writer for OpenMetrics.

use std::fmt::{self, Write};

use prometheus::proto::{LabelPair, MetricFamily, MetricType};

/// Format of the metrics page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFormat {
    /// Prometheus text 0.0.4.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl PageFormat {
    /// The format for an `Accept` field: OpenMetrics if its quality is at least that of plain text, else plain text.
    /// Plain text also if the field lists neither.
    pub fn accepted(accept: &str) -> Self {
        let (mut open, mut text) = (0.0, 0.0);
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let (mut quality, mut version) = (1.0, None);
            for (key, value) in parts.filter_map(|part| part.split_once('=')) {
                match key.trim().to_ascii_lowercase().as_str() {
                    "q" => quality = value.trim().parse().unwrap_or(0.0),
                    "version" => version = Some(value.trim().trim_matches('"')),
                    _ => {}
                }
            }
            match kind.as_str() {
                "application/openmetrics-text" if matches!(version, None | Some("1.0.0")) => {
                    open = f64::max(open, quality)
                }
                "text/plain" if matches!(version, None | Some("0.0.4")) => text = f64::max(text, quality),
                _ => {}
            }
        }
        if open > 0.0 && open >= text { PageFormat::OpenMetrics } else { PageFormat::Text }
    }

    /// `Content-Type` of the page.
    pub const fn content_type(self) -> &'static str {
        match self {
            PageFormat::Text => "text/plain; version=0.0.4; charset=utf-8",
            PageFormat::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

pub(super) fn page(families: &[MetricFamily], format: PageFormat) -> String {
    let mut out = String::with_capacity(64 * 1024);
    let written = match format {
        PageFormat::Text => prometheus::TextEncoder::new().encode_utf8(families, &mut out).is_ok(),
        PageFormat::OpenMetrics => openmetrics(&mut out, families).is_ok(),
    };
    debug_assert!(written, "writing to a string cannot fail, and the names are constants");
    out
}

fn openmetrics(out: &mut String, families: &[MetricFamily]) -> fmt::Result {
    for family in families {
        let (name, kind) = name_and_kind(family);
        writeln!(out, "# TYPE {name} {kind}")?;
        if let Some(unit) = ["seconds", "bytes"].into_iter().find(|unit| name.ends_with(unit)) {
            writeln!(out, "# UNIT {name} {unit}")?;
        }
        write!(out, "# HELP {name} ")?;
        escape(out, family.help())?;
        out.push('\n');
        for metric in family.get_metric() {
            let labels = metric.get_label();
            match kind {
                "histogram" => histogram(out, name, labels, metric.get_histogram())?,
                "counter" => sample(out, (name, "_total"), labels, None, metric.get_counter().get_value())?,
                "info" => sample(out, (name, "_info"), labels, None, metric.get_gauge().get_value())?,
                _ => sample(out, (name, ""), labels, None, metric.get_gauge().get_value())?,
            }
        }
    }
    out.push_str("# EOF\n");
    Ok(())
}

/// Name and type of a family. In OpenMetrics the family name lacks the suffix of its samples.
fn name_and_kind(family: &MetricFamily) -> (&str, &'static str) {
    let name = family.name();
    match family.get_field_type() {
        MetricType::COUNTER => (name.strip_suffix("_total").unwrap_or(name), "counter"),
        MetricType::HISTOGRAM => (name, "histogram"),
        _ => match name.strip_suffix("_info") {
            Some(name) => (name, "info"),
            None => (name, "gauge"),
        },
    }
}

fn histogram(
    out: &mut String,
    name: &str,
    labels: &[LabelPair],
    histogram: &prometheus::proto::Histogram,
) -> fmt::Result {
    for bucket in histogram.get_bucket() {
        let count = bucket.cumulative_count() as f64;
        sample(out, (name, "_bucket"), labels, Some(bucket.upper_bound()), count)?;
    }
    let count = histogram.get_sample_count() as f64;
    sample(out, (name, "_bucket"), labels, Some(f64::INFINITY), count)?;
    sample(out, (name, "_count"), labels, None, count)?;
    sample(out, (name, "_sum"), labels, None, histogram.get_sample_sum())
}

fn sample(
    out: &mut String,
    (name, suffix): (&str, &str),
    labels: &[LabelPair],
    bound: Option<f64>,
    value: f64,
) -> fmt::Result {
    write!(out, "{name}{suffix}")?;
    let mut separator = '{';
    for label in labels {
        write!(out, "{separator}{}=\"", label.name())?;
        escape(out, label.value())?;
        out.push('"');
        separator = ',';
    }
    match bound {
        // OpenMetrics wants floats as bounds, so that `1` and `1.0` are not two series.
        Some(bound) if bound.is_finite() => {
            let point = if bound.fract() == 0.0 { ".0" } else { "" };
            write!(out, "{separator}le=\"{bound}{point}\"}}")?;
        }
        Some(_) => write!(out, "{separator}le=\"+Inf\"}}")?,
        None if separator == ',' => out.push('}'),
        None => {}
    }
    writeln!(out, " {value}")
}

fn escape(out: &mut String, text: &str) -> fmt::Result {
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::families::ALL;
    use crate::telemetry::tests::full_page;

    #[test]
    fn the_accept_field_decides_the_format() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
            application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;q=0.3,\
            text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        let cases = [
            (prometheus, PageFormat::OpenMetrics),
            ("", PageFormat::Text),
            ("*/*", PageFormat::Text),
            ("text/html", PageFormat::Text),
            ("text/plain", PageFormat::Text),
            ("application/openmetrics-text", PageFormat::OpenMetrics),
            ("application/openmetrics-text; version=\"1.0.0\"", PageFormat::OpenMetrics),
            ("application/openmetrics-text; version=0.0.1", PageFormat::Text),
            ("application/openmetrics-text; version=2.0.0, */*;q=0.1", PageFormat::Text),
            ("application/openmetrics-text;q=0", PageFormat::Text),
            ("application/openmetrics-text;q=0.1, text/plain;version=0.0.4;q=0.9", PageFormat::Text),
            ("Application/OpenMetrics-Text; Version=1.0.0; Q=0.7", PageFormat::OpenMetrics),
        ];
        for (accept, format) in cases {
            assert_eq!(PageFormat::accepted(accept), format, "{accept}");
        }
    }

    #[test]
    fn the_openmetrics_page_keeps_the_grammar() {
        let page = full_page(PageFormat::OpenMetrics);
        assert!(page.ends_with("\n# EOF\n") && page.matches("# EOF").count() == 1);
        let (mut family, mut kind, mut seen, mut samples) = ("", "", Vec::new(), 0);
        let mut last_bucket: Option<(String, f64)> = None;
        for line in page.lines().take_while(|line| *line != "# EOF") {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                (family, kind) = rest.split_once(' ').unwrap();
                assert!(!seen.contains(&family), "{family} comes twice");
                assert!(["counter", "gauge", "histogram", "info"].contains(&kind), "{line}");
                assert!(!family.ends_with("_total") && !family.ends_with("_info"), "{line}");
                seen.push(family);
                continue;
            }
            if let Some(rest) = line.strip_prefix("# ") {
                let (keyword, rest) = rest.split_once(' ').unwrap();
                assert!(matches!(keyword, "UNIT" | "HELP") && rest.starts_with(&format!("{family} ")), "{line}");
                if keyword == "UNIT" {
                    assert!(family.ends_with(&format!("_{}", &rest[family.len() + 1..])), "{line}");
                }
                continue;
            }
            let (name, labels, value) = sample(line);
            let allowed: &[&str] = match kind {
                "counter" => &["_total"],
                "histogram" => &["_bucket", "_count", "_sum"],
                "info" => &["_info"],
                _ => &[""],
            };
            let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{line} is not of {family}"));
            assert!(allowed.contains(&suffix), "{line}");
            if suffix == "_bucket" {
                let (others, bound) = labels.rsplit_once("le=\"").unwrap();
                assert!(bound == "+Inf\"" || bound.contains('.'), "{line}: a bound is a float");
                if let Some((before, count)) = &last_bucket {
                    assert!(before != others || *count <= value, "{line}: buckets are cumulative");
                }
                last_bucket = Some((others.to_owned(), value));
            } else if suffix == "_count" {
                assert_eq!(last_bucket.take().map(|(_, count)| count), Some(value), "{line}: +Inf is the count");
            }
            samples += 1;
        }
        assert_eq!(seen.len(), ALL.len());
        assert!(samples > 100, "{samples}");
    }

    /// Splits a sample line into name, labels and value; walks the label values, so that no character in them is taken
    /// for structure.
    fn sample(line: &str) -> (&str, &str, f64) {
        let end = line.find(['{', ' ']).unwrap();
        let (name, mut rest) = line.split_at(end);
        let mut labels = "";
        if rest.starts_with('{') {
            let (mut quoted, mut escaped, mut close) = (false, false, None);
            for (at, byte) in rest.bytes().enumerate() {
                match byte {
                    _ if escaped => {
                        assert!(matches!(byte, b'\\' | b'"' | b'n'), "{line}");
                        escaped = false;
                    }
                    b'\\' if quoted => escaped = true,
                    b'"' => quoted = !quoted,
                    b'}' if !quoted => {
                        close = Some(at);
                        break;
                    }
                    _ => {}
                }
            }
            let close = close.unwrap_or_else(|| panic!("{line}: labels without end"));
            labels = &rest[1..close];
            rest = &rest[close + 1..];
        }
        let value = rest.strip_prefix(' ').unwrap_or_else(|| panic!("{line}"));
        (name, labels, value.parse().unwrap_or_else(|_| panic!("{line}: no number")))
    }
}
