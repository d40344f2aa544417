//! The real binary: run as users run it, ended with the test.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use super::http::{Answer, ask, empty, get, request};
use super::{SOON, eventually};

/// A running `hopguard run`.
pub(crate) struct Program {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    access: Arc<Mutex<Vec<String>>>,
    admin: SocketAddr,
}

/// The outcome of a command that ended by itself.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) error: String,
}

/// Puts a file in place at once.
pub(crate) fn replace(file: &Path, text: &str) {
    let beside = file.with_extension("new");
    std::fs::write(&beside, text).unwrap();
    std::fs::rename(beside, file).unwrap();
}

/// The binary, without the variables of the one who runs the tests.
pub(crate) fn hopguard(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hopguard"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HOPGUARD_")) {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null()).env("NO_COLOR", "1").kill_on_drop(true);
    command
}

/// Runs a command to its end.
pub(crate) async fn end(mut command: Command) -> Ended {
    let output = timeout(SOON, command.output()).await.expect("the command does not end").unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: output.status.code(), out: text(&output.stdout), error: text(&output.stderr) }
}

impl Program {
    /// Starts it with a policy, an admin door on any port, one worker, and waits until it is ready.
    pub(crate) async fn run(policy: &std::path::Path, more: &[&str]) -> Self {
        let policy = policy.to_str().unwrap();
        let mut command = hopguard(&["run", "--policy", policy, "--admin", "127.0.0.1:0", "--log-format", "json"]);
        if !more.contains(&"--workers") {
            command.args(["--workers", "1"]);
        }
        command.args(more);
        Self::start(command).await
    }

    /// Starts a command that logs JSON, and waits until it is ready.
    pub(crate) async fn start(command: Command) -> Self {
        Self::writing_to(command, Stdio::piped()).await
    }

    /// The same, with its access log somewhere else than here.
    pub(crate) async fn writing_to(mut command: Command, access_log: Stdio) -> Self {
        let mut child = command.stdout(access_log).stderr(Stdio::piped()).spawn().unwrap();
        let access = child.stdout.take().map(gather).unwrap_or_default();
        let log = gather(child.stderr.take().unwrap());
        let mut program = Self { child, log, access, admin: "127.0.0.1:0".parse().unwrap() };
        let ready = program.said("ready").await;
        program.admin = ready["admin"].as_str().unwrap().parse().unwrap();
        program
    }

    /// Waits for a line of its own log whose message begins so.
    pub(crate) async fn said(&self, message: &str) -> Value {
        let begins = |line: &String| {
            let line: Value = serde_json::from_str(line).ok()?;
            line["message"].as_str()?.starts_with(message).then_some(line)
        };
        eventually(|| self.log.lock().unwrap().iter().find_map(begins)).await
    }

    /// Its own log so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// The access log so far.
    pub(crate) fn access(&self) -> Vec<Value> {
        self.access.lock().unwrap().iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The same where it is not JSON.
    pub(crate) fn access_text(&self) -> Vec<String> {
        self.access.lock().unwrap().clone()
    }

    /// GET from the admin door.
    pub(crate) async fn get(&self, path: &str) -> Answer {
        timeout(SOON, get(self.admin, path)).await.expect("the admin door does not answer")
    }

    /// A JSON document of the admin door.
    pub(crate) async fn document(&self, path: &str) -> Value {
        serde_json::from_slice(&self.get(path).await.body).unwrap()
    }

    /// Waits, no longer than `limit`, until `/policy` is as wanted.
    pub(crate) async fn policy_until(&self, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let policy = self.document("/policy").await;
            if wanted(&policy) {
                return policy;
            }
            assert!(begun.elapsed() < limit, "it did not come to that: {policy:#}\n{}", self.log());
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// The sum of the series of a metric that carry these labels.
    pub(crate) async fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let page = self.get("/metrics").await.body;
        let page = String::from_utf8_lossy(&page).into_owned();
        page.lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
            .filter(|line| labels.iter().all(|label| line.contains(label)))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Where a listener is now.
    pub(crate) async fn addr(&self, listener: &str) -> Option<SocketAddr> {
        let status = self.document("/status").await;
        let all = status["listeners"].as_array().unwrap();
        all.iter().find(|one| one["name"] == listener)?["address"].as_str()?.parse().ok()
    }

    /// Asks it to drain.
    pub(crate) async fn drain(&self) -> Answer {
        ask(self.admin, request("POST", "/drain").body(empty()).unwrap()).await
    }

    /// Sends a signal by its name.
    pub(crate) async fn signal(&self, name: &str) {
        let id = self.child.id().expect("it runs").to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().await.unwrap().success());
    }

    /// Waits until it has ended.
    pub(crate) async fn ended(&mut self, within: Duration) -> ExitStatus {
        timeout(within, self.child.wait()).await.unwrap_or_else(|_| panic!("it still runs; {}", self.log())).unwrap()
    }
}

/// Reads lines in the background.
pub(super) fn gather(from: impl AsyncRead + Send + Unpin + 'static) -> Arc<Mutex<Vec<String>>> {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let all = Arc::clone(&lines);
    tokio::spawn(async move {
        let mut from = BufReader::new(from).lines();
        while let Ok(Some(line)) = from.next_line().await {
            all.lock().unwrap().push(line);
        }
    });
    lines
}
