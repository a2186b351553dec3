//! Publishing: how CPs and rows become durable and visible, many in one commit.
//!
//! Whoever changes the catalog queues the change. The first one to find nobody at work takes
//! all that is queued and commits it; while it works, the next gather. One commit is:
//!
//! 1. `flush`: every block that the new roots reach is on the medium
//! 2. one transaction: rows, history, what changed in the free map
//! 3. memory: the rows are visible, freed blocks are free, kept, or stand in a pin's deadlist
//!
//! A crash before the end of 2 leaves the old roots and a free map that fits them; after it, the
//! new ones. A change that is refused (old epoch, full catalog, moved base) is left out and does
//! not hold up the others. A failed flush or transaction latches the pool and fails them all.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::limits::POOL_GROUP_CHANGES_MAX;
use crate::units::hash::{Root, StreamHash};
use crate::units::ids::SourceId;
use crate::units::machine::Bell;
use crate::units::names::KeptName;
use crate::units::numbers::{ByteCount, CpNumber, Epoch, Generation, SequenceNumber, VolumeNumber};

use super::blockset::{BlockSet, FreedBlocks};
use super::error::PoolError;
use super::kept::{DropOrder, Dropped, Keep};
use super::kept_row::KeptRow;
use super::mirror::{Mirror, Staged};
use super::pointer::{TreeRoot, VolumeKey};
use super::rows::{HistoryRow, SourceRow, VolumeRow, check_extension, history_rows};
use super::seed::AdoptOrder;
use super::space::{MapChanges, SpaceMap};
use super::store::FreeMapUpdate;
use super::work::{GiveUp, KeepOrder};
use super::write_set::{Settled, WriteSet};
use super::{Pool, State};

/// Everything that one source's CP publishes.
#[derive(Debug)]
pub struct Publish {
    /// The blocks it is made of.
    pub write_set: WriteSet,
    /// Whose CP.
    pub source: SourceId,
    /// Its number: above the source's applied one.
    pub cp: CpNumber,
    /// The last entry it holds.
    pub sequence: SequenceNumber,
    /// Stream hash there.
    pub stream_hash: StreamHash,
    /// The epoch it belongs to: the catalog's, or it is refused (R2).
    pub epoch: Epoch,
    /// The generation to record, if it has changed.
    pub generation: Option<Generation>,
    /// The extension to record, if it has changed.
    pub extension: Option<Vec<u8>>,
    /// The new trees of the volumes that changed.
    pub volumes: Vec<(VolumeNumber, TreeRoot)>,
}

/// A CP is durable and visible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Its number.
    pub cp: CpNumber,
    /// The roots of all volumes of the source, by number.
    pub roots: Vec<(VolumeNumber, Root)>,
    /// Which commit of the pool it was in; CPs of one commit have the same.
    pub transaction: u64,
}

/// Changes a row inside the commit.
pub(super) type RowChange = Box<dyn FnOnce(&mut SourceRow) + Send>;

/// One change of the catalog.
pub(super) enum Change {
    Publish(Box<Publish>, Option<Keep>),
    Keep(SourceId, KeptName),
    DropKept(Box<DropOrder>),
    KeepWork(Box<KeepOrder>),
    GiveUp(GiveUp),
    AdoptSeeds(AdoptOrder),
    PutSource(Box<SourceRow>),
    UpdateSource(SourceId, RowChange),
    RemoveSource(SourceId),
    PutVolume(Box<VolumeRow>),
    GrowVolume(VolumeKey, ByteCount),
    RemoveVolume(VolumeKey),
    PutNote(String, Vec<u8>),
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Publish(..) => "Publish",
            Self::Keep(..) => "Keep",
            Self::DropKept(_) => "DropKept",
            Self::KeepWork(_) => "KeepWork",
            Self::GiveUp(_) => "GiveUp",
            Self::AdoptSeeds(_) => "AdoptSeeds",
            Self::PutSource(_) => "PutSource",
            Self::UpdateSource(..) => "UpdateSource",
            Self::RemoveSource(_) => "RemoveSource",
            Self::PutVolume(_) => "PutVolume",
            Self::GrowVolume(..) => "GrowVolume",
            Self::RemoveVolume(_) => "RemoveVolume",
            Self::PutNote(..) => "PutNote",
        })
    }
}

/// What became of a change.
#[derive(Debug, Clone)]
pub(super) enum Done {
    Published(Published),
    Kept(Arc<KeptRow>),
    Dropped(Dropped),
    Row,
}

type Outcome = Result<Done, PoolError>;
type Slot = Arc<Mutex<Option<Outcome>>>;

#[derive(Debug, Default)]
struct Queue {
    waiting: Vec<(Change, Slot)>,
    running: bool,
}

/// Where changes gather.
#[derive(Debug, Default)]
pub(super) struct Committer {
    queue: Mutex<Queue>,
    turn: Bell,
    /// Held through a commit: whoever has it sees no half of one.
    committing: Mutex<()>,
}

/// Answers everybody of a batch if the thread that commits it panics.
struct Batch<'a> {
    committer: &'a Committer,
    slots: Vec<Slot>,
    outcomes: Option<Vec<Outcome>>,
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let outcomes = self.outcomes.take();
        let outcomes = outcomes.unwrap_or_else(|| vec![Err(PoolError::Poisoned); self.slots.len()]);
        for (slot, outcome) in self.slots.iter().zip(outcomes) {
            if let Ok(mut slot) = slot.lock() {
                *slot = Some(outcome);
            }
        }
        if let Ok(mut queue) = self.committer.queue.lock() {
            queue.running = false;
        }
        self.committer.turn.notify_all();
    }
}

impl Committer {
    fn queue(&self) -> Result<MutexGuard<'_, Queue>, PoolError> {
        self.queue.lock().map_err(|_| PoolError::Poisoned)
    }

    fn wait<'a>(
        &'a self,
        queue: MutexGuard<'a, Queue>,
    ) -> Result<MutexGuard<'a, Queue>, PoolError> {
        self.turn.wait(&self.queue, queue).map_err(|_| PoolError::Poisoned)
    }

    /// Waits for the end of a commit under way and keeps the next from beginning.
    pub(super) fn between_commits(&self) -> Result<MutexGuard<'_, ()>, PoolError> {
        self.committing.lock().map_err(|_| PoolError::Poisoned)
    }

    /// Changes that gather now.
    pub(super) fn waiting(&self) -> usize {
        self.queue.lock().map_or(0, |queue| queue.waiting.len())
    }

    /// Whether a batch is being committed; what comes now waits for the next.
    #[cfg(test)]
    pub(super) fn is_running(&self) -> bool {
        self.queue.lock().is_ok_and(|queue| queue.running)
    }

    /// Commits a change, alone or with others, and returns what became of it.
    pub(super) fn submit(&self, pool: &Pool, change: Change) -> Outcome {
        let slot = Slot::default();
        let mut queue = self.queue()?;
        while queue.waiting.len() >= POOL_GROUP_CHANGES_MAX {
            queue = self.wait(queue)?;
        }
        queue.waiting.push((change, Arc::clone(&slot)));
        loop {
            if let Some(outcome) = slot.lock().map_err(|_| PoolError::Poisoned)?.take() {
                return outcome;
            }
            if queue.running {
                queue = self.wait(queue)?;
                continue;
            }
            queue.running = true;
            let (changes, slots) = std::mem::take(&mut queue.waiting).into_iter().unzip();
            drop(queue);
            let mut batch = Batch { committer: self, slots, outcomes: None };
            batch.outcomes = Some(self.commit(pool, changes));
            drop(batch);
            queue = self.queue()?;
        }
    }

    fn commit(&self, pool: &Pool, changes: Vec<Change>) -> Vec<Outcome> {
        let count = changes.len();
        let committed = self.between_commits().and_then(|_alone| {
            pool.check_latch()?;
            pool.commit(changes).map_err(|error| pool.latch(error))
        });
        committed.unwrap_or_else(|error| vec![Err(error); count])
    }
}

/// A batch as it is being made.
#[derive(Default)]
struct Making {
    staged: Staged,
    changes: MapChanges,
    /// Each with the newest kept CP at its time.
    settled: Vec<(Settled, Option<CpNumber>)>,
    /// What dropped kept CPs give back.
    dropped: Vec<BTreeMap<VolumeKey, FreedBlocks>>,
    /// What work trees give back.
    given_up: Vec<BlockSet>,
    /// Dropped without the state's lock.
    refused: Vec<WriteSet>,
    outcomes: Vec<Outcome>,
}

impl Pool {
    /// Holds every commit back until the guard goes, so that a test sees who shares one.
    #[cfg(test)]
    pub(crate) fn hold_commits(&self) -> MutexGuard<'_, ()> {
        self.committer().between_commits().unwrap()
    }

    /// Whether a batch is being committed or held back.
    #[cfg(test)]
    pub(crate) fn is_committing(&self) -> bool {
        self.committer().is_running()
    }

    /// Makes a CP durable and visible: blocks first, then all its roots in one transaction.
    /// Blocks the caller; concurrent calls share one device flush and one transaction.
    pub fn publish(&self, publish: Publish) -> Result<Published, PoolError> {
        self.publish_with(publish, None)
    }

    pub(super) fn publish_with(
        &self,
        mut publish: Publish,
        keep: Option<Keep>,
    ) -> Result<Published, PoolError> {
        self.check_latch()?;
        publish.write_set.flush_buffer()?;
        match self.committer().submit(self, Change::Publish(Box::new(publish), keep))? {
            Done::Published(published) => Ok(published),
            Done::Kept(_) | Done::Dropped(_) | Done::Row => {
                Err(PoolError::Inconsistent { what: "a CP was answered as another change".into() })
            }
        }
    }

    /// Commits a batch. An error here concerns all of it.
    pub(super) fn commit(&self, changes: Vec<Change>) -> Result<Vec<Outcome>, PoolError> {
        let has_blocks = |change: &Change| match change {
            Change::Publish(publish, _) => publish.write_set.has_written(),
            Change::KeepWork(order) => !order.taken.is_empty(),
            Change::PutSource(_)
            | Change::GiveUp(_)
            | Change::AdoptSeeds(_)
            | Change::Keep(..)
            | Change::DropKept(_)
            | Change::UpdateSource(..)
            | Change::RemoveSource(_)
            | Change::PutVolume(_)
            | Change::GrowVolume(..)
            | Change::RemoveVolume(_)
            | Change::PutNote(..) => false,
        };
        if changes.iter().any(has_blocks) {
            self.device().flush()?;
        }
        let transaction = self.transactions() + 1;
        let mut making = Making::default();
        let mut free_map = None;
        {
            let mut state = self.lock()?;
            for change in changes {
                let outcome = self.stage(&mut state, &mut making, change, transaction);
                making.outcomes.push(outcome);
            }
            if !making.staged.is_empty() {
                free_map = Some(self.stage_free_map(&mut state, &making.changes));
            }
        }
        let Making { staged, settled, dropped, given_up, refused, outcomes, .. } = making;
        drop(refused);
        let Some(free_map) = free_map else { return Ok(outcomes) };
        self.store().commit(&staged, &free_map)?;
        self.count_transaction().store(transaction, Ordering::Release);
        let mut state = self.lock()?;
        let changed = staged.sources.keys().chain(staged.used.keys()).copied().collect();
        state.mirror.merge(staged);
        self.figures.tell_used(&state.mirror, &changed);
        let rests: Vec<_> = settled
            .into_iter()
            .map(|(settled, kept_upto)| {
                let (account, rest) = settled.into_parts();
                state.space.finish(self.cache(), account, kept_upto);
                rest
            })
            .collect();
        for freed in dropped {
            state.space.finish_drop(self.cache(), &freed);
            state.kept.finish_drop();
        }
        for blocks in given_up {
            state.space.finish_give_up(self.cache(), &blocks);
        }
        drop(state);
        drop(rests);
        Ok(outcomes)
    }

    /// What the commit stores of the free map, as it is with all of the batch.
    fn stage_free_map(&self, state: &mut State, changes: &MapChanges) -> FreeMapUpdate {
        let first = self.label().layout.data_start;
        let plan = state.free_log.plan(&changes.taken, &changes.freed, first);
        let (stored, _) = state.space.maps();
        let pages = plan.pages.iter().map(|&page| (page, stored.page_bits(page))).collect();
        FreeMapUpdate { plan, pages }
    }

    /// Enters one change into the batch, or refuses it and leaves the batch as it was.
    fn stage(
        &self,
        state: &mut State,
        making: &mut Making,
        change: Change,
        transaction: u64,
    ) -> Outcome {
        if let Change::AdoptSeeds(order) = change {
            order.stage(state, &mut making.staged, self.row_bytes_max())?;
            return Ok(Done::Row);
        }
        let State { mirror, space, kept, .. } = state;
        let (staged, max) = (&mut making.staged, self.row_bytes_max());
        match change {
            Change::AdoptSeeds(_) => {}
            Change::PutSource(row) => staged.put_source(mirror, *row, max)?,
            Change::UpdateSource(id, change) => {
                let mut row = staged.source(mirror, id)?.clone();
                change(&mut row);
                staged.put_source(mirror, row, max)?;
            }
            Change::RemoveSource(id) => staged.remove_source(mirror, id)?,
            Change::PutVolume(row) => staged.put_volume(mirror, *row, max)?,
            Change::GrowVolume(key, size) => staged.grow_volume(mirror, (key, size), max)?,
            Change::RemoveVolume(key) => staged.remove_volume(mirror, key)?,
            Change::PutNote(name, bytes) => staged.put_note(name, bytes)?,
            Change::Keep(source, name) => {
                let volumes = staged.volumes(mirror, source);
                let row = KeptRow::of(staged.source(mirror, source)?, volumes.values(), name);
                if staged.may_keep(mirror, &row, max)? {
                    staged.keep(row.clone());
                }
                return Ok(Done::Kept(Arc::new(row)));
            }
            Change::DropKept(order) => {
                let source = order.source();
                let (dropped, freed) =
                    order.stage((kept, mirror, space), staged, &mut making.changes)?;
                let less: u64 = freed.values().map(FreedBlocks::len).sum();
                let used = staged.used(mirror, source);
                staged.set_used(source, used.map(|used| used.saturating_sub(less)));
                making.dropped.push(freed);
                return Ok(Done::Dropped(dropped));
            }
            Change::KeepWork(order) => {
                let KeepOrder { row, epoch, taken, gone } = *order;
                if !row.is_seed() {
                    let recorded = staged.source(mirror, row.source)?.epoch;
                    if epoch != recorded {
                        return Err(PoolError::Epoch { named: epoch, recorded });
                    }
                }
                staged.keep_work(mirror, row, max)?;
                space.stage_work(&taken, &gone, &mut making.changes);
            }
            Change::GiveUp(GiveUp { source, blocks }) => {
                let counted = staged.work(mirror, source).map(|row| row.blocks);
                let Some(counted) = counted else { return Ok(Done::Row) };
                space.stage_give_up(counted, blocks.as_ref(), &mut making.changes);
                staged.works.insert(source, None);
                making.given_up.extend(blocks);
            }
            Change::Publish(publish, keep) => {
                return self.stage_cp(state, making, *publish, keep, transaction);
            }
        }
        Ok(Done::Row)
    }

    fn stage_cp(
        &self,
        state: &mut State,
        making: &mut Making,
        publish: Publish,
        keep: Option<Keep>,
        transaction: u64,
    ) -> Outcome {
        let State { mirror, space, kept, .. } = state;
        let (staged, max) = (&mut making.staged, self.row_bytes_max());
        let rows = CpRows::of(&publish, (keep, max), staged, mirror, (space, &mut making.changes));
        let Publish { write_set, source, cp, .. } = publish;
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => {
                making.refused.push(write_set);
                return Err(error);
            }
        };
        kept.collect(source, rows.kept_upto, &write_set.account().freed);
        making.settled.push((write_set.settle(space, self.cache()), rows.kept_upto));
        let history_rows = self.history_rows(rows.history.roots.len());
        let roots = rows.history.roots.clone();
        if making.staged.work(mirror, source).is_some() {
            making.staged.works.insert(source, None);
        }
        rows.enter(&mut making.staged, mirror, source, history_rows);
        Ok(Done::Published(Published { cp, roots, transaction }))
    }

    fn history_rows(&self, volumes: usize) -> u64 {
        let budget = self.catalog_part_bytes();
        crate::units::convert::to_u64(history_rows(budget, volumes, self.options().history_rows))
    }
}

/// The rows of one CP, checked.
struct CpRows {
    source: SourceRow,
    volumes: Vec<VolumeRow>,
    history: HistoryRow,
    /// What it keeps, if anything.
    keeps: Option<KeptRow>,
    /// The newest CP that was kept when this one freed its blocks.
    kept_upto: Option<CpNumber>,
    /// Blocks it freed that stay for that one.
    stayed: u64,
    /// Blocks that the source has then, with the CPs of it that are kept; if that is known.
    used: Option<u64>,
}

impl CpRows {
    /// Checks a CP against the rows as they will be, and enters its blocks into the free map.
    fn of(
        publish: &Publish,
        (keep, max_bytes): (Option<Keep>, u64),
        staged: &mut Staged,
        mirror: &Mirror,
        (space, changes): (&mut SpaceMap, &mut MapChanges),
    ) -> Result<Self, PoolError> {
        let mut source = staged.source(mirror, publish.source)?.clone();
        let goes_on = publish.write_set.goes_on_with(publish.source);
        if staged.work(mirror, publish.source).is_some() && !goes_on {
            return Err(PoolError::WorkKept { source_id: publish.source });
        }
        let (named, recorded) = (publish.epoch, source.epoch);
        if named != recorded {
            return Err(PoolError::Epoch { named, recorded });
        }
        let (cp, applied) = (publish.cp, source.applied);
        if cp <= applied {
            return Err(PoolError::CpNotNewer { cp, applied });
        }
        let mut all = staged.volumes(mirror, publish.source);
        let volumes = changed_volumes(publish, &all)?;
        let mut kept_upto = staged.kept_upto(mirror, publish.source);
        let mut keeps = None;
        if let Some(Keep::Replaced(name)) = &keep {
            keeps = Some(KeptRow::of(&source, all.values(), name.clone()));
            kept_upto = Some(applied);
        }
        all.extend(volumes.iter().map(|row| (row.key, row.clone())));
        let roots = all.values().map(|row| (row.key.volume, row.tree.root())).collect();
        source.applied = cp;
        source.sequence = publish.sequence;
        source.stream_hash = publish.stream_hash;
        source.highest_cp = source.highest_cp.max(cp);
        source.generation = publish.generation.unwrap_or(source.generation);
        if let Some(extension) = &publish.extension {
            source.extension.clone_from(extension);
        }
        check_extension(&source)?;
        if let Some(Keep::New(name)) = keep {
            keeps = Some(KeptRow::of(&source, all.values(), name));
        }
        let keeps = match keeps {
            Some(row) if staged.may_keep(mirror, &row, max_bytes)? => Some(row),
            Some(_) | None => None,
        };
        let Publish { sequence, stream_hash, .. } = *publish;
        let history = HistoryRow { cp, sequence, stream_hash, roots };
        if publish.write_set.must_free() {
            space.refuse_growth(publish.write_set.account(), kept_upto)?;
        }
        let (taken, freed) = space.balance(publish.write_set.account(), kept_upto);
        let used = staged.used(mirror, publish.source);
        let used = used.map(|used| (used + taken).saturating_sub(freed));
        if let (Some(bound), Some(used)) = (publish.write_set.bound_of(), used) {
            bound.refuse(used)?;
        }
        let stayed = space.stage(publish.write_set.account(), kept_upto, changes)?;
        Ok(Self { source, volumes, history, keeps, kept_upto, stayed, used })
    }

    fn enter(self, staged: &mut Staged, mirror: &Mirror, source: SourceId, history_rows: u64) {
        staged.set_used(source, self.used);
        staged.sources.insert(source, Some(self.source));
        staged.volumes.extend(self.volumes.into_iter().map(|row| (row.key, Some(row))));
        staged.add_history(mirror, source, self.history, history_rows);
        if let Some(row) = self.keeps {
            staged.keep(row);
        }
        if let Some(kept) = self.kept_upto.filter(|_| self.stayed > 0) {
            let blocks = staged.kept_blocks(mirror, source, kept) + self.stayed;
            staged.kept_blocks.insert((source, kept), blocks);
        }
    }
}

/// The rows of the volumes that a CP changes: each built on what is published now, and every
/// volume that lost blocks among them.
fn changed_volumes(
    publish: &Publish,
    all: &BTreeMap<VolumeKey, VolumeRow>,
) -> Result<Vec<VolumeRow>, PoolError> {
    let inconsistent = |what: String| Err(PoolError::Inconsistent { what });
    if !publish.write_set.is_finished() {
        return inconsistent("a tree of the CP was begun and not finished".into());
    }
    let mut rows = BTreeMap::new();
    for &(volume, tree) in &publish.volumes {
        let key = VolumeKey { source: publish.source, volume };
        let old = all.get(&key).ok_or(PoolError::UnknownVolume { key })?;
        let grown = old.grows_to == Some(tree.size);
        if old.tree.size != tree.size && !grown {
            return inconsistent(format!(
                "volume {volume} has {} bytes, its new tree {}",
                old.size(),
                tree.size
            ));
        }
        let grows_to = old.grows_to.filter(|_| !grown);
        match publish.write_set.bases().get(&key) {
            Some(base) if *base != old.tree => return Err(PoolError::BaseMoved { volume }),
            Some(_) => {}
            None if tree == old.tree => {}
            None => return inconsistent(format!("volume {volume} has a tree without a base")),
        }
        if tree.top.birth > publish.cp {
            return inconsistent(format!("volume {volume} was born after its own CP"));
        }
        if rows.insert(key, VolumeRow { tree, grows_to, ..old.clone() }).is_some() {
            return inconsistent(format!("volume {volume} is published twice"));
        }
    }
    let touched = publish.write_set.bases().keys().chain(publish.write_set.account().freed.keys());
    if let Some(key) = touched.into_iter().find(|key| !rows.contains_key(key)) {
        let VolumeKey { source, volume } = key;
        return inconsistent(format!("volume {volume} of {source} was changed and not published"));
    }
    Ok(rows.into_values().collect())
}
