//! The blocks of one CP that is not published yet.
//!
//! A write set takes free blocks in runs, writes them through buffers of 1 MiB, of 4 MiB to an array,
//! the second and all
//! that follow beside the filling of the next one, and notes which published blocks the CP no longer
//! needs. Nothing of it is visible or durable before
//! `Pool::publish` takes it; dropping it gives everything back. Builders of different CPs work
//! side by side, each in its own runs, so each is written in sequence.
//!
//! A failed device write latches the pool. A full pool is a refusal: the CP is dropped and may
//! be built again when there is room.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::device::buffer::AlignedBuffer;
use crate::limits::{POOL_IO_BYTES_MAX, POOL_LEASE_BLOCKS, POOL_STRIPED_IO_BYTES_MAX};
use crate::units::convert::{to_u64, to_usize};
use crate::units::ids::SourceId;
use crate::units::numbers::{BlockCount, CpNumber, Pbn};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::Pool;
use super::behind::{Behind, Filled};
use super::cache::BlockCache;
use super::error::PoolError;
use super::pointer::{TreeRoot, VolumeKey};
use super::space::{Account, Draw, SpaceMap};

/// A number of free blocks that are promised to the holder. Dropping it takes the promise back.
#[derive(Debug)]
pub struct Reservation {
    pool: Arc<Pool>,
    blocks: u64,
}

impl Reservation {
    pub(super) fn new(pool: Arc<Pool>, blocks: u64) -> Self {
        Self { pool, blocks }
    }

    /// Blocks still promised.
    pub fn blocks(&self) -> BlockCount {
        BlockCount(self.blocks)
    }

    /// Takes another one's promise over.
    pub fn merge(&mut self, mut other: Self) {
        self.blocks += std::mem::take(&mut other.blocks);
    }

    /// Takes part of the promise out; less if there is less.
    #[must_use]
    pub fn split(&mut self, blocks: BlockCount) -> Self {
        let blocks = blocks.0.min(self.blocks);
        self.blocks -= blocks;
        Self { pool: Arc::clone(&self.pool), blocks }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.blocks > 0 {
            self.pool.unhold(self.blocks);
        }
    }
}

/// Which part of the free space a CP may use (R18).
#[derive(Debug)]
pub enum Budget {
    /// Neither the reserve nor what is promised to others.
    Ordinary,
    /// The reserve as well: CPs that free more than they take, and drops.
    Reserve,
    /// The reserve as well when the rest is used up; then it is published only if it gives back at
    /// least what it takes.
    Freeing {
        /// Whether it has come to that.
        drew: bool,
    },
    /// What was promised when the writes were ordered; the reserve when that is used up.
    Held(Reservation),
}

impl Budget {
    /// For CPs made elsewhere, of which nobody knows yet whether they take or free.
    pub const FREEING: Self = Self::Freeing { drew: false };
}

/// Blocks side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub start: Pbn,
    /// How many.
    pub count: u64,
}

/// The blocks of one CP under way.
#[derive(Debug)]
pub struct WriteSet {
    pool: Arc<Pool>,
    budget: Budget,
    pub(super) account: Account,
    /// The source whose work tree this goes on with.
    pub(super) work: Option<SourceId>,
    /// Taken from the free map, not given to anybody yet.
    lease: Run,
    /// Bytes not written yet, for the blocks from `buffer_start` on; made with the first block.
    buffer: Option<AlignedBuffer>,
    buffer_start: Pbn,
    buffer_bytes: usize,
    queued: usize,
    /// Full buffers are written by a thread from the second one on.
    behind: Option<Behind>,
    /// Whether they may be. In unit tests all is written in the order in which it is made, so that
    /// a seed gives the same history again.
    beside: bool,
    written: bool,
    bases: BTreeMap<VolumeKey, TreeRoot>,
    /// Trees begun and not finished: as long as there is one, this is half a CP.
    unfinished: u32,
    /// Blocks that its source may have.
    bound: Option<Bound>,
}

/// How much of the pool a source may have, with the CPs of it that are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bound {
    /// What it had when the CP was begun.
    pub(super) used: u64,
    /// What it may have; more only if it has more already, and the CP makes that no more.
    pub(super) limit: u64,
}

impl Bound {
    pub(super) fn refuse(self, wanted: u64) -> Result<(), PoolError> {
        if wanted <= self.limit.max(self.used) {
            return Ok(());
        }
        let (wanted_bytes, limit_bytes) = (wanted * BLOCK_BYTES_U64, self.limit * BLOCK_BYTES_U64);
        Err(PoolError::OverLimit { wanted_bytes, limit_bytes })
    }
}

impl WriteSet {
    pub(super) fn new(pool: Arc<Pool>, budget: Budget) -> Self {
        let device = pool.device();
        let buffer_bytes = match device.stripe() > device.alignment() {
            true => POOL_STRIPED_IO_BYTES_MAX,
            false => POOL_IO_BYTES_MAX,
        };
        Self {
            buffer_bytes: to_usize(buffer_bytes),
            pool,
            budget,
            account: Account::default(),
            work: None,
            lease: Run { start: Pbn(0), count: 0 },
            buffer: None,
            buffer_start: Pbn(0),
            queued: 0,
            behind: None,
            beside: !cfg!(test),
            written: false,
            bases: BTreeMap::new(),
            unfinished: 0,
            bound: None,
        }
    }

    /// Full buffers are written beside the filling of the next ones, as outside of unit tests.
    #[cfg(test)]
    pub(super) fn write_beside(&mut self) {
        self.beside = true;
    }

    /// Its source may have so many blocks of the pool, as far as it is known what it has: a CP that makes
    /// it more is refused when it is published, or as soon as its own blocks are more.
    pub fn bound(&mut self, source: SourceId, blocks: BlockCount) -> Result<(), PoolError> {
        let used = self.pool.catalog().used(source)?;
        self.bound = used.map(|used| Bound { used: used.0, limit: blocks.0 });
        Ok(())
    }

    /// The pool it writes to.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Blocks taken and not dropped again.
    pub fn blocks(&self) -> BlockCount {
        BlockCount(self.account.allocated.len() - self.account.dropped.len())
    }

    /// Published blocks that this CP frees.
    pub fn freed_blocks(&self) -> BlockCount {
        BlockCount(self.account.freed.values().map(super::blockset::FreedBlocks::len).sum())
    }

    /// Takes one block and queues its bytes. It can be read after [`WriteSet::flush_buffer`].
    pub fn append(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<Pbn, PoolError> {
        if self.lease.count == 0 {
            self.lease = self.take_lease(POOL_LEASE_BLOCKS)?;
        }
        let pbn = self.lease.start;
        self.queue(pbn, block)?;
        self.lease = Run { start: Pbn(pbn.0 + 1), count: self.lease.count - 1 };
        assert!(self.account.allocated.insert(pbn), "block {pbn} was given out twice");
        Ok(pbn)
    }

    /// Takes and queues whole blocks, `bytes.len()` being a multiple of 4096. Returns where they
    /// are, in order, in as few runs as free space allows.
    pub fn write(&mut self, bytes: &[u8]) -> Result<Vec<Run>, PoolError> {
        let (blocks, rest) = bytes.as_chunks::<BLOCK_BYTES>();
        if !rest.is_empty() {
            let what = format!("{} bytes to write are no whole blocks", bytes.len());
            return Err(PoolError::Inconsistent { what });
        }
        let mut runs: Vec<Run> = Vec::new();
        for block in blocks {
            let pbn = self.append(block)?;
            match runs.last_mut() {
                Some(run) if run.start.0 + run.count == pbn.0 => run.count += 1,
                _ => runs.push(Run { start: pbn, count: 1 }),
            }
        }
        Ok(runs)
    }

    /// Notes that this CP no longer needs a block of that volume, written in CP `birth`.
    pub fn free(&mut self, key: VolumeKey, pbn: Pbn, birth: CpNumber) -> Result<(), PoolError> {
        #[cfg(test)]
        self.pool.lock()?.space.break_free(pbn);
        let new = if self.account.allocated.contains(pbn) {
            self.account.dropped.insert(pbn)
        } else {
            self.account.freed.entry(key).or_default().insert(pbn, birth)
        };
        if new {
            return Ok(());
        }
        Err(PoolError::Inconsistent { what: format!("block {pbn} was freed twice") })
    }

    /// A new tree of that volume is begun on `base`. `Pool::publish` refuses the CP if another
    /// tree than that was published meanwhile. The first base holds: what a second pass of the
    /// same CP is built on was never published.
    pub fn begin_tree(&mut self, key: VolumeKey, base: TreeRoot) {
        self.bases.entry(key).or_insert(base);
        self.unfinished += 1;
    }

    /// Whether a tree of that volume was begun in it: it is to be published.
    pub fn has_tree(&self, key: VolumeKey) -> bool {
        self.bases.contains_key(&key)
    }

    /// That tree is complete. `Pool::publish` refuses a CP with one that is not.
    pub fn end_tree(&mut self) {
        assert!(self.unfinished > 0, "a tree ends that was not begun");
        self.unfinished -= 1;
    }

    /// Writes what is queued to the device, so that it can be read. Not durable by this.
    pub fn flush_buffer(&mut self) -> Result<(), PoolError> {
        let queued = std::mem::take(&mut self.queued);
        // What is under way comes first, and its error too.
        let free = self.behind.as_mut().map_or(Ok(None), Behind::wait)?;
        let Some(buffer) = self.buffer.as_ref().filter(|_| queued > 0) else {
            self.buffer = self.buffer.take().or(free);
            return Ok(());
        };
        self.pool.check_latch()?;
        self.written = true;
        self.pool.write_blocks(self.buffer_start, &buffer[..queued])
    }

    /// Has a full buffer written: here the first time, by a thread from then on.
    fn hand_over(&mut self) -> Result<(), PoolError> {
        if !self.written || !self.beside {
            return self.flush_buffer();
        }
        if self.behind.is_none() {
            match Behind::start(&self.pool) {
                Ok(behind) => self.behind = Some(behind),
                Err(error) => {
                    tracing::debug!(%error, "no thread writes beside this one");
                    return self.flush_buffer();
                }
            }
        }
        self.pool.check_latch()?;
        let (Some(behind), Some(buffer)) = (&mut self.behind, self.buffer.take()) else {
            return Ok(());
        };
        let bytes = std::mem::take(&mut self.queued);
        self.buffer = behind.write(Filled { first: self.buffer_start, buffer, bytes })?;
        Ok(())
    }

    fn queue(&mut self, pbn: Pbn, block: &[u8; BLOCK_BYTES]) -> Result<(), PoolError> {
        let size = self.buffer_bytes;
        let next = self.buffer_start.0 + to_u64(self.queued) / BLOCK_BYTES_U64;
        if self.queued > 0 && (pbn.0 != next || self.queued == size) {
            self.hand_over()?;
        }
        if self.queued == 0 {
            self.buffer_start = pbn;
        }
        let buffer = self.buffer.get_or_insert_with(|| AlignedBuffer::new(size));
        buffer[self.queued..self.queued + BLOCK_BYTES].copy_from_slice(block);
        self.queued += BLOCK_BYTES;
        Ok(())
    }

    fn take_lease(&mut self, wanted: u64) -> Result<Run, PoolError> {
        self.pool.check_latch()?;
        if let Some(bound) = self.bound {
            // All of these are of its newest CP.
            bound.refuse(self.blocks().0 + 1)?;
        }
        if let Budget::Freeing { drew: drew @ false } = &mut self.budget {
            match self.pool.take(wanted, Draw::Ordinary) {
                Ok((start, count)) => return Ok(Run { start, count }),
                Err(PoolError::Full { .. }) => *drew = true,
                Err(error) => return Err(error),
            }
        }
        let draw = match &mut self.budget {
            Budget::Ordinary => Draw::Ordinary,
            Budget::Reserve | Budget::Freeing { .. } => Draw::Reserve,
            Budget::Held(reservation) => Draw::Held(&mut reservation.blocks),
        };
        let (start, count) = self.pool.take(wanted, draw)?;
        Ok(Run { start, count })
    }

    /// Whether it may be published only if it gives back at least what it takes.
    pub(super) fn must_free(&self) -> bool {
        matches!(self.budget, Budget::Freeing { drew: true })
    }

    pub(super) fn bound_of(&self) -> Option<Bound> {
        self.bound
    }

    /// Whether the device must be flushed before this CP is committed.
    pub(super) fn has_written(&self) -> bool {
        assert!(self.queued == 0, "a CP is committed with bytes still queued");
        let under_way = self.behind.as_ref().is_some_and(Behind::is_under_way);
        assert!(!under_way, "a CP is committed with bytes still under way");
        self.written
    }

    pub(super) fn is_finished(&self) -> bool {
        self.unfinished == 0
    }

    pub(super) fn bases(&self) -> &BTreeMap<VolumeKey, TreeRoot> {
        &self.bases
    }

    pub(super) fn account(&self) -> &Account {
        &self.account
    }

    /// The CP is staged: its blocks are the pool's now; what was leased and not used goes back.
    pub(super) fn settle(mut self, space: &mut SpaceMap, cache: &BlockCache) -> Settled {
        self.return_lease(space, cache);
        let account = std::mem::take(&mut self.account);
        // What is left of it, a reservation perhaps, must be dropped without the state's lock.
        Settled { account, rest: self }
    }

    fn return_lease(&mut self, space: &mut SpaceMap, cache: &BlockCache) {
        let Run { start, count } =
            std::mem::replace(&mut self.lease, Run { start: Pbn(0), count: 0 });
        (start.0..start.0 + count).for_each(|pbn| space.give_back(cache, Pbn(pbn)));
    }
}

/// A write set whose account was taken.
pub(super) struct Settled {
    account: Account,
    rest: WriteSet,
}

impl Settled {
    /// The account, and what must be dropped without the state's lock.
    pub(super) fn into_parts(self) -> (Account, WriteSet) {
        (self.account, self.rest)
    }
}

impl Drop for WriteSet {
    fn drop(&mut self) {
        // Nobody gets a block that is still being written. What failed has latched the pool.
        self.behind = None;
        if self.lease.count == 0 && self.account.allocated.is_empty() && self.work.is_none() {
            return;
        }
        let pool = Arc::clone(&self.pool);
        // If the state is poisoned, the pool refuses all writes: there is nobody to give to.
        let Ok(mut state) = pool.lock() else { return };
        if let Some(source) = self.work {
            state.works_open.remove(&source);
        }
        self.return_lease(&mut state.space, pool.cache());
        let Account { allocated, stored, .. } = &self.account;
        // What is stored is the work tree's, which stays.
        allocated.for_each(|pbn| {
            if !stored.contains(pbn) {
                state.space.give_back(pool.cache(), pbn);
            }
        });
    }
}
