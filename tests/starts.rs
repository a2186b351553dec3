//! What keeps a process from starting: file, key and fix, and the exit code that tells a service
//! manager whether trying again can help.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::{BINARY, Cluster, Process, SourceSettings, status, try_run, wait_for};

const NAME: &str = "filer-a";

/// Starts with one text of the configuration replaced; exit code and what was said at the end.
fn started_with(role: &str, config: &Path, from: &str, to: &str) -> (Option<i32>, String) {
    let text = fs::read_to_string(config).expect("the configuration");
    assert!(text.contains(from), "nothing to replace in\n{text}");
    fs::write(config, text.replacen(from, to, 1)).expect("the configuration is changed");
    let ended = try_run(Command::new(BINARY).arg(role).arg("--config").arg(config));
    fs::write(config, text).expect("the configuration is put back");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    let at = said.find("error: ").unwrap_or_else(|| panic!("no error in\n{said}"));
    (ended.status.code(), said[at..].to_owned())
}

/// What contradicts the state that is there ends with 78, and says what was typed before.
#[test]
fn a_contradiction_names_file_key_and_fix() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new(NAME)]);
    cluster.start_source(NAME);
    let source = cluster.source_config(NAME);
    wait_for("the source answers", Duration::from_secs(20), || status(&source).is_some());
    assert!(cluster.stop_source(NAME).success());
    let file = source.display().to_string();
    for (from, to, fix) in [
        (
            "size = \"64MiB\"",
            "size = \"32MiB\"",
            "key `size` of [[volume]] vol0: \"64MiB\" or more",
        ),
        (
            "[nvram]\nsize = \"32MiB\"",
            "[nvram]\nsize = \"64MiB\"",
            "key `nvram.size`: size = \"32MiB\"",
        ),
        ("name = \"vol0\"", "name = \"vol1\"", "key `[[volume]]`: put name = \"vol0\" back"),
        ("unix:nbd.sock", "unix:none/nbd.sock", "key `nbd_listen`: a path in a directory"),
    ] {
        let (code, said) = started_with("source", &source, from, to);
        assert_eq!(code, Some(78), "{from} to {to}: {said}");
        assert!(said.contains(&file) && said.contains(fix), "{from} to {to}: {said}");
    }
    // Negative control: what may be different the next time is tried again.
    cluster.start_source(NAME);
    wait_for("the source answers", Duration::from_secs(20), || status(&source).is_some());
    let (code, said) = started_with("source", &source, NAME, NAME);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("stop the other process"), "{said}");
}

/// Goal: `events --follow` tells who did what with which result, what states did, and a restart of the
/// process, over which it goes on. Method: a checkpoint, a source that goes, a hub that is killed.
#[test]
fn events_are_followed_over_a_restart() {
    let mut cluster = Cluster::start(&[SourceSettings::new(NAME)]);
    let mut follow = Command::new(BINARY);
    follow.args(["events", "--follow", "--config"]).arg(cluster.hub_config());
    let follow = Process::start("events", cluster.path("events.txt"), &mut follow);
    let said = |what: &str| {
        wait_for(what, Duration::from_secs(30), || follow.output().contains(what));
    };
    cluster.checkpoint(NAME);
    said(&format!("checkpoint source={NAME}: done"));
    let refused = Command::new(BINARY)
        .args(["drop", "filer-a@none", "--yes", "--config"])
        .arg(cluster.hub_config())
        .output()
        .expect("the command");
    assert!(!refused.status.success());
    said("drop target=filer-a@none: ");
    cluster.kill_source(NAME);
    // It was seen in step, or only on the way there.
    said(" -> offline: the source is not connected");
    cluster.kill_hub();
    said("-- the process does not answer");
    cluster.start_hub();
    said("-- the process was started anew");
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    cluster.checkpoint(NAME);
    let text = follow.output();
    let behind = text.split("started anew").nth(1).expect("behind the restart").to_owned();
    assert!(!behind.contains("drop target"), "an event of before the restart: {text}");
    wait_for("the second checkpoint", Duration::from_secs(30), || {
        follow.output().matches(&format!("checkpoint source={NAME}: done")).count() == 2
    });
}
