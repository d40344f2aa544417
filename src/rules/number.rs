//! Text in a policy where a number is expected.

use serde::de::Expected;

use crate::problems::InvalidValue;

/// Problem of a text in the place of a number. The hint names the number if only quotes or underscores are wrong;
/// `is_good` says whether that number is in range.
pub(super) fn not_a_number(text: &str, expected: &dyn Expected, is_good: impl FnOnce(&str) -> bool) -> InvalidValue {
    let bare = text.replace('_', "");
    let hint = is_good(&bare).then(|| match bare == text {
        true => format!("write `{bare}` without quotes"),
        false => format!("write `{bare}`"),
    });
    InvalidValue { message: format!("expected {expected}, found `{text}`"), hint }
}
