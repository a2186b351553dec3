//! What a scrub asks of the pool: blocks read from the medium, and what is in use.
//!
//! Nothing here comes from a cache: a block that is right in memory and rotten on the device is
//! found. What is wrong is looked for in the other copies and rewritten, as by every read; in
//! contrast to those the full content hash is checked, so that a misdirected or lost write is found
//! even if an older block with the same checksum stands there.

use std::sync::Arc;

use crate::device::overlay::Overlay;
use crate::limits::POOL_IO_BYTES_MAX;
use crate::raid::span::Span;
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::{ContentHash, crc32c};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::Pool;
use super::bitmap::Bitmap;
use super::catalog_mend;
use super::error::PoolError;
use super::pointer::Pointer;
use super::read::Found;
use super::store::Store;

/// What became of a block that was not right at first.
#[derive(Debug, Clone)]
pub enum Scrubbed {
    /// Another copy was right, and the bad place was rewritten if its device takes it.
    Repaired,
    /// No copy is right; its content is known from the other end, and the next CP writes it.
    Known,
    /// No copy is right.
    Lost(PoolError),
}

impl Pool {
    /// The array it lies on, if it does.
    pub fn array(&self) -> Option<&Arc<Span>> {
        self.behind.get().or(self.array.as_ref())
    }

    /// Reads blocks side by side, as the pointers ask for them, from the medium. `content`
    /// computes a content hash. Says which ones were not right, by number in the run.
    pub fn scrub_run(
        &self,
        run: &[Pointer],
        content: impl Fn(&[u8; BLOCK_BYTES]) -> ContentHash,
    ) -> Vec<(usize, Scrubbed)> {
        let Some(first) = run.first() else { return Vec::new() };
        let mut bytes = vec![0; run.len() * BLOCK_BYTES];
        let mut whole = self.offset(first.pbn, to_u64(run.len())).is_ok();
        let mut offset = first.pbn.0.saturating_mul(BLOCK_BYTES_U64);
        for part in bytes.chunks_mut(to_usize(POOL_IO_BYTES_MAX)) {
            whole = whole && self.device().read_at(offset, part).is_ok();
            offset += to_u64(part.len());
        }
        let right = |pointer: &Pointer, block: &[u8; BLOCK_BYTES]| {
            whole && crc32c(block) == pointer.crc && content(block) == pointer.hash
        };
        let blocks = bytes.as_chunks::<BLOCK_BYTES>().0;
        let each = run.iter().zip(blocks).enumerate();
        let bad = each.filter(|(_, (pointer, block))| !right(pointer, block));
        bad.filter_map(|(at, (pointer, _))| Some((at, self.scrub_block(pointer, &content)?)))
            .collect()
    }

    /// The same for one block; nothing if it is right.
    pub fn scrub_block(
        &self,
        pointer: &Pointer,
        content: impl Fn(&[u8; BLOCK_BYTES]) -> ContentHash,
    ) -> Option<Scrubbed> {
        let mut block = [0; BLOCK_BYTES];
        match self.read_proven(pointer, &mut block, content) {
            Ok(Found::AtFirst) => None,
            Ok(Found::Elsewhere) => Some(Scrubbed::Repaired),
            Err(_) if self.mended().get(pointer.pbn, pointer.crc).is_some() => {
                Some(Scrubbed::Known)
            }
            Err(error) => Some(Scrubbed::Lost(error)),
        }
    }

    /// Which blocks of the device may hold something, by their number on it: labels, catalog and
    /// whatever is not free.
    pub fn blocks_in_use(&self) -> Result<InUse, PoolError> {
        let state = self.lock()?;
        let first = self.label().layout.data_start;
        Ok(InUse::new(first, state.space.maps().1.clone()))
    }

    /// Reads the catalog as an open does: every page of the database against its checksum, every
    /// row against its own. No commit goes on meanwhile.
    /// On an array it is mended from other copies; says how many blocks were rewritten.
    pub fn verify_catalog(&self) -> Result<u64, PoolError> {
        let _alone = self.committer().between_commits()?;
        self.check_latch()?;
        if let Some(array) = self.array().filter(|array| array.is_redundant()) {
            self.device().flush().map_err(|error| self.latch(error.into()))?;
            return catalog_mend::mend(&self.device, array, &self.label());
        }
        let label = &self.label();
        Store::verify(Arc::new(Overlay::new(Arc::clone(&self.device))), label).map(|()| 0)
    }
}

/// A moment's map of what is in use.
#[derive(Debug)]
pub struct InUse {
    first: u64,
    busy: Bitmap,
}

impl InUse {
    pub(super) fn new(first: u64, busy: Bitmap) -> Self {
        Self { first, busy }
    }

    /// Whether any of `count` blocks from `first` on is in use.
    pub fn any(&self, first: u64, count: u64) -> bool {
        let Some(index) = first.checked_sub(self.first) else { return true };
        let end = index.saturating_add(count).min(self.busy.blocks());
        if index >= end {
            return false;
        }
        let clear = self.busy.clear_extent(index, end - index);
        clear.is_none_or(|clear| clear.start > index || clear.start + clear.count < end)
    }

    /// The first block of data.
    pub fn first_data(&self) -> u64 {
        self.first
    }

    /// Blocks of data.
    pub fn data_blocks(&self) -> u64 {
        self.busy.blocks()
    }

    /// Whether a block is in use.
    pub fn has(&self, block: u64) -> bool {
        block.checked_sub(self.first).is_none_or(|index| self.busy.get(index))
    }

    /// Whether a block belongs to labels or catalog.
    pub fn is_metadata(&self, block: u64) -> bool {
        block < self.first
    }
}
