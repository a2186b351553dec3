//! One entry: a client write, trim or write-zeroes as it was ordered.
//!
//! Layout in a transfer's entry table, little-endian, 24 bytes:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 8 | byte offset in the volume |
//! | 8 | 4 | length in bytes |
//! | 12 | 4 | CRC-32C of the data; 0 for trim and zeroes |
//! | 16 | 4 | volume number |
//! | 20 | 1 | kind: 1 write, 2 trim, 3 zeroes |
//! | 21 | 3 | reserved, zero |
//!
//! The sequence number is not stored: entry `i` of a transfer has the transfer's first plus `i`.

use crate::limits::ENTRY_DATA_BYTES_MAX;
use crate::units::BLOCK_BYTES_U64;
use crate::units::hash::StreamHash;
use crate::units::numbers::{SequenceNumber, VolumeNumber};

/// Bytes of an entry in the table.
pub const ENTRY_BYTES: usize = 24;

/// What an entry does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// Carries data.
    Write,
    /// Makes whole blocks holes.
    Trim,
    /// Makes every byte of the range zero.
    Zeroes,
}

/// Why 24 bytes are no entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Not 1, 2 or 3.
    #[error("entry kind {0} is unknown")]
    Kind(u8),
    /// Reserved bytes are set.
    #[error("reserved bytes of an entry are not zero")]
    Reserved,
    /// Empty, over the bound for data, or past the end of 64 bits.
    #[error("entry of {length} bytes at {offset} is out of bounds")]
    Bounds { offset: u64, length: u32 },
    /// A trim that does not cover whole blocks.
    #[error("trim of {length} bytes at {offset} is not made of whole blocks")]
    TrimEdges { offset: u64, length: u32 },
}

/// One client write, trim or write-zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What it does.
    pub kind: EntryKind,
    /// To which volume of the source.
    pub volume: VolumeNumber,
    /// First byte in the volume.
    pub offset: u64,
    /// Bytes it covers.
    pub length: u32,
    /// CRC-32C of the data, 0 without data.
    pub crc: u32,
}

impl Entry {
    /// Bytes of payload the entry carries.
    pub const fn data_bytes(&self) -> u32 {
        match self.kind {
            EntryKind::Write => self.length,
            EntryKind::Trim | EntryKind::Zeroes => 0,
        }
    }

    /// First byte behind it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.length))
    }

    /// The blocks the entry covers whole, as first block and count.
    pub fn whole_blocks(&self) -> (u64, u64) {
        let first = self.offset.div_ceil(BLOCK_BYTES_U64);
        let end = self.end() / BLOCK_BYTES_U64;
        (first, end.saturating_sub(first))
    }

    /// How many blocks with data it writes whole: what it adds to the ordinal of references (R15).
    pub fn ordinals(&self) -> u64 {
        match self.kind {
            EntryKind::Write => self.whole_blocks().1,
            EntryKind::Trim | EntryKind::Zeroes => 0,
        }
    }

    /// The 24 bytes of the table.
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[0..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.crc.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.volume.0.to_le_bytes());
        bytes[20] = match self.kind {
            EntryKind::Write => 1,
            EntryKind::Trim => 2,
            EntryKind::Zeroes => 3,
        };
        bytes
    }

    /// Reads and checks the 24 bytes of the table.
    pub fn decode(bytes: &[u8; ENTRY_BYTES]) -> Result<Self, EntryError> {
        let [offset @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = *bytes;
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let kind = match bytes[20] {
            1 => EntryKind::Write,
            2 => EntryKind::Trim,
            3 => EntryKind::Zeroes,
            other => return Err(EntryError::Kind(other)),
        };
        let entry = Self {
            kind,
            volume: VolumeNumber(word(16)),
            offset: u64::from_le_bytes(offset),
            length: word(8),
            crc: word(12),
        };
        if bytes[21..] != [0; 3] {
            return Err(EntryError::Reserved);
        }
        entry.check()?;
        Ok(entry)
    }

    /// The bounds that hold for every entry, in memory and at rest.
    pub fn check(&self) -> Result<(), EntryError> {
        let Self { offset, length, .. } = *self;
        let long = match self.kind {
            EntryKind::Write => u64::from(length) > ENTRY_DATA_BYTES_MAX,
            EntryKind::Trim | EntryKind::Zeroes => false,
        };
        if length == 0 || long || offset.checked_add(u64::from(length)).is_none() {
            return Err(EntryError::Bounds { offset, length });
        }
        let aligned = |value: u64| value.is_multiple_of(BLOCK_BYTES_U64);
        if self.kind == EntryKind::Trim && !(aligned(offset) && aligned(u64::from(length))) {
            return Err(EntryError::TrimEdges { offset, length });
        }
        Ok(())
    }
}

/// h(n) = first 16 bytes of BLAKE3(h(n-1) || sequence number, u64 little endian || entry n).
pub fn extend_stream_hash(
    previous: StreamHash,
    sequence: SequenceNumber,
    entry: &[u8; ENTRY_BYTES],
) -> StreamHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&previous.0);
    hasher.update(&sequence.0.to_le_bytes());
    hasher.update(entry);
    let mut hash = [0; 16];
    hash.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    StreamHash(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: EntryKind, offset: u64, length: u32) -> Entry {
        Entry { kind, volume: VolumeNumber(3), offset, length, crc: 9 }
    }

    #[test]
    fn golden_bytes() {
        let bytes = entry(EntryKind::Write, 0x0102, 0x1000).encode();
        let expected = [2, 1, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 9, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0];
        assert_eq!(bytes, expected);
        assert_eq!(Entry::decode(&bytes).unwrap(), entry(EntryKind::Write, 0x0102, 0x1000));
    }

    #[test]
    fn each_bad_field_is_named() {
        let mut bytes = entry(EntryKind::Trim, 4096, 4096).encode();
        bytes[20] = 4;
        assert_eq!(Entry::decode(&bytes), Err(EntryError::Kind(4)));
        bytes[20] = 2;
        bytes[23] = 1;
        assert_eq!(Entry::decode(&bytes), Err(EntryError::Reserved));
        for (kind, offset, length) in [
            (EntryKind::Write, 0, 0),
            (EntryKind::Write, 0, 256 * 1024 + 1),
            (EntryKind::Zeroes, u64::MAX, 1),
        ] {
            let bytes = entry(kind, offset, length).encode();
            assert_eq!(Entry::decode(&bytes), Err(EntryError::Bounds { offset, length }));
        }
        let bytes = entry(EntryKind::Trim, 1, 4096).encode();
        assert_eq!(Entry::decode(&bytes), Err(EntryError::TrimEdges { offset: 1, length: 4096 }));
    }

    #[test]
    fn whole_blocks_leave_the_edges_out() {
        assert_eq!(entry(EntryKind::Write, 1, 4095).whole_blocks(), (1, 0));
        assert_eq!(entry(EntryKind::Write, 0, 4096).whole_blocks(), (0, 1));
        assert_eq!(entry(EntryKind::Write, 1, 8192).whole_blocks(), (1, 1));
        assert_eq!(entry(EntryKind::Write, 10, 5).whole_blocks(), (1, 0));
        assert_eq!(entry(EntryKind::Zeroes, 0, 8192).ordinals(), 0);
    }

    #[test]
    fn the_stream_hash_depends_on_place_and_content() {
        let a = entry(EntryKind::Write, 0, 4096).encode();
        let b = entry(EntryKind::Write, 4096, 4096).encode();
        let h = |previous, n, entry| extend_stream_hash(previous, SequenceNumber(n), entry);
        let zero = StreamHash::ZERO;
        assert_ne!(h(zero, 1, &a), h(zero, 2, &a));
        assert_ne!(h(zero, 1, &a), h(zero, 1, &b));
        assert_ne!(h(h(zero, 1, &a), 2, &b), h(h(zero, 1, &b), 2, &a));
    }
}
