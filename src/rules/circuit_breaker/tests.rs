//! Tables, a random walk that names its seed on failure, and concurrent workers.

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

const MS: Duration = Duration::from_millis(1);

const USUAL: Thresholds = Thresholds {
    consecutive_failures: 3,
    rate: Some(RateThreshold { share: 0.5, window: Duration::from_secs(10), min_requests: 10 }),
    open_for: Duration::from_millis(400),
    open_for_max: Duration::from_millis(1000),
    probes: 2,
};

use CallResult::{Failure, Success};

fn permit(breaker: &Arc<Breaker>, now: Instant) -> BreakerPermit {
    match breaker.admit(&USUAL, now) {
        Admission::Admit(permit) => permit,
        other => panic!("no permit: {other:?}"),
    }
}

fn probe(breaker: &Arc<Breaker>, now: Instant) -> Probe {
    match breaker.admit(&USUAL, now) {
        Admission::Probe { probe, .. } => probe,
        other => panic!("no probe: {other:?}"),
    }
}

fn refused(breaker: &Arc<Breaker>, now: Instant) -> Duration {
    match breaker.admit(&USUAL, now) {
        Admission::Refuse { retry_after } => retry_after,
        other => panic!("not refused: {other:?}"),
    }
}

fn call(breaker: &Arc<Breaker>, outcome: CallResult, now: Instant) -> Option<StateChange> {
    breaker.record(permit(breaker, now), &USUAL, outcome, now, 1.0)
}

/// Opened by consecutive failures, for the full initial open time.
fn opened(now: Instant) -> Arc<Breaker> {
    let breaker = Breaker::new(now);
    let changes: Vec<_> = (0..3).filter_map(|_| call(&breaker, Failure, now)).collect();
    assert_eq!(changes.len(), 1);
    breaker
}

#[test]
fn failures_in_a_row_open_it() {
    let now = Instant::now();
    let breaker = Breaker::new(now);
    for outcome in [Failure, Failure, Success, Failure, Failure] {
        assert_eq!(call(&breaker, outcome, now), None);
    }
    let change = call(&breaker, Failure, now).unwrap();
    let wanted = StateChange {
        from: BreakerState::Closed,
        to: BreakerState::Open,
        cause: ChangeCause::ConsecutiveFailures,
        consecutive: 3,
        failures: 5,
        requests: 6,
        open_for: Some(400 * MS),
    };
    assert_eq!(change, wanted);
    assert_eq!((change.to.as_str(), change.cause.as_str()), ("open", "consecutive_failures"));
    assert_eq!(refused(&breaker, now + 100 * MS), 300 * MS);
}

#[test]
fn a_share_of_failures_opens_it_once_there_are_enough_calls() {
    let table = [
        // Calls, F for a failure; whether the last one opens the breaker.
        ("FSFSFSFSF", false),
        ("SFSFSFSFSF", true),
        ("SSSSSSSSSSF", false),
        ("SSSSSFFSFFSSSSSSF", false),
        ("SFFSFFSSSF", true),
    ];
    for (calls, opens) in table {
        let start = Instant::now();
        let breaker = Breaker::new(start);
        let results: Vec<_> = (0..)
            .zip(calls.chars())
            .map(|(at, c)| call(&breaker, if c == 'F' { Failure } else { Success }, start + at * 100 * MS))
            .collect();
        let last = results.last().unwrap();
        assert_eq!(last.map(|change| change.cause), opens.then_some(ChangeCause::FailureRate), "{calls}");
        assert!(results[..results.len() - 1].iter().all(Option::is_none), "{calls}");
    }
}

#[test]
fn failures_that_left_the_window_no_longer_count_towards_the_share() {
    let start = Instant::now();
    let breaker = Breaker::new(start);
    for outcome in [Failure, Failure, Success, Failure, Failure, Success, Failure, Failure, Success] {
        assert_eq!(call(&breaker, outcome, start), None);
    }
    assert_eq!(call(&breaker, Failure, start + Duration::from_secs(11)), None);
}

#[test]
fn the_first_probe_that_succeeds_closes_it_and_nothing_old_counts_any_more() {
    let start = Instant::now();
    let breaker = opened(start);
    let later = start + 400 * MS;
    let Admission::Probe { probe, change } = breaker.admit(&USUAL, later) else { panic!("no probe") };
    let change = change.unwrap();
    assert_eq!(
        (change.from, change.to, change.cause),
        (BreakerState::Open, BreakerState::HalfOpen, ChangeCause::OpenTimeOver)
    );
    let change = probe.record(&USUAL, Success, later, 1.0).unwrap();
    assert_eq!(
        (change.from, change.to, change.cause),
        (BreakerState::HalfOpen, BreakerState::Closed, ChangeCause::ProbeSucceeded)
    );
    assert_eq!((change.failures, change.requests, change.open_for), (3, 3, None));
    assert_eq!(call(&breaker, Failure, later), None);
    assert_eq!(breaker.consecutive(), 1);
}

#[test]
fn a_failed_probe_doubles_the_open_time_up_to_the_longest() {
    let mut now = Instant::now();
    let breaker = opened(now);
    let mut wait = 400 * MS;
    for (wanted, consecutive) in [(800, 4), (1000, 5), (1000, 6)] {
        now += wait;
        let change = probe(&breaker, now).record(&USUAL, Failure, now, 1.0).unwrap();
        wait = change.open_for.unwrap();
        assert_eq!((change.cause, wait, change.consecutive), (ChangeCause::ProbeFailed, wanted * MS, consecutive));
    }
    // At least half of it, whatever the random number.
    now += wait;
    let change = probe(&breaker, now).record(&USUAL, Failure, now, f64::NAN).unwrap();
    assert_eq!(change.open_for, Some(500 * MS));
}

#[test]
fn the_time_spent_waiting_for_a_failed_probe_counts_as_open() {
    for (waited, wanted) in [(0, 800), (300, 500), (750, 100), (5_000, 100)] {
        let start = Instant::now();
        let breaker = opened(start);
        let later = start + 400 * MS;
        let change = probe(&breaker, later).record(&USUAL, Failure, later + waited * MS, 1.0).unwrap();
        assert_eq!(change.open_for, Some(wanted * MS), "after {waited} ms");
        assert_eq!(breaker.retry_after(later + waited * MS), Some(wanted * MS));
    }
}

#[test]
fn it_doubles_on_unless_it_stayed_closed_for_the_longest_open_time() {
    for (closed_for, wanted) in [(999 * MS, 800 * MS), (1000 * MS, 400 * MS)] {
        let start = Instant::now();
        let breaker = opened(start);
        let later = start + 400 * MS;
        probe(&breaker, later).record(&USUAL, Success, later, 1.0).unwrap();
        let changes: Vec<_> = (0..3).filter_map(|_| call(&breaker, Failure, later + closed_for)).collect();
        assert_eq!(changes[0].open_for, Some(wanted), "{closed_for:?}");
    }
}

#[test]
fn a_second_probe_follows_soon_further_ones_later_and_their_number_is_bounded() {
    let start = Instant::now();
    let breaker = opened(start);
    let later = start + 400 * MS;
    let first = probe(&breaker, later);
    assert_eq!(refused(&breaker, later + 30 * MS), 70 * MS);
    let _second = probe(&breaker, later + 100 * MS);
    assert_eq!(refused(&breaker, later + 250 * MS), 850 * MS);
    drop(first);
    let _third = probe(&breaker, later + 1100 * MS);
    assert_eq!(refused(&breaker, later + 2000 * MS), 100 * MS);
    assert_eq!(breaker.state(later), BreakerState::HalfOpen);
}

#[test]
fn a_probe_without_a_result_makes_room_for_another_after_its_hold() {
    let start = Instant::now();
    let breaker = opened(start);
    let later = start + 400 * MS;
    let (_first, _second) = (probe(&breaker, later), probe(&breaker, later + 100 * MS));
    assert_eq!(refused(&breaker, later + 1000 * MS), 100 * MS);
    let third = probe(&breaker, later + 1100 * MS);
    assert_eq!(refused(&breaker, later + 1200 * MS), 900 * MS);
    third.record(&USUAL, Success, later + 1300 * MS, 1.0).unwrap();
    assert!(breaker.is_closed());
}

#[test]
fn the_hold_of_a_probe_is_bounded() {
    let hold = |open_for: u32, open_for_max: u32| {
        Thresholds { open_for: open_for * MS, open_for_max: open_for_max * MS, ..USUAL }.hold()
    };
    assert_eq!((hold(250, 1000), hold(250, 60_000), hold(9000, 60_000)), (1000 * MS, 5000 * MS, 9000 * MS));
}

#[test]
fn a_dropped_probe_frees_its_slot_and_the_next_follows_at_once() {
    let start = Instant::now();
    let breaker = opened(start);
    let later = start + 400 * MS;
    for _ in 0..5 {
        assert!(breaker.is_due(later));
        let probe = probe(&breaker, later);
        assert!(breaker.is_shut(later));
        drop(probe);
    }
}

#[test]
fn results_of_calls_admitted_before_an_opening_are_ignored() {
    let start = Instant::now();
    let breaker = Breaker::new(start);
    let old = permit(&breaker, start);
    assert_eq!((0..3).filter_map(|_| call(&breaker, Failure, start)).count(), 1);
    let until = breaker.retry_after(start);
    let late = |now| [Failure, Success].map(|outcome| breaker.record(old, &USUAL, outcome, now, 1.0));
    // While open, while half-open, and in the next closed period.
    assert_eq!(late(start), [None; 2]);
    assert_eq!(breaker.retry_after(start), until);
    let later = start + 400 * MS;
    let probe = probe(&breaker, later);
    assert_eq!(late(later), [None; 2]);
    assert_eq!(breaker.state(later), BreakerState::HalfOpen);
    probe.record(&USUAL, Success, later, 1.0).unwrap();
    for _ in 0..10 {
        assert_eq!(breaker.record(old, &USUAL, Failure, later, 1.0), None);
    }
    assert_eq!((breaker.state(later), breaker.consecutive()), (BreakerState::Closed, 0));
}

#[test]
fn a_probe_of_an_earlier_half_open_period_is_ignored() {
    let start = Instant::now();
    let breaker = opened(start);
    let later = start + 400 * MS;
    let (first, second) = (probe(&breaker, later), probe(&breaker, later + 100 * MS));
    first.record(&USUAL, Failure, later + 100 * MS, 1.0).unwrap();
    let until = breaker.retry_after(later);
    assert_eq!(second.record(&USUAL, Success, later + 200 * MS, 1.0), None);
    assert_eq!((breaker.state(later + 200 * MS), breaker.retry_after(later)), (BreakerState::Open, until));
}

#[test]
fn changed_values_apply_at_once() {
    let now = Instant::now();
    let breaker = Breaker::new(now);
    assert_eq!(call(&breaker, Failure, now), None);
    let strict = Thresholds { consecutive_failures: 2, ..USUAL };
    let change = breaker.record(permit(&breaker, now), &strict, Failure, now, 1.0).unwrap();
    assert_eq!(change.open_for, Some(400 * MS));
    let short = Thresholds { open_for: 40 * MS, open_for_max: 50 * MS, ..USUAL };
    let answer = breaker.admit(&short, now + 20 * MS);
    assert!(matches!(answer, Admission::Refuse { retry_after } if retry_after == 30 * MS), "{answer:?}");
    let answer = breaker.admit(&short, now + 50 * MS);
    assert!(matches!(answer, Admission::Probe { change: Some(_), .. }), "{answer:?}");
    // An open time that ends at the instant at which it is shortened.
    let breaker = opened(now);
    assert!(matches!(breaker.admit(&short, now + 60 * MS), Admission::Probe { change: Some(_), .. }));
}

#[test]
fn an_open_time_that_is_over_shows_as_half_open_before_the_first_probe() {
    let start = Instant::now();
    let breaker = opened(start);
    assert_eq!(breaker.state(start + 399 * MS), BreakerState::Open);
    assert_eq!(breaker.state(start + 400 * MS), BreakerState::HalfOpen);
    assert_eq!(breaker.retry_after(start + 400 * MS), None);
}

/// The walk's model of the breaker, made from the returned changes.
struct Told {
    state: BreakerState,
    /// When it opened and for how long.
    open: Option<(Instant, Duration)>,
    openings: u32,
    closed_since: Instant,
}

impl Told {
    fn take(&mut self, change: StateChange, now: Instant) {
        assert_eq!(change.from, self.state);
        match (change.from, change.to, change.cause) {
            (BreakerState::Closed, BreakerState::Open, ChangeCause::ConsecutiveFailures) => {
                assert!(change.consecutive >= USUAL.consecutive_failures);
            }
            (BreakerState::Closed, BreakerState::Open, ChangeCause::FailureRate) => {
                let rate = USUAL.rate.unwrap();
                assert!(change.requests >= rate.min_requests);
                assert!(f64::from(change.failures) >= rate.share * f64::from(change.requests));
            }
            (BreakerState::HalfOpen, BreakerState::Open, ChangeCause::ProbeFailed)
            | (BreakerState::HalfOpen, BreakerState::Closed, ChangeCause::ProbeSucceeded) => {}
            (BreakerState::Open, BreakerState::HalfOpen, ChangeCause::OpenTimeOver) => {
                let (since, length) = self.open.unwrap();
                assert!(now >= since + length);
            }
            _ => panic!("not a legal change: {change:?}"),
        }
        self.state = change.to;
        assert_eq!(change.open_for.is_some(), change.to == BreakerState::Open);
        if let Some(length) = change.open_for {
            if change.from == BreakerState::Closed && now - self.closed_since >= USUAL.open_for_max {
                self.openings = 0;
            }
            self.openings += 1;
            let longest = (USUAL.open_for * 2_u32.pow((self.openings - 1).min(8))).min(USUAL.open_for_max);
            // The time of the probe itself is subtracted.
            let least = if change.cause == ChangeCause::ProbeFailed { USUAL.open_for / 4 } else { longest / 2 };
            assert!(length >= least && length <= longest, "{length:?} of {longest:?}");
            self.open = Some((now, length));
        }
        if change.to == BreakerState::Closed {
            self.closed_since = now;
        }
    }
}

fn walk(seed: u64) -> usize {
    let mut random = fastrand::Rng::with_seed(seed);
    let start = Instant::now();
    let breaker = Breaker::new(start);
    let mut now = start;
    let mut told = Told { state: BreakerState::Closed, open: None, openings: 0, closed_since: start };
    let (mut passes, mut probes) = (Vec::new(), Vec::new());
    let mut changes = 0;
    for _ in 0..2_000 {
        now += random.u32(..40) * MS;
        let outcome = if random.u8(..10) < 4 { Failure } else { Success };
        let change = match random.u8(..6) {
            0..=2 => match breaker.admit(&USUAL, now) {
                Admission::Admit(permit) => {
                    assert_eq!(told.state, BreakerState::Closed);
                    passes.push(permit);
                    None
                }
                Admission::Probe { probe, change } => {
                    probes.push(probe);
                    change
                }
                Admission::Refuse { retry_after } => {
                    assert!(told.state != BreakerState::Closed && !retry_after.is_zero());
                    assert!(retry_after <= USUAL.open_for_max);
                    None
                }
            },
            3..=4 if !passes.is_empty() => {
                let permit = passes.swap_remove(random.usize(..passes.len()));
                breaker.record(permit, &USUAL, outcome, now, random.f64())
            }
            _ if !probes.is_empty() => {
                let probe = probes.swap_remove(random.usize(..probes.len()));
                if random.bool() { probe.record(&USUAL, outcome, now, random.f64()) } else { None }
            }
            _ => None,
        };
        if let Some(change) = change {
            told.take(change, now);
            changes += 1;
        }
        let current = breaker.lock().period;
        let out = probes.iter().filter(|probe| probe.period == current).count();
        assert!(out <= usize::try_from(USUAL.probes).unwrap());
        assert_eq!(out, usize::try_from(breaker.lock().probes).unwrap());
        assert_eq!(breaker.lock().state, told.state);
    }
    changes
}

#[test]
fn only_legal_changes_happen_on_a_random_walk() {
    let mut changes = 0;
    for seed in 0..200 {
        match std::panic::catch_unwind(|| walk(seed)) {
            Ok(count) => changes += count,
            Err(cause) => panic!("seed {seed}: {:?}", cause.downcast_ref::<String>()),
        }
    }
    assert!(changes > 2_000, "only {changes} changes: the walk does not reach what it is to check");
}

#[test]
fn each_change_is_returned_to_exactly_one_of_many_workers() {
    const WORKERS: u64 = 4;
    let start = Instant::now();
    let breaker = Breaker::new(start);
    let clock = AtomicU64::new(0);
    let told = [const { AtomicUsize::new(0) }; 3];
    let work = |seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..20_000 {
            let now = start + Duration::from_micros(clock.fetch_add(500, SeqCst));
            let outcome = if random.bool() { Failure } else { Success };
            let change = match breaker.admit(&USUAL, now) {
                Admission::Admit(permit) => breaker.record(permit, &USUAL, outcome, now, 0.5),
                Admission::Probe { probe, change } => {
                    told[2].fetch_add(usize::from(change.is_some()), SeqCst);
                    probe.record(&USUAL, outcome, now, 0.5)
                }
                Admission::Refuse { .. } => None,
            };
            if let Some(change) = change {
                told[usize::from(change.to == BreakerState::Open)].fetch_add(1, SeqCst);
            }
        }
    };
    let work = &work;
    std::thread::scope(|scope| (0..WORKERS).for_each(|seed| drop(scope.spawn(move || work(seed)))));
    let [closed, opened, half_open] = told.map(AtomicUsize::into_inner);
    let inner = breaker.lock();
    assert!(opened >= 10 && closed >= 10, "{opened} openings, {closed} closings");
    // Each change has a number, so none was returned twice or lost.
    assert_eq!(u64::try_from(closed + opened + half_open).unwrap(), inner.period);
}
