//! Loads a policy from a file or a directory into a checked model.
//!
//! The problems of all files are reported together, including files that cannot be read. The files of a directory are
//! those that end in `.yaml` or `.yml`, in the order of their names; folders and names that begin with a dot are
//! skipped, so that a mounted ConfigMap (whose files are links through `..data`) is read once.

use std::cell::RefCell;
use std::fmt;
use std::fs::{self, File};
use std::hash::Hasher;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ast::{self, Node};
use super::check::{Document, check};
use super::model::{Fnv, Model};
use super::spec::PolicySpec;
use crate::problems::{Cursor, Position, Problem, Problems, Severity, Sources, Warnings};

/// Larger files are refused; etcd, and so a ConfigMap, has the same limit.
const LARGEST: u64 = 1 << 20;

/// Problems that prevent a model.
#[derive(Debug, Clone)]
pub struct LoadError {
    /// At least one error, and the warnings, in reading order.
    pub problems: Problems,
    /// Texts of the files, for rendering.
    pub sources: Sources,
}

/// The short form, for a log line.
impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.problems.fmt(f)
    }
}

impl std::error::Error for LoadError {}

impl LoadError {
    /// Every problem with its line of source marked.
    pub fn render(&self, colour: bool) -> String {
        self.problems.render(&self.sources, colour)
    }
}

/// Loads a file or a directory.
///
/// # Errors
/// All problems of the policy.
pub fn load(path: &Path) -> Result<Model, LoadError> {
    let mut problems = Problems::default();
    let mut texts = Vec::new();
    match files(path) {
        Ok(files) if files.is_empty() => {
            let hint = Some("a policy is a file that ends in .yaml or .yml".to_owned());
            problems.push(of_file(path, "the directory has no policy in it".into(), hint));
        }
        Ok(files) => {
            for file in files {
                match read(&file) {
                    Ok(text) => texts.push((file, text)),
                    Err(message) => problems.push(of_file(&file, message, None)),
                }
            }
        }
        Err(error) => problems.push(of_file(path, format!("cannot be read: {error}"), None)),
    }
    build(texts, problems)
}

/// Loads a path of the command line: a file, a directory, or `-` for the standard input, in which relative paths are
/// relative to the current directory.
///
/// # Errors
/// All problems of the policy.
pub fn load_given(path: &Path) -> Result<Model, LoadError> {
    let name = name_given(path);
    if name == path {
        return load(path);
    }
    let mut problems = Problems::default();
    let mut texts = Vec::new();
    match text_of(io::stdin().lock()) {
        Ok(text) => texts.push((name.to_owned(), text)),
        Err(message) => problems.push(of_file(name, message, None)),
    }
    build(texts, problems)
}

/// File name of such a path in problems.
pub fn name_given(path: &Path) -> &Path {
    if path == Path::new("-") { Path::new("stdin") } else { path }
}

/// Loads one policy from a text; relative paths in it are relative to the current directory.
///
/// # Errors
/// All problems of the policy.
pub fn load_str(name: &str, yaml: &str) -> Result<Model, LoadError> {
    build(vec![(PathBuf::from(name), yaml.to_owned())], Problems::default())
}

/// Hash of the names and contents of the files. It changes with each of them, also if a file cannot be read; a cheap
/// check for changes.
pub fn fingerprint(path: &Path) -> u64 {
    let mut state = Fnv(0xcbf2_9ce4_8422_2325);
    for file in files(path).unwrap_or_default() {
        state.write(file.as_os_str().as_encoded_bytes());
        state.write_u8(0);
        match read(&file) {
            Ok(text) => state.write(text.as_bytes()),
            Err(message) => state.write(message.as_bytes()),
        }
        state.write_u8(0);
    }
    state.finish()
}

fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let file = entry?.path();
        let is_hidden = file.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let is_yaml = file.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if is_yaml && !is_hidden && !file.is_dir() {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<String, String> {
    let cannot = |error: io::Error| format!("cannot be read: {error}");
    // A pipe or a device would block, even at opening, or never end.
    if !fs::metadata(path).map_err(cannot)?.is_file() {
        return Err("is not a regular file".into());
    }
    let file = File::open(path).map_err(cannot)?;
    if !file.metadata().map_err(cannot)?.is_file() {
        return Err("is not a regular file".into());
    }
    text_of(file)
}

fn text_of(source: impl Read) -> Result<String, String> {
    let mut bytes = Vec::new();
    source.take(LARGEST + 1).read_to_end(&mut bytes).map_err(|error| format!("cannot be read: {error}"))?;
    if bytes.len() as u64 > LARGEST {
        return Err(format!("is larger than {} MiB", LARGEST >> 20));
    }
    String::from_utf8(bytes).map_err(|error| {
        let readable = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + readable.iter().filter(|byte| **byte == b'\n').count();
        format!("is not UTF-8: see line {line}")
    })
}

fn of_file(path: &Path, message: String, hint: Option<String>) -> Problem {
    of_place(path, Position::default(), message, hint)
}

fn of_place(path: &Path, place: Position, message: String, hint: Option<String>) -> Problem {
    Problem { severity: Severity::Error, file: name(path), place, path: String::new(), message, hint }
}

fn name(path: &Path) -> Arc<str> {
    path.display().to_string().into()
}

struct Parsed {
    name: Arc<str>,
    folder: PathBuf,
    tree: Node,
}

fn build(texts: Vec<(PathBuf, String)>, mut problems: Problems) -> Result<Model, LoadError> {
    let mut sources = Sources::default();
    let mut parsed = Vec::new();
    for (path, text) in texts {
        match parse(&path, &text) {
            Ok(file) => parsed.push(file),
            Err(problem) => problems.push(problem),
        }
        sources.add(name(&path), text);
    }
    let is_complete = problems.is_empty();
    let problems = RefCell::new(problems);
    let mut model = read_and_check(&parsed, &sources, is_complete, &problems);
    let mut problems = problems.into_inner();
    problems.sort();
    if problems.has_errors() {
        return Err(LoadError { problems, sources });
    }
    if !problems.is_empty() {
        model.warnings = Warnings { problems, sources };
    }
    Ok(model)
}

fn parse(path: &Path, text: &str) -> Result<Parsed, Problem> {
    let hint = "a policy begins with `apiVersion: hopguard.dev/v1alpha1` and `kind: Policy`";
    match ast::parse(text) {
        Ok(tree) if tree.is_empty() => Err(of_file(path, "the file is empty".into(), Some(hint.into()))),
        Ok(tree) => {
            let folder = path.parent().unwrap_or(Path::new(""));
            let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
            Ok(Parsed { name: name(path), folder, tree })
        }
        Err((fault, place)) => Err(of_place(path, place, fault.message, fault.hint)),
    }
}

fn read_and_check(parsed: &[Parsed], sources: &Sources, is_complete: bool, problems: &RefCell<Problems>) -> Model {
    let mut documents = Vec::new();
    for Parsed { name, folder, tree } in parsed {
        let at = Cursor::root(name, tree, problems);
        if let Some(spec) = tree.read::<PolicySpec>(&at) {
            documents.push(Document { folder, spec, at });
        }
    }
    let is_complete = is_complete && documents.len() == parsed.len();
    check(&documents, sources.files().cloned().collect(), is_complete)
}
