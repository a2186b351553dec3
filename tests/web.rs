//! HTTP of both ends: metrics that Prometheus' own tool accepts, health, the status document.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::harness::{Cluster, SourceSettings, http_get, run, try_run};

fn promtool_accepts(metrics: &str) -> Result<(), String> {
    let mut tool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool");
    tool.stdin.take().expect("stdin").write_all(metrics.as_bytes()).expect("metrics");
    let output = tool.wait_with_output().expect("promtool ends");
    let text = [output.stdout, output.stderr].concat();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&text).into_owned()) }
}

fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics.lines().find(|line| line.starts_with(series));
    let line = line.unwrap_or_else(|| panic!("no {series} in\n{metrics}"));
    line.rsplit(' ').next().expect("a value").parse().expect("a number")
}

#[test]
fn metrics_tell_what_was_written_and_promtool_accepts_them() {
    let cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    let volume = cluster.volume("filer-a", "vol0");
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 1 0 8M", &volume]));
    cluster.checkpoint("filer-a");
    for url in [cluster.hub_url("/metrics"), cluster.source_url("filer-a", "/metrics")] {
        let (status, metrics) = http_get(&url);
        assert_eq!(status, "HTTP/1.1 200 OK");
        assert_eq!(promtool_accepts(&metrics), Ok(()), "{url}");
        let state = "mirrorhub_source_state{source=\"filer-a\",state=\"in-sync\"}";
        assert!((value(&metrics, state) - 1.0).abs() < 0.5);
        let visible = value(&metrics, "mirrorhub_source_visible_bytes_total{source=\"filer-a\"}");
        assert!(visible >= 8.0 * 1024.0 * 1024.0, "{visible} bytes are visible");
        let lag = value(&metrics, "mirrorhub_source_lag_bytes{source=\"filer-a\"}");
        assert!(lag.abs() < 0.5, "lag of {lag} bytes after a checkpoint");
    }
    // Negative control: the tool does refuse what is no exposition format.
    assert!(promtool_accepts("mirrorhub bad{ 1\n").is_err());
}

#[test]
fn health_is_told_by_http_and_by_the_exit_code() {
    let mut cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    let check = |cluster: &Cluster| {
        let mut command = Command::new(crate::harness::BINARY);
        command.args(["status", "--check", "--config"]).arg(cluster.hub_config());
        try_run(&mut command).status.code()
    };
    let (status, body) = http_get(&cluster.hub_url("/healthz"));
    assert_eq!((status.as_str(), check(&cluster)), ("HTTP/1.1 200 OK", Some(0)), "{body}");
    cluster.kill_source("filer-a");
    crate::harness::wait_for("offline is shown", std::time::Duration::from_secs(10), || {
        cluster.on_hub("filer-a")["state"] == "offline"
    });
    let (status, body) = http_get(&cluster.hub_url("/healthz"));
    assert_eq!((status.as_str(), check(&cluster)), ("HTTP/1.1 503 Service Unavailable", Some(2)));
    assert!(body.contains("source-offline"), "{body}");
    cluster.kill_hub();
    assert_eq!(check(&cluster), Some(3), "nobody answers");
}

#[test]
fn the_status_document_over_http_is_that_of_the_command() {
    let cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    let (_, body) = http_get(&cluster.hub_url("/api/v1/status"));
    let over_http: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(over_http["schema"], 1);
    assert_eq!(over_http["sources"][0]["id"], cluster.hub_status()["sources"][0]["id"]);
}
