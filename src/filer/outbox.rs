//! The transfer table: every transfer this source holds, and where.
//!
//! A row is made when the feed forms a transfer, or when recovery finds one; it goes when its CP
//! is done at both ends. The forwarder sends from here, the plan of a CP takes its references
//! from here. Recent bodies stay in memory, older ones are read back from the ring.
//!
//! Invariants: rows stand in the order of the line, each directly behind the one before; a body
//! is dropped from memory only when the ring holds it durably; what is kept in memory beyond
//! that is at most [`RECENT_BYTES_MAX`]. Figures are told before the lock is let go of, for a status that does
//! not take it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Notify;

use super::plan::TransferRow;
use crate::metric::catalogue::ACK_SECONDS;
use crate::record::transfer::Transfer;
use crate::session::primary::Held;
use crate::units::convert::to_u64;
use crate::units::machine;
use crate::units::moment::{self, Changing, Moment, Shown};
use crate::units::numbers::{CpNumber, LogPosition, TransferId};

/// Bodies kept in memory although the ring has them.
pub const RECENT_BYTES_MAX: u64 = 16 << 20;

/// Rows of CPs made alone.
const HIDDEN_MAX: usize = 64;

/// Where the body of a transfer is.
#[derive(Debug, Clone)]
pub enum Body {
    /// In memory.
    Memory(Bytes),
    /// In the ring, in the record at this position.
    Ring(LogPosition),
}

/// Where a transfer came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Formed,
    Adopted,
    Recovered,
}

#[derive(Debug)]
struct Row {
    held: Held,
    origin: Origin,
    cp: CpNumber,
    /// Ordinal, counted through its CP, of its first whole block.
    first_ordinal: u64,
    ordinals: u64,
    /// Bytes of all transfers up to and with this one, since the start.
    upto_bytes: u64,
    since: Instant,
    /// Start of its record, once that is durable.
    position: Option<LogPosition>,
    body: Option<Bytes>,
}

/// How far the transfers got, in bytes since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ladder {
    /// Formed here.
    pub formed_bytes: u64,
    /// Durable here.
    pub durable_bytes: u64,
    /// Durable on the hub.
    pub hub_bytes: u64,
    /// Answered to clients.
    pub acknowledged_bytes: u64,
    /// In a CP that both ends have published.
    pub visible_bytes: u64,
}

/// What is shown of a transfer table; all of one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// How far the transfers got.
    pub ladder: Ladder,
    /// Since when the oldest one waits that no common CP has.
    pub oldest: Option<Instant>,
    /// Since when the oldest one waits that the hub does not hold.
    pub unstaged: Option<Instant>,
    /// Transfers that are held.
    pub rows: u64,
    /// Bytes of all bodies in memory.
    pub memory_bytes: u64,
}

/// CPs made alone that the image does not show, newest of some and since when their oldest waits.
#[derive(Debug)]
struct Hidden {
    cp: CpNumber,
    upto_bytes: u64,
    since: Instant,
}

#[derive(Debug)]
struct State {
    /// Times are told as time since then.
    begun: Instant,
    /// But for what was answered, which is counted without the lock.
    ladder: Ladder,
    /// Since when the oldest transfer waits that the hub does not hold.
    unstaged: Option<Instant>,
    /// Bytes of bodies in memory.
    memory_bytes: u64,
    /// The last transfer that is durable here.
    own_durable: TransferId,
    rows: VecDeque<Row>,
    /// What went with CPs made alone; two neighbours are one if there are too many.
    hidden: VecDeque<Hidden>,
    /// Rows that the forwarder has been told of.
    told: usize,
    /// Bytes of bodies in memory that the ring has as well.
    recent_bytes: u64,
    /// Rows before this have no such body.
    recent_from: usize,
}

const FIGURES: usize = 8;

impl moment::Figures<FIGURES> for State {
    fn figures(&self) -> [u64; FIGURES] {
        // 0 is no time.
        let told = |at: Instant| {
            let since = at.saturating_duration_since(self.begun).as_nanos();
            u64::try_from(since).map_or(u64::MAX, |since| since.saturating_add(1))
        };
        let Ladder { formed_bytes, durable_bytes, hub_bytes, visible_bytes, .. } = self.ladder;
        let oldest = self.hidden.front().map(|hidden| hidden.since);
        let oldest = oldest.or_else(|| self.rows.front().map(|row| row.since));
        let [oldest, unstaged] = [oldest, self.unstaged].map(|at| at.map_or(0, told));
        let rows = to_u64(self.rows.len());
        let memory = self.memory_bytes;
        [formed_bytes, durable_bytes, hub_bytes, visible_bytes, oldest, unstaged, rows, memory]
    }
}

/// The transfer table.
#[derive(Debug)]
pub struct Outbox {
    state: Shown<State, Moment<FIGURES>>,
    begun: Instant,
    /// Bytes ever said to be answered to clients.
    answered_bytes: AtomicU64,
    /// A row was added.
    formed: Notify,
    /// A handle, so that recording takes no lock.
    ack_seconds: metrics::Histogram,
}

impl Default for Outbox {
    fn default() -> Self {
        let ack_seconds = metrics::histogram!(ACK_SECONDS.name);
        let begun = machine::now();
        let state = Shown::new(State::new(begun), Moment::default());
        let answered_bytes = AtomicU64::new(0);
        Self { state, begun, answered_bytes, formed: Notify::new(), ack_seconds }
    }
}

impl Outbox {
    /// Adds a transfer that was formed just now. Its body stays in memory until the ring has it.
    pub fn push(&self, transfer: &Transfer) {
        self.lock().push(transfer, Origin::Formed, None);
        self.formed.notify_one();
    }

    /// Adds a transfer that the hub sent: the session knows it already (R1).
    pub fn adopted(&self, transfer: &Transfer) {
        self.lock().push(transfer, Origin::Adopted, None);
    }

    /// Adds a transfer that was found in the ring. The session is made with it.
    pub fn recovered(&self, transfer: &Transfer, position: LogPosition) {
        let mut state = self.lock();
        state.push(transfer, Origin::Recovered, Some(position));
        state.told = state.rows.len();
    }

    /// The record of that transfer is durable at `position`.
    pub fn durable(&self, id: TransferId, position: LogPosition) {
        let mut state = self.lock();
        let Some(at) = state.find(id) else { panic!("transfer {id} is durable and not held") };
        state.rows[at].position = Some(position);
        let bytes = state.rows[at].body.as_ref().map_or(0, |body| to_u64(body.len()));
        state.ladder.durable_bytes = state.rows[at].upto_bytes;
        state.own_durable = id;
        state.recent_bytes += bytes;
        state.shed();
    }

    /// The last transfer that became durable here since the start, or was found so.
    pub fn own_durable(&self) -> TransferId {
        self.lock().own_durable
    }

    /// The hub holds everything up to that transfer.
    pub fn acknowledged(&self, id: TransferId) {
        let mut state = self.lock();
        if let Some(at) = state.find(id) {
            let before = state.ladder.hub_bytes;
            let from = state.rows.partition_point(|row| row.upto_bytes <= before);
            if from <= at {
                let new = state.rows.range(from..=at).filter(|row| row.origin == Origin::Formed);
                new.for_each(|row| self.ack_seconds.record(machine::elapsed(row.since)));
            }
            state.ladder.hub_bytes = before.max(state.rows[at].upto_bytes);
            state.find_unstaged();
        }
    }

    /// Rows added since the last call, in order.
    pub fn take_formed(&self) -> Vec<Held> {
        let mut state = self.lock();
        let told = state.told;
        state.told = state.rows.len();
        let new = state.rows.range(told..).filter(|row| row.origin == Origin::Formed);
        new.map(|row| row.held).collect()
    }

    /// Waits until a row was added; may return without one.
    pub async fn formed(&self) {
        self.formed.notified().await;
    }

    /// Where the body of a held transfer is.
    pub fn body(&self, id: TransferId) -> Option<Body> {
        let state = self.lock();
        let row = &state.rows[state.find(id)?];
        match (&row.body, row.position) {
            (Some(body), _) => Some(Body::Memory(body.clone())),
            (None, Some(position)) => Some(Body::Ring(position)),
            (None, None) => panic!("the body of transfer {id} is nowhere"),
        }
    }

    /// The transfers of a CP, for references.
    pub fn rows_of(&self, cp: CpNumber) -> Arc<[TransferRow]> {
        let state = self.lock();
        let of_cp = state.rows.iter().filter(|row| row.cp == cp);
        let row = |row: &Row| TransferRow {
            id: row.held.place.transfer,
            first_ordinal: row.first_ordinal,
        };
        of_cp.map(row).collect()
    }

    /// Drops the rows up to and with that CP; they are released. One that was made `alone` is not
    /// in the hub's image: what it held counts until [`Outbox::published`].
    pub fn drop_upto(&self, cp: CpNumber, alone: bool) {
        let mut state = self.lock();
        let mut hidden: Option<Hidden> = None;
        while state.rows.front().is_some_and(|row| row.cp <= cp) {
            let Some(row) = state.rows.pop_front() else { break };
            let since = hidden.map_or(row.since, |older| older.since);
            hidden = Some(Hidden { cp, upto_bytes: row.upto_bytes, since });
            let body = row.body.as_ref().map_or(0, |body| to_u64(body.len()));
            state.memory_bytes -= body;
            if row.position.is_some() {
                state.recent_bytes -= body;
            }
            state.told = state.told.saturating_sub(1);
            state.recent_from = state.recent_from.saturating_sub(1);
        }
        state.hidden.extend(hidden);
        if alone {
            state.merge_hidden();
        } else {
            state.published(cp);
        }
        state.find_unstaged();
    }

    /// The hub's image shows that CP.
    pub fn published(&self, cp: CpNumber) {
        let mut state = self.lock();
        state.published(cp);
        state.find_unstaged();
    }

    /// All rows, for the session's start.
    pub fn all(&self) -> Vec<Held> {
        self.lock().rows.iter().map(|row| row.held).collect()
    }

    /// What is shown; never waits. `answered` says how many bytes of the ladder were answered to clients.
    pub fn figures(&self, answered: impl FnOnce(&Ladder) -> u64) -> Figures {
        // Asked for first: whoever has raised it did so for a ladder that was not above the one read next.
        let before = self.answered_bytes.load(Ordering::Acquire);
        let [formed_bytes, durable_bytes, hub_bytes, visible_bytes, rest @ ..] =
            self.state.shown().read();
        let [oldest, unstaged, rows, memory_bytes] = rest;
        let ladder =
            Ladder { formed_bytes, durable_bytes, hub_bytes, visible_bytes, ..Ladder::default() };
        // What was answered stays answered, whatever is asked for from now on.
        let acknowledged_bytes = before.max(answered(&ladder));
        self.answered_bytes.fetch_max(acknowledged_bytes, Ordering::AcqRel);
        let time =
            |told: u64| told.checked_sub(1).map(|since| self.begun + Duration::from_nanos(since));
        Figures {
            ladder: Ladder { acknowledged_bytes, ..ladder },
            oldest: time(oldest),
            unstaged: time(unstaged),
            rows,
            memory_bytes,
        }
    }

    /// Its lock, for a test.
    #[cfg(test)]
    pub(super) fn own_lock(&self) -> &dyn moment::Lock {
        &self.state
    }

    fn lock(&self) -> Changing<'_, State, Moment<FIGURES>> {
        self.state.lock()
    }
}

impl State {
    fn new(begun: Instant) -> Self {
        Self {
            begun,
            ladder: Ladder::default(),
            unstaged: None,
            memory_bytes: 0,
            own_durable: TransferId::default(),
            rows: VecDeque::new(),
            hidden: VecDeque::new(),
            told: 0,
            recent_bytes: 0,
            recent_from: 0,
        }
    }

    /// The first row behind what the hub holds, released alone or not. Asked for when the hub holds more, or
    /// rows go; a new row is it only if there was none.
    fn find_unstaged(&mut self) {
        let on_hub = self.ladder.hub_bytes;
        let hidden = self.hidden.iter().find(|hidden| hidden.upto_bytes > on_hub);
        let row = self.rows.partition_point(|row| row.upto_bytes <= on_hub);
        let row = || self.rows.get(row).map(|row| row.since);
        self.unstaged = hidden.map(|hidden| hidden.since).or_else(row);
    }

    fn push(&mut self, transfer: &Transfer, origin: Origin, position: Option<LogPosition>) {
        let header = transfer.header();
        let place = transfer.place();
        let first_ordinal = match self.rows.back() {
            Some(last) if last.cp == header.cp => last.first_ordinal + last.ordinals,
            _ => 0,
        };
        self.ladder.formed_bytes += to_u64(transfer.bytes().len());
        if position.is_some() {
            self.own_durable = header.id;
            self.ladder.durable_bytes = self.ladder.formed_bytes;
        }
        let since = machine::now();
        self.unstaged.get_or_insert(since);
        if position.is_none() {
            self.memory_bytes += to_u64(transfer.bytes().len());
        }
        self.rows.push_back(Row {
            upto_bytes: self.ladder.formed_bytes,
            since,
            held: Held { place, bytes: to_u64(transfer.bytes().len()) },
            origin,
            cp: header.cp,
            first_ordinal,
            ordinals: transfer.ordinals(),
            position,
            body: if position.is_none() { Some(transfer.bytes().clone()) } else { None },
        });
    }

    /// Nothing up to that CP waits any more.
    fn published(&mut self, cp: CpNumber) {
        let ladder = &mut self.ladder;
        while let Some(shown) = self.hidden.pop_front_if(|hidden| hidden.cp <= cp) {
            ladder.visible_bytes = shown.upto_bytes;
        }
        // An image that was brought up has what was never forwarded.
        ladder.hub_bytes = ladder.hub_bytes.max(ladder.visible_bytes);
    }

    fn merge_hidden(&mut self) {
        if self.hidden.len() <= HIDDEN_MAX {
            return;
        }
        if let (Some(older), Some(newer)) = (self.hidden.pop_front(), self.hidden.pop_front()) {
            self.hidden.push_front(Hidden { since: older.since, ..newer });
        }
    }

    fn find(&self, id: TransferId) -> Option<usize> {
        self.rows.binary_search_by(|row| row.held.place.transfer.cmp(&id)).ok()
    }

    /// Forgets the oldest bodies that the ring has.
    fn shed(&mut self) {
        while self.recent_bytes > RECENT_BYTES_MAX {
            let Some(row) = self.rows.get_mut(self.recent_from) else { return };
            if row.position.is_none() {
                return;
            }
            self.recent_from += 1;
            if let Some(body) = row.body.take() {
                self.recent_bytes -= to_u64(body.len());
                self.memory_bytes -= to_u64(body.len());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::entry::{Entry, EntryKind};
    use crate::record::transfer::{Builder, TransferHeader};
    use crate::units::hash::{StreamHash, crc32c};
    use crate::units::numbers::{SequenceNumber, VolumeNumber};

    fn transfer(counter: u64, cp: u32, length: u32) -> Transfer {
        let data = Bytes::from(vec![7; usize::try_from(length).unwrap()]);
        let entry = Entry {
            kind: EntryKind::Write,
            volume: VolumeNumber(0),
            offset: 0,
            length,
            crc: crc32c(&data),
        };
        let mut builder = Builder::default();
        builder.push(entry, data);
        builder.finish(TransferHeader {
            id: TransferId { generation: 1, counter },
            cp: CpNumber(cp),
            partition: 0,
            first_sequence: SequenceNumber(counter),
            previous: TransferId { generation: 1, counter: counter - 1 },
            hash_before: StreamHash::ZERO,
            own_durable: TransferId::NONE,
        })
    }

    fn id(counter: u64) -> TransferId {
        TransferId { generation: 1, counter }
    }

    fn none(_: &Ladder) -> u64 {
        0
    }

    fn unstaged(outbox: &Outbox) -> Option<Instant> {
        let told = outbox.figures(none).unstaged;
        let mut state = outbox.lock();
        let kept = state.unstaged;
        state.find_unstaged();
        assert_eq!((kept, told), (state.unstaged, state.unstaged), "not the oldest");
        told
    }

    /// The oldest that the hub does not hold is the first behind what it has answered.
    #[test]
    fn what_the_hub_does_not_hold_has_an_age() {
        let outbox = Outbox::default();
        assert_eq!(unstaged(&outbox), None);
        for counter in 1..=3_u64 {
            outbox.push(&transfer(counter, 1, 100));
        }
        let since = |at: usize| Some(outbox.lock().rows[at].since);
        assert_eq!(unstaged(&outbox), since(0));
        outbox.acknowledged(id(2));
        assert_eq!(unstaged(&outbox), since(2));
        outbox.acknowledged(id(1));
        assert_eq!(unstaged(&outbox), since(2), "an answer that comes late takes none back");
        outbox.acknowledged(id(3));
        assert_eq!(unstaged(&outbox), None);
        // Released alone, it waits on.
        outbox.drop_upto(CpNumber(1), false);
        outbox.push(&transfer(4, 2, 100));
        let waits = since(0);
        outbox.drop_upto(CpNumber(2), true);
        assert_eq!(unstaged(&outbox), waits);
        outbox.published(CpNumber(2));
        assert_eq!(unstaged(&outbox), None);
    }

    #[test]
    fn ordinals_count_through_a_cp_and_start_again() {
        let outbox = Outbox::default();
        for (counter, cp, length) in [(1, 1, 8192), (2, 1, 100), (3, 1, 4096), (4, 2, 4096)] {
            outbox.push(&transfer(counter, cp, length));
        }
        let row = |counter, first_ordinal| TransferRow { id: id(counter), first_ordinal };
        assert_eq!(outbox.rows_of(CpNumber(1))[..], [row(1, 0), row(2, 2), row(3, 2)]);
        assert_eq!(outbox.rows_of(CpNumber(2))[..], [row(4, 0)]);
        assert_eq!(outbox.take_formed().len(), 4);
        outbox.drop_upto(CpNumber(1), false);
        assert!(outbox.body(id(3)).is_none());
        outbox.push(&transfer(5, 2, 4096));
        assert_eq!(outbox.take_formed()[0].place.transfer, id(5));
        assert_eq!(outbox.rows_of(CpNumber(2))[..], [row(4, 0), row(5, 1)]);
    }

    /// What CPs alone have released is not visible: it counts, and is as old as its oldest write.
    #[test]
    fn what_was_released_alone_waits_for_the_image() {
        let outbox = Outbox::default();
        let all = |ladder: &Ladder| ladder.durable_bytes;
        for counter in 1..=200_u64 {
            let cp = CpNumber(u32::try_from(counter).unwrap());
            outbox.push(&transfer(counter, cp.0, 100));
            outbox.durable(id(counter), LogPosition(counter * 512));
            outbox.drop_upto(cp, true);
        }
        let Figures { ladder, oldest, .. } = outbox.figures(all);
        assert_eq!((ladder.visible_bytes, ladder.acknowledged_bytes), (0, ladder.formed_bytes));
        let each = ladder.formed_bytes / 200;
        assert!(outbox.lock().hidden.len() <= HIDDEN_MAX, "memory goes with the time alone");
        // The image is at a CP in the middle: what lies behind it waits, and is younger.
        outbox.published(CpNumber(190));
        let Figures { ladder, oldest: rest, .. } = outbox.figures(all);
        assert_eq!(ladder.visible_bytes, 190 * each);
        assert_eq!(ladder.hub_bytes, 190 * each);
        assert!(rest.unwrap() > oldest.unwrap());
        outbox.published(CpNumber(200));
        let Figures { ladder, oldest: rest, .. } = outbox.figures(none);
        assert_eq!((ladder.visible_bytes, rest), (ladder.formed_bytes, None));
        assert_eq!(ladder.acknowledged_bytes, ladder.formed_bytes, "taken back");
    }

    /// Only what the ring has is forgotten, oldest first, and memory stays bounded.
    #[test]
    fn old_bodies_are_read_from_the_ring() {
        let outbox = Outbox::default();
        let each = 256 << 10;
        for counter in 1..=100_u64 {
            outbox.push(&transfer(counter, 1, each));
        }
        assert!(matches!(outbox.body(id(1)), Some(Body::Memory(_))), "not durable yet");
        for counter in 1..=99_u64 {
            outbox.durable(id(counter), LogPosition(counter * 512));
        }
        assert!(matches!(outbox.body(id(1)), Some(Body::Ring(LogPosition(512)))));
        assert!(matches!(outbox.body(id(99)), Some(Body::Memory(_))));
        assert!(matches!(outbox.body(id(100)), Some(Body::Memory(_))));
        let Figures { rows, memory_bytes, .. } = outbox.figures(none);
        assert_eq!(rows, 100);
        assert!(memory_bytes <= RECENT_BYTES_MAX + (300 << 10));
        let state = outbox.lock();
        let bodies = state.rows.iter().filter_map(|row| row.body.as_ref());
        assert_eq!(memory_bytes, bodies.map(|body| to_u64(body.len())).sum::<u64>(), "miscounted");
        drop(state);
        outbox.drop_upto(CpNumber(1), false);
        let Figures { rows, memory_bytes, .. } = outbox.figures(none);
        assert_eq!((rows, memory_bytes), (0, 0));
    }
}
