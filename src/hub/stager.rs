//! The stager: puts transfers of all sources into the one NVRAM ring, each source's in order.
//!
//! Actors call [`Stager::stage`]; the ring's committing thread takes what has gathered, writes it
//! with one durable write and comes back through [`Feed`]: each transfer's lane moves its durable
//! cursor, and the record goes to the drainer. The queue is bounded by the credits that the actors
//! gave out (a source never has more under way than its credit).
//!
//! Copies of records that hold the ring's end (R10) overtake what waits, and have room of their
//! own that is in nobody's credit: they make room, and must not wait for it.
//!
//! A failed commit is final: every lane is faulted with the ring's first error, nothing is
//! acknowledged any more (invariant 7).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::drainer::{DrainQueue, Drainable, Record};
use super::lane::{Fenced, Lane, lock};
use super::line::{Line, Waits};
use super::shared::Shared;
use crate::device::DeviceError;
use crate::limits::RECORD_BYTES_MAX;
use crate::metric::catalogue::ACK_SECONDS;
use crate::nvlog::{Committed, DurableToken, Feed, Handle, Pending};
use crate::record::envelope::{RecordKind, record_bytes};
use crate::record::marks::{Fence, MARK_BYTES, Place};
use crate::record::transfer::Transfer;
use crate::units::convert::to_u64;
use crate::units::ids::SourceId;
use crate::units::machine;
use crate::units::numbers::Epoch;

/// A transfer on its way through the ring.
#[derive(Debug, Clone)]
pub struct Staged {
    /// Whose it is.
    pub lane: Arc<Lane>,
    /// Under which epoch it was taken.
    pub epoch: Epoch,
    /// The transfer.
    pub transfer: Transfer,
    /// When it came.
    pub came: Instant,
}

impl Staged {
    /// Bytes of its record in the ring.
    pub fn record_bytes(&self) -> u64 {
        record_bytes(to_u64(self.transfer.bytes().len()))
    }

    /// Its place in the source's history.
    pub fn place(&self) -> Place {
        self.transfer.place()
    }

    fn pending(&self, ticket: u64) -> Pending {
        Pending {
            kind: RecordKind::Transfer,
            source: self.lane.source(),
            epoch: self.epoch,
            body: self.transfer.bytes().clone(),
            ticket,
        }
    }
}

/// Bytes of a fence's record in the ring.
pub fn fence_record_bytes() -> u64 {
    record_bytes(to_u64(MARK_BYTES))
}

/// What goes into the ring.
#[derive(Debug)]
enum Item {
    Transfer(Staged),
    Fence { lane: Arc<Lane>, fence: Fence },
}

impl Waits for Item {
    fn source(&self) -> SourceId {
        self.lane().source()
    }

    fn record_bytes(&self) -> u64 {
        match self {
            Self::Transfer(staged) => staged.record_bytes(),
            Self::Fence { .. } => fence_record_bytes(),
        }
    }
}

impl Item {
    fn lane(&self) -> &Arc<Lane> {
        match self {
            Self::Transfer(staged) => &staged.lane,
            Self::Fence { lane, .. } => lane,
        }
    }

    /// The ring has failed: it will not be durable.
    fn lost(&self, reason: &str) {
        self.lane().fault(reason);
        if let Self::Fence { lane, .. } = self {
            lane.fence_is(Fenced::Failed);
        }
    }

    fn pending(&self) -> Pending {
        match self {
            Self::Transfer(staged) => staged.pending(TRANSFER),
            Self::Fence { lane, fence } => Pending {
                kind: RecordKind::Fence,
                source: lane.source(),
                epoch: fence.epoch,
                body: Bytes::copy_from_slice(&fence.encode()),
                ticket: TRANSFER,
            },
        }
    }
}

/// What waits for the committing thread.
#[derive(Debug, Default)]
struct Queue {
    waiting: Line<Item>,
    copies: VecDeque<Staged>,
    failed: Option<Arc<str>>,
}

/// The stager; shared by all actors.
#[derive(Debug, Default)]
pub struct Stager {
    queue: Mutex<Queue>,
    handle: OnceLock<Handle>,
    /// Whose lanes are faulted with the ring.
    shared: OnceLock<Weak<Shared>>,
}

/// Bytes of the ring that only copies may use (R10).
pub const COPY_ROOM_BYTES: u64 = RECORD_BYTES_MAX;

/// Tickets of the ring's records: which of the two queues it came from.
const TRANSFER: u64 = 0;
const COPY: u64 = 1;

impl Stager {
    /// A stager whose ring is started with [`Stager::start`].
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// The ring runs.
    pub fn start(&self, handle: Handle) {
        assert!(self.handle.set(handle).is_ok(), "the stager is started once");
    }

    /// The hub is put together: a ring that fails faults all of its lanes.
    pub fn belongs_to(&self, shared: &Arc<Shared>) {
        self.shared.get_or_init(|| Arc::downgrade(shared));
        if let Some(reason) = self.failure() {
            shared.lanes.fault(&reason);
        }
    }

    /// Why nothing is committed any more.
    pub fn failure(&self) -> Option<Arc<str>> {
        lock(&self.queue).failed.clone()
    }

    /// The ring, for status and release.
    pub fn ring(&self) -> Option<&Handle> {
        self.handle.get()
    }

    /// Queues a transfer. The lane's durable cursor says when it is durable. Behind a fence it is
    /// dropped: it is neither stored nor ever acknowledged (R2).
    pub fn stage(&self, staged: Staged) {
        let transfer_bytes = to_u64(staged.transfer.bytes().len());
        // The queue's lock is held, so that the ring has transfers and fence in the lane's order.
        let queue = lock(&self.queue);
        if staged.lane.staged(staged.place(), staged.record_bytes(), transfer_bytes) {
            self.push(queue, Item::Transfer(staged));
        } else {
            let (source, id) = (staged.lane.name(), staged.transfer.id());
            tracing::warn!(%source, transfer = %id, "dropped: it came behind the fence");
        }
    }

    /// Queues a fence: everything that was staged of the source comes before it, nothing behind it
    /// (R2). With `at` everything behind that place is given up. The lane says when it is durable.
    pub fn fence(&self, lane: &Arc<Lane>, epoch: Epoch, at: Option<Place>) -> Fence {
        let queue = lock(&self.queue);
        let fence = lane.fence(epoch, at, fence_record_bytes());
        self.push(queue, Item::Fence { lane: lane.clone(), fence });
        fence
    }

    /// Queues a copy of a record that the drainer could not drain (R10).
    pub fn copy_forward(&self, staged: Staged) {
        staged.lane.copied_forward(staged.record_bytes());
        self.push_copy(staged);
    }

    /// Copies overtake what waits: they make room, and must not wait for it.
    fn push_copy(&self, copy: Staged) {
        let mut queue = lock(&self.queue);
        if let Some(reason) = queue.failed.clone() {
            drop(queue);
            copy.lane.fault(&reason);
            return;
        }
        queue.copies.push_back(copy);
        drop(queue);
        self.wake();
    }

    fn push(&self, mut queue: MutexGuard<'_, Queue>, item: Item) {
        if let Some(reason) = queue.failed.clone() {
            drop(queue);
            item.lost(&reason);
            return;
        }
        queue.waiting.push(item);
        drop(queue);
        self.wake();
    }

    fn wake(&self) {
        if let Some(handle) = self.handle.get() {
            handle.wake();
        }
    }
}

/// The stager's end in the committing thread.
#[derive(Debug)]
pub struct StagerFeed {
    stager: Arc<Stager>,
    drain: Arc<DrainQueue>,
    writing: VecDeque<Item>,
    copying: VecDeque<Staged>,
    /// When the last batch was taken, and how long it took if it is durable.
    taken: Instant,
    took: Option<Duration>,
    /// A handle, so that recording takes no lock.
    ack_seconds: metrics::Histogram,
}

impl StagerFeed {
    /// Feeds the ring from `stager`; what is durable goes to `drain`.
    pub fn new(stager: Arc<Stager>, drain: Arc<DrainQueue>) -> Self {
        let ack_seconds = metrics::histogram!(ACK_SECONDS.name);
        let (writing, copying) = Default::default();
        let (taken, took) = (machine::now(), None);
        Self { stager, drain, writing, copying, taken, took, ack_seconds }
    }
}

impl Feed for StagerFeed {
    fn take(&mut self, bytes_max: u64) -> Vec<Pending> {
        let items = {
            let mut queue = lock(&self.stager.queue);
            if let Some(length) = self.took.take() {
                queue.waiting.took(length, bytes_max);
            }
            queue.waiting.take(bytes_max)
        };
        self.taken = machine::now();
        let batch = items.iter().map(Item::pending).collect();
        self.writing.extend(items);
        batch
    }

    fn take_first(&mut self) -> Vec<Pending> {
        let copies = std::mem::take(&mut lock(&self.stager.queue).copies);
        let batch = copies.iter().map(|copy| copy.pending(COPY)).collect();
        self.copying.extend(copies);
        batch
    }

    fn committed(&mut self, batch: Vec<Committed>, token: &DurableToken) {
        let since = machine::now();
        self.took = Some(since.saturating_duration_since(self.taken));
        for done in batch {
            assert!(done.end <= token.upto(), "a record is durable with its commit");
            let end = done.end;
            if done.ticket == COPY {
                // Of what lies in the ring once more nothing is new: not how far the source has
                // come, nor what it has under way.
                let Some(copy) = self.copying.pop_front() else {
                    panic!("the ring committed a copy that was not staged");
                };
                self.drain.push(Drainable { record: Record::Transfer(copy), end, since });
                continue;
            }
            let staged = match self.writing.pop_front() {
                Some(Item::Transfer(staged)) => staged,
                Some(Item::Fence { lane, .. }) => {
                    lane.fence_is(Fenced::InRing);
                    self.drain.push(Drainable { record: Record::Fence(lane), end, since });
                    continue;
                }
                None => panic!("the ring committed a record that was not staged"),
            };
            let (cp, bytes) = (staged.transfer.header().cp, staged.transfer.data_bytes());
            let transfer_bytes = to_u64(staged.transfer.bytes().len());
            staged.lane.durable(staged.place(), cp, (bytes, transfer_bytes), token);
            self.ack_seconds.record(since.saturating_duration_since(staged.came));
            self.drain.push(Drainable { record: Record::Transfer(staged), end, since });
        }
    }

    fn failed(&mut self, error: &DeviceError) {
        let reason: Arc<str> = format!("the hub's NVRAM failed: {error}").into();
        let mut queue = lock(&self.stager.queue);
        queue.failed = Some(reason.clone());
        let waiting = queue.waiting.drain();
        let copies = std::mem::take(&mut queue.copies);
        drop(queue);
        for item in self.writing.drain(..).chain(waiting) {
            item.lost(&reason);
        }
        for copy in self.copying.drain(..).chain(copies) {
            copy.lane.fault(&reason);
        }
        // Also of sources that have nothing under way: none is acknowledged from now on.
        if let Some(shared) = self.stager.shared.get().and_then(Weak::upgrade) {
            shared.lanes.fault(&reason);
        }
        self.drain.fail(&reason);
    }
}
