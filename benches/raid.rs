//! RAID: what arrays of files cost beside a bare file, whole and with a device missing, and how fast a
//! new device is filled and a scrub reads.
//!
//! Run with `cargo bench --bench raid`. The bare file and the arrays take turns, five rounds, and all
//! are on one disk, so only the ratios say something: an array of n files with k of data writes n/k
//! bytes to that disk for each of its own, and k/n of the bare rate is the most it can do. Writes are
//! aligned and of 4 MiB, as the pool's to an array are, and of 1 MiB; before reads the page cache is
//! emptied of the files.
//! `--test` makes it small.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use mirrorhub::device::buffer::AlignedBuffer;
use mirrorhub::device::file::{Access, FileDevice};
use mirrorhub::device::{Device, DeviceError, Durability};
use mirrorhub::raid::array::Array;
use mirrorhub::raid::assemble;
use mirrorhub::raid::layout::Level;
use mirrorhub::raid::parity;
use mirrorhub::raid::rebuild::Step;
use mirrorhub::units::convert::{low_u8, to_f64, to_u64, to_usize};
use mirrorhub::units::numbers::ByteCount;

const MIB: usize = 1 << 20;
/// What a pool writes to an array at once (`POOL_STRIPED_IO_BYTES_MAX`).
const WRITE_BYTES: usize = 4 << 20;
/// What an array of n devices with k of data is to write in sequence, over k/n of the bare rate.
const SEQUENTIAL_MIN: f64 = 0.7;

/// Counts the reads.
#[derive(Debug)]
struct Counted {
    file: FileDevice,
    reads: AtomicU64,
}

impl Device for Counted {
    fn name(&self) -> Arc<str> {
        self.file.name()
    }

    fn size(&self) -> ByteCount {
        self.file.size()
    }

    fn alignment(&self) -> ByteCount {
        self.file.alignment()
    }

    fn durability(&self) -> Durability {
        self.file.durability()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.file.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.file.write_at(offset, bytes)
    }

    fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), DeviceError> {
        self.file.write_pieces_at(offset, pieces)
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.file.write_durable_at(offset, bytes)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.file.flush()
    }
}

/// A bare file or an array, and what it did in each round.
struct Subject {
    name: String,
    /// Share of the devices that is data.
    data_share: f64,
    device: Arc<dyn Device>,
    array: Option<Arc<Array>>,
    files: Vec<(PathBuf, Arc<Counted>)>,
    directory: PathBuf,
    rounds: Vec<Round>,
}

/// MiB a second, writes and reads a second.
#[derive(Debug, Clone, Copy)]
struct Round {
    write: f64,
    /// In pieces of 1 MiB.
    small: f64,
    read: f64,
    random_writes: f64,
    random_reads: f64,
}

impl Subject {
    fn new(directory: &Path, level: Option<(Level, usize)>, room: u64) -> Result<Self> {
        let name = match level {
            None => "bare".to_owned(),
            Some((level, members)) => format!("{} of {members}", level.word()),
        };
        let directory = directory.join(name.replace(' ', "-"));
        std::fs::create_dir(&directory)?;
        let members = level.map_or(1, |(_, members)| members);
        let mut files = Vec::new();
        for n in 0..members {
            let path = directory.join(format!("disk{n}"));
            let file = FileDevice::create(&path, ByteCount(room), Access::Cached)?;
            files.push((path, Arc::new(Counted { file, reads: AtomicU64::new(0) })));
        }
        let device = |(_, file): &(PathBuf, Arc<Counted>)| -> Arc<dyn Device> {
            Arc::<Counted>::clone(file)
        };
        let devices = || files.iter().map(device);
        let array = match level {
            None => None,
            Some((level, _)) => Some(assemble::create(level, &devices().collect::<Vec<_>>())?),
        };
        let data_share = level.map_or(1.0, |(level, members)| {
            let data = match level {
                Level::None => members,
                Level::Mirror => 1,
                Level::Parity1 => members - 1,
                Level::Parity2 => members - 2,
            };
            to_f64(to_u64(data)) / to_f64(to_u64(members))
        });
        let device: Arc<dyn Device> = match &array {
            Some(array) => Arc::<Array>::clone(array),
            None => devices().next().context("one file")?,
        };
        Ok(Self { name, data_share, device, array, files, directory, rounds: Vec::new() })
    }

    /// The page cache keeps nothing of the files.
    fn forget(&self) -> Result<()> {
        for (path, _) in &self.files {
            let file = std::fs::File::open(path)?;
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
        Ok(())
    }

    fn round(&mut self, bytes: usize, count: u64) -> Result<()> {
        let small = write(&*self.device, bytes, MIB)?;
        self.forget()?;
        let write = write(&*self.device, bytes, WRITE_BYTES)?;
        self.forget()?;
        let read = read(&*self.device, bytes)?;
        let random_writes = random(&*self.device, bytes, count, true)?;
        self.forget()?;
        let before = self.reads();
        let random_reads = random(&*self.device, bytes, count, false)?;
        let cost = self.reads() - before;
        ensure!(cost == count, "{}: {count} reads of a block cost {cost} I/Os", self.name);
        self.rounds.push(Round { write, small, read, random_writes, random_reads });
        Ok(())
    }

    fn reads(&self) -> u64 {
        self.files.iter().map(|(_, file)| file.reads.load(Ordering::Relaxed)).sum()
    }

    /// Median, and the median of the ratios over the same round of `bare`.
    fn over(&self, bare: &Self, of: impl Fn(&Round) -> f64) -> (f64, f64) {
        let own = median(self.rounds.iter().map(&of));
        let ratios = self.rounds.iter().zip(&bare.rounds).map(|(own, bare)| of(own) / of(bare));
        (own, median(ratios))
    }

    fn print(&self, bare: &Self) {
        let (write, of_write) = self.over(bare, |round| round.write);
        let (_, of_small) = self.over(bare, |round| round.small);
        let (read, of_read) = self.over(bare, |round| round.read);
        let (writes, of_writes) = self.over(bare, |round| round.random_writes);
        let (reads, of_reads) = self.over(bare, |round| round.random_reads);
        let wanted = self.data_share * SEQUENTIAL_MIN;
        let word = if of_write >= wanted { "met" } else { "NOT met" };
        println!(
            "{:<13} in sequence: write {write:5.0} MiB/s, {of_write:.2} of bare (wanted {wanted:.2}: {word}; \
             1 MiB at a time {of_small:.2}), read {read:5.0} MiB/s, {of_read:.2}; 4 KiB at random: {writes:6.0} writes/s, {of_writes:.2}, \
             {reads:6.0} reads/s, {of_reads:.2}, one I/O each",
            self.name,
        );
    }

    /// All copies read and compared, then one device taken away and another one filled.
    fn repairs(&self, bytes: usize) -> Result<()> {
        let Some(array) = &self.array else { return Ok(()) };
        self.forget()?;
        let used = to_u64(bytes) / array.stripe_bytes();
        let began = Instant::now();
        let blocks: u64 = (0..used).map(|stripe| array.check_stripe(stripe).blocks_read).sum();
        let scrubbed = rate(to_usize(blocks) * 4096, began);
        println!("{:<13} scrub reads {scrubbed:.0} MiB/s of all devices together", self.name);
        if array.fail_device(0, "taken away").is_err() {
            return Ok(());
        }
        self.forget()?;
        let degraded = read(&**array, bytes)?;
        let written = write(&**array, bytes, WRITE_BYTES)?;
        let filled = fill(array, &self.directory, bytes)?;
        println!(
            "{:<13} without a device: write {written:.0} MiB/s, read {degraded:.0} MiB/s; a new one is \
             filled at {filled:.0} MiB/s",
            self.name
        );
        Ok(())
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn rate(bytes: usize, began: Instant) -> f64 {
    let mib = to_f64(to_u64(bytes / MIB));
    mib / began.elapsed().as_secs_f64()
}

/// Writes so much at a time, and flushes.
fn write(device: &dyn Device, bytes: usize, step: usize) -> Result<f64> {
    let mut data = AlignedBuffer::new(step);
    data.iter_mut().enumerate().for_each(|(at, byte)| *byte = low_u8(to_u64(at % 251)));
    let began = Instant::now();
    for at in (0..bytes).step_by(step) {
        device.write_at(to_u64(at), &data)?;
    }
    device.flush()?;
    Ok(rate(bytes, began))
}

fn read(device: &dyn Device, bytes: usize) -> Result<f64> {
    let mut buffer = AlignedBuffer::new(MIB);
    let began = Instant::now();
    for at in (0..bytes).step_by(MIB) {
        device.read_at(to_u64(at), &mut buffer)?;
    }
    Ok(rate(bytes, began))
}

/// 4 KiB all over: reads, or writes flushed 64 at a time.
fn random(device: &dyn Device, bytes: usize, count: u64, writes: bool) -> Result<f64> {
    let blocks = to_u64(bytes / 4096);
    let (mut block, mut at) = (AlignedBuffer::new(4096), 1_u64);
    block.fill(0x5a);
    let began = Instant::now();
    for n in 0..count {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let offset = (at >> 16) % blocks * 4096;
        if !writes {
            device.read_at(offset, &mut block)?;
            continue;
        }
        device.write_at(offset, &block)?;
        if n % 64 == 63 {
            device.flush()?;
        }
    }
    Ok(to_f64(count) / began.elapsed().as_secs_f64())
}

fn encode(data: usize, spare: usize, bytes: usize) -> f64 {
    let columns = vec![vec![0x5a_u8; 64 << 10]; data];
    let mut out = vec![vec![0_u8; 64 << 10]; spare];
    let began = Instant::now();
    let rounds = bytes / (data * (64 << 10));
    for _ in 0..rounds {
        parity::encode(&columns, &mut out);
        std::hint::black_box(&out);
    }
    rate(rounds * data * (64 << 10), began)
}

fn fill(array: &Array, directory: &Path, bytes: usize) -> Result<f64> {
    let path = directory.join("fresh");
    let fresh = FileDevice::create(&path, ByteCount(array.member_bytes()), Access::Cached)?;
    array.replace(0, Arc::new(fresh))?;
    let used = to_u64(bytes / 4096);
    array.plan_rebuild(&|first, _| first < used);
    let began = Instant::now();
    let mut stripes = 0;
    loop {
        match array.rebuild_step()? {
            Step::Idle => break,
            Step::Filled(_) => stripes += 1,
            Step::LeftOut | Step::Done => {}
        }
    }
    array.note_filled()?;
    Ok(rate(stripes * (64 << 10), began))
}

fn main() -> Result<()> {
    let small = std::env::args().any(|argument| argument == "--test");
    let (bytes, count, rounds) = if small { (8 * MIB, 128, 1) } else { (256 * MIB, 4096, 5) };
    let directory = tempfile::tempdir()?;
    for (data, spare) in [(2, 1), (4, 1), (4, 2), (8, 2)] {
        let speed = encode(data, spare, bytes * 4);
        println!("encode {data}+{spare}: {speed:.0} MiB/s of data");
    }
    let room = to_u64(bytes) + (64 << 20);
    let mut bare = Subject::new(directory.path(), None, room)?;
    let mut arrays = Vec::new();
    for shape in [
        (Level::None, 2),
        (Level::Mirror, 2),
        (Level::Parity1, 3),
        (Level::Parity1, 5),
        (Level::Parity2, 6),
    ] {
        arrays.push(Subject::new(directory.path(), Some(shape), room)?);
    }
    for _ in 0..rounds {
        bare.round(bytes, count)?;
        arrays.iter_mut().try_for_each(|array| array.round(bytes, count))?;
    }
    for subject in std::iter::once(&bare).chain(&arrays) {
        subject.print(&bare);
    }
    arrays.iter().try_for_each(|array| array.repairs(bytes))
}
