//! The servers that the bench `peers` lets run side by side, on loopback. Each has one volume of 1 GiB that
//! was written whole before it is measured, most over NBD, and some by a client library of their own;
//! every process is ended by its id when dropped.

mod ceph;
mod gluster;

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mirrorhub::units::convert::to_f64;
use serde_json::{Value, json};

use crate::ends::{Ends, Sizes, pause};
use crate::load::Target;
use crate::network::has_own_network;

const GLUSTER: &str = "glusterfs";
const VOLUME_BYTES: u64 = 1 << 30;
const SIZES: Sizes =
    Sizes { hub_nvram: "256MiB", hub_pool: "6GiB", nvram: "256MiB", pool: "6GiB", volume: "1GiB" };
/// How long a server may take to listen, or to be in step.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to have nothing more to do behind a run: a mirror of a journal is minutes behind.
const SETTLED_WITHIN: Duration = Duration::from_secs(600);

/// A process that was started here.
#[derive(Debug)]
struct Process(Child);

impl Process {
    fn start(name: &str, arguments: &[String]) -> anyhow::Result<Self> {
        Self::of(Command::new(name).args(arguments))
    }

    fn of(command: &mut Command) -> anyhow::Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| format!("{:?} does not start", command.get_program()))?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            eprintln!("process {}: {error}", self.0.id());
        }
    }
}

/// One server, or the pair of them that keeps a mirror.
#[derive(Debug)]
pub struct Contestant {
    /// Its name in the table.
    pub name: String,
    /// Where its volume is.
    pub target: Target,
    /// The processes that do its work; of a mirror the target last.
    pub ids: Vec<u32>,
    _processes: Vec<Process>,
    /// What else ends with it.
    held: Option<Box<dyn fmt::Debug>>,
    /// What it says of how far its mirror is.
    lag: Option<ceph::Lag>,
    /// It overwrites a file in the page cache.
    is_cached: bool,
}

impl Contestant {
    fn of(name: &str, uri: &str, processes: Vec<Process>) -> Self {
        let ids = processes.iter().map(|process| process.0.id()).collect();
        Self::with(name, Target::nbd(uri), ids, processes)
    }

    fn with(name: &str, target: Target, ids: Vec<u32>, processes: Vec<Process>) -> Self {
        Self {
            name: name.to_owned(),
            target,
            ids,
            _processes: processes,
            held: None,
            lag: None,
            is_cached: false,
        }
    }

    /// Seconds of CPU that its processes have used.
    pub fn cpu(&self) -> anyhow::Result<f64> {
        let ticks = rustix::param::clock_ticks_per_second();
        let of = |id: &u32| -> anyhow::Result<f64> {
            let text = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
            let (_, fields) = text.rsplit_once(')').context("no name in stat")?;
            let mut fields = fields.split_whitespace().skip(11);
            let mut next = || fields.next().and_then(|field| field.parse::<u64>().ok());
            let spent = next().zip(next()).map(|(user, system)| user + system);
            Ok(to_f64(spent.context("no times in stat")?) / to_f64(ticks))
        };
        self.ids.iter().map(of).sum()
    }

    /// Bytes that the last of its processes has had written to disks. Of who overwrites a file in the page cache
    /// the kernel counts a whole folio, up to a MiB, for each write: none then.
    pub fn written(&self) -> anyhow::Result<Option<f64>> {
        if self.is_cached {
            return Ok(None);
        }
        let id = self.ids.last().context("no process")?;
        let text = std::fs::read_to_string(format!("/proc/{id}/io"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
        Ok(Some(to_f64(line.context("no write_bytes")?.parse()?)))
    }

    /// Waits until it has nothing more to do: what a server puts off is its work all the same.
    pub fn settle(&self) -> anyhow::Result<()> {
        let begin = Instant::now();
        if let Some(lag) = &self.lag {
            lag.wait(SETTLED_WITHIN)?;
        }
        let mut quiet = 0;
        while quiet < 3 {
            if begin.elapsed() > SETTLED_WITHIN {
                bail!("{} still works {SETTLED_WITHIN:?} behind a run", self.name);
            }
            let before = self.cpu()?;
            pause(Duration::from_millis(100));
            quiet = if self.cpu()? - before < 0.015 { quiet + 1 } else { 0 };
        }
        Ok(())
    }
}

/// Those that can run here, and what each other one is missing.
pub fn start(dir: &Path, wanted: &[String]) -> anyhow::Result<(Vec<Contestant>, Vec<String>)> {
    let (mut there, mut missing) = (Vec::new(), Vec::new());
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|one| one == name);
    type Start = fn(&Path) -> anyhow::Result<Contestant>;
    let all: [(&str, &[&str], Start); 5] = [
        ("mirrorhub", &[], mirrorhub),
        ("qemu-mirror", &["qemu-nbd", "qemu-storage-daemon"], qemu_mirror),
        ("nbdkit-fua", &["nbdkit"], nbdkit_fua),
        ("ceph-rbd", &["ceph-mon", "ceph-mgr", "ceph-osd", "rbd", "rbd-mirror"], ceph::start),
        (GLUSTER, &["glusterd", "gluster"], gluster::start),
    ];
    for (name, programs, start) in all.into_iter().filter(|(name, ..)| is_wanted(name)) {
        match programs.iter().find(|program| !installed(program)) {
            Some(program) => missing.push(format!("{name}: {program} is not installed")),
            None if name == GLUSTER && !has_own_network() => {
                missing.push(format!(
                    "{name}: takes no address of loopback, and root is wanted for another"
                ));
            }
            None => there.push(start(dir).with_context(|| name.to_owned())?),
        }
    }
    Ok((there, missing))
}

fn installed(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|path| path.join(program).is_file())
}

/// The product: a hub and a source, both logs durable before a write is answered.
fn mirrorhub(dir: &Path) -> anyhow::Result<Contestant> {
    ours("mirrorhub", Ends::start(dir, 1, &SIZES)?)
}

/// Another build of it.
pub fn build(binary: &Path, dir: &Path) -> anyhow::Result<Contestant> {
    let dir = dir.join("other");
    std::fs::create_dir(&dir)?;
    ours("other", Ends::start_of(binary, &dir, 1, &SIZES)?)
}

fn ours(name: &str, ends: Ends) -> anyhow::Result<Contestant> {
    let (source, nbd) = ends.sources.first().context("one source")?;
    let (ids, uri) = (vec![source.id(), ends.hub.id()], format!("nbd://{nbd}/filer-0/vol0"));
    let target = Target::nbd(&uri);
    crate::load::fill(&target)?;
    let mut contestant = Contestant::with(name, target, ids, Vec::new());
    contestant.held = Some(Box::new(ends));
    Ok(contestant)
}

/// QEMU's mirror, copying before it answers, with both ends writing through past the page cache.
fn qemu_mirror(dir: &Path) -> anyhow::Result<Contestant> {
    let (source, target) = (volume(dir, "qemu-source")?, volume(dir, "qemu-target")?);
    let (at, to) = (free_port()?, free_port()?);
    let nbd =
        format!("-b 127.0.0.1 -p {to} -t -e 4 -f raw --cache=directsync --aio=threads {target}");
    let mirror = Process::start("qemu-nbd", &words(&nbd))?;
    listening(to)?;
    let socket = dir.join("qmp.sock");
    let daemon = format!(
        "--blockdev driver=file,node-name=src,filename={source},cache.direct=on \
         --blockdev driver=nbd,node-name=tgt,server.type=inet,server.host=127.0.0.1,server.port={to} \
         --nbd-server addr.type=inet,addr.host=127.0.0.1,addr.port={at} \
         --export type=nbd,id=e,node-name=src,name=vol,writable=on,writethrough=on \
         --chardev socket,path={},server=on,wait=off,id=q --monitor chardev=q",
        socket.display()
    );
    let server = Process::start("qemu-storage-daemon", &words(&daemon))?;
    listening(at)?;
    let mut qmp = Qmp::connect(&socket)?;
    qmp.call(
        &json!({ "execute": "blockdev-mirror", "arguments": { "job-id": "m", "device": "src",
        "target": "tgt", "sync": "none", "copy-mode": "write-blocking" } }),
    )?;
    let begin = Instant::now();
    loop {
        let jobs = qmp.call(&json!({ "execute": "query-block-jobs" }))?;
        if jobs.pointer("/0/ready") == Some(&Value::Bool(true)) {
            break;
        }
        if begin.elapsed() > PATIENCE {
            bail!("QEMU's mirror is not ready: {jobs}");
        }
        pause(Duration::from_millis(20));
    }
    let uri = format!("nbd://127.0.0.1:{at}/vol");
    Ok(Contestant::of("qemu-mirror", &uri, vec![server, mirror]))
}

/// No mirror at all: one file, synced behind each write.
fn nbdkit_fua(dir: &Path) -> anyhow::Result<Contestant> {
    let (file, at) = (volume(dir, "nbdkit")?, free_port()?);
    let arguments = format!("-f -i 127.0.0.1 -p {at} --filter=fua file {file} fuamode=force");
    let server = Process::start("nbdkit", &words(&arguments))?;
    listening(at)?;
    let mut contestant =
        Contestant::of("nbdkit-fua", &format!("nbd://127.0.0.1:{at}"), vec![server]);
    contestant.is_cached = true;
    Ok(contestant)
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// A file that was written whole, so that no run pays for allocation.
fn volume(dir: &Path, name: &str) -> anyhow::Result<String> {
    let path = dir.join(name);
    let mut file = File::create(&path)?;
    let block = vec![0; 1 << 20];
    for _ in 0..VOLUME_BYTES >> 20 {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    path.into_os_string().into_string().ok().context("a path that is not text")
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("a free port")?.local_addr()?.port())
}

fn listening(port: u16) -> anyhow::Result<()> {
    let (begin, at) = (Instant::now(), SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    while TcpStream::connect_timeout(&at, PATIENCE).is_err() {
        if begin.elapsed() > PATIENCE {
            bail!("nobody listens on port {port}");
        }
        pause(Duration::from_millis(20));
    }
    Ok(())
}

/// QEMU's control protocol: a line of JSON each way.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path).context("QMP")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self(BufReader::new(stream));
        qmp.line()?;
        qmp.call(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(qmp)
    }

    fn line(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line).context("QMP")?;
        serde_json::from_str(&line).with_context(|| format!("QMP says {line}"))
    }

    fn call(&mut self, command: &Value) -> anyhow::Result<Value> {
        writeln!(self.0.get_mut(), "{command}").context("QMP")?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("QMP: {command}: {error}");
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
        }
    }
}
