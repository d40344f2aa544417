//! Level 2: the rules. Each has a file or folder of its own: the shape in YAML, its check, the checked value, the rows
//! that show it, the decision, the tests.
//!
//! A rule knows plain values and the `now` it is given: no socket, no HTTP server, no clock, no metric.
//!
//! `catalogue!` below names each rule once. From an entry there and the rule's [`rule::Rule`] follow the entries of
//! `defaults`, destinations and routes with their check (`policy`), the JSON Schema, the mode, and the rows of
//! `hopguard explain` and `/policy`.

/// The rules, in the order in which they are shown.
///
/// ```text
/// field Type "key" {
///     per destination { defaults TEXT destination TEXT }       where it may stand, if it holds for a destination
///     per route { defaults TEXT destination TEXT route TEXT }  where it may stand, if it holds for a route
///     mode TEXT                                                its entry in `rules:`, if it has a mode
/// }
/// ```
///
/// `field` is the name in metrics and logs, the file here, and with dashes the page in `docs/rules`; `Type` is the
/// rule's type in that file; `key` is what YAML calls it. The texts are the descriptions in the JSON Schema. `defaults`
/// may be left out.
///
/// `catalogue! { LIST => MACRO! {ARGS} }` calls `MACRO! { {ARGS} {RULES} }`; see [`layers::lists`].
macro_rules! catalogue {
    ($list:ident => $then:ident! $args:tt) => {
        $crate::rules::layers::lists! { $list $then $args
            deadline Deadline "deadline" {
                mode "One time budget for the whole chain of calls."
            }
            timeouts Timeouts "timeouts" {
                per route {
                    defaults "How long calls may take."
                    destination "How long calls may take."
                    route "How long these calls may take."
                }
            }
            limits Limits "limits" {
                per destination {
                    defaults "How many calls a destination gets at once."
                    destination "How many calls it gets at once."
                }
                mode "So many calls at once."
            }
            retry Retry "retry" {
                per route {
                    defaults "Which failed calls are sent again."
                    destination "Which failed calls are sent again."
                    route "Which of these calls are sent again when they fail."
                }
                mode "Failed calls are made again."
            }
            retry_in_one_place RetryInOnePlace "retryInOnePlace" {
                mode "Only the hop at which a call failed makes it again."
            }
            unsent Unsent "unsent" {
                mode "A call that never reached its app is told from one that failed there."
            }
            blame_in_one_place BlameInOnePlace "blameInOnePlace" {
                mode "A failure counts only at the hop where it happened."
            }
            circuit_breaker CircuitBreaker "circuitBreaker" {
                per destination {
                    defaults "When a destination gets no calls for a while."
                    destination "When it gets no calls for a while."
                }
                mode "A destination that fails gets no calls for a while."
            }
            ejection Ejection "ejection" {
                per destination {
                    defaults "When one endpoint gets no calls for a while."
                    destination "When one of its endpoints gets no calls for a while."
                }
                mode "An endpoint that fails gets no calls for a while."
            }
            rate_limit RateLimit "rateLimit" {
                per route {
                    destination "How many calls each of its routes takes in which time."
                    route "How many of these calls are taken in which time."
                }
                mode "So many calls a time."
            }
            faults Faults "faults" {
                per route {
                    destination "Failures on purpose, for those of its routes that have none of their own."
                    route "Failures on purpose."
                }
                mode "Failures on purpose; `dryRun` logs the fault and does nothing."
            }
        }
    };
}
pub(crate) use catalogue;

pub mod circuit_breaker;
pub mod count;
pub mod deadline;
pub mod duration;
pub mod ejection;
pub mod faults;
pub mod inflight;
pub mod layers;
pub mod limits;
pub mod mode;
mod number;
pub mod proxy_status;
pub mod rate_limit;
pub mod ratio;
pub mod retry;
pub mod retry_history;
pub mod rule;
pub mod size;
pub mod timeouts;
pub mod toggle;
pub mod trace;

#[cfg(test)]
mod tests;
