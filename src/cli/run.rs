//! `hopguard run`: the proxy itself, from start to drain.
#![allow(clippy::print_stderr, reason = "what keeps the program from starting is said before there is a log")]

use std::process::ExitCode;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::app::App;
use crate::cli::{LogForm, RunArgs};
use crate::config::{self, Followed, Settings};
use crate::policy::load;
use crate::runtime::drain::DrainPhase;
use crate::runtime::signals::{Ended, Hangup, Signals};
use crate::telemetry::{Sink, log};

const BAD_POLICY: u8 = 1;
const BAD_COMMAND_LINE: u8 = 2;
const NO_START: u8 = 3;

/// Runs until told to stop.
pub(super) fn run(args: RunArgs) -> ExitCode {
    let form = match args.log_format {
        LogForm::Text => log::ProgramLogFormat::Text,
        LogForm::Json => log::ProgramLogFormat::Json,
    };
    // Dropped last: what was said on the way to the end is written then.
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
    let (mut signals, mut hangup) = match Signals::listen().and_then(|signals| Ok((signals, Hangup::listen()?))) {
        Ok(both) => both,
        Err(error) => return no_start(&error),
    };
    let app = match App::start(settings.clone(), model, Sink::Stdout) {
        Ok(app) => app,
        Err(error) => return no_start(&error),
    };
    tracing::info!(admin = %app.admin(), workers = settings.workers, "ready");
    let look = app.look();
    runtime.block_on(async {
        tokio::select! {
            () = until_stopped(app, &mut signals, &settings) => {}
            () = pass_on(&mut hangup, &look) => {}
        }
    });
    ExitCode::SUCCESS
}

fn no_start(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("error: {error}");
    NO_START.into()
}

/// Has the files looked at whenever SIGHUP comes; never ends.
async fn pass_on(hangup: &mut Hangup, look: &Notify) {
    loop {
        hangup.next().await;
        tracing::info!("SIGHUP: the policy and the certificates are looked at now");
        look.notify_one();
    }
}

/// Serves until a signal or the admin door begins the way down, then goes it. A second signal hurries it.
async fn until_stopped(app: App, signals: &mut Signals, settings: &Settings) {
    let drain = app.drain();
    let mut first = tokio::select! {
        ended = signals.next() => Some(ended),
        () = drain.reached(DrainPhase::Leaving) => None,
    };
    app.leave();
    tokio::select! {
        () = sleep(settings.drain_delay) => {}
        () = skipped(signals, &mut first) => {}
    }
    let begun = Instant::now();
    let enough = async {
        tokio::select! {
            () = sleep(settings.grace) => {}
            () = second(signals, first) => {}
        }
    };
    let stopped = app.stop_at(enough).await;
    let took = begun.elapsed();
    if stopped {
        tracing::info!(?took, "stopped; everything in flight had finished");
    } else {
        tracing::warn!(?took, grace = ?settings.grace, "stopped; what was still in flight was cut off");
    }
}

/// Returns when signals end the delay; `first` is the one that began the way down, or begins it also: whoever asks at
/// the admin door may have a SIGTERM sent afterwards, as Kubernetes does.
async fn skipped(signals: &mut Signals, first: &mut Option<Ended>) {
    let first = match *first {
        Some(first) => first,
        None => *first.insert(signals.next().await),
    };
    if first == Ended::Terminate {
        signals.next().await;
    }
}

/// Returns at the second signal.
async fn second(signals: &mut Signals, first: Option<Ended>) {
    if first.is_none() {
        signals.next().await;
    }
    signals.next().await;
}
