//! A simulated device: memory that loses, tears, fails and lies on demand.
//!
//! Tests of everything above the trait use it. A write lands in a volatile cache; a flush, or a
//! durable write for its own bytes, moves it to the medium. [`SimDevice::power_cut`] keeps any
//! subset of the 512-byte sectors in the cache, each in any of the versions it had since it was
//! last durable, chosen by a seed or by the caller. Faults are planned ahead by kind of call and
//! number. Every call is traced. Invariant: without a planned fault it is a correct device and
//! passes the conformance suite.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{Device, DeviceError, Durability, check_range};
use crate::units::convert::{to_u64, to_usize};
use crate::units::numbers::ByteCount;

/// What a power cut keeps whole or not at all.
pub const SECTOR_BYTES: usize = 512;
/// Calls that the trace keeps; later ones are only counted.
pub const TRACE_CALLS_MAX: usize = 1 << 20;

type Sector = [u8; SECTOR_BYTES];

/// Numbers that are chance enough for a test and the same for the same seed (splitmix64).
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    /// A stream of numbers that depends on nothing but `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end
    }
}

/// A kind of call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum On {
    /// [`Device::read_at`].
    Read,
    /// [`Device::write_at`].
    Write,
    /// [`Device::write_durable_at`].
    WriteDurable,
    /// [`Device::flush`].
    Flush,
}

/// One call as the trace keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its kind.
    pub on: On,
    /// First byte; 0 for a flush.
    pub offset: u64,
    /// Bytes; 0 for a flush.
    pub length: u64,
    /// Whether it was answered with `Ok`.
    pub ok: bool,
}

/// What happens to a planned call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Fails with this errno (5 EIO, 28 ENOSPC). What a write brought may be in the cache.
    Errno(i32),
    /// A write stores only so many of its bytes, then fails.
    Short(u64),
    /// A write is answered with `Ok` and stored nowhere.
    Lost,
    /// A write is answered with `Ok` and stored at another offset.
    Misdirected(u64),
    /// A read sees each sector as it was before its last write.
    Stale,
    /// The power goes during the call: its bytes are in the cache, it fails, and so does
    /// everything after it. Call [`SimDevice::power_cut`] to say what survives.
    PowerCut,
}

#[derive(Debug, Clone, Copy)]
enum Trigger {
    /// The n-th call of one kind from now.
    Kind(On, u64),
    /// The n-th write, durable write or flush from now.
    Change(u64),
    /// The n-th write, not a durable one, that lies between these bytes.
    Within { from: u64, end: u64, left: u64 },
}

#[derive(Debug, Default)]
struct State {
    medium: Vec<u8>,
    /// Versions of each sector since it was last durable, oldest first.
    cache: BTreeMap<u64, Vec<Sector>>,
    /// Sectors whose flush failed: the kernel takes them for clean, so that no later flush makes
    /// them durable unless they are written again.
    forgotten: BTreeSet<u64>,
    /// Each sector as it was before its last write.
    before: BTreeMap<u64, Sector>,
    plan: Vec<(Trigger, Effect)>,
    trace: Vec<Call>,
    calls: u64,
    off: bool,
    held: bool,
    waiting: u64,
    /// What the last planned fault fell on.
    struck: Option<On>,
}

/// A device in memory.
#[derive(Debug)]
pub struct SimDevice {
    name: Arc<str>,
    size: ByteCount,
    alignment: ByteCount,
    state: Mutex<State>,
    changed: Condvar,
}

impl SimDevice {
    /// A device of zeros; `size` is a multiple of a sector.
    pub fn new(name: &str, size: ByteCount) -> Self {
        assert!(size.0.is_multiple_of(to_u64(SECTOR_BYTES)), "whole sectors");
        Self::from_image(name, vec![0; to_usize(size.0)])
    }

    /// A device that holds `image`, all of it durable.
    pub fn from_image(name: &str, image: Vec<u8>) -> Self {
        Self {
            name: name.into(),
            size: ByteCount(to_u64(image.len())),
            alignment: ByteCount(to_u64(SECTOR_BYTES)),
            state: Mutex::new(State { medium: image, ..State::default() }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic of another test thread does not make memory worse.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Plans a fault of the `nth` call of that kind from now, counted from 0.
    pub fn fail(&self, on: On, nth: u64, effect: Effect) {
        self.state().plan.push((Trigger::Kind(on, nth), effect));
    }

    /// Plans a fault of the `nth` call that writes or flushes, counted from 0.
    pub fn fail_change(&self, nth: u64, effect: Effect) {
        self.state().plan.push((Trigger::Change(nth), effect));
    }

    /// Plans a fault of the `nth` write, not a durable one, that lies in `range`.
    pub fn fail_within(&self, range: std::ops::Range<u64>, nth: u64, effect: Effect) {
        let trigger = Trigger::Within { from: range.start, end: range.end, left: nth };
        self.state().plan.push((trigger, effect));
    }

    /// Drops faults that were planned and have not happened; says how many.
    pub fn forget_faults(&self) -> usize {
        std::mem::take(&mut self.state().plan).len()
    }

    /// The kind of call that a planned fault fell on last.
    pub fn struck(&self) -> Option<On> {
        self.state().struck
    }

    /// The calls so far, at most the first [`TRACE_CALLS_MAX`] since [`SimDevice::clear_trace`].
    pub fn trace(&self) -> Vec<Call> {
        self.state().trace.clone()
    }

    /// Empties the trace.
    pub fn clear_trace(&self) {
        self.state().trace.clear();
    }

    /// All calls so far.
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// Sectors that a power cut could lose now.
    pub fn volatile_sectors(&self) -> Vec<u64> {
        self.state().cache.keys().copied().collect()
    }

    /// What a reader would see of the whole device, whatever is durable.
    pub fn image(&self) -> Vec<u8> {
        let state = self.state();
        let mut bytes = vec![0; state.medium.len()];
        state.copy_out(0, &mut bytes);
        bytes
    }

    /// What is durable.
    pub fn medium(&self) -> Vec<u8> {
        self.state().medium.clone()
    }

    /// Cuts the power: a seeded subset of the volatile sectors survives. Calls fail until
    /// [`SimDevice::power_on`].
    pub fn power_cut(&self, seed: u64) {
        let mut chance = Chance::new(seed);
        // Some cuts lose nearly all and some nearly nothing.
        let odds = chance.below(5);
        self.power_cut_choosing(&mut |_, versions| {
            if chance.below(4) < odds { 1 + to_usize(chance.below(to_u64(versions))) } else { 0 }
        });
    }

    /// Cuts the power. For each volatile sector `choose` is asked with its number and how many
    /// versions the cache has; 0 keeps what was durable, 1 the oldest version, and so on.
    pub fn power_cut_choosing(&self, choose: &mut dyn FnMut(u64, usize) -> usize) {
        let mut state = self.state();
        state.off = true;
        for (sector, versions) in std::mem::take(&mut state.cache) {
            let kept = choose(sector, versions.len());
            if let Some(bytes) = kept.checked_sub(1).and_then(|n| versions.get(n)) {
                state.settle(sector, bytes);
            }
        }
        state.before.clear();
        state.forgotten.clear();
        self.changed.notify_all();
    }

    /// The device as the next process finds it after a kill: what was written and is not durable
    /// still waits. Nobody who held the old one reaches it.
    pub fn survivor(&self) -> Self {
        let mut state = self.state();
        state.off = true;
        let medium = std::mem::take(&mut state.medium);
        let cache = std::mem::take(&mut state.cache);
        let forgotten = std::mem::take(&mut state.forgotten);
        self.like(State { medium, cache, forgotten, ..State::default() })
    }

    /// Another device with the same content.
    pub fn copy(&self) -> Self {
        let state = self.state();
        let (medium, cache) = (state.medium.clone(), state.cache.clone());
        let forgotten = state.forgotten.clone();
        self.like(State { medium, cache, forgotten, ..State::default() })
    }

    fn like(&self, state: State) -> Self {
        Self {
            name: Arc::clone(&self.name),
            size: self.size,
            alignment: self.alignment,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Ends a power cut.
    pub fn power_on(&self) {
        self.state().off = false;
    }

    /// Whether the power is cut.
    pub fn is_off(&self) -> bool {
        self.state().off
    }

    /// Changes bytes behind everybody's back, on the medium and in the cache.
    pub fn rot(&self, offset: u64, mask: &[u8]) {
        let mut state = self.state();
        for (at, flip) in (to_usize(offset)..).zip(mask) {
            state.medium[at] ^= flip;
            if let Some(versions) = state.cache.get_mut(&to_u64(at / SECTOR_BYTES)) {
                versions.iter_mut().for_each(|bytes| bytes[at % SECTOR_BYTES] ^= flip);
            }
        }
    }

    /// Puts bytes on the medium behind everybody's back.
    pub fn plant(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.state();
        let at = to_usize(offset);
        state.medium[at..at + bytes.len()].copy_from_slice(bytes);
        let (first, end) = (at / SECTOR_BYTES, (at + bytes.len()).div_ceil(SECTOR_BYTES));
        state.cache.retain(|sector, _| !(first..end).contains(&to_usize(*sector)));
    }

    /// Holds every durable write and flush at its beginning until [`SimDevice::let_go`].
    pub fn hold(&self) {
        self.state().held = true;
    }

    /// Ends [`SimDevice::hold`].
    pub fn let_go(&self) {
        self.state().held = false;
        self.changed.notify_all();
    }

    /// Waits until so many calls are held.
    pub fn wait_held(&self, calls: u64) {
        let mut state = self.state();
        while state.waiting < calls {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits while held, takes the fault planned for this call, and refuses without power.
    fn begin(
        &self,
        on: On,
        (offset, length): (u64, usize),
    ) -> (MutexGuard<'_, State>, Option<Effect>) {
        let mut state = self.state();
        state.calls += 1;
        if matches!(on, On::WriteDurable | On::Flush) && state.held {
            state.waiting += 1;
            self.changed.notify_all();
            while state.held && !state.off {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.waiting -= 1;
        }
        let effect = state.planned(on, offset..offset + to_u64(length));
        (state, effect)
    }

    fn end(
        &self,
        mut state: MutexGuard<'_, State>,
        call: (On, u64, u64),
        outcome: Result<(), i32>,
    ) -> Result<(), DeviceError> {
        let (on, offset, length) = call;
        if state.trace.len() < TRACE_CALLS_MAX {
            state.trace.push(Call { on, offset, length, ok: outcome.is_ok() });
        }
        outcome.map_err(|errno| DeviceError::Io {
            device: self.name(),
            operation: match on {
                On::Read => "read",
                On::Write => "write",
                On::WriteDurable => "durable write",
                On::Flush => "flush",
            },
            offset,
            length,
            error: Arc::new(io::Error::from_raw_os_error(errno)),
        })
    }

    fn write(&self, on: On, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        check_range(self, offset, bytes.len())?;
        let call = (on, offset, to_u64(bytes.len()));
        let (mut state, effect) = self.begin(on, (offset, bytes.len()));
        if state.off {
            return self.end(state, call, Err(EIO));
        }
        let outcome = match effect {
            None => {
                state.cache_write(offset, bytes);
                if on == On::WriteDurable {
                    state.settle_range(offset, bytes.len());
                }
                Ok(())
            }
            Some(Effect::Errno(errno)) => {
                state.cache_write(offset, bytes);
                state.forget(offset, bytes.len());
                Err(errno)
            }
            Some(Effect::Short(stored)) => {
                let stored = bytes.len().min(to_usize(stored));
                state.cache_write(offset, &bytes[..stored]);
                state.forget(offset, stored);
                Err(EIO)
            }
            Some(Effect::Lost | Effect::Stale) => Ok(()),
            Some(Effect::Misdirected(elsewhere)) => {
                // Not beyond the end.
                let elsewhere = elsewhere.min(self.size.0 - to_u64(bytes.len()));
                state.cache_write(elsewhere, bytes);
                state.settle_range(elsewhere, bytes.len());
                Ok(())
            }
            Some(Effect::PowerCut) => {
                state.cache_write(offset, bytes);
                state.off = true;
                Err(EIO)
            }
        };
        self.end(state, call, outcome)
    }
}

const EIO: i32 = 5;

impl State {
    fn planned(&mut self, on: On, bytes: std::ops::Range<u64>) -> Option<Effect> {
        let mut due = None;
        self.plan.retain_mut(|(trigger, effect)| {
            let left = match trigger {
                Trigger::Kind(kind, left) if *kind == on => left,
                Trigger::Change(left) if on != On::Read => left,
                Trigger::Within { from, end, left }
                    if on == On::Write && *from <= bytes.start && bytes.end <= *end =>
                {
                    left
                }
                Trigger::Kind(..) | Trigger::Change(_) | Trigger::Within { .. } => return true,
            };
            if *left == 0 && due.is_none() {
                due = Some(*effect);
                self.struck = Some(on);
                return false;
            }
            *left = left.saturating_sub(1);
            true
        });
        due
    }

    fn medium_sector(&self, sector: u64) -> Sector {
        let at = to_usize(sector) * SECTOR_BYTES;
        let mut bytes = [0; SECTOR_BYTES];
        bytes.copy_from_slice(&self.medium[at..at + SECTOR_BYTES]);
        bytes
    }

    fn seen(&self, sector: u64) -> Sector {
        match self.cache.get(&sector).and_then(|versions| versions.last()) {
            Some(bytes) => *bytes,
            None => self.medium_sector(sector),
        }
    }

    fn settle(&mut self, sector: u64, bytes: &Sector) {
        let at = to_usize(sector) * SECTOR_BYTES;
        self.medium[at..at + SECTOR_BYTES].copy_from_slice(bytes);
    }

    fn cache_write(&mut self, offset: u64, bytes: &[u8]) {
        for (sector, from, part) in sectors(offset, bytes.len()) {
            let old = self.seen(sector);
            let mut new = old;
            new[from..from + part.len()].copy_from_slice(&bytes[part]);
            self.before.insert(sector, old);
            self.cache.entry(sector).or_default().push(new);
            self.forgotten.remove(&sector);
        }
    }

    fn settle_range(&mut self, offset: u64, length: usize) {
        for (sector, ..) in sectors(offset, length) {
            self.settle_one(sector);
        }
    }

    fn forget(&mut self, offset: u64, length: usize) {
        self.forgotten.extend(sectors(offset, length).map(|(sector, ..)| sector));
    }

    fn forget_all(&mut self, errno: i32) -> i32 {
        let cached: Vec<u64> = self.cache.keys().copied().collect();
        self.forgotten.extend(cached);
        errno
    }

    fn settle_one(&mut self, sector: u64) {
        if let Some(bytes) =
            self.cache.remove(&sector).and_then(|versions| versions.last().copied())
        {
            self.settle(sector, &bytes);
        }
    }

    fn copy_out(&self, offset: u64, buffer: &mut [u8]) {
        for (sector, from, part) in sectors(offset, buffer.len()) {
            let bytes = self.seen(sector);
            buffer[part.clone()].copy_from_slice(&bytes[from..from + part.len()]);
        }
    }
}

/// The sectors of a range: number, first byte within the sector, and the part of the buffer.
fn sectors(
    offset: u64,
    length: usize,
) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let start = to_usize(offset);
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let at = start + done;
        let from = at % SECTOR_BYTES;
        let part = (SECTOR_BYTES - from).min(length - done);
        done += part;
        Some((to_u64(at / SECTOR_BYTES), from, done - part..done))
    })
}

impl Device for SimDevice {
    fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    fn size(&self) -> ByteCount {
        self.size
    }

    fn alignment(&self) -> ByteCount {
        self.alignment
    }

    fn durability(&self) -> Durability {
        Durability::Simulated
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        check_range(self, offset, buffer.len())?;
        let (state, effect) = self.begin(On::Read, (offset, buffer.len()));
        if state.off {
            return self.end(state, (On::Read, offset, to_u64(buffer.len())), Err(EIO));
        }
        let mut outcome = Ok(());
        match effect {
            Some(Effect::Errno(errno)) => outcome = Err(errno),
            Some(Effect::PowerCut | Effect::Short(_)) => outcome = Err(EIO),
            Some(Effect::Stale) => {
                state.copy_out(offset, buffer);
                for (sector, from, part) in sectors(offset, buffer.len()) {
                    if let Some(bytes) = state.before.get(&sector) {
                        buffer[part.clone()].copy_from_slice(&bytes[from..from + part.len()]);
                    }
                }
            }
            Some(Effect::Lost | Effect::Misdirected(_)) | None => state.copy_out(offset, buffer),
        }
        self.end(state, (On::Read, offset, to_u64(buffer.len())), outcome)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.write(On::Write, offset, bytes)
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.write(On::WriteDurable, offset, bytes)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        let (mut state, effect) = self.begin(On::Flush, (0, 0));
        let call = (On::Flush, 0, 0);
        if state.off {
            return self.end(state, call, Err(EIO));
        }
        let outcome = match effect {
            Some(Effect::Errno(errno)) => Err(state.forget_all(errno)),
            Some(Effect::Short(_)) => Err(state.forget_all(EIO)),
            Some(Effect::PowerCut) => {
                state.off = true;
                Err(EIO)
            }
            Some(Effect::Lost | Effect::Misdirected(_) | Effect::Stale) => Ok(()),
            None => {
                for sector in state.cache.keys().copied().collect::<Vec<_>>() {
                    if !state.forgotten.contains(&sector) {
                        state.settle_one(sector);
                    }
                }
                Ok(())
            }
        };
        self.end(state, call, outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::*;

    fn device() -> SimDevice {
        SimDevice::new("sim", ByteCount(256 << 10))
    }

    fn read(device: &SimDevice, sector: u64) -> u8 {
        let mut bytes = [0; SECTOR_BYTES];
        device.read_at(sector * 512, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a torn sector");
        bytes[0]
    }

    #[test]
    fn passes_the_suite() {
        conformance::suite(|| Box::new(device()));
    }

    /// Goal: of three cached sectors, one written twice, every subset and version can survive, and
    /// a durable one always does.
    #[test]
    fn a_power_cut_keeps_any_subset_of_what_is_volatile() {
        let mut met = BTreeSet::new();
        for choice in 0..12 {
            let device = device();
            device.write_durable_at(0, &[9; 512]).unwrap();
            device.write_at(512, &[1; 1024]).unwrap();
            device.write_at(512, &[2; 512]).unwrap();
            device.write_durable_at(1536, &[3; 512]).unwrap();
            assert_eq!(device.volatile_sectors(), [1, 2]);
            device.power_cut_choosing(&mut |sector, versions| {
                assert_eq!(versions, if sector == 1 { 2 } else { 1 });
                if sector == 1 { choice % 3 } else { choice / 3 % 2 }
            });
            assert!(device.read_at(0, &mut [0; 1]).is_err());
            device.power_on();
            assert_eq!((read(&device, 0), read(&device, 3)), (9, 3));
            met.insert((read(&device, 1), read(&device, 2)));
        }
        assert_eq!(Vec::from_iter(met), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]);
    }

    #[test]
    fn seeds_give_all_subsets_and_the_same_seed_the_same() {
        let cut = |seed| {
            let device = device();
            device.write_at(0, &[1; 1024]).unwrap();
            device.power_cut(seed);
            device.power_on();
            (read(&device, 0), read(&device, 1))
        };
        let met: BTreeSet<_> = (0..64).map(cut).collect();
        assert_eq!(met.len(), 4);
        assert_eq!(cut(17), cut(17));
    }

    /// A cut in the middle of a durable write keeps any part of it, and nothing works behind it.
    #[test]
    fn a_durable_write_in_flight_is_torn() {
        let device = device();
        device.fail_change(1, Effect::PowerCut);
        device.write_durable_at(0, &[1; 1536]).unwrap();
        assert!(device.write_durable_at(0, &[2; 1536]).is_err());
        assert!(device.flush().is_err());
        assert!(device.write_at(0, &[3; 512]).is_err());
        device.power_cut_choosing(&mut |sector, _| usize::from(sector == 1));
        device.power_on();
        assert_eq!([read(&device, 0), read(&device, 1), read(&device, 2)], [1, 2, 1]);
    }

    #[test]
    fn a_failed_flush_is_forgotten_by_the_next_one() {
        let device = device();
        device.write_at(0, &[1; 512]).unwrap();
        device.fail(On::Flush, 0, Effect::Errno(5));
        assert!(device.flush().is_err());
        assert!(device.flush().is_ok(), "the kernel says an error once");
        device.power_cut_choosing(&mut |_, _| 0);
        device.power_on();
        assert_eq!(read(&device, 0), 0, "and what it was about is not durable");
    }

    #[test]
    fn each_fault_does_what_it_says() {
        let device = device();
        device.write_durable_at(0, &[1; 1024]).unwrap();
        device.fail(On::Write, 0, Effect::Errno(28));
        let error = device.write_at(0, &[2; 512]).unwrap_err();
        assert!(
            matches!(&error, DeviceError::Io { error, .. } if error.raw_os_error() == Some(28))
        );
        device.fail(On::WriteDurable, 0, Effect::Short(512));
        assert!(device.write_durable_at(0, &[3; 1024]).is_err());
        assert_eq!((read(&device, 0), read(&device, 1)), (3, 1));
        device.fail(On::WriteDurable, 0, Effect::Lost);
        device.write_durable_at(0, &[4; 512]).unwrap();
        assert_eq!(read(&device, 0), 3);
        device.fail(On::WriteDurable, 0, Effect::Misdirected(4096));
        device.write_durable_at(0, &[5; 512]).unwrap();
        assert_eq!((read(&device, 0), read(&device, 8)), (3, 5));
        device.fail_within(8192..16384, 1, Effect::Lost);
        for offset in [8192, 0, 7680, 8704, 9216] {
            device.write_at(offset, &[9; 512]).unwrap();
        }
        let written = [16, 15, 17, 18].map(|sector| read(&device, sector));
        assert_eq!(written, [9, 9, 0, 9], "the second of those in the range");
        device.write_at(0, &[3; 512]).unwrap();
        device.flush().unwrap();
        device.write_durable_at(0, &[6; 512]).unwrap();
        device.fail(On::Read, 0, Effect::Stale);
        assert_eq!((read(&device, 0), read(&device, 0)), (3, 6));
        device.rot(5, &[0xff]);
        let mut bytes = [0; 8];
        device.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [6, 6, 6, 6, 6, 0xf9, 6, 6]);
        device.plant(0, &[7; 512]);
        assert_eq!(read(&device, 0), 7);
        assert_eq!(device.forget_faults(), 0);
        assert_eq!(device.image(), device.medium());
    }

    #[test]
    fn faults_are_counted_by_kind_and_calls_are_traced() {
        let device = device();
        device.fail(On::Flush, 1, Effect::Errno(5));
        device.write_at(512, &[1; 100]).unwrap();
        device.flush().unwrap();
        assert!(device.flush().is_err());
        let call = |on, offset, length, ok| Call { on, offset, length, ok };
        let wanted = [
            call(On::Write, 512, 100, true),
            call(On::Flush, 0, 0, true),
            call(On::Flush, 0, 0, false),
        ];
        assert_eq!(device.trace(), wanted);
        device.clear_trace();
        assert!(device.trace().is_empty());
        assert_eq!(device.calls(), 3);
    }

    #[test]
    fn a_held_device_waits() {
        let device = device();
        device.hold();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| device.write_durable_at(0, &[1; 512]));
            device.wait_held(1);
            assert_eq!(read(&device, 0), 0);
            device.let_go();
            assert!(writer.join().unwrap().is_ok());
        });
        assert_eq!(read(&device, 0), 1);
    }
}
