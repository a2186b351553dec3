//! The journal: what closes the write hole.
//!
//! A row whose data changes in part must never be found with new data and old parity when a device
//! is missing: what is recovered from it would be garbage, in blocks that nobody was writing. So
//! the new bytes of data and parity stand here, durably, on one device more than may fail, before
//! any of them is written in place. An open writes them all in place again.
//!
//! A stripe that is written whole is only named here before it is written: all of it was being
//! written, so that whatever a cut leaves of the data will do, if the parity is made to fit it.
//!
//! Each of the first `spare + 1` devices has an area with two header blocks, written in turn, and
//! records, one behind the other, each at a multiple of 4096 bytes. All have the same.
//!
//! | at | bytes | field of a header |
//! | --- | --- | --- |
//! | 0 | 8 | magic `MIRRRJNL` |
//! | 8 | 4 | format version, 1 |
//! | 12 | 4 | CRC-32C of the 64 bytes with this field zero |
//! | 16 | 16 | array id |
//! | 32 | 8 | life: a random number of each open; records of another one are void |
//! | 40 | 8 | counter: the header with the higher one holds |
//! | 48 | 8 | number of the first record that is not void |
//! | 56 | 8 | where that one begins, in bytes from the first record's place |
//!
//! | at | bytes | field of a record |
//! | --- | --- | --- |
//! | 0 | 8 | magic `MIRRRREC` |
//! | 8 | 4 | bytes of the record, a multiple of 4096 |
//! | 12 | 4 | CRC-32C of all of it with this field zero |
//! | 16 | 16 | array id |
//! | 32 | 8 | life |
//! | 40 | 8 | its number: one more than that of the one before |
//! | 48 | 4 | blocks |
//! | 52 | 4 | runs of stripes |
//! | 56 | 8 | reserved, zero |
//! | 64 | blocks x 16 | place on the array: byte on the device (8), place of the device (1; 255 for all), zero (7) |
//! | | runs x 16 | first stripe (8), stripes (8) |
//! | | | zeros to the next multiple of 4096, then the blocks |
//!
//! This file is formats and the arithmetic of the area; it does no I/O.

use std::collections::VecDeque;

use crate::limits::RAID_JOURNAL_BYTES;
use crate::units::convert::{low_u32, to_u64, to_usize, u32_to_usize};
use crate::units::hash::crc32c;
use crate::units::ids::ArrayId;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::layout::JOURNAL_START;

const HEADER_MAGIC: [u8; 8] = *b"MIRRRJNL";
const RECORD_MAGIC: [u8; 8] = *b"MIRRRREC";
/// The one format of the headers that this program writes and reads.
pub(super) const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
const RECORD_HEADER_BYTES: usize = 64;
const DESCRIPTOR_BYTES: usize = 16;
const CRC_AT: usize = 12;
/// Header blocks in front of the records.
pub(super) const HEADER_BLOCKS: u64 = 2;
/// Bytes for records.
pub(super) const AREA_BYTES: u64 = RAID_JOURNAL_BYTES - HEADER_BLOCKS * BLOCK_BYTES_U64;
/// First byte of the records on a device.
const AREA_START: u64 = JOURNAL_START + HEADER_BLOCKS * BLOCK_BYTES_U64;
/// A block that every device gets at the same offset.
const EVERYWHERE: u8 = 255;

/// Who gets a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// The device at that place.
    Place(usize),
    /// Each one.
    All,
}

/// One block to be written in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) target: Target,
    /// Byte on the device.
    pub(super) offset: u64,
    pub(super) block: Box<[u8; BLOCK_BYTES]>,
}

/// Stripes side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StripeRun {
    pub(super) first: u64,
    pub(super) count: u64,
}

/// What one record says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Record {
    pub(super) blocks: Vec<Placed>,
    pub(super) whole: Vec<StripeRun>,
}

/// The header of the area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) array: ArrayId,
    pub(super) life: u64,
    pub(super) counter: u64,
    pub(super) first: u64,
    pub(super) position: u64,
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn seal(bytes: &mut [u8]) {
    let crc = crc32c(bytes);
    bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
}

fn is_sealed(bytes: &[u8]) -> bool {
    let mut bare = bytes.to_vec();
    bare[CRC_AT..CRC_AT + 4].fill(0);
    crc32c(&bare) == half(bytes, CRC_AT)
}

impl Header {
    pub(super) fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut bytes = [0; BLOCK_BYTES];
        bytes[0..8].copy_from_slice(&HEADER_MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.array.0);
        for (at, value) in
            [(32, self.life), (40, self.counter), (48, self.first), (56, self.position)]
        {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        seal(&mut bytes[..HEADER_BYTES]);
        bytes
    }

    /// The header of that array, if it is one.
    pub(super) fn decode(bytes: &[u8; BLOCK_BYTES], wanted: ArrayId) -> Option<Self> {
        let mut array = ArrayId::ZERO;
        array.0.copy_from_slice(&bytes[16..32]);
        let header = Self {
            array,
            life: number(bytes, 32),
            counter: number(bytes, 40),
            first: number(bytes, 48),
            position: number(bytes, 56),
        };
        let sound = header.position < AREA_BYTES && header.position.is_multiple_of(BLOCK_BYTES_U64);
        (sound && array == wanted && header.encode()[..HEADER_BYTES] == bytes[..HEADER_BYTES])
            .then_some(header)
    }

    /// The version, if this is the header of that array in another one. Of every version the first 32
    /// bytes and what the checksum covers are as they are here.
    pub(super) fn other_version(bytes: &[u8; BLOCK_BYTES], wanted: ArrayId) -> Option<u32> {
        let ours = bytes[0..8] == HEADER_MAGIC && bytes[16..32] == wanted.0;
        let version = half(bytes, 8);
        (ours && version != VERSION && is_sealed(&bytes[..HEADER_BYTES])).then_some(version)
    }

    /// Where it stands on a device.
    pub(super) fn offset(&self) -> u64 {
        header_offset(self.counter)
    }
}

/// Where the headers of that counter stand on a device.
pub(super) fn header_offset(counter: u64) -> u64 {
    JOURNAL_START + counter % HEADER_BLOCKS * BLOCK_BYTES_U64
}

/// Where a record stands on a device.
pub(super) const fn record_offset(position: u64) -> u64 {
    AREA_START + position
}

impl Record {
    /// Bytes of a record with so many blocks and runs.
    fn bytes_of(blocks: usize, runs: usize) -> usize {
        let head = RECORD_HEADER_BYTES + (blocks + runs) * DESCRIPTOR_BYTES;
        head.next_multiple_of(BLOCK_BYTES) + blocks * BLOCK_BYTES
    }

    pub(super) fn encode(&self, array: ArrayId, life: u64, seq: u64) -> Vec<u8> {
        let length = Self::bytes_of(self.blocks.len(), self.whole.len());
        let mut bytes = Vec::with_capacity(length);
        bytes.extend(RECORD_MAGIC);
        bytes.extend(low_u32(to_u64(length)).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(array.0);
        bytes.extend(life.to_le_bytes());
        bytes.extend(seq.to_le_bytes());
        bytes.extend(low_u32(to_u64(self.blocks.len())).to_le_bytes());
        bytes.extend(low_u32(to_u64(self.whole.len())).to_le_bytes());
        bytes.extend([0; 8]);
        for Placed { target, offset, .. } in &self.blocks {
            bytes.extend(offset.to_le_bytes());
            bytes.push(match target {
                Target::All => EVERYWHERE,
                Target::Place(place) => crate::units::convert::low_u8(to_u64(*place)),
            });
            bytes.extend([0; 7]);
        }
        for run in &self.whole {
            bytes.extend(run.first.to_le_bytes());
            bytes.extend(run.count.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        self.blocks.iter().for_each(|placed| bytes.extend(*placed.block));
        assert_eq!(bytes.len(), length, "a record has the length it says");
        seal(&mut bytes);
        bytes
    }

    /// Bytes of the record that begins with `block`, if one does that can stand at `position`.
    pub(super) fn length(block: &[u8; BLOCK_BYTES], position: u64) -> Option<usize> {
        let length = u64::from(half(block, 8));
        let fits = position.checked_add(length).is_some_and(|end| end <= AREA_BYTES);
        let sound = block[0..8] == RECORD_MAGIC && length.is_multiple_of(BLOCK_BYTES_U64);
        (fits && sound && length > 0).then(|| to_usize(length))
    }

    /// The record, if it is that of this array, life and number.
    pub(super) fn decode(bytes: &[u8], array: ArrayId, life: u64, seq: u64) -> Option<Self> {
        let named = bytes[16..32] == array.0 && number(bytes, 32) == life;
        if !named || number(bytes, 40) != seq || !is_sealed(bytes) {
            return None;
        }
        let (blocks, runs) = (u32_to_usize(half(bytes, 48)), u32_to_usize(half(bytes, 52)));
        // Sealed, so that the numbers are ours; a multiplication cannot overflow.
        if Self::bytes_of(blocks, runs) != bytes.len() {
            return None;
        }
        let descriptors = RECORD_HEADER_BYTES + blocks * DESCRIPTOR_BYTES;
        let runs_end = descriptors + runs * DESCRIPTOR_BYTES;
        let (images, _) = bytes[bytes.len() - blocks * BLOCK_BYTES..].as_chunks::<BLOCK_BYTES>();
        let placed = bytes[RECORD_HEADER_BYTES..descriptors].chunks_exact(DESCRIPTOR_BYTES);
        let blocks = placed.zip(images).map(|(descriptor, image)| Placed {
            target: match descriptor[8] {
                EVERYWHERE => Target::All,
                place => Target::Place(usize::from(place)),
            },
            offset: number(descriptor, 0),
            block: Box::new(*image),
        });
        let whole = bytes[descriptors..runs_end]
            .chunks_exact(DESCRIPTOR_BYTES)
            .map(|run| StripeRun { first: number(run, 0), count: number(run, 8) });
        Some(Self { blocks: blocks.collect(), whole: whole.collect() })
    }
}

/// Which records are live, and where the next one goes.
#[derive(Debug)]
pub(super) struct Area {
    pub(super) life: u64,
    pub(super) counter: u64,
    next: u64,
    position: u64,
    /// Number, where it begins, its bytes.
    live: VecDeque<(u64, u64, u64)>,
}

impl Area {
    /// Empty; the header with this counter says so on each device.
    pub(super) fn new(life: u64, counter: u64) -> Self {
        Self { life, counter, next: 1, position: 0, live: VecDeque::new() }
    }

    /// Number of the record that comes next.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// Whether a record before that number is live.
    pub(super) fn has_before(&self, number: u64) -> bool {
        self.live.front().is_some_and(|(first, ..)| *first < number)
    }

    /// Takes room for a record; `None` if something must be voided before.
    pub(super) fn take(&mut self, length: u64) -> Option<(u64, u64)> {
        assert!(length <= AREA_BYTES / 2, "two records fit the journal");
        let position = match self.live.front() {
            None => 0,
            Some((_, tail, _)) if *tail < self.position => {
                if self.position + length <= AREA_BYTES {
                    self.position
                } else if length < *tail {
                    0
                } else {
                    return None;
                }
            }
            // It has wrapped: room up to the oldest, which must not be reached.
            Some((_, tail, _)) => {
                if self.position + length >= *tail {
                    return None;
                }
                self.position
            }
        };
        let seq = self.next;
        self.live.push_back((seq, position, length));
        self.next += 1;
        self.position = position + length;
        Some((seq, position))
    }

    /// Forgets the records before that number, and says where the first live one is.
    pub(super) fn void(&mut self, upto: u64) -> (u64, u64) {
        while self.live.front().is_some_and(|(seq, ..)| *seq < upto) {
            self.live.pop_front();
        }
        self.counter += 1;
        match self.live.front() {
            Some((seq, position, _)) => (*seq, *position),
            None => (self.next, 0),
        }
    }
}

/// The places at which a scan looks for the record behind one that ends at `end`: there, or at the
/// front if it did not fit.
pub(super) fn successors(end: u64) -> impl Iterator<Item = u64> {
    [end, 0].into_iter().filter(|&at| at + BLOCK_BYTES_U64 <= AREA_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARRAY: ArrayId = ArrayId([7; 16]);

    fn record() -> Record {
        let block = |n| Box::new([n; BLOCK_BYTES]);
        Record {
            blocks: vec![
                Placed { target: Target::Place(2), offset: 0x3000, block: block(1) },
                Placed { target: Target::All, offset: 0x5000, block: block(2) },
            ],
            whole: vec![StripeRun { first: 5, count: 6 }],
        }
    }

    #[test]
    fn golden_bytes() {
        let bytes = record().encode(ARRAY, 0x0101, 3);
        assert_eq!(bytes.len(), 3 * BLOCK_BYTES);
        assert_eq!(bytes[..12], *b"MIRRRREC\0\x30\0\0");
        assert_eq!(bytes[16..32], [7; 16]);
        assert_eq!(bytes[32..48], [1, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[48..64], [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[64..80], [0, 0x30, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[88], 255);
        assert_eq!(bytes[96..112], [5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((bytes[4096], bytes[8192]), (1, 2));
        assert_eq!(Record::decode(&bytes, ARRAY, 0x0101, 3), Some(record()));
        let header = Header { array: ARRAY, life: 1, counter: 2, first: 3, position: 0x4000 };
        let bytes = header.encode();
        assert_eq!(bytes[..12], *b"MIRRRJNL\x01\0\0\0");
        assert_eq!(bytes[32..48], [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[48..64], [3, 0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Header::decode(&bytes, ARRAY), Some(header));
    }

    /// Every flipped bit and every other name is refused.
    #[test]
    fn what_is_not_ours_is_no_record() {
        let good = record().encode(ARRAY, 1, 3);
        assert_eq!(Record::decode(&good, ArrayId([8; 16]), 1, 3), None);
        assert_eq!(Record::decode(&good, ARRAY, 2, 3), None);
        assert_eq!(Record::decode(&good, ARRAY, 1, 4), None);
        for at in (0..good.len()).step_by(97).chain(0..128) {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            let first = bytes.first_chunk().unwrap();
            let length = Record::length(first, 0);
            let decoded = length.filter(|length| *length == bytes.len());
            assert_eq!(decoded.and_then(|_| Record::decode(&bytes, ARRAY, 1, 3)), None, "{at}");
        }
        let first = good.first_chunk().unwrap();
        assert_eq!(Record::length(first, AREA_BYTES - 2 * BLOCK_BYTES_U64), None, "past the end");
        let header = Header { array: ARRAY, life: 1, counter: 2, first: 3, position: 0x4000 };
        for at in 0..HEADER_BYTES {
            let mut bytes = header.encode();
            bytes[at] ^= 1;
            assert_eq!(Header::decode(&bytes, ARRAY), None, "{at}");
            assert_eq!(Header::other_version(&bytes, ARRAY), None, "{at}: rot is no version");
        }
        let mut newer = header.encode();
        newer[8] = 2;
        newer[CRC_AT..CRC_AT + 4].fill(0);
        seal(&mut newer[..HEADER_BYTES]);
        assert_eq!(Header::decode(&newer, ARRAY), None);
        assert_eq!(Header::other_version(&newer, ARRAY), Some(2));
        assert_eq!(Header::other_version(&newer, ArrayId([8; 16])), None, "of another array");
    }

    /// Goal: no live record is ever overwritten, and a scan from the header finds all of them.
    #[test]
    fn the_area_goes_round_and_spares_what_is_live() {
        let mut chance = crate::device::sim::Chance::new(3);
        let mut area = Area::new(1, 0);
        let mut live: VecDeque<(u64, u64, u64)> = VecDeque::new();
        let (mut taken, mut refused) = (0, 0);
        for _ in 0..20_000 {
            let length = (1 + chance.below(30)) * BLOCK_BYTES_U64;
            if let Some((seq, position)) = area.take(length) {
                taken += 1;
                assert!(position + length <= AREA_BYTES);
                for (_, at, other) in &live {
                    assert!(position + length <= *at || at + other <= position);
                }
                if let Some((_, at, other)) = live.back() {
                    assert!(successors(at + other).any(|at| at == position));
                }
                live.push_back((seq, position, length));
            } else {
                refused += 1;
                let upto = live.front().map_or(area.next(), |(seq, ..)| seq + chance.below(40));
                let (first, position) = area.void(upto);
                live.retain(|(seq, ..)| *seq >= upto);
                if let Some((seq, at, _)) = live.front() {
                    assert_eq!((first, position), (*seq, *at));
                }
            }
        }
        assert!(taken > 1000 && refused > 100, "{taken} {refused}");
    }
}
