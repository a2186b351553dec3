//! The mirror's half of a session: what the hub takes from one source, and when it answers.
//!
//! Called by the source actor with one event at a time. It outlives connections: what is staged,
//! durable, drained and applied for the source is the same before and after a reconnect.
//!
//! Invariants, checked after every step: `applied <= drained <= durable <= received` in the
//! source's sequence; a transfer is staged only directly behind the last one received (R7); an
//! Ack names a durable transfer; Welcome leaves only when everything received is durable, the
//! source's generation is recorded and no CP is being applied (R7).

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
    /// Highest CP number or birth used here.
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
    /// First frame of a new connection.
    Hello(Hello),
    /// The connection is gone.
    Disconnected,
    /// The generation and volumes of [`Action::Record`] are durable; volumes as they now are.
    Recorded,
    /// A transfer came and its checksums are right.
    Transfer(Arrived),
    /// A frame came, other than Hello, Transfer and Updates.
    Received(Message),
    /// A frame of Updates came, of that many payload bytes.
    Updates { cp: CpNumber, bytes: u64 },
    /// The applier is done with that many bytes of Updates.
    UpdatesTaken(u64),
    /// Everything up to this place is durable in the ring.
    Durable(Place),
    /// Everything up to this place lies in the source log.
    Drained(Place),
    /// The apply ended.
    Applied { cp: CpNumber, outcome: Outcome },
    /// Bytes of transfers that may be under way from now on.
    Credit(u64),
    /// The log behind WantLog was sent up to this place, or does not hold its start.
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
    /// Hand the Updates frame of this event to the applier.
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
    /// Refuse with this reason and close.
    Refuse(Refused),
    /// Close the connection: the peer broke the protocol.
    Close { reason: String },
}

#[derive(Debug)]
enum State {
    Away,
    Joining { version: u16, recorded: bool },
    Refilling,
    Joined,
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

#[derive(Debug)]
struct Apply {
    cp: CpNumber,
    last: Place,
    state: ApplyState,
    update_bytes: u64,
    end: Option<CpEnd>,
}

/// The mirror's machine for one source.
#[derive(Debug)]
pub struct Mirror {
    known: Known,
    state: State,
    received: Place,
    durable: Place,
    drained: Place,
    apply: Option<Apply>,
    log_credit: u64,
    cp_credit: u64,
    cp_taken: u64,
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
            cp_taken: 0,
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
            Event::Transfer(arrived) => self.transfer(&arrived, &mut actions),
            Event::Received(message) => self.received(message, &mut actions),
            Event::Updates { cp, bytes } => self.updates(cp, bytes, &mut actions),
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

    fn hello(&mut self, hello: &Hello, actions: &mut Vec<Action>) {
        // A newer Hello ends the older session: the shell has closed its connection.
        self.disconnected(actions);
        if let Err(refused) = self.accepts(hello) {
            actions.push(Action::Refuse(refused));
            return;
        }
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

    /// Who is who is decided by ids and generations, never by names (invariant 12).
    fn accepts(&self, hello: &Hello) -> Result<(), Refused> {
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
        for (index, offer) in offers.iter().enumerate() {
            let name = &offer.name;
            let twice = |other: &VolumeOffer| other.name == *name || other.number == offer.number;
            if offers[..index].iter().any(twice) || !offer.size.is_whole_blocks() {
                let reason = format!("volume {name} is announced twice or with a bad size");
                return Err(refuse(RefusedCode::Volume, reason, next));
            }
            let same = |old: &&VolumeOffer| old.number == offer.number || old.name == *name;
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
        self.cp_taken = 0;
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
            actions.push(close("Transfer before Welcome".to_owned()));
            return;
        }
        let Arrived { header, place } = arrived;
        if place.transfer <= self.received.transfer {
            // A repeat: acknowledged once the first copy is durable, which Ack says anyway (R7).
            self.acknowledge(actions);
            return;
        }
        let follows = header.previous == self.received.transfer
            && header.hash_before == self.received.hash
            && header.first_sequence == self.received.sequence.next();
        if !follows || header.cp <= self.known.applied_cp {
            actions.push(close(format!(
                "transfer {} (behind {}, CP {}) does not follow {} (applied CP {})",
                header.id,
                header.previous,
                header.cp,
                self.received.transfer,
                self.known.applied_cp
            )));
            return;
        }
        self.received = *place;
        actions.push(Action::Stage);
    }

    fn received(&mut self, message: Message, actions: &mut Vec<Action>) {
        match (&self.state, message) {
            (State::Joined, Message::PartitionFull(full)) => self.partition_full(&full, actions),
            (State::Joined, Message::CpEnd(end)) => self.cp_end(end, actions),
            (State::Joined, Message::WantLog(want)) => {
                self.state = State::Refilling;
                actions.push(Action::SendLog { from: want.from.into() });
            }
            (State::Joined, Message::Scan(scan)) => {
                actions.push(Action::Scan { cp: scan.cp, token: scan.token });
            }
            (State::Joined, Message::Scanned(scanned)) => actions.push(Action::Scanned(scanned)),
            (State::Joined, Message::CheckpointAt(at)) => {
                actions.push(Action::CheckpointAt { token: at.token, cp: at.cp });
            }
            (State::Joined | State::Refilling, Message::Ping(ping)) => {
                actions.push(Action::Send(Message::Pong(Pong { token: ping.token })));
            }
            (_, Message::Pong(_)) => {}
            (_, Message::Going(going)) => actions.push(close(going.reason)),
            (_, other) => actions.push(close(format!("{} is out of place", other.name()))),
        }
    }

    fn partition_full(&mut self, full: &PartitionFull, actions: &mut Vec<Action>) {
        let last = Place::from(full.last);
        if full.cp <= self.known.applied_cp {
            actions.push(Action::Send(Message::CpDone(CpDone { cp: full.cp })));
        } else if self.apply.is_some() {
            actions.push(close(format!("CP {} while another is under way", full.cp)));
        } else if last.sequence > self.received.sequence
            || last.sequence <= self.known.applied.sequence
        {
            actions.push(close(format!("CP {} ends at {}, out of place", full.cp, last.transfer)));
        } else {
            let state = ApplyState::Waiting;
            self.apply = Some(Apply { cp: full.cp, last, state, update_bytes: 0, end: None });
        }
    }

    fn updates(&mut self, cp: CpNumber, bytes: u64, actions: &mut Vec<Action>) {
        let joined = matches!(self.state, State::Joined);
        match &mut self.apply {
            Some(apply) if joined && apply.cp == cp && apply.end.is_none() => {
                apply.update_bytes += bytes;
                if apply.state == ApplyState::Aborting {
                    self.cp_taken += bytes;
                } else {
                    actions.push(Action::Feed);
                }
            }
            // Left over from a CP that was refused or was published already: taken and dropped.
            _ if joined => self.cp_taken += bytes,
            _ => actions.push(close("Updates before Welcome".to_owned())),
        }
    }

    fn updates_taken(&mut self, bytes: u64, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Joined) {
            self.cp_taken += bytes;
            self.acknowledge(actions);
        }
    }

    fn cp_end(&mut self, end: CpEnd, actions: &mut Vec<Action>) {
        match &mut self.apply {
            Some(apply) if apply.cp == end.cp && apply.end.is_none() => {
                if apply.update_bytes != end.update_bytes || Place::from(end.place) != apply.last {
                    actions.push(close(format!("CpEnd of CP {} does not fit its data", end.cp)));
                } else if apply.state != ApplyState::Aborting {
                    apply.end = Some(end);
                }
            }
            _ if end.cp <= self.known.applied_cp => {}
            _ => actions.push(close(format!("CpEnd of CP {}, not under way", end.cp))),
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
        let joined = matches!(self.state, State::Joined);
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
            self.state = State::Joined;
            let end = crate::wire::message::RefillEnd { last: last.into() };
            actions.push(Action::Send(Message::RefillEnd(end)));
        } else {
            self.state = State::Away;
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
}

fn refuse(code: RefusedCode, reason: String, next_step: &str) -> Refused {
    Refused { code, reason, next_step: next_step.to_owned() }
}

fn close(reason: String) -> Action {
    Action::Close { reason }
}
