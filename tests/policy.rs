//! The policy front end, from files to a model or to problems: every fixture, every shipped policy, and the schema.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hopguard::policy::explain::{Call, explain};
use hopguard::policy::load::{LoadError, fingerprint, load, load_str};
use hopguard::policy::model::{Direction, ListenerTarget, LogMode};
use hopguard::policy::schema::schema;
use hopguard::policy::snapshot::Snapshot;
use hopguard::problems::{Origin, Problem};
use hopguard::rules::layers::{CATALOGUE, Layer};
use hopguard::rules::mode::{Mode, RuleName};
use hopguard::telemetry::Hops;
use http::HeaderMap;
use serde_json::Value;
use serde_yaml::options::DuplicateKeyPolicy;

const HEAD: &str = "apiVersion: hopguard.dev/v1alpha1\nkind: Policy\n";

/// Files and directories of a folder, in the order of their names, without dotfiles.
fn entries(folder: &str) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn yaml(path: &Path) -> Option<Value> {
    yaml_of(&fs::read_to_string(path).unwrap())
}

fn yaml_of(text: &str) -> Option<Value> {
    let options = serde_yaml::options! {
        strict_booleans: true,
        duplicate_keys: DuplicateKeyPolicy::LastWins,
        merge_keys: serde_yaml::options::MergeKeyPolicy::AsOrdinary,
    };
    serde_yaml::from_str_with_options(text, options).ok()
}

fn validator() -> jsonschema::Validator {
    jsonschema::validator_for(&serde_json::from_str(&schema()).unwrap()).unwrap()
}

#[test]
fn every_valid_fixture_loads_and_agrees_with_the_schema() {
    let (paths, validator) = (entries("tests/policies/valid"), validator());
    assert!(paths.len() >= 12, "{} fixtures", paths.len());
    for path in paths {
        match load(&path) {
            Ok(model) => assert_eq!(!model.warnings.problems.is_empty(), path.ends_with("old-words.yaml"), "{path:?}"),
            Err(error) => panic!("{}", error.render(false)),
        }
        if path.is_file() {
            let value = yaml(&path).unwrap();
            let faults: Vec<_> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
            assert!(faults.is_empty(), "{}: {faults:?}", path.display());
        }
    }
}

#[test]
fn every_shipped_policy_loads_and_agrees_with_the_schema() {
    let mut paths = entries("config/examples");
    paths.push("config/hopguard.yaml".into());
    assert!(paths.len() >= 4, "{} policies", paths.len());
    for path in paths {
        match load(&path) {
            Ok(model) => assert!(model.warnings.problems.is_empty(), "{}", model.warnings.render(false)),
            Err(error) => panic!("{}", error.render(false)),
        }
        assert!(validator().is_valid(&yaml(&path).unwrap()), "{}", path.display());
    }
}

#[test]
fn the_policy_to_begin_with_changes_no_call() {
    let model = load(Path::new("config/examples/first-in-dry-run.yaml")).unwrap();
    let enforced = |rule: &RuleName| model.modes.of(*rule).value == Mode::Enforce;
    assert_eq!(RuleName::ALL.into_iter().filter(enforced).collect::<Vec<_>>(), [RuleName::Faults]);
    for route in model.destinations.iter().flat_map(|destination| &destination.routes) {
        assert!(route.faults.iter().next().is_none());
        assert!(route.timeouts.request.value >= Duration::from_secs(60), "no mode softens a timeout");
    }
}

#[test]
fn the_policy_of_the_documentation_loads() {
    let page = fs::read_to_string("docs/policy.md").unwrap();
    let blocks: Vec<_> = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(!blocks.is_empty());
    for block in blocks {
        if let Err(error) = load_str("docs/policy.md", block) {
            panic!("{}", error.render(false));
        }
    }
}

#[test]
fn every_invalid_fixture_shows_all_its_problems() {
    let (paths, validator) = (entries("tests/policies/invalid"), validator());
    assert!(paths.len() >= 45, "{} fixtures", paths.len());
    let mut refused_by_schema = 0;
    for path in paths {
        let Err(error) = load(&path) else { panic!("{} is valid", path.display()) };
        for problem in error.problems.iter() {
            points_into_its_file(problem, &error);
        }
        let name = path.file_stem().unwrap().to_str().unwrap();
        insta::assert_snapshot!(format!("invalid__{name}"), error.render(false));
        if path.is_file() {
            refused_by_schema += usize::from(!yaml(&path).is_some_and(|value| validator.is_valid(&value)));
        }
    }
    assert!(refused_by_schema >= 30, "the schema refuses only {refused_by_schema}");
}

#[test]
fn every_rule_has_a_valid_and_an_invalid_fixture() {
    let entries_of = |folder: &str| entries(folder).into_iter().filter(|path| path.is_file());
    let keys_in =
        |value: &Value| value.as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect::<Vec<_>>();
    let mut valid: Vec<(Option<Layer>, String)> = Vec::new();
    for document in entries_of("tests/policies/valid").filter_map(|path| yaml(&path)) {
        valid.extend(keys_in(&document["rules"]).into_iter().map(|key| (None, key)));
        valid.extend(keys_in(&document["defaults"]).into_iter().map(|key| (Some(Layer::Defaults), key)));
        for destination in document["destinations"].as_array().into_iter().flatten() {
            valid.extend(keys_in(destination).into_iter().map(|key| (Some(Layer::Destination), key)));
            for route in destination["routes"].as_array().into_iter().flatten() {
                valid.extend(keys_in(route).into_iter().map(|key| (Some(Layer::Route), key)));
            }
        }
    }
    let mut refused: Vec<String> = Vec::new();
    for error in entries_of("tests/policies/invalid").filter_map(|path| load(&path).err()) {
        refused.extend(error.problems.iter().map(|problem| problem.path.clone()));
    }
    let is_refused = |key: &str, in_modes: bool| {
        let mut paths = refused.iter().filter(|path| path.starts_with("rules.") == in_modes);
        paths.any(|path| path.split(['.', '[']).any(|part| part == key))
    };
    for rule in CATALOGUE {
        for layer in rule.layers {
            let at = (Some(*layer), rule.key.to_owned());
            assert!(valid.contains(&at), "no valid fixture has {} at: {}", rule.key, layer.as_str());
        }
        assert!(is_refused(rule.key, rule.layers.is_empty()), "no invalid fixture has a mistake in {}", rule.key);
    }
    for rule in RuleName::ALL {
        assert!(valid.contains(&(None, rule.key().to_owned())), "no valid fixture has rules.{}", rule.key());
    }
}

#[test]
fn what_check_suggests_it_also_accepts() {
    let head = format!("{HEAD}listeners: [{{ name: in, bind: '127.0.0.1:80', to: a }}]\ndestinations:\n  - name: a\n");
    let (hosts, endpoints) = ("    hosts: [b]\n", "    endpoints: [10.0.0.1:80]\n");
    let table = [
        (endpoints, "hosts: HERE", "\"*\"", "[\"*\"]"),
        (endpoints, "hosts: HERE", "'on'", "[\"on\"]"),
        (endpoints, "hosts: HERE", "b", "[b]"),
        (hosts, "endpoints: HERE", "10.0.0.1:80", "[10.0.0.1:80]"),
        (hosts, "endpoints: [HERE]", "\"https://b\"", "dns:b:443"),
        (endpoints, "faults: HERE", "off", "[]"),
        (endpoints, "faults: HERE", "false", "[]"),
        (endpoints, "routes: HERE", "none", "[]"),
        (endpoints, "limits: { queue: HERE }", "1_000", "1000"),
        (endpoints, "limits: { inFlight: HERE }", "\"5\"", "5"),
        (endpoints, "routes: [{ name: r, match: { methods: HERE } }]", "GET", "[GET]"),
        (endpoints, "retry: { on: HERE }", "503", "[503]"),
        (endpoints, "retry: HERE", "3", "{ attempts: 3 }"),
        (endpoints, "rateLimit: HERE", "20", "{ requests: 20 }"),
        (endpoints, "retry: { on: HERE }", "reset", "[reset]"),
    ];
    for (more, entry, wrong, right) in table {
        let with = |value| load_str("p.yaml", &format!("{head}{more}    {}\n", entry.replace("HERE", value)));
        let error = with(wrong).unwrap_err();
        let hint = error.problems.iter().next().and_then(|problem| problem.hint.clone()).unwrap_or_default();
        assert!(hint.contains(&format!("write `{right}`")), "{entry} {wrong}: {hint}");
        if let Err(error) = with(right) {
            panic!("{}", error.render(false));
        }
    }
}

#[test]
fn no_suggestion_is_made_up_of_a_word_that_is_no_element() {
    let table = [
        ("listeners: in", "write a list, each entry of it a listener with name, bind and to or forward"),
        (
            "destinations: [{ name: a, hosts: [a], routes: [{ name: r, match: { methods: \"*\" } }] }]",
            "remove `methods`",
        ),
        (
            "destinations: [{ name: a, hosts: [a], routes: [{ name: r, match: { methods: [\"*\"] } }] }]",
            "remove `methods`",
        ),
        ("destinations: [{ name: a, hosts: [a], endpoints: b }]", "write `dns:b:PORT`"),
        ("defaults: { retry: 11 }", "write `off`, or a mapping"),
    ];
    for (text, wanted) in table {
        let error = load_str("p.yaml", &format!("{HEAD}{text}\n")).unwrap_err();
        let hint = error.problems.iter().next().and_then(|problem| problem.hint.clone()).unwrap_or_default();
        assert!(hint.contains(wanted) && !hint.contains("`["), "{text}: {hint}");
    }
}

/// The path exists in the document, and line and bytes agree.
fn points_into_its_file(problem: &Problem, error: &LoadError) {
    let text = error.sources.text(&problem.file);
    let start = problem.place.span.start.min(text.len());
    if problem.place.line > 0 {
        let line = text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count() + 1;
        assert_eq!(line, problem.place.line as usize, "{problem}");
        assert!(
            problem.hint.as_ref().is_some_and(|h| !h.is_empty()) || problem.message.contains("expected"),
            "{problem}"
        );
    }
    if problem.path.is_empty() {
        return;
    }
    let document = yaml_of(text).unwrap();
    let pointer = format!("/{}", problem.path.replace(['.', '['], "/").replace(']', ""));
    assert!(document.pointer(&pointer).is_some(), "no {} in {}", problem.path, problem.file);
}

#[test]
fn the_shipped_schema_is_the_one_that_the_binary_prints() {
    let shipped = fs::read_to_string("config/policy.schema.json").unwrap();
    assert!(shipped == schema(), "run `hopguard schema > config/policy.schema.json`");
}

#[test]
fn a_full_policy_has_every_value_and_its_line() {
    let model = load(Path::new("tests/policies/valid/full.yaml")).unwrap();
    assert_eq!(model.service.as_deref(), Some("order"));
    assert_eq!((model.access_log.mode, model.access_log.ratio), (LogMode::Sampled, 0.5));
    let listener = &model.listeners[0];
    assert_eq!((listener.target, listener.direction), (ListenerTarget::To(0), Direction::Outbound));
    assert_eq!((listener.max_header_size.value, listener.max_header_count.value), (32 << 10, 256));
    assert_eq!(listener.max_streams.value, 1024);
    assert_eq!(model.destinations[0].connections.max_header_count.value, 300);
    assert!(listener.tls.as_ref().unwrap().key.ends_with("tests/policies/valid/tls.key"));
    let destination = &model.destinations[0];
    let names: Vec<_> = destination.routes.iter().map(|route| route.name.as_str()).collect();
    assert_eq!(names, ["pay", "feed", "charge", "ledger", "default"]);
    let pay = &destination.routes[0].timeouts;
    assert_eq!(
        (pay.request.value, pay.request.origin.to_string().as_str()),
        (Duration::from_millis(800), "tests/policies/valid/full.yaml:30")
    );
    assert_eq!(pay.connect.origin.to_string(), "tests/policies/valid/full.yaml:15");
    assert_eq!(destination.routes[1].timeouts.request.value, Duration::from_secs(2));
    assert_eq!(destination.limits.queue.value, 0);
    assert_eq!(destination.routes[4].origin, Origin::BuiltIn);
}

#[test]
fn old_words_mean_the_same_as_the_new_ones_and_are_warned_of() {
    let path = Path::new("tests/policies/valid/old-words.yaml");
    let old = load(path).unwrap();
    let new = fs::read_to_string(path).unwrap().replace("warn", "dryRun").replace("{ openFor: 1s,", "{ ejectFor: 1s,");
    let new = load_str("p.yaml", &new.replace("      openForMax", "      ejectForMax")).unwrap();
    assert!(new.warnings.problems.is_empty(), "{}", new.warnings.render(false));
    assert_eq!(old.hash, new.hash);
    assert_eq!(old.modes.retry.value, Mode::DryRun);
    let ejection = &old.destinations[0].ejection;
    assert_eq!(
        (ejection.eject_for.value, ejection.eject_for_max.value),
        (Duration::from_secs(2), Duration::from_secs(10))
    );
    insta::assert_snapshot!("old_words", old.warnings.render(false));
}

#[test]
fn the_schema_takes_old_words_and_marks_them() {
    let schema: Value = serde_json::from_str(&schema()).unwrap();
    let ejection = &schema["$defs"]["EjectionSpec"]["properties"];
    let is_old = |value: &Value| value["deprecated"] == true;
    assert!(is_old(&ejection["openFor"]) && is_old(&ejection["openForMax"]) && !is_old(&ejection["ejectFor"]));
    let modes = schema["$defs"]["Mode"]["oneOf"].as_array().unwrap();
    let old: Vec<_> = modes.iter().filter(|word| is_old(word)).map(|word| &word["const"]).collect();
    assert_eq!(old, ["warn"]);
    let breaker = &schema["$defs"]["CircuitBreakerSpec"]["properties"];
    assert!(breaker["openFor"].is_object() && !is_old(&breaker["openFor"]));
}

#[test]
fn files_of_a_directory_are_one_policy() {
    let model = load(Path::new("tests/policies/valid/merged")).unwrap();
    assert_eq!(model.files.len(), 3);
    assert_eq!(model.listeners[0].target, ListenerTarget::To(0));
    assert_eq!(model.destinations[0].routes[0].timeouts.request.value, Duration::from_secs(1));
}

#[test]
fn the_hash_tells_content_from_layout() {
    let policy = |tail: &str| {
        let listeners = "listeners: [{ name: in, bind: '127.0.0.1:80', to: a }]";
        load_str(
            "p.yaml",
            &format!("{HEAD}{listeners}\ndestinations:\n  - name: a\n    endpoints: [10.0.0.1:80]\n{tail}"),
        )
    };
    let plain = policy("").unwrap();
    let same = policy("    # said twice\n    timeouts: { request: 2000ms }\n").unwrap();
    let other = policy("    timeouts: { request: 3s }\n").unwrap();
    assert_eq!(plain.hash, same.hash);
    assert_ne!(plain.hash, other.hash);
}

#[test]
fn a_connect_that_no_layer_sets_follows_the_request_of_each_layer() {
    let text = format!(
        "{HEAD}listeners: [{{ name: in, bind: '127.0.0.1:80', to: a }}]
defaults: {{ timeouts: {{ request: 1s }} }}
destinations:
  - name: a
    endpoints: [10.0.0.1:80]
    routes:
      - {{ name: quick, match: {{ path: /quick }}, timeouts: {{ request: 300ms }} }}
      - {{ name: slow, match: {{ path: /slow }}, timeouts: {{ request: 9s }} }}
"
    );
    let model = load_str("p.yaml", &text).unwrap_or_else(|error| panic!("{}", error.render(false)));
    let connects = model.destinations[0].routes.iter().map(|route| &route.timeouts.connect);
    let connects: Vec<_> = connects.map(|connect| (connect.value.as_millis(), connect.origin.to_string())).collect();
    assert_eq!(connects, [300, 2000, 1000].map(|millis| (millis, "built in".to_owned())));
}

#[test]
fn false_means_off_wherever_off_may_stand() {
    let words = fs::read_to_string("tests/policies/valid/yaml-1-1-off.yaml").unwrap();
    let falses = load_str("p.yaml", &words).unwrap();
    let offs = load_str("p.yaml", &words.replace("false", "off")).unwrap();
    assert_eq!(falses.hash, offs.hash);
    assert_ne!(falses.hash, load_str("p.yaml", &words.replace("retry: false", "retry: {}")).unwrap().hash);
}

#[test]
fn a_fingerprint_follows_the_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.yaml");
    let absent = fingerprint(folder.path());
    fs::write(&file, "a").unwrap();
    let first = fingerprint(folder.path());
    fs::write(&file, "b").unwrap();
    let second = fingerprint(folder.path());
    fs::write(&file, "a").unwrap();
    assert!(first != absent && first != second);
    assert_eq!(first, fingerprint(folder.path()));
}

#[test]
fn what_cannot_be_read_is_a_problem() {
    let folder = tempfile::tempdir().unwrap();
    let refuses = |path: &Path, what: &str| {
        let error = load(path).unwrap_err();
        assert!(error.problems.to_string().contains(what), "{error}");
        assert!(error.render(false).contains(what));
    };
    refuses(folder.path(), "no policy in it");
    refuses(&folder.path().join("absent.yaml"), "cannot be read");
    let file = folder.path().join("a.yaml");
    fs::write(&file, vec![b'#'; (1 << 20) + 1]).unwrap();
    refuses(&file, "larger than 1 MiB");
    fs::write(&file, b"kind: Policy\nservice: caf\xe9\n").unwrap();
    refuses(&file, "not UTF-8: see line 2");
}

#[test]
fn a_pipe_in_a_folder_is_named_and_does_not_block() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.yaml"), HEAD).unwrap();
    let made = std::process::Command::new("mkfifo").arg(folder.path().join("pipe")).status().unwrap();
    assert!(made.success());
    std::os::unix::fs::symlink("pipe", folder.path().join("b.yaml")).unwrap();
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let first = fingerprint(folder.path());
        done.send((load(folder.path()), first == fingerprint(folder.path()))).unwrap();
    });
    let (loaded, is_same) = result.recv_timeout(Duration::from_secs(20)).expect("it reads from the pipe");
    let shown = loaded.unwrap_err().render(false);
    assert!(shown.contains("b.yaml: is not a regular file") && is_same, "{shown}");
}

#[test]
fn hostile_documents_are_refused_quickly() {
    let deep = "[".repeat(100_000);
    let many: String = (0..50_000).map(|n| format!("k{n}: 1\n")).collect();
    let bomb: String = (1..12).map(|n| format!("a{n}: &a{n} [{}]\n", format!("*a{},", n - 1).repeat(9))).collect();
    for text in [deep, many, format!("a0: &a0 [x]\n{bomb}"), "\u{feff}: \u{0}".into(), "\u{1b}[31m: 1".into()] {
        let error = load_str("p.yaml", &text).unwrap_err();
        let shown = error.render(false);
        assert!(!shown.contains('\u{1b}'), "{shown:?}");
        assert!(error.problems.iter().count() <= 200);
    }
}

#[test]
fn problems_are_json_lines_too() {
    let error = load(Path::new("tests/policies/invalid/five-mistakes.yaml")).unwrap_err();
    insta::assert_snapshot!("json", error.problems.to_json());
}

/// What this thread has had of the CPU so far, whatever else the machine is busy with.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    // In user and in system mode, in hundredths of a second: fields 14 and 15, where the second ends with the last bracket.
    let fields = stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2);
    Duration::from_millis(fields.map(|ticks| ticks.parse::<u64>().unwrap() * 10).sum())
}

#[test]
fn ten_thousand_routes_load_in_a_fraction_of_a_second() {
    let routes: String = (0..10_000).map(|n| format!("- {{name: r{n}, match: {{path: '/a{n}/{{id}}'}}}}\n")).collect();
    let head =
        "listeners: [{ name: in, bind: '127.0.0.1:80', to: a }]\ndestinations:\n- name: a\n  endpoints: [10.0.0.1:80]";
    let text = format!("{HEAD}{head}\n  routes:\n{}", routes.replace("- {", "  - {"));
    let before = cpu_time();
    let model = load_str("p.yaml", &text).unwrap();
    let took = cpu_time() - before;
    assert_eq!(model.destinations[0].routes.len(), 10_001);
    assert!(took > Duration::ZERO && took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn a_reload_of_very_many_rate_limits_costs_little_more_than_the_first_load() {
    let head = "listeners: [{ name: in, bind: '127.0.0.1:80', to: a }]\ndestinations:\n- name: a\n  endpoints: [10.0.0.1:80]\n  rateLimit: { requests: 9, per: 1s }\n  routes:\n";
    let routes: String = (0..40_000).map(|n| format!("  - {{name: r{n}, match: {{path: '/a{n}'}}}}\n")).collect();
    let (model, hops) = (load_str("p.yaml", &format!("{HEAD}{head}{routes}")).unwrap(), Hops::default());
    let compile = |previous: Option<&Snapshot>| {
        let begun = cpu_time();
        let snapshot = Snapshot::compile(model.clone(), "a", previous, &hops, |_| {}).unwrap();
        (snapshot, cpu_time() - begun)
    };
    let (first, first_took) = compile(None);
    let (second, second_took) = compile(Some(&first));
    let limiters = |snapshot: &Snapshot| snapshot.destinations[0].limiters.clone();
    let both = limiters(&first).into_iter().zip(limiters(&second));
    assert_eq!(both.filter(|(a, b)| Arc::ptr_eq(a.as_ref().unwrap(), b.as_ref().unwrap())).count(), 40_001);
    assert!(second_took < first_took * 2 + Duration::from_millis(500), "{first_took:?}, then {second_took:?}");
}

#[test]
fn an_explanation_names_everything_that_holds_and_its_line() {
    let calls = [
        ("full", "POST", "http://payment/payments/7"),
        ("full", "GRPC", "http://payment:8080/shop.v1.Payment/Charge"),
        ("full", "GET", "/feed"),
        ("full", "GET", "http://localhost:8080/elsewhere"),
        ("full", "GET", "http://unknown/"),
        ("full", "G T", "http://payment/"),
        ("forward", "GET", "https://A.B.Shop.Example/x?y=z"),
        ("forward", "GET", "http://[::1]:9/"),
        ("forward", "GET", "/x"),
        ("overlapping-routes", "GET", "/items/5"),
        ("overlapping-routes", "DELETE", "/items/5.json"),
        ("rules", "GET", "http://payment/balance/7"),
        ("rules", "POST", "http://payment/payments/7"),
        ("rules", "GET", "http://ledger/"),
        ("rules-off", "GET", "http://payment/"),
        ("rules-off", "GET", "http://ledger/"),
        ("tunnels", "CONNECT", "bank.example:443"),
        ("tunnels", "OPTIONS", "*"),
        ("tunnels", "CONNECT", "http://bank.example:443/"),
        ("tunnels", "CONNECT", "bank.example"),
        ("tunnels", "GET", "*"),
        ("tunnels", "GET", "ftp://bank.example/"),
        ("tunnels", "GET", "http://user@bank.example/"),
        ("tunnels", "GET", "http://bank.example:99999/"),
        ("tunnels", "GET", "http://bank.example:0x50/"),
        ("tunnels", "GET", "http://[::1]:+80/"),
        ("tunnels", "GET", "http://bank.example:/"),
        ("minimal", "CONNECT", "bank.example:443"),
    ];
    let now = "2026-11-22T18:15:48Z".parse().unwrap();
    let mut out = String::new();
    for (policy, method, url) in calls {
        let model = load(Path::new(&format!("tests/policies/valid/{policy}.yaml"))).unwrap();
        out.push_str(&format!("# {policy}: {method} {url}\n"));
        match Call::parse(method, url, HeaderMap::new()) {
            Err(error) => out.push_str(&format!("{error}\n")),
            Ok(call) => match explain(&model, &call, now) {
                Ok(explanations) => explanations.iter().for_each(|explanation| out.push_str(&format!("{explanation}"))),
                Err(error) => out.push_str(&format!("{error}\n")),
            },
        }
        out.push('\n');
    }
    let folder = std::path::absolute("tests/policies/valid").unwrap();
    insta::assert_snapshot!("explain", out.replace(folder.to_str().unwrap(), "FOLDER"));
}

#[test]
fn check_says_ok_or_everything_that_is_wrong() {
    use hopguard::cli::check::{Form, check};
    let run = |paths: &[&str], form| {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let paths: Vec<_> = paths.iter().map(|name| Path::new("tests/policies").join(name)).collect();
        let code = check(&paths, form, false, (&mut out, &mut err)).unwrap();
        (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    };
    let (code, out, err) = run(&["valid/full.yaml", "valid/minimal.yaml"], Form::Text);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out,
        "ok: tests/policies/valid/full.yaml (1 listener, 1 destination, 4 routes)\n\
        ok: tests/policies/valid/minimal.yaml (1 listener, 1 destination, 0 routes)\n"
    );
    let (code, out, err) = run(&["valid/rules.yaml"], Form::Text);
    assert_eq!((code, out.lines().count()), (0, 1));
    let warning = "fault `forgotten` of payment ended at 2026-01-01T00:00:00Z (tests/policies/valid/rules.yaml:50)";
    assert_eq!(err, format!("warning: {warning}: remove it\n"));
    let (_, out, _) = run(&["valid/rules.yaml"], Form::Json);
    assert!(out.contains(&format!(r#""warnings":["{warning}: remove it"]"#)), "{out}");
    let (code, out, err) = run(&["valid/old-words.yaml"], Form::Text);
    assert_eq!((code, out.lines().count()), (0, 1));
    assert!(err.starts_with("warning: `warn` is the old word for `dryRun`\n"), "{err}");
    assert!(err.contains(" --> tests/policies/valid/old-words.yaml:6:10\n"), "{err}");
    let (code, out, err) = run(&["valid/old-words.yaml"], Form::Json);
    assert_eq!((code, out.lines().count(), err.as_str()), (0, 4, ""));
    let lines: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines[..3].iter().all(|warning| warning["severity"] == "warning") && lines[3]["ok"].is_string(), "{out}");
    let (code, out, err) = run(&["invalid/old-and-new-word.yaml"], Form::Text);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.ends_with("old-and-new-word.yaml: 4 problems, 3 warnings\n"), "{err}");
    let (code, out, err) = run(&["valid/minimal.yaml", "invalid/five-mistakes.yaml"], Form::Text);
    assert_eq!((code, out.lines().count()), (1, 1));
    assert!(err.ends_with("tests/policies/invalid/five-mistakes.yaml: 5 problems\n"), "{err}");
    let (code, out, err) = run(&["valid/minimal.yaml", "invalid/five-mistakes.yaml"], Form::Json);
    assert_eq!((code, out.lines().count(), err.as_str()), (1, 6, ""));
    assert!(out.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
}

#[test]
fn check_says_when_there_may_be_more_mistakes_than_it_shows() {
    use hopguard::cli::check::{Form, check};
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.yaml");
    for (mistakes, end) in [(1, "1 problem\n"), (300, "200 problems or more\n")] {
        let unknown: String = (0..mistakes).map(|n| format!("unknown{n}: 1\n")).collect();
        fs::write(&file, format!("{HEAD}{unknown}")).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = check(std::slice::from_ref(&file), Form::Text, false, (&mut out, &mut err)).unwrap();
        let err = String::from_utf8(err).unwrap();
        assert!(code == 1 && err.ends_with(&format!("{}: {end}", file.display())), "{err}");
        assert_eq!(err.contains("and perhaps more: a file was not read to its end\n"), mistakes > 200, "{err}");
    }
}

#[test]
fn explain_exits_by_what_went_wrong() {
    let run = |call, headers: &[String], policy: &str| {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let policy = Path::new("tests/policies").join(policy);
        let code = hopguard::cli::explain::explain(call, headers, &policy, false, (&mut out, &mut err)).unwrap();
        assert_eq!(out.is_empty(), code != 0, "{}", String::from_utf8_lossy(&err));
        (code, String::from_utf8(out).unwrap())
    };
    let tenant = ["x-tenant: a".to_owned()];
    let (code, out) = run(("post", "http://payment/payments/7"), &tenant, "valid/full.yaml");
    assert!(code == 0 && out.contains("pay (POST on path /payments/{id}, x-tenant: a)"), "{out}");
    assert_eq!(run(("GET", "http://nobody/"), &[], "valid/full.yaml").0, 1);
    assert_eq!(run(("GET", "http://a/"), &[], "invalid/five-mistakes.yaml").0, 1);
    assert_eq!(run(("GET", "http://a b/"), &[], "valid/full.yaml").0, 2);
    assert_eq!(run(("GET", "http://payment:99999/"), &[], "valid/full.yaml").0, 2);
    assert_eq!(run(("GET", "/"), &["no colon".to_owned()], "valid/full.yaml").0, 2);
}

proptest::proptest! {
    /// Whatever an editor leaves behind half-way: an answer, and every problem within the text.
    #[test]
    fn a_damaged_policy_is_loaded_or_explained(at in 0_usize..1200, length in 0_usize..40, patch in "[ \\-:{}\\[\\]\"',a-z0-9&*<~|>#\n\tä]{0,12}") {
        let mut text = fs::read_to_string("tests/policies/valid/full.yaml").unwrap();
        let (start, end) = (at.min(text.len()), (at + length).min(text.len()));
        text.replace_range(start..end, &patch);
        if let Err(error) = load_str("p.yaml", &text) {
            assert!(!error.problems.is_empty() && !error.render(true).is_empty());
            for problem in error.problems.iter() {
                assert!(problem.place.span.start <= text.len(), "{problem:?}");
            }
        }
    }
}
