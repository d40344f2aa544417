//! Header fields on their way through: what ends at this hop, and what this hop adds (RFC 9110, 7.6.1 and 7.6.3).
//!
//! One pass over the fields finds the special ones, so that the usual message, which has none, costs no look-ups.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Extensions, Response, Version};
use hyper::ext::ReasonPhrase;

use crate::policy::router;

/// The number of the attempt of one hop, counted from 1 as Envoy does.
pub const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// The phrase of a status that no standard defines.
const UNKNOWN: ReasonPhrase = ReasonPhrase::from_static(b"Unknown");

/// Content types that change how a message is passed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ContentKind {
    /// gRPC.
    Grpc,
    /// Server-Sent Events.
    Events,
    /// Everything else.
    #[default]
    Other,
}

impl ContentKind {
    fn of(value: &HeaderValue) -> Self {
        let starts =
            |text: &str| value.as_bytes().get(..text.len()).is_some_and(|is| is.eq_ignore_ascii_case(text.as_bytes()));
        if router::is_grpc_type(value) {
            Self::Grpc
        } else if starts("text/event-stream") {
            Self::Events
        } else {
            Self::Other
        }
    }
}

/// Which special fields a message has, and how long its header section is.
#[derive(Debug, Default)]
pub struct HeaderScan {
    /// Names, values and separators together, in bytes.
    pub size: usize,
    /// `Content-Length` fields.
    pub lengths: usize,
    /// `Transfer-Encoding` fields.
    pub codings: usize,
    /// `Expect`.
    pub expect: bool,
    /// `Via`.
    pub via: bool,
    /// `Upgrade`.
    pub upgrade: bool,
    /// `traceparent`.
    pub trace: bool,
    /// `grpc-timeout` or `x-envoy-expected-rq-timeout-ms`.
    pub deadline: bool,
    /// `x-envoy-attempt-count`.
    pub attempt_count: bool,
    /// `Retry-After` or `grpc-retry-pushback-ms`.
    pub pushback: bool,
    /// `Proxy-Status`.
    pub proxy_status: bool,
    /// An `Idempotency-Key` that has a key.
    pub idempotency_key: bool,
    /// `TE`.
    pub te: bool,
    /// `Host`.
    pub hosts: usize,
    /// What `Content-Type` says, as far as it changes how the message is passed on.
    pub kind: ContentKind,
    /// A `Content-Length` that is not one plain number.
    odd_length: bool,
    connection: bool,
    keep_alive: bool,
    obsolete: bool,
    cookies: usize,
}

impl HeaderScan {
    /// Reads the fields once.
    pub fn scan(fields: &HeaderMap) -> Self {
        let mut found = Self::default();
        for (name, value) in fields {
            // `name: value` and the end of the line.
            found.size += name.as_str().len() + value.len() + 4;
            match *name {
                header::CONTENT_LENGTH => {
                    found.lengths += 1;
                    found.odd_length |= !value.as_bytes().iter().all(u8::is_ascii_digit);
                }
                header::CONTENT_TYPE => found.kind = ContentKind::of(value),
                header::HOST => found.hosts += 1,
                header::TRANSFER_ENCODING => found.codings += 1,
                header::CONNECTION => found.connection = true,
                header::EXPECT => found.expect = true,
                header::VIA => found.via = true,
                header::UPGRADE => found.upgrade = true,
                header::TE => found.te = true,
                header::COOKIE => found.cookies += 1,
                header::RETRY_AFTER => found.pushback = true,
                header::PROXY_AUTHENTICATE | header::PROXY_AUTHORIZATION => found.obsolete = true,
                _ => match name.as_str() {
                    "keep-alive" => found.keep_alive = true,
                    "proxy-connection" | "http2-settings" => found.obsolete = true,
                    "traceparent" => found.trace = true,
                    "grpc-timeout" | "x-envoy-expected-rq-timeout-ms" => found.deadline = true,
                    "x-envoy-attempt-count" => found.attempt_count = true,
                    "grpc-retry-pushback-ms" => found.pushback = true,
                    "proxy-status" => found.proxy_status = true,
                    // An empty key does not tell the second request from the first.
                    "idempotency-key" => {
                        found.idempotency_key |= value.as_bytes().iter().any(|byte| !b" \t\"".contains(byte))
                    }
                    _ => {}
                },
            }
        }
        found
    }

    /// The longest field with its size in bytes, for the local reply to a section that is too long.
    pub fn longest(fields: &HeaderMap) -> Option<(&HeaderName, usize)> {
        fields.iter().map(|(name, value)| (name, name.as_str().len() + value.len())).max_by_key(|(_, size)| *size)
    }
}

/// What the hop-by-hop fields said before they were removed.
#[derive(Debug, Default)]
pub struct HopByHop {
    /// Fields that `Connection` named; they may not pass as trailers either.
    pub named: Vec<HeaderName>,
    /// The sender can take trailers (`TE: trailers`).
    pub trailers: bool,
    /// How long the sender keeps an idle connection (`Keep-Alive: timeout=`), in seconds.
    pub keep_alive: Option<u32>,
}

impl HopByHop {
    /// How long the sender of a response of this version keeps its connection, in seconds; 0 for HTTP/1.0, whose
    /// persistent connections do not serve HTTP/1.1 requests.
    pub fn kept_for(&self, version: Version) -> Option<u32> {
        if version < Version::HTTP_11 { Some(0) } else { self.keep_alive }
    }
}

/// Removes every field that ends at this hop.
pub fn strip(fields: &mut HeaderMap, present: &HeaderScan) -> HopByHop {
    let mut said = HopByHop::default();
    if present.te {
        said.trailers = fields.get_all(header::TE).iter().any(|value| has_token(value, "trailers"));
        fields.remove(header::TE);
    }
    if present.keep_alive {
        said.keep_alive = fields.get(KEEP_ALIVE).and_then(keep_alive_seconds);
        fields.remove(KEEP_ALIVE);
    }
    if present.connection {
        said.named = named_by_connection(fields);
        fields.remove(header::CONNECTION);
        for name in &said.named {
            fields.remove(name);
        }
    }
    if present.codings > 0 {
        fields.remove(header::TRANSFER_ENCODING);
    }
    if present.upgrade {
        fields.remove(header::UPGRADE);
    }
    if present.obsolete {
        for name in [PROXY_CONNECTION, HTTP2_SETTINGS, header::PROXY_AUTHENTICATE, header::PROXY_AUTHORIZATION] {
            fields.remove(name);
        }
    }
    said
}

/// Options of the connection itself, fields that end here whether they are named or not, and the one field that
/// never ends here.
const OURS: [&[u8]; 8] =
    [b"", b"close", b"keep-alive", b"te", b"upgrade", b"transfer-encoding", b"proxy-connection", b"host"];

fn named_by_connection(fields: &HeaderMap) -> Vec<HeaderName> {
    fields
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|token| !OURS.iter().any(|ours| token.eq_ignore_ascii_case(ours)))
        .filter_map(|token| HeaderName::from_bytes(token).ok())
        .collect()
}

fn has_token(value: &HeaderValue, token: &str) -> bool {
    value.as_bytes().split(|&byte| byte == b',').any(|one| one.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

/// True if a field such as `Connection` or `Upgrade` lists the token.
pub fn lists(fields: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    fields.get_all(name).iter().any(|value| has_token(value, token))
}

fn keep_alive_seconds(value: &HeaderValue) -> Option<u32> {
    value.to_str().ok()?.split(',').find_map(|part| {
        let (name, seconds) = part.split_once('=')?;
        name.trim().eq_ignore_ascii_case("timeout").then(|| seconds.trim().parse().ok())?
    })
}

/// True if `chunked` alone frames the body. Any other coding would reach the next hop without the field that names it.
pub fn only_chunked(fields: &HeaderMap, present: &HeaderScan) -> bool {
    present.codings == 0
        || (present.codings == 1
            && fields
                .get(header::TRANSFER_ENCODING)
                .is_some_and(|value| value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked")))
}

/// Writes the body's length once. hyper and h2 have checked that all values are the same number.
pub fn one_length(fields: &mut HeaderMap, present: &HeaderScan) {
    if present.lengths < 2 && !present.odd_length {
        return;
    }
    let Some(value) = fields.get(header::CONTENT_LENGTH) else { return };
    let first = value.as_bytes().split(|&byte| byte == b',').next().unwrap_or_default();
    if let Ok(one) = HeaderValue::from_bytes(first.trim_ascii()) {
        fields.insert(header::CONTENT_LENGTH, one);
    }
}

/// Joins the cookie crumbs that HTTP/2 allows into the one field that HTTP/1 has (RFC 9113, 8.2.3).
pub fn join_cookies(fields: &mut HeaderMap, present: &HeaderScan) {
    if present.cookies < 2 {
        return;
    }
    let all: Vec<_> = fields.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(one) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        fields.insert(header::COOKIE, one);
    }
}

/// A number that a field counts, digits only; one that does not fit is the largest, because it stands for "very many".
pub fn count(value: &HeaderValue) -> Option<u32> {
    let digits =
        value.to_str().ok().filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))?;
    Some(digits.parse().unwrap_or(u32::MAX))
}

/// Removes what hyper attached to a response, but for a reason phrase of the upstream's own. An empty phrase is none: the
/// caller gets the usual one, because some old clients expect one.
pub fn forget_all_but_reason(extensions: &mut Extensions) {
    if extensions.is_empty() {
        return;
    }
    let reason = extensions.remove::<ReasonPhrase>().filter(|reason| !reason.as_bytes().is_empty());
    extensions.clear();
    if let Some(reason) = reason {
        extensions.insert(reason);
    }
}

/// Gives a phrase to a status that has none, neither by the standard nor by the upstream; hyper would write `<none>`.
pub fn name_status<B>(response: &mut Response<B>) {
    if response.status().canonical_reason().is_none() && response.extensions().get::<ReasonPhrase>().is_none() {
        response.extensions_mut().insert(UNKNOWN);
    }
}

/// Removes what hyper attached to a message; it belongs to this side only.
pub fn forget(extensions: &mut Extensions) {
    if !extensions.is_empty() {
        extensions.clear();
    }
}

/// The member that one listener adds to `Via`, and by which it recognises its own requests.
pub struct Via {
    mark: String,
    values: [HeaderValue; 3],
}

/// How often a request may pass: an application that copies all fields and calls itself is not yet a loop.
const PASSES: usize = 10;

impl Via {
    /// The member of one listener: `mark` has to be unique among all listeners of all processes.
    pub fn new(mark: &str) -> Self {
        let mark = format!("({mark})");
        let value = |version: &str| {
            HeaderValue::from_str(&format!("{version} hopguard {mark}"))
                .unwrap_or_else(|_| HeaderValue::from_static("1.1 hopguard"))
        };
        Self { values: [value("1.0"), value("1.1"), value("2.0")], mark }
    }

    /// Adds this hop to a message that came with `version`.
    pub fn add(&self, fields: &mut HeaderMap, version: Version) {
        let value = match version {
            Version::HTTP_10 => &self.values[0],
            Version::HTTP_2 => &self.values[2],
            _ => &self.values[1],
        };
        fields.append(header::VIA, value.clone());
    }

    /// True if the message has passed this listener too often.
    pub fn is_loop(&self, fields: &HeaderMap) -> bool {
        let passes = fields
            .get_all(header::VIA)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .map(|value| value.matches(&self.mark).count())
            .sum::<usize>();
        passes >= PASSES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(list: &[(&'static str, &str)]) -> HeaderMap {
        list.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())).fold(
            HeaderMap::new(),
            |mut all, (name, value)| {
                all.append(name, value);
                all
            },
        )
    }

    #[test]
    fn what_ends_at_this_hop_is_taken_out_and_the_rest_stays() {
        let mut all = fields(&[
            ("connection", "close, X-Foo"),
            ("connection", "x-bar"),
            ("x-foo", "1"),
            ("x-bar", "1"),
            ("keep-alive", "timeout=7, max=100"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("http2-settings", "x"),
            ("proxy-connection", "keep-alive"),
            ("x-end", "stays"),
        ]);
        let present = HeaderScan::scan(&all);
        let said = strip(&mut all, &present);
        assert_eq!(all.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-end"]);
        assert_eq!((said.trailers, said.keep_alive), (true, Some(7)));
        assert_eq!(said.named, ["x-foo", "x-bar"]);
    }

    #[test]
    fn only_plain_chunked_is_a_framing_that_we_can_pass_on() {
        for (codings, good) in [
            (&[][..], true),
            (&["chunked"], true),
            (&["Chunked"], true),
            (&["gzip, chunked"], false),
            (&["chunked", "chunked"], false),
            (&["chunked, chunked"], false),
            (&["identity"], false),
        ] {
            let list: Vec<_> = codings.iter().map(|coding| ("transfer-encoding", *coding)).collect();
            let all = fields(&list);
            assert_eq!(only_chunked(&all, &HeaderScan::scan(&all)), good, "{codings:?}");
        }
    }

    #[test]
    fn repeated_lengths_become_one_and_cookie_crumbs_too() {
        for lengths in [&["5", "5"][..], &["5, 5"], &["5"]] {
            let list: Vec<_> = lengths.iter().map(|length| ("content-length", *length)).collect();
            let mut all = fields(&list);
            let present = HeaderScan::scan(&all);
            one_length(&mut all, &present);
            assert_eq!(all.get_all(header::CONTENT_LENGTH).iter().collect::<Vec<_>>(), ["5"]);
        }
        let mut all = fields(&[("cookie", "a=1"), ("cookie", "b=2")]);
        let present = HeaderScan::scan(&all);
        join_cookies(&mut all, &present);
        assert_eq!(all.get_all(header::COOKIE).iter().collect::<Vec<_>>(), ["a=1; b=2"]);
    }

    #[test]
    fn an_idempotency_key_is_one_only_if_it_says_something() {
        for (values, is_key) in [
            (&[][..], false),
            (&[""], false),
            (&[" \t"], false),
            (&["\"\""], false),
            (&["\"7\""], true),
            (&["7"], true),
            (&["7", ""], true),
        ] {
            let list: Vec<_> = values.iter().map(|value| ("idempotency-key", *value)).collect();
            assert_eq!(HeaderScan::scan(&fields(&list)).idempotency_key, is_key, "{values:?}");
        }
    }

    #[test]
    fn a_loop_is_a_message_that_came_by_too_often() {
        let via = Via::new("a1");
        let mut all = HeaderMap::new();
        for _ in 0..PASSES {
            assert!(!via.is_loop(&all));
            via.add(&mut all, Version::HTTP_11);
        }
        assert!(via.is_loop(&all));
        assert!(!Via::new("b2").is_loop(&all));
        assert_eq!(all[header::VIA], "1.1 hopguard (a1)");
    }
}
