//! A program of `tests/peers` as a child process: started, driven by lines of JSON, killed when the test ends.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

/// The longest that a program may take for one answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server that runs until it is dropped.
pub(crate) struct Server {
    _child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    /// The first line that it printed: where it listens.
    pub(crate) ready: Value,
}

impl Server {
    /// Starts a script and waits until it says where it listens.
    pub(crate) async fn start(python: &Path, script: &str) -> Server {
        let mut command = Command::new(python);
        command.arg(path(script));
        Self::run(command).await
    }

    /// The same with any program.
    pub(crate) async fn run(mut command: Command) -> Server {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("the program starts");
        let input = child.stdin.take().expect("piped");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut server = Server { _child: child, input, lines, ready: Value::Null };
        server.ready = server.line().await;
        server
    }

    /// The port that it listens on, by the name it gave it.
    pub(crate) fn port(&self, name: &str) -> u64 {
        self.ready[name].as_u64().expect("a server says where it listens")
    }

    /// What it has seen so far.
    pub(crate) async fn report(&mut self) -> Value {
        self.report_when(&Value::Null).await
    }

    /// What it has seen once that is as wanted, or after ten seconds all the same.
    pub(crate) async fn report_when(&mut self, wanted: &Value) -> Value {
        self.ask(wanted).await
    }

    /// The line that it prints after it has read this one.
    pub(crate) async fn ask(&mut self, line: &Value) -> Value {
        self.input.write_all(format!("{line}\n").as_bytes()).await.expect("the server runs");
        self.line().await
    }

    async fn line(&mut self) -> Value {
        let line = timeout(PATIENCE, self.lines.next_line()).await.expect("the server answers in time");
        let line = line.expect("readable").expect("the server runs");
        serde_json::from_str(&line).expect("the server prints JSON")
    }
}

/// Runs a client to its end and reads its report.
pub(crate) async fn client(python: &Path, script: &str, target: &str, cases: &[&str]) -> Value {
    let mut command = Command::new(python);
    command.arg(path(script)).arg(target).args(cases).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(PATIENCE, command.output()).await.expect("the client ends in time");
    let output = output.expect("the interpreter starts");
    let report = serde_json::from_slice(&output.stdout);
    report.unwrap_or_else(|_| panic!("{script}: {}", String::from_utf8_lossy(&output.stderr)))
}

fn path(script: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers").join(script)
}
