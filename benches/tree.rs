//! Figures of the volume tree, beside what the disk itself does in the same run.
//!
//! `cargo bench --bench tree [DIRECTORY]` (default: the temporary directory). A 1 GiB volume on a
//! 4 GiB pool in a file takes CPs of 64 MiB: filling it, writing it over in sequence, writing blocks
//! over at random, and one block alone. For each: blocks applied a second from the first put to the
//! durable publish, and bytes written to the device per applied byte. Between them the bare rate:
//! 64 MiB in sequence to a file, 1 MiB a write, then one flush. Prints, and checks only that the
//! tree is whole at the end.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context;
use mirrorhub::device::buffer::AlignedBuffer;
use mirrorhub::device::file::{Access, FileDevice};
use mirrorhub::device::latch::Latch;
use mirrorhub::device::sim::Chance;
use mirrorhub::device::{Device, DeviceError, Durability};
use mirrorhub::pool::pointer::{TreeRoot, VolumeKey};
use mirrorhub::pool::publish::Publish;
use mirrorhub::pool::rows::{SourceRow, VolumeRow};
use mirrorhub::pool::write_set::{Budget, WriteSet};
use mirrorhub::pool::{Pool, PoolOptions};
use mirrorhub::units::convert::{to_f64, to_u64};
use mirrorhub::units::hash::StreamHash;
use mirrorhub::units::ids::{SourceId, VolumeId};
use mirrorhub::units::numbers::{ByteCount, CpNumber, Epoch, SequenceNumber, Vbn, VolumeNumber};
use mirrorhub::volume::check::{Depth, check};
use mirrorhub::volume::writer::{Content, TreeWriter};

const VOLUME_BYTES: u64 = 1 << 30;
const POOL_BYTES: u64 = 4 << 30;
const CP_BYTES: u64 = 64 << 20;
const CP_BLOCKS: u64 = CP_BYTES / 4096;
const CPS: u64 = VOLUME_BYTES / CP_BYTES;
const KEY: VolumeKey = VolumeKey { source: SourceId([1; 16]), volume: VolumeNumber(1) };

fn main() -> anyhow::Result<()> {
    // Cargo passes `--bench`; anything that is no option is the directory.
    let directory = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let root = directory.map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(&root).context("no place for the files")?;
    let bare = FileDevice::create(&dir.path().join("bare"), ByteCount(CP_BYTES), Access::Cached)?;
    let file = FileDevice::create_unwritten(
        &dir.path().join("disk0"),
        ByteCount(POOL_BYTES),
        Access::Cached,
    )?;
    let device = Arc::new(Counting { inner: Latch::new(file), bytes: AtomicU64::new(0) });
    let pool = Pool::create(device.clone(), KEY.source.0, PoolOptions::default())?;
    pool.catalog().put_source(SourceRow::new(KEY.source, "filer-a".parse()?))?;
    let tree = TreeRoot::empty(ByteCount(VOLUME_BYTES));
    let (id, name) = (VolumeId([1; 16]), "vol0".parse()?);
    pool.catalog().put_volume(VolumeRow { key: KEY, id, name, tree, grows_to: None })?;

    let mut bench = Bench { device, pool, tree, cp: 0, chance: Chance::new(1) };
    print_bare(&bare)?;
    bench.series("fill in sequence", CPS, &mut |_, cp| in_sequence(cp))?;
    print_bare(&bare)?;
    bench.series("write over in sequence", CPS, &mut |_, cp| in_sequence(cp))?;
    print_bare(&bare)?;
    bench.series("write over at random", CPS, &mut |chance, _| at_random(chance, CP_BLOCKS))?;
    print_bare(&bare)?;
    bench.series("one block", 50, &mut |chance, _| at_random(chance, 1))?;
    bench.trim()?;

    let begin = Instant::now();
    let report = check(&bench.pool, Depth::Data)?;
    anyhow::ensure!(report.is_clean(), "{:?}", report.findings);
    println!("check of {} blocks with all data: {:?}", report.reachable, begin.elapsed());
    Ok(())
}

/// The blocks of one CP, rising.
fn in_sequence(cp: u64) -> Vec<u64> {
    (cp * CP_BLOCKS..(cp + 1) * CP_BLOCKS).collect()
}

fn at_random(chance: &mut Chance, count: u64) -> Vec<u64> {
    let mut blocks: Vec<u64> = (0..count).map(|_| chance.below(VOLUME_BYTES / 4096)).collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

/// 64 MiB in sequence to a bare file.
fn print_bare(bare: &FileDevice) -> anyhow::Result<()> {
    let buffer = AlignedBuffer::new(1 << 20);
    let begin = Instant::now();
    for at in (0..CP_BYTES).step_by(1 << 20) {
        bare.write_at(at, &buffer)?;
    }
    bare.flush()?;
    let rate = to_f64(CP_BYTES >> 20) / begin.elapsed().as_secs_f64();
    println!("bare: {rate:.0} MiB/s in sequence, flush and all");
    Ok(())
}

struct Bench {
    device: Arc<Counting>,
    pool: Arc<Pool>,
    tree: TreeRoot,
    cp: u32,
    chance: Chance,
}

impl Bench {
    fn series(
        &mut self,
        name: &str,
        count: u64,
        blocks_of: &mut dyn FnMut(&mut Chance, u64) -> Vec<u64>,
    ) -> anyhow::Result<()> {
        let (mut applied, mut building, mut publishing) = (0, 0.0, 0.0);
        let before = self.device.bytes.load(Ordering::Relaxed);
        for cp in 0..count {
            let blocks = blocks_of(&mut self.chance, cp);
            let begin = Instant::now();
            let mut set = self.pool.begin(Budget::Ordinary);
            self.cp += 1;
            let number = CpNumber(self.cp);
            let mut writer = TreeWriter::new(&self.pool, &mut set, KEY, self.tree, number)?;
            let mut block = [7; 4096];
            for vbn in &blocks {
                block[..8].copy_from_slice(&vbn.to_le_bytes());
                block[8..12].copy_from_slice(&self.cp.to_le_bytes());
                writer.put(Vbn(*vbn), Content::Data(&block))?;
            }
            self.tree = writer.finish()?;
            building += begin.elapsed().as_secs_f64();
            let begin = Instant::now();
            self.publish(set)?;
            publishing += begin.elapsed().as_secs_f64();
            applied += to_u64(blocks.len());
        }
        let written = to_f64(self.device.bytes.load(Ordering::Relaxed) - before);
        println!(
            "{name}: {:.0} blocks/s ({:.0} MiB/s), {:.3} bytes written per applied byte; \
             a CP takes {:.1} ms to build and {:.1} ms to publish",
            to_f64(applied) / (building + publishing),
            to_f64(applied) / 256.0 / (building + publishing),
            written / to_f64(applied * 4096),
            building * 1e3 / to_f64(count),
            publishing * 1e3 / to_f64(count),
        );
        Ok(())
    }

    /// Half of the volume at once.
    fn trim(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        let mut set = self.pool.begin(Budget::Reserve);
        self.cp += 1;
        let mut writer = TreeWriter::new(&self.pool, &mut set, KEY, self.tree, CpNumber(self.cp))?;
        writer.put_hole_range(Vbn(0), VOLUME_BYTES / 4096 / 2)?;
        self.tree = writer.finish()?;
        let freed = set.freed_blocks();
        self.publish(set)?;
        println!("trim of half the volume, {freed} blocks: {:?}", begin.elapsed());
        Ok(())
    }

    fn publish(&self, write_set: WriteSet) -> anyhow::Result<()> {
        self.pool.publish(Publish {
            write_set,
            source: KEY.source,
            cp: CpNumber(self.cp),
            sequence: SequenceNumber(u64::from(self.cp)),
            stream_hash: StreamHash::ZERO,
            epoch: Epoch::default(),
            generation: None,
            extension: None,
            volumes: vec![(KEY.volume, self.tree)],
        })?;
        Ok(())
    }
}

/// Counts what is written.
#[derive(Debug)]
struct Counting {
    inner: Latch<FileDevice>,
    bytes: AtomicU64,
}

impl Device for Counting {
    fn name(&self) -> Arc<str> {
        self.inner.name()
    }

    fn size(&self) -> ByteCount {
        self.inner.size()
    }

    fn alignment(&self) -> ByteCount {
        self.inner.alignment()
    }

    fn durability(&self) -> Durability {
        self.inner.durability()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.bytes.fetch_add(to_u64(bytes.len()), Ordering::Relaxed);
        self.inner.write_at(offset, bytes)
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.bytes.fetch_add(to_u64(bytes.len()), Ordering::Relaxed);
        self.inner.write_durable_at(offset, bytes)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.inner.flush()
    }
}
