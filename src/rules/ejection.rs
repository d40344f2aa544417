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

use super::circuit_breaker::check_open_times;
use super::circuit_breaker::{
    Admission, Breaker, BreakerPermit, BreakerState, CallResult, ChangeCause, StateChange, Thresholds,
};
use super::count::Count;
use super::duration::DurationSpec;
use super::rule::{Row, RowContext, Rule};
use super::toggle::{Toggle, ToggleKeys};
use crate::problems::{Cursor, InvalidValue, Sourced, old_word};

/// An endpoint is asked with one call; a second one goes only when that has hung for a quarter of `ejectFor`.
const PROBES: u32 = 2;

/// `ejection:` of `defaults` or of a destination, where it is not `off`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping of ejection values")]
pub struct EjectionSpec {
    /// So many failures one after the other eject an endpoint. Default 5.
    pub consecutive_failures: Option<Count<1>>,
    /// How long it is out the first time; half to the whole of it, by chance. Default 5s.
    pub eject_for: Option<DurationSpec>,
    /// The longest time out: each ejection in a row doubles the one before, up to this. Default 60s.
    pub eject_for_max: Option<DurationSpec>,
    /// The old word for ejectFor.
    #[schemars(extend("deprecated" = true))]
    pub open_for: Option<DurationSpec>,
    /// The old word for ejectForMax.
    #[schemars(extend("deprecated" = true))]
    pub open_for_max: Option<DurationSpec>,
}

impl ToggleKeys for EjectionSpec {
    const KEYS: &'static [&'static str] = &["consecutiveFailures", "ejectFor", "ejectForMax", "openFor", "openForMax"];
}

/// When endpoints of a destination are ejected, and for how long.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ejection {
    /// Whether any is.
    pub on: Sourced<bool>,
    /// So many failures one after the other eject an endpoint; at least 1.
    pub consecutive_failures: Sourced<u32>,
    /// The longest that it is out the first time; never longer than `eject_for_max`.
    pub eject_for: Sourced<Duration>,
    /// The longest that it is out.
    pub eject_for_max: Sourced<Duration>,
}

impl Ejection {
    /// What holds where no policy says otherwise.
    pub const fn built_in() -> Self {
        Self {
            on: Sourced::built_in(true),
            consecutive_failures: Sourced::built_in(5),
            eject_for: Sourced::built_in(Duration::from_secs(5)),
            eject_for_max: Sourced::built_in(Duration::from_secs(60)),
        }
    }

    /// The values as the state machine takes them; None when it is off, and then nobody is to be asked whether he is out.
    pub fn thresholds(&self) -> Option<Thresholds> {
        self.on.value.then_some(Thresholds {
            consecutive_failures: self.consecutive_failures.value,
            rate: None,
            open_for: self.eject_for.value,
            open_for_max: self.eject_for_max.value,
            probes: PROBES,
        })
    }
}

impl Rule for Ejection {
    type Spec = Toggle<EjectionSpec>;
    type Value = Self;

    const BUILT_IN: Self = Self::built_in();

    /// Reports a first ejection that is longer than the longest.
    fn check(spec: &Toggle<EjectionSpec>, below: &Self, at: &Cursor<'_>) -> Self {
        let Toggle::On(spec) = spec else {
            return Self { on: at.set(false), ..below.clone() };
        };
        let first = written(("ejectFor", spec.eject_for), ("openFor", spec.open_for), at);
        let longest = written(("ejectForMax", spec.eject_for_max), ("openForMax", spec.open_for_max), at);
        let (eject_for, eject_for_max) =
            check_open_times((first, &below.eject_for), (longest, &below.eject_for_max), at);
        Self {
            on: at.set(true),
            consecutive_failures: spec
                .consecutive_failures
                .map_or_else(|| below.consecutive_failures.clone(), |count| at.key("consecutiveFailures").set(count.0)),
            eject_for,
            eject_for_max,
        }
    }

    fn rows(ejection: &Self, _: &RowContext) -> Vec<Row> {
        if !ejection.on.value {
            return vec![Row::whole("off", &ejection.on.origin)];
        }
        vec![
            Row::shown("consecutiveFailures", &ejection.consecutive_failures),
            Row::time("ejectFor", &ejection.eject_for),
            Row::time("ejectForMax", &ejection.eject_for_max),
        ]
    }
}

/// A value under its present key or its old one, with the key that is written. Warns of the old one, and reports both.
fn written(
    (key, value): (&'static str, Option<DurationSpec>),
    (old_key, old_value): (&'static str, Option<DurationSpec>),
    at: &Cursor<'_>,
) -> (&'static str, Option<DurationSpec>) {
    let old_at = at.key(old_key);
    if !old_at.is_given() {
        return (key, value);
    }
    if at.key(key).is_given() {
        let hint = format!("remove `{old_key}`: it is the old word for `{key}`");
        old_at.report_key(InvalidValue::new(format!("`{old_key}` and `{key}` stand together"), hint));
        return (key, value);
    }
    old_at.warn_key(old_word(old_key, key));
    (old_key, old_value)
}

/// The endpoints of one destination.
#[derive(Debug)]
pub struct EjectionGroup {
    born: Instant,
    present: Mutex<Vec<Arc<EjectionMember>>>,
    /// The longest time out, in nanoseconds, that the last call has brought along.
    longest: Arc<AtomicU64>,
}

/// One endpoint.
#[derive(Debug)]
pub struct EjectionMember {
    address: SocketAddr,
    breaker: Arc<Breaker>,
    /// Whether it was told already that this one stays in although it fails.
    is_kept: AtomicBool,
    group: Weak<EjectionGroup>,
    /// That of the group.
    longest: Arc<AtomicU64>,
}

/// What a failure of an endpoint led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EjectionEvent {
    /// It was ejected.
    Ejected(StateChange),
    /// It would have been, were it not the last one in. Told once, until it answers again or is ejected after all.
    Kept {
        /// Failures one after the other.
        consecutive: u32,
    },
}

impl EjectionGroup {
    /// A group without members.
    pub fn new(now: Instant) -> Arc<Self> {
        let longest = Arc::new(AtomicU64::new(u64::MAX));
        Arc::new(Self { born: now, present: Mutex::new(Vec::new()), longest })
    }

    /// The member at an address; a new one is in. Takes a lock: to be asked when addresses change, not for each call.
    pub fn member(self: &Arc<Self>, address: SocketAddr) -> Arc<EjectionMember> {
        self.member_if(address, || true)
    }

    /// The same, but a new one becomes a member only if it `belongs` here, which is asked while nobody is being
    /// forgotten. One that does not is never ejected, and counts for nobody.
    pub fn member_if(self: &Arc<Self>, address: SocketAddr, belongs: impl FnOnce() -> bool) -> Arc<EjectionMember> {
        let mut present = self.present();
        if let Some(member) = present.iter().find(|member| member.address == address) {
            return Arc::clone(member);
        }
        let member = Arc::new(EjectionMember {
            address,
            breaker: Breaker::new(self.born),
            is_kept: AtomicBool::new(false),
            group: Arc::downgrade(self),
            longest: Arc::clone(&self.longest),
        });
        if belongs() {
            present.push(Arc::clone(&member));
        }
        member
    }

    /// Forgets all members but these. When all that are left are out, takes back the one whose time is over first.
    pub fn retain(&self, addresses: &[SocketAddr], now: Instant) -> Option<(Arc<EjectionMember>, StateChange)> {
        let mut present = self.present();
        present.retain(|member| addresses.contains(&member.address));
        if present.iter().any(|member| member.breaker.is_closed()) {
            return None;
        }
        let first = present.iter().min_by_key(|member| member.breaker.retry_after(now))?;
        let change = first.breaker.close(ChangeCause::NoOtherLeft, now)?;
        Some((Arc::clone(first), change))
    }

    /// Whether one that is in has not failed since it last answered, so that what fails are single members.
    pub fn is_one_well(&self) -> bool {
        self.present().iter().any(|member| member.breaker.is_closed() && member.breaker.consecutive() == 0)
    }

    /// Those that are in fail: whoever of the others would be tried first may be tried now. Returns who.
    pub fn hurry(&self, now: Instant) -> Option<Arc<EjectionMember>> {
        let present = self.present();
        let waits = |member: &&Arc<EjectionMember>| member.breaker.retry_after(now);
        // One that is being tried already waits for that, and can be no quicker.
        let is_out = |member: &&Arc<EjectionMember>| member.state(now) == BreakerState::Open;
        let first = present.iter().filter(is_out).min_by_key(waits)?;
        first.breaker.hurry(now);
        Some(Arc::clone(first))
    }

    /// The members, for the status page.
    pub fn members(&self) -> Vec<Arc<EjectionMember>> {
        self.present().clone()
    }

    fn present(&self) -> MutexGuard<'_, Vec<Arc<EjectionMember>>> {
        // Each critical section leaves a whole list behind, whatever happens.
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EjectionMember {
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
    pub fn state(&self, now: Instant) -> BreakerState {
        self.breaker.state(now)
    }

    /// Failures one after the other so far.
    pub fn consecutive(&self) -> u32 {
        self.breaker.consecutive()
    }

    /// Lets a call go to it, as one of many or as the one that tries it. Refuses also when another call was quicker to try
    /// it: pick another member then.
    pub fn admit(&self, thresholds: &Thresholds, now: Instant) -> Admission {
        self.take_up(thresholds.open_for_max, now);
        self.breaker.admit(thresholds, now)
    }

    /// Who is out gets no calls, and so does not hear that the policy's longest time out has become shorter: whoever
    /// does get one says so to all. A call of the policy before makes nothing longer again.
    fn take_up(&self, longest: Duration, now: Instant) {
        let nanos = u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX);
        let before = self.longest.load(Relaxed);
        if nanos == before {
            return;
        }
        self.longest.store(nanos, Relaxed);
        if nanos < before
            && let Some(group) = self.group.upgrade()
        {
            group.present().iter().for_each(|member| member.breaker.limit(longest, now));
        }
    }

    /// Counts how a call that was let through has ended. A member that was forgotten meanwhile is never ejected.
    ///
    /// `random` is from 0 to 1 and decides how long it is out, if it is ejected.
    pub fn record(
        &self,
        pass: BreakerPermit,
        thresholds: &Thresholds,
        outcome: CallResult,
        now: Instant,
        random: f64,
    ) -> Option<EjectionEvent> {
        let cause = self.breaker.note(pass, thresholds, outcome, now);
        if outcome == CallResult::Success && self.is_kept.load(Relaxed) {
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
            return Some(EjectionEvent::Ejected(change));
        }
        if self.is_kept.swap(true, Relaxed) {
            return None;
        }
        Some(EjectionEvent::Kept { consecutive: self.breaker.consecutive() })
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

    fn group(now: Instant, size: u8) -> (Arc<EjectionGroup>, Vec<Arc<EjectionMember>>) {
        let group = EjectionGroup::new(now);
        let members = (0..size).map(|last| group.member(address(last))).collect();
        (group, members)
    }

    fn call(member: &EjectionMember, outcome: CallResult, now: Instant) -> Option<EjectionEvent> {
        match member.admit(&TWO, now) {
            Admission::Admit(pass) => member.record(pass, &TWO, outcome, now, 1.0),
            other => panic!("no pass: {other:?}"),
        }
    }

    fn eject(member: &EjectionMember, now: Instant) -> StateChange {
        assert_eq!(call(member, CallResult::Failure, now), None);
        match call(member, CallResult::Failure, now) {
            Some(EjectionEvent::Ejected(change)) => change,
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
        assert_eq!(call(&members[0], CallResult::Failure, start), None);
        assert_eq!(call(&members[0], CallResult::Success, start), None);
        let change = eject(&members[0], start);
        assert_eq!((change.consecutive, change.open_for), (2, Some(TWO.open_for)));
        assert!(members[0].is_out(start) && !members[0].is_due(start) && !members[1].is_out(start));
        assert_eq!(members[0].breaker.retry_after(start), Some(TWO.open_for));
        let later = start + TWO.open_for;
        assert!(!members[0].is_out(later) && members[0].is_due(later));
        let Admission::Probe { probe, change } = members[0].admit(&TWO, later) else { panic!("no probe") };
        assert_eq!(change.unwrap().cause, ChangeCause::OpenTimeOver);
        assert!(members[0].is_out(later), "one call tries it, not all");
        let change = probe.record(&TWO, CallResult::Failure, later, 1.0).unwrap();
        assert_eq!((change.cause, change.open_for), (ChangeCause::ProbeFailed, Some(TWO.open_for * 2)));
        let later = later + TWO.open_for * 2;
        let Admission::Probe { probe, .. } = members[0].admit(&TWO, later) else { panic!("no probe") };
        assert_eq!(probe.record(&TWO, CallResult::Success, later, 1.0).unwrap().to, BreakerState::Closed);
        assert_eq!(members[0].state(later), BreakerState::Closed);
    }

    #[test]
    fn the_last_one_stays_in_and_that_is_told_once_per_streak() {
        let start = Instant::now();
        let (_group, members) = group(start, 2);
        eject(&members[0], start);
        for _ in 0..3 {
            assert_eq!(call(&members[1], CallResult::Failure, start), None);
            assert_eq!(call(&members[1], CallResult::Failure, start), Some(EjectionEvent::Kept { consecutive: 2 }));
            assert_eq!(call(&members[1], CallResult::Failure, start), None);
            assert_eq!(call(&members[1], CallResult::Success, start), None);
        }
        assert_eq!(members[1].state(start), BreakerState::Closed);
    }

    #[test]
    fn the_last_one_is_ejected_as_soon_as_another_is_back() {
        let start = Instant::now();
        let (_group, members) = group(start, 2);
        eject(&members[0], start);
        for _ in 0..9 {
            call(&members[1], CallResult::Failure, start);
        }
        let later = start + TWO.open_for;
        let Admission::Probe { probe, .. } = members[0].admit(&TWO, later) else { panic!("no probe") };
        assert_eq!(call(&members[1], CallResult::Failure, later), None, "one that is being tried is not in");
        probe.record(&TWO, CallResult::Success, later, 1.0).unwrap();
        let Some(EjectionEvent::Ejected(change)) = call(&members[1], CallResult::Failure, later) else {
            panic!("not ejected")
        };
        assert_eq!(change.consecutive, 11);
    }

    #[test]
    fn one_is_well_as_long_as_one_that_is_in_has_not_failed_last() {
        let start = Instant::now();
        let (group, members) = group(start, 2);
        eject(&members[0], start);
        assert!(group.is_one_well());
        call(&members[1], CallResult::Failure, start);
        assert!(!group.is_one_well());
        call(&members[1], CallResult::Success, start);
        assert!(group.is_one_well());
    }

    #[test]
    fn who_would_be_tried_first_can_be_tried_at_once() {
        let start = Instant::now();
        let (group, members) = group(start, 3);
        assert!(group.hurry(start).is_none(), "nobody is out");
        eject(&members[1], start);
        eject(&members[0], start + Duration::from_secs(1));
        let now = start + Duration::from_secs(2);
        assert_eq!(group.hurry(now).map(|one| one.address()), Some(address(1)));
        assert!(members[1].is_due(now) && !members[0].is_due(now));
        assert_eq!(group.hurry(now).map(|one| one.address()), Some(address(0)));
        assert!(group.hurry(now).is_none());
        let Admission::Probe { change, .. } = members[1].admit(&TWO, now) else { panic!("no probe") };
        assert_eq!(change.map(|change| change.cause.as_str()), Some("no_other_well"));
    }

    #[test]
    fn one_that_is_being_tried_does_not_stand_before_another_that_can_be() {
        let start = Instant::now();
        let (group, members) = group(start, 3);
        eject(&members[0], start);
        let later = start + TWO.open_for;
        let Admission::Probe { probe: _hangs, .. } = members[0].admit(&TWO, later) else { panic!("no probe") };
        eject(&members[1], later);
        assert_eq!(group.hurry(later).map(|one| one.address()), Some(address(1)));
    }

    #[test]
    fn a_shorter_longest_time_holds_for_who_is_out_as_soon_as_a_call_brings_it() {
        let start = Instant::now();
        let (_group, members) = group(start, 3);
        let long = Thresholds { open_for: TWO.open_for_max, ..TWO };
        for member in &members[..2] {
            let cause = [(); 2].map(|()| match member.admit(&long, start) {
                Admission::Admit(pass) => member.record(pass, &long, CallResult::Failure, start, 1.0),
                other => panic!("no pass: {other:?}"),
            });
            assert!(matches!(cause[1], Some(EjectionEvent::Ejected(_))), "{cause:?}");
        }
        let short = Thresholds { open_for_max: TWO.open_for, ..TWO };
        let (early, due) = (start + TWO.open_for / 2, start + TWO.open_for);
        assert!(matches!(members[2].admit(&short, early), Admission::Admit(_)));
        assert!(members[..2].iter().all(|one| one.is_out(early) && !one.is_due(early)), "no shorter than that");
        assert!(members[..2].iter().all(|one| !one.is_out(due) && one.is_due(due)));
        let Admission::Probe { probe, .. } = members[0].admit(&short, due) else { panic!("no probe") };
        // A call of the policy before makes nothing longer.
        assert!(matches!(members[2].admit(&long, due), Admission::Admit(_)));
        assert!(members[1].is_due(due));
        drop(probe);
        assert!(members[0].is_due(due));
    }

    #[test]
    fn a_forgotten_member_is_never_ejected_and_counts_for_nobody() {
        let start = Instant::now();
        let (group, members) = group(start, 2);
        assert!(group.retain(&[address(1), address(7)], start).is_none());
        for _ in 0..5 {
            assert_eq!(call(&members[0], CallResult::Failure, start), None);
        }
        assert_eq!(call(&members[1], CallResult::Failure, start), None);
        assert_eq!(call(&members[1], CallResult::Failure, start), Some(EjectionEvent::Kept { consecutive: 2 }));
        drop(group);
        assert_eq!(call(&members[1], CallResult::Failure, start), None);
    }

    #[test]
    fn one_that_does_not_belong_here_is_never_ejected_and_keeps_nobody_out() {
        let start = Instant::now();
        let (group, members) = group(start, 1);
        let stranger = group.member_if(address(7), || false);
        for _ in 0..5 {
            assert_eq!(call(&stranger, CallResult::Failure, start), None);
        }
        assert_eq!(call(&members[0], CallResult::Failure, start), None);
        assert_eq!(call(&members[0], CallResult::Failure, start), Some(EjectionEvent::Kept { consecutive: 2 }));
        assert!(Arc::ptr_eq(&group.member_if(address(0), || false), &members[0]), "who is there already, is there");
    }

    #[test]
    fn when_all_others_go_away_the_one_that_is_out_is_taken_back() {
        let start = Instant::now();
        let (group, members) = group(start, 3);
        eject(&members[0], start);
        eject(&members[1], start + Duration::from_secs(1));
        let (back, change) = group.retain(&[address(0), address(1)], start + Duration::from_secs(2)).unwrap();
        assert_eq!(
            (back.address(), change.cause, change.to),
            (address(0), ChangeCause::NoOtherLeft, BreakerState::Closed)
        );
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
                let outcome = if random.u8(..4) == 0 { CallResult::Success } else { CallResult::Failure };
                match member.admit(&TWO, now) {
                    Admission::Admit(pass) => drop(member.record(pass, &TWO, outcome, now, random.f64())),
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
                assert!(group.members().iter().any(|one| one.state(now) == BreakerState::Closed), "seed {seed}");
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
