//! Metrics: what the program tells Prometheus.
//!
//! Floor 1. [`catalogue`] names every metric once, with unit, help, kind and labels; nothing else
//! in the crate writes a metric name as text. [`describe_all`] hands the catalogue to the recorder
//! that `observe` installs. Without a recorder every call is a no-op, so tests and short commands
//! need none.
//!
//! The law, held by the tests below: names begin with `mirrorhub_`, carry the unit last and then
//! `_total` if they count; at most 25 series a source and 5 a volume; histograms are hub-wide.

pub mod catalogue;

use std::time::Instant;

use catalogue::{ALL, CHECKPOINT_PHASE_SECONDS, Kind, Metric, Unit};

use crate::units::machine;

/// A phase of a CP that began then has ended; says when, for the next one.
pub fn phase_ended(phase: &'static str, began: Instant) -> Instant {
    let now = machine::now();
    metrics::histogram!(CHECKPOINT_PHASE_SECONDS.name, "phase" => phase)
        .record(now.saturating_duration_since(began));
    now
}

/// Tells the installed recorder the unit and help of every metric. Called once, right after the
/// recorder was installed.
pub fn describe_all() {
    for metric in ALL {
        describe(metric);
    }
}

fn describe(metric: &Metric) {
    let unit = match metric.unit {
        Unit::Bytes => metrics::Unit::Bytes,
        Unit::Seconds => metrics::Unit::Seconds,
        Unit::Count | Unit::Info | Unit::Level => metrics::Unit::Count,
    };
    match metric.kind {
        Kind::Counter => metrics::describe_counter!(metric.name, unit, metric.help),
        Kind::Gauge => metrics::describe_gauge!(metric.name, unit, metric.help),
        Kind::Histogram { .. } => metrics::describe_histogram!(metric.name, unit, metric.help),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::catalogue::{ALL, Kind, Label, Metric, SOURCE_STATE, Unit, Values};

    const SOURCE_SERIES_MAX: usize = 25;
    const VOLUME_SERIES_MAX: usize = 5;

    /// What is wrong with one metric, in words; empty if nothing is.
    fn faults(metric: &Metric) -> Vec<String> {
        let mut faults = Vec::new();
        let name = metric.name;
        let mut fault = |what: &str| faults.push(format!("{name}: {what}"));
        if !name.starts_with("mirrorhub_") {
            fault("does not begin with mirrorhub_");
        }
        if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_') {
            fault("has a character that is not a-z 0-9 _");
        }
        let counts = name.ends_with("_total");
        if counts != (metric.kind == Kind::Counter) {
            fault("_total is for counters, and for them only");
        }
        let stem = name.strip_suffix("_total").unwrap_or(name);
        let suffixes =
            [(Unit::Bytes, "_bytes"), (Unit::Seconds, "_seconds"), (Unit::Info, "_info")];
        for (unit, suffix) in suffixes {
            if stem.ends_with(suffix) != (metric.unit == unit) {
                fault("the unit and the end of the name differ");
            }
        }
        if metric.help.is_empty() || metric.help.ends_with('.') {
            fault("the help is empty or ends with a full stop");
        }
        if let Kind::Histogram { buckets } = metric.kind {
            if has(metric, Values::Sources) || has(metric, Values::Volumes) {
                fault("histograms are hub-wide");
            }
            if buckets.is_empty() || !buckets.is_sorted_by(|a, b| a < b) {
                fault("buckets do not rise");
            }
        }
        faults
    }

    fn has(metric: &Metric, values: Values) -> bool {
        metric.labels.iter().any(|label| label.values == values)
    }

    /// Series that one source (and one volume, if it has that label) adds.
    fn series(metric: &Metric) -> usize {
        metric
            .labels
            .iter()
            .map(|label| match label.values {
                Values::Closed(words) => words.len(),
                Values::Sources | Values::Volumes | Values::One => 1,
            })
            .product()
    }

    fn series_where(metrics: &[&Metric], chosen: impl Fn(&Metric) -> bool) -> usize {
        metrics.iter().filter(|metric| chosen(metric)).map(|metric| series(metric)).sum()
    }

    #[test]
    fn every_metric_obeys_the_naming_rules() {
        let faults: Vec<String> = ALL.iter().flat_map(|metric| faults(metric)).collect();
        assert!(faults.is_empty(), "{faults:#?}");
        let names: BTreeSet<&str> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len(), "a name is used twice");
    }

    /// The state that only filers are in: `fenced`.
    const NOT_ON_A_HUB: usize = 1;

    #[test]
    fn a_source_and_a_volume_stay_within_their_series() {
        let volume = series_where(ALL, |metric| has(metric, Values::Volumes));
        let source = series_where(ALL, |metric| {
            has(metric, Values::Sources) && !has(metric, Values::Volumes)
        }) - NOT_ON_A_HUB;
        assert!(volume <= VOLUME_SERIES_MAX, "{volume} series a volume");
        assert!(source <= SOURCE_SERIES_MAX, "{source} series a source");
    }

    /// What an operator was promised, in his own words, and what shows it.
    const PROMISED: &[(&str, &[&str])] = &[
        ("latency of a client's write", &["mirrorhub_client_write_duration_seconds"]),
        ("latency of the NVRAM's commit", &["mirrorhub_nvram_commit_duration_seconds"]),
        ("latency of the hub's answer", &["mirrorhub_ack_duration_seconds"]),
        ("latency of draining", &["mirrorhub_drain_duration_seconds"]),
        ("time of a CP", &["mirrorhub_checkpoint_duration_seconds"]),
        ("time of its phases", &["mirrorhub_checkpoint_phase_duration_seconds"]),
        (
            "bytes of each step of the ladder",
            &[
                "mirrorhub_source_acknowledged_bytes_total",
                "mirrorhub_source_staged_bytes_total",
                "mirrorhub_source_drained_bytes_total",
                "mirrorhub_source_applied_bytes_total",
                "mirrorhub_source_visible_bytes_total",
            ],
        ),
        ("seconds of each step", &["mirrorhub_step_age_seconds", "mirrorhub_source_lag_seconds"]),
        (
            "wire bytes over logical bytes",
            &["mirrorhub_checkpoint_wire_bytes_total", "mirrorhub_source_visible_bytes_total"],
        ),
        ("state as a labelled gauge", &["mirrorhub_source_state"]),
        ("the last CP", &["mirrorhub_source_checkpoint_timestamp_seconds"]),
        ("the last scrub", &["mirrorhub_scrub_timestamp_seconds"]),
        ("the last failover drill", &["mirrorhub_source_drill_timestamp_seconds"]),
        ("the noisy source", &["mirrorhub_source_write_share_ratio"]),
        ("certificates", &["mirrorhub_tls_certificate_expiry_timestamp_seconds"]),
        ("the version", &["mirrorhub_build_info"]),
    ];

    fn broken_promises(metrics: &[&Metric]) -> Vec<&'static str> {
        let is_there = |name: &&str| metrics.iter().any(|metric| metric.name == *name);
        let broken = PROMISED.iter().filter(|(_, names)| !names.iter().all(is_there));
        broken.map(|(what, _)| *what).collect()
    }

    /// Goal: a metric that operators were promised is not renamed or dropped by mistake.
    #[test]
    fn what_was_promised_is_in_the_catalogue() {
        assert_eq!(broken_promises(ALL), Vec::<&str>::new());
        let histograms = PROMISED.iter().take(6).flat_map(|(_, names)| *names);
        for name in histograms {
            let metric = ALL.iter().find(|metric| metric.name == *name);
            assert!(matches!(metric.unwrap().kind, Kind::Histogram { .. }), "{name}");
        }
        // Negative control: without one metric one promise is broken.
        for gone in ["mirrorhub_drain_duration_seconds", "mirrorhub_source_drained_bytes_total"] {
            let rest: Vec<_> = ALL.iter().filter(|metric| metric.name != gone).copied().collect();
            assert_eq!((rest.len(), broken_promises(&rest).len()), (ALL.len() - 1, 1), "{gone}");
        }
    }

    /// Negative control: the rules above do find what they are for.
    #[test]
    fn the_rules_see_bad_metrics() {
        let good = Metric {
            name: "mirrorhub_test_bytes_total",
            unit: Unit::Bytes,
            kind: Kind::Counter,
            help: "help",
            labels: &[],
        };
        assert_eq!(faults(&good), Vec::<String>::new());
        for name in ["hub_test_bytes_total", "mirrorhub_test_bytes", "mirrorhub_Test_bytes_total"] {
            assert_eq!(faults(&Metric { name, ..good }).len(), 1, "{name}");
        }
        assert_eq!(faults(&Metric { name: "mirrorhub_test_total", ..good }).len(), 1);
        assert_eq!(faults(&Metric { unit: Unit::Count, ..good }).len(), 1);
        assert_eq!(faults(&Metric { help: "Ends with a stop.", ..good }).len(), 1);
        let labels: &[Label] = &[Label { name: "source", values: Values::Sources }];
        let histogram = Metric {
            name: "mirrorhub_test_bytes",
            kind: Kind::Histogram { buckets: &[2.0, 1.0] },
            labels,
            ..good
        };
        assert_eq!(faults(&histogram).len(), 2);
        assert!(series_where(&[&SOURCE_STATE; 4], |_| true) > SOURCE_SERIES_MAX);
    }
}
