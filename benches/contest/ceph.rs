//! Ceph RBD with journal mirroring: two clusters of a monitor, a manager and an object server each, and the
//! daemon that carries the journal of an image from the first to the second. A write is durable on the
//! first before it is answered; the image of the second is behind.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::{Contestant, PATIENCE, Process, free_port, words};
use crate::ends::pause;
use crate::load::Target;

/// How long the mirror may take for the first content.
const FILLED_WITHIN: Duration = Duration::from_secs(300);
/// Bytes of the file that an object server keeps its objects in.
const STORE_BYTES: u64 = 8 << 30;

#[derive(Debug)]
struct Cluster {
    name: &'static str,
    dir: PathBuf,
    monitor: String,
    processes: Vec<Process>,
}

impl Cluster {
    fn config(&self) -> PathBuf {
        self.dir.join(format!("{}.conf", self.name))
    }

    fn arguments(&self, command: &str) -> Vec<String> {
        let conf = self.config();
        words(&format!("--cluster {} -c {} {command}", self.name, conf.display()))
    }

    /// Runs a command to its end.
    fn run(&self, program: &str, command: &str) -> anyhow::Result<String> {
        run(program, &self.arguments(command))
    }

    /// Starts a server.
    fn serve(&mut self, program: &str, command: &str) -> anyhow::Result<u32> {
        let log = File::create(self.dir.join(format!("{program}.log")))?;
        let mut server = Command::new(program);
        // rbd-mirror looks for its own cluster there, and nowhere else.
        server.args(self.arguments(command)).env("CEPH_CONF", self.config());
        let server = Process::of(server.stderr(log))?;
        let id = server.0.id();
        self.processes.push(server);
        Ok(id)
    }

    /// A cluster with a pool `rbd` of one copy, and the id of its object server.
    fn start(dir: &Path, name: &'static str) -> anyhow::Result<(Self, u32)> {
        let dir = dir.join(format!("ceph-{name}"));
        for part in ["mon", "mgr", "osd", "run", "log", "crash"] {
            std::fs::create_dir_all(dir.join(part))?;
        }
        let (at, id) = (dir.display().to_string(), random_id()?);
        let monitor = format!("[v2:127.0.0.1:{}/0]", free_port()?);
        let keyring = format!("{at}/keyring");
        let mut cluster = Self { name, dir, monitor, processes: Vec::new() };
        std::fs::write(cluster.config(), settings(&at, &id, &cluster.monitor))?;
        let key = format!("--create-keyring {keyring} --gen-key -n mon.");
        run("ceph-authtool", &with(&key, &["--cap", "mon", "allow *"]))?;
        let caps = ["mon", "osd", "mgr", "mds"].map(|of| ["--cap", of, "allow *"]).concat();
        run("ceph-authtool", &with(&format!("{keyring} --gen-key -n client.admin"), &caps))?;
        let map = format!("--create --fsid {id} --addv a {} {at}/monmap", cluster.monitor);
        run("monmaptool", &words(&map))?;
        cluster
            .run("ceph-mon", &format!("--mkfs -i a --monmap {at}/monmap --keyring {keyring}"))?;
        cluster.serve("ceph-mon", "-i a -f")?;
        cluster.serve("ceph-mgr", "-i a -f")?;
        let osd = random_id()?;
        cluster.run("ceph", &format!("--connect-timeout 60 osd new {osd}"))?;
        cluster.run("ceph-osd", &format!("-i 0 --mkfs --osd-uuid {osd}"))?;
        let store = cluster.serve("ceph-osd", "-i 0 -f")?;
        until("an object server is not up", || {
            Ok(cluster.run("ceph", "osd stat")?.contains("1 up"))
        })?;
        cluster.run("ceph", "osd pool create rbd 16 16")?;
        cluster.run("rbd", "pool init rbd")?;
        cluster.run("rbd", "mirror pool enable rbd image")?;
        Ok((cluster, store))
    }
}

/// Two clusters, and an image that is mirrored.
pub(super) fn start(dir: &Path) -> anyhow::Result<Contestant> {
    let (first, first_store) = Cluster::start(dir, "a")?;
    let (mut second, second_store) = Cluster::start(dir, "b")?;
    let peer = format!(
        "mirror pool peer add rbd client.admin@a --remote-mon-host {} --direction rx-only",
        first.monitor
    );
    second.run("rbd", &peer)?;
    let mirror = second.serve("rbd-mirror", "-n client.admin -f")?;
    let features = "--image-feature layering,exclusive-lock,journaling";
    first.run("rbd", &format!("create rbd/volume --size 1G {features}"))?;
    first.run("rbd", "mirror image enable rbd/volume journal")?;
    let conf = first.config().display().to_string();
    let target = ["--ioengine=rbd", "--clientname=admin", "--pool=rbd", "--rbdname=volume"];
    let mut target: Vec<_> = target.map(str::to_owned).to_vec();
    target.push(format!("--clustername={}", first.name));
    // Of the client library: fio has no option for it.
    let environment = vec![("CEPH_CONF".to_owned(), conf)];
    let target = Target { arguments: target, environment };
    crate::load::fill(&target)?;
    let ids = vec![first_store, mirror, second_store];
    let processes = first.processes.into_iter().chain(std::mem::take(&mut second.processes));
    let mut contestant = Contestant::with("ceph-rbd", target, ids, processes.collect());
    let lag = Lag(second);
    // What it was filled with is its own work as well, and of no run.
    lag.wait(FILLED_WITHIN)?;
    contestant.lag = Some(lag);
    Ok(contestant)
}

/// How far the mirror is, as it says itself, twice a minute.
#[derive(Debug)]
pub(super) struct Lag(Cluster);

impl Lag {
    /// Waits until a status that was made from now on says that nothing is missing.
    pub(super) fn wait(&self, limit: Duration) -> anyhow::Result<()> {
        let (before, begin) = (self.status(), Instant::now());
        let updated = |status: &str| {
            status.lines().find(|line| line.contains("last_update")).map(str::to_owned)
        };
        loop {
            let status = self.status();
            let is_new = updated(&status).is_some() && updated(&status) != updated(&before);
            if is_new && status.contains("\"entries_behind_primary\":0,") {
                return Ok(());
            }
            if begin.elapsed() > limit {
                bail!("the mirror is not in step after {limit:?}: {status}");
            }
            pause(Duration::from_secs(1));
        }
    }

    /// Empty before the image is known there.
    fn status(&self) -> String {
        self.0.run("rbd", "mirror image status rbd/volume").unwrap_or_default()
    }
}

fn settings(at: &str, id: &str, monitor: &str) -> String {
    let none =
        "auth cluster required = none\nauth service required = none\nauth client required = none";
    format!(
        "[global]\nfsid = {id}\nmon host = {monitor}\nmon initial members = a\n{none}\n\
         ms bind ipv6 = false\npublic network = 127.0.0.0/8\npublic addr = 127.0.0.1\n\
         osd pool default size = 1\nosd pool default min size = 1\nmon allow pool size one = true\n\
         osd crush chooseleaf type = 0\nosd pool default pg autoscale mode = off\n\
         run dir = {at}/run\nadmin socket = {at}/run/$name.$pid.asok\nlog file = {at}/log/$name.log\n\
         mon cluster log file = {at}/log/cluster.log\ncrash dir = {at}/crash\n\
         exporter sock dir = {at}/run\nosd objectstore = bluestore\nbluestore block create = true\n\
         bluestore block size = {STORE_BYTES}\nosd memory target = 1610612736\nrbd cache = false\n\
         mon data avail warn = 1\nmon data avail crit = 0\nmon osd full ratio = 0.99\n\
         osd data = {at}/osd\nmon data = {at}/mon\nmgr data = {at}/mgr\nkeyring = {at}/keyring\n"
    )
}

fn with(command: &str, more: &[&str]) -> Vec<String> {
    words(command).into_iter().chain(more.iter().map(|&word| word.to_owned())).collect()
}

fn run(program: &str, arguments: &[String]) -> anyhow::Result<String> {
    let output = Command::new(program).args(arguments).output().context(program.to_owned())?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("{program} {}: {said}", arguments.join(" "));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn random_id() -> anyhow::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    Ok(id.trim().to_owned())
}

fn until(what: &str, done: impl Fn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let begin = Instant::now();
    while !done()? {
        if begin.elapsed() > PATIENCE {
            bail!("{what}");
        }
        pause(Duration::from_millis(500));
    }
    Ok(())
}
