//! The checkpoint thread: makes a CP out of each frozen interval, at both ends.
//!
//! One thread a source. An interval is frozen when a partition or the pool is full (by the writer
//! who finds it so), when the interval is over, or on command; an empty one never is. Then:
//!
//! 1. the freeze is durable in the own ring (R6)
//! 2. plan: what changed, blocks known in part filled from the tree of the CP before
//! 3. the session may send PartitionFull and the data
//! 4. own tree, published in the own pool; only then CpEnd leaves (the hub is never ahead)
//! 5. the hub says that it has published the same roots; or the source is alone, and will bring
//!    the hub's image up by a pass
//! 6. ring space up to the freeze is released, buffers go, waiting writers go on
//!
//! After a crash between any two steps the same interval is recovered from the ring and goes
//! through the same steps: same transfers, same references; a tree that is published already is
//! not written again, and planning over it gives the same content.
//!
//! A source without a hub does the same without 3 and 5: its CP is complete when the own tree is
//! published.
//!
//! If the own pool fails, or a block of the base cannot be read, the source fails: writes and
//! flushes get its reason. A pool that is full makes the CP wait.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::buffers::{Buffers, Page};
use super::feed::DurableFreeze;
use super::growth;
use super::keeper::Kept;
use super::mending;
use super::order::{Frozen, Lacking};
use super::plan::{Plan, Step};
use super::shared::{Common, Pins, Shared};
use super::signals::{Committed, CpData, CpOver, Roots};
use super::tree;
use crate::limits::{HANDSHAKE_SECONDS_MAX, PLACE_SECONDS_MAX};
use crate::metric::catalogue::CHECKPOINT_DURATION_SECONDS;
use crate::metric::phase_ended;
use crate::pool::error::PoolError;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::publish::Publish;
use crate::pool::write_set::{Budget, WriteSet};
use crate::units::convert::to_u64;
use crate::units::machine;
use crate::units::numbers::{CpNumber, Vbn, VolumeNumber};
use crate::volume::error::VolumeError;
use crate::volume::mend::{Depth, is_rot};
use crate::volume::writer::{Content, TreeWriter, grow};

/// Pause before a CP is tried again that the own pool had no room for.
const FULL_PAUSE: Duration = Duration::from_secs(1);
/// Longest sleep while nothing is asked.
const IDLE_PAUSE: Duration = Duration::from_secs(3600);

/// How often a CP that waits for the hub looks whether writers wait for it.
const PRESS_PAUSE: Duration = Duration::from_millis(50);

/// Tries of a CP whose base has rotted.
const MEND_TRIES: u32 = 4;

/// What was heard while idle.
enum Heard {
    /// A writer has frozen the interval.
    Frozen,
    Wanted,
    Forced,
    /// The file asks for another policy.
    Policy,
    /// The file asks for larger volumes.
    Growth,
    Stop,
    Nothing,
}

/// The thread is told to end.
struct Stopped;

/// The checkpoint thread.
#[derive(Debug)]
pub struct Checkpointer {
    shared: Arc<Shared>,
    last: Instant,
    /// The interval that is frozen was frozen here, or found frozen at the start.
    asked: bool,
}

impl Checkpointer {
    /// A thread that freezes what was ordered every interval. The first one comes after a part
    /// of it that the source's id decides, so that many sources do not freeze at once.
    pub fn new(shared: Arc<Shared>) -> Self {
        let [spread, ..] = shared.source.0;
        let head_start = shared.pledge.interval() / 256 * u32::from(spread);
        let last = machine::now().checked_sub(head_start).unwrap_or_else(machine::now);
        let asked = shared.order.frozen().is_some();
        Self { shared, last, asked }
    }

    /// Runs until it is told to stop, or the source has failed.
    pub fn run(mut self) {
        let _guard = self.shared.fail_on_panic("the checkpoint thread panicked");
        if self.settled().is_ok() {
            while self.turn().is_ok() {}
        }
    }

    /// Waits until what lies beneath is in a tree: the first CP stands on that.
    fn settled(&self) -> Result<(), Stopped> {
        loop {
            let heard = self.shared.checkpoint.wait(IDLE_PAUSE, |inbox| {
                let settled = || (!self.shared.is_grounded()).then_some(Ok(()));
                if inbox.stop { Some(Err(Stopped)) } else { settled() }
            });
            if let Some(heard) = heard {
                return heard;
            }
        }
    }

    fn turn(&mut self) -> Result<(), Stopped> {
        if let Some(frozen) = self.shared.order.frozen() {
            if !std::mem::take(&mut self.asked) {
                self.shared.counters.checkpoints_full.add(1);
            }
            self.last = machine::now();
            return self.finish(frozen);
        }
        match self.listen() {
            Heard::Stop => return Err(Stopped),
            Heard::Frozen => {}
            Heard::Wanted => {
                if self.freeze() {
                    self.shared.counters.checkpoints_command.add(1);
                }
            }
            Heard::Forced => {
                self.asked = self.shared.order.freeze_anything();
            }
            Heard::Policy => self.change_policy()?,
            Heard::Growth => {
                let grown = growth::grow(&self.shared);
                self.or_fail(grown, "the own catalog")?;
                self.asked = self.shared.order.freeze_anything();
            }
            Heard::Nothing if machine::elapsed(self.last) >= self.shared.pledge.interval() => {
                self.last = machine::now();
                if self.freeze() {
                    self.shared.counters.checkpoints_interval.add(1);
                }
            }
            Heard::Nothing => {}
        }
        // Others who write to the pool may have made room.
        self.shared.order.look_again();
        Ok(())
    }

    /// Freezes unless there is nothing to say, or a writer was quicker. Not before clients are
    /// served: while the log that the hub holds is taken over (R1), a cut made here could fall
    /// between two transfers of one CP.
    fn freeze(&mut self) -> bool {
        self.asked = self.serving() && self.shared.order.freeze().is_some();
        self.asked
    }

    /// A policy changes at a freeze and is written into it (R20). If nothing was ordered behind the
    /// last one, it is that freeze: no CP is made of nothing, and the row keeps the policy.
    fn change_policy(&mut self) -> Result<(), Stopped> {
        if self.freeze() {
            return Ok(());
        }
        let Some(next) = self.shared.promise_at_freeze() else { return Ok(()) };
        // Looked at behind the change: what comes later is answered by both.
        let behind = self.shared.order.figures().sequence;
        let kept = self.shared.note(|kept| kept.next = Some(next));
        self.or_fail(kept.map_err(VolumeError::from), "the own catalog")?;
        self.shared.session.promised(next, behind);
        Ok(())
    }

    /// What a fenced source wrote by itself may become a CP that is kept.
    fn is_fenced(&self) -> bool {
        self.shared.fenced().is_some()
    }

    fn serving(&self) -> bool {
        self.shared.is_serving()
    }

    fn listen(&self) -> Heard {
        let left =
            (self.last + self.shared.pledge.interval()).saturating_duration_since(machine::now());
        let heard = self.shared.checkpoint.wait(left.min(FULL_PAUSE), |inbox| {
            if inbox.stop {
                Some(Heard::Stop)
            } else if inbox.frozen.is_some() {
                Some(Heard::Frozen)
            } else if (self.serving() || self.is_fenced()) && std::mem::take(&mut inbox.forced) {
                inbox.wanted = false;
                Some(Heard::Forced)
            } else if self.serving() && std::mem::take(&mut inbox.wanted) {
                Some(Heard::Wanted)
            } else if self.serving() && !self.shared.sole && self.shared.policy_is_due() {
                Some(Heard::Policy)
            } else if self.serving() && growth::is_due(&self.shared) {
                Some(Heard::Growth)
            } else {
                None
            }
        });
        heard.unwrap_or(Heard::Nothing)
    }

    /// Brings a frozen interval to its end at both ends.
    fn finish(&self, frozen: Arc<Frozen>) -> Result<(), Stopped> {
        let begun = machine::now();
        let freeze = self.durable_freeze(frozen.cp)?;
        let since = phase_ended("freeze", begun);
        let space_blocks = frozen.space_blocks;
        let plan = self.with_hub(|| self.plan(&frozen.buffers))?;
        let plan = self.or_fail(plan, "the plan of a CP")?;
        let since = phase_ended("plan", since);
        drop(frozen);
        self.shared.order.filled(freeze.cp, &plan.filled);
        let plan = Arc::new(Plan { filled: Vec::new(), ..plan });
        if !self.shared.sole {
            let rows = self.shared.outbox.rows_of(freeze.cp);
            self.shared.session.frozen(CpData { freeze, plan: Arc::clone(&plan), rows });
        }
        let (_, before) = self.shared.own();
        let roots = self.own_tree(&plan, &freeze, space_blocks)?;
        drop(plan);
        let since = phase_ended("build", since);
        if machine::breaks(20) && roots == before {
            return Ok(());
        }
        self.shared.promise.settled();
        self.shared.order.settled(freeze.cp);
        let mut alone = false;
        if !self.shared.sole {
            let pins = self.shared.pins();
            let committed = Committed { cp: freeze.cp, roots: roots.clone(), pins };
            self.shared.session.committed(committed);
            alone = self.wait_until_over(freeze.cp)?.alone;
        }
        self.done(&freeze, roots, alone);
        phase_ended("publish", since);
        metrics::histogram!(CHECKPOINT_DURATION_SECONDS.name).record(machine::elapsed(begun));
        Ok(())
    }

    fn durable_freeze(&self, cp: CpNumber) -> Result<DurableFreeze, Stopped> {
        self.wait_for(|inbox| inbox.frozen.take_if(|freeze| freeze.cp == cp))
    }

    /// Waits until the partition may go. Writers who wait for its room are told of meanwhile: while
    /// the hub's image is brought up, it can be had (R4).
    fn wait_until_over(&self, cp: CpNumber) -> Result<CpOver, Stopped> {
        loop {
            let heard = self.shared.checkpoint.wait(PRESS_PAUSE, |inbox| {
                let over = inbox.done.take_if(|over| over.cp == cp);
                over.map(Ok).or_else(|| inbox.stop.then_some(Err(Stopped)))
            });
            if let Some(heard) = heard {
                return heard;
            }
            if self.shared.order.figures().lacking == Some(Lacking::Nvram) {
                self.shared.session.pressed(cp);
            }
        }
    }

    fn wait_for<T>(
        &self,
        mut word: impl FnMut(&mut super::signals::CheckpointInbox) -> Option<T>,
    ) -> Result<T, Stopped> {
        loop {
            let heard = self.shared.checkpoint.wait(IDLE_PAUSE, |inbox| {
                word(inbox).map(Ok).or_else(|| inbox.stop.then_some(Err(Stopped)))
            });
            if let Some(heard) = heard {
                return heard;
            }
        }
    }

    fn or_fail<T>(&self, result: Result<T, VolumeError>, what: &str) -> Result<T, Stopped> {
        result.map_err(|error| {
            self.shared.fail(&format!("{what} failed: {error}"));
            Stopped
        })
    }

    fn plan(&self, buffers: &Buffers) -> Result<Plan, VolumeError> {
        let pins = self.shared.pins();
        Plan::build(buffers, |volume, vbn, page: &mut Page| match pins.get(&volume) {
            Some(pin) => mending::reading(&self.shared, pin, (Vbn(vbn), 1), || {
                tree::read_published(&self.shared.pool, &pin.tree(), Vbn(vbn), page)
            }),
            None => Err(PoolError::UnknownVolume { key: self.key(volume) }.into()),
        })
    }

    /// Does what may meet rot. What cannot be mended because the hub is not there for a moment, as it
    /// connects anew, is tried again.
    fn with_hub<T>(
        &self,
        mut work: impl FnMut() -> Result<T, VolumeError>,
    ) -> Result<Result<T, VolumeError>, Stopped> {
        let (until, mut met) = (self.patience(), self.meetings());
        loop {
            match work() {
                Err(error) if is_rot(&error) && self.hub_may_come(until, &mut met) => {
                    tracing::warn!(source = %self.shared.name, %error, "a CP waits for the hub");
                    self.pause()?;
                }
                done => return Ok(done),
            }
        }
    }

    /// Until when a hub that is away is waited for: one that went without a word is not known to be
    /// gone before it was silent for so long, and is connected to and asked after that.
    fn patience(&self) -> Instant {
        let silent = self.shared.pledge.patience();
        let found_out = Duration::from_secs(HANDSHAKE_SECONDS_MAX).max(silent);
        machine::now() + found_out + silent + Duration::from_secs(PLACE_SECONDS_MAX)
    }

    /// How often the hub was met, and did not answer.
    fn meetings(&self) -> (u64, u64) {
        (self.shared.counters.connections.get(), self.shared.questions.unanswered())
    }

    /// Whether the hub was not there, or not all the time since that many meetings, or is silent, and
    /// may be.
    fn hub_may_come(&self, until: Instant, met: &mut (u64, u64)) -> bool {
        let before = std::mem::replace(met, self.meetings());
        let away = !self.shared.is_connected() || *met != before;
        away && !self.shared.sole && machine::now() < until
    }

    /// Writes and publishes the own tree, unless an earlier run of this CP has.
    fn own_tree(
        &self,
        plan: &Plan,
        freeze: &DurableFreeze,
        space_blocks: u64,
    ) -> Result<Roots, Stopped> {
        let (own_cp, roots) = self.shared.own();
        if own_cp >= freeze.cp {
            return Ok(roots);
        }
        let started = machine::now();
        let (mut tries, until, mut met) = (0, self.patience(), self.meetings());
        loop {
            let budget = self.shared.promise.lend(space_blocks);
            match self.publish(plan, freeze, budget) {
                Ok(roots) => {
                    let spent =
                        u64::try_from(machine::elapsed(started).as_millis()).unwrap_or(u64::MAX);
                    self.shared.counters.tree_ms.add(spent);
                    return Ok(roots);
                }
                Err(VolumeError::Pool(error @ PoolError::Full { .. })) => {
                    tracing::warn!(source = %self.shared.name, %error, "CP waits for room");
                    let reason = format!("CP {} waits for room here: {error}", freeze.cp);
                    self.shared.set_rejected(Some(reason));
                    self.pause()?;
                }
                Err(error) if is_rot(&error) && tries < MEND_TRIES && self.mend_nodes(plan) => {
                    tries += 1;
                }
                Err(error) if is_rot(&error) && self.hub_may_come(until, &mut met) => {
                    self.pause()?;
                }
                Err(error) => return self.or_fail(Err(error), "the own pool"),
            }
        }
    }

    /// A node of the base could not be read; whether it is worth another try.
    fn mend_nodes(&self, plan: &Plan) -> bool {
        let shared = &self.shared;
        let mut mended = false;
        for pin in shared.pins().values() {
            let key = pin.key();
            if shared.mender.has_waiting(key) {
                // What was mended before may not be known any more: the CP goes without it.
                shared.mender.forget(key);
                mended = true;
            }
            if plan.volumes.iter().any(|planned| planned.volume == key.volume) {
                let mending = mending::mend_pin(shared, pin, Depth::Nodes);
                mended |= mending.is_ok_and(|mending| !mending.mended.is_empty());
            }
        }
        mended
    }

    fn pause(&self) -> Result<(), Stopped> {
        let stop = |inbox: &mut super::signals::CheckpointInbox| inbox.stop.then_some(());
        match self.shared.checkpoint.wait(FULL_PAUSE, stop) {
            Some(()) => Err(Stopped),
            None => Ok(()),
        }
    }

    fn publish(
        &self,
        plan: &Plan,
        freeze: &DurableFreeze,
        budget: Budget,
    ) -> Result<Roots, VolumeError> {
        let shared = &self.shared;
        let before = shared.pins();
        let mut write_set = shared.pool.begin(budget);
        let mut volumes = Vec::with_capacity(plan.volumes.len());
        let mut rewritten = Vec::new();
        for planned in &plan.volumes {
            let key = self.key(planned.volume);
            let base = before.get(&planned.volume).ok_or(PoolError::UnknownVolume { key })?.tree();
            let root = self.write_volume(&mut write_set, key, base, freeze.cp, &planned.steps)?;
            volumes.push((planned.volume, root));
        }
        for (volume, base, size) in growth::outgrown(shared, &before) {
            let built = volumes.iter().position(|(built, _)| *built == volume);
            if built.is_none() {
                let (pool, key) = (&shared.pool, self.key(volume));
                let root = grow(pool, &mut write_set, key, (base, size), freeze.cp)?;
                volumes.push((volume, root));
            }
        }
        for (&volume, pin) in before.iter() {
            let key = self.key(volume);
            if shared.mender.has_waiting(key) {
                let built = volumes.iter().position(|(built, _)| *built == volume);
                let base = built.map_or_else(|| pin.tree(), |at| volumes[at].1);
                let pool = &shared.pool;
                let root = shared.mender.write(pool, &mut write_set, key, base, freeze.cp)?;
                match built {
                    Some(at) => volumes[at].1 = root,
                    None => volumes.push((volume, root)),
                }
                rewritten.push(key);
            }
        }
        let affiliation = shared.affiliation();
        // Nobody else writes the row's extension from this look to the commit.
        let _one = shared.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        let extension = self.extension(freeze)?;
        let published = shared.pool.publish(Publish {
            write_set,
            source: shared.source,
            cp: freeze.cp,
            sequence: freeze.place.sequence,
            stream_hash: freeze.place.hash,
            epoch: affiliation.epoch,
            generation: None,
            extension: Some(extension),
            volumes,
        })?;
        rewritten.into_iter().for_each(|key| shared.mender.written(key));
        let pins = pin_all(shared)?;
        shared.set_own(freeze.cp, published.roots.clone(), pins);
        Ok(published.roots)
    }

    /// The row's extension with the place of the CP.
    fn extension(&self, freeze: &DurableFreeze) -> Result<Vec<u8>, PoolError> {
        let (row, kept) = self.shared.kept()?;
        let next = freeze.policy.or(kept.next);
        let kept = Kept { nvram_made: true, transfer: freeze.place.transfer, next, ..kept };
        self.shared.keep(&row, &kept)
    }

    fn write_volume(
        &self,
        set: &mut WriteSet,
        key: VolumeKey,
        base: TreeRoot,
        cp: CpNumber,
        steps: &[Step],
    ) -> Result<TreeRoot, VolumeError> {
        let size = growth::size_of(&self.shared, key.volume).unwrap_or(base.size);
        let mut writer = TreeWriter::growing(&self.shared.pool, set, key, (base, size), cp)?;
        for step in steps {
            match step {
                Step::Block { vbn, data, .. } => writer.put(Vbn(*vbn), Content::Data(data))?,
                Step::Hole { vbn, count } => writer.put_hole_range(Vbn(*vbn), *count)?,
            }
        }
        self.shared.counters.tree_blocks.add(to_u64(steps.len()));
        writer.finish()
    }

    /// All ends that there are have published the CP, or this one has while it is durably known to
    /// be alone: everything kept for it goes (invariant 4).
    fn done(&self, freeze: &DurableFreeze, roots: Roots, alone: bool) {
        let shared = &self.shared;
        if let Some(ring) = shared.ring() {
            ring.release(freeze.end);
        }
        shared.outbox.drop_upto(freeze.cp, alone);
        if !alone || !shared.lacks_hub_room() {
            // A CP alone makes no room on the hub.
            shared.set_rejected(None);
        }
        shared.counters.checkpoints_done.add(1);
        shared.counters.checkpoint_at.rise_to(machine::unix_seconds().unsigned_abs());
        if alone {
            tracing::info!(source = %shared.name, cp = %freeze.cp, "CP published here, alone");
        } else {
            let (pins, roots) = (shared.pins(), shared.agreed(&roots));
            shared.set_faulted(None);
            shared.set_common(Common { cp: freeze.cp, roots, pins });
            tracing::info!(source = %shared.name, cp = %freeze.cp, "CP published at both ends");
        }
        shared.order.thaw(freeze.cp);
    }

    fn key(&self, volume: VolumeNumber) -> VolumeKey {
        VolumeKey { source: self.shared.source, volume }
    }
}

/// Pins all volumes as they are published now.
pub fn pin_all(shared: &Shared) -> Result<Pins, PoolError> {
    let pins = shared.pool.pin_source(shared.source)?;
    Ok(Arc::new(pins.into_iter().map(|pin| (pin.key().volume, Arc::new(pin))).collect()))
}
