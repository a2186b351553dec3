//! Bytes flip at rest under a running pair of processes: what one end lost is got from the other,
//! read rightly, and written to a new place.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::counted::pool_check;
use crate::harness::{Cluster, SourceSettings, http_get, run, status, try_run, wait_for};

const NAME: &str = "filer-a";
const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;
const BLOCKS: usize = 300;

/// Content of which no two blocks are alike.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; BLOCKS * BLOCK];
    blake3::Hasher::new().update(b"rot").finalize_xof().fill(&mut bytes);
    bytes
}

fn block(content: &[u8], number: usize) -> &[u8] {
    &content[number * BLOCK..][..BLOCK]
}

/// A pair with that content at both ends, and the file that has it.
fn pair() -> (Cluster, PathBuf, Vec<u8>) {
    let lines = "on_hub_loss = \"continue\"\nhub_timeout = \"2s\"";
    let source = SourceSettings::new(NAME).volumes(&[("vol0", "16MiB")]).replication(lines);
    let mut cluster = Cluster::start(&[source]);
    let (file, content) = (cluster.path("content"), content());
    let mut whole = content.clone();
    whole.resize(16 << 20, 0);
    fs::write(&file, whole).expect("content");
    run(Command::new("qemu-img")
        .args(["convert", "-n", "-f", "raw", "-O", "raw"])
        .arg(&file)
        .arg(cluster.volume(NAME, "vol0")));
    cluster.checkpoint(NAME);
    cluster.wait_in_sync(NAME);
    (cluster, file, content)
}

/// Places in a file, at steps of 4096 bytes, whose block is what `wanted` wants.
pub fn find(path: &Path, wanted: impl Fn(&[u8]) -> bool) -> Vec<u64> {
    let file = fs::File::open(path).expect("a device");
    let size = file.metadata().expect("its size").len();
    let mut found = Vec::new();
    let mut chunk = vec![0; 1 << 22];
    let mut at = 0;
    while at < size {
        let read = file.read_at(&mut chunk, at).expect("a device");
        for (number, block) in chunk[..read].chunks_exact(BLOCK).enumerate() {
            if wanted(block) {
                found.push(at + u64::try_from(number * BLOCK).expect("small"));
            }
        }
        at += u64::try_from(read).expect("small");
    }
    found
}

pub fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).expect("a device");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ 0xff], at).expect("a byte");
    file.sync_all().expect("a sync");
}

/// Flips a byte of a data block wherever it lies on that device.
fn rot_block(device: &Path, content: &[u8], number: usize) {
    let places = find(device, |met| met == block(content, number));
    assert!(!places.is_empty(), "block {number} is on {}", device.display());
    places.into_iter().for_each(|at| flip(device, at + 77));
}

/// Flips a byte of the place of the third pointer in the node above a block.
fn rot_node(device: &Path, content: &[u8], number: usize) {
    let hash = blake3::hash(block(content, number));
    let slot = number % 128 * 32;
    let places = find(device, |met| met[slot + 16..slot + 32] == hash.as_bytes()[..16]);
    assert!(!places.is_empty(), "a node is on {}", device.display());
    places.into_iter().for_each(|at| flip(device, at + 64));
}

fn device(cluster: &Cluster, end: &str) -> PathBuf {
    cluster.path(end).join("state/disk0")
}

fn equal(file: &Path, uri: &str) -> bool {
    let compare = ["compare", "-f", "raw", "-F", "raw"];
    try_run(Command::new("qemu-img").args(compare).arg(file).arg(uri)).status.success()
}

fn uri(cluster: &Cluster, end: &str) -> String {
    if end == "hub" { cluster.image(NAME, "vol0") } else { cluster.volume(NAME, "vol0") }
}

fn config(cluster: &Cluster, end: &str) -> PathBuf {
    if end == "hub" { cluster.hub_config() } else { cluster.source_config(NAME) }
}

fn rot(cluster: &Cluster, end: &str) -> Value {
    status(&config(cluster, end)).map_or(Value::Null, |document| document["pool"]["rot"].clone())
}

fn wait_repaired(cluster: &Cluster, end: &str, count: u64) {
    wait_for(&format!("{count} places of {end} are repaired"), LIMIT, || {
        let rot = rot(cluster, end);
        rot["repaired"].as_u64() >= Some(count) && rot["waiting"] == 0
    });
}

fn is_clean(cluster: &Cluster, end: &str) -> bool {
    let answer = pool_check(&cluster.path(end).join("state/admin.sock"));
    assert!(answer["all_blocks"].as_u64() > Some(0), "{answer}");
    answer["sound"] == true
}

/// Goal: a data block that rots at either end is read rightly, repaired, and the pool is sound.
/// Control: with the other end away it is an error that names the block, and never wrong data.
#[test]
fn a_block_that_rots_is_got_from_the_other_end() {
    let (mut cluster, file, content) = pair();
    for end in ["hub", NAME] {
        rot_block(&device(&cluster, end), &content, 130);
        assert!(equal(&file, &uri(&cluster, end)), "{end} reads it rightly");
        wait_repaired(&cluster, end, 1);
        assert!(is_clean(&cluster, end), "{end} is sound");
        // It was written to a new place: nothing of the process's memory is needed.
        let found = find(&device(&cluster, end), |met| met == block(&content, 130));
        assert!(!found.is_empty(), "{end} has it on its device again");
    }
    let page = http_get(&cluster.hub_url("/metrics")).1;
    assert!(page.contains("mirrorhub_rot_repaired_total 1"), "{page}");
    // The control: the source is away.
    cluster.stop_source(NAME);
    rot_block(&device(&cluster, "hub"), &content, 7);
    assert!(!equal(&file, &uri(&cluster, "hub")), "nobody else has it");
    let document = status(&cluster.hub_config()).expect("status");
    let lost = document["pool"]["rot"]["lost"][0].as_str().unwrap_or_default().to_owned();
    assert!(lost.contains("volume 0 level 0 index 7"), "{document}");
    assert_eq!(document["health"]["word"], "critical");
    // And back.
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    assert!(equal(&file, &uri(&cluster, "hub")));
    wait_repaired(&cluster, "hub", 2);
    assert_eq!(rot(&cluster, "hub")["lost"], serde_json::json!([]));
    assert!(is_clean(&cluster, "hub"));
}

/// A node of a tree rots while its process is down, so that no cache hides it: what is left of it
/// is put right with what the other end knows of its children.
#[test]
fn a_node_that_rots_is_put_right() {
    let (mut cluster, file, content) = pair();
    cluster.kill_hub();
    rot_node(&device(&cluster, "hub"), &content, 5);
    cluster.start_hub();
    cluster.wait_in_sync(NAME);
    assert!(equal(&file, &uri(&cluster, "hub")), "the hub reads it rightly");
    wait_repaired(&cluster, "hub", 1);
    assert!(is_clean(&cluster, "hub"));
    cluster.kill_source(NAME);
    rot_node(&device(&cluster, NAME), &content, 133);
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    assert!(equal(&file, &uri(&cluster, NAME)), "the source reads it rightly");
    wait_repaired(&cluster, NAME, 1);
    assert!(is_clean(&cluster, NAME));
    // Twice over: the pools are read from their devices alone.
    cluster.stop_source(NAME);
    cluster.stop_hub();
    cluster.start_hub();
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    assert!(equal(&file, &uri(&cluster, NAME)) && equal(&file, &uri(&cluster, "hub")));
    assert_eq!(rot(&cluster, "hub"), Value::Null);
}

/// A check finds what nobody reads, and mends it.
#[test]
fn a_check_mends_what_it_finds() {
    let (cluster, file, content) = pair();
    for end in ["hub", NAME] {
        rot_block(&device(&cluster, end), &content, 200);
        assert!(is_clean(&cluster, end), "{end} is mended by its check");
        wait_repaired(&cluster, end, 1);
        assert!(is_clean(&cluster, end) && equal(&file, &uri(&cluster, end)));
    }
}

/// A write of a part of a block that rotted needs the rest of it: no write is lost, and no source
/// fails.
#[test]
fn a_checkpoint_over_a_rotten_block_goes_on() {
    let (cluster, file, content) = pair();
    rot_block(&device(&cluster, NAME), &content, 40);
    let at = u64::try_from(40 * BLOCK).expect("small") + 512;
    let write = format!("write -P 0x5a {at} 512");
    run(Command::new("qemu-io").args(["-f", "raw", "-c", &write]).arg(uri(&cluster, NAME)));
    cluster.checkpoint(NAME);
    let mut wanted = fs::read(&file).expect("content");
    let from = usize::try_from(at).expect("small");
    wanted[from..from + 512].fill(0x5a);
    fs::write(&file, wanted).expect("content");
    assert!(equal(&file, &uri(&cluster, NAME)) && equal(&file, &uri(&cluster, "hub")));
    assert!(is_clean(&cluster, NAME) && is_clean(&cluster, "hub"));
}

/// A byte of the NVRAM flips while the source is down. In the last record it cannot be told from a
/// torn one: the hub has it, and the source asks. In one that later ones prove durable it says so
/// and does not start; with a new NVRAM and the word of its administrator it fetches its log from
/// the hub. Nothing acknowledged is lost either way.
#[test]
fn a_log_that_rots_is_fetched_from_the_hub() {
    let (mut cluster, file, _) = pair();
    let mut wanted = fs::read(&file).expect("content");
    let mut write = |cluster: &Cluster, byte: u8, mib: usize| {
        let write = format!("write -P {byte:#x} {mib}M 64k");
        run(Command::new("qemu-io").args(["-f", "raw", "-c", &write]).arg(uri(cluster, NAME)));
        wanted[mib << 20..(mib << 20) + (64 << 10)].fill(byte);
        fs::write(&file, &wanted).expect("content");
    };
    let ring = cluster.path(NAME).join("state/nvram");
    let rot_ring = |byte: u8| {
        let holds = |met: &[u8]| met.iter().filter(|met| **met == byte).count() > 3000;
        let places = find(&ring, holds);
        assert!(!places.is_empty(), "the write is in the NVRAM");
        flip(&ring, places[0] + 2000);
    };
    write(&cluster, 0x77, 2);
    cluster.kill_source(NAME);
    rot_ring(0x77);
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    assert!(equal(&file, &uri(&cluster, NAME)), "the hub had it");
    for (byte, mib) in [(0x51, 3), (0x52, 4), (0x53, 5)] {
        write(&cluster, byte, mib);
    }
    cluster.kill_source(NAME);
    rot_ring(0x51);
    cluster.start_source(NAME);
    wait_for("the source refuses its NVRAM", LIMIT, || !cluster.source_runs(NAME));
    let log = fs::read_to_string(cluster.path(&format!("{NAME}.log"))).expect("its log");
    assert!(log.contains("damaged") && log.contains("--accept-lost-nvram"), "{log}");
    cluster.forget_source(NAME);
    fs::rename(&ring, cluster.path("rotten-nvram")).expect("the NVRAM is put aside");
    let mut command = cluster.source_command(NAME);
    command.arg("--accept-lost-nvram");
    cluster.start_source_with(NAME, &mut command);
    cluster.wait_in_sync(NAME);
    assert!(equal(&file, &uri(&cluster, NAME)), "every acknowledged write is there");
    cluster.checkpoint(NAME);
    assert!(equal(&file, &uri(&cluster, "hub")));
}
