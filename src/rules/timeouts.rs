//! Timeouts of a call and of its phases. Each has a value; none can be switched off.
//!
//! Layers: built in, `defaults`, destination, route. A layer replaces the fields that it contains, and each value keeps
//! the line that it comes from.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::duration::{self, DurationSpec};
use super::rule::{Row, RowContext, Rule};
use crate::problems::{Cursor, Origin, Sourced};

/// `timeouts:` of `defaults`, of a destination or of a route.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping of timeouts")]
pub struct TimeoutsSpec {
    /// The wait for a connection to the upstream, including TLS. Default 2s.
    pub connect: Option<DurationSpec>,
    /// The whole call with all attempts and waits, to the end of the response. Default 2s.
    pub request: Option<DurationSpec>,
    /// One attempt, within `request`. Default: as long as `request` allows.
    pub per_try: Option<DurationSpec>,
    /// No byte in either direction. Default 60s.
    pub idle: Option<DurationSpec>,
    /// Longest life of a stream, instead of `request`. Default 1h.
    pub max_duration: Option<DurationSpec>,
}

/// Checked timeouts of a route.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Timeouts {
    /// The wait for a connection to the upstream, including TLS; at most `request`.
    pub connect: Sourced<Duration>,
    /// The whole call with all attempts and waits.
    pub request: Sourced<Duration>,
    /// One attempt; at most `request`.
    pub per_try: Option<Sourced<Duration>>,
    /// No byte in either direction.
    pub idle: Sourced<Duration>,
    /// Longest life of a stream.
    pub max_duration: Sourced<Duration>,
}

impl Timeouts {
    /// The built-in values.
    pub const fn built_in() -> Self {
        Self {
            connect: Sourced::built_in(Duration::from_secs(2)),
            request: Sourced::built_in(Duration::from_secs(2)),
            per_try: None,
            idle: Sourced::built_in(Duration::from_secs(60)),
            max_duration: Sourced::built_in(Duration::from_secs(3600)),
        }
    }
}

impl Rule for Timeouts {
    type Spec = TimeoutsSpec;
    type Value = Self;

    const BUILT_IN: Self = Self::built_in();
    const IS_SHOWN_EVERYWHERE: bool = true;

    /// Reports `connect` or `perTry` longer than `request`, in the layer that causes it.
    fn check(spec: &TimeoutsSpec, below: &Self, at: &Cursor<'_>) -> Self {
        let over = |key: &str, spec: Option<DurationSpec>, below: &Sourced<Duration>| {
            spec.map_or_else(|| below.clone(), |span| at.key(key).set(span.0))
        };
        let mut timeouts = Self {
            connect: over("connect", spec.connect, &below.connect),
            request: over("request", spec.request, &below.request),
            per_try: spec.per_try.map(|span| at.key("perTry").set(span.0)).or_else(|| below.per_try.clone()),
            idle: over("idle", spec.idle, &below.idle),
            max_duration: over("maxDuration", spec.max_duration, &below.max_duration),
        };
        // A shorter `request` must not be an error because of a built-in `connect` that is not in the file. The origin stays:
        // the next layer may have another `request`.
        if timeouts.connect.origin == Origin::BuiltIn {
            timeouts.connect.value = Self::BUILT_IN.connect.value.min(timeouts.request.value);
        }
        let request_is_new = spec.request.is_some();
        if spec.connect.is_some() || request_is_new {
            report_longer(at, "connect", spec.connect.is_some(), &timeouts.connect, &timeouts.request);
        }
        if let Some(per_try) = timeouts.per_try.as_ref().filter(|_| spec.per_try.is_some() || request_is_new) {
            report_longer(at, "perTry", spec.per_try.is_some(), per_try, &timeouts.request);
        }
        timeouts
    }

    fn rows(timeouts: &Self, _: &RowContext) -> Vec<Row> {
        vec![
            Row::time("connect", &timeouts.connect),
            Row::time("request", &timeouts.request),
            match &timeouts.per_try {
                Some(per_try) => Row::time("perTry", per_try),
                None => Row::none("perTry", "none: request applies"),
            },
            Row::time("idle", &timeouts.idle),
            Row::time("maxDuration", &timeouts.max_duration),
        ]
    }
}

fn report_longer(
    at: &Cursor<'_>,
    part: &str,
    part_is_here: bool,
    value: &Sourced<Duration>,
    request: &Sourced<Duration>,
) {
    if value.value <= request.value {
        return;
    }
    let (long, short) = (duration::format(value.value), duration::format(request.value));
    if part_is_here {
        let message = format!("`{part}` {long} is longer than `request` {short} ({})", request.origin);
        at.key(part).report(message, format!("at most {short}, or a longer `request`"));
    } else {
        let message = format!("`request` {short} is shorter than `{part}` {long} ({})", value.origin);
        at.key("request").report(message, format!("at least {long}, or a shorter `{part}` here"));
    }
}
