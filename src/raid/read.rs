//! Reads of an array.
//!
//! A healthy block costs one read of one device. What a device does not give, because it is missing
//! or because it fails to read, is computed from the others; a failed read does not fail a device.
//! Whether what was read is *right* is not known here: the checksum lies above, and whoever has it
//! asks for the other ways to the same block ([`Array::read_other`]).

use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::device::DeviceError;
use crate::units::convert::{to_u64, to_usize};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::array::Array;
use super::layout::{Level, Spot};
use super::parity;

impl Array {
    /// Fills `buffer`: what is not in place yet from memory, the rest from the devices.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        // Looked up before the devices are read: what leaves memory meanwhile is in place by then.
        let pending = self.pending_in(offset, buffer.len());
        self.read_in_place(offset, buffer, true)?;
        for (number, block) in pending {
            let (from, to) = overlap(number, offset, buffer.len());
            buffer[to].copy_from_slice(&block[from]);
        }
        Ok(())
    }

    fn pending_in(&self, offset: u64, length: usize) -> Vec<(u64, super::array::Block)> {
        let pending = self.pending.read().unwrap_or_else(PoisonError::into_inner);
        if pending.is_empty() || length == 0 {
            return Vec::new();
        }
        let last = (offset + to_u64(length) - 1) / BLOCK_BYTES_U64;
        let found = pending.range(offset / BLOCK_BYTES_U64..=last);
        found.map(|(number, block)| (*number, block.clone())).collect()
    }

    /// What is on the devices. Holds off changes in place while it reads rows, if `shared`; who
    /// has the writer's lock is the only one to make any.
    pub(super) fn read_in_place(
        &self,
        offset: u64,
        buffer: &mut [u8],
        shared: bool,
    ) -> Result<(), DeviceError> {
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let spot = self.geometry.spot(at);
            let length = rest.len().min(to_usize(self.geometry.chunk - spot.within));
            let (piece, others) = rest.split_at_mut(length);
            self.read_piece(spot, piece, shared)?;
            at += to_u64(length);
            rest = others;
        }
        Ok(())
    }

    /// Reads part of one chunk.
    fn read_piece(&self, spot: Spot, piece: &mut [u8], shared: bool) -> Result<(), DeviceError> {
        if self.read_column(spot, piece) {
            return Ok(());
        }
        let _unchanged =
            shared.then(|| self.in_place.read().unwrap_or_else(PoisonError::into_inner));
        // It may have been the middle of a change.
        if self.read_column(spot, piece) {
            return Ok(());
        }
        let first = spot.within / BLOCK_BYTES_U64 * BLOCK_BYTES_U64;
        let end = spot.within + to_u64(piece.len());
        for block in (first..end).step_by(BLOCK_BYTES) {
            let row = Spot { within: block, ..spot };
            let bytes = self.recovered(row, &[spot.column]).ok_or_else(|| {
                let place = (self.geometry.offset(row), BLOCK_BYTES_U64);
                self.lost(("read", place.0, place.1), "too few devices have this block")
            })?;
            let number = self.geometry.offset(row) / BLOCK_BYTES_U64;
            let (from, to) = overlap(number, self.geometry.offset(spot), piece.len());
            piece[to].copy_from_slice(&bytes[from]);
        }
        Ok(())
    }

    /// Reads part of a column from the device that has it; `false` if it does not give it. Without
    /// redundancy a device that failed a write is read on, as behind a [`Latch`]: nothing was
    /// written since that it could lack.
    ///
    /// [`Latch`]: crate::device::latch::Latch
    pub(super) fn read_column(&self, spot: Spot, piece: &mut [u8]) -> bool {
        let member = &self.members[self.geometry.place(spot.stripe, spot.column)];
        let device = match self.geometry.spare() {
            0 => member.attached(),
            _ => member.usable(spot.stripe),
        };
        let Some(device) = device else { return false };
        match device.read_at(self.geometry.on_member(spot.stripe, spot.within), piece) {
            Ok(()) => true,
            Err(error) => {
                member.read_errors.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(device = %member.name(), %error, "read from the others");
                false
            }
        }
    }

    /// One block of a column out of the others, without reading those in `without`; `None` if too
    /// few are left.
    pub(super) fn recovered(&self, row: Spot, without: &[usize]) -> Option<Vec<u8>> {
        let (n, k) = (self.geometry.members, self.geometry.data_columns());
        let mut columns = vec![None; n];
        let mut found = 0;
        for column in (0..n).filter(|column| !without.contains(column)) {
            if found == k {
                break;
            }
            let mut bytes = vec![0; BLOCK_BYTES];
            if self.read_column(Spot { column, ..row }, &mut bytes) {
                columns[column] = Some(bytes);
                found += 1;
            }
        }
        parity::recover(&mut columns, k, BLOCK_BYTES).ok()?;
        columns[row.column].take()
    }

    /// The `nth` way to read a block without its own column: each leaves out another column as
    /// well, parity first. Of a mirror: the copies.
    pub(super) fn read_other(
        &self,
        nth: usize,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), DeviceError> {
        if !self.pending_in(offset, buffer.len()).is_empty() {
            return self.read(offset, buffer);
        }
        let spot = self.geometry.spot(offset);
        let within = spot.within / BLOCK_BYTES_U64 * BLOCK_BYTES_U64;
        let (row, from) = (Spot { within, ..spot }, to_usize(spot.within - within));
        let range: Range<usize> = from..from + buffer.len();
        let without = self.left_out(spot.column, nth).filter(|_| range.end <= BLOCK_BYTES);
        let _unchanged = self.in_place.read().unwrap_or_else(PoisonError::into_inner);
        let bytes = without.and_then(|without| self.recovered(row, &without)).ok_or_else(|| {
            self.lost(("read", offset, to_u64(buffer.len())), "no other copy can be had")
        })?;
        buffer.copy_from_slice(&bytes[range]);
        Ok(())
    }

    /// The columns that are not read in the `nth` other way.
    fn left_out(&self, own: usize, nth: usize) -> Option<Vec<usize>> {
        let n = self.geometry.members;
        match self.geometry.level {
            Level::None => None,
            Level::Parity1 => (nth == 0).then(|| vec![own]),
            Level::Parity2 => {
                let other = (0..n).rev().filter(|column| *column != own).nth(nth)?;
                Some(vec![own, other])
            }
            Level::Mirror => {
                let copy = (0..n).filter(|column| *column != own).nth(nth)?;
                Some((0..n).filter(|column| *column != copy).collect())
            }
        }
    }
}

/// Which part of block `number` lies in `length` bytes at `offset`, and which part of these that is.
pub(super) fn overlap(number: u64, offset: u64, length: usize) -> (Range<usize>, Range<usize>) {
    let start = number * BLOCK_BYTES_U64;
    let first = start.max(offset);
    let end = (start + BLOCK_BYTES_U64).min(offset + to_u64(length));
    (
        to_usize(first - start)..to_usize(end - start),
        to_usize(first - offset)..to_usize(end - offset),
    )
}
