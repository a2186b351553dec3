//! The mirror's half of a session: what the hub takes from one source, and when it answers.
//!
//! Called by the source actor with one event at a time. It outlives connections: what is staged,
//! durable, drained and applied for the source is the same before and after a reconnect.
//!
//! Invariants, checked after every step: `applied <= filed <= drained <= durable <= received` in
//! the source's sequence; a transfer is staged only directly behind the last one received (R7); an
//! Ack names a durable transfer, or what the source's `ack` asks for instead: a received or a
//! filed one; Welcome leaves only when everything received is durable (with `ack = "filed"`:
//! filed), the source's generation is recorded and no CP is being applied (R7). What the hub holds
//! is what Welcome says, whatever an earlier session acknowledged: behind a `received` Ack less
//! than that is no alarm, the source refills it.

mod behind;
mod checkpoint;
mod joining;
mod volumes;

use self::behind::Aside;
pub use self::volumes::LeftOut;
use super::CP_NUMBER_MAX;
use crate::limits::{BEHIND_CPS_MAX, UNPUBLISHED_CPS_MAX};
use crate::record::marks::Place;
use crate::record::transfer::TransferHeader;
use crate::units::hash::Root;
use crate::units::ids::{HubId, SourceId};
use crate::units::numbers::{CpNumber, Epoch, Generation, TransferId, VolumeNumber};
use crate::units::policy::{self, AloneMark, Policy};
use crate::wire::message::{
    Ack, CpEnd, Hello, Message, Pong, Refused, RefusedCode, VolumeOffer, VolumeRefusal, VolumeRoot,
};

/// What the hub durably knows of a source.
#[derive(Debug, Clone)]
pub struct Known {
    /// The hub itself.
    pub hub: HubId,
    /// Id of the source under this name, once it was here.
    pub source: Option<SourceId>,
    /// Its newest generation.
    pub generation: Generation,
    /// Epoch in force.
    pub epoch: Epoch,
    /// Its volumes.
    pub volumes: Vec<VolumeOffer>,
    /// Those that this session leaves out, and why (R20).
    pub refused: Vec<VolumeRefusal>,
    /// Those whose entries in the log do not count.
    pub left_out: Vec<LeftOut>,
    /// Volumes that its file pins, empty if it pins none: name and size in bytes.
    pub pinned: Vec<(String, u64)>,
    /// Published CP.
    pub applied_cp: CpNumber,
    /// Its place in the history.
    pub applied: Place,
    /// Its roots.
    pub roots: Vec<VolumeRoot>,
    /// The source was failed over: whatever epoch it names, it is not served.
    pub failed_over: bool,
    /// Highest CP number or birth used here; at least one less than the CP number that the last
    /// transfer in the log carries, also after a restart (R6).
    pub cp_max: CpNumber,
    /// What the source promised when it was last here; none if it never was.
    pub policy: Option<Policy>,
    /// Since when it may have acknowledged writes without the hub, as it said then (R4).
    pub alone: Option<AloneMark>,
    /// What came of a pass that was cut is kept (R19).
    pub work: bool,
}

/// What is known of a transfer that came.
#[derive(Debug, Clone, Copy)]
pub struct Arrived {
    /// Its header.
    pub header: TransferHeader,
    /// Its id, last sequence number, stream hash behind it.
    pub place: Place,
}

/// What a CP's trees are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Build {
    /// Updates, which name blocks of the log or carry them.
    Updates,
    /// The entries of the log; no updates come.
    Replay,
    /// Updates that carry all that is new since the image. Publishing it sets the source's log to
    /// go on behind the CP, wherever it stood (R4).
    Pass,
    /// What is pulled of the source's trees, by comparison with the image. It is published as a pass.
    Compare,
}

impl Build {
    /// Whether the log goes on behind the CP, wherever it stood.
    pub const fn is_pass(self) -> bool {
        match self {
            Self::Pass | Self::Compare => true,
            Self::Updates | Self::Replay => false,
        }
    }
}

/// How an apply ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Published with these roots.
    Published(Vec<(VolumeNumber, Root)>),
    /// A root differs, or an update could not be used; nothing was published.
    Rejected { differs: Option<VolumeRoot>, reason: String },
    /// The pool has no room; nothing was published.
    NoSpace,
    /// The source may have no more of it; nothing was published.
    OverLimit { reason: String },
    /// Given up on request; nothing was published.
    Aborted,
}

/// What the shell tells the machine.
#[derive(Debug, Clone)]
pub enum Event {
    /// First frame of a new connection. Refused, it changes nothing: an older connection stays, and
    /// [`Action::Refuse`] is for the new one. Accepted, the older one has ended without
    /// [`Event::Disconnected`], and nothing of it may be told any more.
    Hello(Hello),
    /// The connection is gone.
    Disconnected,
    /// What the newest [`Action::Record`] asked for is durable.
    Recorded,
    /// A transfer came and its checksums are right.
    Transfer(Arrived),
    /// A frame came, other than Hello, Transfer and Updates.
    Received(Message),
    /// A frame of Updates came, of that many payload bytes.
    Updates { cp: CpNumber, bytes: u64 },
    /// A frame of Nodes or Blocks of that CP came.
    Pulled { cp: CpNumber },
    /// The applier is done with that many bytes of Updates. What it has not taken when its apply
    /// ends counts as taken then.
    UpdatesTaken(u64),
    /// Everything up to this place is durable in the ring.
    Durable(Place),
    /// Everything up to this place lies in the source log.
    Drained(Place),
    /// Everything up to this place is synced in the source log.
    Filed(Place),
    /// What came behind the pass under way is written up to this place, so many bytes more.
    BehindWritten(Place, u64),
    /// No more of it can be held here.
    BehindOver,
    /// The CP that [`Event::Applied`] tells of next was published. If it is a pass, the log was set to end at the
    /// first place, and with what came behind it and waits to be staged at the second.
    LogSet(Place, Place),
    /// The apply ended: once for each [`Action::Apply`].
    Applied { cp: CpNumber, outcome: Outcome },
    /// Bytes of transfers that may be under way from now on.
    Credit(u64),
    /// The log behind WantLog was sent up to this place, or its start is not on the line that is
    /// held. A log that could not be read is neither: it is [`Event::Faulted`].
    LogSent(Option<Place>),
    /// The source's log failed.
    Faulted(String),
    /// Somebody asks for a checkpoint.
    WantCheckpoint(u64),
}

/// What the machine tells the shell, to be done in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send this message.
    Send(Message),
    /// Make generation, source id, policy, mark and new volumes durable, then say
    /// [`Event::Recorded`].
    Record {
        source: SourceId,
        generation: Generation,
        epoch: Epoch,
        volumes: Vec<VolumeOffer>,
        policy: Policy,
        alone: Option<AloneMark>,
    },
    /// Put the transfer of this event into the ring.
    Stage,
    /// Put the transfer of this event aside: it is behind the pass under way. Once that is published, what
    /// [`Event::LogSet`] does not hold of it is staged.
    StageBehind,
    /// Nothing of it is wanted any more.
    DropBehind,
    /// Begin to apply a CP out of what `build` says.
    Apply { cp: CpNumber, last: Place, build: Build },
    /// Hand the frame of Updates, Nodes or Blocks of this event to the applier. Frames fed before
    /// [`Action::Apply`] wait with the shell, at most the `cp` credit of them; they are dropped
    /// when the connection goes or a newer Hello is accepted.
    Feed,
    /// All updates of the CP were handed over: compare with these roots, publish. What is built by
    /// comparison begins with this.
    Finish(CpEnd),
    /// Throw the unpublished CP away, then say [`Event::Applied`] with [`Outcome::Aborted`].
    Abort,
    /// Drop the logs of this and older CPs.
    DropLogs(CpNumber),
    /// Send the source its own log behind this place, then say [`Event::LogSent`].
    SendLog { from: Place },
    /// The source is welcome: it is in session now.
    Joined,
    /// The source asks to read every block of that CP.
    Scan { cp: CpNumber, token: u64 },
    /// The source's answer to a checkpoint question.
    CheckpointAt { token: u64, cp: CpNumber },
    /// The source's answer to our question.
    Scanned(crate::wire::message::Scanned),
    /// Refuse with this reason and close. In answer to Hello: that new connection, no other.
    Refuse(Refused),
    /// Close the connection and say [`Event::Disconnected`]: the peer broke the protocol.
    Close { reason: String },
}

#[derive(Debug, Clone)]
enum State {
    Away,
    Joining {
        recorded: bool,
    },
    Refilling,
    Joined,
    /// The peer broke the protocol; its frames are passed over until it is gone.
    Closing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ApplyState {
    /// Told by PartitionFull, waits for the drainer.
    Waiting,
    /// With the applier.
    Running,
    /// All updates handed over.
    Finishing,
    /// Being thrown away.
    Aborting,
}

#[derive(Debug, Clone)]
struct Apply {
    cp: CpNumber,
    last: Place,
    build: Build,
    state: ApplyState,
    update_bytes: u64,
    end: Option<CpEnd>,
    /// A pass that ends before what is held here of the source's line: that stays.
    keeps_log: bool,
    /// What the source sends behind the pass.
    behind: Option<Aside>,
    /// Where the shell has set the log, and where what it holds ends.
    log: Option<(Place, Place)>,
}

/// The mirror's machine for one source.
#[derive(Debug, Clone)]
pub struct Mirror {
    known: Known,
    state: State,
    received: Place,
    durable: Place,
    drained: Place,
    filed: Place,
    apply: Option<Apply>,
    /// CPs that received transfers belong to and that are not published, oldest first, and where
    /// the last transfer of each ends.
    labels: Vec<(CpNumber, Place)>,
    log_credit: u64,
    cp_credit: u64,
    /// Bytes of Updates that came on this connection, and how many of them are taken.
    cp_came: u64,
    cp_taken: u64,
    /// The CP whose apply ended last without being published.
    given_up: Option<CpNumber>,
    /// The last transfer that one received names as durable at the source (R1).
    own_durable: TransferId,
    /// What both ends speak.
    version: u16,
    /// Transfers were sent before the source heard that they are of no use: until it has.
    passes_over: bool,
    /// The source has CPs to be built from the log on this connection, more than two.
    lifted: bool,
    /// The newest connection of the source's boot whose Hello was accepted.
    connection: u64,
    /// What a source promises that may not have heard any Welcome: until it shows that it has, it
    /// answers alone, whatever its policy (R4).
    unshown: Option<Policy>,
    faulted: Option<String>,
    last_refusal: Option<String>,
    /// What the last accepted Hello announced.
    offered: Vec<VolumeOffer>,
    /// That was for want of room.
    lacks_room: bool,
}

impl Mirror {
    /// A machine for a source whose log ends, durably and drained, at `last`.
    pub fn new(known: Known, last: Place, log_credit: u64, cp_credit: u64) -> Self {
        let last = if last.sequence > known.applied.sequence { last } else { known.applied };
        Self {
            filed: known.applied,
            known,
            state: State::Away,
            received: last,
            durable: last,
            drained: last,
            apply: None,
            labels: Vec::new(),
            log_credit,
            cp_credit,
            cp_came: 0,
            cp_taken: 0,
            given_up: None,
            own_durable: TransferId::NONE,
            version: 0,
            passes_over: false,
            lifted: false,
            connection: 0,
            unshown: None,
            faulted: None,
            last_refusal: None,
            offered: Vec::new(),
            lacks_room: false,
        }
    }

    /// Whether what came of a pass that was cut is kept; told before how that ended.
    pub fn works(&mut self, work: bool) {
        self.known.work = work;
    }

    /// What the next session may have under way in CP data; told before its Hello.
    pub fn grant(&mut self, cp_credit: u64) {
        self.cp_credit = cp_credit;
    }

    /// What the source's file pins from now on; the next Hello is held against it.
    pub fn pin(&mut self, pinned: Vec<(String, u64)>) {
        self.known.pinned = pinned;
    }

    /// CPs of which the source's logs hold entries, oldest first, and the places where these end;
    /// told once, after a start.
    pub fn holds(&mut self, logs: &[(CpNumber, Place)]) {
        let applied = self.known.applied_cp;
        self.labels = logs.iter().copied().filter(|&(cp, _)| cp > applied).collect();
        // A label of n says that every CP below n was cut (R6).
        if let Some((newest, _)) = self.labels.last() {
            self.known.cp_max = self.known.cp_max.max(CpNumber(newest.0 - 1));
        }
    }

    /// What the source's log says of the source: the last transfer that was durable there; told once,
    /// after a start.
    pub fn names(&mut self, own_durable: TransferId) {
        self.own_durable = own_durable;
    }

    /// Why the last CP was refused, until one is published.
    pub fn last_refusal(&self) -> Option<&str> {
        self.last_refusal.as_deref()
    }

    /// The newest connection, for the searches of the tests.
    #[cfg(test)]
    pub(super) fn connection(&self) -> u64 {
        self.connection
    }

    /// What is durably known, for status.
    pub fn known(&self) -> &Known {
        &self.known
    }

    /// The ladder: received, durable, drained.
    pub fn ladder(&self) -> [Place; 3] {
        [self.received, self.durable, self.drained]
    }

    /// Whether a source is in session.
    pub fn is_joined(&self) -> bool {
        matches!(self.state, State::Joined | State::Refilling)
    }

    /// Whether the session takes transfers and questions: it is not sending a log either.
    pub fn is_streaming(&self) -> bool {
        matches!(self.state, State::Joined)
    }

    /// Whether a log is being sent to the source.
    pub fn is_refilling(&self) -> bool {
        matches!(self.state, State::Refilling)
    }

    /// Whether a source has said Hello and waits for its Welcome.
    pub fn is_joining(&self) -> bool {
        matches!(self.state, State::Joining { .. })
    }

    /// The CP being applied.
    pub fn applying(&self) -> Option<CpNumber> {
        self.apply.as_ref().map(|apply| apply.cp)
    }

    /// Whether the log behind the CP being applied stays although it is a pass.
    pub fn keeps_log(&self) -> bool {
        self.apply.as_ref().is_some_and(|apply| apply.keeps_log)
    }

    /// Takes one event; returns what is to be done, in order.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Hello(hello) => self.hello(&hello, &mut actions),
            Event::Disconnected => self.disconnected(&mut actions),
            Event::Recorded => {
                if let State::Joining { recorded } = &mut self.state {
                    *recorded = true;
                }
            }
            Event::Transfer(arrived) => {
                if self.in_session() {
                    self.transfer(&arrived, &mut actions);
                }
            }
            Event::Received(message) => {
                if self.in_session() {
                    self.received(message, &mut actions);
                }
            }
            Event::Updates { cp, bytes } => {
                if self.in_session() {
                    self.updates(cp, bytes, &mut actions);
                }
            }
            Event::Pulled { cp } => {
                if self.in_session() {
                    self.pulled(cp, &mut actions);
                }
            }
            Event::UpdatesTaken(bytes) => self.updates_taken(bytes, &mut actions),
            Event::Durable(place) => self.durable(place, &mut actions),
            Event::Drained(place) => {
                if place.sequence > self.drained.sequence {
                    self.drained = place;
                }
            }
            Event::Filed(place) => self.filed(place, &mut actions),
            Event::BehindWritten(place, bytes) => {
                self.behind_written(place, bytes, &mut actions);
            }
            Event::BehindOver => self.behind_over(&mut actions),
            Event::LogSet(log, held) => {
                if let Some(apply) = &mut self.apply {
                    apply.log = Some((log, held));
                }
            }
            Event::Applied { cp, outcome } => self.applied(cp, outcome, &mut actions),
            Event::Credit(bytes) => {
                if self.log_credit != bytes {
                    self.log_credit = bytes;
                    self.acknowledge(&mut actions);
                }
            }
            Event::LogSent(sent) => self.log_sent(sent, &mut actions),
            Event::Faulted(reason) => self.fault(reason, &mut actions),
            Event::WantCheckpoint(token) => self.want_checkpoint(token, &mut actions),
        }
        self.pump(&mut actions);
        self.check();
        actions
    }

    /// Whether frames of the peer count: not behind a Close or Refuse, nor without a connection.
    fn in_session(&self) -> bool {
        match self.state {
            State::Joining { .. } | State::Refilling | State::Joined => true,
            State::Away | State::Closing => false,
        }
    }

    /// Ends the connection; the source connects again.
    fn close(&mut self, reason: impl Into<String>, actions: &mut Vec<Action>) {
        self.state = State::Closing;
        actions.push(Action::Close { reason: reason.into() });
    }

    fn disconnected(&mut self, actions: &mut Vec<Action>) {
        self.state = State::Away;
        (self.cp_came, self.cp_taken) = (0, 0);
        (self.passes_over, self.lifted) = (false, false);
        if let Some(apply) = &mut self.apply {
            match apply.state {
                ApplyState::Waiting => self.apply = None,
                // All of it is here: it is finished without the source.
                ApplyState::Finishing if apply.build != Build::Compare => {}
                ApplyState::Running | ApplyState::Finishing => {
                    apply.state = ApplyState::Aborting;
                    Self::end_aside(apply);
                    actions.push(Action::Abort);
                }
                ApplyState::Aborting => {}
            }
        }
    }

    fn transfer(&mut self, arrived: &Arrived, actions: &mut Vec<Action>) {
        if !matches!(self.state, State::Joined) {
            self.close("Transfer before Welcome", actions);
            return;
        }
        if self.shows_welcome() {
            actions.extend(self.record());
        }
        if self.passes_over {
            return;
        }
        if self.apply.as_ref().is_some_and(|apply| apply.build.is_pass()) {
            self.transfer_behind(arrived, actions);
            return;
        }
        let Arrived { header, place } = arrived;
        match self.is_next(arrived, self.received) {
            Ok(true) => {}
            Ok(false) => {
                // Acknowledged once the first copy is durable, which Ack says anyway (R7).
                self.acknowledge(actions);
                return;
            }
            Err(reason) => {
                self.close(reason, actions);
                return;
            }
        }
        if let Err(reason) = self.take_label(header.cp, *place) {
            self.close(format!("transfer {}: {reason}", header.id), actions);
            return;
        }
        self.received = *place;
        self.own_durable = self.own_durable.max(header.own_durable);
        // A label of n says that the source has cut every CP below n, also if it has lost its
        // record of that: no number is used twice (R6).
        self.known.cp_max = self.known.cp_max.max(CpNumber(header.cp.0 - 1));
        actions.push(Action::Stage);
        if self.ack() == policy::Ack::Received {
            self.acknowledge(actions);
        }
    }

    /// Whether a transfer is the one behind `last`, or a repeat (`false`). `Err` says why it cannot be either.
    fn is_next(&self, arrived: &Arrived, last: Place) -> Result<bool, String> {
        let Arrived { header, place } = arrived;
        if place.transfer == last.transfer && *place != last {
            return Err(format!("transfer {} came with two contents", header.id));
        }
        if place.transfer <= last.transfer {
            return Ok(false);
        }
        // Its CP's end was told before it came, so it belongs to a later one; a label that says
        // otherwise would have it dropped with that CP's log.
        let ended = self.apply.as_ref().map_or(self.known.applied_cp, |apply| apply.cp);
        let labelled = header.cp > ended && header.cp <= CP_NUMBER_MAX;
        let ours = header.id.generation <= self.known.generation.number;
        if header.follows(last) && labelled && ours {
            return Ok(true);
        }
        Err(format!(
            "transfer {} (behind {}, CP {}) does not follow {} (CP {} has ended)",
            header.id, header.previous, header.cp, last.transfer, ended
        ))
    }

    /// CPs follow each other: two are not published, the one that is frozen and the one that is open; and
    /// behind a pass those that were done alone during it. Anything else could not be stored, or fill the log
    /// with CPs that never come.
    fn take_label(&mut self, cp: CpNumber, place: Place) -> Result<(), String> {
        let count = self.labels.len();
        let done_alone = if self.lifted { BEHIND_CPS_MAX } else { 0 };
        match self.labels.last_mut() {
            Some((newest, last)) if cp == *newest => {
                *last = place;
                return Ok(());
            }
            Some((newest, _)) if cp < *newest => {
                return Err(format!("of CP {cp} behind one of CP {newest}"));
            }
            Some(_) if count >= UNPUBLISHED_CPS_MAX + done_alone => {}
            Some(_) | None => {
                self.labels.push((cp, place));
                return Ok(());
            }
        }
        let mut cps: Vec<CpNumber> = self.labels.iter().map(|(cp, _)| *cp).collect();
        cps.truncate(UNPUBLISHED_CPS_MAX);
        Err(format!("of CP {cp}, and neither of {cps:?} is published"))
    }

    /// Where the log of CP `cp` and of all before it ends, as far as it is held.
    fn end_of(&self, cp: CpNumber) -> Place {
        let ended = self.labels.iter().rev().find(|(label, _)| *label <= cp);
        ended.map_or(self.known.applied, |(_, last)| *last)
    }

    fn received(&mut self, message: Message, actions: &mut Vec<Action>) {
        match (&self.state, message) {
            (State::Joined, Message::PartitionFull(full)) => self.partition_full(&full, actions),
            (State::Joined, Message::Compare(compare)) => self.compare(&compare, actions),
            (State::Joined, Message::CpEnd(end)) => self.cp_end(end, actions),
            (State::Joined, Message::WantLog(want)) if self.apply.is_none() => {
                self.state = State::Refilling;
                actions.push(Action::SendLog { from: want.from.into() });
            }
            (State::Joined | State::Refilling, Message::Scan(scan)) => {
                actions.push(Action::Scan { cp: scan.cp, token: scan.token });
            }
            (State::Joined | State::Refilling, Message::Scanned(scanned)) => {
                actions.push(Action::Scanned(scanned))
            }
            (State::Joined | State::Refilling, Message::CheckpointAt(at)) => {
                actions.push(Action::CheckpointAt { token: at.token, cp: at.cp });
            }
            (State::Joined, Message::Behind(word)) => self.source_behind(word, actions),
            (State::Joined, Message::Standing(standing)) => self.stands(standing, actions),
            (_, Message::Ping(ping)) => {
                actions.push(Action::Send(Message::Pong(Pong { token: ping.token })));
            }
            (_, Message::Pong(_)) => {}
            (_, Message::Going(going)) => self.close(going.reason, actions),
            (_, other) => self.close(format!("{} is out of place", other.name()), actions),
        }
    }

    fn durable(&mut self, place: Place, actions: &mut Vec<Action>) {
        if place.sequence > self.durable.sequence {
            self.durable = place;
            self.acknowledge(actions);
        }
    }

    fn filed(&mut self, place: Place, actions: &mut Vec<Action>) {
        if place.sequence > self.filed.sequence {
            self.filed = place;
            if self.ack() == policy::Ack::Filed {
                self.acknowledge(actions);
            }
        }
    }

    /// What the source asks for before a transfer is acknowledged.
    fn ack(&self) -> policy::Ack {
        self.known.policy.unwrap_or_default().ack
    }

    fn acknowledge(&self, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Joined) {
            let upto = match self.ack() {
                policy::Ack::Durable => self.durable,
                policy::Ack::Received => self.received,
                policy::Ack::Filed => self.filed,
            };
            actions.push(Action::Send(Message::Ack(Ack {
                id: upto.transfer,
                log_credit: self.log_credit,
                cp_taken: self.cp_taken,
            })));
        }
    }

    fn log_sent(&mut self, sent: Option<Place>, actions: &mut Vec<Action>) {
        if !matches!(self.state, State::Refilling) {
            return;
        }
        if let Some(last) = sent {
            if last != self.durable {
                self.close(format!("the log was sent up to {} only", last.transfer), actions);
                return;
            }
            self.state = State::Joined;
            let end = crate::wire::message::RefillEnd { last: last.into() };
            actions.push(Action::Send(Message::RefillEnd(end)));
            // A credit that changed meanwhile was not told.
            self.acknowledge(actions);
        } else {
            self.state = State::Closing;
            let reason = "the source's last transfer is not on the line the hub holds".to_owned();
            let next = "the two histories went different ways; see docs/operations.md";
            actions.push(Action::Refuse(refuse(RefusedCode::Diverged, reason, next)));
        }
    }

    fn fault(&mut self, reason: String, actions: &mut Vec<Action>) {
        if self.faulted.is_none() {
            let text = format!("the hub's log of this source failed: {reason}");
            self.faulted = Some(reason);
            let next = "see `mirrorhub status` on the hub";
            if !matches!(self.state, State::Away) {
                actions.push(Action::Refuse(refuse(RefusedCode::Faulted, text, next)));
            }
            self.disconnected(actions);
        }
    }

    fn want_checkpoint(&mut self, token: u64, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Joined) {
            let want = crate::wire::message::WantCheckpoint { token };
            actions.push(Action::Send(Message::WantCheckpoint(want)));
        }
    }

    fn pump(&mut self, actions: &mut Vec<Action>) {
        if let Some(apply) = &mut self.apply {
            let ready = if apply.build.is_pass() {
                self.drained == self.received
            } else {
                self.drained.sequence >= apply.last.sequence
            };
            if apply.state == ApplyState::Waiting && ready {
                apply.state = ApplyState::Running;
                // Updates that came before are still with the shell, in order.
                let at = actions.iter().position(|action| *action == Action::Feed);
                let Apply { cp, last, build, .. } = *apply;
                let start = Action::Apply { cp, last, build };
                actions.insert(at.unwrap_or(actions.len()), start);
            }
            if apply.state == ApplyState::Running
                && let Some(end) = &apply.end
            {
                apply.state = ApplyState::Finishing;
                actions.push(Action::Finish(end.clone()));
            }
        }
        // What Welcome says counts as acknowledged.
        let filed = self.ack() != policy::Ack::Filed || self.filed == self.received;
        let quiet = self.apply.is_none() && self.durable == self.received && filed;
        if let State::Joining { recorded: true } = self.state
            && quiet
        {
            self.state = State::Joined;
            actions.push(Action::Joined);
            actions.push(Action::Send(Message::Welcome(self.welcome())));
        }
    }

    fn check(&self) {
        assert!(self.known.applied.sequence <= self.filed.sequence, "applied before filed");
        assert!(self.filed.sequence <= self.drained.sequence, "filed before drained");
        assert!(self.drained.sequence <= self.durable.sequence, "drained before durable");
        assert!(self.durable.sequence <= self.received.sequence, "durable before received");
    }

    /// CPs that received transfers belong to and that are not published.
    #[cfg(test)]
    pub(super) fn labels(&self) -> Vec<CpNumber> {
        self.labels.iter().map(|(cp, _)| *cp).collect()
    }

    /// Equal for machines that behave alike, for the searches of the tests.
    #[cfg(test)]
    pub(super) fn fingerprint<H: std::hash::Hasher>(&self, to: &mut H) {
        use std::hash::Hash;
        let Self { state, received, durable, drained, known, .. } = self;
        let recorded = matches!(state, State::Joining { recorded: true });
        (std::mem::discriminant(state), recorded).hash(to);
        (received.hash, durable.hash, drained.hash, self.filed.hash).hash(to);
        self.labels.iter().for_each(|(cp, last)| (cp, last.hash).hash(to));
        (known.generation, known.applied_cp, known.cp_max, known.source.is_some()).hash(to);
        known.work.hash(to);
        (self.log_credit, self.cp_credit, self.cp_came, self.cp_taken, self.given_up).hash(to);
        (self.unshown, known.policy, known.alone).hash(to);
        (self.version, self.passes_over, self.lifted).hash(to);
        if let Some(apply) = &self.apply {
            let Apply { cp, last, build, state, update_bytes, end, keeps_log, behind, log } = apply;
            let state = std::mem::discriminant(state);
            (cp, last.hash, build, state, update_bytes, end.is_some(), keeps_log).hash(to);
            (behind.is_some(), log.is_some()).hash(to);
            if let Some(behind) = behind {
                behind.fingerprint(to);
            }
        }
    }
}

fn refuse(code: RefusedCode, reason: String, next_step: &str) -> Refused {
    Refused { code, reason, next_step: next_step.to_owned() }
}
