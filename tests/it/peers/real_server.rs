//! A server of `tests/servers` in a process of its own: started at a port, stopped by signals, with a record of the requests that it executed.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::support::{SOON, peer, python};

/// An interpreter and a framework start within this time on a busy machine.
const START: Duration = Duration::from_secs(60);

/// Which software serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Software {
    Gunicorn,
    Uvicorn,
    Hypercorn,
    Node,
    Go,
    Nginx,
}

/// A running server.
pub(crate) struct RealServer {
    child: Child,
    folder: TempDir,
    pub(crate) addr: SocketAddr,
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers")
}

/// A port below the ephemeral range, so that no outgoing connection takes it while the server is down.
fn unused_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 70) as u16 * 100;
    let candidates = std::iter::repeat_with(|| 20_000 + (first + NEXT.fetch_add(1, Relaxed)) % 8_000);
    candidates.take(8_000).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a port is unused")
}

/// The command without its options; `None` if the software is not installed and need not be.
fn command(software: Software, addr: SocketAddr) -> Option<Command> {
    let module = |name: &str, words: &[&str]| {
        let mut command = Command::new(python()?);
        command.args(["-m", name]).args(words).env("PYTHONPATH", sources()).env("PYTHONDONTWRITEBYTECODE", "1");
        Some(command)
    };
    let (bind, port) = (addr.to_string(), addr.port().to_string());
    let run = |program: PathBuf, words: &[&str]| {
        let mut command = Command::new(program);
        command.args(words);
        Some(command)
    };
    match software {
        Software::Gunicorn => module("gunicorn", &["-b", &bind, "-k", "gthread", "--threads", "32", "wsgi_app:app"]),
        Software::Uvicorn => module("uvicorn", &["--port", &port, "--log-level", "warning", "asgi_app:app"]),
        Software::Hypercorn => module("hypercorn", &["-b", &bind, "asgi_app:app"]),
        Software::Node => run(peer("node")?, &[sources().join("node_app.js").to_str()?]),
        Software::Go => run(peer("peer-go")?, &[]),
        Software::Nginx => run(peer("nginx")?, &[]),
    }
}

impl RealServer {
    /// Starts it with its default settings and waits until it listens. `None` if it is not installed and need not be.
    pub(crate) async fn start(software: Software) -> Option<Self> {
        Self::with(software, &[], &[]).await
    }

    /// The same with more words on its command line, before those of the application, and more variables.
    pub(crate) async fn with(software: Software, words: &[&str], variables: &[(&str, &str)]) -> Option<Self> {
        let addr = SocketAddr::from(([127, 0, 0, 1], unused_port()));
        let mut command = command(software, addr)?;
        let folder = TempDir::new().unwrap();
        let config = folder.path().join("config");
        let words = words.iter().map(|word| word.replace("CONFIG", config.to_str().unwrap()));
        command.args(words).env("PORT", addr.port().to_string()).env("RECORD", folder.path().join("executed"));
        command.envs(variables.iter().copied()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some((_, text)) = variables.iter().find(|(name, _)| *name == "CONFIG") {
            let filled =
                text.replace("FOLDER", folder.path().to_str().unwrap()).replace("PORT", &addr.port().to_string());
            std::fs::write(&config, filled).unwrap();
        }
        let server = Self { child: command.kill_on_drop(true).spawn().expect("the server starts"), folder, addr };
        server.listens().await;
        Some(server)
    }

    async fn listens(&self) {
        let begun = Instant::now();
        while TcpStream::connect(self.addr).await.is_err() {
            assert!(begun.elapsed() < START, "the server does not listen at {}", self.addr);
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Sends a signal by its name.
    pub(crate) async fn signal(&self, name: &str) {
        let id = self.child.id().expect("it runs").to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().await.unwrap().success());
    }

    /// Waits until the process has ended by itself.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        timeout(SOON, self.child.wait()).await.expect("the server does not end").unwrap()
    }

    /// How often each request with an `x-id` was executed.
    pub(crate) fn executed(&self) -> HashMap<String, usize> {
        let mut counts = HashMap::new();
        for line in std::fs::read_to_string(self.folder.path().join("executed")).unwrap_or_default().lines() {
            *counts.entry(line.to_owned()).or_default() += 1;
        }
        counts
    }
}
