//! The committing thread: the one place where bytes become durable in a ring.
//!
//! Take what the feed has gathered, lay it into one buffer, write it durably, say so; while the
//! write runs, the next batch gathers. No timer stands in the way, and when there is nothing to do
//! the thread sleeps on a condition. [`Committer::turn`] is one round without waiting, so that
//! tests can drive it call by call.
//!
//! Invariants: one write is under way at a time, so every record of a commit carries the durable
//! cursor at which that commit begins (R3 stands on this). A [`DurableToken`] exists only after
//! its write returned `Ok`. Space is reused only under a durable header (R11), and no commit ends
//! farther behind the newest header than that says: an opening looks no farther (R3).
//!
//! The first error of a write ends the thread: it is never repeated, the feed is told once. A
//! panic here, in the feed's calls too, aborts the process: what is durable would not be known.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::cursors::{Cursors, ReserveError};
use super::error::RingError;
use super::format::{Header, SLOT_BYTES};
use super::handle::{Handle, RingStatus, Shared, write_log};
use super::recover::Opened;
use super::{Committed, Feed, Pending, RingOptions};
use crate::device::buffer::AlignedBuffer;
use crate::device::{Device, DeviceError};
use crate::limits::RECORD_BYTES_MAX;
use crate::metric::catalogue as names;
use crate::record::envelope::{ENVELOPE_BYTES, Envelope, record_bytes};
use crate::units::convert::{low_u32, to_f64, to_u64, to_usize};
use crate::units::hash::crc32c;
use crate::units::numbers::{ByteCount, LogPosition};
use crate::units::{machine, turn};

/// Proof that a commit is durable. Only this file makes one, after its write; an acknowledgement
/// is built from it.
#[derive(Debug)]
pub struct DurableToken {
    upto: LogPosition,
}

impl DurableToken {
    /// Everything in the ring before this is on the medium.
    pub fn upto(&self) -> LogPosition {
        self.upto
    }
}

/// Starts the thread, which waits for its feed.
pub(super) fn spawn(
    device: Arc<dyn Device>,
    opened: Opened,
    options: RingOptions,
) -> Result<Handle, RingError> {
    let name = device.name();
    let (ring, spare) = (opened.header.ring, options.spare_bytes);
    let shared = Arc::new(Shared::new(device, ring, &opened.cursors, spare));
    let theirs = Arc::clone(&shared);
    let (wait, realtime) = (options.idle_header_after, options.realtime);
    let body = move || {
        if realtime {
            go_first(&theirs);
        }
        run(&theirs, opened, (wait, spare));
    };
    let thread = machine::spawn(&options.thread_name, body)
        .map_err(|error| RingError::Thread { device: name, error })?;
    Ok(Handle::new(shared, thread))
}

/// What is refused is said, and nothing else is different.
fn go_first(shared: &Shared) {
    let device = shared.device.name();
    match turn::go_first() {
        Ok(()) => tracing::info!(%device, "commits go first, as SCHED_RR 1"),
        Err(error) => tracing::warn!(
            %device, %error,
            "nvram.realtime: no right to a real-time class, commits stay in the ordinary one; give \
             CAP_SYS_NICE or LimitRTPRIO=1, and RestrictRealtime=no"
        ),
    }
}

/// Ends the process when the thread unwinds.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() && !machine::is_killed() {
            tracing::error!("the committing thread panicked: what is durable is not known");
            std::process::abort();
        }
    }
}

fn run(shared: &Arc<Shared>, opened: Opened, (idle_header_after, spare): (Duration, u64)) {
    let _guard = AbortOnPanic;
    shared.thread_id.get_or_init(|| std::thread::current().id());
    if let Some(feed) = wait_for_feed(shared) {
        let committer = Committer::new(Arc::clone(shared), opened, feed);
        committer.keeping(spare).work(idle_header_after);
    }
    shared.lock().stopped = true;
    shared.changed.notify_all();
}

fn wait_for_feed(shared: &Shared) -> Option<Box<dyn Feed>> {
    let mut state = shared.lock();
    while state.feed.is_none() && !state.stopping {
        state = shared.changed.wait(&shared.state, state).unwrap_or_else(PoisonError::into_inner);
    }
    state.feed.take()
}

/// What one round did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Something was committed.
    Committed,
    /// The feed had nothing.
    Empty,
    /// Records wait for a release.
    NoRoom,
}

enum Next {
    Turn,
    Header,
    Stop,
}

pub(super) struct Committer {
    shared: Arc<Shared>,
    feed: Box<dyn Feed>,
    header: Header,
    cursors: Cursors,
    /// Taken from the feed and not yet committed; at most one commit's worth.
    held: VecDeque<Pending>,
    /// What the feed put first: committed before `held`, also into the spare room.
    first: VecDeque<Pending>,
    spare_bytes: u64,
    batch: AlignedBuffer,
    slot: AlignedBuffer,
    active_at: Instant,
    figures: Figures,
}

/// Where group commits are recorded: handles, so that no lock is taken.
struct Figures {
    seconds: metrics::Histogram,
    bytes: metrics::Histogram,
    records: metrics::Histogram,
}

impl Figures {
    fn new() -> Self {
        Self {
            seconds: metrics::histogram!(names::NVRAM_COMMIT_SECONDS.name),
            bytes: metrics::histogram!(names::NVRAM_COMMIT_BATCH_BYTES.name),
            records: metrics::histogram!(names::NVRAM_COMMIT_BATCH_RECORDS.name),
        }
    }
}

impl Committer {
    pub(super) fn new(shared: Arc<Shared>, opened: Opened, feed: Box<dyn Feed>) -> Self {
        let Opened { header, cursors } = opened;
        Self {
            shared,
            feed,
            batch: AlignedBuffer::new(to_usize(header.commit_bytes_max.0)),
            slot: AlignedBuffer::new(SLOT_BYTES),
            header,
            cursors,
            held: VecDeque::new(),
            first: VecDeque::new(),
            spare_bytes: 0,
            active_at: machine::now(),
            figures: Figures::new(),
        }
    }

    /// Leaves so much room to what the feed puts first.
    pub(super) fn keeping(self, spare_bytes: u64) -> Self {
        Self { spare_bytes, ..self }
    }

    /// The thread's life. Ends when it is told to stop, or with the first error.
    fn work(mut self, idle_header_after: Duration) {
        let ended = self.rounds(idle_header_after).and_then(|()| self.finish());
        if let Err(error) = ended {
            tracing::error!(%error, "ring latched");
            self.shared.latch(&error);
            self.feed.failed(&error);
        }
    }

    fn rounds(&mut self, idle_header_after: Duration) -> Result<(), DeviceError> {
        loop {
            match self.wait(idle_header_after) {
                Next::Turn => while self.turn()? == Turn::Committed {},
                Next::Header => self.write_header()?,
                Next::Stop => return Ok(()),
            }
        }
    }

    /// Commits what the feed still has, as far as there is room, and leaves a header that knows
    /// all of it.
    pub(super) fn finish(&mut self) -> Result<(), DeviceError> {
        while self.turn()? == Turn::Committed {}
        let wanted = self.shared.lock().status().release_wanted;
        if self.header_lags(wanted) { self.write_header() } else { Ok(()) }
    }

    /// Takes if nothing is held, commits what fits, keeps the rest.
    pub(super) fn turn(&mut self) -> Result<Turn, DeviceError> {
        // Before the look: who wakes after this is seen in the next round.
        self.shared.lock().woken = false;
        self.first.extend(self.feed.take_first());
        if self.held.is_empty() {
            self.held = self.feed.take(self.header.commit_bytes_max.0).into();
        }
        if self.held.is_empty() && self.first.is_empty() {
            return Ok(Turn::Empty);
        }
        self.stay_in_reach()?;
        if self.commit()? {
            let wanted = self.shared.lock().status().release_wanted;
            if self.is_far(wanted) {
                self.write_header()?;
            }
            return Ok(Turn::Committed);
        }
        let wanted = self.shared.lock().status().release_wanted;
        if wanted > self.cursors.released() {
            self.write_header()?;
            if self.commit()? {
                return Ok(Turn::Committed);
            }
        }
        Ok(Turn::NoRoom)
    }

    /// A header comes first if a largest commit would end beyond what the last one says (R3).
    fn stay_in_reach(&mut self) -> Result<(), DeviceError> {
        let Header { durable, ahead_max, commit_bytes_max, .. } = self.header;
        let end = self.cursors.written().after(commit_bytes_max);
        if end > durable.after(ahead_max) { self.write_header() } else { Ok(()) }
    }

    /// One group commit of what is held, as far as it fits. `false` if nothing fits.
    fn commit(&mut self) -> Result<bool, DeviceError> {
        let start = self.cursors.written();
        let mut laid = Vec::new();
        let mut filled = 0;
        while let Some((pending, kept_free)) = self.next() {
            let bytes = record_bytes(to_u64(pending.body.len()));
            let largest = RECORD_BYTES_MAX.min(self.header.commit_bytes_max.0);
            assert!(bytes <= largest && !pending.body.is_empty(), "the feed gave {bytes} bytes");
            if to_u64(filled) + bytes > self.header.commit_bytes_max.0 {
                break;
            }
            if bytes + kept_free > self.cursors.free().0 {
                break;
            }
            let position = match self.cursors.reserve(ByteCount(bytes)) {
                Ok(position) => position,
                Err(ReserveError::Full { .. }) => break,
                Err(error @ ReserveError::TooLarge { .. }) => {
                    unreachable!("a commit is never larger than its ring: {error}")
                }
            };
            let end = position.after(ByteCount(bytes));
            self.lay(filled, position, end);
            filled += to_usize(bytes);
            let done = self.first.pop_front().or_else(|| self.held.pop_front());
            if let Some(Pending { ticket, body, .. }) = done {
                laid.push(Committed { ticket, position, end, body });
            }
        }
        let held = self.held.len() + self.first.len();
        let shared = &self.shared;
        shared.change(&mut shared.lock(), |status| status.held_records = to_u64(held));
        if laid.is_empty() {
            return Ok(false);
        }
        let device = &*self.shared.device;
        let begun = Instant::now();
        let syncs = write_log(device, self.cursors.capacity(), start, &self.batch[..filled])?;
        self.figures.seconds.record(begun.elapsed());
        self.figures.bytes.record(to_f64(to_u64(filled)));
        self.figures.records.record(to_f64(to_u64(laid.len())));
        self.made_durable(laid, syncs);
        Ok(true)
    }

    /// What is committed next, and how much room must be left behind it.
    fn next(&self) -> Option<(&Pending, u64)> {
        let first = self.first.front().map(|pending| (pending, 0));
        first.or_else(|| self.held.front().map(|pending| (pending, self.spare_bytes)))
    }

    /// Puts the next record into the buffer as it will lie at `position..end`.
    fn lay(&mut self, filled: usize, position: LogPosition, end: LogPosition) {
        let Some(pending) = self.first.front().or_else(|| self.held.front()) else { return };
        let envelope = Envelope {
            kind: pending.kind,
            ring: self.header.ring,
            position,
            durable: self.cursors.durable(),
            source: pending.source,
            epoch: pending.epoch,
            // Both are bounded by the largest record.
            body_bytes: low_u32(to_u64(pending.body.len())),
            record_bytes: low_u32(end.0 - position.0),
            body_crc: crc32c(&pending.body),
        };
        let record = &mut self.batch[filled..filled + to_usize(end.0 - position.0)];
        let (head, rest) = record.split_at_mut(ENVELOPE_BYTES);
        let (body, padding) = rest.split_at_mut(pending.body.len());
        head.copy_from_slice(&envelope.encode());
        body.copy_from_slice(&pending.body);
        padding.fill(0);
    }

    fn made_durable(&mut self, laid: Vec<Committed>, syncs: u64) {
        let upto = self.cursors.written();
        let bytes = upto.0 - self.cursors.durable().0;
        self.cursors.make_durable(upto);
        self.active_at = machine::now();
        let mut state = self.shared.lock();
        self.shared.change(&mut state, |status| {
            status.commits += 1;
            status.syncs += syncs;
            status.bytes += bytes;
            self.publish(status);
        });
        drop(state);
        self.feed.committed(laid, &DurableToken { upto });
    }

    fn publish(&self, status: &mut RingStatus) {
        status.released = self.cursors.released();
        status.durable = self.cursors.durable();
        status.written = self.cursors.written();
    }

    /// Makes the wanted release and the durable cursor durable, in the older slot.
    fn write_header(&mut self) -> Result<(), DeviceError> {
        let wanted = self.shared.lock().status().release_wanted;
        self.header.released = wanted;
        self.header.durable = self.cursors.durable();
        self.header.generation += 1;
        self.header.encode_into(&mut self.slot);
        self.shared.device.write_durable_at(self.header.slot_offset(), &self.slot)?;
        self.cursors.release(wanted);
        self.active_at = machine::now();
        let mut state = self.shared.lock();
        self.shared.change(&mut state, |status| {
            status.syncs += 1;
            self.publish(status);
        });
        Ok(())
    }

    /// Whether so much was released that it is written down without anybody asking for room.
    fn is_far(&self, wanted: LogPosition) -> bool {
        wanted.0 - self.cursors.released().0 > self.cursors.capacity().0 / 4
    }

    fn header_lags(&self, wanted: LogPosition) -> bool {
        wanted != self.header.released || self.cursors.durable() != self.header.durable
    }

    /// Sleeps until there is something to do.
    fn wait(&self, idle_header_after: Duration) -> Next {
        let shared = &self.shared;
        let mut state = shared.lock();
        loop {
            let wanted = state.status().release_wanted;
            let waits = !(self.held.is_empty() && self.first.is_empty());
            let ready = state.woken || waits && wanted > self.cursors.released();
            if ready {
                return Next::Turn;
            }
            if state.stopping {
                return Next::Stop;
            }
            if self.is_far(wanted) {
                return Next::Header;
            }
            state.asleep = true;
            if self.header_lags(wanted) {
                let left = idle_header_after.saturating_sub(machine::elapsed(self.active_at));
                if left.is_zero() {
                    state.asleep = false;
                    return Next::Header;
                }
                state = shared
                    .changed
                    .wait_timeout(&shared.state, state, left)
                    .unwrap_or_else(PoisonError::into_inner);
            } else {
                state = shared
                    .changed
                    .wait(&shared.state, state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.asleep = false;
        }
    }
}
