//! Reads a source's directory after a start.
//!
//! 1. A log with cp <= applied is deleted, never replayed: its drop was not made durable.
//! 2. Each header must be ours (hub, source, CP, version): another is refused by name, and
//!    nothing is touched.
//!    So is a record that says of itself, in a later version, that it lies where it does: nothing is cut.
//! 3. Only the records behind `synced` are read, each checked whole and against the chain. The
//!    first that is not sound ends the log: if no later record says that it was durable (R3), the
//!    rest is a torn tail, still in the ring, and is cut. Else it is damage.
//! 4. Each log must begin where the one before it ends, and the log it was made after must be
//!    there or applied: a power cut may have lost a whole file. A log that does not join, with
//!    nothing synced in it or behind it, is torn as well and is deleted: the ring has it. A sync
//!    of a source covers its older logs before a newer one says `synced`, so else it is damage.
//!
//! 5. What is kept and not known synced is written again, the same bytes to the same place, header
//!    included, and counts as unsynced. After a mere kill it may be in the page cache only; and
//!    the page cache may hold it for good: when a writeback has failed, the kernel shows the bytes,
//!    takes their pages for clean, and has told of the error once, so that a sync alone would
//!    succeed and do nothing (invariant 7). Each record is written as it was checked, not read a
//!    second time: between two reads the kernel may drop such a page and show the medium's.
//!
//! So a restart mends a source whose log could not be written or synced, once the cause is gone:
//! what is sound is written again, what is not is cut, and the ring has it still, since it lets
//! go of nothing that was not synced (R11).
//!
//! Damage is not mended by writing. It latches the source: nothing is appended behind it until a
//! cut, a reset or the CP's end removes it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::behind::remove_left;
use super::directory::read_files;
use super::error::{FaultKind, LogError};
use super::format::{HEADER_BYTES_U64, Identity};
use super::log::Log;
use super::removal::remove_path;
use super::scan::{Found, RecordError, Scanner, check_joins};
use super::source::{Shared, SourceCell, SourceLogs, Unreadable, file_name};
use crate::record::marks::Place;
use crate::units::numbers::{CpNumber, LogPosition};

/// What recovery found of one source.
#[derive(Debug, Clone, Default)]
pub struct RecoveredLogs {
    /// One for each log that is kept, in CP order.
    pub logs: Vec<RecoveredLog>,
    /// Logs of applied CPs that were deleted.
    pub deleted: u32,
    /// Logs that were all torn tail, or began behind one, and were deleted: the ring has them.
    pub torn: u32,
    /// Place behind everything that is sound and without gap, [`Place::default`] if there is
    /// damage and nothing sound before it; `None` without any log.
    pub last: Option<Place>,
}

/// What recovery found of one log.
#[derive(Debug, Clone)]
pub struct RecoveredLog {
    /// The CP.
    pub cp: CpNumber,
    /// Place before its first transfer.
    pub start: Place,
    /// Place behind its last sound transfer; equal to `start` without one.
    pub last: Place,
    /// How far it was synced, as its header says.
    pub synced: Place,
    /// Bytes of sound records.
    pub bytes: u64,
    /// Bytes of a torn tail that were cut.
    pub cut_bytes: u64,
    /// Why acknowledged history is missing, if it is.
    pub damage: Option<LogError>,
}

impl RecoveredLogs {
    /// The first damage, if there is any.
    pub fn damage(&self) -> Option<&LogError> {
        self.logs.iter().find_map(|log| log.damage.as_ref())
    }
}

/// Reads the directory of the source into `cell`.
pub(super) fn recover(
    shared: &Shared,
    cell: &SourceCell,
    dir: PathBuf,
    applied: CpNumber,
) -> Result<RecoveredLogs, LogError> {
    let mut held = cell.lock();
    if let Some(logs) = &mut *held {
        let dropped = logs.drop_through(shared, applied);
        cell.tell(logs);
        dropped?;
        return Ok(describe(logs, RecoveredLogs::default()));
    }
    // A recovery that failed on the way may have left its reason.
    cell.fault.clear();
    let mut logs = SourceLogs::new(cell, dir, applied);
    let found = read_files(shared, &mut logs, applied)?;
    remove_left(shared, &logs.dir)?;
    let mut report = RecoveredLogs { deleted: found.deleted, ..RecoveredLogs::default() };
    remove_torn(shared, &mut logs, found.torn)?;
    report.torn = check_chain(shared, &mut logs)? + remove_empty(shared, &mut logs)?;
    let mut cut = BTreeMap::new();
    for log in logs.logs.values_mut() {
        let bytes = finish(shared, log)?;
        cut.insert(log.name.identity.cp, bytes);
    }
    if logs.logs.values().any(|log| log.slot.synced.0 == 0 || !log.is_synced()) {
        // Their names may be in memory only, too.
        logs.names_made = 1;
        shared.open.new_names.begin(&logs.dir, logs.names_made, &logs.fault);
    }
    logs.last = sound_end(&logs);
    let mut report = describe(&logs, report);
    for log in &mut report.logs {
        log.cut_bytes = cut.get(&log.cp).copied().unwrap_or(0);
    }
    if let Some(damage) = report.damage() {
        cell.fault.set(FaultKind::Damage, damage);
    }
    cell.tell(&logs);
    *held = Some(logs);
    Ok(report)
}

/// Place behind everything that comes before the first damage.
fn sound_end(logs: &SourceLogs) -> Option<Place> {
    let unreadable = logs.unreadable.keys().next();
    let before_it = |log: &&Log| unreadable.is_none_or(|bad| log.name.identity.cp < *bad);
    let mut end = unreadable.map(|_| Place::default());
    for log in logs.logs.values().take_while(before_it) {
        end = Some(log.last);
        if log.damage.is_some() {
            break;
        }
    }
    end
}

fn describe(logs: &SourceLogs, mut report: RecoveredLogs) -> RecoveredLogs {
    report.last = logs.last;
    for log in logs.logs.values() {
        report.logs.push(RecoveredLog {
            cp: log.name.identity.cp,
            start: log.name.identity.start,
            last: log.last,
            synced: log.slot.place,
            bytes: log.end.0,
            cut_bytes: 0,
            damage: log.damage.clone(),
        });
    }
    for (cp, file) in &logs.unreadable {
        // Nothing is known of its place: it stands where the log before it ends.
        let before = report.logs.iter().rev().find(|log| log.cp < *cp);
        let place = before.map_or_else(Place::default, |log| log.last);
        let damage = Some(file.error.clone());
        let (start, last, synced) = (place, place, place);
        let log = RecoveredLog { cp: *cp, start, last, synced, bytes: 0, cut_bytes: 0, damage };
        let at = report.logs.partition_point(|log| log.cp < *cp);
        report.logs.insert(at, log);
    }
    report
}

/// A file without a header was never synced, so nothing newer may have been.
fn remove_torn(
    shared: &Shared,
    logs: &mut SourceLogs,
    torn: Vec<CpNumber>,
) -> Result<(), LogError> {
    let removed = !torn.is_empty();
    for cp in torn {
        let path = logs.dir.join(file_name(cp));
        if logs.logs.range(cp..).any(|(_, log)| log.slot.synced.0 > 0) {
            let file = path.to_string_lossy().into();
            let what = "the header is missing, yet a newer log is synced".into();
            let error = LogError::Corrupt { file, offset: 0, what };
            logs.unreadable.insert(cp, Unreadable { path, error });
        } else {
            remove_path(&shared.open, &path)?;
        }
    }
    if removed { shared.open.sync_dir(&logs.dir) } else { Ok(()) }
}

/// Reads the tails in order and holds each log to the one before it. Returns how many logs were
/// torn off and deleted.
fn check_chain(shared: &Shared, logs: &mut SourceLogs) -> Result<u32, LogError> {
    let cps: Vec<CpNumber> = logs.logs.keys().copied().collect();
    let mut before: Option<Place> = None;
    for cp in cps {
        let is_synced = logs.logs.range(cp..).any(|(_, log)| log.slot.synced.0 > 0);
        // Behind damage nothing is held to a chain, and nothing is deleted.
        let behind_damage = logs.unreadable.range(..cp).next().is_some()
            || logs.logs.range(..cp).any(|(_, log)| log.damage.is_some());
        let Some(log) = logs.logs.get(&cp) else { continue };
        match joins(logs, log, before).filter(|_| !behind_damage) {
            None => {}
            Some(_) if !is_synced => return tear_off(shared, logs, cp),
            Some(what) => {
                let error = log.name.corrupt(0, what);
                let path = log.name.path.clone();
                logs.logs.remove(&cp);
                logs.unreadable.insert(cp, Unreadable { path, error });
                continue;
            }
        }
        if let Some(log) = logs.logs.get_mut(&cp) {
            read_tail(shared, log)?;
            before = Some(log.last);
        }
    }
    Ok(0)
}

/// Why a log does not stand where it was made, if so. Nobody knows here what the first log's
/// place should be: whoever knows the applied CP's compares it with `start`.
fn joins(logs: &SourceLogs, log: &Log, before: Option<Place>) -> Option<String> {
    let Identity { start, after, .. } = log.name.identity;
    if after > logs.dropped && !logs.logs.contains_key(&after) {
        return Some(format!("it was made behind the log of CP {after}, which is missing"));
    }
    let met = before.filter(|before| *before != start)?;
    let (wanted, met) = (start.transfer, met.transfer);
    Some(format!("it was made behind transfer {wanted}, the log before it ends with {met}"))
}

/// Deletes the logs from `cp` on, newest first.
fn tear_off(shared: &Shared, logs: &mut SourceLogs, cp: CpNumber) -> Result<u32, LogError> {
    let mut torn = 0;
    while let Some((&newest, log)) = logs.logs.last_key_value().filter(|(at, _)| **at >= cp) {
        shared.open.discard(log.name.identity.log);
        remove_path(&shared.open, &log.name.path)?;
        logs.logs.remove(&newest);
        torn += 1;
    }
    shared.open.sync_dir(&logs.dir)?;
    Ok(torn)
}

/// Deletes logs of which a torn tail left nothing: a log that stays has something in it.
fn remove_empty(shared: &Shared, logs: &mut SourceLogs) -> Result<u32, LogError> {
    let empty = |log: &&Log| log.end.0 == 0 && log.slot.synced.0 == 0 && log.damage.is_none();
    let names: Vec<_> = logs.logs.values().filter(empty).map(|log| Arc::clone(&log.name)).collect();
    for name in &names {
        shared.open.discard(name.identity.log);
        remove_path(&shared.open, &name.path)?;
        logs.logs.remove(&name.identity.cp);
    }
    if !names.is_empty() {
        shared.open.sync_dir(&logs.dir)?;
    }
    Ok(u32::try_from(names.len()).unwrap_or(u32::MAX))
}

/// Reads what lies behind the synced place and sets `end` and `last` behind the last sound
/// record, writing each again.
fn read_tail(shared: &Shared, log: &mut Log) -> Result<(), LogError> {
    let name = Arc::clone(&log.name);
    if log.extent < log.slot.synced.0 {
        // Find what is left of the synced part; the rest of the file is not there to be read.
        let what = format!(
            "the file ends here, {} bytes of records are known to be synced",
            log.slot.synced
        );
        let damage = name.corrupt(HEADER_BYTES_U64 + log.extent, what);
        log.damage.get_or_insert(damage);
        log.end = LogPosition(0);
        log.last = name.identity.start;
    }
    let mut scanner = Scanner::new(&shared.open, &name, log.extent);
    loop {
        let bad = match scanner.record(log.end)? {
            Found::End => return Ok(()),
            Found::Bad(bad) => bad,
            Found::Record((head, transfer)) => match check_joins(&log.last, &head.transfer) {
                Ok(()) => {
                    log.take_again(shared, &head, &transfer)?;
                    continue;
                }
                Err(bad) => bad,
            },
        };
        if log.damage.is_none() && scanner.was_durable(log.end)? {
            log.damage = Some(damaged(log, &bad));
        }
        return Ok(());
    }
}

fn damaged(log: &Log, bad: &RecordError) -> LogError {
    let what = format!("{bad}; a later record says that this was durable");
    log.name.corrupt(HEADER_BYTES_U64 + log.end.0, what)
}

/// Writes the header of a log again that is not known synced, and cuts a torn tail.
fn finish(shared: &Shared, log: &mut Log) -> Result<u64, LogError> {
    if log.damage.is_some() {
        return Ok(0);
    }
    if !log.is_synced() {
        log.write_header_again(shared)?;
    }
    let cut = log.extent - log.end.0;
    if cut > 0 {
        let (end, last) = (log.end, log.last);
        log.cut(&shared.open, end, last)?;
    }
    Ok(cut)
}
