//! A bounded cache of verified blocks, shared by all readers and writers of a pool.
//!
//! The volume tree keeps its nodes here. An entry is met only by a pointer that asks for the
//! same place, the same checksum and the same content hash, so a block that was freed and
//! written anew is never taken for the old one; entries of freed blocks are dropped besides.
//!
//! Second chance: a hit marks an entry, and the first unmarked one in order of arrival makes
//! room. Bounded in bytes; when in doubt it forgets.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::units::BLOCK_BYTES;
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::ContentHash;
use crate::units::numbers::Pbn;

use super::pointer::Pointer;

const SHARDS: usize = 16;
/// Bytes of an entry with its place in map and queue.
const ENTRY_BYTES: u64 = 4096 + 128;

#[derive(Debug)]
struct Entry {
    crc: u32,
    hash: ContentHash,
    bytes: Arc<[u8; BLOCK_BYTES]>,
    hit: bool,
}

#[derive(Debug, Default)]
struct Shard {
    entries: HashMap<u64, Entry>,
    order: VecDeque<u64>,
}

/// The cache.
#[derive(Debug)]
pub struct BlockCache {
    shards: Vec<Mutex<Shard>>,
    entries_max: usize,
}

impl BlockCache {
    /// A cache of about `bytes`; at least one block a shard.
    pub fn new(bytes: u64) -> Self {
        let entries_max = to_usize(bytes / ENTRY_BYTES / to_u64(SHARDS)).max(1);
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), entries_max }
    }

    fn shard(&self, pbn: Pbn) -> MutexGuard<'_, Shard> {
        let shard = to_usize(pbn.0 % to_u64(SHARDS));
        // A cache has no state that a panic could leave half done: each entry stands for itself.
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The block that `pointer` asks for, if it is here.
    pub fn get(&self, pointer: &Pointer) -> Option<Arc<[u8; BLOCK_BYTES]>> {
        let mut shard = self.shard(pointer.pbn);
        let entry = shard.entries.get_mut(&pointer.pbn.0)?;
        if (entry.crc, entry.hash) != (pointer.crc, pointer.hash) {
            return None;
        }
        entry.hit = true;
        Some(Arc::clone(&entry.bytes))
    }

    /// Keeps a block that was verified against `pointer`.
    pub fn insert(&self, pointer: &Pointer, bytes: Arc<[u8; BLOCK_BYTES]>) {
        let mut shard = self.shard(pointer.pbn);
        let entry = Entry { crc: pointer.crc, hash: pointer.hash, bytes, hit: false };
        if shard.entries.insert(pointer.pbn.0, entry).is_none() {
            shard.order.push_back(pointer.pbn.0);
        }
        shard.make_room(self.entries_max);
    }

    /// Drops what it has of a block that is no longer in use.
    pub fn forget(&self, pbn: Pbn) {
        self.shard(pbn).entries.remove(&pbn.0);
    }

    /// Blocks held.
    pub fn len(&self) -> usize {
        (0..SHARDS).map(|n| self.shard(Pbn(to_u64(n))).entries.len()).sum()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Shard {
    fn make_room(&mut self, entries_max: usize) {
        // Forgotten blocks stay in the order until their turn comes; when those are many, the
        // order is made anew, so that it is bounded as well.
        if self.order.len() > 2 * entries_max + 16 {
            let mut seen = std::collections::HashSet::new();
            self.order.retain(|pbn| self.entries.contains_key(pbn) && seen.insert(*pbn));
        }
        while self.entries.len() > entries_max {
            let Some(pbn) = self.order.pop_front() else { return };
            match self.entries.get_mut(&pbn) {
                Some(entry) if entry.hit => {
                    entry.hit = false;
                    self.order.push_back(pbn);
                }
                Some(_) => drop(self.entries.remove(&pbn)),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::numbers::CpNumber;

    fn pointer(pbn: u64, content: u8) -> Pointer {
        let hash = ContentHash([content; 16]);
        Pointer { pbn: Pbn(pbn), birth: CpNumber(1), crc: u32::from(content), hash }
    }

    fn block(content: u8) -> Arc<[u8; BLOCK_BYTES]> {
        Arc::new([content; BLOCK_BYTES])
    }

    #[test]
    fn another_content_at_the_same_place_is_not_met() {
        let cache = BlockCache::new(1 << 20);
        cache.insert(&pointer(5, 1), block(1));
        assert_eq!(cache.get(&pointer(5, 1)).unwrap()[0], 1);
        assert!(cache.get(&pointer(5, 2)).is_none());
        let same_crc = Pointer { crc: 1, ..pointer(5, 2) };
        assert!(cache.get(&same_crc).is_none(), "the checksum alone does not decide");
        cache.insert(&pointer(5, 2), block(2));
        assert!(cache.get(&pointer(5, 1)).is_none());
        cache.forget(Pbn(5));
        assert!(cache.get(&pointer(5, 2)).is_none());
    }

    #[test]
    fn it_is_bounded_and_keeps_what_is_used() {
        let cache = BlockCache::new(ENTRY_BYTES * 4 * 16);
        let used = pointer(0, 9);
        cache.insert(&used, block(9));
        for pbn in 1..1000 {
            assert!(cache.get(&used).is_some(), "block {pbn}");
            cache.insert(&pointer(pbn, 1), block(1));
            cache.forget(Pbn(pbn / 2 + 1));
        }
        assert!(cache.len() <= 4 * SHARDS);
        let order = cache.shards[0].lock().unwrap().order.len();
        assert!(order <= 2 * 4 + 16 + 1, "{order}");
    }
}
