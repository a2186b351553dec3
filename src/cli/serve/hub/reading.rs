//! Reading the files of a hub while it runs: what is right in them is taken over, what is wrong is shown.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::PoisonError;

use super::{DAY, View, certificates, settings, volumes};
use crate::cli::serve::reload;
use crate::cli::serve::sizes;
use crate::cli::serve::watch::{Open, Watch};
use crate::cli::service;
use crate::cli::signals::{Signal, Signals};
use crate::config::around::{Around, load_around};
use crate::config::problem::{Problem, Problems};
use crate::config::reload::{Change, hub_changes, reloaded_hub};
use crate::config::schema::{HubConfig, HubSource};
use crate::config::sizing::is_thin;
use crate::control::message::{AdminError, code};
use crate::hub::settle::Settled;
use crate::status::config::{ConfigDiffAnswer, ConfigProblem};
use crate::units::names::SourceName;

/// Reads the files, once more if that is asked for meanwhile; false when the process is to stop, which waits
/// for no file and for no source.
pub(super) async fn read_files(view: &View, signals: &mut Signals, open: Open) -> bool {
    loop {
        let (mut reading, mut again) = (Box::pin(view.reload(open.clone())), false);
        loop {
            tokio::select! {
                () = &mut reading => break,
                signal = signals.next() => match signal {
                    Signal::Stop => return false,
                    Signal::Reload => again = true,
                },
            }
        }
        if !again {
            return true;
        }
    }
}

/// Waits until the files are to be read again; false when the process is to stop.
pub(super) async fn next_reading(signals: &mut Signals, watch: &mut Watch) -> bool {
    tokio::select! {
        signal = signals.next() => match signal {
            Signal::Stop => return false,
            Signal::Reload => {
                service::reloading();
                tracing::info!("told to read the files again");
            }
        },
        () = watch.changed() => {}
        // Certificates of this hub are made anew in time, though nobody changes a file.
        () = tokio::time::sleep(DAY) => {}
    }
    true
}

/// Why nothing of the files counts.
enum Unread {
    /// The hub's own is wrong.
    Wrong(Problems),
    /// The machine has no thread that reads them.
    NoThread(io::Error),
}

/// The files as they are now, and what in them differs from what runs.
async fn read(
    running: &HubConfig,
    written: BTreeSet<OsString>,
) -> Result<(Vec<Change>, Around), Unread> {
    let before = running.clone();
    let read = reload::aside(move || {
        let around = load_around(&before.file, Some(&before), &written)?;
        Ok((hub_changes(&before, &around.config), around))
    });
    read.await.map_err(Unread::NoThread)?.map_err(Unread::Wrong)
}

/// What is wrong with some of them, and those that nobody may read yet.
fn listed(
    problems: Vec<Problem>,
    unread: &[PathBuf],
    held: &BTreeSet<OsString>,
) -> Vec<ConfigProblem> {
    let mut all = reload::listed(&Problems(problems));
    all.extend(reload::of_held(unread, held));
    all
}

/// The file of a source is gone while this hub serves its volumes.
fn served(name: &SourceName) -> ConfigProblem {
    ConfigProblem {
        file: format!("{name}.toml"),
        line: None,
        key: String::new(),
        met: "is gone or not enabled, but this hub serves the source's volumes".to_owned(),
        fix: format!("put it back; `mirrorhub failback {name}` gives the volumes to a filer"),
    }
}

impl View {
    /// Reads the files again: what is right in them is taken over, source by source. One call at a
    /// time. May be dropped: what is not done then is done by the next.
    async fn reload(&self, open: Open) {
        open.clone_into(&mut self.open.lock().unwrap_or_else(PoisonError::into_inner));
        let running = self.files.running();
        let held = open.held;
        match read(&running, open.written).await {
            Ok((changes, around)) => self.take(&running, &changes, around, &held).await,
            Err(Unread::Wrong(problems)) => self.files.refused(&running.file, &problems),
            Err(Unread::NoThread(error)) => {
                let met = format!("could not be read again: {error}");
                let next = "mend the cause, then send HUP";
                let problem = Problem::of_file(&running.file, met, next);
                self.files.refused(&running.file, &problem.into());
            }
        }
    }

    /// Takes over what was read.
    async fn take(
        &self,
        running: &HubConfig,
        changes: &[Change],
        Around { config, problems, unread }: Around,
        held: &BTreeSet<OsString>,
    ) {
        let settled = self.hub.settle(settings(&config)).await;
        let mut now = config;
        let mut problems = listed(problems, &unread, held);
        for name in &settled.serving {
            // Its clients write here: it stays until it was given back.
            let stays = running.sources.iter().find(|source| source.file.name == *name);
            now.sources.retain(|source| source.file.name != *name);
            now.sources.extend(stays.cloned());
            problems.push(served(name));
        }
        if let Some(tls) = &self.hub.shared().tls {
            let made = certificates(running);
            problems.extend(made.err().map(|error| reload::of_tls(&error)));
            problems.extend(tls.reload().err().map(|error| reload::of_tls(&error)));
            problems.extend(self.locks.reload());
        }
        self.warn_of_thin(running, &now);
        // A command may have changed what runs while the files were read.
        let now = reloaded_hub(&self.files.running(), now);
        self.files.taken(now, changes, problems);
        let Settled { added, changed, retired, .. } = settled;
        tracing::debug!(changed = changed.len(), "sources told of other settings");
        for (names, what) in [(added, "added"), (retired, "retired")] {
            for name in names {
                tracing::info!(source = %name, "source {what} by its file");
            }
        }
    }

    /// Volumes beyond the pool are allowed, and nobody learns of it by a full pool first.
    fn warn_of_thin(&self, before: &HubConfig, now: &HubConfig) {
        let (before, volumes) = (volumes(before), volumes(now));
        let pool = self.hub.shared().pool.device_bytes();
        if volumes > before && is_thin(volumes, pool) {
            tracing::warn!(
                volumes_bytes = volumes,
                pool_bytes = pool,
                "the volumes of all sources, and a tenth more, are larger than the pool: see `mirrorhub status`"
            );
        }
    }

    /// Sizes that volumes cannot have while this hub serves them.
    pub(super) fn unfit(&self, config: &HubConfig) -> Vec<ConfigProblem> {
        let snapshots = self.hub.snapshots();
        let named: BTreeMap<_, _> =
            snapshots.iter().map(|snapshot| (&snapshot.name, snapshot)).collect();
        let of_source = |source: &HubSource| {
            let snapshot = named.get(&source.file.name);
            snapshot.map_or_else(Vec::new, |snapshot| sizes::of_served(source, snapshot))
        };
        config.sources.iter().flat_map(of_source).collect()
    }

    /// What a reload would do.
    pub(super) async fn difference(&self) -> Result<ConfigDiffAnswer, AdminError> {
        let running = self.files.running();
        let Open { written, held } =
            self.open.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match read(&running, written).await {
            Ok((changes, Around { config, problems, unread })) => {
                let mut problems = listed(problems, &unread, &held);
                problems.extend(self.unfit(&config));
                Ok(reload::difference(&changes, problems))
            }
            Err(Unread::Wrong(problems)) => Ok(reload::difference(&[], reload::listed(&problems))),
            Err(Unread::NoThread(error)) => {
                Err(AdminError::new(code::FAILED, error.to_string(), "see the log of the hub"))
            }
        }
    }
}
