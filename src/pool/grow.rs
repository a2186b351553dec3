//! A pool that becomes larger.
//!
//! Only devices that were added make a pool larger ([`crate::raid::span`]): a plain device keeps the size
//! that its pool was made with. [`Pool::add_devices`] does it while the pool is in use:
//!
//! 1. the new devices become an array, which nobody names yet;
//! 2. what is at home names it: an array in its labels, a plain device in the label of the pool;
//! 3. it is put behind the others in memory; nothing lies there yet;
//! 4. one transaction of the catalog, between two commits: the new number of blocks, and empty pages of
//!    the free map for those that are new;
//! 5. both copies of the pool's label;
//! 6. the free map in memory: from here on the new blocks are given out.
//!
//! A cut behind step 1 leaves an array that nobody names; whoever remembers its id goes on with it. Behind
//! step 2, each open takes all of its device into use before anything is given out, by steps 4 and 5.
//! Behind step 4 the label says less than the catalog, or its copies differ in nothing but that: what both
//! say is taken, and both are done again. Nothing lies behind the old end before step 6. An error in step 4
//! or 5 latches the pool: nobody knows what of it is durable.
//!
//! How far a pool can grow is bounded by its catalog, which keeps its size: the free map has an eighth
//! of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::device::Device;
use crate::limits::{POOL_CATALOG_SPARE, POOL_DEVICE_BYTES_MAX, RAID_ADDED_MAX};
use crate::raid::array::Array;
use crate::raid::assemble::AssembleError;
use crate::raid::layout::Level;
use crate::raid::span::{self, Span};
use crate::units::BLOCK_BYTES_U64;
use crate::units::ids::ArrayId;

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

/// The label of a pool that has all of its device, if that is more.
fn larger(device: &dyn Device, label: &Label) -> Option<Label> {
    let most = device.size().0.min(POOL_DEVICE_BYTES_MAX) / BLOCK_BYTES_U64;
    let total = most.min(blocks_max(&label.layout));
    let layout = Layout { total, ..label.layout };
    (total > label.layout.total).then_some(Label { layout, ..*label })
}

/// The label of a pool that has all of its device, at an open.
pub(super) fn grown(
    device: &Arc<dyn Device>,
    label: Label,
    cache_bytes: u64,
) -> Result<Label, PoolError> {
    let is_grown = Span::of(Arc::clone(device)).is_some_and(|span| span.is_grown());
    let Some(grown) = larger(&**device, &label).filter(|_| is_grown) else { return Ok(label) };
    Store::grow(Arc::clone(device), &label, &grown, cache_bytes)?;
    label::write_all(&**device, &grown)?;
    tell(&label, &grown);
    Ok(grown)
}

fn tell(before: &Label, now: &Label) {
    let (before, now) = (before.layout.total, now.layout.total);
    tracing::info!(before, now, "the pool has more blocks: devices were added");
}

const NO_PLACE: AssembleError = AssembleError::Grown { max: RAID_ADDED_MAX };

impl Pool {
    /// Makes an array with that id out of devices that begin with zeros and takes it into use, while
    /// everything goes on. What an earlier call with that id has left is gone on with. One at a time.
    pub fn add_devices(&self, id: ArrayId, devices: &[Arc<dyn Device>]) -> Result<(), PoolError> {
        let mut label = self.growing.lock().map_err(|_| PoolError::Poisoned)?;
        self.check_latch()?;
        let (span, array) = match self.array() {
            Some(span) if !span.is_plain_at_home() => {
                (Arc::clone(span), span::add(span.home(), id, devices)?)
            }
            Some(_) | None => self.add_behind_plain(&mut label, id, devices)?,
        };
        if !span.push(array) {
            return Err(NO_PLACE.into());
        }
        let Some(grown) = larger(&*span, &label) else { return Ok(()) };
        let between = self.committer().between_commits()?;
        self.check_latch()?;
        let stored = self.store().grow_to(&grown);
        stored
            .and_then(|()| label::write_all(&*span, &grown))
            .map_err(|error| self.latch(error))?;
        tell(&label, &grown);
        *label = grown;
        // Whoever is given a new block may use it.
        self.total.store(grown.layout.total, Ordering::Release);
        self.lock()?.space.grow(&grown.layout);
        drop(between);
        Ok(())
    }

    /// Steps 1 and 2 where a plain device is at home.
    fn add_behind_plain(
        &self,
        label: &mut Label,
        id: ArrayId,
        devices: &[Arc<dyn Device>],
    ) -> Result<(Arc<Span>, Arc<Array>), PoolError> {
        let named = label.with_behind(id).ok_or(NO_PLACE)?;
        let array = span::make(id, (Level::None, 1), devices)?;
        if named != *label {
            label::write_all(self.device(), &named).map_err(|error| self.latch(error))?;
            *label = named;
        }
        let whole = || Arc::new(Span::new(vec![Array::bare(Arc::clone(&self.device))]));
        let span = self.array().unwrap_or_else(|| self.behind.get_or_init(whole));
        Ok((Arc::clone(span), array))
    }

    /// Devices that are added at once, and the bytes that the pool's device would have with so many more
    /// of `bytes` each.
    pub fn added_size(&self, bytes: u64) -> (usize, u64) {
        let more = |width| Array::bytes_of(Level::None, width, bytes);
        match self.array() {
            Some(span) if !span.is_plain_at_home() => {
                (span.width(), span.size().0 + span.added_bytes(bytes))
            }
            Some(_) | None => (1, self.device().size().0 + more(1)),
        }
    }

    /// Whether it began on a plain device.
    pub fn is_plain_at_home(&self) -> bool {
        self.array().is_none_or(|span| span.is_plain_at_home())
    }

    /// The arrays that are behind what is at home.
    pub fn behind(&self) -> Vec<ArrayId> {
        self.array().map(|span| span.behind()).unwrap_or_default()
    }

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
    use crate::units::is_full;
    use crate::units::numbers::ByteCount;

    const SOURCE: SourceId = SourceId([3; 16]);

    fn open(rig: &Rig) -> Option<Arc<Pool>> {
        let devices = rig.devices();
        let names: Vec<String> = devices.iter().map(|disk| disk.name().to_string()).collect();
        let wanted = Wanted {
            shape: (Level::Mirror, names.len()),
            names: &names,
            adding: &[],
            plain: |_| None,
        };
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
    /// goes at any change of that open: each in the long form, one of six else.
    #[test]
    fn a_pool_grows_whenever_the_power_goes() {
        let (made, before) = added();
        for nth in (0..).step_by(if is_full() { 1 } else { 6 }) {
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

    /// A pool in use on the first device, or the first two, of a rig of twice as many.
    fn in_use(level: Level) -> (Rig, usize, Arc<Pool>) {
        let width = if level == Level::None { 1 } else { 2 };
        let rig = Rig::blank(2 * width, 1100);
        let devices = rig.devices();
        let home: Arc<dyn Device> = match level {
            Level::None => Arc::clone(&devices[0]),
            Level::Mirror | Level::Parity1 | Level::Parity2 => {
                assemble::create(level, &devices[..width]).unwrap()
            }
        };
        let pool = Pool::create(home, [1; 16], PoolOptions::default()).unwrap();
        pool.catalog().put_source(SourceRow::new(SOURCE, "s".parse().unwrap())).unwrap();
        (rig, width, pool)
    }

    /// Opens all of them as a start does.
    fn open_all(rig: &Rig, level: Level, adding: &[span::Adding]) -> Option<Arc<Pool>> {
        let devices = rig.devices();
        let names: Vec<String> = devices.iter().map(|disk| disk.name().to_string()).collect();
        let shape = (level, names.len());
        let wanted = Wanted { shape, names: &names, adding, plain: label::behind };
        let (device, left_out) = span::open(&devices, wanted, OpenOptions::default()).ok()?;
        assert!(left_out.is_empty(), "{left_out:?}");
        Pool::open(device, PoolOptions::default()).ok()
    }

    /// Goal: devices are added to a pool in use, plain or not; its new blocks are there at once, also after
    /// a power cut at any change, and what was known is.
    #[test]
    fn a_pool_in_use_grows_whenever_the_power_goes() {
        for level in [Level::None, Level::Mirror] {
            let id = ArrayId([9; 16]);
            for nth in (0..).step_by(3) {
                let (rig, width, pool) = in_use(level);
                let before = pool.space().unwrap().total.0;
                let devices = rig.devices();
                let paths = devices[width..].iter().map(|one| one.name().to_string().into());
                let adding = [span::Adding { array: id, paths: paths.collect(), done: false }];
                rig.cut_at(nth);
                let done = pool.add_devices(id, &devices[width..]).is_ok() && !rig.is_off();
                rig.cut_at(u64::MAX);
                if done {
                    let space = pool.space().unwrap();
                    assert!(space.total.0 > before * 19 / 10, "{before}, {space:?}");
                    fill(&pool, space.free.0 - space.reserve.0, before);
                    pool.add_devices(id, &devices[width..]).unwrap();
                    assert_eq!(pool.space().unwrap().total, space.total, "it is added twice");
                }
                drop(pool);
                let left = rig.cut(nth);
                let pool = open_all(&left, level, &adding).unwrap();
                if pool.behind().is_empty() {
                    // Of a plain device what was begun is gone on with behind the open.
                    pool.add_devices(id, &left.devices()[width..]).unwrap();
                }
                let space = pool.space().unwrap();
                assert!(space.total.0 > before * 19 / 10, "cut at {nth}: {before}, {space:?}");
                assert!(pool.catalog().source(SOURCE).unwrap().is_some(), "cut at {nth}");
                if done {
                    assert!(nth > 10, "{nth}");
                    break;
                }
            }
        }
    }

    /// Goal: without its added device a plain pool is refused by name, and so is a device that was never
    /// added.
    #[test]
    fn what_is_behind_a_plain_device_must_be_there() {
        let (rig, width, pool) = in_use(Level::None);
        let devices = rig.devices();
        pool.add_devices(ArrayId([9; 16]), &devices[width..]).unwrap();
        drop(pool);
        let alone = Pool::open(Arc::clone(&devices[0]), PoolOptions::default()).unwrap_err();
        assert!(alone.to_string().contains("devices were added behind this one"), "{alone}");
        let names = vec!["disk0".to_owned(), "other".to_owned()];
        let wanted =
            Wanted { shape: (Level::None, 2), names: &names, adding: &[], plain: label::behind };
        let other: Arc<dyn Device> = Arc::new(SimDevice::new("other", devices[1].size()));
        assemble::create(Level::None, &[Arc::clone(&other)]).unwrap();
        let both = [Arc::clone(&devices[0]), other];
        let error = span::open(&both, wanted, OpenOptions::default()).unwrap_err().to_string();
        assert!(error.contains("was added behind the first one"), "{error}");
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
