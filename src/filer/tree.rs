//! Reads of the own tree, below the buffers.
//!
//! Called by exports, plan and scans, from threads that may block. What a read returns is of the
//! pinned CP, or it is an error: a pin that the pool gave up in the meantime is the reason then,
//! whatever was met in blocks that are others' by now.

use super::buffers::Page;
use crate::pool::Pin;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::to_u64;
use crate::units::hash::{ContentHash, Root};
use crate::units::numbers::Vbn;
use crate::volume::error::VolumeError;
use crate::volume::reader::{self, Extent, Segment, SegmentContent};
use crate::volume::root::{RootHasher, leaf_hash};

/// Bytes of a scan read at once.
const SCAN_BYTES: u64 = 4 << 20;

fn pinned<T>(pin: &Pin, answer: Result<T, VolumeError>) -> Result<T, VolumeError> {
    pin.check()?;
    answer
}

/// One block.
pub fn read_block(pin: &Pin, vbn: Vbn, page: &mut Page) -> Result<(), VolumeError> {
    let read = reader::read_into(pin.pool(), &pin.tree(), vbn.byte_offset(), page);
    pinned(pin, read)
}

/// Bytes of any alignment as data and holes, in order.
pub fn read(pin: &Pin, offset: u64, length: u64) -> Result<Vec<Segment>, VolumeError> {
    pinned(pin, reader::read(pin.pool(), &pin.tree(), offset, length))
}

/// Data and holes of a range, in order.
pub fn extents(
    pin: &Pin,
    offset: u64,
    length: u64,
    at_most: usize,
) -> Result<Vec<Extent>, VolumeError> {
    pinned(pin, reader::extents(pin.pool(), &pin.tree(), offset, length, at_most))
}

/// Reads every block of a pinned volume and computes its root from what was read; says how many
/// blocks with data there were.
pub fn scan(pin: &Pin) -> Result<(Root, u64), VolumeError> {
    let size = pin.tree().size;
    let Ok(mut hasher) = RootHasher::new(size) else {
        return Err(VolumeError::Size { size, max: crate::limits::VOLUME_BYTES_MAX });
    };
    let mut offset = 0;
    let mut blocks_read = 0;
    while offset < size.0 {
        let length = SCAN_BYTES.min(size.0 - offset);
        for segment in read(pin, offset, length)? {
            match segment.content {
                SegmentContent::Hole => {
                    (0..segment.length / BLOCK_BYTES_U64)
                        .for_each(|_| hasher.push(ContentHash::ZERO));
                }
                SegmentContent::Data(bytes) => {
                    let (blocks, rest) = bytes.as_chunks::<{ crate::units::BLOCK_BYTES }>();
                    assert!(rest.is_empty(), "{} bytes are no whole blocks", to_u64(bytes.len()));
                    blocks_read += to_u64(blocks.len());
                    blocks.iter().for_each(|block| hasher.push(leaf_hash(block)));
                }
            }
        }
        offset += length;
    }
    Ok((hasher.finish(), blocks_read))
}
