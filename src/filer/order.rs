//! The one order of a source's entries: sequence number, CP and buffers under one lock.
//!
//! Called by `export` for each client request, by the feed that takes ordered entries to the
//! NVRAM, by `checkpoint` which freezes, and by `recover`. An entry gets its sequence number, its
//! CP, its effect on the open buffers and its place in the queue in one step, so the order in the
//! log is the order in the image.
//!
//! **Back-pressure.** Each entry is charged the most its record can take; records, and the memory
//! of dirty blocks, may each fill half of the ring's size. When the half is full the interval is
//! frozen; while a frozen one is still under way, writers wait in the order they came. They wait
//! as well while the pool could not take what is ordered (R18). Nobody is refused for lack of
//! room, and nothing is lost.
//!
//! Invariants: sequence numbers have no gap; all entries of one CP stand in the queue before the
//! freeze of that CP; at most one interval is frozen; the open charge never exceeds the half,
//! unless a refill brought it there. Figures are told before the lock is let go of, for a status that does
//! not take it.

mod pieces;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Notify;

use self::pieces::{Batch, cut, dirtied};
pub use self::pieces::{Change, DIRTY_BLOCK_BYTES, Former, Queued, charge, partition_bytes_min};
use super::buffers::{Buffers, Page};
use super::completion::Refusal;
use super::space::{Footprint, worst};
use crate::record::entry::{Entry, EntryKind};
use crate::record::envelope::record_bytes;
use crate::record::marks::FREEZE_BYTES_MAX;
use crate::record::transfer::Transfer;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{low_u32, to_u64, to_usize};
use crate::units::moment::{self, Changing, Moment, Shown};
use crate::units::numbers::{CpNumber, SequenceNumber, TransferId, VolumeNumber};
use crate::units::policy::OnFull;

/// What the order must know of a volume.
#[derive(Debug, Clone, Copy)]
pub struct VolumeShape {
    /// Its size.
    pub blocks: u64,
    /// Height of its tree.
    pub height: u8,
}

/// An interval that was cut off and is being checkpointed.
#[derive(Debug)]
pub struct Frozen {
    /// Its CP.
    pub cp: CpNumber,
    /// What its entries made.
    pub buffers: Buffers,
    /// Blocks and nodes it may take in the pool.
    pub space_blocks: u64,
    /// Its last entry.
    pub last: SequenceNumber,
    charge: u64,
    /// Blocks in its buffers.
    blocks: u64,
}

/// Why a refilled transfer cannot be taken over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    /// Its entries lie outside the volumes here.
    #[error(
        "transfer {transfer} writes to volume {volume}, bytes {offset} to {end}, which is not here"
    )]
    Range { transfer: TransferId, volume: VolumeNumber, offset: u64, end: u64 },
    /// Out of order.
    #[error("transfer {transfer} begins with {met}, wanted is {wanted}")]
    Sequence { transfer: TransferId, wanted: SequenceNumber, met: SequenceNumber },
    /// Its CP is behind the open one, or two CPs would be frozen at once.
    #[error("transfer {transfer} belongs to CP {met}, open is CP {open}")]
    Cp { transfer: TransferId, open: CpNumber, met: CpNumber },
    /// The NVRAM is smaller than it was.
    #[error("the refill does not fit the NVRAM: {wanted} bytes, {room} are left")]
    Room { wanted: u64, room: u64 },
}

/// Says whether the pool can take so many blocks beyond what is published.
pub type PoolTakes = Box<dyn Fn(u64) -> bool + Send + Sync>;

struct State {
    shapes: BTreeMap<VolumeNumber, VolumeShape>,
    next: SequenceNumber,
    open_cp: CpNumber,
    open: Buffers,
    open_charge: u64,
    footprint: Footprint,
    frozen: Option<Arc<Frozen>>,
    /// Blocks and nodes the frozen interval may still take of the pool.
    frozen_space: u64,
    queue: VecDeque<Queued>,
    /// Highest sequence number given out for each volume.
    last: BTreeMap<VolumeNumber, SequenceNumber>,
    refusal: Option<Refusal>,
    /// Writers wait: somebody is about to take over.
    held: bool,
    waiting: usize,
    lacking: Option<Lacking>,
    waits: u64,
    capacity: u64,
    partition_bytes: u64,
}

/// Figures for status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// Last sequence number given out.
    pub sequence: SequenceNumber,
    /// The CP that entries go to.
    pub open_cp: CpNumber,
    /// The CP under way.
    pub frozen_cp: Option<CpNumber>,
    /// What fills the open partition: records, or memory of dirty blocks if that is more.
    pub open_bytes: u64,
    /// What one partition may hold.
    pub partition_bytes: u64,
    /// Dirty blocks in memory.
    pub dirty_blocks: u64,
    /// Writers that wait for room.
    pub waiting: usize,
    /// What the last one that found no room lacked.
    pub lacking: Option<Lacking>,
    /// Entries that waited, since the start.
    pub waits: u64,
}

/// What there is no room in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lacking {
    /// Both partitions of the NVRAM are full.
    Nvram,
    /// The pool could not take it.
    Pool,
}

const FIGURES: usize = 9;

impl moment::Figures<FIGURES> for State {
    fn figures(&self) -> [u64; FIGURES] {
        let now = self.shown();
        let Figures { sequence, open_cp, frozen_cp, open_bytes, partition_bytes, .. } = now;
        let Figures { dirty_blocks, waiting, lacking, waits, .. } = now;
        [
            sequence.0,
            u64::from(open_cp.0),
            // No CP under way is one less than the first.
            frozen_cp.map_or(0, |cp| u64::from(cp.0) + 1),
            open_bytes,
            partition_bytes,
            dirty_blocks,
            to_u64(waiting),
            match lacking {
                None => 0,
                Some(Lacking::Nvram) => 1,
                Some(Lacking::Pool) => 2,
            },
            waits,
        ]
    }
}

impl Figures {
    fn of(figures: [u64; FIGURES]) -> Self {
        let [sequence, open_cp, frozen_cp, open_bytes, partition_bytes, ..] = figures;
        let [.., dirty_blocks, waiting, lacking, waits] = figures;
        Self {
            sequence: SequenceNumber(sequence),
            open_cp: CpNumber(low_u32(open_cp)),
            frozen_cp: frozen_cp.checked_sub(1).map(|cp| CpNumber(low_u32(cp))),
            open_bytes,
            partition_bytes,
            dirty_blocks,
            waiting: to_usize(waiting),
            lacking: match lacking {
                0 => None,
                1 => Some(Lacking::Nvram),
                _ => Some(Lacking::Pool),
            },
            waits,
        }
    }
}

/// The order of a source.
pub struct Order {
    state: Shown<State, Moment<FIGURES>>,
    /// Writers pass in the order they came; the one who waits holds it.
    gate: tokio::sync::Mutex<()>,
    /// Something was released.
    room: Notify,
    pool_takes: PoolTakes,
    on_full: OnFull,
    /// Called without the lock when the queue has something new.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Order").field("figures", &self.figures()).finish_non_exhaustive()
    }
}

impl Order {
    /// An order of nothing yet, over a ring whose size is told by [`Order::set_capacity`]. `wake`
    /// is called, without the lock, when something was queued.
    pub fn new(
        shapes: BTreeMap<VolumeNumber, VolumeShape>,
        pool_takes: PoolTakes,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Self {
        let state = State {
            shapes,
            next: SequenceNumber(1),
            open_cp: CpNumber(1),
            open: Buffers::default(),
            open_charge: 0,
            footprint: Footprint::default(),
            frozen: None,
            frozen_space: 0,
            queue: VecDeque::new(),
            last: BTreeMap::new(),
            refusal: None,
            held: false,
            waiting: 0,
            lacking: None,
            waits: 0,
            capacity: 0,
            partition_bytes: 0,
        };
        Self {
            state: Shown::new(state, Moment::default()),
            gate: tokio::sync::Mutex::new(()),
            room: Notify::new(),
            pool_takes,
            on_full: OnFull::Wait,
            wake,
        }
    }

    /// What a write gets for which there is no room in the pool, also behind a CP.
    #[must_use]
    pub fn on_full(self, on_full: OnFull) -> Self {
        Self { on_full, ..self }
    }

    /// Volumes have other shapes from now on: larger ones.
    pub fn grow(&self, shapes: BTreeMap<VolumeNumber, VolumeShape>) {
        self.lock().shapes = shapes;
    }

    /// Bytes of the ring, before anything new is ordered.
    pub fn set_capacity(&self, capacity: u64) {
        // Room for the freeze marks of both partitions beside their entries.
        let marks = 2 * record_bytes(to_u64(FREEZE_BYTES_MAX));
        let mut state = self.lock();
        state.capacity = capacity;
        state.partition_bytes = capacity.saturating_sub(marks) / 2;
        let (met, wanted) = (state.partition_bytes, partition_bytes_min());
        assert!(met >= wanted, "a partition of {met} bytes cannot take an entry of {wanted}");
    }

    /// Orders what a client asked for and returns the last sequence number it got; `None` if it
    /// asked for nothing (a trim of less than a block). Waits for room. The caller has checked
    /// the range.
    pub async fn change(
        &self,
        volume: VolumeNumber,
        offset: u64,
        change: &Change,
    ) -> Result<Option<SequenceNumber>, Refusal> {
        let mut last = None;
        for (entry, data) in cut(volume, offset, change) {
            last = Some(self.admit(entry, data).await?);
        }
        Ok(last)
    }

    async fn admit(&self, entry: Entry, data: Bytes) -> Result<SequenceNumber, Refusal> {
        // Trim and zeroes do not queue behind writers that wait for the pool: they make room.
        let _turn = match entry.kind {
            EntryKind::Write => Some(self.gate.lock().await),
            EntryKind::Trim | EntryKind::Zeroes => None,
        };
        let mut waits = None;
        loop {
            let mut released = std::pin::pin!(self.room.notified());
            released.as_mut().enable();
            let ordered = self.lock().try_order(self, &entry, &data)?;
            if let Some(sequence) = ordered {
                drop(waits);
                (self.wake)();
                return Ok(sequence);
            }
            // A freeze may have been queued.
            (self.wake)();
            waits.get_or_insert_with(|| Waiting::new(self));
            released.await;
        }
    }

    /// Cuts the open interval off, unless it is empty or another is under way. Returns the CP
    /// that is frozen then.
    pub fn freeze(&self) -> Option<CpNumber> {
        let (frozen, cp) = {
            let mut state = self.lock();
            (state.freeze(), state.frozen.as_ref().map(|frozen| frozen.cp))
        };
        if frozen {
            (self.wake)();
        }
        cp
    }

    /// Cuts the open interval off, be it empty, unless another is under way. Returns whether it did.
    pub fn freeze_anything(&self) -> bool {
        let cut = {
            let mut state = self.lock();
            let free = state.frozen.is_none();
            if free {
                let cp = state.open_cp;
                state.queue.push_back(Queued::Freeze(cp));
                state.cut_off();
            }
            free
        };
        if cut {
            (self.wake)();
        }
        cut
    }

    /// The interval under way.
    pub fn frozen(&self) -> Option<Arc<Frozen>> {
        self.lock().frozen.clone()
    }

    /// The frozen CP is done at both ends: its buffers go, writers go on.
    pub fn thaw(&self, cp: CpNumber) {
        let gone = self.lock().frozen.take_if(|frozen| frozen.cp == cp);
        assert!(gone.is_some(), "CP {cp} is done but was not frozen");
        self.room.notify_waiters();
        // The pages are freed without the lock.
        drop(gone);
    }

    /// Waits until no interval is frozen.
    pub async fn thawed(&self) {
        loop {
            let mut released = std::pin::pin!(self.room.notified());
            released.as_mut().enable();
            if self.lock().frozen.is_none() {
                return;
            }
            released.await;
        }
    }

    /// Blocks of the frozen interval that were known in part are whole now: their older pages,
    /// and the need to look below them, go.
    pub fn filled(&self, cp: CpNumber, blocks: &[(VolumeNumber, u64, Arc<Page>)]) {
        let frozen = self.frozen().filter(|frozen| frozen.cp == cp);
        let Some(before) = frozen.filter(|_| !blocks.is_empty()) else { return };
        let mut buffers = before.buffers.clone();
        for (volume, vbn, page) in blocks {
            buffers.fill(*volume, *vbn, Arc::clone(page));
        }
        let Frozen { cp, space_blocks, last, charge, .. } = *before;
        let blocks = buffers.blocks();
        let after = Arc::new(Frozen { cp, buffers, space_blocks, last, charge, blocks });
        // Only the checkpoint thread, which calls this, ends an interval.
        self.lock().frozen = Some(after);
    }

    /// The own tree of the frozen CP is published: what it took of the pool is taken, what it
    /// freed may be given out.
    pub fn settled(&self, cp: CpNumber) {
        let mut state = self.lock();
        if state.frozen.as_ref().is_some_and(|frozen| frozen.cp == cp) {
            state.frozen_space = 0;
        }
        drop(state);
        self.room.notify_waiters();
    }

    /// Asks for the room of what was recovered, as if it were ordered now.
    pub fn promise_recovered(&self) -> bool {
        let state = self.lock();
        (self.pool_takes)(state.frozen_space + state.space_blocks())
    }

    /// Writers that wait for room look again: others who use the pool may have made some.
    pub fn look_again(&self) {
        self.room.notify_waiters();
    }

    /// Writers wait, whatever room there is, or go on (R14: a hand-over may be given up).
    pub fn hold(&self, held: bool) {
        self.lock().held = held;
        self.room.notify_waiters();
    }

    /// Nothing is ordered any more; the first reason stays.
    pub fn refuse(&self, refusal: Refusal) {
        self.lock().refusal.get_or_insert(refusal);
        self.room.notify_waiters();
    }

    /// Where the open CP's number must at least be; counts only while nothing is in it (R6).
    pub fn raise_cp(&self, at_least: CpNumber) {
        let mut state = self.lock();
        if state.open.is_empty() && state.open_cp < at_least {
            state.open_cp = at_least;
        }
    }

    /// The CP that will hold everything ordered so far, unless that is published already.
    pub fn target(&self) -> Option<CpNumber> {
        let state = self.lock();
        let frozen = state.frozen.as_ref().map(|frozen| frozen.cp);
        if state.open.is_empty() { frozen } else { Some(state.open_cp) }
    }

    /// Whether nothing was ordered that is in no own CP, and none is under way.
    pub fn is_at_rest(&self) -> bool {
        self.target().is_none()
    }

    /// Highest sequence number given out for a volume: what a flush waits for (R17).
    pub fn last_of(&self, volume: VolumeNumber) -> SequenceNumber {
        self.lock().last.get(&volume).copied().unwrap_or_default()
    }

    /// Looks at the open buffers and the frozen interval at one moment.
    pub fn look<T>(&self, look: impl FnOnce(&Buffers, Option<&Arc<Frozen>>) -> T) -> T {
        let state = self.lock();
        look(&state.open, state.frozen.as_ref())
    }

    /// Replays a recovered transfer or adopts a refilled one: same order, same buffers. An
    /// adopted one goes to the ring as well.
    pub fn take_over(&self, transfer: &Transfer, adopt: bool) -> Result<(), AdoptError> {
        self.check_ranges(transfer)?;
        {
            let mut state = self.lock();
            let header = *transfer.header();
            if header.first_sequence != state.next {
                return Err(AdoptError::Sequence {
                    transfer: header.id,
                    wanted: state.next,
                    met: header.first_sequence,
                });
            }
            state.follow_cp(transfer, adopt)?;
            let wanted: u64 = transfer.entries().iter().map(charge).sum();
            let frozen = state.frozen.as_ref().map_or(0, |frozen| frozen.charge);
            let room = state.capacity.saturating_sub(frozen + state.open_charge);
            if adopt && wanted > room {
                return Err(AdoptError::Room { wanted, room });
            }
            for (entry, data) in transfer.iter() {
                state.apply(entry, data);
            }
            if adopt {
                state.queue.push_back(Queued::Adopted(Box::new(transfer.clone())));
            }
        }
        if adopt {
            (self.wake)();
        }
        Ok(())
    }

    /// Sets where the order goes on, before anything is replayed.
    pub fn resume(&self, last: SequenceNumber, open_cp: CpNumber) {
        let mut state = self.lock();
        assert!(state.open.is_empty() && state.frozen.is_none(), "resumed before anything else");
        state.next = last.next();
        state.open_cp = open_cp;
    }

    /// A recovered freeze: cuts the open interval off without queueing the mark again. An
    /// interval that was frozen before is done: no two are under way at once.
    pub fn replay_freeze(&self, cp: CpNumber) -> Result<(), AdoptError> {
        let mut state = self.lock();
        // Before a CP of nothing a number may have been passed over.
        let passed_over = state.open.is_empty() && cp > state.open_cp;
        if cp != state.open_cp && !passed_over {
            return Err(AdoptError::Cp {
                transfer: TransferId::NONE,
                open: state.open_cp,
                met: cp,
            });
        }
        state.open_cp = cp;
        state.frozen = None;
        state.cut_off();
        Ok(())
    }

    /// Takes queued entries for one group commit of at most `bytes_max` bytes of records. Stops
    /// behind a freeze, so that it is durable before a transfer of the next CP is formed.
    pub fn take(&self, bytes_max: u64) -> Vec<Queued> {
        let mut state = self.lock();
        let mut taken = Vec::new();
        let mut batch = Batch::new(bytes_max);
        while let Some(next) = state.queue.front() {
            if !batch.fits(next) {
                break;
            }
            let freeze = matches!(next, Queued::Freeze(_));
            taken.extend(state.queue.pop_front());
            if freeze {
                break;
            }
        }
        taken
    }

    /// Where it stands, behind everything that was ordered before this call. Waits for the lock.
    pub fn figures(&self) -> Figures {
        self.lock().shown()
    }

    /// The same for status: never waits.
    pub fn glance(&self) -> Figures {
        Figures::of(self.state.shown().read())
    }

    /// Its lock, for a test.
    #[cfg(test)]
    pub(super) fn own_lock(&self) -> &dyn moment::Lock {
        &self.state
    }

    fn check_ranges(&self, transfer: &Transfer) -> Result<(), AdoptError> {
        let state = self.lock();
        for entry in transfer.entries() {
            let shape = state.shapes.get(&entry.volume);
            let size = shape.map_or(0, |shape| shape.blocks * BLOCK_BYTES_U64);
            if entry.end() > size {
                return Err(AdoptError::Range {
                    transfer: transfer.id(),
                    volume: entry.volume,
                    offset: entry.offset,
                    end: entry.end(),
                });
            }
        }
        Ok(())
    }

    fn lock(&self) -> Changing<'_, State, Moment<FIGURES>> {
        self.state.lock()
    }
}

impl State {
    fn shown(&self) -> Figures {
        let (frozen, open) = (self.frozen.as_ref(), self.open.blocks());
        Figures {
            sequence: SequenceNumber(self.next.0 - 1),
            open_cp: self.open_cp,
            frozen_cp: frozen.map(|frozen| frozen.cp),
            open_bytes: self.open_charge.max(open * DIRTY_BLOCK_BYTES),
            partition_bytes: self.partition_bytes,
            dirty_blocks: open + frozen.map_or(0, |frozen| frozen.blocks),
            waiting: self.waiting,
            lacking: self.lacking.filter(|_| self.waiting > 0),
            waits: self.waits,
        }
    }

    /// Orders an entry if there is room; freezes if the partition is full and none is under way.
    fn try_order(
        &mut self,
        order: &Order,
        entry: &Entry,
        data: &Bytes,
    ) -> Result<Option<SequenceNumber>, Refusal> {
        if let Some(refusal) = &self.refusal {
            return Err(refusal.clone());
        }
        if self.held {
            return Ok(None);
        }
        let records = self.open_charge + charge(entry);
        let memory = (self.open.blocks() + dirtied(entry).1) * DIRTY_BLOCK_BYTES;
        if records.max(memory) > self.partition_bytes && !self.freeze() {
            self.lacking = Some(Lacking::Nvram);
            return Ok(None);
        }
        if entry.kind == EntryKind::Write && !self.pool_takes(order, entry) {
            // Overwritten blocks come free with a CP.
            let comes = self.freeze() || self.frozen.is_some();
            self.lacking = Some(Lacking::Pool);
            return match order.on_full {
                OnFull::Enospc if !comes => Err(Refusal::NoSpace),
                OnFull::Enospc | OnFull::Wait => Ok(None),
            };
        }
        let sequence = self.apply(entry, data);
        let queued = Queued::Entry { cp: self.open_cp, entry: *entry, data: data.clone() };
        self.queue.push_back(queued);
        Ok(Some(sequence))
    }

    fn pool_takes(&self, order: &Order, entry: &Entry) -> bool {
        let height = self.shapes.get(&entry.volume).map_or(0, |shape| shape.height);
        let wanted = worst(dirtied(entry).1, height);
        (order.pool_takes)(self.frozen_space + self.space_blocks() + wanted)
    }

    fn space_blocks(&self) -> u64 {
        self.open.blocks() + self.footprint.nodes()
    }

    fn apply(&mut self, entry: &Entry, data: &[u8]) -> SequenceNumber {
        let sequence = self.next;
        self.next = sequence.next();
        self.open.apply(entry, data);
        self.open_charge += charge(entry);
        self.last.insert(entry.volume, sequence);
        let height = self.shapes.get(&entry.volume).map_or(0, |shape| shape.height);
        let (first, count) = dirtied(entry);
        match entry.kind {
            EntryKind::Write => self.footprint.add(entry.volume, height, first, count),
            EntryKind::Trim | EntryKind::Zeroes => {
                let blocks = entry.end().div_ceil(BLOCK_BYTES_U64) - first;
                self.footprint.add_holes(entry.volume, height, first, blocks);
            }
        }
        sequence
    }

    fn freeze(&mut self) -> bool {
        if self.open.is_empty() || self.frozen.is_some() {
            return false;
        }
        self.queue.push_back(Queued::Freeze(self.open_cp));
        self.cut_off();
        true
    }

    fn cut_off(&mut self) {
        assert!(self.frozen.is_none(), "one interval is frozen at a time");
        self.frozen_space = self.space_blocks();
        self.footprint = Footprint::default();
        self.frozen = Some(Arc::new(Frozen {
            cp: self.open_cp,
            blocks: self.open.blocks(),
            buffers: std::mem::take(&mut self.open),
            space_blocks: self.frozen_space,
            last: SequenceNumber(self.next.0 - 1),
            charge: std::mem::take(&mut self.open_charge),
        }));
        self.open_cp = self.open_cp.next();
    }

    /// A refilled transfer of a later CP says that the source had frozen the open one before it;
    /// in the own ring the freeze itself says so.
    fn follow_cp(&mut self, transfer: &Transfer, adopt: bool) -> Result<(), AdoptError> {
        let (met, open) = (transfer.header().cp, self.open_cp);
        let cuts = met > open && !self.open.is_empty();
        if met < open || cuts && !(adopt && self.freeze()) {
            return Err(AdoptError::Cp { transfer: transfer.id(), open, met });
        }
        self.open_cp = met;
        Ok(())
    }
}

/// Counts a writer that waits, also when it is dropped.
struct Waiting<'a>(&'a Order);

impl<'a> Waiting<'a> {
    fn new(order: &'a Order) -> Self {
        let mut state = order.lock();
        state.waiting += 1;
        state.waits += 1;
        drop(state);
        Self(order)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
    }
}

#[cfg(test)]
mod tests;
