//! Ejection: takes a failing endpoint of a destination out of load balancing for a while.
//!
//! The values of `ejection`, their check and their rows, and the group of a destination's endpoints, each with a
//! breaker of its own. One group per destination, shared by all workers; it survives reloads. Invariant: at least one
//! present member is active (not ejected). The last active member is never ejected (reported once per streak of
//! failures), and if all active members leave the group, one ejected member is taken back.

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

/// Concurrent probes of an ejected endpoint: the second one starts when the first has waited for a quarter of
/// `ejectFor`.
const PROBES: u32 = 2;

/// `ejection:` of `defaults` or of a destination, as a mapping.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase", expecting = "a mapping of ejection values")]
pub struct EjectionSpec {
    /// Consecutive failures that eject an endpoint. Default 5.
    pub consecutive_failures: Option<Count<1>>,
    /// Initial ejection time, with 50 % jitter (half to the whole of it). Default 5s.
    pub eject_for: Option<DurationSpec>,
    /// Longest ejection time: each consecutive ejection doubles it, up to this. Default 60s.
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

/// Checked values of a destination's ejection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ejection {
    /// Whether endpoints are ejected.
    pub on: Sourced<bool>,
    /// Consecutive failures that eject an endpoint; at least 1.
    pub consecutive_failures: Sourced<u32>,
    /// Initial ejection time before jitter; at most `eject_for_max`.
    pub eject_for: Sourced<Duration>,
    /// Longest ejection time.
    pub eject_for_max: Sourced<Duration>,
}

impl Ejection {
    /// The built-in values.
    pub const fn built_in() -> Self {
        Self {
            on: Sourced::built_in(true),
            consecutive_failures: Sourced::built_in(5),
            eject_for: Sourced::built_in(Duration::from_secs(5)),
            eject_for_max: Sourced::built_in(Duration::from_secs(60)),
        }
    }

    /// Thresholds of the state machine; `None` if ejection is off, and then no endpoint counts as ejected.
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

    /// Reports an initial ejection time that is longer than the longest one.
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

/// The value under its present key or its old one, and the key that the file uses. Warns about the old key; both
/// together are an error.
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
        old_at.report_key(InvalidValue::new(format!("`{old_key}` and `{key}` exclude each other"), hint));
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
    /// The longest ejection time that the last admitted call passed, in nanoseconds.
    longest: Arc<AtomicU64>,
}

/// One endpoint.
#[derive(Debug)]
pub struct EjectionMember {
    address: SocketAddr,
    breaker: Arc<Breaker>,
    /// Whether `Kept` was returned for the current streak of failures.
    is_kept: AtomicBool,
    group: Weak<EjectionGroup>,
    /// Shared with the group.
    longest: Arc<AtomicU64>,
}

/// Effect of a failure on an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EjectionEvent {
    /// The endpoint was ejected.
    Ejected(StateChange),
    /// The endpoint has reached the threshold but is the last active one, so it stays. Returned once, until it answers
    /// again or is ejected.
    Kept {
        /// Consecutive failures.
        consecutive: u32,
    },
}

impl EjectionGroup {
    /// A group without members.
    pub fn new(now: Instant) -> Arc<Self> {
        let longest = Arc::new(AtomicU64::new(u64::MAX));
        Arc::new(Self { born: now, present: Mutex::new(Vec::new()), longest })
    }

    /// The member at an address; a new member is active. Takes a lock: call it when addresses change, not per call.
    pub fn member(self: &Arc<Self>, address: SocketAddr) -> Arc<EjectionMember> {
        self.member_if(address, || true)
    }

    /// Like [`Self::member`], but a new member joins the group only if `belongs` returns true; it is called under the
    /// group's lock, so no member is removed meanwhile. A member outside the group is never ejected and does not count
    /// as active.
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

    /// Removes all members except these. If all remaining ones are ejected, takes back the one whose ejection ends
    /// first.
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

    /// Whether an active member has answered since its last failure, so that the failures are those of single members.
    pub fn has_well_member(&self) -> bool {
        self.present().iter().any(|member| member.breaker.is_closed() && member.breaker.consecutive() == 0)
    }

    /// All active members fail: ends the ejection of the member whose ejection would end first, and returns it.
    pub fn end_first_ejection(&self, now: Instant) -> Option<Arc<EjectionMember>> {
        let present = self.present();
        let waits = |member: &&Arc<EjectionMember>| member.breaker.retry_after(now);
        // A half-open member already waits for its probe; nothing makes that faster.
        let is_out = |member: &&Arc<EjectionMember>| member.state(now) == BreakerState::Open;
        let first = present.iter().filter(is_out).min_by_key(waits)?;
        first.breaker.end_open_time_early(now);
        Some(Arc::clone(first))
    }

    /// The members, for the status page.
    pub fn members(&self) -> Vec<Arc<EjectionMember>> {
        self.present().clone()
    }

    fn present(&self) -> MutexGuard<'_, Vec<Arc<EjectionMember>>> {
        // Each critical section leaves a complete list behind, even on a panic.
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EjectionMember {
    /// Address of the endpoint.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether it gets no calls now; one atomic load.
    pub fn is_out(&self, now: Instant) -> bool {
        self.breaker.is_shut(now)
    }

    /// Whether its ejection time is over and the next call is its probe; one atomic load.
    pub fn is_due(&self, now: Instant) -> bool {
        self.breaker.is_due(now)
    }

    /// Closed: active; open: ejected; half-open: being probed.
    pub fn state(&self, now: Instant) -> BreakerState {
        self.breaker.state(now)
    }

    /// Consecutive failures so far.
    pub fn consecutive(&self) -> u32 {
        self.breaker.consecutive()
    }

    /// Admits a call, normally or as a probe. Refuses also if another call has just become the probe: pick another
    /// member then.
    pub fn admit(&self, thresholds: &Thresholds, now: Instant) -> Admission {
        self.apply_longest(thresholds.open_for_max, now);
        self.breaker.admit(thresholds, now)
    }

    /// Ejected members get no calls, so a shorter longest ejection time of a reload reaches them through the next call
    /// to any member of the group. A call with the thresholds of the previous policy does not lengthen it again.
    fn apply_longest(&self, longest: Duration, now: Instant) {
        let nanos = u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX);
        let before = self.longest.load(Relaxed);
        if nanos == before {
            return;
        }
        self.longest.store(nanos, Relaxed);
        if nanos < before
            && let Some(group) = self.group.upgrade()
        {
            group.present().iter().for_each(|member| member.breaker.apply_longest_open_time(longest, now));
        }
    }

    /// Records the result of an admitted call. A member that has left the group is never ejected.
    ///
    /// `random`, from 0 to 1, gives the jitter of the ejection time.
    pub fn record(
        &self,
        permit: BreakerPermit,
        thresholds: &Thresholds,
        outcome: CallResult,
        now: Instant,
        random: f64,
    ) -> Option<EjectionEvent> {
        let cause = self.breaker.count_result(permit, thresholds, outcome, now);
        if outcome == CallResult::Success && self.is_kept.load(Relaxed) {
            self.is_kept.store(false, Relaxed);
        }
        let (cause, group) = (cause?, self.group.upgrade()?);
        // Ejections happen under this lock, so an active member stays active until it is released.
        let present = group.present();
        let is_me = |member: &Arc<Self>| std::ptr::eq(Arc::as_ptr(member), self);
        if !present.iter().any(is_me) {
            return None;
        }
        if present.iter().any(|member| !is_me(member) && member.breaker.is_closed()) {
            let change = self.breaker.open(permit, cause, thresholds, now, random)?;
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
            Admission::Admit(permit) => member.record(permit, &TWO, outcome, now, 1.0),
            other => panic!("no permit: {other:?}"),
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
    fn an_address_has_one_member() {
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
        assert!(members[0].is_out(later), "one call is the probe, not all");
        let change = probe.record(&TWO, CallResult::Failure, later, 1.0).unwrap();
        assert_eq!((change.cause, change.open_for), (ChangeCause::ProbeFailed, Some(TWO.open_for * 2)));
        let later = later + TWO.open_for * 2;
        let Admission::Probe { probe, .. } = members[0].admit(&TWO, later) else { panic!("no probe") };
        assert_eq!(probe.record(&TWO, CallResult::Success, later, 1.0).unwrap().to, BreakerState::Closed);
        assert_eq!(members[0].state(later), BreakerState::Closed);
    }

    #[test]
    fn the_last_active_member_stays_and_is_reported_once_per_streak() {
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
    fn the_last_active_member_is_ejected_as_soon_as_another_is_back() {
        let start = Instant::now();
        let (_group, members) = group(start, 2);
        eject(&members[0], start);
        for _ in 0..9 {
            call(&members[1], CallResult::Failure, start);
        }
        let later = start + TWO.open_for;
        let Admission::Probe { probe, .. } = members[0].admit(&TWO, later) else { panic!("no probe") };
        assert_eq!(call(&members[1], CallResult::Failure, later), None, "a member that is being probed is not active");
        probe.record(&TWO, CallResult::Success, later, 1.0).unwrap();
        let Some(EjectionEvent::Ejected(change)) = call(&members[1], CallResult::Failure, later) else {
            panic!("not ejected")
        };
        assert_eq!(change.consecutive, 11);
    }

    #[test]
    fn the_group_has_a_well_member_while_an_active_one_has_not_failed_last() {
        let start = Instant::now();
        let (group, members) = group(start, 2);
        eject(&members[0], start);
        assert!(group.has_well_member());
        call(&members[1], CallResult::Failure, start);
        assert!(!group.has_well_member());
        call(&members[1], CallResult::Success, start);
        assert!(group.has_well_member());
    }

    #[test]
    fn the_ejection_that_would_end_first_can_be_ended_at_once() {
        let start = Instant::now();
        let (group, members) = group(start, 3);
        assert!(group.end_first_ejection(start).is_none(), "no member is ejected");
        eject(&members[1], start);
        eject(&members[0], start + Duration::from_secs(1));
        let now = start + Duration::from_secs(2);
        assert_eq!(group.end_first_ejection(now).map(|one| one.address()), Some(address(1)));
        assert!(members[1].is_due(now) && !members[0].is_due(now));
        assert_eq!(group.end_first_ejection(now).map(|one| one.address()), Some(address(0)));
        assert!(group.end_first_ejection(now).is_none());
        let Admission::Probe { change, .. } = members[1].admit(&TWO, now) else { panic!("no probe") };
        assert_eq!(change.map(|change| change.cause.as_str()), Some("no_other_well"));
    }

    #[test]
    fn a_member_that_is_being_probed_does_not_hide_an_ejected_one() {
        let start = Instant::now();
        let (group, members) = group(start, 3);
        eject(&members[0], start);
        let later = start + TWO.open_for;
        let Admission::Probe { probe: _hangs, .. } = members[0].admit(&TWO, later) else { panic!("no probe") };
        eject(&members[1], later);
        assert_eq!(group.end_first_ejection(later).map(|one| one.address()), Some(address(1)));
    }

    #[test]
    fn a_shorter_longest_time_reaches_ejected_members_with_the_next_call() {
        let start = Instant::now();
        let (_group, members) = group(start, 3);
        let long = Thresholds { open_for: TWO.open_for_max, ..TWO };
        for member in &members[..2] {
            let cause = [(); 2].map(|()| match member.admit(&long, start) {
                Admission::Admit(permit) => member.record(permit, &long, CallResult::Failure, start, 1.0),
                other => panic!("no permit: {other:?}"),
            });
            assert!(matches!(cause[1], Some(EjectionEvent::Ejected(_))), "{cause:?}");
        }
        let short = Thresholds { open_for_max: TWO.open_for, ..TWO };
        let (early, due) = (start + TWO.open_for / 2, start + TWO.open_for);
        assert!(matches!(members[2].admit(&short, early), Admission::Admit(_)));
        assert!(members[..2].iter().all(|one| one.is_out(early) && !one.is_due(early)), "no shorter than that");
        assert!(members[..2].iter().all(|one| !one.is_out(due) && one.is_due(due)));
        let Admission::Probe { probe, .. } = members[0].admit(&short, due) else { panic!("no probe") };
        // A call with the previous policy lengthens nothing.
        assert!(matches!(members[2].admit(&long, due), Admission::Admit(_)));
        assert!(members[1].is_due(due));
        drop(probe);
        assert!(members[0].is_due(due));
    }

    #[test]
    fn a_removed_member_is_never_ejected_and_does_not_count_as_active() {
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
    fn a_member_outside_the_group_is_never_ejected_and_does_not_count_as_active() {
        let start = Instant::now();
        let (group, members) = group(start, 1);
        let stranger = group.member_if(address(7), || false);
        for _ in 0..5 {
            assert_eq!(call(&stranger, CallResult::Failure, start), None);
        }
        assert_eq!(call(&members[0], CallResult::Failure, start), None);
        assert_eq!(call(&members[0], CallResult::Failure, start), Some(EjectionEvent::Kept { consecutive: 2 }));
        assert!(
            Arc::ptr_eq(&group.member_if(address(0), || false), &members[0]),
            "a present member is returned as it is"
        );
    }

    #[test]
    fn when_all_active_members_leave_an_ejected_one_is_taken_back() {
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
    fn one_member_is_always_active() {
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
                    Admission::Admit(permit) => drop(member.record(permit, &TWO, outcome, now, random.f64())),
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
