//! GlusterFS: two bricks on this machine, written by its client library in fio, which is where it replicates.
//!
//! Its servers refuse a brick on 127.0.0.1, so it needs the address of [`crate::network::own_network`].

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::{Contestant, PATIENCE, Process, listening, words};
use crate::ends::pause;
use crate::load::Target;
use crate::network::OWN_ADDRESS;

const VOLUME: &str = "mirror";
const PORT: u16 = 24007;

/// The daemons that glusterd starts: they are no children of this process.
#[derive(Debug)]
struct Daemons(Vec<u32>);

impl Drop for Daemons {
    fn drop(&mut self) {
        for id in &self.0 {
            let pid = i32::try_from(*id).ok().and_then(rustix::process::Pid::from_raw);
            let signal = rustix::process::Signal::KILL;
            if let Some(Err(error)) = pid.map(|pid| rustix::process::kill_process(pid, signal)) {
                eprintln!("process {id}: {error}");
            }
        }
    }
}

/// Two bricks; each write is durable on both before it is answered (`O_SYNC`).
pub(super) fn start(dir: &Path) -> anyhow::Result<Contestant> {
    let dir = dir.join("gluster");
    for name in ["state", "run", "brick-1", "brick-2"] {
        std::fs::create_dir_all(dir.join(name))?;
    }
    let (at, file, socket) = (dir.display(), dir.join("glusterd.vol"), dir.join("glusterd.socket"));
    let socket = socket.display();
    let options = format!(
        "volume management\n type mgmt/glusterd\n option working-directory {at}/state\n \
         option run-directory {at}/run\n option glusterd-sockfile {socket}\n \
         option transport-type socket\n option transport.socket.listen-port {PORT}\nend-volume\n"
    );
    std::fs::write(&file, options)?;
    let arguments = format!("-N -f {} -l {at}/glusterd.log -p {at}/glusterd.pid", file.display());
    let server = Process::start("glusterd", &words(&arguments))?;
    listening(PORT)?;
    let ask = |question: &str| {
        let arguments = words(&format!("--mode=script --glusterd-sock={socket} volume {question}"));
        let output = Command::new("gluster").args(&arguments).output().context("gluster")?;
        if output.status.success() {
            return Ok(());
        }
        let said =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        bail!("gluster volume {question}: {said:?}");
    };
    let bricks = [1, 2].map(|number| format!("{OWN_ADDRESS}:{at}/brick-{number}")).join(" ");
    let begin = Instant::now();
    // It listens before it answers.
    while let Err(error) = ask(&format!("create {VOLUME} replica 2 {bricks} force")) {
        if begin.elapsed() > PATIENCE {
            return Err(error);
        }
        pause(Duration::from_millis(200));
    }
    ask(&format!("set {VOLUME} performance.client-io-threads off"))?;
    ask(&format!("start {VOLUME}"))?;
    let daemons = Daemons(daemons(&dir.join("run"))?);
    let ids = daemons.0.iter().copied().filter(|id| is_brick(*id)).collect::<Vec<_>>();
    if ids.len() != 2 {
        bail!("{} bricks run, not two", ids.len());
    }
    let target = ["--ioengine=gfapi_async", "--filename=volume", "--sync=1"].map(str::to_owned);
    let mut arguments = target.to_vec();
    arguments.extend([format!("--volume={VOLUME}"), format!("--brick={OWN_ADDRESS}")]);
    let target = Target { arguments, environment: Vec::new() };
    crate::load::fill(&target)?;
    let mut contestant = Contestant::with("glusterfs", target, ids, vec![server]);
    contestant.is_cached = true;
    contestant.held = Some(Box::new(daemons));
    Ok(contestant)
}

/// Ids in the files that the servers leave in `dir`, those of others left out.
fn daemons(dir: &Path) -> anyhow::Result<Vec<u32>> {
    let (mut dirs, mut ids) = (vec![PathBuf::from(dir)], Vec::new());
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "pid") {
                ids.push(std::fs::read_to_string(&path)?.trim().parse().context("a pid file")?);
            }
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn is_brick(id: u32) -> bool {
    std::fs::read(format!("/proc/{id}/cmdline"))
        .is_ok_and(|line| line.starts_with(b"/usr/sbin/glusterfsd"))
}
