//! Proxy status: what a sidecar says about a failed call to the next one downstream, in parameters of `Proxy-Status`.
//!
//! The field is a list with one member per intermediary, the one nearest to the origin first (RFC 9209), in the syntax of
//! structured fields (RFC 9651), which `sfv` reads and writes. Our member is the token `hopguard`; other members are
//! skipped. A malformed value carries no status, in particular no "unsent", which would cause a second payment.

use std::borrow::Cow;
use std::convert::Infallible;

use sfv::visitor::{EntryVisitor, Ignored, InnerListVisitor, ItemVisitor, ListVisitor, ParameterVisitor};
use sfv::{BareItemFromInput, ItemSerializer, KeyRef, ParameterSerializer, Parser, StringRef, TokenRef};
use sfv::{key_ref, string_ref, token_ref};

/// Token of our member.
const MEMBER: &TokenRef = token_ref("hopguard");

const FINAL: &KeyRef = key_ref("hopguard-final");
const UNSENT: &KeyRef = key_ref("hopguard-unsent");
const PLACE: &KeyRef = key_ref("hopguard-at");

/// Parameter of RFC 9209: what failed, a token of its section 2.3.
pub const ERROR: &KeyRef = key_ref("error");
/// Parameter of RFC 9209: a text for people.
pub const DETAILS: &KeyRef = key_ref("details");
/// Parameter of RFC 9209: the status that the upstream sent.
pub const RECEIVED_STATUS: &KeyRef = key_ref("received-status");

/// The error type of local replies by a rate limit.
const DENIED: &TokenRef = token_ref("http_request_denied");

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

/// Writes our member of `Proxy-Status`: its token, and the parameters that `add` adds.
pub fn write_member(
    add: impl for<'a> FnOnce(ParameterSerializer<&'a mut String>) -> ParameterSerializer<&'a mut String>,
) -> String {
    // As long as most members with `details`.
    let mut text = String::with_capacity(256);
    let _written = add(ItemSerializer::with_buffer(&mut text).bare_item(MEMBER)).finish();
    text
}

/// A text as a string of structured fields: printable ASCII, with `?` in the place of everything else.
pub fn printable(text: &str) -> Cow<'_, StringRef> {
    StringRef::from_str(text).map_or_else(
        |_other| {
            let printable = text.chars().map(|c| if matches!(c, ' '..='~') { c } else { '?' }).collect();
            Cow::Owned(sfv::String::from_string(printable).unwrap_or_else(|_never| string_ref("").to_owned()))
        },
        Cow::Borrowed,
    )
}

impl ProxyStatus {
    /// Parses the values of `Proxy-Status`, in their order; `None` if no member of ours has a known parameter.
    ///
    /// With several members, "final" holds if any says it; the destination is that of the first one, nearest to the
    /// origin; "unsent" and "limited" hold only if the last member of all, nearest to the reader, says so: if another
    /// proxy or an app came after it, the request did reach that one. A value with a syntax error is skipped as a
    /// whole.
    pub fn read<'a>(values: impl Iterator<Item = &'a [u8]>) -> Option<Self> {
        let mut status = Self::default();
        for value in values {
            match Parser::new(value).parse_list_with_visitor(Members(status.clone())) {
                Ok(with_value) => status = with_value,
                // The malformed value may have held the last member, which then did not say it.
                Err(_malformed) => (status.is_unsent, status.is_limited) = (false, false),
            }
        }
        status.says_something().then_some(status)
    }

    /// Adds the parameters to our member. In a name, bytes that are not printable ASCII become `?`, and the rest after 256
    /// bytes is cut off.
    pub fn write<'a>(&self, mut member: ParameterSerializer<&'a mut String>) -> ParameterSerializer<&'a mut String> {
        for (key, is_set) in [(FINAL, self.is_final), (UNSENT, self.is_unsent)] {
            if is_set {
                member = member.parameter(key, true);
            }
        }
        let Some(at) = &self.at else { return member };
        let name: String = at.chars().take(LONGEST_NAME).collect();
        member.parameter(PLACE, &*printable(&name))
    }

    /// True if there is a parameter to write.
    pub const fn says_something(&self) -> bool {
        self.is_final || self.is_unsent || self.is_limited || self.at.is_some()
    }

    /// Adds the parameters of a further member of ours.
    fn merge(&mut self, next: Self) {
        self.is_final |= next.is_final;
        self.is_unsent = next.is_unsent;
        self.is_limited = next.is_limited;
        self.at = self.at.take().or(next.at);
    }
}

/// Reads the members of one value into the status of those before.
struct Members(ProxyStatus);

impl<'de> ListVisitor<'de> for Members {
    type Out = ProxyStatus;
    type Error = Infallible;

    fn entry(&mut self) -> Result<impl EntryVisitor<'de>, Infallible> {
        // The intermediary of this member got a response from the one before it, so the request was sent.
        (self.0.is_unsent, self.0.is_limited) = (false, false);
        Ok(Member(&mut self.0))
    }

    fn finish(self) -> Result<ProxyStatus, Infallible> {
        Ok(self.0)
    }
}

/// Reads one member; only an item that is our token counts.
struct Member<'a>(&'a mut ProxyStatus);

impl<'de> EntryVisitor<'de> for Member<'_> {
    type Error = Infallible;

    fn item(self) -> Result<impl ItemVisitor<'de>, Infallible> {
        Ok(self)
    }

    fn inner_list(self) -> Result<impl InnerListVisitor<'de>, Infallible> {
        Ok(Ignored)
    }
}

impl<'de> ItemVisitor<'de> for Member<'_> {
    type Out = Option<()>;
    type Error = Infallible;

    fn bare_item(
        self,
        item: BareItemFromInput<'de>,
    ) -> Result<impl ParameterVisitor<'de, Out = Option<()>>, Infallible> {
        let is_ours = matches!(item, BareItemFromInput::Token(token) if token == MEMBER);
        Ok(is_ours.then(|| OwnParameters { status: self.0, own: ProxyStatus::default() }))
    }
}

/// Reads the parameters of a member of ours.
struct OwnParameters<'a> {
    status: &'a mut ProxyStatus,
    own: ProxyStatus,
}

impl<'de> ParameterVisitor<'de> for OwnParameters<'_> {
    type Out = ();
    type Error = Infallible;

    fn parameter(&mut self, key: &'de KeyRef, value: BareItemFromInput<'de>) -> Result<(), Infallible> {
        match value {
            BareItemFromInput::Boolean(is) if key == FINAL => self.own.is_final = is,
            BareItemFromInput::Boolean(is) if key == UNSENT => self.own.is_unsent = is,
            BareItemFromInput::Token(token) if key == ERROR => self.own.is_limited = token == DENIED,
            BareItemFromInput::String(text) if key == PLACE => {
                let name = Some(text.as_str()).filter(|name| (1..=LONGEST_NAME).contains(&name.len()));
                self.own.at = name.map(Into::into);
            }
            _ => {}
        }
        Ok(())
    }

    fn finish(self) -> Result<(), Infallible> {
        self.status.merge(self.own);
        Ok(())
    }
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
                r#"(a "b" 1;x);y, "cdn, x"; next-protocol=:aDI=:, *a/b:c; d=-1.5; t=@12; s=%"f%c3%bc", hopguard; hopguard-final"#,
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
            "hopguard; hopguard-final; a=1234567890123456",
            "hopguard; hopguard-final; a=%\"f%c3\"",
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
        assert_eq!(write_member(|member| odd.write(member)), r#"hopguard;hopguard-at="caf???\"x\"""#);
        let long = ProxyStatus { at: Some("x".repeat(1000).into()), ..ProxyStatus::default() };
        let value = write_member(|member| long.write(member));
        assert_eq!(read(&[&value]), mark(false, false, Some(&"x".repeat(256))));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(is_final: bool, is_unsent: bool, at in proptest::option::of("[ -~]{1,256}")) {
            let mark = ProxyStatus { is_final, is_unsent, is_limited: false, at: at.map(Into::into) };
            let own = write_member(|member| {
                mark.write(member.parameter(ERROR, token_ref("x")).parameter(DETAILS, &*printable("y")))
            });
            let value = format!("a, (b), {own}");
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
