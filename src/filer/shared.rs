//! What the parts of a running source share: who it is, its stores, and the state of its parts.
//!
//! Made once by `recover`, then held by exports, feed, forwarder and checkpoint thread. Each part
//! has its own lock inside; none is held while another part is called, but for the order's, which
//! may look at the pins. Status is read without any of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, Semaphore, watch};

use super::beneath::Beneath;
use super::completion::{Completion, Gate, Refusal};
use super::counters::Counters;
use super::keeper::{Keeper, Kept};
use super::known::{Changing, Known, Watched};
use super::order::Order;
use super::outbox::Outbox;
use super::pass::Progress;
use super::pledge::Pledge;
use super::promise::Promise;
use super::signals::{CheckpointSignals, Roots, SessionSignals};
use crate::nvlog::Handle;
use crate::pool::error::PoolError;
use crate::pool::rows::SourceRow;
use crate::pool::{Pin, Pool};
use crate::session::primary::Answering;
use crate::units::convert::low_u32;
use crate::units::ids::{HubId, SourceId};
use crate::units::machine;
#[cfg(test)]
use crate::units::moment::Lock;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{ByteCount, CpNumber, Epoch, Generation, SequenceNumber, VolumeNumber};
use crate::units::policy::{self, AloneMark, OnHubLoss, Policy};
use crate::volume::mend::{Mender, Questions};
use crate::wire::homes::Adopt;
use crate::wire::message::{Refused, RefusedCode, Scanned, VolumeOffer, VolumeRefusal};

/// How things stand with the hub.
#[derive(Debug, Clone)]
pub enum LinkState {
    /// It runs without a hub: there is nobody to reach.
    Unlinked,
    /// Never welcomed since the start.
    Waiting { reason: String },
    /// In session.
    Connected { since: Instant },
    /// Was welcomed before.
    Offline { since: Instant, reason: String },
    /// No further try without an administrator.
    Halted(Refused),
}

/// Who is who, as far as the hub has a say.
#[derive(Debug, Clone, Copy, Default)]
pub struct Affiliation {
    /// The hub it belongs to.
    pub hub: Option<HubId>,
    /// The epoch in force.
    pub epoch: Epoch,
}

/// A CP that is published on both ends.
#[derive(Debug, Clone)]
pub struct Common {
    /// Its number.
    pub cp: CpNumber,
    /// Its roots.
    pub roots: Roots,
    /// Keeps it readable here.
    pub pins: Arc<BTreeMap<VolumeNumber, Arc<Pin>>>,
}

/// Pins of all volumes at one own CP.
pub type Pins = Arc<BTreeMap<VolumeNumber, Arc<Pin>>>;

/// What the parts of a source share.
#[derive(Debug)]
pub struct Shared {
    /// Its name.
    pub name: SourceName,
    /// Its id.
    pub source: SourceId,
    /// This boot.
    pub generation: Generation,
    /// Its volumes.
    pub volumes: ArcSwap<Vec<VolumeOffer>>,
    /// The volumes as the hub has noted them, once it was met.
    pub(super) told: ArcSwap<Vec<VolumeOffer>>,
    /// Sizes that the file asks for.
    pub(super) wanted: Mutex<Vec<(VolumeName, ByteCount)>>,
    /// What it promises.
    pub pledge: Pledge,
    /// Its pool.
    pub pool: Arc<Pool>,
    /// How its bytes in its row of the pool are read and written.
    pub keeper: Arc<dyn Keeper>,
    /// Its room in the pool, which others may write to as well.
    pub promise: Arc<Promise>,
    /// It runs without a hub: what is durable here is answered, and an own CP is complete.
    pub sole: bool,
    /// The one order.
    pub order: Order,
    /// Answers to clients.
    pub completion: Completion,
    /// The transfer table.
    pub outbox: Outbox,
    /// Word for the checkpoint thread.
    pub checkpoint: CheckpointSignals,
    /// Word for the forwarder.
    pub session: SessionSignals,
    /// What was counted.
    pub counters: Counters,
    /// CPs that were done alone and that the hub builds from its log.
    pub backlog: AtomicUsize,
    /// The hub's image is being brought up, or is about to be.
    pub brings_up: AtomicBool,
    /// Set when the ring is started.
    pub ring: Arc<OnceLock<Handle>>,
    /// The newest CP that both ends have published; `None` before it is known.
    pub common: watch::Sender<Option<Common>>,
    /// Whether clients may be served.
    pub serving: watch::Sender<bool>,
    /// What rotted here.
    pub mender: Mender,
    /// Places that the hub is asked for.
    pub questions: Questions,
    /// Questions of the hub that are being answered.
    pub serving_places: Arc<Semaphore>,
    /// The newest answer of the hub to a scan.
    pub scans: watch::Sender<Option<Scanned>>,
    /// A verification is under way.
    pub scanning: AtomicBool,
    /// A scan that the hub asked for is under way.
    pub answering: AtomicBool,
    /// When it was started.
    pub started: Instant,
    /// When the newest heartbeat left that the hub has answered: from then on for `hub_timeout`
    /// nobody can have been promoted under `stop` (R12). `None` before the first.
    pub lease: watch::Sender<Option<Instant>>,
    /// The newest question of the hub whether another source can live here; kept by the engines that
    /// follow each other.
    pub offers: Arc<watch::Sender<Option<Adopt>>>,
    /// Who reads, changes and writes the row's extension does so alone: a CP must not write back
    /// what a mark has replaced meanwhile.
    pub keeping: Mutex<()>,
    /// Who moves the gate of the answers does so alone.
    pub gating: Mutex<()>,
    /// Rung when what lies beneath is in a tree.
    pub grounded: Notify,
    pub(super) state: Watched,
    /// The newest CP that both ends have published, for status: one more than its number.
    pub(super) common_cp: AtomicU64,
    /// Whether clients may be served, for whoever does not wait for it.
    pub(super) is_serving: AtomicBool,
}

/// A pass that brings the hub's image up.
#[derive(Debug, Clone)]
pub struct PassStatus {
    /// To this CP.
    pub cp: CpNumber,
    /// From this one.
    pub base: CpNumber,
    /// Since when.
    pub since: Instant,
    /// How far the own trees were walked.
    pub progress: Arc<Progress>,
}

impl Shared {
    /// Its volumes, each of the size that the hub is told.
    pub fn volumes(&self) -> Arc<Vec<VolumeOffer>> {
        self.volumes.load_full()
    }

    /// Sizes that the file asks for.
    pub fn wanted_sizes(&self) -> Vec<(VolumeName, ByteCount)> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The file asks for these sizes from now on.
    pub fn want_sizes(&self, sizes: Vec<(VolumeName, ByteCount)>) {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = sizes;
        self.checkpoint.look_again();
    }

    /// The size of a volume as its newest own CP has it.
    pub fn own_size(&self, volume: &VolumeOffer) -> ByteCount {
        self.known().own_sizes.get(&volume.number).copied().unwrap_or(volume.size)
    }

    /// What clients may use of a volume: what its newest own CP has, and under `stop` no more than
    /// what the hub has noted, so that no failover makes it smaller.
    pub fn size_of(&self, volume: &VolumeOffer) -> ByteCount {
        let own = self.own_size(volume);
        if self.sole || self.pledge.kept().on_hub_loss == OnHubLoss::Continue {
            return own;
        }
        let told = self.told.load();
        let told = told.iter().find(|told| told.number == volume.number);
        told.map_or(own, |told| told.size.min(own))
    }

    /// Every lock that the data path of this source takes: order, transfer table, answers, small things.
    #[cfg(test)]
    fn locks(&self) -> [&dyn Lock; 4] {
        let Self { order, outbox, completion, state, .. } = self;
        [order.own_lock(), outbox.own_lock(), completion.own_lock(), state]
    }

    /// Does something while they are held.
    #[cfg(test)]
    pub(crate) fn with_locks_held<T>(&self, work: impl FnOnce() -> T) -> T {
        let _held = self.locks().map(Lock::hold);
        work()
    }

    /// Whether each of them is free.
    #[cfg(test)]
    pub(crate) fn free_locks(&self) -> [bool; 4] {
        self.locks().map(Lock::is_free)
    }

    /// Hub and epoch.
    pub fn affiliation(&self) -> Affiliation {
        self.known().affiliation
    }

    /// The epoch in force.
    pub fn epoch(&self) -> Epoch {
        self.affiliation().epoch
    }

    /// The ring, once it was started.
    pub fn ring(&self) -> Option<&Handle> {
        self.ring.get()
    }

    /// Pins of the newest own CP.
    pub fn pins(&self) -> Pins {
        Arc::clone(&self.lock().pins)
    }

    /// The newest own CP and its roots.
    pub fn own(&self) -> (CpNumber, Roots) {
        let known = self.known();
        (known.own_cp, known.own_roots.clone())
    }

    /// A newer own CP is durable; what was pinned before may go when its readers are done.
    pub fn set_own(&self, cp: CpNumber, roots: Roots, pins: Pins) {
        let before = self.lock().pin(cp, roots, pins);
        // A pin goes back to the pool, which takes its own lock.
        drop(before);
    }

    /// What a reader finds below the buffers, taken at one moment.
    pub fn below(&self, volume: VolumeNumber) -> (Option<Arc<Pin>>, Option<Arc<dyn Beneath>>) {
        let state = self.lock();
        let beneath = state.ground.as_ref().map(|ground| Arc::clone(&ground.beneath));
        (state.pins.get(&volume).cloned(), beneath)
    }

    /// Whether a log lies beneath that is not in a tree yet: no CP of this engine begins.
    pub fn is_grounded(&self) -> bool {
        self.lock().ground.is_some()
    }

    /// The ground is published as its CP: what was pinned and what lay over it go in one step.
    pub fn settle(&self, roots: Roots, pins: Pins) {
        let mut state = self.lock();
        let Some(ground) = state.ground.take() else { return };
        let before = state.pin(ground.cp, roots, pins);
        drop(state);
        drop((before, ground));
        self.grounded.notify_waiters();
        // The checkpoint thread waits for it.
        self.checkpoint.serving();
    }

    /// How things stand with the hub.
    pub fn link(&self) -> LinkState {
        self.known().link.clone()
    }

    /// Whether the hub takes transfers now.
    pub fn is_connected(&self) -> bool {
        matches!(self.link(), LinkState::Connected { .. })
    }

    /// Notes how things stand with the hub.
    pub fn set_link(&self, link: LinkState) {
        self.lock().known.link = link;
    }

    /// Why the hub refused the CP that is tried again.
    pub fn rejected(&self) -> Option<String> {
        self.known().rejected.clone()
    }

    /// The hub refused a CP, or published one.
    pub fn set_rejected(&self, reason: Option<String>) {
        let mut state = self.lock();
        let known = &mut state.known;
        (known.rejected, known.lacks_hub_room) = (reason, false);
    }

    /// The hub refused a CP because its pool is full: stays until one is published (R18).
    pub fn set_no_hub_room(&self, reason: String) {
        let mut state = self.lock();
        let known = &mut state.known;
        (known.rejected, known.lacks_hub_room) = (Some(reason), true);
    }

    /// The hub gets on with nothing, though it answers: it counts as lost, or is waited out.
    pub fn set_slow(&self, reason: String, sequence: SequenceNumber, done: CpNumber) {
        self.lock().known.slow = Some((reason, (sequence, done)));
    }

    /// The hub is that far: got on, it is not slow any more.
    pub fn hub_reached(&self, sequence: SequenceNumber, done: CpNumber) {
        let mut state = self.lock();
        // Called all the while: nothing is shown anew unless there is something to take back.
        if state.known.slow.is_some() {
            state.known.slow.take_if(|(_, before)| sequence > before.0 || done > before.1);
        }
    }

    /// Why the hub counted as lost, or is waited for, although it answers; until it gets on with
    /// something.
    pub fn slow(&self) -> Option<String> {
        self.known().slow.as_ref().map(|(reason, _)| reason.clone())
    }

    /// Whether the hub has no room for the CP that is tried again.
    pub fn lacks_hub_room(&self) -> bool {
        self.known().lacks_hub_room
    }

    /// The newest CP that the hub has refused for good, and why.
    pub fn faulted(&self) -> Option<(CpNumber, String)> {
        self.known().faulted.clone()
    }

    /// The hub refused also a comparison, or published a CP.
    pub fn set_faulted(&self, refused: Option<(CpNumber, String)>) {
        self.lock().known.faulted = refused;
    }

    /// How the hub was set back behind what it had acknowledged, if it was since the start (R7).
    pub fn set_back(&self) -> Option<String> {
        self.known().set_back.clone()
    }

    /// The hub has less than it had acknowledged as durable.
    pub fn note_set_back(&self, what: String) {
        self.lock().known.set_back = Some(what);
    }

    /// Volumes that the hub leaves out, as it said last (R20).
    pub fn refused(&self) -> Vec<VolumeRefusal> {
        self.known().refused.clone()
    }

    /// The hub has said what it leaves out.
    pub fn set_refused(&self, refused: Vec<VolumeRefusal>) {
        self.lock().known.refused = refused;
    }

    /// Numbers of the volumes that the hub leaves out.
    pub fn left_out(&self) -> BTreeSet<VolumeNumber> {
        self.known().refused.iter().map(|refusal| refusal.volume).collect()
    }

    /// Why a volume is not served while others are: the hub leaves it out, and under `stop` nothing
    /// is served that it does not hold.
    pub fn not_served(&self, volume: VolumeNumber) -> Option<String> {
        if self.pledge.kept().on_hub_loss == OnHubLoss::Continue {
            return None;
        }
        let known = self.known();
        let refusal = known.refused.iter().find(|refusal| refusal.volume == volume)?;
        Some(format!("the hub does not mirror this volume: {}", refusal.reason))
    }

    /// Those of these roots that the hub has as well.
    pub fn agreed(&self, roots: &Roots) -> Roots {
        let left_out = self.left_out();
        roots.iter().filter(|(volume, _)| !left_out.contains(volume)).copied().collect()
    }

    /// The session says how far writes are answered.
    pub fn answer(&self, answering: Answering) {
        self.set_gate(|before| *before = answering);
    }

    /// What is kept to has changed: the gate is another, how far writes are answered is as it was.
    fn answer_again(&self) {
        self.set_gate(|_| ());
    }

    /// The session says how far, the committing thread what is kept to: one at a time, so that the gate
    /// is never of what the other one has left.
    fn set_gate(&self, change: impl FnOnce(&mut Answering)) {
        let _one = self.gating.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.lock();
        if state.known.fenced.is_some() {
            return;
        }
        change(&mut state.known.answering);
        let answering = state.known.answering;
        drop(state);
        self.completion.set_gate(match answering {
            Answering::Policy => Gate::of(&self.pledge.kept()),
            Answering::Alone => Gate::Own,
            Answering::Held => Gate::Held,
        });
    }

    /// Whether another policy waits for its freeze.
    pub fn policy_is_due(&self) -> bool {
        self.pledge.is_due() && self.may_change()
    }

    /// Whether a freeze may change the policy. Not before the first hub is this source's: what it is told
    /// then is what this start began with.
    fn may_change(&self) -> bool {
        self.affiliation().hub.is_some() && !self.waits_to_stop()
    }

    /// Whether it is to stop without its hub once it has been in step with it for the first time (R4).
    pub fn waits_to_stop(&self) -> bool {
        self.pledge.would_stop() && self.mark().is_some_and(policy::never_in_step)
    }

    /// The policy that a freeze carries, if another one follows. Called before anything behind the
    /// freeze is durable, and so before it is answered: both promises are kept from here on.
    pub fn promise_at_freeze(&self) -> Option<Policy> {
        if self.may_change() { self.promise() } else { None }
    }

    /// Both promises are kept when this returns the one that follows.
    pub fn promise(&self) -> Option<Policy> {
        let policy = self.pledge.freeze().filter(|_| !self.sole)?;
        tracing::info!(source = %self.name, mode = %policy.mode, on_hub_loss = %policy.on_hub_loss,
            "another policy follows");
        self.answer_again();
        Some(policy)
    }

    /// The hub has noted the policy; durable here when this returns. May block.
    pub fn put_in_force(&self, policy: Policy) -> Result<(), PoolError> {
        self.note(move |kept| (kept.policy, kept.next) = (Some(policy), None))?;
        self.pledge.noted(policy);
        tracing::info!(source = %self.name, mode = %policy.mode, on_hub_loss = %policy.on_hub_loss,
            "the policy is in force");
        self.answer_again();
        Ok(())
    }

    /// Clients may be served, or may not be any more.
    pub fn serve(&self, serving: bool) {
        self.serving.send_modify(|told| {
            *told = serving;
            self.is_serving.store(serving, Ordering::Release);
        });
    }

    /// Whether clients may be served; never waits.
    pub fn is_serving(&self) -> bool {
        self.is_serving.load(Ordering::Acquire)
    }

    /// Both ends have published a newer CP.
    pub fn set_common(&self, common: Common) {
        let shown = u64::from(common.cp.0) + 1;
        self.common.send_modify(|told| {
            *told = Some(common);
            self.common_cp.store(shown, Ordering::Release);
        });
    }

    /// The newest CP that both ends have published; never waits.
    pub fn common_cp(&self) -> Option<CpNumber> {
        let told = self.common_cp.load(Ordering::Acquire).checked_sub(1)?;
        Some(CpNumber(low_u32(told)))
    }

    /// How far writes are answered.
    pub fn answering(&self) -> Answering {
        self.known().answering
    }

    /// The durable mark of writes acknowledged without the hub (R4).
    pub fn mark(&self) -> Option<AloneMark> {
        self.known().mark
    }

    /// Whether the hub, although it is there, lacks what was acknowledged, as far as this end knows: from before
    /// the link counts as connected on.
    pub fn is_coming_back(&self) -> bool {
        self.mark().is_some() || self.brings_up.load(Ordering::Relaxed)
    }

    /// How long the mark is known here to stand.
    pub fn marked_for(&self) -> Option<Duration> {
        let known = self.known();
        known.mark.map(|_| machine::elapsed(known.marked_at))
    }

    /// Whether the mark stood before this start: how much was acknowledged alone until then is not
    /// known.
    pub fn mark_was_found(&self) -> bool {
        self.known().mark_was_found
    }

    /// Whether a read may be answered: under `stop` only as long as nobody can have taken over,
    /// by this end's own clock, whatever this end has slept through meanwhile.
    pub fn may_answer_reads(&self) -> bool {
        let lease = *self.lease.borrow();
        let policy = self.pledge.kept();
        policy.on_hub_loss == OnHubLoss::Continue
            || self.sole
            || lease.is_none_or(|since| machine::elapsed(since) <= policy.hub_timeout)
    }

    /// The epoch in which somebody else is primary (R12).
    pub fn fenced(&self) -> Option<Epoch> {
        self.known().fenced
    }

    /// The hub knows its name with another id, and it has nothing of its own: it never had a hub,
    /// served nobody and ordered nothing. It may become that source (R14).
    pub fn is_newcomer(&self) -> bool {
        let known = self.known();
        let other =
            matches!(&known.link, LinkState::Halted(why) if why.code == RefusedCode::OtherSource);
        let unmet = known.affiliation.hub.is_none() && known.mark.is_none();
        let nothing = known.own_cp == CpNumber(0) && known.failed.is_none();
        other
            && unmet
            && nothing
            && !self.is_serving()
            && self.order.figures().sequence == SequenceNumber(0)
    }

    /// The id of the pool's owner: the filer that this source lives on.
    pub fn filer(&self) -> SourceId {
        SourceId(self.pool.owner())
    }

    /// Nobody is served any more: somebody else is primary.
    pub fn fence(&self, epoch: Epoch) {
        self.lock().known.fenced = Some(epoch);
        let refusal = Refusal::Fenced(epoch.number);
        self.order.refuse(refusal.clone());
        self.completion.refuse(refusal);
        self.serve(false);
    }

    /// A pass begins.
    pub fn begin_pass(&self, cp: CpNumber, base: CpNumber) -> Arc<Progress> {
        let progress = Arc::<Progress>::default();
        let since = machine::now();
        let pass = PassStatus { cp, base, since, progress: Arc::clone(&progress) };
        self.lock().known.pass = Some(pass);
        progress
    }

    /// No pass is under way.
    pub fn end_pass(&self) {
        self.lock().known.pass = None;
    }

    /// The pass under way.
    pub fn pass(&self) -> Option<PassStatus> {
        self.known().pass.clone()
    }

    /// Changes what the source keeps about itself; durable when this returns. May block.
    pub fn note(&self, change: impl FnOnce(&mut Kept)) -> Result<(), PoolError> {
        let _one = self.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        let (row, mut kept) = self.kept()?;
        change(&mut kept);
        let bytes = self.keep(&row, &kept)?;
        self.pool.catalog().update_source(self.source, move |row| row.extension = bytes)?;
        let mut state = self.lock();
        let known = &mut state.known;
        if known.mark.is_none() && kept.alone.is_some() {
            known.marked_at = machine::now();
        }
        known.mark = kept.alone;
        known.mark_was_found &= kept.alone.is_some();
        Ok(())
    }

    /// Hub and epoch of the session; durable when this returns. May block.
    pub fn join(&self, hub: HubId, epoch: Epoch) -> Result<(), PoolError> {
        let _one = self.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        let (row, kept) = self.kept()?;
        let policy = Some(kept.policy.unwrap_or(self.pledge.in_force()));
        let bytes = self.keep(&row, &Kept { hub: Some(hub), policy, ..kept })?;
        self.pool.catalog().update_source(self.source, move |row| {
            row.epoch = epoch;
            row.extension = bytes;
        })?;
        self.lock().known.affiliation = Affiliation { hub: Some(hub), epoch };
        Ok(())
    }

    /// The row, and what it says; whoever writes it back holds `keeping`.
    pub(super) fn kept(&self) -> Result<(SourceRow, Kept), PoolError> {
        let unknown = PoolError::UnknownSource { source_id: self.source };
        let row = self.pool.catalog().source(self.source)?.ok_or(unknown)?;
        let kept = self.keeper.read(&row);
        let kept = kept.map_err(|error| PoolError::Inconsistent { what: error.to_string() })?;
        Ok((row, kept))
    }

    /// The extension of `row` that says `kept`.
    pub(super) fn keep(&self, row: &SourceRow, kept: &Kept) -> Result<Vec<u8>, PoolError> {
        let bytes = self.keeper.write(row, kept);
        bytes.map_err(|error| PoolError::Inconsistent { what: error.to_string() })
    }

    /// A store failed: nothing is ordered or acknowledged any more (R17). The first reason stays.
    pub fn fail(&self, reason: &str) {
        let reason: Arc<str> = reason.into();
        let first = {
            let mut state = self.lock();
            Arc::clone(state.known.failed.get_or_insert_with(|| Arc::clone(&reason)))
        };
        tracing::error!(source = %self.name, %reason, "the source has failed");
        self.order.refuse(Refusal::Failed(Arc::clone(&first)));
        self.completion.refuse(Refusal::Failed(first));
    }

    /// Fails the source if the holder's thread or task unwinds: clients get an error instead of
    /// waiting for somebody who is gone.
    pub fn fail_on_panic(self: &Arc<Self>, what: &'static str) -> FailOnPanic {
        FailOnPanic { shared: Arc::clone(self), what }
    }

    /// Whether the first failure was a fault of this program.
    pub fn has_panicked(&self) -> bool {
        self.known().panicked
    }

    /// Why nothing is acknowledged any more.
    pub fn failed(&self) -> Option<Arc<str>> {
        self.known().failed.clone()
    }

    /// What is known; never waits for the lock.
    pub(super) fn known(&self) -> Arc<Known> {
        self.state.shown().load()
    }

    pub(super) fn lock(&self) -> Changing<'_> {
        self.state.lock()
    }
}

/// See [`Shared::fail_on_panic`].
#[derive(Debug)]
#[must_use = "it is held as long as the thread or task runs"]
pub struct FailOnPanic {
    shared: Arc<Shared>,
    what: &'static str,
}

impl Drop for FailOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut state = self.shared.lock();
            let known = &mut state.known;
            known.panicked |= known.failed.is_none();
            drop(state);
            self.shared.fail(self.what);
        }
    }
}

/// Shortest and longest pause before the next try to reach the hub.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// The first pause.
    pub least: Duration,
    /// The longest.
    pub most: Duration,
}
