//! Under a service manager: what it is told and when, and units that it takes as they are.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::{BINARY, Cluster, SourceSettings, run, status, try_run};

const NAME: &str = "filer-a";
const LIMIT: Duration = Duration::from_secs(60);
/// The most exposure that `systemd-analyze security` may find, in tenths.
const EXPOSURE_MAX: &str = "--threshold=20";

/// The manager's end: a socket on which it is told.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(path: PathBuf) -> Self {
        let socket = UnixDatagram::bind(&path).expect("a socket");
        socket.set_read_timeout(Some(LIMIT)).expect("a limit");
        Self { socket, path }
    }

    fn told(&self) -> String {
        let mut word = [0; 4096];
        let length = self.socket.recv(&mut word).expect("the manager is told something");
        String::from_utf8_lossy(&word[..length]).into_owned()
    }

    fn manages<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("NOTIFY_SOCKET", &self.path)
    }
}

/// Ready means that it answers; a reload and a stop are announced.
#[test]
fn the_manager_is_told_what_happens() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new(NAME)]);
    let hub = Manager::new(cluster.path("hub.notify"));
    let mut command = Command::new(BINARY);
    command.arg("hub").arg("--config").arg(cluster.hub_config());
    cluster.spawn_hub_with(hub.manages(&mut command));
    let word = hub.told();
    assert!(word.contains("READY=1") && word.contains("STATUS=1 source has a file"), "{word}");
    assert!(status(&cluster.hub_config()).is_some(), "ready, and does not answer");

    let source = Manager::new(cluster.path("source.notify"));
    let mut command = cluster.source_command(NAME);
    cluster.start_source_with(NAME, source.manages(&mut command));
    assert!(source.told().contains("READY=1"));
    assert!(status(&cluster.source_config(NAME)).is_some(), "ready, and does not answer");
    cluster.wait_in_sync(NAME);

    cluster.signal_hub("HUP");
    cluster.signal_source(NAME, "HUP");
    for manager in [&hub, &source] {
        let word = manager.told();
        assert!(word.contains("RELOADING=1") && word.contains("MONOTONIC_USEC="), "{word}");
        assert!(manager.told().contains("READY=1"), "the reload has no end");
    }
    assert!(cluster.stop_source(NAME).success());
    assert!(source.told().contains("STOPPING=1"));
    assert!(cluster.stop_hub().success());
    assert!(hub.told().contains("STOPPING=1"));
}

/// What the kernel says of a process: kilobytes of memory that are locked, and whether it writes back
/// for none of its threads (PF_MEMALLOC_NOIO in the flags, proc(5)).
fn locked_and_flushing(id: u32) -> (u64, bool) {
    let told = fs::read_to_string(format!("/proc/{id}/status")).expect("a process");
    let line = told.lines().find_map(|line| line.strip_prefix("VmLck:")).expect("locked memory");
    let locked = line.split_whitespace().next().and_then(|number| number.parse().ok());
    let flushing = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).expect("a thread");
        let behind_name = stat.rsplit_once(") ").expect("a name in brackets").1;
        let flags = behind_name.split_whitespace().nth(6).expect("flags");
        flags.parse::<u64>().expect("a number") & 0x0008_0000 != 0
    };
    let mut tasks = fs::read_dir(format!("/proc/{id}/task")).expect("threads");
    (locked.expect("a number"), tasks.all(|task| flushing(task.expect("a thread"))))
}

/// Whether this process, and so what it starts, has that right (capabilities(7)).
fn has_right(bit: u32) -> bool {
    let told = fs::read_to_string("/proc/self/status").expect("a process");
    let rights = told.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("rights");
    u64::from_str_radix(rights.trim(), 16).expect("a number") & (1 << bit) != 0
}

/// Goal: a source on a unix socket writes nothing back for its own memory, and locks it if it is told
/// to, but not below a limit; where it has no right to, it says so. Control: the hub does neither.
#[test]
fn a_source_does_not_wait_for_its_own_clients() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new(NAME)]);
    cluster.start_all();
    assert_eq!(locked_and_flushing(cluster.hub_process().id()), (0, false));
    let (ipc_lock, sys_resource) = (has_right(14), has_right(24));
    assert_eq!(locked_and_flushing(cluster.source_process(NAME).id()), (0, sys_resource));
    let log = fs::read_to_string(cluster.path("filer-a.log")).expect("a log");
    assert_eq!(log.contains("no right to PR_SET_IO_FLUSHER"), !sys_resource, "{log}");
    assert!(cluster.stop_source(NAME).success());
    let config = cluster.source_config(NAME);
    let text = fs::read_to_string(&config).expect("a file");
    fs::write(&config, format!("lock_memory = true\n{text}")).expect("a file");
    let limited = ["--memlock=65536", "setpriv", "--bounding-set=-ipc_lock,-sys_resource", BINARY];
    let mut command = Command::new("prlimit");
    let refused = try_run(command.args(limited).args(["source", "--config"]).arg(&config));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("lock_memory wants CAP_IPC_LOCK"), "{said}");
    if !ipc_lock {
        println!("SKIPPED what locks memory: wants CAP_IPC_LOCK");
        return;
    }
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    let (locked, flushing) = locked_and_flushing(cluster.source_process(NAME).id());
    assert!(locked > 0 && flushing == sys_resource, "{locked} kB, {flushing}");
}

/// The units in `config/systemd` with the program where it is here.
fn units(directory: &Path, change: impl Fn(String) -> String) -> Vec<PathBuf> {
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/systemd");
    let mut made = Vec::new();
    for entry in fs::read_dir(units).expect("units") {
        let path = entry.expect("a unit").path();
        if path.extension().is_none_or(|extension| extension != "service") {
            continue;
        }
        let text = fs::read_to_string(&path).expect("a unit");
        assert!(text.contains("ExecStart=/usr/bin/mirrorhub "), "{}", path.display());
        let there = directory.join(path.file_name().expect("a name"));
        fs::write(&there, change(text.replace("/usr/bin/mirrorhub", BINARY))).expect("a unit");
        made.push(there);
    }
    assert_eq!(made.len(), 2, "a unit for the hub, one for a source");
    made
}

/// System calls that a unit refuses, of those in the groups that it names: what it names behind them by
/// name is allowed again.
fn refused_calls(unit: &str) -> BTreeSet<String> {
    let lines = unit.lines().filter_map(|line| line.strip_prefix("SystemCallFilter="));
    let mut refused = BTreeSet::new();
    for line in lines {
        match line.strip_prefix('~') {
            Some(groups) => {
                groups.split_whitespace().for_each(|group| calls_of(group, &mut refused))
            }
            None => refused.retain(|call| !line.split_whitespace().any(|allowed| allowed == call)),
        }
    }
    refused
}

fn calls_of(group: &str, calls: &mut BTreeSet<String>) {
    let said = run(Command::new("systemd-analyze").args(["syscall-filter", "--no-pager", group]));
    for line in String::from_utf8_lossy(&said.stdout).lines().skip(1) {
        match line.trim() {
            inner if inner.starts_with('@') => calls_of(inner, calls),
            comment if comment.is_empty() || comment.starts_with('#') => {}
            call => {
                calls.insert(call.to_owned());
            }
        }
    }
}

/// Goal: neither end makes a call that its unit refuses, from its start through a CP to its stop, and
/// each would live through one. strace is beside the process, which gets its own signals. Control: the call that only the last line of the filter allows is seen.
#[test]
fn no_call_is_made_that_a_unit_refuses() {
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/systemd");
    let mut cluster = Cluster::prepare(&[SourceSettings::new(NAME)]);
    let traces = ["hub", "source"].map(|end| {
        let unit = fs::read_to_string(units.join(format!("mirrorhub-{end}.service")));
        let unit = unit.expect("a unit");
        assert!(unit.contains("SystemCallErrorNumber=EPERM"), "a refused call ends the process");
        let mut calls = refused_calls(&unit);
        assert!(calls.len() > 30 && calls.contains("setrlimit"), "{calls:?}");
        assert!(calls.insert("sched_setscheduler".to_owned()), "it is allowed");
        // Of another architecture, or not known to strace: `?` passes them over.
        let names: Vec<String> = calls.iter().map(|call| format!("?{call}")).collect();
        let (trace, only) = (cluster.path(&format!("{end}.calls")), names.join(","));
        let config = match end {
            "hub" => cluster.hub_config(),
            _ => cluster.source_config(NAME),
        };
        let text = fs::read_to_string(&config).expect("a file");
        let text = text.replace("[nvram]\n", "[nvram]\nrealtime = true\n");
        fs::write(&config, text).expect("a file");
        let mut command = Command::new("strace");
        command.args(["-D", "-f", "-qq", "--seccomp-bpf", "-e", "signal=none", "-e"]);
        command.arg(format!("trace={only}")).arg("-o").arg(&trace).arg(BINARY);
        command.arg(end).arg("--config").arg(config);
        match end {
            "hub" => cluster.spawn_hub_with(&mut command),
            _ => cluster.start_source_with(NAME, &mut command),
        }
        trace
    });
    cluster.wait_in_sync(NAME);
    cluster.checkpoint(NAME);
    assert!(cluster.stop_source(NAME).success());
    assert!(cluster.stop_hub().success());
    for trace in traces {
        let text = fs::read_to_string(&trace).expect("a trace");
        let (allowed, refused): (Vec<_>, Vec<_>) = text
            .lines()
            .filter(|line| line.contains('('))
            .partition(|line| line.contains("sched_setscheduler("));
        assert!(!allowed.is_empty(), "the trace sees nothing: {text}");
        assert!(refused.is_empty(), "{}: {refused:?}", trace.display());
    }
}

fn analyze(arguments: &[&str], unit: &Path) -> (bool, String) {
    let mut command = Command::new("systemd-analyze");
    let done = try_run(command.args(arguments).arg(unit));
    let said = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn the_units_are_sound_and_give_few_rights() {
    let directory = tempfile::tempdir().expect("a directory");
    let security = ["security", "--offline=true", "--no-pager", EXPOSURE_MAX];
    for unit in units(directory.path(), |text| text) {
        let (sound, said) = analyze(&["verify", "--man=no"], &unit);
        assert!(sound && said.is_empty(), "{}: {said}", unit.display());
        let (safe, said) = analyze(&security, &unit);
        assert!(safe, "{}: {said}", unit.display());
        let text = fs::read_to_string(&unit).expect("a unit");
        let line = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("a start");
        let mut words = line.split_whitespace();
        let program = words.next().expect("a program");
        // What it starts is a command of this program with these options.
        let words: Vec<&str> = words.take_while(|word| !word.starts_with('/')).collect();
        let help = run(Command::new(program).args(&words[..1]).arg("--help"));
        let help = String::from_utf8_lossy(&help.stdout);
        assert!(words[1..].iter().all(|word| help.contains(word)), "{line}\n{help}");
    }
    // Negative controls: a misspelt setting, and rights that were not taken away.
    let misspelt = |text: String| text.replace("TimeoutStartSec", "TimoutStartSec");
    for unit in units(directory.path(), misspelt) {
        let (_, said) = analyze(&["verify", "--man=no"], &unit);
        assert!(said.contains("TimoutStartSec"), "{said}");
    }
    let open = |text: String| {
        let kept = text
            .lines()
            .filter(|line| !line.starts_with("Protect") && !line.starts_with("Restrict"));
        kept.collect::<Vec<_>>().join("\n")
    };
    for unit in units(directory.path(), open) {
        assert!(!analyze(&security, &unit).0, "an open unit passes");
    }
}
