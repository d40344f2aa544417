//! Unix signals that end the process (SIGTERM, SIGINT) or make it read its files again (SIGHUP).
//!
//! `cli::run` listens for them on the main thread. From the call of `listen` on, a signal does not end the process by
//! itself.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signal that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGTERM, from an orchestrator: new calls may still arrive for a while.
    Terminate,
    /// SIGINT, Ctrl-C at a terminal: no new calls are expected.
    Interrupt,
}

/// Receives SIGTERM and SIGINT.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// Receives SIGHUP, the usual request to read configuration files again.
pub struct Hangup(Signal);

impl Hangup {
    /// Begins to listen; a signal sent from now on is not missed.
    ///
    /// # Errors
    /// If the system refuses to install the signal handler.
    pub fn listen() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::hangup())?))
    }

    /// Returns at the next SIGHUP.
    pub async fn next(&mut self) {
        self.0.recv().await;
    }
}

impl Signals {
    /// Begins to listen; a signal sent from now on is not missed.
    ///
    /// # Errors
    /// If the system refuses to install a signal handler.
    pub fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Returns at the next SIGTERM or SIGINT.
    pub async fn next(&mut self) -> StopSignal {
        tokio::select! {
            _ = self.terminate.recv() => StopSignal::Terminate,
            _ = self.interrupt.recv() => StopSignal::Interrupt,
        }
    }
}
