//! The metric recorder: one a process, installed first thing, rendered by [`super::server`].

use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_util::MetricKindMask;

use crate::metric::catalogue::{ALL, BUILD_INFO, Kind};

/// Why there are no metrics.
#[derive(Debug, thiserror::Error)]
#[error("the metric recorder cannot be installed: {0}")]
pub struct RecorderError(#[from] BuildError);

/// What is not set by a scrape is gone from it: the series of a source that was retired. All counters
/// and gauges are set by each.
const GONE_AFTER: Duration = Duration::from_millis(100);
/// `hub` or `source`.
static ROLE: OnceLock<&'static str> = OnceLock::new();

/// Installs the recorder for the whole process, which is a `hub` or a `source`, and describes every
/// metric.
///
/// # Errors
/// If the process has a recorder already.
pub fn install(role: &'static str) -> Result<PrometheusHandle, RecorderError> {
    let handle = builder()?.install_recorder()?;
    crate::metric::describe_all();
    ROLE.get_or_init(|| role);
    Ok(handle)
}

/// Sets `mirrorhub_build_info`, as each scrape does.
pub(super) fn tell_build() {
    let role = ROLE.get().copied().unwrap_or_default();
    metrics::gauge!(BUILD_INFO.name, "version" => env!("CARGO_PKG_VERSION"), "role" => role)
        .set(1.0);
}

/// A recorder with the catalogue's buckets: without them histograms would be summaries, which
/// cannot be added up over sources and hubs.
pub(crate) fn builder() -> Result<PrometheusBuilder, BuildError> {
    let set_by_each = MetricKindMask::COUNTER | MetricKindMask::GAUGE;
    let mut builder = PrometheusBuilder::new().idle_timeout(set_by_each, Some(GONE_AFTER));
    for metric in ALL {
        if let Kind::Histogram { buckets } = metric.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.into()), buckets)?;
        }
    }
    Ok(builder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metric::catalogue::{
        CLIENT_WRITE_SECONDS, Label, Metric, NVRAM_USED_BYTES, STATES, Values,
    };
    use crate::status::document::State;

    fn labels(metric: &Metric) -> Vec<metrics::Label> {
        let value = |label: &Label| match label.values {
            Values::Closed(words) => words[0],
            Values::Sources | Values::Volumes | Values::One => "x",
        };
        metric.labels.iter().map(|label| metrics::Label::new(label.name, value(label))).collect()
    }

    /// Sets every metric of the catalogue once and holds the rendered text against it.
    #[test]
    fn every_metric_is_rendered_under_its_own_name_with_help_and_type() {
        let recorder = builder().unwrap().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            crate::metric::describe_all();
            for metric in ALL {
                match metric.kind {
                    Kind::Counter => metrics::counter!(metric.name, labels(metric)).increment(1),
                    Kind::Gauge => metrics::gauge!(metric.name, labels(metric)).set(1.0),
                    Kind::Histogram { .. } => {
                        metrics::histogram!(metric.name, labels(metric)).record(1.0);
                    }
                }
            }
        });
        let text = handle.render();
        for metric in ALL {
            let word = match metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram { .. } => "histogram",
            };
            for line in [
                format!("# TYPE {} {word}\n", metric.name),
                format!("# HELP {} {}\n", metric.name, metric.help),
            ] {
                assert!(text.contains(&line), "{line:?} is not in\n{text}");
            }
        }
        assert!(text.contains(&format!("{}_bucket{{le=\"0.001\"}} 0", CLIENT_WRITE_SECONDS.name)));
        assert!(text.contains(&format!("{} 1\n", NVRAM_USED_BYTES.name)));
    }

    #[test]
    fn states_have_the_same_words_in_status_and_in_metrics() {
        let shown = State::ALL.into_iter().filter(|state| *state != State::Retired);
        assert_eq!(shown.map(State::as_str).collect::<Vec<_>>(), STATES);
    }
}
