//! Real processes for the integration tests: a hub and its sources in a temporary directory.
//!
//! Every process is the binary itself, started with a configuration file as a user would write it.
//! Volumes and images are reached over unix sockets, so that tests running side by side cannot
//! meet; TCP ports are asked from the kernel. Everything started is ended by id when it is dropped.

pub mod oracle;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_mirrorhub");

/// A port nobody listens on now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

/// Waits until `done` is true; panics with `what` after `limit`. The pause between two looks is
/// the only sleep of the suite.
pub fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < limit, "{what}: not within {limit:?}");
        pause(Duration::from_millis(20));
    }
}

/// A pause of the test itself, on a channel that nobody sends on.
pub fn pause(length: Duration) {
    let (_sender, receiver) = std::sync::mpsc::channel::<()>();
    let _waited = receiver.recv_timeout(length);
}

/// Runs a command to its end; panics with its output if it fails.
pub fn run(command: &mut Command) -> Output {
    let output = try_run(command);
    assert!(
        output.status.success(),
        "{command:?} failed with {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs a command to its end.
pub fn try_run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// A started process, ended when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, its output in a file of that name.
    pub fn start(name: &str, log: PathBuf, command: &mut Command) -> Self {
        let file = fs::File::options().create(true).append(true).open(&log).expect("log file");
        let errors = file.try_clone().expect("log file");
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self { name: name.to_owned(), child, log }
    }

    /// Sends a signal by name.
    pub fn signal(&self, signal: &str) {
        run(Command::new("kill").arg(format!("-{signal}")).arg(self.child.id().to_string()));
    }

    /// kill -9 and wait.
    pub fn kill(&mut self) {
        drop(self.child.kill());
        self.child.wait().expect("killed process is reaped");
    }

    /// TERM and wait for the end.
    pub fn stop(&mut self, limit: Duration) -> ExitStatus {
        self.signal("TERM");
        let mut status = None;
        let name = self.name.clone();
        wait_for(&format!("{name} stops on TERM"), limit, || {
            status = self.child.try_wait().expect("process state");
            status.is_some()
        });
        status.expect("it has ended")
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("process state").is_none()
    }

    /// What it has written.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.runs() {
            self.kill();
        }
        if std::thread::panicking() {
            eprintln!("---- {} ({})\n{}", self.name, self.log.display(), self.output());
        }
    }
}

/// Settings of a source of a test.
#[derive(Debug, Clone)]
pub struct SourceSettings {
    /// Name.
    pub name: String,
    /// Volumes: name and size, as in the file.
    pub volumes: Vec<(String, String)>,
    /// NVRAM size.
    pub nvram: String,
    /// CP interval.
    pub interval: String,
    /// More lines of `[replication]`.
    pub replication: String,
    /// Pool size.
    pub pool: String,
}

impl SourceSettings {
    /// A source with one volume of 64 MiB, whose CPs come only when asked for.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            volumes: vec![("vol0".to_owned(), "64MiB".to_owned())],
            nvram: "32MiB".to_owned(),
            interval: "1h".to_owned(),
            replication: String::new(),
            pool: "512MiB".to_owned(),
        }
    }

    /// With these volumes.
    pub fn volumes(mut self, volumes: &[(&str, &str)]) -> Self {
        self.volumes = volumes.iter().map(|(n, s)| ((*n).to_owned(), (*s).to_owned())).collect();
        self
    }

    /// With this CP interval.
    pub fn interval(mut self, interval: &str) -> Self {
        self.interval = interval.to_owned();
        self
    }

    /// With this NVRAM.
    pub fn nvram(mut self, size: &str) -> Self {
        self.nvram = size.to_owned();
        self
    }
}

/// A hub and its sources.
#[derive(Debug)]
pub struct Cluster {
    /// Everything lies below it.
    pub dir: tempfile::TempDir,
    hub_port: u16,
    http_port: u16,
    hub: Option<Process>,
    sources: Vec<(SourceSettings, u16, Option<Process>)>,
    /// Environment of every process.
    pub environment: Vec<(String, String)>,
}

impl Cluster {
    /// Writes the configuration of a hub with these sources; starts nothing.
    pub fn prepare(sources: &[SourceSettings]) -> Self {
        Self::prepare_with(sources, "64MiB", "2GiB")
    }

    /// The same with other sizes of the hub's ring and pool.
    pub fn prepare_with(sources: &[SourceSettings], nvram: &str, pool: &str) -> Self {
        let dir =
            tempfile::Builder::new().prefix("mirrorhub-").tempdir().expect("temporary directory");
        let (hub_port, http_port) = (free_port(), free_port());
        fs::create_dir_all(dir.path().join("hub/sources.d")).expect("directory");
        let hub = format!(
            "data_dir = \"state\"\nlisten = \"127.0.0.1:{hub_port}\"\nnbd_listen = \"unix:nbd.sock\"\n\
             http_listen = \"127.0.0.1:{http_port}\"\nsources_dir = \"sources.d\"\n\
             [nvram]\nsize = \"{nvram}\"\n\
             [pool]\ndevices = [{{ path = \"state/disk0\", size = \"{pool}\" }}]\n"
        );
        fs::write(dir.path().join("hub/hub.toml"), hub).expect("hub.toml");
        let mut cluster = Self {
            dir,
            hub_port,
            http_port,
            hub: None,
            sources: Vec::new(),
            environment: Vec::new(),
        };
        for source in sources {
            cluster.add_source(source.clone());
        }
        cluster
    }

    /// Prepares and starts the hub, then the sources, and waits until all are in sync.
    pub fn start(sources: &[SourceSettings]) -> Self {
        let mut cluster = Self::prepare(sources);
        cluster.start_all();
        cluster
    }

    /// Starts what does not run and waits until every source is in sync.
    pub fn start_all(&mut self) {
        if self.hub.is_none() {
            self.start_hub();
        }
        for at in 0..self.sources.len() {
            if self.sources[at].2.is_none() {
                let name = self.sources[at].0.name.clone();
                self.start_source(&name);
            }
        }
        for name in self.source_names() {
            self.wait_in_sync(&name);
        }
    }

    /// Writes a source's files on both ends.
    pub fn add_source(&mut self, settings: SourceSettings) {
        let port = free_port();
        let dir = self.dir.path().join(&settings.name);
        fs::create_dir_all(&dir).expect("directory");
        let volumes: String = settings
            .volumes
            .iter()
            .map(|(name, size)| format!("[[volume]]\nname = \"{name}\"\nsize = \"{size}\"\n"))
            .collect();
        let text = format!(
            "name = \"{}\"\ndata_dir = \"state\"\nhub = \"127.0.0.1:{}\"\n\
             nbd_listen = \"unix:nbd.sock\"\nhttp_listen = \"127.0.0.1:{port}\"\n\
             [nvram]\nsize = \"{}\"\n[checkpoint]\ninterval = \"{}\"\n[replication]\n{}\n\
             [pool]\ndevices = [{{ path = \"state/disk0\", size = \"{}\" }}]\n{volumes}",
            settings.name,
            self.hub_port,
            settings.nvram,
            settings.interval,
            settings.replication,
            settings.pool,
        );
        fs::write(dir.join("source.toml"), text).expect("source.toml");
        let file = self.dir.path().join("hub/sources.d").join(format!("{}.toml", settings.name));
        fs::write(file, format!("name = \"{}\"\n", settings.name)).expect("sources.d file");
        self.sources.push((settings, port, None));
    }

    /// Names of the sources.
    pub fn source_names(&self) -> Vec<String> {
        self.sources.iter().map(|(settings, _, _)| settings.name.clone()).collect()
    }

    /// Configuration file of the hub.
    pub fn hub_config(&self) -> PathBuf {
        self.dir.path().join("hub/hub.toml")
    }

    /// Configuration file of a source.
    pub fn source_config(&self, name: &str) -> PathBuf {
        self.dir.path().join(name).join("source.toml")
    }

    fn command(&self, role: &str, config: &Path) -> Command {
        let mut command = Command::new(BINARY);
        command.arg(role).arg("--config").arg(config).env("RUST_BACKTRACE", "1");
        for (key, value) in &self.environment {
            command.env(key, value);
        }
        command
    }

    /// Starts the hub and waits until it answers.
    pub fn start_hub(&mut self) {
        let mut command = self.command("hub", &self.hub_config());
        self.start_hub_with(&mut command);
    }

    /// Starts the hub by this command (under strace, say).
    pub fn start_hub_with(&mut self, command: &mut Command) {
        assert!(self.hub.is_none(), "the hub runs already");
        let log = self.dir.path().join("hub.log");
        self.hub = Some(Process::start("hub", log, command));
        let config = self.hub_config();
        wait_for("hub answers", Duration::from_secs(30), || {
            assert!(self.hub.as_mut().expect("started").runs(), "the hub ended");
            status(&config).is_some()
        });
    }

    /// Starts a source; it may wait for its hub.
    pub fn start_source(&mut self, name: &str) {
        let mut command = self.command("source", &self.source_config(name));
        self.start_source_with(name, &mut command);
    }

    /// Starts a source by this command.
    pub fn start_source_with(&mut self, name: &str, command: &mut Command) {
        let log = self.dir.path().join(format!("{name}.log"));
        let at = self.index(name);
        assert!(self.sources[at].2.is_none(), "{name} runs already");
        self.sources[at].2 = Some(Process::start(name, log, command));
    }

    fn index(&self, name: &str) -> usize {
        let at = self.sources.iter().position(|(settings, _, _)| settings.name == name);
        at.unwrap_or_else(|| panic!("no source {name}"))
    }

    /// The hub's process.
    pub fn hub_process(&mut self) -> &mut Process {
        self.hub.as_mut().expect("the hub runs")
    }

    /// A source's process.
    pub fn source_process(&mut self, name: &str) -> &mut Process {
        let at = self.index(name);
        self.sources[at].2.as_mut().expect("the source runs")
    }

    /// Where sources reach the hub.
    pub fn hub_address(&self) -> std::net::SocketAddr {
        std::net::SocketAddr::from(([127, 0, 0, 1], self.hub_port))
    }

    /// kill -9 of the hub.
    pub fn kill_hub(&mut self) {
        self.hub.take().expect("the hub runs").kill();
    }

    /// kill -9 of a source.
    pub fn kill_source(&mut self, name: &str) {
        let at = self.index(name);
        self.sources[at].2.take().expect("the source runs").kill();
    }

    /// Clean stop of the hub.
    pub fn stop_hub(&mut self) -> ExitStatus {
        self.hub.take().expect("the hub runs").stop(Duration::from_secs(20))
    }

    /// Clean stop of a source.
    pub fn stop_source(&mut self, name: &str) -> ExitStatus {
        let at = self.index(name);
        self.sources[at].2.take().expect("the source runs").stop(Duration::from_secs(20))
    }

    /// Waits until the hub shows the source in sync and the source serves.
    pub fn wait_in_sync(&mut self, name: &str) {
        let config = self.source_config(name);
        let at = self.index(name);
        let hub = self.hub_config();
        wait_for(&format!("{name} in sync"), Duration::from_secs(30), || {
            if let Some(process) = self.sources[at].2.as_mut() {
                assert!(process.runs(), "{name} ended");
            }
            let own = status(&config).is_some_and(|own| own["source"]["state"] == "in-sync");
            own && source_on_hub(&hub, name).is_some_and(|there| there["state"] == "in-sync")
        });
    }

    /// The hub's status document.
    pub fn hub_status(&self) -> Value {
        status(&self.hub_config()).expect("the hub answers")
    }

    /// What the hub shows of a source.
    pub fn on_hub(&self, name: &str) -> Value {
        source_on_hub(&self.hub_config(), name).unwrap_or_else(|| panic!("no {name} on the hub"))
    }

    /// What a source shows of itself.
    pub fn own_status(&self, name: &str) -> Value {
        status(&self.source_config(name)).expect("the source answers")["source"].clone()
    }

    /// NBD URI of a volume on its source.
    pub fn volume(&self, source: &str, volume: &str) -> String {
        let socket = self.dir.path().join(source).join("nbd.sock");
        format!("nbd+unix:///{source}/{volume}?socket={}", socket.display())
    }

    /// NBD URI of an image on the hub.
    pub fn image(&self, source: &str, volume: &str) -> String {
        let socket = self.dir.path().join("hub/nbd.sock");
        format!("nbd+unix:///{source}/{volume}?socket={}", socket.display())
    }

    /// URL of the hub's HTTP listener.
    pub fn hub_url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.http_port)
    }

    /// URL of a source's HTTP listener.
    pub fn source_url(&self, name: &str, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.sources[self.index(name)].1)
    }

    /// `mirrorhub checkpoint` on the hub for one source: the answer's JSON.
    pub fn checkpoint(&self, name: &str) -> Value {
        let output = run(Command::new(BINARY)
            .args(["checkpoint", name, "--json", "--config"])
            .arg(self.hub_config()));
        serde_json::from_slice(&output.stdout).expect("JSON of checkpoint")
    }

    /// Root of a volume as `checkpoint` printed it.
    pub fn root(answer: &Value, volume: &str) -> String {
        let volumes = answer["sources"][0]["volumes"].as_array().expect("volumes");
        let found = volumes.iter().find(|found| found["name"] == volume).expect("the volume");
        found["root"].as_str().expect("a root").to_owned()
    }

    /// A new path below the cluster's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// The status document of the process of that configuration, if it answers.
pub fn status(config: &Path) -> Option<Value> {
    let output = try_run(Command::new(BINARY).args(["status", "--json", "--config"]).arg(config));
    output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("status is JSON"))
}

fn source_on_hub(config: &Path, name: &str) -> Option<Value> {
    let document = status(config)?;
    let sources = document["sources"].as_array()?.clone();
    sources.into_iter().find(|source| source["name"] == name)
}

/// `mirrorhub hash FILE`.
pub fn hash(file: &Path) -> String {
    let output = run(Command::new(BINARY).arg("hash").arg(file));
    String::from_utf8(output.stdout).expect("hexadecimal digits").trim().to_owned()
}

/// Open descriptors of a process.
pub fn descriptors(id: u32) -> usize {
    fs::read_dir(format!("/proc/{id}/fd")).expect("descriptors of a process").count()
}

/// Resident memory of a process, in KiB.
pub fn resident_kib(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).expect("status of a process");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("resident memory");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

/// Sum of the series of a counter whose labels hold `label`, as a page of metrics shows it.
pub fn metric_sum(page: &str, name: &str, label: &str) -> f64 {
    let series = page.lines().filter(|line| line.starts_with(name) && line.contains(label));
    series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Fetches a page of a loopback HTTP listener: status line and body.
pub fn http_get(url: &str) -> (String, String) {
    use std::io::Write;
    let rest = url.strip_prefix("http://").expect("a plain URL");
    let (address, path) = rest.split_once('/').expect("a path");
    let mut stream = std::net::TcpStream::connect(address).expect("HTTP listener");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .expect("request");
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).expect("status line");
    let mut rest = String::new();
    reader.read_to_string(&mut rest).expect("answer");
    let body = rest.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned());
    (line.trim().to_owned(), body)
}
