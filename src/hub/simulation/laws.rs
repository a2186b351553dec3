//! What has to hold after every step (section 5 of the design), and what in the end.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::hub_end::HubEnd;
use super::probes::Probe;
use super::rot;
use super::setup::{GROWN_BYTES, VOLUME_BYTES};
use super::world::{Primary, SourceEnd, SourceState};
use crate::device::MemberState;
use crate::filer::order::Lacking;
use crate::filer::shared::{LinkState, Shared as FilerShared};
use crate::hub::failover::View;
use crate::hub::lane::{Cursors, Lane};
use crate::hub::shared::Shared;
use crate::pool::Pool;
use crate::pool::kept::Kept;
use crate::session::primary::Answering;
use crate::units::convert::to_usize;
use crate::units::hash::Root;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::volume::check::{Depth, check};
use crate::volume::reader::read_into;

type Roots = Vec<(VolumeNumber, Root)>;

/// After a step: the hub.
pub(super) fn hub(hub: &HubEnd, sources: &[SourceEnd]) -> Result<(), String> {
    let Some(shared) = hub.shared() else { return Ok(()) };
    if let Some(ring) = shared.stager.ring() {
        let status = ring.status();
        let ordered = status.released <= status.durable && status.durable <= status.written;
        let within = status.written.0 <= status.released.0 + status.capacity.0;
        if !(ordered && within) {
            return Err(format!("invariant 5: {status:?}"));
        }
        if shared.pool.repairs().0 > 0 {
            sources[0].state.borrow_mut().probes.hit(Probe::LegRepaired);
        }
        if shared.pool.devices().iter().any(|leg| leg.state == MemberState::Failed) {
            sources[0].state.borrow_mut().probes.hit(Probe::LegOut);
        }
        if status.released.0 > 0 {
            sources[0].state.borrow_mut().probes.hit(Probe::RingReleased);
        }
    }
    for source in sources {
        let name = source.state.borrow().setup.name.clone();
        if shared.counters.restarts_of(&name) > 0 {
            return Err(format!("invariant 10: the actor of {name} has panicked"));
        }
        if let Some(lane) = shared.lanes.get(&name) {
            let copied = sources.iter().any(|source| source.state.borrow().was_copied);
            let judged = mirrored(&shared, &lane, source, (hub.rotten, copied));
            judged.map_err(|problem| format!("{name} at the hub: {problem}"))?;
        }
    }
    Ok(())
}

fn mirrored(
    shared: &Shared,
    lane: &Lane,
    source: &SourceEnd,
    (rotten, copied): (bool, bool),
) -> Result<(), String> {
    let cursors = lane.cursors();
    let state = &mut *source.state.borrow_mut();
    let places = [cursors.drained, cursors.durable, cursors.staged];
    if cursors.fault.is_none() && !places.is_sorted_by_key(|place| place.sequence) {
        return Err(format!("cursors out of order: {cursors:?}"));
    }
    let (durable, published) = (cursors.durable.sequence.0, cursors.applied_cp);
    if durable < state.hub_durable && cursors.fault.is_none() {
        let before = state.hub_durable;
        let cut = state.cut_at.take().is_some_and(|cut| durable >= cut);
        // A pass ends at its CP, and what comes behind that is sent again; the mark stands until
        // it is there (R4). What both ends have answered is judged below.
        let passed = state.mark && durable >= cursors.applied.sequence.0;
        if !cut && !passed && !state.rotten_at_hub {
            return Err(format!("it held {before} durably, and holds {durable}"));
        }
        state.hub_durable = durable;
    }
    if state.filer.as_ref().is_some_and(|filer| filer.shared().is_connected()) {
        state.cut_at = None;
    }
    state.hub_durable = durable.max(state.hub_durable);
    rot_is_told(shared, lane, state, &cursors)?;
    if state.by_both > state.hub_durable && !state.rotten_at_hub {
        let (answered, held) = (state.by_both, state.hub_durable);
        return Err(format!("invariant 1: {answered} was answered, it holds {held} durably"));
    }
    if durable >= state.line.acknowledged() && !state.mark {
        state.was_alone = false;
    }
    // What the hub's device lost is sent again.
    let rejected = lane.ladder.rejected.load(Ordering::Relaxed);
    if rejected > 0 && !rotten && !state.log_rotten {
        return Err("R19: a CP of an honest source was refused".to_owned());
    }
    // What a failover leaves behind may be refused.
    let honest = state.epoch == 0 && !copied;
    if honest && shared.counters.refusals().keys().any(|code| *code == "diverged") {
        return Err("an honest source was refused as diverged".to_owned());
    }
    notice_counts(lane, state);
    if published < state.published {
        return Err(format!("CP {published} is shown, {} was", state.published));
    }
    if published > state.published {
        state.published = published;
        if source.running.is_none() {
            state.probes.hit(Probe::PublishedAlone);
        }
        let (cp, sequence, roots) = published_in(&shared.pool, lane.source())?;
        let mirror =
            state.primary == Primary::Source && shared.failovers.view(lane.name()).is_none();
        if mirror && cp > state.own {
            // The own CP is judged below at the latest; it must be there by now.
            own_of(source, state)?;
        }
        if mirror && cp > state.own {
            return Err(format!("R6: CP {cp} is published, the source has {}", state.own));
        }
        same("invariant 3: the image", state, (cp, sequence), &roots)?;
    }
    Ok(())
}

fn notice_counts(lane: &Lane, state: &mut SourceState) {
    let ladder = &lane.ladder;
    for (counter, probe) in [
        (&ladder.behind_joined_bytes, Probe::BehindJoined),
        (&ladder.behind_dropped, Probe::BehindDropped),
        (&ladder.replayed, Probe::Replayed),
    ] {
        if counter.load(Ordering::Relaxed) > 0 {
            state.probes.hit(probe);
        }
    }
}

/// What rot has taken at the hub is said of the source as long as it is not there (R3).
fn rot_is_told(
    shared: &Shared,
    lane: &Lane,
    state: &mut SourceState,
    cursors: &Cursors,
) -> Result<(), String> {
    if !state.rotten_at_hub {
        return Ok(());
    }
    let durable = cursors.durable.sequence.0;
    state.hub_durable = durable;
    let view = shared.failovers.view(lane.name());
    // Or by a failover, which reads what no start reads.
    let gap = |view: &View| view.reason.contains("and no further");
    let told = rot::is_told(cursors) || view.as_ref().is_some_and(gap);
    if told && !state.rot_told {
        state.probes.hit(Probe::RotTold);
    }
    state.rot_told |= told;
    // What was said before a failover counts, until another end is primary.
    let fails_over = view.is_some();
    if told || (fails_over && state.rot_told) {
        return Ok(());
    }
    if durable < state.by_both {
        let answered = state.by_both;
        return Err(format!(
            "R3: {answered} was answered, {durable} is there, and nothing is said"
        ));
    }
    state.rotten_at_hub = fails_over;
    Ok(())
}

pub(super) fn published_in(
    pool: &Arc<Pool>,
    source: crate::units::ids::SourceId,
) -> Result<(CpNumber, u64, Roots), String> {
    let catalog = pool.catalog();
    let row = catalog.source(source).map_err(|error| error.to_string())?;
    let row = row.ok_or("the source has no row")?;
    let volumes = catalog.volumes(source).map_err(|error| error.to_string())?;
    let roots = volumes.iter().map(|row| (row.key.volume, row.tree.root())).collect();
    Ok((row.applied, row.sequence.0, roots))
}

fn same(
    what: &str,
    state: &mut SourceState,
    (cp, sequence): (CpNumber, u64),
    roots: &Roots,
) -> Result<(), String> {
    let either = state.may_differ();
    if state.line.has(sequence, roots, either)? {
        return Ok(());
    }
    if let Some(twin) = &mut state.twin
        && twin.has(sequence, roots, false)?
    {
        return Ok(());
    }
    Err(format!("{what} of CP {cp} is not what was written up to {sequence}"))
}

/// After a step: a source.
pub(super) fn source(source: &SourceEnd) -> Result<(), String> {
    let state = &mut *source.state.borrow_mut();
    if let Some(problem) = &state.problem {
        return Err(problem.clone());
    }
    if let Some(refused) = state.refused.as_ref().filter(|_| !source.is_excused()) {
        return Err(format!("{} does not start: {refused}", state.setup.name));
    }
    own_of(source, state).map_err(|problem| format!("{}: {problem}", state.setup.name))?;
    let Some(filer) = state.filer.clone() else { return Ok(()) };
    let shared = filer.shared();
    if shared.fenced().is_none()
        && !state.was_copied
        && let LinkState::Halted(refused) = shared.link()
    {
        return Err(format!("{} is halted: {}", state.setup.name, refused.reason));
    }
    notice(state, &shared);
    stands_while_held(state, &shared).map_err(|problem| format!("{}: {problem}", state.setup.name))
}

/// Nothing is answered while the gate is held; a client may hear of an answer that was given before.
fn stands_while_held(state: &mut SourceState, shared: &FilerShared) -> Result<(), String> {
    let answered = shared.completion.answered().0;
    if shared.answering() != Answering::Held {
        state.held_at = None;
        return Ok(());
    }
    let held_at = *state.held_at.get_or_insert(answered);
    if answered > held_at {
        return Err(format!("{answered} answered while held at {held_at}"));
    }
    Ok(())
}

fn notice(state: &mut SourceState, shared: &FilerShared) {
    let marked = shared.mark().is_some();
    match (state.mark, marked) {
        (false, true) => state.probes.hit(Probe::MarkSet),
        (true, false) => state.probes.hit(Probe::MarkCleared),
        (true, true) | (false, false) => {}
    }
    state.mark = marked;
    if shared.counters.values().checkpoints_built_there > 0 {
        state.probes.hit(Probe::Backlog);
    }
    if shared.pass().is_some() {
        state.probes.hit(Probe::Passed);
    }
    match shared.order.figures().lacking {
        Some(Lacking::Nvram) => state.probes.hit(Probe::BothFull),
        Some(Lacking::Pool) => state.probes.hit(Probe::PoolFull),
        None => {}
    }
    if shared.lacks_hub_room() {
        state.probes.hit(Probe::HubFull);
    }
    let (repaired, _) = shared.pool.repairs();
    if repaired > 0 {
        state.probes.hit(Probe::LegRepaired);
    }
}

fn own_of(_: &SourceEnd, state: &mut SourceState) -> Result<(), String> {
    let Some(filer) = state.filer.clone() else { return Ok(()) };
    let shared = filer.shared();
    let (cp, _) = shared.own();
    if cp <= state.own {
        return Ok(());
    }
    let (cp, sequence, roots) = published_in(&shared.pool, shared.source)?;
    state.own = cp;
    // Until it serves, what was lost of the line is not known.
    let judged = state.serving && state.primary == Primary::Source && shared.fenced().is_none();
    if judged { same("the own image", state, (cp, sequence), &roots) } else { Ok(()) }
}

/// Whether both ends have published the same CP.
pub(super) fn agree(hub: &HubEnd, state: &SourceState) -> bool {
    let (Some(hub), Some(filer)) = (hub.shared(), &state.filer) else { return false };
    let (own, source) = (filer.shared(), filer.shared().source);
    let (here, there) = (published_in(&own.pool, source), published_in(&hub.pool, source));
    own.is_connected() && here.is_ok_and(|here| there.is_ok_and(|there| here == there))
}

/// Both ends are in step, and nothing is under way.
pub(super) fn is_at_rest(source: &SourceEnd) -> bool {
    let state = source.state.borrow();
    let Some(filer) = &state.filer else { return false };
    let shared = filer.shared();
    state.serving
        && state.primary == Primary::Source
        && shared.is_connected()
        && shared.mark().is_none()
        && shared.answering() == Answering::Policy
        && shared.order.frozen().is_none()
        && shared.completion.figures().waiting == 0
}

/// Why it is not, for a person.
pub(super) fn unrest(source: &SourceEnd) -> String {
    let state = source.state.borrow();
    let Some(filer) = &state.filer else { return "it does not run".to_owned() };
    let shared = filer.shared();
    format!(
        "serving {}, primary {:?}, link {:?}, mark {:?}, answering {:?}, frozen {:?}, waiting {}, rejected {:?}, \
         pass {:?}, failed {:?}, order {:?}",
        state.serving,
        state.primary,
        shared.link(),
        shared.mark(),
        shared.answering(),
        shared.order.frozen().map(|frozen| frozen.cp),
        shared.completion.figures().waiting,
        shared.rejected(),
        shared.pass(),
        shared.failed(),
        shared.order.figures()
    )
}

/// In the end: both images are what was written, all of it, and both pools are sound.
pub(super) fn in_the_end(hub: &HubEnd, source: &SourceEnd) -> Result<(), String> {
    let state = &mut *source.state.borrow_mut();
    let shared = hub.shared().ok_or("the hub does not run")?;
    let filer = state.filer.clone().ok_or("the source does not run")?;
    let own = filer.shared();
    let last = state.line.last();
    let here = published_in(&own.pool, own.source)?;
    let there = published_in(&shared.pool, own.source)?;
    if here != there {
        return Err(format!("the ends differ: {here:?} here, {there:?} at the hub"));
    }
    if here.1 != last {
        return Err(format!("{last} was written, the CP is of {}", here.1));
    }
    same("the image", state, (here.0, last), &here.2)?;
    if let Some(split) = &state.split {
        let kept = shared.pool.catalog().kept(own.source).map_err(|error| error.to_string())?;
        let roots = |kept: &Kept| -> Roots {
            kept.row.volumes.iter().map(|kept| (kept.number, kept.tree.root())).collect()
        };
        if !kept.iter().any(|kept| roots(kept) == *split) {
            return Err("what the hub had served is kept under no name".to_owned());
        }
    }
    let contents = state.line.content(last)?.clone();
    for pool in [&own.pool, &shared.pool] {
        let rows = pool.catalog().volumes(own.source).map_err(|error| error.to_string())?;
        for (row, wanted) in rows.iter().zip(&contents) {
            let mut bytes = vec![0; to_usize(row.tree.size.0)];
            read_into(pool, &row.tree, 0, &mut bytes).map_err(|error| error.to_string())?;
            let size = if state.setup.grown { GROWN_BYTES } else { VOLUME_BYTES };
            if row.tree.size.0 != size || row.grows_to.is_some() {
                return Err(format!("volume {} has {} bytes in the end", row.name, row.tree.size));
            }
            if bytes != wanted[..bytes.len()] {
                return Err(format!("volume {} cannot be read as it was written", row.name));
            }
        }
        let report = check(pool, Depth::Data).map_err(|error| error.to_string())?;
        if !report.is_clean() {
            return Err(format!("check of a pool: {:?}", report.findings));
        }
    }
    Ok(())
}
