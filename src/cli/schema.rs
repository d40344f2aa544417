//! `hopguard schema`: prints the JSON Schema of a policy file.

use std::io::{self, Write};

/// Prints the schema. Returns the exit code 0.
///
/// # Errors
/// If the output cannot be written.
pub fn schema(out: &mut dyn Write) -> io::Result<u8> {
    out.write_all(crate::policy::schema::schema().as_bytes()).map(|()| 0)
}
