//! The state machine behind `circuitBreaker` and `ejection`: closed, open, half-open, and what leads from one to the next.
//!
//! One breaker for all workers; it lives through reloads. What the policy says comes along with each call that asks to be
//! let in, so changed values hold from the next one on and nothing is forgotten. Invariants:
//! - only calls let in by the closed period that still lasts count towards opening it; whatever ends later decides nothing;
//! - only probes of the half-open period that still lasts end it; a probe that is dropped gives its place back;
//! - each change of state is handed out exactly once, to whoever caused it.
//!
//! While closed, letting a call in is one atomic load and a success a few relaxed ones. Refusing takes no lock either;
//! probes and changes of state do. It reads no clock and draws no random number: callers bring both.

mod spec;
mod state;
mod window;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

pub(in crate::rules) use self::spec::check_open_times;
pub use self::spec::{CircuitBreaker, CircuitBreakerSpec};
pub use self::state::{BreakerState, ChangeCause, StateChange};
use self::window::Window;

/// In [`Breaker::word`]: closed, and the rest of the word is the number of the period. Without it the word is the moment
/// from which on a probe may be let through, in nanoseconds since the breaker was made.
const CLOSED: u64 = 1 << 63;

/// What a breaker goes by; plain values of the policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    /// So many failures one after the other open it; at least 1.
    pub consecutive_failures: u32,
    /// The share of failures that opens it; None where only failures in a row count.
    pub rate: Option<RateThreshold>,
    /// The longest that the first opening lasts.
    pub open_for: Duration,
    /// The longest that any opening lasts.
    pub open_for_max: Duration,
    /// Probes under way at once; at least 1. One that has said nothing for [`Self::hold`] counts no more.
    pub probes: u32,
}

/// The longest that a probe which says nothing keeps others from being let through.
const LONGEST_HOLD: Duration = Duration::from_secs(5);

impl Thresholds {
    /// The same, but failures in a row open nothing.
    pub fn by_share_alone(self) -> Self {
        Self { consecutive_failures: u32::MAX, ..self }
    }

    /// How long a probe keeps its place at most: a stream may begin with a silence that lasts.
    pub fn hold(&self) -> Duration {
        self.open_for_max.min(LONGEST_HOLD).max(self.open_for)
    }
}

/// A share of failures over a while.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateThreshold {
    /// Above 0, up to 1.
    pub share: f64,
    /// How long the while is; it slides.
    pub window: Duration,
    /// With fewer calls the share says nothing.
    pub min_requests: u32,
}

/// How a call ended, as far as a breaker cares. What ended neither way is not recorded at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallResult {
    /// The callee answered as it should.
    Success,
    /// The callee failed.
    Failure,
}

/// The answer to a call that asks to be let through.
#[derive(Debug)]
pub enum Admission {
    /// Go on, and record how it ends.
    Admit(BreakerPermit),
    /// Go on, as one of the few that decide whether the breaker closes.
    Probe {
        /// The place among the probes.
        probe: Probe,
        /// The change to half-open, if this call caused it.
        change: Option<StateChange>,
    },
    /// Do not go on.
    Refuse {
        /// When it is worth asking again.
        retry_after: Duration,
    },
}

/// The right to count: the closed period in which a call was let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerPermit(u64);

/// A place among the probes; dropping it without a result gives it back.
#[derive(Debug)]
pub struct Probe {
    breaker: Arc<Breaker>,
    period: u64,
    /// When it was let through, in nanoseconds since the breaker was made.
    began: u64,
}

/// Whether an HTTP status says that the callee failed: 5xx, but for those that are about the request (501, 505).
pub const fn is_failed_status(status: u16) -> bool {
    status >= 500 && status != 501 && status != 505
}

/// Whether a gRPC code does: UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE, DATA_LOSS, and codes
/// that do not exist.
pub const fn is_failed_code(code: u32) -> bool {
    matches!(code, 2 | 4 | 8 | 13 | 14 | 15 | 17..)
}

/// A breaker.
#[derive(Debug)]
pub struct Breaker {
    /// What admission needs of `inner`; see [`CLOSED`]. Written under the lock only.
    word: AtomicU64,
    consecutive: AtomicU32,
    /// The share of failures was what opened it last, not failures in a row.
    by_rate: AtomicBool,
    born: Instant,
    inner: Mutex<Inner>,
    window: Window,
}

#[derive(Debug)]
struct Inner {
    state: BreakerState,
    /// Counts the changes of state.
    period: u64,
    /// When the state began, in nanoseconds since the breaker was made.
    since: u64,
    /// Until when it is open, likewise.
    until: u64,
    /// Openings in a row.
    openings: u32,
    /// Probes under way.
    probes: u32,
    /// When the last of them was let through, likewise.
    probed: u64,
    /// The open time was ended before it was over.
    hurried: bool,
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
            hurried: false,
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

    /// Lets a call through, as one of many or as a probe, or refuses it.
    pub fn admit(self: &Arc<Self>, thresholds: &Thresholds, now: Instant) -> Admission {
        let word = self.word.load(Acquire);
        if word & CLOSED != 0 {
            return Admission::Admit(BreakerPermit(word));
        }
        let tick = self.tick(now);
        match word.checked_sub(tick).map(Duration::from_nanos) {
            // Longer than the longest: the policy has become shorter since.
            Some(retry_after) if !retry_after.is_zero() && retry_after <= thresholds.open_for_max => {
                Admission::Refuse { retry_after }
            }
            _ => self.admit_shut(thresholds, now),
        }
    }

    /// Counts how a call that was let through has ended. A share of failures is judged when a failure comes in.
    ///
    /// `random` is from 0 to 1 and decides how long it opens, if it does.
    pub fn record(
        &self,
        pass: BreakerPermit,
        thresholds: &Thresholds,
        outcome: CallResult,
        now: Instant,
        random: f64,
    ) -> Option<StateChange> {
        let cause = self.note(pass, thresholds, outcome, now)?;
        self.open(pass, cause, thresholds, now, random)
    }

    /// What it does with calls now. An open time that is over counts as half-open, before the first probe as well.
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

    /// Whether a call would be let through as a probe now; one atomic load.
    pub fn is_due(&self, now: Instant) -> bool {
        let word = self.word.load(Acquire);
        word & CLOSED == 0 && self.tick(now) >= word
    }

    /// Whether it is closed; one atomic load.
    pub fn is_closed(&self) -> bool {
        self.word.load(Acquire) & CLOSED != 0
    }

    /// When it is worth asking again; None while it refuses nobody.
    pub fn retry_after(&self, now: Instant) -> Option<Duration> {
        let word = self.word.load(Acquire);
        let wait = word.checked_sub(self.tick(now)).filter(|_| word & CLOSED == 0);
        wait.filter(|wait| *wait > 0).map(Duration::from_nanos)
    }

    /// Failures one after the other so far.
    pub fn consecutive(&self) -> u32 {
        self.consecutive.load(Relaxed)
    }

    /// Whether the share of failures opened it, and not failures in a row. While it opens again and again because probes
    /// fail, what opened it first still holds.
    pub fn is_open_by_rate(&self) -> bool {
        self.by_rate.load(Relaxed)
    }

    /// Counts a result, and says why the breaker has to open, if it has.
    pub(in crate::rules) fn note(
        &self,
        pass: BreakerPermit,
        thresholds: &Thresholds,
        outcome: CallResult,
        now: Instant,
    ) -> Option<ChangeCause> {
        if self.word.load(Acquire) != pass.0 {
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

    /// Opens it, unless somebody else was faster.
    pub(in crate::rules) fn open(
        &self,
        pass: BreakerPermit,
        cause: ChangeCause,
        thresholds: &Thresholds,
        now: Instant,
        random: f64,
    ) -> Option<StateChange> {
        let mut inner = self.lock();
        if self.word.load(Acquire) != pass.0 {
            return None;
        }
        // It has been well for so long that what was before is another story.
        if self.tick(now).saturating_sub(inner.since) >= nanos(thresholds.open_for_max) {
            inner.openings = 0;
        }
        Some(self.shut(&mut inner, cause, thresholds, now, random))
    }

    /// Ends the open time at once: the next call is a probe. Nothing happens to one that is not open.
    pub(in crate::rules) fn hurry(&self, now: Instant) {
        let mut inner = self.lock();
        let tick = self.tick(now);
        if inner.state == BreakerState::Open && tick < inner.until {
            (inner.until, inner.hurried) = (tick, true);
            self.word.store(tick, Release);
        }
    }

    /// Closes it, whatever it was; None if it was closed.
    pub(in crate::rules) fn close(&self, cause: ChangeCause, now: Instant) -> Option<StateChange> {
        let mut inner = self.lock();
        (inner.state != BreakerState::Closed).then(|| self.let_in(&mut inner, cause, None, now))
    }

    /// Brings forward what is to come later than the policy allows now: its longest open time may have become shorter.
    pub(in crate::rules) fn limit(&self, longest: Duration, now: Instant) {
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

    fn admit_shut(self: &Arc<Self>, thresholds: &Thresholds, now: Instant) -> Admission {
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
                let cause = if inner.hurried { ChangeCause::NoOtherWell } else { ChangeCause::OpenTimeOver };
                change = Some(self.turn(&mut inner, BreakerState::HalfOpen, cause, thresholds.rate.as_ref(), now));
                self.word.store(0, Release);
            }
            BreakerState::HalfOpen => {}
        }
        // The second comes soon, in case the first met bad luck; those after it later, so that not all of them are
        // stuck when a callee that hangs comes back.
        let spacing = if inner.probes == 0 { thresholds.open_for / 4 } else { thresholds.hold() };
        // Between the look at the word and the lock, somebody else may have taken the turn.
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

    /// A probe has ended. Only the first that ends decides; the period of the others is over then.
    fn settle(
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
            CallResult::Success => self.let_in(&mut inner, ChangeCause::ProbeSucceeded, thresholds.rate.as_ref(), now),
            CallResult::Failure => {
                self.consecutive.fetch_add(1, Relaxed);
                let change = self.shut(&mut inner, ChangeCause::ProbeFailed, thresholds, now, random);
                let waited = Duration::from_nanos(self.tick(now).saturating_sub(probe.began));
                self.shorten(&mut inner, change, waited, thresholds.open_for / 4)
            }
        })
    }

    /// A probe has ended without a result. Once none is under way, the next need not wait.
    fn release(&self, period: u64) {
        let mut inner = self.lock();
        if inner.period != period {
            return;
        }
        inner.probes = inner.probes.saturating_sub(1);
        if inner.probes == 0 {
            self.word.store(0, Release);
        }
    }

    fn shut(
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
        // Written so that a number that is none is 0.
        let share = if random > 0.0 { random.min(1.0) } else { 0.0 };
        let doubled = thresholds.open_for.saturating_mul(1 << (inner.openings - 1).min(30));
        let open_for = doubled.min(thresholds.open_for_max).mul_f64(0.5 + share / 2.0);
        let change = self.turn(inner, BreakerState::Open, cause, thresholds.rate.as_ref(), now);
        inner.until = later(inner.since, open_for);
        self.word.store(inner.until, Release);
        StateChange { open_for: Some(open_for), ..change }
    }

    /// The time for which a probe was waited for counts as open: a callee that hangs is asked again soon after it has
    /// kept one waiting for as long as the breaker would stay open.
    fn shorten(&self, inner: &mut Inner, change: StateChange, waited: Duration, least: Duration) -> StateChange {
        let open_for = change.open_for.map(|whole| whole.saturating_sub(waited).max(least.min(whole)));
        inner.until = later(inner.since, open_for.unwrap_or_default());
        self.word.store(inner.until, Release);
        StateChange { open_for, ..change }
    }

    fn let_in(&self, inner: &mut Inner, cause: ChangeCause, rate: Option<&RateThreshold>, now: Instant) -> StateChange {
        let change = self.turn(inner, BreakerState::Closed, cause, rate, now);
        self.consecutive.store(0, Relaxed);
        self.window.clear();
        // Last, so that whoever sees the new period counts from nothing.
        self.word.store(CLOSED | inner.period, Release);
        change
    }

    fn turn(
        &self,
        inner: &mut Inner,
        to: BreakerState,
        cause: ChangeCause,
        rate: Option<&RateThreshold>,
        now: Instant,
    ) -> StateChange {
        let from = inner.state;
        (inner.state, inner.since, inner.probes, inner.hurried) = (to, self.tick(now), 0, false);
        inner.period += 1;
        let elapsed = now.saturating_duration_since(self.born);
        let (requests, failures) = rate.map_or((0, 0), |rate| self.window.sum(elapsed, rate.window));
        StateChange { from, to, cause, consecutive: self.consecutive(), failures, requests, open_for: None }
    }

    fn tick(&self, now: Instant) -> u64 {
        nanos(now.saturating_duration_since(self.born))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each critical section leaves plain numbers behind, whatever happens.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Probe {
    /// Says how the probe has ended: a success closes the breaker, a failure opens it again, for longer.
    ///
    /// None if another probe has decided already. `random` is from 0 to 1.
    pub fn record(
        self,
        thresholds: &Thresholds,
        outcome: CallResult,
        now: Instant,
        random: f64,
    ) -> Option<StateChange> {
        self.breaker.settle(&self, thresholds, outcome, now, random)
    }
}

impl Drop for Probe {
    /// After a result this does nothing: the period is over then.
    fn drop(&mut self) {
        self.breaker.release(self.period);
    }
}

/// Never reaches [`CLOSED`]: nobody runs for the 292 years that this takes.
fn later(tick: u64, duration: Duration) -> u64 {
    tick.saturating_add(nanos(duration)).min(CLOSED - 1)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).min(CLOSED - 1)
}

#[cfg(test)]
mod tests;
