//! Under a service manager: what it is told and when, and units that it takes as they are.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mirrorhub::config::load::{Loaded, load};
use mirrorhub::config::schema::{Listen, ProcessConfig};
use serde_json::Value;

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

/// What is wrong with a log of one JSON object a line; empty if nothing is.
fn wrong_lines(log: &str) -> Vec<String> {
    let right = |line: &&str| {
        let Ok(line) = serde_json::from_str::<Value>(line) else { return false };
        let level = line["level"].as_str().unwrap_or_default();
        let text = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
        ["ERROR", "WARN", "INFO"].contains(&level)
            && line["timestamp"].as_str().is_some_and(|at| at.contains('T') && at.ends_with('Z'))
            && line["target"].as_str().is_some_and(|target| target.starts_with("mirrorhub"))
            && text(&line["fields"]["message"])
    };
    log.lines().filter(|line| !right(line)).map(str::to_owned).collect()
}

/// Every line of the hub's log is an object with time, level, place and message, and what a person
/// needs to act on it in fields of their own; the source's, which was not asked for, is none.
fn the_log_is_json(cluster: &Cluster) {
    let log = fs::read_to_string(cluster.path("hub.log")).expect("a log");
    assert_eq!(wrong_lines(&log), Vec::<String>::new());
    let lines: Vec<Value> =
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let said = |message: &str| {
        let found = lines.iter().find(|line| line["fields"]["message"] == message);
        found.unwrap_or_else(|| panic!("{message:?} is not in\n{log}"))["fields"].clone()
    };
    assert!(said("metrics and status")["http"].as_str().is_some_and(|at| at.contains(':')));
    assert_eq!(said("stopping").as_object().map(serde_json::Map::len), Some(1), "nothing else");
    let text = fs::read_to_string(cluster.path(&format!("{NAME}.log"))).expect("a log");
    assert!(!text.is_empty() && wrong_lines(&text).len() == text.lines().count(), "{text}");
}

/// Ready means that it answers; a reload and a stop are announced. Its log is JSON if that is asked
/// for.
#[test]
fn the_manager_is_told_what_happens() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new(NAME)]);
    let hub = Manager::new(cluster.path("hub.notify"));
    let mut command = Command::new(BINARY);
    command.arg("hub").arg("--config").arg(cluster.hub_config());
    command.env("MIRRORHUB_LOG_FORMAT", "json");
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
    the_log_is_json(&cluster);
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
/// each would live through one. strace is beside the process, which gets its own signals. Control: the
/// call that only the last line of the filter allows is seen.
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

/// What a host with the package looks like to the source's unit: its user, its directories, nothing else to
/// write. `$0` is the program, `$1` the bundle, `$2` a directory.
const AS_THE_UNIT: &str = r#"
umask 077
mount -t tmpfs tmpfs /etc
printf 'root:x:0:0::/:/bin/sh\nmirrorhub:x:997:996::/:\n' >/etc/passwd
mount -t tmpfs tmpfs /run
touch /run/mirrorhub-program && mount --bind "$0" /run/mirrorhub-program
install -d "$2/lib" && mount --bind "$2/lib" /var/lib
config=/etc/mirrorhub/source.toml
/run/mirrorhub-program source --join "$1" 2>/run/refused && exit 10
grep -q -e --no-start /run/refused
test ! -e /etc/mirrorhub
/run/mirrorhub-program source --join "$1" --no-start
printf 'nbd_listen = "unix:/run/mirrorhub/n.sock"\nhttp_listen = "unix:/run/mirrorhub/h.sock"\n' >/run/text
cat $config >>/run/text && cat /run/text >$config
chmod 755 /run /var/lib
install -d -o 997 -g 996 -m 700 /var/lib/mirrorhub
install -d -o 997 -g 996 -m 755 /run/mirrorhub
unit="setpriv --reuid 997 --regid 996 --clear-groups --no-new-privs --bounding-set=-all"
mount -o remount,ro /etc
$unit /run/mirrorhub-program source --config $config >/run/log 2>&1 &
source=$!
until test -S /run/mirrorhub/n.sock && /run/mirrorhub-program status --json --config $config >/run/status 2>/run/error
      grep -q filer-a /run/status; do
  kill -0 $source || { cat /run/log; exit 11; }
  sleep 0.05
done
test "$(stat -c %u /var/lib/mirrorhub/filer-a/disk0)" = 997
kill -TERM $source
wait $source
mount -o remount,rw /etc
chown 0 /etc/mirrorhub/tls/client-key.pem
timeout 60 $unit /run/mirrorhub-program source --config $config >/run/log 2>&1 && exit 12
grep -qi 'permission denied' /run/log || { cat /run/log; exit 13; }
"#;

/// Goal: what root joins below /etc/mirrorhub runs as the unit's user, who writes to its own two directories
/// only. Control: the same with the key root's, which is refused.
pub fn the_unit_starts_what_root_joined(cluster: &Cluster, bundle: &Path) {
    if !has_right(21) {
        println!("SKIPPED the unit's view of a host: wants CAP_SYS_ADMIN");
        return;
    }
    let own = cluster.path("as-the-unit");
    fs::create_dir_all(&own).expect("a directory");
    let mut command = Command::new("timeout");
    command.args(["120", "unshare", "--mount", "sh", "-ec", AS_THE_UNIT, BINARY]);
    let said = run(command.arg(bundle).arg(&own));
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("the state will be in /var/lib/mirrorhub/filer-a"), "{said}");
    assert!(said.contains("systemctl enable --now mirrorhub-source"), "{said}");
}

/// Two machines with the package on one network, each with directories of its own: the document's blocks as they stand.
/// `apt` does what the package's script does, `systemctl` what the unit says. `$0` is a directory, `$1` the program's,
/// `$2` that of `config`; `$3` and `$4` are the blocks.
const TWO_MACHINES: &str = r#"
export base=$0 program=$1 config=$2 on_hub=$3 on_filer=$4
export PATH="$base/bin:$program:$PATH"
cd "$base"
install -d bin
printf '#!/bin/sh\necho "mirrorhub:x:997:996::/:" >>/etc/passwd\n' >bin/systemd-sysusers
chmod 755 bin/systemd-sysusers
machine() {
  trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
  mount -t tmpfs tmpfs /etc
  mount -t tmpfs tmpfs /run
  printf 'root:x:0:0::/:/bin/sh\n' >/etc/passwd
  touch /run/mirrorhub-program && mount --bind "$program/mirrorhub" /run/mirrorhub-program
  install -d "$base/$1" && mount --bind "$base/$1" /var/lib
  chmod 755 /etc /run /var/lib
}
apt() {
  test "$1" = install
  mount --bind "$base/package/usr/share/doc" /usr/share/doc
  sh "$config/deb/postinst" configure
}
systemctl() {
  test "$1 $2" = 'enable --now'
  start=$(sed -n 's/^ExecStart=.usr.bin.mirrorhub //p' "$config/systemd/$3.service")
  install -d -o 997 -g 996 -m 700 /var/lib/mirrorhub
  install -d -o 997 -g 996 -m 755 /run/mirrorhub
  unshare --mount sh -ec 'umask 077
    mount -o remount,ro,bind /etc
    exec setpriv --reuid 997 --regid 996 --clear-groups --no-new-privs --bounding-set=-all "$0" "$@"' \
    /run/mirrorhub-program $start >"$base/$3.log" 2>&1 &
  until mirrorhub status --config "${start##* }" >/run/status 2>&1; do
    kill -0 $! 2>/dev/null || { cat "$base/$3.log"; exit 11; }
    sleep 0.05
  done
}
export -f machine apt systemctl
ip link set lo up
ip address add 192.0.2.7/32 dev lo
machine hub
eval "$on_hub"
head -c 8388608 /dev/urandom >data
unshare --mount bash -ec '
  machine filer
  eval "$on_filer"
  until mirrorhub status | grep in-sync; do sleep 0.05; done
  nbdcopy data nbd://127.0.0.1:10809/vol0
  mirrorhub checkpoint
'
nbdcopy nbd://127.0.0.1:10810/filer-a/vol0 - | head -c 8388608 | cmp - data
test "$(stat -c %u /var/lib/mirrorhub/hub/tls/ca-key.pem /var/lib/mirrorhub/hub/disk0 | sort -u)" = 997
"#;

/// The blocks of "From the package to a mirror": what is typed on the hub, and on the filer.
fn package_blocks() -> [String; 2] {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    let text = fs::read_to_string(document).expect("a document");
    let (_, section) = text.split_once("### From the package to a mirror\n").expect("the section");
    let section = section.split("\n#").next().expect("its text");
    let block = |text: &str| text.split("```").next().expect("its end").to_owned();
    let blocks: Vec<String> = section.split("```text\n").skip(1).map(block).collect();
    blocks.try_into().expect("one block for each machine")
}

/// Goal: the blocks of the document lead from the package to a mirror, with the units' user and what it may write to. Only
/// sizes are others. Control: with the example whose paths are relative the hub's unit does not start.
#[test]
fn the_package_leads_to_a_mirror() {
    if !has_right(21) {
        println!("SKIPPED two machines with the package: wants CAP_SYS_ADMIN");
        return;
    }
    let directory = tempfile::Builder::new().prefix("mirrorhub-").tempdir().expect("a directory");
    crate::packaged::lay_out(&directory.path().join("package"));
    let examples = directory.path().join("package/usr/share/doc/mirrorhub/examples");
    for name in ["hub-service.toml", "hub.toml"] {
        let text = fs::read_to_string(examples.join(name)).expect("an example");
        let small = text.replace("\"1GiB\"", "\"64MiB\"").replace("\"8GiB\"", "\"1GiB\"");
        assert_ne!(small, text);
        fs::write(examples.join(name), small).expect("an example");
    }
    let [hub, filer] = package_blocks();
    let hub = hub.replace("vol0=100GiB", "vol0=64MiB");
    let program = Path::new(BINARY).parent().expect("a directory");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let typed = |base: &str, hub: &str| {
        let base = directory.path().join(base);
        fs::create_dir(&base).expect("a directory");
        std::os::unix::fs::symlink(directory.path().join("package"), base.join("package"))
            .expect("a link");
        let mut command = Command::new("timeout");
        command.args(["300", "unshare", "--net", "--mount", "bash", "-ec", TWO_MACHINES]);
        let done = try_run(command.arg(base).arg(program).arg(&config).args([hub, &filer]));
        let said = [done.stdout, done.stderr].concat();
        (done.status.code(), String::from_utf8_lossy(&said).into_owned())
    };
    let (code, said) = typed("right", &hub);
    assert!(code == Some(0) && said.contains("in-sync"), "{code:?}: {said}");
    let relative = hub.replace("examples/hub-service.toml", "examples/hub.toml");
    assert_ne!(relative, hub);
    let (code, said) = typed("relative", &relative);
    assert!(code == Some(11) && said.contains("/etc/mirrorhub/hub-state"), "{code:?}: {said}");
}

/// What a process of that configuration writes to, as absolute paths.
fn written(config: &ProcessConfig) -> Vec<PathBuf> {
    let sockets = |listens: [&Listen; 2]| {
        let path = |listen: &Listen| match listen {
            Listen::Unix(path) => Some(path.clone()),
            Listen::Tcp(_) => None,
        };
        listens.into_iter().filter_map(path).collect::<Vec<_>>()
    };
    let (mut paths, listens, pool) = match config {
        ProcessConfig::Hub(hub) => {
            let own = vec![hub.data_dir.clone(), hub.nvram.path.clone(), hub.log_dir.clone()];
            (own, [&hub.nbd_listen, &hub.http_listen], &hub.pool)
        }
        ProcessConfig::Source(source) => {
            let own = vec![source.data_dir.clone(), source.nvram.path.clone()];
            (own, [&source.nbd_listen, &source.http_listen], &source.pool)
        }
    };
    paths.extend(sockets(listens));
    paths.extend(pool.devices.iter().map(|device| device.path.clone()));
    paths
}

/// Those of them that are outside of what this unit makes or may open.
fn strangers(paths: &[PathBuf], unit: &str) -> Vec<PathBuf> {
    let made = [
        ("/var/lib/mirrorhub", "StateDirectory=mirrorhub"),
        ("/run/mirrorhub", "RuntimeDirectory=mirrorhub"),
        ("/dev/disk", "#SupplementaryGroups=disk"),
    ];
    let known = |path: &Path| {
        let mut made = made.into_iter();
        made.any(|(front, line)| path.starts_with(front) && unit.lines().any(|met| met == line))
    };
    paths.iter().filter(|path| !known(path)).cloned().collect()
}

/// The examples, each read beside a `sources.d`: its name, whether it says that it belongs to /etc/mirrorhub, and what it
/// says.
fn examples() -> Vec<(String, bool, ProcessConfig)> {
    let etc = tempfile::tempdir().expect("a directory");
    fs::create_dir(etc.path().join("sources.d")).expect("a directory");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut found = Vec::new();
    for entry in fs::read_dir(config).expect("examples") {
        let path = entry.expect("an example").path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let text = fs::read_to_string(&path).expect("an example");
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        let copy = etc.path().join(&name);
        fs::write(&copy, &text).expect("a copy");
        let Ok(Loaded::Process(config)) = load(&copy) else { panic!("{name}") };
        let head: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
        found.push((name, head.join(" ").contains("as /etc/mirrorhub/"), config));
    }
    found
}

/// Goal: what an example writes to that says it belongs to /etc/mirrorhub is made by its unit or named in it, so no path
/// is relative, and what it needs as a drop-in stands in it. Controls: the units without the directory of sockets, and
/// the examples that are to be tried elsewhere.
#[test]
fn the_units_make_what_the_examples_name() {
    let read = |file: &str| {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(file);
        fs::read_to_string(file).expect("a file")
    };
    let mut ends = BTreeSet::new();
    for (name, belongs, config) in examples() {
        let end = match &config {
            ProcessConfig::Hub(_) => "hub",
            ProcessConfig::Source(_) => "source",
        };
        let unit = read(&format!("systemd/mirrorhub-{end}.service"));
        assert!(unit.contains("\nRuntimeDirectoryPreserve=yes\n"), "{end}: the other's sockets go");
        let written = written(&config);
        if !belongs {
            assert_eq!(strangers(&written, &unit), written, "{name}: all of it is relative");
            continue;
        }
        ends.insert(end);
        assert_eq!(strangers(&written, &unit), Vec::<PathBuf>::new(), "{name}");
        let sockets = written.iter().filter(|path| path.starts_with("/run")).count();
        let without = unit.replace("RuntimeDirectory=mirrorhub", "");
        assert_eq!(strangers(&written, &without).len(), sockets, "{name}");
        let without = unit.replace("StateDirectory=mirrorhub", "");
        assert!(!strangers(&written, &without).is_empty(), "{name}");
    }
    assert_eq!(ends.into_iter().collect::<Vec<_>>(), ["hub", "source"], "an example for each unit");
    let example = read("source-unix.toml");
    let parsed: toml::Table = example.parse().expect("TOML");
    assert_eq!(parsed["lock_memory"].as_bool(), Some(true));
    let unit = read("systemd/mirrorhub-source.service");
    for line in ["AmbientCapabilities=", "CapabilityBoundingSet="] {
        let line = format!("{line}CAP_SYS_RESOURCE CAP_IPC_LOCK\n");
        assert!(unit.contains(&format!("#{line}")) && example.contains(&format!("#   {line}")));
    }
    assert!(example.contains("SupplementaryGroups=disk"));
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
