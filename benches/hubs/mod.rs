//! The hub that the bench `fleet` loads: a process of its own with real files, and what the kernel
//! and its own metrics say of it. It is ended by its id when dropped.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mirrorhub::limits::{MIB, NVRAM_SHARE_BYTES_MIN};
use mirrorhub::units::convert::{to_f64, to_u64};
use rustix::process::{Pid, Signal, kill_process};

/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(240);
/// Files of more sources are not written beforehand: they take what is used of them.
const WRITTEN_SOURCES_MAX: usize = 2000;

/// A hub, running or not.
#[derive(Debug)]
pub struct Hub {
    child: Option<Child>,
    binary: PathBuf,
    dir: PathBuf,
    /// Where sources connect.
    pub listen: SocketAddr,
    http: SocketAddr,
}

/// What was read of it at one moment; all but the last four rise with time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reading {
    /// Seconds of CPU.
    pub cpu: f64,
    /// Times that a thread waited and was woken.
    pub switches: f64,
    /// Bytes handed to the disks, and those of them that were given up before they got there.
    pub written: (f64, f64),
    /// Bytes of records in the ring since it was made.
    pub ring: f64,
    /// Sync calls and durable writes: ring, source logs, pool.
    pub syncs: [f64; 3],
    /// Resident now, and at most since the last look; MiB.
    pub resident: (f64, f64),
    /// Open descriptors.
    pub descriptors: f64,
    /// Sources that are in sync by its metrics.
    pub in_sync: usize,
    /// What the metrics took to answer, in seconds.
    pub scrape: f64,
}

/// A free address on this machine.
fn free_address() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("a free port")?;
    Ok(listener.local_addr()?)
}

/// Waits, on a channel that nobody sends on.
pub fn pause(length: Duration) {
    let (_sender, receiver) = std::sync::mpsc::channel::<()>();
    if receiver.recv_timeout(length).is_ok() {
        eprintln!("a pause was cut short");
    }
}

impl Hub {
    /// Puts its files below `dir`, with room for so many sources of `volume` bytes each.
    pub fn new(binary: &Path, dir: &Path, sources: usize, volume: u64) -> anyhow::Result<Self> {
        let (listen, http) = (free_address()?, free_address()?);
        std::fs::create_dir_all(dir.join("sources.d"))?;
        std::fs::create_dir_all(dir.join("state"))?;
        let count = to_u64(sources);
        // Every share, and as much again for few.
        let ring = (NVRAM_SHARE_BYTES_MIN * count + 64 * MIB).max(256 * MIB);
        let pool = (volume * count * 3).max(512 * MIB) + 512 * MIB;
        if sources > WRITTEN_SOURCES_MAX {
            for (name, bytes) in [("nvram", ring), ("disk0", pool)] {
                File::create(dir.join("state").join(name))?.set_len(bytes)?;
            }
        }
        let text = format!(
            "data_dir = \"state\"\nlisten = \"{listen}\"\nnbd_listen = \"unix:nbd.sock\"\n\
             http_listen = \"{http}\"\nsources_dir = \"sources.d\"\n\
             [nvram]\npath = \"state/nvram\"\nsize = \"{}MiB\"\n\
             [pool]\ndevices = [{{ path = \"state/disk0\", size = \"{}MiB\" }}]\n",
            ring.div_ceil(MIB),
            pool.div_ceil(MIB)
        );
        std::fs::write(dir.join("hub.toml"), text)?;
        let (binary, dir) = (binary.to_owned(), dir.to_owned());
        Ok(Self { child: None, binary, dir, listen, http })
    }

    /// The file of each source.
    pub fn add_sources(&self, count: usize) -> anyhow::Result<()> {
        for at in 0..count {
            let name = crate::filers::name(at);
            let file = self.dir.join(format!("sources.d/{name}.toml"));
            std::fs::write(file, format!("name = \"{name}\"\n"))?;
        }
        Ok(())
    }

    /// Starts the process; does not wait.
    pub fn start(&mut self) -> anyhow::Result<()> {
        let log = File::options().create(true).append(true).open(self.dir.join("log"))?;
        let child = Command::new(&self.binary)
            .args(["hub", "--config"])
            .arg(self.dir.join("hub.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{} does not start", self.binary.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Waits until it takes connections; says for how long.
    pub fn listening(&mut self) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        while TcpStream::connect(self.http).is_err() {
            if let Some(child) = &mut self.child
                && let Some(ended) = child.try_wait()?
            {
                let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                let end: Vec<&str> = log.lines().rev().take(5).collect();
                bail!("the hub ended, {ended}: {end:#?}");
            }
            if begin.elapsed() > PATIENCE {
                bail!("the hub does not listen");
            }
            pause(Duration::from_millis(10));
        }
        Ok(begin.elapsed())
    }

    /// Ends it on the spot, as a crash would.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Ends it as an administrator would.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            let id = Pid::from_raw(i32::try_from(child.id())?).context("a process id")?;
            kill_process(id, Signal::TERM)?;
            child.wait()?;
        }
        Ok(())
    }

    fn id(&self) -> anyhow::Result<u32> {
        Ok(self.child.as_ref().context("the hub does not run")?.id())
    }

    /// From here on [`Reading::resident`] says what it had at most.
    pub fn forget_memory(&self) -> anyhow::Result<()> {
        let file = format!("/proc/{}/clear_refs", self.id()?);
        if let Err(error) = std::fs::write(file, "5") {
            eprintln!("the most memory is that since the start: {error}");
        }
        Ok(())
    }

    /// Reads what the kernel counts, and the metrics.
    pub fn read(&self) -> anyhow::Result<Reading> {
        let id = self.id()?;
        let proc = |file: &str| std::fs::read_to_string(format!("/proc/{id}/{file}"));
        let begin = Instant::now();
        let metrics = self.get("/metrics")?;
        let scrape = begin.elapsed().as_secs_f64();
        let (status, io) = (proc("status")?, proc("io")?);
        let syncs = ["nvram", "log", "pool"]
            .map(|on| sum(&metrics, &format!("mirrorhub_device_syncs_total{{device=\"{on}\"}}")));
        let ring = sum(&metrics, "mirrorhub_nvram_position_bytes{cursor=\"written\"}");
        let in_sync = metrics
            .lines()
            .filter(|line| line.starts_with("mirrorhub_source_state{"))
            .filter(|line| line.contains("state=\"in-sync\"") && line.ends_with(" 1"))
            .count();
        let mib = |name| field(&status, name).map(|kib| kib / 1024.0);
        Ok(Reading {
            cpu: cpu(&proc("stat")?)?,
            switches: switches(id)?,
            written: (field(&io, "write_bytes:")?, field(&io, "cancelled_write_bytes:")?),
            ring,
            syncs,
            resident: (mib("VmRSS:")?, mib("VmHWM:")?),
            descriptors: to_f64(to_u64(std::fs::read_dir(format!("/proc/{id}/fd"))?.count())),
            in_sync,
            scrape,
        })
    }

    fn get(&self, path: &str) -> anyhow::Result<String> {
        let mut stream = TcpStream::connect(self.http)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let host = self.http;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text).with_context(|| format!("GET {path}"))?;
        Ok(text)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("the hub was not ended: {error}");
        }
    }
}

/// The number behind a name, in a file of names and numbers.
fn field(text: &str, name: &str) -> anyhow::Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.with_context(|| format!("no {name}"))?.parse()?)
}

/// The value of one series; 0 if it is not there.
fn sum(metrics: &str, series: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(series));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0.0)
}

/// Seconds of CPU in the text of `stat`.
fn cpu(stat: &str) -> anyhow::Result<f64> {
    // The name, in parentheses, may hold blanks; user and system time are fields 14 and 15.
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    let mut ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    let (Some(user), Some(system)) = (ticks.next(), ticks.next()) else {
        bail!("no times in stat");
    };
    Ok(to_f64(user? + system?) / to_f64(rustix::param::clock_ticks_per_second()))
}

/// Times that its threads have waited; one that has ended does not count.
fn switches(id: u32) -> anyhow::Result<f64> {
    let mut all = 0.0;
    for task in std::fs::read_dir(format!("/proc/{id}/task"))? {
        if let Ok(status) = std::fs::read_to_string(task?.path().join("status")) {
            all += field(&status, "voluntary_ctxt_switches:")?;
        }
    }
    Ok(all)
}
