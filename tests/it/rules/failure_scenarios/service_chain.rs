//! A -> B -> C -> D with a hopguard behind each of A, B and C, and optionally one before each app. The apps forward the trace
//! id only, return the status of the service they call, and finish their work after their caller has left.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::support::Mesh;
use crate::support::http::{Answer, Body, Caller, Speaks, empty, full, request};
use crate::support::upstream::{Upstream, policy};

/// The body of each POST.
pub(super) const PAY: &str = "pay 5";

/// What D does with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Does {
    Answer,
    Fail,
    /// Nothing, until it does something else.
    Hang,
}

/// D's app.
pub(super) struct Bank {
    pub(super) upstream: Upstream,
    does: watch::Sender<Does>,
}

impl Bank {
    async fn open() -> Self {
        let (does, seen) = watch::channel(Does::Answer);
        let upstream = Upstream::http1(move |_| {
            let mut does = seen.clone();
            async move {
                let does = does.wait_for(|does| *does != Does::Hang).await.map_or(Does::Fail, |does| *does);
                status(if does == Does::Fail { 503 } else { 200 })
            }
        });
        Self { upstream: upstream.await, does }
    }

    /// From now on it does this.
    pub(super) fn turn(&self, does: Does) {
        self.does.send_replace(does);
    }
}

/// The app of A, B or C, and the hopguard at its side.
pub(super) struct Service {
    pub(super) mesh: Mesh,
    pub(super) app: Upstream,
    pub(super) busy: Arc<Busy>,
}

/// How many calls an app works on.
#[derive(Default)]
pub(super) struct Busy {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Busy {
    /// Now.
    pub(super) fn now(&self) -> usize {
        self.now.load(SeqCst)
    }

    /// The most since this was asked last.
    pub(super) fn most(&self) -> usize {
        self.most.swap(0, SeqCst)
    }
}

/// A call that an app works on.
struct Work(Arc<Busy>);

impl Work {
    fn begin(busy: &Arc<Busy>) -> Self {
        let now = busy.now.fetch_add(1, SeqCst) + 1;
        busy.most.fetch_max(now, SeqCst);
        Self(Arc::clone(busy))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, SeqCst);
    }
}

/// What differs from row to row.
#[derive(Default)]
pub(super) struct Setting<'a> {
    /// A hopguard before each app too, D's included.
    pub(super) both_sides: bool,
    /// The modes of rules.
    pub(super) rules: &'a str,
    /// More for the destinations `b`, `c` and `d` of the calls out of A, B and C.
    pub(super) destinations: [&'a str; 3],
    /// What B does before it calls C.
    pub(super) b_takes: Duration,
}

/// All of it.
pub(super) struct Chain {
    pub(super) services: [Service; 3],
    pub(super) bank: Bank,
    before_the_bank: Option<Mesh>,
    /// Where callers call A.
    pub(super) door: SocketAddr,
}

impl Chain {
    pub(super) async fn start(setting: &Setting<'_>) -> Self {
        let bank = Bank::open().await;
        let mut next = bank.upstream.addr;
        let mut before_the_bank = None;
        if setting.both_sides {
            let written = policy(next, "").replace("to: app", "to: d").replace("name: app", "name: d");
            let mesh = Mesh::start(&format!("{written}rules: {{ {} }}\n", setting.rules)).await;
            next = mesh.addr("in");
            before_the_bank = Some(mesh);
        }
        let c = service(["c", "d"], &mut next, setting, 2).await;
        let b = service(["b", "c"], &mut next, setting, 1).await;
        let a = service(["a", "b"], &mut next, setting, 0).await;
        Self { services: [a, b, c], bank, before_the_bank, door: next }
    }

    pub(super) async fn stop(self) {
        for service in self.services {
            service.mesh.stop().await;
        }
        if let Some(mesh) = self.before_the_bank {
            mesh.stop().await;
        }
    }
}

/// Starts one that calls `next`, which then becomes where this one is called.
async fn service(names: [&str; 2], next: &mut SocketAddr, setting: &Setting<'_>, position: usize) -> Service {
    let (out, busy) = (Arc::<OnceLock<SocketAddr>>::default(), Arc::<Busy>::default());
    let takes = if position == 1 { setting.b_takes } else { Duration::ZERO };
    let (door, counted) = (Arc::clone(&out), Arc::clone(&busy));
    let app = Upstream::http1(move |asked: Request<Incoming>| {
        let (next, counted) = (*door.get().expect("the sidecar runs"), Arc::clone(&counted));
        let work = tokio::spawn(async move {
            let _work = Work::begin(&counted);
            sleep(takes).await;
            call_on(next, &asked).await
        });
        async move { status(work.await.map_or(500, |answer| answer.status.as_u16())) }
    })
    .await;
    let mesh = Mesh::start(&text(names, app.addr, *next, setting, position)).await;
    out.set(mesh.addr("out")).unwrap();
    *next = if setting.both_sides { mesh.addr("in") } else { app.addr };
    Service { mesh, app, busy }
}

fn text([name, next]: [&str; 2], app: SocketAddr, to: SocketAddr, setting: &Setting<'_>, position: usize) -> String {
    let before = |line: String| if setting.both_sides { line } else { String::new() };
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: {name}
rules: {{ {rules} }}
listeners:
{listener}  - {{ name: out, bind: \"127.0.0.1:0\", to: {next}, direction: outbound }}
destinations:
{destination}  - name: {next}
    endpoints: [\"{to}\"]
{more}
",
        rules = setting.rules,
        listener = before(format!("  - {{ name: in, bind: \"127.0.0.1:0\", to: {name} }}\n")),
        destination = before(format!("  - {{ name: {name}, endpoints: [\"{app}\"], timeouts: {{ request: 30s }} }}\n")),
        more = setting.destinations[position],
    )
}

/// An answer with nothing but a status.
pub(super) fn status(status: u16) -> Response<Body> {
    Response::builder().status(status).body(full("said")).unwrap()
}

async fn call_on(next: SocketAddr, asked: &Request<Incoming>) -> Answer {
    let mut onward = ask_for(asked.method());
    if let Some(trace) = asked.headers().get("traceparent") {
        onward.headers_mut().insert("traceparent", trace.clone());
    }
    Caller::open(Speaks::Http1, next).await.ask(onward).await
}

fn ask_for(method: &Method) -> Request<Body> {
    request(method.as_str(), "/pay").body(if method == Method::POST { full(PAY) } else { empty() }).unwrap()
}

/// A request with a trace id that no other has.
pub(super) fn traced(method: &Method) -> Request<Body> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let trace = format!("00-{:032x}-b7ad6b7169203331-01", NEXT.fetch_add(1, SeqCst));
    let mut asked = ask_for(method);
    asked.headers_mut().insert("traceparent", trace.parse().unwrap());
    asked
}

/// One call of a test, and what became of it.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) begun: Instant,
    pub(super) ended: Instant,
    pub(super) status: u16,
    pub(super) said: String,
}

impl Call {
    pub(super) async fn make(to: SocketAddr, method: Method) -> Self {
        let begun = Instant::now();
        let answer = Caller::open(Speaks::Http1, to).await.ask(traced(&method)).await;
        let said = String::from_utf8_lossy(&answer.body).into_owned();
        Self { method, begun, ended: Instant::now(), status: answer.status.as_u16(), said }
    }

    pub(super) fn failed(&self) -> bool {
        self.status != 200
    }

    pub(super) fn took(&self) -> Duration {
        self.ended - self.begun
    }
}

/// So many GETs, one each `gap`, whatever becomes of those before. Waits for all.
pub(super) async fn steady(to: SocketAddr, calls: usize, gap: Duration) -> Vec<Call> {
    let mut under_way = JoinSet::new();
    let mut beat = tokio::time::interval(gap);
    for _ in 0..calls {
        beat.tick().await;
        under_way.spawn(Call::make(to, Method::GET));
    }
    under_way.join_all().await
}

/// Callers who pause between two calls, whose methods take turns, until they are told to stop.
pub(super) struct Callers {
    stop: watch::Sender<bool>,
    calls: Arc<Mutex<Vec<Call>>>,
    tasks: JoinSet<()>,
}

impl Callers {
    pub(super) fn begin(to: SocketAddr, methods: [Method; 2], count: u32, pause: Duration) -> Self {
        let (stop, calls) = (watch::Sender::new(false), Arc::<Mutex<Vec<Call>>>::default());
        let mut tasks = JoinSet::new();
        for number in 0..count {
            let (noted, over, methods) = (Arc::clone(&calls), stop.subscribe(), methods.clone());
            tasks.spawn(async move {
                sleep(pause * number / count).await;
                for method in methods.into_iter().cycle() {
                    if *over.borrow() {
                        return;
                    }
                    let call = Call::make(to, method).await;
                    noted.lock().unwrap().push(call);
                    sleep(pause).await;
                }
            });
        }
        Self { stop, calls, tasks }
    }

    /// How many calls have gone well so far.
    pub(super) fn good(&self) -> usize {
        self.count(|call| !call.failed())
    }

    /// How many calls of a kind have ended so far.
    pub(super) fn count(&self, is_one: impl Fn(&Call) -> bool) -> usize {
        self.calls.lock().unwrap().iter().filter(|call| is_one(call)).count()
    }

    /// Ends it; every call that has begun is waited for.
    pub(super) async fn end(self) -> Vec<Call> {
        self.stop.send_replace(true);
        self.tasks.join_all().await;
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}
