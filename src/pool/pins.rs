//! Pinned CPs: what readers still see after newer CPs were published (R18).
//!
//! A pin is an unnamed kept CP of one volume, in memory only: at a restart nobody reads. All
//! readers of one volume at one CP share one entry. Blocks that a later CP frees while the entry
//! needs them stand in its **deadlist**; when it goes, they move to the next older entry that
//! was there when they were born, and the rest are no pin's. Blocks that a CP kept by name has as
//! well stand here too; the free map knows them by their stored bit, so `space` tells the two
//! apart. A **firm** pin is not given up for space: a drop holds one while it compares trees.
//!
//! Pure memory, under the pool's state lock. Invariant: a block stands in at most one deadlist:
//! that of the newest pinned CP that has it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::limits::PINS_MAX;
use crate::units::convert::to_u64;
use crate::units::numbers::{CpNumber, Pbn};

use super::blockset::FreedBlocks;
use super::error::PoolError;
use super::pointer::{TreeRoot, VolumeKey};

/// One pinned CP of one volume.
#[derive(Debug)]
struct PinnedCp {
    id: u64,
    tree: TreeRoot,
    handles: u64,
    /// Handles that forbid giving it up.
    firm: u64,
    dead: FreedBlocks,
    ended: Arc<AtomicBool>,
}

/// Names one entry, so that a handle of an ended one does not touch its successor.
#[derive(Debug, Clone)]
pub(super) struct PinName {
    pub(super) key: VolumeKey,
    pub(super) cp: CpNumber,
    id: u64,
    ended: Arc<AtomicBool>,
}

impl PinName {
    /// Whether the pool gave the entry up.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// All pinned CPs.
#[derive(Debug, Default)]
pub(super) struct Pins {
    by_volume: HashMap<VolumeKey, BTreeMap<CpNumber, PinnedCp>>,
    by_age: BTreeMap<u64, (VolumeKey, CpNumber)>,
    next_id: u64,
    handles: u64,
    dead: u64,
    ended: u64,
}

impl Pins {
    /// Refuses one more reader when there are too many.
    pub(super) fn refuse_more(&self) -> Result<(), PoolError> {
        let (met, max) = (self.handles + 1, to_u64(PINS_MAX));
        if met > max { Err(PoolError::Limit { what: "pins", met, max }) } else { Ok(()) }
    }

    /// One more reader of a volume at a CP.
    pub(super) fn add(&mut self, key: VolumeKey, cp: CpNumber, tree: TreeRoot) -> PinName {
        let (next_id, by_age) = (&mut self.next_id, &mut self.by_age);
        let entry = self.by_volume.entry(key).or_default().entry(cp).or_insert_with(|| {
            let id = *next_id;
            *next_id += 1;
            by_age.insert(id, (key, cp));
            let (dead, ended) = (FreedBlocks::default(), Arc::default());
            PinnedCp { id, tree, handles: 0, firm: 0, dead, ended }
        });
        entry.handles += 1;
        self.handles += 1;
        PinName { key, cp, id: entry.id, ended: Arc::clone(&entry.ended) }
    }

    /// From now on the entry is not given up for space.
    pub(super) fn make_firm(&mut self, name: &PinName) {
        if let Some(entry) = self.named(name) {
            entry.firm += 1;
        }
    }

    /// Takes that back.
    pub(super) fn unmake_firm(&mut self, name: &PinName) {
        if let Some(entry) = self.named(name) {
            assert!(entry.firm > 0, "a pin is not firm that was to be");
            entry.firm -= 1;
        }
    }

    fn named(&mut self, name: &PinName) -> Option<&mut PinnedCp> {
        let entry = self.by_volume.get_mut(&name.key).and_then(|cps| cps.get_mut(&name.cp))?;
        (entry.id == name.id).then_some(entry)
    }

    /// Whether a block that a later CP freed stands in a deadlist here.
    pub(super) fn have(&self, key: VolumeKey, pbn: Pbn, birth: CpNumber) -> bool {
        let cps = self.by_volume.get(&key);
        cps.is_some_and(|cps| cps.values().any(|entry| entry.dead.contains(pbn, birth)))
    }

    /// One reader less. Returns what is free now.
    pub(super) fn release(&mut self, name: &PinName) -> FreedBlocks {
        self.handles -= 1;
        let Some(entry) = self.by_volume.get_mut(&name.key).and_then(|cps| cps.get_mut(&name.cp))
        else {
            return FreedBlocks::default();
        };
        if entry.id != name.id {
            return FreedBlocks::default();
        }
        entry.handles -= 1;
        if entry.handles > 0 { FreedBlocks::default() } else { self.remove(name.key, name.cp) }
    }

    /// Gives up the entry that was made first, its readers notwithstanding. Returns what is free
    /// now, or `None` if there is none that may be given up.
    pub(super) fn end_oldest(&mut self) -> Option<FreedBlocks> {
        let firm = |key: &VolumeKey, cp: &CpNumber| {
            let entry = self.by_volume.get(key).and_then(|cps| cps.get(cp));
            entry.is_some_and(|entry| entry.firm > 0)
        };
        let oldest = self.by_age.iter().find(|(_, (key, cp))| !firm(key, cp));
        let (&id, &(key, cp)) = oldest?;
        if let Some(entry) = self.by_volume.get(&key).and_then(|cps| cps.get(&cp)) {
            debug_assert_eq!(entry.id, id);
            entry.ended.store(true, Ordering::Release);
        }
        self.ended += 1;
        Some(self.remove(key, cp))
    }

    /// A later CP freed these. Keeps what a pinned CP has and returns what is free now.
    pub(super) fn keep(&mut self, key: VolumeKey, mut freed: FreedBlocks) -> FreedBlocks {
        let newest = self.by_volume.get_mut(&key).and_then(|cps| cps.last_entry());
        let Some(mut newest) = newest else { return freed };
        let young = freed.split_born_after(*newest.key());
        self.dead += freed.len();
        newest.get_mut().dead.merge(freed);
        young
    }

    /// Blocks in all deadlists: no published tree has them.
    pub(super) fn dead_blocks(&self) -> u64 {
        self.dead
    }

    /// Readers, and entries given up so far.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.handles, self.ended)
    }

    /// Visits volume, CP and tree of every entry.
    pub(super) fn for_each(&self, mut visit: impl FnMut(VolumeKey, CpNumber, TreeRoot)) {
        for (key, cps) in &self.by_volume {
            cps.iter().for_each(|(cp, entry)| visit(*key, *cp, entry.tree));
        }
    }

    fn remove(&mut self, key: VolumeKey, cp: CpNumber) -> FreedBlocks {
        let Some(cps) = self.by_volume.get_mut(&key) else { return FreedBlocks::default() };
        let Some(entry) = cps.remove(&cp) else { return FreedBlocks::default() };
        self.by_age.remove(&entry.id);
        let mut free = entry.dead;
        if let Some((older_cp, older)) = cps.range_mut(..cp).next_back() {
            let young = free.split_born_after(*older_cp);
            older.dead.merge(free);
            free = young;
        }
        if cps.is_empty() {
            self.by_volume.remove(&key);
        }
        self.dead -= free.len();
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ids::SourceId;
    use crate::units::numbers::{ByteCount, VolumeNumber};

    const KEY: VolumeKey = VolumeKey { source: SourceId([1; 16]), volume: VolumeNumber(1) };

    fn freed(blocks: &[(u64, u32)]) -> FreedBlocks {
        let mut freed = FreedBlocks::default();
        for &(pbn, birth) in blocks {
            assert!(freed.insert(Pbn(pbn), CpNumber(birth)));
        }
        freed
    }

    fn numbers(freed: &FreedBlocks) -> Vec<u64> {
        let mut all = Vec::new();
        freed.for_each(|pbn| all.push(pbn.0));
        all.sort_unstable();
        all
    }

    fn pin(pins: &mut Pins, cp: u32) -> PinName {
        pins.add(KEY, CpNumber(cp), TreeRoot::empty(ByteCount(4096)))
    }

    #[test]
    fn a_freed_block_waits_for_the_newest_cp_that_has_it_then_for_older_ones() {
        let mut pins = Pins::default();
        let old = pin(&mut pins, 3);
        let new = pin(&mut pins, 5);
        // Born after both, between them, before both.
        let free = pins.keep(KEY, freed(&[(1, 6), (2, 4), (3, 2)]));
        assert_eq!((numbers(&free), pins.dead_blocks()), (vec![1], 2));
        assert_eq!(numbers(&pins.release(&new)), [2]);
        assert_eq!(pins.dead_blocks(), 1);
        assert_eq!(numbers(&pins.release(&old)), [3]);
        assert_eq!((pins.dead_blocks(), pins.counts()), (0, (0, 0)));
    }

    #[test]
    fn readers_of_one_cp_share_it_and_an_ended_one_is_told() {
        let mut pins = Pins::default();
        let (first, second) = (pin(&mut pins, 3), pin(&mut pins, 3));
        assert!(pins.keep(KEY, freed(&[(7, 1)])).is_empty());
        assert!(pins.release(&first).is_empty());
        assert!(!second.has_ended());
        assert_eq!(numbers(&pins.end_oldest().unwrap()), [7]);
        assert!(second.has_ended());
        // A new reader of the same CP is not hurt by the old handle.
        let third = pin(&mut pins, 3);
        assert!(pins.release(&second).is_empty());
        assert!(!third.has_ended());
        assert!(pins.keep(KEY, freed(&[(8, 1)])).is_empty());
        assert_eq!(numbers(&pins.release(&third)), [8]);
        assert!(pins.end_oldest().is_none());
    }

    #[test]
    fn a_firm_pin_is_not_given_up() {
        let mut pins = Pins::default();
        let (firm, other) = (pin(&mut pins, 3), pin(&mut pins, 5));
        pins.make_firm(&firm);
        assert!(pins.keep(KEY, freed(&[(1, 4), (2, 1)])).is_empty());
        assert!(pins.have(KEY, Pbn(2), CpNumber(1)));
        assert!(!pins.have(KEY, Pbn(2), CpNumber(2)));
        assert_eq!(numbers(&pins.end_oldest().unwrap()), [1], "the younger one goes");
        assert!(other.has_ended() && !firm.has_ended());
        assert!(pins.end_oldest().is_none());
        pins.unmake_firm(&firm);
        assert_eq!(numbers(&pins.end_oldest().unwrap()), [2]);
        assert!(!pins.have(KEY, Pbn(2), CpNumber(1)));
    }

    #[test]
    fn other_volumes_do_not_keep_a_block() {
        let mut pins = Pins::default();
        let _pin = pin(&mut pins, 3);
        let other = VolumeKey { volume: VolumeNumber(2), ..KEY };
        assert_eq!(numbers(&pins.keep(other, freed(&[(1, 1)]))), [1]);
    }
}
