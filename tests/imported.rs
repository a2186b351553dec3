//! The state directory of a hub is deleted: `mirrorhub import` finds it again on the devices of its pool.
//!
//! Images and kept CPs are all there; what was acknowledged behind them is sent again by sources that
//! live, and is named by a failover where none does.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mirrorhub::nbd::client::Client;
use serde_json::Value;

use crate::crashes::check;
use crate::failover::{check_hub, fail_over, failing};
use crate::harness::oracle::{Known, Writer};
use crate::harness::{Cluster, command, wait_for};
use crate::outage::socket;

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const LIMIT: Duration = Duration::from_secs(30);
const DISKS: [&str; 3] = ["disk0", "disk1", "disk2"];

/// The pool of an end on `parity1`, outside its state directory; `more` replaces the line before.
fn outside(file: &Path, devices: &[&str], more: &str) {
    let text = fs::read_to_string(file).expect("a configuration");
    let (before, rest) = text.split_once("[pool]\n").expect("a pool");
    let mut after = rest.split_inclusive('\n').skip_while(|line| !line.starts_with("[["));
    let after: String = after.by_ref().collect();
    let device = |name: &&str| format!("{{ path = \"disks/{name}\", size = \"256MiB\" }}");
    let list = devices.iter().map(device).collect::<Vec<_>>().join(", ");
    let before = before.split(MORE).next().expect("a first part");
    let pool = format!("{MORE}{more}[pool]\nraid = \"parity1\"\ndevices = [{list}]\n");
    fs::write(file, format!("{before}{pool}{after}")).expect("a configuration");
}

const MORE: &str = "# as this test wants it\n";

/// Runs `mirrorhub ARGUMENTS --config CONFIG`.
fn import(cluster: &Cluster, arguments: &[&str]) -> Value {
    let output = command(&cluster.hub_config(), &[&["import", "--json"], arguments].concat());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "import {arguments:?}: {error}");
    serde_json::from_slice(&output.stdout).expect("JSON of import")
}

fn refused(config: &Path, arguments: &[&str]) -> String {
    let output = command(config, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?} is not refused");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn state(cluster: &Cluster, end: &str) -> PathBuf {
    cluster.path(end).join("state")
}

/// When each device of the hub was last written to.
fn written(cluster: &Cluster) -> Vec<SystemTime> {
    let disks = cluster.path("hub/disks");
    let files = fs::read_dir(disks).expect("the disks").map(|file| file.expect("a disk").path());
    let mut files: Vec<PathBuf> = files.collect();
    files.sort();
    files.iter().map(|f| fs::metadata(f).and_then(|m| m.modified()).expect("a time")).collect()
}

fn load(cluster: &Cluster, known: Known, seed: u64, count: u64) -> Writer {
    let writer = Writer::start(socket(cluster, NAME), EXPORT, known, 8, seed);
    writer.wait_answered(count);
    writer
}

fn cluster(more: &str) -> Cluster {
    let mut cluster = Cluster::prepare(&[failing("stop")]);
    outside(&cluster.hub_config(), &DISKS, more);
    outside(&cluster.source_config(NAME), &DISKS, "");
    cluster.start_all();
    cluster
}

/// A CP that is kept, and what it holds.
fn kept(cluster: &Cluster) -> Known {
    let known = load(cluster, Known::default(), 3, 200).finish();
    let keep = ["checkpoint", NAME, "--keep", "monday"];
    assert!(command(&cluster.hub_config(), &keep).status.success());
    known
}

fn check_kept(cluster: &Cluster, known: &Known) {
    let export = format!("{EXPORT}@monday");
    let mut client = Client::unix(&socket(cluster, "hub"), &export, LIMIT).expect("the kept CP");
    let read = |block: u64| client.read(block * 4096, 4096).expect("a block of the kept CP");
    assert!(known.is_exactly(read), "the kept CP is not what was kept");
}

/// Goal: a hub that is killed under load and loses identity, NVRAM and logs is the same hub again; the
/// client of its source waits and goes on, and nothing answered is lost. A look writes nothing, a plain
/// start and another hub's id are refused.
#[test]
fn a_hub_without_its_state_directory_is_imported() {
    let mut cluster = cluster("");
    let monday = kept(&cluster);
    let writer = load(&cluster, monday.clone(), 5, 300);
    cluster.kill_hub();
    fs::remove_dir_all(state(&cluster, "hub")).expect("the state directory");
    let before = written(&cluster);
    // Other paths, another order.
    for name in DISKS {
        let disks = cluster.path("hub/disks");
        fs::rename(disks.join(name), disks.join(format!("moved-{name}"))).expect("a disk");
    }
    outside(&cluster.hub_config(), &["moved-disk2", "moved-disk0", "moved-disk1"], "");

    let found = import(&cluster, &[]);
    assert_eq!((&found["nvram"], &found["logs"]), (&"gone".into(), &"gone".into()), "{found}");
    assert_eq!(found["sources"][0]["kept"][0], "monday", "{found}");
    assert!(!state(&cluster, "hub").is_dir(), "a look has made something");
    let id = found["hub"].as_str().expect("an id").to_owned();
    for _ in 0..2 {
        let said = refused(&cluster.hub_config(), &["hub"]);
        assert!(said.contains("mirrorhub import"), "{said}");
    }
    let said = refused(&cluster.hub_config(), &["import", &id.replace(&id[..4], "0000")]);
    assert!(said.contains(&id), "{said}");
    assert_eq!(written(&cluster), before, "what was refused or only looked has written");

    assert_eq!(import(&cluster, &[&id])["imported"], true);
    let said = refused(&cluster.hub_config(), &["import"]);
    assert!(said.contains("already"), "{said}");
    let answered = writer.answered();
    cluster.start_hub();
    writer.wait_answered(answered + 200);
    let known = writer.finish();
    check(&mut cluster, NAME, &known);
    check_kept(&cluster, &monday);
    let marks = state(&cluster, "hub").join("refill");
    wait_for("the source has sent everything again", LIMIT, || {
        fs::read_dir(&marks).is_ok_and(|mut marks| marks.next().is_none())
    });
    let dry = fail_over(&cluster, NAME, &["--dry-run", "--now"]);
    assert_eq!(dry["may_be_lost"], false, "{dry}");
}

/// Goal: with NVRAM and logs outside of what was deleted nothing at all is lost, though the source is
/// dead as well.
#[test]
fn what_is_outside_the_state_directory_is_taken_up() {
    let more = "[log]\ndir = \"logs\"\n[nvram]\npath = \"ring\"\nsize = \"64MiB\"\n";
    let mut cluster = Cluster::prepare(&[failing("stop")]);
    let config = cluster.hub_config();
    let text = fs::read_to_string(&config).expect("hub.toml");
    let without: String = text
        .replace("[nvram]\n", "")
        .lines()
        .filter(|l| !l.starts_with("size"))
        .map(|l| format!("{l}\n"))
        .collect();
    fs::write(&config, without).expect("hub.toml");
    outside(&config, &DISKS, more);
    cluster.start_all();
    let monday = kept(&cluster);
    let writer = load(&cluster, monday.clone(), 7, 500);
    cluster.kill_hub();
    cluster.kill_source(NAME);
    let known = writer.finish();
    fs::remove_dir_all(state(&cluster, "hub")).expect("the state directory");
    let found = import(&cluster, &[]);
    assert_eq!((&found["nvram"], &found["logs"]), (&"kept".into(), &"kept".into()), "{found}");
    import(&cluster, &[found["hub"].as_str().expect("an id")]);
    cluster.start_hub();
    let answer = fail_over(&cluster, NAME, &[]);
    assert_eq!(answer["may_be_lost"], false, "{answer}");
    check_hub(&cluster, EXPORT, &known);
    check_kept(&cluster, &monday);
}

/// The control: the log is lost and the source is dead. Nobody says that nothing is lost, also after
/// another restart; who accepts it gets the image.
#[test]
fn a_lost_log_is_named_where_nobody_sends_it_again() {
    let mut cluster = cluster("");
    let monday = kept(&cluster);
    let writer = load(&cluster, monday.clone(), 9, 100);
    cluster.kill_hub();
    cluster.kill_source(NAME);
    let known = writer.finish();
    fs::remove_dir_all(state(&cluster, "hub")).expect("the state directory");
    let id = import(&cluster, &[])["hub"].as_str().expect("an id").to_owned();
    let found = import(&cluster, &[&id]);
    let warning = found["sources"][0]["warning"].as_str().unwrap_or_default();
    assert!(warning.contains("sends it again"), "{found}");
    cluster.start_hub();
    cluster.kill_hub();
    cluster.start_hub();
    let said = refused(&cluster.hub_config(), &["failover", NAME]);
    assert!(said.contains("lost before an import") && said.contains("--accept-gap"), "{said}");
    let dry = fail_over(&cluster, NAME, &["--dry-run"]);
    assert_eq!(dry["may_be_lost"], true, "{dry}");
    let answer = fail_over(&cluster, NAME, &["--accept-gap"]);
    assert_eq!(answer["may_be_lost"], true, "{answer}");
    let marks = fs::read_dir(state(&cluster, "hub").join("refill")).expect("the marks");
    assert_eq!(marks.count(), 0, "what was given up is still waited for");
    let mut client = Client::unix(&socket(&cluster, "hub"), EXPORT, LIMIT).expect("it is served");
    let read = |block: u64| client.read(block * 4096, 4096).expect("a block");
    assert!(monday.is_exactly(read), "the image is not the last CP");
    assert!(known.check_export(&socket(&cluster, "hub"), EXPORT).is_err(), "nothing was lost here");
}

/// Goal: the state directory of a source is deleted; its pool knows it, and the hub sends back what was
/// in its NVRAM. Without the flag that accepts the loss it does not start.
#[test]
fn a_source_without_its_state_directory_gets_its_nvram_back() {
    let mut cluster = cluster("");
    let known = kept(&cluster);
    let writer = load(&cluster, known, 11, 300);
    cluster.kill_source(NAME);
    let known = writer.finish();
    fs::remove_dir_all(state(&cluster, NAME)).expect("the state directory");
    let said = refused(&cluster.source_config(NAME), &["source"]);
    assert!(said.contains("--accept-lost-nvram"), "{said}");
    let mut accepting = cluster.source_command(NAME);
    cluster.start_source_with(NAME, accepting.arg("--accept-lost-nvram"));
    check(&mut cluster, NAME, &known);
}
