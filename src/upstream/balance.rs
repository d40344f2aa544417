//! Which endpoint gets the next request: power of two choices on peak EWMA.
//!
//! Two endpoints are drawn at random; the one with the smaller product of latency and calls in flight wins.
//! The latency is an exponentially decaying average that jumps up at once when an answer was slower (peak),
//! so a stalling endpoint is avoided after one slow answer and trusted again slowly. A failure counts as a slow
//! answer: an endpoint that refuses quickly must not look like an idle one.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// How long an old latency weighs: after this time it has lost 63 % of its weight.
const DECAY: Duration = Duration::from_secs(10);

/// What an endpoint without any answer yet is taken for. Small, so that new endpoints are tried soon.
const UNKNOWN_NANOS: f64 = 1_000_000.0;

/// What a failure counts as, at least.
const FAILURE: Duration = Duration::from_secs(1);

/// The load of one endpoint as one worker sees it.
pub struct Load {
    in_flight: Cell<u32>,
    nanos: Cell<f64>,
    at: Cell<Instant>,
}

impl Load {
    /// An endpoint that nobody has called yet.
    pub fn new(now: Instant) -> Self {
        Self { in_flight: Cell::new(0), nanos: Cell::new(UNKNOWN_NANOS), at: Cell::new(now) }
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
        let old = self.nanos.get();
        let new = if sample >= old {
            sample
        } else {
            let weight = self.weight(now);
            old.mul_add(weight, sample * (1.0 - weight))
        };
        self.nanos.set(new);
        self.at.set(now);
    }

    /// Notes that there was no answer, or one that says that the endpoint failed.
    pub fn failed(&self, took: Duration, now: Instant) {
        self.answered(took.max(FAILURE), now);
    }

    /// What one more call would cost here.
    fn cost(&self, now: Instant) -> f64 {
        let known = self.nanos.get() * self.weight(now);
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
    load: impl Fn(usize) -> &'a Load,
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

    fn draws(loads: &[Load], now: Instant) -> Vec<usize> {
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
        let load = Load::new(now);
        let mut random = fastrand::Rng::with_seed(1);
        assert_eq!(pick(1, |_| &load, &mut random, now), Some(0));
        assert_eq!(pick(0, |_| &load, &mut random, now), None);
    }

    #[test]
    fn equal_endpoints_share_and_a_slow_one_is_left_alone() {
        let now = Instant::now();
        let loads: Vec<_> = (0..3).map(|_| Load::new(now)).collect();
        assert!(draws(&loads, now).iter().all(|&n| n > 200), "{:?}", draws(&loads, now));
        for load in &loads {
            load.answered(Duration::from_millis(5), now);
        }
        loads[1].answered(Duration::from_millis(500), now);
        assert_eq!(draws(&loads, now)[1], 0);
    }

    #[test]
    fn a_failure_looks_slow_and_is_forgiven_with_time() {
        let now = Instant::now();
        let loads: Vec<_> = (0..2).map(|_| Load::new(now)).collect();
        for load in &loads {
            load.answered(Duration::from_millis(5), now);
        }
        loads[0].failed(Duration::from_micros(50), now);
        assert_eq!(draws(&loads, now)[0], 0);
        let later = now + DECAY * 7;
        loads[1].answered(Duration::from_millis(5), later);
        assert!(draws(&loads, later)[0] > 0);
    }

    #[test]
    fn calls_in_flight_make_an_endpoint_dearer() {
        let now = Instant::now();
        let loads: Vec<_> = (0..2).map(|_| Load::new(now)).collect();
        loads[0].begin();
        loads[0].begin();
        assert_eq!(draws(&loads, now), [0, 1000]);
        loads[0].finish();
        loads[0].finish();
        assert!(draws(&loads, now)[0] > 0);
    }
}
