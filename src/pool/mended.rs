//! Blocks that the device does not hold any more, and whose content is known again.
//!
//! A block that fails its check may be got from the other end of the mirror (`volume::mend`). From
//! then on every reader of this pool is given the right bytes, until a CP has written them to a new
//! place. Nothing is written in place. An entry is for one checksum: what a pointer of another
//! content asks for at that place is not found here. Bounded: when it is full the oldest goes, and
//! is fetched again if it is asked for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Pool;
use super::error::PoolError;
use crate::limits::MENDED_BLOCKS_MAX;
use crate::units::BLOCK_BYTES;
use crate::units::hash::crc32c;
use crate::units::numbers::Pbn;

type Block = Arc<[u8; BLOCK_BYTES]>;

/// The blocks of one pool.
#[derive(Debug, Default)]
pub(super) struct Mended {
    held: Mutex<Held>,
    /// How many, for readers that need not lock.
    count: AtomicUsize,
}

#[derive(Debug, Default)]
struct Held {
    blocks: BTreeMap<Pbn, (u32, Block)>,
    order: VecDeque<Pbn>,
}

impl Mended {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    pub(super) fn get(&self, pbn: Pbn, crc: u32) -> Option<Block> {
        if self.is_empty() {
            return None;
        }
        let held = self.lock();
        held.blocks.get(&pbn).filter(|(known, _)| *known == crc).map(|(_, block)| block.clone())
    }

    /// Whether any of these blocks may be here.
    pub(super) fn may_have(&self, first: Pbn, count: u64) -> bool {
        !self.is_empty() && self.lock().blocks.range(first..Pbn(first.0 + count)).next().is_some()
    }

    fn put(&self, pbn: Pbn, crc: u32, block: Block) {
        let mut held = self.lock();
        if held.blocks.insert(pbn, (crc, block)).is_none() {
            held.order.push_back(pbn);
        }
        while held.blocks.len() > MENDED_BLOCKS_MAX {
            let Some(oldest) = held.order.pop_front() else { break };
            held.blocks.remove(&oldest);
        }
        self.count.store(held.blocks.len(), Ordering::Release);
    }

    /// Something else is written to that place.
    pub(super) fn written(&self, first: Pbn, count: u64) {
        if self.is_empty() {
            return;
        }
        let mut held = self.lock();
        let held = &mut *held;
        let end = Pbn(first.0 + count);
        let gone: Vec<Pbn> = held.blocks.range(first..end).map(|(pbn, _)| *pbn).collect();
        for pbn in gone {
            held.blocks.remove(&pbn);
            held.order.retain(|known| *known != pbn);
        }
        self.count.store(held.blocks.len(), Ordering::Release);
    }
}

impl Pool {
    /// Readers who ask for the block at `pbn` with that checksum are given these bytes, which have
    /// it. Whoever calls has proven them by their content hash as well.
    pub fn mend(&self, pbn: Pbn, crc: u32, block: [u8; BLOCK_BYTES]) -> Result<(), PoolError> {
        let met = crc32c(&block);
        if met != crc {
            return Err(PoolError::Corrupt { pbn, wanted: crc, met });
        }
        self.mended().put(pbn, crc, Arc::new(block));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mended_block_is_for_one_content_and_one_place_and_goes_with_a_write() {
        let mended = Mended::default();
        let block = |byte| Arc::new([byte; BLOCK_BYTES]);
        assert!(mended.get(Pbn(7), 1).is_none() && !mended.may_have(Pbn(0), 100));
        mended.put(Pbn(7), 1, block(1));
        assert_eq!(mended.get(Pbn(7), 1), Some(block(1)));
        assert!(mended.get(Pbn(7), 2).is_none() && mended.get(Pbn(8), 1).is_none());
        assert!(mended.may_have(Pbn(0), 8) && !mended.may_have(Pbn(0), 7));
        mended.written(Pbn(0), 7);
        assert!(mended.get(Pbn(7), 1).is_some());
        mended.written(Pbn(6), 2);
        assert!(mended.get(Pbn(7), 1).is_none());
        for n in 0..2 * u64::try_from(MENDED_BLOCKS_MAX).unwrap() {
            mended.put(Pbn(n), 1, block(1));
        }
        assert_eq!(mended.lock().blocks.len(), MENDED_BLOCKS_MAX);
        assert!(mended.get(Pbn(0), 1).is_none(), "the oldest goes first");
    }
}
