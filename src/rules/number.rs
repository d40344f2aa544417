//! A text in a policy where a number is expected.

use serde::de::Expected;

use crate::problems::InvalidValue;

/// What is wrong with such a text. Names what to write where only quotes or underscores keep it from being the number;
/// `is_good` says whether the number would be taken.
pub(super) fn not_a_number(text: &str, expected: &dyn Expected, is_good: impl FnOnce(&str) -> bool) -> InvalidValue {
    let bare = text.replace('_', "");
    let hint = is_good(&bare).then(|| match bare == text {
        true => format!("write `{bare}` without quotes"),
        false => format!("write `{bare}`"),
    });
    InvalidValue { message: format!("expected {expected}, found `{text}`"), hint }
}
