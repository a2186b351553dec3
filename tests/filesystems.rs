//! A kernel's file systems on a volume: ext4 and xfs made and used through nbdfuse and a loop
//! device, and found whole and equal in the image of the hub.
//!
//! Needs root, /dev/fuse and a loop device; where they are missing these tests fail and say so.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::harness::{Cluster, Process, SourceSettings, run, try_run, wait_for};

/// A file system and the tools that make and check it.
#[derive(Debug, Clone, Copy)]
struct Kind {
    make: &'static [&'static str],
    /// Checks without changing anything; fails if something is wrong.
    check: &'static [&'static str],
    /// Options to mount a copy while the original is mounted.
    copy_options: &'static str,
}

const EXT4: Kind =
    Kind { make: &["mkfs.ext4", "-q"], check: &["e2fsck", "-fn"], copy_options: "noatime" };

const XFS: Kind =
    Kind { make: &["mkfs.xfs", "-q"], check: &["xfs_repair", "-n"], copy_options: "nouuid" };

/// xfs makes none smaller than 300 MiB.
const SIZE: &str = "320MiB";

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
}

/// Fails with what is missing.
pub fn need_kernel() {
    for device in ["/dev/fuse", "/dev/loop-control"] {
        assert!(
            fs::metadata(device).is_ok(),
            "{device} is missing: this test needs fuse and loop devices (a privileged container)"
        );
    }
    assert!(rustix::process::getuid().is_root(), "this test mounts file systems: run it as root");
}

/// A loop device, ended when dropped.
#[derive(Debug)]
pub struct Loop {
    device: String,
}

impl Loop {
    /// Over a file.
    pub fn over(file: &Path) -> Self {
        let output = run(Command::new("losetup").args(["-f", "--show"]).arg(file));
        let device = String::from_utf8(output.stdout).expect("a name").trim().to_owned();
        Self { device }
    }

    /// Its path.
    pub fn device(&self) -> &str {
        &self.device
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(Command::new("losetup").arg("-d").arg(&self.device).output());
    }
}

/// A mounted file system, unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    dir: PathBuf,
}

impl Mount {
    /// Mounts `device` there.
    pub fn at(dir: PathBuf, device: &str, options: &str) -> Self {
        fs::create_dir_all(&dir).expect("mount point");
        run(Command::new("mount").args(["-o", options, device]).arg(&dir));
        Self { dir }
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Unmounts and wants it to succeed.
    pub fn close(self) {
        run(Command::new("umount").arg(&self.dir));
        drop(self);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if is_mounted(&self.dir) {
            let done = Command::new("umount").arg(&self.dir).output();
            if !done.is_ok_and(|output| output.status.success()) {
                drop(Command::new("umount").arg("-l").arg(&self.dir).output());
            }
        }
    }
}

fn is_mounted(dir: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(1) == dir.to_str())
}

/// A volume as a block device of this kernel: NBD through fuse, then loop.
#[derive(Debug)]
pub struct Attached {
    // Ended in this order: the loop device first, then fuse.
    looped: Loop,
    _fuse: Fuse,
}

/// An export as a file, by nbdfuse.
#[derive(Debug)]
struct Fuse {
    dir: PathBuf,
    process: Process,
}

impl Attached {
    /// The export at `uri`.
    pub fn new(cluster: &Cluster, name: &str, uri: &str) -> Self {
        let dir = cluster.path(&format!("{name}.fuse"));
        fs::create_dir_all(&dir).expect("directory");
        let log = cluster.path(&format!("{name}.fuse.log"));
        let mut start = Command::new("nbdfuse");
        start.arg(&dir).arg(uri);
        let mut fuse =
            Fuse { dir: dir.clone(), process: Process::start("nbdfuse", log, &mut start) };
        let file = dir.join("nbd");
        wait_for("nbdfuse shows the volume", Duration::from_secs(20), || {
            assert!(fuse.process.runs(), "nbdfuse ended:\n{}", fuse.process.output());
            fs::metadata(&file).is_ok()
        });
        Self { looped: Loop::over(&file), _fuse: fuse }
    }

    /// Path of the block device.
    pub fn device(&self) -> &str {
        self.looped.device()
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        // A loop device that was just detached may still be letting go of the file.
        for _ in 0..50 {
            if !is_mounted(&self.dir) {
                return;
            }
            drop(Command::new("fusermount3").arg("-u").arg(&self.dir).output());
            crate::harness::pause(Duration::from_millis(50));
        }
        drop(Command::new("fusermount3").arg("-uz").arg(&self.dir).output());
    }
}

/// A tree of files beside, to compare with: small ones, a large one, a sparse one, links.
fn make_tree(dir: &Path, seed: u64) {
    fs::create_dir_all(dir.join("many/deep")).expect("directory");
    let mut state = seed | 1;
    for n in 0..120_u64 {
        let mut bytes = Vec::new();
        while bytes.len() < usize::try_from(n * 397).expect("small") {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        let place = if n % 3 == 0 { "many/deep" } else { "many" };
        fs::write(dir.join(place).join(format!("file-{n}")), bytes).expect("file");
    }
    let sparse = fs::File::create(dir.join("sparse")).expect("file");
    sparse.set_len(5 << 20).expect("length");
    std::os::unix::fs::symlink("many/file-1", dir.join("link")).expect("link");
    fs::hard_link(dir.join("many/file-1"), dir.join("hard")).expect("link");
}

/// dd with conv=fsync: what a careful administrator's copy does.
fn dd(to: &Path, bs: &str, count: &str) {
    run(Command::new("dd")
        .args(["if=/dev/urandom", &format!("bs={bs}"), &format!("count={count}"), "conv=fsync"])
        .arg(format!("of={}", to.display())));
}

/// Copies an export to a file.
pub fn nbdcopy(from: &str, to: &Path) {
    run(Command::new("nbdcopy").arg("--").arg(from).arg(to));
}

fn check(kind: &Kind, file: &Path) {
    run(command(kind.check).arg(file));
}

/// Compares two trees; `lost+found` is ext4's own.
fn differences(a: &Path, b: &Path) -> std::process::Output {
    try_run(Command::new("diff").args(["-r", "--no-dereference", "-x", "lost+found"]).arg(a).arg(b))
}

fn is_used_and_found_whole(kind: &Kind) {
    need_kernel();
    let settings = SourceSettings::new("filer-a").volumes(&[("vol0", SIZE)]).pool("2GiB");
    let cluster = Cluster::start(&[settings]);
    let attached = Attached::new(&cluster, "vol0", &cluster.volume("filer-a", "vol0"));
    run(command(kind.make).arg(attached.device()));
    let beside = cluster.path("beside");
    make_tree(&beside, 11);
    let mount = Mount::at(cluster.path("mnt"), attached.device(), "noatime");
    run(Command::new("cp").arg("-a").arg(format!("{}/.", beside.display())).arg(&mount.dir));
    dd(&mount.dir.join("large"), "1M", "24");
    dd(&mount.dir.join("odd"), "777", "1999");
    dd(&mount.dir.join("gone"), "1M", "16");
    for name in ["large", "odd"] {
        run(Command::new("cp").arg(mount.dir.join(name)).arg(&beside));
    }
    fs::remove_file(mount.dir.join("gone")).expect("a file is removed");
    run(Command::new("sync").arg("-f").arg(&mount.dir));
    run(Command::new("fstrim").arg(&mount.dir));
    mount.close();
    let mount = Mount::at(cluster.path("mnt"), attached.device(), "noatime");
    let output = differences(&beside, &mount.dir);
    assert!(output.status.success(), "after a remount: {output:?}");
    fs::write(mount.dir.join("after"), "written after the remount").expect("file");
    fs::write(beside.join("after"), "written after the remount").expect("file");
    mount.close();
    drop(attached);

    cluster.checkpoint("filer-a");
    let copy = cluster.path("copy.img");
    nbdcopy(&cluster.image("filer-a", "vol0"), &copy);
    check(kind, &copy);
    let looped = Loop::over(&copy);
    let image = Mount::at(cluster.path("image"), &looped.device, "ro");
    let output = differences(&beside, &image.dir);
    assert!(output.status.success(), "image and source differ: {output:?}");
    // Negative controls: a tree with one other byte is unequal, a damaged copy is not clean.
    fs::write(beside.join("many/file-2"), "other").expect("file");
    assert!(!differences(&beside, &image.dir).status.success());
    image.close();
    drop(looped);
    damage(&copy);
    assert!(!try_run(command(kind.check).arg(&copy)).status.success(), "damage is not seen");
}

/// Overwrites the first 64 KiB behind the first: superblock and the tables behind it.
fn damage(copy: &Path) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().write(true).open(copy).expect("copy");
    file.write_all_at(&[0xa5; 65_536], 0).expect("damage");
    file.write_all_at(&[0xa5; 65_536], 160 << 20).expect("damage");
}

#[test]
fn ext4_is_used_on_the_source_and_found_whole_on_the_hub() {
    is_used_and_found_whole(&EXT4);
}

#[test]
fn xfs_is_used_on_the_source_and_found_whole_on_the_hub() {
    is_used_and_found_whole(&XFS);
}

/// Appends numbered lines to a file in order, each synced before the next; other files come and
/// go beside it, so that the journal always has work.
struct Sequence {
    stop: Arc<AtomicBool>,
    synced: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

fn line(n: u64) -> String {
    format!("{n:015}\n")
}

impl Sequence {
    fn start(dir: PathBuf) -> Self {
        let (stop, synced) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&synced));
        let thread = std::thread::spawn(move || {
            let mut file = fs::File::create(dir.join("sequence")).expect("sequence file");
            let mut n = 0;
            while !stopped.load(Ordering::Relaxed) {
                file.write_all(line(n).as_bytes()).expect("line");
                file.sync_data().expect("sync");
                n += 1;
                counted.store(n, Ordering::Relaxed);
                fs::write(dir.join(format!("beside-{}", n % 50)), vec![1; 9000]).expect("file");
                if n % 3 == 0 {
                    drop(fs::remove_file(dir.join(format!("beside-{}", (n + 7) % 50))));
                }
            }
        });
        Self { stop, synced, thread: Some(thread) }
    }

    fn synced(&self) -> u64 {
        self.synced.load(Ordering::Relaxed)
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the writer of the sequence failed");
        }
    }
}

/// Number of lines if `text` is a prefix of the sequence; a last line cut short counts as none.
fn prefix(text: &[u8]) -> Result<u64, String> {
    let mut count = 0;
    for part in text.chunks(16) {
        let wanted = line(count);
        if part == wanted.as_bytes() {
            count += 1;
        } else if !wanted.as_bytes().starts_with(part) {
            return Err(format!("line {count} is {:?}", String::from_utf8_lossy(part)));
        }
    }
    Ok(count)
}

fn an_image_is_one_cut(kind: &Kind) {
    need_kernel();
    let settings = SourceSettings::new("filer-a").volumes(&[("vol0", SIZE)]).pool("2GiB");
    let cluster = Cluster::start(&[settings.interval("200ms")]);
    let attached = Attached::new(&cluster, "vol0", &cluster.volume("filer-a", "vol0"));
    run(command(kind.make).arg(attached.device()));
    let mount = Mount::at(cluster.path("mnt"), attached.device(), "noatime");
    let sequence = Sequence::start(mount.dir.clone());
    let mut last = 0;
    for cut in 0..3 {
        let wanted = sequence.synced() + 15;
        wait_for("the sequence grows", Duration::from_secs(60), || sequence.synced() >= wanted);
        // What was synced before the checkpoint was asked for is in it.
        let least = sequence.synced();
        cluster.checkpoint("filer-a");
        let copy = cluster.path("cut.img");
        nbdcopy(&cluster.image("filer-a", "vol0"), &copy);
        let most = sequence.synced() + 1;
        let looped = Loop::over(&copy);
        // Mounting it for writing replays the journal, as after a power cut.
        let image = Mount::at(cluster.path("cut"), &looped.device, kind.copy_options);
        let text = fs::read(image.dir.join("sequence")).expect("the sequence is in the image");
        image.close();
        drop(looped);
        check(kind, &copy);
        let met = prefix(&text).unwrap_or_else(|what| panic!("cut {cut}: {what}"));
        assert!(met >= least, "cut {cut}: {met} lines, {least} were synced before");
        assert!(met <= most, "cut {cut}: {met} lines of {most} written");
        assert!(met > last, "the image did not move on");
        last = met;
        fs::remove_file(&copy).expect("copy");
    }
    drop(sequence);
    mount.close();
}

#[test]
fn an_image_of_ext4_in_use_is_one_cut() {
    an_image_is_one_cut(&EXT4);
}

#[test]
fn an_image_of_xfs_in_use_is_one_cut() {
    an_image_is_one_cut(&XFS);
}

#[test]
fn a_gap_in_the_sequence_is_seen() {
    let good = [line(0), line(1), line(2)].concat();
    assert_eq!(prefix(good.as_bytes()), Ok(3));
    assert_eq!(prefix(&good.as_bytes()[..40]), Ok(2));
    assert!(prefix([line(0), line(2)].concat().as_bytes()).is_err());
    assert!(prefix(&[line(0).as_bytes(), &[0; 16]].concat()).is_err());
}
