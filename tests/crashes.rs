//! kill -9 of either end at any moment under load: nothing acknowledged is lost, both ends meet.
//!
//! A kill leaves the page cache, so this shows recovery, not durability; `power` cuts the power.

use std::path::PathBuf;
use std::time::Duration;

use crate::harness::oracle::{Known, Writer};
use crate::harness::{Cluster, SourceSettings, is_full, wait_for};

fn socket(cluster: &Cluster, owner: &str) -> PathBuf {
    cluster.path(owner).join("nbd.sock")
}

/// After everything is quiet: the volume and the image hold every answered write, roots meet.
pub fn check(cluster: &mut Cluster, name: &str, known: &Known) {
    cluster.wait_in_sync(name);
    let export = format!("{name}/vol0");
    known.check_export(&socket(cluster, name), &export).expect("the volume has every write");
    let answer = cluster.checkpoint(name);
    let root = Cluster::root(&answer, "vol0");
    known.check_export(&socket(cluster, "hub"), &export).expect("the image has every write");
    let own = cluster.own_status(name);
    let own_root = own["volumes"][0]["root"].as_str().unwrap_or_default();
    assert_eq!(own_root, root, "roots meet");
}

fn settings() -> SourceSettings {
    SourceSettings::new("filer-a").interval("300ms")
}

fn repeat() -> u64 {
    if is_full() { 40 } else { 4 }
}

#[test]
fn the_source_is_killed_under_load() {
    let mut cluster = Cluster::start(&[settings()]);
    let mut known = Known::default();
    for round in 0..repeat() {
        let writer =
            Writer::start(socket(&cluster, "filer-a"), "filer-a/vol0", known, 16, round + 1);
        writer.wait_answered(200 + round * 170);
        cluster.kill_source("filer-a");
        known = writer.finish();
        cluster.start_source("filer-a");
        check(&mut cluster, "filer-a", &known);
    }
    assert!(known.answered() > 500, "the test wrote too little to show anything");
}

/// The hub dies and comes back: the client waits and sees no error.
#[test]
fn the_hub_is_killed_under_load_and_no_client_sees_it() {
    let mut cluster = Cluster::start(&[settings()]);
    let mut known = Known::default();
    for round in 0..repeat() {
        let writer =
            Writer::start(socket(&cluster, "filer-a"), "filer-a/vol0", known, 16, round + 77);
        writer.wait_answered(150 + round * 130);
        cluster.kill_hub();
        let before = writer.answered();
        cluster.start_hub();
        writer.wait_answered(before + 200);
        known = writer.finish();
        check(&mut cluster, "filer-a", &known);
    }
}

#[test]
fn both_ends_are_killed_at_once() {
    let mut cluster = Cluster::start(&[settings()]);
    let mut known = Known::default();
    for round in 0..repeat() {
        let writer =
            Writer::start(socket(&cluster, "filer-a"), "filer-a/vol0", known, 16, round + 991);
        writer.wait_answered(150 + round * 210);
        cluster.kill_hub();
        cluster.kill_source("filer-a");
        known = writer.finish();
        if round % 2 == 0 {
            cluster.start_hub();
            cluster.start_source("filer-a");
        } else {
            cluster.start_source("filer-a");
            cluster.start_hub();
        }
        check(&mut cluster, "filer-a", &known);
    }
}

/// A clean stop of either end drains and checkpoints; nothing is left to replay.
#[test]
fn a_clean_stop_leaves_nothing_behind() {
    let mut cluster = Cluster::start(&[settings()]);
    let writer = Writer::start(socket(&cluster, "filer-a"), "filer-a/vol0", Known::default(), 8, 5);
    writer.wait_answered(500);
    let known = writer.finish();
    assert!(cluster.stop_source("filer-a").success());
    let there = cluster.on_hub("filer-a");
    assert_eq!(there["state"], "offline");
    assert!(there["lag_bytes"].is_null(), "the hub cannot know what a source does alone: {there}");
    assert_eq!(there["visible_bytes"], there["staged_bytes"], "the last CP holds every write");
    known
        .check_export(&socket(&cluster, "hub"), "filer-a/vol0")
        .expect("the image has every write before the source is back");
    assert!(cluster.stop_hub().success());
    cluster.start_all();
    check(&mut cluster, "filer-a", &known);
}

/// Both partitions full while the hub is away: writes wait, none is lost, none fails.
#[test]
fn writes_wait_while_the_hub_is_away() {
    let settings = settings().nvram("16MiB").interval("1h");
    let mut cluster = Cluster::start(&[settings]);
    cluster.kill_hub();
    let writer =
        Writer::start(socket(&cluster, "filer-a"), "filer-a/vol0", Known::default(), 64, 3);
    // No write may be answered while the hub is away; that cannot be waited for, only observed.
    crate::harness::pause(Duration::from_secs(2));
    assert_eq!(writer.answered(), 0, "a write was acknowledged by one end alone");
    cluster.start_hub();
    writer.wait_answered(8000);
    let known = writer.finish();
    wait_for("a partition was full", Duration::from_secs(60), || {
        cluster.on_hub("filer-a")["applied_cp"].as_u64().unwrap_or_default() > 0
    });
    check(&mut cluster, "filer-a", &known);
}
