//! `hopguard demo`: three services, each with its own hopguard; one turns slow, one fails and recovers, and order goes on.
//!
//! | file | what |
//! |---|---|
//! | `story` | what happens, and the words for it |
//! | `report` | what was measured, in words |
//! | `tries` | the last chapter: tries at the bank with and without `retryInOnePlace` |
//! | `chain` | the three hopguards, with their policies |
//! | `service`, `client`, `load` | the small services, how they call each other, and who calls them |
//! | `reading`, `screen` | what was counted, and the table of hops made from it |
//!
//! Everything runs on loopback, on free ports, in this process; it is bounded in time, calls and connections.
#![allow(clippy::print_stderr, reason = "what keeps the demo from starting is said to the person at the terminal")]

mod chain;
mod client;
mod load;
mod reading;
mod report;
mod screen;
mod service;
mod story;
mod tries;

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Stdout};
use std::process::ExitCode;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::time::{Instant, sleep, sleep_until};

use crate::cli::DemoArgs;
use crate::runtime::signals::Signals;

use chain::{Chain, PLACES};
use load::Load;
use reading::Reading;
use screen::{Row, Screen};
use story::Phase;

const NO_START: u8 = 3;

/// The shortest demo that still has something to show in each phase.
pub(super) const SHORTEST: Duration = Duration::from_secs(6);

/// How often the telemetry is read, and a terminal redrawn.
const TICK: Duration = Duration::from_millis(500);
/// The figures of a table are those of the last seconds of the present phase.
const SPAN: Duration = Duration::from_secs(3);
/// Calls that began before a phase are no part of its figures; all of them are over by then.
const SETTLE: Duration = Duration::from_millis(400);
/// How often, and for how long at most, it is looked whether the breaker is closed again.
const LOOK: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(4);

/// Runs the demo to its end, or to the first signal. Whoever closes our output ends it too.
pub(super) fn run(args: &DemoArgs) -> ExitCode {
    let runtime = match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
        Ok(runtime) => runtime,
        Err(error) => return no_start(&error.into()),
    };
    runtime.block_on(async {
        let started = match Signals::listen() {
            Ok(signals) => Chain::start("").await.map(|chain| (signals, chain)),
            Err(error) => Err(error.into()),
        };
        let (mut signals, chain) = match started {
            Ok(started) => started,
            Err(error) => return no_start(&error),
        };
        let mut show = Show::new(&chain, args.duration);
        tokio::select! {
            // Whoever closed our output does not want to read why it could not be written.
            _told = Box::pin(show.tell(args.rate)) => {}
            _ = signals.next() => drop(show.stopped()),
        }
        chain.stop().await;
        ExitCode::SUCCESS
    })
}

fn no_start(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: the demo cannot start: {error:#}");
    NO_START.into()
}

/// The demo as it is shown.
struct Show<'a> {
    chain: &'a Chain,
    duration: Duration,
    screen: Screen<Stdout>,
    /// How often a table is written.
    every: Duration,
    done: Vec<(Phase, Reading)>,
}

impl<'a> Show<'a> {
    fn new(chain: &'a Chain, duration: Duration) -> Self {
        let terminal = io::stdout().is_terminal();
        let every = if terminal { TICK } else { (duration / 10).clamp(TICK, Duration::from_secs(5)) };
        Self { chain, duration, screen: Screen::new(io::stdout(), terminal), every, done: Vec::new() }
    }

    /// Tells the whole story.
    async fn tell(&mut self, rate: u32) -> io::Result<()> {
        self.screen.say(&story::opening(self.chain, self.duration, rate))?;
        let load = Load::start(self.chain.order.door, rate);
        let begun = Instant::now();
        let mut end = begun;
        for phase in Phase::ALL {
            let before = Reading::of(self.chain);
            phase.set(self.chain);
            end += phase.lasts(self.duration);
            self.screen.say(&format!("[{}s] {}\n", begun.elapsed().as_secs(), phase.words()))?;
            if phase == Phase::Recovered {
                self.until_closed().await?;
            }
            self.watch(phase, end).await?;
            if phase == Phase::Failing
                && let Some(counted) = report::failing(&Reading::of(self.chain).since(&before))
            {
                self.screen.say(&counted)?;
            }
        }
        drop(load);
        self.screen.leave()?;
        self.screen.say(&report::closing(&self.done, &Reading::of(self.chain)))?;
        self.screen.say(&Box::pin(tries::tell()).await?)?;
        self.screen.say("That was it. A policy for a service of your own: README.md.")
    }

    /// Somebody has seen enough.
    fn stopped(&mut self) -> io::Result<()> {
        self.screen.leave()?;
        self.screen.say("Stopped.")
    }

    /// Waits for the breaker to close, and says how long it took.
    async fn until_closed(&mut self) -> io::Result<()> {
        let begun = Instant::now();
        while !reading::is_closed(self.chain) {
            if begun.elapsed() > PATIENCE {
                return Ok(());
            }
            sleep(LOOK).await;
        }
        let took = screen::short(begun.elapsed());
        self.screen.say(&format!("The breaker closed by itself, {took} after payment was well again.\n"))
    }

    /// Shows what is counted until the phase ends, and one call that is worth a closer look.
    async fn watch(&mut self, phase: Phase, end: Instant) -> io::Result<()> {
        let mut next = Instant::now() + SETTLE;
        sleep_until(next).await;
        let begin = Reading::of(self.chain);
        let mut readings = VecDeque::from([(Instant::now(), begin.clone())]);
        let mut due = next + self.every;
        let mut explained = false;
        while next < end {
            next = end.min(next + TICK);
            sleep_until(next).await;
            if !explained {
                explained = true;
                self.explain(phase).await?;
            }
            readings.push_back((Instant::now(), Reading::of(self.chain)));
            while readings.len() > 2 && readings[1].0.elapsed() >= SPAN {
                readings.pop_front();
            }
            if Instant::now() >= due {
                due += self.every;
                self.table(&readings)?;
            }
        }
        self.done.push((phase, Reading::of(self.chain).since(&begin)));
        Ok(())
    }

    fn table(&mut self, readings: &VecDeque<(Instant, Reading)>) -> io::Result<()> {
        let (Some((from, first)), Some((to, last))) = (readings.front(), readings.back()) else { return Ok(()) };
        let seen = last.since(first);
        let rows = PLACES.iter().zip(seen.hops).map(|(place, seen)| Row { hop: place.hop(), route: place.route, seen });
        self.screen.show(&rows.collect::<Vec<_>>(), to.saturating_duration_since(*from))
    }

    async fn explain(&mut self, phase: Phase) -> io::Result<()> {
        let told = match phase {
            Phase::Slow => Box::pin(report::hurry(self.chain)).await,
            Phase::Failing => Box::pin(report::refusal(self.chain)).await,
            Phase::Well | Phase::Recovered => None,
        };
        // Without an answer there is nothing to show; the table shows what goes on.
        told.map_or(Ok(()), |told| self.screen.say(&told))
    }
}
