//! A device as it is, with changes that nobody else sees.
//!
//! Stores write when they are opened and when they are closed. Whoever opens one only to see what is in
//! it, or whether it is whole, gives it this: reads come from the device below unless they were written
//! here, and nothing ever reaches that device. What was written is held in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Device, DeviceError, Durability, check_range};
use crate::units::BLOCK_BYTES;
use crate::units::convert::{to_u64, to_usize};
use crate::units::numbers::ByteCount;

type Block = Box<[u8; BLOCK_BYTES]>;

/// The device.
#[derive(Debug)]
pub struct Overlay {
    below: Arc<dyn Device>,
    blocks: Mutex<BTreeMap<u64, Block>>,
}

impl Overlay {
    /// As it is below.
    pub fn new(below: Arc<dyn Device>) -> Self {
        Self { below, blocks: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Block>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The parts of `length` bytes at `offset` by block: its number, where in the block, where in the
/// bytes.
fn parts(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let block = to_u64(BLOCK_BYTES);
    let mut at = 0;
    std::iter::from_fn(move || {
        let (number, within) = ((offset + to_u64(at)) / block, (offset + to_u64(at)) % block);
        let within = to_usize(within);
        let end = length.min(at + BLOCK_BYTES - within);
        let range = at..end;
        at = end;
        (!range.is_empty()).then_some((number, within, range))
    })
}

impl Device for Overlay {
    fn name(&self) -> Arc<str> {
        self.below.name()
    }

    fn size(&self) -> ByteCount {
        self.below.size()
    }

    fn alignment(&self) -> ByteCount {
        self.below.alignment()
    }

    fn durability(&self) -> Durability {
        self.below.durability()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        check_range(self, offset, buffer.len())?;
        self.below.read_at(offset, buffer)?;
        let blocks = self.lock();
        for (number, within, range) in parts(offset, buffer.len()) {
            if let Some(block) = blocks.get(&number) {
                let length = range.len();
                buffer[range].copy_from_slice(&block[within..within + length]);
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        check_range(self, offset, bytes.len())?;
        let mut blocks = self.lock();
        for (number, within, range) in parts(offset, bytes.len()) {
            let mut block: Block = match blocks.remove(&number) {
                Some(block) => block,
                None if range.len() == BLOCK_BYTES => Box::new([0; BLOCK_BYTES]),
                None => {
                    let mut block: Block = Box::new([0; BLOCK_BYTES]);
                    let at = number * to_u64(BLOCK_BYTES);
                    let there = self.size().0.saturating_sub(at).min(to_u64(BLOCK_BYTES));
                    self.below.read_at(at, &mut block[..to_usize(there)])?;
                    block
                }
            };
            let length = range.len();
            block[within..within + length].copy_from_slice(&bytes[range]);
            // What is written again as it is below needs no memory.
            let mut below = [0; BLOCK_BYTES];
            let at = number * to_u64(BLOCK_BYTES);
            let same = self.below.read_at(at, &mut below).is_ok() && below == *block;
            if !same {
                blocks.insert(number, block);
            }
        }
        Ok(())
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.write_at(offset, bytes)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::sim::SimDevice;

    /// Goal: what is written is read, and the device below never changes. Method: random writes
    /// and reads of any alignment against plain memory.
    #[test]
    fn writes_are_seen_here_only() {
        let below = Arc::new(SimDevice::new("below", ByteCount(64 << 10)));
        let mut chance = crate::device::sim::Chance::new(5);
        for at in (0..64 << 10).step_by(4096) {
            below.write_at(at, &chance.next_u64().to_le_bytes().repeat(512)).unwrap();
        }
        let before = below.image();
        let overlay = Overlay::new(Arc::<SimDevice>::clone(&below));
        let mut model = before.clone();
        for _ in 0..500 {
            let at = to_usize(chance.below(60 << 10));
            let length = to_usize(chance.below(4096 * 3)).min(model.len() - at);
            let bytes = vec![chance.next_u64().to_le_bytes()[0]; length];
            overlay.write_at(to_u64(at), &bytes).unwrap();
            model[at..at + length].copy_from_slice(&bytes);
            let at = to_usize(chance.below(60 << 10));
            let length = to_usize(chance.below(4096 * 3)).min(model.len() - at);
            let mut met = vec![0; length];
            overlay.read_at(to_u64(at), &mut met).unwrap();
            assert!(met == model[at..at + length]);
        }
        assert!(below.image() == before && before != model);
    }
}
