//! Problems of documents: errors and warnings with their position, the cursor that finds positions, and the rendering.
//!
//! A check walks a document with a [`Cursor`]. Its reports go to one [`Problems`] with file, line, column, byte range
//! and path, so that the problems of all files are reported together. The only file that uses annotate-snippets.
//! Independent of the document format: a parsed document implements [`DocumentNode`].

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};

/// Upper bound of kept problems per severity; further ones are only counted, so that a hostile file does not fill the
/// memory.
const KEPT: usize = 200;

/// Origin of an effective value. Displays as `built in` or `policy.yaml:12`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Default of hopguard.
    BuiltIn,
    /// Entry of a document.
    Line {
        /// The file's name as the user gave it.
        file: Arc<str>,
        /// Counted from 1.
        line: u32,
    },
    /// Field of a request; the sender, in words.
    Request(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn => f.write_str("built in"),
            Self::Line { file, line } => write!(f, "{file}:{line}"),
            Self::Request(who) => write!(f, "asked by {who}"),
        }
    }
}

/// An effective value and its origin.
///
/// Equality and hash use only the value: a value that moved to another line is unchanged, and state that depends on it
/// (a limit's counters, a pool) is not rebuilt.
#[derive(Debug, Clone)]
pub struct Sourced<T> {
    /// The value in force.
    pub value: T,
    /// Origin of the value.
    pub origin: Origin,
}

impl<T> Sourced<T> {
    /// The default, unchanged by a document.
    pub const fn built_in(value: T) -> Self {
        Self { value, origin: Origin::BuiltIn }
    }
}

impl<T: PartialEq> PartialEq for Sourced<T> {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl<T: Eq> Eq for Sourced<T> {}

impl<T: std::hash::Hash> std::hash::Hash for Sourced<T> {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.value.hash(state);
    }
}

/// Warning about a deprecated word, with the word to write instead.
pub fn old_word(old: &str, new: &str) -> InvalidValue {
    InvalidValue::new(format!("`{old}` is the old word for `{new}`"), format!("write `{new}`"))
}

/// Why a value was refused, before its position is known: what is wrong, and what to write instead.
///
/// Displays as the message, then the hint on a line of its own. A document reader splits the two again, because a serde
/// error carries only text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidValue {
    /// What is wrong; one line.
    pub message: String,
    /// What to write; one line.
    pub hint: Option<String>,
}

impl InvalidValue {
    /// A refusal with a hint.
    pub fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: Some(hint.into()) }
    }
}

impl fmt::Display for InvalidValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "\n{hint}"))
    }
}

impl std::error::Error for InvalidValue {}

/// A range in the text of a document.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Position {
    /// Bytes from the start of the document.
    pub span: Range<usize>,
    /// Counted from 1; 0 for a whole file.
    pub line: u32,
    /// Counted from 1, in characters; 0 for a whole file.
    pub column: u32,
}

/// Child of a document node.
#[derive(Clone, Copy)]
pub struct ChildNode<'a> {
    /// Position of the key, for an entry of a mapping.
    pub key: Option<&'a Position>,
    /// Index in the text, for an element of a list.
    pub index: usize,
    /// The child itself.
    pub spot: &'a dyn DocumentNode,
}

/// Interface of a document node for a cursor.
pub trait DocumentNode {
    /// An entry of a mapping, also a refused one.
    fn entry(&self, key: &str) -> Option<ChildNode<'_>>;
    /// The element with this index among the accepted ones.
    fn item(&self, index: usize) -> Option<ChildNode<'_>>;
    /// Number of elements or entries in the text, including refused ones; 0 for a single value.
    fn size(&self) -> usize;
    /// Position of the node.
    fn place(&self) -> &Position;
    /// Whether the node is a single value, which is marked as a whole.
    fn is_scalar(&self) -> bool;
}

/// Severity of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    /// The document cannot be used.
    Error,
    /// The document can be used.
    Warning,
}

impl Severity {
    /// `error` or `warning`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// One error or warning, with its position in a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Error or warning.
    pub severity: Severity,
    /// The file's name as the user gave it.
    pub file: Arc<str>,
    /// Line, column and bytes; line 0 for a whole file.
    pub place: Position,
    /// Path in the document, like `destinations[2].timeouts.request`; empty for a whole file.
    pub path: String,
    /// What is wrong and what is allowed; one line.
    pub message: String,
    /// What to write instead; one line.
    pub hint: Option<String>,
}

/// Texts of documents by file name, for the rendering of problems.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources(Vec<Source>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    file: Arc<str>,
    text: String,
}

impl Sources {
    /// Adds the text of a file.
    pub fn add(&mut self, file: Arc<str>, text: String) {
        self.0.push(Source { file, text });
    }

    /// Text of a file; empty if it could not be read.
    pub fn text(&self, file: &str) -> &str {
        self.0.iter().find(|source| &*source.file == file).map_or("", |source| &source.text)
    }

    /// The files, in reading order.
    pub fn files(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.iter().map(|source| &source.file)
    }
}

/// Errors and warnings of all files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems {
    kept: Vec<Problem>,
    more_errors: usize,
    more_warnings: usize,
    is_cut: bool,
}

impl Problems {
    /// Adds a problem, or only counts it above the bound of its severity.
    pub fn push(&mut self, problem: Problem) {
        let severity = problem.severity;
        if self.kept.iter().filter(|kept| kept.severity == severity).count() < KEPT {
            self.kept.push(problem);
            return;
        }
        match severity {
            Severity::Error => self.more_errors += 1,
            Severity::Warning => self.more_warnings += 1,
        }
    }

    /// Whether there is no problem at all.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Whether there is an error, so that the documents cannot be used.
    pub fn has_errors(&self) -> bool {
        self.kept.iter().any(|problem| problem.severity == Severity::Error)
    }

    /// Number of problems, including those that were only counted.
    pub fn len(&self) -> usize {
        self.kept.len() + self.more_errors + self.more_warnings
    }

    fn len_of(&self, severity: Severity) -> usize {
        let more = match severity {
            Severity::Error => self.more_errors,
            Severity::Warning => self.more_warnings,
        };
        more + self.kept.iter().filter(|problem| problem.severity == severity).count()
    }

    /// Number of problems in words: `2 problems`, `1 problem or more, 1 warning`.
    pub fn count(&self) -> String {
        let counted = |count: usize, word: &str| format!("{count} {word}{}", if count == 1 { "" } else { "s" });
        let more = if self.is_cut { " or more" } else { "" };
        let errors = format!("{}{more}", counted(self.len_of(Severity::Error), "problem"));
        match self.len_of(Severity::Warning) {
            0 => errors,
            warnings => format!("{errors}, {}", counted(warnings, "warning")),
        }
    }

    /// The kept problems: in reading order after [`Problems::sort`].
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.kept.iter()
    }

    /// Sorts into reading order: file by file, top to bottom. A mistake below an anchor is reported by each alias; one
    /// of these reports is kept.
    pub fn sort(&mut self) {
        self.kept.sort_by(|a, b| {
            let key = |p: &Problem| (p.place.line, p.place.column);
            a.file.cmp(&b.file).then_with(|| key(a).cmp(&key(b)))
        });
        let mut seen = HashSet::new();
        self.kept.retain(|p| seen.insert((Arc::clone(&p.file), p.place.clone(), p.message.clone(), p.hint.clone())));
    }

    /// Each problem with its line of source, the value marked, and the hint, in the form of rustc.
    pub fn render(&self, sources: &Sources, colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let mut out = String::new();
        for problem in &self.kept {
            out.push_str(&problem.render(sources.text(&problem.file), &renderer));
            out.push_str("\n\n");
        }
        let more = self.more_errors + self.more_warnings;
        if more > 0 {
            out.push_str(&format!("and {more} more\n"));
        }
        if self.is_cut {
            out.push_str("and perhaps more: a file was not read to its end\n");
        }
        out
    }

    /// One JSON object per line; see [`Problem::to_json`].
    pub fn to_json(&self) -> String {
        self.kept.iter().map(|problem| format!("{}\n", problem.to_json())).collect()
    }
}

/// Warnings about a policy that is used, and the texts for their rendering.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Warnings {
    /// In reading order.
    pub problems: Problems,
    /// Empty without a warning.
    pub sources: Sources,
}

impl Warnings {
    /// Each warning with its line of source marked.
    pub fn render(&self, colour: bool) -> String {
        self.problems.render(&self.sources, colour)
    }
}

/// The short form, for a log line: position and message of the first error, and the number of other problems.
impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_error = |problem: &&Problem| problem.severity == Severity::Error;
        let Some(first) = self.kept.iter().find(is_error).or(self.kept.first()) else {
            return f.write_str("no problems");
        };
        write!(f, "{first}")?;
        match self.len() - 1 {
            0 => Ok(()),
            more => write!(f, " (and {more} more)"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place.line {
            0 => write!(f, "{}: {}", self.file, self.message),
            line => write!(f, "{}:{line}:{}: {}", self.file, self.place.column, self.message),
        }
    }
}

impl Problem {
    /// `severity`, `file`, `line`, `column`, `path`, `message`, and `hint` (or null).
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "severity": self.severity.as_str(), "file": &*self.file, "line": self.place.line,
            "column": self.place.column, "path": self.path, "message": self.message, "hint": self.hint,
        })
    }

    fn render(&self, text: &str, renderer: &Renderer) -> String {
        let (message, file) = (printable(&self.message), printable(&self.file));
        let hint = self.hint.as_deref().map(printable);
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let title = match self.place.line {
            0 => level.primary_title(format!("{file}: {message}")),
            _ => level.primary_title(message),
        };
        let help = hint.map(|hint| Level::HELP.message(hint));
        if self.place.line == 0 {
            return renderer.render(&[match help {
                Some(help) => title.element(help),
                None => annotate_snippets::Group::with_title(title),
            }]);
        }
        let snippet = Snippet::source(text).path(file).annotation(AnnotationKind::Primary.span(self.marked(text)));
        let group = title.element(snippet);
        renderer.render(&[match help {
            Some(help) => group.element(help),
            None => group,
        }])
    }

    /// The bytes to mark: the first line of the position, clamped to the text.
    fn marked(&self, text: &str) -> Range<usize> {
        let mut start = self.place.span.start.min(text.len());
        while !text.is_char_boundary(start) {
            start -= 1;
        }
        let line = text[start..].split('\n').next().unwrap_or_default().trim_end();
        let end = self.place.span.end.clamp(start, start + line.len());
        let end = (end..=start + line.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(start);
        start..end
    }
}

/// Escapes control characters, which must not reach a terminal from a document.
fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().any(char::is_control) { Cow::Owned(text.escape_debug().to_string()) } else { Cow::Borrowed(text) }
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Root,
    Key(&'a str),
    Index(usize),
}

/// A cursor in a document: knows the path from the root, finds positions, and takes reports.
///
/// A step to a missing entry is allowed: the position is then that of the nearest parent in the document.
#[derive(Clone, Copy)]
pub struct Cursor<'a> {
    file: &'a Arc<str>,
    problems: &'a RefCell<Problems>,
    parent: Option<&'a Cursor<'a>>,
    step: Step<'a>,
    key: Option<&'a Position>,
    spot: Option<&'a dyn DocumentNode>,
}

impl<'a> Cursor<'a> {
    /// A cursor at the root of a document.
    pub fn root(file: &'a Arc<str>, spot: &'a dyn DocumentNode, problems: &'a RefCell<Problems>) -> Self {
        Self { file, problems, parent: None, step: Step::Root, key: None, spot: Some(spot) }
    }

    /// The value of a key.
    pub fn key(&'a self, key: &'a str) -> Cursor<'a> {
        self.step(Step::Key(key), self.spot.and_then(|spot| spot.entry(key)))
    }

    /// An element of a list; the index counts the accepted elements, the path shows the index in the text.
    pub fn index(&'a self, index: usize) -> Cursor<'a> {
        let found = self.spot.and_then(|spot| spot.item(index));
        self.step(Step::Index(found.map_or(index, |found| found.index)), found)
    }

    /// A step to a child that the caller has found: an entry with `key`, or an element of a list.
    pub fn found(&'a self, key: Option<&'a str>, found: ChildNode<'a>) -> Cursor<'a> {
        self.step(key.map_or(Step::Index(found.index), Step::Key), Some(found))
    }

    fn step(&'a self, step: Step<'a>, found: Option<ChildNode<'a>>) -> Cursor<'a> {
        let (key, spot) = (found.and_then(|found| found.key), found.map(|found| found.spot));
        Cursor { parent: Some(self), step, key, spot, ..*self }
    }

    /// Whether the document has an entry here, accepted or refused.
    pub fn is_given(&self) -> bool {
        self.spot.is_some()
    }

    /// Number of elements or entries in the document, accepted or refused.
    pub fn size(&self) -> usize {
        self.spot.map_or(0, DocumentNode::size)
    }

    /// Position of the value if it is a single one, else of its key, else of its first line, else of the nearest
    /// parent.
    pub fn place(&self) -> &'a Position {
        match (self.spot, self.key, self.parent) {
            (Some(spot), _, _) if spot.is_scalar() => spot.place(),
            (_, Some(key), _) => key,
            (Some(spot), None, _) => spot.place(),
            (None, None, Some(parent)) => parent.place(),
            (None, None, None) => const { &Position { span: 0..0, line: 0, column: 0 } },
        }
    }

    /// File and line of the cursor.
    pub fn origin(&self) -> Origin {
        Origin::Line { file: Arc::clone(self.file), line: self.place().line }
    }

    /// A value with the cursor's line as its origin.
    pub fn set<T>(&self, value: T) -> Sourced<T> {
        Sourced { value, origin: self.origin() }
    }

    /// Reports an error in the value here.
    pub fn report(&self, message: impl Into<String>, hint: impl Into<String>) {
        self.report_fault(InvalidValue::new(message, hint));
    }

    /// Reports an error in the value here.
    pub fn report_fault(&self, fault: InvalidValue) {
        self.push(Severity::Error, self.place(), fault);
    }

    /// Reports an error in the key instead of its value.
    pub fn report_key(&self, fault: InvalidValue) {
        self.push(Severity::Error, self.key_place(), fault);
    }

    /// Warns about the value here, which is used as it is.
    pub fn warn(&self, warning: InvalidValue) {
        self.push(Severity::Warning, self.place(), warning);
    }

    /// Warns about the key instead of its value.
    pub fn warn_key(&self, warning: InvalidValue) {
        self.push(Severity::Warning, self.key_place(), warning);
    }

    fn key_place(&self) -> &'a Position {
        self.key.unwrap_or_else(|| self.place())
    }

    /// Reports a missing entry. A refused entry is not missing.
    pub fn missing(&'a self, key: &'a str, hint: impl Into<String>) {
        if !self.key(key).is_given() {
            self.report(format!("`{key}` is missing"), hint);
        }
    }

    /// Path from the root, like `destinations[2].timeouts.request`.
    pub fn path(&self) -> String {
        let mut path = self.parent.map_or_else(String::new, Cursor::path);
        match self.step {
            Step::Root => {}
            Step::Key(key) if path.is_empty() => path.push_str(key),
            Step::Key(key) => path.push_str(&format!(".{key}")),
            Step::Index(index) => path.push_str(&format!("[{index}]")),
        }
        path
    }

    /// Records that the rest of the document is not read, although it may have more problems.
    pub fn give_up(&self) {
        self.problems.borrow_mut().is_cut = true;
    }

    /// Number of problems reported so far, by all cursors of this check.
    pub fn reported(&self) -> usize {
        self.problems.borrow().len()
    }

    fn push(&self, severity: Severity, place: &Position, InvalidValue { message, hint }: InvalidValue) {
        let (file, path, place) = (Arc::clone(self.file), self.path(), place.clone());
        self.problems.borrow_mut().push(Problem { severity, file, place, path, message, hint });
    }
}

/// The most similar candidate for a mistyped word, if it is similar enough.
pub fn near_miss<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    // A third of the letters may differ; of two letters none, or every short name would be similar to every other.
    let allowed = |length: usize| (length / 3).max(usize::from(length > 2));
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&word, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= allowed(candidate.chars().count().max(word.chars().count())))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(message: &str, span: Range<usize>, line: u32) -> Problem {
        let place = Position { span, line, column: 1 };
        let severity = Severity::Error;
        Problem { severity, file: "p.yaml".into(), place, path: String::new(), message: message.into(), hint: None }
    }

    fn warning(message: &str, line: u32) -> Problem {
        Problem { severity: Severity::Warning, ..problem(message, 0..1, line) }
    }

    #[test]
    fn only_similar_words_are_suggested() {
        let words = ["request", "perTry", "connect", "to"];
        let table = [
            ("requests", Some("request")),
            ("reqeust", Some("request")),
            ("per_try", Some("perTry")),
            ("CONNECT", Some("connect")),
            ("ot", None),
            ("retries", None),
            ("", None),
        ];
        for (word, wanted) in table {
            assert_eq!(near_miss(word, words), wanted, "{word}");
        }
    }

    #[test]
    fn a_place_outside_the_text_or_inside_a_character_is_no_panic() {
        let mut sources = Sources::default();
        sources.add("p.yaml".into(), "a: ä\nb: 1\n".into());
        for span in [0..1, 4..5, 3..400, 900..901, 0..0] {
            let mut problems = Problems::default();
            problems.push(problem("wrong", span, 1));
            assert!(problems.render(&sources, true).contains("wrong"));
        }
    }

    #[test]
    fn a_terminal_sees_no_control_characters_of_a_document() {
        let mut problems = Problems::default();
        problems.push(problem("unknown field `\u{1b}[2J`", 0..1, 1));
        let shown = problems.render(&Sources::default(), false);
        assert!(!shown.contains('\u{1b}'), "{shown}");
    }

    #[test]
    fn very_many_problems_are_counted() {
        let mut problems = Problems::default();
        for _ in 0..KEPT + 7 {
            problems.push(problem("wrong", 0..1, 1));
        }
        assert_eq!((problems.len(), problems.iter().count()), (KEPT + 7, KEPT));
        assert!(problems.render(&Sources::default(), false).ends_with("and 7 more\n"));
    }

    #[test]
    fn very_many_warnings_do_not_push_an_error_out() {
        let mut problems = Problems::default();
        for _ in 0..KEPT + 7 {
            problems.push(warning("old", 1));
        }
        assert!(!problems.has_errors());
        problems.push(problem("wrong", 0..1, 2));
        assert!(problems.has_errors());
        assert_eq!((problems.len(), problems.iter().count()), (KEPT + 8, KEPT + 1));
        assert_eq!(problems.count(), "1 problem, 207 warnings");
        assert_eq!(problems.to_string(), "p.yaml:2:1: wrong (and 207 more)");
    }

    #[test]
    fn a_problem_shows_its_severity() {
        let mut problems = Problems::default();
        problems.push(warning("old", 1));
        assert!(problems.render(&Sources::default(), false).starts_with("warning: old"));
        assert_eq!(problems.iter().next().unwrap().to_json()["severity"], "warning");
        assert_eq!(problem("wrong", 0..1, 1).to_json()["severity"], "error");
        assert_eq!(problems.to_string(), "p.yaml:1:1: old");
    }

    #[test]
    fn a_value_that_only_moved_is_unchanged() {
        let at = |line| Sourced { value: 1, origin: Origin::Line { file: "p.yaml".into(), line } };
        assert_eq!(at(1), at(2));
        assert_eq!(at(1), Sourced::built_in(1));
        assert_eq!(at(12).origin.to_string(), "p.yaml:12");
    }
}
