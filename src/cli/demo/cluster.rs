//! The processes of the demo, and what it asks them through their own commands.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::only;
use crate::status::document::{State, StatusDocument};
use crate::units::hash::Root;

const PATIENCE: Duration = Duration::from_secs(30);

/// Hub and sources of the demo; what still runs is ended when this is dropped.
#[derive(Debug)]
pub struct Cluster {
    directory: PathBuf,
    program: PathBuf,
    sources: Vec<String>,
    processes: Processes,
}

/// What runs, by name, and whether a command asks it something. Who ends all of it keeps both locks, so
/// that nothing is started behind it.
#[derive(Debug, Clone, Default)]
pub struct Processes {
    running: Arc<Mutex<Vec<(String, Child)>>>,
    asking: Arc<Mutex<()>>,
}

impl Processes {
    fn lock(&self) -> MutexGuard<'_, Vec<(String, Child)>> {
        // A list of processes is whole after every step that can panic.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a command to its end.
    fn ask(&self, command: &mut Command) -> io::Result<Output> {
        let _one = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        command.output()
    }

    /// kill -9 to all, and waits for them, and for the command that asked one of them. None can be started
    /// while what is returned lives.
    pub fn end(&self) -> impl Sized + use<'_> {
        let mut processes = self.lock();
        for (name, mut child) in processes.drain(..) {
            if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
                tracing::warn!(name, %error, "process of the demo could not be ended");
            }
        }
        (processes, self.asking.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Cluster {
    /// Writes the configuration files; starts nothing.
    pub fn new(directory: &Path, sources: &[&str], volume_bytes: u64) -> Result<Self> {
        let (listen, hub_http) = (free_port()?, free_port()?);
        let hub = directory.join("hub");
        fs::create_dir_all(hub.join("sources.d"))?;
        let pool_mib = (volume_bytes >> 20) * 3 + 512;
        let text = format!(
            "data_dir = \"state\"\nlisten = \"127.0.0.1:{listen}\"\nnbd_listen = \"unix:nbd.sock\"\n\
             http_listen = \"127.0.0.1:{hub_http}\"\nsources_dir = \"sources.d\"\n\n\
             [nvram]\nsize = \"128MiB\"\n\n[pool]\n\
             devices = [{{ path = \"state/disk0\", size = \"{pool_mib}MiB\" }}]\n"
        );
        fs::write(hub.join("hub.toml"), text)?;
        for name in sources {
            let file = hub.join("sources.d").join(format!("{name}.toml"));
            fs::write(file, format!("name = \"{name}\"\n"))?;
            let own = directory.join(name);
            fs::create_dir_all(&own)?;
            let text = format!(
                "name = \"{name}\"\ndata_dir = \"state\"\nhub = \"127.0.0.1:{listen}\"\n\
                 nbd_listen = \"unix:nbd.sock\"\nhttp_listen = \"127.0.0.1:{}\"\n\n\
                 [nvram]\nsize = \"64MiB\"\n\n[checkpoint]\ninterval = \"2s\"\n\n[pool]\n\
                 devices = [{{ path = \"state/disk0\", size = \"{pool_mib}MiB\" }}]\n\n\
                 [[volume]]\nname = \"vol0\"\nsize = \"{}KiB\"\n",
                free_port()?,
                volume_bytes >> 10
            );
            fs::write(own.join("source.toml"), text)?;
        }
        Ok(Self {
            directory: directory.to_owned(),
            program: std::env::current_exe().context("cannot find this program's own file")?,
            sources: sources.iter().map(|&name| name.to_owned()).collect(),
            processes: Processes::default(),
        })
    }

    /// Starts what does not run and waits until all sources are in sync.
    pub fn start_all(&mut self) -> Result<()> {
        self.start("hub", "hub", &self.hub_config())?;
        for name in self.sources.clone() {
            self.start("source", &name, &self.source_config(&name))?;
        }
        let begin = Instant::now();
        while !self.all_in_sync() {
            for (name, child) in self.processes.lock().iter_mut() {
                if let Some(status) = child.try_wait()? {
                    let log = self.directory.join(format!("{name}.log"));
                    bail!("{name} ended with {status}: {}", last_lines(&log));
                }
            }
            if begin.elapsed() > PATIENCE {
                bail!("not in sync within {PATIENCE:?}, see {}", self.directory.display());
            }
            pause();
        }
        Ok(())
    }

    fn start(&mut self, role: &str, name: &str, config: &Path) -> Result<()> {
        let mut processes = self.processes.lock();
        if processes.iter().any(|(running, _)| running == name) {
            return Ok(());
        }
        let log = self.directory.join(format!("{name}.log"));
        let log = fs::File::options().create(true).append(true).open(log)?;
        let child = Command::new(&self.program)
            .arg(role)
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        processes.push((name.to_owned(), child));
        Ok(())
    }

    fn all_in_sync(&self) -> bool {
        let served = |name: &String| {
            let own = self.status(&self.source_config(name));
            own.is_ok_and(|own| own.sources().iter().all(|s| s.state == State::InSync))
        };
        let hub = self.status(&self.hub_config());
        hub.is_ok_and(|hub| hub.sources().iter().all(|s| s.state == State::InSync))
            && self.sources.iter().all(served)
    }

    fn status(&self, config: &Path) -> Result<StatusDocument> {
        let mut command = self.command();
        command.args(["status", "--json", "--config"]).arg(config);
        let output = self.processes.ask(&mut command)?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.stdin(Stdio::null());
        command
    }

    /// A checkpoint of one source: its number and root.
    pub fn checkpoint(&self, name: &str) -> Result<(u32, Root)> {
        let mut command = self.command();
        command.args(["checkpoint", name, "--json", "--config"]).arg(self.hub_config());
        let output = self.processes.ask(&mut command)?;
        if !output.status.success() {
            bail!("checkpoint {name}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        only(serde_json::from_slice(&output.stdout)?)
    }

    /// The root a source itself shows for its volume.
    pub fn own_root(&self, name: &str) -> Result<Root> {
        let status = self.status(&self.source_config(name))?;
        let sources = status.sources();
        let volume = sources.first().and_then(|source| source.volumes.first());
        volume.and_then(|volume| volume.root).context("the source shows no root")
    }

    /// kill -9.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        let mut processes = self.processes.lock();
        let at = processes.iter().position(|(running, _)| running == name);
        let (_, mut child) = processes.remove(at.context("not running")?);
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Ends everything cleanly, sources first.
    pub fn stop_all(&mut self) -> Result<()> {
        let mut processes = self.processes.lock();
        while let Some((name, mut child)) = processes.pop() {
            let stopped = Command::new("kill").arg(child.id().to_string()).status()?;
            let status = child.wait()?;
            if !stopped.success() || !status.success() {
                bail!("{name} did not stop cleanly: {status}");
            }
        }
        Ok(())
    }

    /// Prints how to connect, and leaves the processes to the user.
    pub fn leave_running(&mut self) -> Result<()> {
        println!("\nstill running:");
        for name in &self.sources {
            let socket = self.volume_socket(name);
            println!("   volume  nbdinfo 'nbd+unix:///{name}/vol0?socket={}'", socket.display());
            let socket = self.image_socket();
            println!("   image   nbdinfo 'nbd+unix:///{name}/vol0?socket={}'", socket.display());
        }
        println!("   status  mirrorhub status --config {}", self.hub_config().display());
        let ids: Vec<String> =
            self.processes.lock().drain(..).map(|(_, child)| child.id().to_string()).collect();
        println!("   stop    kill {} && rm -r {}", ids.join(" "), self.directory.display());
        Ok(())
    }

    /// What runs, for who may have to end it from outside.
    pub fn processes(&self) -> Processes {
        self.processes.clone()
    }

    fn hub_config(&self) -> PathBuf {
        self.directory.join("hub/hub.toml")
    }

    fn source_config(&self, name: &str) -> PathBuf {
        self.directory.join(name).join("source.toml")
    }

    /// Socket of a source's volumes.
    pub fn volume_socket(&self, name: &str) -> PathBuf {
        self.directory.join(name).join("nbd.sock")
    }

    /// Socket of the hub's images.
    pub fn image_socket(&self) -> PathBuf {
        self.directory.join("hub/nbd.sock")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.processes.end());
    }
}

/// The end of a process's log, which says why it ended; the log's place if it says nothing.
fn last_lines(log: &Path) -> String {
    const LINES: usize = 12;
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    match &lines[lines.len().saturating_sub(LINES)..] {
        [] => format!("see {}", log.display()),
        last => format!("\n{}", last.join("\n")),
    }
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no free port on loopback")?;
    Ok(listener.local_addr()?.port())
}

/// Between two looks at a process that has no way to tell us.
fn pause() {
    let (_keep, receiver) = mpsc::channel::<()>();
    // Nobody sends: this is a bounded wait.
    let _waited = receiver.recv_timeout(Duration::from_millis(50));
}
