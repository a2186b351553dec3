//! The n-th system call fails, or the process dies in it: strace on the real processes.
//!
//! Each case restarts one end under strace, which lets the n-th call of a kind on one device fail
//! (EIO, ENOSPC) or kills the process there, while a client writes. Then that end is killed and
//! restarted without strace, and nothing acknowledged may be missing. strace counts calls by
//! thread, so n is the n-th of the thread that gets there first; each device has one that writes.
//! How many there are is counted first, in an unharmed run of the same: the full run takes all n up
//! to that, the other some spread over it, and each has to be reached. The pool of either end is
//! fdatasynced, the rings are written with O_DSYNC. A short write is not among strace's harms, and
//! syncfs is called for many sources only: the simulated device has the one,
//! `sourcelog::tests::faults` the other.
//! `MIRRORHUB_CASE=TEXT` runs only the cases whose printed line contains the text.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::crashes::check;
use crate::harness::oracle::{Known, Writer};
use crate::harness::{BINARY, Cluster, SourceSettings, is_full, pause, status, wait_for};

const SOURCE: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";

/// Writes of the unharmed run, in which calls are counted.
const UNHARMED: u64 = 300;

/// Which end a case hurts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Hub,
    Source,
}

impl End {
    fn role(self) -> &'static str {
        match self {
            Self::Hub => "hub",
            Self::Source => "source",
        }
    }

    fn config(self, cluster: &Cluster) -> PathBuf {
        match self {
            Self::Hub => cluster.hub_config(),
            Self::Source => cluster.source_config(SOURCE),
        }
    }

    fn directory(self) -> &'static str {
        match self {
            Self::Hub => "hub/state",
            Self::Source => "filer-a/state",
        }
    }
}

/// The system calls that a row of cases hurts.
#[derive(Debug, Clone, Copy)]
struct Row {
    /// File below the state directory; empty for calls that only source logs make.
    file: &'static str,
    call: &'static str,
    /// `error=EIO` and the like.
    harm: &'static str,
    /// How many calls of them, in the normal run; all up to the last one in the full run.
    cases: u32,
}

const fn row(file: &'static str, call: &'static str, harm: &'static str, cases: u32) -> Row {
    Row { file, call, harm, cases }
}

const EIO: &str = "error=EIO";
const ENOSPC: &str = "error=ENOSPC";
const KILL: &str = "signal=KILL";

const HUB_ROWS: [Row; 11] = [
    row("nvram", "pwrite64", EIO, 4),
    row("nvram", "pwrite64", KILL, 3),
    row("disk0", "pwrite64", EIO, 2),
    row("disk0", "pwrite64", ENOSPC, 1),
    row("disk0", "pwrite64", KILL, 2),
    row("disk0", "fdatasync", EIO, 2),
    row("disk0", "fdatasync", KILL, 2),
    row("", "pwritev", EIO, 2),
    row("", "pwritev", KILL, 2),
    row("", "fallocate", ENOSPC, 1),
    row("", "fsync", EIO, 1),
];

const SOURCE_ROWS: [Row; 7] = [
    row("nvram", "pwrite64", EIO, 5),
    row("nvram", "pwrite64", ENOSPC, 2),
    row("nvram", "pwrite64", KILL, 4),
    row("disk0", "pwrite64", EIO, 2),
    row("disk0", "pwrite64", KILL, 2),
    row("disk0", "fdatasync", EIO, 2),
    row("disk0", "fdatasync", KILL, 2),
];

/// Which calls of a row, when `all` are made: in the normal run spread evenly by ratio, from the
/// first to one of the last.
fn counts(row: Row, all: u64) -> Vec<u64> {
    if is_full() {
        return (1..=all).collect();
    }
    let last = f64::from(u32::try_from(all).expect("few calls")) * 0.8;
    let steps = f64::from(row.cases.max(2) - 1);
    let mut counts: Vec<u64> = Vec::new();
    for case in 0..row.cases {
        let count = last.powf(f64::from(case) / steps).floor();
        let count = (1..=all).rev().find(|&n| to_f64(n) <= count).unwrap_or(1);
        // Where there are few calls two of them may fall on the same.
        let next = counts.last().map_or(1, |before| before + 1);
        counts.push(count.max(next));
    }
    counts
}

fn to_f64(count: u64) -> f64 {
    f64::from(u32::try_from(count).expect("few calls"))
}

/// How many calls of each row one thread makes in an unharmed run; what was written in it.
fn calls(cluster: &mut Cluster, end: End, rows: &[Row]) -> (Vec<u64>, Known) {
    stop(cluster, end);
    let trace = cluster.path("strace.out");
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-qq", "-y", "-o"]).arg(&trace);
    command.args(["-e", "trace=pwrite64,pwritev,fdatasync,fallocate,fsync"]);
    command.arg(BINARY).arg(end.role()).arg("--config").arg(end.config(cluster));
    match end {
        End::Hub => cluster.start_hub_with(&mut command),
        End::Source => cluster.start_source_with(SOURCE, &mut command),
    }
    cluster.wait_in_sync(SOURCE);
    let writer = Writer::start(socket(cluster, SOURCE), EXPORT, Known::default(), 4, 5);
    writer.wait_answered(UNHARMED);
    let known = writer.finish();
    kill(cluster, end);
    let traced = fs::read_to_string(&trace).expect("a trace");
    let of_row = |row: &Row| {
        let (call, file) = (format!(" {}(", row.call), format!("/state/{}>", row.file));
        let mut by_thread = HashMap::<&str, u64>::new();
        for line in traced.lines().filter(|line| line.contains(&call)) {
            if row.file.is_empty() || line.contains(&file) {
                let thread = line.split_whitespace().next().unwrap_or_default();
                *by_thread.entry(thread).or_default() += 1;
            }
        }
        by_thread.into_values().max().unwrap_or_default()
    };
    let counted = rows.iter().map(of_row).collect();
    match end {
        End::Hub => cluster.start_hub(),
        End::Source => cluster.start_source(SOURCE),
    }
    (counted, known)
}

fn stop(cluster: &mut Cluster, end: End) {
    match end {
        End::Hub => assert!(cluster.stop_hub().success()),
        End::Source => assert!(cluster.stop_source(SOURCE).success()),
    }
}

fn kill(cluster: &mut Cluster, end: End) {
    match end {
        End::Hub => cluster.kill_hub(),
        End::Source => cluster.kill_source(SOURCE),
    }
}

/// `mirrorhub ROLE --config CONFIG` under strace, which ends with it. The process started is
/// mirrorhub itself, so that signals reach it.
fn traced(role: &str, config: &Path, trace: &Path, path: Option<&Path>, inject: &str) -> Command {
    let mut command = Command::new("strace");
    let call = inject.split(':').next().unwrap_or_default();
    // Not with --seccomp-bpf: strace 6.1 then does not deliver the signal of `signal=KILL`.
    command.args(["-D", "-f", "-qq", "-o"]).arg(trace);
    if let Some(path) = path {
        command.arg("-P").arg(path);
    }
    command.args(["-e", &format!("trace={call}"), "-e", &format!("inject={inject}")]);
    command.arg(BINARY).arg(role).arg("--config").arg(config);
    command
}

/// One case at work.
struct Case<'a> {
    cluster: &'a mut Cluster,
    end: End,
    row: Row,
    trace: PathBuf,
}

impl Case<'_> {
    fn start(&mut self, count: u64) {
        let state = self.cluster.path(self.end.directory());
        let path = (!self.row.file.is_empty()).then(|| state.join(self.row.file));
        let inject = format!("{}:{}:when={count}", self.row.call, self.row.harm);
        let config = self.end.config(self.cluster);
        let role = self.end.role();
        let mut command = traced(role, &config, &self.trace, path.as_deref(), &inject);
        match self.end {
            End::Hub => self.cluster.spawn_hub_with(&mut command),
            End::Source => self.cluster.start_source_with(SOURCE, &mut command),
        }
    }

    fn fired(&self) -> bool {
        let trace = fs::read_to_string(&self.trace).unwrap_or_default();
        trace.contains("(INJECTED)") || trace.contains("killed by SIGKILL")
    }

    fn runs(&mut self) -> bool {
        match self.end {
            End::Hub => self.cluster.hub_runs(),
            End::Source => self.cluster.source_runs(SOURCE),
        }
    }

    /// Status (if it lives) and log of the hurt end.
    fn words(&mut self) -> String {
        let (config, log) = match self.end {
            End::Hub => (self.cluster.hub_config(), "hub.log"),
            End::Source => (self.cluster.source_config(SOURCE), "filer-a.log"),
        };
        let shown = if self.runs() { status(&config) } else { None };
        let log = fs::read_to_string(self.cluster.path(log)).unwrap_or_default();
        shown.map_or(log, |shown| shown.to_string())
    }

    /// The state says faulted with the reason, or the process ended with it, and no write is
    /// acknowledged any more.
    fn check_failed(&mut self, writer: &Writer) {
        let reason =
            if self.row.harm == EIO { "Input/output error" } else { "No space left on device" };
        let begin = Instant::now();
        loop {
            let lives = self.runs();
            let words = self.words();
            let faulted = words.contains(r#""state":"faulted""#);
            if words.contains(reason) && (faulted || !lives) {
                break;
            }
            let limit = Duration::from_secs(30);
            assert!(begin.elapsed() < limit, "{:?}: {reason:?} not told: {words}", self.row);
            pause(Duration::from_millis(20));
        }
        // Answers that were earned before may be on their way to the client still.
        pause(Duration::from_millis(100));
        let answered = writer.answered();
        pause(Duration::from_millis(200));
        assert_eq!(writer.answered(), answered, "acknowledged after the failure");
    }

    fn kill(&mut self) {
        kill(self.cluster, self.end);
    }
}

/// One end, one call, one harm. Whether the call was reached.
fn hurt(cluster: &mut Cluster, end: End, row: Row, count: u64, known: Known) -> (bool, Known) {
    stop(cluster, end);
    let trace = cluster.path("strace.out");
    drop(fs::remove_file(&trace));
    let mut case = Case { cluster, end, row, trace };
    case.start(count);
    let socket = case.cluster.path(SOURCE).join("nbd.sock");
    let writer = Writer::start(socket, EXPORT, known, 4, count);
    let begin = Instant::now();
    while !case.fired() && begin.elapsed() < Duration::from_secs(6) {
        pause(Duration::from_millis(20));
    }
    let fired = case.fired();
    if fired && row.harm == KILL {
        let limit = Duration::from_secs(30);
        wait_for("the killed process is gone", limit, || !case.runs());
    } else if fired {
        case.check_failed(&writer);
    }
    case.kill();
    match end {
        End::Hub => cluster.start_hub(),
        End::Source => cluster.start_source(SOURCE),
    }
    let known = writer.finish();
    check(cluster, SOURCE, &known);
    (fired, known)
}

fn hurt_all(end: End, rows: &[Row]) {
    let begin = Instant::now();
    // Longer than a hub takes that ends of its failure on a slow machine: alone the source would answer again.
    let settings = SourceSettings::new(SOURCE).replication("hub_timeout = \"60s\"");
    let mut cluster = Cluster::start(&[settings.interval("200ms")]);
    let (made, known) = calls(&mut cluster, end, rows);
    cluster.wait_in_sync(SOURCE);
    let writer = Writer::start(socket(&cluster, SOURCE), EXPORT, known, 4, 1);
    writer.wait_answered(100);
    let mut known = writer.finish();
    let (mut reached, mut all) = (0, 0);
    for (&row, made) in rows.iter().zip(made) {
        println!("{end:?} makes {made} calls of {} {}", row.call, row.file);
        for count in counts(row, made) {
            let name = format!("{end:?} {} {} {} when={count}", row.call, row.file, row.harm);
            if std::env::var("MIRRORHUB_CASE").is_ok_and(|only| !name.contains(&only)) {
                continue;
            }
            for log in ["hub.log", "filer-a.log"] {
                fs::write(cluster.path(log), b"").expect("each case has its own log");
            }
            println!("{:.1?} {name}", begin.elapsed());
            let (fired, now_known) = hurt(&mut cluster, end, row, count, known);
            known = now_known;
            all += 1;
            if fired {
                reached += 1;
            } else {
                println!("   not reached");
            }
        }
    }
    println!("{reached} of {all} calls were reached in {:.1?}", begin.elapsed());
    assert_eq!(reached, all, "calls that were made in the unharmed run");
    assert!(known.answered() > 100, "too few writes to show anything");
}

#[test]
fn the_nth_call_of_the_hub_fails_or_kills() {
    hurt_all(End::Hub, &HUB_ROWS);
}

#[test]
fn the_nth_call_of_the_source_fails_or_kills() {
    hurt_all(End::Source, &SOURCE_ROWS);
}

fn socket(cluster: &Cluster, name: &str) -> PathBuf {
    cluster.path(name).join("nbd.sock")
}
