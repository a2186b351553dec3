//! The applier: builds the image of a CP from what the hub already has.
//!
//! A fixed number of slots (threads) serves jobs of all sources, oldest first. A job takes Updates
//! frames as they come, looks each reference up in the source log, builds the trees copy-on-write,
//! and publishes only if every root equals the source's (invariant 3). Whatever goes wrong before
//! that leaves the old image as it is: the write set is dropped and its blocks are free again.
//! In a pool that is full a CP draws on the reserve; it is published if it makes room (R18).
//!
//! Passes have slots of their own: they take as long as the source's throttle makes them, and the
//! CPs of others do not wait for them. What compares is in [`super::compare`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::aside::WRITEBACK_BYTES;
use super::compare;
use super::extension::Extension;
use super::lane::{Lane, lock};
use super::mending;
use super::pass::{self, Work};
use super::replay::{Chain, Replay, ReplayError};
use super::shared::Shared;
use crate::limits::{CP_FRAME_BYTES_MAX, PULL_BLOCKS_MAX, PULL_NODES_MAX};
use crate::metric::catalogue::CHECKPOINT_DURATION_SECONDS;
use crate::metric::phase_ended;
use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::publish::Publish;
use crate::pool::write_set::{Budget, WriteSet};
use crate::record::marks::Place;
use crate::session::mirror::{Build, LeftOut, Mirror, Outcome};
use crate::sourcelog::{LogError, LogReader, LogStore};
use crate::units::convert::to_u64;
use crate::units::hash::Root;
use crate::units::machine::{self, Bell};
use crate::units::numbers::{ByteCount, CpNumber, Epoch, Vbn, VolumeNumber};
use crate::volume::error::VolumeError;
use crate::volume::mend::{Depth, is_rot};
use crate::volume::work;
use crate::volume::writer::{Content, TreeWriter, grow};
use crate::wire::message::{CpEnd, Frame, Message, VolumeRoot};
use crate::wire::pull::{Pulled, blocks_bytes_max, nodes_bytes_max};
use crate::wire::updates::{Decoder, Run, inline_blocks};

/// So many CPs that wait for a slot are a crowd.
const CROWD: usize = 32;

/// How many times as long as a job took, until its CP was there, a slot rests behind it; never longer than
/// [`REST_MAX`], which is what a CP is late by if the crowd has gone meanwhile.
const RESTS: u32 = 2;
const REST_MAX: Duration = Duration::from_millis(50);

/// Behind a CP that has waited for so long no slot rests: half of the shortest interval that is usual.
const LATE: Duration = Duration::from_secs(5);

/// What a job is told while it runs.
#[derive(Debug)]
pub(super) enum Input {
    Updates { volume: VolumeNumber, payload: Bytes },
    Finish(CpEnd),
    Nodes(Pulled, Bytes),
    Blocks(Pulled, Bytes),
    Abort,
}

/// What is behind a pass is taken; was given up; becomes the log.
const OPEN: u8 = 0;
const OVER: u8 = 1;
const ADOPTED: u8 = 2;

/// Bytes behind a pass that are written at most before data of the pass has its turn.
const BEHIND_TURN_BYTES: u64 = 7 * CP_FRAME_BYTES_MAX;

/// One CP of one source to be applied.
#[derive(Debug)]
pub struct Job {
    lane: Arc<Lane>,
    cp: CpNumber,
    last: Place,
    epoch: Epoch,
    /// What it is made of.
    build: Build,
    /// The source's log behind it stays, although it is a pass.
    keeps_log: bool,
    /// The source sends its log meanwhile, and whether that was given up since.
    behind: bool,
    /// One of [`OPEN`], [`OVER`], [`ADOPTED`]: who is first decides, the slot or the actor.
    behind_state: AtomicU8,
    behind_gone: AtomicBool,
    /// The volumes it is made of, with the sizes that they have in this session, and those whose
    /// entries in the log do not count (R20).
    agreed: BTreeMap<VolumeNumber, ByteCount>,
    left_out: BTreeSet<VolumeNumber>,
    /// When the source said that it is frozen.
    begun: Instant,
    /// Where a comparison asks.
    frames: Option<mpsc::Sender<Frame>>,
    /// What it has asked for and has not been answered.
    asked: AtomicUsize,
    /// Bounded by the `cp` credit, and by what was asked for.
    inputs: Mutex<VecDeque<Input>>,
    wake: Bell,
}

impl Job {
    /// A job for the CP of `lane` that ends at `last`, of what the session of `machine` agrees on.
    pub fn new(
        lane: Arc<Lane>,
        (cp, last): (CpNumber, Place),
        machine: &Mirror,
        build: Build,
        frames: Option<mpsc::Sender<Frame>>,
    ) -> Arc<Self> {
        let (inputs, wake) = (Mutex::default(), Bell::new());
        let (begun, epoch) = (machine::now(), machine.known().epoch);
        let agreed = machine.agreed().map(|offer| (offer.number, offer.size)).collect();
        let left_out = machine.known().left_out.iter().map(|left| left.volume).collect();
        let (keeps_log, behind) = (machine.keeps_log(), machine.is_behind());
        Arc::new(Self {
            lane,
            cp,
            last,
            epoch,
            build,
            keeps_log,
            behind,
            behind_state: AtomicU8::new(OPEN),
            behind_gone: AtomicBool::new(false),
            agreed,
            left_out,
            begun,
            frames,
            asked: AtomicUsize::new(0),
            inputs,
            wake,
        })
    }

    /// The CP.
    pub fn cp(&self) -> CpNumber {
        self.cp
    }

    /// Its place in the source's history.
    pub fn last(&self) -> Place {
        self.last
    }

    /// Whether it is built without the source's log.
    pub fn is_pass(&self) -> bool {
        self.build.is_pass()
    }

    /// Whether the source's log goes on behind it, wherever it stood.
    pub fn sets_log(&self) -> bool {
        self.build.is_pass() && !self.keeps_log
    }

    /// What is behind it is not wanted any more; false if it becomes the log by now.
    pub fn give_up_behind(&self) -> bool {
        let over = self.settle_behind(OVER);
        self.poke();
        over
    }

    /// What becomes of what is behind it, unless that is decided.
    fn settle_behind(&self, state: u8) -> bool {
        let (acquire, release) = (Ordering::Acquire, Ordering::AcqRel);
        let settled = self.behind_state.compare_exchange(OPEN, state, release, acquire);
        settled.is_ok() || settled == Err(state)
    }

    /// Whether what was given up is still there.
    fn owes_drop(&self) -> bool {
        self.behind_state.load(Ordering::Acquire) == OVER
            && !self.behind_gone.load(Ordering::Relaxed)
    }

    fn takes_behind(&self) -> bool {
        self.behind && self.behind_state.load(Ordering::Acquire) != OVER
    }

    /// Has it look at what waits to be written.
    pub fn poke(&self) {
        // With the lock, so that it is not between looking and waiting.
        drop(lock(&self.inputs));
        self.wake.notify_one();
    }

    /// The epoch that its source is in.
    pub(super) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether it has that volume.
    pub(super) fn agrees(&self, volume: VolumeNumber) -> bool {
        self.agreed.contains_key(&volume)
    }

    /// A tree in the size that the volume has in this session.
    fn grown(
        &self,
        pool: &Arc<Pool>,
        set: &mut WriteSet,
        volume: VolumeNumber,
        tree: TreeRoot,
    ) -> Result<TreeRoot, Stop> {
        let size = self.agreed.get(&volume).copied().unwrap_or(tree.size);
        let key = VolumeKey { source: self.lane.source(), volume };
        Ok(grow(pool, set, key, (tree, size), self.cp)?)
    }

    /// Whether it asks for what it is made of.
    pub fn compares(&self) -> bool {
        self.build == Build::Compare
    }

    /// Its lane.
    pub(super) fn lane(&self) -> &Arc<Lane> {
        &self.lane
    }

    /// Asks the source; false if the connection has gone.
    pub(super) fn ask(&self, message: &Message) -> bool {
        let Some(frames) = &self.frames else { return false };
        self.asked.fetch_add(1, Ordering::Relaxed);
        machine::send(frames, Frame::new(message, Bytes::new()))
    }

    /// Hands over an answer; false if it was not asked for, or is longer than any can be.
    #[must_use = "a source that says what it was not asked is hung up on"]
    pub fn nodes(&self, answer: Pulled, payload: Bytes) -> bool {
        self.answered(Input::Nodes(answer, payload), nodes_bytes_max(PULL_NODES_MAX))
    }

    /// The same for blocks.
    #[must_use = "a source that says what it was not asked is hung up on"]
    pub fn blocks(&self, answer: Pulled, payload: Bytes) -> bool {
        self.answered(Input::Blocks(answer, payload), blocks_bytes_max(PULL_BLOCKS_MAX))
    }

    fn answered(&self, input: Input, bytes_max: u64) -> bool {
        let bytes = match &input {
            Input::Nodes(_, payload) | Input::Blocks(_, payload) => to_u64(payload.len()),
            Input::Updates { .. } | Input::Finish(_) | Input::Abort => 0,
        };
        let less = |asked: usize| asked.checked_sub(1);
        let asked = self.asked.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok();
        if asked && bytes <= bytes_max {
            self.put(input);
        }
        asked && bytes <= bytes_max
    }

    /// Hands over a frame of Updates.
    pub fn feed(&self, volume: VolumeNumber, payload: Bytes) {
        self.put(Input::Updates { volume, payload });
    }

    /// All updates were handed over.
    pub fn finish(&self, end: CpEnd) {
        self.put(Input::Finish(end));
    }

    /// Give it up.
    pub fn abort(&self) {
        self.put(Input::Abort);
    }

    fn put(&self, input: Input) {
        lock(&self.inputs).push_back(input);
        self.wake.notify_one();
    }

    fn is_aborted(&self) -> bool {
        lock(&self.inputs).iter().any(|input| matches!(input, Input::Abort))
    }

    /// What comes next; none if it is something behind the pass, which has its turn before data or behind it.
    fn next(&self, behind_first: bool) -> Option<Input> {
        let mut inputs = lock(&self.inputs);
        loop {
            let behind = self.behind && (!self.lane.aside().is_empty() || self.owes_drop());
            if behind && behind_first {
                return None;
            }
            if let Some(input) = inputs.pop_front() {
                return Some(input);
            }
            if behind {
                return None;
            }
            inputs = self
                .wake
                .wait(&self.inputs, inputs)
                .unwrap_or_else(|_: PoisonError<_>| std::process::abort());
        }
    }
}

/// How long a slot rests behind a job that took so long, with so many that wait, of which the first has waited
/// so long.
///
/// While a crowd waits, the CPs of many sources have fallen due at once, and none of them is in such a hurry as the
/// clients whose writes wait for a core.
fn rest(took: Duration, jobs: usize, first_waits: Duration) -> Duration {
    if jobs < CROWD {
        return Duration::ZERO;
    }
    (took * RESTS).min(REST_MAX).min(LATE.saturating_sub(first_waits))
}

/// Jobs that wait for a slot; at most one a source.
#[derive(Debug, Default)]
pub struct JobQueue {
    jobs: Mutex<(VecDeque<Arc<Job>>, bool)>,
    wake: Bell,
}

impl JobQueue {
    /// An empty queue.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Queues a job behind the others.
    pub fn push(&self, job: Arc<Job>) {
        job.lane.begin_job(job.clone());
        lock(&self.jobs).0.push_back(job);
        self.wake.notify_one();
    }

    /// Slots end when their job ends.
    pub fn stop(&self) {
        lock(&self.jobs).1 = true;
        self.wake.notify_all();
    }

    /// Rests, if a crowd waits, behind a job that took so long.
    fn rest(&self, took: Duration) {
        let begin = machine::now();
        let mut jobs = lock(&self.jobs);
        loop {
            let waits = jobs.0.front().map(|job| machine::elapsed(job.begun)).unwrap_or_default();
            let left = rest(took, jobs.0.len(), waits).saturating_sub(machine::elapsed(begin));
            if jobs.1 || left.is_zero() {
                return;
            }
            let waited = self.wake.wait_timeout(&self.jobs, jobs, left);
            jobs = waited.unwrap_or_else(|_: PoisonError<_>| std::process::abort());
        }
    }

    fn next(&self) -> Option<Arc<Job>> {
        let mut jobs = lock(&self.jobs);
        loop {
            if jobs.1 {
                return None;
            }
            if let Some(job) = jobs.0.pop_front() {
                return Some(job);
            }
            jobs = self
                .wake
                .wait(&self.jobs, jobs)
                .unwrap_or_else(|_: PoisonError<_>| std::process::abort());
        }
    }
}

/// One slot; [`Applier::run`] is the body of its thread.
#[derive(Debug)]
pub struct Applier {
    shared: Arc<Shared>,
    queue: Arc<JobQueue>,
    pool: Arc<Pool>,
    store: Arc<LogStore>,
}

/// The roots of a CP that was published, and where its source's log ends if that was set.
type Built = (Vec<(VolumeNumber, Root)>, Place);

/// Why a job did not publish.
pub(super) enum Stop {
    /// Given up on request, or by a fence.
    Aborted,
    NoSpace,
    /// The source may have no more of the pool.
    OverLimit(String),
    Rejected {
        differs: Option<VolumeRoot>,
        reason: String,
    },
    /// The image is damaged where the CP builds on it.
    Rot(String),
    /// The hub's own pool or log failed: to ask the source again would not help, and is no divergence.
    Faulted(String),
}

impl From<PoolError> for Stop {
    fn from(error: PoolError) -> Self {
        if let PoolError::OverLimit { .. } = error {
            return Self::OverLimit(format!("space_limit in its file on the hub: {error}"));
        }
        // The fence came between (R2): what is not published counts as nothing, and its source, which is
        // told so, has made no mistake.
        if let PoolError::Epoch { named, recorded } = &error
            && recorded.number > named.number
        {
            return Self::Aborted;
        }
        let full = matches!(error, PoolError::Full { .. } | PoolError::CatalogFull { .. });
        if full && !machine::breaks(18) {
            Self::NoSpace
        } else if error.latches() || matches!(error, PoolError::Latched { .. }) {
            Self::Faulted(format!("the hub's pool failed: {error}"))
        } else {
            Self::Rejected { differs: None, reason: error.to_string() }
        }
    }
}

impl From<VolumeError> for Stop {
    fn from(error: VolumeError) -> Self {
        if is_rot(&error) {
            return Self::Rot(error.to_string());
        }
        match error {
            VolumeError::Pool(error) => error.into(),
            other @ (VolumeError::Node { .. }
            | VolumeError::Size { .. }
            | VolumeError::PastEnd { .. }
            | VolumeError::OutOfRange { .. }
            | VolumeError::TooLong { .. }
            | VolumeError::Order { .. }
            | VolumeError::BaseTooYoung { .. }
            | VolumeError::SizesDiffer { .. }) => rejected(&other),
        }
    }
}

impl From<ReplayError> for Stop {
    fn from(error: ReplayError) -> Self {
        match error {
            ReplayError::Gap(gap) => rejected(&gap),
            ReplayError::Volume(error) => error.into(),
            ReplayError::Stopped => Self::Aborted,
        }
    }
}

impl Applier {
    /// A slot that serves one of the hub's queues.
    pub fn new(queue: Arc<JobQueue>, shared: Arc<Shared>) -> Self {
        let pool = shared.pool.clone();
        let store = shared.store.clone();
        Self { shared, queue, pool, store }
    }

    /// Serves jobs until the queue is stopped.
    pub fn run(self) {
        while let Some(job) = self.queue.next() {
            let begin = machine::now();
            self.serve(&job);
            if !job.is_pass() {
                self.queue.rest(machine::elapsed(begin));
            }
        }
    }

    fn serve(&self, job: &Arc<Job>) {
        let outcome = match self.apply(job) {
            Ok((roots, log)) => match self.publish(job, roots, log) {
                Ok(()) => return,
                Err(error) => {
                    job.lane.fault(&format!("the source's log: {error}"));
                    Outcome::Aborted
                }
            },
            Err(Stop::Aborted) => Outcome::Aborted,
            Err(Stop::NoSpace) => Outcome::NoSpace,
            Err(Stop::OverLimit(reason)) => {
                tracing::warn!(source = %job.lane.name(), cp = %job.cp, reason, "CP refused");
                Outcome::OverLimit { reason }
            }
            Err(Stop::Faulted(reason)) => {
                job.lane.fault(&reason);
                Outcome::Aborted
            }
            Err(Stop::Rejected { differs, reason }) => {
                if let Err(error) = work::give_up(&self.pool, job.lane.source()) {
                    tracing::warn!(source = %job.lane.name(), %error, "a work tree stays");
                }
                self.reject(job, differs, reason)
            }
            Err(Stop::Rot(reason)) => {
                // The source sends it again; what is mended by then does not stop it.
                mending::mend_all(&self.shared, &job.lane, Depth::Nodes);
                self.reject(job, None, reason)
            }
        };
        self.store.drop_behind(job.lane.source());
        job.lane.end_job(job.cp, outcome);
    }

    /// Tells of a CP. A fence that has come since its log was adopted stands before that: it is nobody's (R2).
    fn publish(
        &self,
        job: &Job,
        roots: Vec<(VolumeNumber, Root)>,
        log: Place,
    ) -> Result<(), LogError> {
        if let Some(roots) = job.lane.publish(job, roots, log) {
            self.store.reset(job.lane.source(), Some(job.last))?;
            let told = job.lane.publish(job, roots, job.last);
            assert!(told.is_none(), "nothing is behind it any more");
        }
        Ok(())
    }

    fn reject(&self, job: &Job, differs: Option<VolumeRoot>, reason: String) -> Outcome {
        tracing::warn!(source = %job.lane.name(), cp = %job.cp, reason, "CP refused");
        job.lane.ladder.rejected.fetch_add(1, Ordering::Relaxed);
        Outcome::Rejected { differs, reason }
    }

    /// What was mended of the images goes to new places with this CP. What cannot be written is
    /// found again.
    fn rewrite(
        &self,
        job: &Job,
        write_set: &mut WriteSet,
        bases: &BTreeMap<VolumeNumber, TreeRoot>,
        built: &mut BTreeMap<VolumeNumber, TreeRoot>,
    ) -> Result<Vec<VolumeKey>, Stop> {
        let mender = &self.shared.mender;
        let mut rewritten = Vec::new();
        for (&volume, base) in bases {
            let key = VolumeKey { source: job.lane.source(), volume };
            if !mender.has_waiting(key) {
                continue;
            }
            let tree = *built.get(&volume).unwrap_or(base);
            match mender.write(&self.pool, write_set, key, tree, job.cp) {
                Ok(root) => drop(built.insert(volume, root)),
                Err(error) => {
                    mender.forget(key);
                    return Err(error.into());
                }
            }
            rewritten.push(key);
        }
        Ok(rewritten)
    }

    /// The trees, the comparison, the commit. After an error the rest of the CP's frames is still
    /// taken, so that the answer comes when the source expects one.
    fn apply(&self, job: &Job) -> Result<Built, Stop> {
        let mut inputs = Inputs { job, store: &self.store, behind_last: false, ended: false };
        let result = self.build(&mut inputs);
        while result.is_err() && !inputs.ended {
            if let Input::Updates { payload, .. } = inputs.next() {
                job.lane.take_updates(payload.len());
            }
        }
        result
    }

    fn build(&self, inputs: &mut Inputs<'_>) -> Result<Built, Stop> {
        let job = inputs.job;
        let source = job.lane.source();
        let log = self.log_of(job)?;
        let mut bases: BTreeMap<VolumeNumber, TreeRoot> = self
            .pool
            .catalog()
            .volumes(source)?
            .into_iter()
            .filter(|row| job.agreed.contains_key(&row.key.volume))
            .map(|row| (row.key.volume, row.tree))
            .collect();
        if job.is_pass() {
            return self.pass(inputs, bases);
        }
        // Built on the image that is about to move on.
        work::give_up(&self.pool, source)?;
        let mut write_set = self.pool.begin(Budget::FREEING);
        self.bound(job, &mut write_set)?;
        for (&volume, base) in &mut bases {
            *base = job.grown(&self.pool, &mut write_set, volume, *base)?;
        }
        if job.build == Build::Replay {
            let built = self.replay(job, &mut write_set, &bases)?;
            return match inputs.next() {
                Input::Finish(end) => self.finish(job, write_set, &bases, built, &end),
                Input::Abort => Err(Stop::Aborted),
                Input::Updates { .. } | Input::Nodes(..) | Input::Blocks(..) => {
                    Err(rejected(&"data of a CP that is replayed"))
                }
            };
        }
        let mut built = BTreeMap::new();
        let mut input = inputs.next();
        loop {
            match input {
                Input::Abort => return Err(Stop::Aborted),
                Input::Finish(end) => return self.finish(job, write_set, &bases, built, &end),
                Input::Nodes(..) | Input::Blocks(..) => return Err(rejected(&OUT_OF_PLACE)),
                Input::Updates { volume, payload } => {
                    let base = base_of(&bases, volume, !built.contains_key(&volume))?;
                    let key = VolumeKey { source, volume };
                    let mut writer =
                        TreeWriter::new(&self.pool, &mut write_set, key, *base, job.cp)?;
                    let mut payload = payload;
                    input = loop {
                        put_runs(job, log.as_ref(), &mut writer, base, &payload)?;
                        job.lane.take_updates(payload.len());
                        match inputs.more(volume) {
                            Ok(more) => payload = more,
                            Err(other) => break other,
                        }
                    };
                    built.insert(volume, writer.finish()?);
                }
            }
        }
    }

    /// The source has no more of the pool than its file says.
    fn bound(&self, job: &Job, write_set: &mut WriteSet) -> Result<(), Stop> {
        let Some(limit) = self.shared.space_limit(job.lane.name()) else { return Ok(()) };
        Ok(write_set.bound(job.lane.source(), limit)?)
    }

    /// What a pass brings, or a comparison finds.
    fn pass(
        &self,
        inputs: &mut Inputs<'_>,
        mut bases: BTreeMap<VolumeNumber, TreeRoot>,
    ) -> Result<Built, Stop> {
        let job = inputs.job;
        if job.takes_behind()
            && let Err(error) = self.store.begin_behind(job.lane.source(), job.last, job.cp)
        {
            inputs.fails_behind(&error);
        }
        let mut work = Work::begin(&self.pool, job)?;
        self.bound(job, &mut work.set)?;
        for (&volume, base) in &mut bases {
            let tree = *work.trees.get(&volume).unwrap_or(base);
            let grown = job.grown(&self.pool, &mut work.set, volume, tree)?;
            if grown != tree {
                work.trees.insert(volume, grown);
            }
            if base.size != grown.size {
                *base = grown;
            }
        }
        let end = if job.compares() {
            compare::build(&self.pool, inputs, &mut work, &bases)?
        } else {
            pass::build(&self.pool, inputs, &mut work, &bases)?
        };
        let Work { set, trees } = work;
        inputs.write_behind();
        self.finish(job, set, &bases, trees, &end)
    }

    /// The log that the CP's references name; a pass has none, nor has a CP of nothing, which is made
    /// to write what was mended.
    fn log_of(&self, job: &Job) -> Result<Option<LogReader>, Stop> {
        if job.is_pass() || job.last == job.lane.cursors().applied {
            return Ok(None);
        }
        let source = job.lane.source();
        let log = self.store.reader(source, job.cp).map_err(unreadable)?;
        if log.last() != job.last {
            // What the source calls the end of the CP would become its published place.
            let (met, wanted) = (log.last().transfer, job.last.transfer);
            return Err(rejected(&format!("the CP's log ends at {met}, the source says {wanted}")));
        }
        Ok(Some(log))
    }

    /// The trees from the log itself, while the source builds its own.
    fn replay(
        &self,
        job: &Job,
        write_set: &mut WriteSet,
        bases: &BTreeMap<VolumeNumber, TreeRoot>,
    ) -> Result<BTreeMap<VolumeNumber, TreeRoot>, Stop> {
        let source = job.lane.source();
        let chain = Chain { store: &self.store, source, from: job.lane.cursors().applied };
        let replay = Replay::new(write_set, source, job.cp, bases.clone());
        let replay = replay.leaving_out(job.left_out.clone());
        let built = replay.run(&chain, job.last, |_| !job.is_aborted())?;
        job.lane.ladder.replayed.fetch_add(1, Ordering::Relaxed);
        Ok(built)
    }

    fn finish(
        &self,
        job: &Job,
        mut write_set: WriteSet,
        bases: &BTreeMap<VolumeNumber, TreeRoot>,
        mut built: BTreeMap<VolumeNumber, TreeRoot>,
        end: &CpEnd,
    ) -> Result<Built, Stop> {
        let mut roots = Vec::with_capacity(bases.len());
        for (&volume, base) in bases {
            let root = built.get(&volume).unwrap_or(base).root();
            let wanted = end.roots.iter().find(|wanted| wanted.volume == volume);
            if wanted.is_none_or(|wanted| wanted.root != root) {
                let differs = Some(VolumeRoot { volume, root });
                let reason = match wanted {
                    Some(wanted) => format!(
                        "root of volume {volume} is {root} here and {} at the source",
                        wanted.root
                    ),
                    None => format!("the source announced no root for volume {volume}"),
                };
                return Err(Stop::Rejected { differs, reason });
            }
            roots.push((volume, root));
        }
        if end.roots.len() != roots.len() {
            return Err(rejected(&"the source announced roots of volumes not agreed on"));
        }
        for (&volume, base) in bases {
            // It has grown, and nothing else.
            if write_set.has_tree(VolumeKey { source: job.lane.source(), volume }) {
                built.entry(volume).or_insert(*base);
            }
        }
        let rewritten = self.rewrite(job, &mut write_set, bases, &mut built)?;
        job.lane.built(job.cp);
        let since = phase_ended("build", job.begun);
        // Nobody else writes the row's extension from this look to the commit: a CP must not write
        // back an older promise of its source.
        let _row = job.lane.row();
        let row = self.pool.catalog().source(job.lane.source())?;
        let kept = row.map_or_else(|| Ok(Extension::default()), |row| Extension::of(&row));
        let mut kept = kept.map_err(Stop::Faulted)?;
        LeftOut::published(&mut kept.left_out, job.cp, |volume| job.agreed.contains_key(&volume));
        self.pool.publish(Publish {
            write_set,
            source: job.lane.source(),
            cp: job.cp,
            sequence: job.last.sequence,
            stream_hash: job.last.hash,
            epoch: job.epoch,
            generation: None,
            extension: Some(Extension { transfer: job.last.transfer, ..kept }.encode()),
            volumes: built.into_iter().collect(),
        })?;
        rewritten.into_iter().for_each(|key| self.shared.mender.written(key));
        let mut log = job.last;
        if job.sets_log() {
            // A cut before this leaves a log that ends before the image does: it is dropped at the
            // next start.
            log = self.set_log(job)?;
        }
        phase_ended("publish", since);
        metrics::histogram!(CHECKPOINT_DURATION_SECONDS.name).record(machine::elapsed(job.begun));
        Ok((roots, log))
    }

    /// The source's log goes on behind the pass, or with what came behind it.
    fn set_log(&self, job: &Job) -> Result<Place, Stop> {
        let source = job.lane.source();
        // Behind a fence nothing is taken (R2).
        let fenced = job.lane.cursors().fence.is_some();
        if fenced || !job.behind || !job.settle_behind(ADOPTED) {
            self.store.drop_behind(source);
        }
        let behind = self.store.behind_bytes(source);
        let set = self.store.adopt_behind(source, job.last);
        let log = set.map_err(|error| Stop::Faulted(format!("the source's log: {error}")))?;
        if log != job.last {
            job.lane.ladder.behind_joined_bytes.fetch_add(behind, Ordering::Relaxed);
        }
        Ok(log)
    }
}

/// The log of the CP cannot be opened. That there is none is the source's mistake; all else is
/// this hub's, and sending the CP again would not help.
fn unreadable(error: LogError) -> Stop {
    if matches!(error, LogError::NoLog { .. }) {
        return rejected(&error);
    }
    Stop::Faulted(error.to_string())
}

/// A reference was not found. A block that is damaged, or not there, can be sent inline (R15); a
/// medium that does not answer is this hub's.
fn unresolved(error: LogError) -> Stop {
    let of_the_source = matches!(error, LogError::NoBlock { .. } | LogError::NoLog { .. });
    if of_the_source || matches!(error, LogError::Corrupt { .. }) {
        return rejected(&error);
    }
    Stop::Faulted(error.to_string())
}

pub(super) const OUT_OF_PLACE: &str = "an answer came where nothing was asked";

pub(super) fn rejected(reason: &dyn std::fmt::Display) -> Stop {
    Stop::Rejected { differs: None, reason: reason.to_string() }
}

/// A job's inputs, and whether the last of them was taken.
pub(super) struct Inputs<'a> {
    pub(super) job: &'a Job,
    store: &'a LogStore,
    /// What is behind the pass had the last turn.
    behind_last: bool,
    ended: bool,
}

impl Inputs<'_> {
    pub(super) fn next(&mut self) -> Input {
        let input = loop {
            match self.job.next(!self.behind_last) {
                Some(input) => break input,
                None => self.write_behind(),
            }
            self.behind_last = true;
        };
        self.behind_last = false;
        self.ended = !matches!(input, Input::Updates { .. });
        input
    }

    /// Writes what has come behind the pass.
    fn write_behind(&self) {
        let (job, lane) = (self.job, &self.job.lane);
        if job.owes_drop() {
            // Its room is others' from now on.
            self.store.drop_behind(lane.source());
            job.behind_gone.store(true, Ordering::Relaxed);
        }
        let mut bytes = 0;
        while bytes < BEHIND_TURN_BYTES {
            // The lock is not held while it is written.
            let next = lane.aside().take();
            let Some(transfer) = next else { break };
            bytes += to_u64(transfer.bytes().len());
            if !job.takes_behind() {
                lane.aside().pass(&transfer);
                continue;
            }
            let (source, epoch) = (lane.source(), job.epoch);
            match self.store.append_behind(source, epoch, &transfer, WRITEBACK_BYTES) {
                Ok(_) => lane.wrote_aside(&transfer),
                Err(error) => self.fails_behind(&error),
            }
        }
    }

    /// The log is sent again behind the pass, or with the next one.
    fn fails_behind(&self, error: &LogError) {
        let lane = &self.job.lane;
        tracing::warn!(source = %lane.name(), %error, "what comes behind a pass is not kept");
        lane.failed_aside();
        if !self.job.settle_behind(OVER) {
            tracing::debug!(source = %lane.name(), "it was to become the log");
        }
    }

    /// The next updates of the same volume, or what comes instead.
    pub(super) fn more(&mut self, volume: VolumeNumber) -> Result<Bytes, Input> {
        match self.next() {
            Input::Updates { volume: next, payload } if next == volume => Ok(payload),
            other @ (Input::Updates { .. }
            | Input::Finish(_)
            | Input::Nodes(..)
            | Input::Blocks(..)
            | Input::Abort) => Err(other),
        }
    }
}

/// The tree on which the updates of a volume build. They come once, and of volumes agreed on.
pub(super) fn base_of(
    bases: &BTreeMap<VolumeNumber, TreeRoot>,
    volume: VolumeNumber,
    is_first: bool,
) -> Result<&TreeRoot, Stop> {
    let base = bases.get(&volume).filter(|_| is_first);
    base.ok_or_else(|| rejected(&format!("updates of volume {volume} are out of place")))
}

/// Puts the runs of one payload into the tree.
pub(super) fn put_runs(
    job: &Job,
    log: Option<&LogReader>,
    writer: &mut TreeWriter<'_>,
    base: &TreeRoot,
    payload: &[u8],
) -> Result<(), Stop> {
    let ladder = &job.lane.ladder;
    let mut runs = Decoder::new(payload, base.size.blocks().0);
    let mut counted = 0;
    while let Some(run) = runs.next() {
        // Whoever acknowledges may have been waiting for a core meanwhile.
        std::thread::yield_now();
        let bytes = runs.position() - counted;
        counted = runs.position();
        match run.map_err(|error| rejected(&error))? {
            Run::Hole { vbn, count } => {
                writer.put_hole_range(vbn, count)?;
                ladder.hole_blocks.fetch_add(count, Ordering::Relaxed);
                ladder.hole_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            Run::Inline { vbn, count, blocks } => {
                for (at, (_, block)) in (vbn.0..).zip(inline_blocks(blocks)) {
                    writer.put(Vbn(at), Content::Data(block))?;
                }
                ladder.inline_blocks.fetch_add(count, Ordering::Relaxed);
                ladder.inline_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            Run::Reference { vbn, count, transfer, ordinal } => {
                let log = log.ok_or_else(|| rejected(&"a reference in a pass"))?;
                let mut at = vbn.0;
                let mut failed = None;
                let read = log.run(transfer, ordinal, count, |_, block| {
                    if failed.is_none() {
                        failed = writer.put(Vbn(at), Content::Data(block)).err();
                    }
                    at += 1;
                });
                if let Some(error) = failed {
                    return Err(error.into());
                }
                read.map_err(unresolved)?;
                ladder.reference_blocks.fetch_add(count, Ordering::Relaxed);
                ladder.reference_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceError;
    use crate::units::ids::SourceId;
    use crate::units::numbers::TransferId;

    /// Few are served without a rest, and so is whoever has waited long; nobody is kept for long by what was
    /// slow before him.
    #[test]
    fn a_slot_rests_while_a_crowd_waits_and_none_of_it_for_long() {
        let (soon, took) = (Duration::from_millis(10), Duration::from_millis(3));
        assert_eq!(rest(took, CROWD - 1, soon), Duration::ZERO);
        assert_eq!(rest(took, CROWD, soon), 2 * took);
        assert_eq!(rest(Duration::from_secs(3600), 1000, soon), REST_MAX);
        assert_eq!(rest(took, 1000, LATE - took), took);
        assert_eq!(rest(took, 1000, LATE), Duration::ZERO);
        assert_eq!(rest(took, 1000, 2 * LATE), Duration::ZERO);
    }

    /// Three refusals stop a source for good: it is refused only for what it can mend itself.
    #[test]
    fn a_log_that_cannot_be_read_is_no_refusal() {
        let (file, what): (Arc<str>, Arc<str>) = ("f".into(), "w".into());
        let source_id = SourceId([1; 16]);
        let io = || {
            let error = Arc::new(std::io::Error::from_raw_os_error(5));
            LogError::Io { file: file.clone(), operation: "read", error }
        };
        let corrupt = LogError::Corrupt { file: file.clone(), offset: 0, what };
        let none = LogError::NoLog { source_id, cp: CpNumber(1) };
        let block = LogError::NoBlock { file: file.clone(), id: TransferId::NONE, ordinal: 0 };
        let is_fault = |stop: Stop| matches!(stop, Stop::Faulted(_));
        assert!(is_fault(unreadable(io())) && is_fault(unreadable(corrupt.clone())));
        assert!(!is_fault(unreadable(none.clone())));
        assert!(is_fault(unresolved(io())));
        // Sent inline, a block that is damaged in the log is right (R15).
        assert!(![corrupt, none, block].into_iter().any(|error| is_fault(unresolved(error))));
    }

    /// The fence makes an older epoch of a CP's: that is no refusal. Any other difference is one.
    #[test]
    fn only_a_raised_epoch_gives_a_cp_up() {
        let met = |named: (u32, u64), recorded: (u32, u64)| {
            let epoch = |(number, id)| Epoch { number, id };
            Stop::from(PoolError::Epoch { named: epoch(named), recorded: epoch(recorded) })
        };
        assert!(matches!(met((1, 5), (2, 6)), Stop::Aborted));
        assert!(matches!(met((2, 6), (1, 5)), Stop::Rejected { .. }));
        assert!(matches!(met((2, 6), (2, 7)), Stop::Rejected { .. }));
    }

    /// A write that fails is this hub's own fault; what cannot be read may be had elsewhere.
    #[test]
    fn only_a_failed_read_is_rot() {
        let of = |operation| {
            let error = Arc::new(std::io::Error::from_raw_os_error(5));
            let (device, offset, length) = ("d".into(), 0, 4096);
            let error = DeviceError::Io { device, operation, offset, length, error };
            Stop::from(VolumeError::Pool(PoolError::Device(error)))
        };
        assert!(matches!(of("write"), Stop::Faulted(_)));
        assert!(matches!(of("flush"), Stop::Faulted(_)));
        assert!(matches!(of("read"), Stop::Rot(_)));
    }
}
