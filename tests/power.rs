//! Power cuts: the state directories lie on a disk whose cache is lost with the power.
//!
//! The disk is nbdkit with its cache filter: what was not flushed lives in the memory of that
//! process, and kill -9 of it is the power cut. nbdfuse makes the export a file, a loop device
//! makes it a disk, ext4 makes it a file system, whose journal is replayed after each cut as after
//! a real one. [`Disk`] is called by these tests only.
//!
//! Two controls say that this shows anything: a file written without a sync is lost by such a cut
//! and one with a sync is not; and on a disk that ignores flushes the same hub and source lose
//! acknowledged writes, which the oracle sees. Needs root, /dev/fuse and loop devices, and fails
//! without them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::crashes::check;
use crate::harness::oracle::{Known, Writer};
use crate::harness::{
    Cluster, Process, SourceSettings, is_full, pause, run, status, try_run, wait_for,
};

/// Bytes of a disk; sparse below.
const DISK_BYTES: u64 = 1 << 30;
const SOURCE: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";

/// What a disk does with what it was told to flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Keeps writes until a flush, then writes them down. Its size has no bound: with
    /// `cache-max-size` nbdkit 1.32 throws dirty blocks away, which no disk does.
    Honest,
    /// Says that it flushed, and did not.
    Lies,
}

/// A disk with a volatile cache, mounted.
#[derive(Debug)]
pub struct Disk {
    // In this order they are dropped: a directory can go when nothing is mounted in it.
    power: Option<Power>,
    dir: tempfile::TempDir,
    mount_point: PathBuf,
    starts: u32,
}

/// The processes and devices of a disk that is switched on.
#[derive(Debug)]
struct Power {
    nbdkit: Process,
    nbdfuse: Process,
    file: PathBuf,
    device: Option<String>,
    mounted: bool,
}

/// Fails with the reason if this machine cannot have such disks.
fn require_devices() {
    for path in ["/dev/fuse", "/dev/loop-control"] {
        let opened = fs::File::options().read(true).write(true).open(path);
        assert!(opened.is_ok(), "power cuts need {path} and root: {:?}", opened.err());
    }
    for program in ["nbdkit", "nbdfuse", "losetup", "mkfs.ext4", "mount", "umount"] {
        let found = try_run(Command::new("sh").args(["-c", "command -v \"$0\"", program]));
        assert!(found.status.success(), "power cuts need `{program}`: see tests/run");
    }
}

impl Disk {
    /// A new disk with ext4, mounted at `mount_point`.
    pub fn new(mount_point: PathBuf, cache: Cache) -> Self {
        require_devices();
        let dir = tempfile::Builder::new().prefix("mirrorhub-disk-").tempdir().expect("directory");
        let image = fs::File::create_new(dir.path().join("disk.img")).expect("disk file");
        image.set_len(DISK_BYTES).expect("size of the disk");
        run(Command::new("mkfs.ext4")
            .args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
            .arg(dir.path().join("disk.img")));
        fs::create_dir_all(&mount_point).expect("mount point");
        let mut disk = Self { dir, mount_point, power: None, starts: 0 };
        disk.on(cache);
        disk
    }

    /// Switches it on and mounts it.
    pub fn on(&mut self, cache: Cache) {
        assert!(self.power.is_none(), "it is on");
        self.starts += 1;
        let start = self.starts;
        let path = |name: &str| self.dir.path().join(format!("{name}.{start}"));
        let (socket, file) = (path("socket"), path("fuse"));
        fs::write(&file, b"").expect("mount point of nbdfuse");
        let mut nbdkit = Command::new("nbdkit");
        nbdkit.args(["-f", "-U"]).arg(&socket).args(["--filter=cache", "file"]);
        nbdkit.arg(self.dir.path().join("disk.img")).arg("cache-min-block-size=4096");
        nbdkit.args(match cache {
            Cache::Honest => vec!["cache=writeback"],
            Cache::Lies => vec!["cache=unsafe"],
        });
        nbdkit.env("TMPDIR", self.dir.path());
        let nbdkit = Process::start("nbdkit", path("nbdkit.log"), &mut nbdkit);
        wait_for("nbdkit listens", Duration::from_secs(60), || {
            socket.try_exists().expect("socket")
        });
        let mut nbdfuse = Command::new("nbdfuse");
        nbdfuse.arg(&file).arg(format!("nbd+unix:///?socket={}", socket.display()));
        let nbdfuse = Process::start("nbdfuse", path("nbdfuse.log"), &mut nbdfuse);
        let power = Power { nbdkit, nbdfuse, file, device: None, mounted: false };
        let power = self.power.insert(power);
        wait_for("nbdfuse shows the disk", Duration::from_secs(60), || {
            fs::metadata(&power.file).is_ok_and(|found| found.len() == DISK_BYTES)
        });
        let attached = run(Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on"])
            .arg(&power.file));
        let device = String::from_utf8(attached.stdout).expect("a device").trim().to_owned();
        power.device = Some(device.clone());
        run(Command::new("mount").args(["-t", "ext4"]).arg(&device).arg(&self.mount_point));
        power.mounted = true;
    }

    /// The power goes: what the cache holds is gone. What still writes meets errors.
    pub fn cut(&mut self) {
        self.power.as_mut().expect("it is on").nbdkit.kill();
    }

    /// After [`Disk::cut`] and the end of all who used it: takes the dead disk away.
    pub fn take_away(&mut self) {
        drop(self.power.take());
        // The device must be gone before another start, or two file systems were one disk.
        let name = self.mount_point.display().to_string();
        let mounts = fs::read_to_string("/proc/mounts").expect("mounts");
        assert!(!mounts.contains(&name), "still mounted: {name}");
    }

    /// A clean shutdown: unmounted, everything written down.
    fn off(&mut self) {
        run(Command::new("umount").arg(&self.mount_point));
        let power = self.power.as_mut().expect("it is on");
        power.mounted = false;
        power.detach();
        // The kernel lets go of a loop device behind the back of `losetup`.
        wait_for("the disk below is free", Duration::from_secs(20), || {
            try_run(Command::new("umount").arg(&power.file)).status.success()
        });
        power.nbdkit.stop(Duration::from_secs(20));
        self.power = None;
    }

    /// A power cut with nobody on it, and the restart.
    fn cut_and_restart(&mut self) {
        self.cut();
        self.take_away();
        self.on(Cache::Honest);
    }

    fn mount_point(&self) -> &Path {
        &self.mount_point
    }
}

impl Power {
    fn detach(&mut self) {
        if let Some(device) = self.device.take() {
            let _detached = try_run(Command::new("losetup").arg("--detach").arg(device));
        }
    }
}

impl Drop for Power {
    fn drop(&mut self) {
        self.nbdkit.kill();
        if self.mounted {
            let device = self.device.clone().unwrap_or_default();
            let _unmounted = try_run(Command::new("umount").arg("--lazy").arg(device));
        }
        self.nbdfuse.kill();
        self.detach();
        let _unmounted = try_run(Command::new("umount").arg("--lazy").arg(&self.file));
    }
}

/// A hub and a source, each with its state on a disk of its own.
#[derive(Debug)]
struct Powered {
    // The disks are taken away before the cluster's directory goes.
    hub: Disk,
    source: Disk,
    cluster: Cluster,
}

impl Drop for Powered {
    fn drop(&mut self) {
        // The processes end first, else they would hold the dead disks.
        self.cluster.end();
    }
}

impl Powered {
    fn start() -> Self {
        let mut settings = SourceSettings::new(SOURCE).interval("300ms").nvram("16MiB");
        settings.pool = "384MiB".to_owned();
        let mut cluster = Cluster::prepare_with(&[settings], "32MiB", "512MiB");
        let hub = Disk::new(cluster.path("hub/state"), Cache::Honest);
        let source = Disk::new(cluster.path(SOURCE).join("state"), Cache::Honest);
        cluster.start_all();
        Self { cluster, hub, source }
    }

    fn socket(&self) -> PathBuf {
        self.cluster.path(SOURCE).join("nbd.sock")
    }

    /// How each end makes a write durable, as status says.
    fn print_durability(&self) {
        let hub = self.cluster.hub_status()["nvram"]["durability"].clone();
        let source = status(&self.cluster.source_config(SOURCE)).expect("the source answers");
        println!("durability: hub {hub}, source {}", source["nvram"]["durability"]);
    }

    /// Cuts these ends. `stopped`: the processes stand still at that moment, and see nothing of
    /// it; else they may meet errors of the dying disk before they die.
    fn cut(&mut self, ends: Ends, stopped: bool) {
        if stopped {
            if ends.hub() {
                self.cluster.signal_hub("STOP");
            }
            if ends.source() {
                self.cluster.signal_source(SOURCE, "STOP");
            }
        }
        if ends.hub() {
            self.hub.cut();
        }
        if ends.source() {
            self.source.cut();
        }
        if ends.hub() {
            self.cluster.kill_hub();
        }
        if ends.source() {
            self.cluster.kill_source(SOURCE);
        }
    }

    fn power_on(&mut self, ends: Ends) {
        if ends.hub() {
            self.hub.take_away();
            self.hub.on(Cache::Honest);
        }
        if ends.source() {
            self.source.take_away();
            self.source.on(Cache::Honest);
        }
    }

    fn restart(&mut self, ends: Ends) {
        if ends.hub() {
            self.cluster.start_hub();
        }
        if ends.source() {
            self.cluster.start_source(SOURCE);
        }
    }
}

/// Whose power is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    Hub,
    Source,
    Both,
}

impl Ends {
    fn hub(self) -> bool {
        matches!(self, Self::Hub | Self::Both)
    }

    fn source(self) -> bool {
        matches!(self, Self::Source | Self::Both)
    }
}

/// The seed of a run: `MIRRORHUB_SEED`, else a fixed one of the test.
pub fn seed(default: u64) -> u64 {
    let given = std::env::var("MIRRORHUB_SEED").ok();
    given.map_or(default, |text| text.parse().expect("MIRRORHUB_SEED is a number"))
}

fn cuts(normal: u64) -> u64 {
    if is_full() { 200 } else { normal }
}

/// The next of a row of numbers that a seed makes (splitmix64).
pub fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Cuts the power `count` times under load and checks after each.
fn cut_under_load(ends: Ends, seed: u64, count: u64) {
    println!("{ends:?}: seed {seed}, {count} cuts (again with MIRRORHUB_SEED={seed})");
    let begin = Instant::now();
    let mut powered = Powered::start();
    powered.print_durability();
    let mut known = Known::default();
    let (mut state, mut written) = (seed, 0);
    for round in 0..count {
        let (answers, length) = (20 + next(&mut state) % 400, next(&mut state) % 150);
        let stopped = next(&mut state).is_multiple_of(2);
        let depth = if next(&mut state).is_multiple_of(4) { 1 } else { 16 };
        let writer = Writer::start(powered.socket(), EXPORT, known, depth, next(&mut state));
        writer.wait_answered(answers);
        pause(Duration::from_millis(length));
        powered.cut(ends, stopped);
        let answered = writer.answered();
        println!(
            "cut {round} at {:.1?}: {answered} answered, stopped {stopped}, depth {depth}",
            begin.elapsed()
        );
        powered.power_on(ends);
        powered.restart(ends);
        if ends == Ends::Hub {
            // The client lived through it: it goes on, and sees no error.
            writer.wait_answered(answered + 30);
        }
        written += writer.answered();
        known = writer.finish();
        check(&mut powered.cluster, SOURCE, &known);
    }
    println!("{written} answered writes, {count} cuts, {:.1?}", begin.elapsed());
    assert!(written > count * 20, "the test wrote too little to show anything");
}

#[test]
fn the_hubs_power_is_cut_under_load() {
    cut_under_load(Ends::Hub, seed(1), cuts(10));
}

#[test]
fn the_sources_power_is_cut_under_load() {
    cut_under_load(Ends::Source, seed(2), cuts(10));
}

#[test]
fn both_ends_lose_power_at_once() {
    cut_under_load(Ends::Both, seed(3), cuts(10));
}

/// The control: the same on disks that ignore flushes loses acknowledged writes, and the oracle
/// sees it.
#[test]
fn without_syncs_a_power_cut_loses_acknowledged_writes() {
    let seed = seed(4);
    println!("seed {seed}");
    let mut powered = Powered::start();
    let begin = Instant::now();
    assert!(powered.cluster.stop_source(SOURCE).success());
    // Nothing was ever written: there is no last CP to wait for.
    assert!(begin.elapsed() < Duration::from_secs(8), "stopped after {:?}", begin.elapsed());
    assert!(powered.cluster.stop_hub().success());
    powered.hub.off();
    powered.source.off();
    powered.hub.on(Cache::Lies);
    powered.source.on(Cache::Lies);
    powered.cluster.start_all();
    let writer = Writer::start(powered.socket(), EXPORT, Known::default(), 16, seed);
    writer.wait_answered(200);
    powered.cut(Ends::Both, true);
    let known = writer.finish();
    powered.power_on(Ends::Both);
    powered.restart(Ends::Both);
    powered.cluster.wait_in_sync(SOURCE);
    let seen = known.check_export(&powered.socket(), EXPORT);
    println!("the oracle: {seen:?}");
    let lost = seen.expect_err("a disk that ignores flushes must lose acknowledged writes");
    assert!(lost.contains("holds version"), "not a loss but another error: {lost}");
}

/// The test of the test: such a cut loses what was not synced and keeps what was.
#[test]
fn a_cut_loses_what_was_not_synced_and_nothing_else() {
    let root = tempfile::Builder::new().prefix("mirrorhub-").tempdir().expect("directory");
    let mut disk = Disk::new(root.path().join("mount"), Cache::Honest);
    let path = |name: &str| root.path().join("mount").join(name);
    let (old, new) = (vec![b'o'; 1 << 20], vec![b'n'; 1 << 20]);
    let synced = |name: &str, data: &[u8]| {
        let mut file = fs::File::create(path(name)).expect("file");
        file.write_all(data).expect("write");
        file.sync_all().expect("sync");
    };
    for name in ["kept", "lost", "direct"] {
        synced(name, &old);
    }
    run(Command::new("sync").arg("--file-system").arg(disk.mount_point()));
    synced("kept", &new);
    // Past the page cache, into the disk's own cache, and no flush: the worst case for the test.
    run(Command::new("dd")
        .args(["if=/dev/zero", "bs=4096", "count=8", "oflag=direct", "conv=notrunc"])
        .arg(format!("of={}", path("direct").display())));
    let rewrite = fs::File::options().write(true).open(path("lost"));
    rewrite.expect("file").write_all(&new).expect("write");
    assert_eq!(fs::read(path("lost")).expect("read"), new, "readable before the cut");
    disk.cut_and_restart();
    assert_eq!(fs::read(path("kept")).expect("read"), new, "synced data was lost");
    assert_eq!(fs::read(path("lost")).expect("read"), old, "data without a sync was kept");
    assert_eq!(fs::read(path("direct")).expect("read"), old, "the disk's cache survived");
    // And on a disk that lies, synced data is lost as well.
    disk.off();
    disk.on(Cache::Lies);
    synced("kept", &old);
    disk.cut_and_restart();
    assert_eq!(fs::read(path("kept")).expect("read"), new, "the lying disk kept it");
    disk.off();
}
