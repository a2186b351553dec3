//! The recipes of docs/operations.md that move data in and out, run as they are written there.
//!
//! What stands for what: a raw file for the disk and for the LVM volume (device-mapper is not
//! everywhere), the cluster's sockets for those of the text.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::clients::make_image;
use crate::filesystems::need_kernel;
use crate::harness::{BINARY, Cluster, Process, SourceSettings, run, wait_for};

const NAME: &str = "filer-a";
const SIZE: u64 = 16 << 20;
const LIMIT: Duration = Duration::from_secs(30);

/// The commands of the section, in their order.
fn recipes() -> Vec<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    let text = fs::read_to_string(file).expect("docs/operations.md");
    let (_, section) = text.split_once("\n## Moving data in and out\n").expect("the section");
    let section = section.split("\n## ").next().expect("its text");
    let (_, recipes) = section.split_once("```text\n").expect("its commands");
    let lines = recipes.lines().filter_map(|line| line.strip_prefix("$ "));
    lines.map(|line| line.split(" # ").next().unwrap_or(line).trim().to_owned()).collect()
}

fn shell(cluster: &Cluster, line: &str) -> Command {
    let programs = Path::new(BINARY).parent().expect("a directory");
    let path = std::env::var("PATH").unwrap_or_default();
    let at = |name: &str| cluster.path(name).display().to_string();
    let line = line
        .replace("/run/filer.sock", &at("filer-a/nbd.sock"))
        .replace("/run/hub.sock", &at("hub/nbd.sock"))
        .replace("/etc/mirrorhub/hub.toml", &at("hub/hub.toml"))
        .replace("/dev/sdb", &at("disk.raw"))
        .replace("/dev/vg0/data", &at("lvm.raw"))
        .replace("/srv/old", &at("old"))
        .replace("/mnt/new", &at("new"));
    let mut command = Command::new("sh");
    command.arg("-ec").arg(line).current_dir(cluster.dir.path());
    command.env("PATH", format!("{}:{path}", programs.display()));
    command
}

/// Ends what a failed recipe has left mounted.
struct Mounted<'a>(&'a Cluster);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        for (program, arguments) in [("umount", ["-l", "new"]), ("fusermount3", ["-uz", "vol3"])] {
            let mut command = Command::new(program);
            drop(command.args(arguments).current_dir(self.0.dir.path()).output());
        }
    }
}

/// Goal: each recipe does what it says: what goes in is in the volume and in the image, what comes out is
/// equal to it, by another way than it went in.
#[test]
fn the_recipes_of_the_documentation_work() {
    need_kernel();
    let volumes = ["vol0", "vol1", "vol2", "vol3"].map(|name| (name, "16MiB"));
    let mut cluster = Cluster::start(&[SourceSettings::new(NAME).volumes(&volumes)]);
    let path = |name: &str| cluster.path(name);
    make_image(&path("disk.raw"), SIZE, 3);
    make_image(&path("lvm.raw"), SIZE, 5);
    make_image(&path("plain.raw"), SIZE, 7);
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    run(Command::new("qemu-img").args(convert).arg(path("plain.raw")).arg(path("disk.qcow2")));
    fs::create_dir_all(path("old/below")).expect("old files");
    fs::write(path("old/below/file"), vec![9; 100_000]).expect("an old file");
    fs::write(path("old/other"), b"another").expect("an old file");
    for name in ["new", "vol3"] {
        fs::create_dir(path(name)).expect("a mount point");
    }

    let recipes = recipes();
    let mounted = Mounted(&cluster);
    let mut fuse = None;
    for line in &recipes {
        if let Some(line) = line.strip_suffix('&') {
            let log = path("fuse.log");
            let line = format!("exec {}", line.trim());
            fuse = Some(Process::start("nbdfuse", log, &mut shell(&cluster, &line)));
            wait_for(&line, LIMIT, || fs::metadata(path("vol3/nbd")).is_ok());
            continue;
        }
        run(&mut shell(&cluster, line));
    }
    if let Some(mut fuse) = fuse {
        wait_for("nbdfuse ends", LIMIT, || !fuse.runs());
    }
    drop(mounted);

    let same = |one: &str, other: &str| {
        run(Command::new("cmp").arg(path(one)).arg(path(other)));
    };
    same("disk.raw", "back.raw");
    let compare = ["compare", "-f", "raw", "-F", "qcow2"];
    run(Command::new("qemu-img").args(compare).arg(path("lvm.raw")).arg(path("back.qcow2")));
    let image = |volume: &str, to: &str| {
        run(Command::new("nbdcopy").arg("--").arg(cluster.image(NAME, volume)).arg(path(to)));
    };
    image("vol2", "plain-back.raw");
    same("plain.raw", "plain-back.raw");
    // The file system is whole in the image, with the files that were copied.
    image("vol3", "files.raw");
    run(Command::new("e2fsck").arg("-fn").arg(path("files.raw")));
    let shown = run(Command::new("debugfs").args(["-R", "ls -p /below"]).arg(path("files.raw")));
    assert!(String::from_utf8_lossy(&shown.stdout).contains("/file/"), "the files are there");
    let programs = ["nbdcopy", "qemu-img convert -n", "dd ", "nbdfuse", "mkfs", "mirrorhub hash"];
    for program in programs {
        assert!(recipes.iter().any(|line| line.contains(program)), "no recipe uses {program}");
    }
    cluster.end();
}
