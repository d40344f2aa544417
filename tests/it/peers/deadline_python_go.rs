//! A -> B -> C, each app a process of its own between the two listeners of its own hopguard. The apps use aiohttp (Python) and
//! `net/http` (Go), and forward all fields, the trace id only, or no field: the deadline passes through in each case.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::peers::process::Server;
use crate::support::http::{Answer, ask, empty, request};
use crate::support::{Mesh, SOON, eventually, peer, python};

const EXPECTED: &str = "x-envoy-expected-rq-timeout-ms";
const ATTEMPT_COUNT: &str = "x-envoy-attempt-count";
const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// What an app does with the fields of a call.
const FORWARDS: [&str; 3] = ["all", "trace", "nothing"];

/// How long C works where that is waited for.
const WORK: u64 = 2000;

/// How long it would work where it is to be stopped. Longer, so that an overloaded machine is no reason to fail.
const LONG_WORK: u64 = 60_000;

/// Well below that, and well above a deadline of a second on any machine.
const STOPPED: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Language {
    Python,
    Go,
}

use Language::{Go, Python};

/// A, B and C: each language is in the middle once.
const ORDERS: [[Language; 3]; 2] = [[Python, Go, Python], [Go, Python, Go]];

struct Service {
    app: Server,
    mesh: Mesh,
}

/// A, B and C.
struct Chain(Vec<Service>);

/// Both sides of an app. `next` of the last one is never called.
fn both_sides(app: u64, next: SocketAddr, rules: &str) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
rules: {{ {rules} }}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", to: app, direction: inbound }}
  - {{ name: out, bind: \"127.0.0.1:0\", to: next, direction: outbound }}
defaults:
  timeouts: {{ request: 8s }}
  retry: off
destinations:
  - {{ name: app, endpoints: [\"127.0.0.1:{app}\"] }}
  - {{ name: next, endpoints: [\"{next}\"] }}
"
    )
}

impl Service {
    /// An app that calls the outbound listener of its own hopguard, which calls `next`.
    async fn start(command: Command, next: Option<SocketAddr>, rules: &str) -> Self {
        let mut app = Server::run(command).await;
        let nobody = "127.0.0.1:1".parse().unwrap();
        let mesh = Mesh::start(&both_sides(app.port("port"), next.unwrap_or(nobody), rules)).await;
        if next.is_some() {
            app.ask(&json!({ "next": mesh.addr("out").to_string() })).await;
        }
        Self { app, mesh }
    }

    fn correlations(&self, result: &str) -> f64 {
        self.mesh.metric("hopguard_correlations_total", &[&format!("result=\"{result}\"")])
    }

    /// The access log line of the last call to `destination`, once there are so many.
    async fn line(&self, destination: &str, count: usize) -> Value {
        eventually(|| {
            let log = self.mesh.log();
            let lines = log.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
            let lines: Vec<_> = lines.filter(|line| line["destination"] == destination).collect();
            (lines.len() >= count).then(|| lines.last().unwrap().clone())
        })
        .await
    }
}

impl Chain {
    /// Starts it, C first. `None` where a language is not there and need not be.
    async fn start(order: [Language; 3], rules: &str) -> Option<Self> {
        let (python, go) = (python()?, peer("service-go")?);
        let command = |language| match language {
            Python => {
                let script: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers/service.py");
                let mut command = Command::new(&python);
                command.arg(script);
                command
            }
            Go => Command::new(&go),
        };
        let c = Service::start(command(order[2]), None, rules).await;
        let b = Service::start(command(order[1]), Some(c.mesh.addr("in")), rules).await;
        let a = Service::start(command(order[0]), Some(b.mesh.addr("in")), rules).await;
        Some(Self(vec![a, b, c]))
    }

    async fn set(&mut self, service: usize, settings: &Value) {
        self.0[service].app.ask(settings).await;
    }

    /// What all of them do with the fields of a call; what A and B do before they call on, and C before it answers.
    async fn does(&mut self, forward: &str, millis: [u64; 3]) {
        for (service, name) in ["pause_ms", "pause_ms", "take_ms"].into_iter().enumerate() {
            self.set(service, &json!({ "forward": forward, name: millis[service] })).await;
        }
    }

    /// Calls A with a trace id and these fields more.
    fn call(&self, fields: &[(&'static str, &'static str)]) -> JoinHandle<Answer> {
        let mut asked = request("GET", "/pay").header("traceparent", TRACEPARENT);
        for (name, value) in fields {
            asked = asked.header(*name, *value);
        }
        let (to, asked) = (self.0[0].mesh.addr("in"), asked.body(empty()).unwrap());
        tokio::spawn(async move { ask(to, asked).await })
    }

    /// All calls that each app has had.
    async fn calls(&mut self) -> [Vec<Value>; 3] {
        let mut all = [const { Vec::new() }; 3];
        for (service, calls) in self.0.iter_mut().zip(&mut all) {
            *calls = service.app.ask(&json!({})).await.as_array().unwrap().clone();
        }
        all
    }

    /// The same, once it is as wanted.
    async fn calls_when(&mut self, wanted: impl Fn(&[Vec<Value>; 3]) -> bool) -> [Vec<Value>; 3] {
        let begun = Instant::now();
        loop {
            let calls = self.calls().await;
            if wanted(&calls) {
                return calls;
            }
            assert!(begun.elapsed() < SOON, "it did not happen: {calls:#?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// The same, once nobody works any more.
    async fn calls_at_rest(&mut self) -> [Vec<Value>; 3] {
        self.calls_when(|calls| calls.iter().flatten().all(|call| call["over"] == true)).await
    }

    /// A call without a deadline and without work, which opens all the connections.
    async fn warm_up(&mut self, forward: &str) {
        self.does(forward, [0, 0, 0]).await;
        assert_eq!(self.call(&[]).await.unwrap().status, 200);
        self.calls_at_rest().await;
    }

    async fn stop(self) {
        for service in self.0 {
            service.mesh.stop().await;
        }
    }
}

/// The last call that each app has had.
fn last(calls: &[Vec<Value>; 3]) -> [&Value; 3] {
    calls.each_ref().map(|calls| calls.last().unwrap())
}

/// The time that an app was told in a call.
fn told(call: &Value) -> u64 {
    call["fields"][EXPECTED].as_str().unwrap_or_else(|| panic!("{call}")).parse().unwrap()
}

fn took(call: &Value) -> Duration {
    Duration::from_secs_f64(call["ms"].as_f64().unwrap() / 1000.0)
}

#[tokio::test]
async fn a_deadline_goes_through_apps_of_two_languages_whatever_they_forward() {
    for order in ORDERS {
        let Some(mut chain) = Chain::start(order, "").await else { return };
        for forward in FORWARDS {
            let case = format!("{order:?} {forward}");
            chain.warm_up(forward).await;
            let result = if forward == "nothing" { "only_in_flight" } else { "by_trace_id" };
            let before: Vec<f64> = chain.0[..2].iter().map(|service| service.correlations(result)).collect();
            chain.does(forward, [25, 25, LONG_WORK]).await;

            let begun = Instant::now();
            let answer = chain.call(&[(EXPECTED, "1000")]).await.unwrap();
            let answered = begun.elapsed();
            let calls = chain.calls_at_rest().await;
            let rested = begun.elapsed();
            assert_eq!(answer.status, 504, "{case}: {answer:?}");
            assert_eq!(answer.problem()["refusal"], "deadline_exceeded", "{case}: {answer:?}");
            assert!(answered > Duration::from_millis(800) && answered < STOPPED, "{case}: {answered:?}");
            assert!(rested < STOPPED, "{case}: work went on until {rested:?}");

            let [a, b, c] = last(&calls);
            assert!(took(a) < STOPPED && took(b) < STOPPED && took(c) < STOPPED, "{case}: {calls:#?}");
            assert_eq!((&a["status"], &b["status"], &c["left"]), (&504.into(), &504.into(), &true.into()), "{case}");
            let heard = [told(a), told(b), told(c)];
            assert!(heard[0] < 1000 && heard[1] + 25 <= heard[0] && heard[2] + 25 <= heard[1], "{case}: {heard:?}");
            let trace = c["fields"]["traceparent"].as_str();
            assert_eq!(trace, (forward != "nothing").then_some(TRACEPARENT), "{case}");

            for (at, service) in chain.0[..2].iter().enumerate() {
                assert_eq!(service.correlations(result), before[at] + 1.0, "{case}");
                let line = service.line("next", calls[at].len()).await;
                assert_eq!((&line["status"], &line["deadline_from"]), (&504.into(), &"inbound".into()), "{line}");
                assert!(line["deadline_ms"].as_f64().is_some_and(|left| left < 1000.0), "{line}");
            }
            let line = chain.0[2].line("app", calls[2].len()).await;
            // Where the machine is slow, B's hopguard leaves a moment before C's has lost patience.
            assert!(line["outcome"] == "deadline_exceeded" || line["outcome"] == "caller_gone", "{line}");
            assert_eq!(line["deadline_from"], "caller", "{line}");
        }
        chain.stop().await;
    }
}

/// Calls without the rule, which each take as long as C works.
async fn without_the_rule(order: [Language; 3]) {
    let Some(mut chain) = Chain::start(order, "deadline: off").await else { return };
    for forward in FORWARDS {
        let case = format!("{order:?} {forward}");
        // B calls on after the deadline, and C is reached all the same.
        chain.does(forward, [0, 450, WORK]).await;
        let answer = chain.call(&[(EXPECTED, "400")]).await.unwrap();
        assert_eq!(answer.status, 200, "{case}: {answer:?}");
        let calls = chain.calls_at_rest().await;
        let [a, b, c] = last(&calls);
        let work = Duration::from_millis(WORK);
        assert!(took(a) >= work && took(b) >= work && took(c) >= work, "{case}: {calls:#?}");
        assert_eq!(c["left"], false, "{case}: all above wait for it");
        let heard = b["fields"][EXPECTED].as_str();
        assert_eq!(heard, (forward == "all").then_some("400"), "{case}: nobody keeps account of the time");
    }
    chain.stop().await;
}

#[tokio::test]
async fn without_the_rule_the_same_apps_work_on_for_a_call_that_is_late() {
    // Side by side, because nothing here depends on who is fast.
    tokio::join!(without_the_rule(ORDERS[0]), without_the_rule(ORDERS[1]));
}

#[tokio::test]
async fn two_calls_at_once_through_apps_that_forward_nothing_keep_their_own_time() {
    for order in ORDERS {
        let Some(mut chain) = Chain::start(order, "").await else { return };
        chain.does("nothing", [0, 0, WORK]).await;
        let first = chain.call(&[(EXPECTED, "6000")]);
        chain.calls_when(|calls| calls[2].len() == 1).await;
        let begun = Instant::now();
        let second = chain.call(&[(EXPECTED, "1000")]).await.unwrap();
        assert_eq!(second.problem()["refusal"], "deadline_exceeded", "{order:?}: {second:?}");
        assert!(begun.elapsed() < STOPPED, "{order:?}: {:?}", begun.elapsed());
        assert_eq!(first.await.unwrap().status, 200, "{order:?}: it has more time than the second one");
        let calls = chain.calls_at_rest().await;
        for service in &chain.0[..2] {
            assert_eq!(
                (service.correlations("only_in_flight"), service.correlations("ambiguous")),
                (1.0, 1.0),
                "{order:?}"
            );
        }
        for calls in &calls[1..] {
            let heard = [told(&calls[0]), told(&calls[1])];
            assert!(heard[0] < 6000, "{order:?}: joined with its own request: {heard:?}");
            assert!(heard[1] > 6000, "{order:?}: the policy's time, and nobody else's: {heard:?}");
        }
        chain.stop().await;
    }
}

#[tokio::test]
async fn an_app_that_calls_on_after_the_deadline_reaches_nobody() {
    for order in ORDERS {
        let Some(mut chain) = Chain::start(order, "").await else { return };
        for (late, forward) in FORWARDS.into_iter().enumerate() {
            let case = format!("{order:?} {forward}");
            chain.warm_up(forward).await;
            let reached = chain.calls().await[2].len();
            chain.does(forward, [0, 800, 0]).await;
            let answer = chain.call(&[(EXPECTED, "500")]).await.unwrap();
            assert_eq!(answer.problem()["refusal"], "deadline_exceeded", "{case}: {answer:?}");
            let calls = chain.calls_at_rest().await;
            let (b, reached) = (last(&calls)[1], calls[2].len() - reached);
            let service = &chain.0[1];
            if forward == "nothing" {
                // Nothing tells that somebody had asked for it.
                assert_eq!((&b["status"], reached, service.correlations("no_parent")), (&200.into(), 1, 1.0), "{case}");
                continue;
            }
            assert_eq!((&b["status"], reached), (&504.into(), 0), "{case}");
            service.mesh.ended("deadline_spent", late + 1).await;
            assert_eq!(service.correlations("parent_expired"), late as f64 + 1.0, "{case}");
        }
        let spent: Vec<f64> = chain.0.iter().map(|service| service.mesh.count("deadline_spent")).collect();
        assert_eq!(spent, [0.0, 2.0, 0.0], "{order:?}");
        chain.stop().await;
    }
}

#[tokio::test]
async fn an_app_that_forwards_all_fields_does_not_pass_on_which_try_it_was() {
    for order in ORDERS {
        let Some(mut chain) = Chain::start(order, "").await else { return };
        chain.does("all", [0, 0, 0]).await;
        assert_eq!(chain.call(&[(ATTEMPT_COUNT, "3"), ("x-tenant", "blue")]).await.unwrap().status, 200);
        let calls = chain.calls_at_rest().await;
        let fields = last(&calls).map(|call| (call["fields"][ATTEMPT_COUNT].as_str(), &call["fields"]["x-tenant"]));
        let blue = &json!("blue");
        assert_eq!(fields, [(Some("3"), blue), (None, blue), (None, blue)], "{order:?}");
        chain.stop().await;
    }
}
