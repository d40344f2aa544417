//! The structure of `src/`: which module may import which, file length, file header, one meaning per type name.
//!
//! Modules have levels and import from lower levels only. The test reads the source as text and follows `crate::` paths, so
//! `super` must not lead out of a top-level module, and `#[cfg(test)]` occurs once, last in a file: the code after it is not checked.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Lowest level first; modules of one level do not import each other. `ARCHITECTURE.md` and `src/lib.rs` have the same table.
const LEVELS: &[&[&str]] = &[
    &["net", "problems", "runtime"],
    &["telemetry"],
    &["rules"],
    &["upstream"],
    &["policy"],
    &["proxy"],
    &["admin", "listener"],
    &["config"],
    &["app"],
    &["cli"],
];

/// The two roots of the crate; they name every module and have no level.
const ROOTS: &[&str] = &["lib", "main"];

/// Maximum length of a file in lines, without its tests.
const MAX_LINES: usize = 600;

/// File names that do not describe the content.
const EMPTY_NAMES: &[&str] = &["common", "helpers", "impl", "manager", "misc", "types", "util", "utils"];

/// Fewest types that a complete walk over `src/` finds.
const FEWEST_TYPES: usize = 200;

#[test]
fn every_file_follows_the_structure() {
    let files = source_files();
    let mut faults = Vec::new();
    for (path, text) in &files {
        faults.extend(faults_of(path, text).into_iter().map(|fault| format!("src/{}: {fault}", path.display())));
    }
    assert!(files.len() >= 10, "only {} files seen: is this the right folder?", files.len());
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn every_level_names_modules_that_exist() {
    let files = source_files();
    let modules: BTreeSet<&str> = files.iter().map(|(path, _)| top_level_module(path)).collect();
    let known: BTreeSet<&str> = LEVELS.iter().copied().flatten().chain(ROOTS).copied().collect();
    assert_eq!(known, modules);
}

#[test]
fn the_tables_of_levels_in_the_documentation_agree_with_the_test() {
    let levels: Vec<(usize, BTreeSet<String>)> = LEVELS
        .iter()
        .enumerate()
        .map(|(level, modules)| (level, modules.iter().map(|&module| module.to_owned()).collect()))
        .collect();
    for page in ["ARCHITECTURE.md", "src/lib.rs"] {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap();
        let mut table = level_table(&text);
        table.reverse();
        assert_eq!(table, levels, "{page}");
    }
    for (path, text) in source_files() {
        if let Some((_, rest)) = text.lines().next().unwrap_or("").split_once("//! Level ") {
            let level = rest.split(':').next().unwrap().parse().ok();
            assert_eq!(level, level_of(top_level_module(&path)), "src/{}: the level in the first line", path.display());
        }
    }
}

#[test]
fn a_table_of_levels_is_read_in_both_forms() {
    let rows =
        [(5, BTreeSet::from(["proxy".to_owned()])), (0, BTreeSet::from(["net".to_owned(), "runtime".to_owned()]))];
    assert_eq!(
        level_table("| level | modules |\n|---|---|\n| 5 | `proxy` | a |\n| 0 | `net`, `runtime` | `b` |\n"),
        rows
    );
    assert_eq!(level_table("//! | 5 | [`proxy`] | a |\n//! | 0 | [`net`], [`runtime`] | `b` |\n"), rows);
}

#[test]
fn every_type_name_has_one_meaning() {
    let files = source_files();
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (path, text) in files.iter().filter(|(path, _)| !is_test_file(path)) {
        for name in public_type_names(split_at_tests(text).0) {
            places.entry(name.to_owned()).or_default().push(format!("src/{}", path.display()));
        }
    }
    assert!(places.len() >= FEWEST_TYPES, "only {} types seen", places.len());
    let clashes: Vec<String> = places
        .iter()
        .filter(|(_, files)| files.len() > 1)
        .map(|(name, files)| format!("`{name}` names a type in each of {}: rename one", files.join(", ")))
        .collect();
    assert!(clashes.is_empty(), "\n{}\n", clashes.join("\n"));
}

#[test]
fn type_names_are_found_whatever_their_visibility() {
    let code = "pub struct A<T>(T);\npub(super) enum B {\n    pub(crate) trait C: A {}\npub type D = u8;\nstruct E;\npub fn f() {}\n// pub struct G;\npub(in crate::x) struct H;\n";
    assert_eq!(public_type_names(code), ["A", "B", "C", "D", "H"]);
}

#[test]
fn imports_are_found_in_every_way_of_writing_them() {
    let code = "use crate::{\n    net::Socket,\n    rules::{self, limits::{A, B}},\n    policy,\n};\nfn f() -> crate::proxy::Body { $crate::app::x() }\n// crate::cli\n";
    assert_eq!(imports(&without_comments(code)), ["net", "rules", "policy", "proxy", "app"]);
}

#[test]
fn an_import_from_the_same_or_a_higher_level_is_a_fault() {
    let file = Path::new("rules/limits.rs");
    assert!(faults_of(file, "//! Limits.\nuse crate::{net::Socket, rules::Duration};\n").is_empty());
    assert_eq!(faults_of(file, "//! Limits.\nuse crate::proxy::Body;\n").len(), 1);
    assert_eq!(faults_of(Path::new("net/mod.rs"), "//! Net.\nuse crate::runtime::Drain;\n").len(), 1);
    assert_eq!(faults_of(Path::new("net/mod.rs"), "//! Net.\nuse super::rules;\n").len(), 1);
    assert_eq!(faults_of(Path::new("net/util.rs"), "use std::io;\n").len(), 2);
    assert_eq!(faults_of(Path::new("stray.rs"), "//! No level.\n").len(), 1);
}

/// Every file below `src/`, with its path relative to `src/`, in the order of the paths.
fn source_files() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect_rust_files(&root, &mut files);
    files.sort();
    let read = |file: PathBuf| {
        let text = fs::read_to_string(&file).unwrap();
        (file.strip_prefix(&root).unwrap().to_owned(), text)
    };
    files.into_iter().map(read).collect()
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
        faults.push("does not begin with `//!`: write what the file contains and where it belongs".to_owned());
    }
    let stem = path.file_stem().unwrap().to_str().unwrap();
    if EMPTY_NAMES.contains(&stem) {
        faults.push(format!("`{stem}` does not describe the content: name the file after its main type"));
    }
    if is_test_file(path) {
        return faults;
    }
    let (code, tests) = split_at_tests(text);
    if !tests.is_empty() && !tests_come_once_and_last(tests) {
        faults.push("`#[cfg(test)] mod tests` must occur once, last in the file".to_owned());
    }
    let lines = code.lines().count();
    if lines > MAX_LINES {
        faults.push(format!("{lines} lines without tests, more than {MAX_LINES}: split it"));
    }
    faults.extend(import_faults(path, stem, &without_comments(code)));
    faults
}

fn is_test_file(path: &Path) -> bool {
    path.file_stem().is_some_and(|stem| stem == "tests") || path.iter().any(|part| part == "tests")
}

/// The module directly below the crate root that a file belongs to; `path` is relative to `src/`.
fn top_level_module(path: &Path) -> &str {
    Path::new(path.iter().next().unwrap()).file_stem().unwrap().to_str().unwrap()
}

fn import_faults(path: &Path, stem: &str, code: &str) -> Vec<String> {
    let module = top_level_module(path);
    if ROOTS.contains(&module) {
        return Vec::new();
    }
    let Some(own) = level_of(module) else {
        return vec![format!("`{module}` has no level: add it to LEVELS")];
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

/// The rows `| LEVEL | modules | ... |` of a Markdown table, also inside `//!` comments, in the order of the text.
fn level_table(text: &str) -> Vec<(usize, BTreeSet<String>)> {
    let row = |line: &str| {
        let mut cells = line.trim_start_matches("//!").trim().strip_prefix('|')?.split('|').map(str::trim);
        let level = cells.next()?.parse().ok()?;
        let modules = cells.next()?.split(',').map(|module| module.trim().trim_matches(['[', ']', '`']).to_owned());
        Some((level, modules.collect()))
    };
    text.lines().filter_map(row).collect()
}

/// The names of all `pub`, `pub(super)` and other visible structs, enums, traits and type aliases.
fn public_type_names(code: &str) -> Vec<&str> {
    let name = |line| {
        let rest = str::trim_start(line).strip_prefix("pub")?;
        let rest = match rest.strip_prefix('(') {
            Some(scope) => scope.split_once(')')?.1,
            None => rest,
        };
        let (kind, rest) = rest.trim_start().split_once(' ')?;
        if !["struct", "enum", "trait", "type", "union"].contains(&kind) {
            return None;
        }
        name_at_start(rest)
    };
    code.lines().filter_map(name).collect()
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
