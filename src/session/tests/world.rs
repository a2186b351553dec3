//! A simulated source and hub around the two machines: stores with a durable prefix, a lossless
//! ordered link that can be cut at any frame, crashes of either end.
//!
//! Called by the searches in [`super::search`] and [`super::walk`], one [`Step`] at a time. Its
//! shells do what the real ones do, no more; [`super::laws`] judges the world after every step. A
//! rule can be switched off ([`Faults`]) to prove that the search would notice.

use std::collections::{BTreeMap, VecDeque};

use super::super::mirror::{self, Arrived, Known, Mirror, Outcome};
use super::super::primary::{self, Held, Identity, Primary};
use crate::record::entry::{Entry, EntryKind, extend_stream_hash};
use crate::record::marks::Place;
use crate::record::transfer::TransferHeader;
use crate::units::hash::{Root, StreamHash};
use crate::units::ids::{HubId, SourceId, VolumeId};
use crate::units::numbers::{
    ByteCount, CpNumber, Epoch, Generation, SequenceNumber, TransferId, VolumeNumber,
};
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
    /// A restarted hub does not count the CP numbers in its log as used.
    pub labels_not_counted: bool,
    /// The hub drops a CP's log before its commit is durable.
    pub drop_before_publish: bool,
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
}

/// A record of the source's ring.
#[derive(Debug, Clone, Copy)]
pub(super) enum Record {
    Transfer(Arrived),
    Freeze { cp: CpNumber, place: Place },
}

/// A frame under way.
#[derive(Debug, Clone)]
pub(super) enum Frame {
    Message(Message),
    Transfer(Arrived),
    Refill(Arrived),
    Updates(Updates),
}

/// CP data: makes content `to` of content `base`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Updates {
    pub cp: CpNumber,
    pub base: Place,
    pub to: Place,
    pub inline: bool,
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
    EndApply,
    SendLog,
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
    DropFrame,
    RepeatFrame,
    Credit,
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
                | DropFrame
                | RepeatFrame
                | Credit
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
}

/// A running hub.
#[derive(Debug, Clone)]
pub(super) struct HubUp {
    pub machine: Mirror,
    pub connection: Option<u32>,
    pub drained: usize,
    pub record: Option<(u32, Generation, Epoch, SourceId)>,
    pub early: Vec<Updates>,
    pub job: Option<Job>,
    pub refill: Option<Place>,
    pub log_credit: u64,
}

/// The hub.
#[derive(Debug, Clone)]
pub(super) struct Hub {
    pub generation: Generation,
    pub source: Option<SourceId>,
    pub epoch: Epoch,
    pub image: (CpNumber, Place),
    /// What the image really holds.
    pub content: Place,
    pub log: Vec<Arrived>,
    pub durable: usize,
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
    /// The last write a client was told is safe.
    pub acked: Place,
    /// Each place's predecessor on its line.
    pub parents: BTreeMap<StreamHash, Place>,
    /// Own CPs of the source.
    pub committed: BTreeMap<CpNumber, Place>,
    /// The source lost durable records and has not got them back.
    pub damaged: bool,
    /// The link broke its promise, so connections may be closed.
    pub link_lied: bool,
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

    /// Boots: what the ring and the pool hold decides what is under way.
    fn restart(&mut self, faults: Faults) {
        self.generation += 1;
        let freeze = self.ring.iter().rev().find_map(|record| match record {
            Record::Freeze { cp, place } => Some((*cp, *place)),
            Record::Transfer(_) => None,
        });
        // A freeze is written only when the CP before it is done. A committed CP that is not known
        // to be released may not have reached the hub, whether its freeze can still be read or not.
        let (own_cp, own) = self.own;
        let (pending, held_after) = match freeze {
            Some((cp, place)) if cp > own_cp => (Some((cp, place, false)), own),
            _ if own.sequence > self.released.sequence => {
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
        let identity = Identity {
            name: "filer-a".parse().unwrap(),
            source: source_id(),
            hub: self.hub,
            generation: generation(self.generation),
            epoch: self.epoch,
            volumes: offers(),
        };
        let mut machine = Primary::new(identity, held_after, held, own_cp);
        let mut frozen = None;
        if let Some((cp, place, committed)) = pending {
            machine.step(primary::Event::Frozen { cp, place });
            if committed {
                let roots = vec![(VolumeNumber(0), root_of(place))];
                machine.step(primary::Event::Committed { cp, roots });
            }
            frozen = Some(FrozenCp { cp, place, told: true, committed });
        }
        self.up = Some(SourceUp {
            label: machine.cp_max().next(),
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
        });
    }
}

impl Hub {
    fn new() -> Self {
        Self {
            generation: Generation::default(),
            source: None,
            epoch: Epoch::default(),
            image: Default::default(),
            content: Place::default(),
            log: Vec::new(),
            durable: 0,
            up: None,
        }
    }

    /// The last durable transfer.
    pub(super) fn last(&self) -> Place {
        let log = self.log[..self.durable].last().map(|arrived| arrived.place);
        log.filter(|place| place.sequence > self.image.1.sequence).unwrap_or(self.image.1)
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
            applied_cp,
            applied: self.image.1,
            roots: Vec::new(),
            cp_max: applied_cp.max(labels.unwrap_or_default()),
        };
        let log_credit = 3 * TRANSFER_BYTES;
        self.up = Some(HubUp {
            machine: Mirror::new(known, self.last(), log_credit, cp_credit),
            connection: None,
            drained: self.durable,
            record: None,
            early: Vec::new(),
            job: None,
            refill: None,
            log_credit,
        });
    }

    /// What the applier finds: the CP's content, if the data joins the image and every reference
    /// is in the log.
    fn build(&self, job: &Job) -> Option<Place> {
        let mut content = self.content;
        for update in &job.fed {
            let found = |sequence| self.log.iter().any(|t| t.place.sequence.0 == sequence);
            let missing = || (update.base.sequence.0 + 1..=update.to.sequence.0).any(|n| !found(n));
            if update.base != self.content || !update.inline && missing() {
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
            parents: BTreeMap::new(),
            committed: BTreeMap::new(),
            damaged: false,
            link_lied: false,
            problem: None,
        };
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
        let transfer = matches!(self.to_hub.front(), Some((_, Frame::Transfer(_))));
        fault(b.drops, transfer, Step::DropFrame);
        fault(b.repeats, transfer, Step::RepeatFrame);
        fault(b.credits, up_h.is_some(), Step::Credit);
        if self.link_lied && self.is_stuck(&steps) {
            steps.push(Step::Timeout);
        }
        steps
    }

    /// Whether nothing goes on although the ends are not in step.
    pub(super) fn is_stuck(&self, steps: &[Step]) -> bool {
        steps.iter().all(|step| step.is_fault()) && !self.has_converged()
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
        may(up.serving && self.budget.cps > 0 && up.frozen.is_none() && something, Step::Freeze);
        let commit = up.frozen.is_some_and(|cp| cp.told && !cp.committed);
        may(commit, Step::OwnCommit);
        let room = up.data.0 - up.data.1 + UPDATE_BYTES <= up.data.2;
        may(up.sending.is_some_and(|sending| sending.left == 0 || room), Step::SendData);
        may(source.released != up.released, Step::SourceRelease);
        may(up.parked, Step::Retry);
        let idle = up.connection.is_none() && !up.halted;
        may(idle && self.hub.up.is_some(), Step::Connect);
        may(!self.to_source.is_empty(), Step::ToSource);
        let hub_side = self.hub.up.as_ref().and_then(|hub| hub.connection);
        let greeting = self.to_hub.iter().any(|(number, _)| Some(*number) == up.connection);
        let dead = up.connection.is_some() && up.connection != hub_side && !greeting;
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
            let all = job.taken == job.fed.len() && job.end.is_some();
            may(job.abort || all, Step::EndApply);
        }
        may(up.refill.is_some(), Step::SendLog);
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
            Step::EndApply => self.end_apply(),
            Step::SendLog => self.send_log(),
            Step::HubNotices => self.lose_hub_side(),
            Step::HubRestart => self.hub.restart(self.faults, self.shape.1),
            Step::CutAtSource
            | Step::CutAtHub
            | Step::SourceCrash
            | Step::SourceCrashAndRot
            | Step::HubCrash
            | Step::Reject
            | Step::NoSpace
            | Step::DropFrame
            | Step::RepeatFrame
            | Step::Credit => self.fault(step),
        }
        self.note_acknowledged();
        self.judge();
    }

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
            _ => {
                spend(&mut self.budget.credits);
                let up = self.hub_up();
                up.log_credit = (up.log_credit + 2 * TRANSFER_BYTES) % (4 * TRANSFER_BYTES);
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

    fn crash_hub(&mut self) {
        self.hub.up = None;
        let durable = self.hub.durable;
        self.hub.log.truncate(durable);
        self.to_hub.clear();
    }

    // ---- the source ----

    fn write(&mut self) {
        self.budget.writes -= 1;
        self.entries += 1;
        let (content, faults, generation) = (self.entries, self.faults, self.source.generation);
        let up = self.source_up();
        up.counter += 1;
        let generation = if faults.generation_not_in_id { 1 } else { generation };
        let id = TransferId { generation, counter: up.counter };
        let arrived = transfer(up.last, id, up.label, content);
        let before = std::mem::replace(&mut up.last, arrived.place);
        self.parents.insert(arrived.place.hash, before);
        self.source.ring.push(Record::Transfer(arrived));
        let held = Held { place: arrived.place, bytes: TRANSFER_BYTES };
        self.step_source(primary::Event::Formed(held), None);
    }

    fn source_sync(&mut self) {
        let fresh = self.source.ring[self.source.durable..].to_vec();
        self.source.durable = self.source.ring.len();
        for record in fresh {
            if let Record::Freeze { cp, place } = record {
                self.source_up().frozen.as_mut().unwrap().told = true;
                self.step_source(primary::Event::Frozen { cp, place }, None);
                if self.faults.end_before_commit {
                    let roots = vec![(VolumeNumber(0), root_of(place))];
                    self.step_source(primary::Event::Committed { cp, roots }, None);
                }
            }
        }
    }

    fn freeze(&mut self) {
        self.budget.cps -= 1;
        let faults = self.faults;
        let up = self.source_up();
        let (cp, place) = (up.machine.cp_max().next(), up.last);
        up.label = cp.next();
        up.frozen = Some(FrozenCp { cp, place, told: faults.freeze_not_durable, committed: false });
        if faults.freeze_not_durable {
            self.step_source(primary::Event::Frozen { cp, place }, None);
        } else {
            self.source.ring.push(Record::Freeze { cp, place });
        }
    }

    fn own_commit(&mut self) {
        let up = self.source_up();
        let frozen = up.frozen.as_mut().unwrap();
        frozen.committed = true;
        let (cp, place) = (frozen.cp, frozen.place);
        self.source.base = self.source.own.1;
        self.source.own = (cp, place);
        if let Some(other) = self.committed.insert(cp, place)
            && other != place
        {
            self.fail(format!("CP {cp} was committed twice with different content"));
        }
        let roots = vec![(VolumeNumber(0), root_of(place))];
        self.step_source(primary::Event::Committed { cp, roots }, None);
    }

    fn send_data(&mut self) {
        let own = self.source.own;
        let base = self.source.base;
        let up = self.source_up();
        let sending = up.sending.as_mut().unwrap();
        let (cp, inline) = (sending.cp, sending.inline);
        if sending.left == 0 {
            let bytes = sending.bytes;
            up.sending = None;
            self.step_source(primary::Event::DataSent { cp, bytes }, None);
            return;
        }
        sending.left -= 1;
        sending.bytes += UPDATE_BYTES;
        up.data.0 += UPDATE_BYTES;
        let to = up.frozen.unwrap().place;
        let base = if own.0 == cp { base } else { own.1 };
        let number = up.connection.unwrap();
        self.to_hub.push_back((number, Frame::Updates(Updates { cp, base, to, inline })));
    }

    fn source_release(&mut self) {
        let released = self.source_up().released;
        self.source.released = released;
        let before = self.source.ring.len();
        let gone = |record: &Record| match record {
            Record::Transfer(arrived) => arrived.place.sequence <= released.sequence,
            Record::Freeze { place, .. } => place.sequence <= released.sequence,
        };
        let durable_gone =
            self.source.ring[..self.source.durable].iter().filter(|r| gone(r)).count();
        self.source.ring.retain(|record| !gone(record));
        assert!(before - self.source.ring.len() == durable_gone, "released before durable");
        self.source.durable -= durable_gone;
    }

    fn connect(&mut self) {
        self.connections += 1;
        let number = self.connections;
        let up = self.source_up();
        up.connection = Some(number);
        up.data = (0, 0, 0);
        self.step_source(primary::Event::Connected, None);
    }

    fn lose_source_side(&mut self) {
        let up = self.source_up();
        let number = up.connection.take();
        up.sending = None;
        up.parked = false;
        self.to_source.retain(|(of, _)| Some(*of) != number);
        self.step_source(primary::Event::Disconnected, None);
    }

    fn deliver_to_source(&mut self) {
        let (number, frame) = self.to_source.pop_front().unwrap();
        if self.source.up.as_ref().unwrap().connection != Some(number) {
            return;
        }
        match frame {
            Frame::Message(message) => {
                self.step_source(primary::Event::Received(message), None);
            }
            Frame::Refill(arrived) => {
                let event = primary::Event::Refilled {
                    held: Held { place: arrived.place, bytes: TRANSFER_BYTES },
                    previous: arrived.header.previous,
                    hash_before: arrived.header.hash_before,
                };
                self.step_source(event, Some(arrived));
            }
            Frame::Transfer(_) | Frame::Updates(_) => self.fail("a frame went the wrong way"),
        }
    }

    pub(super) fn step_source(&mut self, event: primary::Event, refilled: Option<Arrived>) {
        let actions = self.source_up().machine.step(event);
        for action in actions {
            self.act_source(action, refilled);
        }
    }

    fn act_source(&mut self, action: primary::Action, refilled: Option<Arrived>) {
        use primary::Action;
        self.judge_source_action(&action);
        let updates = self.shape.0;
        let up = self.source.up.as_mut().unwrap();
        match action {
            Action::Send(message) => match up.connection {
                Some(number) => self.to_hub.push_back((number, Frame::Message(message))),
                None => self.fail("the source sends without a connection"),
            },
            Action::SendTransfer(id) => {
                let number = up.connection;
                let found = self.source.ring.iter().find_map(|record| match record {
                    Record::Transfer(arrived) if arrived.header.id == id => Some(*arrived),
                    Record::Transfer(_) | Record::Freeze { .. } => None,
                });
                match (number, found) {
                    (Some(number), Some(arrived)) => {
                        self.to_hub.push_back((number, Frame::Transfer(arrived)));
                    }
                    _ => self.fail(format!("transfer {id} cannot be sent")),
                }
            }
            Action::SendData { cp, inline } => {
                up.sending = Some(Sending { cp, inline, left: updates, bytes: 0 });
            }
            Action::DataWindow { taken, limit } => (up.data.1, up.data.2) = (taken, limit),
            Action::HubDurable(place) => up.hub_durable = place,
            Action::Adopt => {
                let arrived = refilled.unwrap();
                up.last = arrived.place;
                self.source.ring.push(Record::Transfer(arrived));
            }
            Action::Joined { hub, epoch } => {
                (self.source.hub, self.source.epoch) = (Some(hub), epoch);
            }
            Action::Serve => {
                if !std::mem::replace(&mut up.serving, true) {
                    up.label = up.machine.cp_max().next();
                }
            }
            Action::Done { cp } => {
                let frozen = up.frozen.take().filter(|frozen| frozen.cp == cp).unwrap();
                up.released = frozen.place;
                up.sending = None;
            }
            Action::Rejected { no_space, .. } => up.parked = no_space,
            Action::Close { reason } => {
                if !self.link_lied {
                    self.fail(format!("the source closes: {reason}"));
                }
                self.lose_source_side();
            }
            Action::Halt(refused) => {
                up.halted = true;
                self.fail(format!("the source halts: {}", refused.reason));
            }
            Action::Checkpoint { .. } | Action::Scan { .. } | Action::Scanned(_) => {}
        }
    }

    // ---- the hub ----

    /// Where the first frame stands that is not of the first frame's connection.
    fn other_connection(&self) -> Option<usize> {
        let first = self.to_hub.front()?.0;
        self.to_hub.iter().position(|(number, _)| *number != first)
    }

    fn deliver_to_hub(&mut self, at: usize) {
        let (number, frame) = self.to_hub.remove(at).unwrap();
        let faults = self.faults;
        let up = self.hub_up();
        let current = up.connection == Some(number);
        match frame {
            Frame::Message(Message::Hello(hello)) => {
                if let Err(refused) = up.machine.accepts(&hello) {
                    let heard = self.source.up.as_ref().and_then(|up| up.connection);
                    if heard == Some(number) {
                        self.fail(format!("the hub refuses: {}", refused.reason));
                    }
                    return;
                }
                let before = self.hub_up().connection.replace(number);
                self.hub_up().early.clear();
                self.hub_up().refill = None;
                self.step_hub(mirror::Event::Hello(hello), None);
                self.to_source.retain(|(of, _)| Some(*of) != before);
                if faults.welcome_before_durable {
                    let received = self.hub_up().machine.ladder()[0];
                    self.step_hub(mirror::Event::Durable(received), None);
                }
            }
            Frame::Transfer(_) if faults.session_not_flushed => {
                if up.machine.is_joined() {
                    self.transfer(&frame);
                }
            }
            _ if !current => {}
            Frame::Message(message) => self.step_hub(mirror::Event::Received(message), None),
            Frame::Transfer(_) => self.transfer(&frame),
            Frame::Updates(updates) => {
                let event = mirror::Event::Updates { cp: updates.cp, bytes: UPDATE_BYTES };
                self.step_hub(event, Some(Frame::Updates(updates)));
            }
            Frame::Refill(_) => self.fail("a frame went the wrong way"),
        }
    }

    fn transfer(&mut self, frame: &Frame) {
        let Frame::Transfer(arrived) = frame else { return };
        let mut arrived = *arrived;
        let faults = self.faults;
        let received = self.hub_up().machine.ladder()[0];
        if faults.predecessor_unchecked {
            arrived.header.previous = received.transfer;
            arrived.header.hash_before = received.hash;
            arrived.header.first_sequence = received.sequence.next();
        }
        let before = self.hub.log.len();
        self.step_hub(mirror::Event::Transfer(arrived), Some(frame.clone()));
        if faults.late_transfer_kept && self.hub.log.len() == before {
            self.hub.log.push(arrived);
        }
        if faults.ack_before_durable {
            let received = self.hub_up().machine.ladder()[0];
            self.step_hub(mirror::Event::Durable(received), None);
        }
    }

    fn hub_sync(&mut self) {
        self.hub.durable = self.hub.log.len();
        let place = self.hub.last();
        self.step_hub(mirror::Event::Durable(place), None);
    }

    fn drain(&mut self) {
        let durable = self.hub.durable;
        self.hub_up().drained = durable;
        let place = self.hub.last();
        self.step_hub(mirror::Event::Drained(place), None);
    }

    fn recorded(&mut self) {
        let up = self.hub_up();
        let (number, generation, epoch, source) = up.record.take().unwrap();
        let current = up.connection == Some(number);
        self.hub.generation = generation;
        self.hub.epoch = epoch;
        self.hub.source = Some(source);
        if current {
            self.step_hub(mirror::Event::Recorded, None);
        }
    }

    fn end_apply(&mut self) {
        let up = self.hub.up.as_ref().unwrap();
        let job = up.job.as_ref().unwrap();
        if job.abort {
            return self.end_job(Outcome::Aborted);
        }
        let (cp, last, end) = (job.cp, job.last, job.end.clone().unwrap());
        let content = self.hub.build(job);
        let roots: Vec<_> = content.map(root_of).into_iter().collect();
        if end.roots.iter().map(|root| root.root).ne(roots.iter().copied()) {
            self.fail(format!("CP {cp} was built from other content than the source's"));
            let reason = "roots differ".to_owned();
            return self.end_job(Outcome::Rejected { differs: None, reason });
        }
        self.hub.image = (cp, last);
        self.hub.content = content.unwrap();
        self.end_job(Outcome::Published(vec![(VolumeNumber(0), roots[0])]));
    }

    fn end_job(&mut self, outcome: Outcome) {
        let cp = self.hub_up().job.take().unwrap().cp;
        self.step_hub(mirror::Event::Applied { cp, outcome }, None);
    }

    fn send_log(&mut self) {
        let up = self.hub_up();
        let (from, number) = (up.refill.take().unwrap(), up.connection.unwrap());
        let upto = self.hub.last();
        let behind = |arrived: &&Arrived| arrived.place.sequence > from.sequence;
        let log: Vec<_> = self.hub.log[..self.hub.durable].iter().filter(behind).copied().collect();
        let joins = log.first().is_none_or(|first| first.header.hash_before == from.hash);
        if joins {
            for arrived in log {
                self.to_source.push_back((number, Frame::Refill(arrived)));
            }
        }
        self.step_hub(mirror::Event::LogSent(joins.then_some(upto)), None);
    }

    fn lose_hub_side(&mut self) {
        let up = self.hub_up();
        let number = up.connection.take();
        up.early.clear();
        up.refill = None;
        self.to_hub.retain(|(of, _)| Some(*of) != number);
        self.step_hub(mirror::Event::Disconnected, None);
    }

    pub(super) fn step_hub(&mut self, event: mirror::Event, frame: Option<Frame>) {
        let actions = self.hub_up().machine.step(event);
        for action in actions {
            self.act_hub(action, frame.as_ref());
        }
    }

    fn act_hub(&mut self, action: mirror::Action, frame: Option<&Frame>) {
        use mirror::Action;
        self.judge_hub_action(&action);
        let faults = self.faults;
        let up = self.hub.up.as_mut().unwrap();
        match action {
            Action::Send(message) => match up.connection {
                Some(number) => self.to_source.push_back((number, Frame::Message(message))),
                None => self.fail("the hub sends without a connection"),
            },
            Action::Record { source, generation, epoch, .. } => {
                up.record = Some((up.connection.unwrap(), generation, epoch, source));
            }
            Action::Stage => match frame {
                Some(Frame::Transfer(arrived)) => self.hub.log.push(*arrived),
                _ => self.fail("Stage without a transfer"),
            },
            Action::Apply { cp, last } => {
                if up.job.is_some() {
                    return self.fail("two CPs are applied at once");
                }
                let fed = std::mem::take(&mut up.early);
                up.job = Some(Job { cp, last, fed, taken: 0, end: None, abort: false });
                if faults.drop_before_publish {
                    self.drop_logs(cp);
                }
            }
            Action::Feed => match (frame, &mut up.job) {
                (Some(Frame::Updates(updates)), Some(job)) => job.fed.push(*updates),
                (Some(Frame::Updates(updates)), None) => up.early.push(*updates),
                _ => self.fail("Feed without updates"),
            },
            Action::Finish(end) => match &mut up.job {
                Some(job) => job.end = Some(end),
                None => self.fail("Finish without a job"),
            },
            Action::Abort => match &mut up.job {
                Some(job) => job.abort = true,
                None => self.fail("Abort without a job"),
            },
            Action::DropLogs(cp) => self.drop_logs(cp),
            Action::SendLog { from } => up.refill = Some(from),
            Action::Refuse(refused) => {
                self.fail(format!("the hub refuses: {}", refused.reason));
            }
            Action::Close { reason } => {
                if !self.link_lied {
                    self.fail(format!("the hub closes: {reason}"));
                }
                self.lose_hub_side();
            }
            Action::Joined
            | Action::Scan { .. }
            | Action::CheckpointAt { .. }
            | Action::Scanned(_) => {}
        }
    }

    fn drop_logs(&mut self, cp: CpNumber) {
        let gone = |arrived: &Arrived| arrived.header.cp <= cp;
        let hub = &mut self.hub;
        let drained = hub.up.as_ref().map_or(0, |up| up.drained);
        let durable_gone = hub.log[..hub.durable].iter().filter(|t| gone(t)).count();
        let drained_gone = hub.log[..drained].iter().filter(|t| gone(t)).count();
        hub.log.retain(|arrived| !gone(arrived));
        hub.durable -= durable_gone;
        if let Some(up) = &mut hub.up {
            up.drained -= drained_gone;
        }
    }

    /// A client is told when both ends have its write durably (mode sync, ack durable).
    fn note_acknowledged(&mut self) {
        let Some(up) = &self.source.up else { return };
        let own = self.source.last_of(self.source.durable);
        let both = if own.sequence < up.hub_durable.sequence { own } else { up.hub_durable };
        if up.serving && both.sequence > self.acked.sequence {
            self.acked = both;
        }
        let whole = self.source.durable == self.source.ring.len();
        if self.damaged && up.machine.is_streaming() && whole {
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
            && hub.job.is_none()
            && self.source.released == self.source.own.1
    }

    /// The sequence number clients were promised, for reports.
    pub(super) fn acknowledged(&self) -> SequenceNumber {
        self.acked.sequence
    }
}
