//! `grpcFailures` of `circuitBreaker`: the gRPC codes that count as failures of the upstream.

use std::fmt;

use crate::problems::{Cursor, Sourced};
use crate::rules::faults::GrpcCode;

/// A set of gRPC codes; codes that gRPC does not define, above 16, are always failures. Displays as a policy lists them:
/// `unknown, internal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GrpcFailures(u32);

impl GrpcFailures {
    /// UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS. RESOURCE_EXHAUSTED is not among them: like 429 it
    /// is the answer of an upstream that works.
    pub const fn built_in() -> Self {
        Self(1 << 2 | 1 << 4 | 1 << 13 | 1 << 14 | 1 << 15)
    }

    /// Whether a code counts as a failure.
    pub const fn contains(self, code: u32) -> bool {
        code > 16 || self.0 & (1 << code) != 0
    }

    /// The set of a list. Reports an empty list, codes that appear twice, and `ok`.
    pub(super) fn check(list: &[GrpcCode], at: &Cursor<'_>) -> Sourced<Self> {
        // A refused code counts as an entry.
        if list.is_empty() && at.size() == 0 {
            at.report("the list is empty", "write at least one code, like `unavailable`, or `circuitBreaker: off`");
        }
        let mut all = Self(0);
        for (index, code) in list.iter().enumerate() {
            let (at, name) = (at.index(index), code.as_str());
            if code.number() == 0 {
                at.report(format!("`{name}` is no failure"), "remove it");
            } else if all.contains(code.number()) {
                at.report(format!("`{name}` appears twice"), "remove one of the two");
            } else {
                all.0 |= 1 << code.number();
            }
        }
        at.set(all)
    }
}

impl fmt::Display for GrpcFailures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = (0..).zip(GrpcCode::NAMES).filter(|(code, _)| self.contains(*code)).map(|(_, name)| name);
        f.write_str(&names.collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_codes_are_those_of_a_server_that_does_not_work() {
        let codes = GrpcFailures::built_in();
        assert_eq!(codes.to_string(), "unknown, deadline_exceeded, internal, unavailable, data_loss");
        for (code, is_failure) in
            [(0, false), (1, false), (2, true), (8, false), (14, true), (16, false), (17, true), (77, true)]
        {
            assert_eq!(codes.contains(code), is_failure, "{code}");
        }
    }
}
