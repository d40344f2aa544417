//! The subcommands and flags of the command line, and their output.

use std::path::Path;

use serde_json::Value;

use crate::support::program::{Ended, Program, end, hopguard};
use crate::support::upstream::{Upstream, policy};

const POLICY: &str = "apiVersion: hopguard.dev/v1alpha1
kind: Policy
listeners:
  - { name: out, bind: \"127.0.0.1:15001\", forward: true }
defaults:
  timeouts: { request: 3s }
destinations:
  - name: payment
    hosts: [payment, \"*.pay.example\"]
    limits: { inFlight: 7 }
    routes:
      - name: pay
        match: { methods: [POST], path: \"/payments/{id}\" }
        timeouts: { request: 800ms, perTry: 300ms }
      - name: charge
        match: { grpc: shop.v1.Payment/Charge }
";

async fn run(args: &[&str]) -> Ended {
    end(hopguard(args)).await
}

fn written(folder: &Path, text: &str) -> String {
    let file = folder.join("policy.yaml");
    std::fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

/// The line of an answer that begins so.
fn line<'a>(ended: &'a Ended, begin: &str) -> &'a str {
    let found = ended.out.lines().find(|line| line.starts_with(begin));
    found.unwrap_or_else(|| panic!("no {begin} in {}{}", ended.out, ended.error))
}

#[tokio::test]
async fn check_accepts_what_is_right() {
    let folder = tempfile::tempdir().unwrap();
    let file = written(folder.path(), POLICY);
    for path in [file.as_str(), folder.path().to_str().unwrap()] {
        let ended = run(&["check", path]).await;
        assert_eq!(ended.code, Some(0), "{}{}", ended.out, ended.error);
        assert!(ended.error.is_empty(), "{}", ended.error);
    }
}

#[tokio::test]
async fn check_reports_all_mistakes_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let text = POLICY
        .replace("request: 3s", "request: 3")
        .replace("limits:", "limts:")
        .replace("perTry: 300ms", "perTry: 900ms")
        .replace("[POST]", "[post]");
    let ended = run(&["check", &written(folder.path(), &text)]).await;
    assert_eq!(ended.code, Some(1));
    let said = format!("{}{}", ended.out, ended.error);
    for wanted in ["policy.yaml:6:", "policy.yaml:10:", "policy.yaml:13:", "policy.yaml:14:", "limits", "POST", "900ms"]
    {
        assert!(said.contains(wanted), "{wanted} is not in:\n{said}");
    }
    let json = run(&["check", "--format", "json", &written(folder.path(), &text)]).await;
    let problems: Vec<Value> = json.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(problems.len() >= 4, "{}", json.out);
    assert!(problems.iter().any(|problem| problem["line"] == 10 && problem["column"].is_u64()), "{}", json.out);
}

#[tokio::test]
async fn check_warns_of_old_words_and_accepts_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = written(folder.path(), &POLICY.replace("defaults:\n", "rules: { retry: warn }\ndefaults:\n"));
    let ended = run(&["check", &file]).await;
    assert_eq!(ended.code, Some(0), "{}{}", ended.out, ended.error);
    assert!(ended.out.starts_with("ok: "), "{}", ended.out);
    for wanted in ["warning: `warn` is the old word for `dryRun`", "policy.yaml:5:17", "help: write `dryRun`"] {
        assert!(ended.error.contains(wanted), "{wanted} is not in:\n{}", ended.error);
    }
    let json = run(&["check", "--format", "json", &file]).await;
    assert_eq!((json.code, json.error.as_str()), (Some(0), ""));
    let lines: Vec<Value> = json.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let warning = &lines[0];
    assert_eq!(
        (&warning["severity"], &warning["line"], &warning["column"]),
        (&"warning".into(), &5.into(), &17.into())
    );
    assert!(lines[1]["ok"].is_string() && lines.len() == 2, "{}", json.out);
}

#[tokio::test]
async fn a_policy_in_old_words_is_followed_and_each_load_says_so_once() {
    let upstream = Upstream::fixed("hello").await;
    let folder = tempfile::tempdir().unwrap();
    let text = policy(upstream.addr, "    ejection: { openFor: 1s }");
    let file = written(folder.path(), &text);
    let program = Program::run(Path::new(&file), &[]).await;
    let line = 1 + text.lines().position(|line| line.contains("openFor")).unwrap();
    let wanted = format!("{file}:{line}:17: `openFor` is the old word for `ejectFor`");
    assert_eq!(program.said(&wanted).await["hint"], "write `ejectFor`");
    let warnings = program.document("/policy").await["warnings"].take();
    assert_eq!((&warnings[0]["line"], &warnings[0]["severity"]), (&line.into(), &"warning".into()), "{warnings:#}");
    assert_eq!(crate::support::http::get(program.addr("in").await.unwrap(), "/").await.body, "hello");
    crate::support::program::replace(Path::new(&file), &text.replace("openFor: 1s", "openFor: 2s"));
    let ejection = |policy: &Value| policy["destinations"][0]["ejection"]["ejectFor"]["value"].clone();
    program.policy_until(crate::support::SOON, |policy| ejection(policy) == "2s").await;
    program.said("the policy was reloaded").await;
    let times = program.log().matches("is the old word for").count();
    assert_eq!(times, 2, "once at the start, once for the reload:\n{}", program.log());
    assert_eq!(program.metric("hopguard_policy_reloads_total", &["result=\"failed\""]).await, 0.0);
    crate::support::program::replace(Path::new(&file), &text.replace("openFor: 1s", "ejectFor: 2s"));
    let policy = program.policy_until(crate::support::SOON, |policy| policy["warnings"] == serde_json::json!([])).await;
    assert_eq!(ejection(&policy), "2s");
}

#[tokio::test]
async fn check_names_the_file_that_is_not_there() {
    let ended = run(&["check", "/no/such/file.yaml"]).await;
    assert!(ended.code == Some(1) || ended.code == Some(3), "{:?}", ended.code);
    assert!(format!("{}{}", ended.out, ended.error).contains("/no/such/file.yaml"));
}

#[tokio::test]
async fn a_policy_can_come_by_the_standard_input() {
    let folder = tempfile::tempdir().unwrap();
    let run = async |args: &[&str], text: &str| {
        let input = std::fs::File::open(written(folder.path(), text)).unwrap();
        let mut command = hopguard(args);
        command.stdin(input);
        end(command).await
    };
    let ended = run(&["check", "-"], POLICY).await;
    assert_eq!((ended.code, ended.error.as_str()), (Some(0), ""), "{}", ended.out);
    assert!(ended.out.starts_with("ok: stdin ("), "{}", ended.out);
    let ended = run(&["check", "-"], &POLICY.replace("limits:", "limts:")).await;
    assert_eq!(ended.code, Some(1));
    assert!(ended.error.contains("stdin:10:"), "{}", ended.error);
    let ended = run(&["explain", "GET", "http://payment/", "--policy", "-"], POLICY).await;
    assert!(ended.code == Some(0) && line(&ended, "destination").contains("stdin:8"), "{}{}", ended.out, ended.error);
}

#[tokio::test]
async fn explain_says_where_every_value_comes_from() {
    let folder = tempfile::tempdir().unwrap();
    let file = written(folder.path(), POLICY);
    let ended = run(&["explain", "POST", "http://payment/payments/7", "--policy", &file]).await;
    assert_eq!(ended.code, Some(0), "{}", ended.error);
    for (begin, value, from) in [
        ("listener", "out", "policy.yaml:4"),
        ("destination", "payment", "policy.yaml:8"),
        ("route", "pay ", "policy.yaml:12"),
        ("timeouts.request", "800ms", "policy.yaml:14"),
        ("timeouts.perTry", "300ms", "policy.yaml:14"),
        ("timeouts.connect", "800ms", "built in"),
        ("limits.inFlight", "7", "policy.yaml:10"),
        ("limits.queue ", "128", "built in"),
        ("connections.idle", "3s", "built in"),
    ] {
        let found = line(&ended, begin);
        assert!(found.contains(value) && found.ends_with(from), "{begin}: {found}");
    }
    let other = run(&["explain", "GET", "http://x.pay.example/payments/7", "--policy", &file]).await;
    assert!(line(&other, "route").contains("default"), "{}", other.out);
    assert!(line(&other, "timeouts.request").ends_with("policy.yaml:6"), "{}", other.out);
    let grpc = run(&["explain", "GRPC", "http://payment/shop.v1.Payment/Charge", "--policy", &file]).await;
    assert!(line(&grpc, "route").contains("charge"), "{}", grpc.out);
    let header = [
        "explain",
        "POST",
        "http://payment/shop.v1.Payment/Charge",
        "-H",
        "content-type: application/grpc",
        "--policy",
        &file,
    ];
    assert!(line(&run(&header).await, "route").contains("charge"));
}

#[tokio::test]
async fn explain_says_that_nothing_matches() {
    let folder = tempfile::tempdir().unwrap();
    let file = written(folder.path(), POLICY);
    let ended = run(&["explain", "GET", "http://bank/", "--policy", &file]).await;
    assert_eq!(ended.code, Some(1), "{}", ended.out);
    assert!(format!("{}{}", ended.out, ended.error).contains("bank"), "{}{}", ended.out, ended.error);
}

#[tokio::test]
async fn the_schema_is_the_one_in_config() {
    let ended = run(&["schema"]).await;
    assert_eq!(ended.code, Some(0));
    let kept = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config/policy.schema.json")).unwrap();
    assert!(ended.out == kept, "run `hopguard schema > config/policy.schema.json`");
}

#[tokio::test]
async fn shells_can_complete() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ended = run(&["completions", shell]).await;
        assert_eq!(ended.code, Some(0), "{shell}: {}", ended.error);
        for wanted in ["hopguard", "explain", "drain-delay"] {
            assert!(ended.out.contains(wanted), "{shell} does not know {wanted}");
        }
    }
    assert_eq!(run(&["completions", "csh"]).await.code, Some(2));
}

#[tokio::test]
async fn the_help_tells_everything() {
    let ended = run(&["--help"]).await;
    assert_eq!(ended.code, Some(0));
    for wanted in ["run", "check", "explain", "schema", "completions", "demo", "Exit codes", "  3  "] {
        assert!(ended.out.contains(wanted), "{wanted} is not in:\n{}", ended.out);
    }
    let ended = run(&["run", "--help"]).await;
    for flag in ["policy", "admin", "workers", "grace", "drain-delay", "log-format"] {
        let variable = format!("HOPGUARD_{}", flag.to_uppercase().replace('-', "_"));
        assert!(ended.out.contains(&format!("--{flag} ")), "{flag} is not in:\n{}", ended.out);
        assert!(ended.out.contains(&variable), "{variable} is not in:\n{}", ended.out);
    }
    assert!(ended.out.contains("127.0.0.1:15000"), "{}", ended.out);
    let longest = ended.out.lines().map(|line| line.chars().count()).max();
    assert!(longest <= Some(120), "{longest:?} columns");
}

#[tokio::test]
async fn a_service_is_named_as_in_a_policy() {
    for name in ["a b", "", "caf\u{e9}"] {
        let ended = run(&["run", "--policy", "nowhere.yaml", "--service", name]).await;
        assert_eq!(ended.code, Some(2), "{name:?}: {}", ended.error);
        assert!(ended.error.contains("letters, digits"), "{}", ended.error);
    }
}

#[tokio::test]
async fn every_flag_may_be_a_variable() {
    let upstream = Upstream::fixed("hello").await;
    let folder = tempfile::tempdir().unwrap();
    let file = written(folder.path(), &policy(upstream.addr, "").replace("service: shop\n", ""));
    let mut command = hopguard(&["run"]);
    let variables = [
        ("POLICY", file.as_str()),
        ("ADMIN", "127.0.0.1:0"),
        ("WORKERS", "3"),
        ("SERVICE", "till"),
        ("LOG_FORMAT", "json"),
        ("GRACE", "1s"),
        ("DRAIN_DELAY", "1ms"),
    ];
    for (name, value) in variables {
        command.env(format!("HOPGUARD_{name}"), value);
    }
    let mut program = Program::start(command).await;
    assert_eq!(program.metric("hopguard_workers", &[]).await, 3.0);
    assert_eq!(program.document("/policy").await["service"], "till");
    assert_eq!(crate::support::http::get(program.addr("in").await.unwrap(), "/").await.body, "hello");
    program.signal("TERM").await;
    assert_eq!(program.ended(std::time::Duration::from_secs(5)).await.code(), Some(0));
    assert_eq!(program.access()[0]["source"], "till");
}

#[tokio::test]
async fn the_access_log_can_be_text() {
    let upstream = Upstream::http1(|_| std::future::pending()).await;
    let folder = tempfile::tempdir().unwrap();
    let text =
        policy(upstream.addr, "    timeouts: { request: 150ms }").replace("mode: all", "mode: errors, format: text");
    let program = Program::run(Path::new(&written(folder.path(), &text)), &[]).await;
    let to = program.addr("in").await.unwrap();
    assert_eq!(crate::support::http::get(to, "/slow?secret=1").await.status, 504);
    let answer = crate::support::http::grpc(to, "/shop.v1.Payment/Charge").await;
    assert_eq!(answer.status, 200);
    let lines = crate::support::eventually(|| Some(program.access_text()).filter(|lines| lines.len() == 2)).await;
    for wanted in [
        "GET /slow 504 request_timeout",
        "attempt 1/3",
        "shop->app/default",
        "timeouts.request=150ms",
        "policy.yaml:10",
    ] {
        assert!(lines[0].contains(wanted), "{wanted} is not in {}", lines[0]);
    }
    assert!(!lines[0].contains("secret"), "{}", lines[0]);
    assert!(lines[1].contains("shop.v1.Payment/Charge "), "{}", lines[1]);
}
