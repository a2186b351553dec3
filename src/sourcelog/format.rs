//! The 4 KiB at the beginning of a source log: whose it is, and how far it is known synced.
//!
//! Pure functions between structs and bytes. Three sectors of 512 bytes are used, each with its
//! own checksum, so that a write torn between sectors is told from a sound one:
//!
//! | at | what |
//! | --- | --- |
//! | 0 | identity: written once, when the file is made |
//! | 1024, 2048 | two slots, written in turn after each sync: how far the file is known synced |
//! | else | reserved, zero |
//!
//! One slot would not do: a power cut in its rewrite would lose the only statement of how far the
//! file is synced. The slot with the higher number counts; the file is created with both valid.
//!
//! Identity, little-endian:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 4 | magic `MHSL` |
//! | 4 | 2 | format version: 1 |
//! | 6 | 1 | checksum algorithm: 1 = CRC-32C |
//! | 7 | 1 | reserved, zero |
//! | 8 | 16 | id of this log: the ring id of its records' envelopes |
//! | 24 | 16 | source id |
//! | 40 | 16 | hub id |
//! | 56 | 4 | CP |
//! | 60 | 4 | epoch number of the first record |
//! | 64 | 8 | epoch id of the first record |
//! | 72 | 36 | place before the first record |
//! | 108 | 4 | CP of the log before this one when this was made; 0: there was none |
//! | 112 | 396 | reserved, zero |
//! | 508 | 4 | CRC-32C of bytes 0..508 |
//!
//! Slot:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 4 | magic `MHSS` |
//! | 4 | 4 | reserved, zero |
//! | 8 | 16 | id of this log |
//! | 24 | 8 | number of this slot write, rising |
//! | 32 | 8 | synced: bytes of records known to be on the medium |
//! | 40 | 36 | place at that position |
//! | 76 | 12 | last transfer that one in here names as durable at its source (R1); zero if none |
//! | 88 | 420 | reserved, zero |
//! | 508 | 4 | CRC-32C of bytes 0..508 |
//!
//! A place is generation (4) and counter (8) of the last transfer, its last sequence number (8)
//! and the stream hash there (16). The records begin at byte 4096; positions count from there.

use crate::limits::RECORD_ALIGN_BYTES;
use crate::record::marks::Place;
use crate::units::bytes::{long, sixteen, word};
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::{StreamHash, crc32c};
use crate::units::ids::{HubId, RingId, SourceId};
use crate::units::numbers::{CpNumber, Epoch, LogPosition, SequenceNumber, TransferId};

/// Bytes before the first record.
pub const HEADER_BYTES: usize = 4096;
/// The same, as the type that offsets have.
pub const HEADER_BYTES_U64: u64 = 4096;
/// Format version written and read.
pub const LOG_VERSION: u16 = 1;
/// Bytes of identity and of a slot.
pub const SECTOR_BYTES: usize = 512;
/// Where the two slots lie.
pub const SLOT_OFFSETS: [u64; 2] = [1024, 2048];

const IDENTITY_MAGIC: [u8; 4] = *b"MHSL";
const SLOT_MAGIC: [u8; 4] = *b"MHSS";
const ALGORITHM_CRC32C: u8 = 1;
const CRC_AT: usize = 508;
const PLACE_BYTES: usize = 36;
const IDENTITY_PLACE_AT: usize = 72;
const AFTER_AT: usize = 108;
const SLOT_PLACE_AT: usize = 40;
const SLOT_OWN_AT: usize = 76;
const SLOT_BYTES: usize = 88;

const _: () = {
    assert!(CRC_AT + 4 == SECTOR_BYTES);
    assert!(IDENTITY_PLACE_AT + PLACE_BYTES == AFTER_AT);
    assert!(SLOT_PLACE_AT + PLACE_BYTES == SLOT_OWN_AT && SLOT_OWN_AT + 12 == SLOT_BYTES);
    assert!(HEADER_BYTES_U64.is_multiple_of(RECORD_ALIGN_BYTES));
    assert!(SLOT_OFFSETS[1] + 512 <= HEADER_BYTES_U64 && SLOT_OFFSETS[0] + 512 <= SLOT_OFFSETS[1]);
};

/// Why 4 KiB are no header of a source log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Another kind of file.
    #[error("the file begins with {0:02x?}, not with MHSL")]
    Magic([u8; 4]),
    /// Damaged.
    #[error("checksum of the header is {met:08x}, stored is {stored:08x}")]
    Checksum { stored: u32, met: u32 },
    /// Written by a later program.
    #[error("source log format version {0}, this program reads version 1")]
    Version(u16),
    /// A field out of its bounds.
    #[error("header field {field} is {value}")]
    Field { field: &'static str, value: u64 },
    /// A byte that nobody writes is set.
    #[error("reserved byte is {value}")]
    Reserved { at: u64, value: u8 },
    /// A slot of another log.
    #[error("slot belongs to log {met}, this is log {wanted}")]
    Log { wanted: RingId, met: RingId },
    /// Both slots are bad.
    #[error("neither slot is valid: {first}; {second}")]
    Slots { first: Box<HeaderError>, second: Box<HeaderError> },
}

impl HeaderError {
    /// Where in the file the damage lies.
    pub fn offset(&self) -> u64 {
        match self {
            Self::Magic(_) | Self::Checksum { .. } | Self::Version(_) | Self::Field { .. } => 0,
            Self::Reserved { at, .. } => *at,
            Self::Log { .. } | Self::Slots { .. } => SLOT_OFFSETS[0],
        }
    }
}

/// Whose file it is; never changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Id of this log.
    pub log: RingId,
    /// Whose entries it holds.
    pub source: SourceId,
    /// The hub that wrote it.
    pub hub: HubId,
    /// The CP its entries belong to.
    pub cp: CpNumber,
    /// Epoch of the first record.
    pub epoch: Epoch,
    /// Place before the first record.
    pub start: Place,
    /// CP of the log before this one when this was made, 0 without one. If that log is neither
    /// there nor applied, this one stands behind a gap.
    pub after: CpNumber,
}

/// How far the file is known to be on the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Rises with every slot write of this file.
    pub number: u64,
    /// Bytes of records.
    pub synced: LogPosition,
    /// Place at that position.
    pub place: Place,
    /// The last transfer that one in here names as durable at its source (R1).
    pub own_durable: TransferId,
}

impl Identity {
    /// The 512 bytes.
    pub fn encode(&self) -> [u8; SECTOR_BYTES] {
        let mut out = [0; SECTOR_BYTES];
        out[0..4].copy_from_slice(&IDENTITY_MAGIC);
        out[4..6].copy_from_slice(&LOG_VERSION.to_le_bytes());
        out[6] = ALGORITHM_CRC32C;
        out[8..24].copy_from_slice(&self.log.0);
        out[24..40].copy_from_slice(&self.source.0);
        out[40..56].copy_from_slice(&self.hub.0);
        out[56..60].copy_from_slice(&self.cp.0.to_le_bytes());
        out[60..64].copy_from_slice(&self.epoch.number.to_le_bytes());
        out[64..72].copy_from_slice(&self.epoch.id.to_le_bytes());
        put_place(&mut out, IDENTITY_PLACE_AT, &self.start);
        out[AFTER_AT..AFTER_AT + 4].copy_from_slice(&self.after.0.to_le_bytes());
        seal(&mut out);
        out
    }

    /// Reads and checks 512 bytes.
    pub fn decode(bytes: &[u8; SECTOR_BYTES]) -> Result<Self, HeaderError> {
        check_sector(bytes, IDENTITY_MAGIC)?;
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != LOG_VERSION {
            return Err(HeaderError::Version(version));
        }
        if bytes[6] != ALGORITHM_CRC32C {
            let value = u64::from(bytes[6]);
            return Err(HeaderError::Field { field: "checksum algorithm", value });
        }
        check_zero(bytes, 7..8, 0)?;
        check_zero(bytes, AFTER_AT + 4..CRC_AT, 0)?;
        Ok(Self {
            log: RingId(sixteen(bytes, 8)),
            source: SourceId(sixteen(bytes, 24)),
            hub: HubId(sixteen(bytes, 40)),
            cp: CpNumber(word(bytes, 56)),
            epoch: Epoch { number: word(bytes, 60), id: long(bytes, 64) },
            start: place(bytes, IDENTITY_PLACE_AT),
            after: CpNumber(word(bytes, AFTER_AT)),
        })
    }
}

impl Slot {
    /// Nothing is synced.
    pub fn unsynced(number: u64, identity: &Identity) -> Self {
        let own_durable = TransferId::NONE;
        Self { number, synced: LogPosition(0), place: identity.start, own_durable }
    }

    /// The 512 bytes, for the log with that id.
    pub fn encode(&self, log: RingId) -> [u8; SECTOR_BYTES] {
        let mut out = [0; SECTOR_BYTES];
        out[0..4].copy_from_slice(&SLOT_MAGIC);
        out[8..24].copy_from_slice(&log.0);
        out[24..32].copy_from_slice(&self.number.to_le_bytes());
        out[32..40].copy_from_slice(&self.synced.0.to_le_bytes());
        put_place(&mut out, SLOT_PLACE_AT, &self.place);
        put_transfer(&mut out, SLOT_OWN_AT, self.own_durable);
        seal(&mut out);
        out
    }

    /// Reads and checks the 512 bytes that lie at `at` in the log with that id.
    pub fn decode(bytes: &[u8; SECTOR_BYTES], log: RingId, at: u64) -> Result<Self, HeaderError> {
        check_sector(bytes, SLOT_MAGIC)?;
        check_zero(bytes, 4..8, at)?;
        check_zero(bytes, SLOT_BYTES..CRC_AT, at)?;
        let met = RingId(sixteen(bytes, 8));
        if met != log {
            return Err(HeaderError::Log { wanted: log, met });
        }
        let synced = long(bytes, 32);
        if !synced.is_multiple_of(RECORD_ALIGN_BYTES) || synced > u64::MAX - HEADER_BYTES_U64 {
            return Err(HeaderError::Field { field: "synced", value: synced });
        }
        let number = long(bytes, 24);
        if number == 0 || number == u64::MAX {
            return Err(HeaderError::Field { field: "slot number", value: number });
        }
        let own_durable = transfer(bytes, SLOT_OWN_AT);
        let place = place(bytes, SLOT_PLACE_AT);
        Ok(Self { number, synced: LogPosition(synced), place, own_durable })
    }

    /// The slot area a write with this number goes to: in turn, so that the newest valid one is
    /// never overwritten.
    pub fn offset(&self) -> u64 {
        SLOT_OFFSETS[to_usize(self.number % 2)]
    }
}

/// The 4 KiB of a new file: nothing is synced, both slots say so.
pub fn new_header(identity: &Identity) -> [u8; HEADER_BYTES] {
    let slot = |number| Slot::unsynced(number, identity);
    header_with(identity, [1, 2].map(slot))
}

/// The 4 KiB with these slots, whose numbers follow each other.
pub fn header_with(identity: &Identity, slots: [Slot; 2]) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..SECTOR_BYTES].copy_from_slice(&identity.encode());
    for slot in slots {
        let at = to_usize(slot.offset());
        out[at..at + SECTOR_BYTES].copy_from_slice(&slot.encode(identity.log));
    }
    out
}

/// Whether this is what a power cut can leave of a header that was never synced: slots that say
/// so, whether new or written again, and sectors that are still zero, the identity among them.
pub fn is_torn(header: &[u8; HEADER_BYTES]) -> bool {
    let untouched = |at: u64| {
        let bytes = sector(header, to_usize(at));
        let log = RingId(sixteen(bytes, 8));
        *bytes == [0; SECTOR_BYTES]
            || Slot::decode(bytes, log, at).is_ok_and(|slot| slot.synced == LogPosition(0))
    };
    *sector(header, 0) == [0; SECTOR_BYTES] && SLOT_OFFSETS.into_iter().all(untouched)
}

/// Reads the identity and checks every byte that is no slot.
pub fn read_identity(header: &[u8; HEADER_BYTES]) -> Result<Identity, HeaderError> {
    let identity = Identity::decode(sector(header, 0))?;
    let (first, second) = (to_usize(SLOT_OFFSETS[0]), to_usize(SLOT_OFFSETS[1]));
    check_zero(header, SECTOR_BYTES..first, 0)?;
    check_zero(header, first + SECTOR_BYTES..second, 0)?;
    check_zero(header, second + SECTOR_BYTES..HEADER_BYTES, 0)?;
    Ok(identity)
}

/// The newest valid slot of that log. Two slots that were never written say that nothing is
/// synced: a power cut took them from a new file.
pub fn newest_slot(header: &[u8; HEADER_BYTES], identity: &Identity) -> Result<Slot, HeaderError> {
    if SLOT_OFFSETS.iter().all(|at| *sector(header, to_usize(*at)) == [0; SECTOR_BYTES]) {
        return Ok(Slot::unsynced(2, identity));
    }
    let read = |at: u64| Slot::decode(sector(header, to_usize(at)), identity.log, at);
    match (read(SLOT_OFFSETS[0]), read(SLOT_OFFSETS[1])) {
        (Ok(a), Ok(b)) if b.number > a.number => Ok(b),
        (Ok(a), _) => Ok(a),
        (Err(_), Ok(b)) => Ok(b),
        (Err(a), Err(b)) => Err(HeaderError::Slots { first: a.into(), second: b.into() }),
    }
}

fn sector(header: &[u8; HEADER_BYTES], at: usize) -> &[u8; SECTOR_BYTES] {
    let sectors = header.as_chunks::<SECTOR_BYTES>().0;
    &sectors[at / SECTOR_BYTES]
}

fn seal(out: &mut [u8; SECTOR_BYTES]) {
    let crc = crc32c(&out[..CRC_AT]);
    out[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
}

fn check_sector(bytes: &[u8; SECTOR_BYTES], magic: [u8; 4]) -> Result<(), HeaderError> {
    let met = [bytes[0], bytes[1], bytes[2], bytes[3]];
    if met != magic {
        return Err(HeaderError::Magic(met));
    }
    let (stored, met) = (word(bytes, CRC_AT), crc32c(&bytes[..CRC_AT]));
    if stored != met {
        return Err(HeaderError::Checksum { stored, met });
    }
    Ok(())
}

fn check_zero(bytes: &[u8], range: std::ops::Range<usize>, base: u64) -> Result<(), HeaderError> {
    let start = range.start;
    match bytes[range].iter().position(|byte| *byte != 0) {
        Some(index) => {
            let at = start + index;
            Err(HeaderError::Reserved { at: base + to_u64(at), value: bytes[at] })
        }
        None => Ok(()),
    }
}

fn put_place(out: &mut [u8; SECTOR_BYTES], at: usize, place: &Place) {
    put_transfer(out, at, place.transfer);
    out[at + 12..at + 20].copy_from_slice(&place.sequence.0.to_le_bytes());
    out[at + 20..at + 36].copy_from_slice(&place.hash.0);
}

fn put_transfer(out: &mut [u8; SECTOR_BYTES], at: usize, id: TransferId) {
    out[at..at + 4].copy_from_slice(&id.generation.to_le_bytes());
    out[at + 4..at + 12].copy_from_slice(&id.counter.to_le_bytes());
}

fn transfer(bytes: &[u8; SECTOR_BYTES], at: usize) -> TransferId {
    TransferId { generation: word(bytes, at), counter: long(bytes, at + 4) }
}

fn place(bytes: &[u8; SECTOR_BYTES], at: usize) -> Place {
    Place {
        transfer: transfer(bytes, at),
        sequence: SequenceNumber(long(bytes, at + 12)),
        hash: StreamHash(sixteen(bytes, at + 20)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            log: RingId([1; 16]),
            source: SourceId([2; 16]),
            hub: HubId([3; 16]),
            cp: CpNumber(4),
            epoch: Epoch { number: 5, id: 6 },
            start: Place {
                transfer: TransferId { generation: 7, counter: 8 },
                sequence: SequenceNumber(9),
                hash: StreamHash([10; 16]),
            },
            after: CpNumber(11),
        }
    }

    #[test]
    fn golden_bytes_of_the_identity() {
        let bytes = identity().encode();
        assert_eq!(&bytes[..8], b"MHSL\x01\0\x01\0");
        assert_eq!(bytes[8..56], [[1; 16], [2; 16], [3; 16]].concat());
        assert_eq!(&bytes[56..72], b"\x04\0\0\0\x05\0\0\0\x06\0\0\0\0\0\0\0");
        assert_eq!(&bytes[72..92], b"\x07\0\0\0\x08\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0");
        assert_eq!(bytes[92..108], [10; 16]);
        assert_eq!(bytes[108..112], [11, 0, 0, 0]);
        assert_eq!(bytes[112..508], [0; 396]);
        assert_eq!(bytes[508..], ::crc32c::crc32c(&bytes[..508]).to_le_bytes());
        assert_eq!(Identity::decode(&bytes), Ok(identity()));
    }

    #[test]
    fn golden_bytes_of_a_slot() {
        let start = identity().start;
        let own_durable = TransferId { generation: 5, counter: 0x0607 };
        let slot = Slot { number: 0x0102, synced: LogPosition(1024), place: start, own_durable };
        let bytes = slot.encode(RingId([1; 16]));
        assert_eq!(&bytes[..8], b"MHSS\0\0\0\0");
        assert_eq!(bytes[8..24], [1; 16]);
        assert_eq!(&bytes[24..40], b"\x02\x01\0\0\0\0\0\0\0\x04\0\0\0\0\0\0");
        assert_eq!(&bytes[40..60], b"\x07\0\0\0\x08\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0");
        assert_eq!(&bytes[76..90], b"\x05\0\0\0\x07\x06\0\0\0\0\0\0\0\0");
        assert_eq!(bytes[508..], ::crc32c::crc32c(&bytes[..508]).to_le_bytes());
        assert_eq!(Slot::decode(&bytes, RingId([1; 16]), 1024), Ok(slot));
        assert_eq!(slot.offset(), 1024);
    }

    /// No flipped bit of the header passes: it is named, or one slot falls back to the other.
    #[test]
    fn every_flipped_bit_is_found() {
        let good = new_header(&identity());
        let slots: [_; 2] = SLOT_OFFSETS.map(|at| to_usize(at)..to_usize(at) + SECTOR_BYTES);
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            let whose = slots.iter().position(|slot| slot.contains(&(bit / 8)));
            let Some(hit) = whose else {
                assert!(read_identity(&bytes).is_err(), "bit {bit}");
                continue;
            };
            assert!(read_identity(&bytes).is_ok(), "bit {bit}");
            let wanted = if hit == 0 { 1 } else { 2 };
            assert_eq!(newest_slot(&bytes, &identity()).unwrap().number, wanted, "bit {bit}");
        }
    }

    fn resealed(change: impl FnOnce(&mut [u8; SECTOR_BYTES])) -> [u8; SECTOR_BYTES] {
        let mut bytes = identity().encode();
        change(&mut bytes);
        seal(&mut bytes);
        bytes
    }

    #[test]
    fn each_bad_field_is_named() {
        let bad = |change: fn(&mut [u8; SECTOR_BYTES])| Identity::decode(&resealed(change));
        assert_eq!(bad(|b| b[4] = 2), Err(HeaderError::Version(2)));
        let algorithm = HeaderError::Field { field: "checksum algorithm", value: 3 };
        assert_eq!(bad(|b| b[6] = 3), Err(algorithm));
        assert_eq!(bad(|b| b[7] = 3), Err(HeaderError::Reserved { at: 7, value: 3 }));
        assert_eq!(bad(|b| b[300] = 1), Err(HeaderError::Reserved { at: 300, value: 1 }));
        assert_eq!(bad(|b| b[0] = b'X'), Err(HeaderError::Magic(*b"XHSL")));
    }

    /// Every subset of the three sectors of a new header, and the same of a synced one.
    #[test]
    fn a_torn_header_is_told_from_a_damaged_one() {
        let fresh = new_header(&identity());
        let mut synced = fresh;
        let slot = Slot { synced: LogPosition(512), ..Slot::unsynced(3, &identity()) };
        synced[2048..2560].copy_from_slice(&slot.encode(identity().log));
        for (header, was_synced) in [(fresh, false), (synced, true)] {
            for lost in 0..8 {
                let mut bytes = header;
                for (bit, at) in [0, 1024, 2048].into_iter().enumerate() {
                    if lost >> bit & 1 == 1 {
                        bytes[at..at + SECTOR_BYTES].fill(0);
                    }
                }
                let (no_identity, no_second) = (lost & 1 == 1, lost & 4 == 4);
                assert_eq!(is_torn(&bytes), no_identity && (!was_synced || no_second), "{lost}");
                assert_eq!(read_identity(&bytes).is_err(), no_identity);
                let found = newest_slot(&bytes, &identity()).unwrap().synced.0;
                assert_eq!(found, if was_synced && !no_second { 512 } else { 0 });
            }
        }
    }

    #[test]
    fn a_bad_slot_is_named_and_two_bad_slots_are_no_header() {
        let good = Slot::unsynced(3, &identity());
        let log = RingId([1; 16]);
        let decode = |slot: Slot| Slot::decode(&slot.encode(log), log, SLOT_OFFSETS[1]);
        assert!(decode(good).is_ok());
        let odd = HeaderError::Field { field: "synced", value: 1 };
        assert_eq!(decode(Slot { synced: LogPosition(1), ..good }), Err(odd));
        assert!(decode(Slot { number: 0, ..good }).is_err());
        let other = Slot::decode(&good.encode(RingId([9; 16])), log, 1024);
        assert!(matches!(other, Err(HeaderError::Log { .. })));
        let mut header = new_header(&identity());
        header[1030] ^= 1;
        header[2050] ^= 1;
        let error = newest_slot(&header, &identity()).unwrap_err();
        assert!(matches!(error, HeaderError::Slots { .. }));
        assert_eq!(error.offset(), 1024);
    }
}
