//! Level 8: the command line, one file per command.

pub mod check;
mod demo;
pub mod explain;
pub mod run;
pub mod schema;

use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::config;
use crate::policy::check::good_name;
use crate::rules::duration;

const EXIT_CODES: &str = "\
Exit codes:
  0  done, or shut down as asked
  1  the policy has problems or cannot be read, or nothing matches
  2  the command line is wrong
  3  could not start: an address is taken, a certificate cannot be used";

/// A sidecar proxy that keeps the rules of service-to-service calls: timeouts, limits, and latency per hop.
#[derive(Debug, Parser)]
#[command(name = "hopguard", version, after_help = EXIT_CODES, styles = STYLES, max_term_width = 100)]
pub struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default());

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the proxy.
    Run(RunArgs),
    /// Show what hopguard does: three services on loopback, of which one turns slow and one fails.
    Demo(DemoArgs),
    /// Check policies; print every problem at once.
    Check {
        /// Files or directories, each a policy of its own; "-" is the standard input.
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
        /// How problems are printed.
        #[arg(long, value_enum, default_value_t = Form::Text, env = "HOPGUARD_FORMAT")]
        format: Form,
    },
    /// Show which destination, route and values a call meets, and the line each value comes from.
    Explain {
        /// The method, as in GET.
        method: String,
        /// The URL, or a path where the policy has one listener.
        url: String,
        /// A header of the call, as in "content-type: application/grpc"; may be given more than once.
        #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
        headers: Vec<String>,
        /// The policy: a file, or a directory of files; "-" is the standard input.
        #[arg(long, value_name = "PATH", env = "HOPGUARD_POLICY")]
        policy: PathBuf,
    },
    /// Print the JSON Schema of the policy, for editors.
    Schema,
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// How `check` prints.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Form {
    /// For people, with the source.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The policy: a file, or a directory of files. Changes are taken up while running.
    #[arg(long, value_name = "PATH", env = "HOPGUARD_POLICY")]
    policy: PathBuf,
    /// Where the admin door listens: status page, /metrics, /ready, /policy.
    #[arg(long, value_name = "ADDR", default_value = config::ADMIN, env = "HOPGUARD_ADMIN")]
    admin: SocketAddr,
    /// Worker threads [default: the CPU limit of the container, else the number of CPUs].
    #[arg(long, value_name = "N", env = "HOPGUARD_WORKERS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// Who we are in the metrics, if the policy does not say so.
    #[arg(long, value_name = "NAME", default_value = "unknown", env = "HOPGUARD_SERVICE", value_parser = parse_name)]
    service: String,
    /// How long calls in flight may take to finish after the last one was accepted.
    #[arg(long, value_name = "DURATION", default_value = "25s", env = "HOPGUARD_GRACE", value_parser = parse_duration)]
    grace: Duration,
    /// How long callers are still accepted after SIGTERM, while they learn to go elsewhere.
    #[arg(long, value_name = "DURATION", default_value = "5s", env = "HOPGUARD_DRAIN_DELAY", value_parser = parse_duration)]
    drain_delay: Duration,
    /// The form of the program's own log, on standard error.
    #[arg(long, value_enum, default_value_t = LogForm::Text, env = "HOPGUARD_LOG_FORMAT")]
    log_format: LogForm,
    /// Which of its lines: a level, or levels per module as in "warn,hopguard=debug".
    #[arg(long, value_name = "FILTER", default_value = "info", env = "HOPGUARD_LOG")]
    log: String,
}

#[derive(Debug, Args)]
struct DemoArgs {
    /// For how long orders are placed; at least 6s.
    #[arg(long, value_name = "DURATION", default_value = "20s", env = "HOPGUARD_DURATION", value_parser = parse_demo_duration)]
    duration: Duration,
    /// Calls per second.
    #[arg(long, value_name = "N", default_value_t = 50, env = "HOPGUARD_RATE", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: u32,
}

/// The form of the program's log.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogForm {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    if text == "0" || text == "0s" {
        return Ok(Duration::ZERO);
    }
    duration::parse(text).map_err(|fault| fault.to_string())
}

/// The same names as in a policy: it becomes a metric label there too.
fn parse_name(text: &str) -> Result<String, String> {
    good_name(text).map(|()| text.to_owned()).map_err(|fault| fault.to_string())
}

fn parse_demo_duration(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        long if long >= demo::SHORTEST => Ok(long),
        _ => Err("too short to show anything; at least 6s".to_owned()),
    }
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let result = match CommandLine::parse().command {
        Command::Run(args) => return run::run(args),
        Command::Demo(args) => return demo::run(&args),
        Command::Check { paths, format } => {
            let form = match format {
                Form::Text => check::Form::Text,
                Form::Json => check::Form::Json,
            };
            check::check(&paths, form, colour(), (&mut io::stdout(), &mut io::stderr()))
        }
        Command::Explain { method, url, headers, policy } => {
            explain::explain((&method, &url), &headers, &policy, colour(), (&mut io::stdout(), &mut io::stderr()))
        }
        Command::Schema => schema::schema(&mut io::stdout()),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut CommandLine::command(), "hopguard", &mut io::stdout());
            Ok(0)
        }
    };
    // Whoever closed our output does not want to read why it could not be written.
    ExitCode::from(result.unwrap_or(0))
}

/// Colours only for people: a terminal, and nobody has asked for none (no-color.org).
fn colour() -> bool {
    io::stderr().is_terminal() && !config::no_colour()
}
