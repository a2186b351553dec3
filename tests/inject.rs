//! The n-th system call fails, or the process dies in it: strace on the real processes.
//!
//! Each case restarts one end under strace, which lets the n-th call of a kind on one device fail
//! (EIO, ENOSPC) or kills the process there, while a client writes. Then that end is killed and
//! restarted without strace, and nothing acknowledged may be missing. strace counts calls by
//! thread, so n is the n-th of the thread that gets there first; each device has one that writes.
//! The pool of either end is fdatasynced, the rings are written with O_DSYNC.
//! `MIRRORHUB_CASE=TEXT` runs only the cases whose printed line contains the text.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::crashes::check;
use crate::harness::oracle::{Known, Writer};
use crate::harness::{BINARY, Cluster, SourceSettings, pause, status, wait_for};

const SOURCE: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";

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
    /// Which calls, in the normal run; all up to the last one in the full run.
    counts: &'static [u64],
}

const fn row(
    file: &'static str,
    call: &'static str,
    harm: &'static str,
    counts: &'static [u64],
) -> Row {
    Row { file, call, harm, counts }
}

const EIO: &str = "error=EIO";
const ENOSPC: &str = "error=ENOSPC";
const KILL: &str = "signal=KILL";

const HUB_ROWS: [Row; 10] = [
    row("nvram", "pwrite64", EIO, &[1, 3, 12, 45]),
    row("nvram", "pwrite64", KILL, &[2, 9, 30]),
    row("disk0", "pwrite64", EIO, &[1, 6]),
    row("disk0", "pwrite64", ENOSPC, &[3]),
    row("disk0", "pwrite64", KILL, &[4, 9]),
    row("disk0", "fdatasync", EIO, &[1, 3]),
    row("disk0", "fdatasync", KILL, &[2, 5]),
    row("", "pwritev", EIO, &[1, 10]),
    row("", "pwritev", KILL, &[2, 20]),
    row("", "fallocate", ENOSPC, &[1]),
];

const SOURCE_ROWS: [Row; 7] = [
    row("nvram", "pwrite64", EIO, &[1, 2, 7, 20, 60]),
    row("nvram", "pwrite64", ENOSPC, &[4, 33]),
    row("nvram", "pwrite64", KILL, &[1, 3, 11, 50]),
    row("disk0", "pwrite64", EIO, &[1, 5]),
    row("disk0", "pwrite64", KILL, &[2, 8]),
    row("disk0", "fdatasync", EIO, &[1, 3]),
    row("disk0", "fdatasync", KILL, &[2, 4]),
];

fn counts(row: Row) -> Vec<u64> {
    let last = row.counts.last().copied().unwrap_or(0);
    if std::env::var_os("MIRRORHUB_FULL").is_some() {
        (1..=last).collect()
    } else {
        row.counts.to_vec()
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
        let config = match self.end {
            End::Hub => self.cluster.hub_config(),
            End::Source => self.cluster.source_config(SOURCE),
        };
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
            let limit = Duration::from_secs(5);
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
        match self.end {
            End::Hub => self.cluster.kill_hub(),
            End::Source => self.cluster.kill_source(SOURCE),
        }
    }
}

/// One end, one call, one harm. Whether the call was reached.
fn hurt(cluster: &mut Cluster, end: End, row: Row, count: u64, known: Known) -> (bool, Known) {
    match end {
        End::Hub => assert!(cluster.stop_hub().success()),
        End::Source => assert!(cluster.stop_source(SOURCE).success()),
    }
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
        let limit = Duration::from_secs(5);
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
    let mut cluster = Cluster::start(&[SourceSettings::new(SOURCE).interval("200ms")]);
    let writer = Writer::start(socket(&cluster, SOURCE), EXPORT, Known::default(), 4, 1);
    writer.wait_answered(100);
    let mut known = writer.finish();
    let (mut reached, mut all) = (0, 0);
    for &row in rows {
        for count in counts(row) {
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
    assert!(reached * 4 >= all * 3, "too few calls were reached to show anything");
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
