//! `mirrorhub seed`: an image that begins with a disk sent by truck, and only the difference on the link.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use mirrorhub::nbd::client::Client;
use serde_json::Value;

use crate::harness::{
    BINARY, Cluster, SourceSettings, command, hash, is_full, run, try_run, wait_for,
};
use crate::outage::{socket, wire_bytes};
use crate::resync::{change, fill, some, wait_settled, wait_together};

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const LIMIT: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

fn settings() -> SourceSettings {
    let lines = "on_hub_loss = \"continue\"\nhub_timeout = \"1s\"\n";
    let settings = SourceSettings::new(NAME).interval("300ms").nvram("16MiB").replication(lines);
    settings.volumes(&[("vol0", "32MiB")])
}

/// A filer that never met its hub: its disk of yesterday, and what was written since.
fn yesterday(cluster: &mut Cluster) -> PathBuf {
    cluster.start_source(NAME);
    wait_for("it serves alone", LIMIT, || {
        Client::unix(&socket(cluster, NAME), EXPORT, LIMIT).is_ok()
    });
    // A part of the volume is never written.
    let mut client = Client::unix(&socket(cluster, NAME), EXPORT, LIMIT).expect("it opens");
    fill(&mut client, 29);
    drop(client);
    let disk = cluster.path("truck.raw");
    run(Command::new("nbdcopy").arg("--").arg(cluster.volume(NAME, "vol0")).arg(&disk));
    let mut client = Client::unix(&socket(cluster, NAME), EXPORT, LIMIT).expect("it opens");
    change(&mut client, &some(SIZE / 4096, 100), 2);
    drop(client);
    wait_settled(cluster);
    assert!(cluster.stop_source(NAME).success());
    disk
}

fn seed(cluster: &Cluster, arguments: &[&str]) -> Result<Value, String> {
    let all = [&["seed", "--json"], arguments].concat();
    let output = command(&cluster.hub_config(), &all);
    if output.status.success() {
        return Ok(serde_json::from_slice(&output.stdout).expect("JSON of seed"));
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn events(cluster: &Cluster) -> String {
    let output = command(&cluster.hub_config(), &["events"]);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Comes together; returns what went over the link.
fn together(cluster: &mut Cluster) -> f64 {
    wait_together(cluster);
    let answer = cluster.checkpoint(NAME);
    let root = Cluster::root(&answer, "vol0");
    assert_eq!(cluster.own_status(NAME)["volumes"][0]["root"], root.as_str(), "roots meet");
    wire_bytes(cluster)
}

/// Goal: of 32 MiB of which 100 blocks were written since, less than a tenth is sent, and the roots meet.
/// A seed that was cut holds its source off, is gone on with behind a restart of the hub, and is never
/// served. Control: without a seed all of it is sent.
#[test]
fn a_disk_by_truck_leaves_the_difference_to_the_link() {
    let mut cluster = Cluster::prepare(&[settings()]);
    let disk = yesterday(&mut cluster);
    cluster.start_hub();

    // Cut in the middle: by a pipe that ends too soon.
    let half =
        fs::read(&disk).expect("the disk")[..usize::try_from(SIZE / 2).expect("small")].to_vec();
    fs::write(cluster.path("half.raw"), half).expect("half a disk");
    let piped = || {
        let mut cut = Command::new("sh");
        cut.args([
            "-c",
            "exec \"$0\" seed filer-a/vol0 - --config hub/hub.toml < half.raw",
            BINARY,
        ]);
        let refused = try_run(cut.current_dir(cluster.dir.path()));
        String::from_utf8_lossy(&refused.stderr).into_owned()
    };
    let said = piped();
    assert!(said.contains("is not known here"), "without a size: {said}");
    let file = cluster.path("hub/sources.d/filer-a.toml");
    let pinned = "name = \"filer-a\"\n[[volume]]\nname = \"vol0\"\nsize = \"32MiB\"\n";
    fs::write(&file, pinned).expect("the source's file");
    let mut refused = said;
    wait_for("the file counts", LIMIT, || {
        refused = piped();
        !refused.contains("is not known here")
    });
    assert!(refused.contains("33554432 bytes, the file 16777216"), "{refused}");
    let waiting = seed(&cluster, &[]).expect("the list");
    assert_eq!(waiting["seeds"][0]["state"], "unfinished", "{waiting}");
    cluster.kill_hub();
    cluster.start_hub();
    cluster.start_source(NAME);
    wait_for("the source is held off", LIMIT, || {
        cluster.on_hub(NAME)["reason"]
            .as_str()
            .is_some_and(|why| why.contains("not filled to its end"))
    });

    let of_seed = |cluster: &Cluster| cluster.on_hub(NAME)["seeds"][0].clone();
    assert_eq!(of_seed(&cluster)["state"], "unfinished", "in status as well");

    let disk = disk.to_str().expect("a path").to_owned();
    let seeded = seed(&cluster, &[EXPORT, &disk]).expect("a seed");
    assert_eq!(seeded["root"], hash(disk.as_ref()).as_str(), "{seeded}");
    let sent = together(&mut cluster);
    println!("{sent} bytes of {SIZE} were sent");
    assert!(sent < 3_355_443.0, "{sent} bytes for 100 blocks");
    assert!(sent > 100.0 * 4096.0, "less came than differs: the counter shows nothing");
    is_told(&cluster, &of_seed(&cluster), &seeded);
    let none = seed(&cluster, &[]).expect("the list");
    assert!(none["seeds"].as_array().is_some_and(Vec::is_empty), "{none}");
    let late = seed(&cluster, &[EXPORT, &disk]).expect_err("a source in session is not seeded");
    assert!(late.contains("in session"), "{late}");
    assert!(cluster.stop_source(NAME).success());
    let late = seed(&cluster, &[EXPORT, &disk]).expect_err("there is an image");
    assert!(late.contains("has an image here"), "{late}");

    if is_full() {
        control(&disk);
    }
}

/// Status and events say what has become of it.
fn is_told(cluster: &Cluster, adopted: &Value, seeded: &Value) {
    assert_eq!(adopted["state"], "adopted", "{adopted}");
    assert_eq!(adopted["pool_bytes"], seeded["pool_bytes"], "{adopted}");
    let (taken, ended) = (&adopted["taken_at_seconds"], &adopted["ended_at_seconds"]);
    assert!(taken.as_i64() <= ended.as_i64() && taken.is_i64(), "{adopted}");
    let event = "seed of vol0 adopted: the image begins with it";
    wait_for("the event", LIMIT, || events(cluster).contains(event));
}

/// A seed that is given up leaves nothing, and all is sent. That a filer with data which is not seeded
/// sends all of it shows `outage::a_new_filer_with_data_comes_in` as well.
fn control(disk: &str) {
    let mut cluster = Cluster::prepare(&[settings()]);
    yesterday(&mut cluster);
    cluster.start_hub();
    seed(&cluster, &[EXPORT, disk]).expect("a seed");
    seed(&cluster, &[EXPORT, "--discard"]).expect("it is given up");
    cluster.start_source(NAME);
    let sent = together(&mut cluster);
    assert!(sent > 28_000_000.0, "{sent} bytes came without a seed");
}
