//! hopguard: a sidecar proxy that keeps the rules of service-to-service calls.
//!
//! The map, from the top level to the bottom; modules import only from lower levels, and a test keeps it:
//!
//! | level | module | what |
//! |---|---|---|
//! | 8 | [`cli`] | one file per command |
//! | 7 | [`app`], [`config`] | builds, starts and drains the parts |
//! | 6 | [`listener`], [`admin`] | the doors: for callers, for operators |
//! | 5 | [`proxy`] | the path of one request; begin with `proxy/pipeline.rs` |
//! | 4 | [`policy`] | YAML, checked model, compiled snapshot |
//! | 3 | [`upstream`] | discovery, balancing, pools |
//! | 2 | [`rules`] | pure decisions |
//! | 1 | [`telemetry`] | the record of one exchange, metrics, log lines |
//! | 0 | [`net`], [`runtime`], [`problems`] | sockets, tasks, diagnostics |

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
