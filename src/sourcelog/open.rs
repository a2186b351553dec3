//! The log files that are open right now: a bounded number, the least recently used closed first.
//!
//! Everybody who reads or writes a log file asks here for a [`Handle`] and holds it for one call
//! of the kernel or a few, never while asking for another: so a thread that waits for room never
//! keeps others waiting. The table's lock is never held during a call of the kernel: room for a
//! descriptor is set aside first, then the file is opened.
//!
//! Invariant: a file that is not open has no unsynced writes. A dirty file is closed only after
//! its own fdatasync, through the descriptor that wrote it, or, where many are dirty, a sync of the
//! whole file system; if that fails the source is faulted.
//! What was written before a sync began is known by stamps: each write takes one when it has
//! returned, a sync covers every stamp taken before it began.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::error::{FaultLatch, LogError, io_error};
use super::files::{Files, LogFile};
use super::format::{Identity, SECTOR_BYTES};
use super::names::NewNames;
use crate::units::ids::RingId;

/// Up to this many files and directories are synced one by one.
pub(super) const SYNC_EACH_MAX: usize = 16;

/// A log file by name: where it lies, whose it is, and whom its errors fault.
#[derive(Debug)]
pub(super) struct LogName {
    pub(super) path: PathBuf,
    /// The path, for messages.
    pub(super) text: Arc<str>,
    pub(super) identity: Identity,
    pub(super) fault: Arc<FaultLatch>,
}

impl LogName {
    pub(super) fn corrupt(&self, offset: u64, what: impl fmt::Display) -> LogError {
        LogError::Corrupt { file: Arc::clone(&self.text), offset, what: what.to_string().into() }
    }

    fn gone(&self) -> LogError {
        LogError::NoLog { source_id: self.identity.source, cp: self.identity.cp }
    }
}

#[derive(Debug)]
struct Open {
    file: Arc<dyn LogFile>,
    name: Arc<LogName>,
    handles: u32,
    used_at: u64,
    /// Stamp of the last write that returned.
    written: u64,
    /// Stamps up to here are on the medium.
    synced: u64,
    /// A write may be on its way or broken off: dirty whatever the stamps say.
    writing: u32,
    /// An fdatasync is on its way.
    syncing: bool,
}

impl Open {
    fn is_dirty(&self) -> bool {
        self.writing > 0 || self.written > self.synced
    }
}

#[derive(Debug, Default)]
struct Table {
    /// The descriptor that a log is read and written by now.
    current: HashMap<RingId, u64>,
    /// All open descriptors by the number they were opened with; a discarded one that somebody
    /// still holds is no longer current.
    open: HashMap<u64, Open>,
    /// Logs whose file is being opened or made, without the lock; `true` once one was discarded.
    opening: HashMap<RingId, bool>,
    /// Files being closed, without the lock.
    closing: usize,
    /// Rises with every use: for least recently used.
    clock: u64,
    /// Rises with every write.
    stamp: u64,
}

/// The open files of a store.
#[derive(Debug)]
pub(super) struct OpenFiles {
    files: Arc<dyn Files>,
    table: Mutex<Table>,
    released: Condvar,
    open_max: usize,
    /// Syncs that the kernel was asked for.
    syncs: AtomicU64,
    /// Held while the whole file system is synced.
    whole: Mutex<()>,
    /// Directories with names that no sync has covered yet.
    pub(super) new_names: NewNames,
}

/// One open file, for the length of a call.
#[derive(Debug)]
pub(super) struct Handle<'a> {
    /// Stands first, so that the descriptor is closed before it is said to be free.
    file: Arc<dyn LogFile>,
    hold: Hold<'a>,
}

#[derive(Debug)]
struct Hold<'a> {
    owner: &'a OpenFiles,
    number: u64,
    for_write: bool,
}

impl Deref for Handle<'_> {
    type Target = dyn LogFile;

    fn deref(&self) -> &Self::Target {
        &*self.file
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.owner.release(self.number, self.for_write);
    }
}

impl OpenFiles {
    pub(super) fn new(files: Arc<dyn Files>, open_max: usize) -> Self {
        assert!(open_max > 0, "a store without descriptors cannot work");
        let (table, released) = (Mutex::default(), Condvar::new());
        let (syncs, whole) = (AtomicU64::new(0), Mutex::default());
        Self { files, table, released, open_max, syncs, whole, new_names: NewNames::default() }
    }

    /// Syncs that the kernel was asked for.
    pub(super) fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    pub(super) fn count_sync(&self) {
        self.syncs.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn files(&self) -> &dyn Files {
        &*self.files
    }

    /// Makes the names in a directory durable.
    pub(super) fn sync_dir(&self, dir: &Path) -> Result<(), LogError> {
        self.count_sync();
        self.files()
            .sync_dir(dir)
            .map_err(io_error(&dir.to_string_lossy().into(), "fsync directory"))
    }

    /// The file, for reading.
    pub(super) fn reading(&self, name: &Arc<LogName>) -> Result<Handle<'_>, LogError> {
        self.take(name, false)
    }

    /// The file, for writing: it counts as dirty from here to the next sync.
    pub(super) fn writing(&self, name: &Arc<LogName>) -> Result<Handle<'_>, LogError> {
        self.take(name, true)
    }

    /// The file, if it is open: one that is not has nothing unsynced.
    pub(super) fn open_now(&self, log: RingId) -> Option<Handle<'_>> {
        self.hold(&mut self.lock(), log, false)
    }

    /// Takes in a file that was just made; it counts as dirty.
    pub(super) fn adopt(
        &self,
        name: &Arc<LogName>,
        make: impl FnOnce(&dyn Files) -> Result<Arc<dyn LogFile>, LogError>,
    ) -> Result<Handle<'_>, LogError> {
        let mut table = self.lock();
        while table.is_full(self.open_max) {
            table = self.make_room(table);
        }
        self.open_reserved(table, name, true, make)
    }

    /// Everything written so far is covered by a sync that begins after this call.
    fn stamp(&self) -> u64 {
        self.lock().stamp
    }

    /// A sync of the whole file system that began at that stamp has succeeded.
    fn all_synced(&self, stamp: u64) {
        for open in self.lock().open.values_mut() {
            open.synced = open.synced.max(stamp.min(open.written));
        }
    }

    pub(super) fn is_dirty(&self, log: RingId) -> bool {
        self.lock().current(log).is_some_and(Open::is_dirty)
    }

    /// One sync for everything; `false` if it reports an error and each file and each directory with new
    /// names was asked, of all sources: the next one would cover them with a success. One at a
    /// time: the file system reports an error once, and what another one covers with a success must
    /// have latched by then.
    pub(super) fn sync_all(&self) -> bool {
        let _one = self.one_at_a_time();
        let stamp = self.stamp();
        self.count_sync();
        let error = match self.files().sync_file_system() {
            Ok(()) => {
                self.all_synced(stamp);
                return true;
            }
            Err(error) => error,
        };
        tracing::warn!(%error, "syncfs of the source logs failed, asking each");
        for name in self.dirty_names() {
            if let Err(error) = self.sync_one(&name) {
                tracing::warn!(%error, "source log did not reach the medium");
            }
        }
        self.new_names.sync(self);
        false
    }

    /// Held from the sync of a directory until what it met has latched: it is told once as well.
    pub(super) fn one_at_a_time(&self) -> MutexGuard<'_, ()> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All files with writes that no sync has covered, of whatever source.
    fn dirty_names(&self) -> Vec<Arc<LogName>> {
        let table = self.lock();
        let dirty = table.open.values().filter(|open| open.is_dirty());
        dirty.map(|open| Arc::clone(&open.name)).collect()
    }

    /// Syncs one file through the descriptor it was written by, if it is dirty. An error faults
    /// its source, and a faulted source is not synced again: the kernel would report success for
    /// pages it has given up (invariant 7).
    pub(super) fn sync_one(&self, name: &Arc<LogName>) -> Result<(), LogError> {
        let log = name.identity.log;
        let mut table = self.lock();
        let (handle, stamp) = loop {
            name.fault.check_io()?;
            match table.current(log) {
                Some(open) if open.is_dirty() && open.syncing => {
                    // A descriptor reports an error once: the other sync may get it and this one
                    // a success. So wait until it has latched what it got.
                    table = self.released.wait(table).unwrap_or_else(PoisonError::into_inner);
                }
                Some(open) if open.is_dirty() => {
                    let stamp = table.stamp;
                    let Some(handle) = self.hold(&mut table, log, false) else { return Ok(()) };
                    break (handle, stamp);
                }
                Some(_) | None => return Ok(()),
            }
        };
        table.set_syncing(handle.hold.number, true);
        drop(table);
        self.count_sync();
        let result = handle.sync_data().map_err(io_error(&name.text, "fdatasync"));
        let result = name.fault.latching(result);
        let mut table = self.lock();
        table.set_syncing(handle.hold.number, false);
        if let (Ok(()), Some(open)) = (&result, table.open.get_mut(&handle.hold.number)) {
            open.synced = open.synced.max(stamp.min(open.written));
        }
        drop(table);
        result
    }

    /// Closes the file without syncing it: it was dropped, or what it holds is given up.
    pub(super) fn discard(&self, log: RingId) {
        let mut table = self.lock();
        if let Some(discarded) = table.opening.get_mut(&log) {
            *discarded = true;
        }
        let Some(number) = table.current.remove(&log) else { return };
        if table.open.get(&number).is_some_and(|open| open.handles == 0) {
            drop(self.close(table, number));
        }
    }

    /// Closes a file that nobody holds, without the lock; its room is free when it is closed.
    fn close<'a>(&'a self, mut table: MutexGuard<'a, Table>, number: u64) -> MutexGuard<'a, Table> {
        let Some(closed) = table.open.remove(&number) else { return table };
        assert!(closed.handles == 0, "nobody holds a file that is closed");
        table.closing += 1;
        drop(table);
        drop(closed);
        let mut table = self.lock();
        table.closing -= 1;
        self.released.notify_all();
        table
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, name: &Arc<LogName>, for_write: bool) -> Result<Handle<'_>, LogError> {
        let log = name.identity.log;
        let mut table = self.lock();
        loop {
            if let Some(handle) = self.hold(&mut table, log, for_write) {
                return Ok(handle);
            }
            if table.opening.contains_key(&log) {
                // One descriptor a log: only the one it was written by reports its errors.
                table = self.released.wait(table).unwrap_or_else(PoisonError::into_inner);
            } else if table.is_full(self.open_max) {
                table = self.make_room(table);
            } else {
                break;
            }
        }
        self.open_reserved(table, name, for_write, |files| {
            let file = match files.open(&name.path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(name.gone());
                }
                Err(error) => return Err(io_error(&name.text, "open")(error)),
            };
            check_identity(name, &*file)?;
            Ok(file)
        })
    }

    /// Opens a file for which there is room, without the lock: one source's medium may be slow,
    /// and the others do not wait for it (R10).
    fn open_reserved(
        &self,
        mut table: MutexGuard<'_, Table>,
        name: &Arc<LogName>,
        for_write: bool,
        open: impl FnOnce(&dyn Files) -> Result<Arc<dyn LogFile>, LogError>,
    ) -> Result<Handle<'_>, LogError> {
        let log = name.identity.log;
        table.opening.insert(log, false);
        drop(table);
        let opened = open(&*self.files);
        let mut table = self.lock();
        let discarded = table.opening.remove(&log) == Some(true);
        self.released.notify_all();
        let handle = self.insert(&mut table, name, opened?, for_write);
        if discarded {
            // Dropped meanwhile: it is closed when its user is done.
            table.current.remove(&log);
        }
        Ok(handle)
    }

    fn hold(&self, table: &mut Table, log: RingId, for_write: bool) -> Option<Handle<'_>> {
        table.clock += 1;
        let clock = table.clock;
        let number = *table.current.get(&log)?;
        let open = table.open.get_mut(&number)?;
        open.handles += 1;
        open.writing += u32::from(for_write);
        open.used_at = clock;
        Some(self.handle(&open.file, number, for_write))
    }

    fn insert(
        &self,
        table: &mut Table,
        name: &Arc<LogName>,
        file: Arc<dyn LogFile>,
        for_write: bool,
    ) -> Handle<'_> {
        table.clock += 1;
        let number = table.clock;
        let open = Open {
            file,
            name: Arc::clone(name),
            handles: 1,
            used_at: number,
            written: 0,
            synced: 0,
            writing: u32::from(for_write),
            syncing: false,
        };
        let handle = self.handle(&open.file, number, for_write);
        table.open.insert(number, open);
        table.current.insert(name.identity.log, number);
        handle
    }

    fn handle(&self, file: &Arc<dyn LogFile>, number: u64, for_write: bool) -> Handle<'_> {
        Handle { file: Arc::clone(file), hold: Hold { owner: self, number, for_write } }
    }

    /// Closes the least recently used file that nobody holds, or waits until there may be one.
    fn make_room<'a>(&'a self, mut table: MutexGuard<'a, Table>) -> MutexGuard<'a, Table> {
        let idle = table.open.iter().filter(|(_, open)| open.handles == 0);
        let oldest = idle.min_by_key(|(_, open)| (open.is_dirty(), open.used_at));
        let Some((&number, open)) = oldest else {
            return self.released.wait(table).unwrap_or_else(PoisonError::into_inner);
        };
        let name = Arc::clone(&open.name);
        if open.is_dirty() {
            let many = table.open.values().filter(|open| open.is_dirty()).count() > SYNC_EACH_MAX;
            drop(table);
            if many && self.sync_all() {
                // The next ones that are closed need no sync of their own.
                return self.lock();
            }
            // A failed sync faults the file's own source; the file may be closed then, since
            // nothing behind its synced place is trusted any more.
            let failed = self.sync_one(&name).is_err();
            table = self.lock();
            if !failed {
                return table;
            }
        }
        if table.open.get(&number).is_none_or(|open| open.handles > 0) {
            return table;
        }
        if table.current.get(&name.identity.log) == Some(&number) {
            table.current.remove(&name.identity.log);
        }
        self.close(table, number)
    }

    fn release(&self, number: u64, wrote: bool) {
        let mut table = self.lock();
        table.stamp += u64::from(wrote);
        let stamp = table.stamp;
        let Some(open) = table.open.get_mut(&number) else { return };
        open.handles -= 1;
        if wrote {
            open.writing -= 1;
            open.written = stamp;
        }
        let (unused, log) = (open.handles == 0, open.name.identity.log);
        if unused && table.current.get(&log) != Some(&number) {
            drop(self.close(table, number));
            return;
        }
        drop(table);
        self.released.notify_all();
    }
}

impl Table {
    fn is_full(&self, open_max: usize) -> bool {
        self.open.len() + self.opening.len() + self.closing >= open_max
    }

    fn current(&self, log: RingId) -> Option<&Open> {
        self.open.get(self.current.get(&log)?)
    }

    fn set_syncing(&mut self, number: u64, syncing: bool) {
        if let Some(open) = self.open.get_mut(&number) {
            open.syncing = syncing;
        }
    }
}

/// A file that is opened again must be the one that was closed.
fn check_identity(name: &LogName, file: &dyn LogFile) -> Result<(), LogError> {
    let mut sector = [0; SECTOR_BYTES];
    let read = file.read_at(0, &mut sector).map_err(io_error(&name.text, "read"))?;
    if read < SECTOR_BYTES {
        return Err(name.corrupt(0, format_args!("the file ends after {read} bytes")));
    }
    let met = Identity::decode(&sector).map_err(|error| name.corrupt(error.offset(), error))?;
    if met != name.identity {
        let what = format!("the file is now log {}, it was {}", met.log, name.identity.log);
        return Err(LogError::Foreign { file: Arc::clone(&name.text), what: what.into() });
    }
    Ok(())
}
