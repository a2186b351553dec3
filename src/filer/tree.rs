//! Reads of the own tree, below the buffers.
//!
//! Called by exports and plan, from threads that may block. What a read returns is of the
//! pinned CP, or it is an error: a pin that the pool gave up in the meantime is the reason then,
//! whatever was met in blocks that are others' by now.

use super::buffers::Page;
use crate::pool::pointer::TreeRoot;
use crate::pool::{Pin, Pool};
use crate::units::numbers::Vbn;
use crate::volume::error::VolumeError;
use crate::volume::reader::{self, Extent, Segment};

fn pinned<T>(pin: &Pin, answer: Result<T, VolumeError>) -> Result<T, VolumeError> {
    pin.check()?;
    answer
}

/// One block of the published tree, for whoever publishes the next one: nobody else frees what it
/// reaches, so it is right whether the pool has given a pin of it up or not.
pub fn read_published(
    pool: &Pool,
    tree: &TreeRoot,
    vbn: Vbn,
    page: &mut Page,
) -> Result<(), VolumeError> {
    reader::read_into(pool, tree, vbn.byte_offset(), page)
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
