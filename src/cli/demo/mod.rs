//! `hopguard demo`: three services, each behind its own hopguard, one of which turns slow and recovers.
//!
//! | file | what |
//! |---|---|
//! | `story` | what happens, and the words for it |
//! | `chain` | the three hopguards, with their policies |
//! | `service`, `client`, `load` | the small services, how they call each other, and who calls them |
//! | `screen` | the table of hops |
//!
//! Everything runs on loopback, on free ports, in this process; it is bounded in time, calls and connections.
#![allow(clippy::print_stderr, reason = "what keeps the demo from starting is said to the person at the terminal")]

mod chain;
mod client;
mod load;
mod screen;
mod service;
mod story;

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Stdout};
use std::process::ExitCode;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::time::{Instant, sleep_until, timeout};

use crate::cli::DemoArgs;
use crate::runtime::signals::Signals;
use crate::telemetry::HopSummary;

use chain::{Chain, Reading};
use client::Client;
use load::Load;
use screen::{Row, Screen};
use story::Phase;

const NO_START: u8 = 3;

/// The shortest demo that still has something to show in each phase.
pub(super) const SHORTEST: Duration = Duration::from_secs(3);

/// How often the telemetry is read, and a terminal redrawn.
const TICK: Duration = Duration::from_millis(500);
/// The figures of a table are those of the last seconds of the present phase.
const SPAN: Duration = Duration::from_secs(3);
/// Calls that began before a phase are no part of its figures; all of them are over by then.
const SETTLE: Duration = Duration::from_millis(400);

/// Runs the demo to its end, or to the first signal. Whoever closes our output ends it too.
pub(super) fn run(args: &DemoArgs) -> ExitCode {
    let runtime = match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
        Ok(runtime) => runtime,
        Err(error) => return no_start(&error.into()),
    };
    runtime.block_on(async {
        let started = match Signals::listen() {
            Ok(signals) => Chain::start().await.map(|chain| (signals, chain)),
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
        let Some(first) = self.chain.hops.first() else { return Ok(()) };
        let load = Load::start(first.door, rate);
        let begun = Instant::now();
        let mut end = begun;
        for phase in Phase::ALL {
            self.chain.payment_slower.set(phase.slower());
            end += phase.lasts(self.duration);
            self.announce(phase, begun)?;
            self.watch(phase, end).await?;
        }
        drop(load);
        self.screen.leave()?;
        self.screen.say(&story::closing(self.chain, &self.done))?;
        self.screen.say("That was it. A policy for a service of your own: README.md.")
    }

    /// Somebody has seen enough.
    fn stopped(&mut self) -> io::Result<()> {
        self.screen.leave()?;
        self.screen.say("Stopped.")
    }

    fn announce(&mut self, phase: Phase, begun: Instant) -> io::Result<()> {
        let Some(payment) = story::payment(self.chain) else { return Ok(()) };
        let at = begun.elapsed().as_secs();
        self.screen.say(&format!("[{at}s] {}\n", phase.words(payment)))
    }

    /// Shows what is counted until the phase ends.
    async fn watch(&mut self, phase: Phase, end: Instant) -> io::Result<()> {
        let mut next = Instant::now() + SETTLE;
        sleep_until(next).await;
        let begin = self.chain.read();
        let mut readings = VecDeque::from([(Instant::now(), begin.clone())]);
        let mut due = next + self.every;
        let mut explained = phase != Phase::Slow;
        while next < end {
            next = end.min(next + TICK);
            sleep_until(next).await;
            if !explained {
                explained = true;
                self.explain().await?;
            }
            readings.push_back((Instant::now(), self.chain.read()));
            while readings.len() > 2 && readings[1].0.elapsed() >= SPAN {
                readings.pop_front();
            }
            if Instant::now() >= due {
                due += self.every;
                self.table(&readings)?;
            }
        }
        self.done.push((phase, since(&self.chain.read(), &begin)));
        Ok(())
    }

    fn table(&mut self, readings: &VecDeque<(Instant, Reading)>) -> io::Result<()> {
        let (Some((from, first)), Some((to, last))) = (readings.front(), readings.back()) else { return Ok(()) };
        let seen = since(last, first);
        let row = |(hop, seen): (&'a chain::Hop, _)| Row { hop: &hop.name, route: hop.route, seen };
        let rows: Vec<_> = self.chain.hops.iter().zip(seen).map(row).collect();
        self.screen.show(&rows, to.saturating_duration_since(*from))
    }

    /// Makes one call to payment itself and shows the answer.
    async fn explain(&mut self) -> io::Result<()> {
        let Some(payment) = story::payment(self.chain) else { return Ok(()) };
        let client = Client::new(payment.door, payment.service);
        match timeout(story::SLOWER, client.post(chain::path_to(payment.service))).await {
            Ok(Ok((head, body))) => self.screen.say(&story::refusal(payment, &head, &body)),
            // Nothing to show then; the table shows what goes on.
            Ok(Err(_)) | Err(_) => Ok(()),
        }
    }
}

/// What happened between two readings; nothing for a hop without a call in between.
fn since(now: &Reading, before: &Reading) -> Reading {
    let difference = |(now, before): (&Option<HopSummary>, &Option<HopSummary>)| {
        let now = now.as_ref()?;
        let seen = before.as_ref().map_or_else(|| now.clone(), |before| now.since(before));
        (seen.count > 0).then_some(seen)
    };
    now.iter().zip(before).map(difference).collect()
}
