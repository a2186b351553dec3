//! A device in memory for the tests of pool and volume: it records its writes, fails when told,
//! holds flushes, and loses a seeded subset of unflushed sectors at a crash.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::device::{Device, DeviceError, Durability, check_range};
use crate::units::convert::{to_u64, to_usize};
use crate::units::numbers::ByteCount;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

const SECTOR_BYTES: usize = 512;

/// A small generator with a seed (SplitMix64), so that a failing case can be run again.
#[derive(Debug, Clone)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn block(&mut self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
        block
    }
}

type Blocks = HashMap<u64, Arc<[u8; BLOCK_BYTES]>>;

/// Bytes `offset..offset + length` were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

#[derive(Default)]
struct State {
    current: Blocks,
    durable: Blocks,
    pending: Vec<(u64, Vec<u8>)>,
    trace: Vec<Written>,
    calls: u64,
    flushes: u64,
    fail_at: Option<u64>,
    hold: bool,
    held: u64,
}

pub(crate) struct MemoryDevice {
    size: u64,
    state: Mutex<State>,
    changed: Condvar,
}

impl std::fmt::Debug for MemoryDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryDevice({})", self.size)
    }
}

fn put(blocks: &mut Blocks, offset: u64, mut bytes: &[u8]) {
    let mut at = offset;
    while !bytes.is_empty() {
        let within = to_usize(at % BLOCK_BYTES_U64);
        let length = bytes.len().min(BLOCK_BYTES - within);
        let block = blocks.entry(at / BLOCK_BYTES_U64).or_insert_with(|| Arc::new([0; 4096]));
        Arc::make_mut(block)[within..within + length].copy_from_slice(&bytes[..length]);
        bytes = &bytes[length..];
        at += to_u64(length);
    }
}

impl MemoryDevice {
    pub(crate) fn new(size: u64) -> Self {
        Self { size, state: Mutex::default(), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The device as it comes back after a power cut now: each unflushed sector has its old or
    /// one of its new contents. The old device lives on, so that whoever holds it cannot reach
    /// the new one.
    pub(crate) fn crashed(&self, seed: u64) -> Arc<Self> {
        let mut chance = Chance::new(seed);
        let state = self.state();
        let mut survived = state.durable.clone();
        for (offset, bytes) in &state.pending {
            for (index, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                if chance.next() & 1 == 1 {
                    put(&mut survived, offset + to_u64(index * SECTOR_BYTES), sector);
                }
            }
        }
        let current = survived.clone();
        let state = State { current, durable: survived, ..State::default() };
        Arc::new(Self { size: self.size, state: Mutex::new(state), changed: Condvar::new() })
    }

    /// Flips bits of one byte, now and durably.
    pub(crate) fn flip(&self, offset: u64, mask: u8) {
        let mut byte = [0];
        self.read_at(offset, &mut byte).unwrap();
        let mut state = self.state();
        put(&mut state.current, offset, &[byte[0] ^ mask]);
        put(&mut state.durable, offset, &[byte[0] ^ mask]);
    }

    /// The n-th write or flush from now fails, counted from 0, and all after it.
    pub(crate) fn fail_from(&self, n: u64) {
        let mut state = self.state();
        state.fail_at = Some(state.calls + n);
    }

    /// Writes and flushes so far.
    pub(crate) fn calls(&self) -> u64 {
        self.state().calls
    }

    pub(crate) fn flushes(&self) -> u64 {
        self.state().flushes
    }

    /// The writes since the last call.
    pub(crate) fn take_trace(&self) -> Vec<Written> {
        std::mem::take(&mut self.state().trace)
    }

    /// The blocks touched by the writes since the last call.
    pub(crate) fn take_written_blocks(&self) -> BTreeSet<u64> {
        let block = |at: u64| at / BLOCK_BYTES_U64;
        let trace = self.take_trace();
        trace.iter().flat_map(|w| block(w.offset)..=block(w.offset + w.length - 1)).collect()
    }

    /// From now on flushes wait.
    pub(crate) fn hold_flushes(&self) {
        self.state().hold = true;
    }

    /// Lets flushes go on.
    pub(crate) fn release_flushes(&self) {
        self.state().hold = false;
        self.changed.notify_all();
    }

    /// Waits until a flush is held.
    pub(crate) fn wait_for_held_flush(&self) {
        let state = self.state();
        drop(self.changed.wait_while(state, |state| state.held == 0).unwrap());
    }

    fn call(&self, state: &mut State, operation: &'static str) -> Result<(), DeviceError> {
        let call = state.calls;
        state.calls += 1;
        if state.fail_at.is_some_and(|at| call >= at) {
            let error = Arc::new(io::Error::other("told to fail"));
            let device = self.name();
            return Err(DeviceError::Io { device, operation, offset: 0, length: 0, error });
        }
        Ok(())
    }
}

impl Device for MemoryDevice {
    fn name(&self) -> Arc<str> {
        "memory".into()
    }

    fn size(&self) -> ByteCount {
        ByteCount(self.size)
    }

    fn alignment(&self) -> ByteCount {
        ByteCount(1)
    }

    fn durability(&self) -> Durability {
        Durability::Simulated
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        check_range(self, offset, buffer.len())?;
        let state = self.state();
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let within = to_usize(at % BLOCK_BYTES_U64);
            let length = rest.len().min(BLOCK_BYTES - within);
            let (part, behind) = rest.split_at_mut(length);
            match state.current.get(&(at / BLOCK_BYTES_U64)) {
                Some(block) => part.copy_from_slice(&block[within..within + length]),
                None => part.fill(0),
            }
            rest = behind;
            at += to_u64(length);
        }
        Ok(())
    }

    /// A failing write leaves half of itself behind.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        check_range(self, offset, bytes.len())?;
        let mut state = self.state();
        let met = self.call(&mut state, "write");
        let bytes = if met.is_ok() { bytes } else { &bytes[..bytes.len() / 2] };
        state.trace.push(Written { offset, length: to_u64(bytes.len()).max(1) });
        put(&mut state.current, offset, bytes);
        state.pending.push((offset, bytes.to_vec()));
        met
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        check_range(self, offset, bytes.len())?;
        let mut state = self.state();
        self.call(&mut state, "durable write")?;
        state.trace.push(Written { offset, length: to_u64(bytes.len()) });
        put(&mut state.current, offset, bytes);
        put(&mut state.durable, offset, bytes);
        Ok(())
    }

    fn flush(&self) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.held += 1;
        self.changed.notify_all();
        state = self.changed.wait_while(state, |state| state.hold).unwrap();
        state.held -= 1;
        self.call(&mut state, "flush")?;
        state.flushes += 1;
        for (offset, bytes) in std::mem::take(&mut state.pending) {
            put(&mut state.durable, offset, &bytes);
        }
        Ok(())
    }
}
