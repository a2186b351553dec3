//! The files of a running process: read again on HUP, compared on demand.
//!
//! A file that is refused changes nothing: each of its problems is logged with file, line, key and
//! fix, and shown in status until the file is right.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::config::problem::{Problem, Problems};
use crate::config::reload::{Change, When};
use crate::config::schema::TlsConfig;
use crate::link::tls::TlsFiles;
use crate::status::SCHEMA;
use crate::status::config::{
    ConfigChange, ConfigDiffAnswer, ConfigProblem, ConfigStatus, STILL_WRITTEN,
};
use crate::status::health::{HealthReason, HealthWord};
use crate::units::convert::to_u64;

/// What runs, and how its files stand against it.
#[derive(Debug)]
pub struct Files<C>(Mutex<State<C>>);

#[derive(Debug)]
struct State<C> {
    running: C,
    status: ConfigStatus,
}

impl<C: Clone> Files<C> {
    /// What was started with.
    pub fn new(running: C) -> Self {
        Self(Mutex::new(State { running, status: ConfigStatus::default() }))
    }

    /// What runs.
    pub fn running(&self) -> C {
        self.lock().running.clone()
    }

    /// What runs was changed by a command.
    pub fn changed(&self, change: impl FnOnce(&mut C)) {
        change(&mut self.lock().running);
    }

    /// For the status document.
    pub fn status(&self) -> ConfigStatus {
        self.lock().status.clone()
    }

    /// The files were taken over: `running` runs, what needs a restart waits.
    pub fn taken(&self, running: C, changes: &[Change], problems: Vec<ConfigProblem>) {
        for change in changes {
            let Change { key, from, to, when } = change;
            match when {
                When::Restart => tracing::warn!(key, from, to, "only a restart changes this"),
                When::Now | When::NextCp | When::NextSession => {
                    tracing::info!(key, from, to, %when, "changed by a reload");
                }
            }
        }
        let restart = changes.iter().filter(|change| change.when == When::Restart);
        let needs_restart = restart.map(shown).collect();
        let mut state = self.lock();
        let known = std::mem::take(&mut state.status.problems);
        // The directory is read at every change of any file: each problem is said once.
        log(problems.iter().filter(|problem| !known.contains(problem)));
        state.running = running;
        state.status = ConfigStatus { problems, needs_restart };
    }

    /// The files were refused: what runs goes on.
    pub fn refused(&self, file: &Path, problems: &Problems) {
        let problems = listed(problems);
        log(&problems);
        tracing::error!(file = %file.display(), problems = problems.len(), "nothing was reloaded");
        self.lock().status.problems = problems;
    }

    fn lock(&self) -> MutexGuard<'_, State<C>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn log<'a>(problems: impl IntoIterator<Item = &'a ConfigProblem>) {
    for problem in problems {
        let ConfigProblem { file, line, key, met, fix } = problem;
        tracing::error!(file, line, key, met, fix, "configuration refused");
    }
}

/// Certificates that cannot be read again: those that were read before stay in force.
pub fn of_tls(error: &impl std::fmt::Display) -> ConfigProblem {
    ConfigProblem {
        file: "[tls]".to_owned(),
        line: None,
        key: "tls".to_owned(),
        met: error.to_string(),
        fix: "put right files there, then reload; the certificates read before go on".to_owned(),
    }
}

/// Own certificates that nobody takes any more. The process goes on with all that needs none.
pub fn of_expired(whys: impl IntoIterator<Item = String>) -> Vec<HealthReason> {
    let one = |text: String| HealthReason {
        code: "certificate-expired".to_owned(),
        word: HealthWord::Critical,
        object: "tls".to_owned(),
        text,
        next_step: "put a new one there and reload: docs/operations.md, section TLS".to_owned(),
    };
    // Two doors may show the same one.
    let whys: BTreeSet<String> = whys.into_iter().collect();
    whys.into_iter().map(one).collect()
}

/// Says at the start what status goes on saying.
pub fn log_expired(whys: impl IntoIterator<Item = String>) {
    for HealthReason { text, next_step, .. } in of_expired(whys) {
        tracing::error!(reason = text, next_step, "nobody takes this end's certificate");
    }
}

/// Promises of those that live here which do not follow the file: the older ones stay in force.
pub fn of_homes(met: String) -> ConfigProblem {
    ConfigProblem {
        file: "source.toml".to_owned(),
        line: None,
        key: "home".to_owned(),
        met,
        fix: "mend the cause named there, then reload".to_owned(),
    }
}

/// Files that stay open for writing, of those that were therefore not read.
pub fn of_held(unread: &[PathBuf], held: &BTreeSet<OsString>) -> Vec<ConfigProblem> {
    let one = |file: &PathBuf| ConfigProblem {
        file: file.display().to_string(),
        line: None,
        key: String::new(),
        met: STILL_WRITTEN.to_owned(),
        fix: "end the program that writes it, or write another file and rename it to this one"
            .to_owned(),
    };
    let held = |file: &&PathBuf| file.file_name().is_some_and(|name| held.contains(name));
    unread.iter().filter(held).map(one).collect()
}

/// Reads files on a thread of its own: nobody who is served here waits for them, and a stop neither, if one of
/// them lies where nothing answers. An error if there is no thread to be had.
pub async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<T> {
    let (sender, done) = oneshot::channel();
    let thread = std::thread::Builder::new().name("reload".to_owned());
    // Nobody hears it if the process is told to stop meanwhile.
    thread.spawn(move || drop(sender.send(work())))?;
    done.await.map_err(std::io::Error::other)
}

/// Where they lie.
pub fn files_of(config: &TlsConfig) -> TlsFiles {
    let TlsConfig { ca, cert, key, .. } = config.clone();
    TlsFiles { ca, cert, key }
}

/// For status and answers.
pub fn listed(problems: &Problems) -> Vec<ConfigProblem> {
    let one = |problem: &Problem| ConfigProblem {
        file: problem.file.display().to_string(),
        line: problem.place.as_ref().map(|place| to_u64(place.line)),
        key: problem.key.clone(),
        met: problem.met.clone(),
        fix: problem.fix.clone(),
    };
    problems.0.iter().map(one).collect()
}

/// What a reload would do.
pub fn difference(changes: &[Change], problems: Vec<ConfigProblem>) -> ConfigDiffAnswer {
    ConfigDiffAnswer { schema: SCHEMA, changes: changes.iter().map(shown).collect(), problems }
}

fn shown(change: &Change) -> ConfigChange {
    let Change { key, from, to, when } = change.clone();
    ConfigChange { key, from, to, when: when.to_string() }
}
