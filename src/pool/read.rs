//! Reading blocks, each verified against its pointer (invariant 11).
//!
//! Called by the volume tree. Whoever reads a tree keeps it pinned or is the one who publishes
//! the volume; otherwise a block may be another's by now, which the checksum finds. A read error
//! does not latch the pool: the block is an error for whoever asked.
//!
//! A block that is not what its pointer says, or cannot be read, is looked for in every other way
//! that the device has to it. If one is right, the caller gets that one, and the bad place is
//! rewritten; both are counted, as is a block of which no copy is right.

use std::sync::Arc;
use std::sync::atomic::Ordering;

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

/// Where a block was right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Where every read looks.
    AtFirst,
    /// In another copy.
    Elsewhere,
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
        self.read_good(pbn, block, |block| verify(pbn, crc, block)).map(drop)
    }

    /// Reads one block from the medium that has both checksum and content.
    pub(super) fn read_proven(
        &self,
        pointer: &Pointer,
        block: &mut [u8; BLOCK_BYTES],
        content: impl Fn(&[u8; BLOCK_BYTES]) -> ContentHash,
    ) -> Result<Found, PoolError> {
        let (pbn, wanted) = (pointer.pbn, pointer.hash);
        self.read_good(pbn, block, |block| {
            verify(pbn, pointer.crc, block)?;
            let met = content(block);
            if wanted == met {
                return Ok(());
            }
            Err(PoolError::CorruptContent { pbn, wanted, met })
        })
    }

    /// Reads one block, from any of its copies, that `check` finds right.
    fn read_good(
        &self,
        pbn: Pbn,
        block: &mut [u8; BLOCK_BYTES],
        check: impl Fn(&[u8; BLOCK_BYTES]) -> Result<(), PoolError>,
    ) -> Result<Found, PoolError> {
        let offset = self.offset(pbn, 1)?;
        let read = self.device().read_at(offset, block).map_err(PoolError::from);
        let Err(first) = read.and_then(|()| check(block)) else { return Ok(Found::AtFirst) };
        let mut other = [0; BLOCK_BYTES];
        for nth in 0..self.device().alternatives() {
            let read = self.device().read_alternative(nth, offset, &mut other);
            if read.is_err() || check(&other).is_err() {
                continue;
            }
            tracing::warn!(%pbn, error = %first, "read from another copy");
            match self.device().repair_at(offset, block, &other) {
                Ok(true) => _ = self.repairs.repaired.fetch_add(1, Ordering::Relaxed),
                // It has changed since, or its device is out by now.
                Ok(false) => {}
                Err(error) => tracing::error!(%pbn, %error, "a bad block was not rewritten"),
            }
            block.copy_from_slice(&other);
            return Ok(Found::Elsewhere);
        }
        self.repairs.damaged.fetch_add(1, Ordering::Relaxed);
        Err(first)
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
        let (blocks, _) = bytes.as_chunks_mut::<BLOCK_BYTES>();
        for ((pbn, crc), block) in pbns.zip(crcs).zip(blocks) {
            if verify(pbn, *crc, block).is_err() {
                self.read_block(pbn, *crc, block)?;
            }
        }
        Ok(())
    }

    /// A block out of the cache, or read, verified by checksum and by content hash (`content`
    /// computes it), and then kept.
    pub fn cached_block(
        &self,
        pointer: &Pointer,
        content: impl Fn(&[u8; BLOCK_BYTES]) -> ContentHash,
    ) -> Result<Arc<[u8; BLOCK_BYTES]>, PoolError> {
        if let Some(block) = self.cache().get(pointer) {
            return Ok(block);
        }
        let mut block = [0; BLOCK_BYTES];
        let (pbn, wanted) = (pointer.pbn, pointer.hash);
        let read = self.read_proven(pointer, &mut block, &content);
        if let Err(error) = read {
            let known = self.mended().get(pbn, pointer.crc).ok_or(error)?;
            block.copy_from_slice(&*known);
            let met = content(&block);
            if wanted != met {
                return Err(PoolError::CorruptContent { pbn, wanted, met });
            }
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
    pub(super) fn offset(&self, first: Pbn, count: u64) -> Result<u64, PoolError> {
        let layout = self.label().layout;
        let end = first.0.checked_add(count).filter(|&end| end <= layout.total);
        if first.0 < layout.data_start || end.is_none() {
            return Err(PoolError::OutOfPool { pbn: first });
        }
        Ok(first.0 * BLOCK_BYTES_U64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::device::sim::SimDevice;
    use crate::limits::RAID_CHUNK_BYTES;
    use crate::pool::PoolOptions;
    use crate::pool::testing::{Chance, random_block};
    use crate::pool::write_set::Budget;
    use crate::raid::assemble;
    use crate::raid::layout::{Level, data_start};
    use crate::units::numbers::ByteCount;

    /// A pool on an array, with some blocks in it and their checksums.
    type Filled = (Arc<Pool>, Vec<Arc<SimDevice>>, Vec<(Pbn, u32)>);

    fn filled(level: Level, members: u64) -> Filled {
        let size = ByteCount(20 << 20);
        let sims: Vec<_> =
            (0..members).map(|n| Arc::new(SimDevice::new(&format!("disk{n}"), size))).collect();
        let mut devices: Vec<Arc<dyn Device>> = Vec::new();
        for sim in &sims {
            devices.push(Arc::<SimDevice>::clone(sim));
        }
        let array = assemble::create(level, &devices).unwrap();
        let pool = Pool::create(array, [1; 16], PoolOptions::default()).unwrap();
        let mut set = pool.begin(Budget::Ordinary);
        let mut chance = Chance::new(1);
        let mut blocks = Vec::new();
        for _ in 0..100 {
            let block = random_block(&mut chance);
            blocks.push((set.append(&block).unwrap(), crc32c(&block)));
        }
        set.flush_buffer().unwrap();
        pool.device().flush().unwrap();
        (pool, sims, blocks)
    }

    /// Everything on that device of stripes that have one of the blocks, each in another way.
    fn rot(sims: &[Arc<SimDevice>], n: usize, level: Level, blocks: &[(Pbn, u32)]) {
        let columns = to_u64(sims.len() - level.spare(sims.len()));
        let chunk = |pbn: Pbn| pbn.0 * BLOCK_BYTES_U64 / (columns * RAID_CHUNK_BYTES);
        let (first, last) = (chunk(blocks[0].0), chunk(blocks[blocks.len() - 1].0));
        let mut chance = Chance::new(to_u64(n) + 7);
        for block in first * RAID_CHUNK_BYTES / BLOCK_BYTES_U64
            ..(last + 1) * RAID_CHUNK_BYTES / BLOCK_BYTES_U64
        {
            let at = data_start(RAID_CHUNK_BYTES) + block * BLOCK_BYTES_U64;
            sims[n].rot(at, &random_block(&mut chance)[..64]);
        }
    }

    fn read_all(pool: &Pool, blocks: &[(Pbn, u32)]) -> usize {
        let read = |(pbn, crc): &(Pbn, u32)| {
            let mut block = [0; BLOCK_BYTES];
            pool.read_block(*pbn, *crc, &mut block).is_ok() && crc32c(&block) == *crc
        };
        blocks.iter().filter(|block| read(block)).count()
    }

    /// Goal: what rots on as many devices as the level bears is read, rewritten and counted, and
    /// then is right on the devices; on one more it is an error that names the block.
    #[test]
    fn a_bad_block_is_read_from_another_copy_and_rewritten() {
        for (level, members) in [(Level::Mirror, 2), (Level::Parity1, 3), (Level::Parity2, 5)] {
            let (pool, sims, blocks) = filled(level, members);
            assert_eq!((read_all(&pool, &blocks), pool.repairs()), (100, (0, 0)));
            rot(&sims, 0, level, &blocks);
            assert_eq!(read_all(&pool, &blocks), 100, "{level:?}");
            let (repaired, damaged) = pool.repairs();
            assert!(repaired > 10 && damaged == 0, "{level:?}: {repaired} {damaged}");
            assert_eq!(pool.devices()[0].repaired_blocks, repaired);
            assert_eq!(read_all(&pool, &blocks), 100);
            assert_eq!(pool.repairs(), (repaired, 0), "all of them are right now");
            for n in 0..=level.spare(sims.len()) {
                rot(&sims, n, level, &blocks);
            }
            let left = read_all(&pool, &blocks);
            assert!(left < 100 && pool.repairs().1 > 0, "{level:?}: {left}");
            let lost = blocks
                .iter()
                .find_map(|(pbn, crc)| pool.read_block(*pbn, *crc, &mut [0; BLOCK_BYTES]).err());
            assert!(matches!(lost, Some(PoolError::Corrupt { .. })), "{lost:?}");
        }
    }

    /// A run of blocks is repaired as single ones are.
    #[test]
    fn a_run_with_bad_blocks_is_repaired() {
        let (pool, sims, blocks) = filled(Level::Parity1, 4);
        rot(&sims, 2, Level::Parity1, &blocks);
        let run: Vec<_> = blocks
            .iter()
            .enumerate()
            .take_while(|(n, (pbn, _))| pbn.0 == blocks[0].0.0 + to_u64(*n))
            .map(|(_, (_, crc))| *crc)
            .collect();
        assert!(run.len() > 20);
        let mut bytes = vec![0; run.len() * BLOCK_BYTES];
        pool.read_run(blocks[0].0, &run, &mut bytes).unwrap();
        assert!(pool.repairs().0 > 0);
        for (block, crc) in bytes.chunks(BLOCK_BYTES).zip(run) {
            assert_eq!(crc32c(block), crc);
        }
    }
}
