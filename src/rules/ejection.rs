//! Ejection: an endpoint that keeps failing gets no calls for a while, while others of its destination go on.
//!
//! The shape, the check, the checked value, and the group of a destination's endpoints; each has a breaker of its own.
//! One group per destination, shared by all workers; it lives through reloads. Invariant: of the members present, at
//! least one is in. The last one is never ejected (what calls for that is told once per streak of failures), and when
//! all others go away, one is taken back.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;
use tokio::time::Instant;

use super::breaker::{Admission, Breaker, Cause, Change, Outcome, Pass, State, Thresholds};
use super::circuit_breaker::check_open_times;
use super::duration::Span;
use super::limits::Count;
use super::switch::{Keys, Switch};
use crate::problems::{At, Set};

/// An endpoint is asked with one call; a second one goes only when that has hung for a quarter of `openFor`.
const PROBES: u32 = 2;

/// `ejection:` of `defaults` or of a destination, where it is not `off`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping of ejection values")]
pub struct EjectionSpec {
    /// So many failures one after the other eject an endpoint. Default 5.
    pub consecutive_failures: Option<Count<1>>,
    /// How long it is out the first time; half to the whole of it, by chance. Default 5s.
    pub open_for: Option<Span>,
    /// The longest time out: each ejection in a row doubles the one before, up to this. Default 60s.
    pub open_for_max: Option<Span>,
}

impl Keys for EjectionSpec {
    const KEYS: &'static [&'static str] = &["consecutiveFailures", "openFor", "openForMax"];
}

/// When endpoints of a destination are ejected, and for how long.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ejection {
    /// Whether any is.
    pub on: Set<bool>,
    /// So many failures one after the other eject an endpoint; at least 1.
    pub consecutive_failures: Set<u32>,
    /// The longest that it is out the first time; never longer than `open_for_max`.
    pub open_for: Set<Duration>,
    /// The longest that it is out.
    pub open_for_max: Set<Duration>,
}

impl Ejection {
    /// What holds where no policy says otherwise.
    pub const fn built_in() -> Self {
        Self {
            on: Set::built_in(true),
            consecutive_failures: Set::built_in(5),
            open_for: Set::built_in(Duration::from_secs(5)),
            open_for_max: Set::built_in(Duration::from_secs(60)),
        }
    }

    /// The values as the state machine takes them; None when it is off, and then nobody is to be asked whether he is out.
    pub fn thresholds(&self) -> Option<Thresholds> {
        self.on.value.then_some(Thresholds {
            consecutive_failures: self.consecutive_failures.value,
            rate: None,
            open_for: self.open_for.value,
            open_for_max: self.open_for_max.value,
            probes: PROBES,
        })
    }
}

impl Switch<EjectionSpec> {
    /// Lays this layer over another. Reports a first ejection that is longer than the longest.
    pub fn check(&self, base: &Ejection, at: &At<'_>) -> Ejection {
        let Self::On(spec) = self else {
            return Ejection { on: at.set(false), ..base.clone() };
        };
        let (open_for, open_for_max) =
            check_open_times((spec.open_for, spec.open_for_max), (&base.open_for, &base.open_for_max), at);
        Ejection {
            on: at.set(true),
            consecutive_failures: spec
                .consecutive_failures
                .map_or_else(|| base.consecutive_failures.clone(), |count| at.key("consecutiveFailures").set(count.0)),
            open_for,
            open_for_max,
        }
    }
}

/// The endpoints of one destination.
#[derive(Debug)]
pub struct Group {
    born: Instant,
    present: Mutex<Vec<Arc<Member>>>,
    kept: AtomicU64,
}

/// One endpoint.
#[derive(Debug)]
pub struct Member {
    address: SocketAddr,
    breaker: Arc<Breaker>,
    /// Whether it was told already that this one stays in although it fails.
    is_kept: AtomicBool,
    group: Weak<Group>,
}

/// What a failure of an endpoint led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It was ejected.
    Ejected(Change),
    /// It would have been, were it not the last one in. Told once, until it answers again or is ejected after all.
    Kept {
        /// Failures one after the other.
        consecutive: u32,
    },
}

impl Group {
    /// A group without members.
    pub fn new(now: Instant) -> Arc<Self> {
        Arc::new(Self { born: now, present: Mutex::new(Vec::new()), kept: AtomicU64::new(0) })
    }

    /// The member at an address; a new one is in. Takes a lock: to be asked when addresses change, not for each call.
    pub fn member(self: &Arc<Self>, address: SocketAddr) -> Arc<Member> {
        let mut present = self.present();
        if let Some(member) = present.iter().find(|member| member.address == address) {
            return Arc::clone(member);
        }
        let member = Arc::new(Member {
            address,
            breaker: Breaker::new(self.born),
            is_kept: AtomicBool::new(false),
            group: Arc::downgrade(self),
        });
        present.push(Arc::clone(&member));
        member
    }

    /// Forgets all members but these. When all that are left are out, takes back the one whose time is over first.
    pub fn retain(&self, addresses: &[SocketAddr], now: Instant) -> Option<(Arc<Member>, Change)> {
        let mut present = self.present();
        present.retain(|member| addresses.contains(&member.address));
        if present.iter().any(|member| member.breaker.is_closed()) {
            return None;
        }
        let first = present.iter().min_by_key(|member| member.breaker.retry_after(now))?;
        let change = first.breaker.close(Cause::NoOtherLeft, now)?;
        Some((Arc::clone(first), change))
    }

    /// The members, for the status page.
    pub fn members(&self) -> Vec<Arc<Member>> {
        self.present().clone()
    }

    /// How many streaks of failures ejected nobody, because there was no other member in.
    pub fn kept(&self) -> u64 {
        self.kept.load(Relaxed)
    }

    fn present(&self) -> MutexGuard<'_, Vec<Arc<Member>>> {
        // Each critical section leaves a whole list behind, whatever happens.
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether it is to get no call now; one atomic load.
    pub fn is_out(&self, now: Instant) -> bool {
        self.breaker.is_shut(now)
    }

    /// Whether its time is over and it waits for a call that tries it; one atomic load.
    pub fn is_due(&self, now: Instant) -> bool {
        self.breaker.is_due(now)
    }

    /// Closed is in, open is out, half-open is being tried.
    pub fn state(&self, now: Instant) -> State {
        self.breaker.state(now)
    }

    /// How long it stays out from now on, unless it is tried and fails; None while it is not out.
    pub fn out_for(&self, now: Instant) -> Option<Duration> {
        self.breaker.retry_after(now)
    }

    /// Failures one after the other so far.
    pub fn consecutive(&self) -> u32 {
        self.breaker.consecutive()
    }

    /// Lets a call go to it, as one of many or as the one that tries it. Refuses also when another call was quicker to try
    /// it: pick another member then.
    pub fn admit(&self, thresholds: &Thresholds, now: Instant) -> Admission {
        self.breaker.admit(thresholds, now)
    }

    /// Counts how a call that was let through has ended. A member that was forgotten meanwhile is never ejected.
    ///
    /// `random` is from 0 to 1 and decides how long it is out, if it is ejected.
    pub fn record(
        &self,
        pass: Pass,
        thresholds: &Thresholds,
        outcome: Outcome,
        now: Instant,
        random: f64,
    ) -> Option<Event> {
        let cause = self.breaker.note(pass, thresholds, outcome, now);
        if outcome == Outcome::Success && self.is_kept.load(Relaxed) {
            self.is_kept.store(false, Relaxed);
        }
        let (cause, group) = (cause?, self.group.upgrade()?);
        // Nobody else is ejected while this lock is held, so whoever is in stays in.
        let present = group.present();
        let is_me = |member: &Arc<Self>| std::ptr::eq(Arc::as_ptr(member), self);
        if !present.iter().any(is_me) {
            return None;
        }
        if present.iter().any(|member| !is_me(member) && member.breaker.is_closed()) {
            let change = self.breaker.open(pass, cause, thresholds, now, random)?;
            self.is_kept.store(false, Relaxed);
            return Some(Event::Ejected(change));
        }
        if self.is_kept.swap(true, Relaxed) {
            return None;
        }
        group.kept.fetch_add(1, Relaxed);
        Some(Event::Kept { consecutive: self.breaker.consecutive() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: Thresholds = Thresholds {
        consecutive_failures: 2,
        rate: None,
        open_for: Duration::from_secs(5),
        open_for_max: Duration::from_secs(60),
        probes: PROBES,
    };

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 80))
    }

    fn group(now: Instant, size: u8) -> (Arc<Group>, Vec<Arc<Member>>) {
        let group = Group::new(now);
        let members = (0..size).map(|last| group.member(address(last))).collect();
        (group, members)
    }

    fn call(member: &Member, outcome: Outcome, now: Instant) -> Option<Event> {
        match member.admit(&TWO, now) {
            Admission::Pass(pass) => member.record(pass, &TWO, outcome, now, 1.0),
            other => panic!("no pass: {other:?}"),
        }
    }

    fn eject(member: &Member, now: Instant) -> Change {
        assert_eq!(call(member, Outcome::Failure, now), None);
        match call(member, Outcome::Failure, now) {
            Some(Event::Ejected(change)) => change,
            other => panic!("not ejected: {other:?}"),
        }
    }

    #[test]
    fn an_address_is_always_the_same_member() {
        let (group, members) = group(Instant::now(), 2);
        assert!(Arc::ptr_eq(&group.member(address(1)), &members[1]));
        assert_eq!(group.members().len(), 2);
        assert_eq!(members[1].address(), address(1));
    }

    #[test]
    fn failures_in_a_row_eject_and_a_probe_brings_back() {
        let start = Instant::now();
        let (_group, members) = group(start, 2);
        assert_eq!(call(&members[0], Outcome::Failure, start), None);
        assert_eq!(call(&members[0], Outcome::Success, start), None);
        let change = eject(&members[0], start);
        assert_eq!((change.consecutive, change.open_for), (2, Some(TWO.open_for)));
        assert!(members[0].is_out(start) && !members[0].is_due(start) && !members[1].is_out(start));
        assert_eq!(members[0].out_for(start), Some(TWO.open_for));
        let later = start + TWO.open_for;
        assert!(!members[0].is_out(later) && members[0].is_due(later));
        let Admission::Probe { probe, change } = members[0].admit(&TWO, later) else { panic!("no probe") };
        assert_eq!(change.unwrap().cause, Cause::OpenTimeOver);
        assert!(members[0].is_out(later), "one call tries it, not all");
        let change = probe.record(&TWO, Outcome::Failure, later, 1.0).unwrap();
        assert_eq!((change.cause, change.open_for), (Cause::ProbeFailed, Some(TWO.open_for * 2)));
        let later = later + TWO.open_for * 2;
        let Admission::Probe { probe, .. } = members[0].admit(&TWO, later) else { panic!("no probe") };
        assert_eq!(probe.record(&TWO, Outcome::Success, later, 1.0).unwrap().to, State::Closed);
        assert_eq!(members[0].state(later), State::Closed);
    }

    #[test]
    fn the_last_one_stays_in_and_that_is_told_once_per_streak() {
        let start = Instant::now();
        let (group, members) = group(start, 2);
        eject(&members[0], start);
        for round in 1..=3 {
            assert_eq!(call(&members[1], Outcome::Failure, start), None);
            assert_eq!(call(&members[1], Outcome::Failure, start), Some(Event::Kept { consecutive: 2 }));
            assert_eq!(call(&members[1], Outcome::Failure, start), None);
            assert_eq!(group.kept(), round);
            assert_eq!(call(&members[1], Outcome::Success, start), None);
        }
        assert_eq!(members[1].state(start), State::Closed);
    }

    #[test]
    fn the_last_one_is_ejected_as_soon_as_another_is_back() {
        let start = Instant::now();
        let (_group, members) = group(start, 2);
        eject(&members[0], start);
        for _ in 0..9 {
            call(&members[1], Outcome::Failure, start);
        }
        let later = start + TWO.open_for;
        let Admission::Probe { probe, .. } = members[0].admit(&TWO, later) else { panic!("no probe") };
        assert_eq!(call(&members[1], Outcome::Failure, later), None, "one that is being tried is not in");
        probe.record(&TWO, Outcome::Success, later, 1.0).unwrap();
        let Some(Event::Ejected(change)) = call(&members[1], Outcome::Failure, later) else { panic!("not ejected") };
        assert_eq!(change.consecutive, 11);
    }

    #[test]
    fn a_forgotten_member_is_never_ejected_and_counts_for_nobody() {
        let start = Instant::now();
        let (group, members) = group(start, 2);
        assert!(group.retain(&[address(1), address(7)], start).is_none());
        for _ in 0..5 {
            assert_eq!(call(&members[0], Outcome::Failure, start), None);
        }
        assert_eq!(call(&members[1], Outcome::Failure, start), None);
        assert_eq!(call(&members[1], Outcome::Failure, start), Some(Event::Kept { consecutive: 2 }));
        drop(group);
        assert_eq!(call(&members[1], Outcome::Failure, start), None);
    }

    #[test]
    fn when_all_others_go_away_the_one_that_is_out_is_taken_back() {
        let start = Instant::now();
        let (group, members) = group(start, 3);
        eject(&members[0], start);
        eject(&members[1], start + Duration::from_secs(1));
        let (back, change) = group.retain(&[address(0), address(1)], start + Duration::from_secs(2)).unwrap();
        assert_eq!((back.address(), change.cause, change.to), (address(0), Cause::NoOtherLeft, State::Closed));
        assert_eq!(change.cause.as_str(), "no_other_left");
        assert!(group.retain(&[], start).is_none());
    }

    #[test]
    fn whatever_happens_one_is_in() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut now = Instant::now();
            let (group, _) = group(now, 4);
            for _ in 0..400 {
                now += Duration::from_millis(random.u64(0..2_000));
                let members = group.members();
                let member = &members[random.usize(..members.len())];
                let outcome = if random.u8(..4) == 0 { Outcome::Success } else { Outcome::Failure };
                match member.admit(&TWO, now) {
                    Admission::Pass(pass) => drop(member.record(pass, &TWO, outcome, now, random.f64())),
                    Admission::Probe { probe, .. } if random.bool() => {
                        probe.record(&TWO, outcome, now, random.f64());
                    }
                    Admission::Probe { .. } => {}
                    Admission::Refuse { .. } => assert!(member.is_out(now), "seed {seed}"),
                }
                if random.u8(..20) == 0 {
                    let left: Vec<_> =
                        group.members().iter().map(|one| one.address()).filter(|_| random.bool()).collect();
                    if !left.is_empty() {
                        group.retain(&left, now);
                    }
                }
                if random.u8(..40) == 0 {
                    group.member(address(random.u8(..4)));
                }
                assert!(group.members().iter().any(|one| one.state(now) == State::Closed), "seed {seed}");
            }
        }
    }

    #[test]
    fn the_list_of_keys_is_that_of_the_fields() {
        let schema = schemars::schema_for!(EjectionSpec).to_value();
        let mut fields: Vec<_> = schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
        let mut keys = EjectionSpec::KEYS.to_vec();
        fields.sort_unstable();
        keys.sort_unstable();
        assert_eq!(fields, keys);
    }
}
