//! What a pool lies on: one device, or two that mirror each other.
//!
//! Of a mirror only the first leg ever fails or lies, so that the array always has what was written.

use std::sync::Arc;

use crate::device::Device;
use crate::device::sim::{Effect, On, SimDevice};
use crate::limits::RAID_CHUNK_BYTES;
use crate::pool::label::Layout;
use crate::pool::{Pool, PoolOptions};
use crate::raid::assemble::{self, OpenOptions};
use crate::raid::layout::{Level, data_start};
use crate::units::BLOCK_BYTES_U64;
use crate::units::numbers::{ByteCount, Pbn};

#[derive(Debug)]
pub(super) struct Disk {
    legs: Vec<Arc<SimDevice>>,
    /// Where the pool's first byte is on each leg, and its data.
    start: u64,
    data: std::ops::Range<u64>,
}

impl Disk {
    /// A device of zeros, or two.
    pub(super) fn new(name: &str, bytes: u64, mirrored: bool) -> Self {
        let whole = SimDevice::new(name, ByteCount(bytes));
        let layout = Layout::for_device(&whole).unwrap();
        let data = layout.data_start * BLOCK_BYTES_U64..bytes;
        if !mirrored {
            return Self { legs: vec![Arc::new(whole)], start: 0, data };
        }
        let start = data_start(RAID_CHUNK_BYTES);
        let leg = |n| Arc::new(SimDevice::new(&format!("{name}-{n}"), ByteCount(start + bytes)));
        let disk = Self { legs: vec![leg(0), leg(1)], start, data };
        assemble::create(Level::Mirror, &disk.devices()).unwrap();
        disk
    }

    /// Makes a pool on it.
    pub(super) fn with_pool(self, owner: [u8; 16]) -> Self {
        drop(Pool::create(self.open().unwrap(), owner, PoolOptions::default()).unwrap());
        self
    }

    fn devices(&self) -> Vec<Arc<dyn Device>> {
        let device = |leg: &Arc<SimDevice>| -> Arc<dyn Device> { leg.clone() };
        self.legs.iter().map(device).collect()
    }

    /// As a process finds it.
    pub(super) fn open(&self) -> Result<Arc<dyn Device>, String> {
        match &self.devices()[..] {
            [only] => Ok(Arc::clone(only)),
            legs => {
                let opened = assemble::open(legs, OpenOptions::default());
                opened.map(|opened| -> Arc<dyn Device> { opened.array }).map_err(|e| e.to_string())
            }
        }
    }

    pub(super) fn is_mirrored(&self) -> bool {
        self.legs.len() > 1
    }

    pub(super) fn is_off(&self) -> bool {
        self.legs.iter().any(|leg| leg.is_off())
    }

    pub(super) fn power_cut(&self, seed: u64) {
        for (leg, seed) in self.legs.iter().zip([seed, seed ^ 1]) {
            leg.power_cut(seed);
        }
    }

    /// As the next process finds it.
    pub(super) fn survive(&mut self) {
        for leg in &mut self.legs {
            *leg = Arc::new(leg.survivor());
        }
    }

    /// Another with the same content.
    pub(super) fn copy(&self) -> Self {
        let legs = self.legs.iter().map(|leg| Arc::new(leg.copy())).collect();
        Self { legs, start: self.start, data: self.data.clone() }
    }

    pub(super) fn forget_faults(&self) -> usize {
        self.legs.iter().map(|leg| leg.forget_faults()).sum()
    }

    /// What a planned fault of the first leg fell on.
    pub(super) fn struck(&self) -> Option<On> {
        self.legs[0].struck()
    }

    /// The n-th write or flush from now does that.
    pub(super) fn fail_change(&self, nth: u64, effect: Effect) {
        self.legs[0].fail_change(nth, effect);
    }

    /// The n-th write of data from now is lost, or falls on another block. A mirror bears that; of
    /// one device alone nobody could tell.
    pub(super) fn lie(&self, nth: u64, astray: Option<u64>) {
        if !self.is_mirrored() {
            return;
        }
        let range = self.start + self.data.start..self.start + self.data.end;
        let blocks = (range.end - range.start) / BLOCK_BYTES_U64;
        let at = |block: u64| range.start + block % blocks * BLOCK_BYTES_U64;
        let effect = astray.map_or(Effect::Lost, |block| Effect::Misdirected(at(block)));
        self.legs[0].fail_within(range, nth, effect);
    }

    /// A block of the pool rots.
    pub(super) fn rot(&self, pbn: Pbn, byte: u64) {
        let at = self.start + pbn.0 * BLOCK_BYTES_U64 + byte % BLOCK_BYTES_U64;
        self.legs[0].rot(at, &[0x55]);
    }
}
