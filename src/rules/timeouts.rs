//! Timeouts: how long a call may take, in all and in its parts. Each has a value; none can be switched off.
//!
//! Layers stand over each other: built in, `defaults`, destination, route. What one layer writes replaces that field
//! of the layer below and brings its own line along.

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
    /// Until a connection to the upstream stands, TLS included. Default 250ms.
    pub connect: Option<DurationSpec>,
    /// The whole call: all tries and waits together, to the end of the answer. Default 2s.
    pub request: Option<DurationSpec>,
    /// One try, within `request`. Default: as long as `request` allows.
    pub per_try: Option<DurationSpec>,
    /// No byte in either direction. Default 60s.
    pub idle: Option<DurationSpec>,
    /// The longest life of a stream, which `request` does not end. Default 1h.
    pub max_duration: Option<DurationSpec>,
}

/// The timeouts of a route, each with its value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Timeouts {
    /// Until a connection to the upstream stands, TLS included; never longer than `request`.
    pub connect: Sourced<Duration>,
    /// All tries and waits together.
    pub request: Sourced<Duration>,
    /// One try; never longer than `request`.
    pub per_try: Option<Sourced<Duration>>,
    /// No byte in either direction.
    pub idle: Sourced<Duration>,
    /// The longest life of a stream.
    pub max_duration: Sourced<Duration>,
}

impl Timeouts {
    /// What holds where no policy says otherwise.
    pub const fn built_in() -> Self {
        Self {
            connect: Sourced::built_in(Duration::from_millis(250)),
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

    /// Reports a part that is longer than the whole, in the layer that makes it so.
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
        // Who asks for 200ms in all must not be told about a 250ms that he never wrote.
        if timeouts.connect.origin == Origin::BuiltIn && timeouts.connect.value > timeouts.request.value {
            timeouts.connect = timeouts.request.clone();
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
                None => Row::none("perTry", "none: request holds"),
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
