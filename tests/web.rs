//! HTTP of both ends: metrics that Prometheus' own tool accepts, health, the status document.

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use mirrorhub::metric::catalogue::{
    self as names, ALL, CHECKPOINT_PHASES, DEVICES, Kind, Metric, STATES, STEPS, Values,
};
use mirrorhub::units::convert::to_f64;
use mirrorhub::units::machine;
use serde_json::Value;

use crate::harness::terminal::before_terminal;
use crate::harness::{BINARY, Cluster, SourceSettings, http_get, run, try_run, wait_for};

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

/// `status --watch`: with `--json` on a pipe, and before a person, by a terminal's script.
struct Watched {
    json: Child,
    lines: Lines<BufReader<ChildStdout>>,
    person: Child,
    seen: Lines<BufReader<ChildStdout>>,
}

/// Sees the first state and the second, each over what was there; then has enough.
const PERSON: &str = r#"
begin(30, 120, sys.argv[1:])
for state in (b"in-sync", b"offline"):
    read(state)
    print(state.decode(), flush=True)
    assert seen.startswith(b"\x1b[H"), seen
    assert b"\x1b[J" in seen or not read(b"\x1b[J"), seen
os.kill(child, 2)
ended()
"#;

impl Watched {
    fn start(cluster: &Cluster) -> Self {
        let watch = ["status", "--watch", "--config"];
        let mut json = Command::new(BINARY);
        json.args(watch).arg(cluster.hub_config()).arg("--json").stdout(Stdio::piped());
        let mut json = json.stderr(Stdio::null()).spawn().expect("status --watch");
        let lines = BufReader::new(json.stdout.take().expect("stdout")).lines();
        let mut person = before_terminal(&cluster.path("watch.py"), PERSON);
        person.arg(BINARY).args(watch).arg(cluster.hub_config());
        let mut person = person.stdout(Stdio::piped()).spawn().expect("python3");
        let seen = BufReader::new(person.stdout.take().expect("stdout")).lines();
        Self { json, lines, person, seen }
    }

    /// Each line is the whole document; the source is so in one of the next.
    fn waits_for(&mut self, state: &str) {
        let shown = self.lines.by_ref().take(60).any(|line| {
            let document: Value = serde_json::from_str(&line.expect("a line")).expect("JSON");
            assert_eq!(
                (&document["schema"], &document["sources"][0]["name"]),
                (&1.into(), &"filer-a".into())
            );
            document["sources"][0]["state"] == state
        });
        assert!(shown, "{state} is not shown");
        let seen = self.seen.next().expect("a person sees it too").expect("a line");
        assert_eq!(seen, state);
    }

    /// For a program that reads it nobody there is an end; a person was shown both states.
    fn ends_without_an_answer(mut self) {
        assert_eq!(self.lines.find_map(Result::err).map(|error| error.kind()), None);
        assert_eq!(self.json.wait().expect("it ends").code(), Some(3), "nobody answers");
        assert!(self.person.wait().expect("the script ends").success());
    }
}

#[test]
fn health_is_told_by_http_and_by_the_exit_code() {
    let mut cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    let check = |cluster: &Cluster| {
        let mut command = Command::new(BINARY);
        command.args(["status", "--check", "--config"]).arg(cluster.hub_config());
        try_run(&mut command).status.code()
    };
    let (status, body) = http_get(&cluster.hub_url("/healthz"));
    assert_eq!((status.as_str(), check(&cluster)), ("HTTP/1.1 200 OK", Some(0)), "{body}");
    let mut watched = Watched::start(&cluster);
    watched.waits_for("in-sync");
    cluster.kill_source("filer-a");
    wait_for("offline is shown", Duration::from_secs(30), || {
        cluster.on_hub("filer-a")["state"] == "offline"
    });
    let (status, body) = http_get(&cluster.hub_url("/healthz"));
    assert_eq!((status.as_str(), check(&cluster)), ("HTTP/1.1 503 Service Unavailable", Some(2)));
    assert!(body.contains("source-offline"), "{body}");
    watched.waits_for("offline");
    cluster.kill_hub();
    watched.ends_without_an_answer();
    assert_eq!(check(&cluster), Some(3), "nobody answers");
}

#[test]
fn the_status_document_over_http_is_that_of_the_command() {
    let cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    let (_, body) = http_get(&cluster.hub_url("/api/v1/status"));
    let over_http: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(over_http["schema"], 1);
    assert_eq!(over_http["sources"][0]["id"], cluster.hub_status()["sources"][0]["id"]);
}

/// What the hub alone can know.
const OF_THE_HUB: [&Metric; 12] = [
    &names::CONNECTIONS_REFUSED,
    &names::SOURCE_DRAINED_BYTES,
    &names::SOURCE_APPLIED_BYTES,
    &names::SOURCE_RECEIVED_BYTES,
    &names::ACTOR_RESTARTS,
    &names::SOURCE_DRILL_TIME,
    &names::SOURCE_WRITE_SHARE,
    &names::DRAIN_SECONDS,
    &names::SOURCE_LOG_BYTES,
    &names::SOURCE_RESYNC_BYTES,
    &names::HOOK_RUNS,
    &names::RETENTION,
];
/// What the source alone can know: the hub learns of no policy.
const OF_THE_SOURCE: [&Metric; 1] = [&names::SOURCE_POLICY];

/// Series of the catalogue that are not on a page.
fn lacking(page: &str, hub: bool) -> Vec<String> {
    let mut lacking = Vec::new();
    for metric in ALL {
        let elsewhere = if hub { &OF_THE_SOURCE[..] } else { &OF_THE_HUB[..] };
        if elsewhere.iter().any(|other| other.name == metric.name) {
            continue;
        }
        let name = match metric.kind {
            Kind::Histogram { .. } => format!("{}_count", metric.name),
            Kind::Counter | Kind::Gauge => metric.name.to_owned(),
        };
        let series = |label: &str| {
            let of = |line: &&str| line.starts_with(&name) && line[name.len()..].contains(label);
            page.lines().any(|line| of(&line) && line[name.len()..].starts_with(['{', ' ']))
        };
        let words = metric.labels.iter().find_map(|label| match label.values {
            Values::Closed(words) => Some((label.name, words)),
            Values::Sources | Values::Volumes | Values::One => None,
        });
        let Some((label, words)) = words else {
            if !series("") {
                lacking.push(name);
            }
            continue;
        };
        for word in words {
            // A source has no source logs, a hub is never fenced.
            // Of a source's writes only the hub knows what became of them in between.
            let none = match *word {
                "log" => !hub && words == DEVICES,
                "fenced" => hub && words == STATES,
                "drained" | "applied" => !hub && words == STEPS,
                // What it is sent is frozen and planned.
                "freeze" | "plan" => hub && words == CHECKPOINT_PHASES,
                _ => false,
            };
            if !none && !series(&format!("{label}=\"{word}\"")) {
                lacking.push(format!("{name} {label}={word}"));
            }
        }
    }
    lacking
}

/// Goal: no metric of the catalogue is a name that nothing sets, and nothing is set that is not in
/// it; what was done shows in those that count it.
#[test]
fn every_metric_of_the_catalogue_is_on_the_page_of_its_process() {
    let cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    let volume = cluster.volume("filer-a", "vol0");
    for command in ["write -P 1 0 8M", "flush", "discard 4M 1M", "read 0 64k"] {
        run(Command::new("qemu-io").args(["-f", "raw", "-c", command, &volume]));
    }
    cluster.checkpoint("filer-a");
    let (_, hub) = http_get(&cluster.hub_url("/metrics"));
    // The CP's own end at the source comes behind the hub's word that it is published.
    let mut source = String::new();
    wait_for("the source has counted its CP", Duration::from_secs(30), || {
        (_, source) = http_get(&cluster.source_url("filer-a", "/metrics"));
        source.contains("mirrorhub_checkpoint_duration_seconds_count")
    });
    assert_eq!(lacking(&hub, true), Vec::<String>::new(), "on the hub");
    let mut on_source = lacking(&source, false);
    on_source.retain(|name| name != names::SOURCE_POLICY.name);
    assert_eq!(on_source, Vec::<String>::new(), "on the source");
    for page in [&hub, &source] {
        for line in page.lines().filter(|line| line.starts_with("# TYPE ")) {
            let name = line.split_whitespace().nth(2).expect("a name");
            assert!(ALL.iter().any(|metric| metric.name == name), "{name} is not in the catalogue");
        }
        for counted in [
            "mirrorhub_nvram_commit_duration_seconds_count",
            "mirrorhub_nvram_commit_batch_bytes_count",
            "mirrorhub_nvram_commit_batch_records_count",
            "mirrorhub_checkpoint_duration_seconds_count",
            "mirrorhub_checkpoint_phase_duration_seconds_count{phase=\"build\"}",
            "mirrorhub_checkpoint_phase_duration_seconds_count{phase=\"publish\"}",
            "mirrorhub_ack_duration_seconds_count",
            "mirrorhub_source_checkpoint_timestamp_seconds{source=\"filer-a\"}",
            "mirrorhub_device_syncs_total{device=\"nvram\"}",
            "mirrorhub_device_syncs_total{device=\"pool\"}",
        ] {
            assert!(value(page, counted) >= 1.0, "{counted} in\n{page}");
        }
    }
    for counted in [
        "mirrorhub_client_write_duration_seconds_count",
        "mirrorhub_nbd_requests_total{command=\"write\"}",
        "mirrorhub_nbd_requests_total{command=\"read\"}",
        "mirrorhub_nbd_requests_total{command=\"trim\"}",
    ] {
        assert!(value(&source, counted) >= 1.0, "{counted} in\n{source}");
    }
    assert!(value(&hub, "mirrorhub_drain_duration_seconds_count") >= 1.0);
    let share = value(&hub, "mirrorhub_source_write_share_ratio{source=\"filer-a\"}");
    assert!((share - 1.0).abs() < 1e-9, "the only source has {share} of the writes");
    a_drill_is_shown_for_good(cluster);
    // Negative control: a series that is gone is missed.
    let less: Vec<&str> = hub.lines().filter(|line| !line.contains("device=\"log\"")).collect();
    assert_eq!(lacking(&less.join("\n"), true).len(), 2);
}

/// Failover that is tried and would do is a drill: told by the time of day, by the next process too.
fn a_drill_is_shown_for_good(mut cluster: Cluster) {
    let last = |cluster: &Cluster| {
        let (_, page) = http_get(&cluster.hub_url("/metrics"));
        value(&page, "mirrorhub_source_drill_timestamp_seconds{source=\"filer-a\"}")
    };
    assert!(last(&cluster).is_nan(), "there was none");
    let drill = |source: &str| {
        let mut tried = Command::new(BINARY);
        tried.args(["failover", source, "--dry-run", "--config"]).arg(cluster.hub_config());
        try_run(&mut tried).status.success()
    };
    assert!(!drill("filer-z") && last(&cluster).is_nan(), "a refusal is none");
    assert!(drill("filer-a"));
    let at = last(&cluster);
    let now = to_f64(machine::unix_seconds().unsigned_abs());
    assert!((now - at).abs() < 60.0, "{at} and {now}");
    cluster.kill_hub();
    cluster.start_hub();
    assert!((last(&cluster) - at).abs() < 0.5, "a restart knows it");
}

/// Each end counts the time in which it does not hear the other: nobody knows then whether the
/// image still equals the source, however little there was to write.
#[test]
fn the_age_of_an_image_counts_silence_at_both_ends() {
    let mut cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    run(Command::new("qemu-io").args([
        "-f",
        "raw",
        "-c",
        "write -P 1 0 1M",
        &cluster.volume("filer-a", "vol0"),
    ]));
    cluster.checkpoint("filer-a");
    let age = |entry: &Value| entry["image_age_seconds"].as_f64().expect("an age");
    let own = cluster.own_status("filer-a");
    assert!(age(&own) < 0.001, "idle and in sync: {own}");
    assert!(own["drained_bytes"].is_null() && own["applied_bytes"].is_null(), "{own}");
    let there = cluster.on_hub("filer-a");
    for cursor in ["drained_bytes", "applied_bytes", "visible_bytes"] {
        assert!(there[cursor].as_u64() >= Some(1 << 20), "{cursor}: {there}");
    }
    cluster.kill_hub();
    wait_for("the source counts", Duration::from_secs(20), || {
        age(&cluster.own_status("filer-a")) > 1.0
    });
    // A hub that has not heard the source since its own start cannot know better.
    cluster.kill_source("filer-a");
    cluster.start_hub();
    wait_for("the hub counts", Duration::from_secs(20), || age(&cluster.on_hub("filer-a")) > 1.0);
}
