//! Source logs: per source and CP interval one append-only file on the hub.
//!
//! Floor 4. The drainer moves transfers from the shared ring here, appliers read the blocks that
//! a CP refers to, CpDone drops the file. The file of CP n of a source is
//! `DIR/<source id, hex>/cp-<n, ten digits>.log`: a header ([`mod@format`]) and the source's transfers
//! of that CP in order, each in an envelope of its own, so that one reader serves ring and log.
//!
//! One [`LogStore`] serves all sources; its calls block and take `&self`. One drainer writes;
//! any number of readers read beside it; a source's lock is held by its own calls only, so one
//! source never waits for another's medium, except in [`LogStore::sync`] with whom it shares.
//!
//! Invariants:
//!
//! * [`LogStore::synced`] moves only after data, names and headers up to it are on the medium:
//!   the ring may be released up to there and no further (R11).
//! * What a source's logs hold without damage is one gapless chain (R7), and after any crash a
//!   prefix of what was appended, with everything synced in it.
//! * An error of a write or sync latches its source ([`LogStore::fault`]), and no other (R10).
//!   Nothing is appended or synced for it until the store is opened again, with the cause mended:
//!   recovery writes again what it finds sound ([`LogStore::recover`]), the ring has the rest.
//! * A file that is closed has no unsynced writes in it. At most
//!   [`LogOptions::files_open_max`] are open, and one more for a moment while recovery looks at
//!   headers.
//!
//! Dropping a log ([`LogStore::drop_through`]) unlinks it and syncs nothing. The drop follows the
//! durable commit of its CP, so if a power cut brings the name back, the next start finds a log
//! with cp <= applied and deletes it, unread. CP numbers are never used twice (R6), so it cannot
//! be taken for another one. The same holds for its space: it is the file system's again at the
//! latest then.
//!
//! Failures: full disk or broken medium: that source is faulted. Damage: [`LogError::Corrupt`]
//! with file and offset, from recovery or from a [`LogReader`]; nothing is skipped silently.

mod behind;
mod directory;
mod error;
pub mod files;
pub mod format;
mod log;
mod names;
mod open;
mod reader;
mod recover;
mod removal;
mod scan;
#[cfg(test)]
pub(crate) mod sim;
mod source;
mod sync;
mod table;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

pub use error::LogError;
pub use reader::{LogReader, Transfers};
pub use recover::{RecoveredLog, RecoveredLogs};
pub use source::Appended;

use error::io_error;
use files::{Files, RealFiles};
use log::Growth;
use open::OpenFiles;
use source::{Shared, SourceCell, SourceLogs};

use crate::limits::{SOURCE_LOG_FILES_OPEN_MAX, SOURCE_LOG_STEP_BYTES};
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::units::convert::to_u64;
use crate::units::ids::{HubId, SourceId};
use crate::units::numbers::{CpNumber, Epoch, TransferId};

/// How the store uses files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogOptions {
    /// Log files open at once, at least 1.
    pub files_open_max: usize,
    /// Files grow ahead of need by as much as they are long, at most by this many bytes.
    pub step_bytes: u64,
    /// Bytes of records that the logs of one source may take together. Each file takes 4 KiB
    /// more, and up to a step ahead of need.
    pub limit_bytes_per_source: u64,
}

impl LogOptions {
    /// The options that `limits` names, with that much room for each source.
    pub fn with_limit(limit_bytes_per_source: u64) -> Self {
        Self {
            files_open_max: SOURCE_LOG_FILES_OPEN_MAX,
            step_bytes: SOURCE_LOG_STEP_BYTES,
            limit_bytes_per_source,
        }
    }

    fn check(&self) -> Result<(), LogError> {
        let bad = |option, value, wanted| Err(LogError::Option { option, value, wanted });
        if self.files_open_max == 0 {
            return bad("files_open_max", to_u64(self.files_open_max), "at least 1 is wanted");
        }
        if self.step_bytes == 0 || self.step_bytes > log::LOG_BYTES_MAX {
            return bad("step_bytes", self.step_bytes, "1 byte to 2 TiB are wanted");
        }
        Ok(())
    }
}

/// The logs of each source, by its id.
type Cells = HashMap<SourceId, Arc<SourceCell>>;

fn cell_of(cells: &Mutex<Cells>, source: SourceId) -> Option<Arc<SourceCell>> {
    cells.lock().unwrap_or_else(PoisonError::into_inner).get(&source).map(Arc::clone)
}

/// All source logs of a hub.
#[derive(Debug)]
pub struct LogStore {
    root: PathBuf,
    shared: Shared,
    sources: Mutex<Cells>,
    /// What is appended behind a pass under way ([`mod@behind`]).
    behind: Mutex<Cells>,
    /// One sync at a time: a header written by one must not be taken for durable by another.
    syncing: Mutex<()>,
}

impl LogStore {
    /// Opens the directory, and makes it if it is not there. No log is looked at yet.
    pub fn open(dir: &Path, hub: HubId, options: LogOptions) -> Result<Self, LogError> {
        let text: Arc<str> = dir.to_string_lossy().into();
        let files = RealFiles::open(dir).map_err(io_error(&text, "open directory"))?;
        Self::open_with(Arc::new(files), dir, hub, options)
    }

    /// The same over other [`Files`]: the seam for fault injection.
    pub fn open_with(
        files: Arc<dyn Files>,
        dir: &Path,
        hub: HubId,
        options: LogOptions,
    ) -> Result<Self, LogError> {
        options.check()?;
        let shared = Shared {
            open: Arc::new(OpenFiles::new(files, options.files_open_max)),
            hub,
            growth: Growth { step_bytes: options.step_bytes, unsupported: AtomicBool::new(false) },
            limit_bytes: options.limit_bytes_per_source,
            rewrite: true,
        };
        let (sources, behind, syncing) = (Mutex::default(), Mutex::default(), Mutex::default());
        Ok(Self { root: dir.to_owned(), shared, sources, behind, syncing })
    }

    /// Reads what the directory holds of a source; comes before anything else is done with it,
    /// also for a new one. Deletes the logs of CPs up to `applied`. Called again later it only
    /// drops what is applied and tells what it has.
    ///
    /// Errors: a file of another hub or source ([`LogError::Foreign`]) or of a later version
    /// ([`LogError::Version`]; nothing of it was changed), or I/O. Damage is no error here: it is in the result, and latched.
    pub fn recover(&self, source: SourceId, applied: CpNumber) -> Result<RecoveredLogs, LogError> {
        let dir = self.root.join(source.to_string());
        let cell = {
            let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
            let cell = sources.entry(source).or_insert_with(|| Arc::new(SourceCell::new(source)));
            Arc::clone(cell)
        };
        recover::recover(&self.shared, &cell, dir, applied)
    }

    /// Appends a transfer to the log of its CP, unsynced. A transfer that the log has, or whose
    /// CP is dropped, is [`Appended::Repeated`]; one that does not follow the source's last is
    /// [`LogError::Gap`]. `epoch` is the one it was taken in.
    pub fn append(
        &self,
        source: SourceId,
        epoch: Epoch,
        transfer: &Transfer,
    ) -> Result<Appended, LogError> {
        self.with(source, |logs| logs.append(&self.shared, epoch, transfer))
    }

    /// Has the kernel begin to write what was appended, where that is at least `least` bytes of a
    /// log since it was last asked; says nothing of when it is durable.
    pub fn begin_writeback(&self, source: SourceId, least: u64) -> Result<(), LogError> {
        self.with(source, |logs| logs.begin_writeback(&self.shared, least))
    }

    /// Makes everything appended before the call durable, for each source up to the place that is
    /// returned. A source that fails is faulted; the others are not touched by that.
    pub fn sync(&self, sources: &[SourceId]) -> Vec<(SourceId, Result<Place, LogError>)> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let cells: Vec<_> = sources.iter().map(|source| (*source, self.cell(*source))).collect();
        sync::sync(&self.shared, &self.root, &cells)
    }

    /// Everything of the source up to here is durable in its logs or applied: the ring may let go
    /// of it. [`Place::default`] if nothing is.
    pub fn synced(&self, source: SourceId) -> Place {
        self.ask(source, SourceLogs::synced).unwrap_or_default()
    }

    /// Place behind the last transfer appended, also if its log is dropped by now. `None`: not
    /// known, any transfer may come next.
    pub fn last(&self, source: SourceId) -> Option<Place> {
        self.ask(source, |logs| logs.last).flatten()
    }

    /// Bytes of records in the source's logs. Never waits for a medium.
    pub fn bytes(&self, source: SourceId) -> u64 {
        self.cell(source).and_then(|cell| cell.bytes()).unwrap_or(0)
    }

    /// Syncs that the kernel was asked for so far: files, directories, the file system.
    pub fn syncs(&self) -> u64 {
        self.shared.open.syncs()
    }

    /// Bytes of records that may still be appended, here or behind a pass: a transfer takes
    /// [`crate::record::envelope::record_bytes`] of its length. 0 if the source is faulted or was
    /// not recovered. Never waits for a medium.
    pub fn room(&self, source: SourceId) -> u64 {
        let cell = self.cell(source).filter(|cell| cell.fault.get().is_none());
        let used = cell.and_then(|cell| cell.bytes());
        let behind = self.behind_bytes(source);
        used.map_or(0, |used| self.shared.limit_bytes.saturating_sub(used.saturating_add(behind)))
    }

    /// Why the source's logs take no more writes, if so: the first reason. A failed write or sync
    /// is mended by opening the store again; damage by [`LogStore::cut`], [`LogStore::reset`] or
    /// the end of its CP.
    pub fn fault(&self, source: SourceId) -> Option<Arc<str>> {
        self.cell(source)?.fault.get().map(|(_, reason)| reason)
    }

    /// Deletes the logs of CPs up to `cp`, unsynced, after that CP's commit is durable.
    pub fn drop_through(&self, source: SourceId, cp: CpNumber) -> Result<(), LogError> {
        self.with(source, |logs| logs.drop_through(&self.shared, cp))
    }

    /// Drops everything behind `place`, durably (R1). The caller has a record of the cut in its
    /// ring and repeats it if this did not return. Also cuts damage away.
    pub fn cut(&self, source: SourceId, place: Place) -> Result<(), LogError> {
        self.with(source, |logs| logs.cut(&self.shared, &place))
    }

    /// Drops all logs of the source, durably, and begins a new chain behind `base`; `None`: with
    /// whatever comes. For a resync that starts at a newer place (R4), and for damage that a
    /// source sends again.
    pub fn reset(&self, source: SourceId, base: Option<Place>) -> Result<(), LogError> {
        self.with(source, |logs| logs.reset(&self.shared, base))
    }

    /// A reader of the log of a CP, up to what was appended before the call. Reads the head of
    /// each transfer once.
    pub fn reader(&self, source: SourceId, cp: CpNumber) -> Result<LogReader, LogError> {
        let build = self.with(source, |logs| logs.reader_of(cp))?;
        build.run(Arc::clone(&self.shared.open))
    }

    /// CPs of which the source has a log, oldest first.
    pub fn cps(&self, source: SourceId) -> Vec<CpNumber> {
        self.ask(source, |logs| logs.logs.keys().copied().collect()).unwrap_or_default()
    }

    /// The same, and where each of them ends.
    pub fn ends(&self, source: SourceId) -> Vec<(CpNumber, Place)> {
        let ends = |logs: &SourceLogs| logs.logs.iter().map(|(cp, log)| (*cp, log.last)).collect();
        self.ask(source, ends).unwrap_or_default()
    }

    /// The last transfer that one in the source's logs names as durable at the source (R1).
    pub fn own_durable(&self, source: SourceId) -> TransferId {
        let newest = |logs: &SourceLogs| logs.logs.values().map(|log| log.own_durable).max();
        self.ask(source, newest).flatten().unwrap_or(TransferId::NONE)
    }

    /// CP of the newest log of the source: the label of its last transfer. Never waits for a medium.
    pub fn newest_cp(&self, source: SourceId) -> Option<CpNumber> {
        self.cell(source)?.newest_cp()
    }

    /// Only recovery takes a source in: an id from outside costs nothing.
    fn cell(&self, source: SourceId) -> Option<Arc<SourceCell>> {
        cell_of(&self.sources, source)
    }

    fn with<T>(
        &self,
        source: SourceId,
        work: impl FnOnce(&mut SourceLogs) -> Result<T, LogError>,
    ) -> Result<T, LogError> {
        match self.cell(source) {
            Some(cell) => cell.with(work),
            None => Err(LogError::NotRecovered { source_id: source }),
        }
    }

    /// Asks a source that may not be there.
    fn ask<T>(&self, source: SourceId, question: impl FnOnce(&SourceLogs) -> T) -> Option<T> {
        let cell = self.cell(source)?;
        let held = cell.lock();
        held.as_ref().map(question)
    }
}
