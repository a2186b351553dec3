//! What a source says about itself: one snapshot for status, metrics and health.
//!
//! Made of what the parts show beside their locks: each part's figures are of one moment. No lock of the data
//! path is taken, so a part that is stuck under its own is shown, and keeps nobody from his answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::completion::Gate;
use super::counters::CounterValues;
use super::order::{Figures, Lacking};
use super::outbox::Ladder;
use super::shared::{LinkState, PassStatus, Shared};
use super::signals::Roots;
use crate::nvlog::RingStatus;
use crate::pool::space::Space;
use crate::session::primary::Answering;
use crate::units::convert::{low_u32, to_f64};
use crate::units::hash::Root;
use crate::units::ids::{HubId, SourceId, VolumeId};
use crate::units::machine;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{ByteCount, CpNumber, Epoch, Generation, SequenceNumber, VolumeNumber};
use crate::units::policy::{AloneMark, Policy};
use crate::wire::message::VolumeRefusal;

/// A store failed.
const NEXT_OF_FAULT: &str = "mend what the reason names (a failed device, a full file system), then \
     restart the source: what was acknowledged is recovered";
/// A fault of this program.
const NEXT_OF_PANIC: &str = "restart the source: what was acknowledged is recovered; report this with \
     its log, the fault is not in the devices";

/// What makes room in the pool of a hub.
pub const NEXT_OF_FULL_POOL: &str = "make room on the hub: `mirrorhub kept` lists CPs that are kept \
     there, `mirrorhub drop` drops one; or discard on the volumes what clients do not need";

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

/// A pass under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassFigures {
    /// To this CP.
    pub cp: CpNumber,
    /// From this one.
    pub base: CpNumber,
    /// How much of the volumes was looked at.
    pub percent: u32,
    /// Bytes sent.
    pub bytes: u64,
    /// The time that it will take if it goes on like this, once that can be said.
    pub left: Option<Duration>,
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
    /// How long the oldest acknowledged transfer waits that the hub's image does not show.
    pub lag: Duration,
    /// How long the oldest transfer waits that the hub does not hold.
    pub unstaged: Duration,
    /// What was acknowledged alone before this start counts in no ladder: how much it was is unknown
    /// until the image is brought up.
    pub lag_unknown: bool,
    /// How long the image is not known to be equal but for the lag: the hub is not heard, or is being
    /// brought up. None while it follows.
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
    /// The pass under way, while the hub is there.
    pub pass: Option<PassFigures>,
    /// Its volumes.
    pub volumes: Vec<VolumeStatus>,
    /// What was counted.
    pub counters: CounterValues,
}

/// State, reason and next step.
fn judge(shared: &Shared) -> (SourceState, String, String) {
    if let Some(failed) = shared.failed() {
        let next = if shared.has_panicked() { NEXT_OF_PANIC } else { NEXT_OF_FAULT };
        return (SourceState::Faulted, failed.to_string(), next.to_owned());
    }
    let serving = shared.is_serving();
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
            let before = shared.rejected().filter(|_| shared.lacks_hub_room());
            let before = before.map(|before| format!("; before that {before}"));
            let reason = format!("{reason}{}", before.unwrap_or_default());
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
        LinkState::Connected { .. } if shared.faulted().is_some() && shared.pass().is_none() => {
            let next =
                "compare both ends with `mirrorhub verify`; it is tried again with the next CP";
            (SourceState::Faulted, shared.faulted().unwrap_or_default().1, next.to_owned())
        }
        LinkState::Connected { .. } if !shared.refused().is_empty() && shared.pass().is_none() => {
            leaves_out(shared)
        }
        LinkState::Connected { .. } if shared.lacks_hub_room() => {
            let reason = shared.rejected().unwrap_or_default();
            (SourceState::Behind, reason, next_of_full_hub(shared))
        }
        LinkState::Connected { .. } => match shared.slow() {
            Some(reason) if shared.pass().is_none() => (SourceState::Behind, reason, slow(shared)),
            Some(_) | None if shared.is_coming_back() => coming_back(shared),
            Some(_) | None => in_session(shared),
        },
    }
}

/// Nothing is in the way.
fn in_session(shared: &Shared) -> (SourceState, String, String) {
    if let Some(reason) = shared.rejected() {
        let next = "it is tried again by itself; see the hub's status";
        return (SourceState::Behind, reason, next.to_owned());
    }
    let (reason, next) = match waits(shared) {
        Some((reason, next)) => (reason.to_owned(), next),
        None => (shared.pledge.kept().in_sync("on the hub"), ""),
    };
    match shared.set_back() {
        None => (SourceState::InSync, reason, next.to_owned()),
        Some(what) => {
            let reason = format!("{reason}; but {what}; it was sent again");
            (SourceState::InSync, reason, NEXT_OF_SET_BACK.to_owned())
        }
    }
}

/// What R7 asks of an administrator; shown until the source is restarted.
const NEXT_OF_SET_BACK: &str = "find out why before this filer is lost: look at the hub's NVRAM \
     device and at who restored its state; a restart of this source ends this notice";

/// The hub's pool is full (R18): who waits for it, and what makes room.
fn next_of_full_hub(shared: &Shared) -> String {
    let clients = match (shared.answering(), shared.order.glance().lacking) {
        (Answering::Alone, _) => "; clients are served here alone meanwhile",
        (Answering::Policy | Answering::Held, Some(Lacking::Nvram)) => "; writes wait for it",
        (Answering::Policy | Answering::Held, _) => "",
    };
    format!("{NEXT_OF_FULL_POOL}; it is tried again by itself{clients}")
}

/// The hub answers, and takes nothing.
fn slow(shared: &Shared) -> String {
    let clients = match shared.answering() {
        Answering::Alone => "clients are served here alone meanwhile",
        Answering::Policy | Answering::Held => "writes wait for it",
    };
    format!(
        "see `mirrorhub status` on the hub: its log or NVRAM may be full, or a CP takes it long; {clients}"
    )
}

/// The hub is there, and may still lack what was acknowledged without it (R4).
fn coming_back(shared: &Shared) -> (SourceState, String, String) {
    let rejected = shared.rejected().map(|reason| format!("; {reason}")).unwrap_or_default();
    let Some(pass) = shared.pass().as_ref().map(figures) else {
        let backlog = shared.backlog.load(Ordering::Relaxed);
        if backlog > 0 {
            let cps = if backlog == 1 {
                "1 CP that was".to_owned()
            } else {
                format!("{backlog} CPs that were")
            };
            let reason = format!("the hub builds {cps} made here meanwhile from its log{rejected}");
            return (SourceState::Syncing, reason, String::new());
        }
        let reason = format!("the hub is being sent what it lacks{rejected}");
        return (SourceState::Syncing, reason, String::new());
    };
    let left = match pass.left {
        Some(left) => format!(", about {} s left", left.as_secs()),
        None => String::new(),
    };
    let reason = format!(
        "the hub's image is brought from CP {} to CP {}: {}%, {} MiB sent{left}{rejected}",
        pass.base,
        pass.cp,
        pass.percent,
        pass.bytes >> 20
    );
    (SourceState::Syncing, reason, String::new())
}

/// How far a pass has come.
fn figures(pass: &PassStatus) -> PassFigures {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let all = read(&pass.progress.all_blocks);
    let passed = read(&pass.progress.passed_blocks).min(all);
    let percent = low_u32((passed * 100).checked_div(all).unwrap_or(0));
    let spent = machine::elapsed(pass.since);
    let left = spent.as_secs_f64() * to_f64(all - passed) / to_f64(passed);
    let left = Duration::try_from_secs_f64(left).ok();
    PassFigures { cp: pass.cp, base: pass.base, percent, bytes: read(&pass.progress.bytes), left }
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

/// A hub that was not heard since the start is silent at least since then; an image that lacks
/// what was acknowledged alone is as old as the mark.
fn silence(shared: &Shared) -> Option<Duration> {
    let unheard = match shared.link() {
        LinkState::Connected { .. } | LinkState::Unlinked => None,
        LinkState::Offline { since, .. } => Some(machine::elapsed(since)),
        LinkState::Waiting { .. } | LinkState::Halted(_) => Some(machine::elapsed(shared.started)),
    };
    unheard.max(shared.marked_for())
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
    let (reason, next) = waits(shared).unwrap_or(all);
    (SourceState::FailedOver, reason.to_owned(), next.to_owned())
}

/// What writers wait for, and what makes it better.
fn waits(shared: &Shared) -> Option<(&'static str, &'static str)> {
    match shared.order.glance().lacking? {
        Lacking::Pool if shared.promise.is_limited() => Some((
            "writes wait: the source has as much of the pool as space_limit lets it",
            "raise space_limit in its file on the hub, drop kept CPs, or trim what is not needed",
        )),
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
    let all = shared.volumes();
    let status = all.iter().map(|volume| VolumeStatus {
        number: volume.number,
        id: volume.id,
        name: volume.name.clone(),
        size: shared.size_of(volume),
        root: of(volume.number),
        refused: refused(volume.number),
    });
    status.collect()
}

/// Bytes answered to clients: what both ends have, or what this one has where that is enough.
fn answered(gate: Gate, ladder: &Ladder) -> u64 {
    let met = match gate {
        Gate::Both | Gate::Held => 0,
        Gate::Own => ladder.durable_bytes,
        Gate::Lag(limit) => {
            ladder.durable_bytes.min(ladder.hub_bytes.saturating_add(limit.bytes.0))
        }
    };
    met.max(ladder.hub_bytes)
}

/// After a restart the age of what was acknowledged alone before counts from the start.
fn lag_of(shared: &Shared, ladder: &Ladder, oldest: Option<Instant>) -> Duration {
    let met = if ladder.acknowledged_bytes > ladder.visible_bytes { oldest } else { None };
    let before = shared.mark_was_found().then(|| machine::elapsed(shared.started));
    met.map_or(Duration::ZERO, machine::elapsed).max(before.unwrap_or_default())
}

/// Takes the snapshot; takes no lock of the data path for it, and never waits.
pub fn status(shared: &Arc<Shared>) -> Status {
    let (state, reason, next_step) = judge(shared);
    let affiliation = shared.affiliation();
    let completion = shared.completion.figures();
    let (own_cp, roots) = shared.own();
    let outbox = shared.outbox.figures(|ladder| answered(completion.gate, ladder));
    let ladder = outbox.ladder;
    let terms = shared.pledge.terms();
    Status {
        name: shared.name.clone(),
        id: shared.source,
        state,
        reason,
        next_step,
        serving: shared.is_serving(),
        hub: affiliation.hub,
        epoch: affiliation.epoch,
        generation: shared.generation,
        own_durable: completion.own,
        hub_durable: completion.hub,
        own_cp,
        common_cp: shared.common_cp(),
        ladder,
        lag: lag_of(shared, &ladder, outbox.oldest),
        unstaged: outbox.unstaged.map_or(Duration::ZERO, machine::elapsed),
        lag_unknown: shared.mark_was_found(),
        hub_silence: silence(shared),
        uptime: machine::elapsed(shared.started),
        unacknowledged: completion.waiting,
        order: shared.order.glance(),
        held: (outbox.rows, outbox.memory_bytes),
        ring: shared.ring().map(crate::nvlog::Handle::status),
        space: shared.pool.space().ok(),
        policy: terms.in_force,
        policy_next: Some(terms.next.unwrap_or(terms.wanted))
            .filter(|next| *next != terms.in_force),
        alone: shared.mark(),
        pass: shared.pass().filter(|_| shared.is_connected()).as_ref().map(figures),
        volumes: volumes(shared, &roots),
        counters: shared.counters.values(),
    }
}
