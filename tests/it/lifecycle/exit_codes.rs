//! Start-up errors and their exit codes.

use super::drain::Site;
use crate::support::program::{end, hopguard};

#[tokio::test]
async fn a_port_that_is_taken_is_exit_code_3() {
    let site = Site::open().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let file = site.file.to_str().unwrap();
    let admin = end(hopguard(&["run", "--policy", file, "--admin", &address])).await;
    assert_eq!(admin.code, Some(3), "{}", admin.error);
    assert!(admin.error.contains(&address), "{}", admin.error);
    let text = std::fs::read_to_string(file).unwrap().replace("127.0.0.1:0", &address);
    std::fs::write(file, text).unwrap();
    let listener = end(hopguard(&["run", "--policy", file, "--admin", "127.0.0.1:0"])).await;
    assert_eq!(listener.code, Some(3), "{}", listener.error);
    assert!(listener.error.contains(&address) && listener.error.contains("in use"), "{}", listener.error);
}

#[tokio::test]
async fn a_policy_with_mistakes_is_exit_code_1() {
    let site = Site::open().await;
    let file = site.file.to_str().unwrap();
    let text = std::fs::read_to_string(file).unwrap().replace("endpoints", "endpoint");
    std::fs::write(file, text).unwrap();
    let ended = end(hopguard(&["run", "--policy", file, "--admin", "127.0.0.1:0"])).await;
    assert_eq!(ended.code, Some(1), "{}", ended.error);
    assert!(ended.error.contains("policy.yaml:9") && ended.error.contains("endpoints"), "{}", ended.error);
}

#[tokio::test]
async fn a_policy_that_cannot_be_read_is_exit_code_1_too() {
    let ended = end(hopguard(&["run", "--policy", "/no/such/policy.yaml", "--admin", "127.0.0.1:0"])).await;
    assert_eq!(ended.code, Some(1), "{}", ended.error);
    assert!(ended.error.contains("/no/such/policy.yaml"), "{}", ended.error);
}

#[tokio::test]
async fn a_wrong_command_line_is_exit_code_2() {
    let wrong: [&[&str]; 7] = [
        &[],
        &["walk"],
        &["run"],
        &["run", "--policy", "x", "--polcy"],
        &["run", "--policy", "x", "--admin", "here"],
        &["run", "--policy", "x", "--workers", "0"],
        &["run", "--policy", "x", "--grace", "5"],
    ];
    for args in wrong {
        let ended = end(hopguard(args)).await;
        assert_eq!(ended.code, Some(2), "{args:?}: {}", ended.error);
        assert!(!ended.error.is_empty(), "{args:?}");
    }
}
