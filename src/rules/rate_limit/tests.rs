//! The values of `rateLimit` and their check.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde::de::value::{BoolDeserializer, Error as ValueError, StrDeserializer, U64Deserializer};
use serde_json::json;

use super::*;
use crate::problems::Origin;
use crate::rules::tests::checked;

fn check(yaml: &str) -> (Sourced<Option<RateLimit>>, Vec<String>) {
    checked(yaml, |spec: &RateLimitSpec, at| RateLimit::check(&Toggle::On(spec.clone()), &RateLimit::BUILT_IN, at))
}

fn good(yaml: &str) -> RateLimit {
    let (limit, problems) = check(yaml);
    assert_eq!(problems, Vec::<String>::new(), "{yaml}");
    limit.value.unwrap()
}

#[test]
fn what_is_left_out_has_the_documented_default() {
    let limit = good("requests: 100");
    assert_eq!((limit.requests.value, limit.burst.value, limit.per.value), (100, 100, Duration::from_secs(1)));
    assert_eq!(
        (&limit.by.value, &limit.by.origin, &limit.per.origin),
        (&CountBy::Route, &Origin::BuiltIn, &Origin::BuiltIn)
    );
    assert_eq!(limit.burst.origin, limit.requests.origin);
    assert_eq!(RateLimit::BUILT_IN.value, None);
}

#[test]
fn every_field_is_read_and_keeps_its_line() {
    let limit = good("{ requests: 5, per: 1m, burst: 2, by: 'header:X-Api-Key' }");
    assert_eq!((limit.requests.value, limit.burst.value, limit.per.value), (5, 2, Duration::from_secs(60)));
    assert_eq!(limit.by.value.to_string(), "header:x-api-key");
    assert_eq!(limit.per.origin.to_string(), "p.yaml:1");
}

#[test]
fn off_is_a_word_that_keeps_its_line() {
    let word = Toggle::<RateLimitSpec>::deserialize(StrDeserializer::<ValueError>::new("off"));
    let flag = Toggle::<RateLimitSpec>::deserialize(BoolDeserializer::<ValueError>::new(false));
    for read in [word, flag] {
        let (limit, problems) =
            checked("off", |_: &String, at| RateLimit::check(&read.unwrap(), &RateLimit::BUILT_IN, at));
        assert_eq!((limit.value, problems.len()), (None, 0));
        assert_eq!(limit.origin.to_string(), "p.yaml:1");
    }
}

#[test]
fn what_is_neither_off_nor_a_mapping_comes_with_what_to_write() {
    let number = Toggle::<RateLimitSpec>::deserialize(U64Deserializer::<ValueError>::new(100)).unwrap_err();
    assert!(number.to_string().contains("write `{ requests: 100 }`"), "{number}");
    let flag = Toggle::<RateLimitSpec>::deserialize(BoolDeserializer::<ValueError>::new(true)).unwrap_err();
    assert!(flag.to_string().contains("a mapping like `{ requests: 100, per: 1s }`"), "{flag}");
    let text = Toggle::<RateLimitSpec>::deserialize(StrDeserializer::<ValueError>::new("100/s")).unwrap_err();
    assert!(text.to_string().contains("write `off`, or a mapping like"), "{text}");
}

#[test]
fn the_list_of_keys_is_that_of_the_fields() {
    let schema = schemars::schema_for!(RateLimitSpec).to_value();
    let mut known: Vec<_> = schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
    let mut told = RateLimitSpec::KEYS.to_vec();
    known.sort_unstable();
    told.sort_unstable();
    assert_eq!(known, told);
    let unknown = serde_json::from_value::<RateLimitSpec>(json!({ "requests": 1, "rate": 2 })).unwrap_err();
    assert!(unknown.to_string().contains("rate"), "{unknown}");
}

#[test]
fn limits_that_cannot_be_kept_are_refused_with_what_can() {
    let table = [
        ("per: 1s", "`requests` is missing", "`requests: 100`"),
        ("{ requests: 1000000, per: 1ms }", "requests: 1000000 calls in 1ms", "at most 1000 here"),
        ("{ requests: 1, per: 24h, burst: 1000000 }", "burst: a burst of 1000000", "at most 365 here"),
        ("{ requests: 1, per: 9000h }", "per: a burst of 1 ", "shorter `per` than 9000h"),
        ("{ requests: 2, per: 9000h }", "per: a burst of 2 ", "shorter `per` than 9000h"),
    ];
    for (yaml, message, hint) in table {
        let (_, problems) = check(yaml);
        assert_eq!(problems.len(), 1, "{yaml}: {problems:?}");
        assert!(problems[0].contains(message) && problems[0].contains(hint), "{yaml}: {problems:?}");
    }
    let long = good("{ requests: 1000000, per: 1s }");
    assert_eq!(long.requests.value, 1_000_000);
}

#[test]
fn what_calls_are_counted_by_is_shown_as_it_is_read() {
    for text in ["route", "caller", "header:x-api-key"] {
        assert_eq!(CountBy::parse(text).map(|by| by.to_string()), Ok(text.to_owned()));
    }
    let table = [
        ("Caller", "`caller`"),
        ("routes", "`route`"),
        ("header", "`header:x-api-key`"),
        ("x-api-key", "`header:x-api-key`"),
        ("headers:x-api-key", "`header:x-api-key`"),
        ("header: x-tenant", "`header:x-tenant`"),
        ("header:Host", "at the destination that has this host"),
        ("header:", "like `header:x-api-key`"),
        ("header:no name", "like `header:x-api-key`"),
        ("ip", "`route`, `caller`"),
        ("", "`route`, `caller`"),
    ];
    for (text, hint) in table {
        let fault = CountBy::parse(text).expect_err(text);
        assert!(fault.hint.as_deref().is_some_and(|h| h.contains(hint)), "{text}: {fault}");
    }
}

#[test]
fn a_call_is_counted_as_what_the_limit_says() {
    let (mapped, plain) = ("::ffff:10.0.0.7".parse().unwrap(), "10.0.0.7".parse().unwrap());
    let header = |_: &HeaderName| Some(&b"key"[..]);
    assert_eq!(CountBy::Route.key(plain, header), RateLimitKey::Route);
    assert_eq!(CountBy::Caller.key(mapped, header), RateLimitKey::Address(plain));
    let by = CountBy::parse("header:x-api-key").unwrap();
    assert_eq!(by.key(plain, header), RateLimitKey::Header(Some(b"key")));
    assert_eq!(by.key(plain, |_| None), RateLimitKey::Header(None));
}

#[test]
fn a_limit_that_only_moved_is_unchanged() {
    let hash = |limit: &RateLimit| {
        let mut state = DefaultHasher::new();
        limit.hash(&mut state);
        state.finish()
    };
    let (one, mut other) = (good("{ requests: 100, burst: 100 }"), good("requests: 100"));
    other.requests.origin = Origin::BuiltIn;
    assert_eq!((&one, hash(&one)), (&other, hash(&other)));
    assert_ne!(one, good("{ requests: 100, by: caller }"));
}
