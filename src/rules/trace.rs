//! Trace and request ids, by which an outbound call is joined with the inbound request that caused it.
//!
//! The trace id comes from `traceparent` (W3C Trace Context Level 2, parsed strictly), else from `b3`, else from
//! `x-b3-traceid` (B3 propagation). `x-request-id` is a second key: an app may forward either of the two and drop or
//! renew the other. A field that occurs twice is ignored, because either could be meant.

use std::fmt::Write as _;

use http::{HeaderMap, HeaderName};

/// `x-request-id`: names one request through all hops; any text.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const B3: HeaderName = HeaderName::from_static("b3");
const X_B3_TRACEID: HeaderName = HeaderName::from_static("x-b3-traceid");

/// A key that related requests share. A request id never equals a trace id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TraceKey {
    /// A trace id, never zero; one of 64 bits equals the same id padded to 128.
    Trace(u128),
    /// Hash of a request id.
    Request(u128),
}

/// The ids of a request: none, one or two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TraceKeys {
    trace: Option<TraceKey>,
    request: Option<TraceKey>,
}

impl TraceKeys {
    /// Reads the ids from the fields of a request. Malformed fields are ignored.
    pub fn of(headers: &HeaderMap) -> Self {
        let trace = only(headers, &TRACEPARENT)
            .and_then(traceparent)
            .or_else(|| only(headers, &B3).and_then(b3))
            .or_else(|| only(headers, &X_B3_TRACEID).and_then(b3_trace_id));
        let request = only(headers, &X_REQUEST_ID).filter(|id| !id.is_empty()).map(fnv_1a);
        Self { trace: trace.map(TraceKey::Trace), request: request.map(TraceKey::Request) }
    }

    /// Whether the request has no readable id.
    pub const fn is_empty(self) -> bool {
        self.trace.is_none() && self.request.is_none()
    }

    /// The keys, the trace id first.
    pub fn iter(self) -> impl Iterator<Item = TraceKey> {
        self.trace.into_iter().chain(self.request)
    }
}

impl From<TraceKey> for TraceKeys {
    fn from(key: TraceKey) -> Self {
        match key {
            TraceKey::Trace(_) => Self { trace: Some(key), request: None },
            TraceKey::Request(_) => Self { trace: None, request: Some(key) },
        }
    }
}

/// A request id for a request without one: a UUID of version 4, made of the given random bits.
pub fn fresh_request_id(random: u128) -> String {
    let uuid = (random & !(0xf << 76) & !(0x3 << 62)) | (0x4 << 76) | (0x2 << 62);
    let mut text = String::with_capacity(36);
    let (head, tail) = ((uuid >> 64) as u64, uuid as u64);
    // Writing to a `String` does not fail.
    let _ = write!(
        text,
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        head >> 32,
        (head >> 16) & 0xffff,
        head & 0xffff,
        tail >> 48,
        tail & 0xffff_ffff_ffff
    );
    text
}

fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    values.next().is_none().then_some(value.as_bytes())
}

/// `<version>-<trace id>-<parent id>-<flags>`, 55 characters; a version above 00 may continue after a further `-`.
fn traceparent(value: &[u8]) -> Option<u128> {
    let (known, more) = value.split_at_checked(55)?;
    let mut parts = known.split(|&b| b == b'-');
    let mut part = |digits: usize| parts.next().filter(|part| part.len() == digits).and_then(hex);
    let (version, trace_id, parent_id, _flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
    let ends_well = match version {
        0 => more.is_empty(),
        0xff => false,
        _ => more.is_empty() || more[0] == b'-',
    };
    (ends_well && trace_id != 0 && parent_id != 0).then_some(trace_id)
}

/// `<trace id>-<span id>[-<sampled>[-<parent id>]]`; a bare `0`, `1` or `d` names no trace.
fn b3(value: &[u8]) -> Option<u128> {
    let mut parts = value.split(|&b| b == b'-');
    let trace_id = b3_trace_id(parts.next()?)?;
    let is_id = |part: &[u8]| part.len() == 16 && hex(part).is_some();
    let rest_is_well = is_id(parts.next()?)
        && parts.next().is_none_or(|sampled| matches!(sampled, b"0" | b"1" | b"d"))
        && parts.next().is_none_or(is_id)
        && parts.next().is_none();
    rest_is_well.then_some(trace_id)
}

fn b3_trace_id(value: &[u8]) -> Option<u128> {
    matches!(value.len(), 16 | 32).then(|| hex(value)).flatten().filter(|id| *id != 0)
}

/// At most 32 hexadecimal digits in lower case.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0u128, |number, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(digit))
    })
}

/// FNV-1a with 128 bits: fixed, so that all workers get the same key for the same text.
fn fnv_1a(text: &[u8]) -> u128 {
    text.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash: u128, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use proptest::prelude::*;

    const TRACE: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;

    fn keys(fields: &[(&'static str, &str)]) -> TraceKeys {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        TraceKeys::of(&headers)
    }

    fn trace(fields: &[(&'static str, &str)]) -> Option<u128> {
        match keys(fields).iter().next() {
            Some(TraceKey::Trace(id)) => Some(id),
            Some(TraceKey::Request(_)) | None => None,
        }
    }

    #[test]
    fn traceparent_is_read_strictly() {
        let table = [
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", true),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00", true),
            ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", true),
            ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what", true),
            ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01what", false),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-extra", false),
            ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", false),
            ("0x-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", false),
            ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", false),
            ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", false),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", false),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0", false),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g", false),
            ("00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01", false),
            ("00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01", false),
            ("", false),
        ];
        for (value, is_well) in table {
            assert_eq!(trace(&[("traceparent", value)]), is_well.then_some(TRACE), "{value}");
        }
    }

    #[test]
    fn two_traceparents_are_none() {
        let value = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(trace(&[("traceparent", value), ("traceparent", value)]), None);
    }

    #[test]
    fn b3_is_read_in_one_field_or_in_several() {
        let short = Some(0xa3ce_929d_0e0e_4736);
        let table = [
            ("b3", "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1-05e3ac9a4f6e3b90", Some(TRACE)),
            ("b3", "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-d", Some(TRACE)),
            ("b3", "a3ce929d0e0e4736-00f067aa0ba902b7", short),
            ("b3", "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-2", None),
            ("b3", "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1-05e3ac9a4f6e3b90-1", None),
            ("b3", "4bf92f3577b34da6a3ce929d0e0e4736", None),
            ("b3", "0", None),
            ("x-b3-traceid", "4bf92f3577b34da6a3ce929d0e0e4736", Some(TRACE)),
            ("x-b3-traceid", "a3ce929d0e0e4736", short),
            ("x-b3-traceid", "0000000000000000a3ce929d0e0e4736", short),
            ("x-b3-traceid", "0000000000000000", None),
            ("x-b3-traceid", "a3ce929d0e0e473", None),
        ];
        for (name, value, expected) in table {
            assert_eq!(trace(&[(name, value)]), expected, "{name}: {value}");
        }
    }

    #[test]
    fn the_first_readable_field_gives_the_trace_id() {
        let traceparent = ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        let (b3, multi) = (("b3", "000000000000000b-00f067aa0ba902b7"), ("x-b3-traceid", "000000000000000c"));
        assert_eq!(trace(&[multi, b3, traceparent]), Some(TRACE));
        assert_eq!(trace(&[multi, b3, ("traceparent", "garbage")]), Some(0xb));
        assert_eq!(trace(&[multi, ("b3", "0")]), Some(0xc));
    }

    #[test]
    fn a_request_id_stands_beside_the_trace_id_and_never_equals_one() {
        let id = "0000000000000000a3ce929d0e0e4736";
        let both = keys(&[("x-b3-traceid", id), ("x-request-id", id)]);
        let kinds: Vec<_> = both.iter().collect();
        assert!(matches!(kinds[..], [TraceKey::Trace(_), TraceKey::Request(_)]), "{kinds:?}");
        assert_eq!(keys(&[("x-request-id", id)]).iter().collect::<Vec<_>>(), kinds[1..]);
        assert_ne!(keys(&[("x-request-id", "a")]), keys(&[("x-request-id", "b")]));
        assert_eq!(keys(&[("x-request-id", "")]), TraceKeys::default());
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(fnv_1a(b""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv_1a(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }

    #[test]
    fn a_fresh_request_id_is_a_uuid_of_version_4() {
        assert_eq!(fresh_request_id(0), "00000000-0000-4000-8000-000000000000");
        assert_eq!(fresh_request_id(u128::MAX), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(fresh_request_id(TRACE), "4bf92f35-77b3-4da6-a3ce-929d0e0e4736");
    }

    proptest! {
        #[test]
        fn no_value_makes_the_readers_fail(value in proptest::collection::vec(any::<u8>(), 0..70)) {
            let _ = (traceparent(&value), b3(&value), b3_trace_id(&value));
        }
    }
}
