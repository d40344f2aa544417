//! Correlation of an app's outbound calls with its inbound request, by trace id or because there is only one request: the
//! deadline of the inbound request, its retry state and the end of its caller apply to the outbound calls.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{HeaderMap, Request, Response};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::rules::deadline::{Bank, CHARGE, EXPECTED, took};
use crate::support::bank::{Bank as Script, Say};
use crate::support::http::{Answer, Body, Caller, Speaks, ask, empty, feed, full, get, grpc_request, request};
use crate::support::upstream::Upstream;
use crate::support::wire::Wire;
use crate::support::{Mesh, eventually};

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Each field that can carry a trace from an inbound request to the calls that it causes.
const TRACES: [(&str, &str); 4] = [
    ("traceparent", TRACEPARENT),
    ("b3", "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1"),
    ("x-b3-traceid", "80f198ee56343ba864fe8b2a57d3eff7"),
    ("x-request-id", "order 17, first try"),
];

/// The app's own limit where nothing streams.
const SHORT: &str = ", timeouts: { request: 300ms }";

/// The listeners of a service, its app and its bank. `rules` are lines of the policy, `of_app` what the app has besides its
/// address.
fn policy(app: SocketAddr, bank: SocketAddr, rules: &str, of_app: &str) -> String {
    format!(
        "apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: shop
accessLog: {{ mode: all }}
listeners:
  - {{ name: in, bind: \"127.0.0.1:0\", to: app }}
  - {{ name: out, bind: \"127.0.0.1:0\", to: bank, direction: outbound }}
{rules}destinations:
  - {{ name: app, endpoints: [\"{app}\"]{of_app} }}
  - {{ name: bank, endpoints: [\"{bank}\"] }}
"
    )
}

/// A service with hopguard on both sides of its app. The app calls the bank at the path that it was asked for itself, and
/// forwards the fields that it knows.
struct Service {
    mesh: Mesh,
    bank: Bank,
    app: Upstream,
    asked: Arc<Mutex<Vec<HeaderMap>>>,
}

impl Service {
    /// `pause` is what the app does before it calls; it goes on with it when nobody waits any more.
    async fn open(forwards: &'static [&'static str], pause: Duration, rules: &str) -> Self {
        let bank = Bank::open(false).await;
        let (door, asked) = (Arc::new(OnceLock::<SocketAddr>::new()), Arc::new(Mutex::new(Vec::new())));
        let (to, noted) = (Arc::clone(&door), Arc::clone(&asked));
        let app = Upstream::http1(move |request: Request<Incoming>| {
            noted.lock().unwrap().push(request.headers().clone());
            let to = *to.get().unwrap();
            async move { tokio::spawn(call_the_bank(request, to, forwards, pause)).await.unwrap() }
        })
        .await;
        let rules = format!("{rules}\ndefaults:\n  retry: off\n  timeouts: {{ request: 3s }}\n");
        let text = policy(app.addr, bank.upstream.addr, &rules, "");
        let mesh = Mesh::start(&text).await;
        door.set(mesh.addr("out")).unwrap();
        Self { mesh, bank, app, asked }
    }

    fn call(
        &self,
        path: &'static str,
        expected: &'static str,
        more: Option<(&'static str, &'static str)>,
    ) -> JoinHandle<Answer> {
        let mut asked = request("GET", path).header(EXPECTED, expected);
        if let Some((name, value)) = more {
            asked = asked.header(name, value);
        }
        let (to, asked) = (self.mesh.addr("in"), asked.body(empty()).unwrap());
        tokio::spawn(async move { ask(to, asked).await })
    }

    fn correlations(&self, result: &str) -> f64 {
        self.mesh.metric("hopguard_correlations_total", &[&format!("result=\"{result}\"")])
    }

    async fn line(&self, destination: &str) -> Value {
        let of = |line: &String| {
            let line: Value = serde_json::from_str(line).unwrap();
            (line["destination"] == destination).then_some(line)
        };
        eventually(|| self.mesh.log().iter().find_map(of)).await
    }
}

async fn call_the_bank(
    asked: Request<Incoming>,
    to: SocketAddr,
    forwards: &'static [&'static str],
    pause: Duration,
) -> Response<Body> {
    sleep(pause).await;
    let mut call = request("GET", asked.uri().path());
    for name in forwards {
        if let Some(value) = asked.headers().get(*name) {
            call = call.header(*name, value);
        }
    }
    let answer = ask(to, call.body(empty()).unwrap()).await;
    Response::builder().status(answer.status).body(full(answer.body)).unwrap()
}

#[tokio::test]
async fn an_app_that_forwards_nothing_but_a_trace_id_carries_its_deadline_on() {
    for trace in &TRACES {
        let (name, value) = *trace;
        let service = Service::open(std::slice::from_ref(&trace.0), Duration::ZERO, "").await;
        // Another request is under way, with more time and another trace, so that only the id can tell.
        let other = service.call("/other/slow", "2500", Some(("x-request-id", "another")));
        eventually(|| (service.bank.upstream.requests() == 1).then_some(())).await;
        let answer = service.call("/slow", "400", Some((name, value))).await.unwrap();
        assert_eq!(answer.status, 504, "{name}");
        let told: u64 = service.bank.told(EXPECTED).parse().unwrap();
        assert!(told < 400, "{name}: {told}");
        let line = service.line("bank").await;
        assert_eq!(
            (&line["outcome"], &line["deadline_from"]),
            (&"deadline_exceeded".into(), &"inbound".into()),
            "{line}"
        );
        assert_eq!(line["refusal"]["origin"], "asked by the inbound request", "{line}");
        assert!(line["deadline_ms"].as_f64().is_some_and(|left| left < 400.0), "{line}");
        assert!(service.correlations("by_trace_id") >= 1.0, "{name}");
        other.abort();
    }
}

#[tokio::test]
async fn of_two_requests_with_one_id_the_hasty_one_does_not_hurry_the_other() {
    let service = Service::open(&["traceparent"], Duration::ZERO, "").await;
    let hasty = service.call("/slow", "600", Some(("traceparent", TRACEPARENT)));
    eventually(|| (service.bank.upstream.requests() == 1).then_some(())).await;
    let patient = service.call("/", "2500", Some(("traceparent", TRACEPARENT))).await.unwrap();
    assert_eq!(patient.status, 200);
    let told: u64 = service.bank.told(EXPECTED).parse().unwrap();
    assert!((1000..2500).contains(&told), "{told}");
    assert_eq!(hasty.await.unwrap().status, 504);
    service.mesh.stop().await;
}

#[tokio::test]
async fn without_the_rule_work_goes_on_at_the_bank_that_nobody_waits_for() {
    let service = Service::open(&["traceparent"], Duration::ZERO, "rules: { deadline: off }").await;
    let call = service.call("/slow", "300", Some(("traceparent", TRACEPARENT)));
    let begun = Instant::now();
    let answer = call.await.unwrap();
    took(begun, 3000);
    assert_eq!(answer.status, 504);
    assert_eq!(service.bank.told(EXPECTED), "", "the bank does not know that anybody is in a hurry");
    let line = service.line("bank").await;
    assert_eq!((&line["outcome"], &line["deadline_ms"]), (&"request_timeout".into(), &Value::Null), "{line}");
}

#[tokio::test]
async fn an_app_that_forwards_nothing_is_joined_while_it_has_only_one_request() {
    let service = Service::open(&[], Duration::ZERO, "").await;
    let answer = service.call("/slow", "400", None).await.unwrap();
    assert_eq!(answer.status, 504);
    let line = service.line("bank").await;
    assert_eq!((&line["outcome"], &line["deadline_from"]), (&"deadline_exceeded".into(), &"inbound".into()), "{line}");
    assert_eq!((service.correlations("only_in_flight"), service.correlations("ambiguous")), (1.0, 0.0));
    service.mesh.stop().await;
}

#[tokio::test]
async fn an_app_that_forwards_nothing_and_has_two_requests_is_counted_as_ambiguous() {
    let service = Service::open(&[], Duration::from_millis(300), "").await;
    let both = [service.call("/a", "1000", None), service.call("/b", "1000", None)];
    for call in both {
        assert_eq!(call.await.unwrap().status, 200);
    }
    // The second may have come when the first was answered already.
    let (alone, not) = (service.correlations("only_in_flight"), service.correlations("ambiguous"));
    assert!(not >= 1.0 && alone + not == 2.0, "{alone} and {not}");
    let told: Vec<u64> = {
        let asked = service.bank.asked.lock().unwrap();
        asked.iter().map(|fields| fields[EXPECTED].to_str().unwrap().parse().unwrap()).collect()
    };
    assert!(
        told.iter().any(|told| *told > 2000),
        "the policy's time, not that of a request that may be another: {told:?}"
    );
    service.mesh.stop().await;
}

#[tokio::test]
async fn a_call_that_no_request_has_caused_has_the_policys_time() {
    let service = Service::open(&[], Duration::ZERO, "").await;
    assert_eq!(get(service.mesh.addr("out"), "/").await.status, 200);
    assert_eq!(service.correlations("no_parent"), 1.0);
    let told: u64 = service.bank.told(EXPECTED).parse().unwrap();
    assert!((2000..3000).contains(&told), "{told}");
    service.mesh.stop().await;
}

#[tokio::test]
async fn an_app_that_calls_on_after_its_deadline_is_refused() {
    for trace in &TRACES {
        let (name, value) = *trace;
        let service = Service::open(std::slice::from_ref(&trace.0), Duration::from_millis(350), "").await;
        let answer = service.call("/", "200", Some((name, value))).await.unwrap();
        assert_eq!(
            (answer.status.as_u16(), &answer.problem()["refusal"]),
            (504, &"deadline_exceeded".into()),
            "{name}"
        );
        let line = service.line("bank").await;
        assert_eq!((&line["outcome"], &line["status"]), (&"deadline_spent".into(), &504.into()), "{line}");
        assert_eq!(service.mesh.count("deadline_spent"), 1.0);
        assert_eq!((service.bank.upstream.requests(), service.app.requests()), (0, 1), "{name}");
        assert_eq!(service.mesh.metric("hopguard_circuit_breaker_changes_total", &[]), 0.0);
        service.mesh.stop().await;
    }
    let service = Service::open(&["traceparent"], Duration::from_millis(350), "rules: { deadline: off }").await;
    let answer = service.call("/", "200", Some(("traceparent", TRACEPARENT))).await.unwrap();
    assert_eq!((answer.status.as_u16(), service.bank.upstream.requests()), (200, 1), "without the rule the bank works");
    service.mesh.stop().await;
}

#[tokio::test]
async fn a_request_that_came_again_and_was_answered_is_late_no_more() {
    for trace in &TRACES {
        let (name, value) = *trace;
        let service = Service::open(std::slice::from_ref(&trace.0), Duration::from_millis(350), "").await;
        assert_eq!(service.call("/", "200", Some((name, value))).await.unwrap().status, 504, "{name}");
        // What the app does for the first request is refused; what it does for the second is not.
        service.mesh.only("deadline_spent").await;
        assert_eq!(service.call("/", "2000", Some((name, value))).await.unwrap().status, 200, "{name}");
        service.mesh.ended("ok", 2).await;
        let after = request("GET", "/").header(name, value).body(empty()).unwrap();
        assert_eq!(ask(service.mesh.addr("out"), after).await.status, 200, "{name}");
        assert_eq!((service.correlations("parent_expired"), service.correlations("no_parent")), (1.0, 1.0), "{name}");
        assert_eq!((service.bank.upstream.requests(), service.mesh.count("deadline_spent")), (2, 1.0), "{name}");
        service.mesh.stop().await;
    }
}

#[tokio::test]
async fn a_tighter_deadline_of_the_apps_own_holds() {
    let service = Service::open(&["traceparent", EXPECTED], Duration::ZERO, "").await;
    // The app forwards everything, also the time that hopguard has given it.
    assert_eq!(service.call("/", "1000", Some(("traceparent", TRACEPARENT))).await.unwrap().status, 200);
    let told: u64 = service.bank.told(EXPECTED).parse().unwrap();
    let app: u64 = service.asked.lock().unwrap()[0][EXPECTED].to_str().unwrap().parse().unwrap();
    assert!(told < app && app < 1000, "{told}, {app}");
    service.mesh.stop().await;
}

#[tokio::test]
async fn an_inbound_request_without_any_id_gets_one_and_others_keep_theirs() {
    let service = Service::open(&["x-request-id"], Duration::ZERO, "").await;
    assert_eq!(service.call("/", "1000", None).await.unwrap().status, 200);
    let id = |at: usize, of: &Mutex<Vec<HeaderMap>>| -> String {
        let asked = of.lock().unwrap();
        asked[at].get("x-request-id").map_or("", |id| id.to_str().unwrap()).to_owned()
    };
    let given = id(0, &service.asked);
    assert_eq!((given.len(), given.matches('-').count()), (36, 4), "{given:?}");
    assert_eq!(id(0, &service.bank.asked), given, "forwarded by the app");
    assert_eq!(service.correlations("by_trace_id"), 1.0);
    for (at, (name, value)) in TRACES.into_iter().enumerate() {
        assert_eq!(service.call("/", "1000", Some((name, value))).await.unwrap().status, 200);
        let wanted = if name == "x-request-id" { value } else { "" };
        assert_eq!(id(at + 1, &service.asked), wanted, "{name}");
        assert_eq!(service.asked.lock().unwrap()[at + 1][name], value);
    }
    assert_eq!(service.call("/", "1000", None).await.unwrap().status, 200);
    assert_ne!(id(5, &service.asked), given, "each has its own");
    service.mesh.stop().await;
}

#[tokio::test]
async fn an_inbound_request_whose_ids_cannot_be_read_gets_one_too() {
    let service = Service::open(&["traceparent", "b3", "x-b3-traceid", "x-request-id"], Duration::ZERO, "").await;
    let unreadable = [
        ("b3", "0"),
        ("traceparent", "00-00000000000000000000000000000000-0000000000000000-00"),
        ("x-b3-traceid", "none"),
        ("x-request-id", ""),
    ];
    for (at, (name, value)) in unreadable.into_iter().enumerate() {
        let other = service.call("/other/slow", "2500", Some(("x-request-id", "another")));
        eventually(|| (service.bank.upstream.requests() == 2 * at + 1).then_some(())).await;
        assert_eq!(service.call("/", "1000", Some((name, value))).await.unwrap().status, 200);
        let fields = service.asked.lock().unwrap()[2 * at + 1].clone();
        assert_eq!(fields["x-request-id"].len(), 36, "{name}: {fields:?}");
        if name != "x-request-id" {
            assert_eq!(fields[name], value, "it passes as it came");
        }
        assert_eq!(
            (service.correlations("by_trace_id"), service.correlations("ambiguous")),
            (2.0 * at as f64 + 2.0, 0.0),
            "{name}"
        );
        other.abort();
    }
}

/// An app that calls the bank with its trace id after a while, and does not notice that nobody waits any more.
async fn stubborn_app(pause: Duration) -> (Upstream, Arc<OnceLock<SocketAddr>>) {
    let door = Arc::new(OnceLock::<SocketAddr>::new());
    let to = Arc::clone(&door);
    let app = Upstream::http1(move |request: Request<Incoming>| {
        let to = *to.get().unwrap();
        async move { tokio::spawn(call_the_bank(request, to, &["traceparent"], pause)).await.unwrap() }
    })
    .await;
    (app, door)
}

#[tokio::test]
async fn nothing_is_tried_again_for_an_inbound_request_that_nobody_waits_for() {
    const LATER: &[Say] = &[Say::With(503, &[("retry-after", "1")])];
    // What the bank says, whether the caller leaves, what the app is given, and how the call of the bank ends.
    let table = [
        (LATER, true, "", "server_error"),
        (&[Say::Hang], true, "", "per_try_timeout"),
        (LATER, false, ", timeouts: { request: 300ms, perTry: 300ms }", "server_error"),
    ];
    for (script, leaves, of_app, outcome) in table {
        let bank = Script::http1(script).await;
        let (app, door) = stubborn_app(Duration::ZERO).await;
        let rules = "rules: { deadline: off }\ndefaults: { timeouts: { request: 5s, perTry: 400ms } }\n";
        let mesh = Mesh::start(&policy(app.addr, bank.addr(), rules, of_app)).await;
        door.set(mesh.addr("out")).unwrap();
        let asked = request("GET", "/").header("traceparent", TRACEPARENT).body(empty()).unwrap();
        let to = mesh.addr("in");
        let asked = tokio::spawn(async move { ask(to, asked).await });
        eventually(|| (bank.tries() == 1).then_some(())).await;
        if leaves {
            asked.abort();
        } else {
            assert_eq!(asked.await.unwrap().status, 504);
        }
        let line = mesh.only(outcome).await;
        assert_eq!((&line["destination"], &line["retry_withheld"]), (&"bank".into(), &"caller_gone".into()), "{line}");
        assert_eq!((&line["attempt"], bank.tries()), (&1.into(), 1), "{line}");
        assert_eq!(mesh.metric("hopguard_retries_total", &[]), 0.0);
        assert_eq!(mesh.metric("hopguard_retries_withheld_total", &["bank", "reason=\"caller_gone\""]), 1.0);
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_app_whose_caller_has_left_has_no_more_time_than_before_and_no_retries() {
    let table: [(&'static [Say], _, _); 2] =
        [(&[Say::Hang], "deadline_exceeded", Value::Null), (&[Say::Status(503)], "server_error", "caller_gone".into())];
    for (script, outcome, why) in table {
        let bank = Script::http1(script).await;
        let (app, door) = stubborn_app(Duration::from_millis(200)).await;
        let mesh = Mesh::start(&policy(app.addr, bank.addr(), "", "")).await;
        door.set(mesh.addr("out")).unwrap();
        let asked = request("GET", "/").header("traceparent", TRACEPARENT).header(EXPECTED, "900");
        let (to, asked) = (mesh.addr("in"), asked.body(empty()).unwrap());
        let asked = tokio::spawn(async move { ask(to, asked).await });
        eventually(|| (app.requests() == 1).then_some(())).await;
        asked.abort();
        mesh.only("caller_gone").await;
        let line = mesh.only(outcome).await;
        assert_eq!((&line["destination"], &line["deadline_from"]), (&"bank".into(), &"inbound".into()), "{line}");
        assert_eq!((&line["attempt"], &line["retry_withheld"], bank.tries()), (&1.into(), &why, 1), "{line}");
        let told: u64 = bank.seen()[0].header(EXPECTED).parse().unwrap();
        assert!((200..720).contains(&told), "{told}");
        assert_eq!(mesh.metric("hopguard_correlations_total", &["result=\"by_trace_id\""]), 1.0);
        mesh.stop().await;
    }
}

/// An app that fails when its call of the bank does, in words of its own.
async fn app_with_words_of_its_own() -> (Upstream, Arc<OnceLock<SocketAddr>>) {
    let door = Arc::new(OnceLock::<SocketAddr>::new());
    let to = Arc::clone(&door);
    let app = Upstream::http1(move |request: Request<Incoming>| {
        let to = *to.get().unwrap();
        async move {
            let status = call_the_bank(request, to, &["traceparent"], Duration::ZERO).await.status();
            Response::builder().status(if status == 200 { 200 } else { 500 }).body(empty()).unwrap()
        }
    })
    .await;
    (app, door)
}

#[tokio::test]
async fn a_call_that_a_rate_limit_refuses_is_marked_for_the_hops_above() {
    let bank = Bank::open(false).await;
    let (app, door) = app_with_words_of_its_own().await;
    let text = policy(app.addr, bank.upstream.addr, "", "");
    let mesh = Mesh::start(&text.replace("name: bank,", "name: bank, rateLimit: { requests: 1, per: 1m },")).await;
    door.set(mesh.addr("out")).unwrap();
    for (status, said) in [(200, ""), (500, "hopguard;received-status=500;hopguard-final;hopguard-at=\"bank\"")] {
        let asked = request("GET", "/").header("traceparent", TRACEPARENT).body(empty()).unwrap();
        let answer = ask(mesh.addr("in"), asked).await;
        assert_eq!((answer.status.as_u16(), answer.header("proxy-status")), (status, said), "{answer:?}");
    }
    mesh.only("rate_limited").await;
    let line = mesh.only("server_error").await;
    assert_eq!((&line["destination"], &line["failed_at"]), (&"app".into(), &"bank".into()), "{line}");
    assert_eq!(bank.upstream.requests(), 1);
    mesh.stop().await;
}

/// An app that sends a piece, calls the bank, and sends what it has heard, for as long as anybody listens.
async fn caller_of_the_bank(http2: bool, pause: Duration) -> (Upstream, Arc<OnceLock<SocketAddr>>) {
    let door = Arc::new(OnceLock::<SocketAddr>::new());
    let to = Arc::clone(&door);
    let handler = move |_| {
        let to = *to.get().unwrap();
        async move {
            let (pieces, body) = feed();
            tokio::spawn(async move {
                let mut heard = "begun".to_owned();
                while pieces.send(piece(&heard, http2)).await {
                    sleep(pause).await;
                    let asked = request("GET", "/").header("traceparent", TRACEPARENT).body(empty()).unwrap();
                    heard = ask(to, asked).await.status.to_string();
                }
            });
            let kind = if http2 { "application/grpc" } else { "text/event-stream" };
            Response::builder().header("content-type", kind).body(body).unwrap()
        }
    };
    (Upstream::on("127.0.0.1:0".parse().unwrap(), handler, http2).await, door)
}

/// A message of gRPC, or an event.
fn piece(text: &str, is_message: bool) -> Vec<u8> {
    if is_message {
        let length = u8::try_from(text.len()).unwrap();
        return [&[0, 0, 0, 0, length], text.as_bytes()].concat();
    }
    format!("data: {text}\n\n").into_bytes()
}

#[tokio::test]
async fn a_stream_may_call_others_for_as_long_as_it_lives() {
    let bank = Bank::open(false).await;
    let (app, door) = caller_of_the_bank(false, Duration::from_millis(50)).await;
    let mesh = Mesh::start(&policy(app.addr, bank.upstream.addr, "", SHORT)).await;
    door.set(mesh.addr("out")).unwrap();
    let mut wire = Wire::open(mesh.addr("in")).await;
    wire.send(format!("GET /events HTTP/1.1\r\nHost: shop.test\r\ntraceparent: {TRACEPARENT}\r\n\r\n")).await;
    assert!(wire.head().await.starts_with("HTTP/1.1 200 "));
    wire.until("data: begun\n\n").await;
    for _ in 0..12 {
        assert!(wire.until("\n\n").await.contains("data: 200"), "{:#?}", mesh.log());
    }
    assert_eq!(mesh.count("deadline_spent"), 0.0);
    let told: u64 = bank.told(EXPECTED).parse().unwrap();
    assert!(told > 1000, "the bank's own time: {told}");
}

/// Asks for a stream of gRPC, within a time.
async fn watch(mesh: &Mesh, timeout: &'static str) -> Answer {
    let mut asked = grpc_request(CHARGE, full(&b"\0\0\0\0\0"[..]));
    asked.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
    asked.headers_mut().insert("traceparent", TRACEPARENT.parse().unwrap());
    Caller::open(Speaks::Http2, mesh.addr("in")).await.ask(asked).await
}

#[tokio::test]
async fn a_grpc_stream_may_call_others_until_its_own_deadline() {
    let bank = Bank::open(false).await;
    let (app, door) = caller_of_the_bank(true, Duration::from_millis(50)).await;
    let mesh = Mesh::start(&policy(app.addr, bank.upstream.addr, "", SHORT)).await;
    door.set(mesh.addr("out")).unwrap();
    let answer = watch(&mesh, "900m").await;
    assert_eq!(answer.grpc_status(), "4", "{answer:?}");
    // The app lives by 300 ms where it does not stream, which is six calls.
    let heard = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(heard.matches("200 OK").count() >= 8, "{heard} {:#?}", mesh.log());
    let asked = bank.asked.lock().unwrap();
    let told: Vec<u64> = asked.iter().map(|fields| fields[EXPECTED].to_str().unwrap().parse().unwrap()).collect();
    assert!(told.iter().all(|told| *told < 900) && told.is_sorted_by(|one, next| one > next), "{told:?}");
}

/// An app that calls the bank when it has two messages.
async fn app_that_is_streamed_to() -> (Upstream, Arc<OnceLock<SocketAddr>>) {
    let door = Arc::new(OnceLock::<SocketAddr>::new());
    let to = Arc::clone(&door);
    let app = Upstream::http2(move |request: Request<Incoming>| {
        let to = *to.get().unwrap();
        async move {
            let (mut body, mut read) = (request.into_body(), 0);
            while read < 2 * piece("more", true).len() {
                read += body.frame().await.unwrap().unwrap().into_data().unwrap().len();
            }
            let asked = request_of_the_trace();
            let code = if ask(to, asked).await.status == 200 { "0" } else { "14" };
            let answer = Response::builder().header("content-type", "application/grpc").header("grpc-status", code);
            answer.body(empty()).unwrap()
        }
    })
    .await;
    (app, door)
}

fn request_of_the_trace() -> Request<Body> {
    request("GET", "/").header("traceparent", TRACEPARENT).body(empty()).unwrap()
}

#[tokio::test]
async fn a_caller_that_streams_does_not_hurry_the_calls_for_its_second_message() {
    for (timeout, least, most) in [(None, 1000, 15_000), (Some("900m"), 400, 900)] {
        let bank = Bank::open(false).await;
        let (app, door) = app_that_is_streamed_to().await;
        let mesh = Mesh::start(&policy(app.addr, bank.upstream.addr, "", SHORT)).await;
        door.set(mesh.addr("out")).unwrap();
        let (pieces, body) = feed();
        let mut asked = grpc_request(CHARGE, body);
        asked.headers_mut().insert("traceparent", TRACEPARENT.parse().unwrap());
        if let Some(timeout) = timeout {
            asked.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
        }
        // Not without end: an app that reads two messages and has a hundred thousand waiting ends the connection.
        tokio::spawn(async move {
            for _ in 0..200 {
                pieces.send(piece("more", true)).await;
            }
            pieces.unwanted().await;
        });
        let answer = Caller::open(Speaks::Http2, mesh.addr("in")).await.ask(asked).await;
        assert_eq!(answer.grpc_status(), "0", "{answer:?}");
        let told: u64 = bank.told(EXPECTED).parse().unwrap();
        assert!((least..most).contains(&told), "{timeout:?}: {told}");
        mesh.ended("ok", 2).await;
        let line = mesh.log().iter().any(|line| line.contains("\"deadline_from\":\"inbound\""));
        assert_eq!(line, timeout.is_some(), "{:#?}", mesh.log());
        mesh.stop().await;
    }
}

#[tokio::test]
async fn an_app_that_calls_on_after_its_stream_was_ended_is_refused() {
    let bank = Bank::open(false).await;
    let (app, door) = caller_of_the_bank(true, Duration::from_millis(600)).await;
    let mesh = Mesh::start(&policy(app.addr, bank.upstream.addr, "", SHORT)).await;
    door.set(mesh.addr("out")).unwrap();
    assert_eq!(watch(&mesh, "250m").await.grpc_status(), "4");
    let line = mesh.only("deadline_spent").await;
    assert_eq!((&line["destination"], &line["deadline_from"]), (&"bank".into(), &"inbound".into()), "{line}");
    assert_eq!(bank.upstream.requests(), 0);
    assert_eq!(mesh.metric("hopguard_correlations_total", &["result=\"parent_expired\""]), 1.0);
}
