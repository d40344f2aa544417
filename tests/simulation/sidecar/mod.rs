//! One sidecar: the rules of `src/rules/`, composed as `src/proxy/{ties,tries,trial,attempt}.rs` compose them, but over
//! virtual time and without HTTP. Function names are those of the files that they mirror.

mod attempt;
mod claims;
mod correlation;
mod outcome;
mod retry;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use hopguard::policy::model::Direction;
use hopguard::proxy::local_reply::{LocalReply, LocalReplyKind};
use hopguard::rules::circuit_breaker::{
    Admission, Breaker, BreakerPermit, BreakerState, CallResult, GrpcFailures, Probe, Thresholds, is_failed_status,
};
use hopguard::rules::deadline::{self, Deadline, DeadlineSource};
use hopguard::rules::ejection::{EjectionEvent, EjectionGroup, EjectionMember};
use hopguard::rules::inflight::{Correlation, InflightGuard, InflightRequests, ParentRequests};
use hopguard::rules::limits::{ConcurrencyLimit, ConcurrencyPermit};
use hopguard::rules::proxy_status::{ProxyStatus, write_member};
use hopguard::rules::retry::RetryBudget;
use hopguard::rules::retry::{AttemptFailure, AttemptSummary, NoRetryReason, Pushback, RetryDecision};
use hopguard::rules::retry_history::RetryHistory;
use hopguard::rules::trace::{TraceKey, TraceKeys};
use hopguard::upstream::balance::{self, EndpointLoad};
use tokio::time::Instant;

use crate::Mutant;
use crate::checks::{Got, Invariant, Place, Watch};
use crate::ms;
use crate::plan::{Policy, Wrong};
use crate::world::{Answer, Broken, Request, World};

const LATE: u64 = 0;
const LEAST: Duration = Duration::from_millis(1);
const TRIED: usize = 3;

/// Of several endpoints that are due, one is drawn; none loses so often.
const PASSED_OVER: usize = 60;

/// A sidecar: what its two sides have in common, and the sides.
pub(crate) struct Sidecar {
    pub(crate) inbounds: Arc<InflightRequests>,
    spent: RetryHistory,
    late: RetryHistory,
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
    budget: Arc<RetryBudget>,
    breaker: Arc<Breaker>,
    watch: Rc<Watch>,
    endpoints: Vec<Endpoint>,
    group: Arc<EjectionGroup>,
    pub(crate) gate: Arc<ConcurrencyLimit>,
    got: Got,
}

struct Endpoint {
    address: SocketAddr,
    /// Which replica, or which app.
    replica: usize,
    member: Arc<EjectionMember>,
    /// Its members know it by a weak reference.
    _group: Arc<EjectionGroup>,
    watch: Rc<Watch>,
    load: EndpointLoad,
}

impl Sidecar {
    pub(crate) fn new(app: Option<Side>, next: Option<Side>) -> Self {
        Self {
            inbounds: InflightRequests::new(),
            spent: RetryHistory::default(),
            late: RetryHistory::default(),
            app,
            next,
        }
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
        let group = EjectionGroup::new(now);
        let endpoint = |replica: usize| {
            let address = SocketAddr::from(([10, direction as u8, layer as u8, replica as u8], 80));
            // Among strangers each is one of two, and the other one is always in.
            let group = if mutant == Mutant::LastOneEjected { EjectionGroup::new(now) } else { Arc::clone(&group) };
            if mutant == Mutant::LastOneEjected {
                group.member(SocketAddr::from(([10, 9, 9, 9], 9)));
            }
            Endpoint {
                address,
                replica,
                member: group.member(address),
                _group: group,
                watch: Watch::new(format!("{name}/{replica}")),
                load: EndpointLoad::new(now),
            }
        };
        let endpoints = replicas.map(endpoint).collect();
        Self {
            endpoints,
            group,
            watch: Watch::new(name.clone()),
            direction,
            layer,
            id: 1 + layer as u64,
            budget: RetryBudget::new(),
            breaker: Breaker::new(now),
            gate: ConcurrencyLimit::new(if mutant == Mutant::PlacesUnlimited { u32::MAX } else { policy.in_flight }),
            got: Got::default(),
            policy,
            name,
        }
    }
}

#[derive(Default)]
enum BreakerTurn {
    #[default]
    None,
    Permit(BreakerPermit, u64),
    Probe(Probe, Place),
}

#[derive(Default)]
struct Permits {
    destination: BreakerTurn,
    endpoint: BreakerTurn,
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
    entered: Option<InflightGuard>,
    causes: Option<ParentRequests>,
    late_at: Option<Instant>,
    attempt: u32,
    /// Those that the breaker has let through.
    tries: u32,
    endpoint: Option<usize>,
    tried: Vec<SocketAddr>,
    reused: bool,
    unsent: bool,
    was_seen: bool,
    trial: Permits,
    mark: Option<ProxyStatus>,
    failed_at: bool,
    is_answered: bool,
    /// It was answered by whom it was sent to.
    is_the_apps: bool,
}

type Tried = Result<Answer, LocalReplyKind>;

/// What is known of a try that did not go well.
struct FailedAttempt {
    failure: Option<AttemptFailure>,
    counts: bool,
    is_elsewhere: bool,
    unseen: bool,
    mark: Option<ProxyStatus>,
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
        late_at: None,
        attempt: 0,
        tries: 0,
        endpoint: None,
        tried: Vec::new(),
        reused: false,
        unsent: false,
        was_seen: false,
        trial: Permits::default(),
        mark: None,
        failed_at: false,
        is_answered: false,
        is_the_apps: false,
    };
    let tried = live.run().await;
    let (kind, failures) = (tried.as_ref().err().copied(), live.attempt);
    live.is_the_apps = tried.is_ok();
    let answer = live.hand_over(tried);
    live.is_answered = true;
    world.checks.event(|| {
        let (at, call, name) = (world.clock.passed(), live.request.number(), &live.side.name);
        let (status, code, marks, until) = (answer.status, answer.code, &answer.proxy_status, live.until.as_ref());
        let whole = until.map(|until| until.whole);
        format!("{at:?} call {call} at {name}: {status} {code:?} {marks:?} {kind:?}, try {failures}, had {whole:?}")
    });
    live.check_end();
    answer
}

impl Drop for Live<'_> {
    fn drop(&mut self) {
        if self.side.direction == Direction::Outbound {
            return;
        }
        if !self.is_answered {
            // It may be a stream, which lives longer, unless it came with a deadline of its own.
            let is_known = !self.request.grpc || self.until.is_some();
            self.abandon(is_known.then(|| self.request_at()));
        } else if self.is_the_apps {
            self.world.sidecars[self.sidecar].late.remove(self.keys, LATE);
        }
    }
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
    fn begin(&mut self) -> Result<(), LocalReplyKind> {
        let own = &self.world.sidecars[self.sidecar];
        let now = self.began;
        if self.side.direction == Direction::Inbound {
            if self.keys.iter().next().is_none() {
                self.keys = TraceKeys::from(TraceKey::Request(self.world.random(|rng| rng.u128(..))));
                self.request.keys = self.keys;
            }
        } else {
            match own.inbounds.correlate(self.keys) {
                Correlation::ByTrace(causes) => self.causes = Some(causes),
                join => {
                    self.late_at = own.late.at(self.keys, LATE, now);
                    self.causes = join.causes().filter(|_| self.late_at.is_none()).cloned();
                }
            }
        }
        let caller = self.request.timeout.as_deref().and_then(|text| asked(self.request.grpc, text));
        let inbound = self.causes.as_ref().and_then(ParentRequests::deadline).or(self.late_at);
        let (caller, inbound) =
            if self.world.mutant == Mutant::DeadlineIgnored { (None, None) } else { (caller, inbound) };
        let deadline = Deadline::earliest(now, self.side.policy.request, caller, inbound);
        if deadline.from != DeadlineSource::Policy {
            let whole = deadline.left(now).unwrap_or_default();
            self.until = Some(Until { at: deadline.at, whole });
            if whole < LEAST {
                return Err(LocalReplyKind::DeadlineSpent);
            }
        }
        if self.side.direction == Direction::Inbound {
            let at = deadline.at.checked_sub(reserve(deadline.at - now)).unwrap_or(deadline.at);
            self.entered = Some(own.inbounds.register(self.keys, at));
        }
        Ok(())
    }

    /// Takes a place in flight, at once or after a turn in the queue.
    async fn enter(&mut self) -> Result<ConcurrencyPermit, LocalReplyKind> {
        let (world, side) = (self.world, self.side);
        let pass = match side.gate.try_enter() {
            Some(pass) => pass,
            None => {
                let at = (self.began + side.policy.queue_timeout).min(self.request_at());
                match world.clock.within(at, side.gate.enter(side.policy.queue)).await {
                    Some(Ok(pass)) => pass,
                    Some(Err(_)) => return Err(LocalReplyKind::QueueFull),
                    None if self.now() >= self.request_at() => return Err(self.too_late()),
                    None => return Err(LocalReplyKind::QueueTimeout),
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
                Ok(()) => {
                    self.tries = self.attempt;
                    self.send().await
                }
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
            self.tell_replayer(&report, &tried);
            if report.counts {
                self.judge(CallResult::Failure);
            } else if tried.is_ok() && report.is_elsewhere {
                self.has_answered();
            }
            let why = match self.decide(&report, now) {
                RetryDecision::Retry { after } => {
                    self.was_seen |= !report.unseen;
                    if let Some(endpoint) = self.endpoint.take() {
                        self.tried.push(self.side.endpoints[endpoint].address);
                    }
                    self.world.clock.sleep(after).await;
                    if !self.is_abandoned() {
                        self.note_retry(&report);
                        self.attempt += 1;
                        continue;
                    }
                    NoRetryReason::CallerGone
                }
                RetryDecision::Stop(why) => why,
            };
            self.tell(&report, why, self.now());
            if let Ok(answer) = &tried {
                self.judge_complete(answer);
            }
            return tried;
        }
    }

    fn is_fine(&self, answer: &Answer) -> bool {
        let status = answer.status;
        (status < 400 || (status < 500 && !self.side.policy.retry.is_on(AttemptFailure::Status(status))))
            && answer.code.is_none_or(|code| code == 0)
    }

    fn now(&self) -> Instant {
        self.world.clock.now()
    }

    fn request_at(&self) -> Instant {
        let at = self.began + self.side.policy.request;
        self.until.as_ref().map_or(at, |until| at.min(until.at))
    }
}

struct Begun<'a>(&'a EndpointLoad);

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.0.finish();
    }
}

fn kind_name(kind: LocalReplyKind) -> &'static str {
    match kind {
        LocalReplyKind::DeadlineExceeded => "deadline exceeded",
        LocalReplyKind::DeadlineSpent => "deadline spent",
        LocalReplyKind::RequestTimeout => "request timeout",
        LocalReplyKind::PerTryTimeout => "try timeout",
        LocalReplyKind::QueueFull => "queue full",
        LocalReplyKind::QueueTimeout => "queue timeout",
        LocalReplyKind::ConnectFailed => "connect failed",
        LocalReplyKind::UpstreamReset => "reset",
        _ => "refused otherwise",
    }
}

/// The answer in the place of a callee's.
fn refusal(kind: LocalReplyKind, grpc: bool) -> Answer {
    let refusal = LocalReply::plain(kind, "");
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
