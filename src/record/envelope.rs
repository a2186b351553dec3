//! The envelope: what a ring or a source log writes around a body for itself.
//!
//! A body (a transfer, or a mark) is the same bytes everywhere; the envelope says in which ring
//! it lies, at which position, and how far that ring was durable when the record was written. The
//! position never restarts, so a record of an older lap cannot pass for a new one; the durable
//! cursor is what tells rot from a torn tail (R3).
//!
//! Layout, little-endian, 128 bytes, then the body, then zeros up to the record's length:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 4 | magic `MHRE` |
//! | 4 | 2 | format version: 1 |
//! | 6 | 1 | checksum algorithm: 1 = CRC-32C |
//! | 7 | 1 | kind: 1 transfer, 2 freeze, 3 cut, 4 fence |
//! | 8 | 16 | id of the ring or log |
//! | 24 | 8 | position of the record's first byte |
//! | 32 | 8 | durable cursor of the ring when this was written |
//! | 40 | 16 | source id |
//! | 56 | 4 | epoch number |
//! | 60 | 8 | epoch id |
//! | 68 | 4 | bytes of the body |
//! | 72 | 4 | bytes of the record: envelope, body, padding |
//! | 76 | 4 | CRC-32C of the body |
//! | 80 | 44 | reserved, zero |
//! | 124 | 4 | CRC-32C of bytes 0..124 |

use crate::limits::{RECORD_ALIGN_BYTES, RECORD_BYTES_MAX};
use crate::units::bytes::{long, sixteen, word};
use crate::units::convert::to_u64;
use crate::units::hash::crc32c;
use crate::units::ids::{RingId, SourceId};
use crate::units::machine;
use crate::units::numbers::{Epoch, LogPosition};

/// Bytes of an envelope.
pub const ENVELOPE_BYTES: usize = 128;
/// Format version written and read.
pub const ENVELOPE_VERSION: u16 = 1;
const MAGIC: [u8; 4] = *b"MHRE";
const ALGORITHM_CRC32C: u8 = 1;
const CRC_AT: usize = 124;

const _: () = assert!(CRC_AT + 4 == ENVELOPE_BYTES);

/// What a record's body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RecordKind {
    /// A [`super::transfer::Transfer`].
    Transfer,
    /// A [`super::marks::Freeze`]: the source cut a CP here.
    Freeze,
    /// A [`super::marks::Cut`]: the hub dropped a tail here (R1).
    Cut,
    /// A [`super::marks::Fence`]: the epoch was raised here (R2).
    Fence,
}

/// Why 128 bytes are no envelope of this ring at this position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Never written, or something else.
    #[error("no record begins here")]
    Magic,
    /// Written by a later program.
    #[error("record format version {0}, this program reads version 1")]
    Version(u16),
    /// Damaged.
    #[error("checksum of the record's envelope is {met:08x}, stored is {stored:08x}")]
    Checksum { stored: u32, met: u32 },
    /// A field out of its bounds.
    #[error("envelope field {field} is {value}")]
    Field { field: &'static str, value: u64 },
    /// Another ring's record.
    #[error("record belongs to ring {met}, this is ring {wanted}")]
    Ring { wanted: RingId, met: RingId },
    /// A record of an older lap, or a misdirected write.
    #[error("record says position {met}, it lies at {wanted}")]
    Position { wanted: LogPosition, met: LogPosition },
    /// Body damaged.
    #[error("checksum of the record's body is {met:08x}, stored is {stored:08x}")]
    Body { stored: u32, met: u32 },
}

/// A ring's own header of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope {
    /// What the body is.
    pub kind: RecordKind,
    /// The ring or log it was written by.
    pub ring: RingId,
    /// Where it begins.
    pub position: LogPosition,
    /// How far the ring was durable when it was written.
    pub durable: LogPosition,
    /// Whose it is.
    pub source: SourceId,
    /// The epoch it was taken in.
    pub epoch: Epoch,
    /// Bytes of the body.
    pub body_bytes: u32,
    /// Bytes of the whole record.
    pub record_bytes: u32,
    /// CRC-32C of the body.
    pub body_crc: u32,
}

/// Bytes of a record with a body of that length: a multiple of [`RECORD_ALIGN_BYTES`].
pub fn record_bytes(body_bytes: u64) -> u64 {
    (to_u64(ENVELOPE_BYTES) + body_bytes).next_multiple_of(RECORD_ALIGN_BYTES)
}

impl Envelope {
    /// The 128 bytes.
    pub fn encode(&self) -> [u8; ENVELOPE_BYTES] {
        let mut out = [0; ENVELOPE_BYTES];
        out[0..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&ENVELOPE_VERSION.to_le_bytes());
        out[6] = ALGORITHM_CRC32C;
        out[7] = match self.kind {
            RecordKind::Transfer => 1,
            RecordKind::Freeze => 2,
            RecordKind::Cut => 3,
            RecordKind::Fence => 4,
        };
        out[8..24].copy_from_slice(&self.ring.0);
        out[24..32].copy_from_slice(&self.position.0.to_le_bytes());
        out[32..40].copy_from_slice(&self.durable.0.to_le_bytes());
        out[40..56].copy_from_slice(&self.source.0);
        out[56..60].copy_from_slice(&self.epoch.number.to_le_bytes());
        out[60..68].copy_from_slice(&self.epoch.id.to_le_bytes());
        out[68..72].copy_from_slice(&self.body_bytes.to_le_bytes());
        out[72..76].copy_from_slice(&self.record_bytes.to_le_bytes());
        out[76..80].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32c(&out[..CRC_AT]);
        out[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads 128 bytes and checks everything that does not depend on the place they were found.
    pub fn decode(bytes: &[u8; ENVELOPE_BYTES]) -> Result<Self, EnvelopeError> {
        if bytes[0..4] != MAGIC {
            return Err(EnvelopeError::Magic);
        }
        let (stored, met) = (word(bytes, CRC_AT), crc32c(&bytes[..CRC_AT]));
        if stored != met {
            return Err(EnvelopeError::Checksum { stored, met });
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != ENVELOPE_VERSION {
            return Err(EnvelopeError::Version(version));
        }
        let kind = match bytes[7] {
            1 => RecordKind::Transfer,
            2 => RecordKind::Freeze,
            3 => RecordKind::Cut,
            4 => RecordKind::Fence,
            other => return Err(field("kind", u64::from(other))),
        };
        if bytes[6] != ALGORITHM_CRC32C {
            return Err(field("checksum algorithm", u64::from(bytes[6])));
        }
        if bytes[80..CRC_AT] != [0; CRC_AT - 80] {
            return Err(field("reserved", 1));
        }
        let envelope = Self {
            kind,
            ring: RingId(sixteen(bytes, 8)),
            position: LogPosition(long(bytes, 24)),
            durable: LogPosition(long(bytes, 32)),
            source: SourceId(sixteen(bytes, 40)),
            epoch: Epoch { number: word(bytes, 56), id: long(bytes, 60) },
            body_bytes: word(bytes, 68),
            record_bytes: word(bytes, 72),
            body_crc: word(bytes, 76),
        };
        envelope.check_lengths()?;
        Ok(envelope)
    }

    /// Like [`Envelope::decode`], and it must be a record of `ring` at `position`.
    pub fn decode_at(
        bytes: &[u8; ENVELOPE_BYTES],
        ring: RingId,
        position: LogPosition,
    ) -> Result<Self, EnvelopeError> {
        let envelope = Self::decode(bytes)?;
        if envelope.ring != ring {
            return Err(EnvelopeError::Ring { wanted: ring, met: envelope.ring });
        }
        if envelope.position != position && !machine::breaks(3) {
            return Err(EnvelopeError::Position { wanted: position, met: envelope.position });
        }
        Ok(envelope)
    }

    /// Checks the body that was found behind the envelope.
    pub fn check_body(&self, body: &[u8]) -> Result<(), EnvelopeError> {
        let met = crc32c(body);
        if to_u64(body.len()) != u64::from(self.body_bytes) || met != self.body_crc {
            return Err(EnvelopeError::Body { stored: self.body_crc, met });
        }
        Ok(())
    }

    fn check_lengths(&self) -> Result<(), EnvelopeError> {
        let wanted = record_bytes(u64::from(self.body_bytes));
        if self.body_bytes == 0 || wanted > RECORD_BYTES_MAX {
            return Err(field("body bytes", u64::from(self.body_bytes)));
        }
        if wanted != u64::from(self.record_bytes) {
            return Err(field("record bytes", u64::from(self.record_bytes)));
        }
        if !self.position.0.is_multiple_of(RECORD_ALIGN_BYTES) || self.durable > self.position {
            return Err(field("position", self.position.0));
        }
        Ok(())
    }
}

fn field(field: &'static str, value: u64) -> EnvelopeError {
    EnvelopeError::Field { field, value }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Envelope {
        Envelope {
            kind: RecordKind::Freeze,
            ring: RingId([1; 16]),
            position: LogPosition(1024),
            durable: LogPosition(512),
            source: SourceId([2; 16]),
            epoch: Epoch { number: 3, id: 4 },
            body_bytes: 5,
            record_bytes: 512,
            body_crc: crc32c(b"hello"),
        }
    }

    #[test]
    fn golden_bytes() {
        let bytes = sample().encode();
        assert_eq!(&bytes[..8], b"MHRE\x01\0\x01\x02");
        assert_eq!(&bytes[24..40], &[0, 4, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&bytes[56..76], &[3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!(Envelope::decode(&bytes), Ok(sample()));
        assert_eq!(sample().check_body(b"hello"), Ok(()));
        assert!(sample().check_body(b"hellp").is_err());
        assert!(sample().check_body(b"hell").is_err());
    }

    #[test]
    fn every_flipped_bit_is_found() {
        for bit in 0..ENVELOPE_BYTES * 8 {
            let mut bytes = sample().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Envelope::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    fn resealed(change: impl FnOnce(&mut [u8; ENVELOPE_BYTES])) -> [u8; ENVELOPE_BYTES] {
        let mut bytes = sample().encode();
        change(&mut bytes);
        let crc = crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Fields with a right checksum and a wrong value: each is refused by its own name.
    #[test]
    fn each_bad_field_is_named() {
        let bad = |change: fn(&mut [u8; ENVELOPE_BYTES])| Envelope::decode(&resealed(change));
        assert_eq!(bad(|b| b[4] = 2), Err(EnvelopeError::Version(2)));
        assert_eq!(bad(|b| b[6] = 9), Err(field("checksum algorithm", 9)));
        assert_eq!(bad(|b| b[7] = 0), Err(field("kind", 0)));
        assert_eq!(bad(|b| b[90] = 1), Err(field("reserved", 1)));
        assert_eq!(bad(|b| b[68] = 0), Err(field("body bytes", 0)));
        assert_eq!(bad(|b| b[71] = 0xff), Err(field("body bytes", 0xff00_0005)));
        assert_eq!(bad(|b| b[73] = 4), Err(field("record bytes", 1024)));
        assert_eq!(bad(|b| b[24] = 1), Err(field("position", 1025)));
        assert_eq!(bad(|b| b[33] = 8), Err(field("position", 1024)));
    }

    #[test]
    fn another_ring_and_an_older_lap_are_refused() {
        let bytes = sample().encode();
        let at = |ring, position| Envelope::decode_at(&bytes, RingId([ring; 16]), position);
        assert!(at(1, LogPosition(1024)).is_ok());
        assert!(matches!(at(9, LogPosition(1024)), Err(EnvelopeError::Ring { .. })));
        assert!(matches!(at(1, LogPosition(2048)), Err(EnvelopeError::Position { .. })));
    }

    #[test]
    fn records_are_padded_to_sectors() {
        assert_eq!(record_bytes(1), 512);
        assert_eq!(record_bytes(384), 512);
        assert_eq!(record_bytes(385), 1024);
        assert_eq!(record_bytes(80 + 24 + 4096), 4608);
    }
}
