//! README and docs agree with the program: every policy in them loads, every command and flag exists, every relative link
//! resolves, and the tables of rules are those of the catalogue.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use hopguard::rules::layers::{CATALOGUE, RuleRows, RuleValues};
use hopguard::rules::mode::RuleName;
use hopguard::rules::rule::{Row, RowContext};

/// The blocks and the prose of one page. Line numbers count from 1.
struct Page {
    path: PathBuf,
    blocks: Vec<Block>,
    prose: Vec<(usize, String)>,
}

/// One fenced block: its language, the line on which its text begins, and the text.
struct Block {
    language: String,
    line: usize,
    text: String,
}

/// A command on a page: the words after `hopguard`.
struct Call {
    line: usize,
    words: Vec<String>,
}

#[test]
fn every_policy_in_the_docs_loads() {
    let (mut seen, mut faults) = (0, Vec::new());
    for page in pages() {
        for block in page.blocks.iter().filter(|block| block.is_policy()) {
            seen += 1;
            if let Err(error) = hopguard::policy::load::load_str("policy.yaml", &block.text) {
                let problems = error.problems.render(&error.sources, false);
                faults.push(format!("{}:\n{problems}", page.at(block.line)));
            }
        }
    }
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
    assert!(seen >= 6, "only {seen} policies seen in the docs");
}

#[test]
fn every_command_in_the_docs_exists_with_its_flags() {
    let (mut seen, mut faults) = (0, Vec::new());
    let mut help = Help::default();
    for page in pages() {
        for call in page.commands() {
            seen += 1;
            faults.extend(help.fault_of(&call.words).map(|fault| format!("{}: {fault}", page.at(call.line))));
        }
    }
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
    assert!(seen >= 14, "only {seen} commands seen in the docs");
}

#[test]
fn every_relative_link_in_the_docs_resolves() {
    let pages = pages();
    let (mut seen, mut faults) = (0, Vec::new());
    for page in &pages {
        for (line, text) in &page.prose {
            for target in link_targets(text).into_iter().filter(|target| !is_elsewhere(target)) {
                seen += 1;
                if !page.reaches(target, &pages) {
                    faults.push(format!("{}: `{target}` leads nowhere", page.at(*line)));
                }
            }
        }
    }
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
    assert!(seen >= 60, "only {seen} links seen in the docs");
}

#[test]
fn the_table_of_rules_is_that_of_the_catalogue() {
    let seen = RowContext { now: "2026-01-01T00:00:00Z".parse().unwrap(), is_inbound: false };
    let RuleValues { destination, route } = RuleValues::BUILT_IN;
    let mut built_in: BTreeMap<_, _> = destination.rows(None, &seen).into_iter().map(shown_built_in).collect();
    built_in.extend(route.rows(None, &seen).into_iter().map(shown_built_in));
    let wanted = CATALOGUE.iter().map(|rule| {
        let layers: Vec<_> = rule.layers.iter().map(|layer| layer.as_str()).collect();
        let page = rule.name.replace('_', "-");
        assert!(
            root().join(format!("docs/rules/{page}.md")).is_file(),
            "{} has no page docs/rules/{page}.md",
            rule.key
        );
        let (layers, values) = match built_in.get(rule.key) {
            Some(values) => (layers.join(", "), values.as_str()),
            None => ("none".to_owned(), "on"),
        };
        format!("| [`{}`](rules/{page}.md) | {layers} | {values} |", rule.key)
    });
    assert_table("docs/policy.md", "| rule | layers | built in |", wanted);
}

/// The built-in values of a rule as the table has them: one word, or each field with its value.
fn shown_built_in(rule: RuleRows) -> (&'static str, String) {
    let shown = |row: &Row| match row.name.as_str() {
        "" => row.value.clone(),
        name => format!("`{name}` {}", row.value),
    };
    (rule.key, rule.rows.iter().map(shown).collect::<Vec<_>>().join("; "))
}

#[test]
fn the_table_of_modes_has_every_rule_with_a_mode() {
    let page = fs::read_to_string(root().join("docs/rules/modes.md")).unwrap();
    let rows = table(&page, "| key | rule | in metrics and logs |");
    let wanted = RuleName::ALL.map(|rule| {
        let name = rule.as_str();
        (format!("| `{}` |", rule.key()), format!("]({}.md) | `{name}` |", name.replace('_', "-")))
    });
    for (row, (begin, end)) in rows.iter().zip(&wanted) {
        assert!(row.starts_with(begin) && row.ends_with(end), "{row}\nis to begin with {begin} and to end with {end}");
    }
    assert_eq!(rows.len(), wanted.len());
}

fn assert_table(path: &str, head: &str, wanted: impl Iterator<Item = String>) {
    let text = fs::read_to_string(root().join(path)).unwrap();
    let (found, wanted) = (table(&text, head).join("\n"), wanted.collect::<Vec<_>>().join("\n"));
    assert!(found == wanted, "the table below `{head}` in {path} is to be\n{wanted}\n\nand is\n{found}");
}

/// The rows of the table with this head.
fn table<'a>(text: &'a str, head: &str) -> Vec<&'a str> {
    text.lines().skip_while(|line| *line != head).skip(2).take_while(|line| line.starts_with('|')).collect()
}

#[test]
fn a_page_is_taken_apart_as_a_reader_would() {
    let text = "# A `b` c\nSee [x](y.md#z), `hopguard run`.\n```sh\n$ A=1 hopguard check \\\n    --format json p.yaml | less # why\nls\n```\n";
    let page = Page::parse(PathBuf::from("p.md"), text);
    let commands: Vec<_> = page.commands().into_iter().map(|call| (call.line, call.words.join(" "))).collect();
    assert_eq!(commands, [(2, "run".to_owned()), (4, "check --format json p.yaml".to_owned())]);
    assert_eq!(link_targets(&page.prose[1].1), ["y.md#z"]);
    assert_eq!(page.headings(), ["a-b-c"]);
    assert!(Page::parse(PathBuf::new(), "```yaml\napiVersion: x\n```\n").blocks[0].is_policy());
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The Markdown files of the root folder and everything below `docs/`.
fn pages() -> Vec<Page> {
    let mut files = Vec::new();
    collect_markdown(root(), false, &mut files);
    collect_markdown(&root().join("docs"), true, &mut files);
    files.sort();
    assert!(files.len() >= 12, "only {} pages seen", files.len());
    files
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            Page::parse(path, &text)
        })
        .collect()
}

fn collect_markdown(folder: &Path, recursive: bool, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && recursive {
            collect_markdown(&path, recursive, files);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            files.push(path);
        }
    }
}

impl Block {
    fn is_policy(&self) -> bool {
        self.language == "yaml" && self.text.starts_with("apiVersion")
    }

    /// Commands with the line on which each begins: continued lines joined, output of `$` sessions left out.
    fn command_lines(&self) -> Vec<(usize, String)> {
        if !["sh", "bash", "console", "shell"].contains(&self.language.as_str()) {
            return Vec::new();
        }
        let is_session = self.text.lines().any(|line| line.starts_with("$ "));
        let (mut commands, mut lines) = (Vec::new(), self.text.lines().enumerate());
        while let Some((number, first)) = lines.next() {
            let Some(first) = (if is_session { first.strip_prefix("$ ") } else { Some(first) }) else {
                continue;
            };
            let mut command = first.to_owned();
            while let Some(open) = command.strip_suffix('\\') {
                command = format!("{open}{}", lines.next().map_or("", |(_, line)| line));
            }
            commands.push((self.line + number, command));
        }
        commands
    }
}

impl Page {
    fn parse(path: PathBuf, text: &str) -> Self {
        let mut page = Self { path, blocks: Vec::new(), prose: Vec::new() };
        let mut open: Option<Block> = None;
        for (index, line) in text.lines().enumerate() {
            match (line.trim_start().strip_prefix("```"), open.as_mut()) {
                (Some(_), Some(_)) => page.blocks.extend(open.take()),
                (Some(info), None) => {
                    let language = info.split_whitespace().next().unwrap_or("").to_owned();
                    open = Some(Block { language, line: index + 2, text: String::new() });
                }
                (None, Some(block)) => {
                    block.text.push_str(line);
                    block.text.push('\n');
                }
                (None, None) => page.prose.push((index + 1, line.to_owned())),
            }
        }
        assert!(open.is_none(), "{}: a fence is not closed", page.path.display());
        page
    }

    fn at(&self, line: usize) -> String {
        format!("{}:{line}", self.path.strip_prefix(root()).unwrap_or(&self.path).display())
    }

    /// Every call of hopguard, in code spans and in shell blocks.
    fn commands(&self) -> Vec<Call> {
        let spans = self.prose.iter().flat_map(|(line, text)| {
            let spans = text.split('`').skip(1).step_by(2);
            spans.filter(|span| span.starts_with("hopguard ")).map(|span| (*line, span.to_owned()))
        });
        let lines = self.blocks.iter().flat_map(Block::command_lines);
        spans
            .chain(lines)
            .filter_map(|(line, command)| {
                let words = words_behind_hopguard(&command)?;
                Some(Call { line, words })
            })
            .collect()
    }

    fn headings(&self) -> Vec<String> {
        let titles =
            self.prose.iter().filter(|(_, line)| line.starts_with('#')).map(|(_, line)| line.trim_start_matches('#'));
        titles.map(anchor_of).collect()
    }

    fn reaches(&self, target: &str, pages: &[Self]) -> bool {
        let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
        let path = if file.is_empty() { self.path.clone() } else { self.path.parent().unwrap().join(file) };
        let Ok(path) = path.canonicalize() else {
            return false;
        };
        let page = pages.iter().find(|page| page.path.canonicalize().is_ok_and(|known| known == path));
        anchor.is_empty() || page.is_none_or(|page| page.headings().iter().any(|heading| heading == anchor))
    }
}

/// The anchor of a heading on common Git hosts: lower case, hyphens for spaces, no punctuation.
fn anchor_of(title: &str) -> String {
    let kept = title.trim().chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn words_behind_hopguard(command: &str) -> Option<Vec<String>> {
    let mut words = command.split_whitespace().skip_while(|word| word.contains('='));
    let program = words.next()?;
    if program != "hopguard" && !program.ends_with("/hopguard") {
        return None;
    }
    let ends = |word: &&str| !["|", "||", "&&", ";", "&", "#", ">", "2>", "<"].contains(word);
    Some(words.take_while(ends).map(str::to_owned).collect())
}

fn link_targets(line: &str) -> Vec<&str> {
    line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target).collect()
}

fn is_elsewhere(target: &str) -> bool {
    target.contains("://") || target.starts_with("mailto:")
}

/// The output of `--help`, read once per subcommand. `None`: the subcommand does not exist.
#[derive(Default)]
struct Help(BTreeMap<String, Option<String>>);

impl Help {
    fn fault_of(&mut self, words: &[String]) -> Option<String> {
        let is_name = |word: &&String| word.starts_with(|c: char| c.is_ascii_lowercase());
        let subcommand = words.first().filter(is_name);
        let name = subcommand.cloned().unwrap_or_default();
        let Some(help) = self.0.entry(name.clone()).or_insert_with(|| ask_for_help(&name)) else {
            return Some(format!("there is no `hopguard {name}`"));
        };
        let mut flags = words
            .iter()
            .map(|word| word.trim_matches(['[', ']']))
            .filter(|word| word.starts_with("--"))
            .filter_map(|word| word.split('=').next());
        let unknown = flags.find(|flag| !help.split([' ', ',', '=', '[', '\n']).any(|word| word == *flag))?;
        Some(format!("`hopguard {name}` has no `{unknown}`"))
    }
}

fn ask_for_help(subcommand: &str) -> Option<String> {
    let words = [subcommand, "--help"].into_iter().filter(|word| !word.is_empty());
    let answer = Command::new(env!("CARGO_BIN_EXE_hopguard")).args(words).output().unwrap();
    answer.status.success().then(|| String::from_utf8_lossy(&answer.stdout).into_owned())
}
