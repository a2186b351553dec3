//! A transfer: a batch of entries formed once, the same bytes everywhere (R6).
//!
//! The source's committing thread forms it with [`Builder`]; the ring, the wire, the hub's ring
//! and the source log carry its bytes unchanged; a reference names one block of it. Everybody
//! who receives the bytes reads them with [`Transfer::parse`], which checks every field and both
//! checksums before anything is used; a failure is the sender's or the medium's, never a panic.
//!
//! Layout, little-endian: header of 80 bytes, then `count` entries of 24 bytes, then the data of
//! all writes in entry order without padding.
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 4 | magic `MHT1` |
//! | 4 | 4 | generation of the transfer id |
//! | 8 | 8 | counter of the transfer id |
//! | 16 | 4 | CP the entries belong to |
//! | 20 | 2 | number of entries, 1 to 4096 |
//! | 22 | 1 | partition: 0 or 1 |
//! | 23 | 1 | reserved, zero |
//! | 24 | 8 | sequence number of the first entry |
//! | 32 | 4 | generation of the predecessor's id |
//! | 36 | 8 | counter of the predecessor's id |
//! | 44 | 16 | stream hash before the first entry |
//! | 60 | 4 | generation of the last transfer known durable at the source when this was formed |
//! | 64 | 8 | counter of that transfer |
//! | 72 | 4 | bytes of data |
//! | 76 | 4 | CRC-32C of bytes 0..76 and the entry table |

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::entry::{ENTRY_BYTES, Entry, EntryError, extend_stream_hash};
use super::marks::Place;
use crate::limits::{TRANSFER_BYTES_MAX, TRANSFER_ENTRIES_MAX};
use crate::units::BLOCK_BYTES;
use crate::units::convert::{to_u64, to_usize, u32_to_usize};
use crate::units::hash::{StreamHash, crc32c, crc32c_parts};
use crate::units::numbers::{CpNumber, SequenceNumber, TransferId};

/// Bytes of the fixed header.
pub const TRANSFER_HEADER_BYTES: usize = 80;
const MAGIC: [u8; 4] = *b"MHT1";
const CRC_AT: usize = 76;

const _: () = assert!(CRC_AT + 4 == TRANSFER_HEADER_BYTES);
const _: () = assert!(TRANSFER_ENTRIES_MAX <= 0xffff);

/// Why bytes are no transfer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// Shorter than it says, or longer.
    #[error("transfer has {met} bytes, its header asks for {wanted}")]
    Length { wanted: u64, met: u64 },
    /// Another format or another version.
    #[error("transfer begins with {0:02x?}, not with MHT1")]
    Magic([u8; 4]),
    /// Header or table damaged.
    #[error("checksum of the transfer's header is {met:08x}, stored is {stored:08x}")]
    HeaderChecksum { stored: u32, met: u32 },
    /// A count, partition or reserved byte out of bounds.
    #[error("transfer field {field} is {value}")]
    Field { field: &'static str, value: u64 },
    /// An entry is bad.
    #[error("entry {index}: {error}")]
    Entry { index: usize, error: EntryError },
    /// Data damaged.
    #[error("data of entry {index} has checksum {met:08x}, stored is {stored:08x}")]
    DataChecksum { index: usize, stored: u32, met: u32 },
}

/// The fixed fields of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferHeader {
    /// Its name.
    pub id: TransferId,
    /// CP its entries belong to.
    pub cp: CpNumber,
    /// Half of the source's NVRAM it lies in.
    pub partition: u8,
    /// Sequence number of its first entry.
    pub first_sequence: SequenceNumber,
    /// The transfer before it on this source's line, or [`TransferId::NONE`].
    pub previous: TransferId,
    /// h(first_sequence - 1).
    pub hash_before: StreamHash,
    /// Last transfer the source knew to be durable in its own NVRAM (R1).
    pub own_durable: TransferId,
}

impl TransferHeader {
    /// Whether the transfer lies directly behind `place` on its line.
    pub fn follows(&self, place: Place) -> bool {
        self.previous == place.transfer
            && self.hash_before == place.hash
            && self.first_sequence == place.sequence.next()
    }
}

/// A checked transfer: its bytes and what they say.
#[derive(Debug, Clone)]
pub struct Transfer {
    bytes: Bytes,
    header: TransferHeader,
    entries: Vec<Entry>,
    hash_after: StreamHash,
    ordinals: u64,
}

impl Transfer {
    /// Checks `bytes` whole: lengths, header checksum, every entry, and every entry's data.
    pub fn parse(bytes: Bytes) -> Result<Self, TransferError> {
        let transfer = Self::parse_headers(bytes)?;
        transfer.verify_data()?;
        Ok(transfer)
    }

    /// Like [`Transfer::parse`] without the data's checksums: for bytes just verified otherwise.
    pub fn parse_headers(bytes: Bytes) -> Result<Self, TransferError> {
        let met = to_u64(bytes.len());
        let head = TransferHead::parse(&bytes)?;
        if head.total_bytes() != met {
            return Err(TransferError::Length { wanted: head.total_bytes(), met });
        }
        let ordinals = head.ordinals();
        let TransferHead { header, entries, hash_after, .. } = head;
        Ok(Self { bytes, header, entries, hash_after, ordinals })
    }

    /// Checks the data of every write against its entry's CRC.
    pub fn verify_data(&self) -> Result<(), TransferError> {
        for (index, (entry, data)) in self.iter().enumerate() {
            let met = if data.is_empty() { 0 } else { crc32c(data) };
            if met != entry.crc {
                return Err(TransferError::DataChecksum { index, stored: entry.crc, met });
            }
        }
        Ok(())
    }

    /// The bytes, as they are in every ring, log and frame.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The fixed fields.
    pub fn header(&self) -> &TransferHeader {
        &self.header
    }

    /// Its name.
    pub fn id(&self) -> TransferId {
        self.header.id
    }

    /// Its entries in sequence order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Sequence number of its last entry.
    pub fn last_sequence(&self) -> SequenceNumber {
        SequenceNumber(self.header.first_sequence.0 + to_u64(self.entries.len()) - 1)
    }

    /// h(last_sequence).
    pub fn hash_after(&self) -> StreamHash {
        self.hash_after
    }

    /// The place in its source's history behind it.
    pub fn place(&self) -> Place {
        Place { transfer: self.id(), sequence: self.last_sequence(), hash: self.hash_after() }
    }

    /// Blocks with data that its entries write whole: the ordinals 0.. of references to it.
    pub fn ordinals(&self) -> u64 {
        self.ordinals
    }

    /// Bytes of client data it carries.
    pub fn data_bytes(&self) -> u64 {
        to_u64(self.bytes.len() - self.data_at())
    }

    /// Entries with their data; trims and zeroes have none.
    pub fn iter(&self) -> impl Iterator<Item = (&Entry, &[u8])> {
        self.ranges().map(|(entry, range)| (entry, &self.bytes[range]))
    }

    /// The same; what is kept of an entry's data holds the whole transfer.
    pub fn iter_held(&self) -> impl Iterator<Item = (&Entry, Bytes)> {
        self.ranges().map(|(entry, range)| (entry, self.bytes.slice(range)))
    }

    /// Entries, and where in the transfer their data lie.
    fn ranges(&self) -> impl Iterator<Item = (&Entry, Range<usize>)> {
        let mut at = self.data_at();
        self.entries.iter().map(move |entry| {
            let start = at;
            at += u32_to_usize(entry.data_bytes());
            (entry, start..at)
        })
    }

    /// The block behind a reference: ordinal `wanted` among all blocks written whole (R15).
    pub fn block(&self, wanted: u64) -> Option<&[u8; BLOCK_BYTES]> {
        let mut passed = 0;
        for (entry, data) in self.iter() {
            let count = entry.ordinals();
            if wanted < passed + count {
                let skip = to_usize(entry.whole_blocks().0 * to_u64(BLOCK_BYTES) - entry.offset);
                let start = skip + to_usize(wanted - passed) * BLOCK_BYTES;
                return data.get(start..)?.first_chunk();
            }
            passed += count;
        }
        None
    }

    fn data_at(&self) -> usize {
        TRANSFER_HEADER_BYTES + self.entries.len() * ENTRY_BYTES
    }
}

/// Header and entry table of a transfer, checked by their own checksum without its data: for
/// readers that want one entry of many.
#[derive(Debug, Clone)]
pub struct TransferHead {
    header: TransferHeader,
    entries: Vec<Entry>,
    data_bytes: u32,
    hash_after: StreamHash,
}

impl TransferHead {
    /// Checks header and table at the beginning of `bytes`; what lies behind them is not looked
    /// at. With too few bytes the error is [`TransferError::Length`] and names how many are
    /// wanted to get on: at most [`TRANSFER_BYTES_MAX`].
    pub fn parse(bytes: &[u8]) -> Result<Self, TransferError> {
        let met = to_u64(bytes.len());
        let Some(head) = bytes.first_chunk::<TRANSFER_HEADER_BYTES>() else {
            return Err(TransferError::Length { wanted: to_u64(TRANSFER_HEADER_BYTES), met });
        };
        let (header, count, data_bytes) = decode_header(head)?;
        let table_end = TRANSFER_HEADER_BYTES + count * ENTRY_BYTES;
        let total = to_u64(table_end) + u64::from(data_bytes);
        if total > TRANSFER_BYTES_MAX {
            return Err(TransferError::Length { wanted: total, met });
        }
        let Some(table) = bytes.get(TRANSFER_HEADER_BYTES..table_end) else {
            return Err(TransferError::Length { wanted: to_u64(table_end), met });
        };
        let stored = read_u32(head, CRC_AT);
        let crc = crc32c_parts(&[&head[..CRC_AT], table]);
        if stored != crc {
            return Err(TransferError::HeaderChecksum { stored, met: crc });
        }
        let mut entries = Vec::with_capacity(count);
        let mut hash = header.hash_before;
        let mut sequence = header.first_sequence;
        let mut data = 0;
        for (index, raw) in table.as_chunks::<ENTRY_BYTES>().0.iter().enumerate() {
            let entry =
                Entry::decode(raw).map_err(|error| TransferError::Entry { index, error })?;
            hash = extend_stream_hash(hash, sequence, raw);
            sequence = sequence.next();
            data += u64::from(entry.data_bytes());
            entries.push(entry);
        }
        if data != u64::from(data_bytes) {
            return Err(TransferError::Field { field: "data bytes", value: u64::from(data_bytes) });
        }
        Ok(Self { header, entries, data_bytes, hash_after: hash })
    }

    /// The fixed fields.
    pub fn header(&self) -> &TransferHeader {
        &self.header
    }

    /// Its entries in sequence order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Sequence number of its last entry.
    pub fn last_sequence(&self) -> SequenceNumber {
        SequenceNumber(self.header.first_sequence.0 + to_u64(self.entries.len()) - 1)
    }

    /// h(last_sequence).
    pub fn hash_after(&self) -> StreamHash {
        self.hash_after
    }

    /// Blocks with data that its entries write whole: the ordinals 0.. of references to it.
    pub fn ordinals(&self) -> u64 {
        self.entries.iter().map(Entry::ordinals).sum()
    }

    /// Where the data begins, from the transfer's first byte.
    pub fn data_at(&self) -> usize {
        TRANSFER_HEADER_BYTES + self.entries.len() * ENTRY_BYTES
    }

    /// Bytes of the whole transfer.
    pub fn total_bytes(&self) -> u64 {
        to_u64(self.data_at()) + u64::from(self.data_bytes)
    }
}

/// Collects entries until the committing thread takes them.
#[derive(Debug, Default)]
pub struct Builder {
    entries: Vec<(Entry, Bytes)>,
    data_bytes: u64,
}

impl Builder {
    /// Whether an entry with that much data still fits.
    pub fn has_room(&self, data_bytes: u64) -> bool {
        let count = to_u64(self.entries.len()) + 1;
        let table = count * to_u64(ENTRY_BYTES);
        let total = to_u64(TRANSFER_HEADER_BYTES) + table + self.data_bytes + data_bytes;
        count <= TRANSFER_ENTRIES_MAX && total <= TRANSFER_BYTES_MAX
    }

    /// Appends an entry; `data` is empty unless it is a write. The caller asked
    /// [`Builder::has_room`].
    pub fn push(&mut self, entry: Entry, data: Bytes) {
        assert!(self.has_room(to_u64(data.len())), "entry pushed into a full transfer");
        assert!(to_u64(data.len()) == u64::from(entry.data_bytes()), "data and entry disagree");
        self.data_bytes += to_u64(data.len());
        self.entries.push((entry, data));
    }

    /// Whether nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Forms the transfer.
    pub fn finish(self, header: TransferHeader) -> Transfer {
        assert!(!self.entries.is_empty(), "an empty transfer is never formed");
        let table_bytes = self.entries.len() * ENTRY_BYTES;
        let total = TRANSFER_HEADER_BYTES + table_bytes + to_usize(self.data_bytes);
        let mut bytes = BytesMut::with_capacity(total);
        bytes.extend_from_slice(&encode_header(&header, self.entries.len(), self.data_bytes));
        let mut hash = header.hash_before;
        let mut sequence = header.first_sequence;
        let mut entries = Vec::with_capacity(self.entries.len());
        for (entry, _) in &self.entries {
            let raw = entry.encode();
            hash = extend_stream_hash(hash, sequence, &raw);
            sequence = sequence.next();
            bytes.extend_from_slice(&raw);
            entries.push(*entry);
        }
        let crc = crc32c_parts(&[&bytes[..CRC_AT], &bytes[TRANSFER_HEADER_BYTES..]]);
        bytes[CRC_AT..TRANSFER_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
        for (_, data) in &self.entries {
            bytes.extend_from_slice(data);
        }
        let ordinals = entries.iter().map(Entry::ordinals).sum();
        Transfer { bytes: bytes.freeze(), header, entries, hash_after: hash, ordinals }
    }
}

fn encode_header(header: &TransferHeader, count: usize, data_bytes: u64) -> [u8; 80] {
    let mut out = [0; TRANSFER_HEADER_BYTES];
    out[0..4].copy_from_slice(&MAGIC);
    put_id(&mut out, 4, header.id);
    out[16..20].copy_from_slice(&header.cp.0.to_le_bytes());
    out[20..22].copy_from_slice(&to_u64(count).to_le_bytes()[..2]);
    out[22] = header.partition;
    out[24..32].copy_from_slice(&header.first_sequence.0.to_le_bytes());
    put_id(&mut out, 32, header.previous);
    out[44..60].copy_from_slice(&header.hash_before.0);
    put_id(&mut out, 60, header.own_durable);
    out[72..76].copy_from_slice(&data_bytes.to_le_bytes()[..4]);
    out
}

fn decode_header(
    head: &[u8; TRANSFER_HEADER_BYTES],
) -> Result<(TransferHeader, usize, u32), TransferError> {
    if head[0..4] != MAGIC {
        return Err(TransferError::Magic([head[0], head[1], head[2], head[3]]));
    }
    let count = u16::from_le_bytes([head[20], head[21]]);
    if count == 0 || u64::from(count) > TRANSFER_ENTRIES_MAX {
        return Err(TransferError::Field { field: "entry count", value: u64::from(count) });
    }
    if head[22] > 1 {
        return Err(TransferError::Field { field: "partition", value: u64::from(head[22]) });
    }
    if head[23] != 0 {
        return Err(TransferError::Field { field: "reserved", value: u64::from(head[23]) });
    }
    let first_sequence = read_u64(head, 24);
    if first_sequence == 0 || first_sequence > u64::MAX - TRANSFER_ENTRIES_MAX {
        return Err(TransferError::Field { field: "first sequence", value: first_sequence });
    }
    let mut hash_before = [0; 16];
    hash_before.copy_from_slice(&head[44..60]);
    let header = TransferHeader {
        id: read_id(head, 4),
        cp: CpNumber(read_u32(head, 16)),
        partition: head[22],
        first_sequence: SequenceNumber(first_sequence),
        previous: read_id(head, 32),
        hash_before: StreamHash(hash_before),
        own_durable: read_id(head, 60),
    };
    Ok((header, usize::from(count), read_u32(head, 72)))
}

fn put_id(out: &mut [u8], at: usize, id: TransferId) {
    out[at..at + 4].copy_from_slice(&id.generation.to_le_bytes());
    out[at + 4..at + 12].copy_from_slice(&id.counter.to_le_bytes());
}

fn read_id(bytes: &[u8], at: usize) -> TransferId {
    TransferId { generation: read_u32(bytes, at), counter: read_u64(bytes, at + 4) }
}

fn read_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from(read_u32(bytes, at)) | u64::from(read_u32(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::super::entry::EntryKind;
    use super::*;
    use crate::units::numbers::VolumeNumber;

    fn header() -> TransferHeader {
        TransferHeader {
            id: TransferId { generation: 2, counter: 7 },
            cp: CpNumber(5),
            partition: 1,
            first_sequence: SequenceNumber(100),
            previous: TransferId { generation: 1, counter: 9 },
            hash_before: StreamHash([3; 16]),
            own_durable: TransferId { generation: 1, counter: 8 },
        }
    }

    fn write(offset: u64, fill: u8, length: usize) -> (Entry, Bytes) {
        let data = Bytes::from(vec![fill; length]);
        let entry = Entry {
            kind: EntryKind::Write,
            volume: VolumeNumber(0),
            offset,
            length: u32::try_from(length).unwrap(),
            crc: crc32c(&data),
        };
        (entry, data)
    }

    fn sample() -> Transfer {
        let mut builder = Builder::default();
        let (entry, data) = write(100, 1, 8192);
        builder.push(entry, data);
        let trim = Entry {
            kind: EntryKind::Trim,
            volume: VolumeNumber(1),
            offset: 4096,
            length: 4096,
            crc: 0,
        };
        builder.push(trim, Bytes::new());
        let (entry, data) = write(8192, 2, 8192);
        builder.push(entry, data);
        builder.finish(header())
    }

    #[test]
    fn what_was_formed_is_what_is_read() {
        let formed = sample();
        let read = Transfer::parse(formed.bytes().clone()).unwrap();
        assert_eq!(read.header(), &header());
        assert_eq!(read.entries(), formed.entries());
        assert_eq!(read.hash_after(), formed.hash_after());
        assert_eq!(read.last_sequence(), SequenceNumber(102));
        assert_eq!(read.data_bytes(), 16384);
        assert_eq!(formed.bytes().len(), 80 + 3 * 24 + 16384);
        assert_eq!(&formed.bytes()[..8], b"MHT1\x02\0\0\0");
    }

    /// Blocks count by what is written whole: one in the odd write, two in the aligned one.
    #[test]
    fn a_reference_finds_its_block() {
        let transfer = sample();
        assert_eq!(transfer.ordinals(), 3);
        assert_eq!(transfer.block(0).unwrap(), &[1; 4096]);
        assert_eq!(transfer.block(1).unwrap(), &[2; 4096]);
        assert_eq!(transfer.block(2).unwrap(), &[2; 4096]);
        assert_eq!(transfer.block(3), None);
        assert_eq!(transfer.block(u64::MAX), None);
    }

    /// Goal: no flipped bit passes. Method: flip each of the bytes in turn.
    #[test]
    fn every_flipped_byte_is_found() {
        let good = sample();
        for at in 0..good.bytes().len() {
            let mut bytes = good.bytes().to_vec();
            bytes[at] ^= 0x10;
            assert!(Transfer::parse(bytes.into()).is_err(), "byte {at} was flipped unseen");
        }
    }

    #[test]
    fn every_cut_is_found() {
        let good = sample();
        for length in (0..good.bytes().len()).step_by(13) {
            assert!(Transfer::parse(good.bytes().slice(..length)).is_err());
        }
    }

    /// The head says the same as the whole transfer, and asks for the bytes it lacks.
    #[test]
    fn a_head_is_read_without_the_data() {
        let formed = sample();
        let table_end = 80 + 3 * 24;
        let head = TransferHead::parse(&formed.bytes()[..table_end]).unwrap();
        assert_eq!(head.header(), formed.header());
        assert_eq!(head.entries(), formed.entries());
        assert_eq!(head.hash_after(), formed.hash_after());
        assert_eq!(head.last_sequence(), formed.last_sequence());
        assert_eq!(head.ordinals(), formed.ordinals());
        assert_eq!((head.data_at(), head.total_bytes()), (table_end, 80 + 72 + 16384));
        for (given, wanted) in [(0, 80), (79, 80), (80, 152), (151, 152)] {
            let error = TransferHead::parse(&formed.bytes()[..given]).unwrap_err();
            assert_eq!(error, TransferError::Length { wanted, met: to_u64(given) });
        }
        for at in 0..table_end {
            let mut bytes = formed.bytes().to_vec();
            bytes[at] ^= 0x10;
            assert!(TransferHead::parse(&bytes).is_err(), "byte {at} was flipped unseen");
        }
    }

    #[test]
    fn a_full_builder_has_no_room() {
        let mut builder = Builder::default();
        for n in 0..3 {
            let (entry, data) = write(n * 262_144, 1, 262_144);
            assert!(builder.has_room(262_144));
            builder.push(entry, data);
        }
        assert!(!builder.has_room(262_144));
        assert!(builder.has_room(4096));
    }
}
