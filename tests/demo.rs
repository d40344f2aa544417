//! The demo of the built binary: its text, figures, addresses and end.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

const HOPS: [&str; 3] = ["caller -> order", "order -> payment", "payment -> bank"];

/// A running demo; killed on drop if it has not ended.
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

    /// The output up to and including the first line that contains `wanted`.
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
        // Fails if the process has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn the_demo_shows_how_a_failure_is_contained() {
    let mut demo = Demo::start("10s");
    let opening = demo.read_to("All services are healthy");
    // Once the first table is printed, the metrics have samples.
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
    let (between, rest) = rest.split_once("The bank becomes slow").unwrap();
    let (slow, rest) = rest.split_once("payment fails").unwrap();
    let (failing, recovered) = rest.split_once("payment has recovered").unwrap();
    the_bank_is_where_the_time_goes(&(well + between), slow);
    the_breaker_opens_and_order_goes_on(failing);
    assert!(recovered.contains("The circuit breaker closed "), "{recovered}");
    assert_eq!(row(recovered, HOPS[1])[3], "100%", "{recovered}");
    // The order with the short deadline is counted too: on an overloaded machine its response is the 504 that is shown.
    let late = usize::from(slow.contains("    504 Gateway Timeout\n"));
    assert!(late == 1 || slow.contains("    202 Accepted\n"), "{slow}");
    assert!(recovered.contains(&format!("in total; {late} of them failed")), "{recovered}");
    assert_eq!([attempts(recovered, "enforce"), attempts(recovered, "off")], [3, 9], "{recovered}");
}

fn the_bank_is_where_the_time_goes(well: &str, slow: &str) {
    for hop in HOPS {
        let (before, after) = (millis(row(well, hop)[4]), millis(row(slow, hop)[4]));
        assert!(before < 250.0 && after >= 250.0, "the mean of {hop} was {before}ms, then {after}ms:\n{slow}");
    }
    let told = slow.lines().find(|line| line.starts_with("order ")).unwrap_or_else(|| panic!("no order\n{slow}"));
    let left: Vec<_> = told.split(". ").next().unwrap().split(", ").map(|one| one.split(' ').nth(1).unwrap()).collect();
    let left: Vec<_> = left.into_iter().map(millis).collect();
    assert!(left.len() == 3 && left[0] <= 200.0 && left.is_sorted_by(|a, b| a > b), "{left:?} in\n{slow}");
}

fn the_breaker_opens_and_order_goes_on(failing: &str) {
    assert!(failing.contains("HTTP/1.1 503") && failing.contains("\"refusal\":\"circuit_open\""), "{failing}");
    assert!(failing.contains("503 circuit_open"), "{failing}");
    assert!(failing.contains("circuitBreaker.consecutiveFailures is 5"), "{failing}");
    assert_eq!([row(failing, HOPS[0])[3], row(failing, HOPS[1])[3]], ["100%", "0%"], "{failing}");
    let (_, counted) = failing.split_once("In this phase order called payment ").unwrap();
    let (counted, _) = counted.split_once("orders successfully.").unwrap();
    let numbers: Vec<u64> = counted.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
    let [called, reached, refused, opened, good, orders] = numbers[..] else { panic!("{numbers:?} in\n{counted}") };
    assert!(opened > 0 && refused > called / 2, "{counted}");
    assert!((1..called / 2).contains(&reached), "{counted}");
    assert_eq!(good, orders, "{counted}");
}

#[test]
fn ctrl_c_ends_the_demo_at_once_with_exit_code_0() {
    let mut demo = Demo::start("30s");
    demo.read_to("All services are healthy");
    let sent = Command::new("kill").args(["-INT", &demo.child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let rest = demo.rest();
    assert_eq!(demo.child.wait().unwrap().code(), Some(0), "{rest}");
    // Before its phases are over.
    assert!(rest.contains("Stopped.") && !rest.contains("In this phase"), "{rest}");
}

#[test]
fn a_demo_too_short_for_its_phases_is_refused() {
    let refused = Command::new(env!("CARGO_BIN_EXE_hopguard")).args(["demo", "--duration", "5s"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("at least 6s"));
}

/// The cells of a hop in the last table of a text: an empty one, route, calls per second, success, mean and so on.
fn row<'a>(text: &'a str, hop: &str) -> Vec<&'a str> {
    let table = text.rfind("calls/s").unwrap_or_else(|| panic!("no table in\n{text}"));
    let row = text[table..].lines().find_map(|line| line.strip_prefix(hop)).unwrap();
    std::iter::once("").chain(row.split_whitespace()).collect()
}

fn millis(cell: &str) -> f64 {
    match (cell.strip_suffix("ms"), cell.strip_suffix("us")) {
        (Some(millis), _) => millis.parse().unwrap(),
        (None, Some(micros)) => micros.parse::<f64>().unwrap() / 1e3,
        (None, None) => cell.trim_end_matches('s').parse::<f64>().unwrap() * 1e3,
    }
}

/// The attempts at the bank that the last part counted.
fn attempts(text: &str, mode: &str) -> u64 {
    let wanted = format!("rules: {{ retryInOnePlace: {mode} }}");
    let line = text.lines().find_map(|line| line.trim().strip_prefix(&wanted)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// The response of the metrics address of a service, head included.
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
