//! What the tests share: hopguard itself, in this process, on ports that the system chooses, and a way to find the real
//! peers that they need.

pub(crate) mod bank;
pub(crate) mod certificates;
pub(crate) mod etc;
pub(crate) mod frames;
pub(crate) mod http;
pub(crate) mod load;
pub(crate) mod nameserver;
pub(crate) mod peer;
pub(crate) mod program;
pub(crate) mod scripted_nameserver;
pub(crate) mod upstream;
pub(crate) mod wire;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hopguard::app::App;
use hopguard::config::Settings;
use hopguard::policy::load::load_str;
use hopguard::telemetry::{PageFormat, Sink};

/// How long a test waits for what has to happen.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// A running hopguard.
pub(crate) struct Mesh {
    app: App,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Mesh {
    /// Starts it with a policy; every `bind` should have port 0.
    pub(crate) async fn start(policy: &str) -> Self {
        Self::with(policy, |_| {}).await
    }

    /// The same, with other settings.
    pub(crate) async fn with(policy: &str, change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = Settings {
            policy: None,
            service: "test".to_owned(),
            admin: "127.0.0.1:0".parse().unwrap(),
            workers: 1,
            grace: Duration::from_secs(5),
            drain_delay: Duration::ZERO,
        };
        change(&mut settings);
        let model = load_str("policy.yaml", policy).unwrap_or_else(|error| panic!("{}", error.render(false)));
        let (sink, lines) = Sink::memory();
        let app = App::start(settings, model, sink).unwrap();
        Self { app, lines }
    }

    /// Where a listener is.
    pub(crate) fn addr(&self, listener: &str) -> SocketAddr {
        let all = self.app.listeners();
        all.iter().find(|(name, _)| name == listener).unwrap_or_else(|| panic!("no {listener} in {all:?}")).1
    }

    /// Where the admin door is.
    pub(crate) fn admin(&self) -> SocketAddr {
        self.app.admin()
    }

    /// The running parts.
    pub(crate) fn app(&self) -> &App {
        &self.app
    }

    /// The metrics page.
    pub(crate) async fn metrics(&self) -> String {
        self.app.telemetry().page(PageFormat::Text)
    }

    /// The value of one series of the metrics page; zero if it is not there.
    pub(crate) fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let page = self.app.telemetry().page(PageFormat::Text);
        let value = |line: &str| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
        page.lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
            .filter(|line| labels.iter().all(|label| line.contains(label)))
            .filter_map(value)
            .sum()
    }

    /// Exchanges that ended so.
    pub(crate) fn count(&self, outcome: &str) -> f64 {
        self.metric("hopguard_requests_total", &[&format!("outcome=\"{outcome}\"")])
    }

    /// Waits until so many exchanges have ended so.
    pub(crate) async fn ended(&self, outcome: &str, count: usize) {
        let instead = || format!("{count} x {outcome}: {:#?}", self.log());
        eventually_or(|| (self.count(outcome) >= count as f64).then_some(()), instead).await;
    }

    /// The access log so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// The access log line of the only exchange that ended so.
    pub(crate) fn line(&self, outcome: &str) -> serde_json::Value {
        let lines: Vec<serde_json::Value> = self
            .log()
            .iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .filter(|line: &serde_json::Value| line["outcome"] == outcome)
            .collect();
        assert_eq!(lines.len(), 1, "{outcome}: {:#?}", self.log());
        lines[0].clone()
    }

    /// Waits for the only exchange that ended so: its access log line, when the metric has counted it too.
    pub(crate) async fn only(&self, outcome: &str) -> serde_json::Value {
        self.ended(outcome, 1).await;
        eventually(|| self.log().iter().any(|line| line.contains(&format!("\"outcome\":\"{outcome}\""))).then_some(()))
            .await;
        assert_eq!(self.count(outcome), 1.0, "{outcome}");
        self.line(outcome)
    }

    /// An exchange that was refused once: the answer, the log line and the metric say so, and name the rule and its value.
    pub(crate) async fn refused(
        &self,
        answer: &http::Answer,
        outcome: &str,
        rule: &str,
        value: &str,
    ) -> serde_json::Value {
        let line = self.only(outcome).await;
        assert_eq!(
            (line["refusal"]["rule"].as_str(), line["refusal"]["value"].as_str()),
            (Some(rule), Some(value)),
            "{line}"
        );
        assert_eq!(line["status"], answer.status.as_u16(), "{line}");
        let proxy_status = answer.header("proxy-status");
        assert!(proxy_status.contains("hopguard") && proxy_status.contains(outcome), "{answer:?}");
        if answer.header("content-type").starts_with("application/grpc") {
            let message = answer.header("grpc-message");
            assert!(message.contains(outcome) && message.contains(rule) && message.contains(value), "{answer:?}");
        } else {
            let problem = answer.problem();
            assert_eq!((&problem["refusal"], &problem["status"]), (&outcome.into(), &line["status"]), "{problem}");
            assert_eq!((&problem["rule"], &problem["value"]), (&rule.into(), &value.into()), "{problem}");
            assert_eq!(problem["policy"], line["refusal"]["origin"], "{problem}");
        }
        line
    }

    /// Puts another policy into force.
    pub(crate) async fn reload(&self, policy: &str) {
        let model = load_str("policy.yaml", policy).unwrap_or_else(|error| panic!("{}", error.render(false)));
        self.app.replace(model).unwrap();
    }

    /// Takes it down, after so long at most; true if nothing was in flight any more.
    pub(crate) async fn stop_within(self, grace: Duration) -> bool {
        self.app.stop(grace).await
    }

    /// Takes it down.
    pub(crate) async fn stop(self) {
        assert!(self.app.stop(Duration::from_secs(5)).await, "something was still in flight");
    }
}

impl Mesh {
    /// Takes it down at the end of a short grace time, with what is still in flight.
    pub(crate) async fn cut_off(self) {
        assert!(!self.app.stop(Duration::from_millis(1)).await, "nothing was in flight");
    }
}

/// Looks again and again until there is something to see; fails when it takes too long.
pub(crate) async fn eventually<T>(look: impl FnMut() -> Option<T>) -> T {
    eventually_or(look, String::new).await
}

/// The same, and the failure says what there was instead.
async fn eventually_or<T>(mut look: impl FnMut() -> Option<T>, instead: impl Fn() -> String) -> T {
    let begun = std::time::SystemTime::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(begun.elapsed().unwrap() < SOON, "it did not happen: {}", instead());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

const INSTALLS: &str = "scripts/peers installs it";

/// A program on PATH, or in `target/peers/bin`. Where there is none, the test is not run, which is a failure in CI.
pub(crate) fn peer(name: &str) -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::iter::once(own)
        .chain(std::env::split_paths(&path))
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|file| file.is_file());
    found.or_else(|| missing(name, INSTALLS))
}

/// A Python with `tests/peers/requirements.txt` installed.
pub(crate) fn python() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/venv/bin/python3");
    let works = python.is_file()
        && Command::new(&python)
            .args(["-c", "import grpc, gunicorn, hypercorn, uvicorn, websockets"])
            .status()
            .is_ok_and(|status| status.success());
    if works { Some(python) } else { missing("python3 with tests/peers/requirements.txt", INSTALLS) }
}

/// Says that a test is not run, which is a failure in CI.
pub(crate) fn missing<T>(what: &str, remedy: &str) -> Option<T> {
    assert!(std::env::var_os("CI").is_none(), "{what} is missing; {remedy}");
    println!("not run: {what} is missing; {remedy}");
    None
}
