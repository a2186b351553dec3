//! The primary's half of a session: what a source sends, and when.
//!
//! Called by the forwarder with one event at a time. It knows which transfers the source holds
//! (the transfer table: place and size of each behind the last released CP), how many of them were
//! sent on this connection, and how far the hub has them durably.
//!
//! Invariants, checked after every step: `acked <= sent <= held`; a CP's PartitionFull leaves only
//! behind its last transfer, its CpEnd only behind all its data and the own commit (R6).
//!
//! A message that breaks the protocol ends the connection ([`Action::Close`]); a history that does
//! not join ends the session until an administrator acts ([`Action::Halt`]).

mod apart;
mod behind;
mod checkpoint;
mod joining;
mod promise;
mod setback;
mod unasked;
mod volumes;

use std::collections::VecDeque;

use crate::record::marks::Place;
use crate::units::hash::Root;
use crate::units::ids::{HubId, SourceId};
use crate::units::names::SourceName;
use crate::units::numbers::{
    CpNumber, Epoch, Generation, SequenceNumber, TransferId, VolumeNumber,
};
use crate::units::policy::{AloneMark, Policy};
use crate::wire::message::{
    Ack, CpRejected, Message, Pong, Refused, RefusedCode, VolumeOffer, VolumeRefusal, VolumeRoot,
    Welcome,
};
use crate::wire::pull::Want;

use self::apart::Apart;
use self::behind::Backlog;
use self::promise::Change;
use self::volumes::Volumes;

/// Who the source is; constant for one run of it, but for hub and epoch, which Welcome may set.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its name.
    pub name: SourceName,
    /// Its id.
    pub source: SourceId,
    /// The hub it belongs to, once it was welcomed.
    pub hub: Option<HubId>,
    /// Its boot counter, durable before the first Hello (R7).
    pub generation: Generation,
    /// Epoch it believes in; number 0 before the first Welcome.
    pub epoch: Epoch,
    /// Its volumes.
    pub volumes: Vec<VolumeOffer>,
    /// What it promises.
    pub policy: Policy,
    /// The durable mark: since when writes may have been acknowledged without the hub (R4).
    pub alone: Option<AloneMark>,
    /// Durable: the last transfer that it held when it began to serve without having asked its hub,
    /// until it has (R1).
    pub unasked: Option<TransferId>,
}

/// What its own stores say at the start.
#[derive(Debug, Clone, Default)]
pub struct Own {
    /// Its last own CP.
    pub cp: CpNumber,
    /// Roots of that CP.
    pub roots: Vec<(VolumeNumber, Root)>,
    /// A volume of it is smaller than it is announced: it has grown since.
    pub outgrown: bool,
}

/// A transfer the source holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Its id, last sequence number and the stream hash behind it.
    pub place: Place,
    /// Bytes of it on the wire.
    pub bytes: u64,
}

/// What the image of the hub is to this source, by the history of its own CPs (R5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Past {
    /// Not its past, or it cannot be known: nothing is written over it.
    No,
    /// One of its CPs, content and place, or empty: births tell what has changed since.
    Known,
    /// At the place of one of its CPs, or before the first, with other content: the trees are
    /// compared.
    Unknown,
}

/// What the shell tells the machine.
#[derive(Debug, Clone)]
pub enum Event {
    /// The connection stands.
    Connected,
    /// The connection is gone.
    Disconnected,
    /// Welcome came. `past` is what the hub's image, as Welcome names it, is to this source.
    Welcomed { welcome: Welcome, past: Past },
    /// Told before Welcomed: whether the image of a volume that both ends agree on is of an older
    /// CP than the hub's others, so that only a pass brings it up (R20).
    VolumesBehind(bool),
    /// A frame came, other than Welcome and Refill.
    Received(Message),
    /// A refilled transfer came and was checked; it follows the last one held.
    Refilled { held: Held, previous: TransferId, hash_before: crate::units::hash::StreamHash },
    /// The committing thread formed a transfer.
    Formed(Held),
    /// Transfers up to this one are durable in the own NVRAM.
    OwnDurable(TransferId),
    /// The freeze of a CP is durable in the own NVRAM.
    Frozen { cp: CpNumber, place: Place },
    /// Another policy was written into a freeze, of which [`Event::Frozen`] tells next, or was met at
    /// a start: behind that sequence number both are kept.
    Promised { next: Policy, behind: SequenceNumber },
    /// Volumes have grown, durably here: those of the own CPs to come, and of no earlier one.
    Grown(Vec<VolumeOffer>),
    /// The own commit of the frozen CP is durable.
    Committed { cp: CpNumber, roots: Vec<(VolumeNumber, Root)> },
    /// All Updates of the newest [`Action::SendData`] were handed to the socket; what an older one
    /// still had to send is dropped, not sent behind it.
    DataSent { cp: CpNumber, bytes: u64 },
    /// Time to try a CP again that the hub could not take for lack of space.
    Retry,
    /// The hub counts as lost: out of reach, or without progress, for `hub_timeout`.
    HubLost,
    /// The mark of [`Action::MarkApart`] is durable.
    Apart,
    /// The mark is durably gone, after [`Action::ClearApart`].
    Together,
    /// The highest sequence number that was ever answered without the hub, after
    /// [`Action::AskAlone`]. It may be of a transfer that [`Event::Formed`] has not told of yet.
    AnsweredAlone(SequenceNumber),
    /// Writers wait for the room of this CP, which is committed here.
    Pressed(CpNumber),
    /// Time to ask a hub again that takes none of the volumes: its files may have changed.
    TryAgain,
    /// Found at the start: somebody else is primary in that epoch (R12).
    Fenced(Epoch),
}

/// What the machine tells the shell, to be done in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send this message.
    Send(Message),
    /// Send the transfer with that id.
    SendTransfer(TransferId),
    /// Transfers that were not handed to the socket yet are not sent any more.
    Unsend,
    /// Start to send the data of the frozen CP; `inline` asks for every block as data.
    SendData { cp: CpNumber, inline: bool },
    /// The hub took that many bytes of CP data on this connection; at most `limit` may be under way.
    /// `taken` never falls within a connection, but only the shell knows what was sent: a hub may
    /// claim more, so subtract with care.
    DataWindow { taken: u64, limit: u64 },
    /// Everything up to this place is durable on the hub. It steps back at Welcome only if the hub
    /// has lost what it had acknowledged: what is missing is sent again (R7).
    HubDurable(Place),
    /// The refilled transfer of this event joins: append it to the NVRAM and the buffers.
    Adopt,
    /// Epoch and hub are known: keep them.
    Joined { hub: HubId, epoch: Epoch },
    /// Clients may be served; their writes belong to CP [`Primary::cp_max`] + 1.
    Serve,
    /// Release the partition of the CP: it is published on the hub, or, `alone`, committed here
    /// while the hub is known to lack it.
    Done { cp: CpNumber, alone: bool },
    /// The hub has less than it had acknowledged as durable (R7): told once, nothing to be done.
    SetBack { had: Place, has: Place },
    /// Volumes that the hub leaves out in this session (R20): nothing of them is sent at a CP.
    LeaveOut(Vec<VolumeRefusal>),
    /// How far writes are answered from now on.
    Answer(Answering),
    /// Note durably that the hub may lack what is acknowledged from now on; then say
    /// [`Event::Apart`] (R4).
    MarkApart(AloneMark),
    /// Keep durably, before anything behind this, where it began to serve without having asked its
    /// hub; or that it has asked (R1).
    Unasked(Option<TransferId>),
    /// Say [`Event::AnsweredAlone`]: nothing more is answered without the hub from here on.
    AskAlone,
    /// Take that mark away durably; then say [`Event::Together`].
    ClearApart,
    /// Start to send all that was born since `base` as the data of the own CP `cp`, which is
    /// pinned until [`Action::PassEnded`] or the next one of these; then say [`Event::DataSent`].
    SendPass { cp: CpNumber, base: CpNumber },
    /// The own CP `cp` is about to be offered for comparison with the image of CP `base`: it is
    /// pinned, and what is asked of it is answered, until [`Action::PassEnded`] or another pass.
    SendCompare { cp: CpNumber, base: CpNumber },
    /// The hub asks for a part of the CP that was offered.
    ServePull(Want),
    /// The image is at `cp` of this source; what was pinned for it may go.
    PassEnded { cp: CpNumber },
    /// The hub's image shows the own CP `cp`, which was done alone.
    Shown { cp: CpNumber },
    /// Also a comparison was refused: nothing is tried again before there is a newer CP (R19).
    Faulted { cp: CpNumber, reason: String },
    /// Cut a CP of what there is, be it nothing, unless one is under way.
    Freeze,
    /// Somebody else is primary in that epoch: note it durably, stop answering (R12).
    Fence(Epoch),
    /// Somebody at the hub asks for a checkpoint; answered with `CheckpointAt`.
    Checkpoint { token: u64 },
    /// The hub asks to read every block of that CP.
    Scan { cp: CpNumber, token: u64 },
    /// The answer to our own Scan.
    Scanned(crate::wire::message::Scanned),
    /// The CP was refused and will be tried again as said.
    Rejected { cp: CpNumber, reason: String, no_space: bool },
    /// Close the connection, say [`Event::Disconnected`], connect again at once: the hub is well,
    /// and hears of the next policy, or of volumes that have grown.
    Renew,
    /// The hub has noted the next policy: keep it durably, and from now on it alone.
    InForce(Policy),
    /// Close the connection, say [`Event::Disconnected`], connect again later.
    Close { reason: String },
    /// Close and do not connect again by yourself. What the source does alone is still told.
    Halt(Refused),
}

/// Up to where writes are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answering {
    /// As the policy says, with the hub in session.
    Policy,
    /// What is durable here: the hub is away, or does not join yet.
    Alone,
    /// Nothing, reads neither: `stop`, and the hub was not heard for `hub_timeout`.
    Held,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Away,
    Greeting,
    /// Until `target`, where the hub's log ended at Welcome.
    Refilling {
        target: Place,
    },
    Streaming,
    /// The peer broke the protocol; waits for [`Event::Disconnected`] and takes nothing more.
    Closing,
    Halted,
}

#[derive(Debug, Clone)]
struct PendingCp {
    cp: CpNumber,
    place: Place,
    roots: Option<Vec<VolumeRoot>>,
    data: Data,
    inline: bool,
    refusals: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Data {
    Waiting,
    Sending,
    Sent(u64),
    Ended,
    /// Refused for lack of space; waits for [`Event::Retry`].
    Parked,
}

impl Data {
    /// Whether PartitionFull was sent on this connection and is not answered.
    fn is_announced(self) -> bool {
        match self {
            Self::Waiting | Self::Parked => false,
            Self::Sending | Self::Sent(_) | Self::Ended => true,
        }
    }
}

/// The primary's machine.
#[derive(Debug, Clone)]
pub struct Primary {
    identity: Identity,
    state: State,
    serving: bool,
    held_after: Place,
    held: VecDeque<Held>,
    sent: usize,
    acked: usize,
    in_flight_bytes: u64,
    log_credit: u64,
    cp_credit: u64,
    cp_taken: u64,
    /// Last transfer known durable in the own NVRAM (R1).
    own_durable: TransferId,
    own_cp: CpNumber,
    own_roots: Vec<VolumeRoot>,
    cp_max: CpNumber,
    pending: Option<PendingCp>,
    apart: Apart,
    /// CPs done alone that the hub builds from its log.
    backlog: Backlog,
    /// What both ends speak, by the last Welcome.
    version: u16,
    volumes: Volumes,
    /// A policy that follows the one in force.
    change: Option<Change>,
    /// Connections of this boot.
    connections: u64,
    /// The mark that the hub was told of on this one.
    told_alone: Option<AloneMark>,
    /// The hub knows that its Welcome was heard.
    told_welcomed: bool,
    /// Hello was the first one, of a source that brings something along.
    told_work: bool,
    /// What the hub said last that it has.
    had: Place,
    answering: Answering,
    /// The CP that the hub has published, as far as it said.
    hub_cp: CpNumber,
    /// Why nothing is tried any more.
    halted: Option<RefusedCode>,
}

impl Primary {
    /// A machine for a source that holds `held` behind `held_after`, all of it durable. A CP that
    /// was frozen before the restart follows as [`Event::Frozen`] before the first
    /// [`Event::Connected`], and if its commit is durable as [`Event::Committed`] with its roots.
    pub fn new(
        identity: Identity,
        held_after: Place,
        held: impl IntoIterator<Item = Held>,
        own: Own,
    ) -> Self {
        let held: VecDeque<Held> = held.into_iter().collect();
        let mut apart = Apart::new(identity.alone.is_some());
        if own.outgrown {
            apart.outgrown(own.cp);
        }
        let own_durable = held.back().map_or(held_after, |held| held.place).transfer;
        let had = setback::had_before(&identity, held_after);
        Self {
            identity,
            state: State::Away,
            serving: false,
            held_after,
            held,
            own_durable,
            sent: 0,
            acked: 0,
            in_flight_bytes: 0,
            log_credit: 0,
            cp_credit: 0,
            cp_taken: 0,
            own_cp: own.cp,
            own_roots: apart::volume_roots(own.roots),
            cp_max: own.cp,
            pending: None,
            apart,
            backlog: Backlog::default(),
            version: 0,
            connections: 0,
            told_alone: None,
            told_welcomed: false,
            told_work: false,
            volumes: Volumes::default(),
            change: None,
            had,
            answering: Answering::Policy,
            hub_cp: CpNumber(0),
            halted: None,
        }
    }

    /// The last transfer the source holds or held.
    pub fn last(&self) -> Place {
        self.held.back().map_or(self.held_after, |held| held.place)
    }

    /// The volumes that Hello says.
    pub fn volumes(&self) -> &[VolumeOffer] {
        &self.identity.volumes
    }

    /// Whether the hub takes transfers.
    pub fn is_streaming(&self) -> bool {
        self.state == State::Streaming
    }

    /// Takes one event; returns what is to be done, in order.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Connected => self.connected(&mut actions),
            Event::Disconnected => self.disconnected(),
            Event::Welcomed { welcome, past } => {
                if self.state == State::Greeting {
                    self.welcomed(&welcome, past, &mut actions);
                } else if self.in_session() {
                    self.close("Welcome is out of place", &mut actions);
                }
            }
            Event::VolumesBehind(behind) => self.volumes_behind(behind),
            Event::Received(message) => {
                if self.in_session() {
                    self.received(message, &mut actions);
                }
            }
            Event::Refilled { held, previous, hash_before } => {
                if self.in_session() {
                    self.refilled(held, previous, hash_before, &mut actions);
                }
            }
            Event::Formed(held) => self.formed(held),
            Event::OwnDurable(id) => self.own_durable = self.own_durable.max(id),
            Event::Frozen { cp, place } => self.frozen(cp, place),
            Event::Promised { next, behind } => self.promised(next, behind),
            Event::Grown(volumes) => self.grown(volumes, &mut actions),
            Event::Committed { cp, roots } => self.committed(cp, roots),
            Event::DataSent { cp, bytes } => self.data_sent(cp, bytes),
            Event::Retry => {
                let pending = self.pending.as_mut().map(|pending| &mut pending.data);
                let rest = self.apart.pass_data().into_iter().chain(self.backlog.data());
                for data in pending.into_iter().chain(rest) {
                    if *data == Data::Parked {
                        *data = Data::Waiting;
                    }
                }
            }
            Event::TryAgain => self.try_again(),
            Event::HubLost => self.hub_lost(&mut actions),
            Event::Apart => self.marked(&mut actions),
            Event::Together => self.cleared(&mut actions),
            Event::AnsweredAlone(upto) => self.answered_alone(upto),
            Event::Pressed(cp) => self.pressed(cp, &mut actions),
            Event::Fenced(epoch) => self.fenced(epoch, &mut actions),
        }
        self.pump_standing(&mut actions);
        self.pump(&mut actions);
        self.pump_promise(&mut actions);
        self.check();
        actions
    }

    fn formed(&mut self, held: Held) {
        let last = self.last();
        let rises = held.place.sequence > last.sequence;
        assert!(rises && held.place.transfer > last.transfer, "transfers are formed in order");
        self.held.push_back(held);
    }

    /// Whether frames of the peer count: not behind a Close or Halt, nor without a connection.
    fn in_session(&self) -> bool {
        match self.state {
            State::Greeting | State::Refilling { .. } | State::Streaming => true,
            State::Away | State::Closing | State::Halted => false,
        }
    }

    /// Ends the connection; the shell connects again later.
    fn close(&mut self, reason: impl Into<String>, actions: &mut Vec<Action>) {
        self.state = State::Closing;
        actions.push(Action::Close { reason: reason.into() });
    }

    /// Ends the connection for good.
    fn halt(&mut self, refused: Refused, actions: &mut Vec<Action>) {
        self.state = State::Halted;
        self.halted = Some(refused.code);
        actions.push(Action::Halt(refused));
    }

    fn disconnected(&mut self) {
        if self.state != State::Halted {
            self.state = State::Away;
        }
        self.sent = self.acked;
        self.in_flight_bytes = 0;
        if let Some(pending) = &mut self.pending {
            pending.data = Data::Waiting;
        }
        self.apart.disconnected();
        self.backlog.clear();
    }

    fn received(&mut self, message: Message, actions: &mut Vec<Action>) {
        match (self.state, message) {
            (_, Message::Refused(refused)) => {
                self.refused(refused, actions);
            }
            (_, Message::Fenced(fenced)) => self.fenced_by(&fenced, actions),
            (State::Refilling { target }, Message::RefillEnd(end)) => {
                if Place::from(end.last) == target && self.last() == target {
                    self.acked = self.held.len();
                    self.sent = self.acked;
                    self.refill_over(actions);
                } else {
                    self.close("refill ended before the hub's last transfer", actions);
                }
            }
            (State::Streaming, Message::Ack(ack)) => self.ack(ack, actions),
            // The hub knows of a refill only when WantLog has come.
            (State::Refilling { .. }, Message::Ack(ack)) => self.log_credit = ack.log_credit,
            (State::Streaming, Message::WantNodes(want)) if self.apart.is_compared(want.cp) => {
                actions.push(Action::ServePull(Want::Nodes(want)));
            }
            (State::Streaming, Message::WantBlocks(want)) if self.apart.is_compared(want.cp) => {
                actions.push(Action::ServePull(Want::Blocks(want)));
            }
            (State::Streaming, Message::Behind(behind)) => self.behind(behind, actions),
            (State::Streaming, Message::CpDone(done)) => self.cp_done(done.cp, actions),
            (State::Streaming, Message::CpRejected(no)) => self.cp_rejected(&no, actions),
            (State::Streaming | State::Refilling { .. }, Message::WantCheckpoint(want)) => {
                actions.push(Action::Checkpoint { token: want.token });
            }
            (State::Streaming | State::Refilling { .. }, Message::Scan(scan)) => {
                actions.push(Action::Scan { cp: scan.cp, token: scan.token });
            }
            (State::Streaming | State::Refilling { .. }, Message::Scanned(scanned)) => {
                actions.push(Action::Scanned(scanned));
            }
            (_, Message::Ping(ping)) => {
                actions.push(Action::Send(Message::Pong(Pong { token: ping.token })));
            }
            (_, Message::Pong(_)) => {}
            (_, Message::Going(going)) => self.close(going.reason, actions),
            (state, other) => {
                self.close(format!("{} is out of place in state {state:?}", other.name()), actions);
            }
        }
    }

    /// The hub has published a CP, or the image that a pass brought up.
    fn cp_done(&mut self, cp: CpNumber, actions: &mut Vec<Action>) {
        if self.apart.is_passing(cp) {
            self.pass_done(actions);
        } else if self.backlog.is_announced(cp) {
            self.built(cp, actions);
        } else if self.is_announced(cp) {
            self.done(cp, actions);
        } else {
            self.close("CpDone of a CP that is not under way", actions);
        }
    }

    fn cp_rejected(&mut self, no: &CpRejected, actions: &mut Vec<Action>) {
        if self.apart.is_passing(no.cp) {
            self.pass_rejected(no, actions);
        } else if self.backlog.is_announced(no.cp) {
            self.backlog_rejected(no, actions);
        } else if self.is_announced(no.cp) {
            self.rejected(no, actions);
        } else {
            self.close("CpRejected of a CP that is not under way", actions);
        }
    }

    fn ack(&mut self, ack: Ack, actions: &mut Vec<Action>) {
        let upto = self.sent_upto(ack.id);
        if self.apart.is_syncing() {
            // It names the end of a log that does not join, or has overtaken the word that it does.
            if let Some(upto) = upto.filter(|_| self.forwards_behind()) {
                self.taken(upto);
            }
            self.credits(ack, actions);
            return;
        }
        let Some(upto) = upto else {
            self.close("an acknowledgement of a transfer that was not sent", actions);
            return;
        };
        if self.credits(ack, actions) && self.taken(upto) {
            self.acknowledged();
            actions.push(Action::HubDurable(self.acked_place()));
        }
    }

    /// How many held transfers lie up to and with `id`, which was sent, or is older than what the hub is known to
    /// have.
    fn sent_upto(&self, id: TransferId) -> Option<usize> {
        let upto = self.held.partition_point(|held| held.place.transfer <= id);
        let known = upto <= self.acked || self.held[upto - 1].place.transfer == id;
        (upto <= self.sent && known).then_some(upto)
    }

    /// The hub has so many of what is held. Whether that is news.
    fn taken(&mut self, upto: usize) -> bool {
        if upto <= self.acked {
            return false;
        }
        let bytes: u64 = self.held.range(self.acked..upto).map(|held| held.bytes).sum();
        self.in_flight_bytes -= bytes;
        self.acked = upto;
        true
    }

    /// Nothing of what is held was sent.
    fn unsend(&mut self) {
        (self.sent, self.acked, self.in_flight_bytes) = (0, 0, 0);
        self.backlog.clear();
    }

    /// What may be sent from now on; `false` if the connection is closed instead.
    fn credits(&mut self, ack: Ack, actions: &mut Vec<Action>) -> bool {
        if ack.cp_taken < self.cp_taken {
            self.close("an acknowledgement that takes CP data back", actions);
            return false;
        }
        self.log_credit = ack.log_credit;
        self.cp_taken = ack.cp_taken;
        actions.push(Action::DataWindow { taken: ack.cp_taken, limit: self.cp_credit });
        true
    }

    fn pump(&mut self, actions: &mut Vec<Action>) {
        self.pump_apart(actions);
        if self.state != State::Streaming {
            return;
        }
        if self.apart.is_syncing() {
            while self.forwards_behind() && self.send_next(actions) {}
            return;
        }
        if !self.identity.policy.forwards() {
            self.pump_cp(actions);
            return;
        }
        while self.send_next(actions) {
            self.pump_cp(actions);
        }
        self.pump_cp(actions);
    }

    /// Sends the next transfer, if there is one and the hub's credit allows it.
    fn send_next(&mut self, actions: &mut Vec<Action>) -> bool {
        let Some(next) = self.held.get(self.sent) else { return false };
        let fits = self.in_flight_bytes + next.bytes <= self.log_credit;
        if !fits && self.in_flight_bytes > 0 || self.log_credit == 0 {
            return false;
        }
        self.in_flight_bytes += next.bytes;
        self.sent += 1;
        actions.push(Action::SendTransfer(next.place.transfer));
        true
    }

    /// How many held transfers lie up to and with `place`, if it is on this line.
    fn find(&self, place: Place) -> Option<usize> {
        if place == self.held_after {
            return Some(0);
        }
        let at = self.held.partition_point(|held| held.place.sequence < place.sequence);
        self.held.get(at).filter(|held| held.place == place).map(|_| at + 1)
    }

    fn acked_place(&self) -> Place {
        match self.acked.checked_sub(1) {
            Some(last) => self.held[last].place,
            None => self.held_after,
        }
    }

    fn check(&self) {
        assert!(self.acked <= self.sent, "acknowledged before sent");
        assert!(self.sent <= self.held.len(), "sent before formed");
        let in_flight: u64 = match self.state {
            State::Streaming => self.held.range(self.acked..self.sent).map(|held| held.bytes).sum(),
            State::Away
            | State::Greeting
            | State::Refilling { .. }
            | State::Closing
            | State::Halted => 0,
        };
        debug_assert!(
            self.state != State::Streaming || in_flight == self.in_flight_bytes,
            "bytes under way are counted"
        );
    }

    /// Connections of this boot, for the searches of the tests.
    #[cfg(test)]
    pub(super) fn connections(&self) -> u64 {
        self.connections
    }

    /// Highest CP number that either end has used; the next freeze takes the one above (R6).
    pub fn cp_max(&self) -> CpNumber {
        self.cp_max
    }

    /// Whether the hub owes an acknowledgement. Of what is sent behind a pass it owes none.
    pub fn is_sending(&self) -> bool {
        self.is_streaming() && !self.apart.is_syncing() && self.sent > self.acked
    }

    /// Whether transfers wait for the hub, sent or not, and answers with them: of those that its
    /// credit keeps from being sent it may never say anything. A source that is answered alone
    /// loses nothing by waiting.
    pub fn waits_for_hub(&self) -> bool {
        let forwards = self.identity.policy.forwards() && !self.apart.is_syncing();
        let answers = self.answering == Answering::Policy;
        self.is_streaming() && forwards && answers && self.acked < self.held.len()
    }

    /// Bytes of CP data that the hub took on this connection.
    pub fn cp_taken(&self) -> u64 {
        self.cp_taken
    }

    /// Last sequence number the hub has durably.
    pub fn hub_sequence(&self) -> SequenceNumber {
        self.acked_place().sequence
    }

    /// Another promise of when transfers are acknowledged.
    #[cfg(test)]
    pub(super) fn set_ack(&mut self, ack: crate::units::policy::Ack) {
        self.identity.policy.ack = ack;
    }

    /// Equal for machines that behave alike, for the searches of the tests.
    #[cfg(test)]
    pub(super) fn fingerprint<H: std::hash::Hasher>(&self, to: &mut H) {
        use std::hash::Hash;
        let Self { state, serving, held_after, held, sent, acked, .. } = self;
        self.apart.fingerprint(to);
        (self.identity.alone, self.told_alone, self.told_welcomed, self.told_work).hash(to);
        self.identity.unasked.hash(to);
        self.volumes.fingerprint(to);
        self.promise_fingerprint(to);
        self.backlog.fingerprint(to);
        self.hub_cp.hash(to);
        self.answering.hash(to);
        let target = match state {
            State::Refilling { target } => Some(target.hash),
            State::Away | State::Greeting | State::Streaming | State::Closing | State::Halted => {
                None
            }
        };
        (std::mem::discriminant(state), target, serving).hash(to);
        (held_after.hash, held.len(), held.back().map(|held| held.place.hash), sent, acked)
            .hash(to);
        (self.log_credit, self.cp_credit, self.cp_taken, self.own_cp, self.cp_max).hash(to);
        if let Some(pending) = &self.pending {
            let PendingCp { cp, roots, data, inline, refusals, .. } = pending;
            let sent = if let Data::Sent(bytes) = data { Some(bytes) } else { None };
            (cp, roots.is_some(), std::mem::discriminant(data), sent, inline, refusals).hash(to);
        }
    }
}

fn refused(code: RefusedCode, reason: String, next_step: &str) -> Refused {
    Refused { code, reason, next_step: next_step.to_owned() }
}
