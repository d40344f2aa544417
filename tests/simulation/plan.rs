//! What a seed decides: the services, their policy, what goes wrong with them and when, and who calls.

use std::fmt;
use std::time::Duration;

use fastrand::Rng;
use hopguard::rules::circuit_breaker::CircuitBreaker;
use hopguard::rules::circuit_breaker::Thresholds;
use hopguard::rules::ejection::Ejection;
use hopguard::rules::retry::Retry;

use crate::ms;

/// All that a run depends on.
#[derive(Debug)]
pub(crate) struct Plan {
    /// How many replicas each service has, the first service first.
    pub(crate) replicas: Vec<usize>,
    pub(crate) troubles: Vec<Trouble>,
    /// From then on all is well.
    pub(crate) well_from: Duration,
    /// The last call begins before.
    pub(crate) ends: Duration,
    pub(crate) calls_per_second: f64,
    pub(crate) callers: Callers,
    /// The policy of each hop, the one to the first service first.
    pub(crate) policies: Vec<Policy>,
    pub(crate) forwards: Forwards,
    /// An app goes on working for a caller who has gone.
    pub(crate) is_stubborn: bool,
    /// An app answers all failures of its callee with this status.
    pub(crate) relays_as: Option<u16>,
    /// An app copies `Proxy-Status` from its callee's answer.
    pub(crate) copies_marks: bool,
    /// There is a place in flight for everybody.
    pub(crate) is_roomy: bool,
}

/// The policy of one hop, as the rules take it.
#[derive(Clone)]
pub(crate) struct Policy {
    pub(crate) retry: Retry,
    pub(crate) breaker: Thresholds,
    pub(crate) ejection: Thresholds,
    pub(crate) request: Duration,
    pub(crate) per_try: Option<Duration>,
    pub(crate) in_flight: u32,
    pub(crate) queue: u32,
    pub(crate) queue_timeout: Duration,
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { retry, breaker, ejection, request, per_try, in_flight, queue, queue_timeout } = self;
        let (attempts, budget) = (retry.attempts.value, &retry.budget);
        write!(f, "{attempts} retries, {} per call and {}/s; ", budget.ratio.value, budget.min_per_second.value)?;
        write!(f, "request {request:?}, perTry {per_try:?}; ")?;
        write!(f, "{in_flight} in flight, queue {queue} {queue_timeout:?}; {breaker:?}; {ejection:?}")
    }
}

/// Who calls the first service.
#[derive(Debug)]
pub(crate) struct Callers {
    /// The share of calls that may be repeated without harm.
    pub(crate) safe: f64,
    pub(crate) grpc: f64,
    /// The share that brings a deadline of its own, and how long that is.
    pub(crate) with_deadline: f64,
    pub(crate) deadlines: (Duration, Duration),
    /// The share that goes away before the answer.
    pub(crate) leave: f64,
}

/// What an app passes on of the request that it works for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forwards {
    Everything,
    TraceId,
    Nothing,
}

/// Something that is wrong with a replica for a while.
#[derive(Debug)]
pub(crate) struct Trouble {
    pub(crate) layer: usize,
    /// None: with all of them.
    pub(crate) replica: Option<usize>,
    pub(crate) from: Duration,
    pub(crate) until: Duration,
    /// It comes and goes: so long with, so long without.
    pub(crate) flaps: Option<Duration>,
    /// The share of calls that meet it.
    pub(crate) share: f64,
    pub(crate) kind: Wrong,
}

/// What can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// Answers, but so much later.
    Slow(Duration),
    /// Answers that it failed.
    Fails { status: u16, code: u32 },
    /// Sometimes 503, sometimes 500.
    Mixed,
    /// Never answers.
    Hangs,
    /// Does the work, then breaks off.
    Resets,
    /// The app accepts no connection; its sidecar does.
    AppDown,
    /// The whole replica is not there.
    Gone,
}

impl Plan {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let layers = 1 + rng.usize(..4);
        let replicas: Vec<_> = (0..layers).map(|_| 1 + rng.usize(..4)).collect();
        let (calm_until, well_from) = (ms(500), ms(500 + rng.u64(2000..6000)));
        let is_roomy = rng.f64() < 0.7;
        let policies = policies(rng, layers, is_roomy);
        // What a breaker needs to close, one hop after the other; the rest is for calls that must go well.
        let ends = well_from + settling(&policies) + ms(2000);
        Self {
            troubles: troubles(rng, &replicas, calm_until, well_from),
            replicas,
            well_from,
            ends,
            calls_per_second: 20.0 + 130.0 * rng.f64(),
            callers: callers(rng),
            policies,
            forwards: [Forwards::Everything, Forwards::TraceId, Forwards::TraceId, Forwards::Nothing][rng.usize(..4)],
            is_stubborn: rng.f64() < 0.3,
            relays_as: [None, Some(503), Some(500), Some(502)][rng.usize(..4)],
            copies_marks: rng.f64() < 0.2,
            is_roomy,
        }
    }

    pub(crate) fn layers(&self) -> usize {
        self.replicas.len()
    }

    /// Only the last service has troubles.
    pub(crate) fn only_the_last_fails(&self) -> bool {
        self.troubles.iter().all(|trouble| trouble.layer + 1 == self.layers())
    }

    /// An app makes a failure that is to be tried again of one that is not, so that the hop above tries it again.
    pub(crate) fn relays_wrongly(&self) -> bool {
        let is_off = |kind| matches!(kind, Wrong::Mixed | Wrong::Fails { status: 500, .. });
        let is_wanted = matches!(self.relays_as, Some(502 | 503));
        is_wanted && self.troubles.iter().any(|trouble| is_off(trouble.kind))
    }

    /// Apps break off: over a connection that was kept alive nobody can tell that from the race with one that closes it.
    pub(crate) fn breaks_off(&self) -> bool {
        self.troubles.iter().any(|trouble| trouble.kind == Wrong::Resets)
    }

    /// Something has been wrong with a service until now.
    pub(crate) fn was_wrong(&self, layer: usize, passed: Duration) -> bool {
        self.troubles.iter().any(|trouble| trouble.layer == layer && trouble.from <= passed)
    }

    /// From then on each call goes well.
    pub(crate) fn settled_from(&self) -> Duration {
        self.well_from + settling(&self.policies)
    }

    /// What a call meets that comes to a replica.
    pub(crate) fn trouble(&self, layer: usize, replica: usize, passed: Duration, rng: &mut Rng) -> Option<Wrong> {
        let is_on = |trouble: &&Trouble| {
            let phase = passed.saturating_sub(trouble.from).as_nanos();
            trouble.layer == layer
                && trouble.replica.is_none_or(|one| one == replica)
                && (trouble.from..trouble.until).contains(&passed)
                && trouble.flaps.is_none_or(|time| (phase / time.as_nanos()).is_multiple_of(2))
        };
        self.troubles.iter().filter(is_on).find(|trouble| rng.f64() < trouble.share).map(|trouble| trouble.kind)
    }
}

fn settling(policies: &[Policy]) -> Duration {
    policies.iter().map(|policy| policy.request.max(policy.breaker.open_for_max) + policy.breaker.open_for_max).sum()
}

fn policies(rng: &mut Rng, layers: usize, is_roomy: bool) -> Vec<Policy> {
    let mut retry = Retry::built_in();
    retry.attempts.value = 1 + rng.u32(..3);
    retry.budget.ratio.value = [0.05, 0.2, 0.5, 1.0][rng.usize(..4)];
    retry.budget.min_per_second.value = [0, 1, 1, 10][rng.usize(..4)];
    let mut breaker = CircuitBreaker::built_in();
    breaker.consecutive_failures.value = 2 + rng.u32(..8);
    breaker.failure_rate.value = 0.3 + 0.6 * rng.f64();
    breaker.probes.value = 1 + rng.u32(..4);
    breaker.open_for.value = ms(rng.u64(50..400));
    breaker.open_for_max.value = breaker.open_for.value * (1 + rng.u32(..4));
    let mut ejection = Ejection::built_in();
    ejection.consecutive_failures.value = 2 + rng.u32(..5);
    ejection.eject_for.value = ms(rng.u64(200..3000));
    ejection.eject_for_max.value = ejection.eject_for.value * (1 + rng.u32(..4));
    let request = ms(rng.u64(300..2000));
    let policy = Policy {
        retry,
        breaker: breaker.thresholds().unwrap(),
        ejection: ejection.thresholds().unwrap(),
        request,
        per_try: None,
        in_flight: if is_roomy { 100_000 } else { 1 + rng.u32(..12) },
        queue: rng.u32(..20),
        queue_timeout: ms(rng.u64(5..100)),
    };
    let mut policies = vec![policy; layers];
    // Only at the last hop: a hop above it would give up on calls that are still tried again further down.
    let last = policies.last_mut().unwrap();
    last.per_try = (rng.f64() < 0.3).then(|| request / 4);
    policies
}

fn troubles(rng: &mut Rng, replicas: &[usize], from: Duration, until: Duration) -> Vec<Trouble> {
    let only_the_last = rng.f64() < 0.5;
    let millis = |time: Duration| time.as_millis() as u64;
    let trouble = |rng: &mut Rng| {
        let layer = if only_the_last { replicas.len() - 1 } else { rng.usize(..replicas.len()) };
        let begins = ms(rng.u64(millis(from)..millis(until) - 500));
        Trouble {
            layer,
            replica: (rng.f64() < 0.6).then(|| rng.usize(..replicas[layer])),
            from: begins,
            until: ms(rng.u64(millis(begins) + 100..=millis(until))),
            flaps: (rng.f64() < 0.25).then(|| ms(rng.u64(20..600))),
            share: if rng.f64() < 0.6 { 1.0 } else { 0.2 + 0.7 * rng.f64() },
            kind: wrong(rng),
        }
    };
    (0..1 + rng.usize(..4)).map(|_| trouble(rng)).collect()
}

fn wrong(rng: &mut Rng) -> Wrong {
    match rng.usize(..8) {
        0 => Wrong::Slow(ms(rng.u64(20..3000))),
        1 => Wrong::Hangs,
        2 => Wrong::Resets,
        3 => Wrong::AppDown,
        4 => Wrong::Gone,
        5 => Wrong::Mixed,
        _ => Wrong::Fails { status: [500, 502, 503, 504][rng.usize(..4)], code: [2, 13, 14, 14][rng.usize(..4)] },
    }
}

fn callers(rng: &mut Rng) -> Callers {
    let shortest = ms([3, 20, 100, 300][rng.usize(..4)]);
    Callers {
        safe: [0.0, 0.5, 0.8, 1.0][rng.usize(..4)],
        grpc: [0.0, 0.0, 0.5, 1.0][rng.usize(..4)],
        with_deadline: [0.0, 0.0, 0.3, 1.0][rng.usize(..4)],
        deadlines: (shortest, shortest * 10),
        leave: [0.0, 0.0, 0.1][rng.usize(..3)],
    }
}
