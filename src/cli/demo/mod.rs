//! `hopguard demo`: three services, each with its own hopguard. One becomes slow, one fails and recovers; order keeps working.
//!
//! | file | content |
//! |---|---|
//! | `phases` | the phases and their texts |
//! | `report` | texts from measurements |
//! | `attempts` | the last part: attempts at the bank with and without `retryInOnePlace` |
//! | `chain` | the three services with their hopguards and policies |
//! | `service`, `client`, `load` | the small services, the client of their calls, and the load |
//! | `counts`, `screen` | the counters, and the table of hops made from them |
//!
//! Everything runs on loopback, on free ports, in this process, bounded in time, calls and connections.
#![allow(clippy::print_stderr, reason = "start-up errors go to the terminal")]

mod attempts;
mod chain;
mod client;
mod counts;
mod load;
mod phases;
mod report;
mod screen;
mod service;

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Stdout};
use std::process::ExitCode;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::time::{Instant, sleep, sleep_until};

use crate::cli::DemoArgs;
use crate::runtime::signals::Signals;

use chain::{Chain, HOPS, HopSpec};
use counts::ChainCounts;
use load::Load;
use phases::Phase;
use screen::{HopRow, Screen};

const CANNOT_START: u8 = 3;

/// Minimum duration in which every phase still shows its effect.
pub(super) const SHORTEST: Duration = Duration::from_secs(6);

/// Interval at which the telemetry is read and a terminal is redrawn.
const TICK: Duration = Duration::from_millis(500);
/// A table covers at most this much of the current phase, up to now.
const SPAN: Duration = Duration::from_secs(3);
/// Time at the start of a phase that is not measured: by its end, all calls of the previous phase have ended.
const SETTLE: Duration = Duration::from_millis(400);
/// Interval and time limit of the wait for the circuit breaker to close.
const POLL: Duration = Duration::from_millis(10);
const RECOVERY_LIMIT: Duration = Duration::from_secs(4);

/// Runs the demo to its end, to the first signal, or until the reader closes the output. Returns the exit code.
pub(super) fn run(args: &DemoArgs) -> ExitCode {
    let runtime = match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
        Ok(runtime) => runtime,
        Err(error) => return cannot_start(&error.into()),
    };
    runtime.block_on(async {
        let started = match Signals::listen() {
            Ok(signals) => Chain::start("").await.map(|chain| (signals, chain)),
            Err(error) => Err(error.into()),
        };
        let (mut signals, chain) = match started {
            Ok(started) => started,
            Err(error) => return cannot_start(&error),
        };
        let mut demo = Demo::new(&chain, args.duration);
        tokio::select! {
            // A closed output (`| head`) ends the demo without an error.
            _written = Box::pin(demo.run(args.rate)) => {}
            _ = signals.next() => drop(demo.print_stopped()),
        }
        chain.stop().await;
        ExitCode::SUCCESS
    })
}

fn cannot_start(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: the demo cannot start: {error:#}");
    CANNOT_START.into()
}

/// The running demo.
struct Demo<'a> {
    chain: &'a Chain,
    duration: Duration,
    screen: Screen<Stdout>,
    /// Interval between two tables.
    table_interval: Duration,
    /// Finished phases with their counters.
    finished: Vec<(Phase, ChainCounts)>,
}

impl<'a> Demo<'a> {
    fn new(chain: &'a Chain, duration: Duration) -> Self {
        let terminal = io::stdout().is_terminal();
        let table_interval = if terminal { TICK } else { (duration / 10).clamp(TICK, Duration::from_secs(5)) };
        Self { chain, duration, screen: Screen::new(io::stdout(), terminal), table_interval, finished: Vec::new() }
    }

    /// Runs all phases. Fails if the reader has closed the output.
    async fn run(&mut self, rate: u32) -> io::Result<()> {
        self.screen.print(&phases::introduction(self.chain, self.duration, rate))?;
        let load = Load::start(self.chain.order.inbound, rate);
        let begun = Instant::now();
        let mut end = begun;
        for phase in Phase::ALL {
            let before = ChainCounts::read(self.chain);
            phase.apply(self.chain);
            end += phase.duration(self.duration);
            self.screen.print(&format!("[{}s] {}\n", begun.elapsed().as_secs(), phase.description()))?;
            if phase == Phase::Recovered {
                self.wait_for_closed_breaker().await?;
            }
            self.watch(phase, end).await?;
            if phase == Phase::Failing
                && let Some(text) = report::failing(&ChainCounts::read(self.chain).since(&before))
            {
                self.screen.print(&text)?;
            }
        }
        drop(load);
        self.screen.keep_table()?;
        self.screen.print(&report::closing(&self.finished, &ChainCounts::read(self.chain)))?;
        self.screen.print(&Box::pin(attempts::compare_modes()).await?)?;
        self.screen.print("End of the demo. README.md describes how to write a policy for your own service.")
    }

    /// Prints the last line after a signal.
    fn print_stopped(&mut self) -> io::Result<()> {
        self.screen.keep_table()?;
        self.screen.print("Stopped.")
    }

    /// Waits until order's circuit breaker for payment is closed, and prints how long that took.
    async fn wait_for_closed_breaker(&mut self) -> io::Result<()> {
        let begun = Instant::now();
        while !counts::is_breaker_closed(self.chain) {
            if begun.elapsed() > RECOVERY_LIMIT {
                return Ok(());
            }
            sleep(POLL).await;
        }
        let took = screen::short(begun.elapsed());
        self.screen.print(&format!("The circuit breaker closed {took} after payment had recovered.\n"))
    }

    /// Prints tables until the phase ends, and once the example of the phase.
    async fn watch(&mut self, phase: Phase, end: Instant) -> io::Result<()> {
        let mut next = Instant::now() + SETTLE;
        sleep_until(next).await;
        let begin = ChainCounts::read(self.chain);
        let mut readings = VecDeque::from([(Instant::now(), begin.clone())]);
        let mut due = next + self.table_interval;
        let mut has_example = false;
        while next < end {
            next = end.min(next + TICK);
            sleep_until(next).await;
            if !has_example {
                has_example = true;
                self.print_example(phase).await?;
            }
            readings.push_back((Instant::now(), ChainCounts::read(self.chain)));
            while readings.len() > 2 && readings[1].0.elapsed() >= SPAN {
                readings.pop_front();
            }
            if Instant::now() >= due {
                due += self.table_interval;
                self.print_table(&readings)?;
            }
        }
        self.finished.push((phase, ChainCounts::read(self.chain).since(&begin)));
        Ok(())
    }

    fn print_table(&mut self, readings: &VecDeque<(Instant, ChainCounts)>) -> io::Result<()> {
        let (Some((from, first)), Some((to, last))) = (readings.front(), readings.back()) else { return Ok(()) };
        let hops = last.since(first).hops;
        let row = |(hop, counts): (&HopSpec, _)| HopRow { hop: hop.title(), route: hop.route, counts };
        let rows = HOPS.iter().zip(hops).map(row);
        self.screen.print_table(&rows.collect::<Vec<_>>(), to.saturating_duration_since(*from))
    }

    /// Prints one call that shows the rule of the phase.
    async fn print_example(&mut self, phase: Phase) -> io::Result<()> {
        let text = match phase {
            Phase::Slow => Box::pin(report::deadline(self.chain)).await,
            Phase::Failing => Box::pin(report::local_reply(self.chain)).await,
            Phase::Healthy | Phase::Recovered => None,
        };
        // Without a response there is no example; the table continues.
        text.map_or(Ok(()), |text| self.screen.print(&text))
    }
}
