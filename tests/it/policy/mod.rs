//! The policy in force: which part of it applies to a call, and how it changes.
//!
//! - `reload`: a changed file, folder or ConfigMap
//! - `reload_dependencies`: changes of certificates and addresses that a policy needs
//! - `routing`: hosts, paths, methods, header fields, gRPC

mod reload;
mod reload_dependencies;
mod routing;
