//! What the threads of a source tell each other, as slots instead of queues.
//!
//! The committing thread, the forwarder, timers and commands leave word for the checkpoint
//! thread ([`CheckpointSignals`]); the checkpoint thread and commands leave word for the
//! forwarder ([`SessionSignals`]). At most one CP is under way, so one slot of each kind is
//! enough, and no word is lost: it stays until it was taken.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::feed::DurableFreeze;
use super::plan::{Plan, TransferRow};
use super::shared::Pins;
use crate::units::hash::Root;
use crate::units::machine::Bell;
use crate::units::numbers::{CpNumber, SequenceNumber, VolumeNumber};
use crate::units::policy::Policy;
use crate::wire::homes::Adopted;
use crate::wire::message::{Frame, Scanned, VolumeOffer, WantPlace};

/// Scans that wait for the checkpoint thread or the forwarder.
const SCANS_MAX: usize = 8;

/// A CP whose partition may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpOver {
    /// Which.
    pub cp: CpNumber,
    /// It is committed here, and the hub is known to lack it.
    pub alone: bool,
}

/// Word for the checkpoint thread.
#[derive(Debug, Default)]
pub struct CheckpointInbox {
    /// The freeze of a CP is durable.
    pub frozen: Option<DurableFreeze>,
    /// The partition of a CP may go: the hub has published it, or else it is committed `alone`.
    pub done: Option<CpOver>,
    /// Somebody wants a CP now.
    pub wanted: bool,
    /// Also of nothing: a CP number behind everything that the hub may hold is needed.
    pub forced: bool,
    /// End the thread.
    pub stop: bool,
}

/// The way to the checkpoint thread.
#[derive(Debug, Default)]
pub struct CheckpointSignals {
    inbox: Mutex<CheckpointInbox>,
    changed: Bell,
}

impl CheckpointSignals {
    /// A freeze is durable.
    pub fn frozen(&self, freeze: DurableFreeze) {
        self.leave(|inbox| {
            let earlier = inbox.frozen.replace(freeze);
            assert!(earlier.is_none(), "one CP is under way at a time");
        });
    }

    /// The partition of a CP may go.
    pub fn done(&self, over: CpOver) {
        self.leave(|inbox| inbox.done = Some(over));
    }

    /// A CP is needed, be it of nothing.
    pub fn force(&self) {
        self.leave(|inbox| inbox.forced = true);
    }

    /// Somebody wants a CP.
    pub fn want(&self) {
        self.leave(|inbox| inbox.wanted = true);
    }

    /// The thread is to end.
    pub fn stop(&self) {
        self.leave(|inbox| inbox.stop = true);
    }

    /// The terms have changed.
    pub fn look_again(&self) {
        self.leave(|_| ());
    }

    /// Clients are served from now on: what was asked for before counts.
    pub fn serving(&self) {
        self.leave(|_| ());
    }

    /// Waits at most `timeout` for word that `ready` accepts; takes what it is given to.
    pub fn wait<T>(
        &self,
        timeout: Duration,
        mut ready: impl FnMut(&mut CheckpointInbox) -> Option<T>,
    ) -> Option<T> {
        let mut inbox = self.lock();
        if let Some(word) = ready(&mut inbox) {
            return Some(word);
        }
        inbox = self
            .changed
            .wait_timeout(&self.inbox, inbox, timeout)
            .unwrap_or_else(PoisonError::into_inner);
        ready(&mut inbox)
    }

    fn leave(&self, word: impl FnOnce(&mut CheckpointInbox)) {
        word(&mut self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, CheckpointInbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the forwarder needs to send the data of a CP.
#[derive(Debug, Clone)]
pub struct CpData {
    /// The CP and its place.
    pub freeze: DurableFreeze,
    /// Its changed blocks.
    pub plan: Arc<Plan>,
    /// Its transfers.
    pub rows: Arc<[TransferRow]>,
}

/// A CP that is durable in the own pool.
#[derive(Debug, Clone)]
pub struct Committed {
    /// Its number.
    pub cp: CpNumber,
    /// Its roots.
    pub roots: Roots,
    /// Keeps it readable.
    pub pins: Pins,
}

/// Roots of all volumes.
pub type Roots = Vec<(VolumeNumber, Root)>;

/// Word for the forwarder.
#[derive(Debug, Default)]
pub struct SessionInbox {
    /// The freeze of this CP is durable and its plan is made.
    pub frozen: Option<CpData>,
    /// The own commit of this CP is durable.
    pub committed: Option<Committed>,
    /// Writers wait for the room of this CP, which is committed here.
    pub pressed: Option<CpNumber>,
    /// The volumes, some of which have grown: the hub is told before anything else.
    pub grown: Option<Arc<Vec<VolumeOffer>>>,
    /// Another policy follows, without a freeze: nothing was ordered behind the last one.
    pub promised: Option<(Policy, SequenceNumber)>,
    /// Ask the hub to scan a CP.
    pub scan: Option<(CpNumber, u64)>,
    /// Answers to scans that the hub asked for.
    pub scanned: Vec<Scanned>,
    /// Places that the hub is asked for, and answers to what it asked: bounded by who asks.
    pub wants: Vec<WantPlace>,
    /// See `wants`.
    pub places: Vec<Frame>,
    /// The answer to the hub's question whether another source can live here.
    pub adopted: Option<Adopted>,
    /// Say good-bye and end.
    pub stop: bool,
}

/// The way to the forwarder.
#[derive(Debug, Default)]
pub struct SessionSignals {
    inbox: Mutex<SessionInbox>,
    changed: Notify,
}

impl SessionSignals {
    /// A CP is frozen and planned.
    pub fn frozen(&self, data: CpData) {
        self.leave(|inbox| inbox.frozen = Some(data));
    }

    /// The own commit of a CP is durable.
    pub fn committed(&self, committed: Committed) {
        self.leave(|inbox| inbox.committed = Some(committed));
    }

    /// Writers wait for the room of a CP that is committed here.
    pub fn pressed(&self, cp: CpNumber) {
        self.leave(|inbox| inbox.pressed = Some(cp));
    }

    /// Volumes have grown; durable, and in no CP yet.
    pub fn grown(&self, volumes: Arc<Vec<VolumeOffer>>) {
        self.leave(|inbox| inbox.grown = Some(volumes));
    }

    /// Another policy follows, and is kept durably.
    pub fn promised(&self, next: Policy, behind: SequenceNumber) {
        self.leave(|inbox| inbox.promised = Some((next, behind)));
    }

    /// The hub is asked for a place.
    pub fn want_place(&self, want: WantPlace) {
        self.leave(|inbox| inbox.wants.push(want));
    }

    /// The answer to what the hub asked.
    pub fn place(&self, frame: Frame) {
        self.leave(|inbox| inbox.places.push(frame));
    }

    /// The hub is to scan a CP.
    pub fn scan(&self, cp: CpNumber, token: u64) {
        self.leave(|inbox| inbox.scan = Some((cp, token)));
    }

    /// The answer to a scan the hub asked for. A hub that asks faster than it is answered gets
    /// the newest answers.
    pub fn scanned(&self, scanned: Scanned) {
        self.leave(|inbox| {
            if inbox.scanned.len() == SCANS_MAX {
                inbox.scanned.remove(0);
            }
            inbox.scanned.push(scanned);
        });
    }

    /// The hub's question whether another source can live here is answered.
    pub fn adopted(&self, adopted: Adopted) {
        self.leave(|inbox| inbox.adopted = Some(adopted));
    }

    /// The forwarder is to end.
    pub fn stop(&self) {
        self.leave(|inbox| inbox.stop = true);
    }

    /// Takes all word; `stop` stays, and so do scans unless the session `streams`: nobody could be
    /// asked or answered.
    pub fn take(&self, streams: bool) -> SessionInbox {
        let mut inbox = self.lock();
        let stop = inbox.stop;
        let left = SessionInbox { stop, ..SessionInbox::default() };
        let mut word = std::mem::replace(&mut *inbox, left);
        if !streams {
            inbox.scan = word.scan.take();
            inbox.scanned = std::mem::take(&mut word.scanned);
            inbox.adopted = word.adopted.take();
        }
        word
    }

    /// Whether the forwarder is to end.
    pub fn stopping(&self) -> bool {
        self.lock().stop
    }

    /// Waits for new word; may return without.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    fn leave(&self, word: impl FnOnce(&mut SessionInbox)) {
        word(&mut self.lock());
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, SessionInbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
