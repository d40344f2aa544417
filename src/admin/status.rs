//! The figures of the status page as one JSON document.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use crate::telemetry::{DestinationFigures, HopSummary, LATENCY_BOUNDS, ProcessFigures, Telemetry};

/// Most hops in the document; the busiest ones are listed.
const MAX_HOPS_SHOWN: usize = 500;

/// Phase of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not ready for traffic yet.
    Starting,
    /// Serving traffic.
    Ready,
    /// Finishing exchanges in flight, accepting no new ones.
    Draining,
}

/// One listener of the policy.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerView {
    /// Name in the policy.
    pub name: String,
    /// The listening address, with the actual port.
    pub address: SocketAddr,
    /// `inbound` or `outbound`.
    pub direction: &'static str,
    /// The destination; `None` for a forward proxy.
    pub to: Option<String>,
    /// True if callers use TLS.
    pub tls: bool,
    /// Most concurrent HTTP/2 streams per downstream connection.
    pub max_streams: u32,
    /// Downstream connections that have so many streams now: further calls wait in the caller.
    pub connections_at_max_streams: i64,
}

/// Why the last policy load failed.
#[derive(Clone, Debug)]
pub struct PolicyError {
    /// The problems, as `hopguard check` prints them.
    pub message: String,
    /// When the load failed.
    pub at: Instant,
}

/// The data of the status page that only the composition root has.
#[derive(Clone, Debug)]
pub struct StatusView {
    /// The service beside this process.
    pub service: String,
    /// Phase of the process.
    pub state: State,
    /// File or directory of the policy.
    pub policy_path: String,
    /// Error of the last policy load, if it failed.
    pub last_error: Option<PolicyError>,
    /// Listeners of the policy in force.
    pub listeners: Vec<ListenerView>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    service: &'a str,
    state: State,
    reasons: Vec<String>,
    version: &'static str,
    /// Seconds since the start, for rates; steps of the system clock do not change it.
    uptime_seconds: f64,
    workers: i64,
    policy: Policy<'a>,
    listeners: &'a [ListenerView],
    process: Process,
    destinations: Vec<Destination>,
    bounds_ms: Vec<f64>,
    hops: Vec<Hop>,
    hops_left_out: usize,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Policy<'a> {
    path: &'a str,
    hash: Option<String>,
    loaded_at: Option<String>,
    age_seconds: Option<f64>,
    load_ms: Option<f64>,
    last_error: Option<LastError<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LastError<'a> {
    message: &'a str,
    at: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Process {
    resident_bytes: Option<u64>,
    cpu_seconds: Option<f64>,
    open_files: Option<u64>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Destination {
    name: String,
    in_flight: i64,
    queued: i64,
    open_connections: i64,
    idle_connections: i64,
    circuit_breaker: &'static str,
    ejected_endpoints: i64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Hop {
    source: String,
    destination: String,
    route: String,
    direction: &'static str,
    count: u64,
    failures: u64,
    outcomes: BTreeMap<&'static str, u64>,
    p50_ms: Option<f64>,
    p95_ms: Option<f64>,
    p99_ms: Option<f64>,
    overhead_p50_ms: Option<f64>,
    overhead_p99_ms: Option<f64>,
    /// Exchanges per bucket, not cumulative; one entry more than `boundsMs`.
    buckets: Vec<u64>,
}

/// The document for `/status`.
pub(super) fn document(view: &StatusView, reasons: Vec<String>, telemetry: &Telemetry) -> String {
    let mut hops = telemetry.summaries();
    let hops_left_out = hops.len().saturating_sub(MAX_HOPS_SHOWN);
    if hops_left_out > 0 {
        hops.sort_by_key(|hop| std::cmp::Reverse(hop.count));
        hops.truncate(MAX_HOPS_SHOWN);
        hops.sort_by(|a, b| a.labels.cmp(&b.labels));
    }
    let figures = ProcessFigures::read();
    let document = Document {
        service: &view.service,
        state: view.state,
        reasons,
        version: env!("CARGO_PKG_VERSION"),
        uptime_seconds: telemetry.uptime().as_secs_f64(),
        workers: telemetry.process.workers.value(),
        policy: policy(view, telemetry),
        listeners: &view.listeners,
        process: Process {
            resident_bytes: figures.resident,
            cpu_seconds: figures.cpu.map(|cpu| cpu.as_secs_f64()),
            open_files: figures.open_files,
        },
        destinations: telemetry.destinations().into_iter().map(destination).collect(),
        bounds_ms: LATENCY_BOUNDS.iter().map(|nanos| *nanos as f64 / 1e6).collect(),
        hops: hops.iter().map(hop).collect(),
        hops_left_out,
    };
    serde_json::to_string(&document).unwrap_or_else(|error| format!(r#"{{"error":"{error}"}}"#))
}

fn policy<'a>(view: &'a StatusView, telemetry: &Telemetry) -> Policy<'a> {
    let now = telemetry.wall_time(Instant::now());
    let info = telemetry.policy();
    let last_error = view
        .last_error
        .as_ref()
        .map(|error| LastError { message: &error.message, at: format!("{:.3}", telemetry.wall_time(error.at)) });
    Policy {
        path: &view.policy_path,
        loaded_at: info.as_ref().map(|info| format!("{:.3}", info.loaded)),
        age_seconds: info.as_ref().map(|info| now.duration_since(info.loaded).as_secs_f64()),
        load_ms: info.as_ref().map(|info| info.load_duration.as_secs_f64() * 1e3),
        hash: info.map(|info| info.hash),
        last_error,
    }
}

fn destination(figures: DestinationFigures) -> Destination {
    let DestinationFigures { name, in_flight, queued, open, idle, breaker, ejected } = figures;
    let circuit_breaker = match breaker {
        0 => "closed",
        1 => "half-open",
        _ => "open",
    };
    Destination {
        name,
        in_flight,
        queued,
        open_connections: open,
        idle_connections: idle,
        circuit_breaker,
        ejected_endpoints: ejected,
    }
}

fn hop(summary: &HopSummary) -> Hop {
    let ms = |value: Option<Duration>| value.map(|value| (value.as_secs_f64() * 1e6).round() / 1e3);
    Hop {
        source: summary.labels.source.to_string(),
        destination: summary.labels.destination.to_string(),
        route: summary.labels.route.to_string(),
        direction: summary.labels.direction.as_str(),
        count: summary.count,
        failures: summary.failures,
        outcomes: summary.outcomes.iter().map(|(outcome, count)| (outcome.as_str(), *count)).collect(),
        p50_ms: ms(summary.quantile(0.5)),
        p95_ms: ms(summary.quantile(0.95)),
        p99_ms: ms(summary.quantile(0.99)),
        overhead_p50_ms: ms(summary.overhead.quantile(0.5)),
        overhead_p99_ms: ms(summary.overhead.quantile(0.99)),
        buckets: summary.total.counts.clone(),
    }
}
