//! Builds the image of a CP by comparing trees with the source's, level by level (R19).
//!
//! Called by an applier's slot for a pass whose base is unknown. The source holds the CP pinned and
//! answers; the machine is that of [`crate::volume::pull`], which believes nothing that it is told.
//! What is under way is bounded by the window; a source that says what it was not asked, or more than
//! it was asked, is hung up on by its actor.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::applier::{Input, Inputs, Stop, rejected};
use super::pass::{Clock, Work};
use crate::limits::PULL_WINDOW_BYTES;
use crate::pool::Pool;
use crate::pool::pointer::{TreeRoot, VolumeKey};
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
        if let PullError::Own { error, .. } = error { error.into() } else { rejected(&error) }
    }
}

/// How far the pull of a volume has come.
#[derive(PartialEq, Eq)]
enum Reached {
    /// All of it is there.
    End,
    /// It is time to keep what there is.
    Pause,
    /// The connection has gone, or somebody else wants the image.
    Abort,
}

/// Brings the trees of `work` to the roots that were announced, and returns these.
pub(super) fn build(
    pool: &Arc<Pool>,
    inputs: &mut Inputs<'_>,
    work: &mut Work,
    bases: &BTreeMap<VolumeNumber, TreeRoot>,
) -> Result<CpEnd, Stop> {
    let job = inputs.job;
    let Input::Finish(end) = inputs.next() else { return Err(Stop::Aborted) };
    let mut volumes = Vec::with_capacity(bases.len());
    for (&volume, base) in bases {
        let Some(wanted) = end.roots.iter().find(|wanted| wanted.volume == volume) else {
            return Err(rejected(&format!("the source announced no root for volume {volume}")));
        };
        let own = PoolTree::new(pool, *work.trees.get(&volume).unwrap_or(base))?;
        volumes.push(VolumeTarget { volume, size: base.size, root: wanted.root, own });
    }
    let mut puller = CpPuller::new(job.cp(), volumes, WINDOW, 1)?;
    let mut clock = Clock::new();
    for (&volume, base) in bases {
        let key = VolumeKey { source: job.lane().source(), volume };
        loop {
            let tree = *work.trees.get(&volume).unwrap_or(base);
            let writer = TreeWriter::new(pool, &mut work.set, key, tree, job.cp())?;
            let (tree, reached) = pull(inputs, &mut puller, writer, &mut clock)?;
            // A tree that was begun is published, be it the one it began with.
            work.trees.insert(volume, tree);
            match reached {
                Reached::End => break,
                Reached::Pause => work.keep(job)?,
                Reached::Abort => {
                    work.keep(job)?;
                    return Err(Stop::Aborted);
                }
            }
        }
    }
    Ok(end)
}

/// Writes what a volume lacks, until it is time to keep that.
fn pull(
    inputs: &mut Inputs<'_>,
    puller: &mut CpPuller<PoolTree>,
    mut writer: TreeWriter<'_>,
    clock: &mut Clock,
) -> Result<(TreeRoot, Reached), Stop> {
    let job = inputs.job;
    loop {
        match puller.next_step()? {
            Some(Step::Put(_, put)) => put.write(&mut writer)?,
            Some(Step::Done(_)) => return Ok((writer.finish()?, Reached::End)),
            None => {
                // Nobody is there any more: whoever notices it first.
                let heard = puller.asks().iter().all(|ask| job.ask(ask));
                let came = if heard { answer(inputs, puller)? } else { None };
                let Some(bytes) = came else { return Ok((writer.finish()?, Reached::Abort)) };
                if clock.came(bytes) {
                    return Ok((writer.finish()?, Reached::Pause));
                }
            }
        }
    }
}

/// Takes the next answer; its bytes, none if there will be no more.
fn answer(inputs: &mut Inputs<'_>, puller: &mut CpPuller<PoolTree>) -> Result<Option<usize>, Stop> {
    let lane = inputs.job.lane();
    match inputs.next() {
        Input::Nodes(answer, payload) => {
            lane.ladder.passed(payload.len());
            puller.nodes(&answer, &payload)?;
            Ok(Some(payload.len()))
        }
        Input::Blocks(answer, payload) => {
            lane.ladder.passed(payload.len());
            puller.blocks(&answer, &payload)?;
            Ok(Some(payload.len()))
        }
        Input::Abort => Ok(None),
        Input::Updates { .. } | Input::Finish(_) => Err(rejected(&"CP data came in a comparison")),
    }
}
