//! One sidecar: the rules of `src/rules/`, composed as `src/proxy/{ties,tries,trial,attempt}.rs` compose them, but over
//! virtual time and without HTTP. Function names are those of the files that they mirror.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use hopguard::policy::model::Direction;
use hopguard::proxy::refusal::{Kind, Refusal};
use hopguard::rules::breaker::{
    Admission, Breaker, Outcome, Pass, Probe, State, Thresholds, is_failed_code, is_failed_status,
};
use hopguard::rules::budget::Budget;
use hopguard::rules::deadline::{self, Deadline, Source};
use hopguard::rules::ejection::{Event, Group, Member};
use hopguard::rules::gate::{self, Gate};
use hopguard::rules::joined::{Causes, Entered, Inbounds, Join};
use hopguard::rules::mark::Mark;
use hopguard::rules::retry::{self, Decision, Failure, Pushback, Seen, Why};
use hopguard::rules::spent::Spent;
use hopguard::rules::trace::{TraceKey, TraceKeys};
use hopguard::upstream::balance::{self, Load};
use tokio::time::Instant;

use crate::Mutant;
use crate::checks::{Got, Invariant, Place, Watch};
use crate::ms;
use crate::plan::{Policy, Wrong};
use crate::world::{Answer, Broken, Request, World};

const LATE: u64 = 0;
const LEAST: Duration = Duration::from_millis(1);
const TRIED: usize = 3;

/// A sidecar: what its two sides have in common, and the sides.
pub(crate) struct Sidecar {
    pub(crate) inbounds: Arc<Inbounds>,
    spent: Spent,
    late: Spent,
    /// Towards its app.
    pub(crate) app: Option<Side>,
    /// Towards the next service.
    pub(crate) next: Option<Side>,
}

/// One destination, as one sidecar sees it.
pub(crate) struct Side {
    pub(crate) name: String,
    direction: Direction,
    /// The service that the calls go to.
    layer: usize,
    id: u64,
    policy: Policy,
    budget: Arc<Budget>,
    breaker: Arc<Breaker>,
    watch: Rc<Watch>,
    endpoints: Vec<Endpoint>,
    pub(crate) gate: Arc<Gate>,
    got: Got,
}

struct Endpoint {
    address: SocketAddr,
    /// Which replica, or which app.
    replica: usize,
    member: Arc<Member>,
    /// Its members know it by a weak reference.
    _group: Arc<Group>,
    watch: Rc<Watch>,
    load: Load,
}

impl Sidecar {
    pub(crate) fn new(app: Option<Side>, next: Option<Side>) -> Self {
        Self { inbounds: Inbounds::new(), spent: Spent::default(), late: Spent::default(), app, next }
    }

    fn side(&self, direction: Direction) -> &Side {
        match direction {
            Direction::Inbound => self.app.as_ref(),
            Direction::Outbound => self.next.as_ref(),
        }
        .unwrap()
    }
}

impl Side {
    pub(crate) fn new(
        name: String,
        direction: Direction,
        layer: usize,
        replicas: impl Iterator<Item = usize>,
        policy: Policy,
        (now, mutant): (Instant, Mutant),
    ) -> Self {
        let group = Group::new(now);
        let endpoint = |replica: usize| {
            let address = SocketAddr::from(([10, direction as u8, layer as u8, replica as u8], 80));
            // Among strangers each is one of two, and the other one is always in.
            let group = if mutant == Mutant::LastOneEjected { Group::new(now) } else { Arc::clone(&group) };
            if mutant == Mutant::LastOneEjected {
                group.member(SocketAddr::from(([10, 9, 9, 9], 9)));
            }
            Endpoint {
                address,
                replica,
                member: group.member(address),
                _group: group,
                watch: Watch::new(format!("{name}/{replica}")),
                load: Load::new(now),
            }
        };
        Self {
            endpoints: replicas.map(endpoint).collect(),
            watch: Watch::new(name.clone()),
            direction,
            layer,
            id: 1 + layer as u64,
            budget: Budget::new(),
            breaker: Breaker::new(now),
            gate: Gate::new(if mutant == Mutant::PlacesUnlimited { u32::MAX } else { policy.in_flight }),
            got: Got::default(),
            policy,
            name,
        }
    }
}

#[derive(Default)]
enum Turn {
    #[default]
    None,
    Pass(Pass, u64),
    Probe(Probe, Place),
}

#[derive(Default)]
struct Trial {
    destination: Turn,
    endpoint: Turn,
}

struct Until {
    at: Instant,
    whole: Duration,
}

/// One exchange under way.
struct Live<'a> {
    world: &'a Rc<World>,
    sidecar: usize,
    side: &'a Side,
    request: Request,
    began: Instant,
    until: Option<Until>,
    keys: TraceKeys,
    entered: Option<Entered>,
    causes: Option<Causes>,
    attempt: u32,
    endpoint: Option<usize>,
    tried: Vec<SocketAddr>,
    reused: bool,
    unsent: bool,
    trial: Trial,
    mark: Option<Mark>,
    failed_at: bool,
}

type Tried = Result<Answer, Kind>;

/// What is known of a try that did not go well.
struct Report {
    failure: Option<Failure>,
    counts: bool,
    unseen: bool,
    mark: Option<Mark>,
    pushback: Option<Pushback>,
}

/// A request, from when a sidecar has it until there is an answer.
pub(crate) async fn call(world: &Rc<World>, sidecar: usize, direction: Direction, request: Request) -> Answer {
    let own = &world.sidecars[sidecar];
    let side = own.side(direction);
    let began = world.clock.now();
    let mut live = Live {
        world,
        sidecar,
        side,
        keys: request.keys,
        request,
        began,
        until: None,
        entered: None,
        causes: None,
        attempt: 0,
        endpoint: None,
        tried: Vec::new(),
        reused: false,
        unsent: false,
        trial: Trial::default(),
        mark: None,
        failed_at: false,
    };
    let tried = live.run().await;
    let answer = live.hand_over(tried);
    live.check_end();
    answer
}

impl Live<'_> {
    async fn run(&mut self) -> Tried {
        self.begin()?;
        let place = self.enter().await?;
        let tried = self.tries().await;
        if self.world.mutant == Mutant::PlaceKept && self.world.random(|rng| rng.f64() < 0.01) {
            std::mem::forget(place);
        }
        tried
    }

    /// Finds out how much time the call has, and ties it to others.
    fn begin(&mut self) -> Result<(), Kind> {
        let own = &self.world.sidecars[self.sidecar];
        let now = self.began;
        let mut is_late = false;
        if self.side.direction == Direction::Inbound {
            if self.keys.iter().next().is_none() {
                self.keys = TraceKeys::from(TraceKey::Request(self.world.random(|rng| rng.u128(..))));
                self.request.keys = self.keys;
            }
        } else {
            match own.inbounds.join(self.keys) {
                Join::ByTrace(causes) => self.causes = Some(causes),
                _ if own.late.knows(self.keys, LATE, now) => is_late = true,
                Join::OnlyOne(causes) => self.causes = Some(causes),
                Join::NotJoined | Join::NoInbound => {}
            }
        }
        let caller = self.request.timeout.as_deref().and_then(|text| asked(self.request.grpc, text));
        let inbound = self.causes.as_ref().map(Causes::deadline).or(is_late.then_some(now));
        let (caller, inbound) =
            if self.world.mutant == Mutant::DeadlineIgnored { (None, None) } else { (caller, inbound) };
        let deadline = Deadline::earliest(now, self.side.policy.request, caller, inbound);
        if deadline.from != Source::Policy {
            let whole = deadline.left(now).unwrap_or_default();
            self.until = Some(Until { at: deadline.at, whole });
            if whole < LEAST {
                return Err(Kind::DeadlineSpent);
            }
        }
        if self.side.direction == Direction::Inbound {
            let at = deadline.at.checked_sub(reserve(deadline.at - now)).unwrap_or(deadline.at);
            self.entered = Some(own.inbounds.enter(self.keys, at));
        }
        Ok(())
    }

    /// Takes a place in flight, at once or after a turn in the queue.
    async fn enter(&mut self) -> Result<gate::Pass, Kind> {
        let (world, side) = (self.world, self.side);
        let pass = match side.gate.try_enter() {
            Some(pass) => pass,
            None => {
                let at = self.began + side.policy.queue_timeout;
                match world.clock.within(at, side.gate.enter(side.policy.queue)).await {
                    Some(Ok(pass)) => pass,
                    Some(Err(_)) => return Err(Kind::QueueFull),
                    None => return Err(Kind::QueueTimeout),
                }
            }
        };
        let (now, most) = (side.gate.in_flight(), side.policy.in_flight);
        world.checks.claim(now <= most, Invariant::Places, || format!("{}: {now} calls at once", side.name));
        side.got.calls.set(side.got.calls.get() + 1);
        Ok(pass)
    }

    /// Sends the request until there is an answer that stands.
    async fn tries(&mut self) -> Tried {
        self.attempt = 1;
        loop {
            let tried = match self.admit() {
                Ok(()) => self.send().await,
                Err(kind) => Err(kind),
            };
            if let Ok(answer) = &tried
                && self.is_fine(answer)
            {
                self.judge_complete(answer);
                return tried;
            }
            let now = self.now();
            let report = self.report(&tried);
            if report.counts {
                self.judge(Outcome::Failure);
            }
            match self.decide(&report, now) {
                Decision::Again { after } => {
                    self.note_retry(&report);
                    if let Some(endpoint) = self.endpoint.take() {
                        self.tried.push(self.side.endpoints[endpoint].address);
                    }
                    self.attempt += 1;
                    self.world.clock.sleep(after).await;
                }
                Decision::Stop(why) => {
                    self.tell(&report, why, &tried, now);
                    if let Ok(answer) = &tried {
                        self.judge_complete(answer);
                    }
                    return tried;
                }
            }
        }
    }

    fn is_fine(&self, answer: &Answer) -> bool {
        let status = answer.status;
        (status < 400 || (status < 500 && !self.side.policy.retry.is_on(Failure::Status(status))))
            && answer.code.is_none_or(|code| code == 0)
    }

    fn now(&self) -> Instant {
        self.world.clock.now()
    }

    fn request_at(&self) -> Instant {
        let at = self.began + self.side.policy.request;
        self.until.as_ref().map_or(at, |until| at.min(until.at))
    }

    // The live side of `circuitBreaker` and `ejection`.

    fn thresholds(&self) -> Thresholds {
        let thresholds = self.side.policy.breaker;
        match self.world.mutant {
            Mutant::ProbesUnlimited => Thresholds { probes: u32::MAX, open_for: ms(2), ..thresholds },
            Mutant::NeverOpens => Thresholds { consecutive_failures: u32::MAX, rate: None, ..thresholds },
            _ => thresholds,
        }
    }

    fn ejection(&self) -> Thresholds {
        let thresholds = self.side.policy.ejection;
        match self.world.mutant {
            Mutant::EjectedForEver => Thresholds { open_for: ms(3_600_000), open_for_max: ms(7_200_000), ..thresholds },
            _ => thresholds,
        }
    }

    fn admit(&mut self) -> Result<(), Kind> {
        self.trial = Trial::default();
        let (watch, checks, now) = (&self.side.watch, &self.world.checks, self.now());
        let thresholds = self.thresholds();
        match self.side.breaker.admit(&thresholds, now) {
            Admission::Pass(pass) => self.trial.destination = Turn::Pass(pass, watch.passes(checks)),
            Admission::Probe { probe, change } => {
                if let Some(change) = change {
                    watch.changed(&change, &self.side.policy.breaker, now, checks);
                }
                self.trial.destination = Turn::Probe(probe, watch.probes(self.side.policy.breaker.probes, checks));
            }
            Admission::Refuse { .. } => {
                watch.refuses(checks);
                checks.count("refused by a breaker");
                return Err(Kind::CircuitOpen);
            }
        }
        Ok(())
    }

    fn enlist(&mut self, position: usize) -> bool {
        let (endpoint, checks, now) = (&self.side.endpoints[position], &self.world.checks, self.now());
        let thresholds = self.ejection();
        self.trial.endpoint = match endpoint.member.admit(&thresholds, now) {
            Admission::Pass(pass) => Turn::Pass(pass, endpoint.watch.passes(checks)),
            Admission::Probe { probe, change } => {
                if let Some(change) = change {
                    endpoint.watch.changed(&change, &self.side.policy.ejection, now, checks);
                }
                Turn::Probe(probe, endpoint.watch.probes(self.side.policy.ejection.probes, checks))
            }
            Admission::Refuse { .. } => {
                endpoint.watch.refuses(checks);
                return false;
            }
        };
        true
    }

    fn judge(&mut self, outcome: Outcome) {
        let trial = std::mem::take(&mut self.trial);
        let (side, checks, now) = (self.side, &self.world.checks, self.now());
        let thresholds = self.thresholds();
        let random = self.world.random(Rng::f64);
        let most = side.policy.breaker.consecutive_failures;
        let change = match trial.destination {
            Turn::None => None,
            Turn::Pass(pass, period) => {
                let change = side.breaker.record(pass, &thresholds, outcome, now, random);
                side.watch.judged(period, outcome, change.is_some(), most, checks);
                change
            }
            Turn::Probe(probe, place) => {
                drop(place);
                probe.record(&thresholds, outcome, now, random)
            }
        };
        if let Some(change) = change {
            side.watch.changed(&change, &side.policy.breaker, now, checks);
            self.check_blame(change.to == State::Open, &side.watch.name);
        }
        if let Some(position) = self.endpoint {
            self.judge_endpoint(position, trial.endpoint, outcome);
        }
    }

    fn judge_endpoint(&self, position: usize, turn: Turn, outcome: Outcome) {
        let (side, checks, now) = (self.side, &self.world.checks, self.now());
        let Endpoint { member, watch, .. } = &side.endpoints[position];
        let thresholds = self.ejection();
        let random = self.world.random(Rng::f64);
        let event = match turn {
            Turn::None => None,
            Turn::Pass(pass, period) => {
                let event = member.record(pass, &thresholds, outcome, now, random);
                watch.judged(period, outcome, event.is_some(), side.policy.ejection.consecutive_failures, checks);
                event
            }
            Turn::Probe(probe, place) => {
                drop(place);
                probe.record(&thresholds, outcome, now, random).map(Event::Ejected)
            }
        };
        match event {
            Some(Event::Ejected(change)) => {
                watch.changed(&change, &side.policy.ejection, now, checks);
                self.check_blame(change.to == State::Open, &watch.name);
                let is_one_in = side.endpoints.iter().any(|one| one.watch.state() == State::Closed);
                checks.claim(is_one_in, Invariant::LastOne, || format!("{}: all are out", side.name));
            }
            Some(Event::Kept { .. }) => watch.kept(checks),
            None => {}
        }
    }

    fn judge_complete(&mut self, answer: &Answer) {
        if is_failed_status(answer.status) {
            return;
        }
        if !answer.code.is_some_and(is_failed_code) {
            self.side.budget.earn();
            self.side.got.good.set(self.side.got.good.get() + 1);
            self.judge(Outcome::Success);
        } else if !self.failed_at {
            self.judge(Outcome::Failure);
        }
    }

    fn is_callees_fault(&self, kind: Kind) -> bool {
        match kind {
            Kind::ConnectFailed | Kind::UpstreamReset | Kind::PerTryTimeout | Kind::RequestTimeout => true,
            Kind::DeadlineExceeded => !self.is_in_a_hurry(),
            _ => false,
        }
    }

    fn is_in_a_hurry(&self) -> bool {
        self.until.as_ref().is_some_and(|until| until.whole < self.side.policy.request / 2)
    }

    // One try.

    fn pick_now(&self, now: Instant) -> usize {
        let endpoints = &self.side.endpoints;
        if endpoints.len() == 1 {
            return 0;
        }
        let was_tried = |one: &Endpoint| self.tried.contains(&one.address);
        let due = endpoints.iter().position(|one| one.member.is_due(now) && !was_tried(one));
        if let Some(due) = due.filter(|_| self.world.mutant != Mutant::EjectedForEver) {
            return due;
        }
        let faults = |one: &Endpoint| u8::from(was_tried(one)) << 2 | u8::from(one.member.is_out(now)) << 1;
        let fewest = endpoints.iter().map(faults).min().unwrap();
        let good: Vec<_> = (0..endpoints.len()).filter(|one| faults(&endpoints[*one]) == fewest).collect();
        let load = |position: usize| &endpoints[good[position]].load;
        good[self.world.random(|rng| balance::pick(good.len(), load, rng, now)).unwrap()]
    }

    fn pick(&mut self, now: Instant) -> usize {
        self.endpoint = None;
        let mut position = self.pick_now(now);
        if !self.enlist(position) {
            position = self.pick_now(now);
            let _ = self.enlist(position);
        }
        self.check_nobody_starves(position, now);
        self.endpoint = Some(position);
        position
    }

    async fn send(&mut self) -> Tried {
        let (world, side) = (self.world, self.side);
        self.unsent = true;
        let mut position = self.pick(self.now());
        // Nothing has been sent, so that whoever can be reached may have the call.
        for left in (0..TRIED).rev() {
            if self.is_there(position) {
                break;
            }
            world.clock.sleep(ms(1)).await;
            let address = side.endpoints[position].address;
            side.endpoints[position].load.failed(ms(1), self.now());
            if left == 0 || !self.has_other(position) {
                return Err(Kind::ConnectFailed);
            }
            let turn = std::mem::take(&mut self.trial.endpoint);
            self.judge_endpoint(position, turn, Outcome::Failure);
            self.tried.push(address);
            position = self.pick(self.now());
        }
        let began = self.now();
        if began >= self.request_at() {
            return Err(self.too_late());
        }
        self.unsent = false;
        self.reused = world.random(|rng| rng.f64() < 0.8);
        self.check_try(began);
        let request = self.outgoing(began);
        let per_try = side.policy.per_try.map(|time| began + time).filter(|_| side.direction == Direction::Outbound);
        let until = per_try.map_or(self.request_at(), |at| at.min(self.request_at()));
        let until = if world.mutant == Mutant::TimeIgnored { until + ms(300) } else { until };
        let endpoint = &side.endpoints[position];
        endpoint.load.begin();
        let begun = Begun(&endpoint.load);
        let (layer, replica) = (side.layer, endpoint.replica);
        let answer = world.clock.within(until, async {
            match side.direction {
                Direction::Outbound => Ok(world.deliver(layer, replica, request).await),
                Direction::Inbound => world.work(layer, replica, request).await,
            }
        });
        let answer = answer.await;
        drop(begun);
        let took = self.now() - began;
        match answer {
            Some(Ok(answer)) => {
                match answer.status >= 500 {
                    true => endpoint.load.failed(took, self.now()),
                    false => endpoint.load.answered(took, self.now()),
                }
                Ok(answer)
            }
            Some(Err(Broken)) => {
                endpoint.load.failed(took, self.now());
                Err(Kind::UpstreamReset)
            }
            None => {
                endpoint.load.failed(took, self.now());
                Err(if per_try == Some(until) { Kind::PerTryTimeout } else { self.too_late() })
            }
        }
    }

    fn too_late(&self) -> Kind {
        if self.until.is_some() { Kind::DeadlineExceeded } else { Kind::RequestTimeout }
    }

    fn is_there(&self, position: usize) -> bool {
        let wrong = self.world.trouble(self.side.layer, self.side.endpoints[position].replica);
        let away = if self.side.direction == Direction::Inbound { Wrong::AppDown } else { Wrong::Gone };
        wrong != Some(away)
    }

    fn has_other(&self, this: usize) -> bool {
        let endpoints = self.side.endpoints.iter().enumerate();
        endpoints.into_iter().any(|(position, other)| position != this && !self.tried.contains(&other.address))
    }

    /// What goes to the next hop, with the time that is left written into it.
    fn outgoing(&self, now: Instant) -> Request {
        let mut request = self.request.clone();
        request.keys = self.keys;
        if self.request.grpc && self.until.is_none() {
            return request;
        }
        let left = self.request_at().saturating_duration_since(now);
        let left = left.saturating_sub(reserve(left));
        request.timeout = Some(match request.grpc {
            true => deadline::format_grpc_timeout(left),
            false => deadline::format_expected_rq_timeout_ms(left),
        });
        request
    }

    // Whether another try follows.

    fn report(&self, tried: &Tried) -> Report {
        let answer = match tried {
            Ok(answer) => answer,
            Err(kind) => {
                let failure = match kind {
                    Kind::ConnectFailed => Some(Failure::Reset),
                    Kind::UpstreamReset if self.unsent => Some(Failure::Unsent),
                    Kind::UpstreamReset => Some(Failure::Reset),
                    Kind::PerTryTimeout => Some(Failure::Timeout),
                    _ => None,
                };
                let counts = self.is_callees_fault(*kind);
                return Report { failure, counts, unseen: self.unsent, mark: None, pushback: None };
            }
        };
        let mark = Mark::read(answer.proxy_status.iter().map(String::as_bytes));
        let is_unsent = mark.as_ref().is_some_and(|mark| mark.is_unsent);
        let mut failure = answer.code.map_or(Failure::Status(answer.status), Failure::Grpc);
        if is_unsent && self.endpoint.is_some_and(|this| self.has_other(this)) {
            failure = Failure::Unsent;
        }
        let elsewhere = mark.as_ref().is_some_and(|mark| mark.at.is_some());
        let is_failed = answer.code.map_or_else(|| is_failed_status(answer.status), is_failed_code);
        let counts = is_failed && (!elsewhere || self.world.mutant == Mutant::BlameIgnored);
        Report { failure: Some(failure), counts, unseen: is_unsent, mark, pushback: answer.pushback }
    }

    fn decide(&self, report: &Report, now: Instant) -> Decision {
        let Some(failure) = report.failure else { return Decision::Stop(Why::NotAFailure) };
        if self.side.direction == Direction::Inbound
            && !(failure == Failure::Unsent || (failure == Failure::Reset && self.reused))
        {
            return Decision::Stop(Why::AtTheCaller);
        }
        let own = &self.world.sidecars[self.sidecar];
        let is_spent = self.side.direction == Direction::Outbound && own.spent.knows(self.keys, self.side.id, now);
        let is_marked = report.mark.as_ref().is_some_and(|mark| mark.is_final) || is_spent;
        let seen = Seen {
            tries: self.attempt,
            failure,
            is_safe: self.request.is_safe || report.unseen || self.world.mutant == Mutant::SafetyIgnored,
            is_marked_final: is_marked && self.world.mutant != Mutant::MarkIgnored,
            pushback: report.pushback.filter(|_| self.world.mutant != Mutant::MarkIgnored),
            is_replayable: self.request.is_replayable,
            left: self.request_at().saturating_duration_since(now),
            random: self.world.random(Rng::f64),
        };
        let retry = &self.side.policy.retry;
        match self.world.mutant {
            Mutant::BudgetIgnored => retry.decide(&seen),
            _ => retry.next(&seen, &self.side.budget, now),
        }
    }

    fn note_retry(&self, report: &Report) {
        let got = &self.side.got;
        self.world.checks.event(|| {
            let (call, name, try_) = (self.request.call, &self.side.name, self.attempt);
            format!(
                "{:?} call {call} at {name}: again after try {try_}, {:?}",
                self.world.clock.passed(),
                report.failure
            )
        });
        if report.failure == Some(Failure::Unsent) {
            self.world.checks.count("retries of the unsent");
            got.unsent.set(got.unsent.get() + 1);
            return;
        }
        self.world.checks.count("retries");
        got.retries.set(got.retries.get() + 1);
        let budget = &self.side.policy.retry.budget;
        let time = self.world.clock.passed().as_secs_f64();
        let allowed = 10.0 + f64::from(budget.min_per_second.value) * time + budget.ratio.value * got.good.get() as f64;
        let retries = got.retries.get();
        self.world.checks.claim(retries as f64 <= allowed + 1e-6, Invariant::Budget, || {
            format!("{}: {retries} retries, {allowed} allowed after {time}s", self.side.name)
        });
    }

    fn tell(&mut self, report: &Report, why: Why, tried: &Tried, now: Instant) {
        let is_failure = report.failure.is_some_and(retry::is_failure);
        if is_failure {
            self.world.checks.count(why.name());
        }
        if is_failure && tried.is_ok() {
            let is_final =
                matches!(why, Why::TriesUsedUp | Why::RetriedBelow | Why::PushedBack | Why::Deadline | Why::Budget);
            self.failed(report.mark.as_ref(), is_final, now);
        }
    }

    // What sidecars tell each other.

    fn failed(&mut self, below: Option<&Mark>, is_final: bool, now: Instant) {
        if self.side.direction == Direction::Inbound {
            return;
        }
        let is_final = is_final || below.is_some_and(|mark| mark.is_final);
        let at = below.and_then(|mark| mark.at.clone()).unwrap_or_else(|| self.side.name.as_str().into());
        self.failed_at = below.is_some();
        let mark = Mark { is_final, is_unsent: false, at: Some(at) };
        if let Some(causes) = &self.causes {
            causes.blame(&mark);
        }
        if mark.is_final {
            self.world.sidecars[self.sidecar].spent.note(self.keys, self.side.id, now);
        }
        self.mark = Some(mark);
    }

    fn blamed(&self) -> Option<Mark> {
        self.entered.as_ref()?.inbound().blamed()
    }

    fn refused(&mut self, kind: Kind) {
        let now = self.now();
        if self.side.direction == Direction::Outbound {
            if kind.is_of_the_callee() {
                self.failed(None, true, now);
            }
            return;
        }
        if matches!(kind, Kind::RequestTimeout | Kind::DeadlineExceeded) {
            self.world.sidecars[self.sidecar].late.note(self.keys, LATE, now);
        }
        let mut mark = self.blamed().unwrap_or_default();
        mark.is_unsent = kind.is_before_the_app();
        self.mark = Some(mark);
    }

    /// The answer on its way back: the callee's with our mark, or one of our own.
    fn hand_over(&mut self, tried: Tried) -> Answer {
        let (mut answer, is_own) = match tried {
            Ok(answer) => {
                let is_failed = answer.code.map_or(answer.status >= 500, is_failed_code);
                if !is_failed {
                    return answer;
                }
                if self.side.direction == Direction::Inbound {
                    self.mark = self.blamed();
                }
                (answer, false)
            }
            Err(kind) => {
                self.world.checks.count(kind_name(kind));
                self.refused(kind);
                (refusal(kind, self.request.grpc), true)
            }
        };
        let mark = self.mark.clone().unwrap_or_default();
        if is_own || self.mark.is_some() || !answer.proxy_status.is_empty() {
            answer.proxy_status.push(format!("hopguard{}", mark.write_parameters()));
        }
        if mark.is_final && self.request.grpc {
            answer.pushback = Some(Pushback::Stop);
        }
        answer
    }

    // What is checked.

    /// So much later than at the first caller a deadline may be: each hop counts anew from when the request comes in, and
    /// gives no less than a millisecond.
    fn slack(&self) -> Duration {
        ms(2) * u32::try_from(2 * self.side.layer + 2).unwrap()
    }

    fn check_try(&self, now: Instant) {
        let (checks, got) = (&self.world.checks, &self.side.got);
        got.tries.set(got.tries.get() + 1);
        let at = self.began + self.side.policy.request;
        checks.claim(now < at, Invariant::Deadline, || format!("{}: a try begins {:?} late", self.side.name, now - at));
        if let Some(at) = self.request.ends_by(self.slack()) {
            checks.claim(now <= at, Invariant::Deadline, || {
                format!("call {} at {}: a try begins {:?} late", self.request.call, self.side.name, now - at)
            });
        }
        let most = got.calls.get() + got.retries.get() + got.unsent.get();
        let tries = got.tries.get();
        checks.claim(tries <= most, Invariant::Budget, || format!("{}: {tries} tries, {most} allowed", self.side.name));
    }

    fn check_end(&self) {
        let (now, checks) = (self.now(), &self.world.checks);
        let own = self.began + self.side.policy.request;
        let at = self.request.ends_by(self.slack()).map_or(own, |at| at.min(own));
        checks.claim(now <= at, Invariant::Deadline, || {
            format!("call {} at {} ends {:?} late", self.request.call, self.side.name, now - at)
        });
    }

    /// A breaker may open only where something has been wrong, as far as that can be told apart.
    fn check_blame(&self, opens: bool, name: &str) {
        let plan = &self.world.plan;
        if opens && self.world.is_blame_clear() {
            let is_right = plan.was_wrong(self.side.layer, self.world.clock.passed());
            self.world.checks.claim(is_right, Invariant::Blame, || {
                format!("{name} opens, and nothing was ever wrong with service {}", self.side.layer)
            });
        }
    }

    /// An endpoint whose time is over is tried by one of the next calls, and one that is out gets none.
    fn check_nobody_starves(&self, picked: usize, now: Instant) {
        let endpoints = &self.side.endpoints;
        let longest = self.side.policy.ejection.open_for_max;
        for (position, one) in endpoints.iter().enumerate() {
            let is_mine = position == picked || self.tried.contains(&one.address);
            if !is_mine && one.watch.is_due(longest, now) {
                let passed = one.watch.passed_over.get() + 1;
                one.watch.passed_over.set(passed);
                self.world.checks.claim(passed <= endpoints.len(), Invariant::Starved, || {
                    format!("{} is due and was passed over {passed} times", one.watch.name)
                });
            }
        }
        let is_out = endpoints[picked].watch.state() != State::Closed && matches!(self.trial.endpoint, Turn::None);
        // That a call has tried an endpoint weighs more than that another one is out.
        let is_first = self.tried.is_empty();
        let name = &endpoints[picked].watch.name;
        self.world.checks.claim(!(is_out && is_first), Invariant::Breaker, || format!("{name} is out and gets a call"));
    }
}

struct Begun<'a>(&'a Load);

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.0.finish();
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::DeadlineExceeded => "deadline exceeded",
        Kind::DeadlineSpent => "deadline spent",
        Kind::RequestTimeout => "request timeout",
        Kind::PerTryTimeout => "try timeout",
        Kind::QueueFull => "queue full",
        Kind::QueueTimeout => "queue timeout",
        Kind::ConnectFailed => "connect failed",
        Kind::UpstreamReset => "reset",
        _ => "refused otherwise",
    }
}

/// The answer in the place of a callee's.
fn refusal(kind: Kind, grpc: bool) -> Answer {
    let refusal = Refusal::plain(kind, "");
    let status = refusal.status().as_u16();
    let busy = (status == 503).then_some(Pushback::Wait(ms(1000)));
    match grpc {
        true => Answer { status: 200, code: Some(refusal.grpc().0 as u32), proxy_status: Vec::new(), pushback: busy },
        false => Answer { status, code: None, proxy_status: Vec::new(), pushback: busy },
    }
}

fn asked(grpc: bool, text: &str) -> Option<Duration> {
    match grpc {
        true => deadline::parse_grpc_timeout(text.as_bytes()).ok(),
        false => deadline::parse_expected_rq_timeout_ms(text.as_bytes()).ok().flatten(),
    }
}

/// What a hop keeps of the time for the way back.
fn reserve(left: Duration) -> Duration {
    (left / 100).clamp(ms(1), ms(10))
}
