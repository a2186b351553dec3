//! Sets of blocks, small when they are few and bounded by a bitmap when they are many.
//!
//! Write sets hold what they allocated and freed in them, pins what was freed behind them. A
//! trim of terabytes frees hundreds of millions of blocks; in a [`BlockSet`] each costs at most
//! two bytes, and a dense region one bit. [`FreedBlocks`] sorts them by birth, so that "what no
//! older CP has" is one split.

use std::collections::BTreeMap;

use crate::units::convert::to_u64;
use crate::units::numbers::{CpNumber, Pbn};

/// Blocks of one chunk.
const CHUNK_BLOCKS: u64 = 1 << 15;
/// Words of a dense chunk.
const CHUNK_WORDS: usize = 512;
/// From here on a bitmap is smaller than a list.
const SPARSE_MAX: usize = 2048;

const _: () = {
    assert!(CHUNK_BLOCKS == 512 * 64);
    assert!(SPARSE_MAX * 2 == CHUNK_WORDS * 8);
};

#[derive(Debug, Clone)]
enum Chunk {
    /// Sorted.
    Sparse(Vec<u16>),
    Dense(Box<[u64; CHUNK_WORDS]>),
}

impl Chunk {
    fn insert(&mut self, at: u16) -> bool {
        match self {
            Self::Sparse(list) => {
                let Err(place) = list.binary_search(&at) else { return false };
                if list.len() < SPARSE_MAX {
                    list.insert(place, at);
                    return true;
                }
                let mut words = Box::new([0; CHUNK_WORDS]);
                for &block in list.iter() {
                    words[usize::from(block / 64)] |= 1 << (block % 64);
                }
                words[usize::from(at / 64)] |= 1 << (at % 64);
                *self = Self::Dense(words);
                true
            }
            Self::Dense(words) => {
                let (word, bit) = (&mut words[usize::from(at / 64)], 1 << (at % 64));
                let new = *word & bit == 0;
                *word |= bit;
                new
            }
        }
    }

    fn contains(&self, at: u16) -> bool {
        match self {
            Self::Sparse(list) => list.binary_search(&at).is_ok(),
            Self::Dense(words) => words[usize::from(at / 64)] & (1 << (at % 64)) != 0,
        }
    }

    fn for_each(&self, mut visit: impl FnMut(u16)) {
        match self {
            Self::Sparse(list) => list.iter().copied().for_each(visit),
            Self::Dense(words) => {
                for (index, word) in (0u16..).zip(words.iter()) {
                    let mut rest = *word;
                    while rest != 0 {
                        let [bit, ..] = rest.trailing_zeros().to_le_bytes();
                        visit(index * 64 + u16::from(bit));
                        rest &= rest - 1;
                    }
                }
            }
        }
    }
}

/// Where a block stands: its chunk and its place there.
fn split(pbn: Pbn) -> (u64, u16) {
    let [low, high, ..] = (pbn.0 % CHUNK_BLOCKS).to_le_bytes();
    (pbn.0 / CHUNK_BLOCKS, u16::from_le_bytes([low, high]))
}

/// A set of blocks.
#[derive(Debug, Clone, Default)]
pub struct BlockSet {
    chunks: BTreeMap<u64, Chunk>,
    count: u64,
}

impl BlockSet {
    /// Adds a block; false if it was there.
    pub fn insert(&mut self, pbn: Pbn) -> bool {
        let (chunk, at) = split(pbn);
        let chunk = self.chunks.entry(chunk).or_insert_with(|| Chunk::Sparse(Vec::new()));
        let new = chunk.insert(at);
        self.count += u64::from(new);
        new
    }

    /// Whether it is there.
    pub fn contains(&self, pbn: Pbn) -> bool {
        let (chunk, at) = split(pbn);
        self.chunks.get(&chunk).is_some_and(|chunk| chunk.contains(at))
    }

    /// How many blocks.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Visits all, rising.
    pub fn for_each(&self, mut visit: impl FnMut(Pbn)) {
        for (chunk, blocks) in &self.chunks {
            blocks.for_each(|at| visit(Pbn(chunk * CHUNK_BLOCKS + u64::from(at))));
        }
    }

    /// Adds all of `other`.
    pub fn extend(&mut self, other: &Self) {
        other.for_each(|pbn| {
            self.insert(pbn);
        });
    }

    /// Bytes held, about: what bounds and tests look at.
    pub fn memory_bytes(&self) -> u64 {
        let chunk = |chunk: &Chunk| match chunk {
            Chunk::Sparse(list) => list.capacity() * 2,
            Chunk::Dense(_) => CHUNK_WORDS * 8,
        };
        to_u64(self.chunks.values().map(|blocks| chunk(blocks) + 64).sum::<usize>())
    }

    /// All, rising: for small sets in tests.
    #[cfg(test)]
    pub(crate) fn to_vec(&self) -> Vec<u64> {
        let mut all = Vec::new();
        self.for_each(|pbn| all.push(pbn.0));
        all
    }
}

/// Blocks freed behind a CP, by birth.
#[derive(Debug, Clone, Default)]
pub struct FreedBlocks {
    by_birth: BTreeMap<CpNumber, BlockSet>,
    count: u64,
}

impl FreedBlocks {
    /// Adds a block of that birth; false if it was there.
    pub fn insert(&mut self, pbn: Pbn, birth: CpNumber) -> bool {
        let new = self.by_birth.entry(birth).or_default().insert(pbn);
        self.count += u64::from(new);
        new
    }

    /// How many blocks.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Visits all.
    pub fn for_each(&self, mut visit: impl FnMut(Pbn)) {
        self.by_birth.values().for_each(|blocks| blocks.for_each(&mut visit));
    }

    /// Visits all with their births.
    pub fn for_each_born(&self, mut visit: impl FnMut(Pbn, CpNumber)) {
        for (birth, blocks) in &self.by_birth {
            blocks.for_each(|pbn| visit(pbn, *birth));
        }
    }

    /// Whether a block of that birth is there.
    pub fn contains(&self, pbn: Pbn, birth: CpNumber) -> bool {
        self.by_birth.get(&birth).is_some_and(|blocks| blocks.contains(pbn))
    }

    /// Takes out the blocks born after `cp`: those that a tree of `cp` does not have.
    pub fn split_born_after(&mut self, cp: CpNumber) -> Self {
        let by_birth = match cp.0.checked_add(1) {
            Some(next) => self.by_birth.split_off(&CpNumber(next)),
            None => BTreeMap::new(),
        };
        let count = by_birth.values().map(BlockSet::len).sum();
        self.count -= count;
        Self { by_birth, count }
    }

    /// The blocks born up to `cp`: those that a tree of `cp` has, if it had not lost them before.
    pub fn born_upto(&self, cp: CpNumber) -> Self {
        let by_birth: BTreeMap<_, _> =
            self.by_birth.range(..=cp).map(|(birth, blocks)| (*birth, blocks.clone())).collect();
        let count = by_birth.values().map(BlockSet::len).sum();
        Self { by_birth, count }
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: Self) {
        for (birth, blocks) in other.by_birth {
            let own = self.by_birth.entry(birth).or_default();
            let before = own.len();
            if own.is_empty() {
                *own = blocks;
            } else {
                own.extend(&blocks);
            }
            self.count += own.len() - before;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::pool::testing::Chance;

    /// Goal: sparse, dense and the turn from one to the other agree with a plain set.
    /// Method: random blocks in a few chunks, until chunks are dense.
    #[test]
    fn a_set_agrees_with_a_plain_set() {
        let mut chance = Chance::new(1);
        let (mut set, mut plain) = (BlockSet::default(), BTreeSet::new());
        for _ in 0..20_000 {
            let pbn = chance.below(3 * CHUNK_BLOCKS / 2);
            assert_eq!(set.insert(Pbn(pbn)), plain.insert(pbn));
            assert_eq!(set.len(), to_u64(plain.len()));
        }
        assert!(set.chunks.values().all(|chunk| matches!(chunk, Chunk::Dense(_))));
        assert_eq!(set.to_vec(), plain.iter().copied().collect::<Vec<_>>());
        for pbn in 0..2 * CHUNK_BLOCKS {
            assert_eq!(set.contains(Pbn(pbn)), plain.contains(&pbn));
        }
        let mut sum = BlockSet::default();
        sum.insert(Pbn(u64::from(u32::MAX) * 9));
        sum.extend(&set);
        assert_eq!(sum.len(), set.len() + 1);
    }

    #[test]
    fn a_million_blocks_cost_at_most_two_bytes_each() {
        let mut chance = Chance::new(2);
        let mut set = BlockSet::default();
        while set.len() < 1_000_000 {
            set.insert(Pbn(chance.below(1 << 28)));
        }
        assert!(set.memory_bytes() < 4_000_000, "{} bytes", set.memory_bytes());
        let mut dense = BlockSet::default();
        (0..1_000_000).for_each(|pbn| {
            dense.insert(Pbn(pbn));
        });
        assert!(dense.memory_bytes() < 200_000, "{} bytes", dense.memory_bytes());
    }

    #[test]
    fn freed_blocks_split_by_birth() {
        let mut freed = FreedBlocks::default();
        for (pbn, birth) in [(1, 1), (2, 2), (3, 3), (4, 3)] {
            assert!(freed.insert(Pbn(pbn), CpNumber(birth)));
        }
        assert!(!freed.insert(Pbn(4), CpNumber(3)));
        let young = freed.split_born_after(CpNumber(2));
        assert_eq!((freed.len(), young.len()), (2, 2));
        freed.merge(young);
        assert_eq!(freed.len(), 4);
        assert!(freed.split_born_after(CpNumber(u32::MAX)).is_empty());
        let mut all = Vec::new();
        freed.for_each(|pbn| all.push(pbn.0));
        assert_eq!(all, [1, 2, 3, 4]);
    }
}
