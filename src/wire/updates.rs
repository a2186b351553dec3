//! Updates: the run-length coded list of a CP's changed blocks of one volume.
//!
//! The source says for each changed block where the hub already has it, or sends it, or says that
//! it is a hole. A payload is a sequence of runs with rising VBNs; each stands for itself, so a
//! payload can be read without the one before it. Numbers are LEB128 varints (7 bits a byte, low
//! first); signed ones are zigzag coded. A run:
//!
//! | part | meaning |
//! | --- | --- |
//! | byte | bits 0-1 kind; bits 2-7 count 1 to 63, or 0: a varint count follows |
//! | varint | count, if it was 0 |
//! | varint | gap: blocks between the end of the run before and this one's first VBN |
//! | kind 0 | reference: zigzag (counter minus counter of the reference before), varint ordinal |
//! | kind 1 | inline: per block CRC-32C (4 bytes, little-endian) and 4096 bytes |
//! | kind 2 | hole: nothing more |
//! | kind 3 | reference: varint generation, varint counter, varint ordinal |
//!
//! A reference run names the block at `ordinal` of transfer (generation, counter) for its first
//! VBN; the following blocks are the following ordinals, into the next transfers of the same CP
//! (R15). The first reference of a payload has kind 3. A random whole block costs about 7 bytes, a
//! sequential megabyte about 10.

use crate::units::convert::{low_u8, to_u64, to_usize};
use crate::units::hash::crc32c;
use crate::units::numbers::{TransferId, Vbn};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

const KIND_NEAR: u8 = 0;
const KIND_INLINE: u8 = 1;
const KIND_HOLE: u8 = 2;
const KIND_FAR: u8 = 3;
/// Bytes of one inline block with its checksum.
pub const INLINE_BLOCK_BYTES: u64 = BLOCK_BYTES_U64 + 4;
/// The longest run header: kind, count, gap, generation, counter, ordinal.
const RUN_HEADER_BYTES_MAX: usize = 1 + 10 * 5;

/// Some changed blocks in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run<'a> {
    /// The hub has them in its log.
    Reference { vbn: Vbn, count: u64, transfer: TransferId, ordinal: u64 },
    /// They travel here: `count` times 4 bytes of checksum and 4096 bytes of data.
    Inline { vbn: Vbn, count: u64, blocks: &'a [u8] },
    /// They are zero.
    Hole { vbn: Vbn, count: u64 },
}

/// Why a payload is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpdatesError {
    /// Ends inside a run.
    #[error("updates end inside the run at byte {0}")]
    Short(u64),
    /// A number of more than 64 bits.
    #[error("number over 64 bits in the run at byte {0}")]
    Number(u64),
    /// A run of no blocks.
    #[error("empty run at byte {0}")]
    Empty(u64),
    /// Past the end of the volume.
    #[error("run of {count} blocks at block {vbn} lies past the volume's {blocks} blocks")]
    OutOfRange { vbn: u64, count: u64, blocks: u64 },
    /// The first reference leans on one before it.
    #[error("reference at byte {0} without a transfer")]
    NoTransfer(u64),
    /// An inline block is damaged.
    #[error("inline block {vbn} has checksum {met:08x}, stored is {stored:08x}")]
    Checksum { vbn: u64, stored: u32, met: u32 },
}

/// Packs runs into one payload of bounded size.
#[derive(Debug)]
pub struct Encoder {
    bytes: Vec<u8>,
    limit: usize,
    next: u64,
    near: Option<TransferId>,
}

impl Encoder {
    /// An empty payload that will not exceed `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self { bytes: Vec::new(), limit: to_usize(limit), next: 0, near: None }
    }

    /// Whether nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes so far.
    pub fn bytes_len(&self) -> u64 {
        to_u64(self.bytes.len())
    }

    /// How many inline blocks still fit in a run of their own.
    pub fn inline_room(&self) -> u64 {
        let room = self.limit.saturating_sub(self.bytes.len() + RUN_HEADER_BYTES_MAX);
        to_u64(room) / INLINE_BLOCK_BYTES
    }

    /// Whether a reference or a hole still fits.
    pub fn has_room(&self) -> bool {
        self.bytes.len() + RUN_HEADER_BYTES_MAX <= self.limit
    }

    /// Appends blocks that the hub has in its log.
    pub fn reference(&mut self, vbn: Vbn, count: u64, transfer: TransferId, ordinal: u64) {
        let near = self.near.filter(|near| near.generation == transfer.generation);
        self.run(if near.is_some() { KIND_NEAR } else { KIND_FAR }, vbn, count);
        if let Some(near) = near {
            // Both counters lie below 2^63: a source would need centuries to get there.
            let delta = transfer.counter.wrapping_sub(near.counter).cast_signed();
            self.varint(((delta << 1) ^ (delta >> 63)).cast_unsigned());
        } else {
            self.varint(u64::from(transfer.generation));
            self.varint(transfer.counter);
        }
        self.varint(ordinal);
        self.near = Some(transfer);
    }

    /// Appends blocks that become holes.
    pub fn hole(&mut self, vbn: Vbn, count: u64) {
        self.run(KIND_HOLE, vbn, count);
    }

    /// Appends blocks with their data.
    pub fn inline<'b>(
        &mut self,
        vbn: Vbn,
        blocks: impl ExactSizeIterator<Item = &'b [u8; BLOCK_BYTES]>,
    ) {
        self.run(KIND_INLINE, vbn, to_u64(blocks.len()));
        for block in blocks {
            self.bytes.extend_from_slice(&crc32c(block).to_le_bytes());
            self.bytes.extend_from_slice(block);
        }
    }

    /// The payload.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }

    fn run(&mut self, kind: u8, vbn: Vbn, count: u64) {
        assert!(count > 0, "empty run at block {vbn}");
        assert!(vbn.0 >= self.next, "run at block {vbn} behind {}", self.next);
        assert!(self.has_room(), "run pushed into a full payload");
        if count < 64 {
            self.bytes.push(kind | low_u8(count) << 2);
        } else {
            self.bytes.push(kind);
            self.varint(count);
        }
        self.varint(vbn.0 - self.next);
        self.next = vbn.0 + count;
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(low_u8(value) | 0x80);
            value >>= 7;
        }
        self.bytes.push(low_u8(value));
    }
}

/// Reads the runs of one payload.
#[derive(Debug)]
pub struct Decoder<'a> {
    bytes: &'a [u8],
    at: usize,
    blocks: u64,
    next: u64,
    near: Option<TransferId>,
    failed: bool,
}

impl<'a> Decoder<'a> {
    /// Reads `bytes` for a volume of `blocks` blocks.
    pub fn new(bytes: &'a [u8], blocks: u64) -> Self {
        Self { bytes, at: 0, blocks, next: 0, near: None, failed: false }
    }

    /// Bytes read so far: the end of the run that came last.
    pub fn position(&self) -> u64 {
        to_u64(self.at)
    }

    fn run(&mut self) -> Result<Run<'a>, UpdatesError> {
        let start = to_u64(self.at);
        let head = self.byte(start)?;
        let count = match head >> 2 {
            0 => self.varint(start)?,
            small => u64::from(small),
        };
        if count == 0 {
            return Err(UpdatesError::Empty(start));
        }
        let gap = self.varint(start)?;
        let vbn = self.next.saturating_add(gap);
        match vbn.checked_add(count) {
            Some(end) if end <= self.blocks => self.next = end,
            _ => return Err(UpdatesError::OutOfRange { vbn, count, blocks: self.blocks }),
        }
        let vbn = Vbn(vbn);
        match head & 3 {
            KIND_INLINE => self.inline(start, vbn, count),
            KIND_HOLE => Ok(Run::Hole { vbn, count }),
            kind => {
                let transfer = self.transfer(start, kind)?;
                let ordinal = self.varint(start)?;
                self.near = Some(transfer);
                Ok(Run::Reference { vbn, count, transfer, ordinal })
            }
        }
    }

    fn transfer(&mut self, start: u64, kind: u8) -> Result<TransferId, UpdatesError> {
        if kind == KIND_FAR {
            let generation = self.varint(start)?;
            let generation = u32::try_from(generation).map_err(|_| UpdatesError::Number(start))?;
            return Ok(TransferId { generation, counter: self.varint(start)? });
        }
        let near = self.near.ok_or(UpdatesError::NoTransfer(start))?;
        let coded = self.varint(start)?;
        let delta = (coded >> 1) ^ (coded & 1).wrapping_neg();
        Ok(TransferId { counter: near.counter.wrapping_add(delta), ..near })
    }

    fn inline(&mut self, start: u64, vbn: Vbn, count: u64) -> Result<Run<'a>, UpdatesError> {
        let left = to_u64(self.bytes.len() - self.at);
        let wanted = count.checked_mul(INLINE_BLOCK_BYTES).filter(|&wanted| wanted <= left);
        let end = self.at + to_usize(wanted.ok_or(UpdatesError::Short(start))?);
        let blocks = &self.bytes[self.at..end];
        self.at = end;
        for (index, (stored, block)) in inline_blocks(blocks).enumerate() {
            let met = crc32c(block);
            if stored != met {
                let vbn = vbn.0 + to_u64(index);
                return Err(UpdatesError::Checksum { vbn, stored, met });
            }
        }
        Ok(Run::Inline { vbn, count, blocks })
    }

    fn byte(&mut self, start: u64) -> Result<u8, UpdatesError> {
        let byte = *self.bytes.get(self.at).ok_or(UpdatesError::Short(start))?;
        self.at += 1;
        Ok(byte)
    }

    fn varint(&mut self, start: u64) -> Result<u64, UpdatesError> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte(start)?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(UpdatesError::Number(start));
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(UpdatesError::Number(start))
    }
}

impl<'a> Iterator for Decoder<'a> {
    type Item = Result<Run<'a>, UpdatesError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.at == self.bytes.len() {
            return None;
        }
        let run = self.run();
        self.failed = run.is_err();
        Some(run)
    }
}

/// The blocks of an inline run with their stored checksums.
pub fn inline_blocks(blocks: &[u8]) -> impl Iterator<Item = (u32, &[u8; BLOCK_BYTES])> {
    blocks.chunks_exact(to_usize(INLINE_BLOCK_BYTES)).filter_map(|chunk| {
        let (crc, block) = chunk.split_first_chunk::<4>()?;
        Some((u32::from_le_bytes(*crc), block.first_chunk()?))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(generation: u32, counter: u64) -> TransferId {
        TransferId { generation, counter }
    }

    #[test]
    fn golden_bytes() {
        let mut encoder = Encoder::new(1 << 18);
        encoder.reference(Vbn(5), 1, id(1, 300), 2);
        encoder.reference(Vbn(7), 200, id(1, 299), 0);
        encoder.hole(Vbn(207), 3);
        let bytes = encoder.finish();
        let wanted = [7, 5, 1, 0xac, 2, 2, 0, 0xc8, 1, 1, 1, 0, 14, 0];
        assert_eq!(bytes, wanted);
        let runs: Vec<_> = Decoder::new(&bytes, 210).collect::<Result<_, _>>().unwrap();
        assert_eq!(
            runs,
            [
                Run::Reference { vbn: Vbn(5), count: 1, transfer: id(1, 300), ordinal: 2 },
                Run::Reference { vbn: Vbn(7), count: 200, transfer: id(1, 299), ordinal: 0 },
                Run::Hole { vbn: Vbn(207), count: 3 },
            ]
        );
    }

    #[test]
    fn each_bad_payload_is_named() {
        fn all(bytes: &[u8], blocks: u64) -> Result<Vec<Run<'_>>, UpdatesError> {
            Decoder::new(bytes, blocks).collect()
        }
        assert_eq!(all(&[4, 0, 0, 0], 9), Err(UpdatesError::NoTransfer(0)));
        assert_eq!(all(&[2, 0, 0], 9), Err(UpdatesError::Empty(0)));
        assert_eq!(all(&[6, 9], 9), Err(UpdatesError::OutOfRange { vbn: 9, count: 1, blocks: 9 }));
        assert_eq!(all(&[6], 9), Err(UpdatesError::Short(0)));
        assert_eq!(all(&[5, 0, 1, 2, 3], 9), Err(UpdatesError::Short(0)));
        let huge = [&[6][..], &[0xff; 10]].concat();
        assert_eq!(all(&huge, 9), Err(UpdatesError::Number(0)));
        let far = [7, 0, 0xff, 0xff, 0xff, 0xff, 0x7f, 0, 0];
        assert_eq!(all(&far, 9), Err(UpdatesError::Number(0)));
        let end = [2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1];
        assert!(matches!(all(&end, 9), Err(UpdatesError::OutOfRange { .. })));
    }

    #[test]
    fn a_damaged_inline_block_is_found() {
        let mut encoder = Encoder::new(1 << 18);
        encoder.inline(Vbn(3), [&[1; 4096], &[2; 4096]].into_iter());
        let mut bytes = encoder.finish();
        bytes[6000] ^= 1;
        let run = Decoder::new(&bytes, 9).next().unwrap();
        assert!(matches!(run, Err(UpdatesError::Checksum { vbn: 4, .. })));
    }

    /// The promise of the wire: random whole blocks of many transfers cost at most 12 bytes each.
    #[test]
    fn a_random_block_costs_at_most_twelve_bytes() {
        let mut encoder = Encoder::new(1 << 20);
        let mut vbn = 0;
        for n in 0..10_000_u64 {
            vbn += 1 + n.wrapping_mul(2_654_435_761) % 50;
            encoder.reference(Vbn(vbn), 1, id(3, n.wrapping_mul(7_919_777) % 16_384), 0);
        }
        assert!(encoder.finish().len() <= 80_000, "over 8 bytes on average");
    }

    #[derive(Debug, Clone)]
    enum Part {
        Reference(u64, u32, u64, u64),
        Inline(Vec<u8>),
        Hole(u64),
    }

    fn part() -> impl Strategy<Value = (u64, Part)> {
        let body = prop_oneof![
            (1..1_000_000_u64, 0..3_u32, 0..1_u64 << 62, 0..300_u64)
                .prop_map(|(count, g, c, o)| Part::Reference(count, g, c, o)),
            prop::collection::vec(any::<u8>(), 1..4).prop_map(Part::Inline),
            (1..1_u64 << 40).prop_map(Part::Hole),
        ];
        (0..1_u64 << 30, body)
    }

    proptest! {
        /// What is packed is what is read, and no cut of it is taken for more than its whole runs.
        #[test]
        fn runs_survive(parts in prop::collection::vec(part(), 1..20), cut in any::<prop::sample::Index>()) {
            let mut encoder = Encoder::new(1 << 20);
            let mut next = 0;
            let mut wanted = Vec::new();
            for (gap, part) in parts {
                let vbn = next + gap;
                let count = match part {
                    Part::Reference(count, generation, counter, ordinal) => {
                        encoder.reference(Vbn(vbn), count, id(generation, counter), ordinal);
                        wanted.push((vbn, count, Some((id(generation, counter), ordinal)), vec![]));
                        count
                    }
                    Part::Inline(fills) => {
                        let blocks: Vec<_> = fills.iter().map(|&fill| [fill; 4096]).collect();
                        encoder.inline(Vbn(vbn), blocks.iter());
                        let count = u64::try_from(fills.len()).unwrap();
                        wanted.push((vbn, count, None, fills));
                        count
                    }
                    Part::Hole(count) => {
                        encoder.hole(Vbn(vbn), count);
                        wanted.push((vbn, count, None, vec![]));
                        count
                    }
                };
                next = vbn + count;
            }
            let bytes = encoder.finish();
            let read: Vec<_> = Decoder::new(&bytes, u64::MAX).map(|run| match run.unwrap() {
                Run::Reference { vbn, count, transfer, ordinal } =>
                    (vbn.0, count, Some((transfer, ordinal)), vec![]),
                Run::Inline { vbn, count, blocks } =>
                    (vbn.0, count, None, inline_blocks(blocks).map(|(_, block)| block[0]).collect()),
                Run::Hole { vbn, count } => (vbn.0, count, None, vec![]),
            }).collect();
            prop_assert_eq!(&read, &wanted);
            let cut = cut.index(bytes.len());
            let part = Decoder::new(&bytes[..cut], u64::MAX).filter_map(Result::ok).count();
            prop_assert!(part < wanted.len());
        }
    }
}
