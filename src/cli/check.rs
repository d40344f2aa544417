//! `hopguard check`: reports all errors and warnings of the given policies at once, and faults that have ended.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::ValueEnum;
use jiff::Timestamp;

use crate::policy::load::{load_given, name_given};
use crate::policy::model::Model;

/// Output format of problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Form {
    /// Text, with the source line of each problem.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Checks each path as a separate policy. Text: `ok` lines to `out`, problems and warnings to `err`. JSON: all lines to `out`.
/// Returns the exit code: 0, or 1 if a policy has an error.
///
/// # Errors
/// If a line cannot be written.
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

/// Faults whose `until` has passed. They have no effect, and an old policy must still load, so these are warnings, not problems.
fn warnings(model: &Model, now: Timestamp) -> Vec<String> {
    let mut warnings = Vec::new();
    for destination in &model.destinations {
        let faults = destination.routes.iter().flat_map(|route| route.faults.iter());
        for fault in faults.filter(|fault| fault.is_over(now)) {
            let (name, until, of) = (&fault.name.value, fault.until.value, &destination.name);
            let warning = format!("fault `{name}` of {of} ended at {until} ({}): remove it", fault.name.origin);
            // A route without its own faults inherits those of its destination: report them once.
            if !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
    }
    warnings
}

/// The number of listeners, destinations and routes, as text; the implicit `default` routes are not counted.
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
