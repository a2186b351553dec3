//! Dashboards and alert rules: names held to the catalogue, every rule with a case that fires and
//! one that does not, and every query run in a real Prometheus that scrapes a real hub.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mirrorhub::metric::catalogue::{ALL, Kind};
use serde_json::Value;

use crate::harness::{Cluster, Process, SourceSettings, own_address, run, try_run, wait_for};

/// The runbook, as the package installs it.
const RUNBOOK: &str = "/usr/share/doc/mirrorhub/docs/alerts.md";
const BOARDS: [&str; 3] = ["fleet", "source", "hub"];

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn text(path: &str) -> String {
    fs::read_to_string(project(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn board(name: &str) -> Value {
    serde_json::from_str(&text(&format!("dashboards/{name}.json"))).expect("JSON")
}

/// All queries of a dashboard, each with its panel's title.
fn queries(board: &Value) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for panel in board["panels"].as_array().expect("panels") {
        let title = panel["title"].as_str().expect("a title").to_owned();
        for target in panel["targets"].as_array().into_iter().flatten() {
            found.push((title.clone(), target["expr"].as_str().expect("a query").to_owned()));
        }
    }
    found
}

/// The rules of `alerts.yml`: name and expression. Promtool has checked that it is YAML.
fn rules() -> Vec<(String, String)> {
    let text = text("dashboards/alerts.yml");
    let mut rules: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.trim().strip_prefix("- alert: ") {
            rules.push((name.to_owned(), String::new()));
        } else if let Some(expr) = line.trim().strip_prefix("expr: ") {
            let quoted = expr.strip_prefix('\'').and_then(|expr| expr.strip_suffix('\''));
            let expr = quoted.expect("an expression in single quotes").replace("''", "'");
            rules.last_mut().expect("an alert comes first").1 = expr;
        }
    }
    assert!(rules.iter().all(|(_, expr)| !expr.is_empty()));
    rules
}

/// Names of this program's metrics in a query, as written.
fn metrics_in(query: &str) -> BTreeSet<String> {
    query
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("mirrorhub_"))
        .map(str::to_owned)
        .collect()
}

/// Whether the catalogue has a series of that name.
fn is_catalogued(series: &str) -> bool {
    ALL.iter().any(|metric| match metric.kind {
        Kind::Histogram { .. } => ["_bucket", "_sum", "_count"]
            .iter()
            .any(|end| series.strip_suffix(end) == Some(metric.name)),
        Kind::Counter | Kind::Gauge => series == metric.name,
    })
}

#[test]
fn every_name_is_in_the_catalogue_and_every_metric_is_shown_somewhere() {
    let mut used = BTreeSet::new();
    let mut all: Vec<(String, String)> = rules();
    for name in BOARDS {
        let board = board(name);
        assert_eq!(board["uid"], format!("mirrorhub-{name}"));
        let found = queries(&board);
        assert!(found.len() > 10, "{name} has {} queries", found.len());
        all.extend(found);
    }
    for (place, query) in all {
        for series in metrics_in(&query) {
            assert!(is_catalogued(&series), "{place} asks for {series}, which nobody sets");
            used.insert(series);
        }
    }
    for metric in ALL {
        let shown = used.iter().any(|series| series.starts_with(metric.name));
        assert!(shown, "{} is on no dashboard and in no rule", metric.name);
    }
    // Negative control: what is not in the catalogue is seen.
    assert!(!is_catalogued("mirrorhub_source_lag"));
    assert!(
        !is_catalogued("mirrorhub_checkpoint_duration_seconds"),
        "a histogram has no plain one"
    );
    assert_eq!(metrics_in("sum(mirrorhub_x{a=\"mirrorhub\"}) / y").len(), 1);
}

#[test]
fn every_rule_fires_when_it_should_is_quiet_otherwise_and_has_a_page() {
    for (command, file) in [("rules", "dashboards/alerts.yml"), ("config", "config/prometheus.yml")]
    {
        run(Command::new("promtool").args(["check", command]).arg(project(file)));
    }
    run(Command::new("promtool")
        .args(["test", "rules"])
        .arg(project("dashboards/alerts_test.yml")));
    let (cases, page) = (text("dashboards/alerts_test.yml"), text("docs/alerts.md"));
    let rules = text("dashboards/alerts.yml");
    for (name, _) in self::rules() {
        for case in ["fires", "is quiet"] {
            assert!(cases.contains(&format!("- name: {name} {case}\n")), "no case: {name} {case}");
        }
        assert!(page.contains(&format!("## {name}\n")), "{name} has no section in docs/alerts.md");
        let link = format!("runbook_url: {RUNBOOK}#{}\n", name.to_lowercase());
        assert!(rules.contains(&link), "{name} has no link to its section");
    }
    // The links are followed on a machine with the package.
    let installed =
        format!("[\"docs/*.md\", \"{}/\"", &RUNBOOK[1..RUNBOOK.len() - "/alerts.md".len()]);
    assert!(text("Cargo.toml").contains(&installed), "the package has no {RUNBOOK}");
    for link in page.split("operations.md#").skip(1) {
        let anchor = link.split(')').next().expect("the end of a link");
        let headings = text("docs/operations.md");
        let headings = headings.lines().filter_map(|line| line.strip_prefix("##"));
        let mut headings = headings.map(|line| line.trim_start_matches('#').trim_start());
        let anchored =
            |heading: &str| heading.to_lowercase().replace([':', ','], "").replace(' ', "-");
        assert!(headings.any(|heading| anchored(heading) == anchor), "no section {anchor}");
    }
    // Negative control: a rule with another bound fails its cases.
    let spoiled = tempfile::tempdir().expect("a directory");
    let wrong = rules
        .replace("_image_age_seconds{job=\"mirrorhub-hub\"} > 300", "_image_age_seconds > 9e9");
    assert_ne!(wrong, rules);
    fs::write(spoiled.path().join("alerts.yml"), wrong).expect("rules");
    fs::write(spoiled.path().join("alerts_test.yml"), cases).expect("cases");
    let tested = try_run(
        Command::new("promtool")
            .args(["test", "rules"])
            .arg(spoiled.path().join("alerts_test.yml")),
    );
    assert!(!tested.status.success(), "the cases do not look at the bound");
}

/// A Prometheus of the test's own.
struct Prometheus {
    process: Process,
    address: SocketAddr,
}

impl Prometheus {
    /// Scrapes the cluster every second, under the jobs of `config/prometheus.yml`.
    fn start(cluster: &Cluster) -> Self {
        let directory = cluster.path("prometheus");
        fs::create_dir(&directory).expect("directory");
        let target = |url: String| {
            let rest = url.strip_prefix("http://").expect("a plain URL");
            rest.split('/').next().expect("an address").to_owned()
        };
        let source = |name: &String| target(cluster.source_url(name, "/metrics"));
        let sources: Vec<String> = cluster.source_names().iter().map(source).collect();
        let example = text("config/prometheus.yml");
        let rules = project("dashboards/alerts.yml");
        let config = example
            .replace("interval: 10s", "interval: 1s")
            .replace("../dashboards/alerts.yml", &rules.to_string_lossy())
            .replace("127.0.0.1:7421", &target(cluster.hub_url("/metrics")))
            .replace("\"127.0.0.1:7422\"", &format!("\"{}\"", sources.join("\", \"")));
        fs::write(directory.join("prometheus.yml"), config).expect("config");
        let address = SocketAddr::from((own_address(&directory), 9090));
        let process = Process::start(
            "prometheus",
            cluster.path("prometheus.log"),
            Command::new("prometheus")
                .arg(format!("--config.file={}", directory.join("prometheus.yml").display()))
                .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
                .arg(format!("--web.listen-address={address}")),
        );
        wait_for("Prometheus listens", Duration::from_secs(30), || {
            TcpStream::connect(address).is_ok()
        });
        Self { process, address }
    }

    /// The series that a query has now; an error is one of Prometheus' own, with the query.
    fn ask(&self, query: &str) -> Result<Vec<Value>, String> {
        let url = format!("http://{}", self.address);
        let mut tool = Command::new("promtool");
        let output = try_run(tool.args(["query", "instant", "-o", "json", &url, query]));
        if !output.status.success() {
            return Err(format!("{query}: {}", String::from_utf8_lossy(&output.stderr)));
        }
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        Ok(answer.as_array().expect("series").clone())
    }

    /// Waits until a query has data.
    fn answers(&self, place: &str, query: &str) {
        wait_for(&format!("{place}: data for {query}"), Duration::from_secs(20), || {
            !self.ask(query).expect("a query that Prometheus takes").is_empty()
        });
    }
}

#[test]
fn every_query_has_data_in_a_real_prometheus_and_no_rule_fires_on_a_healthy_hub() {
    let sources = [SourceSettings::new("filer-a"), SourceSettings::new("filer-b")];
    let cluster = Cluster::start(&sources);
    let prometheus = Prometheus::start(&cluster);
    for name in ["filer-a", "filer-b"] {
        let volume = cluster.volume(name, "vol0");
        run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 1 0 4M", &volume]));
        cluster.checkpoint(name);
        let image = cluster.image(name, "vol0");
        run(Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read -P 1 0 4M", &image]));
    }
    prometheus.answers("all are scraped", "count(up == 1) == 3");
    for name in BOARDS {
        for (title, query) in queries(&board(name)) {
            let query = query.replace("$hub", ".+").replace("$source", "filer-a");
            prometheus.answers(&format!("{name}: {title}"), &query);
        }
    }
    for (name, query) in rules() {
        // Quiet although there is something to look at.
        let found = prometheus.ask(&query).expect("a rule that Prometheus takes");
        assert!(found.is_empty(), "{name} fires on a healthy hub: {found:?}");
        for series in metrics_in(&query) {
            prometheus.answers(&name, &series);
        }
    }
    // Negative controls: a query for nothing has nothing, a wrong one is an error.
    assert_eq!(prometheus.ask("mirrorhub_nothing_total").expect("a query").len(), 0);
    assert!(prometheus.ask("sum by (").is_err());
    drop(prometheus.process);
}
