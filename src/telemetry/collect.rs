//! Builds metric families from cells: sums over workers and attaches labels. Runs on the admin thread, so that a scrape
//! costs the data path nothing.

use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};

use super::families as names;
use super::histogram::Buckets;
use super::hop::HopLabels;
use super::host_process::ProcessFigures;
use super::instruments::{Family, Labels, Reading};
use super::log;
use super::shard::{SeriesKey, SeriesSums};
use super::{PolicyInfo, Telemetry};

/// All families with at least one value, ordered by name.
pub(super) fn gather(telemetry: &Telemetry) -> Vec<MetricFamily> {
    let mut families = exchanges(telemetry);
    families.extend(telemetry.instruments.read().into_iter().map(reading));
    families.extend(process(telemetry));
    families.retain(|family| !family.get_metric().is_empty());
    families.sort_by(|a, b| a.name().cmp(b.name()));
    families
}

fn exchanges(telemetry: &Telemetry) -> Vec<MetricFamily> {
    type Select = fn(&SeriesSums) -> &Buckets;
    let histograms: [(Family, Select); 5] = [
        (names::DURATION, |sums| &sums.total),
        (names::FIRST_BYTE, |sums| &sums.first_byte),
        (names::CONNECT, |sums| &sums.connect),
        (names::QUEUE, |sums| &sums.queue),
        (names::OVERHEAD, |sums| &sums.overhead),
    ];
    let mut requests = Vec::new();
    let mut metrics: [Vec<Metric>; 5] = Default::default();
    for (key, sums) in telemetry.sums() {
        let labels = hop_labels(&telemetry.hops.labels(key.0), key);
        for ((_, select), metrics) in histograms.iter().zip(&mut metrics) {
            let buckets = select(&sums);
            if buckets.count() > 0 {
                metrics.push(histogram(labels.clone(), buckets));
            }
        }
        requests.push(counter(labels, sums.count as f64));
    }
    let mut families = vec![family(names::REQUESTS, MetricType::COUNTER, requests)];
    for ((name, _), metrics) in histograms.into_iter().zip(metrics) {
        families.push(family(name, MetricType::HISTOGRAM, metrics));
    }
    families
}

fn reading(reading: Reading) -> MetricFamily {
    let values = reading.values.into_iter();
    if reading.counter {
        let metrics = values.map(|(labels, value)| counter(pairs(labels), value)).collect();
        return family(reading.family, MetricType::COUNTER, metrics);
    }
    let metrics = values.map(|(labels, value)| gauge(pairs(labels), value)).collect();
    family(reading.family, MetricType::GAUGE, metrics)
}

fn process(telemetry: &Telemetry) -> Vec<MetricFamily> {
    let one_counter = |name, value: Option<f64>| {
        family(name, MetricType::COUNTER, value.map(|value| counter(Vec::new(), value)).into_iter().collect())
    };
    let one_gauge = |name, labels: Labels, value: Option<f64>| {
        family(name, MetricType::GAUGE, value.map(|value| gauge(pairs(labels), value)).into_iter().collect())
    };
    let figures = ProcessFigures::read();
    let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
    let mut families = vec![
        one_counter(names::LOG_DROPPED, Some(log::dropped() as f64)),
        one_counter(names::HOPS_OVERFLOWED, Some(telemetry.hops.overflowed() as f64)),
        one_counter(names::CPU, figures.cpu.map(|cpu| cpu.as_secs_f64())),
        one_gauge(names::BUILD, version, Some(1.0)),
        one_gauge(names::MEMORY, Vec::new(), figures.resident.map(|bytes| bytes as f64)),
        one_gauge(names::OPEN_FDS, Vec::new(), figures.open_files.map(|files| files as f64)),
        one_gauge(names::STARTED, Vec::new(), figures.started),
    ];
    if let Some(PolicyInfo { hash, loaded, load_duration }) = telemetry.policy() {
        let loaded = loaded.as_millisecond() as f64 / 1000.0;
        families.push(one_gauge(names::POLICY, vec![("hash", hash)], Some(1.0)));
        families.push(one_gauge(names::POLICY_LOADED, Vec::new(), Some(loaded)));
        families.push(one_gauge(names::POLICY_LOAD_DURATION, Vec::new(), Some(load_duration.as_secs_f64())));
    }
    families
}

fn hop_labels(hop: &HopLabels, (_, protocol, outcome): SeriesKey) -> Vec<LabelPair> {
    vec![
        pair("source", &hop.source),
        pair("destination", &hop.destination),
        pair("route", &hop.route),
        pair("direction", hop.direction.as_str()),
        pair("protocol", protocol.as_str()),
        pair("outcome", outcome.as_str()),
    ]
}

fn pairs(labels: Labels) -> Vec<LabelPair> {
    labels.iter().map(|(name, value)| pair(name, value)).collect()
}

fn pair(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

fn family(family: Family, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut out = MetricFamily::default();
    out.set_name(family.name.to_owned());
    out.set_help(family.help.to_owned());
    out.set_field_type(kind);
    out.set_metric(metrics);
    out
}

fn counter(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut metric = Metric::from_label(labels);
    let mut counter = Counter::default();
    counter.set_value(value);
    metric.set_counter(counter);
    metric
}

fn gauge(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::from_gauge(gauge);
    metric.set_label(labels);
    metric
}

fn histogram(labels: Vec<LabelPair>, buckets: &Buckets) -> Metric {
    let mut below = 0;
    let mut out = Vec::with_capacity(buckets.bounds.len());
    for (bound, count) in buckets.bounds.iter().zip(&buckets.counts) {
        below += count;
        let mut bucket = Bucket::default();
        bucket.set_cumulative_count(below);
        bucket.set_upper_bound(*bound as f64 / 1e9);
        out.push(bucket);
    }
    let mut histogram = Histogram::default();
    histogram.set_bucket(out);
    histogram.set_sample_count(buckets.count());
    histogram.set_sample_sum(buckets.sum_nanos as f64 / 1e9);
    let mut metric = Metric::from_label(labels);
    metric.set_histogram(histogram);
    metric
}
