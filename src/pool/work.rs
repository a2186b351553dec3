//! The work tree of a source: what came of a pass that is not published yet (R19).
//!
//! Called by the applier of a hub through `volume::work`, which walks trees. A pass builds new trees
//! in a write set; at intervals, and when its connection breaks, what it has is **kept**: the blocks
//! that only the new trees have enter the stored free map, and one row names the trees. Nobody reads
//! them: the image stays at its CP until a pass is published as a whole. There is one work tree a
//! source. It is built on the published trees and shares blocks with them, so it must be published or
//! dropped before anything else is published for that source; any other CP is refused
//! ([`PoolError::WorkKept`]).
//!
//! What is stored is the trees and how many blocks only they have. Which ones is read out of the
//! trees: a block of theirs that is not at the same place of the published ones. So a crash cannot
//! part the list from the trees.
//!
//! Table `work`: the key is the source's id (16 bytes). The row, sealed as all rows of the catalog are:
//! the published CP on which the trees are built (4), the CP that they were to become (4; nothing in
//! them was born later), the number of blocks that only they have (8), the number of trees (2), and
//! for each its volume's number (4) and its root as in a volume's row.
//!
//! A **seed** is the work tree of a volume whose source has not published anything here yet, filled from a
//! file; see `pool::seed`. Until the source comes it stands under an id of its own, in a table of its own.
//!
//! A keep is one commit: blocks flushed, then row and free map. A block that an earlier keep had and
//! this one has not is free in the stored map from then on; in memory it stays busy until the write
//! set ends, for the pass may still read the tree that it began with.

use std::sync::Arc;

use crate::units::ids::SourceId;
use crate::units::numbers::{CpNumber, Epoch, Pbn, VolumeNumber};

use super::Pool;
use super::blockset::BlockSet;
use super::catalog::Catalog;
use super::error::PoolError;
use super::pointer::{TREE_ROOT_BYTES, TreeRoot, VolumeKey};
use super::publish::Change;
use super::rows::{put_count, read, seal};
use super::seed::Seed;
use super::write_set::{Budget, WriteSet};

/// The work tree of a source, as its row says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkRow {
    /// Whose: the key.
    pub source: SourceId,
    /// The published CP on which it is built.
    pub base: CpNumber,
    /// The CP it was to become; nothing in it was born later.
    pub cp: CpNumber,
    /// Blocks that only it has.
    pub blocks: u64,
    /// The trees that differ from the published ones, by number.
    pub trees: Vec<(VolumeNumber, TreeRoot)>,
    /// What it is filled for, if its source is not here yet; then `source` is an id of its own.
    pub seed: Option<Seed>,
}

impl WorkRow {
    /// Table of the catalog.
    pub(super) const TABLE: &'static str = "work";

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.base.0.to_le_bytes().to_vec();
        bytes.extend(self.cp.0.to_le_bytes());
        bytes.extend(self.blocks.to_le_bytes());
        put_count(&mut bytes, self.trees.len());
        for (volume, tree) in &self.trees {
            bytes.extend(volume.0.to_le_bytes());
            bytes.extend(tree.encode());
        }
        match &self.seed {
            None => seal(Self::TABLE, &self.source.0, &bytes),
            Some(seed) => self.encode_seed(seed),
        }
    }

    pub(super) fn decode(key: &[u8; 16], bytes: &[u8]) -> Result<Self, PoolError> {
        read(Self::TABLE, key, bytes, |mut fields| {
            let (base, cp) = (CpNumber(fields.u32()?), CpNumber(fields.u32()?));
            let blocks = fields.u64()?;
            let count = fields.u16()?;
            let mut trees = Vec::new();
            for _ in 0..count {
                let volume = VolumeNumber(fields.u32()?);
                trees.push((volume, TreeRoot::decode(&fields.array::<TREE_ROOT_BYTES>()?)?));
            }
            fields.end(Self { source: SourceId(*key), base, cp, blocks, trees, seed: None })
        })
    }

    /// The trees with their keys.
    pub fn keyed(&self) -> impl Iterator<Item = (VolumeKey, TreeRoot)> + '_ {
        let source = self.source;
        self.trees.iter().map(move |&(volume, tree)| (VolumeKey { source, volume }, tree))
    }
}

/// What a keep changes.
#[derive(Debug)]
pub(super) struct KeepOrder {
    pub(super) row: WorkRow,
    pub(super) epoch: Epoch,
    /// Blocks that the row before has not.
    pub(super) taken: BlockSet,
    /// Blocks that only the row before has.
    pub(super) gone: BlockSet,
}

/// A work tree that is given up.
#[derive(Debug)]
pub(super) struct GiveUp {
    pub(super) source: SourceId,
    /// The blocks that only it has; none if they are not known: they are lost then.
    pub(super) blocks: Option<BlockSet>,
}

impl Catalog<'_> {
    /// The work tree of a source, if one is kept.
    pub fn work(&self, source: SourceId) -> Result<Option<Arc<WorkRow>>, PoolError> {
        Ok(self.pool().lock()?.mirror.work(source).cloned())
    }
}

impl Pool {
    /// Begins a write set that goes on with the work tree of a source, if one is kept: `volume::work`
    /// tells it which blocks those are. One at a time.
    pub fn begin_work(
        self: &Arc<Self>,
        source: SourceId,
        budget: Budget,
    ) -> Result<Option<(WriteSet, Arc<WorkRow>)>, PoolError> {
        let mut state = self.lock()?;
        let Some(row) = state.mirror.work(source).cloned() else { return Ok(None) };
        if !state.works_open.insert(source) {
            return Err(PoolError::WorkKept { source_id: source });
        }
        drop(state);
        let mut set = self.begin(budget);
        set.work = Some(source);
        Ok(Some((set, row)))
    }

    /// Gives a work tree up whose blocks cannot be told, because a node of it is damaged: they stay
    /// in use, and `check` finds them lost. Better that than an image that never moves again.
    pub fn forget_work(&self, source: SourceId) -> Result<(), PoolError> {
        let give_up = GiveUp { source, blocks: None };
        self.committer().submit(self, Change::GiveUp(give_up)).map(|_| ())
    }
}

impl WriteSet {
    /// A block that only the work tree has which this set goes on with.
    pub fn adopt(&mut self, pbn: Pbn) -> Result<(), PoolError> {
        let known = self.pool().lock()?.space.is_stored(pbn);
        if known && self.account.allocated.insert(pbn) && self.account.stored.insert(pbn) {
            return Ok(());
        }
        let what = format!("block {pbn} of a work tree is not in use, or it has it twice");
        Err(PoolError::Inconsistent { what })
    }

    /// Whether the pool keeps something of it as the work tree of that source.
    pub(super) fn goes_on_with(&self, source: SourceId) -> bool {
        self.work == Some(source)
    }

    /// Keeps what was built so far as the work tree of the source; durable when this returns.
    /// `trees` are all trees that differ from the published ones. False, and nothing was done, if
    /// it lives on the reserve.
    pub fn keep_work(
        &mut self,
        (source, epoch): (SourceId, Epoch),
        cp: CpNumber,
        trees: Vec<(VolumeNumber, TreeRoot)>,
    ) -> Result<bool, PoolError> {
        if self.must_free() {
            return Ok(false);
        }
        self.flush_buffer()?;
        assert!(self.is_finished(), "half a tree is not kept");
        assert!(self.work.is_none_or(|known| known == source), "a work tree has one source");
        let base = self.pool().catalog().source(source)?;
        let base = base.ok_or(PoolError::UnknownSource { source_id: source })?.applied;
        let row = WorkRow { source, base, cp, blocks: 0, trees, seed: None };
        self.keep_row(row, epoch).map(|()| true)
    }

    /// Keeps the row; what it names is complete.
    pub(super) fn keep_row(&mut self, row: WorkRow, epoch: Epoch) -> Result<(), PoolError> {
        let (source, pool) = (row.source, Arc::clone(self.pool()));
        if self.work.is_none() {
            if !pool.lock()?.works_open.insert(source) {
                return Err(PoolError::WorkKept { source_id: source });
            }
            self.work = Some(source);
        }
        let account = &self.account;
        let (mut live, mut taken, mut gone) =
            (BlockSet::default(), BlockSet::default(), BlockSet::default());
        account.allocated.for_each(|pbn| {
            let (lives, stored) = (!account.dropped.contains(pbn), account.stored.contains(pbn));
            if lives {
                live.insert(pbn);
            }
            if lives && !stored {
                taken.insert(pbn);
            }
            if stored && !lives {
                gone.insert(pbn);
            }
        });
        let row = WorkRow { blocks: live.len(), ..row };
        let order = KeepOrder { row, epoch, taken, gone };
        let kept = pool.committer().submit(&pool, Change::KeepWork(Box::new(order)));
        // After an error in doubt nobody is given anything back.
        if kept.is_ok() || pool.first_error().is_some() {
            self.account.stored = live;
        }
        kept.map(|_| ())
    }

    /// Gives the work tree up that this set goes on with, and nothing else was done with: all its
    /// blocks are free.
    pub fn give_up(mut self) -> Result<(), PoolError> {
        let Some(source) = self.work else { return Ok(()) };
        let blocks = std::mem::take(&mut self.account.stored);
        self.account.allocated = BlockSet::default();
        let pool = Arc::clone(self.pool());
        let give_up = GiveUp { source, blocks: Some(blocks) };
        pool.committer().submit(&pool, Change::GiveUp(give_up)).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::pointer::Pointer;
    use crate::units::hash::ContentHash;
    use crate::units::numbers::ByteCount;

    #[test]
    fn golden_bytes_and_no_flipped_bit_passes() {
        let top = Pointer { pbn: Pbn(1), birth: CpNumber(2), crc: 3, hash: ContentHash([4; 16]) };
        let tree = TreeRoot { size: ByteCount(4096), top };
        let (source, base, cp) = (SourceId([1; 16]), CpNumber(5), CpNumber(6));
        let trees = vec![(VolumeNumber(8), tree)];
        let row = WorkRow { source, base, cp, blocks: 7, trees, seed: None };
        let mut expected = vec![5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 0, 0];
        expected.extend(tree.encode());
        let bytes = row.encode();
        assert_eq!(bytes[8..], expected);
        assert_eq!(WorkRow::decode(&source.0, &bytes).unwrap(), row);
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(WorkRow::decode(&source.0, &bytes).is_err(), "bit {bit}");
        }
        assert!(WorkRow::decode(&[2; 16], &bytes).is_err(), "another source's");
    }
}
