//! A source's log as a layer over its image: what clients read while it is being applied.
//!
//! Made by a failover (`failover::behind`) out of the walk that checks the log, so that the log is
//! read once before the first client is served: the headers become an [`Index`], the data stays in
//! the log and is read on demand, each entry checked against its CRC again (invariant 11). What is
//! damaged is an error that names the file and the offset.
//!
//! Memory: [`OVERLAY_EXTENTS_MAX`] ranges for one source,
//! [`OVERLAY_EXTENTS_TOTAL`] for all of a hub, of at most
//! [`OVERLAY_EXTENT_BYTES`](crate::limits::OVERLAY_EXTENT_BYTES) each, and 16 bytes a transfer. A
//! log that makes more is served when it is applied, and the failover says so.

pub mod index;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use self::index::{Found, Full, Index, Place as InLog};
use super::replay::{Chain, Extent, ReplayError};
use crate::filer::beneath::{Beneath, BeneathError};
use crate::filer::buffers::{Found as Piecewise, Page, Piece};
use crate::filer::ranges::RangeSet;
use crate::limits::{OVERLAY_EXTENTS_MAX, OVERLAY_EXTENTS_TOTAL};
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::sourcelog::LogReader;
use crate::units::convert::{to_usize, u32_to_usize};
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

/// Ranges that an overlay asks for at once.
const STEP: u64 = 4096;

const _: () = assert!(OVERLAY_EXTENTS_MAX + STEP <= OVERLAY_EXTENTS_TOTAL);

/// Ranges that the overlays of a hub may hold together.
#[derive(Debug)]
pub struct Room(AtomicU64);

impl Default for Room {
    fn default() -> Self {
        Self(AtomicU64::new(OVERLAY_EXTENTS_TOTAL))
    }
}

impl Room {
    /// Ranges nobody has.
    pub fn left(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Takes so many, if they are there.
    pub fn take(&self, ranges: u64) -> bool {
        let less = |left: u64| left.checked_sub(ranges);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    /// Gives some back.
    pub fn give(&self, ranges: u64) {
        self.0.fetch_add(ranges, Ordering::Relaxed);
    }
}

/// What of the room one overlay has taken.
#[derive(Debug)]
struct Share {
    room: Arc<Room>,
    taken: u64,
}

impl Share {
    fn covers(&mut self, ranges: u64) -> bool {
        while self.taken < ranges {
            if !self.room.take(STEP) {
                return false;
            }
            self.taken += STEP;
        }
        true
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.room.give(self.taken);
    }
}

/// An overlay that is being made.
#[derive(Debug)]
pub struct Builder {
    index: Index,
    share: Share,
    /// The image, where it begins.
    base: Place,
    reached: Place,
    /// Volumes whose entries do not count (R20).
    left_out: BTreeSet<VolumeNumber>,
    /// CPs of the logs that were met, as the index numbers them.
    logs: Vec<CpNumber>,
    extent: Extent,
    full: Option<Full>,
}

impl Builder {
    /// Of what lies behind `base`, but for entries of the volumes that are left out.
    pub fn new(room: &Arc<Room>, base: Place, left_out: BTreeSet<VolumeNumber>) -> Self {
        let share = Share { room: Arc::clone(room), taken: 0 };
        let (index, logs, extent) = Default::default();
        Self { index, share, base, reached: base, left_out, logs, extent, full: None }
    }

    /// Where it begins.
    pub fn base(&self) -> Place {
        self.base
    }

    /// Reads and checks the log up to `upto`, from where it is on. `goes_on` is asked after each
    /// transfer. After an error what was reached is what is sound.
    pub fn read(
        &mut self,
        chain: &Chain<'_>,
        upto: Place,
        mut goes_on: impl FnMut() -> bool,
    ) -> Result<(), ReplayError> {
        let chain = Chain { from: self.reached, ..*chain };
        chain.walk(upto, |at, transfer| {
            self.extent.add(transfer);
            self.reached = transfer.place();
            self.index(at, transfer);
            if goes_on() { Ok(()) } else { Err(ReplayError::Stopped) }
        })
    }

    /// What was read.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    fn index(&mut self, (cp, transfer): (CpNumber, usize), read: &Transfer) {
        if self.full.is_some() {
            return;
        }
        if self.logs.last() != Some(&cp) {
            self.logs.push(cp);
        }
        let log = self.logs.len() - 1;
        let full = Full { most: OVERLAY_EXTENTS_MAX };
        let (Ok(log), Ok(transfer)) = (u16::try_from(log), u32::try_from(transfer)) else {
            self.give_up(full);
            return;
        };
        for (entry, of) in (0..).zip(read.entries()) {
            if self.left_out.contains(&of.volume) {
                continue;
            }
            let added = self.index.add(of, InLog { log, transfer, entry });
            if added.is_err() || !self.share.covers(self.index.ranges()) {
                self.give_up(full);
                return;
            }
        }
    }

    /// The memory is others' again.
    fn give_up(&mut self, full: Full) {
        self.full = Some(full);
        self.index = Index::default();
        self.share.room.give(std::mem::take(&mut self.share.taken));
    }

    /// The overlay, over readers of the logs that were read; `reader` opens one.
    pub fn finish<E>(
        self,
        reader: impl FnMut(CpNumber) -> Result<LogReader, E>,
    ) -> Result<Result<Overlay, Full>, E> {
        let Self { index, share, logs, full, .. } = self;
        if let Some(full) = full {
            return Ok(Err(full));
        }
        let logs = logs.into_iter().map(reader).collect::<Result<_, _>>()?;
        Ok(Ok(Overlay { index, logs, _share: share }))
    }
}

/// A log as a layer.
#[derive(Debug)]
pub struct Overlay {
    index: Index,
    logs: Vec<LogReader>,
    _share: Share,
}

/// What is known of one block.
struct Block {
    page: Arc<Page>,
    known: RangeSet,
    data: bool,
}

impl Block {
    fn found(self) -> Piecewise {
        let Self { page, known, data } = self;
        if !known.covers(0, BLOCK_BYTES_U64) {
            Piecewise::Overlay { data: page.into(), known }
        } else if data {
            Piecewise::Data(page.into())
        } else {
            Piecewise::Hole
        }
    }
}

/// The pieces of a range, as they are put together.
struct Pieces {
    out: Vec<Piece>,
    /// The first block that is not told of yet.
    next: u64,
    /// The block under construction.
    open: Option<(u64, Block)>,
    /// What a block begins with; copied only when something is put into it.
    blank: Arc<Page>,
}

impl Pieces {
    fn push(&mut self, vbn: u64, count: u64, found: Piecewise) {
        if self.next < vbn {
            self.out.push(Piece { vbn: self.next, count: vbn - self.next, found: Piecewise::Base });
        }
        if count > 0 {
            self.out.push(Piece { vbn, count, found });
        }
        self.next = vbn + count;
    }

    fn close(&mut self) {
        if let Some((vbn, block)) = self.open.take() {
            self.push(vbn, 1, block.found());
        }
    }

    /// The block that a part of it is known of.
    fn block(&mut self, vbn: u64) -> &mut Block {
        if self.open.as_ref().is_some_and(|(open, _)| *open != vbn) {
            self.close();
        }
        let blank = &self.blank;
        let new = || Block { page: Arc::clone(blank), known: RangeSet::default(), data: false };
        &mut self.open.get_or_insert_with(|| (vbn, new())).1
    }

    fn end(mut self, behind: u64) -> Vec<Piece> {
        self.close();
        self.push(behind, 0, Piecewise::Base);
        self.out
    }
}

impl Overlay {
    fn build(
        &self,
        volume: VolumeNumber,
        (vbn, count): (u64, u64),
        mut read: impl FnMut(InLog, (u64, u64), &mut Arc<Page>, usize) -> Result<(), BeneathError>,
    ) -> Result<Vec<Piece>, BeneathError> {
        let (start, end) = (vbn * BLOCK_BYTES_U64, (vbn + count) * BLOCK_BYTES_U64);
        let blank = Arc::new([0; BLOCK_BYTES]);
        let mut pieces = Pieces { out: Vec::new(), next: vbn, open: None, blank };
        for (mut at, until, found) in self.index.within(volume, start, end) {
            let begun = at;
            while at < until {
                let here = at / BLOCK_BYTES_U64;
                let inside = at % BLOCK_BYTES_U64;
                if inside == 0 && found == Found::Zero && until - at >= BLOCK_BYTES_U64 {
                    let holes = (until - at) / BLOCK_BYTES_U64;
                    pieces.close();
                    pieces.push(here, holes, Piecewise::Hole);
                    at += holes * BLOCK_BYTES_U64;
                    continue;
                }
                let stop = until.min((here + 1) * BLOCK_BYTES_U64);
                let block = pieces.block(here);
                block.known.insert(inside, inside + (stop - at));
                if let Found::Data { place, skip } = found {
                    let from = u64::from(skip) + (at - begun);
                    block.data = true;
                    read(place, (from, stop - at), &mut block.page, to_usize(inside))?;
                }
                at = stop;
            }
        }
        Ok(pieces.end(vbn + count))
    }

    /// Copies `length` bytes of an entry's data, from `from` on, into a page at `at`.
    fn copy(
        &self,
        place: InLog,
        (from, length): (u64, u64),
        page: &mut Arc<Page>,
        at: usize,
    ) -> Result<(), BeneathError> {
        let InLog { log, transfer, entry } = place;
        let Some(reader) = self.logs.get(usize::from(log)) else {
            return Err(BeneathError(format!("there is no log {log}").into()));
        };
        let data = reader
            .entry(u32_to_usize(transfer), usize::from(entry))
            .map_err(|error| BeneathError(error.to_string().into()))?;
        let length = to_usize(length);
        let part = data.get(to_usize(from)..).and_then(|rest| rest.get(..length));
        let Some(part) = part else {
            let met = data.len();
            let what = format!("entry {entry} of transfer {transfer} ends after {met} bytes");
            return Err(BeneathError(what.into()));
        };
        Arc::make_mut(page)[at..at + length].copy_from_slice(part);
        Ok(())
    }
}

impl Beneath for Overlay {
    fn pieces(
        &self,
        volume: VolumeNumber,
        vbn: u64,
        count: u64,
    ) -> Result<Vec<Piece>, BeneathError> {
        self.build(volume, (vbn, count), |place, range, page, at| self.copy(place, range, page, at))
    }

    fn shape(&self, volume: VolumeNumber, vbn: u64, count: u64) -> Vec<Piece> {
        let built = self.build(volume, (vbn, count), |_, _, _, _| Ok(()));
        built.unwrap_or_default()
    }
}

impl Overlay {
    /// Ranges it holds, and bytes of memory they take at most.
    pub fn memory_bytes(&self) -> u64 {
        let tables: u64 = self.logs.iter().map(LogReader::table_bytes).sum();
        tables + self.index.ranges() * crate::limits::OVERLAY_EXTENT_BYTES
    }

    /// Blocks that hold data of it.
    pub fn blocks(&self) -> u64 {
        self.index.blocks()
    }
}
