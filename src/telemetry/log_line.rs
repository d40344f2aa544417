//! Writes the access log line of one exchange, as JSON or text.
//!
//! Both formats are written by hand into a buffer that the worker keeps, because a general serializer or formatter
//! costs several times as much. Values from callers and upstreams are escaped, so that no byte of theirs ends a line or
//! reaches a terminal as a control character. `docs/access-log.md` lists the fields.

use std::fmt::{self, Write};
use std::time::Duration;

use http::HeaderValue;
use jiff::Timestamp;

use super::access_log::LineFormat;
use super::hop::HopLabels;
use super::outcome::{Outcome, Protocol};
use super::record::{ConnectionUse, Record, RefusalRecord};

/// The values that a line is written from.
pub(super) struct Entry<'a> {
    pub(super) record: &'a Record,
    pub(super) outcome: Outcome,
    pub(super) total: Duration,
    pub(super) began: Timestamp,
    pub(super) hop: &'a HopLabels,
}

/// Appends the line to `out`, without a line end.
pub(super) fn write(out: &mut String, entry: &Entry<'_>, format: LineFormat) {
    let written = match format {
        LineFormat::Json => json(out, entry),
        LineFormat::Text => text(out, entry),
    };
    debug_assert!(written.is_ok(), "writing to a string cannot fail");
}

/// Writes the members of one JSON object; absent values are omitted.
struct Object<'a> {
    out: &'a mut String,
    separator: &'static str,
}

impl Object<'_> {
    fn key(&mut self, key: &str) {
        self.out.push_str(self.separator);
        self.out.push('"');
        self.out.push_str(key);
        self.out.push_str("\":");
        self.separator = ",";
    }

    fn string(&mut self, key: &str, value: &str) -> fmt::Result {
        self.key(key);
        quote(self.out, value)
    }

    fn display(&mut self, key: &str, value: impl fmt::Display) -> fmt::Result {
        self.key(key);
        write!(self.out, "{value}")
    }

    fn milliseconds(&mut self, key: &str, value: Option<Duration>) -> fmt::Result {
        let Some(value) = value else { return Ok(()) };
        let micros = value.as_micros();
        self.display(key, format_args!("{}.{:03}", micros / 1000, micros % 1000))
    }
}

fn json(out: &mut String, entry: &Entry<'_>) -> fmt::Result {
    out.push('{');
    let mut object = Object { out, separator: "" };
    object.display("time", format_args!("\"{:.3}\"", entry.began))?;
    object.string("outcome", entry.outcome.as_str())?;
    json_request(&mut object, entry)?;
    json_response(&mut object, entry.record)?;
    json_times(&mut object, entry)?;
    json_connection(&mut object, entry.record)?;
    json_annotations(&mut object, entry.record)?;
    if let Some(refusal) = entry.record.refusal.as_deref() {
        object.key("refusal");
        json_refusal(object.out, refusal)?;
    }
    if let Some(id) = trace_id(entry.record.request.traceparent.as_ref()) {
        object.string("trace_id", id)?;
    }
    out.push('}');
    Ok(())
}

fn json_request(object: &mut Object<'_>, entry: &Entry<'_>) -> fmt::Result {
    let request = &entry.record.request;
    object.string("source", &entry.hop.source)?;
    object.string("destination", &entry.hop.destination)?;
    object.string("route", &entry.hop.route)?;
    object.string("direction", entry.hop.direction.as_str())?;
    object.string("protocol", entry.record.protocol.as_str())?;
    object.string("method", request.method.as_str())?;
    if let Some(authority) = request.uri.authority() {
        object.string("host", authority.as_str())?;
    } else if let Some(host) = &request.host {
        object.string("host", &String::from_utf8_lossy(host.as_bytes()))?;
    }
    if request.uri.path_and_query().is_some() {
        object.string("path", request.uri.path())?;
    }
    Ok(())
}

fn json_response(object: &mut Object<'_>, record: &Record) -> fmt::Result {
    if let Some(status) = record.status {
        object.display("status", status.as_u16())?;
    }
    if let Some(code) = record.grpc_status {
        match grpc_name(code) {
            Some(name) => object.string("grpc_status", name)?,
            None => object.display("grpc_status", format_args!("\"{code}\""))?,
        }
    }
    if let Some(message) = &record.grpc_message {
        object.string("grpc_message", &percent_decode(message.as_bytes()))?;
    }
    Ok(())
}

fn json_times(object: &mut Object<'_>, entry: &Entry<'_>) -> fmt::Result {
    let record = entry.record;
    object.milliseconds("duration_ms", Some(entry.total))?;
    object.milliseconds("first_byte_ms", record.first_byte)?;
    object.milliseconds("queue_ms", record.queue)?;
    object.milliseconds("connect_ms", record.connect)?;
    object.milliseconds("upstream_ms", record.upstream)?;
    object.milliseconds("overhead_ms", record.overhead())
}

fn json_connection(object: &mut Object<'_>, record: &Record) -> fmt::Result {
    object.display("bytes_in", record.bytes_in)?;
    object.display("bytes_out", record.bytes_out)?;
    if record.attempts > 0 {
        object.display("attempt", record.attempt)?;
        object.display("attempts", record.attempts)?;
    }
    if let Some(endpoint) = record.endpoint {
        object.display("endpoint", format_args!("\"{endpoint}\""))?;
    }
    match record.connection {
        Some(ConnectionUse::New) => object.string("connection", "new")?,
        Some(ConnectionUse::Reused { age }) => {
            object.string("connection", "reused")?;
            object.milliseconds("connection_age_ms", Some(age))?;
        }
        None => {}
    }
    if let Some(caller) = record.request.caller {
        object.display("caller", format_args!("\"{caller}\""))?;
    }
    Ok(())
}

fn json_annotations(object: &mut Object<'_>, record: &Record) -> fmt::Result {
    let Some(annotations) = record.annotations.as_deref() else { return Ok(()) };
    object.milliseconds("deadline_ms", annotations.deadline)?;
    for (key, value) in [
        ("deadline_from", annotations.deadline_from),
        ("retry_withheld", annotations.retry_withheld),
        ("failed_at", annotations.failed_at.as_deref()),
        ("fault", annotations.fault.as_deref()),
    ] {
        if let Some(value) = value {
            object.string(key, value)?;
        }
    }
    if !annotations.dry_run.is_empty() {
        object.string("dry_run", &annotations.dry_run.join(","))?;
    }
    Ok(())
}

fn json_refusal(out: &mut String, refusal: &RefusalRecord) -> fmt::Result {
    out.push('{');
    let mut object = Object { out, separator: "" };
    for (key, value) in [
        ("rule", refusal.rule),
        ("value", refusal.value.as_str()),
        ("origin", refusal.origin.as_str()),
        ("detail", refusal.detail.as_str()),
    ] {
        if !value.is_empty() {
            object.string(key, value)?;
        }
    }
    object.string("closed_by", refusal.closed_by.as_str())?;
    out.push('}');
    Ok(())
}

fn text(out: &mut String, entry: &Entry<'_>) -> fmt::Result {
    let record = entry.record;
    write!(out, "{:.3} ", entry.began)?;
    text_request(out, record)?;
    text_status(out, entry)?;
    out.push(' ');
    short_duration(out, entry.total)?;
    if record.attempts > 0 {
        write!(out, " attempt {}/{}", record.attempt, record.attempts)?;
    }
    let hop = entry.hop;
    write!(out, " {}->{}/{}", hop.source, hop.destination, hop.route)?;
    if let Some(endpoint) = record.endpoint {
        write!(out, " via {endpoint}")?;
    }
    if let Some(refusal) = record.refusal.as_deref() {
        if !refusal.rule.is_empty() {
            write!(out, " {}", refusal.rule)?;
        }
        if !refusal.value.is_empty() {
            out.push('=');
            escape(out, &refusal.value, Quoting::Text)?;
        }
        if !refusal.origin.is_empty() {
            out.push_str(" (");
            escape(out, &refusal.origin, Quoting::Text)?;
            out.push(')');
        }
        write!(out, " closed by {}", refusal.closed_by.as_str())?;
    }
    text_annotations(out, record)?;
    if let Some(id) = trace_id(record.request.traceparent.as_ref()) {
        write!(out, " trace {id}")?;
    }
    Ok(())
}

fn text_annotations(out: &mut String, record: &Record) -> fmt::Result {
    let Some(annotations) = record.annotations.as_deref() else { return Ok(()) };
    if let (Some(deadline), Some(from)) = (annotations.deadline, annotations.deadline_from) {
        out.push_str(" deadline ");
        short_duration(out, deadline)?;
        write!(out, " from {from}")?;
    }
    for (what, value) in [
        ("no retry:", annotations.retry_withheld),
        ("failed at", annotations.failed_at.as_deref()),
        ("fault", annotations.fault.as_deref()),
    ] {
        if let Some(value) = value {
            write!(out, " {what} ")?;
            escape(out, value, Quoting::Bare)?;
        }
    }
    if !annotations.dry_run.is_empty() {
        write!(out, " dry run: {}", annotations.dry_run.join(","))?;
    }
    Ok(())
}

fn text_request(out: &mut String, record: &Record) -> fmt::Result {
    let request = &record.request;
    if record.protocol == Protocol::Grpc {
        return escape(out, request.uri.path().trim_start_matches('/'), Quoting::Bare);
    }
    write!(out, "{} ", request.method)?;
    match (request.uri.path_and_query(), request.uri.authority()) {
        (None, Some(authority)) => escape(out, authority.as_str(), Quoting::Bare),
        _ => escape(out, request.uri.path(), Quoting::Bare),
    }
}

/// Status, the outcome unless the status implies it, and the explanation.
fn text_status(out: &mut String, entry: &Entry<'_>) -> fmt::Result {
    let record = entry.record;
    match (record.grpc_status, record.status) {
        (Some(code), _) => match grpc_name(code) {
            Some(name) => write!(out, " {name}")?,
            None => write!(out, " {code}")?,
        },
        (None, Some(status)) => write!(out, " {}", status.as_u16())?,
        (None, None) => out.push_str(" -"),
    }
    match entry.outcome {
        Outcome::Ok | Outcome::ClientError | Outcome::ServerError | Outcome::GrpcError => {}
        other => write!(out, " {other}")?,
    }
    if let Some(refusal) = record.refusal.as_deref() {
        out.push(' ');
        quote(out, &refusal.detail)?;
    } else if let Some(message) = &record.grpc_message {
        out.push(' ');
        quote(out, &percent_decode(message.as_bytes()))?;
    }
    Ok(())
}

/// About three significant digits: `340us`, `8.12ms`, `812ms`, `2.001s`.
fn short_duration(out: &mut String, value: Duration) -> fmt::Result {
    let micros = value.as_micros();
    match micros {
        0..1_000 => write!(out, "{micros}us"),
        1_000..10_000 => write!(out, "{}.{:02}ms", micros / 1000, micros % 1000 / 10),
        10_000..1_000_000 => write!(out, "{}ms", micros / 1000),
        _ => write!(out, "{}.{:03}s", micros / 1_000_000, micros / 1000 % 1000),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Quoting {
    /// A JSON string between quotation marks.
    Json,
    /// One word of a text line: white space is escaped too.
    Bare,
    /// Several words of a text line.
    Text,
}

fn quote(out: &mut String, value: &str) -> fmt::Result {
    out.push('"');
    escape(out, value, Quoting::Json)?;
    out.push('"');
    Ok(())
}

fn escape(out: &mut String, value: &str, quoting: Quoting) -> fmt::Result {
    let plain = |byte: u8| {
        matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\') && (byte != b' ' || quoting != Quoting::Bare)
    };
    if value.bytes().all(plain) {
        out.push_str(value);
        return Ok(());
    }
    for character in value.chars() {
        match character {
            '"' | '\\' => {
                out.push('\\');
                out.push(character);
            }
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' ' if quoting == Quoting::Bare => out.push_str("\\u0020"),
            // Some terminals and line readers treat C1 controls and line separators like C0 controls.
            _ if character.is_control() || matches!(character, '\u{2028}' | '\u{2029}') => {
                write!(out, "\\u{:04x}", u32::from(character))?;
            }
            _ => out.push(character),
        }
    }
    Ok(())
}

/// Decodes the percent-encoding of `grpc-message`. Invalid sequences stay as they are; decoding never fails.
fn percent_decode(value: &[u8]) -> String {
    let digit = |at: usize| value.get(at).and_then(|byte| char::from(*byte).to_digit(16));
    let mut bytes = Vec::with_capacity(value.len());
    let mut at = 0;
    while at < value.len() {
        if value[at] == b'%'
            && let (Some(high), Some(low)) = (digit(at + 1), digit(at + 2))
        {
            bytes.push((high * 16 + low) as u8);
            at += 3;
        } else {
            bytes.push(value[at]);
            at += 1;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The trace id of a W3C `traceparent`, of any version; `None` if the field is malformed.
fn trace_id(traceparent: Option<&HeaderValue>) -> Option<&str> {
    let value = traceparent?.to_str().ok()?;
    let (version, rest) = value.split_once('-')?;
    let id = rest.get(..32)?;
    let hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let valid = version.len() == 2 && version != "ff" && hex(version) && hex(id);
    (valid && rest.as_bytes().get(32) == Some(&b'-') && id.bytes().any(|byte| byte != b'0')).then_some(id)
}

/// The name of a gRPC status code.
fn grpc_name(code: u32) -> Option<&'static str> {
    const NAMES: [&str; 17] = [
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    NAMES.get(usize::try_from(code).ok()?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_decoded_and_never_fail() {
        let cases: &[(&str, &str)] = &[
            ("50%25 off%0Acaf%C3%A9", "50% off\ncaf\u{e9}"),
            ("a%zz%4", "a%zz%4"),
            ("%", "%"),
            ("%ff", "\u{fffd}"),
            ("", ""),
            ("100%", "100%"),
        ];
        for (encoded, decoded) in cases {
            assert_eq!(percent_decode(encoded.as_bytes()), *decoded);
        }
    }

    #[test]
    fn foreign_bytes_never_end_a_line_or_act_as_terminal_controls() {
        let mut out = String::new();
        quote(&mut out, "a\"b\\c\n\u{1b}[31m\u{9b}\u{7f}\u{2028}\u{e9} \0").unwrap();
        assert_eq!(out, r#""a\"b\\c\n\u001b[31m\u009b\u007f\u2028é \u0000""#);
        assert!(serde_json::from_str::<String>(&out).is_ok());
        out.clear();
        escape(&mut out, "/a b\n", Quoting::Bare).unwrap();
        assert_eq!(out, "/a\\u0020b\\n");
    }

    #[test]
    fn durations_are_short() {
        let cases: &[(u64, &str)] = &[
            (0, "0us"),
            (999, "999us"),
            (1_000, "1.00ms"),
            (8_129, "8.12ms"),
            (10_000, "10ms"),
            (812_999, "812ms"),
            (2_001_000, "2.001s"),
            (3_600_000_000, "3600.000s"),
        ];
        for (micros, text) in cases {
            let mut out = String::new();
            short_duration(&mut out, Duration::from_micros(*micros)).unwrap();
            assert_eq!(out, *text);
        }
    }

    #[test]
    fn a_malformed_traceparent_gives_no_trace_id() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        let of = |value: &str| HeaderValue::from_str(value).ok().and_then(|v| trace_id(Some(&v)).map(str::to_owned));
        assert_eq!(of(&format!("00-{id}-00f067aa0ba902b7-01")).as_deref(), Some(id));
        assert_eq!(of(&format!("cc-{id}-00f067aa0ba902b7-01-what")).as_deref(), Some(id));
        for bad in [
            format!("ff-{id}-00f067aa0ba902b7-01"),
            format!("00-{}-00f067aa0ba902b7-01", id.to_uppercase()),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-{id}"),
            "00".to_owned(),
            String::new(),
        ] {
            assert_eq!(of(&bad), None, "{bad}");
        }
    }
}
