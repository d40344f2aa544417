//! Exchanges from begin to drop, with their log lines and metrics.

use std::io::Write;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use http::{HeaderValue, Method, StatusCode, Uri};

use super::families::ALL;
use super::*;

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

struct Bench {
    telemetry: Arc<Telemetry>,
    lines: MemoryLines,
    shard: Rc<Shard>,
    hop: HopId,
}

impl Bench {
    fn new(mode: AccessLogMode, format: LineFormat) -> Self {
        let (sink, lines) = Sink::memory();
        let telemetry = Telemetry::new(sink);
        telemetry.access_log.configure(AccessLogSettings { mode, format });
        let shard = telemetry.shard(0);
        let hop = telemetry.hops.register(HopLabels::new("order", "payment", "pay", DirectionLabel::Outbound));
        Self { telemetry, lines, shard, hop }
    }

    fn exchange(&self, protocol: Protocol, method: Method, uri: &str) -> Exchange {
        let request = RequestLine {
            method,
            uri: Uri::try_from(uri).unwrap(),
            host: Some(HeaderValue::from_static("payment")),
            caller: Some(address("10.0.0.1:50000")),
            traceparent: None,
        };
        Exchange::begin(Rc::clone(&self.shard), Instant::now(), self.hop, protocol, request)
    }

    fn get(&self) -> Exchange {
        self.exchange(Protocol::Http1, Method::GET, "/payments/7?card=1234")
    }

    fn lines(&self) -> Vec<String> {
        std::mem::take(&mut *self.lines.lock().unwrap())
    }

    fn outcomes(&self) -> Vec<(Outcome, u64)> {
        self.telemetry.summaries().iter().flat_map(|hop| hop.outcomes.clone()).collect()
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn timeout() -> RefusalRecord {
    RefusalRecord {
        outcome: Outcome::RequestTimeout,
        rule: "timeouts.request",
        value: "2s".to_owned(),
        origin: "policy.yaml:12".to_owned(),
        detail: "no answer within 2s".to_owned(),
        closed_by: ClosedBy::Hopguard,
    }
}

fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

#[test]
fn each_way_to_end_has_its_outcome() {
    type Case = (Protocol, fn(&mut Exchange), Outcome);
    let cases: &[Case] = &[
        (Protocol::Http1, |_| {}, Outcome::CallerGone),
        (Protocol::Http1, |ex| head(ex, 200), Outcome::CallerGone),
        (Protocol::Http1, |ex| done(ex, 200), Outcome::Ok),
        (Protocol::Http1, |ex| done(ex, 304), Outcome::Ok),
        (Protocol::WebSocket, |ex| done(ex, 101), Outcome::Ok),
        (Protocol::Http2, |ex| done(ex, 404), Outcome::ClientError),
        (Protocol::Http2, |ex| done(ex, 503), Outcome::ServerError),
        (Protocol::Http1, |ex| (head(ex, 200), ex.upstream_cut()).0, Outcome::UpstreamCut),
        (Protocol::Http1, |ex| (done(ex, 200), ex.upstream_cut()).0, Outcome::Ok),
        (Protocol::Grpc, |ex| (head(ex, 200), ex.set_grpc_status(0, None)).0, Outcome::Ok),
        (Protocol::Grpc, |ex| (head(ex, 200), ex.set_grpc_status(5, None)).0, Outcome::GrpcError),
        (Protocol::Grpc, |ex| done(ex, 200), Outcome::GrpcError),
        (Protocol::Grpc, |ex| head(ex, 200), Outcome::CallerGone),
        (Protocol::Http1, |ex| ex.refuse(timeout()), Outcome::RequestTimeout),
        (Protocol::Http1, |ex| (ex.refuse(timeout()), done(ex, 504)).0, Outcome::RequestTimeout),
        (Protocol::Http1, |ex| (done(ex, 200), ex.refuse(timeout())).0, Outcome::RequestTimeout),
    ];
    for (index, (protocol, steps, outcome)) in cases.iter().enumerate() {
        let bench = Bench::new(AccessLogMode::Off, LineFormat::Json);
        let mut exchange = bench.exchange(*protocol, Method::GET, "/");
        steps(&mut exchange);
        drop(exchange);
        assert_eq!(bench.outcomes(), [(*outcome, 1)], "case {index}");
        assert!(bench.lines().is_empty());
    }
}

fn head(exchange: &mut Exchange, status: u16) {
    exchange.set_response_head(exchange.began + ms(3), StatusCode::from_u16(status).unwrap());
}

fn done(exchange: &mut Exchange, status: u16) {
    head(exchange, status);
    exchange.complete();
}

#[tokio::test(start_paused = true)]
async fn a_refused_call_is_explained_in_both_formats() {
    for format in [LineFormat::Json, LineFormat::Text] {
        let bench = Bench::new(AccessLogMode::Errors, format);
        let mut exchange = bench.exchange(Protocol::Http1, Method::POST, "/payments/7?card=1234");
        exchange.record.request.traceparent = Some(HeaderValue::from_static(TRACE));
        exchange.add_queue_time(ms(1));
        exchange.begin_attempt(1, 1);
        exchange.set_endpoint(address("10.0.0.7:8080"));
        exchange.add_connect_time(ms(5));
        exchange.set_connection(address("10.0.0.7:8080"), ConnectionUse::Reused { age: ms(1500) });
        exchange.set_body_bytes(11, 0);
        tokio::time::advance(ms(2001)).await;
        exchange.refuse(timeout());
        exchange.set_response_head(Instant::now(), StatusCode::GATEWAY_TIMEOUT);
        exchange.complete();
        drop(exchange);
        let lines = bench.lines();
        assert_eq!(lines.len(), 1);
        if format == LineFormat::Text {
            let (time, rest) = lines[0].split_once(' ').unwrap();
            assert!(time.len() == 24 && time.ends_with('Z'), "{time}");
            assert_eq!(
                rest,
                "POST /payments/7 504 request_timeout \"no answer within 2s\" 2.001s attempt 1/1 order->payment/pay \
                 via 10.0.0.7:8080 timeouts.request=2s (policy.yaml:12) closed by hopguard \
                 trace 4bf92f3577b34da6a3ce929d0e0e4736"
            );
            continue;
        }
        let mut line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        line["time"].take();
        let expected = serde_json::json!({
            "time": null, "outcome": "request_timeout", "source": "order", "destination": "payment", "route": "pay",
            "direction": "outbound", "protocol": "http1", "method": "POST", "host": "payment", "path": "/payments/7",
            "status": 504, "duration_ms": 2001.0, "first_byte_ms": 2001.0, "queue_ms": 1.0, "connect_ms": 5.0,
            "bytes_in": 11, "bytes_out": 0, "attempt": 1, "attempts": 1, "endpoint": "10.0.0.7:8080",
            "connection": "reused", "connection_age_ms": 1500.0, "caller": "10.0.0.1:50000",
            "refusal": {"rule": "timeouts.request", "value": "2s", "origin": "policy.yaml:12",
                "detail": "no answer within 2s", "closed_by": "hopguard"},
            "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        });
        assert_eq!(line, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_grpc_line_has_the_status_name_and_the_decoded_message() {
    let bench = Bench::new(AccessLogMode::Errors, LineFormat::Text);
    let mut exchange = bench.exchange(Protocol::Grpc, Method::POST, "http://payment/shop.Payment/Charge");
    exchange.begin_attempt(1, 1);
    tokio::time::advance(ms(812)).await;
    exchange.set_response_head(Instant::now(), StatusCode::OK);
    exchange.set_grpc_status(14, Some(HeaderValue::from_static("bank%20is \"down\"%0A%1b[31m")));
    drop(exchange);
    let lines = bench.lines();
    let (_, rest) = lines[0].split_once(' ').unwrap();
    assert_eq!(
        rest,
        "shop.Payment/Charge UNAVAILABLE \"bank is \\\"down\\\"\\n\\u001b[31m\" 812ms attempt 1/1 order->payment/pay"
    );
    bench.telemetry.access_log.configure(AccessLogSettings { mode: AccessLogMode::Errors, format: LineFormat::Json });
    let mut exchange = bench.exchange(Protocol::Grpc, Method::POST, "http://payment/shop.Payment/Charge");
    exchange.set_response_head(Instant::now(), StatusCode::OK);
    exchange.set_grpc_status(99, Some(HeaderValue::from_bytes(b"\xff%zz").unwrap()));
    drop(exchange);
    let line: serde_json::Value = serde_json::from_str(&bench.lines()[0]).unwrap();
    assert_eq!((&line["grpc_status"], &line["grpc_message"]), (&"99".into(), &"\u{fffd}%zz".into()));
    assert_eq!(line["host"], "payment");
}

#[test]
fn a_text_line_ends_with_what_rules_did_or_would_have_done() {
    let bench = Bench::new(AccessLogMode::All, LineFormat::Text);
    let mut exchange = bench.get();
    let annotations = exchange.annotations_mut();
    (annotations.retry_withheld, annotations.failed_at) = (Some("budget"), Some("bank".into()));
    annotations.dry_run.extend(["rate_limit", "deadline"]);
    done(&mut exchange, 503);
    drop(exchange);
    let line = &bench.lines()[0];
    assert!(line.ends_with(" no retry: budget failed at bank dry run: rate_limit,deadline"), "{line}");
}

#[test]
fn every_field_is_in_the_documents() {
    let bench = Bench::new(AccessLogMode::All, LineFormat::Json);
    let mut exchange = bench.exchange(Protocol::Grpc, Method::POST, "/shop.Payment/Charge");
    exchange.record.request.traceparent = Some(HeaderValue::from_static(TRACE));
    exchange.add_queue_time(ms(1));
    exchange.begin_attempt(1, 2);
    exchange.add_connect_time(ms(1));
    exchange.set_connection(address("[::1]:80"), ConnectionUse::Reused { age: ms(1) });
    exchange.add_upstream_time(ms(1));
    exchange.set_grpc_status(14, Some(HeaderValue::from_static("down")));
    exchange.refuse(timeout());
    let annotations = exchange.annotations_mut();
    (annotations.deadline, annotations.deadline_from) = (Some(ms(300)), Some("caller"));
    (annotations.retry_withheld, annotations.failed_at, annotations.fault) =
        (Some("budget"), Some("bank".into()), Some("slow".into()));
    annotations.dry_run.push("rate_limit");
    done(&mut exchange, 200);
    drop(exchange);
    let line: serde_json::Value = serde_json::from_str(&bench.lines()[0]).unwrap();
    let document = include_str!("../../docs/access-log.md");
    let fields = line.as_object().unwrap();
    assert_eq!(fields.len(), 35, "{fields:?}");
    for field in fields.keys().chain(line["refusal"].as_object().unwrap().keys()) {
        assert!(document.contains(&format!("`{field}`")), "{field} is not in docs/access-log.md");
    }
}

#[test]
fn the_mode_decides_which_exchanges_get_a_line() {
    let count = |mode| {
        let bench = Bench::new(mode, LineFormat::Json);
        let mut counts = Vec::new();
        for status in [200, 404, 503] {
            done(&mut bench.get(), status);
            counts.push(bench.lines().len());
        }
        for code in [0, 5, 14] {
            let mut exchange = bench.exchange(Protocol::Grpc, Method::POST, "/a.B/C");
            head(&mut exchange, 200);
            exchange.set_grpc_status(code, None);
            drop(exchange);
            counts.push(bench.lines().len());
        }
        drop(bench.get());
        counts.push(bench.lines().len());
        counts
    };
    assert_eq!(count(AccessLogMode::Off), [0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(count(AccessLogMode::Errors), [0, 0, 1, 0, 0, 1, 0]);
    assert_eq!(count(AccessLogMode::All), [1, 1, 1, 1, 1, 1, 1]);
    assert_eq!(count(AccessLogMode::Sampled(0.0)), [0, 0, 1, 0, 0, 1, 0]);
    let bench = Bench::new(AccessLogMode::Sampled(0.25), LineFormat::Json);
    for _ in 0..4000 {
        done(&mut bench.get(), 200);
    }
    let lines = bench.lines().len();
    assert!((700..1300).contains(&lines), "a quarter of 4000, not {lines}");
}

#[test]
fn the_query_stays_out_of_the_log() {
    for format in [LineFormat::Json, LineFormat::Text] {
        let bench = Bench::new(AccessLogMode::All, format);
        done(&mut bench.get(), 200);
        let line = bench.lines().remove(0);
        assert!(line.contains("/payments/7") && !line.contains("1234"), "{line}");
    }
}

/// Blocks in its first write until the other end of the channel is dropped.
struct Stuck(std::sync::mpsc::Receiver<()>);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stuck_reader_loses_lines_and_blocks_no_thread() {
    let (release, stuck) = std::sync::mpsc::channel();
    let telemetry = Telemetry::new(Sink::Writer(Box::new(Stuck(stuck))));
    for _ in 0..60_000 {
        telemetry.access_log.enqueue("a line");
    }
    let dropped = telemetry.process.access_log_dropped.value();
    assert!(dropped > 5_000, "{dropped}");
    assert!(!telemetry.access_log.flush(ms(50)));
    drop(release);
    let deadline = Instant::now() + Duration::from_secs(5);
    while !telemetry.access_log.flush(ms(500)) {
        assert!(Instant::now() < deadline, "the writer continues once the reader reads");
    }
    assert_eq!(telemetry.process.access_log_write_errors.value(), 0);
}

#[test]
fn pending_lines_are_bounded_in_bytes_too() {
    let (_release, stuck) = std::sync::mpsc::channel();
    let telemetry = Telemetry::new(Sink::Writer(Box::new(Stuck(stuck))));
    let line = "x".repeat(64 << 10);
    (0..200).for_each(|_| telemetry.access_log.enqueue(&line));
    assert_eq!(telemetry.process.access_log_dropped.value(), 200 - (8 << 20) / (line.len() as u64 + 1));
}

#[test]
fn an_exchange_fits_in_512_bytes() {
    assert!(size_of::<Exchange>() <= 512, "{} bytes", size_of::<Exchange>());
}

/// A page with every family on it, and label values that need escaping.
pub(super) fn full_page(format: PageFormat) -> String {
    let bench = Bench::new(AccessLogMode::Off, LineFormat::Json);
    bench.telemetry.process.workers.set(2);
    bench.telemetry.policy_loaded("a1b2c3", ms(12));
    bench.telemetry.policy_refused();
    bench.shard.destination("a \"quoted\" \\ name\nin two lines").in_flight.set(3);
    bench.shard.destination("payment").connects.increment();
    bench.shard.listener("legacy").accepted.increment();
    record_rule_events(&bench.telemetry);
    let mut exchange = bench.get();
    exchange.add_queue_time(ms(1));
    exchange.add_connect_time(ms(1));
    exchange.add_upstream_time(ms(1));
    done(&mut exchange, 200);
    drop(exchange);
    drop(bench.get());
    bench.telemetry.page(format)
}

fn record_rule_events(telemetry: &Telemetry) {
    telemetry.retried("payment", RetryReason::Failed);
    telemetry.retried("payment", RetryReason::Unsent);
    telemetry.retry_withheld("payment", "budget");
    telemetry.breaker_changed("payment", "open", 2);
    telemetry.ejection_changed("payment", "ejected", 1);
    telemetry.dry_run("payment", "rate_limit");
    telemetry.fault_injected("payment", "slow \"bank\"");
    telemetry.correlation_counter("by_trace_id").increment();
}

#[test]
fn every_family_is_on_the_page_and_in_the_documents() {
    let page = full_page(PageFormat::Text);
    let document = include_str!("../../docs/metrics.md");
    for family in ALL {
        assert!(page.contains(&format!("# TYPE {} ", family.name)), "{} is not on the page", family.name);
        assert!(document.contains(&format!("`{}`", family.name)), "{} is not in docs/metrics.md", family.name);
    }
    assert_eq!(page.matches("# TYPE ").count(), ALL.len());
    for outcome in Outcome::ALL {
        assert!(document.contains(&format!("`{outcome}`")), "{outcome} is not in docs/metrics.md");
    }
}

#[test]
fn empty_histograms_are_omitted() {
    let bench = Bench::new(AccessLogMode::Off, LineFormat::Json);
    drop(bench.get());
    let page = bench.telemetry.page(PageFormat::Text);
    assert!(page.contains("hopguard_request_duration_seconds_bucket"));
    for absent in ["connect", "queue", "overhead", "first_byte"] {
        assert!(!page.contains(&format!("hopguard_{absent}")), "{absent}");
    }
}

#[test]
fn overhead_is_the_time_to_first_byte_without_the_waits() {
    let bench = Bench::new(AccessLogMode::Off, LineFormat::Json);
    let mut exchange = bench.get();
    exchange.add_queue_time(ms(10));
    exchange.add_connect_time(ms(20));
    exchange.add_upstream_time(ms(30));
    exchange.annotations_mut().retry_wait = ms(40);
    exchange.set_response_head(exchange.began + ms(101), StatusCode::OK);
    assert_eq!(exchange.record.overhead(), Some(ms(1)));
    exchange.add_upstream_time(ms(30));
    assert_eq!(exchange.record.overhead(), Some(Duration::ZERO), "waits that overlap never make it negative");
}

#[test]
fn promtool_accepts_the_text_page() {
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        #[expect(clippy::disallowed_methods, reason = "where a peer is missing, only CI fails")]
        let ci = std::env::var("CI").is_ok_and(|value| value == "true");
        assert!(!ci, "promtool is not installed");
        println!("not run: promtool is not installed");
        return;
    };
    promtool.stdin.take().unwrap().write_all(full_page(PageFormat::Text).as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
}
