//! `hopguard check`: all errors and warnings of some policies at once, and faults that have no effect any more.

use std::io::{self, Write};
use std::path::PathBuf;

use jiff::Timestamp;

use crate::policy::load::{load_given, name_given};
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

/// Checks each path as a policy of its own: `ok` lines go to `out`, problems and warnings to `err` (as JSON, all to
/// `out`). Returns the exit code: 1 if there is an error, else 0.
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
        let name = name_given(path).display();
        match (load_given(path), form) {
            (Ok(model), Form::Text) => {
                write!(err, "{}", model.warnings.render(colour))?;
                for warning in warnings(&model, Timestamp::now()) {
                    writeln!(err, "warning: {warning}")?;
                }
                writeln!(out, "ok: {name} ({})", counts(&model))?;
            }
            (Ok(model), Form::Json) => {
                write!(out, "{}", model.warnings.problems.to_json())?;
                let hash = format!("{:016x}", model.hash);
                let mut line = serde_json::json!({ "ok": name.to_string(), "hash": hash });
                let warnings = warnings(&model, Timestamp::now());
                if !warnings.is_empty() {
                    line["warnings"] = warnings.into();
                }
                writeln!(out, "{line}")?;
            }
            (Err(error), Form::Text) => {
                code = 1;
                writeln!(err, "{}{name}: {}", error.render(colour), error.problems.count())?;
            }
            (Err(error), Form::Json) => {
                code = 1;
                write!(out, "{}", error.problems.to_json())?;
            }
        }
    }
    Ok(code)
}

/// Faults whose end has come. They do nothing any more, and an old policy must stay readable, so they are no problems.
fn warnings(model: &Model, now: Timestamp) -> Vec<String> {
    let mut warnings = Vec::new();
    for destination in &model.destinations {
        let faults = destination.routes.iter().flat_map(|route| route.faults.iter());
        for fault in faults.filter(|fault| fault.is_over(now)) {
            let (name, until, of) = (&fault.name.value, fault.until.value, &destination.name);
            let warning = format!("fault `{name}` of {of} is over since {until} ({}): remove it", fault.name.origin);
            // Routes without faults of their own have those of their destination.
            if !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
    }
    warnings
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
