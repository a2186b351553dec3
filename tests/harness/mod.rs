//! Real processes for the integration tests: a hub and its sources in a temporary directory.
//!
//! Every process is the binary itself, started with a configuration file as a user would write it.
//! Volumes and images are reached over unix sockets, so that tests running side by side cannot
//! meet; TCP ports are asked from the kernel. Everything started is ended by id when it is dropped.

pub mod oracle;
pub mod terminal;
pub mod windows;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use mirrorhub::status::document::State;
use serde_json::Value;

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_mirrorhub");

/// A loopback address that no other test of this or another process uses, by chance of one in
/// millions; ports on it are free as long as they differ.
pub fn own_address(directory: &Path) -> Ipv4Addr {
    let hash = blake3::hash(directory.as_os_str().as_encoded_bytes());
    let [a, b, c] = [hash.as_bytes()[0], hash.as_bytes()[1], hash.as_bytes()[2]];
    Ipv4Addr::new(127, 1 + a % 250, b, 1 + c % 250)
}

/// Ports of the hub on the cluster's own address; sources follow.
const HUB_PORT: u16 = 7420;
const HTTP_PORT: u16 = 7421;
const SOURCE_HTTP_PORT: u16 = 7430;

/// Waits until `done` is true; panics with `what` after `limit`. Tests wait with this for what they
/// want to see; [`pause`] alone is for time that is itself what is tested.
pub fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < limit, "{what}: not within {limit:?}");
        pause(Duration::from_millis(20));
    }
}

/// Whether the long forms were asked for: `MIRRORHUB_FULL=1`.
pub fn is_full() -> bool {
    std::env::var_os("MIRRORHUB_FULL").is_some_and(|value| value == "1")
}

/// A pause of the test itself, on a channel that nobody sends on.
pub fn pause(length: Duration) {
    let (_sender, receiver) = std::sync::mpsc::channel::<()>();
    let _waited = receiver.recv_timeout(length);
}

/// How long an end may take until it is up, on a machine whose disk stands still for others.
const START_MAX: Duration = Duration::from_secs(90);

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

/// Runs `mirrorhub ARGUMENTS --config CONFIG`.
pub fn command(config: &Path, arguments: &[&str]) -> Output {
    try_run(Command::new(BINARY).args(arguments).arg("--config").arg(config))
}

/// The same, which must do it; what it says.
pub fn done(config: &Path, arguments: &[&str]) -> String {
    let output = command(config, arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}{error}");
    text
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

    /// With these lines in `[replication]`.
    pub fn replication(mut self, lines: &str) -> Self {
        lines.clone_into(&mut self.replication);
        self
    }

    /// With a pool of this size.
    pub fn pool(mut self, size: &str) -> Self {
        size.clone_into(&mut self.pool);
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
    address: Ipv4Addr,
    hub: Option<Process>,
    sources: Vec<(SourceSettings, u16, Option<Process>)>,
    /// Environment of every process.
    pub environment: Vec<(String, String)>,
    /// Set by a test that makes the hub refuse CPs on purpose: else none may be (R19).
    pub refusals_wanted: bool,
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
        let address = own_address(dir.path());
        fs::create_dir_all(dir.path().join("hub/sources.d")).expect("directory");
        let hub = format!(
            "data_dir = \"state\"\nlisten = \"{address}:{HUB_PORT}\"\nnbd_listen = \"unix:nbd.sock\"\n\
             http_listen = \"{address}:{HTTP_PORT}\"\nsources_dir = \"sources.d\"\n\
             [nvram]\nsize = \"{nvram}\"\n\
             [pool]\ndevices = [{{ path = \"state/disk0\", size = \"{pool}\" }}]\n"
        );
        fs::write(dir.path().join("hub/hub.toml"), hub).expect("hub.toml");
        let mut cluster = Self {
            dir,
            address,
            hub: None,
            sources: Vec::new(),
            environment: Vec::new(),
            refusals_wanted: false,
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
        let address = self.address;
        let port = SOURCE_HTTP_PORT + u16::try_from(self.sources.len()).expect("few sources");
        let dir = self.dir.path().join(&settings.name);
        fs::create_dir_all(&dir).expect("directory");
        let volumes: String = settings
            .volumes
            .iter()
            .map(|(name, size)| format!("[[volume]]\nname = \"{name}\"\nsize = \"{size}\"\n"))
            .collect();
        let text = format!(
            "name = \"{}\"\ndata_dir = \"state\"\nhub = \"{address}:{HUB_PORT}\"\n\
             nbd_listen = \"unix:nbd.sock\"\nhttp_listen = \"{address}:{port}\"\n\
             [nvram]\nsize = \"{}\"\n[checkpoint]\ninterval = \"{}\"\n[replication]\n{}\n\
             [pool]\ndevices = [{{ path = \"state/disk0\", size = \"{}\" }}]\n{volumes}",
            settings.name, settings.nvram, settings.interval, settings.replication, settings.pool,
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
        wait_for("hub answers", START_MAX, || {
            assert!(self.hub.as_mut().expect("started").runs(), "the hub ended");
            status(&config).is_some()
        });
    }

    /// Starts the hub by this command and does not wait: it may fail at once.
    pub fn spawn_hub_with(&mut self, command: &mut Command) {
        assert!(self.hub.is_none(), "the hub runs already");
        let log = self.dir.path().join("hub.log");
        self.hub = Some(Process::start("hub", log, command));
    }

    /// Whether the hub was started and still runs.
    pub fn hub_runs(&mut self) -> bool {
        self.hub.as_mut().is_some_and(Process::runs)
    }

    /// Whether a source was started and still runs.
    pub fn source_runs(&mut self, name: &str) -> bool {
        let at = self.index(name);
        self.sources[at].2.as_mut().is_some_and(Process::runs)
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

    /// The command of a source, for more arguments.
    pub fn source_command(&self, name: &str) -> Command {
        self.command("source", &self.source_config(name))
    }

    /// A source that has ended by itself.
    pub fn forget_source(&mut self, name: &str) {
        let at = self.index(name);
        drop(self.sources[at].2.take());
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
        std::net::SocketAddr::from((self.address, HUB_PORT))
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

    /// Sends the hub a signal by name.
    pub fn signal_hub(&self, signal: &str) {
        self.hub.as_ref().expect("the hub runs").signal(signal);
    }

    /// Sends a source a signal by name.
    pub fn signal_source(&self, name: &str, signal: &str) {
        self.sources[self.index(name)].2.as_ref().expect("the source runs").signal(signal);
    }

    /// Ends every process with kill -9, whatever runs.
    pub fn end(&mut self) {
        drop(self.hub.take());
        for (_, _, process) in &mut self.sources {
            drop(process.take());
        }
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
        wait_for(&format!("{name} in sync"), START_MAX, || {
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
        format!("http://{}:{HTTP_PORT}{path}", self.address)
    }

    /// URL of a source's HTTP listener.
    pub fn source_url(&self, name: &str, path: &str) -> String {
        format!("http://{}:{}{path}", self.address, self.sources[self.index(name)].1)
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

impl Cluster {
    /// What both ends and their logs say of refused CPs: repair must not hide a bug (R19). The
    /// counters show the processes that still run, the logs those before them.
    fn refused_checkpoints(&mut self) -> Option<String> {
        let mut names = vec!["hub".to_owned()];
        names.extend(self.source_names());
        for name in names {
            let log = fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
            if let Some(line) = log.lines().find(|line| line.contains("CP refused")) {
                return Some(format!("log of {name}: {line}"));
            }
        }
        let mut urls = Vec::new();
        if self.hub.as_mut().is_some_and(Process::runs) {
            urls.push(self.hub_url("/metrics"));
        }
        for at in 0..self.sources.len() {
            if self.sources[at].2.as_mut().is_some_and(Process::runs) {
                urls.push(self.source_url(&self.sources[at].0.name, "/metrics"));
            }
        }
        for url in urls {
            // A process that a test has stopped by a signal answers nothing; its log was read.
            let Some((_, metrics)) = try_http_get(&url, Duration::from_secs(2)) else { continue };
            let rejected = sum_of(&metrics, "mirrorhub_source_rejected_checkpoints_total");
            if rejected > 0 {
                return Some(format!("{url} counts {rejected} refused CPs"));
            }
        }
        None
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let watch = !self.refusals_wanted && !std::thread::panicking();
        let refused = if watch { self.refused_checkpoints() } else { None };
        // Before the directory goes, so that the logs of a failed test can be printed.
        self.end();
        if let Some(refused) = refused {
            panic!("a CP was refused in a test that does not want it: {refused}");
        }
    }
}

/// Sum of the series of a counter whose lines begin with `prefix`.
pub fn sum_of(metrics: &str, prefix: &str) -> u64 {
    let lines = metrics.lines().filter(|line| line.starts_with(prefix));
    let values = lines.filter_map(|line| line.rsplit(' ').next());
    values.map(|value| value.parse::<u64>().expect("a counter is a whole number")).sum()
}

/// The status document of the process of that configuration, if it answers.
pub fn status(config: &Path) -> Option<Value> {
    let output = try_run(Command::new(BINARY).args(["status", "--json", "--config"]).arg(config));
    let document = output
        .status
        .success()
        .then(|| serde_json::from_slice::<Value>(&output.stdout).expect("status is JSON"))?;
    let untold = untold(&document);
    assert!(untold.is_empty(), "{untold:?} in {document}");
    Some(document)
}

/// Sources that are shown without a reason, or without a next step where their state wants one: whatever
/// state a test meets, it is told.
fn untold(document: &Value) -> Vec<String> {
    let list = |key: &str| document[key].as_array().cloned().unwrap_or_default();
    let own = document["source"].is_object().then(|| document["source"].clone());
    let all = own.into_iter().chain(list("sources")).chain(list("homes"));
    let lacks = |source: &Value| {
        let state: State = serde_json::from_value(source["state"].clone()).expect("a state");
        let is_empty = |key: &str| source[key].as_str().is_none_or(str::is_empty);
        is_empty("reason") || state.wants_a_next_step() && is_empty("next_step")
    };
    all.filter(lacks).map(|source| format!("{} is {}", source["name"], source["state"])).collect()
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
    try_http_get(url, Duration::from_secs(10)).unwrap_or_else(|| panic!("no answer from {url}"))
}

/// The same; `None` if nobody answers within `limit`.
pub fn try_http_get(url: &str, limit: Duration) -> Option<(String, String)> {
    use std::io::Write;
    let rest = url.strip_prefix("http://").expect("a plain URL");
    let (address, path) = rest.split_once('/').expect("a path");
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(limit)).expect("timeout");
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut rest = String::new();
    reader.read_to_string(&mut rest).ok()?;
    let body = rest.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned());
    Some((line.trim().to_owned(), body))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The negative control of what every look at a status checks.
    #[test]
    fn a_state_that_is_not_told_is_seen() {
        let source = |state: &str, reason: &str, next: &str| serde_json::json!({"name": "a", "state": state, "reason": reason, "next_step": next});
        for (shown, lacks) in [
            (source("in-sync", "all is well", ""), 0),
            (source("in-sync", "", ""), 1),
            (source("offline", "gone", "start it"), 0),
            (source("offline", "gone", ""), 1),
        ] {
            let hub = serde_json::json!({"sources": [shown.clone()]});
            let own = serde_json::json!({"source": shown.clone(), "homes": [shown]});
            assert_eq!((untold(&hub).len(), untold(&own).len()), (lacks, 2 * lacks), "{hub}");
        }
    }

    /// The negative control of what every dropped cluster checks.
    #[test]
    fn a_refused_checkpoint_is_seen() {
        let mut cluster = Cluster::prepare(&[SourceSettings::new("filer-a")]);
        cluster.refusals_wanted = true;
        assert_eq!(cluster.refused_checkpoints(), None);
        fs::write(cluster.path("hub.log"), "WARN CP refused source=filer-a\n").expect("log");
        assert!(cluster.refused_checkpoints().is_some());
        let metrics = "a_total{source=\"x\"} 2\na_total{source=\"y\"} 3\nb_total 9\n";
        assert_eq!(sum_of(metrics, "a_total"), 5);
    }
}
