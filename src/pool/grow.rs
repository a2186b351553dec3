//! A pool whose device has become larger.
//!
//! Called at each open, before anything is given out. Only devices that were added make a pool larger
//! ([`crate::raid::span`]): a plain device keeps the size that its pool was made with. In this order:
//!
//! 1. one transaction of the catalog: the new number of blocks, and empty pages of the free map for those
//!    that are new;
//! 2. both copies of the label.
//!
//! After a cut between them the label says less than the catalog, or its copies differ in nothing but that:
//! the smaller number is taken, and the next open does both again. Nothing lies behind the old end yet.
//!
//! How far a pool can grow is bounded by its catalog, which keeps its size: the free map has an eighth
//! of it.

use std::sync::Arc;

use crate::device::Device;
use crate::limits::{POOL_CATALOG_SPARE, POOL_DEVICE_BYTES_MAX};
use crate::raid::span::Span;
use crate::units::BLOCK_BYTES_U64;

use super::Pool;
use super::bitmap::PAGE_BLOCKS;
use super::error::PoolError;
use super::label::{self, Label, Layout};
use super::store::{FREE_PAGE_BYTES, Store};

/// Blocks that a pool of that layout can have.
pub(super) const fn blocks_max(layout: &Layout) -> u64 {
    let pages = layout.catalog_bytes() / POOL_CATALOG_SPARE / FREE_PAGE_BYTES_U64;
    layout.data_start + pages * PAGE_BLOCKS
}

const FREE_PAGE_BYTES_U64: u64 = crate::units::convert::to_u64(FREE_PAGE_BYTES);

/// The label of a pool that has all of its device.
pub(super) fn grown(
    device: &Arc<dyn Device>,
    label: Label,
    cache_bytes: u64,
) -> Result<Label, PoolError> {
    let is_grown = Span::of(Arc::clone(device)).is_some_and(|span| span.is_grown());
    let most = device.size().0.min(POOL_DEVICE_BYTES_MAX) / BLOCK_BYTES_U64;
    let total = most.min(blocks_max(&label.layout));
    if !is_grown || total <= label.layout.total {
        return Ok(label);
    }
    let grown = Label { layout: Layout { total, ..label.layout }, ..label };
    Store::grow(Arc::clone(device), &label, &grown, cache_bytes)?;
    label::write_all(&**device, &grown)?;
    let (before, now) = (label.layout.total, total);
    tracing::info!(before, now, "the pool has more blocks: devices were added");
    Ok(grown)
}

impl Pool {
    /// Bytes that it has of its device.
    pub fn device_bytes(&self) -> u64 {
        self.label().layout.total * BLOCK_BYTES_U64
    }

    /// Bytes that it can grow to.
    pub fn bytes_max(&self) -> u64 {
        blocks_max(&self.label().layout) * BLOCK_BYTES_U64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::sim::SimDevice;
    use crate::pool::PoolOptions;
    use crate::pool::rows::SourceRow;
    use crate::pool::write_set::Budget;
    use crate::raid::assemble::{self, OpenOptions};
    use crate::raid::layout::Level;
    use crate::raid::span::{self, Wanted};
    use crate::raid::tests::Rig;
    use crate::units::BLOCK_BYTES;
    use crate::units::ids::{ArrayId, SourceId};
    use crate::units::numbers::ByteCount;

    const SOURCE: SourceId = SourceId([3; 16]);

    fn open(rig: &Rig) -> Option<Arc<Pool>> {
        let devices = rig.devices();
        let names: Vec<String> = devices.iter().map(|disk| disk.name().to_string()).collect();
        let wanted = Wanted { shape: (Level::Mirror, names.len()), names: &names, adding: &[] };
        let (device, _) = span::open(&devices, wanted, OpenOptions::default()).ok()?;
        Pool::open(device, PoolOptions::default()).ok()
    }

    /// A pool on two devices that knows a source, and two more that were added to its array; and its
    /// blocks.
    fn added() -> (Rig, u64) {
        let rig = Rig::blank(4, 1100);
        let devices = rig.devices();
        let home = assemble::create(Level::Mirror, &devices[..2]).unwrap();
        let pool = Pool::create(home.clone(), [1; 16], PoolOptions::default()).unwrap();
        pool.catalog().put_source(SourceRow::new(SOURCE, "s".parse().unwrap())).unwrap();
        let total = pool.space().unwrap().total.0;
        drop(pool);
        span::add(&home, ArrayId([9; 16]), &devices[2..]).unwrap();
        (rig, total)
    }

    /// Goal: the pool has the new blocks, gives them out, and keeps what it knew; also if the power
    /// goes at any change of that open.
    #[test]
    fn a_pool_grows_whenever_the_power_goes() {
        let (made, before) = added();
        for nth in 0.. {
            let rig = made.copy();
            rig.cut_at(nth);
            let opened = open(&rig).is_some() && !rig.is_off();
            let pool = open(&rig.cut(nth)).unwrap();
            let space = pool.space().unwrap();
            assert!(space.total.0 > before * 19 / 10, "{before}, {space:?}");
            assert!(pool.catalog().source(SOURCE).unwrap().is_some(), "cut at {nth}");
            if opened {
                assert!(nth > 10, "{nth}");
                fill(&pool, space.free.0 - space.reserve.0, before);
                return;
            }
        }
    }

    /// Every free block can be written and read, those behind the old end among them.
    fn fill(pool: &Arc<Pool>, blocks: u64, before: u64) {
        let mut write_set = pool.begin(Budget::Ordinary);
        let mut highest = 0;
        for number in 0..blocks {
            let mut block = [7; BLOCK_BYTES];
            block[..8].copy_from_slice(&number.to_le_bytes());
            highest = write_set.append(&block).unwrap().0.max(highest);
        }
        write_set.flush_buffer().unwrap();
        assert!(highest > before + before / 2, "{highest} of {before}");
    }

    #[test]
    fn a_pool_that_was_not_added_to_keeps_its_size() {
        let disk = Arc::new(SimDevice::new("plain", ByteCount(32 << 20)));
        let pool = Pool::create(disk.clone(), [1; 16], PoolOptions::default()).unwrap();
        let total = pool.space().unwrap().total;
        drop(pool);
        let mut image = disk.image();
        image.resize(48 << 20, 0);
        let larger = Arc::new(SimDevice::from_image("plain", image));
        let pool = Pool::open(larger, PoolOptions::default()).unwrap();
        assert_eq!(pool.space().unwrap().total, total);
        assert!(pool.bytes_max() > total.0 * BLOCK_BYTES_U64);
    }
}
