//! The cases of `tests/http1_corpus/*.txt`, read into values; the format is described in the README beside them.
//!
//! A line that the loader does not understand is an error with its file and line: a case that says less
//! than its author meant would pass for the wrong reason.

use std::path::Path;

use super::strict::Field;

/// One conversation: what the caller sends, what the upstream answers, and every outcome that is right.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// Unique over all files; allowances name it.
    pub(crate) name: String,
    /// `file:line` of the case.
    pub(crate) place: String,
    /// The section that the bytes break, or obey.
    pub(crate) section: String,
    /// Whether the bytes obey the standard, so that a refusal would be wrong.
    pub(crate) legal: bool,
    /// Sent to a forward listener instead of a reverse one.
    pub(crate) forward: bool,
    /// What the caller does, in order.
    pub(crate) steps: Vec<Step>,
    /// The caller closes its sending side after the last step.
    pub(crate) caller_closes: bool,
    /// What the upstream answers; a plain 200 where the case says nothing.
    pub(crate) answer: Answer,
    /// The outcomes that are right; one of them must be met wholly.
    pub(crate) verdicts: Vec<Verdict>,
}

/// One thing that the caller does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Writes these bytes.
    Send(Vec<u8>),
    /// Waits for an interim answer with this status, or for the end.
    AwaitInterim(u16),
    /// Waits for that many final answers.
    AwaitAnswers(usize),
}

/// What the upstream does with a request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answer {
    /// Sent as soon as the head of the request is there.
    pub(crate) interim: Vec<u8>,
    /// Sent for every request that is not a probe; empty means the plain answer.
    pub(crate) bytes: Vec<u8>,
    /// Sent at the head of the request, whatever its body does.
    pub(crate) early: bool,
    /// No byte is sent.
    pub(crate) nothing: bool,
    /// What happens to the connection after the answer.
    pub(crate) then: Then,
}

/// What the upstream does with its connection after an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Then {
    /// Waits for the next request.
    #[default]
    Keep,
    /// Closes it in order.
    Close,
    /// Resets it.
    Reset,
}

/// One right outcome.
#[derive(Debug, Clone, Default)]
pub(crate) struct Verdict {
    /// Statuses of a refusal that follows the answers to `forwards`; empty means no refusal.
    pub(crate) refused: Vec<u16>,
    /// A close without an answer is right too.
    pub(crate) silent: bool,
    /// The upstream may have seen the beginning of a request, visibly cut.
    pub(crate) partial: bool,
    /// The proxy closes the caller's connection after the last answer.
    pub(crate) closed: bool,
    /// The requests that the upstream sees, in order; no others.
    pub(crate) forwards: Vec<Forwarded>,
    /// The answers that the caller sees; empty means one plain answer for each of `forwards`.
    pub(crate) receives: Vec<Received>,
    /// `forwards` says nothing: any one request.
    pub(crate) any_request: bool,
}

/// A request as it must arrive at the upstream.
#[derive(Debug, Clone)]
pub(crate) struct Forwarded {
    /// The method, byte for byte.
    pub(crate) method: String,
    /// The target, byte for byte.
    pub(crate) target: String,
    /// What its fields, body and trailers must be.
    pub(crate) message: Expected,
}

/// An answer as it must arrive at the caller.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    /// Statuses that are right.
    pub(crate) statuses: Vec<u16>,
    /// What its fields, body and trailers must be.
    pub(crate) message: Expected,
    /// The body is visibly incomplete: the connection ends before the framing does.
    pub(crate) cut: bool,
    /// After this answer the connection is a tunnel that carries bytes both ways.
    pub(crate) tunnel: bool,
}

/// What is wanted of a message.
#[derive(Debug, Clone, Default)]
pub(crate) struct Expected {
    /// Checks on single fields.
    pub(crate) fields: Vec<FieldCheck>,
    /// The body; `None` means empty for a request and unchecked for an answer.
    pub(crate) body: Option<Vec<u8>>,
    /// Trailer fields that must have arrived, by lower-case name.
    pub(crate) trailers: Vec<Field>,
}

/// A check on one field.
#[derive(Debug, Clone)]
pub(crate) enum FieldCheck {
    /// These lines and no others, in this order.
    Exactly(String, Vec<Vec<u8>>),
    /// Not there, neither as a field nor as a trailer.
    Absent(String),
    /// Some line contains this.
    Contains(String, Vec<u8>),
}

/// Reads every `*.txt` in a folder, in name order, except the allowances.
pub(crate) fn load(folder: &Path) -> Vec<Vec<Case>> {
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .expect("the corpus folder is part of the repository")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "txt"))
        .filter(|path| path.file_stem().is_some_and(|s| s != "allowances"))
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let text = std::fs::read_to_string(path).expect("a corpus file is text");
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            parse(&name, &text).unwrap_or_else(|problem| panic!("{problem}"))
        })
        .collect()
}

/// Parses one file; the error names file and line.
pub(crate) fn parse(file: &str, text: &str) -> Result<Vec<Case>, String> {
    let mut cases: Vec<Case> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let place = format!("{file}:{}", number + 1);
        if let Some(name) = line.strip_prefix("== ") {
            cases.push(Case::named(name.trim(), &place));
        } else if !(line.trim().is_empty() || line.starts_with('#')) {
            let case = cases.last_mut().ok_or(format!("{place}: no case yet"))?;
            case.line(line).map_err(|problem| format!("{place}: {problem}: {line}"))?;
        }
    }
    for case in &mut cases {
        case.finish().map_err(|problem| format!("{}: {}: {problem}", case.place, case.name))?;
    }
    Ok(cases)
}

impl Case {
    fn named(name: &str, place: &str) -> Self {
        Case {
            name: name.to_owned(),
            place: place.to_owned(),
            section: String::new(),
            legal: false,
            forward: false,
            steps: Vec::new(),
            caller_closes: false,
            answer: Answer::default(),
            verdicts: vec![Verdict::default()],
        }
    }

    fn line(&mut self, line: &str) -> Result<(), String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "breaks" | "legal" => {
                self.section = rest.to_owned();
                self.legal = word == "legal";
            }
            "forward" => self.forward = true,
            ">" => self.send(unescape(rest)?, true),
            ">>" => self.send(unescape(rest)?, false),
            "<" => push_line(&mut self.answer.bytes, unescape(rest)?),
            "<<" => self.answer.bytes.extend(unescape(rest)?),
            "<1" => push_line(&mut self.answer.interim, unescape(rest)?),
            "await" => self.steps.push(Step::AwaitInterim(number(rest)?)),
            "await-answers" => self.steps.push(Step::AwaitAnswers(number(rest)?.into())),
            "caller" if rest == "closes" => self.caller_closes = true,
            "upstream" => self.upstream(rest)?,
            "or" => self.verdicts.push(Verdict::default()),
            _ => {
                let verdict = self.verdicts.last_mut().ok_or("no verdict")?;
                verdict.line(word, rest)?;
            }
        }
        Ok(())
    }

    fn send(&mut self, bytes: Vec<u8>, line: bool) {
        if !matches!(self.steps.last(), Some(Step::Send(_))) {
            self.steps.push(Step::Send(Vec::new()));
        }
        if let Some(Step::Send(sent)) = self.steps.last_mut() {
            sent.extend(bytes);
            if line {
                sent.extend(b"\r\n");
            }
        }
    }

    fn upstream(&mut self, what: &str) -> Result<(), String> {
        match what {
            "closes" => self.answer.then = Then::Close,
            "resets" => self.answer.then = Then::Reset,
            "answers early" => self.answer.early = true,
            "answers nothing" => self.answer.nothing = true,
            _ => return Err("an upstream closes, resets, or answers early or nothing".to_owned()),
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), String> {
        if self.section.is_empty() {
            return Err("neither `breaks` nor `legal`".to_owned());
        }
        if self.steps.is_empty() {
            let request = b"GET /answer HTTP/1.1\r\nHost: case.test\r\n\r\n";
            self.steps.push(Step::Send(request.to_vec()));
        }
        for verdict in &mut self.verdicts {
            let empty = verdict.refused.is_empty()
                && !verdict.silent
                && verdict.forwards.is_empty()
                && verdict.receives.is_empty();
            if empty {
                return Err("a verdict that says nothing".to_owned());
            }
            let answers_only = verdict.forwards.is_empty() && verdict.refused.is_empty();
            let script = &self.answer;
            let scripted = script.nothing || !(script.bytes.is_empty() && script.interim.is_empty());
            verdict.any_request = answers_only && scripted;
        }
        Ok(())
    }

    /// All bytes that the caller sends.
    pub(crate) fn sent(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for step in &self.steps {
            if let Step::Send(bytes) = step {
                all.extend(bytes);
            }
        }
        all
    }

    /// The same case with `$HOST` replaced by the host name of its destination.
    pub(crate) fn for_host(&self, host: &str) -> Case {
        let mut case = self.clone();
        for step in &mut case.steps {
            if let Step::Send(bytes) = step {
                *bytes = replace(bytes, b"$HOST", host.as_bytes());
            }
        }
        let swap = |text: &mut Vec<u8>| *text = replace(text, b"$HOST", host.as_bytes());
        let forwards = case.verdicts.iter_mut().flat_map(|v| &mut v.forwards);
        for check in forwards.flat_map(|f| &mut f.message.fields) {
            match check {
                FieldCheck::Exactly(_, values) => values.iter_mut().for_each(swap),
                FieldCheck::Contains(_, value) => swap(value),
                FieldCheck::Absent(_) => {}
            }
        }
        case
    }
}

impl Verdict {
    fn line(&mut self, word: &str, rest: &str) -> Result<(), String> {
        match word {
            "refused" => self.refused = numbers(rest)?,
            "silent" => self.silent = true,
            "partial" => self.partial = true,
            "closed" => self.closed = true,
            "forwards" => {
                let (method, target) = rest.split_once(' ').ok_or("METHOD TARGET")?;
                self.forwards.push(Forwarded {
                    method: method.to_owned(),
                    target: String::from_utf8_lossy(&unescape(target)?).into_owned(),
                    message: Expected::default(),
                });
                self.receives.clear();
            }
            "receives" => self.receives.push(Received {
                statuses: numbers(rest)?,
                message: Expected::default(),
                cut: false,
                tunnel: false,
            }),
            "cut" => self.receives.last_mut().ok_or("`cut` follows `receives`")?.cut = true,
            "tunnel" => self.receives.last_mut().ok_or("`tunnel` follows `receives`")?.tunnel = true,
            _ => self.message()?.line(word, rest)?,
        }
        Ok(())
    }

    /// The message that a check belongs to: the last one named.
    fn message(&mut self) -> Result<&mut Expected, String> {
        if let Some(received) = self.receives.last_mut() {
            return Ok(&mut received.message);
        }
        let forwarded = self.forwards.last_mut();
        forwarded.map(|f| &mut f.message).ok_or_else(|| "not a line of this format".to_owned())
    }
}

impl Expected {
    fn line(&mut self, word: &str, rest: &str) -> Result<(), String> {
        let pair = || rest.split_once(':').ok_or("NAME: VALUE");
        match word {
            "+" => {
                let (name, value) = pair()?;
                let (name, value) = (name.to_ascii_lowercase(), unescape(value.trim_start())?);
                let known = self.fields.iter_mut().find_map(|check| match check {
                    FieldCheck::Exactly(n, values) if *n == name => Some(values),
                    _ => None,
                });
                match known {
                    Some(values) => values.push(value),
                    None => self.fields.push(FieldCheck::Exactly(name, vec![value])),
                }
            }
            "~" => {
                let (name, part) = pair()?;
                let part = unescape(part.trim_start())?;
                self.fields.push(FieldCheck::Contains(name.to_ascii_lowercase(), part));
            }
            "-" => self.fields.push(FieldCheck::Absent(rest.trim().to_ascii_lowercase())),
            "body" => self.body = Some(unescape(rest)?),
            "trailer" => {
                let (name, value) = pair()?;
                let value = unescape(value.trim_start())?;
                self.trailers.push((name.to_ascii_lowercase(), value));
            }
            _ => return Err("not a line of this format".to_owned()),
        }
        Ok(())
    }
}

fn push_line(bytes: &mut Vec<u8>, line: Vec<u8>) {
    bytes.extend(line);
    bytes.extend(b"\r\n");
}

fn number(text: &str) -> Result<u16, String> {
    text.trim().parse().map_err(|_| "a number is wanted".to_owned())
}

fn numbers(text: &str) -> Result<Vec<u16>, String> {
    let found: Vec<u16> = text.split_whitespace().map(number).collect::<Result<_, _>>()?;
    if found.is_empty() { Err("at least one status".to_owned()) } else { Ok(found) }
}

/// `\r \n \t \0 \\ \xHH`, and `\{3*ab}` for `ababab`; everything else stands for itself.
fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.extend(&rest.as_bytes()[..at]);
        rest = &rest[at + 1..];
        let mark = rest.chars().next().ok_or("a lone backslash ends the line")?;
        let used = match mark {
            'x' => {
                let digits = rest.get(1..3).ok_or("\\x wants two digits")?;
                out.push(u8::from_str_radix(digits, 16).map_err(|_| "\\x wants two digits")?);
                3
            }
            '{' => {
                let (count, tail) = rest[1..].split_once('*').ok_or("\\{N*TEXT}")?;
                let (unit, _) = tail.split_once('}').ok_or("\\{N*TEXT}")?;
                out.extend(unescape(unit)?.repeat(number(count)?.into()));
                count.len() + unit.len() + 3
            }
            _ => {
                let known = b"r\rn\nt\t0\0\\\\";
                let pair = known.chunks(2).find(|p| char::from(p[0]) == mark);
                out.push(pair.ok_or("an unknown escape")?[1]);
                1
            }
        };
        rest = &rest[used..];
    }
    out.extend(rest.as_bytes());
    Ok(out)
}

fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with(from) {
            out.extend(to);
            at += from.len();
        } else {
            out.push(text[at]);
            at += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_stand_for_their_bytes() {
        assert_eq!(unescape(r"a\r\n\t\0\\\x7fz").unwrap(), b"a\r\n\t\0\\\x7fz");
        assert_eq!(unescape(r"\{3*ab}c").unwrap(), b"abababc");
        assert!(unescape(r"\q").is_err());
        assert!(unescape("a\\").is_err());
    }

    #[test]
    fn a_case_says_what_is_sent_and_what_is_right() {
        let text = "== two\nbreaks RFC 9112 6.3: x\n> GET / HTTP/1.1\n> Host: $HOST\n>\n>> tail\nrefused 400 501\nclosed\nor\nforwards GET /\n+ host: $HOST\n- x-a\nbody hi\n";
        let cases = parse("f", text).unwrap();
        let case = cases[0].for_host("h.test");
        assert_eq!(case.sent(), b"GET / HTTP/1.1\r\nHost: h.test\r\n\r\ntail");
        assert_eq!(case.verdicts[0].refused, [400, 501]);
        assert!(case.verdicts[0].closed);
        let forwarded = &case.verdicts[1].forwards[0];
        assert_eq!(forwarded.message.body.as_deref(), Some(&b"hi"[..]));
        assert!(matches!(&forwarded.message.fields[0],
            FieldCheck::Exactly(name, values) if name == "host" && values[0] == b"h.test"));
    }

    #[test]
    fn a_line_that_means_nothing_is_an_error_with_its_place() {
        let wrong = "== a\nbreaks RFC 9112 2: x\nrefuse 400\n";
        assert!(parse("f.txt", wrong).unwrap_err().starts_with("f.txt:3: "));
        assert!(parse("f.txt", "== a\nrefused 400\n").is_err());
        assert!(parse("f.txt", "== a\nlegal RFC 9112 2: x\n").is_err());
    }
}
