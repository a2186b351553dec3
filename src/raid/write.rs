//! Writes of an array.
//!
//! All of it under the writer's lock, but for the flush of the devices. A write is cut in two kinds:
//!
//! * Whole stripes are written at once with their parity; the journal names them before, so that a
//!   stripe that a cut tore is given a parity that fits it again.
//! * Blocks of partial stripes are held in memory until the next flush, or until they are many.
//!   Then all of them are settled together: the new parity of each row is computed from the old
//!   one and the difference of the data, data and parity go into the journal with one durable
//!   write, and then in place.
//!
//! The parity of a partial write keeps the difference that a rotten neighbour has from it: what
//! rots can be recovered whatever is written beside it.
//!
//! A flush settles, flushes every device, and voids the journal up to there. What was flushed is
//! never touched by an open again.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::device::buffer::AlignedBuffer;
use crate::device::{Device, DeviceError, MemberState};
use crate::limits::{RAID_PENDING_BLOCKS_MAX, RAID_WHOLE_STRIPES_MAX};
use crate::units::convert::{to_u64, to_usize};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::array::{Array, Block, Writer};
use super::crew;
use super::journal::{self, Header, Placed, Record, StripeRun, Target};
use super::layout::Spot;
use super::parity;
use super::read::overlap;

/// The new blocks of one row, by column.
type Row = BTreeMap<usize, Block>;

/// What one device gets of a write: bytes side by side on it.
struct Stretch<'a> {
    on: u64,
    end: u64,
    pieces: Vec<&'a [u8]>,
}

impl Array {
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let mut writer = self.lock();
        self.check_whole()?;
        if self.geometry.spare() == 0 {
            return self.write_plain(&mut writer, offset, bytes);
        }
        let stripe_bytes = self.geometry.stripe_bytes();
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let into = at % stripe_bytes;
            let whole = to_u64(rest.len()) / stripe_bytes;
            let length = if into == 0 && whole > 0 {
                to_usize(whole.min(RAID_WHOLE_STRIPES_MAX) * stripe_bytes)
            } else {
                rest.len().min(to_usize(stripe_bytes - into))
            };
            let (piece, others) = rest.split_at(length);
            if into == 0 && whole > 0 {
                self.write_whole(&mut writer, at / stripe_bytes, piece)?;
            } else {
                self.write_partial(&mut writer, at, piece)?;
            }
            at += to_u64(length);
            rest = others;
        }
        Ok(())
    }

    /// Without redundancy: each piece to its device.
    fn write_plain(
        &self,
        writer: &mut Writer,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        // Of each device one stretch: what lies in one column behind the other lies there so as well.
        let mut stretches: BTreeMap<usize, Stretch<'_>> = BTreeMap::new();
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let spot = self.geometry.spot(at);
            let length = rest.len().min(to_usize(self.geometry.chunk - spot.within));
            let (piece, others) = rest.split_at(length);
            let place = self.geometry.place(spot.stripe, spot.column);
            let on = self.geometry.on_member(spot.stripe, spot.within);
            let stretch =
                stretches.entry(place).or_insert(Stretch { on, end: on, pieces: Vec::new() });
            assert_eq!(stretch.end, on, "what a device gets of one write lies side by side");
            stretch.end += to_u64(length);
            stretch.pieces.push(piece);
            at += to_u64(length);
            rest = others;
        }
        self.on_each(stretches.keys().copied(), |place, device| {
            device.write_pieces_at(stretches[&place].on, &stretches[&place].pieces)
        });
        self.record(writer)
    }

    /// Takes blocks of one stripe into memory.
    fn write_partial(
        &self,
        writer: &mut Writer,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        let end = offset + to_u64(bytes.len());
        for number in offset / BLOCK_BYTES_U64..end.div_ceil(BLOCK_BYTES_U64) {
            let (to, from) = overlap(number, offset, bytes.len());
            let mut block = [0; BLOCK_BYTES];
            if from.len() < BLOCK_BYTES {
                self.read_own(number, &mut block)?;
            }
            block[to].copy_from_slice(&bytes[from]);
            let held = {
                let mut pending = self.pending.write().unwrap_or_else(PoisonError::into_inner);
                pending.insert(number, Block::new(block));
                pending.len()
            };
            if held >= RAID_PENDING_BLOCKS_MAX {
                self.settle(writer)?;
            }
        }
        Ok(())
    }

    /// A block as the writer sees it.
    fn read_own(&self, number: u64, block: &mut [u8; BLOCK_BYTES]) -> Result<(), DeviceError> {
        let held =
            self.pending.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned();
        match held {
            Some(held) => {
                block.copy_from_slice(&*held);
                Ok(())
            }
            None => self.read_in_place(number * BLOCK_BYTES_U64, block, false),
        }
    }

    /// Writes whole stripes from `first` on, with their parity.
    fn write_whole(
        &self,
        writer: &mut Writer,
        first: u64,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        let geometry = &self.geometry;
        let count = bytes.len() / to_usize(geometry.stripe_bytes());
        let run = StripeRun { first, count: to_u64(count) };
        let record = Record { blocks: Vec::new(), whole: vec![run] };
        let length = count * to_usize(geometry.chunk);
        let mut parity = std::mem::take(&mut writer.parity);
        if geometry.data_columns() == 1 {
            self.append(writer, &record)?;
        } else {
            if parity.first().is_none_or(|column| column.len() < length) {
                parity = (0..geometry.spare()).map(|_| AlignedBuffer::new(length)).collect();
            }
            crew::beside(|| self.append(writer, &record), || self.fill_parity(bytes, &mut parity))?;
        }
        for stripe in run.first..run.first + run.count {
            writer.touched.iter_mut().for_each(|touched| _ = touched.insert(stripe));
            writer.unfit.iter_mut().for_each(|unfit| _ = unfit.remove(stripe));
        }
        {
            let _alone = self.in_place.write().unwrap_or_else(PoisonError::into_inner);
            self.on_each(0..geometry.members, |place, device| {
                let pieces = self.pieces_of(place, run, bytes, &parity);
                device.write_pieces_at(geometry.on_member(first, 0), &pieces)
            });
        }
        writer.parity = parity;
        self.record(writer)?;
        // Older than what was just written.
        let blocks = geometry.stripe_bytes() / BLOCK_BYTES_U64;
        let gone = first * blocks..(first + run.count) * blocks;
        let mut pending = self.pending.write().unwrap_or_else(PoisonError::into_inner);
        pending.retain(|number, _| !gone.contains(number));
        Ok(())
    }

    /// The parity of whole stripes: of each column that of all stripes, one behind the other.
    fn fill_parity(&self, bytes: &[u8], parity: &mut [AlignedBuffer]) {
        let stripe_bytes = to_usize(self.geometry.stripe_bytes());
        let chunk = to_usize(self.geometry.chunk);
        for (data, at) in bytes.chunks_exact(stripe_bytes).zip((0..).step_by(chunk)) {
            let columns: Vec<&[u8]> = data.chunks_exact(chunk).collect();
            let mut made: Vec<&mut [u8]> =
                parity.iter_mut().map(|column| &mut column[at..at + chunk]).collect();
            parity::encode(&columns, &mut made);
        }
    }

    /// What a device gets of a run of whole stripes, in order.
    fn pieces_of<'a>(
        &self,
        place: usize,
        run: StripeRun,
        bytes: &'a [u8],
        parity: &'a [AlignedBuffer],
    ) -> Vec<&'a [u8]> {
        let geometry = &self.geometry;
        let (k, chunk) = (geometry.data_columns(), to_usize(geometry.chunk));
        if k == 1 {
            // A mirror has all of it everywhere.
            return vec![bytes];
        }
        let stripes = (run.first..run.first + run.count).enumerate();
        let pieces = stripes.map(|(nth, stripe)| match geometry.column(stripe, place) {
            column if column < k => &bytes[(nth * k + column) * chunk..][..chunk],
            column => &parity[column - k][nth * chunk..][..chunk],
        });
        pieces.collect()
    }

    /// Puts what is held in memory in place, by way of the journal.
    pub(super) fn settle(&self, writer: &mut Writer) -> Result<(), DeviceError> {
        let held = self.pending.read().unwrap_or_else(PoisonError::into_inner).clone();
        if held.is_empty() {
            return Ok(());
        }
        let mut rows: BTreeMap<(u64, u64), Row> = BTreeMap::new();
        for (number, block) in held {
            let spot = self.geometry.spot(number * BLOCK_BYTES_U64);
            rows.entry((spot.stripe, spot.within)).or_default().insert(spot.column, block);
        }
        let mut blocks = Vec::new();
        for (stripe, _) in rows.keys() {
            self.touch(writer, *stripe)?;
        }
        for ((stripe, within), row) in &rows {
            let at = Spot { stripe: *stripe, column: 0, within: *within };
            // What cannot be settled will not be settled later either.
            let placed = self.place_row(at, row).map_err(|error| self.break_by(error))?;
            blocks.extend(placed);
        }
        let record = Record { blocks, whole: Vec::new() };
        self.append(writer, &record)?;
        self.put_in_place(&record.blocks);
        self.record(writer)?;
        self.pending.write().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }

    /// Writes blocks of the journal where they belong, on the devices that take them.
    pub(super) fn put_in_place(&self, blocks: &[Placed]) {
        let _alone = self.in_place.write().unwrap_or_else(PoisonError::into_inner);
        let geometry = &self.geometry;
        for placed in blocks {
            let stripe = (placed.offset - geometry.data_start) / geometry.chunk;
            let places = match placed.target {
                Target::Place(place) => place..place + 1,
                Target::All => 0..geometry.members,
            };
            for member in &self.members[places] {
                if let Some(device) = member.usable(stripe)
                    && let Err(error) = device.write_at(placed.offset, &*placed.block)
                {
                    member.fail(&error);
                }
            }
        }
    }

    /// The blocks of one row that change: data, and parity.
    fn place_row(&self, at: Spot, row: &Row) -> Result<Vec<Placed>, DeviceError> {
        let geometry = &self.geometry;
        let (n, k) = (geometry.members, geometry.data_columns());
        let offset = geometry.on_member(at.stripe, at.within);
        if k == 1 {
            let copies = row.values().map(|block| {
                let block = Box::new(**block);
                Placed { target: Target::All, offset, block }
            });
            return Ok(copies.collect());
        }
        let mut placed: Vec<(usize, Vec<u8>)> =
            row.iter().map(|(column, block)| (*column, block.to_vec())).collect();
        if row.len() == k {
            let data: Vec<&[u8]> = row.values().map(|block| &block[..]).collect();
            let mut parity = vec![vec![0; BLOCK_BYTES]; n - k];
            parity::encode(&data, &mut parity);
            placed.extend((k..n).zip(parity));
        } else {
            placed.extend(self.changed_parity(at, row)?);
        }
        let placed = placed.into_iter().map(|(column, bytes)| {
            let mut block = Box::new([0; BLOCK_BYTES]);
            block.copy_from_slice(&bytes);
            Placed { target: Target::Place(geometry.place(at.stripe, column)), offset, block }
        });
        Ok(placed.collect())
    }

    /// The parity of a row of which only some columns change: the old one and the differences.
    fn changed_parity(&self, at: Spot, row: &Row) -> Result<Vec<(usize, Vec<u8>)>, DeviceError> {
        let geometry = &self.geometry;
        let (n, k) = (geometry.members, geometry.data_columns());
        let mut changes = Vec::new();
        for (column, block) in row {
            let spot = Spot { column: *column, ..at };
            let mut change = vec![0; BLOCK_BYTES];
            self.read_in_place(geometry.offset(spot), &mut change, false)?;
            parity::add(&mut change, &block[..]);
            changes.push((*column, change));
        }
        let mut changed = Vec::new();
        for column in k..n {
            let spot = Spot { column, ..at };
            let member = &self.members[geometry.place(at.stripe, column)];
            if member.usable(at.stripe).is_none() {
                continue;
            }
            let mut bytes = vec![0; BLOCK_BYTES];
            if !self.read_column(spot, &mut bytes) {
                bytes = self.recovered(spot, &[column]).ok_or_else(|| {
                    let first = geometry.offset(at);
                    self.lost(("write", first, BLOCK_BYTES_U64), "its parity cannot be had")
                })?;
            }
            for (at, change) in &changes {
                let factor = if column == k { 1 } else { parity::power(*at) };
                parity::add_times(&mut bytes, change, factor);
            }
            changed.push((column, bytes));
        }
        Ok(changed)
    }

    /// Puts a record into the journal of each device that has one; durable when this returns.
    pub(super) fn append(&self, writer: &mut Writer, record: &Record) -> Result<(), DeviceError> {
        if self.without_journal.load(Ordering::Relaxed) {
            return Ok(());
        }
        let record = record.encode(self.id, writer.area.life, writer.area.next());
        let length = to_u64(record.len());
        let mut room = writer.area.take(length);
        if room.is_none() {
            self.flush_members();
            self.record(writer)?;
            let upto = writer.area.next();
            self.void(writer, upto)?;
            room = writer.area.take(length);
        }
        let Some((_, position)) = room else {
            return Err(self.break_with(("write", 0, length), "no room in an empty journal"));
        };
        let written = self.on_journals(|device| {
            device.write_durable_at(journal::record_offset(position), &record)
        });
        self.record(writer)?;
        if written == 0 {
            return Err(self.break_with(("write", 0, length), "no device took the journal"));
        }
        Ok(())
    }

    /// Calls `work` with each device that is in and has a journal; says how many did not fail.
    pub(super) fn on_journals(
        &self,
        work: impl Fn(&dyn Device) -> Result<(), DeviceError> + Sync,
    ) -> usize {
        let places = (0..self.geometry.journal_places())
            .filter(|place| self.members[*place].state() == MemberState::In);
        self.on_each(places, |_, device| work(device))
    }

    /// Voids the records before that number: what they name is in place and durable.
    pub(super) fn void(&self, writer: &mut Writer, upto: u64) -> Result<(), DeviceError> {
        if !writer.area.has_before(upto) {
            return Ok(());
        }
        let (first, position) = writer.area.void(upto);
        self.write_header(writer, first, position)
    }

    /// Writes the header of the journal on each device that has one, durably.
    pub(super) fn write_header(
        &self,
        writer: &mut Writer,
        first: u64,
        position: u64,
    ) -> Result<(), DeviceError> {
        let (life, counter) = (writer.area.life, writer.area.counter);
        let header = Header { array: self.id, life, counter, first, position };
        let record = header.encode();
        self.on_journals(|device| device.write_durable_at(header.offset(), &record));
        self.record(writer)
    }

    pub(super) fn flush_members(&self) {
        self.on_each(0..self.geometry.members, |_, device| device.flush());
    }

    pub(super) fn flush_all(&self) -> Result<(), DeviceError> {
        let upto = {
            let mut writer = self.lock();
            self.check_whole()?;
            self.settle(&mut writer)?;
            writer.area.next()
        };
        self.flush_members();
        let mut writer = self.lock();
        self.record(&mut writer)?;
        self.void(&mut writer, upto)
    }

    /// Rewrites a block of its own column, if what is there is still `seen`.
    pub(super) fn repair(
        &self,
        offset: u64,
        seen: &[u8],
        good: &[u8],
    ) -> Result<bool, DeviceError> {
        let spot = self.geometry.spot(offset);
        let fits = spot.within + to_u64(good.len()) <= self.geometry.chunk;
        if self.geometry.spare() == 0 || seen.len() != good.len() || !fits {
            return Ok(false);
        }
        let mut writer = self.lock();
        self.check_whole()?;
        let first = offset / BLOCK_BYTES_U64;
        let end = (offset + to_u64(good.len())).div_ceil(BLOCK_BYTES_U64);
        let held = |number| {
            self.pending.read().unwrap_or_else(PoisonError::into_inner).contains_key(&number)
        };
        let mut now = vec![0; good.len()];
        if (first..end).any(held) || !self.read_column(spot, &mut now) || now != seen {
            return Ok(false);
        }
        let member = &self.members[self.geometry.place(spot.stripe, spot.column)];
        let Some(device) = member.usable(spot.stripe) else { return Ok(false) };
        let written = {
            let _alone = self.in_place.write().unwrap_or_else(PoisonError::into_inner);
            device.write_at(self.geometry.on_member(spot.stripe, spot.within), good)
        };
        match &written {
            Ok(()) => {
                member.repaired.fetch_add(end - first, Ordering::Relaxed);
                tracing::warn!(device = %member.name(), offset, "rewrote what was not right");
            }
            Err(error) => member.fail(error),
        }
        self.record(&mut writer)?;
        Ok(written.is_ok())
    }
}
