//! Real processes over arrays of files: devices fail under load, go missing, and rot.
//!
//! strace lets every write to a device fail from the n-th on, as a dying disk does. What is checked
//! is what clients see: every answered write in volume and image, and equal roots.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mirrorhub::nbd::client::Client;
use serde_json::Value;

use crate::crashes::check;
use crate::harness::oracle::{Known, Writer};
use crate::harness::{
    BINARY, Cluster, SourceSettings, command, done, http_get, status, sum_of, try_run, wait_for,
};

const SOURCE: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const BLOCK: usize = 4096;

/// Gives the pool in a configuration file so many devices in `state`.
pub fn with_array(file: &Path, level: &str, devices: usize) {
    let text = fs::read_to_string(file).expect("a configuration");
    let (before, rest) = text.split_once("[pool]\n").expect("a pool");
    let (_, after) = rest.split_once('\n').expect("one line of devices");
    let device = |n: usize| format!("  {{ path = \"state/disk{n}\", size = \"320MiB\" }},\n");
    let list: String = (0..devices).map(device).collect();
    let pool = format!("[pool]\nraid = \"{level}\"\ndevices = [\n{list}]\n");
    fs::write(file, format!("{before}{pool}{after}")).expect("a configuration");
}

fn disk(cluster: &Cluster, end: &str, n: usize) -> PathBuf {
    cluster.path(end).join(format!("state/disk{n}"))
}

fn socket(cluster: &Cluster, end: &str) -> PathBuf {
    cluster.path(end).join("nbd.sock")
}

/// Devices of the pool that are in.
fn devices_in(document: &Value) -> usize {
    let devices = document["pool"]["devices"].as_array().expect("an array");
    devices.iter().filter(|device| device["state"] == "in").count()
}

/// The hub under strace: these devices take no write from the n-th on.
fn dying(cluster: &Cluster, disks: &[usize], from: u64) -> Command {
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-qq", "-o"]).arg(cluster.path("strace.out"));
    for n in disks {
        command.arg("-P").arg(disk(cluster, "hub", *n));
    }
    let inject = format!("inject=pwrite64,pwritev:error=EIO:when={from}+");
    command.args(["-e", "trace=pwrite64,pwritev", "-e", &inject, BINARY, "hub", "--config"]);
    command.arg(cluster.hub_config());
    command
}

/// Goal: a hub on `parity2` and a source on `parity1` serve on while two devices and one die under
/// load, and after each restart, without the devices as well; one more and the hub names what is
/// missing. Roots never differ.
#[test]
fn devices_die_under_load_and_nobody_notices() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new(SOURCE).interval("300ms")]);
    with_array(&cluster.hub_config(), "parity2", 5);
    with_array(&cluster.source_config(SOURCE), "parity1", 3);
    cluster.start_all();
    assert_eq!(devices_in(&cluster.hub_status()), 5);
    let mut known = load(&cluster, Known::default(), 1);
    check(&mut cluster, SOURCE, &known);

    assert!(cluster.stop_hub().success());
    let mut command = dying(&cluster, &[1, 3], 30);
    cluster.start_hub_with(&mut command);
    let writer = Writer::start(socket(&cluster, SOURCE), EXPORT, known, 8, 2);
    let config = cluster.hub_config();
    wait_for("two devices are out", Duration::from_secs(60), || {
        status(&config).is_some_and(|document| devices_in(&document) == 3)
    });
    writer.wait_answered(writer.answered() + 100);
    known = writer.finish();
    check(&mut cluster, SOURCE, &known);
    let shown = cluster.hub_status();
    assert_eq!(shown["health"]["word"], "warning", "{shown}");
    assert!(shown.to_string().contains("Input/output error"), "{shown}");

    // They are back, and known to be stale; then they are gone. Of the source one is gone as well.
    for round in 0..2 {
        cluster.kill_hub();
        cluster.kill_source(SOURCE);
        if round == 1 {
            fs::remove_file(disk(&cluster, "hub", 1)).expect("a disk");
            fs::remove_file(disk(&cluster, "hub", 3)).expect("a disk");
            fs::remove_file(disk(&cluster, SOURCE, 2)).expect("a disk");
        }
        cluster.start_all();
        assert_eq!(devices_in(&cluster.hub_status()), 3);
        known = load(&cluster, known, 3 + round);
        check(&mut cluster, SOURCE, &known);
    }
    let own = status(&cluster.source_config(SOURCE)).expect("the source answers");
    assert_eq!(devices_in(&own), 2);

    assert!(cluster.stop_hub().success());
    let kept = cluster.path("kept");
    fs::rename(disk(&cluster, "hub", 4), &kept).expect("a disk");
    let refused = try_run(Command::new(BINARY).args(["hub", "--config"]).arg(cluster.hub_config()));
    assert!(!refused.status.success(), "a hub without its third device");
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("2 of 5 devices are there, 3 are needed"), "{text}");
    assert!(text.contains("disk4: does not exist"), "{text}");
    fs::rename(&kept, disk(&cluster, "hub", 4)).expect("a disk");
    cluster.start_hub();
    check(&mut cluster, SOURCE, &known);
}

fn load(cluster: &Cluster, known: Known, seed: u64) -> Known {
    let writer = Writer::start(socket(cluster, SOURCE), EXPORT, known, 8, seed);
    writer.wait_answered(200);
    writer.finish()
}

/// Blocks of a device that hold the pattern.
fn places(file: &Path, pattern: &[u8]) -> Vec<u64> {
    let bytes = fs::read(file).expect("a disk");
    let found = bytes.chunks_exact(BLOCK).enumerate().filter(|(_, block)| block == &pattern);
    found.map(|(n, _)| u64::try_from(n * BLOCK).expect("small")).collect()
}

/// Goal: what rots on one device of a mirror is read right from the hub, rewritten in its place,
/// counted and shown. Control: with both copies rotten the read is an error, never wrong data.
#[test]
fn rot_is_read_around_and_mended() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new(SOURCE)]);
    with_array(&cluster.hub_config(), "mirror", 2);
    cluster.start_all();
    let pattern = b"pattern of a block that rots....".repeat(BLOCK / 32);
    let mut client =
        Client::unix(&socket(&cluster, SOURCE), EXPORT, Duration::from_secs(20)).expect("client");
    (0..64).for_each(|n| client.write(n * 4096, &pattern).expect("a write"));
    drop(client);
    let root = Cluster::root(&cluster.checkpoint(SOURCE), "vol0");

    // What the hub's log keeps of it is not on these.
    let disks = [disk(&cluster, "hub", 0), disk(&cluster, "hub", 1)];
    let all: Vec<Vec<u64>> = disks.iter().map(|disk| places(disk, &pattern)).collect();
    assert!(all[0].len() >= 64 && all[0] == all[1], "{all:?}");
    let rot = |n: usize| {
        let file = fs::File::options().write(true).open(&disks[n]).expect("a disk");
        all[n].iter().for_each(|at| file.write_all_at(&[0x5a; 100], at + 7).expect("rot"));
    };
    rot(0);
    let read = |cluster: &Cluster| -> Result<(), String> {
        let mut image = Client::unix(&socket(cluster, "hub"), EXPORT, Duration::from_secs(20))
            .expect("the image");
        for n in 0..64 {
            let met = image.read(n * 4096, BLOCK).map_err(|error| error.to_string())?;
            assert!(met == pattern, "block {n} is wrong");
        }
        Ok(())
    };
    read(&cluster).expect("every block is right");
    let (_, metrics) = http_get(&cluster.hub_url("/metrics"));
    let repaired = sum_of(&metrics, "mirrorhub_pool_repaired_blocks_total");
    assert!(repaired > 10, "{repaired} blocks repaired");
    assert_eq!(sum_of(&metrics, "mirrorhub_pool_damaged_reads_total"), 0);
    assert_eq!(cluster.hub_status()["pool"]["repaired_blocks"], repaired);
    // A mirror reads each stripe from one device: the other half is found by who reads it there.
    assert!(places(&disks[0], &pattern).len() >= usize::try_from(repaired).expect("small"));
    assert_eq!(Cluster::root(&cluster.checkpoint(SOURCE), "vol0"), root);

    // Negative control: no copy is right, and the source cannot be asked.
    cluster.kill_source(SOURCE);
    rot(0);
    rot(1);
    let error = read(&cluster).expect_err("no copy is right");
    assert!(!error.is_empty());
    let health = cluster.hub_status()["health"].to_string();
    assert!(health.contains("pool-damaged"), "{health}");
}

/// Writes the new devices into a configuration file.
fn name_new(config: &Path, names: &[u32]) {
    let mut text = fs::read_to_string(config).expect("a configuration");
    for n in names {
        text = text.replace(&format!("state/disk{n}"), &format!("new{n}"));
    }
    fs::write(config, text).expect("a configuration");
}

/// Goal: two devices of a hub on `parity2` and one of a source on `parity1` are failed under load,
/// others take their places and are filled while clients write; nothing acknowledged is lost, roots
/// stay equal, scrubs of both ends are clean, and restarts find the new devices, whether the file
/// names them or not. One more than the level bears is refused.
#[test]
fn devices_are_replaced_under_load() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new(SOURCE).interval("300ms")]);
    with_array(&cluster.hub_config(), "parity2", 5);
    with_array(&cluster.source_config(SOURCE), "parity1", 3);
    cluster.start_all();
    let (hub, source) = (cluster.hub_config(), cluster.source_config(SOURCE));
    let known = load(&cluster, Known::default(), 1);

    let writer = Writer::start(socket(&cluster, SOURCE), EXPORT, known, 8, 2);
    for n in [1, 3] {
        let name = disk(&cluster, "hub", n).display().to_string();
        let text = done(&hub, &["device", "fail", &name, "--yes"]);
        assert!(text.contains("failed by hand"), "{text}");
    }
    let text = done(&source, &["device", "fail", "2", "--yes"]);
    assert!(text.contains("failed by hand"), "{text}");
    let refused = command(&hub, &["device", "fail", "0", "--yes"]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(text.contains("2 of 5 devices are out already, parity2 bears 2"), "{text}");
    writer.wait_answered(writer.answered() + 50);

    for n in [1, 3] {
        let old = disk(&cluster, "hub", n).display().to_string();
        let new = cluster.path("hub").join(format!("new{n}")).display().to_string();
        let text = done(&hub, &["device", "replace", &old, &new, "--wait"]);
        assert!(text.contains("next: write the new path into pool.devices"), "{text}");
    }
    let new = cluster.path(SOURCE).join("new2").display().to_string();
    done(&source, &["device", "replace", "2", &new, "--wait"]);
    writer.wait_answered(writer.answered() + 50);
    let mut known = writer.finish();
    check(&mut cluster, SOURCE, &known);
    assert_eq!(devices_in(&cluster.hub_status()), 5, "{}", cluster.hub_status());
    assert_eq!(devices_in(&status(&source).expect("the source answers")), 3);
    for config in [&hub, &source] {
        let text = done(config, &["scrub", "--wait"]);
        assert!(text.contains("all of it right"), "{text}");
    }
    let diff = done(&hub, &["config", "diff"]);
    assert!(diff.contains("pool.devices[1]") && diff.contains("new1"), "{diff}");

    // Restarts: the file still names the old ones, and then it names the new ones.
    for round in 0..2 {
        cluster.kill_hub();
        cluster.kill_source(SOURCE);
        if round == 1 {
            name_new(&hub, &[1, 3]);
            name_new(&source, &[2]);
        }
        cluster.start_all();
        assert_eq!(devices_in(&cluster.hub_status()), 5, "round {round}");
        known = load(&cluster, known, 5 + round);
        check(&mut cluster, SOURCE, &known);
        let shown = cluster.hub_status().to_string();
        assert_eq!(shown.contains("needs_restart"), round == 0, "{shown}");
    }
    // What was filled carries the others: any two of the old ones may go.
    for n in [0, 4] {
        done(&hub, &["device", "fail", &n.to_string(), "--yes"]);
    }
    known = load(&cluster, known, 9);
    check(&mut cluster, SOURCE, &known);
}

/// Goal: what rots on a device at rest is found by a scrub and mended, also where no reader would
/// look; a scrub says so by its exit code. Control: where no copy is right and the source cannot be
/// asked, it ends with 1 and names the blocks; asked again, the source gives them back.
#[test]
fn a_scrub_mends_what_rots_and_names_what_is_lost() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new(SOURCE)]);
    with_array(&cluster.hub_config(), "mirror", 2);
    cluster.start_all();
    let hub = cluster.hub_config();
    let pattern = b"pattern of a block that rots....".repeat(BLOCK / 32);
    let mut client =
        Client::unix(&socket(&cluster, SOURCE), EXPORT, Duration::from_secs(20)).expect("client");
    (0..64).for_each(|n| client.write(n * 4096, &pattern).expect("a write"));
    drop(client);
    cluster.checkpoint(SOURCE);
    let text = done(&hub, &["scrub", "--wait"]);
    assert!(text.contains("all of it right"), "{text}");

    let disks = [disk(&cluster, "hub", 0), disk(&cluster, "hub", 1)];
    let all: Vec<Vec<u64>> = disks.iter().map(|disk| places(disk, &pattern)).collect();
    let rot = |n: usize| {
        let file = fs::File::options().write(true).open(&disks[n]).expect("a disk");
        all[n].iter().for_each(|at| file.write_all_at(&[0x5a; 100], at + 7).expect("rot"));
    };
    rot(1);
    let text = done(&hub, &["scrub", "--wait"]);
    assert!(text.contains("repaired") && text.contains(", 0 without a right copy"), "{text}");
    // Everything, not only what readers of one copy meet.
    assert_eq!(places(&disks[1], &pattern), all[1]);
    let text = done(&hub, &["scrub", "--wait"]);
    assert!(text.contains("all of it right"), "{text}");

    cluster.kill_source(SOURCE);
    rot(0);
    rot(1);
    let output = command(&hub, &["scrub", "--wait"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("lost: {EXPORT}: block 0 at CP")), "{text}");
    let shown = cluster.hub_status();
    assert_eq!(shown["health"]["word"], "critical", "{shown}");
    assert!(shown["health"].to_string().contains("scrub-lost"), "{shown}");
    let (_, metrics) = http_get(&cluster.hub_url("/metrics"));
    assert!(sum_of(&metrics, "mirrorhub_scrub_lost_blocks") >= 64);
    cluster.start_source(SOURCE);
    cluster.wait_in_sync(SOURCE);
    let text = done(&hub, &["scrub", "--wait"]);
    assert!(text.contains(" got from the other end, 0 without a right copy"), "{text}");
}
