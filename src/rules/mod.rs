//! Level 2: the rules. Each has a file or folder of its own with the shape in YAML, the check, the checked values, the rows
//! that show them, the decision and the tests.
//!
//! A rule uses plain values and a passed `now`: no socket, no HTTP server, no clock, no metric.
//!
//! `catalogue!` below lists every rule once. An entry there and the rule's [`rule::Rule`] give the entries of `defaults`,
//! destinations and routes with their check (`policy`), the JSON Schema, the mode, and the rows of `hopguard explain` and
//! `/policy`.

/// The rules, in the order in which they are shown.
///
/// ```text
/// field Type "key" {
///     per destination { defaults TEXT destination TEXT }       layers of a rule whose values belong to a destination
///     per route { defaults TEXT destination TEXT route TEXT }  layers of a rule whose values belong to a route
///     mode TEXT                                                its entry in `rules:`
/// }
/// ```
///
/// `field` is the name in metrics and logs, the file in this folder, and with dashes the page in `docs/rules`; `Type` is
/// the rule's type in that file; `key` is the key in YAML. The texts are the descriptions in the JSON Schema. `defaults`,
/// the layers and the mode are optional.
///
/// `catalogue! { LIST => MACRO! {ARGS} }` calls `MACRO! { {ARGS} {RULES} }`; see `lists!` in `layers`.
macro_rules! catalogue {
    ($list:ident => $then:ident! $args:tt) => {
        $crate::rules::layers::lists! { $list $then $args
            deadline Deadline "deadline" {
                mode "One time budget for the whole chain of calls."
            }
            timeouts Timeouts "timeouts" {
                per route {
                    defaults "Timeouts of calls."
                    destination "Timeouts of its calls."
                    route "Timeouts of these calls."
                }
            }
            limits Limits "limits" {
                per destination {
                    defaults "Concurrency limit of a destination."
                    destination "Concurrency limit of this destination."
                }
                mode "Bounds the calls in flight to a destination."
            }
            retry Retry "retry" {
                per route {
                    defaults "Which failed calls are sent again."
                    destination "Which failed calls are sent again."
                    route "Which of these calls are sent again when they fail."
                }
                mode "Sends failed calls again."
            }
            retry_in_one_place RetryInOnePlace "retryInOnePlace" {
                mode "Only the hop at which a call failed retries it."
            }
            unsent Unsent "unsent" {
                mode "A call that did not reach the app is sent again, whatever its method."
            }
            blame_in_one_place BlameInOnePlace "blameInOnePlace" {
                mode "A failure counts only at the hop where it happened."
            }
            circuit_breaker CircuitBreaker "circuitBreaker" {
                per destination {
                    defaults "Circuit breaker of a destination."
                    destination "Circuit breaker of this destination."
                }
                mode "Refuses calls to a destination that fails."
            }
            ejection Ejection "ejection" {
                per destination {
                    defaults "Ejection of failing endpoints."
                    destination "Ejection of its failing endpoints."
                }
                mode "Takes a failing endpoint out of load balancing."
            }
            rate_limit RateLimit "rateLimit" {
                per route {
                    destination "Rate limit of each of its routes."
                    route "Rate limit of these calls."
                }
                mode "Bounds the calls per time."
            }
            max_body_size MaxBodySize "maxBodySize" {
                per route {
                    defaults "Maximum size of a request body, in bytes or KiB/MiB: 1 to 4095MiB, or off. Default off."
                    destination "Maximum size of a request body, in bytes or KiB/MiB: 1 to 4095MiB, or off. Default off."
                    route "Maximum size of a request body, in bytes or KiB/MiB: 1 to 4095MiB, or off. Default off."
                }
                mode "Requests with too long a body are refused."
            }
            faults Faults "faults" {
                per route {
                    destination "Faults of its routes, except routes with faults of their own."
                    route "Faults of these calls."
                }
                mode "Injects faults; `dryRun` only logs them."
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
pub mod max_body_size;
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
