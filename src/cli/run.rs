//! `hopguard run`: the proxy itself, from start to drain.
#![allow(clippy::print_stderr, reason = "what keeps the program from starting is said before there is a log")]

use std::process::ExitCode;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::app::App;
use crate::cli::{LogForm, RunArgs};
use crate::config::{self, Followed, Settings};
use crate::policy::load;
use crate::runtime::drain::Phase;
use crate::runtime::signals::{Ended, Signals};
use crate::telemetry::{Sink, log};

const BAD_POLICY: u8 = 1;
const BAD_COMMAND_LINE: u8 = 2;
const NO_START: u8 = 3;

/// Runs until told to stop.
pub(super) fn run(args: RunArgs) -> ExitCode {
    let form = match args.log_format {
        LogForm::Text => log::LogFormat::Text,
        LogForm::Json => log::LogFormat::Json,
    };
    if let Err(error) = log::init(form, &args.log) {
        eprintln!("error: --log: {error}");
        return BAD_COMMAND_LINE.into();
    }
    let fingerprint = load::fingerprint(&args.policy);
    let model = match load::load(&args.policy) {
        Ok(model) => model,
        Err(error) => {
            eprint!("{}", error.render(super::colour()));
            eprintln!("the policy has problems; nothing was started");
            return BAD_POLICY.into();
        }
    };
    let settings = Settings {
        policy: Some(Followed { path: args.policy, fingerprint }),
        service: args.service,
        admin: args.admin,
        workers: args.workers.map_or_else(config::default_workers, usize::from),
        grace: args.grace,
        drain_delay: args.drain_delay,
    };
    let started = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match started {
        Ok(runtime) => runtime,
        Err(error) => return no_start(&error),
    };
    let _inside = runtime.enter();
    let (mut signals, app) = match (Signals::listen(), App::start(settings.clone(), model, Sink::Stdout)) {
        (Ok(signals), Ok(app)) => (signals, app),
        (Err(error), _) => return no_start(&error),
        (_, Err(error)) => return no_start(&error),
    };
    tracing::info!(admin = %app.admin(), workers = settings.workers, "ready");
    runtime.block_on(until_stopped(app, &mut signals, &settings));
    ExitCode::SUCCESS
}

fn no_start(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("error: {error}");
    NO_START.into()
}

/// Serves until a signal or the admin door begins the way down, then goes it. A second signal hurries it.
async fn until_stopped(app: App, signals: &mut Signals, settings: &Settings) {
    let drain = app.drain();
    let delay = tokio::select! {
        ended = signals.next() => match ended {
            Ended::Terminate => settings.drain_delay,
            Ended::Interrupt => Duration::ZERO,
        },
        () = drain.reached(Phase::Leaving) => settings.drain_delay,
    };
    app.leave();
    tokio::select! {
        () = sleep(delay) => {}
        _ = signals.next() => {}
    }
    let begun = Instant::now();
    let stopped = tokio::select! {
        finished = app.stop(settings.grace) => finished,
        _ = signals.next() => false,
    };
    let took = begun.elapsed();
    if stopped {
        tracing::info!(?took, "stopped; everything in flight had finished");
    } else {
        tracing::warn!(?took, grace = ?settings.grace, "stopped; what was still in flight was cut off");
    }
}
