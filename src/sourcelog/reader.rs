//! Reads one log: transfers in order, and single blocks by reference (R15).
//!
//! Made by [`super::LogStore::reader`] for an applier or a failover; any number at once, beside
//! the drainer that still appends behind what they look at. A reader knows ids and ordinals, its
//! callers never see a file or an offset. It keeps no descriptor: each read asks the store.
//!
//! Invariant: no byte leaves that did not pass its checksum. A block comes from an entry whose
//! whole data was read and checked against the entry's CRC, and the entry from a table checked by
//! the transfer's; the last few of both are kept, so that references to neighbours read once.
//! Damage is [`LogError::Corrupt`] with the file and the offset; what is sound beside it can
//! still be read.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::error::{LogError, io_error};
use super::format::HEADER_BYTES_U64;
use super::open::{LogName, OpenFiles};
use super::scan::{Found, HEAD_BYTES_FIRST, HEAD_BYTES_MAX, Scanner, check_joins};
use super::table::{OffsetTable, Row64};
use crate::limits::ENTRY_DATA_BYTES_MAX;
use crate::record::entry::Entry;
use crate::record::envelope::{ENVELOPE_BYTES, Envelope};
use crate::record::marks::Place;
use crate::record::transfer::{Transfer, TransferError, TransferHead};
use crate::units::convert::{to_u64, to_usize, u32_to_usize};
use crate::units::hash::crc32c;
use crate::units::numbers::{CpNumber, TransferId};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

/// Entry tables kept.
const HEADS_KEPT: usize = 8;
/// Entries whose data is kept.
const ENTRIES_KEPT: usize = 64;
/// Bytes of entry data kept.
const DATA_BYTES_KEPT: u64 = 1 << 20;

const _: () = assert!(ENTRY_DATA_BYTES_MAX <= DATA_BYTES_KEPT);

/// An entry by index of its transfer and number in it.
type EntryKey = (usize, usize);

/// What was read last.
#[derive(Debug, Default)]
struct Kept {
    heads: VecDeque<(usize, Arc<TransferHead>)>,
    data: VecDeque<(EntryKey, Arc<[u8]>)>,
    data_bytes: u64,
}

/// A reader of one source's log of one CP.
#[derive(Debug)]
pub struct LogReader {
    open: Arc<OpenFiles>,
    name: Arc<LogName>,
    extent: u64,
    table: OffsetTable,
    kept: Mutex<Kept>,
}

impl LogReader {
    /// Builds the offset table of what the log holds now: up to `extent`, where `last` stands.
    pub(super) fn build(
        open: Arc<OpenFiles>,
        name: Arc<LogName>,
        extent: u64,
        last: Place,
        damage: Option<LogError>,
    ) -> Result<Self, LogError> {
        let mut table = OffsetTable::build(&open, &name, extent)?;
        if let Some(damage) = damage {
            table.set_damage(damage);
        }
        if table.last().unwrap_or(name.identity.start) != last {
            let what = format!("the records do not end with transfer {}", last.transfer);
            table.set_damage(name.corrupt(HEADER_BYTES_U64 + extent, what));
        }
        Ok(Self { open, name, extent, table, kept: Mutex::default() })
    }

    /// The CP whose entries the log holds.
    pub fn cp(&self) -> CpNumber {
        self.name.identity.cp
    }

    /// Place before its first transfer.
    pub fn start(&self) -> Place {
        self.name.identity.start
    }

    /// Place behind its last readable transfer; equal to [`LogReader::start`] if there is none.
    pub fn last(&self) -> Place {
        self.table.last().unwrap_or(self.name.identity.start)
    }

    /// Number of transfers.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory the offset table takes: 16 a transfer.
    pub fn table_bytes(&self) -> u64 {
        self.table.memory_bytes()
    }

    /// The first damage that reading all heads found. Data is checked when it is read.
    pub fn damage(&self) -> Option<&LogError> {
        self.table.damage()
    }

    /// Blocks that the transfer writes whole: its ordinals 0.. (R15); `None` if it is not here.
    pub fn ordinals(&self, id: TransferId) -> Option<u64> {
        Some(self.table.row(self.table.find(id)?)?.ordinals)
    }

    /// Which transfer that is, in order from 0; `None` if it is not here.
    pub fn index_of(&self, id: TransferId) -> Option<usize> {
        self.table.find(id)
    }

    /// The whole data of entry `number` of the transfer at that place in order, checked.
    pub fn entry(&self, index: usize, number: usize) -> Result<Arc<[u8]>, LogError> {
        let none =
            || self.name.corrupt(0, format!("there is no entry {number} of transfer {index}"));
        let row = self.table.row(index).ok_or_else(none)?;
        let head = self.head(index, &row)?;
        let before = head.entries().get(..number).ok_or_else(none)?;
        let bytes: u64 = before.iter().map(|entry| u64::from(entry.data_bytes())).sum();
        let entry = head.entries().get(number).ok_or_else(none)?;
        self.data((index, number), &row, entry, to_u64(head.data_at()) + bytes)
    }

    /// The block behind the reference (transfer, ordinal).
    pub fn block(
        &self,
        id: TransferId,
        ordinal: u64,
        out: &mut [u8; BLOCK_BYTES],
    ) -> Result<(), LogError> {
        self.run(id, ordinal, 1, |_, block| out.copy_from_slice(block))
    }

    /// `count` blocks from that reference on, into the following transfers of this CP in order.
    /// `visit` gets each block's number within the run, from 0. On an error the blocks visited
    /// are good and the others were not visited.
    pub fn run(
        &self,
        id: TransferId,
        ordinal: u64,
        count: u64,
        mut visit: impl FnMut(u64, &[u8; BLOCK_BYTES]),
    ) -> Result<(), LogError> {
        let missing = || self.missing(id, ordinal);
        let mut index = self.table.find(id).ok_or_else(missing)?;
        let mut skip = ordinal;
        let mut visited = 0;
        if self.table.row(index).is_none_or(|row| ordinal >= row.ordinals) {
            return Err(missing());
        }
        while visited < count {
            let row = self.table.row(index).ok_or_else(missing)?;
            if row.after_gap && visited > 0 {
                return Err(missing());
            }
            let wanted = (count - visited).min(row.ordinals - skip);
            if wanted > 0 {
                self.run_within(index, &row, skip, wanted, |nth, block| {
                    visit(visited + nth, block);
                })?;
            }
            visited += wanted;
            skip = 0;
            index += 1;
        }
        Ok(())
    }

    /// All transfers in order, each checked whole. After the first error nothing more comes; what
    /// came before it is a sound prefix.
    pub fn transfers(&self) -> Transfers<'_> {
        self.transfers_from(None)
    }

    /// The same, from that transfer on: what lies before it is not read. None if it is not here.
    pub fn transfers_from(&self, first: Option<TransferId>) -> Transfers<'_> {
        let scanner = Scanner::new(&self.open, &self.name, self.extent);
        let next = first.map_or(Some(0), |id| self.table.find(id));
        let (next, done) = (next.unwrap_or_default(), next.is_none());
        // The first of all joins the log's own start; another one was checked with the table.
        let last = (next == 0).then(|| self.start());
        Transfers { reader: self, scanner, next, last, done }
    }

    /// `count` blocks of one transfer, from ordinal `first` on.
    fn run_within(
        &self,
        index: usize,
        row: &Row64,
        first: u64,
        count: u64,
        mut visit: impl FnMut(u64, &[u8; BLOCK_BYTES]),
    ) -> Result<(), LogError> {
        let head = self.head(index, row)?;
        let mut passed = 0;
        let mut visited = 0;
        let mut data_at = to_u64(head.data_at());
        for (number, entry) in head.entries().iter().enumerate() {
            let here = entry.ordinals();
            let skip = (first + visited).saturating_sub(passed);
            if skip < here && visited < count {
                let data = self.data((index, number), row, entry, data_at)?;
                let edge = to_usize(entry.whole_blocks().0 * BLOCK_BYTES_U64 - entry.offset);
                let blocks = data[edge..].as_chunks::<BLOCK_BYTES>().0;
                let wanted = (count - visited).min(here - skip);
                for block in blocks.iter().skip(to_usize(skip)).take(to_usize(wanted)) {
                    visit(visited, block);
                    visited += 1;
                }
            }
            passed += here;
            data_at += u64::from(entry.data_bytes());
        }
        assert!(visited == count, "the table's ordinals are those of the checked head");
        Ok(())
    }

    fn head(&self, index: usize, row: &Row64) -> Result<Arc<TransferHead>, LogError> {
        if let Some((_, head)) = self.kept().heads.iter().find(|(kept, _)| *kept == index) {
            return Ok(Arc::clone(head));
        }
        let head = Arc::new(self.read_head(row)?);
        let mut kept = self.kept();
        if kept.heads.len() == HEADS_KEPT {
            kept.heads.pop_front();
        }
        kept.heads.push_back((index, Arc::clone(&head)));
        Ok(head)
    }

    fn read_head(&self, row: &Row64) -> Result<TransferHead, LogError> {
        let offset = HEADER_BYTES_U64 + row.at.0;
        for bytes in [HEAD_BYTES_FIRST, HEAD_BYTES_MAX] {
            let mut buffer = vec![0; to_usize(bytes.min(self.extent - row.at.0))];
            let read = self.read(offset, &mut buffer)?;
            let Some((envelope, body)) = buffer[..read].split_first_chunk::<ENVELOPE_BYTES>()
            else {
                return Err(self.name.corrupt(offset, "the file ends here"));
            };
            Envelope::decode_at(envelope, self.name.identity.log, row.at)
                .map_err(|bad| self.name.corrupt(offset, bad))?;
            match TransferHead::parse(body) {
                Err(TransferError::Length { .. }) if bytes < HEAD_BYTES_MAX => {}
                Err(bad) => return Err(self.name.corrupt(offset, bad)),
                Ok(head) if head.header().id == row.id && head.ordinals() == row.ordinals => {
                    return Ok(head);
                }
                Ok(head) => {
                    let what = format!("transfer {} lies where {} was", head.header().id, row.id);
                    return Err(self.name.corrupt(offset, what));
                }
            }
        }
        Err(self.name.corrupt(offset, "the file ends within the entry table"))
    }

    /// The whole data of an entry, checked.
    fn data(
        &self,
        which: EntryKey,
        row: &Row64,
        entry: &Entry,
        data_at: u64,
    ) -> Result<Arc<[u8]>, LogError> {
        if let Some((_, data)) = self.kept().data.iter().find(|(kept, _)| *kept == which) {
            return Ok(Arc::clone(data));
        }
        let offset = HEADER_BYTES_U64 + row.at.0 + to_u64(ENVELOPE_BYTES) + data_at;
        let mut data = vec![0; u32_to_usize(entry.data_bytes())];
        let read = self.read(offset, &mut data)?;
        if read < data.len() {
            let what = format!("the file ends within entry {} of transfer {}", which.1, row.id);
            return Err(self.name.corrupt(offset + to_u64(read), what));
        }
        let met = crc32c(&data);
        if met != entry.crc {
            let bad = TransferError::DataChecksum { index: which.1, stored: entry.crc, met };
            let what = format!("transfer {}: {bad}", row.id);
            return Err(self.name.corrupt(offset, what));
        }
        let data: Arc<[u8]> = data.into();
        self.keep_data(which, &data);
        Ok(data)
    }

    fn keep_data(&self, which: EntryKey, data: &Arc<[u8]>) {
        let mut kept = self.kept();
        kept.data_bytes += to_u64(data.len());
        kept.data.push_back((which, Arc::clone(data)));
        while kept.data_bytes > DATA_BYTES_KEPT || kept.data.len() > ENTRIES_KEPT {
            let Some((_, dropped)) = kept.data.pop_front() else { break };
            kept.data_bytes -= to_u64(dropped.len());
        }
    }

    fn missing(&self, id: TransferId, ordinal: u64) -> LogError {
        match self.damage() {
            Some(damage) => damage.clone(),
            None => LogError::NoBlock { file: Arc::clone(&self.name.text), id, ordinal },
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<usize, LogError> {
        let handle = self.open.reading(&self.name)?;
        handle.read_at(offset, out).map_err(io_error(&self.name.text, "read"))
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The transfers of a log in order.
#[derive(Debug)]
pub struct Transfers<'a> {
    reader: &'a LogReader,
    scanner: Scanner<'a>,
    next: usize,
    last: Option<Place>,
    done: bool,
}

impl Iterator for Transfers<'_> {
    type Item = Result<Transfer, LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let damage = self.reader.damage().cloned();
        let item = match self.reader.table.row(self.next) {
            None => damage.map(Err),
            Some(row) if row.after_gap => damage.map(Err),
            Some(row) => Some(self.read(&row)),
        };
        self.next += 1;
        self.done = !matches!(item, Some(Ok(_)));
        item
    }
}

impl Transfers<'_> {
    fn read(&mut self, row: &Row64) -> Result<Transfer, LogError> {
        let name = &self.reader.name;
        let offset = HEADER_BYTES_U64 + row.at.0;
        let (head, transfer) = match self.scanner.record(row.at)? {
            Found::Record(found) => found,
            Found::End => return Err(name.corrupt(offset, "the file ends here")),
            Found::Bad(bad) => return Err(name.corrupt(offset, bad)),
        };
        if let Some(last) = &self.last {
            check_joins(last, &head.transfer).map_err(|bad| name.corrupt(offset, bad))?;
        }
        self.last = Some(head.place());
        Ok(transfer)
    }
}
