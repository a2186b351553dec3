//! The offset table of one log: transfer id -> place, in 16 bytes a transfer.
//!
//! Built from the heads in the file when a CP or a failover needs it, dropped with its reader.
//! Each head is checked (two checksums, log id, own position) and must continue the history of
//! the one before it. What is not sound is remembered as damage and the first sound record behind
//! it is taken up again, marked: its own blocks can still be read, but no run crosses the gap.

use std::sync::Arc;

use super::error::LogError;
use super::format::HEADER_BYTES_U64;
use super::open::{LogName, OpenFiles};
use super::scan::{Found, Head, Scanner, check_joins};
use crate::limits::{RECORD_ALIGN_BYTES, TRANSFER_BYTES_MAX};
use crate::record::marks::Place;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{low_u8, low_u32, to_u64};
use crate::units::numbers::{LogPosition, TransferId};

/// Generations (boots of a source) within one CP; the 16 bytes have two for the index.
const GENERATIONS_MAX: usize = 65_536;

/// One transfer.
#[derive(Debug, Clone, Copy)]
struct Row {
    counter: u64,
    /// Position of its record in sectors.
    sector: u32,
    /// Index into the table's generations.
    generation: u16,
    /// Blocks it writes whole.
    ordinals: u8,
    /// Something before it is missing.
    after_gap: bool,
}

const _: () = {
    assert!(size_of::<Row>() == 16);
    assert!((TRANSFER_BYTES_MAX - 80 - 24) / BLOCK_BYTES_U64 <= 0xff, "ordinals fit a byte");
};

/// A row, unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row64 {
    pub(super) id: TransferId,
    pub(super) at: LogPosition,
    pub(super) ordinals: u64,
    pub(super) after_gap: bool,
}

/// Transfer id -> place, in order.
#[derive(Debug, Default)]
pub(super) struct OffsetTable {
    rows: Vec<Row>,
    generations: Vec<u32>,
    last: Option<Place>,
    damage: Option<LogError>,
}

impl OffsetTable {
    /// Reads the heads of the first `extent` bytes of records.
    pub(super) fn build(
        open: &OpenFiles,
        name: &Arc<LogName>,
        extent: u64,
    ) -> Result<Self, LogError> {
        let mut table = Self::default();
        let mut scanner = Scanner::new(open, name, extent);
        let mut at = LogPosition(0);
        let mut after_gap = false;
        loop {
            let head = match scanner.head(at)? {
                Found::End => break,
                Found::Record(head) => head,
                Found::Bad(bad) => {
                    table.set_damage(name.corrupt(HEADER_BYTES_U64 + at.0, bad));
                    after_gap = true;
                    let Some(head) = scanner.next_sound(at)? else { break };
                    head
                }
            };
            let start = name.identity.start;
            if let Err(bad) = check_joins(table.last.as_ref().unwrap_or(&start), &head.transfer) {
                table.set_damage(name.corrupt(HEADER_BYTES_U64 + head.at.0, bad));
                after_gap = true;
            }
            at = head.end();
            if table.push(name, &head, after_gap) {
                after_gap = false;
            }
        }
        table.rows.shrink_to_fit();
        Ok(table)
    }

    /// Takes a sound head in, unless its id is not above all before it: then nothing can find it.
    fn push(&mut self, name: &LogName, head: &Head, after_gap: bool) -> bool {
        let id = head.transfer.header().id;
        if self.last.is_some_and(|last| id <= last.transfer) {
            return false;
        }
        if self.generations.last() != Some(&id.generation) {
            if self.generations.len() == GENERATIONS_MAX {
                let what = "more than 65536 generations in one CP";
                self.set_damage(name.corrupt(HEADER_BYTES_U64 + head.at.0, what));
                return false;
            }
            self.generations.push(id.generation);
        }
        let Ok(generation) = u16::try_from(self.generations.len() - 1) else { return false };
        self.rows.push(Row {
            counter: id.counter,
            sector: low_u32(head.at.0 / RECORD_ALIGN_BYTES),
            generation,
            ordinals: low_u8(head.transfer.ordinals()),
            after_gap,
        });
        self.last = Some(head.place());
        true
    }

    /// Keeps the first reason why a part of the file cannot be read.
    pub(super) fn set_damage(&mut self, damage: LogError) {
        self.damage.get_or_insert(damage);
    }

    /// The first damage found in heads.
    pub(super) fn damage(&self) -> Option<&LogError> {
        self.damage.as_ref()
    }

    /// Place behind the last sound record.
    pub(super) fn last(&self) -> Option<Place> {
        self.last
    }

    /// Number of transfers.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Bytes of memory held for the rows.
    pub(super) fn memory_bytes(&self) -> u64 {
        to_u64(self.rows.capacity()) * to_u64(size_of::<Row>())
    }

    /// The transfer at that place in order.
    pub(super) fn row(&self, index: usize) -> Option<Row64> {
        let row = self.rows.get(index)?;
        Some(Row64 {
            id: self.id(row)?,
            at: LogPosition(u64::from(row.sector) * RECORD_ALIGN_BYTES),
            ordinals: u64::from(row.ordinals),
            after_gap: row.after_gap,
        })
    }

    /// Where in the order the transfer stands.
    pub(super) fn find(&self, id: TransferId) -> Option<usize> {
        let generation = self.generations.binary_search(&id.generation).ok()?;
        let key = (u16::try_from(generation).ok()?, id.counter);
        self.rows.binary_search_by_key(&key, |row| (row.generation, row.counter)).ok()
    }

    fn id(&self, row: &Row) -> Option<TransferId> {
        let generation = *self.generations.get(usize::from(row.generation))?;
        Some(TransferId { generation, counter: row.counter })
    }
}

/// Position of the record behind which everything is cut: the one that ends at `place`.
pub(super) fn find_place(
    open: &OpenFiles,
    name: &Arc<LogName>,
    extent: u64,
    place: &Place,
) -> Result<Option<LogPosition>, LogError> {
    let mut scanner = Scanner::new(open, name, extent);
    let mut at = LogPosition(0);
    let mut last = name.identity.start;
    while last.transfer < place.transfer {
        let head = match scanner.head(at)? {
            Found::End => return Ok(None),
            Found::Record(head) => head,
            Found::Bad(bad) => return Err(name.corrupt(HEADER_BYTES_U64 + at.0, bad)),
        };
        if let Err(bad) = check_joins(&last, &head.transfer) {
            return Err(name.corrupt(HEADER_BYTES_U64 + at.0, bad));
        }
        last = head.place();
        at = head.end();
    }
    Ok((last == *place).then_some(at))
}
