//! A simulated source and hub around the two machines: stores with a durable prefix, a lossless
//! ordered link that can be cut at any frame, crashes of either end.
//!
//! Called by the searches in [`super::search`] and [`super::walk`], one [`Step`] at a time. Its
//! shells do what the real ones do, no more; [`super::laws`] judges the world after every step. A
//! rule can be switched off ([`Faults`]) to prove that the search would notice.

mod at_hub;
mod at_source;

use std::collections::{BTreeMap, VecDeque};

use super::super::mirror::{self, Arrived, Known, Mirror, Outcome};
use super::super::primary::{self, Answering, Held, Identity, Own, Primary};
use crate::record::entry::{Entry, EntryKind, extend_stream_hash};
use crate::record::marks::Place;
use crate::record::transfer::TransferHeader;
use crate::units::hash::{Root, StreamHash};
use crate::units::ids::{HubId, SourceId, VolumeId};
use crate::units::numbers::{
    ByteCount, CpNumber, Epoch, Generation, SequenceNumber, TransferId, VolumeNumber,
};
use crate::units::policy::{Mode, OnHubLoss, Policy};
use crate::wire::message::{CpEnd, Message, VolumeOffer};

/// Bytes of a transfer on the wire.
pub(super) const TRANSFER_BYTES: u64 = 100;
/// Bytes of a frame of Updates.
pub(super) const UPDATE_BYTES: u64 = 10;

/// Rules that are switched off: each must make the search find a violation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Faults {
    /// The hub takes a transfer for durable when it is received.
    pub ack_before_durable: bool,
    /// The source says Committed when it has frozen.
    pub end_before_commit: bool,
    /// The freeze is no record: a restart knows nothing of it.
    pub freeze_not_durable: bool,
    /// At Hello the hub takes what is queued for durable.
    pub welcome_before_durable: bool,
    /// Every transfer is made to follow the last one received.
    pub predecessor_unchecked: bool,
    /// What came is kept, also if the machine did not ask for it.
    pub late_transfer_kept: bool,
    /// Transfer ids are (1, counter since boot).
    pub generation_not_in_id: bool,
    /// A starting source serves before it was welcomed.
    pub serve_before_welcome: bool,
    /// Frames of an older session are taken when a newer one stands.
    pub session_not_flushed: bool,
    /// Labels mean nothing: a restarted hub does not count the CP numbers in its log as used, and a
    /// source does not cut again where they rise in what it adopts.
    pub labels_not_counted: bool,
    /// The hub drops a CP's log before its commit is durable.
    pub drop_before_publish: bool,
    /// Answers alone begin before the mark is durable.
    pub alone_before_mark: bool,
    /// The mark goes when the logs join.
    pub mark_cleared_early: bool,
    /// The hub does not say what its log names as durable at the source.
    pub rollback_unjudged: bool,
    /// A pass is begun from an image that is not this source's past.
    pub past_unchecked: bool,
    /// A pass drops all of the hub's log, also what was acknowledged behind its CP.
    pub pass_drops_log: bool,
    /// Hello names the wanted policy at once.
    pub policy_told_early: bool,
    /// Answers follow the wanted policy at once.
    pub policy_kept_early: bool,
    /// A restart forgets the policy that the hub may know already.
    pub next_policy_forgotten: bool,
    /// What came of a pass that was cut is taken for done, as a cursor would say.
    pub work_trusted: bool,
    /// What was offered for comparison is not pinned: the newest own CP answers.
    pub target_unpinned: bool,
    /// What came behind a pass counts as the log before the pass is published.
    pub behind_counts_early: bool,
    /// What came behind a pass that was not published is there when the next one is.
    pub behind_not_dropped: bool,
    /// Not a rule of the product: both speak the version before, and nothing is sent behind a pass.
    pub older_hub: bool,
    /// Not a rule of the product: births tell nothing, every pass is a comparison.
    pub base_unknown: bool,
    /// Not a rule of the product: only the stores are judged, not what the machines say, to show
    /// that a broken rule does harm.
    pub actions_unjudged: bool,
}

/// What may still happen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    pub writes: u32,
    pub cps: u32,
    /// One end loses the connection; the other notices later.
    pub cuts: u32,
    pub source_crashes: u32,
    pub hub_crashes: u32,
    /// With a crash of the source its last durable record is lost too.
    pub rots: u32,
    /// The applier refuses a CP for no good reason.
    pub rejects: u32,
    /// The pool is full for a moment.
    pub no_space: u32,
    /// The link loses a frame, which TCP never does.
    pub drops: u32,
    /// The link delivers a frame twice, which TCP never does.
    pub repeats: u32,
    /// The log credit changes.
    pub credits: u32,
    /// The hub counts as lost; with any the policy is `continue`.
    pub losses: u32,
    /// The file asks for the other policy.
    pub reloads: u32,
    /// The source is restored from a copy of before its first CP, which was started as often since.
    pub restores: u32,
}

/// A record of the source's ring.
#[derive(Debug, Clone, Copy)]
pub(super) enum Record {
    Transfer(Arrived),
    Freeze { cp: CpNumber, place: Place, policy: Option<Policy> },
}

/// A frame under way.
#[derive(Debug, Clone)]
pub(super) enum Frame {
    Message(Message),
    Transfer(Arrived),
    Refill(Arrived),
    Updates(Updates),
    Pulled(Pulled),
}

/// An answer to a comparison: half of the content `of` this place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pulled {
    pub cp: CpNumber,
    pub of: Place,
}

/// Answers that a comparison needs.
pub(super) const PARTS: usize = 2;

/// CP data: makes content `to` of content `base`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Updates {
    pub cp: CpNumber,
    pub base: Place,
    pub to: Place,
    pub inline: bool,
    /// Of a pass: against the image of the CP `base`, whatever the log holds.
    pub pass: bool,
}

/// One thing that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Write,
    SourceSync,
    Freeze,
    OwnCommit,
    SendData,
    SourceRelease,
    Retry,
    /// What the mark says is durable.
    NoteMark,
    SendPass,
    /// Writers wait for the CP's room.
    Press,
    /// Another policy follows where nothing was written behind the last cut.
    Promise,
    Connect,
    ToSource,
    SourceNotices,
    SourceRestart,
    ToHub,
    /// The first frame of a newer connection overtakes: two connections keep no order.
    ToHubOther,
    HubSync,
    Drain,
    Recorded,
    TakeUpdates,
    /// A comparison asks.
    Ask,
    EndApply,
    SendLog,
    /// What came behind the pass is written.
    WriteBehind,
    HubNotices,
    HubRestart,
    /// A frame that was lost is missed after a while.
    Timeout,
    // Faults, each with a budget.
    CutAtSource,
    CutAtHub,
    SourceCrash,
    SourceCrashAndRot,
    HubCrash,
    Reject,
    NoSpace,
    /// The hub has no room for what comes behind a pass.
    BehindOver,
    DropFrame,
    RepeatFrame,
    Credit,
    HubLost,
    Reload,
    Restore,
}

impl Step {
    /// Whether it takes something that may not come for ever.
    pub(super) fn is_fault(self) -> bool {
        use Step::*;
        matches!(
            self,
            CutAtSource
                | CutAtHub
                | SourceCrash
                | SourceCrashAndRot
                | HubCrash
                | Reject
                | NoSpace
                | BehindOver
                | DropFrame
                | RepeatFrame
                | Credit
                | HubLost
                | Reload
                | Restore
        )
    }
}

/// Frames of CP data still to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Sending {
    pub cp: CpNumber,
    pub inline: bool,
    pub left: u32,
    pub bytes: u64,
}

/// A CP the source has cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct FrozenCp {
    pub cp: CpNumber,
    pub place: Place,
    /// The policy that follows it.
    pub policy: Option<Policy>,
    pub told: bool,
    pub committed: bool,
}

/// A running source.
#[derive(Debug, Clone)]
pub(super) struct SourceUp {
    pub machine: Primary,
    pub connection: Option<u32>,
    pub serving: bool,
    pub halted: bool,
    pub counter: u64,
    /// CP number that new transfers carry.
    pub label: CpNumber,
    pub last: Place,
    pub released: Place,
    pub frozen: Option<FrozenCp>,
    pub hub_durable: Place,
    pub sending: Option<Sending>,
    /// CP data sent and taken on this connection, and how much may be under way.
    pub data: (u64, u64, u64),
    pub parked: bool,
    /// The mark that is being made durable.
    pub marking: Option<bool>,
    pub answering: Answering,
    pub pass: Option<PassOut>,
    /// What is offered for comparison.
    pub offered: Option<(CpNumber, Place)>,
    pub wants_freeze: bool,
    /// The policy of a freeze that the hub has not noted.
    pub next: Option<Policy>,
}

/// A pass being sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct PassOut {
    pub cp: CpNumber,
    pub base: Place,
    pub to: Place,
    pub sent: bool,
}

impl SourceUp {
    /// Whether something is written behind the last cut.
    fn is_open(&self) -> bool {
        self.last != self.frozen.as_ref().map_or(self.released, |frozen| frozen.place)
    }
}

/// The source.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub generation: u32,
    pub hub: Option<HubId>,
    pub epoch: Epoch,
    pub ring: Vec<Record>,
    pub durable: usize,
    pub released: Place,
    pub own: (CpNumber, Place),
    /// Own CP before `own`: what CP data is made against.
    pub base: Place,
    /// The durable mark: the hub may lack what was acknowledged.
    pub apart: bool,
    /// Durable: where it began to serve without having asked.
    pub unasked: Option<TransferId>,
    pub continues: bool,
    /// What the file asks for, what is in force durably, and what is kept durably to follow.
    pub wanted: Policy,
    pub policy: Policy,
    pub next: Option<Policy>,
    /// What a reload changes to and from `sync` with `stop`.
    pub alternate: Policy,
    pub up: Option<SourceUp>,
}

/// A CP with the applier.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub cp: CpNumber,
    pub last: Place,
    pub fed: Vec<Updates>,
    pub taken: usize,
    pub end: Option<CpEnd>,
    pub abort: bool,
    pub build: mirror::Build,
    /// The log behind its CP stays.
    pub keeps_log: bool,
    /// Of a comparison: which place's content each half has, and how many were asked for.
    pub parts: Vec<Place>,
    pub asked: usize,
}

impl Job {
    pub(super) fn compares(&self) -> bool {
        self.build == mirror::Build::Compare
    }

    /// Whether it may be published.
    fn is_whole(&self) -> bool {
        let all = if self.compares() { self.parts.len() >= PARTS } else { true };
        all && self.taken == self.fed.len() && self.end.is_some()
    }
}

/// A running hub.
#[derive(Debug, Clone)]
pub(super) struct HubUp {
    pub machine: Mirror,
    pub connection: Option<u32>,
    pub drained: usize,
    pub record: Option<(u32, Generation, Epoch, SourceId, Policy, bool)>,
    pub early: Vec<Updates>,
    pub job: Option<Job>,
    pub refill: Option<Place>,
    /// What came behind the pass under way, and how much of it is written.
    pub behind: Vec<Arrived>,
    pub behind_written: usize,
    pub log_credit: u64,
}

/// The hub.
#[derive(Debug, Clone)]
pub(super) struct Hub {
    pub generation: Generation,
    pub source: Option<SourceId>,
    pub epoch: Epoch,
    /// What it would go by after the source's loss: the policy, and whether it was alone.
    pub told: Option<(Policy, bool)>,
    pub image: (CpNumber, Place),
    /// What the image really holds.
    pub content: Place,
    pub log: Vec<Arrived>,
    pub durable: usize,
    /// What came of a pass that was cut: half of the content of that place (R19).
    pub work: Option<Place>,
    pub up: Option<HubUp>,
}

/// Both ends, the link, and what was promised to clients.
#[derive(Debug, Clone)]
pub(super) struct World {
    pub faults: Faults,
    pub budget: Budget,
    /// Frames of Updates of one CP, and the CP credit.
    pub shape: (u32, u64),
    pub source: Source,
    pub hub: Hub,
    pub to_hub: VecDeque<(u32, Frame)>,
    pub to_source: VecDeque<(u32, Frame)>,
    pub connections: u32,
    pub entries: u64,
    /// The last write a client was told is safe, and the last one told so under `sync`.
    pub acked: Place,
    pub acked_both: Place,
    /// Each place's predecessor on its line.
    pub parents: BTreeMap<StreamHash, Place>,
    /// Own CPs of the source.
    pub committed: BTreeMap<CpNumber, Place>,
    /// The source lost durable records and has not got them back.
    pub damaged: bool,
    /// The link broke its promise, so connections may be closed.
    pub link_lied: bool,
    /// The source was restored from an old copy: the CPs that it had made. What was acknowledged may
    /// be missing there from then on, and it may be refused.
    pub restored: Option<BTreeMap<CpNumber, Place>>,
    pub problem: Option<String>,
}

pub(super) fn source_id() -> SourceId {
    SourceId([1; 16])
}

pub(super) fn hub_id() -> HubId {
    HubId([2; 16])
}

pub(super) fn offers() -> Vec<VolumeOffer> {
    vec![VolumeOffer {
        number: VolumeNumber(0),
        id: VolumeId([3; 16]),
        name: "vol0".parse().unwrap(),
        size: ByteCount(1 << 20),
    }]
}

pub(super) fn generation(number: u32) -> Generation {
    Generation { number, id: u64::from(number) * 7 + 1 }
}

/// The root of a volume whose history ends at `place`.
pub(super) fn root_of(place: Place) -> Root {
    let mut root = [5; 32];
    root[..16].copy_from_slice(&place.hash.0);
    Root(root)
}

/// The transfer of one entry behind `last`; `content` tells it from every other write.
pub(super) fn transfer(last: Place, id: TransferId, cp: CpNumber, content: u64) -> Arrived {
    let entry = Entry {
        kind: EntryKind::Zeroes,
        volume: VolumeNumber(0),
        offset: content * 4096,
        length: 4096,
        crc: 0,
    };
    let first_sequence = last.sequence.next();
    let header = TransferHeader {
        id,
        cp,
        partition: u8::try_from(cp.0 % 2).unwrap(),
        first_sequence,
        previous: last.transfer,
        hash_before: last.hash,
        own_durable: TransferId::NONE,
    };
    let hash = extend_stream_hash(last.hash, first_sequence, &entry.encode());
    Arrived { header, place: Place { transfer: id, sequence: first_sequence, hash } }
}

/// `sync` with `stop`: the hub may say that nothing is lost.
fn stops() -> Policy {
    Policy { on_hub_loss: OnHubLoss::Stop, ..Policy::default() }
}

impl Source {
    fn new() -> Self {
        Self {
            generation: 0,
            hub: None,
            epoch: Epoch::default(),
            ring: Vec::new(),
            durable: 0,
            released: Place::default(),
            own: Default::default(),
            base: Place::default(),
            apart: false,
            unasked: None,
            continues: false,
            wanted: stops(),
            policy: stops(),
            next: None,
            alternate: Policy { mode: Mode::Async, ..stops() },
            up: None,
        }
    }

    /// The last transfer among the first `count` records, or what the own pool or the release
    /// mark holds.
    pub(super) fn last_of(&self, count: usize) -> Place {
        let ring = self.ring[..count].iter().rev().find_map(|record| match record {
            Record::Transfer(arrived) => Some(arrived.place),
            Record::Freeze { .. } => None,
        });
        let places = [Some(self.released), Some(self.own.1), ring];
        places.into_iter().flatten().max_by_key(|place| place.sequence).unwrap()
    }

    /// Whether it is to stop without its hub once it has been in step with it.
    pub(super) fn waits_to_stop(&self) -> bool {
        self.apart && self.policy.would_stop(&self.wanted)
    }

    /// Whether a freeze may change the policy: not before a hub was met, which is told what the start began with.
    pub(super) fn may_change(&self) -> bool {
        self.hub.is_some() && !self.waits_to_stop()
    }

    fn identity(&self) -> Identity {
        let on_hub_loss =
            if self.continues { OnHubLoss::Continue } else { self.policy.on_hub_loss };
        Identity {
            name: "filer-a".parse().unwrap(),
            source: source_id(),
            hub: self.hub,
            generation: generation(self.generation),
            epoch: self.epoch,
            volumes: offers(),
            policy: Policy { on_hub_loss, ..self.policy },
            alone: self.apart.then_some((self.epoch, SequenceNumber(1))),
            unasked: self.unasked,
        }
    }

    /// What lies behind the last cut is open, and goes on under its own label.
    fn label(
        &self,
        (frozen, held_after): (Option<&FrozenCp>, Place),
        machine: &Primary,
        faults: Faults,
    ) -> CpNumber {
        let cut = frozen.map_or(held_after, |frozen| frozen.place);
        let last = self.ring.iter().rev().find_map(|record| match record {
            Record::Transfer(arrived) => Some(arrived),
            Record::Freeze { .. } => None,
        });
        let open = last.filter(|open| open.place.sequence > cut.sequence);
        let open = open.filter(|_| !faults.labels_not_counted);
        open.map_or(machine.cp_max().next(), |open| open.header.cp)
    }

    /// Boots: what the ring and the pool hold decides what is under way.
    #[expect(clippy::too_many_lines, reason = "one list of what can happen")]
    fn restart(&mut self, faults: Faults) {
        self.generation += 1;
        if self.hub.is_none() {
            // No hub has heard of any.
            self.policy = self.wanted;
        }
        let mut freezes = self.ring.iter().rev().filter_map(|record| match record {
            Record::Freeze { cp, place, policy } => Some((*cp, *place, *policy)),
            Record::Transfer(_) => None,
        });
        let (freeze, before) = (freezes.next(), freezes.next());
        // No two are under way at once: the one before was done, and only its release was not durable.
        let done = before.map(|(_, place, _)| place);
        self.released = done.into_iter().fold(self.released, |released, done| {
            if done.sequence > released.sequence { done } else { released }
        });
        // A freeze is written only when the CP before it is done. A committed CP that is not known
        // to be released may not have reached the hub, whether its freeze can still be read or not.
        let (own_cp, own) = self.own;
        let (pending, held_after) = match freeze {
            Some((cp, place, policy)) if cp > own_cp => {
                self.next = self.next.or(policy);
                (Some((cp, place, false)), own)
            }
            _ if own.sequence > self.released.sequence => {
                // The plan is made again, of everything that was not released.
                self.base = self.released;
                (Some((own_cp, own, true)), self.released)
            }
            _ => (None, self.released),
        };
        let mut held: Vec<Held> = Vec::new();
        let mut last = held_after;
        for record in &self.ring {
            if let Record::Transfer(arrived) = record
                && arrived.place.sequence > held_after.sequence
            {
                held.push(Held { place: arrived.place, bytes: TRANSFER_BYTES });
                last = arrived.place;
            }
        }
        let mut held_after = held_after;
        if own.sequence > last.sequence {
            // The ring lost what the pool has: the pool's place is where the log begins.
            (held, held_after, last) = (Vec::new(), own, own);
        }
        let roots = vec![(VolumeNumber(0), root_of(own))];
        let mut machine = Primary::new(
            self.identity(),
            held_after,
            held,
            Own { cp: own_cp, roots, outgrown: false },
        );
        if faults.next_policy_forgotten {
            self.next = None;
        }
        // What the file asks for follows if nothing else does.
        let follows = self.wanted != self.policy && !self.waits_to_stop();
        self.next = self.next.or(follows.then_some(self.wanted));
        if let Some(next) = self.next {
            machine.step(primary::Event::Promised { next, behind: last.sequence });
        }
        let mut frozen = None;
        if let Some((cp, place, committed)) = pending {
            machine.step(primary::Event::Frozen { cp, place });
            if committed {
                let roots = vec![(VolumeNumber(0), root_of(place))];
                machine.step(primary::Event::Committed { cp, roots });
            }
            frozen = Some(FrozenCp { cp, place, policy: None, told: true, committed });
        }
        self.up = Some(SourceUp {
            label: self.label((frozen.as_ref(), held_after), &machine, faults),
            machine,
            connection: None,
            serving: faults.serve_before_welcome,
            halted: false,
            counter: 0,
            last,
            released: held_after,
            frozen,
            hub_durable: held_after,
            sending: None,
            data: (0, 0, 0),
            parked: false,
            marking: None,
            answering: Answering::Policy,
            pass: None,
            offered: None,
            wants_freeze: false,
            next: self.next,
        });
    }
}

impl Hub {
    fn new() -> Self {
        Self {
            generation: Generation::default(),
            source: None,
            epoch: Epoch::default(),
            told: None,
            image: Default::default(),
            content: Place::default(),
            log: Vec::new(),
            durable: 0,
            work: None,
            up: None,
        }
    }

    /// The last durable transfer.
    pub(super) fn last(&self) -> Place {
        let log = self.log[..self.durable].last().map(|arrived| arrived.place);
        log.filter(|place| place.sequence > self.image.1.sequence).unwrap_or(self.image.1)
    }

    /// The CPs of which the log holds entries, and where those of each end.
    fn ends(&self) -> Vec<(CpNumber, Place)> {
        let mut ends: BTreeMap<CpNumber, Place> = BTreeMap::new();
        for arrived in &self.log {
            ends.insert(arrived.header.cp, arrived.place);
        }
        ends.into_iter().collect()
    }

    fn restart(&mut self, faults: Faults, cp_credit: u64) {
        let applied_cp = self.image.0;
        self.log.retain(|arrived| arrived.header.cp > applied_cp);
        self.durable = self.log.len();
        // Transfers labelled n say that every number below n was used (R6).
        let labels = self.log.iter().map(|arrived| CpNumber(arrived.header.cp.0 - 1)).max();
        let labels = labels.filter(|_| !faults.labels_not_counted);
        let known = Known {
            hub: hub_id(),
            source: self.source,
            generation: self.generation,
            epoch: self.epoch,
            volumes: if self.source.is_some() { offers() } else { Vec::new() },
            pinned: Vec::new(),
            refused: Vec::new(),
            left_out: Vec::new(),
            applied_cp,
            applied: self.image.1,
            roots: Vec::new(),
            failed_over: false,
            cp_max: applied_cp.max(labels.unwrap_or_default()),
            policy: self.told.map(|told| told.0),
            alone: None,
            work: self.work.is_some(),
        };
        let log_credit = 3 * TRANSFER_BYTES;
        let mut machine = Mirror::new(known, self.last(), log_credit, cp_credit);
        if !faults.labels_not_counted {
            machine.holds(&self.ends());
        }
        let named = self.log.iter().map(|arrived| arrived.header.own_durable);
        machine.names(named.max().unwrap_or(TransferId::NONE));
        self.up = Some(HubUp {
            machine,
            connection: None,
            drained: self.durable,
            record: None,
            early: Vec::new(),
            job: None,
            refill: None,
            behind: Vec::new(),
            behind_written: 0,
            log_credit,
        });
    }

    /// What the applier finds: the CP's content, if the data joins the image and every reference
    /// is in the log.
    fn build(&self, job: &Job) -> Option<Place> {
        if job.compares() {
            let first = job.parts[0];
            return job.parts.iter().all(|part| *part == first).then_some(first);
        }
        if job.build == mirror::Build::Replay {
            let of_it = |arrived: &&Arrived| arrived.header.cp <= job.cp;
            return Some(self.log.iter().rfind(of_it).map_or(self.content, |t| t.place));
        }
        let mut content = self.content;
        for update in &job.fed {
            let found = |sequence| self.log.iter().any(|t| t.place.sequence.0 == sequence);
            // Blocks are named whole: an update may begin before the image, of what was not released, and says
            // that again inline.
            let from = update.base.sequence.max(self.content.sequence);
            let missing = || (from.0 + 1..=update.to.sequence.0).any(|n| !found(n));
            if from != self.content.sequence
                || !update.inline && missing()
                || update.pass != job.build.is_pass()
            {
                return None;
            }
            content = update.to;
        }
        Some(content)
    }
}

impl World {
    /// Both ends run for the first time and have not met.
    pub(super) fn new(faults: Faults, budget: Budget, shape: (u32, u64)) -> Self {
        let mut world = Self {
            faults,
            budget,
            shape,
            source: Source::new(),
            hub: Hub::new(),
            to_hub: VecDeque::new(),
            to_source: VecDeque::new(),
            connections: 0,
            entries: 0,
            acked: Place::default(),
            acked_both: Place::default(),
            parents: BTreeMap::new(),
            committed: BTreeMap::new(),
            damaged: false,
            link_lied: false,
            restored: None,
            problem: None,
        };
        world.source.continues = budget.losses > 0 && budget.reloads == 0;
        if budget.losses > 0 {
            world.source.alternate = Policy { on_hub_loss: OnHubLoss::Continue, ..stops() };
        }
        if faults.next_policy_forgotten {
            // From the weaker to the stronger: what is forgotten is what the hub goes by.
            world.source.policy = world.source.alternate;
            world.source.wanted = world.source.alternate;
        }
        world.source.restart(faults);
        world.hub.restart(faults, shape.1);
        world
    }

    pub(super) fn fail(&mut self, problem: impl Into<String>) {
        if self.problem.is_none() {
            self.problem = Some(problem.into());
        }
    }

    /// Everything that can happen next.
    pub(super) fn enabled(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        self.enabled_at_source(&mut steps);
        self.enabled_at_hub(&mut steps);
        let (up_s, up_h) = (&self.source.up, &self.hub.up);
        let mut fault = |left: u32, possible: bool, step: Step| {
            if left > 0 && possible {
                steps.push(step);
            }
        };
        let b = &self.budget;
        fault(b.cuts, up_s.as_ref().is_some_and(|up| up.connection.is_some()), Step::CutAtSource);
        fault(b.cuts, up_h.as_ref().is_some_and(|up| up.connection.is_some()), Step::CutAtHub);
        fault(b.source_crashes, up_s.is_some(), Step::SourceCrash);
        let rot = up_s.is_some() && self.source.durable > 0;
        fault(b.rots, rot, Step::SourceCrashAndRot);
        fault(b.hub_crashes, up_h.is_some(), Step::HubCrash);
        let job = up_h.as_ref().and_then(|up| up.job.as_ref());
        let refusable = job.is_some_and(|job| !job.abort);
        fault(b.rejects, refusable, Step::Reject);
        fault(b.no_space, refusable, Step::NoSpace);
        let behind = up_h.as_ref().is_some_and(|up| up.machine.is_behind());
        fault(b.no_space, behind, Step::BehindOver);
        let transfer = matches!(self.to_hub.front(), Some((_, Frame::Transfer(_))));
        fault(b.drops, transfer, Step::DropFrame);
        fault(b.repeats, transfer, Step::RepeatFrame);
        fault(b.credits, up_h.is_some(), Step::Credit);
        let away = up_s.as_ref().is_some_and(|up| up.connection.is_none() && up.marking.is_none());
        fault(b.losses, away, Step::HubLost);
        fault(b.reloads, up_s.is_some(), Step::Reload);
        fault(b.restores, up_s.is_some(), Step::Restore);
        if self.link_lied && self.is_stuck(&steps) {
            steps.push(Step::Timeout);
        }
        steps
    }

    /// Whether nothing goes on although the ends are not in step.
    pub(super) fn is_stuck(&self, steps: &[Step]) -> bool {
        let refused =
            self.restored.is_some() && self.source.up.as_ref().is_some_and(|up| up.halted);
        steps.iter().all(|step| step.is_fault())
            && !refused
            && !self.has_converged()
            && !self.lacks_credit()
    }

    /// The hub gives no credit, and the source knows that somebody waits for it, or has gone on
    /// without.
    pub(super) fn lacks_credit(&self) -> bool {
        let (Some(source), Some(hub)) = (&self.source.up, &self.hub.up) else { return false };
        let known = source.machine.waits_for_hub() || source.answering == Answering::Alone;
        hub.log_credit == 0 && source.machine.is_streaming() && known
    }

    fn enabled_at_source(&self, steps: &mut Vec<Step>) {
        let mut may = |possible: bool, step: Step| {
            if possible {
                steps.push(step);
            }
        };
        let source = &self.source;
        let Some(up) = &source.up else {
            return may(true, Step::SourceRestart);
        };
        may(up.serving && self.budget.writes > 0, Step::Write);
        may(source.durable < source.ring.len(), Step::SourceSync);
        let frozen_upto = up.released.sequence.max(source.own.1.sequence);
        let something = up.last.sequence > frozen_upto;
        // A policy changes at a freeze; of nothing none is made.
        let changes = source.wanted != source.policy && source.may_change();
        let due = up.next.is_none() && changes;
        let idle = up.serving && up.frozen.is_none() && !something;
        may(due && idle, Step::Promise);
        let wanted = self.budget.cps > 0 || up.wants_freeze || due;
        let something = something || up.wants_freeze;
        may(up.serving && wanted && up.frozen.is_none() && something, Step::Freeze);
        let commit = up.frozen.is_some_and(|cp| cp.told && !cp.committed);
        may(commit, Step::OwnCommit);
        let room = up.data.0 - up.data.1 + UPDATE_BYTES <= up.data.2;
        may(up.sending.is_some_and(|sending| sending.left == 0 || room), Step::SendData);
        may(source.released != up.released, Step::SourceRelease);
        may(up.parked, Step::Retry);
        may(up.marking.is_some(), Step::NoteMark);
        may(up.pass.is_some_and(|pass| pass.sent || room), Step::SendPass);
        let brought_up = up.machine.pass().is_some() || up.machine.backlog() > 0;
        let held = up.frozen.is_some_and(|cp| cp.committed) && brought_up;
        may(held && self.budget.writes > 0, Step::Press);
        let idle = up.connection.is_none() && !up.halted;
        may(idle && self.hub.up.is_some(), Step::Connect);
        may(!self.to_source.is_empty(), Step::ToSource);
        let hub_side = self.hub.up.as_ref().and_then(|hub| hub.connection);
        let greeting = self.to_hub.iter().any(|(number, _)| Some(*number) == up.connection);
        // A refusal that is on its way is heard.
        let refused = self.to_source.iter().any(|(number, _)| Some(*number) == up.connection);
        let dead = up.connection.is_some() && up.connection != hub_side && !greeting && !refused;
        may(dead, Step::SourceNotices);
    }

    fn enabled_at_hub(&self, steps: &mut Vec<Step>) {
        let mut may = |possible: bool, step: Step| {
            if possible {
                steps.push(step);
            }
        };
        let hub = &self.hub;
        let Some(up) = &hub.up else {
            return may(true, Step::HubRestart);
        };
        may(!self.to_hub.is_empty(), Step::ToHub);
        may(self.other_connection().is_some(), Step::ToHubOther);
        may(hub.durable < hub.log.len(), Step::HubSync);
        may(up.drained < hub.durable, Step::Drain);
        may(up.record.is_some(), Step::Recorded);
        if let Some(job) = &up.job {
            may(job.taken < job.fed.len(), Step::TakeUpdates);
            let asks = job.compares() && !job.abort && job.end.is_some();
            may(asks && job.parts.len().max(job.asked) < PARTS, Step::Ask);
            may(job.abort || job.is_whole(), Step::EndApply);
        }
        may(up.refill.is_some(), Step::SendLog);
        may(up.job.is_some() && up.behind_written < up.behind.len(), Step::WriteBehind);
        let source_side = self.source.up.as_ref().and_then(|source| source.connection);
        let dead = |number: u32| Some(number) != source_side;
        may(up.connection.is_some_and(dead), Step::HubNotices);
    }

    /// Lets `step` happen.
    pub(super) fn apply(&mut self, step: Step) {
        match step {
            Step::Write => self.write(),
            Step::SourceSync => self.source_sync(),
            Step::Freeze => self.freeze(),
            Step::OwnCommit => self.own_commit(),
            Step::SendData => self.send_data(),
            Step::SourceRelease => self.source_release(),
            Step::Retry => {
                self.source_up().parked = false;
                self.step_source(primary::Event::Retry, None);
            }
            Step::NoteMark => self.note_mark(),
            Step::SendPass => self.send_pass(),
            Step::Press => {
                let cp = self.source_up().frozen.unwrap().cp;
                self.step_source(primary::Event::Pressed(cp), None);
            }
            Step::Promise => self.promise(),
            Step::Connect => self.connect(),
            Step::ToSource => self.deliver_to_source(),
            Step::SourceNotices | Step::Timeout => self.lose_source_side(),
            Step::SourceRestart => self.source.restart(self.faults),
            Step::ToHub => self.deliver_to_hub(0),
            Step::ToHubOther => self.deliver_to_hub(self.other_connection().unwrap()),
            Step::HubSync => self.hub_sync(),
            Step::Drain => self.drain(),
            Step::Recorded => self.recorded(),
            Step::TakeUpdates => {
                let job = self.hub_up().job.as_mut().unwrap();
                job.taken += 1;
                self.step_hub(mirror::Event::UpdatesTaken(UPDATE_BYTES), None);
            }
            Step::Ask => self.ask(),
            Step::EndApply => self.end_apply(),
            Step::SendLog => self.send_log(),
            Step::WriteBehind => self.write_behind(),
            Step::HubNotices => self.lose_hub_side(),
            Step::HubRestart => self.hub.restart(self.faults, self.shape.1),
            Step::CutAtSource
            | Step::CutAtHub
            | Step::SourceCrash
            | Step::SourceCrashAndRot
            | Step::HubCrash
            | Step::Reject
            | Step::NoSpace
            | Step::BehindOver
            | Step::DropFrame
            | Step::RepeatFrame
            | Step::Credit
            | Step::HubLost
            | Step::Reload
            | Step::Restore => self.fault(step),
        }
        self.note_acknowledged();
        self.judge();
    }

    #[expect(clippy::too_many_lines, reason = "one list of what can happen")]
    fn fault(&mut self, step: Step) {
        let spend = |left: &mut u32| *left -= 1;
        match step {
            Step::CutAtSource => {
                spend(&mut self.budget.cuts);
                self.lose_source_side();
            }
            Step::CutAtHub => {
                spend(&mut self.budget.cuts);
                self.lose_hub_side();
            }
            Step::SourceCrash => {
                spend(&mut self.budget.source_crashes);
                self.crash_source();
            }
            Step::SourceCrashAndRot => {
                spend(&mut self.budget.rots);
                self.crash_source();
                self.source.ring.pop();
                self.source.durable = self.source.ring.len();
                self.damaged = true;
            }
            Step::HubCrash => {
                spend(&mut self.budget.hub_crashes);
                self.crash_hub();
            }
            Step::Reject => {
                spend(&mut self.budget.rejects);
                let reason = "a test refuses".to_owned();
                self.end_job(Outcome::Rejected { differs: None, reason });
            }
            Step::NoSpace => {
                spend(&mut self.budget.no_space);
                self.end_job(Outcome::NoSpace);
            }
            Step::BehindOver => {
                spend(&mut self.budget.no_space);
                self.step_hub(mirror::Event::BehindOver, None);
            }
            Step::DropFrame => {
                spend(&mut self.budget.drops);
                self.link_lied = true;
                self.to_hub.pop_front();
            }
            Step::RepeatFrame => {
                spend(&mut self.budget.repeats);
                self.link_lied = true;
                let frame = self.to_hub.front().unwrap().clone();
                self.to_hub.push_back(frame);
            }
            Step::Reload => {
                spend(&mut self.budget.reloads);
                let source = &mut self.source;
                let back = source.wanted == source.alternate;
                source.wanted = if back { stops() } else { source.alternate };
            }
            Step::Restore => {
                spend(&mut self.budget.restores);
                self.restore_source();
            }
            Step::HubLost => {
                spend(&mut self.budget.losses);
                self.step_source(primary::Event::HubLost, None);
            }
            _ => {
                spend(&mut self.budget.credits);
                let up = self.hub_up();
                up.log_credit = (up.log_credit + 3 * TRANSFER_BYTES) % (4 * TRANSFER_BYTES);
                let credit = up.log_credit;
                self.step_hub(mirror::Event::Credit(credit), None);
            }
        }
    }

    pub(super) fn source_up(&mut self) -> &mut SourceUp {
        self.source.up.as_mut().unwrap()
    }

    pub(super) fn hub_up(&mut self) -> &mut HubUp {
        self.hub.up.as_mut().unwrap()
    }

    fn crash_source(&mut self) {
        self.source.up = None;
        let durable = self.source.durable;
        self.source.ring.truncate(durable);
        self.to_source.clear();
    }

    /// All that it knows is who it is: its generation is newer than the hub's, so only its past tells.
    fn restore_source(&mut self) {
        self.crash_source();
        let (generation, hub, epoch) = (self.source.generation, self.source.hub, self.source.epoch);
        let (continues, alternate) = (self.source.continues, self.source.alternate);
        let new = Source::new();
        self.source = Source { generation, hub, epoch, continues, alternate, ..new };
        self.restored = Some(std::mem::take(&mut self.committed));
        self.damaged = true;
    }

    fn crash_hub(&mut self) {
        self.hub.up = None;
        let durable = self.hub.durable;
        self.hub.log.truncate(durable);
        self.to_hub.clear();
    }

    /// A client is told when both ends have its write durably (mode sync, ack durable).
    fn note_acknowledged(&mut self) {
        let Some(up) = &self.source.up else { return };
        let own = self.source.last_of(self.source.durable);
        let next = if self.faults.policy_kept_early { Some(self.source.wanted) } else { up.next };
        let kept = match next {
            Some(next) if self.faults.policy_kept_early => next,
            Some(next) => self.source.policy.strictest(&next),
            None => self.source.policy,
        };
        let both = match up.answering {
            Answering::Policy if kept.mode == Mode::Async => own,
            Answering::Policy if own.sequence < up.hub_durable.sequence => own,
            Answering::Policy => up.hub_durable,
            Answering::Alone => own,
            Answering::Held => return,
        };
        let in_sync = up.answering == Answering::Policy && kept.mode == Mode::Sync;
        // What was answered alone before is not answered again.
        if up.serving && in_sync && both.sequence > self.acked.sequence {
            self.acked_both = both;
        }
        if up.serving && both.sequence > self.acked.sequence {
            self.acked = both;
        }
        let whole = self.source.durable == self.source.ring.len();
        let restored = self.restored.is_some();
        if self.damaged && !restored && up.machine.is_streaming() && whole {
            self.damaged = false;
        }
    }

    /// Whether the history that ends at `tip` goes through `place`.
    pub(super) fn on_line(&self, place: Place, tip: Place) -> bool {
        let mut at = tip;
        while at.sequence > place.sequence {
            match self.parents.get(&at.hash) {
                Some(before) => at = *before,
                None => return false,
            }
        }
        at == place
    }

    /// Both ends are in step and nothing is under way.
    pub(super) fn has_converged(&self) -> bool {
        let (Some(source), Some(hub)) = (&self.source.up, &self.hub.up) else { return false };
        source.serving
            && source.machine.is_streaming()
            && hub.machine.is_joined()
            && source.frozen.is_none()
            && self.hub.last() == source.last
            && self.hub.image == self.source.own
            && source.hub_durable == source.last
            && !self.source.apart
            && self.source.policy == self.source.wanted
            && source.next.is_none()
            && self.hub.told == Some((self.told_policy(), false))
            && source.answering == Answering::Policy
            && hub.job.is_none()
            && self.source.released == self.source.own.1
    }

    /// What the hub must know of once both ends are in step.
    fn told_policy(&self) -> Policy {
        self.source.identity().policy
    }

    /// The sequence number clients were promised, for reports.
    pub(super) fn acknowledged(&self) -> SequenceNumber {
        self.acked.sequence
    }
}
