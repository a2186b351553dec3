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
    BINARY, Cluster, SourceSettings, http_get, status, sum_of, try_run, wait_for,
};

const SOURCE: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const BLOCK: usize = 4096;

/// Gives the pool in a configuration file so many devices in `state`.
fn with_array(file: &Path, level: &str, devices: usize) {
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
    let inject = format!("inject=pwrite64:error=EIO:when={from}+");
    command.args(["-e", "trace=pwrite64", "-e", &inject, BINARY, "hub", "--config"]);
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
