//! Circuit breaker of a destination: the values of `circuitBreaker`, their check and their rows.
//!
//! The state machine is in `super`; `ejection` uses it too.

use std::hash::{Hash, Hasher};
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{GrpcFailures, RateThreshold, Thresholds};
use crate::problems::{Cursor, Origin, Sourced};
use crate::rules::count::Count;
use crate::rules::duration::{self, DurationSpec};
use crate::rules::faults::GrpcCode;
use crate::rules::ratio::Ratio;
use crate::rules::rule::{Row, RowContext, Rule};
use crate::rules::toggle::{Toggle, ToggleKeys};

/// `circuitBreaker:` of `defaults` or of a destination, as a mapping.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping of breaker values")]
pub struct CircuitBreakerSpec {
    /// Consecutive failures that open the circuit breaker. Default 5.
    pub consecutive_failures: Option<Count<1>>,
    /// Failure rate that opens the circuit breaker: failures per call within the window. Default 0.5.
    pub failure_rate: Option<Ratio>,
    /// Sliding window of the failure rate. Default 10s.
    pub window: Option<DurationSpec>,
    /// The failure rate is not judged with fewer calls than this in the window. Default 20.
    pub min_requests: Option<Count<1>>,
    /// Initial open time, with 50 % jitter (half to the whole of it). Default 250ms.
    pub open_for: Option<DurationSpec>,
    /// Longest open time: each consecutive opening doubles it, up to this. Default 1s.
    pub open_for_max: Option<DurationSpec>,
    /// Concurrent probes while half-open. Default 3.
    pub probes: Option<Count<1>>,
    /// gRPC codes that count as failures, here, for ejection and for load balancing. Default unknown, deadline_exceeded,
    /// internal, unavailable, data_loss.
    pub grpc_failures: Option<Vec<GrpcCode>>,
}

impl ToggleKeys for CircuitBreakerSpec {
    const KEYS: &'static [&'static str] = &[
        "consecutiveFailures",
        "failureRate",
        "window",
        "minRequests",
        "openFor",
        "openForMax",
        "probes",
        "grpcFailures",
    ];
}

/// Checked values of a destination's circuit breaker.
#[derive(Debug, Clone, PartialEq)]
pub struct CircuitBreaker {
    /// Whether the circuit breaker is on.
    pub on: Sourced<bool>,
    /// Consecutive failures that open it; at least 1.
    pub consecutive_failures: Sourced<u32>,
    /// Failure rate that opens it; above 0, at most 1.
    pub failure_rate: Sourced<f64>,
    /// Sliding window of the failure rate.
    pub window: Sourced<Duration>,
    /// Fewest calls in the window for which the failure rate is judged; at least 1.
    pub min_requests: Sourced<u32>,
    /// Initial open time before jitter; at most `open_for_max`.
    pub open_for: Sourced<Duration>,
    /// Longest open time.
    pub open_for_max: Sourced<Duration>,
    /// Concurrent probes while half-open; at least 1.
    pub probes: Sourced<u32>,
    /// gRPC codes that count as failures, also while the circuit breaker is off: ejection and load balancing use them too.
    pub grpc_failures: Sourced<GrpcFailures>,
}

impl Hash for CircuitBreaker {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { on, consecutive_failures, failure_rate, window, min_requests, open_for, open_for_max, .. } = self;
        let Self { probes, grpc_failures, .. } = self;
        (on, consecutive_failures, failure_rate.value.to_bits(), window).hash(state);
        (min_requests, open_for, open_for_max, probes, grpc_failures).hash(state);
    }
}

impl CircuitBreaker {
    /// The built-in values.
    pub const fn built_in() -> Self {
        Self {
            on: Sourced::built_in(true),
            consecutive_failures: Sourced::built_in(5),
            failure_rate: Sourced::built_in(0.5),
            window: Sourced::built_in(Duration::from_secs(10)),
            min_requests: Sourced::built_in(20),
            open_for: Sourced::built_in(Duration::from_millis(250)),
            open_for_max: Sourced::built_in(Duration::from_secs(1)),
            probes: Sourced::built_in(3),
            grpc_failures: Sourced::built_in(GrpcFailures::built_in()),
        }
    }

    /// Thresholds of the state machine; `None` if the circuit breaker is off.
    pub fn thresholds(&self) -> Option<Thresholds> {
        self.on.value.then_some(Thresholds {
            consecutive_failures: self.consecutive_failures.value,
            rate: Some(RateThreshold {
                share: self.failure_rate.value,
                window: self.window.value,
                min_requests: self.min_requests.value,
            }),
            open_for: self.open_for.value,
            open_for_max: self.open_for_max.value,
            probes: self.probes.value,
        })
    }
}

impl Rule for CircuitBreaker {
    type Spec = Toggle<CircuitBreakerSpec>;
    type Value = Self;

    const BUILT_IN: Self = Self::built_in();

    /// Reports an initial open time that is longer than the longest one.
    fn check(spec: &Toggle<CircuitBreakerSpec>, below: &Self, at: &Cursor<'_>) -> Self {
        let Toggle::On(spec) = spec else {
            return Self { on: at.set(false), ..below.clone() };
        };
        let count = |key: &str, spec: Option<Count<1>>, below: &Sourced<u32>| {
            spec.map_or_else(|| below.clone(), |count| at.key(key).set(count.0))
        };
        let first = (("openFor", spec.open_for), &below.open_for);
        let (open_for, open_for_max) =
            check_open_times(first, (("openForMax", spec.open_for_max), &below.open_for_max), at);
        Self {
            on: at.set(true),
            consecutive_failures: count("consecutiveFailures", spec.consecutive_failures, &below.consecutive_failures),
            failure_rate: spec
                .failure_rate
                .map_or_else(|| below.failure_rate.clone(), |ratio| at.key("failureRate").set(ratio.0)),
            window: spec.window.map_or_else(|| below.window.clone(), |span| at.key("window").set(span.0)),
            min_requests: count("minRequests", spec.min_requests, &below.min_requests),
            open_for,
            open_for_max,
            probes: count("probes", spec.probes, &below.probes),
            grpc_failures: spec
                .grpc_failures
                .as_ref()
                .map_or_else(|| below.grpc_failures.clone(), |list| GrpcFailures::check(list, &at.key("grpcFailures"))),
        }
    }

    fn rows(breaker: &Self, _: &RowContext) -> Vec<Row> {
        if !breaker.on.value {
            return vec![Row::whole("off", &breaker.on.origin)];
        }
        vec![
            Row::shown("consecutiveFailures", &breaker.consecutive_failures),
            Row::shown("failureRate", &breaker.failure_rate),
            Row::time("window", &breaker.window),
            Row::shown("minRequests", &breaker.min_requests),
            Row::time("openFor", &breaker.open_for),
            Row::time("openForMax", &breaker.open_for_max),
            Row::shown("probes", &breaker.probes),
            Row::shown("grpcFailures", &breaker.grpc_failures),
        ]
    }
}

/// One of the two open times of a layer: key and value in this layer, and the value of the layer below.
type OpenTime<'a> = ((&'static str, Option<DurationSpec>), &'a Sourced<Duration>);

/// Initial and longest open time of a layer, with the values of the layer below where this layer has none.
///
/// If a written value contradicts a built-in one, the built-in one is adjusted and stays built in, so that a layer
/// above gets no problem about a value that is not in the file. Two written values that contradict each other are
/// reported.
pub(in crate::rules) fn check_open_times(
    ((first_key, first), first_below): OpenTime<'_>,
    ((longest_key, longest), longest_below): OpenTime<'_>,
    at: &Cursor<'_>,
) -> (Sourced<Duration>, Sourced<Duration>) {
    let mut open_for = first.map_or_else(|| first_below.clone(), |span| at.key(first_key).set(span.0));
    let mut open_for_max = longest.map_or_else(|| longest_below.clone(), |span| at.key(longest_key).set(span.0));
    if open_for.value <= open_for_max.value {
        return (open_for, open_for_max);
    }
    let (long, short) = (duration::format(open_for.value), duration::format(open_for_max.value));
    if open_for_max.origin == Origin::BuiltIn {
        open_for_max.value = open_for.value;
    } else if open_for.origin == Origin::BuiltIn {
        open_for.value = open_for_max.value;
    } else if first.is_some() {
        let message = format!("`{first_key}` {long} is longer than `{longest_key}` {short} ({})", open_for_max.origin);
        at.key(first_key).report(message, format!("at most {short}, or a longer `{longest_key}`"));
    } else if longest.is_some() {
        let message = format!("`{longest_key}` {short} is shorter than `{first_key}` {long} ({})", open_for.origin);
        at.key(longest_key).report(message, format!("at least {long}, or a shorter `{first_key}` here"));
    }
    (open_for, open_for_max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problems::{ChildNode, DocumentNode, Position, Problems};
    use serde::de::{Deserializer, Visitor};
    use std::cell::RefCell;
    use std::sync::Arc;

    /// A mapping that has every key, in line 7.
    struct Anything(Position);

    impl DocumentNode for Anything {
        fn entry(&self, _: &str) -> Option<ChildNode<'_>> {
            Some(ChildNode { key: Some(&self.0), index: 0, spot: self })
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

    /// Visits with any value, as the reader of policies does; serde_json refuses all but a mapping for a struct.
    struct Offer(serde_json::Value);

    impl<'de> Deserializer<'de> for Offer {
        type Error = serde_json::Error;

        fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
            self.0.deserialize_any(visitor)
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
        }
    }

    fn checked(json: serde_json::Value, base: &CircuitBreaker) -> (CircuitBreaker, Vec<String>) {
        let spec: Toggle<CircuitBreakerSpec> = Deserialize::deserialize(Offer(json)).unwrap();
        let (file, spot) = (Arc::from("p.yaml"), Anything(Position { span: 0..1, line: 7, column: 1 }));
        let problems = RefCell::new(Problems::default());
        let breaker = CircuitBreaker::check(&spec, base, &Cursor::root(&file, &spot, &problems));
        let messages = problems.borrow().iter().map(|p| format!("{}: {} / {:?}", p.path, p.message, p.hint)).collect();
        (breaker, messages)
    }

    #[test]
    fn off_switches_it_off_and_a_mapping_above_switches_it_on_again() {
        let base = CircuitBreaker::built_in();
        let (off, problems) = checked(serde_json::json!("off"), &base);
        assert!(problems.is_empty() && off.thresholds().is_none());
        assert_eq!(off.on.origin.to_string(), "p.yaml:7");
        let (on, _) = checked(serde_json::json!({}), &off);
        assert_eq!(on, base);
        let (on, _) = checked(serde_json::json!({ "probes": 1, "failureRate": 1 }), &off);
        let thresholds = on.thresholds().unwrap();
        assert_eq!((thresholds.probes, thresholds.consecutive_failures), (1, 5));
        assert_eq!(thresholds.rate.unwrap().share, 1.0);
    }

    #[test]
    fn false_is_what_some_tools_make_of_off() {
        assert!(checked(serde_json::json!(false), &CircuitBreaker::built_in()).0.thresholds().is_none());
    }

    #[test]
    fn anything_else_is_refused_with_what_to_write() {
        for (json, wanted) in [
            (serde_json::json!("on"), "`off`, or a mapping"),
            (serde_json::json!(true), "`{}` switches it on"),
            (serde_json::json!(3), "write `{ consecutiveFailures: 3 }`"),
            (serde_json::json!(0), "`{}` switches it on"),
            (serde_json::json!("none"), "write `off`"),
            (serde_json::json!({ "failureRate": 0 }), "above 0 and up to 1"),
            (serde_json::json!({ "failureRate": 1.01 }), "above 0 and up to 1"),
            (serde_json::json!({ "probes": 0 }), "whole number from 1"),
            (serde_json::json!({ "openfor": "1s" }), "unknown field"),
        ] {
            let error = Toggle::<CircuitBreakerSpec>::deserialize(Offer(json.clone())).unwrap_err().to_string();
            assert!(error.contains(wanted), "{json}: {error}");
        }
    }

    #[test]
    fn a_first_opening_longer_than_the_longest_is_reported_where_it_was_made_so() {
        let base = CircuitBreaker::built_in();
        let (both, problems) = checked(serde_json::json!({ "openFor": "2s", "openForMax": "1s" }), &base);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("openFor: `openFor` 2s is longer than `openForMax` 1s (p.yaml:7)"));
        assert!(problems[0].contains("at most 1s"), "{problems:?}");
        let (low, problems) = checked(serde_json::json!({ "openFor": "2s", "openForMax": "3s" }), &both);
        assert!(problems.is_empty());
        let (_, problems) = checked(serde_json::json!({ "openForMax": "1s" }), &low);
        assert!(problems[0].starts_with("openForMax: `openForMax` 1s is shorter"), "{problems:?}");
        // Said in the layer that made it so, not again in each layer above.
        let (_, problems) = checked(serde_json::json!({ "probes": 2 }), &both);
        assert!(problems.is_empty());
    }

    #[test]
    fn a_built_in_open_time_gives_way_to_a_written_one() {
        let base = CircuitBreaker::built_in();
        let (long, problems) = checked(serde_json::json!({ "openFor": "5s" }), &base);
        assert!(problems.is_empty());
        assert_eq!(long.open_for_max.value, Duration::from_secs(5));
        let (longer, problems) = checked(serde_json::json!({ "openFor": "9s" }), &long);
        assert!(problems.is_empty());
        assert_eq!(longer.open_for_max.value, Duration::from_secs(9));
        let (short, problems) = checked(serde_json::json!({ "openForMax": "100ms" }), &base);
        assert!(problems.is_empty());
        assert_eq!(short.open_for.value, Duration::from_millis(100));
    }

    #[test]
    fn the_list_of_keys_is_that_of_the_fields() {
        let schema = schemars::schema_for!(CircuitBreakerSpec).to_value();
        let mut fields: Vec<_> = schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
        let mut keys = CircuitBreakerSpec::KEYS.to_vec();
        fields.sort_unstable();
        keys.sort_unstable();
        assert_eq!(fields, keys);
    }

    #[test]
    fn a_changed_rate_changes_the_hash() {
        let hash = |breaker: &CircuitBreaker| {
            let mut hasher = std::hash::DefaultHasher::new();
            breaker.hash(&mut hasher);
            hasher.finish()
        };
        let base = CircuitBreaker::built_in();
        let (other, _) = checked(serde_json::json!({ "failureRate": 0.4 }), &base);
        assert_ne!(hash(&base), hash(&other));
        assert_eq!(hash(&base), hash(&checked(serde_json::json!({}), &base).0));
    }
}
