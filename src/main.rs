//! hopguard: arguments in, exit code out.

use std::process::ExitCode;

/// Gives pages of a burst back to the system within a second (see `.cargo/config.toml`).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    hopguard::cli::main()
}
