//! Tables of the decision; examples of the values and their check.

use std::cell::RefCell;
use std::sync::Arc;

use schemars::SchemaGenerator;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::Error as ValueError;
use serde_json::{Value, json};

use super::*;
use crate::problems::{ChildNode, Cursor, DocumentNode, Origin, Position, Problems};
use crate::rules::rule::Rule;
use crate::rules::toggle::{Toggle, ToggleKeys};

const SECOND: Duration = Duration::from_secs(1);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn seen(failure: AttemptFailure) -> AttemptSummary {
    AttemptSummary {
        tries: 1,
        failure,
        is_inbound: false,
        is_reused: false,
        is_same_event: false,
        is_circuit_open: false,
        is_safe: true,
        is_abandoned: false,
        is_marked_final: false,
        pushback: None,
        is_replayable: true,
        left: SECOND,
        random: 0.5,
    }
}

fn again(after: u64) -> RetryDecision {
    RetryDecision::Retry { after: millis(after) }
}

#[test]
fn each_failure_is_retried_if_the_policy_names_it() {
    use AttemptFailure::{Grpc, Refused, Reset, Status, Timeout, Unsent};
    use RetryDecision::Stop;
    let half_of_the_base = RetryDecision::Retry { after: Duration::from_micros(12_500) };
    let table = [
        (Status(200), Stop(NoRetryReason::NotAFailure)),
        (Status(404), Stop(NoRetryReason::NotAFailure)),
        (Status(429), Stop(NoRetryReason::NotAFailure)),
        (Status(500), Stop(NoRetryReason::ConditionOff)),
        (Status(501), Stop(NoRetryReason::ConditionOff)),
        (Status(502), half_of_the_base),
        (Status(503), half_of_the_base),
        (Status(504), half_of_the_base),
        (Status(999), Stop(NoRetryReason::ConditionOff)),
        (Grpc(0), Stop(NoRetryReason::NotAFailure)),
        (Grpc(5), Stop(NoRetryReason::NotAFailure)),
        (Grpc(1), Stop(NoRetryReason::NotAFailure)),
        (Grpc(10), Stop(NoRetryReason::NotAFailure)),
        (Grpc(13), Stop(NoRetryReason::ConditionOff)),
        (Grpc(99), Stop(NoRetryReason::ConditionOff)),
        (Grpc(14), half_of_the_base),
        (Reset, half_of_the_base),
        (Timeout, half_of_the_base),
        (Refused, half_of_the_base),
        (Unsent, again(0)),
    ];
    for (failure, wanted) in table {
        assert_eq!(Retry::built_in().decide(&seen(failure)), wanted, "{failure:?}");
    }
}

#[test]
fn a_named_status_is_retried_even_below_500() {
    let mut retry = Retry::built_in();
    retry.on.value = RetryConditions::default().with(RetryCondition::Status(429)).with(RetryCondition::Grpc(2));
    assert_eq!(retry.decide(&AttemptSummary { random: 0.0, ..seen(AttemptFailure::Status(429)) }), again(0));
    assert_eq!(
        retry.decide(&AttemptSummary { random: 0.0, ..seen(AttemptFailure::Grpc(77)) }),
        again(0),
        "an undefined code is UNKNOWN"
    );
    assert_eq!(
        retry.decide(&AttemptSummary { tries: 3, ..seen(AttemptFailure::Status(429)) }),
        RetryDecision::Stop(NoRetryReason::TriesUsedUp)
    );
    assert_eq!(
        retry.decide(&AttemptSummary { is_safe: false, ..seen(AttemptFailure::Status(429)) }),
        RetryDecision::Stop(NoRetryReason::NotSafe)
    );
    assert_eq!(retry.decide(&seen(AttemptFailure::Status(503))), RetryDecision::Stop(NoRetryReason::ConditionOff));
    assert_eq!(retry.decide(&seen(AttemptFailure::Reset)), RetryDecision::Stop(NoRetryReason::ConditionOff));
}

#[test]
fn failures_are_those_of_the_upstream_and_those_that_the_policy_names() {
    use AttemptFailure::{Grpc, Reset, Status};
    let mut named = Retry::built_in();
    for condition in [RetryCondition::Status(404), RetryCondition::Grpc(1), RetryCondition::Grpc(10)] {
        named.on.value = named.on.value.with(condition);
    }
    let mut off = named.clone();
    off.enabled.value = false;
    let table = [
        (Status(200), [false; 3]),
        (Status(404), [false, true, false]),
        (Status(429), [false; 3]),
        (Status(500), [true; 3]),
        (Grpc(0), [false; 3]),
        (Grpc(1), [false, true, false]),
        (Grpc(10), [false, true, false]),
        (Grpc(13), [true; 3]),
        (Grpc(99), [true; 3]),
        (Reset, [true; 3]),
    ];
    for (failure, wanted) in table {
        let is_one = [Retry::built_in(), named.clone(), off.clone()].map(|retry| retry.is_failure(failure));
        assert_eq!(is_one, wanted, "{failure:?}");
    }
}

#[test]
fn each_reason_stops_a_call_that_was_seen() {
    let good = seen(AttemptFailure::Status(503));
    let table = [
        (AttemptSummary { is_safe: false, ..good }, NoRetryReason::NotSafe),
        (AttemptSummary { is_abandoned: true, ..good }, NoRetryReason::CallerGone),
        (AttemptSummary { is_abandoned: true, ..seen(AttemptFailure::Unsent) }, NoRetryReason::CallerGone),
        (AttemptSummary { is_marked_final: true, ..good }, NoRetryReason::RetriedBelow),
        (AttemptSummary { pushback: Some(Pushback::Stop), ..good }, NoRetryReason::PushedBack),
        (AttemptSummary { tries: 3, ..good }, NoRetryReason::TriesUsedUp),
        (AttemptSummary { is_replayable: false, ..good }, NoRetryReason::BodyTooLong),
        (AttemptSummary { left: millis(12), ..good }, NoRetryReason::Deadline),
        (AttemptSummary { left: Duration::ZERO, random: 0.0, ..good }, NoRetryReason::Deadline),
        (AttemptSummary { is_safe: false, tries: 9, is_marked_final: true, ..good }, NoRetryReason::NotSafe),
    ];
    for (seen, why) in table {
        assert_eq!(Retry::built_in().decide(&seen), RetryDecision::Stop(why), "{seen:?}");
    }
    let mut off = Retry::built_in();
    off.enabled.value = false;
    assert_eq!(off.decide(&good), RetryDecision::Stop(NoRetryReason::Off));
    assert_eq!(off.decide(&seen(AttemptFailure::Unsent)), RetryDecision::Stop(NoRetryReason::Off));
    assert_eq!(off.decide(&seen(AttemptFailure::Status(200))), RetryDecision::Stop(NoRetryReason::NotAFailure));
}

#[test]
fn the_sidecar_in_front_of_the_app_retries_only_what_no_other_hop_can() {
    let inbound = |failure| AttemptSummary { is_inbound: true, is_reused: true, random: 0.0, ..seen(failure) };
    let at_the_caller = RetryDecision::Stop(NoRetryReason::AtTheCaller);
    let table = [
        (inbound(AttemptFailure::Unsent), again(0)),
        (inbound(AttemptFailure::Refused), at_the_caller),
        (AttemptSummary { tries: 2, ..inbound(AttemptFailure::Unsent) }, again(0)),
        (inbound(AttemptFailure::Reset), again(0)),
        (AttemptSummary { tries: 2, ..inbound(AttemptFailure::Reset) }, at_the_caller),
        (AttemptSummary { is_reused: false, ..inbound(AttemptFailure::Reset) }, at_the_caller),
        (
            AttemptSummary { is_safe: false, ..inbound(AttemptFailure::Reset) },
            RetryDecision::Stop(NoRetryReason::NotSafe),
        ),
        (inbound(AttemptFailure::Status(503)), at_the_caller),
        (inbound(AttemptFailure::Grpc(14)), at_the_caller),
        (inbound(AttemptFailure::Timeout), at_the_caller),
    ];
    for (seen, wanted) in table {
        assert_eq!(Retry::built_in().decide(&seen), wanted, "{seen:?}");
    }
}

#[test]
fn behind_an_open_breaker_nothing_is_retried() {
    let open = |failure| AttemptSummary { is_circuit_open: true, is_safe: false, ..seen(failure) };
    for failure in [AttemptFailure::Unsent, AttemptFailure::Reset, AttemptFailure::Status(503)] {
        assert_eq!(
            Retry::built_in().decide(&open(failure)),
            RetryDecision::Stop(NoRetryReason::CircuitOpen),
            "{failure:?}"
        );
    }
    let inbound = AttemptSummary { is_inbound: true, ..open(AttemptFailure::Status(503)) };
    assert_eq!(Retry::built_in().decide(&inbound), RetryDecision::Stop(NoRetryReason::AtTheCaller));
}

#[test]
fn a_call_that_was_retried_or_is_not_safe_is_final_for_hops_downstream() {
    let table = [
        (1, true, None, false),
        (1, true, Some(NoRetryReason::ConditionOff), false),
        (1, true, Some(NoRetryReason::BodyTooLong), false),
        (1, true, Some(NoRetryReason::Off), false),
        (1, true, Some(NoRetryReason::AtTheCaller), false),
        (1, true, Some(NoRetryReason::CallerGone), false),
        (2, true, None, true),
        (2, true, Some(NoRetryReason::BodyTooLong), true),
        (1, false, None, true),
        (1, false, Some(NoRetryReason::NotSafe), true),
        (1, true, Some(NoRetryReason::TriesUsedUp), true),
        (1, true, Some(NoRetryReason::RetriedBelow), true),
        (1, true, Some(NoRetryReason::PushedBack), true),
        (1, true, Some(NoRetryReason::Deadline), true),
        (1, true, Some(NoRetryReason::RetryBudget), true),
        (1, true, Some(NoRetryReason::CircuitOpen), true),
    ];
    for (tries, is_safe, why, wanted) in table {
        assert_eq!(Retry::built_in().is_final(tries, is_safe, why), wanted, "{tries} {is_safe} {why:?}");
    }
    let mut declared = Retry::built_in();
    declared.idempotent.value = true;
    assert!(!declared.is_final(1, false, None));
}

#[test]
fn a_route_may_declare_that_its_calls_can_be_repeated() {
    let mut retry = Retry::built_in();
    retry.idempotent.value = true;
    let post = AttemptSummary { is_safe: false, random: 0.0, ..seen(AttemptFailure::Reset) };
    assert_eq!(retry.decide(&post), again(0));
}

#[test]
fn an_unsent_call_is_retried_at_once_whatever_its_method() {
    let unsent = AttemptSummary { is_safe: false, is_marked_final: true, random: 0.9, ..seen(AttemptFailure::Unsent) };
    let mut retry = Retry::built_in();
    retry.on.value = RetryConditions::default();
    let table = [
        (unsent, again(0)),
        (AttemptSummary { tries: 2, ..unsent }, again(0)),
        (AttemptSummary { tries: 3, ..unsent }, RetryDecision::Stop(NoRetryReason::TriesUsedUp)),
        (AttemptSummary { is_replayable: false, ..unsent }, RetryDecision::Stop(NoRetryReason::BodyTooLong)),
        (AttemptSummary { left: Duration::ZERO, ..unsent }, RetryDecision::Stop(NoRetryReason::Deadline)),
        (AttemptSummary { pushback: Some(Pushback::Stop), ..unsent }, RetryDecision::Stop(NoRetryReason::PushedBack)),
        (AttemptSummary { pushback: Some(Pushback::Wait(millis(7))), ..unsent }, again(7)),
    ];
    for (seen, wanted) in table {
        assert_eq!(retry.decide(&seen), wanted, "{seen:?}");
    }
}

#[test]
fn the_wait_doubles_up_to_its_maximum_and_is_a_random_part_of_that() {
    let mut retry = Retry::built_in();
    retry.attempts.value = 10;
    let longest = [25, 50, 100, 200, 250, 250, 250, 250, 250, 250];
    for (tries, most) in (1..).zip(longest) {
        for (random, wanted) in [(0.0, 0.0), (0.5, 0.5), (0.999, 0.999), (7.0, 1.0), (f64::NAN, 1.0), (-1.0, 1.0)] {
            let decision = retry.decide(&AttemptSummary { tries, random, ..seen(AttemptFailure::Reset) });
            let after = Duration::from_micros(most * 1000).mul_f64(wanted);
            assert_eq!(decision, RetryDecision::Retry { after }, "try {tries}, random {random}");
        }
    }
}

#[test]
fn pushback_is_obeyed_exactly_but_not_past_the_deadline() {
    let asked =
        |wait| AttemptSummary { pushback: Some(Pushback::Wait(millis(wait))), ..seen(AttemptFailure::Status(503)) };
    assert_eq!(Retry::built_in().decide(&asked(0)), again(0));
    assert_eq!(Retry::built_in().decide(&asked(999)), again(999));
    assert_eq!(Retry::built_in().decide(&asked(1000)), RetryDecision::Stop(NoRetryReason::Deadline));
}

#[test]
fn the_budget_is_checked_last_and_not_charged_for_an_unsent_call() {
    let (retry, budget, now) = (Retry::built_in(), RetryBudget::new(), Instant::now());
    let stopped = AttemptSummary { tries: 3, ..seen(AttemptFailure::Reset) };
    for _ in 0..100 {
        assert_eq!(retry.next(&stopped, &budget, now), RetryDecision::Stop(NoRetryReason::TriesUsedUp));
        assert_eq!(retry.next(&seen(AttemptFailure::Unsent), &budget, now), again(0));
    }
    for _ in 0..10 {
        assert!(matches!(retry.next(&seen(AttemptFailure::Reset), &budget, now), RetryDecision::Retry { .. }));
    }
    assert_eq!(retry.next(&seen(AttemptFailure::Reset), &budget, now), RetryDecision::Stop(NoRetryReason::RetryBudget));
    assert_eq!(
        retry.next(&seen(AttemptFailure::Refused), &budget, now),
        RetryDecision::Stop(NoRetryReason::RetryBudget)
    );
    assert_eq!(retry.next(&seen(AttemptFailure::Unsent), &budget, now), again(0));
}

#[test]
fn idempotent_methods_are_those_of_rfc_9110() {
    assert!(["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"].into_iter().all(is_idempotent));
    assert!(!["POST", "PATCH", "CONNECT", "get", "PURGE", ""].into_iter().any(is_idempotent));
}

/// An empty document.
struct Nothing(Position);

impl DocumentNode for Nothing {
    fn entry(&self, _: &str) -> Option<ChildNode<'_>> {
        None
    }
    fn item(&self, _: usize) -> Option<ChildNode<'_>> {
        None
    }
    fn size(&self) -> usize {
        0
    }
    fn place(&self) -> &Position {
        &self.0
    }
    fn is_scalar(&self) -> bool {
        false
    }
}

fn read(value: &Value) -> Result<Toggle<RetrySpec>, String> {
    let shown = |error: ValueError| error.to_string();
    match value {
        Value::String(text) => Toggle::deserialize(text.as_str().into_deserializer()).map_err(shown),
        Value::Bool(value) => Toggle::deserialize(value.into_deserializer()).map_err(shown),
        Value::Number(number) => Toggle::deserialize(number.as_u64().unwrap().into_deserializer()).map_err(shown),
        other => serde_json::from_value(other.clone()).map(Toggle::On).map_err(|error| error.to_string()),
    }
}

/// Lays the layers over the built-in values, the last as a route's; the problems as `path: message (hint)`.
fn layered(layers: &[Value]) -> (Retry, Vec<String>) {
    let (file, problems) = (Arc::from("p.yaml"), RefCell::new(Problems::default()));
    let nothing = Nothing(Position { line: 7, ..Position::default() });
    let at = Cursor::root(&file, &nothing, &problems);
    let mut retry = Retry::built_in();
    for (index, layer) in layers.iter().enumerate() {
        let spec = read(layer).unwrap();
        let is_route = index == 2;
        retry = if is_route { Retry::check_route(&spec, &retry, &at) } else { Retry::check(&spec, &retry, &at) };
    }
    let shown = |problem: &crate::problems::Problem| {
        format!("{}: {} ({})", problem.path, problem.message, problem.hint.as_deref().unwrap_or_default())
    };
    let shown = problems.borrow().iter().map(shown).collect();
    (retry, shown)
}

#[test]
fn a_layer_changes_what_it_writes_and_brings_its_line_along() {
    let everything = json!({
        "attempts": 10, "on": [429, "data_loss", "cancelled", "timeout"], "idempotent": true,
        "backoff": { "base": "1s", "max": "1s" }, "budget": { "ratio": 1, "minPerSecond": 0 }, "replayLimit": 0,
    });
    let (retry, problems) = layered(&[everything]);
    assert!(problems.is_empty(), "{problems:?}");
    assert_eq!(retry.on.value.to_string(), "429, timeout, cancelled, data_loss");
    assert_eq!((retry.attempts.value, retry.replay_limit.value, retry.idempotent.value), (10, 0, true));
    assert_eq!(
        (retry.backoff.base.value, retry.budget.ratio.value, retry.budget.min_per_second.value),
        (SECOND, 1.0, 0)
    );
    assert_eq!(retry.attempts.origin.to_string(), "p.yaml:7");
    assert_eq!(retry.enabled.origin, Origin::BuiltIn, "it was on already");

    let (retry, _) = layered(&[json!({ "attempts": 5 }), json!({ "replayLimit": "1MiB" })]);
    assert_eq!((retry.attempts.value, retry.replay_limit.value), (5, 1 << 20));
    assert_eq!(retry.on.value.to_string(), "502, 503, 504, reset, timeout, unavailable");
}

#[test]
fn off_turns_retries_off_and_a_mapping_on_again_with_the_values_below() {
    let (retry, _) = layered(&[json!({ "attempts": 5 }), json!("off")]);
    assert!(!retry.enabled.value);
    assert_eq!(retry.enabled.origin.to_string(), "p.yaml:7");
    assert_eq!(retry, layered(&[json!({ "attempts": 5 }), json!(false)]).0);
    let (retry, _) = layered(&[json!({ "attempts": 5 }), json!("off"), json!({})]);
    assert!(retry.enabled.value);
    assert_eq!(retry.enabled.origin.to_string(), "p.yaml:7");
    assert_eq!(retry.attempts.value, 5);
}

#[test]
fn a_built_in_back_off_is_adjusted_and_a_written_one_is_reported() {
    let backoff = |value: Value| json!({ "backoff": value });
    let (retry, problems) = layered(&[backoff(json!({ "max": "10ms" }))]);
    assert_eq!((retry.backoff.base.value, problems.len()), (millis(10), 0));
    let (retry, problems) = layered(&[backoff(json!({ "base": "2s" }))]);
    assert_eq!((retry.backoff.max.value, problems.len()), (millis(2000), 0));
    let table = [
        (vec![json!({ "base": "2s", "max": "1s" })], "backoff.base: `base` 2s is longer than `max` 1s"),
        (vec![json!({ "max": "1s" }), json!({ "base": "2s" })], "at most 1s, or a longer `max`"),
        (vec![json!({ "base": "2s" }), json!({ "max": "1s" })], "at least 2s, or a shorter `base` here"),
    ];
    for (layers, wanted) in table {
        let layers: Vec<_> = layers.into_iter().map(backoff).collect();
        let (_, problems) = layered(&layers);
        assert!(problems.len() == 1 && problems[0].contains(wanted), "{problems:?}");
    }
}

#[test]
fn all_contradictions_are_reported_at_once() {
    let wrong = json!({
        "on": [503, "reset", 503],
        "backoff": { "base": "2s", "max": "1s" }, "budget": { "ratio": 0.5 },
    });
    let (_, problems) = layered(&[json!({}), json!({}), wrong]);
    let paths: Vec<_> = problems.iter().map(|problem| problem.split(':').next().unwrap()).collect();
    assert_eq!(paths, ["budget", "on[2]", "backoff.base"]);
    let (_, problems) = layered(&[json!({ "on": [] })]);
    assert!(problems[0].contains("or `retry: off`"), "{problems:?}");
}

#[test]
fn an_unreadable_value_comes_with_a_hint() {
    let table = [
        (json!(true), "`{}` switches it on"),
        (json!("on"), "`{}` switches it on"),
        (json!("of"), "write `off`"),
        (json!("OFF"), "write `off`"),
        (json!("none"), "write `off`"),
        (json!(3), "write `{ attempts: 3 }`"),
        (json!(0), "write `off`"),
        (json!({ "on": ["resets"] }), "did you mean `reset`?"),
        (json!({ "on": ["DEADLINE_EXCEEDED"] }), "did you mean `deadline_exceeded`?"),
        (json!({ "on": ["deadlineExceeded"] }), "did you mean `deadline_exceeded`?"),
        (json!({ "on": ["503"] }), "write `503` without quotes"),
        (json!({ "on": ["gateway-error"] }), "statuses from 400 to 599, reset, timeout, unavailable"),
        (json!({ "on": [302] }), "400 to 599"),
        (json!({ "on": [600] }), "400 to 599"),
        (json!({ "attempts": 0 }), "write a whole number from 1 to 10"),
        (json!({ "attempts": 11 }), "write a whole number from 1 to 10"),
        (json!({ "attempts": -1 }), "write a whole number from 1 to 10"),
        (json!({ "attempts": "3" }), "write `3` without quotes"),
        (json!({ "replayLimit": "5MiB" }), "write 0 to 4MiB"),
        (json!({ "backoff": { "base": "0ms" } }), "longer than zero"),
        (json!({ "budget": { "ratio": 0 } }), "above 0"),
        (json!({ "perTry": "1s" }), "perTry"),
    ];
    for (value, wanted) in table {
        let error = read(&value).expect_err(&value.to_string());
        assert!(error.contains(wanted), "{value}: {error}");
    }
}

#[test]
fn the_list_of_keys_is_that_of_the_fields() {
    let schema = SchemaGenerator::default().into_root_schema_for::<RetrySpec>();
    let mut known: Vec<_> = schema.get("properties").unwrap().as_object().unwrap().keys().cloned().collect();
    let mut told = RetrySpec::KEYS.to_vec();
    known.sort_unstable();
    told.sort_unstable();
    assert_eq!(known, told);
}
