//! Real processes that read their files again: what a source promises changes while clients write.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::crowd::crowded;
use crate::failover::fail_over;
use crate::harness::oracle::{Known, Writer};
use crate::harness::{BINARY, Cluster, SourceSettings, http_get, status, try_run, wait_for};
use crate::outage::{socket, wire_bytes};

const LIMIT: Duration = Duration::from_secs(30);
const SYNC: &str = "mode = \"sync\"\non_hub_loss = \"stop\"\nhub_timeout = \"2s\"";
const ASYNC: &str = "mode = \"async\"\nhub_timeout = \"2s\"";
const CP_ONLY: &str = "mode = \"cp-only\"\nhub_timeout = \"2s\"";

/// Replaces a part of a file, as an editor does: a new file with the old name.
fn edit(file: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(file).expect("the file");
    assert!(text.contains(from), "{from:?} is not in {text}");
    let new = file.with_extension("new");
    fs::write(&new, text.replacen(from, to, 1)).expect("the new file");
    fs::rename(&new, file).expect("renamed");
}

/// `config diff` of the process with that file.
fn diff(config: &Path) -> Value {
    let output =
        try_run(Command::new(BINARY).args(["config", "diff", "--json", "--config"]).arg(config));
    serde_json::from_slice(&output.stdout).expect("JSON of config diff")
}

fn change_to(cluster: &Cluster, from: &str, to: &str) {
    edit(&cluster.source_config("filer-a"), from, to);
    cluster.signal_source("filer-a", "HUP");
}

/// Both ends show this mode, and nothing follows.
fn wait_mode(cluster: &Cluster, mode: &str) {
    wait_for(&format!("{mode} on both ends"), LIMIT, || {
        let own = status(&cluster.source_config("filer-a"));
        let own = own.map(|own| own["source"].clone()).unwrap_or_default();
        own["policy"]["mode"] == mode
            && own.get("policy_next").is_none()
            && cluster.on_hub("filer-a")["policy"]["mode"] == mode
    });
}

/// Goal: through every change under load no write is lost that was answered, both ends agree on what
/// is promised, and the last promise is kept. Method: a writer goes on through all of it; at the
/// end the source runs under sync, is killed, and its image must have every answered write.
#[test]
fn what_a_source_promises_changes_under_load() {
    let settings = SourceSettings::new("filer-a").replication(SYNC).interval("500ms");
    let mut cluster = Cluster::start(&[settings]);
    let own = socket(&cluster, "filer-a");
    let writer = Writer::start(own, "filer-a/vol0", Known::default(), 16, 0xc0de);
    writer.wait_answered(200);
    let changes =
        [(SYNC, ASYNC), (ASYNC, CP_ONLY), (CP_ONLY, SYNC), (SYNC, CP_ONLY), (CP_ONLY, ASYNC)];
    for (from, to) in changes.into_iter().chain([(ASYNC, SYNC)]) {
        change_to(&cluster, from, to);
        let mode = to.split('"').nth(1).expect("a mode");
        wait_mode(&cluster, mode);
        writer.wait_answered(writer.answered() + 100);
    }
    cluster.kill_source("filer-a");
    let known = writer.finish();
    let answer = fail_over(&cluster, "filer-a", &["--now"]);
    assert_eq!(answer["may_be_lost"], false, "{answer}");
    known.check_export(&socket(&cluster, "hub"), "filer-a/vol0").expect("every answered write");
    println!("{} writes answered through six changes of policy", known.answered());
}

/// A scrape shows one policy of the source, and no more series of it than it may have.
fn only_this_policy(cluster: &Cluster, mode: &str) {
    let shown = format!("mirrorhub_source_policy_info{{source=\"filer-a\",mode=\"{mode}\"");
    wait_for(&format!("{mode} alone is shown"), LIMIT, || {
        let (_, page) = http_get(&cluster.hub_url("/metrics"));
        let all = page.lines().filter(|line| line.starts_with("mirrorhub_source_policy_info{"));
        let all: Vec<&str> = all.collect();
        let alone = all.len() == 1 && all[0].starts_with(&shown);
        assert!(!alone || crowded(&page).is_empty(), "{page}");
        alone
    });
}

/// Goal: after a change to async the hub says that writes may be lost; the negative control of the
/// test above. Method: the same change, then a kill.
#[test]
fn behind_a_change_to_async_the_hub_promises_nothing() {
    let mut cluster = Cluster::start(&[SourceSettings::new("filer-a").replication(SYNC)]);
    only_this_policy(&cluster, "sync");
    change_to(&cluster, SYNC, ASYNC);
    wait_mode(&cluster, "async");
    only_this_policy(&cluster, "async");
    cluster.kill_source("filer-a");
    let answer = fail_over(&cluster, "filer-a", &["--now"]);
    assert_eq!(answer["may_be_lost"], true, "{answer}");
}

/// Goal: killed at any time between the reload and the moment that both ends agree, a source comes
/// back with the policy of its file. Method: the hub stands still while the change is under way.
#[test]
fn killed_in_the_middle_of_a_change_both_ends_agree() {
    let mut cluster = Cluster::start(&[SourceSettings::new("filer-a").replication(SYNC)]);
    for (from, to, mode) in [(SYNC, ASYNC, "async"), (ASYNC, SYNC, "sync")] {
        cluster.signal_hub("STOP");
        change_to(&cluster, from, to);
        wait_for("the change shows", LIMIT, || {
            cluster.own_status("filer-a")["policy_next"]["mode"] == mode
        });
        cluster.kill_source("filer-a");
        cluster.signal_hub("CONT");
        cluster.start_source("filer-a");
        wait_mode(&cluster, mode);
        cluster.wait_in_sync("filer-a");
    }
}

/// What `config diff` says is what the reload does; what needs a restart is named and stays.
#[test]
fn a_reload_takes_what_it_can_and_names_the_rest() {
    let cluster = Cluster::start(&[SourceSettings::new("filer-a").replication(SYNC)]);
    let config = cluster.source_config("filer-a");
    assert_eq!(diff(&config)["changes"], Value::Array(Vec::new()), "nothing was changed");
    edit(&config, SYNC, "mode = \"cp-only\"");
    edit(&config, "interval = \"1h\"", "interval = \"200ms\"");
    edit(&config, "size = \"32MiB\"", "size = \"64MiB\"");
    let said = diff(&config);
    let when = |key: &str| {
        let all = said["changes"].as_array().expect("changes");
        all.iter().find(|one| one["key"] == key).map(|one| one["when"].clone())
    };
    assert_eq!(when("replication.mode"), Some("next-cp".into()), "{said}");
    assert_eq!(when("replication.apply"), Some("next-cp".into()), "{said}");
    assert_eq!(when("checkpoint.interval"), Some("now".into()), "{said}");
    assert_eq!(when("nvram.size"), Some("restart".into()), "{said}");
    assert_eq!(when("replication.ack"), None, "it is the same");
    cluster.signal_source("filer-a", "HUP");
    wait_mode(&cluster, "cp-only");
    let left = diff(&config);
    let keys: Vec<&Value> =
        left["changes"].as_array().expect("changes").iter().map(|one| &one["key"]).collect();
    assert_eq!(keys, ["nvram.size"], "only what needs a restart is left");
    let shown = status(&config).expect("status");
    assert_eq!(shown["config"]["needs_restart"][0]["key"], "nvram.size", "{shown}");
    assert_eq!(shown["health"]["reasons"][0]["code"], "restart-needed", "{shown}");
    // The interval is in force: a write is on the hub without a command.
    let before = wire_bytes(&cluster);
    let writer = Writer::start(socket(&cluster, "filer-a"), "filer-a/vol0", Known::default(), 4, 3);
    writer.wait_answered(50);
    let known = writer.finish();
    wait_for("a CP by the new interval", LIMIT, || {
        known.check_export(&socket(&cluster, "hub"), "filer-a/vol0").is_ok()
    });
    assert!(wire_bytes(&cluster) > before);
}

/// A file that is wrong changes nothing: log, status and `config diff` name file, line, key and fix.
#[test]
fn a_bad_file_changes_nothing_and_is_named() {
    let mut cluster = Cluster::start(&[SourceSettings::new("filer-a").replication(SYNC)]);
    let config = cluster.source_config("filer-a");
    edit(&config, "mode = \"sync\"", "mode = \"rapid\"");
    edit(&config, "interval = \"1h\"", "interval = \"soon\"");
    cluster.signal_source("filer-a", "HUP");
    let mut shown = Value::Null;
    wait_for("status shows it", LIMIT, || {
        shown = status(&config).expect("status");
        shown.get("config").is_some()
    });
    let problems = shown["config"]["problems"].as_array().expect("problems").clone();
    assert_eq!(problems, *diff(&config)["problems"].as_array().expect("problems"));
    let text = fs::read_to_string(&config).expect("the file");
    let lines: Vec<&str> = text.lines().collect();
    for (key, wrong) in [("replication.mode", "rapid"), ("checkpoint.interval", "soon")] {
        let found = problems.iter().find(|one| one["key"] == key).expect("the problem");
        let line = usize::try_from(found["line"].as_u64().expect("a line")).expect("small");
        assert!(lines[line - 1].contains(wrong), "line {line}: {:?}", lines[line - 1]);
        assert!(found["file"].as_str().is_some_and(|file| file.ends_with("source.toml")));
        assert!(!found["fix"].as_str().expect("a fix").is_empty());
    }
    assert_eq!(shown["health"]["reasons"][0]["code"], "config-refused", "{shown}");
    let log = cluster.source_process("filer-a").output();
    assert!(log.contains("nothing was reloaded") && log.contains("replication.mode"), "{log}");
    assert_eq!(shown["source"]["policy"]["mode"], "sync");
    // Mended, it is taken, and nobody is told of it any more.
    edit(&config, "mode = \"rapid\"\non_hub_loss = \"stop\"", "mode = \"async\"");
    edit(&config, "interval = \"soon\"", "interval = \"2h\"");
    cluster.signal_source("filer-a", "HUP");
    wait_mode(&cluster, "async");
    assert!(status(&config).expect("status").get("config").is_none());
}
