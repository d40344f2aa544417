//! A chain of services, A -> B -> C -> D, each app between an inbound and an outbound listener of its own hopguard; the apps
//! forward the trace id only. D's hop alone retries a failure of D, opens a breaker for it, and reports calls that did not
//! reach D's app.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use hyper::body::Incoming;
use hyper::{Method, Request, Response};

use crate::support::bank::{Bank, Say, behind_a_caller};
use crate::support::http::{Answer, Body, Caller, Speaks, ask, empty, full, grpc_request, request};
use crate::support::upstream::{Gate, Upstream, nobody, policy};
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

const CHARGE: &str = "/shop.v1.Payment/Charge";

/// A service on the way: its app, and its hopguard.
struct Service {
    name: &'static str,
    mesh: Mesh,
    _app: Option<Upstream>,
}

/// The whole chain.
struct Chain {
    bank: Bank,
    /// In the order in which a call meets them: A, B, C, D.
    services: Vec<Service>,
    speaks: Speaks,
}

/// No breaker, no ejection and no budget comes between the retries, which are what is to be seen.
const RETRIES_ONLY: &str = "  circuitBreaker: off
  ejection: off
  retry: { idempotent: true, backoff: { base: 1ms, max: 1ms }, budget: { minPerSecond: 100000 } }";

/// Both sides of an app in one policy.
fn both_sides(name: &str, app: SocketAddr, next: (&str, &[SocketAddr]), rules: &str, defaults: &str) -> String {
    let endpoints: Vec<_> = next.1.iter().map(|endpoint| format!("\"{endpoint}\"")).collect();
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: {name}
accessLog: {{ mode: all }}
rules: {{ {rules} }}
defaults:
  timeouts: {{ request: 20s }}
{defaults}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", to: {name} }}
  - {{ name: out, bind: \"127.0.0.1:0\", to: {next}, direction: outbound }}
destinations:
  - {{ name: {name}, endpoints: [\"{app}\"] }}
  - {{ name: {next}, endpoints: [{endpoints}] }}
",
        endpoints = endpoints.join(", "),
        next = next.0,
    )
}

/// Calls on with the same method, path and body, and the trace id alone; answers in words of its own.
async fn call_on(speaks: Speaks, next: SocketAddr, head: &Request<Incoming>, body: Body) -> Response<Body> {
    let mut caller = Caller::open(speaks, next).await;
    let mut onward = match speaks {
        Speaks::Http1 => request(head.method().as_str(), head.uri().path()).body(body).unwrap(),
        Speaks::Http2 => grpc_request(head.uri().path(), body),
    };
    if let Some(trace) = head.headers().get("traceparent") {
        onward.headers_mut().insert("traceparent", trace.clone());
    }
    let answer = caller.ask(onward).await;
    match speaks {
        Speaks::Http1 => Response::builder().status(answer.status).body(full("from the next")).unwrap(),
        Speaks::Http2 => Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", answer.grpc_status())
            .body(empty())
            .unwrap(),
    }
}

/// An app that calls the outbound listener of its own sidecar, which is there later than the app is.
async fn app(speaks: Speaks) -> (Upstream, Arc<OnceLock<SocketAddr>>) {
    let out: Arc<OnceLock<SocketAddr>> = Arc::default();
    let next = Arc::clone(&out);
    let handler = move |request: Request<Incoming>| {
        let next = *next.get().expect("the sidecar runs");
        async move {
            let body = if request.method() == Method::GET { empty() } else { full(&b"\0\0\0\0\0"[..]) };
            call_on(speaks, next, &request, body).await
        }
    };
    let upstream = match speaks {
        Speaks::Http1 => Upstream::http1(handler).await,
        Speaks::Http2 => Upstream::http2(handler).await,
    };
    (upstream, out)
}

async fn service(
    name: &'static str,
    next: (&str, &[SocketAddr]),
    speaks: Speaks,
    rules: &str,
    defaults: &str,
) -> Service {
    let (app, out) = app(speaks).await;
    let mesh = Mesh::start(&both_sides(name, app.addr, next, rules, defaults)).await;
    out.set(mesh.addr("out")).unwrap();
    Service { name, mesh, _app: Some(app) }
}

impl Chain {
    /// Starts it, the bank first.
    async fn start(speaks: Speaks, script: &'static [Say], rules: &str, defaults: &str) -> Self {
        let bank = match speaks {
            Speaks::Http1 => Bank::http1(script).await,
            Speaks::Http2 => Bank::http2(script).await,
        };
        let before_the_bank = policy(bank.addr(), "").replace("to: app", "to: d").replace("name: app", "name: d");
        let written = format!("{before_the_bank}rules: {{ {rules} }}\ndefaults:\n{defaults}\n");
        let mut services = vec![Service { name: "d", mesh: Mesh::start(&written).await, _app: None }];
        for (name, next) in [("c", "d"), ("b", "c"), ("a", "b")] {
            let to = services[0].mesh.addr("in");
            services.insert(0, service(name, (next, &[to]), speaks, rules, defaults).await);
        }
        Self { bank, services, speaks }
    }

    /// The trace ids differ with the number.
    async fn call(&self, method: &str, number: u8) -> Answer {
        let trace = format!("00-0af7651916cd43dd8448eb211c8031{number:02x}-b7ad6b7169203331-01");
        let mut asked = match self.speaks {
            Speaks::Http1 => request(method, "/pay").body(if method == "GET" { empty() } else { full("x") }).unwrap(),
            Speaks::Http2 => grpc_request(CHARGE, full(&b"\0\0\0\0\0"[..])),
        };
        asked.headers_mut().insert("traceparent", trace.parse().unwrap());
        Caller::open(self.speaks, self.services[0].mesh.addr("in")).await.ask(asked).await
    }

    /// A metric at each service, from A on.
    fn metric(&self, name: &str, labels: &[&str]) -> Vec<f64> {
        self.services.iter().map(|service| service.mesh.metric(name, labels)).collect()
    }

    /// The access log lines of what a service sent on to `destination`, once there are so many.
    async fn lines(&self, service: &str, destination: &str, count: usize) -> Vec<serde_json::Value> {
        let service = self.services.iter().find(|one| one.name == service).unwrap();
        eventually(|| {
            let log = service.mesh.log();
            let lines = log.iter().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
            let lines: Vec<_> = lines.filter(|line| line["destination"] == destination).collect();
            (lines.len() >= count).then_some(lines)
        })
        .await
    }

    async fn stop(self) {
        for service in self.services {
            service.mesh.stop().await;
        }
    }
}

/// What D's script says, for the two protocols, when D always fails.
const DOWN: [(Speaks, &[Say]); 2] = [(Speaks::Http1, &[Say::Status(503)]), (Speaks::Http2, &[Say::Grpc(14, &[])])];

fn failed(speaks: Speaks, answer: &Answer) -> bool {
    match speaks {
        Speaks::Http1 => answer.status == 503,
        Speaks::Http2 => answer.grpc_status() == "14",
    }
}

#[tokio::test]
async fn a_failure_at_the_end_of_the_chain_is_retried_there_and_nowhere_else() {
    for (speaks, script) in DOWN {
        let chain = Chain::start(speaks, script, "", RETRIES_ONLY).await;
        let answer = chain.call("GET", 1).await;
        assert!(failed(speaks, &answer), "{answer:?}");
        assert_eq!(chain.bank.tries(), 3, "{speaks:?}");
        assert_eq!(chain.metric("hopguard_retries_total", &[]), [0.0, 0.0, 2.0, 0.0], "{speaks:?}");
        assert_eq!(
            chain.metric("hopguard_retries_withheld_total", &["reason=\"tries_used_up\""]),
            [0.0, 0.0, 1.0, 0.0]
        );
        assert_eq!(
            chain.metric("hopguard_retries_withheld_total", &["reason=\"retried_below\""]),
            [1.0, 1.0, 0.0, 0.0]
        );
        let line = &chain.lines("c", "d", 1).await[0];
        assert_eq!((&line["attempt"], &line["retry_withheld"]), (&3.into(), &"tries_used_up".into()), "{line}");
        for (service, destination) in [("b", "c"), ("a", "b")] {
            let line = &chain.lines(service, destination, 1).await[0];
            assert_eq!((&line["attempt"], &line["retry_withheld"]), (&1.into(), &"retried_below".into()), "{line}");
            assert_eq!(line["failed_at"], "d", "{line}");
            let inbound = &chain.lines(service, service, 1).await[0];
            assert_eq!(
                (&inbound["failed_at"], &inbound["retry_withheld"]),
                (&"d".into(), &"at_the_caller".into()),
                "{inbound}"
            );
        }
        let said = answer.header("proxy-status");
        assert!(said.contains("hopguard-final") && said.contains("hopguard-at=\"d\""), "{answer:?}");
        if speaks == Speaks::Http2 {
            assert_eq!(answer.header("grpc-retry-pushback-ms"), "-1", "{answer:?}");
        }
        chain.stop().await;
    }
}

#[tokio::test]
async fn whatever_retry_on_names_is_tried_in_one_place() {
    const ON: &str = "retry: { idempotent: true, on: [404, 408, 429, unavailable, aborted, cancelled], ";
    let defaults = RETRIES_ONLY.replace("retry: { idempotent: true, ", ON);
    let table: [(Speaks, &'static [Say]); 5] = [
        (Speaks::Http1, &[Say::Status(429)]),
        (Speaks::Http1, &[Say::Status(408)]),
        (Speaks::Http1, &[Say::Status(404)]),
        (Speaks::Http2, &[Say::Grpc(10, &[])]),
        (Speaks::Http2, &[Say::Grpc(1, &[])]),
    ];
    for (speaks, script) in table {
        let chain = Chain::start(speaks, script, "", &defaults).await;
        let answer = chain.call("GET", 1).await;
        assert_eq!(chain.bank.tries(), 3, "{script:?} {answer:?}");
        assert_eq!(
            chain.metric("hopguard_retries_withheld_total", &["reason=\"tries_used_up\""]),
            [0.0, 0.0, 1.0, 0.0]
        );
        assert_eq!(
            chain.metric("hopguard_retries_withheld_total", &["reason=\"retried_below\""]),
            [1.0, 1.0, 0.0, 0.0]
        );
        for (service, destination, tries, why) in [("c", "d", 3, "tries_used_up"), ("a", "b", 1, "retried_below")] {
            let line = &chain.lines(service, destination, 1).await[0];
            assert_eq!((&line["attempt"], &line["retry_withheld"]), (&tries.into(), &why.into()), "{line}");
        }
        let said = answer.header("proxy-status");
        assert!(said.contains("hopguard-final") && said.contains("hopguard-at=\"d\""), "{answer:?}");
        let pushback = if speaks == Speaks::Http2 { "-1" } else { "" };
        assert_eq!(answer.header("grpc-retry-pushback-ms"), pushback, "{answer:?}");
        chain.stop().await;
    }
}

#[tokio::test]
async fn what_retry_on_does_not_name_below_500_is_an_answer_and_bears_no_mark() {
    let table: [(Speaks, &'static [Say]); 2] =
        [(Speaks::Http1, &[Say::Status(429)]), (Speaks::Http2, &[Say::Grpc(10, &[])])];
    for (speaks, script) in table {
        let chain = Chain::start(speaks, script, "", RETRIES_ONLY).await;
        let answer = chain.call("GET", 1).await;
        assert_eq!((chain.bank.tries(), answer.header("proxy-status")), (1, ""), "{answer:?}");
        assert_eq!(answer.header("grpc-retry-pushback-ms"), "", "{answer:?}");
        assert_eq!(chain.metric("hopguard_retries_withheld_total", &[]), [0.0; 4]);
        assert_eq!(chain.lines("c", "d", 1).await[0]["retry_withheld"], serde_json::Value::Null);
        chain.stop().await;
    }
}

const DOWN_LATE: &[Say] = &[Say::Trailers(&[("grpc-status", "14")])];

const REPEATABLE: &str = "    retry: { idempotent: true, backoff: { max: 1ms } }";

async fn charge(to: SocketAddr) -> Answer {
    let mut asked = grpc_request(CHARGE, full(&b"\0\0\0\0\0"[..]));
    asked
        .headers_mut()
        .insert("traceparent", "00-0af7651916cd43dd8448eb211c803101-b7ad6b7169203331-01".parse().unwrap());
    Caller::open(Speaks::Http2, to).await.ask(asked).await
}

#[tokio::test]
async fn no_hop_tries_again_once_the_head_of_an_answer_has_come() {
    let bank = Bank::http2(DOWN_LATE).await;
    let inner = Mesh::start(&behind_a_caller(&[bank.addr()], "", REPEATABLE)).await;
    let outer = Mesh::start(&behind_a_caller(&[inner.addr("in")], "", REPEATABLE)).await;
    let answer = charge(outer.addr("in")).await;
    assert_eq!((answer.grpc_status(), answer.trailers.is_some(), bank.tries()), ("14", true, 1), "{answer:?}");
    for mesh in [outer, inner] {
        eventually(|| (!mesh.log().is_empty()).then_some(())).await;
        let line: serde_json::Value = serde_json::from_str(&mesh.log()[0]).unwrap();
        assert_eq!((&line["attempt"], &line["retry_withheld"]), (&1.into(), &serde_json::Value::Null), "{line}");
        assert_eq!(mesh.metric("hopguard_retries_total", &[]), 0.0);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_app_that_fails_because_of_trailers_is_not_called_again_for_what_may_not_be_repeated() {
    for (script, repeats, tries) in
        [(DOWN_LATE, "", 1), (DOWN[1].1, "", 1), (DOWN_LATE, "  retry: { idempotent: true }", 3)]
    {
        let bank = Bank::http2(script).await;
        let c = service("c", ("d", &[bank.addr()]), Speaks::Http2, "", repeats).await;
        let b = Mesh::start(&behind_a_caller(&[c.mesh.addr("in")], "", REPEATABLE)).await;
        let answer = charge(b.addr("in")).await;
        assert_eq!((answer.grpc_status(), bank.tries()), ("14", tries), "{script:?} {answer:?}");
        if tries == 1 {
            assert!(answer.header("proxy-status").contains("hopguard-final;hopguard-at=\"d\""), "{answer:?}");
            assert_eq!(b.metric("hopguard_retries_withheld_total", &["reason=\"retried_below\""]), 1.0);
        }
        b.stop().await;
        c.mesh.stop().await;
    }
}

#[tokio::test]
async fn with_the_rule_off_every_hop_multiplies_the_tries() {
    for (speaks, script) in DOWN {
        let chain = Chain::start(speaks, script, "retryInOnePlace: off", RETRIES_ONLY).await;
        assert!(failed(speaks, &chain.call("GET", 1).await));
        assert_eq!(chain.bank.tries(), 27, "{speaks:?}");
        assert_eq!(chain.metric("hopguard_retries_total", &[]), [2.0, 6.0, 18.0, 0.0], "{speaks:?}");
        let line = &chain.lines("a", "b", 1).await[0];
        assert_eq!((&line["attempt"], &line["retry_withheld"]), (&3.into(), &"tries_used_up".into()), "{line}");
        chain.stop().await;
    }
}

#[tokio::test]
async fn in_warn_every_hop_retries_and_says_that_it_would_not_have() {
    for (speaks, script) in DOWN {
        let chain = Chain::start(speaks, script, "retryInOnePlace: dryRun", RETRIES_ONLY).await;
        let answer = chain.call("GET", 1).await;
        assert!(failed(speaks, &answer), "{answer:?}");
        assert_eq!(chain.bank.tries(), 27, "{speaks:?}");
        assert!(!answer.header("proxy-status").contains("hopguard-final"), "{speaks:?} {answer:?}");
        assert_eq!(answer.header("grpc-retry-pushback-ms"), "", "{speaks:?}");
        // Nobody writes a mark that A could have obeyed; B and C have tried for A and for B already.
        let would = chain.metric("hopguard_dry_run_total", &["rule=\"retry_in_one_place\""]);
        assert!(would[0] == 0.0 && would[1] >= 1.0 && would[2] >= 1.0 && would[3] == 0.0, "{speaks:?} {would:?}");
        let lines = chain.lines("b", "c", 3).await;
        let says =
            |line: &serde_json::Value| line["dry_run"].as_str().is_some_and(|it| it.contains("retry_in_one_place"));
        assert!(lines.iter().any(says), "{lines:#?}");
        chain.stop().await;
    }
}

#[tokio::test]
async fn a_failure_that_is_over_after_one_retry_is_seen_by_nobody_above() {
    let table: [(Speaks, &'static [Say]); 2] = [
        (Speaks::Http1, &[Say::Status(503), Say::Status(200)]),
        (Speaks::Http2, &[Say::Grpc(14, &[]), Say::Grpc(0, &[])]),
    ];
    for (speaks, script) in table {
        let chain = Chain::start(speaks, script, "", RETRIES_ONLY).await;
        let answer = chain.call("GET", 1).await;
        assert!(answer.header("proxy-status").is_empty(), "{answer:?}");
        assert_eq!(chain.bank.tries(), 2);
        assert_eq!(chain.metric("hopguard_retries_total", &[]), [0.0, 0.0, 1.0, 0.0]);
        assert_eq!(chain.metric("hopguard_requests_total", &["outcome=\"ok\""])[..2], [2.0, 2.0]);
        chain.stop().await;
    }
}

#[tokio::test]
async fn the_work_of_a_post_is_done_once_although_its_answer_is_lost() {
    let plain = "  circuitBreaker: off\n  ejection: off\n  retry: { backoff: { base: 1ms, max: 1ms } }";
    let careless = "  circuitBreaker: off\n  ejection: off\n  retry: { idempotent: true, backoff: { base: 1ms, max: 1ms }, budget: { minPerSecond: 100000 } }";
    for (defaults, rules, tries) in [(plain, "", 1), (careless, "retryInOnePlace: off", 27)] {
        let chain = Chain::start(Speaks::Http1, &[Say::Reset], rules, defaults).await;
        let answer = chain.call("POST", 1).await;
        assert_eq!((answer.status.as_u16(), chain.bank.tries()), (502, tries), "{answer:?}");
        chain.stop().await;
    }
}

/// Breakers that open at the first failure.
const TOUCHY: &str = "  circuitBreaker: { consecutiveFailures: 1 }
  ejection: { consecutiveFailures: 1 }
  retry: off";

#[tokio::test]
async fn a_failure_opens_the_breaker_where_it_happened_and_no_other() {
    for (speaks, script) in DOWN {
        for (rules, breakers) in [("", [0.0, 0.0, 1.0]), ("blameInOnePlace: off", [1.0, 1.0, 1.0])] {
            let chain = Chain::start(speaks, script, rules, TOUCHY).await;
            let answer = chain.call("GET", 1).await;
            assert!(failed(speaks, &answer), "{answer:?}");
            let opened = |service: usize, destination: &str| {
                let labels = [&format!("destination=\"{destination}\"")[..], "state=\"open\""];
                chain.services[service].mesh.metric("hopguard_circuit_breaker_changes_total", &labels)
            };
            assert_eq!([opened(0, "b"), opened(1, "c"), opened(2, "d")], breakers, "{speaks:?} {rules}");
            let line = &chain.lines("a", "b", 1).await[0];
            let named = answer.header("proxy-status").contains("hopguard-at");
            assert_eq!((line["failed_at"] == "d", named), (rules.is_empty(), rules.is_empty()), "{line} {answer:?}");
            chain.stop().await;
        }
    }
}

/// An app that passes on what its callee sends as it comes, and breaks off when the callee does.
async fn passing_on() -> (Upstream, Arc<OnceLock<SocketAddr>>) {
    let out: Arc<OnceLock<SocketAddr>> = Arc::default();
    let next = Arc::clone(&out);
    let upstream = Upstream::bytes(move |stream| {
        let next = *next.get().expect("the sidecar runs");
        async move {
            let mut caller = Wire::over(stream);
            let head = caller.head().await;
            let mut callee = Wire::open(next).await;
            callee.send(head).await;
            let _broken = tokio::io::copy(&mut callee.stream, &mut caller.stream).await;
        }
    })
    .await;
    (upstream, out)
}

#[tokio::test]
async fn a_body_that_breaks_off_further_down_opens_no_breaker_here() {
    let gate = Gate::closed();
    let broken = || Upstream::closing("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf".to_owned(), &gate);
    let table = [(false, "", [0.0, 1.0]), (true, "", [0.0, 1.0]), (false, "blameInOnePlace: off", [1.0, 1.0])];
    for (hangs, rules, breakers) in table {
        let (app, out) = passing_on().await;
        let bank = broken().await;
        let written = both_sides("c", app.addr, ("d", &[bank.addr]), rules, TOUCHY);
        // What hangs is given up here, long before the inbound request is.
        let written = written.replace("name: d,", "name: d, timeouts: { request: 500ms },");
        let mesh = Mesh::start(&written).await;
        out.set(mesh.addr("out")).unwrap();
        let trace = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let mut caller = Wire::open(mesh.addr("in")).await;
        caller.send(format!("GET / HTTP/1.1\r\nhost: c\r\n{trace}\r\n\r\n")).await;
        caller.until("half").await;
        gate.release(usize::from(!hangs));
        assert_eq!(caller.rest().await, "", "{hangs}");
        eventually(|| (mesh.log().len() == 2).then_some(())).await;
        assert_eq!(mesh.count("upstream_cut"), if hangs { 1.0 } else { 2.0 }, "{:#?}", mesh.log());
        let opened = |name: &str| {
            let labels = [&format!("destination=\"{name}\"")[..], "state=\"open\""];
            mesh.metric("hopguard_circuit_breaker_changes_total", &labels)
        };
        assert_eq!([opened("c"), opened("d")], breakers, "{hangs} {rules} {:#?}", mesh.log());
        mesh.stop().await;
    }
}

#[tokio::test]
async fn blame_in_warn_says_so_and_opens_all_the_same() {
    let chain = Chain::start(Speaks::Http1, DOWN[0].1, "blameInOnePlace: dryRun", TOUCHY).await;
    let answer = chain.call("GET", 1).await;
    assert_eq!(answer.status, 503);
    assert!(!answer.header("proxy-status").contains("hopguard-at"), "{answer:?}");
    let opened = chain.metric("hopguard_circuit_breaker_changes_total", &["destination=\"b\"", "state=\"open\""]);
    assert_eq!(opened[0], 1.0);
    // Nobody writes a name; but beside its app, each hop has seen the app's own call fail.
    for (service, app) in ["a", "b", "c"].into_iter().enumerate() {
        let labels = ["rule=\"blame_in_one_place\"", &format!("destination=\"{app}\"")];
        assert_eq!(chain.metric("hopguard_dry_run_total", &labels)[service], 1.0, "{app}");
    }
    chain.stop().await;
}

/// A sidecar before an app.
async fn before(app: SocketAddr, rules: &str) -> Mesh {
    let mesh = policy(app, "    ejection: off");
    Mesh::start(&format!("{mesh}rules: {{ {rules} }}\n")).await
}

/// POSTs to two endpoints, each a sidecar: the app of the first is down.
async fn half_down(sender: &str, receivers: &str) -> (Bank, Vec<Answer>, Mesh) {
    let bank = Bank::http1(&[Say::Status(200)]).await;
    let (down, up) = (before(nobody(), receivers).await, before(bank.addr(), receivers).await);
    let endpoints = [down.addr("in"), up.addr("in")];
    let more = "    circuitBreaker: off\n    ejection: off";
    let mesh = Mesh::start(&behind_a_caller(&endpoints, sender, more)).await;
    let mut answers = Vec::new();
    while mesh.log().len() < 20 && down.log().is_empty() || answers.len() < 5 {
        answers.push(ask(mesh.addr("in"), request("POST", "/pay").body(full("pay 5")).unwrap()).await);
        eventually(|| (mesh.log().len() == answers.len()).then_some(())).await;
    }
    let marked = down.log().iter().any(|line| line.contains("connect_failed"));
    assert!(marked, "nobody was sent to the app that is down: {:#?}", down.log());
    up.stop().await;
    down.stop().await;
    (bank, answers, mesh)
}

#[tokio::test]
async fn a_post_that_never_reached_its_app_goes_to_another_endpoint() {
    let (bank, answers, mesh) = half_down("", "").await;
    assert!(answers.iter().all(|answer| answer.status == 200), "{answers:?}");
    assert_eq!(bank.tries(), answers.len(), "each once");
    let again = mesh.metric("hopguard_retries_total", &["reason=\"unsent\""]);
    let twice = mesh.log().iter().filter(|line| line.contains("\"attempt\":2,")).count();
    assert!(again >= 1.0 && twice as f64 == again, "{again} {:#?}", mesh.log());
    mesh.stop().await;
}

#[tokio::test]
async fn without_the_mark_a_502_is_only_a_502() {
    for (sender, receivers) in [("unsent: off", ""), ("", "unsent: off"), ("retry: off", "")] {
        let (bank, answers, mesh) = half_down(sender, receivers).await;
        let bad: Vec<_> = answers.iter().filter(|answer| answer.status != 200).collect();
        assert!(!bad.is_empty() && bad.iter().all(|answer| answer.status == 502), "{answers:?}");
        let is_marked = bad.iter().all(|answer| answer.header("proxy-status").contains("hopguard-unsent"));
        assert_eq!(is_marked, receivers.is_empty(), "{bad:?}");
        assert_eq!(bank.tries() + bad.len(), answers.len());
        assert_eq!(mesh.metric("hopguard_retries_total", &[]), 0.0);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn in_warn_a_post_that_never_reached_its_app_is_only_counted() {
    let (_bank, answers, mesh) = half_down("unsent: dryRun", "").await;
    let bad = answers.iter().filter(|answer| answer.status == 502).count();
    assert!(bad >= 1, "{answers:?}");
    assert_eq!(mesh.metric("hopguard_dry_run_total", &["app", "rule=\"unsent\""]), bad as f64);
    let lines = mesh.log().iter().filter(|line| line.contains("\"dry_run\":\"unsent\"")).count();
    assert_eq!(lines, bad);
    mesh.stop().await;
}

#[tokio::test]
async fn a_reset_after_the_app_had_the_request_is_no_unsent_request() {
    let bank = Bank::http1(&[Say::Reset]).await;
    let sidecar = before(bank.addr(), "").await;
    let other = Bank::http1(&[Say::Status(200)]).await;
    // The only other endpoint would take it, if it were sent again.
    let endpoints = [sidecar.addr("in"), other.addr()];
    let mesh = Mesh::start(&behind_a_caller(&endpoints, "circuitBreaker: off, ejection: off", "")).await;
    let mut answers = 0;
    while bank.tries() == 0 && answers < 50 {
        ask(mesh.addr("in"), request("POST", "/pay").body(full("pay 5")).unwrap()).await;
        answers += 1;
    }
    let line = mesh.only("server_error").await;
    assert_eq!((&line["status"], &line["retry_withheld"]), (&502.into(), &"not_safe".into()), "{line}");
    assert_eq!((bank.tries(), other.tries()), (1, answers - 1));
    mesh.stop().await;
    sidecar.stop().await;
}
