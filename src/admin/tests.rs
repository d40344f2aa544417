//! The admin server over real sockets, and its status page in a real browser.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use http::{HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use super::*;
use crate::telemetry::{
    ClosedBy, DirectionLabel, Exchange, HopLabels, Outcome, Protocol, RefusalRecord, RequestLine, Sink, Telemetry,
};

/// Stands in for the composition root.
#[derive(Default)]
struct Fake {
    reasons: Vec<String>,
    error: Option<String>,
    drains: AtomicU32,
}

impl ProcessView for Fake {
    fn ready(&self) -> Result<(), Vec<String>> {
        if self.reasons.is_empty() { Ok(()) } else { Err(self.reasons.clone()) }
    }

    fn policy_json(&self) -> String {
        r#"{"hash":"a1b2c3"}"#.to_owned()
    }

    fn begin_drain(&self) {
        self.drains.fetch_add(1, Ordering::Relaxed);
    }

    fn status(&self) -> StatusView {
        StatusView {
            service: "order".to_owned(),
            state: if self.reasons.is_empty() { State::Ready } else { State::Starting },
            policy_path: "/etc/hopguard/policy.yaml".to_owned(),
            last_error: self.error.clone().map(|message| PolicyError { message, at: Instant::now() }),
            listeners: vec![ListenerView {
                name: "legacy".to_owned(),
                address: "0.0.0.0:8080".parse().unwrap(),
                direction: "inbound",
                to: Some("payment".to_owned()),
                tls: false,
                max_streams: 256,
                connections_at_max_streams: 2,
            }],
        }
    }
}

struct Fixture {
    server: AdminServer,
    process: Arc<Fake>,
    telemetry: Arc<Telemetry>,
}

fn start(fake: Fake) -> Fixture {
    let (process, telemetry) = (Arc::new(fake), Telemetry::new(Sink::memory().0));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = spawn(listener, process.clone(), telemetry.clone()).unwrap();
    Fixture { server, process, telemetry }
}

impl Fixture {
    /// Sends one request verbatim and returns the whole response.
    fn send(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.server.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    }

    fn request(&self, method: &str, path: &str, fields: &str) -> (u16, String) {
        let response =
            self.send(&format!("{method} {path} HTTP/1.1\r\nHost: localhost:1\r\nConnection: close\r\n{fields}\r\n"));
        (response[9..12].parse().unwrap(), response)
    }

    fn get(&self, path: &str) -> (u16, String) {
        self.request("GET", path, "")
    }

    /// Records `count` exchanges that end with `outcome`.
    fn exchanges(&self, route: &str, outcome: Outcome, count: usize) {
        let shard = self.telemetry.shard(0);
        let hop = self.telemetry.hops.register(HopLabels::new("order", "payment", route, DirectionLabel::Outbound));
        for _ in 0..count {
            let request = RequestLine {
                method: Method::GET,
                uri: Uri::from_static("/"),
                host: None,
                caller: None,
                traceparent: None,
            };
            let mut exchange = Exchange::begin(shard.clone(), Instant::now(), hop, Protocol::Http1, request);
            exchange.add_upstream_time(Duration::ZERO);
            exchange.set_response_head(Instant::now(), StatusCode::OK);
            exchange.complete();
            if outcome != Outcome::Ok {
                exchange.refuse(RefusalRecord {
                    outcome,
                    rule: "timeouts.request",
                    value: "2s".to_owned(),
                    origin: "built in".to_owned(),
                    detail: "late".to_owned(),
                    closed_by: ClosedBy::Hopguard,
                });
            }
        }
    }
}

#[test]
fn each_path_responds_and_names_the_allowed_methods() {
    let admin = start(Fake::default());
    let cases = [
        ("GET", "/live", 200, "\r\n\r\nlive\n"),
        ("GET", "/ready", 200, "\r\n\r\nready\n"),
        ("GET", "/ready?x=1", 200, "\r\n\r\nready\n"),
        ("GET", "/policy", 200, "\r\n\r\n{\"hash\":\"a1b2c3\"}"),
        ("GET", "/metrics", 200, "content-type: text/plain; version=0.0.4"),
        ("GET", "/", 200, "content-security-policy: default-src 'none'"),
        ("GET", "/drain", 405, "allow: POST\r\n"),
        ("POST", "/metrics", 405, "allow: GET, HEAD\r\n"),
        ("DELETE", "/", 405, "allow: GET, HEAD\r\n"),
        ("PUT", "/drain", 405, "allow: POST\r\n"),
        ("GET", "/metric", 404, "/metrics  Prometheus"),
        ("POST", "/nowhere", 404, "/drain    POST"),
    ];
    for (method, path, status, part) in cases {
        let (got, response) = admin.request(method, path, "");
        assert_eq!(got, status, "{method} {path}");
        assert!(response.contains(part), "{method} {path}: {response}");
        assert!(response.contains("cache-control: no-store\r\n"), "{method} {path}");
    }
    assert_eq!(admin.process.drains.load(Ordering::Relaxed), 0);
}

#[test]
fn head_has_the_length_of_get_and_no_body() {
    let admin = start(Fake::default());
    for path in ["/", "/live", "/policy"] {
        let length = |response: &str| {
            let at = response.find("content-length: ").unwrap() + 16;
            response[at..].split("\r\n").next().unwrap().parse::<usize>().unwrap()
        };
        let (_, get) = admin.get(path);
        let (status, head) = admin.request("HEAD", path, "");
        assert_eq!(status, 200);
        assert!(head.ends_with("\r\n\r\n"), "{head}");
        assert_eq!(length(&head), length(&get));
        assert_eq!(length(&get), get.split_once("\r\n\r\n").unwrap().1.len());
    }
}

#[test]
fn not_ready_has_reasons_and_live_stays_200() {
    let admin = start(Fake { reasons: vec!["listener legacy is not open".to_owned()], ..Fake::default() });
    let (status, response) = admin.get("/ready");
    assert_eq!(status, 503);
    assert!(response.ends_with("not ready\nlistener legacy is not open\n"), "{response}");
    assert_eq!(admin.get("/live").0, 200);
}

#[test]
fn a_foreign_page_cannot_drain() {
    let admin = start(Fake::default());
    let request = |host: &str, fields: &str| {
        let response =
            admin.send(&format!("POST /drain HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{fields}\r\n"));
        response[9..12].to_owned()
    };
    let refused = [
        ("localhost:15000", "Origin: http://evil.example\r\n"),
        ("localhost:15000", "Origin: null\r\n"),
        ("localhost:15000", "Origin: http://localhost\r\n"),
        ("localhost:15000", "Origin: \r\n"),
        ("evil.example:15000", "Origin: http://evil.example:15000\r\n"),
        ("localhost:15000", "Sec-Fetch-Site: cross-site\r\n"),
        ("localhost:15000", "Sec-Fetch-Site: same-site\r\n"),
    ];
    for (host, fields) in refused {
        assert_eq!(request(host, fields), "403", "{host} {fields}");
    }
    assert_eq!(admin.process.drains.load(Ordering::Relaxed), 0);
    let allowed = [
        ("anything", ""),
        ("localhost:15000", "Origin: http://localhost:15000\r\nSec-Fetch-Site: same-origin\r\n"),
        ("127.0.0.1:15000", "Origin: http://127.0.0.1:15000\r\n"),
        ("[::1]:15000", "Origin: http://[::1]:15000\r\nContent-Length: 0\r\n"),
    ];
    for (host, fields) in allowed {
        assert_eq!(request(host, fields), "202", "{host} {fields}");
    }
    assert_eq!(admin.process.drains.load(Ordering::Relaxed), 4);
}

#[test]
fn a_scraper_may_ask_for_openmetrics() {
    let admin = start(Fake::default());
    admin.exchanges("pay", Outcome::Ok, 3);
    let (_, response) = admin.request("GET", "/metrics", "Accept: application/openmetrics-text;version=1.0.0\r\n");
    assert!(response.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"));
    assert!(response.ends_with("# EOF\n"));
    let line = "hopguard_requests_total{source=\"order\",destination=\"payment\",route=\"pay\",\
        direction=\"outbound\",protocol=\"http1\",outcome=\"ok\"} 3\n";
    assert!(response.contains(line), "{response}");
    assert!(admin.get("/metrics").1.contains(line));
}

#[test]
fn the_status_document_has_the_figures_of_the_page() {
    let admin = start(Fake { error: Some("policy.yaml:5:40: no unit".to_owned()), ..Fake::default() });
    admin.telemetry.policy_loaded("a1b2c3d4", Duration::from_millis(3));
    admin.telemetry.shard(0).destination("payment").in_flight.add(2);
    admin.telemetry.shard(0).destination("stock").open.add(1);
    admin.telemetry.breaker_changed("payment", "open", 2);
    admin.telemetry.ejection_changed("payment", "ejected", 1);
    admin.exchanges("pay", Outcome::Ok, 3);
    admin.exchanges("pay", Outcome::RequestTimeout, 1);
    let (_, response) = admin.get("/status");
    let status: serde_json::Value = serde_json::from_str(response.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(status["state"], "ready");
    assert_eq!(status["policy"]["hash"], "a1b2c3d4");
    assert_eq!(status["policy"]["lastError"]["message"], "policy.yaml:5:40: no unit");
    assert_eq!(status["listeners"][0]["address"], "0.0.0.0:8080");
    let payment = &status["destinations"][0];
    assert_eq!(
        (&payment["inFlight"], &payment["circuitBreaker"], &payment["ejectedEndpoints"]),
        (&2.into(), &"open".into(), &1.into())
    );
    assert_eq!(status["destinations"][1]["circuitBreaker"], "closed");
    let hop = &status["hops"][0];
    assert_eq!((&hop["count"], &hop["failures"]), (&4.into(), &1.into()));
    assert_eq!(hop["outcomes"], serde_json::json!({"ok": 3, "request_timeout": 1}));
    let (buckets, bounds) = (hop["buckets"].as_array().unwrap(), status["boundsMs"].as_array().unwrap());
    assert_eq!(buckets.len(), bounds.len() + 1);
    assert!(status["process"]["residentBytes"].as_u64().unwrap() > 0);
}

#[test]
fn beyond_the_bound_hops_with_few_exchanges_are_omitted() {
    let admin = start(Fake::default());
    for route in 0..510 {
        admin.exchanges(&route.to_string(), Outcome::Ok, 1);
    }
    admin.exchanges("busy", Outcome::Ok, 5);
    let (_, response) = admin.get("/status");
    let status: serde_json::Value = serde_json::from_str(response.split_once("\r\n\r\n").unwrap().1).unwrap();
    let hops = status["hops"].as_array().unwrap();
    assert_eq!((hops.len(), &status["hopsLeftOut"]), (500, &11.into()));
    assert!(hops.iter().any(|hop| hop["route"] == "busy"));
}

#[tokio::test]
async fn http2_works_and_head_has_no_body() {
    let admin = start(Fake::default());
    let stream = tokio::net::TcpStream::connect(admin.server.address()).await.unwrap();
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, TokioIo::new(stream)).await.unwrap();
    let client = async {
        for (method, body) in [(Method::GET, "live\n"), (Method::HEAD, "")] {
            let request = Request::builder().method(method).uri("http://localhost/live");
            let response = sender.send_request(request.body(Empty::<bytes::Bytes>::new()).unwrap()).await.unwrap();
            assert_eq!(response.headers()["content-length"], HeaderValue::from_static("5"));
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), body);
        }
        let mut request = Request::post("http://evil.example/drain").body(Empty::new()).unwrap();
        request.headers_mut().insert("origin", HeaderValue::from_static("http://evil.example"));
        assert_eq!(sender.send_request(request).await.unwrap().status(), StatusCode::FORBIDDEN);
    };
    tokio::select! {
        () = client => {}
        ended = connection => panic!("the connection ended first: {ended:?}"),
    }
}

#[test]
fn a_method_that_begins_like_the_http2_preface_is_http1() {
    let admin = start(Fake::default());
    let mut stream = TcpStream::connect(admin.server.address()).unwrap();
    stream.set_nodelay(true).unwrap();
    for piece in ["P", "OST /drain HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"] {
        stream.write_all(piece.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(30));
    }
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    assert!(response.starts_with("HTTP/1.1 202 "), "{response}");
}

#[test]
fn a_stopped_server_closes_its_port() {
    let Fixture { server, .. } = start(Fake::default());
    let address = server.address();
    server.stop();
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_browser_renders_the_page() {
    let admin = start(Fake {
        reasons: vec!["listener legacy is not open".to_owned()],
        error: Some("policy.yaml:5:40: <b>no unit</b>".to_owned()),
        ..Fake::default()
    });
    admin.exchanges("pay", Outcome::Ok, 300);
    admin.exchanges("pay", Outcome::RequestTimeout, 100);
    let profile = tempfile::tempdir().unwrap();
    let browser = Command::new("timeout")
        .args([
            "60",
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--virtual-time-budget=5000",
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg("--dump-dom")
        .arg(format!("http://{}/", admin.server.address()))
        .output();
    // 127: no such program.
    let output = browser.ok().filter(|output| output.status.code() != Some(127));
    let Some(output) = output else {
        #[expect(clippy::disallowed_methods, reason = "where a peer is missing, only CI fails")]
        let ci = std::env::var("CI").is_ok_and(|value| value == "true");
        assert!(!ci, "chromium is not installed");
        println!("not run: chromium is not installed");
        return;
    };
    let page = String::from_utf8_lossy(&output.stdout);
    for part in [
        "<title>order · hopguard</title>",
        "order → payment / pay",
        ">starting</span>",
        "Not ready: listener legacy is not open",
        "policy.yaml:5:40: &lt;b&gt;no unit&lt;/b&gt;",
        "0.0.0.0:8080",
        ">400<",
    ] {
        assert!(page.contains(part), "{part:?} is missing in {page}\n{}", String::from_utf8_lossy(&output.stderr));
    }
}
