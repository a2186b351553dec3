//! Builds the image of a CP by comparing trees with the source's, level by level (R19).
//!
//! Called by an applier's slot for a pass whose base is unknown. The source holds the CP pinned and
//! answers; the machine is that of [`crate::volume::pull`], which believes nothing that it is told.
//! What is under way is bounded by the window; a source that says what it was not asked, or more than
//! it was asked, is hung up on by its actor.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::applier::{Input, Inputs, Stop, rejected};
use crate::limits::PULL_WINDOW_BYTES;
use crate::pool::Pool;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::write_set::WriteSet;
use crate::units::numbers::VolumeNumber;
use crate::volume::pull::cp::{CpPuller, Step, VolumeTarget};
use crate::volume::pull::error::PullError;
use crate::volume::pull::own::PoolTree;
use crate::volume::pull::terms::Window;
use crate::volume::writer::TreeWriter;
use crate::wire::message::CpEnd;

/// What is asked for at a time: fewer requests than a connection's send queue has places, so that
/// other answers find one.
const WINDOW: Window =
    Window { bytes: PULL_WINDOW_BYTES, requests: 24, parts: crate::limits::PULL_PARTS_MAX };

impl From<PullError> for Stop {
    fn from(error: PullError) -> Self {
        match error {
            PullError::Own { error, .. } => error.into(),
            other => rejected(&other),
        }
    }
}

/// The new trees of the volumes that differ, and the roots that were announced.
pub(super) fn build(
    pool: &Arc<Pool>,
    inputs: &mut Inputs<'_>,
    write_set: &mut WriteSet,
    bases: &BTreeMap<VolumeNumber, TreeRoot>,
) -> Result<(BTreeMap<VolumeNumber, TreeRoot>, CpEnd), Stop> {
    let job = inputs.job;
    let Input::Finish(end) = inputs.next() else { return Err(Stop::Aborted) };
    let mut volumes = Vec::with_capacity(bases.len());
    for (&volume, base) in bases {
        let Some(wanted) = end.roots.iter().find(|wanted| wanted.volume == volume) else {
            return Err(rejected(&format!("the source announced no root for volume {volume}")));
        };
        let own = PoolTree::new(pool, *base)?;
        volumes.push(VolumeTarget { volume, size: base.size, root: wanted.root, own });
    }
    let mut puller = CpPuller::new(job.cp(), volumes, WINDOW, 1)?;
    let mut built = BTreeMap::new();
    for (&volume, base) in bases {
        let key = VolumeKey { source: job.lane().source(), volume };
        let writer = TreeWriter::new(pool, write_set, key, *base, job.cp())?;
        let tree = pull(inputs, &mut puller, writer)?;
        if tree != *base {
            built.insert(volume, tree);
        }
    }
    Ok((built, end))
}

/// Writes all that a volume lacks.
fn pull(
    inputs: &mut Inputs<'_>,
    puller: &mut CpPuller<PoolTree>,
    mut writer: TreeWriter<'_>,
) -> Result<TreeRoot, Stop> {
    let job = inputs.job;
    loop {
        match puller.next_step()? {
            Some(Step::Put(_, put)) => put.write(&mut writer)?,
            Some(Step::Done(_)) => return Ok(writer.finish()?),
            None => {
                if !puller.asks().iter().all(|ask| job.ask(ask)) {
                    // Nobody is there any more.
                    return Err(Stop::Aborted);
                }
                answer(inputs, puller)?;
            }
        }
    }
}

/// Takes the next answer.
fn answer(inputs: &mut Inputs<'_>, puller: &mut CpPuller<PoolTree>) -> Result<(), Stop> {
    let lane = inputs.job.lane();
    match inputs.next() {
        Input::Nodes(answer, payload) => {
            lane.ladder.passed(payload.len());
            puller.nodes(&answer, &payload)?;
        }
        Input::Blocks(answer, payload) => {
            lane.ladder.passed(payload.len());
            puller.blocks(&answer, &payload)?;
        }
        Input::Abort => return Err(Stop::Aborted),
        Input::Updates { .. } | Input::Finish(_) => {
            return Err(rejected(&"CP data came in a comparison"));
        }
    }
    Ok(())
}
