//! The drainer: moves durable records from the ring into the source logs and gives ring room back.
//!
//! One thread, in ring order, never waiting for one source (R10): a record of a faulted source is
//! passed over, and copied forward to the head of the ring when it would hold the ring's end. Log
//! writes are not synced at once; when ring room is wanted, because half of the ring is used or a
//! source has used its share of it, one sync makes all dirty logs durable and the ring moves on. A
//! log whose CP was published before that is never synced. The log of a loud source ([`loud`]), who
//! will not get there, is written as it comes, and synced before a start would have much to read. A
//! source with `ack = "filed"` waits for the sync: it comes behind each batch that was drained for
//! one.
//!
//! A record that cannot be read when it should be copied is lost: its source is told so by name,
//! and the ring goes on without it.
//!
//! Invariant 4: the ring is released up to a record only when that record's log is synced, its
//! CP is published, it was copied forward durably, or it was found unreadable.

mod loud;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use self::loud::{Loud, WRITEBACK_BYTES_MIN};
use super::lane::{Fenced, Lane, lock};
use super::stager::{Staged, Stager, fence_record_bytes};
use crate::metric::catalogue::DRAIN_SECONDS;
use crate::record::transfer::Transfer;
use crate::sourcelog::{Appended, LogStore};
use crate::units::ids::SourceId;
use crate::units::machine::{self, Bell};
use crate::units::numbers::{CpNumber, Epoch, LogPosition, SequenceNumber, TransferId};

/// A record of the ring.
#[derive(Debug)]
pub enum Record {
    /// The transfer and whose it is.
    Transfer(Staged),
    /// A fence of that source: it stays until the catalog has its epoch.
    Fence(Arc<Lane>),
}

/// A durable record that waits for the drainer.
#[derive(Debug)]
pub struct Drainable {
    /// What it is.
    pub record: Record,
    /// Ring position behind its record.
    pub end: LogPosition,
    /// When it was durable.
    pub since: Instant,
}

#[derive(Debug, Default)]
struct Inbox {
    records: VecDeque<Drainable>,
    drops: Vec<(Arc<Lane>, CpNumber)>,
    /// Sources without credit, told when room comes back. Each at most once.
    without_room: BTreeMap<SourceId, Arc<Lane>>,
    /// One of them waits for room of the ring.
    room_wanted: bool,
    sync_wanted: bool,
    stopping: bool,
    failed: bool,
}

/// What the drainer is asked to do. Bounded by the ring: each record lies in it.
#[derive(Debug, Default)]
pub struct DrainQueue {
    inbox: Mutex<Inbox>,
    wake: Bell,
}

impl DrainQueue {
    /// An empty queue.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// A record is durable.
    pub fn push(&self, record: Drainable) {
        lock(&self.inbox).records.push_back(record);
        self.wake.notify_one();
    }

    /// A CP was published: its logs and older ones are dropped.
    pub fn drop_logs(&self, lane: Arc<Lane>, cp: CpNumber) {
        lock(&self.inbox).drops.push((lane, cp));
        self.wake.notify_one();
    }

    /// A source waits for what lies in its log to be synced.
    pub fn file(&self) {
        lock(&self.inbox).sync_wanted = true;
        self.wake.notify_one();
    }

    /// Has the source's bell rung once room of ring or log comes back, whoever had it. Room that came
    /// back before this was called is not told: who asks looks once more.
    pub fn wants_room(&self, lane: Arc<Lane>) {
        lock(&self.inbox).without_room.insert(lane.source(), lane);
    }

    /// Room of the ring is wanted by one of those, however much of the ring others leave free.
    pub fn make_room(&self) {
        lock(&self.inbox).room_wanted = true;
        self.wake.notify_one();
    }

    fn tell_of_room(&self) {
        for lane in std::mem::take(&mut lock(&self.inbox).without_room).into_values() {
            lane.ring_bell();
        }
    }

    /// The ring failed: nothing more will come.
    pub fn fail(&self, reason: &str) {
        tracing::error!(reason, "the ring failed, draining what is durable");
        lock(&self.inbox).failed = true;
        self.wake.notify_one();
    }

    /// Drain everything, sync, release, end.
    pub fn stop(&self) {
        lock(&self.inbox).stopping = true;
        self.wake.notify_one();
    }

    fn wait(&self) -> Inbox {
        let mut inbox: MutexGuard<'_, Inbox> = lock(&self.inbox);
        while inbox.records.is_empty()
            && inbox.drops.is_empty()
            && !inbox.sync_wanted
            && !inbox.room_wanted
            && !inbox.stopping
            && !inbox.failed
        {
            inbox = self
                .wake
                .wait(&self.inbox, inbox)
                .unwrap_or_else(|_: PoisonError<_>| std::process::abort());
        }
        let stopping = inbox.stopping;
        let without_room = std::mem::take(&mut inbox.without_room);
        let taken = std::mem::take(&mut *inbox);
        inbox.stopping = stopping;
        inbox.without_room = without_room;
        taken
    }
}

/// A record in the ring that is not released.
#[derive(Debug)]
pub struct InRing {
    lane: Arc<Lane>,
    end: LogPosition,
    bytes: u64,
    epoch: Epoch,
    cp: CpNumber,
    id: TransferId,
    sequence: SequenceNumber,
    fence: bool,
    drained: bool,
    /// On its way to the head of the ring.
    copying: bool,
    /// Durable at the head of the ring: this place may go.
    copied: bool,
    /// It cannot be read: this place holds nothing.
    lost: bool,
}

impl InRing {
    /// A record that recovery found at `start`.
    pub fn found(
        lane: Arc<Lane>,
        epoch: Epoch,
        start: LogPosition,
        bytes: u64,
        cp: CpNumber,
        (id, sequence): (TransferId, SequenceNumber),
        drained: bool,
    ) -> Self {
        let end = LogPosition(start.0 + bytes);
        let (fence, drained_now) = (false, drained);
        Self {
            lane,
            end,
            bytes,
            epoch,
            cp,
            id,
            sequence,
            fence,
            drained: drained_now,
            copying: false,
            copied: false,
            lost: false,
        }
    }

    fn fence(lane: Arc<Lane>, end: LogPosition) -> Self {
        let (bytes, none) = (fence_record_bytes(), Default::default());
        let start = LogPosition(end.0 - bytes);
        let (epoch, cp, id) = none;
        let found = Self::found(lane, epoch, start, bytes, cp, id, false);
        Self { fence: true, ..found }
    }

    /// Whether nobody needs it in the ring any more.
    fn is_safe(&self) -> bool {
        if self.lane.is_given_up() {
            return true;
        }
        let cursors = self.lane.cursors();
        if self.fence {
            // Where none stands any more, the volumes were given back behind this one.
            return cursors.fence.is_none() || cursors.fenced == Fenced::InCatalog;
        }
        let synced =
            self.drained && (self.sequence <= cursors.synced.sequence || machine::breaks(11));
        synced || self.copied || self.lost || self.cp <= cursors.applied_cp
    }

    fn start(&self) -> LogPosition {
        LogPosition(self.end.0 - self.bytes)
    }
}

/// The drainer's own state; [`Drainer::run`] is the body of its thread.
#[derive(Debug)]
pub struct Drainer {
    queue: Arc<DrainQueue>,
    store: Arc<LogStore>,
    stager: Arc<Stager>,
    in_ring: VecDeque<InRing>,
    loud: Loud,
    /// A handle, so that recording takes no lock.
    seconds: metrics::Histogram,
}

impl Drainer {
    /// A drainer for a ring that holds `in_ring`, in ring order, and nothing else that is needed:
    /// what lies before the first of them is given back now. Made before anything is staged.
    pub fn new(
        queue: Arc<DrainQueue>,
        store: Arc<LogStore>,
        stager: Arc<Stager>,
        in_ring: VecDeque<InRing>,
    ) -> Self {
        if let Some(ring) = stager.ring() {
            ring.release(in_ring.front().map_or(ring.status().durable, InRing::start));
        }
        let (loud, seconds) = (Loud::default(), metrics::histogram!(DRAIN_SECONDS.name));
        Self { queue, store, stager, in_ring, loud, seconds }
    }

    /// Runs until stopped.
    pub fn run(mut self) {
        self.release();
        loop {
            let work = self.queue.wait();
            let mut filing = BTreeMap::new();
            for record in work.records {
                if let Record::Transfer(Staged { lane, .. }) = &record.record
                    && lane.files()
                {
                    filing.entry(lane.source()).or_insert_with(|| lane.clone());
                }
                self.drain(record);
            }
            for (lane, cp) in work.drops {
                self.loud.dropped(lane.source());
                if let Err(error) = self.store.drop_through(lane.source(), cp) {
                    tracing::warn!(source = %lane.name(), %cp, %error, "old log not deleted");
                    // Its logs take no more writes: it gets no credit, and must be told why.
                    if let Some(reason) = self.store.fault(lane.source()) {
                        lane.fault(&reason);
                    }
                }
                lane.ring_bell();
            }
            self.file(filing, work.sync_wanted);
            self.release();
            self.begin_writeback();
            let wanted = self.wanted(work.room_wanted);
            if work.stopping || wanted > 0 {
                let before = self.in_ring.len();
                self.sync();
                self.release();
                let released = before - self.in_ring.len();
                self.copy_forward(wanted.saturating_sub(released).max(self.oldest_half()));
                // What was found lost is passed at once: nothing may ever wake this thread for it.
                self.release();
            }
            if work.stopping || work.failed {
                return;
            }
            if self.loud.is_much() {
                self.sync_loud();
                self.release();
            }
        }
    }

    fn drain(&mut self, record: Drainable) {
        let Drainable { record, end, since } = record;
        let staged = match record {
            Record::Transfer(staged) => staged,
            Record::Fence(lane) => {
                self.in_ring.push_back(InRing::fence(lane, end));
                return;
            }
        };
        let place = staged.place();
        let cursors = staged.lane.cursors();
        let faulted = cursors.fault.is_some();
        // Behind a fence lies only what a failover has given up.
        let behind = cursors.fence.is_some_and(|fence| place.sequence > fence.place.sequence);
        if faulted {
            let source = staged.lane.source();
            let same = |old: &&mut InRing| old.id == place.transfer && old.lane.source() == source;
            for old in self.in_ring.iter_mut().filter(same) {
                old.copied |= old.copying;
            }
        }
        if behind {
            // It will never lie in the log, and takes no room of it.
            staged.lane.in_log(staged.record_bytes());
        }
        let drained = !faulted
            && !behind
            && match self.store.append(staged.lane.source(), staged.epoch, &staged.transfer) {
                Ok(appended) => {
                    if let Appended::Written { bytes, .. } = appended {
                        self.loud.appended(staged.lane.source(), bytes);
                    }
                    staged.lane.in_log(staged.record_bytes());
                    staged.lane.drained(place, staged.transfer.data_bytes());
                    self.seconds.record(machine::elapsed(since));
                    true
                }
                Err(error) => {
                    staged.lane.fault(&error.to_string());
                    false
                }
            };
        self.in_ring.push_back(InRing {
            end,
            bytes: staged.record_bytes(),
            epoch: staged.epoch,
            cp: staged.transfer.header().cp,
            id: place.transfer,
            sequence: place.sequence,
            fence: false,
            drained,
            copying: false,
            copied: false,
            lost: false,
            lane: staged.lane,
        });
    }

    /// Gives back the longest prefix of the ring that nobody needs.
    fn release(&mut self) {
        let mut upto = None;
        while let Some(front) = self.in_ring.front() {
            if !front.is_safe() {
                break;
            }
            front.lane.released(front.bytes);
            upto = Some(front.end);
            self.in_ring.pop_front();
        }
        if let (Some(upto), Some(ring)) = (upto, self.stager.ring()) {
            ring.release(upto);
            self.queue.tell_of_room();
        }
    }

    /// How many of the oldest records have to leave: those of the oldest half, and all up to the last
    /// of a source that waits for room of its share.
    fn wanted(&self, by_share: bool) -> usize {
        let half = self.oldest_half();
        if !by_share {
            return half;
        }
        let mut waiting = lock(&self.queue.inbox).without_room.clone();
        waiting.retain(|_, lane| lane.cursors().fault.is_none());
        let waits = |record: &InRing| waiting.contains_key(&record.lane.source());
        half.max(self.in_ring.iter().rposition(waits).map_or(0, |last| last + 1))
    }

    /// How many of the oldest records lie in the half of the ring that is wanted back.
    fn oldest_half(&self) -> usize {
        let Some(ring) = self.stager.ring() else { return 0 };
        let status = ring.status();
        let wanted = status.written.0.saturating_sub(status.capacity.0 / 2);
        self.in_ring.partition_point(|record| record.start().0 < wanted)
    }

    fn begin_writeback(&mut self) {
        for source in self.loud.due() {
            // What fails here fails at the sync as well, which latches it.
            if let Err(error) = self.store.begin_writeback(source, WRITEBACK_BYTES_MIN) {
                tracing::debug!(%source, %error, "writeback of a source log was not begun");
            }
        }
    }

    /// Syncs what was drained for sources that wait for it: one sync for all that has gathered;
    /// while it runs the next gathers.
    fn file(&mut self, mut waiting: BTreeMap<SourceId, Arc<Lane>>, all: bool) {
        if all {
            waiting.extend(self.drained_lanes().into_iter().filter(|(_, lane)| lane.files()));
        }
        waiting.retain(|_, lane| {
            let cursors = lane.cursors();
            cursors.fault.is_none() && cursors.synced.sequence < cursors.drained.sequence
        });
        self.sync_lanes(&waiting);
    }

    fn sync(&mut self) {
        let lanes = self.drained_lanes();
        lanes.keys().for_each(|source| self.loud.room_wanted(*source));
        self.sync_lanes(&lanes);
        self.loud.all_synced();
    }

    /// What loud sources have unsynced, whose logs would be synced anyway; no other is touched.
    fn sync_loud(&mut self) {
        let mut lanes = self.drained_lanes();
        lanes.retain(|source, _| self.loud.is_loud(*source));
        self.sync_lanes(&lanes);
        self.loud.all_synced();
    }

    /// Whoever has a drained record in the ring.
    fn drained_lanes(&self) -> BTreeMap<SourceId, Arc<Lane>> {
        let mut lanes = BTreeMap::new();
        for record in self.in_ring.iter().filter(|record| record.drained) {
            lanes.entry(record.lane.source()).or_insert_with(|| record.lane.clone());
        }
        lanes
    }

    fn sync_lanes(&mut self, lanes: &BTreeMap<SourceId, Arc<Lane>>) {
        if lanes.is_empty() {
            return;
        }
        let unsynced: Vec<SourceId> = lanes.keys().copied().collect();
        unsynced.iter().for_each(|source| self.loud.synced(*source));
        for (source, result) in self.store.sync(&unsynced) {
            let Some(lane) = lanes.get(&source) else { continue };
            match result {
                Ok(place) => lane.synced(place),
                Err(error) => lane.fault(&error.to_string()),
            }
        }
    }

    /// Where a faulted source holds the ring's end, its records among the `oldest` move to the head
    /// (R10).
    fn copy_forward(&mut self, oldest: usize) {
        let Some(ring) = self.stager.ring().filter(|_| !machine::breaks(10)) else { return };
        let to_copy = |record: &InRing| {
            let settled = record.fence || record.copied || record.copying || record.lost;
            !settled && record.lane.cursors().fault.is_some()
        };
        if self.in_ring.iter().all(to_copy) {
            // No room to be gained: copies would chase each other round the ring.
            return;
        }
        for record in self.in_ring.iter_mut().take(oldest) {
            if !to_copy(record) {
                continue;
            }
            let read = ring.read(record.start()).map_err(|error| error.to_string());
            let parsed =
                read.and_then(|(_, body)| Transfer::parse(body).map_err(|error| error.to_string()));
            match parsed {
                Ok(transfer) => {
                    record.copying = true;
                    let (lane, epoch, came) = (record.lane.clone(), record.epoch, machine::now());
                    self.stager.copy_forward(Staged { lane, epoch, transfer, came });
                }
                Err(error) => {
                    // Whatever stands behind it is others' (R10). The ring has passed it on to
                    // nobody: the chain of its source shows the gap at every start from now on.
                    record.lost = true;
                    record.lane.lose(&format!("transfer {} is lost: {error}", record.id));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lane::Cursors;
    use super::*;

    /// A fence may lie in the ring, behind what others need there, for longer than it stands.
    #[test]
    fn a_fence_leaves_the_ring_behind_its_failback() {
        let lane = Lane::new("a".parse().unwrap(), SourceId([7; 16]), Cursors::default());
        let epoch = |number| Epoch { number, id: u64::from(number) };
        lane.fence(epoch(2), None, fence_record_bytes());
        let first = InRing::fence(lane.clone(), LogPosition(4096));
        assert!(!first.is_safe(), "a restart needs it");
        lane.fence_is(Fenced::InRing);
        assert!(!first.is_safe(), "the catalog has not its epoch yet");
        lane.fence_is(Fenced::InCatalog);
        assert!(first.is_safe());
        assert!(!lane.hand_over(CpNumber(3), Default::default()));
        assert!(first.is_safe(), "nothing stands behind which it would hold the ring");
        // The next failover's record is needed, whatever became of the first.
        lane.fence(epoch(4), None, fence_record_bytes());
        lane.fence_is(Fenced::InRing);
        assert!(!InRing::fence(lane.clone(), LogPosition(8192)).is_safe());
        lane.fence_is(Fenced::InCatalog);
        assert!(InRing::fence(lane, LogPosition(8192)).is_safe() && first.is_safe());
    }
}
