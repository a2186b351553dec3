//! The ring's header: two slots of 4 KiB in front of the data area, written in turn.
//!
//! Pure functions between [`Header`] and bytes. Written by `commit`, read by `recover`. The slot
//! of a header is its generation modulo 2, so that a torn header write leaves the one before it;
//! the higher valid generation counts. All fields lie in the first sector of a slot. The record
//! format is [`crate::record::envelope`].
//!
//! Layout of a slot, little-endian:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 4 | magic `MHNV` |
//! | 4 | 2 | format version: 2; 1 is read as well, and has no field at 80 |
//! | 6 | 1 | checksum algorithm: 1 = CRC-32C |
//! | 7 | 1 | reserved, zero |
//! | 8 | 16 | ring id |
//! | 24 | 16 | id of the owner: the hub or the source whose ring this is |
//! | 40 | 8 | bytes of the data area |
//! | 48 | 8 | bytes of the largest group commit: what a crash can have torn |
//! | 56 | 8 | released: records before this may be overwritten |
//! | 64 | 8 | durable: how far the area was durable when this was written |
//! | 72 | 8 | generation of this header, from 1 |
//! | 80 | 8 | no record ends so many bytes, or more, behind `durable`; 0: nothing is said of that |
//! | 88 | 420 | reserved, zero |
//! | 508 | 4 | CRC-32C of bytes 0..508 |
//! | 512 | 3584 | reserved, zero |
//!
//! Byte p of the log lies at `8192 + p modulo data area` of the device; a record may wrap.

use crate::limits::{COMMIT_BYTES_MAX, RECORD_ALIGN_BYTES, RING_BYTES_MAX};
use crate::units::bytes::{long, sixteen};
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::crc32c;
use crate::units::ids::RingId;
use crate::units::numbers::{ByteCount, LogPosition};

/// Bytes of one header slot.
pub const SLOT_BYTES: usize = 4096;
/// Bytes in front of the data area.
pub const HEADER_BYTES: u64 = 2 * 4096;
/// The data area is made of whole blocks of this.
pub const AREA_UNIT_BYTES: u64 = 4096;
/// Format version written.
pub const RING_VERSION: u16 = 2;
/// The oldest one that is read.
const RING_VERSION_MIN: u16 = 1;
const MAGIC: [u8; 4] = *b"MHNV";
const ALGORITHM_CRC32C: u8 = 1;
/// Where the fields of version 1 ended.
const FIELDS_END_V1: usize = 80;
const FIELDS_END: usize = 88;
const CRC_AT: usize = 508;
const SECTOR_END: usize = 512;

const _: () = {
    assert!(FIELDS_END <= CRC_AT && CRC_AT + 4 == SECTOR_END && SECTOR_END <= SLOT_BYTES);
    assert!(HEADER_BYTES == 2 * to_u64(SLOT_BYTES));
    assert!(AREA_UNIT_BYTES.is_multiple_of(RECORD_ALIGN_BYTES));
};

/// Why a slot holds no header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// All zero: never written.
    #[error("never written")]
    Blank,
    /// Something else.
    #[error("begins with {0:02x?}, not with MHNV")]
    Magic([u8; 4]),
    /// Damaged.
    #[error("checksum is {met:08x}, stored is {stored:08x}")]
    Checksum { stored: u32, met: u32 },
    /// Written by a later program.
    #[error("ring format version {0}, this program reads versions 1 and 2")]
    Version(u16),
    /// A field out of its bounds.
    #[error("field {field} is {value}")]
    Field { field: &'static str, value: u64 },
}

/// What a ring says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Its id: records of another ring are not ours.
    pub ring: RingId,
    /// Id of the hub or source it belongs to.
    pub owner: [u8; 16],
    /// Bytes of the data area.
    pub capacity: ByteCount,
    /// Bytes of the largest group commit that was or will be written.
    pub commit_bytes_max: ByteCount,
    /// Records before this may be overwritten.
    pub released: LogPosition,
    /// How far the area was durable.
    pub durable: LogPosition,
    /// Rises by one with each header written.
    pub generation: u64,
    /// No record ends more than this behind `durable`, as long as this header is the newest one: before
    /// that another is written. 0 if nothing is said: behind version 1, and before the first opening.
    pub ahead_max: ByteCount,
}

impl Header {
    /// Where in the device this header's slot begins.
    pub fn slot_offset(&self) -> u64 {
        self.generation % 2 * to_u64(SLOT_BYTES)
    }

    /// The slot's bytes, into a zeroed or earlier used slot.
    pub fn encode_into(&self, out: &mut [u8]) {
        assert!(out.len() == SLOT_BYTES && self.check().is_ok(), "{self:?}");
        out.fill(0);
        out[0..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&RING_VERSION.to_le_bytes());
        out[6] = ALGORITHM_CRC32C;
        out[8..24].copy_from_slice(&self.ring.0);
        out[24..40].copy_from_slice(&self.owner);
        out[40..48].copy_from_slice(&self.capacity.0.to_le_bytes());
        out[48..56].copy_from_slice(&self.commit_bytes_max.0.to_le_bytes());
        out[56..64].copy_from_slice(&self.released.0.to_le_bytes());
        out[64..72].copy_from_slice(&self.durable.0.to_le_bytes());
        out[72..80].copy_from_slice(&self.generation.to_le_bytes());
        out[80..88].copy_from_slice(&self.ahead_max.0.to_le_bytes());
        let crc = crc32c(&out[..CRC_AT]);
        out[CRC_AT..SECTOR_END].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads and checks a slot.
    pub fn decode(slot: &[u8; SLOT_BYTES]) -> Result<Self, HeaderError> {
        if slot.iter().all(|byte| *byte == 0) {
            return Err(HeaderError::Blank);
        }
        if slot[0..4] != MAGIC {
            return Err(HeaderError::Magic([slot[0], slot[1], slot[2], slot[3]]));
        }
        let stored = u32::from_le_bytes([slot[508], slot[509], slot[510], slot[511]]);
        let met = crc32c(&slot[..CRC_AT]);
        if stored != met {
            return Err(HeaderError::Checksum { stored, met });
        }
        let version = u16::from_le_bytes([slot[4], slot[5]]);
        if !(RING_VERSION_MIN..=RING_VERSION).contains(&version) {
            return Err(HeaderError::Version(version));
        }
        if slot[6] != ALGORITHM_CRC32C {
            return Err(field("checksum algorithm", u64::from(slot[6])));
        }
        let zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        let fields_end = if version == RING_VERSION_MIN { FIELDS_END_V1 } else { FIELDS_END };
        if slot[7] != 0 || !zero(&slot[fields_end..CRC_AT]) || !zero(&slot[SECTOR_END..]) {
            return Err(field("reserved", 1));
        }
        let header = Self {
            ring: RingId(sixteen(slot, 8)),
            owner: sixteen(slot, 24),
            capacity: ByteCount(long(slot, 40)),
            commit_bytes_max: ByteCount(long(slot, 48)),
            released: LogPosition(long(slot, 56)),
            durable: LogPosition(long(slot, 64)),
            generation: long(slot, 72),
            ahead_max: ByteCount(long(slot, 80)),
        };
        header.check()?;
        Ok(header)
    }

    /// The bounds that hold for every header, in memory and at rest.
    fn check(&self) -> Result<(), HeaderError> {
        let Self { capacity, commit_bytes_max: commit, released, durable, .. } = *self;
        let units = |value: u64, unit: u64| value > 0 && value.is_multiple_of(unit);
        if !units(capacity.0, AREA_UNIT_BYTES) || capacity.0 > RING_BYTES_MAX {
            return Err(field("capacity", capacity.0));
        }
        if !units(commit.0, RECORD_ALIGN_BYTES) || commit.0 > COMMIT_BYTES_MAX.min(capacity.0) {
            return Err(field("largest commit", commit.0));
        }
        if !released.0.is_multiple_of(RECORD_ALIGN_BYTES) {
            return Err(field("released", released.0));
        }
        // Half of the range is out of reach: no sum of a position and a length can overflow.
        if !durable.0.is_multiple_of(RECORD_ALIGN_BYTES)
            || durable.0 > u64::MAX / 2
            || durable < released
            || durable.0 - released.0 > capacity.0
        {
            return Err(field("durable", durable.0));
        }
        if self.generation == 0 || self.generation == u64::MAX {
            return Err(field("generation", self.generation));
        }
        let ahead = self.ahead_max.0;
        let said = ahead >= 2 * commit.0 && ahead.is_multiple_of(RECORD_ALIGN_BYTES);
        if ahead != 0 && !(said && ahead <= RING_BYTES_MAX) {
            return Err(field("bytes behind durable", ahead));
        }
        Ok(())
    }
}

/// Where in the device the byte at `position` lies.
pub fn device_offset(capacity: ByteCount, position: LogPosition) -> u64 {
    HEADER_BYTES + position.0 % capacity.0
}

/// A range of the log as one or two ranges of the device: offset and bytes, then the same of what
/// wraps. `length` is at most the capacity.
pub fn device_ranges(
    capacity: ByteCount,
    position: LogPosition,
    length: usize,
) -> [(u64, usize); 2] {
    assert!(to_u64(length) <= capacity.0, "{length} bytes in a ring of {capacity}");
    let first = length.min(to_usize(capacity.0 - position.0 % capacity.0));
    [(device_offset(capacity, position), first), (HEADER_BYTES, length - first)]
}

fn field(field: &'static str, value: u64) -> HeaderError {
    HeaderError::Field { field, value }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header {
            ring: RingId([1; 16]),
            owner: [2; 16],
            capacity: ByteCount(8 << 20),
            commit_bytes_max: ByteCount(4 << 20),
            released: LogPosition(0x0600),
            durable: LogPosition(0x0a00),
            generation: 3,
            ahead_max: ByteCount(64 << 20),
        }
    }

    fn encoded(header: Header) -> [u8; SLOT_BYTES] {
        let mut slot = [9; SLOT_BYTES];
        header.encode_into(&mut slot);
        slot
    }

    #[test]
    fn golden_bytes() {
        let slot = encoded(sample());
        assert_eq!(&slot[..8], b"MHNV\x02\0\x01\0");
        assert_eq!(slot[8..24], [1; 16]);
        assert_eq!(slot[24..40], [2; 16]);
        assert_eq!(slot[40..56], [0, 0, 128, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0]);
        assert_eq!(
            slot[56..80],
            [0, 6, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(slot[80..88], [0, 0, 0, 4, 0, 0, 0, 0]);
        assert_eq!(slot[508..512], GOLDEN_CRC.to_le_bytes());
        assert_eq!(Header::decode(&slot), Ok(sample()));
        assert_eq!(sample().slot_offset(), 4096);
    }

    /// Computed by hand-written table code in another language.
    const GOLDEN_CRC: u32 = 0x6bd9_b2e3;
    /// The same of version 1, which has nothing at 80.
    const GOLDEN_CRC_V1: u32 = 0x9a89_6dfc;

    /// What version 1 wrote says nothing of how far records can be.
    #[test]
    fn the_version_before_is_read() {
        let mut slot = encoded(sample());
        slot[4] = 1;
        slot[80..88].fill(0);
        slot[508..512].copy_from_slice(&GOLDEN_CRC_V1.to_le_bytes());
        assert_eq!(Header::decode(&slot), Ok(Header { ahead_max: ByteCount(0), ..sample() }));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        for bit in 0..SLOT_BYTES * 8 {
            let mut slot = encoded(sample());
            slot[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&slot).is_err(), "bit {bit}");
        }
    }

    /// Fields with a right checksum and a wrong value: each is refused by its own name.
    #[test]
    fn each_bad_field_is_named() {
        let bad = |change: fn(&mut [u8; SLOT_BYTES])| {
            let mut slot = encoded(sample());
            change(&mut slot);
            let crc = crc32c(&slot[..CRC_AT]);
            slot[CRC_AT..SECTOR_END].copy_from_slice(&crc.to_le_bytes());
            Header::decode(&slot)
        };
        let named = |field, value| Err(HeaderError::Field { field, value });
        assert_eq!(Header::decode(&[0; SLOT_BYTES]), Err(HeaderError::Blank));
        assert_eq!(bad(|s| s[0] = 0), Err(HeaderError::Magic([0, b'H', b'N', b'V'])));
        assert_eq!(bad(|s| s[4] = 3), Err(HeaderError::Version(3)));
        assert_eq!(bad(|s| s[4] = 0), Err(HeaderError::Version(0)));
        assert_eq!(bad(|s| s[4] = 1), named("reserved", 1));
        assert_eq!(bad(|s| s[80] = 1), named("bytes behind durable", (64 << 20) + 1));
        assert_eq!(
            bad(|s| s[81..84].copy_from_slice(&[16, 0, 0])),
            named("bytes behind durable", 4096)
        );
        assert_eq!(bad(|s| s[87] = 1), named("bytes behind durable", (64 << 20) + (1 << 56)));
        assert_eq!(bad(|s| s[6] = 2), named("checksum algorithm", 2));
        assert_eq!(bad(|s| s[7] = 1), named("reserved", 1));
        assert_eq!(bad(|s| s[100] = 1), named("reserved", 1));
        assert_eq!(bad(|s| s[4000] = 1), named("reserved", 1));
        assert_eq!(bad(|s| s[40..48].fill(0)), named("capacity", 0));
        assert_eq!(bad(|s| s[40] = 1), named("capacity", (8 << 20) + 1));
        assert_eq!(bad(|s| s[47] = 1), named("capacity", (8 << 20) + (1 << 56)));
        assert_eq!(bad(|s| s[48..56].fill(0)), named("largest commit", 0));
        assert_eq!(bad(|s| s[51] = 1), named("largest commit", (4 << 20) + (1 << 24)));
        assert_eq!(bad(|s| s[56] = 1), named("released", 0x601));
        assert_eq!(bad(|s| s[64] = 1), named("durable", 0xa01));
        assert_eq!(bad(|s| s[65] = 4), named("durable", 0x400));
        assert_eq!(bad(|s| s[67] = 1), named("durable", 0xa00 + (1 << 24)));
        let far = |s: &mut [u8; SLOT_BYTES]| {
            s[57..64].fill(0xfe);
            s[65..72].fill(0xfe);
        };
        assert_eq!(bad(far), named("durable", 0xfefe_fefe_fefe_fe00));
        assert_eq!(bad(|s| s[72..80].fill(0)), named("generation", 0));
        assert_eq!(bad(|s| s[72..80].fill(0xff)), named("generation", u64::MAX));
    }

    #[test]
    fn ranges_wrap_at_the_end_of_the_area() {
        let capacity = ByteCount(4096);
        let ranges = |position, length| device_ranges(capacity, LogPosition(position), length);
        assert_eq!(ranges(0, 4096), [(8192, 4096), (8192, 0)]);
        assert_eq!(ranges(4096 * 3 + 512, 512), [(8704, 512), (8192, 0)]);
        assert_eq!(ranges(3584, 512), [(8192 + 3584, 512), (8192, 0)]);
        assert_eq!(ranges(3584, 1024), [(8192 + 3584, 512), (8192, 512)]);
        assert_eq!(ranges(512, 4096), [(8704, 3584), (8192, 512)]);
    }
}
