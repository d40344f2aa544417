//! hopguard: a sidecar proxy that enforces timeouts, retries and circuit breaking on a service's calls.
//!
//! The modules by level, highest first. A module imports from lower levels only; `tests/architecture.rs` enforces this.
//!
//! | level | modules | content |
//! |---|---|---|
//! | 9 | [`cli`] | one file per command |
//! | 8 | [`app`] | builds, starts and drains the parts |
//! | 7 | [`config`] | process settings from flags and environment |
//! | 6 | [`listener`], [`admin`] | accepting downstream connections; the admin server |
//! | 5 | [`proxy`] | the path of one request; begin with `proxy/pipeline.rs` |
//! | 4 | [`policy`] | YAML, checked model, compiled snapshot |
//! | 3 | [`upstream`] | discovery, load balancing, connection pools |
//! | 2 | [`rules`] | pure decisions |
//! | 1 | [`telemetry`] | the record of one exchange, metrics, log lines |
//! | 0 | [`net`], [`runtime`], [`problems`] | sockets, threads, diagnostics |

pub mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub mod listener;
pub mod net;
pub mod policy;
pub mod problems;
pub mod proxy;
pub mod rules;
pub mod runtime;
pub mod telemetry;
pub mod upstream;
