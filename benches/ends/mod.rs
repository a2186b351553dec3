//! A real hub and real sources, as processes in a temporary directory, for the benches. Every
//! process is ended by its id when dropped.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_mirrorhub");

/// One process.
#[derive(Debug)]
pub struct End {
    child: Child,
}

impl End {
    fn start(binary: &Path, role: &str, dir: &Path) -> anyhow::Result<Self> {
        let log = File::create(dir.join("log")).context("log")?;
        let child = Command::new(binary)
            .args([role, "--config"])
            .arg(dir.join(format!("{role}.toml")))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{} does not start", binary.display()))?;
        Ok(Self { child })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("process {}: {error}", self.child.id());
        }
    }
}

/// Sizes, as configuration files say them.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// NVRAM of the hub.
    pub hub_nvram: &'static str,
    /// Pool of the hub.
    pub hub_pool: &'static str,
    /// NVRAM of each source.
    pub nvram: &'static str,
    /// Pool of each source.
    pub pool: &'static str,
    /// The volume of each source.
    pub volume: &'static str,
}

/// A hub and its sources `filer-0`, `filer-1` and so on, each with a volume `vol0`.
#[derive(Debug)]
pub struct Ends {
    /// The sources; dropped before the hub.
    pub sources: Vec<(End, SocketAddr)>,
    /// The hub.
    pub hub: End,
    config: PathBuf,
    binary: PathBuf,
}

impl Ends {
    /// Starts them below `dir` and waits until all are in sync.
    pub fn start(dir: &Path, count: usize, sizes: &Sizes) -> anyhow::Result<Self> {
        Self::start_of(Path::new(BINARY), dir, count, sizes)
    }

    /// The same, of another build.
    pub fn start_of(
        binary: &Path,
        dir: &Path,
        count: usize,
        sizes: &Sizes,
    ) -> anyhow::Result<Self> {
        let hub_at = free_address()?;
        let hub_dir = dir.join("hub");
        std::fs::create_dir_all(hub_dir.join("sources.d"))?;
        let (nvram, pool) = (sizes.hub_nvram, sizes.hub_pool);
        let text = format!(
            "data_dir = \"state\"\nlisten = \"{hub_at}\"\nnbd_listen = \"unix:nbd.sock\"\n\
             http_listen = \"{}\"\nsources_dir = \"sources.d\"\n[nvram]\nsize = \"{nvram}\"\n\
             [pool]\ndevices = [{{ path = \"state/disk0\", size = \"{pool}\" }}]\n",
            free_address()?
        );
        let config = hub_dir.join("hub.toml");
        std::fs::write(&config, text)?;
        for at in 0..count {
            let file = hub_dir.join(format!("sources.d/filer-{at}.toml"));
            std::fs::write(file, format!("name = \"filer-{at}\"\n"))?;
        }
        let hub = End::start(binary, "hub", &hub_dir)?;
        let binary = binary.to_owned();
        let mut ends = Self { sources: Vec::new(), hub, config, binary };
        ends.wait(|status| status["schema"] == 1)?;
        for at in 0..count {
            ends.add_source(dir, at, hub_at, sizes)?;
        }
        ends.wait(|status| {
            let sources = status["sources"].as_array();
            let in_sync = |source: &&Value| source["state"] == "in-sync";
            sources.is_some_and(|all| all.iter().filter(in_sync).count() == count)
        })?;
        Ok(ends)
    }

    fn add_source(
        &mut self,
        dir: &Path,
        at: usize,
        hub_at: SocketAddr,
        sizes: &Sizes,
    ) -> anyhow::Result<()> {
        let dir = dir.join(format!("filer-{at}"));
        std::fs::create_dir_all(&dir)?;
        let (nbd, http) = (free_address()?, free_address()?);
        let Sizes { nvram, pool, volume, .. } = sizes;
        let text = format!(
            "name = \"filer-{at}\"\ndata_dir = \"state\"\nhub = \"{hub_at}\"\n\
             nbd_listen = \"{nbd}\"\nhttp_listen = \"{http}\"\n[nvram]\nsize = \"{nvram}\"\n\
             [pool]\ndevices = [{{ path = \"state/disk0\", size = \"{pool}\" }}]\n\
             [[volume]]\nname = \"vol0\"\nsize = \"{volume}\"\n"
        );
        std::fs::write(dir.join("source.toml"), text)?;
        self.sources.push((End::start(&self.binary, "source", &dir)?, nbd));
        Ok(())
    }

    fn wait(&self, done: impl Fn(&Value) -> bool) -> anyhow::Result<()> {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(240) {
            if self.status()?.is_some_and(|status| done(&status)) {
                return Ok(());
            }
            pause(Duration::from_millis(100));
        }
        bail!("the processes are not ready after 240 s: {:?}", self.status()?)
    }

    fn status(&self) -> anyhow::Result<Option<Value>> {
        let mut command = Command::new(BINARY);
        let output = command.args(["status", "--json", "--config"]).arg(&self.config).output()?;
        Ok(serde_json::from_slice(&output.stdout).ok())
    }
}

/// Waits, on a channel that nobody sends on.
pub fn pause(length: Duration) {
    let (_sender, receiver) = std::sync::mpsc::channel::<()>();
    if receiver.recv_timeout(length).is_ok() {
        eprintln!("a pause was cut short");
    }
}

fn free_address() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("a free port")?;
    Ok(listener.local_addr()?)
}

/// The most memory that a process ever had resident, in MiB.
pub fn most_resident_mib(id: u32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).context("no VmHWM")?;
    Ok(kib.parse::<f64>()? / 1024.0)
}
