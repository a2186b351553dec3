//! Commands that the administrator wants run when a source's volumes have moved (`[hooks]`).
//!
//! Called by failover when clients are served here (`promoted`), and when a filer has said that it
//! serves again (`failed_back`). A command is a program with its arguments, run without a shell, in
//! a process group of its own, with an environment that says what has happened and nothing on its
//! standard input. What it prints goes to the log, line by line, within bounds. It never holds up
//! and never fails what it is told of: it runs beside, for at most its time; then its whole group is
//! killed. How the last run of each source ended is in status, every run in a metric.
//!
//! A run is not durable: a hub that resumes a failover runs `promoted` again. The command must bear
//! that; it names source and epoch, so it can tell.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::runtime::Handle;

use super::lane::lock;
use super::shared::Shared;
use crate::limits::{HOOK_LINE_BYTES_MAX, HOOK_OUTPUT_BYTES_MAX};
use crate::units::convert::to_u64;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{CpNumber, Epoch};

/// A program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookCommand {
    /// Its absolute path.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// What is run, and how long it may take.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HookOptions {
    /// When a source's volumes are served here.
    pub promoted: Option<HookCommand>,
    /// When its filer serves them again.
    pub failed_back: Option<HookCommand>,
    /// A command that runs longer is killed.
    pub timeout: Duration,
    /// Where clients reach the volumes on this hub: what comes before and behind `SOURCE/VOLUME`.
    pub export: (String, String),
}

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moved {
    /// The volumes are served here.
    Promoted,
    /// The filer serves them again.
    FailedBack,
}

impl Moved {
    /// Stable word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Promoted => "promoted",
            Self::FailedBack => "failed-back",
        }
    }
}

/// What a command is told.
#[derive(Debug, Clone)]
pub struct Told {
    /// What has happened.
    pub moved: Moved,
    /// To which source.
    pub source: SourceName,
    /// In which epoch.
    pub epoch: Epoch,
    /// As which CP.
    pub cp: CpNumber,
    /// Its volumes.
    pub volumes: Vec<VolumeName>,
}

/// How runs ended, since the start.
#[derive(Debug, Default)]
pub struct HookCounters {
    /// With success.
    pub done: AtomicU64,
    /// Otherwise.
    pub failed: AtomicU64,
}

/// The commands of a hub.
#[derive(Debug, Default)]
pub struct Hooks {
    options: HookOptions,
    /// Why the last run for a source failed.
    failed: Mutex<BTreeMap<SourceName, String>>,
    /// What has been told, so that it is told once by this process.
    told: Mutex<BTreeMap<(SourceName, Moved), Epoch>>,
    /// How runs ended.
    pub counters: HookCounters,
}

impl Hooks {
    /// With these commands.
    pub fn new(options: HookOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// Why the last command that was run for a source has failed.
    pub fn failure(&self, source: &SourceName) -> Option<String> {
        lock(&self.failed).get(source).cloned()
    }

    /// The command for what has happened, if there is one and it was not run for it yet.
    pub fn wanted(&self, told: &Told) -> Option<HookCommand> {
        let command = match told.moved {
            Moved::Promoted => &self.options.promoted,
            Moved::FailedBack => &self.options.failed_back,
        };
        let command = command.clone()?;
        let before = lock(&self.told).insert((told.source.clone(), told.moved), told.epoch);
        (before != Some(told.epoch)).then_some(command)
    }

    /// Runs a command to its end, or to the end of its time.
    pub async fn run(&self, command: &HookCommand, told: &Told) {
        let (source, moved) = (&told.source, told.moved.word());
        let program = command.program.display().to_string();
        tracing::info!(source = %source, hook = moved, program, "command is run");
        let ended = self.ended(command, told).await;
        let mut failed = lock(&self.failed);
        if let Err(why) = ended {
            tracing::error!(source = %source, hook = moved, program, why, "command has failed");
            failed.insert(source.clone(), format!("command {program} ({moved}): {why}"));
            self.counters.failed.fetch_add(1, Ordering::Relaxed);
        } else {
            tracing::info!(source = %source, hook = moved, program, "command is done");
            failed.remove(source);
            self.counters.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn ended(&self, command: &HookCommand, told: &Told) -> Result<(), String> {
        let mut child = Command::new(&command.program)
            .args(&command.arguments)
            .envs(self.environment(told))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("cannot be run: {error}"))?;
        let group = Group::of(&child);
        let outputs = (child.stdout.take(), child.stderr.take());
        let all = async {
            // Whoever inherits its output may keep it open: the command's own end is what counts.
            let said = async {
                tokio::join!(say(told, "stdout", outputs.0), say(told, "stderr", outputs.1));
            };
            tokio::pin!(said);
            tokio::select! {
                status = child.wait() => {
                    drop(tokio::time::timeout(Duration::from_millis(200), &mut said).await);
                    status
                }
                () = &mut said => child.wait().await,
            }
        };
        let ended = tokio::time::timeout(self.options.timeout, all).await;
        group.end();
        match ended {
            Err(_) => Err(format!("killed after {} s", self.options.timeout.as_secs_f32())),
            Ok(Err(error)) => Err(format!("cannot be waited for: {error}")),
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(format!("ended with {status}")),
        }
    }

    fn environment(&self, told: &Told) -> Vec<(OsString, OsString)> {
        let (before, behind) = &self.options.export;
        let source = &told.source;
        let uri = |volume: &VolumeName| format!("{before}{source}/{volume}{behind}");
        let exports: Vec<String> = match told.moved {
            Moved::Promoted => told.volumes.iter().map(uri).collect(),
            // The filer knows where it listens, the hub does not.
            Moved::FailedBack => Vec::new(),
        };
        let volumes: Vec<String> = told.volumes.iter().map(ToString::to_string).collect();
        [
            ("MIRRORHUB_EVENT", told.moved.word().to_owned()),
            ("MIRRORHUB_SOURCE", source.to_string()),
            ("MIRRORHUB_EPOCH", told.epoch.number.to_string()),
            ("MIRRORHUB_CP", told.cp.to_string()),
            ("MIRRORHUB_VOLUMES", volumes.join(" ")),
            ("MIRRORHUB_EXPORTS", exports.join(" ")),
        ]
        .map(|(name, value)| (name.into(), value.into()))
        .into()
    }
}

/// The processes of a command.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        Self(id.and_then(Pid::from_raw))
    }

    /// Nothing of it is left behind, whatever it has started.
    fn end(&self) {
        let Some(group) = self.0 else { return };
        match rustix::process::kill_process_group(group, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => tracing::warn!(%errno, "the command's processes were not ended"),
        }
    }
}

/// Puts what a command prints into the log; what is beyond the bound is read and dropped, so that
/// the command does not get stuck.
async fn say(told: &Told, stream: &str, output: Option<impl AsyncRead + Unpin>) {
    let Some(output) = output else { return };
    let (source, hook) = (&told.source, told.moved.word());
    let mut reader = BufReader::new(output);
    let mut left = HOOK_OUTPUT_BYTES_MAX;
    let mut line = Vec::new();
    while left > 0 {
        line.clear();
        let most = left.min(HOOK_LINE_BYTES_MAX);
        match (&mut reader).take(most).read_until(b'\n', &mut line).await {
            Ok(0) => return,
            Ok(_) => {
                left -= to_u64(line.len()).min(left);
                let text = String::from_utf8_lossy(&line);
                tracing::info!(source = %source, hook, stream, "{}", text.trim_end());
            }
            Err(error) => {
                tracing::debug!(source = %source, hook, stream, %error, "output");
                return;
            }
        }
    }
    tracing::info!(source = %source, hook, stream, "the rest of the output is dropped");
    drop(tokio::io::copy(&mut reader, &mut tokio::io::sink()).await);
}

impl Shared {
    /// The volumes of a source have moved: whoever wants to be told is, beside everything else.
    pub fn moved(&self, moved: Moved, name: &SourceName, epoch: Epoch, cp: CpNumber) {
        let lane = self.lanes.get(name);
        let rows = lane.map(|lane| self.pool.catalog().volumes(lane.source()));
        let volumes = match rows.transpose() {
            Ok(rows) => rows.unwrap_or_default().into_iter().map(|row| row.name).collect(),
            Err(error) => {
                tracing::warn!(source = %name, %error, "the command is told of no volumes");
                Vec::new()
            }
        };
        let told = Told { moved, source: name.clone(), epoch, cp, volumes };
        let Some(command) = self.hooks.wanted(&told) else { return };
        let hooks = Arc::clone(&self.hooks);
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(async move { hooks.run(&command, &told).await })),
            Err(error) => tracing::error!(source = %name, %error, "the command is not run"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn told() -> Told {
        Told {
            moved: Moved::Promoted,
            source: "filer-a".parse().unwrap(),
            epoch: Epoch { number: 2, id: 7 },
            cp: CpNumber(9),
            volumes: vec!["vol0".parse().unwrap(), "vol1".parse().unwrap()],
        }
    }

    fn shell(script: &str) -> HookCommand {
        let arguments = vec!["-c".to_owned(), script.to_owned()];
        HookCommand { program: "/bin/sh".into(), arguments }
    }

    fn hooks(script: &str, timeout: Duration) -> Hooks {
        let export = ("nbd://127.0.0.1:10810/".to_owned(), String::new());
        Hooks::new(HookOptions {
            promoted: Some(shell(script)),
            failed_back: None,
            timeout,
            export,
        })
    }

    const LONG: Duration = Duration::from_secs(20);

    fn in_runtime(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    }

    #[test]
    fn a_command_is_told_what_has_happened_and_runs_once_an_epoch() {
        in_runtime(async {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("told");
            let file = path.display();
            let script =
                format!("env | grep MIRRORHUB_ | sort > {file}; echo hello; cat >> {file}");
            let hooks = hooks(&script, LONG);
            let command = hooks.wanted(&told()).unwrap();
            hooks.run(&command, &told()).await;
            let said = std::fs::read_to_string(&path).unwrap();
            let wanted = "MIRRORHUB_CP=9\nMIRRORHUB_EPOCH=2\nMIRRORHUB_EVENT=promoted\n\
                          MIRRORHUB_EXPORTS=nbd://127.0.0.1:10810/filer-a/vol0 \
                          nbd://127.0.0.1:10810/filer-a/vol1\nMIRRORHUB_SOURCE=filer-a\n\
                          MIRRORHUB_VOLUMES=vol0 vol1\n";
            assert_eq!(said, wanted);
            assert_eq!(hooks.failure(&told().source), None);
            assert_eq!(hooks.counters.done.load(Ordering::Relaxed), 1);
            assert!(hooks.wanted(&told()).is_none(), "it was told");
            let later = Told { epoch: Epoch { number: 3, id: 8 }, ..told() };
            assert!(hooks.wanted(&later).is_some());
            assert!(hooks.wanted(&Told { moved: Moved::FailedBack, ..told() }).is_none());
        });
    }

    /// A command that fails, cannot be run, or does not end: named, counted, and nothing of it is
    /// left; the next success forgets it.
    #[test]
    fn a_command_that_fails_is_named() {
        in_runtime(async {
            let hooks = hooks("exit 3", Duration::from_millis(300));
            let command = hooks.wanted(&told()).unwrap();
            let source = told().source;
            hooks.run(&command, &told()).await;
            assert!(hooks.failure(&source).unwrap().contains("exit status: 3"));
            let missing = HookCommand { program: "/no/such/program".into(), arguments: vec![] };
            hooks.run(&missing, &told()).await;
            let why = hooks.failure(&source).unwrap();
            assert!(why.contains("/no/such/program") && why.contains("cannot be run"), "{why}");

            let dir = tempfile::tempdir().unwrap();
            let id = dir.path().join("id");
            let begun = Instant::now();
            let script = format!("sleep 600 & echo $! > {}; wait", id.display());
            hooks.run(&shell(&script), &told()).await;
            assert!(begun.elapsed() < LONG);
            assert!(hooks.failure(&source).unwrap().contains("killed after 0.3 s"));
            let child = std::fs::read_to_string(&id).unwrap();
            let stat = format!("/proc/{}/stat", child.trim());
            let gone = || {
                let stat = std::fs::read_to_string(&stat);
                stat.is_ok_and(|stat| !stat.contains(") Z "))
            };
            while gone() {
                assert!(begun.elapsed() < LONG, "what it had started still runs");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(hooks.counters.failed.load(Ordering::Relaxed), 3);

            // More than anybody wants in a log does not stop it.
            hooks.run(&shell("head -c 3000000 /dev/zero; exit 0"), &told()).await;
            assert_eq!(hooks.failure(&source), None);
        });
    }
}
