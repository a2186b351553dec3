//! One moment of a pool's accounts, for `check`.
//!
//! Taken between two commits: what the maps say and what the roots reach belong together. Every
//! tree in it is pinned as long as the snapshot lives, so it can be walked while CPs go on; no
//! kept CP is dropped meanwhile.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::units::ids::SourceId;
use crate::units::numbers::CpNumber;

use super::bitmap::Bitmap;
use super::error::PoolError;
use super::pointer::{TreeRoot, VolumeKey};
use super::space::Space;
use super::{Pin, Pool};

/// One moment of a pool's accounts.
#[derive(Debug)]
pub struct Snapshot {
    /// PBN of the block with index 0.
    pub first: u64,
    /// The stored free map: blocks that published and kept roots reach.
    pub stored: Bitmap,
    /// All blocks that are not free.
    pub busy: Bitmap,
    /// The counts.
    pub space: Space,
    /// Blocks that the catalog counts for each source, as far as it does: what its published and kept
    /// roots reach.
    pub used: BTreeMap<SourceId, u64>,
    /// Every published tree.
    pub published_trees: Vec<(VolumeKey, CpNumber, TreeRoot)>,
    /// Every kept tree, newest CP first.
    pub kept_trees: Vec<(VolumeKey, CpNumber, TreeRoot)>,
    /// Every work tree.
    pub work_trees: Vec<(VolumeKey, CpNumber, TreeRoot)>,
    /// Every pinned tree, the published ones among them; readers' own pins count once more.
    pub pins: Vec<Pin>,
    /// Holds the kept ones.
    _kept: Vec<Pin>,
}

impl Pool {
    /// Takes a snapshot. A latched pool has none: its last commit is in doubt.
    pub fn snapshot(self: &Arc<Self>) -> Result<Snapshot, PoolError> {
        let between = self.committer().between_commits()?;
        self.check_latch()?;
        let mut pins = Vec::new();
        let mut state = self.lock()?;
        let space = state.space.report();
        let (stored, busy) = state.space.maps();
        let (stored, busy) = (stored.clone(), busy.clone());
        let used = state.mirror.all_used().collect();
        let mut pinned = Vec::new();
        state.space.pins.for_each(|key, cp, tree| pinned.push((key, cp, tree)));
        let mut published_trees = Vec::new();
        for row in state.mirror.all_volumes() {
            let applied = state.mirror.source(row.key.source).map(|source| source.applied);
            published_trees.push((row.key, applied.unwrap_or_default(), row.tree));
        }
        for &(key, cp, tree) in pinned.iter().chain(&published_trees) {
            pins.push(self.pin_tree(&mut state, key, cp, tree));
        }
        let mut kept_trees: Vec<_> =
            state.mirror.all_kept().flat_map(|row| row.trees().collect::<Vec<_>>()).collect();
        let hold = |&(key, cp, tree): &_| self.hold_kept(&mut state, key, cp, tree);
        let kept = kept_trees.iter().map(hold).collect();
        let works = state.mirror.all_works();
        let work_trees =
            works.flat_map(|row| row.keyed().map(|(key, tree)| (key, row.cp, tree))).collect();
        drop(state);
        drop(between);
        kept_trees.sort_by_key(|(_, cp, _)| std::cmp::Reverse(*cp));
        let first = self.label().layout.data_start;
        Ok(Snapshot {
            first,
            stored,
            busy,
            space,
            used,
            published_trees,
            kept_trees,
            work_trees,
            pins,
            _kept: kept,
        })
    }
}
