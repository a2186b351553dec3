//! The example units of `config/systemd/examples`: a volume of this host's own source that is attached before
//! the file system on it is mounted. Their ordering is judged by systemd's own programs, their commands run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::filesystems::{Mount, need_kernel};
use crate::harness::{BINARY, Cluster, Process, SourceSettings, run, try_run, wait_for};

const NAME: &str = "filer-a";
const LIMIT: Duration = Duration::from_secs(30);
const FSTAB_GENERATOR: &str = "/usr/lib/systemd/system-generators/systemd-fstab-generator";
const RUNTIME: &str = "/run/mirrorhub-attach";

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn example(name: &str) -> String {
    fs::read_to_string(project("config/systemd/examples").join(name)).expect("an example")
}

/// What systemd says of the mount that the example names for /etc/fstab, the source and the example.
fn said_of(name: &str, change: impl Fn(String) -> String) -> String {
    let directory = tempfile::tempdir().expect("a directory");
    let text = change(example(name));
    let fstab = text.lines().find_map(|line| line.strip_prefix("#   ")).expect("a line for fstab");
    // Here are neither of them.
    let here =
        text.replace("/usr/sbin/nbd-client", "/bin/true").replace("/sbin/modprobe", "/bin/true");
    let source = fs::read_to_string(project("config/systemd/mirrorhub-source.service"));
    let source = source.expect("a unit").replace("/usr/bin/mirrorhub", BINARY);
    let units =
        [(name, here), ("mirrorhub-source.service", source), ("fstab", format!("{fstab}\n"))];
    for (file, text) in units {
        fs::write(directory.path().join(file), text).expect("a unit");
    }
    let made = [directory.path(); 3];
    let fstab = directory.path().join("fstab");
    run(Command::new(FSTAB_GENERATOR).args(made).env("SYSTEMD_FSTAB", fstab));
    let attach = name.replace('@', "@mail");
    let files = ["srv-mail.mount", &attach].map(|file| directory.path().join(file));
    let done = try_run(Command::new("systemd-analyze").args(["verify", "--man=no"]).args(files));
    let said = [done.stdout, done.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(done.status.success() || !said.is_empty(), "{name} fails without a word");
    said
}

/// Goal: systemd takes each example and the mount of its line in fstab, and finds no cycle. Controls: before
/// local-fs.target, where the source's own files are mounted, is a cycle; so is a mount that is not
/// `_netdev`; a misspelt setting is found.
#[test]
fn a_volume_is_attached_before_its_mount_without_a_cycle() {
    for name in ["mirrorhub-attach@.service", "mirrorhub-attach-nbd@.service"] {
        assert_eq!(said_of(name, |text| text), "", "{name}");
        let before = |text: String| text.replace("Before=remote-fs-pre", "Before=local-fs");
        let cycle = said_of(name, before);
        assert!(cycle.contains("ordering cycle"), "{name}: {cycle}");
        let local = said_of(name, |text| text.replace("_netdev,", ""));
        assert!(local.contains("ordering cycle"), "{name}: {local}");
        let misspelt = said_of(name, |text| text.replace("TimeoutStartSec", "TimoutStartSec"));
        assert!(misspelt.contains("TimoutStartSec"), "{name}: {misspelt}");
    }
}

/// The commands of that kind of a unit, as its volume's, for a shell.
fn commands(unit: &str, kind: &str, volume: &str) -> Vec<String> {
    let lines = unit.lines().filter_map(|line| line.strip_prefix(kind)?.strip_prefix('='));
    lines.map(|line| line.replace("%i", volume).replace("$$", "$")).collect()
}

/// One of them here: with the socket of the cluster, and what lies in /run beside it.
fn here(cluster: &Cluster, unit: &str, line: &str) -> Command {
    let (set, socket) = (commands(unit, "Environment", "vol0"), cluster.path("filer-a/nbd.sock"));
    let runtime = cluster.path("attach").display().to_string();
    let mut command = Command::new("sh");
    command.arg("-ec").arg(line.replace(RUNTIME, &runtime));
    for pair in set.iter().flat_map(|line| line.split_whitespace()) {
        let (key, value) = pair.split_once('=').expect("KEY=VALUE");
        match key {
            "SOURCE" => command.env(key, NAME),
            "SOCKET" => command.env(key, &socket),
            _ => command.env(key, value),
        };
    }
    command
}

/// Attaches by the unit's commands; its process, and the block device.
fn attach(cluster: &Cluster, unit: &str) -> (Process, String) {
    let start = commands(unit, "ExecStart", "vol0");
    let [start] = start.as_slice() else { panic!("one program: {start:?}") };
    let log = cluster.path("attach.log");
    let mut command = here(cluster, unit, &format!("exec {start}"));
    let process = Process::start("nbdfuse", log, &mut command);
    for line in commands(unit, "ExecStartPost", "vol0") {
        run(&mut here(cluster, unit, &line));
    }
    let file = cluster.path("attach/vol0/nbd");
    let looped = Command::new("losetup").args(["-n", "-O", "NAME", "-j"]).arg(file).output();
    let device = String::from_utf8(looped.expect("losetup").stdout).expect("a name");
    (process, device.trim().to_owned())
}

fn detach(cluster: &Cluster, unit: &str, mut process: Process) {
    for line in commands(unit, "ExecStop", "vol0") {
        run(&mut here(cluster, unit, &line));
    }
    wait_for("nbdfuse ends", LIMIT, || !process.runs());
    let file = cluster.path("attach/vol0/nbd");
    let left = run(Command::new("losetup").args(["-n", "-O", "NAME", "-j"]).arg(file));
    assert!(left.stdout.is_empty(), "a loop device is left: {left:?}");
}

/// Goal: the commands of the example attach a volume of a running source by its unix socket; a file system
/// made there is unmounted and detached cleanly, and is found whole on the next attachment and in the image.
#[test]
fn the_commands_of_the_example_attach_a_volume() {
    need_kernel();
    let mut cluster = Cluster::start(&[SourceSettings::new(NAME).volumes(&[("vol0", "32MiB")])]);
    let unit = example("mirrorhub-attach@.service");
    fs::create_dir_all(cluster.path("attach/vol0")).expect("what RuntimeDirectory makes");
    let (process, device) = attach(&cluster, &unit);
    run(Command::new("mkfs.ext4").args(["-q", "-L", "mail", &device]));
    let mount = Mount::at(cluster.path("mail"), &device, "noatime");
    fs::write(mount.dir().join("letter"), vec![9; 3 << 20]).expect("a file");
    mount.close();
    detach(&cluster, &unit, process);

    let (process, device) = attach(&cluster, &unit);
    let mount = Mount::at(cluster.path("mail"), &device, "noatime");
    assert_eq!(fs::read(mount.dir().join("letter")).expect("the file"), vec![9; 3 << 20]);
    mount.close();
    detach(&cluster, &unit, process);
    cluster.checkpoint(NAME);
    let copy = cluster.path("image.raw");
    run(Command::new("nbdcopy").arg("--").arg(cluster.image(NAME, "vol0")).arg(&copy));
    run(Command::new("e2fsck").arg("-fn").arg(&copy));
    let label = run(Command::new("blkid").args(["-s", "LABEL", "-o", "value"]).arg(&copy));
    assert_eq!(String::from_utf8_lossy(&label.stdout).trim(), "mail", "what fstab mounts by");
    cluster.end();
}
