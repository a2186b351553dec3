//! CPs kept by name: their trees, and the blocks that only they have.
//!
//! Called by the volume tree (`volume::kept` walks a tree that is dropped), by hub and filer.
//! Keeping is a row: all volumes of a source as one CP published them. From then on no block of
//! those trees is given out, across restarts, until the row is gone (invariant 2): a block that a
//! later CP frees keeps its bit in the stored free map if it was born up to the newest kept CP.
//! Kept CPs are never given up for space.
//!
//! **Deadlists.** The blocks that newer CPs have freed and that a kept CP still has are its
//! deadlist. Only its length is stored; the list itself lies in the trees and is read out of them
//! when the CP is dropped. A block lives from its birth to the CP that frees it, so dropping CP
//! `k` gives back what its tree reaches, was born after the next older kept CP, and is not at the
//! same place of the next newer tree, kept or published. That walk enters a node of `k` only if
//! the node itself is given back, so it reads at most one node of each tree for a node it frees:
//! the work goes by what comes back, not by the size of the volume. In return CPs store nothing
//! (their metadata stays of constant size however much is kept), an open rebuilds nothing, and
//! there is no second truth beside the trees that a crash could part from them. The price: a kept
//! tree with a damaged node cannot be dropped before it is repaired; the error names the block.
//!
//! CPs are published while such a walk runs. It compares with the trees of the moment it began,
//! pinned firmly; what later CPs free of the dropped CP is collected beside it, and the commit
//! takes both. It begins between two commits, so that no CP is in neither. One drop at a time.
//!
//! Readers of a kept CP hold it by count: a CP that is being read is not dropped.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::units::ids::SourceId;
use crate::units::names::KeptName;
use crate::units::numbers::{BlockCount, CpNumber, Pbn, VolumeNumber};

use super::blockset::FreedBlocks;
use super::catalog::Catalog;
use super::error::PoolError;
use super::kept_row::{KeptRow, KeptVolume};
use super::mirror::{Mirror, Staged};
use super::pointer::{TreeRoot, VolumeKey};
use super::publish::{Change, Done, Publish, Published};
use super::space::{MapChanges, SpaceMap};
use super::{Held, Pin, Pool, State};

/// Which CP a publish keeps, in the same commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keep {
    /// The one it replaces; refused if there is none.
    Replaced(KeptName),
    /// The new one.
    New(KeptName),
}

/// A kept CP as it is listed.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Its row.
    pub row: Arc<KeptRow>,
    /// The length of its deadlist: blocks that neither the image nor a newer kept CP has. CPs
    /// kept under several names have it once.
    pub blocks: BlockCount,
}

/// A kept CP is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropped {
    /// Its number.
    pub cp: CpNumber,
    /// What came back; readers that have it pinned give it back later.
    pub blocks: BlockCount,
}

/// A drop under way.
#[derive(Debug)]
struct Dropping {
    source: SourceId,
    cp: CpNumber,
    /// What CPs freed of it since the drop was begun.
    collected: BTreeMap<VolumeKey, FreedBlocks>,
}

/// What is known of kept CPs beside their rows.
#[derive(Debug, Default)]
pub(super) struct KeptState {
    readers: BTreeMap<(SourceId, CpNumber), u64>,
    dropping: Option<Dropping>,
    /// Dropped by a commit that is not durable yet: nobody begins to read it.
    committing: Option<(SourceId, CpNumber)>,
}

impl KeptState {
    /// A CP was staged that frees these, all that was born up to `kept_upto` being kept.
    pub(super) fn collect(
        &mut self,
        source: SourceId,
        kept_upto: Option<CpNumber>,
        freed: &BTreeMap<VolumeKey, FreedBlocks>,
    ) {
        let Some(dropping) = &mut self.dropping else { return };
        if dropping.source != source || kept_upto != Some(dropping.cp) {
            return;
        }
        for (key, freed) in freed {
            let collected = dropping.collected.entry(*key).or_default();
            collected.merge(freed.born_upto(dropping.cp));
        }
    }

    /// The commit of a drop is durable.
    pub(super) fn finish_drop(&mut self) {
        self.committing = None;
    }

    fn refuse_dropped(&self, row: &KeptRow) -> Result<(), PoolError> {
        if self.committing == Some((row.source, row.cp)) {
            return Err(busy(&row.name, "it is being dropped".into()));
        }
        Ok(())
    }

    /// One reader less.
    pub(super) fn release(&mut self, source: SourceId, cp: CpNumber) {
        let Some(count) = self.readers.get_mut(&(source, cp)) else {
            panic!("a reader of kept CP {cp} ends that never began");
        };
        *count -= 1;
        if *count == 0 {
            self.readers.remove(&(source, cp));
        }
    }

    fn refuse_read(&self, row: &KeptRow) -> Result<(), PoolError> {
        match self.readers.get(&(row.source, row.cp)) {
            Some(readers) => Err(busy(&row.name, format!("{readers} readers have it open"))),
            None => Ok(()),
        }
    }
}

fn busy(name: &KeptName, why: String) -> PoolError {
    PoolError::KeptBusy { name: name.clone(), why }
}

fn unknown(source_id: SourceId, name: &KeptName) -> PoolError {
    PoolError::UnknownKept { source_id, name: name.clone() }
}

/// A tree that is dropped and the next newer one of the same volume, if there is one.
#[derive(Debug, Clone, Copy)]
pub struct DropTree {
    /// The volume.
    pub key: VolumeKey,
    /// The kept tree.
    pub tree: TreeRoot,
    /// What is not given back because it is at the same place here.
    pub newer: Option<TreeRoot>,
}

/// A drop that was begun. Dropping this gives it up: the CP stays kept.
#[derive(Debug)]
pub struct KeptDrop {
    pool: Arc<Pool>,
    row: Arc<KeptRow>,
    older: Option<CpNumber>,
    trees: Vec<DropTree>,
    /// Of the published trees among those, firm.
    pins: Vec<Pin>,
    freed: BTreeMap<VolumeKey, FreedBlocks>,
}

impl KeptDrop {
    /// The trees to be compared; none if another name keeps the same CP.
    pub fn trees(&self) -> &[DropTree] {
        &self.trees
    }

    /// The next older kept CP: it has all that was born up to it.
    pub fn older(&self) -> CpNumber {
        self.older.unwrap_or_default()
    }

    /// Notes a block that no other tree has.
    pub fn free(&mut self, key: VolumeKey, pbn: Pbn, birth: CpNumber) -> Result<(), PoolError> {
        if self.freed.entry(key).or_default().insert(pbn, birth) {
            return Ok(());
        }
        Err(PoolError::Inconsistent { what: format!("block {pbn} was freed twice") })
    }

    /// Takes the row away and gives the blocks back, in one commit.
    pub fn commit(mut self) -> Result<Dropped, PoolError> {
        let order = DropOrder {
            row: Arc::clone(&self.row),
            older: self.older,
            compared: !self.trees.is_empty(),
            freed: std::mem::take(&mut self.freed),
        };
        self.pool.check_latch()?;
        match self.pool.committer().submit(&self.pool, Change::DropKept(Box::new(order)))? {
            Done::Dropped(dropped) => Ok(dropped),
            Done::Published(_) | Done::Kept(_) | Done::Row => Err(strange_outcome()),
        }
    }
}

impl Drop for KeptDrop {
    fn drop(&mut self) {
        if let Ok(mut state) = self.pool.lock() {
            for pin in &self.pins {
                if let Held::Pinned(name) = &pin.held {
                    state.space.pins.unmake_firm(name);
                }
            }
            state.kept.dropping = None;
        }
    }
}

fn strange_outcome() -> PoolError {
    PoolError::Inconsistent { what: "a change was answered as another one".into() }
}

/// A drop as it is committed.
#[derive(Debug)]
pub(super) struct DropOrder {
    row: Arc<KeptRow>,
    older: Option<CpNumber>,
    compared: bool,
    freed: BTreeMap<VolumeKey, FreedBlocks>,
}

impl DropOrder {
    /// Whose CP.
    pub(super) fn source(&self) -> SourceId {
        self.row.source
    }

    /// Enters the drop into a batch, or refuses it and leaves the batch as it was. Returns what
    /// was dropped and the blocks that are free once the commit is durable.
    pub(super) fn stage(
        self,
        (kept, mirror, space): (&mut KeptState, &Mirror, &mut SpaceMap),
        staged: &mut Staged,
        changes: &mut MapChanges,
    ) -> Result<(Dropped, BTreeMap<VolumeKey, FreedBlocks>), PoolError> {
        let Self { row, older, compared, mut freed } = self;
        let (source, cp) = (row.source, row.cp);
        let mut others = staged.kept(mirror, source);
        if others.remove(&row.name).is_none_or(|met| met.cp != cp) {
            return Err(unknown(source, &row.name));
        }
        let removed = ((source, row.name.clone()), None);
        if others.values().any(|other| other.cp == cp) {
            staged.kept.extend([removed]);
            return Ok((Dropped { cp, blocks: BlockCount(0) }, BTreeMap::new()));
        }
        kept.refuse_read(&row)?;
        let older_now = others.values().map(|other| other.cp).filter(|other| *other < cp).max();
        if older_now != older || !(compared || row.volumes.is_empty()) {
            let what = format!("the kept CPs around CP {cp} changed while it was dropped");
            return Err(PoolError::Inconsistent { what });
        }
        let collected = kept.dropping.iter_mut().flat_map(|d| std::mem::take(&mut d.collected));
        for (key, mut blocks) in collected {
            let unshared = match older {
                Some(older) => blocks.split_born_after(older),
                None => blocks,
            };
            freed.entry(key).or_default().merge(unshared);
        }
        let blocks: u64 = freed.values().map(FreedBlocks::len).sum();
        let listed = staged.kept_blocks(mirror, source, cp);
        let rest = listed.checked_sub(blocks).filter(|rest| *rest == 0 || older.is_some());
        let Some(rest) = rest else {
            let what = format!("CP {cp} alone has {blocks} blocks, its deadlist {listed}");
            return Err(PoolError::Inconsistent { what });
        };
        space.stage_drop(&freed, changes)?;
        staged.kept.extend([removed]);
        staged.kept_blocks.insert((source, cp), 0);
        if let Some(older) = older {
            let before = staged.kept_blocks(mirror, source, older);
            staged.kept_blocks.insert((source, older), before + rest);
        }
        kept.committing = Some((source, cp));
        Ok((Dropped { cp, blocks: BlockCount(blocks) }, freed))
    }
}

impl Catalog<'_> {
    /// The kept CPs of a source, oldest first.
    pub fn kept(&self, source: SourceId) -> Result<Vec<Kept>, PoolError> {
        let state = self.pool().lock()?;
        let entry = |row: &Arc<KeptRow>| {
            let blocks = BlockCount(state.mirror.kept_blocks(source, row.cp));
            Kept { row: Arc::clone(row), blocks }
        };
        let mut all: Vec<Kept> = state.mirror.kept(source).map(entry).collect();
        all.sort_by(|a, b| (a.row.cp, &a.row.name).cmp(&(b.row.cp, &b.row.name)));
        Ok(all)
    }
}

impl Pool {
    /// Keeps a source's published CP, all its volumes, under a name. Repeating it is no error;
    /// a name that keeps another CP is.
    pub fn keep(&self, source: SourceId, name: KeptName) -> Result<Arc<KeptRow>, PoolError> {
        self.check_latch()?;
        match self.committer().submit(self, Change::Keep(source, name))? {
            Done::Kept(row) => Ok(row),
            Done::Published(_) | Done::Dropped(_) | Done::Row => Err(strange_outcome()),
        }
    }

    /// Publishes a CP and, in the same commit, keeps it or the one it replaces. Both happen or
    /// neither does.
    pub fn publish_and_keep(&self, publish: Publish, keep: Keep) -> Result<Published, PoolError> {
        self.publish_with(publish, Some(keep))
    }

    /// Holds one volume of a kept CP for a reader. It is not given up for space, and the CP is
    /// not dropped as long as this lives.
    pub fn pin_kept(
        self: &Arc<Self>,
        source: SourceId,
        name: &KeptName,
        volume: VolumeNumber,
    ) -> Result<Pin, PoolError> {
        let mut state = self.lock()?;
        let row = state.mirror.kept(source).find(|row| row.name == *name);
        let row = Arc::clone(row.ok_or_else(|| unknown(source, name))?);
        let key = VolumeKey { source, volume };
        let tree = row.volume(volume).ok_or(PoolError::UnknownVolume { key })?.tree;
        state.kept.refuse_dropped(&row)?;
        Ok(self.hold_kept(&mut state, key, row.cp, tree))
    }

    /// One reader more of a CP that no commit is dropping.
    pub(super) fn hold_kept(
        self: &Arc<Self>,
        state: &mut State,
        key: VolumeKey,
        cp: CpNumber,
        tree: TreeRoot,
    ) -> Pin {
        *state.kept.readers.entry((key.source, cp)).or_default() += 1;
        Pin { pool: Arc::clone(self), held: Held::Kept { key, cp }, tree }
    }

    /// Begins to drop a kept CP: says which trees are to be compared. The CP is gone when
    /// [`KeptDrop::commit`] returns.
    pub fn begin_drop(
        self: &Arc<Self>,
        source: SourceId,
        name: &KeptName,
    ) -> Result<KeptDrop, PoolError> {
        // In the middle of a commit the rows are those before it, the free map is that behind it.
        let _between = self.committer().between_commits()?;
        self.check_latch()?;
        let mut state = self.lock()?;
        let (same, others): (Vec<_>, Vec<_>) =
            state.mirror.kept(source).cloned().partition(|row| row.name == *name);
        let row = same.into_iter().next().ok_or_else(|| unknown(source, name))?;
        if let Some(other) = &state.kept.dropping {
            let why = format!("kept CP {} of {} is being dropped", other.cp, other.source);
            return Err(busy(name, why));
        }
        let (cp, mut trees, mut pins) = (row.cp, Vec::new(), Vec::new());
        if others.iter().all(|other| other.cp != cp) {
            state.kept.refuse_read(&row)?;
            let newer = others.iter().filter(|other| other.cp > cp).min_by_key(|other| other.cp);
            for volume in &row.volumes {
                let key = VolumeKey { source, volume: volume.number };
                let newer = match newer {
                    Some(newer) => in_newer(newer, volume),
                    None => published(&state.mirror, key, volume),
                };
                trees.push(DropTree { key, tree: volume.tree, newer });
            }
            if newer.is_none() {
                pins = self.pin_firmly(&mut state, source, &trees);
            }
        }
        let older = others.iter().map(|other| other.cp).filter(|other| *other < cp).max();
        state.kept.dropping = Some(Dropping { source, cp, collected: BTreeMap::new() });
        drop(state);
        let (pool, freed) = (Arc::clone(self), BTreeMap::new());
        Ok(KeptDrop { pool, row, older, trees, pins, freed })
    }

    /// Pins the published trees of a comparison.
    fn pin_firmly(
        self: &Arc<Self>,
        state: &mut State,
        source: SourceId,
        trees: &[DropTree],
    ) -> Vec<Pin> {
        let applied = state.mirror.source(source).map(|row| row.applied).unwrap_or_default();
        let mut pins = Vec::new();
        for DropTree { key, newer, .. } in trees {
            if let Some(tree) = newer {
                let pin = self.pin_tree(state, *key, applied, *tree);
                if let Held::Pinned(name) = &pin.held {
                    state.space.pins.make_firm(name);
                }
                pins.push(pin);
            }
        }
        pins
    }
}

/// The tree of the same volume in a newer kept CP.
fn in_newer(newer: &KeptRow, volume: &KeptVolume) -> Option<TreeRoot> {
    newer.volume(volume.number).filter(|new| new.id == volume.id).map(|new| new.tree)
}

/// The published tree of a volume that is still the one that was kept.
fn published(mirror: &Mirror, key: VolumeKey, volume: &KeptVolume) -> Option<TreeRoot> {
    mirror.volume(key).filter(|row| row.id == volume.id).map(|row| row.tree)
}
