//! What holds in every run, whatever goes wrong in it. None of this asks a rule: it counts along.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use hopguard::rules::circuit_breaker::{BreakerState, CallResult, StateChange, Thresholds};
use tokio::time::Instant;

/// What must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Invariant {
    /// Retries at a destination: at most 10 + minPerSecond × t + ratio × calls that went well.
    RetryBudget,
    /// No try begins after its deadline, and nothing ends later.
    Deadline,
    /// A breaker changes only as it may, opens when it has to, and holds back whom it should.
    Breaker,
    /// While half-open, no more than `probes` at once.
    Probes,
    /// Each request is answered exactly once.
    Answers,
    /// An endpoint whose ejection is over gets one of the next calls.
    Starved,
    /// One endpoint of each destination is in.
    LastOne,
    /// One call is tried again at one hop only.
    OnePlace,
    /// What may have been seen and is not idempotent is not sent again.
    Twice,
    /// A failure counts only where it happened.
    Blame,
    /// Soon after all is well, all calls go well.
    Recovery,
    /// No more calls at once than `limits.inFlight`, and all places are given back.
    Places,
}

/// What has been found in a run.
#[derive(Default)]
pub(crate) struct Checks {
    pub(crate) violations: RefCell<Vec<(Invariant, String)>>,
    tally: RefCell<BTreeMap<&'static str, u64>>,
    /// The last events, for whoever replays a seed.
    events: RefCell<VecDeque<String>>,
    is_told: bool,
}

/// So many violations are enough.
const ENOUGH: usize = 5;

/// So many events are told before the first violation.
const EVENTS: usize = 2000;

impl Checks {
    /// `is_told`: somebody wants to read what led to a violation.
    pub(crate) fn new(is_told: bool) -> Self {
        Self { is_told, ..Self::default() }
    }

    pub(crate) fn claim(&self, holds: bool, invariant: Invariant, otherwise: impl FnOnce() -> String) {
        if !holds && self.violations.borrow().len() < ENOUGH {
            let text = otherwise();
            self.event(|| format!("VIOLATION {invariant:?}: {text}"));
            self.violations.borrow_mut().push((invariant, text));
        }
    }

    pub(crate) fn count(&self, what: &'static str) {
        *self.tally.borrow_mut().entry(what).or_default() += 1;
    }

    pub(crate) fn tally(&self) -> BTreeMap<&'static str, u64> {
        self.tally.borrow().clone()
    }

    pub(crate) fn event(&self, text: impl FnOnce() -> String) {
        if self.is_told && self.violations.borrow().is_empty() {
            let mut events = self.events.borrow_mut();
            if events.len() == EVENTS {
                events.pop_front();
            }
            events.push_back(text());
        }
    }

    pub(crate) fn events(&self) -> Vec<String> {
        self.events.borrow().iter().cloned().collect()
    }
}

/// A second account of a breaker.
pub(crate) struct Watch {
    pub(crate) name: String,
    state: Cell<BreakerState>,
    /// Counts the changes of state.
    pub(crate) period: Cell<u64>,
    /// When those that are under way were let through.
    probes: RefCell<Vec<Instant>>,
    consecutive: Cell<u32>,
    /// Told that it stays in although it fails, being the last one.
    kept: Cell<bool>,
    opened: Cell<Option<(Instant, Duration)>>,
    /// Calls that went elsewhere since this one may be tried.
    pub(crate) passed_over: Cell<usize>,
}

/// A place among the probes, as this account sees it.
pub(crate) struct Place {
    watch: Rc<Watch>,
    period: u64,
    began: Instant,
}

impl Watch {
    pub(crate) fn new(name: String) -> Rc<Self> {
        Rc::new(Self {
            name,
            state: Cell::new(BreakerState::Closed),
            period: Cell::new(0),
            probes: RefCell::default(),
            consecutive: Cell::new(0),
            kept: Cell::new(false),
            opened: Cell::new(None),
            passed_over: Cell::new(0),
        })
    }

    pub(crate) fn state(&self) -> BreakerState {
        self.state.get()
    }

    /// Closed, so that a call passes as one of many.
    pub(crate) fn passes(&self, checks: &Checks) -> u64 {
        let state = self.state.get();
        checks.claim(state == BreakerState::Closed, Invariant::Breaker, || {
            format!("{} lets all pass: {state:?}", self.name)
        });
        self.period.get()
    }

    pub(crate) fn refuses(&self, checks: &Checks) {
        let state = self.state.get();
        checks.claim(state != BreakerState::Closed, Invariant::Breaker, || format!("{} refuses: {state:?}", self.name));
    }

    pub(crate) fn probes(self: &Rc<Self>, thresholds: &Thresholds, now: Instant, checks: &Checks) -> Place {
        let state = self.state.get();
        checks
            .claim(state == BreakerState::HalfOpen, Invariant::Breaker, || format!("{} probes: {state:?}", self.name));
        self.probes.borrow_mut().push(now);
        let holds = |began: &&Instant| **began + thresholds.hold() > now;
        let (held, most) = (self.probes.borrow().iter().filter(holds).count(), thresholds.probes as usize);
        checks.claim(held <= most, Invariant::Probes, || format!("{}: {held} probes, {most} allowed", self.name));
        self.passed_over.set(0);
        checks.count("probes");
        Place { watch: Rc::clone(self), period: self.period.get(), began: now }
    }

    /// Its open time was ended, because those that are in fail.
    pub(crate) fn hurried(&self, now: Instant) {
        self.opened.set(Some((now, Duration::ZERO)));
    }

    /// A call that passed has been judged; `opened`: that has opened the breaker, or would have, were it not the last.
    pub(crate) fn judged(&self, period: u64, outcome: CallResult, opened: bool, most: u32, checks: &Checks) {
        if period != self.period.get() {
            checks.claim(!opened, Invariant::Breaker, || format!("{} is opened by a call of long ago", self.name));
            return;
        }
        match outcome {
            CallResult::Success => {
                self.consecutive.set(0);
                self.kept.set(false);
            }
            CallResult::Failure => {
                let failures = self.consecutive.get() + 1;
                self.consecutive.set(failures);
                let is_due = failures >= most && !self.kept.get();
                checks.claim(!is_due || opened, Invariant::Breaker, || {
                    format!("{} stays closed after {failures} failures in a row", self.name)
                });
            }
        }
    }

    /// Told once per streak that it stays in, the last one may fail on.
    pub(crate) fn kept(&self, checks: &Checks) {
        self.kept.set(true);
        checks.count("kept");
    }

    pub(crate) fn changed(&self, change: &StateChange, thresholds: &Thresholds, now: Instant, checks: &Checks) {
        let state = self.state.get();
        let is_legal = matches!(
            (change.from, change.to),
            (BreakerState::Closed, BreakerState::Open)
                | (BreakerState::Open, BreakerState::HalfOpen)
                | (BreakerState::HalfOpen, BreakerState::Open | BreakerState::Closed)
        );
        checks.claim(is_legal && change.from == state, Invariant::Breaker, || {
            format!("{} goes from {:?} to {:?}, and was {state:?}", self.name, change.from, change.to)
        });
        if let (BreakerState::HalfOpen, Some((since, time))) = (change.to, self.opened.get()) {
            checks.claim(now >= since + time, Invariant::Breaker, || format!("{} is tried too early", self.name));
        }
        if change.to == BreakerState::Open {
            let time = change.open_for.unwrap_or_default();
            checks.claim(time <= thresholds.open_for_max && !time.is_zero(), Invariant::Starved, || {
                format!("{} is open for {time:?}", self.name)
            });
            self.opened.set(Some((now, time)));
        }
        self.state.set(change.to);
        self.period.set(self.period.get() + 1);
        self.probes.borrow_mut().clear();
        self.consecutive.set(0);
        self.kept.set(false);
        self.passed_over.set(0);
        checks.count(match change.to {
            BreakerState::Open => "opened",
            BreakerState::HalfOpen => "half-opened",
            BreakerState::Closed => "closed",
        });
        checks.event(|| format!("{} {:?} -> {:?} ({})", self.name, change.from, change.to, change.cause.as_str()));
    }

    /// The time for which it was to be open is over.
    pub(crate) fn is_due(&self, longest: Duration, now: Instant) -> bool {
        let over = |(since, time): (Instant, Duration)| now >= since + time.min(longest);
        self.state.get() == BreakerState::Open && self.opened.get().is_some_and(over)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.watch.period.get() == self.period {
            let mut probes = self.watch.probes.borrow_mut();
            if let Some(mine) = probes.iter().position(|began| *began == self.began) {
                probes.remove(mine);
            }
        }
    }
}

/// What a destination has got, as one sidecar sees it.
#[derive(Default)]
pub(crate) struct Got {
    pub(crate) calls: Cell<u64>,
    pub(crate) good: Cell<u64>,
    pub(crate) tries: Cell<u64>,
    /// Tries after the first that are not free.
    pub(crate) retries: Cell<u64>,
    /// Tries after the first that nobody had seen.
    pub(crate) unsent: Cell<u64>,
}
