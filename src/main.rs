//! The binary: parses the arguments and returns the exit code of the command.

use std::process::ExitCode;

/// Returns the pages of a load peak to the system within a second (see `.cargo/config.toml`).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    hopguard::cli::main()
}
