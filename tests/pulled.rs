//! Devices are pulled: loop devices under a real fio, and a device on every end in the middle of CPs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::crashes::check;
use crate::harness::oracle::{Known, Writer};
use crate::harness::{Cluster, Process, SourceSettings, done, run, status, try_run, wait_for};
use crate::outage::socket;
use crate::raid::with_array;

const LIMIT: Duration = Duration::from_secs(120);

/// Devices of a pool, by their state.
fn devices(config: &Path, state: &str) -> usize {
    let document = status(config).unwrap_or(Value::Null);
    let all = document["pool"]["devices"].as_array().cloned().unwrap_or_default();
    all.iter().filter(|device| device["state"] == state).count()
}

/// A loop device over a file, given back when it is dropped.
struct Loop {
    device: PathBuf,
    file: PathBuf,
}

impl Loop {
    fn over(file: PathBuf) -> Self {
        fs::File::create(&file).and_then(|file| file.set_len(320 << 20)).expect("a file");
        let made = run(Command::new("losetup").args(["--find", "--show"]).arg(&file));
        let device = PathBuf::from(String::from_utf8_lossy(&made.stdout).trim());
        Self { device, file }
    }

    /// What it lies on is gone: from now on it has no byte, and answers with errors.
    fn pull(&self) {
        fs::File::options()
            .write(true)
            .open(&self.file)
            .and_then(|f| f.set_len(0))
            .expect("pulled");
        run(Command::new("losetup").arg("--set-capacity").arg(&self.device));
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let ended = try_run(Command::new("losetup").arg("--detach").arg(&self.device));
        if !ended.status.success() {
            eprintln!("{} stays: {ended:?}", self.device.display());
        }
    }
}

/// Puts these devices into the pool of a hub on `parity2`.
fn with_devices(config: &Path, devices: &[PathBuf]) {
    let text = fs::read_to_string(config).expect("hub.toml");
    let (before, _) = text.split_once("[pool]\n").expect("a pool");
    let line =
        |path: &PathBuf| format!("  {{ path = \"{}\", size = \"320MiB\" }},\n", path.display());
    let list: String = devices.iter().map(line).collect();
    let pool = format!("[pool]\nraid = \"parity2\"\ndevices = [\n{list}]\n");
    fs::write(config, format!("{before}{pool}")).expect("hub.toml");
}

/// fio over a part of a volume, each block checked when it is read back.
fn fio(cluster: &Cluster, uri: &str, seed: u32) -> Process {
    let mut command = Command::new("fio");
    command.args(["--name=pulled", "--ioengine=nbd", "--rw=randrw", "--rwmixwrite=70"]);
    command.args(["--bsrange=4k-64k", "--iodepth=8", "--size=48M", "--fsync=64"]);
    command.args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]);
    command.arg(format!("--randseed={seed}")).arg(format!("--uri={uri}"));
    Process::start("fio", cluster.path(&format!("fio-{seed}.log")), &mut command)
}

fn ends_well(mut fio: Process) {
    wait_for("fio ends", LIMIT, || !fio.runs());
    let text = fio.output();
    assert!(text.contains("err= 0") && !text.contains("verify:"), "{text}");
}

/// Goal: a hub on `parity2` of loop devices and files, under fio: one, then two devices are pulled and
/// nobody notices; they are replaced, filled and scrubbed clean, and the root stays what it was.
#[test]
fn loop_devices_are_pulled_under_fio() {
    let name = "filer-a";
    let mut cluster = Cluster::prepare(&[SourceSettings::new(name).interval("300ms")]);
    let hub = cluster.hub_config();
    let at = |n: usize| cluster.path(&format!("loop{n}"));
    let loops: Vec<Loop> = (0..4).map(|n| Loop::over(at(n))).collect();
    let mut all: Vec<PathBuf> = loops[..3].iter().map(|one| one.device.clone()).collect();
    all.extend([3, 4].map(|n| cluster.path(&format!("disk{n}"))));
    with_devices(&hub, &all);
    cluster.start_all();
    assert_eq!(devices(&hub, "in"), 5);
    let uri = cluster.volume(name, "vol0");
    for (gone, seed) in [(0, 11), (2, 12)] {
        let load = fio(&cluster, &uri, seed);
        loops[gone].pull();
        wait_for("the pulled device is out", LIMIT, || {
            let out = if gone == 0 { 1 } else { 2 };
            devices(&hub, "failed") == out
        });
        ends_well(load);
    }
    let root = Cluster::root(&cluster.checkpoint(name), "vol0");
    let load = fio(&cluster, &uri, 13);
    let file = cluster.path("new2").display().to_string();
    for (old, new) in [(0, loops[3].device.display().to_string()), (2, file)] {
        done(&hub, &["device", "replace", &old.to_string(), &new, "--wait"]);
    }
    ends_well(load);
    assert_eq!(devices(&hub, "in"), 5);
    let after = Cluster::root(&cluster.checkpoint(name), "vol0");
    assert_ne!(root, after, "fio has written nothing: the test shows nothing");
    let text = done(&hub, &["scrub", "--wait"]);
    assert!(text.contains("all of it right"), "{text}");
    done(&hub, &["verify", name]);
    assert_eq!(Cluster::root(&cluster.checkpoint(name), "vol0"), after);
    // What was filled carries the rest.
    for n in ["1", "3"] {
        done(&hub, &["device", "fail", n, "--yes"]);
    }
    done(&hub, &["verify", name]);
    cluster.end();
}

/// Goal: sources on `parity1` and `mirror`, the hub on `parity2`, CPs without a pause: a device goes on
/// each end meanwhile, and both pairs of roots meet, before and after restarts without them.
#[test]
fn a_device_goes_on_every_end_in_the_middle_of_cps() {
    let names = ["filer-a", "filer-b"];
    let mut cluster =
        Cluster::prepare(&names.map(|name| SourceSettings::new(name).interval("100ms")));
    with_array(&cluster.hub_config(), "parity2", 4);
    with_array(&cluster.source_config(names[0]), "parity1", 3);
    with_array(&cluster.source_config(names[1]), "mirror", 2);
    cluster.start_all();
    let writer = |cluster: &Cluster, name: &str, known: Known, seed| {
        Writer::start(socket(cluster, name), &format!("{name}/vol0"), known, 8, seed)
    };
    let cp =
        |cluster: &Cluster, name: &str| cluster.on_hub(name)["applied_cp"].as_u64().unwrap_or(0);
    let mut writers: Vec<Writer> = Vec::new();
    for (name, seed) in names.iter().zip(1..) {
        writers.push(writer(&cluster, name, Known::default(), seed));
    }
    for (end, device) in [("hub", "1"), (names[0], "2"), (names[1], "0"), ("hub", "3")] {
        let before = names.map(|name| cp(&cluster, name));
        let config = if end == "hub" { cluster.hub_config() } else { cluster.source_config(end) };
        done(&config, &["device", "fail", device, "--yes"]);
        for (name, before) in names.iter().zip(before) {
            wait_for("more CPs are made", LIMIT, || cp(&cluster, name) > before + 1);
        }
    }
    let mut known: Vec<Known> = writers.into_iter().map(Writer::finish).collect();
    for round in 0..2 {
        for (name, known) in names.iter().zip(&known) {
            check(&mut cluster, name, known);
        }
        done(&cluster.hub_config(), &["verify"]);
        if round == 1 {
            break;
        }
        cluster.end();
        cluster.start_all();
        assert_eq!(devices(&cluster.hub_config(), "in"), 2);
        assert_eq!(devices(&cluster.source_config(names[0]), "in"), 2);
        assert_eq!(devices(&cluster.source_config(names[1]), "in"), 1);
        let again: Vec<Known> = names
            .iter()
            .zip(known)
            .map(|(name, known)| {
                let writer = writer(&cluster, name, known, 7);
                writer.wait_answered(100);
                writer.finish()
            })
            .collect();
        known = again;
    }
}
