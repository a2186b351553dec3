//! What status shows of a source on the hub.
//!
//! The actor publishes a [`Snapshot`] after each step; status, metrics and the page read the
//! newest one and never wait for the data path.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::failover::View;
use super::lane::{Cursors, Lane};
use super::promoted::Engine;
use super::waits::Since;
use crate::filer::status as filer;
use crate::pool::pointer::TreeRoot;
use crate::session::mirror::{Known, LeftOut, Mirror};
use crate::units::machine;
use crate::units::names::SourceName;
use crate::units::numbers::{CpNumber, Epoch, Generation};
use crate::units::policy::{AloneMark, OnHubLoss, Policy};
use crate::wire::message::{Refused, VolumeOffer, VolumeRefusal, VolumeRoot};

/// A failed write or sync of a log, the ring or the pool.
const NEXT_OF_FAULT: &str = "mend the cause (disk full, disk failed), then restart the hub: what is \
     not safely in the log is written again, from the log itself and from the NVRAM";
/// What is not in the NVRAM either.
const NEXT_OF_DAMAGE: &str = "keep the source running and its state safe, it still has what is \
     missing here; then restart the hub: its log is cut where it is sound, and the source sends the rest again";

/// States of section 13 that a hub of this version can be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceState {
    /// Never seen.
    Waiting,
    /// Connected; everything it sent is durable here.
    InSync,
    /// Connected; an older session is put to rest first, or the source is sent back its log.
    Syncing,
    /// Connected, but its last CP was refused.
    Behind,
    /// Not connected.
    Offline,
    /// Served here, by this hub.
    FailedOver,
    /// Its log or the ring failed, or it was refused.
    Faulted,
    /// Its file is gone or says that it is not enabled; its images stay.
    Retired,
}

impl SourceState {
    /// The stable word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::InSync => "in-sync",
            Self::Syncing => "syncing",
            Self::Behind => "behind",
            Self::Offline => "offline",
            Self::FailedOver => "failed-over",
            Self::Faulted => "faulted",
            Self::Retired => "retired",
        }
    }
}

/// Counted bytes and blocks of a source since the hub started.
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    /// Bytes of whole frames received, whatever they carry.
    pub received_bytes: u64,
    /// Client bytes made durable.
    pub staged_bytes: u64,
    /// Client bytes drained.
    pub drained_bytes: u64,
    /// Client bytes in trees that were built and proven.
    pub applied_bytes: u64,
    /// Client bytes in published CPs.
    pub visible_bytes: u64,
    /// Transfers received.
    pub transfers: u64,
    /// CPs published.
    pub checkpoints: u64,
    /// When the last of them was, in seconds since 1970; 0 before the first.
    pub published_at: u64,
    /// CPs refused.
    pub rejected: u64,
    /// Blocks applied by reference.
    pub reference_blocks: u64,
    /// Blocks applied inline.
    pub inline_blocks: u64,
    /// Blocks that became holes.
    pub hole_blocks: u64,
    /// Bytes of Updates payload that say references.
    pub reference_bytes: u64,
    /// Bytes of Updates payload that carry data.
    pub inline_bytes: u64,
    /// Bytes of Updates payload that say holes.
    pub hole_bytes: u64,
    /// Bytes of payload that came for passes.
    pub pass_bytes: u64,
}

/// One source at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Its name.
    pub name: SourceName,
    /// Its id, once it was here.
    pub source: Option<crate::units::ids::SourceId>,
    /// State, reason, next step.
    pub state: SourceState,
    /// Why.
    pub reason: String,
    /// What to do, or that nothing is to be done.
    pub next_step: String,
    /// Epoch in force.
    pub epoch: Epoch,
    /// Newest generation.
    pub generation: Generation,
    /// Published CP.
    pub applied_cp: CpNumber,
    /// CP being applied.
    pub applying: Option<CpNumber>,
    /// Volumes.
    pub volumes: Vec<VolumeOffer>,
    /// Those that this session leaves out, and why (R20).
    pub refused: Vec<VolumeRefusal>,
    /// Those whose image is of an older CP.
    pub left_out: Vec<LeftOut>,
    /// Roots of the published CP.
    pub roots: Vec<VolumeRoot>,
    /// The lane's cursors.
    pub cursors: Cursors,
    /// Since when its oldest entry waits for each step.
    pub since: Since,
    /// Totals.
    pub totals: Totals,
    /// Whether a connection is in session.
    pub connected: bool,
    /// When the source was last heard, if ever since the hub started.
    pub heard: Option<Instant>,
    /// When the image was last known to be equal to the source, if ever since the hub started.
    pub equal_at: Option<Instant>,
    /// What it promised when it was last here.
    pub policy: Option<Policy>,
    /// Since when it may have acknowledged writes without this hub, as it said then.
    pub alone: Option<AloneMark>,
}

impl Snapshot {
    /// A source that was never here.
    pub fn waiting(name: SourceName) -> Self {
        Self {
            name,
            source: None,
            state: SourceState::Waiting,
            reason: "the source has never connected".to_owned(),
            next_step: "start `mirrorhub source` on the filer".to_owned(),
            epoch: Epoch::default(),
            generation: Generation::default(),
            applied_cp: CpNumber(0),
            applying: None,
            volumes: Vec::new(),
            refused: Vec::new(),
            left_out: Vec::new(),
            roots: Vec::new(),
            cursors: Cursors::default(),
            since: Since::default(),
            totals: Totals::default(),
            connected: false,
            heard: None,
            equal_at: None,
            policy: None,
            alone: None,
        }
    }

    /// What the actor knows now.
    pub fn of(
        name: &SourceName,
        machine: &Mirror,
        lane: Option<&Arc<Lane>>,
        connected: bool,
        refused: Option<&Refused>,
        heard: Option<Instant>,
        failover: Option<&View>,
    ) -> Self {
        let known = machine.known();
        let cursors = lane.map(|lane| lane.cursors()).unwrap_or_default();
        let since = lane.map(|lane| lane.since(&cursors)).unwrap_or_default();
        let (state, mut reason, next_step) = match failover {
            Some(view) => (SourceState::FailedOver, view.reason.clone(), view.next_step.clone()),
            None => judge(machine, &cursors, connected, refused),
        };
        if let Some(missing) = &cursors.doubts.missing
            && !reason.contains(&**missing)
        {
            reason = format!("{reason}; {missing}");
        }
        Self {
            name: name.clone(),
            source: known.source,
            state,
            reason,
            next_step,
            epoch: known.epoch,
            generation: known.generation,
            applied_cp: known.applied_cp,
            applying: machine.applying(),
            volumes: known.volumes.clone(),
            refused: known.refused.clone(),
            left_out: known.left_out.clone(),
            roots: roots_of(known),
            cursors,
            since,
            totals: lane.map(|lane| totals(lane)).unwrap_or_default(),
            connected: connected && machine.is_joined(),
            heard,
            equal_at: None,
            policy: known.policy,
            alone: known.alone,
        }
    }
}

impl Snapshot {
    /// What a source is whose file is gone.
    pub fn retired(&self) -> Self {
        Self {
            state: SourceState::Retired,
            reason: "it has no enabled file in the sources directory; its images stay".to_owned(),
            next_step: format!(
                "put {0}.toml back, or `mirrorhub forget {0}` gives its images up",
                self.name
            ),
            connected: false,
            ..self.clone()
        }
    }

    /// When the image was equal, as far as this says: a source in sync is ahead of it by what is
    /// not visible yet.
    pub fn equals_at(&self) -> Option<Instant> {
        let now = (self.state == SourceState::InSync).then(machine::now)?;
        Some(self.cursors.oldest_invisible().unwrap_or(now))
    }

    /// Whether the source may have acknowledged writes that this hub has never heard of.
    pub fn may_lack(&self) -> bool {
        let goes_on = self.policy.is_none_or(|policy| policy.on_hub_loss == OnHubLoss::Continue);
        match self.state {
            SourceState::Offline | SourceState::Faulted | SourceState::Retired => {
                goes_on && !self.connected
            }
            SourceState::Waiting => true,
            SourceState::InSync | SourceState::Syncing | SourceState::Behind => {
                self.alone.is_some()
            }
            SourceState::FailedOver => false,
        }
    }

    /// What a source is that this hub serves: its engine knows better than the actor.
    /// `found` is what its failover said.
    /// `mend` is what to do about an engine that did not start.
    pub fn promoted(&self, engine: &Engine, found: Option<&str>, mend: String) -> Self {
        let (refused, left_out) = Default::default();
        let served = Self { connected: false, heard: None, refused, left_out, ..self.clone() };
        let status = match engine {
            Engine::Running(engine) => engine.status(),
            Engine::Failed(reason) => {
                let (state, reason) = (SourceState::Faulted, reason.to_string());
                return Self { state, reason, next_step: mend, ..served };
            }
        };
        let state = match status.state {
            filer::SourceState::Fenced | filer::SourceState::Faulted => SourceState::Faulted,
            filer::SourceState::Behind => SourceState::Behind,
            filer::SourceState::Waiting
            | filer::SourceState::Syncing
            | filer::SourceState::InSync
            | filer::SourceState::Offline
            | filer::SourceState::FailedOver => SourceState::FailedOver,
        };
        // What the failover found stays to be read.
        let reason = match found {
            Some(found) => format!("{}; {found}", status.reason),
            None => status.reason,
        };
        let root = |volume: &filer::VolumeStatus| {
            volume.root.map(|root| VolumeRoot { volume: volume.number, root })
        };
        Self {
            source: Some(status.id),
            state,
            reason,
            next_step: status.next_step,
            epoch: status.epoch,
            generation: status.generation,
            applied_cp: status.own_cp,
            applying: status.order.frozen_cp,
            roots: status.volumes.iter().filter_map(root).collect(),
            ..served
        }
    }
}

fn judge(
    machine: &Mirror,
    cursors: &Cursors,
    connected: bool,
    refused: Option<&Refused>,
) -> (SourceState, String, String) {
    let nothing = || "nothing to do".to_owned();
    if let Some(fault) = &cursors.fault {
        let next = if cursors.damaged { NEXT_OF_DAMAGE } else { NEXT_OF_FAULT };
        return (SourceState::Faulted, fault.to_string(), next.to_owned());
    }
    if let Some(refused) = refused.filter(|_| !connected) {
        let state = SourceState::Offline;
        return (state, format!("refused: {}", refused.reason), refused.next_step.clone());
    }
    if machine.known().source.is_none() {
        let next = "start `mirrorhub source` on the filer".to_owned();
        return (SourceState::Waiting, "the source has never connected".to_owned(), next);
    }
    if connected && machine.is_joining() {
        let reason = "what came before is being stored; then the source is welcome".to_owned();
        return (SourceState::Syncing, reason, nothing());
    }
    if connected && machine.is_refilling() {
        let reason = "the source is being sent back its own log".to_owned();
        return (SourceState::Syncing, reason, nothing());
    }
    if !connected || !machine.is_joined() {
        let next = "start the source or mend the network; it reconnects by itself".to_owned();
        let full =
            if machine.lacks_room() { "; before that its CP found the pool full" } else { "" };
        return (SourceState::Offline, format!("the source is not connected{full}"), next);
    }
    if machine.lacks_room() {
        let reason = machine.last_refusal().unwrap_or_default().to_owned();
        let raise = match reason.starts_with("space_limit") {
            true => "raise space_limit in the source's file, or ",
            false => "",
        };
        let next = format!("{raise}{}; the source sends the CP again", filer::NEXT_OF_FULL_POOL);
        return (SourceState::Behind, reason, next);
    }
    if machine.last_refusal().is_some() {
        let reason = machine.last_refusal().unwrap_or_default().to_owned();
        return (SourceState::Behind, reason, "the source sends the CP again".to_owned());
    }
    if let Some(first) = machine.known().refused.first() {
        let also = match machine.known().refused.len() - 1 {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        let reason = format!("volume {} is not mirrored: {}{also}", first.name, first.reason);
        return (SourceState::Behind, reason, first.next_step.clone());
    }
    if machine.known().alone.is_some() {
        let reason = "the source was alone: this hub is being sent what it lacks".to_owned();
        return (SourceState::Syncing, reason, nothing());
    }
    let policy = machine.known().policy.unwrap_or_default();
    (SourceState::InSync, policy.in_sync("here"), nothing())
}

/// Roots of the published CP; before the first one every volume is empty.
pub fn roots_of(known: &Known) -> Vec<VolumeRoot> {
    if known.applied_cp > CpNumber(0) || !known.roots.is_empty() {
        return known.roots.clone();
    }
    let empty = |offer: &VolumeOffer| VolumeRoot {
        volume: offer.number,
        root: TreeRoot::empty(offer.size).root(),
    };
    known.volumes.iter().map(empty).collect()
}

fn totals(lane: &Lane) -> Totals {
    let ladder = &lane.ladder;
    let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    Totals {
        received_bytes: get(&ladder.received_bytes),
        staged_bytes: get(&ladder.staged_bytes),
        drained_bytes: get(&ladder.drained_bytes),
        applied_bytes: get(&ladder.applied_bytes),
        visible_bytes: get(&ladder.visible_bytes),
        transfers: get(&ladder.transfers),
        checkpoints: get(&ladder.checkpoints),
        published_at: get(&ladder.published_at),
        rejected: get(&ladder.rejected),
        reference_blocks: get(&ladder.reference_blocks),
        inline_blocks: get(&ladder.inline_blocks),
        hole_blocks: get(&ladder.hole_blocks),
        reference_bytes: get(&ladder.reference_bytes),
        inline_bytes: get(&ladder.inline_bytes),
        hole_bytes: get(&ladder.hole_bytes),
        pass_bytes: get(&ladder.pass_bytes),
    }
}
