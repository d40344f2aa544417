//! Proxy status: what a sidecar says about a failed call to the next one downstream, in parameters of `Proxy-Status`.
//!
//! The field is a list with one member per intermediary, the one nearest to the origin first (RFC 9209, in the syntax
//! of RFC 9651). Our member is the token `hopguard`; other members are skipped. The parser accepts any bytes: a
//! malformed value carries no status, in particular no "unsent", which would cause a second payment.

/// Token of our member.
const MEMBER: &[u8] = b"hopguard";

const FINAL: &[u8] = b"hopguard-final";
const UNSENT: &[u8] = b"hopguard-unsent";
const PLACE: &[u8] = b"hopguard-at";

/// Parameter of RFC 9209, with the error type of local replies by a rate limit.
const ERROR: &[u8] = b"error";
const DENIED: &[u8] = b"http_request_denied";

/// Longest destination name that is carried, in bytes.
const LONGEST_NAME: usize = 256;

/// What hops further upstream say about a failure.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct ProxyStatus {
    /// The retries were used up at the hop of the failure: hops further downstream do not retry.
    pub is_final: bool,
    /// The app behind the nearest sidecar did not get the request: it may be sent again, whatever its method.
    pub is_unsent: bool,
    /// The nearest sidecar refused the request by a rate limit.
    pub is_limited: bool,
    /// Destination of the failed call, so that hops further downstream do not count the failure against their own
    /// upstream.
    pub at: Option<Box<str>>,
}

impl ProxyStatus {
    /// Parses the values of `Proxy-Status`, in their order; `None` if no member of ours has a known parameter.
    ///
    /// With several members, "final" holds if any says it; the destination is that of the first one, nearest to the
    /// origin; "unsent" and "limited" hold only if the last member of all, nearest to the reader, says so: if another
    /// proxy or an app came after it, the request did reach that one. A value with a syntax error is skipped as a
    /// whole.
    pub fn read<'a>(values: impl Iterator<Item = &'a [u8]>) -> Option<Self> {
        let mut mark = Self::default();
        for value in values {
            let mut in_value = mark.clone();
            match (Cursor { rest: value }).list(&mut in_value) {
                Some(()) => mark = in_value,
                // The malformed value may have held the last member, which then did not say it.
                None => (mark.is_unsent, mark.is_limited) = (false, false),
            }
        }
        mark.says_something().then_some(mark)
    }

    /// The parameters, each with a leading `; `, to append to our member of `Proxy-Status`; empty without a parameter.
    /// In a name, bytes that are not printable ASCII become `?`, and the rest after 256 bytes is cut off.
    pub fn write_parameters(&self) -> String {
        let mut text = String::new();
        if self.is_final {
            text.push_str("; hopguard-final");
        }
        if self.is_unsent {
            text.push_str("; hopguard-unsent");
        }
        if let Some(at) = &self.at {
            text.push_str("; hopguard-at=\"");
            for c in at.chars().take(LONGEST_NAME) {
                if matches!(c, '"' | '\\') {
                    text.push('\\');
                }
                text.push(if matches!(c, ' '..='~') { c } else { '?' });
            }
            text.push('"');
        }
        text
    }

    const fn says_something(&self) -> bool {
        self.is_final || self.is_unsent || self.is_limited || self.at.is_some()
    }

    /// Adds the parameters of a further member of ours.
    fn merge(&mut self, next: Self) {
        self.is_final |= next.is_final;
        self.is_unsent = next.is_unsent;
        self.is_limited = next.is_limited;
        self.at = self.at.take().or(next.at);
    }

    fn set(&mut self, key: &[u8], value: &Value<'_>) {
        match (key, value) {
            (FINAL, Value::Boolean(is)) => self.is_final = *is,
            (UNSENT, Value::Boolean(is)) => self.is_unsent = *is,
            (ERROR, Value::Token(token)) => self.is_limited = *token == DENIED,
            (PLACE, Value::String(text)) => self.at = unescaped(text),
            _ => {}
        }
    }
}

/// Text of a string whose escapes are already validated; `None` if it is empty or too long for a name.
fn unescaped(text: &[u8]) -> Option<Box<str>> {
    let mut name = String::new();
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        name.push(char::from(if *byte == b'\\' { *bytes.next()? } else { *byte }));
    }
    (1..=LONGEST_NAME).contains(&name.len()).then(|| name.into())
}

/// A bare item; types that our parameters do not use are not distinguished.
enum Value<'a> {
    Boolean(bool),
    Token(&'a [u8]),
    /// The text between the quotes, with escapes.
    String(&'a [u8]),
    Other,
}

/// Parses a structured field from the front; `None` on a syntax error (RFC 9651 section 4.2).
struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn list(&mut self, mark: &mut ProxyStatus) -> Option<()> {
        self.skip(|b| b == b' ');
        while !self.rest.is_empty() {
            self.member(mark)?;
            self.skip(is_blank);
            if self.rest.is_empty() {
                return Some(());
            }
            self.eat(b',')?;
            self.skip(is_blank);
            if self.rest.is_empty() {
                return None;
            }
        }
        Some(())
    }

    fn member(&mut self, mark: &mut ProxyStatus) -> Option<()> {
        // The intermediary of this member got a response from the one before it, so the request was sent.
        (mark.is_unsent, mark.is_limited) = (false, false);
        if self.rest.first() == Some(&b'(') {
            self.inner_list()?;
            return self.parameters(|_, _| {});
        }
        let is_ours = matches!(self.bare_item()?, Value::Token(MEMBER));
        let mut own = ProxyStatus::default();
        self.parameters(|key, value| own.set(key, value))?;
        if is_ours {
            mark.merge(own);
        }
        Some(())
    }

    fn inner_list(&mut self) -> Option<()> {
        self.eat(b'(')?;
        loop {
            self.skip(|b| b == b' ');
            if self.eat(b')').is_some() {
                return Some(());
            }
            self.bare_item()?;
            self.parameters(|_, _| {})?;
            if !matches!(self.rest.first()?, b' ' | b')') {
                return None;
            }
        }
    }

    fn parameters(&mut self, mut take: impl FnMut(&[u8], &Value<'a>)) -> Option<()> {
        while self.eat(b';').is_some() {
            self.skip(|b| b == b' ');
            if !matches!(self.rest.first()?, b'a'..=b'z' | b'*') {
                return None;
            }
            let key = self.skip(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' | b'.' | b'*'));
            let value = if self.eat(b'=').is_some() { self.bare_item()? } else { Value::Boolean(true) };
            take(key, &value);
        }
        Some(())
    }

    fn bare_item(&mut self) -> Option<Value<'a>> {
        match *self.rest.first()? {
            b'"' => self.string().map(Value::String),
            b'?' => self.boolean().map(Value::Boolean),
            b'A'..=b'Z' | b'a'..=b'z' | b'*' => Some(Value::Token(self.skip(is_of_token))),
            b'-' | b'0'..=b'9' => self.number(),
            b'@' => {
                self.eat(b'@')?;
                self.number()
            }
            b':' => self.bytes(),
            b'%' => {
                self.eat(b'%')?;
                self.string().map(|_| Value::Other)
            }
            _ => None,
        }
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        self.eat(b'"')?;
        let text = self.rest;
        loop {
            match self.next()? {
                b'"' => return Some(&text[..text.len() - self.rest.len() - 1]),
                b'\\' => {
                    self.next().filter(|b| matches!(b, b'"' | b'\\'))?;
                }
                b' '..=b'~' => {}
                _ => return None,
            }
        }
    }

    fn boolean(&mut self) -> Option<bool> {
        self.eat(b'?')?;
        match self.next()? {
            b'0' => Some(false),
            b'1' => Some(true),
            _ => None,
        }
    }

    fn number(&mut self) -> Option<Value<'a>> {
        // The sign is optional.
        let _ = self.eat(b'-');
        let whole = self.skip(|b| b.is_ascii_digit());
        let has_fraction = self.eat(b'.').is_none() || !self.skip(|b| b.is_ascii_digit()).is_empty();
        (!whole.is_empty() && has_fraction).then_some(Value::Other)
    }

    fn bytes(&mut self) -> Option<Value<'a>> {
        self.eat(b':')?;
        self.skip(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'='));
        self.eat(b':').map(|()| Value::Other)
    }

    fn next(&mut self) -> Option<u8> {
        let (&first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(first)
    }

    fn eat(&mut self, byte: u8) -> Option<()> {
        self.rest = self.rest.strip_prefix(&[byte])?;
        Some(())
    }

    fn skip(&mut self, is_wanted: impl Fn(u8) -> bool) -> &'a [u8] {
        let length = self.rest.iter().take_while(|b| is_wanted(**b)).count();
        let (skipped, rest) = self.rest.split_at(length);
        self.rest = rest;
        skipped
    }
}

const fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// `tchar` of RFC 9110, `:` and `/`.
const fn is_of_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
        )
        || matches!(byte, b':' | b'/')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(values: &[&str]) -> Option<ProxyStatus> {
        ProxyStatus::read(values.iter().map(|value| value.as_bytes()))
    }

    fn mark(is_final: bool, is_unsent: bool, at: Option<&str>) -> Option<ProxyStatus> {
        Some(ProxyStatus { is_final, is_unsent, is_limited: false, at: at.map(Into::into) })
    }

    #[test]
    fn our_member_is_found_among_others() {
        let table = [
            ("hopguard; hopguard-final", mark(true, false, None)),
            ("hopguard;hopguard-final=?1;hopguard-unsent=?0", mark(true, false, None)),
            ("hopguard; error=connection_refused; hopguard-unsent", mark(false, true, None)),
            (
                r#"hopguard; error=http_response_timeout; details="a, \"b\"; hopguard-unsent"; hopguard-at="bank""#,
                mark(false, false, Some("bank")),
            ),
            (r#"hopguard; hopguard-at="a\\\"b""#, mark(false, false, Some(r#"a\"b"#))),
            ("envoy; received-status=503, hopguard; hopguard-final \t,\t cdn", mark(true, false, None)),
            (
                r#"(a "b" 1;x);y, "cdn, x"; next-protocol=:aDI=:, *a/b:c; d=-1.5; t=@12; s=%"f%c3", hopguard; hopguard-final"#,
                mark(true, false, None),
            ),
            ("  hopguard;  hopguard-final  ", mark(true, false, None)),
            ("hopguard; hopguard-final; hopguard-final=?0", None),
            ("hopguard; error=dns_error", None),
            ("other; hopguard-final", None),
            ("\"hopguard\"; hopguard-final", None),
            ("(hopguard;hopguard-final)", None),
            ("hopguardx; hopguard-final", None),
            ("hopguard; hopguard-final=1; hopguard-unsent=\"yes\"; hopguard-at=bank", None),
            ("hopguard; hopguard-at=\"\"", None),
            ("", None),
        ];
        for (value, expected) in table {
            assert_eq!(read(&[value]), expected, "{value}");
        }
    }

    #[test]
    fn a_malformed_value_carries_no_mark() {
        let table = [
            "hopguard; hopguard-final,",
            "hopguard; hopguard-final, ,x",
            "hopguard; hopguard-final x",
            "hopguard; hopguard-final; details=\"open",
            "hopguard; hopguard-final; details=\"\\n\"",
            "hopguard; hopguard-final; details=\"caf\u{e9}\"",
            "hopguard; hopguard-final=",
            "hopguard; hopguard-final; Upper",
            "hopguard; hopguard-final=?2",
            "hopguard; hopguard-final; a=1.",
            "hopguard; hopguard-final; a=:x",
            "hopguard; hopguard-final, (a",
            "hopguard; hopguard-final, (a\"b\")",
            ", hopguard; hopguard-final",
        ];
        for value in table {
            assert_eq!(read(&[value]), None, "{value}");
        }
        assert_eq!(read(&["garbage\u{1}", "hopguard; hopguard-final"]), mark(true, false, None));
    }

    #[test]
    fn several_members_join() {
        let joined = mark(true, false, Some("bank"));
        assert_eq!(read(&[r#"hopguard; hopguard-final; hopguard-at="bank", hopguard; hopguard-at="b""#]), joined);
        assert_eq!(read(&[r#"hopguard; hopguard-at="bank""#, r#"hopguard; hopguard-final; hopguard-at="b""#]), joined);
    }

    #[test]
    fn only_the_nearest_proxy_can_say_unsent() {
        for later in ["edge; received-status=503", "(edge)", "\"edge\""] {
            assert_eq!(read(&[&format!("hopguard; hopguard-unsent, {later}")]), None, "{later}");
            assert_eq!(read(&["hopguard; hopguard-unsent", later]), None, "{later}");
            assert_eq!(read(&[later, "hopguard; hopguard-unsent"]), mark(false, true, None), "{later}");
        }
        assert_eq!(read(&["hopguard; hopguard-unsent, hopguard; error=proxy_internal_error"]), None);
        assert_eq!(read(&["hopguard; hopguard-final", "hopguard; hopguard-unsent"]), mark(true, true, None));
        assert_eq!(read(&["hopguard; hopguard-unsent", "hopguard; details=\"cut"]), None);
        assert_eq!(read(&["hopguard; details=\"cut", "hopguard; hopguard-unsent"]), mark(false, true, None));
    }

    #[test]
    fn only_the_nearest_sidecar_can_say_limited() {
        let table: [(&[&str], bool); 6] = [
            (&["hopguard; error=http_request_denied; details=\"rate_limited: too many\""], true),
            (&["nginx; error=http_request_denied"], false),
            (&["hopguard; error=connection_limit_reached"], false),
            (&["hopguard; error=\"http_request_denied\""], false),
            (&["hopguard; error=http_request_denied, hopguard; received-status=200; hopguard-final"], false),
            (&["hopguard; error=http_request_denied", "hopguard; details=\"cut"], false),
        ];
        for (values, is_limited) in table {
            assert_eq!(read(values).is_some_and(|mark| mark.is_limited), is_limited, "{values:?}");
        }
    }

    #[test]
    fn an_odd_name_is_written_as_a_string_that_can_be_read() {
        let odd = ProxyStatus { at: Some("caf\u{e9}\r\n\"x\"".into()), ..ProxyStatus::default() };
        assert_eq!(odd.write_parameters(), r#"; hopguard-at="caf???\"x\"""#);
        let long = ProxyStatus { at: Some("x".repeat(1000).into()), ..ProxyStatus::default() };
        let value = format!("hopguard{}", long.write_parameters());
        assert_eq!(read(&[&value]), mark(false, false, Some(&"x".repeat(256))));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(is_final: bool, is_unsent: bool, at in proptest::option::of("[ -~]{1,256}")) {
            let mark = ProxyStatus { is_final, is_unsent, is_limited: false, at: at.map(Into::into) };
            let value = format!("a, (b), hopguard; error=x; details=\"y\"{}", mark.write_parameters());
            prop_assert_eq!(read(&[&value]), mark.says_something().then_some(mark));
        }

        #[test]
        fn no_bytes_make_the_reader_fail(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = ProxyStatus::read([&bytes[..]].into_iter());
        }

        #[test]
        fn no_value_that_looks_like_a_list_makes_the_reader_fail(value in "(hopguard|[\";,=?:%@()\\\\ ]|; hopguard-(final|unsent|at)|a|1|-|\\.){0,30}") {
            let _ = read(&[&value]);
        }
    }
}
