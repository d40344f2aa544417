//! Which fault a call meets, and the check of the entries.

use std::cell::Cell;

use super::*;
use crate::problems::Origin;
use crate::rules::tests::checked;

const NOW: &str = "2026-06-01T12:00:00Z";

fn check(yaml: &str) -> (Faults, Vec<String>) {
    checked(yaml, |specs: &Vec<FaultSpec>, at| Faults::check(specs, &Faults::BUILT_IN, at))
}

/// One fault with these fields beside name and end.
fn one(what: &str) -> (Faults, Vec<String>) {
    check(&format!("[{{ name: f, until: 2026-12-01T00:00:00Z, {what} }}]"))
}

fn good(yaml: &str) -> Faults {
    let (faults, problems) = check(yaml);
    assert_eq!(problems, Vec::<String>::new(), "{yaml}");
    faults
}

fn at(text: &str) -> Timestamp {
    FaultUntil::parse(text).unwrap().0
}

fn no_header<'a>(_: &HeaderName) -> Option<&'a [u8]> {
    None
}

fn name(fault: Option<&Fault>) -> Option<&str> {
    fault.map(|fault| fault.name.value.as_str())
}

#[test]
fn a_share_of_the_calls_meets_a_fault() {
    let faults = good("[{ name: slow, delay: 200ms, share: 0.1, until: 2026-12-01T00:00:00Z }]");
    let met = |random: f64| name(faults.draw(no_header, at(NOW), || random)).is_some();
    assert!(met(0.0) && met(0.0999) && !met(0.1) && !met(0.9999));
    let calls = (0..1000).map(|call| f64::from(call) / 1000.0);
    assert_eq!(calls.filter(|random| met(*random)).count(), 100);
}

#[test]
fn each_fault_is_drawn_by_itself_and_the_first_that_applies_is_met() {
    let faults = good(
        "[{ name: a, reset: true, share: 0.1, until: 2026-12-01T00:00:00Z },
          { name: b, delay: 1s, share: 0.2, until: 2026-12-01T00:00:00Z },
          { name: c, delay: 1s, until: 2026-12-01T00:00:00Z },
          { name: d, delay: 1s, share: 0.5, until: 2026-12-01T00:00:00Z }]",
    );
    let table: [(&[f64], &str); 3] = [(&[0.05], "a"), (&[0.5, 0.19], "b"), (&[0.5, 0.2], "c")];
    for (numbers, expected) in table {
        let drawn = Cell::new(0);
        let random = || {
            drawn.set(drawn.get() + 1);
            numbers[drawn.get() - 1]
        };
        assert_eq!(name(faults.draw(no_header, at(NOW), random)), Some(expected));
        assert_eq!(drawn.get(), numbers.len(), "{expected}: a share of 1 draws no number");
    }
}

#[test]
fn only_calls_with_all_headers_meet_the_fault() {
    let faults = good(
        "[{ name: f, reset: true, headers: { X-Test: '1', x-user: anna }, until: 2026-12-01T00:00:00Z, share: 0.5 }]",
    );
    let met = |test: Option<&'static str>, user: Option<&'static str>| {
        let header = |name: &HeaderName| match name.as_str() {
            "x-test" => test.map(str::as_bytes),
            "x-user" => user.map(str::as_bytes),
            _ => None,
        };
        let drawn = Cell::new(0);
        let random = || {
            drawn.set(drawn.get() + 1);
            0.0
        };
        let is_met = faults.draw(header, at(NOW), random).is_some();
        assert_eq!(drawn.get() == 1, is_met, "without the header no number is drawn");
        is_met
    };
    assert!(met(Some("1"), Some("anna")));
    for (test, user) in [(Some("1"), None), (None, Some("anna")), (Some("2"), Some("anna")), (Some("1"), Some("Anna"))]
    {
        assert!(!met(test, user), "{test:?} {user:?}");
    }
}

#[test]
fn a_fault_that_is_over_is_read_but_met_by_no_call() {
    let faults = good(
        "[{ name: old, reset: true, until: 2026-06-01T12:00:00+02:00 }, { name: new, reset: true, until: 2027-01-01T00:00:00Z }]",
    );
    let met = |now: &str| name(faults.draw(no_header, at(now), || 0.0)).map(str::to_owned);
    assert_eq!(met("2026-06-01T09:59:59.999999999Z").as_deref(), Some("old"));
    assert_eq!(met("2026-06-01T10:00:00Z").as_deref(), Some("new"));
    assert_eq!(met("2027-01-01T00:00:00Z"), None);
    assert_eq!(faults.iter().map(|fault| fault.is_over(at(NOW))).collect::<Vec<_>>(), [true, false]);
    assert!(!faults.is_empty() && Faults::default().is_empty());
}

#[test]
fn what_a_fault_does_is_read() {
    let ending = |what: &str| {
        let (faults, problems) = one(what);
        assert_eq!(problems, Vec::<String>::new(), "{what}");
        let Faults(mut faults) = faults;
        faults.remove(0).ending
    };
    let answer = |cut: Option<u64>, rate: Option<u64>| FaultAction::Answer {
        cut_after: cut.map(Sourced::built_in),
        bytes_per_second: rate.map(Sourced::built_in),
    };
    let unavailable = Abort::Grpc(GrpcCode::parse("unavailable").unwrap());
    assert_eq!(ending("delay: 200ms"), answer(None, None));
    assert_eq!(ending("cutAfter: 1KiB"), answer(Some(1024), None));
    assert_eq!(ending("cutAfter: 0"), answer(Some(0), None));
    assert_eq!(ending("slowBody: { bytesPerSecond: 10KiB }, cutAfter: 5, delay: 1s"), answer(Some(5), Some(10_240)));
    assert_eq!(ending("abort: { grpc: unavailable }, delay: 1s"), FaultAction::Abort(Sourced::built_in(unavailable)));
    let status = Abort::Status(StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(ending("abort: { status: 503 }"), FaultAction::Abort(Sourced::built_in(status)));
    assert_eq!(ending("reset: true, delay: 1s"), FaultAction::Reset(Sourced::built_in(())));
}

#[test]
fn what_is_left_out_has_the_documented_default() {
    let (Faults(faults), _) = one("delay: 200ms");
    assert_eq!((faults[0].share.value.get(), &faults[0].share.origin), (1.0, &Origin::BuiltIn));
    assert!(faults[0].headers.is_empty());
    assert_eq!(faults[0].name.origin.to_string(), "p.yaml:1");
}

#[test]
fn contradictions_and_gaps_are_all_reported_with_what_to_write() {
    let table = [
        ("share: 0.5", "[0]: the fault has no action", "delay, abort, reset, cutAfter and slowBody"),
        ("reset: false", "[0].reset: `reset: false` has no effect", "`reset: true`"),
        ("reset: true, abort: { status: 503 }", "[0].reset: `reset` and `abort`", "remove one"),
        ("abort: { status: 503 }, cutAfter: 5", "[0].cutAfter: `cutAfter` and `abort`", "sends no response"),
        ("reset: true, slowBody: { bytesPerSecond: 5 }", "[0].slowBody: `slowBody` and `reset`", "sends no response"),
        ("abort: {}", "[0].abort: `abort` has neither", "`{ status: 503 }`"),
        ("abort: { status: 503, grpc: internal }", "[0].abort.grpc: `status` and `grpc`", "remove one"),
        ("slowBody: {}", "[0].slowBody: `bytesPerSecond` is missing", "`bytesPerSecond: 10KiB`"),
        ("slowBody: { bytesPerSecond: 0 }", "[0].slowBody.bytesPerSecond: 0 bytes", "at least 1"),
        ("reset: true, headers: { 'x y': a }", "[0].headers.x y: `x y` is not a header name", "`x-test`"),
        ("reset: true, headers: { x-a: a, X-A: b }", "[0].headers.x-a: header `x-a` appears twice", "case-insensitive"),
        ("reset: true, headers: { Host: bank }", "[0].headers.Host: a fault cannot match by `Host`", "in `hosts`"),
        (
            "reset: true, headers: { x-a: ' a' }",
            "[0].headers.x-a: ` a` never matches",
            "remove the spaces around the value",
        ),
    ];
    for (what, message, hint) in table {
        let (_, problems) = one(what);
        assert_eq!(problems.len(), 1, "{what}: {problems:?}");
        assert!(problems[0].starts_with(message) && problems[0].contains(hint), "{what}: {problems:?}");
    }
    let (_, problems) = check("[{ delay: 1s }, { name: 'a b', reset: true, cutAfter: 1 }]");
    assert_eq!(problems.len(), 5, "{problems:?}");
    assert!(problems[1].contains(
        "`until` is missing | a fault needs an end: write `until:` with a date, like `2030-01-01T00:00:00Z`"
    ));
    let twice = "{ name: a, reset: true, until: 2026-12-01T00:00:00Z }";
    let (_, problems) = check(&format!("[{twice}, {twice}]"));
    assert_eq!(problems, ["[1].name: another fault is named `a` already, at p.yaml:1 | choose another name"]);
}

#[test]
fn what_cannot_be_read_comes_with_what_to_write() {
    let table = [
        ("abort: { status: 99 }", "200 to 599"),
        ("abort: { status: 600 }", "200 to 599"),
        ("abort: { grpc: UNAVAILABLE }", "`unavailable`"),
        ("abort: { grpc: canceled }", "`cancelled`"),
        ("abort: { grpc: deadlineExceeded }", "`deadline_exceeded`"),
        ("abort: { grpc: 14 }", "`unavailable`"),
        ("abort: { grpc: nothing_like_it }", "ok, cancelled, unknown"),
        ("cutAfter: 1KB", "`1KiB`"),
        ("cutAfter: -1", "a size like `1KiB`"),
        ("share: 0", "above 0 and up to 1"),
        ("share: 10", "above 0 and up to 1"),
        ("share: 1.01", "above 0 and up to 1"),
        ("resett: true", "resett"),
    ];
    for (what, hint) in table {
        let yaml = format!("{{ name: f, until: 2026-12-01T00:00:00Z, {what} }}");
        let error = serde_yaml::from_str::<FaultSpec>(&yaml).expect_err(what).to_string();
        assert!(error.contains(hint), "{what}: {error}");
    }
}

#[test]
fn an_end_is_a_point_in_time_on_every_machine() {
    for text in
        ["2026-12-01T00:00:00Z", "2026-12-01t01:00:00.5+01:00", "2024-02-29T23:59:59-05:30", "9999-12-30T22:00:00Z"]
    {
        assert!(FaultUntil::parse(text).is_ok(), "{text}");
    }
    assert_eq!(at("2026-12-01T01:00:00+01:00"), at("2026-12-01T00:00:00Z"));
    let table = [
        ("2026-12-01", "`2026-12-01T00:00:00Z`"),
        ("2026-12-01T08:00:00", "`2026-12-01T08:00:00Z`"),
        ("2026-12-01 08:00:00", "`2026-12-01T08:00:00Z`"),
        ("2026-12-01 08:00:00Z", "`2026-12-01T08:00:00Z`"),
        ("2026-02-30T00:00:00Z", "like `2030-01-01T00:00:00Z`"),
        ("2026-12-01T00:00:00Z[UTC]", "like `2030-01-01T00:00:00Z`"),
        ("20261201T000000Z", "like `2030-01-01T00:00:00Z`"),
        ("2026-12-01T00:00:00+24:00", "like `2030-01-01T00:00:00Z`"),
        ("2026-12-01T00:00:00+01:60", "like `2030-01-01T00:00:00Z`"),
        ("9999-12-31T23:59:59Z", "`9999-12-30T22:00:00Z`, or an earlier time"),
        ("9999-12-30T22:00:00.5-00:01", "`9999-12-30T22:00:00Z`, or an earlier time"),
        ("9999-02-29T00:00:00Z", "like `2030-01-01T00:00:00Z`"),
        ("2030-01-01T00:00:00.1234567890Z", "`2030-01-01T00:00:00.123456789Z`"),
        ("2030-02-30T00:00:00.1234567890Z", "like `2030-01-01T00:00:00Z`"),
        ("tomorrow", "like `2030-01-01T00:00:00Z`"),
        ("\u{660}\u{660}\u{660}\u{660}-12-01T00:00:00Z", "like `2030-01-01T00:00:00Z`"),
        ("", "like `2030-01-01T00:00:00Z`"),
    ];
    for (text, hint) in table {
        let fault = FaultUntil::parse(text).expect_err(text);
        assert!(fault.hint.as_deref().is_some_and(|h| h.contains(hint)), "{text}: {fault}");
    }
}

#[test]
fn a_grpc_code_is_its_number_and_its_name() {
    for (number, name) in [(0, "ok"), (4, "deadline_exceeded"), (14, "unavailable"), (16, "unauthenticated")] {
        let code = GrpcCode::parse(name).unwrap();
        assert_eq!((code.number(), code.as_str()), (number, name));
    }
}
