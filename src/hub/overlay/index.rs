//! Which bytes of a source's volumes its log holds, the newest first: headers only, no data.
//!
//! Pure. Built transfer by transfer, in order; what is newer cuts what is older. A range of bytes
//! leads to an entry of a transfer of a log, or says that it is zero.
//!
//! Invariants: ranges of a volume are not empty, do not overlap, and rise; there are never more of
//! them than the index may hold ([`Full`]), so its memory is bounded before the log is read.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::limits::{OVERLAY_EXTENT_BYTES, OVERLAY_EXTENTS_MAX, TRANSFER_ENTRIES_MAX};
use crate::record::entry::{Entry, EntryKind};
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::to_u64;
use crate::units::numbers::VolumeNumber;

/// An entry in the logs of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which log.
    pub log: u16,
    /// Which transfer in it, from 0.
    pub transfer: u32,
    /// Which entry of that.
    pub entry: u16,
}

/// Where the bytes of a range are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Zero.
    Zero,
    /// In the data of that entry, from byte `skip` on.
    Data { place: Place, skip: u32 },
}

impl Found {
    /// The same, so many bytes further on. A write's data is shorter than 4 GiB, and so is `by`.
    fn after(self, by: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Data { place, skip } => {
                let skip = u64::from(skip) + by;
                let Ok(skip) = u32::try_from(skip) else { panic!("byte {skip} of an entry") };
                Self::Data { place, skip }
            }
        }
    }
}

/// More ranges than an index may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the log's entries make more than {most} ranges of bytes")]
pub struct Full {
    /// What it may hold.
    pub most: u64,
}

#[derive(Debug, Clone, Copy)]
struct Range {
    end: u64,
    found: Found,
}

const _: () = {
    // Key and value, in a tree whose nodes are at least half full, with what a node takes itself.
    assert!((8 + to_u64(size_of::<Range>())) * 3 / 2 <= OVERLAY_EXTENT_BYTES);
    assert!(TRANSFER_ENTRIES_MAX <= 1 << 16, "the number of an entry fits its field");
};

/// What the entries of a log have made of the volumes.
#[derive(Debug)]
pub struct Index {
    volumes: BTreeMap<VolumeNumber, BTreeMap<u64, Range>>,
    ranges: u64,
    most: u64,
}

impl Default for Index {
    fn default() -> Self {
        Self::new(OVERLAY_EXTENTS_MAX)
    }
}

impl Index {
    /// An index of at most so many ranges.
    pub fn new(most: u64) -> Self {
        Self { volumes: BTreeMap::new(), ranges: 0, most }
    }

    /// Ranges held.
    pub fn ranges(&self) -> u64 {
        self.ranges
    }

    /// Adds the next entry. After an error the index is of no use.
    pub fn add(&mut self, entry: &Entry, place: Place) -> Result<(), Full> {
        let (start, end) = match entry.kind {
            EntryKind::Write | EntryKind::Zeroes => (entry.offset, entry.end()),
            EntryKind::Trim => {
                let (first, count) = entry.whole_blocks();
                (first * BLOCK_BYTES_U64, (first + count) * BLOCK_BYTES_U64)
            }
        };
        let found = match entry.kind {
            EntryKind::Write => Found::Data { place, skip: 0 },
            EntryKind::Trim | EntryKind::Zeroes => Found::Zero,
        };
        let volume = self.volumes.entry(entry.volume).or_default();
        let before = volume.len();
        cut(volume, start, end);
        if start < end {
            volume.insert(start, Range { end, found });
        }
        self.ranges = self.ranges + to_u64(volume.len()) - to_u64(before);
        if self.ranges > self.most { Err(Full { most: self.most }) } else { Ok(()) }
    }

    /// What is known of `start..end` of a volume, rising: start and end of each part, and where
    /// its bytes are.
    pub fn within(
        &self,
        volume: VolumeNumber,
        start: u64,
        end: u64,
    ) -> impl Iterator<Item = (u64, u64, Found)> {
        let ranges = self.volumes.get(&volume);
        let first = ranges.and_then(|ranges| ranges.range(..=start).next_back());
        let rest = ranges.map(|ranges| {
            let behind = (Bound::Excluded(start), Bound::Excluded(end.max(start + 1)));
            ranges.range(behind)
        });
        first.into_iter().chain(rest.into_iter().flatten()).filter_map(move |(&from, range)| {
            let (at, until) = (from.max(start), range.end.min(end));
            (at < until).then(|| (at, until, range.found.after(at - from)))
        })
    }

    /// Blocks that hold anything of it: what its tree will write at most, nodes not counted.
    pub fn blocks(&self) -> u64 {
        let of = |ranges: &BTreeMap<u64, Range>| {
            let (mut blocks, mut next) = (0, 0);
            for (&start, range) in ranges {
                let first = (start / BLOCK_BYTES_U64).max(next);
                let behind = range.end.div_ceil(BLOCK_BYTES_U64).max(first);
                if matches!(range.found, Found::Data { .. }) {
                    (blocks, next) = (blocks + behind - first, behind);
                }
            }
            blocks
        };
        self.volumes.values().map(of).sum()
    }
}

/// Takes `start..end` out of what is held.
fn cut(ranges: &mut BTreeMap<u64, Range>, start: u64, end: u64) {
    if start >= end {
        return;
    }
    let before = ranges.range_mut(..start).next_back();
    if let Some((&from, range)) = before
        && range.end > start
    {
        let whole = *range;
        range.end = start;
        if whole.end > end {
            ranges.insert(end, Range { end: whole.end, found: whole.found.after(end - from) });
            return;
        }
    }
    while let Some((&from, &range)) = ranges.range(start..end).next() {
        ranges.remove(&from);
        if range.end > end {
            ranges.insert(end, Range { end: range.end, found: range.found.after(end - from) });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VOLUME: VolumeNumber = VolumeNumber(3);
    const BYTES: u64 = 5 * BLOCK_BYTES_U64;

    fn entry(kind: EntryKind, offset: u64, length: u32) -> Entry {
        Entry { kind, volume: VOLUME, offset, length, crc: 0 }
    }

    fn place(n: u32) -> Place {
        Place { log: 1, transfer: n, entry: 2 }
    }

    /// Where each byte is: nothing, zero, or byte `.1` of transfer `.0`.
    type Bytes = Vec<Option<Option<(u32, u64)>>>;

    fn of(index: &Index, start: u64, end: u64) -> Bytes {
        let mut out = vec![None; usize::try_from(end - start).unwrap()];
        let mut last = start;
        for (from, to, found) in index.within(VOLUME, start, end) {
            assert!(last <= from && from < to && to <= end, "parts rise and lie inside");
            last = to;
            for at in from..to {
                let byte = match found {
                    Found::Zero => None,
                    Found::Data { place, skip } => {
                        Some((place.transfer, u64::from(skip) + at - from))
                    }
                };
                out[usize::try_from(at - start).unwrap()] = Some(byte);
            }
        }
        out
    }

    proptest! {
        /// Against one cell a byte.
        #[test]
        fn agrees_with_an_array(
            steps in prop::collection::vec((0..3_u8, 0..BYTES - 1, 1..9000_u64), 0..14),
            (from, span) in (0..BYTES, 1..BYTES),
        ) {
            let mut index = Index::default();
            let mut oracle: Bytes = vec![None; usize::try_from(BYTES).unwrap()];
            for (n, (kind, offset, length)) in (0..).zip(steps) {
                let end = (offset + length).min(BYTES);
                let length = u32::try_from(end - offset).unwrap();
                let kind =
                    [EntryKind::Write, EntryKind::Trim, EntryKind::Zeroes][usize::from(kind)];
                let entry = entry(kind, offset, length);
                index.add(&entry, place(n)).unwrap();
                let (first, count) = entry.whole_blocks();
                let trimmed = first * BLOCK_BYTES_U64..(first + count) * BLOCK_BYTES_U64;
                for at in offset..end {
                    let cell = &mut oracle[usize::try_from(at).unwrap()];
                    match kind {
                        EntryKind::Write => *cell = Some(Some((n, at - offset))),
                        EntryKind::Zeroes => *cell = Some(None),
                        EntryKind::Trim if trimmed.contains(&at) => *cell = Some(None),
                        EntryKind::Trim => {}
                    }
                }
            }
            prop_assert_eq!(of(&index, 0, BYTES), oracle.clone());
            let until = (from + span).min(BYTES);
            let part = usize::try_from(from).unwrap()..usize::try_from(until).unwrap();
            prop_assert_eq!(of(&index, from, until), &oracle[part]);
            let held: u64 = index.volumes.values().map(|ranges| to_u64(ranges.len())).sum();
            prop_assert_eq!(index.ranges(), held);
            let with_data = oracle.chunks(4096).filter(|block| {
                block.iter().any(|cell| matches!(cell, Some(Some(_))))
            });
            prop_assert_eq!(index.blocks(), to_u64(with_data.count()));
        }
    }

    /// The bound holds whatever comes, and is told.
    #[test]
    fn it_never_holds_more_than_it_may() {
        let mut index = Index::new(3);
        for n in 0..3 {
            index.add(&entry(EntryKind::Write, u64::from(n) * 100, 10), place(n)).unwrap();
        }
        index.add(&entry(EntryKind::Write, 0, 300), place(9)).unwrap();
        assert_eq!(index.ranges(), 1, "what is covered is gone");
        index.add(&entry(EntryKind::Zeroes, 100, 10), place(9)).unwrap();
        assert_eq!(index.ranges(), 3, "a cut in the middle makes two of one");
        assert_eq!(index.add(&entry(EntryKind::Write, 200, 5), place(9)), Err(Full { most: 3 }));
        assert_eq!(of(&index, 0, 1)[0], Some(Some((9, 0))));
    }
}
