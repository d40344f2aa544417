//! The training load of a release, sent through the binary of the other tests; `make release` begins with it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use std::env;
use std::process::Command;

/// Exit code of `benches/train.py` if a tool is missing.
const TOOL_MISSING: i32 = 2;

#[test]
fn every_kind_of_call_that_trains_a_release_is_answered_as_it_should_be() {
    let done = Command::new("python3")
        .args(["benches/train.py", "--binary", env!("CARGO_BIN_EXE_hopguard")])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    if done.status.code() == Some(TOOL_MISSING) && env::var_os("CI").is_none() {
        println!("not run: {said}");
        return;
    }
    assert!(done.status.success(), "{said}");
    assert_eq!(said.lines().filter(|line| line.contains("(access log: errors)")).count(), 17, "{said}");
    assert_eq!(said.lines().filter(|line| line.contains("(access log: all)")).count(), 2, "{said}");
}
