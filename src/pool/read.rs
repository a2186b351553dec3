//! Reading blocks, each verified against its pointer (invariant 11).
//!
//! Called by the volume tree. Whoever reads a tree keeps it pinned or is the one who publishes
//! the volume; otherwise a block may be another's by now, which the checksum finds. A read error
//! does not latch the pool: the block is an error for whoever asked.

use std::sync::Arc;

use crate::limits::POOL_IO_BYTES_MAX;
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::{ContentHash, crc32c};
use crate::units::numbers::Pbn;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::Pool;
use super::error::PoolError;
use super::pointer::Pointer;

fn verify(pbn: Pbn, wanted: u32, block: &[u8]) -> Result<(), PoolError> {
    let met = crc32c(block);
    if met == wanted { Ok(()) } else { Err(PoolError::Corrupt { pbn, wanted, met }) }
}

impl Pool {
    /// Reads one block and verifies its checksum. What the device has lost and is known again is
    /// as good ([`super::mended`]).
    pub fn read_block(
        &self,
        pbn: Pbn,
        crc: u32,
        block: &mut [u8; BLOCK_BYTES],
    ) -> Result<(), PoolError> {
        let read = self.read_medium(pbn, crc, block);
        match read.is_err().then(|| self.mended().get(pbn, crc)).flatten() {
            Some(known) => {
                block.copy_from_slice(&*known);
                Ok(())
            }
            None => read,
        }
    }

    /// The same, and only what the device holds counts.
    pub fn read_medium(
        &self,
        pbn: Pbn,
        crc: u32,
        block: &mut [u8; BLOCK_BYTES],
    ) -> Result<(), PoolError> {
        self.read_unverified(pbn, block)?;
        verify(pbn, crc, block)
    }

    /// Reads what lies there, whatever it is: for whoever proves it otherwise.
    pub fn read_unverified(
        &self,
        pbn: Pbn,
        block: &mut [u8; BLOCK_BYTES],
    ) -> Result<(), PoolError> {
        Ok(self.device().read_at(self.offset(pbn, 1)?, block)?)
    }

    /// Reads blocks side by side from `first` on, one for each checksum, into as many times 4096
    /// bytes, in few large reads. The first bad block is the error.
    pub fn read_run(&self, first: Pbn, crcs: &[u32], bytes: &mut [u8]) -> Result<(), PoolError> {
        assert_eq!(bytes.len(), crcs.len() * BLOCK_BYTES, "a checksum for each block");
        if self.mended().may_have(first, to_u64(crcs.len())) {
            let pbns = (first.0..).map(Pbn);
            let blocks = bytes.as_chunks_mut::<BLOCK_BYTES>().0;
            return pbns
                .zip(crcs)
                .zip(blocks)
                .try_for_each(|((pbn, crc), block)| self.read_block(pbn, *crc, block));
        }
        let mut offset = self.offset(first, to_u64(crcs.len()))?;
        for part in bytes.chunks_mut(to_usize(POOL_IO_BYTES_MAX)) {
            self.device().read_at(offset, part)?;
            offset += to_u64(part.len());
        }
        let pbns = (first.0..).map(Pbn);
        for ((pbn, crc), block) in pbns.zip(crcs).zip(bytes.chunks(BLOCK_BYTES)) {
            verify(pbn, *crc, block)?;
        }
        Ok(())
    }

    /// A block out of the cache, or read, verified by checksum and by content hash (`content`
    /// computes it), and then kept.
    pub fn cached_block(
        &self,
        pointer: &Pointer,
        content: impl FnOnce(&[u8; BLOCK_BYTES]) -> ContentHash,
    ) -> Result<Arc<[u8; BLOCK_BYTES]>, PoolError> {
        if let Some(block) = self.cache().get(pointer) {
            return Ok(block);
        }
        let mut block = [0; BLOCK_BYTES];
        self.read_block(pointer.pbn, pointer.crc, &mut block)?;
        let (pbn, wanted, met) = (pointer.pbn, pointer.hash, content(&block));
        if wanted != met {
            return Err(PoolError::CorruptContent { pbn, wanted, met });
        }
        let block = Arc::new(block);
        self.cache().insert(pointer, Arc::clone(&block));
        Ok(block)
    }

    /// Keeps a block in the cache that was just made and queued for writing.
    pub fn keep_block(&self, pointer: &Pointer, block: [u8; BLOCK_BYTES]) {
        self.cache().insert(pointer, Arc::new(block));
    }

    /// Writes blocks side by side; only a write set's own ones.
    pub(super) fn write_blocks(&self, first: Pbn, bytes: &[u8]) -> Result<(), PoolError> {
        let count = to_u64(bytes.len()) / BLOCK_BYTES_U64;
        let offset = self.offset(first, count)?;
        self.mended().written(first, count);
        self.device().write_at(offset, bytes).map_err(|error| self.latch(error.into()))
    }

    /// Where blocks of the data area are on the device; others have no business here.
    fn offset(&self, first: Pbn, count: u64) -> Result<u64, PoolError> {
        let layout = &self.label().layout;
        let end = first.0.checked_add(count).filter(|&end| end <= layout.total);
        if first.0 < layout.data_start || end.is_none() {
            return Err(PoolError::OutOfPool { pbn: first });
        }
        Ok(first.0 * BLOCK_BYTES_U64)
    }
}
