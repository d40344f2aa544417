//! Deadline of a call: one time budget for the whole chain, and the two request fields that carry it from hop to hop.
//!
//! The budget is the smallest of the policy's timeout, the caller's field and the rest of the parent request's budget.
//! The value sent upstream is rounded down, so no hop passes on more time than it has. Sources: gRPC's
//! `PROTOCOL-HTTP2.md` for `grpc-timeout`, Envoy's router filter for `x-envoy-expected-rq-timeout-ms`.

use std::fmt;
use std::time::Duration;

use http::HeaderName;
use tokio::time::Instant;

/// `grpc-timeout`: the caller's timeout for the whole call.
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// `x-envoy-expected-rq-timeout-ms`: the same for HTTP, in milliseconds.
pub const EXPECTED_RQ_TIMEOUT_MS: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// Units of `grpc-timeout` in nanoseconds, finest first; each is a multiple of the one before.
const UNITS: [(char, u128); 6] = [
    ('n', 1),
    ('u', 1_000),
    ('m', 1_000_000),
    ('S', NANOS_PER_SECOND),
    ('M', 60 * NANOS_PER_SECOND),
    ('H', 3600 * NANOS_PER_SECOND),
];

/// Largest number in `grpc-timeout`: eight digits.
const MOST: u128 = 99_999_999;

/// A timeout field that cannot be parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MalformedDeadline {
    /// In `grpc-timeout`.
    #[error("`grpc-timeout` is not one to eight digits with a unit of H, M, S, m, u or n")]
    GrpcTimeout,
    /// In `x-envoy-expected-rq-timeout-ms`.
    #[error("`x-envoy-expected-rq-timeout-ms` is not a whole number of milliseconds")]
    ExpectedTimeout,
}

/// Parses `grpc-timeout`.
///
/// Zero is accepted although the grammar requires a positive number: clients send `0n` for a deadline that has passed,
/// and such a call is to be refused as late, not as malformed.
///
/// # Errors
/// Anything but one to eight digits and one unit.
pub fn parse_grpc_timeout(value: &[u8]) -> Result<Duration, MalformedDeadline> {
    let Some((&unit, digits)) = value.split_last().filter(|(_, digits)| digits.len() <= 8) else {
        return Err(MalformedDeadline::GrpcTimeout);
    };
    let number = whole_number(digits).ok_or(MalformedDeadline::GrpcTimeout)?;
    match unit {
        b'H' => Ok(Duration::from_secs(number * 3600)),
        b'M' => Ok(Duration::from_secs(number * 60)),
        b'S' => Ok(Duration::from_secs(number)),
        b'm' => Ok(Duration::from_millis(number)),
        b'u' => Ok(Duration::from_micros(number)),
        b'n' => Ok(Duration::from_nanos(number)),
        _ => Err(MalformedDeadline::GrpcTimeout),
    }
}

/// Formats `grpc-timeout`: as exact as eight digits allow, rounded down, in the largest unit without further loss.
///
/// Zero becomes `1n`, since the grammar has positive numbers only; do not send a call without time left.
pub fn format_grpc_timeout(left: Duration) -> String {
    let nanos = left.as_nanos().max(1);
    let finest = UNITS.iter().position(|(_, size)| nanos / size <= MOST).unwrap_or(UNITS.len() - 1);
    // Longer times than the largest value (11,000 years) are cut to it.
    let rounded = (nanos / UNITS[finest].1).min(MOST) * UNITS[finest].1;
    let exact = UNITS[finest..].iter().rev().find(|(_, size)| rounded.is_multiple_of(*size));
    let (unit, size) = exact.unwrap_or(&UNITS[finest]);
    format!("{}{unit}", rounded / size)
}

/// Parses `x-envoy-expected-rq-timeout-ms`; `None` for 0, which means "no timeout" in Envoy.
///
/// # Errors
/// Anything but digits, and a number beyond 64 bits.
pub fn parse_expected_rq_timeout_ms(value: &[u8]) -> Result<Option<Duration>, MalformedDeadline> {
    let millis = whole_number(value).ok_or(MalformedDeadline::ExpectedTimeout)?;
    Ok((millis > 0).then(|| Duration::from_millis(millis)))
}

/// Value of `x-envoy-expected-rq-timeout-ms`: whole milliseconds, rounded down, but at least 1, because 0 would mean
/// "no timeout".
pub fn expected_rq_timeout_ms(left: Duration) -> u64 {
    u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// ASCII digits only; `parse` alone would accept a `+`.
fn whole_number(digits: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(digits).ok()?;
    if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// Deadline of a call, and its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    /// The call is late from this instant on.
    pub at: Instant,
    /// Source of the deadline.
    pub from: DeadlineSource,
}

/// Source of a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeadlineSource {
    /// The policy's timeout.
    Policy,
    /// A field of the request.
    Caller,
    /// The parent request.
    Inbound,
}

impl Deadline {
    /// The earliest of the policy's timeout, the caller's field and the parent request's deadline; on a tie, the first
    /// in this order.
    ///
    /// A timeout beyond the range of the clock counts as none.
    pub fn earliest(now: Instant, policy: Duration, caller: Option<Duration>, inbound: Option<Instant>) -> Self {
        let after = |timeout: Duration| now.checked_add(timeout);
        let rest = [(caller.and_then(after), DeadlineSource::Caller), (inbound, DeadlineSource::Inbound)];
        let first = Self { at: after(policy).unwrap_or_else(|| far_from(now)), from: DeadlineSource::Policy };
        rest.into_iter()
            .filter_map(|(at, from)| Some(Self { at: at?, from }))
            .fold(first, |tightest, other| if other.at < tightest.at { other } else { tightest })
    }

    /// Time left at `now`; `None` from the deadline on.
    pub fn left(&self, now: Instant) -> Option<Duration> {
        self.at.checked_duration_since(now).filter(|left| !left.is_zero())
    }
}

/// A year from now, for a timeout beyond the range of the clock.
fn far_from(now: Instant) -> Instant {
    now.checked_add(Duration::from_secs(365 * 24 * 3600)).unwrap_or(now)
}

impl DeadlineSource {
    /// Words for a local reply: "the deadline of …".
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Policy => "the policy",
            Self::Caller => "the caller",
            Self::Inbound => "the inbound request",
        }
    }
}

impl fmt::Display for DeadlineSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The most that a hop keeps of the time for the way back.
pub const MOST_RESERVED: Duration = Duration::from_millis(10);

/// What a hop keeps of the time for the way back: a hundredth, 1 ms to [`MOST_RESERVED`].
pub fn reserve(left: Duration) -> Duration {
    (left / 100).clamp(Duration::from_millis(1), MOST_RESERVED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn each_unit_of_grpc_timeout_is_read() {
        let table: [(&[u8], Duration); 9] = [
            (b"1H", ms(3_600_000)),
            (b"2M", ms(120_000)),
            (b"3S", ms(3_000)),
            (b"4m", ms(4)),
            (b"5u", Duration::from_micros(5)),
            (b"6n", Duration::from_nanos(6)),
            (b"00000007S", ms(7_000)),
            (b"99999999H", Duration::from_secs(99_999_999 * 3600)),
            (b"0n", Duration::ZERO),
        ];
        for (value, expected) in table {
            assert_eq!(parse_grpc_timeout(value), Ok(expected), "{}", value.escape_ascii());
        }
    }

    #[test]
    fn anything_else_is_no_grpc_timeout() {
        let table: [&[u8]; 14] = [
            b"",
            b"S",
            b"10",
            b"1.5S",
            b"-1S",
            b"+1S",
            b"123456789n",
            b"5s",
            b"1h",
            b"1 S",
            b" 1S",
            b"1S ",
            b"1SS",
            b"\xff1S",
        ];
        for value in table {
            assert_eq!(parse_grpc_timeout(value), Err(MalformedDeadline::GrpcTimeout), "{}", value.escape_ascii());
        }
    }

    #[test]
    fn grpc_timeout_is_written_short_and_never_longer_than_what_is_left() {
        let table = [
            (Duration::ZERO, "1n"),
            (Duration::from_nanos(1), "1n"),
            (Duration::from_nanos(99_999_999), "99999999n"),
            (Duration::from_nanos(100_000_001), "100m"),
            (Duration::from_nanos(123_456_789), "123456u"),
            (ms(1), "1m"),
            (ms(1_500), "1500m"),
            (ms(2_000), "2S"),
            (ms(120_000), "2M"),
            (ms(7_200_000), "2H"),
            (ms(100_000_001), "100000S"),
            (Duration::MAX, "99999999H"),
        ];
        for (left, expected) in table {
            assert_eq!(format_grpc_timeout(left), expected, "{left:?}");
        }
    }

    #[test]
    fn expected_timeout_is_whole_milliseconds_and_zero_means_none() {
        assert_eq!(parse_expected_rq_timeout_ms(b"250"), Ok(Some(ms(250))));
        assert_eq!(parse_expected_rq_timeout_ms(b"0"), Ok(None));
        for value in [&b""[..], b"1.5", b"-1", b"+1", b"1s", b" 1", b"99999999999999999999", b"\xff"] {
            assert_eq!(parse_expected_rq_timeout_ms(value), Err(MalformedDeadline::ExpectedTimeout));
        }
        let table = [(ms(250), 250), (Duration::from_micros(1_999), 1), (Duration::ZERO, 1), (Duration::MAX, u64::MAX)];
        for (left, expected) in table {
            assert_eq!(expected_rq_timeout_ms(left), expected);
            assert!(parse_expected_rq_timeout_ms(expected.to_string().as_bytes()).is_ok());
        }
    }

    #[test]
    fn the_earliest_deadline_wins_and_names_its_source() {
        let now = Instant::now();
        let table = [
            (None, None, 800, DeadlineSource::Policy),
            (Some(300), None, 300, DeadlineSource::Caller),
            (Some(900), None, 800, DeadlineSource::Policy),
            (Some(300), Some(200), 200, DeadlineSource::Inbound),
            (Some(200), Some(300), 200, DeadlineSource::Caller),
            (Some(800), Some(800), 800, DeadlineSource::Policy),
            (Some(0), Some(100), 0, DeadlineSource::Caller),
        ];
        for (caller, inbound, at, from) in table {
            let inbound = inbound.map(|millis| now + ms(millis));
            let deadline = Deadline::earliest(now, ms(800), caller.map(ms), inbound);
            assert_eq!(deadline, Deadline { at: now + ms(at), from });
        }
        let endless = Deadline::earliest(now, Duration::MAX, Some(Duration::MAX), None);
        assert!(endless.left(now).is_some());
    }

    #[test]
    fn nothing_is_left_from_the_deadline_on() {
        let now = Instant::now();
        let deadline = Deadline::earliest(now, ms(100), None, None);
        assert_eq!(deadline.left(now + ms(60)), Some(ms(40)));
        assert_eq!(deadline.left(now + ms(100)), None);
        assert_eq!(deadline.left(now + ms(101)), None);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back_as_no_more_and_almost_all(secs in 0..u64::MAX / 2, nanos in 0..1_000_000_000u32, shift in 0..64u32) {
            let left = Duration::new(secs >> shift, nanos);
            let text = format_grpc_timeout(left);
            prop_assert!(text.len() <= 9, "{text}");
            let read = parse_grpc_timeout(text.as_bytes()).unwrap();
            prop_assert!(read <= left.max(Duration::from_nanos(1)));
            let longest = Duration::from_secs(99_999_999 * 3600);
            // A unit is at most 1000 of the finer one, so when the finer one does not fit, the number is at least
            // 99,999.
            prop_assert!(left >= longest || left - read.min(left) <= left / 99_999, "{left:?} became {text}");
        }

        #[test]
        fn no_value_makes_the_readers_fail(value in proptest::collection::vec(any::<u8>(), 0..12)) {
            let _ = parse_grpc_timeout(&value);
            let _ = parse_expected_rq_timeout_ms(&value);
        }
    }
}
