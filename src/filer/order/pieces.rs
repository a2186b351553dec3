//! What the order is made of: requests cut into entries, what an entry is charged, and how queued
//! entries become records.
//!
//! Pure. The charge of an entry is never below what it takes of the ring; a batch
//! counts records exactly as the feed forms them.

use bytes::Bytes;

use crate::limits::{ENTRY_DATA_BYTES_MAX, TRANSFER_BYTES_MAX, TRANSFER_ENTRIES_MAX};
use crate::record::entry::{ENTRY_BYTES, Entry, EntryKind};
use crate::record::envelope::record_bytes;
use crate::record::marks::FREEZE_BYTES_MAX;
use crate::record::transfer::{TRANSFER_HEADER_BYTES, Transfer};
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{low_u32, to_u64, to_usize};
use crate::units::hash::crc32c;
use crate::units::machine;
use crate::units::numbers::{CpNumber, VolumeNumber};

/// Memory that one dirty block takes: its page, its place in the map, and the allocator's share.
pub const DIRTY_BLOCK_BYTES: u64 = 4200;
/// Trim and zeroes entries cover at most this, so that their length fits its field.
pub(super) const RANGE_BYTES_MAX: u64 = 1 << 31;

/// What waits for the committing thread, in order.
#[derive(Debug)]
pub enum Queued {
    /// An entry of that CP.
    Entry { cp: CpNumber, entry: Entry, data: Bytes },
    /// A transfer that the hub had and this end did not (R1).
    Adopted(Box<Transfer>),
    /// The CP ends here.
    Freeze(CpNumber),
}

/// A client's request that changes something.
#[derive(Debug, Clone)]
pub enum Change {
    /// These bytes.
    Write(Bytes),
    /// Whole blocks in a range of that length become holes.
    Trim(u64),
    /// That many bytes become zero.
    Zeroes(u64),
}

/// What an entry takes of the ring, at most: the record of a transfer of its own.
pub fn charge(entry: &Entry) -> u64 {
    let body = to_u64(TRANSFER_HEADER_BYTES + ENTRY_BYTES) + u64::from(entry.data_bytes());
    record_bytes(body)
}

/// First block and number of blocks that an entry keeps in memory, at most.
pub(super) fn dirtied(entry: &Entry) -> (u64, u64) {
    let first = entry.offset / BLOCK_BYTES_U64;
    match entry.kind {
        EntryKind::Write => (first, entry.end().div_ceil(BLOCK_BYTES_U64) - first),
        EntryKind::Trim => (first, 0),
        EntryKind::Zeroes => {
            let whole = entry.whole_blocks().1;
            (first, entry.end().div_ceil(BLOCK_BYTES_U64) - first - whole)
        }
    }
}

/// A partition of less cannot take every entry.
pub fn partition_bytes_min() -> u64 {
    let blocks = ENTRY_DATA_BYTES_MAX / BLOCK_BYTES_U64 + 1;
    let body = to_u64(TRANSFER_HEADER_BYTES + ENTRY_BYTES) + ENTRY_DATA_BYTES_MAX;
    record_bytes(body).max(blocks * DIRTY_BLOCK_BYTES)
}

/// Cuts a request into entries without checksum: data at block boundaries (R16).
pub(super) fn cut(volume: VolumeNumber, offset: u64, change: &Change) -> Vec<(Entry, Bytes)> {
    let (kind, start, end, step) = match change {
        Change::Write(data) => {
            (EntryKind::Write, offset, offset + to_u64(data.len()), ENTRY_DATA_BYTES_MAX)
        }
        Change::Zeroes(length) => (EntryKind::Zeroes, offset, offset + length, RANGE_BYTES_MAX),
        Change::Trim(length) => {
            let start = offset.next_multiple_of(BLOCK_BYTES_U64);
            let end = (offset + length) / BLOCK_BYTES_U64 * BLOCK_BYTES_U64;
            let edges = if machine::breaks(16) { BLOCK_BYTES_U64 } else { 0 };
            (EntryKind::Trim, start.saturating_sub(edges), end, RANGE_BYTES_MAX)
        }
    };
    let mut entries = Vec::new();
    let mut at = start;
    while at < end {
        // The first piece ends at a block boundary, so all others begin at one.
        let until = (at / BLOCK_BYTES_U64 * BLOCK_BYTES_U64 + step).min(end);
        let data = match change {
            Change::Write(data) => data.slice(to_usize(at - offset)..to_usize(until - offset)),
            Change::Trim(_) | Change::Zeroes(_) => Bytes::new(),
        };
        let crc = if data.is_empty() { 0 } else { crc32c(&data) };
        entries.push((Entry { kind, volume, offset: at, length: low_u32(until - at), crc }, data));
        at = until;
    }
    entries
}

/// The records that taken entries will become, as the feed will form them.
#[derive(Debug)]
pub(super) struct Batch {
    bytes_max: u64,
    closed: u64,
    open: Former,
}

impl Batch {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, closed: 0, open: Former::default() }
    }

    /// Whether one more fits; counts it if so.
    pub(super) fn fits(&mut self, next: &Queued) -> bool {
        let (mut closed, mut open) = (self.closed, self.open);
        match next {
            Queued::Entry { cp, entry, .. } => {
                if !open.takes(*cp, entry) {
                    closed += open.record_bytes();
                    open = Former::default();
                }
                open.push(*cp, entry);
            }
            Queued::Adopted(transfer) => {
                closed += open.record_bytes() + record_bytes(to_u64(transfer.bytes().len()));
                open = Former::default();
            }
            Queued::Freeze(_) => {
                closed += open.record_bytes() + record_bytes(to_u64(FREEZE_BYTES_MAX));
                open = Former::default();
            }
        }
        if closed + open.record_bytes() > self.bytes_max {
            return false;
        }
        (self.closed, self.open) = (closed, open);
        true
    }
}

/// How entries are gathered into one transfer: the same rule for counting and for forming.
#[derive(Debug, Clone, Copy, Default)]
pub struct Former {
    cp: CpNumber,
    entries: u64,
    data_bytes: u64,
}

impl Former {
    /// Whether an entry of that CP still goes into it.
    pub fn takes(&self, cp: CpNumber, entry: &Entry) -> bool {
        let count = self.entries + 1;
        let data = self.data_bytes + u64::from(entry.data_bytes());
        let total = to_u64(TRANSFER_HEADER_BYTES) + count * to_u64(ENTRY_BYTES) + data;
        self.entries == 0
            || self.cp == cp && count <= TRANSFER_ENTRIES_MAX && total <= TRANSFER_BYTES_MAX
    }

    /// Counts an entry.
    pub fn push(&mut self, cp: CpNumber, entry: &Entry) {
        self.cp = cp;
        self.entries += 1;
        self.data_bytes += u64::from(entry.data_bytes());
    }

    fn record_bytes(&self) -> u64 {
        if self.entries == 0 {
            return 0;
        }
        let table = self.entries * to_u64(ENTRY_BYTES);
        record_bytes(to_u64(TRANSFER_HEADER_BYTES) + table + self.data_bytes)
    }
}
