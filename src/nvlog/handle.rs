//! What other threads may ask of a ring, and tell it.
//!
//! A [`Handle`] and the committing thread share one small state behind a mutex and a condition:
//! callers leave word (there is something to take, this may be released, stop), the thread leaves
//! what it has done. No word is lost: each is a flag or a position that stays until the thread has
//! seen it under the lock. The lock is never held during I/O or a call of the feed.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{JoinHandle, ThreadId};

use bytes::Bytes;

use super::Feed;
use super::cursors::Cursors;
use super::error::RingError;
use super::figures::Figures;
use super::format::device_ranges;
use crate::device::buffer::AlignedBuffer;
use crate::device::{Device, DeviceError, Durability};
use crate::limits::RECORD_ALIGN_BYTES;
use crate::record::envelope::{ENVELOPE_BYTES, Envelope};
use crate::units::convert::{to_u64, to_usize, u32_to_usize};
use crate::units::ids::RingId;
use crate::units::machine::{self, Bell};
use crate::units::numbers::{ByteCount, LogPosition};

/// Bytes that [`Handle::read`] reads at first: most records are not longer.
const READ_FIRST_BYTES: u64 = 8192;

/// What a ring is doing, for status, metrics and admission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingStatus {
    /// Bytes of the data area.
    pub capacity: ByteCount,
    /// Space before this may be reused: a durable header says so.
    pub released: LogPosition,
    /// What was asked for; becomes `released` when a header is written.
    pub release_wanted: LogPosition,
    /// Everything before this is on the medium.
    pub durable: LogPosition,
    /// The next record begins here.
    pub written: LogPosition,
    /// Records taken from the feed that wait for room.
    pub held_records: u64,
    /// Group commits done.
    pub commits: u64,
    /// Durable writes done: one a commit, two where it wraps, one a header.
    pub syncs: u64,
    /// Bytes of records committed.
    pub bytes: u64,
    /// Why nothing is committed any more.
    pub latched: Option<Arc<str>>,
    /// How a commit is made durable.
    pub durability: Durability,
}

pub(super) struct State {
    /// There may be something to take.
    pub(super) woken: bool,
    pub(super) stopping: bool,
    /// The thread does nothing any more.
    pub(super) stopped: bool,
    /// The thread would see a release only after a notice.
    pub(super) asleep: bool,
    pub(super) feed: Option<Box<dyn Feed>>,
    /// Changed by [`Shared::change`] alone, which has it shown.
    status: RingStatus,
}

impl State {
    pub(super) fn status(&self) -> &RingStatus {
        &self.status
    }
}

pub(super) struct Shared {
    pub(super) device: Arc<dyn Device>,
    pub(super) ring: RingId,
    pub(super) thread_id: OnceLock<ThreadId>,
    thread: Mutex<Option<JoinHandle<()>>>,
    spare_bytes: u64,
    pub(super) state: Mutex<State>,
    pub(super) changed: Bell,
    figures: Figures,
}

impl Shared {
    pub(super) fn new(
        device: Arc<dyn Device>,
        ring: RingId,
        cursors: &Cursors,
        spare_bytes: u64,
    ) -> Self {
        let status = RingStatus {
            capacity: cursors.capacity(),
            released: cursors.released(),
            release_wanted: cursors.released(),
            durable: cursors.durable(),
            written: cursors.written(),
            held_records: 0,
            commits: 0,
            syncs: 0,
            bytes: 0,
            latched: None,
            durability: device.durability(),
        };
        let figures = Figures::new(&status);
        let state = State {
            woken: true,
            stopping: false,
            stopped: false,
            asleep: false,
            feed: None,
            status,
        };
        Self {
            device,
            ring,
            thread_id: OnceLock::new(),
            thread: Mutex::new(None),
            spare_bytes,
            state: Mutex::new(state),
            changed: Bell::new(),
            figures,
        }
    }

    /// Changes what is shown of the ring; whoever looks sees all of it or nothing.
    pub(super) fn change(&self, state: &mut State, change: impl FnOnce(&mut RingStatus)) {
        change(&mut state.status);
        self.figures.tell(&state.status);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock but the assertion of `release`, which
        // comes before any change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn latch(&self, error: &DeviceError) {
        let reason = error.to_string().into();
        self.change(&mut self.lock(), |status| status.latched = Some(reason));
    }
}

/// The way to a running ring, for any thread. The device stays open and locked while one exists.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl Handle {
    pub(super) fn new(shared: Arc<Shared>, thread: JoinHandle<()>) -> Self {
        *shared.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Self { shared }
    }

    /// For tests that drive the committer themselves.
    #[cfg(test)]
    pub(super) fn without_thread(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    pub(super) fn give(&self, feed: Box<dyn Feed>) {
        self.shared.lock().feed = Some(feed);
        self.shared.changed.notify_all();
    }

    /// There is something to take. Call it after the feed can see it. Cheap, never blocks long.
    pub fn wake(&self) {
        let mut state = self.shared.lock();
        state.woken = true;
        let asleep = state.asleep;
        drop(state);
        if asleep {
            self.shared.changed.notify_all();
        }
    }

    /// Everything before `upto` is not needed any more. `upto` is the end of a record (of
    /// [`super::Committed`], or as found at the opening); an older one than before changes nothing.
    /// Made durable when room is wanted, when much has gathered, after a second idle, and at a stop.
    pub fn release(&self, upto: LogPosition) {
        let mut state = self.shared.lock();
        let durable = state.status.durable;
        assert!(upto <= durable, "release of {upto}, durable is {durable}");
        assert!(upto.0.is_multiple_of(RECORD_ALIGN_BYTES), "release of {upto} inside a record");
        if upto > state.status.release_wanted {
            self.shared.change(&mut state, |status| status.release_wanted = upto);
            if state.asleep {
                self.shared.changed.notify_all();
            }
        }
    }

    /// What it is doing. Takes no lock: never waits for the ring, and never makes it wait.
    pub fn status(&self) -> RingStatus {
        self.shared.figures.status()
    }

    /// What its lock's holder has of that, for tests.
    #[cfg(test)]
    pub(super) fn status_under_lock(&self) -> RingStatus {
        self.shared.lock().status.clone()
    }

    /// Holds the lock that all calls of the data path take, for tests.
    #[cfg(test)]
    pub(crate) fn hold(&self) -> impl Drop + use<'_> {
        struct Held<'a>(#[expect(dead_code, reason = "it is held")] MutexGuard<'a, State>);
        impl Drop for Held<'_> {
            fn drop(&mut self) {}
        }
        Held(self.shared.lock())
    }

    /// Bytes of records that still fit, the spare room left out. What was released counts: it is
    /// made durable on demand.
    pub fn room(&self) -> u64 {
        let state = self.shared.lock();
        let status = &state.status;
        let free = status.capacity.0 - (status.written.0 - status.release_wanted.0);
        free.saturating_sub(self.shared.spare_bytes)
    }

    /// Reads the record that begins at `position`, between `released` and `durable`, and checks it.
    pub fn read(&self, position: LogPosition) -> Result<(Envelope, Bytes), RingError> {
        let limit = self.readable(position)?;
        match self.read_below(position, limit) {
            // The space may have been released and reused meanwhile.
            Err(error @ RingError::Record { .. }) => self.readable(position).and(Err(error)),
            other => other,
        }
    }

    fn readable(&self, position: LogPosition) -> Result<LogPosition, RingError> {
        let state = self.shared.lock();
        let (released, durable) = (state.status.released, state.status.durable);
        if released <= position
            && position < durable
            && position.0.is_multiple_of(RECORD_ALIGN_BYTES)
        {
            return Ok(durable);
        }
        let device = self.shared.device.name();
        Err(RingError::OutOfRange { device, position, released, durable })
    }

    fn read_below(
        &self,
        position: LogPosition,
        limit: LogPosition,
    ) -> Result<(Envelope, Bytes), RingError> {
        let device = &*self.shared.device;
        let bad = |error| RingError::Record { device: device.name(), position, error };
        let capacity = self.shared.lock().status.capacity;
        let first = to_usize(READ_FIRST_BYTES.min(limit.0 - position.0));
        let mut bytes = AlignedBuffer::new(first);
        read_log(device, capacity, position, &mut bytes)?;
        let mut head = [0; ENVELOPE_BYTES];
        head.copy_from_slice(&bytes[..ENVELOPE_BYTES]);
        let envelope = Envelope::decode_at(&head, self.shared.ring, position).map_err(bad)?;
        // Bounded: an envelope's lengths were checked when it was decoded.
        let whole = u32_to_usize(envelope.record_bytes);
        if to_u64(whole) > limit.0 - position.0 {
            let released = self.shared.lock().status.released;
            let device = device.name();
            return Err(RingError::OutOfRange { device, position, released, durable: limit });
        }
        if whole > first {
            bytes = AlignedBuffer::new(whole);
            read_log(device, capacity, position, &mut bytes)?;
        }
        let body = &bytes[ENVELOPE_BYTES..ENVELOPE_BYTES + u32_to_usize(envelope.body_bytes)];
        envelope.check_body(body).map_err(bad)?;
        Ok((envelope, Bytes::copy_from_slice(body)))
    }

    /// Commits what the feed still has, writes the header, ends the thread and waits for that.
    /// Records that find no room are left: `held_records` says how many, and none of them was
    /// reported committed. Further calls wait for the same end.
    pub fn stop(&self) {
        let mut state = self.shared.lock();
        state.stopping = true;
        self.shared.changed.notify_all();
        if self.shared.thread_id.get() == Some(&std::thread::current().id()) {
            // The feed asks from within: it ends when this call of the feed is over.
            return;
        }
        while !state.stopped {
            state = self
                .shared
                .changed
                .wait(&self.shared.state, state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| machine::join(thread).is_err()) {
            // Cannot be: a panic there ends the process.
            tracing::error!(device = %self.shared.device.name(), "committing thread panicked");
        }
    }
}

/// Fills `bytes` from a position of the log, around the end of the area if need be.
pub(super) fn read_log(
    device: &dyn Device,
    capacity: ByteCount,
    position: LogPosition,
    bytes: &mut [u8],
) -> Result<(), DeviceError> {
    let [(offset, count), (wrapped, _)] = device_ranges(capacity, position, bytes.len());
    let (head, tail) = bytes.split_at_mut(count);
    device.read_at(offset, head)?;
    if tail.is_empty() { Ok(()) } else { device.read_at(wrapped, tail) }
}

/// Makes `bytes` durable at a position of the log; says how many durable writes it took.
pub(super) fn write_log(
    device: &dyn Device,
    capacity: ByteCount,
    position: LogPosition,
    bytes: &[u8],
) -> Result<u64, DeviceError> {
    let [(offset, count), (wrapped, _)] = device_ranges(capacity, position, bytes.len());
    let (head, tail) = bytes.split_at(count);
    device.write_durable_at(offset, head)?;
    if tail.is_empty() {
        return Ok(1);
    }
    device.write_durable_at(wrapped, tail)?;
    Ok(2)
}
