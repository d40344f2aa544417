//! Compares what happened with what a case allows; every difference is said in words.

use super::caller::Talk;
use super::case::{Case, Expected, FieldCheck, Forwarded, Received, Verdict};
use super::strict::{self, Message, Tail};
use super::upstream::{END, SYNC, Seen};

/// What happened in one case.
pub(crate) struct Outcome {
    /// The caller's side.
    pub(crate) talk: Talk,
    /// The upstream's side.
    pub(crate) seen: Vec<Seen>,
    /// What the call after it got, where that was wrong.
    pub(crate) next_call: Result<(), String>,
}

/// The upstream's connections, read by the strict parser.
struct Upstreamed {
    requests: Vec<Message>,
    partial: usize,
    left_open: usize,
    synced: usize,
}

/// An empty list means that the case is met.
pub(crate) fn judge(case: &Case, outcome: &Outcome) -> Vec<String> {
    let mut problems = Vec::new();
    if outcome.talk.hung {
        problems.push("it hangs".to_owned());
    }
    if let Tail::Broken(breach) = &outcome.talk.rest {
        problems.push(format!("to the caller: {breach}"));
    }
    if let Err(problem) = &outcome.next_call {
        problems.push(problem.clone());
    }
    let upstreamed = match read(&outcome.seen) {
        Ok(upstreamed) => upstreamed,
        Err(breach) => {
            problems.push(format!("to the upstream: {breach}"));
            return problems;
        }
    };
    if upstreamed.left_open > 0 {
        problems.push("a request was left unfinished at the upstream, on an open connection".to_owned());
    }
    if outcome.next_call.is_ok() && upstreamed.synced != 1 {
        problems.push(format!("the next call arrived {} times", upstreamed.synced));
    }
    let differences: Vec<Vec<String>> =
        case.verdicts.iter().map(|verdict| differences(verdict, &outcome.talk, &upstreamed)).collect();
    if !differences.iter().any(Vec::is_empty) {
        for (index, found) in differences.iter().enumerate() {
            problems.push(format!("outcome {}: {}", index + 1, found.join("; ")));
        }
    }
    problems
}

fn read(seen: &[Seen]) -> Result<Upstreamed, String> {
    let mut all = Upstreamed { requests: Vec::new(), partial: 0, left_open: 0, synced: 0 };
    for connection in seen {
        let (requests, tail) = strict::requests(&connection.bytes);
        if let Tail::Broken(breach) = tail {
            return Err(breach);
        }
        all.synced += requests.iter().filter(|r| r.start.1 == SYNC).count();
        all.requests.extend(requests.into_iter().filter(|r| r.start.1 != SYNC && r.start.1 != END));
        if !matches!(tail, Tail::Clean) {
            all.partial += 1;
            all.left_open += usize::from(!connection.ended);
        }
    }
    Ok(all)
}

fn differences(verdict: &Verdict, talk: &Talk, upstreamed: &Upstreamed) -> Vec<String> {
    let mut found = Vec::new();
    let count = upstreamed.requests.len();
    if verdict.any_request {
        if count + upstreamed.partial != 1 {
            found.push(format!("the upstream saw {count} requests instead of one"));
        }
    } else {
        if count != verdict.forwards.len() {
            let targets: Vec<_> = upstreamed.requests.iter().map(|r| &r.start).collect();
            found.push(format!("the upstream saw {count} requests instead of {}: {targets:?}", verdict.forwards.len()));
        }
        if upstreamed.partial > 0 && !verdict.partial {
            found.push("the upstream saw the beginning of a request".to_owned());
        }
    }
    for (wanted, request) in verdict.forwards.iter().zip(&upstreamed.requests) {
        forwarded(wanted, request, &mut found);
    }
    answers(verdict, talk, &mut found);
    if verdict.closed && talk.stayed_open {
        found.push("the caller's connection stayed open".to_owned());
    }
    found
}

fn forwarded(wanted: &Forwarded, request: &Message, found: &mut Vec<String>) {
    if request.start != (wanted.method.clone(), wanted.target.clone()) {
        found.push(format!("{:?} instead of {} {}", request.start, wanted.method, wanted.target));
    }
    let empty = Vec::new();
    let body = wanted.message.body.as_ref().unwrap_or(&empty);
    message(&wanted.message, request, Some(body), found);
}

/// The answers to what was forwarded, then the refusal.
fn answers(verdict: &Verdict, talk: &Talk, found: &mut Vec<String>) {
    let mut expected: Vec<Received> = verdict.receives.clone();
    if expected.is_empty() {
        let plain =
            |_: &Forwarded| Received { statuses: vec![200], message: Expected::default(), cut: false, tunnel: false };
        expected.extend(verdict.forwards.iter().map(plain));
    }
    if !verdict.refused.is_empty() {
        expected.push(Received {
            statuses: verdict.refused.clone(),
            message: Expected::default(),
            cut: false,
            tunnel: false,
        });
    }
    let mut got = talk.answers.clone();
    let unfinished = match &talk.rest {
        Tail::Partial { head: Some(head) } => Some((**head).clone()),
        _ => None,
    };
    let cut = matches!(talk.rest, Tail::Partial { .. });
    got.extend(unfinished);
    if verdict.silent && got.len() < expected.len().max(1) && !cut {
        return;
    }
    if cut != expected.last().is_some_and(|e| e.cut) {
        found.push(if cut { "the last answer is cut" } else { "no answer is cut" }.to_owned());
    }
    if got.len() != expected.len() {
        let statuses: Vec<u16> = got.iter().map(Message::status).collect();
        found.push(format!("{} answers instead of {}: {statuses:?}", got.len(), expected.len()));
    }
    for (wanted, answer) in expected.iter().zip(&got) {
        received(wanted, answer, talk, found);
    }
}

fn received(wanted: &Received, answer: &Message, talk: &Talk, found: &mut Vec<String>) {
    if !wanted.statuses.contains(&answer.status()) {
        found.push(format!("status {} instead of {:?}", answer.status(), wanted.statuses));
    }
    let body = wanted.message.body.as_ref();
    if wanted.cut {
        if body.is_some_and(|b| !b.starts_with(&answer.body)) {
            found.push(format!("body {:?} is no beginning", short(&answer.body)));
        }
        message(&wanted.message, answer, None, found);
    } else {
        message(&wanted.message, answer, body, found);
    }
    if wanted.tunnel && !talk.echoed {
        found.push("the tunnel carried nothing back".to_owned());
    }
}

fn message(wanted: &Expected, message: &Message, body: Option<&Vec<u8>>, found: &mut Vec<String>) {
    for check in &wanted.fields {
        let (name, right) = match check {
            FieldCheck::Exactly(name, values) => {
                (name, message.values(name) == values.iter().map(Vec::as_slice).collect::<Vec<_>>())
            }
            FieldCheck::Absent(name) => {
                (name, message.values(name).is_empty() && message.trailers.iter().all(|t| t.0 != *name))
            }
            FieldCheck::Contains(name, part) => {
                (name, message.values(name).iter().any(|v| v.windows(part.len()).any(|w| w == &part[..])))
            }
        };
        if !right {
            let values: Vec<String> = message.values(name).iter().map(|v| short(v)).collect();
            found.push(format!("field {name} is {values:?}"));
        }
    }
    if body.is_some_and(|body| *body != message.body) {
        found.push(format!("body {:?}", short(&message.body)));
    }
    for trailer in &wanted.trailers {
        if !message.trailers.contains(trailer) {
            found.push(format!("trailer {} is missing", trailer.0));
        }
    }
}

/// Bytes as text, cut where they are long.
pub(crate) fn short(bytes: &[u8]) -> String {
    let shown = bytes[..bytes.len().min(700)].escape_ascii().to_string();
    let more = bytes.len().saturating_sub(700);
    if more > 0 { format!("{shown}… and {more} bytes more") } else { shown }
}
