//! `hopguard explain`: listener, destination, route and effective values of one call, with the origin of each value.

use std::io::{self, Write};
use std::path::Path;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use jiff::Timestamp;

use crate::policy::explain::{Call, explain as explain_call};
use crate::policy::load::load_given;

/// Explains a call. Each header has the form `NAME: VALUE`. Returns the exit code: 0; 1 if the policy has problems or no
/// destination matches the call; 2 if the method, the URL or a header is malformed.
///
/// # Errors
/// If a line cannot be written.
pub fn explain(
    (method, url): (&str, &str),
    headers: &[String],
    policy: &Path,
    colour: bool,
    (out, err): (&mut dyn Write, &mut dyn Write),
) -> io::Result<u8> {
    let call = match parse_headers(headers) {
        Ok(headers) => Call::parse(method, url, headers).map_err(|error| error.to_string()),
        Err(message) => Err(message),
    };
    let call = match call {
        Ok(call) => call,
        Err(message) => return writeln!(err, "error: {message}").map(|()| 2),
    };
    let model = match load_given(policy) {
        Ok(model) => model,
        Err(error) => return write!(err, "{}", error.render(colour)).map(|()| 1),
    };
    match explain_call(&model, &call, Timestamp::now()) {
        Ok(explanations) => {
            for (index, explanation) in explanations.iter().enumerate() {
                let gap = if index > 0 { "\n" } else { "" };
                write!(out, "{gap}{explanation}")?;
            }
            Ok(0)
        }
        Err(error) => writeln!(err, "{error}").map(|()| 1),
    }
}

fn parse_headers(lines: &[String]) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for line in lines {
        let fault = || format!("`{line}` is no header; write NAME: VALUE");
        let (name, value) = line.split_once(':').ok_or_else(fault)?;
        let name = HeaderName::from_bytes(name.trim().as_bytes()).map_err(|_| fault())?;
        headers.append(name, HeaderValue::from_str(value.trim()).map_err(|_| fault())?);
    }
    Ok(headers)
}
