//! Which blocks may be written: the free map in memory.
//!
//! Two bitmaps over the data blocks. **Stored**: what published and kept roots reach; this one is
//! stored, page by page, in the same transaction as the roots. **Busy**: what may not be given
//! out: stored blocks, those of CPs under way, those freed by a commit that is not durable
//! yet, and those that only pinned CPs have. A block is given out only if its busy bit is clear,
//! so nothing that a published, kept or pinned root reaches is ever overwritten (invariant 2), and
//! a freed block comes back only after the commit that freed it is durable.
//!
//! A block that a CP frees and that a kept CP has (it was born before that CP) simply keeps its
//! stored bit; the commit that drops the kept CP clears it. So no crash can part the two, and an
//! open has nothing to rebuild. The blocks of a work tree are stored as well: see `work`.
//!
//! Pure memory, under the pool's state lock. Broken accounts of a caller are refused before
//! anything changes; our own panic.

use std::collections::{BTreeMap, BTreeSet};

use crate::limits::POOL_RESERVE_BYTES_MIN;
use crate::units::BLOCK_BYTES_U64;
use crate::units::numbers::{BlockCount, CpNumber, Pbn};

use super::bitmap::{Bitmap, Extent};
use super::blockset::{BlockSet, FreedBlocks};
use super::cache::BlockCache;
use super::error::PoolError;
use super::label::Layout;
use super::pins::Pins;
use super::pointer::VolumeKey;

/// Extents looked at before the longest of them is taken.
const EXTENTS_LOOKED_AT: usize = 128;
/// An extent of that many blocks is long enough to be written in one go.
const EXTENT_BLOCKS_GOOD: u64 = 64;

/// How full a pool is, in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Blocks of data there are.
    pub total: BlockCount,
    /// Blocks that may be given out, reserve and reservations among them.
    pub free: BlockCount,
    /// Blocks that published roots reach.
    pub used: BlockCount,
    /// Blocks that only CPs kept by name have; readers may have them pinned as well.
    pub kept: BlockCount,
    /// Blocks that only pinned CPs have.
    pub pinned: BlockCount,
    /// Blocks that only the work trees of unfinished passes have.
    pub work: BlockCount,
    /// Blocks of CPs under way.
    pub in_flight: BlockCount,
    /// Free blocks promised to reservations.
    pub held: BlockCount,
    /// Free blocks kept back, so that a CP or a drop always fits.
    pub reserve: BlockCount,
}

impl Space {
    /// How many figures there are.
    pub(super) const FIGURES: usize = 9;

    pub(super) fn figures(&self) -> [u64; Self::FIGURES] {
        let Self { total, free, used, kept, pinned, work, in_flight, held, reserve } = *self;
        [total, free, used, kept, pinned, work, in_flight, held, reserve].map(|blocks| blocks.0)
    }

    /// In that order.
    pub(super) fn of(figures: [u64; Self::FIGURES]) -> Self {
        let [total, free, used, kept, pinned, work, in_flight, held, reserve] =
            figures.map(BlockCount);
        Self { total, free, used, kept, pinned, work, in_flight, held, reserve }
    }
}

/// From which part of the free space blocks are taken.
#[derive(Debug)]
pub(super) enum Draw<'a> {
    /// Neither reserve nor reservations.
    Ordinary,
    /// The reserve as well.
    Reserve,
    /// A reservation of so many blocks; when it is used up, the reserve.
    Held(&'a mut u64),
}

/// What one CP takes and gives, as a write set collects it.
#[derive(Debug, Default)]
pub(super) struct Account {
    /// Blocks taken and written.
    pub(super) allocated: BlockSet,
    /// Blocks of `allocated` that the same CP has dropped again.
    pub(super) dropped: BlockSet,
    /// Blocks of `allocated` that are stored already: those of the work tree.
    pub(super) stored: BlockSet,
    /// Published blocks that the CP no longer needs.
    pub(super) freed: BTreeMap<VolumeKey, FreedBlocks>,
}

/// What a commit changes in the published map.
#[derive(Debug, Default)]
pub(super) struct MapChanges {
    /// Pages in which blocks were taken.
    pub(super) taken: BTreeSet<u64>,
    /// Blocks that were freed.
    pub(super) freed: BlockSet,
}

/// Blocks kept back of a pool.
fn reserve(layout: &Layout) -> u64 {
    (layout.data_blocks() / 20).max(POOL_RESERVE_BYTES_MIN / BLOCK_BYTES_U64)
}

/// The free map.
#[derive(Debug)]
pub(super) struct SpaceMap {
    first: u64,
    /// Blocks of a stripe of the device: whole ones are given out first.
    stripe: u64,
    stored: Bitmap,
    busy: Bitmap,
    cursor: u64,
    held: u64,
    reserve: u64,
    in_flight: u64,
    /// Stored blocks that no published root reaches.
    kept: u64,
    /// Stored blocks that only work trees have.
    work: u64,
    /// Blocks in the deadlists of pins that kept CPs have as well.
    kept_and_pinned: u64,
    /// Blocks of a dropped CP whose commit is not durable yet.
    dropped: BlockSet,
    pub(super) pins: Pins,
    /// Gives out freed blocks at once: the negative control of the write trace test.
    #[cfg(test)]
    pub(super) broken: bool,
    /// Frees what kept CPs have: the negative control of their tests.
    #[cfg(test)]
    pub(super) forgets_kept: bool,
}

impl SpaceMap {
    /// The free map of a pool whose stored one is `stored`, `kept` blocks of it being reached
    /// by kept CPs only and `work` by work trees only.
    pub(super) fn new(layout: &Layout, stored: Bitmap, kept: u64, work: u64) -> Self {
        assert_eq!(stored.blocks(), layout.data_blocks());
        Self {
            first: layout.data_start,
            stripe: 1,
            busy: stored.clone(),
            reserve: reserve(layout),
            stored,
            cursor: 0,
            held: 0,
            in_flight: 0,
            kept,
            work,
            kept_and_pinned: 0,
            dropped: BlockSet::default(),
            pins: Pins::default(),
            #[cfg(test)]
            broken: false,
            #[cfg(test)]
            forgets_kept: false,
        }
    }

    /// There are more blocks, all of them free.
    pub(super) fn grow(&mut self, layout: &Layout) {
        self.stored.grow(layout.data_blocks());
        self.busy.grow(layout.data_blocks());
        self.reserve = reserve(layout);
    }

    /// The same on a device of such stripes.
    pub(super) fn striped(self, stripe: u64) -> Self {
        Self { stripe: stripe.max(1), ..self }
    }

    /// How full it is.
    pub(super) fn report(&self) -> Space {
        let used = self.stored.count().saturating_sub(self.kept + self.work);
        Space {
            total: BlockCount(self.busy.blocks()),
            free: BlockCount(self.free()),
            used: BlockCount(used),
            kept: BlockCount(self.kept),
            pinned: BlockCount(self.only_pinned()),
            work: BlockCount(self.work),
            in_flight: BlockCount(self.in_flight),
            held: BlockCount(self.held),
            reserve: BlockCount(self.reserve),
        }
    }

    /// The stored map and the map of what is busy, for `check`.
    pub(super) fn maps(&self) -> (&Bitmap, &Bitmap) {
        (&self.stored, &self.busy)
    }

    /// Blocks that come back when all pins are gone.
    pub(super) fn only_pinned(&self) -> u64 {
        self.pins.dead_blocks() - self.kept_and_pinned
    }

    fn free(&self) -> u64 {
        self.busy.blocks() - self.busy.count()
    }

    fn index(&self, pbn: Pbn) -> Option<u64> {
        pbn.0.checked_sub(self.first).filter(|&index| index < self.busy.blocks())
    }

    /// Promises blocks to somebody.
    pub(super) fn hold(&mut self, wanted: u64) -> Result<(), PoolError> {
        if self.drawable(&Draw::Ordinary) < wanted {
            return Err(self.full(wanted));
        }
        self.held += wanted;
        Ok(())
    }

    /// Takes a promise back.
    pub(super) fn unhold(&mut self, blocks: u64) {
        assert!(blocks <= self.held, "{blocks} blocks given back, {} held", self.held);
        self.held -= blocks;
    }

    /// Whether what is drawn so is not promised, and nothing is left beside promises and reserve.
    pub(super) fn touches_reserve(&self, draw: &Draw<'_>) -> bool {
        let promised = matches!(draw, Draw::Held(blocks) if **blocks > 0);
        !promised && self.drawable(&Draw::Ordinary) == 0
    }

    pub(super) fn full(&self, wanted: u64) -> PoolError {
        PoolError::Full { wanted, free: self.free(), reserve: self.reserve }
    }

    fn drawable(&self, draw: &Draw<'_>) -> u64 {
        let unpromised = self.free().saturating_sub(self.held);
        match draw {
            Draw::Ordinary => unpromised.saturating_sub(self.reserve),
            Draw::Held(blocks) if **blocks > 0 => **blocks,
            Draw::Held(_) | Draw::Reserve => unpromised,
        }
    }

    /// Gives out up to `wanted` blocks side by side, or `None` if there are none to be drawn.
    /// Next fit: writes go on where the last ones ended, in the longest run nearby.
    pub(super) fn take(&mut self, wanted: u64, mut draw: Draw<'_>) -> Option<(Pbn, u64)> {
        let wanted = wanted.min(self.drawable(&draw));
        if wanted == 0 {
            return None;
        }
        let Extent { start, count } = self.find(wanted)?;
        for index in start..start + count {
            assert!(self.busy.insert(index), "a busy block was given out");
        }
        if let Draw::Held(blocks) = &mut draw
            && **blocks > 0
        {
            **blocks -= count;
            self.unhold(count);
        }
        self.cursor = start + count;
        self.in_flight += count;
        Some((Pbn(self.first + start), count))
    }

    fn find(&self, wanted: u64) -> Option<Extent> {
        let stripes = if wanted < self.stripe || self.stripe == 1 {
            None
        } else {
            let whole = wanted - wanted % self.stripe;
            self.longest(wanted + self.stripe, whole, |extent| self.whole_stripes(extent, whole))
        };
        stripes.or_else(|| self.longest(wanted, wanted, Some))
    }

    /// The whole stripes of an extent, at most `most` blocks; `None` if there are none.
    fn whole_stripes(&self, extent: Extent, most: u64) -> Option<Extent> {
        let start = (self.first + extent.start).next_multiple_of(self.stripe) - self.first;
        let end = extent.start + extent.count;
        let count = end.saturating_sub(start).min(most);
        let count = count - count % self.stripe;
        (count > 0).then_some(Extent { start, count })
    }

    /// The first part that is long enough, or the longest, of the free extents nearby, looked at
    /// `most` blocks at a time.
    fn longest(
        &self,
        most: u64,
        wanted: u64,
        part: impl Fn(Extent) -> Option<Extent>,
    ) -> Option<Extent> {
        let good = wanted.min(EXTENT_BLOCKS_GOOD);
        let mut best: Option<Extent> = None;
        let (mut at, mut wrapped) = (self.cursor, false);
        for _ in 0..EXTENTS_LOOKED_AT {
            match self.busy.clear_extent(at, most) {
                Some(extent) => {
                    match part(extent) {
                        Some(part) if part.count >= good => return Some(part),
                        Some(part) if best.is_none_or(|best| best.count < part.count) => {
                            best = Some(part);
                        }
                        Some(_) | None => {}
                    }
                    at = extent.start + extent.count;
                }
                None if wrapped => break,
                None => (at, wrapped) = (0, true),
            }
        }
        best
    }

    /// Takes a block back that never was in a published root.
    pub(super) fn give_back(&mut self, cache: &BlockCache, pbn: Pbn) {
        self.in_flight -= 1;
        self.release(cache, pbn);
    }

    fn release(&mut self, cache: &BlockCache, pbn: Pbn) {
        let index = self.index(pbn);
        let was = index.is_some_and(|index| self.busy.remove(index));
        assert!(was, "block {pbn} given back, but it was not busy");
        cache.forget(pbn);
    }

    /// Refuses a CP that takes more blocks than it gives back: it lives on the reserve.
    pub(super) fn refuse_growth(
        &self,
        account: &Account,
        kept_upto: Option<CpNumber>,
    ) -> Result<(), PoolError> {
        let (taken, freed) = self.balance(account, kept_upto);
        if freed < taken { Err(self.full(taken)) } else { Ok(()) }
    }

    /// Blocks that a CP adds to what published and kept roots reach, and those that it gives back.
    pub(super) fn balance(&self, account: &Account, kept_upto: Option<CpNumber>) -> (u64, u64) {
        let taken = account.allocated.len() - account.dropped.len();
        let mut freed = 0;
        for blocks in account.freed.values() {
            blocks.for_each_born(|_, birth| freed += u64::from(!self.stays(birth, kept_upto)));
        }
        (taken, freed)
    }

    /// Enters a CP into the stored map, in memory; the caller stores the changes noted in
    /// `changes`. What it frees and the CP `kept_upto`, the newest kept one, has stays; returns
    /// how many these are. Refused, and nothing changed, if it frees what is not stored.
    pub(super) fn stage(
        &mut self,
        account: &Account,
        kept_upto: Option<CpNumber>,
        changes: &mut MapChanges,
    ) -> Result<u64, PoolError> {
        self.refuse_strange(account.freed.values())?;
        let mut stayed = 0;
        for freed in account.freed.values() {
            freed.for_each_born(|pbn, birth| {
                if self.stays(birth, kept_upto) {
                    stayed += 1;
                } else {
                    self.unstore(pbn, changes);
                }
            });
        }
        self.kept += stayed;
        account.allocated.for_each(|pbn| {
            match (!account.dropped.contains(pbn), account.stored.contains(pbn)) {
                (true, true) => self.work -= 1,
                (true, false) => {
                    self.store(pbn, changes);
                    self.in_flight -= 1;
                }
                (false, true) => {
                    self.unstore(pbn, changes);
                    (self.work, self.in_flight) = (self.work - 1, self.in_flight + 1);
                }
                (false, false) => {}
            }
        });
        Ok(stayed)
    }

    fn store(&mut self, pbn: Pbn, changes: &mut MapChanges) {
        let index = self.index(pbn).unwrap_or(u64::MAX);
        assert!(self.busy.get(index), "block {pbn} is published but was never given out");
        assert!(self.stored.insert(index), "block {pbn} is published twice");
        changes.taken.insert(Bitmap::page_of(index));
    }

    /// Whether a published, kept or work tree has the block.
    pub(super) fn is_stored(&self, pbn: Pbn) -> bool {
        self.index(pbn).is_some_and(|index| self.stored.get(index))
    }

    /// A work tree is kept that has `taken` and no longer `gone`, which stay busy until its write set
    /// ends. In memory; the caller stores the changes.
    pub(super) fn stage_work(
        &mut self,
        taken: &BlockSet,
        gone: &BlockSet,
        changes: &mut MapChanges,
    ) {
        taken.for_each(|pbn| self.store(pbn, changes));
        gone.for_each(|pbn| self.unstore(pbn, changes));
        self.work = self.work + taken.len() - gone.len();
        self.in_flight = self.in_flight + gone.len() - taken.len();
    }

    /// A work tree of so many blocks is given up, in memory; if they are not known they stay stored,
    /// and nobody has them.
    pub(super) fn stage_give_up(
        &mut self,
        counted: u64,
        blocks: Option<&BlockSet>,
        changes: &mut MapChanges,
    ) {
        self.work = self.work.saturating_sub(counted);
        if let Some(blocks) = blocks {
            blocks.for_each(|pbn| self.unstore(pbn, changes));
        }
    }

    /// The commit that gave a work tree up is durable: its blocks are free.
    pub(super) fn finish_give_up(&mut self, cache: &BlockCache, blocks: &BlockSet) {
        blocks.for_each(|pbn| self.release(cache, pbn));
    }

    /// Takes the blocks out of the stored map that only a dropped CP had, in memory. Refused, and
    /// nothing changed, if one of them is not stored.
    pub(super) fn stage_drop(
        &mut self,
        freed: &BTreeMap<VolumeKey, FreedBlocks>,
        changes: &mut MapChanges,
    ) -> Result<(), PoolError> {
        self.refuse_strange(freed.values())?;
        let blocks: u64 = freed.values().map(FreedBlocks::len).sum();
        if blocks > self.kept {
            let what = format!("{blocks} blocks are dropped, {} are kept", self.kept);
            return Err(PoolError::Inconsistent { what });
        }
        for freed in freed.values() {
            freed.for_each(|pbn| {
                self.unstore(pbn, changes);
                self.dropped.insert(pbn);
            });
        }
        self.kept -= blocks;
        Ok(())
    }

    /// Whether a freed block is kept: a tree of CP `kept_upto` has all that is older.
    fn stays(&self, birth: CpNumber, kept_upto: Option<CpNumber>) -> bool {
        #[cfg(test)]
        if self.forgets_kept {
            return false;
        }
        kept_upto.is_some_and(|kept| birth <= kept)
    }

    fn refuse_strange<'a>(
        &self,
        all: impl Iterator<Item = &'a FreedBlocks>,
    ) -> Result<(), PoolError> {
        let (mut wrong, mut seen) = (None, BlockSet::default());
        for freed in all {
            freed.for_each(|pbn| {
                let stored = self.index(pbn).is_some_and(|index| self.stored.get(index));
                if !stored || !seen.insert(pbn) {
                    wrong = Some(pbn);
                }
            });
        }
        let Some(pbn) = wrong else { return Ok(()) };
        let what = format!("block {pbn} was freed, but no published root has it, or it twice");
        Err(PoolError::Inconsistent { what })
    }

    fn unstore(&mut self, pbn: Pbn, changes: &mut MapChanges) {
        let index = self.index(pbn).unwrap_or(u64::MAX);
        self.stored.remove(index);
        changes.freed.insert(pbn);
    }

    /// The commit of a staged CP is durable: what it freed is free, unless a pinned CP has it or
    /// it stayed for the kept CP `kept_upto`.
    pub(super) fn finish(
        &mut self,
        cache: &BlockCache,
        account: Account,
        kept_upto: Option<CpNumber>,
    ) {
        account.dropped.for_each(|pbn| self.give_back(cache, pbn));
        for (key, mut freed) in account.freed {
            let mut stayed = FreedBlocks::default();
            if let Some(kept) = kept_upto.filter(|kept| self.stays(*kept, kept_upto)) {
                let young = freed.split_born_after(kept);
                stayed = std::mem::replace(&mut freed, young);
            }
            let free = self.pins.keep(key, freed);
            free.for_each(|pbn| self.release(cache, pbn));
            let staying = stayed.len();
            self.kept_and_pinned += staying - self.pins.keep(key, stayed).len();
        }
    }

    /// The commit that dropped a kept CP is durable: its blocks are free, unless pinned.
    pub(super) fn finish_drop(
        &mut self,
        cache: &BlockCache,
        freed: &BTreeMap<VolumeKey, FreedBlocks>,
    ) {
        self.dropped = BlockSet::default();
        for (key, freed) in freed {
            freed.for_each_born(|pbn, birth| {
                if self.pins.have(*key, pbn, birth) {
                    self.kept_and_pinned -= 1;
                } else {
                    self.release(cache, pbn);
                }
            });
        }
    }

    /// Takes blocks back that no pin has any more. Those that a kept CP has stay busy, and those
    /// of a drop that is not durable yet are left to [`SpaceMap::finish_drop`].
    pub(super) fn unpin(&mut self, cache: &BlockCache, unpinned: &FreedBlocks) {
        unpinned.for_each(|pbn| {
            let stored = self.index(pbn).is_some_and(|index| self.stored.get(index));
            if stored || self.dropped.contains(pbn) {
                self.kept_and_pinned -= 1;
            } else {
                self.release(cache, pbn);
            }
        });
    }

    /// Marks a free block published and `used` not. Returns the former.
    #[cfg(test)]
    pub(super) fn break_map(&mut self, used: Pbn) -> Pbn {
        let lost = self.busy.clear_extent(0, 1).unwrap().start;
        self.stored.insert(lost);
        self.stored.remove(self.index(used).unwrap());
        Pbn(self.first + lost)
    }

    /// Makes a freed block free at once, as a broken allocator would.
    #[cfg(test)]
    pub(super) fn break_free(&mut self, pbn: Pbn) {
        if self.broken
            && let Some(index) = self.index(pbn)
        {
            self.busy.remove(index);
            self.cursor = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ids::SourceId;
    use crate::units::numbers::VolumeNumber;

    const KEY: VolumeKey = VolumeKey { source: SourceId([1; 16]), volume: VolumeNumber(1) };

    fn map(blocks: u64) -> SpaceMap {
        let layout =
            Layout { total: blocks + 10, catalog_start: 2, catalog_blocks: 8, data_start: 10 };
        let mut map = SpaceMap::new(&layout, Bitmap::new(blocks), 0, 0);
        map.reserve = 10;
        map
    }

    fn cache() -> BlockCache {
        BlockCache::new(1 << 20)
    }

    fn allocate(map: &mut SpaceMap, wanted: u64) -> Account {
        let mut account = Account::default();
        let (start, count) = map.take(wanted, Draw::Ordinary).unwrap();
        (start.0..start.0 + count).for_each(|pbn| {
            account.allocated.insert(Pbn(pbn));
        });
        account
    }

    #[test]
    fn ordinary_draws_stop_at_the_reserve_and_others_do_not() {
        let mut map = map(100);
        assert_eq!(map.take(1000, Draw::Ordinary), Some((Pbn(10), 90)));
        assert_eq!(map.take(1, Draw::Ordinary), None);
        assert!(map.hold(1).is_err());
        assert_eq!(map.take(4, Draw::Reserve), Some((Pbn(100), 4)));
        assert_eq!(map.report().free, BlockCount(6));
    }

    #[test]
    fn held_blocks_are_kept_from_others() {
        let mut map = map(100);
        map.hold(60).unwrap();
        assert_eq!(map.take(1000, Draw::Ordinary).unwrap().1, 30);
        assert_eq!(map.take(1000, Draw::Reserve).unwrap().1, 10);
        let mut held = 60;
        assert_eq!(map.take(40, Draw::Held(&mut held)).unwrap().1, 40);
        assert_eq!((held, map.report().held), (20, BlockCount(20)));
        assert_eq!(map.take(40, Draw::Held(&mut held)).unwrap().1, 20);
        assert_eq!(map.take(40, Draw::Held(&mut held)), None);
    }

    #[test]
    fn a_freed_block_is_busy_until_the_commit_is_durable() {
        let (mut map, cache, mut changes) = (map(100), cache(), MapChanges::default());
        let first = allocate(&mut map, 5);
        map.stage(&first, None, &mut changes).unwrap();
        map.finish(&cache, first, None);
        assert_eq!((map.report().used, map.report().in_flight), (BlockCount(5), BlockCount(0)));

        let mut second = Account::default();
        second.freed.entry(KEY).or_default().insert(Pbn(12), CpNumber(1));
        map.stage(&second, None, &mut changes).unwrap();
        assert_eq!((changes.taken, changes.freed.to_vec()), (BTreeSet::from([0]), vec![12]));
        assert_eq!((map.report().used, map.report().free), (BlockCount(4), BlockCount(95)));
        map.finish(&cache, second, None);
        assert_eq!(map.report().free, BlockCount(96));
    }

    #[test]
    fn freeing_what_is_not_published_is_refused_and_changes_nothing() {
        let (mut map, mut changes) = (map(100), MapChanges::default());
        let mut account = allocate(&mut map, 5);
        account.freed.entry(KEY).or_default().insert(Pbn(50), CpNumber(1));
        let met = map.stage(&account, None, &mut changes).unwrap_err();
        assert!(met.to_string().contains("block 50 was freed"), "{met}");
        assert_eq!((map.report().used, changes.taken.len()), (BlockCount(0), 0));
        assert!(changes.freed.is_empty());
    }

    /// Whole free stripes come first, wherever the search begins; then what is left of others.
    #[test]
    fn whole_stripes_are_given_out_first() {
        let mut map = map(400).striped(16);
        // The data begins with block 10: stripes begin at 16, 32 and so on.
        assert_eq!(map.take(64, Draw::Ordinary), Some((Pbn(16), 64)));
        assert_eq!(map.take(50, Draw::Ordinary), Some((Pbn(80), 48)));
        map.busy.insert(140 - 10);
        assert_eq!(
            map.take(16, Draw::Ordinary),
            Some((Pbn(144), 16)),
            "not 128, of which a part is used"
        );
        assert_eq!(map.take(5, Draw::Ordinary), Some((Pbn(160), 5)), "less than a stripe");
        assert_eq!(map.take(300, Draw::Ordinary), Some((Pbn(176), 224)));
        // No whole stripe is left.
        let (start, count) = map.take(16, Draw::Ordinary).unwrap();
        assert!(count < 16, "{count} at {start}");
    }

    #[test]
    fn the_longest_run_nearby_is_taken_and_the_search_wraps() {
        let mut map = map(400);
        (0..400).filter(|at| at % 10 == 0 && !(150..250).contains(at)).for_each(|at| {
            map.busy.insert(at);
        });
        map.cursor = 300;
        assert_eq!(map.take(80, Draw::Ordinary), Some((Pbn(151), 80)));
        map.cursor = 399;
        let (start, count) = map.take(64, Draw::Ordinary).unwrap();
        assert_eq!(count, 29, "no long run is left, the longest is taken: {start}");
    }
}
