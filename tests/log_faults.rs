//! The log of one source fails on the hub, for want of room or with an I/O error: that source is
//! `faulted` within a second of the first refused write, and the clients of another source do not
//! feel it.
//!
//! The fault cannot be taken back while the hub runs, so the windows of `harness::windows` alternate
//! by cycles: the hub is started, windows are quiet until the log refuses its first write, and
//! disturbed from then on; the hub is killed, the log mended, and it begins again. The failing
//! source is written to all the time. strace shows the first refused write, in windows of both kinds.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::crashes::check;
use crate::harness::oracle::{Known, Writer};
use crate::harness::windows::Bystander;
use crate::harness::{BINARY, Cluster, SourceSettings, is_full, pause, run, wait_for};

const SOURCE: &str = "filer-a";
const WINDOW: Duration = Duration::from_millis(400);

/// Windows behind the fault of one cycle; as many as there are before it, more or less.
const WINDOWS_FAULTED: usize = 6;

/// How long the hub may need from the first refused write until it says so.
const FAULTED_MAX: Duration = Duration::from_secs(1);

fn cycles() -> usize {
    if is_full() { 10 } else { 2 }
}

/// A small file system of one source's logs, unmounted when dropped.
struct Tiny {
    path: PathBuf,
}

impl Tiny {
    fn mount(path: PathBuf, size: &str) -> Self {
        let kept = path.with_extension("kept");
        fs::rename(&path, &kept).expect("the log directory");
        fs::create_dir(&path).expect("mount point");
        let option = format!("size={size},mode=700");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(&path));
        let tiny = Self { path };
        run(Command::new("cp").arg("-a").arg(kept.join(".")).arg(&tiny.path));
        fs::remove_dir_all(&kept).expect("copied");
        tiny
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _unmounted =
            crate::harness::try_run(Command::new("umount").arg("--lazy").arg(&self.path));
    }
}

fn two_sources() -> Cluster {
    Cluster::start(&[SourceSettings::new(SOURCE), SourceSettings::new("filer-b")])
}

fn socket(cluster: &Cluster, name: &str) -> PathBuf {
    cluster.path(name).join("nbd.sock")
}

fn log_directory(cluster: &Cluster, name: &str) -> PathBuf {
    let id = cluster.on_hub(name)["id"].as_str().expect("an id").to_owned();
    cluster.path("hub/state/logs").join(id)
}

/// The hub under strace, which ends with it.
fn traced(cluster: &Cluster, trace: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("strace");
    // Only what is asked for stops the process, so that tracing costs the others little.
    command.args(["-D", "-f", "-qq", "--seccomp-bpf", "-o"]).arg(trace).args(arguments);
    command.arg(BINARY).arg("hub").arg("--config").arg(cluster.hub_config());
    command
}

/// When `word` first stands in the trace.
fn first(trace: PathBuf, word: &'static str) -> JoinHandle<Instant> {
    std::thread::spawn(move || {
        let traced = || fs::read_to_string(&trace).unwrap_or_default();
        wait_for("the log refuses a write", Duration::from_secs(40), || traced().contains(word));
        Instant::now()
    })
}

/// Quiet windows at the begin of each cycle.
const QUIET_WINDOWS: usize = 3;

/// What lets the log fail, and how it is seen.
struct Fault {
    /// Arguments of strace for a hub whose log of this directory is to fail.
    arguments: fn(&Path) -> Vec<String>,
    /// In the trace.
    refused: &'static str,
    /// In the status.
    reason: &'static str,
    /// Bytes of the log's own file system, in the words of mount, while it is to fail.
    room: Option<&'static str>,
}

/// What an administrator gives a log that has met the end of its file system.
const ROOM: &str = "256M";

fn give_room(directory: &Path, size: &str) {
    let option = format!("remount,size={size}");
    run(Command::new("mount").args(["-o", &option]).arg(directory));
}

/// The newest log file in a directory.
fn newest_log(directory: &Path) -> PathBuf {
    let logs = fs::read_dir(directory).expect("logs").filter_map(|entry| {
        let path = entry.expect("entry").path();
        path.extension().is_some_and(|extension| extension == "log").then_some(path)
    });
    logs.max().expect("there is a log")
}

/// Cycles until the other source's windows agree.
fn only_its_source_feels(fault: &Fault, cluster: &mut Cluster, directory: &Path, mut known: Known) {
    let mut bystander = Bystander::start(&socket(cluster, "filer-b"), "filer-b/vol0");
    bystander.endures(fault.reason, |bystander| {
        for _ in 0..cycles() {
            known = cycle(fault, cluster, directory, bystander, std::mem::take(&mut known));
        }
    });
    drop(bystander);
    check(cluster, SOURCE, &known);
    check(cluster, "filer-b", &Known::default());
}

fn cycle(
    fault: &Fault,
    cluster: &mut Cluster,
    directory: &Path,
    bystander: &mut Bystander,
    known: Known,
) -> Known {
    // Something of this interval is in the log, so that it is there when the hub begins.
    let writer = Writer::start(socket(cluster, SOURCE), "filer-a/vol0", known, 4, 9);
    writer.wait_answered(20);
    let known = writer.finish();
    cluster.kill_hub();
    fault.room.into_iter().for_each(|size| give_room(directory, size));
    let trace = cluster.path("strace.out");
    drop(fs::remove_file(&trace));
    let arguments = (fault.arguments)(directory);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = traced(cluster, &trace, &arguments);
    cluster.start_hub_with(&mut command);
    cluster.start_all();
    // A fast machine comes to the fault within the first window under load.
    for _ in 0..QUIET_WINDOWS {
        bystander.quiet(|| pause(WINDOW));
    }
    let refused = first(trace, fault.refused);
    let writer = Writer::start(socket(cluster, SOURCE), "filer-a/vol0", known, 4, 11);
    writer.wait_answered(20);
    let mut under_load = false;
    while !refused.is_finished() {
        bystander.quiet(|| pause(WINDOW));
        under_load = true;
    }
    let refused = refused.join().expect("the log refused a write");
    if under_load {
        // The window in which it did belongs to the fault as well.
        bystander.last_was_disturbed();
    }
    wait_for("faulted", FAULTED_MAX.saturating_sub(refused.elapsed()), || {
        let shown = cluster.on_hub(SOURCE);
        shown["state"] == "faulted"
            && shown["reason"].as_str().is_some_and(|reason| reason.contains(fault.reason))
    });
    println!("faulted within {:.1?}", refused.elapsed());
    let answered = writer.answered();
    for _ in 0..WINDOWS_FAULTED {
        bystander.disturbed(|| pause(WINDOW));
    }
    assert_eq!(writer.answered(), answered, "acknowledged though its log failed");
    assert_eq!(cluster.on_hub(SOURCE)["state"], "faulted");
    assert_eq!(cluster.on_hub("filer-b")["state"], "in-sync");
    cluster.kill_hub();
    // What the ring still holds of it goes into the log at the start.
    fault.room.into_iter().for_each(|_| give_room(directory, ROOM));
    cluster.start_hub();
    let known = writer.finish();
    cluster.start_all();
    // The log of this cycle goes with its CP.
    cluster.checkpoint(SOURCE);
    known
}

/// One source's log directory is full.
#[test]
fn a_full_log_faults_its_source_alone() {
    let mut cluster = two_sources();
    let own = Writer::start(socket(&cluster, SOURCE), "filer-a/vol0", Known::default(), 4, 9);
    own.wait_answered(50);
    let own = own.finish();
    let directory = log_directory(&cluster, SOURCE);
    cluster.kill_hub();
    // It fails when it has filled half of what it is given.
    let tiny = Tiny::mount(directory.clone(), ROOM);
    cluster.start_all();
    cluster.checkpoint(SOURCE);
    let fault = Fault {
        arguments: |_| ["-e", "trace=fallocate,pwritev"].map(str::to_owned).to_vec(),
        refused: "ENOSPC",
        reason: "No space left on device",
        room: Some("14M"),
    };
    only_its_source_feels(&fault, &mut cluster, &directory, own);
    cluster.end();
    drop(tiny);
}

/// A write into one source's log fails with EIO, and every later one.
#[test]
fn a_failing_log_faults_its_source_within_a_second() {
    let mut cluster = two_sources();
    let own = Writer::start(socket(&cluster, SOURCE), "filer-a/vol0", Known::default(), 4, 10);
    own.wait_answered(50);
    let own = own.finish();
    let directory = log_directory(&cluster, SOURCE);
    let fault = Fault {
        arguments: |directory| {
            let log = newest_log(directory).display().to_string();
            let inject = "inject=pwritev:error=EIO:when=400+".to_owned();
            let trace = "trace=pwritev".to_owned();
            vec!["-P".to_owned(), log, "-e".to_owned(), trace, "-e".to_owned(), inject]
        },
        refused: "(INJECTED)",
        reason: "Input/output error",
        room: None,
    };
    only_its_source_feels(&fault, &mut cluster, &directory, own);
}
