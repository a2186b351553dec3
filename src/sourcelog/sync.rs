//! Makes logs durable: many sources with one `syncfs`, few with an fdatasync each.
//!
//! Called by [`super::LogStore::sync`], one sync at a time; no source is locked while the kernel
//! works, so appends go on. In order:
//!
//! 1. note for each source where its logs end;
//! 2. make data and names durable up to there;
//! 3. write into each log's header that it is synced up to there;
//! 4. make those headers durable, and only then say so.
//!
//! A power cut before 4 leaves a log that is synced further than its header says: its tail is
//! read and found sound. A header never says more than the medium holds, and says it for all
//! older logs of its source as well, because 2 covers them all.
//!
//! If `syncfs` reports an error, which may be another file's, each file is synced through the
//! descriptor it was written by, which reports its own errors exactly, and each directory with new
//! names through its own fsync: those sources are faulted, the others go on. Each: also those of
//! sources that nobody asked for now, because `syncfs` reports an error once, and the next one would
//! cover them with a success.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::LogError;
use super::format::Slot;
use super::open::{LogName, OpenFiles, SYNC_EACH_MAX};
use super::source::{Shared, SourceCell, SourceLogs};
use crate::record::marks::Place;
use crate::units::ids::SourceId;
use crate::units::numbers::LogPosition;

/// A log and how far it shall be durable.
#[derive(Debug)]
struct Target {
    name: Arc<LogName>,
    upto: LogPosition,
    place: Place,
    /// The header's slot that says so, once written.
    slot: Option<Slot>,
}

/// What one source wants of a sync.
#[derive(Debug)]
struct Plan<'a> {
    cell: &'a SourceCell,
    targets: Vec<Target>,
    cuts: u64,
    /// The source's directory has new names, this many so far.
    new_names: Option<(PathBuf, u64)>,
    failed: Option<LogError>,
}

/// Makes everything appended before the call durable. The result of each source is the place up
/// to which it is.
pub(super) fn sync(
    shared: &Shared,
    root: &Path,
    cells: &[(SourceId, Option<Arc<SourceCell>>)],
) -> Vec<(SourceId, Result<Place, LogError>)> {
    let mut plans: Vec<Option<Plan<'_>>> =
        cells.iter().map(|(_, cell)| Plan::make(cell.as_deref()?)).collect();
    sync_data(shared, root, &mut plans);
    for plan in plans.iter_mut().flatten() {
        plan.names_are_durable(&shared.open);
        plan.write_slots(&shared.open);
    }
    sync_slots(shared, &mut plans);
    let finish = |(plan, (source, _)): (Option<Plan<'_>>, &(SourceId, _))| {
        let not_recovered = LogError::NotRecovered { source_id: *source };
        (*source, plan.map_or(Err(not_recovered), Plan::finish))
    };
    plans.into_iter().zip(cells).map(finish).collect()
}

fn sync_data(shared: &Shared, root: &Path, plans: &mut [Option<Plan<'_>>]) {
    let open = &shared.open;
    let dirty =
        |plan: &Plan<'_>| plan.names().filter(|name| open.is_dirty(name.identity.log)).count();
    let count: usize = plans
        .iter()
        .flatten()
        .map(|plan| dirty(plan) + usize::from(plan.new_names.is_some()))
        .sum();
    if count > SYNC_EACH_MAX && open.sync_all() {
        return;
    }
    plans.iter_mut().flatten().for_each(|plan| plan.sync_files(open));
    let wants_root = plans.iter().flatten().any(|plan| plan.new_names.is_some());
    if !wants_root {
        return;
    }
    let _one = open.one_at_a_time();
    let root_synced = open.sync_dir(root);
    for plan in plans.iter_mut().flatten() {
        if let Some((dir, _)) = &plan.new_names {
            let synced = root_synced.clone().and_then(|()| open.sync_dir(dir));
            plan.note(plan.cell.fault.latching(synced));
        }
    }
}

fn sync_slots(shared: &Shared, plans: &mut [Option<Plan<'_>>]) {
    let written = |plan: &Plan<'_>| plan.targets.iter().filter(|t| t.slot.is_some()).count();
    let count: usize = plans.iter().flatten().map(written).sum();
    if count > SYNC_EACH_MAX && shared.open.sync_all() {
        return;
    }
    for plan in plans.iter_mut().flatten() {
        plan.sync_files(&shared.open);
    }
}

impl<'a> Plan<'a> {
    /// `None` if the source was not recovered.
    fn make(cell: &'a SourceCell) -> Option<Self> {
        let held = cell.lock();
        let logs = held.as_ref()?;
        let failed = cell.fault.check().err();
        let mut targets = Vec::new();
        if failed.is_none() {
            for log in logs.logs.values().filter(|log| !log.is_synced()) {
                let (upto, place) = (log.end, log.last);
                targets.push(Target { name: Arc::clone(&log.name), upto, place, slot: None });
            }
        }
        let new_names = (logs.names_durable < logs.names_made && !targets.is_empty())
            .then(|| (logs.dir.clone(), logs.names_made));
        Some(Self { cell, targets, cuts: logs.cuts, new_names, failed })
    }

    fn names(&self) -> impl Iterator<Item = &Arc<LogName>> {
        self.targets.iter().map(|target| &target.name)
    }

    fn note(&mut self, result: Result<(), LogError>) {
        if let Err(error) = result {
            self.failed.get_or_insert(error);
        }
    }

    fn sync_files(&mut self, open: &OpenFiles) {
        if self.failed.is_some() {
            return;
        }
        let first_error = self.names().find_map(|name| open.sync_one(name).err());
        self.note(first_error.map_or(Ok(()), Err));
    }

    /// A source that was faulted meanwhile may be so for a name of its own.
    fn names_are_durable(&self, open: &OpenFiles) {
        if self.cell.fault.check_io().is_err() {
            return;
        }
        if let (None, Some((dir, names)), Some(logs)) =
            (&self.failed, &self.new_names, &mut *self.cell.lock())
        {
            logs.names_durable = logs.names_durable.max(*names);
            open.new_names.are_durable(dir, *names);
        }
    }

    /// Writes the slots of all targets that are still there. A file that had to be closed while
    /// it was dirty was synced then; if that failed the source is faulted, and stops here.
    fn write_slots(&mut self, open: &OpenFiles) {
        let cell = self.cell;
        if self.failed.is_none() {
            self.failed = cell.fault.check().err();
        }
        let (None, Some(logs)) = (&self.failed, &mut *cell.lock()) else { return };
        if logs.cuts != self.cuts {
            return;
        }
        for target in &mut self.targets {
            let Some(log) = find(logs, &target.name) else { continue };
            match log.write_slot(open, target.upto, target.place) {
                Ok(slot) => target.slot = Some(slot),
                Err(error) => {
                    cell.fault.set(super::error::FaultKind::Io, &error);
                    self.failed = Some(error);
                    return;
                }
            }
        }
    }

    fn finish(mut self) -> Result<Place, LogError> {
        if self.failed.is_none() {
            self.failed = self.cell.fault.check().err();
        }
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.cell.with(|logs| {
            if logs.cuts == self.cuts {
                for target in &self.targets {
                    if let (Some(slot), Some(log)) = (target.slot, find(logs, &target.name)) {
                        log.slot_is_durable(slot);
                    }
                }
            }
            Ok(logs.synced())
        })
    }
}

fn find<'a>(logs: &'a mut SourceLogs, name: &LogName) -> Option<&'a mut super::log::Log> {
    let log = logs.logs.get_mut(&name.identity.cp)?;
    (log.name.identity.log == name.identity.log).then_some(log)
}
