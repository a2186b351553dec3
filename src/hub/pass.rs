//! What a pass builds: trees in a write set, kept at intervals, so that a pass that is cut goes on from
//! there (R19).
//!
//! Called by an applier's slot. A pass whose connection breaks keeps what it has before it ends; one
//! that is refused gives all of it up. Going on is comparing what is kept with the newest CP of the
//! source ([`super::compare`]), whatever it was built from: no place is remembered, nothing is
//! believed of it but the trees.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::applier::{Input, Inputs, Job, OUT_OF_PLACE, Stop, base_of, put_runs, rejected};
use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::write_set::{Budget, WriteSet};
use crate::units::convert::to_u64;
use crate::units::machine;
use crate::units::numbers::VolumeNumber;
use crate::volume::error::VolumeError;
use crate::volume::work;
use crate::volume::writer::TreeWriter;
use crate::wire::message::CpEnd;

/// Bytes taken after which a pass keeps what it has. Unit tests shrink it.
const KEEP_BYTES: u64 = if cfg!(test) { 1 << 20 } else { 64 << 20 };
/// Time after which it does, if anything has come.
const KEEP_PAUSE: Duration = Duration::from_secs(5);

/// The trees of a pass under way.
pub(super) struct Work {
    /// Their blocks.
    pub(super) set: WriteSet,
    /// Those that differ from the published ones.
    pub(super) trees: BTreeMap<VolumeNumber, TreeRoot>,
}

/// When a pass keeps what it has.
pub(super) struct Clock {
    bytes: u64,
    kept: Instant,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { bytes: 0, kept: machine::now() }
    }

    /// So many bytes came; true if it is time.
    pub(super) fn came(&mut self, bytes: usize) -> bool {
        self.bytes += to_u64(bytes);
        let due = self.bytes >= KEEP_BYTES || machine::elapsed(self.kept) >= KEEP_PAUSE;
        if due {
            *self = Self::new();
        }
        due
    }
}

impl Work {
    /// Goes on with what is kept, or begins anew. A pass by births begins with the image.
    pub(super) fn begin(pool: &Arc<Pool>, job: &Job) -> Result<Self, Stop> {
        let source = job.lane().source();
        if job.compares() {
            match work::resume(pool, source, Budget::FREEING) {
                // A tree that nobody compares must not be published.
                Ok(Some(resumed)) if !resumed.trees.keys().all(|volume| job.agrees(*volume)) => {}
                Ok(Some(resumed)) => {
                    let work::Resumed { set, trees } = resumed;
                    tracing::info!(source = %job.lane().name(), "a pass that was cut goes on");
                    return Ok(Self { set, trees });
                }
                Ok(None) => {}
                Err(VolumeError::Pool(
                    error @ (PoolError::Device(_)
                    | PoolError::Latched { .. }
                    | PoolError::WorkKept { .. }),
                )) => return Err(error.into()),
                Err(error) => {
                    let source = job.lane().name();
                    tracing::error!(%source, %error, "a pass that was cut begins anew");
                }
            }
        }
        work::give_up(pool, source)?;
        Ok(Self { set: pool.begin(Budget::FREEING), trees: BTreeMap::new() })
    }

    /// Keeps what it has; it lasts from then on.
    pub(super) fn keep(&mut self, job: &Job) -> Result<(), Stop> {
        if self.trees.is_empty() {
            return Ok(());
        }
        let trees = self.trees.iter().map(|(volume, tree)| (*volume, *tree)).collect();
        let owner = (job.lane().source(), job.epoch());
        let kept = self.set.keep_work(owner, job.cp(), trees)?;
        let blocks = self.set.blocks();
        tracing::debug!(source = %job.lane().name(), kept, %blocks, "pass under way");
        Ok(())
    }
}

/// Builds what the source sends as born since the image. Returns its end.
pub(super) fn build(
    pool: &Arc<Pool>,
    inputs: &mut Inputs<'_>,
    work: &mut Work,
    bases: &BTreeMap<VolumeNumber, TreeRoot>,
) -> Result<CpEnd, Stop> {
    let job = inputs.job;
    let (mut clock, mut seen) = (Clock::new(), BTreeSet::new());
    let mut input = inputs.next();
    loop {
        match input {
            Input::Abort => {
                work.keep(job)?;
                return Err(Stop::Aborted);
            }
            Input::Finish(end) => return Ok(end),
            Input::Nodes(..) | Input::Blocks(..) => return Err(rejected(&OUT_OF_PLACE)),
            Input::Updates { volume, mut payload } => {
                let base = base_of(bases, volume, seen.insert(volume))?;
                let key = VolumeKey { source: job.lane().source(), volume };
                let mut writer = TreeWriter::new(pool, &mut work.set, key, *base, job.cp())?;
                input = loop {
                    put_runs(job, None, &mut writer, base, &payload)?;
                    job.lane().take_updates(payload.len());
                    job.lane().ladder.passed(payload.len());
                    if clock.came(payload.len()) {
                        let tree = writer.finish()?;
                        work.trees.insert(volume, tree);
                        work.keep(job)?;
                        writer = TreeWriter::new(pool, &mut work.set, key, tree, job.cp())?;
                    }
                    match inputs.more(volume) {
                        Ok(more) => payload = more,
                        Err(other) => break other,
                    }
                };
                work.trees.insert(volume, writer.finish()?);
            }
        }
    }
}
