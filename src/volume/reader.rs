//! Serves bytes and extents of a tree.
//!
//! Called by the NBD exports of both ends. Blocks that lie side by side on the device are read in
//! one piece; each is verified before a byte of it is handed out (invariant 11). An [`Image`] is
//! a pinned volume: what it returns is of one CP, or it is an error that says the pin is gone.

use crate::limits::{NBD_REQUEST_BYTES_MAX, POOL_LEASE_BLOCKS};
use crate::pool::pointer::TreeRoot;
use crate::pool::{Pin, Pool};
use crate::units::convert::{to_u64, to_usize};
use crate::units::numbers::{Pbn, Vbn};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::error::VolumeError;
use super::walk::Walk;

/// What a part of a volume holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SegmentContent {
    /// These bytes.
    Data(Vec<u8>),
    /// Zeroes that are stored nowhere.
    Hole,
}

/// A part of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// First byte in the volume.
    pub offset: u64,
    /// Bytes it covers.
    pub length: u64,
    /// What they are.
    pub content: SegmentContent,
}

/// A part of a volume that is data or hole throughout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes it covers.
    pub length: u64,
    /// Whether it is a hole.
    pub hole: bool,
}

fn check_range(tree: &TreeRoot, offset: u64, length: u64) -> Result<(), VolumeError> {
    let size = tree.size;
    match offset.checked_add(length) {
        Some(end) if end <= size.0 => Ok(()),
        _ => Err(VolumeError::OutOfRange { offset, length, size }),
    }
}

/// The blocks that bytes lie in.
fn blocks_of(offset: u64, length: u64) -> (Vbn, u64) {
    let first = offset / BLOCK_BYTES_U64;
    let end = (offset + length).div_ceil(BLOCK_BYTES_U64);
    (Vbn(first), end - first)
}

/// Blocks side by side in volume and pool, to be read in one piece.
#[derive(Debug)]
struct Run {
    vbn: u64,
    pbn: Pbn,
    crcs: Vec<u32>,
}

/// Whole blocks as segments; the edges are cut when all are there.
#[derive(Debug)]
struct Collector<'a> {
    pool: &'a Pool,
    run: Run,
    segments: Vec<Segment>,
}

impl Collector<'_> {
    fn data(&mut self, vbn: u64, pbn: Pbn, crc: u32) -> Result<(), VolumeError> {
        let count = to_u64(self.run.crcs.len());
        let follows = vbn == self.run.vbn + count && pbn.0 == self.run.pbn.0 + count;
        if !follows || count == POOL_LEASE_BLOCKS {
            self.read_run()?;
            self.run = Run { vbn, pbn, crcs: Vec::new() };
        }
        self.run.crcs.push(crc);
        Ok(())
    }

    fn hole(&mut self, vbn: u64, count: u64) -> Result<(), VolumeError> {
        self.read_run()?;
        let (offset, length) = (vbn * BLOCK_BYTES_U64, count * BLOCK_BYTES_U64);
        match self.segments.last_mut() {
            Some(Segment { length: before, content: SegmentContent::Hole, .. }) => {
                *before += length
            }
            _ => self.segments.push(Segment { offset, length, content: SegmentContent::Hole }),
        }
        Ok(())
    }

    fn read_run(&mut self) -> Result<(), VolumeError> {
        let Run { vbn, pbn, crcs } = &mut self.run;
        if crcs.is_empty() {
            return Ok(());
        }
        let added = crcs.len() * BLOCK_BYTES;
        let offset = *vbn * BLOCK_BYTES_U64;
        let bytes = match self.segments.last_mut() {
            Some(Segment { length, content: SegmentContent::Data(bytes), .. }) => {
                *length += to_u64(added);
                bytes
            }
            _ => {
                let content = SegmentContent::Data(Vec::new());
                self.segments.push(Segment { offset, length: to_u64(added), content });
                match self.segments.last_mut() {
                    Some(Segment { content: SegmentContent::Data(bytes), .. }) => bytes,
                    _ => return Ok(()),
                }
            }
        };
        let before = bytes.len();
        bytes.resize(before + added, 0);
        self.pool.read_run(*pbn, crcs, &mut bytes[before..])?;
        crcs.clear();
        Ok(())
    }

    /// Cuts what lies outside the bytes asked for.
    fn finish(mut self, offset: u64, length: u64) -> Result<Vec<Segment>, VolumeError> {
        self.read_run()?;
        if let Some(first) = self.segments.first_mut() {
            let cut = offset - first.offset;
            if let SegmentContent::Data(bytes) = &mut first.content {
                bytes.drain(..to_usize(cut));
            }
            first.offset = offset;
            first.length -= cut;
        }
        if let Some(last) = self.segments.last_mut() {
            last.length = offset + length - last.offset;
            if let SegmentContent::Data(bytes) = &mut last.content {
                bytes.truncate(to_usize(last.length));
            }
        }
        Ok(self.segments)
    }
}

/// The bytes `offset..offset + length` of a tree, of any alignment, as data and holes in order.
pub fn read(
    pool: &Pool,
    tree: &TreeRoot,
    offset: u64,
    length: u64,
) -> Result<Vec<Segment>, VolumeError> {
    check_range(tree, offset, length)?;
    if length > NBD_REQUEST_BYTES_MAX {
        return Err(VolumeError::TooLong { length, max: NBD_REQUEST_BYTES_MAX });
    }
    if length == 0 {
        return Ok(Vec::new());
    }
    let (vbn, count) = blocks_of(offset, length);
    let run = Run { vbn: 0, pbn: Pbn(0), crcs: Vec::new() };
    let mut collector = Collector { pool, run, segments: Vec::new() };
    for item in Walk::new(pool, tree)?.range(vbn, count) {
        let item = item?;
        if item.pointer.is_hole() {
            collector.hole(item.vbn.0, item.count)?;
        } else {
            collector.data(item.vbn.0, item.pointer.pbn, item.pointer.crc)?;
        }
    }
    collector.finish(offset, length)
}

/// The same into a buffer, holes as zeroes.
pub fn read_into(
    pool: &Pool,
    tree: &TreeRoot,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), VolumeError> {
    for segment in read(pool, tree, offset, to_u64(buffer.len()))? {
        let start = to_usize(segment.offset - offset);
        let part = &mut buffer[start..start + to_usize(segment.length)];
        match segment.content {
            SegmentContent::Data(bytes) => part.copy_from_slice(&bytes),
            SegmentContent::Hole => part.fill(0),
        }
    }
    Ok(())
}

/// Which of the bytes `offset..offset + length` are data and which holes, in order, at most
/// `at_most` extents: fewer bytes than asked for if there are more. Reads nodes only.
pub fn extents(
    pool: &Pool,
    tree: &TreeRoot,
    offset: u64,
    length: u64,
    at_most: usize,
) -> Result<Vec<Extent>, VolumeError> {
    check_range(tree, offset, length)?;
    let mut extents: Vec<Extent> = Vec::new();
    if length == 0 || at_most == 0 {
        return Ok(extents);
    }
    let (vbn, count) = blocks_of(offset, length);
    for item in Walk::new(pool, tree)?.range(vbn, count) {
        let item = item?;
        let start = item.vbn.byte_offset().max(offset);
        let end = ((item.vbn.0 + item.count) * BLOCK_BYTES_U64).min(offset + length);
        let (length, hole) = (end - start, item.pointer.is_hole());
        let full = extents.len() == at_most;
        match extents.last_mut() {
            Some(last) if last.hole == hole => last.length += length,
            _ if full => break,
            _ => extents.push(Extent { length, hole }),
        }
    }
    Ok(extents)
}

/// A pinned volume, as its readers see it.
#[derive(Debug)]
pub struct Image {
    pin: Pin,
}

impl Image {
    /// The image of a pin.
    pub fn new(pin: Pin) -> Self {
        Self { pin }
    }

    /// The pin.
    pub fn pin(&self) -> &Pin {
        &self.pin
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.pin.tree().size.0
    }

    /// [`read`] of the pinned CP.
    pub fn read(&self, offset: u64, length: u64) -> Result<Vec<Segment>, VolumeError> {
        self.pinned(read(self.pin.pool(), &self.pin.tree(), offset, length))
    }

    /// [`read_into`] of the pinned CP.
    pub fn read_into(&self, offset: u64, buffer: &mut [u8]) -> Result<(), VolumeError> {
        self.pinned(read_into(self.pin.pool(), &self.pin.tree(), offset, buffer))
    }

    /// [`extents`] of the pinned CP.
    pub fn extents(
        &self,
        offset: u64,
        length: u64,
        at_most: usize,
    ) -> Result<Vec<Extent>, VolumeError> {
        self.pinned(extents(self.pin.pool(), &self.pin.tree(), offset, length, at_most))
    }

    /// An answer counts only if the pin still held when it was complete; and if it did not, that
    /// is the reason, whatever was met in blocks that are others' by now.
    fn pinned<T>(&self, answer: Result<T, VolumeError>) -> Result<T, VolumeError> {
        self.pin.check()?;
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::label::POOL_BYTES_MIN;
    use crate::pool::testing::{Chance, random_block};
    use crate::volume::testing::{Put, content, cp, pool_with, tree};

    /// Goal: any range of bytes reads as the image has it, and segments join without gap.
    /// Method: random ranges against the whole image, over data, holes and several runs.
    #[test]
    fn any_range_reads_as_the_image_has_it() {
        let mut chance = Chance::new(3);
        let (_, pool) = pool_with(POOL_BYTES_MIN, 700);
        for number in 1..6 {
            let puts: Vec<Put> = (0..700)
                .filter(|vbn| vbn % 7 < 4 && chance.below(3) < 2)
                .map(|vbn| (vbn, random_block(&mut Chance::new(vbn * 9 + u64::from(number)))))
                .map(|(vbn, block)| Put::Data(vbn, Box::new(block)))
                .collect();
            cp(&pool, number, &puts).unwrap();
        }
        cp(&pool, 6, &[Put::Holes(200, 150)]).unwrap();
        let tree = tree(&pool);
        let image = content(&pool, &tree);
        for _ in 0..400 {
            let offset = chance.below(tree.size.0 + 1);
            let length = chance.below((tree.size.0 - offset).min(900_000) + 1);
            let (from, to) = (to_usize(offset), to_usize(offset + length));
            let mut at = offset;
            for segment in read(&pool, &tree, offset, length).unwrap() {
                assert_eq!(segment.offset, at);
                let (start, end) = (to_usize(at), to_usize(at + segment.length));
                match segment.content {
                    SegmentContent::Data(bytes) => assert!(image[start..end] == bytes),
                    SegmentContent::Hole => assert!(image[start..end].iter().all(|&b| b == 0)),
                }
                at += segment.length;
            }
            assert_eq!(at, offset + length);
            let mut bytes = vec![1; to - from];
            read_into(&pool, &tree, offset, &mut bytes).unwrap();
            assert!(bytes == image[from..to]);

            let all = extents(&pool, &tree, offset, length, usize::MAX).unwrap();
            assert_eq!(all.iter().map(|extent| extent.length).sum::<u64>(), length);
            assert!(all.windows(2).all(|pair| pair[0].hole != pair[1].hole));
            for most in 0..3 {
                let some = extents(&pool, &tree, offset, length, most).unwrap();
                assert_eq!(some, all[..most.min(all.len())], "{offset} {length}");
            }
        }
    }

    #[test]
    fn ranges_past_the_end_and_too_long_ones_are_refused() {
        let (_, pool) = pool_with(POOL_BYTES_MIN, 20_000);
        let tree = tree(&pool);
        let size = tree.size.0;
        for (offset, length) in [(size, 1), (size + 1, 0), (0, size + 1), (u64::MAX, 2)] {
            let met = read(&pool, &tree, offset, length).unwrap_err();
            assert!(matches!(met, VolumeError::OutOfRange { .. }), "{met}");
            assert!(extents(&pool, &tree, offset, length, 9).is_err());
        }
        let met = read(&pool, &tree, 0, NBD_REQUEST_BYTES_MAX + 1).unwrap_err();
        assert!(matches!(met, VolumeError::TooLong { .. }), "{met}");
        assert_eq!(read(&pool, &tree, size, 0).unwrap(), []);
        let whole = extents(&pool, &tree, 0, size, 9).unwrap();
        assert_eq!(whole, [Extent { length: size, hole: true }]);
    }
}
