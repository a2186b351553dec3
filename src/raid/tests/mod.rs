//! Arrays on simulated devices: what they promise, and controls that must fail.

mod beyond;
mod conformance;
mod faults;
mod found;
mod grown;
mod hole;
mod rebuild;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::array::Array;
use super::assemble::{self, AssembleError, OpenOptions, Opened};
use super::layout::{Level, data_start};
use crate::device::sim::SimDevice;
use crate::device::{Device, DeviceError, Durability};
use crate::limits::RAID_CHUNK_BYTES;
use crate::units::numbers::ByteCount;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

/// Every level, with few and with more devices.
const SHAPES: [(Level, usize); 7] = [
    (Level::Mirror, 2),
    (Level::Mirror, 3),
    (Level::Parity1, 3),
    (Level::Parity1, 4),
    (Level::Parity2, 4),
    (Level::Parity2, 5),
    (Level::Parity2, 6),
];

/// What all devices of an array are plugged into.
#[derive(Debug)]
struct Supply {
    /// Changes until the power goes.
    left: AtomicU64,
    off: AtomicBool,
}

impl Supply {
    fn new() -> Arc<Self> {
        Arc::new(Self { left: AtomicU64::new(u64::MAX), off: AtomicBool::new(false) })
    }

    /// Cuts the power in the middle of the `nth` change from now, counted from 0.
    fn cut_at(&self, nth: u64) {
        self.left.store(nth, Ordering::SeqCst);
    }

    fn is_off(&self) -> bool {
        self.off.load(Ordering::SeqCst)
    }

    /// Whether this change is the one in which the power goes.
    fn goes(&self) -> bool {
        let before = self.left.fetch_sub(1, Ordering::SeqCst);
        if before == 0 {
            self.off.store(true, Ordering::SeqCst);
        }
        before == 0
    }
}

/// A device that loses its power together with others.
#[derive(Debug)]
struct Plugged {
    sim: Arc<SimDevice>,
    supply: Arc<Supply>,
}

impl Plugged {
    fn dark(&self) -> DeviceError {
        let error = Arc::new(std::io::Error::from_raw_os_error(5));
        let device = self.sim.name();
        DeviceError::Io { device, operation: "power", offset: 0, length: 0, error }
    }

    fn change(
        &self,
        written: Option<(u64, &[u8])>,
        work: impl FnOnce(&SimDevice) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        if self.supply.is_off() {
            return Err(self.dark());
        }
        if self.supply.goes() {
            if let Some((offset, bytes)) = written {
                self.sim.write_at(offset, bytes)?;
            }
            return Err(self.dark());
        }
        work(&self.sim)
    }
}

impl Device for Plugged {
    fn name(&self) -> Arc<str> {
        self.sim.name()
    }

    fn size(&self) -> ByteCount {
        self.sim.size()
    }

    fn alignment(&self) -> ByteCount {
        self.sim.alignment()
    }

    fn durability(&self) -> Durability {
        self.sim.durability()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        if self.supply.is_off() { Err(self.dark()) } else { self.sim.read_at(offset, buffer) }
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.change(Some((offset, bytes)), |sim| sim.write_at(offset, bytes))
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.change(Some((offset, bytes)), |sim| sim.write_durable_at(offset, bytes))
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.change(None, SimDevice::flush)
    }
}

/// The devices of an array, which outlive it.
pub(crate) struct Rig {
    sims: Vec<Arc<SimDevice>>,
    supply: Arc<Supply>,
}

impl Rig {
    /// Blank devices with room for so many stripes.
    pub(crate) fn blank(members: usize, stripes: u64) -> Self {
        let size = ByteCount(data_start(RAID_CHUNK_BYTES) + stripes * RAID_CHUNK_BYTES);
        let sim = |n| Arc::new(SimDevice::new(&format!("disk{n}"), size));
        Self { sims: (0..members).map(sim).collect(), supply: Supply::new() }
    }

    fn device(&self, place: usize) -> Arc<dyn Device> {
        let (sim, supply) = (Arc::clone(&self.sims[place]), Arc::clone(&self.supply));
        Arc::new(Plugged { sim, supply })
    }

    pub(crate) fn devices(&self) -> Vec<Arc<dyn Device>> {
        (0..self.sims.len()).map(|place| self.device(place)).collect()
    }

    /// As [`Supply::cut_at`].
    pub(crate) fn cut_at(&self, nth: u64) {
        self.supply.cut_at(nth);
    }

    pub(crate) fn is_off(&self) -> bool {
        self.supply.is_off()
    }

    fn create(&self, level: Level) -> Arc<Array> {
        assemble::create(level, &self.devices()).unwrap()
    }

    /// Opens without the devices in `missing`.
    fn try_open(&self, missing: &[usize]) -> Result<Opened, AssembleError> {
        let there = (0..self.sims.len()).filter(|place| !missing.contains(place));
        let there: Vec<_> = there.map(|place| self.device(place)).collect();
        assemble::open(&there, OpenOptions { accept_missing: true })
    }

    fn open(&self, missing: &[usize]) -> Arc<Array> {
        self.try_open(missing).unwrap().array
    }

    /// What a power cut leaves, on other devices, so that whoever holds the old ones is harmless.
    pub(crate) fn cut(&self, seed: u64) -> Self {
        let mut chance = crate::device::sim::Chance::new(seed);
        let sims = self.sims.iter().map(|sim| {
            sim.power_cut(chance.next_u64());
            Arc::new(SimDevice::from_image(&sim.name(), sim.medium()))
        });
        Self { sims: sims.collect(), supply: Supply::new() }
    }

    /// The same, as it is.
    pub(crate) fn copy(&self) -> Self {
        let sims =
            self.sims.iter().map(|sim| Arc::new(SimDevice::from_image(&sim.name(), sim.image())));
        Self { sims: sims.collect(), supply: Supply::new() }
    }
}

/// A block that says which one it is, and which version.
fn block(number: u64, version: u64) -> [u8; BLOCK_BYTES] {
    let mut chance = crate::device::sim::Chance::new(number << 32 | version);
    let mut block = [0; BLOCK_BYTES];
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&chance.next_u64().to_le_bytes());
    }
    block[..8].copy_from_slice(&version.to_le_bytes());
    if version == 0 { [0; BLOCK_BYTES] } else { block }
}

/// The version of a block that was read; `None` if it is not one that was written.
fn version_of(number: u64, bytes: &[u8; BLOCK_BYTES]) -> Option<u64> {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    let version = u64::from_le_bytes(word);
    (*bytes == block(number, version)).then_some(version)
}

fn read_block(array: &Array, number: u64) -> Result<[u8; BLOCK_BYTES], DeviceError> {
    let mut bytes = [0xa5; BLOCK_BYTES];
    array.read_at(number * BLOCK_BYTES_U64, &mut bytes)?;
    Ok(bytes)
}

/// All subsets of at most `most` of `n` places.
fn subsets(n: usize, most: usize) -> Vec<Vec<usize>> {
    let all = (0..1_u32 << n).map(|set| (0..n).filter(|at| set >> at & 1 == 1).collect::<Vec<_>>());
    all.filter(|set| set.len() <= most).collect()
}
