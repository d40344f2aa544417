//! Load balancing: power of two choices on peak EWMA.
//!
//! `pool` calls it for every request. Two endpoints are drawn at random; the one with the smaller product of latency and
//! calls in flight wins. The latency is an exponentially decaying average that rises at once to a slower sample (peak), so a
//! stalling endpoint is avoided after one slow response and gets its calls back slowly. A failure counts as a slower response
//! than those before: an endpoint that fails quickly must not look fast. One failure may be the request's fault and is soon
//! forgotten; after a second one in a row the endpoint gets hardly any calls for most of a minute.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// Time constant of the average: a sample of this age has lost 63 % of its weight.
const DECAY: Duration = Duration::from_secs(10);

/// Latency assumed before the first response, 1 ms. Small, so that a new endpoint gets calls soon.
const INITIAL_NANOS: f64 = 1_000_000.0;

/// Factor by which a single failure raises the latency. Against endpoints whose latency stays the same, the effect is gone
/// after about [`DECAY`].
const FAILURE_FACTOR: f64 = 3.0;

/// Latency, at least, after two failures in a row, 1 s.
const REPEATED_FAILURE_NANOS: f64 = 1_000_000_000.0;

/// Latency after a failure before the first response, 10 ms: the usual latency is unknown.
const FIRST_FAILURE_NANOS: f64 = 10_000_000.0;

/// The load of one endpoint as one worker sees it.
pub struct EndpointLoad {
    in_flight: Cell<u32>,
    /// Latency in nanoseconds; `None` before the first response or failure.
    nanos: Cell<Option<f64>>,
    updated_at: Cell<Instant>,
    /// True from a failure until the next response.
    is_failing: Cell<bool>,
}

impl EndpointLoad {
    /// An endpoint without calls.
    pub fn new(now: Instant) -> Self {
        Self {
            in_flight: Cell::new(0),
            nanos: Cell::new(None),
            updated_at: Cell::new(now),
            is_failing: Cell::new(false),
        }
    }

    /// Calls of this worker in flight to the endpoint.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    /// The latency of the endpoint as load balancing counts it; 1 ms before the first response.
    pub fn latency(&self) -> Duration {
        Duration::from_nanos(self.nanos.get().unwrap_or(INITIAL_NANOS) as u64)
    }

    /// Counts a call that begins.
    pub fn begin(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
    }

    /// Counts a call that is over.
    pub fn finish(&self) {
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
    }

    /// Records a response whose head came after `took`.
    pub fn record_response(&self, took: Duration, now: Instant) {
        let sample = took.as_nanos() as f64;
        let old = self.nanos.get().unwrap_or(INITIAL_NANOS);
        let new = if sample >= old {
            sample
        } else {
            let weight = self.weight(now);
            old.mul_add(weight, sample * (1.0 - weight))
        };
        self.is_failing.set(false);
        self.set(new, now);
    }

    /// Records a failure after `took`: no response, or one that counts as a failure of the endpoint.
    pub fn record_failure(&self, took: Duration, now: Instant) {
        let raised = match self.nanos.get() {
            Some(old) if self.is_failing.get() => old.max(REPEATED_FAILURE_NANOS),
            Some(old) => (old * FAILURE_FACTOR).min(REPEATED_FAILURE_NANOS).max(old),
            None => FIRST_FAILURE_NANOS,
        };
        self.is_failing.set(true);
        self.set(raised.max(took.as_nanos() as f64), now);
    }

    fn set(&self, nanos: f64, now: Instant) {
        self.nanos.set(Some(nanos));
        self.updated_at.set(now);
    }

    /// The cost of one more call: decayed latency times calls in flight.
    fn cost(&self, now: Instant) -> f64 {
        let latency = self.nanos.get().unwrap_or(INITIAL_NANOS) * self.weight(now);
        latency.max(1.0) * f64::from(self.in_flight.get() + 1)
    }

    /// The weight that the average has kept since its last update, 1 to 0.
    fn weight(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.updated_at.get());
        (-age.as_secs_f64() / DECAY.as_secs_f64()).exp()
    }
}

/// The position of the cheaper of two endpoints drawn at random; `None` for `count` 0.
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
    // Drawn from the others only, so that the two always differ.
    let second = (first + random.usize(1..count)) % count;
    let is_first = load(first).cost(now) <= load(second).cost(now);
    Some(if is_first { first } else { second })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(loads: &[EndpointLoad], now: Instant) -> Vec<usize> {
        let mut random = fastrand::Rng::with_seed(7);
        let mut picks = vec![0; loads.len()];
        for _ in 0..1000 {
            picks[pick(loads.len(), |i| &loads[i], &mut random, now).unwrap()] += 1;
        }
        picks
    }

    #[test]
    fn a_single_endpoint_is_picked_and_none_without_endpoints() {
        let now = Instant::now();
        let load = EndpointLoad::new(now);
        let mut random = fastrand::Rng::with_seed(1);
        assert_eq!(pick(1, |_| &load, &mut random, now), Some(0));
        assert_eq!(pick(0, |_| &load, &mut random, now), None);
    }

    #[test]
    fn equal_endpoints_share_the_calls_and_a_slow_one_gets_none() {
        let now = Instant::now();
        let loads: Vec<_> = (0..3).map(|_| EndpointLoad::new(now)).collect();
        assert!(draws(&loads, now).iter().all(|&n| n > 200), "{:?}", draws(&loads, now));
        for load in &loads {
            load.record_response(Duration::from_millis(5), now);
        }
        loads[1].record_response(Duration::from_millis(500), now);
        assert_eq!(draws(&loads, now)[1], 0);
    }

    #[test]
    fn a_single_failure_is_forgotten_in_about_ten_seconds() {
        for millis in [1, 5, 200] {
            let (now, usual) = (Instant::now(), Duration::from_millis(millis));
            let loads: Vec<_> = (0..2).map(|_| EndpointLoad::new(now)).collect();
            loads.iter().for_each(|load| load.record_response(usual, now));
            loads[0].record_failure(Duration::from_micros(50), now);
            for (seconds, is_forgotten) in [(0, false), (5, false), (10, false), (12, true)] {
                let later = now + Duration::from_secs(seconds);
                loads[1].record_response(usual, later);
                assert_eq!(draws(&loads, later)[0] > 0, is_forgotten, "{millis} ms, after {seconds} s");
            }
        }
    }

    #[test]
    fn a_second_failure_in_a_row_counts_as_a_second_and_no_failure_lowers_the_latency() {
        // All in milliseconds: latency before, how long each failure took, latency after each failure.
        let table: [(Option<u64>, u64, &[u64]); 6] = [
            (Some(5), 0, &[15, 1000, 1000]),
            (Some(400), 0, &[1000, 1000]),
            (Some(3000), 0, &[3000]),
            (Some(5), 80, &[80, 1000, 1000]),
            (Some(5), 2000, &[2000, 2000]),
            (None, 0, &[10, 1000, 1000]),
        ];
        for (before, took, after) in table {
            let now = Instant::now();
            let load = EndpointLoad::new(now);
            if let Some(before) = before {
                load.record_response(Duration::from_millis(before), now);
            }
            for millis in after {
                load.record_failure(Duration::from_millis(took), now);
                assert_eq!(load.cost(now).round(), *millis as f64 * 1e6, "{before:?} {took}");
            }
        }
    }

    #[test]
    fn calls_in_flight_raise_the_cost() {
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
