//! The process from its command line to its exit.
//!
//! - `command_line`: subcommands, flags, output
//! - `drain`: signals, the admin port, the grace time
//! - `exit_codes`: start-up errors

mod command_line;
mod drain;
mod exit_codes;
