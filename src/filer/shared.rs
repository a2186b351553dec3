//! What the parts of a running source share: who it is, its stores, and the state of its parts.
//!
//! Made once by `recover`, then held by exports, feed, forwarder and checkpoint thread. Each part
//! has its own lock inside; none is held while another part is called, but for the order's, which
//! may look at the pins.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::completion::{Completion, Refusal};
use super::counters::Counters;
use super::order::Order;
use super::outbox::Outbox;
use super::signals::{CheckpointSignals, Roots, SessionSignals};
use crate::nvlog::Handle;
use crate::pool::{Pin, Pool};
use crate::units::ids::{HubId, SourceId};
use crate::units::names::SourceName;
use crate::units::numbers::{CpNumber, Epoch, Generation, VolumeNumber};
use crate::wire::message::{Refused, Scanned, VolumeOffer};

/// How CP data travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Apply {
    /// By reference wherever the log has the whole block.
    #[default]
    Reference,
    /// All changed blocks are sent again.
    Inline,
}

/// How things stand with the hub.
#[derive(Debug, Clone)]
pub enum LinkState {
    /// Never welcomed since the start.
    Waiting { reason: String },
    /// In session.
    Connected { since: Instant },
    /// Was welcomed before.
    Offline { since: Instant, reason: String },
    /// No further try without an administrator.
    Halted(Refused),
}

/// Who is who, as far as the hub has a say.
#[derive(Debug, Clone, Copy, Default)]
pub struct Affiliation {
    /// The hub it belongs to.
    pub hub: Option<HubId>,
    /// The epoch in force.
    pub epoch: Epoch,
}

/// A CP that is published on both ends.
#[derive(Debug, Clone)]
pub struct Common {
    /// Its number.
    pub cp: CpNumber,
    /// Its roots.
    pub roots: Roots,
    /// Keeps it readable here.
    pub pins: Arc<BTreeMap<VolumeNumber, Arc<Pin>>>,
}

/// Pins of all volumes at one own CP.
pub type Pins = Arc<BTreeMap<VolumeNumber, Arc<Pin>>>;

/// What the parts of a source share.
#[derive(Debug)]
pub struct Shared {
    /// Its name.
    pub name: SourceName,
    /// Its id.
    pub source: SourceId,
    /// This boot.
    pub generation: Generation,
    /// Its volumes.
    pub volumes: Vec<VolumeOffer>,
    /// How CP data travels.
    pub apply: Apply,
    /// Its pool.
    pub pool: Arc<Pool>,
    /// The one order.
    pub order: Order,
    /// Answers to clients.
    pub completion: Completion,
    /// The transfer table.
    pub outbox: Outbox,
    /// Word for the checkpoint thread.
    pub checkpoint: CheckpointSignals,
    /// Word for the forwarder.
    pub session: SessionSignals,
    /// What was counted.
    pub counters: Counters,
    /// Set when the ring is started.
    pub ring: Arc<OnceLock<Handle>>,
    /// The newest CP that both ends have published; `None` before it is known.
    pub common: watch::Sender<Option<Common>>,
    /// Whether clients may be served.
    pub serving: watch::Sender<bool>,
    /// The newest answer of the hub to a scan.
    pub scans: watch::Sender<Option<Scanned>>,
    /// A verification is under way.
    pub scanning: AtomicBool,
    /// A scan that the hub asked for is under way.
    pub answering: AtomicBool,
    /// When it was started.
    pub started: Instant,
    pub(super) state: Mutex<SharedState>,
}

/// What changes and is small.
#[derive(Debug)]
pub(super) struct SharedState {
    pub(super) affiliation: Affiliation,
    pub(super) link: LinkState,
    pub(super) failed: Option<Arc<str>>,
    pub(super) own_cp: CpNumber,
    pub(super) own_roots: Roots,
    pub(super) pins: Pins,
    /// Last refusal of a CP by the hub, until one is published.
    pub(super) rejected: Option<String>,
}

impl Shared {
    /// Hub and epoch.
    pub fn affiliation(&self) -> Affiliation {
        self.lock().affiliation
    }

    /// The epoch in force.
    pub fn epoch(&self) -> Epoch {
        self.affiliation().epoch
    }

    /// The ring, once it was started.
    pub fn ring(&self) -> Option<&Handle> {
        self.ring.get()
    }

    /// Pins of the newest own CP.
    pub fn pins(&self) -> Pins {
        Arc::clone(&self.lock().pins)
    }

    /// The newest own CP and its roots.
    pub fn own(&self) -> (CpNumber, Roots) {
        let state = self.lock();
        (state.own_cp, state.own_roots.clone())
    }

    /// A newer own CP is durable; what was pinned before may go when its readers are done.
    pub fn set_own(&self, cp: CpNumber, roots: Roots, pins: Pins) {
        let mut state = self.lock();
        assert!(cp >= state.own_cp, "own CPs rise");
        state.own_cp = cp;
        state.own_roots = roots;
        let before = std::mem::replace(&mut state.pins, pins);
        drop(state);
        // A pin goes back to the pool, which takes its own lock.
        drop(before);
    }

    /// How things stand with the hub.
    pub fn link(&self) -> LinkState {
        self.lock().link.clone()
    }

    /// Whether the hub takes transfers now.
    pub fn is_connected(&self) -> bool {
        matches!(self.link(), LinkState::Connected { .. })
    }

    /// Notes how things stand with the hub.
    pub fn set_link(&self, link: LinkState) {
        self.lock().link = link;
    }

    /// Why the hub refused the CP that is tried again.
    pub fn rejected(&self) -> Option<String> {
        self.lock().rejected.clone()
    }

    /// The hub refused a CP, or published one.
    pub fn set_rejected(&self, reason: Option<String>) {
        self.lock().rejected = reason;
    }

    /// A store failed: nothing is ordered or acknowledged any more (R17). The first reason stays.
    pub fn fail(&self, reason: &str) {
        let reason: Arc<str> = reason.into();
        let first = {
            let mut state = self.lock();
            Arc::clone(state.failed.get_or_insert_with(|| Arc::clone(&reason)))
        };
        tracing::error!(source = %self.name, %reason, "the source has failed");
        self.order.refuse(Refusal::Failed(Arc::clone(&first)));
        self.completion.refuse(Refusal::Failed(first));
    }

    /// Fails the source if the holder's thread or task unwinds: clients get an error instead of
    /// waiting for somebody who is gone.
    pub fn fail_on_panic(self: &Arc<Self>, what: &'static str) -> FailOnPanic {
        FailOnPanic { shared: Arc::clone(self), what }
    }

    /// Why nothing is acknowledged any more.
    pub fn failed(&self) -> Option<Arc<str>> {
        self.lock().failed.clone()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, SharedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Shared::fail_on_panic`].
#[derive(Debug)]
#[must_use = "it is held as long as the thread or task runs"]
pub struct FailOnPanic {
    shared: Arc<Shared>,
    what: &'static str,
}

impl Drop for FailOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.fail(self.what);
        }
    }
}

/// Shortest and longest pause before the next try to reach the hub.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// The first pause.
    pub least: Duration,
    /// The longest.
    pub most: Duration,
}
