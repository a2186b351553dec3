//! What a source sends behind a pass, while its image is brought up (R4).
//!
//! Such transfers join the CP that the pass is to publish, not the image that is there: until then they are
//! no history of the source. So they lie in a directory of their own, `DIR/<source id>/behind/`, in logs like
//! the others, and a start deletes them unread: the source has not let go of its mark, and brings the
//! image up again. With the pass they become the source's logs:
//!
//! 1. what was appended is synced;
//! 2. the logs of the line that has ended are removed, durably ([`SourceLogs::reset`]);
//! 3. each log, oldest first, is renamed to where it belongs and that name is made durable.
//!
//! A power cut between any two leaves a prefix of the new line behind the published place, or nothing.
//! An error before 2 loses what was behind; from there on it latches the source, as in a reset.

use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, PoisonError};

use super::error::{LogError, io_error};
use super::removal::{remove, remove_path};
#[cfg(test)]
use super::source::file_name;
use super::source::{Appended, Shared, SourceCell, SourceLogs};
use super::{Cells, LogStore, cell_of, sync};
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::units::ids::SourceId;
use crate::units::numbers::{CpNumber, Epoch};

/// Name of the directory, within a source's.
const DIRECTORY: &str = "behind";

impl LogStore {
    /// What is appended from now on by [`LogStore::append_behind`] joins `base`, the place of CP `cp`. What was
    /// behind another pass is dropped.
    pub fn begin_behind(
        &self,
        source: SourceId,
        base: Place,
        cp: CpNumber,
    ) -> Result<(), LogError> {
        self.drop_behind(source);
        let above = self.root.join(source.to_string());
        let text: Arc<str> = above.to_string_lossy().into();
        let files = self.shared.open.files();
        files.create_dir(&above).map_err(io_error(&text, "create directory"))?;
        let cell = SourceCell::new(source);
        let logs = SourceLogs::behind(&cell, above.join(DIRECTORY), (base, cp));
        cell.begin(logs);
        self.behind().insert(source, Arc::new(cell));
        Ok(())
    }

    /// Appends a transfer behind the pass under way, unsynced; at least `writeback` bytes of a log are handed to
    /// the medium at once. Errors: [`LogError::NotRecovered`] if none was begun, and those of
    /// [`LogStore::append`], which are no fault of the source's own logs.
    pub fn append_behind(
        &self,
        source: SourceId,
        epoch: Epoch,
        transfer: &Transfer,
        writeback: u64,
    ) -> Result<Appended, LogError> {
        let cell =
            cell_of(&self.behind, source).ok_or(LogError::NotRecovered { source_id: source })?;
        let wanted_bytes = super::log::wanted_bytes(transfer);
        let room_bytes = self.room(source);
        if wanted_bytes > room_bytes {
            return Err(LogError::Full { source_id: source, wanted_bytes, room_bytes });
        }
        cell.with(|logs| {
            let appended = logs.append(&self.shared, epoch, transfer)?;
            logs.begin_writeback(&self.shared, writeback)?;
            Ok(appended)
        })
    }

    /// Bytes of records behind the pass under way. Never waits for a medium.
    pub fn behind_bytes(&self, source: SourceId) -> u64 {
        cell_of(&self.behind, source).and_then(|cell| cell.bytes()).unwrap_or(0)
    }

    /// Gives up what is behind the pass under way, if there is one. What cannot be removed now is at the next start.
    pub fn drop_behind(&self, source: SourceId) {
        let Some(cell) = self.behind().remove(&source) else { return };
        if let Some(logs) = cell.lock().take() {
            self.shared.open.new_names.are_durable(&logs.dir, u64::MAX);
            for log in logs.logs.values() {
                if let Err(error) = remove(&self.shared.open, &log.name) {
                    tracing::warn!(%source, %error, "a log behind a pass stays until the next start");
                }
            }
        }
    }

    /// Drops all logs of the source, durably, and goes on with what is behind the pass that was published at
    /// `base`. Returns where the log ends: at `base` if nothing is, or if it did not reach the medium.
    pub fn adopt_behind(&self, source: SourceId, base: Place) -> Result<Place, LogError> {
        let taken = self.take_synced(source);
        self.with(source, |logs| {
            logs.reset(&self.shared, Some(base))?;
            let Some(behind) = taken.filter(|behind| behind.base == Some(base)) else {
                return Ok(base);
            };
            let fault = Arc::clone(&logs.fault);
            fault.latching(logs.take_over(&self.shared, &self.root, behind))?;
            Ok(logs.last.unwrap_or(base))
        })
    }

    /// What is behind, once it is durable.
    fn take_synced(&self, source: SourceId) -> Option<SourceLogs> {
        let cell = cell_of(&self.behind, source)?;
        let synced = {
            let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
            sync::sync(&self.shared, &self.root, &[(source, Some(Arc::clone(&cell)))])
        };
        if let Some(error) = synced.into_iter().find_map(|(_, synced)| synced.err()) {
            tracing::error!(%source, %error, "what was behind a pass is lost, and will be sent again");
            self.drop_behind(source);
            return None;
        }
        self.behind().remove(&source);
        cell.lock().take()
    }

    fn behind(&self) -> MutexGuard<'_, Cells> {
        self.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SourceLogs {
    fn behind(cell: &SourceCell, dir: PathBuf, (base, cp): (Place, CpNumber)) -> Self {
        Self { last: Some(base), base: Some(base), ..Self::new(cell, dir, cp) }
    }

    /// Takes the logs of a directory into this one, which has none.
    fn take_over(&mut self, shared: &Shared, root: &Path, behind: Self) -> Result<(), LogError> {
        assert!(self.logs.is_empty(), "one line at a time");
        if behind.logs.is_empty() {
            return Ok(());
        }
        shared.open.sync_dir(root)?;
        for (cp, mut log) in behind.logs {
            // Everything in it is durable; what is written next goes by the new name.
            shared.open.discard(log.name.identity.log);
            let from = log.name.path.clone();
            log.name = Arc::new(self.name(log.name.identity));
            let renamed = shared.open.files().rename(&from, &log.name.path);
            renamed.map_err(io_error(&log.name.text, "rename"))?;
            shared.open.sync_dir(&self.dir)?;
            self.last = Some(log.last);
            self.logs.insert(cp, log);
        }
        Ok(())
    }
}

/// Removes what an earlier run left behind a pass.
pub(super) fn remove_left(shared: &Shared, dir: &Path) -> Result<(), LogError> {
    let dir = dir.join(DIRECTORY);
    let text: Arc<str> = dir.to_string_lossy().into();
    let names = shared.open.files().list(&dir).map_err(io_error(&text, "list directory"))?;
    names.iter().try_for_each(|name| remove_path(&shared.open, &dir.join(name)))
}

/// Where the log of a CP behind a pass lies, for tests.
#[cfg(test)]
pub(super) fn path_of(root: &Path, source: SourceId, cp: CpNumber) -> PathBuf {
    root.join(source.to_string()).join(DIRECTORY).join(file_name(cp))
}
