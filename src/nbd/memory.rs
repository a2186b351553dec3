//! Exports in memory: for tests and measurements of the server and its clients, never for data.
//!
//! A sparse map of 4 KiB blocks that keeps holes apart from blocks that are zero, so that every
//! command has a visible effect. Nothing waits: what it shows is the server alone.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};

use super::export::{
    Export, ExportFuture, ExportInfo, Exports, Extent, Listed, OpenError, OpenFuture, Segment,
};
use crate::units::convert::{to_u64, to_usize};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

type Block = Box<[u8; BLOCK_BYTES]>;
type Blocks = BTreeMap<u64, Block>;

/// One export.
#[derive(Debug)]
pub struct Memory {
    info: ExportInfo,
    blocks: Mutex<Blocks>,
    flushes: AtomicU64,
    durable_writes: AtomicU64,
}

/// The part of a range that lies in one block.
struct Part {
    block: u64,
    from: usize,
    to: usize,
}

fn parts(offset: u64, length: u64) -> impl Iterator<Item = Part> {
    let end = offset + length;
    let (first, last) = (offset / BLOCK_BYTES_U64, end.div_ceil(BLOCK_BYTES_U64));
    (first..last).map(move |block| {
        let start = block * BLOCK_BYTES_U64;
        Part {
            block,
            from: to_usize(offset.saturating_sub(start)),
            to: to_usize((end - start).min(BLOCK_BYTES_U64)),
        }
    })
}

fn empty_block() -> Block {
    Box::new([0; BLOCK_BYTES])
}

fn answer<'a, T: Send + 'a>(value: T) -> ExportFuture<'a, T> {
    Box::pin(std::future::ready(Ok(value)))
}

impl Memory {
    /// An export that is one hole.
    pub fn new(info: ExportInfo) -> Self {
        Self {
            info,
            blocks: Mutex::default(),
            flushes: AtomicU64::new(0),
            durable_writes: AtomicU64::new(0),
        }
    }

    /// How often it was flushed.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// How many writes, trims and zeroings came with FUA.
    pub fn durable_writes(&self) -> u64 {
        self.durable_writes.load(Ordering::Relaxed)
    }

    /// Bytes in blocks that are no holes.
    pub fn allocated(&self) -> u64 {
        to_u64(self.lock().len()) * BLOCK_BYTES_U64
    }

    /// Puts `data` at `offset`, past the read-only check.
    pub fn fill(&self, offset: u64, data: &[u8]) {
        let mut blocks = self.lock();
        let mut rest = data;
        for Part { block, from, to } in parts(offset, to_u64(data.len())) {
            let (now, later) = rest.split_at(to - from);
            blocks.entry(block).or_insert_with(empty_block)[from..to].copy_from_slice(now);
            rest = later;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count_durable(&self, fua: bool) {
        self.durable_writes.fetch_add(u64::from(fua), Ordering::Relaxed);
    }
}

/// The run that starts with `block`: how many blocks of one kind.
fn run(blocks: &Blocks, block: u64, end: u64) -> (u64, bool, bool) {
    let is_zero = |found: &Block| found.iter().all(|byte| *byte == 0);
    let Some(first) = blocks.get(&block) else {
        let next = blocks.range(block..).next().map_or(end, |(next, _)| *next);
        return (next.min(end) - block, true, true);
    };
    let zero = is_zero(first);
    let same = |at: &u64| blocks.get(at).is_some_and(|found| is_zero(found) == zero);
    (to_u64((block..end).take_while(same).count()), false, zero)
}

impl Export for Memory {
    fn info(&self) -> &ExportInfo {
        &self.info
    }

    fn read(&self, offset: u64, length: u32) -> ExportFuture<'_, Vec<Segment>> {
        let blocks = self.lock();
        let mut segments = Vec::new();
        let mut data = BytesMut::new();
        for Part { block, from, to } in parts(offset, u64::from(length)) {
            match blocks.get(&block) {
                Some(found) => data.extend_from_slice(&found[from..to]),
                None => {
                    if !data.is_empty() {
                        segments.push(Segment::Data(data.split().freeze()));
                    }
                    segments.push(Segment::Hole(to_u64(to - from)));
                }
            }
        }
        if !data.is_empty() {
            segments.push(Segment::Data(data.freeze()));
        }
        answer(segments)
    }

    fn write(&self, offset: u64, data: Bytes, fua: bool) -> ExportFuture<'_, ()> {
        self.fill(offset, &data);
        self.count_durable(fua);
        answer(())
    }

    fn flush(&self) -> ExportFuture<'_, ()> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        answer(())
    }

    fn trim(&self, offset: u64, length: u32, fua: bool) -> ExportFuture<'_, ()> {
        let (first, end) =
            (offset.div_ceil(BLOCK_BYTES_U64), (offset + u64::from(length)) / BLOCK_BYTES_U64);
        let mut blocks = self.lock();
        blocks.retain(|block, _| !(first..end).contains(block));
        self.count_durable(fua);
        answer(())
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u32,
        no_hole: bool,
        fua: bool,
    ) -> ExportFuture<'_, ()> {
        let mut blocks = self.lock();
        for Part { block, from, to } in parts(offset, u64::from(length)) {
            if no_hole {
                blocks.entry(block).or_insert_with(empty_block)[from..to].fill(0);
            } else if to - from == BLOCK_BYTES {
                blocks.remove(&block);
            } else if let Some(found) = blocks.get_mut(&block) {
                found[from..to].fill(0);
            }
        }
        self.count_durable(fua);
        answer(())
    }

    fn cache(&self, _offset: u64, _length: u32) -> ExportFuture<'_, ()> {
        answer(())
    }

    fn extents(&self, offset: u64, length: u32, at_most: usize) -> ExportFuture<'_, Vec<Extent>> {
        let blocks = self.lock();
        let end = offset + u64::from(length);
        let last_block = end.div_ceil(BLOCK_BYTES_U64);
        let (mut at, mut extents) = (offset, Vec::new());
        while at < end && extents.len() < at_most {
            let block = at / BLOCK_BYTES_U64;
            let (count, hole, zero) = run(&blocks, block, last_block);
            let run_end = ((block + count) * BLOCK_BYTES_U64).min(end);
            extents.push(Extent { length: run_end - at, hole, zero });
            at = run_end;
        }
        answer(extents)
    }
}

/// Some exports in memory by name.
#[derive(Debug, Clone, Default)]
pub struct MemoryExports {
    exports: BTreeMap<String, Arc<Memory>>,
}

impl MemoryExports {
    /// These.
    pub fn new(exports: impl IntoIterator<Item = Arc<Memory>>) -> Self {
        let named = |export: Arc<Memory>| (export.info.name.clone(), export);
        Self { exports: exports.into_iter().map(named).collect() }
    }
}

impl Exports for MemoryExports {
    fn list(&self) -> Vec<Listed> {
        let listed = |export: &Arc<Memory>| Listed {
            name: export.info.name.clone(),
            description: export.info.description.clone(),
        };
        self.exports.values().map(listed).collect()
    }

    fn open<'a>(&'a self, name: &'a str) -> OpenFuture<'a> {
        let only = (name.is_empty() && self.exports.len() == 1)
            .then(|| self.exports.values().next())
            .flatten();
        let found = self.exports.get(name).or(only);
        let opened = found.map(|export| -> Arc<dyn Export> { Arc::<Memory>::clone(export) });
        Box::pin(std::future::ready(opened.ok_or(OpenError::Unknown)))
    }
}
