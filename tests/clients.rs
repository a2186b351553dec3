//! Hub and sources as processes, foreign clients against them.

use std::collections::HashSet;
use std::fs;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mirrorhub::nbd::client::{Client, ClientError};

use crate::harness::oracle::{content, version_of};
use crate::harness::{
    BINARY, Cluster, Process, SourceSettings, hash, http_get, pause, run, sum_of, try_run, wait_for,
};

/// A file of `size` bytes with seeded content, holes and zero blocks among it.
pub fn make_image(path: &Path, size: u64, seed: u64) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(path).expect("image file");
    file.set_len(size).expect("image size");
    let mut state = seed | 1;
    let mut block = vec![0_u8; 65_536];
    for at in (0..size).step_by(block.len()) {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if state >> 61 < 2 {
            continue;
        }
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        let length = block.len().min(usize::try_from(size - at).expect("small"));
        file.write_all_at(&block[..length], at).expect("image data");
    }
}

fn nbdcopy(from: &str, to: &str) {
    run(Command::new("nbdcopy").arg("--").arg(from).arg(to));
}

/// The root in some lines of Python with the blake3 package: an independent implementation.
fn python_root(file: &Path) -> String {
    let script = r#"
import sys, os
from blake3 import blake3
Z = bytes(16)
path = sys.argv[1]
size = os.path.getsize(path)
level = []
with open(path, 'rb') as f:
    while block := f.read(4096):
        level.append(Z if not any(block) else blake3(block).digest()[:16])
while True:
    level += [Z] * (-len(level) % 128)
    level = [Z if not any(b''.join(level[i:i+128])) else blake3(b''.join(level[i:i+128])).digest()[:16]
             for i in range(0, len(level), 128)]
    if len(level) == 1: break
print(blake3(b'mirrorhub root v1' + size.to_bytes(8, 'little') + level[0]).hexdigest())
"#;
    let output = run(Command::new("python3").arg("-c").arg(script).arg(file));
    String::from_utf8(output.stdout).expect("digits").trim().to_owned()
}

/// nbdcopy in, checkpoint, nbdcopy out of the hub: equal files, equal roots, by three ways.
#[test]
fn what_a_client_copies_in_is_read_from_the_hub() {
    let cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    let (before, after) = (cluster.path("in.img"), cluster.path("out.img"));
    make_image(&before, 64 << 20, 7);
    let volume = cluster.volume("filer-a", "vol0");
    nbdcopy(before.to_str().unwrap(), &volume);
    let answer = cluster.checkpoint("filer-a");
    let image = cluster.image("filer-a", "vol0");
    nbdcopy(&image, after.to_str().unwrap());
    run(Command::new("cmp").arg(&before).arg(&after));
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw", &volume, &image]));
    let root = Cluster::root(&answer, "vol0");
    assert_eq!(root, hash(&before));
    assert_eq!(root, python_root(&before));
    let shown = &cluster.on_hub("filer-a")["volumes"][0]["root"];
    assert_eq!(shown.as_str(), Some(root.as_str()));
    // Negative control: one other byte is another root.
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().write(true).open(&after).expect("copy");
    file.write_all_at(b"x", 12_345).expect("one byte");
    assert_ne!(root, hash(&after));
}

#[test]
fn nbdinfo_lists_and_describes_volumes_and_images() {
    let cluster = Cluster::start(&[
        SourceSettings::new("filer-a").volumes(&[("vol0", "64MiB"), ("vol1", "1GiB")])
    ]);
    let info = |uri: &str| {
        let output = run(Command::new("nbdinfo").arg("--json").arg(uri));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON of nbdinfo")
    };
    let volume = info(&cluster.volume("filer-a", "vol1"));
    let export = &volume["exports"][0];
    assert_eq!(export["export-size"], 1_u64 << 30);
    for yes in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df"] {
        assert_eq!(export[yes], true, "{yes} in {export}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(volume["structured"], true);
    let image = info(&cluster.image("filer-a", "vol0"));
    let export = &image["exports"][0];
    assert_eq!(export["is_read_only"], true);
    assert_eq!(export["can_multi_conn"], false);
    let socket = cluster.path("hub/nbd.sock");
    let list = run(Command::new("nbdinfo")
        .arg("--list")
        .arg(format!("nbd+unix://?socket={}", socket.display())));
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(list.contains("filer-a/vol0") && list.contains("filer-a/vol1"), "{list}");
    let unknown = cluster.image("filer-a", "nothing");
    assert!(!try_run(Command::new("nbdinfo").arg(unknown)).status.success());
}

/// fio with verification on the source, then a read-only verification on the image.
#[test]
fn fio_verifies_the_source_and_the_image() {
    let volumes = [("vol0", "64MiB"), ("empty", "64MiB")];
    let settings = SourceSettings::new("filer-a").volumes(&volumes).interval("1s");
    let cluster = Cluster::start(&[settings]);
    let job = |uri: &str, only: bool| {
        let mut command = Command::new("fio");
        command.args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bsrange=512-1048576"]);
        command.args(["--bs_unaligned=0", "--bssplit=512/20:4k/40:64k/30:1m/10"]);
        command.args(["--size=64m", "--io_size=96m", "--iodepth=32", "--verify=crc32c"]);
        command.args([
            "--verify_fatal=1",
            "--randrepeat=1",
            "--randseed=11",
            "--serialize_overlap=1",
        ]);
        command.arg(format!("--uri={uri}"));
        if only {
            command.arg("--verify_only");
        }
        command.current_dir(cluster.dir.path());
        try_run(&mut command)
    };
    assert!(job(&cluster.volume("filer-a", "vol0"), false).status.success());
    cluster.checkpoint("filer-a");
    let verified = job(&cluster.image("filer-a", "vol0"), true);
    assert!(verified.status.success(), "{verified:?}");
    // Negative control: a volume that nobody wrote to does not verify.
    assert!(!job(&cluster.image("filer-a", "empty"), true).status.success());
}

#[test]
fn qemu_io_at_odd_offsets_and_past_the_end() {
    let cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    let volume = cluster.volume("filer-a", "vol0");
    let good = [
        "write -P 0xaa 0 1M",
        "write -f -P 0xbb 1000 3000",
        "write -P 0xcc 4095 2",
        "read -P 0xbb 1000 3000",
        "read -P 0xcc 4095 2",
        "read -P 0xaa 4097 1000",
        "write -z 8000 9000",
        "read -P 0 8000 9000",
        "discard 64k 64k",
        "read -P 0 64k 64k",
        "flush",
    ];
    for command in good {
        let output = run(Command::new("qemu-io").args(["-f", "raw", "-c", command, &volume]));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!text.contains("failed"), "{command}: {text}");
    }
    let past = ["-f", "raw", "-c", "write 64M 4k", &volume];
    let output = try_run(Command::new("qemu-io").args(past));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("write failed: Input/output error"), "past the end: {text}");
    refused_by_the_server(&cluster);
    let root = Cluster::root(&cluster.checkpoint("filer-a"), "vol0");
    let copy = cluster.path("copy.img");
    nbdcopy(&volume, copy.to_str().unwrap());
    assert_eq!(root, hash(&copy));
    let image = cluster.image("filer-a", "vol0");
    let write = try_run(Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k", &image]));
    assert!(!write.status.success(), "an image is read-only");
}

/// QEMU asks for nothing past the end: what the server says to that, and to a write to an image.
fn refused_by_the_server(cluster: &Cluster) {
    // Numbers of the NBD protocol text.
    let (permission, invalid, no_space) = (1, 22, 28);
    let limit = Duration::from_secs(20);
    let answer = |socket: &str, act: &dyn Fn(&mut Client) -> Result<(), ClientError>| {
        let socket = cluster.path(socket);
        let mut client = Client::unix(&socket, "filer-a/vol0", limit).expect("the export");
        match act(&mut client) {
            Err(ClientError::Answer(error)) => error,
            other => panic!("{other:?} instead of an error"),
        }
    };
    let own = "filer-a/nbd.sock";
    assert_eq!(answer(own, &|client| client.write(64 << 20, &[1; 4096])), no_space);
    assert_eq!(answer(own, &|client| client.write((64 << 20) - 1, &[1; 2])), no_space);
    assert_eq!(answer(own, &|client| client.read(64 << 20, 1).map(drop)), invalid);
    assert_eq!(answer("hub/nbd.sock", &|client| client.write(0, &[1; 512])), permission);
}

/// Three sources with several volumes write at once; every image is its source's.
#[test]
fn three_sources_at_once() {
    let names = ["filer-a", "filer-b", "filer-c"];
    // The second is of an odd size: no level of its tree is full.
    let volumes = [("vol0", "32MiB"), ("data.1", "66580KiB")];
    let settings: Vec<_> = names
        .iter()
        .map(|name| SourceSettings::new(name).volumes(&volumes).interval("1s"))
        .collect();
    let cluster = Cluster::start(&settings);
    let mut copies = Vec::new();
    for (at, name) in names.iter().enumerate() {
        for (volume, size) in [("vol0", 32_u64 << 20), ("data.1", 66_580 << 10)] {
            let file = cluster.path(&format!("{name}-{volume}.img"));
            make_image(&file, size, 100 + u64::try_from(at).unwrap() * 10 + size);
            let uri = cluster.volume(name, volume);
            let log = cluster.path(&format!("{name}-{volume}.copy.log"));
            let mut command = Command::new("nbdcopy");
            command.arg("--").arg(&file).arg(uri);
            let process = Process::start("nbdcopy", log, &mut command);
            copies.push((*name, volume, file, process));
        }
    }
    for (name, volume, file, mut process) in copies {
        wait_for("nbdcopy ends", Duration::from_secs(60), || !process.runs());
        let root = Cluster::root(&cluster.checkpoint(name), volume);
        assert_eq!(root, hash(&file), "{name}/{volume}");
        assert_eq!(root, python_root(&file), "{name}/{volume} by another implementation");
        let own = cluster.own_status(name);
        let own = own["volumes"].as_array().expect("volumes").iter();
        let own = own.clone().find(|shown| shown["name"] == volume).expect("the volume");
        assert_eq!(own["root"].as_str(), Some(root.as_str()), "{name}/{volume} at the source");
        let out = cluster.path("out.img");
        nbdcopy(&cluster.image(name, volume), out.to_str().unwrap());
        run(Command::new("cmp").arg(&file).arg(&out));
    }
    let config = cluster.hub_config();
    let output = run(Command::new(BINARY).args(["verify", "--json", "--config"]).arg(&config));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answer["equal"], true);
    assert_eq!(answer["volumes"].as_array().map(Vec::len), Some(6));
}

/// While a client writes, every image opened is one cut and stays as it is under its reader.
#[test]
fn an_image_does_not_change_under_its_reader() {
    let cluster = Cluster::start(&[SourceSettings::new("filer-a").interval("200ms")]);
    let volume = cluster.volume("filer-a", "vol0");
    let mut writer = Command::new("fio");
    writer.args(["--name=w", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=8"]);
    // Longer than the test takes: it ends with it.
    writer.args(["--size=64m", "--time_based", "--runtime=120"]).arg(format!("--uri={volume}"));
    writer.current_dir(cluster.dir.path());
    let mut writer = Process::start("fio", cluster.path("fio.log"), &mut writer);
    let script = r#"
import nbd, sys, time, hashlib
h = nbd.NBD()
h.connect_uri(sys.argv[1])
def read():
    d = hashlib.sha256()
    for at in range(0, h.get_size(), 1 << 20):
        d.update(h.pread(1 << 20, at))
    return d.hexdigest()
pinned, first = h, read()
deadline, newer = time.monotonic() + 90, set()
# How long a CP takes is not what is tested: that several are seen beside the one that stays is.
while len(newer) < 3:
    assert time.monotonic() < deadline, 'new readers see no newer CPs: the test shows nothing'
    h = nbd.NBD()
    h.connect_uri(sys.argv[1])
    newer.add(read())
    h.shutdown()
    newer.discard(first)
    h = pinned
    assert read() == first, 'the image moved'
"#;
    let applied = || cluster.on_hub("filer-a")["applied_cp"].as_u64().unwrap_or_default();
    wait_for("a first CP", Duration::from_secs(60), || applied() > 1);
    let image = cluster.image("filer-a", "vol0");
    run(Command::new("/usr/bin/python3").arg("-c").arg(script).arg(&image));
    assert!(writer.runs(), "nobody wrote meanwhile: {}", writer.output());
}

/// Goal: an image opened at any moment is one cut. Method: one client writes numbered versions of
/// some blocks, one at a time, so that a cut is a number: every block holds the newest version up to
/// it. Images are opened at moments that have nothing to do with CPs.
#[test]
fn an_image_opened_at_any_moment_is_one_cut() {
    const BLOCKS: u64 = 64;
    let cluster = Cluster::start(&[SourceSettings::new("filer-a").interval("200ms")]);
    let limit = Duration::from_secs(20);
    let mut client =
        Client::unix(&cluster.path("filer-a/nbd.sock"), "filer-a/vol0", limit).expect("the volume");
    let stop = AtomicBool::new(false);
    let mut cuts = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for version in (1..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                let block = version % BLOCKS;
                client.write(block * 4096, &content(block, version)).expect("a write");
            }
        });
        let opened = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let begin = Instant::now();
            let seen = |cuts: &[u64]| cuts.iter().collect::<HashSet<_>>().len();
            while cuts.len() < 10 || seen(&cuts) < 6 && begin.elapsed() < Duration::from_secs(90) {
                pause(Duration::from_millis(270));
                cuts.push(cut(&cluster.path("hub/nbd.sock"), BLOCKS).expect("one cut"));
            }
        }));
        stop.store(true, Ordering::Relaxed);
        opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    println!("{cuts:?}");
    assert!(cuts.is_sorted() && cuts.iter().collect::<HashSet<_>>().len() > 5, "{cuts:?}");
    // Controls: a write behind one that is missing, and what is a cut.
    assert_eq!(versions_are_a_cut(&[4, 5, 2, 7]), Err(2));
    assert_eq!(versions_are_a_cut(&[64, 65, 2, 3]), Err(2));
    assert_eq!(versions_are_a_cut(&[4, 5, 2, 3]), Ok(5));
    assert_eq!(versions_are_a_cut(&[0, 1, 2, 0]), Ok(2));
}

/// The cut that an image shows.
fn cut(socket: &Path, blocks: u64) -> Result<u64, String> {
    let mut client = Client::unix(socket, "filer-a/vol0", Duration::from_secs(20))
        .map_err(|error| error.to_string())?;
    let read = |block: u64| version_of(block, &client.read(block * 4096, 4096).expect("a read"));
    let versions: Vec<u64> = (0..blocks).map(read).collect::<Result<_, _>>()?;
    versions_are_a_cut(&versions).map_err(|block| format!("block {block} of {versions:?}"))
}

/// Version n was written to block n modulo their number: all up to the newest there is, or the
/// block that holds another.
fn versions_are_a_cut(versions: &[u64]) -> Result<u64, usize> {
    let newest = versions.iter().copied().max().unwrap_or_default();
    let blocks = u64::try_from(versions.len()).expect("small");
    for (block, &version) in (0..).zip(versions) {
        // The newest number up to `newest` that falls on this block; 0 if there is none.
        let wanted = (newest + blocks - block) / blocks * blocks + block;
        let wanted = wanted.saturating_sub(blocks);
        if version != wanted {
            return Err(usize::try_from(block).expect("small"));
        }
    }
    Ok(newest)
}

/// Checkpoints of all sources are asked for at once: CPs that are there together share commits of
/// the catalog, and every image has moved. That both move in one commit is shown with held commits
/// in the hub's own tests.
#[test]
fn sources_that_signal_together_share_commits() {
    let names = ["filer-a", "filer-b", "filer-c", "filer-d"];
    let mut cluster = Cluster::start(&names.map(SourceSettings::new));
    let limit = Duration::from_secs(20);
    let base = cluster.path("");
    let open = |socket: &str, name: &str| {
        let export = format!("{name}/vol0");
        Client::unix(&base.join(socket), &export, limit).expect("the export")
    };
    let mut writers = names.map(|name| open(&format!("{name}/nbd.sock"), name));
    let url = cluster.hub_url("/metrics");
    let figures = || {
        let (_, page) = http_get(&url);
        let sum = |name: &str| sum_of(&page, name);
        (sum("mirrorhub_source_checkpoints_total"), sum("mirrorhub_catalog_commits_total"))
    };
    let before = figures();
    let since = || (figures().0 - before.0, figures().1 - before.1);
    // How often they meet is a matter of chance: so many times, and on until they have.
    for round in 1..=100_u8 {
        if round > 10 && since().1 < since().0 {
            break;
        }
        for writer in &mut writers {
            writer.write(0, &[round; 4096]).expect("a write");
        }
        std::thread::scope(|scope| {
            for name in names {
                let cluster = &cluster;
                scope.spawn(move || cluster.checkpoint(name));
            }
        });
        for name in names {
            let block = open("hub/nbd.sock", name).read(0, 4096).expect("a read");
            assert_eq!(block, [round; 4096], "{name} has moved");
        }
    }
    let (cps, commits) = since();
    println!("{cps} CPs in {commits} commits");
    assert!(cps >= 40, "{cps} CPs");
    assert!(commits < cps, "{commits} commits for {cps} CPs");

    // Of all of them, one is not there: it is named, the others have their CP.
    cluster.kill_source("filer-b");
    writers[3].write(0, &[111; 4096]).expect("a write");
    let output = try_run(
        Command::new(BINARY).args(["checkpoint", "--json", "--config"]).arg(cluster.hub_config()),
    );
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let of = |key: &str| {
        let all = answer[key].as_array().expect("a list");
        all.iter().map(|one| one["name"].as_str().expect("a name").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(
        (of("sources"), of("failed")),
        (["filer-a", "filer-c", "filer-d"].map(String::from).to_vec(), vec!["filer-b".to_owned()],)
    );
    assert!(!answer["failed"][0]["next_step"].as_str().expect("a step").is_empty(), "{answer}");
    assert_eq!(open("hub/nbd.sock", "filer-d").read(0, 4096).expect("a read"), [111; 4096]);
}

/// A checkpoint of a source that was never written to ends at once, at either end.
#[test]
fn a_checkpoint_with_nothing_to_say_ends() {
    let cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    for config in [cluster.hub_config(), cluster.source_config("filer-a")] {
        let mut command = Command::new("timeout");
        command.args(["20", BINARY, "checkpoint", "--json", "--config"]).arg(&config);
        let output = run(&mut command);
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(answer["sources"][0]["cp"], 0);
    }
}
