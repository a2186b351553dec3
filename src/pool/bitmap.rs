//! A bitmap over the data blocks of a pool, in pages.
//!
//! A page is what the catalog stores: 503 words, which with its key and checksum fill one 4 KiB
//! page of the catalog's database. The bitmap counts the set bits of each page, so that a search
//! for free blocks skips full ones. Indexes count from the first data block.
//!
//! Pure memory. Bits past the end are never set.

use crate::units::convert::{to_u64, to_usize};

/// Words of a page. Unit tests shrink it, so that small pools have many.
pub const PAGE_WORDS: usize = if cfg!(test) { 6 } else { 503 };
/// Bytes of a page's bits.
pub const PAGE_BITS_BYTES: usize = PAGE_WORDS * 8;
/// Blocks of a page.
pub const PAGE_BLOCKS: u64 = to_u64(PAGE_WORDS) * 64;

/// A number of blocks side by side, by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first.
    pub start: u64,
    /// How many; never 0.
    pub count: u64,
}

/// One bit a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    blocks: u64,
    words: Vec<u64>,
    set_in_page: Vec<u64>,
    set: u64,
}

fn word_of(index: u64) -> (usize, u64) {
    (to_usize(index / 64), 1 << (index % 64))
}

impl Bitmap {
    /// All clear. `blocks` comes from a checked label.
    pub fn new(blocks: u64) -> Self {
        let pages = to_usize(blocks.div_ceil(PAGE_BLOCKS));
        Self { blocks, words: vec![0; pages * PAGE_WORDS], set_in_page: vec![0; pages], set: 0 }
    }

    /// The same with more blocks, which are clear. Never fewer.
    pub fn grow(&mut self, blocks: u64) {
        assert!(
            blocks >= self.blocks,
            "a map of {} blocks does not shrink to {blocks}",
            self.blocks
        );
        let pages = to_usize(blocks.div_ceil(PAGE_BLOCKS));
        self.words.resize(pages * PAGE_WORDS, 0);
        self.set_in_page.resize(pages, 0);
        self.blocks = blocks;
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        to_u64(self.set_in_page.len())
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Number of set bits.
    pub fn count(&self) -> u64 {
        self.set
    }

    /// The page of a block.
    pub const fn page_of(index: u64) -> u64 {
        index / PAGE_BLOCKS
    }

    /// Whether a block's bit is set; blocks past the end have none.
    pub fn get(&self, index: u64) -> bool {
        let (word, bit) = word_of(index);
        index < self.blocks && self.words[word] & bit != 0
    }

    /// Sets a bit; false if it was set.
    pub fn insert(&mut self, index: u64) -> bool {
        assert!(index < self.blocks, "block {index} of {}", self.blocks);
        let (word, bit) = word_of(index);
        let new = self.words[word] & bit == 0;
        if new {
            self.words[word] |= bit;
            self.set_in_page[to_usize(Self::page_of(index))] += 1;
            self.set += 1;
        }
        new
    }

    /// Clears a bit; false if it was clear.
    pub fn remove(&mut self, index: u64) -> bool {
        assert!(index < self.blocks, "block {index} of {}", self.blocks);
        let (word, bit) = word_of(index);
        let was = self.words[word] & bit != 0;
        if was {
            self.words[word] &= !bit;
            self.set_in_page[to_usize(Self::page_of(index))] -= 1;
            self.set -= 1;
        }
        was
    }

    /// The bits of a page, little-endian words.
    pub fn page_bits(&self, page: u64) -> [u8; PAGE_BITS_BYTES] {
        let mut bits = [0; PAGE_BITS_BYTES];
        let words = &self.words[to_usize(page) * PAGE_WORDS..][..PAGE_WORDS];
        for (bytes, word) in bits.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bits
    }

    /// Sets a page's bits. False, and nothing done, if a bit past the end is among them.
    pub fn load_page(&mut self, page: u64, bits: &[u8; PAGE_BITS_BYTES]) -> bool {
        if page >= self.pages() {
            return false;
        }
        let first = page * PAGE_BLOCKS;
        let past = |at: u64| first + at >= self.blocks;
        let byte = |at: u64| bits[to_usize(at / 8)] & (1 << (at % 8)) != 0;
        let end = (self.blocks - first).min(PAGE_BLOCKS);
        if (end..PAGE_BLOCKS).any(|at| past(at) && byte(at)) {
            return false;
        }
        let mut set = 0;
        let words = &mut self.words[to_usize(page) * PAGE_WORDS..][..PAGE_WORDS];
        for (word, bytes) in words.iter_mut().zip(bits.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
            set += u64::from(word.count_ones());
        }
        let old = &mut self.set_in_page[to_usize(page)];
        self.set = self.set - *old + set;
        *old = set;
        true
    }

    /// Visits the set bits, rising.
    pub fn for_each(&self, mut visit: impl FnMut(u64)) {
        for (index, word) in self.words.iter().enumerate() {
            let mut rest = *word;
            while rest != 0 {
                visit(to_u64(index) * 64 + u64::from(rest.trailing_zeros()));
                rest &= rest - 1;
            }
        }
    }

    /// The first clear extent at or behind `from`, at most `most` blocks of it.
    pub fn clear_extent(&self, from: u64, most: u64) -> Option<Extent> {
        let start = self.next_clear(from)?;
        let end = start.saturating_add(most).min(self.blocks);
        Some(Extent { start, count: self.next_set(start, end) - start })
    }

    fn next_clear(&self, from: u64) -> Option<u64> {
        let mut at = from;
        while at < self.blocks {
            let page = Self::page_of(at);
            if self.set_in_page[to_usize(page)] == PAGE_BLOCKS {
                at = (page + 1) * PAGE_BLOCKS;
                continue;
            }
            let clear = !self.words[to_usize(at / 64)] >> (at % 64);
            if clear != 0 {
                let found = at + u64::from(clear.trailing_zeros());
                return (found < self.blocks).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    fn next_set(&self, from: u64, end: u64) -> u64 {
        let mut at = from;
        while at < end {
            let set = self.words[to_usize(at / 64)] >> (at % 64);
            if set != 0 {
                return (at + u64::from(set.trailing_zeros())).min(end);
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::pool::testing::Chance;

    /// Goal: counts and searches agree with a plain set of clear blocks.
    /// Method: random sets and clears over two pages and a rest, every search compared.
    #[test]
    fn a_bitmap_agrees_with_a_plain_set() {
        let blocks = 20 * PAGE_BLOCKS + 77;
        let mut chance = Chance::new(3);
        let (mut bitmap, mut plain) = (Bitmap::new(blocks), BTreeSet::new());
        for round in 0..40 {
            for _ in 0..500 {
                let start = chance.below(blocks);
                for index in start..(start + chance.below(40)).min(blocks) {
                    if round % 4 == 3 {
                        assert_eq!(bitmap.remove(index), plain.remove(&index));
                    } else {
                        assert_eq!(bitmap.insert(index), plain.insert(index));
                    }
                }
            }
            assert_eq!(bitmap.count(), to_u64(plain.len()));
            for _ in 0..50 {
                let (from, most) = (chance.below(blocks + 9), 1 + chance.below(300));
                let wanted = (from..blocks).find(|at| !plain.contains(at)).map(|start| {
                    let end = (start + most).min(blocks);
                    let end = (start..end).find(|at| plain.contains(at)).unwrap_or(end);
                    Extent { start, count: end - start }
                });
                assert_eq!(bitmap.clear_extent(from, most), wanted, "from {from} most {most}");
            }
        }
        let mut seen = Vec::new();
        bitmap.for_each(|index| seen.push(index));
        assert_eq!(seen, plain.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn a_bitmap_that_grows_is_the_larger_one_with_the_same_bits() {
        for (from, to) in [(5, 5), (5, 77), (PAGE_BLOCKS, PAGE_BLOCKS + 1), (7, 5 * PAGE_BLOCKS)] {
            let (mut small, mut large) = (Bitmap::new(from), Bitmap::new(to));
            for index in (0..from).step_by(3) {
                small.insert(index);
                large.insert(index);
            }
            small.grow(to);
            assert_eq!(small, large, "{from} to {to}");
            assert!(small.insert(to - 1) || (to - 1) % 3 == 0);
        }
    }

    #[test]
    fn pages_survive_and_bits_past_the_end_are_refused() {
        let mut bitmap = Bitmap::new(PAGE_BLOCKS + 3);
        for index in [0, 5, PAGE_BLOCKS - 1, PAGE_BLOCKS, PAGE_BLOCKS + 2] {
            bitmap.insert(index);
        }
        let mut copy = Bitmap::new(PAGE_BLOCKS + 3);
        for page in 0..2 {
            assert!(copy.load_page(page, &bitmap.page_bits(page)));
        }
        assert_eq!(copy, bitmap);
        assert!(!copy.load_page(2, &[0; PAGE_BITS_BYTES]));
        let mut bits = bitmap.page_bits(1);
        bits[0] |= 1 << 3;
        assert!(!copy.load_page(1, &bits));
        bits[0] &= 7;
        bits[PAGE_BITS_BYTES - 1] = 0x80;
        assert!(!copy.load_page(1, &bits));
    }
}
