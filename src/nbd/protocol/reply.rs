//! Replies of the transmission phase: simple replies and chunks of structured replies.
//!
//! Pure. A reply is a list of pieces that go out in one vectored write; data of the export is
//! passed on without a copy. Called by `transmission`. An export that answered a read with
//! pieces of another length is found out here, before a byte is sent.

use bytes::{BufMut, Bytes, BytesMut};

use super::option_reply::cut_text;
use super::{CONTEXT_ALLOCATION_ID, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};
use crate::limits::NBD_STRING_BYTES_MAX;
use crate::nbd::export::{ErrorCode, Extent, Segment};
use crate::units::convert::{low_u32, to_u64, to_usize};

/// Bytes of a simple reply without data.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes before a chunk's payload.
pub const CHUNK_HEADER_BYTES: usize = 20;

const FLAG_DONE: u16 = 1 << 0;
const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_OFFSET_HOLE: u16 = 2;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_ERROR: u16 = (1 << 15) + 1;
const STATE_HOLE: u32 = 1 << 0;
const STATE_ZERO: u32 = 1 << 1;

/// Zero bytes to send where a hole has to be spelled out.
static ZEROES: [u8; 65_536] = [0; 65_536];

/// Pieces of one reply, in order.
pub type Pieces = Vec<Bytes>;

/// The pieces of a read do not add up to what was asked: a fault of the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("export answered a read of {asked} bytes with {got}")]
pub struct WrongLength {
    /// Bytes that were asked for.
    pub asked: u64,
    /// Bytes in the pieces.
    pub got: u64,
}

/// A simple reply: done, or the error.
pub fn simple(cookie: u64, error: Option<ErrorCode>) -> Bytes {
    let mut out = BytesMut::with_capacity(SIMPLE_REPLY_BYTES);
    out.put_u32(SIMPLE_REPLY_MAGIC);
    out.put_u32(error.map_or(0, ErrorCode::wire));
    out.put_u64(cookie);
    out.freeze()
}

/// Data of a read behind a simple reply.
pub fn simple_read(cookie: u64, length: u32, data: Vec<Segment>) -> Result<Pieces, WrongLength> {
    check_sum(length, &data)?;
    let mut pieces = vec![simple(cookie, None)];
    push_flat(&mut pieces, data);
    Ok(pieces)
}

/// Data of a read as structured chunks: one for each run of data, one for each hole.
pub fn structured_read(
    cookie: u64,
    offset: u64,
    length: u32,
    data: Vec<Segment>,
) -> Result<Pieces, WrongLength> {
    check_sum(length, &data)?;
    let mut pieces = Pieces::new();
    let (mut at, mut left) = (offset, u64::from(length));
    for run in runs(data) {
        let run_length = run.length();
        left -= run_length;
        let flags = if left == 0 { FLAG_DONE } else { 0 };
        match run {
            Run::Hole(hole) => pieces.push(hole_chunk(cookie, flags, at, hole)),
            Run::Data(bytes) => {
                pieces.push(data_header(cookie, flags, at, run_length));
                pieces.extend(bytes);
            }
        }
        at += run_length;
    }
    Ok(pieces)
}

/// Data of a read as exactly one chunk.
pub fn single_chunk_read(
    cookie: u64,
    offset: u64,
    length: u32,
    data: Vec<Segment>,
) -> Result<Pieces, WrongLength> {
    check_sum(length, &data)?;
    let is_hole = |segment: &Segment| match segment {
        Segment::Hole(_) => true,
        Segment::Data(bytes) => bytes.is_empty(),
    };
    if data.iter().all(is_hole) {
        return Ok(vec![hole_chunk(cookie, FLAG_DONE, offset, u64::from(length))]);
    }
    let mut pieces = vec![data_header(cookie, FLAG_DONE, offset, u64::from(length))];
    push_flat(&mut pieces, data);
    Ok(pieces)
}

/// A structured reply without content: done.
pub fn structured_done(cookie: u64) -> Bytes {
    chunk(cookie, FLAG_DONE, TYPE_NONE, 0).freeze()
}

/// A structured reply that is an error with its text.
pub fn structured_error(cookie: u64, code: ErrorCode, message: &str) -> Bytes {
    let message = cut_text(message, NBD_STRING_BYTES_MAX);
    let length = low_u32(to_u64(message.len()));
    let mut out = chunk(cookie, FLAG_DONE, TYPE_ERROR, 6 + length);
    out.put_u32(code.wire());
    out.put_uint(u64::from(length), 2);
    out.put_slice(message.as_bytes());
    out.freeze()
}

/// The extents of a block status request for `base:allocation`: equal neighbours become one, the
/// last is cut where the request ends. `None` if there is not one byte: a fault of the export.
pub fn block_status(cookie: u64, length: u32, one: bool, extents: &[Extent]) -> Option<Bytes> {
    let merged = merge(length, one, extents);
    if merged.is_empty() {
        return None;
    }
    let payload = 4 + 8 * low_u32(to_u64(merged.len()));
    let mut out = chunk(cookie, FLAG_DONE, TYPE_BLOCK_STATUS, payload);
    out.put_u32(CONTEXT_ALLOCATION_ID);
    for (length, state) in merged {
        out.put_u32(length);
        out.put_u32(state);
    }
    Some(out.freeze())
}

fn merge(length: u32, one: bool, extents: &[Extent]) -> Vec<(u32, u32)> {
    let mut merged: Vec<(u32, u32)> = Vec::with_capacity(if one { 1 } else { extents.len() });
    let mut left = length;
    for extent in extents {
        // What is cut fits 32 bits, since `left` does.
        let part = low_u32(extent.length.min(u64::from(left)));
        let state = u32::from(extent.hole) * STATE_HOLE + u32::from(extent.zero) * STATE_ZERO;
        match merged.last_mut() {
            _ if part == 0 => (),
            Some((sum, last)) if *last == state => *sum += part,
            Some(_) if one => break,
            Some(_) | None => merged.push((part, state)),
        }
        left -= part;
    }
    merged
}

fn chunk(cookie: u64, flags: u16, kind: u16, payload: u32) -> BytesMut {
    // Payloads that are data stay pieces of their own; all others are bounded by NBD_EXTENTS_MAX.
    let room = if kind == TYPE_OFFSET_DATA { 8 } else { to_usize(u64::from(payload)) };
    let mut out = BytesMut::with_capacity(CHUNK_HEADER_BYTES + room);
    out.put_u32(STRUCTURED_REPLY_MAGIC);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(payload);
    out
}

fn data_header(cookie: u64, flags: u16, offset: u64, length: u64) -> Bytes {
    let mut out = chunk(cookie, flags, TYPE_OFFSET_DATA, 8 + low_u32(length));
    out.put_u64(offset);
    out.freeze()
}

fn hole_chunk(cookie: u64, flags: u16, offset: u64, length: u64) -> Bytes {
    let mut out = chunk(cookie, flags, TYPE_OFFSET_HOLE, 12);
    out.put_u64(offset);
    out.put_u32(low_u32(length));
    out.freeze()
}

fn check_sum(length: u32, data: &[Segment]) -> Result<(), WrongLength> {
    let got = data.iter().fold(0, |sum: u64, segment| sum.saturating_add(segment.length()));
    let asked = u64::from(length);
    if got == asked { Ok(()) } else { Err(WrongLength { asked, got }) }
}

/// Neighbours of one kind, joined, so that an answer has as few chunks as it can.
enum Run {
    Data(Vec<Bytes>),
    Hole(u64),
}

impl Run {
    fn length(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.iter().map(|part| to_u64(part.len())).sum(),
            Self::Hole(length) => *length,
        }
    }
}

fn runs(data: Vec<Segment>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for segment in data {
        match (runs.last_mut(), segment) {
            (_, Segment::Hole(0)) => (),
            (_, Segment::Data(bytes)) if bytes.is_empty() => (),
            (Some(Run::Data(parts)), Segment::Data(bytes)) => parts.push(bytes),
            (Some(Run::Hole(sum)), Segment::Hole(length)) => *sum += length,
            (_, Segment::Data(bytes)) => runs.push(Run::Data(vec![bytes])),
            (_, Segment::Hole(length)) => runs.push(Run::Hole(length)),
        }
    }
    runs
}

/// Data with its holes spelled out.
fn push_flat(pieces: &mut Pieces, data: Vec<Segment>) {
    for segment in data {
        match segment {
            Segment::Data(bytes) => pieces.push(bytes),
            Segment::Hole(mut left) => {
                while left > 0 {
                    let part = left.min(to_u64(ZEROES.len()));
                    pieces.push(Bytes::from_static(&ZEROES[..to_usize(part)]));
                    left -= part;
                }
            }
        }
    }
    pieces.retain(|piece| !piece.is_empty());
}

/// Bytes in all pieces.
pub fn total(pieces: &[Bytes]) -> u64 {
    pieces.iter().map(|piece| to_u64(piece.len())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOKIE: u64 = 0x0102_0304_0506_0708;

    fn data(text: &'static str) -> Segment {
        Segment::Data(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn golden_simple_replies() {
        let done = b"\x67\x44\x66\x98\x00\x00\x00\x00\x01\x02\x03\x04\x05\x06\x07\x08";
        assert_eq!(&simple(COOKIE, None)[..], done);
        let failed = b"\x67\x44\x66\x98\x00\x00\x00\x1c\x01\x02\x03\x04\x05\x06\x07\x08";
        assert_eq!(&simple(COOKIE, Some(ErrorCode::NoSpc))[..], failed);
        let read = simple_read(COOKIE, 7, vec![data("ab"), Segment::Hole(3), data("cd")]);
        assert_eq!(read.unwrap().concat(), [&done[..], b"ab\0\0\0cd"].concat());
    }

    #[test]
    fn golden_structured_read() {
        let segments =
            vec![data("ab"), data(""), data("c"), Segment::Hole(2), Segment::Hole(3), data("z")];
        let pieces = structured_read(COOKIE, 16, 9, segments).unwrap();
        let expected = b"\x66\x8e\x33\xef\x00\x00\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
            \x00\x00\x00\x0b\x00\x00\x00\x00\x00\x00\x00\x10abc\
            \x66\x8e\x33\xef\x00\x00\x00\x02\x01\x02\x03\x04\x05\x06\x07\x08\
            \x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x00\x13\x00\x00\x00\x05\
            \x66\x8e\x33\xef\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
            \x00\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00\x18z";
        assert_eq!(pieces.concat(), expected);
    }

    #[test]
    fn golden_single_chunk() {
        let pieces = single_chunk_read(COOKIE, 16, 5, vec![data("ab"), Segment::Hole(3)]).unwrap();
        let expected = b"\x66\x8e\x33\xef\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
            \x00\x00\x00\x0d\x00\x00\x00\x00\x00\x00\x00\x10ab\0\0\0";
        assert_eq!(pieces.concat(), expected);
        let holes = vec![data(""), Segment::Hole(2), data(""), Segment::Hole(3), data("")];
        let hole = single_chunk_read(COOKIE, 16, 5, holes);
        let expected = b"\x66\x8e\x33\xef\x00\x01\x00\x02\x01\x02\x03\x04\x05\x06\x07\x08\
            \x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x05";
        assert_eq!(hole.unwrap().concat(), expected);
    }

    #[test]
    fn golden_done_and_error() {
        let expected =
            b"\x66\x8e\x33\xef\x00\x01\x00\x00\x01\x02\x03\x04\x05\x06\x07\x08\x00\x00\x00\x00";
        assert_eq!(&structured_done(COOKIE)[..], expected);
        let expected = b"\x66\x8e\x33\xef\x00\x01\x80\x01\x01\x02\x03\x04\x05\x06\x07\x08\
            \x00\x00\x00\x08\x00\x00\x00\x05\x00\x02no";
        assert_eq!(&structured_error(COOKIE, ErrorCode::Io, "no")[..], expected);
        let long = structured_error(COOKIE, ErrorCode::Io, &"x".repeat(70_000));
        assert_eq!(long.len(), 20 + 6 + 4096);
        assert_eq!(&long[16..20], (6u32 + 4096).to_be_bytes());
        assert_eq!(&long[24..26], 4096u16.to_be_bytes());
    }

    fn extent(length: u64, hole: bool, zero: bool) -> Extent {
        Extent { length, hole, zero }
    }

    #[test]
    fn golden_block_status() {
        let extents = [extent(512, false, false), extent(512, true, true)];
        let expected = b"\x66\x8e\x33\xef\x00\x01\x00\x05\x01\x02\x03\x04\x05\x06\x07\x08\
            \x00\x00\x00\x14\x00\x00\x00\x01\
            \x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x03";
        assert_eq!(&block_status(COOKIE, 1024, false, &extents).unwrap()[..], expected);
    }

    #[test]
    fn extents_are_merged_cut_and_counted() {
        let many = [
            extent(512, false, true),
            extent(512, false, true),
            extent(0, true, true),
            extent(u64::MAX, true, true),
            extent(512, false, false),
        ];
        assert_eq!(merge(4096, false, &many), [(1024, 2), (3072, 3)]);
        assert_eq!(merge(4096, true, &many), [(1024, 2)]);
        assert_eq!(merge(600, true, &many), [(600, 2)]);
        assert_eq!(merge(u32::MAX, false, &many), [(1024, 2), (u32::MAX - 1024, 3)]);
        assert_eq!(block_status(COOKIE, 4096, false, &[extent(0, true, true)]), None);
        assert_eq!(block_status(COOKIE, 4096, false, &[]), None);
    }

    #[test]
    fn a_read_of_another_length_never_leaves() {
        let wrong = |got| Err(WrongLength { asked: 4, got });
        assert_eq!(simple_read(1, 4, vec![data("abc")]), wrong(3));
        assert_eq!(structured_read(1, 0, 4, vec![data("abc"), Segment::Hole(2)]), wrong(5));
        let holes = vec![Segment::Hole(u64::MAX), Segment::Hole(u64::MAX)];
        assert_eq!(structured_read(1, 0, 4, holes), wrong(u64::MAX));
        assert_eq!(single_chunk_read(1, 0, 4, vec![data("abcde")]), wrong(5));
        assert_eq!(single_chunk_read(1, 0, 4, Vec::new()), wrong(0));
    }

    #[test]
    fn long_holes_are_spelled_out_whole() {
        let pieces = simple_read(1, 200_000, vec![Segment::Hole(200_000)]).unwrap();
        assert_eq!(total(&pieces), 200_000 + 16);
    }
}
