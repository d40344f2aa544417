//! Holds the shape of `src/`: which module may know which, how long a file may be, and how it begins.
//!
//! Modules stand on levels and import from lower ones only. The test reads the source as text and follows `crate::` paths, so
//! `super` may not lead out of a top-level module, and `#[cfg(test)]` comes once, last in a file: what stands behind it is free.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Lowest first; modules of one level do not know each other.
const LEVELS: &[&[&str]] = &[
    &["net", "problems", "runtime"],
    &["telemetry"],
    &["rules"],
    &["outbox", "upstream"],
    &["policy"],
    &["proxy"],
    &["admin", "kubernetes", "listener"],
    &["config"],
    &["app"],
    &["cli"],
];

/// The two roots of the crate; they name every module and stand on no level.
const ROOTS: &[&str] = &["lib", "main"];

/// Longest file in lines, without its tests.
const CEILING: usize = 600;

/// Names that say nothing about what is inside.
const EMPTY_NAMES: &[&str] = &["common", "helpers", "impl", "manager", "misc", "types", "util", "utils"];

#[test]
fn every_file_keeps_the_shape_of_the_tree() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect_rust_files(&root, &mut files);
    files.sort();
    let mut faults = Vec::new();
    for file in &files {
        let inside = file.strip_prefix(&root).unwrap();
        let text = fs::read_to_string(file).unwrap();
        faults.extend(faults_of(inside, &text).into_iter().map(|fault| format!("src/{}: {fault}", inside.display())));
    }
    assert!(files.len() >= 10, "only {} files seen: is this the right folder?", files.len());
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn imports_are_found_in_every_way_of_writing_them() {
    let code = "use crate::{\n    net::Socket,\n    rules::{self, limits::{A, B}},\n    policy,\n};\nfn f() -> crate::proxy::Body { $crate::app::x() }\n// crate::cli\n";
    assert_eq!(imports(&without_comments(code)), ["net", "rules", "policy", "proxy", "app"]);
}

#[test]
fn an_import_upwards_or_sideways_is_a_fault() {
    let file = Path::new("rules/limits.rs");
    assert!(faults_of(file, "//! Limits.\nuse crate::{net::Socket, rules::Duration};\n").is_empty());
    assert_eq!(faults_of(file, "//! Limits.\nuse crate::proxy::Body;\n").len(), 1);
    assert_eq!(faults_of(Path::new("net/mod.rs"), "//! Net.\nuse crate::runtime::Drain;\n").len(), 1);
    assert_eq!(faults_of(Path::new("net/mod.rs"), "//! Net.\nuse super::rules;\n").len(), 1);
    assert_eq!(faults_of(Path::new("net/util.rs"), "use std::io;\n").len(), 2);
    assert_eq!(faults_of(Path::new("stray.rs"), "//! On no level.\n").len(), 1);
}

fn collect_rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect_rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Everything that is wrong with one file; `path` is relative to `src/`.
fn faults_of(path: &Path, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if !text.starts_with("//!") {
        faults.push("does not begin with `//!`: say what the file is and where it stands".to_owned());
    }
    let stem = path.file_stem().unwrap().to_str().unwrap();
    if EMPTY_NAMES.contains(&stem) {
        faults.push(format!("`{stem}` says nothing: name the file after its main type"));
    }
    let is_test_file = stem == "tests" || path.iter().any(|part| part == "tests");
    if is_test_file {
        return faults;
    }
    let (code, tests) = split_at_tests(text);
    if !tests.is_empty() && !tests_come_once_and_last(tests) {
        faults.push("`#[cfg(test)] mod tests` comes once, last in the file".to_owned());
    }
    let lines = code.lines().count();
    if lines > CEILING {
        faults.push(format!("{lines} lines without tests, more than {CEILING}: split it"));
    }
    faults.extend(import_faults(path, stem, &without_comments(code)));
    faults
}

fn import_faults(path: &Path, stem: &str, code: &str) -> Vec<String> {
    let module = Path::new(path.iter().next().unwrap()).file_stem().unwrap().to_str().unwrap();
    if ROOTS.contains(&module) {
        return Vec::new();
    }
    let Some(own) = level_of(module) else {
        return vec![format!("`{module}` stands on no level: give it one in LEVELS")];
    };
    let mut faults = Vec::new();
    let is_top = path.iter().count() == 1 || (path.iter().count() == 2 && stem == "mod");
    if code.contains("super::super") || (is_top && code.contains("super::")) {
        faults.push("`super` leads out of the module: write the path from `crate::`".to_owned());
    }
    for import in imports(code) {
        let level = level_of(import);
        if import != module && level.is_some_and(|level| level >= own) {
            faults.push(format!("`{module}` (level {own}) imports `{import}` (level {})", level.unwrap()));
        }
    }
    faults
}

fn level_of(module: &str) -> Option<usize> {
    LEVELS.iter().position(|level| level.contains(&module))
}

fn split_at_tests(text: &str) -> (&str, &str) {
    let start = text.find("#[cfg(test)]").unwrap_or(text.len());
    text.split_at(start)
}

fn tests_come_once_and_last(tests: &str) -> bool {
    let Some(module) = tests.find("mod tests") else {
        return false;
    };
    let closes_the_file = tests[module..].starts_with("mod tests;") || tests.trim_end().ends_with("\n}");
    tests.matches("#[cfg(test)]").count() == 1 && closes_the_file
}

fn without_comments(code: &str) -> String {
    code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The top-level modules behind every `crate::`, also inside `crate::{...}`.
fn imports(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (at, start) in code.match_indices("crate::") {
        let rest = &code[at + start.len()..];
        match rest.strip_prefix('{') {
            Some(group) => found.extend(first_names_of_group(group)),
            None => found.extend(name_at_start(rest)),
        }
    }
    found
}

/// In `a::b, c::{d, e}, f}` these are `a`, `c`, `f`.
fn first_names_of_group(group: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let (mut depth, mut expects_name) = (0_usize, true);
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => expects_name = true,
            _ if expects_name && !character.is_whitespace() => {
                names.extend(name_at_start(&group[at..]));
                expects_name = false;
            }
            _ => {}
        }
    }
    names
}

fn name_at_start(text: &str) -> Option<&str> {
    let end = text.find(|character: char| !character.is_alphanumeric() && character != '_').unwrap_or(text.len());
    (end > 0).then(|| &text[..end])
}
