//! The dirty state of one CP interval: what its entries made of the blocks they touched.
//!
//! Pure. [`Buffers::apply`] is the one function that turns an entry into content: live writes,
//! replay after a restart and refilled transfers all pass it, in sequence order. Reads look
//! through it ([`Buffers::pieces`], [`over`]); the CP is planned from it (`plan`).
//!
//! Invariants: a block stands for itself and wins over the holes; an ordinal counts the blocks
//! with data that entries of this interval wrote whole, over all volumes, each occurrence on its
//! own (R15), so it is the same number that the hub counts.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;

use super::ranges::RangeSet;
use crate::record::entry::{Entry, EntryKind};
use crate::units::convert::{to_u64, to_usize};
use crate::units::numbers::VolumeNumber;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

/// Content of one block.
pub type Page = [u8; BLOCK_BYTES];

const ZERO_PAGE: Page = [0; BLOCK_BYTES];

/// How much of a block this interval knows, and whether the log has it whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// The last entry that touched it wrote it whole, as this ordinal of the interval.
    Whole { ordinal: u64 },
    /// All bytes are known, from several entries.
    Full,
    /// Only these bytes are known; the rest is what lies below.
    Partial(RangeSet),
}

/// The bytes of one block, shared.
#[derive(Debug, Clone)]
pub enum BlockData {
    /// A page of its own.
    Page(Arc<Page>),
    /// A block's length of something longer, which is held as long as this is.
    Part(Bytes),
}

impl From<Arc<Page>> for BlockData {
    fn from(page: Arc<Page>) -> Self {
        Self::Page(page)
    }
}

impl Deref for BlockData {
    type Target = Page;

    fn deref(&self) -> &Page {
        match self {
            Self::Page(page) => page,
            Self::Part(bytes) => match bytes.first_chunk() {
                Some(page) => page,
                None => panic!("a part of {} bytes is no block", bytes.len()),
            },
        }
    }
}

impl PartialEq for BlockData {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for BlockData {}

impl BlockData {
    /// The bytes, for changing: of a page that nobody else holds.
    pub fn make_mut(&mut self) -> &mut Page {
        if let Self::Part(_) = self {
            *self = Self::Page(Arc::new(**self));
        }
        match self {
            Self::Page(page) => Arc::make_mut(page),
            Self::Part(_) => panic!("it was made a page"),
        }
    }
}

/// A block that this interval wrote.
#[derive(Debug, Clone)]
pub struct Block {
    /// Its bytes; zero where they are not known.
    pub data: BlockData,
    /// Which of them count.
    pub known: Known,
}

/// What a layer says about some blocks in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// One block with all its bytes.
    Data(BlockData),
    /// Zero.
    Hole,
    /// Not touched: look below.
    Base,
    /// One block of which these bytes are known: lay them over what is below.
    Overlay { data: BlockData, known: RangeSet },
}

/// Some blocks in a row and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// First block.
    pub vbn: u64,
    /// Number of blocks; 1 for data and overlays.
    pub count: u64,
    /// What they are.
    pub found: Found,
}

/// What one volume's entries made.
#[derive(Debug, Clone, Default)]
pub struct Dirty {
    blocks: BTreeMap<u64, Block>,
    holes: RangeSet,
}

/// What all volumes' entries of one interval made.
#[derive(Debug, Clone, Default)]
pub struct Buffers {
    volumes: BTreeMap<VolumeNumber, Dirty>,
    ordinals: u64,
    entries: u64,
}

impl Buffers {
    /// Whether no entry was applied.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Blocks with data written whole so far: the next ordinal.
    pub fn ordinals(&self) -> u64 {
        self.ordinals
    }

    /// Entries applied.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Blocks held in memory.
    pub fn blocks(&self) -> u64 {
        self.volumes.values().map(|dirty| to_u64(dirty.blocks.len())).sum()
    }

    /// The volumes that were touched, by number.
    pub fn volumes(&self) -> impl Iterator<Item = (VolumeNumber, &Dirty)> {
        self.volumes.iter().map(|(&number, dirty)| (number, dirty))
    }

    /// Applies the next entry. `data` is what the entry carries: empty unless it is a write.
    pub fn apply(&mut self, entry: &Entry, data: &[u8]) {
        self.apply_by(entry, data, |page, _| BlockData::Page(Arc::new(*page)));
    }

    /// The same without a copy of what is written whole: the blocks hold `data`, and all that it is a
    /// part of.
    pub fn apply_held(&mut self, entry: &Entry, data: &Bytes) {
        let part = |_: &Page, at| BlockData::Part(data.slice(at..at + BLOCK_BYTES));
        self.apply_by(entry, data, part);
    }

    /// `whole` makes the block of a page that lies so far in `data`.
    fn apply_by(&mut self, entry: &Entry, data: &[u8], whole: impl Fn(&Page, usize) -> BlockData) {
        assert!(to_u64(data.len()) == u64::from(entry.data_bytes()), "data and entry disagree");
        self.entries += 1;
        let dirty = self.volumes.entry(entry.volume).or_default();
        match entry.kind {
            EntryKind::Write => {
                let before = self.ordinals;
                dirty.write(entry.offset, data, whole, &mut self.ordinals);
                assert!(self.ordinals - before == entry.ordinals(), "ordinals are counted alike");
            }
            EntryKind::Trim => dirty.make_holes(entry.whole_blocks()),
            EntryKind::Zeroes => dirty.zero(entry),
        }
    }

    /// Replaces a block that was known in part by all of it, as it was laid over what is below.
    pub fn fill(&mut self, volume: VolumeNumber, vbn: u64, data: Arc<Page>) {
        let dirty = self.volumes.get_mut(&volume);
        if let Some(block) = dirty.and_then(|dirty| dirty.blocks.get_mut(&vbn)) {
            *block = Block { data: data.into(), known: Known::Full };
        }
    }

    /// What this layer says about `count` blocks of a volume from `vbn` on, in order, all of
    /// them.
    pub fn pieces(&self, volume: VolumeNumber, vbn: u64, count: u64) -> Vec<Piece> {
        match self.volumes.get(&volume) {
            Some(dirty) => dirty.pieces(vbn, count),
            None if count == 0 => Vec::new(),
            None => vec![Piece { vbn, count, found: Found::Base }],
        }
    }
}

impl Dirty {
    /// The blocks, rising.
    pub fn blocks(&self) -> &BTreeMap<u64, Block> {
        &self.blocks
    }

    /// Blocks that became holes, but for those in [`Dirty::blocks`].
    pub fn holes(&self) -> &RangeSet {
        &self.holes
    }

    fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        whole: impl Fn(&Page, usize) -> BlockData,
        ordinals: &mut u64,
    ) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let inside = to_usize(at % BLOCK_BYTES_U64);
            let (part, behind) = rest.split_at(rest.len().min(BLOCK_BYTES - inside));
            let vbn = at / BLOCK_BYTES_U64;
            if let Some(page) = part.first_chunk::<BLOCK_BYTES>() {
                let known = Known::Whole { ordinal: *ordinals };
                *ordinals += 1;
                let data = whole(page, data.len() - rest.len());
                self.blocks.insert(vbn, Block { data, known });
            } else {
                self.patch(vbn, inside, part);
            }
            at += to_u64(part.len());
            rest = behind;
        }
    }

    fn zero(&mut self, entry: &Entry) {
        let (first, count) = entry.whole_blocks();
        let (start, end) = (entry.offset, entry.end());
        if count > 0 {
            self.make_holes((first, count));
            self.zero_edge(start, first * BLOCK_BYTES_U64);
            self.zero_edge((first + count) * BLOCK_BYTES_U64, end);
        } else {
            let border = end / BLOCK_BYTES_U64 * BLOCK_BYTES_U64;
            let border = border.clamp(start, end);
            self.zero_edge(start, border);
            self.zero_edge(border, end);
        }
    }

    /// Zeroes a part of one block.
    fn zero_edge(&mut self, start: u64, end: u64) {
        let vbn = start / BLOCK_BYTES_U64;
        let already = !self.blocks.contains_key(&vbn) && self.holes.contains(vbn);
        if start < end && !already {
            let zeroes = &ZERO_PAGE[..to_usize(end - start)];
            self.patch(vbn, to_usize(start % BLOCK_BYTES_U64), zeroes);
        }
    }

    fn make_holes(&mut self, (first, count): (u64, u64)) {
        let end = first + count;
        let covered: Vec<u64> = self.blocks.range(first..end).map(|(&vbn, _)| vbn).collect();
        for vbn in covered {
            self.blocks.remove(&vbn);
        }
        self.holes.insert(first, end);
    }

    fn patch(&mut self, vbn: u64, inside: usize, part: &[u8]) {
        let hole = self.holes.contains(vbn);
        let block = self.blocks.entry(vbn).or_insert_with(|| Block {
            data: BlockData::Page(Arc::new(ZERO_PAGE)),
            known: if hole { Known::Full } else { Known::Partial(RangeSet::default()) },
        });
        block.data.make_mut()[inside..inside + part.len()].copy_from_slice(part);
        match &mut block.known {
            Known::Whole { .. } | Known::Full => block.known = Known::Full,
            Known::Partial(ranges) => {
                ranges.insert(to_u64(inside), to_u64(inside + part.len()));
                if ranges.covers(0, BLOCK_BYTES_U64) {
                    block.known = Known::Full;
                }
            }
        }
    }

    fn pieces(&self, vbn: u64, count: u64) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let end = vbn + count;
        let mut at = vbn;
        for (&next, block) in self.blocks.range(vbn..end) {
            self.untouched(at, next, &mut pieces);
            let data = block.data.clone();
            let found = match &block.known {
                Known::Whole { .. } | Known::Full => Found::Data(data),
                Known::Partial(known) => Found::Overlay { data, known: known.clone() },
            };
            pieces.push(Piece { vbn: next, count: 1, found });
            at = next + 1;
        }
        self.untouched(at, end, &mut pieces);
        pieces
    }

    /// Holes and base between two blocks.
    fn untouched(&self, start: u64, end: u64, pieces: &mut Vec<Piece>) {
        let mut push = |vbn, until: u64, found| {
            if vbn < until {
                pieces.push(Piece { vbn, count: until - vbn, found });
            }
        };
        let mut at = start;
        for (from, to) in self.holes.within(start, end) {
            push(at, from, Found::Base);
            push(from, to, Found::Hole);
            at = to;
        }
        push(at, end, Found::Base);
    }
}

/// Lays what the newer layer said over what an older one says: what is left as base or overlay
/// is to be looked up below both.
pub fn over(newer: Vec<Piece>, older: &Buffers, volume: VolumeNumber) -> Vec<Piece> {
    let older = |vbn, count| Ok::<_, Infallible>(older.pieces(volume, vbn, count));
    match over_layer(newer, older) {
        Ok(pieces) => pieces,
        Err(never) => match never {},
    }
}

/// The same over any layer: `older` says what it holds of some blocks in a row.
pub fn over_layer<E>(
    newer: Vec<Piece>,
    mut older: impl FnMut(u64, u64) -> Result<Vec<Piece>, E>,
) -> Result<Vec<Piece>, E> {
    let mut out = Vec::with_capacity(newer.len());
    for piece in newer {
        match piece.found {
            Found::Data(_) | Found::Hole => out.push(piece),
            Found::Base => out.append(&mut older(piece.vbn, piece.count)?),
            Found::Overlay { data, known } => {
                let below = older(piece.vbn, 1)?.pop();
                let found = overlay_on(data, known, below.map(|below| below.found));
                out.push(Piece { vbn: piece.vbn, count: 1, found });
            }
        }
    }
    Ok(out)
}

fn overlay_on(data: BlockData, known: RangeSet, below: Option<Found>) -> Found {
    match below {
        None | Some(Found::Base) => Found::Overlay { data, known },
        // Bytes that are not known are zero in an overlay.
        Some(Found::Hole) => Found::Data(data),
        Some(Found::Data(mut page)) => {
            lay(page.make_mut(), &data, &known);
            Found::Data(page)
        }
        Some(Found::Overlay { data: mut page, known: mut both }) => {
            lay(page.make_mut(), &data, &known);
            known.iter().for_each(|(start, end)| both.insert(start, end));
            if both.covers(0, BLOCK_BYTES_U64) {
                Found::Data(page)
            } else {
                Found::Overlay { data: page, known: both }
            }
        }
    }
}

/// Copies the known bytes of `data` onto `page`.
pub fn lay(page: &mut Page, data: &Page, known: &RangeSet) {
    for (start, end) in known.iter() {
        let range = to_usize(start)..to_usize(end);
        page[range.clone()].copy_from_slice(&data[range]);
    }
}

/// Whether a block is zero: then it is a hole, on both ends (R15).
pub fn is_zero(page: &Page) -> bool {
    *page == ZERO_PAGE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::hash::crc32c;

    const VOLUME: VolumeNumber = VolumeNumber(1);

    pub(crate) fn entry(kind: EntryKind, offset: u64, length: u32, data: &[u8]) -> Entry {
        let crc = if kind == EntryKind::Write { crc32c(data) } else { 0 };
        Entry { kind, volume: VOLUME, offset, length, crc }
    }

    /// A plain image, and what lies below it.
    #[derive(Clone)]
    struct Oracle(Vec<u8>);

    impl Oracle {
        fn apply(&mut self, entry: &Entry, data: &[u8]) {
            let range = to_usize(entry.offset)..to_usize(entry.end());
            match entry.kind {
                EntryKind::Write => self.0[range].copy_from_slice(data),
                EntryKind::Trim | EntryKind::Zeroes => self.0[range].fill(0),
            }
        }
    }

    fn image(pieces: &[Piece], base: &[u8]) -> Vec<u8> {
        let mut image = Vec::new();
        for piece in pieces {
            let start = to_usize(piece.vbn) * BLOCK_BYTES;
            let below = &base[start..start + to_usize(piece.count) * BLOCK_BYTES];
            assert_eq!(start, image.len(), "pieces follow each other");
            match &piece.found {
                Found::Data(page) => image.extend_from_slice(&page[..]),
                Found::Hole => image.resize(image.len() + below.len(), 0),
                Found::Base => image.extend_from_slice(below),
                Found::Overlay { data, known } => {
                    let mut page: Page = below.try_into().unwrap();
                    lay(&mut page, data, known);
                    image.extend_from_slice(&page);
                }
            }
        }
        image
    }

    /// The kinds of rules.md, test 9, on block 1 of three.
    fn operations() -> Vec<(Entry, Vec<u8>)> {
        let write = |offset, length: u32, fill: u8| {
            let data = vec![fill; to_usize(u64::from(length))];
            (entry(EntryKind::Write, offset, length, &data), data)
        };
        vec![
            write(4096, 4096, 0x11),
            write(4096 + 100, 1000, 0x22),
            write(4096 + 1000, 3096, 0x33),
            write(4096, 1000, 0x44),
            write(4096, 4096, 0),
            (entry(EntryKind::Zeroes, 4096, 4096, &[]), vec![]),
            (entry(EntryKind::Zeroes, 4096 + 50, 100, &[]), vec![]),
            (entry(EntryKind::Zeroes, 4000, 4300, &[]), vec![]),
            (entry(EntryKind::Trim, 4096, 4096, &[]), vec![]),
        ]
    }

    /// Goal: content never depends on how it came about. Method: every order of length 4, cut at
    /// every point into an older and a newer layer, against an image of bytes.
    #[test]
    fn every_order_of_four_agrees_with_an_image() {
        let operations = operations();
        let base: Vec<u8> = vec![0xbb; 3 * BLOCK_BYTES];
        let count = operations.len();
        for history in 0..count.pow(4) {
            let steps = [0, 1, 2, 3].map(|n| &operations[history / count.pow(n) % count]);
            let mut oracle = Oracle(base.clone());
            steps.iter().for_each(|(entry, data)| oracle.apply(entry, data));
            for cut in 0..=4 {
                let (mut older, mut newer) = (Buffers::default(), Buffers::default());
                for (index, (entry, data)) in steps.iter().enumerate() {
                    if index < cut { &mut older } else { &mut newer }.apply(entry, data);
                }
                let pieces = over(newer.pieces(VOLUME, 0, 3), &older, VOLUME);
                assert_eq!(image(&pieces, &base), oracle.0, "history {history} cut {cut}");
                // A base that holds the older layer already changes nothing: replay after the
                // own commit.
                let merged = image(&older.pieces(VOLUME, 0, 3), &base);
                assert_eq!(image(&pieces, &merged), oracle.0, "history {history} again");
            }
        }
    }

    /// Only a block whose last entry wrote it whole has an ordinal, and the right one.
    #[test]
    fn a_whole_block_has_the_ordinal_of_its_last_write() {
        let operations = operations();
        let count = operations.len();
        for history in 0..count.pow(4) {
            let steps = [0, 1, 2, 3].map(|n| &operations[history / count.pow(n) % count]);
            let mut buffers = Buffers::default();
            let mut wanted = None;
            let mut ordinal = 0;
            for (entry, data) in steps {
                buffers.apply(entry, data);
                wanted = None;
                if entry.ordinals() > 0 {
                    wanted = Some(ordinal);
                    ordinal += entry.ordinals();
                }
            }
            let met = buffers.volumes[&VOLUME].blocks.get(&1).and_then(|block| match block.known {
                Known::Whole { ordinal } => Some(ordinal),
                Known::Full | Known::Partial(_) => None,
            });
            assert_eq!(met, wanted, "history {history}");
            assert_eq!(buffers.ordinals(), ordinal);
        }
    }

    #[test]
    fn terabytes_of_holes_are_one_range_and_blocks_win() {
        let mut buffers = Buffers::default();
        for n in 0..1024_u64 {
            let entry = entry(EntryKind::Zeroes, n << 31, 1 << 31, &[]);
            buffers.apply(&entry, &[]);
        }
        assert_eq!(buffers.volumes[&VOLUME].holes.len(), 1);
        let data = vec![7; 4096];
        buffers.apply(&entry(EntryKind::Write, 1 << 40, 4096, &data), &data);
        let vbn = (1 << 40) / 4096;
        let pieces = buffers.pieces(VOLUME, vbn - 1, 3);
        assert!(matches!(pieces[0].found, Found::Hole));
        assert!(matches!(pieces[1].found, Found::Data(_)));
        assert!(matches!(pieces[2].found, Found::Hole));
        assert_eq!(buffers.volumes[&VOLUME].holes.len(), 1, "a block does not split the range");
    }

    #[test]
    fn another_volume_is_another_world() {
        let mut buffers = Buffers::default();
        let data = [1; 512];
        buffers.apply(&entry(EntryKind::Write, 0, 512, &data), &data);
        let other = buffers.pieces(VolumeNumber(2), 0, 9);
        assert_eq!(other, vec![Piece { vbn: 0, count: 9, found: Found::Base }]);
        assert!(buffers.pieces(VolumeNumber(2), 3, 0).is_empty());
    }

    proptest! {
        /// Random entries at any alignment over 6 blocks, in two layers.
        #[test]
        fn random_entries_agree_with_an_image(
            steps in prop::collection::vec((0..3_u8, 0..24_000_u64, 1..9_000_u64, any::<u8>()), 1..20),
            cut in 0..20_usize,
        ) {
            let base: Vec<u8> = (0..6 * BLOCK_BYTES_U64).map(|n| n.to_le_bytes()[0] | 1).collect();
            let mut oracle = Oracle(base.clone());
            let (mut older, mut newer) = (Buffers::default(), Buffers::default());
            for (index, (kind, offset, length, fill)) in steps.into_iter().enumerate() {
                let length = length.min(6 * 4096 - offset);
                let (entry, data) = match kind {
                    0 => {
                        let data = vec![fill; to_usize(length)];
                        (entry(EntryKind::Write, offset, u32::try_from(length).unwrap(), &data), data)
                    }
                    1 => (entry(EntryKind::Zeroes, offset, u32::try_from(length).unwrap(), &[]), vec![]),
                    _ => {
                        let vbn = offset / 4096;
                        let count = (length / 4096).max(1).min(6 - vbn);
                        let bytes = u32::try_from(count * 4096).unwrap();
                        (entry(EntryKind::Trim, vbn * 4096, bytes, &[]), vec![])
                    }
                };
                oracle.apply(&entry, &data);
                let layer = if index < cut { &mut older } else { &mut newer };
                if index % 2 == 0 {
                    layer.apply(&entry, &data);
                } else {
                    layer.apply_held(&entry, &Bytes::from(data));
                }
            }
            let pieces = over(newer.pieces(VOLUME, 0, 6), &older, VOLUME);
            prop_assert_eq!(image(&pieces, &base), oracle.0);
        }
    }
}
