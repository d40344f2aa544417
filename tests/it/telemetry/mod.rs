//! The outputs for operators: log lines, metrics, admin pages.
//!
//! - `access_log`: lines, fields, sampling, a blocked log
//! - `admin`: probes, metrics pages, the policy in force
//! - `metric_cardinality`: the bound on label values

mod access_log;
mod admin;
mod metric_cardinality;
