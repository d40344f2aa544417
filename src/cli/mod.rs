//! Level 9: the command line, one file per command.

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
  0  success, or shut down on request
  1  the policy has problems or cannot be read, or no destination matches
  2  invalid command line
  3  cannot start: an address is in use, or a certificate cannot be used";

/// A sidecar proxy that enforces timeouts, retries, circuit breaking and limits on the calls of a service, and measures the
/// latency of each hop.
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
    /// Demonstrate the rules with three services on loopback: one becomes slow, one fails.
    Demo(DemoArgs),
    /// Check policies and print all problems at once.
    Check {
        /// Files or directories, each a separate policy; "-" is the standard input.
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
        /// Output format.
        #[arg(long, value_enum, default_value_t = check::Form::Text, env = "HOPGUARD_FORMAT")]
        format: check::Form,
    },
    /// Show the destination, the route and the effective values of a call, with the policy line of each value.
    Explain {
        /// The method, for example GET.
        method: String,
        /// The URL; or a path alone, for every listener with `to`.
        url: String,
        /// A header of the call, for example "content-type: application/grpc"; repeatable.
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

#[derive(Debug, Args)]
struct RunArgs {
    /// The policy: a file, or a directory of files. Changes are loaded while running.
    #[arg(long, value_name = "PATH", env = "HOPGUARD_POLICY")]
    policy: PathBuf,
    /// Admin address: status page, /metrics, /ready, /policy.
    #[arg(long, value_name = "ADDR", default_value = config::ADMIN, env = "HOPGUARD_ADMIN")]
    admin: SocketAddr,
    /// Number of worker threads [default: the CPU limit of the container, else the number of CPUs].
    #[arg(long, value_name = "N", env = "HOPGUARD_WORKERS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// Service name in metrics and logs, where the policy sets no `service`.
    #[arg(long, value_name = "NAME", default_value = "unknown", env = "HOPGUARD_SERVICE", value_parser = parse_name)]
    service: String,
    /// Grace time: how long calls in flight may take to finish after the listeners have closed.
    #[arg(long, value_name = "DURATION", default_value = "25s", env = "HOPGUARD_GRACE", value_parser = parse_duration)]
    grace: Duration,
    /// Drain delay: how long the listeners still accept after SIGTERM, while load balancers remove this instance.
    #[arg(long, value_name = "DURATION", default_value = "5s", env = "HOPGUARD_DRAIN_DELAY", value_parser = parse_duration)]
    drain_delay: Duration,
    /// Format of the program log, on standard error.
    #[arg(long, value_enum, default_value_t = LogForm::Text, env = "HOPGUARD_LOG_FORMAT")]
    log_format: LogForm,
    /// Filter of the program log: a level, or levels per module, for example "warn,hopguard=debug".
    #[arg(long, value_name = "FILTER", default_value = "info", env = "HOPGUARD_LOG")]
    log: String,
}

#[derive(Debug, Args)]
struct DemoArgs {
    /// Duration of the load; at least 6s.
    #[arg(long, value_name = "DURATION", default_value = "20s", env = "HOPGUARD_DURATION", value_parser = parse_demo_duration)]
    duration: Duration,
    /// Orders per second.
    #[arg(long, value_name = "N", default_value_t = 50, env = "HOPGUARD_RATE", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: u32,
}

/// Format of the program log.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogForm {
    /// Text.
    Text,
    /// One JSON object per line.
    Json,
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    if text == "0" || text == "0s" {
        return Ok(Duration::ZERO);
    }
    duration::parse(text).map_err(|fault| fault.to_string())
}

/// Same syntax as names in a policy, because the service name is a metric label too.
fn parse_name(text: &str) -> Result<String, String> {
    good_name(text).map(|()| text.to_owned()).map_err(|fault| fault.to_string())
}

fn parse_demo_duration(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        long if long >= demo::SHORTEST => Ok(long),
        _ => Err("too short to show every phase; at least 6s".to_owned()),
    }
}

/// Parses the arguments, runs the command, and returns its exit code.
pub fn main() -> ExitCode {
    let result = match CommandLine::parse().command {
        Command::Run(args) => return run::run(args),
        Command::Demo(args) => return demo::run(&args),
        Command::Check { paths, format } => {
            check::check(&paths, format, colour(), (&mut io::stdout(), &mut io::stderr()))
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
    // An output that its reader has closed (`| head`) is not an error.
    ExitCode::from(result.unwrap_or(0))
}

/// Colours only on a terminal, and only while `NO_COLOR` is not set (no-color.org).
fn colour() -> bool {
    io::stderr().is_terminal() && !config::no_colour()
}
