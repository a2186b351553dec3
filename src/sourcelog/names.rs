//! The directories of sources with names that no sync has covered yet.
//!
//! A `syncfs` that fails may have met a directory, and reports it once: the next one would cover its names
//! with a success. So whoever met the error asks each such directory, whoever's it is
//! ([`super::open::OpenFiles::sync_all`]). The source counts its names; an entry stands from before one is
//! made until all are durable.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::{FaultKind, FaultLatch, LogError};
use super::open::OpenFiles;

/// How many were made in each, and whom an error faults.
#[derive(Debug, Default)]
pub(super) struct NewNames(Mutex<BTreeMap<PathBuf, (u64, Arc<FaultLatch>)>>);

impl NewNames {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, (u64, Arc<FaultLatch>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The `made`-th name is about to be made in that directory.
    pub(super) fn begin(&self, dir: &Path, made: u64, fault: &Arc<FaultLatch>) {
        self.lock().insert(dir.to_owned(), (made, Arc::clone(fault)));
    }

    /// So many of its names are durable.
    pub(super) fn are_durable(&self, dir: &Path, upto: u64) {
        let mut all = self.lock();
        if all.get(dir).is_some_and(|(made, _)| *made <= upto) {
            all.remove(dir);
        }
    }

    /// Asks each directory, and those above them, whether the names are on the medium. An error faults
    /// the source; one that is faulted is not asked again.
    pub(super) fn sync(&self, open: &OpenFiles) {
        let fault = |(dir, (_, fault)): (&PathBuf, &(u64, Arc<FaultLatch>))| {
            (dir.clone(), Arc::clone(fault))
        };
        let new: Vec<(PathBuf, Arc<FaultLatch>)> = self.lock().iter().map(fault).collect();
        let mut above: BTreeMap<&Path, Result<(), LogError>> = BTreeMap::new();
        for (dir, fault) in &new {
            let root = dir.parent().unwrap_or(dir);
            let root_synced = above.entry(root).or_insert_with(|| open.sync_dir(root)).clone();
            if fault.check_io().is_err() {
                continue;
            }
            match root_synced.and_then(|()| open.sync_dir(dir)) {
                Ok(()) => {}
                // It is being made.
                Err(LogError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::warn!(%error, "names of source logs did not reach the medium");
                    fault.set(FaultKind::Io, &error);
                }
            }
        }
    }
}
