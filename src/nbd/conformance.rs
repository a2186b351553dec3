//! What every [`Export`] must do, as a check that each implementation runs in its tests.
//!
//! It compares an export with a plain array through a seeded history of writes, zeroings, trims
//! and flushes at every alignment, and its extents with what was written. A deviation panics with
//! the seed and the step, which repeat it. Not for running systems: it overwrites the export.

use bytes::Bytes;

use super::export::{Export, ExportError, Segment};
use crate::units::convert::{low_u8, low_u32, to_u64, to_usize};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

/// The part of the export that is used.
const SPAN_BYTES: u64 = 64 * BLOCK_BYTES_U64;
/// Longest single request: some blocks and two edges.
const REQUEST_BYTES: u64 = 5 * BLOCK_BYTES_U64;

/// Chance from a seed (SplitMix64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    /// A range inside `span`, at least one byte; every second one made of whole blocks.
    fn range(&mut self, span: u64) -> (u64, u32) {
        let (offset, length) = (self.below(span), 1 + self.below(REQUEST_BYTES));
        if self.below(2) == 0 {
            return (offset, low_u32(length.min(span - offset)));
        }
        let start = offset / BLOCK_BYTES_U64 * BLOCK_BYTES_U64;
        let whole = length.next_multiple_of(BLOCK_BYTES_U64);
        (start, low_u32(whole.min(span - start)))
    }
}

/// Puts an empty (all zero), writable export through `steps` steps and checks it after each.
///
/// # Panics
/// When the export deviates from an array, or fails.
pub async fn check_writable(export: &dyn Export, seed: u64, steps: u64) -> Result<(), ExportError> {
    let span = SPAN_BYTES.min(export.info().size.0);
    let mut model = vec![0; to_usize(span)];
    let mut chance = Chance(seed);
    for step in 0..steps {
        let context = format!("seed {seed}, step {step}");
        let (offset, length) = chance.range(span);
        let (from, to) = (to_usize(offset), to_usize(offset + u64::from(length)));
        let fua = chance.below(4) == 0;
        match chance.below(8) {
            0..4 => {
                let byte = low_u8(chance.below(255) + 1);
                model[from..to].fill(byte);
                export.write(offset, Bytes::from(model[from..to].to_vec()), fua).await?;
            }
            4 | 5 => {
                model[from..to].fill(0);
                export.write_zeroes(offset, length, chance.below(2) == 0, fua).await?;
            }
            6 => {
                let whole = from.next_multiple_of(BLOCK_BYTES)..to / BLOCK_BYTES * BLOCK_BYTES;
                if whole.start < whole.end {
                    model[whole].fill(0);
                }
                export.trim(offset, length, fua).await?;
            }
            _ => {
                export.flush().await?;
                export.cache(offset, length).await?;
            }
        }
        let (offset, length) = chance.range(span);
        check_read(export, &model, offset, length, &context).await?;
        check_extents(export, &model, offset, length, &context).await?;
    }
    check_content(export, &model).await
}

/// Checks that the export begins with `content`, read whole and in odd pieces. For exports that
/// cannot be written.
///
/// # Panics
/// When the export deviates, or fails.
pub async fn check_content(export: &dyn Export, content: &[u8]) -> Result<(), ExportError> {
    let end = to_u64(content.len());
    let mut chance = Chance(end);
    let mut offset = 0;
    while offset < end {
        let length = low_u32((1 + chance.below(REQUEST_BYTES)).min(end - offset));
        check_read(export, content, offset, length, "in pieces").await?;
        check_extents(export, content, offset, length, "in pieces").await?;
        offset += u64::from(length);
    }
    Ok(())
}

async fn check_read(
    export: &dyn Export,
    model: &[u8],
    offset: u64,
    length: u32,
    context: &str,
) -> Result<(), ExportError> {
    let wanted = &model[to_usize(offset)..to_usize(offset + u64::from(length))];
    let mut got = Vec::with_capacity(wanted.len());
    for segment in export.read(offset, length).await? {
        match segment {
            Segment::Data(bytes) => got.extend_from_slice(&bytes),
            Segment::Hole(hole) => got.resize(got.len() + to_usize(hole), 0),
        }
    }
    let differs = got.iter().zip(wanted).position(|(got, wanted)| got != wanted);
    assert_eq!(got.len(), wanted.len(), "{context}: read of {length} bytes at {offset}");
    assert_eq!(differs, None, "{context}: first wrong byte of a read of {length} at {offset}");
    Ok(())
}

/// Extents start at the offset, are bounded in number, and claim no zeroes that are none.
async fn check_extents(
    export: &dyn Export,
    model: &[u8],
    offset: u64,
    length: u32,
    context: &str,
) -> Result<(), ExportError> {
    let end = offset + u64::from(length);
    for at_most in [1, 1000] {
        let extents = export.extents(offset, length, at_most).await?;
        let place = format!("{context}: extents of {length} bytes at {offset}, {at_most} at most");
        assert!((1..=at_most).contains(&extents.len()), "{place}: {}", extents.len());
        let mut at = offset;
        for extent in extents {
            assert!(extent.length > 0, "{place}: one is empty");
            assert!(at < end, "{place}: one begins past the range");
            let stop = at.saturating_add(extent.length).min(end);
            assert!(!extent.hole || extent.zero, "{place}: a hole that is not zero");
            if extent.zero {
                let bytes = &model[to_usize(at)..to_usize(stop)];
                assert!(bytes.iter().all(|byte| *byte == 0), "{place}: false zeroes at {at}");
            }
            at = stop;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::export::{ExportFuture, ExportInfo, Extent};
    use crate::nbd::memory::Memory;
    use crate::units::numbers::ByteCount;

    fn memory() -> Memory {
        Memory::new(ExportInfo::new("m", ByteCount(SPAN_BYTES)))
    }

    #[tokio::test]
    async fn memory_conforms() {
        for seed in 0..20 {
            check_writable(&memory(), seed, 300).await.unwrap();
        }
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Break {
        TrimEdges,
        ZeroesForgotten,
        ExtentsAllZero,
        ShortRead,
    }

    /// Memory with one fault.
    struct Broken(Memory, Break);

    impl Export for Broken {
        fn info(&self) -> &ExportInfo {
            self.0.info()
        }
        fn read(&self, offset: u64, length: u32) -> ExportFuture<'_, Vec<Segment>> {
            let less = u32::from(self.1 == Break::ShortRead && length > 1);
            self.0.read(offset, length - less)
        }
        fn write(&self, offset: u64, data: Bytes, fua: bool) -> ExportFuture<'_, ()> {
            self.0.write(offset, data, fua)
        }
        fn flush(&self) -> ExportFuture<'_, ()> {
            self.0.flush()
        }
        fn trim(&self, offset: u64, length: u32, fua: bool) -> ExportFuture<'_, ()> {
            if self.1 == Break::TrimEdges {
                return self.0.write_zeroes(offset, length, false, fua);
            }
            self.0.trim(offset, length, fua)
        }
        fn write_zeroes(
            &self,
            at: u64,
            length: u32,
            no_hole: bool,
            fua: bool,
        ) -> ExportFuture<'_, ()> {
            if self.1 == Break::ZeroesForgotten && !no_hole {
                return self.0.trim(at, length, fua);
            }
            self.0.write_zeroes(at, length, no_hole, fua)
        }
        fn cache(&self, offset: u64, length: u32) -> ExportFuture<'_, ()> {
            self.0.cache(offset, length)
        }
        fn extents(
            &self,
            offset: u64,
            length: u32,
            at_most: usize,
        ) -> ExportFuture<'_, Vec<Extent>> {
            if self.1 == Break::ExtentsAllZero {
                let all = vec![Extent { length: length.into(), hole: true, zero: true }];
                return Box::pin(std::future::ready(Ok(all)));
            }
            self.0.extents(offset, length, at_most)
        }
    }

    /// Control: each fault is found.
    #[tokio::test]
    async fn broken_exports_are_found_out() {
        for fault in
            [Break::TrimEdges, Break::ZeroesForgotten, Break::ExtentsAllZero, Break::ShortRead]
        {
            let checking = tokio::spawn(async move {
                check_writable(&Broken(memory(), fault), 1, 300).await.unwrap();
            });
            assert!(checking.await.unwrap_err().is_panic());
        }
    }
}
