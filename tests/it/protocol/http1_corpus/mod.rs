//! Malformed, ambiguous and odd but legal HTTP/1, from `tests/http1_corpus`, between a raw caller and a scripted upstream.
//!
//! Three files make a case: `case` reads it, `caller` and `upstream` play it, `judge` compares it; `strict` reads
//! what the proxy wrote. A case is met when one of its verdicts is met wholly, no byte that could be read in two
//! ways was passed on, the next call is answered as if nothing had happened, and nothing took three seconds.

mod caller;
mod case;
mod judge;
mod strict;
mod upstream;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::support::{Mesh, SOON};
use case::Case;
use judge::{Outcome, judge, short};
use upstream::Upstream;

/// Cases of one mesh: enough to keep the whole corpus quick, few enough for the usual limit of open files.
const GROUP: usize = 32;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/http1_corpus")
}

#[tokio::test]
async fn nothing_ambiguous_passes_and_nothing_legal_is_refused() {
    let files = case::load(&folder());
    let allowed = allowances();
    let (mut report, mut failed) = (String::new(), BTreeSet::new());
    let cases: Vec<Case> = files.into_iter().flatten().collect();
    for group in cases.chunks(GROUP) {
        for (case, outcome, problems) in play(group).await {
            if problems.is_empty() {
                continue;
            }
            if !allowed.contains_key(&case.name) {
                describe(&mut report, &case, &outcome, &problems);
            }
            failed.insert(case.name);
        }
    }
    for name in allowed.keys().filter(|name| !failed.contains(*name)) {
        let _ = writeln!(report, "\n{name}: allowed to fail, but it holds: take it out of allowances.txt");
    }
    assert!(report.is_empty(), "{} of {} cases fail{report}", failed.len(), cases.len());
}

#[test]
fn the_corpus_is_large_and_every_case_has_its_own_name() {
    let cases: Vec<Case> = case::load(&folder()).into_iter().flatten().collect();
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    let legal = cases.iter().filter(|case| case.legal).count();
    assert!(cases.len() - legal >= 150, "{} bad cases", cases.len() - legal);
    assert!(legal >= 40, "{legal} legal cases");
    let without = cases.iter().filter(|case| !case.section.starts_with("RFC ")).map(|case| &case.place);
    assert_eq!(without.collect::<Vec<_>>(), Vec::<&String>::new(), "each case names the section it is about");
    let unknown: Vec<String> = allowances().into_keys().filter(|name| !names.contains(name.as_str())).collect();
    assert_eq!(unknown, Vec::<String>::new(), "allowances name cases that are not there");
}

/// `NAME: REASON`, one a line.
fn allowances() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(folder().join("allowances.txt")).expect("part of the repository");
    let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, reason) = line.split_once(": ").expect("NAME: REASON");
            assert!(reason.len() > 20, "{name}: a reason says more than that");
            (name.to_owned(), reason.to_owned())
        })
        .collect()
}

/// Plays a group of cases at once, each with a listener, a destination and an upstream of its own.
async fn play(group: &[Case]) -> Vec<(Case, Outcome, Vec<String>)> {
    let mut upstreams = Vec::new();
    for case in group {
        upstreams.push(Upstream::start(case.answer.clone()).await);
    }
    let mesh = Mesh::start(&policy(&upstreams)).await;
    let mut playing = JoinSet::new();
    for (index, upstream) in upstreams.into_iter().enumerate() {
        let host = format!("c{index}.test");
        let case = group[index].for_host(&host);
        let door = if case.forward { mesh.addr("forward") } else { mesh.addr(&format!("c{index}")) };
        let reverse = mesh.addr(&format!("c{index}"));
        playing.spawn(async move {
            let talk = caller::talk(door, &case, &host).await;
            let next_call = caller::sync(reverse, &host).await;
            let _unsettled = timeout(SOON, upstream.settled()).await;
            let outcome = Outcome { talk, seen: upstream.seen(), next_call };
            let problems = judge(&case, &outcome);
            (index, case, outcome, problems)
        });
    }
    let mut all = playing.join_all().await;
    mesh.stop().await;
    all.sort_by_key(|(index, ..)| *index);
    all.into_iter().map(|(_, case, outcome, problems)| (case, outcome, problems)).collect()
}

/// Short limits, so that a case which waits for one of them ends within the patience of the caller.
fn policy(upstreams: &[Upstream]) -> String {
    let listener = "timeouts: { headers: 1s, idle: 2s }, maxHeaderSize: 64KiB";
    let mut listeners = format!("  - {{ name: forward, bind: \"127.0.0.1:0\", forward: true, {listener} }}\n");
    let mut destinations = String::new();
    for (index, upstream) in upstreams.iter().enumerate() {
        let addr = upstream.addr();
        let _ = writeln!(listeners, "  - {{ name: c{index}, bind: \"127.0.0.1:0\", to: c{index}, {listener} }}");
        let _ = writeln!(
            destinations,
            "  - {{ name: c{index}, hosts: [c{index}.test], endpoints: [\"{addr}\"], protocol: http1 }}"
        );
    }
    format!(
        "apiVersion: hopguard.dev/v1alpha1\nkind: Policy\nservice: corpus\n\
         defaults: {{ timeouts: {{ connect: 500ms, request: 1s, idle: 2s }} }}\n\
         listeners:\n{listeners}destinations:\n{destinations}"
    )
}

fn describe(report: &mut String, case: &Case, outcome: &Outcome, problems: &[String]) {
    let kind = if case.legal { "legal" } else { "breaks" };
    let _ = writeln!(report, "\n\n{} ({}; {kind} {})", case.name, case.place, case.section);
    for problem in problems {
        let _ = writeln!(report, "  - {problem}");
    }
    let _ = writeln!(report, "  sent     {}", short(&case.sent()));
    if !case.answer.bytes.is_empty() {
        let _ = writeln!(report, "  answered {}", short(&case.answer.bytes));
    }
    for (index, seen) in outcome.seen.iter().enumerate() {
        let _ = writeln!(report, "  upstream {index}: {}", short(&seen.bytes));
    }
    let _ = write!(report, "  received {}", short(&outcome.talk.bytes));
}
