//! Filling devices: the thread's part, and what administrators ask of the devices of a pool.

use std::sync::Arc;
use std::time::Instant;

use crate::device::Device;
use crate::limits::REBUILD_STRIPES_NOTED;
use crate::pool::error::PoolError;
use crate::raid::rebuild::{ManageError, Step};
use crate::raid::span::Span;
use crate::status::upkeep::RebuildStatus;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{to_f64, to_u64};
use crate::units::machine;

use super::pace::Pace;
use super::{Keeper, Shared, Upkeep};

/// Stripes that hold nothing, between two looks whether to end.
const LEFT_OUT_AT_ONCE: u64 = 1024;

/// How far filling is.
#[derive(Debug, Default)]
pub(super) struct Progress {
    began: Option<Instant>,
    done: u64,
    total: u64,
    problem: Option<String>,
}

impl Upkeep {
    fn array(&self) -> Result<&Arc<Span>, ManageError> {
        self.pool.array().ok_or(ManageError::Plain)
    }

    /// The place and name of a device, found by path, id or place.
    pub fn find_device(&self, name: &str) -> Result<(usize, Arc<str>), ManageError> {
        let array = self.array()?;
        let place = array.place_of(name)?;
        Ok((place, array.members().swap_remove(place).name))
    }

    /// Bytes that a device at that place must have.
    pub fn device_bytes(&self, place: usize) -> Result<u64, ManageError> {
        Ok(self.array()?.member_bytes(place))
    }

    /// Whether a device can take that place.
    pub fn check_device(&self, place: usize, device: &dyn Device) -> Result<(), ManageError> {
        self.array()?.check_new(place, device)
    }

    /// Closes a device that is out.
    pub fn release_device(&self, place: usize) -> Result<(), ManageError> {
        self.array()?.release(place);
        Ok(())
    }

    /// Takes a device out.
    pub fn fail_device(&self, place: usize, reason: &str) -> Result<(), ManageError> {
        self.array()?.fail_device(place, reason)
    }

    /// Puts a device in the place of one that is out; it is filled from now on.
    pub fn replace_device(&self, place: usize, device: Arc<dyn Device>) -> Result<(), ManageError> {
        self.array()?.replace(place, device)?;
        self.shared.lock().fill = true;
        self.shared.bell.notify_all();
        Ok(())
    }

    /// What is being filled.
    pub fn rebuild(&self) -> Option<RebuildStatus> {
        let array = self.pool.array()?;
        let filling = array.filling();
        let state = self.shared.lock();
        let progress = &state.rebuild;
        if filling.devices == 0 && filling.lost_rows == 0 && progress.problem.is_none() {
            return None;
        }
        let chunk = array.stripe_blocks_of_one() * BLOCK_BYTES_U64;
        let rate = progress
            .began
            .map(|began| to_f64(progress.done) / machine::elapsed(began).as_secs_f64().max(0.001));
        let left = to_f64(progress.total.saturating_sub(progress.done));
        Some(RebuildStatus {
            devices: to_u64(filling.devices),
            done_bytes: progress.done * chunk,
            total_bytes: progress.total * chunk,
            seconds_left: rate.filter(|rate| *rate > 0.0).map(|rate| left / rate),
            lost_blocks: filling.lost_rows,
            problem: progress.problem.clone(),
        })
    }
}

impl Keeper {
    /// Whether a device is to be filled and nothing has kept it from that.
    pub(super) fn is_to_fill(&self) -> bool {
        let Some(array) = self.pool.array() else { return false };
        let mut state = self.shared.lock();
        if state.fill {
            state.rebuild.problem = None;
        }
        state.fill = false;
        state.rebuild.problem.is_none() && array.filling().devices > 0
    }

    /// Has the policy of the array look at how its devices answer.
    pub(super) fn look(&self) {
        if let Some(array) = self.pool.array().filter(|array| array.is_redundant())
            && array.broken().is_none()
            && let Err(error) = array.look()
        {
            tracing::error!(%error, "the array");
        }
    }

    /// Fills devices until all are in, or it is to end.
    pub(super) fn fill(&mut self) {
        let Some(array) = self.pool.array().cloned() else { return };
        let filled = self.fill_until(&array);
        let noted = array.note_filled().map_err(PoolError::from);
        let mut state = self.shared.lock();
        state.rebuild.began = None;
        if let Err(error) = filled.and(noted) {
            tracing::error!(%error, "a device is not filled");
            state.rebuild.problem = Some(error.to_string());
        }
    }

    fn fill_until(&self, array: &Span) -> Result<(), PoolError> {
        let shared = &*self.shared;
        let mut pace = Pace::new(shared, self.options.rebuild_limit);
        let (mut unnoted, mut left_out) = (0, 0_u64);
        self.plan(array)?;
        loop {
            if array.wants_plan() {
                self.plan(array)?;
            }
            match array.rebuild_step()? {
                Step::Idle => return Ok(()),
                Step::Done => {}
                Step::LeftOut => {
                    left_out += 1;
                    if left_out.is_multiple_of(LEFT_OUT_AT_ONCE) && shared.interrupts_rebuild() {
                        return Ok(());
                    }
                }
                Step::Filled(bytes) => {
                    shared.lock().rebuild.done += 1;
                    unnoted += 1;
                    if !pace.take(bytes, Shared::interrupts_rebuild) {
                        return Ok(());
                    }
                }
            }
            if unnoted >= REBUILD_STRIPES_NOTED {
                unnoted = 0;
                array.note_filled()?;
            }
        }
    }

    /// Looks up what is in use, and how much that is.
    fn plan(&self, array: &Span) -> Result<(), PoolError> {
        let in_use = self.pool.blocks_in_use()?;
        array.plan_rebuild(&|first, count| in_use.any(first, count));
        let total = array.stripes_to_fill();
        let mut state = self.shared.lock();
        let began = Some(machine::now());
        state.rebuild = Progress { began, done: 0, total, problem: None };
        tracing::info!(stripes = total, "filling a device");
        Ok(())
    }
}
