//! `hopguard check`: all problems of some policies at once.

use std::io::{self, Write};
use std::path::PathBuf;

use crate::policy::load::load;
use crate::policy::model::Model;

/// How problems are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// For people: each with its line of source.
    #[default]
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// Checks each path as a policy of its own: `ok` lines go to `out`, problems to `err` (as JSON, all to `out`).
/// Returns the exit code: 0, or 1 when anything is wrong.
///
/// # Errors
/// When a line cannot be written.
pub fn check(
    paths: &[PathBuf],
    form: Form,
    colour: bool,
    (out, err): (&mut dyn Write, &mut dyn Write),
) -> io::Result<u8> {
    let mut code = 0;
    for path in paths {
        match (load(path), form) {
            (Ok(model), Form::Text) => writeln!(out, "ok: {} ({})", path.display(), counts(&model))?,
            (Ok(model), Form::Json) => {
                let hash = format!("{:016x}", model.hash);
                writeln!(out, "{}", serde_json::json!({ "ok": path.display().to_string(), "hash": hash }))?;
            }
            (Err(error), Form::Text) => {
                code = 1;
                let total = error.problems.len();
                let plural = if total == 1 { "problem" } else { "problems" };
                writeln!(err, "{}{}: {total} {plural}", error.render(colour), path.display())?;
            }
            (Err(error), Form::Json) => {
                code = 1;
                write!(out, "{}", error.problems.to_json())?;
            }
        }
    }
    Ok(code)
}

/// What a policy has, in words; the implicit routes are not counted.
fn counts(model: &Model) -> String {
    let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let routes: usize = model.destinations.iter().map(|destination| destination.routes.len() - 1).sum();
    [
        plural(model.listeners.len(), "listener"),
        plural(model.destinations.len(), "destination"),
        plural(routes, "route"),
    ]
    .join(", ")
}
