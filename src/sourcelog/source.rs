//! The logs of one source: their chain, their room, and what may be done with them.
//!
//! Called by [`super::LogStore`] with the source's lock held. The logs stand in CP order, and
//! their records are one chain (R7): each transfer names the one before it, also from one file to
//! the next. What does not join is refused and changes nothing.
//!
//! Invariant: the logs that are not damaged hold a gapless part of the source's history that ends
//! with `last`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::{FaultLatch, LogError, io_error};
use super::format::Identity;
use super::log::{Growth, LOG_BYTES_MAX, Log, wanted_bytes};
use super::open::{LogName, OpenFiles};
use super::reader::LogReader;
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::units::ids::{HubId, RingId, SourceId};
use crate::units::numbers::{CpNumber, Epoch, LogPosition};

/// What became of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appended {
    /// It stands in the log of its CP at this position and takes that many bytes of room.
    Written { at: LogPosition, bytes: u64 },
    /// The log had it already, or its CP is applied: nothing was written.
    Repeated,
}

/// A file in the source's directory whose header cannot be read.
#[derive(Debug)]
pub(super) struct Unreadable {
    pub(super) path: PathBuf,
    pub(super) error: LogError,
}

/// What a store shares with its sources.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) open: Arc<OpenFiles>,
    pub(super) hub: HubId,
    pub(super) growth: Growth,
    pub(super) limit_bytes: u64,
    /// Recovery writes again what it keeps; a test leaves it out to show that it is needed.
    pub(super) rewrite: bool,
}

/// Stands for the bytes of a source that was not recovered.
const NOT_RECOVERED: u64 = u64::MAX;

/// A source in the store: its latch and its bytes can be asked without its lock, which is held
/// during writes.
#[derive(Debug)]
pub(super) struct SourceCell {
    pub(super) source: SourceId,
    pub(super) fault: Arc<FaultLatch>,
    logs: Mutex<Option<SourceLogs>>,
    /// What [`SourceLogs::bytes`] was when the lock was last given back.
    bytes: AtomicU64,
    /// CP of the newest log then, 0 without one.
    newest: AtomicU32,
}

impl SourceCell {
    pub(super) fn new(source: SourceId) -> Self {
        let fault = Arc::new(FaultLatch::new(source));
        let (bytes, newest) = (AtomicU64::new(NOT_RECOVERED), AtomicU32::new(0));
        Self { source, fault, logs: Mutex::default(), bytes, newest }
    }

    /// Bytes of records in all logs, as far as told; `None` before recovery. Does not wait.
    pub(super) fn bytes(&self) -> Option<u64> {
        Some(self.bytes.load(Ordering::Acquire)).filter(|bytes| *bytes != NOT_RECOVERED)
    }

    /// CP of the newest log. Does not wait.
    pub(super) fn newest_cp(&self) -> Option<CpNumber> {
        Some(self.newest.load(Ordering::Acquire)).filter(|cp| *cp > 0).map(CpNumber)
    }

    /// Tells everybody how the logs stand now.
    pub(super) fn tell(&self, logs: &SourceLogs) {
        self.newest.store(logs.newest_cp().map_or(0, |cp| cp.0), Ordering::Release);
        self.bytes.store(logs.bytes(), Ordering::Release);
    }

    /// Begins without looking at what is there.
    pub(super) fn begin(&self, logs: SourceLogs) {
        self.tell(&logs);
        *self.lock() = Some(logs);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Option<SourceLogs>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on the recovered logs under the source's lock.
    pub(super) fn with<T>(
        &self,
        work: impl FnOnce(&mut SourceLogs) -> Result<T, LogError>,
    ) -> Result<T, LogError> {
        match &mut *self.lock() {
            Some(logs) => {
                let done = work(logs);
                self.tell(logs);
                done
            }
            None => Err(LogError::NotRecovered { source_id: self.source }),
        }
    }
}

/// The logs of one source.
#[derive(Debug)]
pub(super) struct SourceLogs {
    pub(super) source: SourceId,
    pub(super) dir: PathBuf,
    pub(super) fault: Arc<FaultLatch>,
    pub(super) logs: BTreeMap<CpNumber, Log>,
    pub(super) unreadable: BTreeMap<CpNumber, Unreadable>,
    /// Place behind everything sound; `None` when nothing is known and anything may come next.
    pub(super) last: Option<Place>,
    /// Of what is behind a pass: the place that it joins.
    pub(super) base: Option<Place>,
    /// Logs up to this CP are applied and gone.
    pub(super) dropped: CpNumber,
    /// Counts cuts: what a sync measured before one means nothing after it.
    pub(super) cuts: u64,
    /// Counts names made, and how many of them are durable.
    pub(super) names_made: u64,
    pub(super) names_durable: u64,
}

/// How a transfer stands to the logs.
enum Joins {
    Next,
    Repeated,
    /// Continues the chain within a CP that is applied: noted, not kept (R15).
    Late,
}

impl SourceLogs {
    /// Those of a directory in which nothing is, as far as is known.
    pub(super) fn new(cell: &SourceCell, dir: PathBuf, dropped: CpNumber) -> Self {
        Self {
            source: cell.source,
            dir,
            fault: Arc::clone(&cell.fault),
            logs: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            last: None,
            base: None,
            dropped,
            cuts: 0,
            names_made: 0,
            names_durable: 0,
        }
    }

    pub(super) fn append(
        &mut self,
        shared: &Shared,
        epoch: Epoch,
        transfer: &Transfer,
    ) -> Result<Appended, LogError> {
        self.fault.check()?;
        match self.joins(transfer)? {
            Joins::Next => {}
            Joins::Repeated => return Ok(Appended::Repeated),
            Joins::Late => {
                self.last = Some(transfer.place());
                return Ok(Appended::Repeated);
            }
        }
        let bytes = wanted_bytes(transfer);
        self.check_room(shared, transfer.header().cp, bytes)?;
        let fault = Arc::clone(&self.fault);
        fault
            .latching(self.write(shared, epoch, transfer).map(|at| Appended::Written { at, bytes }))
    }

    fn write(
        &mut self,
        shared: &Shared,
        epoch: Epoch,
        transfer: &Transfer,
    ) -> Result<LogPosition, LogError> {
        let cp = transfer.header().cp;
        if !self.logs.contains_key(&cp) {
            let log = self.create(shared, epoch, transfer)?;
            self.logs.insert(cp, log);
        }
        let Some(log) = self.logs.get_mut(&cp) else {
            return Err(LogError::NoLog { source_id: self.source, cp });
        };
        let at = log.end;
        log.append(&shared.open, &shared.growth, epoch, transfer)?;
        self.last = Some(log.last);
        Ok(at)
    }

    /// Has the kernel begin to write what of its logs is not synced, where that is much.
    pub(super) fn begin_writeback(&mut self, shared: &Shared, least: u64) -> Result<(), LogError> {
        self.fault.check()?;
        let mut unsynced = self.logs.values_mut().filter(|log| !log.is_synced());
        unsynced.try_for_each(|log| log.begin_writeback(&shared.open, least))
    }

    fn create(
        &mut self,
        shared: &Shared,
        epoch: Epoch,
        transfer: &Transfer,
    ) -> Result<Log, LogError> {
        let header = transfer.header();
        let files = shared.open.files();
        let dir_text: Arc<str> = self.dir.to_string_lossy().into();
        self.names_made += 1;
        shared.open.new_names.begin(&self.dir, self.names_made, &self.fault);
        files.create_dir(&self.dir).map_err(io_error(&dir_text, "create directory"))?;
        let log = RingId::random().map_err(|error| LogError::Random(error.to_string().into()))?;
        let start = self.last.unwrap_or_else(|| before(transfer));
        let (source, hub, cp) = (self.source, shared.hub, header.cp);
        // An empty log, left by a failed first append, may vanish without a trace.
        let filled = self.logs.values().rev().find(|log| log.end.0 > 0);
        let after = filled.map_or(CpNumber(0), |log| log.name.identity.cp);
        let identity = Identity { log, source, hub, cp, epoch, start, after };
        Log::create(&shared.open, Arc::new(self.name(identity)))
    }

    pub(super) fn name(&self, identity: Identity) -> LogName {
        let path = self.dir.join(file_name(identity.cp));
        let text = path.to_string_lossy().into();
        LogName { path, text, identity, fault: Arc::clone(&self.fault) }
    }

    fn joins(&self, transfer: &Transfer) -> Result<Joins, LogError> {
        let header = transfer.header();
        let (id, source_id) = (header.id, self.source);
        let conflict = |what: &str| LogError::Conflict { source_id, id, what: what.into() };
        let Some(last) = self.last else {
            // Nothing is known of what came before: anything may begin the chain.
            return Ok(if header.cp <= self.dropped { Joins::Late } else { Joins::Next });
        };
        if id == last.transfer && transfer.place() != last {
            return Err(conflict("the log ends with another history under the same id"));
        }
        if id <= last.transfer {
            return Ok(Joins::Repeated);
        }
        if header.previous != last.transfer {
            let (previous, last) = (header.previous, last.transfer);
            return Err(LogError::Gap { source_id, id, previous, last });
        }
        if header.hash_before != last.hash || before(transfer).sequence != last.sequence {
            return Err(conflict("it continues another history"));
        }
        if self.newest_cp().is_some_and(|newest| header.cp < newest) {
            return Err(conflict("its CP is older than the log's newest"));
        }
        Ok(if header.cp <= self.dropped { Joins::Late } else { Joins::Next })
    }

    fn newest_cp(&self) -> Option<CpNumber> {
        self.logs.last_key_value().map(|(cp, _)| *cp)
    }

    fn check_room(&self, shared: &Shared, cp: CpNumber, wanted_bytes: u64) -> Result<(), LogError> {
        let in_file = self.logs.get(&cp).map_or(LOG_BYTES_MAX, |log| LOG_BYTES_MAX - log.end.0);
        let room_bytes = shared.limit_bytes.saturating_sub(self.bytes()).min(in_file);
        if wanted_bytes > room_bytes {
            return Err(LogError::Full { source_id: self.source, wanted_bytes, room_bytes });
        }
        Ok(())
    }

    /// Bytes of records in all logs.
    pub(super) fn bytes(&self) -> u64 {
        self.logs.values().map(|log| log.extent).sum()
    }

    /// Everything up to here is durable and durably known to be, or applied and dropped.
    pub(super) fn synced(&self) -> Place {
        let unreadable = self.unreadable.first_key_value().map(|(cp, _)| *cp);
        let mut place = None;
        for (cp, log) in &self.logs {
            if unreadable.is_some_and(|bad| bad < *cp) {
                return place.unwrap_or_default();
            }
            if !log.is_synced() {
                return log.slot.place;
            }
            place = Some(log.last);
            if log.damage.is_some() {
                return log.last;
            }
        }
        place.or(self.last).unwrap_or_default()
    }

    /// What a reader of that log starts from.
    pub(super) fn reader_of(&self, cp: CpNumber) -> Result<ReaderStart, LogError> {
        if let Some(file) = self.unreadable.get(&cp) {
            return Err(file.error.clone());
        }
        let log = self.logs.get(&cp).ok_or(LogError::NoLog { source_id: self.source, cp })?;
        Ok(ReaderStart {
            name: Arc::clone(&log.name),
            extent: log.extent,
            last: log.last,
            damage: log.damage.clone(),
        })
    }
}

/// A log at one moment, for a reader that is built without the source's lock.
#[derive(Debug)]
pub(super) struct ReaderStart {
    name: Arc<LogName>,
    extent: u64,
    last: Place,
    damage: Option<LogError>,
}

impl ReaderStart {
    pub(super) fn run(self, open: Arc<OpenFiles>) -> Result<LogReader, LogError> {
        LogReader::build(open, self.name, self.extent, self.last, self.damage)
    }
}

/// The place before a transfer, as far as it says it itself.
fn before(transfer: &Transfer) -> Place {
    let header = transfer.header();
    let mut sequence = header.first_sequence;
    // A first sequence of 0 is refused when a transfer is parsed.
    sequence.0 = sequence.0.saturating_sub(1);
    Place { transfer: header.previous, sequence, hash: header.hash_before }
}

/// Name of the log of a CP.
pub(super) fn file_name(cp: CpNumber) -> String {
    format!("cp-{:010}.log", cp.0)
}
