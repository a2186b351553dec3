//! The lane of one source: how far its entries have come, shared by everybody who moves them.
//!
//! Stager, drainer and applier write their own cursor; the source's actor reads all of them when
//! [`Lane::changed`] is rung. The lane outlives the actor: a restarted actor resumes from it.
//!
//! ```text
//! applied <= drained <= durable <= staged          (in the source's sequence)
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::applier::Job;
use super::aside::Aside;
use super::doubts::Doubts;
use super::refill::Mark;
use super::waits::{Since, Waits};
use crate::limits::cp_charge;
use crate::nvlog::DurableToken;
use crate::record::marks::{Fence, Place};
use crate::record::transfer::Transfer;
use crate::session::mirror::Outcome;
use crate::units::convert::to_u64;
use crate::units::hash::Root;
use crate::units::ids::SourceId;
use crate::units::machine::{self, Bell};
use crate::units::names::SourceName;
use crate::units::numbers::{
    CpNumber, Epoch, Generation, SequenceNumber, TransferId, VolumeNumber,
};
use crate::volume::mend::Questions;

/// The cursors of one source.
#[derive(Debug, Clone, Default)]
pub struct Cursors {
    /// Last transfer handed to the stager.
    pub staged: Place,
    /// Last transfer durable in the ring.
    pub durable: Place,
    /// Last transfer in the source log.
    pub drained: Place,
    /// Last transfer whose source log is synced.
    pub synced: Place,
    /// Published CP.
    pub applied_cp: CpNumber,
    /// Its place.
    pub applied: Place,
    /// Bytes of the ring that this source's records take.
    pub ring_bytes: u64,
    /// Bytes of those that are not in the source log yet.
    pub undrained_bytes: u64,
    /// Bytes of transfers received and not yet durable: what the `log` credit bounds.
    pub under_way_bytes: u64,
    /// First failure of this source's log or of the ring.
    pub fault: Option<Arc<str>>,
    /// The fault is missing or damaged history: a restart finds it again.
    pub damaged: bool,
    /// What may be missing here (R3).
    pub doubts: Doubts,
    /// The source is fenced: nothing behind this place is taken (R2).
    pub fence: Option<Fence>,
    /// How far the fence is.
    pub fenced: Fenced,
    /// Client bytes durable here that no published CP holds, and when their first came, by CP.
    pub invisible: BTreeMap<CpNumber, (u64, Instant)>,
}

/// How far a fence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Fenced {
    /// There is none, or its record is on its way into the ring.
    #[default]
    No,
    /// The ring has failed: there will be none.
    Failed,
    /// Its record is durable in the ring.
    InRing,
    /// The catalog has its epoch: the record is not needed any more.
    InCatalog,
}

impl Cursors {
    /// When the oldest entry came that the image does not show.
    pub fn oldest_invisible(&self) -> Option<Instant> {
        self.invisible.values().map(|(_, since)| *since).min()
    }
}

/// Bytes that have passed each step of the ladder since the process started.
#[derive(Debug, Default)]
pub struct Ladder {
    /// Bytes of whole frames received, whatever they carry.
    pub received_bytes: AtomicU64,
    /// Client bytes staged durably.
    pub staged_bytes: AtomicU64,
    /// Client bytes drained.
    pub drained_bytes: AtomicU64,
    /// Client bytes in trees that were built and proven.
    pub applied_bytes: AtomicU64,
    /// Bytes applied by reference.
    pub reference_blocks: AtomicU64,
    /// Blocks that travelled in CP data.
    pub inline_blocks: AtomicU64,
    /// Blocks that became holes.
    pub hole_blocks: AtomicU64,
    /// Bytes of Updates payload that say references.
    pub reference_bytes: AtomicU64,
    /// Bytes of Updates payload that carry data.
    pub inline_bytes: AtomicU64,
    /// Bytes of Updates payload that say holes.
    pub hole_bytes: AtomicU64,
    /// Transfers received.
    pub transfers: AtomicU64,
    /// Client bytes in published CPs.
    pub visible_bytes: AtomicU64,
    /// CPs published.
    pub checkpoints: AtomicU64,
    /// When the last of them was, in seconds since 1970; 0 before the first.
    pub published_at: AtomicU64,
    /// CPs built from the log's entries alone.
    pub replayed: AtomicU64,
    /// CPs refused (R19: never normal).
    pub rejected: AtomicU64,
    /// Bytes of payload that came for passes: data that was sent, or pulled by comparison.
    pub pass_bytes: AtomicU64,
    /// Bytes of transfers that came behind passes, how many of them became the log, and how often all were dropped.
    pub behind_bytes: AtomicU64,
    /// See `behind_bytes`.
    pub behind_joined_bytes: AtomicU64,
    /// See `behind_bytes`.
    pub behind_dropped: AtomicU64,
}

impl Ladder {
    /// A frame of so many bytes came.
    pub(super) fn received(&self, bytes: u64) {
        self.received_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A frame of a pass was taken.
    pub fn passed(&self, payload_bytes: usize) {
        self.pass_bytes.fetch_add(to_u64(payload_bytes), Ordering::Relaxed);
    }
}

/// One source's lane.
#[derive(Debug)]
pub struct Lane {
    name: SourceName,
    source: SourceId,
    cursors: Mutex<Cursors>,
    /// Taken last, with the cursors' lock or without.
    waits: Mutex<Waits>,
    job: Mutex<Option<Arc<Job>>>,
    aside: Mutex<Aside>,
    outcome: Mutex<Option<(CpNumber, Outcome)>>,
    taken_bytes: AtomicU64,
    /// Held by who writes the extension of the source's row, from looking to commit.
    row: Mutex<()>,
    /// Somebody waits for the source log to be synced (`ack = "filed"`).
    files: AtomicBool,
    /// The source was forgotten: nobody needs anything of it any more.
    given_up: AtomicBool,
    /// Rung with `changed`, for threads.
    moved: Bell,
    credit_most: AtomicU64,
    /// Rung when a cursor moved, updates were taken, or an apply ended.
    pub changed: Notify,
    /// Counters for metrics and status.
    pub ladder: Ladder,
    /// Places that the source is asked for.
    pub questions: Questions,
}

/// A lock whose holder panicked holds a state nobody knows: the process must not go on with it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|_: PoisonError<_>| std::process::abort())
}

impl Lane {
    /// A lane that stands at `cursors`.
    pub fn new(name: SourceName, source: SourceId, cursors: Cursors) -> Arc<Self> {
        Arc::new(Self {
            name,
            source,
            cursors: Mutex::new(cursors),
            waits: Mutex::default(),
            job: Mutex::new(None),
            aside: Mutex::default(),
            outcome: Mutex::new(None),
            taken_bytes: AtomicU64::new(0),
            row: Mutex::new(()),
            files: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            moved: Bell::new(),
            credit_most: AtomicU64::new(0),
            changed: Notify::new(),
            ladder: Ladder::default(),
            questions: Questions::default(),
        })
    }

    /// The source's name.
    pub fn name(&self) -> &SourceName {
        &self.name
    }

    /// The source's id.
    pub fn source(&self) -> SourceId {
        self.source
    }

    /// Whoever holds it is the only one who writes the extension of the source's row.
    pub fn row(&self) -> MutexGuard<'_, ()> {
        lock(&self.row)
    }

    /// Whether the source was forgotten.
    pub fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// The source is forgotten: what the ring has of it may go.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// Whether the source waits until its log is synced.
    pub fn files(&self) -> bool {
        self.files.load(Ordering::Relaxed)
    }

    /// The source waits until its log is synced, or does not any more.
    pub fn set_files(&self, files: bool) {
        self.files.store(files, Ordering::Relaxed);
    }

    /// A copy of the cursors.
    pub fn cursors(&self) -> Cursors {
        lock(&self.cursors).clone()
    }

    /// Since when the oldest of its entries waits for each step, at these cursors of it.
    pub fn since(&self, cursors: &Cursors) -> Since {
        let waits = lock(&self.waits);
        let (durable, drained) = (cursors.durable.sequence, cursors.drained.sequence);
        let behind = |cursor, before| (cursor < before).then(|| waits.behind(cursor));
        let unbuilt = cursors.invisible.range(waits.last_built().next()..);
        let applied = unbuilt.map(|(_, (_, since))| *since).min();
        let staged = behind(durable, cursors.staged.sequence);
        // What waits for one step waits for all behind it.
        let drained = [behind(drained, durable), staged].into_iter().flatten().min();
        let applied = [applied, drained].into_iter().flatten().min();
        Since { staged, drained, applied }
    }

    /// Tells everybody who waits for this lane: a cursor has moved, or room has come back.
    pub fn ring_bell(&self) {
        self.changed.notify_one();
        self.moved.notify_all();
    }

    /// Waits until `done` says so of the cursors, asked again whenever something has moved;
    /// at most until `deadline`.
    pub fn wait(&self, deadline: Option<Instant>, mut done: impl FnMut(&Cursors) -> bool) {
        let mut cursors = lock(&self.cursors);
        while !done(&cursors) {
            let left = deadline.map(|at| at.saturating_duration_since(machine::now()));
            let woken = match left {
                Some(left) if left.is_zero() => return,
                Some(left) => self.moved.wait_timeout(&self.cursors, cursors, left).ok(),
                None => self.moved.wait(&self.cursors, cursors).ok(),
            };
            cursors = woken.unwrap_or_else(|| std::process::abort());
        }
    }

    /// Has those who wait look again: something else has changed.
    pub fn poke(&self) {
        // With the lock, so that nobody is between looking and waiting.
        drop(lock(&self.cursors));
        self.moved.notify_all();
    }

    /// Takes nothing any more behind what was handed to the stager by now, or behind `at` if that
    /// is named (R2). The fence's place; an earlier fence that stands for the same stays.
    pub fn fence(&self, epoch: Epoch, at: Option<Place>, record_bytes: u64) -> Fence {
        let mut cursors = lock(&self.cursors);
        let fence = Fence { epoch, place: at.unwrap_or(cursors.staged) };
        cursors.fence = Some(fence);
        cursors.fenced = Fenced::No;
        cursors.ring_bytes += record_bytes;
        fence
    }

    /// The fence has come further.
    pub fn fence_is(&self, fenced: Fenced) {
        let mut cursors = lock(&self.cursors);
        cursors.fenced = cursors.fenced.max(fenced);
        drop(cursors);
        self.ring_bell();
    }

    /// The fence stands at another place: what lies between was given up.
    pub fn move_fence(&self, place: Place) {
        if let Some(fence) = &mut lock(&self.cursors).fence {
            fence.place = place;
        }
    }

    /// Everything behind `place` was given up, and with it what was wrong with it.
    pub fn rewind(&self, place: Place) {
        lock(&self.cursors).fault = None;
        self.rewind_to(place);
    }

    fn rewind_to(&self, place: Place) {
        let mut cursors = lock(&self.cursors);
        (cursors.staged, cursors.durable, cursors.drained) = (place, place, place);
        cursors.synced = place;
        (cursors.under_way_bytes, cursors.undrained_bytes) = (0, 0);
        cursors.invisible.clear();
        drop(cursors);
        self.ring_bell();
    }

    /// The source was given back: it goes on behind `place`, and no fence stands any more. Nothing
    /// of the log that has ended is missing; says whether a mark of it is to go.
    #[must_use = "a mark that stays says so again after the next start"]
    pub fn hand_over(&self, cp: CpNumber, place: Place) -> bool {
        let mut cursors = lock(&self.cursors);
        (cursors.applied_cp, cursors.applied) = (cp, place);
        (cursors.fence, cursors.fenced) = (None, Fenced::No);
        let (lost, _) = cursors.doubts.end();
        drop(cursors);
        self.rewind_to(place);
        lost
    }

    /// As if there were no fence.
    #[cfg(test)]
    pub fn without_fence(&self) {
        lock(&self.cursors).fence = None;
    }

    /// A transfer is handed to the stager; false if a fence stands before it.
    #[must_use = "what is behind a fence is not stored"]
    pub fn staged(&self, place: Place, record_bytes: u64, transfer_bytes: u64) -> bool {
        let mut cursors = lock(&self.cursors);
        if cursors.fence.is_some() && !machine::breaks(2) {
            return false;
        }
        assert!(cursors.staged.sequence < place.sequence, "transfers are staged in order");
        cursors.staged = place;
        cursors.ring_bytes += record_bytes;
        cursors.undrained_bytes += record_bytes;
        cursors.under_way_bytes += transfer_bytes;
        lock(&self.waits).came(place.sequence, cursors.drained.sequence);
        true
    }

    /// Whether a transfer came behind a fence: it is not stored, and never acknowledged (R2).
    pub fn is_fenced_off(&self, id: TransferId) -> bool {
        let cursors = lock(&self.cursors);
        cursors.fence.is_some() && id > cursors.staged.transfer
    }

    /// So many bytes of transfers were allowed to be under way.
    pub fn give_credit(&self, bytes: u64) {
        self.credit_most.fetch_max(bytes, Ordering::Relaxed);
    }

    /// Whether so many more bytes of transfers are within the `log` credit. What was given out
    /// changes while transfers are on their way: the most that ever was is what counts.
    pub fn within_credit(&self, transfer_bytes: u64) -> bool {
        let most = self.credit_most.load(Ordering::Relaxed);
        let aside = lock(&self.aside).bytes().saturating_add(transfer_bytes);
        lock(&self.cursors).under_way_bytes.saturating_add(aside) <= most
    }

    /// As if that many bytes had come and the ring stood still.
    #[cfg(test)]
    pub fn stand_still(&self, transfer_bytes: u64) {
        lock(&self.cursors).under_way_bytes = transfer_bytes;
    }

    /// A transfer is durable in the ring for the first time: so many bytes of data, of transfer.
    pub fn durable(
        &self,
        place: Place,
        cp: CpNumber,
        (data_bytes, transfer_bytes): (u64, u64),
        _proof: &DurableToken,
    ) {
        let mut cursors = lock(&self.cursors);
        if cursors.durable.sequence < place.sequence {
            cursors.durable = place;
            cursors.under_way_bytes -= transfer_bytes;
            cursors.invisible.entry(cp).or_insert_with(|| (0, machine::now())).0 += data_bytes;
            self.ladder.staged_bytes.fetch_add(data_bytes, Ordering::Relaxed);
        }
        drop(cursors);
        self.ring_bell();
    }

    /// A transfer lies in the source log.
    pub fn drained(&self, place: Place, data_bytes: u64) {
        let mut cursors = lock(&self.cursors);
        if cursors.drained.sequence < place.sequence {
            assert!(place.sequence <= cursors.durable.sequence, "drained before durable");
            cursors.drained = place;
            self.ladder.drained_bytes.fetch_add(data_bytes, Ordering::Relaxed);
        }
        drop(cursors);
        self.ring_bell();
    }

    /// A record's bytes count as the log's own from now on.
    pub fn in_log(&self, record_bytes: u64) {
        let mut cursors = lock(&self.cursors);
        cursors.undrained_bytes = cursors.undrained_bytes.saturating_sub(record_bytes);
    }

    /// The source log is synced up to here.
    pub fn synced(&self, place: Place) {
        let mut cursors = lock(&self.cursors);
        if cursors.synced.sequence >= place.sequence {
            // Nobody is woken for it, who would ask for the next sync.
            return;
        }
        cursors.synced = place;
        drop(cursors);
        self.changed.notify_one();
    }

    /// The ring gave room of this source back.
    pub fn released(&self, record_bytes: u64) {
        let mut cursors = lock(&self.cursors);
        cursors.ring_bytes = cursors.ring_bytes.saturating_sub(record_bytes);
        drop(cursors);
        self.ring_bell();
    }

    /// Takes more room of the ring for a record that is copied forward.
    pub fn copied_forward(&self, record_bytes: u64) {
        lock(&self.cursors).ring_bytes += record_bytes;
    }

    /// The trees of a CP are built and proven; its commit is next.
    pub fn built(&self, cp: CpNumber) {
        let cursors = lock(&self.cursors);
        let bytes: u64 = cursors.invisible.range(..=cp).map(|(_, (bytes, _))| bytes).sum();
        let upto = self.ladder.visible_bytes.load(Ordering::Relaxed) + bytes;
        // Not back, if a commit fails and its CP comes again.
        self.ladder.applied_bytes.fetch_max(upto, Ordering::Relaxed);
        lock(&self.waits).built(cp);
        drop(cursors);
        self.changed.notify_one();
    }

    /// What came behind the pass under way.
    pub(super) fn aside(&self) -> MutexGuard<'_, Aside> {
        lock(&self.aside)
    }

    /// A transfer came behind it.
    pub(super) fn put_aside(&self, transfer: Transfer) {
        self.aside().put(transfer);
        if let Some(job) = self.job() {
            job.poke();
        }
    }

    /// It was written behind the pass.
    pub(super) fn wrote_aside(&self, transfer: &Transfer) {
        self.aside().wrote(transfer);
        self.ladder.behind_bytes.fetch_add(to_u64(transfer.bytes().len()), Ordering::Relaxed);
        self.ring_bell();
    }

    /// It could not be written behind the pass.
    pub(super) fn failed_aside(&self) {
        self.aside().fail();
        self.ring_bell();
    }

    /// The job has published its CP and ends. After a pass the source's log goes on behind it, up to
    /// `log`, wherever it stood: whoever asks sees all of that at once ([`Lane::progress`]). With a fence nothing
    /// goes on behind it: then nothing has changed, and the roots come back.
    #[must_use = "a log behind a fence is to be dropped, and the CP told of again"]
    pub fn publish(
        &self,
        job: &Job,
        roots: Vec<(VolumeNumber, Root)>,
        log: Place,
    ) -> Option<Vec<(VolumeNumber, Root)>> {
        let (cp, place) = (job.cp(), job.last());
        let mut cursors = lock(&self.cursors);
        if cursors.fence.is_some() && job.sets_log() && log != place {
            return Some(roots);
        }
        if job.sets_log() {
            (cursors.staged, cursors.durable) = (log, log);
            (cursors.drained, cursors.synced) = (log, log);
            // Of the line that has ended nothing more is to be shown.
            cursors.invisible.retain(|label, _| *label <= cp);
            if log != place {
                let joined = self.aside().joined();
                let bytes = joined.values().map(|(bytes, _)| bytes).sum();
                cursors.invisible.extend(joined);
                self.ladder.staged_bytes.fetch_add(bytes, Ordering::Relaxed);
                self.ladder.drained_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
        }
        *lock(&self.outcome) = Some((cp, Outcome::Published(roots)));
        *lock(&self.job) = None;
        self.show(&mut cursors, cp, place);
        drop(cursors);
        self.ring_bell();
        None
    }

    /// A CP was published without a job.
    pub fn published(&self, cp: CpNumber, place: Place) {
        self.show(&mut lock(&self.cursors), cp, place);
        self.ring_bell();
    }

    fn show(&self, cursors: &mut Cursors, cp: CpNumber, place: Place) {
        assert!(cursors.applied_cp < cp, "CP numbers rise");
        cursors.applied_cp = cp;
        cursors.applied = place;
        let later = cursors.invisible.split_off(&cp.next());
        let shown = std::mem::replace(&mut cursors.invisible, later);
        cursors.doubts.shown(place.sequence);
        let bytes = shown.values().map(|(bytes, _)| bytes).sum();
        let visible = self.ladder.visible_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // Also what a failover has replayed.
        self.ladder.applied_bytes.fetch_max(visible, Ordering::Relaxed);
        self.ladder.checkpoints.fetch_add(1, Ordering::Relaxed);
        let now = machine::unix_seconds().unsigned_abs();
        self.ladder.published_at.fetch_max(now, Ordering::Relaxed);
    }

    /// The first failure stays (invariant 7).
    pub fn fault(&self, reason: &str) {
        let mut cursors = lock(&self.cursors);
        if cursors.fault.is_none() {
            tracing::error!(source = %self.name, reason, "source is faulted");
            cursors.fault = Some(reason.into());
        }
        drop(cursors);
        self.ring_bell();
    }

    /// A record was lost here: the first one is told.
    pub fn lose(&self, what: &str) {
        let mut cursors = lock(&self.cursors);
        cursors.damaged = true;
        cursors.doubts.lose(what);
        drop(cursors);
        self.fault(what);
    }

    /// Something that a start found damaged may have been this source's.
    pub fn may_miss(&self, bytes: u32, since: Generation, newest: Generation) {
        lock(&self.cursors).doubts.may_miss(bytes, since, newest);
        self.changed.notify_one();
    }

    /// What this hub had in memory is gone, and was acknowledged as received (`ack = "received"`).
    pub fn forgot(&self, since: Generation, newest: Generation) {
        lock(&self.cursors).doubts.forgot(since, newest);
        self.changed.notify_one();
    }

    /// What was held of its log was lost.
    pub fn lost_log(&self, mark: Mark, newest: Generation) {
        lock(&self.cursors).doubts.lost_log(mark, newest);
        self.changed.notify_one();
    }

    /// An image without what was lost, or may have been, has become the truth. Says whether a mark
    /// of a lost log is to go.
    #[must_use = "a mark that stays says so again after the next start"]
    pub fn gave_up_missing(&self) -> bool {
        lock(&self.cursors).doubts.end().0
    }

    /// The source is in session, with that boot: what it holds beyond this end, up to there, it sends
    /// again.
    pub fn welcomed(&self, last: SequenceNumber, generation: Generation) {
        lock(&self.cursors).doubts.welcomed(last, generation);
    }

    /// Looks whether what was lost, or may have been, has come. Says which durable notes of it are to
    /// go: the mark of a lost log, and those in the source's row.
    pub fn has_come(&self) -> (bool, bool) {
        let mut cursors = lock(&self.cursors);
        let durable = cursors.durable.sequence;
        cursors.doubts.has_come(durable)
    }

    /// The applier took a frame of Updates of so many bytes.
    pub fn take_updates(&self, bytes: usize) {
        self.taken_bytes.fetch_add(cp_charge(to_u64(bytes)), Ordering::Relaxed);
        self.ring_bell();
    }

    /// Bytes of Updates taken since this was last asked.
    pub fn updates_taken(&self) -> u64 {
        self.taken_bytes.swap(0, Ordering::Relaxed)
    }

    /// The job under way, if any.
    pub fn job(&self) -> Option<Arc<Job>> {
        lock(&self.job).clone()
    }

    /// Registers a job; there is one at a time.
    pub fn begin_job(&self, job: Arc<Job>) {
        let mut slot = lock(&self.job);
        assert!(slot.is_none(), "one CP of a source is applied at a time");
        *slot = Some(job);
    }

    /// The job ended.
    pub fn end_job(&self, cp: CpNumber, outcome: Outcome) {
        {
            // Whoever sees that there is no job also sees how it ended, and the other way round.
            let mut job = lock(&self.job);
            *lock(&self.outcome) = Some((cp, outcome));
            *job = None;
        }
        self.changed.notify_one();
        self.poke();
    }

    /// The cursors and how the last job ended, once: as they were at one moment.
    pub fn progress(&self) -> (Cursors, Option<(CpNumber, Outcome)>) {
        let cursors = lock(&self.cursors);
        (cursors.clone(), lock(&self.outcome).take())
    }

    /// How the last job ended, once.
    pub fn outcome(&self) -> Option<(CpNumber, Outcome)> {
        lock(&self.outcome).take()
    }
}
