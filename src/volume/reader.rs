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
