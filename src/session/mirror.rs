//! The mirror's half of a session: what the hub takes from one source, and when it answers.
//!
//! Called by the source actor with one event at a time. It outlives connections: what is staged,
//! durable, drained and applied for the source is the same before and after a reconnect.
//!
//! Invariants, checked after every step: `applied <= drained <= durable <= received` in the
//! source's sequence; a transfer is staged only directly behind the last one received (R7); an
//! Ack names a durable transfer; Welcome leaves only when everything received is durable, the
//! source's generation is recorded and no CP is being applied (R7).

use super::CP_NUMBER_MAX;
use crate::limits::{VOLUME_BYTES_MAX, VOLUMES_PER_SOURCE_MAX};
use crate::record::marks::Place;
use crate::record::transfer::TransferHeader;
use crate::units::hash::Root;
use crate::units::ids::{HubId, SourceId};
use crate::units::numbers::{CpNumber, Epoch, Generation, TransferId, VolumeNumber};
use crate::wire::message::{
    Ack, CpDone, CpEnd, CpRejected, Hello, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN,
    PartitionFull, Pong, Refused, RefusedCode, VolumeOffer, VolumeRoot, Welcome,
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
    /// Volumes that its file pins, empty if it pins none: name and size in bytes.
    pub pinned: Vec<(String, u64)>,
    /// Published CP.
    pub applied_cp: CpNumber,
    /// Its place in the history.
    pub applied: Place,
    /// Its roots.
    pub roots: Vec<VolumeRoot>,
    /// Highest CP number or birth used here; at least one less than the CP number that the last
    /// transfer in the log carries, also after a restart (R6).
    pub cp_max: CpNumber,
}

/// What is known of a transfer that came.
#[derive(Debug, Clone, Copy)]
pub struct Arrived {
    /// Its header.
    pub header: TransferHeader,
    /// Its id, last sequence number, stream hash behind it.
    pub place: Place,
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
    /// The applier is done with that many bytes of Updates. What it has not taken when its apply
    /// ends counts as taken then.
    UpdatesTaken(u64),
    /// Everything up to this place is durable in the ring.
    Durable(Place),
    /// Everything up to this place lies in the source log.
    Drained(Place),
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
    /// Make generation, source id and new volumes durable, then say [`Event::Recorded`].
    Record { source: SourceId, generation: Generation, epoch: Epoch, volumes: Vec<VolumeOffer> },
    /// Put the transfer of this event into the ring.
    Stage,
    /// Begin to apply a CP; updates follow.
    Apply { cp: CpNumber, last: Place },
    /// Hand the Updates frame of this event to the applier. Frames fed before [`Action::Apply`]
    /// wait with the shell, at most the `cp` credit of them; they are dropped when the connection
    /// goes or a newer Hello is accepted.
    Feed,
    /// All updates of the CP were handed over: compare with these roots, publish.
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
    /// Close the connection: the peer broke the protocol.
    Close { reason: String },
}

#[derive(Debug, Clone)]
enum State {
    Away,
    Joining {
        version: u16,
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
    state: ApplyState,
    update_bytes: u64,
    end: Option<CpEnd>,
}

/// The mirror's machine for one source.
#[derive(Debug, Clone)]
pub struct Mirror {
    known: Known,
    state: State,
    received: Place,
    durable: Place,
    drained: Place,
    apply: Option<Apply>,
    log_credit: u64,
    cp_credit: u64,
    /// Bytes of Updates that came on this connection, and how many of them are taken.
    cp_came: u64,
    cp_taken: u64,
    /// The CP whose apply ended last without being published.
    given_up: Option<CpNumber>,
    faulted: Option<String>,
    last_refusal: Option<String>,
}

impl Mirror {
    /// A machine for a source whose log ends, durably and drained, at `last`.
    pub fn new(known: Known, last: Place, log_credit: u64, cp_credit: u64) -> Self {
        let last = if last.sequence > known.applied.sequence { last } else { known.applied };
        Self {
            known,
            state: State::Away,
            received: last,
            durable: last,
            drained: last,
            apply: None,
            log_credit,
            cp_credit,
            cp_came: 0,
            cp_taken: 0,
            given_up: None,
            faulted: None,
            last_refusal: None,
        }
    }

    /// Why the last CP was refused, until one is published.
    pub fn last_refusal(&self) -> Option<&str> {
        self.last_refusal.as_deref()
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

    /// The CP being applied.
    pub fn applying(&self) -> Option<CpNumber> {
        self.apply.as_ref().map(|apply| apply.cp)
    }

    /// Takes one event; returns what is to be done, in order.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Hello(hello) => self.hello(&hello, &mut actions),
            Event::Disconnected => self.disconnected(&mut actions),
            Event::Recorded => {
                if let State::Joining { recorded, .. } = &mut self.state {
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
            Event::UpdatesTaken(bytes) => self.updates_taken(bytes, &mut actions),
            Event::Durable(place) => self.durable(place, &mut actions),
            Event::Drained(place) => {
                if place.sequence > self.drained.sequence {
                    self.drained = place;
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

    fn hello(&mut self, hello: &Hello, actions: &mut Vec<Action>) {
        if let Err(refused) = self.accepts(hello) {
            actions.push(Action::Refuse(refused));
            return;
        }
        // A newer accepted Hello ends the older session (R7): its apply and its frames with it.
        self.disconnected(actions);
        if self.known.epoch.number == 0 {
            // Hub and source have never met: the first epoch is the generation's own random id.
            self.known.epoch = Epoch { number: 1, id: hello.generation.id };
        }
        self.known.source = Some(hello.source);
        self.known.generation = hello.generation;
        self.known.cp_max = self.known.cp_max.max(hello.cp_max);
        self.known.volumes.clone_from(&hello.volumes);
        let version = hello.version.min(PROTOCOL_VERSION);
        self.state = State::Joining { version, recorded: false };
        actions.push(Action::Record {
            source: hello.source,
            generation: hello.generation,
            epoch: self.known.epoch,
            volumes: hello.volumes.clone(),
        });
    }

    /// Who is who is decided by ids, epochs and generations, never by names (invariant 12). A shell
    /// asks before it ends an older connection for this one: a clone must not cut the original.
    pub fn accepts(&self, hello: &Hello) -> Result<(), Refused> {
        let known = &self.known;
        if hello.version < PROTOCOL_VERSION_MIN || hello.version_min > PROTOCOL_VERSION {
            let reason = format!(
                "the source speaks protocol versions {} to {}, the hub {PROTOCOL_VERSION_MIN} to \
                 {PROTOCOL_VERSION}",
                hello.version_min, hello.version
            );
            return Err(refuse(RefusedCode::Version, reason, "upgrade the hub first"));
        }
        if let Some(source) = known.source.filter(|&source| source != hello.source) {
            let reason = format!(
                "the name {} belongs to source {source}, this is source {}",
                hello.name, hello.source
            );
            let next = "give the new source another name, or forget the old one on the hub";
            return Err(refuse(RefusedCode::OtherSource, reason, next));
        }
        if let Some(hub) = hello.hub.filter(|&hub| hub != known.hub) {
            let reason = format!("the source belongs to hub {hub}, this is hub {}", known.hub);
            return Err(refuse(RefusedCode::OtherHub, reason, "check `hub` in source.toml"));
        }
        if hello.epoch.number > 0 && hello.epoch != known.epoch {
            let reason = format!(
                "the source is in epoch {} ({:016x}), the hub in epoch {} ({:016x})",
                hello.epoch.number, hello.epoch.id, known.epoch.number, known.epoch.id
            );
            let next = "see `mirrorhub status` on the hub";
            return Err(refuse(RefusedCode::Diverged, reason, next));
        }
        let used = hello.cp_max.max(hello.own_cp);
        if used > CP_NUMBER_MAX {
            let reason = format!("the source says that CP {used} was used");
            return Err(refuse(RefusedCode::Protocol, reason, "both ends must run mirrorhub"));
        }
        let (old, new) = (known.generation, hello.generation);
        if new.number < old.number || (new.number == old.number && new.id != old.id) {
            let reason = format!(
                "the source says boot {} ({:016x}), the hub has seen boot {} ({:016x}): its state \
                 is a clone or an old copy",
                new.number, new.id, old.number, old.id
            );
            let next = "start the original, or restore its newest state directory";
            return Err(refuse(RefusedCode::Generation, reason, next));
        }
        if let Some(fault) = &self.faulted {
            let reason = format!("the hub's log of this source failed: {fault}");
            return Err(refuse(RefusedCode::Faulted, reason, "see `mirrorhub status` on the hub"));
        }
        self.accepts_volumes(&hello.volumes)
    }

    fn accepts_volumes(&self, offers: &[VolumeOffer]) -> Result<(), Refused> {
        let next = "make source.toml and the source's file on the hub agree";
        if offers.len() > VOLUMES_PER_SOURCE_MAX {
            let reason =
                format!("{} volumes, a source has at most {VOLUMES_PER_SOURCE_MAX}", offers.len());
            return Err(refuse(RefusedCode::Volume, reason, next));
        }
        for (index, offer) in offers.iter().enumerate() {
            let name = &offer.name;
            let twice = |other: &VolumeOffer| {
                other.name == *name || other.number == offer.number || other.id == offer.id
            };
            let size = offer.size.is_whole_blocks() && offer.size.0 <= VOLUME_BYTES_MAX;
            if offers[..index].iter().any(twice) || !size {
                let reason = format!("volume {name} is announced twice or with a bad size");
                return Err(refuse(RefusedCode::Volume, reason, next));
            }
            let same = |old: &&VolumeOffer| {
                old.number == offer.number || old.name == *name || old.id == offer.id
            };
            if let Some(old) = self.known.volumes.iter().find(same)
                && old != offer
            {
                let reason = format!(
                    "volume {name} (number {}, id {}, {} bytes) is known here as {} (number {}, \
                     id {}, {} bytes)",
                    offer.number, offer.id, offer.size, old.name, old.number, old.id, old.size
                );
                return Err(refuse(RefusedCode::Volume, reason, next));
            }
            let pinned = self.known.pinned.iter().find(|(pin, _)| pin == name.as_str());
            if !self.known.pinned.is_empty() && pinned.is_none_or(|pin| pin.1 != offer.size.0) {
                let reason = format!(
                    "volume {name} of {} bytes is not what the source's file on the hub pins",
                    offer.size
                );
                return Err(refuse(RefusedCode::Volume, reason, next));
            }
        }
        let gone = |old: &&VolumeOffer| !offers.iter().any(|offer| offer.number == old.number);
        if let Some(old) = self.known.volumes.iter().find(gone) {
            let reason = format!("volume {} is no longer announced", old.name);
            return Err(refuse(RefusedCode::Volume, reason, next));
        }
        Ok(())
    }

    fn disconnected(&mut self, actions: &mut Vec<Action>) {
        self.state = State::Away;
        (self.cp_came, self.cp_taken) = (0, 0);
        if let Some(apply) = &mut self.apply {
            match apply.state {
                ApplyState::Waiting => self.apply = None,
                ApplyState::Running => {
                    apply.state = ApplyState::Aborting;
                    actions.push(Action::Abort);
                }
                // All of it is here: it is finished without the source.
                ApplyState::Finishing | ApplyState::Aborting => {}
            }
        }
    }

    fn transfer(&mut self, arrived: &Arrived, actions: &mut Vec<Action>) {
        if !matches!(self.state, State::Joined) {
            self.close("Transfer before Welcome", actions);
            return;
        }
        let Arrived { header, place } = arrived;
        if place.transfer == self.received.transfer && *place != self.received {
            let reason = format!("transfer {} came with two contents", header.id);
            self.close(reason, actions);
            return;
        }
        if place.transfer <= self.received.transfer {
            // A repeat: acknowledged once the first copy is durable, which Ack says anyway (R7).
            self.acknowledge(actions);
            return;
        }
        let follows = header.previous == self.received.transfer
            && header.hash_before == self.received.hash
            && header.first_sequence == self.received.sequence.next();
        // Its CP's end was told before it came, so it belongs to a later one; a label that says
        // otherwise would have it dropped with that CP's log.
        let ended = self.apply.as_ref().map_or(self.known.applied_cp, |apply| apply.cp);
        let ours = header.id.generation <= self.known.generation.number;
        if !follows || header.cp <= ended || header.cp > CP_NUMBER_MAX || !ours {
            let reason = format!(
                "transfer {} (behind {}, CP {}) does not follow {} (CP {} has ended)",
                header.id, header.previous, header.cp, self.received.transfer, ended
            );
            self.close(reason, actions);
            return;
        }
        self.received = *place;
        // A label of n says that the source has cut every CP below n, also if it has lost its
        // record of that: no number is used twice (R6).
        self.known.cp_max = self.known.cp_max.max(CpNumber(header.cp.0 - 1));
        actions.push(Action::Stage);
    }

    fn received(&mut self, message: Message, actions: &mut Vec<Action>) {
        match (&self.state, message) {
            (State::Joined, Message::PartitionFull(full)) => self.partition_full(&full, actions),
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
            (_, Message::Ping(ping)) => {
                actions.push(Action::Send(Message::Pong(Pong { token: ping.token })));
            }
            (_, Message::Pong(_)) => {}
            (_, Message::Going(going)) => self.close(going.reason, actions),
            (_, other) => self.close(format!("{} is out of place", other.name()), actions),
        }
    }

    fn partition_full(&mut self, full: &PartitionFull, actions: &mut Vec<Action>) {
        let last = Place::from(full.last);
        if full.cp <= self.known.applied_cp {
            actions.push(Action::Send(Message::CpDone(CpDone { cp: full.cp })));
        } else if self.apply.is_some() {
            self.close(format!("CP {} while another is under way", full.cp), actions);
        } else if last.sequence > self.received.sequence
            || last.sequence <= self.known.applied.sequence
            || full.cp > CP_NUMBER_MAX
        {
            let reason = format!("CP {} ends at {}, out of place", full.cp, last.transfer);
            self.close(reason, actions);
        } else {
            self.known.cp_max = self.known.cp_max.max(full.cp);
            let state = ApplyState::Waiting;
            self.apply = Some(Apply { cp: full.cp, last, state, update_bytes: 0, end: None });
        }
    }

    fn updates(&mut self, cp: CpNumber, bytes: u64, actions: &mut Vec<Action>) {
        if !matches!(self.state, State::Joined) {
            self.close("Updates before Welcome", actions);
            return;
        }
        let under_way = self.cp_came - self.cp_taken;
        if bytes > self.cp_credit.saturating_sub(under_way) {
            let credit = self.cp_credit;
            let reason = format!("{bytes} bytes of CP data over {under_way}, credit is {credit}");
            self.close(reason, actions);
            return;
        }
        self.cp_came += bytes;
        match &mut self.apply {
            Some(apply) if apply.cp == cp && apply.end.is_none() => {
                apply.update_bytes += bytes;
                actions.push(Action::Feed);
            }
            // Left over from a CP that was refused or was published already: taken and dropped.
            _ => self.updates_taken(bytes, actions),
        }
    }

    fn updates_taken(&mut self, bytes: u64, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Joined) {
            // What is said late, of an older connection or an ended apply, is counted already.
            self.cp_taken = self.cp_taken.saturating_add(bytes).min(self.cp_came);
            self.acknowledge(actions);
        }
    }

    fn cp_end(&mut self, end: CpEnd, actions: &mut Vec<Action>) {
        match &mut self.apply {
            Some(apply) if apply.cp == end.cp && apply.end.is_none() => {
                if apply.update_bytes != end.update_bytes || Place::from(end.place) != apply.last {
                    let reason = format!("CpEnd of CP {} does not fit its data", end.cp);
                    self.close(reason, actions);
                } else {
                    apply.end = Some(end);
                }
            }
            // Left over, like Updates.
            None if end.cp <= self.known.applied_cp || self.given_up == Some(end.cp) => {}
            _ => self.close(format!("CpEnd of CP {}, not under way", end.cp), actions),
        }
    }

    fn durable(&mut self, place: Place, actions: &mut Vec<Action>) {
        if place.sequence > self.durable.sequence {
            self.durable = place;
            self.acknowledge(actions);
        }
    }

    fn acknowledge(&self, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Joined) {
            actions.push(Action::Send(Message::Ack(Ack {
                id: self.durable.transfer,
                log_credit: self.log_credit,
                cp_taken: self.cp_taken,
            })));
        }
    }

    fn applied(&mut self, cp: CpNumber, outcome: Outcome, actions: &mut Vec<Action>) {
        let Some(apply) = self.apply.take_if(|apply| apply.cp == cp) else {
            panic!("an apply of CP {cp} ended that was not under way");
        };
        assert!(apply.state != ApplyState::Waiting, "an apply ended that was not begun");
        let joined = matches!(self.state, State::Joined);
        if self.cp_taken < self.cp_came {
            // What the applier left is dropped with the apply.
            self.updates_taken(self.cp_came, actions);
        }
        self.given_up = (!matches!(outcome, Outcome::Published(_))).then_some(cp);
        let reject = |differs, reason: String, no_space| {
            Action::Send(Message::CpRejected(CpRejected { cp, differs, reason, no_space }))
        };
        self.last_refusal = match &outcome {
            Outcome::Published(_) => None,
            Outcome::Rejected { reason, .. } => Some(reason.clone()),
            Outcome::NoSpace => Some("the hub's pool is full".to_owned()),
            Outcome::Aborted => self.last_refusal.take(),
        };
        match outcome {
            Outcome::Published(roots) => {
                self.known.applied_cp = cp;
                self.known.applied = apply.last;
                self.known.cp_max = self.known.cp_max.max(cp);
                let root = |(volume, root)| VolumeRoot { volume, root };
                self.known.roots = roots.into_iter().map(root).collect();
                actions.push(Action::DropLogs(cp));
                if joined {
                    actions.push(Action::Send(Message::CpDone(CpDone { cp })));
                }
            }
            Outcome::Rejected { differs, reason } if joined => {
                actions.push(reject(differs, reason, false));
            }
            Outcome::NoSpace if joined => {
                actions.push(reject(None, "the hub's pool is full".to_owned(), true));
            }
            Outcome::Rejected { .. } | Outcome::NoSpace | Outcome::Aborted => {}
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
            let ready = self.drained.sequence >= apply.last.sequence;
            if apply.state == ApplyState::Waiting && ready {
                apply.state = ApplyState::Running;
                // Updates that came before are still with the shell, in order.
                let at = actions.iter().position(|action| *action == Action::Feed);
                let start = Action::Apply { cp: apply.cp, last: apply.last };
                actions.insert(at.unwrap_or(actions.len()), start);
            }
            if apply.state == ApplyState::Running
                && let Some(end) = &apply.end
            {
                apply.state = ApplyState::Finishing;
                actions.push(Action::Finish(end.clone()));
            }
        }
        let quiet = self.apply.is_none() && self.durable == self.received;
        if let State::Joining { version, recorded: true } = self.state
            && quiet
        {
            self.state = State::Joined;
            actions.push(Action::Joined);
            actions.push(Action::Send(Message::Welcome(self.welcome(version))));
        }
    }

    fn welcome(&self, version: u16) -> Welcome {
        Welcome {
            version,
            hub: self.known.hub,
            epoch: self.known.epoch,
            applied_cp: self.known.applied_cp,
            roots: self.known.roots.clone(),
            applied: self.known.applied.into(),
            last: self.durable.into(),
            cp_max: self.known.cp_max,
            log_credit: self.log_credit,
            cp_credit: self.cp_credit,
        }
    }

    fn check(&self) {
        assert!(self.known.applied.sequence <= self.drained.sequence, "applied before drained");
        assert!(self.drained.sequence <= self.durable.sequence, "drained before durable");
        assert!(self.durable.sequence <= self.received.sequence, "durable before received");
    }

    /// Last durable transfer, for status and tests.
    pub fn durable_id(&self) -> TransferId {
        self.durable.transfer
    }

    /// Equal for machines that behave alike, for the searches of the tests.
    #[cfg(test)]
    pub(super) fn fingerprint<H: std::hash::Hasher>(&self, to: &mut H) {
        use std::hash::Hash;
        let Self { state, received, durable, drained, known, .. } = self;
        let recorded = matches!(state, State::Joining { recorded: true, .. });
        (std::mem::discriminant(state), recorded).hash(to);
        (received.hash, durable.hash, drained.hash).hash(to);
        (known.generation, known.applied_cp, known.cp_max, known.source.is_some()).hash(to);
        (self.log_credit, self.cp_credit, self.cp_came, self.cp_taken, self.given_up).hash(to);
        if let Some(Apply { cp, last, state, update_bytes, end }) = &self.apply {
            (cp, last.hash, std::mem::discriminant(state), update_bytes, end.is_some()).hash(to);
        }
    }
}

fn refuse(code: RefusedCode, reason: String, next_step: &str) -> Refused {
    Refused { code, reason, next_step: next_step.to_owned() }
}
