//! `hopguard run`: starts the proxy, waits for signals, and drains.
#![allow(clippy::print_stderr, reason = "start-up errors are reported before the program log exists")]

use std::process::ExitCode;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::app::App;
use crate::cli::{LogForm, RunArgs};
use crate::config::{self, Settings, WatchedPath};
use crate::policy::load;
use crate::runtime::drain::DrainPhase;
use crate::runtime::signals::{Hangup, Signals, StopSignal};
use crate::telemetry::{Sink, log};

const BAD_POLICY: u8 = 1;
const BAD_COMMAND_LINE: u8 = 2;
const CANNOT_START: u8 = 3;

/// Runs the proxy until a signal or `POST /drain` stops it. Returns the exit code of the process.
pub(super) fn run(args: RunArgs) -> ExitCode {
    let form = match args.log_format {
        LogForm::Text => log::ProgramLogFormat::Text,
        LogForm::Json => log::ProgramLogFormat::Json,
    };
    // Dropped last, because the drop writes the log lines of the shutdown.
    let _log = match log::init(form, &args.log) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("error: --log: {error}");
            return BAD_COMMAND_LINE.into();
        }
    };
    let fingerprint = load::fingerprint(&args.policy);
    let model = match load::load(&args.policy) {
        Ok(model) => model,
        Err(error) => {
            eprint!("{}", error.render(super::colour()));
            eprintln!("the policy has problems; hopguard did not start");
            return BAD_POLICY.into();
        }
    };
    let settings = Settings {
        policy: Some(WatchedPath { path: args.policy, fingerprint }),
        service: args.service,
        admin: args.admin,
        workers: args.workers.map_or_else(config::default_workers, usize::from),
        grace: args.grace,
        drain_delay: args.drain_delay,
    };
    let started = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match started {
        Ok(runtime) => runtime,
        Err(error) => return cannot_start(&error),
    };
    let _inside = runtime.enter();
    let (mut signals, mut hangup) = match Signals::listen().and_then(|signals| Ok((signals, Hangup::listen()?))) {
        Ok(both) => both,
        Err(error) => return cannot_start(&error),
    };
    let app = match App::start(settings.clone(), model, Sink::Stdout) {
        Ok(app) => app,
        Err(error) => return cannot_start(&error),
    };
    tracing::info!(admin = %app.admin(), workers = settings.workers, "ready");
    let reload = app.reload_trigger();
    runtime.block_on(async {
        tokio::select! {
            () = until_stopped(app, &mut signals, &settings) => {}
            () = reload_on_hangup(&mut hangup, &reload) => {}
        }
    });
    ExitCode::SUCCESS
}

fn cannot_start(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("error: {error}");
    CANNOT_START.into()
}

/// Triggers a reload on each SIGHUP; never returns.
async fn reload_on_hangup(hangup: &mut Hangup, reload: &Notify) {
    loop {
        hangup.next().await;
        tracing::info!("SIGHUP: checking the policy and the certificates for changes");
        reload.notify_one();
    }
}

/// Serves until a signal or `POST /drain` begins the drain, then drains. A second signal ends the current phase of the drain.
async fn until_stopped(app: App, signals: &mut Signals, settings: &Settings) {
    let drain = app.drain();
    let mut first = tokio::select! {
        ended = signals.next() => Some(ended),
        () = drain.reached(DrainPhase::Leaving) => None,
    };
    app.begin_drain();
    tokio::select! {
        () = sleep(settings.drain_delay) => {}
        () = delay_skipped(signals, &mut first) => {}
    }
    let begun = Instant::now();
    let grace_over = async {
        tokio::select! {
            () = sleep(settings.grace) => {}
            () = second_signal(signals, first) => {}
        }
    };
    let stopped = app.stop_when(grace_over).await;
    let took = begun.elapsed();
    if stopped {
        tracing::info!(?took, "stopped; all calls had finished");
    } else {
        tracing::warn!(?took, grace = ?settings.grace, "stopped; calls in flight were cut off");
    }
}

/// Returns when signals end the drain delay: at SIGINT, or at the second signal. `first` is the signal that began the drain. After
/// `POST /drain` there is none yet: the next signal is the first one, because Kubernetes sends SIGTERM after a `preStop` hook.
async fn delay_skipped(signals: &mut Signals, first: &mut Option<StopSignal>) {
    let first = match *first {
        Some(first) => first,
        None => *first.insert(signals.next().await),
    };
    if first == StopSignal::Terminate {
        signals.next().await;
    }
}

/// Returns at the second signal.
async fn second_signal(signals: &mut Signals, first: Option<StopSignal>) {
    if first.is_none() {
        signals.next().await;
    }
    signals.next().await;
}
