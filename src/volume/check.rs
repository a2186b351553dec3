//! Walks everything reachable and proves that nothing is lost, shared or damaged.
//!
//! Every tree that is published, kept or pinned is walked, every node verified by checksum and
//! content hash, on demand all data too. Then the accounts are compared, block by block:
//!
//! ```text
//! reachable from published, kept or work roots = the stored free map's used blocks
//! reachable from kept roots only         = the lengths of the kept CPs' deadlists
//! reachable from work trees only         = what their rows say
//! reachable from pins and none of those  = what only pins hold
//! reachable from a source's published or kept roots = what the catalog counts for it, if it does
//! all those, and the blocks of CPs under way = all that is not free
//! ```
//!
//! A subtree of a kept tree that an earlier walk went through is not entered again: a node never
//! changes, so all below it was seen. No block may be reached twice from published roots. Trees are
//! pinned while they are walked, so CPs go on being published; what they change does not concern
//! the accounts taken at the start. Findings are counted all and listed up to a bound.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::limits::POOL_LEASE_BLOCKS;
use crate::pool::Pool;
use crate::pool::bitmap::Bitmap;
use crate::pool::error::PoolError;
use crate::pool::pointer::{Pointer, TreeRoot, VolumeKey};
use crate::pool::snapshot::Snapshot;
use crate::units::BLOCK_BYTES;
use crate::units::convert::to_u64;
use crate::units::ids::SourceId;
use crate::units::numbers::{CpNumber, Pbn, Vbn};

use super::error::VolumeError;
use super::root::leaf_hash;
use super::walk::Walk;

/// Findings listed; the rest is only counted.
const FINDINGS_MAX: usize = 64;

/// What is wrong.
#[derive(Debug, Clone)]
pub enum Finding {
    /// A block or node does not hold what its pointer says.
    Damaged { key: VolumeKey, cp: CpNumber, error: VolumeError },
    /// Two published pointers lead to one block.
    ReachedTwice { key: VolumeKey, vbn: Vbn, pbn: Pbn },
    /// A tree reaches a block that the free map calls free.
    ReachableButFree { pbn: Pbn },
    /// The stored free map calls a block used that no published tree reaches.
    Lost { pbn: Pbn },
    /// So many blocks are neither free nor reachable nor of a CP under way, or more than there are.
    Accounts { busy: u64, reachable: u64, in_flight: u64 },
    /// So many blocks are counted as kept only, so many are reached only by kept roots.
    Kept { counted: u64, only_kept: u64 },
    /// So many blocks are counted as the work trees' own, so many are reached only by them.
    Work { counted: u64, only_work: u64 },
    /// So many blocks are in deadlists, so many are reached only by pins.
    Deadlists { dead: u64, only_pinned: u64 },
    /// So many blocks are counted for a source, so many are reached by its published and kept roots.
    Used { source: SourceId, counted: u64, reached: u64 },
    /// A pointer is younger than its CP.
    TooYoung { key: VolumeKey, vbn: Vbn, birth: CpNumber, cp: CpNumber },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged { key, cp, error } => {
                write!(f, "volume {} of {} at CP {cp}: {error}", key.volume, key.source)
            }
            Self::ReachedTwice { key, vbn, pbn } => {
                let VolumeKey { source, volume } = key;
                write!(f, "block {vbn} of volume {volume} of {source}: {pbn} has another owner")
            }
            Self::ReachableButFree { pbn } => write!(f, "{pbn} is in use but counted free"),
            Self::Lost { pbn } => write!(f, "{pbn} is counted used but not in use"),
            Self::Accounts { busy, reachable, in_flight } => {
                write!(f, "{busy} blocks busy, {reachable} reachable and {in_flight} in flight")
            }
            Self::Kept { counted, only_kept } => {
                write!(f, "{counted} blocks counted as kept, {only_kept} reached only by kept CPs")
            }
            Self::Work { counted, only_work } => {
                write!(
                    f,
                    "{counted} blocks counted as work, {only_work} reached only by work trees"
                )
            }
            Self::Deadlists { dead, only_pinned } => {
                write!(f, "{dead} blocks in deadlists, {only_pinned} reached only by pins")
            }
            Self::Used { source, counted, reached } => {
                write!(f, "{counted} blocks counted for source {source}, its CPs reach {reached}")
            }
            Self::TooYoung { key, vbn, birth, cp } => {
                let VolumeKey { source, volume } = key;
                write!(f, "block {vbn} of volume {volume} of {source}: birth {birth} after CP {cp}")
            }
        }
    }
}

/// What was walked and what was found.
#[derive(Debug, Clone, Default)]
pub struct CheckReport {
    /// Published trees.
    pub volumes: u64,
    /// Kept trees.
    pub kept: u64,
    /// Pinned trees beside the published ones.
    pub pinned: u64,
    /// Nodes verified.
    pub nodes: u64,
    /// Data blocks seen; verified if that was asked for.
    pub data_blocks: u64,
    /// Blocks that published trees reach.
    pub reachable: u64,
    /// Blocks that only kept trees reach; readers may have them pinned, too.
    pub only_kept: u64,
    /// Blocks that only pinned trees reach.
    pub only_pinned: u64,
    /// Blocks of CPs under way.
    pub in_flight: u64,
    /// Free blocks.
    pub free: u64,
    /// All blocks.
    pub total: u64,
    /// The first findings.
    pub findings: Vec<Finding>,
    /// How many there are in all.
    pub findings_count: u64,
}

impl CheckReport {
    /// Whether all is well.
    pub fn is_clean(&self) -> bool {
        self.findings_count == 0
    }

    fn add(&mut self, finding: Finding) {
        self.findings_count += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding);
        }
    }
}

/// How much is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// All nodes.
    Nodes,
    /// All data as well, each block against its full hash.
    Data,
}

/// Checks a pool. An error means that the check itself could not be made.
pub fn check(pool: &Arc<Pool>, depth: Depth) -> Result<CheckReport, VolumeError> {
    let snapshot = pool.snapshot()?;
    let mut checker = Checker::new(pool, &snapshot, depth);
    for (key, cp, tree) in &snapshot.published_trees {
        checker.report.volumes += 1;
        checker.walk(*key, *cp, tree, Kind::Published)?;
    }
    for (key, cp, tree) in &snapshot.kept_trees {
        checker.report.kept += 1;
        checker.walk(*key, *cp, tree, Kind::Kept)?;
    }
    for (key, cp, tree) in &snapshot.work_trees {
        checker.walk(*key, *cp, tree, Kind::Work)?;
    }
    for pin in &snapshot.pins {
        let tree = pin.tree();
        if !snapshot.published_trees.contains(&(pin.key(), pin.cp(), tree)) {
            checker.report.pinned += 1;
            checker.walk(pin.key(), pin.cp(), &tree, Kind::Pinned)?;
        }
    }
    snapshot.pins.iter().try_for_each(|pin| pin.check())?;
    Ok(checker.finish())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Published,
    Kept,
    Work,
    Pinned,
}

struct Checker<'a> {
    pool: &'a Pool,
    snapshot: &'a Snapshot,
    depth: Depth,
    published: Bitmap,
    kept: Bitmap,
    work: Bitmap,
    pinned: Bitmap,
    /// Blocks that published and kept roots of each source reach.
    of_source: BTreeMap<SourceId, u64>,
    batch: Vec<Pointer>,
    /// Something could not be entered: what lies below it is unseen.
    hidden: bool,
    report: CheckReport,
}

impl<'a> Checker<'a> {
    fn new(pool: &'a Pool, snapshot: &'a Snapshot, depth: Depth) -> Self {
        let blocks = snapshot.busy.blocks();
        let report = CheckReport {
            in_flight: snapshot.space.in_flight.0,
            free: snapshot.space.free.0,
            total: blocks,
            ..CheckReport::default()
        };
        Self {
            pool,
            snapshot,
            depth,
            published: Bitmap::new(blocks),
            kept: Bitmap::new(blocks),
            work: Bitmap::new(blocks),
            pinned: Bitmap::new(blocks),
            of_source: BTreeMap::new(),
            batch: Vec::new(),
            hidden: false,
            report,
        }
    }

    fn walk(
        &mut self,
        key: VolumeKey,
        cp: CpNumber,
        tree: &TreeRoot,
        kind: Kind,
    ) -> Result<(), VolumeError> {
        let mut walk = Walk::new(self.pool, tree)?.with_nodes();
        while let Some(item) = walk.next() {
            let item = match item {
                Ok(item) => item,
                Err(error) => {
                    self.hidden = true;
                    self.report.add(Finding::Damaged { key, cp, error });
                    continue;
                }
            };
            let birth = item.pointer.birth;
            if birth > cp {
                self.report.add(Finding::TooYoung { key, vbn: item.vbn, birth, cp });
            }
            if item.pointer.is_hole() {
                continue;
            }
            if matches!(kind, Kind::Kept | Kind::Work) && self.was_reached(item.pointer.pbn) {
                if item.level > 0 {
                    walk.skip_children();
                }
                continue;
            }
            if item.level > 0 {
                self.report.nodes += 1;
            } else {
                self.report.data_blocks += 1;
                self.data(key, cp, item.pointer);
            }
            self.reach(key, item.vbn, item.pointer.pbn, kind);
        }
        self.verify_batch(key, cp);
        Ok(())
    }

    /// Whether a published or kept tree that was walked has the block. A damaged node has not
    /// been reached by anybody.
    fn was_reached(&self, pbn: Pbn) -> bool {
        let index = pbn.0.checked_sub(self.snapshot.first).filter(|&at| at < self.report.total);
        index.is_some_and(|index| self.published.get(index) || self.kept.get(index))
    }

    fn reach(&mut self, key: VolumeKey, vbn: Vbn, pbn: Pbn, kind: Kind) {
        let index = pbn.0.checked_sub(self.snapshot.first).filter(|&at| at < self.report.total);
        let Some(index) = index else {
            // The node itself could not have been read; for data, reading it says so.
            let error = VolumeError::Pool(PoolError::OutOfPool { pbn });
            self.hidden = true;
            self.report.add(Finding::Damaged { key, cp: CpNumber(0), error });
            return;
        };
        match kind {
            Kind::Published => {
                if self.published.insert(index) {
                    *self.of_source.entry(key.source).or_default() += 1;
                } else {
                    self.report.add(Finding::ReachedTwice { key, vbn, pbn });
                }
            }
            Kind::Kept => {
                // One that is published, too, is not walked once more.
                let new = self.kept.insert(index);
                *self.of_source.entry(key.source).or_default() += u64::from(new);
            }
            Kind::Work => {
                self.work.insert(index);
            }
            Kind::Pinned => {
                self.pinned.insert(index);
            }
        }
    }

    /// Gathers data blocks side by side and verifies them in one read.
    fn data(&mut self, key: VolumeKey, cp: CpNumber, pointer: Pointer) {
        if self.depth == Depth::Nodes {
            return;
        }
        let follows = self.batch.last().is_some_and(|last| last.pbn.0 + 1 == pointer.pbn.0);
        if !follows || to_u64(self.batch.len()) >= POOL_LEASE_BLOCKS {
            self.verify_batch(key, cp);
        }
        self.batch.push(pointer);
    }

    fn verify_batch(&mut self, key: VolumeKey, cp: CpNumber) {
        let batch = std::mem::take(&mut self.batch);
        let Some(first) = batch.first() else { return };
        let crcs: Vec<u32> = batch.iter().map(|pointer| pointer.crc).collect();
        let mut bytes = vec![0; batch.len() * BLOCK_BYTES];
        if self.pool.read_run(first.pbn, &crcs, &mut bytes).is_err() {
            // Something in it is bad: find out what, block by block.
            batch.iter().for_each(|pointer| self.verify_one(key, cp, pointer));
            return;
        }
        let (blocks, _) = bytes.as_chunks::<BLOCK_BYTES>();
        for (pointer, block) in batch.iter().zip(blocks) {
            self.compare_hash(key, cp, pointer, block);
        }
    }

    fn verify_one(&mut self, key: VolumeKey, cp: CpNumber, pointer: &Pointer) {
        let mut block = [0; BLOCK_BYTES];
        match self.pool.read_block(pointer.pbn, pointer.crc, &mut block) {
            Ok(()) => self.compare_hash(key, cp, pointer, &block),
            Err(error) => self.report.add(Finding::Damaged { key, cp, error: error.into() }),
        }
    }

    fn compare_hash(
        &mut self,
        key: VolumeKey,
        cp: CpNumber,
        pointer: &Pointer,
        block: &[u8; BLOCK_BYTES],
    ) {
        let (pbn, wanted, met) = (pointer.pbn, pointer.hash, leaf_hash(block));
        if wanted != met {
            let error = PoolError::CorruptContent { pbn, wanted, met }.into();
            self.report.add(Finding::Damaged { key, cp, error });
        }
    }

    /// What each source has.
    fn compare_used(&mut self) {
        for (&source, &counted) in &self.snapshot.used {
            let reached = self.of_source.get(&source).copied().unwrap_or(0);
            if counted != reached {
                self.report.add(Finding::Used { source, counted, reached });
            }
        }
    }

    /// Compares the accounts.
    fn finish(mut self) -> CheckReport {
        let Snapshot { first, stored, busy, space, .. } = self.snapshot;
        let (mut lost, mut taken) = (Vec::new(), Vec::new());
        // A damaged node hides what is below it: its blocks are not lost, they are unseen.
        let whole = !self.hidden;
        stored.for_each(|index| {
            let reached = self.published.get(index) || self.kept.get(index);
            let reached = reached || self.work.get(index);
            if whole && !reached && lost.len() < FINDINGS_MAX {
                lost.push(Finding::Lost { pbn: Pbn(first + index) });
            }
        });
        let mut only_kept = 0;
        let mut refuse_free = |index: u64| {
            if !stored.get(index) && taken.len() < FINDINGS_MAX {
                taken.push(Finding::ReachableButFree { pbn: Pbn(first + index) });
            }
        };
        self.published.for_each(&mut refuse_free);
        self.kept.for_each(|index| {
            only_kept += u64::from(!self.published.get(index));
            refuse_free(index);
        });
        let mut only_work = 0;
        self.work.for_each(|index| {
            only_work += u64::from(!self.published.get(index) && !self.kept.get(index));
            refuse_free(index);
        });
        let mut only_pinned = 0;
        self.pinned.for_each(|index| {
            only_pinned += u64::from(!self.published.get(index) && !self.kept.get(index));
            if !busy.get(index) && taken.len() < FINDINGS_MAX {
                taken.push(Finding::ReachableButFree { pbn: Pbn(first + index) });
            }
        });
        lost.into_iter().chain(taken).for_each(|finding| self.report.add(finding));
        self.report.reachable = self.published.count();
        self.report.only_pinned = only_pinned;
        self.report.only_kept = only_kept;
        let reachable = self.report.reachable + only_kept + only_work + only_pinned;
        let (busy, in_flight) = (busy.count(), self.report.in_flight);
        if whole && busy != reachable + in_flight {
            self.report.add(Finding::Accounts { busy, reachable, in_flight });
        }
        let counted = space.kept.0;
        if whole && counted != only_kept {
            self.report.add(Finding::Kept { counted, only_kept });
        }
        let counted = space.work.0;
        if whole && counted != only_work {
            self.report.add(Finding::Work { counted, only_work });
        }
        if whole {
            self.compare_used();
        }
        let dead = space.pinned.0;
        if whole && dead != only_pinned {
            self.report.add(Finding::Deadlists { dead, only_pinned });
        }
        self.report
    }
}
