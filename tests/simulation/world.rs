//! Services in a chain, each replica with a sidecar before and behind its app; callers; and the network between them.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use fastrand::Rng;
use hopguard::policy::model::Direction;
use hopguard::rules::deadline::{expected_rq_timeout_ms, format_grpc_timeout};
use hopguard::rules::retry::Pushback;
use hopguard::rules::trace::{TraceKey, TraceKeys};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::Mutant;
use crate::checks::{Checks, Invariant};
use crate::clock::Clock;
use crate::ms;
use crate::plan::{Forwards, Plan, Wrong};
use crate::sidecar::{self, Side, Sidecar};

/// So many bytes of a body would be kept; a few requests have more.
const TOO_LONG: f64 = 0.02;

/// How long an app hangs that hangs: longer than anybody waits, but not so long that nobody remembers that it was late.
const HANGS: Duration = ms(8_000);

/// What travels from hop to hop.
#[derive(Clone)]
pub(crate) struct Request {
    /// Which call of an app (or of a first caller) this is; all its tries bear the same number.
    pub(crate) call: u64,
    pub(crate) keys: TraceKeys,
    /// `grpc-timeout` or `x-envoy-expected-rq-timeout-ms`.
    pub(crate) timeout: Option<String>,
    pub(crate) grpc: bool,
    pub(crate) is_safe: bool,
    pub(crate) is_replayable: bool,
    /// What no rule knows: the first call of the chain.
    root: Rc<Root>,
}

/// What comes back.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) code: Option<u32>,
    pub(crate) proxy_status: Vec<String>,
    pub(crate) pushback: Option<Pushback>,
}

/// An app broke the connection off.
pub(crate) struct Broken;

/// A call of the first caller, and all that it causes.
struct Root {
    call: u64,
    began: Duration,
    /// When all that belongs to it has to be over; None where nothing carries that on.
    deadline: Option<Instant>,
    has_own_deadline: bool,
    /// The last app but one calls so often.
    calls_last: u32,
    tries_at_last: Cell<u32>,
    answers: Cell<u32>,
    has_left: Cell<bool>,
}

pub(crate) struct World {
    pub(crate) clock: Clock,
    pub(crate) plan: Plan,
    pub(crate) mutant: Mutant,
    pub(crate) checks: Checks,
    /// That of the first caller, then those of all replicas, the first service first.
    pub(crate) sidecars: Vec<Sidecar>,
    rng: RefCell<Rng>,
    calls: Cell<u64>,
    /// Calls that are not safe and that an app has got.
    seen: RefCell<HashSet<u64>>,
    roots: RefCell<Vec<Rc<Root>>>,
}

impl Request {
    /// The first caller's call, and this one.
    pub(crate) fn number(&self) -> String {
        format!("{}.{}", self.root.call, self.call)
    }

    /// When all that belongs to it has to be over.
    pub(crate) fn ends_by(&self, slack: Duration) -> Option<Instant> {
        self.root.deadline.filter(|_| !self.root.has_left.get()).map(|at| at + slack)
    }
}

impl Answer {
    fn of(status: u16, code: u32, grpc: bool) -> Self {
        let (status, code) = if grpc { (200, Some(code)) } else { (status, None) };
        Self { status, code, proxy_status: Vec::new(), pushback: None }
    }

    fn is_good(&self) -> bool {
        self.status < 400 && self.code.is_none_or(|code| code == 0)
    }
}

impl World {
    pub(crate) fn new(mut rng: Rng, mutant: Mutant, is_told: bool) -> Rc<Self> {
        let plan = Plan::draw(&mut rng);
        let clock = Clock::new();
        let sidecars = sidecars(&plan, clock.begin(), mutant);
        Rc::new(Self {
            clock,
            mutant,
            checks: Checks::new(is_told),
            sidecars,
            plan,
            rng: RefCell::new(rng),
            calls: Cell::default(),
            seen: RefCell::default(),
            roots: RefCell::default(),
        })
    }

    pub(crate) fn random<T>(&self, draw: impl FnOnce(&mut Rng) -> T) -> T {
        draw(&mut self.rng.borrow_mut())
    }

    pub(crate) fn trouble(&self, layer: usize, replica: usize) -> Option<Wrong> {
        self.random(|rng| self.plan.trouble(layer, replica, self.clock.passed(), rng))
    }

    /// Whether the sidecars can always tell where a failure happened.
    pub(crate) fn is_blame_clear(&self) -> bool {
        // An app that makes another failure of a late one hides that it had no time.
        let is_told_why = self.plan.relays_as.is_none() || self.plan.callers.with_deadline == 0.0;
        self.plan.forwards != Forwards::Nothing && self.plan.is_roomy && is_told_why
    }

    /// From the first call until nothing goes on any more.
    pub(crate) fn run(self: &Rc<Self>) {
        let world = Rc::clone(self);
        self.clock.spawn(async move {
            while world.clock.passed() < world.plan.ends {
                let gap = -world.random(Rng::f64).max(1e-9).ln() / world.plan.calls_per_second;
                world.clock.sleep(Duration::from_secs_f64(gap)).await;
                let root = world.root();
                world.roots.borrow_mut().push(Rc::clone(&root));
                let its = Rc::clone(&world);
                world.clock.spawn(async move { its.first_call(root).await });
            }
        });
        let stuck = self.clock.run();
        self.checks.claim(stuck == 0, Invariant::Answers, || format!("{stuck} tasks never end"));
        self.check_roots();
        self.check_places();
    }

    fn root(&self) -> Rc<Root> {
        let callers = &self.plan.callers;
        let (shortest, longest) = callers.deadlines;
        let own =
            self.random(|rng| (rng.f64() < callers.with_deadline).then(|| rng.u64(span(shortest)..=span(longest))));
        let time = own.map_or(self.plan.policies[0].request, |own| ms(own).min(self.plan.policies[0].request));
        let call = self.next_call();
        Rc::new(Root {
            call,
            began: self.clock.passed(),
            deadline: (self.plan.forwards != Forwards::Nothing).then(|| self.clock.now() + time),
            has_own_deadline: own.is_some(),
            calls_last: self.random(|rng| if rng.f64() < 0.1 { 2 } else { 1 }),
            tries_at_last: Cell::new(0),
            answers: Cell::new(0),
            has_left: Cell::new(false),
        })
    }

    async fn first_call(self: Rc<Self>, root: Rc<Root>) {
        let callers = &self.plan.callers;
        let grpc = self.random(|rng| rng.f64() < callers.grpc);
        let own = root.has_own_deadline;
        // A sidecar tells nobody when a gRPC call is to be over that brought no deadline: it might be a stream.
        let root = if grpc && !own { Rc::new(Root { deadline: None, ..root.copy() }) } else { root };
        if grpc && !own {
            self.roots.borrow_mut().retain(|other| other.call != root.call);
            self.roots.borrow_mut().push(Rc::clone(&root));
        }
        let left = root.deadline.map(|at| at - self.clock.now());
        let write = |left| if grpc { format_grpc_timeout(left) } else { expected_rq_timeout_ms(left).to_string() };
        let request = Request {
            call: root.call,
            keys: TraceKeys::from(TraceKey::Trace(self.random(|rng| rng.u128(1..)))),
            timeout: left.filter(|_| own).map(write),
            grpc,
            is_safe: self.random(|rng| rng.f64() < callers.safe),
            is_replayable: self.random(|rng| rng.f64() >= TOO_LONG),
            root: Rc::clone(&root),
        };
        let leaves = self.random(|rng| rng.f64() < callers.leave);
        let patience = if leaves { ms(self.random(|rng| rng.u64(0..500))) } else { ms(3_600_000) };
        let until = self.clock.now() + patience;
        let answer = self.clock.within(until, sidecar::call(&self, 0, Direction::Outbound, request)).await;
        match answer {
            Some(answer) => self.answered(&root, &answer),
            None => root.has_left.set(true),
        }
    }

    fn answered(&self, root: &Root, answer: &Answer) {
        root.answers.set(root.answers.get() + 1);
        self.checks.count(if answer.is_good() { "good answers" } else { "bad answers" });
        let is_settled = root.began >= self.plan.settled_from() && self.plan.is_roomy && !root.has_own_deadline;
        self.checks.claim(answer.is_good() || !is_settled, Invariant::Recovery, || {
            let (status, code, marks) = (answer.status, answer.code, &answer.proxy_status);
            format!("call {} of {:?} got {status} {code:?} {marks:?}", root.call, root.began)
        });
    }

    /// Brings a request to a replica, and its answer back.
    pub(crate) fn deliver<'a>(
        self: &'a Rc<Self>,
        layer: usize,
        replica: usize,
        request: Request,
    ) -> Pin<Box<dyn Future<Output = Answer> + 'a>> {
        Box::pin(async move {
            self.travel().await;
            let answer = sidecar::call(self, self.plan.sidecar(layer, replica), Direction::Inbound, request).await;
            self.travel().await;
            answer
        })
    }

    async fn travel(&self) {
        let time = Duration::from_micros(self.random(|rng| rng.u64(20..150)));
        self.clock.sleep(time).await;
    }

    /// Hands a request to an app.
    pub(crate) async fn work(
        self: &Rc<Self>,
        layer: usize,
        replica: usize,
        request: Request,
    ) -> Result<Answer, Broken> {
        self.checks.count("requests that an app got");
        if layer + 1 == self.plan.layers() {
            request.root.tries_at_last.set(request.root.tries_at_last.get() + 1);
        }
        if !request.is_safe {
            let is_new = self.seen.borrow_mut().insert(request.call);
            self.checks
                .claim(is_new, Invariant::Twice, || format!("call {} came to service {layer} twice", request.call));
        }
        if !self.plan.is_stubborn {
            return self.app(layer, replica, request).await;
        }
        let (answers, answer) = oneshot::channel();
        let world = Rc::clone(self);
        self.clock.spawn(async move {
            let _nobody_waits = answers.send(world.app(layer, replica, request).await);
        });
        answer.await.unwrap_or(Err(Broken))
    }

    async fn app(self: &Rc<Self>, layer: usize, replica: usize, request: Request) -> Result<Answer, Broken> {
        let wrong = self.trouble(layer, replica);
        let time = Duration::from_micros(self.random(|rng| rng.u64(200..4000)));
        self.clock.sleep(time).await;
        match wrong {
            Some(Wrong::Slow(time)) => self.clock.sleep(time).await,
            Some(Wrong::Hangs) => self.clock.sleep(HANGS).await,
            Some(Wrong::Fails { status, code }) => return Ok(Answer::of(status, code, request.grpc)),
            Some(Wrong::Mixed) => {
                let (status, code) = if self.random(Rng::bool) { (503, 14) } else { (500, 13) };
                return Ok(Answer::of(status, code, request.grpc));
            }
            _ => {}
        }
        if layer + 1 < self.plan.layers()
            && let Some(failed) = self.call_next(layer, replica, &request).await
        {
            return Ok(failed);
        }
        if wrong == Some(Wrong::Resets) {
            return Err(Broken);
        }
        Ok(Answer::of(200, 0, request.grpc))
    }

    /// Calls the next service; the first failure is the app's own answer.
    async fn call_next(self: &Rc<Self>, layer: usize, replica: usize, request: &Request) -> Option<Answer> {
        let is_last = layer + 2 == self.plan.layers();
        for _ in 0..if is_last { request.root.calls_last } else { 1 } {
            let forwards = self.plan.forwards;
            let request = Request {
                call: self.next_call(),
                keys: if forwards == Forwards::Nothing { TraceKeys::default() } else { request.keys },
                timeout: request.timeout.clone().filter(|_| forwards == Forwards::Everything),
                ..request.clone()
            };
            let grpc = request.grpc;
            let own = self.plan.sidecar(layer, replica);
            let answer = Box::pin(sidecar::call(self, own, Direction::Outbound, request)).await;
            if !answer.is_good() {
                let status = self.plan.relays_as.unwrap_or(answer.status);
                let relayed = Answer::of(status, answer.code.unwrap_or(14), grpc);
                let copied = if self.plan.copies_marks { answer.proxy_status } else { Vec::new() };
                return Some(Answer { proxy_status: copied, ..relayed });
            }
        }
        None
    }

    fn next_call(&self) -> u64 {
        self.calls.set(self.calls.get() + 1);
        self.calls.get()
    }

    fn check_roots(&self) {
        let is_clear = self.plan.only_the_last_fails() && self.is_blame_clear() && !self.plan.relays_wrongly();
        // The sidecar before the app tries once more itself what may have been a race.
        let for_a_race = if self.plan.breaks_off() { 2 } else { 1 };
        let tries = for_a_race * (1 + self.plan.policies[0].retry.attempts.value);
        for root in self.roots.borrow().iter() {
            let (call, answers) = (root.call, root.answers.get());
            let expected = u32::from(!root.has_left.get());
            self.checks.claim(answers == expected, Invariant::Answers, || format!("call {call}: {answers} answers"));
            let (at_last, most) = (root.tries_at_last.get(), tries * root.calls_last);
            self.checks.claim(!is_clear || at_last <= most, Invariant::OnePlace, || {
                format!("call {call}: {at_last} tries at the last service, {most} allowed")
            });
        }
    }

    fn check_places(&self) {
        for own in &self.sidecars {
            let inbound = own.inbounds.in_flight();
            self.checks.claim(inbound == 0, Invariant::Places, || format!("{inbound} inbound requests are left"));
            for side in [&own.app, &own.next].into_iter().flatten() {
                let held = side.gate.in_flight() + side.gate.waiting();
                self.checks.claim(held == 0, Invariant::Places, || format!("{}: {held} places are held", side.name));
            }
        }
    }
}

impl Root {
    fn copy(&self) -> Self {
        Self {
            call: self.call,
            began: self.began,
            deadline: self.deadline,
            has_own_deadline: self.has_own_deadline,
            calls_last: self.calls_last,
            tries_at_last: Cell::new(0),
            answers: Cell::new(0),
            has_left: Cell::new(false),
        }
    }
}

impl Plan {
    /// The position of a replica's sidecar.
    fn sidecar(&self, layer: usize, replica: usize) -> usize {
        1 + self.replicas[..layer].iter().sum::<usize>() + replica
    }
}

fn span(time: Duration) -> u64 {
    time.as_millis() as u64
}

fn sidecars(plan: &Plan, now: Instant, mutant: Mutant) -> Vec<Sidecar> {
    let next = |from: String, layer: usize| {
        let (count, policy) = (*plan.replicas.get(layer)?, plan.policies.get(layer)?);
        let name = format!("{from}->{}", service(layer));
        Some(Side::new(name, Direction::Outbound, layer, 0..count, policy.clone(), (now, mutant)))
    };
    let mut all = vec![Sidecar::new(None, next("caller".to_owned(), 0))];
    for (layer, count) in plan.replicas.iter().enumerate() {
        for replica in 0..*count {
            let name = format!("{}{replica}", service(layer));
            let policy = plan.policies[layer].clone();
            let only = replica..replica + 1;
            let app = Side::new(format!("->{name}"), Direction::Inbound, layer, only, policy, (now, mutant));
            all.push(Sidecar::new(Some(app), next(name, layer + 1)));
        }
    }
    all
}

/// A, B, C, D.
fn service(layer: usize) -> char {
    char::from(b'A' + layer as u8)
}
