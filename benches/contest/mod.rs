//! The servers that the bench `peers` lets run side by side. Each is an NBD server on loopback with
//! one export of 1 GiB that was written whole before it is measured; every process is ended by its
//! id when dropped.

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

const VOLUME_BYTES: u64 = 1 << 30;
const SIZES: Sizes =
    Sizes { hub_nvram: "256MiB", hub_pool: "6GiB", nvram: "256MiB", pool: "6GiB", volume: "1GiB" };
/// How long a server may take to listen, and to have nothing more to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process that was started here.
#[derive(Debug)]
struct Process(Child);

impl Process {
    fn start(name: &str, arguments: &[String]) -> anyhow::Result<Self> {
        let mut command = Command::new(name);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Self(command.spawn().with_context(|| format!("{name} does not start"))?))
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
    /// Where its export is.
    pub uri: String,
    /// Its processes; of a mirror the target last.
    pub ids: Vec<u32>,
    _processes: Vec<Process>,
    _ends: Option<Ends>,
}

impl Contestant {
    fn of(name: &str, uri: String, processes: Vec<Process>) -> Self {
        let ids = processes.iter().map(|process| process.0.id()).collect();
        Self { name: name.to_owned(), uri, ids, _processes: processes, _ends: None }
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

    /// Bytes that the last of its processes has had written to disks.
    pub fn written(&self) -> anyhow::Result<f64> {
        let id = self.ids.last().context("no process")?;
        let text = std::fs::read_to_string(format!("/proc/{id}/io"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
        Ok(to_f64(line.context("no write_bytes")?.parse()?))
    }

    /// Waits until it has nothing more to do: what a server puts off is its work all the same.
    pub fn settle(&self) -> anyhow::Result<()> {
        let begin = Instant::now();
        let mut quiet = 0;
        while begin.elapsed() < PATIENCE && quiet < 3 {
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
    let all: [(&str, &[&str], Start); 3] = [
        ("mirrorhub", &[], mirrorhub),
        ("qemu-mirror", &["qemu-nbd", "qemu-storage-daemon"], qemu_mirror),
        ("nbdkit-fua", &["nbdkit"], nbdkit_fua),
    ];
    for (name, programs, start) in all.into_iter().filter(|(name, ..)| is_wanted(name)) {
        match programs.iter().find(|program| !installed(program)) {
            Some(program) => missing.push(format!("{name}: {program} is not installed")),
            None => there.push(start(dir).with_context(|| name.to_owned())?),
        }
    }
    for name in ["ceph-rbd", "glusterfs"].into_iter().filter(|name| is_wanted(name)) {
        missing.push(format!("{name}: this command does not set it up"));
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
    crate::load::fill(&uri)?;
    let name = name.to_owned();
    Ok(Contestant { name, uri, ids, _processes: Vec::new(), _ends: Some(ends) })
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
    Ok(Contestant::of("qemu-mirror", uri, vec![server, mirror]))
}

/// No mirror at all: one file, synced behind each write.
fn nbdkit_fua(dir: &Path) -> anyhow::Result<Contestant> {
    let (file, at) = (volume(dir, "nbdkit")?, free_port()?);
    let arguments = format!("-f -i 127.0.0.1 -p {at} --filter=fua file {file} fuamode=force");
    let server = Process::start("nbdkit", &words(&arguments))?;
    listening(at)?;
    Ok(Contestant::of("nbdkit-fua", format!("nbd://127.0.0.1:{at}"), vec![server]))
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
