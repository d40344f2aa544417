//! Which endpoint gets the next request: power of two choices on peak EWMA.
//!
//! Two endpoints are drawn at random; the one with the smaller product of latency and calls in flight wins.
//! The latency is an exponentially decaying average that jumps up at once when an answer was slower (peak),
//! so a stalling endpoint is avoided after one slow answer and trusted again slowly. A failure counts as a slower
//! answer than those before: an endpoint that refuses quickly must not look like an idle one. One failure may be the
//! request's fault and is soon forgotten; with the second one in a row the endpoint is left alone for most of a minute.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// How long an old latency weighs: after this time it has lost 63 % of its weight.
const DECAY: Duration = Duration::from_secs(10);

/// What an endpoint without any answer yet is taken for. Small, so that new endpoints are tried soon.
const UNKNOWN_NANOS: f64 = 1_000_000.0;

/// A single failure makes an endpoint look so many times as slow. Where the others stay as they are, that is forgotten
/// in about as long as an old latency weighs.
const WORSE: f64 = 3.0;

/// What a failure counts as, at least, behind another one.
const BAD_NANOS: f64 = 1_000_000_000.0;

/// What the first failure of an endpoint without any answer yet counts as: nothing says how fast it would be.
const FIRST_FAILURE_NANOS: f64 = 10_000_000.0;

/// The load of one endpoint as one worker sees it.
pub struct EndpointLoad {
    in_flight: Cell<u32>,
    /// `None`: there was no answer yet, nor a failure.
    nanos: Cell<Option<f64>>,
    at: Cell<Instant>,
    /// There was no answer since the last failure.
    is_failing: Cell<bool>,
}

impl EndpointLoad {
    /// An endpoint that nobody has called yet.
    pub fn new(now: Instant) -> Self {
        Self { in_flight: Cell::new(0), nanos: Cell::new(None), at: Cell::new(now), is_failing: Cell::new(false) }
    }

    /// Calls of this worker that are under way there.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    /// Notes that a call begins.
    pub fn begin(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
    }

    /// Notes that a call is over.
    pub fn finish(&self) {
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
    }

    /// Notes how long the answer took to begin.
    pub fn answered(&self, took: Duration, now: Instant) {
        let sample = took.as_nanos() as f64;
        let old = self.nanos.get().unwrap_or(UNKNOWN_NANOS);
        let new = if sample >= old {
            sample
        } else {
            let weight = self.weight(now);
            old.mul_add(weight, sample * (1.0 - weight))
        };
        self.is_failing.set(false);
        self.set(new, now);
    }

    /// Notes that there was no answer, or one that says that the endpoint failed.
    pub fn failed(&self, took: Duration, now: Instant) {
        let worse = match self.nanos.get() {
            Some(old) if self.is_failing.get() => old.max(BAD_NANOS),
            Some(old) => (old * WORSE).min(BAD_NANOS).max(old),
            None => FIRST_FAILURE_NANOS,
        };
        self.is_failing.set(true);
        self.set(worse.max(took.as_nanos() as f64), now);
    }

    fn set(&self, nanos: f64, now: Instant) {
        self.nanos.set(Some(nanos));
        self.at.set(now);
    }

    /// What one more call would cost here.
    fn cost(&self, now: Instant) -> f64 {
        let known = self.nanos.get().unwrap_or(UNKNOWN_NANOS) * self.weight(now);
        known.max(1.0) * f64::from(self.in_flight.get() + 1)
    }

    fn weight(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.at.get());
        (-age.as_secs_f64() / DECAY.as_secs_f64()).exp()
    }
}

/// The position of the better of two endpoints drawn at random; `None` if there are none.
pub fn pick<'a>(
    count: usize,
    load: impl Fn(usize) -> &'a EndpointLoad,
    random: &mut fastrand::Rng,
    now: Instant,
) -> Option<usize> {
    if count <= 1 {
        return count.checked_sub(1);
    }
    let first = random.usize(..count);
    // Draw from the others only, so that the two always differ.
    let second = (first + random.usize(1..count)) % count;
    let better = load(first).cost(now) <= load(second).cost(now);
    Some(if better { first } else { second })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(loads: &[EndpointLoad], now: Instant) -> Vec<usize> {
        let mut random = fastrand::Rng::with_seed(7);
        let mut seen = vec![0; loads.len()];
        for _ in 0..1000 {
            seen[pick(loads.len(), |i| &loads[i], &mut random, now).unwrap()] += 1;
        }
        seen
    }

    #[test]
    fn the_only_endpoint_is_taken_and_none_is_none() {
        let now = Instant::now();
        let load = EndpointLoad::new(now);
        let mut random = fastrand::Rng::with_seed(1);
        assert_eq!(pick(1, |_| &load, &mut random, now), Some(0));
        assert_eq!(pick(0, |_| &load, &mut random, now), None);
    }

    #[test]
    fn equal_endpoints_share_and_a_slow_one_is_left_alone() {
        let now = Instant::now();
        let loads: Vec<_> = (0..3).map(|_| EndpointLoad::new(now)).collect();
        assert!(draws(&loads, now).iter().all(|&n| n > 200), "{:?}", draws(&loads, now));
        for load in &loads {
            load.answered(Duration::from_millis(5), now);
        }
        loads[1].answered(Duration::from_millis(500), now);
        assert_eq!(draws(&loads, now)[1], 0);
    }

    #[test]
    fn a_single_failure_is_forgotten_in_about_ten_seconds() {
        for millis in [1, 5, 200] {
            let (now, usual) = (Instant::now(), Duration::from_millis(millis));
            let loads: Vec<_> = (0..2).map(|_| EndpointLoad::new(now)).collect();
            loads.iter().for_each(|load| load.answered(usual, now));
            loads[0].failed(Duration::from_micros(50), now);
            for (seconds, is_forgotten) in [(0, false), (5, false), (10, false), (12, true)] {
                let later = now + Duration::from_secs(seconds);
                loads[1].answered(usual, later);
                assert_eq!(draws(&loads, later)[0] > 0, is_forgotten, "{millis} ms, after {seconds} s");
            }
        }
    }

    #[test]
    fn a_second_failure_in_a_row_makes_an_endpoint_look_bad_and_none_makes_it_look_faster() {
        // What was known of it in milliseconds, how long each failure took, and what it looks like after each.
        let table: [(Option<u64>, u64, &[u64]); 6] = [
            (Some(5), 0, &[15, 1000, 1000]),
            (Some(400), 0, &[1000, 1000]),
            (Some(3000), 0, &[3000]),
            (Some(5), 80, &[80, 1000, 1000]),
            (Some(5), 2000, &[2000, 2000]),
            (None, 0, &[10, 1000, 1000]),
        ];
        for (known, took, looks) in table {
            let now = Instant::now();
            let load = EndpointLoad::new(now);
            if let Some(known) = known {
                load.answered(Duration::from_millis(known), now);
            }
            for millis in looks {
                load.failed(Duration::from_millis(took), now);
                assert_eq!(load.cost(now).round(), *millis as f64 * 1e6, "{known:?} {took}");
            }
        }
    }

    #[test]
    fn calls_in_flight_make_an_endpoint_dearer() {
        let now = Instant::now();
        let loads: Vec<_> = (0..2).map(|_| EndpointLoad::new(now)).collect();
        loads[0].begin();
        loads[0].begin();
        assert_eq!(draws(&loads, now), [0, 1000]);
        loads[0].finish();
        loads[0].finish();
        assert!(draws(&loads, now)[0] > 0);
    }
}
