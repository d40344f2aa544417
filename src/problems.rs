//! What is wrong with a document, and where: problems, the cursor that finds their place, and their rendering.
//!
//! A check walks a document with an [`Cursor`]. Whatever it reports lands in one [`Problems`] with file, line, column, byte
//! range and path, so that all problems of all files come out together. The only file that uses annotate-snippets.
//! It knows no document format: a parsed document shows itself through [`DocumentNode`].

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};

/// More problems than this are counted, not kept: nobody reads further, and a hostile file must not fill the memory.
const KEPT: usize = 200;

/// Where an effective value comes from. Shows as `built in` or `policy.yaml:12`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// hopguard's own default.
    BuiltIn,
    /// Written in a document.
    Line {
        /// The file's name as the user gave it.
        file: Arc<str>,
        /// Counted from 1.
        line: u32,
    },
    /// Said by a request; who, in words.
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

/// An effective value and where it comes from.
///
/// Equality and hash look at the value only: a value that moved to another line is unchanged, and what depends on it
/// (a limit's counters, a pool) must not be rebuilt for it.
#[derive(Debug, Clone)]
pub struct Sourced<T> {
    /// The value in force.
    pub value: T,
    /// Who said so.
    pub origin: Origin,
}

impl<T> Sourced<T> {
    /// A value that no document changed.
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

/// An old word in a document, and the word to write instead.
pub fn old_word(old: &str, new: &str) -> InvalidValue {
    InvalidValue::new(format!("`{old}` is the old word for `{new}`"), format!("write `{new}`"))
}

/// Why a single value was refused, before its place is known: what is wrong, and what to write instead.
///
/// Shows as the message, then the hint on a line of its own. A document reader relies on that form to tell the two
/// apart again, because a serde error carries nothing but text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidValue {
    /// What is wrong; one line.
    pub message: String,
    /// What to write; one line.
    pub hint: Option<String>,
}

impl InvalidValue {
    /// A fault with a hint.
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

/// A piece of a document's text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Position {
    /// Bytes from the start of the document.
    pub span: Range<usize>,
    /// Counted from 1; 0 where a whole file is meant.
    pub line: u32,
    /// Counted from 1, in characters; 0 where a whole file is meant.
    pub column: u32,
}

/// What a step down in a document leads to.
#[derive(Clone, Copy)]
pub struct ChildNode<'a> {
    /// The key's place, for an entry of a mapping.
    pub key: Option<&'a Position>,
    /// The index in the text, for an element of a list.
    pub index: usize,
    /// What is there.
    pub spot: &'a dyn DocumentNode,
}

/// A node of a parsed document, as far as a cursor must know it.
pub trait DocumentNode {
    /// An entry of a mapping. Also finds one that the reader refused.
    fn entry(&self, key: &str) -> Option<ChildNode<'_>>;
    /// The element that stands at this index among those that the reader accepted.
    fn item(&self, index: usize) -> Option<ChildNode<'_>>;
    /// How many elements or entries the text has here, those that the reader refused included; 0 for a single value.
    fn size(&self) -> usize;
    /// Where the node stands.
    fn place(&self) -> &Position;
    /// Whether the node is a single value, and so can be marked as a whole.
    fn is_scalar(&self) -> bool;
}

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    /// The document cannot be used.
    Error,
    /// The document is used as it is.
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

/// One error or warning, with its place in a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Whether the document can be used nevertheless.
    pub severity: Severity,
    /// The file's name as the user gave it.
    pub file: Arc<str>,
    /// Line, column and bytes; line 0 where the file as a whole is meant.
    pub place: Position,
    /// Where in the document, like `destinations[2].timeouts.request`; empty where the file as a whole is meant.
    pub path: String,
    /// What is wrong and what is allowed; one line.
    pub message: String,
    /// What to write instead; one line.
    pub hint: Option<String>,
}

/// The texts that problems point into, by file name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources(Vec<Source>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    file: Arc<str>,
    text: String,
}

impl Sources {
    /// Keeps a file's text for rendering.
    pub fn add(&mut self, file: Arc<str>, text: String) {
        self.0.push(Source { file, text });
    }

    /// The text of a file; empty for a file that could not be read.
    pub fn text(&self, file: &str) -> &str {
        self.0.iter().find(|source| &*source.file == file).map_or("", |source| &source.text)
    }

    /// The files, in the order in which they were read.
    pub fn files(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.iter().map(|source| &source.file)
    }
}

/// All errors and warnings, over all files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems {
    kept: Vec<Problem>,
    more_errors: usize,
    more_warnings: usize,
    is_cut: bool,
}

impl Problems {
    /// Adds one, or only counts it when there are very many of its severity already.
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

    /// Whether there is neither an error nor a warning.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Whether there is an error: the documents cannot be used.
    pub fn has_errors(&self) -> bool {
        self.kept.iter().any(|problem| problem.severity == Severity::Error)
    }

    /// How many there are, those that were only counted included.
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

    /// How many there are, in words: `2 problems`, `1 problem or more, 1 warning`.
    pub fn count(&self) -> String {
        let counted = |count: usize, word: &str| format!("{count} {word}{}", if count == 1 { "" } else { "s" });
        let more = if self.is_cut { " or more" } else { "" };
        let errors = format!("{}{more}", counted(self.len_of(Severity::Error), "problem"));
        match self.len_of(Severity::Warning) {
            0 => errors,
            warnings => format!("{errors}, {}", counted(warnings, "warning")),
        }
    }

    /// Those that were kept: in reading order after [`Problems::sort`].
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.kept.iter()
    }

    /// Brings them into reading order: file by file, top to bottom. A mistake under an anchor, which each alias has met
    /// again, is left there once.
    pub fn sort(&mut self) {
        self.kept.sort_by(|a, b| {
            let key = |p: &Problem| (p.place.line, p.place.column);
            a.file.cmp(&b.file).then_with(|| key(a).cmp(&key(b)))
        });
        let mut seen = HashSet::new();
        self.kept.retain(|p| seen.insert((Arc::clone(&p.file), p.place.clone(), p.message.clone(), p.hint.clone())));
    }

    /// Each problem with its line of source, the value marked, and the hint; as rustc prints its own.
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

    /// One JSON object a line, as of [`Problem::to_json`].
    pub fn to_json(&self) -> String {
        self.kept.iter().map(|problem| format!("{}\n", problem.to_json())).collect()
    }
}

/// Warnings about documents that are used, and the texts to show them in.
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

/// The short form, for a log line: place and message of the first error, and how many more problems there are.
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

    /// The bytes to mark: the first line of the place, and always within the text, whatever the parser said.
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

/// A document's words go to a terminal: control characters in them must not.
fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().any(char::is_control) { Cow::Owned(text.escape_debug().to_string()) } else { Cow::Borrowed(text) }
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Root,
    Key(&'a str),
    Index(usize),
}

/// A cursor in a document: knows the path that a check has walked, finds places, and takes reports.
///
/// A step to what is not in the document is fine: the cursor then stands at the nearest parent that is.
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
    /// A cursor at the top of a document.
    pub fn root(file: &'a Arc<str>, spot: &'a dyn DocumentNode, problems: &'a RefCell<Problems>) -> Self {
        Self { file, problems, parent: None, step: Step::Root, key: None, spot: Some(spot) }
    }

    /// The value behind a key.
    pub fn key(&'a self, key: &'a str) -> Cursor<'a> {
        self.step(Step::Key(key), self.spot.and_then(|spot| spot.entry(key)))
    }

    /// An element of a list; the index is that of the list as it was read, the path shows that of the text.
    pub fn index(&'a self, index: usize) -> Cursor<'a> {
        let found = self.spot.and_then(|spot| spot.item(index));
        self.step(Step::Index(found.map_or(index, |found| found.index)), found)
    }

    /// A step that the caller has found himself: to `key`, or without one to the element of a list.
    pub fn found(&'a self, key: Option<&'a str>, found: ChildNode<'a>) -> Cursor<'a> {
        self.step(key.map_or(Step::Index(found.index), Step::Key), Some(found))
    }

    fn step(&'a self, step: Step<'a>, found: Option<ChildNode<'a>>) -> Cursor<'a> {
        let (key, spot) = (found.and_then(|found| found.key), found.map(|found| found.spot));
        Cursor { parent: Some(self), step, key, spot, ..*self }
    }

    /// Whether the document says anything here, be it good or already refused.
    pub fn is_given(&self) -> bool {
        self.spot.is_some()
    }

    /// How many elements or entries the document has here, good or refused.
    pub fn size(&self) -> usize {
        self.spot.map_or(0, DocumentNode::size)
    }

    /// The value itself where it is a single one, else its key, else its first line, else the nearest parent.
    pub fn place(&self) -> &'a Position {
        match (self.spot, self.key, self.parent) {
            (Some(spot), _, _) if spot.is_scalar() => spot.place(),
            (_, Some(key), _) => key,
            (Some(spot), None, _) => spot.place(),
            (None, None, Some(parent)) => parent.place(),
            (None, None, None) => const { &Position { span: 0..0, line: 0, column: 0 } },
        }
    }

    /// File and line of this place.
    pub fn origin(&self) -> Origin {
        Origin::Line { file: Arc::clone(self.file), line: self.place().line }
    }

    /// A value that was written here.
    pub fn set<T>(&self, value: T) -> Sourced<T> {
        Sourced { value, origin: self.origin() }
    }

    /// Reports an error in what stands here.
    pub fn report(&self, message: impl Into<String>, hint: impl Into<String>) {
        self.report_fault(InvalidValue::new(message, hint));
    }

    /// Reports an error in the value that stands here.
    pub fn report_fault(&self, fault: InvalidValue) {
        self.push(Severity::Error, self.place(), fault);
    }

    /// Reports an error in the key, not in its value.
    pub fn report_key(&self, fault: InvalidValue) {
        self.push(Severity::Error, self.key_place(), fault);
    }

    /// Warns of the value that stands here: it is taken as it is.
    pub fn warn(&self, warning: InvalidValue) {
        self.push(Severity::Warning, self.place(), warning);
    }

    /// Warns of the key, not of its value.
    pub fn warn_key(&self, warning: InvalidValue) {
        self.push(Severity::Warning, self.key_place(), warning);
    }

    fn key_place(&self) -> &'a Position {
        self.key.unwrap_or_else(|| self.place())
    }

    /// Reports that an entry is not here. Says nothing when the entry is here but was refused already.
    pub fn missing(&'a self, key: &'a str, hint: impl Into<String>) {
        if !self.key(key).is_given() {
            self.report(format!("`{key}` is missing"), hint);
        }
    }

    /// The path walked so far, like `destinations[2].timeouts.request`.
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

    /// Notes that the document is not read any further, although it may have more problems.
    pub fn give_up(&self) {
        self.problems.borrow_mut().is_cut = true;
    }

    /// How many problems were reported so far, by whichever cursor of this check.
    pub fn reported(&self) -> usize {
        self.problems.borrow().len()
    }

    fn push(&self, severity: Severity, place: &Position, InvalidValue { message, hint }: InvalidValue) {
        let (file, path, place) = (Arc::clone(self.file), self.path(), place.clone());
        self.problems.borrow_mut().push(Problem { severity, file, place, path, message, hint });
    }
}

/// The candidate nearest to a word that was mistyped, if any is near enough to be meant.
pub fn near_miss<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    // A third of the letters may differ; of two letters none, or every short name would be near every other.
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
    fn only_near_words_are_taken_for_a_slip() {
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
