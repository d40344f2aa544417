//! The demo as a newcomer meets it: the built binary, its words, its figures, its addresses, and its end.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use tokio::time::Instant;

const HOPS: [&str; 3] = ["caller -> order", "order -> payment", "payment -> bank"];

/// A running demo; killed if the test ends before it does.
struct Demo {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Demo {
    fn start(duration: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_hopguard"))
            .args(["demo", "--duration", duration, "--rate", "40"])
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    /// Everything up to and with the first line that contains `wanted`.
    fn read_to(&mut self, wanted: &str) -> String {
        let mut text = String::new();
        while self.out.read_line(&mut text).unwrap() > 0 {
            if text.lines().last().unwrap().contains(wanted) {
                return text;
            }
        }
        panic!("the demo ended without {wanted:?}:\n{text}");
    }

    fn rest(&mut self) -> String {
        let mut text = String::new();
        self.out.read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // It has usually ended by itself.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn the_demo_shows_the_hops_the_slow_phase_and_the_recovery() {
    let mut demo = Demo::start("6s");
    let opening = demo.read_to("All is well");
    // The first table has been counted, so the metrics have something to say.
    let well = opening + &demo.read_to("payment -> bank");
    for hop in HOPS {
        assert!(well.contains(hop), "{hop} is not in\n{well}");
    }
    for service in ["order", "payment", "bank"] {
        let page = metrics_of(&well, service);
        assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        let wanted = format!("destination=\"{service}\"");
        let counted = |line: &str| line.starts_with("hopguard_requests_total") && line.contains(&wanted);
        assert!(page.lines().any(counted), "no calls to {service} in\n{page}");
    }
    let rest = demo.rest();
    assert_eq!(demo.child.wait().unwrap().code(), Some(0), "{rest}");
    assert!(rest.contains("payment turns slow"), "{rest}");
    assert!(rest.contains("HTTP/1.1 504") && rest.contains("\"rule\":\"timeouts.request\""), "{rest}");
    assert!(rest.contains("504 request_timeout"), "{rest}");
    assert!(rest.contains("payment has recovered"), "{rest}");
    let (slow, recovered) = rest.split_once("payment has recovered").unwrap();
    let (well, slow, recovered) = (p99(&well), p99(slow), p99(recovered));
    assert!(slow > well && slow > recovered, "p99 of payment: {well}ms, then {slow}ms, then {recovered}ms");
    assert!((200.0..=500.0).contains(&slow), "the call is cut after 300ms, but p99 is {slow}ms");
}

#[test]
fn ctrl_c_ends_the_demo_at_once_and_well() {
    let mut demo = Demo::start("30s");
    demo.read_to("All is well");
    let asked = Instant::now();
    let sent = Command::new("kill").args(["-INT", &demo.child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let rest = demo.rest();
    assert_eq!(demo.child.wait().unwrap().code(), Some(0), "{rest}");
    assert!(asked.elapsed() < Duration::from_secs(2), "it took {:?}", asked.elapsed());
    assert!(rest.contains("Stopped."), "{rest}");
}

#[test]
fn a_demo_too_short_to_show_anything_is_refused() {
    let refused = Command::new(env!("CARGO_BIN_EXE_hopguard")).args(["demo", "--duration", "1s"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("at least 3s"));
}

/// The p99 of the calls to payment in the last table of a text, in milliseconds.
fn p99(text: &str) -> f64 {
    let is_row = |line: &&str| line.starts_with("order -> payment pay");
    let row = text.lines().rfind(is_row).unwrap_or_else(|| panic!("no table in\n{text}"));
    let cell = row.split_whitespace().rev().nth(1).unwrap();
    match (cell.strip_suffix("ms"), cell.strip_suffix("us")) {
        (Some(millis), _) => millis.parse().unwrap(),
        (None, Some(micros)) => micros.parse::<f64>().unwrap() / 1e3,
        (None, None) => cell.trim_end_matches('s').parse::<f64>().unwrap() * 1e3,
    }
}

/// What the metrics address of a service answers, head included.
fn metrics_of(text: &str, service: &str) -> String {
    let line = text.lines().find(|line| line.starts_with(service) && line.contains("/metrics")).unwrap();
    let (_, url) = line.rsplit_once("http://").unwrap();
    let address: SocketAddr = url.trim_end_matches("/metrics").parse().unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    page
}
