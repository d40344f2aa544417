//! Rate limit: calls of a route per time, counted together, per caller, or per value of a header.
//!
//! The values of `rateLimit`, their check and their rows; `limiter` keeps the state. A route's limit replaces that of
//! its destination as a whole: a mixture of two limits would be a third one that is not in the file. There is no
//! built-in limit.

mod limiter;

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use http::header::{HOST, HeaderName};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

pub use self::limiter::{MOST_KEYS, RateLimitExceeded, RateLimitKey, RateLimiter};
use super::count::Count;
use super::duration::{self, DurationSpec};
use super::rule::{Row, RowContext, Rule};
use super::toggle::{Toggle, ToggleKeys};
use crate::problems::{Cursor, InvalidValue, Sourced, near_miss};

/// Longest time in which a burst may be restored (365 days); within it no sum of times overflows.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Shortest time between two calls. Times are whole nanoseconds; from 1 µs on, rounding is less than 0.1 %.
const SHORTEST: Duration = Duration::from_micros(1);

/// `rateLimit:` of a destination or of a route, as a mapping.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping with requests, per, burst and by"
)]
#[schemars(extend("required" = ["requests"]))]
pub struct RateLimitSpec {
    /// Calls per `per`, evenly spaced once the burst is used up. Required.
    pub requests: Option<Count<1>>,
    /// Default 1s.
    pub per: Option<DurationSpec>,
    /// Calls at once after a pause. Default: the same as `requests`.
    pub burst: Option<Count<1>>,
    /// Which calls are counted together: all calls of the `route`, those of one `caller` (its address), or those with
    /// the same value of a header, as in `header:x-api-key`. Default route.
    pub by: Option<CountBy>,
}

impl ToggleKeys for RateLimitSpec {
    const KEYS: &'static [&'static str] = &["requests", "per", "burst", "by"];

    // An empty mapping has no limit.
    const ON: &'static str = "a mapping like `{ requests: 100, per: 1s }`";
}

/// Checked rate limit of a route.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RateLimit {
    /// Calls per `per`; at least 1, at most one per microsecond.
    pub requests: Sourced<u32>,
    /// The time for `requests`.
    pub per: Sourced<Duration>,
    /// Calls at once; at least 1, restored within a year.
    pub burst: Sourced<u32>,
    /// Which calls are counted together.
    pub by: Sourced<CountBy>,
}

/// Which calls are counted together. Displays as in a policy.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CountBy {
    /// All calls of the route.
    Route,
    /// The calls of one address.
    Caller,
    /// The calls with the same value of this header; those without it together.
    Header(HeaderName),
}

impl Rule for RateLimit {
    type Spec = Toggle<RateLimitSpec>;

    /// The limit, or `None` without one, and the line of the entry.
    type Value = Sourced<Option<Self>>;

    const BUILT_IN: Sourced<Option<Self>> = Sourced::built_in(None);

    /// Replaces the layer below as a whole.
    ///
    /// Reports a missing `requests`, and numbers that cannot be kept exactly.
    fn check(spec: &Toggle<RateLimitSpec>, _: &Self::Value, at: &Cursor<'_>) -> Self::Value {
        match spec {
            Toggle::Off => at.set(None),
            Toggle::On(spec) => at.set(spec.check(at)),
        }
    }

    fn rows(limit: &Self::Value, _: &RowContext) -> Vec<Row> {
        let Some(values) = &limit.value else {
            return vec![Row::whole("none", &limit.origin)];
        };
        vec![
            Row::shown("requests", &values.requests),
            Row::time("per", &values.per),
            Row::shown("burst", &values.burst),
            Row::shown("by", &values.by),
        ]
    }
}

impl RateLimitSpec {
    fn check(&self, at: &Cursor<'_>) -> Option<RateLimit> {
        let Some(requests) = self.requests else {
            at.missing("requests", "write the calls per `per`, like `requests: 100`");
            return None;
        };
        let requests = at.key("requests").set(requests.0);
        let limit = RateLimit {
            per: self.per.map_or(Sourced::built_in(Duration::from_secs(1)), |span| at.key("per").set(span.0)),
            // The default is `requests`, and so is its line.
            burst: self.burst.map_or_else(|| requests.clone(), |n| at.key("burst").set(n.0)),
            by: self.by.clone().map_or(Sourced::built_in(CountBy::Route), |by| at.key("by").set(by)),
            requests,
        };
        report_too_fast(&limit, at);
        report_too_slow(&limit, self.burst.is_some(), at);
        Some(limit)
    }
}

fn report_too_fast(limit: &RateLimit, at: &Cursor<'_>) {
    let (requests, per) = (limit.requests.value, limit.per.value);
    if per < SHORTEST * requests {
        let most = per.as_micros();
        at.key("requests").report(
            format!("{requests} calls in {} is more than one per microsecond", duration::format(per)),
            format!("at most {most} here, or a longer `per`"),
        );
    }
}

fn report_too_slow(limit: &RateLimit, has_burst: bool, at: &Cursor<'_>) {
    let (requests, burst, per) = (limit.requests.value, limit.burst.value, limit.per.value);
    let most = LONGEST.as_nanos() * u128::from(requests) / per.as_nanos().max(1);
    if u128::from(burst) <= most {
        return;
    }
    let message = format!("a burst of {burst} takes more than a year to be restored");
    if has_burst && most > 0 {
        at.key("burst").report(message, format!("at most {most} here, or a shorter `per`"));
    } else {
        at.key("per").report(message, format!("write a shorter `per` than {}", duration::format(per)));
    }
}

impl CountBy {
    /// Parses `route`, `caller` or `header:NAME`.
    ///
    /// # Errors
    /// Anything else, with a hint what to write.
    pub fn parse(text: &str) -> Result<Self, InvalidValue> {
        match text {
            "route" => return Ok(Self::Route),
            "caller" => return Ok(Self::Caller),
            _ => {}
        }
        let refuse = |hint: String| Err(InvalidValue::new(format!("calls cannot be counted by `{text}`"), hint));
        let Some((word, name)) = text.split_once(':') else {
            return refuse(match near_miss(text, ["route", "caller", "header"]) {
                Some("header") => "name the header, like `header:x-api-key`".into(),
                Some(near) => format!("did you mean `{near}`?"),
                None if HeaderName::from_bytes(text.as_bytes()).is_ok() && text.contains('-') => {
                    format!("write `header:{text}`")
                }
                None => "write `route`, `caller`, or a header like `header:x-api-key`".into(),
            });
        };
        match HeaderName::from_bytes(name.trim().as_bytes()) {
            // HTTP/2 requests have no such field, so all of them would be counted together.
            Ok(HOST) => refuse("write the limit at the destination that has this host in `hosts`".into()),
            Ok(field) if word == "header" && name.trim() == name => Ok(Self::Header(field)),
            Ok(field) => refuse(format!("write `header:{field}`")),
            Err(_) => refuse("write a header's name after the colon, like `header:x-api-key`".into()),
        }
    }

    /// The key of a call. The address of a caller is that of its connection, not one from a header.
    pub fn key<'a>(&self, caller: IpAddr, header: impl FnOnce(&HeaderName) -> Option<&'a [u8]>) -> RateLimitKey<'a> {
        match self {
            Self::Route => RateLimitKey::Route,
            Self::Caller => RateLimitKey::Address(caller.to_canonical()),
            Self::Header(name) => RateLimitKey::Header(header(name)),
        }
    }
}

impl fmt::Display for CountBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Route => f.write_str("route"),
            Self::Caller => f.write_str("caller"),
            Self::Header(name) => write!(f, "header:{name}"),
        }
    }
}

impl<'de> Deserialize<'de> for CountBy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RateLimitByVisitor;
        impl Visitor<'_> for RateLimitByVisitor {
            type Value = CountBy;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`route`, `caller`, or a header like `header:x-api-key`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<CountBy, E> {
                CountBy::parse(text).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(RateLimitByVisitor)
    }
}

impl JsonSchema for CountBy {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "RateLimitBy".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(route|caller|header:[!#$%&'*+.^_`|~0-9A-Za-z-]+)$",
            "examples": ["route", "caller", "header:x-api-key"],
        })
    }
}

#[cfg(test)]
mod tests;
