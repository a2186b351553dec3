//! What a source says about itself: one snapshot for status, metrics and health.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::counters::CounterValues;
use super::order::{Figures, Lacking};
use super::outbox::Ladder;
use super::shared::{LinkState, Shared};
use super::signals::Roots;
use crate::nvlog::RingStatus;
use crate::pool::space::Space;
use crate::session::primary::Answering;
use crate::units::convert::to_f64;
use crate::units::hash::Root;
use crate::units::ids::{HubId, SourceId, VolumeId};
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{ByteCount, CpNumber, Epoch, Generation, SequenceNumber, VolumeNumber};
use crate::units::policy::{AloneMark, Policy};
use crate::wire::message::VolumeRefusal;

/// How a source is, in one word (section 13 of the design).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// Has not met its hub since the start: serves nobody yet.
    Waiting,
    /// Fetches its log from the hub.
    Syncing,
    /// Every acknowledged write is on the hub.
    InSync,
    /// Connected, but the hub refused the last CP.
    Behind,
    /// The hub is away: clients wait.
    Offline,
    /// It runs without its filer and without a hub behind it.
    FailedOver,
    /// Somebody else serves its volumes: it serves nobody, and follows.
    Fenced,
    /// Needs an administrator.
    Faulted,
}

impl SourceState {
    /// Stable word for status and metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Syncing => "syncing",
            Self::InSync => "in-sync",
            Self::Behind => "behind",
            Self::Offline => "offline",
            Self::FailedOver => "failed-over",
            Self::Fenced => "fenced",
            Self::Faulted => "faulted",
        }
    }
}

/// One volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeStatus {
    /// Its number.
    pub number: VolumeNumber,
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Its size.
    pub size: ByteCount,
    /// Its root at the newest own CP.
    pub root: Option<Root>,
    /// Why the hub leaves it out, if it does (R20).
    pub refused: Option<VolumeRefusal>,
}

/// Everything at one moment.
#[derive(Debug, Clone)]
pub struct Status {
    /// Its name.
    pub name: SourceName,
    /// Its id.
    pub id: SourceId,
    /// In one word.
    pub state: SourceState,
    /// Why.
    pub reason: String,
    /// What to do about it; empty if nothing.
    pub next_step: String,
    /// Whether clients are served.
    pub serving: bool,
    /// Its hub, once known.
    pub hub: Option<HubId>,
    /// Epoch in force.
    pub epoch: Epoch,
    /// This boot.
    pub generation: Generation,
    /// Everything up to here is durable in the own NVRAM.
    pub own_durable: SequenceNumber,
    /// Everything up to here is durable on the hub.
    pub hub_durable: SequenceNumber,
    /// Newest own CP.
    pub own_cp: CpNumber,
    /// Newest CP of both ends.
    pub common_cp: Option<CpNumber>,
    /// Bytes of transfers, by how far they got.
    pub ladder: Ladder,
    /// How long the oldest transfer waits that no common CP has.
    pub lag: Duration,
    /// How long the hub has not been heard; none while it is connected.
    pub hub_silence: Option<Duration>,
    /// Time since the start.
    pub uptime: Duration,
    /// Requests that wait to be acknowledged.
    pub unacknowledged: usize,
    /// Order and partitions.
    pub order: Figures,
    /// Held transfers, and bytes of them in memory.
    pub held: (u64, u64),
    /// The ring.
    pub ring: Option<RingStatus>,
    /// The pool; `None` if its state is lost.
    pub space: Option<Space>,
    /// What it promises: the hub has noted it.
    pub policy: Policy,
    /// What it will promise once the hub has noted that.
    pub policy_next: Option<Policy>,
    /// The durable mark of writes acknowledged without the hub.
    pub alone: Option<AloneMark>,
    /// Its volumes.
    pub volumes: Vec<VolumeStatus>,
    /// What was counted.
    pub counters: CounterValues,
}

/// State, reason and next step.
fn judge(shared: &Shared) -> (SourceState, String, String) {
    if let Some(failed) = shared.failed() {
        let next = "repair or replace the device and restart the source";
        return (SourceState::Faulted, failed.to_string(), next.to_owned());
    }
    let serving = *shared.serving.borrow();
    match shared.link() {
        LinkState::Unlinked => sole(shared),
        LinkState::Halted(refused) if shared.fenced().is_some() => {
            (SourceState::Fenced, refused.reason, refused.next_step)
        }
        LinkState::Halted(refused) => (SourceState::Faulted, refused.reason, refused.next_step),
        LinkState::Waiting { reason } if !serving => {
            let next = "start the hub, or check `hub` in source.toml";
            (SourceState::Waiting, reason, next.to_owned())
        }
        LinkState::Waiting { reason } | LinkState::Offline { reason, .. } => {
            let next = match shared.answering() {
                Answering::Alone => {
                    "clients are served here alone, the loss of this filer loses \
                                     what the hub lacks; bring the hub back, its image follows"
                }
                Answering::Policy => "writes wait until the hub is back or counts as lost",
                Answering::Held => {
                    "clients wait until the hub is back; if it is gone for good, write \
                     on_hub_loss = \"continue\" and start with --accept-untold-policy"
                }
            };
            (SourceState::Offline, reason, next.to_owned())
        }
        LinkState::Connected { .. } if !serving => {
            (SourceState::Syncing, "fetches its log from the hub".to_owned(), String::new())
        }
        LinkState::Connected { .. } if !shared.refused().is_empty() && shared.pass().is_none() => {
            leaves_out(shared)
        }
        LinkState::Connected { .. } if shared.mark().is_some() => coming_back(shared),
        LinkState::Connected { .. } => match shared.rejected() {
            Some(reason) => {
                let next = "it is tried again by itself; see the hub's status";
                (SourceState::Behind, reason, next.to_owned())
            }
            None => {
                let all = ("every acknowledged write is durable on the hub", "");
                let (reason, next) = waits(shared.order.figures().lacking).unwrap_or(all);
                (SourceState::InSync, reason.to_owned(), next.to_owned())
            }
        },
    }
}

/// The hub is there, and may still lack what was acknowledged without it (R4).
fn coming_back(shared: &Shared) -> (SourceState, String, String) {
    let rejected = shared.rejected().map(|reason| format!("; {reason}")).unwrap_or_default();
    let Some(pass) = shared.pass() else {
        let reason = format!("the hub is being sent what it lacks{rejected}");
        return (SourceState::Syncing, reason, String::new());
    };
    let all = pass.progress.all_blocks.load(Ordering::Relaxed);
    let passed = pass.progress.passed_blocks.load(Ordering::Relaxed).min(all);
    let bytes = pass.progress.bytes.load(Ordering::Relaxed);
    let percent = (passed * 100).checked_div(all).unwrap_or(0);
    let spent = pass.since.elapsed();
    let left = match passed {
        0 => String::new(),
        _ => {
            let left = spent.as_secs_f64() * to_f64(all - passed) / to_f64(passed);
            format!(", about {left:.0} s left")
        }
    };
    let reason = format!(
        "the hub's image is brought from CP {} to CP {}: {percent}%, {} MiB sent{left}{rejected}",
        pass.base,
        pass.cp,
        bytes >> 20
    );
    (SourceState::Syncing, reason, String::new())
}

/// The hub mirrors the other volumes only (R20).
fn leaves_out(shared: &Shared) -> (SourceState, String, String) {
    let refused = shared.refused();
    let Some(first) = refused.first() else { return coming_back(shared) };
    let also = match refused.len() - 1 {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    };
    let served = match shared.not_served(first.volume) {
        Some(_) => "not served",
        None => "served without the hub",
    };
    let rejected = shared.rejected().map(|reason| format!("; {reason}")).unwrap_or_default();
    let (name, why) = (&first.name, &first.reason);
    let reason = format!("volume {name} is not mirrored, and {served}: {why}{also}{rejected}");
    (SourceState::Behind, reason, first.next_step.clone())
}

/// A hub that was not heard since the start is silent at least since then.
fn silence(shared: &Shared) -> Option<Duration> {
    match shared.link() {
        LinkState::Connected { .. } | LinkState::Unlinked => None,
        LinkState::Offline { since, .. } => Some(since.elapsed()),
        LinkState::Waiting { .. } | LinkState::Halted(_) => Some(shared.started.elapsed()),
    }
}

/// Without a hub.
fn sole(shared: &Shared) -> (SourceState, String, String) {
    if let Some(reason) = shared.rejected() {
        return (SourceState::Behind, reason, "it is tried again by itself".to_owned());
    }
    let all = (
        "served here; acknowledged writes are durable in this NVRAM only",
        "`mirrorhub failback` gives it back to a filer",
    );
    let (reason, next) = waits(shared.order.figures().lacking).unwrap_or(all);
    (SourceState::FailedOver, reason.to_owned(), next.to_owned())
}

/// What writers wait for, and what makes it better.
fn waits(lacking: Option<Lacking>) -> Option<(&'static str, &'static str)> {
    match lacking? {
        Lacking::Nvram => Some((
            "writes wait: both partitions of the NVRAM are full",
            "they go on with the next checkpoint; a larger NVRAM makes it rarer",
        )),
        Lacking::Pool => Some((
            "writes wait: the own pool is full",
            "trim what is not needed, or give it more space",
        )),
    }
}

fn volumes(shared: &Shared, roots: &Roots) -> Vec<VolumeStatus> {
    let of = |number| roots.iter().find(|(volume, _)| *volume == number).map(|(_, root)| *root);
    let refused = shared.refused();
    let refused = |number| refused.iter().find(|refusal| refusal.volume == number).cloned();
    let status = shared.volumes.iter().map(|volume| VolumeStatus {
        number: volume.number,
        id: volume.id,
        name: volume.name.clone(),
        size: volume.size,
        root: of(volume.number),
        refused: refused(volume.number),
    });
    status.collect()
}

/// Takes the snapshot.
pub fn status(shared: &Arc<Shared>) -> Status {
    let (state, reason, next_step) = judge(shared);
    let affiliation = shared.affiliation();
    let (own_durable, hub_durable) = shared.completion.cursors();
    let (own_cp, roots) = shared.own();
    let (ladder, oldest) = shared.outbox.ladder();
    let terms = shared.pledge.terms();
    Status {
        name: shared.name.clone(),
        id: shared.source,
        state,
        reason,
        next_step,
        serving: *shared.serving.borrow(),
        hub: affiliation.hub,
        epoch: affiliation.epoch,
        generation: shared.generation,
        own_durable,
        hub_durable,
        own_cp,
        common_cp: shared.common.borrow().as_ref().map(|common| common.cp),
        ladder,
        lag: oldest.map_or(Duration::ZERO, |since| since.elapsed()),
        hub_silence: silence(shared),
        uptime: shared.started.elapsed(),
        unacknowledged: shared.completion.waiting(),
        order: shared.order.figures(),
        held: shared.outbox.figures(),
        ring: shared.ring().map(crate::nvlog::Handle::status),
        space: shared.pool.space().ok(),
        policy: terms.in_force,
        policy_next: Some(terms.next.unwrap_or(terms.wanted))
            .filter(|next| *next != terms.in_force),
        alone: shared.mark(),
        volumes: volumes(shared, &roots),
        counters: shared.counters.values(),
    }
}
