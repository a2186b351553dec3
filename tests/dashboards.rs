//! Dashboards and alert rules: names held to the catalogue, every rule with a case that fires and
//! one that does not, and every query run in a real Prometheus that scrapes a real hub.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mirrorhub::cli::authority::Authority;
use mirrorhub::metric::catalogue::{ALL, Kind};
use serde_json::Value;

use crate::harness::{
    BINARY, Cluster, Process, SourceSettings, own_address, run, try_run, wait_for,
};
use crate::tls::{certified, replace};

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
    let (rules, config) = ("dashboards/alerts.yml", "config/prometheus.yml");
    for (command, file) in [("rules", rules), ("config", config)] {
        run(Command::new("promtool").args(["check", command]).arg(project(file)));
    }
    let tests = project("dashboards/alerts_test.yml");
    run(Command::new("promtool").args(["test", "rules"]).arg(tests));
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
    // Negative controls: a rule with another bound fails its cases, and so does one that takes what clients
    // write for the progress of a pass, or that does not wait.
    let resync = "rate(mirrorhub_source_resync_bytes_total{job=\"mirrorhub-hub\"}[10m]) == 0";
    let received = "(rate(mirrorhub_source_received_bytes_total[10m]) + \
                    rate(mirrorhub_source_resync_bytes_total[10m])) == 0";
    for (right, wrong) in [
        ("_image_age_seconds{job=\"mirrorhub-hub\"} > 300", "_image_age_seconds > 9e9"),
        (resync, received),
        (resync, "mirrorhub_source_resync_bytes_total >= 0"),
        ("state=\"waiting\"} == 1'\n        for: 1h", "state=\"waiting\"} == 1'\n        for: 1m"),
        ("state=\"waiting\"} == 1", "state=\"offline\"} == 1"),
    ] {
        assert_eq!(rules.matches(right).count(), 1, "{right}");
        assert!(!cases_pass(&rules.replace(right, wrong), &cases), "no case looks at {right:?}");
    }
}

/// Whether these rules do what these cases want.
fn cases_pass(rules: &str, cases: &str) -> bool {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("alerts.yml"), rules).expect("rules");
    let file = directory.path().join("alerts_test.yml");
    fs::write(&file, cases).expect("cases");
    try_run(Command::new("promtool").args(["test", "rules"]).arg(file)).status.success()
}

/// Address and port of a URL.
fn target(url: &str) -> String {
    let rest = url.strip_prefix("http://").expect("a plain URL");
    rest.split('/').next().expect("an address").to_owned()
}

fn of_hub(cluster: &Cluster) -> String {
    target(&cluster.hub_url("/metrics"))
}

fn of_source(cluster: &Cluster, name: &str) -> String {
    target(&cluster.source_url(name, "/metrics"))
}

/// A Prometheus of the test's own.
struct Prometheus {
    process: Process,
    address: SocketAddr,
}

impl Prometheus {
    /// Scrapes the cluster every second, under the jobs of `config/prometheus.yml`.
    fn start(cluster: &Cluster) -> Self {
        let sources: Vec<String> =
            cluster.source_names().iter().map(|n| of_source(cluster, n)).collect();
        let rules = project("dashboards/alerts.yml");
        let config = text("config/prometheus.yml")
            .replace("../dashboards/alerts.yml", &rules.to_string_lossy())
            .replace("127.0.0.1:7421", &of_hub(cluster))
            .replace("\"127.0.0.1:7422\"", &format!("\"{}\"", sources.join("\", \"")));
        Self::start_with(cluster, &config)
    }

    /// Scrapes every second instead of every ten, as that file says otherwise.
    fn start_with(cluster: &Cluster, config: &str) -> Self {
        let directory = cluster.path("prometheus");
        fs::create_dir_all(&directory).expect("directory");
        let config = config.replace("interval: 10s", "interval: 1s");
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

/// Its jobs, each under another name.
fn renamed(jobs: &str, front: &str) -> String {
    jobs.replace("job_name: mirrorhub-", &format!("job_name: {front}-"))
}

/// Goal: `config/prometheus-tls.yml` scrapes a hub that listens on all addresses and a filer of its list, with the
/// certificates that it says, also where both want to see one. Controls, as further jobs: without `server_name`
/// the hub is not trusted, without a certificate nobody answers.
#[test]
fn the_example_for_tls_scrapes_a_hub_and_the_filers_of_a_list() {
    let mut cluster = certified(&["filer-a"]);
    let hub = cluster.hub_config();
    // What a hub makes for itself that listens on "0.0.0.0".
    let made = Authority(&cluster.path("hub/state/tls"))
        .ensure_served("mirrorhub-hub", &[Ipv4Addr::UNSPECIFIED.into()]);
    made.expect("a certificate");
    replace(&hub, "[tls]", "[tls]\nhttp = \"mutual\"");
    let address = cluster.hub_address().ip().to_string();
    let certify = |directory: &str, arguments: &[&str]| {
        let mut command = Command::new(BINARY);
        command.arg("certify").arg(cluster.path(directory)).args(arguments);
        run(command.arg("--config").arg(&hub));
    };
    certify("filer-a/served", &["--for", &address]);
    certify("prometheus/mirrorhub", &[]);
    let door = "[tls]\nhttp = \"mutual\"\nserved_cert = \"served/served-cert.pem\"\n\
                served_key = \"served/served-key.pem\"";
    replace(&cluster.source_config("filer-a"), "[tls]", door);
    fs::create_dir(cluster.path("prometheus/mirrorhub/filers")).expect("a directory");
    let list = format!("- targets: [\"{}\"]\n", of_source(&cluster, "filer-a"));
    fs::write(cluster.path("prometheus/mirrorhub/filers/all.yml"), list).expect("a list");
    cluster.start_all();

    let example = text("config/prometheus-tls.yml")
        .replace("/usr/share/mirrorhub/dashboards", &project("dashboards").to_string_lossy())
        .replace("hub.example.net:7421", &of_hub(&cluster));
    let shows = example.replace("# cert_file", "cert_file").replace("# key_file", "key_file");
    let jobs = |config: &str| config.split_once("scrape_configs:\n").expect("jobs").1.to_owned();
    let nameless = jobs(&shows).replace("server_name: mirrorhub-hub", "");
    assert!(jobs(&shows).len() > nameless.len() && shows.len() < example.len());
    let controls = [renamed(&jobs(&example), "bare"), renamed(&nameless, "nameless")].concat();
    let prometheus = Prometheus::start_with(&cluster, &[shows, controls].concat());
    let up = "count(up{job=~\"mirrorhub-hub|mirrorhub-source|nameless-source\"} == 1) == 3";
    prometheus.answers("all are scraped", up);
    for job in ["hub", "source"] {
        let query = format!("mirrorhub_build_info{{job=\"mirrorhub-{job}\",role=\"{job}\"}}");
        prometheus.answers("what is scraped", &query);
    }
    let down = "count(max_over_time(up{job=~\"bare-hub|bare-source|nameless-hub\"}[1m]) == 0) == 3";
    let often = "min(count_over_time(up{job=~\"bare-.*|nameless-hub\"}[1m])) > 2";
    prometheus.answers("the controls are tried", often);
    prometheus.answers("and not scraped", down);
    drop(prometheus.process);
}
