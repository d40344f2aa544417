//! State machine of `circuitBreaker` and `ejection`: the states closed, open and half-open, and the transitions between
//! them.
//!
//! One breaker for all workers; it survives reloads. Each call passes the current thresholds, so a changed value
//! applies from the next call on and no state is lost. Invariants:
//! - only calls admitted in the current closed period count towards opening; results that arrive after it are ignored;
//! - only probes of the current half-open period end it; a probe dropped without a result frees its slot;
//! - each change of state is returned exactly once, to the call that caused it.
//!
//! While closed, admission is one atomic load and a success a few relaxed ones. A refusal takes no lock either; probes
//! and changes of state do. The breaker reads no clock and draws no random number: callers pass both.

mod grpc_failures;
mod spec;
mod state;
mod window;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

pub use self::grpc_failures::GrpcFailures;
pub(in crate::rules) use self::spec::check_open_times;
pub use self::spec::{CircuitBreaker, CircuitBreakerSpec};
pub use self::state::{BreakerState, ChangeCause, StateChange};
use self::window::Window;

/// Bit of [`Breaker::word`]: the breaker is closed and the other bits are the number of the period. Without the bit,
/// the word is the earliest time of the next probe, in nanoseconds since the breaker was created.
const CLOSED: u64 = 1 << 63;

/// Thresholds of a breaker, as plain values of the policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    /// Consecutive failures that open the breaker; at least 1.
    pub consecutive_failures: u32,
    /// Failure rate that opens the breaker; `None` if only consecutive failures count.
    pub rate: Option<RateThreshold>,
    /// Upper bound of the first open time.
    pub open_for: Duration,
    /// Upper bound of every open time.
    pub open_for_max: Duration,
    /// Concurrent probes; at least 1. A probe without a result stops counting after [`Self::hold`].
    pub probes: u32,
}

/// Upper bound of [`Thresholds::hold`].
const LONGEST_HOLD: Duration = Duration::from_secs(5);

impl Thresholds {
    /// The same thresholds without the limit on consecutive failures.
    pub fn by_share_alone(self) -> Self {
        Self { consecutive_failures: u32::MAX, ..self }
    }

    /// How long a probe without a result occupies its slot: `open_for_max`, at most 5 s, at least `open_for`. A probe
    /// that became a stream may stay silent for long.
    pub fn hold(&self) -> Duration {
        self.open_for_max.min(LONGEST_HOLD).max(self.open_for)
    }
}

/// Failure rate over a sliding window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateThreshold {
    /// Failures per call; above 0, at most 1.
    pub share: f64,
    /// Length of the sliding window.
    pub window: Duration,
    /// The rate is not judged with fewer calls than this in the window.
    pub min_requests: u32,
}

/// How a call ended, as a breaker counts it. Calls that are neither are not recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallResult {
    /// The upstream answered without a failure.
    Success,
    /// The upstream failed.
    Failure,
}

/// Decision about one call.
#[derive(Debug)]
pub enum Admission {
    /// Send the call and record its result.
    Admit(BreakerPermit),
    /// Send the call; its result decides whether the breaker closes.
    Probe {
        /// The slot among the probes.
        probe: Probe,
        /// The change to half-open, if this call caused it.
        change: Option<StateChange>,
    },
    /// Refuse the call.
    Refuse {
        /// Time until the next call can be admitted.
        retry_after: Duration,
    },
}

/// Permit of an admitted call: the closed period in which its result counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerPermit(u64);

/// One open period of a breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenPeriod(u64);

/// A slot among the probes; dropping it without a result frees the slot.
#[derive(Debug)]
pub struct Probe {
    breaker: Arc<Breaker>,
    period: u64,
    /// Time of admission, in nanoseconds since the breaker was created.
    began: u64,
}

/// Whether an HTTP status counts as a failure of the upstream: 5xx except 501 and 505, which are about the request.
pub const fn is_failed_status(status: u16) -> bool {
    status >= 500 && status != 501 && status != 505
}

/// Circuit breaker of one destination, dynamic host or endpoint.
#[derive(Debug)]
pub struct Breaker {
    /// The part of `inner` that admission reads; see [`CLOSED`]. Written only under the lock.
    word: AtomicU64,
    consecutive: AtomicU32,
    /// The failure rate opened the breaker last, not consecutive failures.
    by_rate: AtomicBool,
    born: Instant,
    inner: Mutex<Inner>,
    window: Window,
}

#[derive(Debug)]
struct Inner {
    state: BreakerState,
    /// Number of changes of state so far.
    period: u64,
    /// Start of the state, in nanoseconds since the breaker was created.
    since: u64,
    /// End of the open time, in nanoseconds since the breaker was created.
    until: u64,
    /// Consecutive openings.
    openings: u32,
    /// Probes in flight.
    probes: u32,
    /// Admission of the last probe, in nanoseconds since the breaker was created.
    probed: u64,
    /// The open time was ended early.
    ended_early: bool,
}

impl Breaker {
    /// A closed breaker.
    pub fn new(now: Instant) -> Arc<Self> {
        let inner = Inner {
            state: BreakerState::Closed,
            period: 0,
            since: 0,
            until: 0,
            openings: 0,
            probes: 0,
            probed: 0,
            ended_early: false,
        };
        Arc::new(Self {
            word: AtomicU64::new(CLOSED),
            consecutive: AtomicU32::new(0),
            by_rate: AtomicBool::new(false),
            born: now,
            inner: Mutex::new(inner),
            window: Window::default(),
        })
    }

    /// Admits the call, normally or as a probe, or refuses it.
    pub fn admit(self: &Arc<Self>, thresholds: &Thresholds, now: Instant) -> Admission {
        let word = self.word.load(Acquire);
        if word & CLOSED != 0 {
            return Admission::Admit(BreakerPermit(word));
        }
        let tick = self.tick(now);
        match word.checked_sub(tick).map(Duration::from_nanos) {
            // Longer than the longest open time: a reload has shortened `open_for_max`.
            Some(retry_after) if !retry_after.is_zero() && retry_after <= thresholds.open_for_max => {
                Admission::Refuse { retry_after }
            }
            _ => self.admit_probe(thresholds, now),
        }
    }

    /// Records the result of an admitted call. The failure rate is judged when a failure arrives.
    ///
    /// `random`, from 0 to 1, gives the jitter of the open time.
    pub fn record(
        &self,
        permit: BreakerPermit,
        thresholds: &Thresholds,
        outcome: CallResult,
        now: Instant,
        random: f64,
    ) -> Option<StateChange> {
        let cause = self.count_result(permit, thresholds, outcome, now)?;
        self.open(permit, cause, thresholds, now, random)
    }

    /// The state now. After the open time it is half-open, even before the first probe.
    pub fn state(&self, now: Instant) -> BreakerState {
        let inner = self.lock();
        if inner.state == BreakerState::Open && inner.until <= self.tick(now) {
            BreakerState::HalfOpen
        } else {
            inner.state
        }
    }

    /// Whether a call would be refused now; one atomic load.
    pub fn is_shut(&self, now: Instant) -> bool {
        let word = self.word.load(Acquire);
        word & CLOSED == 0 && self.tick(now) < word
    }

    /// Whether a call would be admitted as a probe now; one atomic load.
    pub fn is_due(&self, now: Instant) -> bool {
        let word = self.word.load(Acquire);
        word & CLOSED == 0 && self.tick(now) >= word
    }

    /// Whether the breaker is closed; one atomic load.
    pub fn is_closed(&self) -> bool {
        self.word.load(Acquire) & CLOSED != 0
    }

    /// Time until the next call can be admitted; `None` if calls are admitted now.
    pub fn retry_after(&self, now: Instant) -> Option<Duration> {
        let word = self.word.load(Acquire);
        let wait = word.checked_sub(self.tick(now)).filter(|_| word & CLOSED == 0);
        wait.filter(|wait| *wait > 0).map(Duration::from_nanos)
    }

    /// Consecutive failures so far.
    pub fn consecutive(&self) -> u32 {
        self.consecutive.load(Relaxed)
    }

    /// Whether the failure rate opened the breaker, and not consecutive failures. Failed probes do not change this.
    pub fn is_open_by_rate(&self) -> bool {
        self.by_rate.load(Relaxed)
    }

    /// Counts a result; returns the cause if the breaker has to open.
    pub(in crate::rules) fn count_result(
        &self,
        permit: BreakerPermit,
        thresholds: &Thresholds,
        outcome: CallResult,
        now: Instant,
    ) -> Option<ChangeCause> {
        if self.word.load(Acquire) != permit.0 {
            return None;
        }
        let elapsed = now.saturating_duration_since(self.born);
        if let Some(rate) = &thresholds.rate {
            self.window.add(outcome == CallResult::Failure, elapsed, rate.window);
        }
        if outcome == CallResult::Success {
            if self.consecutive.load(Relaxed) != 0 {
                self.consecutive.store(0, Relaxed);
            }
            return None;
        }
        let consecutive = self.consecutive.fetch_add(1, Relaxed).saturating_add(1);
        if consecutive >= thresholds.consecutive_failures {
            return Some(ChangeCause::ConsecutiveFailures);
        }
        let rate = thresholds.rate.as_ref()?;
        let (requests, failures) = self.window.sum(elapsed, rate.window);
        let is_reached = requests >= rate.min_requests && f64::from(failures) >= rate.share * f64::from(requests);
        is_reached.then_some(ChangeCause::FailureRate)
    }

    /// Opens the breaker, unless another call has ended the period already.
    pub(in crate::rules) fn open(
        &self,
        permit: BreakerPermit,
        cause: ChangeCause,
        thresholds: &Thresholds,
        now: Instant,
        random: f64,
    ) -> Option<StateChange> {
        let mut inner = self.lock();
        if self.word.load(Acquire) != permit.0 {
            return None;
        }
        // Closed for `open_for_max`: the doubling of the open time starts again.
        if self.tick(now).saturating_sub(inner.since) >= nanos(thresholds.open_for_max) {
            inner.openings = 0;
        }
        Some(self.enter_open(&mut inner, cause, thresholds, now, random))
    }

    /// Ends the open time now, so that the next call is a probe. No effect in other states.
    pub(in crate::rules) fn end_open_time_early(&self, now: Instant) {
        let mut inner = self.lock();
        let tick = self.tick(now);
        if inner.state == BreakerState::Open && tick < inner.until {
            (inner.until, inner.ended_early) = (tick, true);
            self.word.store(tick, Release);
        }
    }

    /// The open period now; `None` unless the breaker is open.
    pub fn open_period(&self) -> Option<OpenPeriod> {
        let inner = self.lock();
        (inner.state == BreakerState::Open).then_some(OpenPeriod(inner.period))
    }

    /// Closes the breaker before its open time is over: the upstream, which had accepted no connection, accepts them again.
    /// `None` if this open period is over already.
    pub fn end_open_period(&self, opened: OpenPeriod, now: Instant) -> Option<StateChange> {
        let mut inner = self.lock();
        let is_current = inner.state == BreakerState::Open && inner.period == opened.0;
        is_current.then(|| self.enter_closed(&mut inner, ChangeCause::Reachable, None, now))
    }

    /// Closes the breaker from any state; `None` if it was closed.
    pub(in crate::rules) fn close(&self, cause: ChangeCause, now: Instant) -> Option<StateChange> {
        let mut inner = self.lock();
        (inner.state != BreakerState::Closed).then(|| self.enter_closed(&mut inner, cause, None, now))
    }

    /// Applies a shorter `open_for_max` of a reload to the times already set.
    pub(in crate::rules) fn apply_longest_open_time(&self, longest: Duration, now: Instant) {
        self.bring_forward(&mut self.lock(), longest, self.tick(now));
    }

    fn bring_forward(&self, inner: &mut Inner, longest: Duration, tick: u64) {
        let next = match inner.state {
            BreakerState::Closed => return,
            BreakerState::Open => {
                inner.until = inner.until.min(inner.since.saturating_add(nanos(longest)));
                inner.until
            }
            BreakerState::HalfOpen => self.word.load(Acquire).min(later(tick, longest)),
        };
        self.word.store(next, Release);
    }

    fn admit_probe(self: &Arc<Self>, thresholds: &Thresholds, now: Instant) -> Admission {
        let tick = self.tick(now);
        let mut inner = self.lock();
        let mut change = None;
        self.bring_forward(&mut inner, thresholds.open_for_max, tick);
        match inner.state {
            BreakerState::Closed => return Admission::Admit(BreakerPermit(CLOSED | inner.period)),
            BreakerState::Open => {
                if let Some(wait) = inner.until.checked_sub(tick).filter(|wait| *wait > 0) {
                    return Admission::Refuse { retry_after: Duration::from_nanos(wait) };
                }
                let cause = if inner.ended_early { ChangeCause::NoOtherWell } else { ChangeCause::OpenTimeOver };
                change =
                    Some(self.change_state(&mut inner, BreakerState::HalfOpen, cause, thresholds.rate.as_ref(), now));
                self.word.store(0, Release);
            }
            BreakerState::HalfOpen => {}
        }
        // The second probe follows soon, in case the first one failed by chance; further ones later, so that not all of
        // them hang with an upstream that recovers.
        let spacing = if inner.probes == 0 { thresholds.open_for / 4 } else { thresholds.hold() };
        // Another call may have become the probe between the load of the word and the lock.
        if let Some(wait) = self.word.load(Acquire).checked_sub(tick).filter(|wait| *wait > 0) {
            return Admission::Refuse { retry_after: Duration::from_nanos(wait) };
        }
        if inner.probes >= thresholds.probes {
            let free = later(inner.probed, thresholds.hold());
            if let Some(wait) = free.checked_sub(tick).filter(|wait| *wait > 0) {
                self.word.store(free, Release);
                return Admission::Refuse { retry_after: Duration::from_nanos(wait) };
            }
        }
        self.word.store(later(tick, spacing), Release);
        inner.probed = tick;
        inner.probes = inner.probes.saturating_add(1);
        Admission::Probe { probe: Probe { breaker: Arc::clone(self), period: inner.period, began: tick }, change }
    }

    /// Applies the result of a probe. The first result decides and ends the period; later ones are ignored.
    fn apply_probe_result(
        &self,
        probe: &Probe,
        thresholds: &Thresholds,
        outcome: CallResult,
        now: Instant,
        random: f64,
    ) -> Option<StateChange> {
        let mut inner = self.lock();
        if inner.period != probe.period {
            return None;
        }
        Some(match outcome {
            CallResult::Success => {
                self.enter_closed(&mut inner, ChangeCause::ProbeSucceeded, thresholds.rate.as_ref(), now)
            }
            CallResult::Failure => {
                self.consecutive.fetch_add(1, Relaxed);
                let change = self.enter_open(&mut inner, ChangeCause::ProbeFailed, thresholds, now, random);
                let waited = Duration::from_nanos(self.tick(now).saturating_sub(probe.began));
                self.subtract_wait(&mut inner, change, waited, thresholds.open_for / 4)
            }
        })
    }

    /// Frees the slot of a probe without a result. With no probe in flight, the next one is admitted at once.
    fn free_probe_slot(&self, period: u64) {
        let mut inner = self.lock();
        if inner.period != period {
            return;
        }
        inner.probes = inner.probes.saturating_sub(1);
        if inner.probes == 0 {
            self.word.store(0, Release);
        }
    }

    fn enter_open(
        &self,
        inner: &mut Inner,
        cause: ChangeCause,
        thresholds: &Thresholds,
        now: Instant,
        random: f64,
    ) -> StateChange {
        inner.openings = inner.openings.saturating_add(1);
        if cause != ChangeCause::ProbeFailed {
            self.by_rate.store(cause == ChangeCause::FailureRate, Relaxed);
        }
        // Written so that NaN becomes 0.
        let share = if random > 0.0 { random.min(1.0) } else { 0.0 };
        let doubled = thresholds.open_for.saturating_mul(1 << (inner.openings - 1).min(30));
        let open_for = doubled.min(thresholds.open_for_max).mul_f64(0.5 + share / 2.0);
        let change = self.change_state(inner, BreakerState::Open, cause, thresholds.rate.as_ref(), now);
        inner.until = later(inner.since, open_for);
        self.word.store(inner.until, Release);
        StateChange { open_for: Some(open_for), ..change }
    }

    /// Counts the time spent waiting for the probe as open time: an upstream that hangs gets its next probe soon after
    /// a probe has waited as long as the breaker would stay open.
    fn subtract_wait(&self, inner: &mut Inner, change: StateChange, waited: Duration, least: Duration) -> StateChange {
        let open_for = change.open_for.map(|whole| whole.saturating_sub(waited).max(least.min(whole)));
        inner.until = later(inner.since, open_for.unwrap_or_default());
        self.word.store(inner.until, Release);
        StateChange { open_for, ..change }
    }

    fn enter_closed(
        &self,
        inner: &mut Inner,
        cause: ChangeCause,
        rate: Option<&RateThreshold>,
        now: Instant,
    ) -> StateChange {
        let change = self.change_state(inner, BreakerState::Closed, cause, rate, now);
        self.consecutive.store(0, Relaxed);
        self.window.clear();
        // Stored last: a call that reads the new period counts from zero.
        self.word.store(CLOSED | inner.period, Release);
        change
    }

    fn change_state(
        &self,
        inner: &mut Inner,
        to: BreakerState,
        cause: ChangeCause,
        rate: Option<&RateThreshold>,
        now: Instant,
    ) -> StateChange {
        let from = inner.state;
        (inner.state, inner.since, inner.probes, inner.ended_early) = (to, self.tick(now), 0, false);
        inner.period += 1;
        let elapsed = now.saturating_duration_since(self.born);
        let (requests, failures) = rate.map_or((0, 0), |rate| self.window.sum(elapsed, rate.window));
        StateChange { from, to, cause, consecutive: self.consecutive(), failures, requests, open_for: None }
    }

    fn tick(&self, now: Instant) -> u64 {
        nanos(now.saturating_duration_since(self.born))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each critical section leaves consistent numbers behind, even on a panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Probe {
    /// Records the result of the probe: a success closes the breaker, a failure opens it again with a doubled open
    /// time.
    ///
    /// `None` if another probe has decided already. `random` is from 0 to 1.
    pub fn record(
        self,
        thresholds: &Thresholds,
        outcome: CallResult,
        now: Instant,
        random: f64,
    ) -> Option<StateChange> {
        self.breaker.apply_probe_result(&self, thresholds, outcome, now, random)
    }
}

impl Drop for Probe {
    /// No effect after a recorded result: its period is over.
    fn drop(&mut self) {
        self.breaker.free_probe_slot(self.period);
    }
}

/// Never reaches [`CLOSED`], which is 292 years away.
fn later(tick: u64, duration: Duration) -> u64 {
    tick.saturating_add(nanos(duration)).min(CLOSED - 1)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).min(CLOSED - 1)
}

#[cfg(test)]
mod tests;
