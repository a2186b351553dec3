//! What the tests of pool and volume share: simulated devices, and what was written to them.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::device::Device;
pub(crate) use crate::device::sim::Chance;
use crate::device::sim::{Call, On, SimDevice};
use crate::pool::Pool;
use crate::pool::pointer::VolumeKey;
use crate::units::ids::SourceId;
use crate::units::numbers::{ByteCount, CpNumber, Pbn};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

/// A simulated device.
pub(crate) fn new_device(bytes: u64) -> Arc<SimDevice> {
    Arc::new(SimDevice::new("disk0", ByteCount(bytes)))
}

/// A block of random bytes.
pub(crate) fn random_block(chance: &mut Chance) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&chance.next_u64().to_le_bytes());
    }
    block
}

/// Cuts the power of a device and returns another one with what survived, so that whoever still
/// holds the old one cannot reach it.
pub(crate) fn crashed(device: &SimDevice, seed: u64) -> Arc<SimDevice> {
    device.power_cut(seed);
    Arc::new(SimDevice::from_image("disk0", device.medium()))
}

/// A copy of a device at rest.
pub(crate) fn copied(device: &SimDevice) -> Arc<SimDevice> {
    Arc::new(SimDevice::from_image("disk0", device.image()))
}

/// Writes and flushes since the trace was emptied.
pub(crate) fn changes(device: &SimDevice) -> Vec<Call> {
    device.trace().into_iter().filter(|call| call.on != On::Read).collect()
}

/// Flushes since the trace was emptied.
pub(crate) fn flushes(device: &SimDevice) -> usize {
    device.trace().iter().filter(|call| call.on == On::Flush).count()
}

/// The blocks written since the trace was emptied.
pub(crate) fn written_blocks(device: &SimDevice) -> BTreeSet<u64> {
    let block = |at: u64| at / BLOCK_BYTES_U64;
    let written = changes(device).into_iter().filter(|call| call.length > 0);
    written.flat_map(|call| block(call.offset)..=block(call.offset + call.length - 1)).collect()
}

/// The bytes of a block as a reader sees them.
pub(crate) fn block_at(device: &SimDevice, block: u64) -> [u8; BLOCK_BYTES] {
    let mut bytes = [0; BLOCK_BYTES];
    device.read_at(block * BLOCK_BYTES_U64, &mut bytes).unwrap();
    bytes
}

/// What breaks a pool on purpose, for negative controls.
impl Pool {
    /// From now on freed blocks are given out at once.
    pub(crate) fn break_allocator(&self) {
        self.lock().unwrap().space.broken = true;
    }

    /// From now on CPs free what kept CPs have.
    pub(crate) fn break_keeping(&self) {
        self.lock().unwrap().space.forgets_kept = true;
    }

    /// Does that while the state is held, as by a call that is stuck under its lock.
    pub(crate) fn with_state_held<T>(&self, work: impl FnOnce() -> T) -> T {
        let _state = self.lock().unwrap();
        work()
    }

    /// Whether a call that takes the state's lock would get it at once.
    pub(crate) fn is_state_free(&self) -> bool {
        self.state.try_lock().is_ok()
    }

    /// Blocks in the cache.
    pub(crate) fn cached_blocks(&self) -> usize {
        self.cache.len()
    }

    /// Makes the state unusable, as a panic in the middle of a change would.
    pub(crate) fn poison(self: &Arc<Self>) {
        let pool = Arc::clone(self);
        let panicked = std::thread::spawn(move || {
            let _state = pool.lock().unwrap();
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
    }

    /// Marks a free block used and that one free in the stored map. Returns both.
    pub(crate) fn break_accounts(&self, used: Pbn) -> (Pbn, Pbn) {
        let mut state = self.lock().unwrap();
        (state.space.break_map(used), used)
    }

    /// Gives a second volume the tree of the first.
    pub(crate) fn break_twin(&self, key: VolumeKey, twin: VolumeKey) {
        let mut state = self.lock().unwrap();
        let mut row = state.mirror.volume(key).unwrap().clone();
        row.key = twin;
        state.mirror.load_volume(row);
    }

    /// Has the catalog count other blocks for a source.
    pub(crate) fn break_used(&self, source: SourceId, blocks: u64) {
        self.lock().unwrap().mirror.load_used(source, blocks);
    }

    /// Makes a source's applied CP another one.
    pub(crate) fn break_cp(&self, source: SourceId, cp: CpNumber) {
        let mut state = self.lock().unwrap();
        let mut row = state.mirror.source(source).unwrap().clone();
        row.applied = cp;
        state.mirror.load_source(row);
    }
}
