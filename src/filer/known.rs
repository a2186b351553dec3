//! What is known of how a source stands with its hub, its CPs and its stores, and the lock that it changes under.
//!
//! Held by `shared`, which says what each change means. A change is made under the lock, and its outcome is
//! shown before the lock is let go of: whoever only asks never takes it, so that no status waits for the data
//! path. What clients' reads need, and whose end may take long, is in [`Standing`] beside it and not shown.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use super::beneath::Ground;
use super::shared::{Affiliation, LinkState, PassStatus, Pins};
use super::signals::Roots;
use crate::session::primary::Answering;
use crate::units::latest::Latest;
use crate::units::moment::{self, Shown, Shows};
use crate::units::numbers::{ByteCount, CpNumber, Epoch, SequenceNumber, VolumeNumber};
use crate::units::policy::AloneMark;
use crate::wire::message::VolumeRefusal;

/// What is known; all of one moment. Small: each change makes another one.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) affiliation: Affiliation,
    pub(super) link: LinkState,
    pub(super) failed: Option<Arc<str>>,
    /// It was a fault of this program, not of a store.
    pub(super) panicked: bool,
    pub(super) own_cp: CpNumber,
    pub(super) own_roots: Roots,
    /// Last refusal of a CP by the hub, until one is published.
    pub(super) rejected: Option<String>,
    /// Why nothing is tried with the hub before there is a newer CP (R19).
    pub(super) faulted: Option<(CpNumber, String)>,
    /// Volumes that the hub leaves out, as it said last (R20).
    pub(super) refused: Vec<VolumeRefusal>,
    /// That refusal was for lack of room in the hub's pool.
    pub(super) lacks_hub_room: bool,
    /// The hub got on with nothing although something was owed, and how far it was then.
    pub(super) slow: Option<(String, (SequenceNumber, CpNumber))>,
    /// How the hub was set back behind what it had acknowledged, if it was since the start (R7).
    pub(super) set_back: Option<String>,
    /// How far writes are answered, as the session says.
    pub(super) answering: Answering,
    /// The durable mark of writes acknowledged without the hub (R4).
    pub(super) mark: Option<AloneMark>,
    pub(super) marked_at: Instant,
    /// The mark was found at the start.
    pub(super) mark_was_found: bool,
    /// Somebody else is primary in that epoch.
    pub(super) fenced: Option<Epoch>,
    /// The pass under way.
    pub(super) pass: Option<PassStatus>,
    /// Sizes of the volumes in the newest own CP.
    pub(super) own_sizes: Arc<BTreeMap<VolumeNumber, ByteCount>>,
}

/// The same, and what lies behind it.
#[derive(Debug)]
pub(super) struct Standing {
    /// What is shown of it.
    pub(super) known: Known,
    /// Keeps the newest own CP readable.
    pub(super) pins: Pins,
    /// What lies between the pinned trees and the first entry of the NVRAM, until it is in a tree.
    pub(super) ground: Option<Ground>,
}

impl Standing {
    /// Other pins are those of the newest own CP; gives back the ones before, to be dropped without the lock.
    pub(super) fn pin(&mut self, cp: CpNumber, roots: Roots, pins: Pins) -> Pins {
        assert!(cp >= self.known.own_cp, "own CPs rise");
        self.known.own_cp = cp;
        self.known.own_roots = roots;
        self.known.own_sizes = sizes(&pins);
        std::mem::replace(&mut self.pins, pins)
    }
}

/// How large the pinned volumes are.
pub(super) fn sizes(pins: &Pins) -> Arc<BTreeMap<VolumeNumber, ByteCount>> {
    Arc::new(pins.iter().map(|(volume, pin)| (*volume, pin.tree().size)).collect())
}

/// The lock, and what is shown; a reader never waits for whoever holds the lock.
pub(super) type Watched = Shown<Standing, Latest<Known>>;

/// Under the lock; a change is shown when it is dropped.
pub(super) type Changing<'a> = moment::Changing<'a, Standing, Latest<Known>>;

/// Nobody holds the lock.
pub(super) fn watched(standing: Standing) -> Watched {
    let known = Latest::new(standing.known.clone());
    Shown::new(standing, known)
}

impl Shows<Standing> for Latest<Known> {
    fn show(&self, standing: &Standing) {
        self.store(standing.known.clone());
    }
}
