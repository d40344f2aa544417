//! The signals that a container runtime or a person at a terminal sends.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Which signal came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// SIGTERM: an orchestrator asks; callers may still be on their way here.
    Terminate,
    /// SIGINT, Ctrl-C: a person asks; nobody else is coming.
    Interrupt,
}

/// Those that end the process. Listens from its making on, so that no signal is missed.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// SIGHUP, by which many servers are told to read their files again. From its making on it does not end the process.
pub struct Hangup(Signal);

impl Hangup {
    /// Begins to listen. Fails if the system does not allow it.
    pub fn listen() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::hangup())?))
    }

    /// Returns at the next one.
    pub async fn next(&mut self) {
        self.0.recv().await;
    }
}

impl Signals {
    /// Begins to listen. Fails if the system does not allow it.
    pub fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Returns at the next signal.
    pub async fn next(&mut self) -> Ended {
        tokio::select! {
            _ = self.terminate.recv() => Ended::Terminate,
            _ = self.interrupt.recv() => Ended::Interrupt,
        }
    }
}
